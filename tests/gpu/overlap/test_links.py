"""Bytes and times of collectives, against arithmetic by hand."""

import pytest

from dualpipe_jax import overlap_report
from dualpipe_jax.gpu.overlap.groups import replica_groups
from tests.gpu.overlap.modules import BETWEEN, GPU, HALF, INSIDE, M, module

MB = 1e6


def groups(text, devices):
    return [group.tolist() for group in replica_groups(text, devices)]


@pytest.mark.parametrize(
    ("text", "devices", "expected"),
    [
        ("{}", 3, [[0, 1, 2]]),
        ("", 2, [[0, 1]]),
        ("{{0,1},{2,3}}", 4, [[0, 1], [2, 3]]),
        ("{{0,2,1}, {3}}", 4, [[0, 2, 1], [3]]),
        ("{0,1,2}", 3, [[0, 1, 2]]),
        ("[2,3]<=[6]", 6, [[0, 1, 2], [3, 4, 5]]),
        ("[4,2]<=[2,4]T(1,0)", 8, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("[2,4]<=[2,2,2]T(1,0,2)", 8, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=2,'b'=3] {'b'}", 6, [[0, 1, 2], [3, 4, 5]]),
        ("mesh['a'=2,'b'=3] {'a','b'}", 6, [[0, 1, 2, 3, 4, 5]]),
        # Axis b of 4 is 2 by 2; its part of stride 1, and the one of stride 2.
        ("mesh['a'=1,'b'=4] {'b':(2)2}", 4, [[0, 1], [2, 3]]),
        ("mesh['a'=1,'b'=4] {'b':(1)2}", 4, [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", 4, [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", 4, [[3, 1], [2, 0]]),
    ],
)
def test_every_syntax_of_groups(text, devices, expected):
    assert groups(text, devices) == expected


def test_groups_in_an_unknown_syntax_are_refused():
    with pytest.raises(
        ValueError, match=r"replica_groups=<0,1> have an unknown syntax"
    ):
        replica_groups("<0,1>", 2)


def one(line, devices=16, **options):
    report = overlap_report(module(line, devices=devices), **{**HALF, **options})
    (found,) = report.collectives
    return found


def collective(kind, attributes, result=M):
    return one(f"  %c = {result} {kind}(%x), channel_id=1, {attributes}")


IN_NODE = "replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}"
ACROSS = "replica_groups=[8,2]<=[2,8]T(1,0)"
MIXED = "replica_groups=[1,16]<=[16]"


@pytest.mark.parametrize(
    ("kind", "where", "inside", "between"),
    [
        # A device keeps its own part of 2 MB, and sends 3 to peers in the node ...
        ("all-to-all", IN_NODE, 2 * 3 / 4, 0),
        ("all-to-all", ACROSS, 0, 2 * 1 / 2),
        # ... or 7 to peers in the node and 8 over the network.
        ("all-to-all", MIXED, 2 * 7 / 16, 2 * 8 / 16),
        # Rings. Across nodes, one of a node's 8 GPUs sends out of the node in each.
        ("all-gather", IN_NODE, 2 * 3, 0),
        ("all-gather", MIXED, 30 * 7 / 8, 30 * 1 / 8),
        ("all-gather", ACROSS, 0, 2),
        ("reduce-scatter", IN_NODE, 2 * 3 / 4, 0),
        ("all-reduce", IN_NODE, 2 * 2 * 3 / 4, 0),
        ("all-reduce", ACROSS, 0, 2 * 2 * 1 / 2),
        ("all-reduce", "replica_groups={}", 3.75 * 7 / 8, 3.75 / 8),
        ("collective-broadcast", IN_NODE, 2, 0),
    ],
)
def test_bytes_inside_and_between_nodes(kind, where, inside, between):
    found = collective(kind, where)
    assert found.kind == kind and not found.asynchronous
    assert found.inside_bytes == pytest.approx(inside * MB)
    assert found.between_bytes == pytest.approx(between * MB)
    on_nvlink, on_network = inside * MB / 1e11, between * MB / 1e10
    latency = BETWEEN if between else INSIDE
    assert found.seconds == pytest.approx(max(on_nvlink, on_network) + latency)
    assert found.link == ("network" if on_network > on_nvlink else "nvlink")
    # Nothing runs beside a synchronous collective.
    assert found.exposed_s == pytest.approx(found.seconds) and not found.under.kernels


def test_the_slowest_device_decides():
    """In a group of 8 + 1 devices, the single one sends everything over the network."""
    found = collective("all-to-all", "replica_groups={{0,1,2,3,4,5,6,7,8}}")
    assert found.between_bytes == pytest.approx(2e6 * 8 / 9)
    assert found.inside_bytes == 0


def test_smaller_nodes_have_more_between_them():
    line = f"  %c = {M} all-to-all(%x), {MIXED}"
    shares = [one(line, gpus_per_node=n).between_bytes for n in (16, 8, 4, 2, 1)]
    assert shares == pytest.approx([2e6 * (16 - n) / 16 for n in (16, 8, 4, 2, 1)])


@pytest.mark.parametrize(
    ("pairs", "link", "seconds"),
    [
        ("{{0,1},{1,0}}", "nvlink", 2e6 / 1e11 + INSIDE),
        ("{{0,8},{8,0}}", "network", 2e6 / 1e10 + BETWEEN),
        # All wait for the one pair that crosses nodes.
        ("{{0,1},{7,8},{9,9}}", "network", 2e6 / 1e10 + BETWEEN),
        ("{{0,0},{1,1}}", "local", 4e6 / 2e12 + INSIDE),
    ],
)
def test_permutes(pairs, link, seconds):
    found = collective("collective-permute", f"source_target_pairs={pairs}")
    assert (found.link, found.seconds) == (link, pytest.approx(seconds))


def test_permutes_that_became_send_and_recv():
    found = one(
        f"""  %t = token[] after-all()
  %r = ({M}, u32[], token[]) recv(%t), channel_id=1, frontend_attributes=\
{{_xla_send_recv_source_target_pairs="{{{{0,8}},{{8,0}}}}"}}
  %s = ({M}, u32[], token[]) send(%x, %t), channel_id=1
  %sd = token[] send-done(%s)
  %rd = ({M}, token[]) recv-done(%r)"""
    )
    assert found.seconds == pytest.approx(2e6 / 1e10 + BETWEEN)
    assert found.exposed_s == found.seconds


def test_ragged_all_to_all_sends_what_fits_both_buffers():
    line = f"""  %out = bf16[500,1000] constant({{...}})
  %at = s64[8] constant({{...}})
  %r = ((bf16[1000,1000], bf16[500,1000], s64[8], s64[8], s64[8], /*index=5*/s64[8]), \
bf16[500,1000]) ragged-all-to-all-start(%x, %out, %at, %at, %at, /*index=5*/%at), \
channel_id=1, {MIXED}
  %r.done = bf16[500,1000] ragged-all-to-all-done(%r)"""
    found = one(line)
    assert found.inside_bytes == pytest.approx(1e6 * 7 / 16)
    assert found.between_bytes == pytest.approx(1e6 * 8 / 16)


def test_several_operands_are_sent_together():
    line = f"""  %y = bf16[500,1000] constant({{...}})
  %c = ({M}, bf16[500,1000]) all-reduce(%x, %y), {IN_NODE}, to_apply=%add"""
    assert one(line).num_bytes == pytest.approx(3e6 * 2 * 3 / 4)


def test_a_group_of_one_sends_nothing():
    assert collective("all-reduce", "replica_groups=[16,1]<=[16]").num_bytes == 0


def test_the_gpu_may_be_a_custom_one():
    assert one(f"  %c = {M} all-to-all(%x), {MIXED}", gpu=GPU).link == "network"
