"""What a recipe trains on and is judged by: taxonomy, examples, tokenizer, automaton, prompts, sentence encoder and bank."""

import os
from dataclasses import dataclass
from pathlib import Path

import jax
from transformers import AutoTokenizer

from pgjax import automaton as answers
from pgjax.automaton import Automaton
from pgjax.bank import Bank, build_bank, calibrate, load_bank
from pgjax.config import Recipe
from pgjax.data.build import build_dataset, read_dataset
from pgjax.data.pipeline import Pipeline
from pgjax.data.schema import Example
from pgjax.data.toy import toy_examples, toy_texts
from pgjax.models.sentence_encoder import Embedder, load_embedder
from pgjax.taxonomy import Taxonomy, full_view, load_taxonomy
from pgjax.tokenizer import train_byte_bpe


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
    report: list[str]  # the bank's calibration, for people


def grid(taxonomy: Taxonomy) -> tuple[str, ...]:
    """Every id that a prompt over this taxonomy may show, renumbered or not."""
    return answers.id_grid(len(taxonomy.top), max(len(taxonomy.children(node.id)) for node in taxonomy.top))


def cache_dir() -> Path:
    return Path(os.environ.get("PGJAX_CACHE", Path.home() / ".cache" / "pgjax"))


def make_tokenizer(recipe: Recipe, examples: list[Example], taxonomy: Taxonomy, folder: Path):
    """The checkpoint's tokenizer, or a byte-level BPE trained on the generated data; kept in the run folder."""
    if recipe.tokenizer_vocab:
        tokenizer = train_byte_bpe(toy_texts(examples, taxonomy, recipe), recipe.tokenizer_vocab)
    else:
        tokenizer = AutoTokenizer.from_pretrained(recipe.checkpoint)
    tokenizer.save_pretrained(folder)
    return tokenizer


def withheld(taxonomy: Taxonomy, never_seen: tuple[str, ...] = ()) -> set[str]:
    """Ids without a bank row: reserved nodes, and the never-seen with all below them."""
    return {taxonomy.nodes[n].id for n in full_view(taxonomy, "leaf", never_seen).hidden}


def make_banks(recipe: Recipe, taxonomy: Taxonomy, embedder: Embedder) -> tuple[Bank, Bank, list[str]]:
    """The training bank, without never-seen nodes, with thresholds from its own similarities; the full one with the same thresholds."""
    never = withheld(taxonomy, recipe.data.ood.never_seen)
    if recipe.reward.bank:
        bank, lines = load_bank(recipe.reward.bank, taxonomy, embedder, never), []
    else:
        bank = build_bank(taxonomy, embedder, never)
        if recipe.reward.variant == "strict":
            bank, report = calibrate(bank, taxonomy)
            lines = report.lines()
        else:
            lines = ["thresholds as published"]
    full = build_bank(taxonomy, embedder, withheld(taxonomy))
    return bank, full.replace(max_threshold=bank.max_threshold, mean_threshold=bank.mean_threshold), lines


def make_materials(recipe: Recipe, folder: Path) -> Materials:
    """Build what is missing under `folder` (data/, tokenizer/) and load the rest."""
    data = recipe.data
    taxonomy = load_taxonomy(data.taxonomy)
    if data.name != "toy":
        raise ValueError(f"data.name {data.name!r} is not a source that can be built; this version has 'toy'")
    if not (folder / "data").exists():
        build_dataset(toy_examples(recipe.seed, data.train_examples, data.eval_examples, data.ood.never_seen), folder / "data")
    train, held_out = (read_dataset(folder / "data", split) for split in ("train", "eval"))
    tokenizer = make_tokenizer(recipe, list(train), taxonomy, folder / "tokenizer")
    ids = grid(taxonomy)
    vocab = recipe.model.text.vocab
    automaton = answers.build(tokenizer, ids, recipe.answer.think_tag, vocab=vocab, cache_dir=cache_dir())
    share = dict(process_index=jax.process_index(), process_count=jax.process_count())
    pipelines = (Pipeline(rows, taxonomy, tokenizer, recipe, split, ids, **share) for split, rows in (("train", train), ("eval", held_out)))
    embedder = load_embedder(recipe.reward.embedder)
    return Materials(taxonomy, tokenizer, automaton, *pipelines, embedder, *make_banks(recipe, taxonomy, embedder))
