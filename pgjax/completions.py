"""`pgjax score`: log-probabilities of given completions, token by token; for debugging, perplexity and parity."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pgjax.config import MeshConfig, ModelConfig
from pgjax.data.arrays import Prompt, prompt_batch
from pgjax.data.images import image_grid, load_image, read_image, slot_count
from pgjax.data.jsonl import Line
from pgjax.files import read_json
from pgjax.generate.labels import answer_scorer
from pgjax.generate.law import Law
from pgjax.models.hf_config import config_from_hf
from pgjax.parallel.mesh import make_mesh
from pgjax.tokenizer import load_tokenizer
from pgjax.train.run_folder import read_config
from pgjax.train.setup import Setup, make_setup, run_params

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Given:
    """A conversation as the chat template renders it, ready for the assistant's turn, and what is to be scored as that turn."""

    id: Any
    prompt: Prompt
    tokens: list[int]  # of the completion


def open_model(folder: Path, dtype: str) -> tuple[Setup, dict, Any]:
    """Model on all devices, parameters and tokenizer of a Hugging Face checkpoint directory or of a run folder, computing in `dtype`."""
    mesh, file = make_mesh(MeshConfig()), folder / "config.json"
    if file.is_file() and "model_type" in read_json(file):
        setup = make_setup(dataclasses.replace(config_from_hf(folder), compute_dtype=dtype), mesh)
        return setup, setup.load(folder), load_tokenizer(folder)
    recipe = read_config(folder)
    setup = make_setup(dataclasses.replace(recipe.model, compute_dtype=dtype), mesh)
    return setup, run_params(folder, recipe, setup), load_tokenizer(folder / "tokenizer")


def read_row(line: Line, tokenizer, config: ModelConfig) -> Given:
    """A row {messages, completion, id}: messages in chat form, whose parts are {"type": "text", "text"} or {"type": "image", "image"}
    with a path beside the file. ValueError names the line."""
    messages, images = line.row.get("messages"), []
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{line.where}: messages must be a list of {{role, content}}")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{line.where}: a message must have a role of {', '.join(ROLES)}")
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "image") or not isinstance(part.get(kind), str):
                raise ValueError(f"{line.where}: content must be text, or parts of type text or image (a path)")
            if kind == "image":
                images.append(_image(line, part["image"]))
    tokens = tokenizer(line.text("completion"), add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ValueError(f"{line.where}: the completion is empty; there is nothing to score")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    highest = max(tokenizer(text, add_special_tokens=False)["input_ids"] + tokens)
    if highest >= config.text.vocab:
        raise ValueError(f"{line.where}: token {highest} is beyond the model's vocabulary of {config.text.vocab}")
    return Given(line.row.get("id", line.number), Prompt(line.number, text, images), tokens)


def _image(line: Line, path: str) -> bytes:
    try:
        return read_image(line.path.parent / path)
    except ValueError as error:
        raise ValueError(f"{line.where}: {error}") from error


def widths(rows: Sequence[Given], tokenizer, config: ModelConfig) -> tuple[int, int, int]:
    """(T, I, R) that hold every row, T and R in steps, so that files of like rows share a compiled program."""
    vision = config.vision
    T = I = R = 1  # noqa: E741
    for row in rows:
        grids = [image_grid(load_image(raw).size, vision) for raw in row.prompt.images]
        visual = sum(height * width for height, width in grids) // vision.merge**2
        tokens = tokenizer(row.prompt.text, add_special_tokens=False)["input_ids"]
        T, R = max(T, len(tokens) + visual), max(R, len(row.tokens))
        I = max(I, sum(slot_count(grid, vision) for grid in grids))  # noqa: E741
    unit = vision.window_patches
    return -(-T // 64) * 64, -(-I // unit) * unit, -(-R // 64) * 64


def score_rows(rows: Sequence[Given], setup: Setup, params: dict, tokenizer, batch: int = 8) -> Iterator[dict]:
    """For each row id, tokens, float32 logprobs (natural logarithm, of the whole vocabulary) and perplexity, in order."""
    T, I, R = widths(rows, tokenizer, setup.model.config)  # noqa: E741
    law = Law(jnp.zeros(setup.model.config.text.vocab, bool), None, jnp.ones((1, 1), bool), R)
    scorer, P = answer_scorer(setup.model, law, setup.mesh), min(batch, len(rows))
    for start in range(0, len(rows), P):
        part = list(rows[start : start + P])
        full = part + part[:1] * (P - len(part))
        tokens_PGR, length_PG = np.zeros((P, 1, R), np.int32), np.array([[len(row.tokens)] for row in full], np.int32)
        for p, row in enumerate(full):
            tokens_PGR[p, 0, : len(row.tokens)] = row.tokens
        prompts = prompt_batch([row.prompt for row in full], tokenizer, setup.model.config.vision, T, I)
        logp_PR = scorer(params, prompts, tokens_PGR, length_PG)
        for row, logp_R in zip(part, logp_PR, strict=False):
            logprobs = [float(x) for x in logp_R[: len(row.tokens)]]
            perplexity = math.exp(min(-sum(logprobs) / len(logprobs), 700))  # 700: where exp ends
            yield {"id": row.id, "tokens": row.tokens, "logprobs": logprobs, "perplexity": perplexity}
