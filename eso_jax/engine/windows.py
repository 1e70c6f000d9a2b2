"""Texts longer than the model: window after window.

A window begins with the last tokens of the window before it, as given tokens; the model then decodes the others. So a
token follows the exact law of the model given the tokens of its window, at least `overlap` of which stand before it.
Earlier tokens are forgotten. The first window is what `Model.sample` draws.

Axes: N texts, L length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eso_jax.data.prompts import Given, of_array
from eso_jax.data.stops import Stops
from eso_jax.errors import require

if TYPE_CHECKING:
    from eso_jax.engine.model import Model


class Long(NamedTuple):
    """Texts of any length.

    Attributes:
      tokens: N arrays int32, given tokens included, up to the first stop.
      text: N texts, the decoded tokens; empty without a tokenizer.
      windows: int [N], how many windows each text took.
      left: int [N], how many tokens are missing after an interrupt.
    """

    tokens: list[np.ndarray]
    text: list[str]
    windows: np.ndarray
    left: np.ndarray


def lengthen(model: Model, given: Given | np.ndarray, max_tokens: int, overlap: int | None = None,
             stop: Sequence[str] = (), seed: int = 0, keep: bool = False, **how: Any) -> Long:
    """Texts with `max_tokens` tokens after their prompts, or up to a stop.

    Args:
      given: prompts, one for each text: int [N, K <= L], or the result of a function of eso_jax.data.prompts.
      overlap: how many tokens of a window are the last ones of the window before; None: half the length.
      keep: an interrupt (Ctrl-C) ends the work and leaves the windows that are done, if there are any.
      how: other arguments of `Model.sample`, the same for each window.

    Raises:
      EsoError: an argument is out of range, what is given is no prompt, or as `Model.sample` does.
    """
    length, mask = model.config.model.length, model.config.model.mask
    overlap = length // 2 if overlap is None else overlap
    require(1 <= max_tokens < 2**31, "max_tokens", max_tokens, "must be at least 1, and less than 2**31")
    require(1 <= overlap < length, "overlap", overlap, f"must be in [1, {length}), the model's length")
    given = given if isinstance(given, Given) else of_array(np.asarray(given), model.config.model)
    known = given.tokens != mask
    prompts = known.sum(1)
    only = (known == (np.arange(length) < prompts[:, None])).all() and (given.end == length).all()
    require(bool(only), "given", "more than prompts",
            "a text of several windows has nothing given behind its beginning; give prompts alone, or a smaller "
            "max_tokens")
    stops = Stops.of(stop, model.tokenizer)
    done = stops.done if stops is not None and stop else None
    texts = [row[:count] for row, count in zip(given.tokens, prompts, strict=True)]
    windows, left = np.zeros(len(texts), np.int32), np.full(len(texts), max_tokens)
    while len(rows := np.flatnonzero(left)):
        tokens = np.full((len(rows), length), mask, np.int32)
        # A first window holds the whole prompt, unless that leaves no room.
        most = np.where((windows[rows] == 0) & (prompts[rows] < length), length, overlap)
        begin = np.minimum(most, [len(texts[row]) for row in rows])
        for row, own, count in zip(rows, tokens, begin, strict=True):
            own[:count] = texts[row][len(texts[row]) - count:]
        number = int(windows.max())
        # Another seed for each window: a text that repeats itself must not repeat its draws.
        fresh = int(np.random.default_rng([seed, number]).integers(2**32)) if number else seed
        longer, fewer = list(texts), left.copy()
        try:
            samples = model.sample(1, given=Given(tokens, np.minimum(length, begin + left[rows])), done=done,
                                   seed=fresh, **how)
            for row, own, count in zip(rows, samples.tokens, begin, strict=True):
                new = own[count:]
                new = new[:np.append(new, mask).tolist().index(mask)]
                longer[row] = np.concatenate([texts[row], new])
                known = np.arange(len(longer[row])) < prompts[row]
                fewer[row] = 0 if done is not None and done(longer[row][None], known[None])[0] else left[row] - len(new)
        except KeyboardInterrupt:
            if keep and number:
                break
            raise
        texts, left = longer, fewer
        windows[rows] += 1
    text = []
    for index, tokens in enumerate(texts):
        if stops is not None:
            text.append(stops.cut(tokens, np.arange(len(tokens)) < prompts[index]))
            texts[index] = tokens[tokens != mask]
    return Long(texts, text, windows, left)
