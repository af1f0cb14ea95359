"""A guard's answers to a benchmark, as arrays for the metrics: `pgjax evaluate` (PAPERS A10).

Two passes. The first shows the whole policy: binary classification, categories, and the rows whose risk the taxonomy lacks (natural
OOD). The second takes the rows of a known category and hides it, with every other that counts as right, from half of them: OOD detection
and naming. Where a recipe was trained on policies of a few entries (data.ood.keep), prompts list as many here.
"""

import dataclasses
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from pgjax import automaton as answers
from pgjax.automaton import Verdict
from pgjax.bank import Bank, build_bank
from pgjax.data.pipeline import Batch
from pgjax.data.schema import ABSENT, CATEGORY_OOD, LABELS, Example, Gold
from pgjax.data.sources.label_map import outside
from pgjax.evaluation.evaluate import Answered, nearness
from pgjax.evaluation.metrics import Rows
from pgjax.evaluation.summary import Evaluated
from pgjax.models.sentence_encoder import TextEncoder
from pgjax.rewards import naming_bonus, reward
from pgjax.serving.guard import Case, Guard, How, Policy
from pgjax.taxonomy import PolicyView, Taxonomy, full_view, level_of, policy_view
from pgjax.train.materials import withheld

Shown = tuple[Example, PolicyView]
SHARE = 0.5  # of the second pass, whose gold category is hidden


class Judges(NamedTuple):
    """What names are compared with: encoders by the measure that they give, and a bank each, over the taxonomy and what lies outside."""

    encoders: dict[str, TextEncoder]
    banks: dict[str, Bank]
    nodes: Taxonomy

    @classmethod
    def of(cls, guard: Guard, encoders: dict[str, TextEncoder], thresholds: tuple[float, float]) -> "Judges":
        beyond = tuple(dataclasses.replace(node, id=f"outside {node.id}") for node in outside().nodes)
        nodes = Taxonomy(guard.taxonomy.nodes + beyond)
        banks = {name: build_bank(nodes, encoder, withheld(guard.taxonomy)) for name, encoder in encoders.items()}
        high, mean = thresholds
        return cls(encoders, {name: bank.replace(max_threshold=high, mean_threshold=mean) for name, bank in banks.items()}, nodes)


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
        if isinstance(case, ValueError):
            done.left_out["prompt too long" if "tokens of the model" in str(case) else "image unfit"] += 1
        else:
            done.shown.append(row), done.cases.append(case), done.verdicts.append(guard.verdict(case))
    return done


# --- what prompts show -------------------------------------------------------------------------------------------------------------


def draw(example: Example, seed: int) -> np.random.Generator:
    """Randomness of a row: of its id and the seed alone."""
    return np.random.default_rng((seed, zlib.crc32(example.id.encode())))


def whole(guard: Guard, policy: Policy, example: Example, seed: int) -> PolicyView:
    """The whole policy, or as many of its entries as prompts list in training, the gold one among them."""
    ood = dataclasses.replace(guard.recipe.data.ood, never_seen=policy.hidden)
    if ood.keep is None:
        return policy.view(example.modality)
    return policy_view(policy.taxonomy, ood, draw(example, seed), level_of(example.modality), example.node, hide_gold=False)


def without(guard: Guard, policy: Policy, example: Example, seed: int) -> PolicyView:
    """As `whole`, without the categories that would be right."""
    level = level_of(example.modality)
    right = {id for id in (example.node, *example.accepted) if id}
    if level == "top":
        right |= {parent for id in right if (parent := policy.taxonomy.by_id(id).parent)}
    hidden = (*policy.hidden, *sorted(right))
    if guard.recipe.data.ood.keep is None:
        return full_view(policy.taxonomy, level, hidden)
    ood = dataclasses.replace(guard.recipe.data.ood, never_seen=hidden)
    return policy_view(policy.taxonomy, ood, draw(example, seed), level, None, hide_gold=False)


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
) -> tuple[Evaluated, Answered]:
    """A benchmark's two passes, and the answers of the first one for the table of samples. ValueError where no row can be shown whole."""
    began = time.monotonic()
    first = judged(guard, policy, [(e, whole(guard, policy, e, seed)) for e in examples], how, seen)
    if not first.shown:
        raise ValueError(
            f"benchmark {name}: no row can be shown whole: {dict(left_out + first.left_out)}; a larger --prompt-tokens shows more"
        )
    second = judged(guard, policy, hidden_rows(guard, policy, [e for e, _ in first.shown], seed), how, seen)
    rows, answered = as_rows(guard, policy, first, how, judges)
    hidden = as_rows(guard, policy, second, how, judges)[0] if second.shown else None
    return Evaluated(name, rows, hidden, lines, left_out + first.left_out, time.monotonic() - began), answered


