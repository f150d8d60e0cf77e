"""Exact perplexity: the sliding window of the paper, and consecutive segments with memory.

Both keep the sum and the count of what they score, in float64 on the host, and divide once. Every
token of the stream after the first is scored exactly once.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fwm import data, parallel
from fwm.checkpoint import Checkpoints, write_json
from fwm.errors import UserError
from fwm.model import LanguageModel, ModelConfig, build_config

# Called after each batch with the score so far and the number of positions there are in all.
Progress = Callable[["Score", int], None]


@dataclasses.dataclass(frozen=True)
class Score:
    """Sum of -log p over scored tokens, in nats, and their number."""

    total_nll: float
    count: int

    @property
    def mean_nll(self) -> float:
        """Nats per token."""
        return self.total_nll / self.count

    @property
    def perplexity(self) -> float:
        """exp(mean nll)."""
        return math.exp(self.mean_nll)

    @property
    def bits_per_token(self) -> float:
        """Bits per token, which are bits per character for a character-level corpus."""
        return self.mean_nll / math.log(2)


def _columns(tokens: Any, batch_size: int, split_stream: bool) -> np.ndarray:
    """The stream as [rows, tokens]: one row, or `batch_size` equal ones without the remainder."""
    tokens = np.asarray(tokens, np.int32)
    rows = batch_size if split_stream else 1
    if rows < 1:
        raise UserError("split_stream needs batch_size, the number of rows: set it to 1 or more.")
    if len(tokens) < 2 * rows:
        raise UserError(f"the text has {len(tokens)} tokens: too few to score {rows} rows of it.")
    return tokens[: len(tokens) // rows * rows].reshape(rows, -1)


def _windows(
    model: LanguageModel,
    variables: Any,
    stream: Int[Array, "R S"],
    rows: Int[Array, " B"],
    ends: Int[Array, " B"],
    *,
    window: int,
    scored: int,
) -> Float[Array, "B scored"]:
    """nll of tokens `end - scored + 1 ... end` of a row, each window seeing `window` inputs."""
    cut = lambda row, start, size: jax.lax.dynamic_slice(stream, (row, start), (1, size))[0]
    tokens = jax.vmap(lambda row, end: cut(row, end - window, window))(rows, ends)
    targets = jax.vmap(lambda row, end: cut(row, end - scored + 1, scored))(rows, ends)
    nll, _ = model.apply(variables, tokens, targets)
    return nll


def automatic_batch_size(config: ModelConfig, window: int) -> int:
    """Windows at once on one device: as many as a quarter of its memory holds, at most 512.

    What a window needs at its peak is the inner activation of a feed-forward part, the
    projections of a mixer, and softmax scores where there are any, in float32.
    """
    c = config
    scores = 2 * c.n_head * window if c.mixer == "softmax" else 0
    floats = window * (2 * c.d_inner + 8 * c.d_model + c.n_head * (6 * c.n_feature) + scores)
    stats = jax.local_devices()[0].memory_stats()
    # A CPU tells no limit, and more than what fits its caches makes it no faster.
    budget = stats["bytes_limit"] // 4 if stats and "bytes_limit" in stats else 64 * 2**20
    return max(1, min(512, budget // (4 * floats)))


def sliding_window(
    model: LanguageModel,
    variables: Any,
    tokens: Int[np.ndarray, " S"] | Int[Array, " S"],
    *,
    window: int,
    batch_size: int = 0,
    stride: int = 1,
    split_stream: bool = False,
    progress: Progress | None = None,
) -> Score:
    """Score a stream with a window of `window` inputs (paper section 6.3).

    The first window scores all its positions, every later one moves by `stride` and scores its
    last `stride` positions. Windows are independent, so `batch_size` (0: chosen from memory) only
    changes the speed.

    Args:
        model: a `LanguageModel`; any memory it would carry is not used.
        variables: its variables.
        tokens: one stream of ids.
        window: inputs per window; a shorter stream is one shorter window.
        batch_size: windows at once, over all devices.
        stride: 1 is the paper's protocol; larger ones give most positions less context and cost
            so many times less.
        split_stream: the official evaluator at batch_size > 1: the stream is cut into so many
            equal rows, each with a first window of its own; the remainder is not scored.
        progress: called after every batch.

    Raises:
        UserError: a stream too short to score, a stride outside 1..window.
    """
    if not 1 <= stride <= window:
        raise UserError(f"stride must lie between 1 and the window of {window}, got {stride}.")
    columns = _columns(tokens, batch_size, split_stream)
    n_row, last = columns.shape[0], columns.shape[1] - 1
    window = min(window, last)
    n_device = len(jax.local_devices())
    batch_size = batch_size or n_device * automatic_batch_size(model.config, window)
    per_call = max(1, batch_size // n_device) * n_device
    on_devices = parallel.replicate((variables, columns))

    def batches(rows: np.ndarray, ends: np.ndarray, scored: int) -> Iterator[np.ndarray]:
        """nll of the last `scored` positions of every window, batch by batch, [b, scored]."""
        function = functools.partial(_windows, model, window=window, scored=scored)
        step = parallel.pmap(function)
        size = min(per_call, -(-len(rows) // n_device) * n_device)
        pending = None
        for start in range(0, len(rows) + size, size):
            ready, pending = pending, None
            if start < len(rows):
                ids = np.arange(start, start + size)
                ids = np.minimum(ids, len(rows) - 1)  # padding: repeats that are not counted
                pending = step(*on_devices, *parallel.split((rows[ids], ends[ids])))
            # The next batch is on its way while the host adds up this one.
            if ready is not None:
                nll = np.asarray(ready, np.float64).reshape(-1, scored)
                yield nll[: len(rows) - (start - size)]

    expected = n_row * last
    score = Score(0.0, 0)
    first = (np.arange(n_row), np.full(n_row, window))
    for nll in batches(*first, window):
        score = Score(score.total_nll + float(nll.sum()), score.count + nll.size)
    ends = np.minimum(np.arange(window, last, stride) + stride, last)
    rows = np.repeat(np.arange(n_row), len(ends))
    done = 0
    for nll in batches(rows, np.tile(ends, n_row), stride) if len(ends) else ():
        # Only the last window of a row may score fewer positions than the stride.
        fresh = np.diff(ends, prepend=window)[np.arange(done, done + len(nll)) % len(ends)]
        counted = nll * (np.arange(stride)[None, :] >= stride - fresh[:, None])
        score = Score(score.total_nll + float(counted.sum()), score.count + int(fresh.sum()))
        done += len(nll)
        if progress is not None:
            progress(score, expected)
    if score.count != expected:
        raise AssertionError(f"scored {score.count} positions, not {expected}")
    return score


def carry_over(
    model: LanguageModel,
    variables: Any,
    tokens: Int[np.ndarray, " S"] | Int[Array, " S"],
    *,
    segment: int,
    batch_size: int = 1,
    split_stream: bool = False,
    progress: Progress | None = None,
) -> Score:
    """Score a stream in consecutive segments, each starting from the memory of the one before.

    For fast weights carried over and Transformer-XL; a model without memory sees each segment by
    itself. The last, shorter segment is included. A chain of segments cannot be batched:
    `batch_size` counts only with `split_stream`, which cuts the stream into so many equal rows
    without the remainder, as the official evaluator does.

    Raises:
        UserError: a stream too short to score, a segment below 1.
    """
    if segment < 1:
        raise UserError(f"segment must be at least 1 token, got {segment}.")
    columns = _columns(tokens, batch_size, split_stream)
    last = columns.shape[1] - 1
    step = jax.jit(lambda variables, x, y, memory: model.apply(variables, x, y, memory))
    memory, score = None, Score(0.0, 0)
    for start in range(0, last, segment):
        end = min(start + segment, last)
        x, y = columns[:, start:end], columns[:, start + 1 : end + 1]
        nll, memory = step(variables, jnp.asarray(x), jnp.asarray(y), memory)
        total = score.total_nll + float(np.asarray(nll, np.float64).sum())
        score = Score(total, score.count + nll.size)
        if progress is not None:
            progress(score, columns.shape[0] * last)
    return score


def run(config: Any, workdir: Path, split: str, report: Callable[[str], None] = print) -> dict:
    """Score `split` with a checkpoint of `workdir` and write `<split>_results.json` there.

    Raises:
        UserError: no run in workdir, no such checkpoint, no text for the split.
    """
    c = config
    vocab = data.Vocabulary.load(workdir / "vocab.txt")
    corpus = data.load(
        c.data.name,
        dir=c.data.dir,
        cache_dir=c.data.cache_dir,
        vocab=vocab,
        splits=(split,),
        download=c.data.download,
    )
    for warning in corpus.warnings:
        report(f"warning: {warning}")
    overrides = {k: c.eval[k] for k in ("mem_len", "clamp_len") if c.eval[k] > 0}
    model_config = build_config(c.model.to_dict() | overrides, len(vocab))
    checkpoints = Checkpoints(workdir / "checkpoints", report=report)
    step, variables = checkpoints.restore_subtree(("params", "favor"), c.eval.checkpoint)
    checkpoints.close()
    variables = {"params": variables["params"], **(variables["favor"] or {})}

    carried = c.train.carry_over_fast_weight or c.model.mixer == "transformer_xl"
    length = c.eval.tgt_len or c.train.tgt_len
    model, stream = LanguageModel(model_config), corpus.streams[split]
    started = time.monotonic()
    shared: dict[str, Any] = {
        "split_stream": c.eval.split_stream,
        "progress": _progress_line(split, report),
    }
    if carried:
        rows = max(c.eval.batch_size, 1)
        score = carry_over(model, variables, stream, segment=length, batch_size=rows, **shared)
    else:
        score = sliding_window(
            model,
            variables,
            stream,
            window=length,
            batch_size=c.eval.batch_size,
            stride=c.eval.stride,
            **shared,
        )
    results = {
        "split": split,
        "protocol": "carry_over" if carried else "sliding_window",
        "window": length,
        "stride": None if carried else c.eval.stride,
        "batch_size": c.eval.batch_size,
        "split_stream": c.eval.split_stream,
        "tokens": score.count,
        "mean_nll": score.mean_nll,
        "perplexity": score.perplexity,
        "bits_per_token": score.bits_per_token,
        "unit": corpus.unit,
        "checkpoint_step": step,
        "seconds": round(time.monotonic() - started, 3),
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
    }
    path = workdir / f"{split}_results.json"
    write_json(path, results)
    unit = "character" if corpus.unit == "character" else "token"
    report(
        f"{split}: perplexity {score.perplexity:.3f}, {score.bits_per_token:.4f} bits per {unit}, "
        f"over {score.count} tokens, checkpoint of step {step}, {results['seconds']:.1f} s -> {path}"
    )
    return results


def _progress_line(split: str, report: Callable[[str], None]) -> Progress:
    """Reports every ten seconds."""
    started = time.monotonic()
    said = [started]

    def progress(score: Score, total: int) -> None:
        now = time.monotonic()
        if now - said[0] >= 10.0:
            said[0] = now
            left = (now - started) * (total - score.count) / score.count
            report(
                f"{split}: {score.count}/{total} tokens, {score.count / (now - started):.0f} per s, "
                f"perplexity so far {score.perplexity:.2f}, {left:.0f} s left"
            )

    return progress
