"""A small server of DeepSeek-V3-style models: continuous batching, live rebalancing.

A request's call chain: `engine` (which request runs when), `steps` (the jitted
programs), `forward` (the model over a cache).

Imports: backward, executor, gpu.overlap, train, deepseek.model,
eplb_jax.placement, eplb_jax.layer.
"""

from dualpipe_jax.deepseek.serve.config import RebalanceConfig, ServeConfig
from dualpipe_jax.deepseek.serve.engine import Engine, Token
from dualpipe_jax.deepseek.serve.forward import ServeParams
from dualpipe_jax.deepseek.serve.mesh import make_serve_mesh as make_serve_mesh
from dualpipe_jax.deepseek.serve.metrics import prometheus
from dualpipe_jax.deepseek.serve.steps import ServePrograms, make_serve_programs
from dualpipe_jax.deepseek.serve.weights import initial_params, load_checkpoint

__all__ = [
    "Engine",
    "RebalanceConfig",
    "ServeConfig",
    "ServeParams",
    "ServePrograms",
    "Token",
    "initial_params",
    "load_checkpoint",
    "make_serve_programs",
    "prometheus",
]
