"""Time and memory of the fast weight ops: one command, one table, one plot.

    python -m benchmarks.ops                 # writes benchmarks/results/ops_<device>.{md,json,png}

All forms of one shape are timed in turns within one run, so that a busy machine slows them all
alike; the figures are medians. Temporary memory is what XLA plans for the compiled function. On a
GPU with flash-linear-attention (`pip install flash-linear-attention`), its Triton kernels are
timed in the same run, in bfloat16 as they require, beside ours in bfloat16.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from functools import partial
from os import getloadavg
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

from benchmarks import common
from fwm.ops import delta_rule, inverse, recurrent, rules, sum_rule
from fwm.ops.softmax import causal_attention

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ON_GPU = jax.default_backend() == "gpu"
FAST = {"sum": sum_rule, "delta": delta_rule}
ORACLE = {"sum": recurrent.sum_rule, "delta": recurrent.delta_rule}
CHUNK_SIZES = (32, 64, 128) if ON_GPU else (16, 32, 64)
N_HEAD = 8


def paper_shapes():
    """(batch, length, heads, K, V) of the paper's models, the batch cut down on CPU."""
    small, medium = (96, 56) if ON_GPU else (12, 8)
    shapes = [(small, 256, N_HEAD, n_key, 16) for n_key in (16, 32, 64, 96)]
    shapes += [(medium, 384, N_HEAD, n_key, 32) for n_key in (32, 64, 128)]
    return [*shapes, (4, 4096, 16, 128, 128)] if ON_GPU else shapes


def draw(shape, dtype=jnp.float32):
    """q, k, v, beta as the delta rule gets them, and a cotangent of the output."""
    n_batch, length, n_head, n_key, n_value = shape
    keys = jax.random.split(jax.random.key(0), 5)
    q, k = (
        jax.nn.softmax(jax.random.normal(key, (n_batch, length, n_head, n_key))) for key in keys[:2]
    )
    v, dout = (jax.random.normal(key, (n_batch, length, n_head, n_value)) for key in keys[2:4])
    beta = jax.nn.sigmoid(jax.random.normal(keys[4], (n_batch, length, n_head)))
    return [x.astype(dtype) for x in (q, k, v, beta)], dout.astype(dtype)


def compiled(rule, inputs, dout, backward):
    """A function without arguments that runs once and waits; and its temporary memory in MiB."""

    def run(inputs, dout):
        if not backward:
            return rule(*inputs)[0]
        out, pull = jax.vjp(lambda *x: rule(*x)[0], *inputs)
        return out, pull(dout)

    executable = jax.jit(run).lower(inputs, dout).compile()
    memory = executable.memory_analysis().temp_size_in_bytes / 2**20
    return lambda: jax.block_until_ready(executable(inputs, dout)), memory


