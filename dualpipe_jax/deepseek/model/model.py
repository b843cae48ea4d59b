"""A DeepSeek-V3-style model and how it is trained."""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import Mesh

from dualpipe_jax.deepseek.model.layout import Layout
from dualpipe_jax.deepseek.model.options import DeepSeekOptions
from dualpipe_jax.deepseek.model.pipeline import DeepSeekPipeline, unpipelined
from dualpipe_jax.deepseek.model.placement_config import rows_of_buffer
from dualpipe_jax.planning import Partition, partition_layers
from dualpipe_jax.schedules import Schedule
from eplb_jax import ExpertParallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeek(DeepSeekOptions):
    """A DeepSeek-V3-style model and how it is trained.

    Attributes:
      architecture: its sizes.
      compute_dtype: of activations and of the weights in matrix products; parameters,
        gradients and the optimizer are float32, and so is the router.
      products: `"fp8"` multiplies in float8, forward and backward, with scales for 1 x
        128 values of activations and gradients and for 128 x 128 of weights: experts,
        dense networks and the matrices of the attention. Embedding, output, router,
        norms and the scores of the attention stay in `compute_dtype` or float32. What
        is kept for the backward, and what waits for W, is in float8 (DeepSeek-V3
        report, section 3.3). On NVIDIA GPUs it needs compute capability 8.9 or more;
        elsewhere the same rounded numbers are multiplied in float32. `"plain"`: in
        `compute_dtype`.
      eplb: redundant experts, rebalanced as the load changes; None: no redundant
        experts.
      bias_update_rate: of the auxiliary-loss-free balancing.
      balance_loss: factor of the sequence-wise balance loss, alpha.
      mtp_weight: factor of the multi-token prediction loss, lambda.
      z_loss: factor of the squared log-normalizer of the output (arXiv:2204.02311).
      buffer_factor: rows of a device's buffer for the tokens of its experts, as a
        multiple of the mean; None: room for all that can arrive. Choices that exceed
        the buffer count as zero, and are reported as `overflow`.
      remat: what the backward pass recomputes instead of keeping it. `"attention"`
        keeps only the residual stream of an attention; `"experts"` keeps the tokens
        that arrived at the experts and nothing computed inside them; both together keep
        of a layer only its input and what was exchanged.
      payload: `"fp8"` sends tokens to their experts in float8, and keeps them so; see
        `eplb_jax.ExpertParallel`.
      balance: `"exact"` plans each microbatch by its own counts: devices fetch the
        experts that even out their rows, and the buffer has room for the mean. See
        `eplb_jax.ExpertParallel`.
      num_fetched: experts that a device may fetch in a layer and microbatch, for
        `balance="exact"`.
      spread_shared: whether the rows of the shared expert are planned as well; see
        `eplb_jax.ExpertParallel`.
      layer_costs: costs of the layers, in any unit; None: those of
        `DeepSeekConfig.forward_flops`.
      head_cost: cost of what follows the layers, in the same unit.
      rank_speeds: speeds of the pipeline's ranks, in any unit; None: all alike.
      stage_code: what stages of different layers run. `"shared"`: one code, with a
        branch wherever two of them differ. `"own"`: separate code for each kind of
        stage, without branches; exchanges inside a branch cannot be hidden. It takes
        longer to compile; where all stages are alike it makes no difference.
      max_layers: most layers of a stage. Every rank has room for as many as the longest
        stage has, so a better balance may cost memory everywhere.
    """

    def partition(self, schedule: Schedule, sequence_length: int) -> Partition:
        """Divides the layers over the stages."""
        arch = self.architecture
        costs, head_cost = self.layer_costs, self.head_cost
        if costs is None or head_cost is None:
            # Tensor cores multiply float8 twice as fast as bfloat16.
            matrix_cost = 0.5 if self.products == "fp8" else 1.0
            costs = tuple(
                arch.forward_flops(layer, sequence_length, matrix_cost)
                for layer in range(arch.num_hidden_layers)
            )
            head_cost = arch.head_flops(sequence_length, matrix_cost)
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
        """Returns the model over the stages of a schedule.

        Args:
          schedule: the pipeline's.
          mesh: with the axes pp, dp and ep.
          microbatch_size: sequences of a microbatch, over dp and ep.
          sequence_length: tokens of a sequence.

        Raises:
          ValueError: the layers do not fit the stages, the experts do not fit the ep
            axis, or products are in float8 and the GPUs have none.
        """
        partition = self.partition(schedule, sequence_length)
        devices = mesh.shape["ep"]
        tokens = microbatch_size * sequence_length / (mesh.shape["dp"] * devices)
        num_choices = tokens * (
            self.architecture.num_experts_per_tok + self.spread_shared
        )
        parallel = ExpertParallel(
            axis_name="ep" if devices > 1 else None,
            num_devices=devices,
            num_nodes=self.eplb.num_nodes if self.eplb else 1,
            num_rows=rows_of_buffer(self.buffer_factor, num_choices, devices),
            payload=self.payload,
            remat="experts" in self.remat,
            balance=self.balance,
            num_fetched=self.num_fetched,
            spread_shared=self.spread_shared,
        )
        self.architecture.check_activations(
            math.ceil(tokens), sequence_length, parallel.most_rows(num_choices)
        )
        return DeepSeekPipeline(
            model=self,
            layout=Layout(partition.layers, self.architecture.first_k_dense_replace),
            num_microbatches=schedule.num_microbatches,
            mesh=mesh,
            parallel=parallel,
            description=str(partition),
        )

    def build_unpipelined(self, num_microbatches: int = 1) -> DeepSeekPipeline:
        """Returns the model as one stage on one device, without redundant experts."""
        return unpipelined(self, num_microbatches)
