"""Rows of `pgjax score`: what one takes is known before anything is scored, and one that cannot be scored is named with its line."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from pgjax.completions import read_row
from pgjax.config import ModelConfig, TextConfig, VisionConfig
from pgjax.data.arrays import prompt_batch
from pgjax.data.jsonl import Line
from pgjax.tokenizer import CHAT_TEMPLATE, train_byte_bpe

CONFIG = ModelConfig(text=TextConfig(vocab=320), vision=VisionConfig(window=56, min_pixels=56 * 56, max_pixels=112 * 112))
TOKENIZER = train_byte_bpe(["A brass vault."], 320)


def line_of(folder, *parts: dict) -> Line:
    return Line(folder / "rows.jsonl", 3, {"messages": [{"role": "user", "content": list(parts)}], "completion": "Yes."})


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(folder, width: int, height: int) -> dict:
    Image.new("RGB", (width, height), "teal").save(folder / f"{width}.png")
    return {"type": "image", "image": f"{width}.png"}


def test_a_row_takes_what_its_arrays_hold(tmp_path):
    row = read_row(line_of(tmp_path, image(tmp_path, 70, 112), text("and"), image(tmp_path, 56, 56)), TOKENIZER, CONFIG)
    batch = prompt_batch([row.prompt], TOKENIZER, CONFIG.vision, row.length, row.slots)
    assert row.slots == 48 and batch.length_P.tolist() == [row.length] and (batch.visual_PT >= 0).sum() == 12
    assert np.unique(batch.image_PI, return_counts=True)[1].tolist() == [32, 16]
    with pytest.raises(ValueError, match=f"{row.length} tokens and 48 slots"):
        prompt_batch([row.prompt], TOKENIZER, CONFIG.vision, row.length - 1, row.slots)


@pytest.mark.parametrize(
    "template, part, says",
    [
        ("{{ messages[0]['role'] }}", (56, 56), "1 pictures and 0 places for them"),
        (CHAT_TEMPLATE, (2010, 10), "aspect ratio"),
        ("{{ raise_exception('one turn is missing') }}", "x", "one turn is missing"),
        ("{{ messages[0]['content'] + 'x' }}", "x", "concatenate"),  # a template for content that is one text
        (None, "x", "chat_template"),
        (CHAT_TEMPLATE, "half a character: \ud800", "cannot be shown"),
    ],
)
def test_prompts_that_cannot_be_made_are_named(template, part, says, tmp_path, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    line = line_of(tmp_path, text(part) if isinstance(part, str) else image(tmp_path, *part))
    with pytest.raises(ValueError, match=says) as error:
        read_row(line, TOKENIZER, CONFIG)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl line 3: ")


def test_tokens_beyond_the_vocabulary_are_named(tmp_path):
    small = dataclasses.replace(CONFIG, text=TextConfig(vocab=300))
    with pytest.raises(ValueError, match="line 3: token 3.* is beyond the model's vocabulary of 300"):
        read_row(line_of(tmp_path, text("A brass vault.")), TOKENIZER, small)
