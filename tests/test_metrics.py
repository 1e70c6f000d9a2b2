"""Where metrics go: JSON lines always, other places by train.log, texts of the model by train.sample_every."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import Run
from eso_jax.config import Config
from eso_jax.errors import EsoError
from eso_jax.run import metrics
from eso_jax.run.train import train


@pytest.fixture(scope="module")
def short(base: Config) -> Config:
    return base.override("train.steps=2", "train.eval_every=2", "train.save_every=2")


@pytest.mark.slow
def test_a_run_goes_on_with_another_log(short: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON lines stay; the other place gets the same numbers from there on, and is told the end."""
    said: list[tuple[int, dict[str, Any]]] = []
    ends: list[bool] = []
    begun: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        init=lambda **given: begun.update(given), log=lambda values, step: said.append((step, values)),
        finish=lambda: ends.append(True)))
    train(short, tmp_path / "w")
    assert not begun
    train(short.override("train.steps=4", "train.log=wandb"), tmp_path / "w")
    assert begun["project"] == "eso-jax" and begun["config"]["train"]["steps"] == 4 and ends == [True]
    lines = [line for line in metrics.read(tmp_path / "w") if line["step"] > 2]
    assert [step for step, _ in said] == [line["step"] for line in lines] == [3, 4, 4]
    assert said[0][1]["loss"] == lines[0]["loss"]
    assert said[2][1]["validation_terms/diffusion"] == lines[2]["validation_terms"]["diffusion"]


def test_a_damaged_line_costs_no_other(tmp_path: Path) -> None:
    """Neither of a run that was killed, nor of a disk that lost a block."""
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    first, second, third = map(json.dumps, lines)
    for damaged in ('{"step": 2, "lo', "\0" * 40, '{"step": "x"}', "[1]", "3", "", '{"loss": 1.0}'):
        (tmp_path / "metrics.jsonl").write_text(f"{first}\n{damaged}\n{second}\n{third}")
        assert metrics.read(tmp_path) == lines
    log = metrics.MetricsLog(tmp_path, 2)
    assert metrics.read(tmp_path) == lines[:2]
    log.write(3, validation_standard_error=float("nan"), parts={"a": [float("inf")]})  # as of a single window
    assert metrics.read(tmp_path)[2] == {"step": 3, "validation_standard_error": None, "parts": {"a": [None]}}


def test_tensorboard(short: Config, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    train(short.override("train.log=tensorboard", "train.sample_every=2"), tmp_path / "w")
    shown = {(event.step, value.tag): value.simple_value for event in events(tmp_path / "w" / "tensorboard")
             for value in event.summary.value}
    lines = metrics.read(tmp_path / "w")
    assert shown[1, "loss"] == pytest.approx(lines[0]["loss"])
    assert shown[2, "validation_bits_per_byte"] == pytest.approx(
        next(line["validation_bits_per_byte"] for line in lines if "validation_bits_per_byte" in line))
    assert (2, "sample/text_summary") in shown


def events(folder: Path) -> list[Any]:
    """The records of an event file: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.iterdir()
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12:12 + size]))
        data = data[16 + size:]
    return found


def test_what_is_not_installed_is_named(short: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EsoError, match=r"train.log = 'wandb': wandb is not installed; pip install 'eso-jax\[wandb\]'"):
        train(short.override("train.log=wandb"), tmp_path / "w")


def test_a_place_that_refuses_is_a_line(short: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**given: Any) -> None:
        raise ValueError("no key\nsecond line")

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=refuse))
    with pytest.raises(EsoError, match="train.log = 'trackio': no key$"):
        train(short.override("train.log=trackio"), tmp_path / "w")


@pytest.mark.slow
def test_samples_now_and_then(short: Config, tmp_path: Path, run: Run) -> None:
    """A text every so many steps, which changes nothing of the training."""
    config = short.override("family.name=bd3lm")
    (tmp_path / "run.json").write_text(config.to_json())
    said = run("train", tmp_path / "run.json", "--workdir", tmp_path / "w", "train.steps=4", "train.sample_every=2")
    lines = metrics.read(tmp_path / "w")
    assert [line["step"] for line in lines if "sample" in line] == [2, 4]
    assert f"a sample\n{lines[-1].get('sample', '')[:2]}" in said
    run("train", tmp_path / "run.json", "--workdir", tmp_path / "plain", "train.steps=4")
    plain = metrics.read(tmp_path / "plain")
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in plain if "loss" in line]


def test_a_picture_leaves_pyplot_as_it_is(tmp_path: Path) -> None:
    """Its backend is the notebook's, which shows figures by it after a training."""
    from matplotlib import pyplot

    usual = pyplot.get_backend()
    pyplot.switch_backend("svg")
    try:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
        assert metrics.plot_loss(tmp_path).stat().st_size > 5000
        assert pyplot.get_backend() == "svg" and not pyplot.get_fignums()
    finally:
        pyplot.switch_backend(usual)
