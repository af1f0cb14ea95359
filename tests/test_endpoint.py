"""The client for endpoints, against a real server that fails by script, a real process that is killed, and a model in this process."""

import asyncio
import base64
import functools
import io
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from unittest import mock

import jax
import pytest
from chat_server import chat_server, completion
from PIL import Image
from tiny_qwen import QUICK
from tiny_recipe import materials
from tiny_run import make_run, one_device

from pgjax import endpoint as module
from pgjax.conversation import chat_text
from pgjax.data.toy import draw
from pgjax.endpoint import Endpoint, Failed, Limits, Reply, system, user
from pgjax.files import replace_file
from pgjax.serving.endpoints import is_loopback, open_endpoint, parse
from pgjax.serving.requests import Chat
from pgjax.serving.requests import Limits as ServerLimits
from pgjax.serving.requests import parse as parse_body

KEY, ASKED = "moon-glass", "Who polishes the brass vault?"
QUICKLY = Limits(timeout=60.0, tries=2, backoff=0.0)  # no time is measured but where it is said


@pytest.fixture
def server():
    with chat_server() as server:
        yield server


def ask_all(spec: str, asked: Sequence[str], limits: Limits = QUICKLY, cache: Path | None = None, allow_remote: bool = False, **how):
    """The replies to texts that are asked at once, errors among them, and the counts."""

    async def run() -> tuple[list[Reply | BaseException], Counter[str]]:
        async with open_endpoint(spec, limits, cache, allow_remote) as endpoint:
            asks = [endpoint.ask([user(text)], **how) for text in asked]
            return await asyncio.gather(*asks, return_exceptions=True), endpoint.counts

    return asyncio.run(run())


def ask(spec: str, text: str = ASKED, limits: Limits = QUICKLY, cache: Path | None = None, **how) -> tuple[Reply, Counter[str]]:
    [reply], counts = ask_all(spec, [text], limits, cache, **how)
    if isinstance(reply, BaseException):
        raise reply
    return reply, counts


# --- what is sent ------------------------------------------------------------------------------------------------------------------


def test_a_call_has_openais_form(server, monkeypatch):
    monkeypatch.setenv("VAULT_KEY", f"{KEY}\n")
    Image.new("RGB", (4, 4)).save(jpeg := io.BytesIO(), "JPEG")

    async def run() -> Reply:
        async with open_endpoint(f"{server.spec}/#VAULT_KEY", QUICKLY) as endpoint:
            assert endpoint.name == server.spec and endpoint.here
            await endpoint.ask([system("Be brief."), user(ASKED, [draw("C8S1", "unsafe", 28, 28, 5), jpeg.getvalue()])], max_tokens=7)
            return await endpoint.ask([user(ASKED)], temperature=0.5, seed=3)

    reply = asyncio.run(run())
    assert reply[:3] == (ASKED.upper(), 3, 2) and reply.seconds > 0 and not reply.cached
    (path, headers, first), (_, _, second) = server.calls
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    for body in (first, second):
        parse_body(Chat, json.dumps(body).encode(), ServerLimits()).check()  # as `pgjax serve` takes them
    said, shown = first.pop("messages")
    assert first == {"model": "vault/7b", "max_tokens": 7, "temperature": 0.0}  # no seed where nothing is drawn
    assert said == {"role": "system", "content": "Be brief."} and shown["role"] == "user"
    urls = [part["image_url"]["url"] for part in shown["content"][:-1]]
    assert [url.partition(",")[0] for url in urls] == ["data:image/png;base64", "data:image/jpeg;base64"]
    assert base64.b64decode(urls[1].partition(",")[2]) == jpeg.getvalue() and shown["content"][-1] == {"type": "text", "text": ASKED}
    assert (second["temperature"], second["seed"]) == (0.5, 3) and second["messages"] == [{"role": "user", "content": ASKED}]


def test_what_is_no_picture_is_not_sent():
    with pytest.raises(ValueError, match="not an image that can be sent; give one of PNG"):
        user(ASKED, [b"brass"])


# --- faults ------------------------------------------------------------------------------------------------------------------------

