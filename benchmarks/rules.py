"""What the switches of the wider family cost, beside the plain delta rule.

    python -m benchmarks.rules                # writes benchmarks/results/rules_<device>.md

Forward and backward at 2 x 1024 tokens, 8 heads, K = V = 64, all forms in turns; how much memory
they need there and at eight times the length. Beside the time of the clock stands that of the
processor, which other programs change less.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.ops import compiled
from fwm.ops import delta_rule, fast_weight_attention, l2_normalize, sum_rule


def forms(n_batch: int, length: int, n_head: int = 8, width: int = 64) -> dict:
    """The rules by name: a function of arrays, and these."""
    keys = iter(jax.random.split(jax.random.key(0), 12))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    shape = (n_batch, length, n_head)
    q, k, erase = (l2_normalize(normal(*shape, width)) for _ in range(3))
    two = l2_normalize(normal(n_batch, 2 * length, n_head, width))
    v, v_two = normal(*shape, width), normal(n_batch, 2 * length, n_head, width)
    beta, beta_two = (jax.nn.sigmoid(normal(*x.shape[:3])) for x in (v, v_two))
    head, channel = (-jax.nn.softplus(normal(*s) - 2) for s in (shape, (*shape, width)))

    def with_(rule, **options):
        names = tuple(options)
        return partial(lambda rule, names, *x: rule(**dict(zip(names, x, strict=True))), rule,
                       names), list(options.values())  # fmt: skip

    # Given as the arrays are, not as what XLA could compute with beforehand.
    ids = jnp.cumsum(jnp.arange(length) % 200 == 150)[None].repeat(n_batch, axis=0) * 1.0

    def documents(q, k, v, beta, ids):
        options = {"update_rule": "delta", "attn_normalization": "none"}
        ids = ids.astype(jnp.int32)
        out, state = fast_weight_attention(q, k, v, beta, None, segment_ids=ids, **options)
        return out, state.weights

    plain = {"q": q, "k": k, "v": v}
    delta = {**plain, "beta": beta}
    writes = {"q": q, "k": two, "v": v_two, "beta": beta_two}
    return {
        "delta": with_(delta_rule, **delta),
        "delta, decay by head": with_(delta_rule, **delta, log_decay=head),
        "delta, decay by channel": with_(delta_rule, **delta, log_decay=channel),
        "delta, documents of 200 tokens": with_(documents, **delta, ids=ids),
        "delta, erase key": with_(delta_rule, **delta, erase_key=erase),
        "delta, two writes": with_(delta_rule, **writes),
        "delta, two writes, decay by head": with_(delta_rule, **writes, log_decay=head),
        "sum": with_(sum_rule, **plain),
        "sum, decay by head": with_(sum_rule, **plain, log_decay=head),
        "sum, decay by channel": with_(sum_rule, **plain, log_decay=channel),
    }


def build(n_batch: int, length: int) -> dict:
    """Of each form a function that runs it once, and its temporary memory in MiB."""
    dout = jnp.ones((n_batch, length, 8, 64))
    return {
        name: compiled(rule, arrays, dout, backward=True)
        for name, (rule, arrays) in forms(n_batch, length).items()
    }


def measure(runs: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """The medians of each one's seconds by the clock and of the processor."""
    times: dict = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, _) in runs.items():
            run()
            start = time.perf_counter(), time.process_time()
            run()
            end = time.perf_counter(), time.process_time()
            times[name].append((end[0] - start[0], end[1] - start[1]))
    return {
        name: (common.median([x for x, _ in both]), common.median([x for _, x in both]))
        for name, both in times.items()
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    about = common.environment()
    lines = [
        f"# The wider family of rules: {about['device']}",
        "",
        f"`{' '.join(['python -m benchmarks.rules', *sys.argv[1:]])}`; {about['processor']}; "
        + ", ".join(f"{name} {about[name]}" for name in ("python", "jax", "jaxlib", "numpy"))
        + "; float32, forward and backward at 2 x 1024 x 8 x 64 x 64, medians of "
        f"{arguments.rounds} rounds in turns.",
        "",
        "| rule | ms | processor, ms | times the plain delta rule | temporary MiB | at T = 8192 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    runs = build(2, 1024)
    times, long = measure(runs, arguments.rounds), build(2, 8192)
    for name, (clock, processor) in times.items():
        ratio = processor / times["delta"][1]
        lines.append(
            f"| {name} | {1e3 * clock:.0f} | {1e3 * processor:.0f} | {ratio:.2f} "
            f"| {runs[name][1]:.0f} | {long[name][1]:.0f} |"
        )
    text = "\n".join(lines) + "\n"
    (arguments.out / f"rules_{common.device_name()}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
