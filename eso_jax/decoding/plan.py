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

A plan can also be given: `Plan(order, tokens_per_step)`. Tokens that are known beforehand come first in the order of
their row, ascending, and the policy plans the other tokens, for each row separately.

Axes: B batch, L length, S steps, J blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from eso_jax.decoding import order
from eso_jax.errors import EsoError, require

Counts = Int[np.ndarray, "... S"]  # numbers by step: [S], shared by the batch, or [B, S]
Each = int | Int[np.ndarray, "..."]  # one number for all rows, or one for each, [B]


@dataclass(frozen=True)
class Plan:
    """Step s decodes, in parallel, the next `tokens_per_step[s]` tokens of the order.

    Attributes:
      order: int [B, L], each row's own order, a permutation of 0..L-1.
      tokens_per_step: int [S], shared by the batch, at least 1 each; or [B, S], where a row may decode nothing in a
        step in which another does. L - given in all; or fewer, and the last tokens of the order are not decoded.
      diffusion: how many tokens the diffusion phase decodes (given ones do not count); the others come one per step.
        None: all of them. Only Eso-LM (A), whose tokens of this phase see each other, uses it.
      given: how many tokens, the first of the order, are known beforehand.
    """

    order: Int[Array, "B L"]
    tokens_per_step: Counts
    diffusion: Each | None = None
    given: Each = 0

    def __post_init__(self) -> None:
        counts, length, batch = self.tokens_per_step, self.length, len(self.order)
        order.check_permutations(np.asarray(self.order), length)
        require(counts.shape[:-1] in ((), (batch,)), "tokens_per_step", counts.shape,
                f"must be of shape [steps], or [{batch}, steps], for each row of the order")
        for name in ("given", "diffusion"):
            require(np.shape(getattr(self, name)) in ((), (batch,)), name, getattr(self, name),
                    f"must be one number, or {batch}, one for each row of the order")
        given, diffused = np.asarray(self.given), np.asarray(self.diffused)
        require(bool(((given >= 0) & (given <= length)).all()), "given", self.given, f"must be in [0, {length}]")
        if ((counts < 0).any() or (np.atleast_2d(counts).max(0) < 1).any()
                or (np.asarray(self.end) > length).any()):
            raise EsoError(f"tokens_per_step: must be positive and sum to at most {length}"
                           f"{' less what is given' if given.any() else ''}, got {counts}")
        require(bool(((diffused >= given) & (diffused <= self.end)).all()), "diffusion", self.diffusion,
                f"must be in [0, {length}]{' less what is given' if given.any() else ''}")
        sequential = np.where(self.first >= diffused[..., None], counts, 0)
        require(bool((sequential <= 1).all() and (sequential.sum(-1) == self.end - diffused).all()), "diffusion",
                self.diffusion, "the tokens after it must come one per step")

    def rows(self, index: Int[np.ndarray, " _"]) -> Plan:
        """The plan of some of the rows."""
        def own(x: Any, shared: int = 0) -> Any:
            return x if x is None or np.ndim(x) == shared else x[index]

        counts = own(self.tokens_per_step, 1)
        counts = counts[..., np.atleast_2d(counts).any(0)]  # without the steps of other rows
        return Plan(jnp.asarray(np.asarray(self.order)[index]), counts, own(self.diffusion), own(self.given))

    @property
    def length(self) -> int:
        return self.order.shape[1]

    @property
    def diffused(self) -> Each:
        """How many tokens, the first of the order, are given or decoded by the diffusion phase."""
        return self.end if self.diffusion is None else self.given + self.diffusion

    @property
    def end(self) -> Each:
        """How many tokens, the first of the order, are given or decoded; the others stay masks."""
        decoded = self.tokens_per_step.sum(-1)
        return self.given + (decoded if decoded.ndim else int(decoded))

    @functools.cached_property
    def known(self) -> Bool[np.ndarray, "B L"]:
        """Which tokens are given, by natural position."""
        return np.argsort(np.asarray(self.order), axis=1) < np.reshape(self.given, (-1, 1))

    @property
    def decoded(self) -> Bool[np.ndarray, "_ L"]:
        """Which slots some step decodes: [B, L], or [1, L] if all rows agree."""
        slot = np.arange(self.length)
        return (slot >= np.reshape(self.given, (-1, 1))) & (slot < np.reshape(self.end, (-1, 1)))

    @property
    def first(self) -> Counts:
        """The slot (index along the order) at which each step begins: [S] or [B, S]."""
        return np.asarray(self.given)[..., None] + np.cumsum(self.tokens_per_step, -1) - self.tokens_per_step

    @property
    def step_begins(self) -> Int[np.ndarray, "_ L"]:
        """For each slot the first slot of its step; the slot itself where no step decodes it. [B, L], or [1, L] for all
        rows."""
        first = np.atleast_2d(self.first)
        counts, given = np.broadcast_to(self.tokens_per_step, first.shape), np.broadcast_to(self.given, len(first))
        return np.stack([np.concatenate([np.arange(g), np.repeat(f, c), np.arange(g + c.sum(), self.length)])
                         for g, f, c in zip(given, first, counts, strict=True)])

    @property
    def nfe(self) -> int:
        """Number of function evaluations: the plan's steps. The pass over given tokens does not count."""
        return self.tokens_per_step.shape[-1]

    def check_given(self, known: Bool[np.ndarray, "B L"]) -> None:
        """Raises an EsoError unless exactly these tokens, by natural position, are those that the plan takes as
        given."""
        wrong = (known != self.known).any(axis=1)
        require(not bool(wrong.any()), "given", f"row {wrong.argmax()}", "the plan takes other tokens for given: the "
                "first of its order must be those that are known")


