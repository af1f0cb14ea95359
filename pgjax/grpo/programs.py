"""The jitted programs of one GRPO step, each a pure function of arrays (DESIGN section 6).

Every [P, ...] array lies by rows over (data, fsdp); scalars are replicated. The trainer calls them in order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from pgjax import automaton as answers
from pgjax.automaton import Automaton, Verdict
from pgjax.bank import Bank, similarity
from pgjax.config import Recipe
from pgjax.data.schema import Gold, PromptBatch
from pgjax.generate.decode import Rollout, decode, encode, prefill
from pgjax.generate.labels import answer_scorer
from pgjax.generate.law import Law
from pgjax.generate.score import Packed, pack, packed_width, per_answer, score
from pgjax.grpo import losses
from pgjax.grpo.advantages import advantages
from pgjax.models.sentence_encoder import Embedder
from pgjax.models.vision import Visual
from pgjax.parallel.mesh import local_rows, place_rows, replicated, rows
from pgjax.rewards import reward
from pgjax.tokenizer import answer_texts, never_sampled
from pgjax.train.setup import Setup
from pgjax.train.trainable import frozen_tower, merge
from pgjax.train.update import TrainState, split_rows, update


@struct.dataclass
class Judged:
    """What the reward sees in a batch of answers."""

    verdict: Verdict  # [P, G]
    reward_PG: jax.Array
    terms: dict[str, jax.Array]  # [P, G] each
    similarity_PGS: jax.Array  # of the predicted name with its gold's phrases; 0 where there is none
    valid_PS: jax.Array


@struct.dataclass
class Experience:
    """What the update reads of a step; leaves have leading axis P. With `visual` the batch has no patches."""

    batch: PromptBatch
    packed: Packed
    outcome_PJ: jax.Array
    old_PQ: jax.Array  # logprobs of the policy that sampled, by the scoring program
    ref_PQ: jax.Array  # logprobs of the reference
    advantage_PG: jax.Array
    weight_P: jax.Array
    visual: Visual | None = None  # of a frozen tower

    @property
    def mask_PQ(self) -> jax.Array:
        return self.packed.mask_PQ * self.weight_P[:, None]


class Judge(NamedTuple):
    """The reward's sentence encoder and bank; arrays are arguments of the program, never constants of it."""

    embedder: Embedder
    bank: Bank


def read_names(rollout: Rollout, tokenizer, embedder: Embedder, width: int, mesh) -> tuple[jax.Array, jax.Array]:
    """Predicted category texts as embedder tokens and mask [P, G, W], each process for its own rows: the step's only work on strings."""
    tokens_PGR, length_PG = local_rows(rollout.tokens_PGR), local_rows(rollout.length_PG)
    P, G = length_PG.shape
    names = [answers.category_text(text) or "" for text in answer_texts(tokenizer, tokens_PGR, length_PG)]
    tokens, mask = embedder.tokenize(names, width)
    mask &= np.array([bool(name) for name in names])[:, None]
    return place_rows((tokens.reshape(P, G, width), mask.reshape(P, G, width)), mesh)


