"""JSON Lines at the border: objects with the place they stand at, so that every later complaint can name it."""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Line(NamedTuple):
    path: Path
    number: int  # from 1, blank lines counted
    row: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path} line {self.number}"

    def text(self, key: str) -> str:
        """The text under a key, None read as ""; ValueError where the key is missing or holds something else.

        Halves of a character (lone surrogates), which neither tokenizers nor terminals take, become `?`.
        """
        if key not in self.row:
            raise ValueError(f"{self.where}: the key {key!r} is missing")
        value = self.row[key]
        if not isinstance(value, str | None):
            raise ValueError(f"{self.where}: {key!r} must be text, not {type(value).__name__}")
        return (value or "").encode("utf-8", "replace").decode("utf-8")


def read_jsonl(path: str | Path) -> list[Line]:
    """One JSON object a line, UTF-8; blank lines are passed over. ValueError names the file and the line that is something else."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    lines = []
    for number, content in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line ends
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number}: not JSON ({getattr(error, 'msg', error)}); a line is one JSON object") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number}: a JSON {type(row).__name__}; a line is one JSON object")
        lines.append(Line(path, number, row))
    if not lines:
        raise ValueError(f"{path} has no rows; write one JSON object a line")
    return lines
