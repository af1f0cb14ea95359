"""What a recipe trains on and is judged by: taxonomy, examples, tokenizer, automaton, prompts, sentence encoder and bank."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from pgjax import automaton as answers
from pgjax.automaton import Automaton
from pgjax.bank import Bank, build_bank, calibrate, load_bank
from pgjax.config import Recipe
from pgjax.data.build import build_dataset, read_dataset
from pgjax.data.pipeline import Pipeline
from pgjax.data.rows import own_rows
from pgjax.data.schema import Example
from pgjax.data.sources.mix import public_mix
from pgjax.data.toy import toy_answers, toy_examples, toy_texts
from pgjax.files import new_folder, replace_file
from pgjax.models.sentence_encoder import Embedder, load_embedder
from pgjax.parallel.mesh import WHOLE, Share
from pgjax.parallel.start import first_alone
from pgjax.taxonomy import PolicyView, Taxonomy, full_view, load_taxonomy
from pgjax.tokenizer import load_tokenizer, train_byte_bpe
from pgjax.train.training_rows import write_training_rows


@dataclass(frozen=True)
class Materials:
    taxonomy: Taxonomy
    tokenizer: object
    automaton: Automaton
    train: Pipeline
    held_out: Pipeline
    embedder: Embedder
    bank: Bank  # of training: never-seen nodes have no row
    full_bank: Bank  # of evaluation: every node but the reserved
    # (randomness, row, its policy, are the labels to be right) -> `warm_up.answers` texts
    warm_up_answers: Callable[[np.random.Generator, Example, PolicyView, bool], list[str]]


def grid(taxonomy: Taxonomy) -> tuple[str, ...]:
    """Every id that a prompt over this taxonomy may show, renumbered or not."""
    return answers.id_grid(len(taxonomy.top), max(len(taxonomy.children(node.id)) for node in taxonomy.top))


def cache_dir() -> Path:
    return Path(os.environ.get("PGJAX_CACHE", Path.home() / ".cache" / "pgjax"))


def new_tokenizer(recipe: Recipe, texts: Iterable[str]):
    """The checkpoint's tokenizer, or a byte-level BPE trained on the training split's texts."""
    return train_byte_bpe(texts, recipe.tokenizer_vocab) if recipe.tokenizer_vocab else load_tokenizer(recipe.checkpoint)


def make_tokenizer(recipe: Recipe, texts: Callable[[], Iterable[str]], folder: Path):
    """As `new_tokenizer`, made once and kept in the run folder."""
    if not folder.exists():
        with new_folder(folder) as aside:
            new_tokenizer(recipe, texts()).save_pretrained(aside)
    return load_tokenizer(folder)


def withheld(taxonomy: Taxonomy, never_seen: tuple[str, ...] = ()) -> set[str]:
    """Ids without a bank row: reserved nodes, and the never-seen with all below them."""
    return {taxonomy.nodes[n].id for n in full_view(taxonomy, "leaf", never_seen).hidden}


def make_banks(recipe: Recipe, taxonomy: Taxonomy, embedder: Embedder) -> tuple[Bank, Bank]:
    """The training bank, without never-seen nodes, with thresholds from its own similarities; the full one with the same thresholds."""
    never = withheld(taxonomy, recipe.data.ood.never_seen)
    if recipe.reward.bank:
        bank = load_bank(recipe.reward.bank, taxonomy, embedder, never)
    else:
        bank = build_bank(taxonomy, embedder, never)
        if recipe.reward.variant == "strict":
            bank, _ = calibrate(bank, taxonomy)
    full = build_bank(taxonomy, embedder, withheld(taxonomy))
    return bank, full.replace(max_threshold=bank.max_threshold, mean_threshold=bank.mean_threshold)


def make_examples(recipe: Recipe, taxonomy: Taxonomy) -> tuple[list[Example], dict[str, dict[str, int]]]:
    """The rows of `data.name`, and by source how many were left out for which reason."""
    data = recipe.data
    if data.name == "toy":
        return toy_examples(recipe.seed, data.train_examples, data.eval_examples, data.ood.never_seen), {}
    if data.name == "public_mix":
        return public_mix(data, taxonomy)
    return own_rows(data.root, taxonomy), {}


def check_same_rows(root: Path, known: Path) -> None:
    """ValueError where the dataset has been built anew since the run was started; the file `known` tells it from others."""
    files = [root / name for name in ("dataset_info.json", "card.json")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
    if known.exists() and known.read_text() != digest:
        raise ValueError(
            f"dataset {root} was built anew since the run in {known.parent.parent} started; take another --name, or give --fresh"
        )
    replace_file(known, digest)


def make_materials(recipe: Recipe, folder: Path, share: Share = WHOLE) -> Materials:
    """Build what is missing under `folder` (data/, tokenizer/) and load the rest. Of several processes the first one builds; batches are
    this process's `share`."""
    with first_alone():
        return _make_materials(recipe, folder, share)


def _make_materials(recipe: Recipe, folder: Path, share: Share) -> Materials:
    taxonomy = load_taxonomy(recipe.data.taxonomy)
    dataset = folder / "data"
    if recipe.data.name != "built" and not dataset.exists():
        examples, left_out = make_examples(recipe, taxonomy)
        build_dataset(examples, dataset)
        replace_file(dataset / "left_out.json", json.dumps(left_out, indent=1) + "\n")
    dataset.mkdir(exist_ok=True)  # what is found out about the rows lies there too
    if recipe.data.name == "built":
        check_same_rows(Path(recipe.data.root or ""), dataset / "built.txt")
    rows = {split: read_dataset(recipe.data.root if recipe.data.name == "built" else dataset, split) for split in ("train", "eval")}
    tokenizer = make_tokenizer(recipe, lambda: toy_texts(rows["train"], taxonomy, recipe), folder / "tokenizer")
    ids = grid(taxonomy)
    vocab = recipe.model.text.vocab
    automaton = answers.build(tokenizer, ids, recipe.answer.think_tag, vocab=vocab, cache_dir=cache_dir())
    train, held_out = (
        Pipeline(rows[split], taxonomy, tokenizer, recipe, split, ids, share, cache=dataset / f"fit_{split}.json") for split in rows
    )
    if jax.process_index() == 0:
        write_training_rows(folder, (rows["train"][index] for index in train.kept.tolist()), recipe.checkpoint)
    embedder = load_embedder(recipe.reward.embedder)

    def warm_up_answers(rng: np.random.Generator, example: Example, view: PolicyView, right: bool) -> list[str]:
        # Format, ids and names from the prompt's policy alone: nothing in these answers is about the toy, so every source has them.
        never_seen = recipe.data.ood.never_seen
        return toy_answers(rng, example, view, taxonomy, recipe.warm_up.answers, right, recipe.answer.think_tag, never_seen)

    banks = make_banks(recipe, taxonomy, embedder)
    return Materials(taxonomy, tokenizer, automaton, train, held_out, embedder, *banks, warm_up_answers)
