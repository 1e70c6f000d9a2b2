"""BERTScore: how well the tokens of a text and of its reference match each other, by another model's states.

Zhang et al. 2020. Each token of either text is a vector of length 1. Recall is the mean, over the reference's tokens,
of the largest cosine with a token of the text; precision that over the text's own, and F is their harmonic mean.
Rescaled, 0 is what texts get beside references that are not theirs, and 1 a copy. The states are those of

- a model of the transformers library: RoBERTa-large at its 17th layer, as their own library has it, bert-score. Numbers
  are that library's (the marks at both ends can be matched and do not count; a blank goes before each text). An empty
  text's are 0 before they are rescaled;
- one of our own models, offline: the last layer, the model reading clean text. Two models' scores do not compare.

Axes: N pairs, T tokens of a text, D width of the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from eso_jax import console
from eso_jax.errors import require
from eso_jax.evaluation.judges import load_pretrained
from eso_jax.evaluation.mauve import states
from eso_jax.evaluation.texts import Texts

if TYPE_CHECKING:
    from eso_jax.engine.model import Model

DEFAULT, LAYER = "roberta-large", 17  # the library's, for English
# Precision, recall and F of a million pairs of sentences that have nothing to do with each other, by the library.
UNRELATED = {(DEFAULT, LAYER): (0.83150584, 0.8314941, 0.83122575)}


class Tokens(NamedTuple):
    """The vectors of one text's tokens, and which of them count."""

    vectors: Float[np.ndarray, "T D"]
    counted: Bool[np.ndarray, " T"]


@runtime_checkable
class Encoder(Protocol):
    """Anything that turns texts into vectors of their tokens.

    Attributes:
      name: which model's states they are.
      batch_size: pairs that are compared at a time.
      unrelated: precision, recall and F of unrelated texts; None: not known.
    """

    name: str
    batch_size: int
    unrelated: tuple[float, float, float] | None

    def of(self, texts: Sequence[str]) -> list[Tokens]: ...


class TransformersEncoder:
    """States of a model of the transformers library: a name on its hub, or a folder. Texts are cut to 512 of its
    tokens."""

    def __init__(self, name: str = DEFAULT, layer: int = LAYER, batch_size: int = 64) -> None:
        self.name, self.layer, self.batch_size = f"{name}, layer {layer}", layer, batch_size
        self.unrelated = UNRELATED.get((name, layer))
        self.tokenizer, self.model = load_pretrained(name, "--encoder", "AutoModel")

    def of(self, texts: Sequence[str]) -> list[Tokens]:
        import torch

        part = self.tokenizer([f" {text.strip()}".rstrip() for text in texts], return_tensors="pt", padding=True,
                              padding_side="right", truncation=True, max_length=512, return_special_tokens_mask=True)
        special = part.pop("special_tokens_mask").bool().numpy()
        part = part.to(self.model.device)
        with torch.inference_mode():
            hidden = self.model(**part, output_hidden_states=True).hidden_states[self.layer].float().cpu().numpy()
        counts = part["attention_mask"].sum(1).tolist()
        return [Tokens(_unit(row[:count]), ~marks[:count]) for row, marks, count in zip(hidden, special, counts,
                                                                                        strict=True)]


class ModelEncoder:
    """States of one of our own models; texts are cut to its length."""

    unrelated: tuple[float, float, float] | None = None

    def __init__(self, model: Model, name: str = "ours") -> None:
        self.model, self.name, self.batch_size = model, f"{name} (ours)", model.batch_size

    def of(self, texts: Sequence[str]) -> list[Tokens]:
        tokens, lengths = Texts(None, list(texts)).padded_for(self.model, self.name)
        counts, law = np.minimum(lengths, tokens.shape[1]).astype(np.int32), self.model.config.law()
        rows: np.ndarray = self.model.rows(lambda weights, *arrays: states(weights, law, *arrays), len(tokens),
                                           lambda index: (tokens[index], counts[index]))
        return [Tokens(_unit(row[:count]), np.ones(count, bool)) for row, count in zip(rows, counts, strict=True)]


def score(texts: Sequence[str], references: Sequence[str], encoder: Encoder) -> Float[np.ndarray, "N 3"]:
    """Precision, recall and F of each text beside its reference, rescaled.

    Where it is not known what unrelated texts get by an encoder, it is what the references get beside each other, each
    of them beside the next.
    """
    unrelated = encoder.unrelated
    if unrelated is None:
        require(len(references) > 1, "references", len(references), "must be several: what unrelated texts get by this "
                "encoder is made of them")
        unrelated = tuple(_raw([*references[1:], references[0]], references, encoder).mean(0))
    floor = np.array(unrelated)
    return (_raw(texts, references, encoder) - floor) / (1 - floor)


def _raw(texts: Sequence[str], references: Sequence[str], encoder: Encoder) -> Float[np.ndarray, "N 3"]:
    found = []
    for low in console.bar(range(0, len(texts), encoder.batch_size), desc="BERTScore", unit="batch"):
        pair = (encoder.of(each[low:low + encoder.batch_size]) for each in (texts, references))
        found += [_match(text, reference) for text, reference in zip(*pair, strict=True)]
    return np.array(found)


def _match(text: Tokens, reference: Tokens) -> tuple[float, float, float]:
    if not (text.counted.any() and reference.counted.any()):
        return 0.0, 0.0, 0.0
    cosine = text.vectors @ reference.vectors.T
    precision = float(cosine.max(1)[text.counted].mean())
    recall = float(cosine.max(0)[reference.counted].mean())
    return precision, recall, 2 * precision * recall / (precision + recall)


def _unit(vectors: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T D"]:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
