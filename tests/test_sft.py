"""The supervised trainer: packed rows lose nothing, batches are a function of (seed, k), and a run goes on where it was killed."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from tiny_qwen import QUICK
from tiny_recipe import ONE, params, setup
from tiny_run import one_device
from toy_lessons import tiny_rewriter, write_lessons

from pgjax.cli import main
from pgjax.config import Recipe
from pgjax.data.images import capped, image_grid, slot_count
from pgjax.generate.law import Law
from pgjax.models.qwen_vl import QwenVL
from pgjax.parallel.mesh import Share, place_rows
from pgjax.recipes import load_recipe, validate
from pgjax.rewriter.lessons import read_lessons
from pgjax.rewriter.record import rewriter_messages
from pgjax.serving.model import Model
from pgjax.sft.lessons import Lesson, Lessons, dealt, drawn
from pgjax.sft.step import Taught, make_step
from pgjax.sft.trainer import texts, train
from pgjax.tokenizer import never_sampled, stop_ids, train_byte_bpe
from pgjax.train.run_folder import read_metrics
from pgjax.train.saved import open_run
from pgjax.train.trainable import base
from pgjax.train.update import TrainState

SGD = optax.sgd(0.5)  # a step shows the gradient itself


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_lessons(tmp_path_factory.mktemp("lessons") / "data")


@pytest.fixture(scope="module")
def taught(root) -> list[Lesson]:
    return read_lessons(tiny_rewriter(root).data)[0]


@pytest.fixture(scope="module")
def tokenizer(taught):
    return train_byte_bpe(texts(taught), tiny_rewriter().tokenizer_vocab)


def changed(recipe: Recipe, **sft) -> Recipe:
    return dataclasses.replace(recipe, sft=dataclasses.replace(recipe.sft, **sft))


def law_of(recipe: Recipe, tokenizer) -> Law:
    return Law(jnp.asarray(never_sampled(tokenizer, recipe.model.text.vocab)), None, None, recipe.answer.max_tokens)


# --- the step ------------------------------------------------------------------------------------------------------------------


def one_by_one(model: QwenVL, blocked_V: np.ndarray, batch: Taught):
    """A function of the parameters, the mean of -log p over the answers' tokens: every prompt with its answer behind it, a plain row."""
    prompt, length_P, (P, _, R) = batch.prompt, batch.length_PG[:, 0], batch.tokens_PGR.shape
    wider = lambda x, value: np.concatenate([x, np.full((P, R, *x.shape[2:]), value, x.dtype)], axis=1)  # noqa: E731
    tokens_PT, visual_PT, position_PTX = wider(prompt.tokens_PT, 0), wider(prompt.visual_PT, -1), wider(prompt.position_PTX, 0)
    said_PT = np.zeros(tokens_PT.shape, bool)
    for p, (start, length) in enumerate(zip(prompt.length_P, length_P, strict=True)):
        own = slice(start, start + length)
        tokens_PT[p, own], said_PT[p, own] = batch.tokens_PGR[p, 0, :length], True
        position_PTX[p, own] = (start + prompt.delta_P[p] + np.arange(length))[:, None]
    pictures = prompt.patches_PIB, prompt.patch_yx_PI2, prompt.grid_PI2, prompt.image_PI
    inputs = jax.tree.map(jnp.asarray, (*pictures, tokens_PT, visual_PT, position_PTX, prompt.length_P + length_P))

    def loss(weights):
        logits = model.apply({"params": weights}, *inputs)
        logp = jax.nn.log_softmax(jnp.where(blocked_V, -1e30, logits[:, :-1]))
        return -(jnp.take_along_axis(logp, tokens_PT[:, 1:, None], axis=2)[..., 0] * said_PT[:, 1:]).sum() / said_PT.sum()

    return loss


@pytest.fixture(scope="module")
def plain(taught, tokenizer):
    """Loss and gradient of the first batch, rows one by one."""
    batch = Lessons(taught, tokenizer, changed(tiny_rewriter(), buckets=1), 1, True).batch(0).taught
    assert len(set(batch.length_PG[:, 0])) > 3 and (batch.prompt.image_PI >= 0).any()
    loss = one_by_one(setup().model, never_sampled(tokenizer, tiny_rewriter().model.text.vocab), batch)
    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params())