PASSING = {
    "rate limit": ((429, {}), "rate"),
    "timeout of the server's": ((408, {}), "timeout"),
    "conflict": ((409, {}), "server"),
    "too early": ((425, {}), "server"),
    "internal error": ((500, {}), "server"),
    "unavailable": ((503, {"Retry-After": "soon"}), "server"),
    "no JSON": (b"<html>", "malformed"),
    "half a character": (b'{"choices":[{"message":{"content":"\\ud800"}}]}', "malformed"),
    "a list": ([], "malformed"),
    "no choices": ({"error": "busy"}, "malformed"),
    "empty choices": ({"choices": []}, "malformed"),
    "no message": ({"choices": [{}]}, "malformed"),
    "no text": (completion(None), "malformed"),
    "parts": (completion([{"type": "text", "text": "brass"}]), "malformed"),
    "cut off": ("drop", "connection"),
    "closed": ("close", "connection"),
}
FINAL = {
    "bad request": ((400, {}), "refused"),
    "too large": ((413, {}), "refused"),
    "filtered": (completion("", finish_reason="content_filter"), "refused"),
    "declined": (completion(None, message={"content": None, "refusal": "No."}), "refused"),
    "no key": ((401, {}), "denied"),
    "another's": ((403, {}), "denied"),
    "unknown": ((404, {}), "denied"),
    "redirect": ((307, {"Location": "/v1/elsewhere"}), "denied"),
}


def test_each_fault_is_tried_again(server):
    server.script = [fault for fault, _ in PASSING.values()]
    reply, counts = ask(server.spec, limits=Limits(timeout=60, tries=len(PASSING) + 1, backoff=0))
    expected = Counter({"calls": len(PASSING) + 1})
    expected.update(f"retries:{kind}" for _, kind in PASSING.values())
    assert reply.text == ASKED.upper() and counts == expected


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_stays_is_told(server, name, tmp_path):
    fault, kind = PASSING[name]
    server.script = [fault] * 2
    with pytest.raises(Failed, match=rf"^{server.spec}: [^{{}}\n]+ \({kind}\), tries: 2$") as error:
        ask(server.spec, cache=tmp_path)
    assert error.value.kind == kind and not list(tmp_path.rglob("*.json"))
    assert ask(server.spec, cache=tmp_path)[0].text == ASKED.upper()


@pytest.mark.parametrize("name", FINAL)
def test_what_another_try_would_not_change_fails_at_once(server, name, tmp_path):
    fault, kind = FINAL[name]
    server.script = [fault]
    with pytest.raises(Failed, match=rf"\({kind}\), tries: 1$") as error:
        ask(server.spec, cache=tmp_path)
    assert error.value.kind == kind and ("the URL ends in /v1" in str(error.value)) == (kind == "denied")
    assert len(server.calls) == 1 and not list(tmp_path.rglob("*.json"))


def test_an_answer_without_end_is_malformed(server, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_REPLY", 200)
    reply, counts = ask(server.spec, "b" * 10)
    assert reply.text == "B" * 10
    with pytest.raises(Failed, match=r"more than 200 bytes \(malformed\)"):
        ask(server.spec, "b" * 200)


def test_nobody_answers(server):
    server.script = ["hang"]
    reply, counts = ask(server.spec, limits=Limits(timeout=1.0, tries=9, backoff=0))
    assert reply.text == ASKED.upper() and counts["retries:timeout"] == counts["calls"] - 1 > 0
    with pytest.raises(Failed, match=r"ConnectError \(connection\), tries: 2$"):
        ask("vault@http://127.0.0.1:1/v1")


def test_neither_key_nor_text_is_told_or_kept(server, monkeypatch, tmp_path):
    monkeypatch.setenv("VAULT_KEY", KEY)
    spec = f"{server.spec}#VAULT_KEY"
    server.script = [(401, {})]  # with both in its body
    with pytest.raises(Failed) as error:
        ask(spec, cache=tmp_path)
    assert KEY not in repr(error.value) and "brass" not in repr(error.value) and error.value.__cause__ is None
    ask(spec, cache=tmp_path)
    [file] = [file for file in tmp_path.rglob("*") if file.is_file()]
    kept = json.loads(file.read_text())
    assert KEY not in f"{file}{kept}" and ASKED not in f"{file}{kept}"
    assert file.parent.name == file.name[:2] and kept["text"] == ASKED.upper() and kept["tokens"] == 2


# --- the cache ---------------------------------------------------------------------------------------------------------------------


def test_a_second_run_sends_nothing(server, tmp_path):
    asked = [f"{ASKED} {n}" for n in range(5)]
    first, counts = ask_all(server.spec, asked, cache=tmp_path)
    assert counts == {"calls": 5}
    second, counts = ask_all(f"{server.spec}/", asked, cache=tmp_path)
    assert counts == {"cached": 5} and len(server.calls) == 5
    assert second == [reply._replace(cached=True) for reply in first]


def test_what_is_not_to_be_kept(server, tmp_path):
    ask(server.spec, cache=tmp_path)
    [file] = tmp_path.rglob("*.json")
    before = file.read_text()
    for text in (ASKED, "Who?"):
        assert ask(server.spec, text, cache=tmp_path, keep=False)[1] == {"calls": 1}
    assert [file] == list(tmp_path.rglob("*.json")) and file.read_text() == before


def test_another_ask_is_another_call(server, tmp_path):
    asks = [{}, {"seed": 1}, {"max_tokens": 5}, {"temperature": 0.5}, {"temperature": 0.5, "seed": 1}, {"text": "Who?"}]
    for _ in range(2):
        for how in asks:
            ask(server.spec, cache=tmp_path, **how)
    ask(server.spec.replace("7b", "3b"), cache=tmp_path)
    assert len(server.calls) == len(asks) + 1


@pytest.mark.parametrize("broken", ["", "{", "[]", "{}", '{"text": 3, "prompt_tokens": 1, "tokens": 1, "seconds": 1, "cached": true}'])
def test_a_broken_file_is_as_none(server, tmp_path, broken):
    ask(server.spec, cache=tmp_path)
    [file] = tmp_path.rglob("*.json")
    file.write_text(broken)
    assert ask(server.spec, cache=tmp_path)[1] == {"calls": 1}
    assert ask(server.spec, cache=tmp_path)[1] == {"cached": 1}


def test_many_write_a_file_at_a_time(tmp_path):
    file, texts = tmp_path / "a.json", [str(n) * 1000 for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: replace_file(file, texts[n % 4]), range(400)))
    assert file.read_text() in texts and list(tmp_path.iterdir()) == [file]


