"""The authors' checkpoints in and out: sizes from tensors, every mistake named, exports bit for bit, honest cards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import eso_jax
from conftest import BASE, GOLDENS, Run, random_params
from eso_jax.config import ModelConfig
from eso_jax.interop import import_checkpoint, names
from eso_jax.interop.card import card
from eso_jax.run import metrics, workdir
from vocabularies import gpt2_like

pytestmark = pytest.mark.slow

SIZES = GOLDENS / "config.json"
FILES = {"esolm": "eso", "esolm_a": "eso", "mdlm": "eso", "bd3lm": "bd3lm", "ar": "ar"}


def source(family: str) -> Path:
    return GOLDENS / f"{FILES[family]}_tiny.safetensors"


def test_sizes_come_from_the_tensors(tmp_path: Path, run: Run) -> None:
    """All but the length, with the heads from the rotary frequencies or, without these, of size 64."""
    text = run("import", source("esolm"), "--length", 16, "--out", tmp_path / "w")
    assert "30 tensors mapped" in text and "82,785 parameters" in text
    found, given = (eso_jax.load(w).config for w in (tmp_path / "w", imported(tmp_path / "given", run, "esolm")))
    assert found == given.override("model.mask_id=None")
    tensors = {name: t for name, t in load_file(source("esolm")).items() if not names.is_buffer(name)}
    save_file(tensors, tmp_path / "bare.safetensors")
    bare = ["import", tmp_path / "bare.safetensors", "--length", 16, "--out", tmp_path / "bare"]
    assert "width 48 has no heads of size 64; give --heads" in run(*bare, code=2)
    run(*bare, "--heads", 4)
    assert eso_jax.load(tmp_path / "bare").config == found
    wide = {"backbone.vocab_embed.embedding": np.zeros((30522, 128)), "backbone.blocks.11.norm1.weight": np.zeros(128)}
    assert names.sizes_of(wide, "x") == {"vocab_size": 30522, "mask_id": 103, "width": 128, "layers": 12, "cond_dim": 0}
    config, _ = import_checkpoint(tmp_path / "bare.safetensors", length=8, heads=2, family="mdlm")
    assert config.model.length == 8 and config.model.heads == 2


def imported(out: Path, run: Run, family: str) -> Path:
    run("import", source(family), "--config", SIZES, "--family", family, "--out", out)
    return out


@pytest.mark.parametrize("family", FILES)
def test_import_then_export_is_the_file_bit_for_bit(family: str, tmp_path: Path, run: Run) -> None:
    """And back in from what was written alone, with the family's own settings."""
    first = imported(tmp_path / "w", run, family)
    out = tmp_path / "model.safetensors"
    text = run("export", "--workdir", first, "--out", out)
    assert f"{len(load_file(out))} tensors" in text
    before, after = load_file(source(family)), load_file(out)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype and array.tobytes() == after[name].tobytes(), name
    run("import", out, "--config", out.with_suffix(".json"), "--out", tmp_path / "again")
    (config, step, params), (config2, _, params2) = workdir.read(first), workdir.read(tmp_path / "again")
    assert config2 == config.override(f"model.mask_id={config.model.mask}") and step == 0
    assert (config.model.cond_dim == 0) == (family == "ar") and config.family.name == family
    for name in params:
        np.testing.assert_array_equal(params[name], params2[name])


def test_another_alpha_0_leaves_kappa_behind(tmp_path: Path) -> None:
    """An export says both; an import can be given alpha_0 alone."""
    sizes = json.loads(Path(SIZES).read_text()) | {"alpha_0": 0.25, "kappa": 0.25}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    for alpha_0, kappa in ((None, 0.25), (0.25, 0.25), (1.0, None), (0.5, None)):
        given = {} if alpha_0 is None else {"alpha_0": alpha_0}
        config, _ = import_checkpoint(source("esolm"), str(tmp_path / "sizes.json"), "esolm", **given)
        assert (config.family.alpha_0, config.family.kappa) == (alpha_0 or 0.25, kappa)


@pytest.mark.parametrize(("head_size", "digest"), [(12, None), (32, "9cc63b858a37"), (64, "734f9e6b629f"),
                                                   (128, "4b659c349432"), (256, None)])
