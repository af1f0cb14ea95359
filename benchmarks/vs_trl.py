"""One GRPO step of pgjax beside one of TRL's GRPOTrainer, phase by phase: the same Qwen2.5-VL, weights, prompts, lengths, loss, cores.

    python benchmarks/vs_trl.py [--size tiny|small] [--policy 480] [--steps 20] [--threads 2] [--json]        (needs the extra `trl`)

* Each side runs in a process of its own that is held to the same cores, in float32; medians over the steps after the first two.
* TRL has whichever is fastest of eager and SDPA attention, of one torch thread and as many as there are cores, and no gradient
  checkpointing. pgjax has one CPU device with as many threads as cores, and keeps of a layer what attention gives alone.
* Every answer has all its tokens: stop and special tokens are suppressed for TRL, and stop nothing in pgjax.
* A prompt is a picture and a question, behind `--policy` tokens of a policy (0: none), which all of a group's answers share.
* Both answer each prompt G times, reward the share of even token ids, and take one AdamW step on the same loss
  (k3 penalty 0.01, means of answers). "logprobs" are the reference's, for the policy's own are those of the update; "other" is
  reading pictures and texts, reward and advantages.
* pgjax then scores TRL's answers of its first step: the logprobs must agree.

On a CPU, transformers' generate is a Python loop over tokens whose overhead an accelerator would hide in part, or make worse: the
ratio of that phase says little about accelerators.
"""

import argparse
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

WARM_UP, TRIAL = 2, 2  # steps that do not count; steps for which each of TRL's settings is tried
PHASES = ("generate", "logprobs", "update", "other", "whole step")
PHASE_OF = {"encode": "generate", "prefill": "generate", "decode": "generate", "score": "logprobs", "reward": "other", "load": "other"}
SIDE = 56  # pixels of a picture: 16 patches, 4 visual tokens
QUESTIONS = ("Is the parcel in this picture ready for the tram?", "May I lend the kite shown here to a neighbour?")


class Size(NamedTuple):
    text: dict
    vision: dict
    group: int  # G
    answer: int  # R


SIZES = {
    "tiny": Size(
        dict(width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128, mrope_section=(2, 3, 3)), dict(width=64, mlp=128), 4, 32
    ),
    "small": Size(
        dict(width=256, layers=5, heads=8, kv_heads=4, head_dim=32, mlp=1024, mrope_section=(4, 6, 6)), dict(width=128, mlp=256), 16, 128
    ),
}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in QUESTIONS]


def texts(tokenizer, policy: int) -> list[str]:
    """The questions, each behind the first `policy` tokens of the policy."""
    from pgjax.taxonomy import full_view, load_taxonomy, render_policy

    taxonomy = load_taxonomy()
    ids = tokenizer(render_policy(taxonomy, full_view(taxonomy, "leaf"), descriptions=True))["input_ids"]
    assert policy <= len(ids), f"the policy has {len(ids)} tokens"
    return [tokenizer.decode(ids[:policy]) + question for question in QUESTIONS]


def make_recipe(size: str, policy: int = 0):
    from pgjax import config

    text, vision, group, answer = SIZES[size]
    tower = config.VisionConfig(depth=2, heads=4, window=SIDE, full_blocks=(1,), min_pixels=SIDE**2, max_pixels=SIDE**2, **vision)
    return config.Recipe(
        name=f"vs_trl {size}",
        model=config.ModelConfig(text=config.TextConfig(vocab=512, **text), vision=tower, compute_dtype="float32", remat="attention"),
        data=config.DataConfig(prompt_tokens=64 + policy, patches=16),
        answer=config.AnswerConfig(max_tokens=answer),
        rollout=config.RolloutConfig(group=group),
        grpo=config.GRPOConfig(
            prompts=len(QUESTIONS),
            mini_prompts=len(QUESTIONS),
            micro_prompts=len(QUESTIONS),
            loss=dataclasses.replace(config.LOSS_PRESETS["grpo"], kl_coef=0.01),
            optimizer=config.OptimizerConfig(learning_rate=1e-5, weight_decay=0.0),
        ),
    )


