"""Time and temporary memory of the adaptive softmax and embedding at WikiText-103's size.

    python -m benchmarks.adaptive                   prints a table, writes benchmarks/results/

The softmax, forward and backward, is compared with its head alone: the same code with a vocabulary
of 20,000 words. Targets are drawn from WikiText-103's shape: 103.2 million tokens, the rarest of
267,735 words seen 3 times, 93% of the tokens in the head; counts of the words after rank 20,000
then fall as rank**-1.82. The split between the tails is a law, not a count: a Zipf-Mandelbrot law
with the same ends and head asks for the same arithmetic, and `--head` says how much hangs on the
93%. `arithmetic` is the ratio of the multiplications that the targets ask for. `floor` is the ratio
if the tails' four matmuls (logits, logits again, gradients of hidden states and table) ran at the
machine's peak beside the head as it is, and their part of the table's gradient, new memory in every
call, were only filled with zeros.

Runs alternate and the median is reported, with the time of one processor core (`cpu`), which
depends less on what else the machine does.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from fwm.layers.vocabulary import AdaptiveEmbedding, AdaptiveSoftmax

N_TOKEN, CUTOFFS, D = 267735, (20000, 40000, 200000), 128


def wikitext_like(rng, n, head, rarest=3, total=103.2e6):
    """Targets with a share `head` in the shortlist and a power law after it."""
    rank = np.arange(1, N_TOKEN + 1)
    low, high = 1.0, 4.0  # the exponent that leaves the wanted mass in the tails, by bisection
    for _ in range(50):
        power = (low + high) / 2
        mass = rarest * np.sum((rank[CUTOFFS[0] :] / N_TOKEN) ** -power)
        low, high = (power, high) if mass < (1 - head) * total else (low, power)
    count = rarest * (rank / N_TOKEN) ** -power
    count[: CUTOFFS[0]] = 1 / rank[: CUTOFFS[0]]  # the order within the head costs nothing
    count[: CUTOFFS[0]] *= head * total / count[: CUTOFFS[0]].sum()
    return rng.choice(N_TOKEN, n, p=count / count.sum()).astype(np.int32)


def cases(tokens, head, rng):
    """Compiled functions with their arguments by name, tokens by cluster, the tails' logits."""
    targets = wikitext_like(rng, tokens, head)[None, :]
    hidden = jnp.array(rng.normal(size=(1, tokens, D)), jnp.float32)
    table = jnp.array(rng.normal(size=(N_TOKEN, D)) * 0.1, jnp.float32)
    out = {}
    for name, n_token, cutoffs in (("head", CUTOFFS[0], ()), ("whole", N_TOKEN, CUTOFFS)):
        softmax = AdaptiveSoftmax(n_token, D, D, cutoffs, tie_projs=(False,) * (len(cutoffs) + 1))
        arguments = hidden, jnp.minimum(targets, n_token - 1), (table[:n_token],)
        params = jax.jit(softmax.init)(jax.random.key(0), *arguments)

        def loss(params, *arguments, softmax=softmax):
            return softmax.apply(params, *arguments).mean()

        forward = jax.jit(loss)
        out[f"{name} forward"] = forward.lower(params, *arguments).compile(), (params, *arguments)
        both = jax.jit(jax.value_and_grad(loss, (0, 1, 3)))
        out[f"{name} forward+backward"] = (
            both.lower(params, *arguments).compile(),
            (
                params,
                *arguments,
            ),
        )

    embed = AdaptiveEmbedding(N_TOKEN, D, D, CUTOFFS)

    def lookup(params, tokens):
        return jnp.sum(embed.apply({"params": params}, tokens) ** 2)

    arguments = {"table_0": table}, jnp.array(targets)
    out["embedding gradient"] = jax.jit(jax.grad(lookup)).lower(*arguments).compile(), arguments

    # With the softmax's gradient of the tied table already there, as in training.
    def into(params, d_table, tokens):
        def both(params):
            return embed.apply({"params": params}, tokens, method="with_tables")

        (x, _), pull = jax.vjp(both, params)
        return pull((2 * x, (d_table,)))[0]["table_0"]

    step = jax.jit(into, donate_argnums=1)
    out["embedding gradient, tied"] = (
        step.lower(arguments[0], table, targets).compile(),
        (
            arguments[0],
            None,
            jnp.array(targets),
        ),
    )
    tails = jax.jit(lambda: jnp.zeros((N_TOKEN - CUTOFFS[0], D)))
    out["zeros for the tails"] = tails.lower().compile(), ()
    clusters = np.bincount(np.searchsorted(CUTOFFS, targets[0], side="right"), minlength=4)
    sizes = np.diff((0, *CUTOFFS, N_TOKEN))
    return out, clusters.tolist(), float(np.sum(clusters[1:] * sizes[1:]))


def measure(functions, repeats):
    """Median wall and processor milliseconds per function, runs alternating."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, (function, arguments) in functions.items():
            if any(a is None for a in arguments):  # the donated gradient is made outside the clock
                zeros = jax.block_until_ready(jnp.zeros((N_TOKEN, D)))
                arguments = tuple(zeros if a is None else a for a in arguments)
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(function(*arguments))
            if repeat:  # the first run warms up
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: [1e3 * statistics.median(column) for column in zip(*values, strict=True)]
        for name, values in times.items()
    }


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16 * 256, 4 * 256])
    parser.add_argument("--head", type=float, default=0.93, help="share of the tokens in the head")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    device = jax.devices()[0]
    product, product_flops = common.matmul()
    results = {
        "command": " ".join(["python -m benchmarks.adaptive", *sys.argv[1:]]),
        **common.environment(),
        "n_token": N_TOKEN,
        "cutoffs": CUTOFFS,
        "d": D,
        "head": args.head,
        "runs": {},
    }
    for tokens in args.tokens:
        functions, clusters, pairs = cases(tokens, args.head, np.random.default_rng(0))
        times = measure(functions | {"matmul": (product, ())}, args.repeats)
        arithmetic = 1 + pairs / (tokens * CUTOFFS[0])
        peak = product_flops / times.pop("matmul")[0]  # per millisecond
        extra = 4 * 2 * D * pairs / peak + times["zeros for the tails"][0]
        floor = 1 + extra / times["head forward+backward"][0]
        print(f"\n{tokens} tokens, by cluster {clusters}, on {device.device_kind}")
        print(f"{'':28}{'ms':>9}{'cpu ms':>9}{'temp MB':>9}")
        rows = {}
        for name, (wall, cpu) in times.items():
            memory = functions[name][0].memory_analysis().temp_size_in_bytes / 1e6
            rows[name] = {"ms": wall, "cpu_ms": cpu, "temp_mb": memory}
            print(f"{name:28}{wall:9.1f}{cpu:9.1f}{memory:9.1f}")
        ratio = {
            key: rows["whole forward+backward"][key] / rows["head forward+backward"][key]
            for key in ("ms", "cpu_ms")
        }
        print(
            f"whole / head, forward+backward: {ratio['ms']:.2f} (cpu {ratio['cpu_ms']:.2f}); "
            f"arithmetic {arithmetic:.2f}, floor {floor:.2f} at {peak / 1e6:.0f} GFLOP/s"
        )
        results["runs"][tokens] = {
            "tokens_by_cluster": clusters,
            "arithmetic_ratio": arithmetic,
            "floor_ratio": floor,
            "matmul_gflops": peak / 1e6,
            "ratio": ratio,
            "rows": rows,
        }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"adaptive_{common.device_name()}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
