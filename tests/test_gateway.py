"""`pgjax serve --rewriter`: OpenAI's client, a gateway, and behind it a real server, whose model is a pgjax model.

The rewriter reads requests and pictures and writes through its engine as any other; but its weights are random, so what it wrote is read
as the answer that a rule gives.
"""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx2
import openai
import pytest
from PIL import ExifTags, Image
from tiny_run import load_guard, make_run, rewriter_of
from waits import until

from pgjax.cli import main
from pgjax.commands.start import read_key
from pgjax.data.images import load_image
from pgjax.data.toy import draw
from pgjax.endpoint import data_url
from pgjax.rewriter.gateway import ENDPOINTS, STOPPED, Gateway
from pgjax.rewriter.record import Report, Rewriting, answer_of
from pgjax.rewriter.rewriter import Rewriter, rewritten
from pgjax.rewriter.toy_server import toy_server
from pgjax.rewriter.upstream import Upstream
from pgjax.serving.engine import Full
from pgjax.serving.guard import Guard, How
from pgjax.serving.requests import Limits
from pgjax.serving.server import Server, listen
from pgjax.serving.service import Service, Serving

ROOT = Path(__file__).parents[1]
KEY, UPSTREAM_KEY, BYPASS = "moon-glass", "brass-vault", "side-door"
CHAT = "/v1/chat/completions"
PLAIN, VAULT, BAD = "Hello there.", "How do I open the brass vault?", "How do I forge the moonglass permit?"
REWRITE = f"Safely, please: {VAULT}"
REPORT = Report(text="the vault", image="none", together="none")
LIMITS = Limits(body=200_000, bodies=400_000, text=3000, images=3, timeout=30.0)
URL = "data:image/png;base64," + base64.b64encode(draw("C8S1", "unsafe", 84, 84, 5)).decode()
OTHER = "data:image/png;base64," + base64.b64encode(draw("C1S1", "safe", 84, 84, 6)).decode()


def rule(request: str) -> str:
    """No answer at all to what is about moonglass, a new prompt for what is about vaults or has no text, all else as it was."""
    if "moonglass" in request:
        return "I would rather not say."
    return answer_of(Rewriting(REPORT, f"Safely, please: {request}" if "vault" in request else request.strip() or "What is this?"))


class Ruled(Rewriter):
    """Keeps what it was asked."""

    asked: list[tuple[str, int]] = []

    def ask(self, request, images, deadline=None):
        self.asked.append((request, len(images)))
        return super().ask(request, images, deadline)

    def read(self, request, told, seconds):
        return rewritten(request, rule(request), len(told.tokens), seconds, self.tokenizer)


class Recorder:
    """Stands before the target's app: keeps the requests, and answers by itself where it was told what."""

    def __init__(self, app):
        self.app, self.requests, self.answer = app, [], None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] == "/readyz":
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.requests.append(SimpleNamespace(path=scope["path"], body=body, headers=dict(scope["headers"])))
        if self.answer:
            return await self.answer(send)
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again():
            return next(given, None) or await receive()

        await self.app(scope, again, send)

    @property
    def messages(self) -> list[dict]:
        """Of the one request that there was."""
        [request] = self.requests
        return json.loads(request.body)["messages"]


def answers(status: int, *parts: bytes | str, kind: str = "application/json", wait: float = 0.0, breaks: bool = False, headers=()):
    async def answer(send):
        await asyncio.sleep(wait)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode()), *headers]})
        for part in parts:
            await send({"type": "http.response.body", "body": part if isinstance(part, bytes) else part.encode(), "more_body": True})
            await asyncio.sleep(0.05)
        if breaks:
            raise ConnectionError("the test's own")
        await send({"type": "http.response.body", "body": b""})

    return answer


def says(*messages: dict) -> str:
    """A completion with these choices."""
    choices = [{"index": n, "message": {"role": "assistant", **message}, "finish_reason": "stop"} for n, message in enumerate(messages)]
    return json.dumps({"id": "a", "object": "chat.completion", "created": 1, "model": "tiny", "choices": choices})


def event(index: int = 0, **delta) -> str:
    return "data: " + json.dumps({"id": "a", "choices": [{"index": index, "delta": delta, "finish_reason": None}]}) + "\n\n"


