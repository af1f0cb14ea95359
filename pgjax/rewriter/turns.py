"""The messages of a chat on their way through the gateway: the user's turns, and the same messages with other texts in them.

What is looked at must be what the target sees. So a user message may have no more than a rewriter and a guard can read, and no role passes
that a target might take for the user's.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pgjax.serving.requests import Refused

OTHERS = ("system", "developer", "assistant", "tool", "function")  # whose messages pass as they are


class Turn(NamedTuple):
    """A user message."""

    n: int  # its place among the messages
    text: str
    own: tuple[str, ...]  # URLs of its pictures
    urls: tuple[str, ...]  # of those that it is about: its own, else those of the last turn that has some

    @property
    def says(self) -> bool:
        return bool(self.text.strip() or self.own)


def user_turns(messages: Any) -> list[Turn]:
    """Refused for what is no chat, has no user message, and for content that cannot be looked at."""
    turns: list[Turn] = []
    if not isinstance(messages, list) or not 1 <= len(messages) <= 256:
        raise Refused(400, "invalid_type", "messages must be a list of 1 to 256 messages", "messages")
    for n, message in enumerate(messages):
        match message:
            case {"role": "user", "content": str() | list() as content} if _named(message):
                parts = _parts(content, n)
                own = tuple(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
                text = "\n".join(part["text"] for part in parts if part["type"] == "text")
                turns.append(Turn(n, text, own, own or (turns[-1].urls if turns else ())))
            case {"role": str() as role} if role in OTHERS:
                if any(part["type"] == "image_url" for part in _parts(message.get("content") or "", n)):
                    raise _unsupported(n, "pictures are looked at in user messages alone")
            case _:
                roles = ", ".join(OTHERS)
                raise Refused(
                    400, "invalid_type", f"messages.{n}: a role is one of {roles}, or user with content (and a name) alone", f"messages.{n}"
                )
    if not turns:
        raise Refused(400, "invalid_request", "messages must have one of the user's, at least", "messages")
    return turns


def _named(message: Any) -> bool:
    """Whether a message has nothing else but a name, and no text for one."""
    return message.keys() <= {"role", "content", "name"} and re.fullmatch(r"[\w.-]{1,64}", str(message.get("name", "a"))) is not None


def _parts(content: Any, n: int) -> list[dict]:
    """A message's content as parts, which may be texts and pictures with no key more than those need."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts if isinstance(parts, list) else [None]:
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


def text_of(message: dict) -> str:
    """All text in a message's content."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if part["type"] == "text")
