"""What a training set is made of: one frozen `Dataset`, a file in configs/data/ makes it, the command line overrides it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pgjax.data.schema import MODALITIES, Modality
from pgjax.data.sources.benchmarks import BENCHMARKS
from pgjax.data.vote import Vote


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
    sources: tuple[str, ...] = ()  # names of sets (data/sources/registry.py), or files of rows of your own below the root, *.jsonl
    at_most: tuple[tuple[str, int], ...] = ()  # (source, rows): no more of its training rows are there to choose from
    targets: tuple[Target, ...] = ()
    root: str | None = None  # where the sets lie; default $PGJAX_DATA
    out: str | None = None  # the folder to make; default runs/data/NAME
    benchmarks: tuple[str, ...] = ()  # no training row may be as one of these sets' rows
    near: float = 0.8  # texts with this similarity (Jaccard) or more count as one
    max_rejected: float = 0.05  # of the rows of a source: more that are broken, and the build ends
    vote: Vote = Vote()  # who labels what comes without labels; without judges such rows are left out

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / "data" / self.name


def validate(config: Dataset) -> Dataset:
    """Returns the config unchanged, or raises ValueError naming every value that cannot be. Names of sources are looked at by the build."""
    voters = [name for name in config.vote.sources if name not in config.sources]
    unknown = [name for name in config.benchmarks if name not in BENCHMARKS]
    limited = [source for source, _ in config.at_most]
    kinds = [(target.split, target.modality) for target in config.targets]
    shares = [config.max_rejected, *(t.unsafe for t in config.targets if t.unsafe is not None)]
    counts = [target.rows for target in config.targets] + [rows for _, rows in config.at_most]
    checks = {
        "sources must name at least one set, or a .jsonl file": bool(config.sources),
        f"sources names {', '.join(config.sources)}: one of them twice": len(set(config.sources)) == len(config.sources),
        f"at_most limits {', '.join(limited)}: each once, and a source": set(limited) <= set(config.sources)
        and len(set(limited)) == len(limited),
        f"benchmarks names {', '.join(unknown)}, which is none of {', '.join(BENCHMARKS)}": not unknown,
        "targets must say how many rows are wanted of train, and how many of eval": {split for split, _ in kinds} == {"train", "eval"},
        f"vote.sources names {', '.join(voters)}, which is none of the sources": not voters,
        "targets has a modality of a split twice": len(set(kinds)) == len(kinds),
        f"targets must be of {', '.join(MODALITIES)}": {modality for _, modality in kinds} <= set(MODALITIES),
        "targets and at_most must be of a row at least": min(counts, default=1) >= 1,
        "max_rejected and a target's unsafe must be in 0 to 1": all(0 <= share <= 1 for share in shares),
        f"near {config.near} must be above 0, at most 1": 0 < config.near <= 1,
        f"name {config.name!r} must be one plain word; set out for another folder": Path(config.name).name == config.name,
    }
    if problems := [problem for problem, good in checks.items() if not good]:
        raise ValueError(f"dataset {config.name}: " + "; ".join(problems))
    return config
