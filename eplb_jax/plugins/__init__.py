"""jax's plugins on machines that lack what they are for. Without jax.

Imports: nothing.
"""

from eplb_jax.plugins.cuda import (
    load as load,
    skip_cuda_check as skip_cuda_check,
    without_messages as without_messages,
)