def test_rotary_frequencies_are_pytorchs(head_size: int, digest: str | None) -> None:
    """To the bit at the usual head sizes, by the digest of torch 2.13's 1 / 10000 ** (arange(0, K, 2).float() / K)."""
    found = names.frequencies(ModelConfig(width=head_size, heads=1))
    np.testing.assert_allclose(found, 1e4 ** (-np.arange(0, head_size, 2) / head_size), rtol=3e-7)
    assert found.dtype == np.float32 and digest in (None, hashlib.sha256(found.tobytes()).hexdigest()[:12])


@pytest.mark.slow
def test_a_trained_model_travels(tmp_path: Path, run: Run, trained: Path) -> None:
    """Out as averaged or raw weights and in again: the same parameters, and a card with what was measured."""
    for flags, ema in (([], True), (["--raw"], False)):
        out = tmp_path / f"{ema}.safetensors"
        run("export", "--workdir", trained, *flags, "--out", out)
        run("import", out, "--config", out.with_suffix(".json"), "--out", tmp_path / f"w{ema}")
        (config, _, params), (config2, _, params2) = workdir.read(trained, ema), workdir.read(tmp_path / f"w{ema}")
        assert config2.family == config.family and config2.model == config.override(
            "model.dropout=0", "model.mask_id=257").model
        for name in params:
            np.testing.assert_array_equal(params[name], params2[name])
    line = [line for line in metrics.read(trained) if "validation_bits_per_byte" in line][-1]
    text = (tmp_path / "True.md").read_text()
    assert f"| {line['validation_bits_per_byte']:.4g} |" in text
    assert "4, each of 8 x 16 tokens; 512 tokens in all" in text
    assert "text.py`, tokenizer bytes" in text and "Eso-LM (B), alpha_0 = 0.5" in text and "started from" not in text
    assert "which these weights are not" in (tmp_path / "False.md").read_text() and "which these" not in text


def test_a_card_says_nothing_that_was_not_measured() -> None:
    text = card(BASE, 0, 10, True, [])
    assert "Nothing was measured" in text and "not recorded" in text and "stdlib" not in text
    later = [{"step": 3, "loss": 2.5}, {"step": 6, "loss": 1.5, "validation_nats_per_token": 1.25}]
    text = card(BASE, 3, 10, False, later)  # an earlier checkpoint than the last line
    assert "at step 3 | 2.5 |" in text and "1.5" not in text and "1.25" not in text
    assert "the model in `runs/ar`" in card(BASE.override("train.start_from=runs/ar"), 3, 10, True, later)


def test_import_mistakes(tmp_path: Path, run: Run) -> None:
    """A missing, unknown or misshapen tensor, or a damaged file, is named and leaves nothing behind."""
    good = source("esolm")
    tensors = load_file(good)
    name = "backbone.blocks.1.attn_out.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "missing.safetensors")
    save_file(tensors | {"backbone.extra": tensors[name]}, tmp_path / "unknown.safetensors")
    save_file(tensors | {name: tensors[name][:-1].copy()}, tmp_path / "shape.safetensors")
    save_file(tensors | {name: tensors[name] * np.float32("nan")}, tmp_path / "nan.safetensors")
    (tmp_path / "truncated.safetensors").write_bytes(good.read_bytes()[:100_000])
    (tmp_path / "corrupt.safetensors").write_bytes(b"\xff" * 1000)
    damaged = "not a readable safetensors file"
    for file, message in (("missing", f"tensor {name} is missing"), ("unknown", "unknown tensor backbone.extra"),
                          ("shape", f"{name} = (47, 48)"), ("nan", f"{name} = 'nan or inf'"), ("truncated", damaged),
                          ("corrupt", damaged), ("absent", "no such file")):
        for sizes in (["--config", SIZES], ["--length", 16]):
            text = run("import", tmp_path / f"{file}.safetensors", *sizes, "--out", tmp_path / "w", code=2)
            assert message in text
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"name": "x"}')
    (tmp_path / "wide.json").write_text('{"hidden_size": 96, "length": 16}')
    (tmp_path / "word.json").write_text('{"length": "long"}')
    for arguments, message in (
            ([source("ar"), "--config", SIZES], "give --family ar"), ([good], "give --length, or --config"),
            ([tmp_path / "x.bin"], "must be a .safetensors or .ckpt file"), ([good, "--ema"], "one set of weights"),
            ([good, "--config", tmp_path / "absent.json"], "no such file"),
            ([good, "--config", tmp_path / "text.json"], "must be a JSON object"),
            ([good, "--config", tmp_path / "list.json"], "must be a JSON object"),
            ([good, "--config", tmp_path / "other.json"], "says none of hidden_size"),
            ([good, "--config", tmp_path / "wide.json"], "should hold shape"),
            ([good, "--config", tmp_path / "word.json"], "model.length = 'long'"),
            ([good, "--length", 16, "--heads", 8], "check the number of heads"),
            ([good, "--length", 16, "--family", "mdlm", "--alpha-0", 0.5], "of esolm, esolm_a alone")):
        assert message in run("import", *arguments, "--out", tmp_path / "w", code=2)
    assert not list(tmp_path.glob("w")) + list(tmp_path.glob("w.*"))
    (tmp_path / "w").mkdir()
    assert "exists already" in run("import", good, "--config", SIZES, "--out", tmp_path / "w", code=2)
    assert list((tmp_path / "w").iterdir()) == []


