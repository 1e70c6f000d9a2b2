"""`eso-jax bench training`: its rows by their formulas, each mistake a line."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from conftest import Run
from eso_jax.errors import EsoError
from eso_jax.evaluation import training_speed
from eso_jax.run import metrics, train

pytestmark = pytest.mark.usefixtures("no_shape_checks")

SMALL = ["--size", "tiny", "--length", 16, "--batch", 4, "model.width=16", "model.heads=2", "model.layers=1",
         "model.vocab_size=20", "model.cond_dim=8"]


@pytest.mark.slow
def test_rows(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "speed", lambda tokens, flops: {"tokens_per_second": tokens, "mfu": flops / 1e9})
    out = tmp_path / "b.json"
    text = run("bench", "training", "--families", "esolm,mdlm", "--alpha-0", 0.5, "--steps", 3, "--out", out, *SMALL)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["family"], row["alpha_0"]) for row in rows] == [("esolm", 0.5), ("mdlm", 1.0)]
    for row in rows:
        assert row["quartiles"][0] <= row["step_seconds"] <= row["quartiles"][1]
        assert row["tokens_per_s"] == pytest.approx(4 * 16 / row["step_seconds"])
        assert row["mfu"] == pytest.approx(row["model_flops"] / row["step_seconds"] / 1e9)
        assert row["needed_flops"] < row["model_flops"] and row["attention"].startswith("plain")
        assert 0.9 < row["executed_flops"] / row["model_flops"] < 1.1  # the plain backend scores every pair
        state = jax.eval_shape(lambda: train.init_state(training_speed.configs_of(
            [row["family"]], "tiny", 16, 4, [0.5], [str(field) for field in SMALL if "=" in str(field)])[0]))
        assert row["peak_bytes"] > sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert row["compile_seconds"] > 0
    assert out.with_suffix(".md").read_text().strip() in text and out.with_suffix(".png").stat().st_size > 5000


def test_steps_0_counts_only(tmp_path: Path, run: Run) -> None:
    run("bench", "training", "--families", "ar", "--steps", 0, "--out", tmp_path / "b.json", *SMALL)
    (row,) = json.loads((tmp_path / "b.json").read_text())["rows"]
    heads, _, cells = [line.split(" | ") for line in (tmp_path / "b.md").read_text().splitlines()[-3:]]
    assert not {"ms a step (quartiles)", "tokens/s", "MFU"} & set(heads)  # nothing was timed
    assert float(cells[heads.index("MFLOP of the model")]) == pytest.approx(row["model_flops"] / 1e6, rel=1e-3)
    assert row["executed_flops"] > 0 and row["tokens_per_s"] is row["step_seconds"] is row["mfu"] is None


def test_mistakes(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nBFC allocator: ...")

    for arguments, message in ((["--families", "esolm,gpt"], "--families = 'gpt': choose of esolm"),
                               (["--steps", -1], "--steps = -1"), (["--alpha-0", 2], "family.alpha_0 = 2.0"),
                               (["family.name=ar"], "only fields of model, train and mesh"),
                               (["model.widht=3"], "did you mean model.width?"), (["--batch", 0], "batch_size = 0"),
                               (["--out", tmp_path / "b.png"], "must end in .json")):
        assert message in run("bench", "training", *SMALL, "--out", tmp_path / "b.json", *arguments, code=2)
    monkeypatch.setattr(train, "lower_step", full)
    with pytest.raises(EsoError, match=r"--batch = 4: not enough memory on a device \(Out of memory allocating 99 "
                                       r"bytes.\); give a smaller --batch; or raise train.accumulate"):
        training_speed.run(["ar"], tmp_path / "b.json", "tiny", 16, 4)
    assert not (tmp_path / "b.json").exists()
