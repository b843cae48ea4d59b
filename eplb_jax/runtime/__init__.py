"""What XLA's runtimes must be told, or kept from.

Imports: nothing.
"""

from eplb_jax.runtime.order import (
    on_cpu as on_cpu,
    wait_for as wait_for,
    zero_after as zero_after,
)
