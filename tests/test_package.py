"""The sdist and the wheel: built, installed, and used outside the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
USE = """
import sys
from pathlib import Path
import eso_jax
from eso_jax.cli import main
assert Path(eso_jax.__file__).is_relative_to(sys.argv[1]), eso_jax.__file__
small = "model.length=16 model.width=16 model.layers=1 model.heads=2 train.steps=2 train.eval_windows=8".split()
assert main(["train", "quickstart", "--workdir", "w", "train.batch_size=8", "data.source=text.py", *small]) == 0
assert main(["sample", "--workdir", "w", "--num-samples", "1", "--steps", "4", "--out", "s.npz"]) == 0
"""


def test_a_wheel_is_all_that_is_needed(tmp_path: Path) -> None:
    clone, dist, site, away = (tmp_path / name for name in ("clone", "dist", "site", "away"))
    for folder in (clone, away):
        folder.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "eso_jax", clone / "eso_jax", ignore=shutil.ignore_patterns("__pycache__"))

    def python(*arguments: object, cwd: Path = tmp_path, **env: str) -> None:
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, **env}, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr

    python("-m", "build", "--outdir", dist, clone)  # the sdist, and a wheel of it
    (wheel,) = dist.glob("*.whl")
    assert len(list(dist.glob("*.tar.gz"))) == 1
    files = {path.relative_to(clone).as_posix() for path in (clone / "eso_jax").rglob("*") if path.is_file()}
    assert files <= set(zipfile.ZipFile(wheel).namelist())
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    (away / "text.py").write_text("x = 1\nprint(x)\n" * 300)
    python("-c", USE, site, cwd=away, PYTHONPATH=os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
