"""Datasets on disk: ArrayRecord files written and read through TFDS, without TensorFlow.

Pictures are stored as the original file bytes (TFDS keeps those of a BytesIO as they are). What may be missing in an `Example`
is a sequence of at most one entry, because TFDS knows no None.
"""

import contextlib
import io
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import tensorflow_datasets as tfds

from pgjax.data.schema import Example
from pgjax.files import new_folder

OPTIONAL = ("request", "response", "node", "name")
PLAIN = tuple(f.name for f in fields(Example) if f.name not in (*OPTIONAL, "images", "accepted", "turns"))


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    name = "pgjax"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: Mapping[str, Iterable[Example]], **options):
        self._splits = splits
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        text, many = tfds.features.Text(), tfds.features.Sequence
        return tfds.core.DatasetInfo(
            builder=self,
            disable_shuffling=True,  # rows keep their order; the pipeline shuffles
            features=tfds.features.FeaturesDict(
                {name: text for name in PLAIN}
                | {name: many(text) for name in (*OPTIONAL, "accepted")}
                | {"images": many(tfds.features.Image()), "turns": many({"role": text, "text": text})}
            ),
        )

    def _split_generators(self, _) -> dict[str, Iterator]:
        return {split: self._generate_examples(rows) for split, rows in sorted(self._splits.items())}

    def _generate_examples(self, rows: Iterable[Example]) -> Iterator[tuple[int, dict]]:
        for number, row in enumerate(rows):
            record: dict = {name: getattr(row, name) for name in PLAIN}
            record |= {name: [] if getattr(row, name) is None else [getattr(row, name)] for name in OPTIONAL}
            record["accepted"] = list(row.accepted)
            record["images"] = [io.BytesIO(data) for data in row.images]
            record["turns"] = [{"role": role, "text": text} for role, text in row.turns]
            yield number, record


def build_dataset(examples: Sequence[Example], out_dir: str | Path) -> Path:
    """Write `examples` to the folder `out_dir`, a TFDS split for each value of `Example.split`, rows in order. Returns the folder.

    Written aside and renamed, so that `out_dir` is whole or absent. Raises ValueError when it exists or there are no examples.
    """
    out = Path(out_dir)
    if out.exists():
        raise ValueError(f"dataset folder {out} exists already; remove it or name another")
    if not examples:
        raise ValueError(f"no examples to write to {out}")
    with new_folder(out) as aside:
        write_splits({split: [row for row in examples if row.split == split] for split in {row.split for row in examples}}, aside)
    return out


def write_splits(splits: Mapping[str, Iterable[Example]], folder: Path) -> None:
    """A dataset into a folder that is there. Each split is gone through once."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download that is none
        builder = _Builder(splits, data_dir=folder / "build", file_format="array_record")
        builder.download_and_prepare()
    for file in Path(builder.data_path).iterdir():
        file.rename(folder / file.name)
    shutil.rmtree(folder / "build")


class _FileBytes(tfds.decode.SkipDecoding):
    """Pictures as stored. TFDS skips the decoding of one picture but lacks the method for a sequence of them."""

    def decode_batch_example_np(self, data):
        return data


class ExampleSource(Sequence[Example]):
    """Random access to the examples of one split on disk."""

    def __init__(self, source: Sequence[dict], folder: str | Path):
        self._source, self._folder = source, folder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        row = self._row(range(len(self))[index])
        values: dict = {name: row[name].decode() for name in PLAIN}
        values |= {name: row[name][0].decode() if len(row[name]) else None for name in OPTIONAL}
        values["accepted"] = tuple(node.decode() for node in row["accepted"])
        values["images"] = tuple(bytes(data) for data in row["images"])
        turns = zip(row["turns"]["role"], row["turns"]["text"], strict=True)
        values["turns"] = tuple((role.decode(), text.decode()) for role, text in turns)
        return Example(**values)

    def _row(self, index: int) -> dict:
        try:
            return self._source[index]
        except Exception as error:  # ArrayRecord has no type of its own for a file that is gone or cut
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"dataset {self._folder}: row {index} cannot be read ({reason}); put its files back, and a run goes on"
            ) from error


def read_dataset(folder: str | Path, split: str) -> ExampleSource:
    """Open one split of what `build_dataset` wrote. Raises ValueError when the folder or the split is not there."""
    builder = _opened(folder)
    if split not in builder.info.splits:
        raise ValueError(f"dataset {folder} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    return ExampleSource(builder.as_data_source(split, decoders={"images": _FileBytes()}), folder)


def splits_of(folder: str | Path) -> list[str]:
    """The splits that it has. Raises ValueError when the folder is no dataset."""
    return sorted(_opened(folder).info.splits)


def _opened(folder: str | Path) -> tfds.core.DatasetBuilder:
    if not (Path(folder) / "dataset_info.json").exists():
        raise ValueError(f"{folder} holds no dataset (no dataset_info.json); build one first")
    return tfds.builder_from_directory(folder)
