"""The risk taxonomy, and what of it one prompt shows.

A taxonomy has two levels; ids follow from position (C2 is the second category, C2S1 its first subcategory; PAPERS A3).
A `PolicyView` is what one prompt lists: some entries hidden, some orders shuffled, ids perhaps numbered anew (the OOD task, A6).
Nodes are named by their canonical index everywhere else, never by the id that a prompt happens to show.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from pgjax.config import OODConfig
from pgjax.data.schema import Modality

Level = Literal["leaf", "top"]

PACKAGED = Path(__file__).with_name("taxonomy.yaml")


@dataclass(frozen=True)
class Category:
    """One node. `reserved` nodes keep their place in the numbering and are never shown in a prompt."""

    id: str
    name: str
    description: str
    synonyms: tuple[str, ...]
    parent: str | None = None
    reserved: bool = False


@dataclass(frozen=True)
class Taxonomy:
    """Nodes in canonical order C1, C1S1, ..., C2, ...; a node's place is its index on the N axis."""

    nodes: tuple[Category, ...]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {node.id: n for n, node in enumerate(self.nodes)}

    @cached_property
    def _children(self) -> dict[str, tuple[Category, ...]]:
        children: dict[str, list[Category]] = {node.id: [] for node in self.nodes}
        for node in self.nodes:
            if node.parent is not None:
                children[node.parent].append(node)
        return {id: tuple(nodes) for id, nodes in children.items()}

    def __len__(self) -> int:
        return len(self.nodes)

    def index(self, id: str) -> int:
        """Place of a canonical id on the N axis; ValueError for an id that the taxonomy lacks."""
        if id not in self._index:
            near = difflib.get_close_matches(id, self._index, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {self.nodes[0].id} to {self.nodes[-1].id}"
            raise ValueError(f"the taxonomy has no category id {id!r}{hint}")
        return self._index[id]

    def by_id(self, id: str) -> Category:
        return self.nodes[self.index(id)]

    def children(self, id: str) -> tuple[Category, ...]:
        return self._children[self.by_id(id).id]

    @property
    def top(self) -> tuple[Category, ...]:
        return tuple(node for node in self.nodes if node.parent is None)

    @property
    def leaves(self) -> tuple[Category, ...]:
        """The most specific nodes: subcategories, and categories that have none."""
        return tuple(node for node in self.nodes if not self._children[node.id])


# --- reading -----------------------------------------------------------------------------------------------------------------------

_KEYS = ("description", "synonymous-phrase")


def load_taxonomy(path: str | Path | None = None) -> Taxonomy:
    """Read a taxonomy file, by default the packaged one.

    The format is the published one: a list of `category`, `description`, `synonymous-phrase` (a list), and optionally
    `subcategories`, each with `name`, `description`, `synonymous-phrase`. `reserved: true` keeps an entry out of every prompt.
    One ValueError lists every problem of the file, each with its line.
    """
    path = PACKAGED if path is None else Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"taxonomy {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"taxonomy {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return parse_taxonomy(text, str(path))


def parse_taxonomy(text: str, where: str = "taxonomy", brief: bool = False) -> Taxonomy:
    """As `load_taxonomy`, from text (YAML, or JSON, which is YAML too); `where` names the source in errors. A `brief` one need not have
    descriptions and synonyms, and an entry may be a name alone: a policy to judge by, not to train on."""
    problems: list[tuple[int, str]] = []
    nodes = _read_categories(_compose(text, where), problems, brief)
    if problems:
        lines = "".join(f"\n  {where}:{line}: {what}" for line, what in sorted(problems))
        raise ValueError(f"taxonomy {where} has {len(problems)} problem{'s' * (len(problems) > 1)}:{lines}")
    return Taxonomy(tuple(nodes))


class _Loader(yaml.SafeLoader):
    """Without aliases: a short text would be a policy of any length."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="an alias (*) is not read here; write the entry out", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


def _compose(text: str, where: str) -> yaml.Node | None:
    """The YAML node tree, which still knows its lines; nothing is constructed from it."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:  # knows a character, not a line
        line, what = text.count("\n", 0, error.position) + 1, error.reason
    except yaml.MarkedYAMLError as error:
        line, what = error.problem_mark.line + 1 if error.problem_mark else 1, error.problem
    except RecursionError:
        line, what = 1, "nested too deeply"
    raise ValueError(f"taxonomy {where} has 1 problem:\n  {where}:{line}: not valid YAML: {what}")


def _read_categories(root: yaml.Node | None, problems: list[tuple[int, str]], brief: bool) -> list[Category]:
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        what = "no categories" if root is None or not root.value else "the file must be a list of categories"
        problems.append((_line(root) if root else 1, f"{what}; begin each with `- category: NAME`"))
        return []
    nodes: list[Category] = []
    seen: dict[str, int] = {}  # name -> line
    for i, item in enumerate(root.value, 1):
        fields = _fields(item, "category", ("subcategories", "reserved"), problems, brief)
        nodes.append(_category(fields, "category", f"C{i}", None, seen, problems))
        children = fields.get("subcategories")
        if children is None:
            continue
        if not isinstance(children, yaml.SequenceNode) or not children.value:
            problems.append((_line(children), f"C{i}: `subcategories` must be a list of at least one; leave it out where there is none"))
            continue
        for j, child in enumerate(children.value, 1):
            fields = _fields(child, "name", ("reserved",), problems, brief)
            nodes.append(_category(fields, "name", f"C{i}S{j}", f"C{i}", seen, problems))
    return nodes


def _fields(
    item: yaml.Node, name_key: str, optional: tuple[str, ...], problems: list[tuple[int, str]], brief: bool
) -> dict[str, yaml.Node]:
    """Value nodes by key; complains of unknown, repeated and missing keys."""
    if brief and isinstance(item, yaml.ScalarNode):
        return {name_key: item}
    if not isinstance(item, yaml.MappingNode):
        problems.append((_line(item), f"expected an entry with the keys {', '.join((name_key, *_KEYS))}"))
        return {}
    fields: dict[str, yaml.Node] = {}
    for key_node, value in item.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "(not text)"
        if key not in (name_key, *_KEYS, *optional):
            near = difflib.get_close_matches(key, (name_key, *_KEYS, *optional), n=1)
            problems.append((_line(key_node), f"unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else "")))
        elif key in fields:
            problems.append((_line(key_node), f"key `{key}` twice in one entry"))
        fields.setdefault(key, value)
    for key in (name_key,) if brief else (name_key, *_KEYS):
        if key not in fields:
            problems.append((_line(item), f"missing key `{key}`"))
    return fields


def _category(
    fields: dict[str, yaml.Node], name_key: str, id: str, parent: str | None, seen: dict[str, int], problems: list[tuple[int, str]]
) -> Category:
    name = _text(fields.get(name_key), f"{id}: `{name_key}`", problems)
    if name:
        line = _line(fields[name_key])
        if name.casefold() in seen:
            problems.append((line, f"{id}: the name {name!r} is already used in line {seen[name.casefold()]}"))
        seen.setdefault(name.casefold(), line)
    phrases = fields.get("synonymous-phrase")
    if phrases is not None and (not isinstance(phrases, yaml.SequenceNode) or not phrases.value):
        problems.append((_line(phrases), f"{id}: `synonymous-phrase` must be a list of at least one phrase"))
        phrases = None
    reserved = fields.get("reserved")
    if reserved is not None and (reserved.tag != "tag:yaml.org,2002:bool" or not isinstance(reserved, yaml.ScalarNode)):
        problems.append((_line(reserved), f"{id}: `reserved` must be true or false"))
    return Category(
        id=id,
        name=name,
        description=_text(fields["description"], f"{id}: `description`", problems) if "description" in fields else "",
        synonyms=tuple(_text(phrase, f"{id}: a `synonymous-phrase`", problems) for phrase in (phrases.value if phrases else ())),
        parent=parent,
        reserved=reserved is not None and str(reserved.value).lower() in ("true", "yes", "on"),
    )


def _text(node: yaml.Node | None, what: str, problems: list[tuple[int, str]]) -> str:
    """One line of text; "" with a complaint where it is none. A missing key has been complained of already."""
    if node is None:
        return ""
    if not isinstance(node, yaml.ScalarNode) or node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:null"):
        problems.append((_line(node), f"{what} must be text; put it in quotes if it looks like a number or a date"))
        return ""
    text = "" if node.tag.endswith("null") else " ".join(node.value.split()).encode("utf-8", "replace").decode()  # no half characters
    if not text:
        problems.append((_line(node), f"{what} is empty"))
    return text


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


# --- views -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyView:
    """What one prompt shows, in shown order: (shown id, canonical node index).

    A view of the leaf level lists each category above its shown subcategories. `answerable` holds the shown ids that an answer
    should name: the most specific ones at leaf level, all at top level. `hidden` holds the nodes that the prompt withholds; a
    gold node in it is OOD for this prompt. Subcategories that a top-level view leaves unlisted below a shown category are not hidden.
    """

    entries: tuple[tuple[str, int], ...]
    answerable: frozenset[str]
    hidden: frozenset[int]


def level_of(modality: Modality) -> Level:
    """Text-image answers name a category, the others a subcategory (PAPERS A4)."""
    return "top" if modality == "text_image" else "leaf"


def full_view(taxonomy: Taxonomy, level: Level, exclude: Iterable[str] = ()) -> PolicyView:
    """Everything in canonical order under canonical ids, but for reserved and excluded ids (a category takes its subcategories along)."""
    return _view(taxonomy, level, _entries(taxonomy, level, exclude), tuple(exclude), None, renumber=False)


def policy_view(
    taxonomy: Taxonomy, ood: OODConfig, rng: np.random.Generator, level: Level, gold: str | None, hide_gold: bool
) -> PolicyView:
    """Draw what one prompt shows. How much is hidden is not published (PAPERS A6): the ratios are parameters.

    `gold` is a canonical id of either level: at leaf level a category stands for all its subcategories, at top level a subcategory
    for its category. With `hide_gold` it is certainly hidden, else at least one of its entries is kept. `ood.keep` bounds the number
    of shown entries of the level; None hides the gold one alone. `hide_gold` without a gold id hides a random entry, so that safe
    prompts can have gaps too and a gap does not betray the label. `ood.never_seen` and reserved entries are never shown, gold or not.
    """
    entries = _entries(taxonomy, level, ood.never_seen)
    if gold is not None:
        node = taxonomy.by_id(gold)
        target = node.parent if level == "top" and node.parent else node.id
        of_gold = [n for n in entries if target in (taxonomy.nodes[n].id, taxonomy.nodes[n].parent)]
    else:
        of_gold = [int(rng.choice(entries))] if hide_gold and entries else []
    pool = [n for n in entries if not (hide_gold and n in of_gold)]
    if ood.keep is not None:
        low, high = ood.keep
        if not 1 <= low <= high:
            raise ValueError(f"data.ood.keep is {ood.keep}: give the smallest and the largest number of shown entries, 1 or more")
        forced = [int(rng.choice(of_gold))] if of_gold and not hide_gold else []
        others = [n for n in pool if n not in forced]
        count = min(int(rng.integers(low, high + 1)) - len(forced), len(others))
        pool = forced + [others[i] for i in rng.permutation(len(others))[:count]]
    return _view(taxonomy, level, pool, ood.never_seen, rng if ood.shuffle else None, ood.renumber)


def _entries(taxonomy: Taxonomy, level: Level, exclude: Iterable[str]) -> list[int]:
    """Nodes of a level that may be shown; a category goes when all its subcategories go."""
    out = _withheld(taxonomy, exclude)
    nodes = taxonomy.leaves if level == "leaf" else taxonomy.top
    entries = []
    for node in nodes:
        under = [taxonomy.index(child.id) for child in taxonomy.children(node.id)]
        if taxonomy.index(node.id) not in out and not (under and out.issuperset(under)):
            entries.append(taxonomy.index(node.id))
    return entries


def _withheld(taxonomy: Taxonomy, exclude: Iterable[str]) -> set[int]:
    """Reserved and excluded nodes, with all below them."""
    ids = {taxonomy.by_id(id).id for id in exclude} | {node.id for node in taxonomy.nodes if node.reserved}
    return {n for n, node in enumerate(taxonomy.nodes) if node.id in ids or node.parent in ids}


def _view(
    taxonomy: Taxonomy, level: Level, pool: list[int], exclude: Iterable[str], shuffle: np.random.Generator | None, renumber: bool
) -> PolicyView:
    """Order and number the entries of `pool`; the children of one category stay together under it."""
    groups: dict[int, list[int]] = {}
    for n in pool:
        node = taxonomy.nodes[n]
        children = groups.setdefault(n if node.parent is None else taxonomy.index(node.parent), [])
        if node.parent is not None:
            children.append(n)

    def ordered(nodes: Iterable[int]) -> list[int]:
        nodes = sorted(nodes)
        return [nodes[i] for i in shuffle.permutation(len(nodes))] if shuffle else nodes

    entries: list[tuple[str, int]] = []
    for i, top in enumerate(ordered(groups), 1):
        category = f"C{i}" if renumber else taxonomy.nodes[top].id
        entries.append((category, top))
        for j, child in enumerate(ordered(groups[top]), 1):
            entries.append((f"{category}S{j}" if renumber else taxonomy.nodes[child].id, child))
    shown = {n for _, n in entries}
    listed = shown if level == "leaf" else shown | {taxonomy.index(c.id) for n in shown for c in taxonomy.children(taxonomy.nodes[n].id)}
    return PolicyView(
        entries=tuple(entries),
        answerable=frozenset(id for id, n in entries if n in set(pool)),
        hidden=frozenset(range(len(taxonomy))) - listed | frozenset(_withheld(taxonomy, exclude)),
    )


def render_policy(taxonomy: Taxonomy, view: PolicyView, descriptions: bool) -> str:
    """The policy text of a prompt, one line an entry, in the published line format (PAPERS A3)."""
    lines = []
    for id, n in view.entries:
        node = taxonomy.nodes[n]
        indent = "" if node.parent is None else "  "
        lines.append(f"{indent}{id}: {node.name}" + (f" — {node.description}" if descriptions and node.description else ""))
    return "\n".join(lines)


def node_of_id(view: PolicyView, ids: tuple[str, ...]) -> np.ndarray:
    """Canonical node that each id of the grid stands for in this view, int32 [K]; -1 where it is not shown."""
    nodes = dict(view.entries)
    if missing := sorted(nodes.keys() - set(ids)):
        raise ValueError(f"this prompt shows {', '.join(missing)}, but the id grid ends before; make the grid as large as the taxonomy")
    return np.array([nodes.get(id, -1) for id in ids], np.int32)
