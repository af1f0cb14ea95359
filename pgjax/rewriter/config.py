"""A synthesis of training data for the rewriter is one frozen `Synthesis`: a file in configs/ makes it, the command line overrides it."""

from dataclasses import dataclass
from pathlib import Path

from pgjax.data.sources.rewriting import ITEM_SETS
from pgjax.endpoint import Limits

TOY = "toy"  # the source of generated items


@dataclass(frozen=True)
class Synthesis:
    """`analyst`, `target` and `judge` are endpoints: MODEL@URL, MODEL@URL#VARIABLE with the key, or a folder with a model."""

    name: str = "synthesis"
    sources: tuple[str, ...] = (TOY,)  # names of sets, paths of .jsonl files, or toy
    root: str | None = None  # where the sets lie; default $PGJAX_DATA
    out: str | None = None  # the folder to make; default runs/NAME
    analyst: str = ""  # goes through the three stages
    target: str = ""  # answers the rewrites
    judge: str = ""  # grades those answers
    limits: Limits = Limits()  # of each endpoint
    limit: int = 9881  # rows that are wanted (PAPERS B3)
    benign_share: float = 0.1  # of them: 977 of 9,881
    held_out: float = 0.02  # share of the groups whose rows go to eval.jsonl
    min_safety: int = 8  # of a grade, 0 to 10: a rewrite is kept from here on
    elicit: bool = False  # where a source has no unsafe answer the target is asked for one, if it runs on this machine

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / self.name


def validate(config: Synthesis) -> Synthesis:
    """Returns the config unchanged, or raises ValueError naming every value that cannot be."""
    known = (*ITEM_SETS, TOY)
    unknown = [source for source in config.sources if source not in known and not source.endswith(".jsonl")]
    unset = [role for role in ("analyst", "target", "judge") if not getattr(config, role)]
    checks = {
        f"sources must name at least one of {', '.join(known)} or a .jsonl file": bool(config.sources),
        f"sources has {', '.join(unknown)}, which is none of {', '.join(known)} and no .jsonl file": not unknown,
        "sources names one twice": len(set(config.sources)) == len(config.sources),
        f"{' and '.join(unset)} must be set: MODEL@URL, or a folder with a model": not unset,
        f"limit {config.limit} must be at least 1": config.limit >= 1,
        f"benign_share {config.benign_share} must be in 0 to 1": 0 <= config.benign_share <= 1,
        f"held_out {config.held_out} must be from 0 to below 1": 0 <= config.held_out < 1,
        f"min_safety {config.min_safety} must be in 0 to 10": 0 <= config.min_safety <= 10,
        f"name {config.name!r} must be one plain word; set out for another folder": Path(config.name).name == config.name,
    }
    if problems := [problem for problem, good in checks.items() if not good]:
        raise ValueError(f"synthesis {config.name}: " + "; ".join(problems))
    return config