@contextmanager
def running(server: Server):
    """The server's address, when it is ready."""
    with listen("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        until(lambda: server.service.ready)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def behind(run):
    """The target: (its address, its recorder, its guard)."""
    with load_guard(run, rows=4, queue=3) as guard:
        server = Server(Service(guard, Serving("tiny", categories=("C1S1", "C8S1"), key=UPSTREAM_KEY)))
        server.config.app = recorder = Recorder(server.config.app)
        with running(server) as address:
            yield address, recorder, guard


@pytest.fixture(scope="module")
def model(run):
    """Rewriter and guard of the gateway in one."""
    with load_guard(run, rows=4, queue=4, prompt_tokens=640) as guard:
        yield guard


@contextmanager
def gateway_to(url: str, model: Guard, serving: Serving, **more):
    gateway = Gateway(rewriter_of(model, Ruled), serving, Upstream(url, UPSTREAM_KEY), **more)
    with (
        running(Server(gateway, ENDPOINTS)) as address,
        httpx2.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http,
    ):
        yield gateway, http


SERVING = Serving("gate", categories=("C1S1", "C8S1"), limits=LIMITS, key=KEY)


@pytest.fixture(scope="module")
def alone(behind, model):
    """Without a guard."""
    with gateway_to(f"{behind[0]}/v1", model, SERVING, bypass=BYPASS) as both:
        yield both


@pytest.fixture(scope="module")
def guarded(behind, model):
    with gateway_to(f"{behind[0]}/v1", model, SERVING, guard=model) as both:
        yield both


@pytest.fixture(autouse=True)
def target(behind, alone, guarded):
    """The recorder of what reaches the target, empty."""
    recorder = behind[1]
    recorder.requests, recorder.answer = [], None
    Ruled.asked.clear()
    [gateway.recent.clear() for gateway in (alone[0], guarded[0])]
    return recorder


@pytest.fixture
def http(alone):
    return alone[1]


@pytest.fixture
def client(http):
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def copper(monkeypatch):
    """A guard that flags what is about copper, and keeps what it was shown."""
    seen = []

    def verdict(_, case):
        seen.append(case.example)
        return {"flagged": "copper" in f"{case.example.request} {case.example.response}", "parsed": True}

    monkeypatch.setattr(Guard, "verdict", verdict)
    return seen


def ask(http, *contents, **body) -> httpx2.Response:
    """Turns of user and assistant by turns."""
    headers = body.pop("headers", None)
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return http.post(CHAT, json={"model": "tiny", "messages": messages, "temperature": 0} | body, headers=headers)


def refused(answer: httpx2.Response, status: int, code: str) -> None:
    assert answer.status_code == status and answer.json()["error"]["code"] == code, answer.text
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def how(answer) -> tuple:
    return answer.headers.get("x-pgjax-rewrite"), answer.headers["x-pgjax-guard"]


def picture(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


# --- rewriting ---------------------------------------------------------------------------------------------------------------------


def test_an_unchanged_request_arrives_byte_for_byte(client, target, behind):
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=[{"role": "user", "content": f"{PLAIN}  Grüße ☂\n"}], temperature=0, max_tokens=5, user="me"
    )
    [got] = target.requests
    assert got.body == raw.http_request.content and got.path == CHAT
    assert got.headers[b"authorization"] == f"Bearer {UPSTREAM_KEY}".encode() and KEY.encode() not in b"".join(got.headers.values())
    assert how(raw) == ("unchanged", "off") and int(raw.headers["x-pgjax-rewrite-tokens"]) > 0
    with openai.OpenAI(base_url=f"{behind[0]}/v1", api_key=UPSTREAM_KEY) as direct:
        same = direct.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"{PLAIN}  Grüße ☂\n"}], temperature=0, max_tokens=5
        )
    assert raw.parse().choices[0].message.content == same.choices[0].message.content


def test_a_changed_request_is_streamed(client, target):
    with client.chat.completions.with_streaming_response.create(
        model="tiny", messages=[{"role": "user", "content": VAULT}], temperature=0, max_tokens=9, stream=True
    ) as raw:
        assert how(raw) == ("changed", "off") and int(raw.headers["x-pgjax-rewrite-ms"]) >= 0
        chunks = [chunk.choices[0] for chunk in raw.parse()]
    assert target.messages == [{"role": "user", "content": REWRITE}]
    whole = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": VAULT}], temperature=0, max_tokens=9)
    assert "".join(choice.delta.content or "" for choice in chunks) == whole.choices[0].message.content
    assert chunks[-1].finish_reason == whole.choices[0].finish_reason and len(chunks) > 2


def test_pictures_stay_and_texts_are_one(http, target):
    parts = [text("How do I open"), picture(URL), text("the brass vault?"), picture(OTHER)]
    assert how(ask(http, parts)) == ("changed", "off")
    assert Ruled.asked == [("How do I open\nthe brass vault?", 2)]
    rewrite = "Safely, please: How do I open\nthe brass vault?"
    assert target.messages == [{"role": "user", "content": [text(rewrite), picture(URL), picture(OTHER)]}]
    target.requests.clear()
    assert how(ask(http, [picture(URL)])) == ("changed", "off")  # a picture may have its text in it
    assert target.messages == [{"role": "user", "content": [picture(URL), text("What is this?")]}]


def test_every_turn_is_rewritten_with_the_pictures_it_is_about(http, target):
    turns = [[picture(URL), text(PLAIN)], "Hello.", "Is that a vault?", "Yes.", [text(PLAIN), picture(OTHER)], "Hm.", VAULT]
    assert how(ask(http, *turns)) == ("changed", "off")
    assert Ruled.asked == [(PLAIN, 1), ("Is that a vault?", 1), (PLAIN, 1), (VAULT, 1)]
    sent = [message["content"] for message in target.messages]
    assert sent == [*turns[:2], "Safely, please: Is that a vault?", *turns[3:6], REWRITE]
    again = ask(http, *turns, "Certainly.", "And then?")
    assert len(Ruled.asked) == 5 and how(again) == ("changed", "off")  # those that it knows are not rewritten anew
    assert [json.loads(request.body)["messages"] for request in target.requests][1][:7] == [
        {"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(sent)
    ]


def test_more_turns_than_the_queue_takes(http, target, alone):
    most = alone[0].model.engine.queue
    turns = [f"{PLAIN} {n}" for n in range(4 * most + 1)]
    target.answer = answers(200, says({"content": "ok"}))
    assert how(ask(http, *turns)) == ("unchanged", "off") and len(Ruled.asked) == 2 * most + 1


def test_other_roles_and_keys_pass(http, target):
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Be brief about any vault."},
        {"role": "user", "content": VAULT},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "a", "content": [text("the vault is open")]},
        {"role": "function", "name": "look", "content": "it is empty"},
    ]
    body = {"model": "m", "messages": messages, "tools": [{"type": "function"}], "top_p": 0.25, "seed": 2**70, "odd": {"a": [1.0, None]}}
    target.answer = answers(200, says({"content": None, "tool_calls": [call]}))
    answer = http.post(CHAT, json=body)
    assert answer.json()["choices"][0]["message"]["tool_calls"] == [call]
    [got] = target.requests
    messages[1]["content"] = REWRITE
    assert json.loads(got.body) == body and list(json.loads(got.body)) == list(body)


