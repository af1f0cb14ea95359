"""Labels by vote: real judges over HTTP that disagree, fail and are killed half-way, and what is decided and told of it."""

import asyncio
import base64
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest import mock

import jax
import pytest
from chat_server import Server, chat_server, last_text
from hypothesis import given
from hypothesis import strategies as st
from tiny_qwen import QUICK
from tiny_run import make_run, one_device

from pgjax.conversation import answer_text
from pgjax.data.rows import conversation
from pgjax.data.schema import Example
from pgjax.data.toy import draw
from pgjax.data.vote import FIELDS, GIVE_UP, Ballot, Vote, Voted, Votes, agreement, decide, gold, label, lines, report, reserved, vote
from pgjax.endpoint import Limits
from pgjax.files import read_json
from pgjax.serving.endpoints import open_endpoints
from pgjax.taxonomy import Taxonomy, full_view, load_taxonomy, parse_taxonomy, render_policy

TAXONOMY = load_taxonomy()
[RESERVED] = [node for node in TAXONOMY.nodes if node.reserved]
QUICKLY = Limits(timeout=60.0, tries=2, backoff=0.0)
PICTURE = draw("C8S1", "unsafe", 56, 56, 5)
NONSENSE = "I would rather talk of brass."
Answers = Callable[[str, int], object]  # what the judge of that name says of row n, as chat_server.Server takes it


@pytest.fixture
def server():
    with chat_server() as server:
        yield server


def row(n: int, response: str | None = None, image: bytes | None = None, **known) -> Example:
    return replace(conversation(f"May I polish vault {n}?", response, image, f"row-{n}"), **{"source": "vaults", **known})


def said(request: str, response: str = "safe", category: str | None = None, modality: str = "text") -> str:
    return answer_text(request, response, category, "It is brass.", modality, "think")


def number(body: dict) -> int:
    """Of a row; -1 of one without a request."""
    found = re.search(r"vault (\d+)\?", last_text(body))
    return int(found[1]) if found else -1


def asked(server: Server) -> Counter[tuple[str, int]]:
    return Counter((body["model"], number(body)) for _, _, body in server.calls)


def judges(server: Server, *names: str, **how) -> Vote:
    return Vote(tuple(f"{name}@{server.url}" for name in names), **{"limits": QUICKLY, **how})


async def poll(rows: Iterable[Example], config: Vote, taxonomy: Taxonomy, replies: Path, allow_remote: bool = False) -> Votes:
    async with open_endpoints(config.judges, config.limits, replies, allow_remote) as opened:
        return await vote(rows, config, taxonomy, opened)


def voted(server: Server, answers: Answers, rows: Iterable[Example], config: Vote, replies: Path, **how) -> Votes:
    server.answer = lambda body: answers(body["model"], number(body))
    return asyncio.run(poll(rows, config, TAXONOMY, replies, **how))


# --- what is asked and decided -------------------------------------------------------------------------------------------------------

UNNAMED = ("unsafe", "safe", "unknown")
CASES = {  # what brass, copper and tin say, and what is decided
    "two of three": ([said("unsafe", "safe", "C8S1")] * 2 + [said("safe")], ("unsafe", "safe", "C8S1")),
    "another category each": ([said("unsafe", "unsafe", id) for id in ("C8S1", "C8S3", "C6S1")], ("unsafe", "unsafe", "unknown")),
    "all safe": ([said("safe")] * 3, ("safe", "safe", "none")),
    "one says nothing": ([said("safe"), NONSENSE, said("safe")], ("safe", "safe", "none")),
    "two say nothing": ([said("safe"), NONSENSE, said("safe") + " Brass."], ("unknown", "unknown", "unknown")),
    "its own words": ([said("unsafe", "safe", name) for name in ("Vault Mischief", "Brass Trouble", "C8S1")], ("unsafe", "safe", "ood")),
    "a category above": ([said("unsafe", "safe", id) for id in ("C8", "C8", "C8S1")], UNNAMED),
    "ids that are none": ([said("unsafe", "safe", id) for id in ("C99", "C99", "C8S9")], UNNAMED),
    "an id that is reserved": ([said("unsafe", "safe", RESERVED.id)] * 3, ("unknown", "unknown", "unknown")),
    "names that are none": ([said("unsafe", "safe", "C1").replace("C1", name) for name in (" None", "  ", " ")], UNNAMED),
    "no label twice": ([said("unsafe", "safe", "C1S1"), said("safe", "unsafe", "C1S1"), said("safe")], ("safe", "safe", "C1S1")),
}  # fmt: skip


