"""Which rows a training set takes."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pgjax.data.balance import Cell, Entry, balance, level
from pgjax.data.dataset import Target


def entries(counts: dict[tuple[str, bool, str], int], source: str = "a") -> list[Entry]:
    kinds = [kind for kind, n in counts.items() for _ in range(n)]
    return [
        Entry(k, ((k * 7919) % 1009, b""), source, "train", modality, unsafe, about) for k, (modality, unsafe, about) in enumerate(kinds)
    ]


def test_level_golden():
    assert level(10, {"a": 1, "b": 20, "c": 20}) == {"a": 1, "b": 4, "c": 5}
    assert level(100, {"a": 1, "b": 2}) == {"a": 1, "b": 2}
    assert level(0, {"a": 1}) == {"a": 0} and level(3, {}) == {}


@given(st.integers(0, 200), st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(0, 60), max_size=8))
def test_level(wanted, supply):
    """All that is wanted or all that there is; nobody has two more than another who could have given more."""
    shares = level(wanted, supply)
    assert sum(shares.values()) == min(wanted, sum(supply.values())) and all(shares[kind] <= supply[kind] for kind in supply)
    open_ = [shares[kind] for kind in supply if shares[kind] < supply[kind]]
    assert not open_ or max(shares.values()) - min(open_) <= 1


def test_labels_and_categories():
    rows = entries({("text", True, "C1"): 30, ("text", True, "C2"): 4, ("text", False, "none"): 12, ("image", False, "none"): 9})
    plan = balance(rows, [Target("text", 40, unsafe=0.5, even=True)], {})
    assert plan.taken == {
        Cell("train", "text", True, "C1"): 16,
        Cell("train", "text", True, "C2"): 4,
        Cell("train", "text", False, "none"): 12,
    }
    assert Counter((e.unsafe, e.category) for e in plan.chosen) == {(True, "C1"): 16, (True, "C2"): 4, (False, "none"): 12}
    assert plan.available[Cell("train", "image", False, "none")] == 9 and not any(e.modality == "image" for e in plan.chosen)
    as_it_comes = balance(rows, [Target("text", 23)], {})
    assert as_it_comes.taken == {
        Cell("train", "text", True, "C1"): 15,
        Cell("train", "text", True, "C2"): 2,
        Cell("train", "text", False, "none"): 6,
    }


def test_a_source_gives_no_more_than_it_may_and_new_sources_displace_none_of_the_first():
    rows = entries({("text", False, "none"): 50})
    assert len(balance(rows, [Target("text", 50)], {"a": 7}).chosen) == 7
    few = {e.order for e in balance(rows, [Target("text", 20)], {}).chosen}
    assert few < {e.order for e in balance(rows, [Target("text", 30)], {}).chosen}
    assert few == set(sorted(e.order for e in rows)[:20])