def write_model(folder: Path, size: str) -> None:
    """Random weights and a tokenizer of its own as a checkpoint that both sides load."""
    import jax

    from pgjax.config import MeshConfig
    from pgjax.export import write_checkpoint
    from pgjax.parallel.mesh import make_mesh
    from pgjax.tokenizer import train_byte_bpe
    from pgjax.train.setup import make_setup

    recipe = make_recipe(size)
    setup = make_setup(recipe.model, make_mesh(MeshConfig(), jax.devices()[:1]))
    write_checkpoint(folder, recipe, setup.init(0), train_byte_bpe(QUESTIONS, recipe.model.text.vocab), "float32")


def ours(folder: Path, size: str, policy: int, steps: int, threads: int) -> dict:
    """Seconds of pgjax's steps by phase, and how its logprobs of TRL's answers compare."""
    import jax
    import jax.numpy as jnp

    from pgjax import automaton as answers
    from pgjax.config import MeshConfig
    from pgjax.data.arrays import Prompt, prompt_batch
    from pgjax.data.schema import CATEGORY_NONE, SAFE, TEXT_IMAGE, Gold
    from pgjax.generate.law import Law
    from pgjax.generate.score import pack, score
    from pgjax.grpo.programs import Judge, Judged, Programs
    from pgjax.grpo.trainer import grpo_step
    from pgjax.models.sentence_encoder import Embedder
    from pgjax.parallel.mesh import make_mesh, place_rows
    from pgjax.tokenizer import load_tokenizer
    from pgjax.train.materials import cache_dir
    from pgjax.train.setup import make_setup
    from pgjax.train.update import make_optimizer

    recipe, tokenizer = make_recipe(size, policy), load_tokenizer(folder)
    P, G, R, V = len(QUESTIONS), recipe.rollout.group, recipe.answer.max_tokens, recipe.model.text.vocab
    automaton = answers.build(tokenizer, answers.id_grid(1, 1), vocab=V, cache_dir=cache_dir())
    automaton = automaton.replace(stop_V=jnp.zeros_like(automaton.stop_V))
    setup, optimizer = make_setup(recipe.model, make_mesh(MeshConfig(), jax.devices()[:1])), make_optimizer(recipe.grpo.optimizer, steps)
    nothing = Embedder(None, {}, None, "none")
    programs = Programs(recipe, setup, optimizer, automaton, tokenizer, Judge(nothing, None))
    even = jax.jit(lambda tokens_PGR: (tokens_PGR % 2 == 0).mean(-1))  # in place of the reward, which would embed names
    programs.judge = lambda rollout, gold, bank: Judged(None, even(rollout.tokens_PGR), {}, None, None)
    full = lambda value: np.full(P, value, np.int32)  # noqa: E731
    gold = Gold(
        full(TEXT_IMAGE), full(SAFE), full(SAFE), full(CATEGORY_NONE), full(-1), np.zeros((P, len(automaton.ids)), np.int32),
        np.zeros((P, 1), bool), never_seen_P=np.zeros(P, bool), weight_P=np.ones(P, np.float32),
    )  # fmt: skip

    asked = list(zip(texts(tokenizer, policy), pictures(), strict=True))

    def host_batch():
        prompts = []
        for number, (text, picture) in enumerate(asked):
            file = io.BytesIO()
            picture.save(file, "PNG")
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            prompts.append(Prompt(number, prompt, [file.getvalue()]))
        return prompt_batch(prompts, tokenizer, recipe.model.vision, recipe.data.prompt_tokens, recipe.data.patches)

    def timed_step(state, reference, step: int):
        """(state, seconds by phase) of a step of the trainer's, each phase waited for."""
        seconds, began = defaultdict(float), time.perf_counter()
        last = began

        def done(phase, outputs):
            nonlocal last
            jax.block_until_ready(outputs)
            now = time.perf_counter()
            seconds[PHASE_OF.get(phase, phase)] += now - last
            last = now

        loaded = place_rows((host_batch(), gold), programs.mesh)
        done("load", loaded)
        state, metrics = grpo_step(programs, None, recipe, state, reference, step, loaded, done)
        done("update", state)
        assert metrics["response_length/mean"] == R
        return state, dict(seconds) | {"whole step": last - began}

    params = setup.load(folder)
    reference = setup.reference(params)
    state, laps = setup.state(params, optimizer), []
    for step in range(WARM_UP + steps):
        state, seconds = timed_step(state, reference, step)
        laps.append(seconds)

    with np.load(folder / "answers.npz") as file:
        tokens_PGR, theirs_PGR = (file[name].reshape(P, G, R) for name in ("tokens", "logprobs"))
    law = Law(jnp.zeros(V, bool), None, None, R)  # TRL scores over the whole vocabulary

    @jax.jit
    def logprobs(params, batch, tokens_PGR):
        packed = pack(tokens_PGR, jnp.zeros_like(tokens_PGR), jnp.full((P, G), R), G * R)
        return score(setup.model, params, batch, packed, law)[0].reshape(P, G, R)

    gap = np.abs(logprobs(reference, host_batch(), tokens_PGR.astype(np.int32)) - theirs_PGR).max()
    parameters = sum(x.size for x in jax.tree.leaves(reference))
    prompt = int(host_batch().length_P.max())
    return {"laps": laps, "logprob_gap": float(gap), "parameters": parameters, "prompt_tokens": prompt}


