"""A server for the main job's model."""

from dualpipe_jax.configs import tiny
from dualpipe_jax.deepseek.serve import RebalanceConfig, ServeConfig


def config() -> ServeConfig:
    """The byte-level model of `configs/tiny.py` on 8 virtual CPU devices.

    Each device holds two of sixteen physical experts: eight experts, and eight more
    replicas.

    Command: `python -m dualpipe_jax serve tiny_server --run runs/tiny`, after `make
    train`. It reads prompts from standard input.
    """
    return ServeConfig(
        name="tiny_server",
        architecture=tiny.architecture(),
        num_devices=8,
        num_redundant=8,
        requests_per_device=2,
        context_length=256,
        prompts_per_device=2,
        max_prompt_length=128,
        max_prefill_tokens=128,
        rebalance=RebalanceConfig(every=64, max_moves=4, layers_per_plan=2),
        platform="cpu",
    )
