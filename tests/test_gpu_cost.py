"""What `benchmarks.gpu_cost` reads out of a program that was compiled for a GPU."""

import pytest

from benchmarks.gpu_cost import ASK, LAUNCH, cost, matmul_flops, moved, n_bytes, parse

# As XLA prints it: a matmul in a fusion, in a loop of four rounds; a loop whose end depends on
# data; a kernel that updates a part of a large array in place.
HLO = """
HloModule jit_f

%fused (p0: f32[8,16], p1: f32[16,4]) -> f32[8,4] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[16,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (arg: (s32[], f32[8,16], f32[16,4])) -> (s32[], f32[8,4]) {
  %a = f32[8,16]{1,0} get-tuple-element(%arg), index=1
  %b = f32[16,4]{1,0} get-tuple-element(%arg), index=2
  ROOT %fusion.1 = f32[8,4]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/mixer/dot"}
}

%asking (arg: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %c = f32[1000]{0} get-tuple-element(%arg), index=1
  %u = f32[10]{0} constant(0)
  ROOT %dynamic-update-slice.1 = f32[1000]{0} dynamic-update-slice(%c, %u, %i), metadata={op_name="transpose(jvp(softmax))/put"}
}

ENTRY %main (x: f32[8,16]) -> f32[8,4] {
  %x = f32[8,16]{1,0} parameter(0)
  %while.1 = (s32[], f32[8,4]{1,0}) while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %if = f32[8,4]{1,0} conditional(%p, %x, %x), true_computation=%asking, false_computation=%body, metadata={op_name="softmax/cond"}
  ROOT %while.2 = (s32[], f32[1000]{0}) while(%while.1), condition=%cond, body=%asking, metadata={op_name="transpose(jvp(softmax))/while"}
}
"""  # noqa: E501


def test_a_program_is_parsed():
    program = parse(HLO)
    assert program.entry == "main"
    assert [i.op for i in program.computations["main"]] == [
        "parameter", "while", "conditional", "while",
    ]  # fmt: skip
    fusion, put = program.computations["body"][-1], program.computations["asking"][-1]
    assert matmul_flops(program, "body", fusion) == 2 * 8 * 4 * 16
    shapes = {i.name: i.shape for i in program.computations["body"]}
    assert moved(shapes, fusion) == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    shapes = {i.name: i.shape for i in program.computations["asking"]}
    assert moved(shapes, put) == 2 * 4 * 10
    assert n_bytes("(bf16[3,4]{1,0}, pred[5], s32[])") == 24 + 5 + 4


@pytest.mark.parametrize("rounds", [1, 7])
def test_loops_are_counted_by_their_rounds(rounds):
    by = cost(parse(HLO), bandwidth=1e9, peak=1e12, trips=(rounds,))
    assert by["mixer forward"]["launches"] == 4 + 1
    assert (by[""]["questions"], by["softmax forward"]["seconds"]) == (1, ASK)
    assert by["softmax backward"]["launches"] == rounds
    assert by["softmax backward"]["loops"] == 1
    assert by[""]["launches"] == 5 + rounds
    assert by["softmax backward"]["seconds"] == pytest.approx(rounds * (ASK + LAUNCH))
    seconds = max(by["mixer forward"]["bytes"] / 5 / 0.8e9, LAUNCH)
    assert by["mixer forward"]["seconds"] == pytest.approx(5 * seconds)
