"""Token draws: their law, their tail, what has no mass, and the nucleus."""

from __future__ import annotations

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eso_jax.decoding import categorical
from eso_jax.decoding.categorical import Rule
from eso_jax.errors import EsoError
from eso_jax.model.transformer import MASK_LOGIT

PLAIN, GREEDY, NUCLEUS = Rule(), Rule(temperature=0.0), Rule(top_p=0.9)
ALMOST_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
SMALLEST = float(np.finfo(np.float32).tiny)


draw = jax.jit(categorical.draw, static_argnames="rule")
nucleus = jax.jit(categorical.nucleus, static_argnames="top_p")


@functools.partial(jax.jit, static_argnames="top_p")
def nuclei(mass: jax.Array, top_p: float) -> tuple[jax.Array, jax.Array]:
    """The nucleus as it is found on CPU, and as elsewhere, by several bits at a time."""
    here = categorical.nucleus(mass, top_p)
    with mock.patch.object(categorical, "DIGIT", {}):
        return here, categorical.nucleus(mass, top_p)


@functools.partial(jax.jit, static_argnames=("count", "rule"))
def many(key: jax.Array, logits: jax.Array, count: int, rule: Rule = PLAIN) -> jax.Array:
    """`count` draws from one row of logits."""
    return jax.vmap(draw, (None, 0, None))(logits, jax.random.uniform(key, (count, 2)), rule)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    exp = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return exp / exp.sum()


def check_frequencies(tokens: np.ndarray, p: np.ndarray) -> None:
    """Chi-square over the tokens of probability above 0; the false alarm rate is 1e-4 (and the seeds are fixed)."""
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0
    expected = len(tokens) * p[p > 0]
    assert expected.min() > 5
    assert stats.chisquare(counts[p > 0], expected).pvalue > 1e-4


@pytest.mark.parametrize("vocab", [3, 16, 33, 258])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_draws_follow_the_softmax(vocab: int, temperature: float) -> None:
    """Whether or not V is a square, so with and without a padded last block."""
    logits = np.append(np.random.default_rng(vocab).normal(size=vocab - 1), MASK_LOGIT).astype(np.float32)
    tokens = many(jax.random.key(vocab), logits, 60_000, Rule(temperature))
    check_frequencies(np.asarray(tokens), softmax(logits, temperature))


def test_nucleus_draws_follow_the_softmax_within_the_nucleus() -> None:
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32) * 1.5
    kept = softmax(logits) * plain_nucleus(softmax(logits), 0.9)
    assert 5 < (kept > 0).sum() < 40
    check_frequencies(np.asarray(many(jax.random.key(0), logits, 60_000, NUCLEUS)), kept / kept.sum())


def test_rows_are_drawn_each_from_its_own_logits_and_uniforms() -> None:
    logits = jax.random.normal(jax.random.key(0), (3, 4, 21)) * 2
    uniforms = jax.random.uniform(jax.random.key(1), (3, 4, 2))
    together = np.asarray(draw(logits, uniforms, NUCLEUS))
    assert together.shape == (3, 4)
    one_by_one = [[int(draw(logits[i, j], uniforms[i, j], NUCLEUS)) for j in range(4)] for i in range(3)]
    np.testing.assert_array_equal(together, one_by_one)


def test_greedy_takes_the_most_likely_token_whatever_the_uniforms() -> None:
    logits = jax.random.normal(jax.random.key(0), (50, 33))
    for u in (0.0, 0.5, ALMOST_ONE):
        np.testing.assert_array_equal(draw(logits, jnp.full((50, 2), u), GREEDY), logits.argmax(-1))
        np.testing.assert_array_equal(draw(logits, jnp.full((50, 2), u), Rule(temperature=1e-4)), logits.argmax(-1))


EDGES = st.sampled_from([0.0, SMALLEST, 2.0**-24, 0.5, 1 - 2.0**-12, ALMOST_ONE]) | st.floats(0, ALMOST_ONE, width=32)


@given(st.sets(st.integers(0, 32), min_size=1), EDGES, EDGES, st.integers(0, 2**31 - 1), st.sampled_from([0.1, 1, 20]))
@settings(deadline=None, max_examples=150)
def test_tokens_without_mass_are_never_drawn(allowed: set[int], u: float, v: float, seed: int, scale: float) -> None:
    """Neither by the mask's logit nor by the nucleus, with both uniforms as near to 0 and to 1 as they come."""
    logits = np.full(33, MASK_LOGIT, np.float32)
    logits[list(allowed)] = np.random.default_rng(seed).normal(size=len(allowed)) * scale
    uniforms = jnp.array([u, v], jnp.float32)
    assert int(draw(jnp.array(logits), uniforms, PLAIN)) in allowed
    token = int(draw(jnp.array(logits), uniforms, NUCLEUS))
    p = softmax(logits)
    assert p[p > p[token]].sum() <= 0.9 + 1e-5


