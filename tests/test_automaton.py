"""The automaton against the published patterns (PAPERS A7, A8), written here with Python's `re`."""

import random
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import byte_level, sentencepiece

from pgjax import automaton as au
from pgjax.data.schema import ABSENT, IMAGE, MODALITIES, SAFE, TEXT, TEXT_IMAGE, UNSAFE
from pgjax.tokenizer import stop_ids, strips_leading_space

IDS = (*au.id_grid(2, 2), "C9", "C10", "C10S1")
LABEL = {"safe": SAFE, "unsafe": UNSAFE}
REFUSED = (False, ABSENT, ABSENT, -1, -1)


@jax.jit
def read(automaton, tokens, length, modality):
    return au.verdict(automaton, au.run(automaton, tokens, length, modality))


def reference(text: str, modality: int, tag: str) -> tuple[bool, int, int, int, int]:
    """(parsed, request, response, kind, id) by the published patterns."""
    head, end = rf"^<{tag}>.*?</{tag}>\r?\n<answer>\r?\n", r"\r?\n</answer>$"
    free = r"Category:((?!None\r?\n)[^\r\n]+)"
    if modality == IMAGE:
        patterns = [r"Request:(safe)()\r?\nCategory:(None)", rf"Request:(unsafe)()\r?\n{free}"]
    else:
        patterns = [r"Request:(safe)\r?\nResponse:(safe)\r?\nCategory:(None)"]
        patterns += [
            rf"Request:({q})\r?\nResponse:({a})\r?\n{free}" for q, a in (("safe", "unsafe"), ("unsafe", "safe"), ("unsafe", "unsafe"))
        ]
    for k, pattern in enumerate(patterns):
        found = re.match(head + pattern + end, text, re.DOTALL)
        if found:
            value = found[3].strip()
            if k == 0:
                kind = au.NONE
            elif value in IDS:
                kind = au.ID
            elif re.match(r"^C\d+S\d+$", value) or re.match(r"^C\d+$", value):
                kind = au.UNLISTED
            else:
                kind = {"None": au.NONE_LIKE, "": au.EMPTY}.get(value, au.NAME)
            return True, LABEL[found[1]], LABEL.get(found[2], ABSENT), kind, IDS.index(value) if kind == au.ID else -1
    return REFUSED


