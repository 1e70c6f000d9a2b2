"""Repetition, distinct n-grams and self-BLEU against counting by hand, and against sacrebleu where it is installed."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eso_jax.errors import EsoError
from eso_jax.evaluation import diversity

SETS = st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=2, max_size=6)


def arrays(samples: list[list[int]]) -> list[np.ndarray]:
    return [np.array(sample, np.int64) for sample in samples]


def grams(sample: list[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(zip(*(sample[i:] for i in range(n)), strict=False))


@settings(deadline=None, max_examples=60)
@given(SETS)
def test_counts_are_those_by_hand(samples: list[list[int]]) -> None:
    """Repetition and distinct n-grams, and the jackknife's error, each by a plain count."""
    found = diversity.measure(arrays(samples))
    long = [sample for sample in samples if len(sample) >= 4]
    assert found.short == len(samples) - len(long)
    shares = [1 - len(grams(sample, 4)) / (len(sample) - 3) for sample in long]
    assert found.repetition.value == pytest.approx(np.mean(shares) if long else np.nan, nan_ok=True)

    def distinct(some: list[list[int]], n: int) -> float:
        every = [gram for sample in some for gram in grams(sample, n).elements()]
        return len(set(every)) / len(every) if every else np.nan

    for n in range(1, 5):
        assert found.distinct[n].value == pytest.approx(distinct(samples, n), nan_ok=True)
        without = [distinct(samples[:i] + samples[i + 1:], n) for i in range(len(samples))]
        error = np.sqrt(len(samples) - 1) * np.std(without)
        assert found.distinct[n].standard_error == pytest.approx(error, nan_ok=True, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(SETS)
def test_self_bleu_is_sacrebleus(samples: list[list[int]]) -> None:
    bleu = pytest.importorskip("sacrebleu", reason="the extra eval is not installed").sentence_bleu
    lengths = np.array([len(sample) for sample in samples])
    found = diversity.self_bleu(diversity.ngrams(arrays(samples)), lengths)
    lines = [" ".join(map(str, sample)) for sample in samples]
    for i, line in enumerate(lines):
        if lengths[i] >= 4:
            theirs = bleu(line, lines[:i] + lines[i + 1:], tokenize="none", smooth_method="floor", smooth_value=0.1)
            assert 100 * found[i] == pytest.approx(theirs.score, abs=1e-6)


def test_a_collapse_is_seen() -> None:
    rng = np.random.default_rng(0)
    varied = diversity.measure(list(rng.integers(0, 50, (40, 64))))
    alike = diversity.measure([rng.integers(0, 50, 64)] * 40)
    loops = diversity.measure(list(np.tile(rng.integers(0, 50, (40, 4)), 16)))
    assert varied.repetition.value < 0.01 and varied.self_bleu.value < 0.3 and varied.distinct[4].value > 0.95
    assert alike.self_bleu.value == pytest.approx(1) and alike.distinct[4].value == pytest.approx(1 / 40, rel=0.05)
    assert loops.repetition.value == pytest.approx(1 - 4 / 61) and loops.self_bleu.value < 0.3


def test_errors_are_of_the_size_of_the_spread() -> None:
    """Over fresh sets of samples; the jackknife and the error of self-BLEU among them."""
    rng = np.random.default_rng(0)
    found = [diversity.measure(list(rng.integers(0, 4, (30, 20)))) for _ in range(60)]
    for of in (lambda d: d.repetition, lambda d: d.distinct[3], lambda d: d.self_bleu):
        spread = np.std([of(d).value for d in found])
        error = np.mean([of(d).standard_error for d in found])
        assert 0.5 < error / spread < 2


def test_large_sets_stay_cheap_and_few_samples_have_no_error() -> None:
    rng = np.random.default_rng(0)
    assert diversity.measure(list(rng.integers(0, 50_000, (500, 512)))).distinct[4].value > 0.99  # 256,000 tokens
    one = diversity.measure([np.arange(9)])
    assert np.isnan(one.self_bleu.value) and np.isnan(one.repetition.standard_error) and one.repetition.value == 0
    nothing = diversity.measure(arrays([[], []]))
    assert nothing.short == 2 and np.isnan(nothing.distinct[1].value) and np.isnan(nothing.repetition.value)
    with pytest.raises(EsoError, match="nothing to measure"):
        diversity.measure([])


def test_json_has_every_measure() -> None:
    found = diversity.measure(arrays([list(pair) * 3 for pair in itertools.product(range(3), repeat=2)]))
    assert found.to_json()["distinct"]["1"]["value"] == pytest.approx(3 / 54)
    assert set(found.to_json()) == {"repetition", "distinct", "self_bleu", "short"}
