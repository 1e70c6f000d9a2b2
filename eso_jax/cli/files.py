"""Arrays and plans that commands read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eso_jax.errors import EsoError, require

if TYPE_CHECKING:
    from eso_jax.decoding.plan import Plan


def read_arrays(path: str, flag: str, names: Sequence[str]) -> dict[str, Any]:
    """The arrays of a .npz file that have these names, as far as there are any; of a .npy file its own, by the first.

    Raises:
      EsoError: it is neither.
    """
    import zipfile

    import numpy as np

    try:
        with open(path, "rb") as file:  # np.load would leave a damaged one open
            found = np.load(file)
            if isinstance(found, np.ndarray):
                return {names[0]: found}
            return {name: found[name] for name in names if name in found}
    except FileNotFoundError as error:
        raise EsoError(f"{flag} = {path!r}: no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EsoError(f"{flag} = {path!r}: not a readable .npy file, nor a .npz with {names[0]!r}") from error


def read_array(path: str, flag: str, key: str) -> Any:
    """The array of a .npy file, or the one called `key` of a .npz file."""
    arrays = read_arrays(path, flag, [key])
    require(key in arrays, flag, path, f"holds no {key!r}")
    return arrays[key]


def read_plan(path: str, flag: str = "--plan") -> tuple[Plan, dict[str, Any]]:
    """The plan in the .npz of eso-jax sample, or one with the same `order` and `tokens_per_step`; and of `tokens` and
    `law_of_plan` what the file has. `flag` is what errors call it."""
    import jax.numpy as jnp
    import numpy as np

    from eso_jax.decoding.plan import Plan, join

    arrays = read_arrays(path, flag, ["order", "tokens_per_step", "diffusion", "given", "tokens", "law_of_plan"])
    order, counts = (arrays.pop(name, np.array("")) for name in ("order", "tokens_per_step"))
    integers = all(np.issubdtype(array.dtype, np.integer) for array in (order, counts))
    require(order.ndim == 2 and counts.ndim in (1, 2) and integers, flag, path, "must be a .npz that holds order, "
            "int [N, L], and tokens_per_step, int [steps] or [N, steps], as that of eso-jax sample")
    numbers = {}
    for name in {"diffusion", "given"} & set(arrays):
        value = arrays.pop(name)
        require(value.ndim <= 1 and np.issubdtype(value.dtype, np.integer), flag, path,
                f"its {name} must be one integer, or [N]")
        numbers[name] = value if value.ndim else int(value)
    return join([Plan(jnp.asarray(order, jnp.int32), counts, **numbers)]), arrays


def given_of_plan(path: str, plan: Plan, tokens: Any, mask: int) -> Any:
    """The tokens that a plan of `read_plan` takes as given, int [N, L], with the mask elsewhere; None for none.

    Args:
      tokens: those of its file; None if it has none.
    """
    import numpy as np

    if not np.any(plan.given):
        return None
    require(np.shape(tokens) == plan.order.shape, "--plan", path,
            f"must hold tokens, some of which are given, int {plan.order.shape}")
    require(not (tokens == mask)[plan.known].any(), "--plan", path,
            "a stop cut tokens that were given to its samples, so that nobody knows them any more; make it without "
            "--stop")
    return np.where(plan.known, tokens, mask)
