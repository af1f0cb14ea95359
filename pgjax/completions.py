"""`pgjax score`: log-probabilities of given completions, token by token; for debugging, perplexity and parity."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jinja2

from pgjax.config import ModelConfig
from pgjax.data.arrays import Prompt, lay_out, prompt_batch
from pgjax.data.images import image_grid, load_image, read_image
from pgjax.data.jsonl import Line
from pgjax.generate.labels import answer_scorer
from pgjax.generate.law import Law
from pgjax.generate.score import answer_rows
from pgjax.train.saved import is_checkpoint, open_checkpoint, open_run
from pgjax.train.setup import Setup

ROLES = ("system", "user", "assistant")
ROWS = 8  # in a batch


@dataclasses.dataclass(frozen=True)
class Given:
    """A conversation as the chat template renders it, ready for the assistant's turn, and what is to be scored as that turn."""

    id: Any
    prompt: Prompt
    length: int  # prompt tokens
    slots: int  # of the pictures' patches
    tokens: list[int]  # of the completion


def open_model(folder: Path, dtype: str, max_pixels: int | None = None) -> tuple[Setup, dict, Any]:
    """Model on all devices, parameters and tokenizer of a Hugging Face checkpoint directory or of a run folder, computing in `dtype`.

    `max_pixels` caps a picture's area beside a checkpoint directory; a run has its own cap.
    """
    if is_checkpoint(folder):
        return open_checkpoint(folder, dtype, max_pixels)[1:]
    return open_run(folder, compute_dtype=dtype)[1:]


def read_row(line: Line, tokenizer, config: ModelConfig) -> Given:
    """A row {messages, completion, id}: messages in chat form, whose parts are {"type": "text", "text"} or {"type": "image", "image"}
    with a path beside the file. ValueError names the file and line of what cannot be scored."""
    messages, paths = line.row.get("messages"), []
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
                paths.append(line.path.parent / part["image"])
    tokens = tokenizer(line.text("completion"), add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ValueError(f"{line.where}: the completion is empty; there is nothing to score")
    try:
        images = [read_image(path) for path in paths]
        grids = [image_grid(load_image(raw).size, config.vision) for raw in images]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ((prompt_T, slots),) = lay_out([text], [grids], tokenizer, config.vision)
    except (ValueError, TypeError, jinja2.TemplateError) as error:  # the last two are how chat templates fail
        raise ValueError(f"{line.where}: the messages cannot be shown: {error}") from error
    highest = max([*prompt_T, *tokens])
    if highest >= config.text.vocab:
        raise ValueError(f"{line.where}: token {highest} is beyond the model's vocabulary of {config.text.vocab}")
    return Given(line.row.get("id", line.number), Prompt(line.number, text, images), len(prompt_T), slots, tokens)


def score_rows(rows: Sequence[Given], setup: Setup, params: dict, tokenizer) -> Iterator[dict]:
    """For each row id, tokens, float32 logprobs (natural logarithm, of the whole vocabulary) and perplexity, in order."""
    config, P = setup.model.config, min(ROWS, len(rows))
    up = lambda sizes, step: -(-max(1, *sizes) // step) * step  # noqa: E731
    # T and R in steps, so that files of like rows share a compiled program.
    T, R = up([row.length for row in rows], 64), up([len(row.tokens) for row in rows], 64)
    I = up([row.slots for row in rows], config.vision.window_patches)  # noqa: E741
    scorer = answer_scorer(setup.model, Law(jnp.zeros(config.text.vocab, bool), None, None, R), setup.mesh)
    for start in range(0, len(rows), P):
        part = list(rows[start : start + P])
        full = part + part[:1] * (P - len(part))
        prompts = prompt_batch([row.prompt for row in full], tokenizer, config.vision, T, I)
        logp_PR = scorer(params, prompts, *answer_rows([[row.tokens] for row in full], R))
        for row, logp_R in zip(part, logp_PR, strict=False):
            logprobs = [float(x) for x in logp_R[: len(row.tokens)]]
            perplexity = math.exp(min(-sum(logprobs) / len(logprobs), 700))  # 700: where exp ends
            yield {"id": row.id, "tokens": row.tokens, "logprobs": logprobs, "perplexity": perplexity}
