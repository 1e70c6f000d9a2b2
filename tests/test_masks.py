"""Who sees whom: the truth tables of masks.py, and the same patterns read off the gradients of every attention."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import brief
from eso_jax.config import ModelConfig
from eso_jax.model import attention, cache, masks, plain, transformer
from eso_jax.model.backend import Task
from eso_jax.model.cudnn import CuDNN
from eso_jax.model.masks import View
from eso_jax.model.params import Weights, fold, init_params, unstack

PLAIN = plain.Plain()
TABLES: dict[str, list[dict[str, int]]] = {  # function -> the arguments of the tables in its docstring, left to right
    "everyone": [{}], "causal": [{}], "prefix": [{"clean": 2}], "blocks_up_to": [{"block": 2}],
    "blocks_before": [{"block": 2}, {"block": 1}], "own_block": [{"block": 2}, {"block": 1}],
}
L = 8
CLEAN = np.array([0, 3, 8])  # clean tokens in each row, for the prefix
LENGTHS = np.array([1, 5, 8])  # slots of each row that may be seen


def docstring_tables(function: Callable) -> list[list[list[int]]]:
    """The tables of 0s and 1s, which stand side by side, four spaces or more apart."""
    rows = [line.strip() for line in inspect.getdoc(function).splitlines() if re.fullmatch(r"[01 ]*[01]", line.strip())]
    tables = zip(*([[int(c) for c in part.split()] for part in re.split(r" {4,}", row)] for row in rows), strict=True)
    return list(map(list, tables))


def pattern(name: str, length: int, **arguments: int) -> np.ndarray:
    slots = jnp.arange(length)
    arguments = {k: jnp.asarray(v) if k == "clean" else v for k, v in arguments.items()}
    return np.asarray(getattr(masks, name)(slots[:, None], slots[None, :], **arguments))


def test_every_mask_has_its_table() -> None:
    functions = {name for name, f in inspect.getmembers(masks, inspect.isfunction) if f.__module__ == masks.__name__}
    assert functions == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_mask_is_the_table_in_its_docstring(name: str) -> None:
    tables = docstring_tables(getattr(masks, name))
    assert [np.shape(table) for table in tables] == [(4, 4)] * len(TABLES[name])
    for table, arguments in zip(tables, TABLES[name], strict=True):
        np.testing.assert_array_equal(pattern(name, 4, **arguments), np.array(table, bool))


def test_each_place_as_if_it_came_next_is_the_table_in_its_docstring() -> None:
    view = View(masks.LONE, jnp.array([2]))
    [table] = view.table(view.pattern, jnp.arange(4)[None], jnp.arange(4))
    assert docstring_tables(masks.Lone) == [table.astype(int).tolist()]


def test_own_steps_are_the_table_in_their_docstring() -> None:
    view = View(masks.OwnSteps(length=3), jnp.array([[0, 1, 1, 0, 1, 1]]))
    [table] = view.table(view.pattern, jnp.arange(6)[None], jnp.arange(6))
    np.testing.assert_array_equal(table, np.array(docstring_tables(masks.OwnSteps)[0], bool))


def test_drafts_are_the_table_in_their_docstring() -> None:
    """Of four tokens, decoded or drafted, two of which are before the window; of two; and where there is none."""
    for clean, begin in ((4, 2), (2, 0)):
        view = View(masks.Drafts(drafts=1), jnp.array([clean]))
        [table] = view.table(view.pattern, begin + jnp.arange(5)[None], jnp.arange(begin + 5))
        np.testing.assert_array_equal(table[:, begin:], np.array(docstring_tables(masks.Drafts)[0], bool))
        assert table[:, :begin].all()
    nothing = View(masks.Drafts(drafts=1), jnp.array([0])).table(view.pattern, jnp.arange(5)[None], jnp.arange(5))[0]
    np.testing.assert_array_equal(nothing[2:], [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]])  # masks alone


@pytest.mark.slow
def test_relations_between_masks() -> None:
    """At 12 slots, where a table of four is blind: blocks of 3, and the equalities that the docstrings claim."""
    for block in (1, 3, 4, 12):
        before, own, up_to = (pattern(n, 12, block=block) for n in ("blocks_before", "own_block", "blocks_up_to"))
        np.testing.assert_array_equal(before | own, up_to)
        assert not (before & own).any()
        np.testing.assert_array_equal(own, np.kron(np.eye(12 // block), np.ones((block, block))).astype(bool))
        np.testing.assert_array_equal(up_to, np.kron(np.tri(12 // block), np.ones((block, block))).astype(bool))
    np.testing.assert_array_equal(pattern("blocks_up_to", 12, block=1), pattern("causal", 12))
    np.testing.assert_array_equal(pattern("prefix", 12, clean=0), pattern("causal", 12))
    np.testing.assert_array_equal(pattern("prefix", 12, clean=12), pattern("everyone", 12))


def two_stream_mask(block: int, clean: int | None) -> np.ndarray:
    """[2L, 2L] for slots [noisy copy, clean copy], put together from the masks."""
    up_to = pattern("blocks_up_to", L, block=block) if clean is None else pattern("prefix", L, clean=clean)
    return np.block([[pattern("own_block", L, block=block), pattern("blocks_before", L, block=block)],
                     [np.zeros((L, L), bool), up_to]])


def per_row(mask: np.ndarray) -> np.ndarray:
    return np.stack([mask] * len(CLEAN))


VIEWS: dict[str, tuple[View, np.ndarray]] = {  # who sees whom, and the mask [B, S, S] that attention must obey
    "everyone": (View(masks.EVERYONE), per_row(np.ones((L, L), bool))),
    "causal": (View(masks.CAUSAL), per_row(np.tri(L, dtype=bool))),
    "prefix": (View(masks.PREFIX, jnp.asarray(CLEAN)), np.stack([pattern("prefix", L, clean=c) for c in CLEAN])),
    "blocks": (View(masks.Pattern(4)), per_row(pattern("blocks_up_to", L, block=4))),
    "lengths": (View(masks.CAUSAL, length=jnp.asarray(LENGTHS)),
                np.stack([np.tri(L, dtype=bool) & (np.arange(L) < length) for length in LENGTHS])),
    **{f"two_streams-{block}": (View(masks.TwoStreams(block)), per_row(two_stream_mask(block, None)))
       for block in (1, 2, 4)},
    "two_streams-A": (View(masks.TwoStreams(prefix=True), jnp.asarray(CLEAN)),
                      np.stack([two_stream_mask(1, c) for c in CLEAN])),
    **{f"two_streams-{block}-skip": (View(masks.TwoStreams(block, skip=4)),
                                     per_row(two_stream_mask(block, None)[4:, 4:])) for block in (1, 2)},
    "two_streams-lengths": (View(masks.TwoStreams(2), length=jnp.asarray(LENGTHS)), np.stack(
        [two_stream_mask(2, None) & np.concatenate([np.ones(L, bool), np.arange(L) < n]) for n in LENGTHS])),
}


def random_qkv(slots: int, seed: int = 0) -> jax.Array:
    """q, k and v: [3, B, S, H, K]."""
    return jax.random.normal(jax.random.key(seed), (3, len(CLEAN), slots, 2, 4))


def sensitivity(f: Callable[..., jax.Array], *xs: jax.Array) -> list[np.ndarray]:
    """For each argument x: how f [B, S, ...] depends on it, |df / dx| [B, S, slots] over all features."""
    jacobians = jax.jit(jax.jacrev(lambda *xs: f(*xs).sum((-2, -1)), range(len(xs))))(*xs)
    rows = np.arange(len(xs[0]))
    return [np.abs(np.asarray(jacobian)[rows, :, rows]).sum((-2, -1)) for jacobian in jacobians]


@pytest.fixture(params=brief(["plain", "cudnn"], "plain"))
def view_and_mask(name: str, request: pytest.FixtureRequest,
                  monkeypatch: pytest.MonkeyPatch) -> tuple[View, np.ndarray]:
    """A view, with attention computed by a backend; by cuDNN's construction, but XLA's kernel."""
    view, mask = VIEWS[name]
    if request.param == "cudnn":
        monkeypatch.setattr(attention, "BACKENDS", (CuDNN("xla"), PLAIN))
        backend, refusals = attention.choose(Task(view.pattern, L, 4, jnp.float32))
        if backend is PLAIN:
            pytest.skip(refusals["cudnn"])
    return view, mask


@pytest.mark.parametrize("name", VIEWS)
def test_attention_depends_on_exactly_what_the_mask_shows(view_and_mask: tuple[View, np.ndarray]) -> None:
    view, mask = view_and_mask
    q, k, v = random_qkv(mask.shape[-1])
    by_key, by_value = sensitivity(lambda k, v: attention.attend(q, k, v, view), k, v)
    np.testing.assert_array_equal(by_value > 0, mask)
    # A key that is seen alone has weight 1 whatever it is.
    compared = mask & (mask.sum(-1, keepdims=True) > 1)
    np.testing.assert_array_equal(by_key[compared] > 1e-6, True)
    np.testing.assert_array_equal(by_key[~mask], 0)


@pytest.mark.parametrize("name", VIEWS)
def test_attention_equals_a_plain_softmax_under_the_mask(view_and_mask: tuple[View, np.ndarray]) -> None:
    """In float64 numpy; large scores, so that a softmax taken over each part alone would show."""
    view, mask = view_and_mask
    q, k, v = random_qkv(mask.shape[-1], seed=1) * 3
    scores = np.einsum("bshk,blhk->bhsl", *(np.asarray(x, np.float64) for x in (q, k))) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * mask[:, None]
    expected = np.einsum("bhsl,blhk->bshk", weights / weights.sum(-1, keepdims=True), np.asarray(v, np.float64))
    found = jax.jit(lambda q, k, v: attention.attend(q, k, v, view))(q, k, v)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def kept_as(keys: jax.Array, values: jax.Array) -> cache.KVCache:
    """A cache of two layers, both with these keys and values [B, L, H, K]."""
    return cache.KVCache((plain.arrange(keys, PLAIN.key_axes),) * 2,
                         (plain.arrange(values, PLAIN.value_axes),) * 2, PLAIN)


def attend(kept: cache.KVCache, layer: int, qkv: tuple[jax.Array, ...], view: View,
           offset: int) -> tuple[jax.Array, cache.KVCache]:
    """The cache's attention, with nothing turned."""
    return cache.attend(kept, layer, jnp.stack(qkv, 2), (jnp.ones(()), jnp.zeros(())), view, offset)


