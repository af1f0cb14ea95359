"""Live comparisons with transformers in torch: logits, gradients of every parameter, greedy answers through the cache."""

import pytest
from golden.make_qwen import CASES, config

CONFIGS = CASES | {
    "windows": config(14, tied=True, kv_heads=4, patch=14, window=112, full=(0, 1)),
    "three groups": config(15, tied=False, heads=6, kv_heads=2, head_dim=16, sections=(4, 2, 2), patch=8, side=7, deepstack=(1,), layers=2),
}


@pytest.mark.drill
@pytest.mark.parity
@pytest.mark.parametrize("case", CONFIGS)
def test_equals_transformers(case):
    pytest.importorskip("torch")
    from parity import compare

    found = compare(CONFIGS[case])
    assert found["logits"] < 2e-5 and found["logits, left-padded"] < 2e-5
    assert found["gradients"] < 1e-5 and found["smallest gradient"] > 1e-6
    assert found["greedy"] == 1
    # bfloat16 rounds alike: we are no further from the float32 truth than transformers is, by much.
    assert found["logits, bfloat16"] < 2 * found["theirs, bfloat16"] and found["largest logit"] > 1
