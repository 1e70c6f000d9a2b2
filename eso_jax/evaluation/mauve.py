"""MAUVE: how near the distribution of generated texts is to that of reference texts, from 0 to 1.

Pillutla et al. 2021, by their library, mauve-text. It compares features of single texts, from one of

- a model of the transformers library, ModernBERT-large in the paper: the last layer's state of a text's last token (an
  end mark that the tokenizer adds, for ModernBERT), texts cut to 512 of its tokens, our separators as its end mark;
- one of our own models, offline: the mean of the last layer's states over the tokens, the model reading clean text.

The two are different quantities, and so are two models' features; the result says which it is of. MAUVE rises with the
number of texts on either side (a cluster per ten texts): compare equal numbers only. The papers take thousands.

Axes: N texts, D width of the features, C clusters.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eso_jax import console, families
from eso_jax.config import Config
from eso_jax.engine.rows import BATCH_SIZE
from eso_jax.errors import EsoError, require
from eso_jax.evaluation.judges import with_end_marks, load_pretrained
from eso_jax.evaluation.texts import Texts, is_workdir
from eso_jax.model import transformer
from eso_jax.model.masks import View
from eso_jax.model.params import Weights

if TYPE_CHECKING:
    from eso_jax.engine.model import Model

DEFAULT = "answerdotai/ModernBERT-large"  # the paper's
SCALING = 5.0  # the library's default, and the paper's
FEW = 1000  # texts: below, the value says more of their number than of the texts
RESAMPLES = 200  # bootstrap draws for the standard error


class Mauve(NamedTuple):
    """MAUVE of samples against reference texts.

    Attributes:
      value: in [0, 1]; 1 is the same distribution.
      standard_error: over texts, by resampling the clusters' counts; the clusters themselves are taken as given.
      features: of which model.
      samples, reference: how many texts on each side.
    """

    value: float
    standard_error: float
    features: str
    samples: int
    reference: int

    @property
    def few(self) -> bool:
        """Whether there are too few texts for the value to mean much."""
        return min(self.samples, self.reference) < FEW

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "few": self.few}


@runtime_checkable
class Features(Protocol):
    """Anything that turns texts into vectors; hashable, since those of a reference are kept."""

    name: str

    def of(self, texts: Texts) -> Float[np.ndarray, "N D"]: ...

    def __hash__(self) -> int: ...


def get(name: str, batch_size: int | None = None, tensor: int = 1) -> Features:
    """The features of a work directory of ours, or of a model that the transformers library can load.

    Args:
      batch_size: texts that it reads together; None: 64 for ours, 16 for the library's.
      tensor: devices to a copy of one of ours.

    Raises:
      EsoError: it cannot be loaded.
    """
    require(batch_size is None or batch_size >= 1, "batch_size", batch_size, "must be at least 1")
    if is_workdir(name):
        from eso_jax.engine.model import load

        return ModelFeatures(load(name, tensor=tensor, batch_size=batch_size or BATCH_SIZE), name)
    require(tensor == 1, "tensor", tensor, f"only splits our own models, and {name!r} is the transformers library's")
    return TransformersFeatures(name, batch_size or 16)


class TransformersFeatures:
    """Features of a model of the transformers library: a name on its hub, or a folder."""

    def __init__(self, name: str = DEFAULT, batch_size: int = 16, max_tokens: int = 512) -> None:
        self.name, self.batch_size, self.max_tokens = name, batch_size, max_tokens
        self.tokenizer, self.model = load_pretrained(name, "--features", "AutoModel")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def of(self, texts: Texts) -> Float[np.ndarray, "N D"]:
        import torch

        strings, rows = with_end_marks(texts.strings_for(f"--features = {self.name!r}"), self.tokenizer), []
        for low in console.bar(range(0, len(strings), self.batch_size), desc="features", unit="batch"):
            part = self.tokenizer(strings[low:low + self.batch_size], return_tensors="pt", padding=True,
                                  padding_side="right", truncation=True, max_length=self.max_tokens)
            part = part.to(self.model.device)
            with torch.inference_mode():
                hidden = self.model(**part).last_hidden_state
            last = part["attention_mask"].sum(1).clamp(min=1) - 1
            rows.append(hidden[torch.arange(len(last)), last].float().cpu().numpy())
        return np.concatenate(rows)


class ModelFeatures:
    """Features of one of our own models."""

    def __init__(self, model: Model, name: str = "ours") -> None:
        self.model, self.name = model, f"{name} (ours, mean-pooled)"

    def of(self, texts: Texts) -> Float[np.ndarray, "N D"]:
        tokens, lengths = texts.padded_for(self.model, f"--features = {self.name!r}")
        counts, law = np.minimum(lengths, tokens.shape[1]).astype(np.int32), self.model.config.law()
        means: np.ndarray = self.model.rows(lambda weights, *arrays: _mean_states(weights, law, *arrays), len(tokens),
                                            lambda index: (tokens[index], counts[index]), "features")
        return means


@functools.partial(jax.jit, static_argnames="config")
def _mean_states(weights: Weights, config: Config, tokens: Int[Array, "B L"],
                 counts: Int[Array, " B"]) -> Float[Array, "B D"]:
    return states(weights, config, tokens, counts).sum(1) / jnp.maximum(counts, 1)[:, None]


@functools.partial(jax.jit, static_argnames="config")
def states(weights: Weights, config: Config, tokens: Int[Array, "B L"], counts: Int[Array, " B"]) -> Float[Array,
                                                                                                         "B L D"]:
    """Last-layer states of the first `counts` tokens of each row, which see each other as clean tokens do in the
    family's own passes, and no other tokens; 0 after them."""
    inside = jnp.arange(tokens.shape[1])[None] < counts[:, None]
    view = View(families.get(config).pattern(config), counts, jnp.maximum(counts, 1))
    hidden, _ = transformer.trunk(weights, tokens, transformer.natural_positions(tokens), view)
    return jnp.where(inside[..., None], hidden.astype(jnp.float32), 0)