def medians(functions, rounds):
    """Median seconds of each function, timed in turns, the third of three calls in a row.

    As in a training: the same program again and again. Its memory is then there already; right
    after a program with large arrays the system takes back what it hands out anew, page by page,
    which was 10 ms of a call of 14 ms.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            function()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(x) for name, x in times.items()}


def fla_functions(name, inputs, dout):
    """flash-linear-attention on the same arrays: (forward, forward and backward)."""
    import torch
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.linear_attn import chunk_linear_attn

    tensors = [torch.from_dlpack(x).clone().requires_grad_() for x in inputs]
    cotangent = torch.from_dlpack(dout).clone()

    def call():
        if name == "delta":
            return chunk_delta_rule(*tensors, scale=1.0, output_final_state=True)[0]
        return chunk_linear_attn(*tensors, scale=1.0, output_final_state=True, normalize=False)[0]

    def forward():
        with torch.no_grad():
            call()
        torch.cuda.synchronize()

    def both():
        torch.autograd.grad(call(), tensors, cotangent)
        torch.cuda.synchronize()

    return forward, both


def softmax_rule(q, k, v):
    """Softmax attention at the same number of heads and head size V."""
    return (causal_attention(q, k, v, scale=v.shape[-1] ** -0.5),)


def measure(name, shape, peak, rounds):
    """One row per form of a rule at one shape."""
    n_batch, length, n_head, n_key, n_value = shape
    arrays, dout = draw(shape)
    inputs = arrays if name == "delta" else arrays[:3]
    forms = {"token by token": (ORACLE[name], inputs, dout)}
    for size in CHUNK_SIZES:
        forms[f"chunks of {size}"] = (partial(FAST[name], chunk_size=size), inputs, dout)
    forms["automatic"] = (FAST[name], inputs, dout)
    forms["softmax attention"] = (softmax_rule, [inputs[2]] * 3, dout)
    halves, dout_half = draw(shape, jnp.bfloat16)
    halves = halves if name == "delta" else halves[:3]
    if ON_GPU:
        forms["automatic, bfloat16"] = (FAST[name], halves, dout_half)
    forward, both, memory = {}, {}, {}
    for form, (rule, *arguments) in forms.items():
        forward[form], _ = compiled(rule, *arguments, backward=False)
        both[form], memory[form] = compiled(rule, *arguments, backward=True)
    if ON_GPU and importlib.util.find_spec("fla"):
        form = "flash-linear-attention, bfloat16"
        forward[form], both[form] = fla_functions(name, halves, dout_half)
        memory[form] = None
    forward, both = medians(forward, rounds), medians(both, rounds)
    # The arithmetic of the definition, and twice that backward.
    flops = rules.UPDATE_RULES[name].flops * 3 * n_batch * length * n_head * n_key * n_value
    return [
        {
            "rule": name,
            "shape": shape,
            "form": form,
            "forward_ms": 1e3 * forward[form],
            "both_ms": 1e3 * both[form],
            "tokens_per_second": n_batch * length / both[form],
            "share_of_peak": None if "softmax" in form else flops / both[form] / peak,
            "temporary_MiB": memory[form],
            "speedup_forward": forward["token by token"] / forward[form],
            "speedup_both": both["token by token"] / both[form],
        }
        for form in forward
    ]


def measure_long(lengths, n_token, rounds):
    """Forward and backward time per token against the length, at a constant number of tokens."""
    rows = []
    for name in (*FAST, "softmax attention"):
        for length in lengths:
            tokens = n_token
            if name == "softmax attention":  # its time per token does not depend on the batch
                if length > (16384 if ON_GPU else 4096):
                    continue
                tokens = length
            arrays, dout = draw((max(1, tokens // length), length, N_HEAD, 64, 64))
            rule, inputs = (
                (softmax_rule, [arrays[2]] * 3)
                if name == "softmax attention"
                else (FAST[name], arrays if name == "delta" else arrays[:3])
            )
            run, memory = compiled(rule, inputs, dout, backward=True)
            seconds = medians({name: run}, rounds)[name]
            us = 1e6 * seconds / (dout.shape[0] * length)
            rows.append(
                {"rule": name, "length": length, "us_per_token": us, "temporary_MiB": memory}
            )
            print(f"{name} T={length}: {us:.2f} us per token, {memory:.0f} MiB", flush=True)
    return rows


def measure_inverse(shape, size, rounds):
    """The triangular inverse of all chunks against the forward pass's matmuls around it."""
    n_batch, length, n_head, n_key, n_value = shape
    n = n_batch * n_head * length // size
    keys = jax.random.split(jax.random.key(0), 3)
    k = jax.nn.softmax(jax.random.normal(keys[0], (n, size, n_key)))
    m = jax.random.normal(keys[1], (n, n_value, n_key))
    v = jax.random.normal(keys[2], (n, n_value, size))
    s = jnp.tril(k @ k.mT, -1)

    @jax.jit
    def matmuls(k, m, v, s):
        scores = rules._matmul_t(k + 1, k), rules._matmul_t(k, k)
        reads = rules._matmul_t(m, k), rules._matmul_t(m, k + 1)
        written = rules._matmul_t(v, s), rules._matmul_t(v + 1, s)
        return scores, reads, written, rules._matmul(v, k)

    invert = jax.jit(inverse.unit_inverse)
    functions = {
        "inverse": lambda: jax.block_until_ready(invert(s)),
        "matmuls": lambda: jax.block_until_ready(matmuls(k, m, v, s)),
    }
    times = medians(functions, 5 * rounds)
    return {"shape": shape, "chunk_size": size, **{f"{x}_ms": 1e3 * times[x] for x in times}}


def measure_peak(rounds):
    """The device's own matmul peak, in float32 at JAX's default precision [flop/s]."""
    size = 8192 if ON_GPU else 2048
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    seconds = medians({"": lambda: product(a, a).block_until_ready()}, 3 * rounds)[""]
    return 2 * size**3 / seconds


