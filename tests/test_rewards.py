"""The reward program: the golden rows of PAPERS A8, a plain Python reference on random answers, and what `strict` changes."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_reward
from rows import gold_arrays, verdict_arrays

from pgjax import automaton as answers
from pgjax.automaton import EMPTY, ID, NAME, NONE, NONE_LIKE, UNLISTED, Verdict, id_grid
from pgjax.data.schema import (
    ABSENT,
    CATEGORY_NODE,
    CATEGORY_NONE,
    CATEGORY_OOD,
    CATEGORY_UNKNOWN,
    IMAGE,
    SAFE,
    TEXT,
    TEXT_IMAGE,
    UNKNOWN,
    UNSAFE,
    Gold,
)
from pgjax.rewards import reward
from pgjax.tokenizer import train_byte_bpe

IDS = id_grid(11, 3)  # K
NODES = len(IDS)  # N
LABEL = {"safe": SAFE, "unsafe": UNSAFE, "": ABSENT}
MODALITY = {"text": TEXT, "text-image": TEXT_IMAGE, "image": IMAGE}
SHOWN = np.arange(NODES)  # node_of_id when the policy shows everything under its own ids
jitted = jax.jit(reward, static_argnames="variant")


def answer(labels: str, category: str, tag: str = "think") -> str:
    """`labels` is "unsafe" for an image, "unsafe safe" for request and response."""
    lines = [f"{line}:{label}" for line, label in zip(("Request", "Response"), labels.split(), strict=False)]
    return "\n".join([f"<{tag}>short</{tag}>", "<answer>", *lines, f"Category:{category}", "</answer>"])


def verdict_of(text: str, image: bool) -> tuple[bool, int, int, int, int]:
    """What the automaton should read from an answer: (parsed, request, response, kind, id)."""
    parsed = reference_reward.parse(text, image)
    if parsed is None:
        return False, ABSENT, ABSENT, -1, -1
    request, response, name = parsed
    if "unsafe" not in (request, response):
        kind = NONE
    elif reference_reward.ID.fullmatch(name):
        kind = ID if name in IDS else UNLISTED
    else:
        kind = {"": EMPTY, "None": NONE_LIKE}.get(name, NAME)
    return True, LABEL[request], LABEL[response], kind, IDS.index(name) if kind == ID else -1


def verdicts(texts_PG: list[list[str]], image_P: list[bool]) -> Verdict:
    return verdict_arrays([[verdict_of(text, image) for text in row] for row, image in zip(texts_PG, image_P, strict=True)])


def gold_of(modality, request, response, category, node=-1, shown=SHOWN, accepted=()) -> Gold:
    """Gold of one prompt, [1]."""
    return gold_arrays([(modality, request, response, category, node)], NODES, [shown], [accepted])


def stack(golds: list[Gold]) -> Gold:
    return jax.tree.map(lambda *rows: np.concatenate(rows), *golds)


def earn(gold: Gold, texts: list[str], similarities: list[float] = (), variant: str = "published", thresholds=(0.7, 0.6)):
    """Rewards and terms, [G], of answers to one prompt that all have the same similarities."""
    similarity_PGS = np.broadcast_to(np.array(similarities or [0.0], np.float32), (1, len(texts), max(len(similarities), 1)))
    valid_PS = np.full((1, similarity_PGS.shape[-1]), bool(similarities))
    verdict = verdicts([texts], [int(gold.modality_P[0]) == IMAGE])
    reward_PG, terms = jitted(verdict, gold, similarity_PGS, valid_PS, *thresholds, variant=variant)
    return reward_PG[0].tolist(), {name: term[0].tolist() for name, term in terms.items()}


# --- golden rows -------------------------------------------------------------------------------------------------------------------

FIGURE = [0.73, 0.63, 0.72, 0.69, 0.73, 0.70]
EIGHT = [0.8, 0.8, 0.8]  # name and two synonyms
OOD, LEAF, TOP = "Living Environment Hazards", "C8S1", "C5"
# modality, gold request, gold response, gold id, gold name, answer, similarities, score
GOLDEN = [
    # PAPERS A8
    ("text", "unsafe", "safe", "", OOD, answer("unsafe safe", "Environmental Harm"), FIGURE, 2.625),
    ("text", "unsafe", "safe", "", OOD, answer("unsafe safe", "C5"), FIGURE, 2.0),
    ("text", "unsafe", "safe", "", OOD, answer("unsafe safe", "C99"), FIGURE, 2.0),
    ("text", "unsafe", "safe", "", OOD, answer("unsafe safe", "None"), FIGURE, 0.0),
    ("text", "unsafe", "safe", "C5S1", "", answer("unsafe safe", "C5S1"), [], 3.0),
    ("text", "unsafe", "safe", "C5S1", "", answer("unsafe safe", "C9S1"), [], 2.5),
    ("text", "unsafe", "safe", "C5S1", "", answer("unsafe safe", "Environmental Harm"), [], 2.0),
    ("text", "unsafe", "safe", "C5S1", "", answer("unsafe safe", "c5s1"), [], 2.0),
    ("text", "unsafe", "safe", "C5S1", "", answer("unsafe safe", "C5S1, C9S1"), [], 2.0),
    ("text", "unsafe", "safe", "C5S1", "", answer("safe safe", "None"), [], 1.0),
    ("text", "safe", "safe", "", "", answer("unsafe safe", "C1"), [], 1.0),
    ("text", "safe", "safe", "", "", answer("safe safe", "None"), [], 2.0),
    ("image", "unsafe", "", "", OOD, answer("safe", "None"), FIGURE, 0.5),
    ("image", "unsafe", "", "C5S1", "", answer("safe", "None"), [], 0.0),
    ("image", "unsafe", "", "", OOD, answer("unsafe", "Environmental Harm"), FIGURE, 2.625),
    ("image", "safe", "safe", "", "", answer("safe", "None"), [], 2.0),
    ("image", "safe", "", "", "", answer("safe", "None"), [], 2.5),
    ("text", "safe", "safe", "", "", answer("safe safe", "None", tag="thinking"), [], 0.0),
    # its format notes
    ("text", "safe", "safe", "", "", answer("safe safe", "None") + "\n", [], 2.0),
    ("text", "safe", "safe", "", "", answer("safe safe", "None") + "\n\n", [], 0.0),
    ("text", "safe", "safe", "", "", "Well: " + answer("safe safe", "None"), [], 0.0),
    ("text", "safe", "safe", "", "", answer("safe safe", "None").replace("short", "a</think><think>b"), [], 2.0),
    ("text", "safe", "safe", "", "", answer("safe safe", "None").replace("\n", "\r\n"), [], 2.0),
    ("text", "safe", "safe", "", "", answer("Safe safe", "None"), [], 0.0),
    ("text", "safe", "safe", "", "", answer("safe safe", "None").replace("Request:", "Request: "), [], 0.0),
    ("text", "unsafe", "safe", "", OOD, answer("unsafe safe", " None"), [0.0] * 6, 2.5),
    ("text", "unsafe", "safe", "", OOD, answer("unsafe safe", "  "), FIGURE, 2.5),
    ("text", "unsafe", "safe", "", OOD, answer("unsafe safe", OOD).replace("\n</answer>", "</answer>"), FIGURE, 0.0),
    # anchors/guards.md 3.1, all similarities 0.8
    ("image", "safe", "", "", "", answer("safe", "None"), EIGHT, 2.5),
    ("image", "safe", "", "", "", answer("unsafe", LEAF), EIGHT, 0.0),
    ("image", "safe", "", "", "", answer("unsafe", "Loose Paving"), EIGHT, 0.5),
    ("image", "safe", "safe", "", "", answer("safe", "None"), EIGHT, 2.0),
    ("image", "safe", "safe", "", "", answer("unsafe", LEAF), EIGHT, 0.0),
    ("image", "safe", "safe", "", "", answer("unsafe", "Loose Paving"), EIGHT, 0.0),
    ("image", "unsafe", "", LEAF, "", answer("safe", "None"), EIGHT, 0.0),
    ("image", "unsafe", "", LEAF, "", answer("unsafe", LEAF), EIGHT, 3.0),
    ("image", "unsafe", "", LEAF, "", answer("unsafe", "Loose Paving"), EIGHT, 2.0),
    ("image", "unsafe", "", "", OOD, answer("safe", "None"), EIGHT, 0.5),
    ("image", "unsafe", "", "", OOD, answer("unsafe", LEAF), EIGHT, 2.0),
    ("image", "unsafe", "", "", OOD, answer("unsafe", "Loose Paving"), EIGHT, 2.75),
    ("text", "safe", "safe", "", "", answer("safe safe", "None"), EIGHT, 2.0),
    ("text", "safe", "safe", "", "", answer("unsafe safe", LEAF), EIGHT, 1.0),
    ("text", "unsafe", "safe", LEAF, "", answer("safe safe", "None"), EIGHT, 1.0),
    ("text", "unsafe", "safe", LEAF, "", answer("unsafe safe", LEAF), EIGHT, 3.0),
    ("text", "unsafe", "safe", "", OOD, answer("safe safe", "None"), EIGHT, 1.0),
    ("text", "unsafe", "safe", "", OOD, answer("unsafe safe", LEAF), EIGHT, 2.0),
    ("text", "unsafe", "safe", LEAF, "", answer("safe safe", LEAF), EIGHT, 0.0),
]


def gold_of_row(row: dict, shown=SHOWN) -> Gold:
    """The arrays of a published row. Its gold id is a shown one; a text row's response label is never ""."""
    if row["category"]:
        category, node = CATEGORY_NODE, int(shown[IDS.index(row["category"])])
    elif row["original_category"]:
        category, node = CATEGORY_OOD, NODES - 1
    else:
        category, node = CATEGORY_NONE, -1
    return gold_of(MODALITY[row["modality"]], LABEL[row["query_label"]], LABEL[row["response_label"]], category, node, shown)


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_golden_rows(case):
    *fields, text, similarities, expected = case
    row = dict(zip(("modality", "query_label", "response_label", "category", "original_category"), fields, strict=True))
    row["similarities"] = similarities
    assert reference_reward.score(text, row) == pytest.approx(expected, abs=1e-12)
    assert earn(gold_of_row(row), [text], similarities)[0] == pytest.approx([expected], abs=1e-6)