@pytest.mark.parametrize("offset, slots", [(0, 3), (4, 3), (2, 1)])
def test_cached_sees_what_precedes_its_window_and_is_causal_within(offset: int, slots: int) -> None:
    """The cache holds numbers everywhere: what lies in or beyond the window must not be read."""
    (q, k, v), (_, old_k, old_v) = random_qkv(slots), random_qkv(L, seed=1)

    def run(k: jax.Array, v: jax.Array, old_k: jax.Array, old_v: jax.Array) -> jax.Array:
        return attend(kept_as(old_k, old_v), 1, (q, k, v), View(masks.CAUSAL), offset)[0]

    before = np.broadcast_to(np.arange(L) < offset, (len(CLEAN), slots, L))
    within = per_row(np.tri(slots, dtype=bool))
    by_key, by_value, by_old_key, by_old_value = sensitivity(run, k, v, old_k, old_v)
    np.testing.assert_array_equal(by_old_value > 0, before)
    np.testing.assert_array_equal(by_value > 0, within)
    np.testing.assert_array_equal(by_old_key > 1e-6, before)
    alone = (offset == 0) & (np.arange(slots) == 0)[:, None]
    np.testing.assert_array_equal(by_key > 1e-6, within & ~alone)


def test_cached_writes_its_window_of_its_layer_and_nothing_else() -> None:
    (q, k, v), (_, old_k, old_v) = random_qkv(3), random_qkv(L, seed=1)
    old = kept_as(old_k, old_v)
    _, kept = attend(old, 0, (q, k, v), View(masks.CAUSAL), 4)
    new = kept_as(*(jnp.concatenate([x[:, :4], y, x[:, 7:]], axis=1) for x, y in ((old_k, k), (old_v, v))))
    for arrays, written, untouched in ((kept.keys, new.keys, old.keys), (kept.values, new.values, old.values)):
        np.testing.assert_array_equal(arrays[0], written[0])
        np.testing.assert_array_equal(arrays[1], untouched[1])