def as_markdown(report):
    """The report as tables."""
    lines = [
        f"# Fast weight ops: {report['device']}",
        "",
        f"`{report['command']}`; {report['processor']}; "
        + ", ".join(f"{name} {report[name]}" for name in ("python", "jax", "jaxlib", "numpy"))
        + f"; measured matmul peak {report['peak_flops'] / 1e9:.0f} GFLOP/s; load average while it "
        f"ran {report['load_average'][0]:.1f} to {report['load_average'][1]:.1f}; medians of "
        f"{report['rounds']} rounds in turns.",
        "",
        "| rule | B x T x N x K x V | form | forward ms | forward+backward ms | tokens/s "
        "| share of peak | temporary MiB | speedup forward | speedup both |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["paper"]:
        share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.2%}"
        memory = "" if row["temporary_MiB"] is None else f"{row['temporary_MiB']:.1f}"
        lines.append(
            f"| {row['rule']} | {' x '.join(map(str, row['shape']))} | {row['form']} "
            f"| {row['forward_ms']:.2f} | {row['both_ms']:.2f} | {row['tokens_per_second']:.0f} "
            f"| {share} | {memory} | {row['speedup_forward']:.2f} | {row['speedup_both']:.2f} |"
        )
    lines += [
        "",
        f"Long sequences, N = {N_HEAD}, K = V = 64, forward and backward, automatic form, medians "
        f"of {min(3, report['rounds'])} rounds one after the other:",
        "",
        "| rule | T | us per token | temporary MiB |",
        "|---|--:|--:|--:|",
        *(
            f"| {row['rule']} | {row['length']} | {row['us_per_token']:.2f} "
            f"| {row['temporary_MiB']:.0f} |"
            for row in report["long"]
        ),
        "",
        "The triangular inverse against the matmuls of the forward pass around it, all chunks at "
        "once:",
        "",
        "| B x T x N x K x V | chunk | inverse ms | matmuls ms |",
        "|---|--:|--:|--:|",
        *(
            f"| {' x '.join(map(str, row['shape']))} | {row['chunk_size']} "
            f"| {row['inverse_ms']:.2f} | {row['matmuls_ms']:.2f} |"
            for row in report["inverse"]
        ),
    ]
    return "\n".join(lines) + "\n"


def plot(report, path):
    """Time per token against length."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for name in dict.fromkeys(row["rule"] for row in report["long"]):
        rows = [row for row in report["long"] if row["rule"] == name]
        axes.plot(
            [row["length"] for row in rows],
            [row["us_per_token"] for row in rows],
            marker="o",
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="length T", ylabel="us per token")
    axes.set_title(f"forward + backward, K = V = 64, {report['device']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=20 if ON_GPU else 5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--tokens", type=int, default=65536, help="per batch of long sequences")
    arguments = parser.parse_args()

    load = [getloadavg()[0]]
    peak = measure_peak(arguments.rounds)
    report = {
        "command": " ".join(["python -m benchmarks.ops", *sys.argv[1:]]),
        **common.environment(),
        "rounds": arguments.rounds,
        "peak_flops": peak,
        "paper": [],
    }
    for shape in paper_shapes():
        for name in FAST:
            rows = measure(name, shape, peak, arguments.rounds)
            report["paper"] += rows
            for row in rows:
                memory = row["temporary_MiB"] or float("nan")
                print(
                    f"{name} {shape} {row['form']:18s} forward {row['forward_ms']:8.2f} ms, both "
                    f"{row['both_ms']:8.2f} ms, {memory:7.1f} MiB, speedup "
                    f"{row['speedup_forward']:.2f} / {row['speedup_both']:.2f}",
                    flush=True,
                )
    shapes = paper_shapes()
    size = 64 if ON_GPU else 16
    report["inverse"] = [measure_inverse(x, size, arguments.rounds) for x in (shapes[0], shapes[3])]
    report["long"] = measure_long(arguments.lengths, arguments.tokens, min(3, arguments.rounds))
    load.append(getloadavg()[0])
    report["load_average"] = load

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"ops_{common.device_name()}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(report))
    plot(report, path.with_suffix(".png"))
    print(as_markdown(report))


if __name__ == "__main__":
    main()
