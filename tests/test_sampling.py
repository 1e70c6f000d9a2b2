"""The decoding loop: every sampler is its family's training pass, the cache is exact, the compiled loop equals a plain
one, and draws know only their row."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import brief, engine, random_tokens, random_weights, tiny_config
from eso_jax import families
from eso_jax.config import Config
from eso_jax.decoding import categorical, check, decoders, loop, passes as passes_of_plans
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.order import random_then_ascending, sort, unsort
from eso_jax.decoding.passes import schedule
from eso_jax.decoding.plan import Plan, binomial, left_to_right, within_blocks
from eso_jax.errors import EsoError
from eso_jax.families import ar, bd3lm, mdlm
from eso_jax.model import plain
from eso_jax.model.params import Weights

LENGTH, BLOCK = 12, 4
NAMES = ["esolm", "esolm_a", "ar", "mdlm", "bd3lm"]
CONFIGS: dict[str, Config] = {
    name: tiny_config(name, LENGTH, **({"block_size": BLOCK} if name == "bd3lm" else {})) for name in NAMES}
CONFIG = CONFIGS["esolm"]
WEIGHTS = random_weights(CONFIG.model)


def plan_of(name: str, seed: int, batch: int, cuts: list[bool], alpha_0: float = 1.0) -> Plan:
    """A plan that the family can follow, with steps that end where `cuts` says (LENGTH - 1 flags)."""
    if name == "ar":
        return left_to_right(batch, LENGTH)
    if name == "bd3lm":
        order = within_blocks(jax.random.key(seed), batch, LENGTH, BLOCK, "one-by-one", 1).order
        cuts = [cut or (slot + 1) % BLOCK == 0 for slot, cut in enumerate(cuts)]
        diffusion = LENGTH
    else:
        diffusion = round(alpha_0 * LENGTH)
        keys = jax.random.split(jax.random.key(seed), batch)
        order = jnp.stack([random_then_ascending(key, LENGTH, diffusion) for key in keys])
        cuts = [cut or slot + 1 >= diffusion for slot, cut in enumerate(cuts)]
    edges = [0, *(slot + 1 for slot, cut in enumerate(cuts) if cut), LENGTH]
    return Plan(order, np.diff(edges), diffusion)


def any_cuts() -> st.SearchStrategy[list[bool]]:
    return st.lists(st.booleans(), min_size=LENGTH - 1, max_size=LENGTH - 1)


CUTS = [bool(slot % 3) for slot in range(LENGTH - 1)]  # steps of 1, 1, 2, 1, 2, ...


def logits_pair(name: str, plan: Plan, x: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    config = CONFIGS[name]
    sampler = families.get(config).sampler(config)
    return list(zip(check.forced_logits(WEIGHTS, config.model, sampler, plan, x),
                    check.uncached_logits(WEIGHTS, config.model, sampler, plan, x), strict=True))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NAMES), cuts=any_cuts(), batch=st.integers(1, 8),
       alpha_0=st.sampled_from([0.0, 0.25, 0.5, 1.0]), seed=st.integers(0, 99))
def test_cached_logits_equal_uncached(name: str, cuts: list[bool], batch: int, alpha_0: float, seed: int) -> None:
    """To 1e-5 of the largest logit (about 5: at width 16 some rows amplify rounding to 2e-5)."""
    plan = plan_of(name, seed, batch, cuts, alpha_0)
    pairs = logits_pair(name, plan, sort(random_tokens(CONFIG, batch, seed), plan.order))
    for step, (cached, uncached) in enumerate(pairs):
        assert cached.shape == (batch, plan.tokens_per_step[step], CONFIG.model.vocab_size)
        largest = float(jnp.abs(uncached[..., :CONFIG.model.mask]).max())
        np.testing.assert_allclose(cached, uncached, atol=1e-5 * largest, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 5])
def test_a_step_of_several_passes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are those of one pass without a cache, and given tokens get the same log p."""
    plan = Plan(plan_of("esolm", 0, 2, CUTS).order, np.array([1, 6, 1, 4]))
    x = sort(random_tokens(CONFIG, 2), plan.order)
    before = families.plan_log_prob(WEIGHTS, CONFIG, plan, unsort(x, plan.order))
    monkeypatch.setattr(passes_of_plans, "_cheapest_sizes",
                        lambda needed, _, *window: np.full(len(needed), size if window else 2))
    assert sum(len(run.steps.first) for run in schedule(plan, families.get(CONFIG).sampler(CONFIG))) > 6
    for cached, uncached in logits_pair("esolm", plan, x):
        np.testing.assert_allclose(cached, uncached, atol=5e-5, rtol=1e-5)
    after = families.plan_log_prob(WEIGHTS, CONFIG, plan, unsort(x, plan.order))
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_differences_between_logits() -> None:
    """Without the mask's; and not a number is not small."""
    ours, theirs = np.zeros((2, 1, 3)), np.array([[[1.0, -4, 9e9]], [[2, 2, 0]]])
    found = check.compare([jnp.asarray(ours)], [jnp.asarray(theirs)], 2)
    assert (found.worst, found.largest, found.relative) == (4, 4, 1)
    nan = check.compare([jnp.asarray(ours * np.nan)] * 2, [jnp.asarray(theirs)] * 2, 2)
    assert not nan.relative <= 1
    assert check.compare([jnp.asarray(ours)], [jnp.asarray(ours)], 2).relative == 0


