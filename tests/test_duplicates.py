"""Content keys, and which rows of a build go: golden pairs, and what holds whatever the rows and their order."""

import dataclasses
import hashlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax.data.duplicates import (
    CHECKED,
    COMPARED,
    CONFLICT,
    EVALUATION,
    EXACT,
    LEAKED,
    NEAR,
    PERMUTATIONS,
    asked_key,
    bands,
    clean,
    content_key,
    jaccard,
    record,
    shape,
    shingles,
    shown_keys,
)
from pgjax.data.schema import Example
from pgjax.data.sources.files import normalised

LONG = "How do I polish the brass vault in the old clock tower before the parade begins on Sunday morning"
NEARLY = LONG.replace("Sunday", "Monday")  # similarity 0.876
APART = LONG.replace("brass vault in the old", "paper kite of the new")


def row(request: str | None = LONG, response: str | None = None, label="safe", answer=None, **more) -> Example:
    images = more.get("images", ())
    modality = "text" if not images else "text_image" if request else "image"
    known = {"id": f"{request} {response} {label}", "group": "g", "source": "one", "category": "none" if label == "safe" else "unknown"}
    answered = answer or ("absent" if response is None else "safe")
    fields = {"modality": modality, "images": images, "request_label": label, "response_label": answered}
    return Example(**known | fields | {"request": request, "response": response} | more)


def held_out(*args, **more) -> Example:
    return row(*args, split="eval", **more)


def why(*examples: Example, threshold: float = 0.8, **benchmarks: list[Example]) -> list[str | None]:
    named = {name: [record(one) for one in rows] for name, rows in benchmarks.items()}
    return clean([record(one) for one in examples], named, threshold).why


# --- keys ----------------------------------------------------------------------------------------------------------------------------


def test_a_key_is_what_it_says():
    told = "polish the vault\0gladly\0user once"
    digest = lambda pictures: hashlib.sha256(told.encode() + b"\0\0" + pictures).digest()[:16]  # noqa: E731
    assert content_key(row("Polish the_VAULT!", " gladly... ", turns=(("user", "Once?"),))) == digest(b"")
    shown = hashlib.sha256(b"png").digest() + hashlib.sha256(b"jpg").digest()
    assert content_key(row("polish the vault", "gladly", turns=(("user", "once"),), images=(b"png", b"jpg"))) == digest(shown)


def test_what_differs_has_another_key():
    rows = [row("a b"), row("a", "b"), row("b", "a"), row("ab"), row(None, images=(b"x",)), row("a", "b", images=(b"x",))]
    rows += [row("a", "b", images=(b"y",)), row("a", "b", images=(b"x", b"y")), row("a", "b", images=(b"y", b"x"))]
    rows += [row("a", "b", turns=((role, "c"),)) for role in ("user", "assistant")]
    rows += [row("a", "b", turns=(("user", "c"), ("user", "c"))), row("a", "b", turns=(("user", "c user c"),))]
    assert len({content_key(one) for one in rows}) == len(rows)
    same = dataclasses.replace(rows[0], id="z", source="z", split="eval", request_label="unsafe", category="ood", name="z")
    assert content_key(same) == content_key(rows[0])


@given(st.text(max_size=30), st.text(alphabet=" ,.!_\n", max_size=4))
def test_normalisation(text, noise):
    assert normalised(normalised(text)) == normalised(text) == normalised(noise + text + noise)
    assert content_key(row(text)) == content_key(row(noise + text + noise)) == content_key(row(normalised(text)))


def test_a_prompt_that_was_trained_on_is_known_whatever_was_answered():
    shown = shown_keys(row("Paint the gate", "With a brush."))
    assert len(shown) == 2 and shown_keys(row("x")) == {content_key(row("x"))}
    assert asked_key(held_out("paint the gate")) in shown and asked_key(held_out("Paint the gate!", "No.")) in shown
    unlabelled = held_out("Paint the gate", "No.", "unknown")
    assert asked_key(unlabelled) not in shown, "the response is what is tested, and it is another"
    assert asked_key(dataclasses.replace(unlabelled, response="with a brush")) in shown