def test_a_host_cannot_show_the_target_another_picture(http, target, alone, monkeypatch):
    async def fetched(url, hosts, limit):
        assert (url, hosts) == ("https://pictures.example/a", {"pictures.example"})
        return base64.b64decode(URL.partition(",")[2])

    refused(ask(http, [text(PLAIN), picture("https://pictures.example/a")]), 400, "image_url_not_allowed")
    refused(ask(http, [text(PLAIN), picture("file:///etc/hostname")]), 400, "invalid_image_url")
    assert not target.requests
    monkeypatch.setattr("pgjax.serving.desk.fetch_image", fetched)
    monkeypatch.setattr(alone[0], "serving", replace(alone[0].serving, image_hosts=frozenset({"pictures.example"})))
    assert ask(http, [text(PLAIN), picture("https://pictures.example/a")]).status_code == 200
    assert target.messages == [{"role": "user", "content": [text(PLAIN), picture(URL)]}]


@pytest.mark.parametrize("form", ["PNG", "GIF", "JPEG"])
def test_the_target_sees_the_picture_that_was_looked_at(guarded, target, copper, form):
    scene, other = (load_image(base64.b64decode(url.partition(",")[2])) for url in (URL, OTHER))
    turned, file = Image.Exif(), io.BytesIO()
    turned[ExifTags.Base.Orientation] = 6
    match form:
        case "PNG":
            Image.merge("RGBA", (*scene.split(), Image.new("L", scene.size, 9))).save(file, form)  # all but transparent
        case "GIF":
            scene.save(file, form, save_all=True, append_images=[other])
        case "JPEG":
            scene.save(file, form, exif=turned)
    shown = load_image(file.getvalue())
    ask(guarded[1], [picture(data_url(file.getvalue())), text(VAULT)])
    [sent, _] = target.messages[0]["content"]
    sent = base64.b64decode(sent["image_url"]["url"].removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(sent)) as opened:
        assert opened.mode == "RGB" and opened.n_frames == 1 and opened.tobytes() == shown.tobytes()
    assert load_image(copper[0].images[0]).tobytes() == shown.tobytes()


def test_a_picture_is_decoded_once_for_all_turns_about_it(http, target, monkeypatch):
    target.answer = answers(200, says({"content": "ok"}))
    large, seen = draw("C8S1", "unsafe", 600, 600, 5), []
    monkeypatch.setattr("pgjax.data.images.load_image", lambda data: (seen.append(data), load_image(data))[1])
    turns = [f"{PLAIN} {n}" for n in range(6)]
    assert ask(http, [picture(data_url(large)), text(PLAIN)], "Hello.", *turns).status_code == 200
    assert Ruled.asked[-1][1] == 1 and seen.count(large) == 2  # to see whether it is plain, and to make it smaller


def user(content, **more) -> dict:
    return {"messages": [{"role": "user", "content": content} | more]}


