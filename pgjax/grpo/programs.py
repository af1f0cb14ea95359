"""The jitted programs of one GRPO step, each a pure function of arrays (DESIGN section 6).

Every [P, ...] array lies by rows over (data, fsdp); scalars are replicated. The trainer calls them in order.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding

from pgjax import automaton as answers
from pgjax.automaton import Automaton, Verdict
from pgjax.bank import Bank, similarity
from pgjax.config import GRPOConfig, Recipe
from pgjax.data.schema import CATEGORY_OOD, Gold, PromptBatch
from pgjax.generate.decode import Prefill, Rollout, decode, encode, prefill
from pgjax.generate.labels import answer_scorer
from pgjax.generate.lanes import Slots
from pgjax.generate.law import Law
from pgjax.generate.score import Packed, balanced, pack, pack_values, packed_width, per_answer, score
from pgjax.grpo import losses
from pgjax.grpo.advantages import advantages, informative, overlong_penalty, select
from pgjax.models.sentence_encoder import Embedder
from pgjax.models.text import PromptCache
from pgjax.models.vision import Visual
from pgjax.parallel.mesh import TRAINING, local_rows, place_rows, put_everywhere, replicated, rows, share_of, spec, take_rows
from pgjax.parallel.program import Program
from pgjax.rewards import reward
from pgjax.tokenizer import answer_texts, never_sampled
from pgjax.train.setup import Setup
from pgjax.train.trainable import merge
from pgjax.train.update import TrainState, split_rows, update


@struct.dataclass
class Judged:
    """What the reward sees in a batch of answers."""

    verdict: Verdict  # [P, G]
    reward_PG: jax.Array
    terms: dict[str, jax.Array]  # [P, G] each
    similarity_PGS: jax.Array  # of a free name with its gold's phrases where gold lies outside the policy; else 0
    valid_PS: jax.Array


@struct.dataclass
class Rows:
    """Chosen prompts with their packed answers as scoring reads them: n prompts a row, leaves [rows, ...] and [rows, n, ...]."""

    packed: Packed
    batch: PromptBatch  # [rows, n, ...]; without patches where `visual` is known
    outcome: jax.Array  # bool [rows, n, J]
    visual: Visual | None  # [rows, n, ...] of a frozen tower

    def prompts(self) -> "Rows":
        """With the rows' prompts one after another, [rows * n, ...]."""
        flat = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)  # noqa: E731
        return self.replace(batch=flat(self.batch), outcome=flat(self.outcome), visual=flat(self.visual))


@struct.dataclass
class Experience:
    """What the update reads of a step; leaves have leading axis rows, Q are packed slots."""

    rows: Rows
    old_PQ: jax.Array | None  # logprobs of the policy that sampled, by the scoring program; None: the update's own
    sampled_PQ: jax.Array  # the same as the sampler had them
    ref_PQ: jax.Array  # logprobs of the reference
    advantage_PG: jax.Array  # of each of the row's answers
    mask_PQ: jax.Array  # tokens of prompts with weight


class Choice(NamedTuple):
    """Which prompts are trained on, and in which order they fill the rows; K prompts, by shard of the batch."""

    index_K: jax.Array  # number in its shard
    weight_K: jax.Array
    longest: jax.Array  # tokens of the fullest row


class Judge(NamedTuple):
    """The reward's sentence encoder and bank; arrays are arguments of the program, never constants of it."""

    embedder: Embedder
    bank: Bank


