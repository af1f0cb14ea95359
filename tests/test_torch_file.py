"""Weights of a torch file: views as torch means them, and nothing else in a pickle is run. The pickles are written by hand, or by torch."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from pgjax.models.torch_file import load_torch_file

STORAGE = np.arange(6, dtype=np.float32)


def tensor(offset: int, shape: tuple, stride: tuple, kind: str = "FloatStorage") -> str:
    """The pickle of a tensor that looks at storage 0."""
    tuples = ["(" + "".join(f"I{n}\n" for n in numbers) + "t" for numbers in (shape, stride)]
    storage = f"(Vstorage\nctorch\n{kind}\nV0\nVcpu\nI6\ntQ"
    return f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n{tuples[0]}{tuples[1]}I00\nccollections\nOrderedDict\n)RtR"


def write(path, pickled: bytes | str):
    """A file of one state dict: a pickle, or tensors' pickles by name."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", STORAGE.tobytes())
    return path


def state_dict(**tensors: str) -> str:
    return "}" + "".join(f"V{name}\n{pickled}s" for name, pickled in tensors.items()) + "."


def test_offsets_and_strides(tmp_path):
    file = write(
        tmp_path / "x.bin", state_dict(rows=tensor(0, (2, 3), (3, 1)), columns=tensor(0, (3, 2), (1, 3)), tail=tensor(4, (2,), (1,)))
    )
    got = load_torch_file(file)
    assert list(got) == ["rows", "columns", "tail"]
    np.testing.assert_array_equal(got["rows"], STORAGE.reshape(2, 3))
    np.testing.assert_array_equal(got["columns"], STORAGE.reshape(2, 3).T)
    np.testing.assert_array_equal(got["tail"], [4, 5])


class MakesFolder:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path):
    made = tmp_path / "made"
    for protocol in (0, 2, 4):
        file = write(tmp_path / "x.bin", pickle.dumps({"weight": MakesFolder(made)}, protocol))
        with pytest.raises(ValueError, match=r"x\.bin cannot be read \(it asks for \w+\.mkdir.*safetensors"):
            load_torch_file(file)
        assert not made.exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (state_dict(x=tensor(0, (2, 3), (3, 1), "QInt8Storage")), "torch.QInt8Storage"),
        (state_dict(x=tensor(4, (3,), (1,))), "cannot be read"),  # views that leave the storage, at either end
        (state_dict(x=tensor(-1, (2,), (1,))), "cannot be read"),
        (state_dict(x=tensor(2, (2,), (-3,))), "cannot be read"),
        (state_dict(x=tensor(0, (2, 3), (3, 1)))[:-9], "cannot be read"),
        (state_dict(x="I3\n"), "something else than tensors"),
        ("ccollections\nOrderedDict\n.", "something else than tensors"),
    ],
)
def test_a_pickle_of_another_kind_is_refused(tmp_path, pickled, message):
    with pytest.raises(ValueError, match=f"{message}.*safetensors"):
        load_torch_file(write(tmp_path / "x.bin", pickled))


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "x.bin"
    file.write_bytes(pickle.dumps(119547037146038801333356))  # as files of older versions begin
    with pytest.raises(ValueError, match="not a zip file.*safetensors"):
        load_torch_file(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "no tensors")
    with pytest.raises(ValueError, match="data.pkl"):
        load_torch_file(file)


@pytest.mark.parity
def test_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    tensors = {
        "plain": base, "transposed": base.T, "part": base[1:3, ::2], "tied": base, "half": base.half(), "bfloat16": base.bfloat16(),
        "counter": torch.arange(3), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "x.bin")
    got = load_torch_file(tmp_path / "x.bin")
    assert list(got) == list(tensors)
    for name, x in tensors.items():
        assert str(x.dtype).removeprefix("torch.") == got[name].dtype.name and got[name].shape == tuple(x.shape)
        np.testing.assert_array_equal(got[name].astype(np.float32), x.float().numpy(), err_msg=name)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.bin")  # a whole module
    with pytest.raises(ValueError, match="torch.nn.modules.linear.Linear.*safetensors"):
        load_torch_file(tmp_path / "x.bin")
