"""Every set that is read here, by name: its reader, its files, where it is published and under which licence."""

import glob
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pgjax.data.sources import items, pictures, responses, texts
from pgjax.data.sources.files import Rows, choose
from pgjax.data.sources.items import as_examples
from pgjax.data.sources.own import own
from pgjax.data.sources.proguard import proguard_data
from pgjax.taxonomy import Taxonomy

Reader = Callable[[Path, Taxonomy], Rows]


class Source(NamedTuple):
    read: Reader
    where: str | None  # its file below the root, or a glob pattern for several; None: it comes with this package
    origin: str  # where it is published
    licence: str


_HF, _GH = "huggingface.co/datasets", "github.com"
_AEGIS = f"{_HF}/nvidia/Aegis-AI-Content-Safety-Dataset-2.0", "CC BY 4.0"
_BEAVERTAILS = f"{_HF}/PKU-Alignment/BeaverTails", "CC BY-NC 4.0"
_BEAVERTAILS_V = f"{_HF}/PKU-Alignment/BeaverTails-V", "CC BY-NC 4.0"
_FIGSTEP = f"{_GH}/ThuCCSLab/FigStep", "MIT"
_HARMBENCH = f"{_GH}/centerforaisafety/HarmBench", "MIT"
_LLAVAGUARD = f"{_HF}/AIML-TUDA/LlavaGuard-Dataset", "not stated"
_MED = f"{_GH}/AI4LIFE-GROUP/med-safety-bench", "MIT"
_MSTS = f"{_GH}/paul-rottger/msts-multimodal-safety", "CC BY 4.0"
_OPENAI = f"{_GH}/openai/moderation-api-release", "MIT"
_TOXIC_CHAT = f"{_HF}/lmsys/toxic-chat", "CC BY-NC 4.0"
_WILDGUARD = f"{_HF}/allenai/wildguardmix", "ODC-BY, gated"

