"""XLA's settings: what eso_jax/xla.py turns off is off, whatever else XLA_FLAGS says, and only where it must be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxlib import version
import pytest

from eso_jax import xla

SUMS_OF_PRODUCTS = """
import os
import jax
import jax.numpy as jnp
{before}
import eso_jax
program = jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b).sum(-1))
text = program.lower(jnp.ones((64, 6, 6)), jnp.ones((64, 6, 24))).compile().as_text()
print("__ynn_fusion" in text, jax.device_count(), os.environ.get("XLA_FLAGS"))
"""
AFFECTED = (0, 10, 2) <= version.__version_info__ < (0, 12)


def fresh(before: str = "", **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | environment
    return subprocess.run([sys.executable, "-W", "always", "-c", SUMS_OF_PRODUCTS.format(before=before)], env=env,
                          capture_output=True, text=True, check=True)


@pytest.mark.skipif(not AFFECTED, reason=f"jaxlib {version.__version__} is sound")
@pytest.mark.parametrize(("flags", "devices"), [("", "1"), ("--xla_force_host_platform_device_count=3", "3")])
def test_no_program_has_ynn_fusions(flags: str, devices: str) -> None:
    found = fresh(**{"XLA_FLAGS": flags} if flags else {}).stdout.split()
    assert found[:2] == ["False", devices] and all(flag in found[2:] for flag in flags.split())


@pytest.mark.skipif(not AFFECTED, reason=f"jaxlib {version.__version__} is sound")
def test_too_late_is_said() -> None:
    late = fresh("jnp.ones(3).sum()")
    assert "Import eso_jax first" in late.stderr and late.stdout.startswith("True")
    assert "Import eso_jax first" not in fresh().stderr


def test_this_process() -> None:
    text = jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b).sum(-1)).lower(
        jnp.ones((64, 6, 6)), jnp.ones((64, 6, 24))).compile().as_text()
    assert not AFFECTED or "__ynn_fusion" not in text


@pytest.mark.parametrize(("release", "given", "flags"), [
    ((0, 10, 1), "--a", "--a"),
    ((0, 10, 2), "", "--xla_cpu_experimental_ynn_fusion_type="),
    ((0, 11, 2), "--a", "--a --xla_cpu_experimental_ynn_fusion_type="),
    ((0, 11, 0), "--xla_cpu_experimental_ynn_fusion_type=reduce", "--xla_cpu_experimental_ynn_fusion_type=reduce"),
    ((0, 12, 0), "", ""),
])
def test_flags_by_version(release: tuple[int, ...], given: str, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla.version, "__version_info__", release)
    monkeypatch.setattr(xla, "backends_are_initialized", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", given)
    xla.without_ynn_fusions()
    assert os.environ["XLA_FLAGS"] == flags


def test_a_file_of_flags_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA would take name and flag together for a name."""
    monkeypatch.setattr(xla.version, "__version_info__", (0, 10, 2))
    monkeypatch.setenv("XLA_FLAGS", "/etc/xla.flags")
    with pytest.warns(RuntimeWarning, match="XLA_FLAGS names a file, /etc/xla.flags: .* Add there --xla_cpu"):
        xla.without_ynn_fusions()
    assert os.environ["XLA_FLAGS"] == "/etc/xla.flags"


def test_an_absent_tpu_is_not_looked_for(tmp_path: Path) -> None:
    """The extra tpu brings libtpu, which may be there to plan for a slice."""
    (tmp_path / "libtpu.py").write_text("def get_library_path():\n    return '/nowhere/libtpu.so'\n", "utf-8")
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    code = "import eso_jax, jax; print(jax.config.jax_platforms, len(jax.devices()))"
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "cpu 1\n", "")
