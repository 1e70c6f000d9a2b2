"""Which tensor of the authors' is which parameter of ours: every one is matched by name and shape, or it is an error.

A checkpoint names its tensors `backbone.blocks.3.attn_qkv.weight` and so on. The declaration of our parameters
(eso_jax/model/params.py) has these names; PyTorch's linear weights are [out, in], ours [in, out], with `in` or `out`
split where it holds several things.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from eso_jax.config import ModelConfig
from eso_jax.console import say
from eso_jax.errors import EsoError, require
from eso_jax.interop.pickles import shown
from eso_jax.model.params import PARAMETERS, Parameter, Params, declared

PREFIX = "backbone."
WRAPPERS = ("_orig_mod", "module")  # of torch.compile; of DataParallel, DistributedDataParallel
EMBEDDING = "vocab_embed.embedding"
FREQUENCY_BUFFER = PREFIX + "rotary_emb.inv_freq"  # of the rotary embedding; computed from the head size
CLIPPED_TIMES = ("sampling_eps_min", "sampling_eps_max")  # BD3-LM's range of t in training
BERT_VOCABULARY, BERT_MASK = 30522, 103  # bert-base-uncased has a mask of its own, in the middle of its vocabulary

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)  # become float32 without a loss


class Place(NamedTuple):
    """Where a tensor goes: our parameter, its layer if that is stacked, and the shape it has in the checkpoint."""

    ours: str
    layer: int | None
    shape: tuple[int, ...]


def places(config: ModelConfig) -> dict[str, Place]:
    """The place of every tensor of a checkpoint, by its name there."""
    found = {}
    for ours, one in declared(config).items():
        for layer in range(config.layers) if one.stacked else (None,):
            block = "" if layer is None else f"blocks.{layer}."
            found[PREFIX + block + one.authors] = Place(ours, layer, _theirs(ours, one, config))
    return found


def _theirs(name: str, one: Parameter, config: ModelConfig) -> tuple[int, ...]:
    """The shape of one layer's tensor: of a matrix [out, in], of all else [size]; of the embedding as ours."""
    shape = one.shape(config)[one.stacked:]
    if name == "embedding":
        return shape
    inputs, outputs = math.prod(shape[:one.inputs]), math.prod(shape[one.inputs:])
    return (outputs, inputs) if one.inputs else (outputs,)


def plain(given: Iterable[str], source: str) -> dict[str, str]:
    """The authors' names of a checkpoint's tensors, by its own: without what torch.compile and data-parallel wrappers
    put before them, with the `backbone.` that a model saved on its own has not. What was changed is said.

    Raises:
      EsoError: two tensors would go by one name.
    """
    found = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in given}
    said = [f"{part}." for part in WRAPPERS if any(part in name.split(".") for name in found)]
    if f"{PREFIX}{EMBEDDING}" not in found.values() and EMBEDDING in found.values():
        found = {name: ours if is_buffer(ours) or ours.startswith(PREFIX) else PREFIX + ours
                 for name, ours in found.items()}
        said.append(f"no {PREFIX}")
    twice = next((ours for ours, count in Counter(found.values()).items() if count > 1), None)
    require(twice is None, "SRC", source, f"has two tensors {shown(twice or '')}, but for the names of wrappers")
    if said:
        say(f"{source}: tensors are named with {', '.join(said)}; read under the authors' names")
    return found


def is_buffer(name: str) -> bool:
    """Whether a tensor of a checkpoint is no parameter but a constant."""
    return name == FREQUENCY_BUFFER or name in CLIPPED_TIMES


