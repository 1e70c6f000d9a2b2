"""The losses and bounds: their limits, their laws on models small enough to enumerate, and what they are keyed by."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import INTERPRET, brief, engine, random_params, random_tokens, random_weights, tiny_config
from eso_jax import families, likelihood, noise
from eso_jax.config import SETTINGS, Config, TrainConfig
from eso_jax.decoding.order import likelihood_orders
from eso_jax.errors import EsoError
from eso_jax.families import bd3lm, esolm, mdlm
from eso_jax.model import attention, loss, vocabulary
from eso_jax.model.backend import Backend
from eso_jax.model.cudnn import CuDNN
from eso_jax.model.params import Params, Weights, fold
from eso_jax.model.splash import Splash
from eso_jax.noise import Draws
from eso_jax.run.train import init_state, train_step


def draws(batch: int, seed: int = 0) -> Draws:
    return Draws(jax.random.key(seed), jnp.arange(batch), batch)


def config_of(family: str, **fields: object) -> Config:
    if family.startswith("esolm"):
        fields = {"alpha_0": 0.5} | fields
    return tiny_config(family, **({"block_size": 4} if family == "bd3lm" else {}), **fields)


def test_every_family_is_named() -> None:
    assert list(families.BY_NAME) == list(SETTINGS) == ["esolm", "esolm_a", "mdlm", "bd3lm", "ar"]


@pytest.mark.slow
@pytest.mark.parametrize("family", list(families.BY_NAME))
def test_loss_is_the_bound_per_token_on_average(family: str) -> None:
    """With elbo weights, the training loss (over many draws) is the NELBO per token of the same tokens."""
    config = config_of(family)
    weights, row = random_weights(config.model), random_tokens(config, 1)
    many = 4096
    tokens = jnp.tile(row, (many, 1))
    loss = families.get(config).loss(weights, config, tokens, draws(many, 1))
    bound = families.get(config).nelbo(weights, config, tokens, draws(many, 2), families.alpha_0_of(config, None))
    assert loss.keys() == bound.keys()
    for term in loss:
        per_token = np.asarray(bound[term], np.float64) / config.model.length
        error = per_token.std() / np.sqrt(many) * 2  # the loss has half the rows of it
        assert float(loss[term]) == pytest.approx(per_token.mean(), abs=4 * error + 1e-5), term


@pytest.mark.slow
def test_the_loss_of_many_alpha_0_is_the_average_bound() -> None:
    """Over a range whose logarithm is uniform: at the middles of equal parts of it."""
    config = config_of("esolm", alpha_0_range=(0.125, 1.0))
    weights, row = random_weights(config.model), random_tokens(config, 1)
    rows, parts = 2048, 4
    loss = families.get(config).loss(weights, config, jnp.tile(row, (2 * rows, 1)), draws(2 * rows, 1))
    bounds = [families.get(config).nelbo(weights, config, jnp.tile(row, (rows, 1)), draws(rows, 2),
                                         0.125 * 8 ** ((part + 0.5) / parts)) for part in range(parts)]
    for term, value in loss.items():
        per_token = np.stack([bound[term] for bound in bounds]) / config.model.length
        error = float(per_token.std(1).mean()) / np.sqrt(rows) * (1 + parts**-0.5)
        assert float(value) == pytest.approx(float(per_token.mean()), abs=4 * error), term
        assert np.ptp(per_token.mean(1)) > 20 * error  # another distribution has another average


@pytest.mark.slow
@pytest.mark.parametrize("family", [*families.BY_NAME, "many"])
def test_loss_depends_on_the_global_index_alone(family: str) -> None:
    """Micro-batches of a batch see the draws they would have in it, so their losses average to the whole's."""
    config = config_of("esolm", alpha_0_range=(0.25, 1.0)) if family == "many" else config_of(family)
    weights, tokens = random_weights(config.model), random_tokens(config, 8)
    whole = families.get(config).loss(weights, config, tokens, draws(8))
    parts = [families.get(config).loss(weights, config, tokens[low:low + 4],
                                       Draws(jax.random.key(0), jnp.arange(low, low + 4), 8)) for low in (0, 4)]
    for term in whole:
        np.testing.assert_allclose(whole[term], (parts[0][term] + parts[1][term]) / 2, rtol=1e-5)


