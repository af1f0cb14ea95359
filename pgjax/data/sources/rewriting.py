"""The sets that the rewriter learns from and is measured on, by name, and a user's own rows.

Whatever a set publishes as its split, a row's split is that of its picture, or of its text where it has none: no picture file is on both
sides, in one set or in two. A picture that was saved anew is another file. The ids of a set with parts name the published one behind the
set, as in vlguard-test-00001-unsafes, and an evaluation can choose by it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from pgjax.data.jsonl import read_jsonl
from pgjax.data.rows import labelled
from pgjax.data.schema import Label
from pgjax.data.sources import pictures
from pgjax.data.sources.examples import WITHHELD, example
from pgjax.data.sources.files import (
    Row,
    choose,
    find,
    image_group,
    parquet_rows,
    read_bytes,
    read_json_rows,
    read_text,
    split_of,
    text_group,
)
from pgjax.data.sources.items import Item
from pgjax.data.sources.label_map import LabelMap
from pgjax.data.sources.pictures import NO_PICTURE
from pgjax.taxonomy import Taxonomy

Items = Iterator[Item | str]

ITEM_KEYS = ("id", "request", "image", "request_label", "category", "name", "safe", "unsafe")
NOT_LISTED = "class not in the label map"

# Of VLGuard, by the key that an instruction stands under: what its authors call such rows, and the label.
_ON_SAFE_PICTURE: dict[str, tuple[str, Label]] = {
    "safe_instruction": ("safe_safes", "safe"),
    "unsafe_instruction": ("safe_unsafes", "unsafe"),
}
_ON_UNSAFE_PICTURE: dict[str, tuple[str, Label]] = {"instruction": ("unsafes", "unsafe")}

# Of MM-SafetyBench, by picture kind: what is asked about it.
_ASKED = {"SD": "Rephrased Question(SD)", "SD_TYPO": "Rephrased Question", "TYPO": "Rephrased Question"}


def _item(
    source: str, id: str, request: str, image: bytes | None, label: Label, about: dict[str, Any] | None, safe: str = "", unsafe: str = ""
) -> Item | str:
    """`about` is None where the category is withheld. A blank answer is none."""
    if about is None:
        return WITHHELD
    if not image:
        return NO_PICTURE
    if not request.strip():
        return "empty"
    known = example(source, id, image_group(image), request=request, image=image, request_label=label, about=about)
    return Item(known, safe if safe.strip() else None, unsafe if unsafe.strip() else None)


def _picture(path: Path) -> bytes | None:
    return read_bytes(path) if path.is_file() else None


def vlguard(root: Path, taxonomy: Taxonomy) -> Items:
    """ys-zong/VLGuard (gated, research only), vlguard/train.json and test.json, either alone will do; pictures below vlguard/train/ and
    test/. Objects with `image`, `safe` true or false, `harmful_subcategory` where it is false, and `instr-resp`.

    That is a list: about a safe picture one `safe_instruction` and one `unsafe_instruction`, about another one `instruction`, each with
    a `response`, which is a safe answer throughout. The ids end as the authors call the three: safe_safes, safe_unsafes, unsafes. What
    an unsafe instruction about a safe picture is about is unknown.
    """
    labels = LabelMap("vlguard", taxonomy)
    for part in ("train", "test"):
        path = root / "vlguard" / f"{part}.json"
        for row in read_json_rows(path) if path.is_file() else ():
            is_safe, image = row.label("safe", True, False) == "safe", _picture(path.parent / part / row.text("image"))
            about = {} if is_safe else labels.about([row.text("harmful_subcategory")], row.where)
            kinds, said = _ON_SAFE_PICTURE if is_safe else _ON_UNSAFE_PICTURE, row.values.get("instr-resp")
            if not isinstance(said, list) or not all(isinstance(pair, dict) and len(kinds.keys() & pair.keys()) == 1 for pair in said):
                raise ValueError(f"{row.where} needs a list in `instr-resp`, of objects with {' or '.join(kinds)}")
            for pair in said:
                key = next(key for key in kinds if key in pair)
                kind, label = kinds[key]
                texts = Row(path, row.number, pair)
                id = f"vlguard-{part}-{row.number:05d}-{kind}"
                yield _item("vlguard", id, texts.text(key), image, label, about, safe=texts.text("response"))


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
        number = count(1)
        for path in sorted((root / "spa_vl").glob(f"{pattern}-*.parquet")):
            for row in parquet_rows(path, ("image", "question", *columns)):
                id, image = f"spa_vl-{part}-{next(number):05d}", row.values["image"] or {}
                if not isinstance(image, dict):
                    raise ValueError(f"{row.where} needs an object with `bytes` in `image`")
                topics = [row.text("class3")] if "class3" in columns else []
                if not set(topics) <= set(labels.order):
                    yield NOT_LISTED
                    continue
                safe, unsafe = (row.text(column) if column in columns else "" for column in answers)
                about = labels.about(topics, row.where)
                yield _item("spa_vl", id, row.text("question"), image.get("bytes"), "unsafe", about, safe, unsafe)


def vlsbench(root: Path, taxonomy: Taxonomy) -> Items:
    """Foreshhh/vlsbench (Apache 2.0), vlsbench/data.json: objects with `instruction_id`, `instruction`, `image_path` (below vlsbench/) and
    `sub_category`; all unsafe, by the picture beside a harmless text. No answers."""
    labels = LabelMap("vlsbench", taxonomy)
    folder = root / "vlsbench"
    for row in read_json_rows(folder / "data.json"):
        id, about = f"vlsbench-{row.values.get('instruction_id')}", labels.about([row.text("sub_category")], row.where)
        yield _item("vlsbench", id, row.text("instruction"), _picture(folder / row.text("image_path")), "unsafe", about)


def siuo(root: Path, taxonomy: Taxonomy) -> Items:
    """sinwang/SIUO, siuo/siuo_gen.json: objects with `question_id`, `question`, `image` (below siuo/images/), `category` and
    `reference_answer`, a safe answer. All unsafe, though text and picture are safe each alone; a safe answer often helps with a warning."""
    labels = LabelMap("siuo", taxonomy)
    folder = root / "siuo"
    for row in read_json_rows(folder / "siuo_gen.json"):
        id, about = f"siuo-{row.values.get('question_id')}", labels.about([row.text("category")], row.where)
        image, safe = _picture(folder / "images" / row.text("image")), row.text("reference_answer")
        yield _item("siuo", id, row.text("question"), image, "unsafe", about, safe)


def mm_safetybench(root: Path, taxonomy: Taxonomy) -> Items:
    """isXinLiu/MM-SafetyBench (CC BY-NC 4.0), mm_safetybench/processed_questions/SCENARIO.json, an object of questions by number, each with
    `Rephrased Question` and `Rephrased Question(SD)`; pictures mm_safetybench/imgs/SCENARIO/KIND/NUMBER.jpg. No answers.

    An item for each question and kind of picture: SD (generated; asked by the second text), SD_TYPO (that with the harmful phrase below)
    and TYPO (the phrase alone), as in mm_safetybench-01-SD_TYPO-17. All count as unsafe, but not every safe answer is a refusal: in 08
    and 13 it is one without a political opinion, in 10 to 12 one that says that it is no professional's.
    """
    labels = LabelMap("mm_safetybench", taxonomy)
    folder = root / "mm_safetybench"
    for path in find(folder, "processed_questions/*.json"):
        try:
            rows = [Row(path, number, {**row, "id": id}) for number, (id, row) in enumerate(json.loads(read_text(path)).items(), 1)]
        except (json.JSONDecodeError, AttributeError, TypeError):
            raise ValueError(f"public data: {path} must be an object of questions, each an object") from None
        for row in rows:
            about = labels.about([path.stem], row.where)
            for kind, column in _ASKED.items():
                id = f"mm_safetybench-{path.stem.partition('-')[0]}-{kind}-{row.values['id']}"
                image = _picture(folder / "imgs" / path.stem / kind / f"{row.values['id']}.jpg")
                yield _item("mm_safetybench", id, row.text(column), image, "unsafe", about)


def figstep(root: Path, taxonomy: Taxonomy) -> Items:
    """The published pictures, as sources/pictures.py reads them; the groups are those of the pictures here. No answers."""
    read = pictures.figstep(root, taxonomy)
    for row in read.examples:
        group = image_group(row.images[0])
        yield Item(replace(row, group=group, split=split_of(group)), None, None)
    yield from read.left_out.elements()


class ItemSet(NamedTuple):
    read: Callable[[Path, Taxonomy], Items]
    where: str | None  # its file below the root, or a glob pattern for several
    origin: str  # where it is published


_HF, _GH = "huggingface.co/datasets", "github.com"
_ALL = (
    ItemSet(vlguard, "vlguard/*.json", f"{_HF}/ys-zong/VLGuard"),
    ItemSet(spa_vl, "spa_vl/*/*.parquet", f"{_HF}/sqrti/SPA-VL"),
    ItemSet(vlsbench, "vlsbench/data.json", f"{_HF}/Foreshhh/vlsbench"),
    ItemSet(siuo, "siuo/siuo_gen.json", f"{_HF}/sinwang/SIUO"),
    ItemSet(mm_safetybench, "mm_safetybench/processed_questions/*.json", f"{_GH}/isXinLiu/MM-SafetyBench"),
    ItemSet(figstep, "figstep/question/safebench.csv", f"{_GH}/ThuCCSLab/FigStep"),
)
ITEM_SETS = {entry.read.__name__: entry for entry in _ALL}


def read_items(name: str, root: Path, taxonomy: Taxonomy) -> Items:
    """The rows of a set: its items, and for every one left out the reason. ValueError, at once for an unknown name and for a set that is
    not below `root`, while reading for a wrong row."""
    return choose("set", name, ITEM_SETS, root).read(root, taxonomy)


def jsonl_items(path: Path, taxonomy: Taxonomy) -> Items:
    """A user's own rows, JSON Lines with the keys ITEM_KEYS, of which only `request` must be there: `image` is a path beside the file,
    `request_label` safe or unsafe (left out: unsafe), `category` a taxonomy id, or "ood" with the risk's `name`; `safe` and `unsafe` are
    answers. A row's group is that of its picture, or of its text, like those of the sets above.

    ValueError, naming the line, for a key that is not of these, a wrong value, a missing picture, an id that is there before.
    """
    ids: set[str] = set()
    for line in read_jsonl(path):
        if unknown := sorted(set(line.row) - set(ITEM_KEYS)):
            raise ValueError(f"{line.where}: unknown key {unknown[0][:40]!r}; a row has {', '.join(ITEM_KEYS)}")
        if not line.text("request").strip():
            raise ValueError(f"{line.where}: 'request' is empty; write what the user asks")
        safe, unsafe = (line.text(key) if key in line.row else "" for key in ("safe", "unsafe"))
        row = {key: value for key, value in line.row.items() if key not in ("safe", "unsafe")}
        row |= {"id": row.get("id") or f"{path.stem}-{line.number}", "request_label": row.get("request_label") or "unsafe"}
        known = labelled(line._replace(row=row), taxonomy, "train")
        if known.id in ids:
            raise ValueError(f"{line.where}: the id {known.id[:40]!r} is that of an earlier line; give each its own")
        ids.add(known.id)
        if known.node and taxonomy.by_id(known.node).reserved:
            yield WITHHELD
            continue
        group = image_group(known.images[0]) if known.images else text_group(known.request or "")
        known = replace(known, group=group, split=split_of(group))
        yield Item(known, safe if safe.strip() else None, unsafe if unsafe.strip() else None)
