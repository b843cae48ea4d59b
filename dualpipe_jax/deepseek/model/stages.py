"""The model over the stages of one layout: its parameters and what the pipeline runs.

Shape suffixes: see `dualpipe_jax.deepseek.model.config`; G stages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from dualpipe_jax.deepseek.model.balancing import Balancer, RouterState
from dualpipe_jax.deepseek.model.config import DeepSeekConfig
from dualpipe_jax.deepseek.model.layers import Head, Layer, MultiTokenPrediction
from dualpipe_jax.deepseek.model.layout import DENSE, MOE, NONE, Layout, relayout
from dualpipe_jax.deepseek.model.losses import (
    add_loss,
    cross_entropies,
    cross_entropy,
    logits_of,
)
from dualpipe_jax.deepseek.model.options import DeepSeekOptions
from dualpipe_jax.deepseek.model.preparation import Balancing, ParamPreparation
from dualpipe_jax.deepseek.model.sampling import sample
from dualpipe_jax.deepseek.model.trees import (
    bias_state,
    map_with_names,
    parameters,
    spec_of,
    zero_where,
)
from dualpipe_jax.executor import PipelineParams
from dualpipe_jax.train import PipelineModel
from eplb_jax import ExpertParallel
from eplb_jax.layer import EXCHANGED, MoEStats, cross_compiling

P = PartitionSpec
PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class DeepSeekPipeline(PipelineModel):
    """The model over the stages of one layout; see `PipelineModel` for the methods.

    Parameters: `stages` is a list of slots, each a dict of the parts of a layer with
    leaves [stages, ...]; `embed` is [vocabulary, D]; `head` is a dict with the last
    norm, the output matrix unless it is tied, and the multi-token prediction module.
    Embedding, output matrix and dense networks are divided over `ep` where they rest.
    Tokens travel to the embedding's columns; the output matrix is gathered once a step,
    a dense network each time that it runs.

    Attributes:
      model: what to build.
      layout: which layer stands where.
      num_microbatches: of a step.
      mesh: with the axes pp, dp and ep.
      parallel: how the slots of a layer are divided over ep.
      description: of the layout.
      num_saved_slots: slots of a layer in the checkpoint that this model was written
        to, see `from_checkpoint_info`; None: as many as `balancer` has.
    """

    model: DeepSeekOptions
    layout: Layout
    num_microbatches: int
    mesh: Mesh | AbstractMesh
    parallel: ExpertParallel
    description: str = ""
    num_saved_slots: int | None = None

    def __post_init__(self):
        arch, devices = self.arch, self.mesh.shape["ep"]
        for name in ("dim", "intermediate_size"):
            if getattr(arch, name) % devices:
                raise ValueError(
                    f"{name}={getattr(arch, name)} must be a multiple of the ep axis, "
                    f"{devices}, that the matrices at rest are divided over."
                )
        self.balancer  # noqa: B018  so that what does not fit is refused now

    @property
    def arch(self) -> DeepSeekConfig:
        """The architecture."""
        return self.model.architecture

    @property
    def vocab_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.arch.vocab_size

    @property
    def tied(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.arch.tied or self.arch.mtp

    @functools.cached_property
    def balancer(self) -> Balancer:
        """Bias, load and placement of all MoE layers."""
        return Balancer(
            num_layers=self.arch.num_moe_layers + self.arch.mtp,
            num_experts=self.arch.num_experts,
            num_groups=self.arch.num_groups,
            num_devices=self.mesh.shape["ep"],
            bias_update_rate=self.model.bias_update_rate,
            eplb=self.model.eplb,
        )

    @functools.cached_property
    def _graphs(self) -> dict[str, Any]:
        """The structure of the modules, without their arrays."""
        makers: dict[str, Any] = {
            str(slot): functools.partial(self._layer, slot)
            for slot in range(self.layout.num_slots)
        }
        makers["head"] = functools.partial(Head, self.arch)
        if self.arch.mtp:
            makers["mtp"] = functools.partial(
                MultiTokenPrediction, self.arch, self.parallel
            )
        return {
            name: nnx.graphdef(nnx.eval_shape(lambda make=make: make(_key())))
            for name, make in makers.items()
        }

    def _layer(self, slot: int, key: jax.Array) -> Layer:
        kinds = self.layout.kinds(slot)
        return Layer(
            self.arch,
            self.parallel,
            has_dense=DENSE in kinds,
            has_moe=MOE in kinds,
            key=key,
        )

    # Parameters and how they lie.

    def init(self, key: jax.Array) -> PipelineParams:
        """Parameters that do not depend on the layout: each layer has its own key."""
        layers_key, embed_key, head_key, mtp_key = jax.random.split(key, 4)

        def one(slot: int, layer: jax.Array) -> PyTree:
            return parameters(self._layer(slot, jax.random.fold_in(layers_key, layer)))

        slots = []
        for slot in range(self.layout.num_slots):
            layer_G = jnp.asarray(self.layout.layer_GS[:, slot])
            tree = jax.vmap(functools.partial(one, slot))(jnp.maximum(layer_G, 0))
            has = {DENSE: "dense", MOE: "moe"}
            kind_G = self.layout.kind_GS[:, slot]
            for kind, name in has.items():
                if name in tree:
                    tree[name] = zero_where(kind_G != kind, tree[name])
            rest = {k: v for k, v in tree.items() if k not in has.values()}
            slots.append(tree | zero_where(kind_G == NONE, rest))
        head = parameters(Head(self.arch, head_key))
        if self.arch.mtp:
            head["mtp"] = parameters(
                MultiTokenPrediction(self.arch, self.parallel, mtp_key)
            )
        shape = (self.arch.vocab_size, self.arch.dim)
        initial = nnx.initializers.truncated_normal(stddev=self.arch.initializer_range)
        return PipelineParams(slots, initial(embed_key, shape), head)

    @functools.cached_property
    def param_specs(self) -> PipelineParams:  # pyright: ignore
        shape = jax.eval_shape(lambda: self.init(_key()))
        # A slot's leaves have an axis of stages in front, which specs leave out.
        slots = map_with_names(lambda names, leaf: spec_of(names), shape.stages)
        head = map_with_names(lambda names, leaf: spec_of(names), shape.head)
        return PipelineParams(slots, P(None, "ep"), head)

    @property
    def prepared_specs(self) -> PipelineParams:  # pyright: ignore
        specs = self.param_specs
        stages = {"slots": specs.stages, "kind": P(), "balancing": P()}
        # The output matrix is whole for all microbatches of a step: gathering it for
        # each of them, as what is small beside a stage is, would take longer than the
        # product with it.
        params = {
            name: P() if name == "kernel" else s for name, s in specs.head.items()
        }
        head = {"params": params, "balancing": P()}
        return PipelineParams(stages, specs.embed, head)

    def prepare_params(
        self, params: PipelineParams, buffers: RouterState
    ) -> PipelineParams:
        return self._preparation.prepare_params(params, buffers)

    def unprepare_grads(
        self, grads: PipelineParams, buffers: RouterState
    ) -> PipelineParams:
        return self._preparation.unprepare_grads(grads, buffers)

    @functools.cached_property
    def _preparation(self) -> ParamPreparation:
        return ParamPreparation(
            self.arch, self.layout, self.balancer, self.mesh, self.model.compute_dtype
        )

    # What the pipeline runs.

    def embed(self, params: jax.Array, tokens: jax.Array) -> jax.Array:
        return self._look_up(params, tokens)

    def stage(self, params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
        """Any stage; beside the activations the statistics of its MoE slots."""
        return self._run_stage(None, params, x)

    @property
    def stage_fns(self) -> Any:
        if self.model.stage_code == "shared":
            return self.stage
        rows = [tuple(row) for row in self.layout.kind_GS.tolist()]
        of = {row: functools.partial(self._run_stage, row) for row in set(rows)}
        return tuple(of[row] for row in rows)

    def _run_stage(
        self, row: tuple[int, ...] | None, params: PyTree, x: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        """A stage with these kinds of layers; None: the parameters tell them."""
        aux = {}
        with self._kernels():
            for slot in range(self.layout.num_slots):
                kinds = self.layout.kinds(slot) if row is None else {row[slot]}
                x, stats = self._run_slot(slot, kinds, params, x)
                if stats is not None:
                    aux[str(slot)] = stats
        return x, aux

    def _kernels(self):
        """GPUs that are only compiled for have the same kernels as real ones."""
        if isinstance(self.mesh, Mesh) and self.mesh.devices.flat[0].platform != "cpu":
            return cross_compiling()
        return contextlib.nullcontext()

    def _run_slot(
        self, slot: int, kinds: Set[int], params: PyTree, x: jax.Array
    ) -> Any:
        kind = params["kind"][slot]
        tree = params["slots"][slot]
        balancing: Balancing | None = params["balancing"].get(str(slot))
        nothing = None if balancing is None else self._no_stats()

        def attend(x: jax.Array):
            with jax.named_scope("attn"):
                return self._merge(slot, tree, balancing).attend(x)

        def dense(x: jax.Array):
            # Gathered here, so that stages with experts in this slot gather nothing.
            whole = tree | {"dense": self._gather_dense(tree["dense"])}
            return self._merge(slot, whole, balancing).feed_forward(x), nothing

        def mix(x: jax.Array):
            return self._mix(self._merge(slot, tree, balancing), x, balancing)

        remat = self.model.remat
        # What is gathered must not be kept until W: it is more than all activations.
        feed = {DENSE: jax.checkpoint(dense), MOE: mix}
        if "attention" in remat and "experts" not in remat:
            attend = jax.checkpoint(attend)

        def run(x: Any):
            x = attend(x)
            if len(kinds - {NONE}) == 1:
                (only,) = kinds - {NONE}
                return feed[only](x)
            return lax.cond(kind == DENSE, feed[DENSE], mix, x)

        if {"attention", "experts"} <= set(remat):
            # What the experts read is a result of the attention: computed again for
            # one, it is there for the other.
            keep = jax.checkpoint_policies.save_only_these_names(*EXCHANGED)
            run = jax.checkpoint(run, policy=keep)

        if NONE not in kinds:
            return run(x)
        if kinds == {NONE}:
            return x, nothing
        return lax.cond(kind != NONE, run, lambda x: (x, nothing), x)

    def _merge(self, slot: int, tree: PyTree, balancing: Balancing | None) -> Layer:
        state = [tree] if balancing is None else [tree, bias_state(balancing.bias)]
        return nnx.merge(self._graphs[str(slot)], *state)

    def _gather_dense(self, dense: PyTree) -> PyTree:
        axes = {"gate": 1, "up": 1, "down": 0}
        return {
            name: {"kernel": self._gather(dense[name]["kernel"], axis)}
            for name, axis in axes.items()
        }

    def _mix(self, layer: Layer, x: jax.Array, balancing: Balancing | None) -> Any:
        assert balancing is not None
        y, stats = layer.mix(x, balancing.tables)
        weight = self.model.balance_loss / self.num_microbatches
        return add_loss(y, stats.balance_loss, weight), _log(stats)

    def _no_stats(self) -> dict[str, jax.Array]:
        return {
            "counts": jnp.zeros(self.arch.num_experts, jnp.int32),
            "overflow": jnp.zeros((), jnp.int32),
            "balance_loss": jnp.zeros((), jnp.float32),
        }

    def loss(self, params: PyTree, x: jax.Array, targets: jax.Array):
        """The loss that is trained on, and its terms."""
        embed, head = params if self.tied else (None, params)
        kernel = self._output_matrix(embed, head)
        sets, stats = [(self._norm(head, x), targets)], None
        if self.arch.mtp:
            assert embed is not None
            hidden, stats = self._next_next(embed, head, x, targets)
            # The token after the next one is the next position's target; the last
            # position of a sequence has none.
            sets.append((hidden[:, :-1], targets[:, 1:]))
        (loss, z_loss), *more = cross_entropies(sets, kernel)
        aux = {"loss": loss, "z_loss": z_loss}
        total = loss + self.model.z_loss * z_loss
        if stats is not None:
            ((mtp, _),) = more
            total = total + self.model.mtp_weight * mtp
            total = total + self.model.balance_loss * stats["balance_loss"]
            aux |= {"mtp_loss": mtp, "mtp": stats}
        return total, aux

    def evaluate(self, embed, head, x, targets) -> jax.Array:
        """The mean loss of the next tokens alone."""
        kernel = self._output_matrix(embed, head)
        return cross_entropy(self._norm(head, x), kernel, targets)[0]

    def logits(self, embed: jax.Array, head: PyTree, x: jax.Array) -> jax.Array:
        """[batch, sequence, vocabulary] float32."""
        kernel = self._output_matrix(embed, head)
        return logits_of(self._norm(head, x), kernel)

    def _next_next(self, embed: jax.Array, head: PyTree, x: jax.Array, targets):
        """What the multi-token prediction module makes of x, and its statistics."""
        balancing: Balancing = head["balancing"]
        bias = {"layer": bias_state(balancing.bias)}
        module = nnx.merge(self._graphs["mtp"], head["params"]["mtp"], bias)
        with self._kernels():
            hidden, stats = module(x, self._look_up(embed, targets), balancing.tables)
        return hidden, _log(stats)

    def _norm(self, head: PyTree, x: jax.Array) -> jax.Array:
        own = {name: leaf for name, leaf in head["params"].items() if name != "mtp"}
        return nnx.merge(self._graphs["head"], own).norm(x)

    def _output_matrix(self, embed: jax.Array | None, head: PyTree) -> jax.Array:
        if self.arch.tied:
            assert embed is not None
            return self._gather(embed, axis=1).T
        return head["params"]["kernel"]

    def _look_up(self, embed: jax.Array, tokens: jax.Array) -> jax.Array:
        """Embeddings [batch, sequence, dim]; every device has some of the columns.

        The tokens go to the columns and not the columns to the tokens: a microbatch's
        embeddings are fewer bytes than the matrix.
        """
        if self.mesh.shape["ep"] == 1:
            return embed[tokens]
        everyones = lax.all_gather(tokens, "ep")
        columns = embed[everyones]
        whole = lax.all_to_all(columns, "ep", split_axis=0, concat_axis=3, tiled=True)
        return whole[0]

    def _gather(self, leaf: jax.Array, axis: int) -> jax.Array:
        """A whole matrix, from the parts that the devices of `ep` hold at rest."""
        if self.mesh.shape["ep"] == 1:
            return leaf
        return lax.all_gather(leaf, "ep", axis=axis, tiled=True)

    # Around a step.

    def init_buffers(self) -> RouterState:
        buffers = self.balancer.init()
        if self.num_saved_slots is not None:
            shape = (self.balancer.num_layers, self.num_saved_slots)
            buffers = buffers._replace(placement=jnp.zeros(shape, jnp.int32))
        return buffers

    def observe(self, buffers: RouterState, aux: Any, step: jax.Array):
        """See `Balancer.observe`; and the terms of the loss."""
        share = self.num_microbatches * self.mesh.shape["dp"] * self.mesh.shape["ep"]
        stages, loss = aux.stages, dict(aux.loss)
        metrics = {}
        slots = [stages.get(str(slot)) for slot in range(self.layout.num_slots)]
        first, last = self.arch.first_k_dense_replace, self.arch.num_layers
        mtp = loss.pop("mtp", None)
        stats = {}
        if last > first or mtp is not None:
            for name in self._no_stats():
                column = [None if slot is None else slot[name] for slot in slots]
                rows = self.layout.to_layers(column, first, last)
                stats[name] = (
                    rows if mtp is None else jnp.concatenate([rows, mtp[name][None]])
                )
            # All devices of `ep` have told the same counts.
            counts_LE = stats["counts"] // self.mesh.shape["ep"]
            buffers, metrics = self.balancer.observe(buffers, counts_LE, step)
            metrics["overflow"] = stats["overflow"].sum() // self.mesh.shape["ep"]
            metrics["balance_loss"] = stats["balance_loss"].mean() / share
        metrics |= {name: value / share for name, value in loss.items()}
        return buffers, metrics

    @property
    def checkpoint_info(self) -> dict[str, Any]:
        return {
            "architecture": dataclasses.asdict(self.arch),
            "layout": self.layout.to_json(),
            "num_slots": self.balancer.num_slots,
        }

    def from_checkpoint_info(self, info: dict[str, Any]) -> DeepSeekPipeline:
        mine = dataclasses.asdict(self.arch)
        theirs = info.get("architecture", {})
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise ValueError(
                    f"the checkpoint is of another model: its {name} is "
                    f"{theirs.get(name)}, but the config's is {mine.get(name)}; resume "
                    "with the config that wrote it."
                )
        return dataclasses.replace(
            self,
            layout=Layout.from_json(info["layout"]),
            num_saved_slots=info["num_slots"],
        )

    def convert_params(self, params: PipelineParams, old: Any) -> PipelineParams:
        slots = relayout(params.stages, old.layout, self.layout)
        return dataclasses.replace(params, stages=slots)

    def convert_buffers(self, buffers: RouterState, old: Any) -> RouterState:
        """A placement of another number of slots is made anew, for the load seen."""
        if old.num_saved_slots == self.balancer.num_slots:
            return buffers
        return self.balancer.replan(buffers)

    def sample(
        self, params: PipelineParams, buffers: RouterState, prompt: Any, num_tokens: int
    ) -> np.ndarray:
        """See `dualpipe_jax.deepseek.model.sampling`."""
        single = unpipelined(self.model)
        return sample(single, self, params, buffers, prompt, num_tokens)


def unpipelined(
    options: DeepSeekOptions, num_microbatches: int = 1
) -> DeepSeekPipeline:
    """The model as one stage on one device, without redundant experts."""
    layers = (tuple(range(options.architecture.num_layers)),)
    return DeepSeekPipeline(
        model=dataclasses.replace(options, eplb=None),
        layout=Layout(layers, options.architecture.first_k_dense_replace),
        num_microbatches=num_microbatches,
        mesh=AbstractMesh((1, 1, 1), ("pp", "dp", "ep")),
        parallel=ExpertParallel(),
    )


def _key() -> jax.Array:
    """For structures, whose arrays nobody makes."""
    return jax.random.key(0)


def _log(stats: MoEStats) -> dict[str, jax.Array]:
    return {
        "counts": stats.tokens_per_expert,
        "overflow": stats.overflow,
        "balance_loss": stats.balance_loss,
    }
