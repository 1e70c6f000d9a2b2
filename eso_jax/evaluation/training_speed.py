"""How fast training is, and how much of its work the loss needs: `eso-jax bench training`.

The step is that of eso_jax/run/train.py, on all devices, from random parameters, over random tokens. As in training, a
step is sent off before the one before it has ended, and its time is from one end to the next.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from eso_jax import families, flops, sharding
from eso_jax.aot import hlo
from eso_jax.config import Config, FamilyConfig, ModelConfig, TrainConfig
from eso_jax.console import say
from eso_jax.engine.rows import catch_out_of_memory
from eso_jax.errors import require
from eso_jax.evaluation.table import Row, bars, markdown
from eso_jax.evaluation.throughput import describe_machine
from eso_jax.files import as_json, write_whole
from eso_jax.run import metrics, train
from eso_jax.run.timing import wait_for

WARM_UP = 3  # steps that are not timed


def run(names: Sequence[str], out: Path, size: str = "small", length: int = 1024, batch_size: int = 32,
        steps: int = 20, alpha_0: Sequence[float] = (1.0,), overrides: Sequence[str] = (),
        turn: Path | None = None) -> list[Row]:
    """Measures families; writes `out` (JSON) as it goes, and a table (.md) and a picture (.png) beside it.

    Args:
      names: of families.
      batch_size: rows of a step, over all devices.
      steps: that are timed; 0: compiles and counts only.
      alpha_0: of those families that have a choice.
      overrides: fields of model, train and mesh.
      turn: a file that is waited for before a step is timed.

    Raises:
      EsoError: an option or a field cannot be, or the devices ran out of memory.
    """
    require(steps >= 0, "--steps", steps, "must be at least 0")
    require(out.suffix == ".json", "--out", str(out), "must end in .json; a table and a picture are written beside it")
    # All configs before any work: a mistake in one costs nothing.
    configs = configs_of(names, size, length, batch_size, alpha_0, overrides)
    base = configs[0]
    mesh = sharding.mesh(base.mesh)
    for config in configs:
        sharding.check(config, mesh)
    header = {"machine": describe_machine(), "devices": mesh.size, "mesh": dict(mesh.shape), "steps": steps,
              "date": datetime.date.today().isoformat(), "model": dataclasses.asdict(base.model),
              "train": dataclasses.asdict(base.train)}
    say(_title(header))
    rows: list[Row] = []
    for config in configs:
        rows.append(measure(config, mesh, steps, turn))
        say("  " + ", ".join(f"{name} {show(rows[-1])}" for name, show in columns(rows[-1:]).items()))
        write_whole(out, as_json({**header, "rows": rows}))
    table = f"{_title(header)}\n\n{markdown(columns(rows), rows)}"
    write_whole(out.with_suffix(".md"), table)
    tokens = base.train.batch_size * base.model.length
    unit, scale = _unit([row["executed_flops"] / tokens for row in rows])
    bars(out.with_suffix(".png"), _title(header), f"{unit} per token",
         {_name(row) + (f": {row['tokens_per_s']:,.0f} tokens/s" if steps else ""):
          (row["executed_flops"] / tokens / scale, row["needed_flops"] / tokens / scale) for row in rows},
         "executed", "needed by the loss")
    say(f"\n{table}\nwrote {out}, {out.with_suffix('.md')} and {out.with_suffix('.png')}")
    return rows


def configs_of(names: Sequence[str], size: str, length: int, batch_size: int, alpha_0: Sequence[float],
               overrides: Sequence[str]) -> list[Config]:
    """A config of each family, and of one that has a choice, at every alpha_0."""
    for name in names:
        require(name in families.BY_NAME, "--families", name, f"choose of {', '.join(families.BY_NAME)}")
    for override in overrides:
        require(override.startswith(("model.", "train.", "mesh.")), "override", override,
                "only fields of model, train and mesh can be changed; the family is --families and --alpha-0")
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    base = Config(ModelConfig.of_size(size, length=length, vocab_size=50258),
                  train=TrainConfig(batch_size=batch_size, compute_dtype=dtype)).override(*overrides)
    return [dataclasses.replace(base, family=FamilyConfig(name=name, **choice)) for name in names for choice in (
        [{"alpha_0": share} for share in alpha_0] if families.BY_NAME[name].only_alpha_0 is None else [{}])]


def measure(config: Config, mesh: Mesh, steps: int, turn: Path | None = None) -> Row:
    """The row of one config: its step compiled, counted and, with steps, timed."""
    settings, family = config.train, families.get(config)
    with (jax.set_mesh(mesh), catch_out_of_memory(f"--batch = {settings.batch_size}",
                                                  f"give a smaller --batch; or {train.REMEDY}")):
        begun = time.perf_counter()
        step = train.lower_step(config, mesh).compile()
        compile_seconds = time.perf_counter() - begun
        wait_for(turn)
        seconds = _step_seconds(config, mesh, step, steps) if steps else None
        attention = train.attention_of(config)
    memory, text = step.memory_analysis(), step.as_text()
    assert memory is not None and text is not None  # JAX's own types allow it
    model_flops = sum(flops.training_step(config, mesh.size // config.mesh.tensor).values())
    row: Row = {
        "family": config.family.name, "label": family.short_label(config.family),
        "alpha_0": families.alpha_0_of(config, None), "batch": settings.batch_size, "length": config.model.length,
        "tokens_per_s": None, "step_seconds": None, "quartiles": None, "compile_seconds": compile_seconds,
        "model_flops": model_flops, "needed_flops": sum(flops.needed(config).values()),
        "executed_flops": hlo.cost(text).flops * mesh.size, "mfu": None,
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes
        + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "attention": attention}
    if seconds is not None:
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
        speed = metrics.speed(settings.batch_size * config.model.length / median, model_flops / median)
        row |= {"tokens_per_s": speed["tokens_per_second"], "step_seconds": median, "quartiles": [low, high],
                "mfu": speed.get("mfu")}
    return row


def _step_seconds(config: Config, mesh: Mesh, step: Any, steps: int) -> np.ndarray:
    """The seconds of so many steps, of a compiled one."""
    size, model = config.train.batch_size, config.model
    held = sharding.rows_of_process(mesh, size)
    rows = np.random.default_rng(0).integers(model.vocab_size, size=(len(held), model.length), dtype=np.int32)
    state, ends, last = train.begin(config, mesh), [], None
    for _ in range(WARM_UP + steps):
        state, values = step(state, sharding.put_rows(rows, mesh, size))
        if last is not None:  # the step before this one, so that the device is never idle
            jax.block_until_ready(last)
            ends.append(time.perf_counter())
        last = values
    jax.block_until_ready(last)
    return np.diff([*ends, time.perf_counter()])[WARM_UP - 1:]


def columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """The columns of the table in which some row has a value. Work is in the largest unit that gives each row 0.1 or
    more."""
    unit, scale = _unit([row["model_flops"] for row in rows])
    found: dict[str, Callable[[Row], str]] = {
        "family": _name,
        "attention": lambda r: r["attention"],
        "ms a step (quartiles)": lambda r: "" if r["step_seconds"] is None else
        f"{1e3 * r['step_seconds']:.4g} ({1e3 * r['quartiles'][0]:.4g} to {1e3 * r['quartiles'][1]:.4g})",
        "tokens/s": lambda r: "" if r["tokens_per_s"] is None else f"{r['tokens_per_s']:,.0f}",
        "MFU": lambda r: "" if r["mfu"] is None else f"{r['mfu']:.1%}",
        f"{unit} of the model": lambda r: f"{r['model_flops'] / scale:.4g}",
        "needed": lambda r: f"{r['needed_flops'] / scale:.4g}",
        "executed": lambda r: f"{r['executed_flops'] / scale:.4g}",
        "executed / needed": lambda r: f"{r['executed_flops'] / r['needed_flops']:.2f}",
        "peak, GiB": lambda r: f"{r['peak_bytes'] / 2**30:.3g}",
        "compile, s": lambda r: f"{r['compile_seconds']:.1f}",
    }
    return {name: show for name, show in found.items() if any(map(show, rows))}


def _name(row: Row) -> str:
    return row["label"] + (f", alpha_0 = {row['alpha_0']:g}" if row["label"].startswith("Eso-LM") else "")


def _unit(counts: Sequence[float]) -> tuple[str, float]:
    """The largest unit of which every count has a tenth, and how many operations it is."""
    units = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
    return next((unit for unit in units if min(counts) >= unit[1] / 10), ("FLOP", 1.0))


def _title(header: dict[str, Any]) -> str:
    model, settings = header["model"], header["train"]
    return (f"A training step: {model['width']} wide, {model['layers']} layers, L = {model['length']}, batch "
            f"{settings['batch_size']}, {settings['compute_dtype']}, remat {settings['remat']}\n"
            f"{header['devices']} device(s): {header['machine']}; {header['date']}")
