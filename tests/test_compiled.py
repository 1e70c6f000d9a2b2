"""What compiled programs do: the sampler updates its cache in place and never copies it, and no loop waits for data; a
training step has the recorded numbers."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import USUAL, brief, random_tokens, random_weights, tiny_config
from eso_jax import families
from eso_jax.decoding import loop, passes
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.order import sort, unsort
from eso_jax.decoding.plan import Plan, left_to_right
from eso_jax.model import plain, vocabulary
from eso_jax.run import train as training

BATCH, LENGTH = 3, 40


def behind_prompts(order: jax.Array) -> Plan:
    """One token per step, behind 1, 2, ... given ones."""
    given = 1 + np.arange(len(order))
    return Plan(order, (np.arange(order.shape[1] - 1) < order.shape[1] - given[:, None]).astype(int), given * 0, given)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("steps", ["shared", "by-row", "wide"])
@pytest.mark.parametrize("name", brief(["esolm", "esolm_a", "ar", "bd3lm"], "esolm"))
def test_no_copy_the_size_of_the_cache(name: str, steps: str) -> None:
    """Of steps that rows share, or each has its own, or that are of several widths with a large vocabulary."""
    large = {"vocab_size": 400} if steps == "wide" else {}
    config = tiny_config(name, LENGTH, **large, **({"block_size": 4} if name == "bd3lm" else {}))
    plan: Plan = left_to_right(BATCH, LENGTH)
    if steps == "by-row":
        plan = behind_prompts(plan.order)
    elif steps == "wide" and name != "ar":
        plan = Plan(plan.order, np.array([1, 1, 2] * (LENGTH // 4)), LENGTH)
    sampler = families.get(config).sampler(config)
    uniforms = loop.draw_uniforms(loop.row_keys(jax.random.key(0), jnp.arange(BATCH)), LENGTH)
    runs = passes.schedule(plan, sampler, row=passes.row_cost(config.model))
    run = max(runs, key=lambda run: len(run.steps.first))
    state = loop.grow(loop.start(random_weights(config.model), config.model, sampler, plan), run.shape)
    lowered = loop.decode_run.lower(random_weights(config.model), state, run.steps, loop.Draw(uniforms),
                                    config.model, sampler, run.shape)
    compiled = lowered.compile(USUAL)
    text = compiled.as_text()
    assert (" conditional(" in text) == (steps == "wide" and name != "ar")
    heads, size = config.model.heads, config.model.head_size
    for cache in (f"f32[{BATCH},{heads},{size},{LENGTH}]", f"f32[{BATCH},{heads},{LENGTH},{size}]"):
        assert cache in text  # or the search below finds nothing for the wrong reason
        assert not re.findall(rf"= {re.escape(cache)}\S* (copy|copy-start)\(", text)
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased >= sum(x.nbytes for x in jax.tree.leaves(state.cache)), "the state is not donated"


@pytest.mark.slow
def test_first_step_matches_recorded_numbers() -> None:
    """A golden single step. If you changed the model, the noise or the optimizer on purpose, record the new numbers;
    if you did not, you have just learned something."""
    run = tiny_config("esolm", alpha_0=0.5)
    state = jax.jit(training.init_state, static_argnums=0)(run)
    _, values = jax.jit(training.train_step, static_argnums=0)(
        run.override("train.batch_size=8", "train.compute_dtype=float32"), state, random_tokens(run, 8))
    recorded = {"diffusion": 1.172320, "gradient_norm": 0.3964224, "loss": 2.255363, "sequential": 1.083042}
    assert values.pop("finite")
    assert values.pop("update_norm") == 0  # the rate begins at 0
    assert values.pop("parameter_norm") == pytest.approx(jax.jit(optax.tree.norm)(state.params))
    assert {name: float(value) for name, value in values.items()} == pytest.approx(recorded, rel=1e-5)
    # The head begins at zero, so a masked token costs log 8 exactly: the sequential share of masks is a whole number.
    masks = recorded["sequential"] / np.log(8) * 4 * run.model.length
    assert masks == pytest.approx(round(masks), abs=1e-3)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("name", brief(families.BY_NAME, "esolm"))
def test_no_loop_whose_turns_are_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each turn of such a loop would wait for the host. Of all programs of `sample` and `score --plan`, with
    logits in chunks, attention in tiles and a nucleus."""
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(plain, "TILE", {"cpu": 1})
    monkeypatch.setattr(plain, "FEW_QUERIES", 1)
    config = tiny_config(name, 12, vocab_size=11, **({"block_size": 4} if name == "bd3lm" else {}))
    family, weights = families.get(config), random_weights(config.model)
    plan = family.plan(jax.random.key(0), config, 2, 6)
    by_row = behind_prompts(left_to_right(2, 12).order)
    sampler, keys = family.sampler(config), loop.row_keys(jax.random.key(0), jnp.arange(2))
    uniforms = loop.draw_uniforms(keys, 12)
    programs = [loop.draw_uniforms.lower(keys, 12)]
    programs += [jax.jit(function).lower(plan.order, plan.order) for function in (sort, unsort)]
    for plan in (plan, by_row):
        run = max(passes.schedule(plan, sampler), key=lambda run: (len(run.steps.first), run.shape))
        state = loop.grow(loop.start(weights, config.model, sampler, plan), run.shape)
        scored = dataclasses.replace(state, logp=uniforms[..., 0])
        for begin, source in ((state, loop.Draw(uniforms, Rule(top_p=0.9, min_p=0.01))),
                              (scored, loop.Score(plan.order))):
            programs.append(loop.decode_run.lower(weights, begin, run.steps, source, config.model, sampler, run.shape))
    texts = [program.compile(USUAL).as_text() for program in programs]
    whiles = [line for text in texts for line in text.splitlines() if " while(" in line]
    assert len(whiles) >= 3 and all("known_trip_count" in line for line in whiles)
