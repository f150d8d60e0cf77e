"""The delta rule beside that of `jax-linear-attention`, forward and backward.

    python -m benchmarks.beside                  # the same values, and how long they take here
    python -m benchmarks.beside --device h100    # both compiled for a GPU that is not there

Needs `pip install jax-linear-attention` (0.1.0: Python 3.12, jax 0.11.2) and, for `--device`, what
`benchmarks.gpu_cost` needs. Of that package it is the plain JAX form (`impl="chunked"`), which is
what it runs wherever there is no Hopper GPU: its kernels are for those alone. The two take turns
and figures are medians; its matmuls are in full float32, ours as jax has them by default, which
makes no difference on a CPU nor in the model of a GPU.
"""

import argparse
import importlib.util
import os
import sys

from benchmarks import gpu_cost

SHAPES = (
    "96x256x8x16x16", "96x256x8x64x16", "56x384x8x32x32", "8x2048x16x128x128",
)  # fmt: skip
SHAPES_HERE = ("2x1024x8x64x64", "2x1024x8x128x128", "1x2048x4x256x256")


def rules() -> dict:
    """(q, k, v, beta) -> out, ... by name."""
    from jla.ops import linear_attention

    from fwm import ops

    def theirs(q, k, v, beta):
        options = {"scale": 1.0, "impl": "chunked"}
        return linear_attention("deltanet", q, k, v, beta=beta, **options)

    return {"fwm": ops.delta_rule, "jax-linear-attention": theirs}


def compile_for(device: str, shape: tuple[int, ...], dtype: str) -> None:
    """A line of each rule."""
    for name, rule in rules().items():
        _, arguments = gpu_cost.op("delta", dtype, shape)
        both = gpu_cost.forward_and_backward(rule)
        result = gpu_cost.compiled(both, arguments, device, 1, donate=False)
        print(f"| {name} | {gpu_cost.described(result, device, dtype)[0]} |", flush=True)


def time_here(shape: tuple[int, ...], dtype: str, rounds: int) -> None:
    """How far the values are from each other, of the largest; a line of each rule."""
    import jax
    import jax.numpy as jnp

    from benchmarks import common
    from fwm.ops.feature_maps import l2_normalize

    b, t, n, n_key, n_value = shape
    keys = jax.random.split(jax.random.key(0), 5)
    q, k = (l2_normalize(jax.random.normal(key, (b, t, n, n_key))) for key in keys[:2])
    v, dout = (jax.random.normal(key, (b, t, n, n_value)) for key in keys[2:4])
    beta = jax.nn.sigmoid(jax.random.normal(keys[4], (b, t, n)))
    arguments = [*(x.astype(dtype) for x in (dout, q, k, v)), beta]
    functions = {
        name: jax.jit(gpu_cost.forward_and_backward(rule)).lower(*arguments).compile()
        for name, rule in rules().items()
    }
    ours, theirs = (jax.tree.leaves(function(*arguments)) for function in functions.values())
    wide = lambda x: x.astype(jnp.float32)
    apart = lambda x, y: jnp.max(jnp.abs(wide(x) - wide(y))) / jnp.max(jnp.abs(wide(y)))
    values = [f"{apart(x, y):.0e}" for x, y in zip(ours, theirs, strict=True)]
    print(f"| apart: out, dq, dk, dv, dbeta | {', '.join(values)} |")
    calls = {name: lambda f=f: f(*arguments) for name, f in functions.items()}
    times = {name: common.median(x) for name, x in common.alternate(calls, rounds).items()}
    for name, seconds in times.items():
        print(f"| {name} | {1e3 * seconds:.1f} ms, {seconds / times['fwm']:.2f} |", flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=gpu_cost.DEVICES, help="compiled, not run")
    parser.add_argument("--shapes", nargs="*", help="B x T x N x K x V")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=11)
    a = parser.parse_args()
    if importlib.util.find_spec("jla") is None:
        sys.exit("The other delta rule is missing: pip install jax-linear-attention.")
    if a.device:
        os.environ["JAX_PLATFORMS"] = "cpu"
    for text in a.shapes or (SHAPES if a.device else SHAPES_HERE):
        for dtype in a.dtypes:
            shape = tuple(int(size) for size in text.split("x"))
            print(f"| {text} {dtype} | |")
            if a.device:
                compile_for(a.device, shape, dtype)
            else:
                time_here(shape, dtype, a.rounds)


if __name__ == "__main__":
    main()
