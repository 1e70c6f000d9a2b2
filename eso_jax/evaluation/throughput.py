"""How fast the samplers are, and how far from what the machine allows: `eso-jax bench sampling`.

Speed does not depend on the weights, so they are random. Every sampler runs its own plan with draws included; compiling
(or loading what an earlier run compiled) is timed apart. MDLM, whose passes are all alike, is timed on one of them and
scaled to its NFE; on request every sampler is, on passes in the middle of its plan, where the cache is half full. The
samplers take turns, repeat by repeat.

The floor of a plan is the least time that any program could take for its steps. In each, every weight is read once and
so is the live cache, at the memory bandwidth; the products take their operations, at the matrix peak; the longer of the
two counts. Bandwidth and peak are measured in the same run. NFE counts the steps of the plan. A step that is
wider than the window of its run takes several passes, which all cost time; none is spent on writing the cache alone.

Each sampler runs on one device or with the batch split over all of them, whichever is faster in a generation tried
before. (XLA does not split every product over the cores of a CPU, so that XLA_FLAGS=
--xla_force_host_platform_device_count=2 makes large batches of some samplers faster there, and of others slower.)

Axes: B batch, L length, S steps.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from eso_jax import families, sharding
from eso_jax.aot import hlo
from eso_jax.console import bar, say
from eso_jax.config import Config, FamilyConfig, ModelConfig, TrainConfig
from eso_jax.decoding import loop, passes
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.plan import Plan
from eso_jax.engine.model import decode
from eso_jax.engine.rows import Engine
from eso_jax.errors import require
from eso_jax.evaluation.table import Row, bars, markdown
from eso_jax.families.ar import AR
from eso_jax.families.base import Family
from eso_jax.families.bd3lm import BD3LM
from eso_jax.families.esolm import EsoLM
from eso_jax.families.mdlm import MDLM
from eso_jax.files import as_json, write_whole
from eso_jax.model import attention as attention_of
from eso_jax.model.attention import AUTO
from eso_jax.model.backend import Task
from eso_jax.model.params import Weights, fold, init_params, unstack, weight_shardings
from eso_jax.run.timing import Stopwatch, wait_for

GREEDY = Rule(temperature=0.0)
# In how many places and for how many steps variants of a plan's steps are compared. (Only on CPUs: elsewhere the
# programs take longer to compile than whole generations take.)
SECTIONS, SECTION_STEPS = 8, 8


class Case(NamedTuple):
    """A sampler and its plan."""

    kind: type[Family]
    policy: str
    steps: int = 1  # T
    alpha_0: float = 1.0
    block_size: int | None = None  # of BD3-LM

    @property
    def family(self) -> FamilyConfig:
        """The settings of the first family of the kind, by whatever name it is registered."""
        name = next(name for name, family in families.BY_NAME.items() if type(family) is self.kind)
        return FamilyConfig(name=name, **({"block_size": self.block_size} if self.block_size else {}))

    @property
    def label(self) -> str:
        plan = f" a0={self.alpha_0:g} T={self.steps}" if self.policy == "binomial" else ""
        return families.BY_NAME[self.family.name].short_label(self.family) + plan


class Preset(NamedTuple):
    """What is measured at each length and batch size. `what`: a description, printed at the top of the results."""

    what: str
    size: str
    dtype: str
    rule: Rule
    lengths: Sequence[int]
    batches: Sequence[int]
    cases: Sequence[Case]


ONE_BY_ONE = [Case(AR, "left-to-right"), Case(EsoLM, "one-by-one"), Case(BD3LM, "one-by-one", block_size=16),
              Case(BD3LM, "one-by-one", block_size=4), Case(MDLM, "one-by-one")]
TABLE_13 = ([Case(EsoLM, "binomial", steps, alpha_0) for alpha_0, all_steps in
             ((1.0, (16, 32, 64, 128, 256, 1024, 4096)), (0.5, (16, 128, 1024)), (0.25, (16, 128, 1024)),
              (0.0625, (16, 128, 1024))) for steps in all_steps]
            + [Case(BD3LM, "binomial", steps, block_size=16) for steps in (256, 1024, 4096)]
            + [Case(MDLM, "binomial", steps) for steps in (16, 64, 256, 1024, 4096)] + [Case(AR, "left-to-right")])

PRESETS = {
    "cpu": Preset("one token per pass on a CPU", "tiny", "float32", Rule(), (2048,), (1, 16), ONE_BY_ONE),
    "laptop": Preset("one token per pass, in minutes on a laptop", "tiny", "float32", Rule(), (512,), (1,),
                     ONE_BY_ONE),
    "table11": Preset("the paper's Table 11: NFE = L", "small", "bfloat16", Rule(), (2048, 8192), (1, 16), ONE_BY_ONE),
    "table13": Preset("the paper's Tables 13 to 15: quality against time, 512 samples at a time", "small", "bfloat16",
                      Rule(top_p=0.9), (1024,), (512,), TABLE_13),
}


class Machine(NamedTuple):
    """What the machine can do, measured: bytes per second of a sum over a large array, and operations per second of a
    large matrix product in the type of the products."""

    bandwidth: float
    flops: float


def run(preset: str, out: Path, overrides: Sequence[str] = (), lengths: Sequence[int] | None = None,
        batches: Sequence[int] | None = None, repeats: int = 3, samplers: Sequence[str] | None = None,
        attention: Sequence[str] = (AUTO,), few_passes: int | None = None,
        turn: Path | None = None) -> list[dict[str, Any]]:
    """Measures a preset; writes `out` (JSON) as it goes, and a table (.md) and a picture (.png) beside it.

    Args:
      overrides: model.field=value, for its sizes.
      lengths, batches: instead of the preset's.
      repeats: generations timed; their median counts.
      samplers: of the preset, by their labels; None: all of them.
      attention: the backends that are wanted for it, of eso_jax.config.ATTENTION; each is measured.
      few_passes: so many passes are timed and scaled, not generations.
      turn: a file that is waited for before anything is timed.
    """
    require(repeats >= 1, "--repeats", repeats, "must be at least 1")
    require(few_passes is None or few_passes >= 1, "--passes", few_passes, "must be at least 1")
    require(out.suffix == ".json", "--out", str(out), "must end in .json; a table and a picture are written beside it")
    for override in overrides:
        require(override.startswith("model."), "override", override, "only model's fields can be changed")
        require(not override.startswith("model.length"), "override", override, "give --lengths")
    chosen = PRESETS[preset]
    cases = {case.label: case for case in chosen.cases}
    for label in samplers or ():
        require(label in cases, "--samplers", label, f"choose of {', '.join(cases)}")
    chosen = chosen._replace(cases=[cases[label] for label in samplers or cases])
    lengths, batches = lengths or chosen.lengths, batches or chosen.batches
    for batch in batches:
        require(batch >= 1, "--batches", batch, "must be at least 1")
    # All configs before any work: a mistake in one costs nothing.
    configs = {(length, case): _config(chosen, length, case, overrides) for length in lengths for case in chosen.cases}
    for case in chosen.cases if few_passes else ():
        require(case.policy != "binomial" or case.kind is MDLM, "--passes", few_passes,
                f"those of {case.label} are not alike; choose others by --samplers")
    dtype = jnp.dtype(chosen.dtype)
    found: list[dict[str, Any]] = []
    say(f"{chosen.what}; {describe_machine()}, {chosen.dtype}")
    folded = random_weights(configs[lengths[0], chosen.cases[0]].model, dtype)
    todo = [[[Timed(_engine(dataclasses.replace(folded, attention=wanted), configs[length, case], count), case, batch,
                    chosen.rule, few_passes) for count in _device_counts(batch)]
             for case in chosen.cases for wanted in attention] for length in lengths for batch in batches]
    wait_for(turn)
    machine = measure_machine(dtype)
    header = {"preset": preset, "what": chosen.what, "dtype": chosen.dtype, "rule": dataclasses.asdict(chosen.rule),
              "machine": describe_machine(), "bandwidth_bytes_per_s": machine.bandwidth,
              "matmul_flops_per_s": machine.flops, "date": datetime.date.today().isoformat(), "repeats": repeats,
              "passes": few_passes}
    for candidates in bar(todo, unit="size"):
        timed = [_fastest(those) for those in candidates]
        for left in reversed(range(repeats)):  # in turn, since machines drift
            for one in timed:
                one.seconds.append(one.generate())
                if left == 0:
                    found.append(one.row(machine, repeats))
                    _relate(found)
                    say(_line(found[-1]))
                    write_whole(out, as_json({**header, "model": dataclasses.asdict(one.config.model),
                                              "results": found}))
    write_whole(out.with_suffix(".md"), table(header, found))
    plot(header, found, out.with_suffix(".png"))
    say(f"\n{table(header, found)}\nwrote {out}, {out.with_suffix('.md')} and {out.with_suffix('.png')}")
    return found


def _config(preset: Preset, length: int, case: Case, overrides: Sequence[str]) -> Config:
    model = ModelConfig.of_size(preset.size, length=length, vocab_size=50258, dropout=0.0)
    return Config(model, case.family, train=TrainConfig(batch_size=64)).override(*overrides)


def random_weights(model: ModelConfig, dtype: Any) -> Weights:
    """Unstacked inference weights, none at its initial zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = {name: jnp.asarray(("norm" in name) + 0.02 * rng.standard_normal(x.shape, np.float32))
              for name, x in shapes.items()}
    return unstack(fold(model, params, dtype))


