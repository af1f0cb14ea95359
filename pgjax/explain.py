"""The reward of given answers, term by term: what `pgjax reward` prints.

A row has an `answer` (text) and the published gold keys (PAPERS A5, A8): `modality`, `query_label`, `response_label`, `category` (the
gold id as the prompt showed it, "" where everything is safe or the policy lacks the risk), `original_category` (the risk's name, "" where
there is none). What is not known is "unknown"; a response that is not there is "" or null. For the bonus of a free name, one of

* `similarities`: of the answer's name to `original_category` and each synonym, as the published reward has them from its service;
* `synonymous_phrase`: the synonyms; they and `original_category` are embedded;
* neither: the phrases are those of the taxonomy's category of that name (the bank's row, where a bank is given).

An embedder is loaded only where a name has to be embedded, or to check the bank. Which ids a row's prompt showed is not in it: all ids of
the taxonomy but the reserved count as listed. Axes: P rows, S phrases.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgjax import automaton as answers
from pgjax.automaton import NAME, NONE_LIKE, OUTCOMES, Automaton, Verdict
from pgjax.bank import PUBLISHED_MAX, PUBLISHED_MEAN, load_bank
from pgjax.data.jsonl import Line
from pgjax.data.schema import (
    ABSENT,
    CATEGORY_NODE,
    CATEGORY_NONE,
    CATEGORY_OOD,
    CATEGORY_UNKNOWN,
    IMAGE,
    LABELS,
    MODALITIES,
    UNKNOWN,
    Gold,
)
from pgjax.models.sentence_encoder import load_embedder
from pgjax.rewards import Variant, reward
from pgjax.taxonomy import Taxonomy, full_view
from pgjax.tokenizer import byte_tokenizer
from pgjax.train.materials import cache_dir, grid

CHUNK = 256  # rows read at once, and the multiple of bytes that they are padded to


@dataclass(frozen=True)
class Row:
    """A checked row in codes of data/schema.py. `phrases` are what a free name is compared with; a number stands for that node."""

    line: Line
    answer: str
    modality: int
    request: int
    response: int
    category: int
    id: int  # index of the gold id, -1 where there is none
    phrases: tuple[str, ...] | int = ()
    similarities: tuple[float, ...] | None = None


def explain(
    lines: Sequence[Line],
    taxonomy: Taxonomy,
    variant: Variant = "strict",
    think_tag: str = "think",
    embedder: str | None = None,
    bank: str | None = None,
) -> dict[str, Any]:
    """{"variant", "max_threshold", "mean_threshold", "rows"}; each row has line, id, reward, the terms of `rewards.reward`, the
    similarities that counted (or null) and `read`, what the automaton read in the answer.

    `embedder` (a folder; default the MiniLM package) and `bank` (a file) as in `RewardConfig`. Thresholds are the bank's; without one,
    and in the variant `published`, 0.7 and 0.6. ValueError names the file and line of a row that cannot be judged.
    """
    ids = grid(taxonomy)
    rows = [read_row(line, ids, taxonomy) for line in lines]
    automaton = answers.build(byte_tokenizer(), ids, think_tag, cache_dir=cache_dir())
    verdict = read_answers(automaton, rows)
    names = [answers.category_text(row.answer) or "" for row in rows]
    named = [row.category == CATEGORY_OOD and int(kind) in (NAME, NONE_LIKE) for row, kind in zip(rows, verdict.kind, strict=True)]
    similarities, thresholds = compare(rows, names, named, taxonomy, embedder, bank)
    if variant == "published":
        thresholds = (PUBLISHED_MAX, PUBLISHED_MEAN)

    widest = max([len(s) for s in similarities] + [1])
    valid_PS = np.arange(widest) < np.array([len(s) for s in similarities])[:, None]
    similarity_PS = np.zeros(valid_PS.shape, np.float32)
    similarity_PS[valid_PS] = [value for row in similarities for value in row]
    column = jax.tree.map(lambda x: x[:, None], verdict)
    program = jax.jit(reward, static_argnames="variant")
    gold = gold_arrays(rows, ids, taxonomy)
    reward_PG, terms = jax.tree.map(np.asarray, program(column, gold, similarity_PS[:, None], valid_PS, *thresholds, variant=variant))
    number = lambda x: round(float(x), 6)  # noqa: E731
    out = []
    for p, row in enumerate(rows):
        scores = {"reward": number(reward_PG[p, 0])} | {name: number(term[p, 0]) for name, term in terms.items()}
        used = [number(value) for value in similarities[p]] if named[p] else None
        place = {"line": row.line.number, "id": row.line.row.get("id")}
        out.append(place | scores | {"similarities": used, "read": _read(verdict, p, ids)})
    return {"variant": variant, "max_threshold": number(thresholds[0]), "mean_threshold": number(thresholds[1]), "rows": out}


def read_row(line: Line, ids: tuple[str, ...], taxonomy: Taxonomy) -> Row:
    """Foreign spellings to ours (text-image, query_label); ValueError for what is missing or impossible."""
    modality = _code(line, "modality", {name: code for code, name in enumerate(MODALITIES)}, line.text("modality").replace("-", "_"))
    labels = {name: LABELS.index(name) for name in ("safe", "unsafe", "unknown")}
    request = _code(line, "query_label", labels, line.text("query_label"))
    response = ABSENT
    if modality != IMAGE or "response_label" in line.row:
        response = _code(line, "response_label", labels | {"": ABSENT, "absent": ABSENT}, line.text("response_label"))
    id, similarities = line.text("category").strip(), _similarities(line)
    common: dict[str, Any] = dict(line=line, answer=line.text("answer"), modality=modality, request=request, response=response)
    common["similarities"] = similarities
    if id == "unknown":
        return Row(**common, category=CATEGORY_UNKNOWN, id=-1)
    if id:
        if id not in ids:
            raise ValueError(f"{line.where}: category {id[:40]!r} is no id of this taxonomy ({ids[0]} to {ids[-1]}); give yours")
        return Row(**common, category=CATEGORY_NODE, id=ids.index(id))
    # Without an id the name alone tells a risk outside the policy from no risk.
    name = line.text("original_category")
    if not name:
        return Row(**common, category=CATEGORY_NONE, id=-1)
    phrases: tuple[str, ...] | int = ()
    if similarities is None:
        synonyms = line.row.get("synonymous_phrase") or []
        if not isinstance(synonyms, list) or not all(isinstance(phrase, str) for phrase in synonyms):
            raise ValueError(f"{line.where}: 'synonymous_phrase' must be a list of texts")
        node = next((n for n, node in enumerate(taxonomy.nodes) if node.name.casefold() == name.strip().casefold()), None)
        if not synonyms and node is None:
            what = "'original_category' is no name of the taxonomy"
            raise ValueError(f"{line.where}: {what}; give synonymous_phrase, similarities or --taxonomy")
        phrases = (name, *synonyms) if synonyms or node is None else node
    return Row(**common, category=CATEGORY_OOD, id=-1, phrases=phrases)


def _code(line: Line, key: str, codes: dict[str, int], value: str) -> int:
    if value not in codes:
        raise ValueError(f"{line.where}: {key!r} is {value[:40]!r}; use {', '.join(name or repr('') for name in codes)}")
    return codes[value]


def _similarities(line: Line) -> tuple[float, ...] | None:
    values = line.row.get("similarities")
    if values is None:
        return None
    plain = isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not plain or not all(math.isfinite(v) and abs(v) <= 1.001 for v in values):  # cosines, with room for rounding
        raise ValueError(f"{line.where}: 'similarities' must be a list of numbers from -1 to 1")
    return tuple(float(v) for v in values)


def read_answers(automaton: Automaton, rows: Sequence[Row]) -> Verdict:
    """The verdicts, fields numpy [P]. Token k is byte k (`byte_tokenizer`)."""
    run = jax.jit(answers.run)
    final = []
    for first in range(0, len(rows), CHUNK):
        chunk = rows[first : first + CHUNK]
        texts = [np.frombuffer(row.answer.encode(), np.uint8) for row in chunk]
        length_B = np.array([len(text) for text in texts], np.int32)
        tokens_BR = np.zeros((len(chunk), -(-max(length_B.max(), 1) // CHUNK) * CHUNK), np.int32)
        for b, text in enumerate(texts):
            tokens_BR[b, : len(text)] = text
        final.append(run(automaton, tokens_BR, length_B, np.array([row.modality for row in chunk], np.int32)))
    return jax.tree.map(np.asarray, answers.verdict(automaton, jnp.concatenate(final)))


def gold_arrays(rows: Sequence[Row], ids: tuple[str, ...], taxonomy: Taxonomy) -> Gold:
    """Ids stand for themselves: the N axis is the grid of ids, and those that the taxonomy shows are listed, the gold one in any case."""
    gold_PK = np.array([[k == row.id for k in range(len(ids))] for row in rows])
    shown = {id for id, _ in full_view(taxonomy, "leaf").entries}
    listed_PK = np.array([id in shown for id in ids]) | gold_PK
    column = lambda name: np.array([getattr(row, name) for row in rows], np.int32)  # noqa: E731
    arrays: dict[str, Any] = dict(
        modality_P=column("modality"),
        request_P=column("request"),
        response_P=column("response"),
        category_P=column("category"),
        node_P=column("id"),
        node_of_id_PK=np.where(listed_PK, np.arange(len(ids)), -1).astype(np.int32),
        accepted_PN=gold_PK,
        never_seen_P=np.zeros(len(rows), bool),
        weight_P=np.ones(len(rows), np.float32),
    )
    return Gold(**arrays)


def compare(
    rows: Sequence[Row], names: Sequence[str], named: Sequence[bool], taxonomy: Taxonomy, folder: str | None, bank: str | None
) -> tuple[list[Sequence[float]], tuple[float, float]]:
    """Each row's similarities (given, computed where `named`, or none), and the thresholds."""
    found: list[Sequence[float]] = [row.similarities or () for row in rows]
    wanted = [p for p, row in enumerate(rows) if named[p] and row.similarities is None]
    if not wanted and not bank:
        return found, (PUBLISHED_MAX, PUBLISHED_MEAN)
    embedder = load_embedder(folder)
    made = load_bank(bank, taxonomy, embedder) if bank else None

    def phrases(row: Row) -> tuple[str, ...]:
        if isinstance(row.phrases, tuple):
            return row.phrases
        node = taxonomy.nodes[row.phrases]
        excluded = node.reserved if made is None else not bool(made.valid_NS[row.phrases].any())  # pays no bonus, as in training
        return () if excluded else (node.name, *node.synonyms)

    texts = list(dict.fromkeys(text for p in wanted for text in (names[p], *phrases(rows[p]))))
    vector = dict(zip(texts, embedder.texts(texts), strict=True))
    for p in wanted:
        found[p] = [float(vector[phrase] @ vector[names[p]]) for phrase in phrases(rows[p])]
    return found, (made.max_threshold, made.mean_threshold) if made else (PUBLISHED_MAX, PUBLISHED_MEAN)


