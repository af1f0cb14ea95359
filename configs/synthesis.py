"""The rewriter's training data in the paper's numbers (PAPERS B3): 9,881 rows, one in ten benign, from three sets below $PGJAX_DATA.

One server has all three parts, such as vLLM with InternVL2.5-38B, the paper's model for the first stage; which model the paper gives the
others is not known. A target that is less careful shows more: set --target. SPA-VL brings both answers to each request, but its training
part has no classes, so that nothing there can be withheld by its label: put hash matching before it. VLGuard's answers are all safe:
without `--elicit True` its benign rows alone are used. VLSBench has no answers, and is counted and left out; a .jsonl file with answers to
its requests is a source, too.
"""

from pgjax.endpoint import Limits
from pgjax.rewriter.config import Synthesis

INTERN = "OpenGVLab/InternVL2_5-38B@http://localhost:8000/v1"

synthesis = Synthesis(
    name="synthesis",
    sources=("vlguard", "spa_vl", "vlsbench"),
    analyst=INTERN,
    target=INTERN,
    judge=INTERN,
    limits=Limits(concurrency=32),
)
