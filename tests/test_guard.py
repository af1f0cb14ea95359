"""The guard as an object: verdicts of every modality, batches of one shape, nothing compiled twice, policies of other sizes."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from tiny_qwen import QUICK
from tiny_recipe import host_params, materials, tiny_recipe

from pgjax.cli import main
from pgjax.data.jsonl import Line
from pgjax.data.rows import conversation, conversation_of
from pgjax.data.toy import draw
from pgjax.parallel.mesh import make_mesh
from pgjax.serving.guard import ROWS, Guard
from pgjax.tokenizer import token_bytes
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.compilations import Compilations
from pgjax.train.run_folder import RunFolder
from pgjax.train.setup import make_setup
from pgjax.train.update import make_optimizer

SHOWN = ("C1S1", "C8S1")
KEYS = (
    *("request", "response", "category_id", "category_name", "in_policy"),
    *("reasoning", "scores", "parsed", "not_a_guard"),
)
POLICY = """
- {category: Paving, description: Wobbly stones., synonymous-phrase: [stones]}
- category: Paint
  description: Paint that is not dry.
  synonymous-phrase: [fresh paint]
  subcategories:
    - {name: Door, description: Doors., synonymous-phrase: [doors]}
    - {name: Wall, description: Walls., synonymous-phrase: [walls]}
    - {name: Roof, description: Roofs., synonymous-phrase: [roofs]}
    - {name: Gate, description: Gates., synonymous-phrase: [gates]}
