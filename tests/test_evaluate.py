"""Exact perplexity against plain loops: one window, or one segment, at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fwm import evaluate
from fwm.errors import UserError
from fwm.evaluate import Score, automatic_batch_size, carry_over, sliding_window
from fwm.model import LanguageModel, ModelConfig

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
    whole = dict(batch_size=4, split_stream=False)
    for score_by, options in (
        (evaluate._slide, dict(window=WINDOW, stride=2)),
        (evaluate._carry, dict(segment=WINDOW)),
    ):
        partials = list(score_by(model, variables, STREAM, **whole, **options))
        assert len(partials) > 2
        rest = list(score_by(model, variables, STREAM, **whole, **options, done=partials[1]))
        assert [p.score for p in rest] == [p.score for p in partials[2:]]


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


def test_progress_says_speed_perplexity_and_time_left(monkeypatch, tmp_path):
    clock = iter(range(0, 1000, 20))  # every look at the clock is 20 s later
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    partials = [
        evaluate.Partial(evaluate.Score(20.0, 10), 40, 10),
        evaluate.Partial(evaluate.Score(80.0, 40), 40, 40),
    ]
    lines = []
    path = tmp_path / "valid_partial.npz"
    score = evaluate._watched(iter(partials), None, path, {}, "valid", "windows", lines.append)
    assert (score.total_nll, score.count) == (80.0, 40)
    assert lines[0] == ("valid: 10 of 40 tokens, 0.5 windows/s, perplexity so far 7.39, 60 s left")
