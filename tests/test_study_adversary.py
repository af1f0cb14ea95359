"""The study's constant phrase, on a taxonomy of three categories and an encoder of a few kilobytes."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_encoder import WORDS, tiny_encoder

from pgjax.bank import build_bank, calibrate, similarity
from pgjax.models.sentence_encoder import load_embedder
from pgjax.rewards import naming_bonus
from pgjax.taxonomy import parse_taxonomy

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import study_adversary  # noqa: E402
from study_adversary import VARIANTS, Judge, Sizes, bank_variant, measure, table  # noqa: E402

TAXONOMY = parse_taxonomy("""
- category: w4
  description: one
  synonymous-phrase: [w5 w6, w7]
  subcategories:
    - {name: w8, description: two, synonymous-phrase: [w9 w10, w11]}
    - {name: w12, description: three, synonymous-phrase: [w13, w14 w15]}
- {category: w16, description: four, synonymous-phrase: [w17, w18]}
- {category: w19, description: five, synonymous-phrase: [w20, w21 w4]}
""")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return load_embedder(tiny_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def bank(embedder):
    return calibrate(build_bank(TAXONOMY, embedder), TAXONOMY)[0]


def earned(bank, vector_GE):
    """[N, G] by the path of the reward."""
    N = len(TAXONOMY)
    similarity_NGS, valid_NS = similarity(bank, jnp.broadcast_to(vector_GE, (N, *vector_GE.shape)), jnp.arange(N))
    return np.asarray(naming_bonus(similarity_NGS, valid_NS, bank.max_threshold, bank.mean_threshold))


def test_bank_variants_by_hand(bank, embedder):
    """Names in the bank, whose largest similarity is 1, and others."""
    vector_GE = embedder.texts(["w4", "w5 w6", "w13", "w22", "w9 w18"])
    similarity_NGS = np.einsum("ge,nse->ngs", vector_GE, bank.embedding_NSE)
    largest = (similarity_NGS.max(-1) - bank.max_threshold) / (1 - bank.max_threshold) / 2
    mean = (similarity_NGS.mean(-1) - bank.mean_threshold) / (1 - bank.mean_threshold) / 2
    expected = {"full": np.maximum(largest, mean), "max_only": largest, "mean_only": mean}
    for name, bonus_NG in expected.items():
        np.testing.assert_allclose(earned(bank_variant(bank, name), vector_GE), np.maximum(bonus_NG, 0), atol=1e-5)
    assert (earned(bank_variant(bank, "mean_only"), vector_GE) < 0.499).all()

    alone = bank_variant(bank, "one_name", TAXONOMY)
    threshold = alone.max_threshold
    assert threshold == alone.mean_threshold < 1 and np.asarray(alone.valid_NS).sum(1).tolist() == [1] * len(TAXONOMY)
    expected = np.maximum((similarity_NGS[..., 0] - threshold) / (1 - threshold) / 2, 0)
    np.testing.assert_allclose(earned(alone, vector_GE), expected, atol=1e-5)
    with pytest.raises(ValueError, match="no bank variant 'both'; there are full"):
        bank_variant(bank, "both")


def test_the_search_finds_what_earns_more_than_any_word(embedder, monkeypatch):
    monkeypatch.setattr(study_adversary, "W", embedder.module.config.max_tokens)
    sizes = Sizes(beam=2, words=3, steps=2, batch=16)
    judge = Judge(TAXONOMY, embedder, second=None)
    found = measure(judge, ["w22"], ["w23"], sizes)
    assert found == measure(judge, ["w22"], ["w23"], sizes)
    assert list(found["variants"]) == ["published", *VARIANTS]
    assert found["search"]["leaf_nodes"] == 4 and found["search"]["vocabulary"] == len(WORDS) - 4
    words_GE = embedder.texts(WORDS[4:])
    for variant, leaf in found["variants"].items():
        for level, x in (("leaf", leaf), ("top", leaf["top"])):
            node_N, best = judge.node_N[level], x[f"bonus_{level}"]
            assert earned(judge.banks[variant], words_GE)[node_N].mean(0).max() <= best + 1e-5
            assert best <= x["any_vector"] + 1e-5 and 0 < x["nodes_paid"] <= 1
            shown, bonus = x["shown"].values()
            tokens = embedder.tokenize([shown], study_adversary.W)
            np.testing.assert_allclose(earned(judge.banks[variant], embedder.embed(*tokens))[node_N].mean(), bonus, atol=1e-5)
            if x["best_phrase"] == shown:
                assert bonus == pytest.approx(best, abs=1e-5)
            else:
                assert bonus <= best + 1e-5 and "not shown" in x["best_phrase"]
            N = len(node_N)  # a constant names each node in turn
            assert x["top1"] == pytest.approx(1 / N) and x["mrr"] == pytest.approx((1 / np.arange(1, N + 1)).mean())
            own = x["honest"]["own_name"]["bonus"]
            assert own < 0.499 if variant == "mean_only" else own == pytest.approx(0.5, abs=1e-5)
    assert "w23" not in str(found)
    assert len(table(found)) == 2 * len(found["variants"])
