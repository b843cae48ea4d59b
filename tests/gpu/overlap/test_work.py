"""FLOPs and bytes of kernels, by hand; at half peak the GPU takes 1 ps for either."""

import dataclasses

import pytest

from dualpipe_jax import overlap_report
from tests.gpu.overlap.modules import (
    BETWEEN,
    GPU,
    KERNEL,
    M,
    module,
    permute_done,
    permute_start as start,
)


def under(lines, *computations, gpu=GPU):
    """The work of some lines that run under a permute, and the report."""
    text = module(
        "\n".join([start("p"), lines, permute_done("p")]),
        *computations,
    )
    report = overlap_report(text, gpu=gpu, efficiency=0.5)
    return report.collectives[0].under, report


def seconds(flops, num_bytes):
    return max(flops / 1e12, num_bytes / 1e12) + KERNEL


def constants(**shapes):
    return "\n".join(
        f"  %{name} = {shape} constant({{...}})" for name, shape in shapes.items()
    )


@pytest.mark.parametrize(
    ("dtype", "size", "slowness"),
    [
        ("bf16", 2, 1),
        ("f16", 2, 1),
        ("f32", 4, 2),
        ("f8e4m3fn", 1, 0.5),
        ("s8", 1, 0.5),
    ],
)
def test_a_batched_product_in_every_type(dtype, size, slowness):
    lines = constants(a=f"{dtype}[3,64,500]", b=f"{dtype}[3,500,200]") + (
        "\n  %d = bf16[3,64,200] dot(%a, %b), lhs_batch_dims={0}, "
        "lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
    )
    work, _ = under(lines)
    flops = 2 * 3 * 64 * 500 * 200
    moved = size * 3 * (64 * 500 + 500 * 200) + 2 * 3 * 64 * 200
    assert (work.flops, work.num_bytes) == (flops, moved)
    assert (work.kernels, work.gemms) == (1, 1)
    assert work.seconds == pytest.approx(seconds(slowness * flops, moved))


def test_a_gpu_without_float8_multiplies_it_as_bfloat16():
    lines = constants(a="f8e4m3fn[2000,2000]") + (
        "\n  %d = bf16[2000,2000] dot(%a, %a), lhs_contracting_dims={1}"
    )
    old = dataclasses.replace(GPU, has_fp8=False)
    assert under(lines, gpu=old)[0].seconds == pytest.approx(16e9 / 1e12 + KERNEL)
    assert under(lines)[0].seconds == pytest.approx(8e9 / 1e12 + KERNEL)


@pytest.mark.parametrize(
    ("algorithm", "slowness"),
    [("dot_bf16_bf16_f32", 1), ("dot_bf16_bf16_f32_x3", 3), ("dot_tf32_tf32_f32", 2)],
)
def test_the_algorithm_overrides_the_type(algorithm, slowness):
    lines = constants(a="f32[2000,2000]") + (
        "\n  %d = f32[2000,2000] dot(%a, %a), lhs_contracting_dims={1}, "
        f"algorithm={algorithm}"
    )
    assert under(lines)[0].seconds == pytest.approx(slowness * 16e9 / 1e12 + KERNEL)


def test_products_inside_nested_fusions():
    inner = """%inner (p: bf16[100,300], q: bf16[300,200]) -> bf16[100,200] {
  %p = bf16[100,300] parameter(0)
  %q = bf16[300,200] parameter(1)
  ROOT %d = bf16[100,200] dot(%p, %q), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}"""
    outer = """%outer (p: bf16[100,300], q: bf16[300,200]) -> bf16[100,200] {
  %p = bf16[100,300] parameter(0)
  %q = bf16[300,200] parameter(1)
  %f = bf16[100,200] fusion(%p, %q), kind=kCustom, calls=%inner
  ROOT %n = bf16[100,200] negate(%f)
}"""
    lines = constants(a="bf16[100,300]", b="bf16[300,200]") + (
        "\n  %f = bf16[100,200] fusion(%a, %b), kind=kCustom, calls=%outer"
    )
    work, _ = under(lines, inner, outer)
    assert work.flops == 2 * 100 * 300 * 200
    assert work.num_bytes == 2 * (100 * 300 + 300 * 200 + 100 * 200)
    assert work.gemms == 1


