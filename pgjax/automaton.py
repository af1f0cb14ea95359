"""The answer automaton (DESIGN idea 2): one table that parses answers inside jit, masks logits, and whose end state is the verdict.

The language is the published one (PAPERS A7, A8), `T` the tag, NL a line feed with or without a carriage return before it:

    <T> anything </T> NL <answer> NL Request:LABEL NL [Response:LABEL NL] Category:VALUE NL </answer>

and at most one line feed after it (Python's `$`). LABEL is safe or unsafe; the Response line is there unless the input is an image alone.
If all labels are safe VALUE is exactly None; if not it is one line of at least one character that is not exactly None.

It is written over bytes. An answer's text is its bytes decoded with U+FFFD for what is not UTF-8; because no character's bytes occur inside
or across others, the text has a character exactly where the stream has its bytes, and "any character" is "any bytes".
(Byte tokens of sentencepiece are decoded in runs; see `regular.with_byte_runs`.)

Axes: A states, C token classes (equal columns of the table), V vocabulary, K ids, R answer tokens, P prompts, G samples,
J = K + 2 outcomes of constrained decoding: the ids, then no category, then a free name.
"""

import hashlib
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy.sparse import csr_array

from pgjax.data.schema import ABSENT, IMAGE, SAFE, TEXT, TEXT_IMAGE, UNSAFE, Modality
from pgjax.regular import (
    DFA,
    NFA,
    Expression,
    characters,
    determinise,
    either,
    literal,
    maybe,
    one,
    sequence,
    side_by_side,
    star,
    with_byte_runs,
)
from pgjax.tokenizer import byte_run_ids, stop_ids, strips_leading_space, token_bytes

# Kinds of category value, told apart after Python's str.strip(): exactly None under safe labels; an id of the grid; the form of an id that
# is not in the grid (C99, C01); any other text; nothing but whitespace; None with whitespace around it
# (to the published reward a free name).
OUTCOMES = ("none", "id", "unlisted", "name", "empty", "none_like")
NONE, ID, UNLISTED, NAME, EMPTY, NONE_LIKE = range(6)
NEVER = np.iinfo(np.int16).max  # a distance: no tokens lead there
_FORMAT = 3  # of the files in the cache


@struct.dataclass
class Automaton:
    """The table and what its states mean. A state is an int; `start_M` gives the first one by modality code."""

    token_class_V: jax.Array  # int32
    next_state_AC: jax.Array  # int16
    spoken_C: jax.Array  # bool: tokens that add to the text; False for special tokens, which leave the state as it is
    start_M: jax.Array  # int32
    parsed_A: jax.Array  # bool: an answer that ends here is in the published format
    request_A: jax.Array  # int32 label code; ABSENT where not parsed
    response_A: jax.Array  # int32 label code; ABSENT for images and where not parsed
    kind_A: jax.Array  # int32, NONE .. NONE_LIKE; -1 where not parsed
    id_A: jax.Array  # int32 index in `ids`; -1 where the category is not one of them
    distance_AJ: jax.Array  # int16: fewest tokens, stop token included, to the end of an answer with outcome j; NEVER
    reserve_A: jax.Array  # int16: tokens beyond the fewest to an end that leave every label and id open, as long as all are; else 0
    stop_V: jax.Array  # bool
    ids: tuple[str, ...] = struct.field(pytree_node=False)


@struct.dataclass
class Verdict:
    """What answers say, each field of the same shape; values as in the fields of `Automaton`."""

    parsed: jax.Array
    request: jax.Array
    response: jax.Array
    kind: jax.Array
    id: jax.Array


def id_grid(categories: int, subcategories: int) -> tuple[str, ...]:
    """Ids of a taxonomy with that many categories and at most that many subcategories each: C1, C1S1, ..., C2, ..."""
    return tuple(f"C{c}" + (f"S{s}" if s else "") for c in range(1, categories + 1) for s in range(subcategories + 1))


# The language


@cache
def _spaces_and_digits() -> tuple[Expression, Expression]:
    """One character that str.strip() takes (line ends aside, which a category line cannot have); one that `\\d` matches."""
    every = "".join(map(chr, range(0x110000)))
    return characters(re.findall(r"[^\S\r\n]", every)), characters(re.findall(r"\d", every))


