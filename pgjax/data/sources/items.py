"""What the rewriter learns from and is measured on: a request with its picture, and answers to it where the source brings some.

Pictures are many and an item holds its bytes, so that readers (sources/rewriting.py) are iterators of `Item | str`: the items one by
one, and for every row that is left out the reason. Who consumes one keeps what it wants and counts the reasons as they come by.
"""

from typing import NamedTuple

from pgjax.data.schema import Example


class Item(NamedTuple):
    """`example` has the request x_T and at most one picture x_I, of modality text or text_image, and no response; its request_label says
    whether it is benign ("safe"), its category what it is about. Its group is that of its picture, or of its text where it has none."""

    example: Example
    safe: str | None  # a safe answer Y_safe
    unsafe: str | None  # an unsafe one Y_unsafe
