"""Batches as pure functions of the step: equal rows, consecutive segments of tgt_len."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int32

from fwm.errors import UserError

ALL_ROWS = slice(None)


def segments_per_epoch(stream_len: int, batch_size: int, tgt_len: int) -> int:
    """How many segments of tgt_len fit into a row, S = (stream_len // B - 1) // T.

    Raises:
      UserError: not one fits.
    """
    segments = (stream_len // batch_size - 1) // tgt_len
    if segments < 1:
        raise UserError(
            f"The training text has {stream_len} tokens, but batch_size {batch_size} rows of"
            f" tgt_len {tgt_len} need at least {batch_size * (tgt_len + 1)}; make batch_size or"
            " tgt_len smaller or the text longer."
        )
    return segments


def train_batch(
    stream: Int32[np.ndarray, "S"],
    step: int,
    batch_size: int,
    tgt_len: int,
    rows: slice = ALL_ROWS,
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"], bool]:
    """Return the tokens, targets and `first` of a step, a pure function of the step.

    The stream is trimmed to batch_size equal rows, one below the other; step s takes segment
    s mod segments_per_epoch of every row, targets one position later. `first` says that an epoch
    begins: a carried memory must be reset. `rows` reads only some rows (one process of several).

    Raises:
      UserError: the stream is shorter than one segment.
    """
    segments = segments_per_epoch(len(stream), batch_size, tgt_len)
    length = len(stream) // batch_size
    start = step % segments * tgt_len
    table = stream[: batch_size * length].reshape(batch_size, length)
    block = np.array(table[rows, start : start + tgt_len + 1], np.int32)
    return block[:, :-1], block[:, 1:], start == 0


def eval_segments(
    stream: Int32[np.ndarray, "S"], batch_size: int, tgt_len: int, rows: slice = ALL_ROWS
) -> Iterator[tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]]:
    """Yield (tokens, targets, mask) that score every target of the stream exactly once.

    The S - 1 targets are dealt to batch_size rows whose lengths differ by at most one; every row is
    read in consecutive segments. All yields have one shape: past a row's end all is 0, mask False.
    `rows` reads only some rows (one process of several).
    """
    borders = (len(stream) - 1) * np.arange(batch_size + 1) // batch_size
    for start in range(0, int(np.diff(borders).max()), tgt_len):
        position = borders[:-1][rows, None] + np.arange(start, start + tgt_len)[None, :]
        mask = position < borders[1:][rows, None]
        position = np.where(mask, position, 0)
        tokens = np.where(mask, stream[position], 0).astype(np.int32)
        targets = np.where(mask, stream[position + 1], 0).astype(np.int32)
        yield tokens, targets, mask


class ShuffledSentences:
    """A stream whose sentences, each ended by `<eos>`, come in another order in every epoch."""

    def __init__(self, stream: np.ndarray, eos_id: int):
        self._stream = stream
        ends = np.flatnonzero(stream == eos_id) + 1
        self._starts = np.concatenate([[0], ends[:-1]])
        self._lengths = ends - self._starts
        self._tokens = int(ends[-1])
        self._epoch: tuple[int, int] | None = None

    def _shuffle(self, seed: int, epoch: int) -> None:
        # Only one epoch is kept: its order is as large as the list of sentences.
        if self._epoch != (seed, epoch):
            order = np.random.default_rng((seed, epoch)).permutation(len(self._starts))
            self._sources = self._starts[order]
            self._borders = np.concatenate([[0], np.cumsum(self._lengths[order])])
            self._epoch = (seed, epoch)

    def train_batch(
        self, step: int, batch_size: int, tgt_len: int, seed: int, rows: slice = ALL_ROWS
    ) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"], bool]:
        """Do what `train_batch` does, on the stream in the order of (seed, epoch)."""
        epoch, segment = divmod(step, segments_per_epoch(self._tokens, batch_size, tgt_len))
        self._shuffle(seed, epoch)
        length = self._tokens // batch_size
        start = np.arange(batch_size)[rows] * length + segment * tgt_len
        # All pairs of a row and a sentence that touches it, and the tokens that each pair gives.
        first = np.searchsorted(self._borders, start, side="right") - 1
        touched = np.searchsorted(self._borders, start + tgt_len, side="right") - first
        sentence = np.repeat(first, touched) + _count_up(touched)
        row_start = np.repeat(start, touched)
        begin = np.maximum(self._borders[sentence], row_start)
        stop = np.minimum(self._borders[sentence + 1], row_start + tgt_len + 1)
        source = self._sources[sentence] + begin - self._borders[sentence]
        positions = np.repeat(source, stop - begin) + _count_up(stop - begin)
        block = np.array(self._stream[positions], np.int32).reshape(len(start), tgt_len + 1)
        return block[:, :-1], block[:, 1:], segment == 0


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ..., n - 1 for every n of lengths, one after the other."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