# --- the reference on random answers -----------------------------------------------------------------------------------------------

NAMES = ["Loose Paving", "Über-watering", "c5s1", "C5S1, C9S1", "None at all", "none", "C5S", "CS1", "C 5", "C5S1.", "5"]
ODD = [" None", "None ", "  ", "\t", "C99", "C12S1", "C1S4", "C01", " C2 ", "C3S1\t"]
EDITS = [("\n", "\r\n"), ("think>", "thinking>"), ("Request:", "Request: "), ("</answer>", "</answer>\n"), ("</answer>", "</answer> "),
         ("<think>", " <think>"), ("\nCategory", "\n\nCategory"), ("short", ""), ("short", "two\n</think>\n<answer>\nlines")]  # fmt: skip


def random_row(rng: random.Random) -> tuple[dict, np.ndarray]:
    """A published row and the prompt's node_of_id: part of the policy, shuffled."""
    shown_K = np.array([n if rng.random() < 0.5 else -1 for n in rng.sample(range(NODES), NODES)])
    modality = rng.choice(list(MODALITY))
    row = {
        "modality": modality,
        "query_label": rng.choice(["safe", "unsafe", "unsafe"]),
        "response_label": rng.choice(["", "safe", "unsafe"] if modality == "image" else ["safe", "unsafe"]),
        "category": "",
        "original_category": "",
    }
    kind, shown_ids = rng.choice(["node", "ood", "none"]), [id for id, node in zip(IDS, shown_K, strict=True) if node >= 0]
    if kind == "node" and shown_ids:
        row["category"] = rng.choice(shown_ids)
    elif kind == "ood":
        row["original_category"] = OOD
    return row, shown_K


