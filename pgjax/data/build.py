"""Datasets on disk: ArrayRecord files written and read through TFDS, without TensorFlow.

Pictures are stored as the original file bytes (TFDS keeps those of a BytesIO as they are). What may be missing in an `Example`
is a sequence of at most one entry, because TFDS knows no None.
"""

import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import tensorflow_datasets as tfds

from pgjax.data.schema import Example
from pgjax.files import new_folder

OPTIONAL = ("request", "response", "node", "name")
VERSION = tfds.core.Version("1.0.0")
SHARD = 10_000  # rows of a file
BATCH = 32  # rows written at a time
PLAIN = tuple(f.name for f in fields(Example) if f.name not in (*OPTIONAL, "images", "accepted", "turns"))


def _features() -> tfds.features.FeaturesDict:
    text, many = tfds.features.Text(), tfds.features.Sequence
    return tfds.features.FeaturesDict(
        {name: text for name in PLAIN}
        | {name: many(text) for name in (*OPTIONAL, "accepted")}
        | {"images": many(tfds.features.Image()), "turns": many({"role": text, "text": text})}
    )


def _record(row: Example) -> dict:
    record: dict = {name: getattr(row, name) for name in PLAIN}
    record |= {name: [] if getattr(row, name) is None else [getattr(row, name)] for name in OPTIONAL}
    record["accepted"] = list(row.accepted)
    record["images"] = [io.BytesIO(data) for data in row.images]
    record["turns"] = [{"role": role, "text": text} for role, text in row.turns]
    return record


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
        write_rows(examples, aside)
    return out


def write_rows(examples: Iterable[Example], folder: Path) -> None:
    """The same into a folder that is there, of rows that come one by one: memory holds BATCH of them.

    A TFDS builder would first gather a split, in memory and from 1 GB on in files that it needs TensorFlow for.
    """
    identity = tfds.core.DatasetIdentity(name="pgjax", version=VERSION, data_dir=str(folder), module_name=__name__)
    info = tfds.core.DatasetInfo(builder=identity, features=_features(), disable_shuffling=True)  # the pipeline shuffles
    writer = tfds.core.SequentialWriter(info, SHARD, file_format="array_record")
    rows = iter(examples)
    while batch := list(itertools.islice(rows, BATCH)):
        by_split: dict[str, list[dict]] = {}
        for row in batch:
            by_split.setdefault(row.split, []).append(_record(row))
        writer.initialize_splits(sorted(by_split), fail_if_exists=False)
        writer.add_examples(by_split)
    writer.close_all()


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