def to_params(tensors: dict[str, np.ndarray], config: ModelConfig, source: str) -> Params:
    """Our parameters, float32, from the authors' tensors (names with the `backbone.` prefix).

    Raises:
      EsoError: a tensor is missing, unknown, of another shape or no float of at most 32 bits, or holds nan or inf.
    """
    expected = places(config)
    given = {name: tensor for name, tensor in tensors.items() if not is_buffer(name)}
    _same_names(set(given), set(expected), source)
    stacks: dict[str, list[np.ndarray]] = {}
    for name, (ours, layer, shape) in expected.items():
        tensor = given[name]
        require(tensor.shape == shape, name, tensor.shape, f"{source} should hold shape {shape}; check --config")
        require(tensor.dtype in FLOATS, name, str(tensor.dtype),
                f"{source} should hold float32, float16 or bfloat16, which become float32 without a loss")
        require(bool(np.isfinite(tensor).all()), name, "nan or inf", f"{source} is damaged, or was never trained")
        one = PARAMETERS[ours]
        ours_first = tensor if ours == "embedding" else tensor.T
        stacks.setdefault(ours, []).append(np.asarray(ours_first.reshape(one.shape(config)[one.stacked:]), np.float32))
    if FREQUENCY_BUFFER in tensors:
        buffer, angles = tensors[FREQUENCY_BUFFER], frequencies(config)
        same = buffer.shape == angles.shape and np.allclose(buffer.astype(np.float32), angles, rtol=1e-2)  # or halves
        require(same, FREQUENCY_BUFFER, buffer.shape, f"{source} turns its {config.heads} heads by other angles than "
                "the authors' models; check the number of heads")
    return {ours: jnp.asarray(np.stack(parts) if PARAMETERS[ours].stacked else parts[0])
            for ours, parts in stacks.items()}


def _same_names(given: set[str], expected: set[str], source: str) -> None:
    if missing := sorted(expected - given):
        raise EsoError(f"{source}: tensor {missing[0]} is missing ({len(missing)} in all); check --config and --family")
    if unknown := sorted(given - expected):
        raise EsoError(f"{source}: unknown tensor {shown(unknown[0])} ({len(unknown)} in all); check --config and "
                       "--family")


def to_tensors(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The authors' tensors, float32, from our parameters: the inverse of `to_params`, bit for bit."""
    tensors = {FREQUENCY_BUFFER: frequencies(config)}
    for name, (ours, layer, shape) in places(config).items():
        array = np.asarray(params[ours] if layer is None else params[ours][layer])
        theirs = array if ours == "embedding" else array.reshape(shape[::-1]).T
        tensors[name] = np.ascontiguousarray(theirs)
    return tensors


def frequencies(config: ModelConfig) -> np.ndarray:
    """The rotary frequencies as the authors keep them, float32 [K / 2]: a power, rounded, then its inverse.

    These are torch's to the bit for K = 32, 64 and 128; for some others (96, 256) one of them is off by its last bit.
    """
    exponents = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
    return np.float32(1) / (1e4 ** exponents.astype(np.float64)).astype(np.float32)


def sizes_of(tensors: dict[str, np.ndarray], source: str) -> dict[str, Any]:
    """The sizes that tensors show, by our names.

    Width, vocabulary, layers and cond_dim are in the shapes; the number of heads is in the rotary frequencies, which
    the authors' files hold, and is left out where they are not. BERT's vocabulary has its mask at 103. The length is
    nowhere in the tensors.
    """
    name = PREFIX + EMBEDDING
    require(name in tensors, "SRC", source, f"not one of the authors' models: tensor {name} is missing")
    require(tensors[name].ndim == 2, name, tensors[name].shape, f"{source} should hold [vocabulary, width]")
    vocab_size, width = tensors[name].shape
    blocks = [int(block[1]) for n in tensors if (block := re.match(r"backbone\.blocks\.(\d{1,4})\.", n))]
    modulation = [t.shape[-1] for n, t in tensors.items() if n.endswith("adaLN_modulation.weight") and t.ndim == 2]
    found = {"vocab_size": vocab_size, "width": width, "layers": max(blocks, default=0) + 1,
             "cond_dim": modulation[0] if modulation else 0}
    if FREQUENCY_BUFFER in tensors and tensors[FREQUENCY_BUFFER].size:
        found["heads"] = width // (2 * tensors[FREQUENCY_BUFFER].size)
    if vocab_size == BERT_VOCABULARY:
        found["mask_id"] = BERT_MASK
    return found