def join(plans: Sequence[Plan]) -> Plan:
    """One plan of the rows of several. What is equal in all rows is stored once, without an axis B."""
    steps, sizes = max(plan.nfe for plan in plans), [len(plan.order) for plan in plans]

    def shared(parts: list[np.ndarray], axes: int) -> Any:
        rows = np.concatenate([np.broadcast_to(x, (size, *x.shape[x.ndim - axes:]))
                               for x, size in zip(parts, sizes, strict=True)])
        if (rows != rows[:1]).any():
            return rows
        return rows[0] if axes else int(rows[0])

    counts = shared([np.pad(plan.tokens_per_step, [(0, 0)] * (plan.tokens_per_step.ndim - 1) + [(0, steps - plan.nfe)])
                     for plan in plans], 1)
    diffused, given = (shared([np.asarray(x) for x in each], 0) for each in (
        [plan.diffused for plan in plans], [plan.given for plan in plans]))
    return Plan(jnp.concatenate([plan.order for plan in plans]), counts, diffused - given, given)


def leave(plan: Plan, known: Bool[np.ndarray, "B L"], asked: Bool[np.ndarray, "B L"]) -> Plan:
    """The plan that decodes the tokens `asked` alone; the other unknown ones go to the end of the order and stay masks.

    Args:
      plan: the plan in which all tokens that are not asked for count as known.
    """
    rank, orders = np.where(known, 0, np.where(asked, 1, 2)), np.asarray(plan.order)
    along = np.argsort(np.take_along_axis(rank, orders, axis=1), axis=1, kind="stable")
    return join([Plan(jnp.asarray(np.take_along_axis(orders, along, axis=1)), plan.tokens_per_step,
                      plan.diffused - plan.given, known.sum(1))])


Policy = Callable[[Key[Array, ""], int, int, int, float, int], Plan]


def draw(policy: str, key: Key[Array, "..."], batch: int, length: int, steps: int, alpha_0: float,
         known: Bool[np.ndarray, "B L"] | None = None) -> Plan:
    """A plan of the named policy, of T = `steps` where it has a T.

    Args:
      key: of the plan; with `known`, one for each row, whose plan depends on no other row.
      known: tokens that are known beforehand, by natural position. The policy plans the others, as if there were only
        these.

    Raises:
      EsoError: for an unknown policy, or values that it cannot take.
    """
    require(policy in POLICIES, "plan", policy, f"choose one of {', '.join(POLICIES)}")
    require(1 <= steps < 2**31, "steps", steps, "T must be at least 1, and less than 2**31")
    require(0 <= alpha_0 <= 1, "alpha_0", alpha_0, "must be in [0, 1]")
    if known is None:
        return POLICIES[policy](key, batch, length, steps, alpha_0, length)

    def one(key: Key[Array, ""], known: Bool[np.ndarray, " L"]) -> Plan:
        unknown = np.flatnonzero(~known)
        if not len(unknown):
            return complete(known)
        found = POLICIES[policy](key, 1, len(unknown), steps, alpha_0, length)
        return after_known(known, unknown[np.asarray(found.order[0])], found.tokens_per_step, found.diffused)

    return join([one(*row) for row in zip(key, known, strict=True)])