def hidden_rows(guard: Guard, policy: Policy, examples: Iterable[Example], seed: int) -> list[Shown]:
    """Rows of a known category that the policy could list, hidden from SHARE of them, and from all about a never-seen one."""
    never = never_seen(guard)
    rows = []
    for example in examples:
        if example.category == "node" and example.node:
            hide = example.node in never or draw(example, seed + 1).random() < SHARE
            view = (without if hide else whole)(guard, policy, example, seed)
            rows += [(example, view)] if view.entries else []
    return rows


def never_seen(guard: Guard) -> set[str]:
    """Categories that occur nowhere in the guard's training, with all below them."""
    return withheld(guard.taxonomy, guard.recipe.data.ood.never_seen) - withheld(guard.taxonomy)


def as_rows(guard: Guard, policy: Policy, done: Pass, how: How, judges: Judges) -> tuple[Rows, Answered]:
    """A pass as what the metrics read, and as what samples are made of."""
    gold = policy.renderer.gold(done.shown)
    verdict = verdict_arrays(done.verdicts, guard.automaton.ids, how.threshold)
    scores = {line: np.array([_number(v["scores"][line]) for v in done.verdicts]) for line in ("request", "response")}
    node_P = np.array([_node(judges.nodes, example, int(node)) for (example, _), node in zip(done.shown, gold.node_P, strict=True)])
    ood_P, named_P = gold.category_P == CATEGORY_OOD, verdict.parsed & (verdict.kind == answers.NAME)
    names = [v["category_name"] if p else None for v, p in zip(done.verdicts, named_P & ood_P, strict=True)]
    naming: dict[str, np.ndarray] = {}
    for measure, encoder in judges.encoders.items():
        bank = judges.banks[measure]
        naming[measure], rank_P = nearness(names, node_P, encoder, bank)
        if measure == "naming":
            naming |= {"naming_mrr": 1 / rank_P, "naming_top1": np.where(np.isnan(rank_P), np.nan, rank_P == 1)}
            similarity_PGS, valid_PS = _similarity(names, node_P, encoder, bank)
            bonus_P = np.asarray(naming_bonus(similarity_PGS, valid_PS, bank.max_threshold, bank.mean_threshold))[:, 0]
            naming["naming_bonus"] = np.where(valid_PS.any(1), bonus_P, np.nan)
    never_P = ood_P & np.isin([example.node for example, _ in done.shown], list(never_seen(guard)))
    gold = gold.replace(never_seen_P=never_P)
    group_P = np.array([zlib.crc32(example.group.encode()) for example, _ in done.shown], np.uint32)
    reward_P, terms = _reward(verdict, gold, similarity_PGS, valid_PS, judges.banks["naming"], guard)
    told = [case.future.result()[0] for case in done.cases]
    texts = [guard.opening(how.mode) + guard.text(one.tokens) for one in told]
    answered = Answered(
        Batch(None, gold, done.shown),
        np.array([len(one.tokens) for one in told]),
        verdict,
        naming["naming"],
        reward_P,
        terms,
        texts,
        scores,
    )
    return Rows(verdict, gold, group_P, scores, naming), answered


def verdict_arrays(verdicts: Sequence[dict], ids: tuple[str, ...], threshold: float | None) -> Verdict:
    """Codes [P] of verdicts; with a threshold a line is unsafe where its score reaches it."""

    def label(verdict: dict, line: str) -> int:
        score = verdict["scores"][line]
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


def _number(score: float | None) -> float:
    return np.nan if score is None else score


def _node(nodes: Taxonomy, example: Example, node: int) -> int:
    """Row of the judges' bank: the gold node's, or of a natural OOD row that of its name."""
    if node >= 0 or example.category != "ood":
        return node
    return next((n for n, entry in enumerate(nodes.nodes) if entry.name == example.name and entry.id.startswith("outside")), -1)


def _similarity(names: Sequence[str | None], node_P: np.ndarray, encoder: TextEncoder, bank: Bank) -> tuple[np.ndarray, np.ndarray]:
    """As bank.similarity, of one name a row; zero without a name."""
    embedding_NSE, valid_NS = np.asarray(bank.embedding_NSE), np.asarray(bank.valid_NS)
    similarity_PS = np.zeros((len(names), valid_NS.shape[1]), np.float32)
    said = [p for p, name in enumerate(names) if name and node_P[p] >= 0]
    similarity_PS[said] = np.einsum("pe,pse->ps", encoder.texts([names[p] or "" for p in said]), embedding_NSE[node_P[said]])
    return similarity_PS[:, None], valid_NS[node_P] & (node_P >= 0)[:, None]


def _reward(verdict: Verdict, gold: Gold, similarity_PGS: np.ndarray, valid_PS: np.ndarray, bank: Bank, guard: Guard):
    one = jax.tree.map(lambda x: x[:, None], verdict)
    got_PG, terms = reward(one, gold, similarity_PGS, valid_PS, bank.max_threshold, bank.mean_threshold, guard.recipe.reward.variant)
    return np.asarray(got_PG)[:, 0], {name: np.asarray(term)[:, 0] for name, term in terms.items()}