@pytest.mark.slow
def test_alpha_0_limits() -> None:
    """alpha_0 = 1 is diffusion alone; alpha_0 = 0 is left to right alone and the exact likelihood of that order."""
    one, zero = config_of("esolm", alpha_0=1.0), config_of("esolm", alpha_0=0.0)
    weights, tokens = random_weights(one.model), random_tokens(one, 4)
    assert set(families.get(one).loss(weights, one, tokens, draws(4))) == {"diffusion"}
    assert set(families.get(zero).loss(weights, zero, tokens, draws(4))) == {"sequential"}
    assert set(families.get(one).nelbo(weights, one, tokens, draws(4), 1.0)) == {"diffusion"}
    natural = jnp.tile(jnp.arange(one.model.length), (4, 1))
    exact = -families.get(zero).log_likelihood(weights, zero, tokens, natural).sum(1)
    bound = families.get(zero).nelbo(weights, zero, tokens, draws(4), 0.0)["sequential"]
    np.testing.assert_allclose(bound, exact, rtol=1e-5)
    assert float(families.get(zero).loss(weights, zero, tokens, draws(4))["sequential"]) == pytest.approx(
        float(exact.mean()) / one.model.length, rel=1e-5)


@pytest.mark.slow
def test_a_and_b_differ_only_among_clean_tokens() -> None:
    """Along the natural order with nothing clean, (A) and (B) are one model; with clean tokens they are not."""
    b, a = config_of("esolm"), config_of("esolm_a")
    weights, tokens = random_weights(b.model), random_tokens(b, 4)
    natural = jnp.tile(jnp.arange(b.model.length), (4, 1))
    nothing_clean = jnp.ones_like(tokens, bool)
    half = jnp.arange(b.model.length) >= 6
    for name in ("sequential_nll", "diffusion_nll"):
        def nll(config: Config, masked: jax.Array, name: str = name) -> jax.Array:
            function = jax.jit(getattr(families.get(config), name), static_argnums=1)
            return function(weights, config, tokens, masked, natural)

        np.testing.assert_allclose(nll(a, nothing_clean), nll(b, nothing_clean), rtol=1e-5)
        pair = [nll(config, jnp.tile(half, (4, 1))) for config in (a, b)]
        assert float(jnp.abs(pair[0] - pair[1]).max()) > 1e-3


