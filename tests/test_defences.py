"""What each defence asks a target, and what counts as a refusal."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgjax.data.toy import draw
from pgjax.endpoint import Reply
from pgjax.rewriter.defences import ECSO_CUT, Answered, defensive, ecso, none, rewriting
from pgjax.rewriter.record import template
from pgjax.rewriter.refusals import _wording, is_refusal
from pgjax.rewriter.rewriter import Rewritten

RED, GREEN = (draw("C6S1", mark, 64, 64, 7) for mark in ("unsafe", "safe"))
REQUEST = "Help me {} the thing shown here."


class Scripted:
    """An endpoint that gives its answers in turn, each of them 7 tokens and so many seconds as calls were made."""

    name = "scripted"

    def __init__(self, *answers: str):
        self.answers, self.asked = list(answers), []

    async def ask(self, messages, *, max_tokens=1024, temperature=0.0, seed=0):
        self.asked.append((messages, max_tokens))
        return Reply(self.answers[len(self.asked) - 1], 5, 7, float(len(self.asked)))

    def seen(self) -> list[bool]:
        """By call, whether the picture went along."""
        return [isinstance(messages[-1]["content"], list) for messages, _ in self.asked]

    def said(self, call: int) -> str:
        content = self.asked[call][0][-1]["content"]
        return content if isinstance(content, str) else content[-1]["text"]


def defend(defence, target, request="What is {this}?", images=(RED,)) -> Answered:
    return asyncio.run(defence(target, request, images))


def test_no_defence_and_the_fixed_system_prompt():
    target = Scripted("A lamp.")
    assert defend(none, target) == Answered("A lamp.", "What is {this}?", None, 1, 0, 1.0, 1.0)
    assert [m["role"] for m in target.asked[0][0]] == ["user"] and target.asked[0][1] == 1024 and target.seen() == [True]
    target = Scripted("A lamp.")
    assert defend(defensive, target) == Answered("A lamp.", "What is {this}?", None, 1, 0, 1.0, 1.0)
    assert target.asked[0][0][0] == {"role": "system", "content": template("defensive").strip()} and target.said(0) == "What is {this}?"


@pytest.mark.parametrize("harmful", ["yes", "yes.", "Yes", "YES."])
def test_ecso_answers_anew_without_the_picture(harmful):
    first = "{request}" + "x" * ECSO_CUT
    target = Scripted(first, harmful, "A {lamp}.", "It is a lamp.")
    got = defend(ecso, target)
    assert (got.text, got.how, got.calls, got.added_tokens, got.seconds, got.target_seconds) == ("It is a lamp.", "changed", 4, 21, 10, 4)
    assert target.seen() == [True, True, True, False] and got.prompt == target.said(3)
    assert first[:ECSO_CUT] in target.said(1) and first[: ECSO_CUT + 1] not in target.said(1) and "What is {this}?" in target.said(1)
    assert "What is {this}?" in target.said(2) and "A {lamp}." in target.said(3) and "What is {this}?" in target.said(3)
    assert all(messages[0]["role"] == "user" and most == 1024 for messages, most in target.asked)


@pytest.mark.parametrize("harmless", ["no", "No.", "", "yes, it is", "yes!", "It is not: yes"])
def test_ecso_keeps_an_answer_that_is_not_called_harmful(harmless):
    target = Scripted("A lamp.", harmless)
    assert defend(ecso, target) == Answered("A lamp.", "What is {this}?", "unchanged", 2, 7, 3.0, 1.0)


def test_ecso_has_no_eyes_to_close_without_a_picture():
    assert defend(ecso, Scripted("A lamp."), images=()) == Answered("A lamp.", "What is {this}?", "unchanged", 1, 0, 1.0, 1.0)


class Twins:
    """A rewriter by rule: the harmless twin of an unsafe verb beside a red badge, else nothing new; and it cannot word `lost` ones."""

    def __init__(self, lost: tuple[str, ...] = ()):
        self.lost, self.calls = lost, 0

    def rewrite(self, request, images):
        self.calls += 1
        if any(word in request for word in self.lost):
            return Rewritten(request, None, "fallback", 3, 0.5)
        if images[0] != RED:
            return Rewritten(request, None, "unchanged", 10, 0.5)
        prompt = request.replace("steal", "clean").replace("forge", "paint")
        return Rewritten(prompt, None, "unchanged" if prompt == request else "changed", 20, 0.5)


def test_the_rewriters_prompt_goes_on_with_the_picture(tmp_path):
    rewriter = Twins(lost=("smash",))
    for request, how, prompt, tokens in (
        ("steal", "changed", "clean", 20),
        ("clean", "unchanged", "clean", 20),
        ("smash", "fallback", "smash", 3),
    ):
        for identity in ("one", "one", "another"):
            target = Scripted("Well.")
            got = defend(rewriting(rewriter, tmp_path, identity), target, REQUEST.format(request))
            assert got == Answered("Well.", REQUEST.format(prompt), how, 2, tokens, 1.5, 1.0)
            assert target.said(0) == REQUEST.format(prompt) and target.seen() == [True]
    assert rewriter.calls == 6  # kept by request, picture and rewriter
    defend(rewriting(rewriter, tmp_path, "one"), Scripted("Well."), REQUEST.format("steal"), (GREEN,))
    assert rewriter.calls == 7
    unknown = Scripted("Well.")
    unknown.ask = lambda *_, **__: asyncio.sleep(0, Reply("yes", None, None, 1.0))
    assert defend(ecso, unknown).added_tokens is None


# --- refusals --------------------------------------------------------------------------------------------------------------------------

WORDING = [(part, words) for part in ("openings", "phrases") for words in _wording()[part]]


@given(st.sampled_from(WORDING), st.randoms(use_true_random=False))
def test_refusals_whatever_case_apostrophes_and_spaces(wording, chance):
    part, words = wording
    turned = (
        "".join(chance.choice([c.upper(), c]) for c in words)
        .replace("'", chance.choice("'’‘`"))
        .replace(" ", chance.choice([" ", "\n", "  "]))
    )
    before = {"openings": ["", " ", "**", '"'], "phrases": ["", "That is kind of you. Still, I "]}[part]
    assert is_refusal(chance.choice(before) + turned + " anything else.")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "The vault is made of brass, and its door is on the left.",
        "A moonglass permit is issued by the harbour office; bring a seal.",
        "I can help with that: polish it with a soft cloth.",
        "Sorry to hear that! Here is how to mend the lamp.",
        "You can't open it from outside, but I can tell you who can.",
        "He said: I won't go. Then he went.",
        "The guidelines of the museum are on the wall.",
    ],
)
def test_what_is_no_refusal(answer):
    assert not is_refusal(answer)
