"""Recipes in and out: load one from a file, override it from the command line, check it, write and read it as JSON."""

import contextlib
import dataclasses
import difflib
import fnmatch
import io
import json
import math
import runpy
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pgjax.config import ModelConfig, Recipe

C = TypeVar("C")  # a config class

# Where a bare name such as `toy` is looked for: below the current folder, then beside the package.
CONFIG_FOLDERS = (Path("configs"), Path(__file__).parent.parent / "configs")


def load_recipe(path_or_name: str | Path) -> Recipe:
    """The `recipe` of a Python file, as `load_config`."""
    return load_config(path_or_name, Recipe)


def load_config(path_or_name: str | Path, kind: type[C]) -> C:
    """The config of a Python file, given by its path or by its bare name in configs/: `recipe` where the kind is Recipe. The file is
    executed: load only your own.

    Raises ValueError when there is no such file, when it fails, or when it has no `recipe = Recipe(...)`.
    """
    path, variable = Path(path_or_name), kind.__name__.lower()
    if path.suffix != ".py":
        if path.parent != Path("."):
            raise ValueError(f"{variable} {path}: a path must end in .py; a bare name is looked for in configs/")
        found = [folder / f"{path}.py" for folder in CONFIG_FOLDERS if (folder / f"{path}.py").is_file()]
        if not found:
            names = sorted({file.stem for folder in CONFIG_FOLDERS for file in folder.glob("*.py")})
            raise ValueError(f"{variable} {path}: not in configs/{_nearest(str(path), names)}; there are: {', '.join(names) or 'none'}")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{variable} {path}: no such file")
    try:
        config = runpy.run_path(str(path.resolve())).get(variable)  # so that paths beside the file hold in other folders too
    except (Exception, SystemExit) as error:
        raise ValueError(f"{variable} {path}: {type(error).__name__}: {error}; it must be a Python file that sets `{variable}`") from error
    if not isinstance(config, kind):
        raise ValueError(f"{variable} {path}: the file must set `{variable} = {kind.__name__}(...)`")
    return config


def override(config: C, argv: list[str]) -> C:
    """A recipe, or another config, with `--grpo.optimizer.learning-rate 2e-6 ...` applied, each value parsed by its field's type.

    Raises ValueError, one line, for an unknown key (naming the nearest one) and for a value that does not fit.
    `--help` prints all keys and exits.
    """
    import tyro

    printed = io.StringIO()
    try:
        with contextlib.nullcontext() if {"-h", "--help"} & set(argv) else contextlib.redirect_stderr(printed):
            changed, unknown = tyro.cli(
                type(config), default=config, args=argv, return_unknown_args=True, config=(tyro.conf.FlagConversionOff,), prog="pgjax"
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"override: {_first_message(printed.getvalue())}") from None
    if unknown:
        key = unknown[0].partition("=")[0]
        if not key.startswith("--"):
            raise ValueError(f"override: {key!r} is not a key; write --name value")
        raise ValueError(f"override: unknown key {key}{_nearest(key, ['--' + name for name in _keys(type(config))])}")
    return changed


def _first_message(text: str) -> str:
    """The message of tyro's error box as one line."""
    lines = []
    for line in text.splitlines()[1:]:
        word = line.strip(" │╭╮╰╯─-")
        if word.startswith(("Argument helptext", "For full helptext")):
            break
        lines.append(word)
    return " ".join(" ".join(lines).split()).rstrip(".")


