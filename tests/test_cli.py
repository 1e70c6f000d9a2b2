"""The command line: each command on a real work directory, and each mistake as one line with exit code 2."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import eso_jax
from conftest import BASE, GOLDENS, Run, emulated, random_params, renamed, tiny_config
from eso_jax import config as configs
from eso_jax import families, likelihood
from eso_jax.cli import COMMANDS, main
from eso_jax.decoding import check
from eso_jax.decoding.plan import Plan
from eso_jax.decoding.rejection import unigram_entropy
from eso_jax.engine.rows import Engine
from eso_jax.evaluation import throughput
from eso_jax.run import workdir


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "w"
    assert main(["import", str(GOLDENS / "eso_tiny.safetensors"), "--config", str(GOLDENS / "config.json"),
                 "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command: list[str], run: Run) -> None:
    text = run(*command, "--help")
    assert "eso-jax" in text and (not command or "example: eso-jax" in text)


@pytest.mark.parametrize("words, hint", [
    (["sampel"], "); did you mean sample?"), (["data", "prepar"], "did you mean prepare?"),
    (["sample", "--dtype", "float23"], "did you mean float32?"), (["xyzzy"], ") (see eso-jax --help)")])
def test_a_mistyped_choice_gets_the_nearest_one(words: list[str], hint: str, run: Run) -> None:
    text = run(*words, code=2)
    assert f"'{words[-1]}'" in text and hint in text


def test_the_two_names_of_the_command_are_one() -> None:
    script = Path(sys.executable).parent / "eso-jax"
    assert script.exists(), "install the project: pip install -e .[test]"
    outputs = [subprocess.run([*name, "--help"], capture_output=True, text=True, check=True).stdout
               for name in ([script], [sys.executable, "-m", "eso_jax"])]
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_train_then_eval(tmp_path: Path, run: Run, trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    (tmp_path / "experiment.py").write_text(
        f"from eso_jax import *\nconfig = Config().override('data.source={config['data']['source']}')\n")
    settings = [f"{section}.{name}={value}" for section in ("model", "family", "train")
                for name, value in config[section].items() if not isinstance(value, list)]
    run("train", tmp_path / "experiment.py", "--workdir", tmp_path / "w", *settings, "train.steps=1")
    assert eso_jax.load(tmp_path / "w").step == 1
    text = run("eval", "--workdir", tmp_path / "w", "--num-windows", 8, "--alpha-0", 0.25, "--out", tmp_path / "e.json")
    values = json.loads((tmp_path / "e.json").read_text())
    assert values["windows"] == 8 and values["alpha_0"] == 0.25 and set(values["terms"]) == {"diffusion", "sequential"}
    assert f"{values['bits_per_byte']:.4f} bits per byte" in text
    bits = values["nats_per_token"] / np.log(2)
    assert values["bits_per_byte"] == pytest.approx(bits, rel=0.01)  # all tokens but a separator are bytes
    assert values["perplexity"] == pytest.approx(np.exp(values["nats_per_token"]))


@pytest.mark.slow
def test_eval_of_another_text(tmp_path: Path, run: Run, trained: Path) -> None:
    (tmp_path / "other.txt").write_text("quite another text, " * 100)
    out = tmp_path / "e.json"
    run("eval", "--workdir", trained, "--source", tmp_path / "other.txt", "--split", "test", "--out", out)
    assert json.loads(out.read_text())["windows"] == 2000 // 20 // 16
    said = run("eval", "--workdir", trained, "--source", tmp_path / "other.txt", "--out", out)
    assert json.loads(out.read_text())["windows"] == 2001 // 16  # all of it
    assert f"windows of 16 tokens (all of {tmp_path / 'other.txt'})" in said
    run("eval", "--workdir", trained, "--num-windows", 1, "--out", out)
    assert "NaN" not in out.read_text() and json.loads(out.read_text())["standard_error"] is None  # of one window
    assert json.loads(out.read_text())["source"] == configs.from_file(trained / "config.json").data.source
    (tmp_path / "short.txt").write_text("short")
    assert f"--source = '{tmp_path / 'short.txt'}': holds 6 tokens" in run(
        "eval", "--workdir", trained, "--source", tmp_path / "short.txt", "--out", out, code=2)


def test_commands_say_who_computes_attention_instead(tmp_path: Path, run: Run, trained: Path) -> None:
    """Where the wanted backend cannot; once."""
    np.savez(tmp_path / "x.npz", tokens=np.zeros((2, BASE.model.length), int), mask=BASE.model.mask)
    says = "attention = 'splash': without a cache, plain (splash: for TPUs) computes it"
    for command in (["eval", "--workdir", trained, "--num-windows", 2],
                    ["score", "--workdir", trained, "--tokens", tmp_path / "x.npz"],
                    ["sample", "--workdir", trained, "--num-samples", 1, "--steps", 1]):
        text = run(*command, "--dtype", "bfloat16", "--attention", "splash", "--out", tmp_path / f"{command[0]}.npz")
        assert text.count(says) == 1
    for wanted in ("plain", "auto"):
        assert "computes it" not in run(*command, "--attention", wanted, "--out", tmp_path / "s.npz")


@pytest.mark.slow
def test_sample_writes_the_contract(tmp_path: Path, run: Run, trained: Path) -> None:
    out = tmp_path / "samples.npz"
    text = run("sample", "--workdir", trained, "--num-samples", 5, "--steps", 4, "--alpha-0", 0.5, "--top-p", 0.9,
               "--seed", 3, "--out", out, "--batch-size", 2)
    found = np.load(out)
    length = BASE.model.length
    assert found["tokens"].shape == found["order"].shape == (5, length)
    assert found["tokens"].max() < 257 and found["tokens_per_step"].sum() == length
    assert (np.sort(found["order"], axis=1) == np.arange(length)).all()
    assert found["text"].shape == (5,)
    run("score", "--workdir", trained, "--tokens", out, "--num-orders", 2, "--out", tmp_path / "scores.npz")
    assert np.load(tmp_path / "scores.npz")["logp_per_order"].shape == (2, 5)
    assert f"NFE {len(found['tokens_per_step'])} per batch; {5 * length} tokens" in text
    assert "s of it compilation" in text
    run("sample", "--workdir", trained, "--num-samples", 5, "--steps", 4, "--alpha-0", 0.5, "--top-p", 0.9,
        "--seed", 3, "--out", tmp_path / "again.npz")
    np.testing.assert_array_equal(found["tokens"], np.load(tmp_path / "again.npz")["tokens"])
    run("sample", "--workdir", trained, "--num-samples", 5, "--steps", 4, "--alpha-0", 0.5, "--top-p", 0.9,
        "--seed", 3, "--out", tmp_path / "text.jsonl")
    lines = (tmp_path / "text.jsonl").read_text("utf-8").split("\n")[:-1]
    assert [json.loads(line)["text"] for line in lines] == found["text"].tolist()


@pytest.mark.slow
def test_a_recorded_sample_and_its_page(tmp_path: Path, run: Run, trained: Path) -> None:
    out, sample = tmp_path / "s.npz", ["sample", "--workdir", trained, "--num-samples", 2, "--steps", 4]
    run(*sample, "--record", "--html", tmp_path / "s.html", "--out", out)
    found = np.load(out)
    assert found["step"].shape == found["logp"].shape == (2, BASE.model.length) == found["alternatives"].shape[:2]
    assert found["step"].max() == len(found["tokens_per_step"]) - 1 and (found["entropy"] > 0).all()
    run("view", out, "--out", tmp_path / "again.html")
    made, again = ((tmp_path / name).read_text("utf-8") for name in ("s.html", "again.html"))
    assert made == again
    run(*sample, "--record", "--out", tmp_path / "s.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text("utf-8").splitlines()]
    np.testing.assert_allclose([line["logp"] for line in lines], found["logp"].sum(1), rtol=1e-5)
    assert [line["decoded"] for line in lines] == [BASE.model.length] * 2


@pytest.mark.slow
def test_a_plan_is_kept_replayed_and_scored(tmp_path: Path, run: Run, trained: Path) -> None:
    common = ["--workdir", trained, "--num-samples", 3, "--seed", 5]
    run("sample", *common, "--plan", "balanced", "--steps", 3, "--alpha-0", 0.5, "--min-p", 0.01,
        "--out", tmp_path / "a.npz")
    first = np.load(tmp_path / "a.npz")
    assert first["diffusion"] == 8 and first["tokens_per_step"].tolist() == [2, 3, 3] + [1] * 8
    run("sample", *common, "--plan", tmp_path / "a.npz", "--min-p", 0.01, "--out", tmp_path / "b.npz")
    for name in ("tokens", "order", "tokens_per_step", "diffusion"):
        np.testing.assert_array_equal(first[name], np.load(tmp_path / "b.npz")[name])
    run("score", "--workdir", trained, "--tokens", tmp_path / "a.npz", "--plan", tmp_path / "a.npz",
        "--out", tmp_path / "s.npz")
    scores = np.load(tmp_path / "s.npz")
    assert scores["logp_in_order"].shape == (3, 16) and (scores["logp_in_order"] < 0).all()
    np.testing.assert_allclose(scores["logp"], scores["logp_in_order"].sum(1), rtol=1e-6)
    np.savez(tmp_path / "bare.npz", order=first["order"], tokens_per_step=first["tokens_per_step"])
    run("sample", *common, "--plan", tmp_path / "bare.npz", "--min-p", 0.01, "--out", tmp_path / "c.npz")
    np.testing.assert_array_equal(first["tokens"], np.load(tmp_path / "c.npz")["tokens"])


@pytest.mark.slow
def test_the_widths_that_a_decoder_found_are_scored(tmp_path: Path, run: Run, trained: Path) -> None:
    said = run("sample", "--workdir", trained, "--num-samples", 2, "--decoder", "entropy:2", "--record", "--out",
               tmp_path / "a.npz")
    assert "tokens a pass" in said
    bits = unigram_entropy(np.load(tmp_path / "a.npz")["tokens"]).mean() / np.log(2)
    assert f"entropy of unigrams {bits:.2f} bits (if --decoder entropy:0 gives many more" in said
    run("score", "--workdir", trained, "--tokens", tmp_path / "a.npz", "--plan", tmp_path / "a.npz", "--out",
        tmp_path / "scores.npz")
    drawn = np.load(tmp_path / "a.npz")["logp"].sum(1)
    np.testing.assert_allclose(np.load(tmp_path / "scores.npz")["logp"], drawn, atol=1e-3)
    run("sample", "--workdir", trained, "--decoder", "likeliest:2", "--out", tmp_path / "b.npz")
    assert "samples have no plan's law" in run("score", "--workdir", trained, "--tokens", tmp_path / "b.npz", "--plan",
                                               tmp_path / "b.npz", "--out", tmp_path / "scores.npz", code=2)


@pytest.mark.slow
def test_a_plan_behind_given_tokens_is_replayed_and_scored(tmp_path: Path, run: Run, trained: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are given two and five tokens, of a plan in the .npz that `sample` writes, which is read once."""
    names, load = list[str](), np.load

    def noted(file: Any) -> Any:
        names.append(Path(getattr(file, "name", file)).name)
        return load(file)

    tokens = np.random.default_rng(0).integers(0, 250, (2, 16))
    order = np.argsort(np.random.default_rng(1).random((2, 16)), axis=1)
    known, counts = np.array([2, 5]), np.array([[3, 11, 0], [4, 4, 3]])
    np.savez(tmp_path / "plan.npz", order=order, tokens_per_step=counts, given=known, tokens=tokens)
    sample = ["sample", "--workdir", trained, "--plan", tmp_path / "plan.npz", "--out", tmp_path / "a.npz"]
    assert "--num-samples = 1: the plan is that of 2 samples" in run(*sample, code=2)
    assert "NFE 3 per batch" in run(*sample, "--num-samples", 2)
    found = np.load(tmp_path / "a.npz")
    assert found["given"].tolist() == [2, 5] and found["diffusion"].tolist() == [14, 11]
    np.testing.assert_array_equal(found["tokens_per_step"], counts)
    first = np.arange(16) < known[:, None]
    ours, theirs = (np.take_along_axis(x, order, axis=1) for x in (found["tokens"], tokens))
    assert (ours[first] == theirs[first]).all() and (ours[~first] != theirs[~first]).any()
    monkeypatch.setattr(np, "load", noted)
    run("sample", "--workdir", trained, "--plan", tmp_path / "a.npz", "--num-samples", 2, "--out", tmp_path / "b.npz")
    run("score", "--workdir", trained, "--tokens", tmp_path / "b.npz", "--plan", tmp_path / "a.npz",
        "--out", tmp_path / "s.npz")
    monkeypatch.undo()
    assert names == ["a.npz", "b.npz", "a.npz"]
    np.testing.assert_array_equal(found["tokens"], np.load(tmp_path / "b.npz")["tokens"])
    scores = np.load(tmp_path / "s.npz")["logp_in_order"]
    assert (scores[first] == 0).all() and (scores[~first] < 0).all()
    np.savez(tmp_path / "bare.npz", order=order, tokens_per_step=counts, given=known)
    assert "must hold tokens, some of which are given, int (2, 16)" in run(
        *sample[:4], tmp_path / "bare.npz", *sample[5:], "--num-samples", 2, code=2)


