"""What `eso-jax import` reads: .safetensors, whole or in shards, a Lightning .ckpt, a repository of the Hugging Face
hub or a snapshot of one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from eso_jax import families
from eso_jax.config import Config, family_fields, from_dict
from eso_jax.errors import EsoError, reason_of, require
from eso_jax.interop import lightning, names
from eso_jax.interop.pickles import shown
from eso_jax.model.params import Params

# What a JSON of sizes may say: our name -> the names it goes by in sizes.json and in the authors' hub repositories. The
# settings of families go by their own names.
KEYS = {"width": ("hidden_size", "hidden_dim"), "layers": ("n_blocks",), "heads": ("n_heads",),
        "length": ("length", "model_length"), "vocab_size": ("vocab_size",), "mask_id": ("mask_id", "mask_index"),
        "cond_dim": ("cond_dim",), "family": ("family", "model_type")}
MODEL = ("width", "layers", "heads", "length", "vocab_size", "mask_id", "cond_dim")
INDEX = ".safetensors.index.json"
HEAD_SIZE = 64  # of the authors' small and medium models


def import_checkpoint(src: str | Path, sizes: str | Path | None = None, family: str | None = None, *,
                      ema: bool = False, length: int | None = None, heads: int | None = None,
                      alpha_0: float | None = None, start_id: int | None = None) -> tuple[Config, Params]:
    """The config and parameters of one of the authors' checkpoints.

    What an argument does not say is taken from `sizes`; then from the checkpoint's own config (a .ckpt's
    hyper-parameters, a repository's config.json); then from the tensors. Where none of them tells the number of heads,
    heads have size 64; the family is "esolm".

    Args:
      src: a .safetensors file, the .safetensors.index.json of several, a Lightning .ckpt file, a folder with one of the
        former and a config.json, or a hub repository ("owner/name").
      sizes: a JSON of sizes, as `eso-jax export` writes it.
      family: what it was trained as.
      ema: a .ckpt's averaged parameters in place of the raw ones.
      length: L, which no tensor shows.
      heads: H.
      alpha_0: an Eso-LM's training value, which sampling and evaluation take where none is given.
      start_id: the token an AR model was trained to begin with.

    Raises:
      EsoError: the source cannot be read, a size is unknown, or a tensor is missing, unknown or of another shape.
    """
    tensors, own_sizes = _read(src, ema)
    of_files = own_sizes | (read_sizes(Path(sizes)) if sizes is not None else {})
    given = {"family": family, "length": length, "heads": heads, "alpha_0": alpha_0, "start_id": start_id}
    given = {name: value for name, value in given.items() if value is not None}
    config = _config(names.sizes_of(tensors, str(src)), of_files, given, str(src))
    return config, names.to_params(tensors, config.model, str(src))


def _config(of_tensors: dict[str, Any], of_files: dict[str, Any], given: dict[str, Any], src: str) -> Config:
    """The config, by sizes and settings that tensors show, that files say and that arguments give; later ones win."""
    sizes = of_tensors | of_files | given
    if of_tensors["cond_dim"] == 0:
        sizes["cond_dim"] = 0  # files of sizes may give one for AR models as well, which have no AdaLN
    if "length" not in sizes:
        raise EsoError(f"--length: {src} does not say it; give --length, or --config with a JSON of sizes")
    if "heads" not in sizes:
        require(sizes["width"] % HEAD_SIZE == 0, "--heads", None, f"{src} does not say it, and width "
                f"{sizes['width']} has no heads of size {HEAD_SIZE}; give --heads, or --config with a JSON of sizes")
        sizes["heads"] = sizes["width"] // HEAD_SIZE
    name = sizes.get("family", "esolm")
    family = families.BY_NAME.get(name)  # None: the config refuses it below
    require(sizes["cond_dim"] > 0 or family is None or family.without_adaln, "--family", name,
            f"{src} has no AdaLN tensors, so it is an AR model; give --family ar")
    # What a file says of another family than the one asked for is passed over; what is given has to fit.
    families_of = family_fields()
    settings = {field: sizes[field] for field, owners in families_of.items() if field in sizes and name in owners}
    if given.get("alpha_0") not in (None, of_files.get("alpha_0")):
        settings.pop("kappa", None)  # it is of the file's own alpha_0
    config = from_dict({"model": {field: sizes[field] for field in MODEL if field in sizes} | {"dropout": 0.0},
                        "family": {"name": name, **settings}})
    changes = {field: given[field] for field in families_of if field in given}
    return dataclasses.replace(config, family=config.family.change(**changes))


def _read(src: str | Path, ema: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, what the checkpoint's own config says)."""
    path = Path(src)
    if path.suffix == ".ckpt":
        require(path.is_file(), "SRC", str(src), "no such file")
        return lightning.read_checkpoint(path, ema)
    require(not ema, "--ema", True, f"{src} holds one set of weights; only a .ckpt has averaged ones beside the raw")
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith((".safetensors", INDEX)):
        return read_safetensors(path), {}
    is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", str(src)) is not None and not path.exists()
    require(is_repository, "SRC", str(src), "must be a .safetensors or .ckpt file, a folder with one, or a hub "
            "repository owner/name")
    return _read_folder(download(str(src)))