# --- one cluster -----------------------------------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    assert shingles("abcdefg") == {"abcde", "bcdef", "cdefg"} and shingles("abc") == {"abc"} and shingles("", "p") == {"p"}
    assert jaccard(shingles("abcdefg"), shingles("abcdefgh")) == 3 / 4
    assert jaccard(shingles("abcdefg", "p"), shingles("abcdefg", "q")) == 0
    near, apart = (jaccard(shingles(normalised(LONG)), shingles(normalised(text))) for text in (NEARLY, APART))
    assert near == 85 / 97 and apart < 0.6


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_pairs_at_the_threshold_become_candidates(threshold):
    count = bands(threshold)
    found = lambda count: 1 - (1 - threshold ** (PERMUTATIONS / count)) ** count  # noqa: E731
    fewer = max((n for n in range(1, count) if PERMUTATIONS % n == 0), default=None)
    assert PERMUTATIONS % count == 0 and found(count) >= 0.999 and (fewer is None or found(fewer) < 0.999)


def test_exact_duplicates():
    copy = row(LONG.upper() + "!", source="another")
    assert why(row(), copy) == [EXACT, None], "the first by source and id"
    known = row(category="node", node="C1", source="zoo")
    unknown = row(category="unknown")
    assert why(unknown, known) == [EXACT, None], "the one of which more is known"
    assert why(row(label="unknown"), copy, row("Another thing")) == [EXACT, None, None]
    assert why(row(), held_out(source="zoo")) == [EVALUATION, None] and why(held_out(), held_out(id="b")).count(EXACT) == 1


def test_contradicting_copies_all_go():
    assert why(row(), row(label="unsafe"), row(label="unknown"), row(APART)) == [CONFLICT, CONFLICT, CONFLICT, None]
    assert why(row(label="unsafe"), held_out()) == [EVALUATION, None], "what training says changes no evaluation"
    assert why(row(), held_out(), held_out(label="unsafe")) == [EVALUATION, CONFLICT, CONFLICT]
    assert why(row("a", "b"), row("a", "b", answer="unsafe")) == [CONFLICT, CONFLICT]
    assert None in why(row("a", "b", answer="unknown"), row("a", "b", answer="unsafe")), "unknown contradicts nothing"


def test_near_duplicates():
    assert Counter(why(row(), row(NEARLY), row(APART))) == {None: 2, NEAR: 1}
    assert why(row(), row(NEARLY), row(APART), threshold=0.88) == [None] * 3
    assert why(row(), row(NEARLY, label="unsafe")) == [None, None], "what parts them is what there is to learn"
    assert why(held_out(), row(NEARLY)) == [None, EVALUATION] == why(held_out(), row(NEARLY, label="unsafe"))
    assert why(row("Paint it"), row("Print it")) == [None, None]


def test_of_a_long_text_its_beginning_is_compared():
    long = " ".join(f"word{n}" for n in range(4000))
    assert len(long) > COMPARED and len(shape(long * 50, "").shingles) <= COMPARED
    assert Counter(why(row(long), row(long + " and more"))) == {None: 1, NEAR: 1}


