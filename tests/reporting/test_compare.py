"""Runs beside each other: exact results, protocols, what the paper reports."""

import json
import re

import pytest
from PIL import Image
from reports import make, run

from fwm.errors import UserError
from fwm.reporting import compare

pytestmark = pytest.mark.quick  # see .ci/run


def test_compare(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for workdir in (a, b):
        with make(workdir) as reporter:
            run(reporter, range(1, 11))
    (a / "valid_results.json").write_text('{"perplexity": 34.1234}')
    (a / "test_results.json").write_text('{"perplexity": 35}')
    text = compare([a, b], tmp_path / "out" / "curves.png", {a: "34.1 / 35.2"})
    header, line, first, second, figure = text.splitlines()
    names = ["run", "steps", "valid perplexity", "test perplexity", "paper (valid / test)"]
    assert re.split(r"  +", header) == names
    assert set(line) == {"-", " "}
    assert first.split() == [str(a), "10", "34.123", "35.000", "34.1", "/", "35.2"]
    assert second.split() == [str(b), "10", "-", "-", "-"]
    assert figure == f"Learning curves: {tmp_path / 'out' / 'curves.png'}"
    with Image.open(tmp_path / "out" / "curves.png") as image:
        image.verify()
    # Other protocols than the paper's say so.
    results = {"perplexity": 34.5, "stride": 8, "split_stream": True}
    (b / "test_results.json").write_text(json.dumps(results))
    row = compare([b], tmp_path / "c.png").splitlines()[2]
    assert re.split(r"  +", row)[3] == "34.500 (stride 8, rows)"
    results = {"perplexity": 34.5, "window": 512, "mem_len": 4, "clamp_len": -1}
    (b / "test_results.json").write_text(json.dumps(results))
    for window, mem_len, clamp_len, notes in (
        (512, 4, -1, ""),
        (256, 4, -1, " (window 512)"),
        (256, 8, 9, " (window 512, mem_len 4, clamp_len -1)"),
    ):
        trained = {"train.tgt_len": window, "model.mem_len": mem_len, "model.clamp_len": clamp_len}
        row = compare([b], tmp_path / "c.png", trained={b: trained}).splitlines()[2]
        assert re.split(r"  +", row)[3] == f"34.500{notes}"
    *_, result, warning = compare([a], a / "train_log.csv" / "c.png").splitlines()
    assert result.split()[:3] == [str(a), "10", "34.123"]
    assert re.match(r"Warning: the figure .*train_log\.csv/c\.png cannot be written", warning)
    with pytest.raises(UserError, match=r"nothing has no train_log\.csv"):
        compare([a, tmp_path / "nothing"], tmp_path / "c.png")
    for malformed in (
        "{", "[]", '{"perplexity": "34"}', '{"perplexity": 3, "text": 5}',
        '{"perplexity": 3, "checkpoint_step": "a"}',
    ):  # fmt: skip
        (b / "valid_results.json").write_text(malformed)
        with pytest.raises(UserError, match=r"valid_results\.json"):
            compare([a, b], tmp_path / "c.png")


def test_only_what_belongs_to_the_run_as_it_is_is_shown(tmp_path):
    with make(tmp_path) as reporter:
        run(reporter, range(1, 11))
    texts = {tmp_path: {"test": {"digest": "aa", "tokens": 9}}}

    def shown(**result):
        (tmp_path / "test_results.json").write_text(json.dumps(result))
        return re.split(
            r"  +", compare([tmp_path], tmp_path / "c.png", texts=texts).splitlines()[2]
        )[-2]

    result = {"perplexity": 34.5, "mean_nll": 3.5, "checkpoint_step": 10}
    assert shown(**result, text={"digest": "aa"}) == "34.500"
    assert shown(**result, text={"digest": "bb"}) == "-"
    assert shown(**result, text=None) == shown(**result) == "34.500"
    assert shown(**result | {"checkpoint_step": 5}) == "34.500 (checkpoint of step 5 of 10)"
    assert shown(**result | {"perplexity": None, "mean_nll": 800.0}) == "inf"