@pytest.mark.slow
def test_a_cache_that_is_late_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What eso-jax check-cache prints is small for our cache, and large for one whose keys are written a slot late."""
    config = tiny_config(length=LENGTH, vocab_size=10)  # compiled for nobody else
    sampler, weights = families.get(config).sampler(config), random_weights(config.model)
    plan = plan_of("esolm", 0, 2, CUTS)
    x = sort(random_tokens(config, 2), plan.order)
    arguments = (engine(config, weights), sampler, plan, np.asarray(x))
    assert check.cache_error(*arguments).relative < 1e-5 and check.batch_error(*arguments, size=1).relative < 1e-5
    write = jax.lax.dynamic_update_slice_in_dim
    monkeypatch.setattr(jax.lax, "dynamic_update_slice_in_dim",
                        lambda x, new, start, axis: write(x, new, start + (x.ndim == 4), axis))
    jax.clear_caches()
    assert check.cache_error(*arguments).relative > 1e-3
    jax.clear_caches()


def training_nll(name: str, plan: Plan, first: int, tokens: jax.Array) -> jax.Array:
    """-log p by slot of the family's training pass with the slots from `first` masked."""
    config, order = CONFIGS[name], plan.order
    masked = unsort(jnp.broadcast_to(jnp.arange(LENGTH) >= first, order.shape), order)
    if name == "ar":
        return ar.next_token_nll(WEIGHTS, config, ar.shift(config, tokens), tokens)
    if name == "mdlm":
        return sort(mdlm.masked_nll(WEIGHTS, config, tokens, masked), order)
    if name == "bd3lm":
        return sort(bd3lm.masked_nll(WEIGHTS, config, tokens, masked), order)
    if first < plan.diffused:
        return families.get(config).diffusion_nll(WEIGHTS, config, tokens, masked, order)
    masked = unsort(jnp.broadcast_to(jnp.arange(LENGTH) >= plan.diffused, order.shape), order)
    return families.get(config).sequential_nll(WEIGHTS, config, tokens, masked, order)


@pytest.mark.slow
@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_training_pass(name: str, alpha_0: float) -> None:
    """What a sampler gives a token is what the pass behind the family's loss gives it, which the goldens pin down."""
    plan, tokens = plan_of(name, 3, 2, CUTS, alpha_0), random_tokens(CONFIG, 2)
    ours = families.plan_log_prob(WEIGHTS, CONFIGS[name], plan, tokens)
    for first, count in zip(plan.first.tolist(), plan.tokens_per_step.tolist(), strict=True):
        slots = slice(first, first + count)
        np.testing.assert_allclose(ours[:, slots], -training_nll(name, plan, first, tokens)[:, slots], atol=1e-5)


