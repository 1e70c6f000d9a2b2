"""How varied samples are. It shows a collapse, which generative perplexity does not: it is low for repetitions.

The measures are exact, and nearly linear in the number of units, so all samples are used. A unit is a word or a token,
as an integer.

Axes: N samples, P pairs of a sample and an n-gram that it holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from eso_jax.errors import require

ORDER = 4  # of the longest n-grams
FLOOR = 0.1  # self-BLEU takes no match of some length for this many


class Estimate(NamedTuple):
    """A measure and its standard error over samples (nan where there are too few)."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return "-" if math.isnan(self.value) else f"{self.value:.4g} +- {self.standard_error:.2g}"

    def to_json(self) -> dict[str, float | None]:
        """With None for nan, which JSON does not have."""
        return {name: None if math.isnan(value) else value for name, value in self._asdict().items()}


class Diversity(NamedTuple):
    """How varied a set of samples is.

    Attributes:
      repetition: share of a sample's 4-grams that it has had before, averaged over samples.
      distinct: for n = 1 to 4, different n-grams over all n-grams of the whole set. It falls as a set grows: compare
        sets of one size. The error is a jackknife's.
      self_bleu: BLEU of a sample against all others, averaged over samples, in [0, 1]; high where samples are alike. It
        grows with the set. The error takes samples for independent, which they nearly are.
      short: samples of fewer than 4 units, which have neither repetition nor self-BLEU.
    """

    repetition: Estimate
    distinct: dict[int, Estimate]
    self_bleu: Estimate
    short: int

    def to_json(self) -> dict[str, Any]:
        return {"repetition": self.repetition.to_json(), "self_bleu": self.self_bleu.to_json(), "short": self.short,
                "distinct": {str(n): estimate.to_json() for n, estimate in self.distinct.items()}}


class NGrams(NamedTuple):
    """The n-grams of one length in a set of samples. Sample `owner` holds n-gram `gram`, a number, `times` times; each
    of the P pairs (owner, gram) stands once."""

    owner: Int[np.ndarray, " P"]
    gram: Int[np.ndarray, " P"]
    times: Int[np.ndarray, " P"]


def mean(values: Float[np.ndarray, " N"]) -> Estimate:
    """The mean over samples."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()) if len(values) else math.nan, float(error))


def measure(samples: Sequence[Int[np.ndarray, " _"]]) -> Diversity:
    """Repetition, distinct n-grams and self-BLEU of N samples, each an array of units."""
    require(len(samples) >= 1, "samples", 0, "there is nothing to measure")
    lengths = np.array([len(sample) for sample in samples])
    by_length = ngrams(samples)
    long = lengths >= ORDER
    return Diversity(mean(repetition(by_length[-1], len(samples))[long]),
                     {n: distinct(grams, len(samples)) for n, grams in enumerate(by_length, 1)},
                     mean(self_bleu(by_length, lengths)[long]), int((~long).sum()))


def ngrams(samples: Sequence[Int[np.ndarray, " _"]]) -> list[NGrams]:
    """The n-grams of each length, 1 to 4."""
    units = np.unique(np.concatenate(samples), return_inverse=True)[1].reshape(-1)
    owner = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
    by_length, gram = [], units
    for n in range(1, ORDER + 1):
        if n > 1:  # the n-gram at each place: the (n-1)-gram there, and the unit n - 1 places on
            pair = gram[:-1] * (units.max(initial=0) + 1) + units[n - 1:] if len(gram) else gram
            gram = np.unique(pair, return_inverse=True)[1].reshape(-1)
        inside = owner[:len(gram)] == owner[n - 1:]
        size = gram.max(initial=0) + 1
        pairs, times = np.unique(owner[:len(gram)][inside] * size + gram[inside], return_counts=True)
        by_length.append(NGrams(pairs // size, pairs % size, times))
    return by_length


def repetition(grams: NGrams, size: int) -> Float[np.ndarray, " N"]:
    """1 - different n-grams over n-grams, within each of `size` samples; nan for a sample without any."""
    total = np.bincount(grams.owner, grams.times, size)
    with np.errstate(invalid="ignore"):
        return 1 - np.bincount(grams.owner, minlength=size) / total


def distinct(grams: NGrams, size: int) -> Estimate:
    """Different n-grams over n-grams, of the whole set of `size` samples."""
    total = np.bincount(grams.owner, grams.times, size)
    holders = np.bincount(grams.gram)
    different = np.count_nonzero(holders)
    if different == 0:
        return Estimate(math.nan, math.nan)
    unshared = np.bincount(grams.owner[holders[grams.gram] == 1], minlength=size)  # n-grams that no other sample has
    of_others = total.sum() - total
    if size < 2 or not of_others.all():
        return Estimate(float(different / total.sum()), math.nan)
    without = (different - unshared) / of_others  # the measure without each sample in turn
    return Estimate(float(different / total.sum()), float(math.sqrt(size - 1) * without.std()))


def self_bleu(by_length: Sequence[NGrams], lengths: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """BLEU-4 of each sample with all others as its references, in [0, 1]; 0 for a sample that shares no unit.

    An n-gram counts as often as it stands in the one reference that has it most (which for every sample is the holder
    of its largest count or, for that holder, of its second largest). A length without a match takes 0.1 matches; the
    brevity penalty is of the reference nearest in length.
    """
    size = len(lengths)
    if size < 2:
        return np.full(size, np.nan)
    log_precision, shares_nothing = np.zeros(size), np.zeros(size, bool)
    for grams in by_length:
        rank = np.lexsort((-grams.times, grams.gram))  # by n-gram, the largest count first
        gram, times = grams.gram[rank], grams.times[rank]
        first = np.flatnonzero(np.diff(gram, prepend=-1))
        shared = first[np.diff(first, append=len(gram)) > 1]  # of these, where another sample has it as well
        largest, runner_up = np.zeros((2, gram.max(initial=0) + 1), np.int64)
        largest[gram[first]], runner_up[gram[shared]] = times[first], times[shared + 1]
        holder = np.zeros(len(gram), bool)
        holder[rank[first]] = True
        others = np.where(holder, runner_up[grams.gram], largest[grams.gram])
        matched = np.bincount(grams.owner, np.minimum(grams.times, others), size)
        total = np.bincount(grams.owner, grams.times, size)
        if grams is by_length[0]:
            shares_nothing = matched == 0
        log_precision += np.log(np.maximum(matched, FLOOR) / np.maximum(total, 1)) / len(by_length)
    nearest = np.array([_nearest(lengths, i) for i in range(size)])
    penalty = np.exp(np.minimum(0, 1 - nearest / np.maximum(lengths, 1)))
    return np.where(shares_nothing, 0, penalty * np.exp(log_precision))


def _nearest(lengths: Int[np.ndarray, " N"], index: int) -> int:
    """The length, among the others', nearest to this one; of two, the shorter."""
    others = np.delete(lengths, index)
    gap = np.abs(others - lengths[index])
    return int(others[gap == gap.min()].min())
