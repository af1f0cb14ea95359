"""The parity table of docs/models.md: tiny random models of both families against transformers, in float32 and bfloat16.

python benchmarks/parity.py [--json]        (needs the extra `parity`)
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
COLUMNS = ("parameters", "logits", "logits, left-padded", "gradients", "greedy", "logits, bfloat16", "theirs, bfloat16", "largest logit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from parity import compare
    from test_parity import CONFIGS

    rows = [{"model": f"{raw['model_type']}, {name}"} | {k: float(v) for k, v in compare(raw).items()} for name, raw in CONFIGS.items()]
    if args.json:
        print(json.dumps(rows))
        return
    print("| model |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for row in rows:
        cells = [f"{row[c]:,.0f}" if c == "parameters" else f"{row[c]:.0%}" if c == "greedy" else f"{row[c]:.1e}" for c in COLUMNS[:-1]]
        print(f"| {row['model']} |", " | ".join(cells), f"| {row[COLUMNS[-1]]:.1f} |")


if __name__ == "__main__":
    main()
