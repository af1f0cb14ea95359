"""One record for every source (`Example`), and the arrays that programs read (`PromptBatch`, `Gold`).

Axes (DESIGN section 2): P prompts, T prompt tokens, I image patches, X M-RoPE components,
N taxonomy nodes, K ids that an answer may name (the automaton's id grid).
"""

from dataclasses import dataclass
from typing import Literal

import jax
from flax import struct

Label = Literal["safe", "unsafe", "unknown", "absent"]
Modality = Literal["text", "text_image", "image"]
CategoryKind = Literal["none", "node", "ood", "unknown"]

# Array codes are positions in these tuples, on host and device alike.
LABELS: tuple[Label, ...] = ("safe", "unsafe", "unknown", "absent")
MODALITIES: tuple[Modality, ...] = ("text", "text_image", "image")
CATEGORIES: tuple[CategoryKind, ...] = ("none", "node", "ood", "unknown")
SAFE, UNSAFE, UNKNOWN, ABSENT = range(4)
TEXT, TEXT_IMAGE, IMAGE = range(3)
CATEGORY_NONE, CATEGORY_NODE, CATEGORY_OOD, CATEGORY_UNKNOWN = range(4)

EVALUATION_ONLY = frozenset({"mossbench"})  # sources whose licence forbids training; the pipeline refuses to train on them


@dataclass(frozen=True)
class Example:
    """One conversation with what is known of it. Unknown stays unknown; nothing is invented.

    `node` and `accepted` are canonical ids of the taxonomy ("C9S2"), never the ids that a prompt happens to show.
    `category` says what is known before any hiding: "none" (safe), "node", "ood" (a risk that the taxonomy lacks), "unknown".
    """

    id: str
    group: str  # rows of one group never part over splits
    source: str
    modality: Modality
    request: str | None
    response: str | None
    images: tuple[bytes, ...]  # original file bytes
    request_label: Label
    response_label: Label
    category: CategoryKind
    node: str | None = None
    accepted: tuple[str, ...] = ()  # further nodes that count as right
    name: str | None = None  # the category's name, for display and naming scores
    turns: tuple[tuple[str, str], ...] = ()  # earlier (role, text) turns
    split: str = "train"


@struct.dataclass
class PromptBatch:
    """Prompts of one bucket (T, I). A row without an image has `image_PI` -1 throughout: the pytree never changes shape.

    Patches are window-major: each window fills its block of `VisionConfig.window_patches` slots, edge windows leave slots
    empty; four neighbouring slots (merge x merge patches) make one visual token.
    """

    tokens_PT: jax.Array  # int32, right-padded
    length_P: jax.Array  # int32
    position_PTX: jax.Array  # int32, M-RoPE time, height, width
    delta_P: jax.Array  # int32: answer token `o` stands at position length_P + delta_P + o
    visual_PT: jax.Array  # int32: which merged token of this row (slot // 4) stands here; -1 for text
    patches_PIB: jax.Array  # float32, normalised pixels of a patch, flattened as channel, frame, row, column
    patch_yx_PI2: jax.Array  # int32, patch row and column in its image
    grid_PI2: jax.Array  # int32, patches per column and per row of its image; zeros in an empty slot
    image_PI: jax.Array  # int32: number of the image in this row; -1 for an empty slot
    id_P: jax.Array  # uint32, names the prompt for randomness


@struct.dataclass
class Gold:
    """What the reward and the metrics compare with, one entry per prompt; codes as in LABELS, MODALITIES, CATEGORIES.

    `category_P` is the kind after hiding: a hidden gold node is CATEGORY_OOD, with `node_P` still its bank row.
    """

    modality_P: jax.Array  # int32
    request_P: jax.Array  # int32
    response_P: jax.Array  # int32
    category_P: jax.Array  # int32
    node_P: jax.Array  # int32 canonical node, -1 when none
    node_of_id_PK: jax.Array  # int32: canonical node that id k stands for in this prompt's policy, -1 not shown
    accepted_PN: jax.Array  # bool: canonical nodes that count as right, `node_P` among them
    never_seen_P: jax.Array  # bool: OOD of the second kind (occurs nowhere in training)
    weight_P: jax.Array  # float32, 0 for rows that only pad the batch
