"""What one constant phrase, said of every category, earns by the naming bonus, and what honest names earn.

    python benchmarks/study_adversary.py [--form pilot | accelerator] [--json]

At OOD gold any free name earns 0.5, and 0 to 0.5 more by its similarity to the gold category's phrases (PAPERS A8.5): the bonus. Its
means here are over the categories that a prompt may ask for, the most specific ones ("leaf": text, images) or the top ones (text with an
image). For each variant of the bank a phrase is searched that earns most: a beam of phrases; a step exchanges or appends a word. It has at
most W tokens, as the reward reads no more, and is made of the taxonomy's words and of abstract nouns, as names of categories are, or in the
accelerator form of every whole word of the encoder's tokenizer. Words of some categories are searched with and not shown: `shown` is the
best phrase without them and what it earns. What is found is a lower bound of what can be earned. `any_vector` is what the best unit vector
found earns, whether or not a text has it: a local optimum, no bound either.

Beside it: each category's own name, and each synonym, held out from the bank that it meets. Similarity by the second embedder and retrieval
of the right category by the full bank are never searched against; in retrieval a constant is at chance by construction.
Axes: N nodes judged, S name + synonyms, E embedding width, B phrases, V words, W tokens.
"""

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing import show
from tokenizers import Tokenizer

from pgjax.bank import Bank, build_bank, calibrate
from pgjax.config import RewardConfig
from pgjax.evaluation.naming import nearness, ranks
from pgjax.models.sentence_encoder import Embedder, TextEncoder, _package_directory, load_embedder
from pgjax.models.sentence_files import find_files
from pgjax.models.static_encoder import load_static_encoder
from pgjax.rewards import naming_bonus
from pgjax.taxonomy import Taxonomy, load_taxonomy

VARIANTS = ("full", "one_name", "max_only", "mean_only")
NEVER = 0.99  # the mean over several phrases is never as near as that
LEAK = 0.05  # as in `calibrate`
W = RewardConfig().name_tokens
WITHHELD = re.compile("Sexual|Self-Harm|Hate")  # words of these categories alone are searched with and not shown
ABSTRACT = re.compile(r"[a-z]+(tion|sion|ment|ness|ence|ance|ure)")  # none for groups of people, no rude ones


@dataclass(frozen=True)
class Sizes:
    beam: int  # phrases kept
    words: int  # tried for each place of each of them
    steps: int  # at most
    batch: int = 256  # phrases embedded at once


SIZES = {"pilot": Sizes(beam=6, words=8, steps=24), "accelerator": Sizes(beam=12, words=24, steps=24, batch=4096)}


def bank_variant(bank: Bank, name: str, taxonomy: Taxonomy | None = None) -> Bank:
    """The calibrated bank ("full") or what is left of it; the taxonomy is the packaged one unless given.

    * one_name: the node's name alone. Both thresholds, of one similarity now, are set by the rule of `calibrate`, to what 5% of the full
      bank's synonyms exceed with the name of an unrelated node: without synonyms the bank has nothing of its own to be set by.
    * max_only: the threshold of the mean is out of reach.
    * mean_only: one vector a node, the mean of its phrases (not of unit length), and the mean's threshold for both. A threshold alone
      cannot do it: a name that is in the bank has a largest similarity of 1, which earns all of the bonus under any threshold below 1.
    """
    if name not in VARIANTS:
        raise ValueError(f"no bank variant {name!r}; there are {', '.join(VARIANTS)}")
    thresholds = {"max_only": (bank.max_threshold, NEVER), "mean_only": (bank.mean_threshold,) * 2}
    if name == "one_name":
        thresholds[name] = (_one_name_threshold(bank, taxonomy or load_taxonomy()),) * 2
    high, mean = thresholds.get(name, (bank.max_threshold, bank.mean_threshold))
    return _left(bank, name).replace(max_threshold=high, mean_threshold=mean)


def _left(bank: Bank, name: str) -> Bank:
    """A variant's vectors."""
    first_NS = bank.valid_NS & (jnp.arange(bank.valid_NS.shape[1]) == 0)
    if name == "one_name":
        return bank.replace(valid_NS=first_NS)
    if name == "mean_only":
        sum_N1E = jnp.where(bank.valid_NS[..., None], bank.embedding_NSE, 0).sum(1, keepdims=True)
        mean_N1E = sum_N1E / jnp.maximum(bank.valid_NS.sum(1), 1)[:, None, None]
        return bank.replace(embedding_NSE=jnp.where(first_NS[..., None], mean_N1E, 0), valid_NS=first_NS)
    return bank


