"""Exact scores: protocols, which are values that yield partial scores batch by batch.

A protocol says how a trained model is scored: with the paper's sliding window, in consecutive
segments with memory, or over the fixed batches of a task. Each keeps the sum and the count of what
it scores, in float64 on the host, divides once, and can be taken up again after any of its partial
scores with exactly the same total. Every token of a stream after the first is scored exactly once.
"""

import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fwm import parallel
from fwm.errors import UserError
from fwm.model import LanguageModel, ModelConfig, empty_memory
from fwm.ops.checks import checked_ids
from fwm.perplexity import perplexity
from fwm.registry import remembered

Stream = Int[np.ndarray, " S"] | Int[Array, " S"]


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
        """exp(mean nll); infinity where no float is that large."""
        return perplexity(self.mean_nll)

    @property
    def bits_per_token(self) -> float:
        """Bits per token, which are bits per character for a character-level corpus."""
        return self.mean_nll / math.log(2)


@dataclasses.dataclass(frozen=True)
class Partial:
    """How far a scoring has come; from here it can be taken up again, with the same total."""

    score: Score
    expected: int  # positions there are to score
    position: int = 0  # windows, tokens of each row, or batches done
    memory: Any = None  # what the next segment starts from
    # Of what else a task scores, by name.
    sums: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def add(self, sums: Mapping[str, Any], position: int, memory: Any = None) -> "Partial":
        """With the sums over more positions: `nll`, `count`, and what else a task scores."""
        new = {name: float(value) for name, value in sums.items()}
        total = self.score.total_nll + new.pop("nll")
        score = Score(total, self.score.count + int(new.pop("count")))
        others = {name: self.sums.get(name, 0.0) + value for name, value in new.items()}
        return Partial(score, self.expected, position, memory, others)


@runtime_checkable
class ScoringProtocol(Protocol):
    """What `SlidingWindow`, `CarryOver` and `Batches` have in common."""

    name: str
    unit: str  # what `Partial.position` counts

    def key(self) -> dict[str, Any]:
        """What must be the same, as JSON has it, for a partial score to be taken up again."""

    def settings(self) -> dict[str, Any]:
        """`window` and `stride` as results name them, None where there is none."""
        return {"window": None, "stride": None}

    def empty(self) -> Any:
        """The memory before the first token, None where none is carried."""
        return None

    def partials(self, done: Partial | None = None) -> Iterator[Partial]:
        """Partial scores up to the whole one, after what is `done` already."""


def finish(partials: Iterable[Partial]) -> Score:
    """The score of the last one, which has counted every position there is."""
    for partial in partials:
        last = partial
    if last.score.count != last.expected:
        raise AssertionError(f"scored {last.score.count} positions, not {last.expected}")
    return last.score


def _columns(tokens: Any, model: LanguageModel, batch_size: int, split_stream: bool) -> np.ndarray:
    """The stream as [rows, tokens]: one row, or `batch_size` equal ones without the remainder."""
    tokens = checked_ids("the text", tokens, model.config.n_token)
    rows = batch_size if split_stream else 1
    if rows < 1:
        raise UserError("split_stream needs batch_size, the number of rows: set it to 1 or more.")
    if len(tokens) < 2 * rows:
        raise UserError(f"the text has {len(tokens)} tokens: too few to score {rows} rows of it.")
    return tokens[: len(tokens) // rows * rows].reshape(rows, -1)


def _sums(nll: np.ndarray) -> dict[str, Any]:
    return {"nll": nll.sum(dtype=np.float64), "count": nll.size}


def _ids(segment_ids: Any, tokens: Any, columns: np.ndarray) -> np.ndarray | None:
    """The documents of the tokens in `columns`."""
    if segment_ids is None:
        return None
    ids = np.asarray(segment_ids)
    if ids.shape != np.shape(tokens) or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"segment_ids must be one integer for each token of the text, {np.shape(tokens)}, got "
            f"{ids.dtype} of shape {ids.shape}."
        )
    return ids[: columns.size].reshape(columns.shape).astype(np.int32, copy=False)


