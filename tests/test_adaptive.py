"""Decoders that decide as they go, with a real model: what is known of each token, and who needs whom."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from conftest import brief, engine, random_weights, tiny_config
from eso_jax import families, likelihood
from eso_jax.decoding.adaptive import Entropy
from eso_jax.engine.model import Model, Samples
from eso_jax.errors import EsoError

LENGTH, VOCABULARY = 8, 9
DECODERS = ("entropy:1", "confidence:0.5", "likeliest:3", "margin:3")


def model_of(name: str) -> Model:
    config = tiny_config(name, LENGTH, VOCABULARY)
    made = engine(config, random_weights(config.model))
    return Model(config, made.weights, made.mesh, 4, step=0, tokenizer=None)


def along(x: np.ndarray, samples: Samples) -> np.ndarray:
    """From natural positions to the order."""
    return np.take_along_axis(x, samples.order, axis=1)


@pytest.mark.parametrize("name", brief(["esolm", "mdlm"], "esolm"))
@pytest.mark.parametrize("decoder", DECODERS[:2])
def test_samples_have_the_law_of_the_widths_that_were_found(name: str, decoder: str) -> None:
    """Widths differ, and log p of each token as it was drawn is what the plan of these widths says."""
    model = model_of(name)
    samples = model.sample(6, decoder=decoder, record=True, top_p=0.9)
    assert samples.record is not None and samples.tokens_per_step.ndim == 2
    assert (samples.tokens_per_step.sum(1) == LENGTH).all() and 1 < samples.passes.mean() < LENGTH
    assert (samples.tokens < VOCABULARY - 1).all()
    assert samples.caption is not None and samples.caption.decoder == decoder.split(":")[0]
    begin = np.pad(samples.plan.first, [(0, 0), (1, 0)])[:, :-1] * (name == "esolm")  # the tokens decoded last
    np.testing.assert_array_equal(samples.caption.window[..., 0], begin)
    width = 16 if name == "esolm" else LENGTH
    np.testing.assert_array_equal(np.diff(samples.caption.window)[..., 0], width * (samples.tokens_per_step > 0))
    expected = likelihood.plan_log_prob(model, samples.tokens, samples.plan)
    np.testing.assert_allclose(along(samples.record.logp, samples), expected, atol=1e-5)
    if decoder.startswith("entropy"):
        entropy, step = along(samples.record.entropy, samples), along(samples.record.step, samples)
        for row, steps in zip(entropy, step, strict=True):
            for number in range(steps.max() + 1):
                assert row[steps == number].sum() - row[steps == number].max() <= 1 + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS[2:])
def test_each_place_is_looked_at_as_if_it_came_next(decoder: str) -> None:
    """log p of each token as it was drawn is the sequential one given the passes before, whatever else the pass did."""
    model = model_of("esolm")
    samples = model.sample(4, decoder=decoder, record=True)
    assert samples.record is not None and (samples.passes == 3).all()
    assert samples.caption is not None and (samples.caption.window == [0, LENGTH]).all()
    assert (np.sort(samples.order, axis=1) == np.arange(LENGTH)).all()
    assert (samples.tokens_per_step == [3, 3, 2]).all()
    for slot in range(LENGTH):
        before = slot // 3 * 3  # slots of earlier passes
        order = np.concatenate([samples.order[:, :before], samples.order[:, slot:slot + 1],
                                samples.order[:, before:slot], samples.order[:, slot + 1:]], axis=1)
        expected = families.get(model.config).log_likelihood(model.weights, model.config, jnp.asarray(samples.tokens),
                                                             jnp.asarray(order))[:, before]
        np.testing.assert_allclose(along(samples.record.logp, samples)[:, slot], expected, atol=1e-5)


@pytest.mark.parametrize("decoder", brief(DECODERS, "entropy:1", "likeliest:3"))
def test_a_row_alone_is_what_it_is_among_others(decoder: str) -> None:
    model = model_of("esolm")
    given = np.full((3, LENGTH), model.config.model.mask)
    given[1, [1, 5]], given[2, :LENGTH - 1] = (1, 2), 3
    among = model.sample(1, given=given, decoder=decoder)
    for row in range(3):
        alone = model.sample(1, given=given[row:row + 1], decoder=decoder)
        np.testing.assert_array_equal(alone.tokens, among.tokens[row:row + 1])
        np.testing.assert_array_equal(alone.order, among.order[row:row + 1])
        assert alone.passes == among.passes[row]
    assert among.passes[2] == 1


@pytest.mark.parametrize("decoder", DECODERS[2:])
def test_of_equally_certain_tokens_the_next_of_the_order_is_taken(decoder: str) -> None:
    """MDLM's first pass sees masks alone, so that all places are the same to it, but for rounding errors."""
    model = model_of("mdlm")
    found, plan = model.sample(16, decoder=decoder), model.sample(16, plan="one-by-one").plan
    np.testing.assert_array_equal(found.order[:, :3], np.asarray(plan.order)[:, :3])


@pytest.mark.parametrize("decoder", brief(DECODERS, "entropy:1", "likeliest:3"))
def test_what_is_not_asked_for_is_not_decoded(decoder: str) -> None:
    samples = model_of("esolm").sample(2, decoder=decoder, max_tokens=5)
    assert ((samples.tokens == VOCABULARY - 1) == (np.arange(LENGTH) >= 5)).all()


def test_bounds_share_programs() -> None:
    assert Entropy(1.0) == Entropy(2.0) and hash(Entropy(1.0)) == hash(Entropy(2.0))
    model = model_of("esolm")
    assert model.sample(1, decoder="entropy:0").passes == LENGTH
    again = model.sample(1, decoder="entropy:100")
    assert again.passes == 1 and again.compile_seconds < 0.5 * again.seconds


@pytest.mark.parametrize("decoder,said", [
    ("entropy:-1", "the budget in nats must"), ("confidence:1.5", "the probability must"),
    ("likeliest:0", "must be a whole number"), ("margin:1.5", "must be a whole number"),
    ("margin:3e9", "must be a whole number of tokens, from 1 to 1048576"),
    ("entropy:x", "needs a number, as in entropy:1")])
def test_numbers_out_of_range(decoder: str, said: str) -> None:
    with pytest.raises(EsoError, match=f"^decoder = '{decoder}': {said}"):
        model_of("esolm").sample(1, decoder=decoder)