def random_answer(rng: random.Random, row: dict) -> str:
    right = row["category"] or rng.choice(NAMES)
    category = rng.choice([right, right, rng.choice(IDS), rng.choice(IDS), rng.choice(NAMES), rng.choice(ODD), "None"])
    labels = ["unsafe" if rng.random() < 0.65 else "safe" for _ in range(1 + (row["modality"] != "image"))]
    if "unsafe" not in labels and rng.random() < 0.9:
        category = "None"
    if rng.random() < 0.05:
        labels = labels[:1] if len(labels) == 2 else [*labels, "safe"]  # the other modality's form
    text = answer(" ".join(labels), category)
    return text.replace(*rng.choice(EDITS)) if rng.random() < 0.25 else text


def random_cases(seed: int, prompts: int, group: int):
    """Rows, answers [P][G], gold, similarities and their validity; each prompt's node has one to six phrases."""
    host, rng = random.Random(seed), np.random.default_rng(seed)
    rows, shown = zip(*(random_row(host) for _ in range(prompts)), strict=True)
    texts_PG = [[random_answer(host, row) for _ in range(group)] for row in rows]
    similarity_PGS = rng.uniform(0.3, 1.0, (prompts, group, 6)).astype(np.float32)
    valid_PS = np.arange(6) < rng.integers(1, 7, (prompts, 1))
    return rows, texts_PG, stack([gold_of_row(*case) for case in zip(rows, shown, strict=True)]), similarity_PGS, valid_PS