def test_a_fusion_reads_only_what_it_slices_and_writes_only_what_it_updates():
    fused = """%fused (b: bf16[64,1000], c: bf16[64,1000], i: s32[]) -> bf16[64,1000] {
  %b = bf16[64,1000] parameter(0)
  %c = bf16[64,1000] parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %view = bf16[64,10,100] bitcast(%c)
  %part = bf16[1,10,100] dynamic-slice(%view, %i, %zero, %zero), dynamic_slice_sizes={1}
  %flat = bf16[1,1000] bitcast(%part)
  ROOT %new = bf16[64,1000] dynamic-update-slice(%b, %flat, %i, %zero)
}"""
    lines = constants(b="bf16[64,1000]", i="s32[]") + (
        "\n  %f = bf16[64,1000] fusion(%b, %b, %i), kind=kLoop, calls=%fused"
    )
    work, _ = under(lines, fused)
    assert work.num_bytes == 2000 + 2000 + 4
    assert (work.flops, work.gemms, work.gemm_seconds) == (0, 0, 0)


def test_a_buffer_that_is_also_read_whole_counts_in_full():
    fused = """%fused (b: f32[64,10], i: s32[]) -> (f32[1,10], f32[10]) {
  %b = f32[64,10] parameter(0)
  %i = s32[] parameter(1)
  %part = f32[1,10] dynamic-slice(%b, %i, %i), dynamic_slice_sizes={1,10}
  %all = f32[10] reduce(%b, %i), dimensions={0}, to_apply=%add
  ROOT %t = (f32[1,10], f32[10]) tuple(%part, %all)
}"""
    lines = constants(b="f32[64,10]", i="s32[]") + (
        "\n  %f = (f32[1,10], f32[10]) fusion(%b, %i), kind=kInput, calls=%fused"
    )
    assert under(lines, fused)[0].num_bytes == 4 * (640 + 1 + 10 + 10)


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("%y = bf16[10,1000] slice(%x), slice={[0:10]}", 2 * 20e3),
        ("%y = bf16[1,1000] dynamic-slice(%x, %i, %i)", 2 * 2e3),
        (f"%y = {M} dynamic-update-slice(%x, %u, %i, %i)", 2 * 2e3),
        ("%y = bf16[7,1000] gather(%x, %k)", 2 * 14e3 + 28),
        (f"%y = {M} copy(%x)", 4e6),
        (f"%y = {M} add(%x, %x)", 6e6),
    ],
)
def test_bytes_outside_fusions(line, moved):
    lines = constants(i="s32[]", u="bf16[1,1000]", k="s32[7,1]")
    work, _ = under(f"{lines}\n  {line}")
    assert (work.num_bytes, work.kernels) == (moved, 1)


def test_views_and_tuples_are_free():
    lines = f"  %b = {M} bitcast(%x)\n  %t = ({M}) tuple(%b)\n" + (
        f"  %g = {M} get-tuple-element(%t), index=0"
    )
    work, report = under(lines)
    assert (work.kernels, work.seconds) == (0, 0)
    assert report.collectives[0].exposed_s == pytest.approx(2e6 / 1e10 + BETWEEN)