def _keys(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all leaves, as they are written on the command line."""
    keys = []
    for name, kind in typing.get_type_hints(cls).items():
        dotted = prefix + name.replace("_", "-")
        keys += _keys(kind, dotted + ".") if dataclasses.is_dataclass(kind) else [dotted]
    return keys


def _nearest(key: str, names: list[str]) -> str:
    """', did you mean NAME?' or nothing. Initials count, so that lr finds learning-rate; a key of no group is first looked for in grpo."""
    group = (key if "." in key else "--grpo").partition(".")[0]

    def closeness(name: str) -> tuple[bool, bool, float]:
        last, given = (x.replace("_", "-").rpartition(".")[2].lstrip("-") for x in (name, key))
        initials = "".join(word[0] for word in last.split("-") if word)
        same = last == given or (len(given) > 1 and initials == given)
        return same, same and name.partition(".")[0] == group, difflib.SequenceMatcher(None, key.replace("_", "-"), name).ratio()

    best = max(names, key=closeness, default=None)
    return f", did you mean {best}?" if best and (closeness(best)[0] or closeness(best)[-1] > 0.5) else ""


def to_json(recipe: Recipe) -> str:
    """The whole recipe as indented JSON; tuples become lists."""
    return json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"


def from_json(text: str) -> Recipe:
    """Reads back what `to_json` wrote; keys left out keep their defaults, unknown ones raise ValueError."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"recipe: not JSON: {error}") from error
    return typed(Recipe, data, "recipe")


def typed(kind: Any, value: Any, where: str) -> Any:
    """A value from JSON as a field of type `kind`: a config class (from an object), a tuple (from a list), X | None, Literal or plain type.

    Raises ValueError, which begins with `where` and names the key below it, for a value of another type and for an unknown key.
    """
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {value!r}")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise ValueError(f"{where}: unknown key {key}{_nearest(key, list(hints))}")
        return kind(**{key: typed(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    if type(None) in options:
        return None if value is None else typed(options[0], value, where)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [options[0]] * len(value) if options[-1] is Ellipsis else options
        if len(kinds) == len(value):
            return tuple(typed(item_kind, item, f"{where}[{i}]") for i, (item_kind, item) in enumerate(zip(kinds, value, strict=True)))
    if type(value) is kind or (origin is typing.Literal and value in options):
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise ValueError(f"{where}: {value!r} is not {kind if options else kind.__name__}")


def validate(recipe: Recipe) -> Recipe:
    """Returns the recipe unchanged, or raises ValueError naming every field that does not fit the others."""
    # The later checks divide by sizes, so these come first.
    problems = _value_problems(recipe) or [*model_problems(recipe.model), *_run_problems(recipe), *_mesh_problems(recipe)]
    if problems:
        raise ValueError(f"recipe {recipe.name}: " + "; ".join(problems))
    return recipe


# What a number (each one of a tuple) must be, whatever the others are; the first row with a pattern of its key counts.
RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("3", lambda x: x == 3, "model.vision.channels"),
    ("in 0 to 1", lambda x: 0 <= x <= 1, "model.vision.mean data.ood.share grpo.loss.clip_low"),
    ("above 0, at most 1", lambda x: 0 < x <= 1, "rollout.top_p warm_up.label_share"),
    ("from 0 to below 1", lambda x: 0 <= x < 1, "*.optimizer.b[12] rollout.packed_step"),
    ("0 (off) or above 1", lambda x: x == 0 or x > 1, "grpo.loss.dual_clip"),
    ("0 (off) or at least 1", lambda x: x == 0 or x >= 1, "grpo.loss.tis_cap"),
    ("0 (the checkpoint's tokenizer) or at least 320", lambda x: x == 0 or x >= 320, "tokenizer_vocab"),  # as tokenizer.train_byte_bpe
    ("at least 1", lambda x: x >= 1, "sft.steps"),
    ("at least 0", lambda x: x >= 0, "model.vision.window model.vision.positions model.*_blocks model.*.deepstack model.lora_rank"),
    (
        "at least 0",
        lambda x: x >= 0,
        "seed devices data.patches rollout.top_k rollout.lanes rollout.rows *.steps *_every grpo.loss.clip_high *_eps *_buffer",
    ),
    ("above 0", lambda x: x > 0, "model.* rollout.temperature *.learning_rate"),
    ("at least 0", lambda x: x >= 0, "*.optimizer.*"),
    ("at least 2", lambda x: x >= 2, "data.*_examples"),  # generated in twins
    ("at least 3", lambda x: x >= 3, "reward.name_tokens"),
    ("at least 1", lambda x: x >= 1, "data.* answer.* rollout.* warm_up.* sft.buckets *.*_prompts *.prompts *.keep_checkpoints"),
)


def _value_problems(node: Any, prefix: str = "") -> list[str]:
    """What is wrong with single numbers of a config and the configs in it; `prefix` is where it stands in the recipe."""
    problems = []
    for name, value in vars(node).items():
        key = prefix + name
        numbers = [x for x in (value if isinstance(value, tuple) else [value]) if isinstance(x, int | float) and not isinstance(x, bool)]
        rules = [(must, good) for must, good, keys in RULES if any(fnmatch.fnmatchcase(key, pattern) for pattern in keys.split())]
        broken = [must for must, good in [("a finite number", math.isfinite), *rules[:1]] if not all(map(good, numbers))]
        problems += [f"{key} {value} must be {broken[0]}"] if broken else []
        problems += _value_problems(value, f"{key}.") if dataclasses.is_dataclass(value) else []
    return problems


def model_problems(model: ModelConfig) -> list[str]:
    """What is wrong with a model, each line with the value's key in a recipe; nothing when it can be built, trained and exported."""
    if problems := _value_problems(model, "model."):
        return problems
    text, vision, qwen3 = model.text, model.vision, model.family == "qwen3_vl"
    deepstack, unit = vision.deepstack, vision.patch * vision.merge
    checks = {
        f"text.heads {text.heads} must be a multiple of kv_heads {text.kv_heads}": text.heads % text.kv_heads == 0,
        f"text.mrope_section {text.mrope_section} must sum to half of head_dim {text.head_dim}": sum(text.mrope_section) * 2
        == text.head_dim,
        f"vision.width {vision.width} must be a multiple of 4 x heads {vision.heads}": vision.width % (4 * vision.heads) == 0,
        f"vision.window {vision.window} must be a multiple of patch x merge {unit}": vision.window % unit == 0,
        f"vision.full_blocks {vision.full_blocks} must lie below depth {vision.depth}": max(vision.full_blocks, default=0) < vision.depth,
        f"vision.deepstack {deepstack} must grow and lie below depth {vision.depth}": list(deepstack)
        == sorted({*deepstack} & {*range(vision.depth)}),
        f"vision.deepstack {deepstack} must not name more blocks than model.text.layers {text.layers}": len(deepstack) <= text.layers,
        f"vision.min_pixels {vision.min_pixels} must not be above max_pixels {vision.max_pixels}": vision.min_pixels <= vision.max_pixels,
    }
    # What the families differ in: without it the model is neither, and transformers could not read its export.
    only = "with family " + model.family
    flags = {"qkv_bias": not qwen3, "qk_norm": qwen3, "mrope_interleaved": qwen3}
    checks |= {f"text.{name} {not wanted} must be {wanted} {only}": getattr(text, name) == wanted for name, wanted in flags.items()}
    checks |= {
        f"vision.window {vision.window} must be {'0' if qwen3 else 'above 0'} {only}": (vision.window == 0) is qwen3,
        f"vision.positions {vision.positions} must be {'above 0' if qwen3 else '0'} {only}": (vision.positions > 0) is qwen3,
        f"vision.deepstack {deepstack} must be () {only}": qwen3 or not deepstack,
        f"text.width {text.width} must be heads x head_dim {text.heads * text.head_dim} {only}": qwen3
        or text.width == text.heads * text.head_dim,
    }
    return [f"model.{problem}" for problem in _failed(checks)]


def _run_problems(recipe: Recipe) -> list[str]:
    model, data, rollout, grpo, vocab = recipe.model, recipe.data, recipe.rollout, recipe.grpo, recipe.model.text.vocab
    keep = data.ood.keep
    block, prompts, mini, micro = model.vision.window_patches, grpo.prompts, grpo.mini_prompts, grpo.micro_prompts
    shares, sft = grpo.shares, recipe.sft
    buffer, limit = grpo.loss.overlong_buffer, recipe.answer.max_tokens
    whole = recipe.checkpoint is None or not (model.freeze_vision or model.lora_rank)
    return _failed(
        {
            f"model.text.vocab {vocab} must hold the tokenizer_vocab {recipe.tokenizer_vocab}": vocab >= recipe.tokenizer_vocab,
            f"data.patches {data.patches} must be a multiple of {block} patches (one window, or merge block)": data.patches % block == 0,
            f"data.ood.keep {keep} must be two numbers, smallest first": keep is None or keep[0] <= keep[1],
            f"rollout.top_k {rollout.top_k} must lie in 0 (off) to model.text.vocab": rollout.top_k <= vocab,
            f"rollout.lanes {rollout.lanes} must be at most rollout.group {rollout.group}": rollout.lanes <= rollout.group,
            f"warm_up.steps {recipe.warm_up.steps} with a checkpoint, and freeze_vision or lora_rank: the warm-up trains the whole model; "
            "set warm_up.steps 0": whole or not recipe.warm_up.steps,
            f"grpo.loss.overlong_buffer {buffer} must be at most answer.max_tokens {limit}": buffer <= limit,
            f"grpo.mini_prompts {mini} must divide prompts {prompts}": prompts % mini == 0,
            f"grpo.micro_prompts {micro} must divide mini_prompts {mini}": mini % micro == 0,
            f"sft.micro_prompts {sft.micro_prompts} must divide prompts {sft.prompts}": sft.prompts % sft.micro_prompts == 0,
            f"grpo.shares {shares} must divide mini_prompts {mini}": not shares or mini % shares == 0,
        }
    )


def _mesh_problems(recipe: Recipe) -> list[str]:
    mesh = recipe.mesh
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        return [f"mesh {sizes} must be numbers from 1, at most one of them -1 (the rest of the devices)"]
    known = math.prod(size for size in sizes if size != -1)
    if recipe.devices and (recipe.devices % known if -1 in sizes else recipe.devices != known):
        return [
            f"mesh (data, fsdp, tensor) {sizes} does not fit {recipe.devices} devices: the product must be {recipe.devices}; "
            "change mesh or devices, or set one axis to -1"
        ]
    if -1 in sizes and not recipe.devices:
        return []  # known only on the machine
    shards = math.prod((recipe.devices // known) if size == -1 else size for size in sizes[:2])
    stages = {"grpo.micro_prompts": recipe.grpo.micro_prompts, "grpo.validate_prompts": recipe.grpo.validate_prompts}
    stages |= {"warm_up.prompts": recipe.warm_up.prompts} if recipe.warm_up.steps else {}
    stages |= {"grpo.shares": recipe.grpo.shares} if recipe.grpo.shares else {}
    stages |= {"rollout.rows": recipe.rollout.rows} if recipe.rollout.rows else {}
    if recipe.data.name == "rewriter":  # which is trained by the supervised trainer alone
        stages = {"sft.micro_prompts": recipe.sft.micro_prompts}
    return _failed({f"{name} {rows} must be a multiple of mesh data x fsdp {shards}": rows % shards == 0 for name, rows in stages.items()})


def _failed(checks: dict[str, bool]) -> list[str]:
    return [message for message, good in checks.items() if not good]