def _device_counts(batch: int) -> list[int]:
    """One device, and as many as divide the batch."""
    return sorted({1, max(n for n in range(1, jax.device_count() + 1) if batch % n == 0)})


def _engine(weights: Weights, config: Config, count: int) -> Engine:
    """So many devices, each with a copy of the weights."""
    mesh = sharding.inference_mesh(config.model, devices=jax.devices()[:count])
    return Engine(config, jax.device_put(weights, weight_shardings(weights, mesh)), mesh)


class Timed:
    """A case with its plan and its programs, compiled, and the seconds of its generations."""

    def __init__(self, engine: Engine, case: Case, batch: int, rule: Rule, few_passes: int | None) -> None:
        self.engine, self.mesh, self.weights, self.config = engine, engine.mesh, engine.weights, engine.config
        self.case, self.rule, config, family = case, rule, engine.config, families.get(engine.config)
        self.plan = family.plan(jax.random.key(0), config, batch, case.steps, case.alpha_0, case.policy)
        self.sampler = family.sampler(config)
        self.scaled_from = few_passes or (None if self.sampler.cached else 1)
        self.seconds: list[float] = []
        self.warm = False
        with jax.set_mesh(self.mesh), Stopwatch() as watch:
            if self.scaled_from:
                program, self.few_passes = _runner(self.weights, config, self.plan, "padded", rule, self.plan.nfe // 2,
                                                   self.scaled_from)
            else:
                program = _compile(self.weights, config, self.plan, rule)
            gpu, self.attention = sharding.on_gpu(), self._attention()
        self.compile_seconds = watch.compile_seconds
        self.launches = hlo.turn(program.as_text() or "").launches if gpu else None

    def _attention(self) -> str:
        """The name of the backend of attention."""
        model, pattern, wanted = self.config.model, self.sampler.pattern, self.weights.attention
        dtype = self.weights.head.kernel.dtype
        if self.sampler.cached:
            return attention_of.keeper(model, pattern, dtype, wanted).name
        return attention_of.choose(Task(pattern, model.length, model.head_size, dtype), wanted)[0].name

    def generate(self) -> float:
        """Seconds of one generation; not of the first, which is slow."""
        if not self.warm:
            self.warm = True
            self.generate()
        if self.scaled_from:
            with jax.set_mesh(self.mesh):
                return _seconds(self.few_passes) * self.plan.nfe / self.scaled_from
        batch = len(self.plan.order)
        return _seconds(lambda: decode(self.engine, self.plan, _keys(self.plan), self.rule, np.arange(batch), batch))

    def row(self, machine: Machine, repeats: int) -> dict[str, Any]:
        """The row of the table: seconds for a batch, and what they are made of."""
        devices, plan, case, nfe = self.mesh.size, self.plan, self.case, self.plan.nfe
        floors = step_floors(plan, self.sampler, self.config.model, self.weights, machine, devices)
        median, floor = statistics.median(self.seconds), float(floors.sum())
        row = {"sampler": case.label, "length": self.config.model.length, "batch": len(plan.order), "devices": devices,
               "attention": self.attention, "alpha_0": case.alpha_0, "steps": case.steps, "nfe": nfe,
               "seconds": median, "all_seconds": self.seconds, "scaled_from_passes": self.scaled_from,
               "seconds_per_pass": median / nfe, "launches_per_pass": self.launches,
               "tokens_per_s": plan.order.size / median, "compile_seconds": self.compile_seconds,
               "floor_seconds": floor, "of_the_floor": floor / median}
        if sharding.platform() == "cpu" and (self.scaled_from or 1) == 1:
            variants = {"padded": self.rule, "exact": self.rule, "greedy": GREEDY}
            count, steps = (1, 1) if self.scaled_from else (SECTIONS, SECTION_STEPS)
            with jax.set_mesh(self.mesh):
                totals = _from_sections(self.weights, self.config, plan, floors, variants, repeats, count, steps)
            # Of the same few steps, timed in turn.
            row |= {"seconds_without_draws": median * totals["greedy"] / totals["padded"],
                    "padding_and_bookkeeping": (totals["padded"] if self.scaled_from else median) / totals["exact"] - 1}
        return row