def test_last_token_with_mass_is_reached_at_the_end_of_every_block() -> None:
    """Equal masses of a third, whose float32 sums are inexact: u near 1 must give the last token, u = 0 the first."""
    for vocab in (2, 3, 5, 9, 258):
        logits = jnp.full(vocab, MASK_LOGIT).at[1:vocab - (vocab > 2)].set(np.log(1 / 3))
        assert int(draw(logits, jnp.full(2, ALMOST_ONE), PLAIN)) == max(1, vocab - 2)
        assert int(draw(logits, jnp.zeros(2), PLAIN)) == 1


def test_inversion_survives_rounding() -> None:
    """XLA's cumulative sum of many entries may rise by a rounding error over one without mass, and sink. With u at
    every such edge, and even at 1, the entry found has mass."""
    rng = np.random.default_rng(0)
    mass = (rng.exponential(size=(20, 1000)) ** 3 * (rng.random((20, 1000)) < 0.3)).astype(np.float32)
    mass[:, 0], mass[:, -1] = 0.1, 0
    cumulative = np.asarray(jnp.cumsum(jnp.asarray(mass), axis=-1))
    edges = np.append(cumulative / cumulative[:, -1:], np.ones((20, 1)), axis=1).astype(np.float32)
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(0))], axis=1)
    found = np.asarray(jax.jit(jax.vmap(categorical._invert, (None, 1), 1))(jnp.asarray(mass), jnp.asarray(edges)))
    assert (np.take_along_axis(mass, found, axis=1) > 0).all()
    last = mass.shape[1] - 1 - (mass[:, ::-1] > 0).argmax(axis=1)
    np.testing.assert_array_equal(found[:, mass.shape[1]], last)  # u = 1


def plain_nucleus(mass: np.ndarray, top_p: float) -> np.ndarray:
    """By sorting one row in float64: a token stays if the mass strictly above it is at most top_p of the total."""
    mass = mass.astype(np.float64)
    descending = np.sort(mass)[::-1]
    above = np.array([descending[:np.searchsorted(-descending, -m)].sum() for m in mass])
    return above <= top_p * mass.sum()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_nucleus_equals_the_sorted_reference(top_p: float) -> None:
    for vocab, scale in ((7, 1.0), (33, 3.0), (1000, 1.0), (1000, 8.0)):
        logits = np.random.default_rng(vocab).normal(size=(20, vocab)).astype(np.float32) * np.float32(scale)
        mass = np.exp(logits - logits.max(-1, keepdims=True))
        expected = [plain_nucleus(row, top_p) for row in mass]
        np.testing.assert_array_equal(nucleus(jnp.asarray(mass), top_p), expected)


@given(st.lists(st.integers(0, 6), min_size=9, max_size=9).filter(any), st.sampled_from([1, 6, 12, 15]))
@settings(deadline=None, max_examples=100)
def test_nucleus_with_ties_and_exact_edges(mass: list[int], sixteenths: int) -> None:
    """Small integers and sixteenths add up exactly in float32: ties at the edge are kept together, and tokens whose
    mass above is exactly top_p are kept."""
    for kept in map(np.asarray, nuclei(jnp.array(mass, jnp.float32), sixteenths / 16)):
        np.testing.assert_array_equal(kept, plain_nucleus(np.array(mass), sixteenths / 16))
        assert kept[np.argmax(mass)]


def test_nucleus_of_very_unequal_masses() -> None:
    """Down to the smallest normal float32, where a bisection on values rather than on bits would not arrive."""
    mass = np.float32(2.0) ** -np.arange(120, dtype=np.float32)[::-1]
    for top_p, expected in ((0.5, 1), (0.75, 2), (0.9, 4), (1 - 2**-20, 20)):
        for kept in map(np.asarray, nuclei(jnp.asarray(mass), top_p)):
            np.testing.assert_array_equal(kept, plain_nucleus(mass, top_p))
            assert kept.sum() == expected or kept.sum() == expected + 1


def test_nucleus_equals_the_authors(cases: dict[str, np.ndarray]) -> None:
    logits, expected = cases["nucleus/logits"], cases["nucleus/keep_top_p_0.9"]
    mass = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_array_equal(nucleus(jnp.asarray(mass), 0.9), expected)
    uniforms = jax.random.uniform(jax.random.key(0), (500, 1, 2))
    tokens = np.asarray(jax.vmap(lambda u: draw(jnp.asarray(logits), jnp.broadcast_to(u, (16, 2)), NUCLEUS))(uniforms))
    assert expected[np.arange(16), tokens].all()


@pytest.mark.parametrize("field, value", [("top_p", 0.0), ("top_p", -0.5), ("top_p", 1.01), ("temperature", -1.0),
                                          ("min_p", -0.1), ("min_p", 1.0), ("min_p", float("nan")),
                                          ("top_p", float("nan")), ("temperature", float("nan"))])
def test_impossible_rules_are_refused(field: str, value: float) -> None:
    with pytest.raises(EsoError, match=f"{field} = {value}: must be"):
        Rule(**{field: value})


V, T, RARE = 50257, 64, 1e-5  # GPT-2's vocabulary with Zipf's law
ZIPF = 1 / np.arange(1, V + 1)
ZIPF /= ZIPF.sum()