def _one_name_threshold(bank: Bank, taxonomy: Taxonomy) -> float:
    ids, parents = np.array([node.id for node in taxonomy.nodes]), np.array([node.parent for node in taxonomy.nodes])
    valid_NS = np.asarray(bank.valid_NS)
    unrelated_NN = valid_NS[:, 0] & (ids[:, None] != ids) & (parents[:, None] != ids) & (ids[:, None] != parents)
    similarity_NSN = np.einsum("nse,me->nsm", bank.embedding_NSE[:, 1:], bank.embedding_NSE[:, 0])
    return min(float(np.quantile(similarity_NSN[valid_NS[:, 1:, None] & unrelated_NN[:, None]], 1 - LEAK)), NEVER)


@jax.jit
def bonuses(vector_BE: jax.Array, bank: Bank, node_N: jax.Array) -> jax.Array:
    """What each phrase earns at each node: float32 [N, B]."""
    similarity_NBS = jnp.einsum("be,nse->nbs", vector_BE, bank.embedding_NSE[node_N], precision="highest")
    return naming_bonus(similarity_NBS, bank.valid_NS[node_N], bank.max_threshold, bank.mean_threshold)


@jax.jit
def score(vector_BE: jax.Array, bank: Bank, node_N: jax.Array) -> jax.Array:
    """What is searched for, [B], of vectors of any length: the mean bonus. Where few nodes pay, most words change nothing, so a tenth of
    what thresholds lower by 0.1 would pay counts too."""
    lower = bank.replace(max_threshold=bank.max_threshold - 0.1, mean_threshold=bank.mean_threshold - 0.1)
    unit_BE = vector_BE / jnp.linalg.norm(vector_BE, axis=1, keepdims=True)
    return bonuses(unit_BE, bank, node_N).mean(0) + 0.1 * bonuses(unit_BE, lower, node_N).mean(0)


@jax.jit
def climb(vector_BE: jax.Array, bank: Bank, node_N: jax.Array) -> jax.Array:
    """The mean bonus [B] after climbing from each vector: it is convex in the vector, so going to the gradient's direction never loses."""

    def step(_: int, vector_BE: jax.Array) -> jax.Array:
        slope_BE = jax.grad(lambda x: bonuses(x, bank, node_N).mean(0).sum())(vector_BE)
        norm_B1 = jnp.linalg.norm(slope_BE, axis=1, keepdims=True)
        return jnp.where(norm_B1 > 0, slope_BE / jnp.maximum(norm_B1, 1e-12), vector_BE)

    return bonuses(jax.lax.fori_loop(0, 100, step, vector_BE), bank, node_N).mean(0)


class Pool:
    """Every phrase that was tried, embedded once, as the reward does it. What is longer than W tokens is left out."""

    def __init__(self, embedder: Embedder, batch: int):
        self.embedder, self.batch = embedder, batch
        self.row: dict[str, int] = {}
        self.vector_BE = np.zeros((0, embedder.E), np.float32)

    def add(self, phrases: Iterable[str]) -> list[str]:
        """Those of the phrases that the pool now holds, each once."""
        phrases = [phrase for phrase in dict.fromkeys(phrases) if phrase]
        new = [phrase for phrase in phrases if phrase not in self.row]
        new = [phrase for phrase, ids in zip(new, self.embedder.encode(new, W + 1) if new else [], strict=True) if len(ids) <= W]
        padded = new + [""] * (-len(new) % self.batch)
        parts = [self.embedder.tokenize(padded[i : i + self.batch], W) for i in range(0, len(padded), self.batch)]
        self.vector_BE = np.concatenate([self.vector_BE, *(self.embedder.embed(*part) for part in parts)])[: len(self.row) + len(new)]
        self.row |= {phrase: len(self.row) + i for i, phrase in enumerate(new)}
        return [phrase for phrase in phrases if phrase in self.row]

    def of(self, phrases: list[str]) -> np.ndarray:
        return self.vector_BE[[self.row[phrase] for phrase in phrases]]


