"""What an engine computes on some devices: run as a script in a process that emulates them, by tests/test_engine.py.

    python tests/engine_numbers.py OUT.json DEVICES,...      (numbers of devices, or data x fsdp x tensor)

Writes, by mesh, all numbers that scoring and evaluating make, and the operations that one device took for them.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import eso_jax  # noqa: F401  (what XLA must be told before JAX starts)
import test_vocabulary
from conftest import random_params, tiny_config
from eso_jax import families, likelihood, sharding
from eso_jax.config import MeshConfig
from eso_jax.data import ByteTokenizer
from eso_jax.decoding import loop
from eso_jax.decoding.plan import one_by_one
from eso_jax.engine import perplexity
from eso_jax.engine.model import Model
from eso_jax.engine.rows import Engine
from eso_jax.evaluation import judges, mauve, texts
from eso_jax.model import vocabulary
from eso_jax.model.params import fold, for_inference, param_shardings, weight_shardings

CONFIG = tiny_config("esolm", length=12, vocab_size=258, alpha_0=0.5).override("model.heads=4", "model.layers=1")
ROWS = 8
TOKENS = np.random.default_rng(0).integers(0, 256, (ROWS, 12)).astype(np.int32)
KEY = jax.random.key(0)


def inference(mesh: MeshConfig, batch_size: int) -> Model:
    """The model as it is loaded."""
    devices = jax.devices()[:(mesh.data or 1) * mesh.tensor]
    where = sharding.inference_mesh(CONFIG.model, mesh.tensor, devices)
    params = jax.device_put(random_params(CONFIG.model), param_shardings(random_params(CONFIG.model), where))
    weights = for_inference(CONFIG.model, params, jnp.float32, where)
    return Model(CONFIG, weights, where, batch_size, step=0, tokenizer=ByteTokenizer())


def training(mesh: MeshConfig, batch_size: int) -> Engine:
    """The model as training's validation has it."""
    where = sharding.mesh(mesh, jax.devices()[:(mesh.data or 1) * mesh.fsdp * mesh.tensor])
    weights = fold(CONFIG.model, random_params(CONFIG.model))
    return Engine(CONFIG, jax.device_put(weights, weight_shardings(weights, where)), where, batch_size)


def numbers(model: Model) -> dict[str, Callable[[], Any]]:
    """Everything that is made of rows, by name."""
    orders = np.argsort(np.random.default_rng(1).random((3, *TOKENS.shape)), axis=-1)
    given = np.random.default_rng(2).random(TOKENS.shape) < 0.3
    plan = one_by_one(KEY, ROWS, 12, 1, 0.5)
    text = texts.of_tokens(TOKENS, None)
    return {
        "eval": lambda: perplexity.nelbo_per_window(model, TOKENS, 0.5, KEY, samples=2),
        "score": lambda: likelihood.log_prob(model, TOKENS, orders),
        "plan": lambda: likelihood.plan_log_prob(model, TOKENS, plan),
        "conditionals": lambda: likelihood.conditionals(model, TOKENS, given, ~given)._asdict(),
        "judge": lambda: judges.ModelJudge(model).score(text).nats,
        "features": lambda: mauve.ModelFeatures(model).of(text),
        "sample": lambda: model.sample(ROWS, steps=4, seed=1).tokens,
        "given": lambda: model.sample(1, steps=4, seed=1, given=np.where(given, TOKENS, CONFIG.model.mask)).tokens,
    }


def head_gradients(mesh: MeshConfig) -> dict[int, float]:
    """The relative error of the head's gradient in bfloat16, by chunks, against that in float32."""
    kernel, hidden, bias, targets, weights = test_vocabulary.problem(jnp.bfloat16)
    right, found = test_vocabulary.plain()[0], {}
    where = sharding.mesh(mesh, jax.devices()[:(mesh.data or 1) * mesh.fsdp * mesh.tensor])
    rows = NamedSharding(where, P(sharding.BATCH))

    def loss(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
        return (weights * vocabulary.nll(test_vocabulary.head_alone(kernel, bias), hidden, targets, 511)).sum()

    for chunks in (1, 512):
        vocabulary.LOGITS_AT_ONCE = hidden.shape[0] * hidden.shape[1] * 512 // chunks // where.size
        with jax.set_mesh(where):
            ours = jax.jit(jax.grad(loss))(kernel, jax.device_put(hidden, rows)).astype(jnp.float32)
        found[chunks] = float(np.linalg.norm(ours - right) / np.linalg.norm(right))
    return found


def spied(module: Any, name: str, counts: list[float]) -> None:
    """Has a compiled function report what one device does when it is called."""
    real = getattr(module, name)

    @functools.wraps(real)
    def function(*arguments: Any, **options: Any) -> Any:
        counts.append(real.lower(*arguments, **options).compile().cost_analysis()["flops"])
        return real(*arguments, **options)

    setattr(module, name, function)


def main(out: str, *meshes: str) -> None:
    counts: list[float] = []
    for module, name in ((perplexity, "_estimate"), (likelihood, "log_prob_in_order"), (likelihood, "_conditionals"),
                         (mauve, "_mean_states"), (loop, "decode_run"), (families, "_plan_log_likelihood")):
        spied(module, name, counts)
    found: dict[str, Any] = {}
    for shape in meshes:
        data, fsdp, tensor = map(int, shape.split("x"))
        mesh = MeshConfig(data, fsdp, tensor)
        here = found.setdefault(shape, {"numbers": {}, "flops": {}, "sweep": {}})
        for name, compute in numbers(inference(mesh, 64 if tensor == 1 else 3)).items() if fsdp == 1 else ():
            counts.clear()
            here["numbers"][name] = jax.tree.map(np.asarray, compute())
            here["flops"][name] = sum(counts)
        here["head"] = head_gradients(mesh)
        engine = training(mesh, 4)
        for rows in range(1, 14):
            value = perplexity.nelbo(engine, np.resize(TOKENS, (rows, 12)), ByteTokenizer(), 0.5, KEY)
            here["sweep"][str(rows)] = [value.nats_per_token, value.bits_per_byte]
    Path(out).write_text(json.dumps(found, default=lambda x: x.tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
