"""A family that somebody adds: a file of its own, registered by one call, and every command knows it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import eso_jax
from conftest import Run, as_family, renamed
from eso_jax import families, flops
from eso_jax.config import Config, FamilyConfig
from eso_jax.evaluation.mauve import ModelFeatures
from eso_jax.evaluation.texts import of_tokens
from eso_jax.families.bd3lm import BD3LM
from eso_jax.run.workdir import read_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_programs")]


@dataclass(frozen=True)
class AddedConfig(FamilyConfig):
    """BD3-LM's settings in words of its own."""

    span: int = 8
    t_range: tuple[float, float] = (1e-3, 1.0)

    @property
    def block_size(self) -> int:
        return self.span


@dataclass(frozen=True)
class Added(BD3LM):
    """BD3-LM under another name. Its passes have two streams and blocks, which no default of another family has."""

    name: str = "added"
    label: str = "Added-LM"
    settings = AddedConfig


def test_a_family_is_one_file(base: Config, tmp_path: Path, run: Run) -> None:
    """Everything that is asked of a model, of the added family and of BD3-LM itself: the same answers."""
    theirs = answers(base.override(*as_family("bd3lm")), run, tmp_path / "bd3lm")
    with renamed(""):  # what is registered in it is forgotten after it
        families.register(Added())
        ours = answers(base.override("family.name=added", "family.span=4"), run, tmp_path / "added")
    same(ours, theirs)
    assert "| family | Added-LM, blocks of 4 |" in (tmp_path / "added" / "m.md").read_text()


@pytest.mark.parametrize("family", list(families.BY_NAME))
def test_names_mean_nothing(family: str, base: Config, tmp_path: Path, run: Run) -> None:
    """All families under other names: the same answers to the bit."""
    small = base.override(*as_family(family), "train.save_every=4", "model.layers=1", "model.length=8")
    theirs = answers(small, run, tmp_path / "own")
    with renamed("x_"):
        ours = answers(dataclasses.replace(small, family=FamilyConfig(
            **{**dataclasses.asdict(small.family), "name": f"x_{family}"})), run, tmp_path / "other")
    same(ours, theirs)


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) == 7
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], name)


def answers(config: Config, run: Run, folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    (folder / "run.json").write_text(config.to_json())
    workdir, out = folder / "w", folder / "s.npz"
    # After two steps the gates of attention, which begin at 0, still let nothing through.
    run("train", folder / "run.json", "--workdir", workdir, "train.steps=4")
    run("eval", "--workdir", workdir, "--num-windows", 8, "--out", folder / "e.json")
    run("sample", "--workdir", workdir, "--num-samples", 4, "--steps", 8, "--out", out)
    natural = ["--alpha-0", 0] if getattr(families.get(config), "prefix", False) else []  # (A) scores no other order
    run("score", "--workdir", workdir, "--tokens", out, "--num-orders", 2, *natural, "--out", folder / "orders.npz")
    run("score", "--workdir", workdir, "--tokens", out, "--plan", out, "--out", folder / "plan.npz")
    if families.get(config).sampler(config).cached:
        assert "TOO MUCH" not in run("check-cache", "--workdir", workdir, "--batch-size", 2)
    run("export", "--workdir", workdir, "--out", folder / "m.safetensors")
    run("import", folder / "m.safetensors", "--config", folder / "m.json", "--out", folder / "back")
    assert read_config(folder / "back").family == config.family
    texts = of_tokens(np.load(out)["tokens"], None)
    return {"bound": np.array(json.loads((folder / "e.json").read_text())["nats_per_token"]),
            "tokens": np.load(out)["tokens"], "order": np.load(out)["order"],
            "orders": np.load(folder / "orders.npz")["logp_per_order"], "plan": np.load(folder / "plan.npz")["logp"],
            "features": ModelFeatures(eso_jax.load(workdir)).of(texts),
            "flops": np.array(list(flops.training_step(config).values()))}
