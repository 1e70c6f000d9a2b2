"""Plans: what is read from a program's text, what a report says of it, and what is tried where it does not fit."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from conftest import USUAL, Run, emulated
from eso_jax import chips, config as configs, flops, quickstart, sharding
from eso_jax.aot import fit, hlo, plan, programs, report, target
from eso_jax.aot.programs import Program, _compiled, _refused
from eso_jax.cli import main
from eso_jax.config import Config, MeshConfig
from eso_jax.errors import EsoError
from eso_jax.model import splash
from eso_jax.model.params import init_params
from eso_jax.run import train
from test_flops import FAMILIES, ident, wide

pytestmark = pytest.mark.usefixtures("no_shape_checks")

ROOT = Path(__file__).parents[1]

# A loop of 12 turns over a matrix kept in main memory, of which a turn reads a twelfth into vector memory, multiplies
# with it, and reduces over pairs of devices; then a gathering and a scattered reduction over all eight.
PROGRAM = """HloModule jit_step, num_partitions=8

%take (source: f32[12,64,64], at: s32[]) -> f32[64,64] {
  %source = f32[12,64,64]{2,1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %part = f32[1,64,64]{2,1,0} dynamic-slice(%source, %at, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %flat = f32[64,64]{1,0} bitcast(%part)
}

%body (carry: (s32[], f32[64,64], f32[12,64,64])) -> (s32[], f32[64,64], f32[12,64,64]) {
  %carry = (s32[], f32[64,64]{1,0}, /*index=2*/f32[12,64,64]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %x = f32[64,64]{1,0} get-tuple-element(%carry), index=1
  %all = f32[12,64,64]{2,1,0:T(8,128)} get-tuple-element(%carry), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %w = f32[64,64]{1,0:T(8,128)S(1)} fusion(%all, %n), kind=kLoop, calls=%take
  %y = f32[64,64]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf
  %sum = f32[64,64]{1,0:T(8,128)} all-reduce(%y), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %out = (s32[], f32[64,64], f32[12,64,64]) tuple(%next, %sum, %all)
}

%condition (carry: (s32[], f32[64,64], f32[12,64,64])) -> pred[] {
  %carry = (s32[], f32[64,64]{1,0}, f32[12,64,64]{2,1,0}) parameter(0)
  %limit = s32[] constant(12)
  %n = s32[] get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

%scatter (x: bf16[64,64]) -> bf16[8,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %reduced = bf16[64,64]{1,0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %mine = bf16[8,64]{1,0} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={8,64}
}

ENTRY %main (x: f32[64,64], all: f32[12,64,64], b: bf16[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  %all = f32[12,64,64]{2,1,0} parameter(1)
  %b = bf16[64,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], f32[64,64]{1,0}, f32[12,64,64]{2,1,0}) tuple(%zero, %x, %all)
  %while = (s32[], f32[64,64]{1,0}, f32[12,64,64]{2,1,0}) while(%start), condition=%condition, body=%body
  %mine = bf16[8,64]{1,0} fusion(%b), kind=kCustom, calls=%scatter
  %begun = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) all-gather-start(%mine), \
replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a','b'}, dimensions={0}
  %done = bf16[64,64]{1,0} all-gather-done(%begun)
  ROOT %result = f32[64,64]{1,0} get-tuple-element(%while), index=1
}
"""


def test_a_program_is_counted_as_it_runs() -> None:
    found = hlo.cost(PROGRAM)
    assert found.flops == found.wide_flops == 12 * 2 * 64**3
    assert found.collectives == {
        hlo.Collective("all-reduce", 4 * 64 * 64, 2, "f32"): 12,
        hlo.Collective("reduce-scatter", 2 * 64 * 64, 8, "bf16"): 1,
        hlo.Collective("all-gather", 2 * 64 * 64, 8, "bf16"): 1}
    assert found.launches == 12 * 4 + 2
    assert found.sent == 12 * 4 * 64 * 64 + 2 * (2 * 64 * 64 * 7 / 8)
    tile, half = 4 * 64 * 64, 2 * 64 * 64
    turn = 8 + 4 + 4  # the count: two numbers read and one written; and the fusion reads it
    turn += tile + 2 * tile + 2 * tile  # a slice to vector memory; x read, y written; y read, its sum written
    assert found.bytes == 12 * turn + (half + half // 8) + half // 8


KERNELS = """HloModule jit_step

%small (x: bf16[8,64]) -> bf16[8,32] {
  %x = bf16[8,64]{1,0} parameter(0)
  %w = bf16[64,32]{1,0} constant({...})
  %product = (bf16[8,32]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %out = bf16[8,32]{1,0} get-tuple-element(%product), index=0
}

%large (x: bf16[8,64]) -> bf16[8,32] {
  %x = bf16[8,64]{1,0} parameter(0)
  %w = bf16[64,32]{1,0} constant({...})
  %once = bf16[8,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %twice = bf16[8,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (q: bf16[2,128,3,64], x: bf16[8,64], over: pred[]) -> bf16[2,128,3,64] {
  %q = bf16[2,128,3,64]{3,2,1,0} parameter(0)
  %x = bf16[8,64]{1,0} parameter(1)
  %over = pred[] parameter(2)
  %one = bf16[8,32]{1,0} conditional(%over, %x, %x), true_computation=%large, false_computation=%small
  %forward = (bf16[2,3,128,64]{3,1,2,0}, f32[2,3,128]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config="{\\"cudnn_fmha_backend_config\\": {\\"intermediate_tensor_shape\\": {\\"dimensions\\": [\\"2\\", \\"3\\", \\"128\\", \\"128\\"]}, \\"mask_type\\": \\"CAUSAL\\"}}"
  %stats = f32[2,3,128]{2,1,0} get-tuple-element(%forward), index=1
  %back = (bf16[2,3,128,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %stats), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":["2","3","128","128"]},"mask_type":"NO_MASK"}}
  ROOT %out = bf16[2,3,128,64]{3,1,2,0} get-tuple-element(%back), index=0
}
"""  # noqa: E501


SPLASH = """HloModule jit_step

ENTRY %main (q: bf16[3,128,64]) -> bf16[3,128,64] {
  %q = bf16[3,128,64]{2,1,0} parameter(0)
  %rows = s8[3,1,1]{2,1,0} constant({...})
  %splash.1 = (f32[128,64]{1,0}, bf16[3,128,64]{2,1,0}) custom-call(%rows, %rows, %q, %q, %q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(train_step)/pairs16384/splash/splash_mha_fwd_residuals/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzv"}}
  %splash.2 = bf16[3,128,64]{2,1,0} custom-call(%rows, %rows, %q, %q, %q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(train_step)/pairs16384/splash/splash_mha_dkv_no_residuals/pallas_call"}
  ROOT %out = bf16[3,128,64]{2,1,0} get-tuple-element(%splash.1), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(train_step)/pairs16384/splash/splash_mha_fwd_residuals/pallas_call"}
}
"""  # noqa: E501


def test_splash_counts_the_pairs_it_says() -> None:
    """Forward and backward; its metadata stands on lines of its own."""
    assert hlo.cost(SPLASH).flops == (4 + 10) * 3 * 128 * 128 * 64


KERNEL = re.compile(r"splash_mha_(fwd|dkv)")
EVERY_FAMILY = [FAMILIES[n] for n in (0, 5, 6, 7, 9)]  # Eso-LM (B) and (A), MDLM, BD3-LM, AR


def at_full_length(**family: Any) -> Config:
    """Two layers at L = 1024, all else as small as it gets."""
    return wide(**family).override("model.length=1024", "model.vocab_size=64", "model.width=128", "model.cond_dim=8",
                                   "train.compute_dtype=bfloat16")


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=ident)
def test_every_family_trains_by_splash_on_tpus(family: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, in the program that the compiler gets; no TPU and no compiler for one is needed."""
    config = at_full_length(**family)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    assert train.attention_of(config) == "splash"
    state = jax.eval_shape(functools.partial(train.init_state, config))
    tokens = jax.ShapeDtypeStruct((config.train.batch_size, config.model.length), np.int32)
    step = jax.jit(functools.partial(train.train_step, config))
    assert set(KERNEL.findall(step.trace(state, tokens).lower(lowering_platforms=("tpu",)).as_text())) == {"fwd", "dkv"}


COMPILED = """
import sys
from eso_jax import chips, sharding
from eso_jax.aot import hlo, target
topology = chips.topology(sys.argv[1])
target.prepare(topology)
from test_planning import EVERY_FAMILY, KERNEL, at_full_length, train
for family in EVERY_FAMILY:
    config = at_full_length(**family)
    mesh = sharding.mesh(config.mesh, target.devices(topology))
    computations, _ = hlo.parse(train.lower_step(config, mesh).compile().as_text())
    calls = [op.attributes for one in computations.values() for op in one.instructions.values()
             if "tpu_custom_call" in op.attributes]
    print(family["name"], *sorted(set(KERNEL.findall(" ".join(calls)))))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
def test_splash_is_in_every_compiled_step(topology: str) -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED, topology], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{family['name']} dkv fwd" for family in EVERY_FAMILY]


@pytest.mark.parametrize("block", [None, 1, 16, 256])
def test_splash_computes_whole_tiles(block: int | None) -> None:
    """1024 keys, 768 queries: tiles of 384 x 512, of which those count in which somebody sees somebody."""
    query, key = np.arange(256, 1024)[:, None], np.arange(1024)[None]
    seen = np.ones((768, 1024), bool) if block is None else query // block >= key // block
    tiles = seen.reshape(2, 384, 2, 512).any((1, 3)).sum()
    assert splash.computed_pairs(768, 1024, block) == tiles * 384 * 512


def test_kernels_of_libraries_count_by_formula() -> None:
    """A product of cuBLAS, for which there is another way if a size overflows; attention forward, causal, and back."""
    pairs = 2 * 3 * 128 * 129 // 2, 2 * 3 * 128 * 128
    by_number = KERNELS.replace("true_computation=%large, false_computation=%small",
                                "branch_computations={%large, %small}")
    for text in (KERNELS, by_number):
        assert hlo.cost(text).flops == 2 * 8 * 64 * 32 + 4 * 64 * pairs[0] + 10 * 64 * pairs[1]
        assert hlo.turn(text) == hlo.cost(text)  # a turn is all of it where there is no loop


def test_how_often_a_loop_runs() -> None:
    endless = PROGRAM.replace("constant(12)", "get-tuple-element(%carry), index=0")
    assert endless != PROGRAM and hlo.cost(endless).flops == hlo.turn(endless).flops == 2 * 64**3
    assert hlo.unbounded(endless) == ["while"] and not hlo.unbounded(PROGRAM) and hlo.turn(endless).launches == 4
    assert {one.kind for one in hlo.turn(endless).collectives} == {"all-reduce"}  # what is around it is not a turn's
    by_two = PROGRAM.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")  # XLA unrolls its own loops
    assert hlo.cost(by_two).flops == 6 * 2 * 64**3
    known = endless.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert hlo.cost(known).flops == 5 * 2 * 64**3


def test_products_that_tpus_write_as_convolutions() -> None:
    """A batched product [16, 12, 128, 64] x [16, 12, 64, 32], and a contraction of two axes."""
    lines = ["HloModule m", "ENTRY %main (a: bf16[16,12,128,64], b: bf16[16,12,64,32]) -> f32[16,12,128,32] {",
             "  %a = bf16[16,12,128,64]{3,2,1,0} parameter(0)", "  %b = bf16[16,12,64,32]{3,2,1,0} parameter(1)",
             "  ROOT %c = f32[16,12,128,32]{3,2,1,0} convolution(%a, %b), window={size=16x12 stride=15x11 "
             "lhs_dilate=16x12}, dim_labels=01bf_01io->01bf", "}"]
    found = hlo.cost("\n".join(lines))
    assert found.flops == 2 * 16 * 12 * 128 * 64 * 32 and found.wide_flops == 0
    two = ["HloModule m", "ENTRY %main (a: f32[8,12,64], b: f32[12,64,32]) -> f32[8,1,32] {",
           "  %a = f32[8,12,64]{2,1,0} parameter(0)", "  %b = f32[12,64,32]{2,1,0} parameter(1)",
           "  ROOT %c = f32[8,1,32]{2,1,0} convolution(%a, %b), window={size=12}, dim_labels=b0f_0io->b0f", "}"]
    assert hlo.cost("\n".join(two)).flops == 2 * 8 * 12 * 64 * 32


@pytest.mark.slow
@pytest.mark.parametrize(("family", "remat"), [(FAMILIES[0], "none"), (FAMILIES[0], "dots"), (FAMILIES[0], "full"),
                                               (FAMILIES[6], "none")],
                         ids=lambda x: x if isinstance(x, str) else ident(x))
def test_the_compiled_step_does_what_we_count(family: dict[str, Any], remat: str) -> None:
    """Products alone, so to the digit, but for AdaLN's, which XLA may not write as products; "full" is scanned."""
    config = wide(**family).override(f"train.remat={remat}")
    mesh = sharding.mesh(MeshConfig(), jax.devices()[:1])
    found = hlo.cost(train.lower_step(config, mesh).compile(USUAL).as_text())
    ours = sum(flops.training_step(config).values()) + sum(flops.recomputed(config, remat).values())
    assert found.flops == pytest.approx(ours, rel=2e-3)
    assert not found.collectives


SCRIPT = """
import dataclasses, json, sys
import jax
from eso_jax import chips, flops, sharding
from eso_jax.aot import fit, hlo, programs, report
from eso_jax.run import train
from test_flops import wide
config = wide(name="esolm", alpha_0=0.5).override("mesh.fsdp=2", "mesh.tensor=2", "train.batch_size=32")
topology = chips.topology("v5e:2x4")
program = programs.training(config, topology, jax.devices())
compiled = train.lower_step(config, sharding.mesh(config.mesh)).compile()
found = report.training(program, config, topology)
step, sampled = programs.sampling(config, topology, jax.devices(), 2, 2)
one_token = programs.sampling(wide(name="ar"), topology, jax.devices(), 2, 2)[0].shape.window
tried = []
def training(config, topology, devices):
    tried.append([topology.name, config.train.remat, config.train.accumulate, config.mesh.fsdp])
    return dataclasses.replace(program, fits=len(tried) == 6)
programs.training = training
best, _ = fit.first_that_fits(config, topology, jax.devices(), lambda line: None)
json.dump(dict(found=found, window_of_ar=one_token, tried=tried,
               arguments=compiled.memory_analysis().argument_size_in_bytes, overrides=best.overrides,
               lines=report.lines("Training", found),
               sampling=report.sampling(sampled, step, topology)), open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plan of eight emulated devices, data 2 x fsdp 2 x tensor 2."""
    out = tmp_path_factory.mktemp("plan") / "found.json"
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    subprocess.run([sys.executable, "-c", SCRIPT, str(out)], env=emulated(8) | path, check=True)
    return json.loads(out.read_text())


@pytest.mark.slow
def test_memory_is_counted_by_part(eight: dict[str, Any]) -> None:
    memory = eight["found"]["memory"]
    # All that goes in, but for two counters of the optimizer and the step.
    assert sum(memory[part] for part in ("parameters", "averages", "optimizer", "batch")) == pytest.approx(
        eight["arguments"], abs=16)
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], abs=16)
    assert eight["found"]["memory_total"] == sum(memory.values()) and memory["temporaries"] > 0


@pytest.mark.slow
def test_work_is_shared_by_the_devices(eight: dict[str, Any]) -> None:
    found = eight["found"]
    assert found["flops"]["compiled"] == pytest.approx(found["flops"]["model"], rel=1e-3)
    kinds = {one["kind"] for one in found["collectives"]}
    assert {"all-gather", "all-reduce"} <= kinds
    assert found["bytes_sent"] == pytest.approx(sum(one["bytes_sent"] for one in found["collectives"]))
    seconds = found["seconds"]
    assert seconds["bound"] == max(seconds["compute"], seconds["memory"], seconds["network"])
    assert seconds["compute"] == pytest.approx(found["flops"]["compiled"] / 197e12)
    assert found["tokens_per_second"] == pytest.approx(32 * 128 / seconds["bound"])
    assert found["mfu"] == pytest.approx(found["flops"]["model"] / seconds["bound"] / 197e12)
    assert "fits" in eight["lines"][0] and "MFU" in eight["lines"][-1]


@pytest.mark.slow
def test_a_sampling_step(eight: dict[str, Any]) -> None:
    found = eight["sampling"]
    assert found["batch"] == 8 and found["tensor"] == 2 and found["live"] == 128
    assert found["memory"]["cache"] == 2 * 2 * 2 * 512 * 128 * 4 // 2  # layers, keys and values, rows; half the heads
    assert found["flops"]["compiled"] == pytest.approx(found["flops"]["model"], rel=0.05)
    assert 0.9 < found["seconds"]["memory"] / found["seconds"]["weights_and_cache_once"] < 2
    assert eight["window_of_ar"] == 1


@pytest.mark.slow
def test_what_is_tried_in_order(eight: dict[str, Any]) -> None:
    """More remat, smaller micro-batches (down to a row of each loss on each of 4 devices), more fsdp."""
    assert eight["tried"] == [
        ["v5e:2x4", "dots", 1, 2], ["v5e:2x4", "full", 1, 2], ["v5e:2x4", "full", 2, 2], ["v5e:2x4", "full", 4, 2],
        ["v5e:2x4", "full", 1, 4], ["v5e:2x4", "full", 4, 4]]
    assert eight["overrides"] == ["train.remat=full", "mesh.data=None", "mesh.fsdp=4", "train.accumulate=4"]


def test_what_the_compiler_refuses() -> None:
    gib = 2**30
    assert _refused("Ran out of memory in memory space hbm. Used 37.00G of 15.75G hbm.") == (37 * gib, 15.75 * gib)
    assert _refused("the total memory required for HLO temporaries (310.50G) exceeds available HBM (15.75G).") == (
        310.5 * gib, 15.75 * gib)
    assert _refused("something else") == (None, None)
    assert report.size(1536) == "1.50 KiB" and report.size(3 * gib) == "3.00 GiB" and report.size(12) == "12 B"


# What libtpu 0.0.42.1 says, cut short: of a kernel's stack, of a kernel's windows, and of HBM.
STACK = ("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while "
         "allocating on stack for %f.1 = f32[1024,4096] custom-call(%x.1). Scoped allocation with size 32.00M and "
         "limit 16.00M exceeded scoped vmem limit by 16.00M.")
WINDOWS = ("RESOURCE_EXHAUSTED: Allocation (size=1073741824) would exceed memory (size=134217728) :: #allocation2 "
           "[shape = 'u8[1073741824]{0}', space=vmem, size = 0x40000000, scoped] :: f.1")
HBM = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (122.07G) exceeds "
       "available HBM (15.75G).")


def refused(message: str) -> Program:
    """The program of a compiler that says this."""
    class Lowered:
        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError(message)

    lowered: Any = Lowered()
    return _compiled(lowered, {"parameters": 8}, chips.topology("v5e:1x1"), 1.0, 0.0)


def test_a_kernel_that_does_not_compile_is_not_a_run_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is tried then, neither for training nor for sampling, and both plans say why."""
    for message in (STACK, WINDOWS):
        program, said = refused(message), list[str]()
        monkeypatch.setattr(target, "devices", lambda *_: [jax.devices()[0]] * 2)
        monkeypatch.setattr(programs, "training", lambda *_, program=program: program)
        step = programs.Sampling(16, 1, programs.passes.Shape(1, 1, 8), None, 8)
        monkeypatch.setattr(programs, "sampling", lambda *_, program=program: (step, program))
        monkeypatch.setattr(fit, "first_that_fits", lambda *_: pytest.fail("tried another config"))
        found = plan(wide(name="ar"), chips.topology("v5e:1x2"), said.append)
        assert found["training"]["fits"] is found["sampling"]["fits"] is None and "instead" not in found
        assert [line.split(",")[0] for line in said if "NOT COMPILED" in line] == ["Training: NOT COMPILED", "Sampling"]
        assert sum("vmem" in line for line in said) == 2 and "FIT" not in " ".join(said)
    hbm = refused(HBM + "\n #1 [space=vmem]")
    assert hbm.fits is False and hbm.failure is None and hbm.asked == 122.07 * 2**30 // 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        refused("INTERNAL: space=vmem")


def test_what_must_be_installed(monkeypatch: pytest.MonkeyPatch, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for topology, says in (("v5e:2x2", r"pip install -e '.[tpu]'"), ("h100:8", r"pip install -e '.[cuda]'")):
        assert main(["plan", str(ROOT / "experiments/quickstart.py"), "--topology", topology]) == 2
        assert says in capsys.readouterr().err
    assert target.importlib.util.find_spec("libtpu") is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
def test_a_plan_for_a_tpu(tmp_path: Path) -> None:
    """By the command, on a machine without one: v5e:2x2, by its other name."""
    command = [sys.executable, "-m", "eso_jax", "plan", str(ROOT / "experiments/quickstart.py"), "--topology",
               "v5litepod-4", "--out", str(tmp_path / "plan.json"), "mesh.fsdp=2", "train.remat=full"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    training = found["training"]
    assert found["topology"] == "v5e:2x2" and found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and training["fits"]
    work, model = training["flops"], quickstart.config.model
    # Queries and keys are rotated by a product with a matrix of ones and zeros, in the forward pass, again, and back.
    rotation = work["parts"]["qkv"] / found["devices"] * 2 / 3 * model.head_size / model.width
    assert work["compiled"] == pytest.approx(work["model"] + work["remat"] + rotation, rel=0.005)
    assert {one["group"] for one in training["collectives"]} <= {2, 4} and training["bytes_sent"] > 0
    assert found["sampling"]["fits"] and found["sampling"]["flops"]["compiled"] > 0


@pytest.mark.parametrize(("topology", "given", "flags"), [
    ("h100:8", "", "--xla_gpu_autotune_level=0"),
    ("h100:8", "--a=1", "--a=1 --xla_gpu_autotune_level=0"),
    ("h100:8", "--xla_gpu_autotune_level=4 --a=1", "--xla_gpu_autotune_level=4 --a=1"),
    ("h100:8", "/etc/xla.flags", "/etc/xla.flags"),
    ("v5e:2x2", "--a=1", "--a=1"),
])
def test_no_kernel_is_timed_whatever_else_xla_flags_says(topology: str, given: str, flags: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"XLA_FLAGS": given})
    monkeypatch.setattr(target, "jax", SimpleNamespace(config=SimpleNamespace(update=lambda *_: None)))
    target.prepare(chips.topology(topology))
    assert os.environ["XLA_FLAGS"] == flags


def test_gpus_are_described_here_or_by_a_file(tmp_path: Path) -> None:
    h200 = target._description(chips.topology("h200:1"), None)
    assert 'name: "NVIDIA H200"' in h200 and "device_memory_size: 141000000000" in h200 and "$" not in h200
    (tmp_path / "mine.txtpb").write_text("mine")
    assert target._description(chips.topology("a100:1"), str(tmp_path / "mine.txtpb")) == "mine"
    with pytest.raises(EsoError, match="--target-config = None: give XLA's description"):
        target._description(chips.topology("a100:1"), None)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the extra cuda is not installed")
def test_a_plan_for_a_gpu(tmp_path: Path) -> None:
    """By the command, without one."""
    command = [sys.executable, "-m", "eso_jax", "plan", str(ROOT / "experiments/quickstart.py"), "--topology", "h100:1",
               "--top-p", "0.9", "--out", str(tmp_path / "plan.json"), "model.layers=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    sampling = json.loads((tmp_path / "plan.json").read_text())["sampling"]
    assert sampling["fits"] and sampling["cache"] == "triton"
    # 10 of the layer, 6 around it, and 13 of the draw of few rows with a nucleus; without our kernels 45.
    assert sampling["launches"] == pytest.approx(29, abs=4)


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.04), ("8b", 7.78)])
def test_the_runs_at_scale(name: str, billions: float) -> None:
    """They are as large as they say, and their batch divides over both slices that they are for."""
    config = configs.from_file(ROOT / "experiments/scale" / f"esolm_{name}.py")
    params = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(params)) / 1e9 == pytest.approx(billions, abs=0.005)
    for devices in (256, 512):
        assert devices % config.mesh.fsdp == 0 and config.model.width % config.mesh.fsdp == 0
        assert config.train.batch_size % (devices * config.family.group_size) == 0
