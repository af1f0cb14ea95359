"""The hook to trackers, with small stand-ins for their packages that write down what is called."""

import sys
from types import SimpleNamespace

import pytest

from pgjax.train.trackers import open_tracker


@pytest.fixture
def calls(monkeypatch):
    calls: list[tuple] = []

    def note(name):
        return lambda *args, **options: calls.append((name, *args, options))

    run = SimpleNamespace(log=note("log"), finish=note("finish"))
    wandb = SimpleNamespace(init=lambda **options: (calls.append(("init", options)), run)[1])
    mlflow = SimpleNamespace(**{name: note(name) for name in ("start_run", "log_params", "log_metrics", "end_run")})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return calls


def test_wandb(calls):
    log, close = open_tracker("wandb", "demo", {"seed": 0})
    log(3, {"critic/rewards/mean": 1.5})
    close()
    assert calls == [
        ("init", {"name": "demo", "config": {"seed": 0}}),
        ("log", {"critic/rewards/mean": 1.5, "step": 3}, {}),
        ("finish", {}),
    ]


def test_mlflow(calls):
    log, close = open_tracker("mlflow", "demo", {"seed": 0})
    log(3, {"critic/rewards/mean": 1.5})
    close()
    assert calls == [
        ("start_run", {"run_name": "demo"}),
        ("log_params", {"seed": 0}, {}),
        ("log_metrics", {"critic/rewards/mean": 1.5}, {"step": 3}),
        ("end_run", {}),
    ]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        open_tracker("wandb", "demo", {})
