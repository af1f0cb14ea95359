"""From examples to arrays: pure in (seed, k), the same for any number of processes, nothing cut, gold that follows the view."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from pgjax.automaton import id_grid
from pgjax.config import DataConfig, GRPOConfig, ModelConfig, OODConfig, Recipe, VisionConfig
from pgjax.data.build import build_dataset, read_dataset
from pgjax.data.pipeline import Pipeline
from pgjax.data.schema import CATEGORIES, Example
from pgjax.data.toy import OBJECTS, toy_answers, toy_examples, toy_texts
from pgjax.parallel.mesh import Share
from pgjax.taxonomy import load_taxonomy
from pgjax.tokenizer import train_byte_bpe

NEVER = ("C5", "C8S2")
GONE = {"C5", "C5S1", "C5S2", "C8S2"}
TAXONOMY = load_taxonomy()
IDS = id_grid(11, 3)
RECIPE = Recipe(
    seed=3,
    model=ModelConfig(vision=VisionConfig(width=64, depth=2, heads=2, mlp=128, window=56, full_blocks=(1,))),
    data=DataConfig(descriptions=False, prompt_tokens=256, patches=128, ood=OODConfig(keep=(2, 4), never_seen=NEVER)),
    grpo=GRPOConfig(prompts=8),
)


def changed(recipe: Recipe, **data) -> Recipe:
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **data))


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def row(name: str, modality: str = "text", images: tuple[bytes, ...] = (), **known) -> Example:
    known = {"request": "Hello there.", "request_label": "unsafe", "category": "node", "node": "C1S1"} | known
    return Example(name, name, "test", modality, response=None, images=images, response_label="absent", **known)


@pytest.fixture(scope="module")
def examples():
    return toy_examples(0, 240, 126, NEVER)


@pytest.fixture(scope="module")
def tokenizer(examples):
    """Trained on what training shows, as the toy recipe does."""
    return train_byte_bpe(toy_texts(examples, TAXONOMY, RECIPE), 1500)


def _prompts(pipeline: Pipeline, epochs: int = 1):
    for k in range(epochs * len(pipeline) // 24):
        prompt = pipeline.batch(k, 24).prompt
        yield from zip(prompt.tokens_PT, prompt.length_P, strict=True)


@pytest.fixture(scope="module")
def make(examples, tokenizer):
    def make(rows=tuple(examples), recipe=RECIPE, split="train", **options):
        return Pipeline(rows, TAXONOMY, tokenizer, recipe, split, IDS, **options)

    return make


def equal(a, b) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def test_everything_fits(make, tokenizer):
    train, held_out = make(), make(split="eval")
    assert not train.dropped and not held_out.dropped and len(train) == 240 and len(held_out) == 126
    for k in range(10):
        for example, view in train.batch(k, 24).rows:
            for answer in toy_answers(np.random.default_rng(k), example, view, TAXONOMY, 4, False, "think", NEVER):
                assert len(tokenizer(answer)["input_ids"]) < 48  # and a stop token


def test_data_from_disk_gives_the_same_batches(make, examples, tmp_path):
    rows = [e for e in examples if e.split == "train"][:48]
    a = make(rows).batch(3)
    b = make(read_dataset(build_dataset(rows, tmp_path / "toy"), "train")).batch(3)
    assert equal(a.prompt, b.prompt) and equal(a.gold, b.gold) and a.rows == b.rows


def test_a_batch_is_a_function_of_seed_and_number(make):
    one, other = make(), make()
    for k in (5, 0, 77):
        a, b = one.batch(k), other.batch(k)
        assert equal(a.prompt, b.prompt) and equal(a.gold, b.gold) and a.rows == b.rows
    assert not equal(one.batch(0).prompt, one.batch(1).prompt)
    assert not equal(one.batch(0).prompt, make(recipe=dataclasses.replace(RECIPE, seed=4)).batch(0).prompt)


def test_epochs_have_their_own_order_and_views(make):
    pipeline = make()
    first, second = (([r for k in range(10) for r in pipeline.batch(epoch * 10 + k, 24).rows]) for epoch in (0, 1))
    assert sorted(e.id for e, _ in first) == sorted(e.id for e, _ in second) and [e.id for e, _ in first] != [e.id for e, _ in second]
    views = {e.id: view for e, view in first}
    assert np.mean([views[e.id] == view for e, view in second]) < 0.2
    ids = np.concatenate([pipeline.batch(k, 24).prompt.id_P for k in range(20)])
    assert len(set(ids.tolist())) == 480 and ids.dtype == np.uint32


ONE, BUCKETS = (changed(RECIPE, prompt_tokens=512, buckets=buckets) for buckets in (1, 3))


def varied(split: str, count: int = 46) -> list[Example]:
    """Rows of many lengths, every other with a picture of one of two sizes."""
    kinds = [("text", ()), ("text_image", (picture(112, 112),)), ("text", ()), ("text_image", (picture(168, 112),))]
    texts = ["word " * (5 + 37 * n % 80) for n in range(count)]
    return [row(f"{split}-{n}", *kinds[n % 4], request=text, node="C9", split=split) for n, text in enumerate(texts)]


def row_of(prompt, p: int) -> list[np.ndarray]:
    """A prompt without its padding."""
    T, I = prompt.length_P[p], 1 + np.flatnonzero(prompt.image_PI[p] >= 0).max(initial=-1)  # noqa: E741
    by_token = (prompt.tokens_PT, prompt.position_PTX, prompt.visual_PT)
    by_patch = (prompt.patches_PIB, prompt.patch_yx_PI2, prompt.grid_PI2, prompt.image_PI)
    return [T, prompt.delta_P[p], *(x[p, :T] for x in by_token), *(x[p, :I] for x in by_patch)]


def test_buckets_deal_out_the_same_rows_in_other_batches(make):
    """46 rows in batches of 10: four a window, and over 23 windows every row twenty times."""
    rows = varied("train")
    whole, bucketed = make(rows, ONE), make(rows, BUCKETS)
    assert len(bucketed.bounds) == 3 and (bucketed.bounds <= whole.bounds).all() and (bucketed.bounds.min(axis=0) < whole.bounds).all()
    drawn, dealt, shapes = [], [], []
    for k in range(92):
        one, other = whole.batch(k, 10), bucketed.batch(k, 10)
        drawn += [(one.prompt.id_P[p], one.rows[p], row_of(one.prompt, p)) for p in range(10)]
        dealt += [(other.prompt.id_P[p], other.rows[p], row_of(other.prompt, p)) for p in range(10)]
        shapes.append((other.prompt.tokens_PT.shape[1], other.prompt.image_PI.shape[1]))
        if k % 4 == 3:
            for a, b in zip(*(sorted(some[-40:], key=lambda row: row[0]) for some in (drawn, dealt)), strict=True):
                assert a[:2] == b[:2] and all(map(np.array_equal, a[2], b[2]))
    assert sorted(row.id for _, (row, _), _ in dealt) == sorted(20 * [e.id for e in rows])
    assert set(shapes) == set(map(tuple, bucketed.bounds.tolist())), "no other shapes, and each occurs"
    assert shapes != sorted(shapes) and shapes[:4] != shapes[4:8]
    slots = [sum(T * 10 for T, _ in shapes), 920 * whole.bounds[0, 0]]
    tokens = sum(row[0] for _, _, row in dealt)
    assert 1 - tokens / slots[0] < 1 - tokens / slots[1]


def test_a_bucket_of_what_others_leave_over(make):
    """Long texts, and pictures with short ones: nothing of its own needs the bucket that holds both, but a batch of both does."""
    texts = [row(f"text-{n}", request="word " * 80) for n in range(5)]
    pictures = [row(f"image-{n}", "image", (picture(168, 112),), request=None) for n in range(5)]
    pipeline = make(texts + pictures, BUCKETS)
    assert sorted(np.bincount(pipeline.buckets, minlength=3).tolist()) == [0, 5, 5] and "(0 rows)" in pipeline.padding()
    shapes = {pipeline.batch(k, 2).prompt.tokens_PT.shape[1:] + pipeline.batch(k, 2).prompt.image_PI.shape[1:] for k in range(5)}
    assert shapes == set(map(tuple, pipeline.bounds.tolist()))


def test_buckets_hold_for_held_out_rows(make):
    whole, bucketed = (make(varied("eval"), recipe, "eval") for recipe in (ONE, BUCKETS))
    batches = [bucketed.batch(k, 8) for k in range(bucketed.batches(8))]
    rows = [row for batch in batches for row in batch.rows]
    want = [row for k in range(whole.batches(8)) for row in whole.batch(k, 8).rows]
    assert rows != want and sorted(rows, key=lambda row: row[0].id) == sorted(want, key=lambda row: row[0].id)
    assert [batch.gold.weight_P.sum() for batch in batches] == [8] * 5 + [6]
    assert len({batch.prompt.tokens_PT.shape + batch.prompt.image_PI.shape for batch in batches}) == 3


@pytest.mark.parametrize("split", ["train", "eval"])
def test_any_number_of_workers_makes_the_same_batches(make, split):
    one, four = (make(varied(split), changed(BUCKETS, workers=workers), split) for workers in (1, 4))
    for k in (2, 0, 1):
        a, b = one.batch(k, 16), four.batch(k, 16)
        assert equal(a.prompt, b.prompt) and equal(a.gold, b.gold) and a.rows == b.rows


def test_a_bucketed_batch_does_not_depend_on_what_was_loaded_before(make):
    one, other = (make(varied("train"), BUCKETS) for _ in range(2))
    for k in range(12):
        last = one.batch(k, 8)
    assert equal(last.prompt, other.batch(11, 8).prompt) and last.rows == other.batch(11, 8).rows


@pytest.mark.parametrize("buckets", [1, 3])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_processes_hold_slices_of_one_batch(make, split, buckets):
    how = (varied(split, 126), changed(ONE, buckets=buckets), split)
    whole = make(*how)
    parts = [make(*how, share=Share((i,), 4)) for i in range(4)]
    for k in (0, 3, 7):
        want, got = whole.batch(k, 16), [part.batch(k, 16) for part in parts]
        for field in dataclasses.fields(want.gold):
            np.testing.assert_array_equal(getattr(want.gold, field.name)[: len(want.rows)],
                                          np.concatenate([getattr(b.gold, field.name) for b in got])[: len(want.rows)])  # fmt: skip
        for field in dataclasses.fields(want.prompt):
            np.testing.assert_array_equal(getattr(want.prompt, field.name)[: len(want.rows)],
                                          np.concatenate([getattr(b.prompt, field.name) for b in got])[: len(want.rows)])  # fmt: skip
        assert want.rows == sum((b.rows for b in got), [])
        assert sum(b.gold.weight_P.sum() for b in got) == len(want.rows)
    with pytest.raises(ValueError, match="do not divide"):
        parts[0].batch(0, 6)
    assert make(*how, share=Share((1, 3), 4)).batch(3, 16).rows == parts[1].batch(3, 16).rows + parts[3].batch(3, 16).rows


def test_held_out_rows_come_in_order_and_the_last_batch_is_filled(make, examples):
    pipeline = make(split="eval")
    batches = [pipeline.batch(k, 16) for k in range(pipeline.batches(16))]
    assert [e.id for b in batches for e, _ in b.rows] == [e.id for e in examples if e.split == "eval"]
    last = batches[-1]
    assert len(last.rows) == 14 and last.gold.weight_P.tolist() == [1.0] * 14 + [0.0] * 2
    assert (last.prompt.length_P > 0).all() and last.prompt.tokens_PT.shape == (16, 256)
    assert last.rows[3] == pipeline.batch(126 // 16, 16).rows[3]
    by_size = [r for k in range(pipeline.batches(9)) for r in pipeline.batch(k, 9).rows]
    assert by_size == [r for b in batches for r in b.rows], "views depend on the example, not on the batch"
    with pytest.raises(IndexError, match="8 batches"):
        pipeline.batch(8, 16)


def test_arrays(make, tokenizer):
    pipeline = make()
    prompt, gold, rows = pipeline.batch(2, 24)
    kinds = dict(tokens_PT=np.int32, length_P=np.int32, position_PTX=np.int32, delta_P=np.int32, visual_PT=np.int32, patches_PIB=np.float32,
                 patch_yx_PI2=np.int32, grid_PI2=np.int32, image_PI=np.int32, id_P=np.uint32)  # fmt: skip
    assert {name: getattr(prompt, name).dtype for name in kinds} == kinds
    kinds = {f.name: getattr(gold, f.name).dtype for f in dataclasses.fields(gold)}
    other = {"accepted_PN": np.bool_, "never_seen_P": np.bool_, "weight_P": np.float32}
    assert kinds == {name: other.get(name, np.int32) for name in kinds}
    assert gold.node_of_id_PK.shape == (24, len(IDS)) and gold.accepted_PN.shape == (24, len(TAXONOMY))
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for p, (example, view) in enumerate(rows):
        length, tokens = prompt.length_P[p], prompt.tokens_PT[p]
        assert (tokens[length:] == 0).all() and (prompt.visual_PT[p, length:] == -1).all()
        visual, valid = prompt.visual_PT[p], prompt.image_PI[p] >= 0
        assert ((visual >= 0) == (tokens == pad)).all()
        assert sorted(visual[visual >= 0]) == sorted(set(np.flatnonzero(valid) // 4)) and valid.sum() == 4 * (visual >= 0).sum()
        assert (prompt.patches_PIB[p][~valid] == 0).all()
        if example.modality == "text":
            assert not valid.any() and prompt.delta_P[p] == 0
            np.testing.assert_array_equal(prompt.position_PTX[p, :length], np.arange(length)[:, None].repeat(3, 1))
        else:
            assert prompt.delta_P[p] < 0 and prompt.position_PTX[p, length - 1].tolist() == [length - 1 + prompt.delta_P[p]] * 3
        text = tokenizer.decode(tokens[:length], skip_special_tokens=False)
        assert text.endswith("<|im_start|>assistant\n") and (example.request or "") in text and (example.response or "") in text
        for shown, node in view.entries:
            assert f"{shown}: {TAXONOMY.nodes[node].name}\n" in text and gold.node_of_id_PK[p, IDS.index(shown)] == node
        assert (gold.node_of_id_PK[p] >= 0).sum() == len(view.entries)


def test_padding_further_changes_nothing(make):
    one, longer = make(), make(recipe=changed(RECIPE, prompt_tokens=300, patches=160))
    a, b = one.batch(4).prompt, longer.batch(4).prompt
    np.testing.assert_array_equal(a.length_P, b.length_P)
    for name, width in (("tokens_PT", 256), ("position_PTX", 256), ("visual_PT", 256), ("patches_PIB", 128), ("image_PI", 128)):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name)[:, :width])
    assert (b.visual_PT[:, 256:] == -1).all() and (b.image_PI[:, 128:] == -1).all()


def test_two_pictures_stay_apart(make):
    example = row("two", "text_image", (picture(70, 112), picture(56, 56)), node="C9")
    pipeline = make([example])
    prompt, gold, _ = pipeline.batch(0, 1)
    assert (np.unique(prompt.image_PI[0], return_counts=True)[1] == [128 - 32 - 16, 32, 16]).all()
    visual = prompt.visual_PT[0][prompt.visual_PT[0] >= 0]
    assert visual[:8].max() < 8 <= visual[8:].min() and len(visual) == 12
    sides = np.array([[8, 4], [4, 4], [0, 0]])  # in patches: of the tall picture, of the other, of empty slots
    np.testing.assert_array_equal(prompt.grid_PI2[0], sides[prompt.image_PI[0]])
    starts = np.flatnonzero(np.diff((prompt.visual_PT[0] >= 0).astype(int)) == 1) + 1
    assert len(starts) == 2 and prompt.position_PTX[0, starts[1]].tolist() == [starts[1] - 8 + 4] * 3
    assert gold.node_P[0] == TAXONOMY.index("C9")


def test_max_pixels_caps_what_the_model_takes(make):
    example = row("large", "image", (picture(140, 140),), request=None)
    sides = {}
    for cap in (None, 112 * 112, 56 * 56, 28 * 28, 10**6):
        vision = dataclasses.replace(RECIPE.model.vision, max_pixels=128 * 128)
        recipe = dataclasses.replace(changed(RECIPE, max_pixels=cap), model=ModelConfig(vision=vision))
        sides[cap] = make([example], recipe).batch(0, 1).prompt.grid_PI2[0].max()
    assert sides == {None: 8, 112 * 112: 8, 56 * 56: 4, 28 * 28: 2, 10**6: 8}


def test_what_does_not_fit_is_dropped_and_counted(make):
    rows = [
        row("good"),
        row("long", request="word " * 300),
        row("wide", "image", (picture(400, 400),), request=None),
        row("broken", "image", (picture(56, 56)[:90],), request=None),
        row("unseen", node="C5S1"),
        row("accepted", node="C1S1", accepted=("C8S2",)),
        row("reserved", node="C11S1"),
        row("elsewhere", split="eval"),
    ]
    pipeline = make(rows)
    assert len(pipeline) == 1 and pipeline.dropped == {"prompt": 1, "patches": 1, "image": 1, "never_seen": 2, "reserved": 1}
    assert {e.id for e, _ in pipeline.batch(0).rows} == {"good"}
    with pytest.raises(ValueError, match="no example of split 'train' is left"):
        make(rows[1:])


def test_the_longest_policy_bounds_every_draw(make):
    """A limit that drops some rows never meets a prompt above it later."""
    ood = dataclasses.replace(RECIPE.data.ood, renumber=True)
    pipeline = make(recipe=changed(RECIPE, prompt_tokens=222, ood=ood))
    assert 0 < pipeline.dropped["prompt"] < 240
    assert max(length for _, length in _prompts(pipeline, 4)) <= 222


def test_gold_follows_the_view(make):
    batches = [make(recipe=changed(RECIPE, ood=OODConfig(share=0.5, keep=(2, 4), never_seen=NEVER))).batch(k, 24) for k in range(10)]
    seen = set()
    for _, gold, rows in batches:
        assert not gold.never_seen_P.any()
        for p, (example, view) in enumerate(rows):
            kind = CATEGORIES[gold.category_P[p]]
            seen.add((example.category, kind))
            if example.category == "none":
                assert kind == "none" and gold.node_P[p] == -1 and not gold.accepted_PN[p].any()
                continue
            node = TAXONOMY.index(example.node)
            assert gold.node_P[p] == node and gold.accepted_PN[p].tolist() == [n == node for n in range(len(TAXONOMY))]
            assert (kind == "node") == (node in gold.node_of_id_PK[p]) == (node in [n for _, n in view.entries])
            assert (kind == "ood") == (node in view.hidden)
    assert seen == {("none", "none"), ("node", "node"), ("node", "ood")}


def test_never_seen_is_the_second_kind_of_ood(make):
    pipeline = make(split="eval")
    kinds = set()
    for k in range(pipeline.batches(16)):
        _, gold, rows = pipeline.batch(k, 16)
        for p, (example, _) in enumerate(rows):
            assert gold.never_seen_P[p] == (example.node in GONE)
            assert not gold.never_seen_P[p] or CATEGORIES[gold.category_P[p]] == "ood"
            kinds.add((CATEGORIES[gold.category_P[p]], bool(gold.never_seen_P[p])))
    assert kinds == {("none", False), ("node", False), ("ood", False), ("ood", True)}


def test_other_gold(make):
    rows = [
        row("ood", category="ood", node=None),
        row("unknown", category="unknown", node=None, request_label="unknown"),
        row("leaf of a top-level question", "text_image", (picture(56, 56),), node="C9S2", accepted=("C10S1",)),
        row("accepted", accepted=("C6S1",)),
    ]
    pipeline = make(
        [dataclasses.replace(r, split="eval") for r in rows], changed(RECIPE, prompt_tokens=1024, ood=OODConfig(share=0)), "eval"
    )
    gold = pipeline.batch(0, 4).gold
    assert [CATEGORIES[c] for c in gold.category_P] == ["ood", "unknown", "node", "node"]
    assert gold.node_P.tolist() == [-1, -1, TAXONOMY.index("C9"), TAXONOMY.index("C1S1")]
    assert [TAXONOMY.nodes[n].id for n in np.flatnonzero(gold.accepted_PN[2])] == ["C9", "C10"]
    assert [TAXONOMY.nodes[n].id for n in np.flatnonzero(gold.accepted_PN[3])] == ["C1S1", "C6S1"]


def test_never_seen_occurs_in_no_training_prompt(make, tokenizer):
    names = [TAXONOMY.by_id(node).name for node in GONE] + [thing for node in GONE & OBJECTS.keys() for thing in OBJECTS[node]]
    for tokens, length in _prompts(make(), epochs=2):
        text = tokenizer.decode(tokens[:length])
        assert not [name for name in names if name in text] and "C5" not in text and "C8S2" not in text and "C11S1" not in text