def test_what_the_majority_says(server, tmp_path):
    answers, expected = zip(*CASES.values(), strict=True)
    rows = [row(n, "Gladly.") for n in range(len(CASES))]
    votes = voted(
        server, lambda name, n: answers[n]["brass copper tin".split().index(name)], rows, judges(server, "brass", "copper", "tin"), tmp_path
    )
    decided = {name: votes.rows["vaults", f"row-{n}"].decided[:3] for n, name in enumerate(CASES)}
    assert decided == dict(zip(CASES, expected, strict=True))
    assert votes.rows["vaults", "row-3"].ballots[1] == Ballot(problem="unparsed")
    unanimous = asyncio.run(poll(rows, judges(server, "brass", "copper", "tin", quorum=1.0), TAXONOMY, tmp_path))
    assert [key for key, voted in unanimous.rows.items() if voted.decided.category != "unknown"] == [("vaults", "row-2")]
    assert len(server.calls) == 3 * len(rows) and unanimous.calls == {judge: {"cached": len(rows)} for judge in votes.judges}


def test_every_modality_is_judged_at_its_level(server, tmp_path):
    rows = [row(0), row(1, "Gladly.", PICTURE), row(2, None, PICTURE), row(3, None, PICTURE, request=None, modality="image")]
    told = {
        0: said("unsafe", "safe", "C8S1"),
        1: said("unsafe", "safe", "C8"),
        2: said("unsafe", "safe", "C8S1"),
        -1: said("unsafe", "", "C8S1", "image"),
    }
    votes = voted(server, lambda name, n: told[n], rows, judges(server, "brass"), tmp_path)
    assert [voted.decided[:3] for voted in votes.rows.values()] == [
        ("unsafe", "absent", "C8S1"), ("unsafe", "safe", "C8"), ("unsafe", "absent", "unknown"), ("unsafe", "absent", "C8S1"),
    ]  # fmt: skip
    for _, _, body in server.calls:
        first, second = body["messages"]
        level = "top" if number(body) in (1, 2) else "leaf"
        assert render_policy(TAXONOMY, full_view(TAXONOMY, level), True) in first["content"] and RESERVED.id not in first["content"]
        pictures = [part["image_url"]["url"] for part in second["content"][:-1]] if number(body) else []
        assert [base64.b64decode(url.partition(",")[2]) for url in pictures] == ([PICTURE] if number(body) else [])
        assert body["temperature"] == 0 and body["max_tokens"] == 1024
        assert ("Agent:  Gladly." in last_text(body)) == (number(body) == 1)


BALLOTS = st.lists(
    st.builds(Ballot, *(st.sampled_from(["unknown", "safe", "unsafe", "none", "C8S1"]) for _ in FIELDS)), min_size=1, max_size=9
)


@given(BALLOTS, st.floats(0.5, 1), st.randoms())
def test_what_is_decided_has_its_quorum(ballots, quorum, chance):
    decided = decide(ballots, quorum)
    for n in range(len(FIELDS)):
        share = {value: sum(ballot[n] == value for ballot in ballots) / len(ballots) for value in {b[n] for b in ballots}}
        enough = [value for value, part in share.items() if part >= quorum and part > 0.5]
        assert decided[n] == (enough[0] if enough else "unknown")
    assert decide(chance.sample(ballots, len(ballots)), quorum) == decided


@pytest.mark.parametrize("wrong", [{"judges": ("a", "a")}, {"judges": ("a",), "quorum": 0.4}, {"judges": ("a",), "quorum": 1.1}])
def test_configs_that_are_none(wrong):
    with pytest.raises(ValueError, match=r"^vote: (judges|quorum)[^\n]*$"):
        Vote(**wrong)


# --- whom nobody is asked about ------------------------------------------------------------------------------------------------------

KNOWN = {"request_label": "safe", "response_label": "absent", "category": "none"}


