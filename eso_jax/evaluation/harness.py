"""Our models in the lm-evaluation-harness (extra eval), as its model "eso_jax":

    python -m eso_jax.evaluation.harness run --model eso_jax --model_args workdir=runs/ar --batch_size 64 \\
        --tasks lambada_openai

takes the harness's own options (its batch size is 1 unless given). Requests for a log-likelihood are scored exactly, in
one pass for many: the context comes first in the order, the continuation after it, and the padding last, where nothing
sees it. AR and Eso-LM (B) have such conditionals; the others raise an EsoError. Texts are generated after their
contexts by the sampler, an Eso-LM's at model_args' alpha_0 and steps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from eso_jax import families, likelihood
from eso_jax.console import say, tell
from eso_jax.data.tokenizers import SHOWN_SEPARATOR
from eso_jax.engine.model import load
from eso_jax.errors import EsoError, require

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    MISSING = f"the lm-evaluation-harness needs the extra eval ({error}); pip install 'eso-jax[eval]'"
    if __name__ == "__main__":
        tell(f"eso-jax: error: {MISSING}")
        sys.exit(2)
    raise EsoError(MISSING) from error

Ids = Sequence[int]
MOST = 256  # tokens of a generated text, where a task does not say


@register_model("eso_jax")
class HarnessModel(TemplateLM):
    """A work directory as a model of the harness.

    Args:
      workdir: of a run with a tokenizer.
      ema: use the averaged parameters.
      batch_size: rows that pass together, over all devices.
      tensor: devices to a copy of the model.
      alpha_0, steps: of generated texts, see Model.sample.
      others: what the harness passes to every model (device and the like), without a meaning here.

    Raises:
      EsoError: the family has no exact conditionals, or no tokenizer fits.
    """

    def __init__(self, workdir: str, ema: bool = True, batch_size: int | str = 64, tensor: int = 1,
                 alpha_0: float | None = None, steps: int = 128, **others: Any) -> None:
        super().__init__()
        require(str(batch_size).isdigit() and int(batch_size) >= 1, "batch_size", batch_size, "must be at least 1")
        self.model = load(workdir, ema=ema, tensor=tensor, batch_size=int(batch_size))
        families.get(self.model.config).check_conditionals()
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise EsoError(f"workdir = {workdir!r}: no tokenizer fits its vocabulary of "
                           f"{self.model.config.model.vocab_size}, and the harness gives text")
        self.encode, self.decode, self.separator = tokenizer.encode, tokenizer.decode, tokenizer.separator_id
        self.alpha_0, self.steps = alpha_0, int(steps)
        self._said_cut = False

    @property
    def max_length(self) -> int:
        return self.model.config.model.length

    @property
    def eot_token_id(self) -> int:
        """The separator, after which a document begins: what stands before a request without a context."""
        return self.separator

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return [int(token) for token in self.encode(string)]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, Ids, Ids]], disable_tqdm: bool = False,
                              **kwargs: Any) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether greedy decoding would give the continuation, for each of
        (key, context, continuation); the context is cut from the left where the two are longer than the model."""
        length = self.max_length
        tokens = np.zeros((len(requests), length), np.int32)
        given, wanted = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
        cut = 0
        for row, (_, context, continuation) in enumerate(requests):
            require(len(continuation) <= length, "continuation", f"{len(continuation)} tokens",
                    f"the model has length {length}; a longer one takes loglikelihood_rolling")
            kept = context[max(0, len(context) + len(continuation) - length):]
            cut += len(kept) < len(context)
            end = len(kept) + len(continuation)
            tokens[row, :end] = [*kept, *continuation]
            given[row, :len(kept)], wanted[row, len(kept):end] = True, True
        if cut and not self._said_cut:
            say(f"eso_jax: {cut} of {len(requests)} contexts cut from the left, to the model's length {length}")
            self._said_cut = True
        if not requests:
            return []
        by_token = likelihood.conditionals(self.model, tokens, given, wanted, None if disable_tqdm else "scoring")
        found = [(float(logp.sum(dtype=np.float64)), bool(greedy.all()))
                 for logp, greedy in zip(*by_token, strict=True)]
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in nats, each after a separator, by windows of the model's length that overlap only
        where the last one would be short: every token is scored once, with as much before it as fits."""
        windows: list[tuple[None, Ids, Ids]] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            # Their windows hold one token more than the length they are given: the last one is no input of theirs.
            for pair in get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length - 1, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owner.append(index)
        scores = [logp for logp, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = np.bincount(np.array(owner, int), scores, len(requests)).tolist()
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each (context, settings), up to the first of the texts `until`, a separator, or `max_gen_toks`
        tokens; greedy unless the settings say do_sample or a temperature. A context that leaves no room for these is
        cut from the left."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for group in groups.values():
            settings = requests[group[0]].args[1]
            most = int(settings.get("max_gen_toks", MOST))
            require(1 <= most < self.max_length, "max_gen_toks", most, f"must leave room for a context in the model's "
                    f"length {self.max_length}; give another by --gen_kwargs max_gen_toks=...")
            until = settings.get("until") or []
            stop = [text for text in ([until] if isinstance(until, str) else until) if text]
            temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
            given = np.full((len(group), self.max_length), self.model.config.model.mask, np.int32)
            for row, index in zip(given, group, strict=True):
                context = (self.tok_encode(requests[index].args[0]) or [self.separator])[most - self.max_length:]
                row[:len(context)] = context
            found = self.model.sample(1, self.steps, self.alpha_0, float(settings.get("top_p", 1.0)), temperature,
                                      given=given, max_tokens=most, stop=[*stop, SHOWN_SEPARATOR])
            for index, row, known, text in zip(group, found.tokens, found.given, found.text, strict=True):
                answers[index] = text[len(self.decode(row[known])):]
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return [answers[index] for index in range(len(requests))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