def _fastest(candidates: list[Timed]) -> Timed:
    """The one whose generation takes least, by one try."""
    return candidates[0] if len(candidates) == 1 else min(candidates, key=Timed.generate)


def _compile(weights: Weights, config: Config, plan: Plan, rule: Rule) -> jax.stages.Compiled:
    """Compiles all programs of the plan; that of its last pass."""
    model, sampler = config.model, families.get(config).sampler(config)
    source = loop.Draw(loop.draw_uniforms(_keys(plan), plan.length), rule)
    state, lowered = loop.start(weights, model, sampler, plan), {}
    for run in passes.schedule(plan, sampler, row=passes.row_cost(model)):
        state, program = loop.grow(state, run.shape), (run.shape, len(run.steps.first))
        if program not in lowered:
            lowered[program] = loop.decode_run.lower(weights, state, run.steps, source, model, sampler, run.shape)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA compiles side by side what Python can only trace in turn
        return list(pool.map(lambda program: program.compile(), lowered.values()))[-1]


def _keys(plan: Plan) -> Key[Array, " B"]:
    return loop.row_keys(jax.random.key(1), jnp.arange(len(plan.order)))


def _from_sections(weights: Weights, config: Config, plan: Plan, floors: Float[np.ndarray, " S"],
                   variants: dict[str, Rule], repeats: int, count: int, steps: int) -> dict[str, float]:
    """Seconds for the plan in each variant, estimated from `count` of its steps: "exact" has shapes that fit the step,
    the others those of the sampler; "greedy" takes the largest logit, the least that can be done with all of them.

    The steps stand evenly spaced in the plan's floor, so that few long ones weigh as much as many short ones.
    """
    share = np.cumsum(floors) / floors.sum()
    ratios: dict[str, list[float]] = {name: [] for name in variants}  # seconds over the step's floor
    for index in np.searchsorted(share, (np.arange(count) + 0.5) / count).tolist():
        runners = {name: _runner(weights, config, plan, name, rule, index, steps)[1]
                   for name, rule in variants.items()}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for go in runners.values():  # what runs first is slow
            go()
        for _ in range(repeats):  # in turn, since machines drift
            for name, go in runners.items():
                seconds[name].append(_seconds(go) / steps)
        for name in variants:
            ratios[name].append(statistics.median(seconds[name]) / floors[index])
    return {name: statistics.fmean(of) * float(floors.sum()) for name, of in ratios.items()}


