"""A rewriter in use: what counts as a rewrite, and `pgjax rewrite`."""

import json
from contextlib import nullcontext

import pytest
from tiny_recipe import materials
from tiny_run import load_guard, make_run, rewriter_of

from pgjax.cli import main
from pgjax.data.toy import draw
from pgjax.rewriter.record import Report, Rewriting, answer_of
from pgjax.rewriter.rewriter import GROWTH, ROOM, Rewriter, rewritten

REPORT = Report(text="asks for\x1b[31m the vault", image="none", together="none")
ASKED = "How do I open\nthe brass vault?  "


def read(prompt: str, request: str = ASKED):
    return rewritten(request, answer_of(Rewriting(REPORT, prompt)), 7, 0.5, materials().tokenizer)


def test_what_is_a_rewrite():
    changed = read("Whom may I ask about the vault?")
    assert changed == ("Whom may I ask about the vault?", REPORT, "changed", 7, 0.5)
    same = read("How do I open the brass vault?")
    assert (same.prompt, same.how) == (ASKED, "unchanged")  # to the last space
    marked = "What does <think> or <|im_end|> mean?"  # which the rewriter is shown with its markup broken
    assert read("What does ‹think> or ‹|im_end|> mean?", marked)[:3] == (marked, REPORT, "unchanged")


@pytest.mark.parametrize("prompt", ["x" * (GROWTH * len(ASKED) + ROOM + 1), "Say so.<|im_end|>", "<|im_start|>system"])
def test_what_is_none_is_a_fallback_to_the_request(prompt):
    assert read(prompt) == (ASKED, None, "fallback", 7, 0.5)
    assert rewritten(ASKED, "Open it.", 7, 0.5, materials().tokenizer) == (ASKED, None, "fallback", 7, 0.5)


def test_the_longest_rewrite():
    assert read("x" * (GROWTH * len(ASKED) + ROOM)).how == "changed"


@pytest.fixture(scope="module")
def rewriter(tmp_path_factory):
    with load_guard(make_run(tmp_path_factory.mktemp("runs") / "tiny"), rows=4, queue=4, prompt_tokens=640) as model:
        yield rewriter_of(model)


def test_random_weights_fall_back(rewriter):
    made = rewriter.rewrite(ASKED, [draw("C8S1", "unsafe", 300, 300, 5)])
    assert made[:3] == (ASKED, None, "fallback") and made.tokens == 32 and made.seconds > 0


@pytest.mark.parametrize(("request_", "image", "says"), [("vault " * 600, b"", "shorten it"), (ASKED, b"no picture", "not an image")])
def test_what_does_not_fit_is_refused(rewriter, request_, image, says):
    with pytest.raises(ValueError, match=says):
        rewriter.ask(request_, [image] if image else [])


@pytest.fixture
def pgjax(rewriter, monkeypatch, capsys):
    """The command on this rewriter; its answers are those of a rule."""
    ruled = lambda _, request, told, seconds: read("Whom may I ask?", request) if "vault" in request else fallback(request)  # noqa: E731
    fallback = lambda request: rewritten(request, "", 3, 0.0, materials().tokenizer)  # noqa: E731
    monkeypatch.setattr(Rewriter, "read", ruled)
    monkeypatch.setattr(Rewriter, "load", lambda *_, **__: nullcontext(rewriter))

    def run(*flags: str) -> str:
        assert main(["rewrite", "--model", "r", *flags]) == 0
        return capsys.readouterr().out

    return run


def test_the_command_for_one_request(pgjax, tmp_path):
    (tmp_path / "a.png").write_bytes(draw("C8S1", "unsafe", 84, 84, 5))
    shown = pgjax("--request", ASKED, "--image", str(tmp_path / "a.png"))
    assert shown == "text:     asks for [31m the vault\nimage:    none\ntogether: none\nprompt:   Whom may I ask?\nhow:      changed\n"
    row = json.loads(pgjax("--request", ASKED, "--json"))
    assert row == {"prompt": "Whom may I ask?", "report": REPORT.model_dump(), "how": "changed", "tokens": 7, "seconds": 0.5}
    assert pgjax("--request", "Hello.").startswith("prompt:   Hello.\nhow:      fallback (the answer cannot be taken as a rewrite")
    assert json.loads(pgjax("--image", str(tmp_path / "a.png"), "--json"))["prompt"] == ""


def test_the_command_for_a_file(pgjax, tmp_path):
    (tmp_path / "a.png").write_bytes(draw("C8S1", "unsafe", 84, 84, 5))
    rows = [{"id": f"r{n}", "request": ("vault", "Hello.")[n % 2], "image": ("a.png", None)[n % 3 == 0]} for n in range(11)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"request": "vault"}])))
    made = [json.loads(line) for line in pgjax("--jsonl", str(tmp_path / "rows.jsonl")).splitlines()]
    assert [row["id"] for row in made] == [*(f"r{n}" for n in range(11)), 12]
    assert [row["how"] for row in made] == ["changed", "fallback"] * 5 + ["changed", "changed"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--jsonl"),
        (["--request", "a", "--jsonl", "rows.jsonl"], "--jsonl"),
        (["--jsonl", "none.jsonl"], "none.jsonl"),
        (["--request", "a", "--image", "none.png"], "none.png"),
        (["--request", "a"], "r is not a run folder"),
        (["--request", "a", "--rows", "0"], "must be 1 or more"),
        (["--request", "a", "--prompt-tokens", "-3"], "must be 1 or more"),
        (["--jsonl", "rows.jsonl"], "rows.jsonl line 1: unknown key 'response'"),
        (["--jsonl", "empty.jsonl"], "rows"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"request": "a", "response": "b"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["rewrite", "--model", "r", *flags]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and not said.out


def test_a_row_that_does_not_fit_is_named(rewriter, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Rewriter, "load", lambda *_, **__: nullcontext(rewriter))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"request": "a"}) + "\n" + json.dumps({"request": "vault " * 600}))
    assert main(["rewrite", "--model", "r", "--jsonl", str(tmp_path / "rows.jsonl")]) == 2
    assert "rows.jsonl line 2: the request takes" in capsys.readouterr().err
