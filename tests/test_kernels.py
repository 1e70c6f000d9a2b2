"""The kernels of a decoding step on GPUs: each is the plain computation that it stands for. They are interpreted, or
run where there is a GPU."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from conftest import INTERPRET, brief
from eso_jax.config import ModelConfig
from eso_jax.decoding import categorical, inversion
from eso_jax.decoding.categorical import Rule
from eso_jax.model import cache, few, masks, plain, rotary, transformer, triton
from eso_jax.model.backend import Task
from eso_jax.model.masks import Pattern, View
from eso_jax.model.norm import layer_norm
from eso_jax.model.params import Norm, fold, init_params, unstack
from eso_jax.model.triton import Triton

KERNEL = Triton(interpret=INTERPRET)
BATCH, SLOTS, LENGTH, HEADS, SIZE = 4, 3, 100, 2, 16  # two tiles of keys, each of a split of its own


def extended(backend: plain.Plain, view: View, offset: jax.Array | int, batch: int, length: int) -> list[jax.Array]:
    """What the queries of a window get, and the keys and values, of random ones."""
    draws = jax.random.split(jax.random.key(0))
    qkv = jax.random.normal(draws[0], (batch, SLOTS, 3, HEADS, SIZE))
    old = jax.random.normal(draws[1], (2, batch, length, HEADS, SIZE))
    table = rotary.rotary_table(jnp.arange(batch * SLOTS).reshape(batch, SLOTS) * 37 % 101, SIZE)
    axes = backend.key_axes, backend.value_axes
    out, *kept = jax.jit(backend.extend)(qkv, table, *map(plain.arrange, old, axes), view, offset)
    return [out, *(x.transpose([of.index(axis) for axis in "BLHK"]) for x, of in zip(kept, axes, strict=True))]


@pytest.mark.parametrize(("pattern", "rows", "offset"), [
    (masks.CAUSAL, {}, [0, 30, 64, 97]), (masks.EVERYONE, {"length": [1, 50, 99, 100]}, 97),
    (masks.PREFIX, {"clean": [0, 3, 70, 10]}, [10, 3, 70, 63]), (Pattern(4), {}, 64),
    (masks.Drafts(drafts=1), {"clean": [2, 6, 71, 99]}, [0, 4, 69, 97])], ids=str)
def test_a_step_of_the_cache_is_plain_attention(pattern: Pattern, rows: dict[str, list[int]],
                                                offset: int | list[int]) -> None:
    view = View(pattern, **{name: jnp.array(value) for name, value in rows.items()})
    assert KERNEL.refuse(Task(pattern, LENGTH, SIZE, jnp.float32)) is None
    ours, theirs = (extended(backend, view, jnp.array(offset), BATCH, LENGTH) for backend in (KERNEL, plain.Plain()))
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_splits_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first window, where but one of the row's four tiles is seen."""
    monkeypatch.setattr(triton, "TILE", 16)
    view = View(masks.CAUSAL)
    ours, theirs = (extended(backend, view, 0, 1, 64) for backend in (KERNEL, plain.Plain()))
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_the_kernel_refuses_what_it_cannot() -> None:
    if INTERPRET:
        assert Triton().refuse(Task(masks.CAUSAL, 8, 16, jnp.float32)) == "for NVIDIA GPUs from Ampere on"
    assert KERNEL.refuse(Task(masks.CAUSAL, 8, 48, jnp.float32)) == "takes heads of 16, 32, 64, ..., not 48"


