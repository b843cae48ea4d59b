"""How a layer is divided among devices: its physical experts, and the exchange."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from eplb_jax.layer.exchange import Transport
from eplb_jax.layer.microbatch_plan import check_slack
from eplb_jax.layer.payload import Payload
from eplb_jax.layer.replicas import ReplicaChoice
from eplb_jax.placement import check_choices, check_counts

Route = Literal["direct", "by_node"]
ApplyScores = Literal["before", "after"]
Balance = Literal["placement", "exact"]


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
    """How a layer's physical experts are divided among devices, and tokens exchanged.

    Attributes:
      axis_name: mesh axis, inside `jax.shard_map`; None: one device.
      num_devices: size of the axis.
      num_nodes: nodes that the devices are divided among, in order; for
        `replica_choice="nearest"` and `route="by_node"`.
      replica_choice: see `choose_physical_experts`.
      num_rows: rows of a device's buffer; None: as many as can arrive, see
        `plan_dispatch`.
      transport: see `exchange`.
      payload: `"plain"` sends tokens as they are, `"fp8"` as float8_e4m3fn with a
        float32 scale for every 128 channels.
      remat: whether the backward pass recomputes the experts from the rows that
        arrived, so that only these are kept.
      apply_scores: whether router weights are applied before or after the experts'
        outputs are sent back. `"before"` sends each weight along with its token, and
        the expert applies it. `"after"` sends no weights; the token's device applies
        them, but a backward pass would have to keep all outputs, so it is for serving.
      route: `"direct"` sends a token to each of its physical experts. `"by_node"` sends
        it once to each node that has any of them, to the device at the sender's
        position in that node, which forwards it inside the node and sums the results
        (DeepSeek-V3 report, arXiv:2412.19437, section 3.2.2): fewer bytes between
        nodes, but more exchanges.
      balance: `"placement"` computes each choice where the placement has its expert.
        `"exact"` plans each call by its own counts, see `plan_microbatch`: devices
        fetch the experts that even out their rows, so the buffer has
        `ceil(tokens * top_k * (1 + slack))` rows whatever the router does.
        `replica_choice` has no effect then.
      num_fetched: experts that a device may fetch in a call, for `balance="exact"`. If
        they do not suffice for equal rows, what does not fit counts as overflow, unless
        `num_rows` is larger than the buffer above.
      spread_shared: for `balance="exact"`, whether the rows of the shared expert are
        planned as well, so that devices with few other rows compute more of them and
        fewer experts are fetched. The buffer then has room for
        `tokens * (top_k + 1) * (1 + slack)` rows.
      slack: see `plan_microbatch`.
      keep_fetched: whether fetched weights are kept for the backward pass; else they
        are fetched again there.

    Raises:
      ValueError: for a field that has none of these values, nodes that do not divide
        the devices, and `num_fetched`, `spread_shared`, `slack` or `keep_fetched`
        without `balance="exact"`.
    """

    axis_name: str | None = None
    num_devices: int = 1
    num_nodes: int = 1
    replica_choice: ReplicaChoice = "spread"
    num_rows: int | None = None
    transport: Transport = "auto"
    payload: Payload = "plain"
    remat: bool = False
    apply_scores: ApplyScores = "before"
    route: Route = "direct"
    balance: Balance = "placement"
    num_fetched: int = 0
    spread_shared: bool = False
    slack: float = 0.0
    keep_fetched: bool = False

    def __post_init__(self):
        check_choices(
            replica_choice=(self.replica_choice, ReplicaChoice),
            transport=(self.transport, Transport),
            payload=(self.payload, Payload),
            apply_scores=(self.apply_scores, ApplyScores),
            route=(self.route, Route),
            balance=(self.balance, Balance),
        )
        check_counts(num_devices=self.num_devices, num_nodes=self.num_nodes)
        if self.num_rows is not None:
            check_counts(num_rows=self.num_rows)
        if self.num_devices % self.num_nodes:
            raise ValueError(f"{self.num_nodes=} must divide {self.num_devices=}.")
        if self.num_fetched < 0:
            raise ValueError(f"{self.num_fetched=} must be at least 0; a few suffice.")
        check_slack(self.slack)
        if self.balance != "exact":
            for name in ("num_fetched", "spread_shared", "slack", "keep_fetched"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)} needs balance='exact'; "
                        f"balance={self.balance!r} fetches nothing."
                    )

    @property
    def is_exact(self) -> bool:
        """Whether each call is planned by its own counts."""
        return self.balance == "exact" and self.num_devices > 1

    def most_rows(self, num_choices: float) -> int:
        """Rows of a device's buffer, if each device has so many choices.

        Examples:
          >>> ExpertParallel("ep", num_devices=4).most_rows(8)
          32
          >>> ExpertParallel("ep", num_devices=4, balance="exact").most_rows(8)
          8
        """
        if self.num_rows is not None:
            return self.num_rows
        return math.ceil(
            num_choices * (1 + self.slack if self.is_exact else self.num_devices)
        )


ONE_DEVICE = ExpertParallel()
