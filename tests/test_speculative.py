"""Speculation by a real model: its cache, its rows, its ends, its record, and what it refuses. (Its law is held against
an oracle in tests/conformance/test_speculation.py.)"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eso_jax import families, likelihood, sharding
from eso_jax.decoding import decoders, loop, speculative
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.loop import Draw
from eso_jax.decoding.plan import left_to_right
from eso_jax.decoding.speculative import Speculative
from eso_jax.errors import EsoError
from eso_jax.model import cache as kv, transformer
from eso_jax.model.masks import CAUSAL, View
from test_given import MASK, model_of, prompts
from test_sampling import CONFIG, LENGTH, WEIGHTS

RULE = Rule(temperature=0.7, top_p=0.95)


def test_a_row_is_the_same_in_any_company() -> None:
    """Given nothing, something or everything: alone and among others."""
    model, given, how = model_of("esolm"), prompts("esolm"), {"temperature": 0.8, "seed": 5, "decoder": "speculative:3"}
    whole = model.sample(2, given=given, **how)
    assert whole.tokens.max() < MASK and (whole.tokens[whole.given] == np.repeat(given, 2, axis=0)[whole.given]).all()
    assert whole.passes[6:8].tolist() == [0, 0] and (whole.passes[:2] < LENGTH).all()  # all is given, and nothing
    alone = model.sample(2, given=given[::-1], batch_size=1, **how)
    for name in ("tokens", "passes"):
        there = getattr(alone, name).reshape(5, 2, -1)[::-1].reshape(10, -1)
        np.testing.assert_array_equal(there, getattr(whole, name).reshape(10, -1))


def test_a_rows_own_k_is_the_same_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose k differ, in a program that has room for the largest: tokens, log p and passes, alone and together.
    The page is told what a row's passes compute alone."""
    jax.clear_caches()  # of programs of another pace
    for module in (decoders, speculative):
        monkeypatch.setattr(module, "PACE", 1)
    found, adapt = list[list[int]](), Speculative.adapt

    def seen(self: Speculative, progress: decoders.Progress, noted: Any,
             left: np.ndarray) -> tuple[Speculative, decoders.Progress]:
        decoder, progress = adapt(self, progress, noted, left)
        really = np.asarray(progress.at) < LENGTH
        assert (left | ~really).all()
        found.extend([[decoder.drafts, *progress.memory.wanted[really].tolist()]] * bool(really.any()))
        return decoder, progress

    monkeypatch.setattr(Speculative, "adapt", seen)
    model, given = model_of("esolm"), prompts("esolm")[:3]
    how = {"temperature": 1.5, "seed": 5, "decoder": "speculative", "record": True}
    whole = model.sample(2, given=given, **how)
    assert any(len(set(each[1:])) > 1 for each in found)
    found.clear()
    alone = model.sample(2, given=given, batch_size=1, **how)
    np.testing.assert_array_equal(alone.tokens, whole.tokens)
    np.testing.assert_array_equal(alone.passes, whole.passes)
    assert whole.record is not None and alone.record is not None and alone.caption is not None
    np.testing.assert_allclose(alone.record.logp, whole.record.logp, atol=1e-5)
    windows = [row[:passes] for row, passes in zip(alone.caption.window, alone.passes, strict=True)]
    assert [(high - low - 2) // 3 for row in windows for low, high in row] == [drafts for drafts, _ in found]
    assert len({drafts for drafts, _ in found}) > 1
    jax.clear_caches()


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("name", ["speculative:2", "speculative", "entropy:1", "likeliest:1"])
def test_the_host_reads_while_the_next_passes_are_at_work(name: str, cpu: bool,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """After the beginning, what it reads is of the passes before the last, but on a CPU. At most one loop decodes
    nothing: none where each pass decodes one token, so that the end is known."""
    jax.clear_caches()
    monkeypatch.setattr(decoders, "host_is_device", lambda: cpu)
    monkeypatch.setattr(decoders, "PACE", 3)
    events, ours = list[str | int](), dict[int, int]()  # a loop was begun, or the rows after this one were read
    fetch, passes, at = sharding.fetch, decoders.decode_passes, list[int]()

    def fetched(tree: Any) -> Any:
        if isinstance(tree, tuple) and id(tree[0]) in ours:
            events.append(ours[id(tree[0])])
        return fetch(tree)

    def begun(*arguments: Any) -> decoders.Progress:
        events.append("begin")
        return passes(*arguments)

    decoder, plan = decoders.named(name), left_to_right(2, LENGTH)
    sampler = families.get(CONFIG).sampler(CONFIG)
    source = Draw(loop.uniforms_of(jax.random.key(1), plan, decoder.uniforms), RULE)
    copy, kept = jnp.copy, []

    def copied(x: jax.Array) -> jax.Array:
        kept.append(copy(x))  # ids stay theirs
        ours[id(kept[-1])] = events.count("begin")
        return kept[-1]

    monkeypatch.setattr(sharding, "fetch", fetched)
    monkeypatch.setattr(decoders, "decode_passes", begun)
    monkeypatch.setattr(decoders.jnp, "copy", copied)
    progress = decoders.start(WEIGHTS, CONFIG.model, sampler, plan, source, decoder)
    for progress in decoders.until_done(WEIGHTS, CONFIG.model, sampler, plan, progress, source, decoder):
        at.append(int(progress.at.min()))
    late = 0 if cpu else 1
    assert events == [0, *(event for number in range(1, len(at) + 1) for event in ("begin", number - late))]
    assert at[-1] == LENGTH and (at.count(LENGTH) == 1 if cpu or name == "likeliest:1" else at.count(LENGTH) <= 2)
    jax.clear_caches()


@pytest.mark.parametrize("drafts", [1, 4])
def test_the_cache_is_exact(drafts: int) -> None:
    """It holds what a pass over the decoded tokens gives; refused drafts and masks have left nothing."""
    sampler, decoder = families.get(CONFIG).sampler(CONFIG), Speculative(drafts)
    plan = families.get(CONFIG).plan(jax.random.key(0), CONFIG, 4, 1, 0.5, "one-by-one")
    source = Draw(loop.uniforms_of(jax.random.key(1), plan, decoder.uniforms), RULE)
    progress = decoders.start(WEIGHTS, CONFIG.model, sampler, plan, source, decoder)
    for progress in decoders.until_done(WEIGHTS, CONFIG.model, sampler, plan, progress, source, decoder):
        pass
    _, whole = transformer.trunk(WEIGHTS, progress.state.tokens, progress.state.positions, View(CAUSAL),
                                 kv.empty(CONFIG.model, 4, LENGTH), 0)
    assert progress.at.tolist() == [LENGTH] * 4 and progress.passes.max() < LENGTH
    cache, there = progress.state.cache, np.arange(LENGTH - 1)  # nobody needs the last token's
    for ours, theirs, axis in ((cache.keys, whole.keys, -1), (cache.values, whole.values, -2)):
        for mine, full in zip(ours, theirs, strict=True):
            mine, full = (np.take(np.asarray(x), there, axis) for x in (mine, full))
            np.testing.assert_allclose(mine, full, atol=1e-5)


@pytest.mark.slow
def test_a_record_is_the_law_of_one_token_a_pass() -> None:
    model = model_of("esolm")
    found = model.sample(2, given=prompts("esolm"), decoder=Speculative(3), temperature=0.7, record=True)
    assert found.record is not None
    expected = likelihood.plan_log_prob(model, found.tokens, found.plan)
    np.testing.assert_allclose(np.take_along_axis(found.record.logp, found.order, axis=1), expected, atol=1e-5)
    assert found.tokens_per_step.max() == 1 and found.tokens_per_pass.max() > 1
    assert (found.tokens_per_pass.sum(1) == (~found.given).sum(1)).all()
    np.testing.assert_array_equal(found.record.step.max(1) + 1, found.passes)
    assert ((found.record.step < 0) == found.given).all()
    assert '"passes":' + str(found.passes.max()) in found.show()


@pytest.mark.slow
def test_greedy_is_one_by_one() -> None:
    """Where a row ends, too: fewer tokens are left than drafts, or none."""
    model, how = model_of("esolm"), {"temperature": 0.0, "banned": [5], "given": prompts("esolm"), "max_tokens": 5}
    one, many = model.sample(1, plan="one-by-one", **how), model.sample(1, decoder="speculative:16", **how)
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_array_equal(many.tokens_per_step, one.tokens_per_step)
    assert (many.passes <= one.passes).all() and many.passes.max() < 5


def test_it_ends_when_all_rows_are_done() -> None:
    model, seen = model_of("esolm"), list[int]()

    def watch(rows: np.ndarray, tokens: np.ndarray) -> None:
        seen.append(int((tokens != MASK).sum()))

    whole = model.sample(2, decoder="speculative:1", watch=watch)
    assert len(seen) > 0 and seen[-1] == whole.tokens.size
    assert model.sample(2, decoder="speculative:1", done=lambda *_: np.ones(2, bool)).passes.max() <= 2 * loop.PACE


@pytest.mark.usefixtures("no_shape_checks")
def test_no_loop_waits_for_data() -> None:
    """And the cache is not copied."""
    decoder, plan = Speculative(2), left_to_right(2, LENGTH)
    sampler = families.get(CONFIG).sampler(CONFIG)
    source = Draw(loop.uniforms_of(jax.random.key(1), plan, decoder.uniforms), Rule(top_p=0.9))
    progress = decoders.start(WEIGHTS, CONFIG.model, sampler, plan, source, decoder)
    compiled = decoders.decode_passes.lower(WEIGHTS, progress, source, jnp.full(2, LENGTH), CONFIG.model, sampler,
                                            decoder).compile()
    text, cache = compiled.as_text(), f"f32[2,{CONFIG.model.heads},{CONFIG.model.head_size},{LENGTH + decoder.window}]"
    whiles = [line for line in text.splitlines() if " while(" in line]
    assert whiles and all("known_trip_count" in line for line in whiles)
    assert cache in text and not re.findall(rf"= {re.escape(cache)}\S* copy\(", text)
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(
        x.nbytes for x in jax.tree.leaves(progress.state.cache)), "the progress is not donated"


@pytest.mark.parametrize("name", ["ar", "esolm_a", "mdlm", "bd3lm"])
def test_who_has_no_decoder(name: str) -> None:
    said = "has no exact conditionals" if name == "mdlm" else "decodes along a plan alone"
    with pytest.raises(EsoError, match=f"family.name = '{name}' {said}"):
        model_of(name).sample(1, decoder="speculative:4")


@pytest.mark.parametrize(("text", "message"), [
    ("guess:4", "decoder = 'guess:4': choose one of speculative, speculative:NUMBER"),
    ("entropy", "decoder = 'entropy': needs a number, as in entropy:1"),
    ("speculative:x", "needs a number"), ("speculative:2.5", "must be a whole number"),
    ("speculative:0", "decoder = 'speculative:0': the number of drafts must be in 1..64"),
    ("speculative:65", "decoder = 'speculative:65': the number of drafts must be in 1..64")])
def test_decoders_that_there_are_not(text: str, message: str) -> None:
    with pytest.raises(EsoError, match=message):
        decoders.named(text)