def test_steps_by_kernels_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes of a model through a cache that grows between them."""
    monkeypatch.setattr(few, "CHUNK", 16)  # several of a part, as of a larger one
    monkeypatch.setattr(few, "CUTS", {8: few.Cuts(*[few.Cut(16, parts, 4) for parts in (1, 2, 1, 4)])})
    config = ModelConfig(length=40, vocab_size=50, width=32, layers=1, heads=2, cond_dim=8)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)
    weights = unstack(jax.jit(lambda params: fold(config, params))(params))
    tokens, positions = rng.integers(0, 50, (2, 8)), np.array([rng.permutation(40)[:8] for _ in range(2)])

    def run(backend: plain.Plain) -> jax.Array:
        kept, outs = cache.empty(config, 2, 4, backend=backend), []
        for first, slots in ((0, 8), (4, 20)):
            kept = cache.grown(kept, slots)
            out, kept = jax.jit(transformer.trunk)(weights, tokens[:, first:first + 4], positions[:, first:first + 4],
                                                   View(masks.CAUSAL), kept, first)
            outs.append(out)
        return jnp.stack(outs)

    assert few.fits(8, weights.blocks) and not few.fits(9, weights.blocks)
    np.testing.assert_allclose(run(KERNEL), run(plain.Plain()), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rows", brief([1, 3, 20], 3))
def test_a_product_of_few_rows_is_what_it_says(rows: int) -> None:
    """Numbers of another size than in a model, in parts."""
    x, w, residual, norm = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(
        [(2, rows, 96), (96, 64), (3, rows, 64), (2, 96)]))
    bias, x = jnp.arange(64.0) / 9, 5 + 3 * x
    whole, cut = x.sum(0), few.Cut(32, 3, 4)
    run = functools.partial(few.product, interpret=INTERPRET)

    def same(ours: jax.Array, expected: jax.Array) -> None:
        np.testing.assert_allclose(ours.sum(0), expected, rtol=1e-5, atol=5e-5)

    normal = layer_norm(whole, Norm(norm[0], norm[1]), jnp.float32)
    same(run(x, w, cut._replace(parts=1), Norm(norm[0], norm[1]), bias, gelu=True),
         nn.gelu(transformer.linear(normal, w) + bias[None]))
    parts = run(x, w, cut, bias=bias, residual=residual)
    assert parts.shape == (3, rows, 64)
    same(parts, transformer.linear(whole, w) + bias[None] + residual.sum(0))
    half = run(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), cut._replace(parts=1))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half[0].astype(jnp.float32), whole @ w, rtol=2e-2, atol=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", few.Cuts._fields)
def test_products_of_the_papers_size(name: str) -> None:
    """A layer's four, in bfloat16, by the cuts that are used; against float32 of the same numbers."""
    depth, columns = {"qkv": (768, 2304), "out": (768, 768), "mlp_in": (768, 3072), "mlp_out": (3072, 768)}[name]
    x, w, bias, residual, norm = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(
        [(1, 8, depth), (depth, columns), (columns,), (2, 8, columns), (2, depth)]))
    w, first = (w / depth**0.5).astype(jnp.bfloat16), name in ("qkv", "mlp_in")
    affine = Norm(norm[0], norm[1]) if first else None
    ours = jax.jit(functools.partial(few.product, cut=getattr(few.CUTS[8], name), gelu=name == "mlp_in",
                                     interpret=INTERPRET))(x, w, norm=affine, bias=bias,
                                                           residual=None if first else residual)
    normal = x[0] if affine is None else layer_norm(x[0], affine, jnp.float32)
    right = transformer.linear(normal.astype(jnp.bfloat16).astype(jnp.float32), w.astype(jnp.float32)) + bias[None]
    right = nn.gelu(right) if name == "mlp_in" else right if first else right + residual.sum(0)
    np.testing.assert_allclose(ours.astype(jnp.float32).sum(0), right, rtol=1e-2 if first else 1e-4, atol=2e-3)


@pytest.mark.parametrize("few_rows", [0, 32], ids=["a program a row", "shared out"])
@pytest.mark.parametrize("rule", [Rule(), Rule(0.7, top_p=0.9), Rule(top_p=0.5, min_p=0.01)], ids=str)
def test_the_kernel_draws_what_the_rule_draws(rule: Rule, few_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random rows from flat to sharp, and some at the edges: the same tokens for the same uniforms."""
    monkeypatch.setattr(inversion, "FEW", few_rows)
    monkeypatch.setattr(inversion, "ROW_TILE", 128)  # several tiles
    monkeypatch.setattr(inversion, "TILE", 512)  # several programs of a row
    rows, vocabulary = 24, 1000
    logits = jax.random.normal(jax.random.key(0), (rows, vocabulary)) * jnp.linspace(0.1, 10, rows)[:, None]
    logits = logits.at[0].set(0).at[1].set(-1e6).at[1, 500].set(3).at[2, :500].set(-jnp.inf).at[3, 500:].set(-1e6)
    logits = logits.at[4].set(jnp.where(jnp.arange(vocabulary) % 2, 1.0, 0.5))  # ties
    uniforms = jax.random.uniform(jax.random.key(1), (rows, 2)).at[:4, 0].set(0).at[2:6, 1].set(1 - 2.0**-24)
    by_kernel = inversion.choose(logits, uniforms, *dataclasses.astuple(rule)[:3], interpret=INTERPRET)
    monkeypatch.setattr(inversion, "fits", lambda: False)
    nudges = [0.0] if INTERPRET else [0.0, -1e-5, 1e-5]  # a GPU adds in another order: then by uniforms as near as that
    draw = jax.jit(lambda uniforms: categorical.draw(logits, uniforms, rule))
    tokens = [draw((uniforms + jnp.array([[x, y]])).clip(0, 1 - 2.0**-24)) for x in nudges for y in nudges]
    assert (jnp.stack(tokens) == by_kernel[None]).any(0).all()
    assert (tokens[0] == by_kernel).mean() > 0.9
