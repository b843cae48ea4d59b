"""Differences between the supported versions of JAX (0.10, 0.11, 0.12), in one place.

Everything else in the package uses JAX's public names, including `jax.extend.core`. If
a version has moved something, or jax reads a setting once only, a function here hides
it. No decisions are made here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.extend import core as jex_core

# Calls that only name or guard a body, and mean what the body means.
_CALL_BODIES = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    # The forward rule of a custom_vjp, some of whose residuals remat may not need.
    "remat_opt": "fwd_jaxpr",
}
_CUSTOM_BODIES = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
}


def open_jaxpr(jaxpr: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns (jaxpr, consts) of a closed or open jaxpr; 0.12 merged the two."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, tuple(getattr(jaxpr, "consts", ()))


def new_jaxpr(invars: Sequence, outvars: Sequence, eqns: Sequence, like: Any) -> Any:
    """Returns a jaxpr of existing equations, without constants."""
    effects = set().union(*(eqn.effects for eqn in eqns)) if eqns else set()
    debug_info = like.debug_info._replace(
        arg_names=("",) * len(invars), result_paths=("",) * len(outvars)
    )
    return jex_core.Jaxpr(
        constvars=[],
        invars=list(invars),
        outvars=list(outvars),
        eqns=list(eqns),
        effects=effects,
        debug_info=debug_info,
        is_high=any(_is_high(eqn) for eqn in eqns),
    )


def with_equations(jaxpr: Any, eqns: Sequence[Any]) -> Any:
    """Returns a jaxpr with other equations, closed if it was closed before."""
    inner, consts = open_jaxpr(jaxpr)
    effects = inner.effects.union(*(eqn.effects for eqn in eqns))
    new = inner.replace(eqns=list(eqns), effects=effects)
    return new if isinstance(jaxpr, jex_core.Jaxpr) else close(new, consts)


def close(jaxpr: Any, consts: Sequence[Any] = ()) -> Any:
    """Returns the closed form of ``jaxpr``."""
    return jex_core.ClosedJaxpr(jaxpr, list(consts))


def evaluate(jaxpr: Any, *args: Any) -> list[Any]:
    """Evaluates a jaxpr: a closed one with its constants, or an open one without."""
    return jex_core.jaxpr_as_fun(close(*open_jaxpr(jaxpr)))(*args)


def call_body(eqn: Any) -> Any | None:
    """Returns the (closed or open) body of a jit, remat or plain call, else None."""
    name = _CALL_BODIES.get(eqn.primitive.name)
    return None if name is None else eqn.params[name]


def _is_high(eqn: Any) -> bool:
    """Returns whether JAX must expand the equation before lowering it."""
    return eqn.primitive.is_high(*(a.aval for a in eqn.invars), **eqn.params)


def expansion(eqn: Any) -> Any | None:
    """Returns the closed jaxpr of an operation that JAX keeps whole until lowering.

    ``jnp.searchsorted`` is one from 0.12 on. Returns None for other equations.
    """
    if eqn.primitive.name != "call_hi_primitive":
        return None
    expand = functools.partial(eqn.primitive.to_lojax, **eqn.params)
    return jax.make_jaxpr(expand)(*(struct(a.aval) for a in eqn.invars))


def platform_of(mesh: Any) -> str | None:
    """Returns a mesh's platform as lowering rules name it; None if unknown."""
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return None
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def branch_for(eqn: Any, platform: str | None) -> Any | None:
    """Returns the branch of a `lax.platform_dependent` for a platform, else None."""
    platforms = eqn.params.get("branches_platforms")
    if platform is None or not platforms:
        return None
    for branch, names in zip(eqn.params["branches"], platforms, strict=True):
        if names is None or platform in names:
            return branch
    known = ", ".join(name for names in platforms for name in names)
    raise ValueError(
        f"a lax.platform_dependent of the function has branches for {known} but not "
        f"for {platform!r}; add one, or a default."
    )


def call_shardings(eqn: Any) -> tuple[list[Any], list[Any]]:
    """Returns the shardings that a jit requires of operands and results; None: any."""
    found = []
    for name in ("in_shardings", "out_shardings"):
        shardings = eqn.params.get(name, ())
        found.append(
            [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]
        )
    return found[0], found[1]


def within_scope(eqn: Any, outer: Any) -> Any:
    """Returns ``eqn`` inside the ``jax.named_scope`` of the equation ``outer``."""
    scope = outer.source_info.name_stack + eqn.source_info.name_stack
    return eqn.replace(source_info=eqn.source_info.replace(name_stack=scope))


def custom_body(eqn: Any) -> Any | None:
    """Returns the body of a call with a custom derivative or vmap, else None."""
    name = _CUSTOM_BODIES.get(eqn.primitive.name)
    return None if name is None else eqn.params[name]


def scan_sizes(eqn: Any) -> tuple[int, int]:
    """Returns (number of constants, number of carried values) of a scan."""
    params = eqn.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # from 0.11 on: trees of the operands
    return len(consts), len(carry)


def is_ref(aval: Any) -> bool:
    """Returns whether ``aval`` is the type of a ``jax.Ref``, a mutable array."""
    return hasattr(aval, "inner_aval")


def is_ordered(effect: Any) -> bool:
    """Returns whether effects of this kind must keep their order."""
    return type(effect).__name__.startswith("Ordered")


