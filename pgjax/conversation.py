"""Example -> chat messages, per modality, from template files (PAPERS A7); and answers in the format that is asked for.

What stands in a conversation is data. `neutralise` takes from it whatever the model or its tokenizer could read as markup.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from pgjax.data.schema import Example, Label, Modality

PACKAGED = Path(__file__).with_name("prompts")

# --- templates ---------------------------------------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_SYSTEM = {"policy", "think"}
_USER = {"turns", "request", "response"}


@dataclass(frozen=True)
class Prompts:
    """Three system templates, by modality, and the user template; texts with `{placeholders}`."""

    text: str
    text_image: str
    image: str
    user: str


def load_prompts(path: str | Path | None = None) -> Prompts:
    """Read text.txt, text_image.txt, image.txt (placeholders {policy}, {think}) and user.txt ({turns}, {request}, {response}).

    `path` is a folder, by default the packaged one. Files are used as they are, final newline included; a name in braces that is
    no placeholder is an error. One ValueError lists every problem.
    """
    folder = PACKAGED if path is None else Path(path)
    texts: dict[str, str] = {}
    problems: list[str] = []
    for name, wanted in (("text", _SYSTEM), ("text_image", _SYSTEM), ("image", _SYSTEM), ("user", _USER)):
        file = folder / f"{name}.txt"
        try:
            texts[name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{file} cannot be read as UTF-8 text ({getattr(error, 'strerror', None) or 'wrong encoding'})")
            continue
        found = set(_PLACEHOLDER.findall(texts[name]))
        problems += [f"{file} lacks the placeholder {{{p}}}" for p in sorted(wanted - found)]
        problems += [f"{file} has the unknown placeholder {{{p}}}; it may use {_listed(wanted)}" for p in sorted(found - wanted)]
    if problems:
        raise ValueError("prompt templates: " + "; ".join(problems))
    return Prompts(**texts)


def _listed(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))


def _fill(template: str, **values: str) -> str:
    """One pass: a value that looks like a placeholder stays as it is."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


# --- messages ----------------------------------------------------------------------------------------------------------------------

_ROLES = {"user": "User: ", "agent": "Agent:  ", "assistant": "Agent:  "}


def messages(example: Example, policy_text: str, prompts: Prompts, think_tag: str) -> list[dict]:
    """Chat messages in transformers' form: a system text, then a user message with its images before its text.

    A missing request or response is "" (so an image-only prompt is the empty template); earlier turns come above the request.
    ValueError where images and modality contradict each other, or a turn has an unknown role.
    """
    if (example.modality == "text") != (not example.images):
        raise ValueError(f"example {example.id}: modality {example.modality} with {len(example.images)} images")
    if unknown := sorted({role for role, _ in example.turns} - _ROLES.keys()):
        raise ValueError(f"example {example.id}: unknown role {unknown[0]!r} in an earlier turn; use one of {', '.join(_ROLES)}")
    # A policy is trusted no more than a conversation: it may come with a request.
    system = _fill(getattr(prompts, example.modality), policy=neutralise(policy_text), think=think_tag)
    user = _fill(
        prompts.user,
        turns="".join(f"{_ROLES[role]}{neutralise(text)}\n" for role, text in example.turns),
        request=neutralise(example.request or ""),
        response=neutralise(example.response or ""),
    )
    content = [{"type": "image"} for _ in example.images] + [{"type": "text", "text": user}]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def chat_text(messages: list[dict], tokenizer) -> str:
    """A chat (`messages` as for chat templates) as the model reads it, up to its next turn. Special tokens that stand in texts are broken:
    they cannot end a turn."""

    def clean(content: str | list[dict]) -> str | list[dict]:
        if isinstance(content, str):
            return neutralise_special(content, tokenizer)
        return [part | {"text": neutralise_special(part["text"], tokenizer)} if part["type"] == "text" else part for part in content]

    chat = [message | {"content": clean(message["content"])} for message in messages]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def answer_text(request: Label, response: Label, category: str | None, think: str, modality: Modality, think_tag: str) -> str:
    """An answer in the format that the prompts ask for (PAPERS A7). An absent response reads safe (our choice, as in the reward).

    `category` is a shown id or a name of at least one visible character; None exactly where all is safe. ValueError otherwise.
    """
    response = "safe" if response == "absent" else response
    labels = (request,) if modality == "image" else (request, response)
    if not set(labels) <= {"safe", "unsafe"}:
        raise ValueError(f"an answer cannot say {' and '.join(labels)}: labels are safe or unsafe")
    if (category is None) != ("unsafe" not in labels):
        raise ValueError("an answer names a category exactly where the request or the response is unsafe")
    if category is not None and (category.strip() in ("", "None") or len(category.splitlines()) > 1):
        raise ValueError("a category is one line of text, and not None")
    lines = [f"Request:{request}"] + ([] if modality == "image" else [f"Response:{response}"]) + [f"Category:{category}"]
    return "\n".join([f"<{think_tag}>{think}</{think_tag}>", "<answer>", *lines, "</answer>"])


