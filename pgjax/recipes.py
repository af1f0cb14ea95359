"""Recipes in and out: load one from a file, override it from the command line, check it, write and read it as JSON."""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import runpy
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pgjax.config import OptimizerConfig, Recipe

# Where a bare name such as `toy` is looked for: below the current folder, then beside the package.
CONFIG_FOLDERS = (Path("configs"), Path(__file__).parent.parent / "configs")


def load_recipe(path_or_name: str | Path) -> Recipe:
    """The `recipe` of a Python file, given by its path or by its bare name in configs/. The file is executed: load only your own.

    Raises ValueError when there is no such file, when it fails, or when it has no `recipe = Recipe(...)`.
    """
    path = Path(path_or_name)
    if path.suffix != ".py":
        if path.parent != Path("."):
            raise ValueError(f"recipe {path}: a path must end in .py; a bare name is looked for in configs/")
        found = [folder / f"{path}.py" for folder in CONFIG_FOLDERS if (folder / f"{path}.py").is_file()]
        if not found:
            names = sorted({file.stem for folder in CONFIG_FOLDERS for file in folder.glob("*.py")})
            raise ValueError(f"recipe {path}: not in configs/{_nearest(str(path), names)}; there are: {', '.join(names) or 'none'}")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"recipe {path}: no such file")
    try:
        recipe = runpy.run_path(str(path.resolve())).get("recipe")  # so that paths beside the file hold in other folders too
    except (Exception, SystemExit) as error:
        raise ValueError(f"recipe {path}: {type(error).__name__}: {error}; it must be a Python file that sets `recipe`") from error
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe {path}: the file must set `recipe = Recipe(...)`")
    return recipe


def override(recipe: Recipe, argv: list[str]) -> Recipe:
    """The recipe with `--grpo.optimizer.learning-rate 2e-6 ...` applied, each value parsed by its field's type.

    Raises ValueError, one line, for an unknown key (naming the nearest one) and for a value that does not fit.
    `--help` prints all keys and exits.
    """
    import tyro

    printed = io.StringIO()
    try:
        with contextlib.nullcontext() if {"-h", "--help"} & set(argv) else contextlib.redirect_stderr(printed):
            changed, unknown = tyro.cli(
                Recipe, default=recipe, args=argv, return_unknown_args=True, config=(tyro.conf.FlagConversionOff,), prog="pgjax"
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"override: {_first_message(printed.getvalue())}") from None
    if unknown:
        key = unknown[0].partition("=")[0]
        if not key.startswith("--"):
            raise ValueError(f"override: {key!r} is not a key; write --name value")
        raise ValueError(f"override: unknown key {key}{_nearest(key, ['--' + name for name in _keys(Recipe)])}")
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
    """', did you mean NAME?' or nothing. Initials count, so that lr finds learning-rate."""

    def closeness(name: str) -> tuple[bool, float]:
        last, given = (x.replace("_", "-").rpartition(".")[2].lstrip("-") for x in (name, key))
        initials = "".join(word[0] for word in last.split("-") if word)
        same = last == given or (len(given) > 1 and initials == given)
        return same, difflib.SequenceMatcher(None, key.replace("_", "-"), name).ratio()

    best = max(names, key=closeness, default=None)
    return f", did you mean {best}?" if best and (closeness(best)[0] or closeness(best)[1] > 0.5) else ""


def to_json(recipe: Recipe) -> str:
    """The whole recipe as indented JSON; tuples become lists."""
    return json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"


