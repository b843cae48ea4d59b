"""Scheduled modules written by hand, and a GPU with round numbers."""

import dataclasses

from dualpipe_jax import overlap_report
from dualpipe_jax.gpu import GPUS

# At half of the peaks, 1 ps per FLOP and 1 ps per byte; 10 ps per byte of NVLink and
# 100 ps per byte of network.
GPU = dataclasses.replace(
    GPUS["h100"],
    name="round numbers",
    bf16_flops=2e12,
    memory_bandwidth=2_000_000_000_000,
    nvlink_bandwidth=1e11,
    network_bandwidth=1e10,
)
HALF = {"gpu": GPU, "efficiency": 0.5}
# The latencies that the package documents.
KERNEL, INSIDE, BETWEEN = 1.5e-6, 10e-6, 20e-6

# A square matrix of bfloat16: 2 MB, and 2 GFLOP to multiply two of them.
M = "bf16[1000,1000]{1,0}"
GEMM = 2e9 / 1e12 + KERNEL  # its 6 MB take 6 us of the 2 ms
COPY = 4e6 / 1e12 + KERNEL

_BY_8 = "replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}"
PERMUTE = 2e6 / 1e10 + BETWEEN
ALL_TO_ALL = 2e6 * 7 / 8 / 1e11 + INSIDE


def module(entry, *computations, devices=16):
    """The text of a module whose entry takes one matrix `%x` and returns it."""
    return "\n\n".join(
        [
            f"HloModule by_hand, is_scheduled=true, num_partitions={devices}",
            *computations,
            f"ENTRY %main (x: {M[:-5]}) -> {M[:-5]} {{\n"
            f"  %x = {M} parameter(0)\n{entry}\n"
            f"  ROOT %result = {M} bitcast(%x)\n}}\n",
        ]
    )


def permute_start(name, attributes="source_target_pairs={{0,8},{8,0}}", operand="x"):
    return (
        f"  %{name} = ({M}, {M}) collective-permute-start(%{operand}), channel_id=1, "
        f"{attributes}"
    )


def permute_done(name):
    return f"  %{name}.done = {M} collective-permute-done(%{name})"


def all_to_all_start(name, operand="x"):
    return (
        f"  %{name} = (({M}), {M}) all-to-all-start(%{operand}), channel_id=2, "
        f"{_BY_8}, dimensions={{0}}"
    )


def all_to_all_done(name):
    return f"  %{name}.done = {M} all-to-all-done(%{name})"


def gemm(name, operand="x"):
    return (
        f"  %{name} = {M} dot(%{operand}, %{operand}), lhs_contracting_dims={{1}}, "
        "rhs_contracting_dims={0}"
    )


def copy(name, operand="x"):
    return f"  %{name} = {M} copy(%{operand})"


CARRY = f"(s32[], pred[], {M})"


def loop(name, lines, flag="%flag"):
    """A loop's body and its condition on the flag: `{name}` and `{name}.until`."""
    return f"""%{name} (c.{name}: {CARRY}) -> {CARRY} {{
  %c.{name} = {CARRY} parameter(0)
  %i = s32[] get-tuple-element(%c.{name}), index=0
  %flag = pred[] get-tuple-element(%c.{name}), index=1
  %x = {M} get-tuple-element(%c.{name}), index=2
  %false = pred[] constant(false)
{lines}
  ROOT %next = {CARRY} tuple(%i, {flag}, %x)
}}

%{name}.until (c: {CARRY}) -> pred[] {{
  %c = {CARRY} parameter(0)
  ROOT %go = pred[] get-tuple-element(%c), index=1
}}"""


def run_loop(name, trips=None, carry="x", scope=None):
    """The lines that run a loop, in a computation that has `%x`."""
    config = (
        f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips else ""
    )
    if scope:
        config = f', metadata={{op_name="jit(f)/{scope}/while"}}' + config
    return f"""  %zero.{name} = s32[] constant(0)
  %true.{name} = pred[] constant(true)
  %init.{name} = {CARRY} tuple(%zero.{name}, %true.{name}, %{carry})
  %run.{name} = {CARRY} while(%init.{name}), condition=%{name}.until, \
body=%{name}{config}"""


def branch(name, *lines):
    """A computation of one matrix `%x`: a branch, or what a call or fusion calls."""
    text = "\n".join(lines)
    return f"""%{name} (y: {M}) -> {M} {{
  %x = {M} parameter(0)
{text}
  ROOT %r = {M} bitcast(%x)
}}"""


# A permute and an all-to-all under a product, and a permute under a copy.
STEADY = "\n".join(
    [
        permute_start("p"),
        all_to_all_start("a"),
        gemm("g"),
        all_to_all_done("a"),
        permute_done("p"),
        permute_start("q"),
        copy("k"),
        permute_done("q"),
    ]
)
# A permute alone.
PERMUTED = f"{permute_start('p')}\n{permute_done('p')}"


def report_of(*computations, **options):
    """The report on a module of these computations; the first is the entry's lines."""
    return overlap_report(module(*computations), **{**HALF, **options})
