"""The messages of a chat on their way through the gateway: its turns as they are read, and the same messages with other texts in them.

What is looked at must be what the target sees. So the user's messages may have no more than a rewriter and a guard can read, no role and
no key passes that a target might take for another, and of all other messages every text is the guard's to judge.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pgjax.serving.requests import Limits, Refused, Said, within

OTHERS = ("system", "developer", "assistant", "tool", "function")  # whose texts pass as they are
KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "function_call", "annotations"}  # of their messages
UNREAD = {"chat_template", "chat_template_kwargs", "documents"}  # keys of a body that put texts into the target's prompt
MESSAGES, PARTS, CHOICES = 1024, 64, 16  # of a chat, of a message, of an answer
_NAMES = frozenset(  # of keys in messages and answers: the names of all others are texts like any
    "role content name tool_calls tool_call_id refusal function_call function arguments id type index text image_url message delta object "
    "model created system_fingerprint service_tier finish_reason stop_reason logprobs prompt_logprobs reasoning reasoning_content audio "
    "annotations token_ids prompt_token_ids kv_transfer_params error code param usage prompt_tokens completion_tokens total_tokens "
    "prompt_tokens_details completion_tokens_details cached_tokens audio_tokens reasoning_tokens accepted_prediction_tokens "
    "rejected_prediction_tokens".split()
)


class Turn(NamedTuple):
    """A message."""

    n: int  # its place among the messages
    role: str
    text: str  # of others than the user all texts that it has, names and arguments of tools among them
    own: tuple[str, ...] = ()  # URLs of its pictures
    urls: tuple[str, ...] = ()  # of those that a user's is about: its own, else those of the user's last turn that has some

    @property
    def asks(self) -> bool:
        return self.role == "user" and bool(self.text.strip() or self.own)


def read_turns(body: Mapping[str, Any], limits: Limits) -> list[Turn]:
    """Refused for what is no chat, in which the user says nothing, and for what cannot be looked at or is too long."""
    if unread := sorted(UNREAD & body.keys()):
        raise Refused(400, "unsupported_parameter", f"{unread[0]} is read by nobody here; leave it out", unread[0])
    for key in body:
        if not re.fullmatch("[a-z][a-z0-9_]*", key):  # a target that reads Messages as messages would see what nobody looked at
            raise Refused(400, "unsupported_parameter", "the body has a key that is not in small letters, digits and _; leave it out")
    if (choices := body.get("n")) is not None and not (isinstance(choices, int) and 1 <= choices <= CHOICES):
        raise Refused(400, "invalid_value", f"n must be 1 to {CHOICES}", "n")
    messages = body.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= MESSAGES:
        raise Refused(400, "invalid_type", f"messages must be a list of 1 to {MESSAGES} messages", "messages")
    turns: list[Turn] = []
    shown: tuple[str, ...] = ()
    for n, message in enumerate(messages):
        turn = _turn(n, message)
        shown = turn.own or shown
        turns.append(turn._replace(urls=shown) if turn.role == "user" else turn)
    if not any(turn.asks for turn in turns):
        raise Refused(400, "invalid_request", "messages must have one in which the user says something, at least", "messages")
    within(Said("".join(turn.text for turn in turns), urls=tuple(url for turn in turns for url in turn.own)), limits)
    return turns


def _turn(n: int, message: Any) -> Turn:
    match message:
        case {"role": "user", "content": str() | list() as content, **rest}:
            if rest:
                raise _unsupported(n, "a user message has role and content alone")
            parts = _parts(content, n)
            own = tuple(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
            return Turn(n, "user", "\n".join(part["text"] for part in parts if part["type"] == "text"), own)
        case {"role": str() as role, **rest} if role in OTHERS:
            if not message.keys() <= KEYS:
                raise _unsupported(n, f"a message has {', '.join(sorted(KEYS))} alone")
            parts = _parts(rest.pop("content", None) or "", n)
            if any(part["type"] == "image_url" for part in parts):
                raise _unsupported(n, "pictures are looked at in user messages alone")
            return Turn(n, role, "\n".join([*(part["text"] for part in parts), *(text for _, text in strings(rest))]))
    roles = ", ".join(OTHERS)
    raise Refused(400, "invalid_type", f"messages.{n}: a role is one of {roles}, or user with content", f"messages.{n}")


def strings(value: Any, place: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """Every text in a value of JSON and where it stands; names of keys, but for those of messages and answers, in a place that ends in
    None."""
    match value:
        case str():
            yield place, value
        case list():
            for n, part in enumerate(value):
                yield from strings(part, (*place, n))
        case dict():
            for key, part in value.items():
                if key not in _NAMES:
                    yield (*place, key, None), key
                yield from strings(part, (*place, key))


def _parts(content: Any, n: int) -> list[dict]:
    """A message's content as parts, which may be texts and pictures with no key more than those need."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or len(parts) > PARTS:
        raise _unsupported(n, f"content may be text, or a list of at most {PARTS} parts")
    for part in parts:
        match part:
            case {"type": "text", "text": str(), **rest} if not rest:
                pass
            case {"type": "image_url", "image_url": {"url": str(), **how}, **rest} if not rest and how.keys() <= {"detail"}:
                pass
            case _:
                raise _unsupported(n, "content may be text, or parts {type, text} and {type, image_url: {url, detail}}")
    return parts


def _unsupported(n: int, message: str) -> Refused:
    return Refused(400, "unsupported_content", f"messages.{n}: {message}; other content cannot be looked at", f"messages.{n}")


def exchanged(messages: Sequence[dict], prompts: Mapping[int, str], pictures: Mapping[str, str]) -> list[dict]:
    """The messages with these texts, by place, instead of a user's own, and these URLs instead of others. A new text stands where the
    first one stood, behind the pictures where there was none; what is not exchanged is as it was."""

    def content(message: dict, prompt: str | None) -> Any:
        if isinstance(message["content"], str):
            return message["content"] if prompt is None else prompt
        parts = [_shown(part, pictures) for part in message["content"]]
        if prompt is None:
            return parts
        texts = [k for k, part in enumerate(parts) if part["type"] == "text"]
        place, new = texts[0] if texts else len(parts), {"type": "text", "text": prompt}
        return [*(parts[:place]), new, *(part for part in parts[place:] if part["type"] != "text")]

    return [
        message | {"content": content(message, prompts.get(n))} if message["role"] == "user" else message
        for n, message in enumerate(messages)
    ]


def _shown(part: dict, pictures: Mapping[str, str]) -> dict:
    if part["type"] == "text" or part["image_url"]["url"] not in pictures:
        return part
    return part | {"image_url": part["image_url"] | {"url": pictures[part["image_url"]["url"]]}}
