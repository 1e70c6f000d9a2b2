"""Settings that XLA needs before JAX starts; `import eso_jax` makes them.

jaxlib 0.10.2 to 0.11 give small products and sums on CPU to YNNPACK ("__ynn_fusion" in compiled code). Some of its code
is wrong: a program may compile wrongly once and correctly the next time, and a wrong one fails in every call. Public
reports are jax issues 39103, 39257 and 40412; docs/choices.md says how often it happened here.
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import jax
from jaxlib import version

try:  # JAX has no public name for it
    from jax._src.xla_bridge import backends_are_initialized
except ImportError:
    def backends_are_initialized() -> bool:
        return False

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def without_ynn_fusions() -> None:
    """Adds the flag that turns YNNPACK's fusions off (an empty list of kinds) to XLA_FLAGS, which child processes
    inherit, if jaxlib has the fault and the flag is not given. Warns if that is not possible: JAX has already started,
    or XLA_FLAGS is the name of a file."""
    if not (0, 10, 2) <= version.__version_info__ < (0, 12):
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG in flags:
        return
    file = _names_a_file(flags)
    if file or backends_are_initialized():
        reason, remedy = ((f"XLA_FLAGS names a file, {flags}", "Add there") if file else
                          ("JAX started before eso_jax was imported", "Import eso_jax first, or set in XLA_FLAGS"))
        warnings.warn(f"{reason}: on CPU, jaxlib {version.__version__} may compute wrong numbers. {remedy} {_FLAG}=",
                      RuntimeWarning, stacklevel=3)
        return
    add_flag(f"{_FLAG}=")


def add_flag(flag: str) -> None:
    """Adds a flag, --NAME=VALUE, to XLA_FLAGS. Does nothing if its name is there already, or XLA_FLAGS is the name of a
    file: XLA would take both together for a name."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in flags and not _names_a_file(flags):
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def _names_a_file(flags: str) -> bool:
    return bool(flags.strip()) and not flags.strip().startswith("-")


def without_absent_tpu() -> None:
    """Keeps JAX from starting libtpu (the extra `tpu`) on a machine without a TPU, where it prints many errors. On one
    with a TPU, JAX has set `jax_platforms` itself on import."""
    gpus = any(importlib.util.find_spec(plugin) for plugin in ("jax_cuda12_plugin", "jax_cuda13_plugin"))
    unsaid = jax.config.jax_platforms is None  # type: ignore[attr-defined]
    if unsaid and importlib.util.find_spec("libtpu") and not gpus:
        jax.config.update("jax_platforms", "cpu")
