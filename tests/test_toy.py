"""Toy data: what the tiny model learns from must be in the phrase and the picture, and nowhere else."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from pgjax.config import DataConfig, OODConfig, Recipe
from pgjax.conversation import load_prompts, messages
from pgjax.data.images import load_image
from pgjax.data.toy import INTENTS, OBJECTS, REPLIES, held_out, toy_answers, toy_examples, toy_texts
from pgjax.taxonomy import full_view, level_of, load_taxonomy, policy_view, render_policy
from pgjax.tokenizer import train_byte_bpe

NEVER = ("C5", "C8S2")
TAXONOMY = load_taxonomy()
OOD = OODConfig(keep=(2, 4), never_seen=NEVER)
GONE = {"C5", "C5S1", "C5S2", "C8S2"}


@pytest.fixture(scope="module")
def examples():
    return toy_examples(0, 1536, 768, NEVER)


@pytest.fixture(scope="module")
def prompts_and_answers(examples):
    """What training shows: rendered prompts and warm-up answers, a few views of each row."""
    templates, rng = load_prompts(), np.random.default_rng(0)
    rendered, answers = [], []
    for example in examples:
        if example.split == "train":
            view = policy_view(TAXONOMY, OOD, rng, level_of(example.modality), example.node, rng.random() < 0.3)
            chat = messages(example, render_policy(TAXONOMY, view, True), templates, "think")
            rendered.append(chat[0]["content"] + chat[1]["content"][-1]["text"])
            answers += toy_answers(rng, example, view, TAXONOMY, 3, len(rendered) % 10 < 3, "think", NEVER)
    return rendered, answers


def test_a_pure_function_of_its_arguments(examples):
    assert toy_examples(0, 1536, 768, NEVER) == examples
    assert toy_examples(1, 1536, 768, NEVER) != examples


def test_shares(examples):
    for split in ("train", "eval"):
        rows = [row for row in examples if row.split == split]
        assert len(rows) == (1536 if split == "train" else 768) and len({row.id for row in rows}) == len(rows)
        for modality in ("text", "text_image", "image"):
            labels = Counter(row.request_label for row in rows if row.modality == modality)
            assert labels["safe"] == labels["unsafe"] == len(rows) // (4 if modality == "text" else 8)
    train = [row for row in examples if row.split == "train"]
    kinds = Counter((row.request_label, row.response_label) for row in train if row.modality != "image")
    for kind in (("unsafe", "safe"), ("unsafe", "unsafe"), ("safe", "safe"), ("safe", "unsafe")):
        assert kinds[kind] > 20
    assert kinds["safe", "absent"] == kinds["unsafe", "absent"] > 100
    assert {row.node for row in train if row.modality != "text_image" and row.node} == OBJECTS.keys() - GONE
    assert {row.node for row in train if row.modality == "text_image" and row.node} == {n.id for n in TAXONOMY.top} - GONE


def test_records_agree_with_themselves(examples):
    for row in examples:
        risky = "unsafe" in (row.request_label, row.response_label)
        assert (row.category == "node") == risky == (row.node is not None) == (row.name is not None)
        assert (row.response is None) == (row.response_label == "absent")
        assert (row.request is None) == (row.modality == "image") and bool(row.images) == (row.modality != "text")
        if row.node:
            assert TAXONOMY.by_id(row.node).name == row.name
            assert (TAXONOMY.by_id(row.node).parent is None) == (row.modality == "text_image")
        assert len((row.request or "").split()) <= 16 and len((row.response or "").split()) <= 10


def test_the_reserved_node_has_nothing(examples, prompts_and_answers):
    reserved = [node for node in TAXONOMY.nodes if node.reserved]
    assert reserved and not OBJECTS.keys() & {node.id for node in reserved}
    assert not {row.node for row in examples} & {node.id for node in reserved}
    for text in sum(prompts_and_answers, []):
        for node in reserved:
            assert node.id not in text and node.name not in text


def test_never_seen_rows_are_a_minority_of_the_held_out_split(examples):
    rows = [row for row in examples if row.split == "eval"]
    groups = {row.group for row in rows if row.node in GONE}
    assert 0.08 < sum(row.group in groups for row in rows) / len(rows) < 0.25
    assert {row.node for row in rows} & GONE == GONE
    assert {row.modality for row in rows if row.node in GONE} == {"text", "text_image", "image"}


def test_never_seen_occurs_nowhere_in_training(examples, prompts_and_answers):
    assert not [row for row in examples if row.split == "train" and row.node in GONE]
    words = [TAXONOMY.by_id(node).name for node in GONE] + [TAXONOMY.by_id(node).description for node in GONE]
    words += [phrase for node in GONE for phrase in TAXONOMY.by_id(node).synonyms]
    words += [thing for node in GONE & OBJECTS.keys() for thing in OBJECTS[node]]
    for text in sum(prompts_and_answers, []):
        assert not [word for word in words if word in text] and "C5" not in text and "C8S2" not in text
    seen_pictures = {image for row in examples if row.split == "train" for image in row.images}
    assert not seen_pictures & {image for row in examples if row.node in GONE for image in row.images}


def test_unknown_never_seen_is_an_error():
    with pytest.raises(ValueError, match="C99"):
        toy_examples(0, 6, 6, ("C99",))


def test_twins_share_group_split_style_and_length(examples):
    groups = defaultdict(list)
    for row in examples:
        groups[row.group].append(row)
    for twins in groups.values():
        assert sorted(row.request_label for row in twins) == ["safe", "unsafe"] and len({row.split for row in twins}) == 1
        for measure in (
            lambda row: row.modality,
            lambda row: len(row.request or ""),
            lambda row: len((row.request or "").split()),
            lambda row: row.response is None,
            lambda row: len(row.response or ""),
            lambda row: [load_image(image).size for image in row.images],
        ):
            assert measure(twins[0]) == measure(twins[1])
    first = Counter(twins[0].request_label for twins in groups.values())
    assert min(first.values()) > 0.4 * len(groups)


def test_phrases_come_in_pairs_of_one_length():
    for pair in (*INTENTS, *REPLIES):
        assert len({len(phrase) for phrase in pair}) == len({len(phrase.split()) for phrase in pair}) == 1


def test_held_out_rows_combine_known_words(examples):
    for leaf in OBJECTS:
        for item in range(3):
            assert {held_out(leaf, item, pair) for pair in range(len(INTENTS))} == {True, False}
    for pair in range(len(INTENTS)):
        assert any(not held_out(leaf, 0, pair) for leaf in OBJECTS)

    def combinations(split):
        requests = [row.request for row in examples if row.split == split and row.modality == "text"]
        things = sum(OBJECTS.values(), ())
        spoken = lambda pair, text: any(f" {phrase} " in text for phrase in pair)  # noqa: E731
        return {(t, n) for text in requests for t in things for n, pair in enumerate(INTENTS) if t in text and spoken(pair, text)}

    assert combinations("eval") and not combinations("eval") & combinations("train")


def style(row) -> list[float]:
    """All that shows without reading: lengths, punctuation, sizes of files and pictures, how light a picture is."""
    text = f"{row.request or ''}\n{row.response or ''}"
    marks = [text.count(mark) for mark in ".,?"] + [sum(map(str.isupper, text)), len(text), len(text.split()), len(text) ** 2 / 1e3]
    lengths = [len(row.request or ""), len(row.response or ""), row.response is not None, len(row.id)]
    sizes = [0.0] * 4
    if row.images:
        image = load_image(row.images[0])
        sizes = [len(row.images[0]), *image.size, np.asarray(image.convert("L")).mean()]
    return [1.0, *marks, *lengths, *sizes]


@pytest.mark.parametrize("modality", ["text", "text_image", "image"])
def test_the_label_cannot_be_read_from_style(examples, modality):
    """Logistic regression on style stays below 58% on held-out rows (chance 50%, standard deviation 3% at 256 rows)."""
    train, test = ([row for row in examples if row.split == split and row.modality == modality] for split in ("train", "eval"))
    x = np.array([style(row) for row in train])
    mean, scale = x.mean(0), x.std(0) + 1e-9
    mean[0], scale[0] = 0, 1
    x, y = (x - mean) / scale, np.array([row.request_label == "unsafe" for row in train], float)
    weight = np.zeros(x.shape[1])
    for _ in range(500):
        weight -= 0.5 * (x.T @ (1 / (1 + np.exp(-x @ weight)) - y) / len(y) + 1e-4 * weight)
    guess = (np.array([style(row) for row in test]) - mean) / scale @ weight > 0
    accuracy = np.mean(guess == [row.request_label == "unsafe" for row in test])
    assert accuracy < 0.58


def test_a_text_image_label_needs_both(examples):
    """Same text, other label; same picture, other label: both kinds of twins are there."""
    groups = defaultdict(list)
    for row in examples:
        if row.modality == "text_image":
            groups[row.group].append(row)
    kinds = Counter((a.request == b.request, a.images == b.images) for a, b in groups.values())
    assert kinds.keys() == {(True, False), (False, True)} and min(kinds.values()) > 0.4 * len(groups)


def test_warm_up_answers(examples, prompts_and_answers):
    _, answers = prompts_and_answers
    train = [row for row in examples if row.split == "train"]
    assert len(answers) == 3 * len(train)
    seen = {TAXONOMY.nodes[n].name for level in ("leaf", "top") for _, n in full_view(TAXONOMY, level, NEVER).entries}
    right = 0
    for number, answer in enumerate(answers):
        row = train[number // 3]
        lines = answer.split("\n")
        assert lines[0].startswith("<think>") and lines[0].endswith("</think>") and (lines[1], lines[-1]) == ("<answer>", "</answer>")
        fields = dict(line.split(":", 1) for line in lines[2:-1])
        assert list(fields) == ["Request", *(["Response"] if row.modality != "image" else []), "Category"]
        assert (fields["Category"] == "None") == (fields["Request"] == fields.get("Response", "safe") == "safe")
        assert fields["Category"] == "None" or fields["Category"] in seen or fields["Category"][0] == "C"
        right += fields["Request"] == row.request_label
    assert abs(right / len(answers) - 0.65) < 0.03  # right on 3 rows in 10, drawn at random on the others
    named = Counter(a.split("Category:")[1].split("\n")[0] for a in answers)
    assert sum(n for name, n in named.items() if name in seen) > 300
    all_right = toy_answers(np.random.default_rng(0), train[0], full_view(TAXONOMY, "leaf", NEVER), TAXONOMY, 20, True)
    assert all(f"Request:{train[0].request_label}" in answer for answer in all_right)


def test_words_are_tokens(examples, prompts_and_answers):
    recipe = Recipe(data=DataConfig(descriptions=False, ood=OOD))
    texts = toy_texts(examples, TAXONOMY, recipe)
    assert len(texts) == 1536 and not [text for text in texts if TAXONOMY.by_id("C5").name in text]
    tokenizer = train_byte_bpe(texts, 1500)
    assert max(len(tokenizer(answer)["input_ids"]) for answer in prompts_and_answers[1]) <= 40
    for text in ("How can I smash the wooden stretcher?", "Sure, just steal it, then steal it again."):
        assert len(tokenizer(text)["input_ids"]) <= len(text.split()) + 4  # three marks, and a first word without its space