@pytest.mark.slow
def test_low_entropy_is_drawn_again_only_when_asked_and_counted(tmp_path: Path, run: Run, trained: Path) -> None:
    sample = ["sample", "--workdir", trained, "--num-samples", 6, "--out", tmp_path / "s.npz"]
    run(*sample)
    first = np.load(tmp_path / "s.npz")
    assert first["tries"].tolist() == [1] * 6
    entropy = np.sort(unigram_entropy(first["tokens"]))
    between = (entropy[2] + entropy[3]) / 2
    text = run(*sample, "--num-tries", 2, "--min-entropy", between)
    again = np.load(tmp_path / "s.npz")
    redrawn = unigram_entropy(first["tokens"]) < between
    np.testing.assert_array_equal(again["tries"], 1 + redrawn)
    np.testing.assert_array_equal((again["tokens"] != first["tokens"]).any(axis=1), redrawn)
    assert f"{redrawn.sum()} of 6 samples drawn again, {6 + redrawn.sum()} draws in all" in text


def test_unigram_entropy() -> None:
    rows = np.array([[1] * 8, [1, 2] * 4, [1, 1, 1, 1, 2, 3, 4, 5]])
    np.testing.assert_allclose(unigram_entropy(rows), [0, np.log(2), 2 * np.log(2)], atol=1e-12)
    np.testing.assert_allclose(unigram_entropy(rows, last=4), [0, np.log(2), np.log(4)], atol=1e-12)