def test_one_token_per_step_chains_into_the_exact_likelihood() -> None:
    plan, tokens = plan_of("esolm", 1, 4, [True] * (LENGTH - 1)), random_tokens(CONFIG, 4)
    stepwise = families.plan_log_prob(WEIGHTS, CONFIG, plan, tokens)
    exact = families.get(CONFIG).log_likelihood(WEIGHTS, CONFIG, tokens, plan.order)
    np.testing.assert_allclose(stepwise, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "tiled"), [("esolm", False), ("esolm", True), ("ar", False)])
def test_a_plan_is_scored_in_one_pass(name: str, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its steps score it, tokens and gradients; also where attention is tiled."""
    if tiled:
        monkeypatch.setattr(plain, "FEW_QUERIES", 1)
        monkeypatch.setattr(plain, "TILE", {"cpu": 2 * 2 * LENGTH * 3})  # 3 queries
    plan, tokens = plan_of(name, 3, 2, CUTS, 0.5), random_tokens(CONFIG, 2)
    config = CONFIGS[name].override(f"model.dropout={0.01 * tiled}")  # whose programs are its own
    stepwise = families.plan_log_prob(WEIGHTS, CONFIGS[name], plan, tokens)
    np.testing.assert_allclose(families.plan_log_likelihood(WEIGHTS, config, plan, tokens), stepwise, atol=1e-5)

    def reward(weights: Weights) -> jax.Array:
        return (families.plan_log_likelihood(weights, config, plan, tokens) * jnp.arange(LENGTH)[None]).mean()

    def reward_by_steps(weights: Weights) -> float:
        logp = families.plan_log_prob(weights, CONFIGS[name], plan, tokens)
        return float((np.asarray(logp, np.float64) * np.arange(LENGTH)).mean())

    gradient = jax.grad(reward)(WEIGHTS)
    norm = float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))))
    step = 1e-2 / norm
    ahead, behind = (jax.tree.map(lambda w, g, by=by: w + by / norm * g, WEIGHTS, gradient) for by in (step, -step))
    assert (reward_by_steps(ahead) - reward_by_steps(behind)) / (2 * step) == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("name", ["esolm_a", "mdlm", "bd3lm"])
def test_a_plan_whose_steps_change_earlier_tokens_takes_a_pass_each(name: str) -> None:
    with pytest.raises(EsoError, match=f"family.name = '{name}': the likelihood of a plan takes a pass per step"):
        families.plan_log_likelihood(WEIGHTS, CONFIGS[name], plan_of(name, 3, 2, CUTS), random_tokens(CONFIG, 2))


def python_loop(name: str, plan: Plan, key: jax.Array, rule: Rule) -> np.ndarray:
    """The sampler without a cache, a compiled loop, windows or runs."""
    config = CONFIGS[name]
    sampler = families.get(config).sampler(config)
    x = np.full(plan.order.shape, CONFIG.model.mask, np.int32)
    keys = [jax.random.fold_in(key, row) for row in range(len(x))]
    for step, (first, count) in enumerate(zip(plan.first.tolist(), plan.tokens_per_step.tolist(), strict=True)):
        passes = check.uncached_logits(WEIGHTS, CONFIG.model, sampler, plan, jnp.asarray(x))
        logits = next(logits for index, logits in enumerate(passes) if index == step)
        for row, slot in np.ndindex(len(x), count):
            uniforms = jax.random.uniform(jax.random.fold_in(keys[row], first + slot), (2,))
            x[row, first + slot] = categorical.draw(logits[row, slot], uniforms, rule)
    out = np.zeros_like(x)
    np.put_along_axis(out, np.asarray(plan.order), x, axis=1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "alpha_0", "rule"), [
    ("esolm", 0.0, Rule()), ("esolm", 0.5, Rule(temperature=0.7, top_p=0.9)), ("esolm", 1.0, Rule(min_p=0.1)),
    ("esolm_a", 0.5, Rule()), ("mdlm", 1.0, Rule(top_p=0.8)), ("ar", 0.0, Rule()), ("bd3lm", 1.0, Rule()),
    ("esolm", 0.5, Rule(temperature=0.0))])
def test_compiled_loop_equals_a_python_loop(name: str, alpha_0: float, rule: Rule) -> None:
    plan, key = plan_of(name, 5, 3, CUTS, alpha_0), jax.random.key(7)
    np.testing.assert_array_equal(families.sample(WEIGHTS, CONFIGS[name], plan, key, rule),
                                  python_loop(name, plan, key, rule))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_know_their_batch(name: str) -> None:
    plan, key = plan_of(name, 2, 6, CUTS, 0.5), jax.random.key(3)
    whole = families.sample(WEIGHTS, CONFIGS[name], plan, key)
    part = plan.rows(np.arange(4, 6))
    keys = loop.row_keys(key, 4 + jnp.arange(2))
    np.testing.assert_array_equal(whole[4:], families.sample(WEIGHTS, CONFIGS[name], part, keys))


@pytest.mark.parametrize("name", brief(NAMES, "esolm"))
def test_rows_of_logits_are_chosen_pass_by_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the head costs most; tokens and scores are those of loops of one width."""
    config = tiny_config(name, LENGTH, vocab_size=400, **({"block_size": BLOCK} if name == "bd3lm" else {}))
    weights, plan, key = random_weights(config.model), plan_of(name, 4, 2, CUTS), jax.random.key(1)
    sampler = families.get(config).sampler(config)
    rows, draw = list[int](), categorical.draw
    monkeypatch.setattr(categorical, "draw", lambda logits, *rest: rows.append(logits.shape[1]) or draw(logits, *rest))
    found = families.sample(weights, config, plan, key)
    logp = loop.log_prob(weights, config.model, sampler, plan, found)
    loop.decode_run.clear_cache()
    branches = len(rows)
    monkeypatch.setattr(passes_of_plans, "switches", lambda _: False)
    np.testing.assert_array_equal(families.sample(weights, config, plan, key), found)
    np.testing.assert_allclose(loop.log_prob(weights, config.model, sampler, plan, found), logp, rtol=1e-5, atol=1e-5)
    assert (branches > len(rows) - branches) == (name != "ar")  # whose steps are of one token


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), cuts=any_cuts(), alpha_0=st.sampled_from([0.0, 0.5, 1.0]), batch=st.integers(1, 2),
       size=st.sampled_from([None, 1, 2, 3, 5]), row=st.sampled_from([0.5, 2.0]))