def axes_used(eqn: Any) -> frozenset[Any]:
    """Returns the mesh axes over which an equation communicates or asks its position.

    JAX notes most of them as effects, those inside the equation's bodies included; of a
    permute they are only a parameter.
    """
    found = [
        effect.name
        for effect in eqn.effects
        if type(effect).__name__ == "NamedAxisEffect"
    ]
    found.append(eqn.params.get("axis_name", ()))
    return frozenset(
        name
        for each in found
        for name in (each if isinstance(each, tuple) else (each,))
    )


def manual_axes(eqn: Any) -> frozenset[Any]:
    """Returns the mesh axes over which a shard_map divides its operands."""
    params = eqn.params
    return params.get("newly_manual_axes", params.get("manual_axes", frozenset()))


def shard_map_like(eqn: Any, function: Any, in_specs: Any, out_specs: Any) -> Any:
    """Maps ``function`` over the mesh and axes of a shard_map equation."""
    return jax.shard_map(
        function,
        mesh=eqn.params["mesh"],
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=manual_axes(eqn),
        check_vma=eqn.params["check_vma"],
    )


def varying_axes(aval: Any) -> frozenset[Any]:
    """Returns the mesh axes over which a value differs (inside ``jax.shard_map``)."""
    if (axes := getattr(aval, "manual_axis_type", None)) is not None:
        return frozenset(axes.varying)
    return frozenset(getattr(aval, "vma", ()))


def vary_like(x: Any, aval: Any) -> Any:
    """Returns ``x``, varying at least over the mesh axes over which ``aval`` varies."""
    missing = tuple(varying_axes(aval) - varying_axes(jax.typeof(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros(aval: Any) -> Any:
    """Returns zeros of the type ``aval``, varying axes and memory included."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        impl = key_impl(aval)
        bits = jax.eval_shape(jax.random.key_data, struct(aval))
        value = jax.random.wrap_key_data(jnp.zeros(bits.shape, bits.dtype), impl=impl)
    else:
        value = move(jnp.zeros(aval.shape, aval.dtype), is_on_host(aval))
    return vary_like(value, aval)


def host_buffer(shape: Sequence[int], dtype: Any) -> Any:
    """Returns an array in the host's memory, to be written before it is read.

    Zeros would be made on the device, as a whole.
    """
    return move(jax.lax.empty(shape, dtype), True)


def is_on_host(value: Any) -> bool:
    """Returns whether an array, its type or its struct lies in the host's memory."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return getattr(value.sharding, "memory_kind", None) == "pinned_host"
    if isinstance(value, jax.Array):
        value = jax.typeof(value)
    space = getattr(value, "memory_space", jax.memory.Space.Device)
    return space == jax.memory.Space.Host


def move(x: Any, to_host: bool) -> Any:
    """Returns ``x`` in the memory of the host or of the device."""
    if is_on_host(x) == to_host:
        return x
    spaces = jax.memory.Space
    return jax.device_put(x, spaces.Host if to_host else spaces.Device)


def is_fetch(eqn: Any) -> bool:
    """Returns whether an equation copies arrays from the host's memory."""
    return eqn.primitive.name == "device_put" and all(
        is_on_host(a.aval) and not is_on_host(v.aval)
        for a, v in zip(eqn.invars, eqn.outvars, strict=True)
    )


@contextlib.contextmanager
def cache_settings(settings: Mapping[str, Any]) -> Iterator[None]:
    """Sets values of `jax.config` about the compilation cache, in this block."""
    before = {name: jax.config.values[name] for name in settings}

    def update(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        if values:
            compilation_cache.reset_cache()  # or it stays with what it found first

    update(settings)
    try:
        yield
    finally:
        update(before)


@contextlib.contextmanager
def cache_keys_for_topology(choose: Callable[[int], int]) -> Iterator[None]:
    """Finds programs for CPU devices under another process's key, in this block.

    The key holds a hash of the devices' topology, which differs from process to process
    (0.10 to 0.12), while process 0 alone writes: the others would find nothing.

    Args:
      choose: returns the hash to use, given this process's own.
    """
    from jax._src import cache_key
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    hash_own = cache_key._hash_accelerator_config

    def hash_chosen(hash_obj: Any, devices: Any) -> None:
        if devices.flat[0].platform != "cpu":
            hash_own(hash_obj, devices)
            return
        topology = xla_client.get_topology_for_devices(list(devices.flat))
        chosen = choose(topology.fingerprint())
        hash_obj.update(chosen.to_bytes(8, byteorder="big"))

    cache_key._hash_accelerator_config = hash_chosen
    try:
        yield
    finally:
        cache_key._hash_accelerator_config = hash_own


def key_impl(aval: Any) -> Any:
    """Returns the implementation of a random key's type."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), struct(aval))
    return found[0]


def struct(aval: Any) -> jax.ShapeDtypeStruct:
    """Returns ``aval`` as a public struct, with its varying axes and memory."""
    kwargs: dict[str, Any] = {}
    sharding = getattr(aval, "sharding", None)
    if sharding is not None and is_on_host(aval):
        # jax's own structs have no memory space but that of a sharding.
        sharding = jax.sharding.NamedSharding(
            sharding.mesh, sharding.spec, memory_kind="pinned_host"
        )
        kwargs["sharding"] = sharding
    if sharding is not None and not sharding.mesh.empty:
        kwargs["sharding"] = sharding
        if (axes := getattr(aval, "manual_axis_type", None)) is not None:
            kwargs["manual_axis_type"] = axes
        elif hasattr(aval, "vma"):
            kwargs["vma"] = aval.vma
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False), **kwargs
    )
