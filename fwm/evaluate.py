"""Exact perplexity: the sliding window of the paper, and consecutive segments with memory.

Both keep the sum and the count of what they score, in float64 on the host, and divide once. Every
token of the stream after the first is scored exactly once.
"""

import dataclasses
import functools
import json
import math
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fwm import data, parallel
from fwm.checkpoint import Checkpoints
from fwm.errors import UserError
from fwm.files import write_json
from fwm.model import LanguageModel, ModelConfig, build_config, empty_memory


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


@dataclasses.dataclass(frozen=True)
class Partial:
    """How far a scoring has come; from here it can be taken up again, with the same total.

    Fields:
        score: so far.
        expected: positions there are to score.
        position: windows, or tokens of each row, done.
        memory: what the next segment starts from.
    """

    score: Score
    expected: int
    position: int = 0
    memory: Any = None

    def add(self, nll: np.ndarray, position: int, memory: Any = None) -> "Partial":
        """With the nll of more positions, summed in float64."""
        total = self.score.total_nll + float(nll.sum(dtype=np.float64))
        score = Score(total, self.score.count + nll.size)
        return Partial(score, self.expected, position, memory)


def _finish(partials: Iterator[Partial]) -> Score:
    for partial in partials:
        last = partial
    if last.score.count != last.expected:
        raise AssertionError(f"scored {last.score.count} positions, not {last.expected}")
    return last.score


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


@functools.lru_cache(maxsize=16)
def _window_step(model: LanguageModel, window: int, scored: int) -> Callable:
    """`_windows` on all devices, compiled once however often a model is scored."""
    return parallel.pmap(functools.partial(_windows, model, window=window, scored=scored))