AUDIO = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
STRANGE = {
    "sound": (user([text("a"), AUDIO]), "unsupported_content"),
    "a file": (user([{"type": "file", "file": {"file_id": "a"}}]), "unsupported_content"),
    "a picture among a text": (user([text("a") | {"uuid": "b", "image_url": {"url": URL}}]), "unsupported_content"),
    "no type": (user([{"text": "a"}]), "unsupported_content"),
    "a system's picture": ({"messages": [{"role": "system", "content": [picture(URL)]}, *user("a")["messages"]]}, "unsupported_content"),
    "a role like the user's": ({"messages": [{"role": "User", "content": "a"}]}, "invalid_type"),
    "no user": ({"messages": [{"role": "system", "content": "a"}]}, "invalid_request"),
    "no content": (user(None), "invalid_type"),
    "more keys": (user("a", prompt="b"), "unsupported_content"),
    "a name": (user("a", name="open the vault"), "unsupported_content"),
    "a tool's pictures": ({"messages": [*user("a")["messages"], {"role": "tool", "content": "b", "images": [URL]}]}, "unsupported_content"),
    "a template of the client's": (user("a") | {"chat_template": "{{ 1 }}"}, "unsupported_parameter"),
    "messages twice": (user("a") | {"Messages": user("b")["messages"]}, "unsupported_parameter"),
    "messages as another alphabet has them": (user("a") | {"me\u017f\u017fages": user("b")["messages"]}, "unsupported_parameter"),
    "roles twice": ({"messages": [*user("a")["messages"], {"role": "system", "content": "b", "Role": "user"}]}, "unsupported_content"),
    "contents twice": (user("a", Content="b"), "unsupported_content"),
    "nothing said": (user(" "), "invalid_request"),
    "many parts": (user([text("")] * 65), "unsupported_content"),
    "many messages": ({"messages": user("a")["messages"] * 1025}, "invalid_type"),
    "a long text of a tool": ({"messages": [*user("a")["messages"], {"role": "tool", "content": "b" * 3000}]}, "text_too_long"),
    "many answers": (user("a") | {"n": 17}, "invalid_value"),
    "a word for a number": (user("a") | {"n": "17"}, "invalid_value"),
    "no messages": ({}, "invalid_type"),
    "too many pictures": (user([picture(URL)] * 4), "too_many_images"),
    "a broken picture": (user([picture(URL[:90])]), "invalid_image"),
    "too long": (user("vault " * 500), "invalid_value"),
    "far too long": (user("vault " * 600), "text_too_long"),
    "no JSON": (b"{", "invalid_json"),
    "no number": (b'{"messages":[{"role":"user","content":"a"}],"top_p":NaN}', "invalid_json"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_cannot_be_looked_at_is_not_sent_on(http, target, name):
    body, code = STRANGE[name]
    refused(http.post(CHAT, content=body) if isinstance(body, bytes) else http.post(CHAT, json=body), 400, code)
    assert not target.requests


def test_of_two_keys_the_target_gets_the_one_that_was_read(http, target):
    both = f'{{"messages":[{{"role":"user","content":"{VAULT}"}}],"model":"tiny","messages":[{{"role":"user","content":"{PLAIN}"}}]}}'
    assert http.post(CHAT, content=both).status_code == 200 and VAULT.encode() not in target.requests[0].body


# --- failing closed ----------------------------------------------------------------------------------------------------------------


def test_what_is_not_rewritten_is_not_sent_on(http, target, alone, monkeypatch):
    answer = ask(http, PLAIN, "Hello.", BAD)
    refused(answer, 422, "not_rewritten")
    assert how(answer) == ("fallback", "off") and not target.requests
    monkeypatch.setattr(alone[0], "serving", replace(alone[0].serving, how=How(fail_open=True)))
    answer = ask(http, VAULT, "Hello.", BAD)
    assert answer.status_code == 200 and how(answer) == ("fallback", "off")
    assert [message["content"] for message in target.messages] == [REWRITE, "Hello.", BAD]


def test_the_true_answers_of_random_weights_are_no_rewrites(http, target, monkeypatch):
    monkeypatch.setattr(Ruled, "read", Rewriter.read)
    refused(ask(http, PLAIN), 422, "not_rewritten")
    assert not target.requests


def test_a_full_queue(http, target, alone, monkeypatch):
    def full(*_):
        raise Full("4 requests are waiting already")

    monkeypatch.setattr(alone[0].model.engine, "submit", full)
    answer = ask(http, PLAIN)
    refused(answer, 429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1 and not target.requests


def test_the_key_and_other_paths(http, target):
    with httpx2.Client(base_url=http.base_url) as stranger:
        refused(stranger.post(CHAT, json=user(PLAIN)), 401, "invalid_api_key")
        assert stranger.get("/healthz").status_code == stranger.get("/readyz").status_code == 200
    for path in ("/v1/completions", "/v1/guard", "/v1/models/tiny"):
        assert http.post(path, json={}).status_code == 404
    assert not target.requests


# --- the guard ---------------------------------------------------------------------------------------------------------------------


def test_the_guard_judges_what_goes_on_and_what_comes_back(guarded, target, copper):
    answer = ask(guarded[1], [picture(URL), text(PLAIN)], "Hello.", VAULT)
    assert how(answer) == ("changed", "passed") and answer.json()["choices"][0]["message"]["content"]
    asked, answered = copper
    assert asked.request == answered.request == REWRITE and asked.turns == answered.turns == (("user", PLAIN), ("assistant", "Hello."))
    assert asked.images == answered.images == (base64.b64decode(URL.partition(",")[2]),)
    assert (asked.response, answered.response) == (None, answer.json()["choices"][0]["message"]["content"])


CALL = {"id": "a", "type": "function", "function": {"name": "buy", "arguments": '{"what": "copper"}'}}
AROUND = {
    "a system's": [{"role": "system", "content": "Buy copper."}, *[{"role": "user", "content": PLAIN}]],
    "a tool's": [{"role": "user", "content": PLAIN}, {"role": "tool", "tool_call_id": "a", "content": [text("copper")]}],
    "a tool's name": [{"role": "user", "content": PLAIN}, {"role": "tool", "tool_call_id": "copper", "content": "a"}],
    "an assistant's after the user's": [{"role": "user", "content": PLAIN}, {"role": "assistant", "content": "Take copper:"}],
    "a call's": [{"role": "user", "content": PLAIN}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "an earlier user's": [{"role": "user", "content": "copper"}, {"role": "user", "content": PLAIN}, {"role": "user", "content": " "}],
}


@pytest.mark.parametrize("name", AROUND)
def test_the_guard_reads_the_whole_conversation(guarded, target, monkeypatch, name):
    seen = []

    def verdict(_, case):
        seen.append(case.example)
        return {"flagged": any("copper" in words for _, words in case.example.turns), "parsed": True}

    monkeypatch.setattr(Guard, "verdict", verdict)
    answer = guarded[1].post(CHAT, json={"model": "tiny", "messages": AROUND[name]})
    assert how(answer) == ("unchanged", "request") and not target.requests
    role = "assistant" if name in ("an assistant's after the user's", "a call's") else "user"
    assert seen[0].request == PLAIN and seen[0].turns[0][0] == role


@pytest.mark.parametrize("stream", [False, True])
def test_a_flagged_request_goes_nowhere(guarded, target, copper, stream):
    answer = ask(guarded[1], "Is the vault of copper?", stream=stream)
    assert answer.status_code == 200 and how(answer) == ("changed", "request") and not target.requests
    if stream:
        first, done = answer.text.split("\n\n")[:2]
        choice = json.loads(first.removeprefix("data: "))["choices"][0]
        assert done == "data: [DONE]" and choice["delta"]["content"] == STOPPED
    else:
        choice = answer.json()["choices"][0]
        assert choice["message"]["content"] == STOPPED and answer.json()["usage"]["total_tokens"] == 0
    assert choice["finish_reason"] == "content_filter"


FLAGGED = {
    "an answer": [{"content": "Take copper."}],
    "one of two": [{"content": "Take tin."}, {"content": "Take copper."}],
    "a refusal": [{"content": None, "refusal": "No copper."}],
    "a tool's arguments": [{"content": None, "tool_calls": [{"function": {"name": "buy", "arguments": '{"a":"copper"}'}}]}],
    "its reasoning": [{"content": "Yes.", "reasoning_content": "They want copper."}],
}


@pytest.mark.parametrize("name", FLAGGED)
def test_a_flagged_answer_is_not_handed_back(guarded, target, copper, name):
    target.answer = answers(200, says(*FLAGGED[name]))
    answer = ask(guarded[1], PLAIN)
    assert how(answer) == ("unchanged", "response") and answer.json()["choices"][0]["finish_reason"] == "content_filter"
    assert "opper" not in answer.text and len(copper) == 1 + len(FLAGGED[name])


TIN = json.loads(says({"content": "Take tin."}))
HIDDEN = {
    "beside the choices": json.dumps(TIN | {"note": "copper"}),
    "as a key": json.dumps(TIN | {"choices": [{"message": {"tool_calls": [{"function": {"arguments": {"copper": 1}}}]}}]}),
    "deep": json.dumps(TIN | {"choices": [{"message": {"content": "tin", "more": [{"id": "copper"}]}}]}),
    "in a long name": json.dumps(TIN | {"model": "x" * 400 + "copper"}),
    "in a stream's names": "".join(f'data: {{"id": "{n} {"x" * 50} copper", "choices": []}}\n\n' for n in range(9)) + "data: [DONE]\n\n",
    "in a stream's error": 'data: {"error": {"message": "copper"}}\n\ndata: [DONE]\n\n',
    "in pieces": event(5, content="cop") + event(1, content="tin") + event(5, content="per") + "data: [DONE]\n\n",
}


@pytest.mark.parametrize("name", HIDDEN)
def test_all_that_an_answer_says_is_judged(guarded, target, copper, name):
    kind = "text/event-stream" if HIDDEN[name].startswith("data") else "application/json"
    target.answer = answers(200, HIDDEN[name], kind=kind)
    answer = ask(guarded[1], PLAIN)
    assert how(answer) == ("unchanged", "response") and "copper" not in answer.text


def test_what_was_not_judged_is_not_handed_back(guarded, target, copper):
    twice = says({"content": "Take tin."}).replace('"choices"', '"choices": [{"message": {"content": "Take copper."}}], "choices"')
    target.answer = answers(200, twice)
    answer = ask(guarded[1], PLAIN)
    assert how(answer) == ("unchanged", "passed") and answer.json() == TIN and "copper" not in answer.text
    target.answer = answers(200, json.dumps(TIN | {"choices": [TIN["choices"][0] | {"logprobs": {"content": [{"bytes": [99, 111]}]}}]}))
    assert ask(guarded[1], PLAIN).json()["choices"][0]["logprobs"] is None
    noise = ": copper\n\nevent: copper\nid: copper\n"
    target.answer = answers(200, noise, event(content="tin"), "data: [DONE]\n\n", kind="text/event-stream")
    assert ask(guarded[1], PLAIN, stream=True).text == event(content="tin") + "data: [DONE]\n\n"
    target.answer = answers(429, '{"error": {"message": "copper"}}', headers=[(b"retry-after", b"7")])
    answer = ask(guarded[1], PLAIN)
    refused(answer, 429, "upstream_failed")
    assert answer.headers["retry-after"] == "7" and "copper" not in answer.text


def test_more_answers_than_the_queue_takes(guarded, target, copper, model):
    number = 2 * model.engine.queue + 1
    target.answer = answers(200, says(*[{"content": f"Take {'tin' if n else 'copper'}."} for n in reversed(range(number))]))
    assert how(ask(guarded[1], PLAIN)) == ("unchanged", "response") and len(copper) == 1 + number


@pytest.mark.parametrize("word", ["copper", "silver"])
def test_a_stream_is_held_until_it_is_judged(guarded, target, copper, word):
    events = [event(content="Take "), event(content=word[:3]), ": a comment\n\n", event(content=word[3:]), "data: [DONE]\n\n"]
    target.answer = answers(200, *events, kind="text/event-stream")
    answer = ask(guarded[1], PLAIN, stream=True)
    assert copper[1].response == f"Take {word}"  # in whole, not in its pieces
    if word == "silver":
        assert answer.text == "".join(one for one in events if one[0] == "d") and how(answer) == ("unchanged", "passed")
    else:
        assert how(answer) == ("unchanged", "response") and "Take" not in answer.text and answer.text.endswith("data: [DONE]\n\n")


def test_openais_client_reads_a_judged_stream(guarded, copper):
    with openai.OpenAI(base_url=f"{guarded[1].base_url}/v1", api_key=KEY, max_retries=0) as client:
        stream = client.chat.completions.create(model="tiny", messages=user(PLAIN)["messages"], stream=True, max_tokens=5, temperature=0)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        [stopped] = client.chat.completions.create(model="tiny", messages=user("copper")["messages"], stream=True)
    assert copper[1].response == said and stopped.choices[0].finish_reason == "content_filter"


def test_a_guard_by_its_scores(guarded, target, monkeypatch):
    monkeypatch.setattr(guarded[0], "serving", replace(guarded[0].serving, how=How(threshold=0.0)))
    answer = ask(guarded[1], PLAIN)
    assert how(answer) == ("unchanged", "request") and not target.requests


def test_what_cannot_be_judged_goes_nowhere(guarded, target, copper, monkeypatch):
    target.answer = answers(200, says({"content": "vault " * 400}))
    answer = ask(guarded[1], PLAIN)
    refused(answer, 502, "not_judged")
    assert how(answer) == ("unchanged", "response") and "vault" not in answer.text
    target.answer = answers(200, '{"output": "Take copper."}')
    refused(ask(guarded[1], PLAIN), 502, "upstream_failed")
    target.answer = answers(200, event(content="Take "), "data: {\n\n", "data: [DONE]\n\n", kind="text/event-stream")
    refused(ask(guarded[1], PLAIN, stream=True), 502, "upstream_failed")
    target.answer = answers(200, event(content="Take "), kind="text/event-stream")
    refused(ask(guarded[1], PLAIN, stream=True), 502, "upstream_broke_off")
    target.requests.clear()
    monkeypatch.setattr(Guard, "verdict", lambda *_: 1 / 0)
    refused(ask(guarded[1], PLAIN), 500, "internal_error")
    assert not target.requests


# --- the bypass --------------------------------------------------------------------------------------------------------------------


def test_the_bypass(http, target, caplog):
    body = json.dumps(user(BAD) | {"model": "tiny", "max_tokens": 3}).encode()
    counted = lambda: http.get("/metrics").text.partition("\npgjax_bypasses_total ")[2].split("\n")[0]  # noqa: E731
    before = float(counted())
    with caplog.at_level("INFO", "pgjax.serving"):
        answer = http.post(CHAT, content=body, headers={"X-Pgjax-Bypass": BYPASS, "X-Request-Id": "walk-7"})
    assert answer.status_code == 200 and how(answer) == ("bypassed", "off") and not Ruled.asked
    [got] = target.requests
    assert got.body == body and b"x-pgjax-bypass" not in got.headers and BYPASS.encode() not in b"".join(got.headers.values())
    assert "bypass: neither rewritten nor judged walk-7" in caplog.text and "moonglass" not in caplog.text
    assert float(counted()) == before + 1
    answer = http.post(CHAT, content=b"x" * (LIMITS.body + 1), headers={"X-Pgjax-Bypass": BYPASS})
    refused(answer, 413, "body_too_large")
    assert how(answer) == ("bypassed", "off") and float(counted()) == before + 1  # nothing was sent


def test_a_wrong_bypass_key_passes_nothing(http, guarded, target):
    for wrong in ("", "side", BYPASS + "s", KEY):
        refused(ask(http, PLAIN, headers={"X-Pgjax-Bypass": wrong}), 401, "invalid_bypass_key")
    for any_key in ("", BYPASS, KEY):  # this gateway has none
        refused(ask(guarded[1], PLAIN, headers={"X-Pgjax-Bypass": any_key}), 401, "invalid_bypass_key")
    with httpx2.Client(base_url=http.base_url) as stranger:
        refused(ask(stranger, PLAIN, headers={"X-Pgjax-Bypass": BYPASS}), 401, "invalid_api_key")
    assert not target.requests


# --- a target in trouble -----------------------------------------------------------------------------------------------------------


def test_a_targets_errors_are_handed_back(http, target):
    answer = ask(http, PLAIN, model="other")
    refused(answer, 404, "model_not_found")
    assert how(answer) == ("unchanged", "off")
    target.answer = answers(429, '{"error": {"message": "slowly"}}', headers=[(b"retry-after", b"7")])
    answer = ask(http, PLAIN)
    assert (answer.status_code, answer.headers["retry-after"], answer.json()) == (429, "7", {"error": {"message": "slowly"}})
    target.answer = answers(500, "<p>oh", kind="text/html")
    refused(ask(http, PLAIN), 500, "upstream_failed")
    target.answer = answers(302, "", headers=[(b"location", b"/v1/else")])
    refused(ask(http, PLAIN), 502, "upstream_failed")
    target.answer = answers(200, "<p>oh", kind="text/html")
    refused(ask(http, PLAIN), 502, "upstream_failed")


@pytest.mark.parametrize("status", [401, 403, 407])
def test_what_a_target_says_of_the_key_is_not_handed_back(http, target, status, caplog):
    target.answer = answers(status, f'{{"error": {{"message": "wrong key {UPSTREAM_KEY}"}}}}')
    for answer in (ask(http, PLAIN), ask(http, PLAIN, headers={"X-Pgjax-Bypass": BYPASS}), http.get("/v1/models")):
        refused(answer, 502, "upstream_refused")
        assert UPSTREAM_KEY not in answer.text
    assert f"does not let this one in: {status}" in caplog.text and UPSTREAM_KEY not in caplog.text


def test_a_target_that_is_not_there(model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        with gateway_to(f"http://127.0.0.1:{free.getsockname()[1]}/v1", model, SERVING) as (_, http):
            refused(ask(http, PLAIN), 502, "upstream_unreachable")
            refused(http.get("/v1/models"), 502, "upstream_unreachable")
            assert http.get("/readyz").status_code == 200


def test_a_target_that_is_slow(http, target):
    slowly = {"X-Request-Timeout": "1"}
    ask(http, PLAIN)  # and the rewrite is kept
    target.answer = answers(200, says({"content": "at last"}), wait=5)
    refused(ask(http, PLAIN, headers=slowly), 504, "timeout")
    target.answer = answers(200, *[event(content="a")] * 60, kind="text/event-stream")
    answer = ask(http, PLAIN, headers=slowly, stream=True)
    assert answer.text.startswith(event(content="a")) and '"code": "timeout"' in answer.text and answer.text.endswith("data: [DONE]\n\n")


def holds(*parts: str):
    """An answer whose connection stays open, and the event that ends it."""
    left = threading.Event()

    async def answer(send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": "".join(parts).encode(), "more_body": True})
        while not left.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b""})

    return answer, left


def test_a_stream_ends_where_it_says_so(http, target):
    target.answer, left = holds(event(content="tin"), "data: [DONE]\n")
    answer = ask(http, PLAIN, stream=True)
    left.set()
    assert answer.text.rstrip("\n") == event(content="tin") + "data: [DONE]" and answer.text.endswith("\n\n")


def test_streams_under_way_leave_room(http, target, model):
    target.answer, left = holds(event(content="tin"))
    with ExitStack() as opened:
        for _ in range(model.engine.rows + model.engine.queue + 1):
            body = user(PLAIN) | {"model": "tiny", "stream": True}
            assert opened.enter_context(http.stream("POST", CHAT, json=body)).status_code == 200
        left.set()


def test_a_stream_that_nobody_reads_ends(http, target, monkeypatch, caplog):
    async def floods(send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(200):
            await send({"type": "http.response.body", "body": (b"x" * 1023 + b"\n") * 128, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    ask(http, PLAIN)  # and the rewrite is kept
    target.answer = floods
    monkeypatch.setattr("pgjax.rewriter.gateway.GRACE", 0.1)
    data = json.dumps(user(PLAIN) | {"model": "tiny", "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nX-Request-Timeout: 2\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((http.base_url.host, http.base_url.port))
        sock.sendall(head.encode() + data)
        until(lambda: "was not read by its deadline" in caplog.text)


BROKEN = {
    "in an event": ([event(content="Take "), 'data: {"choices": [{"cut'], True),
    "between two": ([event(content="Take ")], True),
    "in good order, but for the end": ([event(content="Take "), event(content="tin.")], False),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_stream_that_breaks_off_is_seen(client, http, target, name):
    parts, breaks = BROKEN[name]
    target.answer = answers(200, *parts, kind="text/event-stream", breaks=breaks)
    said = ask(http, PLAIN, stream=True).text
    assert said.startswith(parts[0]) and '"cut' not in said and said.count("[DONE]") == 1
    stream = client.chat.completions.create(model="tiny", messages=user(PLAIN)["messages"], stream=True)
    assert next(stream).choices[0].delta.content == "Take "
    with pytest.raises(openai.APIError, match="before it was whole"):
        list(stream)


def test_an_answer_that_breaks_off_or_never_ends(http, target, monkeypatch):
    target.answer = answers(200, says({"content": "Take "})[:40], breaks=True)
    refused(ask(http, PLAIN), 502, "upstream_broke_off")
    monkeypatch.setattr("pgjax.rewriter.upstream.LARGEST_REPLY", 500)
    target.answer = answers(200, says({"content": "Take " * 200}))
    refused(ask(http, PLAIN), 502, "upstream_failed")
    target.answer = answers(200, *[event(content="Take ")] * 20, "data: [DONE]\n\n", kind="text/event-stream")
    assert '"code": "upstream_failed"' in ask(http, PLAIN, stream=True).text
    monkeypatch.undo()
    monkeypatch.setattr("pgjax.rewriter.upstream.LONGEST_LINE", 500)
    target.answer = answers(200, event(content="tin"), *["x" * 300] * 3, "\n", kind="text/event-stream")
    said = ask(http, PLAIN, stream=True).text
    assert said.startswith(event(content="tin")) and "a line of more than 500 bytes" in said and "xx" not in said


@pytest.mark.parametrize("waits_for", ["rewriter", "target", "stream"])
def test_who_hangs_up_gives_the_row_back(http, target, behind, model, waits_for, monkeypatch):
    engine = model.engine if waits_for == "rewriter" else behind[2].engine
    advance, submit, before = engine._advance, engine.submit, engine.counts.answers
    futures, left = [], threading.Event()
    monkeypatch.setattr(engine, "submit", lambda *args: futures.append(submit(*args)) or futures[-1])
    monkeypatch.setattr(engine, "_advance", lambda *args: (left.wait(60), advance(*args))[1])
    data = json.dumps(user(PLAIN) | {"model": "tiny", "temperature": 0, "stream": waits_for == "stream"}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port)) as sock:
        sock.sendall(head.encode() + data)
        until(lambda: futures and not engine.counts.waiting)  # it has a row
        if waits_for == "stream":
            assert b" 200 " in sock.recv(100)
    until(futures[0].cancelled)
    left.set()
    until(lambda: not any(engine._held))
    assert engine.counts.answers == before and len(target.requests) == (waits_for != "rewriter")


# --- the rest ----------------------------------------------------------------------------------------------------------------------


def test_models_are_the_targets(client, target):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert target.requests[0].headers[b"authorization"] == f"Bearer {UPSTREAM_KEY}".encode()


def test_metrics(guarded, target, copper):
    first, again, _ = ask(guarded[1], VAULT), ask(guarded[1], VAULT), ask(guarded[1], "copper")
    assert again.headers["x-pgjax-rewrite-tokens"] == first.headers["x-pgjax-rewrite-tokens"] != "0"  # nobody learns who asked before
    for words in ("copper", "vault " * 400):
        target.answer = answers(200, says({"content": words}))
        ask(guarded[1], PLAIN)
    seen = guarded[1].get("/metrics").text
    for line in (
        'pgjax_rewrites_total{how="changed"}',
        "pgjax_rewrite_seconds_count",
        'pgjax_upstream_total{status="200"}',
        "pgjax_bypasses_total 0.0",
        *(f'pgjax_guarded_total{{outcome="{outcome}"}}' for outcome in ("passed", "request", "response", "not_judged")),
        'pgjax_flagged_total{route="/v1/chat/completions"}',
        "pgjax_waiting 0.0",
        "pgjax_guard_waiting 0.0",
        'pgjax_requests_total{route="/v1/chat/completions",status="200"}',
    ):
        assert line in seen, line


TO = ["--upstream", "http://127.0.0.1:9/v1"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--rewriter"),
        (["--rewriter", "gone"], "--upstream"),
        (["--model", "gone", *TO], "--rewriter"),
        (["--model", "gone", "--bypass-key-file", "gone"], "--rewriter"),
        (["--rewriter", "gone", "--upstream", "http://pictures.example/v1"], "--allow-remote"),
        (["--rewriter", "gone", "--upstream", "http://127.0.0.1.pictures.example/v1"], "--allow-remote"),
        (["--rewriter", "gone", "--upstream", "127.0.0.1:9/v1"], "http(s)://HOST/v1"),
        (["--rewriter", "gone", "--upstream", "http://me:word@127.0.0.1/v1"], "http(s)://HOST/v1"),
        (["--rewriter", "gone", "--upstream", "http://[::1/v1"], "http(s)://HOST/v1"),
        (["--rewriter", "gone", "--upstream", "http://127.0.0.1:9/v1?"], "http(s)://HOST/v1"),
        (["--rewriter", "gone", "--upstream", "http://127.0.0.1:9"], "http(s)://HOST/v1"),
        (["--rewriter", "gone", *TO, "--upstream-key-file", "none.key"], "--upstream-key-file none.key"),
        (["--rewriter", "gone", *TO, "--bypass-key-file", "none.key"], "--bypass-key-file none.key"),
        (["--rewriter", "gone", "--upstream", "http://127.0.0.1:99999/v1"], "http(s)://HOST/v1"),
        (["--rewriter", "gone", "--upstream", "http://127.0.0.1:9/v1/../x/v1"], "http(s)://HOST/v1"),
        (["--rewriter", "gone", "--upstream", "http://v1"], "http(s)://HOST/v1"),
        *(
            (["--rewriter", "gone", *TO, *flags], f"{flags[0]} is for a guard")
            for flags in (["--policy", "a"], ["--categories", "C1"], ["--threshold", "0.5"], ["--samples", "2"], ["--mode", "fast"])
        ),
        (["--rewriter", "gone", *TO, "--unbound"], "--unbound is for a guard"),
        (["--rewriter", "gone", *TO, "--name", "a"], "--name is for a guard"),
        (["--rewriter", "gone", *TO, "--port", "0", "--prompt-tokens", "-3"], "prompt tokens -3 must be 1 or more"),
        (["--rewriter", "gone", *TO, "--port", "0"], "gone is not a run folder"),
        (["--rewriter", "gone", *TO, "--port", "0", "--queue", "0"], "must be 1 or more"),
    ],
)
def test_wrong_usage_is_one_line(capsys, flags, says):
    assert main(["serve", *flags]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and "word@" not in said.err and not said.out


@pytest.mark.parametrize("keys", [("api", "bypass"), ("api", "upstream"), ("bypass", "upstream")])
def test_each_key_is_another(tmp_path, capsys, keys):
    flags = []
    for name in ("api", "bypass", "upstream"):
        (tmp_path / name).write_text("one-word" if name in keys else name)
        flags += [f"--{name}-key-file", str(tmp_path / name)]
    assert main(["serve", "--rewriter", "gone", *TO, *flags]) == 2
    said = capsys.readouterr().err
    assert "different keys" in said and "one-word" not in said


def test_a_key_of_the_environment_is_checked_as_that_of_a_file(tmp_path, capsys, monkeypatch):
    for wrong in (" \n", "a b", "gl\u00e4ss"):
        monkeypatch.setenv("PGJAX_UPSTREAM_KEY", wrong)
        assert main(["serve", "--rewriter", "gone", *TO]) == 2
        assert "PGJAX_UPSTREAM_KEY must hold one word" in capsys.readouterr().err
    for value, key in ((f"{UPSTREAM_KEY}\n", UPSTREAM_KEY), ("", None)):
        monkeypatch.setenv("PGJAX_UPSTREAM_KEY", value)
        assert read_key("--upstream-key-file", None, "PGJAX_UPSTREAM_KEY") == key


def test_the_command_as_a_process(run, tmp_path):
    """A rewriter of random weights writes no rewrite: with --fail-open what was asked goes on."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    with toy_server() as toy:
        flags = ["--rewriter", str(run), "--upstream", toy.url, "--port", "0", "--prompt-tokens", "640", "--fail-open"]
        command = [sys.executable, "-m", "pgjax.cli", "serve", *flags, "--rows", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True) as process:
            try:
                url = process.stdout.readline().split()[-1]
                with openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=300) as client:
                    asked = client.chat.completions.with_raw_response
                    raw = asked.create(model="toy-target", messages=user("How can I clean the brass vault?")["messages"])
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait() == 0
        assert how(raw) == ("fallback", "off") and raw.parse().choices[0].message.content and toy.calls["toy-target"] == 1


def test_the_command(model, tmp_path, monkeypatch):
    (tmp_path / "bypass").write_text(f"{BYPASS}\n")
    monkeypatch.setenv("PGJAX_UPSTREAM_KEY", UPSTREAM_KEY)
    monkeypatch.setattr(Guard, "load", lambda *_, **__: nullcontext(model))
    monkeypatch.setattr(Rewriter, "load", lambda *_, **__: nullcontext(rewriter_of(model)))
    ran: list = []
    monkeypatch.setattr("pgjax.serving.server.run", lambda *args: ran.append(args))
    flags = ["--rewriter", "r", "--upstream", "https://models.example/v1/", "--allow-remote", "--bypass-key-file", str(tmp_path / "bypass")]
    for more in ([], ["--model", "guard", "--categories", "C1S1"]):
        assert main(["serve", *flags, "--port", "0", *more]) == 0
    for (gateway, _, endpoints), guard in zip(ran, (None, model), strict=True):
        assert endpoints == ENDPOINTS and (gateway.judge.model if gateway.judge else None) is guard
        assert (gateway.target.url, gateway.target.key, gateway.bypass) == ("https://models.example/v1", UPSTREAM_KEY, BYPASS)
