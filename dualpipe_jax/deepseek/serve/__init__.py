"""A small server of DeepSeek-V3-style models: continuous batching, live rebalancing."""

from dualpipe_jax.deepseek.serve.config import RebalanceConfig, ServeConfig
from dualpipe_jax.deepseek.serve.engine import Engine, Token
from dualpipe_jax.deepseek.serve.forward import ServeParams
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