def _stream_key(tokens: Any, length: int, segment_ids: Any) -> dict[str, Any]:
    key = {"length": length, "text": zlib.crc32(np.asarray(tokens, np.int32).tobytes())}
    if segment_ids is not None:
        key["documents"] = zlib.crc32(np.asarray(segment_ids, np.int32).tobytes())
    return key


@remembered
def _window_step(model: LanguageModel, window: int, scored: int) -> Callable:
    """On all devices; compiled once however often a model is scored."""

    def nll(
        variables: Any,
        stream: Int[Array, "R S"],
        documents: Int[Array, "R S"] | None,
        rows: Int[Array, " B"],
        ends: Int[Array, " B"],
    ) -> Float[Array, "B scored"]:
        """Of tokens `end - scored + 1 ... end` of a row, each window seeing `window` inputs."""

        def cut(of: Array, start: Array, size: int) -> Array:
            one = lambda row, start: jax.lax.dynamic_slice(of, (row, start), (1, size))[0]
            return jax.vmap(one)(rows, start)

        tokens, targets = cut(stream, ends - window, window), cut(stream, ends - scored + 1, scored)
        ids = None if documents is None else cut(documents, ends - window, window)
        return model.apply(variables, tokens, targets, segment_ids=ids)[0]

    return parallel.pmap(nll)


