"""Training data for a toy rewriter, from the toy world (pgjax/rewriter/toy.py): start `python -m pgjax.rewriter.toy_server` first.

Half of the rows are benign instead of a tenth: they are the others' twins, and from a tenth a tiny model would learn to rewrite always.
"""

from pgjax.rewriter.config import Synthesis

SERVER = "http://127.0.0.1:8100/v1"

synthesis = Synthesis(
    name="toy_synthesis",
    analyst=f"toy-analyst@{SERVER}",
    target=f"toy-target@{SERVER}",
    judge=f"toy-judge@{SERVER}",
    limit=1200,
    benign_share=0.5,
    held_out=0.1,
)