def test_a_grown_cache_holds_what_it_held() -> None:
    _, k, v = random_qkv(L)
    old = kept_as(k, v)
    grown = cache.grown(old, L + 3)
    for before, after in ((old.keys[1], grown.keys[1][..., :L]), (old.values[1], grown.values[1][:, :, :L])):
        np.testing.assert_array_equal(before, after)
    assert grown.keys[0].shape[3] == grown.values[0].shape[2] == L + 3


@pytest.mark.parametrize("name", ["causal", "blocks", "prefix"])
def test_the_cache_has_the_layout_of_its_backend(name: str) -> None:
    """One that keeps keys and values as they come: the cache follows it."""
    view, _ = VIEWS[name]

    class Other(plain.Plain):
        key_axes = value_axes = "BLHK"

        def cached(self, q: jax.Array, k: jax.Array, v: jax.Array, view: View, offset: jax.Array | int) -> jax.Array:
            used.append(k.shape)
            return super().cached(q, plain.arrange(k, "BHKL"), plain.arrange(v, "BHLK"), view, offset)

    def run(backend: plain.Plain) -> jax.Array:
        q, k, v = random_qkv(L)
        rows, _, heads, size = q.shape
        config = ModelConfig(length=L, vocab_size=2, width=heads * size, heads=heads, layers=1)
        kept = cache.grown(cache.empty(config, rows, 2, backend=backend), L)
        assert kept.slots == L
        return attend(kept, 0, (q, k, v), view, 0)[0]

    used: list[tuple[int, ...]] = []
    np.testing.assert_array_equal(run(Other()), run(PLAIN))
    assert used == [(len(CLEAN), L, 2, 4)]


