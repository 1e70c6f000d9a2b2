"""Training from another model: the same function at the start, or a clear no; and a run of its own from then on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eso_jax
from conftest import GOLDENS, Run, as_family, random_params, random_tokens
from eso_jax import sharding
from eso_jax.config import Config, MeshConfig, from_file
from eso_jax.data.tokenizers import LibraryTokenizer
from eso_jax.errors import EsoError
from eso_jax.model import masks, transformer
from eso_jax.model.params import Params, fold
from eso_jax.run import initial, train as training, workdir
from vocabularies import gpt2_like

pytestmark = pytest.mark.slow

MESH = sharding.mesh(MeshConfig())


@pytest.fixture(scope="module")
def base(base: Config) -> Config:
    return base.override("family.alpha_0=0.25", "model.layers=2")


def made(directory: Path, base: Config, *overrides: str) -> Path:
    """A work directory of random parameters, none of them at its initial value."""
    config = base.override("family.alpha_0=1", *overrides)
    workdir.create(directory, config, random_params(config.model))
    return directory


def logits(config: Config, params: Params, tokens: jax.Array) -> jax.Array:
    weights = fold(config.model, params)
    hidden, _ = transformer.trunk(weights, tokens, transformer.natural_positions(tokens),
                                  masks.View(masks.CAUSAL))
    return transformer.head(weights, hidden, config.model.mask)


def test_ar_without_adaln_becomes_an_eso_lm(base: Config, tmp_path: Path) -> None:
    """The folded weights are the same to the bit, so the logits are; and the new modulation then learns."""
    source = made(tmp_path / "ar", base, "family.name=ar", "model.cond_dim=0")
    run = base.override(f"train.start_from={source}")
    params = initial.starting_params(run, MESH)
    assert params is not None
    theirs, _, before = workdir.read(source)
    chex.assert_trees_all_equal(fold(run.model, params), fold(theirs.model, before))
    tokens = random_tokens(run, 2)
    np.testing.assert_array_equal(logits(run, params, tokens), logits(theirs, before, tokens))
    after = training.train(run.override("train.steps=4"), tmp_path / "w").params
    for name in ("adaln_kernel", "adaln_bias", "head_adaln_kernel", "head_adaln_bias", "embedding"):
        assert (after[name] != params[name]).any(), name
    assert (np.abs(after["adaln_kernel"]).max(axis=(0, 1, 3)) > 0).all()  # of all six modulations


def test_the_golden_ar_becomes_an_eso_lm(run: Run, tmp_path: Path) -> None:
    """Its scores along the natural order, as an Eso-LM at alpha_0 = 0, need nothing but a function that has AdaLN."""
    run("import", GOLDENS / "ar_tiny.safetensors", "--config", GOLDENS / "config.json", "--family", "ar", "--out",
        tmp_path / "ar")
    theirs = eso_jax.load(tmp_path / "ar")
    config = theirs.config.override("family.name=esolm", "model.cond_dim=24", f"train.start_from={tmp_path / 'ar'}")
    params = initial.starting_params(config, MESH)
    assert params is not None and params["adaln_kernel"].shape == (2, 24, 6, 48)
    cases = np.load(GOLDENS / "cases.npz")
    found = logits(config, params, jnp.asarray(cases["x0"][:, :-1]))
    np.testing.assert_allclose(found[..., :-1], cases["ar/logits"][..., :-1], atol=1e-4)


@pytest.mark.parametrize("family", ["mdlm", "ar", "bd3lm"])
def test_another_family_and_a_longer_length(family: str, base: Config, tmp_path: Path) -> None:
    """The first step's rate is 0 (warm-up), so that one step shows where training begins: step 0, a fresh optimizer."""
    source = made(tmp_path / "source", base, *as_family(family))
    run = base.override(f"train.start_from={source}", "model.length=32", "train.steps=1")
    state = training.train(run, tmp_path / "w")
    _, _, before = workdir.read(source)
    chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(before))
    chex.assert_trees_all_close(jax.device_get(state.ema), jax.device_get(before), rtol=1e-6)
    assert int(state.step) == 1
    model = eso_jax.load(tmp_path / "w")
    assert model.config.model.length == 32 and model.config.family.alpha_0 == 0.25
    assert model.sample(1, steps=2).tokens.shape == (1, 32)
    assert json.loads((tmp_path / "w" / "config.json").read_text())["train"]["start_from"] == str(source)


