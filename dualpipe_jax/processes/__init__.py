"""Several processes as one run: they meet, agree, watch each other, and end together.

The call chain of a start is `distributed.connect`, `rendezvous` (who is there),
`coordinator` (jax's service, apart from the processes), `watch` (who is still there).
`launch` starts the processes of one machine, and starts them again.

Imports: nothing.
"""

from dualpipe_jax.processes import distributed as distributed
from dualpipe_jax.processes.group import launcher as launcher
from dualpipe_jax.processes.launch import (
    Launch as Launch,
    Layout as Layout,
    Machines as Machines,
    local_gpus as local_gpus,
)
from dualpipe_jax.processes.signals import handled as handled
from dualpipe_jax.processes.watch import (
    HEARTBEAT_S as HEARTBEAT_S,
    LOST as LOST,
    STEP_TIMEOUT_S as STEP_TIMEOUT_S,
    Watch as Watch,
    may_pass as may_pass,
)
