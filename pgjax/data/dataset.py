"""What a training set is made of: one frozen `Dataset`, a file in configs/data/ makes it, the command line overrides it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pgjax.data.schema import MODALITIES, Modality

Vote = object


@dataclass(frozen=True)
class Target:
    """How many rows of a modality a split gets."""

    modality: Modality
    rows: int
    split: Literal["train", "eval"] = "train"
    unsafe: float | None = None  # share of the rows in which request or response is unsafe; None: as it comes
    even: bool = False  # unsafe rows in equal parts for all categories (top level), as far as they go


@dataclass(frozen=True)
class Dataset:
    name: str = "dataset"
    sources: tuple[str, ...] = ()  # names of sets (data/sources/registry.py), or files of rows of your own, *.jsonl
    at_most: tuple[tuple[str, int], ...] = ()  # (source, rows): of those that would be chosen, no more are taken
    targets: tuple[Target, ...] = ()
    root: str | None = None  # where the sets lie; default $PGJAX_DATA
    out: str | None = None  # the folder to make; default runs/data/NAME
    benchmarks: tuple[str, ...] = ()  # no training row may be as one of these sets' rows
    near: float = 0.8  # texts with this similarity (Jaccard) or more count as one
    max_rejected: float = 0.01  # of the rows of a source: more that cannot be read, and the build ends
    vote: Vote | None = None  # who labels what comes without labels; None: such rows are left out

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / "data" / self.name


def validate(config: Dataset, known: tuple[str, ...], benchmarks: tuple[str, ...]) -> Dataset:
    """Returns the config unchanged, or raises ValueError naming every value that cannot be. `known` sources."""
    unknown = [source for source in config.sources if source not in known and not source.endswith(".jsonl")]
    limited = [source for source, _ in config.at_most]
    kinds = [(target.split, target.modality) for target in config.targets]
    shares = [config.near, config.max_rejected, *(t.unsafe for t in config.targets if t.unsafe is not None)]
    checks = {
        f"sources must name at least one of {', '.join(known)} or a .jsonl file": bool(config.sources),
        f"sources has {', '.join(unknown)}, which is none of {', '.join(known)} and no .jsonl file": not unknown,
        "sources names one twice": len(set(config.sources)) == len(config.sources),
        f"at_most limits {', '.join(limited)}: each once, and a source": set(limited) <= set(config.sources)
        and len(set(limited)) == len(limited),
        f"benchmarks are {', '.join(config.benchmarks)}; there are {', '.join(benchmarks)}": set(config.benchmarks) <= set(benchmarks),
        "targets must say how many rows of train are wanted, of a modality at least": any(t.split == "train" for t in config.targets),
        "targets has a modality of a split twice": len(set(kinds)) == len(kinds),
        f"targets must be of {', '.join(MODALITIES)}": {modality for _, modality in kinds} <= set(MODALITIES),
        "targets and at_most must want at least one row each": min(
            [t.rows for t in config.targets] + [n for _, n in config.at_most], default=1
        )
        >= 1,
        f"near, max_rejected and a target's unsafe must be in 0 to 1": all(0 <= s <= 1 for s in shares),
        f"name {config.name!r} must be one plain word; set out for another folder": Path(config.name).name == config.name,
    }
    if problems := [problem for problem, good in checks.items() if not good]:
        raise ValueError(f"dataset {config.name}: " + "; ".join(problems))
    return config
