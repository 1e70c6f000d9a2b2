"""A family that somebody adds: a file of its own, registered by one call, and every command knows it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

import eso_jax
from conftest import Run, as_family, renamed, without_shape_checks
from eso_jax import families, flops
from eso_jax.aot import target
from eso_jax.config import Config, FamilyConfig
from eso_jax.evaluation import throughput
from eso_jax.evaluation.mauve import ModelFeatures
from eso_jax.evaluation.texts import of_tokens
from eso_jax.families.bd3lm import BD3LM
from eso_jax.run.workdir import read_config

pytestmark = pytest.mark.slow


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


@pytest.fixture(scope="module")
def small(base: Config) -> Config:
    """Few programs: sampling, scoring and checking the cache compile one for each shape of a step."""
    return base.override("model.length=8", "train.save_every=4")


@pytest.fixture(autouse=True)
def planned_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made for this machine's device: what compiles for others need not be installed."""
    monkeypatch.setattr(target, "prepare", lambda topology: None)
    monkeypatch.setattr(target, "devices", lambda *arguments: jax.devices())


def test_a_family_is_one_file(small: Config, tmp_path: Path, run: Run) -> None:
    """Everything that is asked of a model, of the added family and of BD3-LM itself: the same answers."""
    theirs = answers(small.override(*as_family("bd3lm")), run, tmp_path / "bd3lm")
    with renamed(""):  # what is registered in it is forgotten after it
        families.register(Added())
        ours = answers(small.override("family.name=added", "family.span=4"), run, tmp_path / "added")
    same(ours, theirs)
    assert "| family | Added-LM, blocks of 4 |" in (tmp_path / "added" / "m.md").read_text()


@pytest.mark.parametrize("family", list(families.BY_NAME))
def test_names_mean_nothing(family: str, small: Config, tmp_path: Path, run: Run) -> None:
    """All families under other names: the same answers to the bit."""
    config = small.override(*as_family(family))
    theirs = answers(config, run, tmp_path / "own")
    with renamed("x_"):
        ours = answers(dataclasses.replace(config, family=FamilyConfig(
            **{**dataclasses.asdict(config.family), "name": f"x_{family}"})), run, tmp_path / "other")
    same(ours, theirs)


def test_samplers_are_measured_whatever_their_names() -> None:
    """(The command itself runs under other names in tests/test_cli.py.)"""
    cases = throughput.ONE_BY_ONE + throughput.TABLE_13
    labels = [case.label for case in cases]
    with renamed("x_"):
        assert [case.label for case in cases] == labels
        assert {case.family.name for case in cases} == {"x_esolm", "x_ar", "x_mdlm", "x_bd3lm"}


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) == 9
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
    family, prefix = families.get(config), getattr(families.get(config), "prefix", False)
    natural = ["--alpha-0", 0] if prefix else []  # (A) scores no other order
    run("score", "--workdir", workdir, "--tokens", out, "--num-orders", 2, *natural, "--out", folder / "orders.npz")
    run("score", "--workdir", workdir, "--tokens", out, "--plan", out, "--out", folder / "plan.npz")
    if family.sampler(config).cached:
        assert "TOO MUCH" not in run("check-cache", "--workdir", workdir, "--batch-size", 2)
    run("export", "--workdir", workdir, "--out", folder / "m.safetensors")
    run("import", folder / "m.safetensors", "--config", folder / "m.json", "--out", folder / "back")
    assert read_config(folder / "back").family == config.family
    judge = workdir if family.one_pass and not prefix else "none"
    run("quality", "--samples", out, "--judge", judge, "--reference", workdir, "--out", folder / "q.json")
    with without_shape_checks():
        run("plan", folder / "run.json", "--topology", "v5e:1x1", "--sample-batch", 2, "--out", folder / "p.json")
    quality, plan = (json.loads((folder / name).read_text()) for name in ("q.json", "p.json"))
    texts = of_tokens(np.load(out)["tokens"], None)
    return {"bound": np.array(json.loads((folder / "e.json").read_text())["nats_per_token"]),
            "tokens": np.load(out)["tokens"], "order": np.load(out)["order"],
            "orders": np.load(folder / "orders.npz")["logp_per_order"], "plan": np.load(folder / "plan.npz")["logp"],
            "quality": np.array([quality["entropy"]["value"], *(quality["gen_ppl"] or {}).values()]),
            "planned": np.array([plan[part]["memory_total"] for part in ("training", "sampling")]),
            "features": ModelFeatures(eso_jax.load(workdir)).of(texts),
            "flops": np.array(list(flops.training_step(config).values()))}
