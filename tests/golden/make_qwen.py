"""Writes tests/golden/qwen2_5_vl.npz with transformers and torch; the suite itself needs neither.

    python tests/golden/make_qwen.py

Each case is a tiny Qwen2.5-VL: its config.json, the names and shapes of its tensors on disk, a batch in this project's layout
(DESIGN section 5), and what transformers computes for it, block by block. Weights are not stored: `values` makes them again
from each tensor's name.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / "qwen2_5_vl.npz"
IMAGE_TOKEN, VOCAB = 90, 96
# A row is a list of text runs (length) and pictures (height, width in visual tokens).
ROWS = [
    [9, (3, 5), 4],  # windows over the right and lower edge are not full
    [11],
    [2, (2, 2), 3, (5, 1), 2],  # two pictures
    [(4, 2), 1, (1, 1), 12],  # a picture first
]


def config(seed: int, tied: bool, heads=4, kv_heads=2, head_dim=16, sections=(2, 3, 3), layers=3, patch=14, window=56, full=(1,)) -> dict:
    """The config.json of one tiny model."""
    text = dict(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=layers,
        intermediate_size=72, vocab_size=VOCAB, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)},
    )  # fmt: skip
    vision = dict(
        depth=3, hidden_size=40, num_heads=2, intermediate_size=56, out_hidden_size=heads * head_dim, patch_size=patch,
        window_size=window, fullatt_block_indexes=list(full), temporal_patch_size=2, spatial_merge_size=2, in_channels=3,
    )  # fmt: skip
    return dict(
        model_type="qwen2_5_vl", seed=seed, tie_word_embeddings=tied, text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN,
        video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip


CASES = {
    "tied": config(1, tied=True),
    "untied": config(2, tied=False, heads=6, kv_heads=3, head_dim=8, sections=(1, 1, 2), layers=2, patch=4, window=32, full=(0, 2)),
}


def values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Uniform float32 weights of unit variance over the fan-in, made from the tensor's name. PCG64's raw stream never changes."""
    raw = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(int(np.prod(shape)))
    noise = ((raw >> 40).astype(np.float32) / 2**24 - 0.5).reshape(shape) * np.float32(np.sqrt(12))
    if len(shape) == 1:
        return noise * np.float32(0.2) + np.float32("norm" in name or "ln_q" in name)
    return noise / np.float32(np.sqrt(np.prod(shape[1:])))


def write_checkpoint(path: Path, raw: dict, shapes: dict[str, list[int]]) -> None:
    """A Hugging Face directory with the weights of `values`."""
    (path / "config.json").write_text(json.dumps(raw))
    save_file({n: values(n, tuple(s), raw["seed"]) for n, s in shapes.items()}, path / "model.safetensors", metadata={"format": "pt"})