def _runner(weights: Weights, config: Config, plan: Plan, name: str, rule: Rule, index: int,
            steps: int) -> tuple[jax.stages.Compiled, Callable[[], None]]:
    """(a program, what runs it): it does the step `index` so many times, in the variant's shape."""
    model, sampler = config.model, families.get(config).sampler(config)
    source = loop.Draw(loop.draw_uniforms(_keys(plan), plan.length), rule)
    slot = plan.first[index]
    run, of = next((run, of) for run in passes.schedule(
        plan, sampler, name == "exact", passes.row_cost(model)) for of in
                   np.flatnonzero((run.steps.first <= slot) & (slot < run.steps.first + run.steps.count)))

    def start() -> loop.State:
        return loop.grow(loop.start(weights, model, sampler, plan), run.shape)

    table = jax.tree.map(lambda field: np.full(steps, field[of]), run.steps)  # again and again
    program = loop.decode_run.lower(weights, start(), table, source, model, sampler, run.shape).compile()
    state = None  # until it is run: it is large

    def go() -> None:
        nonlocal state
        state = jax.block_until_ready(program(weights, state or start(), table, source))

    return program, go


def step_floors(plan: Plan, sampler: passes.Sampler, model: ModelConfig, weights: Weights, machine: Machine,
                devices: int = 1) -> Float[np.ndarray, " S"]:
    """The least seconds for each step of the plan; see the top of this file. The devices of a CPU share its memory and
    cores; others have their own, and each reads all weights."""
    own = 1 if sharding.platform() == "cpu" else devices
    batch, d, n = len(plan.order) // own, model.width, model.layers
    start, stop = sampler.window(plan)
    window, live = stop - start, stop if sampler.cached else np.full(plan.nfe, plan.length)
    multiplied = (weights.blocks, weights.head)
    weight_bytes = sum(w.nbytes for w in jax.tree.leaves(multiplied))
    cache_bytes = 2 * n * batch * d * live * weights.head.kernel.dtype.itemsize if sampler.cached else 0
    flops = batch * (2 * 12 * n * d * d * window + 4 * n * d * window * live
                     + 2 * d * model.vocab_size * plan.tokens_per_step)
    return np.maximum((weight_bytes + cache_bytes) / machine.bandwidth, flops / machine.flops)


