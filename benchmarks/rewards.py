"""Samples/s of the whole reward, from answer tokens to rewards, beside the same rules on strings.

    python benchmarks/rewards.py [--answers 512] [--group 16] [--json]

Answers to toy prompts, a quarter of them broken in some way; the published variant with the published thresholds. Paths:

* strings: decode each answer, parse it with a regular expression, embed in one batch the names that the rules compare, score it
  (tests/reference_reward.py);
* pgjax: the automaton over the tokens, then what `Programs.judge` does of a step: the names that the rules compare read and
  tokenized on the host, each once, then verdict, embedding, similarities with the bank and rewards in one program. In training the
  automaton's end state comes with the rollout;
* pgjax, arrays alone: the same without the work on the host;
* "no embedder": the rules with a zero vector for every name, since the embedder takes most of the time of the others.

Both have the same sentence encoder, and their rewards must agree to 1e-5. ratio is to the strings' samples/s, with the embedder or
without.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from timing import median_seconds, show

from pgjax import automaton
from pgjax.config import AnswerConfig, MeshConfig, RewardConfig, RolloutConfig
from pgjax.data.schema import CATEGORY_NODE, CATEGORY_OOD
from pgjax.data.toy import toy_answers
from pgjax.generate.decode import Rollout
from pgjax.generate.score import answer_rows
from pgjax.grpo.programs import Judge, Programs
from pgjax.parallel.mesh import make_mesh, place_rows
from pgjax.recipes import load_recipe
from pgjax.tokenizer import answer_texts, stop_ids
from pgjax.train.materials import make_materials
from pgjax.train.setup import make_setup
from pgjax.train.update import make_optimizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference_reward  # noqa: E402

BROKEN_SHARE = 0.25
EDITS = [("\n", "\r\n"), ("think>", "thinking>"), ("Request:", "Request: "), ("</answer>", "</answer> "), ("\nCategory", "\n\nCategory"),
         ("Category:", "Category: "), ("unsafe", "safe"), ("</answer>", "")]  # fmt: skip


def write_answers(batch, materials, recipe) -> list[list[str]]:
    """G answers to each prompt with labels, ids and names at random, some broken."""
    rng, G, tag = np.random.default_rng(0), recipe.rollout.group, recipe.answer.think_tag
    texts_PG = [toy_answers(rng, example, view, materials.taxonomy, G, False, tag) for example, view in batch.rows]
    edit = lambda text: text.replace(*EDITS[rng.integers(len(EDITS))]) if rng.random() < BROKEN_SHARE else text  # noqa: E731
    return [[edit(text) for text in texts_G] for texts_G in texts_PG]


def string_row(p: int, batch, materials) -> dict:
    """A prompt's gold as a row of the published data, with the id that its policy shows."""
    gold, (example, _) = batch.gold, batch.rows[p]
    node, category = int(gold.node_P[p]), int(gold.category_P[p])
    shown = materials.automaton.ids[int(np.flatnonzero(gold.node_of_id_PK[p] == node)[0])] if category == CATEGORY_NODE else ""
    response = "safe" if example.response_label == "absent" else example.response_label
    return {
        "modality": example.modality.replace("_", "-"),
        "query_label": example.request_label,
        "response_label": "" if example.modality == "image" else response,
        "category": shown,
        "original_category": materials.taxonomy.nodes[node].name if category == CATEGORY_OOD else "",
    }


