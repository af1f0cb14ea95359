"""The packaged taxonomy, the reader's complaints, and what a prompt shows of it."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax.config import OODConfig
from pgjax.taxonomy import PACKAGED, full_view, level_of, load_taxonomy, node_of_id, parse_taxonomy, policy_view, render_policy

TAXONOMY = load_taxonomy()
GRID = tuple(id for c in range(1, 12) for id in [f"C{c}", *(f"C{c}S{s}" for s in range(1, 4))])
GARDEN = """\
- category: Garden pests
  description: Small guests that eat the salad.
  synonymous-phrase: [slugs in the lettuce]
  subcategories:
    - name: Slugs
      description: They come at night.
      synonymous-phrase: [slimy visitors, leaf eaters]
    - name: Snails
      description: They bring their house.
      synonymous-phrase: [shelled visitors]
- category: Bad weather
  description: Rain on a picnic.
  synonymous-phrase: [wet and windy]
"""


def published():
    if "PGJAX_DATA" not in os.environ:
        pytest.skip("PGJAX_DATA is not set: no published taxonomy to read")
    return load_taxonomy(Path(os.environ["PGJAX_DATA"]) / "proguard" / "taxonomy.yaml")


def phrases(taxonomy):
    return [phrase.casefold() for node in taxonomy.nodes for phrase in (*node.synonyms, node.description)]


# --- the files ---------------------------------------------------------------------------------------------------------------------


def test_packaged_taxonomy_is_complete():
    assert (len(TAXONOMY), len(TAXONOMY.top), len(TAXONOMY.leaves)) == (39, 11, 28)
    assert [node.id for node in TAXONOMY.nodes[:5]] == ["C1", "C1S1", "C1S2", "C1S3", "C2"]
    assert TAXONOMY.by_id("C9S2").name == "Animal Abuse" and TAXONOMY.by_id("C9S2").parent == "C9"
    assert [child.id for child in TAXONOMY.children("C4")] == ["C4S1", "C4S2"]
    for n, node in enumerate(TAXONOMY.nodes):
        assert TAXONOMY.index(node.id) == n
        assert len(node.synonyms) == 5 and all(2 <= len(s.split()) <= 6 for s in node.synonyms), node.id
        assert node.description.count(".") == 1 and node.description.endswith("."), node.id
    assert len(set(phrases(TAXONOMY))) == 39 * 6


def test_reserved_entry_is_opaque_and_never_shown():
    (node,) = [node for node in TAXONOMY.nodes if node.reserved]
    assert node.id == "C11S1" and node.name == "Reserved (C11S1)"
    assert all(re.fullmatch(r"reserved entry, phrase \w+", phrase) for phrase in node.synonyms)
    for level in ("leaf", "top"):
        view = full_view(TAXONOMY, level)
        assert TAXONOMY.index("C11S1") not in dict(view.entries).values() and TAXONOMY.index("C11S1") in view.hidden
        assert "eserved" not in render_policy(TAXONOMY, view, True)


def test_published_file_is_read_and_none_of_its_sentences_are_ours():
    theirs = published()
    assert (len(theirs), len(theirs.top)) == (39, 11)
    assert [n.id for n in theirs.nodes] == [n.id for n in TAXONOMY.nodes]
    assert [n.name for n in theirs.nodes if n.id != "C11S1"] == [n.name for n in TAXONOMY.nodes if n.id != "C11S1"]
    assert not set(phrases(theirs)) & set(phrases(TAXONOMY))


def test_own_taxonomy_of_any_size(tmp_path):
    (tmp_path / "garden.yaml").write_text(GARDEN, encoding="utf-8")
    garden = load_taxonomy(tmp_path / "garden.yaml")
    assert [node.id for node in garden.nodes] == ["C1", "C1S1", "C1S2", "C2"]
    assert [node.id for node in garden.leaves] == ["C1S1", "C1S2", "C2"]
    view = full_view(garden, "leaf")
    assert view.answerable == {"C1S1", "C1S2", "C2"}
    assert render_policy(garden, view, True).splitlines()[1:] == [
        "  C1S1: Slugs — They come at night.",
        "  C1S2: Snails — They bring their house.",
        "C2: Bad weather — Rain on a picnic.",
    ]
    assert render_policy(garden, full_view(garden, "top"), False) == "C1: Garden pests\nC2: Bad weather"


@pytest.mark.parametrize(
    ("old", "new", "line", "what"),
    [
        ("name: Snails", "name: slugs", 8, "already used in line 5"),
        ("Bad weather", "Slugs", 11, "already used in line 5"),
        ("      description: They come at night.\n", "", 5, "missing key `description`"),
        ("They come at night.", "", 6, "is empty"),
        ("They come at night.", "'  '", 6, "is empty"),
        ("They come at night.", "2024", 6, "must be text"),
        ("name: Slugs", "name: [Slugs]", 5, "must be text"),
        ("[shelled visitors]", "shelled visitors", 10, "must be a list"),
        ("[shelled visitors]", "[]", 10, "at least one"),
        ("[shelled visitors]", "[~]", 10, "is empty"),
        ("synonymous-phrase: [wet", "synonymous-phrases: [wet", 13, "did you mean `synonymous-phrase`"),
        ("name: Snails", "nmae: Snails", 8, "unknown key `nmae`; did you mean `name`"),
        ("  description: Rain on a picnic.", "  description: Rain.\n  description: Sun.", 13, "twice"),
        ("- category: Bad weather\n  description: Rain on a picnic.\n  synonymous-phrase: [wet and windy]", "- Rain", 11, "expected"),
        ("  description: Rain", "  reserved: maybe\n  description: Rain", 12, "true or false"),
        ("  description: Rain", "  subcategories: none\n  description: Rain", 12, "must be a list"),
        ("[wet and windy]", "[wet and windy", 14, "not valid YAML"),
        ("Rain on a picnic.", "Rain \x07 on", 12, "not valid YAML"),
        (GARDEN, "", 1, "no categories"),
        (GARDEN, "[]", 1, "no categories"),
        (GARDEN, "\ncategory: Garden", 2, "must be a list of categories"),
        (GARDEN, "[" * 2000, 1, "not valid YAML"),
    ],
)
def test_bad_file_is_refused_by_line(tmp_path, old, new, line, what):
    assert GARDEN.count(old) == 1
    file = tmp_path / "own.yaml"
    file.write_text(GARDEN.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_taxonomy(file)
    assert any(f"{file}:{line}:" in row and what in row for row in str(error.value).splitlines()), error.value


def test_all_problems_come_in_one_error():
    text = GARDEN.replace("Snails", "Slugs").replace("Rain on a picnic.", "").replace("[wet and windy]", "7")
    with pytest.raises(ValueError, match="has 3 problems") as error:
        parse_taxonomy(text, "own.yaml")
    assert [row.split(":")[1] for row in str(error.value).splitlines()[1:]] == ["8", "12", "13"]


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_taxonomy(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"- category: Caf\xe9\n")
    with pytest.raises(ValueError, match="UTF-8"):
        load_taxonomy(tmp_path / "latin.yaml")
    with pytest.raises(ValueError, match="did you mean 'C9S2'"):
        TAXONOMY.index("C9S22")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["drop", "twice", "indent", "dash", "blank"])), min_size=1, max_size=4))
def test_a_damaged_file_is_read_or_refused_never_crashes(damage):
    lines = GARDEN.splitlines()
    for at, how in damage:
        line = lines[at]
        lines[at] = {"drop": "", "twice": f"{line}\n{line}", "indent": "  " + line, "dash": "- " + line, "blank": line.split(":")[0]}[how]
    try:
        assert parse_taxonomy("\n".join(lines)).nodes
    except ValueError as error:
        assert re.search(r"taxonomy:\d+: ", str(error))


# --- views -------------------------------------------------------------------------------------------------------------------------

DRAWS = st.fixed_dictionaries(
    {
        "keep": st.none() | st.tuples(st.integers(1, 30), st.integers(0, 10)).map(lambda k: (k[0], k[0] + k[1])),
        "shuffle": st.booleans(),
        "renumber": st.booleans(),
        "never_seen": st.sampled_from([(), ("C5",), ("C8S1", "C3S2"), ("C2S1", "C2S2", "C9")]),
    }
)


@settings(max_examples=300, deadline=None)
@given(
    DRAWS, st.sampled_from(["leaf", "top"]), st.sampled_from([None, *(n.id for n in TAXONOMY.nodes)]), st.booleans(), st.integers(0, 2**32)
)
def test_policy_view(draw, level, gold, hide_gold, seed):
    ood = OODConfig(**draw)
    view = policy_view(TAXONOMY, ood, np.random.default_rng(seed), level, gold, hide_gold)
    assert view == policy_view(TAXONOMY, ood, np.random.default_rng(seed), level, gold, hide_gold)
    shown = dict(view.entries)
    nodes = [TAXONOMY.nodes[n] for n in shown.values()]
    assert len(set(shown.values())) == len(shown) == len(view.entries)

    # Never seen and reserved: neither they nor what is below them.
    assert not {"C11S1", *ood.never_seen} & {i for node in nodes for i in (node.id, node.parent)}

    # The gold entry.
    everything = full_view(TAXONOMY, level, ood.never_seen)
    if gold is not None:
        node = TAXONOMY.by_id(gold)
        family = {n.id for n in TAXONOMY.nodes if gold in (n.id, n.parent)} | ({node.parent} if level == "top" else set())
        possible = bool(family & {TAXONOMY.nodes[n].id for n in dict(everything.entries).values()})
        gold_is_shown = bool(family & {n.id for n in nodes})
        assert gold_is_shown == (possible and not hide_gold)
        if node.parent is None or level == "leaf":
            assert (TAXONOMY.index(gold) in view.hidden) == (not gold_is_shown)

    # How many: entries of the level.
    count, most = len(view.answerable), len(everything.answerable)
    if ood.keep is not None:
        assert count <= ood.keep[1] and (count >= ood.keep[0] or hide_gold or count == most)
    elif not hide_gold:
        assert count == most

    # Order and numbering: subcategories directly below their own category, which is listed first.
    for id, node in zip(shown, nodes, strict=True):
        assert ("S" in id) == (node.parent is not None)
        if node.parent is not None:
            assert shown[id.split("S")[0]] == TAXONOMY.index(node.parent)
    tops = [id for id in shown if "S" not in id]
    if ood.renumber:
        assert tops == [f"C{i}" for i in range(1, len(tops) + 1)]
        for top in tops:
            children = [id for id in shown if id.startswith(f"{top}S")]
            assert children == [f"{top}S{j}" for j in range(1, len(children) + 1)]
    else:
        assert all(id == node.id for id, node in zip(shown, nodes, strict=True))
    order = [id.split("S")[0] for id in shown]
    assert order == sorted(order, key=tops.index)
    if not ood.shuffle:
        assert list(shown.values()) == sorted(shown.values())
    assert view.answerable == ({id for id in shown if "S" in id} if level == "leaf" else set(shown))

    # Arrays and text say the same.
    row = node_of_id(view, GRID)
    assert row.dtype == np.int32 and {GRID[k]: n for k, n in enumerate(row) if n >= 0} == shown
    lines = render_policy(TAXONOMY, view, False).splitlines()
    assert [line.strip() for line in lines] == [f"{id}: {node.name}" for id, node in zip(shown, nodes, strict=True)]
    assert TAXONOMY.index("C11S1") not in shown.values() and len(set(shown.values())) == len(view.entries)


def test_hiding_alone_takes_one_entry():
    view = policy_view(TAXONOMY, OODConfig(shuffle=False), np.random.default_rng(0), "leaf", "C9S2", True)
    full = full_view(TAXONOMY, "leaf")
    assert view.hidden - full.hidden == {TAXONOMY.index("C9S2")}
    assert ("C9", TAXONOMY.index("C9")) in view.entries and "C9" not in view.answerable
    # A safe prompt can have a gap too.
    view = policy_view(TAXONOMY, OODConfig(shuffle=False), np.random.default_rng(0), "top", None, True)
    assert len(full_view(TAXONOMY, "top").entries) - len(view.entries) == 1


def test_views_vary_with_the_draw():
    ood = OODConfig(keep=(3, 6), renumber=True)
    views = [policy_view(TAXONOMY, ood, np.random.default_rng(k), "top", "C7", False) for k in range(200)]
    assert {len(view.entries) for view in views} == {3, 4, 5, 6}
    assert {id for view in views for id, node in view.entries if node == TAXONOMY.index("C7")} == {f"C{i}" for i in range(1, 7)}


def test_bad_requests_for_a_view():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no category id 'C12'"):
        policy_view(TAXONOMY, OODConfig(), rng, "leaf", "C12", False)
    with pytest.raises(ValueError, match="no category id 'C99'"):
        policy_view(TAXONOMY, OODConfig(never_seen=("C99",)), rng, "leaf", None, False)
    with pytest.raises(ValueError, match=r"data\.ood\.keep is \(4, 2\)"):
        policy_view(TAXONOMY, OODConfig(keep=(4, 2)), rng, "leaf", None, False)
    with pytest.raises(ValueError, match="C2"):
        node_of_id(full_view(TAXONOMY, "top"), ("C1",))


def test_levels_and_packaged_path():
    assert [level_of(m) for m in ("text", "text_image", "image")] == ["leaf", "top", "leaf"]
    assert PACKAGED.is_file()