def measure_machine(dtype: Any) -> Machine:
    """Bandwidth and matrix peak, the best of a few."""
    cpu = jax.default_backend() == "cpu"
    large = jnp.ones((512, 2**19 if cpu else 2**21), jnp.float32)
    side = 4096 if cpu else 8192
    square = jnp.ones((side, side), dtype)
    total = jax.jit(lambda x: x.sum(1))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))

    def best(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
        function(x).block_until_ready()
        return min(_seconds(lambda: function(x).block_until_ready()) for _ in range(5))

    return Machine(large.nbytes / best(total, large), 2 * side**3 / best(product, square))


def describe_machine() -> str:
    """The device, and the versions that matter."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        with open("/proc/cpuinfo" if os.path.exists("/proc/cpuinfo") else os.devnull, encoding="utf-8") as file:
            models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        name = f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"
    return f"{name}, Python {platform.python_version()}, jax {jax.__version__}"


def _seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _relate(found: list[dict[str, Any]]) -> None:
    """Adds how many times the time of Eso-LM's same plan each took, None where there is none yet."""
    same = ("length", "batch", "steps", "alpha_0")
    for row in found:
        eso = [r for r in found if r["sampler"].startswith("Eso-LM") and all(r[key] == row[key] for key in same)]
        eso.sort(key=lambda r: r["attention"] != row["attention"])  # its own comes first
        row["times_eso_lm"] = row["seconds"] / eso[0]["seconds"] if eso else None


def _shown(field: str, show: str) -> Callable[[Row], str]:
    """A column of a field that not every row has."""
    return lambda row: "" if row.get(field) is None else format(row[field], show)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "sampler": lambda r: r["sampler"],
    "L": lambda r: str(r["length"]),
    "batch": lambda r: str(r["batch"]) + (f" on {r['devices']} devices" if r["devices"] > 1 else ""),
    "attention": lambda r: r["attention"],
    "NFE": lambda r: str(r["nfe"]),
    "seconds": lambda r: f"{r['seconds']:.3g}" + (
        f" (scaled from {r['scaled_from_passes']})" if r["scaled_from_passes"] else ""),
    "ms a pass": lambda r: f"{1e3 * r['seconds_per_pass']:.3g}",
    "launches": _shown("launches_per_pass", "d"),
    "tokens/s": lambda r: f"{r['tokens_per_s']:.0f}",
    "x Eso-LM": _shown("times_eso_lm", ".2f"),
    "of the floor": lambda r: f"{r['of_the_floor']:.0%}",
    "without draws, s": _shown("seconds_without_draws", ".3g"),
    "padding": _shown("padding_and_bookkeeping", "+.0%"),
    "compile, s": lambda r: f"{r['compile_seconds']:.1f}",
}


def table(header: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """Markdown."""
    return (f"{header['what']}; {header['machine']}; {header['dtype']}, "
            f"{header['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s, {header['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s; "
            f"{header['date']}; draws included, compilation not, median of {header['repeats']}; scaled from so many "
            "passes where that is said\n\n"
            + markdown(COLUMNS, found))


def _line(row: dict[str, Any]) -> str:
    return "  " + ", ".join(f"{name} {show(row)}" for name, show in COLUMNS.items() if show(row))


def plot(header: dict[str, Any], found: list[dict[str, Any]], path: Path) -> None:
    """Seconds per batch on a logarithmic axis, a bar per row, its floor marked."""
    bars(path, f"{header['what']}\n{header['machine']}", "seconds per batch, draws included",
         {f"{row['sampler']}, L {row['length']}, batch {row['batch']}, {row['attention']}":
          (row["seconds"], row["floor_seconds"]) for row in found}, "measured", "floor of this machine", scale="log")
