"""Bad input: whatever is wrong with it, the command ends with status 2 and one line that says what, where and what to do.

No traceback, and nothing is written: all files are compared before and after.
"""

import dataclasses
import functools
import io
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_encoder import MODULES
from tiny_recipe import tiny_recipe

from pgjax.bank import Bank
from pgjax.cli import main
from pgjax.models.checkpoint import save_params
from pgjax.models.hf_config import config_to_hf
from pgjax.parallel.mesh import make_mesh
from pgjax.recipes import load_recipe, to_json
from pgjax.tokenizer import train_byte_bpe
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.run_folder import RunFolder
from pgjax.train.setup import make_setup
from pgjax.train.update import make_optimizer

ROOT = Path(__file__).parent.parent
ENTRY = "- category: {}\n  description: Rain on a picnic.\n  synonymous-phrase: [wet and windy]\n"
# Runs and recipes of this process take its devices as they are.
TOY = dataclasses.replace(load_recipe("toy"), devices=0)
CONFIG = to_json(TOY)
TOY_CONFIG = json.dumps(config_to_hf(TOY.model, {}))
TRAIN, MODERATE = "train toy --devices 0", "moderate --model runs/bare --request hello"
SFT = "sft toy_rewriter --devices 0 --mesh.data 8"
REPORT = {"text": "none", "image": "none", "together": "none"}
REWRITING = {"id": "a", "group": "x", "request": "hello", "image": None, "report": REPORT, "rewrite": "hello"}
PUBLIC, OWN = "train public_mix --devices 0 --mesh.data 8", f"{TRAIN} --data.name jsonl"
ANSWER = {"answer": "", "modality": "text", "query_label": "safe", "response_label": "", "category": "", "original_category": ""}
MINILM = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 8,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(out, "PNG")
    return out.getvalue()


