"""Every array of cases.npz: our numbers against the authors' code. A failure here means a convention has changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from conftest import Golden, engine, golden, renamed
from eso_jax import families, likelihood, noise
from eso_jax.decoding import categorical, check
from eso_jax.decoding.order import sort
from eso_jax.decoding.plan import Plan
from eso_jax.families import ar, bd3lm, mdlm
from eso_jax.model import masks, transformer
from eso_jax.model.masks import View

Cases = dict[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True, ids=["own names", "other names"],
                params=["", pytest.param("x_", marks=pytest.mark.slow)])
def prefix(request: pytest.FixtureRequest) -> Iterator[str]:
    """Before the names of all families: no number may depend on them."""
    with renamed(request.param):
        yield request.param


@pytest.fixture(scope="module")
def eso(prefix: str) -> Golden:
    return golden("eso", f"{prefix}esolm")


def logits_close(ours: object, theirs: np.ndarray) -> None:
    """Logits to 1e-4, but for the mask's, which ours never leaves open."""
    np.testing.assert_allclose(np.asarray(ours)[..., :-1], theirs[..., :-1], atol=1e-4, rtol=0)


def sums_close(ours: object, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.sum(ours), theirs.sum(), rtol=1e-4)


def masked_of(cases: Cases, name: str, model: Golden) -> np.ndarray:
    return cases[name] == model.config.model.mask


@pytest.mark.parametrize("case", ["eso_b_diffusion", "eso_a_diffusion", "mdlm"])
def test_single_stream_logits(case: str, eso: Golden, cases: Cases) -> None:
    order, zt = (jnp.asarray(cases[f"{case}/{name}"]) for name in ("order", "zt"))
    clean = (zt != eso.config.model.mask).sum(1)
    pattern = {"eso_b_diffusion": masks.CAUSAL, "mdlm": masks.EVERYONE, "eso_a_diffusion": masks.PREFIX}[case]
    hidden, _ = transformer.trunk(eso.weights, sort(zt, order), order, View(pattern, clean))
    logits_close(transformer.head(eso.weights, hidden, eso.config.model.mask), cases[f"{case}/logits_in_order"])


@pytest.mark.parametrize("case", ["eso_b_sequential", "eso_a_sequential"])
def test_two_stream_logits(case: str, eso: Golden, cases: Cases) -> None:
    order, z0, x = (jnp.asarray(cases[name]) for name in (f"{case}/order", f"{case}/z0", "x0"))
    view = View(masks.TwoStreams(prefix="_a_" in case), (z0 != eso.config.model.mask).sum(1))
    hidden, _ = transformer.trunk(eso.weights, jnp.concatenate([sort(z0, order), sort(x, order)], 1),
                                  jnp.concatenate([order, order], 1), view)
    logits = transformer.head(eso.weights, hidden[:, :x.shape[1]], eso.config.model.mask)
    logits_close(logits, cases[f"{case}/logits_in_order"])


@pytest.mark.parametrize(("case", "family"), [("eso_b_diffusion", "esolm"), ("eso_a_diffusion", "esolm_a")])
def test_esolm_diffusion_losses(case: str, family: str, prefix: str, cases: Cases) -> None:
    model = golden("eso", prefix + family)
    nll = families.get(model.config).diffusion_nll(model.weights, model.config, jnp.asarray(cases["x0"]),
                              jnp.asarray(masked_of(cases, f"{case}/zt", model)), jnp.asarray(cases[f"{case}/order"]))
    t, alpha_0 = jnp.asarray(cases[f"{case}/t"]), float(cases[f"{case}/alpha_0"])
    np.testing.assert_allclose(noise.alpha(t, alpha_0), cases[f"{case}/alpha_t"], rtol=1e-5)
    sums_close(nll, cases[f"{case}/nll_low_var_in_order"])
    sums_close(nll * noise.elbo_weight(t, alpha_0)[:, None], cases[f"{case}/nll_elbo_in_order"])


def test_mdlm_losses(prefix: str, cases: Cases) -> None:
    model = golden("eso", f"{prefix}mdlm")
    nll = mdlm.masked_nll(model.weights, model.config, jnp.asarray(cases["x0"]),
                          jnp.asarray(masked_of(cases, "mdlm/zt", model)))
    t = jnp.asarray(cases["mdlm/t"])
    np.testing.assert_array_equal(cases["mdlm/order"], np.tile(np.arange(nll.shape[1]), (len(nll), 1)))
    np.testing.assert_allclose(noise.alpha(t, float(cases["mdlm/alpha_0"])), cases["mdlm/alpha_t"], rtol=1e-5)
    sums_close(nll, cases["mdlm/nll_low_var_in_order"])
    sums_close(nll * noise.elbo_weight(t, 1.0)[:, None], cases["mdlm/nll_elbo_in_order"])


@pytest.mark.parametrize(("case", "family"), [("eso_b_sequential", "esolm"), ("eso_a_sequential", "esolm_a")])
def test_esolm_sequential_losses(case: str, family: str, prefix: str, cases: Cases) -> None:
    model = golden("eso", prefix + family)
    nll = families.get(model.config).sequential_nll(model.weights, model.config, jnp.asarray(cases["x0"]),
                               jnp.asarray(masked_of(cases, f"{case}/z0", model)), jnp.asarray(cases[f"{case}/order"]))
    sums_close(nll, cases[f"{case}/nll_in_order"])


