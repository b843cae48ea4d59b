"""A small server for DeepSeek-V3-style models: continuous batching, live rebalancing.

The call chain of a request: `engine` (the user's interface), `scheduler` (which request
runs when), `programs` (the jitted steps), `steps` (what a device runs), `forward` (the
model over a cache). Shape suffixes: see `dualpipe_jax.deepseek`.

Imports: checked, backward, executor, gpu, gpu.overlap, train, deepseek.model,
deepseek.pretrained, eplb_jax.placement, eplb_jax.products,
eplb_jax.layer.
"""

from dualpipe_jax.deepseek.serve.arrays import ServeParams
from dualpipe_jax.deepseek.serve.config import RebalanceConfig, ServeConfig
from dualpipe_jax.deepseek.serve.engine import Engine
from dualpipe_jax.deepseek.serve.fetch_costs import break_even
from dualpipe_jax.deepseek.serve.mesh import make_serve_mesh as make_serve_mesh
from dualpipe_jax.deepseek.serve.metrics import prometheus
from dualpipe_jax.deepseek.serve.programs import ServePrograms, make_serve_programs
from dualpipe_jax.deepseek.serve.requests import check_options as check_options
from dualpipe_jax.deepseek.serve.results import Token
from dualpipe_jax.deepseek.serve.weights import (
    initial_params,
    load_checkpoint,
    load_published,
)

__all__ = [
    "Engine",
    "RebalanceConfig",
    "ServeConfig",
    "ServeParams",
    "ServePrograms",
    "Token",
    "break_even",
    "initial_params",
    "load_checkpoint",
    "load_published",
    "make_serve_programs",
    "prometheus",
]