def after_known(known: Bool[np.ndarray, " L"], rest: Int[np.ndarray, " _"], counts: Int[np.ndarray, " S"],
                diffusion: Each | None = None) -> Plan:
    """The plan of one row: the known positions, ascending, then the rest in an order and by steps of its own."""
    orders = np.concatenate([np.flatnonzero(known), rest])[None]
    return Plan(jnp.asarray(orders, jnp.int32), counts, diffusion, int(known.sum()))


def complete(known: Bool[np.ndarray, " L"]) -> Plan:
    """The plan of a row in which every token is known: it has no steps."""
    return after_known(known, np.zeros(0, np.int64), np.zeros(0, np.int64), 0)


def binomial(key: Key[Array, ""], batch: int, length: int, steps: int, alpha_0: float, most: int | None = None) -> Plan:
    """The paper's plan (Algorithm 2): T diffusion steps over about alpha_0 L tokens, then one token per step.

    Going from t to s = t - 1/T, each token still masked is decoded with probability
    (alpha_s - alpha_t) / (1 - alpha_t), alpha_t = alpha_0 (1 - t); steps that decode nothing are dropped. A token is
    then decoded at each step with the same unconditional probability alpha_0 / T, so the counts are drawn at once: each
    of L tokens goes to the diffusion phase with probability alpha_0, and to one of its T steps uniformly. Rows
    share the counts; each has its own random positions, followed by the rest in ascending order.
    E[NFE] = (1 - alpha_0) L + T (1 - (1 - alpha_0 / T)^L), see `expected_nfe`.

    Args:
      most: for how many tokens random numbers are drawn, of which the first `length` are used: one program for all.
    """
    phase, step, shuffled = (np.asarray(x) for x in _draw(key, steps, batch, most or length))
    _, counts = np.unique(step[:length][phase[:length] < alpha_0], return_counts=True)
    return _then_ascending(shuffled, length, counts)


@functools.partial(jax.jit, static_argnames=("batch", "most"))
def _draw(key: Key[Array, ""], steps: Int[Array, ""] | int, batch: int, most: int) -> tuple[Array, Array, Array]:
    """(a uniform per token, which decides on its phase; its diffusion step; random orders [B, most])."""
    phase_key, step_key, order_key = jax.random.split(key, 3)
    return (jax.random.uniform(phase_key, (most,)), jax.random.randint(step_key, (most,), 0, steps),
            _shuffle(order_key, batch, most))


def balanced(key: Key[Array, ""], batch: int, length: int, steps: int, alpha_0: float, most: int | None = None) -> Plan:
    """alpha_0 L tokens (rounded) in T steps that differ by at most one token, then one token per step."""
    return _then_ascending(_shuffle(key, batch, most or length), length, _equal_parts(round(alpha_0 * length), steps))


def one_by_one(key: Key[Array, ""], batch: int, length: int, steps: int, alpha_0: float,
               most: int | None = None) -> Plan:
    """The binomial plan as T goes to infinity, and the first-hitting sampler of a model that is not told the time: each
    token goes to the diffusion phase with probability alpha_0, which then decodes one per step in random order."""
    count_key, order_key = jax.random.split(key)
    most = most or length
    count = int((np.asarray(jax.random.uniform(count_key, (most,)))[:length] < alpha_0).sum())
    return _then_ascending(_shuffle(order_key, batch, most), length, np.ones(count, np.int64))


@functools.partial(jax.jit, static_argnames=("batch", "most"))
def _shuffle(key: Key[Array, ""], batch: int, most: int) -> Int[Array, "B _"]:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    return jax.vmap(lambda k: jax.random.permutation(k, most))(keys)


