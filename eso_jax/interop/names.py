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
from eso_jax.model.params import PARAMETERS, Parameter, Params, parameters_of

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
    by_name = {}
    for ours, parameter in parameters_of(config).items():
        for layer in range(config.layers) if parameter.stacked else (None,):
            block = "" if layer is None else f"blocks.{layer}."
            by_name[PREFIX + block + parameter.authors] = Place(ours, layer, _tensor_shape(ours, parameter, config))
    return by_name


def _tensor_shape(name: str, parameter: Parameter, config: ModelConfig) -> tuple[int, ...]:
    """The shape of one layer's tensor: of a matrix [out, in], of all else [size]; of the embedding as ours."""
    shape = parameter.shape(config)[parameter.stacked:]
    if name == "embedding":
        return shape
    inputs, outputs = math.prod(shape[:parameter.inputs]), math.prod(shape[parameter.inputs:])
    return (outputs, inputs) if parameter.inputs else (outputs,)


def authors_names(names: Iterable[str], source: str) -> dict[str, str]:
    """The authors' name of each tensor of a checkpoint, by its name there, which may differ: torch.compile and
    data-parallel wrappers put a word before it, and a model saved on its own lacks `backbone.`. Differences are said.

    Raises:
      EsoError: two tensors would go by one name.
    """
    authors = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    differences = [f"{part}." for part in WRAPPERS if any(part in name.split(".") for name in authors)]
    if f"{PREFIX}{EMBEDDING}" not in authors.values() and EMBEDDING in authors.values():
        authors = {name: short if is_buffer(short) or short.startswith(PREFIX) else PREFIX + short
                   for name, short in authors.items()}
        differences.append(f"no {PREFIX}")
    twice = next((name for name, count in Counter(authors.values()).items() if count > 1), None)
    require(twice is None, "SRC", source, f"has two tensors {shown(twice or '')}, but for the names of wrappers")
    if differences:
        say(f"{source}: tensors are named with {', '.join(differences)}; read under the authors' names")
    return authors


def is_buffer(name: str) -> bool:
    """Whether a tensor of a checkpoint is no parameter but a constant."""
    return name == FREQUENCY_BUFFER or name in CLIPPED_TIMES


def to_params(tensors: dict[str, np.ndarray], config: ModelConfig, source: str) -> Params:
    """Our parameters, float32, from the authors' tensors (names with the `backbone.` prefix).

    Raises:
      EsoError: a tensor is missing, unknown, of another shape or no float of at most 32 bits, or holds nan or inf.
    """
    expected = places(config)
    names = {name for name in tensors if not is_buffer(name)}
    if missing := sorted(expected.keys() - names):
        raise EsoError(f"{source}: tensor {missing[0]} is missing ({len(missing)} in all); check --config and --family")
    if unknown := sorted(names - expected.keys()):
        raise EsoError(f"{source}: unknown tensor {shown(unknown[0])} ({len(unknown)} in all); check --config and "
                       "--family")
    stacks: dict[str, list[np.ndarray]] = {}
    for name, (ours, layer, shape) in expected.items():
        tensor = tensors[name]
        require(tensor.shape == shape, name, tensor.shape, f"{source} should hold shape {shape}; check --config")
        require(tensor.dtype in FLOATS, name, str(tensor.dtype),
                f"{source} should hold float32, float16 or bfloat16, which become float32 without a loss")
        require(bool(np.isfinite(tensor).all()), name, "nan or inf", f"{source} is damaged, or was never trained")
        parameter = PARAMETERS[ours]
        inputs_first = tensor if ours == "embedding" else tensor.T
        array = inputs_first.reshape(parameter.shape(config)[parameter.stacked:])
        stacks.setdefault(ours, []).append(np.asarray(array, np.float32))
    if FREQUENCY_BUFFER in tensors:
        buffer, angles = tensors[FREQUENCY_BUFFER], frequencies(config)
        same = buffer.shape == angles.shape and np.allclose(buffer.astype(np.float32), angles, rtol=1e-2)  # or halves
        require(same, FREQUENCY_BUFFER, buffer.shape, f"{source} turns its {config.heads} heads by other angles than "
                "the authors' models; check the number of heads")
    return {ours: jnp.asarray(np.stack(parts) if PARAMETERS[ours].stacked else parts[0])
            for ours, parts in stacks.items()}


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
    sizes = {"vocab_size": vocab_size, "width": width, "layers": max(blocks, default=0) + 1,
             "cond_dim": modulation[0] if modulation else 0}
    if FREQUENCY_BUFFER in tensors and tensors[FREQUENCY_BUFFER].size:
        sizes["heads"] = width // (2 * tensors[FREQUENCY_BUFFER].size)
    if vocab_size == BERT_VOCABULARY:
        sizes["mask_id"] = BERT_MASK
    return sizes
