"""The second embedder: on a table of four tokens by hand, and the package's table against what the package itself computes."""

import importlib.machinery
import importlib.util

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pgjax.bank import build_bank
from pgjax.models.static_encoder import PACKAGE, TABLE, TOKENIZER, load_static_encoder
from pgjax.taxonomy import load_taxonomy


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder laid out like the package; its tokenizer would pad, cut and add a token if it were let."""
    for name in (TABLE, TOKENIZER):
        (tmp_path / name).parent.mkdir()
    table_VE = np.array([[9, 9], [3, 0], [1, 4], [-1, 4]], np.float16)
    save_file({"embedding.weight": table_VE}, tmp_path / TABLE)
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "tea": 1, "milk": 2, "salt": 3}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_padding(length=5)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / TOKENIZER))
    spec = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return tmp_path


def test_by_hand(package):
    encoder = load_static_encoder()
    got = encoder.texts(["tea", "milk milk salt salt", "tea milk", ""])
    assert got.shape == (4, encoder.E) and got.dtype == np.float32
    np.testing.assert_allclose(got, [[1, 0], [0, 1], [2**-0.5, 2**-0.5], [0, 0]], atol=1e-6)
    assert encoder.texts([]).shape == (0, 2)


def test_the_fingerprint_follows_the_files(package):
    before = load_static_encoder().fingerprint
    assert load_static_encoder().fingerprint == before
    save_file({"embedding.weight": np.ones((4, 2), np.float16)}, package / TABLE)
    assert load_static_encoder().fingerprint != before


def test_without_the_package_there_is_none_and_half_a_package_is_an_error(package, monkeypatch):
    (package / TABLE).unlink()
    with pytest.raises(ValueError, match="second embedder.*wordllama"):
        load_static_encoder()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_static_encoder() is None


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"package {PACKAGE} is not installed")
def test_the_package_table():
    """Cosines that the package's own embed(norm=True) gives; and a bank can be made with it."""
    encoder = load_static_encoder()
    vectors = encoder.texts(["Environmental Harm", "Careless watering of a neighbour's tomatoes", "x"])
    np.testing.assert_allclose(
        vectors @ vectors.T, [[1, 0.028718, -0.056124], [0.028718, 1, -0.024135], [-0.056124, -0.024135, 1]], atol=1e-5
    )
    bank = build_bank(load_taxonomy(), encoder)
    assert bank.embedding_NSE.shape[-1] == encoder.E == 256 and bank.embedder == encoder.fingerprint
