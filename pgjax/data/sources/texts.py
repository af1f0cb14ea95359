"""Sets of texts: a request, no response."""

from collections import Counter
from pathlib import Path

from pgjax.data.schema import Example
from pgjax.data.sources.files import LabelMap, Read, read_csv, read_json_lines, split_of, text_group
from pgjax.taxonomy import Taxonomy


def openai_moderation(root: Path, taxonomy: Taxonomy) -> Read:
    """openai/moderation-api-release (MIT), samples.jsonl.gz: `prompt` and the keys of the label map, each 0 or 1.

    A missing key is unknown. Unsafe is any 1; safe is 0 at every key; anything else leaves the request label unknown, and such rows
    are left out, since they could neither teach nor measure. Of several positives one names the row, the others count as right.
    """
    path = root / "openai_moderation" / "samples.jsonl.gz"
    labels = LabelMap("openai_moderation", taxonomy)
    scored = [key for key in labels.order if not labels.withheld(key)]
    examples, left_out = [], Counter[str]()
    for number, row in enumerate(read_json_lines(path), 1):
        if not isinstance(row.get("prompt"), str) or any(row.get(key, 0) not in (0, 1) for key in labels.order):
            raise ValueError(f"public data: {path}: row {number} needs a text `prompt`, and 0 or 1 at {', '.join(labels.order)}")
        positive = [key for key in labels.order if row.get(key) == 1]
        if any(labels.withheld(key) for key in positive):
            left_out["withheld category"] += 1
        elif not row["prompt"].strip():
            left_out["empty"] += 1
        elif positive:
            examples.append(_text("openai_moderation", number, row["prompt"], **_unsafe(), **labels.category(positive)))
        elif all(row.get(key) == 0 for key in scored):
            examples.append(_text("openai_moderation", number, row["prompt"], **_safe()))
        else:
            left_out["label unknown"] += 1
    return Read(examples, left_out)


def surge_toxicity(root: Path, taxonomy: Taxonomy) -> Read:
    """surge-ai/toxicity (MIT), toxicity_en.csv: `text`, `is_toxic` Toxic or Not Toxic. What a toxic text is about is unknown."""
    path = root / "surge_toxicity" / "toxicity_en.csv"
    examples, left_out = [], Counter[str]()
    for number, row in enumerate(read_csv(path, ("text", "is_toxic")), 1):
        if row["is_toxic"] not in ("Toxic", "Not Toxic"):
            raise ValueError(f"public data: {path}: row {number} has a label in `is_toxic` that is neither Toxic nor Not Toxic")
        if not row["text"].strip():
            left_out["empty"] += 1
            continue
        known = _safe() if row["is_toxic"] == "Not Toxic" else _unsafe() | {"category": "unknown"}
        examples.append(_text("surge_toxicity", number, row["text"], **known))
    return Read(examples, left_out)


def _unsafe() -> dict:
    return {"request_label": "unsafe"}


def _safe() -> dict:
    return {"request_label": "safe", "category": "none"}


def _text(source: str, number: int, text: str, **known) -> Example:
    group = text_group(text)
    return Example(
        id=f"{source}-{number:05d}",
        group=group,
        source=source,
        modality="text",
        request=text,
        response=None,
        images=(),
        response_label="absent",
        split=split_of(group),
        **known,
    )