def _read_folder(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The same of a snapshot of a repository: weights, whole or in shards with an index, and a config.json."""
    weights = sorted(folder.glob(f"*{INDEX}")) or sorted(folder.glob("*.safetensors"))
    others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".ckpt", ".bin", ".pt", ".pth")]
    require(len(weights) == 1, "SRC", str(folder), f"must hold one .safetensors, or one {INDEX}, and holds "
            f"{', '.join(path.name for path in weights) or 'none'}; give the file"
            + (f" (what it holds: {', '.join(others)})" if others else ""))
    config = folder / "config.json"
    return read_safetensors(weights[0]), read_sizes(config, "SRC") if config.is_file() else {}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors file, or of the shards that a .safetensors.index.json names, by the authors' names.

    Raises:
      EsoError: a file is missing, truncated or corrupt, or a shard lacks a tensor.
    """
    if path.name.endswith(INDEX):
        shards = _read_index(path)
        tensors = {name: tensor for shard in sorted(set(shards.values()))
                   for name, tensor in _read_one(path.with_name(shard)).items()}
        missing = sorted(shards.keys() - tensors.keys())
        if missing:
            raise EsoError(f"SRC = {str(path)!r}: {shards[missing[0]]} lacks {shown(missing[0])} ({len(missing)} are "
                           "missing)")
    else:
        tensors = _read_one(path)
    authors = names.authors_names(tensors, str(path))
    return {authors[name]: tensor for name, tensor in tensors.items()}


def _read_one(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    require(path.is_file(), "SRC", str(path), "no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise EsoError(f"SRC = {str(path)!r}: not a readable safetensors file ({error})") from error


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, beside the index."""
    require(path.is_file(), "SRC", str(path), "no such file")
    try:
        shards = json.loads(path.read_text("utf-8"))["weight_map"]
        good = isinstance(shards, dict) and len(shards) > 0 and all(
            isinstance(shard, str) and Path(shard).name == shard for shard in shards.values())
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    require(good, "SRC", str(path), "not an index of shards: weight_map must say the file, beside it, of each tensor")
    return dict(shards)


def read_sizes(path: Path, flag: str = "--config") -> dict[str, Any]:
    """What a JSON of sizes says, by our names; `flag` names it in errors."""
    require(path.is_file(), flag, str(path), "no such file; give a JSON of the sizes")
    try:
        values = json.loads(path.read_text("utf-8-sig"))
        require(isinstance(values, dict), flag, str(path), "must be a JSON object")
    except EsoError:
        raise
    except ValueError as error:  # not JSON, or not text
        raise EsoError(f"{flag} = {str(path)!r}: must be a JSON object ({error})") from error
    keys = KEYS | {name: (name,) for name in family_fields()}
    sizes = {ours: values[name] for ours, theirs in keys.items() for name in theirs[::-1]
             if values.get(name) is not None}
    require(bool(sizes), flag, str(path), "says none of " + ", ".join(theirs[0] for theirs in KEYS.values()))
    if "family" in sizes:
        sizes["family"] = str(sizes["family"]).lower()  # transformers' model_type: EsoLM
    return sizes


def download(repository: str) -> Path:
    """The folder with the weights and the config.json of a hub repository, from the hub or its local cache."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(
            repository, allow_patterns=["model*.safetensors", f"*{INDEX}", "config.json"]))
    except Exception as error:  # the hub raises what its transports raise
        raise EsoError(f"SRC = {repository!r}: no such file, and not to be had from the hub ({reason_of(error)}); "
                       "without a network, give a .safetensors or .ckpt file") from error
