"""Labels by vote: several judges are asked with the guard's own prompt, and what enough of them say fills in what a row does not know.

A judge is any model behind an endpoint; its answers are read by the language of training answers. Replies are kept on disk, so a run that
was killed, or in which calls failed, is run again and asks only what has no answer yet. Of a row nothing is kept but what was said of it.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from pgjax import automaton as answers
from pgjax.config import AnswerConfig
from pgjax.conversation import load_prompts, messages
from pgjax.data.images import plain
from pgjax.data.schema import LABELS, MODALITIES, Example, Modality
from pgjax.endpoint import Endpoint, Failed, Limits, system, user
from pgjax.flow import some_at_a_time
from pgjax.taxonomy import Taxonomy, full_view, level_of, render_policy

GIVE_UP = 50  # asks in a row that a judge failed: no more are made
NO_VOTE = ("unknown", "absent")
WITHHELD = "withheld"  # the problem of a ballot that names what is `reserved`

Key = tuple[str, str]  # source and id of a row


@dataclass(frozen=True)
class Vote:
    judges: tuple[str, ...] = ()  # MODEL@URL, MODEL@URL#VARIABLE with the key, or a folder with a model; none: nobody votes
    quorum: float = 0.5  # share of all judges that must say the same; whatever it is, more than half must
    sources: tuple[str, ...] = ()  # every row of these is voted on; none named: of all sources the rows of which something is unknown
    limits: Limits = Limits()  # of each judge

    def __post_init__(self) -> None:
        if len(set(self.judges)) < len(self.judges):
            raise ValueError("vote: judges must name no endpoint twice")
        if not 0.5 <= self.quorum <= 1:
            raise ValueError(f"vote: quorum {self.quorum} must be in 0.5 to 1")


class Ballot(NamedTuple):
    """What one judge says of a row, or all together. A label is "absent" where the row has no such text; "unknown" is no vote."""

    request: str = "unknown"
    response: str = "unknown"
    category: str = "unknown"  # "none", "ood", or a taxonomy id of the level that the modality is judged at
    problem: str = ""  # why there is no vote: "unparsed", WITHHELD, or the kind of endpoint.Failed


FIELDS = Ballot._fields[:3]


class Voted(NamedTuple):
    ballots: tuple[Ballot, ...]  # in the judges' order
    decided: Ballot
    gold: tuple[tuple[str, ...], ...]  # by field what is right by the source's own labels, nothing where it does not know


@dataclass(frozen=True)
class Votes:
    judges: tuple[str, ...]  # their names
    rows: dict[Key, Voted]
    left_out: dict[str, Counter[str]]  # by source: rows to be voted on that nobody was asked about, by reason
    calls: dict[str, Counter[str]] = field(default_factory=dict)  # by judge: as in endpoint.Endpoint


async def vote(rows: Iterable[Example], config: Vote, taxonomy: Taxonomy, judges: Sequence[Endpoint]) -> Votes:
    """`judges` are those that `config` names. Takes the rows one by one, a few ahead of the answers, in a thread. Rows about a `reserved`
    node are not sent to anybody; those whose category is withheld no reader gives. A row is shown to the judges on this machine first,
    and to no other machine if one of them finds it reserved.

    A call that fails after all tries is no vote. ValueError, in one line: a judge that answers nobody (a wrong key or name, or GIVE_UP
    failures in a row)."""
    poll = _Poll(config, taxonomy, judges)
    await some_at_a_time(poll.asks(rows), 2 * config.limits.concurrency * len(judges))
    polled = {key: Voted(tuple(ballots), decide(ballots, config.quorum), gold) for key, (ballots, gold) in poll.rows.items()}
    return Votes(tuple(judge.name for judge in judges), polled, poll.left_out, {judge.name: judge.counts for judge in judges})


class _Poll:
    def __init__(self, config: Vote, taxonomy: Taxonomy, judges: Sequence[Endpoint]):
        self.config, self.taxonomy, self.judges, self.prompts = config, taxonomy, judges, load_prompts()
        self.views = {modality: full_view(taxonomy, level_of(modality)) for modality in MODALITIES}
        self.ids, self.reserved = tuple(node.id for node in taxonomy.nodes), reserved(taxonomy)
        self.order = sorted(range(len(judges)), key=lambda place: not judges[place].here)
        self.rows: dict[Key, tuple[list[Ballot], tuple[tuple[str, ...], ...]]] = {}
        self.left_out: dict[str, Counter[str]] = {}
        self.fruitless = [0] * len(judges)

    def asks(self, rows: Iterable[Example]) -> Iterator[Callable[[], Awaitable[None]]]:
        for row in rows:
            if not wanted(row, self.config.sources):
                continue
            left_out = self.left_out.setdefault(row.source, Counter())
            if self.reserved & {row.node, *row.accepted}:
                left_out["reserved"] += 1
                continue
            try:
                chat = self.chat(row)
            except ValueError:
                left_out["cannot be shown"] += 1
                continue
            nothing = Ballot(response="absent" if row.modality == "image" or row.response_label == "absent" else "unknown")
            ballots = [nothing] * len(self.judges)
            self.rows[row.source, row.id] = ballots, gold(row, self.taxonomy)
            heard = _Heard(sum(judge.here for judge in self.judges))
            for place in self.order:
                yield partial(self.ask, place, chat, row.modality, ballots, heard)

    def chat(self, row: Example) -> list[dict]:
        """The guard's prompt with the whole policy. ValueError for a picture that is none, or a row whose parts contradict each other."""
        policy = render_policy(self.taxonomy, self.views[row.modality], descriptions=True)
        told, asked = messages(row, policy, self.prompts, AnswerConfig.think_tag)
        return [system(told["content"]), user(asked["content"][-1]["text"], [plain(image) for image in row.images])]

    async def ask(self, place: int, chat: list[dict], modality: Modality, ballots: list[Ballot], heard: "_Heard") -> None:
        if self.judges[place].here:
            await self._ask(place, chat, modality, ballots)
            heard.one()
            return
        await heard.all.wait()
        if all(ballot.problem != WITHHELD for ballot in ballots):
            await self._ask(place, chat, modality, ballots)

    async def _ask(self, place: int, chat: list[dict], modality: Modality, ballots: list[Ballot]) -> None:
        try:
            reply = await self.judges[place].ask(chat, max_tokens=AnswerConfig.max_tokens)
        except Failed as error:
            self.fruitless[place] += error.kind != "refused"  # that is about the row
            if error.kind == "denied" or self.fruitless[place] == GIVE_UP:
                raise ValueError(f"vote: {error}; what was answered is kept, and a later run goes on from there") from None
            ballots[place] = ballots[place]._replace(problem=error.kind)
        else:
            self.fruitless[place] = 0
            ballots[place] = self.read(reply.text, modality, ballots[place])

    def read(self, text: str, modality: Modality, nothing: Ballot) -> Ballot:
        """An id that the prompt did not ask for, and a name that is empty, tell nothing of the category."""
        said = answers.read_text(text, modality, self.ids, AnswerConfig.think_tag)
        if not said.parsed:
            return nothing._replace(problem="unparsed")
        named = self.ids[said.id] if said.kind == answers.ID else ""
        if named in self.reserved:
            return nothing._replace(problem=WITHHELD)
        category = {answers.NONE: "none", answers.NAME: "ood"}.get(int(said.kind), "unknown")
        return Ballot(
            LABELS[said.request],
            "absent" if nothing.response == "absent" else LABELS[said.response],
            named if named in self.views[modality].answerable else category,
        )


