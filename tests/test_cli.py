"""The command line: wrong usage is one line on stderr and exit status 2."""

import subprocess
import sys

import pytest

from pgjax.cli import main
from pgjax.data.rows import conversation
from pgjax.serving.verdict import printable, readable


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "no-such-recipe"], "no-such-recipe"),
        (["train", "toy", "--grpo.learnin-rate", "1"], "learning"),
        (["train", "toy", "--grpo.mini-prompts", "3"], "mini_prompts"),
        (["moderate", "--model", "no-such-run", "--request", "hello"], "no-such-run"),
        (["bank", "build", "--taxonomy", "no-such.yaml"], "no-such.yaml"),
        (["bank", "calibrate", "--bank", "no-such.npz"], "no-such.npz"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(argv, says, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and error.startswith("pgjax: ")


def test_the_command_starts():
    done = subprocess.run([sys.executable, "-m", "pgjax.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("train", "demo", "moderate", "reward", "bank"))


def test_a_conversation_knows_its_modality():
    assert conversation("hi", None, None).modality == "text"
    assert conversation("hi", "hello", b"x").modality == "text_image"
    assert conversation(None, None, b"x").modality == "image"
    with pytest.raises(ValueError, match="nothing to moderate"):
        conversation(None, "an answer alone", None)
    assert conversation("", "", b"x").modality == "image"  # an empty text is none
    with pytest.raises(ValueError, match="give the request too"):
        conversation(None, "an answer", b"x")


def test_what_a_guard_writes_is_one_bounded_printable_line():
    assert printable("a\nb\x1b[31m\u202ec", 80) == "a b [31m c"
    assert len(printable("x" * 500, 80)) == 80


def test_a_verdict_for_people():
    verdict = dict(request="unsafe", response=None, category_id=None, category_name="glow theft", in_policy=False)
    verdict |= dict(reasoning="why", parsed=True, not_a_guard=True, scores={"request": 0.875, "response": None}, calibrated=False)
    verdict |= dict(flagged=True, flagged_by="score", threshold=0.5)
    text = readable(verdict)
    assert "glow theft" in text and "not in the policy" in text and "not a guard" in text and "response" not in text
    assert "request:  unsafe  (unsafe: 0.88, not calibrated" in text and text.startswith("verdict:  flagged (score, from 0.5)")
    assert readable(verdict | {"id": "row\n7"}).startswith("--- row 7\n")
    nothing = dict(request=None, response=None, category_name=None, reasoning="", parsed=False, scores={"request": None, "response": None})
    closed = readable(verdict | nothing | {"flagged_by": "failure"})
    assert "flagged (no answer is in format: the guard fails closed)" in closed and "because" not in closed
    assert readable(verdict | nothing | {"flagged": False, "flagged_by": None}).startswith("verdict:  passed\n")