def _read(verdict: Verdict, p: int, ids: tuple[str, ...]) -> dict[str, Any]:
    """What an answer says, without its words. Nothing where it is not in the published format."""
    if not verdict.parsed[p]:
        return {"parsed": False, "request": None, "response": None, "category": None, "category_id": None}
    label = lambda code: None if code in (ABSENT, UNKNOWN) else LABELS[code]  # noqa: E731
    return {
        "parsed": True,
        "request": label(verdict.request[p]),
        "response": label(verdict.response[p]),
        "category": OUTCOMES[verdict.kind[p]],
        "category_id": ids[verdict.id[p]] if verdict.id[p] >= 0 else None,
    }


def table(explained: dict[str, Any]) -> str:
    """The same for people: a line a row, the mean at the end. `category` contains `bonus`."""
    terms = ("reward", "format", "request", "response", "category", "bonus")
    lines = ["  ".join([f"{'line':>5}", *(f"{name:>8}" for name in terms), "the answer says"])]
    for row in explained["rows"]:
        read = row["read"]
        says = [read["request"], read["response"], read["category_id"] or read["category"]] if read["parsed"] else ["not in format"]
        lines.append("  ".join([f"{row['line']:>5}", *(f"{row[name]:>8.3f}" for name in terms), ", ".join(filter(None, says))]))
    mean = sum(row["reward"] for row in explained["rows"]) / len(explained["rows"])
    thresholds = f"thresholds {explained['max_threshold']:.3f} (largest) and {explained['mean_threshold']:.3f} (mean)"
    return "\n".join([*lines, f"mean reward of {len(explained['rows'])} answers: {mean:.3f}; variant {explained['variant']}, {thresholds}"])