def _in_batches(
    step: Callable, rows: np.ndarray, ends: np.ndarray, per_call: int, begin: int
) -> Iterator[np.ndarray]:
    """nll [b, scored] of the windows from `begin` on; `step` takes those of all devices at once."""
    n_device = len(jax.local_devices())
    # Of all windows and not of those left: taken up again, the same program scores the rest.
    size = min(per_call, -(-len(rows) // n_device) * n_device)
    pending, count = None, 0
    for start in range(begin, len(rows) + size, size):
        ready, n_ready, pending = pending, count, None
        if start < len(rows):
            # The last batch is filled up with repeats, which are not counted.
            ids = np.minimum(np.arange(start, start + size), len(rows) - 1)
            count = min(size, len(rows) - start)
            pending = step(*parallel.split((rows[ids], ends[ids])))
        # The next batch is on its way while the host adds up this one.
        if ready is not None:
            nll = np.asarray(ready)
            yield nll.reshape(-1, nll.shape[-1])[:n_ready]


def automatic_batch_size(config: ModelConfig, window: int) -> int:
    """Windows at once on one device: as many as a quarter of its memory holds, at most 512.

    What a window needs at its peak is the inner activation of a feed-forward part, the
    projections of a mixer, and softmax scores where there are any, in float32.
    """
    mixer = max(mixer.floats_per_token(window) for mixer in config.make_mixers())
    floats = window * (2 * config.d_inner + 8 * config.d_model + mixer)
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        # A CPU tells no limit. Measured at `small`: 8 windows of 256 tokens are faster than 4,
        # whose matmuls are short, and than 16, which do not fit the caches.
        return max(1, min(512, 2048 // window))
    return max(1, min(512, stats["bytes_limit"] // 4 // (4 * floats)))


@dataclasses.dataclass(frozen=True, eq=False)
class SlidingWindow(ScoringProtocol):
    """The protocol of `sliding_window`, which says what its fields mean and what is refused."""

    model: LanguageModel
    variables: Any
    tokens: Stream
    window: int
    batch_size: int = 0
    stride: int = 1
    split_stream: bool = False
    segment_ids: Stream | None = None

    name = "sliding_window"
    unit = "windows"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"window must be at least 1 token, got {self.window}.")
        if not 1 <= self.stride <= self.window:
            raise UserError(
                f"stride must lie between 1 and the window of {self.window}, got {self.stride}."
            )
        columns = _columns(self.tokens, self.model, self.batch_size, self.split_stream)
        _ids(self.segment_ids, self.tokens, columns)

    def key(self) -> dict[str, Any]:
        """The window and the text."""
        return _stream_key(self.tokens, self.window, self.segment_ids)

    def settings(self) -> dict[str, Any]:
        """The window and the stride."""
        return {"window": self.window, "stride": self.stride}

    def partials(self, done: Partial | None = None) -> Iterator[Partial]:
        """A partial score after every batch of windows; the first ones of all rows count as one."""
        columns = _columns(self.tokens, self.model, self.batch_size, self.split_stream)
        n_row, last = columns.shape[0], columns.shape[1] - 1
        window = min(self.window, last)
        documents = _ids(self.segment_ids, self.tokens, columns)
        on_devices = parallel.replicate((self.variables, columns, documents))
        n_device = len(jax.local_devices())
        size = self.batch_size or n_device * automatic_batch_size(self.model.config, window)
        per_call = max(1, size // n_device) * n_device
        partial = done or Partial(Score(0.0, 0), n_row * last)

        def nll(rows: np.ndarray, ends: np.ndarray, scored: int, begin: int) -> Iterator:
            step = functools.partial(_window_step(self.model, window, scored), *on_devices)
            return _in_batches(step, rows, ends, per_call, begin)

        # First the windows that score all their positions, one of each row, then all others.
        if partial.position == 0:
            for new in nll(np.arange(n_row), np.full(n_row, window), window, 0):
                partial = partial.add(_sums(new), partial.position + len(new))
            yield partial
        ends = np.minimum(np.arange(window, last, self.stride) + self.stride, last)
        if len(ends) == 0:
            return
        # Only the last window of a row may score fewer positions than the stride.
        fresh = np.tile(np.diff(ends, prepend=window), n_row)
        rows, ends = np.repeat(np.arange(n_row), len(ends)), np.tile(ends, n_row)
        begin = partial.position - n_row
        for new in nll(rows, ends, self.stride, begin):
            n_fresh = fresh[begin : begin + len(new), None]
            counted = np.arange(self.stride)[None, :] >= self.stride - n_fresh
            begin += len(new)
            partial = partial.add(_sums(new[counted]), n_row + begin)
            yield partial


def sliding_window(
    model: LanguageModel, variables: Any, tokens: Stream, *, window: int, **options: Any
) -> Score:
    """Score a stream with a window of `window` inputs (paper section 6.3).

    The score is the sum of -log p(token | the at most `window` tokens before it in its window)
    over every token but the first. The first window scores all its positions, every later one
    moves by `stride` and scores its last `stride` positions. Windows are independent, so
    `batch_size` only changes the speed.

    Args:
        model: a `LanguageModel`; any memory it would carry is not used.
        variables: its variables.
        tokens: one stream of ids.
        window: inputs per window; a shorter stream is one shorter window.
        options: `batch_size`, windows at once over all devices, 0 (the default) chooses it from
            their memory; `stride`, by default 1, the paper's protocol: larger ones give most
            positions less context and cost so many times less; `split_stream`, by default False,
            the official evaluator at batch_size > 1: the stream is cut into so many equal rows,
            each with a first window of its own, and the remainder is not scored; `segment_ids`,
            the document of each token: a token then sees those of its own only. None: all are one.

    Raises:
        UserError: a stream too short to score, a window below 1, a stride outside 1..window.
    """
    return finish(SlidingWindow(model, variables, tokens, window, **options).partials())


@remembered
def _segment_step(model: LanguageModel) -> Callable:
    """One segment of every row, compiled once however often a model is scored."""
    return jax.jit(
        lambda variables, x, y, memory, ids: model.apply(variables, x, y, memory, segment_ids=ids)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class CarryOver(ScoringProtocol):
    """The protocol of `carry_over`, which says what its fields mean and what is refused."""

    model: LanguageModel
    variables: Any
    tokens: Stream
    segment: int
    batch_size: int = 1
    split_stream: bool = False
    segment_ids: Stream | None = None

    name = "carry_over"
    unit = "tokens"

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise UserError(f"segment must be at least 1 token, got {self.segment}.")
        columns = _columns(self.tokens, self.model, self.batch_size, self.split_stream)
        _ids(self.segment_ids, self.tokens, columns)

    def key(self) -> dict[str, Any]:
        """The segment and the text."""
        return _stream_key(self.tokens, self.segment, self.segment_ids)

    def settings(self) -> dict[str, Any]:
        """The segment, which results call a window; there is no stride."""
        return {"window": self.segment, "stride": None}

    def empty(self) -> Any:
        """The memory before the first token of every row."""
        return empty_memory(self.model.config, self.batch_size if self.split_stream else 1)

    def partials(self, done: Partial | None = None) -> Iterator[Partial]:
        """A partial score after every segment."""
        columns = _columns(self.tokens, self.model, self.batch_size, self.split_stream)
        n_row, last = columns.shape[0], columns.shape[1] - 1
        step, variables = _segment_step(self.model), jax.device_put(self.variables)
        documents = _ids(self.segment_ids, self.tokens, columns)
        partial = done or Partial(Score(0.0, 0), n_row * last, 0, self.empty())
        for start in range(partial.position, last, self.segment):
            end = min(start + self.segment, last)
            x, y = jnp.asarray(columns[:, start:end]), jnp.asarray(columns[:, start + 1 : end + 1])
            ids = None
            if documents is not None:  # 0: that of the token before, and of the memory
                ids = jnp.asarray(documents[:, start:end] - documents[:, max(start - 1, 0), None])
            nll, memory = step(variables, x, y, partial.memory, ids)
            partial = partial.add(_sums(np.asarray(nll)), end, memory)
            yield partial


def carry_over(
    model: LanguageModel, variables: Any, tokens: Stream, *, segment: int, **options: Any
) -> Score:
    """Score a stream in consecutive segments, each starting from the memory of the one before.

    The score is the sum of -log p(token | its segment so far, memory) over every token but the
    first. For fast weights carried over and Transformer-XL; a model without memory sees each
    segment by itself. The last, shorter segment is included.

    Args:
        model: a `LanguageModel`.
        variables: its variables.
        tokens: one stream of ids.
        segment: tokens that are read at once.
        options: `split_stream`, by default False: cut the stream into `batch_size` (by default 1)
            equal rows without the remainder, as the official evaluator does; without it
            `batch_size` does not count, as a chain of segments cannot be batched; `segment_ids`,
            as of `sliding_window`.

    Raises:
        UserError: a stream too short to score, a segment below 1.
    """
    return finish(CarryOver(model, variables, tokens, segment, **options).partials())


def _counted(batch: Any) -> int:
    return batch.tokens.size if batch.mask is None else int(np.sum(batch.mask))


@dataclasses.dataclass(frozen=True, eq=False)
class Batches(ScoringProtocol):
    """Sums of a task's own score over the batches of a split, which are a fixed set.

    Fields:
        task: `task.batches(split, rows)` yields batches, of which `mask` says what counts, and
            `task.score(model, variables, batch, memory) -> (sums, memory)` scores one: `nll` and
            `count`, and any others, which `task.metrics` makes use of.
        memory: what the first batch starts from, if `task.score` shall carry it from batch to
            batch; None: every batch is scored by itself.

    Raises:
        UserError: (while scoring) the split has nothing to score, or a batch's score counts other
            positions than its mask.
    """

    task: Any
    model: LanguageModel
    variables: Any
    split: str
    memory: Any = None

    name = "batches"
    unit = "batches"

    def key(self) -> dict[str, Any]:
        """The protocol and the batches."""
        return {"protocol": self.name, "text": self._whole[1]}

    def empty(self) -> Any:
        """The memory before the first batch."""
        return self.memory

    def partials(self, done: Partial | None = None) -> Iterator[Partial]:
        """A partial score after every batch."""
        expected = self._whole[0]
        if expected == 0:
            raise UserError(
                f"the task has nothing to score in its batches of the {self.split} split."
            )
        step = jax.jit(functools.partial(self.task.score, self.model))
        variables = jax.device_put(self.variables)
        partial = done or Partial(Score(0.0, 0), expected, 0, self.memory)
        for batch in itertools.islice(
            self.task.batches(self.split, slice(None)), partial.position, None
        ):
            sums, memory = step(variables, batch, partial.memory)
            if int(sums["count"]) != _counted(batch):
                raise UserError(
                    f"the task's score counts {int(sums['count'])} positions of a batch whose mask "
                    f"has {_counted(batch)}: its `count` must be the sum of the mask."
                )
            partial = partial.add(sums, partial.position + 1, memory)
            yield partial

    @functools.cached_property
    def _whole(self) -> tuple[int, int]:
        """Positions that count in all batches, and a checksum of these."""
        count = checksum = 0
        for batch in self.task.batches(self.split, slice(None)):
            count += _counted(batch)
            for leaf in jax.tree.leaves(batch):
                checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
        return count, checksum
