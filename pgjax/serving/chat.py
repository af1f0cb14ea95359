"""/v1/chat/completions: the model as it is, without a policy of ours and without the automaton, in OpenAI's shape, whole or streamed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from pgjax.serving.engine import Ask, Told
from pgjax.serving.guard import Guard
from pgjax.serving.requests import Refused

DONE = "data: [DONE]\n\n"
Refusal = Callable[[Exception], Refused]


def finish(guard: Guard, told: Told) -> str:
    """Why the answer ends: the model stopped, or the room for it did."""
    return "stop" if told.tokens and guard.automaton.stop_V[told.tokens[-1]] else "length"


def usage(ask: Ask, answers: Sequence[Told]) -> dict[str, int]:
    prompt, written = int(ask.prompt.length_P[0]), sum(len(told.tokens) for told in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def completion(guard: Guard, head: dict[str, Any], ask: Ask, answers: Sequence[Told]) -> dict:
    choices = [
        {
            "index": n,
            "message": {"role": "assistant", "content": guard.text(told.tokens)},
            "logprobs": None,
            "finish_reason": finish(guard, told),
        }
        for n, told in enumerate(answers)
    ]
    return head | {"object": "chat.completion", "choices": choices, "usage": usage(ask, answers)}


class Ears:
    """Hands the tokens that the engine's thread hears to the event loop; None is the end."""

    def __init__(self) -> None:
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue[list[int] | None]()

    def hear(self, tokens: list[int] | None) -> None:
        with suppress(RuntimeError):  # the loop has ended, and whoever listened with it
            self.loop.call_soon_threadsafe(self.queue.put_nowait, tokens)


async def events(
    guard: Guard, head: dict[str, Any], ask: Ask, future, ears: Ears, with_usage: bool, refused: Refusal
) -> AsyncIterator[str]:
    """Server-sent events: chunks with the text that came, the reason of its end, [DONE]. Leaving early gives the row back."""
    head = head | {"object": "chat.completion.chunk"}
    if with_usage:
        head["usage"] = None

    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event(head | {"choices": [choice]})

    sent = ""
    try:
        yield chunk({"role": "assistant", "content": ""})
        left = lambda: None if ask.deadline is None else max(ask.deadline - time.monotonic(), 0)  # noqa: E731
        while (tokens := await asyncio.wait_for(ears.queue.get(), left())) is not None:
            # All of it each time: what a token says may depend on those before it, and 1000 tokens take a fifth of a millisecond.
            text = guard.text(tokens).rstrip("\ufffd")  # the beginning of a character is none yet
            if len(text) > len(sent) and text.startswith(sent):
                yield chunk({"content": text[len(sent) :]})
                sent = text
        [told] = future.result()
        rest = guard.text(told.tokens)[len(sent) :]
        if rest:
            yield chunk({"content": rest})
        yield chunk({}, finish(guard, told))
        if with_usage:
            yield event(head | {"choices": [], "usage": usage(ask, [told])})
    except Exception as error:
        yield failure(refused(error))
    finally:
        future.cancel()
    yield DONE


def event(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


def failure(error: Refused) -> str:
    """Of a stream that has begun, what stands in place of the rest."""
    return event({"error": {"message": error.message, "type": "server_error", "param": None, "code": error.code}})