def _form(nfa: NFA, think_tag: str, lines: Iterable[tuple[Expression, int]], strips_space: bool) -> int:
    """Grow an answer's frame around each of `lines` (what stands from <answer> to the category, and its tag); returns the start state."""
    newline = sequence(maybe(one(b"\r")), one(b"\n"))
    start = nfa.state()
    opening = [literal(f"<{think_tag}>"), star(one(range(256))), literal(f"</{think_tag}>"), newline, literal("<answer>"), newline]
    body = sequence(maybe(one(b" ")) if strips_space else sequence(), *opening)(nfa, start)
    for inside, tag in lines:
        nfa.tags[sequence(inside, newline, literal("</answer>"), maybe(one(b"\n")))(nfa, body)] = tag
    return start


@lru_cache(maxsize=8)
def _language(ids: tuple[str, ...], think_tag: str, strips_space: bool, byte_runs: bool) -> tuple[DFA, np.ndarray]:
    """The automaton over bytes, starts with and without a response line, and [tag, 4] its tags as (request, response, kind, id).

    Two automata side by side: one reads the labels whatever the category is, the other the category whatever the labels are.
    """
    space, digit = _spaces_and_digits()
    newline = sequence(maybe(one(b"\r")), one(b"\n"))
    in_line = one(set(range(256)) - set(b"\r\n"))
    name, spaces, digits = sequence(in_line, star(in_line)), star(space), sequence(digit, star(digit))

    def line(key: str, value: str) -> Expression:
        return sequence(literal(f"{key}:{value}"), newline)

    text = {SAFE: "safe", UNSAFE: "unsafe", ABSENT: ""}
    labels = [(request, response) for request in (SAFE, UNSAFE) for response in (SAFE, UNSAFE, ABSENT)]
    lines = [
        (line("Request", text[request]), line("Response", text[response]) if text[response] else sequence(), literal("Category:"), name)
        for request, response in labels
    ]
    of_labels, starts = NFA(), []
    for image in (False, True):
        mine = [(sequence(*parts), tag) for tag, parts in enumerate(lines) if (labels[tag][1] == ABSENT) == image]
        starts.append(_form(of_labels, think_tag, mine, strips_space))

    # Earlier tags win: None exactly, then what strips to something known, then any name.
    unlisted = sequence(literal("C"), digits, maybe(sequence(literal("S"), digits)))
    kinds = [(NONE, -1), *((ID, k) for k in range(len(ids))), (NONE_LIKE, -1), (UNLISTED, -1), (EMPTY, -1), (NAME, -1)]
    values = [literal("None"), *(sequence(spaces, literal(shown), spaces) for shown in (*ids, "None"))]
    values += [sequence(spaces, unlisted, spaces), sequence(space, spaces), name]
    any_label = either(literal("safe"), literal("unsafe"))
    before = sequence(
        literal("Request:"), any_label, newline, maybe(sequence(literal("Response:"), any_label, newline)), literal("Category:")
    )
    of_category = NFA()
    start = _form(of_category, think_tag, [(sequence(before, value), tag) for tag, value in enumerate(values)], strips_space)

    tags = np.array([(*label, *kind) for label in labels for kind in kinds], np.int32)
    unsafe = (tags[:, :2] == UNSAFE).any(axis=1)

    def tag(label_A: np.ndarray, kind_A: np.ndarray) -> np.ndarray:
        tag_A = label_A * len(kinds) + kind_A
        answer_A = (label_A >= 0) & (kind_A >= 0)
        return np.where(answer_A & (unsafe[tag_A] == (tags[tag_A, 2] != NONE)), tag_A, -1)  # None exactly if and only if all is safe

    dfa = side_by_side(determinise(of_labels, starts), determinise(of_category, [start, start]), tag)
    return (with_byte_runs(dfa) if byte_runs else dfa), tags


# Its composition over tokens


