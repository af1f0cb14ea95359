"""`report.html` of a run folder: one file, no scripts, nothing fetched; read from config.json, metrics.jsonl and samples/.

What a guard or a person wrote is untrusted: it is escaped and bounded (charts.text), pictures are decoded and drawn anew, and the
page's own policy forbids scripts and anything from outside.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pgjax.config import Recipe
from pgjax.data.build import read_dataset
from pgjax.data.schema import LABELS, MODALITIES
from pgjax.files import replace_file
from pgjax.pages.charts import WINDOW, bars, heat_map, histogram, lines, short, text
from pgjax.pages.page import facts, grid, table_of, whole_page
from pgjax.pages.samples import ROWS, said_class, sample_tables, thumbnail, top, wrong_and_right
from pgjax.recipes import to_json
from pgjax.taxonomy import Taxonomy, load_taxonomy
from pgjax.train.run_folder import read_config, read_metrics

SCORES = {  # of phase "eval": label -> key; each is also there with a modality and / before it
    "request F1, unsafe class": "request_f1",
    "request AUROC": "request_auroc",
    "response F1, unsafe class": "response_f1",
    "category accuracy": "category_accuracy",
    "OOD detection F1": "ood_f1",
    "OOD naming, mean similarity": "naming",
}
PHASES = ("encode", "prefill", "decode", "score", "reward", "update")
CURVES = {  # of phase "train": title, y label, and label -> key
    "Format": ("share of answers", {"in format": "reward/format"}),
    "Entropy": ("nats per token", {"entropy": "actor/entropy"}),
    "KL to the reference": ("nats per token", {"KL": "actor/kl_loss"}),
    "Gradient norm": ("before clipping", {"norm": "actor/grad_norm"}),
    "Groups without a spread of rewards": ("share of groups", {"no signal": "critic/frac_zero_std"}),
    "Time per step, where nothing compiled": ("seconds", {"s": "perf/time_per_step"}),
    "Phases, where nothing compiled": ("seconds", {phase: f"timing_s/{phase}" for phase in PHASES}),
    "Reward terms": ("mean per answer", {name: f"reward/{name}" for name in ("request", "response", "category", "bonus")}),
    "Answer length": ("tokens, mean", {"tokens": "response_length/mean"}),
    "Answers that never stopped": ("share of answers", {"cut off": "response_length/clip_ratio"}),
}


def write_report(run: Path, show_content: bool) -> Path:
    """Writes report.html of a run folder anew (aside, then renamed) and returns its path; a run that is still going has one too.

    `show_content` lets texts that samples/ holds and pictures of the run's data in: openly for toy data, else folded and blurred until
    clicked. Raises ValueError for a folder without config.json or metrics.jsonl, or with samples of an earlier version.
    """
    run = Path(run)
    recipe = read_config(run)
    if not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run} has no metrics.jsonl yet: start the run first")
    metrics, taxonomy, (step, samples) = read_metrics(run), load_taxonomy(recipe.data.taxonomy), read_samples(run)
    steps, scores = ([row for row in metrics if row["phase"] == phase] for phase in ("train", "eval"))
    sections = {
        "Summary": summary(steps, scores),
        "Training": curves(steps, scores),
        "Held-out scores": held_out(scores[-1] if scores else {}, read_intervals(run, scores), samples, taxonomy),
        "Categories": confusion(samples, taxonomy),
        "Samples": sample_section(run, samples, step, taxonomy, show_content, recipe.data.name != "toy"),
    }
    replace_file(run / "report.html", whole_page(recipe.name, header(recipe, steps), sections))
    return run / "report.html"


def read_samples(run: Path) -> tuple[int, list[dict]]:
    """Step and rows of the last validation; (0, []) where there was none."""
    files = sorted((run / "samples").glob("*.jsonl"), key=lambda file: int(file.stem))
    if not files:
        return 0, []
    rows = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").split("\n") if line]
    if any("terms" not in row for row in rows):
        raise ValueError(f"{files[-1]} was written by an earlier version, without reward terms; train the run again with --fresh")
    return int(files[-1].stem), rows


def read_intervals(run: Path, scores: list[dict]) -> dict[str, dict]:
    """Scores with their bootstrap intervals, by key, where evaluation.json is of the last validation."""
    file = run / "evaluation.json"
    found = json.loads(file.read_text(encoding="utf-8")) if scores and file.is_file() else {}
    return found["scores"] if found and found["step"] == scores[-1]["step"] else {}


def read_pictures(run: Path, samples: list[dict]) -> dict[str, list[str]]:
    """Small copies of the pictures, as data addresses by example id; the original bytes never reach the page."""
    if not (run / "data").is_dir():
        return {}
    wanted, found = {row["id"] for row in samples if row["modality"] != "text"}, {}
    for example in read_dataset(run / "data", "eval"):
        if example.id in wanted:
            found[example.id] = [thumbnail(data) for data in example.images]
    return found


# --- header, summary, curves -------------------------------------------------------------------------------------------------------


def header(recipe: Recipe, steps: list[dict]) -> str:
    grpo, done = recipe.grpo, steps[-1]["step"] if steps else 0
    seconds = sum(row.get("perf/time_per_step") or 0 for row in steps)
    items = {
        "steps": f"{done} of {grpo.steps}, {seconds / 60:.1f} min",
        "data": f"{recipe.data.name}, seed {recipe.seed}",
        "start": recipe.checkpoint or f"random weights, {recipe.warm_up.steps} warm-up steps",
        "batch": f"{grpo.prompts} prompts x {recipe.rollout.group} answers, at most {recipe.answer.max_tokens} tokens",
        "learning rate": f"{grpo.optimizer.learning_rate:g}, {grpo.optimizer.schedule}",
        "KL": f"{grpo.loss.kl_coef:g} in the loss, {grpo.loss.kl_in_reward:g} in the reward",
        "reward": recipe.reward.variant,
        "mesh": f"data {recipe.mesh.data}, fsdp {recipe.mesh.fsdp}, tensor {recipe.mesh.tensor}",
    }
    warning = '<p class="warning">A toy or demo model: not a guard.</p>' if recipe.not_a_guard else ""
    config = f"<details><summary>The whole config</summary><pre>{text(to_json(recipe), 100_000)}</pre></details>"
    return f"<h1>{text(recipe.name, 200)}</h1>{warning}{facts(items)}{config}"


def summary(steps: list[dict], scores: list[dict]) -> str:
    """First and last values, from the run's own metrics, with intervals where the line has them."""
    table: list[tuple[str, str, str, float | None]] = []
    if steps:
        few = min(WINDOW, len(steps))
        first, last = (sum(row["critic/rewards/mean"] for row in part) / few for part in (steps[:few], steps[-few:]))
        table.append((f"reward of sampled answers, mean of {few} steps", short(first), short(last), last - first))
    note = ""
    if scores:
        before, after = scores[0], scores[-1]
        for name, key in (SCORES | {"parse failures": "parse_failures"}).items():
            a, b = before.get(key), after.get(key)
            change = None if a is None or b is None else b - a
            if a is not None or b is not None:
                table.append((f"held-out {name}", measured(before, key), measured(after, key), change))
        note = f"Held-out: {after['n']:.0f} prompts, greedy answers, at step {before['step']} and step {after['step']}."
        note += " In brackets: 95% bootstrap intervals." if any(key.endswith("_low") for key in after) else ""
    rows = "".join(f"<tr><td>{name}</td><td>{a}</td><td>{b}</td><td>{signed(change)}</td></tr>" for name, a, b, change in table)
    return f"{table_of('', 'before', 'after', 'change', rows=rows)}<p>{note}</p>" if table else ""


