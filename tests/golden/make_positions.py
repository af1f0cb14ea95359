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


def rope_index(is_image_T: np.ndarray, grids: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Positions [T, 3] and delta of transformers' Qwen2.5-VL, whose grids count patches (2 x 2 to a visual token)."""
    import torch
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    model = SimpleNamespace(config=config, get_vision_position_ids=lambda *a, **k: Qwen2_5_VLModel.get_vision_position_ids(None, *a, **k))
    marks = torch.tensor(is_image_T)[None]
    position, delta = Qwen2_5_VLModel.get_rope_index(
        model,
        torch.where(marks, IMAGE, TEXT),
        mm_token_type_ids=marks.int(),
        image_grid_thw=torch.tensor([(1, 2 * h, 2 * w) for h, w in grids]) if grids else None,
        attention_mask=torch.ones_like(marks),
    )
    return position[:, 0].numpy().T, int(delta)


def window_index(grid: tuple[int, int], window: int) -> np.ndarray:
    """Visual tokens (raster numbers) in the order of transformers' windows; `grid` in patches of 14, `window` in pixels."""
    import torch
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(torch.tensor([(1, *grid)]), 2, window, 14)[0].numpy()


WINDOWED = [((2 * h, 2 * w), window) for h, w in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 3), (7, 9), (8, 8)) for window in (56, 112)]


def main() -> None:
    arrays = {}
    for n, (is_image_T, grids) in enumerate(rows(24)):
        position_TX, delta = rope_index(is_image_T, grids)
        arrays |= {f"row{n}_is_image": is_image_T, f"row{n}_grids": np.array(grids, np.int32).reshape(-1, 2)}
        arrays |= {f"row{n}_position": position_TX.astype(np.int32), f"row{n}_delta": np.int32(delta)}
    arrays |= {f"window{n}": window_index(*case).astype(np.int32) for n, case in enumerate(WINDOWED)}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
