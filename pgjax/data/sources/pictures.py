"""Sets of pictures, with a request or alone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pgjax.data import typography
from pgjax.data.schema import Example, Label
from pgjax.data.sources.examples import example
from pgjax.data.sources.files import LeftOut, NotUsed, Rows, each, picture, text_group
from pgjax.data.sources.label_map import LabelMap, no_children
from pgjax.data.sources.tables import Row, by_key, read_rows
from pgjax.taxonomy import Taxonomy


def _figstep_rows(root: Path) -> Iterator[Row | LeftOut]:
    columns = ("category_id", "task_id", "category_name", "instruction")
    return read_rows(root, "figstep/question/safebench.csv", columns)


def _figstep_task(row: Row) -> str:
    return f"figstep-{row.text('category_id')}-{row.text('task_id')}"


def figstep(root: Path, taxonomy: Taxonomy) -> Rows:
    """ThuCCSLab/FigStep (MIT), figstep/images/SafeBench/query_ForbidQI_CATEGORY_TASK_6.png: published pictures, all unsafe; a group is
    a task.

    The request is in our words, the same as beside the pictures that we draw. A row without its picture is left out.
    """
    labels = LabelMap("figstep", taxonomy)

    def read(row: Row) -> Iterator[Example]:
        task, about = _figstep_task(row), labels.about([row.text("category_name")])
        image = picture(root / "figstep", f"images/SafeBench/query_ForbidQI_{row.text('category_id')}_{row.text('task_id')}_6.png")
        yield example("figstep", task, task, request=typography.REQUEST, image=image, request_label="unsafe", about=about)

    return each(_figstep_rows(root), read)


def drawn(root: Path, taxonomy: Taxonomy) -> Rows:
    """Source "typography": pictures by our renderer, of FigStep's titles (unsafe) and of ours (safe), so that style tells nothing.

    A drawn FigStep title is in the group of the published picture; ours are grouped by what they are about.
    """
    labels = LabelMap("figstep", taxonomy)

    def draw(id: str, group: str, title: str, label: Label, about: dict[str, Any] | None = None) -> Example:
        known: dict[str, Any] = {"request": typography.REQUEST, "image": typography.render(title), "request_label": label, "about": about}
        return example("typography", f"typography-{id}", group, **known)

    def read(row: Row) -> Iterator[Example]:
        about, task = labels.about([row.text("category_name")]), _figstep_task(row)
        yield draw(task, task, row.text("instruction"), "unsafe", about)

    yield from each(_figstep_rows(root), read)
    for number, (activity, title) in enumerate(typography.benign_titles(), 1):
        yield draw(f"{number:03d}", f"typography-{activity}", title, "safe")


def mossbench(root: Path, taxonomy: Taxonomy) -> Rows:
    """xirui-li/MOSSBench (CC BY-SA 4.0; training on it is prohibited), mossbench/: every row is in the split "eval", a group is a pair.

    data/ looks unsafe and is safe; data_contrast/ is unsafe, about what is unknown. Rows without their picture are left out.
    """
    parts: dict[str, Label] = {"data": "safe", "data_contrast": "unsafe"}

    def read(row: Row) -> Iterator[Example]:
        folder = row.file.split("/")[1]
        entry = row.one("value")
        pid = entry.name("pid")
        # The published name is a PNG; copies re-encoded as JPEG lie beside it.
        image = picture(root / "mossbench" / folder, entry.text("image"), f"images_640jpg/{pid}.jpg")
        known: dict[str, Any] = {"request": entry.text("question"), "image": image, "request_label": parts[folder]}
        yield example("mossbench", f"mossbench-{folder}-{pid}", f"mossbench-{pid}", **known)

    for folder in parts:
        yield from each(read_rows(root, f"mossbench/{folder}/images_information/information.json", keyed=True), read)


def beavertails_v(root: Path, taxonomy: Taxonomy) -> Rows:
    """PKU-Alignment/BeaverTails-V (CC BY-NC 4.0), beavertails_v/**/evaluation*.parquet, a file for each of 20 categories: `question`,
    `image` (an object with `bytes`), `category`, `response`, `is_response_safe` yes or no. Every row is in the split "eval".

    A question has no label of its own. Each was written for a category of harm, so all count as unsafe; so they do in the published
    table, it seems: six of its seven F1 scores of prompts can be had on 1180 unsafe rows, about the number of rows here, and at most
    four of them on any other number from 550 to 1260. A row without its picture is left out.
    """
    return _beavertails_v(root, taxonomy, "beavertails_v", "evaluation", "eval")


def beavertails_v_train(root: Path, taxonomy: Taxonomy) -> Rows:
    """Its training part, beavertails_v/**/train*.parquet; here the label of a question is unknown."""
    return _beavertails_v(root, taxonomy, "beavertails_v_train", "train", None)


def _beavertails_v(root: Path, taxonomy: Taxonomy, source: str, part: str, split: str | None) -> Rows:
    labels = LabelMap("beavertails_v", taxonomy)
    columns = ("question", "image", "category", "response", "is_response_safe")

    def read(row: Row) -> Iterator[Example]:
        category = re.sub(r"\W+", "_", row.text("category").strip().casefold())  # the names are spelt with spaces too
        about = labels.about([category])
        answered = bool(row.text("response").strip())
        yield example(
            source,
            f"{source}-{row.serial:05d}",
            text_group(row.text("question")),
            request=row.text("question"),
            response=row.text("response"),
            image=row.picture("image"),
            request_label="unsafe" if split == "eval" else "unknown",
            response_label=row.label("is_response_safe", "yes", "no") if answered else "absent",
            about=about,
            split=split,
        )

    return each(read_rows(root, f"beavertails_v/**/{part}*.parquet", columns), read)


def llavaguard(root: Path, taxonomy: Taxonomy) -> Rows:
    """AIML-TUDA/LlavaGuard-Dataset, llavaguard/*.json, objects: `id`, `split`, `image` (a path below llavaguard/), `category`
    ("O1: ..." to "O9: ...", or "NA: None applying") and `rating` Safe or Unsafe. A picture alone; every row is in the split "eval".

    Left out: the splits other than test; ids with _v and a number, whose rating is by another policy than the default one; and rows
    without their picture (some must be fetched from SMID).
    """
    return _llavaguard(root, taxonomy, "llavaguard", "test", "eval")


def llavaguard_train(root: Path, taxonomy: Taxonomy) -> Rows:
    """The split train of the same files."""
    return _llavaguard(root, taxonomy, "llavaguard_train", "train", None)


def _llavaguard(root: Path, taxonomy: Taxonomy, source: str, part: str, split: str | None) -> Rows:
    labels = LabelMap("llavaguard", taxonomy)

    def read(row: Row) -> Iterator[Example]:
        id, name = row.name("id"), row.text("image")
        if row.text("split") != part:
            raise NotUsed("other split")
        if re.search(r"_v\d", id):
            raise NotUsed("other policy")
        label, about = row.label("rating", "Safe", "Unsafe"), labels.about([row.text("category").partition(":")[0].strip()])
        known: dict[str, Any] = {"image": picture(root / "llavaguard", name), "request_label": label, "about": about, "split": split}
        yield example(source, f"{source}-{id}", f"llavaguard-{name}", **known)

    return each(read_rows(root, "llavaguard/*.json"), read)


HARMBENCH = "harmbench/behavior_datasets/harmbench_behaviors_multimodal_all.csv"


def harmbench_multimodal(root: Path, taxonomy: Taxonomy) -> Rows:
    """HarmBench's multimodal behaviours, harmbench/behavior_datasets/harmbench_behaviors_multimodal_all.csv: 110, all unsafe.
    `Behavior`, `SemanticCategory`, `ImageFileName` in harmbench/multimodal_behavior_images/, or re-encoded as JPEG in the folder beside it.
    """
    labels, folder = LabelMap("harmbench_multimodal", taxonomy), root / "harmbench"
    columns = ("Behavior", "BehaviorID", "SemanticCategory", "ImageFileName")

    def read(row: Row) -> Iterator[Example]:
        name, about = row.text("ImageFileName"), labels.about([row.text("SemanticCategory")])
        places = f"multimodal_behavior_images/{name}", f"multimodal_behavior_images_768jpg/{name.rpartition('.')[0]}.jpg"
        known: dict[str, Any] = {"request": row.text("Behavior"), "image": picture(folder, *places), "about": about}
        id = f"harmbench_multimodal-{row.text('BehaviorID')}"
        yield example("harmbench_multimodal", id, id, request_label="unsafe", split="eval", **known)

    return each(read_rows(root, HARMBENCH, columns), read)


def msts(root: Path, taxonomy: Taxonomy) -> Rows:
    """paul-rottger/msts-multimodal-safety (CC BY 4.0), its folder data/ as msts/: prompts/english_multimodal.csv, all unsafe by the picture
    beside the text: `prompt_id`, `prompt_text`, `hazard_subcategory`, `unsafe_image_id` of a picture that its script fetched to
    unsafe_images/. A group is a case."""
    labels = LabelMap("msts", taxonomy)

    def read(row: Row) -> Iterator[Example]:
        yield _msts(root, labels, row, "msts", row.text("prompt_id"))

    return each(_msts_prompts(root), read)


def msts_response(root: Path, taxonomy: Taxonomy) -> Rows:
    """Its labelled responses, msts/response_annotations/english_multimodal.csv: `case_id`, `prompt_text`, `response`, and `final_label`,
    "1 - safe" or "2 - unsafe"; the picture and the topic are those of the prompt of the same case and text."""
    labels = LabelMap("msts", taxonomy)
    prompts, broken = by_key(_msts_prompts(root), "case_id", "prompt_text")
    yield from broken

    def read(row: Row) -> Iterator[Example]:
        if not (prompt := prompts.get((row.text("case_id"), row.text("prompt_text")))):
            raise NotUsed("no prompt of this case")
        known: dict[str, Any] = {
            "response": row.text("response"),
            "response_label": row.label("final_label", "1 - safe", "2 - unsafe", "unknown"),
        }
        yield _msts(root, labels, prompt, "msts_response", f"{row.serial:05d}", **known)

    columns = ("case_id", "prompt_text", "response", "final_label")
    yield from each(read_rows(root, "msts/response_annotations/english_multimodal.csv", columns), read)


def _msts_prompts(root: Path) -> Iterator[Row | LeftOut]:
    columns = ("case_id", "prompt_id", "prompt_text", "hazard_subcategory", "hazard_subsubcategory", "unsafe_image_id")
    return read_rows(root, "msts/prompts/english_multimodal.csv", (*columns, "unsafe_image_description"))


def _msts(root: Path, labels: LabelMap, row: Row, source: str, id: str, **known: Any) -> Example:
    about = labels.about([row.text("hazard_subcategory")])
    no_children(row.text("hazard_subsubcategory"), row.text("unsafe_image_description"), row.text("prompt_text"))
    image = picture(root / "msts", *(f"unsafe_images/{row.text('unsafe_image_id')}{ending}" for ending in (".jpg", ".png")))
    known |= {"request": row.text("prompt_text"), "image": image, "request_label": "unsafe", "about": about, "split": "eval"}
    return example(source, f"{source}-{id}", f"msts-{row.text('case_id')}", **known)
