"""Writes tests/golden/qwen_vl.npz with transformers and torch; the suite itself needs neither.

    python tests/golden/make_qwen.py

Each case is a tiny Qwen2.5-VL or Qwen3-VL: its config.json, the names and shapes of its tensors on disk, a batch in this project's layout
(DESIGN section 5), and what transformers computes for it, block by block. Weights are not stored: `values` makes them again
from each tensor's name.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / "qwen_vl.npz"
IMAGE_TOKEN, VOCAB = 90, 96
# A row is a list of text runs (length) and pictures (height, width in visual tokens).
ROWS = [
    [9, (3, 5), 4],  # windows over the right and lower edge are not full
    [11],
    [2, (2, 2), 3, (5, 1), 2],  # two pictures
    [(4, 2), 1, (1, 1), 12],  # a picture first
]


def config(seed: int, tied: bool, heads=4, kv_heads=2, head_dim=16, sections=(2, 3, 3), layers=3, **family) -> dict:
    """The config.json of one tiny model: `window` makes a Qwen2.5-VL, `deepstack` a Qwen3-VL."""
    text = dict(
        hidden_size=64, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=layers, head_dim=head_dim,
        intermediate_size=72, vocab_size=VOCAB, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)},
    )  # fmt: skip
    vision = dict(depth=3, num_heads=2, intermediate_size=56, temporal_patch_size=2, spatial_merge_size=2, in_channels=3)
    return dict(seed=seed, tie_word_embeddings=tied) | _family(text, vision, **family) | dict(
        image_token_id=IMAGE_TOKEN, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip


def _family(text: dict, vision: dict, patch=14, window=0, full=(1,), side=5, deepstack=(0, 2)) -> dict:
    vision |= dict(hidden_size=40, patch_size=patch, out_hidden_size=text["hidden_size"])
    if window:
        text["hidden_size"] = vision["out_hidden_size"] = text["num_attention_heads"] * text.pop("head_dim")
        vision |= dict(window_size=window, fullatt_block_indexes=list(full))
        return dict(model_type="qwen2_5_vl", text_config=text, vision_config=vision)
    text["rope_parameters"] |= {"mrope_interleaved": True}
    vision |= dict(num_position_embeddings=side**2, deepstack_visual_indexes=list(deepstack))
    return dict(model_type="qwen3_vl", text_config=text, vision_config=vision)


CASES = {
    "tied": config(1, tied=True, window=56),
    "untied": config(2, tied=False, heads=6, kv_heads=3, head_dim=8, sections=(1, 1, 2), layers=2, patch=4, window=32, full=(0, 2)),
    "qwen3": config(3, tied=True, heads=4, kv_heads=2, head_dim=24, sections=(6, 3, 3), patch=4),
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

    The order of windows is transformers' own (get_vision_window_index); a window's slots are its positions in raster order. Without
    windows the slots are the processor's order.
    """
    import torch
    from transformers.vision_utils import get_vision_window_index

    merge, slot = 2, np.arange(4 * height * width, dtype=np.int32).reshape(-1, 4)
    unit_yx = np.indices((height, width)).reshape(2, -1).T
    yx = np.stack([merge * unit_yx + place for place in ((0, 0), (0, 1), (1, 0), (1, 1))], axis=1)
    if "window_size" not in vision:
        return slot.reshape(-1), yx.reshape(-1, 2), slot.size
    side = vision["window_size"] // vision["patch_size"] // 2
    grid = torch.tensor([[1, height * merge, width * merge]])
    order, ends = (x.numpy() for x in get_vision_window_index(grid, merge, vision["window_size"], vision["patch_size"]))
    for w, (a, b) in enumerate(zip(ends[:-1] // 4, ends[1:] // 4, strict=True)):
        for unit in order[a:b]:
            y, x = unit_yx[unit]
            slot[unit] = ((w * side + y % side) * side + x % side) * 4 + np.arange(4)
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
            slots += [(base + s, p, place, grids[-1][1:], image) for s, p, place in zip(slot, patches, yx, strict=True)]
            base, image = base + count, image + 1
        row_tokens.append(tokens)
        row_visual.append(visual)
        row_slots.append((slots, base))
    P, T, slots = len(rows), max(map(len, row_tokens)) + 2, max(max(base for _, base in row_slots), 16)
    out = {
        "tokens_PT": np.zeros((P, T), np.int32),
        "visual_PT": np.full((P, T), -1, np.int32),
        "length_P": np.array([len(t) for t in row_tokens], np.int32),
        "patches_PIB": np.zeros((P, slots, width), np.int8),
        "yx_PI2": np.zeros((P, slots, 2), np.int32),
        "grid_PI2": np.zeros((P, slots, 2), np.int32),
        "image_PI": np.full((P, slots), -1, np.int32),
        "pixels": np.concatenate(pixels),
        "grids": np.array(grids),
    }
    for p in range(P):
        out["tokens_PT"][p, : len(row_tokens[p])] = row_tokens[p]
        out["visual_PT"][p, : len(row_visual[p])] = row_visual[p]
        for slot, *values in row_slots[p][0]:
            for key, value in zip(("patches_PIB", "yx_PI2", "grid_PI2", "image_PI"), values, strict=True):
                out[key][p, slot] = value
    return out


def torch_model(raw: dict):
    """transformers' model with the weights of `values`, its config.json as written, and the shapes of its tensors on disk."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    kind = AutoConfig.for_model(**raw)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        AutoModelForImageTextToText.from_config(kind).save_pretrained(path)
        shapes = {name: list(tensor.shape) for name, tensor in load_file(path / "model.safetensors").items()}
        written = json.loads((path / "config.json").read_text()) | {"seed": raw["seed"]}
        write_checkpoint(path, written, shapes)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    return model, written, shapes


def torch_inputs(made: dict[str, np.ndarray]) -> dict:
    """Arguments of transformers' forward and generate, right-padded. mm_token_type_ids are needed: without them positions are plain."""
    import torch

    tokens = torch.tensor(made["tokens_PT"], dtype=torch.long)
    mask = (torch.arange(tokens.shape[1])[None] < torch.tensor(made["length_P"])[:, None]).long()
    return dict(
        input_ids=tokens, attention_mask=mask, mm_token_type_ids=(tokens == IMAGE_TOKEN).int(),
        image_grid_thw=torch.tensor(made["grids"]), pixel_values=torch.tensor(made["pixels"], dtype=torch.float32) / 64,
    )  # fmt: skip


def reference(raw: dict, rows: list[list]) -> dict[str, np.ndarray]:
    """Everything that the test compares with, from transformers in float32."""
    import torch

    model, written, shapes = torch_model(raw)
    made = batch(raw, rows)
    blocks: dict[str, list[np.ndarray]] = {"vision": [], "text": []}
    for module in model.model.visual.blocks:
        module.register_forward_hook(lambda module, args, out: blocks["vision"].append(out.numpy()))
    text = model.model.language_model
    for module in (*text.layers[1:], text.norm):  # what goes in: a layer's output with DeepStack added
        module.register_forward_pre_hook(lambda module, args: blocks["text"].append(args[0].numpy()))
    inputs = torch_inputs(made)
    with torch.no_grad():
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        position, delta = model.model.get_rope_index(**{name: inputs[name] for name in names})
        made["logits"] = model(**inputs, position_ids=position).logits.numpy()
    made["position_PTX"] = position.permute(1, 2, 0).numpy().astype(np.int32)
    made["delta_P"] = delta[:, 0].numpy().astype(np.int32)
    made["vision_blocks"] = np.stack(blocks["vision"])  # [blocks, filled slots of all rows, width]
    made["text_blocks"] = np.stack(blocks["text"])  # [L, P, T, D]
    made["config"], made["shapes"] = np.array(json.dumps(written)), np.array(json.dumps(shapes))
    del made["pixels"], made["grids"]
    return made


def main() -> None:
    arrays = {f"{case}/{key}": value for case, raw in CASES.items() for key, value in reference(raw, ROWS).items()}
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
