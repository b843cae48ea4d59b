"""Which events of a profile are kernels, and which of them communicate."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# What a name must contain, in any case, to be communication. The rest computes.
COMMUNICATION = (
    r"nccl|rccl|nvshmem|deep_ep::",  # the libraries
    r"dpsk::ep::",  # DeepSeek's own, in its published profiles
    r"all.?reduce|all.?gather|all.?to.?all|reduce.?scatter|collective.?(permute|broadcast)",
    r"ppermute|psum",  # XLA:CPU names an operation after jax's
    r"^(send|recv)(-done)?\b",
    r"memcpy ptop|memcpyp2p",
)
# XLA:CPU and TPU show these around what runs inside them.
_CONTAINERS = re.compile(r"(while|conditional|call)(\.|$)")
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver", "hip_runtime", "hip_driver", "runtime")

Rule = Callable[[str], bool]


def communication_rule(more: str | Sequence[str] | Rule | None = None) -> Rule:
    """A function of a kernel's name: does it communicate?

    Args:
      more: regular expressions beside `COMMUNICATION`, or a function in their place.

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
                f"communication={pattern!r} is no regular expression ({error}); escape "
                "what is meant literally with a backslash."
            ) from None
    joined = re.compile("|".join(f"(?:{p})" for p in patterns), re.IGNORECASE)
    return lambda name: joined.search(name) is not None


def is_kernel(category: str) -> bool:
    """Whether PyTorch's profiler calls it something that a GPU ran."""
    return category in _KERNELS


def is_launch(category: str) -> bool:
    """Whether it is a call that started something on a GPU."""
    return category in _LAUNCHES


def is_container(name: str) -> bool:
    """Whether an XLA operation only stands around those inside it."""
    return _CONTAINERS.match(name) is not None
