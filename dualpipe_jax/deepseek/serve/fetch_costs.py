"""From how many tokens on it pays to fetch experts, by the costs of overlap reports."""

from __future__ import annotations

import math
from typing import NamedTuple

from dualpipe_jax.deepseek.model import DeepSeekConfig
from dualpipe_jax.gpu import Gpu, find_gpu
from dualpipe_jax.gpu.overlap import (
    BETWEEN_LATENCY_S,
    INSIDE_LATENCY_S,
    KERNEL_LATENCY_S,
)
from eplb_jax.layer import Payload, bytes_of_token

# Compiled for H800s, 256 experts: 80 on 64 devices, 110 on 32 that hold 288.
_KERNELS_OF_PLAN = 100
_MOST_TOKENS = 1 << 24
_BF16 = 2


def break_even(
    config: DeepSeekConfig,
    gpu: str | Gpu,
    ep: int,
    *,
    imbalance: float = 1.2,
    num_fetched: float = 1.0,
    payload: Payload = "fp8",
    gpus_per_node: int = 8,
    efficiency: float = 0.7,
) -> int | None:
    """Returns the least tokens of a microbatch for which exact balance is faster.

    A layer takes as long as its fullest device: rows to multiply, weights to read, rows
    to exchange. With exact balance that device has the mean, but experts are fetched
    and read, and a plan is made. Nothing of that counts as hidden, so that it pays
    from fewer tokens on where something else runs meanwhile.

    Args:
      config: sizes of the model.
      gpu: a key of `dualpipe_jax.gpu.GPUS`, or a `Gpu`.
      ep: devices that the experts are divided among.
      imbalance: rows of the fullest device over the mean, without fetched experts. 1.05
        to 1.2 are usual for a placement that fits the loads of the window before.
      num_fetched: experts that the device that fetches most of them fetches.
      payload: see `eplb_jax.ExpertParallel`.
      gpus_per_node: devices of a node, which exchange by NVLink.
      efficiency: fraction of the GPU's peaks that kernels reach.

    Returns:
      Tokens of a device in one microbatch; None if more than 16,777,216 would do.

    Raises:
      ValueError: for an unknown GPU, an imbalance below 1, and sizes that are not above
        zero.

    Examples:
      DeepSeek-V3 on H800s: a prefill of 8,192 tokens per microbatch gains, a decode
      step of 64 does not:

      >>> from dualpipe_jax.configs.deepseek_v3 import architecture
      >>> 64 < break_even(architecture(), "h800", 32) < 8192
      True
    """
    gpu = find_gpu(gpu)
    if not 1 <= imbalance < math.inf:
        raise ValueError(
            f"{imbalance=} must be at least 1 and finite: rows of the fullest device "
            "over the mean."
        )
    positive = {
        "ep": ep,
        "num_fetched": num_fetched,
        "gpus_per_node": gpus_per_node,
        "efficiency": efficiency,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be above 0 and finite.")
    costs = _Costs.of(config, gpu, ep, payload, gpus_per_node, efficiency)

    def gains(tokens: int) -> bool:
        return costs.seconds(tokens, 1.0, num_fetched) < costs.seconds(
            tokens, imbalance, 0.0
        )

    if ep == 1 or not gains(_MOST_TOKENS):
        return None
    # What it gains grows with the tokens.
    too_few, enough = 0, _MOST_TOKENS
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if gains(middle) else (middle, enough)
    return enough


class _Costs(NamedTuple):
    """Seconds of a device, of each thing that it has some of.

    Attributes:
      choices: of a token.
      multiply: one row.
      held: reading the experts that the device holds.
      read: reading one more expert.
      exchange: one row, there and back.
      fetch: sending one expert.
      plan: a plan, and the latencies of a fetch.
    """

    choices: int
    multiply: float
    held: float
    read: float
    exchange: float
    fetch: float
    plan: float

    @classmethod
    def of(
        cls,
        config: DeepSeekConfig,
        gpu: Gpu,
        ep: int,
        payload: Payload,
        gpus_per_node: int,
        efficiency: float,
    ) -> _Costs:
        dim = config.hidden_size
        num_weights = 3 * dim * config.moe_intermediate_size
        in_node = min(gpus_per_node, ep)
        # Of a byte for any device: some stay, some travel in the node, some leave it.
        link = max(
            (in_node - 1) / ep / gpu.nvlink_bandwidth,
            (ep - in_node) / ep / gpu.network_bandwidth,
        )
        latency = BETWEEN_LATENCY_S if in_node < ep else INSIDE_LATENCY_S
        read = _BF16 * num_weights / (gpu.memory_bandwidth * efficiency)
        sent = bytes_of_token(payload, dim, "bfloat16") + _BF16 * dim
        return cls(
            choices=config.num_experts_per_tok,
            multiply=2 * num_weights / (gpu.bf16_flops * efficiency),
            held=config.n_routed_experts / ep * read,
            read=read,
            exchange=sent * link,
            fetch=_BF16 * num_weights * link,
            plan=_KERNELS_OF_PLAN * KERNEL_LATENCY_S + 3 * latency,
        )

    def seconds(self, tokens: int, fullest: float, fetched: float) -> float:
        """Of one layer, if the fullest device has that many times the mean."""
        rows = tokens * self.choices * fullest
        products = max(rows * self.multiply, self.held + fetched * self.read)
        fixed = self.plan + fetched * self.fetch if fetched else 0.0
        return products + rows * self.exchange + fixed