def theirs(folder: Path, size: str, policy: int, steps: int, threads: int) -> dict:
    """Seconds of TRL's steps by phase under its fastest setting, that setting, and in answers.npz the first answers with their logprobs."""
    import torch
    from datasets import Dataset
    from transformers import Qwen2_5_VLProcessor, TrainerCallback
    from transformers.processing_utils import ProcessorMixin
    from trl import GRPOConfig, GRPOTrainer

    from pgjax.data.images import image_processor
    from pgjax.tokenizer import CHAT_TEMPLATE, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, load_tokenizer

    recipe, tokenizer = make_recipe(size, policy), load_tokenizer(folder)
    P, G, R, V = len(QUESTIONS), recipe.rollout.group, recipe.answer.max_tokens, recipe.model.text.vocab
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": text}] for text in texts(tokenizer, policy)]
    data = Dataset.from_dict({"prompt": chats, "image": pictures()})

    class Processor(Qwen2_5_VLProcessor):
        """Without videos, for which transformers would need torchvision."""

        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
            names = {"image": IMAGE_PAD, "video": VIDEO_PAD, "vision_start": VISION_START, "vision_end": VISION_END}
            for name, token in names.items():
                setattr(self, f"{name}_token", token)
                setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    class Timed(GRPOTrainer):
        seconds: dict = {}
        first: dict = {}

        def _timed(self, phase, f, args, kwargs):
            began = time.perf_counter()
            out = f(*args, **kwargs)
            self.seconds[phase] += time.perf_counter() - began
            return out

        def _generate_single_turn(self, *args, **kwargs):
            return self._timed("generate", super()._generate_single_turn, args, kwargs)

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            phase = "in update" if torch.is_grad_enabled() else "logprobs"
            return self._timed(phase, super()._get_per_token_logps_and_entropies, args, kwargs)

        def _generate_and_score_completions(self, inputs):
            made = self._timed("experience", super()._generate_and_score_completions, (inputs,), {})
            self.first = self.first or made
            return made

    class Laps(TrainerCallback):
        def __init__(self):
            self.laps, self.trainer, self.began = [], None, 0.0

        def on_step_begin(self, *args, **kwargs):
            self.trainer.seconds, self.began = defaultdict(float), time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            whole, seconds = time.perf_counter() - self.began, self.trainer.seconds
            generate, logprobs, experience = (seconds[name] for name in ("generate", "logprobs", "experience"))
            other = experience - generate - logprobs
            update = whole - experience
            self.laps.append({"generate": generate, "logprobs": logprobs, "update": update, "other": other, "whole step": whole})

    def even_share(completion_ids, **_):
        return [float(np.mean(np.array(ids) % 2 == 0)) for ids in completion_ids]

    def run(attention: str, torch_threads: int, steps: int):
        torch.set_num_threads(torch_threads)
        config = GRPOConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=P * G,
            num_generations=G,
            max_completion_length=R,
            max_steps=WARM_UP + steps,
            learning_rate=recipe.grpo.optimizer.learning_rate,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            beta=recipe.grpo.loss.kl_coef,
            use_bias_correction_kl=False,
            loss_type="grpo",
            num_iterations=1,
            shuffle_dataset=False,
            generation_kwargs={"suppress_tokens": [*tokenizer.all_special_ids, *range(len(tokenizer), V)]},
            model_init_kwargs={"dtype": "float32", "attn_implementation": attention},
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        processor, laps = Processor(image_processor(recipe.model.vision), tokenizer, chat_template=CHAT_TEMPLATE), Laps()
        trainer = Timed(str(folder), even_share, config, data, processing_class=processor, callbacks=[laps])
        laps.trainer = trainer
        trainer.train()
        assert trainer.first["completion_mask"].all() and trainer.first["completion_ids"].shape == (P * G, R)
        return laps.laps, trainer.first

    settings = [(attention, n) for attention in ("eager", "sdpa") for n in sorted({1, threads})]
    trials = [run(*setting, TRIAL)[0] for setting in settings]
    attention, torch_threads = min(zip(trials, settings, strict=True), key=lambda t: medians(t[0])["whole step"])[1]
    laps, first = run(attention, torch_threads, steps)
    np.savez(folder / "answers.npz", tokens=first["completion_ids"], logprobs=first["ref_per_token_logps"])
    return {"laps": trials[0][:1] + laps[1:], "attention": attention, "torch_threads": torch_threads}


