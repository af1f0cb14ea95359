"""From what a reader found in a row to an `Example`, or to the reason why the row is left out."""

import hashlib
from typing import Any

from pgjax.data.images import TooLarge, check_image
from pgjax.data.schema import EVALUATION_ONLY, Example, Label
from pgjax.data.sources.files import BAD_PICTURE, EMPTY, LARGE_PICTURE, NO_PICTURE, NotUsed, Unusable, split_of, text_group
from pgjax.data.sources.tables import Row

_SOUND: set[bytes] = set()  # digests of pictures that were decoded: a set is read more than once


def check_picture(data: bytes) -> None:
    """Unusable for what is no picture that can be decoded."""
    if not data:
        raise NotUsed(NO_PICTURE)
    digest = hashlib.sha256(data).digest()[:16]
    if digest not in _SOUND:
        try:
            check_image(data)
        except ValueError as error:
            kind = LARGE_PICTURE if isinstance(error, TooLarge) else BAD_PICTURE
            raise Unusable(kind, f"has a picture that cannot be used: {error}") from None
        _SOUND.add(digest)


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
    """`about` holds what is known of the category where something is unsafe, or no label is known; where all is safe there is none.

    The split is that of the group, unless the source is for evaluation only or `split` says otherwise. Unusable without a request and
    without a picture, and for a picture that cannot be decoded. A blank response is absent.
    """
    if request is not None and not request.strip():
        raise NotUsed(EMPTY)
    if image is not None:
        check_picture(image)
    if not (response or "").strip():
        response, response_label = None, "absent"
    labels = {request_label, response_label} - {"absent"}
    told = "unsafe" in labels or labels == {"unknown"}
    known = about if told and about else {"category": "none" if labels == {"safe"} else "unknown"}
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


def text_example(source: str, row: Row, request: str, request_label: Label, response: str = "", **known: Any) -> Example:
    """Of a row of texts; `known` as for `example`."""
    id = f"{source}-{row.serial:05d}"
    return example(source, id, text_group(request), request=request, response=response, request_label=request_label, **known)
