"""What the benchmarks share: timing, the machine's own matmul peak, a model's FLOPs, the device."""

import itertools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fwm.config import ModelConfig


def device_name() -> str:
    """A short name for file names: cpu, or the kind of the first device."""
    kind = jax.devices()[0].device_kind
    return kind.lower().replace(" ", "_").replace("/", "_")


def environment() -> dict[str, Any]:
    """Device and versions, to stand beside every figure."""
    import flax
    import jaxlib
    import numpy

    processor = platform.processor() or platform.machine()
    if jax.default_backend() == "cpu":
        with open("/proc/cpuinfo") as info:
            names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
        processor = f"{len(names)} x {names[0]}"
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": processor,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": numpy.__version__,
    }


def seconds(function: Callable, *arguments: Any) -> float:
    """One call of a compiled function, awaited."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def alternate(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, one after the other, so that all see one machine."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def matmul(dtype: Any = jnp.float32) -> tuple[Callable[[], Any], float]:
    """Large square matmuls as a function, and their FLOPs: the peak is the one over its time.

    Five in a row: a single one is over before a processor that slept runs at its full speed.
    """
    n, times = (2048, 5) if jax.default_backend() == "cpu" else (8192, 20)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype) * n**-0.5
    product = jax.jit(lambda a: jax.lax.fori_loop(0, times, lambda _, x: x @ a, a))
    return lambda: product(a), 2.0 * times * n**3


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def flops_per_token(
    config: ModelConfig, length: int, shares: tuple[float, ...], scored: float = 1.0
) -> float:
    """FLOPs of one token's forward pass in a segment of `length`, a multiply-add counted as two.

    Per layer: the mixer's own count (`Mixer.flops`) and the feed-forward part, 4 D F. The softmax
    of the words: 2 D (head words + clusters), and for the share of tokens in a tail cluster 2 D
    times its words; `scored` is the share of positions that go through it. Element-wise work is
    not counted. Training is three times as much.
    """
    c = config
    mixers = [mixer.flops(c.d_model, length) for mixer in c.make_mixers()]
    layer = sum(mixers) / len(mixers) + 4 * c.d_model * c.d_inner
    bounds = (0, *c.cutoffs, c.n_token)
    sizes = [high - low for low, high in itertools.pairwise(bounds)]
    words = sizes[0] + len(c.cutoffs)
    words += sum(share * size for share, size in zip(shares[1:], sizes[1:], strict=True))
    return c.n_layer * layer + scored * 2 * c.d_model * words


# The shares of WikiText-103's tokens in the clusters of the cutoffs 20000, 40000, 200000: 93% in
# the head, the rest a rough split of the tail (benchmarks/adaptive.py has a law for it).
WIKITEXT_SHARES = (0.93, 0.03, 0.035, 0.005)
WIKITEXT_TOKENS = 267_735
