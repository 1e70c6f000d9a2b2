"""The importance-weighted bound as a running estimate: orders are drawn and scored in groups, one after another.

It shows its progress, keeps the scores so far in a file, and resumes from there after a stop, with the same result.

Axes: B batch, L length, O orders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zipfile
from pathlib import Path

import jax
import numpy as np

from eso_jax import console, families, files, likelihood
from eso_jax.decoding.order import likelihood_orders
from eso_jax.engine.rows import Engine
from eso_jax.errors import EsoError, require
from eso_jax.model.params import Head, Weights

SAVE_EVERY = 30.0  # seconds


def log_prob(engine: Engine, tokens: np.ndarray, num_orders: int, alpha_0: float, seed: int,
             partial: Path) -> np.ndarray:
    """log p(tokens[b] | order) in nats under `num_orders` random orders of each row, float32 [O, B]; O is larger if
    `partial` already holds more.

    Args:
      tokens: int [B, L], no masks.
      alpha_0: share of random positions in the orders; see eso_jax.decoding.order.likelihood_orders.
      partial: the file of the scores so far, for the caller to remove once the result is written. A resumed run may use
        other devices and another batch size.

    Raises:
      EsoError: `partial` is of something else, or the arguments do not fit the model.
    """
    likelihood.check_tokens(tokens, engine.config)
    require(num_orders >= 1, "--num-orders", num_orders, "must be at least 1")
    config = engine.config
    identity = json.dumps([config.to_json(), _digest(engine, tokens), alpha_0, seed])
    found = _read(partial, identity, len(tokens))
    key, group = jax.random.key(seed), max(1, engine.size(engine.batch_size) // len(tokens))
    block = families.get(config).block(config)
    saved = time.monotonic()
    bar = console.bar(total=num_orders, initial=len(found), unit="order")
    with bar, contextlib.ExitStack() as stack:
        stack.callback(lambda: _write(partial, identity, found) if len(found) else None)
        while len(found) < num_orders:
            orders = likelihood_orders(key, group, len(tokens), config.model.length, alpha_0, len(found), block)
            # A whole group always, for one compilation.
            scores = likelihood.log_prob(engine, tokens, np.asarray(orders))
            found = np.concatenate([found, scores])[:num_orders]
            bar.update(len(found) - bar.n)
            bar.set_postfix_str(f"log p >= {likelihood.iw_bound(found)[0].mean():.3f}")
            if time.monotonic() - saved > SAVE_EVERY:
                _write(partial, identity, found)
                saved = time.monotonic()
    return found


def _digest(engine: Engine, tokens: np.ndarray) -> str:
    """A hash of the weights and the tokens; the same on every mesh."""
    digest, head = hashlib.sha256(), engine.weights.head
    whole = Head(head.norm, head.kernel[:, :len(head.bias)], head.bias)  # without what pads it
    named = jax.tree_util.tree_leaves_with_path(Weights(engine.weights.embedding, engine.weights.blocks, whole))
    # By name, which does not depend on the order of fields.
    named.sort(key=lambda leaf: [getattr(part, "name", getattr(part, "idx", None)) for part in leaf[0]])
    for array in (*(array for _, array in named), tokens):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read(partial: Path, identity: str, batch: int) -> np.ndarray:
    if not partial.exists():
        return np.zeros((0, batch), np.float32)
    try:
        with open(partial, "rb") as file, np.load(file) as arrays:  # np.load would leave a damaged one open
            kept, found = str(arrays["identity"]), arrays["logp_per_order"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EsoError(f"{partial}: not a partial result ({error}); remove it") from error
    require(kept == identity, "--out", str(partial), "holds a partial result of another model, other tokens, alpha_0 "
            "or seed; remove it, or give another --out")
    return found


def _write(partial: Path, identity: str, found: np.ndarray) -> None:
    files.write_whole(partial, files.npz(identity=identity, logp_per_order=found))
