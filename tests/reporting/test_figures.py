"""Learning curves that can be read: ticks, titles, names, and nothing on the data."""

import math

import pytest

from fwm.reporting.compare import names_of
from fwm.reporting.figures import draw_learning_curves, learning_curves

pytestmark = pytest.mark.quick  # see .ci/run

HEADER = "step,split,loss,perplexity,learning_rate,grad_norm,tokens_per_second,seconds\n"


def log(path, *perplexities):
    rows = (f"{i},valid,{math.log(x)},{x},,,,1\n" for i, x in enumerate(perplexities, 1))
    path.write_text(HEADER + "".join(rows))
    return path


def legend_is_beside(figure):
    figure.draw_without_rendering()
    (legend,) = figure.legends
    return legend.get_window_extent().x0 >= figure.axes[0].get_window_extent().x1


@pytest.mark.parametrize("ends", [(4000, 120), (140, 120), (231.2, 230.9), (1e30, 2), (950, 110)])
def test_there_are_tick_labels_between_decades(tmp_path, ends):
    figure = learning_curves({"my-run": log(tmp_path / "log", *ends)})
    assert legend_is_beside(figure)
    (axes,) = figure.axes
    assert axes.get_title() == "my-run"
    low, high = axes.get_ylim()
    shown = [
        float(t.get_text()) for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high
    ]
    assert 3 <= len(set(shown)) <= 14
    assert max(ends) > 1e4 * min(ends) or any(math.log10(x) % 1 for x in shown)


def test_runs_are_named_by_what_differs_beside_the_axes(tmp_path):
    long = "embedded-dpfp-delta-L2-d128-h4x16-ff512-len64-bs16-lr0.003-steps1000-drop0.1-seed0"
    paths = [tmp_path / name for name in (long, f"{long}-b")]
    settings = [{"train.lr": lr, "seed": 1, "data.dir": str(lr)} for lr in (1e-3, 3e-3)]
    names = names_of(paths, settings)
    assert names == ["lr 0.001", "lr 0.003"]
    assert names_of(paths, [{}, {}]) == [long, f"{long}-b"]
    odd = ["_a$b^$c", "日本\udcff"]
    for own in (names, names_of(paths, [{}, {}]), odd):
        logs = {name: log(tmp_path / "log", 300, 200) for name in own}
        figure = learning_curves(logs)
        if own is not odd:  # outside `draw_learning_curves` that is a warning of a missing letter
            assert legend_is_beside(figure)
            assert figure.axes[0].get_window_extent().width > 0.6 * figure.bbox.width
        said = [text.get_text().replace("\n", "") for text in figure.legends[0].get_texts()]
        assert said == ["training", "validation", *(name.replace("\udcff", "?") for name in own)]
        assert len({line.get_marker() for line in figure.axes[0].lines}) == len(own)
    draw_learning_curves(logs, tmp_path / "c.png")  # without a warning of letters it has not
