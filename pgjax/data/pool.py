"""All rows that were read, on disk, by their number: a build looks at them several times, and pictures of 100,000 fit no memory."""

import pickle
from collections.abc import Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from pgjax.data.schema import Example


class Writer:
    def __init__(self, path: Path):
        self._path, self._file, self._count = path, ArrayRecordWriter(str(path), "group_size:1,uncompressed"), 0

    def add(self, example: Example) -> int:
        """The row's number."""
        self._file.write(pickle.dumps(example))
        self._count += 1
        return self._count - 1

    def close(self) -> "Pool":
        self._file.close()
        return Pool(self._path)


class Pool(Sequence[Example]):
    def __init__(self, path: Path):
        self._file = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")

    def __len__(self) -> int:
        return self._file.num_records()

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        return pickle.loads(self._file.read([index])[0])
