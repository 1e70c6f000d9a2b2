"""The authors' PyTorch checkpoints, in: every tensor is matched by name and shape, or the import fails.

A checkpoint names its tensors `backbone.blocks.3.attn_qkv.weight` and so on. `TABLE` says, for each, where it goes in
our parameters and how its axes move.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eso_jax import transformer
from eso_jax.config import Config, EsoError, FamilyConfig, ModelConfig, from_dict, require
from eso_jax.transformer import FREQUENCIES, Params

PREFIX = "backbone."
IGNORED = ("rotary_emb.inv_freq",)  # a buffer, computed from the head size

SIZES = {"width": "hidden_size", "layers": "n_blocks", "heads": "n_heads", "length": "length",
         "vocab_size": "vocab_size", "mask_id": "mask_id", "cond_dim": "cond_dim"}  # ours: the JSON's


def _tables(c: ModelConfig) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, tuple[str, tuple[int, ...]]]]:
    """(tensors, per-layer tensors): reference name -> (our name, the reference shape).

    PyTorch's linear weights are [out, in]; ours are [in, out], with `out` split where it holds several things.
    """
    d, v, e, h = c.width, c.vocab_size, c.cond_dim, 4 * c.width
    whole = {"vocab_embed.embedding": ("embedding", (v, d)),
             "output_layer.norm_final.weight": ("head_norm", (d,)),
             "output_layer.linear.weight": ("head_kernel", (v, d)),
             "output_layer.linear.bias": ("head_bias", (v,))}
    layer = {"norm1.weight": ("norm1", (d,)), "norm2.weight": ("norm2", (d,)),
             "attn_qkv.weight": ("qkv", (3 * d, d)), "attn_out.weight": ("out", (d, d)),
             "mlp.0.weight": ("mlp_in_kernel", (h, d)), "mlp.0.bias": ("mlp_in_bias", (h,)),
             "mlp.2.weight": ("mlp_out_kernel", (d, h)), "mlp.2.bias": ("mlp_out_bias", (d,))}
    if e:
        whole |= {"sigma_map.mlp.0.weight": ("sigma_in_kernel", (e, FREQUENCIES)),
                  "sigma_map.mlp.0.bias": ("sigma_in_bias", (e,)),
                  "sigma_map.mlp.2.weight": ("sigma_out_kernel", (e, e)),
                  "sigma_map.mlp.2.bias": ("sigma_out_bias", (e,)),
                  "output_layer.adaLN_modulation.weight": ("head_adaln_kernel", (2 * d, e)),
                  "output_layer.adaLN_modulation.bias": ("head_adaln_bias", (2 * d,))}
        layer |= {"adaLN_modulation.weight": ("adaln_kernel", (6 * d, e)),
                  "adaLN_modulation.bias": ("adaln_bias", (6 * d,))}
    return whole, layer


def import_checkpoint(src: Path, sizes: str | None, family: str, alpha_0: float = 1.0,
                      start_id: int | None = None) -> tuple[Config, Params]:
    """The config and parameters of a reference checkpoint.

    Args:
      src: a .safetensors file.
      sizes: path of the sizes JSON.
      family: the family it was trained as; its file does not say.
      alpha_0: an Eso-LM's training value, which sampling and evaluation take where none is given.
      start_id: the token an AR model was trained to begin with.

    Raises:
      EsoError: the file cannot be read, or a tensor is missing, unknown or of another shape.
    """
    require(src.suffix == ".safetensors", "SRC", str(src), "must be a .safetensors file")
    tensors = read_safetensors(src)
    if sizes is None:
        raise EsoError("--config: the sizes are needed; give a JSON with " + ", ".join(SIZES.values()))
    model, block_size = read_sizes(Path(sizes), tensors)
    require(model.cond_dim > 0 or family == "ar", "--family", family,
            f"{src} has no AdaLN tensors, so it is an AR model; give --family ar")
    block = block_size if family == "bd3lm" and block_size else FamilyConfig.block_size
    config = Config(model=model, family=FamilyConfig(name=family, alpha_0=alpha_0, block_size=block, start_id=start_id))
    return config, to_params(tensors, model, str(src))


def to_params(tensors: dict[str, np.ndarray], config: ModelConfig, source: str) -> Params:
    """Our parameters from the authors' tensors (float32 arrays, names with the `backbone.` prefix)."""
    whole, layer = _tables(config)
    expected: dict[str, tuple[str, tuple[int, ...], int | None]] = {
        PREFIX + name: (ours, shape, None) for name, (ours, shape) in whole.items()}
    expected |= {f"{PREFIX}blocks.{i}.{name}": (ours, shape, i)
                 for i in range(config.layers) for name, (ours, shape) in layer.items()}
    given = {name: t for name, t in tensors.items() if name.removeprefix(PREFIX) not in IGNORED}
    _same_names(set(given), set(expected), source)
    shapes = abstract_shapes(config)
    stacks: dict[str, list[np.ndarray]] = {}
    for name, (ours, shape, index) in expected.items():
        tensor = given[name]
        require(tensor.shape == shape, name, tensor.shape, f"{source} should hold shape {shape}; check --config")
        require(bool(np.isfinite(tensor).all()), name, "nan or inf", f"{source} is damaged, or was never trained")
        target = shapes[ours] if index is None else shapes[ours][1:]
        ours_first = tensor if ours == "embedding" else tensor.T
        stacks.setdefault(ours, []).append(np.asarray(ours_first.reshape(target), np.float32))
    single = {ours for ours, _ in whole.values()}
    return {ours: jnp.asarray(parts[0] if ours in single else np.stack(parts)) for ours, parts in stacks.items()}


def _same_names(given: set[str], expected: set[str], source: str) -> None:
    if missing := sorted(expected - given):
        raise EsoError(f"{source}: tensor {missing[0]} is missing ({len(missing)} in all); check --config and --family")
    if unknown := sorted(given - expected):
        raise EsoError(f"{source}: unknown tensor {unknown[0]} ({len(unknown)} in all); check --config and --family")


def abstract_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes."""
    params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    return {name: array.shape for name, array in params.items()}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors file; a missing, truncated or corrupt file is an EsoError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    require(path.is_file(), "SRC", str(path), "no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise EsoError(f"SRC = {str(path)!r}: not a readable safetensors file ({error})") from error


def read_sizes(path: Path, tensors: dict[str, np.ndarray]) -> tuple[ModelConfig, int | None]:
    """The ModelConfig (and BD3-LM block size, if given) of a sizes JSON; no AdaLN tensors mean cond_dim = 0."""
    require(path.is_file(), "--config", str(path), "no such file; give a JSON of the sizes")
    try:
        sizes: dict[str, Any] = json.loads(path.read_text())
        fields = {ours: sizes[theirs] for ours, theirs in SIZES.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise EsoError(f"--config = {str(path)!r}: must be a JSON object with {', '.join(SIZES.values())} "
                       f"({error!r})") from error
    if not any("adaLN" in name for name in tensors):
        fields["cond_dim"] = 0
    return from_dict({"model": {**fields, "dropout": 0.0}}).model, sizes.get("block_size")