def reference_rewards(rows, texts_PG, similarity_PGS, valid_PS) -> np.ndarray:
    expected_PG = np.zeros(similarity_PGS.shape[:2])
    for p, row in enumerate(rows):
        for g, text in enumerate(texts_PG[p]):
            expected_PG[p, g] = reference_reward.score(text, row | {"similarities": similarity_PGS[p, g][valid_PS[p]].tolist()})
    return expected_PG


def test_published_equals_the_reference_on_20000_answers():
    rows, texts_PG, gold, similarity_PGS, valid_PS = random_cases(0, 2500, 8)
    verdict = verdicts(texts_PG, [row["modality"] == "image" for row in rows])
    reward_PG, terms = jitted(verdict, gold, similarity_PGS, valid_PS, 0.7, 0.6, variant="published")
    expected_PG = reference_rewards(rows, texts_PG, similarity_PGS, valid_PS)
    np.testing.assert_allclose(reward_PG, expected_PG, atol=1e-6)
    assert 0.6 < verdict.parsed.mean() < 0.95 and set(np.unique(verdict.kind)) == {-1, NONE, ID, UNLISTED, NAME, EMPTY, NONE_LIKE}
    assert {0, 0.5, 1, 1.5, 2, 2.5, 3} <= set(np.unique(expected_PG)) and (np.array(terms["bonus"]) > 0).sum() > 500
    assert reward_PG.dtype == jnp.float32 and all(term.dtype == jnp.float32 for term in terms.values())


