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

    from eso_jax.decoding.plan import Plan, join

    order, counts = (read_array(path, "--plan", key) for key in ("order", "tokens_per_step"))
    integers = all(np.issubdtype(array.dtype, np.integer) for array in (order, counts))
    require(order.ndim == 2 and counts.ndim in (1, 2) and integers, "--plan", path,
            "must hold order, int [N, L], and tokens_per_step, int [steps] or [N, steps]")
    numbers, arrays = {}, np.load(path)
    require(isinstance(arrays, np.lib.npyio.NpzFile), "--plan", path, "is one array; give the .npz of eso-jax sample")
    with arrays:
        for name in {"diffusion", "given"} & set(arrays):
            value = arrays[name]
            require(value.ndim <= 1 and np.issubdtype(value.dtype, np.integer), "--plan", path,
                    f"its {name} must be one integer, or [N]")
            numbers[name] = value if value.ndim else int(value)
    return join([Plan(jnp.asarray(order, jnp.int32), counts, **numbers)])


def read_given(path: str, plan: Plan, mask: int) -> Any:
    """The tokens that the plan in the .npz of eso-jax sample takes as given, int [N, L], with the mask elsewhere; None
    if there are none."""
    import numpy as np

    if not np.any(plan.given):
        return None
    tokens = read_array(path, "--plan", "tokens")
    require(tokens.shape == plan.order.shape, "--plan", path,
            f"its tokens, some of which are given, must be {plan.order.shape}")
    require(not (tokens == mask)[plan.known].any(), "--plan", path,
            "a stop cut tokens that were given to its samples, so that nobody knows them any more; make it without "
            "--stop")
    return np.where(plan.known, tokens, mask)
