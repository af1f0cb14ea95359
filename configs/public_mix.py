"""The toy's model on public data: texts of two sets with both labels, and typographic pictures (docs/results.md).

`pgjax train public_mix --data.root DIR`, where DIR holds openai_moderation, surge_toxicity, figstep and mossbench (the last is for
evaluation only). Not a guard: a model of about a million parameters that has never seen other language.
"""

from dataclasses import replace
from pathlib import Path

from pgjax.config import MeshConfig, OODConfig
from pgjax.recipes import load_recipe

toy = load_recipe(str(Path(__file__).with_name("toy.py")))

recipe = replace(
    toy,
    name="public_mix",
    model=replace(toy.model, text=replace(toy.model.text, vocab=3072)),
    tokenizer_vocab=3072,
    mesh=MeshConfig(data=2, fsdp=1, tensor=1),
    devices=2,  # keeps two cores busier than one device does
    data=replace(
        toy.data,
        name="public_mix",
        prompt_tokens=320,
        patches=96,  # a picture of any usual shape in windows that it does not fill
        max_pixels=112 * 112,  # at most 64 patches, 16 visual tokens; a line of a FigStep title is then 11 pixels high
        train_examples=4096,  # more than there are, as eval_examples
        eval_examples=4096,
        ood=OODConfig(share=0.25, keep=(2, 3)),
    ),
    warm_up=replace(toy.warm_up, steps=240, label_share=0.5, optimizer=replace(toy.warm_up.optimizer, decay_updates=0)),
    grpo=replace(toy.grpo, steps=200, prompts=16, mini_prompts=16, micro_prompts=16, validate_every=100),
)