def test_rows_that_are_sent_to_nobody(server, tmp_path):
    about = [
        {"node": RESERVED.id},
        {"node": RESERVED.parent},
        {"node": "C8S1", "accepted": ("C9S3", RESERVED.parent)},
        {"accepted": (RESERVED.id,)},
    ]
    rows = [row(n, category="node", **known) for n, known in enumerate(about)]
    rows += [row(4, image=b"brass"), row(5, **KNOWN), row(6), row(7, source="scales", **KNOWN)]
    votes = voted(server, lambda name, n: said("safe"), rows, judges(server, "brass", sources=("vaults",)), tmp_path)
    assert asked(server) == {("brass", n): 1 for n in (5, 6)} and len(votes.rows) == 2
    assert votes.left_out == {"vaults": {"reserved": 4, "cannot be shown": 1}}
    votes = voted(server, lambda name, n: said("safe"), rows, judges(server, "copper"), tmp_path)
    assert set(votes.rows) == {("vaults", "row-6")} and votes.left_out == {"vaults": {"reserved": 4, "cannot be shown": 1}}
    assert asked(server).keys() == {("brass", 5), ("brass", 6), ("copper", 6)}


def test_what_a_judge_here_holds_for_reserved_goes_nowhere_else(server, tmp_path):
    """Copper is on this machine; brass is not, whatever comes first in the config."""
    answers = [said("unsafe", "safe", RESERVED.id), said("safe")]
    server.answer = lambda body: answers[number(body)] if body["model"] == "copper" else said("safe")

    async def ask() -> Votes:
        config = judges(server, "brass", "copper")
        async with open_endpoints(config.judges, config.limits, tmp_path, False) as opened:
            opened[0].here = False
            return await vote([row(0), row(1)], config, TAXONOMY, opened)

    votes = asyncio.run(ask())
    assert asked(server) == {("copper", 0): 1, ("copper", 1): 1, ("brass", 1): 1}
    assert [ballot.problem for ballot in votes.rows["vaults", "row-0"].ballots] == ["", "withheld"]


def test_what_is_below_a_reserved_category_is_sent_to_nobody():
    assert reserved(TAXONOMY) == {RESERVED.id, RESERVED.parent}
    brief = "- {category: A, subcategories: [B, C], reserved: true}\n- {category: D, subcategories: [E]}"
    assert reserved(parse_taxonomy(brief, brief=True)) == {"C1", "C1S1", "C1S2"}


def test_another_machine_is_asked_only_where_that_is_allowed(server, tmp_path, monkeypatch):
    config = Vote((f"brass@{server.url}", "tin@http://far.example/v1"), limits=QUICKLY)
    with pytest.raises(ValueError, match=r"^tin@http://far\.example/v1: content would leave this machine; give --allow-remote$"):
        voted(server, lambda name, n: said("safe"), [row(0)], config, tmp_path)
    assert not server.calls
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))  # in the other machine's place
    votes = voted(server, lambda name, n: said("safe"), [row(0)], config, tmp_path, allow_remote=True)
    assert votes.rows["vaults", "row-0"].decided.request == "safe" and {path for path, _, _ in server.calls} == {
        "/v1/chat/completions", "http://far.example/v1/chat/completions",
    }  # fmt: skip


# --- faults --------------------------------------------------------------------------------------------------------------------------

ROWS = [row(n, "Gladly.") for n in range(12)]
NAMES = ("brass", "copper", "tin")


def differing(name: str, n: int) -> str:
    """Judges that agree on most rows; tin says nothing of some."""
    if name == "tin" and n % 4 == 0:
        return NONSENSE
    unsafe = n % 3 == 0 or (name == "copper" and n % 5 == 0)
    return said("unsafe", "safe", "C8S1") if unsafe else said("safe")


def test_faults_change_nothing(server, tmp_path):
    faults = [(429, {"Retry-After": "0.05"}), (500, {}), b"<html>", {"choices": []}, "drop", "close", (503, {"Retry-After": "soon"})]
    before: Counter[tuple[str, int]] = Counter()

    def failing(name: str, n: int) -> object:
        with server.lock:
            before[name, n] += 1
            times = before[name, n]
        if (name, n, times) == ("brass", 7, 1):
            return "hang"
        return faults[(n + times) % len(faults)] if times <= n % 3 else differing(name, n)

    patient = Limits(timeout=5.0, tries=6, backoff=0.0)
    votes = voted(server, failing, ROWS, judges(server, *NAMES, limits=patient), tmp_path / "failing")
    assert votes.rows == voted(server, differing, ROWS, judges(server, *NAMES), tmp_path / "sound").rows
    retries = sum(votes.calls.values(), Counter())
    assert {kind for kind in retries if kind.startswith("retries")} == {
        f"retries:{kind}" for kind in ("rate", "server", "malformed", "connection", "timeout")
    }
    assert report(votes)["vaults"]["judges"][votes.judges[2]]["unparsed"] == 3