CASES = {"esolm": "eso_b_diffusion", "esolm_a": "eso_a_diffusion", "mdlm": "mdlm", "ar": "ar", "bd3lm": "bd3lm"}


@pytest.mark.parametrize(("family", "case"), [*CASES.items(), ("esolm", "eso_b_sequential"),
                                              ("esolm_a", "eso_a_sequential")])
def test_logits_are_compared_with_stored_ones(family: str, case: str, tmp_path: Path, run: Run) -> None:
    cases = {name.removeprefix(f"{case}/"): array for name, array in np.load(GOLDENS / "cases.npz").items()}
    x, order = cases["x0"], cases.get("order", np.tile(np.arange(16), (4, 1)))
    noisy = next((cases[name] for name in ("zt", "z0") if name in cases), x)
    tokens = np.take_along_axis(noisy, order, 1)
    if "sequential" in case or family == "bd3lm":
        tokens = np.concatenate([tokens, np.take_along_axis(x, order, 1)], 1)
    logits = cases["logits" if "logits" in cases else "logits_in_order"]
    if family == "ar":
        tokens, order = tokens[:, :-1], order[:, :-1]
    arrays = {"tokens": tokens, "logits": logits} | ({"order": order} if "order" in cases else {})
    np.savez(tmp_path / "c.npz", **arrays)
    command = ["import", source(family), "--config", SIZES, "--family", family, "--check", tmp_path / "c.npz", "--out"]
    text = run(*command, tmp_path / "w")
    assert float(text.split("by at most ")[1]) < 1e-4
    np.savez(tmp_path / "c.npz", **arrays | {"logits": logits[::-1]})
    assert "they are of another model" in run(*command, tmp_path / "v", code=2)
    np.savez(tmp_path / "c.npz", tokens=tokens[:, :3], logits=logits)
    assert "must be ids" in run(*command, tmp_path / "v", code=2)
    np.savez(tmp_path / "c.npz", tokens=tokens)
    assert "not a readable .npz" in run(*command, tmp_path / "v", code=2)
    assert not (tmp_path / "v").exists()


