"""What the reward reads of answers as text: the names that are compared with the bank, each embedded once."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_recipe import ONE, G, P, R, batch, materials, programs, tiny_recipe

from pgjax import automaton as answers
from pgjax.conversation import answer_text
from pgjax.data.schema import CATEGORY_NODE, CATEGORY_OOD, MODALITIES
from pgjax.generate.decode import Rollout
from pgjax.parallel.mesh import place_rows
from pgjax.sft.warm_up import answer_arrays
from pgjax.train.compilations import Compilations

OOD_P = np.arange(P) % 2 == 0
ASKED = OOD_P.sum() * (G - 1)  # answers with a free name at gold outside the policy


class Recorded:
    """The embedder, and the names that it was asked for."""

    def __init__(self, embedder):
        self.embedder, self.names = embedder, []

    def tokenize(self, names: list[str], width: int):
        self.names.append(names)
        return self.embedder.tokenize(names, width)


def gold_and_rollout(run, different: int):
    """Answers that give `different` names in turn, a broken one in each group; every other prompt's gold is outside the policy."""
    m, (_, gold) = materials(), batch()
    full = np.flatnonzero(np.asarray(m.bank.valid_NS).any(axis=1))
    gold = gold.replace(category_P=np.where(OOD_P, CATEGORY_OOD, CATEGORY_NODE).astype(np.int32), node_P=full[:P].astype(np.int32))
    names_PG = np.array([["" if g == 1 else f"k{(g + G * (p // 2)) % different}" for g in range(G)] for p in range(P)])
    names_PG[~OOD_P] = "ink"
    written = lambda p, name: answer_text("unsafe", "unsafe", name, "", MODALITIES[gold.modality_P[p]], "think") if name else "ink"  # noqa: E731
    texts_PG = [[written(p, str(name)) for name in names_G] for p, names_G in enumerate(names_PG)]
    tokens, length, gold = place_rows((*answer_arrays(texts_PG, m.tokenizer, R), gold), run.mesh)
    final_PG = answers.run(m.automaton, tokens, length, jnp.broadcast_to(gold.modality_P[:, None], length.shape))
    none = jnp.zeros(tokens.shape)
    return names_PG, gold, Rollout(tokens, none, none.astype(jnp.int32), length, final_PG)


@pytest.mark.parametrize("mesh", [ONE, (2, 2, 2)])
def test_names_are_embedded_once_and_only_where_they_are_compared(mesh):
    m, run = materials(), programs(mesh, tiny_recipe(), optax.sgd(0.0))
    run.embedder, compilations, compiled = Recorded(run.embedder), Compilations(), []
    for different in (3, 5, 1000, 1000):
        names_PG, gold, rollout = gold_and_rollout(run, different)
        compilations.take()
        judged = run.judge(rollout, gold, m.bank)
        compiled.append(compilations.take())
        asked_PG = OOD_P[:, None] & (names_PG != "")
        np.testing.assert_array_equal(judged.verdict.parsed, names_PG != "")
        assert sorted(run.embedder.names[-1]) == sorted(set(names_PG[asked_PG])) and len(run.embedder.names[-1]) == min(different, ASKED)
        vectors = m.embedder.texts(names_PG[asked_PG].tolist())
        expected_PGS = np.zeros(judged.similarity_PGS.shape, np.float32)
        node_P = np.asarray(gold.node_P)
        expected_PGS[asked_PG] = np.einsum("ne,nse->ns", vectors, np.asarray(m.bank.embedding_NSE)[node_P[np.nonzero(asked_PG)[0]]])
        np.testing.assert_allclose(judged.similarity_PGS, expected_PGS, atol=1e-5)
    # One device holds 8 names, then 16; the four shards of the mesh 32 from the beginning.
    assert compiled[0] > 0 and (compiled[2] > 0) == (mesh == ONE) and compiled[1] == compiled[3] == 0


def test_the_names_of_nobody_cost_no_embedding():
    """A batch whose gold lies in the policy is given no name at all."""
    run = programs(ONE, tiny_recipe(), optax.sgd(0.0))
    _, gold, rollout = gold_and_rollout(run, 3)
    gold = gold.replace(category_P=jnp.full(P, CATEGORY_NODE))
    _, mask_BW, name_PG = run.names(rollout, gold)
    assert not mask_BW.any() and (name_PG == -1).all()
