"""Writes positions.npz: M-RoPE positions and window order as transformers computes them, for the suite to run without torch.

Use: python -m tests.golden.make_positions
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

IMAGE, TEXT = 7, 1  # token ids; any will do
FILE = Path(__file__).with_name("positions.npz")


def rows(count: int, seed: int = 0) -> list[tuple[np.ndarray, list[tuple[int, int]]]]:
    """Random prompts of 0 to 3 pictures: (is_image_T, grids in visual tokens). Pictures stand apart, as their markers make them."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        grids = [(int(h), int(w)) for h, w in rng.integers(1, 9, (rng.integers(0, 4), 2))]
        parts = [np.zeros(rng.integers(0, 12), bool)]
        for height, width in grids:
            parts += [np.ones(height * width, bool), np.zeros(rng.integers(1, 12), bool)]
        if sum(map(len, parts)) == 0:
            parts = [np.zeros(3, bool)]
        out.append((np.concatenate(parts), grids))
    return out


def rope_index(tokens_1T, types_1T, grids, family: str = "qwen2_5_vl") -> tuple[np.ndarray, int]:
    """Positions [T, 3] and delta of transformers' Qwen-VL models, from tensors; `grids` (or None) count patches, 2 x 2 to a visual token.

    Without `types_1T` (its mm_token_type_ids) Qwen2.5-VL would silently count on.
    """
    import torch
    from transformers import Qwen2_5_VLModel, Qwen3VLModel

    kind = {"qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}[family]
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    model = SimpleNamespace(config=config, get_vision_position_ids=lambda *a, **k: kind.get_vision_position_ids(None, *a, **k))
    mask = torch.ones_like(tokens_1T)
    position, delta = kind.get_rope_index(model, tokens_1T, mm_token_type_ids=types_1T, image_grid_thw=grids, attention_mask=mask)
    return position[:, 0].numpy().T, int(delta)


def window_index(grid: tuple[int, int], window: int) -> np.ndarray:
    """Visual tokens (raster numbers) in the order of transformers' windows; `grid` in patches of 14, `window` in pixels."""
    import torch
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(torch.tensor([(1, *grid)]), 2, window, 14)[0].numpy()


WINDOWED = [((2 * h, 2 * w), window) for h, w in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 3), (7, 9), (8, 8)) for window in (56, 112)]


def main() -> None:
    import torch

    arrays = {}
    for n, (is_image_T, grids) in enumerate(rows(24)):
        marks = torch.tensor(is_image_T)[None]
        patches = torch.tensor([(1, 2 * h, 2 * w) for h, w in grids]) if grids else None
        position_TX, delta = rope_index(torch.where(marks, IMAGE, TEXT), marks.int(), patches)
        arrays |= {f"row{n}_is_image": is_image_T, f"row{n}_grids": np.array(grids, np.int32).reshape(-1, 2)}
        arrays |= {f"row{n}_position": position_TX.astype(np.int32), f"row{n}_delta": np.int32(delta)}
    arrays |= {f"window{n}": window_index(*case).astype(np.int32) for n, case in enumerate(WINDOWED)}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
