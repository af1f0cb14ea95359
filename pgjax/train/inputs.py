"""What a recipe names outside itself, looked at before a run writes or deletes anything."""

import dataclasses
import os
import re
from pathlib import Path

import jax

from pgjax.bank import fingerprint, load_bank
from pgjax.config import Recipe
from pgjax.conversation import load_prompts
from pgjax.data.build import read_dataset
from pgjax.data.rows import own_rows
from pgjax.data.sources.files import data_root
from pgjax.models.checkpoint import check_params
from pgjax.models.sentence_encoder import load_embedder
from pgjax.recipes import validate
from pgjax.taxonomy import load_taxonomy
from pgjax.tokenizer import load_tokenizer
from pgjax.train.materials import withheld
from pgjax.train.setup import make_setup


def check_start(recipe: Recipe, mesh: jax.sharding.Mesh) -> None:
    """What every run needs: ValueError for a name that is no folder's, for batches that the mesh does not divide, and for a checkpoint or
    tokenizer that is missing, broken or made for something else.
    """
    if not re.fullmatch(r"\w[\w.-]*", recipe.name):  # ".." would be another folder, which --fresh deletes
        raise ValueError(f"name {recipe.name!r} must be a folder's name: letters, digits, _ - and .")
    validate(dataclasses.replace(recipe, devices=mesh.size))  # an axis of -1 is known only now
    if recipe.checkpoint:
        check_params(recipe.checkpoint, make_setup(recipe.model, mesh).abstract_reference())
    if not recipe.tokenizer_vocab:
        if not recipe.checkpoint:
            raise ValueError("tokenizer_vocab 0 takes the checkpoint's tokenizer: set checkpoint, or the size of a tokenizer to train")
        load_tokenizer(recipe.checkpoint)


def check_inputs(recipe: Recipe, mesh: jax.sharding.Mesh) -> None:
    """What training by GRPO needs besides: ValueError for a file or folder of the recipe that is missing, broken or made for something
    else.
    """
    data = recipe.data
    if data.name == "rewriter":
        raise ValueError("data.name rewriter has answers to learn and nothing to reward: train it with `pgjax sft`")
    check_start(recipe, mesh)
    taxonomy = load_taxonomy(data.taxonomy)
    if data.name == "toy" and fingerprint(taxonomy) != fingerprint(load_taxonomy()):
        raise ValueError(f"data.taxonomy {data.taxonomy}: toy data are about the packaged taxonomy; leave it out, or take other data")
    if data.name == "public_mix":
        data_root(data.root)
    if data.name == "jsonl":
        own_rows(data.root, taxonomy)
    if data.name == "built":
        if not data.root:
            raise ValueError("data.name built needs --data.root, the folder of a dataset with the splits train and eval")
        for split in ("train", "eval"):
            read_dataset(data.root, split)
    load_prompts(data.prompts)
    never_seen = withheld(taxonomy, data.ood.never_seen)
    embedder = load_embedder(recipe.reward.embedder)
    if recipe.reward.bank:
        load_bank(recipe.reward.bank, taxonomy, embedder, never_seen)


def make_room(run: Path) -> bool:
    """Makes the run folder; True where there was none. ValueError where nothing can be written."""
    new = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run {run} cannot be made ({error.strerror}); choose a folder that can be written to with --runs") from error
    if not os.access(run, os.W_OK | os.X_OK):
        raise ValueError(f"run {run} cannot be written to; choose another --runs or --name")
    return new
