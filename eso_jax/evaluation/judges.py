"""Judges of generated text: its perplexity under another language model (generative perplexity).

A judge is a causal language model of the transformers library, GPT-2 Large in the papers, or one of our own work
directories. Numbers of two judges cannot be compared: the models differ, and the two kinds count tokens differently:

- A transformers model sees the text re-tokenized by its own tokenizer, our separators as its end of text, cut to 1024
  of its tokens. The first token is not scored: nothing stands before it. All tokens count that are not the end of
  text, and so does the first end of text, even that which padding adds after a text of less than 1024 tokens.
  (The authors' convention, but that every text is judged, that theirs pads to the longest text of a call only, and so
  that the result depends on neither the batch nor the other texts.)
- Our own models score the tokens themselves where they share the vocabulary, otherwise the text in their own tokens,
  cut to their length. The first token is scored, since they have a law for it, and no end of text is added. An Eso-LM
  reads from left to right, at alpha_0 = 0.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from eso_jax import console, likelihood
from eso_jax.data.tokenizers import SHOWN_SEPARATOR
from eso_jax.engine.rows import BATCH_SIZE
from eso_jax.errors import EsoError, require
from eso_jax.evaluation.diversity import Estimate
from eso_jax.evaluation.texts import Texts, is_workdir

if TYPE_CHECKING:
    from eso_jax.engine.model import Model

DEFAULT = "gpt2-large"  # the papers'


class Scores(NamedTuple):
    """A judge's scores of N texts.

    Attributes:
      nats: -log p of each text's scored tokens, float64 [N].
      tokens: how many were scored, int [N]; 0 for an empty text.
      cut: texts that were longer than the judge reads.
    """

    nats: Float[np.ndarray, " N"]
    tokens: Int[np.ndarray, " N"]
    cut: int

    def perplexity(self) -> Estimate:
        """exp(all nats / all tokens), with the delta method's standard error over texts."""
        count, total = len(self.nats), self.tokens.sum()
        if total == 0:
            return Estimate(math.nan, math.nan)
        rate = self.nats.sum() / total
        value = math.exp(min(rate, 700))
        if count < 2:
            return Estimate(value, math.nan)
        residual = self.nats - rate * self.tokens
        return Estimate(value, float(value * math.sqrt(count / (count - 1) * (residual**2).sum()) / total))


@runtime_checkable
class Judge(Protocol):
    """Anything that can score texts."""

    name: str

    def score(self, texts: Texts) -> Scores: ...


def get(name: str, batch_size: int | None = None, tensor: int = 1) -> Judge:
    """The judge called `name`: a work directory of ours, or a model that the transformers library can load.

    Args:
      batch_size: texts that it reads together; None: 64 for ours, 8 for the library's.
      tensor: devices to a copy of one of ours.

    Raises:
      EsoError: it cannot be loaded, for want of the library, of a network or of the model.
    """
    require(batch_size is None or batch_size >= 1, "batch_size", batch_size, "must be at least 1")
    if is_workdir(name):
        from eso_jax.engine.model import load

        return ModelJudge(load(name, tensor=tensor, batch_size=batch_size or BATCH_SIZE), name)
    require(tensor == 1, "tensor", tensor, f"only splits our own models, and {name!r} is the transformers library's")
    return TransformersJudge(name, batch_size or 8)


class TransformersJudge:
    """A causal language model of the transformers library: a name on its hub, or a folder.

    On the first GPU, if torch sees one, in the type that it is stored in; elsewhere in float32.
    """

    def __init__(self, name: str = DEFAULT, batch_size: int = 8, max_tokens: int = 1024) -> None:
        self.name, self.batch_size = name, batch_size
        self.tokenizer, self.model = load_pretrained(name, "--judge", "AutoModelForCausalLM")
        require(self.tokenizer.eos_token_id is not None, "--judge", name, "its tokenizer has no end of text")
        self.max_tokens = min(max_tokens, getattr(self.model.config, "max_position_embeddings", None) or max_tokens)

    def score(self, texts: Texts) -> Scores:
        """Scores texts; see the top of this file.

        Raises:
          EsoError: there are tokens only.
        """
        import torch

        strings = with_end_marks(texts.strings_for(f"--judge = {self.name!r}"), self.tokenizer)
        end = self.tokenizer.eos_token_id
        whole = self.tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"] if strings else []
        nats, counts = np.zeros(len(whole)), np.zeros(len(whole), np.int64)
        for low in console.bar(range(0, len(whole), self.batch_size), desc="judging", unit="batch"):
            # An end of text after each, the first token of the padding; what follows it is not counted.
            rows = [(ids + [end])[:self.max_tokens] for ids in whole[low:low + self.batch_size]]
            ids = torch.tensor([row + [end] * (max(map(len, rows)) - len(row)) for row in rows])
            counted = (ids != end) | ((ids == end).cumsum(1) == 1)
            ids = ids.to(self.model.device)
            with torch.inference_mode():
                logits = self.model(input_ids=ids).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()
            part = slice(low, low + len(rows))
            nats[part] = (nll.double() * counted[:, 1:]).sum(1).numpy()
            counts[part] = counted[:, 1:].sum(1).numpy()
        return Scores(nats, counts, sum(len(ids) > self.max_tokens for ids in whole))


class ModelJudge:
    """One of our own models that decodes left to right: AR, or an Eso-LM (B)."""

    def __init__(self, model: Model, name: str = "ours") -> None:
        self.model, self.name = model, name

    def score(self, texts: Texts) -> Scores:
        """Scores tokens or texts; see the top of this file.

        Raises:
          EsoError: the tokens are another vocabulary's and there is no text, or the family cannot judge.
        """
        tokens, lengths = texts.padded_for(self.model, f"--judge = {self.name!r}")
        counts = np.minimum(lengths, tokens.shape[1])
        is_scored = np.arange(tokens.shape[1]) < counts[:, None]
        logp = likelihood.conditional(self.model, tokens, np.zeros_like(is_scored), is_scored)
        return Scores(-logp.astype(np.float64), counts, int((lengths > counts).sum()))


def with_end_marks(strings: list[str], tokenizer: Any) -> list[str]:
    """Strings for a tokenizer of the transformers library: each shown separator is replaced by its own end of text (for
    a BERT, [SEP]), which it reads as one token."""
    end = tokenizer.eos_token or tokenizer.sep_token or SHOWN_SEPARATOR
    return [string.replace(SHOWN_SEPARATOR, end) for string in strings]


def load_pretrained(name: str, flag: str, kind: str) -> tuple[Any, Any]:
    """The tokenizer and the model (for evaluation) of a name on the transformers library's hub, or of a folder.

    Args:
      flag: the option or argument that names it, for errors.
      kind: the library's class that loads the model.
    """
    require(not Path(name).is_absolute() or Path(name).is_dir(), flag, name, "no such folder")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise EsoError(f"{flag} = {name!r}: needs the extra eval ({error}); pip install 'eso-jax[eval]', or give a "
                       "work directory of yours") from error
    if not console.is_terminal():
        transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = getattr(transformers, kind).from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise EsoError(f"{flag} = {name!r}: cannot be loaded ({reason}); give a folder that holds the model, or a work "
                       "directory of yours; a name needs a network or the hub's cache") from error
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