def test_a_judge_that_fails_has_no_vote(server, tmp_path):
    """And is asked again by a later run, which asks nothing else."""
    refused = {("copper", 3): (400, {}), ("brass", 5): (500, {}), ("tin", 5): b"<html>"}
    failing = lambda name, n: refused.get((name, n)) or differing(name, n)  # noqa: E731
    config = judges(server, *NAMES)
    votes = voted(server, failing, ROWS, config, tmp_path)
    assert [ballot.problem for ballot in votes.rows["vaults", "row-3"].ballots] == ["", "refused", ""]
    assert [ballot.problem for ballot in votes.rows["vaults", "row-5"].ballots] == ["server", "", "malformed"]
    assert votes.rows["vaults", "row-3"].decided == Ballot("unsafe", "safe", "C8S1")
    assert votes.rows["vaults", "row-5"].decided == Ballot()
    told = report(votes)["vaults"]
    assert told["rows"] == len(ROWS) and told["judges"][votes.judges[2]]["failed"] == {"malformed": 1}
    first = asked(server)
    again = voted(server, differing, ROWS, config, tmp_path)
    assert asked(server) - first == dict.fromkeys(refused, 1) and again.rows["vaults", "row-5"].decided.request == "safe"


def test_a_judge_that_is_not_there_ends_it(server, tmp_path):
    denying = lambda name, n: (404, {}) if name == "tin" else differing(name, n)  # noqa: E731
    with pytest.raises(ValueError, match=rf"^vote: tin@{server.url}: answered 404; check the model's name[^\n]* goes on from there$"):
        voted(server, denying, ROWS, judges(server, *NAMES, limits=replace(QUICKLY, concurrency=1)), tmp_path)
    assert sum(model == "tin" for model, _ in asked(server)) == 1


@pytest.mark.parametrize(("status", "ends"), [(500, True), (400, False)])
def test_a_judge_that_answers_nobody_ends_it(server, tmp_path, status, ends):
    """Unless it is the rows that it will not have."""
    failing = lambda name, n: (status, {}) if name == "tin" and n else said("safe")  # noqa: E731
    rows, config = [row(n) for n in range(GIVE_UP + 20)], judges(server, *NAMES, limits=replace(QUICKLY, tries=1))
    if not ends:
        assert report(voted(server, failing, rows, config, tmp_path))["vaults"]["judges"][f"tin@{server.url}"]["failed"] == {
            "refused": len(rows) - 1
        }
        return
    with pytest.raises(ValueError, match=rf"^vote: tin@{server.url}: answered 500 \(server\), tries: 1; what was answered is kept"):
        voted(server, failing, rows, config, tmp_path)