def test_equal_asks_at_once_are_one_call(server, tmp_path):
    replies, counts = ask_all(server.spec, [ASKED] * 6, cache=tmp_path)
    assert counts == {"calls": 1, "cached": 5} and len(server.calls) == 1
    assert {reply.text for reply in replies} == {ASKED.upper()} and sum(not reply.cached for reply in replies) == 1


def test_who_is_cancelled_leaves_nothing(server, tmp_path):
    """And whoever waits for the same answer still gets it."""
    server.script = ["hang"]

    async def run() -> Counter[str]:
        async with open_endpoint(server.spec, Limits(concurrency=1), tmp_path) as endpoint:
            first, second = (asyncio.create_task(endpoint.ask([user(ASKED)])) for _ in range(2))
            await asyncio.to_thread(server.held.acquire, timeout=60)
            first.cancel()
            with suppress(asyncio.CancelledError):
                await first
            assert not list(tmp_path.iterdir())
            assert (await second).text == ASKED.upper()
            return endpoint.counts

    assert asyncio.run(run()) == {"calls": 2}


ASKS, IN_FLIGHT, ANSWERED = 20, 4, 7
SCRIPT = f"""
import asyncio, sys
from pathlib import Path
from pgjax.endpoint import Limits, over_http, user

async def run():
    async with over_http("vault/7b", sys.argv[1], limits=Limits(concurrency={IN_FLIGHT}), cache=Path(sys.argv[2])) as endpoint:
        await asyncio.gather(*(endpoint.ask([user(f"vault {{n}}")]) for n in range({ASKS})))

asyncio.run(run())
"""


def test_a_killed_run_goes_on(server, tmp_path):
    server.script = [None] * ANSWERED + ["hang"] * IN_FLIGHT
    with subprocess.Popen([sys.executable, "-c", SCRIPT, server.url, str(tmp_path)]) as process:
        try:
            assert all(server.held.acquire(timeout=60) for _ in range(IN_FLIGHT))
        finally:
            process.send_signal(signal.SIGKILL)
    replies, counts = ask_all(server.spec, [f"vault {n}" for n in range(ASKS)], cache=tmp_path)
    assert [reply.text for reply in replies] == [f"VAULT {n}" for n in range(ASKS)]
    assert counts == {"cached": ANSWERED, "calls": ASKS - ANSWERED} and len(server.calls) == ASKS + IN_FLIGHT


# --- how many, and when ------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes where somebody sleeps, and nowhere else."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        await asyncio.sleep(0)
        self.now = max(self.now, end)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