def _then_ascending(shuffled: Int[Any, "B _"], length: int, counts: Int[np.ndarray, " S"]) -> Plan:
    """The plan of random positions, `counts` in each step, then the others one by one in ascending order. Positions
    from `length` on are dropped from `shuffled`."""
    diffusion, shuffled = int(counts.sum()), np.asarray(shuffled)
    shuffled = shuffled[shuffled < length].reshape(-1, length)
    orders = np.concatenate([shuffled[:, :diffusion], np.sort(shuffled[:, diffusion:])], axis=1)
    return Plan(jnp.asarray(orders), np.concatenate([counts, np.ones(length - diffusion, np.int64)]), diffusion)


def left_to_right(batch: int, length: int) -> Plan:
    """One token per step in natural order, as AR decodes."""
    return Plan(jnp.tile(jnp.arange(length), (batch, 1)), np.ones(length, np.int64), 0)


def strided(key: Key[Array, ""], batch: int, length: int, groups: int, shuffle: str) -> Plan:
    """The block sampler (paper, appendix E.10): a step decodes the group {j, j + S, j + 2S, ...}, S = `groups`, whose
    members are as far apart as possible.

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
    inside, counts = _blocks(key, batch, length, block, policy, steps, np.full(length // block, block))
    return Plan(jnp.asarray(inside.reshape(batch, length), jnp.int32), counts)


def blocks_after_known(key: Key[Array, ""], known: Bool[np.ndarray, " L"], block: int, policy: str, steps: int) -> Plan:
    """The plan of one row, as `within_blocks` makes it, if some tokens are known: the policy plans the others of each
    block."""
    left = (~known).reshape(-1, block).sum(1)
    if not left.any():
        return complete(known)
    inside, counts = _blocks(key, 1, len(known), block, policy, steps, left)
    rest = inside.reshape(-1)
    return after_known(known, rest[~known[rest]], counts)


def _blocks(key: Key[Array, ""], batch: int, length: int, block: int, policy: str, steps: int,
            left: Int[np.ndarray, " J"]) -> tuple[Int[np.ndarray, "B J _"], Int[np.ndarray, " S"]]:
    """(each block's positions in random order, the tokens of each step, which decode the first `left` of each
    block)."""
    policies = ("binomial", "balanced", "one-by-one")
    require(policy in policies, "plan", policy, f"BD3-LM's plans are {', '.join(policies)}")
    blocks = length // block
    step_key, order_key = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(order_key, jnp.arange(batch))
    inside = jax.vmap(lambda k: jax.random.permutation(k, jnp.tile(jnp.arange(block), (blocks, 1)), axis=1,
                                                       independent=True))(keys)
    if policy == "binomial":
        step = np.asarray(jax.random.randint(step_key, (blocks, block), 0, steps))
        counts = [np.unique(row[:some], return_counts=True)[1] for row, some in zip(step, left, strict=True)]
    else:
        counts = [_equal_parts(some, steps if policy == "balanced" else block) for some in left.tolist()]
    return np.asarray(inside) + block * np.arange(blocks)[None, :, None], np.concatenate(counts)


def _equal_parts(total: int, parts: int) -> Int[np.ndarray, " S"]:
    """`total` in at most `parts` positive parts that differ by at most one."""
    parts = min(parts, total)
    return np.diff(np.arange(parts + 1) * total // max(parts, 1))


def expected_nfe(length: int, steps: int, alpha_0: float) -> float:
    """E[NFE] of the binomial plan in closed form."""
    return (1 - alpha_0) * length + steps * (1 - (1 - alpha_0 / steps) ** length)


def _strided(shuffle: str) -> Policy:
    def policy(key: Key[Array, ""], batch: int, length: int, steps: int, alpha_0: float, most: int) -> Plan:
        require(alpha_0 == 1, "alpha_0", alpha_0, "a strided plan decodes all tokens by diffusion; give 1")
        return strided(key, batch, length, steps, shuffle)

    return policy


POLICIES: dict[str, Policy] = {
    "binomial": binomial, "balanced": balanced, "one-by-one": one_by_one,
    "strided": _strided("none"), "strided-shared": _strided("shared"), "strided-row": _strided("row"),
    "left-to-right": lambda key, batch, length, steps, alpha_0, most: left_to_right(batch, length),
}
