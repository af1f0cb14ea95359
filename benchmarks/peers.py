"""The phases of a GRPO step in transformers and torch, which repeat a prompt for each of its answers: benchmarks/accelerator.py's peers.

Each gives {seconds, torch_rows}: all rows are run in parts of torch_rows, after the first part alone. That is all rows at once or, where
there are logits, ROWS, or the half of it, and so on, that fits. Rows come sorted by length, and a part is as wide as its first.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pgjax.config import TextConfig
from pgjax.models.hf_config import TEXT

CUDA = torch.cuda.is_available()
ROWS = 16  # some 20,000 tokens: more are no faster, and of more the logits pass 2^31 numbers


def device_name() -> str:
    """What torch computes on, as JAX names it."""
    return torch.cuda.get_device_name() if CUDA else "cpu"


def _now() -> float:
    """Seconds, when all that was asked of the device is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


class Adapted(torch.nn.Module):
    """A projection with an adapter beside it."""

    def __init__(self, linear: torch.nn.Linear, rank: int):
        super().__init__()
        self.linear = linear
        self.down = torch.nn.Parameter(linear.weight.new_empty(linear.in_features, rank).normal_(std=linear.in_features**-0.5))
        self.up = torch.nn.Parameter(linear.weight.new_zeros(rank, linear.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.down @ self.up


class Peer:
    """A decoder with random bfloat16 weights, and rows of T prompt tokens and an answer, the longest first: tokens [B, S], lengths [B]."""

    def __init__(self, text: TextConfig, tokens_BS: np.ndarray, length_B: np.ndarray, T: int, lora_rank: int):
        device, (self.B, S), self.T = torch.device("cuda" if CUDA else "cpu"), tokens_BS.shape, T
        config = Qwen2Config(**{key: getattr(text, field) for field, key in TEXT.items()}, attn_implementation="sdpa")
        with device:
            self.model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
        self.longest, self.lora_rank = length_B, lora_rank
        self.tokens_BS = torch.tensor(tokens_BS).to(device)
        self.counts_BR = torch.tensor(np.arange(S - T) < length_B[:, None]).to(device)

    def prefill(self) -> dict:
        """The prompts' caches."""

        @torch.no_grad()
        def run(part: slice):
            self.model(self.tokens_BS[part, : self.T], logits_to_keep=1, use_cache=True)

        return self._measured(run, self.B)

    def decode(self) -> dict:
        """`generate` from its first token on, sampled; without a token that ends answers each part goes on to its longest one's end."""

        def run(part: slice) -> float:
            prompt_BT, prefilled, began = self.tokens_BS[part, : self.T], [], _now()

            def note(tokens: torch.Tensor, _, **__) -> torch.Tensor:
                if not prefilled:
                    prefilled.append(_now() - began)
                return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

            sampled = dict(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=int(self.longest[part.start]), pad_token_id=0)
            self.model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), stopping_criteria=[note], **sampled)
            return prefilled[0]

        return self._measured(run, self.B)

    def forward(self) -> dict:
        """Logprobs of the answers."""

        @torch.no_grad()
        def run(part: slice):
            self._nll(part)

        return self._measured(run, ROWS)

    def backward(self) -> dict:
        """Forward, and gradients of all parameters, or of adapters beside every projection of the layers, under gradient checkpointing."""
        if self.lora_rank:
            self.model.requires_grad_(False)
            for block in list(self.model.model.layers.modules()):
                for name, child in list(block.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(block, name, Adapted(child, self.lora_rank))
        self.model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return self._measured(lambda part: self._nll(part).backward(), ROWS)

    def _nll(self, part: slice) -> torch.Tensor:
        n = int(self.longest[part.start])
        tokens = self.tokens_BS[part, : self.T + n]
        logits = self.model(tokens, logits_to_keep=n + 1, use_cache=False).logits[:, :-1].flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits.float(), tokens[:, self.T :].flatten(), reduction="none")
        return (each.view(-1, n) * self.counts_BR[part, :n]).sum()

    def _measured(self, run: Callable[[slice], float | None], most: int) -> dict:
        """`run` may give seconds that do not count."""

        def seconds(parts: list[slice]) -> float:
            began = _now()
            apart = sum(run(part) or 0.0 for part in parts)
            return _now() - began - apart

        size = 2 * min(most, self.B)
        while size > 1:
            size //= 2
            try:
                parts = [slice(at, at + size) for at in range(0, self.B, size)]
                seconds(parts[:1])
                return {"seconds": seconds(parts), "torch_rows": size}
            except torch.OutOfMemoryError as error:
                note = str(error)
            self.model.zero_grad()
            torch.cuda.empty_cache()
        raise MemoryError(f"one row: {note}")
