"""From what a reader found in a row to an `Example`, or to the reason why the row is left out."""

from typing import Any

from pgjax.data.schema import EVALUATION_ONLY, Example, Label
from pgjax.data.sources.files import Row, split_of, text_group

WITHHELD = "withheld category"


def example(
    source: str,
    id: str,
    group: str,
    *,
    request: str | None = None,
    response: str | None = None,
    image: bytes | None = None,
    request_label: Label,
    response_label: Label = "absent",
    about: dict[str, Any] | None = None,
    split: str | None = None,
) -> Example:
    """`about` holds what is known of the category where something is unsafe; where all is safe there is none.

    The split is that of the group, unless the source is for evaluation only or `split` says otherwise.
    """
    labels = {request_label, response_label}
    known = (about or {"category": "unknown"}) if "unsafe" in labels else {"category": "unknown" if "unknown" in labels else "none"}
    return Example(
        id=id,
        group=group,
        source=source,
        modality="text" if image is None else "image" if request is None else "text_image",
        request=request,
        response=response,
        images=() if image is None else (image,),
        request_label=request_label,
        response_label=response_label,
        split=split or ("eval" if source in EVALUATION_ONLY else split_of(group)),
        **known,
    )


def text_example(
    source: str,
    row: Row,
    request: str,
    request_label: Label,
    response: str = "",
    response_label: Label = "absent",
    about: dict[str, Any] | None = None,
    split: str | None = None,
) -> Example | str:
    """Left out are rows without a request, and rows with no label: they could neither teach nor measure. A blank response is absent."""
    if not response.strip():
        response, response_label = "", "absent"
    if not request.strip():
        return "empty"
    if {request_label, response_label} <= {"unknown", "absent"}:
        return "label unknown"
    return example(
        source,
        f"{source}-{row.number:05d}",
        text_group(request),
        request=request,
        response=response or None,
        request_label=request_label,
        response_label=response_label,
        about=about,
        split=split,
    )
