"""`pgjax export` and `pgjax score`: a run becomes a checkpoint directory that transformers reads, and both say the same of it."""

import dataclasses
import io
import json
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_recipe import materials, tiny_recipe

from pgjax.cli import main
from pgjax.completions import open_model
from pgjax.config import Recipe
from pgjax.data.toy import draw
from pgjax.models import checkpoint
from pgjax.models.hf_config import config_from_hf
from pgjax.parallel.mesh import make_mesh
from pgjax.recipes import validate
from pgjax.rewriter.evaluate import trained_on
from pgjax.tokenizer import IMAGE_PAD
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.run_folder import RunFolder, read_config
from pgjax.train.setup import make_setup
from pgjax.train.trainable import base, merge, merge_adapters
from pgjax.train.update import make_optimizer

SIDE = 28  # pixels of a visual token, patch 14 or not


def recipe_of(case: str) -> Recipe:
    """The tiny recipe for pictures of 4 to 12 visual tokens; as Qwen3-VL with adapters alone trained."""
    recipe = dataclasses.replace(tiny_recipe(), devices=0)  # the process has its devices already
    vision = dataclasses.replace(recipe.model.vision, min_pixels=4 * SIDE**2)
    model = dataclasses.replace(recipe.model, vision=vision)
    if case == "qwen3_vl, LoRA":
        text = dataclasses.replace(model.text, qkv_bias=False, qk_norm=True, mrope_interleaved=True, tied=not model.text.tied)
        own = dict(window=0, full_blocks=(), positions=6, deepstack=(0,), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        model = dataclasses.replace(model, family="qwen3_vl", text=text, vision=dataclasses.replace(vision, **own), lora_rank=2)
    return validate(dataclasses.replace(recipe, model=model, data=dataclasses.replace(recipe.data, max_pixels=12 * SIDE**2)))


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl, LoRA"])
def run(request, tmp_path_factory):
    """A run folder as training leaves it, around random numbers; the parameters that it stands for; and where they were exported to."""
    path, recipe = tmp_path_factory.mktemp("runs") / "tiny", recipe_of(request.param)
    RunFolder(path, recipe).close()
    materials().tokenizer.save_pretrained(path / "tokenizer")
    (path / "data").mkdir(exist_ok=True)
    (path / "data" / "groups.json").write_text('["vault"]')
    setup, config, rng = make_setup(recipe.model, make_mesh(recipe.mesh)), recipe.grpo, np.random.default_rng(5)
    noisy = lambda tree: jax.tree.map(lambda x: x + np.asarray(rng.normal(0, 0.1, x.shape), np.float32), tree)  # noqa: E731
    params = jax.device_put(noisy(setup.init(0)), base(setup.training))  # no bias zero, no norm one
    optimizer = make_optimizer(config.optimizer, config.steps * (config.prompts // config.mini_prompts))
    reference, state = setup.reference(params), setup.state(params, optimizer)
    state = state.replace(params=noisy(state.params))
    for name, tree in (("checkpoints", state), ("reference", reference)):
        checkpoints = Checkpoints(path / name, 1)
        checkpoints.save(0, tree)
        checkpoints.close()
    folder = path.parent / "exported"
    with mock.patch.object(checkpoint, "FILE_BYTES", 100_000):
        assert main(["export", str(path), str(folder)]) == 0
    policy = merge_adapters(merge(state.params, reference), recipe.model)
    return path, jax.tree.map(np.asarray, policy), folder


def test_the_directory_is_whole_and_read_again_bitwise(run):
    path, params, folder = run
    names = {file.name for file in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"}
    assert "model.safetensors.index.json" in names and len(list(folder.glob("model-*.safetensors"))) > 2
    assert not list(folder.parent.glob(".*.part")) and trained_on(folder) == {"vault"}
    again, recipe = config_from_hf(folder), read_config(path)
    assert again.text == recipe.model.text and again.vision == dataclasses.replace(recipe.model.vision, max_pixels=12 * SIDE**2)
    setup, loaded, _ = open_model(folder, "float32")
    assert len(setup.mesh.devices.ravel()) == 8
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert json.loads((folder / "config.json").read_text())["pgjax"] == {"run": "tiny", "think_tag": "think", "not_a_guard": True}


def test_what_cannot_be_exported_leaves_nothing(run, tmp_path, capsys):
    path, _, folder = run
    assert main(["export", str(path), str(folder)]) == 2
    assert "is there already; name a new folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "nowhere", tmp_path / "empty"):
        assert main(["export", str(bad), str(tmp_path / "new")]) == 2
        assert "is not a run folder" in capsys.readouterr().err
    assert main(["export", str(path), str(tmp_path / "new"), "--best"]) == 2
    assert "no best checkpoint" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["export", str(path), str(tmp_path / "file" / "new")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "file"]


def conversations(folder) -> list[dict]:
    """Text alone, a picture, two of other sizes and modes, and one below and one above the bounds, as rows of a file in `folder`."""
    (folder / "small.png").write_bytes(draw("C8S1", "safe", 20, 20, 7))
    (folder / "large.png").write_bytes(draw("C8S1", "safe", 400, 300, 8))
    (folder / "upright.png").write_bytes(draw("C8S1", "unsafe", 84, 56, 5))
    grey = Image.open(io.BytesIO(draw("C8S1", "safe", 56, 112, 6))).convert("L")
    grey.save(folder / "grey.jpg")
    image = lambda name: {"type": "image", "image": name}  # noqa: E731
    text = lambda words: {"type": "text", "text": words}  # noqa: E731
    rows = [
        {"messages": [{"role": "user", "content": "How do I oil a gate?"}], "completion": "With a rag, sparingly."},
        {"messages": [{"role": "user", "content": [image("upright.png"), text("Is this a lamp?")]}], "completion": "No.", "id": "lamp"},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [image("grey.jpg"), text("and"), image("upright.png")]},
            ],
            "completion": "Two pictures\nof other sizes<|im_end|>",
        },
        {"messages": [{"role": "user", "content": [image("small.png"), image("large.png")]}], "completion": "Both."},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def score(model, folder, capsys, *more) -> list[dict]:
    assert main(["score", "--model", str(model), "--jsonl", str(folder / "rows.jsonl"), "--json", *more]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_and_its_export_score_alike(run, tmp_path, capsys):
    path, _, folder = run
    rows = conversations(tmp_path)
    ours, theirs = score(path, tmp_path, capsys), score(folder, tmp_path, capsys)
    assert [row["id"] for row in ours] == [1, "lamp", 3, 4]
    for row, a, b in zip(rows, ours, theirs, strict=True):
        assert materials().tokenizer.decode(a["tokens"]) == row["completion"] and a["tokens"] == b["tokens"]
        np.testing.assert_allclose(a["logprobs"], b["logprobs"], atol=1e-5)
        assert a["perplexity"] == pytest.approx(np.exp(-np.mean(a["logprobs"])))
    rough = score(folder, tmp_path, capsys, "--dtype", "bfloat16")
    assert 0 < max(np.abs(np.subtract(a["logprobs"], b["logprobs"])).max() for a, b in zip(ours, rough, strict=True)) < 0.3
    assert main(["score", "--model", str(folder), "--jsonl", str(tmp_path / "rows.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(f"lamp: {len(ours[1]['tokens'])} tokens, mean logprob -")


@pytest.mark.parity
def test_transformers_loads_the_export_and_says_the_same(run, tmp_path, capsys):
    """Through transformers' own tokenizer, image processor, config and weights, row by row without padding."""
    torch = pytest.importorskip("torch")
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    _, _, folder = run
    rows, ours = conversations(tmp_path), score(folder, tmp_path, capsys)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, use_fast=False)
    pad = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    assert model.config.image_token_id == pad and model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    for row, found in zip(rows, ours, strict=True):
        parts = [part for message in row["messages"] if isinstance(message["content"], list) for part in message["content"]]
        pictures = [Image.open(tmp_path / part["image"]).convert("RGB") for part in parts if part["type"] == "image"]
        given = processor(images=pictures, return_tensors="pt") if pictures else {}
        counts = iter((given["image_grid_thw"].prod(-1) // 4).tolist() if pictures else [])
        prompt = tokenizer(tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False))["input_ids"]
        tokens = [t for token in prompt for t in ([pad] * next(counts) if token == pad else [token])]
        start, ids = len(tokens), torch.tensor([tokens + found["tokens"]])
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=(ids == pad).int(), **given).logits[0, start - 1 : -1]
        if pictures and row["completion"] == "Both.":
            assert sorted((given["image_grid_thw"].prod(-1) // 4).tolist()) == [4, 12]  # the bounds, in visual tokens
        logp = torch.log_softmax(logits, -1)[torch.arange(len(found["tokens"])), ids[0, start:]]
        np.testing.assert_allclose(found["logprobs"], logp.numpy(), atol=2e-4)


@pytest.mark.parametrize(
    "row, says",
    [
        ({"completion": "x"}, "messages must be a list"),
        ({"messages": [{"role": "robot", "content": "x"}], "completion": "x"}, "role of system, user, assistant"),
        ({"messages": [{"role": "user", "content": 3}], "completion": "x"}, "content must be text, or parts of type text or image"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}], "completion": "x"}, "parts of type text or image"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}], "completion": "x"}, "no such file"),
        ({"messages": [{"role": "user", "content": "x"}], "completion": ""}, "the completion is empty"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the key 'completion' is missing"),
        ({"messages": [{"role": "user", "content": "<|image_pad|>"}], "completion": "x"}, "0 pictures and 1 places for them"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(run, row, says, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["score", "--model", str(run[2]), "--jsonl", str(tmp_path / "rows.jsonl")]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