def claims(data: bytes, width: int, height: int) -> bytes:
    """A small PNG whose header says that it is large."""
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def npz(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def npy() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    return out.getvalue()


def embedder(name: str, **files: bytes | str) -> dict[str, bytes | str]:
    """A sentence encoder's folder, whole but for the weights and for what is given."""
    whole = {"config": json.dumps(MINILM), "tokenizer": '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'}
    folder = {f"{name}/{key}.json": text for key, text in (whole | {k: v for k, v in files.items() if k != "model"}).items()}
    folder[f"{name}/1_Pooling/config.json"] = json.dumps({"pooling_mode_mean_tokens": True})
    folder[f"{name}/modules.json"] = json.dumps(MODULES)
    return folder | ({f"{name}/model.safetensors": files["model"]} if "model" in files else {})


FIELDS = {name: np.zeros(1) for name in Bank.__dataclass_fields__}
FILES: dict[str, bytes | str] = {
    # recipes
    "binary.py": b"\x00\x01\x02\xff",
    "diary.py": "Dear diary,\n",
    "half.py": "recipe = Recipe(\n",
    "leaves.py": "raise SystemExit(3)\n",
    "none.py": "steps = 3\n",
    "folder.py/readme": "",
    # taxonomies
    "twice.yaml": ENTRY.format("Bad weather") + ENTRY.format("bad Weather"),
    "lacks.yaml": "- category: Bad weather\n  description: Rain.\n",
    "broken.yaml": ENTRY.format("Bad weather") + "- category: [\n",
    "empty.yaml": "",
    "latin.yaml": ENTRY.format("Wetter in M\xfcnchen").encode("latin-1"),
    "other.yaml": ENTRY.format("Bad weather") + ENTRY.format("Slugs"),
    # pictures
    "cut.png": png(84, 84)[:-40],
    "large.png": claims(png(8, 8), 12_000, 12_000),
    "bomb.png": claims(png(8, 8), 60_000, 60_000),
    "note.png": "not a picture",
    "empty.png": b"",
    "folder.png/readme": "",
    # run folders
    "runs/bare/config.json": CONFIG,
    "runs/half/config.json": CONFIG[: len(CONFIG) // 2],
    "runs/binary/config.json": b"\xff\xfe\x00",
    "runs/newer/config.json": CONFIG.replace('"steps"', '"stepz"', 1),
    "runs/list/config.json": "[]",
    "runs/misfit/config.json": CONFIG.replace('"kv_heads": 2', '"kv_heads": 0'),
    "runs/none/readme": "",
    # sentence encoders, banks, checkpoints
    **embedder("weightless"),
    **embedder("cut", model=b"\x10\x00\x00\x00\x00\x00\x00\x00{"),
    **embedder("half", config=json.dumps(MINILM)[:60], model=b""),
    **embedder("keyless", config='{"model_type": "bert", "hidden_act": "gelu"}', model=b""),
    **embedder("headless", config=json.dumps(MINILM | {"num_attention_heads": 3}), model=b""),
    **embedder("mute", tokenizer="{", model=b""),
    **embedder("llama", config='{"model_type": "llama"}', model=b""),
    "text.npz": "not a bank",
    "array.npz": npy(),
    "lacks.npz": npz(embedding_NSE=np.zeros((1, 1, 1))),
    "other.npz": npz(**FIELDS | {"taxonomy": "another", "embedder": "another"}),
    "weights-cut/config.json": TOY_CONFIG,
    "weights-none/config.json": TOY_CONFIG,
    "weights-llama/config.json": '{"model_type": "llama"}',
    "weights-cut/model.safetensors": b"\x10\x00\x00\x00\x00\x00\x00\x00{",
    "weights-none/readme": "",
    "prompts/text.txt": "{policy} {thinking}",
    # JSON Lines
    "cut.jsonl": '{"request": "hello"}\n\n{"request": "he',
    "list.jsonl": "[1]\n",
    "number.jsonl": '{"request": 3}\n',
    "typo.jsonl": '{"request": "hello"}\n{"reqest": "hello"}\n',
    "nobody.jsonl": '{"response": "hello"}\n',
    "picture.jsonl": '{"image": "cut.png"}\n',
    "empty.jsonl": "",
    "own.jsonl": '{"request": "hello"}\n',
    "blank.jsonl": "\n \n",
    "binary.jsonl": b"\xff\xfe\x00",
    "label.jsonl": json.dumps(ANSWER) + "\n" + json.dumps(ANSWER | {"query_label": "nice"}) + "\n",
    "id.jsonl": json.dumps(ANSWER | {"category": "C99"}) + "\n",
    "keyless.jsonl": '{"answer": ""}\n',
    "cosine.jsonl": json.dumps(ANSWER | {"similarities": [2.0]}) + "\n",
    "label/train.jsonl": '{"request": "hello"}\n{"request": "hello", "request_label": "nice"}\n',
    "id/train.jsonl": '{"request": "hello", "request_label": "unsafe", "category": "C99"}\n',
    "torn/train.jsonl": '{"request": "hello", "group": "x"}\n',
    "torn/eval.jsonl": '{"request": "hello", "group": "x"}\n',
    "flat/train.jsonl": json.dumps(REWRITING) + "\n" + json.dumps(REWRITING | {"report": "none"}) + "\n",
    "flat/eval.jsonl": json.dumps(REWRITING) + "\n",
    "tagged/train.jsonl": json.dumps(REWRITING | {"rewrite": "hello</rewrite>"}) + "\n",
    "tagged/eval.jsonl": json.dumps(REWRITING) + "\n",
    "leaky/train.jsonl": json.dumps(REWRITING) + "\n",
    "leaky/eval.jsonl": json.dumps(REWRITING) + "\n",
    "rewritings/train.jsonl": json.dumps(REWRITING) + "\n",
    "rewritings/eval.jsonl": json.dumps(REWRITING | {"group": "y"}) + "\n",
    "sets/openai_moderation/readme": "",
    "file": "",
}
CASES: list[tuple[str, ...]] = [  # the command, and what its one line says
    # usage
    ("", "COMMAND", "--help"),
    ("trian toy", "'trian'", "train", "--help"),
    ("train", "config", "train --help"),
    ("moderate --request hello", "--model", "moderate --help"),
    ("bank make", "'make'", "build", "bank --help"),
    (f"{MODERATE} --speed 3", "--speed", "--help"),
    # recipe files
    ("train tory", "recipe tory", "did you mean toy"),
    ("train no/where.py", "no/where.py", "no such file"),
    ("train no/where", "no/where", "must end in .py"),
    ("train folder.py", "folder.py", "no such file"),
    *((f"train {name}.py", f"{name}.py", "Python file that sets `recipe`") for name in ("binary", "diary", "half", "leaves")),
    ("train none.py", "none.py", "must set `recipe = Recipe(...)`"),
    # keys and values
    ("train toy --grpo.optimizer.learnin-rate 1", "--grpo.optimizer.learnin-rate", "did you mean --grpo.optimizer.learning-rate"),
    ("train toy --grpo.lr 1", "--grpo.lr", "did you mean --grpo.optimizer.learning-rate"),
    ("train toy --fres", "unknown key --fres"),
    ("train toy stray", "'stray'", "--name value"),
    ("train toy --grpo.steps many", "--grpo.steps", "many"),
    ("train toy --grpo.steps", "--grpo.steps"),
    ("train toy --grpo.loss.std none", "--grpo.loss.std", "ddof1"),
    ("train toy --grpo.optimizer.learning-rate nan", "grpo.optimizer.learning_rate nan", "finite"),
    ("train toy --rollout.temperature inf", "rollout.temperature inf", "finite"),
    ("train toy --rollout.top-k 99999", "rollout.top_k 99999", "model.text.vocab"),
    ("train toy --seed -1", "seed -1", "at least 0"),
    ("train toy --name ../elsewhere", "name '../elsewhere'", "letters"),
    ("train toy --name .. --fresh", "name '..'", "letters"),
    ("train toy --tokenizer-vocab 100", "tokenizer_vocab 100", "at least 320"),
    ("train toy --data.train-examples 0", "data.train_examples 0", "at least 2"),
    # mesh, batches, heads
    ("train toy --mesh.data 3", "mesh (data, fsdp, tensor) (3, 2, 2)", "8 devices", "product must be 8"),
    ("train toy --mesh.data -1 --mesh.fsdp -1", "mesh (-1, -1, 2)", "at most one"),
    ("train toy --mesh.data 0", "mesh (0, 2, 2)", "from 1"),
    ("train toy --devices -8", "devices -8", "at least 0"),
    ("train toy --devices 7 --mesh.tensor -1", "mesh (data, fsdp, tensor) (2, 2, -1)", "7 devices"),
    (f"{TRAIN} --mesh.data 1", "data=1 fsdp=2 tensor=2", "8 devices", "product must be 8"),
    (f"{TRAIN} --mesh.fsdp -1 --mesh.data 8 --mesh.tensor 1 --grpo.micro-prompts 4", "micro_prompts 4", "data x fsdp 8"),
    ("train toy --grpo.micro-prompts 2", "micro_prompts 2", "multiple of mesh data x fsdp 4"),
    ("train toy --grpo.validate-prompts 6", "validate_prompts 6", "multiple of mesh data x fsdp 4"),
    ("train toy --warm_up.prompts 6", "warm_up.prompts 6", "multiple of mesh data x fsdp 4"),
    ("train toy --grpo.mini-prompts 3", "mini_prompts 3 must divide prompts 8"),
    ("train toy --grpo.prompts 0", "grpo.prompts 0 must be at least 1"),
    ("train toy --model.text.kv-heads 3", "heads 4 must be a multiple of kv_heads 3"),
    ("train toy --model.text.kv-heads 0", "model.text.kv_heads 0", "above 0"),
    ("train toy --model.vision.patch 0", "model.vision.patch 0", "above 0"),
    ("train toy --model.vision.channels 1", "channels 1 must be 3"),
    # taxonomies, templates
    ("bank build --taxonomy no.yaml", "no.yaml", "No such file"),
    ("bank build --taxonomy .", "taxonomy .", "Is a directory"),
    ("bank build --taxonomy twice.yaml", "twice.yaml:4:", "C2", "already used in line 1"),
    ("bank build --taxonomy lacks.yaml", "lacks.yaml:1:", "missing key `synonymous-phrase`"),
    ("bank build --taxonomy broken.yaml", "broken.yaml:5:", "not valid YAML"),
    ("bank build --taxonomy empty.yaml", "empty.yaml:1:", "no categories", "- category: NAME"),
    ("bank build --taxonomy latin.yaml", "latin.yaml", "UTF-8"),
    (f"{TRAIN} --data.taxonomy twice.yaml", "twice.yaml:4:", "already used in line 1"),
    (f"{TRAIN} --data.taxonomy other.yaml", "data.taxonomy other.yaml", "toy", "leave it out"),
    (f"{TRAIN} --data.prompts nowhere", "nowhere/text.txt", "cannot be read"),
    (f"{TRAIN} --data.prompts prompts", "prompts/text.txt lacks the placeholder {think}"),
    (f"{TRAIN} --data.ood.never-seen C99", "'C99'", "did you mean"),
    (f"{TRAIN} --data.name moon", "data.name", "toy"),
    # pictures
    (f"{MODERATE} --image no.png", "image no.png", "no such file"),
    (f"{MODERATE} --image folder.png", "image folder.png", "no such file"),
    (f"{MODERATE} --image cut.png", "image cut.png", "truncated", "give the whole file"),
    (f"{MODERATE} --image large.png", "image large.png", "12000 x 12000", "shrink"),
    (f"{MODERATE} --image bomb.png", "image bomb.png", "pixels", "shrink"),
    (f"{MODERATE} --image note.png", "image note.png", "not an image", "PNG"),
    (f"{MODERATE} --image empty.png", "image empty.png", "not an image", "PNG"),
    # run folders
    ("moderate --model runs/nowhere --request hello", "runs/nowhere", "not a run folder"),
    ("moderate --model runs/none --request hello", "runs/none", "no config.json"),
    ("moderate --model file --request hello", "file", "not a run folder"),
    ("moderate --model runs/half --request hello", "runs/half/config.json", "JSON"),
    ("moderate --model runs/binary --request hello", "runs/binary/config.json", "utf-8"),
    ("moderate --model runs/list --request hello", "runs/list/config.json", "JSON object"),
    ("moderate --model runs/newer --request hello", "runs/newer/config.json", "unknown key stepz", "steps"),
    ("moderate --model runs/misfit --request hello", "runs/misfit/config.json", "kv_heads 0"),
    (MODERATE, "runs/bare", "tokenizer", "train"),
    ("moderate --model runs/bare", "nothing to moderate", "give a request"),
    ("moderate --model runs/bare --response yes", "nothing to moderate", "give a request"),
    (f"{MODERATE} --policy twice.yaml", "twice.yaml:4:"),
    ("report runs/nowhere", "runs/nowhere", "not a run folder"),
    ("report runs/half", "runs/half/config.json", "JSON"),
    ("report runs/bare", "runs/bare", "metrics.jsonl", "start the run"),
    # JSON Lines
    ("moderate --model runs/bare --jsonl no.jsonl", "no.jsonl", "No such file"),
    ("moderate --model runs/bare --jsonl cut.jsonl", "cut.jsonl line 3", "JSON object"),
    ("moderate --model runs/bare --jsonl list.jsonl", "list.jsonl line 1", "JSON object"),
    ("moderate --model runs/bare --jsonl number.jsonl", "number.jsonl line 1", "'request' must be text"),
    ("moderate --model runs/bare --jsonl typo.jsonl", "typo.jsonl line 2", "unknown key 'reqest'", "request, response"),
    ("moderate --model runs/bare --jsonl nobody.jsonl", "nobody.jsonl line 1", "give a request"),
    ("moderate --model runs/bare --jsonl picture.jsonl", "picture.jsonl line 1", "image cut.png", "truncated"),
    ("moderate --model runs/bare --jsonl empty.jsonl", "empty.jsonl", "no rows", "one JSON object a line"),
    ("moderate --model runs/bare --jsonl blank.jsonl", "blank.jsonl", "no rows", "one JSON object a line"),
    ("moderate --model runs/bare --jsonl binary.jsonl", "binary.jsonl", "UTF-8"),
    (f"{MODERATE} --jsonl typo.jsonl", "--jsonl", "leave out --request"),
    ("reward", "--jsonl", "reward --help"),
    ("reward --jsonl cut.jsonl", "cut.jsonl line 3", "JSON object"),
    ("reward --jsonl empty.jsonl", "empty.jsonl", "no rows"),
    ("reward --jsonl keyless.jsonl", "keyless.jsonl line 1", "'modality' is missing"),
    ("reward --jsonl label.jsonl", "label.jsonl line 2", "'query_label' is 'nice'", "safe, unsafe"),
    ("reward --jsonl id.jsonl", "id.jsonl line 1", "'C99'", "C1 to"),
    ("reward --jsonl cosine.jsonl", "cosine.jsonl line 1", "from -1 to 1"),
    ("reward --jsonl id.jsonl --variant kind", "'kind'", "published"),
    # sentence encoders
    ("bank build --embedder nowhere", "nowhere", "config.json", "sentence-transformers directory"),
    ("bank build --embedder weightless", "weightless", "no model.safetensors", "sentence-transformers directory"),
    ("bank build --embedder half", "half/config.json", "JSON"),
    ("bank build --embedder keyless", "keyless/config.json", "vocab_size"),
    ("bank build --embedder headless", "headless/config.json", "multiple of num_attention_heads 3"),
    ("bank build --embedder mute", "mute/tokenizer.json", "copy the file again"),
    ("bank build --embedder cut", "cut/model.safetensors", "copy the file again"),
    ("bank build --embedder llama", "llama/config.json", "'llama'", "bert"),
    (f"{TRAIN} --reward.embedder nowhere", "nowhere", "sentence-transformers directory"),
    # banks
    ("bank calibrate --bank no.npz", "bank no.npz", "pgjax bank build"),
    *((f"bank calibrate --bank {name}.npz", f"bank {name}.npz", "pgjax bank build") for name in ("text", "array", "lacks")),
    ("bank calibrate --bank other.npz", "other.npz", "another taxonomy", "pgjax bank build"),
    ("bank build --taxonomy other.yaml --bank no/where.npz", "bank no/where.npz", "cannot be written"),
    ("bank build --taxonomy other.yaml --bank file/x.npz", "bank file/x.npz", "cannot be written"),
    ("bank build --taxonomy other.yaml --exclude C9", "'C9'"),
    (f"{TRAIN} --reward.bank other.npz", "other.npz", "another taxonomy", "pgjax bank build"),
    # public data
    (f"{PUBLIC} --data.root nowhere", "nowhere is no folder", "--data.root", "PGJAX_DATA"),
    (f"{PUBLIC} --data.root file", "file is no folder", "--data.root", "PGJAX_DATA"),
    (
        f"{PUBLIC} --data.root sets",
        "openai_moderation/",
        "is not there below sets",
        "--data.root",
    ),  # found when the run folder is there already
    (PUBLIC, "--data.root", "PGJAX_DATA"),
    # rows of one's own
    (OWN, "data.name jsonl needs --data.root", "train.jsonl"),
    (f"{TRAIN} --data.name built", "data.name built needs --data.root", "the splits train and eval"),
    (f"{TRAIN} --data.name built --data.root sets", "sets holds no dataset", "build one first"),
    (f"{OWN} --data.root nowhere", "--data.root", "nowhere"),
    (f"{OWN} --data.root sets", "sets/train.jsonl", "No such file"),
    (f"{OWN} --data.root label", "label/train.jsonl line 2", "request_label 'nice'", "safe or unsafe"),
    (f"{OWN} --data.root id", "id/train.jsonl line 1", "'C99'", "did you mean"),
    (f"{OWN} --data.root torn", "torn", "group 'x'", "keep a group in one"),
    # rewritings
    ("sft toy --devices 0", "data.name toy", "`pgjax train`"),
    ("train toy_rewriter --devices 0 --mesh.data 8", "data.name rewriter", "`pgjax sft`"),
    (SFT, "data.root", "`pgjax synthesize`"),
    (f"{SFT} --data.root nowhere", "nowhere/train.jsonl cannot be read"),
    (f"{SFT} --data.root flat", "flat/train.jsonl line 2", "'report' must be an object", "text, image and together"),
    (f"{SFT} --data.root tagged", "tagged/train.jsonl line 1", "markup"),
    (f"{SFT} --data.root leaky", "leaky/eval.jsonl line 1", "group 'x'", "train.jsonl"),
    (f"{SFT} --sft.steps 0", "sft.steps 0 must be at least 1"),
    (f"{SFT} --sft.micro-prompts 3", "sft.micro_prompts 3 must divide prompts 16"),
    (f"{SFT} --sft.micro-prompts 4 --data.root rewritings", "sft.micro_prompts 4", "multiple of mesh data x fsdp 8"),
    (f"{SFT} --data.root rewritings --data.prompt-tokens 9", "no lesson to train on is left", "larger data.prompt_tokens"),
    # checkpoints to start from, places to write to
    (f"{TRAIN} --checkpoint nowhere", "nowhere", "no config.json", "Hugging Face checkpoint directory"),
    (f"{TRAIN} --checkpoint weights-llama", "weights-llama/config.json", "model_type 'llama' is not supported; it must be qwen2_5_vl"),
    (f"{TRAIN} --checkpoint weights-none", "weights-none", "no .safetensors file", "Hugging Face checkpoint directory"),
    (f"{TRAIN} --checkpoint weights-cut", "weights-cut/model.safetensors", "copy the file again"),
    (f"{TRAIN} --tokenizer-vocab 0", "tokenizer_vocab 0", "checkpoint"),
    (f"{TRAIN} --model.lora-rank -1", "model.lora_rank -1"),
    (f"{TRAIN} --model.lora-rank 4 --model.lora-alpha 0", "model.lora_alpha 0"),
    ("export runs/bare new", "checkpoint", "runs/bare"),
    ("export nowhere new", "nowhere is not a run folder"),
    ("score --model nowhere --jsonl rows.jsonl", "rows.jsonl cannot be read"),
    ("score --model weights-none --jsonl own.jsonl", "weights-none", "no .safetensors file"),
    ("score --model weights-llama --jsonl own.jsonl", "model_type 'llama' is not supported"),
    (f"{TRAIN} --runs file", "file", "--runs"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The bad files, in the current folder."""
    for name, content in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    # A command sets these for its own process; here they are the suite's.
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    monkeypatch.delenv("PGJAX_DATA", raising=False)
    for name in ("grpo.trainer.Programs", "sft.trainer.make_step"):
        monkeypatch.setattr(f"pgjax.{name}", lambda *_: pytest.fail("the run would have begun"))
    cache = jax.config.jax_compilation_cache_dir
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", cache)


def state(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(command: str, says: tuple[str, ...], folder: Path, capsys) -> None:
    before = state(folder)
    assert main(shlex.split(command)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pgjax: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert [words for words in says if words not in err] == [], err
    assert len(err) < 600 and "Traceback" not in err
    assert state(folder) == before


@pytest.mark.parametrize(("command", "says"), [pytest.param(case[0], case[1:], id=case[0]) for case in CASES])
def test_bad_input_is_one_line(command, says, folder, capsys):
    refused(command, says, folder, capsys)


# --- with a trained run, or so it looks ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with a checkpoint of zeros, its recipe as a file, and a Hugging Face checkpoint."""
    path = tmp_path_factory.mktemp("trained")
    recipe = dataclasses.replace(tiny_recipe(), devices=0)
    run, config = path / "runs" / "tiny", recipe.grpo
    RunFolder(run, recipe).close()
    train_byte_bpe(["hello there"], 320).save_pretrained(run / "tokenizer")
    setup = make_setup(recipe.model, make_mesh(recipe.mesh))
    state = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), setup.abstract_state(make_optimizer(config.optimizer, 1))
    )
    for name, kept in (("checkpoints", state), ("reference", state.params)):
        checkpoints = Checkpoints(run / name, 1)
        checkpoints.save(0, kept)
        checkpoints.close()
    (path / "weights").mkdir()
    save_params(path / "weights", state.params, recipe.model)
    (path / "weights" / "config.json").write_text(json.dumps(config_to_hf(recipe.model, {})))
    (path / "tiny.py").write_text(f"from pgjax.recipes import from_json\nrecipe = from_json({to_json(recipe)!r})\n")
    return path


def edit_config(run: Path, key: str, value: object) -> None:
    """Set a dotted key of a run's config.json."""
    config = json.loads((run / "config.json").read_text())
    *parts, last = key.split(".")
    functools.reduce(dict.__getitem__, parts, config)[last] = value
    (run / "config.json").write_text(json.dumps(config))


def truncate(folder: Path, names: str = "*") -> None:
    """Cut every file of that name below a folder in half."""
    for file in folder.rglob(names):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


RUN, ASK = Path("runs/tiny"), "moderate --model runs/tiny --request hello"
DAMAGED = [  # what is done to the run folder, the command, and what its one line says
    ("another width", lambda: edit_config(RUN, "model.text.mlp", 96), ASK, "checkpoint runs/tiny/checkpoints/0", "does not fit"),
    ("more layers", lambda: edit_config(RUN, "model.text.layers", 3), ASK, "checkpoint runs/tiny/checkpoints/0", "does not fit"),
    ("no checkpoint", lambda: shutil.rmtree(RUN / "checkpoints"), ASK, "not found in runs/tiny/checkpoints", "none"),
    ("checkpoint cut", lambda: truncate(RUN / "checkpoints" / "0" / "default"), ASK, "checkpoint runs/tiny/checkpoints/0"),
    ("checkpoint emptied", lambda: shutil.rmtree(RUN / "checkpoints" / "0" / "default"), ASK, "checkpoint runs/tiny/checkpoints/0"),
    ("tokenizer gone", lambda: shutil.rmtree(RUN / "tokenizer"), ASK, "tokenizer runs/tiny/tokenizer", "no tokenizer.json"),
    ("tokenizer cut", lambda: truncate(RUN / "tokenizer"), ASK, "tokenizer runs/tiny/tokenizer", "cannot be read"),
    ("unknown category", None, f"{ASK} --categories C99", "'C99'"),
    ("long request", None, f"moderate --model runs/tiny --request '{'word ' * 400}'", "152 tokens", "shorten"),
    ("thin image", None, f"{ASK} --image thin.png", "image"),
    ("another seed", None, "train tiny.py --seed 5", "runs/tiny was started with seed = 0", "--fresh"),
    ("fresh with bad input", None, "train tiny.py --fresh --reward.embedder nowhere", "nowhere", "sentence-transformers directory"),
    (
        "nothing fits",
        None,
        "train tiny.py --name new --data.prompt-tokens 9",
        "no example of split 'train' is left",
        "larger data.prompt_tokens",
    ),
    ("resume after damage", lambda: truncate(RUN, "config.json"), "train tiny.py", "runs/tiny/config.json", "JSON"),
    (
        "other weights",
        None,
        "train tiny.py --name new --checkpoint weights --model.text.mlp 96",
        "weights: tensors do not fit the recipe's model",
        "misshapen: model.layers.0.mlp.",
    ),
    (
        "weights without tokenizer",
        None,
        "train tiny.py --name new --checkpoint weights --tokenizer-vocab 0",
        "tokenizer weights",
        "no tokenizer",
    ),
]


@pytest.mark.parametrize(("damage", "command", "says"), [pytest.param(c[1], c[2], c[3:], id=c[0]) for c in DAMAGED])
def test_runs_that_do_not_fit(damage, command, says, folder, trained, capsys):
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    (folder / "thin.png").write_bytes(png(2010, 10))
    if damage:
        damage()
    refused(command, says, folder, capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folders_that_cannot_be_written(folder, capsys):
    (folder / "runs").chmod(0o500)
    refused(f"{TRAIN} --name new", ("runs/new", "--runs"), folder, capsys)
    (folder / "runs").chmod(0o700)
    folder.chmod(0o500)
    refused("bank build --taxonomy other.yaml", ("bank.npz", "cannot be written"), folder, capsys)


# --- as a process ---


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train toy --mesh.data 3", "product must be 8"),
        ("train diary.py", "diary.py"),
        ("moderate --model runs/half --request hello", "runs/half/config.json"),
    ],
)
def test_the_process_ends_with_status_2(command, says, folder):
    before = state(folder)
    process = [sys.executable, "-m", "pgjax.cli", *shlex.split(command)]
    done = subprocess.run(process, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "") and says in done.stderr
    assert done.stderr.startswith("pgjax: ") and done.stderr.count("\n") == 1, done.stderr
    assert state(folder) == before
