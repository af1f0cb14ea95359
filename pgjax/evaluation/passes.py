"""A guard's answers to a benchmark, as arrays for the metrics: `pgjax evaluate` (PAPERS A10).

Two passes. The first shows the whole policy: binary classification, categories, and the rows whose risk the taxonomy lacks (natural
OOD). The second takes the rows of which is known what they are about, safe ones too: OOD detection and naming. From half of the unsafe
ones all that would be right is hidden; from the other half and from the safe ones as many other entries are, so that neither the length
of the policy nor a gap in its ids tells which is which. Where a recipe was trained on policies of a few entries (data.ood.keep), prompts
list as many here.
"""

import dataclasses
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pgjax import automaton as answers
from pgjax.automaton import Verdict
from pgjax.bank import PUBLISHED_MAX, PUBLISHED_MEAN, Bank, build_bank
from pgjax.data.pipeline import Batch
from pgjax.data.schema import ABSENT, CATEGORY_OOD, LABELS, TEXT_IMAGE, Example, Gold
from pgjax.data.sources.label_map import outside
from pgjax.evaluation.evaluate import Answered
from pgjax.evaluation.metrics import Rows
from pgjax.evaluation.naming import Near, nearness, ranks
from pgjax.evaluation.summary import Evaluated
from pgjax.models.sentence_encoder import TextEncoder
from pgjax.rewards import naming_bonus, reward
from pgjax.serving.guard import Case, Guard, How, Policy, Unfit
from pgjax.taxonomy import PolicyView, Taxonomy, full_view, level_of, policy_view
from pgjax.train.materials import withheld

Shown = tuple[Example, PolicyView]
HIDDEN = 0.5  # share of the second pass's unsafe rows
MORE = 3  # so many entries that are not right are hidden beside them at most


class Judges(NamedTuple):
    """What names are compared with: the reward's encoder and a second one where it is installed, by the measure that each gives, and their
    banks over the taxonomy and what lies outside of it."""

    encoders: dict[str, TextEncoder]
    banks: dict[str, Bank]
    nodes: Taxonomy

    @classmethod
    def of(cls, taxonomy: Taxonomy, encoders: dict[str, TextEncoder]) -> "Judges":
        beyond = tuple(dataclasses.replace(node, id=f"outside {node.id}") for node in outside().nodes)
        nodes = Taxonomy(taxonomy.nodes + beyond)
        return cls(encoders, {name: build_bank(nodes, encoder, withheld(taxonomy)) for name, encoder in encoders.items()}, nodes)


class Pass(NamedTuple):
    """Rows that were judged, in order; the others by reason."""

    shown: list[Shown]
    cases: list[Case]
    verdicts: list[dict]
    left_out: Counter[str]


def judged(guard: Guard, policy: Policy, rows: Sequence[Shown], how: How, seen: Callable[[], None]) -> Pass:
    """`seen` is called for every row."""
    done = Pass([], [], [], Counter())
    for row, case in zip(rows, guard.judge(rows, policy, how), strict=True):
        seen()
        if isinstance(case, Unfit):
            done.left_out[case.reason] += 1
        else:
            done.shown.append(row), done.cases.append(case), done.verdicts.append(guard.verdict(case))
    return done


# --- what prompts show -------------------------------------------------------------------------------------------------------------


def draw(example: Example, *seed: int) -> np.random.Generator:
    """Randomness of a row: of its id and the seed alone."""
    return np.random.default_rng((*seed, zlib.crc32(example.id.encode())))


def right_ids(example: Example, taxonomy: Taxonomy) -> set[str]:
    """Categories that count as right, at the level that the row is judged at."""
    ids = {id for id in (example.node, *example.accepted) if id}
    return {taxonomy.by_id(id).parent or id for id in ids} if level_of(example.modality) == "top" else ids


def whole(guard: Guard, policy: Policy, example: Example, seed: int) -> PolicyView:
    """The whole policy, or as many of its entries as prompts list in training, the gold one among them."""
    ood = dataclasses.replace(guard.recipe.data.ood, never_seen=policy.hidden)
    if ood.keep is None:
        return policy.view(example.modality)
    return policy_view(policy.taxonomy, ood, draw(example, seed), level_of(example.modality), example.node, hide_gold=False)


