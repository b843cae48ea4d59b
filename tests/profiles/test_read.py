"""What a report says of a profile: what is hidden, what communicates, what it costs."""

import pytest

from dualpipe_jax import read_trace
from dualpipe_jax.commands import main as cli
from dualpipe_jax.profiles.names import Op, write_names
from tests.profiles.traces import annotation, kernel, launch, write_trace


def test_hidden_is_what_runs_under_compute_of_the_same_device(tmp_path):
    report = read_trace(
        write_trace(
            tmp_path,
            [
                kernel("gemm", 0, 10),
                kernel("gemm2", 5, 10, stream=8),  # together busy from 0 to 15
                kernel("ncclAllReduce", 10, 10, stream=9),  # 5 of 10 hidden
                kernel("ncclAllReduce", 0, 10, device=1),  # nothing beside it
            ],
        )
    )
    assert [(d.name, d.comm_us, d.hidden_us) for d in report.devices] == [
        ("GPU 0", 10, 5),
        ("GPU 1", 10, 0),
    ]
    assert report.comm_hidden == 0.25
    assert report.compute_busy == 15 / 30
    assert report.span_us == 15  # the mean of 20 and 10
    assert [(s.device, s.name, s.busy_us) for s in report.streams] == [
        ("GPU 0", "7", 10),
        ("GPU 0", "8", 10),
        ("GPU 0", "9", 10),
        ("GPU 1", "7", 10),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", True),
        ("void dpsk::ep::internode::combine<false>(int)", True),
        ("void deep_ep::intranode::dispatch<8>(int4*)", True),
        ("all-to-all-start.3", True),
        ("ragged_all_to_all.1", True),
        ("ppermute.3", True),
        ("send-done.1", True),
        ("Memcpy PtoP (Device -> Device)", True),
        ("Memcpy DtoD (Device -> Device)", False),
        ("input_scatter_reduce_fusion", False),
        ("sender_gemm", False),
        ("void cuda::per_token_cast_to_fp8", False),
    ],
)
def test_the_rule(tmp_path, name, expected):
    report = read_trace(write_trace(tmp_path, [kernel(name, 0, 1)]))
    assert report.spans[0].is_comm == expected


def test_the_rule_can_be_extended_and_replaced(tmp_path):
    path = write_trace(tmp_path, [kernel("my_ring_step", 0, 1), kernel("nccl", 2, 1)])
    assert [s.is_comm for s in read_trace(path).spans] == [False, True]
    assert [s.is_comm for s in read_trace(path, "my_ring").spans] == [True, True]
    only_mine = read_trace(path, lambda name: "ring" in name)
    assert [s.is_comm for s in only_mine.spans] == [True, False]
    with pytest.raises(ValueError, match=r"communication='\(' is not a regular expres"):
        read_trace(path, "(")


def test_an_operation_that_contains_others_is_not_a_kernel(tmp_path):
    def op(name, begin, duration):
        args = {"hlo_op": name, "hlo_module": "jit_f", "device_ordinal": "1"}
        event = {"ph": "X", "name": name, "pid": 1, "tid": 2, "ts": begin}
        return event | {"dur": duration, "args": args}

    events = [op("while.2", 0, 100), op("ppermute.1", 10, 20), op("dot.3", 40, 20)]
    report = read_trace(write_trace(tmp_path, events))
    assert [s.name for s in report.spans] == ["ppermute.1", "dot.3"]
    assert (report.comm_hidden, report.devices[0].name) == (0.0, "CPU 1")


def test_a_fusion_that_is_named_after_a_collective_computes(tmp_path):
    args = {"hlo_op": "ppermute_add_fusion", "hlo_module": "jit_f"}
    event = {"ph": "X", "name": "ppermute_add_fusion", "pid": 1, "tid": 2, "ts": 0}
    path = write_trace(tmp_path, [event | {"dur": 5, "args": args}])
    op = Op("fusion", "jit(f)/attn/add")
    write_names(path.parent, {"jit_f": {"ppermute_add_fusion": op}})
    assert [s.is_comm for s in read_trace(path).spans] == [False]


def test_costs_do_not_depend_on_how_many_devices_ran_the_same(tmp_path):
    """Two pairs per device, on one device and on two of a process each."""
    events, reports = [], []
    for device in (0, 10):
        pid = 9 + device
        for pair in (0, 1):
            begin, number = 100 * pair, 1000 * device + 10 * pair + 1
            events += [
                annotation("1F1B", begin, 90, pid=pid),
                annotation("attn(F)", begin + 10, 10, pid=pid),
                annotation("mlp(B)", begin + 30, 10, pid=pid),
                launch(number, begin + 15, pid=pid),
                launch(number + 1, begin + 35, pid=pid),
                kernel("f", begin, 30, correlation=number, device=device),
                kernel("b", begin + 30, 45, correlation=number + 1, device=device),
            ]
        reports.append(read_trace(write_trace(tmp_path, events)))
    one, two = (report.costs() for report in reports)
    assert one == two
    assert pytest.approx((0.030, 0.045, 0.075)) == (one.F, one.I, one.FB)
    # F + B is exactly FB, which is left out then.
    assert "--costs F=0.03,I=0.045,W=0" in str(reports[1])


def test_devices_in_the_order_of_their_numbers(tmp_path):
    path = write_trace(
        tmp_path, [kernel("k", 0, 1, device=number) for number in (10, 2)]
    )
    assert [d.name for d in read_trace(path).devices] == ["GPU 2", "GPU 10"]


def test_names_with_lone_surrogates(tmp_path, capsys):
    path = write_trace(tmp_path, [kernel("half \ud800 of one", 0, 1)])
    assert cli.main(["trace", str(path)]) == 0
    assert "half ? of one" in capsys.readouterr().out
