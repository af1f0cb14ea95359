"""What `pgjax synthesize` made as lessons: train.jsonl and eval.jsonl of its folder, each row a request, perhaps a picture beside it, a
risk report and the rewritten prompt.
"""

from pathlib import Path

from pydantic import ValidationError

from pgjax.config import DataConfig
from pgjax.data.jsonl import Line, read_jsonl
from pgjax.rewriter.record import Report, Rewriting, answer_of, rewriter_messages
from pgjax.sft.lessons import Lesson


def read_lessons(data: DataConfig) -> tuple[list[Lesson], list[Lesson]]:
    """Lessons to train on and held-out ones. ValueError for other data, and naming file and line for a row that is none or whose group is
    in both."""
    if data.name != "rewriter":
        raise ValueError(f"data.name {data.name} has no answers to learn: `pgjax sft` takes rewriter, `pgjax train` the other data")
    if data.root is None:
        raise ValueError("data.root must be the folder that `pgjax synthesize` made: give --data.root")
    held_out_file = Path(data.root) / "eval.jsonl"
    if held_out_file.is_file() and not held_out_file.stat().st_size:
        raise ValueError(f"{held_out_file} has no rows to measure the loss on; synthesize more rows, or with a larger --held-out")
    lines = {split: read_jsonl(Path(data.root) / f"{split}.jsonl") for split in ("train", "eval")}
    lessons, held_out = ([lesson_of(line) for line in lines[split]] for split in lines)
    seen = {lesson.group for lesson in lessons}
    for line, lesson in zip(lines["eval"], held_out, strict=True):
        if lesson.group in seen:
            raise ValueError(f"{line.where}: train.jsonl has its group {lesson.group!r} too; a group must be in one of them")
    return lessons, held_out


def lesson_of(line: Line) -> Lesson:
    image = line.text("image")
    folder = line.path.parent
    if image and not (folder / image).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{line.where}: the path in 'image' leaves the folder; put the picture below it")
    images = (folder / image,) if image else ()
    try:
        report = Report.model_validate(line.row.get("report"))
    except ValidationError:  # whose message would show the text
        raise ValueError(f"{line.where}: 'report' must be an object with the texts text, image and together, none empty") from None
    try:
        answer = answer_of(Rewriting(report, line.text("rewrite")))
    except ValueError as error:
        raise ValueError(f"{line.where}: {error}") from error
    return Lesson(line.text("id"), line.text("group"), rewriter_messages(line.text("request"), len(images)), images, answer)
