"""A run folder or a checkpoint directory, opened for use: recipe, model on the devices that are here, parameters, tokenizer."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pgjax.config import DataConfig, MeshConfig, Recipe
from pgjax.data.images import capped
from pgjax.files import read_json
from pgjax.models.hf_config import with_checkpoint
from pgjax.parallel.mesh import make_mesh
from pgjax.tokenizer import load_tokenizer
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.run_folder import read_config
from pgjax.train.setup import Setup, make_setup
from pgjax.train.trainable import merge, split

MAX_PIXELS = 28 * 28 * 768  # of a picture beside a checkpoint directory, as in the recipes of released models
SPOTS, SPOT = 64, 4096  # of a file's bytes, for a fingerprint


class SavedRun(NamedTuple):
    recipe: Recipe
    setup: Setup
    params: dict  # adapters included; what was trained is float32, the rest in the compute type
    tokenizer: Any


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a Hugging Face checkpoint directory; else it should be a run's."""
    file = folder / "config.json"
    return file.is_file() and "model_type" in read_json(file)


def open_checkpoint(folder: Path, compute_dtype: str | None = None, max_pixels: int | None = MAX_PIXELS) -> SavedRun:
    """A Hugging Face checkpoint directory on all devices, with the published recipe's values for all that such a directory does not say."""
    recipe = with_checkpoint(Recipe(name=folder.name, checkpoint=str(folder), data=DataConfig(max_pixels=max_pixels)))
    model = dataclasses.replace(
        recipe.model, compute_dtype=compute_dtype or recipe.model.compute_dtype, vision=capped(recipe.model.vision, max_pixels)
    )
    setup = make_setup(model, make_mesh(MeshConfig()))
    return SavedRun(dataclasses.replace(recipe, model=model), setup, setup.load(folder), load_tokenizer(folder))


def open_run(run: Path, best: bool = False, compute_dtype: str | None = None) -> SavedRun:
    """The newest checkpoint of a run folder, or the `best` (keep_best), on all devices, whatever mesh it was trained on.

    `compute_dtype` stands instead of the recipe's. Optimiser moments are not read. Raises ValueError for a folder that is no run, or has
    no such checkpoint.
    """
    recipe = read_config(run)
    model = recipe.model  # which was trained on pictures of at most so many pixels
    model = dataclasses.replace(
        model, compute_dtype=compute_dtype or model.compute_dtype, vision=capped(model.vision, recipe.data.max_pixels)
    )
    recipe = dataclasses.replace(recipe, model=model)
    tokenizer, setup = load_tokenizer(run / "tokenizer"), make_setup(recipe.model, make_mesh(MeshConfig()))
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    trained = jax.tree.map(place, setup.trained(setup.abstract), setup.trained(setup.training))
    frozen = split(setup.abstract_reference(), recipe.model)[1]
    checkpoints = Checkpoints(run / "checkpoints")
    if best and checkpoints.best() is None:
        raise ValueError(f"run {run} has no best checkpoint: none was scored (keep_best); leave out --best")
    params = checkpoints.restore_part({"params": trained}, checkpoints.best() if best else None)["params"]
    checkpoints.close()
    if frozen:
        references = Checkpoints(run / "reference")
        params = merge(params, references.restore_part(frozen))
        references.close()
    return SavedRun(recipe, setup, params, tokenizer)


def fingerprint(folder: Path, best: bool = False) -> str:
    """Names the weights that `open_checkpoint` or `open_run` reads: a digest of the files' sizes and of SPOTS spots in each, so that it
    takes no time where they are large. A copy has the same. ValueError for a folder that is no model."""
    if is_checkpoint(folder):
        root, files = folder, folder.glob("*.safetensors")
    else:
        read_config(folder)
        checkpoints = Checkpoints(folder / "checkpoints")
        step = checkpoints.best() if best else checkpoints.latest()
        checkpoints.close()
        root = folder / "checkpoints" / str(step)
        files = root.rglob("*")
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root)} {size}\n".encode())
        with open(file, "rb") as data:
            for k in range(SPOTS):
                data.seek(max(size - SPOT, 0) * k // (SPOTS - 1))
                digest.update(data.read(SPOT))
    return digest.hexdigest()[:32]
