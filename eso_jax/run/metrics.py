"""The metrics of a run: JSON lines in `W/metrics.jsonl` and in the place that `train.log` names, a trace, and a plot of
the loss."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eso_jax import files
from eso_jax.config import Config
from eso_jax.console import is_writer, say
from eso_jax.errors import EsoError

FILE = "metrics.jsonl"
Send = Callable[[int, dict[str, Any]], None]  # (step, numbers and texts by name)


class MetricsLog:
    """Appends JSON lines, each with its step, and sends the same to another place; only in the writer. On resuming at a
    step, lines of later steps, which a killed run wrote, are dropped."""

    def __init__(self, workdir: Path, resume_step: int, send: Send | None = None) -> None:
        self.path, self.send = workdir / FILE, send
        if not is_writer():
            return
        kept = [line for line in read(workdir) if line["step"] <= resume_step]
        files.write_whole(self.path, "".join(files.as_json(line, None) for line in kept), "--workdir")

    def write(self, step: int, **values: Any) -> None:
        if is_writer():
            files.append(self.path, files.as_json({"step": step, **values}, None), "--workdir")
            if self.send is not None:
                self.send(step, _flat(values))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers and texts by name; those in a dict by a path "name/part". None is left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        parts = {f"{name}/{part}": x for part, x in value.items()} if isinstance(value, dict) else {name: value}
        found |= {part: x for part, x in parts.items() if x is not None}
    return found


@contextmanager
def elsewhere(workdir: Path, config: Config) -> Iterator[Send | None]:
    """The function that sends metrics to the place that `train.log` names, for its block; None if it names none, or in
    other processes than the writer.

    Raises:
      EsoError: the library of that place is not installed, or fails to start.
    """
    kind = config.train.log
    if kind == "jsonl" or not is_writer():
        yield None
        return
    try:
        library: Any = importlib.import_module({"tensorboard": "tensorboardX"}.get(kind, kind))
    except ImportError as error:
        raise EsoError(f"train.log = {kind!r}: {error.name} is not installed; pip install 'eso-jax[{kind}]', or leave "
                       "train.log out") from error
    if kind == "tensorboard":
        with library.SummaryWriter(str(workdir / "tensorboard")) as board:

            def show(step: int, values: dict[str, Any]) -> None:
                for name, value in values.items():
                    (board.add_text if isinstance(value, str) else board.add_scalar)(name, value, step)
                board.flush()

            yield show
        return
    # Both libraries have this interface. A resumed run is a new run for them, in the group of its work directory.
    try:
        library.init(project=os.environ.get(f"{kind.upper()}_PROJECT", "eso-jax"), group=str(workdir.resolve()),
                     config=dataclasses.asdict(config))
    except Exception as error:  # each library has errors of its own
        raise EsoError(f"train.log = {kind!r}: {str(error).splitlines()[0]}") from error
    try:
        yield lambda step, values: library.log(values, step=step)
    finally:
        library.finish()


def read(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a work directory's metrics, without damaged ones and one that a kill has cut short."""
    path = workdir / FILE
    lines = []
    for line in path.read_text("utf-8", "replace").split("\n") if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            lines.append(values)
    return lines


def speed(tokens_per_second: float, flops_per_second: float) -> dict[str, float]:
    """Tokens and model TFLOPs per second over all devices, and, where the chip's peak is known, the model FLOPs
    utilization: their share of the chips' bfloat16 peak (eso_jax/flops.py says what is counted, eso_jax/chips.py the
    peaks)."""
    import jax

    from eso_jax import chips

    found = {"tokens_per_second": tokens_per_second, "tflops_per_second": flops_per_second / 1e12}
    chip = chips.of_device(jax.devices()[0].device_kind)
    if chip is not None:
        found["mfu"] = flops_per_second / (chip.flops / chip.devices * jax.device_count())
    return found


@contextmanager
def profiled(workdir: Path, nth: int, count: int) -> Iterator[None]:
    """For the nth step of this process (from 1): traces `count` steps into `W/profile`, from the third on, since the
    first two compile. The trace ends in the step after the last traced one, which has waited for it."""
    import jax.profiler

    first = 3
    if count and nth == first:
        jax.profiler.start_trace(str(workdir / "profile"))
    yield
    if count and nth == first + count:
        jax.profiler.stop_trace()
        say(f"traced {count} steps into {workdir / 'profile'}")


def plot_loss(workdir: Path, baselines: dict[str, float] | None = None) -> Path:
    """Draws `W/loss.png`: training terms, and validation bits per byte (nats per token where bytes are not
    known) beside named baselines."""
    from eso_jax.evaluation.picture import picture

    lines, path = read(workdir), workdir / "loss.png"
    unknown = any(line.get("validation_bits_per_byte", 0) is None for line in lines)
    unit = "nats_per_token" if unknown else "bits_per_byte"
    with picture(path, 10.0, 4.0, "--workdir") as figure:
        left, right = figure.subplots(1, 2)
        for name in ("loss", "diffusion", "sequential"):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                left.plot(*zip(*points, strict=True), label=name, linewidth=1)
        left.set(xlabel="training step", ylabel="nats per token", title="training loss and its terms")
        points = [(line["step"], value) for line in lines if (value := line.get(f"validation_{unit}")) is not None]
        if points:
            right.plot(*zip(*points, strict=True), "o-", label="model (NELBO)")
        for name, value in (baselines or {}).items():
            right.axhline(value, linestyle="--", color="grey", label=name)
        right.set(xlabel="training step", ylabel=unit.replace("_", " "), title="validation")
        for axes in (left, right):
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
    return path
