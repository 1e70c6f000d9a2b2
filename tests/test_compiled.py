"""What the compiled sampler does: the cache is updated in place, never copied, and no loop waits for data."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from conftest import random_weights, tiny_config
from eso_jax import families
from eso_jax.decoding import loop
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.order import sort, unsort
from eso_jax.decoding.plan import Plan, left_to_right
from eso_jax.model import attention, vocabulary

BATCH, LENGTH = 3, 40


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("name", ["esolm", "esolm_a", "ar", "bd3lm"])
def test_no_copy_the_size_of_the_cache(name: str) -> None:
    config = tiny_config(name, LENGTH, **({"block_size": 4} if name == "bd3lm" else {}))
    plan: Plan = left_to_right(BATCH, LENGTH)
    sampler = families.get(config).sampler(config)
    uniforms = loop.draw_uniforms(jax.random.key(0), jnp.arange(BATCH), LENGTH)
    run = max(loop.schedule(plan, sampler), key=lambda run: len(run.steps.first))
    state = loop.grow(loop.start(random_weights(config.model), config.model, sampler, plan.order), run.shape)
    lowered = loop.decode_run.lower(random_weights(config.model), state, run.steps, loop.Draw(uniforms),
                                    config.model, sampler, run.shape)
    compiled = lowered.compile()
    text = compiled.as_text()
    heads, size = config.model.heads, config.model.head_size
    for cache in (f"f32[{BATCH},{heads},{size},{LENGTH}]", f"f32[{BATCH},{heads},{LENGTH},{size}]"):
        assert cache in text  # or the search below finds nothing for the wrong reason
        assert not re.findall(rf"= {re.escape(cache)}\S* (copy|copy-start)\(", text)
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased >= sum(x.nbytes for x in jax.tree.leaves(state.cache)), "the state is not donated"


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("name", ["esolm", "esolm_a", "ar", "bd3lm", "mdlm"])
def test_no_loop_whose_turns_are_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each turn of such a loop would wait for the host. Of all programs of `sample` and `score --plan`, with
    logits in chunks, attention in tiles and a nucleus."""
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(attention, "TILE", {"cpu": 1})
    monkeypatch.setattr(attention, "FEW_QUERIES", 1)
    config = tiny_config(name, 12, vocab_size=11, **({"block_size": 4} if name == "bd3lm" else {}))
    family, weights = families.get(config), random_weights(config.model)
    plan = family.plan(jax.random.key(0), config, 2, 6)
    sampler, key, rows = family.sampler(config), jax.random.key(0), jnp.arange(2)
    state, uniforms = loop.start(weights, config.model, sampler, plan.order), loop.draw_uniforms(key, rows, 12)
    programs = [loop.draw_uniforms.lower(key, rows, 12)]
    programs += [jax.jit(function).lower(plan.order, plan.order) for function in (sort, unsort)]
    run = max(loop.schedule(plan, sampler), key=lambda run: (len(run.steps.first), run.shape))
    state = loop.grow(state, run.shape)
    scored = dataclasses.replace(state, logp=uniforms[..., 0])
    for begin, source in ((state, loop.Draw(uniforms, Rule(top_p=0.9, min_p=0.01))), (scored, loop.Score(plan.order))):
        programs.append(loop.decode_run.lower(weights, begin, run.steps, source, config.model, sampler, run.shape))
    whiles = [line for program in programs for line in program.compile().as_text().splitlines() if " while(" in line]
    assert len(whiles) >= 3 and all("known_trip_count" in line for line in whiles)
