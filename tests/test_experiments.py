"""The experiments: every run of the paper is a config that lowers, and every table comes out at a reduced size."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eso_jax import Config, config as configs, recipes
from eso_jax.train import init_state, train_step

ROOT = Path(__file__).parents[1]
RUNS = sorted(path.relative_to(ROOT) for folder in ("lm1b", "owt") for path in (ROOT / "experiments" / folder).glob("*"))
SCRIPTS = sorted((ROOT / "experiments" / "tables").glob("*.py"))


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_every_run_loads_and_says_how(path: Path) -> None:
    config = configs.from_file(ROOT / path)
    doc = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    workdir = Path("runs/paper") / path.relative_to("experiments").with_suffix("")
    assert f"Command:   eso-jax train {path} --workdir {workdir}\n" in doc
    assert all(f"\n{what}:" in doc for what in ("Data", "Hardware", "Paper", "Ours"))
    assert config.model.width == 768 and config.train.batch_size == 512
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(functools.partial(init_state, config)).params))
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
    """The whole training step, abstractly: no parameter is ever made."""
    state = jax.eval_shape(functools.partial(init_state, config))
    tokens = jax.ShapeDtypeStruct((config.train.batch_size, config.model.length), jnp.int32)
    lowered = jax.jit(functools.partial(train_step, config)).trace(state, tokens).lower(lowering_platforms=("tpu",))
    new_state, metrics = lowered.out_info
    assert jax.tree.map(lambda x: x.shape, new_state.params) == jax.tree.map(lambda x: x.shape, state.params)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