"""


def ascii_params() -> dict:
    """Random weights that write ASCII: text that is no UTF-8 does not come back as the same tokens, and has no scores."""
    plain = np.zeros((tiny_recipe().model.text.vocab, 1), bool)
    for k, data in enumerate(token_bytes(materials().tokenizer)):
        plain[k] = data is not None and data.isascii()
    return jax.tree_util.tree_map_with_path(lambda path, x: x * plain if "embed_tokens" in jax.tree_util.keystr(path) else x, host_params())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, around random weights."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    recipe = dataclasses.replace(tiny_recipe(), devices=0)  # the process has its devices already
    RunFolder(path, recipe).close()
    materials().tokenizer.save_pretrained(path / "tokenizer")
    setup, config = make_setup(recipe.model, make_mesh(recipe.mesh)), recipe.grpo
    optimizer = make_optimizer(config.optimizer, config.steps * (config.prompts // config.mini_prompts))
    state = setup.state(jax.device_put(ascii_params(), setup.training), optimizer)
    checkpoints = Checkpoints(path / "checkpoints", 1)
    checkpoints.save(0, state)
    checkpoints.close()
    jit = jax.jit
    jax.jit = functools.partial(jit, compiler_options=QUICK)
    try:
        yield path
    finally:
        jax.jit = jit


@pytest.fixture(scope="module")
def guard(run):
    return Guard.load(run)


def picture(side: int = 84, badge: str = "unsafe") -> bytes:
    return draw("C8S1", badge, side, side, 5)


def inputs() -> list:
    return [
        conversation("How do I clean the brass vault?", None, None),
        conversation("How do I forge the moonglass permit?", "You should clean it.", None),
        conversation("Tell me how to open up the thing in the photo.", None, picture()),
        conversation(None, None, picture(64, "safe")),
        conversation("Tell me how to play with the object in this picture.", "Sorry, I would keep from it.", picture(70)),
    ]


@pytest.fixture(scope="module")
def verdicts(guard):
    """More conversations than a batch has rows, so that the second batch is filled up."""
    examples = (inputs() * 2)[: ROWS + 1]
    return examples, guard.moderate(examples, SHOWN)


def test_a_verdict_says_what_the_answer_says(guard, verdicts):
    for example, verdict in zip(*verdicts, strict=True):
        assert tuple(verdict) == KEYS and json.dumps(verdict)
        assert verdict["parsed"] is True and verdict["not_a_guard"] is True
        labels = [verdict["request"]] + ([] if example.modality == "image" else [verdict["response"]])
        assert set(labels) <= {"safe", "unsafe"} and (verdict["response"] is None) == (example.modality == "image")
        assert (verdict["in_policy"] is None) == ("unsafe" not in labels) == (verdict["category_name"] is None)
        if verdict["category_id"]:
            node = guard.taxonomy.by_id(verdict["category_id"])
            assert verdict["in_policy"] is True and verdict["category_name"] == node.name
            assert node.id in {"C1", "C8", *SHOWN} and not (example.modality == "text_image" and node.parent)
        else:
            assert not verdict["in_policy"]
        scores = verdict["scores"]
        assert 0 < scores["request"] < 1 and (scores["response"] is None) == (example.modality == "image")
        assert scores["response"] is None or 0 < scores["response"] < 1


def test_order_and_filling_change_nothing(guard, verdicts):
    """A row means the same alone, in a full batch and in one that is filled up."""
    examples, found = verdicts
    assert len({json.dumps(verdict["scores"]) for verdict in found[:5]}) == 5
    for index in (0, 3, ROWS):
        same(guard.moderate([examples[index]], SHOWN)[0], found[index])
    same(found[0], found[5])


def same(a: dict, b: dict) -> None:
    for line, score in a["scores"].items():
        assert score == b["scores"][line] or score == pytest.approx(b["scores"][line], abs=1e-4)
    assert {key: a[key] for key in KEYS if key != "scores"} == {key: b[key] for key in KEYS if key != "scores"}


def test_one_guard_answers_many_requests_and_compiles_once(guard, verdicts):
    guard.moderate(inputs()[:1], SHOWN)  # a lone conversation is a shape of its own
    compilations = Compilations()
    for example in inputs():
        guard.moderate([example], SHOWN)
    guard.moderate(inputs()[:2], ("C4S2",))
    guard.moderate(inputs() * 4, ("C9",))
    guard.moderate([conversation("Hello.", None, None)], ("C1S1", "C4S2"))
    assert compilations.take() == 0


def test_a_policy_of_the_users_own(run, tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY)
    own = Guard.load(run, file)
    assert own.automaton.ids[:6] == ("C1", "C1S1", "C1S2", "C1S3", "C1S4", "C2")
    shown = {"C1", "C2", "C2S1", "C2S2", "C2S3", "C2S4"}
    for verdict in own.moderate([inputs()[0], inputs()[3]]):
        assert verdict["parsed"] and verdict["category_id"] in shown | {None}
        assert verdict["category_id"] is None or verdict["category_name"] == own.taxonomy.by_id(verdict["category_id"]).name


@pytest.mark.parametrize(
    ("example", "categories", "says"),
    [
        (conversation("clean the vault " * 200, None, None, "row 7"), SHOWN, "row 7: with this policy the prompt has more than the 152"),
        (conversation(None, None, picture(400), "row 8"), SHOWN, "row 8: the images take more than the 64 patches"),
        (conversation(None, None, b"not a picture", "row 9"), SHOWN, "row 9: the image cannot be read"),
        (conversation("Hello.", None, None), (), "list fewer categories"),
        (conversation("Hello.", None, None), ("C77",), "C77"),
        (conversation("Hello.", None, None), ("C11S1",), "no category is left"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_runs(guard, monkeypatch, example, categories, says):
    monkeypatch.setattr(Guard, "_answer", lambda *_: pytest.fail("a batch ran"))
    with pytest.raises(ValueError, match=says):
        guard.verdicts([*inputs() * 3, example], categories)


# --- rows of a file ----------------------------------------------------------------------------------------------------------------


def test_a_row_is_a_conversation(tmp_path):
    (tmp_path / "badge.png").write_bytes(picture())
    read = lambda row: conversation_of(Line(tmp_path / "in.jsonl", 4, row))  # noqa: E731
    example = read({"request": "Hi", "response": None, "image": "badge.png", "id": 3})
    assert (example.modality, example.response, example.images) == ("text_image", None, (picture(),))
    assert read({"request": "", "image": "badge.png"}).modality == "image"
    assert read({"request": "Hi", "response": "Hello"}).response_label == "unknown"
    for row, says in (
        ({"request": "Hi", "respones": "Hello"}, "unknown key 'respones'; a row has id, request, response, image"),
        ({"id": 1}, "nothing to moderate"),
        ({"request": ["Hi"]}, "'request' must be text, not list"),
        ({"image": "gone.png"}, "gone.png"),
        ({"image": "in.jsonl"}, "in.jsonl"),
    ):
        (tmp_path / "in.jsonl").write_text("no picture")
        with pytest.raises(ValueError, match="in.jsonl line 4: ") as error:
            read(row)
        assert says in str(error.value)


def test_the_command(run, guard, tmp_path, capsys, monkeypatch):
    newest = lambda *asked: guard if asked == (run, None, False) else pytest.fail("another model")  # noqa: E731
    monkeypatch.setattr(Guard, "load", newest)
    (tmp_path / "badge.png").write_bytes(picture())
    rows = [{"id": "a", "request": "How do I clean the brass vault?"}, {"image": "badge.png"}, {"id": 7, "request": "Hi", "response": "Ok"}]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model", str(run), "--categories", *SHOWN]
    assert main(["moderate", *flags, "--jsonl", str(file), "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [verdict["id"] for verdict in said] == ["a", 2, 7] and all(tuple(verdict) == ("id", *KEYS) for verdict in said)
    assert main(["moderate", *flags, "--request", rows[0]["request"], "--json"]) == 0
    same(json.loads(capsys.readouterr().out), said[0])
    assert main(["moderate", *flags, "--image", str(tmp_path / "badge.png")]) == 0
    printed = capsys.readouterr().out
    assert f"request:  {said[1]['request']}" in printed and "not a guard" in printed and "response:" not in printed


@pytest.mark.parametrize(
    ("last", "says"),
    [("{", "line 3: not JSON"), ('{"image": "gone.png"}', "line 3: image"), ("{}", "line 3: nothing"), (None, "--jsonl brings its own")],
)
def test_a_wrong_line_is_an_error_before_anything_runs(run, tmp_path, capsys, monkeypatch, last, says):
    monkeypatch.setattr(Guard, "load", lambda *_: pytest.fail("a model was loaded"))
    file = tmp_path / "in.jsonl"
    file.write_text('{"request": "Hi"}\n\n' + (last or '{"request": "Hi"}') + "\n")
    more = ["--request", "Hi"] if last is None else []
    assert main(["moderate", "--model", str(run), "--jsonl", str(file), "--json", *more]) == 2
    out, error = capsys.readouterr()
    assert out == "" and says in error and error.count("\n") == 1