def test_schedule_covers_every_step(name: str, cuts: list[bool], alpha_0: float, batch: int, size: int | None,
                                    row: float) -> None:
    """Each slot is decoded once. Then the last pass over every slot before its step came after that was decoded, and
    over its step's own slots before any of them was; whatever windows are rounded to, cut into and filled up with."""
    plan = plan_of(name, 0, batch, cuts, alpha_0)
    sampler = families.get(CONFIGS[name]).sampler(CONFIGS[name])
    shift, live = sampler.shift, 0
    known = np.arange(LENGTH + shift) < shift  # tokens of the input
    passed = np.full(LENGTH, -1)  # which slots have passed: 0 as masks, 1 as tokens
    with pytest.MonkeyPatch.context() as patch:
        if size is not None:  # windows of any size, and single rows of logits
            patch.setattr(passes_of_plans, "_cheapest_sizes",
                          lambda needed, _, *window: np.full(len(needed), size if window else 1))
        runs = schedule(plan, sampler, row=row)
    for run in runs:
        assert live <= run.shape.live <= LENGTH
        live = run.shape.live
        for index in range(len(run.steps.first)):
            step = jax.tree.map(lambda x, i=index: np.asarray(x[i]), run.steps)
            taken, end = int(loop.taken_from(step, run.shape)), step.start + run.shape.window
            assert 0 <= step.start <= taken <= step.first and end <= live
            passed[step.start:end] = known[step.start:end]
            if step.count:
                stop, begin = step.first + step.count, plan.first[plan.first <= step.first].max()
                assert stop <= taken + run.shape.width <= end
                assert (passed[:begin + shift] == 1).all() and (passed[begin + shift:stop] == 0).all()
                assert not known[step.first + shift:stop + shift].any()
                known[step.first + shift:stop + shift] = True
    assert known.all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_uncached(name: str) -> None:
    """Every clean slot before a window was in a window after it was decoded."""
    plan = plan_of(name, 0, 1, CUTS, 0.5)
    sampler = families.get(CONFIGS[name]).sampler(CONFIGS[name])
    if not sampler.cached:
        return
    start, stop = sampler.window(plan)
    written = 0  # slots whose cache entries are those of clean tokens
    for index in range(plan.nfe):
        assert start[index] <= written + sampler.shift and start[index] <= plan.first[index]
        written = max(written, min(plan.first[index], stop[index]))


