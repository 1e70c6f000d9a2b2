"""The quality of samples: generative perplexity, entropy, diversity and MAUVE, each with its standard error.

    texts = of_tokens(samples.tokens, model.tokenizer)          # eso_jax.evaluation.texts
    found = measure(texts, judges.get("gpt2-large"), reference, mauve.get("answerdotai/ModernBERT-large"))
    print(found.gen_ppl.value, found.gen_ppl.standard_error)

One measure is not enough: a sampler with a lower temperature, or one that repeats itself, has a better generative
perplexity. All samples count, empty ones too; the result says for how many a measure has no value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from eso_jax.decoding.rejection import unigram_entropy
from eso_jax.errors import EsoError
from eso_jax.evaluation import diversity, mauve as mauves
from eso_jax.evaluation.diversity import Estimate
from eso_jax.evaluation.judges import Judge
from eso_jax.evaluation.mauve import Features, Mauve
from eso_jax.evaluation.texts import Texts


class Quality(NamedTuple):
    """The measures of N samples; None for those that were not asked for.

    Attributes:
      samples: N.
      empty: samples without any word (or token).
      gen_ppl: exp(nats per token) under the judge.
      judge: its name; conventions differ, see eso_jax/evaluation/judges.py.
      judged: tokens that the judge scored.
      unjudged: samples of which it scored none, the empty ones and those of a single token.
      cut: samples longer than it reads.
      entropy: mean over samples of the entropy in nats of a sample's own token frequencies.
      unit: "words" or "tokens", in which the following are counted.
      repetition, distinct, self_bleu, short: see eso_jax.evaluation.diversity.Diversity.
      mauve: against the reference.
    """

    samples: int
    empty: int
    gen_ppl: Estimate | None
    judge: str | None
    judged: int
    unjudged: int
    cut: int
    entropy: Estimate | None
    unit: str
    repetition: Estimate
    distinct: dict[int, Estimate]
    self_bleu: Estimate
    short: int
    mauve: Mauve | None

    def to_json(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {str(n): plain(estimate) for n, estimate in value.items()}
            return value.to_json() if isinstance(value, (Mauve, Estimate)) else value

        return {name: plain(value) for name, value in self._asdict().items()}


def measure(samples: Texts, judge: Judge | None = None, reference: Texts | None = None,
            features: Features | None = None) -> Quality:
    """All measures that the arguments allow: generative perplexity with a judge, MAUVE with reference texts and
    features.

    Compare the result with the reference's own measures, `measure(reference, judge)`, of equally many texts. Features
    of a reference are computed once for each object `reference`.

    Raises:
      EsoError: features without reference texts, or the judge or the features cannot read the texts.
    """
    if features is not None and reference is None:
        raise EsoError(f"features = {features.name!r}: MAUVE compares with reference texts; give some")
    scores = None if judge is None else judge.score(samples)
    similarity = None if reference is None or features is None else mauves.compare(samples, reference, features)
    unit, units = samples.units()
    varied = diversity.measure(units)
    return Quality(
        samples=len(samples), empty=sum(len(row) == 0 for row in units),
        gen_ppl=None if scores is None else scores.perplexity(), judge=None if judge is None else judge.name,
        judged=0 if scores is None else int(scores.tokens.sum()),
        unjudged=0 if scores is None else int(np.count_nonzero(scores.tokens == 0)),
        cut=0 if scores is None else scores.cut,
        entropy=None if samples.tokens is None
        else diversity.mean(unigram_entropy(samples.tokens, samples.tokens.shape[1], samples.mask)),
        unit=unit, repetition=varied.repetition, distinct=varied.distinct, self_bleu=varied.self_bleu,
        short=varied.short, mauve=similarity)