class _Heard:
    """Whether the judges on this machine have all spoken of a row."""

    def __init__(self, judges: int):
        self.left, self.all = judges + 1, asyncio.Event()
        self.one()

    def one(self) -> None:
        self.left -= 1
        if not self.left:
            self.all.set()


def wanted(row: Example, sources: Collection[str]) -> bool:
    """Whether a row is voted on; see `Vote.sources`."""
    return row.source in sources if sources else "unknown" in (row.request_label, row.response_label, row.category)


def reserved(taxonomy: Taxonomy) -> set[str]:
    """Ids of rows that are sent to nobody: reserved nodes, what is below them, and their top-level categories, which may stand for them."""
    held = [node for node in taxonomy.nodes if node.reserved or (node.parent and taxonomy.by_id(node.parent).reserved)]
    return {id for node in held for id in (node.id, node.parent) if id}


def decide(ballots: Sequence[Ballot], quorum: float) -> Ballot:
    """By field what the quorum of all judges says, else "unknown"."""

    def most(said: list[str]) -> str:
        [(first, votes)] = Counter(said).most_common(1)
        return first if votes / len(said) >= quorum and 2 * votes > len(said) else "unknown"

    return Ballot(*(most([ballot[n] for ballot in ballots]) for n in range(len(FIELDS))))


def label(row: Example, decided: Ballot, taxonomy: Taxonomy) -> Example:
    """The row with what it did not know and the vote decided. What it knows stays: a category that does not go with the labels stays
    unknown, and so do labels that do not go with the row's own category."""
    known: dict[str, Any] = {f"{line}_label": getattr(decided, line) for line in FIELDS[:2] if getattr(row, f"{line}_label") == "unknown"}
    named: dict[str, Any] = {}
    if row.category == "unknown" and decided.category != "unknown":
        node = decided.category if decided.category not in ("none", "ood") else None
        named = {"category": "node" if node else decided.category, "node": node, "name": taxonomy.by_id(node).name if node else None}
    whole, labels = replace(row, **known, **named), replace(row, **known)
    return next((one for one in (whole, labels) if _consistent(one)), row)