class Told:
    """An endpoint whose calls fail as they are told to, and when each began."""

    def __init__(self, clock: Clock, limits: Limits, script: Sequence[Failed | None] = ()):
        self.clock, self.script, self.starts, self.active, self.most = clock, list(script), [], 0, 0
        self.endpoint = Endpoint("told", True, self.send, limits)

    async def send(self, payload: dict) -> Reply:
        self.starts.append(self.clock.now - 1000)
        self.active += 1
        self.most = max(self.most, self.active)
        for _ in range(20):
            await asyncio.sleep(0)
        self.active -= 1
        if error := self.script.pop(0) if self.script else None:
            raise error
        return Reply("brass", None, None, 0.0)

    def ask(self, number: int) -> "Told":
        async def run() -> None:
            await asyncio.gather(*(self.endpoint.ask([user(f"vault {n}")]) for n in range(number)))

        asyncio.run(run())
        return self


def test_so_many_calls_at_a_time(clock):
    assert Told(clock, Limits(concurrency=3)).ask(10).most == 3
    assert Told(clock, Limits(concurrency=30)).ask(10).most == 10


def test_calls_are_spaced(clock):
    assert Told(clock, Limits(concurrency=4, per_minute=30)).ask(10).starts == pytest.approx([2 * n for n in range(10)])
    assert set(Told(clock, Limits(concurrency=4)).ask(10).starts) == {18}


def test_all_wait_where_a_server_asks_for_it(clock):
    told = Told(clock, Limits(concurrency=1), [None, Failed("rate", "answered 429", 7.0)]).ask(5)
    assert told.starts == pytest.approx([0, 0, 7, 7, 7, 7])
    last = Told(clock, Limits(concurrency=1, tries=1), [Failed("rate", "answered 429", 7.0)])
    with pytest.raises(Failed):
        last.ask(1)
    assert last.ask(1).starts == pytest.approx([7, 14])  # after an ask that was given up too


def test_waits_double(clock):
    """By chance up to half less, and each time the same."""
    starts = Told(clock, Limits(backoff=4.0, tries=5), [Failed("server", "")] * 4).ask(1).starts
    waits = [later - sooner for sooner, later in zip(starts, starts[1:], strict=False)]
    assert all(2 * 2**n <= wait < 4 * 2**n for n, wait in enumerate(waits)) and len({wait / 2**n for n, wait in enumerate(waits)}) == 4
    clock.now = 1000.0
    assert Told(clock, Limits(backoff=4.0, tries=5), [Failed("server", "")] * 4).ask(1).starts == starts
    clock.now = 1000.0
    starts = Told(clock, Limits(backoff=10_000.0), [Failed("server", "")]).ask(1).starts
    assert 150 <= starts[1] <= 300


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *(("7", 7), ("0.5", 0.5), ("0", 0), ("1e999", 300), ("100000", 300), ("", 0), ("-3", 0), ("soon", 0), ("7 s", 0)),
        *((formatdate(1e9 + 20, usegmt=True), 20), (formatdate(1e9 - 20, usegmt=True), 0), (formatdate(2e9, usegmt=True), 300)),
        *(("Mon, 01 Jan 0001 00:00:00 -0000", 0), ("Mon, 01 Jan 99999 00:00:00 GMT", 0)),
    ],
)
def test_when_to_come_again(server, clock, monkeypatch, header, seconds):
    monkeypatch.setattr(module, "time", lambda: 1e9)
    server.script = [(429, {"Retry-After": header})]
    assert ask(server.spec)[1] == {"calls": 2, "retries:rate": 1}
    assert clock.now - 1000 == pytest.approx(seconds)


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"tries": 0}, {"per_minute": -1}, {"timeout": 0.0}, {"backoff": -1.0}])
def test_limits_that_are_none(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        Limits(**wrong)


# --- where content goes ------------------------------------------------------------------------------------------------------------


def test_a_proxy_sees_no_call_to_this_machine(server, monkeypatch):
    """And all of one to another machine, which here it answers."""
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert ask(server.spec)[0].text == ASKED.upper()
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    assert ask("vault@http://far.example/v1", allow_remote=True)[0].text == ASKED.upper()
    assert server.calls[-1][0] == "http://far.example/v1/chat/completions" and server.calls[-1][1]["Host"] == "far.example"


@pytest.mark.parametrize("host", ["far.example", "10.0.0.1", "0.0.0.0", "localhost.far.example", "[fe80::1]", "127.1", "127.0.0.1.example"])
def test_other_machines_are_asked_for(host):
    with pytest.raises(ValueError, match=r"^vault@http://[^\n]+: content would leave this machine; give --allow-remote$"):
        ask(f"vault@http://{host}/v1")


def test_this_machine():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.9.10", "::1")))
    assert parse("a@b/c@http://LOCALHOST:80/v1/") == ("a@b/c", "http://LOCALHOST:80/v1", "", True)
    assert parse("vault@https://far.example/v1").here is False


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http://127.0.0.1/v1", "cannot be read: give MODEL@URL"),
        ("vault@ftp://127.0.0.1/v1", "cannot be read"),
        ("vault@http:///v1", "cannot be read"),
        ("vault@http://[::1/v1", "cannot be read"),
        ("vault@http://127.0.0.1:99999/v1", "cannot be read"),
        ("vault@http://127.0.0.1:x/v1", "cannot be read"),
        ("vault@http://127.0.0.1/v1#", "cannot be read"),
        (f"vault@http://gnome:{KEY}@127.0.0.1/v1", "may have no user, password or query"),
        (f"vault@http://127.0.0.1/v1?key={KEY}", "may have no user, password or query"),
        ("vault@http://127.0.0.1/v1#NO_SUCH_KEY", "the environment variable NO_SUCH_KEY has no key; set it"),
        ("vault@http://127.0.0.1/v1#ODD_KEY", "the environment variable ODD_KEY has no key; set it"),
        ("/no/such/folder", "/no/such/folder: no such folder; give a run folder"),
        ("vault@http://127.0.0.1/v1?", "may have no user, password or query"),
        ("vault@127.0.0.1", "no such folder"),
        (f"vault@127.0.0.1#{KEY}", "vault@127.0.0.1: no such folder"),
        (f"vault@http://127.0.0.1/v1#{KEY}", "what follows # is not the name of an environment variable"),
    ],
)
def test_specs_that_are_none(spec, message, monkeypatch):
    monkeypatch.setenv("ODD_KEY", f"{KEY}\nbrass")
    with pytest.raises(ValueError) as error:
        ask(spec)
    assert message in str(error.value) and KEY not in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        ask(str(tmp_path))


