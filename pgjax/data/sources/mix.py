"""The public mix: five sets that anyone can fetch, split by group."""

from pathlib import Path

from pgjax.config import DataConfig
from pgjax.data.schema import Example
from pgjax.data.sources.files import data_root, gather, order_of
from pgjax.data.sources.pictures import drawn, figstep, mossbench
from pgjax.data.sources.texts import openai_moderation_strict, surge_toxicity
from pgjax.taxonomy import Taxonomy

READERS = (openai_moderation_strict, surge_toxicity, figstep, drawn, mossbench)


def public_mix(data: DataConfig, taxonomy: Taxonomy) -> tuple[list[Example], dict[str, dict[str, int]]]:
    """Rows of both splits from the sets below `data.root`, and by reader how many rows were left out for which reason.

    A split has at most `data.train_examples` or `data.eval_examples` rows; the order in which groups are taken is a hash of their
    names, so that sources come mixed. Raises ValueError for a missing root or file and for a wrong row.
    """
    root: Path = data_root(data.root)
    examples: list[Example] = []
    left_out: dict[str, dict[str, int]] = {}
    for reader in READERS:
        read = gather(reader(root, taxonomy))
        examples += read.examples
        left_out[reader.__name__] = dict(read.left_out)
    examples.sort(key=lambda example: (order_of(example.group), example.id))
    limits = {"train": data.train_examples, "eval": data.eval_examples}
    return [row for split, limit in limits.items() for row in [e for e in examples if e.split == split][:limit]], left_out
