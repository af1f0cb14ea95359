"""What clients send: bodies as pydantic models, pictures out of data URLs, conversations. What cannot be taken is `Refused` here, with a
message that says what, where and what to do, and that never repeats a text of the client's at length."""

import base64
import binascii
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pgjax.data.images import FORMATS
from pgjax.data.rows import conversation
from pgjax.data.schema import Example
from pgjax.serving.verdict import printable

MESSAGE = 400  # characters of an error's message
_DATA_URL = re.compile(r"data:[\w.+/-]{0,100}(?:;[\w.=+-]{1,100}){0,4};base64,", re.IGNORECASE)


class Refused(Exception):
    """An answer of this HTTP status, in OpenAI's shape of errors. `retry`: seconds after which to come again."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, retry: int | None = None):
        super().__init__(code)  # what is logged
        self.status, self.code, self.message, self.param, self.retry = status, code, printable(message, MESSAGE), param, retry


@dataclass(frozen=True)
class Limits:
    """What a request may take."""

    body: int = 20 << 20  # bytes
    bodies: int = 256 << 20  # bytes, of all requests under way
    images: int = 4  # of a conversation
    pixels: int = 16 << 20  # of an image, as it is sent
    text: int = 100_000  # characters, of all its texts
    policy: int = 20_000  # characters
    inputs: int = 32  # texts of one call of /v1/moderations
    timeout: float = 60.0  # seconds from the request's arrival to its answer

    def __post_init__(self) -> None:
        if wrong := [name for name, value in vars(self).items() if not value > 0]:
            raise ValueError(f"the limit of {wrong[0]} must be more than 0")
        if self.bodies < self.body:
            raise ValueError(f"--max-bodies must hold one body at least, of --max-body: {self.bodies} bytes are less than {self.body}")

    @property
    def marks(self) -> int:
        """Commas and brackets in a body: as many as its texts may have characters. More of them make many small parts, and each takes some
        60 bytes when it is parsed."""
        return self.inputs * self.text + self.policy


# --- bodies ------------------------------------------------------------------------------------------------------------------------


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")  # clients of OpenAI's send many keys


class Text(Body):
    type: Literal["text"]
    text: str


class URL(Body):
    url: str


class Picture(Body):
    type: Literal["image_url"]
    image_url: URL


Part = Annotated[Text | Picture, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(max_length=64)]
Ids = Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=256)]


class Message(Body):
    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(lambda role: "system" if role == "developer" else role)]
    content: str | Parts

    @property
    def parts(self) -> Sequence[Text | Picture]:
        return [Text(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(part.image_url.url for part in self.parts if isinstance(part, Picture))


Messages = Annotated[list[Message], Field(min_length=1, max_length=256)]


class Options(Body):
    """What routes that judge have in common."""

    model: str | None = None
    policy: str | Annotated[list[Any], Field(max_length=256)] | None = None  # categories of the client's own: YAML, or the list itself
    categories: Ids = []

    def own(self, limits: Limits) -> str | None:
        """The client's policy as text."""
        if self.policy is None:
            return None
        text = self.policy if isinstance(self.policy, str) else json.dumps(self.policy)
        if len(text) > limits.policy:
            raise Refused(
                400, "policy_too_large", f"policy has {len(text)} characters, of {limits.policy}; list fewer categories", "policy"
            )
        return text


class Moderation(Options):
    input: str | Annotated[list[str], Field(max_length=2048)] | Parts


class Judging(Options):
    model_config = ConfigDict(strict=True, extra="forbid")  # a misspelt `response` would never be judged
    messages: Messages | None = None
    prompt: str | None = None
    response: str | None = None
    images: Annotated[list[str], Field(max_length=64)] = []
    mode: Literal["think", "fast"] | None = None
    samples: Annotated[int, Field(ge=1)] | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    scores: bool = True
    timeout: Annotated[float, Field(gt=0)] | None = None


class StreamOptions(Body):
    include_usage: bool = False


