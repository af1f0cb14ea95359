"""The three stages that make a training row of the rewriter (PAPERS B2), each a template in prompts/ and a typed record.

hindsight: F, what a safe and an unsafe answer tell of the risk. causal: A, the risk report. optimise: x_T', the new prompt. All three see
the request and the picture; a stage answers with its record as one JSON object, which judge.read_record reads.
"""

from pydantic import BaseModel, ConfigDict, Field

from pgjax.data.sources.items import Item
from pgjax.endpoint import system, user
from pgjax.rewriter.record import Report, section, template

STAGES = ("hindsight", "causal", "optimise")


class Feature(BaseModel):
    kind: str = Field(min_length=1)  # of harm
    evidence: str = Field(min_length=1)  # the words or the things in the picture that show it


class Features(BaseModel):
    features: list[Feature]  # empty: the request is harmless


class Rewrite(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True)
    prompt: str = Field(min_length=1)


def hindsight(item: Item) -> list[dict]:
    """Asks for the Features of an item that has both answers."""
    return _messages("hindsight", item, safe_response=item.safe or "", unsafe_response=item.unsafe or "")


def causal(item: Item, features: Features) -> list[dict]:
    """Asks for the record.Report."""
    return _messages("causal", item, features=features.model_dump_json())


def optimise(item: Item, report: Report) -> list[dict]:
    """Asks for the Rewrite."""
    return _messages("optimise", item, report=f"Text: {report.text}\nImage: {report.image}\nTogether: {report.together}")


def _messages(stage: str, item: Item, **sections: str) -> list[dict]:
    texts = {"request": item.example.request or "", **sections}
    return [system(template(stage).strip()), user("\n".join(section(*named) for named in texts.items()), item.example.images)]