def string_rewards(tokens_PGR, length_PG, rows: list[dict], phrases: list[np.ndarray], tokenizer, embed) -> np.ndarray:
    """Rewards [P, G] by text. `phrases` has each prompt's name and synonyms as unit vectors, which are known beforehand."""
    G = length_PG.shape[1]
    texts, named = answer_texts(tokenizer, tokens_PGR, length_PG), {}
    for n, text in enumerate(texts):
        row = rows[n // G]
        parsed = reference_reward.parse(text, row["modality"] == "image")
        if row["original_category"] and parsed and parsed[2] and not reference_reward.ID.fullmatch(parsed[2]):
            named[n] = parsed[2]
    vectors = dict(zip(named, embed(list(named.values())), strict=True))
    rewards = []
    for n, text in enumerate(texts):
        similarities = (phrases[n // G] @ vectors[n]).tolist() if n in named else []
        rewards.append(reference_reward.score(text, rows[n // G] | {"similarities": similarities}))
    return np.array(rewards).reshape(length_PG.shape)


def measure(answers: int, group: int, repeats: int) -> list[dict]:
    """Rows {answers, group, path, samples_per_s, ratio}. RuntimeError where the paths disagree on a reward."""
    recipe = load_recipe("toy")
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, train_examples=max(64, answers // group), eval_examples=8),
        answer=AnswerConfig(max_tokens=48),
        rollout=RolloutConfig(group=group),
        reward=RewardConfig(variant="published", name_tokens=16),
    )
    with tempfile.TemporaryDirectory() as folder:
        materials = make_materials(recipe, Path(folder))
    batch = materials.train.batch(0, answers // group)
    tokenizer, embedder, bank = materials.tokenizer, materials.embedder, materials.full_bank
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"] + [stop_ids(tokenizer)[0]]  # noqa: E731
    ids_PG = [[encode(text) for text in texts_G] for texts_G in write_answers(batch, materials, recipe)]
    tokens_PGR, length_PG = answer_rows(ids_PG, recipe.answer.max_tokens)

    rows = [string_row(p, batch, materials) for p in range(len(batch.rows))]
    phrases = [np.asarray(bank.embedding_NSE[node])[np.asarray(bank.valid_NS[node])] for node in np.maximum(batch.gold.node_P, 0)]

    setup = make_setup(recipe.model, make_mesh(MeshConfig(), jax.devices()[:1]))
    optimizer = make_optimizer(recipe.grpo.optimizer, 1)
    programs = Programs(recipe, setup, optimizer, materials.automaton, tokenizer, Judge(embedder, bank))
    tokens, length, gold = place_rows((tokens_PGR, length_PG, batch.gold), setup.mesh)

    @jax.jit
    def read(machine, tokens_PGR, length_PG, modality_P) -> Rollout:
        """The answers as a rollout leaves them; the reward looks at tokens, lengths and end states."""
        none = jax.numpy.zeros((), jax.numpy.int32)
        modality_PG = jax.numpy.broadcast_to(modality_P[:, None], length_PG.shape)
        return Rollout(tokens_PGR, none, none, length_PG, automaton.run(machine, tokens_PGR, length_PG, modality_PG))

    rolled = lambda: read(materials.automaton, tokens, length, gold.modality_P)  # noqa: E731
    strings = lambda embed: string_rewards(tokens_PGR, length_PG, rows, phrases, tokenizer, embed)  # noqa: E731
    judged = lambda rollout, *names: programs._judge(rollout, gold, *names, bank, programs.encoder).reward_PG  # noqa: E731
    names, mask, whose = programs.names(rolled(), gold)
    none, zeros = jax.numpy.zeros_like(mask), lambda names: np.zeros((len(names), embedder.E), np.float32)

    def without_embedder():
        rollout = rolled()
        names, _, whose = programs.names(rollout, gold)
        return judged(rollout, names, none, whose)

    paths = {
        "strings": lambda: strings(embedder.texts),
        "pgjax": lambda: programs.judge(rolled(), gold, bank).reward_PG,
        "pgjax, arrays alone": lambda: judged(rolled(), names, mask, whose),
        "strings, no embedder": lambda: strings(zeros),
        "pgjax, no embedder": without_embedder,
        "pgjax, arrays alone, no embedder": lambda: judged(rolled(), names, none, whose),
    }
    found = []
    for path, f in paths.items():
        reward_PG, rate = np.asarray(f()), length_PG.size / median_seconds(f, repeats)
        if path.startswith("strings"):
            expected_PG, base = reward_PG, rate
        if (gap := np.abs(reward_PG - expected_PG).max()) > 1e-5:
            raise RuntimeError(f"{path}: rewards differ from those of the strings by {gap:.1e}")
        found.append({"answers": length_PG.size, "group": group, "path": path, "samples_per_s": rate, "ratio": rate / base})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--answers", type=int, default=512, help="of a step")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    title = "Samples/s of the whole reward: medians of 5 steps; the rewards of all paths agree to 1e-5."
    show(measure(args.answers, args.group, 5), args.json, title)


if __name__ == "__main__":
    main()