SOURCES: dict[str, Source] = {
    # texts
    "ailuminate_demo": Source(texts.ailuminate_demo, "ailuminate_demo/*.csv", f"{_GH}/mlcommons/ailuminate", "CC BY 4.0"),
    "gpt_oss_safeguard_spam": Source(texts.gpt_oss_safeguard_spam, texts.SPAM, f"{_GH}/openai/gpt-oss-safeguard", "Apache 2.0"),
    "harmbench": Source(texts.harmbench, texts.HARMBENCH, *_HARMBENCH),
    "openai_moderation": Source(texts.openai_moderation, "openai_moderation/samples.jsonl.gz", *_OPENAI),
    "openai_moderation_strict": Source(texts.openai_moderation_strict, "openai_moderation/samples.jsonl.gz", *_OPENAI),
    "probes": Source(texts.probes, None, "this package", "Apache 2.0"),
    "simple_safety_tests": Source(texts.simple_safety_tests, "simple_safety_tests/*.csv", f"{_GH}/bertiev/SimpleSafetyTests", "CC BY 4.0"),
    "surge_toxicity": Source(texts.surge_toxicity, "surge_toxicity/toxicity_en.csv", f"{_GH}/surge-ai/toxicity", "MIT"),
    "toxic_chat": Source(texts.toxic_chat, "toxic_chat/toxic-chat_annotation_test.csv", *_TOXIC_CHAT),
    "toxic_chat_train": Source(texts.toxic_chat_train, "toxic_chat/toxic-chat_annotation_train.csv", *_TOXIC_CHAT),
    "xstest": Source(texts.xstest, "xstest/xstest_prompts.csv", f"{_GH}/paul-rottger/xstest", "CC BY 4.0"),
    # texts with responses
    "aegis2": Source(responses.aegis2, "aegis2/test.json", *_AEGIS),
    "aegis2_train": Source(responses.aegis2_train, "aegis2/train.json", *_AEGIS),
    "aegis2_validation": Source(responses.aegis2_validation, "aegis2/validation.json", *_AEGIS),
    "beavertails": Source(responses.beavertails, "beavertails/test.jsonl.*", *_BEAVERTAILS),
    "beavertails_train": Source(responses.beavertails_train, "beavertails/train.jsonl.*", *_BEAVERTAILS),
    "do_not_answer": Source(responses.do_not_answer, "do_not_answer/*.csv", f"{_GH}/Libr-AI/do-not-answer", "CC BY-NC-SA 4.0"),
    "harmbench_answers": Source(responses.harmbench_answers, responses.HARMBENCH_ANSWERS, *_HARMBENCH),
    "med_safety_bench": Source(responses.med_safety_bench, "med_safety_bench/test/*/*.csv", *_MED),
    "med_safety_bench_train": Source(responses.med_safety_bench_train, "med_safety_bench/train/*/*.csv", *_MED),
    "wildguard": Source(responses.wildguard, "wildguard/wildguard_test.parquet", *_WILDGUARD),
    "wildguard_train": Source(responses.wildguard_train, "wildguard/wildguard_train.parquet", *_WILDGUARD),
    "xstest_response": Source(
        responses.xstest_response, "xstest_response/response_harmfulness*.parquet", f"{_HF}/allenai/xstest-response", "ODC-BY, gated"
    ),
    # pictures, alone or with texts
    "beavertails_v": Source(pictures.beavertails_v, "beavertails_v/**/evaluation*.parquet", *_BEAVERTAILS_V),
    "beavertails_v_train": Source(pictures.beavertails_v_train, "beavertails_v/**/train*.parquet", *_BEAVERTAILS_V),
    "drawn": Source(pictures.drawn, "figstep/question/safebench.csv", *_FIGSTEP),
    "figstep": Source(pictures.figstep, "figstep/question/safebench.csv", *_FIGSTEP),
    "harmbench_multimodal": Source(pictures.harmbench_multimodal, pictures.HARMBENCH, *_HARMBENCH),
    "llavaguard": Source(pictures.llavaguard, "llavaguard/*.json", *_LLAVAGUARD),
    "llavaguard_train": Source(pictures.llavaguard_train, "llavaguard/*.json", *_LLAVAGUARD),
    "mm_safetybench": Source(
        as_examples(items.mm_safetybench), "mm_safetybench/processed_questions/*.json", f"{_GH}/isXinLiu/MM-SafetyBench", "CC BY-NC 4.0"
    ),
    "mossbench": Source(
        pictures.mossbench, "mossbench/data/images_information/information.json", f"{_GH}/xirui-li/MOSSBench", "CC BY-SA 4.0, no training"
    ),
    "msts": Source(pictures.msts, "msts/prompts/english_multimodal.csv", *_MSTS),
    "msts_response": Source(pictures.msts_response, "msts/response_annotations/english_multimodal.csv", *_MSTS),
    "siuo": Source(as_examples(items.siuo, answered=True), "siuo/siuo_gen.json", f"{_HF}/sinwang/SIUO", "CC BY-NC 4.0"),
    "spa_vl": Source(as_examples(items.spa_vl), "spa_vl/*/*.parquet", f"{_HF}/sqrti/SPA-VL", "CC BY 4.0"),
    "vlguard": Source(as_examples(items.vlguard, answered=True), "vlguard/*.json", f"{_HF}/ys-zong/VLGuard", "research only, gated"),
    "vlsbench": Source(as_examples(items.vlsbench), "vlsbench/data.json", f"{_HF}/Foreshhh/vlsbench", "Apache 2.0"),
    # of every kind
    "own": Source(own, "own/**/*.jsonl*", "the user", "the user's"),
    "proguard_data": Source(proguard_data, "proguard_data/**/*.parquet", f"{_HF}/yushaohan/ProGuard-Data", "not stated"),
}


def find_source(name: str, root: Path) -> Source:
    """A set of SOURCES, or the native rows of a file NAME.jsonl, relative to the root. ValueError for an unknown name, and for a set that
    is not below `root`."""
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
        if Path(name).is_absolute() or ".." in Path(name).parts or not (root / name).is_file():
            raise ValueError(f"source {name}: {root / name} is not there; give a path below the data's root")
        return SOURCES["own"]._replace(read=partial(own, pattern=glob.escape(name)), where=name)
    return choose("source", name, SOURCES, root)