@pytest.mark.parametrize(("mesh", "micro"), [(ONE, 4), ((2, 2, 2), 8)])
def test_a_packed_step_is_that_of_rows_one_by_one(taught, tokenizer, plain, mesh, micro):
    """On one device two micro-batches of four prompts in a row, on eight devices one of two in a row."""
    recipe, place = changed(tiny_rewriter(), micro_prompts=micro, buckets=1), setup(mesh)
    batches = Lessons(taught, tokenizer, recipe, mesh[0] * mesh[1], True)
    batch, law = batches.batch(0), law_of(recipe, tokenizer)
    step = make_step(place, law, SGD, "loss", batches.per_row, recipe.sft.prompts // micro)
    state = TrainState(jnp.int32(0), params(mesh), SGD.init(params(mesh)))
    with jax.set_mesh(place.mesh):
        state, metrics = step(state, {}, place_rows(batch.taught, place.mesh), width=batch.width)
    loss, gradient = plain
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["actor/grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
    moved = jax.tree.map(lambda after, before: (np.asarray(before) - np.asarray(after)) / 0.5, state.params, params())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), moved, gradient)


# --- batches -------------------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_lesson_at_most_once():
    bucket_N, bound_BD = np.random.default_rng(0).integers(0, 3, 50), np.array([[40], [80], [160]])
    rows_KP, bucket_K = drawn(bucket_N, bound_BD, 8, 15, seed=1)
    first, second = rows_KP[:6].ravel().tolist(), rows_KP[6:12].ravel().tolist()
    assert len(set(first)) == len(set(second)) == 48 and first != second
    np.testing.assert_array_equal(drawn(bucket_N, bound_BD, 8, 9, seed=1)[0], rows_KP[:9])
    assert (drawn(bucket_N, bound_BD, 8, 15, seed=2)[0] != rows_KP).any()
    assert (bucket_N[rows_KP].max(axis=1) == bucket_K).all()
    mixed = [len(set(bucket_N[rows_P])) > 1 for rows_P in rows_KP[:6]]
    assert sum(mixed) <= 2, "but for what a bucket has left over"
    few, _ = drawn(np.array([0, 1, 0]), bound_BD[:2], 8, 3, seed=0)
    assert rows_KP[0].max() < 50 and set(few.ravel()) == {0, 1, 2}


def test_answers_are_dealt_out_evenly():
    size_KP = np.random.default_rng(0).integers(1, 100, (5, 24))
    order_KP = dealt(size_KP, 4)
    assert (np.sort(order_KP, axis=1) == np.arange(24)).all()
    rows = np.take_along_axis(size_KP, order_KP, axis=1).reshape(5, 6, 4).sum(axis=2)
    assert np.ptp(rows, axis=1).max() < 40 < np.ptp(size_KP.reshape(5, 6, 4).sum(axis=2), axis=1).min()


def test_batches(taught, tokenizer):
    recipe = tiny_rewriter()
    whole = Lessons(taught, tokenizer, recipe, 4, True)
    assert len(whole) == 6 and not whole.dropped and len(whole.widths) == 2 and whole.per_row == 2
    stop = stop_ids(tokenizer)[0]
    for k in range(6):
        (rows, width, counts), (longest, slots) = whole.batch(k), whole.bounds[whole.bucket_K[k]]
        assert rows.prompt.tokens_PT.shape == (8, longest) and rows.prompt.image_PI.shape == (8, slots)
        assert (longest, slots, width) in whole.shapes()
        halves = [Lessons(taught, tokenizer, recipe, 4, True, Share((process,), 2)).batch(k).taught for process in (0, 1)]
        jax.tree.map(lambda whole, *parts: np.testing.assert_array_equal(np.concatenate(parts), whole), rows, *halves)
        for p, n in enumerate(whole.rows_KP[k]):
            ids = rows.tokens_PGR[p, 0, : rows.length_PG[p, 0]].tolist()
            assert ids[-1] == stop and tokenizer.decode(ids[:-1]) == taught[n].answer
            assert taught[n].messages[1]["content"][-1]["text"] in tokenizer.decode(rows.prompt.tokens_PT[p])
        assert counts["prompt"] == rows.prompt.length_P.sum() and counts["answer"] == rows.weight_PGR.sum() == rows.length_PG.sum()
        assert counts["patches"] == (rows.prompt.image_PI >= 0).sum() and counts["slots"] == 8 * longest + 8 // whole.per_row * width
        assert rows.length_PG.reshape(-1, whole.per_row).sum(axis=1).max() <= width


