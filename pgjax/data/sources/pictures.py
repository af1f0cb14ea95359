"""Sets of pictures, with a request or alone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from pgjax.data import typography
from pgjax.data.schema import Example, Label
from pgjax.data.sources.examples import WITHHELD, example
from pgjax.data.sources.files import Read, Row, find, gather, read_bytes, read_csv, read_json_rows, read_parquet, read_text, text_group
from pgjax.data.sources.label_map import LabelMap
from pgjax.taxonomy import Taxonomy

FIGSTEP = Path("figstep")
NO_PICTURE = "no picture"
_QUESTIONS = ("category_id", "task_id", "category_name", "instruction")


def _figstep_rows(root: Path, taxonomy: Taxonomy) -> Iterator[tuple[str, Row, dict | None]]:
    """(task, row of question/safebench.csv, what is known of its category or None where that is withheld)."""
    labels = LabelMap("figstep", taxonomy)
    for row in read_csv(root / FIGSTEP / "question" / "safebench.csv", _QUESTIONS):
        task = f"figstep-{row.values['category_id']}-{row.values['task_id']}"
        yield task, row, labels.about([row.text("category_name")], row.where)


def figstep(root: Path, taxonomy: Taxonomy) -> Read:
    """ThuCCSLab/FigStep (MIT), figstep/images/SafeBench/query_ForbidQI_CATEGORY_TASK_6.png: published pictures, all unsafe; a group is
    a task.

    The request is in our words, the same as beside the pictures that we draw. A row without its picture is left out.
    """

    def read(task: str, row: Row, about: dict | None) -> Example | str:
        name = f"query_ForbidQI_{row.values['category_id']}_{row.values['task_id']}_6.png"
        path = root / FIGSTEP / "images" / "SafeBench" / name
        if about is None:
            return WITHHELD
        if not path.exists():
            return NO_PICTURE
        return example("figstep", task, task, request=typography.REQUEST, image=read_bytes(path), request_label="unsafe", about=about)

    return gather(read(*row) for row in _figstep_rows(root, taxonomy))


def drawn(root: Path, taxonomy: Taxonomy) -> Read:
    """Source "typography": pictures by our renderer, of FigStep's titles (unsafe) and of ours (safe), so that style tells nothing.

    A drawn FigStep title is in the group of the published picture; ours are grouped by what they are about.
    """

    def draw(id: str, group: str, title: str, label: Label, about: dict | None = None) -> Example:
        known: dict = {"request": typography.REQUEST, "image": typography.render(title), "request_label": label, "about": about}
        return example("typography", f"typography-{id}", group, **known)

    def rows() -> Iterator[Example | str]:
        for task, row, about in _figstep_rows(root, taxonomy):
            yield WITHHELD if about is None else draw(task, task, row.text("instruction"), "unsafe", about)
        for number, (activity, title) in enumerate(typography.benign_titles(), 1):
            yield draw(f"{number:03d}", f"typography-{activity}", title, "safe")

    return gather(rows())


def mossbench(root: Path, taxonomy: Taxonomy) -> Read:
    """xirui-li/MOSSBench (CC BY-SA 4.0; training on it is prohibited), mossbench/: every row is in the split "eval", a group is a pair.

    data/ looks unsafe and is safe; data_contrast/ is unsafe, about what is unknown. Rows without their picture are left out.
    """

    def rows(folder: Path, label: Label) -> Iterator[Example | str]:
        path = folder / "images_information" / "information.json"
        try:
            rows = {str(row["pid"]): (str(row["question"]), str(row["image"])) for row in json.loads(read_text(path)).values()}
        except (json.JSONDecodeError, AttributeError, TypeError, KeyError):
            raise ValueError(f"public data: {path} must be an object of rows with pid, question and image") from None
        for pid, (question, image) in rows.items():
            # The published name is a PNG; copies re-encoded as JPEG lie beside it.
            found = [place for place in (folder / image, folder / "images_640jpg" / f"{pid}.jpg") if place.is_file()]
            if not found:
                yield NO_PICTURE
                continue
            id, picture = f"mossbench-{folder.name}-{pid}", read_bytes(found[0])
            yield example("mossbench", id, f"mossbench-{pid}", request=question, image=picture, request_label=label)

    folder = root / "mossbench"
    return gather([*rows(folder / "data", "safe"), *rows(folder / "data_contrast", "unsafe")])


def beavertails_v(root: Path, taxonomy: Taxonomy) -> Read:
    """PKU-Alignment/BeaverTails-V (CC BY-NC 4.0), beavertails_v/**/evaluation*.parquet, a file for each of 20 categories: `question`,
    `image` (an object with `bytes`), `category`, `response`, `is_response_safe` yes or no. Every row is in the split "eval".

    A question has no label of its own. Each was written for a category of harm, so all count as unsafe; so they do in the published
    table, it seems: six of its seven F1 scores of prompts can be had on 1180 unsafe rows, about the number of rows here, and at most
    four of them on any other number from 550 to 1260. A row without its picture is left out.
    """
    labels = LabelMap("beavertails_v", taxonomy)
    columns = ("question", "image", "category", "response", "is_response_safe")

    def read(number: int, row: Row) -> Example | str:
        category = re.sub(r"\W+", "_", row.text("category").strip().casefold())  # the names are spelt with spaces too
        if (about := labels.about([category], row.where)) is None:
            return WITHHELD
        if not (image := (row.values["image"] or {}).get("bytes")):
            return NO_PICTURE
        if not (question := row.text("question")).strip():
            return "empty"
        answered = bool(row.text("response").strip())
        return example(
            "beavertails_v",
            f"beavertails_v-{number:05d}",
            text_group(question),
            request=question,
            response=row.text("response") if answered else None,
            image=image,
            request_label="unsafe",
            response_label=row.label("is_response_safe", "yes", "no") if answered else "absent",
            about=about,
            split="eval",
        )

    rows = [row for path in find(root, "beavertails_v/**/evaluation*.parquet") for row in read_parquet(path, columns)]
    return gather(read(*row) for row in enumerate(rows, 1))


def llavaguard(root: Path, taxonomy: Taxonomy) -> Read:
    """AIML-TUDA/LlavaGuard-Dataset, llavaguard/*.json, objects: `id`, `split`, `image` (a path below llavaguard/), `category`
    ("O1: ..." to "O9: ...", or "NA: None applying") and `rating` Safe or Unsafe. A picture alone; every row is in the split "eval".

    Left out: the splits other than test; ids with _v and a number, whose rating is by another policy than the default one; and rows
    without their picture (some must be fetched from SMID).
    """
    labels = LabelMap("llavaguard", taxonomy)

    def read(row: Row) -> Example | str:
        id, path = str(row.values.get("id")), root / "llavaguard" / row.text("image")
        if row.text("split") != "test":
            return "other split"
        if re.search(r"_v\d", id):
            return "other policy"
        label = row.label("rating", "Safe", "Unsafe")
        if (about := labels.about([row.text("category").partition(":")[0].strip()], row.where)) is None:
            return WITHHELD
        if not path.is_file():
            return NO_PICTURE
        group = "llavaguard-" + row.text("image")
        return example("llavaguard", f"llavaguard-{id}", group, image=read_bytes(path), request_label=label, about=about, split="eval")

    return gather(read(row) for path in find(root, "llavaguard/*.json") for row in read_json_rows(path))
