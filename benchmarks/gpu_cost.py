"""What a program of this project costs on a GPU that is not there: XLA compiles for it anywhere.

    python -m benchmarks.gpu_cost linear_delta --device h100 --dtype bfloat16 --by
    python -m benchmarks.gpu_cost --op delta --shape 8,2048,16,128,128
    python -m benchmarks.gpu_cost --op softmax --shape 24576,128 --by
    python -m benchmarks.gpu_cost linear_delta --evaluate

The step at the paper's batch; an op forward and backward; or 512 windows of the evaluator. Needs
`pip install "jax[cuda13]"` (for a V100 `"jax[cuda12]"`), no GPU and no driver. Prints temporary
memory as the compiler plans it and, from the optimized HLO, kernel launches, bytes moved through
the device's memory and a modelled time: the sum over launches of max(bytes / (0.8 bandwidth),
matmul flops / (0.6 peak), 3 us), and 15 us for each question to the device: a condition, of which
the `else` is counted, or an iteration of a loop whose end depends on data. How many of those there
are is not in the program: `--trips 1,2` says so, by how many such loops a loop stands in, and
without it each counts once.

A model, not a measurement: operands count whole except where a kernel slices or updates in place,
integer work is not seen. Only ratios between programs mean much; a GPU has the last word.
"""

import argparse
import collections
import functools
import importlib
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Device(NamedTuple):
    """Bytes per second, and FLOPs per second of float32 (TF32 where there is one) and bfloat16."""

    bandwidth: float
    float32: float
    bfloat16: float


class Instruction(NamedTuple):
    """`name = shape op(rest` of a line of HLO."""

    name: str
    shape: str
    op: str
    rest: str


class Program(NamedTuple):
    """Optimized HLO: the instructions of each computation by its name, and the first one's name."""

    computations: dict[str, list[Instruction]]
    entry: str


DEVICES = {
    "h100": Device(3.35e12, 495e12, 990e12),
    "a100": Device(2.039e12, 156e12, 312e12),
    "v100": Device(0.9e12, 15.7e12, 15.7e12),
}
ASK, LAUNCH = 15e-6, 3e-6
BYTES = {
    "f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "u16": 2,
    "s16": 2, "pred": 1, "s8": 1, "u8": 1,
}  # fmt: skip
# Instructions that become a kernel, or a copy.
LAUNCHED = {
    "fusion", "custom-call", "copy", "dot", "convolution", "sort", "reduce", "scatter", "gather",
    "transpose", "concatenate", "dynamic-slice", "slice", "dynamic-update-slice", "broadcast",
    "triangular-solve", "cholesky", "fft", "rng-bit-generator", "copy-start", "convert", "iota",
    "pad", "reverse", "add", "multiply", "compare", "all-reduce", "all-reduce-start",
}  # fmt: skip
# The first whose pattern the name of the source matches.
PARTS = {
    "feed-forward": r"/ff/|feed_forward",
    "norms": r"norm",
    "mixer": r"mixer",
    "softmax": r"_nll|softmax|adaptive|_forward",
    "embedding": r"embed",
    "dropout": r"dropout|_keep|threefry",
    "optimizer": r"adam|update|clip|scale_by",
}


def parse(text: str) -> Program:
    """The computations of optimized HLO as XLA prints it."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        begin = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if begin:
            current = computations.setdefault(begin[2], [])
            entry = begin[2] if begin[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            found = re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$", line)
            if found:
                current.append(Instruction(*found.groups()))
    return Program(computations, entry)


def dimensions(shape: str) -> list[int]:
    """Of the first array in a shape."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(d) for d in found[1].split(",") if d] if found else []