MODEL = ModelConfig(length=L, vocab_size=2 * L, width=16, layers=2, heads=2, cond_dim=8)


@functools.cache
def weights() -> Weights:
    """Random, drawn by numpy: compiling an initialization would take longer than all that is tested here."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)
    return unstack(jax.jit(lambda params: fold(MODEL, params))(params))


def trunk_sensitivity(view: Callable[[jax.Array], View], slots: int, arguments: object = (0,),
                      **options: object) -> np.ndarray:
    """For each of `arguments` to `view`: how the hidden states of two random layers depend on the embedded inputs.

    Token j is slot j, so that the inputs are the embedding table.
    """
    slot = jnp.arange(slots)[None]
    features = jnp.cos(jnp.arange(16.0))  # the plain sum over a normalized vector's features would tell nothing

    def hidden(embedding: jax.Array, argument: jax.Array) -> jax.Array:
        table = Weights(embedding, weights().blocks, weights().head)
        return transformer.trunk(table, slot, slot, view(argument), **options)[0][0] @ features

    jacobians = jax.jit(jax.vmap(jax.jacrev(hidden), (None, 0)))
    return np.abs(jacobians(weights().embedding[:slots], jnp.asarray(arguments))).sum(-1)


@pytest.mark.parametrize("name", ["causal", "blocks", "two_streams-1", "two_streams-2"])
def test_trunk_depends_on_exactly_what_the_mask_shows(name: str) -> None:
    """However deep: these masks are transitive."""
    view, masks_of_rows = VIEWS[name]
    mask = masks_of_rows[0]
    np.testing.assert_array_equal(mask.astype(int) @ mask > 0, mask)
    np.testing.assert_array_equal(trunk_sensitivity(lambda _: view, len(mask))[0] > 0, mask)


def test_trunk_of_eso_lm_a_reveals_nothing_later_to_tokens_after_the_prefix() -> None:
    """A noisy token within the prefix sees earlier clean ones, and through these the whole prefix, itself included: it
    bears no loss. For those after the prefix the mask is transitive."""
    found = trunk_sensitivity(lambda clean: View(masks.TwoStreams(prefix=True), clean[None]), 2 * L, CLEAN) > 0
    for clean, reached in zip(CLEAN.tolist(), found, strict=True):
        one_layer = two_stream_mask(1, clean)
        np.testing.assert_array_equal(reached, one_layer.astype(int) @ one_layer > 0)
        np.testing.assert_array_equal(reached[clean:L], one_layer[clean:L])


def test_trunk_through_the_cache_is_causal() -> None:
    found = trunk_sensitivity(lambda _: View(masks.CAUSAL), L, cache=cache.empty(MODEL, 1, L))
    np.testing.assert_array_equal(found[0] > 0, np.tri(L, dtype=bool))
