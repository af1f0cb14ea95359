"""The sets to evaluate on, by name: those of the published tables (PAPERS A10) and some more."""

from pathlib import Path

from pgjax.data.sources.files import Read, choose, gather
from pgjax.data.sources.registry import SOURCES
from pgjax.taxonomy import Taxonomy

_REQUEST, _RESPONSE, _BOTH = ("request",), ("response",), ("request", "response")

# Of the answer, the lines that a set has labels for.
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "aegis2": _BOTH,
    "harmbench": _REQUEST,
    "openai_moderation": _REQUEST,
    "openai_moderation_strict": _REQUEST,
    "simple_safety_tests": _REQUEST,
    "toxic_chat": _REQUEST,
    "wildguard": _BOTH,
    "xstest": _REQUEST,
    "xstest_response": _RESPONSE,
    "beavertails": _RESPONSE,
    "beavertails_v": _BOTH,
    "llavaguard": _REQUEST,
    "figstep": _REQUEST,
    "mossbench": _REQUEST,
    "surge_toxicity": _REQUEST,
    "probes": _REQUEST,
}


def read_benchmark(name: str, root: Path, taxonomy: Taxonomy) -> Read:
    """The set's rows, of both splits. ValueError for an unknown name, for a set that is not below `root`, and for a wrong row."""
    return gather(choose("benchmark", name, {name: SOURCES[name] for name in BENCHMARKS}, root).read(root, taxonomy))