def medians(laps: list[dict]) -> dict[str, float]:
    return {phase: statistics.median(lap[phase] for lap in laps[WARM_UP:]) for phase in PHASES}


def measure(size: str, policy: int, steps: int, threads: int) -> tuple[list[dict], dict]:
    """Rows {phase, ours_s, trl_s, ratio}, and what was measured. RuntimeError where the two score the same answers differently."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), size)
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {"JAX_PLATFORMS": "cpu", "NPROC": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        for side in ("theirs", "ours"):
            command = [sys.executable, __file__, "--side", side, "--folder", folder]
            command += ["--size", size, "--policy", str(policy), "--steps", str(steps), "--threads", str(threads)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
            found[side] = json.loads((Path(folder) / f"{side}.json").read_text())
    mine, other = found["ours"].pop("laps"), found["theirs"].pop("laps")
    notes = found["ours"] | found["theirs"]
    if notes["logprob_gap"] > 1e-4:
        raise RuntimeError(f"the sides score the same answers differently, by {notes['logprob_gap']:.1e}: they do not run the same model")
    pairs = {phase: (medians(mine)[phase], medians(other)[phase]) for phase in PHASES}
    pairs["first step, with compilation"] = mine[0]["whole step"], other[0]["whole step"]
    return [{"phase": phase, "ours_s": a, "trl_s": b, "ratio": b / a} for phase, (a, b) in pairs.items()], notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--policy", type=int, default=0, help="tokens of it in front of each question")
    parser.add_argument("--steps", type=int, default=20, help="that count, after two that do not")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores of each side")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # a side's own process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        found = {"ours": ours, "theirs": theirs}[args.side](args.folder, args.size, args.policy, args.steps, args.threads)
        (args.folder / f"{args.side}.json").write_text(json.dumps(found))
        return
    from timing import show

    rows, notes = measure(args.size, args.policy, args.steps, args.threads)
    size = SIZES[args.size]
    title = (
        f"A GRPO step of pgjax and of TRL ({args.size}, {notes['parameters'] / 1e6:.2f}M parameters, float32, {args.threads} cores): "
        f"{len(QUESTIONS)} prompts of at most {notes['prompt_tokens']} tokens with a picture each, {size.group} answers of {size.answer} "
        f"tokens to each; medians of {args.steps} steps, seconds. TRL has {notes['attention']} attention and {notes['torch_threads']} "
        f"torch threads. Logprobs of the same answers differ by at most {notes['logprob_gap']:.1e}. TRL generates in a Python loop over "
        "tokens, whose cost on a CPU says little about accelerators."
    )
    show(rows, args.json, title)


if __name__ == "__main__":
    main()