def search(pool: Pool, words: list[str], bank: Bank, node_N: np.ndarray, sizes: Sizes) -> None:
    """Add to the pool what earns more and more, until the beam stays. A word is appended to a phrase, whole or without one of its words.

    The words tried are those that would score best if the vector of a phrase were the mean of its words' vectors.
    """
    word_VE = jnp.asarray(pool.of(words))

    def scored(phrases: list[str]) -> Iterable[tuple[str, float]]:
        padded_BE = np.resize(pool.of(phrases), (-(-len(phrases) // 1024) * 1024, pool.embedder.E))  # few shapes to compile
        return zip(phrases, np.asarray(score(padded_BE, bank, node_N)), strict=False)

    scores, beam = dict(scored(list(pool.row))), []
    for _ in range(sizes.steps):
        before, beam = beam, sorted(scores, key=lambda phrase: (-scores[phrase], phrase))[: sizes.beam]
        if beam == before:
            return
        split = [phrase.split() for phrase in beam]
        tried = pool.add(beam + [" ".join(phrase[:i] + phrase[i + 1 :]) for phrase in split for i in range(len(phrase))])
        longer = []
        for phrase, vector_E in zip(tried, pool.of(tried), strict=True):
            guess_V = np.asarray(score(len(phrase.split()) * vector_E + word_VE, bank, node_N))
            longer += [f"{phrase} {words[v]}" for v in np.argsort(-guess_V, kind="stable")[: sizes.words]]
        scores |= scored([phrase for phrase in dict.fromkeys(tried + pool.add(longer)) if phrase not in scores])


class Judge:
    """A taxonomy under the reward's embedder and, where it is installed, the second one."""

    def __init__(self, taxonomy: Taxonomy, embedder: Embedder, second: TextEncoder | None):
        self.taxonomy, self.embedder, self.second = taxonomy, embedder, second
        published = build_bank(taxonomy, embedder)
        self.full, _ = calibrate(published, taxonomy)
        self.second_bank = build_bank(taxonomy, second) if second else None
        self.banks = {"published": published} | {name: bank_variant(self.full, name, taxonomy) for name in VARIANTS}
        named = np.asarray(self.full.valid_NS).any(1)
        indices = {"leaf": map(taxonomy.index, (x.id for x in taxonomy.leaves)), "top": map(taxonomy.index, (x.id for x in taxonomy.top))}
        self.node_N = {level: np.array([n for n in nodes if named[n]]) for level, nodes in indices.items()}
        self.phrases = [(node.name, *node.synonyms) for node in taxonomy.nodes]

    def said(self, names: list[str], node_N: np.ndarray, variant: str, level: str, without: int | None = None) -> dict[str, np.ndarray]:
        """What each name is worth, said of its node, by measure, [N]; phrase number `without` of every node is out of the banks."""

        def held(bank: Bank) -> Bank:
            return bank if without is None else bank.replace(valid_NS=bank.valid_NS.at[:, without].set(False))

        def near(encoder: TextEncoder, bank: Bank):
            right_NN = np.arange(len(self.taxonomy)) == node_N[:, None]
            return nearness(names, right_NN, np.full(len(names), level == "top"), self.taxonomy, encoder, held(bank))

        bank, left = self.banks[variant], _left(held(self.full), variant)
        left = left.replace(max_threshold=bank.max_threshold, mean_threshold=bank.mean_threshold)
        bonus_N = np.diag(bonuses(self.embedder.embed(*self.embedder.tokenize(names, W)), left, node_N))
        found = {"bonus": bonus_N, "nodes_paid": bonus_N > 0}
        found |= {name.removeprefix("naming_"): x for name, x in ranks(near(self.embedder, self.full)).items()}
        return found | ({"second_embedder_similarity": near(self.second, self.second_bank).mean_P} if self.second else {})

    def honest(self, variant: str, level: str) -> dict[str, dict[str, float]]:
        """Means over the nodes of the level and their own names; and over all their synonyms, each held out."""
        node_N, valid_NS = self.node_N[level], np.asarray(self.full.valid_NS)
        own = self.said([self.phrases[n][0] for n in node_N], node_N, variant, level)
        parts = []
        for s in range(1, valid_NS.shape[1]):
            of_N = node_N[valid_NS[node_N, s]]
            parts.append(self.said([self.phrases[n][s] for n in of_N], of_N, variant, level, s))
        held_out = {name: float(np.concatenate([part[name] for part in parts]).mean()) for name in own}
        return {"own_name": {name: float(own[name].mean()) for name in ("bonus", "nodes_paid")}, "held_out_synonym": held_out}


def measure(judge: Judge, nouns: list[str], unseen: list[str], sizes: Sizes) -> dict:
    """Every search adds to one pool and begins with its best, so that each has the finds of those before. Words of `unseen` that are
    nowhere else are not shown."""
    words_of = [re.findall(r"[\w'-]+", " ".join(phrases).lower()) for phrases in judge.phrases]
    open_nodes = [words for (name, *_), words in zip(judge.phrases, words_of, strict=True) if not WITHHELD.search(name)]
    mild = {word for words in (*open_nodes, nouns) for word in words}
    pool, variants = Pool(judge.embedder, sizes.batch), {}
    words = pool.add([word for words in (*words_of, nouns, unseen) for word in words])
    seeds = len(pool.add([*words, *(phrase.lower() for phrases in judge.phrases for phrase in phrases)]))
    cases = [(variant, level) for variant in judge.banks for level in judge.node_N]
    for variant, level in cases:
        search(pool, words, judge.banks[variant], judge.node_N[level], sizes)
    for variant, level in cases:
        bank, node_N = judge.banks[variant], judge.node_N[level]
        mean_B = np.asarray(bonuses(pool.vector_BE, bank, node_N).mean(0))
        best_B, phrases = np.argsort(-mean_B, kind="stable"), list(pool.row)
        phrase, b = phrases[best_B[0]], next(b for b in best_B if mild.issuperset(phrases[b].split()))
        said = {name: float(x.mean()) for name, x in judge.said([phrase] * len(node_N), node_N, variant, level).items() if name != "bonus"}
        vector_1E = pool.of([phrase])
        found = {f"bonus_{other}": float(bonuses(vector_1E, bank, judge.node_N[other]).mean()) for other in judge.node_N} | said
        found["shown"] = {"phrase": phrases[b], f"bonus_{level}": float(mean_B[b])}
        found["best_phrase"] = phrase if b == best_B[0] else f"({len(phrase.split())} words, not shown)"
        found["any_vector"] = float(climb(pool.vector_BE[best_B[:512]], bank, node_N).max())
        found["honest"] = judge.honest(variant, level)
        variants.setdefault(variant, {"thresholds": [float(bank.max_threshold), float(bank.mean_threshold)]})[level] = found
    counts = {"vocabulary": len(words), "seeds": seeds, "phrases_tried": len(pool.row), "tokens": W}
    counts |= {f"{level}_nodes": len(node_N) for level, node_N in judge.node_N.items()}
    return {"variants": {name: x | x.pop("leaf") for name, x in variants.items()}, "search": asdict(sizes) | counts}


def run(form: str, workdir: Path) -> dict:
    """The packaged taxonomy and embedder; nothing is written to `workdir`. A variant's own keys are of the phrase that is best for leaf
    nodes, those under `top` of the one for top nodes."""
    vocabulary = Tokenizer.from_file(str(find_files(_package_directory()).tokenizer)).get_vocab()
    whole = [word for word in sorted(vocabulary, key=vocabulary.__getitem__) if re.fullmatch("[a-z]{3,}", word)]
    judge = Judge(load_taxonomy(), load_embedder(), load_static_encoder())
    return measure(judge, list(filter(ABSTRACT.fullmatch, whole)), whole if form == "accelerator" else [], SIZES[form])


def table(found: dict) -> list[dict]:
    """A row for each bank and level; a pair is constant, held-out synonym."""
    rows = []
    for variant, leaf in found["variants"].items():
        for level, x in (("leaf", leaf), ("top", leaf["top"])):
            synonym, thresholds = x["honest"]["held_out_synonym"], " / ".join(f"{t:.3f}" for t in leaf["thresholds"])
            row = {"bank": variant, "nodes": level, "thresholds": thresholds, "constant": x[f"bonus_{level}"]}
            row |= {"held-out synonym": synonym["bonus"], "own name": x["honest"]["own_name"]["bonus"], "any vector": x["any_vector"]}
            pairs = {"paid": "nodes_paid", "second embedder": "second_embedder_similarity", "top 1": "top1", "MRR": "mrr"}
            row |= {name: f"{x[key]:.3f}, {synonym[key]:.3f}" for name, key in pairs.items() if key in x}
            rows.append(row | {"phrase": x["best_phrase"], "shown": f"{x['shown']['phrase']} ({x['shown'][f'bonus_{level}']:.4f})"})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=SIZES, default="pilot")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = run(args.form, Path())
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        show(table(result), False, f"What a constant phrase earns, {args.form}: {json.dumps(result['search'])}")