SPACES = [" ", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u202f", "\u205f", "\u3000"]
VALUES = [
    "C99",
    "C01",
    "C1S9",
    "C3",
    "C10S01",
    "C\u0663",
    "C1S\uff12",
    "C\U0001d7d8",
    "None",
    "none",
    "Nonesuch",
    "c1s1",
    "C1S1, C2",
    "C",
    "C1S",
    "CS1",
]
VALUES += [
    "Borrowed umbrellas",
    "Loose benches é",
    "\u200b",
    "\u2007x",
    "</answer>",
    "</think>",
    "Category:None",
    "C1\u00b2",
    "\ufffd",
    "日本",
]
SCRAPS = [
    *SPACES,
    "\r",
    "\n",
    "\r\n",
    "<think>",
    "</think>",
    "</thinking>",
    "<answer>",
    "</answer>",
    "\n</answer>",
    "Request:safe",
    "Category:None",
    "unsafe",
    "C1",
]
SCRAPS += ["S2", "é", "\ufffd", ":", "</think>\n<answer>\n", "0"]


def answer(rng: random.Random, modality: int, tag: str) -> str:
    """An answer that mostly keeps the form, then perhaps a few edits."""
    newline = partial(rng.choices, ["\n", "\r\n"], [4, 1])
    request, response = rng.choice(["safe", "unsafe"]), rng.choice(["safe", "unsafe"])
    none = request == "safe" and (modality == IMAGE or response == "safe")
    value = rng.choice([rng.choice(IDS), "None", "", rng.choice(VALUES), rng.choice(VALUES)])
    if rng.random() < 0.5 or not value:
        value = "".join(rng.choices(SPACES, k=rng.randrange(3))) + value + "".join(rng.choices(SPACES, k=rng.randrange(3)))
    value = "None" if none and rng.random() < 0.9 else value
    thought = rng.choice(
        ["", "bread", f"a {tag}\n", f"</{tag}>", f"</{tag}>\n<answer>\nRequest:safe\nCategory:None\n</answer>", "日\u2028", "\r\n\n"]
    )
    if rng.random() < 0.05:
        tag = rng.choice(["think", "thinking"])
    lines = [f"<{tag}>{thought}</{tag}>", "<answer>", f"Request:{request}", f"Response:{response}", f"Category:{value}", "</answer>"]
    if (modality == IMAGE) != (rng.random() < 0.03):
        del lines[3]
    text = "".join(line + newline()[0] for line in lines[:-1]) + lines[-1] + rng.choices(["", "\n", "\n\n", "\r\n"], [12, 2, 1, 1])[0]
    for _ in range(rng.choices([0, 1, 2, 4], [7, 3, 1, 1])[0]):
        at = rng.randrange(len(text) + 1) if rng.random() < 0.5 else max(0, len(text) - rng.randrange(50))
        text = text[:at] + rng.choice(["", *SCRAPS]) + text[at + rng.choice([0, 0, 1, 2]) :]
    return text


def mutate(rng: random.Random, ids: list[int], vocab: int, special: list[int]) -> list[int]:
    """Edits in tokens: special ones inside, any others (stray bytes among them) inserted, one removed or doubled."""
    ids = list(ids)
    for _ in range(rng.choices([0, 1, 2, 5], [7, 3, 1, 1])[0]):
        at = rng.randrange(len(ids) + 1)
        what = rng.random()
        if what < 0.5:
            ids.insert(at, rng.choice(special))
        elif what < 0.75:
            ids.insert(at, rng.randrange(vocab))
        elif what < 0.9:
            del ids[at : at + 1]
        else:
            ids[at:at] = ids[at : at + 1]
    return ids


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    return byte_level() if request.param == "byte_level" else sentencepiece(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def automaton(tokenizer):
    return au.build(tokenizer, IDS)


def padded(rows: list[list[int]], width: int, fill: list[int]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.resize(np.array(fill, np.int32), (len(rows), width))
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, np.array([len(ids) for ids in rows], np.int32)


@pytest.mark.parametrize("tag", ["think", "thinking"])
def test_texts_agree_with_the_published_patterns(tag):
    rng, parsed = random.Random(tag), 0
    for n in range(3000):
        modality = (TEXT, TEXT_IMAGE, IMAGE)[n % 3]
        text = answer(rng, modality, tag)
        said = au.read_text(text, MODALITIES[modality], IDS, tag)
        assert (said.parsed, said.request, said.response, said.kind, said.id) == reference(text, modality, tag)
        parsed += said.parsed
    assert 1000 < parsed < 2500
    assert not au.read_text("\ud800", "text", IDS, tag).parsed


@pytest.mark.parametrize("tag", ["think", "thinking"])
def test_agrees_with_the_published_patterns(tokenizer, automaton, tag):
    """10,000 answers a tag and a tokenizer, so 20,000 for each tokenizer."""
    automaton = automaton if tag == "think" else au.build(tokenizer, IDS, tag)
    rng, count = random.Random(tag), 10_000
    stops, special = stop_ids(tokenizer), [k for k, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = [k for k in special if k not in stops]
    modality = np.array([rng.choice([TEXT, TEXT_IMAGE, IMAGE]) for _ in range(count)])
    texts = [answer(rng, int(m), tag) for m in modality]
    rows = [mutate(rng, ids, len(tokenizer), special) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    rows = [ids[: next((r for r, k in enumerate(ids) if k in stops), len(ids))] for ids in rows]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    expected = np.array([reference(text, int(m), tag) for text, m in zip(texts, modality, strict=True)])

    ended = [
        ids + [rng.choice(stops)] + rng.choices(range(len(tokenizer)), k=rng.randrange(3)) if rng.random() < 0.5 else ids for ids in rows
    ]
    tokens, length = padded(ended, max(map(len, ended)), [7, 11, 300, *stops])
    v = read(automaton, tokens, length, modality)
    found = np.stack([v.parsed, v.request, v.response, v.kind, v.id], axis=1)
    wrong = np.flatnonzero((found != expected).any(axis=1))
    assert not len(wrong), [(texts[k], int(modality[k]), expected[k], found[k]) for k in wrong[:5]]
    parsed = expected[:, 0] == 1
    assert 0.3 < parsed.mean() < 0.9  # both sides are tried, and every kind
    assert all((expected[parsed, 3] == kind).sum() > 10 for kind in range(6))


def say(tokenizer, automaton, text: str, modality: int, tag: str = "think") -> tuple:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens, length = padded([ids], 200, [0])
    v = read(automaton, tokens, length, np.array([modality]))
    return tuple(int(x[0]) for x in (v.parsed, v.request, v.response, v.kind, v.id))


UNSAFE_IMAGE = "<think>x</think>\n<answer>\nRequest:unsafe\nCategory:{}\n</answer>"


@pytest.mark.parametrize(
    ("value", "kind", "shown"),
    [
        ("C1S2", au.ID, "C1S2"), ("\u3000C10\x85", au.ID, "C10"), ("C99", au.UNLISTED, None), ("C01", au.UNLISTED, None),
        ("C\u0664S\U0001d7db", au.UNLISTED, None), ("C1S\u00b2", au.NAME, None),
        (" None", au.NONE_LIKE, None), ("None\u2028", au.NONE_LIKE, None),
        ("\u00a0", au.EMPTY, None), ("\u200b", au.NAME, None), ("Loose benches", au.NAME, None), ("</think>", au.NAME, None),
    ],
)  # fmt: skip
def test_kinds(tokenizer, automaton, value, kind, shown):
    assert say(tokenizer, automaton, UNSAFE_IMAGE.format(value), IMAGE) == (1, UNSAFE, ABSENT, kind, IDS.index(shown) if shown else -1)
    assert say(tokenizer, automaton, UNSAFE_IMAGE.format(value), TEXT) == REFUSED


@pytest.mark.parametrize("value", ["None", ""])
def test_an_unsafe_answer_names_something(tokenizer, automaton, value):
    assert say(tokenizer, automaton, UNSAFE_IMAGE.format(value), IMAGE) == REFUSED


def test_line_ends(tokenizer, automaton):
    text = UNSAFE_IMAGE.format("C9")
    for end, parsed in (("", 1), ("\n", 1), ("\n\n", 0), ("\r\n", 0), (" ", 0)):
        assert say(tokenizer, automaton, text + end, IMAGE)[0] == parsed
    assert say(tokenizer, automaton, text.replace("\n", "\r\n"), IMAGE)[0] == 1
    assert say(tokenizer, automaton, "  " + text, IMAGE)[0] == 0
    assert say(tokenizer, automaton, " " + text, IMAGE)[0] == strips_leading_space(tokenizer)


def test_bytes_outside_utf8(tokenizer, automaton):
    """A stray byte is U+FFFD: fine in a thought or a name, and then the name is not an id."""
    stray = next(k for token, k in tokenizer.get_vocab().items() if token in ("<0xC3>", "Ã"))
    encode = partial(tokenizer, add_special_tokens=False)
    rows = []
    for before, after in (
        ("<think>x", "</think>\n<answer>\nRequest:unsafe\nCategory:C2\n</answer>"),
        (UNSAFE_IMAGE.split("{")[0] + "C2", "\n</answer>"),
    ):
        rows.append(encode(before)["input_ids"] + [stray] + encode(after)["input_ids"])
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    tokens, length = padded(rows, 200, [0])
    v = read(automaton, tokens, length, np.full(2, IMAGE))
    expected = np.array([reference(text, IMAGE, "think") for text in texts])
    np.testing.assert_array_equal(np.stack([v.parsed, v.request, v.response, v.kind, v.id], axis=1), expected)
    assert expected[0, 3] == au.ID


def test_step_and_run_agree_and_padding_changes_nothing(tokenizer, automaton):
    rng = random.Random(3)
    texts = [answer(rng, m, "think") for m in (TEXT, TEXT_IMAGE, IMAGE) for _ in range(20)]
    modality = np.repeat([TEXT, TEXT_IMAGE, IMAGE], 20)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(map(len, rows)) + 5
    tokens, length = padded(rows, width, [9])
    state = automaton.start_M[modality]
    for r in range(width):
        state = jnp.where(r < length, au.step(automaton, state, tokens[:, r]), state)
    np.testing.assert_array_equal(state, au.run(automaton, tokens, length, modality))
    stop = stop_ids(tokenizer)[0]
    for fill in ([0], [stop], [20, 30, stop]):
        stopped, _ = padded([ids + [stop] for ids in rows], width, fill)
        np.testing.assert_array_equal(state, au.run(automaton, stopped, np.full(60, width), modality))
    grouped = au.run(automaton, tokens.reshape(12, 5, width), length.reshape(12, 5), modality.reshape(12, 5))
    np.testing.assert_array_equal(state.reshape(12, 5), grouped)


PROMPTS, GROUP, WIDTH = 3, 2, 64
mask = jax.jit(au.allowed)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), slack=st.integers(0, 20), eager=st.booleans())
def test_a_constrained_walk_always_ends_and_parses(tokenizer, automaton, seed, slack, eager):
    rng = np.random.default_rng(seed)
    node_PK = np.where(rng.random((PROMPTS, len(IDS))) < 0.2, 5, -1)
    outcome_PJ = np.asarray(au.outcome_mask(automaton, node_PK)).copy()
    outcome_PJ[:, -2:] &= rng.random((PROMPTS, 2)) < 0.7
    outcome_PJ[~outcome_PJ.any(axis=1), 0] = True
    modality_P = rng.integers(3, size=PROMPTS)
    distance_PA = np.where(outcome_PJ[:, None, :], automaton.distance_AJ, au.NEVER).min(axis=-1)
    start_P = np.asarray(automaton.start_M)[modality_P]
    limit_P = distance_PA[np.arange(PROMPTS), start_P] + slack
    state = np.repeat(start_P[:, None], GROUP, axis=1)
    next_AC, class_V, stop_V = (np.asarray(x) for x in (automaton.next_state_AC, automaton.token_class_V, automaton.stop_V))
    rows, done = [[[] for _ in range(GROUP)] for _ in range(PROMPTS)], np.zeros((PROMPTS, GROUP), bool)
    for r in range(int(limit_P.max())):
        allowed = np.asarray(mask(automaton, state, np.broadcast_to((limit_P - r)[:, None], state.shape), distance_PA))
        for p, g in np.argwhere(~done):
            choices = np.flatnonzero(allowed[p, g])
            assert len(choices), "a walk has nowhere to go"
            if eager:  # prefer what comes nearer to an end
                after = distance_PA[p, next_AC[state[p, g], class_V[choices]]]
                choices = choices[after == after.min()]
            token = int(rng.choice(choices))
            rows[p][g].append(token)
            done[p, g] = stop_V[token]
            state[p, g] = next_AC[state[p, g], class_V[token]]
    assert done.all()
    v = au.verdict(automaton, state)
    for p, g in np.ndindex(state.shape):
        assert len(rows[p][g]) <= limit_P[p]
        kind = int(v.kind[p, g])
        outcome = {au.ID: int(v.id[p, g]), au.NONE: len(IDS), au.NAME: len(IDS) + 1}[kind]
        assert outcome_PJ[p, outcome]
        text = tokenizer.decode(rows[p][g][:-1], skip_special_tokens=True)
        says = tuple(int(x[p, g]) for x in (v.parsed, v.request, v.response, v.kind, v.id))
        assert says == reference(text, int(modality_P[p]), "think")


@pytest.mark.parametrize("labels", [("unsafe", "safe"), ("safe", "unsafe"), ("safe", "safe")])
def test_a_thought_that_runs_into_the_limit_may_still_call_anything_unsafe(tokenizer, automaton, labels):
    """Whoever thinks for as long as it is allowed can still give each verdict that is unsafe on one line, with the longest id."""
    tables, start = jax.tree.map(np.asarray, automaton), int(automaton.start_M[TEXT])
    distance_PA = np.asarray(au.distances(automaton, np.ones((1, len(IDS) + 2), bool)))
    longest = IDS[int(np.argmax(tables.distance_AJ[start, : len(IDS)]))] if "unsafe" in labels else "None"
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    rest = encode(f"</think>\n<answer>\nRequest:{labels[0]}\nResponse:{labels[1]}\nCategory:{longest}\n</answer>") + [
        stop_ids(tokenizer)[0]
    ]
    limit = len(encode("<think>")) + len(rest) + 8
    state, used, thought = start, 0, encode("<think>") + encode(" oh") * limit

    def open_to(token: int) -> bool:
        remaining = np.array([[limit - used]])
        return bool(mask(automaton, np.array([[state]]), remaining, distance_PA)[0, 0, token])

    while open_to(thought[used]):
        state, used = au.walk(tables, state, thought[used : used + 1]), used + 1
    assert used > len(encode("<think>"))
    for token in rest:
        assert open_to(token)
        state, used = au.walk(tables, state, [token]), used + 1
    assert used <= limit


def test_distance_is_the_length_of_the_shortest_answer(tokenizer, automaton):
    """A breadth-first search over tokens from the start of an image answer, for three outcomes."""
    table, end = np.asarray(automaton.next_state_AC), np.asarray(automaton.kind_A)
    seen = frontier = np.array([automaton.start_M[IMAGE]])
    found: dict[int, int] = {}
    for tokens in range(1, 60):
        for outcome, states in (
            (len(IDS), frontier[end[frontier] == au.NONE]),
            (len(IDS) + 1, frontier[end[frontier] == au.NAME]),
            (3, frontier[np.asarray(automaton.id_A)[frontier] == 3]),
        ):
            if len(states):
                found.setdefault(outcome, tokens)
        frontier = np.setdiff1d(table[frontier], seen)
        seen = np.union1d(seen, frontier)
    assert found == {j: int(automaton.distance_AJ[automaton.start_M[IMAGE], j]) for j in found} and len(found) == 3
    assert int(automaton.distance_AJ[automaton.start_M[TEXT], 3]) > found[3]


def test_rows_past_the_tokenizer_lead_nowhere(tokenizer):
    count = len(tokenizer)
    automaton = au.build(tokenizer, ("C1",), vocab=count + 7)
    assert automaton.token_class_V.shape == (count + 7,)
    text = "<think></think>\n<answer>\nRequest:unsafe\nCategory:C1\n</answer>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens, length = padded([ids, ids + [count + 3]], 120, [0])
    assert read(automaton, tokens, length, np.full(2, IMAGE)).parsed.tolist() == [True, False]


def test_the_cache_gives_the_same_tables(tokenizer, automaton, tmp_path, monkeypatch):
    first = au.build(tokenizer, ("C1", "C1S1"), cache_dir=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]
    monkeypatch.setattr(au, "_tables", None)
    jax.tree.map(np.testing.assert_array_equal, first, au.build(tokenizer, ("C1", "C1S1"), cache_dir=tmp_path))
    with pytest.raises(TypeError):
        au.build(tokenizer, ("C1", "C1S2"), cache_dir=tmp_path)


def test_size():
    automaton = au.build(byte_level(), au.id_grid(11, 3))
    assert automaton.next_state_AC.dtype == jnp.int16 and automaton.next_state_AC.nbytes < 2e6
    assert len(automaton.ids) == 44 and automaton.distance_AJ.shape == (len(automaton.next_state_AC), 46)


def test_category_text():
    assert au.category_text(UNSAFE_IMAGE.format(" Loose benches\u3000")) == "Loose benches"
    assert au.category_text(UNSAFE_IMAGE.format("C1").replace("\n", "\r\n") + "\n") == "C1"
    assert au.category_text("Category:C1") is None


def test_errors(tokenizer):
    for keywords, message in (
        ({"ids": ("C1",), "think_tag": "a.b"}, "think_tag"),
        ({"ids": ("C1", "S1")}, "S1"),
        ({"ids": ("C1", "C1")}, "different"),
        ({"ids": ("C1",), "vocab": 5}, "smaller"),
    ):
        with pytest.raises(ValueError, match=message):
            au.build(tokenizer, **keywords)
