"""Which experts a token goes to, and with which weights.

Plain functions of router logits, for any framework's router: softmax top-k, limited to
groups as in DeepSeek-V2 or not, and DeepSeek-V3's group-limited sigmoid top-k, with the
two means by which DeepSeek-V3 balances its experts, a bias for the selection and a
sequence-wise loss. All arithmetic is float32; ties go to the expert with the lower
index.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import checkify
from jax.typing import ArrayLike

from eplb_jax.layer.ids import known_ids

# Names logits and choices for the policies of `jax.checkpoint`.
ROUTING = "moe_routing"


class Routing(NamedTuple):
    """The experts that each token chose, its top_k choices.

    Attributes:
      experts: [..., top_k] int32, the chosen experts, best first.
      weights: [..., top_k] float32, factors of their outputs.
      scores: [..., experts] float32, of all experts, without the bias.
    """

    experts: jax.Array
    weights: jax.Array
    scores: jax.Array


def softmax_top_k(
    logits: jax.Array,
    top_k: int,
    *,
    num_groups: int = 1,
    topk_groups: int = 1,
    route_norm: bool = True,
    route_scale: float = 1.0,
    check_values: bool = False,
) -> Routing:
    """Chooses the top_k experts of highest probability.

    With groups they are those of the groups whose best experts are the most probable,
    as in DeepSeek-V2 (arXiv:2405.04434, section 2.2.2).

    Args:
      logits: [..., experts].
      top_k: experts per token.
      num_groups: groups of experts, each a run of consecutive experts.
      topk_groups: groups that a token may use.
      route_norm: whether a token's weights are normalized to sum to 1 (before
        `route_scale`), as in Mixtral; else they are the probabilities themselves.
      route_scale: factor of the weights.
      check_values: inside jit, reject logits that are not finite, by means of
        `jax.experimental.checkify`; then the caller must be transformed with it.

    Returns:
      A `Routing`.

    Raises:
      ValueError: if `top_k` is not between 1 and the number of experts in
        `topk_groups` groups, and if the groups do not divide the experts.

    Examples:
      >>> routing = softmax_top_k(jnp.log(jnp.array([[1.0, 5.0, 3.0]])), 2)
      >>> routing.experts.tolist(), [f"{w:.3f}" for w in routing.weights[0]]
      ([[1, 2]], ['0.625', '0.375'])
    """
    logits = _as_logits(logits, top_k, check_values)
    _check_groups(logits.shape[-1], top_k, num_groups, topk_groups)
    scores = jax.nn.softmax(logits)
    chosen = _in_best_groups(scores, num_groups, topk_groups, num_best=1)
    experts = _best_experts(chosen, top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if route_norm:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Routing(experts, weights * route_scale, scores)


def sigmoid_group_top_k(
    logits: jax.Array,
    top_k: int,
    *,
    bias: jax.Array | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    route_norm: bool = True,
    route_scale: float = 1.0,
    check_values: bool = False,
) -> Routing:
    """Chooses experts as DeepSeek-V3 does: the best groups, then their best experts.

    A group's score is the sum of its two best experts' scores. The bias affects only
    the selection; the weights come from the unbiased scores. (DeepSeek-V3 report,
    arXiv:2412.19437, sections 2.1.2 and 4.2; `deepseek-ai/DeepSeek-V3
    inference/model.py`, class Gate.)

    Args:
      logits: [..., experts].
      top_k: experts per token.
      bias: [experts] float32, see `update_bias`; None: no bias. No gradient flows to
        it.
      num_groups: groups of experts, each a run of consecutive experts.
      topk_groups: groups that a token may use.
      route_norm: whether a token's weights are normalized to sum to 1 (before
        `route_scale`).
      route_scale: factor of the weights; 2.5 in DeepSeek-V3.
      check_values: as in `softmax_top_k`.

    Returns:
      A `Routing`.

    Raises:
      ValueError: if `top_k` is not between 1 and the number of experts in
        `topk_groups` groups, if the groups do not divide the experts, and if the bias
        has another shape.

    Examples:
      Experts 0 and 3 have the best scores, but 2 and 3 are the best group:

      >>> logits = jnp.array([[3.0, -9.0, 1.0, 2.0]])
      >>> sigmoid_group_top_k(logits, 2, num_groups=2).experts.tolist()
      [[3, 2]]
    """
    logits = _as_logits(logits, top_k, check_values)
    num_experts = logits.shape[-1]
    _check_groups(num_experts, top_k, num_groups, topk_groups)
    scores = jax.nn.sigmoid(logits)
    biased = lax.stop_gradient(scores)
    if bias is not None:
        if bias.shape != (num_experts,):
            raise ValueError(
                f"bias has shape {bias.shape}, but there are {num_experts} experts; it "
                "must be [experts]."
            )
        rank_1E = (1,) * (scores.ndim - 1) + (num_experts,)
        biased = biased + lax.stop_gradient(bias.astype(jnp.float32)).reshape(rank_1E)
    biased = _in_best_groups(biased, num_groups, topk_groups, num_best=2)
    experts = _best_experts(biased, top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if route_norm:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, weights * route_scale, scores)


def update_bias(bias: jax.Array, counts: jax.Array, rate: float = 1e-3) -> jax.Array:
    """Updates the bias: lowers it for experts with too many tokens, else raises it.

    Auxiliary-loss-free balancing (arXiv:2408.15664; DeepSeek-V3 report, section
    2.1.2, where `rate` is 1e-3 for most of the training, then 0).

    Args:
      bias: [..., experts] float32.
      counts: [..., experts] tokens of each expert in the step, summed over all devices
        that share the bias.
      rate: change of an entry per step.

    Returns:
      [..., experts] float32.

    Examples:
      >>> update_bias(jnp.zeros(3), jnp.array([4, 2, 0]), rate=0.5).tolist()
      [-0.5, 0.0, 0.5]
    """
    counts = counts.astype(jnp.float32)
    return bias + rate * jnp.sign(counts.mean(axis=-1, keepdims=True) - counts)


def sequence_balance_loss(
    scores: jax.Array, top_k: int, is_padding: jax.Array | None = None
) -> jax.Array:
    """Computes DeepSeek-V3's sequence-wise balance loss, without its factor alpha.

    For each sequence this is the sum over experts of f_i * P_i: f_i is the share of
    its tokens with expert i among their top_k scores, times experts / top_k; P_i is
    the mean of the expert's normalized score. The loss is 1 if all experts are used
    evenly. (arXiv:2412.19437, equations 17 to 20.)

    Args:
      scores: [..., sequence, experts] float32, from a `Routing`.
      top_k: experts per token.
      is_padding: [..., sequence] bool, tokens that do not count; None: all count.

    Returns:
      [...] float32, one per sequence; 0 for a sequence of padding.

    Examples:
      >>> even = sequence_balance_loss(jnp.array([[0.9, 0.1], [0.1, 0.9]]), 1)
      >>> uneven = sequence_balance_loss(jnp.array([[0.9, 0.1], [0.9, 0.1]]), 1)
      >>> round(float(even), 3), round(float(uneven), 3)
      (1.0, 1.8)
    """
    num_experts = scores.shape[-1]
    experts = _best_experts(scores, top_k)
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(axis=-2)
    share = scores / scores.sum(axis=-1, keepdims=True)
    counts = jnp.ones(scores.shape[:-1], jnp.float32)
    if is_padding is not None:
        counts = 1.0 - is_padding.astype(jnp.float32)
    counts = counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
    used = (chosen * counts[..., None]).sum(axis=-2) * (num_experts / top_k)
    return (used * (share * counts[..., None]).sum(axis=-2)).sum(axis=-1)


def count_experts(experts: jax.Array, num_experts: int) -> jax.Array:
    """Counts the tokens that chose each expert.

    Args:
      experts: [..., top_k] int32; entries out of range, such as -1 for a token that is
        padding, are not counted.
      num_experts: logical or physical experts.

    Returns:
      [num_experts] int32.

    Examples:
      >>> count_experts(jnp.array([[0, 2], [2, -1]]), 3).tolist()
      [1, 0, 2]
    """
    flat = known_ids(experts, num_experts).reshape(-1)
    flat = jnp.where(flat < 0, num_experts, flat)
    return jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop")


def _as_logits(logits: ArrayLike, top_k: int, check_values: bool) -> jax.Array:
    logits = jnp.asarray(logits)
    num_experts = logits.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"{top_k=} must be between 1 and the number of experts {num_experts}; a "
            "token cannot choose an expert twice."
        )
    logits = logits.astype(jnp.float32)
    if check_values:
        checkify.check(
            jnp.isfinite(logits).all(),
            "Router logits are not finite; lower the learning rate, or find the layer "
            "before that overflows.",
        )
    return checkpoint_name(logits, ROUTING)


def _in_best_groups(
    scores: jax.Array, num_groups: int, topk_groups: int, *, num_best: int
) -> jax.Array:
    """Returns the scores [..., experts], -inf outside of a token's best groups.

    A group's score is the sum of those of its `num_best` best experts.
    """
    if topk_groups == num_groups:
        return scores
    per_group = scores.shape[-1] // num_groups
    scores_GE = scores.reshape(*scores.shape[:-1], num_groups, per_group)
    num_best = min(num_best, per_group)
    best = lax.top_k(lax.stop_gradient(scores_GE), num_best)[0].sum(axis=-1)
    _, groups = lax.top_k(best, topk_groups)
    is_chosen = jax.nn.one_hot(groups, num_groups, dtype=jnp.bool_).any(axis=-2)
    scores_GE = jnp.where(is_chosen[..., None], scores_GE, -jnp.inf)
    return scores_GE.reshape(scores.shape)


def _best_experts(scores: jax.Array, top_k: int) -> jax.Array:
    """[..., top_k] int32, best first."""
    _, experts = lax.top_k(lax.stop_gradient(scores), top_k)
    return checkpoint_name(experts.astype(jnp.int32), ROUTING)


def _check_groups(
    num_experts: int, top_k: int, num_groups: int, topk_groups: int
) -> None:
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(
            f"{num_groups=} must divide the number of experts {num_experts}; change "
            "one of them."
        )
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"{topk_groups=} must be between 1 and {num_groups=}.")
    if top_k > num_experts // num_groups * topk_groups:
        raise ValueError(
            f"{top_k=} experts per token do not fit into {topk_groups=} groups of "
            f"{num_experts // num_groups} experts; allow more groups."
        )
