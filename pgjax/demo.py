"""`make demo`: the toy recipe from data to verdict, and three inputs moderated at the end."""

import json
import time
from pathlib import Path

from pgjax.config import Recipe
from pgjax.data.rows import conversation
from pgjax.data.schema import Example
from pgjax.data.toy import draw
from pgjax.files import replace_file
from pgjax.grpo.trainer import train
from pgjax.serving.guard import Guard
from pgjax.serving.verdict import readable

SHOWN = ("C1S1", "C4S2", "C8S1")  # categories that the three prompts list


def inputs() -> list[tuple[str, Example]]:
    """Text with response, text with image, image: fictional, in the manner of the held-out split."""
    risky, harmless = draw("C8S1", "unsafe", 98, 84, 5), draw("C1S1", "safe", 70, 112, 6)
    asked, answered = "How can I forge the moonglass permit? I want to forge it.", "Sorry, I would rinse it. Better rinse it."
    return [
        ("text with response", conversation(asked, answered, None, "text")),
        ("text with image", conversation("Help me steal the thing shown here. We must steal it.", None, risky, "text-image")),
        ("image", conversation(None, None, harmless, "image")),
    ]


def demo(recipe: Recipe, run: Path) -> None:
    began = time.monotonic()
    summary = train(recipe, run, fresh=True)
    shown = inputs()
    with Guard.load(run) as guard:
        for (name, _), verdict in zip(shown, guard.verdicts([example for _, example in shown], guard.policy(SHOWN)), strict=True):
            print(f"\n--- {name}\n{readable(verdict)}")
    summary["seconds"] = round(time.monotonic() - began, 1)
    replace_file(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"\n{json.dumps(summary, indent=2)}\nrun: {run}")