def test_what_only_fills_a_batch_has_no_answer(taught, tokenizer):
    held_out = Lessons(taught[:6], tokenizer, changed(tiny_rewriter(), micro_prompts=4), 4, False)
    batches = [held_out.batch(k) for k in range(len(held_out))]
    assert [int((batch.taught.length_PG > 0).sum()) for batch in batches] == [4, 2]
    assert batches[1].taught.weight_PGR[batches[1].taught.length_PG[:, 0] == 0].sum() == 0
    assert sum(batch.counts["answer"] for batch in batches) == sum(batch.taught.weight_PGR.sum() for batch in batches)


def test_what_does_not_fit_is_dropped_and_counted(taught, tokenizer, tmp_path):
    recipe, (whole, cut) = tiny_rewriter(), (tmp_path / "whole.png", tmp_path / "cut.png")
    data = next(lesson.images[0] for lesson in taught if lesson.images).read_bytes()
    whole.write_bytes(data), cut.write_bytes(data[:-40])

    def lesson(images=(), request="Help me paint the fence.", answer="Fine.") -> Lesson:
        return Lesson("a", "a", rewriter_messages(request, len(images)), tuple(images), answer)

    bad = [lesson([whole] * 5), lesson(request="on and on " * 99), lesson(answer="so " * 99)]
    kept = Lessons([lesson(), *bad, lesson([whole])], tokenizer, recipe, 4, False)
    assert kept.dropped == {"patches": 1, "prompt": 1, "answer": 1} and len(kept.kept) == 2
    with pytest.raises(ValueError, match="no lesson to train on is left; dropped: {'patches': 1}"):
        Lessons(bad[:1], tokenizer, recipe, 4, True)
    for lost in (cut, tmp_path / "none.png"):
        with pytest.raises(ValueError, match=f"image {lost}"):
            Lessons([lesson(), lesson([lost])], tokenizer, recipe, 4, True)
    (forged,) = Lessons([lesson(answer="Fine.<|im_end|>")], tokenizer, recipe, 4, False).kept
    assert tokenizer.decode(forged.answer[:-1]) == "Fine.‹|im_end|>" and stop_ids(tokenizer)[0] not in forged.answer[:-1]