@pytest.mark.parametrize(("platform", "batch"), [("cpu", 1), ("gpu", 64)])
@pytest.mark.parametrize(("steps", "most", "more"), [(128, 8, 0.61), (1024, 8, 0.75)])
def test_binomial_plans_need_few_programs(steps: int, most: int, more: float, platform: str, batch: int,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """At L = 1024 and alpha_0 = 1, over 20 seeds: loops of a plan, slots more than needed (0.45 and 0.57 on average),
    and programs of all.

    At T = 128 the best 8 stretches of any windows, by a search of all, need 39% more in a pass a step, 32% by the cost
    of passes here. In 8 loops of one length it is 35% with 15 windows, and about 40% with three, for which there are 12
    programs. Windows of 8 need fewer than 30% more, in 2.5 times as many passes: slower.

    On a GPU slots are nearly free at batch 1: more are taken there (at most 1.63) for fewer passes, by 28 programs.
    """
    monkeypatch.setattr(passes_of_plans.sharding, "platform", lambda: platform)
    sampler, programs = families.get(CONFIG).sampler(CONFIG), set()
    for seed in range(20):
        plan = binomial(jax.random.key(seed), batch, 1024, steps, 1.0)
        runs, (begin, stop) = schedule(plan, sampler), sampler.window(plan)
        slots = sum(len(run.steps.start) * run.shape.window for run in runs)
        assert len(runs) <= most and slots <= (1 + more) * (stop - begin).sum()
        assert {run.shape.live for run in runs} == {256, 512, 768, 1024}
        programs |= {(run.shape, len(run.steps.start)) for run in runs}
    assert len(programs) <= 12


@pytest.mark.parametrize("name", ["esolm", "ar", "bd3lm", "mdlm"])
def test_one_token_per_pass_takes_no_more_passes(name: str) -> None:
    config = tiny_config(name, 512, **({"block_size": BLOCK} if name == "bd3lm" else {}))
    policy = "left-to-right" if name == "ar" else "one-by-one"
    plan = families.get(config).plan(jax.random.key(0), config, 1, 512, 0.0 if name == "ar" else 1.0, policy)
    runs = schedule(plan, families.get(config).sampler(config))
    assert 512 <= sum(len(run.steps.start) for run in runs) <= 512 + 2 * (name == "bd3lm")
    assert len({(run.shape, len(run.steps.start)) for run in runs}) <= (4 if name == "bd3lm" else 2)


def test_a_step_unlike_the_others_has_a_window_of_its_own() -> None:
    counts = np.array([1] * 200 + [512] + [1] * 312)
    runs = schedule(Plan(left_to_right(1, 1024).order, counts), families.get(CONFIG).sampler(CONFIG))
    passes = sum(len(run.steps.start) for run in runs)
    slots = sum(len(run.steps.start) * run.shape.window for run in runs)
    assert passes <= 1.1 * len(counts) and slots <= 1.3 * 2 * 1024


@pytest.mark.slow
def test_plans_share_their_programs() -> None:
    """Compilation is per shape and length: plans of other numbers of steps need few programs between them."""
    key, before = jax.random.key(0), loop.decode_run._cache_size()
    plans = [binomial(jax.random.key(seed), 3, LENGTH, 4, 0.5) for seed in range(12)]
    assert len({plan.nfe for plan in plans}) > 3
    for plan in plans:
        families.sample(WEIGHTS, CONFIG, plan, key, Rule(temperature=0.9))
    sampler = families.get(CONFIG).sampler(CONFIG)
    programs = {(run.shape, len(run.steps.first)) for plan in plans for run in schedule(plan, sampler)}
    assert loop.decode_run._cache_size() - before == len(programs) <= 13


@pytest.mark.parametrize("decoder", [None, "speculative:2"])
def test_progress_is_reported_every_few_passes(decoder: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some passes while the next ones are at work. Where nobody asks, a plan stays in few runs, and the tokens are
    the same."""
    monkeypatch.setattr(loop, "PACE", 3)
    monkeypatch.setattr(decoders, "host_is_device", lambda: False)
    module, name = (loop, "decode_run") if decoder is None else (decoders, "decode_passes")
    events, begin, plan = list[int | str](), getattr(module, name), left_to_right(3, LENGTH)

    def begun(*arguments: Any) -> Any:
        events.append("begin")
        return begin(*arguments)

    def tokens(**how: Any) -> Any:
        events.clear()
        return families.sample(WEIGHTS, CONFIG, plan, jax.random.key(0), Rule(temperature=0.9), **how)

    monkeypatch.setattr(module, name, begun)
    if decoder is None:
        told = tokens(report=events.append)
        assert events == ["begin", *["begin", 3 * 3] * (LENGTH // 3 - 1), 3 * 3]
        np.testing.assert_array_equal(told, tokens())
        assert events == ["begin"]
    else:
        tokens(report=events.append, decoder=decoders.named(decoder))
        assert events[:2] == ["begin"] * 2 and len(events) > 3
        assert sum(count for count in events if isinstance(count, int)) == 3 * LENGTH


def test_positions_matter_not_slots() -> None:
    """The same tokens in the same order at other positions give other logits: rotary angles follow the order."""
    x = random_tokens(CONFIG, 1)
    natural = left_to_right(1, LENGTH)
    reversed_ = Plan(natural.order[:, ::-1], natural.tokens_per_step)
    logits = [logits_pair("esolm", plan, x)[3][0] for plan in (natural, reversed_)]
    assert float(jnp.abs(logits[0] - logits[1]).max()) > 1e-2


def test_ar_start_token() -> None:
    plan = left_to_right(64, LENGTH)
    first = [families.sample(WEIGHTS, tiny_config("ar", LENGTH, start_id=start), plan, jax.random.key(0))
             for start in (2, 3)]
    assert (first[0][:, 0] != first[1][:, 0]).any()
    assert int(first[0].max()) < CONFIG.model.mask


@pytest.mark.parametrize(("name", "plan", "message"), [
    ("ar", functools.partial(binomial, jax.random.key(0), 1, LENGTH, 4, 1.0), "one token per step, left to right"),
    ("bd3lm", functools.partial(binomial, jax.random.key(0), 1, LENGTH, 4, 1.0), "blocks of 4 left to right"),
    ("bd3lm", lambda: Plan(left_to_right(1, LENGTH).order, np.array([3, 3, 3, 3])), "may leave its block")])
def test_plans_that_a_family_cannot_follow_are_refused(name: str, plan: functools.partial[Plan], message: str) -> None:
    with pytest.raises(EsoError, match=message):
        families.sample(WEIGHTS, CONFIGS[name], plan(), jax.random.key(0))
