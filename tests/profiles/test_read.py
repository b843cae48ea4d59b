"""Traces that were made up: rules, phases, forms of the format, and bad input."""

import gzip
import json
import tracemalloc

import pytest

from dualpipe_jax import read_trace
from dualpipe_jax.commands import main as cli
from dualpipe_jax.pictures import intervals
from dualpipe_jax.profiles.events import read_events
from dualpipe_jax.profiles.names import Op, write_names


def kernel(name, begin, duration, stream=7, correlation=None, device=0, **args):
    args |= {"device": device, "stream": stream}
    if correlation is not None:
        args["correlation"] = correlation
    event = {"ph": "X", "cat": "kernel", "name": name, "pid": device, "tid": stream}
    return {**event, "ts": begin, "dur": duration, "args": args}


def launch(correlation, begin, tid=1, pid=9):
    args = {} if correlation is None else {"correlation": correlation}
    event = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": pid}
    return {**event, "tid": tid, "ts": begin, "dur": 1, "args": args}


def annotation(name, begin, duration, category="user_annotation", pid=9, tid=1):
    event = {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid}
    return {**event, "ts": begin, "dur": duration}


@pytest.fixture
def write(tmp_path):
    def write(events, name="trace.json"):
        path = tmp_path / name
        path.write_text(json.dumps({"traceEvents": events}))
        return path

    return write


