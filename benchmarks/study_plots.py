"""The plots of docs/results.md, the same bytes from the same files: learning against what it costs, and reward against seconds."""

import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import study_clock
from study_scores import Files, once, system, unsafe_auroc

STYLE = {
    "svg.hashsalt": "pgjax",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
}
FONT = "font-family: 'DejaVu Sans', 'Verdana', 'Arial', sans-serif; "  # as matplotlib writes it at every word
THIN, THICK = {"linewidth": 0.8, "alpha": 0.5}, {"linewidth": 2.2}


def draw(found: dict[str, Files], form: str, folder: Path) -> None:
    """What the form has files for."""
    with plt.rc_context(STYLE):
        if "grpo" in found.get("learning", {}):
            save(curve(found["learning"]), folder / f"curve_{form}.svg")
        if found.get("clock"):
            save(clock(found["clock"]["toy"]), folder / f"clock_{form}.svg")


def save(figure: plt.Figure, file: Path) -> None:
    """As SVG, on white, and small: tenths of a point are enough (numbers in labels have fewer digits), the font is said once, and groups
    change nothing that is seen."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), facecolor="white")
    plt.close(figure)
    small = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}", text.getvalue())
    small = re.sub(r"\s+", " ", small.replace(FONT, "")).replace("> <", ">\n<")
    small = re.sub(r"</?g( [^>]*)?>\n", "", small)
    file.write_text(small.replace("*{", f"svg{{{FONT}}} *{{", 1) + "\n")


def seeds(axes: plt.Axes, x_SN: np.ndarray, y_SN: np.ndarray, color: str, label: str, **how) -> None:
    """A thin line for each seed and a thick one for the mean, over seeds, of both coordinates."""
    for x_N, y_N in zip(x_SN, y_SN, strict=True):
        axes.plot(x_N, y_N, color=color, **THIN)
    axes.plot(np.mean(x_SN, 0), np.mean(y_SN, 0), color=color, label=label, **THICK, **how)


def curve(files: Files) -> plt.Figure:
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.2))
    of = lambda name: np.array([[at[name] for at in one["curve"]] for one in files["grpo"]], float)  # noqa: E731
    flat = {"words": ("TF-IDF + logistic regression, AUROC", "--"), "majority": ("majority, AUROC", ":")}
    for panel, (cost, label, unit) in zip(
        axes.flat,
        (("step", "steps", 1), ("tokens", "thousand tokens trained on", 1e3), ("seconds", "seconds of training", 1)),
        strict=False,
    ):
        for score, color, name in (("request_auroc", "C0", "GRPO, AUROC"), ("request_f1", "C1", "GRPO, unsafe F1")):
            seeds(panel, of(cost) / unit, of(score), color, name, marker="o", markersize=4)
        for run, (name, dashes) in flat.items():
            for rows in system(files.get(run, [])[:1]).values():
                panel.axhline(once(rows, unsafe_auroc), color="0.35", linestyle=dashes, label=name)
        panel.set(xlabel=label, ylabel="held-out score", ylim=(0.4, 1))
    steps = [one["trained"]["reward"] for one in files["grpo"]]
    seeds(axes[1, 1], np.array([range(1, len(one) + 1) for one in steps]), np.array(steps), "C2", "training reward")
    axes[1, 1].set(xlabel="steps", ylabel="training reward (at most 3)")
    handles = [*axes[0, 0].get_legend_handles_labels()[0], *axes[1, 1].get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, title="thin: one seed; thick: mean of the seeds")
    return figure


def clock(runs: list[dict]) -> plt.Figure:
    """Means of study_clock.WINDOW steps, as its levels are reached."""
    figure, axes = plt.subplots(figsize=(9, 4))
    window = study_clock.WINDOW
    for side, label, color in (("pgjax", "pgjax", "C0"), ("trl", "TRL", "C1")):
        smooth = [np.convolve(one[side]["reward"], np.ones(window) / window, "valid") for one in runs]
        seeds(axes, np.array([one[side]["seconds"][window - 1 :] for one in runs]), np.array(smooth), color, label)
    axes.set(xlabel="seconds since the first step began", ylabel=f"reward, mean of {window} steps", xlim=(0, None))
    figure.legend(loc="outside lower center", ncols=2, title="thin: one seed; thick: mean of the seeds")
    return figure
