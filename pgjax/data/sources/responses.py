"""Sets of requests with responses. A blank response is absent. Those that are published for testing are in the split "eval" throughout.

Where a set marks rows about child safety, they are left out.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgjax.data.schema import Example, Label
from pgjax.data.sources.examples import example, text_example
from pgjax.data.sources.files import LABEL, NotUsed, Rows, Unusable, each, text_group
from pgjax.data.sources.label_map import LabelMap, no_children
from pgjax.data.sources.tables import Row, by_key, read_rows
from pgjax.data.sources.texts import HARMBENCH, HARMBENCH_COLUMNS, harmbench_request
from pgjax.taxonomy import Taxonomy

_RATED: tuple[str, str, Label] = ("safe", "unsafe", "unknown")
_HARM: tuple[str, str, Label] = ("unharmful", "harmful", "unknown")


def aegis2(root: Path, taxonomy: Taxonomy) -> Rows:
    """nvidia/Aegis-AI-Content-Safety-Dataset-2.0 (CC BY 4.0), aegis2/test.json: objects with `prompt`, `response`,
    `prompt_label`, `response_label` (safe or unsafe) and `violated_categories` (names between commas).

    A response of null is absent. Prompts that the publisher replaced by REDACTED are left out. The categories are those of request and
    response together. Needs Caution and Other tell nothing of the category: with no other name beside them it is unknown.
    """
    return _aegis2(root, taxonomy, "aegis2", "test", "eval")


def aegis2_train(root: Path, taxonomy: Taxonomy) -> Rows:
    """Its training part, aegis2/train.json."""
    return _aegis2(root, taxonomy, "aegis2_train", "train", None)


def aegis2_validation(root: Path, taxonomy: Taxonomy) -> Rows:
    """Its part for choosing among models, aegis2/validation.json."""
    return _aegis2(root, taxonomy, "aegis2_validation", "validation", None)


def _aegis2(root: Path, taxonomy: Taxonomy, source: str, part: str, split: str | None) -> Rows:
    labels = LabelMap("aegis2", taxonomy)

    def read(row: Row) -> Iterator[Example]:
        about = labels.about(name.strip() for name in row.text("violated_categories").split(",") if name.strip())
        if row.text("prompt").strip() == "REDACTED":
            raise NotUsed("redacted")
        known: dict[str, Any] = {"response": row.text("response"), "response_label": row.label("response_label", *_RATED), "about": about}
        yield text_example(source, row, row.text("prompt"), row.label("prompt_label", *_RATED), split=split, **known)

    return each(read_rows(root, f"aegis2/{part}.json"), read)


def wildguard(root: Path, taxonomy: Taxonomy) -> Rows:
    """allenai/wildguardmix (ODC-BY, gated), wildguard/wildguard_test.parquet: `prompt`, `response`, `prompt_harm_label` and
    `response_harm_label` (harmful, unharmful, or nothing where annotators did not agree). About what is unknown.
    """
    return _wildguard(root, taxonomy, "wildguard", "test", (), "eval")


def wildguard_train(root: Path, taxonomy: Taxonomy) -> Rows:
    """Its training part, wildguard/wildguard_train.parquet, where `subcategory` names what a harmful request is about; labelled by a
    model. Where the file lacks it, that is unknown."""
    return _wildguard(root, taxonomy, "wildguard_train", "train", ("subcategory",), None)


def _wildguard(root: Path, taxonomy: Taxonomy, source: str, part: str, topic: tuple[str, ...], split: str | None) -> Rows:
    columns = ("prompt", "response", "prompt_harm_label", "response_harm_label")
    labels = LabelMap("wildguard", taxonomy)

    def read(row: Row) -> Iterator[Example]:
        about = labels.about(row.text(column) for column in topic if row.values.get(column))
        known: dict[str, Any] = {
            "response": row.text("response"),
            "response_label": row.label("response_harm_label", *_HARM),
            "about": about,
        }
        yield text_example(source, row, row.text("prompt"), row.label("prompt_harm_label", *_HARM), split=split, **known)

    return each(read_rows(root, f"wildguard/wildguard_{part}.parquet", columns, topic), read)


def xstest_response(root: Path, taxonomy: Taxonomy) -> Rows:
    """allenai/xstest-response (ODC-BY, gated), xstest_response/response_harmfulness*.parquet (one file): `prompt`, `response`, `label`
    harmful or unharmful, which is the response's.

    The request's label is that of `prompt_type` (prompt_harmful or prompt_safe), unknown where the file lacks it. About what is unknown.
    """

    def read(row: Row) -> Iterator[Example]:
        known = "prompt_type" in row.values
        request = row.label("prompt_type", "prompt_safe", "prompt_harmful", "unknown") if known else "unknown"
        answer: dict[str, Any] = {"response": row.text("response"), "response_label": row.label("label", *_HARM)}
        yield text_example("xstest_response", row, row.text("prompt"), request, split="eval", **answer)

    path = "xstest_response/response_harmfulness*.parquet"
    return each(read_rows(root, path, ("prompt", "response", "label"), ("prompt_type",), one=True), read)


def beavertails(root: Path, taxonomy: Taxonomy) -> Rows:
    """PKU-Alignment/BeaverTails (CC BY-NC 4.0), beavertails/test.jsonl.gz or .xz (one file): `prompt`, `response`, `is_safe` and
    `category`, an object of 14 names with true or false.

    The labels are those of the response in its conversation; the request's own is unknown, and with it the category of rows with a
    safe response. The number of rows in the published table is that of round0/330k.
    """
    return _beavertails(root, taxonomy, "beavertails", "test", "eval")


def beavertails_train(root: Path, taxonomy: Taxonomy) -> Rows:
    """Its training part, beavertails/train.jsonl.gz or .xz (one file)."""
    return _beavertails(root, taxonomy, "beavertails_train", "train", None)


def _beavertails(root: Path, taxonomy: Taxonomy, source: str, part: str, split: str | None) -> Rows:
    labels = LabelMap("beavertails", taxonomy)

    def read(row: Row) -> Iterator[Example]:
        category = row.one("category")
        known: dict[str, Any] = {"response": row.text("response"), "response_label": row.label("is_safe", True, False)}
        about = labels.about(name for name, holds in category.values.items() if holds)
        yield text_example(source, row, row.text("prompt"), "unknown", about=about, split=split, **known)

    return each(read_rows(root, f"beavertails/{part}.jsonl.*", one=True), read)


HARMBENCH_ANSWERS = "harmbench/classifier_val_sets/text_behaviors_val_set.json"


def harmbench_answers(root: Path, taxonomy: Taxonomy) -> Rows:
    """HarmBench's answers with three human votes, harmbench/classifier_val_sets/text_behaviors_val_set.json: an object of lists, by
    BehaviorID, of objects with `test_case` (the request as it was put), `generation`, and `human_0` to `human_2`, 1 for harmful.

    The majority labels the response. Every behaviour is unsafe; what it is about and its group are those of the behaviour in the file
    that `harmbench` reads, unknown and its own where that lacks it.
    """
    labels = LabelMap("harmbench", taxonomy)
    behaviours, broken = by_key(read_rows(root, HARMBENCH, (*HARMBENCH_COLUMNS, "BehaviorID")), "BehaviorID")
    yield from broken

    def answers(row: Row) -> Iterator[Row]:
        for number, answer in enumerate(row.objects("value"), 1):
            yield answer._replace(values=answer.values | {"key": row.text("key"), "answer": number})

    def read(row: Row) -> Iterator[Example]:
        behaviour = behaviours.get(key := row.text("key"))
        votes: list[Any] = [row.values.get(f"human_{n}") for n in range(3)]
        if any(vote not in (0, 1) for vote in votes):
            raise Unusable(LABEL, "has a vote in `human_0` to `human_2` that is neither 1 nor 0")
        yield example(
            "harmbench_answers",
            f"harmbench_answers-{key}-{row.values['answer']}",
            text_group(harmbench_request(behaviour)) if behaviour else f"harmbench-{key}",
            request=row.text("test_case"),
            response=row.text("generation"),
            request_label="unsafe",
            response_label="unsafe" if sum(votes) > 1 else "safe",
            about=labels.about([behaviour.text("SemanticCategory")]) if behaviour else None,
            split="eval",
        )

    rows = read_rows(root, HARMBENCH_ANSWERS, keyed=True)
    yield from each(each(rows, answers), read)


def med_safety_bench(root: Path, taxonomy: Taxonomy) -> Rows:
    """AI4LIFE-GROUP/med-safety-bench (MIT), med_safety_bench/test/*/*.csv, a file for each of nine principles of medical ethics and each
    of two models that wrote the requests: `harmful_medical_request`, unsafe, and `safe_response`. About what is unknown."""
    return _med_safety_bench(root, "med_safety_bench", "test", "eval")


def med_safety_bench_train(root: Path, taxonomy: Taxonomy) -> Rows:
    """Its training part, med_safety_bench/train/*/*.csv."""
    return _med_safety_bench(root, "med_safety_bench_train", "train", None)


def _med_safety_bench(root: Path, source: str, part: str, split: str | None) -> Rows:
    def read(row: Row) -> Iterator[Example]:
        known: dict[str, Any] = {"response": row.text("safe_response"), "response_label": "safe", "split": split}
        yield text_example(source, row, row.text("harmful_medical_request"), "unsafe", **known)

    return each(read_rows(root, f"med_safety_bench/{part}/*/*.csv", ("harmful_medical_request", "safe_response")), read)


def do_not_answer(root: Path, taxonomy: Taxonomy) -> Rows:
    """Libr-AI/do-not-answer (CC BY-NC-SA 4.0), do_not_answer/*.csv (one file): `question`, `types_of_harm`, `specific_harms`; of each
    model NAME that answered, NAME_response and NAME_harmful, 1 or 0.

    Every question is unsafe. A row for each answer; where the file has none, one for the question.
    """
    labels = LabelMap("do_not_answer", taxonomy)

    def read(row: Row) -> Iterator[Example]:
        about = labels.about([row.text("types_of_harm").strip().casefold()])
        no_children(row.text("specific_harms"))
        models = [column.removesuffix("_harmful") for column in row.values if str(column).endswith("_harmful")]
        for model in models:
            label = row.label(f"{model}_harmful", "0", "1", "unknown")
            known: dict[str, Any] = {"response": row.text(f"{model}_response"), "response_label": label, "about": about}
            answered = text_example("do_not_answer", row, row.text("question"), "unsafe", **known)
            yield replace(answered, id=f"{answered.id}-{model}")
        if not models:
            yield text_example("do_not_answer", row, row.text("question"), "unsafe", about=about)

    return each(read_rows(root, "do_not_answer/*.csv", ("question", "types_of_harm", "specific_harms"), one=True), read)
