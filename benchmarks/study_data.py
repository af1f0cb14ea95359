"""The study's data sets, from public texts; each is a folder of data/build.py, split by group.

* texts: openai_moderation (rows that are labelled at every key) and surge_toxicity, which both hold both labels; split as their readers do.
* only_openai_moderation, only_surge_toxicity: the same held-out rows, training rows of one of the two.
* naming: those and harmbench's behaviours, whose categories are known. Rows about NEVER_SEEN are held out throughout. All behaviours
  are unsafe: labels there are no headline. A model that was trained on them must not be scored on harmbench.

And the synonym banks that its runs are rewarded by, bank_VARIANT.npz, without the never-seen categories.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from study_adversary import VARIANTS, bank_variant

from pgjax.bank import build_bank, calibrate, save_bank
from pgjax.data.build import build_dataset
from pgjax.data.schema import Example
from pgjax.data.sources.files import data_root, gather, order_of, split_of
from pgjax.data.sources.texts import harmbench, openai_moderation_strict, surge_toxicity
from pgjax.models.sentence_encoder import load_embedder
from pgjax.taxonomy import load_taxonomy
from pgjax.train.materials import withheld

NEVER_SEEN = ("C4", "C9")
DATASETS = ("texts", "only_openai_moderation", "only_surge_toxicity", "naming")


def examples(name: str, root: Path) -> list[Example]:
    """Rows of a data set in an order that mixes sources. ValueError for a set that is not below `root`."""
    taxonomy = load_taxonomy()
    rows = [row for reader in (openai_moderation_strict, surge_toxicity) for row in gather(reader(root, taxonomy)).examples]
    if name == "naming":
        rows += [replace(row, split=split_of(row.group)) for row in gather(harmbench(root, taxonomy)).examples]
        never = {node.id for node in taxonomy.nodes if node.id in NEVER_SEEN or node.parent in NEVER_SEEN}
        rows = [replace(row, split="eval") if row.node in never else row for row in rows]
    elif name.startswith("only_"):
        rows = [row for row in rows if row.split == "eval" or row.source == name.removeprefix("only_")]
    return sorted(rows, key=lambda row: (order_of(row.group), row.id))


def build(folder: Path, root: str | None, held_out: int | None) -> None:
    """Every data set and bank below `folder`; data sets that are there stay. `root`: the public sets, by default $PGJAX_DATA; `held_out`:
    the most rows that are held out."""
    for name in DATASETS:
        if not (folder / name).exists():
            rows = examples(name, data_root(root))
            rows = [e for e in rows if e.split == "train"] + [e for e in rows if e.split == "eval"][:held_out]
            build_dataset(rows, folder / name)
            counts = Counter((row.split, row.source, row.request_label) for row in rows)
            print(name, *(f"{' '.join(key)} {n}" for key, n in sorted(counts.items())), sep="\n  ")
    taxonomy = load_taxonomy()
    bank, _ = calibrate(build_bank(taxonomy, load_embedder(None), withheld(taxonomy, NEVER_SEEN)), taxonomy)
    for name in VARIANTS:
        save_bank(folder / f"bank_{name}.npz", bank_variant(bank, name))
