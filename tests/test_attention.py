"""Attention in tiles equals attention at once, and so do its gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import INTERPRET, USUAL
from eso_jax.model import attention, masks, plain
from eso_jax.model.backend import Backend, Task
from eso_jax.model.cudnn import CuDNN
from eso_jax.model.splash import Splash


@pytest.mark.parametrize("own", [False, True])  # one mask for all rows, or one for each
@pytest.mark.parametrize("tile", [1, 2 * 12, 2 * 12 * 4, 2 * 12 * 12 * 2])  # a query, two, some, two rows
def test_tiles(tile: int, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, heads, size = 4, 12, 2, 6
    q, k, v = jax.random.normal(jax.random.key(0), (3, batch, length, heads, size))
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, (batch if own else 1, length, length))
    mask |= jnp.eye(length, dtype=bool)[None]

    class Listed(masks.Pattern):
        """Row `clean` of `mask`."""

        def __call__(self, query: jax.Array, key: jax.Array, clean: jax.Array | int = 0) -> jax.Array:
            return mask[clean, query, key]

    view = masks.View(Listed(), jnp.arange(batch if own else 1))

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attention.attend(q, k, v, view)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    def values() -> Any:  # a program of its own for each size of a tile
        return jax.jit(jax.value_and_grad(lambda *x: run(*x), (0, 1, 2), has_aux=True))(q, k, v)

    whole = values()
    monkeypatch.setitem(plain.TILE, "cpu", tile)
    monkeypatch.setattr(plain, "FEW_QUERIES", 0)
    tiled = values()
    for ours, theirs in zip(jax.tree.leaves(tiled), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    scores = np.einsum("bshk,blhk->bhsl", q, k) / np.sqrt(size)
    weights = np.exp(scores) * np.asarray(mask)[:, None]
    expected = np.einsum("bhsl,blhk->bshk", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(tiled[0][1], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("block", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_two_streams_in_tiles(block: int, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves, against the same at once and against one dense pass of 2L slots."""
    batch, length, heads, size = 4, 12, 2, 6
    q, k, v = jax.random.normal(jax.random.key(0), (3, batch, 2 * length, heads, size))
    clean = jnp.arange(3, 3 + batch) if own else None

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attention.attend(q, k, v, masks.View(masks.TwoStreams(block, prefix=own), clean))
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    def values() -> Any:
        return jax.jit(jax.value_and_grad(lambda *x: run(*x), (0, 1, 2), has_aux=True))(q, k, v)

    whole = values()
    monkeypatch.setattr(plain, "FEW_QUERIES", 0)
    for tile in (1, heads * length * 4, heads * length * length * 2):  # a block, some, two rows
        monkeypatch.setitem(plain.TILE, "cpu", tile)
        tiled = values()
        for ours, theirs in zip(jax.tree.leaves(tiled), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)

    query, key = jnp.arange(length)[None, :, None], jnp.arange(length)[None, None]
    up_to = masks.blocks_up_to(query, key, block) if clean is None else \
        masks.prefix(query, key, clean[:, None, None], block)
    noisy = np.concatenate([masks.own_block(query, key, block), masks.blocks_before(query, key, block)], axis=2)
    mask = np.concatenate([np.repeat(noisy, len(up_to), 0), np.concatenate([np.zeros_like(up_to), up_to], 2)], axis=1)
    scores = np.where(mask[:, None], np.einsum("bshk,blhk->bhsl", q, k) / np.sqrt(size), -np.inf)
    weights = np.exp(scores)
    expected = np.einsum("bhsl,blhk->bshk", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(whole[0][1], expected, atol=1e-5)


@pytest.mark.parametrize("pattern", [masks.CAUSAL, masks.Pattern(3), masks.TwoStreams(3, skip=3),
                                     masks.TwoStreams(prefix=True, skip=5)], ids=str)
def test_parts_see_all_that_they_may(pattern: masks.Pattern | masks.TwoStreams,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries in parts, each without the keys behind it: outputs and gradients are those of all at once."""
    length, two = 12, isinstance(pattern, masks.TwoStreams)
    slots = 2 * length - pattern.skip if isinstance(pattern, masks.TwoStreams) else length
    x = jax.random.normal(jax.random.key(0), (3, 2, slots, 2, 6))

    def run(x: jax.Array) -> Any:
        out = attention.attend(*x, masks.View(pattern, jnp.array([4, 9]) if two and pattern.prefix else None))
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    whole = jax.jit(jax.value_and_grad(lambda x: run(x), has_aux=True))(x)
    monkeypatch.setattr(plain, "PART", 4)
    parts = jax.jit(jax.value_and_grad(lambda x: run(x), has_aux=True))(x)
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_two_streams_need_little_more_memory_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, forward and backward, with the tiles of an accelerator: the noisy half is tiled as well."""
    monkeypatch.setattr(plain, "TILE", {})

    def temporaries(pattern: masks.Pattern | masks.TwoStreams, streams: int) -> int:
        x = jax.ShapeDtypeStruct((1, streams * 8192, 12, 64), jnp.bfloat16)

        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention.attend(q, k, v, masks.View(pattern)).astype(jnp.float32).sum()

        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x).compile(USUAL)
        return int(compiled.memory_analysis().temp_size_in_bytes)

    one = temporaries(masks.CAUSAL, 1)
    assert one < 3e9
    for block in (1, 16):
        assert temporaries(masks.TwoStreams(block), 2) <= 1.6 * one


SPLASH = pytest.param(Splash(interpret=True), marks=pytest.mark.skipif(not INTERPRET, reason="for TPUs"), id="splash")
CUDNN = pytest.param(CuDNN("xla" if INTERPRET else "cudnn"), marks=pytest.mark.slow, id="cudnn")


@pytest.mark.parametrize("kernel", [SPLASH, CUDNN])
@pytest.mark.parametrize(("pattern", "rows"), [
    (masks.CAUSAL, {}), (masks.EVERYONE, {"length": [200, 256]}), (masks.PREFIX, {"clean": [0, 130]}),
    pytest.param(masks.Pattern(4), {}, marks=pytest.mark.slow),
    pytest.param(masks.TwoStreams(), {}, marks=pytest.mark.slow),
    (masks.TwoStreams(skip=112, prefix=True), {"clean": [3, 256]}),
    (masks.TwoStreams(4), {"length": [101, 256]})], ids=str)
def test_kernels_are_plain_attention(pattern: masks.Pattern | masks.TwoStreams, rows: dict[str, list[int]],
                                     kernel: Backend) -> None:
    """Values and gradients: splash interpreted, over several tiles; cuDNN's where there is a GPU, in bfloat16, or its
    construction by XLA."""
    skip, streams = (pattern.skip, 2) if isinstance(pattern, masks.TwoStreams) else (0, 1)
    dtype, limit = (jnp.float32, 2e-5) if INTERPRET else (jnp.bfloat16, 3e-2)
    if isinstance(kernel, CuDNN) and pattern.block == 4:
        pytest.skip("it has no blocks")
    assert kernel.refuse(Task(pattern, 256, 8, jnp.dtype(dtype))) is None
    qkv = jax.random.normal(jax.random.key(0), (3, 2, streams * 256 - skip, 2, 8)).astype(dtype)
    view = masks.View(pattern, **{name: jnp.asarray(value) for name, value in rows.items()})

    def run(backend: Backend, dtype: Any) -> Any:
        compute = backend.one_stream if streams == 1 else backend.two_streams

        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            out = compute(q, k, v, view).astype(jnp.float32)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))), out

        (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*qkv.astype(dtype))
        return out, *gradients

    for ours, right in zip(run(kernel, dtype), run(plain.Plain(), jnp.float32), strict=True):
        off, size = (np.linalg.norm(x, axis=-1) for x in (np.float32(ours) - right, right))
        assert (off <= limit * size.mean()).all()
