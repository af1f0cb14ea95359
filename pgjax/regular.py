"""Regular languages over bytes: expressions, a Thompson automaton, subset construction, minimisation (DESIGN idea 2).

An expression is a function that grows an `NFA` from a start state and returns the end state. Ends are tagged; where one byte
string reaches several tags the smallest wins, which stands in for look-ahead ("any name, but these first").

Axes: A states, B the 256 byte values (or 512 symbols, see `with_byte_runs`). All of it is host code on numpy arrays.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np


class NFA:
    """States 0, 1, ...; `edges[s]` are (byte set, target), `free[s]` targets reached on nothing, `tags[s]` the end tag of s."""

    def __init__(self) -> None:
        self.edges: list[list[tuple[frozenset[int], int]]] = []
        self.free: list[list[int]] = []
        self.tags: dict[int, int] = {}

    def state(self) -> int:
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1


Expression = Callable[[NFA, int], int]


def one(values: Iterable[int]) -> Expression:
    """Exactly one byte out of `values`."""
    values = frozenset(values)

    def grow(nfa: NFA, start: int) -> int:
        end = nfa.state()
        nfa.edges[start].append((values, end))
        return end

    return grow


def sequence(*parts: Expression) -> Expression:
    def grow(nfa: NFA, start: int) -> int:
        for part in parts:
            start = part(nfa, start)
        return start

    return grow


def either(*parts: Expression) -> Expression:
    def grow(nfa: NFA, start: int) -> int:
        ends = [part(nfa, start) for part in parts]
        end = nfa.state()
        for e in ends:
            nfa.free[e].append(end)
        return end

    return grow


def star(part: Expression) -> Expression:
    """Any number of `part`, none included."""

    def grow(nfa: NFA, start: int) -> int:
        loop = nfa.state()
        nfa.free[start].append(loop)
        nfa.free[part(nfa, loop)].append(loop)
        return loop

    return grow


def maybe(part: Expression) -> Expression:
    return either(part, sequence())


def literal(text: str) -> Expression:
    return sequence(*(one([byte]) for byte in text.encode()))


def characters(chars: Iterable[str]) -> Expression:
    """One character out of `chars`, as its UTF-8 bytes; common beginnings and equal continuations are shared."""

    def expression(strings: frozenset[bytes]) -> Expression:
        rest_of: dict[int, set[bytes]] = {}
        for string in strings:
            rest_of.setdefault(string[0], set()).add(string[1:])
        firsts_of: dict[frozenset[bytes], list[int]] = {}
        for first, rest in rest_of.items():
            firsts_of.setdefault(frozenset(rest), []).append(first)
        parts = [one(firsts) if rest == {b""} else sequence(one(firsts), expression(rest)) for rest, firsts in firsts_of.items()]
        return parts[0] if len(parts) == 1 else either(*parts)

    return expression(frozenset(char.encode() for char in chars))


@dataclass(frozen=True)
class DFA:
    """`next_AB` the next state, `tag_A` the tag of an end (-1: not an end), `starts` the start states. Total: state `dead` is a sink."""

    next_AB: np.ndarray
    tag_A: np.ndarray
    starts: tuple[int, ...]

    @property
    def dead(self) -> int:
        sink_A = (self.next_AB == np.arange(len(self.next_AB))[:, None]).all(axis=1) & (self.tag_A < 0)
        return int(np.flatnonzero(sink_A)[0])


def determinise(nfa: NFA, starts: Iterable[int]) -> DFA:
    """The minimal DFA of `nfa`, one start state for each of `starts`. Sets of NFA states are the bits of an int."""
    sets = sorted({values for edges in nfa.edges for values, _ in edges}, key=sorted)
    _, class_B = byte_classes(np.array([[byte in values for byte in range(256)] for values in sets]))
    classes_of = {values: sorted({int(class_B[byte]) for byte in values}) for values in sets}

    def closure(state: int) -> int:
        seen, todo = {state}, [state]
        while todo:
            for target in nfa.free[todo.pop()]:
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return sum(1 << s for s in seen if nfa.edges[s] or s in nfa.tags)  # the others only pass on

    closures = [closure(s) for s in range(len(nfa.edges))]
    moves_of = [[(classes_of[values], closures[target]) for values, target in edges] for edges in nfa.edges]
    number: dict[int, int] = {}

    def state_of(subset: int) -> int:
        if subset not in number:
            number[subset] = len(number)
            todo.append(subset)
        return number[subset]

    todo: list[int] = []
    first = tuple(state_of(closures[s]) for s in starts)
    state_of(0)  # the dead state, so that every language has one
    next_AC, tag_A, done = [], [], 0
    while done < len(todo):
        row, tag = [0] * (int(class_B.max()) + 1), -1
        rest, done = todo[done], done + 1
        while rest:
            lowest = rest & -rest
            rest ^= lowest
            state = lowest.bit_length() - 1
            for classes, mask in moves_of[state]:
                for c in classes:
                    row[c] |= mask
            if state in nfa.tags:
                tag = nfa.tags[state] if tag < 0 else min(tag, nfa.tags[state])
        next_AC.append([state_of(subset) for subset in row])
        tag_A.append(tag)
    return minimise(DFA(np.array(next_AC, np.int32)[:, class_B], np.array(tag_A, np.int32), first))


def byte_classes(table_AB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One byte of every class of equal columns, and the class of each byte."""
    _, byte_of_class, class_B = np.unique(table_AB, axis=1, return_index=True, return_inverse=True)
    return byte_of_class, class_B.reshape(-1)