@pytest.mark.slow
def test_the_tokenizer_travels(tmp_path: Path, run: Run) -> None:
    """Named on import and kept, exported beside the weights, and taken from there by the next import."""
    tokenizer = gpt2_like()
    assert tokenizer.json is not None
    (tmp_path / "t.json").write_text(tokenizer.json)
    model = ModelConfig(width=16, layers=1, heads=2, cond_dim=8, length=16, vocab_size=tokenizer.vocab_size)
    save_file(names.to_tensors(random_params(model), model), tmp_path / "m.safetensors")
    command = ["import", tmp_path / "m.safetensors", "--length", 16, "--tokenizer"]
    run(*command, f"gpt2={tmp_path / 't.json'}", "--out", tmp_path / "w")
    (tmp_path / "t.json").unlink()
    run("export", "--workdir", tmp_path / "w", "--out", tmp_path / "e.safetensors")
    (tmp_path / "w").rename(tmp_path / "gone")
    run("import", tmp_path / "e.safetensors", "--config", tmp_path / "e.json", "--tokenizer",
        f"gpt2={tmp_path / 'e.tokenizer.json'}", "--out", tmp_path / "w")
    found = eso_jax.load(tmp_path / "w").tokenizer
    assert found is not None and found.json == tokenizer.json and found.name == "gpt2"
    run("sample", "--workdir", tmp_path / "w", "--num-samples", 2, "--steps", 4, "--out", tmp_path / "s.npz")
    assert np.load(tmp_path / "s.npz")["text"].shape == (2,)
    assert "has 258 ids of which 257 is the mask" in run(*command, "bytes", "--out", tmp_path / "v", code=2)
    assert "choose bytes" in run(*command, "nowhere.json", "--out", tmp_path / "v", code=2)
    assert not (tmp_path / "v").exists()


def test_export_mistakes(tmp_path: Path, run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = ["export", "--workdir", trained, "--out"]
    assert "must end in .safetensors" in run(*export, tmp_path / "m.bin", code=2)
    assert "does not exist" in run(*export, tmp_path / "no" / "m.safetensors", code=2)
    assert "not a work directory" in run("export", "--workdir", tmp_path, "--out", tmp_path / "m.safetensors", code=2)
    for name in ("m.safetensors", "m.json", "m.md"):
        (tmp_path / name).write_text("precious")
        assert "exists already" in run(*export, tmp_path / "m.safetensors", code=2)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    replace = os.replace
    with monkeypatch.context() as patch:  # the weights, the last of three, after the others are in place
        patch.setattr(os, "replace", lambda path, to: full() if to.suffix == ".safetensors" else replace(path, to))
        assert "No space left" in run(*export, tmp_path / "m.safetensors", code=2)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    assert "No space left" in run(*export, tmp_path / "m.safetensors", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_to_and_from_the_hub(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub of the hub keeps what is pushed in a folder, and gives it back."""
    hub = tmp_path / "hub"

    class Api:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            assert private and exist_ok
            (hub / name).mkdir(parents=True)

        def create_commit(self, name: str, operations: list, commit_message: str) -> object:
            for operation in operations:
                shutil.copy(operation.path_or_fileobj, hub / name / operation.path_in_repo)
            return SimpleNamespace(commit_url=f"https://hub/{name}/1")

    def download(name: str, allow_patterns: list[str]) -> str:
        if not (hub / name).exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand not in the cache")
        return str(hub / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    first = imported(tmp_path / "w", run, "bd3lm")
    out = tmp_path / "m.safetensors"
    text = run("export", "--workdir", first, "--out", out, "--push", "me/mine")
    assert "pushed to https://hub/me/mine/1" in text
    assert {path.name for path in (hub / "me/mine").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    run("import", "me/mine", "--out", tmp_path / "back")
    config = eso_jax.load(tmp_path / "back").config
    assert config.family.name == "bd3lm" and config.family.block_size == 4
    theirs = {"model_type": "EsoLM", "hidden_dim": 48, "model_length": 16, "mask_index": 32, "n_heads": 4}
    shutil.copytree(hub / "me/mine", hub / "authors/Eso-LM")
    (hub / "authors/Eso-LM/config.json").write_text(json.dumps(theirs))  # as transformers writes it
    run("import", "authors/Eso-LM", "--alpha-0", 0.25, "--out", tmp_path / "theirs")
    config = eso_jax.load(tmp_path / "theirs").config
    assert (config.family.name, config.family.alpha_0, config.model.mask_id) == ("esolm", 0.25, 32)
    text = run("import", "me/none", "--out", tmp_path / "x", code=2)
    assert "LocalEntryNotFoundError: no network" in text and "give a .safetensors" in text
    text = run("export", "--workdir", first, "--out", tmp_path / "n.safetensors", "--push", "me/mine", code=2)
    assert "the hub did not take it (FileExistsError" in text and (tmp_path / "n.safetensors").exists()
