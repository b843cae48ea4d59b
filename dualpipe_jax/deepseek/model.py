"""A DeepSeek-V3-style model and how it is trained."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from jax.sharding import AbstractMesh, Mesh

from dualpipe_jax.deepseek.balancing import EplbConfig
from dualpipe_jax.deepseek.config import DeepSeekConfig
from dualpipe_jax.deepseek.layout import Layout
from dualpipe_jax.deepseek.stages import DeepSeekPipeline
from dualpipe_jax.partition import Partition, partition_layers
from dualpipe_jax.schedule import Schedule
from eplb_jax import ExpertParallel
from eplb_jax.dispatch import Payload

Remat = Literal["attention", "experts"]
StageCode = Literal["shared", "own"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeek:
    """A DeepSeek-V3-style model and how it is trained.

    Attributes:
      architecture: its sizes.
      compute_dtype: of activations and of the weights that products see; parameters,
        gradients and the optimizer are float32, and so is the router.
      eplb: redundant experts, placed anew as the load changes; None: none.
      bias_update_rate: of the auxiliary-loss-free balancing.
      balance_loss: factor of the sequence-wise balance loss, alpha.
      mtp_weight: factor of the multi-token prediction loss, lambda.
      z_loss: factor of the squared log-normaliser of the output (arXiv:2204.02311).
      buffer_factor: rows of a device's buffer for the tokens of its experts over the
        mean; None: room for all that can come. What finds no room counts as zero, and
        is reported as `overflow`.
      remat: what the backward pass computes again instead of keeping it: `"attention"`
        keeps the residual stream and nothing else of an attention, `"experts"` the
        tokens that came to the experts and nothing of what is inside them; both keep of
        a layer its input and what was exchanged.
      payload: `"fp8"` sends tokens to their experts in float8, and keeps them so; see
        `eplb_jax.dispatch.send`.
      layer_costs: of each layer, in any unit; None: `DeepSeekConfig.forward_flops`.
      head_cost: of what stands behind the layers, in the same unit.
      rank_speeds: of the pipeline's ranks, in any unit; None: all alike.
      stage_code: what stages of different layers run. `"shared"`: the same, with a
        branch wherever two of them differ. `"own"`: code for each kind of stage,
        without branches, inside which exchanges cannot be hidden. It takes longer to
        compile; where all stages are alike it is the same.
      max_layers: of a stage, at most. Every rank has room for as many as the longest
        stage has, so that a better balance may cost memory everywhere.
    """

    architecture: DeepSeekConfig
    compute_dtype: str = "float32"
    eplb: EplbConfig | None = None
    bias_update_rate: float = 1e-3
    balance_loss: float = 1e-4
    mtp_weight: float = 0.3
    z_loss: float = 0.0
    buffer_factor: float | None = None
    remat: tuple[Remat, ...] = ()
    payload: Payload = "plain"
    layer_costs: tuple[float, ...] | None = None
    head_cost: float | None = None
    rank_speeds: tuple[float, ...] | None = None
    stage_code: StageCode = "shared"
    max_layers: int | None = None

    def __post_init__(self):
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"{self.compute_dtype=} must be 'float32' or 'bfloat16'.")
        if unknown := set(self.remat) - set(get_args(Remat)):
            raise ValueError(
                f"remat={self.remat}: {sorted(unknown)[0]!r} is unknown; choose from "
                f"{', '.join(get_args(Remat))}."
            )
        if self.stage_code not in get_args(StageCode):
            raise ValueError(f"{self.stage_code=} must be 'shared' or 'own'.")
        if (self.layer_costs is None) != (self.head_cost is None):
            raise ValueError(
                "layer_costs and head_cost share a unit; give both or neither."
            )
        costs, num_layers = self.layer_costs, self.architecture.num_layers
        if costs is not None and len(costs) != num_layers:
            raise ValueError(
                f"layer_costs has {len(costs)} entries, but the model has "
                f"{num_layers=}; give one a layer."
            )

    def partition(self, schedule: Schedule, sequence_length: int) -> Partition:
        """Which layers each stage gets."""
        arch = self.architecture
        costs, head_cost = self.layer_costs, self.head_cost
        if costs is None or head_cost is None:
            costs = tuple(
                arch.forward_flops(layer, sequence_length)
                for layer in range(arch.num_layers)
            )
            head_cost = arch.head_flops(sequence_length)
        return partition_layers(
            costs,
            schedule,
            head_cost=head_cost,
            speeds=self.rank_speeds,
            max_layers=self.max_layers,
        )

    def build(
        self,
        schedule: Schedule,
        mesh: Mesh,
        *,
        microbatch_size: int,
        sequence_length: int,
    ) -> DeepSeekPipeline:
        """The model over the stages of `schedule`.

        Args:
          schedule: the pipeline's.
          mesh: with the axes pp, dp and ep.
          microbatch_size: sequences of a microbatch, over dp and ep.
          sequence_length: tokens of a sequence.

        Raises:
          ValueError: the layers do not fit the stages, or the experts the ep axis.
        """
        partition = self.partition(schedule, sequence_length)
        devices, num_rows = mesh.shape["ep"], None
        if self.buffer_factor is not None:
            tokens = microbatch_size * sequence_length / (mesh.shape["dp"] * devices)
            mean = tokens * self.architecture.experts_per_token
            num_rows = math.ceil(self.buffer_factor * mean)
        parallel = ExpertParallel(
            axis_name="ep" if devices > 1 else None,
            num_devices=devices,
            num_nodes=self.eplb.num_nodes if self.eplb else 1,
            num_rows=num_rows,
            payload=self.payload,
            remat="experts" in self.remat,
        )
        return DeepSeekPipeline(
            model=self,
            layout=Layout(partition.layers, self.architecture.num_dense_layers),
            num_microbatches=schedule.num_microbatches,
            mesh=mesh,
            parallel=parallel,
            description=str(partition),
        )

    def build_unpipelined(self, num_microbatches: int = 1) -> DeepSeekPipeline:
        """The model as one stage on one device, without redundant experts."""
        layers = (tuple(range(self.architecture.num_layers)),)
        return DeepSeekPipeline(
            model=dataclasses.replace(self, eplb=None),
            layout=Layout(layers, self.architecture.num_dense_layers),
            num_microbatches=num_microbatches,
            mesh=AbstractMesh((1, 1, 1), ("pp", "dp", "ep")),
            parallel=ExpertParallel(),
        )
