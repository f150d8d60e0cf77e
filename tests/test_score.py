"""Exact perplexity against plain loops: one window, or one segment, at a time."""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fwm.errors import UserError
from fwm.model import LanguageModel, ModelConfig, empty_memory
from fwm.score import (
    Batches,
    CarryOver,
    Score,
    SlidingWindow,
    automatic_batch_size,
    carry_over,
    finish,
    sliding_window,
)

# Every call compiles its step anew; most of them are the same program.

WINDOW, LENGTH = 6, 24
SIZES = dict(n_token=30, d_model=16, n_head=2, d_head=4, d_inner=32, n_layer=2)
STREAM = np.random.default_rng(1).integers(0, 30, LENGTH).astype(np.int32)


def make(**fields):
    model = LanguageModel(ModelConfig(**SIZES | fields))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *[jnp.zeros((1, 1), jnp.int32)] * 2)
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32)
    return model, jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def delta():
    """A model, its variables, and a function that scores windows one at a time."""
    model, variables = make(feature_map="elu")
    nll = jax.jit(lambda x, y: model.apply(variables, x, y)[0])

    def loop(stream, window, stride):
        """The definition: every window by itself, the new positions of each summed up."""
        last = len(stream) - 1
        window = min(window, last)
        total = count = 0
        done, end = 0, window
        while True:
            cut = slice(end - window, end)
            targets = stream[cut.start + 1 : cut.stop + 1]
            scores = np.asarray(nll(stream[None, cut], targets[None]), np.float64)[0]
            total, count = total + scores[window - (end - done) :].sum(), count + end - done
            done = end
            if done == last:
                return total, count
            end = min(end + stride, last)

    return model, variables, loop


def agrees(score, expected):
    total, count = expected
    assert score.count == count
    assert score.total_nll == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_batch_size_equals_one_window_at_a_time(delta, batch_size):
    model, variables, loop = delta
    score = sliding_window(model, variables, STREAM, window=WINDOW, batch_size=batch_size)
    agrees(score, loop(STREAM, WINDOW, 1))
    assert score.count == LENGTH - 1


def test_one_device_gives_the_same(delta, monkeypatch):
    model, variables, loop = delta
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    score = sliding_window(model, variables, STREAM, window=WINDOW, batch_size=7)
    agrees(score, loop(STREAM, WINDOW, 1))


@pytest.mark.parametrize(("stride", "batch_size"), [(4, 3)])
def test_strides(delta, stride, batch_size):
    model, variables, loop = delta
    options = dict(window=WINDOW, stride=stride, batch_size=batch_size)
    agrees(sliding_window(model, variables, STREAM, **options), loop(STREAM, WINDOW, stride))


@pytest.mark.parametrize("length", [2, WINDOW + 1])
def test_a_stream_that_fits_one_window(delta, length):
    model, variables, loop = delta
    score = sliding_window(model, variables, STREAM[:length], window=WINDOW, batch_size=4)
    agrees(score, loop(STREAM[:length], WINDOW, 1))
    assert score.count == length - 1


@pytest.mark.parametrize(
    "fields",
    [
        dict(feature_map="elu", no_pos=True, attn_normalization="output_and_key"),
        dict(mixer="transformer_xl", mem_len=LENGTH),
    ],
)
def test_carry_over_equals_one_long_call(fields):
    model, variables = make(**fields)
    nll, _ = jax.jit(model.apply)(variables, STREAM[None, :-1], STREAM[None, 1:])
    score = carry_over(model, variables, STREAM, segment=9)
    agrees(score, (np.asarray(nll, np.float64).sum(), LENGTH - 1))


def test_taken_up_again_anywhere_gives_the_same_total(delta):
    model, variables, _ = delta
    for protocol in (
        SlidingWindow(model, variables, STREAM, WINDOW, batch_size=4, stride=2),
        CarryOver(model, variables, STREAM, WINDOW),
        Batches(Counting(), model, variables, "test", empty_memory(model.config, 3)),
    ):
        partials = list(protocol.partials())
        assert len(partials) > 2
        whole = finish(partials)
        for i in (1, len(partials) - 1):
            rest = list(protocol.partials(partials[i]))
            after = partials[i + 1 :]
            assert [(p.score, p.sums) for p in rest] == [(p.score, p.sums) for p in after]
            assert finish([partials[i], *rest]) == whole


def test_what_cannot_be_scored(delta):
    model, variables, _ = delta
    for function, options, message in [
        (sliding_window, dict(window=0), "window must be at least 1 token, got 0"),
        (sliding_window, dict(window=6, stride=0), "between 1 and the window of 6, got 0"),
        (sliding_window, dict(window=6, stride=7), "between 1 and the window of 6, got 7"),
        (sliding_window, dict(window=6, batch_size=13, split_stream=True), "24 tokens: too few"),
        (sliding_window, dict(window=6, split_stream=True), "needs batch_size"),
        (carry_over, dict(segment=0), "segment must be at least 1 token, got 0"),
        (carry_over, dict(segment=6, batch_size=13, split_stream=True), "24 tokens: too few"),
    ]:
        with pytest.raises(UserError, match=message):
            function(model, variables, STREAM, **options)
    for function, options in ((sliding_window, dict(window=6)), (carry_over, dict(segment=6))):
        for stream in (STREAM[:0], STREAM[:1]):
            with pytest.raises(UserError, match=f"{len(stream)} tokens: too few"):
                function(model, variables, stream, **options)