def test_a_trained_source_gives_its_averages(base: Config, tmp_path: Path) -> None:
    before = training.train(base.override("train.steps=4"), tmp_path / "source")
    params = initial.starting_params(base.override(f"train.start_from={tmp_path / 'source'}"), MESH)
    chex.assert_trees_all_equal(params, jax.device_get(before.ema))
    assert any((before.ema[name] != before.params[name]).any() for name in before.ema)


def test_a_resumed_run_needs_its_source_no_more(base: Config, tmp_path: Path) -> None:
    """8 steps equal 3 + 5, the source gone in between; before the first checkpoint it is still needed."""
    source = made(tmp_path / "source", base, "family.name=mdlm")
    run = base.override(f"train.start_from={source}")
    whole = training.train(run, tmp_path / "whole")
    training.train(run.override("train.steps=3"), tmp_path / "parts")
    shutil.copytree(tmp_path / "parts", tmp_path / "killed", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.rmtree(source)
    chex.assert_trees_all_equal(whole, training.train(run, tmp_path / "parts"))
    with pytest.raises(EsoError, match="no model to start from"):
        training.train(run, tmp_path / "killed")
    with pytest.raises(EsoError, match=r"train.start_from = None: .* holds a run with .*source"):
        training.train(run.override("train.start_from=None"), tmp_path / "parts")


def test_models_that_do_not_fit(base: Config, tmp_path: Path, run: Run) -> None:
    """Each a line with the field and both values, before the work directory is made."""
    source = made(tmp_path / "source", base)
    bare = made(tmp_path / "bare", base, "family.name=ar", "model.cond_dim=0")
    broken = made(tmp_path / "broken", base)
    shutil.rmtree(broken / "checkpoints" / "0" / "params")
    (tmp_path / "e.json").write_text(base.to_json())
    for start, override, message in (
            (source, "model.width=32", r"model.width = 32: the model in train.start_from"),
            (source, "model.layers=3", "has 2"), (source, "model.heads=4", "model.heads = 4"),
            (source, "model.cond_dim=16", "has 8; AdaLN"),
            (source, "model.cond_dim=0", "model.cond_dim = 0"), (bare, "model.width=32", "has 16"),
            (tmp_path / "absent", "train.steps=1", "not a work directory"),
            (broken, "train.steps=1", "none of its checkpoints"),
            ("", "train.steps=1", "give a work directory, or None")):
        text = run("train", tmp_path / "e.json", "--workdir", tmp_path / "w", f"train.start_from={start}", override,
                   code=2)
        assert message in text, text
        assert not (tmp_path / "w").exists()
    for override, message in (("model.vocab_size=9", "vocab_size = 9: .* has 258"), ("model.mask_id=3", "= 3: .* 257")):
        with pytest.raises(EsoError, match=message):
            initial.starting_params(base.override(override, f"train.start_from={source}"), MESH)


def test_an_imported_model_is_trained_elsewhere(base: Config, tmp_path: Path) -> None:
    source = made(tmp_path / "w", base)
    with pytest.raises(EsoError, match=f"holds an imported model, .* another --workdir, by train.start_from={source}$"):
        training.train(base, source)
    assert sorted(path.name for path in source.iterdir()) == ["checkpoints", "config.json"]


def test_ids_must_mean_what_they_meant(base: Config, tmp_path: Path) -> None:
    """Another file of the same tokenizer will do, another vocabulary of the same size won't."""
    kept = gpt2_like()
    assert kept.json is not None
    config = base.override(f"model.vocab_size={kept.vocab_size}", "data.tokenizer=gpt2")
    workdir.create(tmp_path / "w", config, random_params(config.model), kept)
    run = config.override(f"train.start_from={tmp_path / 'w'}")
    swapped = json.loads(kept.json)
    ids = swapped["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    assert initial.starting_params(run, MESH, LibraryTokenizer("mine", kept.json + " ")) is not None
    with pytest.raises(EsoError, match="data.tokenizer = 'gpt2': .* whose ids stand for other text"):
        initial.starting_params(run, MESH, LibraryTokenizer("gpt2", json.dumps(swapped)))


def test_start_from_in_the_config(base: Config, tmp_path: Path) -> None:
    run = base.override("train.start_from=runs/a")
    (tmp_path / "c.json").write_text(run.to_json())
    assert from_file(tmp_path / "c.json").train.start_from == "runs/a"
    assert run.override("train.start_from=None").train.start_from is None
    assert initial.starting_params(base, MESH) is None
