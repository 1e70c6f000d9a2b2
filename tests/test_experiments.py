"""The experiments: every run of the paper is a config that lowers, and every table comes out at a reduced size."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equal_passes
import fewer_passes
import lab as labs
import many_alpha_0
import paper
import picture
import samples
import step_shares
from conftest import random_params
from eso_jax import Config, DataConfig, ModelConfig, TrainConfig, cli, config as configs, load
from eso_jax.data import ByteTokenizer, evenly_spaced, windows_of
from eso_jax.decoding import decoders
from eso_jax.engine import perplexity
from eso_jax.evaluation import throughput
from eso_jax.model.params import init_params
from eso_jax.run import workdir
from eso_jax.run.train import init_state, train_step
from lab import AS_ABOVE, RUNS, Lab

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "experiments" / "tables").glob("*.py"))


@pytest.mark.parametrize("name", RUNS)
def test_every_run_loads_and_says_how(name: str) -> None:
    run = RUNS[name]
    config = configs.from_file(f"{ROOT}/experiments/paper.py:{name}")
    assert config == run.config
    assert config.model.width == 768 and config.train.batch_size == 512
    params = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(params))
    if config.model.cond_dim:  # the authors' counts
        assert round(count / 1e6, 1) == {30522: 139.3, 50258: 169.6}[config.model.vocab_size]
    if config.train.start_from:
        source = Path(config.train.start_from).relative_to("runs/paper").as_posix()
        assert RUNS[source].config.family == config.family
    has = {2: run.estimators, 3: run.redraws, 4: run.config.train.steps == 500_000, 5: run.zero_shot, 12: run.long,
           16: run.summaries}
    assert {table for table, numbers in has.items() if numbers} == set(run.tables) & set(has)
    assert bool(run.orders) == any(table in run.tables for table in (6, 7, 8))
    assert bool(run.samples) == any(table in run.tables for table in (13, 14, 15)) or name == "owt/ar"  # Figure 4
    assert run.nelbo or run.exact or run.long or run.summaries or run.diverged or "inputs shifted" in run.note


def test_the_list_of_runs() -> None:
    """What it takes to do a run, and the paper's numbers of each."""
    done = subprocess.run([sys.executable, "experiments/paper.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert list(RUNS) == [name for name in lines if "/" in name]
    for words in ("esolm  ", "alpha_0=0.25 ", " 250K ", " 1, 5, 8, 10, 13 ", "NELBO 24.71", "K = 1000: 23.15",
                  "37 hours"):
        assert words in lines["owt/esolm_025"]
    assert " 16 " in lines["xsum/mdlm"] and "BERTScore 0.21" in lines["xsum/mdlm"]
    assert "alpha_0=0.5, kappa=0.25" in lines["lm1b/kappa_025_esolm_a_05"] and "diverged" in lines[
        "lm1b/kappa_025_esolm_a_05"]
    for command in ("data prepare lm1b --data-dir data --tokenizer bert-base-uncased --length 128\n",
                    "data prepare openwebtext --data-dir data --tokenizer gpt2 --length 1024\n",
                    "--length 10240 --out data/10240/openwebtext\n",
                    "data prepare xsum --data-dir data --tokenizer gpt2 --length 1024\n",
                    "eso-jax train experiments/paper.py:RUN --workdir runs/paper/RUN\n"):
        assert command in done.stdout
    doc = paper.__doc__ or ""
    assert all(f"\n{what}:" in doc for what in ("Data", "Hardware", "Ours"))


def floats(value: Any) -> Iterator[float]:
    """All floats in nested tuples, and in the values of dicts."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from floats(part)


def test_the_papers_numbers_stand_once() -> None:
    """A run's perplexities are typed once in its row; no script of experiments/ has one of the numbers again, be it in
    a comment."""
    number = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.])")
    typed: set[float] = set()
    for name, run in RUNS.items():
        perplexities = [value for value in (run.nelbo, run.likelihood, *run.orders.values()) if value is not None]
        assert len(set(perplexities)) == len(perplexities), name
        typed |= set(floats(run[1:]))
    constants = (paper.SETTINGS, paper.SEDD_ZERO_SHOT, paper.LATENCY, paper.FLAN_T5)
    typed |= set(floats(constants))
    assert len(typed) > 350
    source = (ROOT / "experiments" / "paper.py").read_text()
    counts = collections.Counter(float(found) for found in number.findall(source))
    table = collections.Counter(value for run in RUNS.values() for value in floats(run[1:])
                                if value not in set(floats(paper.SETTINGS)))
    assert {value: count for value, count in counts.items() if count > table[value] > 0} == {}
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        again = {found for found in number.findall(path.read_text()) if float(found) in typed}
        assert path.name == "paper.py" or not again, (path.name, again)


def test_there_is_a_run_for_every_row_of_the_paper() -> None:
    families = {name: dataclasses.asdict(run.config.family) for name, run in RUNS.items()}
    by_corpus = {corpus: [f for name, f in families.items() if name.startswith(f"{corpus}/")]
                 for corpus in ("lm1b", "owt", "xsum")}
    assert len(RUNS) == 52 == sum(map(len, by_corpus.values()))
    assert {f["name"] for f in by_corpus.pop("xsum")} == {"mdlm", "esolm"}
    alphas = {corpus: sorted({f["alpha_0"] for f in found if f["name"] == "esolm"})
              for corpus, found in by_corpus.items()}
    assert alphas == {"lm1b": [0, 0.0625, 0.125, 0.25, 0.5, 1], "owt": [0, 0.125, 0.25, 0.5, 1]}
    kappas = {(f["alpha_0"], f["kappa"]) for f in by_corpus["lm1b"]
              if f["name"] == "esolm_a" and f["kappa"] is not None}
    assert len(kappas) == 16
    for found in by_corpus.values():
        assert {f["block_size"] for f in found if f["name"] == "bd3lm"} == {4, 8, 16}


def distinct() -> dict[str, Config]:
    """A run for every way in which the program differs (not only its numbers)."""
    found = {}
    for name, run in RUNS.items():
        config = run.config
        family = config.family
        kind = (family.name, config.model.length, config.model.cond_dim,
                getattr(family, "split", 1), getattr(family, "block_size", 16))
        found[kind] = name
    return {name: RUNS[name].config for name in found.values()}


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
                            "WINDOWS": {"smoke": 8}, "METHODS": ["AR + AdaLN", "MDLM", "Eso-LM, alpha_0 = 1",
                                                                 "Eso-LM, alpha_0 = 0"]},
    "table_02_estimators": {"TRIALS": 6, "DRAWS": 2},
    "table_03_num_tries": {"SAMPLERS": ["MDLM"]},
    "table_04_kappa": {"ALPHAS": ("0.5",), "KAPPAS": ("0.75",)},
    "table_05_zero_shot": {"MODELS": ["MDLM", "Eso-LM, alpha_0 = 1"], "MOST": 8},
    "tables_06_to_08_orders": {"COUNTS": {"smoke": {"lm1b": (1, 3), "owt": (1, 3)}}, "WINDOWS": {"smoke": 8},
                               "MDLM_COUNTS": {"smoke": (1, 3)},
                               "CORPORA": {"lm1b": ("mdlm", "esolm_1", "esolm_05"), "owt": ("esolm_1", "esolm_05")}},
    "tables_09_10_a_and_b": {"ALPHAS": ("1", "0.5")},
    "table_11_latency": {"LENGTHS": {"smoke": (8, 16), "paper": (2048, 8192)}},
    "table_12_long": {"COUNT": 4, "MODELS": ["Eso-LM, alpha_0 = 0.125"]},
    "table_16_summaries": {"MODELS": ["MDLM"], "SUMMARY": {"smoke": 8}, "COUNT": {"smoke": 6}},
    "tables_13_to_15_quality": {"TRAINED": ["1"], "ESO_LM": [(0.25, 128), (1.0, 1024)], "MDLM": [1024],
                                "BD3LM": [4]},
    "figure_16_training_speed": {"MODELS": ["MDLM", "Eso-LM, alpha_0 = 1"], "STEPS": 2},
    "figures_18_19_alpha_0": {"TRAINED": ["1"], "ESO_LM": [(0.25, 128), (1.0, 1024)]},
    "figures_20_21_block_sampler": {"PARALLELISM": (64, 1), "PLANS": ["binomial", "block, shuffled for each row"]},
    "figures_24_to_26_samples": {"SETTINGS": ["MDLM, T = 1024"]}}


NOT_TRAINED = {"table_11_latency", "figure_16_training_speed"}  # of random weights, or of random tokens
TWO_CORPORA = {"table_01_perplexity": "Eso-LM, alpha_0 = 1", "tables_06_to_08_orders": "alpha_0 = 1, ours",
               "tables_09_10_a_and_b": "1"}  # and the row of the run that differs, by its loss_weight


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
        patch.setattr(labs, "smoke", tiny)
        patch.setitem(labs.CORPORA, str(folder / "text.py"), "a function, again and again")
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
    lab = Lab("smoke", lab.runs, lab.results)  # as in a process of its own
    module.run(lab)
    report = json.loads((lab.results / f"{name}.json").read_text())
    text = (lab.results / f"{name}.md").read_text()
    assert report["title"] in text and report["measured"] and report["measured"][0] in text
    assert f"{name}.py --scale smoke" in text
    corpus = labs.PAIRS if name == "table_16_summaries" else "a function, again and again"
    assert report["trained_on"] == ([] if name in NOT_TRAINED else [corpus])
    assert (f"Our runs are trained on {corpus}." in text) == (name not in NOT_TRAINED)
    if name in TWO_CORPORA:
        lm1b, owt = report["tables"]
        assert lm1b.replace("LM1B", "OpenWebText").replace("Table 9", "Table 10") == owt
        assert all("(paper), a function, again and again (ours)" in title for title in (lm1b, owt))
        ours = {title: {row[0] for row in report["tables"][title]["rows"] if any(isinstance(x, dict) for x in row)}
                for title in (lm1b, owt)}
        assert ours[owt] == {TWO_CORPORA[name]} < ours[lm1b]  # the one recipe that differs; no other run stands twice
        assert AS_ABOVE not in json.dumps(report["tables"][lm1b]) and AS_ABOVE in text
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


def test_the_picture_of_fewer_passes_names_each_line_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways, and the held-out text, in one legend for all panels that have them."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    monkeypatch.setattr(fewer_passes, "picture", lambda *_: contextlib.nullcontext(figure))
    path = Path(fewer_passes.__file__).parent / "figures" / "fewer_passes.json"
    fewer_passes.draw(path, json.loads(path.read_text()))
    [legend], own = figure.legends, [axes.get_legend() for axes in figure.axes]
    assert {text.get_text() for text in legend.get_texts()} == {*fewer_passes.NUMBERS, "held-out text"}
    said = [text.get_text() for each in own if each for text in each.get_texts()]
    assert fewer_passes.OWN in said and "speculative:4" in said and not {"entropy", "held-out text"} & set(said)


def test_the_picture_of_a_plan_names_the_file_as_it_was_given(monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    """It is no option."""
    monkeypatch.setattr(sys, "argv", ["picture.py", "nope.npz"])
    assert cli.exit_code_of(picture.main) == 2
    assert "error: NPZ = 'nope.npz': no such file" in capsys.readouterr().err


def test_ways_to_take_fewer_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                   ) -> None:
    """Every decoder of a model that is trained for no time, as the one for a GPU is but smaller; then of the same model
    for no time; and the entropy budget against plans of as many passes."""
    text, workdir, out = tmp_path / "text.py", tmp_path / "w", tmp_path / "passes.json"
    text.write_text(TEXT)
    monkeypatch.setattr(fewer_passes, "NUMBERS", {name: (2 if name != "confidence" else 0.5,)
                                                  for name in fewer_passes.NUMBERS})
    monkeypatch.setattr(fewer_passes, "ALONE", ("entropy",))

    def script(*arguments: object) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["fewer_passes.py", "--workdir", str(workdir), "--out", str(out), "--samples",
                                         "3", *map(str, arguments)])
        fewer_passes.main()
        return json.loads(out.read_text())

    shapes = jax.eval_shape(lambda: init_params(fewer_passes.SIZES["20m"].model, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) > 20e6
    found = script("--size", "20m", "--train-seconds", 10, f"data.source={text}", "model.length=16", "model.width=16",
                   "model.layers=1", "model.heads=1", "train.eval_windows=8", "train.compute_dtype=float32")
    assert 0 < found["steps"] < fewer_passes.SIZES["20m"].train.steps
    rows = {(row["decoder"], row["batch"]): row for row in found["rows"]}
    names = ("one by one", "fixed plan", fewer_passes.OWN, *decoders.names())
    assert set(rows) == {*((name, fewer_passes.WIDE) for name in names), ("entropy", 1)}
    for (name, _), row in rows.items():
        assert sum(width * count for width, count in enumerate(row["widths"])) == 3 * 16, name
        assert all(np.isfinite(row[value]["value"]) for value in ("own", "lost", "entropy")), name
        if name in ("one by one", "speculative", fewer_passes.OWN):
            assert row["lost"]["value"] == pytest.approx(0, abs=1e-5)
    assert rows["likeliest", fewer_passes.WIDE]["passes"]["value"] == 8
    assert out.with_suffix(".png").stat().st_size > 5000

    before = found["steps"]
    found = script("--seconds", 0)
    assert found["steps"] == before and found["rows"] == []

    monkeypatch.setattr(equal_passes, "BUDGETS", (20,))
    monkeypatch.setattr("sys.argv", ["equal_passes.py", str(workdir), "--samples", "3", "--out", str(out)])
    equal_passes.main()
    [row] = json.loads(out.read_text())["models"]["w"]
    assert set(row["plans"]) == {"even", "binomial", "mean"} and out.with_suffix(".png").stat().st_size > 5000
    for plan in row["plans"].values():
        assert abs(plan["passes"] - row["passes"]) < 1.5
        assert plan["more"]["value"] == pytest.approx(plan["lost"]["value"] - row["lost"]["value"])


def test_many_alpha_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits per byte of a model at each alpha_0, whatever it was trained at; the mean of seeds, as table and picture."""
    (tmp_path / "text.py").write_text(TEXT)
    run = many_alpha_0.run_of(many_alpha_0.MANY, 3, [
        f"data.source={tmp_path}/text.py", "model.length=16", "model.width=16", "model.layers=1"])
    assert run.family.alpha_0_range == (0.0625, 1) and run.family.alpha_0 == 1 and run.train.seed == 3
    assert many_alpha_0.run_of("0.25", 1, []).family == configs.FamilyConfig(name="esolm", alpha_0=0.25)
    params = random_params(run.model)
    monkeypatch.setattr(many_alpha_0, "train", lambda run, folder: workdir.create(folder, run, params))
    monkeypatch.setattr(many_alpha_0, "ALPHAS", (0.5, 1.0))
    monkeypatch.setattr(many_alpha_0, "WINDOWS", 8)
    found = many_alpha_0.bits(run, tmp_path / "w")
    assert list(found) == ["0.5", "1"] and len(found["1"]) == 8
    model = load(tmp_path / "w")
    tokens = evenly_spaced(windows_of(run, "validation"), 8)[:]
    bound = perplexity.nelbo(model, tokens, ByteTokenizer(), 0.5, jax.random.key(0), many_alpha_0.DRAWS)
    assert np.mean(found["0.5"]) == pytest.approx(bound.bits_per_byte)

    monkeypatch.setattr(many_alpha_0, "bits", lambda run, folder: {
        alpha_0: [run.train.seed + float(alpha_0) + place for place in (0, 1)] for alpha_0 in ("0.5", "1")})
    monkeypatch.setattr("sys.argv", ["many_alpha_0.py", "--out", str(tmp_path / "many.json")])
    many_alpha_0.main()
    rows = json.loads((tmp_path / "many.json").read_text())["trained_at"]
    assert list(rows) == [many_alpha_0.MANY, "0.5", "1"]
    assert rows["1"]["0.5"] == {"bits_per_byte": 2.5, "seeds": [2.0, 3.0], "standard_error": 0.5}
    assert "| 1 | 2.500 ± 0.500 | 3.000 ± 0.500 |" in (tmp_path / "many.md").read_text()
    assert (tmp_path / "many.png").stat().st_size > 5000


def test_the_parts_of_a_step(tmp_path: Path) -> None:
    """By the scopes of a program, and by a profile of it."""
    def loss(x: jax.Array) -> jax.Array:
        with jax.named_scope("attention"):
            x = x @ x
        with jax.named_scope("loss"):
            return jnp.sum(jnp.sin(x @ x.T))

    def step(x: jax.Array) -> jax.Array:
        return jnp.sort(x + jax.grad(loss)(x), axis=0)

    program = jax.jit(step).lower(x := jnp.ones((200, 200))).compile()
    parts = step_shares.parts_of(program.as_text() or "")
    assert set(parts.values()) == {"attention", "head and loss", "optimizer and draws"}
    assert step_shares.part_of("jit(train_step)/transpose(jvp(block))/dot_general") == "layers"
    with jax.profiler.trace(str(tmp_path)):
        program(x).block_until_ready()
    seconds = step_shares.seconds_of(tmp_path, parts)
    assert seconds["attention"] > 0 and set(seconds) == set(parts.values())


STAND_IN = """#!/usr/bin/env bash
[ "$1" != -c ] || { echo "cuda A card"; exit; }
echo "$JAX_PLATFORMS python $*" >>"$CALLS"
case "$*" in *MDLM*) exit 1 ;; *table13*) sleep "$HANGS" ;; esac
while [ $# -gt 0 ] && [ "$1" != --wait-for ]; do shift; done
[ $# -gt 0 ] || exit 0
until [ -e "$2" ]; do sleep 0.01; done
echo "turn ${2##*/}" >>"$CALLS"
"""


def test_the_first_run_on_an_accelerator(tmp_path: Path) -> None:
    """Every step runs, also behind one that fails, or those named; on the accelerator, where tests are for CPUs
    otherwise. What is timed waits for its turn."""
    script, python, out = ROOT / "experiments" / "accelerator.sh", tmp_path / "python", tmp_path / "out"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "JAX_PLATFORMS": "",
                   "HANGS": "0"}
    command = ["bash", script, out, "--small"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "accelerator.sh: cuda A card" in done.stdout
    timed = ["training-ar", "training-mdlm", "training-esolm", "ratio", "passes", "shares", "torch", "batch-2",
             "table13", "sampling"]
    failed = {"ratio", "table13"}  # those with MDLM
    assert re.findall(r"^(\S+): (\S+)", done.stdout, re.M)[1:] == [
        (name, "FAILED" if name in failed else "done,")
        for name in ("goldens", "kernels", "check-cache", "curves", *timed)]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if call.startswith("turn")] == [f"turn {name}" for name in timed
                                                                   if name not in failed]
    for call in ("cuda python -m pytest -n 0 -m not slow tests/test_goldens.py",
                 f" python -m eso_jax check-cache --workdir {out}/cached --dtype bfloat16"):
        assert call in calls
    assert [f"--out {out}/training-esolm.json" in call for call in calls if "--families esolm" in call] == [True]
    with tarfile.open(f"{out}.tar.gz") as packed:
        assert {f"out/{name}.log" for name in timed} < set(packed.getnames())
    done = subprocess.run([*command, "passes", "training"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert re.findall(r"^(\S+): done", done.stdout, re.M) == [*timed[:3], "passes"]
    for arguments, code in (([], 2), (["--help"], 0), ([out, "--small", "gold"], 2)):
        assert subprocess.run(["bash", script, *arguments], capture_output=True).returncode == code


NOTES = """#!/usr/bin/env bash
[ "$1" != -c ] || { echo "cuda A card"; exit; }
echo "${*@Q}" >>"$CALLS"
"""


class Parsed(Exception):
    """Stops a script once it has read its options."""


@pytest.mark.parametrize("size", [[], ["--small"]], ids=["full", "small"])
def test_every_command_on_an_accelerator_is_understood(size: list[str], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parsers that will read it; nothing is run."""
    script, python, calls = ROOT / "experiments" / "accelerator.sh", tmp_path / "python", tmp_path / "calls"
    python.write_text(NOTES)
    python.chmod(0o755)
    steps = re.findall(r"^steps=\((.+)\)$", script.read_text(), re.M)[0].split()
    subprocess.run(["bash", script, tmp_path / "out", *size, *steps, "quickstart"], check=True,
                   env={**os.environ, "PYTHON": str(python), "CALLS": str(calls)})

    def stop(parser: argparse.ArgumentParser, argv: Any = None, namespace: Any = None) -> None:
        raise Parsed(parser.parse_known_intermixed_args(argv, namespace))

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    for module in cli.COMMANDS.values():
        monkeypatch.setattr(module, "run", lambda arguments: Config().override("model.heads=2", *arguments.overrides))
    programs = set()
    for program, *arguments in map(shlex.split, calls.read_text().splitlines()):
        if [program, *arguments[:1]] == ["-m", "eso_jax"]:
            assert cli.main(arguments[1:]) == 0
            program = arguments[1]
        elif program == "-m":
            program = arguments[0]
            for path, _, name in (each.partition("::") for each in arguments if each.startswith("tests/")):
                assert f"def {name}" in (ROOT / path).read_text()
        elif program != "experiments/torch_step.py" or importlib.util.find_spec("torch"):
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            with pytest.raises(Parsed) as found:
                runpy.run_path(str(ROOT / program), run_name="__main__")
            known, unknown = found.value.args[0]
            assert not unknown
            Config().override("model.heads=2", *getattr(known, "overrides", []))
        programs.add(program)
    assert programs == {"bench", "check-cache", "train", "pytest", *(f"experiments/{name}.py" for name in (
        "fewer_passes", "quickstart", "step_shares", "torch_step"))}


def test_what_an_accelerator_gave_is_packed_when_it_is_taken_away(tmp_path: Path) -> None:
    script, python, out = ROOT / "experiments" / "accelerator.sh", tmp_path / "python", tmp_path / "out"
    python.write_text(STAND_IN.replace("*MDLM*) exit 1 ;; ", ""))
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "HANGS": "60"}
    with subprocess.Popen(["bash", script, out, "--small", "passes", "table13"], stdout=subprocess.PIPE, text=True,
                          env=environment) as running:
        assert running.stdout is not None
        assert any(line.startswith("passes: done") for line in running.stdout)
        running.terminate()
        running.communicate(timeout=60)
    assert running.returncode == 143
    with tarfile.open(f"{out}.tar.gz") as packed:
        assert {"out/passes.log", "out/table13.log"} < set(packed.getnames())