def second(guard: Guard, policy: Policy, example: Example, seed: int, hide: bool) -> PolicyView:
    """As `whole`, without all that would be right (`hide`) or without as many others."""
    taxonomy, level, rng = policy.taxonomy, level_of(example.modality), draw(example, seed, 1)
    ood = guard.recipe.data.ood
    right = right_ids(example, taxonomy)
    if ood.keep is not None:
        hidden = (*policy.hidden, *sorted(right if hide else ()))
        gold = None if hide else example.node
        return policy_view(taxonomy, dataclasses.replace(ood, never_seen=hidden), rng, level, gold, hide_gold=False)
    view = policy.view(example.modality)
    entries = [taxonomy.nodes[n].id for id, n in view.entries if id in view.answerable]
    mine = [id for id in entries if id in right or taxonomy.by_id(id).parent in right]
    others = [id for id in entries if id not in mine]
    count = int(rng.integers(MORE + 1)) + (0 if hide else max(len(mine), 1))
    gone = [str(id) for id in rng.choice(others, min(count, max(len(others) - 1, 0)), replace=False)] + (mine if hide else [])
    return full_view(taxonomy, level, (*policy.hidden, *gone))


def never_seen(guard: Guard) -> set[str]:
    """Categories that occur nowhere in the guard's training, with all below them."""
    return withheld(guard.taxonomy, guard.recipe.data.ood.never_seen) - withheld(guard.taxonomy)


def is_never_seen(guard: Guard, example: Example) -> bool:
    right = right_ids(example, guard.taxonomy)
    return bool(right) and right <= never_seen(guard)


# --- passes ------------------------------------------------------------------------------------------------------------------------


def evaluate_set(
    guard: Guard,
    policy: Policy,
    name: str,
    examples: Sequence[Example],
    lines: tuple[str, ...],
    left_out: Counter[str],
    how: How,
    judges: Judges,
    seed: int,
    seen: Callable[[], None],
) -> tuple[Evaluated, Pass, list[Answered]]:
    """A benchmark's two passes, the first one's verdicts, and the answers of both for the table of samples. ValueError where no row can be
    shown whole."""
    began = time.monotonic()
    first = judged(guard, policy, [(e, whole(guard, policy, e, seed)) for e in examples], how, seen)
    if not first.shown:
        out = dict(left_out + first.left_out)
        raise ValueError(f"benchmark {name}: no row can be shown whole: {out}; a larger --prompt-tokens shows more")
    passes = [first, judged(guard, policy, second_rows(guard, policy, [e for e, _ in first.shown], seed), how, seen)]
    done = [as_rows(guard, policy, one, how, judges) for one in passes if one.shown]
    hidden = done[1][0] if len(done) > 1 else None
    evaluated = Evaluated(name, done[0][0], hidden, lines, left_out + first.left_out, time.monotonic() - began)
    return evaluated, first, [answered for _, answered in done]


def second_rows(guard: Guard, policy: Policy, examples: Sequence[Example], seed: int) -> list[Shown]:
    """Nothing where no row has a known category of the policy."""
    rows = []
    for example in examples if any(example.category == "node" for example in examples) else ():
        if example.category in ("node", "none"):
            drawn = draw(example, seed, 2).random() < HIDDEN
            hide = example.category == "node" and (drawn or is_never_seen(guard, example))
            rows.append((example, second(guard, policy, example, seed, hide)))
    return [(example, view) for example, view in rows if view.entries]


