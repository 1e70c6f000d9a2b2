"""Plans: which tokens are decoded in which step, drawn before any forward pass.

One plan drives every sampler, and the scorer that asks how likely given tokens are under it.

  policy          order                                              tokens per step
  binomial        alpha_0 L random positions, the rest ascending     the paper's chain of T steps, then one
  balanced        the same                                           alpha_0 L / T, then one
  one-by-one      the same                                           one ("first hitting": T to infinity)
  strided         T groups {j, j + T, j + 2T, ...}, ascending        L / T, a group
  strided-shared  ..., shuffled, the same for the whole batch        L / T, a group
  strided-row     ..., shuffled for each row                         L / T, a group
  left-to-right   ascending                                          one

A plan can also be given: `Plan(order, tokens_per_step)`.

Axes: B batch, L length, S steps, J blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from eso_jax.decoding import order
from eso_jax.errors import EsoError, require


@dataclass(frozen=True)
class Plan:
    """Step s decodes, in parallel, the next `tokens_per_step[s]` tokens of the order.

    Attributes:
      order: int [B, L], each row's own order, a permutation of 0..L-1.
      tokens_per_step: int [S], shared by the batch; at least 1 each, L in all.
      diffusion: how many tokens the diffusion phase decodes; the rest come one per step. None: all of them. Only
        Eso-LM (A), whose diffused tokens see each other, needs to know.
    """

    order: Int[Array, "B L"]
    tokens_per_step: Int[np.ndarray, " S"]
    diffusion: int | None = None

    def __post_init__(self) -> None:
        counts = self.tokens_per_step
        order.check_permutations(np.asarray(self.order), self.length)
        if (counts < 1).any() or counts.sum() != self.length:
            raise EsoError(f"tokens_per_step: must be positive and sum to {self.length}, got {counts}")
        require(0 <= self.diffused <= self.length, "diffusion", self.diffusion, f"must be in [0, {self.length}]")
        sequential = counts[self.first >= self.diffused]
        require(len(sequential) == self.length - self.diffused, "diffusion", self.diffusion,
                "the tokens after it must come one per step")

    def rows(self, index: Int[np.ndarray, " _"]) -> Plan:
        """The plan of some of the rows."""
        return Plan(self.order[index], self.tokens_per_step, self.diffusion)

    @property
    def length(self) -> int:
        return self.order.shape[1]

    @property
    def diffused(self) -> int:
        """Tokens of the diffusion phase."""
        return self.length if self.diffusion is None else self.diffusion

    @property
    def first(self) -> Int[np.ndarray, " S"]:
        """The slot (index along the order) at which each step begins."""
        return np.cumsum(self.tokens_per_step) - self.tokens_per_step

    @property
    def nfe(self) -> int:
        """Number of function evaluations: forward passes of the denoiser."""
        return len(self.tokens_per_step)


Policy = Callable[[Key[Array, ""], int, int, int, float], Plan]


def draw(policy: str, key: Key[Array, ""], batch: int, length: int, steps: int, alpha_0: float) -> Plan:
    """A plan of the named policy, of T = `steps` where it has a T.

    Raises:
      EsoError: for an unknown policy, or values that it cannot take.
    """
    require(policy in POLICIES, "plan", policy, f"choose one of {', '.join(POLICIES)}")
    require(1 <= steps < 2**31, "steps", steps, "T must be at least 1, and less than 2**31")
    require(0 <= alpha_0 <= 1, "alpha_0", alpha_0, "must be in [0, 1]")
    return POLICIES[policy](key, batch, length, steps, alpha_0)


def binomial(key: Key[Array, ""], batch: int, length: int, steps: int, alpha_0: float) -> Plan:
    """The paper's plan (Algorithm 2): T diffusion steps over about alpha_0 L tokens, then one token per step.

    Going from t to s = t - 1/T, each token still masked is decoded with probability
    (alpha_s - alpha_t) / (1 - alpha_t), alpha_t = alpha_0 (1 - t); steps that decode nothing are dropped. A token is
    then decoded at each step with the same unconditional probability alpha_0 / T, so the counts are drawn at once: each
    of L tokens goes to the diffusion phase with probability alpha_0, and to one of its T steps uniformly. Rows
    share the counts; each has its own random positions, followed by the rest in ascending order.
    E[NFE] = (1 - alpha_0) L + T (1 - (1 - alpha_0 / T)^L), see `expected_nfe`.
    """
    phase_key, step_key, order_key = jax.random.split(key, 3)
    in_diffusion = np.asarray(jax.random.uniform(phase_key, (length,))) < alpha_0
    step = np.asarray(jax.random.randint(step_key, (length,), 0, steps))[in_diffusion]
    _, counts = np.unique(step, return_counts=True)
    return _then_ascending(order_key, batch, length, counts)


def balanced(key: Key[Array, ""], batch: int, length: int, steps: int, alpha_0: float) -> Plan:
    """alpha_0 L tokens (rounded) in T steps that differ by at most one token, then one token per step."""
    return _then_ascending(key, batch, length, _equal_parts(round(alpha_0 * length), steps))


def one_by_one(key: Key[Array, ""], batch: int, length: int, steps: int, alpha_0: float) -> Plan:
    """The binomial plan as T goes to infinity, and the first-hitting sampler of a model that is not told the time: each
    token goes to the diffusion phase with probability alpha_0, which then decodes one per step in random order."""
    count_key, order_key = jax.random.split(key)
    count = int((jax.random.uniform(count_key, (length,)) < alpha_0).sum())
    return _then_ascending(order_key, batch, length, np.ones(count, np.int64))


def _then_ascending(key: Key[Array, ""], batch: int, length: int, counts: Int[np.ndarray, " S"]) -> Plan:
    """Random positions by `counts`, each row its own, then the rest one by one in ascending order."""
    diffusion = int(counts.sum())
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    orders = jax.vmap(lambda k: order.random_then_ascending(k, length, diffusion))(keys)
    return Plan(orders, np.concatenate([counts, np.ones(length - diffusion, np.int64)]), diffusion)


def left_to_right(batch: int, length: int) -> Plan:
    """One token per step in natural order, as AR decodes."""
    return Plan(jnp.tile(jnp.arange(length), (batch, 1)), np.ones(length, np.int64), 0)


def strided(key: Key[Array, ""], batch: int, length: int, groups: int, shuffle: str) -> Plan:
    """The block sampler (paper, appendix E.10): a step decodes the group {j, j + S, j + 2S, ...}, S = `groups`, whose
    members are as far apart as can be.

    Args:
      shuffle: the order of the groups: "none" (ascending), "shared" by the batch, or each "row" its own.
    """
    require(length % groups == 0, "steps", groups, f"a strided plan has groups of equal size: must divide {length}")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch) * (shuffle == "row"))
    first = jnp.tile(jnp.arange(groups), (batch, 1))
    if shuffle != "none":
        first = jax.vmap(lambda k: jax.random.permutation(k, groups))(keys)
    orders = first[:, :, None] + groups * jnp.arange(length // groups)[None, None]
    return Plan(orders.reshape(batch, length), np.full(groups, length // groups))


def within_blocks(key: Key[Array, ""], batch: int, length: int, block: int, policy: str, steps: int) -> Plan:
    """BD3-LM's plans: blocks left to right, and in a block random positions, each row its own.

    Args:
      policy: of each block: "binomial" (T' = `steps` steps, as in `binomial` at alpha_0 = 1), "balanced", or
        "one-by-one" (first hitting, for any batch size: rows share the steps, not the positions).
    """
    policies = ("binomial", "balanced", "one-by-one")
    require(policy in policies, "plan", policy, f"BD3-LM's plans are {', '.join(policies)}")
    blocks = length // block
    step_key, order_key = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(order_key, jnp.arange(batch))
    inside = jax.vmap(lambda k: jax.random.permutation(k, jnp.tile(jnp.arange(block), (blocks, 1)), axis=1,
                                                       independent=True))(keys)
    orders = (inside + block * jnp.arange(blocks)[None, :, None]).reshape(batch, length)
    if policy == "binomial":
        step = np.asarray(jax.random.randint(step_key, (blocks, block), 0, steps))
        counts = np.concatenate([np.unique(row, return_counts=True)[1] for row in step])
    else:
        counts = np.tile(_equal_parts(block, steps if policy == "balanced" else block), blocks)
    return Plan(orders, counts)


def _equal_parts(total: int, parts: int) -> Int[np.ndarray, " S"]:
    """`total` in at most `parts` positive parts that differ by at most one."""
    parts = min(parts, total)
    return np.diff(np.arange(parts + 1) * total // max(parts, 1))


def expected_nfe(length: int, steps: int, alpha_0: float) -> float:
    """E[NFE] of the binomial plan in closed form."""
    return (1 - alpha_0) * length + steps * (1 - (1 - alpha_0 / steps) ** length)


def _strided(shuffle: str) -> Policy:
    def policy(key: Key[Array, ""], batch: int, length: int, steps: int, alpha_0: float) -> Plan:
        require(alpha_0 == 1, "alpha_0", alpha_0, "a strided plan decodes all tokens by diffusion; give 1")
        return strided(key, batch, length, steps, shuffle)

    return policy


POLICIES: dict[str, Policy] = {
    "binomial": binomial, "balanced": balanced, "one-by-one": one_by_one,
    "strided": _strided("none"), "strided-shared": _strided("shared"), "strided-row": _strided("row"),
    "left-to-right": lambda key, batch, length, steps, alpha_0: left_to_right(batch, length),
}
