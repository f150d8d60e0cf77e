"""What the switches of the wider family cost, beside the plain delta rule.

    python -m benchmarks.rules                # writes benchmarks/results/rules_<device>.md

Forward and backward at 2 x 1024 tokens, 8 heads, K = V = 64, all forms in turns, medians, and how
long and how large they are at eight times the length.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.ops import compiled, medians
from fwm.ops import delta_rule, l2_normalize, sum_rule


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

    plain = {"q": q, "k": k, "v": v}
    delta = {**plain, "beta": beta}
    writes = {"q": q, "k": two, "v": v_two, "beta": beta_two}
    return {
        "delta": with_(delta_rule, **delta),
        "delta, decay by head": with_(delta_rule, **delta, log_decay=head),
        "delta, decay by channel": with_(delta_rule, **delta, log_decay=channel),
        "delta, erase key": with_(delta_rule, **delta, erase_key=erase),
        "delta, two writes": with_(delta_rule, **writes),
        "delta, two writes, decay by head": with_(delta_rule, **writes, log_decay=head),
        "sum": with_(sum_rule, **plain),
        "sum, decay by head": with_(sum_rule, **plain, log_decay=head),
        "sum, decay by channel": with_(sum_rule, **plain, log_decay=channel),
    }


def measure(n_batch: int, length: int, rounds: int) -> list[tuple[str, float, float]]:
    """(form, seconds, MiB of temporary memory) of each."""
    runs, memory = {}, {}
    for name, (rule, arrays) in forms(n_batch, length).items():
        dout = jnp.ones((n_batch, length, 8, 64))
        runs[name], memory[name] = compiled(rule, arrays, dout, backward=True)
    seconds = medians(runs, rounds)
    return [(name, seconds[name], memory[name]) for name in runs]


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
        + f"; float32, forward and backward, medians of {arguments.rounds} rounds in turns.",
        "",
        "| rule | ms at 2 x 1024 x 8 x 64 x 64 | times the plain delta rule | temporary MiB "
        "| ms at T = 8192 | temporary MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    short, long = measure(2, 1024, arguments.rounds), measure(2, 8192, 3)
    for (name, seconds, memory), (_, more, larger) in zip(short, long, strict=True):
        times = seconds / short[0][1]
        lines.append(
            f"| {name} | {1e3 * seconds:.1f} | {times:.2f} | {memory:.0f} "
            f"| {1e3 * more:.0f} | {larger:.0f} |"
        )
    text = "\n".join(lines) + "\n"
    (arguments.out / f"rules_{common.device_name()}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
