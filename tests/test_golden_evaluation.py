"""Perplexities of the official evaluators: sliding window and ordered segments."""

import numpy as np
import pytest
from golden_files import files, load, part

from fwm.evaluate import carry_over, sliding_window


def agrees(score, total, count, perplexity):
    assert score.count == count
    np.testing.assert_allclose(score.total_nll, total, rtol=1e-6)
    np.testing.assert_allclose(score.perplexity, perplexity, rtol=1e-6)


@pytest.mark.parametrize("name", files("eval_sliding"))
def test_sliding_window(name):
    arrays, config, model, variables = load(name)
    rows = config["batch_size"]
    score = sliding_window(
        model,
        variables,
        arrays["stream"],
        window=config["tgt_len"],
        batch_size=rows,
        split_stream=rows > 1,
    )
    agrees(score, arrays["total_nll"], int(arrays["count"]), arrays["perplexity"])


@pytest.mark.parametrize("name", files("eval_ordered"))
def test_ordered(name):
    # The evaluation script's clamp_len replaces the model's if it is given.
    clamp_len = load(name)[1]["clamp_len"]
    arrays, config, model, variables = load(
        name, **({"clamp_len": clamp_len} if clamp_len > 0 else {})
    )
    rows = config["batch_size"]
    score = carry_over(
        model,
        variables,
        arrays["stream"],
        segment=config["tgt_len"],
        batch_size=rows,
        split_stream=rows > 1,
    )
    # The official count leaves the batch size out, and its total with it.
    agrees(
        score, arrays["total_loss"] * rows, int(arrays["total_len"]) * rows, arrays["perplexity"]
    )
    assert score.count == part(arrays, "position")["_nll"].size