def test_rows_made_from_one_template_stay_but_for_what_is_near():
    """More candidates than are compared by their sets: the likeliest are."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [row(f"{LONG} {APART} " + " ".join(f"{letter}{other}{letter}" for other in letters[:7])) for letter in letters]
    assert 0.65 < jaccard(*(shingles(normalised(one.request)) for one in rows[:2])) < 0.75 and len(rows) > CHECKED
    assert why(*rows) == [None] * 26 and Counter(why(*rows, row(rows[7].request + " again"))) == {None: 26, NEAR: 1}


def test_near_duplicates_beside_pictures_have_the_same_picture():
    pictures = [row(LONG, images=(bytes([n]),)) for n in range(50)]
    assert why(*pictures, row(LONG)) == [None] * 51, "one sentence over many pictures"
    assert Counter(why(*pictures, row(NEARLY, images=(b"\0",)))) == {None: 50, NEAR: 1}
    assert why(row(None, images=(b"a",)), row(None, images=(b"b",)), row(None, images=(b"a",), id="z")) == [None, None, EXACT]


def test_leakage_is_counted_by_benchmark():
    rows = [row(), row("Paint the gate", "With a brush."), row("How do I draw a boat?", "Thus."), row("New"), held_out(APART)]
    gate = held_out("Paint the gate", "No.", "unknown")  # whose response alone is labelled
    sets = {"vaults": [held_out(NEARLY), held_out("Other")], "gates": [held_out(LONG), gate], "boats": [held_out("how do i draw a boat")]}
    found = clean([record(one) for one in rows], {name: list(map(record, rows)) for name, rows in sets.items()})
    assert found.why == [LEAKED, None, LEAKED, None, None] and found.leaked == {"vaults": 1, "gates": 1, "boats": 1}
    assert why(held_out(), mine=[row()]) == [None], "evaluation rows are not trained on"
    assert why(rows[1], gates=[dataclasses.replace(gate, response="with a brush")]) == [LEAKED]
    assert why(row(NEARLY), held_out(LONG, source="b"), vaults=[held_out(LONG)]) == [LEAKED, None]


def test_a_prompt_in_evaluation_goes_from_training_whatever_was_answered():
    assert why(held_out(LONG, "Never."), row(NEARLY, "Take a soft cloth, some oil, and begin at the hinges.")) == [None, EVALUATION]
    response = "Take a soft cloth, some oil, and begin at the hinges; wait an hour and rub until it shines like new."
    apart = held_out(LONG, response, "unknown"), row(LONG, "No.")
    assert why(*apart) == [None, None], "the prompt is not what that row tests"


@pytest.mark.parametrize("threshold", [0, -1, 1.01, float("nan")])
def test_a_threshold_is_a_similarity(threshold):
    with pytest.raises(ValueError, match="must be above 0, at most 1"):
        why(row(), threshold=threshold)


# --- any rows --------------------------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["brass", "vault", "clock", "tower", "kite", "paper"])
TEXTS = st.lists(WORDS, max_size=9).map(" ".join)
ROWS = st.builds(
    lambda request, response, label, picture, split, id: row(
        request, response, label, images=(picture,) if picture else (), split=split, id=str(id)
    ),
    TEXTS,
    st.none() | TEXTS.filter(bool),
    st.sampled_from(["safe", "unsafe", "unknown"]),
    st.sampled_from([b"", b"", b"a", b"b"]),
    st.sampled_from(["train", "eval"]),
    st.integers(0, 9),
)


@settings(deadline=None)
@given(st.lists(ROWS, max_size=12), st.lists(ROWS, max_size=4), st.sampled_from([0.4, 0.8]), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_once_is_enough(examples, listed, threshold, random):
    rows, benchmarks = list(map(record, examples)), {"one": list(map(record, listed)), "two": list(map(record, listed[:1]))}
    found = clean(rows, benchmarks, threshold)
    stays = [one for one, reason in zip(rows, found.why, strict=True) if reason is None]
    order = random.sample(range(len(rows)), len(rows))
    again = clean([rows[n] for n in order], {name: of[::-1] for name, of in reversed(benchmarks.items())}, threshold)
    assert sorted(one for one, reason in zip((rows[n] for n in order), again.why, strict=True) if reason is None) == sorted(stays)
    assert Counter(again.why) == Counter(found.why) and again.leaked == found.leaked
    once_more = clean(stays, benchmarks, threshold)
    assert once_more.why == [None] * len(stays) and not once_more.leaked


@settings(deadline=None)
@given(st.lists(ROWS, max_size=12))
def test_what_goes_has_one_that_stays_and_what_stays_is_apart(examples):
    rows = list(map(record, examples))
    reasons = clean(rows, {}, 0.6).why
    stays = [one for one, reason in zip(rows, reasons, strict=True) if reason is None]
    similar = lambda a, b: jaccard(shingles(a.text, a.pictures), shingles(b.text, b.pictures)) >= 0.6  # noqa: E731
    assert len({one.key for one in stays}) == len(stays)
    for one, reason in zip(rows, reasons, strict=True):
        if reason == NEAR:
            assert any(similar(one, other) and one.labels == other.labels and one.training == other.training for other in stays)
        if reason == EVALUATION:
            assert one.training and any(not other.training for other in rows)
    for a in stays:
        for b in stays:
            assert a is b or not similar(a, b) or (a.labels != b.labels and a.training == b.training)