def measured(row: dict, key: str) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return short(row.get(key)) + ("" if low is None or high is None else f" <small>({short(low)} to {short(high)})</small>")


def signed(value: float | None) -> str:
    return ("+" if value and value > 0 else "") + short(value).replace("-", "−")


def curves(steps: list[dict], scores: list[dict]) -> str:
    def points(rows: list[dict], key: str) -> list[tuple[float, float | None]]:
        skip = key.startswith(("perf/time", "timing_s/"))  # a compilation takes many times as long as a step
        return [(row["step"], row.get(key)) for row in rows if not (skip and row.get("perf/compilations"))]

    charts = [lines("Reward", {"reward": points(steps, "critic/rewards/mean")}, "mean per answer, at most 3", high=2)]
    labels = {"request F1": "request_f1", "response F1": "response_f1", "category": "category_accuracy", "OOD F1": "ood_f1"}
    charts.append(lines("Held-out split", {name: points(scores, key) for name, key in labels.items()}, "score", high=1))
    for title, (y_label, keys) in CURVES.items():
        high = 1 if y_label.startswith("share") else 0
        charts.append(lines(title, {name: points(steps, key) for name, key in keys.items()}, y_label, high=high))
    note = f"<p>Faint: each step. Bold: mean of {WINDOW} steps, whose last value is labelled.</p>" if len(steps) >= 3 * WINDOW else ""
    return note + grid(charts)


