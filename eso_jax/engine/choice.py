"""Which of several texts stands here? Probabilities of given continuations or infillings, exact, in one pass each.

The context comes first in the order, then the option from left to right (likelihood.conditionals), so that an Eso-LM
(B) uses the text on both sides of a blank. AR can only score continuations.

Axes: O options, L length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from eso_jax import likelihood
from eso_jax.data import prompts
from eso_jax.data.tokenizers import encode_shown
from eso_jax.errors import EsoError, require

if TYPE_CHECKING:
    from eso_jax.engine.model import Model


class Choice(NamedTuple):
    """How likely each option is in its place.

    Attributes:
      probabilities: float64 [O], exp(logp), normalized over the options. Longer options are less likely for their
        length.
      logp: float64 [O], log p(option | context) in nats.
      logp_by_token: of each option, float32 [its tokens].
    """

    probabilities: Float[np.ndarray, " O"]
    logp: Float[np.ndarray, " O"]
    logp_by_token: list[np.ndarray]


def choose(model: Model, context: str | np.ndarray, options: Sequence[str | np.ndarray]) -> Choice:
    """The probabilities of the options in a context.

    Args:
      context: a text that the options continue; a text with one [MASK], which they replace (each with its own number of
        tokens, so that a longer option shifts the text after it further to the right); or the ids of a row, int [K],
        K <= L, whose masks they fill from the left. The rest of the row is not used.
      options: texts, or ids, int [_].

    Raises:
      EsoError: a row does not fit the model, an option is empty, or the family has no such conditionals.
    """
    require(not isinstance(options, str), "options", options, "give several, as a list")
    require(len(options) >= 1, "options", list(options), "give at least one")
    length, mask = model.config.model.length, model.config.model.mask
    tokens = np.zeros((len(options), length), np.int32)
    given, wanted = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for index, option in enumerate(options):
        name = f"options[{index}]"
        ids = _ids(model, option, name)
        row = _row(model, context, len(ids))
        places = np.flatnonzero(row == mask)[:len(ids)]
        require(len(places) == len(ids), name, option, f"is {len(ids)} tokens, and there is room for {len(places)}")
        tokens[index] = row
        tokens[index, places] = ids
        given[index], wanted[index, places] = row != mask, True
    found = likelihood.conditionals(model, tokens, given, wanted, None).logp
    logp = found.sum(axis=1, dtype=np.float64)
    share = np.exp(logp - logp.max())
    return Choice(share / share.sum(), logp, [one[places] for one, places in zip(found, wanted, strict=True)])


def _ids(model: Model, option: str | np.ndarray, name: str) -> np.ndarray:
    if not isinstance(option, str):
        ids = np.asarray(option)
    elif model.tokenizer is None:
        raise EsoError(f"{name} = {option!r}: the model has no tokenizer, so that text has no ids; give ids")
    else:
        ids = encode_shown(model.tokenizer, option)
    require(ids.ndim == 1 and len(ids) > 0, name, option, "must be at least one token")
    require(np.issubdtype(ids.dtype, np.integer), name, option, "ids are integers")
    return ids


def _row(model: Model, context: str | np.ndarray, count: int) -> np.ndarray:
    """The context as a row, with room for an option of so many tokens."""
    if not isinstance(context, str):
        return prompts.of_array(np.asarray(context)[None], model.config.model, "context").tokens[0]
    blanks = len(prompts.BLANK.findall(context))
    require(blanks <= 1, "context", context, "has several blanks, and an option fills one; give ids with masks")
    text = prompts.BLANK.sub(f"[MASK:{count}]", context) if blanks else f"{context}[MASK:{count}]"
    return prompts.of_template(text, model.tokenizer, model.config.model, "context").tokens[0]