# --- a model in this process -------------------------------------------------------------------------------------------------------


def test_a_model_in_this_process(tmp_path):
    run, cache = make_run(tmp_path / "run"), tmp_path / "cache"
    said = [system("Be brief."), user(ASKED)]

    async def asks(run: Path) -> tuple[list[Reply], Counter[str]]:
        async with open_endpoint(str(run), QUICKLY, cache) as endpoint:
            assert endpoint.here and endpoint.name == str(run)
            pictures = [draw(code, "unsafe", 56, 56, 5) for code in ("C8S1", "C1S1")]
            shown = [endpoint.ask([user(ASKED, [picture])]) for picture in pictures]
            drawn = [endpoint.ask(said, temperature=1.0, seed=seed, max_tokens=5) for seed in (1, 2)]
            replies = await asyncio.gather(endpoint.ask(said), *shown, *drawn)
            for wrong, why in ((user("a " * 1000), "tokens"), (picture_at("https://far.example/a.png"), "data URL")):
                with pytest.raises(Failed, match=why) as error:
                    await endpoint.ask([wrong])
                assert error.value.kind == "refused"
            with pytest.raises(Failed, match="seed 4294967296"):
                await endpoint.ask(said, temperature=1.0, seed=2**32)
            with pytest.raises(Failed, match="does not take these messages") as error:
                await endpoint.ask([{"role": "brass", "content": ASKED}])
            assert "brass" not in str(error.value)
            return replies, endpoint.counts

    def opened(run: Path) -> tuple[list[Reply], Counter[str]]:
        with (
            mock.patch("pgjax.train.saved.make_mesh", one_device),
            mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK)),
        ):
            return asyncio.run(asks(run))

    (whole, one, other, *drawn), counts = opened(run)
    assert counts == {"calls": 9, "failed:refused": 4}
    tokenizer = materials().tokenizer
    read = chat_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}], tokenizer)
    assert whole.prompt_tokens == len(tokenizer(read)["input_ids"]) and 0 < whole.tokens <= 32 and "<|im_end|>" not in whole.text
    assert one.text != other.text and one.prompt_tokens == other.prompt_tokens
    assert drawn[0].text != drawn[1].text and all(reply.tokens <= 5 for reply in drawn)
    again, counts = opened(run.rename(tmp_path / "moved"))  # the weights count, not their place
    assert [reply._replace(cached=False) for reply in again] == [whole, one, other, *drawn]
    assert counts == {"cached": 5, "calls": 4, "failed:refused": 4}


def picture_at(url: str) -> dict:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
