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
    """Facts of the training step by name: memory, FLOPs, communication, and the bound on its speed."""
    facts = _program(program, topology)
    again = sum(flops.recomputed(config, config.train.remat).values())
    parts = flops.training_step(config, topology.devices // config.mesh.tensor)
    facts["flops"] |= {"parts": parts, "remat": again / topology.devices}
    if program.cost is not None:
        seconds = facts["seconds"]["bound"]
        peak = topology.chip.flops / topology.chip.devices
        facts["tokens_per_second"] = config.train.batch_size * config.model.length / seconds
        facts["mfu"] = facts["flops"]["model"] / seconds / peak
    return facts


def sampling(program: Program, step: Sampling, topology: Topology) -> dict[str, Any]:
    """The same for a decoding step, and the time to read weights and cache once, a lower bound of its time."""
    facts = _program(program, topology)
    least = step.read / topology.chip.bandwidth * topology.chip.devices
    facts |= {"batch": step.batch, "tensor": step.tensor, **step.shape._asdict(), "cached": step.cache is not None,
              "cache": step.cache}
    if program.cost is not None:
        facts["seconds"]["weights_and_cache_once"] = least
        facts["tokens_per_second"] = step.batch / facts["seconds"]["bound"]  # one token of each sequence
        if topology.chip.platform == "cuda":
            facts |= {"launches": program.cost.launches, "loops_without_trip_count": program.unbounded}
    return facts


def _program(program: Program, topology: Topology) -> dict[str, Any]:
    chip, cost = topology.chip, program.cost
    facts: dict[str, Any] = {
        "fits": program.fits, "failure": program.failure, "memory": program.memory, "memory_total": program.total,
        "memory_available": program.available or chip.memory / chip.devices,
        "flops": {"model": program.model_flops / topology.devices}, "compile_seconds": program.compile_seconds}
    if cost is not None:
        seconds = {"compute": cost.flops * chip.devices / chip.flops,
                   "memory": cost.bytes * chip.devices / chip.bandwidth,
                   "network": cost.sent * chip.devices / chip.network}
        facts["flops"] |= {"compiled": cost.flops, "compiled_with_float32_operand": cost.wide_flops}
        facts |= {"bytes": cost.bytes, "bytes_sent": cost.sent,
                  "collectives": [{**vars(one), "times": times, "bytes_sent": times * one.sent}
                                  for one, times in hlo.groups(cost.collectives)],
                  "seconds": {**seconds, "bound": max(seconds.values())}}
    return facts


def lines(name: str, facts: dict[str, Any]) -> list[str]:
    """The facts of a program per device, as lines of text."""
    if facts["failure"]:
        return [f"{name}: NOT COMPILED, after {facts['compile_seconds']:.0f} s, so that nobody knows whether it fits. "
                "For a kernel the compiler had too little of the chip's own memory: a limit of its own, not of HBM. "
                "Other sizes of model or batch, or another libtpu, may compile.",
                f"  it says    {facts['failure'][:300]}"]
    parts = ", ".join(f"{part} {size(count)}" for part, count in facts["memory"].items())
    out = [f"{name}: {'fits' if facts['fits'] else 'DOES NOT FIT'}; compiled in {facts['compile_seconds']:.0f} s. "
           "Per device:",
           f"  memory     {size(facts['memory_total'])} of {size(facts['memory_available'])}: {parts}"]
    if not facts["fits"]:
        return out
    work, seconds = facts["flops"], facts["seconds"]
    wide = work["compiled_with_float32_operand"] / max(1.0, work["compiled"])
    out += [f"  FLOPs      {work['model'] / 1e12:,.4g} T of the model, {work['compiled'] / 1e12:,.4g} T as compiled"
            + (f", {100 * wide:.0f}% with a float32 operand (several passes of a matrix unit)" if wide else ""),
            f"  bytes      {size(facts['bytes'])} read and written, {size(facts['bytes_sent'])} sent"]
    if "launches" in facts:
        loops = ", ".join(facts["loops_without_trip_count"]) or "none"
        out.append(f"  launches   {facts['launches']:,} kernels, command buffers off; the host waits at every turn of "
                   f"loops without a known trip count: {loops}; cache kept by {facts['cache'] or 'nobody'}")
    totals: dict[str, tuple[float, float, float]] = {}
    for group in facts["collectives"]:
        times, sent, largest = totals.get(group["kind"], (0, 0, 0))
        totals[group["kind"]] = (times + group["times"], sent + group["bytes_sent"], max(largest, group["bytes"]))
    out += [f"  {kind:<10} {times:,.0f} times, {size(sent)} sent, the largest of {size(largest)}"
            for kind, (times, sent, largest) in totals.items()]
    bound = max(("compute", "memory", "network"), key=lambda part: seconds[part])
    each = ", ".join(f"{part} {_time(seconds[part])}" for part in ("compute", "memory", "network"))
    out.append(f"  time       at least {_time(seconds['bound'])} ({bound}); at the chip's peaks: {each}")
    if "weights_and_cache_once" in seconds:
        out[-1] += f"; weights and cache once {_time(seconds['weights_and_cache_once'])}"
    out.append(f"  so at most {facts['tokens_per_second']:,.0f} tokens/s"
               + (f", MFU {100 * facts['mfu']:.0f}%" if "mfu" in facts else ""))
    return out


def size(count: float) -> str:
    """Bytes as text."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
