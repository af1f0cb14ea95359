"""Datasets on disk: what goes in comes out, byte for byte, without TensorFlow."""

import io
import subprocess
import sys

import pytest
from PIL import Image

from pgjax.data.build import build_dataset, read_dataset
from pgjax.data.schema import Example


def picture(size: tuple[int, int], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(buffer, kind)
    return buffer.getvalue()


ROWS = [
    Example("a", "g1", "toy", "text", "Wie geht's? \u2028 \U0001f600", None, (), "safe", "absent", "none"),
    Example("b", "g1", "toy", "text_image", "", " two\nlines ", (picture((20, 30), "PNG"), picture((5, 7), "JPEG")), "unsafe", "safe",
            "node", "C5", ("C6", "C7S1"), "A name", (("user", "one"), ("assistant", "")), "train"),
    Example("c", "g2", "toy", "image", None, None, (picture((9, 4), "GIF"),), "unknown", "absent", "ood", split="eval"),
]  # fmt: skip


def test_round_trip(tmp_path):
    folder = build_dataset(ROWS, tmp_path / "data")
    train, held_out = read_dataset(folder, "train"), read_dataset(folder, "eval")
    assert list(train) == ROWS[:2] and list(held_out) == ROWS[2:]
    assert train[-1] == ROWS[1] and len(train) == 2
    with pytest.raises(IndexError):
        train[2]
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "something was left beside the dataset"


def test_order_is_kept_over_many_rows(tmp_path):
    rows = [Example(f"row{n}", f"g{n}", "toy", "text", str(n), None, (), "safe", "absent", "none") for n in range(300)]
    assert [row.id for row in read_dataset(build_dataset(rows, tmp_path / "data"), "train")] == [row.id for row in rows]


def test_no_tensorflow(tmp_path):
    code = "import sys, tests.test_build as t; from pgjax.data.build import *; d = build_dataset(t.ROWS, sys.argv[1]);"
    code += "print(read_dataset(d, 'eval')[0].id, 'tensorflow' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "data")], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-3:] == ["c", "False", "False"]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="no examples"):
        build_dataset([], tmp_path / "data")
    with pytest.raises(ValueError, match="no dataset"):
        read_dataset(tmp_path / "data", "train")
    folder = build_dataset(ROWS, tmp_path / "data")
    with pytest.raises(ValueError, match="exists already"):
        build_dataset(ROWS, folder)
    with pytest.raises(ValueError, match="no split 'test'; it has eval, train"):
        read_dataset(folder, "test")


def test_a_failed_build_leaves_nothing(tmp_path):
    class Broken(list):
        def __iter__(self):
            yield from ROWS[:1]
            raise RuntimeError("lost the source")

    with pytest.raises(RuntimeError):
        build_dataset(Broken(ROWS), tmp_path / "data")
    assert not list(tmp_path.iterdir())