def test_so_many_calls_at_a_time_and_rows_ahead(server, tmp_path):
    """Judges that answer when as many as may ask them have asked."""
    bound, taken, answered = 3, [0], [0]
    meeting = {name: threading.Barrier(bound) for name in ("brass", "tin")}
    active: Counter[str] = Counter()
    most: dict[str, int] = defaultdict(int)

    def together(name: str, n: int) -> str:
        with server.lock:
            active[name] += 1
            most[name], most["ahead"] = max(most[name], active[name]), max(most["ahead"], taken[0] - answered[0] // 2)
        meeting[name].wait(60)
        with server.lock:
            active[name] -= 1
            answered[0] += 1
        return said("safe")

    def rows() -> Iterable[Example]:
        for n in range(8 * bound):
            taken[0] += 1
            yield row(n)

    votes = voted(server, together, rows(), judges(server, "brass", "tin", limits=replace(QUICKLY, concurrency=bound)), tmp_path)
    assert (most["brass"], most["tin"]) == (bound, bound) and most["ahead"] <= 2 * bound + 1
    assert len(votes.rows) == taken[0] == 8 * bound


IN_FLIGHT, ANSWERED = 2, 5
SCRIPT = f"""
import asyncio, sys
from pathlib import Path
from test_vote import *

config = Vote(tuple(f"{{name}}@{{sys.argv[1]}}" for name in NAMES), limits=Limits(concurrency={IN_FLIGHT}))
asyncio.run(poll(ROWS, config, TAXONOMY, Path(sys.argv[2])))
"""


def test_a_killed_run_goes_on(server, tmp_path):
    """Each judge answers a few and hangs; the process is killed, and the next one asks for what has no answer."""
    answered: Counter[tuple[str, int]] = Counter()
    broken = True

    def hanging(name: str, n: int) -> str:
        with server.lock:
            if broken and sum(model == name for model, _ in answered) == ANSWERED:
                return "hang"
            answered[name, n] += 1
        return differing(name, n)

    server.answer = lambda body: hanging(body["model"], number(body))
    path = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    with subprocess.Popen([sys.executable, "-c", SCRIPT, server.url, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}) as process:
        try:
            assert all(server.held.acquire(timeout=60) for _ in range(IN_FLIGHT * len(NAMES)))
        finally:
            process.send_signal(signal.SIGKILL)
    assert answered.total() == ANSWERED * len(NAMES) and len(server.calls) == (ANSWERED + IN_FLIGHT) * len(NAMES)
    broken = False
    votes = voted(server, hanging, ROWS, judges(server, *NAMES), tmp_path)
    assert answered == {(name, n): 1 for name, n in product(NAMES, range(len(ROWS)))}
    assert votes.calls == {judge: {"cached": ANSWERED, "calls": len(ROWS) - ANSWERED} for judge in votes.judges}
    assert [voted.decided.request for voted in votes.rows.values()] == ["unsafe" if n % 3 == 0 else "safe" for n in range(12)]


def test_a_model_in_this_process(server, tmp_path):
    """It is asked as any other; one that has learnt nothing says nothing."""
    run = make_run(tmp_path / "run")
    recipe = read_json(run / "config.json")
    recipe["data"]["prompt_tokens"] = 640
    (run / "config.json").write_text(json.dumps(recipe))
    server.answer = lambda body: said("safe")
    policy = parse_taxonomy("[{category: Vaults, subcategories: [Brass]}]", brief=True)
    config, rows = Vote((str(run), f"brass@{server.url}"), limits=replace(QUICKLY, concurrency=2)), [row(0), row(1, "Gladly. " * 400)]
    with (
        mock.patch("pgjax.train.saved.make_mesh", one_device),
        mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK)),
    ):
        votes = asyncio.run(poll(rows, config, policy, tmp_path / "replies"))
    assert [voted.ballots[0].problem for voted in votes.rows.values()] == ["unparsed", "refused"] and votes.judges[0] == str(run)


# --- what becomes of it --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "decided", "expected"),
    [
        ({}, ("unsafe", "absent", "C8S1"), ("unsafe", "absent", "node", "C8S1", "Weapons")),
        ({}, ("unsafe", "absent", "ood"), ("unsafe", "absent", "ood", None, None)),
        ({}, ("safe", "absent", "none"), ("safe", "absent", "none", None, None)),
        ({}, ("unknown", "absent", "unknown"), ("unknown", "absent", "unknown", None, None)),
        ({}, ("unsafe", "absent", "unknown"), ("unsafe", "absent", "unknown", None, None)),
        ({}, ("safe", "absent", "C8S1"), ("safe", "absent", "unknown", None, None)),
        ({"request_label": "unsafe"}, ("safe", "absent", "none"), ("unsafe", "absent", "unknown", None, None)),
        ({"request_label": "unsafe"}, ("safe", "absent", "C8S1"), ("unsafe", "absent", "node", "C8S1", "Weapons")),
        ({"category": "node", "node": "C9S1"}, ("unsafe", "absent", "C8S1"), ("unsafe", "absent", "node", "C9S1", None)),
        ({"category": "node", "node": "C9S1"}, ("safe", "absent", "none"), ("unknown", "absent", "node", "C9S1", None)),
        ({"category": "none"}, ("unsafe", "absent", "C8S1"), ("unknown", "absent", "none", None, None)),
    ],
)  # fmt: skip
def test_a_vote_fills_in_what_is_unknown(known, decided, expected):
    example = row(0, **known)
    filled = label(example, Ballot(*decided), TAXONOMY)
    assert (filled.request_label, filled.response_label, filled.category, filled.node, filled.name) == expected
    assert (
        replace(filled, **{key: getattr(example, key) for key in ("request_label", "response_label", "category", "node", "name")})
        == example
    )


