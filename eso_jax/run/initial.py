"""The parameters that training begins with: random ones, or those of another work directory (train.start_from).

That model may be trained or imported, of another family, length or alpha_0 (no parameter depends on these). Otherwise
it must be the same model, except that AdaLN may be added to one without it.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eso_jax.config import Config
from eso_jax.data.tokenizers import Tokenizer, sha256
from eso_jax.errors import EsoError, require
from eso_jax.model.params import GATES, Params, init_params, param_shardings
from eso_jax.run import workdir


def random_params(config: Config) -> Params:
    """Fresh parameters, by train.seed."""
    return init_params(config.model, jax.random.fold_in(jax.random.key(config.train.seed), 0))


def starting_params(config: Config, mesh: Mesh, tokenizer: Tokenizer | None = None) -> Params | None:
    """The averaged parameters of train.start_from on a mesh, made to fit the config's model; None if it is not set.

    Args:
      tokenizer: of the new run, whose ids must mean what they did, where the source holds a tokenizer.

    Raises:
      EsoError: there is no readable model, or one that differs in more than family, length and alpha_0.
    """
    source = config.train.start_from
    if source is None:
        return None
    try:
        other = workdir.read_config(source)
    except EsoError as error:
        raise EsoError(f"train.start_from = {source!r}: no model to start from ({error})") from error
    for name in ("width", "layers", "heads", "vocab_size", "mask"):
        size, size_there = getattr(config.model, name), getattr(other.model, name)
        require(size == size_there, f"model.{'mask_id' if name == 'mask' else name}", size,
                f"the model in train.start_from = {source!r} has {size_there}")
    kept = workdir.kept_tokenizer(Path(source), other)
    require(kept is None or tokenizer is None or _same(kept, tokenizer), "data.tokenizer", config.data.tokenizer,
            f"the model in train.start_from = {source!r} was trained with {other.data.tokenizer!r}, whose ids stand "
            "for other text")
    require(other.model.cond_dim in (0, config.model.cond_dim), "model.cond_dim", config.model.cond_dim,
            f"the model in train.start_from = {source!r} has {other.model.cond_dim}; AdaLN can be added to a model, "
            "but not resized, nor dropped, since its shifts leave biases that a model without has no place for")
    try:
        params = workdir.read(source, mesh=mesh)[2]
    except EsoError as error:
        raise EsoError(f"train.start_from = {source!r}: no model to start from ({error})") from error
    if config.model.cond_dim == other.model.cond_dim:
        return params
    shapes = jax.eval_shape(lambda: random_params(config))
    add = jax.jit(lambda params: add_adaln(params, random_params(config)), out_shardings=param_shardings(shapes, mesh))
    return add(params)


def _same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers of one vocabulary size give each id the same meaning."""
    return sha256(a) == sha256(b) or all(a.decode([i]) == b.decode([i]) for i in range(a.vocab_size))


def add_adaln(params: Params, fresh: Params) -> Params:
    """The parameters of a model without AdaLN, with an AdaLN added that does not change the model's output yet.

    The modulation begins at zero, as in a fresh model, except that the biases of the gates are 1: a norm is then scaled
    by 1 + 0 and shifted by 0, and what a block adds is multiplied by 1, so that the folded weights are the same to the
    bit. The conditioning is random, so that the modulation's kernels have a gradient.

    Args:
      fresh: random parameters of the model with AdaLN.
    """
    gates = jnp.zeros_like(fresh["adaln_bias"]).at[:, jnp.array(GATES)].set(1.0)
    return {**fresh, **params, "adaln_bias": gates}