def n_bytes(shape: str) -> int:
    """Of all arrays in a shape, a tuple's parts together."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(
        BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
        for kind, dims in arrays
        if kind in BYTES
    )


def matmul_flops(program: Program, computation: str, instruction: Instruction) -> float:
    """Of all matmuls in one launch."""
    _, shape, op, rest = instruction
    if op == "fusion":
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        inner = called[1] if called else ""
        parts = program.computations.get(inner, [])
        return sum(matmul_flops(program, inner, part) for part in parts)
    if op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    elif op == "custom-call" and "gemm" in rest:
        contracted = re.search(r'lhs_contracting_dimensions":\["?(\d+)', rest)
        shape = shape.strip("(").split("}")[0]  # without the workspace
    else:
        return 0.0
    shapes = {i.name: i.shape for i in program.computations[computation]}
    left = dimensions(shapes.get(re.findall(r"%([\w.\-]+)", rest)[0], ""))
    axes = [int(i) for i in contracted[1].split(",") if i] if contracted else []
    summed = math.prod(left[i] for i in axes if i < len(left))
    return 2.0 * math.prod(dimensions(shape)) * summed


def moved(shapes: dict[str, str], instruction: Instruction) -> int:
    """Bytes that one launch reads and writes."""
    operands = re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])
    parts = [n_bytes(shapes.get(a, "")) for a in operands] + [n_bytes(instruction.shape)]
    if re.search(r"dynamic[-_](update[-_])?slice", instruction.name):
        # It touches only a part of its largest array.
        return 2 * sum(p for p in parts if p < 0.6 * max(parts)) or min(parts)
    return sum(parts)


def cost(program: Program, bandwidth: float, peak: float, trips: tuple[float, ...] = ()) -> dict:
    """launches, bytes, seconds, data-dependent loops and questions by part; of the whole as ""."""
    names = ("launches", "bytes", "seconds", "loops", "questions")
    zeros = lambda: dict.fromkeys(names, 0.0)
    by: dict[str, dict[str, float]] = collections.defaultdict(zeros)

    def add(part: str, **amounts: float) -> None:
        for name, amount in amounts.items():
            by[""][name] += amount
            by[part][name] += amount

    def walk(computation: str, times: float, asking: int) -> None:
        instructions = program.computations[computation]
        shapes = {i.name: i.shape for i in instructions}
        for instruction in instructions:
            name, _, op, rest = instruction
            source = re.search(r'op_name="([^"]*)"', rest)
            place = source[1] if source else ""
            part = next((p for p, pattern in PARTS.items() if re.search(pattern, place)), "other")
            back = "transpose(" in place or "rematted" in place
            part += " backward" if back else " forward"
            if op == "while":
                body = re.search(r"body=%?([\w.\-]+)", rest)
                known = re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', rest)
                assert body, name
                if known:
                    walk(body[1], times * int(known[1]), asking)
                else:
                    n = trips[asking] if asking < len(trips) else 1.0
                    add(part, loops=1, seconds=times * n * ASK)
                    walk(body[1], times * n, asking + 1)
            elif op in ("call", "async-start"):
                called = re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", rest)
                if called:
                    walk(called[1], times, asking)
            elif op == "conditional":
                add(part, questions=times, seconds=times * ASK)
                usual = re.search(
                    r"(?:false_computation=|branch_computations=\{)%?([\w.\-]+)", rest
                )
                assert usual, name
                walk(usual[1], times, asking)
            elif op in LAUNCHED:
                size = moved(shapes, instruction)
                flops = matmul_flops(program, computation, instruction)
                seconds = max(size / (0.8 * bandwidth), flops / (0.6 * peak), LAUNCH)
                add(part, launches=times, bytes=times * size, seconds=times * seconds)

    walk(program.entry, 1.0, 0)
    return dict(by)


def topology(device: str, n: int) -> Any:
    """So many devices that are not there."""
    from jax.experimental import topologies

    # CUDA 13 knows no V100, and its compiler dies of one.
    plugins = ("xla_cuda12",) if device == "v100" else ("xla_cuda13", "xla_cuda12")
    for plugin in plugins:
        try:
            importlib.import_module(f"jax_plugins.{plugin}")
        except ImportError:
            continue
        target = (Path(__file__).parent / "devices" / f"{device}.txtpb").read_text()
        return topologies.get_topology_desc(
            "gpu", "cuda", target_config=target, topology=f"1x1x{n}"
        )
    extra = plugins[0].removeprefix("xla_")
    sys.exit(f'The compiler for a GPU {device} is missing: pip install "jax[{extra}]".')


def step(variant: str, preset: str, dtype: str, rows: int) -> tuple[Callable, tuple]:
    """A training step and its abstract arguments."""
    import jax

    from benchmarks.train_step import prepare

    paper = importlib.import_module(f"configs.{variant}").get_config(preset).train
    _, _, function, make_state, batch = prepare(variant, preset, rows or paper.batch_size, dtype)
    return function.__wrapped__, (jax.eval_shape(make_state), batch)


def evaluation(variant: str, preset: str, dtype: str, rows: int) -> tuple[Callable, tuple]:
    """Windows of which the last position is scored, as the evaluator does."""
    import jax

    from benchmarks.train_step import prepare

    config, model, _, make_state, _ = prepare(variant, preset, 1, dtype)
    state = jax.eval_shape(make_state)
    token = lambda n: jax.ShapeDtypeStruct((rows or 512, n), "int32")
    function = lambda params, favor, x, y: model.apply({"params": params, **favor}, x, y)[0]
    return function, (state.params, state.favor, token(config.train.tgt_len), token(1))


def op(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[Callable, tuple]:
    """An op with its gradients: a rule at [B, T, N, K, V], the softmax at [tokens, width]."""
    import jax

    from benchmarks.common import WIKITEXT_TOKENS
    from fwm import ops
    from fwm.layers.vocabulary import AdaptiveSoftmax

    array = lambda *s, kind=dtype: jax.ShapeDtypeStruct(s, kind)
    if name == "softmax":
        tokens, width = shape
        cutoffs = (20_000, 40_000, 200_000)
        tied = (False, True, True, True)
        module = AdaptiveSoftmax(WIKITEXT_TOKENS, width, width, cutoffs, tie_projs=tied)
        inputs = (array(1, tokens, width), array(1, tokens, kind="int32"))
        tables = (array(WIKITEXT_TOKENS, width, kind="float32"),)
        params = jax.eval_shape(module.init, jax.random.key(0), *inputs, tables)
        loss = lambda p, h, tables, y: module.apply(p, h, y, tables).mean()
        both = jax.value_and_grad(loss, (0, 1, 2))
        return both, (params, inputs[0], tables, inputs[1])
    b, t, n, k, v = shape
    per_head = array(b, t, n, kind="float32")
    decayed = lambda q, k, v, beta, decay: ops.delta_rule(q, k, v, beta, log_decay=decay)
    rule, n_write = {
        "delta": (ops.delta_rule, 1), "head_decay": (decayed, 2), "sum": (ops.sum_rule, 0)
    }[name]  # fmt: skip
    arguments = (array(b, t, n, k), array(b, t, n, k), array(b, t, n, v), *[per_head] * n_write)
    return forward_and_backward(rule), (array(b, t, n, v), *arguments)


def forward_and_backward(rule: Callable) -> Callable:
    """(gradient of the output, arguments) -> output, gradients."""
    import jax

    def both(dout, *arguments):
        out, pull = jax.vjp(lambda *x: rule(*x)[0], *arguments)
        return out, pull(dout)

    return both


def compiled(function: Callable, arguments: tuple, device: str, n: int, donate: bool) -> Any:
    """The function compiled for devices that are not there, by pmap for more than one."""
    import jax

    there = topology(device, n)
    donated = 0 if donate else ()
    # Where a form is chosen by what is there, not by what is compiled for.
    jax.default_backend = lambda: "gpu"
    if n > 1:
        from fwm import parallel

        function = functools.partial(function, average=parallel.mean)
        devices = list(there.devices)
        mapped = jax.pmap(function, parallel.AXIS, donate_argnums=donated, devices=devices)
        copies = lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype)
        return mapped.lower(*jax.tree.map(copies, arguments)).compile()
    own = jax.sharding.SingleDeviceSharding(there.devices[0])
    jitted = jax.jit(function, donate_argnums=donated, in_shardings=own, out_shardings=own)
    return jitted.lower(*arguments).compile()


def described(
    result: Any, device: str, dtype: str, trips: tuple[float, ...] = ()
) -> tuple[str, dict]:
    """What a compiled function costs, in a line and by part."""
    peaks = DEVICES[device]
    by = cost(parse(result.as_text()), peaks.bandwidth, getattr(peaks, dtype), trips)
    total = by.pop("")
    line = (
        f"modelled {1e3 * total['seconds']:.2f} ms, {total['launches']:.0f} launches, "
        f"{total['bytes'] / 1e9:.1f} GB moved, "
        f"{result.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB temporary, "
        f"{total['loops']:.0f} data-dependent loops, {total['questions']:.0f} questions"
    )
    return line, by


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--device", default="h100", choices=DEVICES)
    parser.add_argument("--devices", type=int, default=1, help="of a step: pmap")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--preset", default="small", choices=("tiny", "small", "medium"))
    parser.add_argument("--rows", type=int, default=0, help="of each device; 0: the paper's batch")
    parser.add_argument("--evaluate", action="store_true", help="the evaluator, not a step")
    parser.add_argument("--op", choices=("delta", "head_decay", "sum", "softmax"))
    parser.add_argument("--shape", default="8,2048,16,128,128", help="of --op")
    parser.add_argument("--trips", default="", help="of data-dependent loops, from the outermost")
    parser.add_argument("--by", action="store_true", help="by part of the model")
    parser.add_argument("--hlo", default="", help="write the optimized HLO here")
    a = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    trips = tuple(float(n) for n in a.trips.split(",") if n)
    names = [f"{a.op} {a.shape}"] if a.op else a.variants
    if not names:
        parser.error("name variants, such as linear_delta, or --op.")
    for name in names:
        if a.op:
            shape = tuple(int(n) for n in a.shape.split(","))
            function, arguments = op(a.op, a.dtype, shape)
        else:
            make = evaluation if a.evaluate else step
            function, arguments = make(name, a.preset, a.dtype, a.rows)
        train = not (a.op or a.evaluate)
        result = compiled(function, arguments, a.device, a.devices, donate=train)
        if a.hlo:
            Path(a.hlo).write_text(result.as_text())
        line, by = described(result, a.device, a.dtype, trips)
        print(f"{name} {a.dtype} on {a.devices} x {a.device}: {line}", flush=True)
        for part, c in sorted(by.items(), key=lambda x: -x[1]["seconds"]) if a.by else ():
            print(
                f"  {part:24s} {1e3 * c['seconds']:7.2f} ms {c['launches']:7.0f} launches "
                f"{c['bytes'] / 1e9:7.1f} GB"
            )


if __name__ == "__main__":
    main()
