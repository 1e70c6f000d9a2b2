"""A family that somebody adds: a file of its own and its name in two tables, and every command knows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import eso_jax
from conftest import Run
from eso_jax import families, flops
from eso_jax.config import FAMILIES, Config
from eso_jax.evaluation.mauve import ModelFeatures
from eso_jax.evaluation.texts import of_tokens
from eso_jax.families.bd3lm import BD3LM
from eso_jax.run.workdir import read_config

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Added(BD3LM):
    """BD3-LM under another name. Its passes have two streams and blocks, which no default of another family has."""

    name: str = "added"
    label: str = "Added-LM"


def test_a_family_is_one_file(base: Config, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is asked of a model, of the added family and of BD3-LM itself: the same answers."""
    monkeypatch.setitem(families.BY_NAME, "added", Added())
    monkeypatch.setattr("eso_jax.config.FAMILIES", (*FAMILIES, "added"))
    found = {name: answers(base.override(f"family.name={name}", "family.alpha_0=1", "family.block_size=4"), run,
                           tmp_path / name) for name in ("bd3lm", "added")}
    theirs, ours = found["bd3lm"], found["added"]
    assert ours.keys() == theirs.keys() and len(ours) == 7
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], name)
    assert "| family | Added-LM, blocks of 4 |" in (tmp_path / "added" / "m.md").read_text()


def answers(config: Config, run: Run, folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    (folder / "run.json").write_text(config.to_json())
    workdir, out = folder / "w", folder / "s.npz"
    # After two steps the gates of attention, which begin at 0, still let nothing through.
    run("train", folder / "run.json", "--workdir", workdir, "train.steps=4")
    run("eval", "--workdir", workdir, "--num-windows", 8, "--out", folder / "e.json")
    run("sample", "--workdir", workdir, "--num-samples", 4, "--steps", 8, "--out", out)
    run("score", "--workdir", workdir, "--tokens", out, "--num-orders", 2, "--out", folder / "orders.npz")
    run("score", "--workdir", workdir, "--tokens", out, "--plan", out, "--out", folder / "plan.npz")
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