def compare(samples: Texts, reference: Texts, features: Features) -> Mauve:
    """MAUVE of samples against reference texts, whose features are kept for the next samples.

    Raises:
      EsoError: fewer than two texts on a side, or the library is not installed.
    """
    for name, texts in (("samples", samples), ("reference", reference)):
        require(len(texts) >= 2, name, len(texts), "MAUVE needs at least two texts on each side")
    return of_features(features.of(samples), _of_reference(features, reference), features.name)


@functools.lru_cache(maxsize=8)
def _of_reference(features: Features, reference: Texts) -> Float[np.ndarray, "N D"]:
    return features.of(reference)


def of_features(samples: Float[np.ndarray, "N D"], reference: Float[np.ndarray, "M D"], name: str) -> Mauve:
    """MAUVE of two sets of features, with the library's own settings for everything else."""
    try:
        import mauve
    except ImportError as error:
        raise EsoError(f"MAUVE needs the extra eval ({error}); pip install 'eso-jax[eval]', or leave the features "
                       "out") from error

    result = mauve.compute_mauve(p_features=samples, q_features=reference, mauve_scaling_factor=SCALING)
    counts, rng = (len(samples), len(reference)), np.random.default_rng(0)
    draws = [area(*(rng.multinomial(n, law) / n for n, law in zip(counts, (result.p_hist, result.q_hist), strict=True)))
             for _ in range(RESAMPLES)]
    return Mauve(float(result.mauve), float(np.std(draws, ddof=1)), name, *counts)


def area(p: Float[np.ndarray, " C"], q: Float[np.ndarray, " C"]) -> float:
    """MAUVE of two histograms: the area under exp(-c KL(q, r)) against exp(-c KL(p, r)), r the mixtures of the two."""
    def divergence(p: np.ndarray, r: np.ndarray) -> float:
        positive = p > 0
        return float((p[positive] * np.log(p[positive] / r[positive])).sum())

    mixtures = [w * p + (1 - w) * q for w in np.linspace(1e-6, 1 - 1e-6, 25)]
    curve = np.exp(-SCALING * np.array([(0, np.inf), *((divergence(q, r), divergence(p, r)) for r in mixtures),
                                        (np.inf, 0)]))
    x, y = curve.T
    return 0.5 * sum(abs(float(np.trapezoid(b[rank], a[rank]))) for a, b in ((x, y), (y, x))
                     for rank in [np.argsort(a, kind="stable")])
