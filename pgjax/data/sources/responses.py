"""Sets of requests with responses, published for testing: every row is in the split "eval". A blank response is absent.

Where a set marks rows about child safety, they are left out.
"""

from pathlib import Path

from pgjax.data.schema import Example, Label
from pgjax.data.sources.examples import WITHHELD, text_example
from pgjax.data.sources.files import Read, Row, find_one, gather, read_json_lines, read_json_rows, read_parquet
from pgjax.data.sources.label_map import LabelMap
from pgjax.taxonomy import Taxonomy

_RATED: tuple[str, str, Label] = ("safe", "unsafe", "unknown")
_HARM: tuple[str, str, Label] = ("unharmful", "harmful", "unknown")


def aegis2(root: Path, taxonomy: Taxonomy) -> Read:
    """nvidia/Aegis-AI-Content-Safety-Dataset-2.0 (CC BY 4.0), aegis2/test.json: objects with `prompt`, `response`,
    `prompt_label`, `response_label` (safe or unsafe) and `violated_categories` (names between commas).

    A response of null is absent. Prompts that the publisher replaced by REDACTED are left out. The categories are those of request and
    response together. Needs Caution and Other tell nothing of the category: with no other name beside them it is unknown.
    """
    labels = LabelMap("aegis2", taxonomy)

    def read(row: Row) -> Example | str:
        given = [name.strip() for name in row.text("violated_categories").split(",") if name.strip()]
        if (about := labels.about(given, row.where)) is None:
            return WITHHELD
        if row.text("prompt").strip() == "REDACTED":
            return "redacted"
        request, response = row.label("prompt_label", *_RATED), row.label("response_label", *_RATED)
        return text_example("aegis2", row, row.text("prompt"), request, row.text("response"), response, about=about, split="eval")

    return gather(map(read, read_json_rows(root / "aegis2" / "test.json")))


def wildguard(root: Path, taxonomy: Taxonomy) -> Read:
    """allenai/wildguardmix (ODC-BY, gated), wildguard/wildguard_test.parquet: `prompt`, `response`, `prompt_harm_label` and
    `response_harm_label` (harmful, unharmful, or nothing where annotators did not agree). About what is unknown.
    """
    columns = ("prompt", "response", "prompt_harm_label", "response_harm_label")

    def read(row: Row) -> Example | str:
        request, response = row.label("prompt_harm_label", *_HARM), row.label("response_harm_label", *_HARM)
        return text_example("wildguard", row, row.text("prompt"), request, row.text("response"), response, split="eval")

    return gather(map(read, read_parquet(root / "wildguard" / "wildguard_test.parquet", columns)))


def xstest_response(root: Path, taxonomy: Taxonomy) -> Read:
    """allenai/xstest-response (ODC-BY, gated), xstest_response/response_harmfulness*.parquet (one file): `prompt`, `response`, `label`
    harmful or unharmful, which is the response's.

    The request's label is that of `prompt_type` (prompt_harmful or prompt_safe), unknown where the file lacks it. About what is unknown.
    """

    def read(row: Row) -> Example | str:
        known = "prompt_type" in row.values
        request = row.label("prompt_type", "prompt_safe", "prompt_harmful", "unknown") if known else "unknown"
        response = row.label("label", *_HARM)
        return text_example("xstest_response", row, row.text("prompt"), request, row.text("response"), response, split="eval")

    path = find_one(root, "xstest_response/response_harmfulness*.parquet")
    return gather(map(read, read_parquet(path, ("prompt", "response", "label"), optional=("prompt_type",))))


def beavertails(root: Path, taxonomy: Taxonomy) -> Read:
    """PKU-Alignment/BeaverTails (CC BY-NC 4.0), beavertails/test.jsonl.gz or .xz (one file): `prompt`, `response`, `is_safe` and
    `category`, an object of 14 names with true or false.

    The labels are those of the response in its conversation; the request's own is unknown, and with it the category of rows with a
    safe response. The number of rows in the published table is that of round0/330k.
    """
    labels = LabelMap("beavertails", taxonomy)

    def read(row: Row) -> Example | str:
        category = row.values.get("category")
        if not isinstance(category, dict):
            raise ValueError(f"{row.where} needs an object in `category`")
        if (about := labels.about([name for name, holds in category.items() if holds], row.where)) is None:
            return WITHHELD
        response = row.label("is_safe", True, False)
        return text_example("beavertails", row, row.text("prompt"), "unknown", row.text("response"), response, about=about, split="eval")

    return gather(map(read, read_json_lines(find_one(root, "beavertails/test.jsonl.*"))))
