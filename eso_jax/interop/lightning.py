"""The weights and the config in a Lightning .ckpt, as torch.save writes it: a zip of a pickle and of tensors' bytes.

  NAME/data.pkl   {"state_dict": {name: tensor}, "ema": {"shadow_params": [tensor]}, "hyper_parameters": {...}, ...}
  NAME/data/KEY   the bytes of one storage; the pickle says which part of it is which tensor

Neither torch nor OmegaConf is needed, and the pickle is not run (pickles.py).
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from eso_jax.errors import EsoError, require
from eso_jax.interop import pickles
from eso_jax.interop.names import authors_names, is_buffer
from eso_jax.interop.pickles import Global, Inert, Persistent, shown

STORAGES: dict[str, Any] = {
    "torch.FloatStorage": np.float32, "torch.HalfStorage": np.float16, "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.DoubleStorage": np.float64, "torch.LongStorage": np.int64, "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16, "torch.CharStorage": np.int8, "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_}

SIZES = {"width": "model.hidden_size", "layers": "model.n_blocks", "heads": "model.n_heads", "length": "model.length",
         "cond_dim": "model.cond_dim", "block_size": "block_size", "family": "algo.name", "alpha_0": "algo.alpha_0"}


def read_checkpoint(path: Path, ema: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors by name, the sizes and settings its hyper-parameters tell) of a .ckpt.

    Args:
      ema: the averaged parameters, `ema.shadow_params`, a list without names, in place of the raw ones. It is in the
        order of the parameters, which is that of `state_dict` without its buffers; count and shapes must agree.

    Raises:
      EsoError: it is no such file, is damaged, would run code, or holds no such weights.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(archive, str(path)).read(ema)
    except EsoError:
        raise
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            old = file.read(16).startswith(b"\x80\x02\x8a\nl\xfc\x9cF")  # the magic number of torch before 1.6
        raise EsoError(f"SRC = {str(path)!r}: " + (
            "written by a torch before 1.6; load it there and save it again with a newer one" if old else
            f"not a whole .ckpt of torch.save ({error})")) from error
    except Exception as error:  # a zip made to mislead: encrypted, of unknown compression, with wrong offsets
        raise EsoError(f"SRC = {str(path)!r}: not a readable .ckpt ({type(error).__name__}: {error})") from error


class _Reader:
    def __init__(self, archive: zipfile.ZipFile, source: str) -> None:
        self.archive, self.source = archive, source
        self.unread = Path(source).stat().st_size
        self.storages: dict[str, bytes] = {}
        entries = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        require(len(entries) == 1, "SRC", source, "not a .ckpt of torch.save (no data.pkl in it)")
        self.root = entries[0].removesuffix("data.pkl")
        order = f"{self.root}byteorder"
        require(order not in archive.NameToInfo or self.entry(order) == b"little", "SRC", source,
                "was written on a big-endian machine; save it again on another")

    def entry(self, name: str) -> bytes:
        """The bytes of an entry. One that is compressed is refused, as torch.save compresses nothing: all entries
        together are then smaller than the file, and a small file cannot fill the memory."""
        info = self.archive.getinfo(name)
        self.unread -= info.file_size
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        require(stored and self.unread >= 0, "SRC", self.source, f"{shown(name)} in it is compressed or larger than "
                "the file, as nothing of torch.save is")
        return self.archive.read(info)

    def read(self, ema: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tree = pickles.read(self.entry(f"{self.root}data.pkl"), self.source)
        weights = tree.get("state_dict") if isinstance(tree, dict) else None
        if not isinstance(weights, dict):
            raise EsoError(f"SRC = {self.source!r}: not a Lightning checkpoint (no state_dict)")
        authors = authors_names(map(str, weights), self.source)
        tensors = {authors[str(name)]: self.array(value, str(name)) for name, value in weights.items()}
        if ema:
            tensors |= self.shadow(tree, {n: t for n, t in tensors.items() if not is_buffer(n)})
        return tensors, _sizes_in(tree.get("hyper_parameters"))

    def shadow(self, tree: dict[Any, Any], raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The averaged parameters, by the names of the raw ones."""
        ema = tree.get("ema")
        shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
        if not isinstance(shadow, list):
            raise EsoError(f"--ema: {self.source} holds no ema.shadow_params; leave --ema out for the raw parameters")
        require(len(shadow) == len(raw), "ema.shadow_params", f"{len(shadow)} tensors",
                f"{self.source} has {len(raw)} parameters in its state_dict")
        tensors = {}
        for i, (value, (name, like)) in enumerate(zip(shadow, raw.items(), strict=True)):
            tensors[name] = self.array(value, f"ema.shadow_params[{i}]")
            require(tensors[name].shape == like.shape, f"ema.shadow_params[{i}]", tensors[name].shape,
                    f"should have {like.shape}, the shape of {shown(name)} in {self.source}")
        return tensors

    def array(self, value: Any, name: str) -> np.ndarray:
        """The array of a rebuilt tensor, once its record and its storage agree."""
        if isinstance(value, Inert) and value.name == "torch._utils._rebuild_parameter":
            value = value.arguments[0]
        known = isinstance(value, Inert) and value.name.startswith("torch._utils._rebuild_tensor")
        require(known, shown(name), type(value).__name__, f"{self.source} should hold a tensor there")
        pointer, offset, shape, strides = value.arguments[:4]
        require(isinstance(pointer, Persistent), shown(name), type(pointer).__name__, "should refer to a storage")
        kind, storage, key, _, count = pointer.identity
        # Before any use: nested tuples may print as 2^n characters, and text times a number is long text.
        plain = isinstance(key, str) and all(type(n) is int for n in (count, offset, *shape, *strides))
        require(plain, shown(name), "a tensor", f"{self.source} should give its storage a name, and its count, offset, "
                "shape and strides as integers")
        dtype = np.dtype(STORAGES[storage.name]) if isinstance(storage, Global) and storage.name in STORAGES else None
        if kind != "storage" or dtype is None:
            raise EsoError(f"{shown(name)}: {self.source} keeps it in a storage that is not read here; save it as "
                           "float32")
        entry = f"{self.root}data/{key}"
        data = self.storages[entry] = self.storages.get(entry) or self.entry(entry)
        require(len(data) == count * dtype.itemsize, shown(name), f"{len(data)} bytes",
                f"{self.source} says {count} numbers of {dtype.itemsize} bytes")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        # Each number belongs to one place of the tensor: a small storage can't pose as a huge one.
        inside = all(n >= 0 for n in (offset, *shape, *strides)) and math.prod(shape) <= count and last < max(count, 1)
        require(inside, shown(name), str((offset, shape, strides))[:200],
                f"its offset, shape and strides don't fit the storage of {count} numbers in {self.source}")
        numbers = np.frombuffer(data, dtype)[offset:]
        view = np.lib.stride_tricks.as_strided(numbers, shape, [s * dtype.itemsize for s in strides], writeable=False)
        return view if numbers.size else np.zeros(shape, dtype)


def _sizes_in(hyper_parameters: Any) -> dict[str, Any]:
    """The sizes and settings in the pickled OmegaConf config, by our names; those absent or interpolated left out."""
    config = _entries(hyper_parameters).get("config")
    sizes = {}
    for ours, path in SIZES.items():
        value = config
        for part in path.split("."):
            value = _entries(value).get(part)
        value = _plain(value)
        if isinstance(value, (int, float)) or ours == "family" and isinstance(value, str):
            sizes[ours] = shown(value) if isinstance(value, str) else value
    mode = _entries(_entries(config).get("algo")).get("diffusion_attn_mode")
    if sizes.get("family") == "esolm" and _plain(mode) == "mixed2":
        sizes["family"] = "esolm_a"
    return sizes


def _entries(value: Any) -> dict[Any, Any]:
    """The entries of a dict or of a record of OmegaConf's DictConfig; none of anything else."""
    value = value.state if isinstance(value, Inert) else value
    content = value.get("_content", value) if isinstance(value, dict) else None
    return content if isinstance(content, dict) else {}


def _plain(value: Any) -> Any:
    """The value in a record of an OmegaConf node; other values as they are."""
    return value.state.get("_val") if isinstance(value, Inert) and isinstance(value.state, dict) else value
