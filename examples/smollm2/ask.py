"""Greedy text from a converted checkpoint, through the programs that train and serve a guard: encode, prefill, decode.

python ask.py DIR "What is the capital of France?" [TOKENS]
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pgjax import automaton as answers
from pgjax.config import MeshConfig
from pgjax.data.arrays import Prompt, prompt_batch
from pgjax.data.schema import TEXT
from pgjax.generate.decode import decode, encode, prefill
from pgjax.generate.law import Law
from pgjax.models.hf_config import config_from_hf
from pgjax.parallel.mesh import make_mesh
from pgjax.tokenizer import load_tokenizer, never_sampled
from pgjax.train.materials import cache_dir
from pgjax.train.setup import Setup, make_setup


def load(path: Path) -> tuple[Setup, dict, object]:
    """Setup in float32 on one device, parameters and tokenizer of a checkpoint directory."""
    config = dataclasses.replace(config_from_hf(path), compute_dtype="float32", remat="none")
    setup = make_setup(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    return setup, setup.load(path), load_tokenizer(path)


def greedy(setup: Setup, params: dict, tokenizer, texts: Sequence[str], limit: int) -> list[list[int]]:
    """The likeliest next tokens after each text, up to the stop token inclusive or `limit` tokens."""
    model, vocab = setup.model, setup.model.config.text.vocab
    automaton = answers.build(
        tokenizer, ("C1",), vocab=vocab, cache_dir=cache_dir()
    )  # decode follows it; unconstrained, it forbids nothing
    law = Law(jnp.asarray(never_sampled(tokenizer, vocab)), automaton, None, limit)

    @jax.jit
    def answer(params, batch):
        start = prefill(model, params, batch, encode(model, params, batch))
        modality_P = jnp.full(len(batch.length_P), TEXT)
        return decode(model, params, batch, modality_P, start, law, jax.random.key(0), jnp.int32(0), group=1, greedy=True)[0]

    T = max(len(tokenizer(text)["input_ids"]) for text in texts)
    vision = model.config.vision
    batch = prompt_batch([Prompt(n, text, ()) for n, text in enumerate(texts)], tokenizer, vision, T, vision.window_patches)
    rollout = jax.tree.map(np.asarray, answer(params, batch))
    return [tokens[:length].tolist() for tokens, length in zip(rollout.tokens_PGR[:, 0], rollout.length_PG[:, 0], strict=True)]


def ask(path: Path, question: str, limit: int = 64) -> str:
    """The answer to one user turn."""
    setup, params, tokenizer = load(path)
    turn = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    (answer,) = greedy(setup, params, tokenizer, [text], limit)
    return tokenizer.decode(answer, skip_special_tokens=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit('usage: python ask.py DIR "QUESTION" [TOKENS]')
    try:
        print(ask(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])))
    except ValueError as error:
        sys.exit(f"ask: {error}")
