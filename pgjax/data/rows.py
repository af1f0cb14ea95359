"""A user's own rows, JSON Lines -> `Example`: unlabelled ones to moderate, labelled ones to train and evaluate on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgjax.data.images import read_image
from pgjax.data.jsonl import Line, read_jsonl
from pgjax.data.schema import Example, Modality
from pgjax.taxonomy import Taxonomy

CONVERSATION = ("id", "request", "response", "image")
LABELLED = (*CONVERSATION, "group", "request_label", "response_label", "category", "name")


def conversation(request: str | None, response: str | None, image: bytes | None, id: str = "input") -> Example:
    """An unlabelled conversation; which modality it is follows from what is there (an empty text is not). ValueError when nothing is."""
    request, response = request or None, response or None
    if request is None and image is None:
        raise ValueError("nothing to moderate: give a request, an image or both (a response alone needs the request that it answers)")
    if request is None and response is not None:
        raise ValueError("a response to an image without a request cannot be judged: give the request too")
    modality: Modality = "text" if image is None else "image" if request is None else "text_image"
    return Example(
        id=id,
        group=id,
        source="input",
        modality=modality,
        request=request,
        response=response,
        images=() if image is None else (image,),
        request_label="unknown",
        response_label="unknown" if response is not None else "absent",
        category="unknown",
        split="input",
    )


def conversation_of(line: Line, keys: tuple[str, ...] = CONVERSATION, picture: Callable[[Path], bytes] = read_image) -> Example:
    """A row with any of the keys request, response, image (a path beside the file, read by `picture`) and id.

    ValueError names the line. An unknown key is an error too: passed over, a misspelt `response` would never be judged.
    """
    if unknown := sorted(set(line.row) - set(keys)):
        raise ValueError(f"{line.where}: unknown key {unknown[0][:40]!r}; a row has {', '.join(keys)}")
    text = {key: line.text(key) if key in line.row else "" for key in ("request", "response", "image")}
    try:
        image = picture(line.path.parent / text["image"]) if text["image"] else None
        return conversation(text["request"], text["response"], image, line.where)
    except ValueError as error:
        raise ValueError(f"{line.where}: {error}") from error


def labelled(line: Line, taxonomy: Taxonomy, split: str, picture: Callable[[Path], bytes] = read_image) -> Example:
    """A row to train or evaluate on: a conversation with `request_label` and `response_label` (safe or unsafe; left out: unknown) and
    `category`: a taxonomy id, "ood" for a risk that the taxonomy lacks (then `name` says which), "none"; left out: unknown, or "none"
    when nothing is unsafe. Rows of one `group` (default: the row alone) must lie in one split.
    """
    example = conversation_of(line, LABELLED, picture)
    given = {key: _word(line, key) for key in ("id", "group", "request_label", "response_label", "category", "name")}
    known: dict[str, Any] = {}
    for key in ("request_label", "response_label"):
        if given[key] not in ("", "safe", "unsafe"):
            raise ValueError(f"{line.where}: {key} {given[key][:40]!r} must be safe or unsafe; leave it out when unknown")
        if given[key] and getattr(example, key) == "absent":
            raise ValueError(f"{line.where}: {key} without a response")
        known[key] = given[key] or getattr(example, key)
    labels, category = set(known.values()), given["category"]
    if not category:
        known["category"] = "none" if labels <= {"safe", "absent"} else "unknown"
    elif category in ("none", "ood"):
        known |= {"category": category, "name": given["name"] or None}
    else:
        try:
            known |= {"category": "node", "node": category, "name": taxonomy.by_id(category).name}
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from error
    if (known["category"] == "none") == ("unsafe" in labels) and known["category"] != "unknown" and "unknown" not in labels:
        raise ValueError(f"{line.where}: category {category or 'none'} does not go with labels {' and '.join(sorted(labels))}")
    id = given["id"] or f"{split}-{line.number}"
    return replace(example, id=id, group=given["group"] or id, source="own", split=split, **known)


def _word(line: Line, key: str) -> str:
    """A text or a number, "" where there is nothing."""
    value = line.row.get(key)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else line.text(key) if key in line.row else ""


def own_rows(root: str | None, taxonomy: Taxonomy) -> list[Example]:
    """`train.jsonl` and `eval.jsonl` of the folder `data.root`. ValueError names what is missing, a wrong line, and a group in both."""
    if not root or not Path(root).is_dir():
        raise ValueError(f"data.name jsonl needs --data.root, a folder with train.jsonl and eval.jsonl; {root or 'nothing'} is none")
    parts = {split: [labelled(line, taxonomy, split) for line in read_jsonl(Path(root) / f"{split}.jsonl")] for split in ("train", "eval")}
    if torn := sorted({e.group for e in parts["train"]} & {e.group for e in parts["eval"]}):
        raise ValueError(f"{root}: group {torn[0]!r} has rows in train.jsonl and in eval.jsonl; keep a group in one of them")
    return parts["train"] + parts["eval"]
