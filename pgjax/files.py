"""Files and folders that are whole or absent, whenever the process is killed: written aside, then renamed. And JSON, read with care."""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # the disk is full, or the user's part of it


def read_json(file: Path) -> dict:
    """The object in a JSON file. ValueError names the file that cannot be read, is cut off or holds something else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{file} is not whole JSON ({error}); copy or make the file again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return data


def check_out(path: Path) -> None:
    """ValueError where a folder of this name could not be made and written to, so that it is known before anything is done."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"--out {path}: {there} is no folder that can be written to; give another")


def replace_file(path: Path, content: str | bytes) -> None:
    """A reader sees the old file or the new one, never half of it, however many write it at a time."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        aside.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(aside, path)
    except OSError:  # the disk is full, say
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` at the end. What an earlier, killed attempt left is removed first. A folder that is
    there stays, unless `replace` is given."""
    aside, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if replace and path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(aside, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Renames before it deletes, so that nobody takes what is half deleted for whole; a folder that is not there is fine."""
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        os.replace(path, aside)
        shutil.rmtree(aside)
