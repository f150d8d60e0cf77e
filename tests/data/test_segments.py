"""Batches are pure functions of the step; every target is scored once."""

import numpy as np
import pytest

from fwm.data import eval_segments, segments_per_epoch, train_batch
from fwm.data.segments import ShuffledSentences
from fwm.errors import UserError


@pytest.mark.parametrize(("length", "rows", "tgt_len"), [(103, 4, 5), (11, 1, 10), (64, 3, 7)])
def test_train_batches_walk_down_equal_rows(length, rows, tgt_len):
    stream = np.arange(length, dtype=np.int32)
    table = stream[: length // rows * rows].reshape(rows, -1)
    segments = segments_per_epoch(length, rows, tgt_len)
    assert segments == (table.shape[1] - 1) // tgt_len
    for step in [*range(2 * segments), 1_000_003 * segments + 1]:
        tokens, targets, first = train_batch(stream, step, rows, tgt_len)
        at = step % segments * tgt_len
        np.testing.assert_array_equal(tokens, table[:, at : at + tgt_len])
        np.testing.assert_array_equal(targets, tokens + 1)
        assert tokens.dtype == targets.dtype == np.int32
        assert type(tokens) is np.ndarray
        assert first == (step % segments == 0)
        if rows > 1:
            part, _, _ = train_batch(stream, step, rows, tgt_len, slice(1, 3))
            np.testing.assert_array_equal(part, tokens[1:3])


def test_stream_shorter_than_a_segment_says_both_numbers():
    stream = np.zeros(43, np.int32)
    train_batch(stream[:33], 0, 3, 10)
    with pytest.raises(UserError, match=r"has 32 tokens.*need at least 33"):
        train_batch(stream[:32], 0, 3, 10)


@pytest.mark.parametrize(
    ("length", "rows", "tgt_len"), [(103, 4, 5), (2, 3, 4), (50, 1, 7), (9, 8, 3)]
)
def test_every_target_is_scored_exactly_once(length, rows, tgt_len):
    stream = np.arange(length, dtype=np.int32)
    scored = []
    for tokens, targets, mask in eval_segments(stream, rows, tgt_len):
        assert tokens.shape == targets.shape == mask.shape == (rows, tgt_len)
        np.testing.assert_array_equal(targets[mask], tokens[mask] + 1)
        assert not tokens[~mask].any()
        assert not targets[~mask].any()
        scored += targets[mask].tolist()
    assert sorted(scored) == list(range(1, length))


def test_eval_rows_are_consecutive_segments():
    rows = [[] for _ in range(3)]
    for tokens, _, mask in eval_segments(np.arange(100, dtype=np.int32), 3, 8):
        for row, ids, valid in zip(rows, tokens, mask, strict=True):
            row += ids[valid].tolist()
    assert [len(row) for row in rows] == [33, 33, 33]
    assert [i for row in rows for i in row] == list(range(99))


def sentences(rng, count):
    stream = []
    for i in range(count):
        stream += [1000 + i, *rng.integers(1, 9, size=rng.integers(0, 12)).tolist(), 0]
    return np.array(stream, np.int32)


def test_shuffled_sentences_stay_whole_and_change_with_seed_and_epoch():
    stream = sentences(np.random.default_rng(0), 50)
    shuffled = ShuffledSentences(stream, 0)
    whole = {tuple(s) for s in np.split(stream, np.flatnonzero(stream == 0) + 1)[:-1]}
    length = len(stream)
    orders = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        # One row and one segment as long as the epoch: the whole stream but for its last token.
        tokens, targets, first = shuffled.train_batch(epoch, 1, length - 1, seed)
        assert first
        read = np.append(tokens[0], targets[0, -1])
        np.testing.assert_array_equal(read[1:], targets[0])
        parts = np.split(read, np.flatnonzero(read == 0) + 1)[:-1]
        assert {tuple(s) for s in parts} == whole
        assert len(parts) == len(whole)
        orders.append(read.tolist())
        # Small segments read the same stream.
        segments = segments_per_epoch(length, 4, 7)
        row = length // 4
        for step in range(epoch * segments, (epoch + 1) * segments):
            small, _, first = shuffled.train_batch(step, 4, 7, seed)
            at = step % segments * 7
            assert first == (at == 0)
            np.testing.assert_array_equal(small, read[: 4 * row].reshape(4, row)[:, at : at + 7])
            some, _, _ = shuffled.train_batch(step, 4, 7, seed, slice(1, 3))
            np.testing.assert_array_equal(some, small[1:3])
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    again = ShuffledSentences(stream, 0).train_batch(1, 1, length - 1, 0)[0]
    assert again[0].tolist() == orders[1][:-1]