def automatic_batch_size(config: ModelConfig, window: int) -> int:
    """Windows at once on one device: as many as a quarter of its memory holds, at most 512.

    What a window needs at its peak is the inner activation of a feed-forward part, the
    projections of a mixer, and softmax scores where there are any, in float32.
    """
    c = config
    mixer = c.make_mixer().floats_per_token(window)
    floats = window * (2 * c.d_inner + 8 * c.d_model + mixer)
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        # A CPU tells no limit. Measured at `small`: 8 windows of 256 tokens are faster than 4,
        # whose matmuls are short, and than 16, which do not fit the caches.
        return max(1, min(512, 2048 // window))
    return max(1, min(512, stats["bytes_limit"] // 4 // (4 * floats)))


def sliding_window(
    model: LanguageModel,
    variables: Any,
    tokens: Int[np.ndarray, " S"] | Int[Array, " S"],
    *,
    window: int,
    batch_size: int = 0,
    stride: int = 1,
    split_stream: bool = False,
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

    Raises:
        UserError: a stream too short to score, a window below 1, a stride outside 1..window.
    """
    return _finish(
        _slide(
            model,
            variables,
            tokens,
            window=window,
            batch_size=batch_size,
            stride=stride,
            split_stream=split_stream,
        )
    )


def _slide(
    model: LanguageModel,
    variables: Any,
    tokens: Any,
    *,
    window: int,
    batch_size: int,
    stride: int,
    split_stream: bool,
    done: Partial | None = None,
) -> Iterator[Partial]:
    """`sliding_window` batch by batch, after what is done already."""
    if window < 1:
        raise UserError(f"window must be at least 1 token, got {window}.")
    if not 1 <= stride <= window:
        raise UserError(f"stride must lie between 1 and the window of {window}, got {stride}.")
    columns = _columns(tokens, batch_size, split_stream)
    n_row, last = columns.shape[0], columns.shape[1] - 1
    window = min(window, last)
    n_device = len(jax.local_devices())
    batch_size = batch_size or n_device * automatic_batch_size(model.config, window)
    per_call = max(1, batch_size // n_device) * n_device
    on_devices = parallel.replicate((variables, columns))
    partial = done or Partial(Score(0.0, 0), n_row * last)

    def batches(
        rows: np.ndarray, ends: np.ndarray, scored: int, begin: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(windows done, nll of the last `scored` positions of a batch of windows, [b, scored])."""
        step = _window_step(model, window, scored)
        size = min(per_call, -(-len(rows) // n_device) * n_device)
        pending = None
        for start in range(begin, len(rows) + size, size):
            ready, pending = pending, None
            if start < len(rows):
                # The last batch is filled up with repeats, which are not counted.
                ids = np.minimum(np.arange(start, start + size), len(rows) - 1)
                pending = step(*on_devices, *parallel.split((rows[ids], ends[ids])))
            # The next batch is on its way while the host adds up this one.
            if ready is not None:
                yield min(start, len(rows)), np.asarray(ready).reshape(-1, scored)

    # First the windows that score all their positions, one of each row, then all others.
    if partial.position == 0:
        for end, nll in batches(np.arange(n_row), np.full(n_row, window), window, 0):
            new = nll[: end - partial.position]
            partial = partial.add(new, end)
        yield partial
    ends = np.minimum(np.arange(window, last, stride) + stride, last)
    if len(ends) == 0:
        return
    # Only the last window of a row may score fewer positions than the stride.
    fresh = np.tile(np.diff(ends, prepend=window), n_row)
    rows = np.repeat(np.arange(n_row), len(ends))
    begin = partial.position - n_row
    for end, nll in batches(rows, np.tile(ends, n_row), stride, begin):
        new = fresh[partial.position - n_row : end]
        counted = np.arange(stride)[None, :] >= stride - new[:, None]
        partial = partial.add(nll[: len(new)][counted], n_row + end)
        yield partial


def carry_over(
    model: LanguageModel,
    variables: Any,
    tokens: Int[np.ndarray, " S"] | Int[Array, " S"],
    *,
    segment: int,
    batch_size: int = 1,
    split_stream: bool = False,
) -> Score:
    """Score a stream in consecutive segments, each starting from the memory of the one before.

    For fast weights carried over and Transformer-XL; a model without memory sees each segment by
    itself. The last, shorter segment is included. A chain of segments cannot be batched:
    `batch_size` counts only with `split_stream`, which cuts the stream into so many equal rows
    without the remainder, as the official evaluator does.

    Raises:
        UserError: a stream too short to score, a segment below 1.
    """
    return _finish(
        _carry(
            model,
            variables,
            tokens,
            segment=segment,
            batch_size=batch_size,
            split_stream=split_stream,
        )
    )


def _carry(
    model: LanguageModel,
    variables: Any,
    tokens: Any,
    *,
    segment: int,
    batch_size: int,
    split_stream: bool,
    done: Partial | None = None,
) -> Iterator[Partial]:
    """`carry_over` segment by segment, after what is done already."""
    if segment < 1:
        raise UserError(f"segment must be at least 1 token, got {segment}.")
    columns = _columns(tokens, batch_size, split_stream)
    n_row, last = columns.shape[0], columns.shape[1] - 1
    step = jax.jit(lambda variables, x, y, memory: model.apply(variables, x, y, memory))
    empty = empty_memory(model.config, n_row)
    partial = done or Partial(Score(0.0, 0), n_row * last, 0, empty)
    for start in range(partial.position, last, segment):
        end = min(start + segment, last)
        x, y = jnp.asarray(columns[:, start:end]), jnp.asarray(columns[:, start + 1 : end + 1])
        nll, memory = step(variables, x, y, partial.memory)
        partial = partial.add(np.asarray(nll), end, memory)
        yield partial


# --- a run's splits -------------------------------------------------------------------------------


def _save_partial(path: Path, key: dict, partial: Partial) -> None:
    """Arrays without pickle; replaced at once, so that a kill leaves the old or the new one."""
    leaves = jax.tree.leaves(partial.memory)
    # bfloat16 is no dtype of the file format; float32 holds it exactly.
    memory = {f"memory_{i}": np.asarray(leaf, np.float32) for i, leaf in enumerate(leaves)}
    numbers = {
        "total_nll": np.float64(partial.score.total_nll),
        "count": partial.score.count,
        "expected": partial.expected,
        "position": partial.position,
    }
    new = path.with_suffix(".new.npz")
    arrays: dict[str, Any] = {"key": json.dumps(key), **numbers, **memory}
    np.savez(new, **arrays)
    os.replace(new, path)


def _load_partial(path: Path, key: dict, memory: Any) -> Partial | None:
    """What an interrupted evaluation with the same settings left, if there is one."""
    if not path.exists():
        return None
    leaves, structure = jax.tree.flatten(memory)
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = dict(file)
        if json.loads(str(saved["key"])) != key:
            return None
        leaves = [jnp.asarray(saved[f"memory_{i}"], x.dtype) for i, x in enumerate(leaves)]
        score = Score(float(saved["total_nll"]), int(saved["count"]))
        expected, position = int(saved["expected"]), int(saved["position"])
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it to score from the start."
        ) from error
    return Partial(score, expected, position, jax.tree.unflatten(structure, leaves))


def reading(config: Any, n_token: int) -> tuple[ModelConfig, bool, int]:
    """How a run's model reads after training.

    Returns:
        Its config, whether it carries a memory, and the tokens of a segment, or else of a window.

    Raises:
        UserError: a setting of `config.eval` out of range, or without meaning for the model.
    """
    c = config
    for name in ("batch_size", "tgt_len", "mem_len", "clamp_len"):
        if c.eval[name] < 0:
            raise UserError(f"config.eval.{name} must be 0 or more, got {c.eval[name]}.")
    overrides = {k: c.eval[k] for k in ("mem_len", "clamp_len") if c.eval[k] > 0}
    model_config = build_config(c.model.to_dict() | overrides, n_token)
    carried = model_config.carries(c.train.carry_over_fast_weight)
    return model_config, carried, c.eval.tgt_len or c.train.tgt_len


def run(
    config: Any, workdir: Path, splits: Sequence[str], report: Callable[[str], None] = print
) -> list[dict] | None:
    """Score `splits` with the checkpoints `config.eval.checkpoint` of `workdir`.

    Writes `<split>_results.json` there; of several checkpoints `<split>_results_<step>.json`.
    Totals are saved every minute: an evaluation that was killed or interrupted (None is returned
    then) goes on from there, to exactly the same total.

    Raises:
        UserError: no run in workdir, no such checkpoint, no text for the split.
    """
    names = config.eval.checkpoint.split(",")
    for which in names:
        if which not in ("best", "latest") and not which.isdecimal():
            raise UserError(
                f"config.eval.checkpoint={which!r}: expected best, latest or a step, or several "
                "with commas between them."
            )
    results = []
    for split in splits:
        for which in names:
            result = _run_one(config, workdir, split, which, len(names) > 1, report)
            if result is None:
                return None
            results.append(result)
    return results


def _run_one(
    config: Any, workdir: Path, split: str, which: str, several: bool, report: Callable[[str], None]
) -> dict | None:
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
    model_config, carried, length = reading(c, len(vocab))
    wanted: Any = int(which) if which.isdecimal() else which
    with Checkpoints(workdir / "checkpoints", report=report) as checkpoints:
        step, variables = checkpoints.restore_subtree(("params", "favor"), wanted)
    variables = {"params": variables["params"], **(variables["favor"] or {})}

    model, stream = LanguageModel(model_config), corpus.streams[split]
    rows = max(c.eval.batch_size, 1) if c.eval.split_stream else 1
    score_by = functools.partial(
        _carry if carried else _slide,
        model,
        variables,
        stream,
        batch_size=c.eval.batch_size,
        split_stream=c.eval.split_stream,
    )
    if carried:
        score_by = functools.partial(score_by, segment=length)
    else:
        score_by = functools.partial(score_by, window=length, stride=c.eval.stride)

    started = time.monotonic()
    path = workdir / f"{split}_partial.npz"
    key = {"step": step, "length": length, "data": c.data.name, "devices": jax.local_device_count()}
    key |= {"dtype": c.model.dtype, "text": zlib.crc32(stream.tobytes()), **c.eval.to_dict()}
    done = _load_partial(path, key, empty_memory(model_config, rows) if carried else None)
    if done is not None:
        report(f"{split}: going on after {done.score.count} of {done.expected} tokens.")
    unit = "tokens" if carried else "windows"
    score = _watched(score_by(done=done), done, path, key, split, unit, report)
    if score is None:
        return None
    path.unlink(missing_ok=True)
    results = {
        "split": split,
        "protocol": "carry_over" if carried else "sliding_window",
        "window": length,
        "stride": None if carried else c.eval.stride,
        "mem_len": model_config.mem_len,
        "clamp_len": model_config.clamp_len,
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
    path = workdir / f"{split}_results{f'_{step}' if several else ''}.json"
    write_json(path, results)
    unit = "character" if corpus.unit == "character" else "token"
    report(
        f"{split}: perplexity {score.perplexity:.3f}, {score.bits_per_token:.4f} bits per {unit} "
        f"over {score.count} tokens, checkpoint of step {step}, {results['seconds']:.1f} s; {path}"
    )
    return results


def _watched(
    partials: Iterator[Partial],
    done: Partial | None,
    path: Path,
    key: dict,
    split: str,
    unit: str,
    report: Any,
) -> Score | None:
    """The score at the end; reports every ten seconds, saves every minute, None after Ctrl-C."""
    started = said = saved = time.monotonic()
    before = done.position if done else 0
    partial = done
    try:
        for partial in partials:
            now = time.monotonic()
            score = partial.score
            if now - saved >= 60.0:
                saved = now
                _save_partial(path, key, partial)
            if now - said >= 10.0:
                said = now
                speed = (partial.position - before) / (now - started)
                share = score.count / partial.expected
                left = partial.position * (1 / share - 1) / speed
                report(
                    f"{split}: {score.count} of {partial.expected} tokens, {speed:.1f} {unit}/s, "
                    f"perplexity so far {score.perplexity:.2f}, {left:.0f} s left"
                )
    except KeyboardInterrupt:
        if partial is not None:
            _save_partial(path, key, partial)
            score = partial.score
            report(
                f"{split}: interrupted; PARTIAL perplexity {score.perplexity:.3f} over the first "
                f"{score.count} of {partial.expected} tokens; the same command goes on from here."
            )
        return None
    return _finish(iter([partial])) if partial is not None else None