class Programs:
    """Jitted programs for one recipe on one mesh. Attributes are functions; there is no state but their compilations."""

    def __init__(
        self, recipe: Recipe, setup: Setup, optimizer: optax.GradientTransformation, automaton: Automaton, tokenizer, judge: Judge
    ):
        model, mesh, config = setup.model, setup.mesh, recipe.grpo
        G, R, loss = recipe.rollout.group, recipe.answer.max_tokens, config.loss
        self.mesh, self.tokenizer, self.embedder, self.recipe = mesh, tokenizer, judge.embedder, recipe
        automaton = jax.device_put(automaton, replicated(mesh))
        blocked_V = jax.device_put(never_sampled(tokenizer, model.config.text.vocab), replicated(mesh))
        encoder = jax.device_put(judge.embedder.params, replicated(mesh))
        on_rows, everywhere = rows(mesh), replicated(mesh)
        key = jax.random.key(recipe.seed)

        def law(outcome_PJ) -> Law:
            return Law(blocked_V, automaton, outcome_PJ, R, recipe.rollout.temperature, recipe.rollout.constrained)

        def outcome(gold: Gold):
            return answers.outcome_mask(automaton, gold.node_of_id_PK)

        def program(f, out=on_rows, **options):
            compiled = jax.jit(f, out_shardings=out, **options)

            def call(*args, **kwargs):
                with jax.set_mesh(mesh):
                    return compiled(*args, **kwargs)

            return call

        def rollout(weights, batch: PromptBatch, gold: Gold, step, visual=None, *, group, greedy):
            start = prefill(model, weights, batch, encode(model, weights, batch) if visual is None else visual)
            cut = dict(top_k=recipe.rollout.top_k, top_p=recipe.rollout.top_p)
            return decode(model, weights, batch, gold.modality_P, start, law(outcome(gold)), key, step, group=group, greedy=greedy, **cut)

        def judged(rollout: Rollout, gold: Gold, names, mask, bank: Bank, encoder) -> Judged:
            P, G, W = names.shape
            verdict = answers.verdict(automaton, rollout.final_PG)
            embed = lambda: judge.embedder.module.apply({"params": encoder}, names.reshape(P * G, W), mask.reshape(P * G, W))  # noqa: E731
            name_PGE = jax.lax.cond(mask.any(), embed, lambda: jnp.zeros((P * G, judge.embedder.E))).reshape(P, G, -1)
            similarity_PGS, valid_PS = similarity(bank, name_PGE, gold.node_P)
            reward_PG, terms = reward(
                verdict, gold, similarity_PGS, valid_PS, bank.max_threshold, bank.mean_threshold, recipe.reward.variant
            )
            return Judged(verdict, reward_PG, terms, similarity_PGS, valid_PS)

        def scored(params, batch, packed, gold: Gold, visual=None):
            return score(model, params, batch, packed, law(outcome(gold)), visual, entropy=False)[0]

        def experience(rollout: Rollout, judged: Judged, batch, gold: Gold, packed: Packed, old_PQ, ref_PQ, visual=None):
            """Advantages, and the step's statistics: of the groups, of the answers, and of sampler against scorer."""
            kl_PG = per_answer(old_PQ - ref_PQ, packed, G)
            advantage_PG, stats = advantages(judged.reward_PG, kl_PG, loss, gold.weight_P)
            batch = batch if visual is None else batch.replace(patches_PIB=None)
            done = Experience(batch, packed, outcome(gold), old_PQ, ref_PQ, advantage_PG, gold.weight_P, visual)
            sampled_PQ = pack_values(rollout.logp_PGR, packed)
            gap = jnp.abs(jnp.exp(sampled_PQ) - jnp.exp(old_PQ)) * done.mask_PQ
            weight_PG = jnp.broadcast_to(gold.weight_P[:, None], judged.reward_PG.shape)
            mean = lambda x: jnp.sum(x * weight_PG) / jnp.maximum(weight_PG.sum(), 1)  # noqa: E731
            stats = {f"critic/{name}": value for name, value in stats.items()} | {
                "response_length/mean": mean(rollout.length_PG),
                "response_length/clip_ratio": mean(~automaton.stop_V[rollout.tokens_PGR].any(-1)),
                "training/rollout_probs_diff_mean": gap.sum() / jnp.maximum(done.mask_PQ.sum(), 1),
                "training/rollout_probs_diff_max": gap.max(),
                "rollout/slot_waste": rollout.length_PG.max() * rollout.length_PG.size / rollout.length_PG.sum(),
                "update/pad_share": 1 - done.mask_PQ.mean(),
            }
            return done, stats | {f"reward/{name}": mean(term) for name, term in judged.terms.items()}

        def loss_sum(params, micro: Experience):
            logp, entropy = score(model, params, micro.batch, micro.packed, law(micro.outcome_PJ), micro.visual)
            advantage_PQ = losses.per_token(micro.advantage_PG, micro.packed.sample_PQ)
            token, metrics = losses.token_loss(logp, micro.old_PQ, micro.ref_PQ, entropy, advantage_PQ, micro.mask_PQ, loss)
            total, _ = losses.aggregate(token, micro.mask_PQ, micro.packed.sample_PQ, G, loss.aggregation)
            pairs = losses.metric_pairs(metrics, micro.mask_PQ, micro.packed.sample_PQ, G, loss.aggregation)
            return total, pairs

        def updated(state: TrainState, reference, experience: Experience, index):
            mini = split_rows(experience, config.prompts // config.mini_prompts, index)
            # Exact over the mini-batch; verl 0.6.1 instead averages the token means of its micro-batches (PAPERS C8).
            number = losses.count(mini.mask_PQ, mini.packed.sample_PQ, G, loss.aggregation) + loss.agg_eps
            whole = lambda trained, micro: loss_sum(merge(trained, reference), micro)  # noqa: E731
            return update(state, optimizer, whole, mini, number, config.mini_prompts // config.micro_prompts)

        self.gather = program(setup.cast, setup.rollout)
        encoded = program(lambda weights, batch: encode(model, weights, batch))
        self.encode = encoded if frozen_tower(model.config) else lambda weights, batch: None  # a trained tower: each program for itself
        self.rollout = program(rollout, static_argnames=("group", "greedy"))
        self._judge = program(judged)
        self.pack = program(lambda r, width: pack(r.tokens_PGR, r.state_PGR, r.length_PG, width), static_argnums=1)
        self.score = program(scored)
        self.score_given = answer_scorer(model, Law(blocked_V, automaton, jnp.ones((1, 1), bool), R), mesh)
        self.experience = program(experience, (on_rows, everywhere))
        self.update = program(updated, (setup.state_shardings(optimizer), everywhere), donate_argnums=0)
        self.encoder = encoder

    def judge(self, rollout: Rollout, gold: Gold, bank: Bank) -> Judged:
        """Verdict, similarity and reward of a rollout's answers."""
        names, mask = read_names(rollout, self.tokenizer, self.embedder, self.recipe.reward.name_tokens, self.mesh)
        return self._judge(rollout, gold, names, mask, bank, self.encoder)

    def packed_width(self, rollout: Rollout) -> int:
        """Bucket of Q for this rollout, the same on every process: read from the global lengths."""
        longest = int(rollout.length_PG.sum(axis=1).max())
        return packed_width(longest, self.recipe.answer.max_tokens, self.recipe.rollout.packed_tokens, self.recipe.rollout.group)


def pack_values(value_PGR: jax.Array, packed: Packed) -> jax.Array:
    """Values per answer token [P, G, R] at their packed slots [P, Q]; 0 in empty slots."""
    P, G, R = value_PGR.shape
    index_PQ = jnp.clip(packed.sample_PQ * R + packed.offset_PQ, 0, G * R - 1)
    return jnp.take_along_axis(value_PGR.reshape(P, G * R), index_PQ, axis=1) * packed.mask_PQ
