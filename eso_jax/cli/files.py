"""Files that commands read and write, and lines for people."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eso_jax.errors import EsoError, require

if TYPE_CHECKING:
    from eso_jax.decoding.plan import Plan


def check_out(out: str) -> None:
    """Before any long work: --out can be written."""
    path = Path(out).absolute()
    require(path.parent.is_dir(), "--out", out, f"the folder {str(path.parent)!r} does not exist")
    require(not path.is_dir(), "--out", out, "is a folder; give the name of a file")
    require(os.access(path if path.exists() else path.parent, os.W_OK), "--out", out, "cannot be written")


def write_npz(path: str, **arrays: Any) -> None:
    import numpy as np

    with open(path, "wb") as file:  # np.savez would add .npz to a name
        np.savez(file, **arrays)
    say(f"wrote {path}")


def write_lines(path: str, text: list[str]) -> None:
    """JSON lines of {"text": ...}, as `eso-jax quality` and others read them."""
    Path(path).write_text("".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in text), "utf-8")
    say(f"wrote {path}")


def read_array(path: str, flag: str, key: str) -> Any:
    """The array of a .npy file, or the one called `key` of a .npz file."""
    import zipfile

    import numpy as np

    try:
        array = np.load(path)
        if isinstance(array, np.lib.npyio.NpzFile):
            array = array[key]
    except FileNotFoundError as error:
        raise EsoError(f"{flag} = {path!r}: no such file") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise EsoError(f"{flag} = {path!r}: not a readable .npy file, nor a .npz with {key!r}") from error
    return array


def read_plan(path: str) -> Plan:
    """The plan in the .npz of eso-jax sample, or one with the same `order` and `tokens_per_step`."""
    import jax.numpy as jnp
    import numpy as np

    from eso_jax.decoding.plan import Plan

    order, counts = (read_array(path, "--plan", key) for key in ("order", "tokens_per_step"))
    integers = all(np.issubdtype(array.dtype, np.integer) for array in (order, counts))
    require(order.ndim == 2 and counts.ndim == 1 and integers, "--plan", path,
            "must hold order, int [N, L], and tokens_per_step, int [steps]")
    with np.load(path) as arrays:
        given = arrays["diffusion"] if "diffusion" in arrays else None
    require(given is None or given.shape == () and np.issubdtype(given.dtype, np.integer), "--plan", path,
            "its diffusion must be one integer")
    diffusion = None if given is None else int(given)
    return Plan(jnp.asarray(order, jnp.int32), counts, diffusion)


def write_json(path: str | None, values: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(values, indent=1) + "\n")
        say(f"wrote {path}")


def say(message: str) -> None:
    print(message, file=sys.stderr)
