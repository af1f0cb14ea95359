"""A verdict in the shape of OpenAI's /v1/moderations: its 13 keys by omni.yaml, and `proguard/ID` for every id that the policy lists."""

from functools import cache
from pathlib import Path

import yaml

from pgjax.data.schema import Modality
from pgjax.serving.guard import Case
from pgjax.taxonomy import Taxonomy, load_taxonomy

OF_IMAGES = ("self-harm", "self-harm/instructions", "self-harm/intent", "sexual", "violence", "violence/graphic")
OF_TEXT = ("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "sexual/minors")
KEYS = tuple(sorted((*OF_IMAGES, *OF_TEXT)))
ALIASES = ("omni-moderation-latest", "omni-moderation-2024-09-26", "text-moderation-latest", "text-moderation-stable")  # clients' defaults
_INPUTS: dict[Modality, tuple[str, ...]] = {"text": ("text",), "text_image": ("image", "text"), "image": ("image",)}


@cache
def omni() -> dict[str, tuple[str, ...]]:
    """OpenAI's keys of each id of the packaged taxonomy."""
    read = yaml.safe_load(Path(__file__).with_name("omni.yaml").read_text(encoding="utf-8"))
    return {id: tuple(keys) for id, keys in read.items()}


@cache
def packaged() -> Taxonomy:
    return load_taxonomy()


def result(case: Case, verdict: dict) -> dict:
    """One of `results`. Of a policy of the user's own OpenAI's keys are all false: its ids mean something else. `flagged` is the
    verdict's, and may be true where all 13 keys are false."""
    modality, flagged = case.example.modality, verdict["flagged"]
    view = case.policy.view(modality)
    ids = [id for id, _ in view.entries if id in view.answerable]
    mapped = omni() if case.policy.taxonomy == packaged() else {}
    named = verdict["category_id"] if flagged else None
    applied = {key: [kind for kind in _INPUTS[modality] if kind == "text" or key in OF_IMAGES] for key in KEYS}
    scores = {id: score or 0.0 for id, score in verdict["scores"]["categories"].items()}
    of_key = {key: [id for id in ids if key in mapped.get(id, ()) and applied[key]] for key in KEYS}
    own = {f"proguard/{id}": id == named for id in ids}
    ood = bool(flagged and verdict["in_policy"] is False)
    return {
        "flagged": flagged,
        "categories": {key: named in of_key[key] for key in KEYS} | own | {"proguard/ood": ood},
        "category_scores": {key: max((scores.get(id, 0.0) for id in of_key[key]), default=0.0) for key in KEYS}
        | {f"proguard/{id}": scores.get(id, 0.0) for id in ids}
        | {"proguard/ood": verdict["scores"]["outside_policy"] or 0.0},
        "category_applied_input_types": applied | dict.fromkeys((*own, "proguard/ood"), list(_INPUTS[modality])),
        "proguard": verdict,
    }