def test_a_picture_that_is_lost_between_batches_is_named(taught, tokenizer, tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(next(lesson.images[0] for lesson in taught if lesson.images).read_bytes())
    lessons = Lessons([Lesson("a", "a", rewriter_messages("Paint it.", 1), (file,), "Fine.")], tokenizer, tiny_rewriter(), 4, True)
    lessons.batch(0)
    file.unlink()
    with pytest.raises(ValueError, match=f"image {file} cannot be read any more: No such file or directory; put it back"):
        lessons.batch(1)


# --- the run -------------------------------------------------------------------------------------------------------------------


def frozen(root: Path) -> Recipe:
    recipe = tiny_rewriter(root)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, freeze_vision=True))


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A finished run with a frozen tower, and its summary."""
    recipe, path = frozen(root), tmp_path_factory.mktemp("runs") / "tiny"
    with mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK)):
        yield path, train(recipe, path, *read_lessons(recipe.data))


def lasting(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(("perf/", "timing_s/"))}


def test_the_run_folder(run, root):
    path, summary = run
    rows = read_metrics(path)
    order = [
        ("eval", 0),
        *[("sft", 1), ("sft", 2), ("eval", 2)],
        *[("sft", 3), ("sft", 4), ("eval", 4)],
        *[("sft", 5), ("sft", 6), ("eval", 6)],
    ]
    assert [(row["phase"], row["step"]) for row in rows] == order
    assert all(np.isfinite(value) for row in rows for name, value in row.items() if name != "phase")
    first, *_, last = (row for row in rows if row["phase"] == "eval")
    assert last["loss"] < first["loss"] and last["perplexity"] == pytest.approx(np.exp(last["loss"]))
    assert json.loads((path / "summary.json").read_text()) == summary and summary["held_out_loss_after"] == last["loss"]
    groups = {json.loads(line)["group"] for line in (root / "train.jsonl").read_text().splitlines()}
    assert json.loads((path / "data" / "groups.json").read_text()) == sorted(groups)
    facts = json.loads((path / "data" / "lessons.json").read_text())
    assert facts["train"]["lessons"] == 32 and facts["eval"]["lessons"] == 10 and len(facts["train"]["buckets"]) == 2
    assert 0 < summary["padding"] < 0.3


def test_a_program_is_compiled_once_for_a_bucket(run, root, taught, tokenizer):
    """Both occur in the first three steps; what the first checkpoint compiles is counted with the third."""
    path, _ = run
    shapes = Lessons(taught, tokenizer, frozen(root), 4, True).bucket_K
    assert len(set(shapes[:3])) == len(set(shapes)) == 2
    compiled = [row["perf/compilations"] for row in read_metrics(path) if row["phase"] == "sft"]
    assert compiled[0] > 0 and compiled[3:] == [0, 0, 0]


def test_a_resumed_run_gives_the_same_numbers(run, root):
    """As if killed after the checkpoint of step 4, in the middle of a line."""
    path, summary = run
    recipe, copy = frozen(root), path.parent / "again" / "tiny"
    shutil.copytree(path, copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    (copy / "summary.json").unlink()
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "pha')
    again = train(recipe, copy, *read_lessons(recipe.data))
    assert list(map(lasting, read_metrics(copy))) == list(map(lasting, read_metrics(path)))
    assert again | {"seconds": 0} == summary | {"seconds": 0}


def test_a_run_goes_on_with_its_own_lessons_alone(run, root, capsys):
    path, summary = run
    lessons, held_out = read_lessons(tiny_rewriter(root).data)
    assert train(frozen(root), path, lessons, held_out) == summary and "has ended after 6 steps" in capsys.readouterr().err
    with pytest.raises(ValueError, match="was started with other lessons"):
        train(frozen(root), path, lessons[1:], held_out)
    with pytest.raises(ValueError, match="started with model.freeze_vision = True"):
        train(tiny_rewriter(root), path, lessons, held_out)


def test_the_frozen_tower_stays_and_the_model_opens(run, root, taught):
    path, _ = run
    recipe = frozen(root)
    with mock.patch("pgjax.train.saved.make_mesh", one_device):
        saved = open_run(path, best=True)
        before = setup(ONE, recipe.model).init(recipe.seed)
        same = jax.tree.map(lambda a, b: bool((a == b.astype(a.dtype)).all()), saved.params, before)
        assert all(jax.tree.leaves(same["visual"])) and not any(jax.tree.leaves(same["model"]["layers"]["self_attn"]))
        with Model.load(path, rows=1) as model:
            ask = model.chat(taught[1].messages, [image.read_bytes() for image in taught[1].images], limit=4)
            [told] = model.engine.submit(ask).result()
    assert 1 <= len(told.tokens) <= 4


def test_adapters_alone_are_trained(root, tmp_path):
    tiny = tiny_rewriter(root)
    recipe = dataclasses.replace(
        tiny, model=dataclasses.replace(tiny.model, lora_rank=2), sft=dataclasses.replace(tiny.sft, steps=1, validate_every=0)
    )
    with mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK)):
        train(recipe, tmp_path / "run", *read_lessons(recipe.data))
    with mock.patch("pgjax.train.saved.make_mesh", one_device):
        saved = flatten_dict(open_run(tmp_path / "run").params)
    before = flatten_dict(base(setup(ONE, recipe.model).init(recipe.seed)))
    adapters = {path: leaf for path, leaf in saved.items() if path not in before}
    assert adapters and any(float(abs(leaf).max()) > 0 for path, leaf in adapters.items() if path[-1] == "lora_b")
    assert all(float(abs(leaf - saved[path]).max()) < 1e-6 for path, leaf in before.items()), "but for the rounding of another program"


def test_the_report(run, capsys):
    path, _ = run
    page = (path / "report.html").read_text()
    assert main(["report", str(path)]) == 0 and (path / "report.html").read_text() == page
    assert "report: " in capsys.readouterr().out
    for words in ("Loss", "Gradient norm", "Padding", "Tokens per second", "held-out perplexity", "all but the vision tower", "6 of 6"):
        assert words in page
    assert "harm" not in page, "nothing of what lessons say"


# --- the recipes ---------------------------------------------------------------------------------------------------------------


def test_the_recipes_fit_their_machines():
    toy, large = load_recipe("toy_rewriter"), load_recipe("rewriter_7b")
    assert validate(toy).not_a_guard and validate(dataclasses.replace(large, devices=8)) and large.not_a_guard
    largest = image_grid((3000, 2000), capped(large.model.vision, large.data.max_pixels))
    assert slot_count(largest, large.model.vision) <= large.data.patches, "no picture is too large"