def test_a_protocol_says_what_it_scores(delta):
    model, variables, _ = delta
    slide = SlidingWindow(model, variables, STREAM, WINDOW, stride=2)
    carry = CarryOver(model, variables, jnp.asarray(STREAM), WINDOW, 2, split_stream=True)
    assert slide.key() == carry.key() == {"length": WINDOW, "text": zlib.crc32(STREAM.tobytes())}
    assert slide.key() != SlidingWindow(model, variables, STREAM[1:], WINDOW).key()
    assert (slide.settings(), carry.settings()) == (
        {"window": WINDOW, "stride": 2}, {"window": WINDOW, "stride": None}
    )  # fmt: skip
    assert slide.empty() is None
    assert {len(leaf) for leaf in jax.tree.leaves(carry.empty())} == {2}
    batches = Batches(Counting(), model, variables, "test")
    assert batches.key() == Batches(Counting(), model, variables, "test").key()
    assert batches.key() != Batches(Counting(), model, variables, "valid").key()
    assert batches.settings() == {"window": None, "stride": None}
    assert batches.empty() is None


# --- a task's batches -----------------------------------------------------------------------------


class Batch(NamedTuple):
    tokens: Any
    targets: Any
    first: Any
    rows: Any
    mask: Any = None


@dataclasses.dataclass(frozen=True)
class Counting:
    """A task of four batches with and without a mask; all rows begin anew at the third."""

    n_batch: int = 4
    extra: int = 0

    def batches(self, split, rows):
        rng = np.random.default_rng(len(split))
        for i in range(self.n_batch):
            tokens = rng.integers(0, 30, (3, 6)).astype(np.int32)
            mask = None if i % 2 else rng.random((3, 5)) < 0.5
            yield Batch(
                *(x[rows] for x in (tokens[:, :-1], tokens[:, 1:])),
                np.full(3, i == 2)[rows], np.arange(3, dtype=np.int32)[rows], mask,
            )  # fmt: skip

    def score(self, model, variables, batch, memory):
        carried = memory is not None
        anew = lambda x: jnp.where(batch.first.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros(()), x)
        memory = jax.tree.map(anew, memory)
        nll, memory = model.apply(variables, batch.tokens, batch.targets, memory)
        mask = jnp.ones(nll.shape, bool) if batch.mask is None else batch.mask
        good = mask & (nll < 3.0)
        number = lambda x: jnp.sum(x, dtype=jnp.float32)
        sums = {"nll": number(nll * mask.astype(nll.dtype)), "count": number(mask) + self.extra}
        return sums | {"good": number(good)}, memory if carried else None


@pytest.mark.parametrize("carried", [False, True])
def test_batches_are_summed_up_by_the_task(delta, carried):
    model, variables, _ = delta
    total, count, good, memory = 0.0, 0, 0, None
    apply = jax.jit(model.apply)
    for i, batch in enumerate(Counting().batches("test", slice(None))):
        if not carried or i == 2:
            memory = None
        nll, memory = apply(variables, batch.tokens, batch.targets, memory)
        counted = np.asarray(nll, np.float64)[... if batch.mask is None else batch.mask]
        total, count, good = total + counted.sum(), count + counted.size, good + (counted < 3).sum()
    empty = empty_memory(model.config, 3) if carried else None
    *_, last = Batches(Counting(), model, variables, "test", empty).partials()
    agrees(finish([last]), (total, count))
    assert last.sums == {"good": good}
    assert 0 < good < count


def test_batches_that_cannot_be_scored(delta):
    model, variables, _ = delta
    for task, message in [
        (Counting(n_batch=0), "nothing to score in its batches of the test split"),
        (Counting(extra=1), r"counts \d+ positions of a batch whose mask has \d+"),
    ]:
        with pytest.raises(UserError, match=message):
            finish(Batches(task, model, variables, "test").partials())


# --- numbers --------------------------------------------------------------------------------------


def test_score():
    score = Score(total_nll=20.0, count=10)
    assert score.mean_nll == 2.0
    assert score.perplexity == pytest.approx(7.38905609893065)
    assert score.bits_per_token == pytest.approx(2 / 0.6931471805599453)


def test_automatic_batch_size_falls_with_the_size_of_a_window():
    config = ModelConfig(**SIZES)
    sizes = [automatic_batch_size(config, window) for window in (1, 256, 4096, 10**9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 512
    assert sizes[-1] == 1
