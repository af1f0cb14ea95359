"""Foreign labels -> what is known of an example's category, from the data files labels/NAME.yaml."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pgjax.data.sources.files import LABEL, WITHHELD, NotUsed, Unusable
from pgjax.taxonomy import Taxonomy, load_taxonomy

OUTSIDE = Path(__file__).with_name("outside.yaml")
CHILDREN = re.compile(r"\b(child|minor|teen|pa?edo|kids?\b|school)", re.IGNORECASE)


def no_children(*notes: str) -> None:
    """NotUsed where notes on a row name children: a set without a class for child safety may still hold such rows."""
    if any(CHILDREN.search(note) for note in notes):
        raise NotUsed(WITHHELD)


def outside() -> Taxonomy:
    """Risks that public sets mark and the packaged taxonomy lacks, with synonyms to score their names by. Its ids mean nothing."""
    return load_taxonomy(OUTSIDE)


class LabelMap:
    """The map of one set; `order` is the file's: of several labels the topmost names the row. What a label may stand for:

    * a list of taxonomy ids: the first is the category, the others count as right too; C8* is all subcategories of C8;
    * `{ood: NAME}`: a risk that the taxonomy lacks, NAME as in outside.yaml; `also` lists ids that count as right beside it;
    * `unknown`: it tells nothing of the category;
    * `withheld`: such rows are not read.
    """

    def __init__(self, name: str, taxonomy: Taxonomy):
        path = Path(__file__).parent / "labels" / f"{name}.yaml"
        self._path, self._taxonomy = path, taxonomy
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.order = list(entries)
        self._withheld = {label for label, entry in entries.items() if entry == "withheld"}
        self._ood = {label: entry["ood"] for label, entry in entries.items() if isinstance(entry, dict)}
        self._also: dict[str, list[str]] = {}
        self._ids: dict[str, list[str]] = {}
        try:
            for label, entry in entries.items():
                if isinstance(entry, list):
                    self._ids[label] = self._expand(entry)
                elif isinstance(entry, dict):
                    self._also[label] = self._expand(entry.get("also", []))
        except ValueError as error:
            raise ValueError(f"label map {path.name} is made for the packaged taxonomy: {error}") from None

    def _expand(self, ids: list[str]) -> list[str]:
        """Ids with C8* replaced by its subcategories; none of them reserved."""
        nodes = [
            node
            for id in ids
            for node in (self._taxonomy.children(id.rstrip("*")) if id.endswith("*") else (self._taxonomy.by_id(id),))
            if not node.reserved
        ]
        return list(dict.fromkeys(node.id for node in nodes))

    def withheld(self, label: str) -> bool:
        return label in self._withheld

    def about(self, labels: Iterable[str]) -> dict[str, Any]:
        """As `category`. Unusable for a label that the map lacks, and where one is withheld."""
        labels = list(labels)
        if not set(labels) <= set(self.order):
            raise Unusable(LABEL, f"has a topic that the label map {self._path.name} lacks; add it there")
        if any(self.withheld(label) for label in labels):
            raise NotUsed(WITHHELD)
        return self.category(labels)

    def category(self, labels: Iterable[str]) -> dict[str, Any]:
        """The fields category, node, accepted and name of an unsafe `Example` with these labels."""
        labels = sorted(labels, key=self.order.index)
        ids = [id for label in labels for id in self._ids.get(label, ())]
        also = [id for label in labels for id in self._also.get(label, ())]
        outside = [self._ood[label] for label in labels if label in self._ood]
        if ids:
            accepted = tuple(dict.fromkeys(id for id in (*ids, *also) if id != ids[0]))
            return {"category": "node", "node": ids[0], "accepted": accepted, "name": self._taxonomy.by_id(ids[0]).name}
        if outside:
            return {"category": "ood", "name": outside[0], "accepted": tuple(dict.fromkeys(also))}
        return {"category": "unknown"}
