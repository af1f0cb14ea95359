"""Sets of texts: a request, no response. Those that are published for testing are in the split "eval" throughout.

Where a set marks rows about child safety, they are left out.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from pgjax.data.schema import Example, Label
from pgjax.data.sources.examples import example, text_example
from pgjax.data.sources.files import LABEL, LeftOut, Rows, Unusable, each
from pgjax.data.sources.label_map import LabelMap
from pgjax.data.sources.tables import Row, read_rows
from pgjax.taxonomy import Taxonomy


def openai_moderation_strict(root: Path, taxonomy: Taxonomy) -> Rows:
    """openai/moderation-api-release (MIT), openai_moderation/samples.jsonl.gz: `prompt` and the keys of the label map, each 0 or 1.

    A missing key is unknown. Unsafe is any 1; safe is 0 at every key; anything else leaves the request label unknown. Of several
    positives one names the row, the others count as right.
    """
    return _openai_moderation(root, taxonomy, missing="unknown")


def openai_moderation(root: Path, taxonomy: Taxonomy) -> Rows:
    """The same as it is published for testing: a row without any 1 is safe, whatever else is missing. The published averages fit no other
    number of rows than all of them (PAPERS A12). 821 of its safe rows are safe by that convention alone."""
    return _openai_moderation(root, taxonomy, missing="safe")


def _openai_moderation(root: Path, taxonomy: Taxonomy, missing: Label) -> Rows:
    labels = LabelMap("openai_moderation", taxonomy)
    scored = [key for key in labels.order if not labels.withheld(key)]

    def read(row: Row) -> Iterator[Example]:
        request = row.text("prompt")
        if wrong := [key for key in labels.order if row.values.get(key, 0) not in (0, 1)]:
            raise Unusable(LABEL, f"has a label in `{wrong[0]}` that is neither 0 nor 1")
        positive = [key for key in labels.order if row.values.get(key) == 1]
        label: Label = "unsafe" if positive else "safe" if all(row.values.get(key) == 0 for key in scored) else missing
        yield text_example("openai_moderation", row, request, label, about=labels.about(positive))

    return each(read_rows(root, "openai_moderation/samples.jsonl.gz"), read)


def surge_toxicity(root: Path, taxonomy: Taxonomy) -> Rows:
    """surge-ai/toxicity (MIT), surge_toxicity/toxicity_en.csv: `text`, `is_toxic` Toxic or Not Toxic.

    What a toxic text is about is unknown.
    """

    def read(row: Row) -> Iterator[Example]:
        yield text_example("surge_toxicity", row, row.text("text"), row.label("is_toxic", "Not Toxic", "Toxic"))

    return each(read_rows(root, "surge_toxicity/toxicity_en.csv", ("text", "is_toxic")), read)


def harmbench_request(row: Row) -> str:
    """`Behavior` below its `ContextString` where there is one, joined as HarmBench itself joins them."""
    request, context = row.text("Behavior"), row.text("ContextString")
    return f"{context}\n\n---\n\n{request}" if context.strip() and request.strip() else request


HARMBENCH = "harmbench/behavior_datasets/harmbench_behaviors_text_all.csv"
HARMBENCH_COLUMNS = ("Behavior", "SemanticCategory", "ContextString")


def harmbench(root: Path, taxonomy: Taxonomy) -> Rows:
    """centerforaisafety/HarmBench (MIT), harmbench/behavior_datasets/harmbench_behaviors_text_all.csv: 400 behaviours, all unsafe.

    The published table counts all 400, those about copyright and those with a context among them.
    """
    labels = LabelMap("harmbench", taxonomy)

    def read(row: Row) -> Iterator[Example]:
        about = labels.about([row.text("SemanticCategory")])
        yield text_example("harmbench", row, harmbench_request(row), "unsafe", about=about, split="eval")

    return each(read_rows(root, HARMBENCH, HARMBENCH_COLUMNS), read)


def simple_safety_tests(root: Path, taxonomy: Taxonomy) -> Rows:
    """bertiev/SimpleSafetyTests (CC BY 4.0), simple_safety_tests/*.csv (one file): `harm_area`, `prompts_final`; all unsafe.

    The published table has 100 rows; here the 20 of the harm area child safety are left out. Harm areas are compared without case.
    """
    labels = LabelMap("simple_safety_tests", taxonomy)

    def read(row: Row) -> Iterator[Example]:
        about = labels.about([row.text("harm_area").strip().capitalize()])
        yield text_example("simple_safety_tests", row, row.text("prompts_final"), "unsafe", about=about, split="eval")

    return each(read_rows(root, "simple_safety_tests/*.csv", ("harm_area", "prompts_final"), one=True), read)


def toxic_chat(root: Path, taxonomy: Taxonomy) -> Rows:
    """lmsys/toxic-chat (CC BY-NC 4.0), toxic_chat/toxic-chat_annotation_test.csv of toxicchat0124: `user_input`, `toxicity` 0 or 1.

    Only a part was labelled by people (`human_annotation` True); the published table counts all 5083 rows, and so does this reader.
    `toxicity` is about the request: `model_output` has no label and is not read. What a toxic request is about is unknown.
    """
    return _toxic_chat(root, "toxic_chat", "test", "eval")


def toxic_chat_train(root: Path, taxonomy: Taxonomy) -> Rows:
    """Its training part, toxic_chat/toxic-chat_annotation_train.csv."""
    return _toxic_chat(root, "toxic_chat_train", "train", None)


def _toxic_chat(root: Path, source: str, part: str, split: str | None) -> Rows:
    def read(row: Row) -> Iterator[Example]:
        yield text_example(source, row, row.text("user_input"), row.label("toxicity", "0", "1"), split=split)

    return each(read_rows(root, f"toxic_chat/toxic-chat_annotation_{part}.csv", ("user_input", "toxicity")), read)


def xstest(root: Path, taxonomy: Taxonomy) -> Rows:
    """paul-rottger/xstest (CC BY 4.0), xstest/xstest_prompts.csv: `prompt`, `label` safe or unsafe; about what is unknown."""

    def read(row: Row) -> Iterator[Example]:
        yield text_example("xstest", row, row.text("prompt"), row.label("label", "safe", "unsafe"), split="eval")

    return each(read_rows(root, "xstest/xstest_prompts.csv", ("prompt", "label")), read)


def ailuminate_demo(root: Path, taxonomy: Taxonomy) -> Rows:
    """mlcommons/ailuminate (CC BY 4.0), ailuminate_demo/*.csv (one file): `prompt_text`, `hazard`.

    The hazard says what a prompt is about, not whether it is unsafe: many a prompt about advice or elections is not. That is unknown.
    """
    labels = LabelMap("ailuminate_demo", taxonomy)

    def read(row: Row) -> Iterator[Example]:
        yield text_example("ailuminate_demo", row, row.text("prompt_text"), "unknown", about=labels.about([row.text("hazard")]))

    return each(read_rows(root, "ailuminate_demo/*.csv", ("prompt_text", "hazard"), one=True), read)


SPAM = "gpt_oss_safeguard_spam/example_policies/spam/golden_dataset.csv"


def gpt_oss_safeguard_spam(root: Path, taxonomy: Taxonomy) -> Rows:
    """openai/gpt-oss-safeguard (Apache 2.0), its folder as gpt_oss_safeguard_spam/: no header; the first column has a number beside a
    text in the second, or a severity of the policy (SP0, SP2 to SP4) as the heading of the rows below.

    The tenth column is what a model said and not read. SP0 is safe; a spam that deceives is fraud, other spam is outside the taxonomy.
    """
    labels = LabelMap("gpt_oss_safeguard_spam", taxonomy)

    def rows() -> Iterator[Row | LeftOut]:
        severity = ""
        for row in read_rows(root, SPAM, names=("number", "text")):
            if isinstance(row, Row) and re.fullmatch(r"SP\d", heading := (row.values["number"] or "").strip()):
                severity = heading
            elif isinstance(row, LeftOut) or row.values["text"]:
                yield row._replace(values=row.values | {"severity": severity}) if isinstance(row, Row) else row

    def read(row: Row) -> Iterator[Example]:
        severity = row.text("severity")
        about = labels.about([severity])
        yield text_example("gpt_oss_safeguard_spam", row, row.text("text"), "safe" if severity == "SP0" else "unsafe", about=about)

    return each(rows(), read)


def probes(root: Path, taxonomy: Taxonomy) -> Rows:
    """Our own, in this package (`root` is not read): mild requests that are safe and look otherwise, each with a neutral twin.

    The ids are probes-KIND-NUMBER and the same with -twin; the two are a group. evaluation/probes.py says what is read off them.
    """
    pairs = yaml.safe_load((Path(__file__).parent / "probes.yaml").read_text(encoding="utf-8"))
    for kind, of_kind in pairs.items():
        for number, texts in enumerate(of_kind, 1):
            pair = f"probes-{kind}-{number:02d}"
            for ending, text in zip(("", "-twin"), texts, strict=True):
                yield example("probes", pair + ending, pair, request=text, request_label="safe", split="eval")