def _compose(next_AB: np.ndarray, symbols_V: list[tuple[int, ...] | None], dead: int) -> tuple[np.ndarray, np.ndarray]:
    """Token classes and the table over them. A token is the function of states that its symbols are in turn; few are different,
    so a token is a walk through numbered functions, each pair (function, symbol) composed once. None is the constant `dead`."""
    columns: list[np.ndarray] = []
    number: dict[bytes, int] = {}
    after: dict[tuple[int, int], int] = {}

    def function(column: np.ndarray) -> int:
        key = column.tobytes()
        if key not in number:
            number[key] = len(columns)
            columns.append(column)
        return number[key]

    next_BA = np.ascontiguousarray(next_AB.T.astype(np.int16))
    identity = function(np.arange(len(next_AB), dtype=np.int16))
    nothing = function(np.full(len(next_AB), dead, np.int16))
    function_V = []
    for symbols in symbols_V:
        f = nothing if symbols is None else identity
        for symbol in symbols or ():
            g = after.get((f, symbol))
            if g is None:
                g = after[f, symbol] = function(next_BA[symbol][columns[f]])
            f = g
        function_V.append(f)
    used, class_V = np.unique(function_V, return_inverse=True)
    return class_V.reshape(-1).astype(np.int32), np.stack([columns[f] for f in used], axis=1)


