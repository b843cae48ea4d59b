"""The parser: lines in the several styles that XLA prints."""

import tracemalloc

import pytest

from dualpipe_jax.gpu.overlap import hlo, shapes
from tests.gpu.overlap import modules

LINE = (
    "  ROOT %start.1 = ((f32[4,8]{1,0}, f32[2]{0}), "
    "(f32[8,8]{1,0}, /*index=1*/f32[4]{0})) "
    "all-gather-start(%a, /*index=1*/%b), channel_id=7, "
    "replica_groups=[2,8]<=[4,4]T(1,0), dimensions={0}, "
    'metadata={op_name="jit(f)/x, calls=%no (\\"{odd}\\")" stack_frame_id=3}, '
    'control-predecessors={%a}, backend_config={"known_trip_count":{"n":"4"},"q":[1,2]}'
)


def one(line, before="  %a = f32[4,8] parameter(0)\n  %b = f32[2] parameter(1)"):
    text = f"HloModule m, is_scheduled=true\nENTRY e {{\n{before}\n{line}\n}}\n"
    return hlo.parse(text).entry


def test_a_line_with_everything():
    op = one(LINE).root
    assert (op.name, op.opcode, op.operands) == (
        "start.1",
        "all-gather-start",
        ["a", "b"],
    )
    assert [array.dims for array in shapes.leaves(op.shape)] == [
        (4, 8),
        (2,),
        (8, 8),
        (4,),
    ]
    assert op.get("replica_groups") == "[2,8]<=[4,4]T(1,0)"
    assert op.dims("dimensions") == (0,)
    assert op.called("calls") == []  # text in a string is not an attribute
    assert op.op_name.startswith("jit(f)/x, calls")
    assert op.backend_config == {"known_trip_count": {"n": "4"}, "q": [1, 2]}
    assert op.get("channel_id") == "7" and op.get("channel") == ""


@pytest.mark.parametrize(
    "line",
    [
        "  ROOT %s = f32[4,4]{1,0} dot(f32[4,8]{1,0} %a, f32[2]{0} %b), x={1}",
        "  ROOT s = f32[4,4] dot(a, b), x={1}",
        "  ROOT s = f32[4,4] dot(f32[4,8] a, (f32[2]) b), x={1}",
        "  ROOT %s = f32[4,4]{1,0:T(8,128)(2,1)S(1)} dot(%a, %b), x={1}",
    ],
)
def test_names_with_and_without_signs_and_shapes(line):
    where = one(line)
    assert where.root.operands == ["a", "b"]
    assert where.operand_shapes(where.root) == ["f32[4,8]", "f32[2]"]
    assert shapes.leaves(where.root.shape) == (shapes.Array("f32", (4, 4)),)
    assert where.root.dims("x") == (1,)


def test_backend_config_in_the_older_style_is_a_string():
    line = '  ROOT %s = f32[2] copy(%b), backend_config="{\\"n\\":\\"3\\"}"'
    assert one(line).root.backend_config == {"n": "3"}
    line = '  ROOT %s = f32[2] copy(%b), backend_config="opaque text"'
    assert one(line).root.backend_config == {}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[3,5]{1,0}", 30),
        ("pred[7]", 7),
        ("s4[3]", 2),  # packed, rounded up
        ("f8e4m3fn[10]", 10),
        ("c64[2]", 16),
        ("f32[]", 4),
        ("f32[0,8]", 0),
        ("(token[], opaque[], u32[<=6])", 24),
    ],
)
def test_bytes(shape, size):
    assert shapes.num_bytes(shape) == size


def test_computations_with_and_without_signatures():
    text = """HloModule m, is_scheduled=true, replica_count=2, num_partitions=3

FileNames
1 "a.py"

f.1 {
  p = f32[2] parameter(0)
  ROOT n = f32[2] negate(p)
}

%g ($p: (f32[2], f32[])) -> f32[2] {
  %p = (f32[2], f32[]) parameter(0)
  ROOT %n = f32[2] get-tuple-element(%p), index=0
}, execution_thread="other"

ENTRY %main.2 (q: f32[2]) -> f32[2] {
  %q = f32[2] parameter(0)
  %f = f32[2] fusion(%q), kind=kLoop, calls=f.1
  ROOT %r = f32[2] copy(%f)
}
"""
    read = hlo.parse(text)
    assert list(read.computations) == ["f.1", "g", "main.2"]
    assert (read.name, read.entry.name, read.num_devices) == ("m", "main.2", 6)
    assert read.entry.by_name["f"].called("calls") == ["f.1"]
    assert [user.name for user in read.entry.users["f"]] == ["r"]
    assert read.entry.source("r").name == "f"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an HLO module"),
        ("module @jit_f attributes {}", "begins with 'module @jit_f.*as_text"),
        ("HloModule m\nENTRY e {\n}", "m is not scheduled .*not of a lowered one"),
        (
            "HloModule m, is_scheduled=true\n\nf {\n}\n",
            "m contains no ENTRY computation; pass all",
        ),
    ],
)
def test_other_texts_than_scheduled_modules_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        hlo.parse(text)


def test_computations_are_parsed_when_they_are_first_read():
    """Of a large module's text, only lines are kept until then."""
    copies = "\n".join(modules.copy(f"a{number}") for number in range(10_000))
    text = modules.module("", modules.loop("body", copies))
    tracemalloc.start()
    try:
        module = hlo.parse(text)
        unread, _ = tracemalloc.get_traced_memory()
        assert module["body"].by_name["a9999"].opcode == "copy"
        read, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert unread < 4 * len(text) < read