@pytest.mark.slow
def test_low_var_training_weighs_masked_tokens_alike() -> None:
    """w = 1: the loss is the plain sum over masked tokens, over all tokens."""
    config = config_of("mdlm", loss_weight="low_var")
    weights, tokens = random_weights(config.model), random_tokens(config, 8)
    t = noise.draw_times(draws(8))
    masked = noise.draw_masked(draws(8).per_example(noise.MASK), noise.alpha(t, 1.0)[:, None], config.model.length)
    expected = mdlm.masked_nll(weights, config, tokens, masked).mean()
    loss = families.get(config).loss(weights, config, tokens, draws(8))["diffusion"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_kappa_shares_rows() -> None:
    """kappa = 3/4 gives three rows of four to diffusion, whose times are spread over those rows."""
    config = config_of("esolm", kappa=0.75)
    assert esolm._share(jnp.arange(8), 0, config.family.split).tolist() == [0, 1, 2, 4, 5, 6]
    assert esolm._share(jnp.arange(8), config.family.split, 1).tolist() == [3, 7]
    rank = esolm.diffusion_rank(jnp.array([0, 1, 2, 4, 5, 6]), config.family.split)
    assert rank.tolist() == [0, 1, 2, 3, 4, 5]


def test_bd3lm_block_times_are_spread_in_rows_and_columns() -> None:
    t = bd3lm.block_times(draws(8), 4, 0.0, 1.0)
    for column in t.T:
        assert sorted((np.asarray(column) * 8).astype(int)) == list(range(8))
    for row in t:
        assert sorted((np.asarray(row) * 4).astype(int)) == list(range(4))
    clipped = bd3lm.block_times(draws(8), 4, 0.3, 0.8)
    assert float(clipped.min()) >= 0.3 and float(clipped.max()) <= 0.8


def toy(family: str, **fields: object) -> tuple[Config, Weights, jax.Array]:
    """Three tokens over a vocabulary of three and the mask; all 27 sequences."""
    config = tiny_config(family, length=3, vocab_size=4, **fields)
    everything = jnp.array(list(itertools.product(range(3), repeat=3)), jnp.int32)
    return config, random_weights(config.model, scale=0.3), everything


@pytest.mark.slow
def test_exact_likelihood_is_normalized_for_every_order() -> None:
    config, weights, everything = toy("esolm")
    for order in itertools.permutations(range(3)):
        orders = jnp.tile(jnp.array(order), (27, 1))
        logp = families.get(config).log_likelihood(weights, config, everything, orders).sum(1)
        assert float(jnp.exp(logp).sum()) == pytest.approx(1, abs=1e-5)


def test_ar_is_normalized() -> None:
    config, weights, everything = toy("ar")
    nelbo = jax.jit(families.get(config).nelbo, static_argnums=(1, 4))
    nll = nelbo(weights, config, everything, draws(27), 1.0)["sequential"]
    assert float(jnp.exp(-nll).sum()) == pytest.approx(1, abs=1e-5)


def true_nll(config: Config, weights: Weights, everything: jax.Array) -> np.ndarray:
    """-log E_order p(x | order), orders uniform, by enumeration: the law of decoding in random order."""
    orders = np.array(list(itertools.permutations(range(3))))
    scored = likelihood.log_prob(engine(config, weights), np.asarray(everything),
                                 np.repeat(orders[:, None], len(everything), axis=1))
    if config.family.name == "esolm":
        logp = scored
    else:  # MDLM: one pass per token, here by hand
        logp = np.zeros((len(orders), len(everything)))
        for index, order in enumerate(orders):
            for i in range(3):
                masked = jnp.isin(jnp.arange(3), order[i:])
                nll = mdlm.masked_nll(weights, config, everything, jnp.tile(masked, (len(everything), 1)))
                logp[index] -= np.asarray(nll)[:, order[i]]
        np.testing.assert_allclose(scored, logp, atol=1e-5)
    return -(np.logaddexp.reduce(logp, axis=0) - np.log(len(orders)))


@pytest.mark.slow
def test_mdlm_nelbo_is_above_the_true_nll() -> None:
    config, weights, everything = toy("mdlm")
    truth = true_nll(config, weights, everything)
    assert np.exp(-truth).sum() == pytest.approx(1, abs=1e-4)
    rows = 2048
    nelbo = families.get(config).nelbo
    bound = np.array([np.asarray(nelbo(weights, config, jnp.tile(x, (rows, 1)), draws(rows), 1.0)["diffusion"])
                      for x in everything], np.float64)
    error = bound.std(1) / np.sqrt(rows)
    assert (bound.mean(1) > truth - 3 * error).all()
    assert (bound.mean(1) - truth).mean() > 3 * np.sqrt((error**2).mean() / len(error))  # and not by luck


@pytest.mark.slow
@pytest.mark.parametrize("alpha_0", [0.5, 1.0])
def test_importance_weighted_bound_falls_to_the_truth(alpha_0: float) -> None:
    """-E[bound] decreases in K, stays above the enumerated -log p, and comes near it."""
    config, weights, everything = toy("esolm", alpha_0=alpha_0)
    trials, most = 400, 64
    row = everything[5]
    orders = likelihood_orders(jax.random.key(1), most, trials, 3, alpha_0)
    logp = likelihood.log_prob(engine(config, weights, trials), np.tile(row, (trials, 1)), np.asarray(orders))
    bounds = {count: -likelihood.iw_bound(logp[:count])[0] for count in (1, 2, 4, 16, 64)}
    means = [bound.mean() for bound in bounds.values()]
    assert all(more > less for more, less in itertools.pairwise(means))
    many = likelihood_orders(jax.random.key(2), 4096, 1, 3, alpha_0)
    [estimate], [error] = likelihood.iw_bound(likelihood.log_prob(engine(config, weights), np.asarray(row)[None],
                                                                  np.asarray(many)))
    truth = true_nll(config, weights, row[None])[0] if alpha_0 == 1 else -estimate
    assert -estimate == pytest.approx(truth, abs=4 * float(error))
    assert truth - 4 * error < means[-1] < truth + 0.1 * (means[0] - truth)


def test_iw_bound_standard_error() -> None:
    """The delta method's error matches the spread over repetitions."""
    rng = np.random.default_rng(0)
    logp = rng.normal(-50, 0.5, (200, 2000)).astype(np.float32)
    bound, error = likelihood.iw_bound(logp)
    assert error.mean() == pytest.approx(bound.std(), rel=0.1)
    assert np.isnan(likelihood.iw_bound(logp[:1])[1]).all()


def test_esolm_sampler_follows_the_exact_law() -> None:
    """alpha_0 = 0 is decoded left to right: empirical frequencies of all 27 sequences against exact probabilities.

    Chi-square with 26 degrees of freedom at a fixed seed; above 54 by chance once in 1,000 seeds.
    """
    config, weights, everything = toy("esolm", alpha_0=0.0)
    natural = jnp.tile(jnp.arange(3), (27, 1))
    log_likelihood = jax.jit(families.get(config).log_likelihood, static_argnums=1)
    p = np.exp(np.asarray(log_likelihood(weights, config, everything, natural).sum(1), np.float64))
    count = 20000
    plan = families.BY_NAME["esolm"].plan(jax.random.key(0), config, count, 1, 0.0)
    tokens = np.asarray(families.sample(weights, config, plan, jax.random.key(1)))
    seen = np.bincount(tokens @ np.array([9, 3, 1]), minlength=27)
    assert ((seen - count * p) ** 2 / (count * p)).sum() < 54


@pytest.mark.slow
def test_gradients_reach_every_parameter() -> None:
    """AdaLN is folded, not lost: the conditioning MLP and each modulation get gradients."""
    config = config_of("esolm")
    params, tokens = random_params(config.model), random_tokens(config, 4)

    def loss(params: Params) -> jax.Array:
        terms = families.BY_NAME["esolm"].loss(fold(config.model, params), config, tokens, draws(4))
        return terms["diffusion"] + terms["sequential"]

    for name, gradient in jax.grad(loss)(params).items():
        assert float(jnp.abs(gradient).max()) > 1e-6, name


@pytest.mark.slow
def test_dropout_changes_training_and_not_bounds() -> None:
    dry = config_of("esolm")
    wet = dataclasses.replace(dry, model=dataclasses.replace(dry.model, dropout=0.5))
    weights, tokens = random_weights(dry.model), random_tokens(dry, 4)
    family = families.get(dry)
    assert family.loss(weights, dry, tokens, draws(4)) != family.loss(weights, wet, tokens, draws(4))
    for term, value in family.nelbo(weights, dry, tokens, draws(4), 0.5).items():
        np.testing.assert_array_equal(value, family.nelbo(weights, wet, tokens, draws(4), 0.5)[term])


@pytest.mark.parametrize(("family", "call", "message"), [
    ("mdlm", lambda f, w, c, x: f.log_likelihood(w, c, x, x), "L passes"),
    ("bd3lm", lambda f, w, c, x: f.log_likelihood(w, c, x, x), "L passes"),
    ("bd3lm", lambda f, w, c, x: f.plan(jax.random.key(0), c, 1, 4), "give a multiple of 3"),
    ("ar", lambda f, w, c, x: f.plan(jax.random.key(0), c, 1, 4, 1.0, "balanced"), "left to right; leave it out"),
    ("mdlm", lambda f, w, c, x: f.nelbo(w, c, x, draws(1), 0.5), "alpha_0 = 0.5"),
])
def test_what_a_family_lacks_is_said(family: str, call: object, message: str) -> None:
    config = config_of(family)
    weights, tokens = random_weights(config.model), random_tokens(config, 1)
    with pytest.raises(EsoError, match=message):
        call(families.get(config), weights, config, tokens)  # type: ignore[operator]


def test_only_natural_orders_are_scored_where_others_have_no_meaning() -> None:
    config = config_of("esolm_a")
    weights, tokens = random_weights(config.model), np.asarray(random_tokens(config, 2))
    natural = np.tile(np.arange(config.model.length), (1, 2, 1))
    assert np.isfinite(likelihood.log_prob(engine(config, weights), tokens, natural)).all()
    with pytest.raises(EsoError, match="only the natural order"):
        likelihood.log_prob(engine(config, weights), tokens, natural[:, :, ::-1])


def test_nll_in_chunks_equals_nll_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("ar")
    weights, tokens = random_weights(config.model), random_tokens(config, 4)
    hidden = jax.random.normal(jax.random.key(0), (4, config.model.length, config.model.width))

    def found() -> tuple[jax.Array, jax.Array]:
        def total(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            nll = vocabulary.nll(weights, hidden, tokens, config.model.mask)
            return nll.sum(), nll

        return jax.jit(jax.grad(total, has_aux=True))(hidden)

    whole = found()
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 4 * 2 * config.model.vocab_size)
    for ours, theirs in zip(found(), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(families.BY_NAME))
def test_bfloat16_is_close_to_float32(family: str) -> None:
    config = config_of(family)
    params, tokens = random_params(config.model, scale=0.1), random_tokens(config, 8)
    losses = [sum(families.get(config).loss(fold(config.model, params, dtype), config, tokens,
                                            draws(8)).values()) for dtype in (jnp.float32, jnp.bfloat16)]
    assert losses[0].dtype == losses[1].dtype == jnp.float32
    np.testing.assert_allclose(*losses, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("family,fields", [("esolm", {"alpha_0": 0.75}), ("esolm_a", {"alpha_0": 0.75}),
                                           ("esolm", {"alpha_0_range": (0.5, 1.0)})], ids=["B", "A", "many"])
def test_what_the_loss_leaves_out_changes_nothing(family: str, fields: dict[str, Any],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients with the clean tokens of the noisy copy and without; and with where there is no room."""
    config = config_of(family, **fields)
    params, tokens = random_params(config.model), random_tokens(config, 4)
    monkeypatch.setattr(loss, "slots_for", lambda share, length: 8)  # of 12

    def gradient(one: families.Family, seed: int) -> Any:
        def total(params: Params) -> jax.Array:
            return jnp.stack(list(one.loss(fold(config.model, params), config, tokens, draws(4, seed)).values())).sum()

        return jax.value_and_grad(total)(params)

    slim = families.get(config)
    whole = [slim.without_skips(config, draws(4, seed)) for seed in range(20)]
    overflows = [bool(found[1]) for found in whole]
    fitting = overflows.index(False)
    chex.assert_trees_all_close(gradient(slim, fitting), gradient(whole[0][0], fitting), rtol=1e-5, atol=1e-6)
    assert slim.skip(config) == 4 and whole[0][0].skip(config) == 0

    # In a training step, rows that need more get it.
    def gradient_norm(family: families.Family) -> float:
        monkeypatch.setitem(families.BY_NAME, config.family.name, family)
        run = dataclasses.replace(config, train=TrainConfig(batch_size=4, compute_dtype="float32", warmup=0))
        _, metrics = jax.jit(functools.partial(train_step, run))(init_state(run, params), tokens)
        return float(metrics["gradient_norm"])

    monkeypatch.setattr(loss, "slots_for", lambda share, length: 1)
    assert bool(slim.without_skips(config, draws(4, fitting))[1])
    found = gradient_norm(slim)
    np.testing.assert_allclose(found, gradient_norm(whole[0][0]), rtol=1e-5)


@pytest.mark.parametrize(("backend", "length"), [
    pytest.param(CuDNN("xla"), 12, id="cudnn"),
    pytest.param(Splash(interpret=True), 128, id="splash",
                 marks=pytest.mark.skipif(not INTERPRET, reason="for TPUs"))])
@pytest.mark.parametrize("family", brief(families.BY_NAME, "ar"))
def test_losses_by_fused_kernels_are_those_of_plain_attention(family: str, backend: Backend, length: int,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """And their gradients, of each parameter in norm. In float32: cuDNN's construction by XLA, splash interpreted; what
    they refuse is plain."""
    config = dataclasses.replace(config_of(family), model=tiny_config(length=length).model)
    params, tokens = random_params(config.model), random_tokens(config, 4)

    def total(params: Params) -> jax.Array:
        terms = families.get(config).loss(fold(config.model, params), config, tokens, draws(4))
        return jnp.stack(list(terms.values())).sum()

    def values() -> Any:
        return jax.jit(jax.value_and_grad(lambda params: total(params)))(params)

    plain, plain_gradients = values()
    used: list[Any] = []
    monkeypatch.setattr(attention, "BACKENDS", (backend, *attention.BACKENDS))
    kernel = type(backend).kernel
    monkeypatch.setattr(type(backend), "kernel", lambda *args: used.append(args) or kernel(*args))
    fused, fused_gradients = values()
    assert bool(used) == (family != "bd3lm" or backend.name == "splash")
    assert float(fused) == pytest.approx(float(plain), rel=1e-6)
    for name, gradient in plain_gradients.items():
        assert jnp.linalg.norm(fused_gradients[name] - gradient) <= 1e-5 * jnp.linalg.norm(gradient), name