def arrange(height: int, width: int, vision: dict):
    """Slots of one picture: for every patch in the processor's order its slot, row and column; and the number of slots.

    The order of windows is transformers' own (get_vision_window_index); a window's slots are its positions in raster order.
    """
    import torch
    from transformers.vision_utils import get_vision_window_index

    merge, side = 2, vision["window_size"] // vision["patch_size"] // 2
    grid = torch.tensor([[1, height * merge, width * merge]])
    order, ends = (x.numpy() for x in get_vision_window_index(grid, merge, vision["window_size"], vision["patch_size"]))
    slot, yx = np.zeros((height * width, 4), np.int32), np.zeros((height * width, 4, 2), np.int32)
    for w, (a, b) in enumerate(zip(ends[:-1] // 4, ends[1:] // 4, strict=True)):
        for unit in order[a:b]:
            y, x = divmod(int(unit), width)
            slot[unit] = ((w * side + y % side) * side + x % side) * 4 + np.arange(4)
            yx[unit] = [(merge * y + i, merge * x + j) for i in range(2) for j in range(2)]
    return slot.reshape(-1), yx.reshape(-1, 2), (len(ends) - 1) * (2 * side) ** 2


def batch(raw: dict, rows: list[list]) -> dict[str, np.ndarray]:
    """The rows as padded arrays, and `pixels` with `grids` in the processor's order for transformers."""
    vision, rng = raw["vision_config"], np.random.default_rng(raw["seed"])
    width = 3 * 2 * vision["patch_size"] ** 2
    pixels, grids, row_slots, row_visual, row_tokens = [], [], [], [], []
    for row in rows:
        tokens, visual, slots, base, image = [], [], [], 0, 0
        for part in row:
            if isinstance(part, int):
                tokens += rng.integers(0, IMAGE_TOKEN, part).tolist()
                visual += [-1] * part
                continue
            slot, yx, count = arrange(*part, vision)
            patches = rng.integers(-127, 128, (len(slot), width), np.int8)  # of 64: small to store, exact in float32
            pixels.append(patches)
            grids.append([1, 2 * part[0], 2 * part[1]])
            tokens += [IMAGE_TOKEN] * (len(slot) // 4)
            visual += ((base + slot[::4]) // 4).tolist()
            slots += [(base + s, p, place, image) for s, p, place in zip(slot, patches, yx, strict=True)]
            base, image = base + count, image + 1
        row_tokens.append(tokens)
        row_visual.append(visual)
        row_slots.append((slots, base))
    P, T, slots = len(rows), max(map(len, row_tokens)) + 2, max(base for _, base in row_slots)
    out = {
        "tokens_PT": np.zeros((P, T), np.int32),
        "visual_PT": np.full((P, T), -1, np.int32),
        "length_P": np.array([len(t) for t in row_tokens], np.int32),
        "patches_PIB": np.zeros((P, slots, width), np.int8),
        "yx_PI2": np.zeros((P, slots, 2), np.int32),
        "image_PI": np.full((P, slots), -1, np.int32),
        "pixels": np.concatenate(pixels),
        "grids": np.array(grids),
    }
    for p in range(P):
        out["tokens_PT"][p, : len(row_tokens[p])] = row_tokens[p]
        out["visual_PT"][p, : len(row_visual[p])] = row_visual[p]
        for slot, patch, place, image in row_slots[p][0]:
            out["patches_PIB"][p, slot], out["yx_PI2"][p, slot], out["image_PI"][p, slot] = patch, place, image
    return out


def reference(raw: dict, rows: list[list]) -> dict[str, np.ndarray]:
    """Everything that the test compares with, from transformers in float32."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**raw)).save_pretrained(path)
        shapes = {name: list(tensor.shape) for name, tensor in load_file(path / "model.safetensors").items()}
        written = (path / "config.json").read_text()  # as transformers writes it
        write_checkpoint(path, json.loads(written) | {"seed": raw["seed"]}, shapes)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    made = batch(raw, rows)
    blocks: dict[str, list[np.ndarray]] = {"vision": [], "text": []}

    def keep(kind):
        return lambda module, args, out: blocks[kind].append((out[0] if isinstance(out, tuple) else out).numpy())

    for kind, modules in (("vision", model.model.visual.blocks), ("text", model.model.language_model.layers)):
        for module in modules:
            module.register_forward_hook(keep(kind))
    tokens = torch.tensor(made["tokens_PT"], dtype=torch.long)
    mask = torch.arange(tokens.shape[1])[None] < torch.tensor(made["length_P"])[:, None]
    types, grids = (tokens == IMAGE_TOKEN).int(), torch.tensor(made["grids"])
    with torch.no_grad():
        position, delta = model.model.get_rope_index(tokens, types, grids, attention_mask=mask.long())
        out = model(
            input_ids=tokens, attention_mask=mask.long(), position_ids=position, mm_token_type_ids=types, image_grid_thw=grids,
            pixel_values=torch.tensor(made["pixels"], dtype=torch.float32) / 64,
        )  # fmt: skip
    made["position_PTX"] = position.permute(1, 2, 0).numpy().astype(np.int32)
    made["delta_P"] = delta[:, 0].numpy().astype(np.int32)
    made["vision_blocks"] = np.stack(blocks["vision"])  # [blocks, filled slots of all rows, width]
    made["text_blocks"] = np.stack(blocks["text"])  # [L, P, T, D]
    made["logits"] = out.logits.numpy()
    made["config"] = np.array(json.dumps(json.loads(written) | {"seed": raw["seed"]}))
    made["shapes"] = np.array(json.dumps(shapes))
    del made["pixels"], made["grids"]
    return made


def main() -> None:
    arrays = {f"{case}/{key}": value for case, raw in CASES.items() for key, value in reference(raw, ROWS).items()}
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
