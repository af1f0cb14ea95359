"""M-RoPE positions of a prompt (Qwen2-VL, section 2.1): text counts on in all components, a picture spans a grid."""

from collections.abc import Sequence

import numpy as np


def mrope_positions(is_image_T: np.ndarray, grids: Sequence[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Positions [T, X] int32 (time, height, width) of one row without padding, and delta.

    `is_image_T` marks visual tokens; `grids` holds (height, width) of each picture in visual tokens, in order of appearance. A
    still picture takes one time step; the token after it stands one past the largest position so far. Answer token `o` stands at
    T + delta + o in all three components. Raises ValueError when the marks and the grids disagree.
    """
    is_image_T = np.asarray(is_image_T, bool)
    position_TX = np.empty((len(is_image_T), 3), np.int32)
    t, start = 0, 0
    for height, width in [*grids, (0, 0)]:
        run = int(np.argmax(is_image_T[t:])) if is_image_T[t:].any() else len(is_image_T) - t  # text up to the next picture
        position_TX[t : t + run] = start + np.arange(run)[:, None]
        t, start = t + run, start + run
        if not is_image_T[t : t + height * width].all() or t + height * width > len(is_image_T):
            raise ValueError(f"a picture of {height} x {width} visual tokens does not fit the marked tokens at {t}")
        offset = np.indices((1, height, width)).reshape(3, -1).T
        position_TX[t : t + height * width] = start + offset
        t, start = t + height * width, start + max(height, width)
    if t != len(is_image_T):
        raise ValueError(f"{len(grids)} pictures given, but more visual tokens are marked from {t} on")
    return position_TX, start - t