def minimise(dfa: DFA) -> DFA:
    """Merge the states that no continuation tells apart; different tags stay different states.

    Moore's refinement on hashes: a state's hash is made of its own and those of its successors until no more states come apart.
    """
    here_and_next_AC = np.column_stack([np.arange(len(dfa.next_AB)), dfa.next_AB[:, byte_classes(dfa.next_AB)[0]]])
    rng = np.random.default_rng(0)
    weight_C = rng.integers(1 << 63, size=here_and_next_AC.shape[1], dtype=np.uint64) * 2 + 1
    hash_A = rng.integers(1 << 63, size=dfa.tag_A.max() + 2, dtype=np.uint64)[dfa.tag_A + 1]
    parts, refined = 0, 1
    while refined > parts:
        for _ in range(8):
            hash_A = (hash_A[here_and_next_AC] * weight_C).sum(axis=1)
            hash_A ^= hash_A >> np.uint64(31)
        _, first, part_A = np.unique(hash_A, return_index=True, return_inverse=True)
        parts, refined = refined, len(first)
    next_AB, tag_A = part_A[dfa.next_AB].astype(np.int32), dfa.tag_A
    if (next_AB != next_AB[first][part_A]).any() or (tag_A != tag_A[first][part_A]).any():  # makes the result exact
        raise AssertionError("different states have one hash: choose another seed")
    return DFA(next_AB[first], tag_A[first], tuple(int(part_A[s]) for s in dfa.starts))


def explore(starts: np.ndarray, successors: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """States given by codes: the sorted codes that can be reached, and for each its successors as positions among them.

    `successors` maps codes [n] to codes [n, symbols].
    """
    known = frontier = np.unique(starts)
    while len(frontier):
        frontier = np.setdiff1d(successors(frontier), known)
        known = np.union1d(known, frontier)
    return known, np.searchsorted(known, successors(known)).astype(np.int32)


def side_by_side(a: DFA, b: DFA, tag: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> DFA:
    """The automaton that reads with both at once; `tag` makes the tag of an end out of the two. Starts are paired in order."""
    byte_of_class, class_B = byte_classes(np.vstack([a.next_AB, b.next_AB]))
    a_next, b_next, size = a.next_AB[:, byte_of_class], b.next_AB[:, byte_of_class], len(b.next_AB)
    starts = np.array(a.starts) * size + np.array(b.starts)
    codes, table = explore(starts, lambda codes: a_next[codes // size] * size + b_next[codes % size])
    return minimise(
        DFA(table[:, class_B], tag(a.tag_A[codes // size], b.tag_A[codes % size]), tuple(np.searchsorted(codes, starts).tolist()))
    )


UTF8_BROKEN = 8


def _utf8_next() -> np.ndarray:
    """[9, 256]: validity of UTF-8 byte by byte. 0 between characters; 1, 2, 3: that many continuations missing; 4 to 7: after E0, ED,
    F0, F4, which restrict the second byte; 8 broken for good."""
    table = np.full((9, 256), UTF8_BROKEN)
    table[0, :0x80] = 0
    for low, high, to in (
        (0xC2, 0xDF, 1),
        (0xE0, 0xEF, 2),
        (0xF0, 0xF3, 3),
        (0xE0, 0xE0, 4),
        (0xED, 0xED, 5),
        (0xF0, 0xF0, 6),
        (0xF4, 0xF4, 7),
    ):
        table[0, low : high + 1] = to
    for state, to in ((1, 0), (2, 1), (3, 2)):
        table[state, 0x80:0xC0] = to
    table[4, 0xA0:0xC0] = table[5, 0x80:0xA0] = 1
    table[6, 0x90:0xC0] = table[7, 0x80:0x90] = 2
    return table


def with_byte_runs(dfa: DFA) -> DFA:
    """The same language read through byte fallback: symbols 0..255 are bytes of ordinary tokens, 256 + b is the byte token <0xb>.

    The `ByteFallback` decoder takes a run of neighbouring byte tokens whole: valid UTF-8 is text, anything else is one U+FFFD a token,
    line ends in it included. So a state is three things: where the bytes of the run lead (`good`), whether they are valid, and
    where as many U+FFFD lead (`bad`); the end of the run picks one. That takes about five times as many states.
    """
    states = len(dfa.next_AB)
    utf8_next = _utf8_next()
    byte_of_class, class_B = byte_classes(np.vstack([dfa.next_AB, utf8_next]))
    next_AC, utf8_next = dfa.next_AB[:, byte_of_class].astype(np.int64), utf8_next[:, byte_of_class]
    fffd_A = np.arange(states)
    for byte in "\ufffd".encode():
        fffd_A = dfa.next_AB[fffd_A, byte]

    def code(good: np.ndarray, valid: np.ndarray, bad: np.ndarray) -> np.ndarray:
        return (np.where(valid == UTF8_BROKEN, bad, good) * 9 + valid) * states + bad

    def text_state(codes: np.ndarray) -> np.ndarray:
        return np.where(codes // states % 9 == 0, codes // (9 * states), codes % states)

    def successors(codes: np.ndarray) -> np.ndarray:
        good, valid, bad = codes // (9 * states), codes // states % 9, codes % states
        plain = next_AC[text_state(codes)]
        return np.hstack([code(plain, np.zeros_like(plain), plain), code(next_AC[good], utf8_next[valid], fffd_A[bad][:, None])])

    starts = np.array(dfa.starts)
    starts = code(starts, np.zeros_like(starts), starts)
    codes, table = explore(starts, successors)
    table = table[:, np.concatenate([class_B, class_B + len(byte_of_class)])]
    return minimise(DFA(table, dfa.tag_A[text_state(codes)], tuple(np.searchsorted(codes, starts).tolist())))
