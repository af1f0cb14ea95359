"""What the rewriter learns from and is measured on: a request with its picture, and answers to it where the source brings some.

The readers of such sets give `Item`s; rewriting.py chooses among them for the rewriter, and `as_examples` makes them rows for a guard.

Whatever a set publishes as its split, a row's split is that of its picture, or of its text where it has none: no picture file is on both
sides, in one set or in two. A picture that was saved anew is another file. The ids of a set with parts name the published one behind the
set, as in vlguard-test-00001-unsafes, and an evaluation can choose by it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pgjax.data.schema import Example, Label
from pgjax.data.sources import pictures
from pgjax.data.sources.examples import example
from pgjax.data.sources.files import VALUE, LeftOut, NotUsed, Rows, Unusable, each, image_group, picture, split_of
from pgjax.data.sources.label_map import LabelMap
from pgjax.data.sources.tables import Row, read_rows
from pgjax.taxonomy import Taxonomy


class Item(NamedTuple):
    """`example` has the request x_T and at most one picture x_I, of modality text or text_image, and no response; its request_label says
    whether it is benign ("safe"), its category what it is about. Its group is that of its picture, or of its text where it has none."""

    example: Example
    safe: str | None  # a safe answer Y_safe
    unsafe: str | None  # an unsafe one Y_unsafe


Items = Iterator[Item | LeftOut]

# Of VLGuard, by the key that an instruction stands under: what its authors call such rows, and the label.
_ON_SAFE_PICTURE: dict[str, tuple[str, Label]] = {
    "safe_instruction": ("safe_safes", "safe"),
    "unsafe_instruction": ("safe_unsafes", "unsafe"),
}
_ON_UNSAFE_PICTURE: dict[str, tuple[str, Label]] = {"instruction": ("unsafes", "unsafe")}

# Of MM-SafetyBench, by picture kind: what is asked about it.
_ASKED = {"SD": "Rephrased Question(SD)", "SD_TYPO": "Rephrased Question", "TYPO": "Rephrased Question"}


def _item(
    source: str, id: str, request: str, image: bytes, label: Label, about: dict[str, Any] | None, safe: str = "", unsafe: str = ""
) -> Item:
    """A blank answer is none."""
    known = example(source, id, image_group(image), request=request, image=image, request_label=label, about=about)
    return Item(known, safe if safe.strip() else None, unsafe if unsafe.strip() else None)


def vlguard(root: Path, taxonomy: Taxonomy) -> Items:
    """ys-zong/VLGuard (gated, research only), vlguard/train.json and test.json, either alone will do; pictures below vlguard/train/ and
    test/. Objects with `image`, `safe` true or false, `harmful_subcategory` where it is false, and `instr-resp`.

    That is a list: about a safe picture one `safe_instruction` and one `unsafe_instruction`, about another one `instruction`, each with
    a `response`, which is a safe answer throughout. The ids end as the authors call the three: safe_safes, safe_unsafes, unsafes. What
    an unsafe instruction about a safe picture is about is unknown.
    """
    labels = LabelMap("vlguard", taxonomy)

    def instructions(row: Row) -> Iterator[Row]:
        kinds = _ON_SAFE_PICTURE if row.label("safe", True, False) == "safe" else _ON_UNSAFE_PICTURE
        for said in row.objects("instr-resp"):
            if len(keys := kinds.keys() & said.values.keys()) != 1:
                raise Unusable(VALUE, f"needs a list in `instr-resp`, of objects with {' or '.join(kinds)}")
            yield said._replace(values=row.values | said.values | {"key": keys.pop()})

    def read(row: Row) -> Iterator[Item]:
        part = Path(row.file).stem
        is_safe, key = row.label("safe", True, False) == "safe", row.text("key")
        about = {} if is_safe else labels.about([row.text("harmful_subcategory")])
        kind, label = (_ON_SAFE_PICTURE | _ON_UNSAFE_PICTURE)[key]
        answer, image = row.text("response"), picture(root / "vlguard" / part, row.text("image"))
        yield _item("vlguard", f"vlguard-{part}-{row.number:05d}-{kind}", row.text(key), image, label, about, safe=answer)

    for part in ("train", "test"):
        if (root / "vlguard" / f"{part}.json").is_file():
            yield from each(each(read_rows(root, f"vlguard/{part}.json"), instructions), read)


def spa_vl(root: Path, taxonomy: Taxonomy) -> Items:
    """sqrti/SPA-VL (CC BY 4.0), spa_vl/data/train-*.parquet, validation/validation-*.parquet and test/harm-*.parquet, any of them:
    `image` (an object with `bytes`), `question`; `chosen` and `rejected` but for the test; `class3` but for training.

    The preferred answer counts as safe, the other as unsafe. A question has no label of its own; each is asked about a picture found for
    a class of harm, so all count as unsafe. Where there is no class it is unknown, and nothing can be withheld by it: put hash matching
    before the training part. test/help-*, by which helpfulness is measured, says nothing about safety and is not read.
    """
    labels = LabelMap("spa_vl", taxonomy)
    answers = ("chosen", "rejected")
    for part, pattern, columns in (
        ("train", "data/train", answers),
        ("validation", "validation/validation", (*answers, "class3")),
        ("harm", "test/harm", ("class3",)),
    ):

        def read(row: Row, part: str = part, columns: tuple[str, ...] = columns) -> Iterator[Item]:
            topics = [row.text("class3")] if "class3" in columns else []
            if not set(topics) <= set(labels.order):
                raise NotUsed("class not in the label map")
            safe, unsafe = (row.text(column) if column in columns else "" for column in answers)
            id = f"spa_vl-{part}-{row.serial:05d}"
            yield _item("spa_vl", id, row.text("question"), row.picture("image"), "unsafe", labels.about(topics), safe, unsafe)

        if any(root.glob(files := f"spa_vl/{pattern}-*.parquet")):
            yield from each(read_rows(root, files, ("image", "question", *columns)), read)


def vlsbench(root: Path, taxonomy: Taxonomy) -> Items:
    """Foreshhh/vlsbench (Apache 2.0), vlsbench/data.json: objects with `instruction_id`, `instruction`, `image_path` (below vlsbench/) and
    `sub_category`; all unsafe, by the picture beside a harmless text. No answers."""
    labels = LabelMap("vlsbench", taxonomy)

    def read(row: Row) -> Iterator[Item]:
        id, about = f"vlsbench-{row.name('instruction_id')}", labels.about([row.text("sub_category")])
        request, image = row.text("instruction"), picture(root / "vlsbench", row.text("image_path"))
        yield _item("vlsbench", id, request, image, "unsafe", about)

    return each(read_rows(root, "vlsbench/data.json"), read)


def siuo(root: Path, taxonomy: Taxonomy) -> Items:
    """sinwang/SIUO, siuo/siuo_gen.json: objects with `question_id`, `question`, `image` (below siuo/images/), `category` and
    `reference_answer`, a safe answer. All unsafe, though text and picture are safe each alone; a safe answer often helps with a warning."""
    labels = LabelMap("siuo", taxonomy)

    def read(row: Row) -> Iterator[Item]:
        id, about, safe = f"siuo-{row.name('question_id')}", labels.about([row.text("category")]), row.text("reference_answer")
        yield _item("siuo", id, row.text("question"), picture(root / "siuo" / "images", row.text("image")), "unsafe", about, safe)

    return each(read_rows(root, "siuo/siuo_gen.json"), read)


def mm_safetybench(root: Path, taxonomy: Taxonomy) -> Items:
    """isXinLiu/MM-SafetyBench (CC BY-NC 4.0), mm_safetybench/processed_questions/SCENARIO.json, an object of questions by number, each with
    `Rephrased Question` and `Rephrased Question(SD)`; pictures mm_safetybench/imgs/SCENARIO/KIND/NUMBER.jpg. No answers.

    An item for each question and kind of picture: SD (generated; asked by the second text), SD_TYPO (that with the harmful phrase below)
    and TYPO (the phrase alone), as in mm_safetybench-01-SD_TYPO-17. All count as unsafe, but not every safe answer is a refusal: in 08
    and 13 it is one without a political opinion, in 10 to 12 one that says that it is no professional's.
    """
    labels = LabelMap("mm_safetybench", taxonomy)

    def kinds(row: Row) -> Iterator[Row]:
        asked = row.one("value")
        for kind in _ASKED:
            yield asked._replace(values=asked.values | {"kind": kind, "key": row.text("key")})

    def read(row: Row) -> Iterator[Item]:
        scenario, kind, key = Path(row.file).stem, row.text("kind"), row.text("key")
        about, request = labels.about([scenario]), row.text(_ASKED[kind])
        image = picture(root / "mm_safetybench" / "imgs", f"{scenario}/{kind}/{key}.jpg")
        yield _item("mm_safetybench", f"mm_safetybench-{scenario.partition('-')[0]}-{kind}-{key}", request, image, "unsafe", about)

    return each(each(read_rows(root, "mm_safetybench/processed_questions/*.json", keyed=True), kinds), read)


def figstep(root: Path, taxonomy: Taxonomy) -> Items:
    """The published pictures, as sources/pictures.py reads them; the groups are those of the pictures here. No answers."""
    for row in pictures.figstep(root, taxonomy):
        if isinstance(row, LeftOut):
            yield row
        else:
            group = image_group(row.images[0])
            yield Item(replace(row, group=group, split=split_of(group)), None, None)


def as_examples(read: Callable[[Path, Taxonomy], Items], answered: bool = False) -> Callable[[Path, Taxonomy], Rows]:
    """The reader of a set of items as one for a guard. `answered`: with the safe answer as its response, where the set vouches for it."""

    def rows(root: Path, taxonomy: Taxonomy) -> Rows:
        for row in read(root, taxonomy):
            if isinstance(row, LeftOut):
                yield row
            elif answered and row.safe:
                yield replace(row.example, response=row.safe, response_label="safe")
            else:
                yield row.example

    return rows