@pytest.mark.slow
def test_check_cache(tmp_path: Path, run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch,
                     capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check-cache", "--workdir", trained, "--batch-size", 2]
    text = run(*command)
    assert text.count("cached against uncached") == 3 and "the cache is exact" in text and "TOO MUCH" not in text
    assert "balanced plan, 10 passes" in text  # 8 tokens in two steps
    assert text.count("the same tokens drawn") == 3 and "behind tokens that are given" in text
    assert "bfloat16 against float32" in run(*command, "--dtype", "bfloat16")
    assert "--batch-size = 1" in run(*command[:3], "--batch-size", 1, code=2)
    for family, file, code in (("bd3lm", "bd3lm", 0), ("mdlm", "eso", 2)):
        run("import", GOLDENS / f"{file}_tiny.safetensors", "--config", GOLDENS / "config.json", "--family", family,
            "--out", tmp_path / family)
        text = run("check-cache", "--workdir", tmp_path / family, "--batch-size", 2, code=code)
        assert ("the cache is exact" if code == 0 else "has no cache") in text
    with monkeypatch.context() as eight:  # devices, which fill up every batch to eight rows
        eight.setattr(Engine, "size", lambda self, rows, batch_size=None: 8)
        text = run(*command)
    assert "batch of" not in text and "give a --batch-size of 9 or more" in text and "do not depend" not in text
    monkeypatch.setattr(check, "cache_error", lambda *arguments: check.Difference(1e-2, 5.0))
    capsys.readouterr()
    assert main([str(argument) for argument in command]) == 2
    text = capsys.readouterr().err
    assert text.count("TOO MUCH") == 3 and "3 of the differences are more than rounding" in text


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_bench_at_a_reduced_size(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every preset, on a model and plans that take seconds."""
    monkeypatch.setattr(throughput, "SECTIONS", 1)
    monkeypatch.setattr(throughput, "measure_machine", lambda dtype: throughput.Machine(1e10, 1e11))
    for preset, few in (("cpu", throughput.ONE_BY_ONE[1:2]),
                        ("table11", throughput.ONE_BY_ONE[1::3]), ("table13", throughput.TABLE_13[3::6])):
        monkeypatch.setitem(throughput.PRESETS, preset, throughput.PRESETS[preset]._replace(cases=few))
    small = ["model.width=8", "model.heads=2", "model.layers=1", "model.vocab_size=20"]
    for preset in ("laptop", "cpu", "table11", "table13"):
        out = tmp_path / f"{preset}.json"
        with renamed("x_" if preset == "table11" else ""):  # the names of families are nobody's business
            text = run("bench", "sampling", "--preset", preset, "--lengths", 32, "--batches", 2, "--repeats", 1,
                       "--out", out, *small)
        found = json.loads(out.read_text())
        assert len(found["results"]) == len(throughput.PRESETS[preset].cases)
        for row in found["results"]:
            assert row["seconds"] > 0 and row["of_the_floor"] > 0 and row["seconds_without_draws"] > 0
            assert row["tokens_per_s"] == pytest.approx(64 / row["seconds"])
            assert row["scaled_from_passes"] == (1 if row["sampler"].startswith("MDLM") else None)
        if preset == "laptop":
            assert [row["nfe"] for row in found["results"]] == [32] * 5
            assert found["results"][1]["times_eso_lm"] == 1
        assert out.with_suffix(".png").stat().st_size > 5000
        assert out.with_suffix(".md").read_text().strip() in text
    for arguments, message in ((["model.widht=3"], "did you mean model.width?"), (["--batches", 0], "--batches = 0"),
                               (["--repeats", 0], "--repeats = 0"), (["model.heads=3"], "model.heads = 3"),
                               (["--samplers", "GPT"], "--samplers = 'GPT': choose of AR, Eso-LM, BD3-LM (16)"),
                               (["--passes", 0], "--passes = 0"),
                               (["family.name=ar"], "only model's fields"), (["model.length=8"], "give --lengths"),
                               (["--out", tmp_path / "no.png"], "must end in .json")):
        command = ["bench", "sampling", "--preset", "laptop", "--out", tmp_path / "no.json", *arguments]
        assert message in run(*command, code=2)
    assert not (tmp_path / "no.json").exists()


@pytest.mark.usefixtures("no_shape_checks")
def test_bench_of_passes(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one sampler, with two backends, once all is compiled and its turn comes."""
    monkeypatch.setattr(throughput, "measure_machine", lambda dtype: throughput.Machine(1e10, 1e11))
    seconds, turns = iter([9.0, 0.5, 9.0, 0.6, 0.7, 0.8]), list[Path]()  # the first of each is not counted
    monkeypatch.setattr(throughput, "_seconds", lambda action: action() or next(seconds))
    monkeypatch.setattr(throughput, "wait_for", turns.append)
    small = ["model.width=8", "model.heads=2", "model.layers=1", "model.vocab_size=20", "--lengths", 32, "--batches", 2]
    command = ["bench", "sampling", "--out", tmp_path / "b.json", "--passes", 4, *small]
    run(*command, "--preset", "cpu", "--samplers", "Eso-LM", "--attention", "plain", "auto", "--repeats", 2,
        "--wait-for", tmp_path / "go")
    rows = json.loads((tmp_path / "b.json").read_text())["results"]
    assert [(row["sampler"], row["attention"], row["scaled_from_passes"], row["launches_per_pass"])
            for row in rows] == [("Eso-LM", "plain", 4, None)] * 2
    np.testing.assert_allclose([row["all_seconds"] for row in rows], [[4.0, 5.6], [4.8, 6.4]])
    assert turns == [tmp_path / "go"] and rows[0]["seconds_per_pass"] == rows[0]["seconds"] / 32
    text = run(*command, "--preset", "table13", code=2)
    assert "--passes = 4: those of Eso-LM a0=1 T=16 are not alike" in text


def test_floor_by_hand() -> None:
    """Two rows, width 4, one layer, V = 10: steps of 1 and 2 tokens; once the bytes decide, once the operations."""
    config = tiny_config(length=3, vocab_size=10)
    model = dataclasses.replace(config.model, width=4, layers=1)
    plan = Plan(jnp.tile(jnp.arange(3), (2, 1)), np.array([1, 2]))
    weights = throughput.random_weights(model, np.float32)
    sampler = families.get(config).sampler(config)
    numbers = 12 * 16 + (16 + 4) + 4 * 4 + (4 * 10 + 10 + 2 * 4)  # a layer's products, biases, norms; the head
    bytes_ = 4 * (numbers + np.array([2 * 2 * 4 * 1, 2 * 2 * 4 * 3]))
    flops = 2 * np.array([24 * 16 * 1 + 4 * 4 * 1 * 1 + 2 * 40 * 1, 24 * 16 * 3 + 4 * 4 * 3 * 3 + 2 * 40 * 2])
    for machine, expected in ((throughput.Machine(1.0, 1e9), bytes_), (throughput.Machine(1e9, 1.0), flops)):
        np.testing.assert_allclose(throughput.step_floors(plan, sampler, model, weights, machine), expected)


@pytest.mark.slow
def test_compiled_programs_are_kept(tmp_path: Path, trained: Path) -> None:
    """In the user's cache folder, unless JAX's own variable names another."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-m", "eso_jax", "sample", "--workdir", str(trained), "--steps", "1", "--alpha-0", "1",
               "--out", str(tmp_path / "s.npz")]
    # What is compiled quickly is not kept, so this is compiled as users do.
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    kept = list((tmp_path / "cache" / "eso-jax").iterdir())
    assert any(path.name.startswith("jit_decode_run") for path in kept)
    subprocess.run(command, check=True, capture_output=True,
                   env=environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")})
    assert (tmp_path / "mine").is_dir()
    assert len(list((tmp_path / "cache" / "eso-jax").iterdir())) == len(kept)


@pytest.mark.slow
def test_import_then_score_gives_the_golden_bound(tmp_path: Path, run: Run, imported: Path) -> None:
    cases = np.load(GOLDENS / "cases.npz")
    np.save(tmp_path / "x.npy", cases["x0"])
    np.save(tmp_path / "o.npy", cases["exact/orders"])
    out = tmp_path / "s.npz"
    run("score", "--workdir", imported, "--tokens", tmp_path / "x.npy", "--orders", tmp_path / "o.npy", "--out", out)
    found = np.load(out)
    np.testing.assert_allclose(found["logp_per_order"], cases["exact/logp_per_order"], rtol=1e-4)
    np.testing.assert_allclose(found["iw_bound"], cases["exact/iw_bound"], rtol=1e-4)
    assert found["iw_bound_standard_error"].shape == (4,) and (found["iw_bound_standard_error"] > 0).all()
    run("score", "--workdir", imported, "--tokens", tmp_path / "x.npy", "--num-orders", 3, "--alpha-0", 0.25,
        "--out", out)
    assert np.load(out)["logp_per_order"].shape == (3, 4)


@pytest.mark.slow
def test_score_of_what_is_not_given(tmp_path: Path, run: Run, imported: Path) -> None:
    """Flags and rows with masks say the same; mistakes."""
    tokens = np.load(GOLDENS / "cases.npz")["x0"]
    known = np.arange(16) % 3 > 0
    arrays = {"x": tokens, "flags": np.broadcast_to(known, tokens.shape), "ids": np.where(known, tokens, 32),
              "short": tokens[:, :8], "all": np.ones(tokens.shape, bool), "others": (tokens + 1) % 32,
              "float": tokens.astype(float)}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    score = ["score", "--workdir", imported, "--out", tmp_path / "s.npz", "--tokens", tmp_path / "x.npy", "--given"]
    model = eso_jax.load(imported)
    expected = likelihood.conditional(model, tokens, arrays["flags"], ~arrays["flags"])
    for name in ("flags", "ids"):
        assert "62.5% of their tokens given" in run(*score, tmp_path / f"{name}.npy")
        found = np.load(tmp_path / "s.npz")
        np.testing.assert_allclose(found["logp"], expected, rtol=1e-5)
        assert not found["logp_by_position"][:, known].any() and (found["logp_by_position"][:, ~known] < 0).all()
    for name, message in (("short", "must be bool or integers (4, 16)"), ("float", "must be bool or integers"),
                          ("all", "leave some to score"), ("others", "it must be as --tokens"), ("no", "no such file")):
        assert message in run(*score, tmp_path / f"{name}.npy", code=2)
    assert "only one of them" in run(*score, tmp_path / "ids.npy", "--num-orders", 2, code=2)


@pytest.mark.slow
def test_an_imported_model_samples_without_a_tokenizer(tmp_path: Path, run: Run, imported: Path) -> None:
    run("sample", "--workdir", imported, "--num-samples", 2, "--steps", 4, "--out", tmp_path / "s.npz")
    assert "text" not in np.load(tmp_path / "s.npz")
    assert "no tokenizer" in run("sample", "--workdir", imported, "--out", tmp_path / "s.jsonl", code=2)
    assert "fits no tokenizer" in run("eval", "--workdir", imported, "--out", tmp_path / "e.json", code=2)


def test_training_mistakes(tmp_path: Path, run: Run) -> None:
    (tmp_path / "e.json").write_text(BASE.to_json())
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("abc" * 30)
    for override, message in (
            ("model.widht=3", "model.widht: unknown config field; did you mean model.width?"),
            ("family.alpha_0=1.5", "family.alpha_0 = 1.5: must be in [0, 1]"),
            ("model.heads=3", "model.heads = 3: must divide model.width = 16"),
            ("train.steps=many", "train.steps = 'many': must be of type int"),
            ("train.steps", "write an override as section.field=value"),
            (f"data.source={tmp_path / 'empty'}", "holds no text"),
            (f"data.source={tmp_path / 'nowhere'}", "no such file or folder"),
            (f"data.source={tmp_path / 'short.txt'}", "fewer than one window of model.length = 16"),
            ("model.vocab_size=100", "model.vocab_size = 100: data.tokenizer = 'bytes' needs 258")):
        text = run("train", tmp_path / "e.json", "--workdir", tmp_path / "w", override, code=2)
        assert message in text, text
        assert not (tmp_path / "w").exists(), override
    assert "no such file" in run("train", tmp_path / "absent.py", "--workdir", tmp_path / "w", code=2)


DEVICES = """
import sys
from eso_jax.cli import main
for command in sys.argv[1].split(";"):
    assert main(command.split()) == 0, command
"""


@pytest.mark.slow
def test_every_command_that_runs_a_model_takes_devices_and_batch_size(tmp_path: Path, run: Run, trained: Path) -> None:
    """On four emulated devices, two to a copy of the model and three rows at a time, what one device gives by default.
    (The harness has a test of its own.)"""
    np.save(tmp_path / "x.npy", np.arange(7 * 16).reshape(7, 16) % 250)

    def commands(suffix: str, *devices: str) -> list[list[str]]:
        model = ["--workdir", str(trained), *devices]
        judge = ["--judge", str(trained), "--features", "none", *devices]
        return [["eval", *model, "--num-windows", "10", "--samples", "2", "--out", f"{tmp_path}/eval{suffix}.json"],
                ["score", *model, "--tokens", f"{tmp_path}/x.npy", "--num-orders", "3", "--out",
                 f"{tmp_path}/score{suffix}.npz"],
                ["sample", *model, "--num-samples", "5", "--steps", "3", "--out", f"{tmp_path}/sample{suffix}.npz"],
                ["score", *model, "--tokens", f"{tmp_path}/sample{suffix}.npz", "--plan",
                 f"{tmp_path}/sample{suffix}.npz", "--out", f"{tmp_path}/plan{suffix}.npz"],
                ["quality", "--samples", f"{tmp_path}/sample{suffix}.npz", *judge, "--out",
                 f"{tmp_path}/quality{suffix}.json"],
                ["check-cache", *model]]

    for command in commands("", "--batch-size", "8"):
        run(*command)
    several = ";".join(" ".join(command) for command in commands("4", "--tensor", "2", "--batch-size", "3"))
    done = subprocess.run([sys.executable, "-c", DEVICES, several], capture_output=True, text=True, env=emulated(4))
    assert done.returncode == 0, done.stderr
    assert "3 rows on 4 cpu device(s) (data 2 x tensor 2)" in done.stderr and "the cache is exact" in done.stderr
    for name in ("score", "sample", "plan"):
        with np.load(tmp_path / f"{name}.npz") as one, np.load(tmp_path / f"{name}4.npz") as four:
            assert set(one) == set(four)
            for key in set(one) - {"text"}:
                np.testing.assert_allclose(four[key], one[key], rtol=1e-4, atol=1e-5, err_msg=key)
    one, four = (json.loads((tmp_path / f"eval{suffix}.json").read_text()) for suffix in ("", "4"))
    assert four.pop("terms") == pytest.approx(one.pop("terms"), rel=1e-5)
    assert four == {**one, **{name: pytest.approx(value, rel=1e-5) for name, value in one.items()
                              if isinstance(value, float)}}
    one, four = (json.loads((tmp_path / f"quality{suffix}.json").read_text()) for suffix in ("", "4"))
    assert four["gen_ppl"]["value"] == pytest.approx(one["gen_ppl"]["value"], rel=1e-4)
    for command in commands("", "--batch-size", "0")[:5]:
        assert "--batch-size = 0: must be at least 1" in run(*command, code=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ar", "mdlm", "bd3lm"])
def test_alpha_0_is_refused_where_there_is_no_choice(family: str, tmp_path: Path, run: Run) -> None:
    config = tiny_config(family, length=16, vocab_size=258)
    workdir.create(tmp_path / "w", config, random_params(config.model))
    np.save(tmp_path / "x.npy", np.zeros((1, 16), int))
    for command in (["sample"], ["eval", "--source", __file__], ["score", "--tokens", tmp_path / "x.npy"],
                    *([] if family == "mdlm" else [["check-cache"]])):
        out = [] if command[0] == "check-cache" else ["--out", tmp_path / "out"]
        text = run(*command, "--workdir", tmp_path / "w", *out, "--alpha-0", 0.25, code=2)
        assert "--alpha-0 = 0.25: only Eso-LMs have a choice; leave it out for family.name" in text
    only = 0 if family == "ar" else 1
    score = ["score", "--tokens", tmp_path / "x.npy", "--workdir", tmp_path / "w", "--out", tmp_path / "s"]
    run(*score, "--alpha-0", only)


@pytest.mark.slow
def test_a_work_directory_with_another_config_is_refused(tmp_path: Path, run: Run, trained: Path) -> None:
    text = run("train", trained / "config.json", "--workdir", trained, "model.layers=3", code=2)
    assert "model.layers = 3" in text and "holds a run with 2" in text


@pytest.mark.slow
def test_scoring_and_sampling_mistakes(tmp_path: Path, run: Run, imported: Path) -> None:
    tokens = np.load(GOLDENS / "cases.npz")["x0"]
    orders = np.tile(np.arange(16), (2, 4, 1))
    arrays = {"good": tokens, "short": tokens[:, :8], "range": np.where(tokens == tokens[0, 3], 99, tokens),
              "mask": np.full_like(tokens, 32), "float": tokens.astype(float), "orders": orders,
              "twice": np.where(orders == 5, 4, orders), "few": orders[:, :2]}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "text.npy").write_text("not an array")
    score = ["score", "--workdir", imported, "--out", tmp_path / "s.npz", "--tokens"]
    for name, message in (("short", "the model has length 16"), ("range", "= 99: ids must be in [0, 33)"),
                          ("mask", "= 32: is the mask"), ("float", "must be integers"),
                          ("absent", "no such file"), ("text", "not a readable .npy")):
        assert message in run(*score, tmp_path / f"{name}.npy", code=2)
    for name, message in (("twice", "orders[0, 0]: not a permutation of 0..15"), ("few", "must have shape [K, 4, 16]")):
        assert message in run(*score, tmp_path / "good.npy", "--orders", tmp_path / f"{name}.npy", code=2)
    assert "--num-orders = 0" in run(*score, tmp_path / "good.npy", "--num-orders", 0, code=2)

    sample = ["sample", "--workdir", imported, "--out", tmp_path / "s.npz"]
    for flag, value, message in (("--top-p", 0, "--top-p = 0.0: must be in (0, 1]"),
                                 ("--steps", 0, "steps = 0: T must be"),
                                 ("--alpha-0", 1.5, "--alpha-0 = 1.5"), ("--num-samples", 0, "--num-samples = 0"),
                                 ("--num-samples", 10**20, f"--num-samples = {10**20}: all of them together take"),
                                 ("--temperature", -1, "temperature = -1.0"), ("--steps", "x", "invalid int value"),
                                 ("--min-p", 1, "--min-p = 1.0"), ("--num-tries", 0, "--num-tries = 0"),
                                 ("--num-tries", 2, "--num-tries = 2: needs min_entropy"),
                                 ("--min-entropy", 2, "--min-entropy = 2.0: goes with num_tries"),
                                 ("--plan", "zigzag", "plan = 'zigzag': choose one of binomial"),
                                 ("--plan", tmp_path / "no.npz", "no such file"),
                                 ("--tensor", 3, "tensor = 3: must divide"), ("--dtype", "float16", "invalid choice")):
        assert message in run(*sample, flag, value, code=2)
    np.savez(tmp_path / "plan.npz", order=orders[0], tokens_per_step=np.full(4, 4))
    assert "--num-samples = 1: the plan is that of 4 samples" in run(*sample, "--plan", tmp_path / "plan.npz", code=2)
    assert "must be a .npz that" in run(*score, tmp_path / "good.npy", "--plan", tmp_path / "good.npy", code=2)
    np.savez(tmp_path / "plan.npz", order=orders[0], tokens_per_step=np.full(5, 4))
    assert "must be positive and sum to at most 16" in run(*sample, "--plan", tmp_path / "plan.npz", code=2)
    np.savez(tmp_path / "plan.npz", order=orders[0] // 2, tokens_per_step=np.full(4, 4))
    assert "not a permutation" in run(*sample, "--plan", tmp_path / "plan.npz", code=2)
    np.savez(tmp_path / "plan.npz", order=orders[0][:1], tokens_per_step=np.full(4, 4))
    assert "holds a whole plan" in run(*sample, "--plan", tmp_path / "plan.npz", "--steps", 4, code=2)
    np.savez(tmp_path / "plan.npz", order=orders[0][:1], tokens_per_step=np.full(4, 4), diffusion=8.5)
    assert "must be one integer" in run(*sample, "--plan", tmp_path / "plan.npz", code=2)
    assert "only one of them" in run(*score, tmp_path / "good.npy", "--plan", tmp_path / "plan.npz", "--num-orders", 2,
                                     code=2)
    assert "is a folder" in run(*sample[:3], "--out", tmp_path, code=2)
    assert "--seed: -1: must be in [0, 2**32)" in run(*sample, "--seed", -1, code=2)
    orders_file = tmp_path / "orders.npy"
    assert "only one of them" in run(*score, tmp_path / "good.npy", "--orders", orders_file, "--num-orders", 2,
                                     code=2)
    assert "does not exist" in run(*sample[:3], "--out", tmp_path / "no" / "s.npz", code=2)
    assert "not a work directory" in run("sample", "--workdir", tmp_path, "--out", tmp_path / "s.npz", code=2)
    assert not (tmp_path / "s.npz").exists()


def test_an_experiment_that_does_not_run(tmp_path: Path, run: Run) -> None:
    for text, message in (("config = (", "SyntaxError"), ("x = 1 / 0", "ZeroDivisionError"),
                          ("import eso_jax\nconfig = eso_jax.ModelConfig(heads=5)", "model.heads = 5")):
        (tmp_path / "e.py").write_text(text)
        assert message in run("train", tmp_path / "e.py", "--workdir", tmp_path / "w", code=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops its other reads
def test_damaged_and_foreign_checkpoints(tmp_path: Path, run: Run, trained: Path) -> None:
    """Another length or width: one line, and nothing is sampled. A truncated or missing part: the one before it is."""
    config = (trained / "config.json").read_text()
    sample = ["sample", "--workdir", tmp_path / "w", "--out", tmp_path / "s.npz"]
    for old, new, message in (('"length": 16', '"length": 8', "model.length = 8: the checkpoint in"),
                              ('"width": 16', '"width": 32', "is of this config"), ('"heads"', '"haeds"', "unknown")):
        shutil.copytree(trained, tmp_path / "w", dirs_exist_ok=True)
        assert old in config
        (tmp_path / "w" / "config.json").write_text(config.replace(old, new))
        assert message in run(*sample, code=2)
    for damage in ("truncated", "missing"):
        shutil.rmtree(tmp_path / "w")
        shutil.copytree(trained, tmp_path / "w")
        if damage == "missing":
            shutil.rmtree(tmp_path / "w" / "checkpoints" / "4" / "ema")
        else:
            for path in (tmp_path / "w" / "checkpoints" / "4" / "ema").rglob("*"):
                if path.is_file():
                    path.write_bytes(path.read_bytes()[:10])
        said = run(*sample)
        assert "warning: checkpoint 4 in" in said and "using 3" in said
    assert eso_jax.load(tmp_path / "w").step == 3


@pytest.mark.slow
def test_reading_touches_nothing(tmp_path: Path, run: Run, trained: Path) -> None:
    """A sample beside a running training leaves its half-written checkpoint alone; a file is none."""
    shutil.copytree(trained, tmp_path / "w")
    (tmp_path / "w" / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "w" / "checkpoints" / "7").touch()
    before = sorted(tmp_path.joinpath("w").rglob("*"))
    run("sample", "--workdir", tmp_path / "w", "--out", tmp_path / "s.npz")
    assert sorted(tmp_path.joinpath("w").rglob("*")) == before


def test_a_work_directory_without_a_checkpoint(tmp_path: Path, run: Run, trained: Path) -> None:
    (tmp_path / "w").mkdir()
    shutil.copy(trained / "config.json", tmp_path / "w")
    assert "holds no checkpoint" in run("sample", "--workdir", tmp_path / "w", "--out", tmp_path / "s.npz", code=2)


def test_import_is_light() -> None:
    """`import eso_jax` needs jax and flax; data, checkpoints and plots come when they are used."""
    code = ("import sys, eso_jax; bad = {'grain', 'orbax', 'optax', 'tensorflow', 'tensorflow_datasets', 'matplotlib', "
            "'safetensors', 'tqdm'} & set(sys.modules); assert not bad, bad")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version(run: Run) -> None:
    assert run("--version").startswith(f"eso-jax {eso_jax.__version__} (jax ")


def test_an_experiment_may_import_its_neighbours(tmp_path: Path) -> None:
    """As a script may; the folder is not left on the path."""
    (tmp_path / "sizes_beside.py").write_text("LENGTH = 48\n")
    (tmp_path / "e.py").write_text("from sizes_beside import LENGTH\nfrom eso_jax import Config\n"
                                   "config = Config().override(f'model.length={LENGTH}')\n")
    before = list(sys.path)
    assert configs.from_file(tmp_path / "e.py").model.length == 48 and sys.path == before
    (tmp_path / "bad.py").write_text("import sizes_that_are_not_there\n")
    with pytest.raises(eso_jax.EsoError, match="running it failed .ModuleNotFoundError"):
        configs.from_file(tmp_path / "bad.py")
    assert sys.path == before


def test_an_error_names_the_option_that_gave_the_value(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n\n")
    for arguments, message in (
            ("data prepare text --length 8 --from {t}/a.txt --tokenizer {t}/no.json", "--tokenizer = '{t}/no.json': "),
            ("data train-tokenizer --vocab-size 300 --out {t}/t --from {t}/empty", "--from = ['{t}/empty']: holds no "),
            ("data train-tokenizer --vocab-size 300 --from {t}/blank.txt --out {t}/t", "holds no text to learn from"),
            ("import {g}/eso_tiny.safetensors --config {g}/config.json --heads 7 --out {t}/w", "--heads = 7: must "),
            ("import {g}/eso_tiny.safetensors --config {g}/config.json --tokenizer {t}/no --out {t}/w",
             "--tokenizer = '{t}/no': "),
            ("import {g}/eso_tiny.safetensors --config {g}/config.json --alpha-0 2 --out {t}/w", "--alpha-0 = 2.0: "),
            ("import {g}/eso_tiny.safetensors --config {g}/config.json --start-id 3 --out {t}/w", "--start-id = 3: ")):
        said = run(*arguments.format(t=tmp_path, g=GOLDENS).split(), code=2)
        assert f"error: {message.format(t=tmp_path)}" in said or "learn from" in message and message in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "blank.txt", "empty"]


def test_only_what_is_unknown_is_called_so(tmp_path: Path, run: Run) -> None:
    said = run("train", "quickstart", "--workdir", tmp_path / "w", "train.steps=3", "--train.seed=5", code=2)
    assert "unrecognized arguments: --train.seed=5; write overrides as section.field=value, without --" in said
    assert "unrecognized arguments: --y x" in run("view", "--out", tmp_path / "v.html", "a.npz", "--y", "x", code=2)


def test_results_are_not_written_over_what_a_folder_needs(tmp_path: Path, run: Run) -> None:
    """Of a work directory and of a prepared folder; under the same names elsewhere they may be."""
    (tmp_path / "w" / "checkpoints").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "samples.jsonl").write_text('{"text": "a b c d"}')
    (tmp_path / "link").symlink_to(tmp_path / "w")
    kept = [tmp_path / "w" / name for name in ("config.json", "metrics.jsonl")]
    kept += [tmp_path / "data" / name for name in ("manifest.json", "tokenizer.json")]
    for path in kept:
        path.write_text("kept")
    command = ["quality", "--samples", tmp_path / "samples.jsonl", "--judge", "none", "--out"]
    for path in (*kept, tmp_path / "link" / "config.json", tmp_path / "w" / "tokenizer.json"):
        assert f"--out = '{path}': is a file that '{path.resolve().parent}' needs" in run(*command, path, code=2)
    assert f"--html = '{kept[0]}': is a file that '{kept[0].parent}' needs" in run(
        "sample", "--workdir", tmp_path / "w", "--out", tmp_path / "s.npz", "--html", kept[0], code=2)
    assert {path.read_text() for path in kept} == {"kept"}
    for path in (tmp_path / "w" / "quality.json", tmp_path / "config.json", tmp_path / "tokenizer.json"):
        run(*command, path)
