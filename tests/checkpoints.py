"""Checkpoints as torch.save writes them, made by hand: tests need no torch, and some are nothing torch would write."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
            "float64": "DoubleStorage", "int64": "LongStorage"}


def literal(value: Any) -> bytes:
    """Instructions that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def many(*parts: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return named(module, name) + many(*arguments) + b"R"


def mapping(items: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(literal(key) + value for key, value in items.items()) + b"u"


def listed(items: Sequence[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def tensor(key: Any, count: Any, shape: Sequence[Any], strides: Sequence[Any], offset: Any = 0,
           storage: str = "FloatStorage") -> bytes:
    pointer = many(literal("storage"), named("torch", storage), literal(key), literal("cpu"), literal(count)) + b"Q"
    return call("torch._utils", "_rebuild_tensor_v2", pointer, literal(offset), literal(tuple(shape)),
                literal(tuple(strides)), literal(False), call("collections", "OrderedDict"))


def node(value: Any, kind: str = "AnyNode") -> bytes:
    """A value, or a dict of nodes, as OmegaConf pickles it."""
    if isinstance(value, dict):
        content = mapping({name: node(inner) for name, inner in value.items()})
        return named("omegaconf.dictconfig", "DictConfig") + b")\x81" + mapping({"_content": content}) + b"b"
    return named("omegaconf.nodes", kind) + b")\x81" + mapping({"_val": literal(value)}) + b"b"


def write_zip(path: Path, body: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program(body))
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def write(path: Path, tensors: dict[str, np.ndarray], shadow: Sequence[np.ndarray] | None = None,
          extra: dict[str, bytes] | None = None) -> Path:
    """A Lightning checkpoint of contiguous tensors, with averaged ones, with further entries."""
    storages: dict[str, bytes] = {}

    def stored(array: np.ndarray) -> bytes:
        key = str(len(storages))
        storages[key] = array.tobytes()
        strides = [s // array.itemsize for s in array.strides]
        return tensor(key, array.size, array.shape, strides, storage=STORAGES[array.dtype.name])

    parts = {"state_dict": mapping({name: stored(array) for name, array in tensors.items()})}
    if shadow is not None:
        parts["ema"] = mapping({"decay": literal(0.9999), "shadow_params": listed([stored(array) for array in shadow])})
    return write_zip(path, mapping(parts | (extra or {})), storages)
