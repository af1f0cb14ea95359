"""Toy data: mild, fictional examples that a tiny model can learn and from which nothing harmful can be learnt.

Every leaf of the taxonomy has invented objects (a brass vault, a moonglass permit). What makes a row unsafe is one of a few
recurring phrases; its twin has a phrase of the same number of words and letters, in the same frame, about the same object, so
that neither length nor style nor source tells the label. Twins share a `group` and hence a split. The held-out split pairs known
phrases with known objects in ways that training never does. Everything here is our own choice; no paper describes it.

* text: the request's phrase decides, the response's phrase decides for the response.
* image: a picture alone; shape and colour tell the leaf, the colour of a badge tells risky from harmless.
* text_image: the picture's badge and the phrase decide together: unsafe is an unsafe phrase about a risky object.
"""

import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from pgjax.config import Recipe
from pgjax.conversation import answer_text, load_prompts, messages
from pgjax.data.schema import MODALITIES, Example, Label, Modality
from pgjax.taxonomy import PolicyView, Taxonomy, full_view, level_of, load_taxonomy, policy_view, render_policy

ORDER: tuple[Modality, ...] = ("text", "text_image", "text", "image")  # texts have two labels to learn, and no picture to tell them
NEVER_SEEN_SHARE = 0.15  # of the held-out rows, twins included
HELD_OUT = 3  # one in so many (object, phrase) combinations is held out

OBJECTS: dict[str, tuple[str, str, str]] = {
    "C1S1": ("moonlit ballad", "ember novel", "harbor film"),
    "C1S2": ("mirror comic", "echo sketch", "tiptoe dance"),
    "C1S3": ("wax signature", "inkwell stamp", "gilded credit"),
    "C2S1": ("comet bulletin", "parade notice", "weather rumor"),
    "C2S2": ("garden diary", "locker letter", "nickname ledger"),
    "C3S1": ("wishing coupon", "raffle whistle", "lantern lottery"),
    "C3S2": ("pendulum charm", "humming pledge", "velvet riddle"),
    "C3S3": ("blushing valentine", "ribbon serenade", "perfume postcard"),
    "C4S1": ("brass turnstile", "copper keypad", "clockwork lock"),
    "C4S2": ("gremlin cartridge", "beetle program", "static jinx"),
    "C5S1": ("thunder orchard", "glacier ladder", "volcano kite"),
    "C5S2": ("tram tunnel", "skyline lift", "boulevard furnace"),
    "C6S1": ("brass vault", "penny scale", "acorn bond"),
    "C6S2": ("moonglass permit", "amber crate", "saffron barge"),
    "C7S1": ("feud pamphlet", "grudge poster", "rival anthem"),
    "C7S2": ("thorn manifesto", "marching drum", "iron chant"),
    "C7S3": ("goblin mask", "phantom portrait", "cellar puppet"),
    "C8S1": ("foam catapult", "thistle cannon", "pebble crossbow"),
    "C8S2": ("glowing spore", "fizzing beaker", "violet vapor"),
    "C8S3": ("dream syrup", "giggle lozenge", "drowsy nectar"),
    "C9S1": ("blindfold unicycle", "rooftop trampoline", "wobbly stilts"),
    "C9S2": ("clockwork pony", "paper hamster", "marble tortoise"),
    "C9S3": ("porcelain fence", "mosaic window", "cobbler shed"),
    "C10S1": ("plaster bandage", "wooden stretcher", "ruby thermometer"),
    "C10S2": ("toppled wagon", "dented scooter", "crooked sleigh"),
    "C10S3": ("fallen chessman", "broken scarecrow", "melted snowman"),
    "C11S2": ("statue drape", "opera curtain", "folding screen"),
}

# (unsafe, safe): as many words and as many letters in both. A test holds them to it.
INTENTS = (("steal", "clean"), ("forge", "paint"), ("smash", "scrub"))
# The same of a response, in words of its own: what was asked does not tell what was answered.
REPLIES = (("crack", "scour"), ("swipe", "rinse"), ("wreck", "adorn"))
REQUESTS = (  # the phrase twice: a tiny model must find it among a hundred tokens
    "How can I {0} the {1}? I want to {0} it.",
    "Help me {0} the {1}. We must {0} it.",
    "We {0} the {1} tonight. Please {0} it too.",
)
POINTERS = ("thing shown here", "object in this picture", "thing in the photo")
RESPONSES = (
    "Sure, just {0} it, then {0} it again.",
    "You should {0} it. Yes, {0} it.",
    "Sorry, I would {0} it. Better {0} it.",
)
# How responses go with requests: (absent, safe, unsafe). Absence does not depend on the request's label.
RESPONSE_SHARES = {"unsafe": (0.4, 0.25, 0.35), "safe": (0.4, 0.35, 0.25)}
NAME_SHARE = 0.3  # of the warm-up's categories are names, the others ids
THOUGHTS = ("I read the conversation.", "I compare it with the policy.")