def from_json(text: str) -> Recipe:
    """Reads back what `to_json` wrote; keys left out keep their defaults, unknown ones raise ValueError."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"recipe: not JSON: {error}") from error
    return _read(Recipe, data, "recipe")


def _read(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {value!r}")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise ValueError(f"{where}: unknown key {key}{_nearest(key, list(hints))}")
        return kind(**{key: _read(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    return _read_leaf(kind, value, where)


def _read_leaf(kind: Any, value: Any, where: str) -> Any:
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        fits = value in options
    elif type(None) in options:  # X | None
        return None if value is None else _read(next(x for x in options if x is not type(None)), value, where)
    elif typing.get_origin(kind) is tuple:
        fits = isinstance(value, list) and (options[-1] is Ellipsis or len(value) == len(options))
        if fits:
            kinds = [options[0]] * len(value) if options[-1] is Ellipsis else options
            return tuple(_read(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
    elif kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if fits else value
    else:
        fits = type(value) is kind
    if not fits:
        raise ValueError(f"{where}: {value!r} is not {getattr(kind, '__name__', kind) if not options else kind}")
    return value


def validate(recipe: Recipe) -> Recipe:
    """Returns the recipe unchanged, or raises ValueError naming every field that does not fit the others."""
    # The later checks divide by sizes, so these come first.
    problems = _value_problems(recipe) or [*_model_problems(recipe), *_data_problems(recipe), *_training_problems(recipe)]
    if problems:
        raise ValueError(f"recipe {recipe.name}: " + "; ".join(problems))
    return recipe


def _value_problems(recipe: Recipe) -> list[str]:
    """What is wrong with single values, whatever the others are."""
    numbers = {key: value for key, value in _values(recipe) if isinstance(value, int | float) and not isinstance(value, bool)}
    problems = [f"{key} {value} must be a finite number" for key, value in numbers.items() if not math.isfinite(value)]
    off = ("model.vision.window", "model.vision.positions", "model.lora_rank")  # at 0
    sizes = [key for key in numbers if key.startswith("model.") and key not in off]
    problems += [f"{key} {numbers[key]} must be above 0" for key in sizes if numbers[key] <= 0]
    least = {
        0: ("seed", "devices", "grpo.validate_every", "grpo.checkpoint_every", *off),  # every 0 steps: never
        1: ("grpo.validate_prompts", "sft.prompts", "data.max_pixels"),
        2: ("data.train_examples", "data.eval_examples"),  # generated in twins
    }
    for low, keys in least.items():
        problems += [f"{key} {numbers[key]} must be at least {low}" for key in keys if numbers.get(key, low) < low]
    if recipe.tokenizer_vocab and recipe.tokenizer_vocab < 320:  # as tokenizer.train_byte_bpe
        problems.append(f"tokenizer_vocab {recipe.tokenizer_vocab} must be 0 (the checkpoint's tokenizer) or at least 320")
    return problems


def _values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all leaves."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _model_problems(recipe: Recipe) -> list[str]:
    text, vision, family = recipe.model.text, recipe.model.vision, recipe.model.family
    deepstack = vision.deepstack
    checks = {
        f"model.vision.channels {vision.channels} must be 3": vision.channels == 3,
        f"model.text.heads {text.heads} must be a multiple of kv_heads {text.kv_heads}": text.heads % text.kv_heads == 0,
        f"model.text.mrope_section {text.mrope_section} must sum to half of head_dim {text.head_dim}": 2 * sum(text.mrope_section)
        == text.head_dim,
        f"model.text.vocab {text.vocab} must hold the tokenizer_vocab {recipe.tokenizer_vocab}": text.vocab >= recipe.tokenizer_vocab,
        f"model.vision.width {vision.width} must be a multiple of 4 x heads {vision.heads}": vision.width % (4 * vision.heads) == 0,
        f"model.vision.window {vision.window} must be a multiple of patch x merge {vision.patch * vision.merge}": vision.window
        % (vision.patch * vision.merge)
        == 0,
        f"model.vision.full_blocks {vision.full_blocks} must lie below depth {vision.depth}": all(
            0 <= block < vision.depth for block in vision.full_blocks
        ),
        f"model.vision.window {vision.window} must be 0 with family qwen3_vl": family == "qwen2_5_vl" or not vision.window,
        f"model.vision.positions {vision.positions} must be 0 with family qwen2_5_vl": family == "qwen3_vl" or not vision.positions,
        f"model.vision.deepstack {deepstack} must grow and lie below depth {vision.depth}": list(deepstack)
        == sorted({*deepstack} & {*range(vision.depth)}),
        f"model.vision.deepstack {deepstack} must not name more blocks than model.text.layers {text.layers}": len(deepstack) <= text.layers,
        f"model.vision.mean {vision.mean} must lie in 0 to 1": all(0 <= value <= 1 for value in vision.mean),
        f"model.vision.std {vision.std} must be above 0": all(0 < value < math.inf for value in vision.std),
        f"model.vision.min_pixels {vision.min_pixels} must not be above max_pixels {vision.max_pixels}": vision.min_pixels
        <= vision.max_pixels,
        f"data.patches {recipe.data.patches} must be a multiple of {vision.window_patches} patches (one window, or merge block)": (
            recipe.data.patches % vision.window_patches == 0
        ),
    }
    return _failed(checks)


def _data_problems(recipe: Recipe) -> list[str]:
    data, rollout, group = recipe.data, recipe.rollout, recipe.rollout.group
    keep, buckets, longest = data.ood.keep, rollout.packed_tokens, group * recipe.answer.max_tokens
    checks = {
        f"data.name {data.name!r} must be 'toy', 'public_mix' or 'jsonl'": data.name in ("toy", "public_mix", "jsonl"),
        f"data.ood.share {data.ood.share} must lie in 0 to 1": 0 <= data.ood.share <= 1,
        f"data.ood.keep {keep} must be two numbers, smallest first, from 1": keep is None or 1 <= keep[0] <= keep[1],
        f"data.prompt_tokens {data.prompt_tokens} must be at least 1": data.prompt_tokens >= 1,
        f"data.patches {data.patches} must not be negative": data.patches >= 0,
        f"answer.max_tokens {recipe.answer.max_tokens} must be at least 1": recipe.answer.max_tokens >= 1,
        f"rollout.group {group} must be at least 1": group >= 1,
        f"rollout.temperature {rollout.temperature} must be above 0": rollout.temperature > 0,
        f"rollout.top_p {rollout.top_p} must lie above 0 and at most 1": 0 < rollout.top_p <= 1,
        f"rollout.top_k {rollout.top_k} must lie in 0 (off) to model.text.vocab": 0 <= rollout.top_k <= recipe.model.text.vocab,
        f"rollout.packed_tokens {buckets} must grow": list(buckets) == sorted(set(buckets)),
        f"rollout.packed_tokens {buckets} must end with at least group x max_tokens {longest}": not buckets or buckets[-1] >= longest,
        f"reward.name_tokens {recipe.reward.name_tokens} must be at least 3": recipe.reward.name_tokens >= 3,
    }
    return _failed(checks)


def _training_problems(recipe: Recipe) -> list[str]:
    grpo, loss, sft = recipe.grpo, recipe.grpo.loss, recipe.sft
    checks = {
        f"grpo.mini_prompts {grpo.mini_prompts} must divide prompts {grpo.prompts}": _divides(grpo.mini_prompts, grpo.prompts),
        f"grpo.micro_prompts {grpo.micro_prompts} must divide mini_prompts {grpo.mini_prompts}": _divides(
            grpo.micro_prompts, grpo.mini_prompts
        ),
        f"grpo.loss.clip_low {loss.clip_low} must lie in 0 to 1": 0 <= loss.clip_low <= 1,
        f"grpo.loss.clip_high {loss.clip_high} must not be negative": loss.clip_high >= 0,
        f"grpo.loss.dual_clip {loss.dual_clip} must be 0 (off) or above 1": loss.dual_clip == 0 or loss.dual_clip > 1,
        f"grpo.keep_checkpoints {grpo.keep_checkpoints} must be at least 1": grpo.keep_checkpoints >= 1,
        f"sft.label_share {sft.label_share} must lie above 0, at most 1": 0 < sft.label_share <= 1,
        f"sft.answers {sft.answers} must be at least 1": sft.answers >= 1,
    }
    for name, steps in (("grpo.steps", grpo.steps), ("sft.steps", sft.steps)):
        checks[f"{name} {steps} must not be negative"] = steps >= 0
    return _failed(checks) + _optimizer_problems(recipe) + _mesh_problems(recipe)


def _optimizer_problems(recipe: Recipe) -> list[str]:
    def problems(stage: str, config: OptimizerConfig) -> list[str]:
        return _failed(
            {
                f"{stage}.optimizer.learning_rate {config.learning_rate} must be above 0": config.learning_rate > 0,
                f"{stage}.optimizer.warmup_steps {config.warmup_steps} must not be negative": config.warmup_steps >= 0,
                f"{stage}.optimizer.b1 {config.b1} and b2 {config.b2} must lie in 0 to 1": 0 <= config.b1 < 1 and 0 <= config.b2 < 1,
                f"{stage}.optimizer.grad_clip {config.grad_clip} must not be negative": config.grad_clip >= 0,
            }
        )

    return problems("grpo", recipe.grpo.optimizer) + problems("sft", recipe.sft.optimizer)


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
    stages |= {"sft.prompts": recipe.sft.prompts} if recipe.sft.steps else {}
    return _failed({f"{name} {rows} must be a multiple of mesh data x fsdp {shards}": rows % shards == 0 for name, rows in stages.items()})


def _failed(checks: dict[str, bool]) -> list[str]:
    return [message for message, good in checks.items() if not good]


def _divides(small: int, large: int) -> bool:
    return small >= 1 and large >= 1 and large % small == 0
