"""Training throughput of every variant, next to its FLOPs and this machine's own matmul peak.

    python -m benchmarks.train_step                          small and medium, all variants
    python -m benchmarks.train_step --preset small --variants linear_delta --batches 16
    python -m benchmarks.train_step --memory                 memory at the paper's batch
    python -m benchmarks.train_step --parts linear_delta     where the time of a small step goes

One step is everything: dropout, forward, backward, clipping, Adam, on tokens with WikiText-103's
shares of the adaptive softmax's clusters. Steps and the matmul alternate; figures are medians.
Prints a table and writes benchmarks/results/train_step_<preset>_<device>.json; with --memory only
what the compiler says of the memory of a step at the paper's batch, train_memory_<preset>_....
"""

import argparse
import functools
import importlib
import itertools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from fwm.layers import Dropout, FeedForward
from fwm.model import LanguageModel, build_config
from fwm.optimizer import adam, learning_rate
from fwm.step import Batch, init_state, train_step

VARIANTS = (
    "transformer", "transformer_xl", "linear_sum", "linear_delta", "performer_sum",
    "performer_delta", "dpfp_sum", "dpfp_delta",
)  # fmt: skip


def tokens_like_wikitext(cutoffs: tuple[int, ...], rows: int, length: int) -> np.ndarray:
    """Random tokens, their clusters with the shares of WikiText-103's."""
    rng = np.random.default_rng(0)
    bounds = np.array((0, *cutoffs, common.WIKITEXT_TOKENS))
    cluster = rng.choice(len(common.WIKITEXT_SHARES), (rows, length), p=common.WIKITEXT_SHARES)
    return rng.integers(bounds[cluster], bounds[cluster + 1]).astype(np.int32)


def prepare(variant: str, preset: str, rows: int, dtype: str) -> tuple:
    """Config, model, and one step as a function with its abstract arguments and their maker."""
    config = importlib.import_module(f"configs.{variant}").get_config(preset)
    fields = config.model.to_dict() | {"dtype": dtype}
    model = LanguageModel(build_config(fields, common.WIKITEXT_TOKENS))
    t = config.train
    schedule = learning_rate(t.scheduler, t.lr, t.warmup_step, t.max_step, t.decay_step)
    optimizer = adam(schedule, t.clip, t.weight_decay)
    carry = rows if config.model.mem_len else 0
    make_state = functools.partial(init_state, model, optimizer, 1, carry)
    stream = tokens_like_wikitext(model.config.cutoffs, rows, t.tgt_len + 1)
    batch = Batch(stream[:, :-1], stream[:, 1:], np.zeros(rows, bool), np.arange(rows))
    step = jax.jit(functools.partial(train_step, model, optimizer, schedule), donate_argnums=0)
    return config, model, step, make_state, batch


def memory(variant: str, preset: str, dtype: str) -> dict:
    """Memory of a step at the paper's batch, on one device: compiled, not run."""
    paper = importlib.import_module(f"configs.{variant}").get_config(preset).train
    _, _, step, make_state, batch = prepare(variant, preset, paper.batch_size, dtype)
    analysis = step.lower(jax.eval_shape(make_state), batch).compile().memory_analysis()
    return {
        "variant": variant,
        "preset": preset,
        "batch": f"{paper.batch_size} x {paper.tgt_len}",
        "dtype": dtype,
        "temporary_gb": round(analysis.temp_size_in_bytes / 1e9, 2),
        "state_and_batch_gb": round(analysis.argument_size_in_bytes / 1e9, 2),
    }


def measure(variant: str, preset: str, rows: int, dtype: str, rounds: int) -> dict:
    """One row of the table."""
    config, model, step, make_state, batch = prepare(variant, preset, rows, dtype)
    t = config.train
    started = time.perf_counter()
    state = jax.jit(make_state)()
    batch = jax.device_put(batch)
    compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - started
    holder = [state]

    def one():
        holder[0], metrics = compiled(holder[0], batch)
        return metrics["loss"]

    product, product_flops = common.matmul(jnp.dtype(dtype))
    times = common.alternate({"step": one, "matmul": product}, rounds)
    seconds = common.median(times["step"])
    peak = product_flops / common.median(times["matmul"])
    tokens = rows * t.tgt_len
    shares = common.WIKITEXT_SHARES
    flops = 3 * common.flops_per_token(model.config, t.tgt_len, shares)
    speed = tokens / seconds
    return {
        "variant": variant,
        "preset": preset,
        "batch": f"{rows} x {t.tgt_len}",
        "dtype": dtype,
        "tokens_per_second": round(speed),
        "milliseconds": round(1e3 * seconds, 1),
        "mflops_per_token": round(flops / 1e6, 1),
        "peak_gflops": round(peak / 1e9),
        "share_of_peak": round(speed * flops / peak, 3),
        "temporary_gb": round(compiled.memory_analysis().temp_size_in_bytes / 1e9, 2),
        "compile_seconds": round(compile_seconds, 1),
        "hours_for_the_papers_run": round(t.max_step * t.batch_size * t.tgt_len / speed / 3600, 1),
    }


