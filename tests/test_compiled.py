"""What the compiled sampler does with memory: the cache is updated in place, never copied."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from conftest import random_weights, tiny_config
from eso_jax import families
from eso_jax.decoding import loop
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.plan import Plan, left_to_right

BATCH, LENGTH = 3, 40


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("name", ["esolm", "esolm_a", "ar", "bd3lm"])
def test_no_copy_the_size_of_the_cache(name: str) -> None:
    config = tiny_config(name, LENGTH, **({"block_size": 4} if name == "bd3lm" else {}))
    plan: Plan = left_to_right(BATCH, LENGTH)
    sampler = families.get(config).sampler(config)
    steps, runs = loop.schedule(plan, sampler)
    uniforms = loop.draw_uniforms(jax.random.key(0), jnp.arange(BATCH), LENGTH)
    run = max(runs, key=lambda run: run.high - run.low)
    state = loop.grow(loop.start(random_weights(config.model), config.model, sampler, plan.order), run.shape)
    lowered = loop.decode_run.lower(random_weights(config.model), state, steps, run.low, run.high, uniforms,
                                    config.model, sampler, Rule(), run.shape)
    compiled = lowered.compile()
    text = compiled.as_text()
    heads, size = config.model.heads, config.model.head_size
    for cache in (f"f32[{BATCH},{heads},{size},{LENGTH}]", f"f32[{BATCH},{heads},{LENGTH},{size}]"):
        assert cache in text  # or the search below finds nothing for the wrong reason
        assert not re.findall(rf"= {re.escape(cache)}\S* (copy|copy-start)\(", text)
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased >= sum(x.nbytes for x in jax.tree.leaves(state.cache)), "the state is not donated"