# --- scores of the last validation -------------------------------------------------------------------------------------------------


def gold_class(row: dict, taxonomy: Taxonomy) -> str | None:
    """Top-level id, "none" or "OOD"; None where it is not known."""
    known = {"none": "none", "ood": "OOD", "unknown": None}
    return known[row["category"]] if row["category"] in known else top(row["node"], taxonomy)


def held_out(scores: dict, intervals: dict[str, dict], samples: list[dict], taxonomy: Taxonomy) -> str:
    """Bars of the last validation: each score over all rows and by modality, then by gold category."""
    charts, prefixes = [], {"all": ""} | {name.replace("_", " with "): f"{name}/" for name in MODALITIES}
    of_ood = Counter(prefix for row in samples if row["category"] == "ood" for prefix in ("", f"{row['modality']}/"))
    for label, key in SCORES.items():
        rows, low_high = [], {}
        for name, prefix in prefixes.items():
            value = scores.get(prefix + key)
            if value is not None:
                number = of_ood[prefix] if key == "naming" else int(scores[f"{prefix}{key.split('_')[0]}_n"])
                rows.append((name, value, number))
                entry = intervals.get(prefix + key, {})
                if entry.get("low") is not None:
                    low_high[name] = (entry["low"], entry["high"])
        charts.append(bars(label[0].upper() + label[1:], rows, low_high))

    def by_category(title: str, rows: list[dict], hit: Callable[[dict], bool]) -> str:
        groups = [(node, [hit(row) for row in rows if row["node"] and top(row["node"], taxonomy) == node.id]) for node in taxonomy.top]
        return bars(title, [(f"{node.id} {node.name}", sum(hits) / len(hits), len(hits)) for node, hits in groups if hits])

    labelled, listed = [row for row in samples if row["request_label"] in LABELS[:2]], [row for row in samples if row["category"] == "node"]
    right_label = lambda row: row["verdict"]["request"] == LABELS.index(row["request_label"])  # noqa: E731
    charts.append(by_category("Right request label, by gold category", labelled, right_label))
    charts.append(by_category("Right id, by gold category in the policy", listed, lambda row: row["terms"]["category_right"] > 0))
    charts.append(histogram("Length of greedy answers", [row["length"] for row in samples], "tokens", "answers"))
    return grid(charts)


def confusion(samples: list[dict], taxonomy: Taxonomy) -> str:
    """Gold against answered categories at the top level."""
    pairs = Counter((gold, said_class(row, taxonomy)) for row in samples if (gold := gold_class(row, taxonomy)))
    unknown = len(samples) - pairs.total()
    if not pairs:
        return ""
    names = {node.id: f"{node.id} {node.name}" for node in taxonomy.top} | {"none": "none (all safe)", "OOD": "OOD (not in the policy)"}
    golds = [id for id in names if any(gold == id for gold, _ in pairs)]
    columns = [id for id in names if id in ("none", "OOD") or any(id in pair for pair in pairs)] + ["unlisted", "no parse"]
    counts = [[pairs[gold, said] for said in columns] for gold in golds]
    note = "A row per gold category, shaded by its share; green is right at this level, red wrong. Columns are what the answers said: "
    note += "OOD is a name of the guard's own, unlisted an id that the prompt's policy does not have."
    note += f" {unknown} rows of unknown category are left out." if unknown else ""
    return f"<p>{note}</p>" + heat_map("Top-level categories", [names[g] for g in golds], columns, counts, "gold", "answered")


# --- sample table ------------------------------------------------------------------------------------------------------------------


def sample_section(run: Path, samples: list[dict], step: int, taxonomy: Taxonomy, content: bool, veil: bool) -> str:
    if not samples:
        return ""
    parts = wrong_and_right(samples)
    pictures = read_pictures(run, [row for rows in parts.values() for row in rows[:ROWS]]) if content else {}
    links = " · ".join(f'<a href="#{name}">{len(rows)} {name}</a>' for name, rows in parts.items())
    kept = "" if content else " Texts and pictures are not kept for this data; train with --report.show-content to see them here."
    body = f"<p>Greedy answers at step {step}: {links}. Right means every label and the category, where known. "
    body += f"Terms are what request + response + category earned.{kept}</p>"
    return body + sample_tables(parts, taxonomy, pictures, content, veil)