def parts(variant: str, rows: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step at `small` and of parts of it, each forward and backward."""
    config = importlib.import_module(f"configs.{variant}").get_config("small")
    model = LanguageModel(build_config(config.model.to_dict(), common.WIKITEXT_TOKENS))
    c, t = model.config, config.train
    schedule = learning_rate(t.scheduler, t.lr, t.warmup_step, t.max_step, t.decay_step)
    optimizer = adam(schedule, t.clip, t.weight_decay)
    state = jax.jit(functools.partial(init_state, model, optimizer, 1, 0))()
    stream = tokens_like_wikitext(c.cutoffs, rows, t.tgt_len + 1)
    batch = Batch(stream[:, :-1], stream[:, 1:], np.zeros(rows, bool), np.arange(rows))
    batch = jax.device_put(batch)
    source = Dropout(jax.random.key(1), jnp.arange(rows))

    def loss(params, dropout=None):
        variables = {"params": params, **state.favor}
        return model.apply(variables, batch.tokens, batch.targets, None, dropout)[0].mean()

    def hidden(params):
        variables = {"params": params, **state.favor}
        return model.apply(variables, batch.tokens, None, None, method="hidden")[0].sum()

    def feed_forward(params, x):
        apply = lambda x, p: (FeedForward(c.d_inner).apply({"params": p}, x), None)
        return jax.lax.scan(apply, x, params)[0].sum()

    x = jnp.zeros((rows, t.tgt_len, c.d_model))
    ones = jax.tree.map(jnp.ones_like, state.params)
    compiled = {
        name: jax.jit(function).lower(*arguments).compile()
        for name, function, arguments in (
            ("step", functools.partial(train_step, model, optimizer, schedule), (state, batch)),
            ("with dropout", lambda p: jax.grad(loss)(p, source), (state.params,)),
            ("no dropout", jax.grad(loss), (state.params,)),
            ("layers", jax.grad(hidden), (state.params,)),
            (
                "feed-forward",
                jax.grad(feed_forward, (0, 1)),
                (state.params["layers"]["ff"], x),
            ),
            ("adam", optimizer.update, (ones, state.opt_state, state.params)),
        )
    }
    functions = {
        "step": lambda: compiled["step"](state, batch),
        "feed-forward": lambda: compiled["feed-forward"](state.params["layers"]["ff"], x),
        "adam": lambda: compiled["adam"](ones, state.opt_state, state.params),
    }
    for name in ("with dropout", "no dropout", "layers"):
        functions[name] = functools.partial(compiled[name], state.params)
    times = {k: 1e3 * common.median(v) for k, v in common.alternate(functions, rounds).items()}
    return {
        "whole step": times["step"],
        "adam": times["adam"],
        "dropout": times["with dropout"] - times["no dropout"],
        "adaptive softmax and embedding": times["no dropout"] - times["layers"],
        "feed-forward": times["feed-forward"],
        "mixers, norms, residuals": times["layers"] - times["feed-forward"],
    }


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cpu = jax.default_backend() == "cpu"
    parser.add_argument("--preset", nargs="*", default=["small", "medium"])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--batches", nargs="*", type=int, default=[4, 16] if cpu else [])
    parser.add_argument("--dtypes", nargs="*", default=["float32"] + ["bfloat16"] * (not cpu))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="only memory, at the paper's batch")
    parser.add_argument("--parts", metavar="VARIANT", help="only the parts of one step")
    arguments = parser.parse_args()
    if arguments.parts:
        rows = arguments.batches[0] if arguments.batches else 16
        for name, value in parts(arguments.parts, rows, arguments.rounds).items():
            print(f"| {name} | {value:.0f} ms |")
        return
    table: list[dict] = []

    def add(row: dict) -> None:
        if not table:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
        table.append(row)

    for preset, variant in itertools.product(arguments.preset, arguments.variants):
        paper = importlib.import_module(f"configs.{variant}").get_config(preset).train
        for dtype in arguments.dtypes:
            if arguments.memory:
                add(memory(variant, preset, dtype))
                continue
            for batch in arguments.batches or [paper.batch_size]:
                add(measure(variant, preset, batch, dtype, arguments.rounds))
    kind = "memory" if arguments.memory else "step"
    for preset in arguments.preset:
        result = {
            "command": " ".join(["python -m benchmarks.train_step", *sys.argv[1:]]),
            **common.environment(),
            "rows": [row for row in table if row["preset"] == preset],
        }
        name = f"train_{kind}_{preset}_{common.device_name()}.json"
        path = Path(__file__).parent / "results" / name
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