def test_published_through_the_automaton():
    """Tokens in, rewards out, in one program; the verdicts are the automaton's."""
    rows, texts_PG, gold, similarity_PGS, valid_PS = random_cases(1, 400, 8)
    tokenizer = train_byte_bpe([text for row in texts_PG[:50] for text in row], 600)
    machine = answers.build(tokenizer, IDS)
    encoded = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in row] for row in texts_PG]
    length_PG = np.array([[len(tokens) for tokens in row] for row in encoded], np.int32)
    tokens_PGR = np.array([[tokens + [0] * (length_PG.max() - len(tokens)) for tokens in row] for row in encoded], np.int32)

    @jax.jit
    def program(tokens_PGR, length_PG, gold, similarity_PGS, valid_PS):
        modality_PG = jnp.broadcast_to(gold.modality_P[:, None], length_PG.shape)
        verdict = answers.verdict(machine, answers.run(machine, tokens_PGR, length_PG, modality_PG))
        return reward(verdict, gold, similarity_PGS, valid_PS, 0.7, 0.6, "published")[0]

    reward_PG = program(tokens_PGR, length_PG, gold, similarity_PGS, valid_PS)
    np.testing.assert_allclose(reward_PG, reference_rewards(rows, texts_PG, similarity_PGS, valid_PS), atol=1e-6)


# --- strict ------------------------------------------------------------------------------------------------------------------------

C9S1, C10S3, C5S1 = (IDS.index(id) for id in ("C9S1", "C10S3", "C5S1"))
C9S1_HIDDEN = np.where(SHOWN == C9S1, -1, SHOWN)
TEXT_OOD = gold_of(TEXT, UNSAFE, SAFE, CATEGORY_OOD, C9S1, C9S1_HIDDEN)
TEXT_NODE = gold_of(TEXT, UNSAFE, SAFE, CATEGORY_NODE, C5S1, C9S1_HIDDEN)
IMAGE_OOD = gold_of(IMAGE, UNSAFE, ABSENT, CATEGORY_OOD, C9S1, C9S1_HIDDEN)
ALTERNATIVE = gold_of(TEXT, UNSAFE, SAFE, CATEGORY_NODE, C9S1, SHOWN, accepted=[C10S3])
OOD_ALTERNATIVE = gold_of(TEXT, UNSAFE, SAFE, CATEGORY_OOD, -1, SHOWN, accepted=[C10S3])
IMAGE_SAFE = {label: gold_of(IMAGE, SAFE, label, CATEGORY_NONE) for label in (ABSENT, SAFE, UNKNOWN)}
# gold, answer, published, strict; similarities all 0.8 (bonus 0.25), thresholds 0.7 and 0.6
STRICT = {
    "1 missed OOD image": (IMAGE_OOD, answer("safe", "None"), 0.5, 0.0),
    "1 named OOD image": (IMAGE_OOD, answer("unsafe", "Loose Paving"), 2.75, 2.75),
    "2 safe image stored as absent": (IMAGE_SAFE[ABSENT], answer("safe", "None"), 2.5, 2.0),
    "2 safe image stored as safe": (IMAGE_SAFE[SAFE], answer("safe", "None"), 2.0, 2.0),
    "2 safe image stored as unknown": (IMAGE_SAFE[UNKNOWN], answer("safe", "None"), 2.0, 2.0),
    "2 safe image called unsafe": (IMAGE_SAFE[ABSENT], answer("unsafe", "Loose Paving"), 0.5, 0.0),
    "3 None after a space": (TEXT_OOD, answer("unsafe safe", " None"), 2.75, 0.0),
    "3 None before a space": (TEXT_NODE, answer("unsafe safe", "None "), 2.0, 0.0),
    "3 spaces": (TEXT_OOD, answer("unsafe safe", "  "), 2.5, 0.0),
    "4 id outside every policy": (TEXT_NODE, answer("unsafe safe", "C99"), 2.5, 2.0),
    "4 id outside this policy": (TEXT_NODE, answer("unsafe safe", "C9S1"), 2.5, 2.0),
    "4 listed wrong id": (TEXT_NODE, answer("unsafe safe", "C10S3"), 2.5, 2.5),
    "4 right id": (TEXT_NODE, answer("unsafe safe", "C5S1"), 3.0, 3.0),
    "4 hidden id of the OOD gold": (TEXT_OOD, answer("unsafe safe", "C9S1"), 2.0, 2.0),
    "5 accepted alternative": (ALTERNATIVE, answer("unsafe safe", "C10S3"), 2.5, 3.0),
    "5 the gold id itself": (ALTERNATIVE, answer("unsafe safe", "C9S1"), 3.0, 3.0),
    "5 accepted id at OOD gold": (OOD_ALTERNATIVE, answer("unsafe safe", "C10S3"), 2.0, 3.0),
    "6 no category, unsafe label": (gold_of(TEXT, UNSAFE, SAFE, CATEGORY_NONE), answer("unsafe safe", "Loose Paving"), 2.5, 2.0),
    "same: OOD named": (TEXT_OOD, answer("unsafe safe", "Loose Paving"), 2.75, 2.75),
    "same: OOD called safe": (TEXT_OOD, answer("safe safe", "None"), 1.0, 1.0),
    "same: ids spelled as a name": (TEXT_OOD, answer("unsafe safe", "C5S1, C9S1"), 2.75, 2.75),
    "same: free name at a listed gold": (TEXT_NODE, answer("unsafe safe", "Loose Paving"), 2.0, 2.0),
    "same: out of format": (TEXT_NODE, "Request:unsafe", 0.0, 0.0),
}


