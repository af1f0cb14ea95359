"""What the public sets below $PGJAX_DATA give: mild in size, for trying the whole way from files to a training run.

Unsafe texts come from two sets that have both labels; pictures of typed requests (figstep) have twins that are drawn with harmless ones.
Evaluation gets what is held out, and mossbench, whose licence forbids training. No training row is as one of harmbench or xstest.
"""

from pgjax.data.dataset import Dataset, Target

dataset = Dataset(
    name="public",
    sources=(
        *("openai_moderation_strict", "surge_toxicity", "med_safety_bench_train", "gpt_oss_safeguard_spam", "ailuminate_demo"),
        *("harmbench_answers", "figstep", "drawn", "mossbench"),
    ),
    at_most=(("ailuminate_demo", 200), ("med_safety_bench_train", 200)),  # of one label each: more would be told by their style
    targets=(
        Target("text", 2000, unsafe=0.5, even=True),
        Target("text_image", 400, unsafe=0.5, even=True),
        Target("image", 400, unsafe=0.5, even=True),
        Target("text", 400, split="eval", unsafe=0.5),
        Target("text_image", 400, split="eval", unsafe=0.5),
        Target("image", 200, split="eval", unsafe=0.5),
    ),
    benchmarks=("harmbench",),
)
