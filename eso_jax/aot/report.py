"""A plan in words and in JSON.

Times are bounds, not promises: what one device computes, moves in its memory and sends to others, each divided by the
chip's published peak; no step is faster than the largest. (The network's is the chip's, over all of its links at once.)
"""

from __future__ import annotations

from typing import Any

from eso_jax import flops
from eso_jax.aot import hlo
from eso_jax.aot.programs import Program, Sampling
from eso_jax.chips import Topology
from eso_jax.config import Config


def training(program: Program, config: Config, topology: Topology) -> dict[str, Any]:
    """The training step: memory, FLOPs, communication, and the bound on its speed."""
    found = _program(program, topology)
    again = sum(flops.recomputed(config, config.train.remat).values())
    parts = flops.training_step(config, topology.devices // config.mesh.tensor)
    found["flops"] |= {"parts": parts, "remat": again / topology.devices}
    if program.cost is not None:
        seconds = found["seconds"]["bound"]
        peak = topology.chip.flops / topology.chip.devices
        found["tokens_per_second"] = config.train.batch_size * config.model.length / seconds
        found["mfu"] = found["flops"]["model"] / seconds / peak
    return found


def sampling(program: Program, step: Sampling, topology: Topology) -> dict[str, Any]:
    """A step of decoding: the same, and the floor of reading the weights and the cache once."""
    found = _program(program, topology)
    least = step.read / topology.chip.bandwidth * topology.chip.devices
    found |= {"batch": step.batch, "tensor": step.tensor, **step.shape._asdict(), "cached": step.cached}
    if program.cost is not None:
        found["seconds"]["weights_and_cache_once"] = least
        found["tokens_per_second"] = step.batch / found["seconds"]["bound"]  # one token of each sequence
        if topology.chip.platform == "cuda":
            found |= {"launches": program.cost.launches, "loops_without_trip_count": program.unbounded}
    return found


def _program(program: Program, topology: Topology) -> dict[str, Any]:
    chip, cost = topology.chip, program.cost
    found: dict[str, Any] = {
        "fits": program.fits, "memory": program.memory, "memory_total": program.total,
        "memory_available": program.available or chip.memory / chip.devices,
        "flops": {"model": program.model_flops / topology.devices}, "compile_seconds": program.compile_seconds}
    if cost is not None:
        seconds = {"compute": cost.flops * chip.devices / chip.flops,
                   "memory": cost.bytes * chip.devices / chip.bandwidth,
                   "network": cost.sent * chip.devices / chip.network}
        found["flops"] |= {"compiled": cost.flops, "compiled_with_float32_operand": cost.wide_flops}
        found |= {"bytes": cost.bytes, "bytes_sent": cost.sent,
                  "collectives": [{**vars(one), "times": times, "bytes_sent": times * one.sent}
                                  for one, times in hlo.groups(cost.collectives)],
                  "seconds": {**seconds, "bound": max(seconds.values())}}
    return found


def lines(name: str, found: dict[str, Any]) -> list[str]:
    """A program for people, per device."""
    parts = ", ".join(f"{part} {size(count)}" for part, count in found["memory"].items())
    out = [f"{name}: {'fits' if found['fits'] else 'DOES NOT FIT'}; compiled in {found['compile_seconds']:.0f} s. "
           "Per device:",
           f"  memory     {size(found['memory_total'])} of {size(found['memory_available'])}: {parts}"]
    if not found["fits"]:
        return out
    work, seconds = found["flops"], found["seconds"]
    wide = work["compiled_with_float32_operand"] / max(1.0, work["compiled"])
    out += [f"  FLOPs      {work['model'] / 1e12:,.4g} T of the model, {work['compiled'] / 1e12:,.4g} T as compiled"
            + (f", {100 * wide:.0f}% with a float32 operand (several passes of a matrix unit)" if wide else ""),
            f"  bytes      {size(found['bytes'])} read and written, {size(found['bytes_sent'])} sent"]
    if "launches" in found:
        loops = ", ".join(found["loops_without_trip_count"]) or "none"
        out.append(f"  launches   {found['launches']:,} kernels, command buffers off; the host waits at every turn of "
                   f"loops without a known trip count: {loops}")
    totals: dict[str, list[float]] = {}
    for one in found["collectives"]:
        count = totals.setdefault(one["kind"], [0, 0, 0])
        totals[one["kind"]] = [count[0] + one["times"], count[1] + one["bytes_sent"], max(count[2], one["bytes"])]
    out += [f"  {kind:<10} {times:,.0f} times, {size(sent)} sent, the largest of {size(largest)}"
            for kind, (times, sent, largest) in totals.items()]
    bound = max(("compute", "memory", "network"), key=lambda part: seconds[part])
    times = ", ".join(f"{part} {_time(seconds[part])}" for part in ("compute", "memory", "network"))
    out.append(f"  time       at least {_time(seconds['bound'])} ({bound}); at the chip's peaks: {times}")
    if "weights_and_cache_once" in seconds:
        out[-1] += f"; weights and cache once {_time(seconds['weights_and_cache_once'])}"
    out.append(f"  so at most {found['tokens_per_second']:,.0f} tokens/s"
               + (f", MFU {100 * found['mfu']:.0f}%" if "mfu" in found else ""))
    return out


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
