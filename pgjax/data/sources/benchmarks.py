"""The sets to evaluate on, by name: those of the published tables (PAPERS A10) and some more."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pgjax.data.sources.files import Read, choose
from pgjax.data.sources.pictures import beavertails_v, figstep, llavaguard, mossbench
from pgjax.data.sources.responses import aegis2, beavertails, wildguard, xstest_response
from pgjax.data.sources.texts import (
    harmbench,
    openai_moderation,
    openai_moderation_strict,
    probes,
    simple_safety_tests,
    surge_toxicity,
    toxic_chat,
    xstest,
)
from pgjax.taxonomy import Taxonomy


class Benchmark(NamedTuple):
    read: Callable[[Path, Taxonomy], Read]
    lines: tuple[str, ...]  # of the answer, those that it has labels for
    where: str | None  # its file below the root, or a glob pattern for several; None: it comes with this package
    origin: str  # where it is published


_HF, _GH = "huggingface.co/datasets", "github.com"
_REQUEST, _RESPONSE, _BOTH = ("request",), ("response",), ("request", "response")

_ALL = (
    Benchmark(aegis2, _BOTH, "aegis2/test.json", f"{_HF}/nvidia/Aegis-AI-Content-Safety-Dataset-2.0"),
    Benchmark(harmbench, _REQUEST, "harmbench/behavior_datasets/harmbench_behaviors_text_all.csv", f"{_GH}/centerforaisafety/HarmBench"),
    Benchmark(openai_moderation, _REQUEST, "openai_moderation/samples.jsonl.gz", f"{_GH}/openai/moderation-api-release"),
    Benchmark(openai_moderation_strict, _REQUEST, "openai_moderation/samples.jsonl.gz", f"{_GH}/openai/moderation-api-release"),
    Benchmark(simple_safety_tests, _REQUEST, "simple_safety_tests/*.csv", f"{_GH}/bertiev/SimpleSafetyTests"),
    Benchmark(toxic_chat, _REQUEST, "toxic_chat/toxic-chat_annotation_test.csv", f"{_HF}/lmsys/toxic-chat"),
    Benchmark(wildguard, _BOTH, "wildguard/wildguard_test.parquet", f"{_HF}/allenai/wildguardmix"),
    Benchmark(xstest, _REQUEST, "xstest/xstest_prompts.csv", f"{_GH}/paul-rottger/xstest"),
    Benchmark(xstest_response, _RESPONSE, "xstest_response/response_harmfulness*.parquet", f"{_HF}/allenai/xstest-response"),
    Benchmark(beavertails, _RESPONSE, "beavertails/test.jsonl.*", f"{_HF}/PKU-Alignment/BeaverTails"),
    Benchmark(beavertails_v, _BOTH, "beavertails_v/**/evaluation*.parquet", f"{_HF}/PKU-Alignment/BeaverTails-V"),
    Benchmark(llavaguard, _REQUEST, "llavaguard/*.json", f"{_HF}/AIML-TUDA/LlavaGuard-Dataset"),
    Benchmark(figstep, _REQUEST, "figstep/question/safebench.csv", f"{_GH}/ThuCCSLab/FigStep"),
    Benchmark(mossbench, _REQUEST, "mossbench/data/images_information/information.json", f"{_GH}/xirui-li/MOSSBench"),
    Benchmark(surge_toxicity, _REQUEST, "surge_toxicity/toxicity_en.csv", f"{_GH}/surge-ai/toxicity"),
    Benchmark(probes, _REQUEST, None, "this package"),
)
BENCHMARKS = {benchmark.read.__name__: benchmark for benchmark in _ALL}


def read_benchmark(name: str, root: Path, taxonomy: Taxonomy) -> Read:
    """The set's rows, of both splits. ValueError for an unknown name, for a set that is not below `root`, and for a wrong row."""
    return choose("benchmark", name, BENCHMARKS, root).read(root, taxonomy)
