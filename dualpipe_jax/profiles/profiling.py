"""Records profiles: jax.profiler, and a file of the scopes that name the phases."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from dualpipe_jax.gpu.overlap import hlo
from dualpipe_jax.pictures import phase
from dualpipe_jax.profiles.names import Op, write_names
from dualpipe_jax.profiles.rules import communication_rule, is_container


@contextlib.contextmanager
def profile(
    folder: str | os.PathLike[str], *compiled: jax.stages.Compiled
) -> Iterator[None]:
    """Profiles what runs inside, for `read_trace(folder)`, Perfetto and XProf.

    It is `jax.profiler.trace` without Python's own calls. XLA's profile names
    operations as the compiled program does, but without their named scopes, which name
    the phases (attn, dispatch, mlp, combine; F, B, W): these are written to a file
    beside the profile.

    Args:
      folder: where the profile is written. Earlier profiles are kept, and the newest
        is read.
      *compiled: the programs that run inside, as `jit(f).lower(...).compile()` returns
        them; wait for their results inside as well.

    Raises:
      ValueError: one is not a compiled program, two have the same name, or another
        profile is being recorded.

    Examples:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from dualpipe_jax import read_trace
      >>> def f(x):
      ...     with jax.named_scope("mlp"):
      ...         return x @ x
      >>> x = jnp.ones((256, 256))
      >>> step = jax.jit(f).lower(x).compile()
      >>> folder = tempfile.mkdtemp()
      >>> with profile(folder, step):
      ...     _ = step(x).block_until_ready()
      >>> list(read_trace(folder).phases)
      ['mlp(F)']
    """
    names = {}
    for program in compiled:
        if not isinstance(program, jax.stages.Compiled):
            raise ValueError(
                f"compiled={program!r} must be a compiled program; pass "
                "jit(f).lower(...).compile(), and call that program inside."
            )
        module = hlo.parse(program.as_text() or "")
        if module.name in names:
            raise ValueError(
                f"two of the compiled programs are called {module.name!r}, and a "
                "profile identifies them by name; give their functions different names."
            )
        names[module.name] = _operations(module)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    try:
        jax.profiler.start_trace(folder, profiler_options=options)
    except RuntimeError as error:
        raise ValueError(
            f"folder={str(folder)!r}: the profiler cannot start ({error}); end the "
            "other profile first."
        ) from error
    try:
        # After the start: a profile that cannot start keeps the last one's names.
        write_names(folder, names)
        yield
    finally:
        jax.profiler.stop_trace()


def _operations(module: hlo.Module) -> dict[str, Op]:
    """Returns the operations that communicate, have a phase, or contain others."""
    every = [
        each
        for computation in module.computations.values()
        for each in computation.by_name.values()
    ]
    # A profile shows a fusion, but not what is inside it.
    fused = {
        name
        for each in every
        if each.opcode == "fusion"
        for name in each.called("calls")
    }
    communicates = communication_rule()
    return {
        each.name: Op(each.opcode, each.op_name)
        for name, computation in module.computations.items()
        if name not in fused
        for each in computation.by_name.values()
        if phase(each.op_name) or communicates(each.opcode) or is_container(each.opcode)
    }
