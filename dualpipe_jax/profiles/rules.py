"""Decides which events of a profile are kernels, and which of them communicate."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# Patterns of kernels that communicate, in any case. All others compute.
COMMUNICATION = (
    r"nccl|rccl|nvshmem|deep_ep::",  # the libraries
    r"dpsk::ep::",  # DeepSeek's, in its published profiles
    r"all.?reduce|all.?gather|all.?to.?all|reduce.?scatter|collective.?(permute|broadcast)",
    r"ppermute|psum",  # XLA:CPU names operations after jax's
    r"^(send|recv)(-done)?\b",
    r"memcpy ptop|memcpyp2p",
)
# XLA:CPU and TPU show these events around those of the operations inside.
_CONTAINERS = re.compile(r"(while|conditional|call)(\.|$)")
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver", "hip_runtime", "hip_driver", "runtime")

Rule = Callable[[str], bool]


def communication_rule(more: str | Sequence[str] | Rule | None = None) -> Rule:
    """Returns a function that says of a kernel's name whether it communicates.

    Args:
      more: regular expressions beside `COMMUNICATION`, or a function to replace them.

    Raises:
      ValueError: one is not a regular expression.

    Examples:
      >>> rule = communication_rule("my_ring")
      >>> rule("ncclDevKernel_SendRecv"), rule("my_ring_step"), rule("gemm")
      (True, True, False)
    """
    if callable(more):
        return more
    patterns = [*COMMUNICATION, *([more] if isinstance(more, str) else more or ())]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"communication={pattern!r} is not a regular expression ({error}); "
                "escape literal characters with a backslash."
            ) from None
    joined = re.compile("|".join(f"(?:{p})" for p in patterns), re.IGNORECASE)
    return lambda name: joined.search(name) is not None


def is_kernel(category: str) -> bool:
    """Returns whether a category of PyTorch's profiler is of what a GPU ran."""
    return category in _KERNELS


def is_launch(category: str) -> bool:
    """Returns whether a category is of calls that launch work on a GPU."""
    return category in _LAUNCHES


def is_container(name: str) -> bool:
    """Returns whether an XLA operation only contains others."""
    return _CONTAINERS.match(name) is not None
