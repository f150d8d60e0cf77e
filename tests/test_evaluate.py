"""A run's splits: what is said and kept on the way. The whole way is in test_main.py."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from fwm import evaluate, score
from fwm.errors import UserError
from fwm.evaluate import PartialFile
from fwm.score import Partial, Score

KEY = {"step": 4, "length": 8}


@dataclasses.dataclass
class Scripted:
    """A protocol with given partial scores, and Ctrl-C after them."""

    given: tuple = ()
    interrupted: bool = False

    name, unit = "scripted", "windows"
    key = settings = empty = lambda self: None

    def partials(self, done=None):
        yield from self.given
        if self.interrupted:
            raise KeyboardInterrupt


def test_progress_says_speed_perplexity_and_time_left(monkeypatch, tmp_path):
    clock = iter(range(0, 1000, 20))  # every look at the clock is 20 s later
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    partials = Partial(Score(20.0, 10), 40, 10), Partial(Score(80.0, 40), 40, 40)
    lines = []
    kept = PartialFile(tmp_path / "valid_partial.npz", {})
    last = evaluate._watched(Scripted(partials), None, kept, lines.append)
    assert last == partials[-1]
    assert lines[0] == "10 of 40 tokens, 0.5 windows/s, perplexity so far 7.39, 60 s left"
    assert not kept.path.exists()


def test_totals_are_saved_every_minute(monkeypatch, tmp_path):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    partials = tuple(Partial(Score(2.0 * n, n), 40, n) for n in (10, 20, 30))
    kept = PartialFile(tmp_path / "valid_partial.npz", KEY)
    evaluate._watched(Scripted(partials), None, kept, lambda line: None)
    assert kept.load(None) == partials[1]


def test_a_partial_score_that_cannot_be_saved_costs_a_warning(monkeypatch, tmp_path):
    clock = iter(range(0, 1000, 70))
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    partials = tuple(Partial(Score(800.0 * n, n), 20, n) for n in (10, 20))
    kept = PartialFile(tmp_path / "nothing" / "valid_partial.npz", KEY)
    lines = []
    assert evaluate._watched(Scripted(partials), None, kept, lines.append) == partials[-1]
    assert "cannot be written (No such file or directory); going on." in lines[0]
    assert "perplexity so far inf" in lines[1]
    stopped = Scripted(partials, interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        evaluate._watched(stopped, None, kept, lines.append)
    assert lines[-1].startswith("interrupted; PARTIAL perplexity inf over the first 20 of 20")


def test_a_perplexity_too_large_for_a_float():
    score = Score(7100.0, 10)
    assert (score.mean_nll, score.perplexity) == (710.0, float("inf"))
    assert evaluate._strict(score.perplexity) is evaluate._strict(float("nan")) is None
    assert evaluate._strict(score.mean_nll) == 710.0


def test_an_interrupted_scoring_is_saved(tmp_path):
    partial = Partial(Score(20.0, 10), 40, 10, sums={"correct": 7.0})
    kept = PartialFile(tmp_path / "valid_partial.npz", KEY)
    lines = []
    stopped = Scripted((partial,), interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        evaluate._watched(stopped, None, kept, lines.append)
    assert lines == [
        "interrupted; PARTIAL perplexity 7.389 over the first 10 of 40 tokens; "
        "the same command goes on from here."
    ]
    assert kept.load(None) == partial
    # Interrupted once more before anything new was scored: nothing is lost.
    with pytest.raises(KeyboardInterrupt):
        evaluate._watched(Scripted(interrupted=True), partial, kept, lines.append)
    assert kept.load(None) == partial


def test_a_partial_score_is_kept_whole(tmp_path):
    memory = {"a": jnp.arange(3.0), "b": jnp.asarray([1.5], jnp.bfloat16)}
    partial = Partial(Score(1 / 3, 7), 40, 5, memory, {"correct": 3.0, "memory_0": 1.0})
    kept = PartialFile(tmp_path / "valid_partial.npz", KEY)
    assert kept.load(memory) is None
    kept.save(partial)
    assert [path.name for path in tmp_path.iterdir()] == ["valid_partial.npz"]
    found = kept.load(memory)
    assert found.score == partial.score
    assert (found.expected, found.position, found.sums) == (40, 5, partial.sums)
    for name, leaf in memory.items():
        assert found.memory[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found.memory[name], leaf)
    assert PartialFile(kept.path, KEY | {"step": 5}).load(memory) is None
    kept.path.write_bytes(kept.path.read_bytes()[:-40])
    with pytest.raises(UserError, match="is damaged"):
        kept.load(memory)


def test_a_partial_score_of_an_earlier_version_goes_on(tmp_path):
    """Files without further sums, and a key in another order."""
    path = tmp_path / "valid_partial.npz"
    arrays = dict(total_nll=np.float64(20.0), count=10, expected=40, position=10)
    np.savez(path, key=json.dumps(dict(reversed(KEY.items()))), **arrays)
    assert PartialFile(path, KEY).load(None) == Partial(Score(20.0, 10), 40, 10)


def test_the_public_names_of_scoring():
    for name in ("Score", "automatic_batch_size", "carry_over", "sliding_window"):
        assert getattr(evaluate, name) is getattr(score, name)