def chosen(length_PG: jax.Array, informative_P: jax.Array, config: GRPOConfig, shards: int) -> Choice:
    """Each share of the batch deals its prompts out to the mini-batches, each mini-batch on a shard its own to rows, so that all have
    about as many tokens. Mini-batches are then the same on every mesh that divides the shares."""
    shares, per_row = config.shares or shards, config.micro_prompts // shards
    minis, micros = config.prompts // config.mini_prompts, config.mini_prompts // config.micro_prompts

    def of_share(tokens_P, informative_P):
        index_K, weight_K = select(informative_P, config.prompts // shares)
        order_K = balanced(tokens_P[index_K], config.mini_prompts // shares)
        return index_K[order_K].astype(jnp.int32), weight_K[order_K], tokens_P[index_K[order_K]]

    tokens_P = length_PG.sum(axis=1)
    index, weight, tokens = jax.vmap(of_share)(*(x.reshape(shares, -1) for x in (tokens_P, informative_P)))
    index += (jnp.arange(shares) % (shares // shards) * (len(tokens_P) // shares))[:, None]
    by_mini = lambda x: x.reshape(shards, shares // shards, minis, -1).swapaxes(1, 2).reshape(shards, minis, -1)  # noqa: E731
    index, weight, tokens = map(by_mini, (index, weight, tokens))
    order = jax.vmap(jax.vmap(lambda tokens: balanced(tokens, per_row)))(tokens)
    # Row l of a shard belongs to mini-batch l % minis, and there to micro-batch l // minis: see split_rows.
    by_row = lambda x: jnp.take_along_axis(x, order, axis=2).reshape(shards, minis, micros, per_row).swapaxes(1, 2)  # noqa: E731
    return Choice(by_row(index).reshape(-1), by_row(weight).reshape(-1), by_row(tokens).sum(axis=-1).max())


class Programs:
    """Jitted programs for one recipe on one mesh. Attributes are functions; there is no state but their compilations."""

    def __init__(
        self, recipe: Recipe, setup: Setup, optimizer: optax.GradientTransformation, automaton: Automaton, tokenizer, judge: Judge
    ):
        model, mesh, config = setup.model, setup.mesh, recipe.grpo
        G, R, loss = recipe.rollout.group, recipe.answer.max_tokens, config.loss
        self.mesh, self.tokenizer, self.embedder, self.recipe = mesh, tokenizer, judge.embedder, recipe
        self.free_A = np.isin(automaton.kind_A, (answers.NAME, answers.NONE_LIKE))
        automaton = put_everywhere(automaton, mesh)
        blocked_V = put_everywhere(never_sampled(tokenizer, model.config.text.vocab), mesh)
        encoder = put_everywhere(judge.embedder.params, mesh)
        on_rows, everywhere = rows(mesh), replicated(mesh)
        key, shards = jax.random.key(recipe.seed), mesh.shape["data"] * mesh.shape["fsdp"]

        def law(outcome_PJ) -> Law:
            by = recipe.rollout
            distance_PA = answers.distances(automaton, outcome_PJ) if by.constrained else None
            return Law(blocked_V, automaton, distance_PA, R, by.temperature, by.constrained)

        def outcome(gold: Gold):
            return answers.outcome_mask(automaton, gold.node_of_id_PK)

        caches = NamedSharding(mesh, spec(("layers", "batch", "kv_heads"), (1, shards, model.config.text.kv_heads), TRAINING, mesh))

        def program(f, out=on_rows, **options):
            return Program(jax.jit(f, out_shardings=out, **options), out, mesh)

        minis, micros = config.prompts // config.mini_prompts, config.mini_prompts // config.micro_prompts
        per_row = config.micro_prompts // shards
        answers_of_row = per_row * G

        def encoded(weights, batch: PromptBatch):
            return encode(model, weights, batch)

        def prefilled(weights, batch: PromptBatch, visual: Visual):
            return prefill(model, weights, batch, visual)

        def decoded(weights, batch: PromptBatch, gold: Gold, start, step, *, group, greedy):
            P, by = gold.modality_P.shape[0], recipe.rollout
            cut = dict(top_k=by.top_k, top_p=by.top_p, lanes=by.lanes, rows=by.rows if by.rows < P else 0)
            return decode(model, weights, batch, gold.modality_P, start, law(outcome(gold)), key, step, group=group, greedy=greedy, **cut)

        def judged(rollout: Rollout, gold: Gold, names_BW, mask_BW, name_PG, bank: Bank, encoder) -> Judged:
            verdict = answers.verdict(automaton, rollout.final_PG)
            embed = lambda: judge.embedder.module.apply({"params": encoder}, names_BW, mask_BW)  # noqa: E731
            name_BE = jax.lax.cond(mask_BW.any(), embed, lambda: jnp.zeros((len(names_BW), judge.embedder.E)))
            name_BE = jax.lax.with_sharding_constraint(name_BE, everywhere)  # few: each device then takes those of its rows
            name_PGE = jnp.where(name_PG[..., None] >= 0, name_BE[name_PG], 0)
            similarity_PGS, valid_PS = similarity(bank, name_PGE, gold.node_P)
            reward_PG, terms = reward(
                verdict, gold, similarity_PGS, valid_PS, bank.max_threshold, bank.mean_threshold, recipe.reward.variant
            )
            return Judged(verdict, reward_PG, terms, similarity_PGS, valid_PS)

        def pick(tree, choice: Choice):
            return jax.tree.map(lambda x: take_rows(x, choice.index_K, shards), tree)

        def arranged(rollout: Rollout, batch, gold: Gold, choice: Choice, visual=None, *, width) -> Rows:
            batch = batch if visual is None else batch.replace(patches_PIB=None)
            by_row = lambda x: take_rows(x, choice.index_K, shards).reshape(-1, per_row, *x.shape[1:])  # noqa: E731
            one = pick(rollout, choice)
            packed = pack(one.tokens_PGR, one.state_PGR, one.length_PG, width, per_row)
            return Rows(packed, *jax.tree.map(by_row, (batch, outcome(gold), visual)))

        def of_rows(params, rows: Rows, entropy: bool):
            rows = rows.prompts()
            return score(model, params, rows.batch, rows.packed, law(rows.outcome), rows.visual, entropy=entropy)

        def scored(params, rows: Rows):
            """Micro-batch by micro-batch, in the shapes of the update."""
            parts = minis * micros
            logp = jax.lax.map(lambda index: of_rows(params, split_rows(rows, parts, index), False)[0], jnp.arange(parts))
            return jnp.moveaxis(logp, 0, 1).reshape(-1, logp.shape[-1])

        def experience(rollout: Rollout, judged: Judged, batch, gold: Gold, choice: Choice, rows: Rows, old_PQ, ref_PQ, slots: Slots):
            """Advantages, and the step's statistics: of the groups and of the answers."""
            packed, weight_P = rows.packed, gold.weight_P
            reward_PG = judged.reward_PG
            if loss.overlong_buffer:
                reward_PG += overlong_penalty(rollout.length_PG, R, loss.overlong_buffer)
            weight_K = pick(weight_P, choice) * choice.weight_K
            sampled_PQ = pack_values(pick(rollout.logp_PGR, choice), packed)
            kl_PQ = losses.kl_estimate(sampled_PQ if old_PQ is None else old_PQ, ref_PQ, loss.kl_reward)
            kl_KG = per_answer(kl_PQ, packed, answers_of_row).reshape(-1, G)
            advantage_KG, stats = advantages(pick(reward_PG, choice), kl_KG, loss, weight_K)
            mask_PQ = packed.mask_PQ * jnp.take_along_axis(weight_K.reshape(-1, per_row), packed.prompt_PQ, axis=1)
            done = Experience(rows, old_PQ, sampled_PQ, ref_PQ, advantage_KG.reshape(-1, answers_of_row), mask_PQ)
            weight_PG = jnp.broadcast_to(weight_P[:, None], reward_PG.shape)
            mean = lambda x: jnp.sum(x * weight_PG) / jnp.maximum(weight_PG.sum(), 1)  # noqa: E731
            before_tail, waste = slots.waste()
            stats = {f"critic/{name}": value for name, value in stats.items()} | {
                "response_length/mean": mean(rollout.length_PG),
                "response_length/clip_ratio": mean(~automaton.stop_V[rollout.tokens_PGR].any(-1)),
                "rollout/slot_waste": waste,
                "rollout/slot_waste_before_tail": before_tail,
                "rollout/informative": mean(jnp.broadcast_to(informative(judged.reward_PG, weight_P)[:, None], weight_PG.shape)),
                "update/pad_share": 1 - packed.mask_PQ.mean(),
                "update/prompt_pad_share": 1 - rows.batch.length_P.mean() / rows.batch.tokens_PT.shape[-1],
            }
            sizes = lambda batch: {"patches": (batch.image_PI >= 0).sum(), "prompt": batch.length_P.sum()}  # noqa: E731
            trained = sizes(rows.batch) | {"response": packed.mask_PQ.sum()}
            counts = sizes(batch) | {"response": rollout.length_PG.sum()} | {f"trained_{name}": value for name, value in trained.items()}
            stats |= {f"count/{name}": value for name, value in counts.items()}
            return done, stats | {f"reward/{name}": mean(term) for name, term in judged.terms.items()}

        def loss_sum(params, micro: Experience):
            logp, entropy = of_rows(params, micro.rows, True)
            sample_PQ = micro.rows.packed.sample_PQ
            advantage_PQ = losses.per_token(micro.advantage_PG, sample_PQ)
            old = jax.lax.stop_gradient(logp) if micro.old_PQ is None else micro.old_PQ
            token, metrics = losses.token_loss(logp, old, micro.sampled_PQ, micro.ref_PQ, entropy, advantage_PQ, micro.mask_PQ, loss)
            how = micro.mask_PQ, sample_PQ, answers_of_row, R, loss.aggregation
            return losses.aggregate(token, *how)[0], losses.metric_pairs(metrics, *how)

        def updated(state: TrainState, reference, experience: Experience, index):
            mini = split_rows(experience, minis, index)
            # Exact over the mini-batch; verl 0.6.1 instead averages the token means of its micro-batches (PAPERS C8).
            number = losses.count(mini.mask_PQ, mini.rows.packed.sample_PQ, answers_of_row, R, loss.aggregation) + loss.agg_eps
            whole = lambda trained, micro: loss_sum(merge(trained, reference), micro)  # noqa: E731
            return update(state, optimizer, whole, mini, number, micros)

        def averaged(*updates):
            return jax.tree.map(lambda *x: jnp.stack(x).mean(), *updates)

        self.gather = program(setup.cast, setup.rollout)
        self.encode = program(encoded)
        self.prefill = program(prefilled, Prefill(PromptCache(caches, caches), on_rows))
        self.decode = program(decoded, (on_rows, everywhere), static_argnames=("group", "greedy"))
        self._judge = program(judged)
        self._choose = program(partial(chosen, config=config, shards=shards), Choice(on_rows, on_rows, everywhere))
        self.arrange = program(arranged, static_argnames="width")
        self.score = program(scored)
        self.score_given = answer_scorer(model, Law(blocked_V, automaton, None, R), mesh)
        self.experience = program(experience, (on_rows, everywhere))
        self.update = program(updated, (setup.state_shardings(optimizer), everywhere), donate_argnums=0)
        self.average = program(averaged, everywhere)
        self.encoder, self.answers_of_row, self.shards = encoder, answers_of_row, shards

    def names(self, rollout: Rollout, gold: Gold) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What is compared with the bank, free names at gold outside the policy: each once as embedder tokens and mask [B, W], and which
        of them an answer gives, int32 [P, G], -1 for none. The step's only work on strings, each process for its own rows.

        B is 8 names for each shard of the batch, or as often doubled as the process with most needs: programs are compiled for few B.
        """
        ood_P = local_rows(gold.category_P) == CATEGORY_OOD
        asked_PG = self.free_A[local_rows(rollout.final_PG)] & ood_P[:, None]
        texts = answer_texts(self.tokenizer, *(local_rows(x)[asked_PG] for x in (rollout.tokens_PGR, rollout.length_PG)))
        number: dict[str, int] = {}
        name_PG = np.full(asked_PG.shape, -1, np.int32)
        name_PG[asked_PG] = [number.setdefault(answers.category_text(text) or "", len(number)) for text in texts]

        own_S = np.array(share_of(self.mesh).own)
        size, most = 8, process_allgather(np.int32(len(number))).max()
        while size * len(own_S) < most:
            size *= 2
        B = size * len(own_S)
        tokens_BW, mask_BW = self.embedder.tokenize(list(number), self.recipe.reward.name_tokens)
        pad = ((0, B - len(number)), (0, 0))
        name_PG[asked_PG] += ((own_S - np.arange(len(own_S))) * size)[name_PG[asked_PG] // size]  # from a place here to one among all
        return place_rows((np.pad(tokens_BW, pad), np.pad(mask_BW, pad), name_PG), self.mesh)

    def judge(self, rollout: Rollout, gold: Gold, bank: Bank) -> Judged:
        """Verdict, similarity and reward of a rollout's answers."""
        return self._judge(rollout, gold, *self.names(rollout, gold), bank, self.encoder)

    def rollout(self, weights: dict, batch: PromptBatch, gold: Gold, step: int = 0, *, group: int, greedy: bool) -> tuple[Rollout, Slots]:
        """Encode, prefill and decode."""
        start = self.prefill(weights, batch, self.encode(weights, batch))
        return self.decode(weights, batch, gold, start, jnp.int32(step), group=group, greedy=greedy)

    def choose(self, rollout: Rollout, judged: Judged | None, gold: Gold) -> tuple[Choice, int]:
        """What is trained on, and the width Q of its rows, the same on every process: read from the global lengths. Every prompt is
        informative where no rewards are given."""
        informative_P = jnp.ones(gold.weight_P.shape, bool) if judged is None else informative(judged.reward_PG, gold.weight_P)
        choice = self._choose(rollout.length_PG, informative_P)
        most = self.answers_of_row * self.recipe.answer.max_tokens
        return choice, packed_width(int(choice.longest), most, self.recipe.rollout.packed_step)
