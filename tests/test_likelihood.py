"""Likelihoods of orders, conditionals and running bounds, on models small enough to enumerate.

The laws of the bound itself are in tests/test_families.py.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import engine, random_tokens, random_weights, tiny_config
from eso_jax import families, likelihood
from eso_jax.config import Config
from eso_jax.decoding.order import likelihood_orders
from eso_jax.engine import importance, perplexity
from eso_jax.errors import EsoError
from eso_jax.families import mdlm
from test_families import draws, toy


@pytest.mark.slow
def test_mdlms_any_order_bound_at_one_order_is_its_nelbo() -> None:
    """The NELBO's integral over t and masks, done exactly: masks of m of L tokens have the weight B(m, L - m + 1). It
    is the mean over orders of -log p decoded one by one, and the Monte Carlo NELBO is within 4 standard errors."""
    config, weights, everything = toy("mdlm")
    row, trials = np.asarray(everything[5])[None], 4096
    orders = np.array(list(itertools.permutations(range(3))))[:, None]
    one = -likelihood.log_prob(engine(config, weights), row, orders)[:, 0].mean()
    exact = 0.0
    for flags in itertools.product([False, True], repeat=3):
        if m := sum(flags):
            beta = math.gamma(m) * math.gamma(3 - m + 1) / math.gamma(4)
            exact += beta * float(mdlm.masked_nll(weights, config, jnp.asarray(row), jnp.array([flags])).sum())
    assert one == pytest.approx(exact, rel=1e-5)
    rows = jnp.tile(everything[5], (trials, 1))
    nelbo = np.asarray(families.get(config).nelbo(weights, config, rows, draws(trials), 1.0)["diffusion"])
    assert nelbo.mean() == pytest.approx(exact, abs=4 * nelbo.std() / np.sqrt(trials))


@pytest.mark.slow
def test_bd3lms_likelihood_is_normalized_within_its_blocks(tmp_path: Path) -> None:
    config = tiny_config("bd3lm", length=4, vocab_size=3, block_size=2)
    weights = random_weights(config.model)
    everything = np.array(list(itertools.product(range(2), repeat=4)))
    for order in ([1, 0, 2, 3], [0, 1, 3, 2]):
        logp = likelihood.log_prob(engine(config, weights), everything, np.tile(order, (1, 16, 1)))
        assert np.exp(logp).sum() == pytest.approx(1, abs=1e-5)
    drawn = np.asarray(likelihood_orders(jax.random.key(0), 50, 2, 4, 1.0, block=2))
    assert {tuple(order) for order in drawn.reshape(-1, 4)} == {(0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (1, 0, 3, 2)}
    scores = importance.log_prob(engine(config, weights), everything, 3, 1.0, 0, tmp_path / "partial")
    assert scores.shape == (3, 16) and (scores < 0).all()
    with pytest.raises(EsoError, match="no order may leave its block"):
        likelihood.log_prob(engine(config, weights), everything, np.tile([0, 2, 1, 3], (1, 16, 1)))


def test_conditionals_are_ratios_of_the_law_of_their_order() -> None:
    """log p(x_2 | x_0) of three tokens, against sums over all sequences decoded in the order 0, 2, 1."""
    config, weights, everything = toy("esolm")
    logp = likelihood.log_prob(engine(config, weights), np.asarray(everything), np.tile([0, 2, 1], (1, 27, 1)))[0]
    p = np.exp(logp.astype(np.float64)).reshape(3, 3, 3)  # by x_0, x_1, x_2
    ratio = p.sum(1) / p.sum((1, 2))[:, None]
    given, wanted = (np.tile(flags, (27, 1)) for flags in ([True, False, False], [False, False, True]))
    found = likelihood.conditional(engine(config, weights), np.asarray(everything), given, wanted)
    x = np.asarray(everything)
    np.testing.assert_allclose(found, np.log(ratio)[x[:, 0], x[:, 2]], atol=1e-5)
    whole = likelihood.conditional(engine(config, weights), x, np.zeros_like(given), np.ones_like(given))
    natural = likelihood.log_prob(engine(config, weights), x, np.tile([0, 1, 2], (1, 27, 1)))[0]
    np.testing.assert_allclose(whole, natural, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["esolm", "ar"])
def test_conditionals_by_token_and_what_greedy_decoding_takes(family: str) -> None:
    """Against the likelihood of the same order with each token in turn replaced by every other."""
    config = tiny_config(family, length=5, vocab_size=4)
    weights = random_weights(config.model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (6, 5))
    given = rng.random((6, 5)) < 0.4 if family == "esolm" else np.arange(5) < rng.integers(0, 4, (6, 1))
    wanted = ~given & (np.arange(5) < 4)
    orders = np.argsort(np.where(given, 0, np.where(wanted, 1, 2)), axis=1, kind="stable")
    found = likelihood.conditionals(engine(config, weights, 4), tokens, given, wanted)
    log_likelihood = families.get(config).log_likelihood
    for row, position in np.argwhere(wanted):
        others = np.tile(tokens[row], (3, 1))
        others[:, position] = range(3)
        by_token = log_likelihood(weights, config, jnp.asarray(others), jnp.tile(jnp.asarray(orders[row]), (3, 1)))
        logp = np.asarray(by_token)[:, orders[row].tolist().index(position)]
        assert np.exp(logp).sum() == pytest.approx(1, abs=1e-5)
        assert found.logp[row, position] == pytest.approx(logp[tokens[row, position]], abs=1e-5)
        assert found.greedy[row, position] == (logp.argmax() == tokens[row, position])
    assert not found.logp[~wanted].any() and found.greedy[~wanted].all() and not found.greedy.all()
    total = likelihood.conditional(engine(config, weights), tokens, given, wanted)
    np.testing.assert_allclose(total, found.logp.sum(1), rtol=1e-5)


def test_conditional_mistakes() -> None:
    config, weights, everything = toy("esolm")
    x, none = np.asarray(everything[:2]), np.zeros((2, 3), bool)
    for given, wanted, message in ((none[:, :2], none, "given = 'bool"), (none, none.astype(int), "wanted = 'int64"),
                                   (~none, ~none, "either given or wanted")):
        with pytest.raises(EsoError, match=message):
            likelihood.conditional(engine(config, weights), x, given, wanted)
    prefix = np.tile([True, False, False], (2, 1))
    ar = toy("ar")[0]
    assert np.isfinite(likelihood.conditional(engine(ar, weights), x, prefix, ~prefix)).all()
    with pytest.raises(EsoError, match="must be a prefix"):
        likelihood.conditional(engine(ar, weights), x, prefix[:, ::-1].copy(), prefix)
    with pytest.raises(EsoError, match="only an Eso-LM"):
        likelihood.conditional(engine(toy("mdlm")[0], weights), x, prefix, ~prefix)


@pytest.mark.slow
def test_a_stopped_importance_weighted_bound_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stopped after some groups and started again equals what was not; others' partial results are refused."""
    config, weights, everything = toy("esolm")
    x, partial = np.asarray(everything[:5]), tmp_path / "s.npz.partial"
    model = engine(config, weights, 10)
    arguments = (model, x, 23, 0.5, 3)
    whole = importance.log_prob(*arguments, tmp_path / "other")
    assert whole.shape == (23, 5)
    inner, calls = likelihood.log_prob, []

    def stop(*args: object) -> np.ndarray:
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return inner(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(likelihood, "log_prob", stop)
    with pytest.raises(KeyboardInterrupt):
        importance.log_prob(*arguments, partial)
    with np.load(partial) as kept:
        np.testing.assert_array_equal(kept["logp_per_order"], whole[:6])
    others = random_weights(config.model, seed=1)
    for changed in ((engine(config, others, 10), x, 23, 0.5, 3), (model, x, 23, 0.25, 3), (model, x, 23, 0.5, 4),
                    (model, x[::-1].copy(), 23, 0.5, 3)):
        with pytest.raises(EsoError, match="another model, other tokens"):
            importance.log_prob(*changed, partial)
    np.testing.assert_array_equal(importance.log_prob(*arguments, partial), whole)
    assert len(calls) == 4 + 9
    few = importance.log_prob(model, x, 2, 0.5, 3, partial)  # loses none that are there
    np.testing.assert_array_equal(few, whole)
    for damage in (b"damaged", partial.read_bytes()[:200]):
        partial.write_bytes(damage)
        with pytest.raises(EsoError, match="not a partial result"):
            importance.log_prob(*arguments, partial)


def test_a_mistake_leaves_no_partial_result(tmp_path: Path) -> None:
    config, weights, everything = toy("esolm_a", alpha_0=0.5)
    with pytest.raises(EsoError, match="only the natural order"):
        importance.log_prob(engine(config, weights), np.asarray(everything), 2, 1.0, 0, tmp_path / "partial")
    assert not (tmp_path / "partial").exists()


@pytest.mark.slow
def test_what_does_not_change_the_law_compiles_nothing() -> None:
    """Scores, conditionals and bounds of runs that differ in their training, their data and their name for it."""
    def use(config: Config) -> None:
        model = engine(config, random_weights(config.model))
        tokens = np.asarray(random_tokens(config, 2))
        flags = np.arange(config.model.length)[None].repeat(2, 0) < 3
        likelihood.log_prob(model, tokens, np.arange(config.model.length)[None, None].repeat(2, 1))
        likelihood.conditionals(model, tokens, flags, ~flags)
        perplexity.nelbo_per_window(model, tokens, 0.5, jax.random.key(0))

    config = tiny_config("esolm", alpha_0=0.5)
    functions = (likelihood.log_prob_in_order, likelihood._conditionals, perplexity._estimate)
    use(config)
    before = [function._cache_size() for function in functions]
    use(config.override("train.log_every=7", "data.source=elsewhere", "train.batch_size=6", "train.remat=full",
                        "train.learning_rate=1"))
    assert [function._cache_size() for function in functions] == before
    use(config.override("family.kappa=0.25", "train.batch_size=8"))  # the count does count
    assert [function._cache_size() for function in functions] == [n + 1 for n in before]
