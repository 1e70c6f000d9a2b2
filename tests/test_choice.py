"""Which of several texts stands here: against sums over all sequences, in every place of a row."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

import infilling
from conftest import engine, random_weights, tiny_config
from eso_jax import likelihood
from eso_jax.config import Config
from eso_jax.data import ByteTokenizer
from eso_jax.engine.model import Model
from eso_jax.errors import EsoError
from test_families import toy


def model_of(config: Config) -> Model:
    one = engine(config, random_weights(config.model))
    tokenizer = ByteTokenizer() if config.model.vocab_size == 258 else None
    return Model(one.config, one.weights, one.mesh, one.batch_size, step=0, tokenizer=tokenizer)


def test_choices_are_ratios_of_sums_over_all_sequences() -> None:
    """p(x_1 | x_0, x_2), p(x_1, x_2 | x_0) and p(x_0), of the orders that put what is given first."""
    config, _, everything = toy("esolm")
    model, x = model_of(config), np.asarray(everything)

    def law(order: list[int]) -> np.ndarray:
        logp = likelihood.log_prob(model, x, np.tile(order, (1, 27, 1)))[0]
        return np.exp(logp.astype(np.float64)).reshape(3, 3, 3)

    infilled = model.choose(np.array([2, 3, 1]), [np.array([i]) for i in range(3)])
    p = law([0, 2, 1])
    np.testing.assert_allclose(infilled.probabilities, p[2, :, 1] / p[2, :, 1].sum(), atol=1e-5)
    np.testing.assert_allclose(infilled.logp, np.log(p[2, :, 1] / p[2, :, 1].sum()), atol=1e-5)
    pairs = list(itertools.product(range(3), repeat=2))
    continued = model.choose(np.array([2]), list(map(np.array, pairs)))
    p = law([0, 1, 2])
    np.testing.assert_allclose(continued.probabilities.reshape(3, 3), p[2] / p[2].sum(), atol=1e-5)
    first = model.choose(np.array([], int), [np.array([0]), np.array([2])])  # two of three: normalized over these
    p = p.sum((1, 2))[[0, 2]]
    np.testing.assert_allclose(first.probabilities, p / p.sum(), atol=1e-5)
    np.testing.assert_allclose(np.exp(first.logp), p, atol=1e-5)


def test_texts_are_their_ids_and_a_blank_takes_an_option_of_any_length() -> None:
    model = model_of(tiny_config(length=12, vocab_size=258))
    found = model.choose("ab[MASK]c", ["x", "yz"])
    for index, (row, option) in enumerate((([97, 98, 257, 99], [120]), ([97, 98, 257, 257, 99], [121, 122]))):
        by_ids = model.choose(np.array(row), [np.array(option)])
        np.testing.assert_allclose(found.logp[index], by_ids.logp[0], atol=1e-5)
        assert len(found.logp_by_token[index]) == len(option)
        assert found.logp_by_token[index].sum() == pytest.approx(found.logp[index], abs=1e-5)
    assert found.probabilities.sum() == pytest.approx(1)
    ar = model_of(tiny_config("ar", length=12, vocab_size=258))
    chain = [ar.choose("ab", ["x"]).logp[0], ar.choose("abx", ["y"]).logp[0]]
    assert ar.choose("ab", ["xy"]).logp[0] == pytest.approx(sum(chain), abs=1e-5)


@pytest.mark.slow
def test_the_infilling_script_scores_conditionals() -> None:
    """Of the left alone and of both sides; the shuffled order is another law of the same span."""
    model = model_of(tiny_config(length=12, vocab_size=9))
    tokens = np.random.default_rng(0).integers(0, 8, (3, 12))
    wanted = np.tile((np.arange(12) >= 4) & (np.arange(12) < 8), (3, 1))
    for given, known in (("the left", np.tile(np.arange(12) < 4, (3, 1))), ("both sides", ~wanted)):
        found = infilling.span_nll(model, tokens, 4, given)
        np.testing.assert_allclose(-4 * found, likelihood.conditional(model, tokens, known, wanted), rtol=1e-4)
    assert (infilling.span_nll(model, tokens, 4, "both, shuffled") != found).all()


def test_mistakes() -> None:
    model = model_of(tiny_config(length=12, vocab_size=258))
    ids = dataclasses.replace(model, tokenizer=None)
    for one, context, options, message in (
            (model, "a", [], "give at least one"), (model, "a", "bc", "options = 'bc': give several, as a list"),
            (model, "a", [np.array([1.5])], "ids are integers"),
            (model, "a", [""], r"options\[0\] = '': must be at least"),
            (model, "a[MASK]b[MASK]", ["c"], "several blanks"), (model, "a" * 12, ["b"], "is 13 tokens"),
            (model, np.array([1, 257] + [3] * 10), ["a", "bc"], r"options\[1\] = 'bc': is 2 tokens, .* room for 1"),
            (ids, "a", [np.array([1])], "context = 'a.MASK:1.': .* no tokenizer"),
            (ids, np.array([1]), ["a"], "give ids"),
            (model, np.array([1]), [np.array([257])], "is the mask"), (model, np.array([999]), ["a"], "= 999: ids"),
            (model_of(tiny_config("ar", length=12, vocab_size=258)), "a[MASK]b", ["c"], "must be a prefix"),
            (model_of(tiny_config("mdlm", length=12, vocab_size=258)), "a", ["c"], "only an Eso-LM")):
        with pytest.raises(EsoError, match=message):
            one.choose(context, options)