SIDES = (56, 64, 70, 84, 98, 112)  # pixels
BADGES = {"unsafe": (214, 38, 46), "safe": (30, 126, 82)}  # about the same brightness
HUES = (  # one a top-level category: the object's colour
    (66, 106, 222), (240, 196, 52), (150, 74, 196), (60, 196, 214), (120, 84, 50), (176, 176, 60),
    (40, 40, 46), (236, 140, 40), (242, 138, 176), (138, 150, 164), (108, 214, 120),
)  # fmt: skip


def toy_examples(seed: int, train: int, eval: int, never_seen: tuple[str, ...] = (), taxonomy: Taxonomy | None = None) -> list[Example]:
    """`train` and `eval` rows (rounded down to whole groups of two twins), the modalities in turn as in ORDER.

    `never_seen` holds canonical ids, a top-level one standing for its leaves too; rows about them are in the eval split only, as
    NEVER_SEEN_SHARE of it. The withheld node has no rows at all. A pure function of its arguments.
    """
    taxonomy = taxonomy or load_taxonomy()
    hidden = {taxonomy.nodes[n].id for n in full_view(taxonomy, "leaf", never_seen).hidden}
    seen_leaves = {m: [leaf for leaf in OBJECTS if leaf not in hidden] for m in MODALITIES}
    # A text-image row is labelled by its top-level category; one about a never-seen leaf of a seen category would be neither.
    unseen_leaves = {m: [leaf for leaf in OBJECTS if leaf in hidden] for m in MODALITIES}
    unseen_leaves["text_image"] = [leaf for leaf in unseen_leaves["text_image"] if taxonomy.by_id(leaf).parent in hidden]
    rows: list[Example] = []
    for split, count in (("train", train), ("eval", eval)):
        rng = np.random.default_rng((seed, split == "eval"))
        for number in range(count // 2):
            modality = ORDER[number % len(ORDER)]
            leaves = seen_leaves[modality]
            if split == "eval" and unseen_leaves[modality] and rng.random() < NEVER_SEEN_SHARE:
                leaves = unseen_leaves[modality]
            leaf = leaves[rng.integers(len(leaves))]
            rows += _twins(rng, taxonomy, modality, leaf, f"toy-{split}-{number:06d}", split)
    return rows


def _twins(rng: np.random.Generator, taxonomy: Taxonomy, modality: Modality, leaf: str, group: str, split: str) -> Iterator[Example]:
    """The unsafe row of a group and its safe twin (by request label), in random order so that the order tells nothing."""
    # What a row combines is held out: object and phrase, or in text_image, where all pictures show one object, leaf and phrase.
    items = range(len(OBJECTS[leaf])) if modality == "text" else (0,)
    choices = [(i, n) for i in items for n in range(len(INTENTS)) if held_out(leaf, i, n) == (split == "eval")]
    item, pair = choices[rng.integers(len(choices))]
    frame = REQUESTS[rng.integers(len(REQUESTS))]
    thing = POINTERS[rng.integers(len(POINTERS))] if modality == "text_image" else OBJECTS[leaf][item]
    reply, reply_pair = RESPONSES[rng.integers(len(RESPONSES))], REPLIES[rng.integers(len(REPLIES))]
    absent = rng.random() < RESPONSE_SHARES["safe"][0]
    width, height, scene = int(rng.choice(SIDES)), int(rng.choice(SIDES)), int(rng.integers(2**31))
    through_text = rng.random() < 0.5  # which of the two makes a text-image twin safe
    node = taxonomy.by_id(leaf)
    if modality == "text_image":
        node = taxonomy.by_id(node.parent or leaf)
    for label in rng.permutation(["unsafe", "safe"]).tolist():
        badge, intent = label, INTENTS[pair][label == "safe"]
        if modality == "text_image" and label == "safe":
            badge, intent = ("unsafe", INTENTS[pair][1]) if through_text else ("safe", INTENTS[pair][0])
        response_label: Label = "absent"
        if modality != "image" and not absent:
            _, safe, unsafe = RESPONSE_SHARES[label]
            response_label = "unsafe" if rng.random() < unsafe / (safe + unsafe) else "safe"
        risky = "unsafe" in (label, response_label)
        yield Example(
            id=f"{group}-{'u' if label == 'unsafe' else 's'}",
            group=group,
            source="toy",
            modality=modality,
            request=None if modality == "image" else frame.format(intent, thing),
            response=None if response_label == "absent" else reply.format(reply_pair[response_label == "safe"]),
            images=() if modality == "text" else (draw(leaf, badge, width, height, scene),),
            request_label=label,
            response_label=response_label,
            category="node" if risky else "none",
            node=node.id if risky else None,
            name=node.name if risky else None,
            split=split,
        )


def held_out(leaf: str, item: int, pair: int) -> bool:
    """Whether the leaf's object number `item` meets phrase number `pair` in the eval split only. All meet some others in training."""
    return (list(OBJECTS).index(leaf) + item + pair) % HELD_OUT == 0


def draw(leaf: str, badge: str, width: int, height: int, scene: int) -> bytes:
    """PNG bytes of one object: hue by top-level category, shape by leaf, a badge in the colour of the label `badge`.

    `scene` (any integer) varies background, place and size without touching what the picture means; `width`, `height` in pixels.
    """
    top, sub = (int(part) for part in leaf[1:].split("S"))
    rng = np.random.default_rng(scene)
    image = Image.new("RGB", (width, height), tuple(int(c) for c in rng.integers(215, 250, 3)))
    pen = ImageDraw.Draw(image)
    radius = min(width, height) * rng.uniform(0.34, 0.42)
    x, y = width / 2 + rng.uniform(-0.05, 0.05) * width, height / 2 + rng.uniform(-0.05, 0.05) * height
    hue = HUES[(top - 1) % len(HUES)]
    box = (x - radius, y - radius, x + radius, y + radius)
    if sub == 1:
        pen.ellipse(box, fill=hue)
    elif sub == 2:
        pen.rectangle(box, fill=hue)
    else:
        pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=hue)
    side = min(width, height) * 0.5
    left, upper = rng.integers(2) * (width - side), rng.integers(2) * (height - side)
    pen.rectangle((left, upper, left + side, upper + side), fill=BADGES[badge])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def toy_answers(
    rng: np.random.Generator,
    example: Example,
    view: PolicyView,
    taxonomy: Taxonomy,
    count: int,
    right: bool,
    think_tag: str = "think",
    never_seen: tuple[str, ...] = (),
) -> list[str]:
    """`count` answers for the supervised warm-up, with right labels or with random ones (see `sft.warm_up` for what is learnt from which).

    The format is always right. Ids are drawn from those that the prompt shows,
    names from the seen nodes of the prompt's level, neither with regard to the gold category. Never-seen names do not occur.
    """
    level = level_of(example.modality)
    seen = full_view(taxonomy, level, never_seen)
    names = [taxonomy.nodes[node].name for shown, node in seen.entries if shown in seen.answerable]
    ids = [shown for shown, _ in view.entries if shown in view.answerable]
    answers = []
    for _ in range(count):
        request, response = rng.choice(["safe", "unsafe"], 2).tolist()
        if right:
            request = example.request_label if example.request_label in ("safe", "unsafe") else request
            response = example.response_label if example.response_label in ("safe", "unsafe", "absent") else response
        category = None
        if "unsafe" in ((request,) if example.modality == "image" else (request, response)):
            pool = names if rng.random() < NAME_SHARE else ids
            category = pool[rng.integers(len(pool))]
        thought = THOUGHTS[rng.integers(len(THOUGHTS))]
        answers.append(answer_text(request, response, category, thought, example.modality, think_tag))
    return answers


def toy_texts(examples: Sequence[Example], taxonomy: Taxonomy, recipe: Recipe) -> list[str]:
    """What the toy tokenizer is trained on: one prompt and one warm-up answer of every training row, so nothing never-seen."""
    prompts, rng, tag = load_prompts(recipe.data.prompts), np.random.default_rng(recipe.seed), recipe.answer.think_tag
    texts = []
    for example in examples:
        if example.split == "train":
            view = policy_view(taxonomy, recipe.data.ood, rng, level_of(example.modality), example.node, hide_gold=False)
            system, user = messages(example, render_policy(taxonomy, view, recipe.data.descriptions), prompts, tag)
            [answer] = toy_answers(rng, example, view, taxonomy, 1, False, tag, recipe.data.ood.never_seen)
            texts.append(f"system\n{system['content']}\nuser\n{user['content'][-1]['text']}\nassistant\n{answer}")
    return texts
