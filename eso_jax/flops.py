"""How many floating-point operations a step takes, counted from its config as this code executes it.

A multiply and an add are two operations, and only products of matrices count (and folding AdaLN into the weights, which
is as large as a few rows of the batch). Softmax, norms, activations, draws and the optimizer, a few per cent at the
paper's sizes, do not. Attention counts every pair of a query and a key, also those that a mask hides and a backend
leaves out.

*Model FLOPs* are the forward pass and a backward pass of twice its cost; MFU divides them by the chip's peak. What
`train.remat` computes again is counted apart, by `recomputed`. XLA's own count agrees where the layers are unrolled
(tests/test_flops.py); of a scan over layers it counts one layer. `needed` is the part that the loss depends on.

Axes: B batch, L length, S slots of a pass, D width, N layers, V vocabulary, C conditioning.
"""

from __future__ import annotations

from eso_jax import families, sharding
from eso_jax.config import Config, ModelConfig
from eso_jax.model import vocabulary
from eso_jax.model.masks import TwoStreams
from eso_jax.model.params import FREQUENCIES

Parts = dict[str, int]  # FLOPs by part: qkv, attention, out, mlp_in, mlp_out, head, adaln


def forward(config: Config, shards: int | None = None) -> Parts:
    """Forward FLOPs of one training step, all devices and micro-batches together.

    Args:
      shards: into how many parts devices split the rows, each with room for the masked tokens of its own; None: as the
        mesh in force does.
    """
    model, length = config.model, config.model.length
    total = dict.fromkeys(("qkv", "attention", "out", "mlp_in", "mlp_out", "head"), 0)
    for each in families.get(config).passes(config):
        rows, pattern = int(config.train.batch_size * each.share), each.pattern
        noisy = length - pattern.skip if isinstance(pattern, TwoStreams) else 0
        parts = layers(model, rows * (length + noisy))
        # With two streams, a noisy and a clean slot each score the clean keys, and the noisy one those of its block.
        block = pattern.block if isinstance(pattern, TwoStreams) else 0
        parts["attention"] = attention(model, rows * length, length) + attention(model, rows * noisy, length + block)
        predicting = noisy or length
        groups = config.train.accumulate * (shards or sharding.batch_shards())
        parts["head"] = head(model, groups * vocabulary.room(rows // groups, predicting,
                                                             each.masked * length / predicting))
        total = {name: total[name] + parts[name] for name in total}
    return {**total, "adaln": config.train.accumulate * fold(model)}


def training_step(config: Config, shards: int | None = None) -> Parts:
    """Model FLOPs of one training step by part, forward and backward, nothing computed twice. The gradient of the
    head's bias is a product as well, with eight rows (eso_jax/model/vocabulary.py)."""
    parts = {name: 3 * count for name, count in forward(config, shards).items()}
    return parts | {"head": parts["head"] * (3 * config.model.width + 8) // (3 * config.model.width)}


def needed(config: Config) -> Parts:
    """The part of one training step's model FLOPs that its loss depends on, expected over the draws: of attention, the
    pairs of a query and a key that it sees; of the head, the tokens that have a loss; of an Eso-LM's two streams, no
    z_0 copy of a clean token, which no other token sees."""
    model, length, alpha_0 = config.model, config.model.length, families.alpha_0_of(config, None)
    alpha_0, second = getattr(config.family, "moments", (alpha_0, alpha_0**2))
    low, high = getattr(config.family, "t_range", (0.0, 1.0))
    total = dict.fromkeys(forward(config), 0)
    for each in families.get(config).passes(config):
        rows, pattern = int(config.train.batch_size * each.share), each.pattern
        two = isinstance(pattern, TwoStreams)
        # The clean tokens' share, and its mean square: alpha_0 in a sequential pass, else alpha_0 (1 - t), t uniform.
        clean, square = alpha_0 * (1 - (low + high) / 2), second / 3
        sequential = two and alpha_0 < 1
        if sequential:
            clean, square = alpha_0, second
        block, prefix = pattern.block or 2 * length, getattr(pattern, "prefix", False)
        pairs = length * min(length, (length + block) / 2) + prefix * square * length**2 / 2
        if two:  # the noisy stream; where it is sorted, its masked tokens are the last
            pairs += length * (length + block) / 2 - sequential * square * length**2 / 2
        slots = length * (1 + two - sequential * clean)
        parts = layers(model, round(rows * slots)) | {"attention": attention(model, 1, round(rows * pairs)),
                                                      "head": head(model, round(rows * length * (1 - clean)))}
        total |= {name: total[name] + count for name, count in parts.items()}
    return {name: 3 * count for name, count in (total | {"adaln": config.train.accumulate * fold(model)}).items()}


def recomputed(config: Config, remat: str) -> Parts:
    """What the backward pass of one training step computes again under a `train.remat`, by part.

    "dots" keeps the products of the weights and computes attention again; "full" keeps each layer's input alone, and
    computes all of the layer again but its last product, whose result no gradient needs.
    """
    again = {"none": (), "dots": ("attention",), "full": ("qkv", "attention", "out", "mlp_in")}[remat]
    return {name: count for name, count in forward(config).items() if name in again}


def sampling_step(model: ModelConfig, batch: int, window: int, width: int, live: int) -> Parts:
    """Forward FLOPs of one step of the decoding loop.

    Args:
      window, width, live: slots of the pass, those whose logits are taken, and keys that each slot scores, as in
        eso_jax.decoding.passes.Shape.
    """
    return {**layers(model, batch * window), "attention": attention(model, batch * window, live),
            "head": head(model, batch * width)}


def layers(model: ModelConfig, slots: int) -> Parts:
    """Forward FLOPs of the products with the weights of all layers, for `slots` slots in all."""
    square = 2 * slots * model.layers * model.width**2
    return {"qkv": 3 * square, "out": square, "mlp_in": 4 * square, "mlp_out": 4 * square}


def attention(model: ModelConfig, queries: int, keys: int) -> int:
    """Forward FLOPs of scores and weighted values of all layers, for `queries` in all, each with `keys` keys."""
    return 4 * queries * keys * model.layers * model.width


def head(model: ModelConfig, slots: int) -> int:
    """Forward FLOPs of the logits of `slots` slots."""
    return 2 * slots * model.width * model.vocab_size


def fold(model: ModelConfig) -> int:
    """FLOPs of folding AdaLN: the conditioning MLP, the modulations, and their products with the weights they scale."""
    c, d, n = model.cond_dim, model.width, model.layers
    return (2 * c * (FREQUENCIES + c + 6 * n * d + 2 * d) + 5 * n * d * d) if c else 0
