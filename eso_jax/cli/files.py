"""Arrays and plans that commands read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eso_jax.errors import EsoError, require

if TYPE_CHECKING:
    from eso_jax.decoding.plan import Plan


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
        diffusion = arrays["diffusion"] if "diffusion" in arrays else None
    require(diffusion is None or diffusion.shape == () and np.issubdtype(diffusion.dtype, np.integer), "--plan", path,
            "its diffusion must be one integer")
    return Plan(jnp.asarray(order, jnp.int32), counts, None if diffusion is None else int(diffusion))