def _consistent(row: Example) -> bool:
    labels = {row.request_label, row.response_label}
    return not (row.category == "none" and "unsafe" in labels or row.category in ("node", "ood") and labels <= {"safe", "absent"})


def gold(row: Example, taxonomy: Taxonomy) -> tuple[tuple[str, ...], ...]:
    """By field what a judge would be right to say, nothing where the row does not know."""
    labels = [(label,) if label not in NO_VOTE else () for label in (row.request_label, row.response_label)]
    if row.category in ("unknown", "none"):
        return *labels, (("none",) if row.category == "none" else ())
    right: list[str] = ["ood"] if row.category == "ood" else []
    for node in (taxonomy.by_id(id) for id in (row.node, *row.accepted) if id):
        below = [child.id for child in taxonomy.children(node.id)]
        right += [node.parent or node.id] if level_of(row.modality) == "top" else below or [node.id]
    return *labels, tuple(dict.fromkeys(right))


# --- what is told of it ----------------------------------------------------------------------------------------------------------------


def lines(votes: Votes) -> Iterator[dict]:
    """Every row's votes as a JSON object, without its texts."""
    for (source, id), voted in votes.rows.items():
        ballots = {judge: ballot._asdict() for judge, ballot in zip(votes.judges, voted.ballots, strict=True)}
        yield {"source": source, "id": id, "decided": dict(zip(FIELDS, voted.decided, strict=False)), "judges": ballots}


def report(votes: Votes) -> dict[str, dict]:
    """By source: `rows` asked about; `left_out` others, by reason; `decided`, the share of rows of which every field is; by field the
    `rows` that have it, the share `decided`, `agreement` and `kappa`; and by judge the numbers `unparsed` and `failed` (by kind), and by
    field how often its vote is the `majority`'s and `gold`, each a share of so many `rows`."""
    told = {}
    for source, left_out in votes.left_out.items():
        rows = [voted for key, voted in votes.rows.items() if key[0] == source]
        told[source] = {
            "rows": len(rows),
            "left_out": dict(left_out),
            "decided": _share("unknown" not in voted.decided for voted in rows)["share"],
            "fields": {name: _field(rows, n) for n, name in enumerate(FIELDS)},
            "judges": {judge: _judge(rows, place) for place, judge in enumerate(votes.judges)},
        }
    return told


def _field(rows: Iterable[Voted], n: int) -> dict:
    having = [voted for voted in rows if voted.decided[n] != "absent"]
    raw, kappa = agreement([[ballot[n] for ballot in voted.ballots if ballot[n] not in NO_VOTE] for voted in having])
    decided = _share(voted.decided[n] != "unknown" for voted in having)
    return {"rows": len(having), "decided": decided["share"], "agreement": raw, "kappa": kappa}


def _judge(rows: Sequence[Voted], place: int) -> dict:
    problems = Counter(voted.ballots[place].problem for voted in rows)
    unparsed, _ = problems.pop("unparsed", 0), problems.pop("", 0)
    told: dict[str, Any] = {"unparsed": unparsed, "failed": dict(problems), "majority": {}, "gold": {}}
    for n, name in enumerate(FIELDS):
        said = [(voted.ballots[place][n], voted) for voted in rows if voted.ballots[place][n] not in NO_VOTE]
        told["majority"][name] = _share(vote == voted.decided[n] for vote, voted in said if voted.decided[n] != "unknown")
        told["gold"][name] = _share(vote in voted.gold[n] for vote, voted in said if voted.gold[n])
    return told


def _share(holds: Iterable[bool]) -> dict:
    every = list(holds)
    return {"share": sum(every) / len(every) if every else None, "rows": len(every)}


def agreement(votes: Iterable[Sequence[str]]) -> tuple[float | None, float | None]:
    """Of each row's votes: how many of the pairs on one row agree, the mean over rows with two votes or more, and Fleiss' kappa (1971),
    which takes off what chance alone would give; rows may have different numbers of votes. None where it is not defined."""
    rows, every = [Counter(row) for row in votes if len(row) > 1], Counter[str]()
    if not rows:
        return None, None
    for row in rows:
        every.update(row)
    pairs = lambda n: n * (n - 1)  # noqa: E731
    raw = sum(sum(map(pairs, row.values())) / pairs(row.total()) for row in rows) / len(rows)
    chance = sum((n / every.total()) ** 2 for n in every.values())
    return raw, (raw - chance) / (1 - chance) if chance < 1 else None