@pytest.mark.parametrize(
    ("shapes", "call", "flops"),
    [
        (
            {"a": "bf16[64,300]", "b": "bf16[300,200]"},
            '(bf16[64,200], s8[4096]) custom-call(%a, %b), custom_call_target="'
            '__cublas$lt$matmul", backend_config={"gemm_backend_config":{'
            '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            2 * 64 * 300 * 200,
        ),
        (
            {"a": "bf16[5,300,64]", "b": "bf16[5,300,200]"},
            'bf16[5,64,200] custom-call(%a, %b), custom_call_target="__cublas$gemm", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{'
            '"lhs_contracting_dimensions":["1"]}}}',
            2 * 5 * 64 * 300 * 200,
        ),
        (  # a convolution of 3 x 3 over 16 channels
            {"a": "bf16[2,8,8,16]", "b": "bf16[3,3,16,32]"},
            "bf16[2,8,8,32] convolution(%a, %b), dim_labels=b01f_01io->b01f",
            2 * (2 * 8 * 8 * 32) * 3 * 3 * 16,
        ),
        (
            {"a": "bf16[2,8,8,16]", "b": "bf16[3,3,16,32]"},
            "(bf16[2,8,8,32], u8[0]) custom-call(%a, %b), dim_labels=b01f_01io->b01f, "
            'custom_call_target="__cudnn$convForward"',
            2 * (2 * 8 * 8 * 32) * 3 * 3 * 16,
        ),
        (  # rows by groups of weights, as tokamax's ragged_dot
            {"a": "bf16[512,128]", "b": "bf16[4,128,256]", "n": "s32[4]"},
            'bf16[512,256] custom-call(%a, %b, %n), custom_call_target="triton_kernel"',
            2 * 512 * 128 * 256,
        ),
        (  # with the weights transposed, for the gradient of the rows
            {"a": "bf16[512,256]", "b": "bf16[4,128,256]", "n": "s32[4]"},
            "bf16[512,128] custom-call(%n, %a, %b), "
            'custom_call_target="__gpu$xla.gpu.triton"',
            2 * 512 * 128 * 256,
        ),
        (  # and for the gradient of the weights
            {"a": "bf16[512,128]", "b": "bf16[512,256]", "n": "s32[4]"},
            "f32[4,128,256] custom-call(%a, %b, %n), "
            'custom_call_target="__gpu$xla.gpu.triton"',
            2 * 512 * 128 * 256,
        ),
        (  # float8 with scales, and which rows a program computes
            {
                "a": "f8e4m3fn[512,256]",
                "b": "f8e4m3fn[4,384,256]",
                "s": "f32[512,2]",
                "t": "f32[4,3,2]",
                "n": "s32[9]",
            },
            "bf16[512,384] custom-call(%a, %b, %s, %t, %n, %n, %n), "
            'custom_call_target="__gpu$xla.gpu.triton"',
            2 * 512 * 384 * 256,
        ),
        (  # the gradient of its weights
            {
                "a": "f8e4m3fn[256,512]",
                "b": "f8e4m3fn[384,512]",
                "s": "f32[256,4]",
                "t": "f32[384,4]",
                "n": "s32[4]",
            },
            "f32[4,256,384] custom-call(%a, %b, %s, %t, %n, %n), "
            'custom_call_target="__gpu$xla.gpu.triton"',
            2 * 512 * 384 * 256,
        ),
        (  # attention of 2 x 4 heads of 64, 128 by 128, masked
            {"a": "bf16[2,128,4,64]", "b": "bf16[2,128,4,64]"},
            '(bf16[2,128,4,64], u8[0]) custom-call(%a, %b, %b), custom_call_target="'
            '__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{'
            '"mask_type":"CAUSAL","intermediate_tensor_shape":{"dimensions":'
            '["2","4","128","128"]}}}',
            2 * 2 * (2 * 4 * 128 * 128) * 64 / 2,
        ),
        (  # flash attention of 16 heads, 192 wide, of values 128 wide; causal
            {"q": "bf16[256,16,192]", "v": "bf16[256,16,128]"},
            "(bf16[256,16,128], f32[16,256]) custom-call(%q, %q, %v), "
            'custom_call_target="__gpu$xla.gpu.triton", '
            'metadata={op_name="f/flash_attention/pallas_call"}',
            2 * (256 * 256 * 16) * (192 + 128) / 2,
        ),
        (  # its gradient, with twice as many keys, in batches: not causal
            {
                "q": "bf16[2,64,4,192]",
                "k": "bf16[2,128,4,192]",
                "v": "bf16[2,128,4,64]",
            },
            "(bf16[2,64,4,192], bf16[2,128,4,192], bf16[2,128,4,64]) "
            'custom-call(%q, %k, %v), custom_call_target="__gpu$xla.gpu.triton", '
            'metadata={op_name="f/flash_attention_vjp/pallas_call"}',
            2 * 2 * (64 * 128 * 4) * (3 * 192 + 2 * 64),
        ),
        (
            {"a": "f32[512]", "b": "f32[512]"},
            'f32[512] custom-call(%a, %b), custom_call_target="cub_sort"',
            0,
        ),
    ],
)
def test_calls_of_libraries(shapes, call, flops):
    work, report = under(f"{constants(**shapes)}\n  %c = {call}")
    assert work.flops == flops
    assert not any("custom calls" in each for each in report.assumptions)


@pytest.mark.parametrize(("dtype", "slowness"), [("bf16", 1), ("f8e4m3fn", 0.5)])
def test_a_kernel_is_as_fast_as_the_type_that_it_multiplies(dtype, slowness):
    """Whatever its first operand is: here the sizes of the groups."""
    shapes = {"a": f"{dtype}[2000,2000]", "b": f"{dtype}[4,2000,2000]", "n": "s32[4]"}
    lines = constants(**shapes) + (
        "\n  %c = bf16[2000,2000] custom-call(%n, %a, %b), "
        'custom_call_target="__gpu$xla.gpu.triton"'
    )
    assert under(lines)[0].seconds == pytest.approx(slowness * 16e9 / 1e12 + KERNEL)


def test_a_kernel_of_unknown_flops_is_named():
    lines = constants(a="bf16[8,8]") + (
        '\n  %c = bf16[8,3] custom-call(%a, %a), custom_call_target="triton", '
        'backend_config={grid_x = 1 : i32, ir = "\\0D, calls=\\22", name = "mine"}'
    )
    work, report = under(lines)
    assert (work.flops, work.kernels) == (0, 1)
    assert "custom calls of unknown FLOPs count as zero FLOPs: triton (mine)" in (
        report.assumptions
    )