def test_hidden_is_what_runs_under_compute_of_the_same_device(write):
    report = read_trace(
        write(
            [
                kernel("gemm", 0, 10),
                kernel("gemm2", 5, 10, stream=8),  # together busy from 0 to 15
                kernel("ncclAllReduce", 10, 10, stream=9),  # 5 of 10 hidden
                kernel("ncclAllReduce", 0, 10, device=1),  # nothing beside it
            ]
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
def test_the_rule(write, name, expected):
    report = read_trace(write([kernel(name, 0, 1)]))
    assert report.spans[0].is_comm == expected


def test_the_rule_can_be_extended_and_replaced(write):
    path = write([kernel("my_ring_step", 0, 1), kernel("nccl", 2, 1)])
    assert [s.is_comm for s in read_trace(path).spans] == [False, True]
    assert [s.is_comm for s in read_trace(path, "my_ring").spans] == [True, True]
    only_mine = read_trace(path, lambda name: "ring" in name)
    assert [s.is_comm for s in only_mine.spans] == [True, False]
    with pytest.raises(ValueError, match=r"communication='\(' is no regular expres"):
        read_trace(path, "(")


def test_phases_by_who_launched(write):
    """The innermost annotation around the call, whatever thread the call is from."""
    events = [
        annotation("1F1B", 0, 100),
        annotation("mlp(B)", 10, 50),
        annotation("mlp(W)", 20, 10),
        annotation("optimizer", 22, 5),  # names no phase
        launch(1, 15),
        launch(2, 25, tid=2),  # autograd's thread
        launch(3, 40),
        launch(4, 150),
    ]
    events += [kernel(str(n), 1000 + 10 * n, 5, correlation=n) for n in (1, 2, 3, 4)]
    report = read_trace(write(events))
    assert {s.name: (s.phase, s.pair) for s in report.spans} == {
        "1": ("mlp(B)", 0),
        "2": ("mlp(W)", 0),
        "3": ("mlp(B)", 0),
        "4": (None, None),
    }
    costs = report.costs()
    # The pair lasts from the first of its kernels to the last one's end.
    assert (costs.F, costs.I, costs.W) == (0.0, 0.010, 0.005)
    assert pytest.approx(0.025) == costs.FB


def test_phases_by_annotations_on_the_gpu(write):
    events = [
        annotation("attn(F)", 0, 10, "gpu_user_annotation", pid=0, tid=7),
        annotation("nccl:all_to_all", 1, 5, "gpu_user_annotation", pid=0, tid=7),
        kernel("in", 2, 3),
        kernel("behind", 12, 3),
        kernel("beside", 2, 3, stream=8),
    ]
    found = {s.name: s.phase for s in read_trace(write(events)).spans}
    assert found == {"in": "attn(F)", "behind": None, "beside": None}


def jax_gpu_events():
    def op(name, begin, duration, tid, **args):
        event = {"ph": "X", "name": name, "pid": 3, "tid": tid}
        return {**event, "ts": begin, "dur": duration, "args": args}

    names = {1: "Stream #20(Compute)", 2: "Stream #24(AllToAll)", 5: "XLA Ops"}
    where = {"hlo_module": "jit_step"}
    return [
        {
            "ph": "M",
            "name": "process_name",
            "pid": 3,
            "args": {"name": "/device:GPU:0"},
        },
        *(
            {"ph": "M", "name": "thread_name", "pid": 3, "tid": t, "args": {"name": n}}
            for t, n in names.items()
        ),
        op("fusion_3", 0, 10, 1, hlo_op="fusion.3", **where),
        op("nccl", 5, 10, 2, hlo_op="all-to-all-start.1", **where),
        op("gemm", 20, 5, 1, tf_op="jit(step)/jvp(attn)/dot_general"),
        op("fusion.3", 0, 10, 5, hlo_op="fusion.3"),  # shown once more
        {},
    ]


def test_jax_on_a_gpu(write):
    path = write(jax_gpu_events())
    scope = "jit(step)/transpose(jvp(mlp))/mul"
    ops = {"fusion.3": Op("fusion", scope), "all-to-all-start.1": Op("async-start", "")}
    write_names(path.parent, {"jit_step": ops})
    report = read_trace(path)
    assert [(s.name, s.stream, s.is_comm, s.phase) for s in report.spans] == [
        ("fusion_3", "Stream #20(Compute)", False, "mlp(B)"),
        ("nccl", "Stream #24(AllToAll)", True, None),
        ("gemm", "Stream #20(Compute)", False, "attn(F)"),
    ]
    assert report.devices[0].name == "GPU 0"


def test_what_only_stands_around_operations_is_no_kernel(write):
    def op(name, begin, duration):
        args = {"hlo_op": name, "hlo_module": "jit_f", "device_ordinal": "1"}
        event = {"ph": "X", "name": name, "pid": 1, "tid": 2, "ts": begin}
        return event | {"dur": duration, "args": args}

    events = [op("while.2", 0, 100), op("ppermute.1", 10, 20), op("dot.3", 40, 20)]
    report = read_trace(write(events))
    assert [s.name for s in report.spans] == ["ppermute.1", "dot.3"]
    assert (report.comm_hidden, report.devices[0].name) == (0.0, "CPU 1")


def test_forms_of_the_format(tmp_path):
    events = [kernel("a", 0, 1), kernel("b", 2, 1)]
    text = json.dumps(events, indent=1)
    for name, written in {
        "object.json": '{"x": {"y": [1]}, "traceEvents": ' + text + ', "z": 1}',
        "list.json": text,
        "open.json": text.rstrip("]\n") + ",\n",  # the format allows it
    }.items():
        (tmp_path / name).write_text(written)
        packed = tmp_path / (name + ".gz")
        packed.write_bytes(gzip.compress(written.encode()))
        for path in (tmp_path / name, packed):
            assert list(read_events(path)) == events, path.name


def test_events_at_every_offset_of_a_window(tmp_path, monkeypatch):
    events = [kernel('a\\"ä', 12345.678, 0.25), kernel("b", -1e-3, 2)]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events, "end": 12}), encoding="utf-8")
    for size in range(1, 60):
        monkeypatch.setattr("dualpipe_jax.profiles.events._CHUNK", size)
        assert list(read_events(path)) == events, size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected a Chrome trace"),
        (b"  \n", "is empty; expected a Chrome trace"),
        (b"hello", "is not a Chrome trace; expected a JSON object"),
        (b"42", "is not a Chrome trace"),
        (b"[1, 2]", "is not a Chrome trace"),
        (b'{"loss": 1.0}', "is not a Chrome trace"),
        (b'{"traceEvents": 5}', "is not a Chrome trace"),
        (b'{"traceEvents": []}', "has no kernel that ran on a device"),
        (
            b'{"traceEvents": [{"ph": "X", "na',
            "ends too early, or is damaged, behind 0",
        ),
        (b'{"traceEvents": [{"ph": "M"}, {"ph"', "ends too early, .* behind 1 events"),
        (b'{"traceEvents": [{"ph": "M"}', "ends too early, .* behind 1 events"),
        (b'{"traceEvents": [{"ph": "M"} oops]}', "ends too early, or is damaged"),
        (b'{"traceEvents": [{"a": ' + b"[" * 99999, "ends too early, or is damaged"),
        (b'[{"ts": ' + b"9" * 5000 + b"}]", "ends too early, or is damaged"),
        (b"\x1f\x8b\x08garbage", "is a damaged gzip file"),
        (gzip.compress(b'{"traceEvents": [' + b" " * 9999)[:-12], "is a damaged gzip"),
    ],
)
def test_bad_files(tmp_path, capsys, content, message):
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_trace(path)
    assert cli.main(["trace", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m dualpipe_jax trace: error: ")
    assert said.count("\n") == 1


def test_a_folder_and_a_missing_file(tmp_path, capsys):
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert "is a folder without a *.trace.json.gz" in capsys.readouterr().err
    assert cli.main(["trace", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_odd_events_are_passed_over(write):
    odd = [
        {"ph": "X", "cat": "kernel", "name": "no time"},
        {"ph": "X", "cat": "kernel", "name": "no args", "ts": 1, "args": None},
        {"ph": "X", "cat": "kernel", "name": "dur", "ts": 2, "dur": "long"},
        {"ph": "X", "cat": "kernel", "name": "back", "ts": 2, "dur": -5},
        {"ph": "X", "cat": "kernel", "name": "nan", "ts": float("nan"), "dur": 1},
        {"ph": "X", "cat": "kernel", "name": "far", "ts": 1, "dur": float("inf")},
        {"ph": "X", "cat": "kernel", "name": "huge", "ts": 10**400, "dur": 1},
        {"ph": "M", "name": "process_name", "pid": [1]},
        {"ph": ["X"]},
    ]
    assert [s.name for s in read_trace(write(odd)).spans] == ["no args"]


@pytest.mark.slow
def test_memory_is_that_of_the_kernels_not_of_the_file(tmp_path):
    """64 MB of host events around one kernel: Python's own peak stays below 16 MB."""
    path = tmp_path / "large.json"
    host = {"ph": "X", "cat": "cpu_op", "name": "x" * 1000, "ts": 1, "dur": 1}
    line = json.dumps(host) + ",\n"
    with path.open("w") as file:
        file.write('{"traceEvents": [')
        for _ in range(64):
            file.write(line * 1000)
        file.write(json.dumps(kernel("gemm", 0, 1)) + "]}")
    tracemalloc.start()
    try:
        assert len(read_trace(path).spans) == 1
        assert tracemalloc.get_traced_memory()[1] < 16e6
    finally:
        tracemalloc.stop()


def test_intervals():
    some = intervals.union([(3, 4), (0, 1), (0.5, 2), (2, 2.5)])
    assert some == [(0, 2.5), (3, 4)]
    assert intervals.length(some) == 3.5
    assert intervals.intersection(some, [(1, 3.5)]) == [(1, 2.5), (3, 3.5)]
    assert intervals.intersection(some, []) == []


def test_a_fusion_that_is_named_after_a_collective_computes(write):
    args = {"hlo_op": "ppermute_add_fusion", "hlo_module": "jit_f"}
    event = {"ph": "X", "name": "ppermute_add_fusion", "pid": 1, "tid": 2, "ts": 0}
    path = write([event | {"dur": 5, "args": args}])
    op = Op("fusion", "jit(f)/attn/add")
    write_names(path.parent, {"jit_f": {"ppermute_add_fusion": op}})
    assert [s.is_comm for s in read_trace(path).spans] == [False]


@pytest.mark.parametrize("correlation", [None, 0])
def test_kernels_that_nothing_launched_have_no_phase(write, correlation):
    events = [annotation("mlp(F)", 0, 10), launch(correlation, 5)]
    path = write([*events, kernel("k", 20, 5, correlation=correlation)])
    assert [s.phase for s in read_trace(path).spans] == [None]


def test_ranks_in_one_file_keep_to_themselves(write):
    events = []
    for pid, name in ((9, "attn(F)"), (8, "mlp(B)")):
        events += [annotation(name, 0, 10, pid=pid), launch(7, 5, pid=pid)]
        # Launched by this one alone.
        events += [launch(100 + pid, 6, pid=pid)]
        events += [kernel(str(pid), 20, 5, correlation=100 + pid, device=pid)]
        events += [kernel("whose?", 30, 5, correlation=7, device=pid)]
    found = {(s.name, s.device): s.phase for s in read_trace(write(events)).spans}
    assert found == {
        ("9", "GPU 9"): "attn(F)",
        ("8", "GPU 8"): "mlp(B)",
        ("whose?", "GPU 9"): None,
        ("whose?", "GPU 8"): None,
    }


def test_costs_do_not_depend_on_how_many_devices_ran_the_same(write):
    """Two pairs on each of one, and of two devices, of one process each."""
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
        reports.append(read_trace(write(events)))
    one, two = (report.costs() for report in reports)
    assert one == two
    assert pytest.approx((0.030, 0.045, 0.075)) == (one.F, one.I, one.FB)
    # W is 0 and nothing is lost to rounding.
    assert "--costs F=0.03,I=0.045,W=0" in str(reports[1])


def test_devices_in_the_order_of_their_numbers(write):
    path = write([kernel("k", 0, 1, device=number) for number in (10, 2)])
    assert [d.name for d in read_trace(path).devices] == ["GPU 2", "GPU 10"]


def test_names_that_no_file_can_hold(write, capsys):
    path = write([kernel("half \ud800 of one", 0, 1)])
    assert cli.main(["trace", str(path)]) == 0
    assert "half ? of one" in capsys.readouterr().out


def test_a_damaged_table_of_names_is_named(write):
    path = write([kernel("k", 0, 1)])
    for text in ("{", '{"jit_f": 5}', '{"jit_f": {"dot": 1}}', "[]"):
        (path.parent / "op_names.json").write_text(text)
        with pytest.raises(ValueError, match=r"op_names\.json is damaged .*remove it"):
            read_trace(path)
    # One that lies above a trace is somebody else's.
    inner = path.parent / "inner"
    inner.mkdir()
    assert read_trace(path.rename(inner / "trace.json")).spans
