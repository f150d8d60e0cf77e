"""The README's section `Your own text`: its commands, word for word, and what they print."""

import json
import re
import shlex
from pathlib import Path

import pytest
from program import SIZES, call

import main
from fwm.config import build
from fwm.workdir import config_of_run

README = (Path(__file__).parents[1] / "README.md").read_text()
SECTION = README.partition("## Your own text")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"^    python main\.py (.*)$", SECTION, re.MULTILINE)


def test_a_text_file_is_trained_on_evaluated_and_continued(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    configs = Path(__file__).parents[1] / "configs"
    (tmp_path / "configs").symlink_to(configs)
    text = "".join(f"Once upon a time, wörd {i} was the end.\n" for i in range(60))
    (tmp_path / "input.txt").write_text(text)
    small = {name: value for name, value in SIZES.items() if name != "data.name"}
    small |= {
        "train.max_step": 2,
        "train.warmup_step": 3,
        "data.cache_dir": "cache",
        "data.vocab_size": 300,
    }
    told = []
    for command in COMMANDS:
        training = "--mode" not in command
        fields = small if training else {"generate.max_new_tokens": 20} if "gen" in command else {}
        overrides = [f"--config.{name}={value}" for name, value in fields.items()]
        status, out, err = call(*shlex.split(command), *overrides)
        assert status == 0, err
        told.append(out)
        if training:
            # What an evaluation needs is the workdir and the text.
            (tmp_path / "cache").rename(tmp_path / "elsewhere")
    assert len(told) == 3
    assert "Data: input, " in told[0]
    assert " 300 subwords." in told[0]
    assert "Warning: train.warmup_step=3 is more than train.max_step=2: the learning" in told[0]
    results = json.loads((tmp_path / "runs/mine/test_results.json").read_text())
    words = results["text"]["tokens"] / results["text"]["words"]
    per_word = results["perplexity"] ** words
    assert results["perplexity_per_word"] == pytest.approx(per_word)
    assert results["bits_per_byte"] < results["bits_per_character"]  # ö has two bytes
    assert results["unit"] == "subword"
    assert f"perplexity per word {per_word:.2f}" in told[1]
    assert f"{results['bits_per_character']:.4f} bits per character" in told[1]
    assert told[2].startswith("Once upon a time")
    status, out, _ = call("--mode=compare", "--workdir=runs/mine")
    assert status == 0
    assert f"{results['perplexity']:.3f} (per word {per_word:.3f}" in out
    # Another text takes the place of the run's own, wherever it lies.
    assert config_of_run(Path("runs/mine"), {"data.dir": "/other"}).data.file == ""
    assert config_of_run(Path("runs/mine"), {}).data.file == str(tmp_path / "input.txt")


def test_a_run_is_named_after_its_file_and_tokens():
    config = build()
    config.data.file = "/a/input.txt"
    words = main.job_name(config)
    config.data.tokenizer, config.data.vocab_size = "bpe", 300
    assert main.job_name(config) == words.replace("input-", "input-bpe300-", 1)