def _distances(next_AC: np.ndarray, target_AJ: np.ndarray) -> np.ndarray:
    """Fewest tokens to a state of target j and the stop token after it, int16 [A, J]; NEVER where there is no way."""
    states = len(next_AC)
    edges = np.unique(np.arange(states)[:, None] * states + next_AC)
    edges_AA = csr_array((np.ones(len(edges), bool), (edges // states, edges % states)), shape=(states, states))
    distance_AJ = np.where(target_AJ, 1, NEVER).astype(np.int16)
    tokens, frontier_AJ = 1, target_AJ
    while frontier_AJ.any():
        tokens += 1
        frontier_AJ = (edges_AA @ csr_array(frontier_AJ)).toarray() & (distance_AJ == NEVER)
        distance_AJ[frontier_AJ] = tokens
    return distance_AJ


def _reserve(distance_AJ: np.ndarray, start_M: np.ndarray) -> np.ndarray:
    """Where all outcomes are as far from each other as at an answer's start, nothing is decided yet: there the longest one must stay within
    reach. Else a thought that runs into the limit would end in the shortest answer, which calls all safe."""
    further_AJ = distance_AJ - distance_AJ.min(axis=1, keepdims=True)
    reserve_A = np.zeros(len(distance_AJ), np.int16)
    for start in np.unique(start_M):
        undecided_A = (further_AJ == further_AJ[start]).all(axis=1) & (distance_AJ < NEVER).all(axis=1)
        reserve_A[undecided_A] = further_AJ[start].max()
    return reserve_A


def build(
    tokenizer, ids: tuple[str, ...], think_tag: str = "think", vocab: int | None = None, cache_dir: str | Path | None = None
) -> Automaton:
    """Compile the answer language for a tokenizer: seconds, most of them for the language itself; `cache_dir` keeps the tables on disk.

    `ids` are the ids an answer may name (`id_grid`). `vocab` is the number of rows of the model's head: those past the
    tokenizer's ids lead nowhere. Raises ValueError for a bad tag, ids that are not ids, a head smaller than the
    vocabulary, or more ids than an int16 table can tell apart (about 300; 60 with byte fallback).
    """
    ids = tuple(ids)
    if not re.fullmatch(r"[A-Za-z_]+", think_tag):
        raise ValueError(f"think_tag={think_tag!r} cannot be a tag: use letters only, such as think or thinking")
    bad = [shown for shown in ids if not re.fullmatch(r"C[0-9]+(S[0-9]+)?", shown)]
    if bad or len(set(ids)) < len(ids):
        raise ValueError(f"ids must be different and of the form C3 or C3S2; these are not: {bad or ids}")
    bytes_V, stops = token_bytes(tokenizer), stop_ids(tokenizer)
    runs = byte_run_ids(tokenizer)
    vocab = len(bytes_V) if vocab is None else vocab
    if vocab < len(bytes_V):
        raise ValueError(f"vocab={vocab} is smaller than the tokenizer's {len(bytes_V)} ids: the head belongs to another tokenizer")
    symbols_V: list[tuple[int, ...] | None] = [
        tuple(data or b"") if k not in runs else (256 + data[0],) for k, data in enumerate(bytes_V)
    ] + [None] * (vocab - len(bytes_V))
    for k in stops:
        symbols_V[k] = ()
    strips = strips_leading_space(tokenizer)

    path = None
    if cache_dir is not None:
        settings = (_FORMAT, unicodedata.unidata_version, ids, think_tag, vocab, stops, strips, sorted(runs), bytes_V)
        path = Path(cache_dir) / f"automaton-{hashlib.sha256(repr(settings).encode()).hexdigest()[:24]}.npz"
        if path.exists():
            with np.load(path) as arrays:
                return Automaton(**{name: jnp.asarray(arrays[name]) for name in arrays.files}, ids=ids)
    arrays = _tables(_language(ids, think_tag, strips, bool(runs)), symbols_V, stops, len(ids))
    if path is not None:
        _save(path, arrays)
    return Automaton(**{name: jnp.asarray(array) for name, array in arrays.items()}, ids=ids)


def _tables(
    language: tuple[DFA, np.ndarray], symbols_V: list[tuple[int, ...] | None], stops: tuple[int, ...], ids: int
) -> dict[str, np.ndarray]:
    dfa, tags = language
    if len(dfa.next_AB) > NEVER:
        raise ValueError(f"{ids} ids make {len(dfa.next_AB)} states, more than an int16 table holds ({NEVER}): use a smaller id grid")
    class_V, next_AC = _compose(dfa.next_AB, symbols_V, dfa.dead)
    parsed_A = dfa.tag_A >= 0
    request_A, response_A, kind_A, id_A = np.where(parsed_A, tags[dfa.tag_A].T, np.array([[ABSENT], [ABSENT], [-1], [-1]])).astype(np.int32)
    outcome_A = np.select([kind_A == ID, kind_A == NONE, kind_A == NAME], [id_A, ids, ids + 1], -1)
    with_response, image = dfa.starts
    start_M = np.zeros(3, np.int32)
    start_M[[TEXT, TEXT_IMAGE, IMAGE]] = with_response, with_response, image
    distance_AJ = _distances(next_AC, outcome_A[:, None] == np.arange(ids + 2))
    return {
        "token_class_V": class_V,
        "next_state_AC": next_AC,
        "spoken_C": (next_AC != np.arange(len(next_AC))[:, None]).any(axis=0),
        "start_M": start_M,
        "parsed_A": parsed_A,
        "request_A": request_A,
        "response_A": response_A,
        "kind_A": kind_A,
        "id_A": id_A,
        "distance_AJ": distance_AJ,
        "reserve_A": _reserve(distance_AJ, start_M),
        "stop_V": np.isin(np.arange(len(symbols_V)), stops),
    }


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Written aside and renamed, so that another process never reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
        np.savez(file, **arrays)
    os.replace(file.name, path)


# Its use inside jit


def step(automaton: Automaton, state: jax.Array, token: jax.Array) -> jax.Array:
    """The states after one token each; a stop token and the special ones leave them as they are. int32, any shape."""
    return automaton.next_state_AC[state, automaton.token_class_V[token]].astype(jnp.int32)


def run(automaton: Automaton, tokens_BR: jax.Array, length_B: jax.Array, modality_B: jax.Array) -> jax.Array:
    """The state at each answer's first stop token, or after `length_B` tokens if there is none before. B is any leading axes."""

    def body(carry: tuple[jax.Array, jax.Array], token_and_place: tuple[jax.Array, jax.Array]):
        state_B, open_B = carry
        token_B, r = token_and_place
        open_B &= (r < length_B) & ~automaton.stop_V[token_B]
        return (jnp.where(open_B, step(automaton, state_B, token_B), state_B), open_B), None

    start_B = automaton.start_M[modality_B]
    steps = jnp.moveaxis(tokens_BR, -1, 0), jnp.arange(tokens_BR.shape[-1])
    (state_B, _), _ = jax.lax.scan(body, (start_B, jnp.ones(start_B.shape, bool)), steps)
    return state_B


def walk(tables: Automaton, state: int, tokens: Iterable[int]) -> int:
    """The state after all these tokens, on the host: `tables` is the automaton as numpy."""
    for token in tokens:
        state = int(tables.next_state_AC[state, tables.token_class_V[token]])
    return state


def verdict(automaton: Automaton, state: jax.Array) -> Verdict:
    """What an answer that ends in `state` says. Any shape."""
    a = automaton
    return Verdict(a.parsed_A[state], a.request_A[state], a.response_A[state], a.kind_A[state], a.id_A[state])


def read_text(text: str, modality: Modality, ids: tuple[str, ...], think_tag: str) -> Verdict:
    """What an answer says of which only the text is there, as the models of others give it; plain values, read by the same language."""
    dfa, tags = _language(ids, think_tag, strips_space=False, byte_runs=False)
    with_response, image = dfa.starts
    state = image if modality == "image" else with_response
    for byte in text.encode("utf-8", "replace"):
        state = dfa.next_AB.item(state, byte)
    tag = int(dfa.tag_A[state])
    said: tuple[Any, ...] = (True, *tags[tag].tolist()) if tag >= 0 else (False, ABSENT, ABSENT, -1, -1)
    return Verdict(*said)


def outcome_mask(automaton: Automaton, node_of_id_PK: jax.Array) -> jax.Array:
    """Outcomes that each prompt allows, bool [P, J]: its shown ids (`node_of_id_PK` not -1), no category, a free name.
    Never among them: ids outside the policy, and names that are empty or None with whitespace."""
    shown_PK = jnp.asarray(node_of_id_PK) >= 0
    return jnp.concatenate([shown_PK, jnp.ones(shown_PK.shape[:-1] + (2,), bool)], axis=-1)


def distances(automaton: Automaton, outcome_PJ: jax.Array) -> jax.Array:
    """Fewest tokens, stop token included, from every state to the end of an answer that each prompt allows, int16 [P, A]; NEVER."""
    return jnp.where(outcome_PJ[:, None, :], automaton.distance_AJ, NEVER).min(axis=-1)


def allowed(
    automaton: Automaton, state_PG: jax.Array, remaining_PG: jax.Array, distance_BA: jax.Array, prompt_PG: jax.Array | None = None
) -> jax.Array:
    """Tokens after which the answer can still end in an allowed outcome within the tokens left, bool [P, G, V].

    `distance_BA` is what `distances` gives; `remaining_PG` counts the token to be chosen and the stop token. The stop token is allowed
    only at the end of such an answer, the other special tokens never. If at the start `remaining` is at least the distance there, no row
    is ever empty and every walk ends in time with an allowed verdict; if it is so with the reserve added, every label is open to the walk
    whenever its thought is cut. Rows may share out B prompts evenly: `prompt_PG` says which of its row's.
    """
    a, rows = automaton, state_PG.shape[0]
    prompt_PG = jnp.zeros_like(state_PG) if prompt_PG is None else prompt_PG
    distance_PBA = distance_BA.reshape(rows, -1, distance_BA.shape[-1])
    of = jax.vmap(lambda distance_BA, prompt, state: distance_BA[prompt, state])
    after_PGC = of(distance_PBA, prompt_PG[..., None], a.next_state_AC[state_PG])
    end_PG = of(distance_PBA, prompt_PG, state_PG) == 1
    spoken_PGC = (after_PGC < NEVER) & (after_PGC < remaining_PG[..., None]) & a.spoken_C
    roomy_PGC = spoken_PGC & (after_PGC + a.reserve_A[a.next_state_AC[state_PG]] < remaining_PG[..., None])
    spoken_PGC = jnp.where(roomy_PGC.any(axis=-1, keepdims=True), roomy_PGC, spoken_PGC)
    return jnp.where(a.stop_V, (end_PG & (remaining_PG > 0))[..., None], spoken_PGC[..., a.token_class_V])


_CATEGORY = re.compile(r"\nCategory:([^\r\n]+)\r?\n</answer>\n?\Z")


def category_text(text: str) -> str | None:
    """The Category value of a decoded answer without whitespace around it; None if it does not end in such a line."""
    found = _CATEGORY.search(text)
    return found and found[1].strip()
