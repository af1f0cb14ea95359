"""`report.html` of a supervised run, from config.json, metrics.jsonl and data/lessons.json; nothing of what lessons say is in it."""

from pathlib import Path

from pgjax.config import Recipe
from pgjax.files import read_json, replace_file
from pgjax.pages.charts import lines, short, text
from pgjax.pages.page import facts, grid, table_of, whole_page
from pgjax.recipes import to_json
from pgjax.train.run_folder import read_config, read_metrics

CURVES = {  # of phase "sft": title, y label, key
    "Gradient norm": ("before clipping", "actor/grad_norm"),
    "Padding": ("share of slots", "data/padding"),
    "Tokens per second, where nothing compiled": ("prompts and answers", "perf/tokens_per_s/update"),
    "Time per step, where nothing compiled": ("seconds", "perf/time_per_step"),
    "MFU, where nothing compiled": ("share of the peak", "perf/mfu/update"),
}


def write_report(run: Path) -> Path:
    """Writes report.html of a run folder anew (aside, then renamed) and returns its path; a run that is still going has one too. ValueError
    for a folder without config.json or metrics.jsonl."""
    recipe = read_config(run)
    if not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run} has no metrics.jsonl yet: start the run first")
    metrics = read_metrics(run)
    steps, scores = ([row for row in metrics if row["phase"] == phase] for phase in ("sft", "eval"))
    sections = {"Summary": summary(steps, scores), "Training": curves(steps, scores), "Lessons": lessons(run)}
    replace_file(run / "report.html", whole_page(recipe.name, header(recipe, steps), sections))
    return run / "report.html"


def header(recipe: Recipe, steps: list[dict]) -> str:
    sft, model, seconds = recipe.sft, recipe.model, sum(row["perf/time_per_step"] for row in steps)
    part = "all but the vision tower" if model.freeze_vision else "everything"
    optimizer = sft.optimizer
    items = {
        "steps": f"{steps[-1]['step'] if steps else 0} of {sft.steps}, {seconds / 60:.1f} min",
        "start": recipe.checkpoint or "random weights",
        "trained": f"adapters of rank {model.lora_rank}" if model.lora_rank else part,
        "batch": f"{sft.prompts} prompts, {sft.micro_prompts} at a time; answers of at most {recipe.answer.max_tokens} tokens",
        "learning rate": f"{optimizer.learning_rate:g}, {optimizer.schedule}, {optimizer.warmup_steps} steps to rise",
        "mesh": f"data {recipe.mesh.data}, fsdp {recipe.mesh.fsdp}, tensor {recipe.mesh.tensor}",
    }
    config = f"<details><summary>The whole config</summary><pre>{text(to_json(recipe), 100_000)}</pre></details>"
    return f"<h1>{text(recipe.name, 200)}</h1>{facts(items)}{config}"


def summary(steps: list[dict], scores: list[dict]) -> str:
    """First and last values."""
    named = {"held-out loss": (scores, "loss"), "held-out perplexity": (scores, "perplexity"), "training loss": (steps, "sft/loss")}
    ends = [(name, short(of[0][key]), short(of[-1][key])) for name, (of, key) in named.items() if of]
    rows = "".join(f"<tr><td>{name}</td><td>{first}</td><td>{last}</td></tr>" for name, first, last in ends)
    return table_of("", "first", "last", rows=rows) if rows else ""


def curves(steps: list[dict], scores: list[dict]) -> str:
    points = lambda rows, key: [(row["step"], row.get(key)) for row in rows]  # noqa: E731
    warm = [row for row in steps if not row["perf/compilations"]]  # a compilation takes many times as long as a step
    loss = {"training": points(steps, "sft/loss"), "held out": points(scores, "loss")}
    charts = [lines("Loss", loss, "nats per answer token")]
    for title, (label, key) in CURVES.items():
        charts.append(lines(title, {title: points(warm if "compiled" in title else steps, key)}, label))
    return grid(charts)


def lessons(run: Path) -> str:
    """What was kept and dropped, and the shapes that it is trained in."""
    found = read_json(run / "data" / "lessons.json")
    rows = ""
    for split, name in (("train", "to train on"), ("eval", "held out")):
        of = found[split]
        dropped = ", ".join(f"{count} ({reason})" for reason, count in of["dropped"].items()) or "none"
        buckets = ", ".join(" + ".join(map(str, sizes)) for sizes in of["buckets"])
        rows += f"<tr><td>{name}</td><td>{of['lessons']}</td><td>{dropped}</td><td>{buckets}</td></tr>"
    return table_of("", "lessons", "dropped, by what does not fit", "slots: of a prompt + patches + answers in a row", rows=rows)
