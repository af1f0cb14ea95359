"""Draw a run: reward per step and held-out scores, from its metrics.jsonl.

python benchmarks/plot_run.py runs/demo docs/demo.png        (needs the extra `docs`)
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pgjax.train.run_folder import read_metrics

SCORES = {
    "request_f1": "request F1 (unsafe)",
    "response_f1": "response F1 (unsafe)",
    "category_accuracy": "category accuracy",
    "ood_f1": "OOD detection F1",
}


def draw(run: str, out: str) -> None:
    rows = read_metrics(run)
    steps = [row for row in rows if row["phase"] == "train"]
    scores = [row for row in rows if row["phase"] == "eval"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    x, reward = [row["step"] for row in steps], np.array([row["critic/rewards/mean"] for row in steps])
    left.plot(x, reward, color="0.8", label="step")
    window = min(10, len(reward))
    left.plot(x[window - 1 :], np.convolve(reward, np.ones(window) / window, "valid"), color="C0", label=f"mean of {window} steps")
    left.set(title="reward of the sampled answers", xlabel="GRPO step", ylabel="reward (at most 3)")
    for name, label in SCORES.items():
        points = [(row["step"], row[name]) for row in scores if row.get(name) is not None]
        right.plot(*zip(*points, strict=True), marker="o", label=label)
    right.set(title=f"held-out split, {scores[0]['n']:.0f} prompts, greedy answers", xlabel="GRPO step", ylim=(-0.02, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    draw(*sys.argv[1:3])
