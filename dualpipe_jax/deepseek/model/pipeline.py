"""The model over the stages of one layout, as the training job runs it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

from dualpipe_jax import compat
from dualpipe_jax.deepseek.model.balancing import RouterState, TrainingBalancer
from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from dualpipe_jax.deepseek.model.ends import ModelEnds
from dualpipe_jax.deepseek.model.layout import Layout, relayout
from dualpipe_jax.deepseek.model.modules import Modules
from dualpipe_jax.deepseek.model.observation import exact_metrics, stack_stats
from dualpipe_jax.deepseek.model.options import DeepSeekOptions
from dualpipe_jax.deepseek.model.preparation import ParamPreparation
from dualpipe_jax.deepseek.model.sampling import sample
from dualpipe_jax.deepseek.model.stage import StageRunner
from dualpipe_jax.executor import PipelineParams
from dualpipe_jax.train import PipelineModel
from eplb_jax import ExpertParallel, lookup
from eplb_jax.products import check_has_float8

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class DeepSeekPipeline(PipelineModel):
    """The model over the stages of one layout; see `PipelineModel` for the methods.

    For the structure of the parameters see `Modules`. Embedding, output matrix and
    dense networks are divided over `ep` at rest. Tokens travel to the embedding's
    columns; the output matrix is gathered once per step, a dense network each time that
    it runs.

    Attributes:
      model: what to build.
      layout: which layer is at which position of which stage.
      num_microbatches: microbatches of a step.
      mesh: with the axes pp, dp and ep.
      parallel: how the physical experts of a layer are divided over ep.
      description: the layout in words.
      num_saved_physical_experts: physical experts of a layer in the checkpoint that
        this model was written to, see `from_checkpoint_info`; None: as many as
        `balancer` has.
    """

    model: DeepSeekOptions
    layout: Layout
    num_microbatches: int
    mesh: Mesh | AbstractMesh
    parallel: ExpertParallel
    description: str = ""
    num_saved_physical_experts: int | None = None

    def __post_init__(self):
        arch, devices = self.arch, self.mesh.shape["ep"]
        for name in ("hidden_size", "intermediate_size"):
            if getattr(arch, name) % devices:
                raise ValueError(
                    f"{name}={getattr(arch, name)} must be a multiple of the ep axis, "
                    f"{devices}, which the matrices are divided over at rest."
                )
        if self.model.products == "fp8" and isinstance(self.mesh, Mesh):
            check_has_float8(self.mesh.devices.flat[0])
        self.balancer  # noqa: B018  raises now if sizes do not fit

    @property
    def arch(self) -> DeepSeekConfig:
        """The architecture."""
        return self.model.architecture

    @property
    def vocab_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.arch.vocab_size

    @property
    def tied(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        arch = self.arch
        return arch.tie_word_embeddings or arch.num_nextn_predict_layers > 0

    @functools.cached_property
    def balancer(self) -> TrainingBalancer:
        """Bias, load and placement of all MoE layers."""
        return TrainingBalancer(
            num_layers=self.arch.num_moe_layers + self.arch.num_nextn_predict_layers,
            num_experts=self.arch.n_routed_experts,
            num_groups=self.arch.n_group,
            num_devices=self.mesh.shape["ep"],
            bias_update_rate=(
                self.model.bias_update_rate if self.arch.has_router_bias else 0.0
            ),
            eplb=self.model.eplb,
        )

    @functools.cached_property
    def _modules(self) -> Modules:
        return Modules(self.arch, self.layout, self.parallel, self.model.products)

    @functools.cached_property
    def _preparation(self) -> ParamPreparation:
        return ParamPreparation(
            self.arch, self.layout, self.balancer, self.mesh, self.model.compute_dtype
        )

    @functools.cached_property
    def _stage(self) -> StageRunner:
        return StageRunner(self._modules, self.model, self.num_microbatches, self.mesh)

    @functools.cached_property
    def _ends(self) -> ModelEnds:
        return ModelEnds(self._modules, self.model, self.mesh)

    # Parameters.

    def init(self, key: jax.Array) -> PipelineParams:
        return self._modules.init(key)

    @property
    def param_specs(self) -> PipelineParams:  # pyright: ignore
        return self._modules.param_specs

    @property
    def prepared_specs(self) -> PipelineParams:  # pyright: ignore
        return self._preparation.specs(self.param_specs)

    def prepare_params(
        self, params: PipelineParams, buffers: RouterState
    ) -> PipelineParams:
        return self._preparation.prepare_params(params, buffers)

    def unprepare_grads(
        self, grads: PipelineParams, buffers: RouterState
    ) -> PipelineParams:
        return self._preparation.unprepare_grads(grads, buffers)

    # What the pipeline runs.

    def embed(self, params: jax.Array, tokens: jax.Array) -> jax.Array:
        return self._ends.embed(params, tokens)

    def stage(self, params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
        """Runs any stage; returns activations, and statistics of its MoE layers."""
        return self._stage.run(None, params, x)

    @property
    def stage_fns(self) -> Any:
        if self.model.stage_code == "shared":
            return self.stage
        rows = [tuple(row) for row in self.layout.kind_GP.tolist()]
        of = {row: functools.partial(self._stage.run, row) for row in set(rows)}
        return tuple(of[row] for row in rows)

    def loss(self, params: PyTree, x: jax.Array, targets: jax.Array, weights=None):
        """Returns the training loss, and its terms."""
        embed, head = params if self.tied else (None, params)
        return self._ends.loss(embed, head, x, targets, weights)

    def evaluate(self, embed, head, x, targets, weights=None) -> jax.Array:
        return self._ends.evaluate(embed, head, x, targets, weights)

    def logits(self, embed: jax.Array, head: PyTree, x: jax.Array) -> jax.Array:
        """Returns [batch, sequence, vocabulary] float32."""
        return self._ends.logits(embed, head, x)

    # Around a step.

    def init_buffers(self) -> RouterState:
        state = self.balancer.init()
        if self.num_saved_physical_experts is not None:
            shape = (self.balancer.num_layers, self.num_saved_physical_experts)
            state = state._replace(placement=jnp.zeros(shape, jnp.int32))
        return state

    def observe(self, buffers: RouterState, aux: Any, step: jax.Array):
        """Returns the router's next state, and metrics with the terms of the loss."""
        num_copies = self.mesh.shape["ep"]
        share = self.num_microbatches * self.mesh.shape["dp"] * num_copies
        loss, metrics = dict(aux.loss), {}
        mtp = loss.pop("mtp", None)
        stats = stack_stats(self.arch, self.parallel, self.layout, aux.stages, mtp)
        if stats:
            # All devices of `ep` report the same counts.
            counts_LE = stats["tokens_per_expert"] // num_copies
            counts_LE, buffers = self._replicated((counts_LE, buffers))
            buffers, metrics = self.balancer.observe(buffers, counts_LE, step)
            buffers, metrics = self._replicated((buffers, metrics))
            metrics["overflow"] = (stats["overflow"] // num_copies).sum()
            metrics["balance_loss"] = stats["balance_loss"].mean() / share
            if self.parallel.is_exact:
                dtype = self.model.compute_dtype
                metrics |= exact_metrics(stats, self.arch, self.parallel, dtype, share)
        metrics |= {name: value / share for name, value in loss.items()}
        return buffers, metrics

    def _replicated(self, tree: PyTree) -> PyTree:
        """On CPU devices, arrays of which each has the whole.

        Then a new placement, in a branch, needs no collective; `eplb_jax.runtime` says
        why. On GPUs the ranks of the pipeline plan for their own layers.
        """
        if compat.platform_of(self.mesh) != "cpu":
            return tree
        return lax.with_sharding_constraint(tree, NamedSharding(self.mesh, P()))

    # Checkpoints.

    @property
    def checkpoint_info(self) -> dict[str, Any]:
        return {
            "architecture": dataclasses.asdict(self.arch),
            "layout": self.layout.to_json(),
            "num_physical_experts": self.balancer.num_physical_experts,
        }

    def from_checkpoint_info(self, info: dict[str, Any]) -> DeepSeekPipeline:
        _check_architecture(self.arch, info.get("architecture", {}))
        return dataclasses.replace(
            self,
            layout=Layout.from_json(info["layout"]),
            num_saved_physical_experts=info["num_physical_experts"],
        )

    def convert_params(self, params: PipelineParams, old: Any) -> PipelineParams:
        stages = relayout(params.stages, old.layout, self.layout)
        return dataclasses.replace(params, stages=stages)

    def convert_buffers(self, buffers: RouterState, old: Any) -> RouterState:
        """Plans a new placement if the number of physical experts has changed."""
        if old.num_saved_physical_experts == self.balancer.num_physical_experts:
            return buffers
        return self.balancer.replan(buffers)

    def published(self, folder: str) -> Any:
        """See `dualpipe_jax.deepseek.pretrained`, which is above this room."""
        return lookup.find("dualpipe_jax.deepseek.pretrained:reader_for")(self, folder)

    def sample(
        self, params: PipelineParams, buffers: RouterState, prompt: Any, num_tokens: int
    ) -> np.ndarray:
        """See `dualpipe_jax.deepseek.model.sampling`."""
        single = unpipelined(self.model)
        return sample(single, self, params, buffers, prompt, num_tokens)


def unpipelined(
    options: DeepSeekOptions, num_microbatches: int = 1
) -> DeepSeekPipeline:
    """Returns the model as one stage on one device, without redundant experts."""
    layers = (tuple(range(options.architecture.num_hidden_layers)),)
    return DeepSeekPipeline(
        model=dataclasses.replace(options, eplb=None),
        layout=Layout(layers, options.architecture.first_k_dense_replace),
        num_microbatches=num_microbatches,
        mesh=AbstractMesh((1, 1, 1), ("pp", "dp", "ep")),
        parallel=ExpertParallel(),
    )


def _check_architecture(arch: DeepSeekConfig, saved: dict[str, Any]) -> None:
    """Raises a ValueError if a checkpoint is of another architecture."""
    own = dataclasses.asdict(arch)
    if not saved:
        raise ValueError(
            "the checkpoint is of another model: it has no architecture of DeepSeek's; "
            "use the config that wrote it."
        )
    # A version that had no such field computed what its default stands for.
    fields = dataclasses.fields(DeepSeekConfig)
    missing = dataclasses.MISSING
    saved = {f.name: f.default for f in fields if f.default is not missing} | saved
    for name in sorted(own.keys() | saved.keys()):
        if name not in own or name not in saved:
            what = "no field" if name in own else "the unknown field"
            raise ValueError(
                "the checkpoint is of another model, or of another version of "
                f"dualpipe_jax: its architecture has {what} {name}; resume with the "
                "version that wrote it."
            )
    others = [name for name in own if own[name] != saved[name]]
    if others:
        its, ours = (
            ", ".join(f"{name} is {values[name]}" for name in others[:4])
            for values in (saved, own)
        )
        raise ValueError(
            f"the checkpoint is of another model: its {its}, but the config's {ours}; "
            "use the config that wrote it."
        )