@pytest.mark.parametrize(
    ("known", "right"),
    [
        ({}, ((), (), ())),
        (KNOWN, (("safe",), (), ("none",))),
        ({"request_label": "unsafe", "node": "C8S1", "accepted": ("C6", "C8S1")}, (("unsafe",), (), ("C8S1", "C6S1", "C6S2"))),
        ({"modality": "text_image", "node": "C8S1", "accepted": ("C6", "C8S2")}, ((), (), ("C8", "C6"))),
        ({"response_label": "unsafe", "category": "ood", "accepted": ("C2S1",)}, ((), ("unsafe",), ("ood", "C2S1"))),
    ],
)  # fmt: skip
def test_what_a_judge_would_be_right_to_say(known, right):
    assert gold(row(0, **({"category": "node"} if "node" in known else {}) | known), TAXONOMY) == right


FLEISS = """0 0 0 0 14; 0 2 6 4 2; 0 0 3 5 6; 0 3 9 2 0; 2 2 8 1 1; 7 7 0 0 0; 3 2 6 3 0; 2 5 3 2 2; 6 5 2 1 0; 0 2 2 3 7"""


def test_agreement():
    """Fourteen votes on ten rows and five labels: a worked example of the measure with 0.378 and 0.210."""
    counts = [[int(n) for n in line.split()] for line in FLEISS.split(";")]
    raw, kappa = agreement([[label for label, n in zip("abcde", row, strict=True) for _ in range(n)] for row in counts])
    assert (round(raw, 3), round(kappa, 3)) == (0.378, 0.210)
    assert agreement([["a", "b"], ["b", "a"]]) == (0, -1) and agreement([["a"], [], ["b", "b"]]) == (1, None)
    assert agreement([["a"], []]) == (None, None)


def test_a_report_and_its_rows():
    """Nothing in them but ids, labels and numbers."""
    unsafe, safe, lost = Ballot("unsafe", "absent", "C8S1"), Ballot("safe", "absent", "none"), Ballot("unknown", "absent", problem="rate")
    known = (("unsafe",), (), ("C8S1", "C9S3"))
    rows = [
        Voted((unsafe, unsafe), decide([unsafe, unsafe], 0.5), known),
        Voted((unsafe, safe), decide([unsafe, safe], 0.5), known),
        Voted((safe, safe), decide([safe, safe], 0.5), ((), (), ())),
        Voted((safe, lost), decide([safe, lost], 0.5), ((), (), ())),
    ]
    votes = Votes(
        ("brass", "tin"),
        {("vaults", f"row-{n}"): voted for n, voted in enumerate(rows)},
        {"vaults": Counter(reserved=2), "scales": Counter()},
    )
    told = report(votes)
    assert json.loads(json.dumps(told)) == told and told["scales"]["rows"] == 0 and told["scales"]["fields"]["request"]["decided"] is None
    half = {"rows": 4, "decided": 0.5, "agreement": 2 / 3, "kappa": pytest.approx(1 / 3)}
    nothing = {"share": None, "rows": 0}
    assert told["vaults"] == {
        "rows": 4,
        "left_out": {"reserved": 2},
        "decided": 0.5,
        "fields": {"request": half, "response": {"rows": 0, "decided": None, "agreement": None, "kappa": None}, "category": half},
        "judges": {
            "brass": {
                "unparsed": 0,
                "failed": {},
                "majority": {"request": {"share": 1.0, "rows": 2}, "response": nothing, "category": {"share": 1.0, "rows": 2}},
                "gold": {"request": {"share": 1.0, "rows": 2}, "response": nothing, "category": {"share": 1.0, "rows": 2}},
            },
            "tin": {
                "unparsed": 0,
                "failed": {"rate": 1},
                "majority": {"request": {"share": 1.0, "rows": 2}, "response": nothing, "category": {"share": 1.0, "rows": 2}},
                "gold": {"request": {"share": 0.5, "rows": 2}, "response": nothing, "category": {"share": 0.5, "rows": 2}},
            },
        },
    }
    *_, last = lines(votes)
    assert last == {
        "source": "vaults",
        "id": "row-3",
        "decided": {"request": "unknown", "response": "absent", "category": "unknown"},
        "judges": {"brass": safe._asdict(), "tin": lost._asdict()},
    }
