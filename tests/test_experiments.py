"""The experiments: every run of the paper is a config that lowers, and every table comes out at a reduced size."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import samples
from eso_jax import Config, DataConfig, ModelConfig, TrainConfig, config as configs, recipes
from eso_jax.evaluation import throughput
from eso_jax.model.params import init_params
from eso_jax.run.train import init_state, train_step
from lab import Lab

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RUNS = sorted(path.relative_to(ROOT) for folder in ("lm1b", "owt")
              for path in (ROOT / "experiments" / folder).glob("*.py"))
SCRIPTS = sorted((ROOT / "experiments" / "tables").glob("*.py"))


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_every_run_loads_and_says_how(path: Path) -> None:
    config = configs.from_file(ROOT / path)
    doc = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    workdir = Path("runs/paper") / path.relative_to("experiments").with_suffix("")
    assert f"Command:   eso-jax train {path} --workdir {workdir}\n" in doc
    assert all(f"\n{what}:" in doc for what in ("Data", "Hardware", "Paper", "Ours"))
    assert config.model.width == 768 and config.train.batch_size == 512
    params = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(params))
    if config.model.cond_dim:  # the authors' counts
        assert round(count / 1e6, 1) == {30522: 139.3, 50258: 169.6}[config.model.vocab_size]
    if config.train.start_from:
        source = ROOT / "experiments" / Path(config.train.start_from).relative_to("runs/paper").with_suffix(".py")
        assert configs.from_file(source).family == config.family


def test_there_is_a_run_for_every_row_of_the_paper() -> None:
    families = [dataclasses.astuple(configs.from_file(ROOT / path).family) for path in RUNS]
    by_corpus = {corpus: [f for f, path in zip(families, RUNS, strict=True) if path.parts[1] == corpus]
                 for corpus in ("lm1b", "owt")}
    alphas = {corpus: sorted({f[1] for f in found if f[0] == "esolm"}) for corpus, found in by_corpus.items()}
    assert alphas == {"lm1b": [0, 0.0625, 0.125, 0.25, 0.5, 1], "owt": [0, 0.125, 0.25, 0.5, 1]}
    kappas = {(f[1], f[2]) for f in by_corpus["lm1b"] if f[0] == "esolm_a" and f[2] is not None}
    assert len(kappas) == 16
    for found in by_corpus.values():
        assert {f[4] for f in found if f[0] == "bd3lm"} == {4, 8, 16}


def distinct() -> dict[str, Config]:
    """A run for every way in which the program differs (not only its numbers)."""
    found = {}
    for path in RUNS:
        config = configs.from_file(ROOT / path)
        family = config.family
        kind = (family.name, config.model.length, config.model.cond_dim, float(family.split), family.block_size)
        found[kind] = path
    return {str(path): configs.from_file(ROOT / path) for path in found.values()}


@pytest.mark.parametrize("name,config", distinct().items(), ids=lambda x: x if isinstance(x, str) else "")
def test_every_run_lowers_at_paper_scale(name: str, config: Config) -> None:
    """Fresh parameters and a whole training step on them, abstractly: no array is ever made."""
    def first_step(tokens: jax.Array) -> tuple[Any, Any]:
        state = init_state(config)
        new, metrics = train_step(config, state, tokens)
        return (state.params, new.params), metrics

    tokens = jax.ShapeDtypeStruct((config.train.batch_size, config.model.length), jnp.int32)
    lowered = jax.jit(first_step).trace(tokens).lower(lowering_platforms=("tpu",))
    (before, after), metrics = lowered.out_info
    assert jax.tree.map(lambda x: x.shape, before) == jax.tree.map(lambda x: x.shape, after)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


TEXT = "def f(x):\n    return x + 1  # one more\n\n\n" * 400
# What is made smaller in each script, so that all together take a minute.
SMALL: dict[str, dict[str, Any]] = {
    "table_01_perplexity": {"STEPS": ["esolm_1", "esolm_0"], "ORDERS": {"smoke": {"lm1b": 3, "owt": 3}},
                            "WINDOWS": {"smoke": 8}, "PAPER": ["AR + AdaLN", "MDLM", "Eso-LM, alpha_0 = 1",
                                                               "Eso-LM, alpha_0 = 0"]},
    "table_02_estimators": {"TRIALS": 6, "DRAWS": 2},
    "table_03_num_tries": {"PAPER": [("MDLM", 1024)]},
    "table_04_kappa": {"ALPHAS": ("0.5",), "KAPPAS": ("0.75",)},
    "table_05_zero_shot": {"RUNS": ["MDLM", "Eso-LM, alpha_0 = 1"], "MOST": 8},
    "tables_06_to_08_orders": {"COUNTS": {"smoke": {"lm1b": (1, 3), "owt": (1, 3)}}, "WINDOWS": {"smoke": 8},
                               "MDLM_COUNTS": {"smoke": (1, 3)},
                               "CORPORA": {"lm1b": ("LM1B", ("mdlm", "esolm_1")), "owt": ("OWT", ("esolm_1",))}},
    "tables_09_10_a_and_b": {"PAPER": {"lm1b": {"1": (36.12, 30.96)}, "owt": {"1": (30.06, 26.21)}}},
    "table_11_latency": {"LENGTHS": {"smoke": (8, 16), "paper": (2048, 8192)}},
    "table_12_long": {"COUNT": 4, "PAPER": ["Eso-LM, alpha_0 = 0.125"]},
    "tables_13_to_15_quality": {"TRAINED": ["1"], "ESO_LM": [(0.25, 128), (1.0, 1024)], "MDLM": [1024],
                                "BD3LM": [4]},
    "figure_16_training_speed": {"RUNS": ["MDLM", "Eso-LM, alpha_0 = 1"], "STEPS": 2},
    "figures_18_19_alpha_0": {"TRAINED": ["1"], "ESO_LM": [(0.25, 128), (1.0, 1024)]},
    "figures_20_21_block_sampler": {"PARALLELISM": (64, 1), "PLANS": ["binomial", "block, shuffled for each row"]},
    "figures_24_to_26_samples": {"SETTINGS": ["MDLM, T = 1024"]}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A scale smaller than smoke, on which every run takes a few seconds."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "text.py").write_text(TEXT)

    def bench(preset: str, out: Path, lengths: tuple[int, ...], batches: tuple[int, ...]) -> list[dict[str, Any]]:
        """In place of eso_jax.evaluation.throughput.run, which has its own test."""
        return [{"sampler": name, "length": length, "seconds": 2.0, "times_eso_lm": 1.0, "of_the_floor": 0.5}
                for name in ("AR", "Eso-LM", "BD3-LM (16)", "BD3-LM (4)", "MDLM") for length in lengths]

    def tiny(config: Config) -> Config:
        long = config.train.start_from is not None
        model = ModelConfig(length=32 if long else 16, width=16, layers=1, heads=2, dropout=0.0,
                            cond_dim=8 if config.model.cond_dim else 0)
        train = TrainConfig(steps=2, batch_size=16, warmup=1, eval_windows=8, save_every=2, compute_dtype="float32",
                            start_from=config.train.start_from)
        return Config(model, config.family, DataConfig(str(folder / "text.py")), train)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "smoke", tiny)
        patch.setattr(throughput, "run", bench)
        patch.setattr(samples, "COUNT", {"smoke": 8})
        patch.setattr(samples, "BATCH", {"smoke": 8})
        patch.setattr(samples, "REPEATS", 1)
        yield Lab("smoke", folder / "runs", folder / "results")


def test_every_script_is_tried_here() -> None:
    scripts = {path.stem for path in SCRIPTS if path.stem.startswith(("table", "figure"))}
    assert scripts == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_table_comes_out_and_is_not_made_twice(name: str, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    if hasattr(module, "samples"):
        pytest.importorskip("mauve", reason="the extra eval is not installed")
    for constant, value in SMALL[name].items():
        full = getattr(module, constant)
        kept = {key: full[key] for key in value} if isinstance(full, dict) and isinstance(value, list) else value
        monkeypatch.setattr(module, constant, kept)
    monkeypatch.setattr("sys.argv", [f"{name}.py"])
    module.run(lab)
    report = json.loads((lab.results / f"{name}.json").read_text())
    text = (lab.results / f"{name}.md").read_text()
    assert report["title"] in text and report["measured"] and report["measured"][0] in text
    assert f"{name}.py --scale smoke" in text
    for table in report["tables"].values():
        assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
        for row in table["rows"]:
            for column, cell in zip(table["columns"], row, strict=True):
                number = cell["value"] if isinstance(cell, dict) else cell
                if isinstance(number, float) and "repeated" not in column:  # 16 bytes may hold no four words
                    assert np.isfinite(number), (column, row)
    if name != "figures_24_to_26_samples":
        assert (lab.results / f"{name}.png").stat().st_size > 5000

    fresh = Lab("smoke", lab.runs, lab.results)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("is measured again")

    monkeypatch.setattr(Lab, "is_trained", refuse)
    monkeypatch.setattr(module, "measure", refuse, raising=False)
    module.run(fresh)
    assert json.loads((lab.results / f"{name}.json").read_text())["tables"] == report["tables"]


def test_what_depends_on_a_changed_constant_is_measured_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("table_02_estimators")
    made = []
    monkeypatch.setattr(module, "mdm_trials", lambda lab, model: made.append(module.TRIALS) or [1.0, 2.0])
    monkeypatch.setattr(module, "ao_trials", lambda lab, model: [1.0, 3.0])
    for trials in (3, 3, 4):
        monkeypatch.setattr(module, "TRIALS", trials)
        module.run(lab)
    assert made == [3, 4]


STAND_IN = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "cuda A card"; exit; fi
echo "$JAX_PLATFORMS python $*" >>"$CALLS"
[ "${3:-}" != check-cache ] || exit 1
"""


def test_the_first_run_on_an_accelerator(tmp_path: Path) -> None:
    """Every step runs, also behind one that fails; on the accelerator, where tests are for CPUs otherwise."""
    script, python = ROOT / "experiments" / "accelerator.sh", tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "JAX_PLATFORMS": ""}
    command = ["bash", script, tmp_path / "out", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "accelerator.sh: cuda A card" in done.stdout
    assert re.findall(r"^(\S+): (\S+)", done.stdout, re.M)[1:] == [
        ("goldens", "done"), ("quickstart", "done"), ("check-cache-float32", "FAILED"),
        ("check-cache-bfloat16", "FAILED"), ("bench", "done")]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "cuda python -m pytest -n 0 tests/test_goldens.py"
    assert calls[1].endswith(f"quickstart.py --workdir {tmp_path}/out/quickstart model.width=32 model.length=32 "
                             "train.steps=20 train.eval_windows=64")
    assert calls[-1].endswith(f"--lengths 64 --batches 2 --preset table11 --repeats 1 --out {tmp_path}/out/bench.json")
    for arguments, code in (([], 2), (["--help"], 0)):
        assert subprocess.run(["bash", script, *arguments], capture_output=True).returncode == code
