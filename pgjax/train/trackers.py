"""Metrics to a tracker beside the run folder: wandb or mlflow, if the user has installed it and asks for it."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Tracker(NamedTuple):
    log: Callable[[int, Mapping[str, float]], None]  # (step, metrics)
    close: Callable[[], None]


def open_tracker(kind: str, name: str, config: Mapping[str, Any]) -> Tracker:
    """The tracker of that package; ValueError when it is not installed.

    The package reads its own environment (server, project, key). Steps that a resumed run does again are logged again.
    """
    try:
        package = importlib.import_module(kind)
    except ImportError as error:
        raise ValueError(f"tracker {kind} needs the package {kind}, which is not installed: pip install {kind}") from error
    if kind == "wandb":
        run = package.init(name=name, config=dict(config))
        # Not wandb's own step, which may not go back: phases count their steps apart.
        return Tracker(lambda step, metrics: run.log({**metrics, "step": step}), run.finish)
    package.start_run(run_name=name)
    package.log_params(dict(config))
    return Tracker(lambda step, metrics: package.log_metrics(dict(metrics), step=step), package.end_run)