def test_orders_are_what_our_own_drawing_would_give(cases: Cases, eso: Golden) -> None:
    """Clean tokens first; the sequential pass has its masks ascending, and (A)'s clean tokens too."""
    for case, noisy in (("eso_b_diffusion", "zt"), ("eso_a_diffusion", "zt"), ("eso_b_sequential", "z0"),
                        ("eso_a_sequential", "z0")):
        order = cases[f"{case}/order"]
        masked = np.take_along_axis(masked_of(cases, f"{case}/{noisy}", eso), order, 1)
        assert (np.diff(masked.astype(int), axis=1) >= 0).all()
        for row, flags in zip(order, masked, strict=True):
            assert "sequential" not in case or (np.diff(row[flags]) > 0).all()
            assert case != "eso_a_sequential" or (np.diff(row[~flags]) > 0).all()


def test_exact_likelihood_and_importance_weighted_bound(eso: Golden, cases: Cases) -> None:
    orders = cases["exact/orders"]
    by_token = families.get(eso.config).log_likelihood(eso.weights, eso.config, jnp.asarray(cases["x0"]),
                                                       jnp.asarray(orders[0]))
    sums_close(by_token, cases["exact/logp_in_order"])
    logp = likelihood.log_prob(engine(eso.config, eso.unstacked), cases["x0"], orders)
    sums_close(logp, cases["exact/logp_per_order"])
    sums_close(likelihood.iw_bound(logp)[0], cases["exact/iw_bound"])


@pytest.mark.parametrize("per_step", ["golden", "one"])
def test_cached_sampler_forced_to_x0(per_step: str, eso: Golden, cases: Cases) -> None:
    """With 3, 1, 4, 2, 5, 1 tokens per step, and with one; after each step its tokens are set to x0's."""
    if per_step == "golden":
        order, expected = cases["sampler/order"], cases["sampler/logits_in_order"]
        counts = cases["sampler/tokens_per_step"].astype(np.int64)
        assert counts.tolist() == [3, 1, 4, 2, 5, 1]
    else:
        order, expected = cases["exact/orders"][0], cases["sampler/one_token_per_step_logits_in_order"]
        counts = np.ones(order.shape[1], np.int64)
    sampler = families.get(eso.config).sampler(eso.config)
    plan, x = Plan(jnp.asarray(order), counts), sort(jnp.asarray(cases["x0"]), jnp.asarray(order))
    logits = np.concatenate(list(check.forced_logits(eso.unstacked, eso.config.model, sampler, plan, x)), axis=1)
    logits_close(logits, expected)
    if per_step == "one":
        logp = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
        sums_close(np.take_along_axis(logp, np.asarray(x)[..., None], -1)[..., 0], cases["exact/logp_in_order"])


def test_nucleus(cases: Cases) -> None:
    logits = jnp.asarray(cases["nucleus/logits"])
    kept = categorical.nucleus(jnp.exp(logits - logits.max(-1, keepdims=True)), 0.9)
    np.testing.assert_array_equal(kept, cases["nucleus/keep_top_p_0.9"])


def test_ar(prefix: str, cases: Cases) -> None:
    model, x = golden("ar", f"{prefix}ar"), jnp.asarray(cases["x0"])
    assert model.config.model.cond_dim == 0
    inputs = x[:, :-1]
    hidden, _ = transformer.trunk(model.weights, inputs, transformer.natural_positions(inputs),
                                  View(masks.CAUSAL))
    logits_close(transformer.head(model.weights, hidden, model.config.model.mask), cases["ar/logits"])
    sums_close(ar.next_token_nll(model.weights, model.config, inputs, x[:, 1:]), cases["ar/nll"])


def test_bd3lm(prefix: str, cases: Cases) -> None:
    model, x, zt = golden("bd3lm", f"{prefix}bd3lm"), jnp.asarray(cases["x0"]), jnp.asarray(cases["bd3lm/zt"])
    assert model.config.family.block_size == 4
    positions = transformer.natural_positions(x)
    hidden, _ = transformer.trunk(model.weights, jnp.concatenate([zt, x], 1), jnp.concatenate([positions] * 2, 1),
                                  View(masks.TwoStreams(4)))
    logits = transformer.head(model.weights, hidden[:, :x.shape[1]], model.config.model.mask)
    logits_close(logits, cases["bd3lm/logits"])
    masked = jnp.asarray(masked_of(cases, "bd3lm/zt", model))
    sums_close(bd3lm.masked_nll(model.weights, model.config, x, masked) / cases["bd3lm/t"], cases["bd3lm/nll"])


def test_every_case_is_covered(cases: Cases) -> None:
    """A golden nobody reads is a convention nobody checks."""
    source = Path(__file__).read_text()
    for name in cases:
        case, _, part = name.partition("/")
        assert case in source and (not part or part in source), name
