"""Sets of pictures with a request."""

import json
from collections import Counter
from pathlib import Path

from pgjax.data import typography
from pgjax.data.schema import EVALUATION_ONLY, Example
from pgjax.data.sources.files import LabelMap, Read, read_bytes, read_csv, read_text, split_of
from pgjax.taxonomy import Taxonomy

FIGSTEP = Path("figstep")
_QUESTIONS = ("category_id", "task_id", "category_name", "instruction")


def _figstep_rows(root: Path, labels: LabelMap) -> list[tuple[dict[str, str], dict]]:
    """(row of question/safebench.csv, what it says of the example)."""
    path = root / FIGSTEP / "question" / "safebench.csv"
    rows = []
    for number, row in enumerate(read_csv(path, _QUESTIONS), 1):
        if row["category_name"] not in labels.order:
            raise ValueError(f"public data: {path}: row {number} has a topic that the label map figstep.yaml lacks")
        rows.append((row, {"request_label": "unsafe"} | labels.category([row["category_name"]])))
    return rows


def _task(row: dict[str, str]) -> str:
    return f"figstep-{row['category_id']}-{row['task_id']}"


def figstep(root: Path, taxonomy: Taxonomy) -> Read:
    """ThuCCSLab/FigStep (MIT), images/SafeBench/query_ForbidQI_CATEGORY_TASK_6.png: published pictures, all unsafe; a group is a task.

    The request is in our words, the same as beside the pictures that we draw. A row without its picture is left out.
    """
    folder = root / FIGSTEP / "images" / "SafeBench"
    examples, left_out = [], Counter[str]()
    for row, known in _figstep_rows(root, LabelMap("figstep", taxonomy)):
        path = folder / f"query_ForbidQI_{row['category_id']}_{row['task_id']}_6.png"
        if path.exists():
            examples.append(_picture("figstep", _task(row), _task(row), typography.REQUEST, read_bytes(path), **known))
        else:
            left_out["no picture"] += 1
    return Read(examples, left_out)


def drawn(root: Path, taxonomy: Taxonomy) -> Read:
    """Source "typography": pictures by our renderer, of FigStep's titles (unsafe) and of ours (safe), so that style tells nothing.

    A drawn FigStep title is in the group of the published picture; ours are grouped by what they are about.
    """
    examples = []
    for row, known in _figstep_rows(root, LabelMap("figstep", taxonomy)):
        image = typography.render(row["instruction"])
        examples.append(_picture("typography", f"typography-{_task(row)}", _task(row), typography.REQUEST, image, **known))
    for number, (activity, title) in enumerate(typography.benign_titles(), 1):
        known = {"request_label": "safe", "category": "none"}
        group = f"typography-{activity}"
        examples.append(_picture("typography", f"typography-{number:03d}", group, typography.REQUEST, typography.render(title), **known))
    return Read(examples, Counter())


def mossbench(root: Path, taxonomy: Taxonomy) -> Read:
    """xirui-li/MOSSBench (CC BY-SA 4.0; training on it is prohibited): every row is in the split "eval", a group is a pair.

    data/ looks unsafe and is safe; data_contrast/ is unsafe, about what is unknown. Rows without their picture are left out.
    """
    examples, left_out = [], Counter[str]()
    for folder, known in (
        ("data", {"request_label": "safe", "category": "none"}),
        ("data_contrast", {"request_label": "unsafe", "category": "unknown"}),
    ):
        path = root / "mossbench" / folder / "images_information" / "information.json"
        try:
            rows = {str(row["pid"]): (str(row["question"]), str(row["image"])) for row in json.loads(read_text(path)).values()}
        except (json.JSONDecodeError, AttributeError, TypeError, KeyError):
            raise ValueError(f"public data: {path} must be an object of rows with pid, question and image") from None
        for pid, (question, image) in rows.items():
            # The published name is a PNG; copies re-encoded as JPEG lie beside it.
            places = (root / "mossbench" / folder / image, root / "mossbench" / folder / "images_640jpg" / f"{pid}.jpg")
            found = [place for place in places if place.is_file()]
            if found:
                examples.append(
                    _picture("mossbench", f"mossbench-{folder}-{pid}", f"mossbench-{pid}", question, read_bytes(found[0]), **known)
                )
            else:
                left_out["no picture"] += 1
    return Read(examples, left_out)


def _picture(source: str, id: str, group: str, request: str, image: bytes, **known) -> Example:
    return Example(
        id=id,
        group=group,
        source=source,
        modality="text_image",
        request=request,
        response=None,
        images=(image,),
        response_label="absent",
        split="eval" if source in EVALUATION_ONLY else split_of(group),
        **known,
    )