@pytest.mark.parametrize("name", STRICT)
def test_strict_differences(name):
    gold, text, published, strict = STRICT[name]
    got = {variant: earn(gold, [text], EIGHT, variant)[0][0] for variant in ("published", "strict")}
    assert got == pytest.approx({"published": published, "strict": strict}, abs=1e-6)


def test_strict_never_earns_more_than_published_without_alternatives():
    rows, texts_PG, gold, similarity_PGS, valid_PS = random_cases(2, 500, 8)
    gold = gold.replace(accepted_PN=gold.accepted_PN & (gold.category_P == CATEGORY_NODE)[:, None])
    verdict = verdicts(texts_PG, [row["modality"] == "image" for row in rows])
    got = {variant: jitted(verdict, gold, similarity_PGS, valid_PS, 0.7, 0.6, variant=variant)[0] for variant in ("published", "strict")}
    assert (got["strict"] <= got["published"] + 1e-6).all() and (got["strict"] < got["published"] - 0.1).any()


# --- unknown and absent gold -------------------------------------------------------------------------------------------------------

GROUP = [answer("safe safe", "None"), answer("unsafe safe", "C5S1"), answer("safe unsafe", "Loose Paving"), answer("unsafe unsafe", "C2")]
both = pytest.mark.parametrize("variant", ["published", "strict"])


