"""The paper's mix in its numbers (PAPERS A5): 27,954 rows of an image, 30,000 of text and image, 29,070 of text; one in five held out.

Six of its sources are in no published format that is read here; they are files of rows of your own (docs/data.md) below the
data's root. How many rows each source gave, the shares of the labels, and what voted is not published: here every source gives what it
has, labels come in equal parts, and three judges label what comes without labels (start them, or set --vote.judges).
"""

from pgjax.data.dataset import Dataset, Target
from pgjax.data.vote import Vote

SERVER = "http://localhost:8000/v1"


def both(modality, rows):
    held_out = rows // 5
    return Target(modality, rows - held_out, unsafe=0.5, even=True), Target(modality, held_out, split="eval", unsafe=0.5, even=True)


dataset = Dataset(
    name="proguard_87k",
    sources=(
        *("own/guardreasoner_vl.jsonl", "llavaguard_train", "own/t2isafety.jsonl"),  # images
        *("beavertails_v_train", "own/llava_cc3m.jsonl"),  # texts with images; the second for benign ones
        *("own/direct_refusal.jsonl", "own/guardreasoner.jsonl", "med_safety_bench_train", "do_not_answer"),  # texts
        *("own/aegis1.jsonl", "aegis2_train"),
    ),
    targets=(*both("image", 27_954), *both("text_image", 30_000), *both("text", 29_070)),
    benchmarks=("aegis2", "harmbench", "openai_moderation", "simple_safety_tests", "toxic_chat", "wildguard", "xstest", "xstest_response")
    + ("beavertails", "beavertails_v", "llavaguard"),
    vote=Vote(judges=tuple(f"judge{n}@{SERVER}" for n in (1, 2, 3)), quorum=2 / 3),
)
