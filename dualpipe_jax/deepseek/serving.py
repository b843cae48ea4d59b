"""A serving setting: which model, on how many devices, with how much work on each."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from dualpipe_jax.deepseek.config import DeepSeekConfig

Phase = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One step of a serving engine; no pipeline, experts over all devices.

    Attributes:
      name: for reports.
      architecture: the model.
      phase: `"prefill"` computes whole prompts, `"decode"` one token a request.
      num_devices: of the `ep` axis.
      num_nodes: nodes that they are divided among.
      num_redundant: slots of a layer beyond one an expert.
      requests_per_device: in one step, over both of its overlapping microbatches.
      context_length: tokens of a prompt (prefill), or of a request's cache (decode).

    Raises:
      ValueError: sizes that do not fit each other.

    Examples:
      >>> from configs import profiles
      >>> profiles.prefill().tokens_per_device, profiles.decode().tokens_per_device
      (16384, 128)
    """

    name: str
    architecture: DeepSeekConfig
    phase: Phase
    num_devices: int
    num_nodes: int = 1
    num_redundant: int = 0
    requests_per_device: int
    context_length: int

    def __post_init__(self):
        if self.phase not in get_args(Phase):
            raise ValueError(f"{self.phase=} must be 'prefill' or 'decode'.")
        for name in ("num_devices", "num_nodes", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_devices % self.num_nodes:
            raise ValueError(f"{self.num_nodes=} must divide {self.num_devices=}.")
        if self.num_slots % self.num_devices:
            raise ValueError(
                f"num_experts + num_redundant = {self.num_slots} must be a multiple "
                f"of {self.num_devices=}."
            )
        if self.requests_per_device < 2 or self.requests_per_device % 2:
            raise ValueError(
                f"{self.requests_per_device=} must be even, for two microbatches."
            )

    @property
    def num_slots(self) -> int:
        """Slots of a layer."""
        return self.architecture.num_experts + self.num_redundant

    @property
    def tokens_per_device(self) -> int:
        """Tokens that one step computes on a device."""
        each = self.context_length if self.phase == "prefill" else 1
        return self.requests_per_device * each