def tail_z(tokens: np.ndarray, positions: int, below: float) -> float:
    """Each of `positions` masks should become a token with probability 1/T: by how many standard errors does the
    number of `tokens` with p < `below` miss what it should be?"""
    share = ZIPF[ZIPF < below].sum() / T
    return ((ZIPF[tokens] < below).sum() - positions * share) / np.sqrt(positions * share * (1 - share))


def test_tail_is_exact() -> None:
    """Positions first, then their tokens: 20 M positions, 310,000 tokens, within 3.5 standard errors (a false alarm in
    1 of 2,000 seeds per check), that is to 1.1% of the mass of the tokens of p < 1e-4 and to 2.9% of those of 3e-6."""
    positions = 20_000_000
    unmasked = int((jax.random.uniform(jax.random.key(0), (positions,)) < 1 / T).sum())
    tokens = np.asarray(many(jax.random.key(1), jnp.log(ZIPF), unmasked))
    for below in (1e-4, RARE, 3e-6):
        assert abs(tail_z(tokens, positions, below)) < 3.5
    surprisal, entropy = -np.log(ZIPF[tokens]), -(ZIPF * np.log(ZIPF)).sum()
    assert abs(surprisal.mean() - entropy) < 3.5 * surprisal.std() / np.sqrt(unmasked)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_tail_of_a_joint_float32_gumbel_draw_is_not() -> None:
    """The trap that positions-first avoids. A token or the mask in one draw, as ancestral samplers do it, loses a third
    of the tokens with p < 1e-4, which hold 36% of the mass, and over half of those with p < 1e-5, which hold 15%. At
    60,000 positions both are near 6 standard errors short, so that the check above, at 3.5, fails."""
    positions, rows = 60_000, 16
    logits = jnp.log(np.append(ZIPF / T, 1 - 1 / T))
    edges = [int((ZIPF >= below).sum()) for below in (1e-4, RARE)]

    @jax.jit
    def group(key: jax.Array) -> jax.Array:
        """0 common, 1 rare, 2 rarer, 3 mask: where jax.random.categorical finds the largest score. (To look for the
        exact place takes as long as the noise.)"""
        scores = jax.random.gumbel(key, (rows, V + 1)) + logits[None]
        return jnp.stack([part.max(-1) for part in jnp.split(scores, [*edges, V], axis=-1)]).argmax(0)

    keys = jax.random.split(jax.random.key(0), positions // rows)
    groups = np.concatenate([group(key) for key in keys])
    exact = np.concatenate([jax.random.categorical(key, logits, shape=(rows,)) for key in keys[:8]])
    np.testing.assert_array_equal(groups[:exact.size], np.digitize(exact, [*edges, V]))
    tokens = np.concatenate([np.full((groups == 1 + i).sum(), edge) for i, edge in enumerate(edges)])
    assert tail_z(tokens, positions, 1e-4) < -3.5
    assert tail_z(tokens, positions, RARE) < -3.5


def test_min_p_keeps_what_is_likely_enough_at_the_temperature() -> None:
    p = np.array([0.5, 0.25, 0.15, 0.0999, 0.0001], np.float32)
    for rule, kept in ((Rule(min_p=0.5), [0, 1]), (Rule(min_p=0.25), [0, 1, 2]),
                       (Rule(min_p=0.25, top_p=0.6), [0, 1]), (Rule(temperature=2.0, min_p=0.5), [0, 1, 2]),
                       (Rule(min_p=1e-5), [0, 1, 2, 3, 4])):
        tokens = np.asarray(many(jax.random.key(0), jnp.log(p), 60_000, rule))
        scaled = np.where(np.isin(np.arange(5), kept), p.astype(np.float64) ** (1 / rule.temperature), 0)
        check_frequencies(tokens, scaled / scaled.sum())


def test_banned_ids_are_never_drawn_and_the_others_keep_their_law() -> None:
    """Before the temperature, the nucleus and min_p are taken, and by greedy draws too."""
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32)
    for rule, kept in ((Rule(banned=(0,)), [1, 2, 3, 4]), (Rule(0.7, banned=(0, 3)), [1, 2, 4]),
                       (Rule(top_p=0.5, banned=(0,)), [1, 2]), (Rule(min_p=0.5, banned=(0,)), [1, 2, 3])):
        tokens = np.asarray(many(jax.random.key(0), jnp.log(p), 60_000, rule))
        scaled = np.where(np.isin(np.arange(5), kept), p.astype(np.float64) ** (1 / rule.temperature), 0)
        check_frequencies(tokens, scaled / scaled.sum())
    assert int(draw(jnp.log(p), jnp.zeros(2), Rule(0.0, banned=(0, 1)))) == 2
    Rule(banned=(0, 1)).check_vocabulary(4, 3)
    for banned, message in (((4,), "banned = 4: ids are in"), ((-1,), "banned = -1"), ((2, 1, 0), "leave a token")):
        with pytest.raises(EsoError, match=message):
            Rule(banned=banned).check_vocabulary(4, 3)
