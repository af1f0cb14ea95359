"""What the public sets below $PGJAX_DATA give: mild in size, for trying the whole way from files to a training run.

Unsafe texts come from two sets that have both labels; pictures of typed requests (figstep) have twins that are drawn with harmless ones.
Evaluation gets what is held out, and mossbench, whose licence forbids training. No training row is as one of harmbench.
"""

from pgjax.data.dataset import Dataset, Target

dataset = Dataset(
    name="public",
    sources=(
        *("openai_moderation_strict", "surge_toxicity", "med_safety_bench_train", "gpt_oss_safeguard_spam", "harmbench_answers"),
        *("figstep", "drawn", "mossbench"),
    ),
    at_most=(("med_safety_bench_train", 200),),  # of one label: more would be told by their style
    targets=(
        Target("text", 1300, unsafe=0.5, even=True),
        Target("text_image", 700, unsafe=0.5, even=True),
        Target("text", 380, split="eval", unsafe=0.5),
        Target("text_image", 700, split="eval", unsafe=0.5),
    ),
    benchmarks=("harmbench",),
)