def as_rows(guard: Guard, policy: Policy, done: Pass, how: How, judges: Judges) -> tuple[Rows, Answered]:
    """A pass as what the metrics read, and as what samples are made of."""
    examples, gold = [example for example, _ in done.shown], policy.renderer.gold(done.shown)
    verdict = verdict_arrays(done.verdicts, guard.automaton.ids)
    ood_P = gold.category_P == CATEGORY_OOD
    gold = gold.replace(never_seen_P=ood_P & [is_never_seen(guard, example) for example in examples])
    named_P = verdict.parsed & (verdict.kind == answers.NAME) & ood_P
    names = [v["category_name"] if named else None for v, named in zip(done.verdicts, named_P, strict=True)]
    near = {
        measure: nearness(names, _right(judges.nodes, examples, gold), gold.modality_P == TEXT_IMAGE, judges.nodes, encoder, bank)
        for measure, (encoder, bank) in ((m, (judges.encoders[m], judges.banks[m])) for m in judges.encoders)
    }
    naming = {measure: one.mean_P for measure, one in near.items()} | ranks(near["naming"]) | {"naming_bonus": _bonus(near["naming"])}
    scores = {line: np.array([v["scores"][line] for v in done.verdicts], float) for line in ("request", "response")}
    scores = {line: score_P for line, score_P in scores.items() if not np.isnan(score_P).all()}
    group_P = np.array([zlib.crc32(example.group.encode()) for example in examples], np.uint32)
    reward_P, terms = _reward(verdict, gold, near["naming"], guard)
    told = [case.future.result()[0] for case in done.cases]
    texts = [guard.opening(how.mode) + guard.text(one.tokens) for one in told]
    length_P = np.array([len(one.tokens) for one in told])
    answered = Answered(Batch(None, gold, done.shown), length_P, verdict, reward_P, terms, texts, scores, naming)
    return Rows(verdict, gold, group_P, scores, naming), answered


def verdict_arrays(verdicts: Sequence[dict], ids: tuple[str, ...]) -> Verdict:
    """Codes [P] of verdicts; where a threshold decides, a line is unsafe where its score reaches it."""

    def label(verdict: dict, line: str) -> int:
        score, threshold = verdict["scores"][line], verdict["threshold"]
        if verdict[line] is None or not verdict["parsed"]:
            return ABSENT
        return int(score >= threshold) if threshold is not None and score is not None else LABELS.index(verdict[line])

    def kind(verdict: dict) -> int:
        if not verdict["parsed"]:
            return -1
        if verdict["in_policy"] is None:
            return answers.NONE
        return answers.ID if verdict["category_id"] else answers.NAME if verdict["category_name"] else answers.UNLISTED

    number = {id: k for k, id in enumerate(ids)}
    return Verdict(
        np.array([v["parsed"] for v in verdicts]),
        *(np.array([label(v, line) for v in verdicts]) for line in ("request", "response")),
        np.array([kind(v) for v in verdicts]),
        np.array([number.get(v["category_id"], -1) for v in verdicts]),
    )


def _right(nodes: Taxonomy, examples: Sequence[Example], gold: Gold) -> np.ndarray:
    """Categories [P, N] whose names are right: the accepted ones, and of a natural OOD row the one outside of its name."""
    outside_N = np.array([node.id.startswith("outside") for node in nodes.nodes])
    name_N = np.array([node.name for node in nodes.nodes])
    right_PN = np.pad(np.asarray(gold.accepted_PN, bool), ((0, 0), (0, len(nodes) - gold.accepted_PN.shape[1])))
    for p, example in enumerate(examples):
        if example.category == "ood":
            right_PN[p] |= outside_N & (name_N == example.name)
    return right_PN


def _bonus(near: Near) -> np.ndarray:
    """The reward's naming bonus [P] under the published thresholds; NaN where nothing can be near."""
    bonus_P1 = naming_bonus(near.similarity_PS[:, None], near.valid_PS, PUBLISHED_MAX, PUBLISHED_MEAN)
    return np.where(near.valid_PS.any(axis=1), np.asarray(bonus_P1)[:, 0], np.nan)


def _reward(verdict: Verdict, gold: Gold, near: Near, guard: Guard) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    one: Any = jax.tree.map(lambda x: x[:, None], verdict)
    thresholds = PUBLISHED_MAX, PUBLISHED_MEAN
    got_PG, terms = reward(one, gold, near.similarity_PS[:, None], near.valid_PS, *thresholds, guard.recipe.reward.variant)
    return np.asarray(got_PG)[:, 0], {name: np.asarray(term)[:, 0] for name, term in terms.items()}
