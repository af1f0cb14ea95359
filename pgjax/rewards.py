"""The rule reward as an array program (PAPERS A8): format gate x (request + response + category), at most 3 for a right unsafe answer.

Axes: P prompts, G samples of a group, K ids that an answer may name, N taxonomy nodes, S name + synonyms of the gold node.

**Terms.** An answer out of format earns 0. In format:

* request: 1 for the right label, 2 for an image alone, which has no response line.
* response: 1 for the right label; an image alone has none.
* category: not looked at when everything is safe in the gold labels or in the answer ("early end"). Else
  - gold in the policy: 1 for its id, 0.5 for another id, 0 for a free name;
  - gold outside the policy (OOD): 0 for an id, 0.5 for a free name and up to 0.5 more by its similarity to the gold node's phrases,
    max(0, (largest - tmax) / (1 - tmax) / 2, (mean - tmean) / (1 - tmean) / 2).

**Unknown and absent gold** (both variants; our choice, the published data has none). A term whose gold is unknown is 0 for every sample of
the group. With no response to judge (ABSENT, not an image alone) the right response line is safe. The gold labels end the evaluation early
only when both are *known* to be safe: with an unknown one among them, a known category still counts. The answer's own labels are always
known, so an all-safe answer ends it whatever the gold. A row known to have no category (CATEGORY_NONE) beside an unknown label has nothing
that a category could be right about: 0.

**Variant `published`** is the released code, quirks included:

* An image's answer has no response label, so a safe one is not "all safe": an OOD image answered safe earns 0.5 for its category.
* An image's gold response label is as stored, Gold.response_P ABSENT for "" and SAFE for "safe". With "" the gold does not end the
  evaluation, and its category "" reads as OOD without a name: a safe image answered safe earns 2.5, not 2.
* A category of None in other spacing, or of spaces alone, is a free name (spaces without a bonus).
* Any well-formed id counts as one of the policy: 0.5 even if this prompt does not list it.
* Only the gold id is right; `accepted_PN` is ignored.

**Variant `strict`** (default of new recipes) differs in these points, each our choice:

1. An image answered safe is an all-safe answer: its category earns 0, so a missed OOD image earns nothing.
2. A safe image always totals 2 at most, however its response label is stored; an image's response label is never read.
3. None in other spacing and an empty category are format failures: 0 in all.
4. An id that this prompt's policy does not list earns 0 for its category, whatever it would mean elsewhere.
5. The ids of all `accepted_PN` nodes are right (1), also where the gold node itself is outside the policy.
6. CATEGORY_NONE never earns a category term (published reads it as OOD without a name).

Open in both: a listed but wrong id earns 0.5; a free name earns its 0.5 by being one, also when it spells ids ("C5S1, C9S1"); nothing is
charged for length.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pgjax.automaton import EMPTY, ID, NAME, NONE_LIKE, UNLISTED, Verdict
from pgjax.data.schema import ABSENT, CATEGORY_NODE, CATEGORY_NONE, CATEGORY_OOD, IMAGE, SAFE, UNKNOWN, UNSAFE, Gold

Variant = Literal["published", "strict"]


def reward(
    verdict: Verdict,
    gold: Gold,
    similarity_PGS: jax.Array,
    valid_PS: jax.Array,
    max_threshold: float,
    mean_threshold: float,
    variant: Variant,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Rewards float32 [P, G] and their terms; pure, jittable with `variant` static.

    `verdict` has fields [P, G]; `similarity_PGS` compares each answer's free name with the phrases of the gold node, of which `valid_PS`
    count (none: no bonus). Only answers with a free name at OOD gold need real values there. Thresholds lie below 1.

    Terms, all float32 [P, G] and 0 where the format fails: `format` (0 or 1), `request`, `response`, `category` (bonus included): the
    reward is the sum of these three. Beside them `bonus`, the part of `category` that naming earned; `category_right`, 1 for a right
    id; `ood_detected`, 1 for a free name at OOD gold. Rows are not weighted here.
    """
    strict = variant == "strict"
    image_P = gold.modality_P == IMAGE
    response_P = jnp.where((gold.response_P == ABSENT) & ~image_P, SAFE, gold.response_P)
    free_PG = (verdict.kind == NAME) | (verdict.kind == NONE_LIKE)
    format_PG = verdict.parsed & ~(strict & ((verdict.kind == NONE_LIKE) | (verdict.kind == EMPTY)))

    # A verdict is never UNKNOWN, so that unknown gold matches nothing.
    request_PG = jnp.where(verdict.request == gold.request_P[:, None], jnp.where(image_P, 2.0, 1.0)[:, None], 0.0)
    response_PG = jnp.where((verdict.response == response_P[:, None]) & ~image_P[:, None], 1.0, 0.0)

    gold_safe_P = (gold.request_P == SAFE) & ((response_P == SAFE) | (strict & image_P))
    answer_safe_PG = (verdict.request == SAFE) & ((verdict.response == SAFE) | (strict & image_P)[:, None])
    ended_PG = gold_safe_P[:, None] | answer_safe_PG

    in_policy_P = gold.category_P == CATEGORY_NODE
    is_ood_P = gold.category_P == CATEGORY_OOD  # neither of the two: no category, or an unknown one
    node_PG = jnp.take_along_axis(gold.node_of_id_PK, jnp.maximum(verdict.id, 0), axis=1)
    node_PG = jnp.where(verdict.kind == ID, node_PG, -1)  # -1: not an id that this prompt lists
    if strict:
        right_PG = (node_PG >= 0) & jnp.take_along_axis(gold.accepted_PN, jnp.maximum(node_PG, 0), axis=1)
        listed_PG = node_PG >= 0
        named_PG = verdict.kind == NAME
        ood_P = is_ood_P
    else:
        right_PG = (node_PG >= 0) & (node_PG == gold.node_P[:, None]) & in_policy_P[:, None]
        listed_PG = (verdict.kind == ID) | (verdict.kind == UNLISTED)
        named_PG = ~listed_PG
        known_P = ((gold.request_P == SAFE) | (gold.request_P == UNSAFE)) & (response_P != UNKNOWN)
        ood_P = is_ood_P | ((gold.category_P == CATEGORY_NONE) & known_P)

    bonus_PG = naming_bonus(similarity_PGS, valid_PS, max_threshold, mean_threshold)
    bonus_PG = jnp.where(free_PG & is_ood_P[:, None], bonus_PG, 0.0)
    node_term_PG = jnp.where(right_PG, 1.0, jnp.where(listed_PG, 0.5, 0.0))
    ood_term_PG = jnp.where(right_PG, 1.0, jnp.where(named_PG, 0.5 + bonus_PG, 0.0))
    category_PG = jnp.where(in_policy_P[:, None], node_term_PG, jnp.where(ood_P[:, None], ood_term_PG, 0.0))
    looked_PG = format_PG & ~ended_PG
    terms = {
        "format": format_PG,
        "request": jnp.where(format_PG, request_PG, 0),
        "response": jnp.where(format_PG, response_PG, 0),
        "category": jnp.where(looked_PG, category_PG, 0),
        "bonus": jnp.where(looked_PG, bonus_PG, 0),
        "category_right": looked_PG & right_PG & (in_policy_P | is_ood_P)[:, None],
        "ood_detected": looked_PG & is_ood_P[:, None] & free_PG,
    }
    terms = {name: term.astype(jnp.float32) for name, term in terms.items()}
    return terms["request"] + terms["response"] + terms["category"], terms


def naming_bonus(similarity_PGS: jax.Array, valid_PS: jax.Array, max_threshold: float, mean_threshold: float) -> jax.Array:
    """What the similarities of a name to a node's phrases earn: float32 [P, G] in 0 .. 0.5; 0 where no phrase is valid."""
    valid_P1S = valid_PS[:, None]
    largest_PG = similarity_PGS.max(-1, where=valid_P1S, initial=-1.0)
    mean_PG = jnp.where(valid_P1S, similarity_PGS, 0).sum(-1) / jnp.maximum(valid_P1S.sum(-1), 1)
    over_max_PG = (largest_PG - max_threshold) / (1 - max_threshold) * 0.5
    over_mean_PG = (mean_PG - mean_threshold) / (1 - mean_threshold) * 0.5
    return jnp.where(valid_P1S.any(-1), jnp.maximum(jnp.maximum(over_max_PG, over_mean_PG), 0), 0)
