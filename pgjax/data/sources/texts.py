"""Sets of texts: a request, no response. Those that are published for testing are in the split "eval" throughout.

Where a set marks rows about child safety, they are left out.
"""

from pathlib import Path

import yaml

from pgjax.data.schema import Example, Label
from pgjax.data.sources.examples import WITHHELD, example, text_example
from pgjax.data.sources.files import Read, Row, find_one, gather, read_csv, read_json_lines
from pgjax.data.sources.label_map import LabelMap
from pgjax.taxonomy import Taxonomy


def openai_moderation_strict(root: Path, taxonomy: Taxonomy) -> Read:
    """openai/moderation-api-release (MIT), openai_moderation/samples.jsonl.gz: `prompt` and the keys of the label map, each 0 or 1.

    A missing key is unknown. Unsafe is any 1; safe is 0 at every key; anything else leaves the request label unknown, and such rows
    are left out, since they could not teach. Of several positives one names the row, the others count as right.
    """
    return _openai_moderation(root, taxonomy, missing="unknown")


def openai_moderation(root: Path, taxonomy: Taxonomy) -> Read:
    """The same as it is published for testing: a row without any 1 is safe, whatever else is missing. The published averages fit no other
    number of rows than all of them (PAPERS A12). 821 of its safe rows are safe by that convention alone."""
    return _openai_moderation(root, taxonomy, missing="safe")


def _openai_moderation(root: Path, taxonomy: Taxonomy, missing: Label) -> Read:
    labels = LabelMap("openai_moderation", taxonomy)
    scored = [key for key in labels.order if not labels.withheld(key)]

    def read(row: Row) -> Example | str:
        if not isinstance(row.values.get("prompt"), str) or any(row.values.get(key, 0) not in (0, 1) for key in labels.order):
            raise ValueError(f"{row.where} needs a text `prompt`, and 0 or 1 at {', '.join(labels.order)}")
        positive = [key for key in labels.order if row.values.get(key) == 1]
        if (about := labels.about(positive, row.where)) is None:
            return WITHHELD
        label: Label = "unsafe" if positive else "safe" if all(row.values.get(key) == 0 for key in scored) else missing
        return text_example("openai_moderation", row, row.text("prompt"), label, about=about)

    return gather(map(read, read_json_lines(root / "openai_moderation" / "samples.jsonl.gz")))


def surge_toxicity(root: Path, taxonomy: Taxonomy) -> Read:
    """surge-ai/toxicity (MIT), surge_toxicity/toxicity_en.csv: `text`, `is_toxic` Toxic or Not Toxic.

    What a toxic text is about is unknown.
    """
    rows = read_csv(root / "surge_toxicity" / "toxicity_en.csv", ("text", "is_toxic"))
    return gather(text_example("surge_toxicity", row, row.text("text"), row.label("is_toxic", "Not Toxic", "Toxic")) for row in rows)


def harmbench(root: Path, taxonomy: Taxonomy) -> Read:
    """centerforaisafety/HarmBench (MIT), harmbench/behavior_datasets/harmbench_behaviors_text_all.csv: 400 behaviours, all unsafe.

    `Behavior` is the request, below its `ContextString` where there is one, joined as HarmBench itself joins them. The published table
    counts all 400, those about copyright and those with a context among them.
    """
    labels = LabelMap("harmbench", taxonomy)

    def read(row: Row) -> Example | str:
        request, context = row.text("Behavior"), row.text("ContextString")
        request = f"{context}\n\n---\n\n{request}" if context.strip() and request.strip() else request
        if (about := labels.about([row.text("SemanticCategory")], row.where)) is None:
            return WITHHELD
        return text_example("harmbench", row, request, "unsafe", about=about, split="eval")

    path = root / "harmbench" / "behavior_datasets" / "harmbench_behaviors_text_all.csv"
    return gather(map(read, read_csv(path, ("Behavior", "SemanticCategory", "ContextString"))))


def simple_safety_tests(root: Path, taxonomy: Taxonomy) -> Read:
    """bertiev/SimpleSafetyTests (CC BY 4.0), simple_safety_tests/*.csv (one file): `harm_area`, `prompts_final`; all unsafe.

    The published table has 100 rows; here the 20 of the harm area child safety are left out. Harm areas are compared without case.
    """
    labels = LabelMap("simple_safety_tests", taxonomy)

    def read(row: Row) -> Example | str:
        if (about := labels.about([row.text("harm_area").strip().capitalize()], row.where)) is None:
            return WITHHELD
        return text_example("simple_safety_tests", row, row.text("prompts_final"), "unsafe", about=about, split="eval")

    return gather(map(read, read_csv(find_one(root, "simple_safety_tests/*.csv"), ("harm_area", "prompts_final"))))


def toxic_chat(root: Path, taxonomy: Taxonomy) -> Read:
    """lmsys/toxic-chat (CC BY-NC 4.0), toxic_chat/toxic-chat_annotation_test.csv of toxicchat0124: `user_input`, `toxicity` 0 or 1.

    Only a part was labelled by people (`human_annotation` True); the published table counts all 5083 rows, and so does this reader.
    `toxicity` is about the request: `model_output` has no label and is not read. What a toxic request is about is unknown.
    """
    rows = read_csv(root / "toxic_chat" / "toxic-chat_annotation_test.csv", ("user_input", "toxicity"))
    return gather(text_example("toxic_chat", row, row.text("user_input"), row.label("toxicity", "0", "1"), split="eval") for row in rows)


def xstest(root: Path, taxonomy: Taxonomy) -> Read:
    """paul-rottger/xstest (CC BY 4.0), xstest/xstest_prompts.csv: `prompt`, `label` safe or unsafe; about what is unknown."""
    rows = read_csv(root / "xstest" / "xstest_prompts.csv", ("prompt", "label"))
    return gather(text_example("xstest", row, row.text("prompt"), row.label("label", "safe", "unsafe"), split="eval") for row in rows)


def probes(root: Path, taxonomy: Taxonomy) -> Read:
    """Our own, in this package (`root` is not read): mild requests that are safe and look otherwise, each with a neutral twin.

    The ids are probes-KIND-NUMBER and the same with -twin; the two are a group. evaluation/probes.py says what is read off them.
    """
    pairs = yaml.safe_load((Path(__file__).parent / "probes.yaml").read_text(encoding="utf-8"))
    named = [(f"probes-{kind}-{n:02d}", texts) for kind, of_kind in pairs.items() for n, texts in enumerate(of_kind, 1)]
    rows = [(pair, pair + ending, text) for pair, texts in named for ending, text in zip(("", "-twin"), texts, strict=True)]
    return gather(example("probes", id, pair, request=text, request_label="safe", split="eval") for pair, id, text in rows)