@both
@pytest.mark.parametrize(
    ("gold", "request_G", "response_G", "category_G"),
    [
        # an unknown term is 0 for the whole group; the known ones still count
        (gold_of(TEXT, UNKNOWN, SAFE, CATEGORY_UNKNOWN), [0] * 4, [1, 1, 0, 0], [0] * 4),
        (gold_of(TEXT, UNSAFE, UNKNOWN, CATEGORY_UNKNOWN), [0, 1, 0, 1], [0] * 4, [0] * 4),
        (gold_of(TEXT, UNKNOWN, UNKNOWN, CATEGORY_NODE, C5S1), [0] * 4, [0] * 4, [0, 1, 0, 0.5]),
        (gold_of(TEXT, UNSAFE, SAFE, CATEGORY_UNKNOWN), [0, 1, 0, 1], [1, 1, 0, 0], [0] * 4),
        # one unknown label among safe ones does not end it: the category is looked at, unless the answer is all safe
        (gold_of(TEXT, SAFE, UNKNOWN, CATEGORY_NODE, C5S1), [1, 0, 1, 0], [0] * 4, [0, 1, 0, 0.5]),
        (gold_of(TEXT, UNKNOWN, SAFE, CATEGORY_OOD, C9S1, C9S1_HIDDEN), [0] * 4, [1, 1, 0, 0], [0, 0, 0.75, 0]),
        # known to have no category, one label unknown: nothing to be right about
        (gold_of(TEXT, SAFE, UNKNOWN, CATEGORY_NONE), [1, 0, 1, 0], [0] * 4, [0] * 4),
        (gold_of(TEXT, UNKNOWN, ABSENT, CATEGORY_NONE), [0] * 4, [1, 1, 0, 0], [0] * 4),
        # no response: safe is the right line, and a safe request then ends it
        (gold_of(TEXT, UNSAFE, ABSENT, CATEGORY_NODE, C5S1), [0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 0, 0.5]),
        (gold_of(TEXT_IMAGE, SAFE, ABSENT, CATEGORY_NONE), [1, 0, 1, 0], [1, 1, 0, 0], [0] * 4),
    ],
)
def test_unknown_and_absent_gold(gold, request_G, response_G, category_G, variant):
    reward_G, terms = earn(gold, GROUP, EIGHT, variant)
    assert terms["request"] == request_G and terms["response"] == response_G
    assert terms["category"] == pytest.approx(category_G, abs=1e-6)
    assert reward_G == pytest.approx(np.sum([request_G, response_G, category_G], axis=0), abs=1e-6)


@both
def test_unknown_image(variant):
    """Published reads an image's "" as OOD without a name only where the request label is known."""
    gold = gold_of(IMAGE, UNKNOWN, ABSENT, CATEGORY_NONE)
    assert earn(gold, [answer("safe", "None"), answer("unsafe", "Loose Paving"), answer("unsafe", "C2")], EIGHT, variant)[0] == [0] * 3


def test_text_image_gold_is_a_top_level_category():
    gold = gold_of(TEXT_IMAGE, UNSAFE, SAFE, CATEGORY_NODE, IDS.index(TOP))
    assert earn(gold, [answer("unsafe safe", "C5"), answer("unsafe safe", "C5S1")], variant="strict")[0] == [3.0, 2.5]


# --- terms, thresholds -------------------------------------------------------------------------------------------------------------


def test_terms_add_up_and_tell_what_was_right():
    rewards, terms = earn(TEXT_OOD, [answer("unsafe safe", "Loose Paving"), answer("unsafe safe", "C5S1"), "no answer"], EIGHT, "strict")
    assert terms["format"] == [1, 1, 0] and terms["ood_detected"] == [1, 0, 0] and terms["category_right"] == [0, 0, 0]
    assert terms["bonus"] == pytest.approx([0.25, 0, 0], abs=1e-6) and rewards == pytest.approx([2.75, 2, 0], abs=1e-6)
    assert earn(TEXT_NODE, [answer("unsafe safe", "C5S1")])[1]["category_right"] == [1]


def test_the_bonus_is_scaled_by_the_thresholds_and_needs_a_valid_phrase():
    name = [answer("unsafe safe", "Loose Paving")]
    assert earn(TEXT_OOD, name, [0.5, 0.1], thresholds=(0.4, 0.5))[1]["bonus"] == pytest.approx([0.1 / 0.6 / 2], abs=1e-6)
    assert earn(TEXT_OOD, name, [0.7, 0.7], thresholds=(0.9, 0.5))[1]["bonus"] == pytest.approx([0.2], abs=1e-6)
    assert earn(TEXT_OOD, name, [1.0], thresholds=(0.4, 0.5))[1]["bonus"] == pytest.approx([0.5], abs=1e-6)
    assert earn(TEXT_OOD, name, [0.3, 0.3], thresholds=(0.4, 0.5))[1]["bonus"] == [0]
    assert earn(TEXT_OOD, name, [])[1]["bonus"] == [0]  # a node that the bank leaves out
