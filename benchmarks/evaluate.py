"""Windows per second of the exact evaluator, for every variant at `small`.

    python -m benchmarks.evaluate                    all variants
    python -m benchmarks.evaluate --variants transformer --windows 512

Next to it, in the same run and alternating: the official way in the same framework (one window at
a time, all positions through the softmax), and the bound of the FLOPs that the windows need (the
last layer and the softmax for one position) at the matmul peak measured in between. Tokens have
WikiText-103's shares of the adaptive softmax's clusters; parameters are random, which changes no
time. Prints a table with the extrapolated time for WikiText-103's test split (245,569 tokens) and
writes benchmarks/results/evaluate_<device>.json.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.train_step import VARIANTS, tokens_like_wikitext
from fwm.evaluate import sliding_window
from fwm.model import LanguageModel, ModelConfig, build_config

TEST_TOKENS = 245_569


def flops_per_window(config: ModelConfig, window: int) -> float:
    """What one window needs: all layers but the last whole, of that keys, values and one output."""
    c = config
    token = common.flops_per_token(c, window, common.WIKITEXT_SHARES, scored=0.0)
    layer = token / c.n_layer
    once = 4 * c.d_model * c.d_inner + 2 * c.n_head * c.d_head * c.d_model
    once += 2 * c.d_model * c.n_head * c.d_head  # the query
    last = window * (layer - once) + once
    word = common.flops_per_token(c, window, common.WIKITEXT_SHARES, scored=1.0) - token
    return window * (token - layer) + last + word


def measure(variant: str, windows: int, rounds: int) -> dict:
    """One row of the table."""
    config = importlib.import_module(f"configs.{variant}").get_config("small")
    fields = config.model.to_dict() | {"mem_len": 0}
    model = LanguageModel(build_config(fields, common.WIKITEXT_TOKENS))
    window = config.train.tgt_len
    stream = tokens_like_wikitext(model.config.cutoffs, 1, window + windows)[0]
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens, tokens)

    x, y = jnp.asarray(stream[None, :window]), jnp.asarray(stream[None, 1 : window + 1])
    one = jax.jit(lambda variables: model.apply(variables, x, y)[0])
    n_official = max(4, windows // 16)

    def official() -> None:
        for _ in range(n_official):
            jax.block_until_ready(one(variables))

    product, product_flops = common.matmul()
    functions = {
        "ours": lambda: sliding_window(model, variables, stream, window=window),
        "official": official,
        "matmul": product,
    }
    times = {k: common.median(v) for k, v in common.alternate(functions, rounds).items()}
    ours = windows / times["ours"]
    theirs = n_official / times["official"]
    peak = product_flops / times["matmul"]
    bound = peak / flops_per_window(model.config, window)
    return {
        "variant": variant,
        "windows_per_second": round(ours, 1),
        "official_way": round(theirs, 1),
        "ratio": round(ours / theirs, 2),
        "flop_bound": round(bound, 1),
        "share_of_bound": round(ours / bound, 3),
        "peak_gflops": round(peak / 1e9),
        "minutes_for_the_test_split": round(TEST_TOKENS / ours / 60, 1),
    }


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cpu = jax.default_backend() == "cpu"
    parser.add_argument(
        "--variants", nargs="*", default=[v for v in VARIANTS if v != "transformer_xl"]
    )
    parser.add_argument("--windows", type=int, default=256 if cpu else 5000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for variant in arguments.variants:
        row = measure(variant, arguments.windows, arguments.rounds)
        if not rows:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
        rows.append(row)
    result = {
        "command": " ".join(["python -m benchmarks.evaluate", *sys.argv[1:]]),
        **common.environment(),
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"evaluate_{common.device_name()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
