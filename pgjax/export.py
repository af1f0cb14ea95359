"""A trained run as a Hugging Face checkpoint directory, which transformers and vLLM load: weights, config, tokenizer, processor."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError

from pgjax.config import Recipe
from pgjax.data.images import image_processor
from pgjax.files import new_folder
from pgjax.models.checkpoint import save_params
from pgjax.models.hf_config import config_to_hf
from pgjax.tokenizer import END_OF_TEXT, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, stop_ids
from pgjax.train.saved import open_run
from pgjax.train.trainable import merge_adapters
from pgjax.train.training_rows import TRAINING_ROWS

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
PADS = {"image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD}
TOKENS = PADS | {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
TRAINED_ON = (TRAINING_ROWS, Path("data") / "groups.json")  # what an evaluation refuses, and what one of a rewriter leaves out


def export(run: Path, folder: Path, best: bool = False, dtype: str | None = None) -> Path:
    """Write the newest checkpoint of a run (or its `best`) to `folder`, which must not exist; adapters are merged into the weights.

    `dtype` of the files defaults to the recipe's compute type. The folder is whole or absent. Raises ValueError for a run without
    such a checkpoint and for a folder that is there already or cannot be made.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; name a new folder")
    recipe, _, params, tokenizer = open_run(run, best)
    params = merge_adapters(params, recipe.model)
    try:
        with new_folder(folder) as aside:
            write_checkpoint(aside, recipe, params, tokenizer, dtype or recipe.model.compute_dtype)
            for file in TRAINED_ON:
                if (run / file).is_file():
                    (aside / file).parent.mkdir(exist_ok=True)
                    shutil.copy(run / file, aside / file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be written ({error}); name a folder on a disk with room") from error
    return folder


def write_checkpoint(folder: Path, recipe: Recipe, params: dict, tokenizer, dtype: str) -> None:
    """The directory's files: weights in parts with their index, config.json, generation_config.json, tokenizer and image processor."""
    vocab, stops = tokenizer.get_vocab(), list(stop_ids(tokenizer))
    save_params(folder, params, recipe.model, DTYPES[dtype])
    config = config_to_hf(recipe.model, {key: vocab[token] for key, token in TOKENS.items()})
    ends = {"eos_token_id": stops, "pad_token_id": vocab.get(END_OF_TEXT, stops[0])}
    # What a reader of ours must know, and transformers passes over.
    own = {"pgjax": {"run": recipe.name, "think_tag": recipe.answer.think_tag, "not_a_guard": recipe.not_a_guard}}
    for name, content in (("config.json", config | {"torch_dtype": dtype} | own), ("generation_config.json", ends)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    image_processor(recipe.model.vision).save_pretrained(folder)