# What clients send to /v1/chat/completions beside the keys of `Chat`, from OpenAI's and vLLM's references: keys that name, file or speed up
# a request, and the values of others that say what is done anyway. All else is refused: it might change what is written.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("prediction", "parallel_tool_calls", "request_id", "priority", "cache_salt"),
)
NEUTRAL: dict[str, tuple] = {
    **dict.fromkeys(("logprobs", "echo", "ignore_eos", "continue_final_message", "add_special_tokens", "use_beam_search"), (False,)),
    **dict.fromkeys(("include_stop_str_in_output", "return_token_ids", "return_tokens_as_token_ids"), (False,)),
    **dict.fromkeys(("top_logprobs", "frequency_penalty", "presence_penalty", "min_p", "min_tokens"), (0,)),
    **dict.fromkeys(("top_p", "repetition_penalty", "length_penalty", "best_of"), (1,)),
    **dict.fromkeys(("tools", "functions", "stop", "stop_token_ids", "bad_words", "documents"), ([], "")),
    **dict.fromkeys(("logit_bias", "chat_template_kwargs", "mm_processor_kwargs"), ({},)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt", "include_reasoning"), (True,)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "top_k": (-1, 0),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class Chat(Body):
    model_config = ConfigDict(strict=True, extra="allow")
    model: str
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        for key, value in (self.model_extra or {}).items():
            if value is not None and key not in IGNORED and value not in NEUTRAL.get(key, ()):
                key = printable(key, 40)
                raise Refused(400, "unsupported_parameter", f"{key} is not supported by this server; leave it out", key)
        if self.stream and (self.n or 1) > 1:
            raise Refused(400, "unsupported_parameter", "a stream has one answer; leave out n", "n")


B = TypeVar("B", bound=BaseModel)


def parse(model: type[B], data: bytes | bytearray, limits: Limits) -> B:
    """The body as its model."""
    if sum(map(data.count, b",[{")) > limits.marks:
        raise Refused(400, "invalid_json", f"the body has more than {limits.marks} commas and brackets; send fewer parts")
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise Refused(400, "invalid_json", f"the body is not JSON in UTF-8: {first['msg']}") from None
        where = printable(".".join(str(key)[:40] for key in first["loc"][:6]), 100)
        hint = f"; it may have {', '.join(model.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise Refused(400, "invalid_type", f"{where or 'body'}: {first['msg']}{hint}", where or None) from None


# --- conversations -----------------------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """A conversation as it came: its pictures are URLs still."""

    request: str | None
    response: str | None = None
    urls: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()

    def example(self, images: Sequence[bytes]) -> Example:
        """ValueError where there is nothing to judge."""
        one = conversation(self.request, self.response, images[0] if images else None)
        return replace(one, images=tuple(images), turns=self.turns)


def to_judge(body: Judging, limits: Limits) -> Said:
    """The conversation of a call of /v1/guard."""
    if (body.messages is None) == (body.prompt is None and body.response is None and not body.images):
        raise Refused(400, "invalid_request", "give either messages, or prompt, response and images", "messages")
    said = Said(body.prompt, body.response, tuple(body.images)) if body.messages is None else _last_exchange(body.messages)
    return within(said, limits)


def _last_exchange(messages: Sequence[Message]) -> Said:
    """The last user turn, with its answer where one follows; what came before are earlier turns."""
    roles = [message.role for message in messages]
    if "system" in roles:
        raise Refused(
            400, "unsupported_role", "a system message is not judged, and the policy is a key of its own; leave it out", "messages"
        )
    last = len(messages) - 1 - (roles[-1] == "assistant")
    if last < 0 or roles[last] != "user":
        raise Refused(400, "invalid_request", "messages must end with a user turn, or with a user turn and the answer to it", "messages")
    if any(message.urls for n, message in enumerate(messages) if n != last):
        raise Refused(400, "invalid_request", "images are judged in the last user turn alone; leave out those of other turns", "messages")
    turns = tuple((message.role, message.text) for message in messages[:last])
    response = messages[-1].text if last < len(messages) - 1 else None
    return Said(messages[last].text, response, messages[last].urls, turns)


def to_moderate(body: Moderation, limits: Limits) -> list[Said]:
    """The conversations of a call of /v1/moderations, one for each result."""
    given: Any = body.input  # a list is of texts or of parts
    if isinstance(given, str):
        given = [given]
    if not given or len(given) > limits.inputs:
        raise Refused(400, "too_many_inputs", f"input has {len(given)} entries; give 1 to {limits.inputs}", "input")
    if isinstance(given[0], str):
        return [within(Said(text), limits) for text in given]
    message = Message(role="user", content=given)
    return [within(Said(message.text, urls=message.urls), replace(limits, images=min(limits.images, 1)))]


def to_continue(messages: Sequence[Message], limits: Limits) -> tuple[list[dict], tuple[str, ...]]:
    """Messages in transformers' form, and their pictures' URLs in order."""
    shown = lambda part: {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}  # noqa: E731
    urls = tuple(url for message in messages for url in message.urls)
    within(Said("\n".join(message.text for message in messages), urls=urls), limits)
    content = lambda message: message.content if isinstance(message.content, str) else [shown(part) for part in message.parts]  # noqa: E731
    return [{"role": message.role, "content": content(message)} for message in messages], urls


def within(said: Said, limits: Limits) -> Said:
    if len(said.urls) > limits.images:
        raise Refused(400, "too_many_images", f"Number of images ({len(said.urls)}) exceeds maximum of {limits.images}")
    length = sum(map(len, (said.request or "", said.response or "", *(text for _, text in said.turns))))
    if length > limits.text:
        raise Refused(400, "text_too_long", f"the texts have {length} characters, more than the {limits.text} allowed; shorten them")
    return said


def data_image(url: str) -> bytes:
    """The picture file in a data URL."""
    head = _DATA_URL.match(url)
    if not head:
        kind = printable(url.partition(":")[0], 20) if ":" in url[:20] else "no"
        raise Refused(400, "invalid_image_url", f"an image must be a data URL, data:image/png;base64,...; this has {kind} scheme")
    try:
        return base64.b64decode(url[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise Refused(400, "invalid_image", "the base64 of an image's data URL is broken; send the whole file") from None


def check_size(data: bytes, pixels: int) -> bytes:
    """The same file, unless its head claims more pixels; nothing is decoded. What is wrong with it otherwise, decoding will say."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError):
        return data
    if width * height > pixels:
        raise Refused(400, "invalid_image", f"an image has {width} x {height} pixels, more than the {pixels} allowed; shrink it")
    return data