# --- neutralising ------------------------------------------------------------------------------------------------------------------

_BREAK = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # all that Python or a model may take for a line break
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: tokenizers refuse it

# Shown as nothing though not format characters (category Cf): joiners, fillers, variation selectors, the empty Braille cell.
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")

# Tags of the answer format, image and video placeholders, and the special tokens of common tokenizers that have no bars.
_TAGS = (
    r"think(?:ing)?|answer|rewrite|image(?:_soft_token)?|video|audio|s|pad|unk|bos|eos|sep|cls|mask"
    r"|(?:start|end)_of_(?:turn|image)|tool_(?:call|response)"
)
_MARKUP = re.compile(
    r"<(?="
    r"\|"  # chat-template tokens
    rf"|\s*+/?+\s*+(?:{_TAGS})[\s\d]*+/?+\s*+>"
    r"|\s*+/?+\s*+(?:begin|end)(?:[\s_-]++\w|conversation|task|unsafe|output)"  # section markers
    r")",
    re.IGNORECASE,
)
_TURN = re.compile(r"^[^\S\n]*+(?:user|agent|assistant)[^\S\n]*+(:)", re.IGNORECASE | re.MULTILINE)


def neutralise(text: str) -> str:
    """`text` with nothing left in it that could act as markup; readable, and the same again when neutralised twice.

    Broken by one character each: chat-template tokens, section markers, think and answer tags, image and video placeholders (their
    `<` becomes `‹`), and lines that begin like a turn ("Agent:" becomes "Agent -"). Invisible characters and compatibility forms such
    as full-width letters hide nothing: markup is looked for with them removed or folded (NFKC), and elsewhere they stay. All line
    breaks become "\\n"; control characters go, except tab. Look-alikes from other scripts are not folded: no tokenizer takes
    them for markup.
    """
    text = _SURROGATE.sub("\ufffd", _CONTROL.sub("", _BREAK.sub("\n", text)))
    bare, place = _bare(text)
    characters = list(text)
    for match in _MARKUP.finditer(bare):
        characters[place[match.start()]] = "‹"
    for match in _TURN.finditer(bare):
        characters[place[match.start(1)]] = " -"
    return "".join(characters)


def neutralise_special(text: str, tokenizer) -> str:
    """`text` without the tokenizer's special tokens, each broken by its first character: for whoever writes markup of his own."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, "‹" + token.content[1:])
    return text


def _bare(text: str) -> tuple[str, list[int] | range]:
    """`text` folded and without invisible characters, and the place in `text` of each of its characters."""
    if text.isascii():
        return text, range(len(text))
    pairs = [
        (folded, i)
        for i, character in enumerate(text)
        for folded in (character if character.isascii() else unicodedata.normalize("NFKC", character))
        if unicodedata.category(folded) != "Cf" and not _BLANK.match(folded)
    ]
    return "".join(folded for folded, _ in pairs), [i for _, i in pairs]
