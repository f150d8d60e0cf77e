"""What is said of a command line that is wrong, before there is a run: one clear sentence."""

import json
import re
from pathlib import Path

import pytest
from absl import flags
from program import DPFP, call, contents, evaluate, refused, write_text

import main
from configs import default
from fwm import config_file
from fwm.errors import UserError


def test_the_name_of_a_run_tells_what_matters():
    name = main.job_name(default.build("tiny,no_pos,dropout=0.2"))
    assert name.startswith("embedded-dpfp-delta-none-nu2-nopos-L2-d128-h4x16-ff512-len64-bs16-lr")
    assert "-drop0.2-seed1111" in name
    assert main.job_name(default.build("tiny", mixer="softmax")).startswith("embedded-softmax-L2")
    config = default.build("tiny")
    config.train.scheduler, config.train.weight_decay, config.init_from = "wsd", 0.1, "runs/a/"
    assert main.job_name(config).endswith("-steps1000-wsd-wd0.1-drop0.1-seed1111-from-a")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_an_example_of_each_mode_and_how_keys_are_set(flag):
    status, out, err = call(flag)
    assert (status, err) == (0, "")
    words = (
        *main.MODES,
        "--workdir",
        "--config.train.lr=3e-4",
        "--prompt",
        "--extend",
        "init_from",
    )
    words += ("--official", "arguments.json", "vocab.txt", "model.npz", "state_dict()")
    # absl lists the flags of the main module, which here is another one.
    out += flags.FLAGS["official"].help
    assert [word for word in words if word not in out] == []


COMMAND_LINES = {
    "--config=configs/nothing.py": r"configs/nothing\.py",
    "--config=configs/dpfp_delta.py:huge": "unknown preset 'huge': expected one of tiny, small",
    "--config=configs/dpfp_delta.py:tiny,nopos": "unknown option 'nopos': expected no_pos, skip",
    "--config=configs/dpfp_delta.py:tiny,d_model=x": "d_model must be a whole number .* got 'x'",
    "--config=configs/transformer.py:tiny,carry_over_fast_weight": "no meaning for softmax",
    "--config.model.d_modell=3": "d_modell",
    "--config.modell.d_model=3": "modell",
    "--config.model.d_model=abc": "config.model.d_model must be a whole number .* got 'abc'",
    "--config.model.d_model=1.5": "config.model.d_model must be a whole number .* got '1.5'",
    "--config.train.max_step=1e3": "config.train.max_step must be a whole number .* got '1e3'",
    "--config.train.lr=fast": "config.train.lr must be a number above 0, got 'fast'",
    "--config.train.lr=nan": "config.train.lr must be a number above 0, got nan",
    "--config.train.clip=inf": "config.train.clip must be a number of at least 0, got inf",
    "--config.model.no_pos=yes": "config.model.no_pos must be True or False, got 'yes'",
    "--config.model.cutoffs=(1,": r"config.model.cutoffs must be a tuple .* got '\(1,'",
    "--config.eval.checkpoint=bset": "config.eval.checkpoint must be best, latest or the num",
    "--config.eval.mem_len=5": "mem_len has no meaning for fast_weight",
    "--config.model.feature_map=exp": "'exp': expected one of elu, favor, dpfp",
    "--config.model.dtype=float16": "dtype must be one of float32, bfloat16, got 'float16'",
    "--config.model.mem_len=4": "mem_len has no meaning for fast_weight, it is a key of trans",
    "--config.model.d_model=15": "d_model must be even",
    "--config.train.scheduler=linear": "scheduler must be one of cosine, inv_sqrt, constant",
    "--config.train.profile_steps=(5,2)": r"first and the last step to trace.*got \(5, 2\)",
    "--config.train.profile_steps=(5,)": r"first and the last step to trace.*got \(5,\)",
    "--prompt=once": "--prompt belongs to --mode=generate, but the mode is train",
    "--config.train.nan_policy=ignore": "nan_policy must be one of stop, skip, got 'ignore'",
    "--num_processes=2": "several processes need --coordinator_address=host:port with",
    "--coordinator_address=auto --process_id=0": "or --coordinator_address=auto without them",
    "--config.train.batch_size=5": r"train\.batch_size=5 does not split evenly over 2 devices",
    "--config.train.batch_size=0": "train.batch_size must be a whole number of at least 1, got 0",
    "--config.train.eval_batch_size=3": r"eval_batch_size=3 does not split evenly over 2 devices",
    "--config.train.batch_chunk=3": "batch_chunk=3 does not divide the 2 rows",
    "--config.train.batch_chunk=0": "batch_chunk must be a whole number of at least 1",
    "--config.seed=10000000000000000000000": "config.seed must be .* and at most 4294967295, got 1",
    "--config.seed=-1": "config.seed must be a whole number of at least 0 and at most 4294967295",
    "--config.train.save_minutes=-1": "save_minutes must be a number of at least 0, got -1",
    "--config.train.weight_decay=-0.1": "weight_decay must be a number of at least 0, got -0.1",
    "--config.train.decay_step=7": "decay_step=7 has no meaning for the scheduler cosine",
    "--config.init_from=/nowhere": r"/nowhere holds no run \(no config\.json\)",
    "--config.init_checkpoint=first": "init_checkpoint must be best, latest or the number of a st",
    "--config.train.tgt_len=0": "config.train.tgt_len must be a whole number of at least 1, got 0",
    "--config.train.max_step=0": "train.max_step must be a whole number of at least 1, got 0",
    "--config.train.max_step=2147483648": "at least 1 and at most 2147483647, got 2147483648",
    "--config.model.d_inner=2000000000": "need .* GiB, and there are .*model's sizes smaller",
    "--config.train.tgt_len=1000": "has 140 tokens, but batch_size 4 rows of tgt_len 1000",
    "--config.data.dir=/nowhere": "There is no folder /nowhere",
    "--config.data.dir= --config.data.name=wikitext103": r"--config\.data\.dir",
    "--config.data.dir= --config.data.name=wiki": "Unknown config.data.name 'wiki'; choose one of",
    "--no_such_flag=1": "no_such_flag",
    "--mode=test": r"test.*train\|valid\|eval|test.*train, valid, eval",
    "valid": "unknown argument 'valid'",
}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_wrong_command_line_makes_no_workdir(train, place, tmp_path, line):
    before = contents(place / "text")
    refused(train(tmp_path / "run", *line.split(" ")), COMMAND_LINES[line])
    assert not list(tmp_path.iterdir())
    assert contents(place / "text") == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=nothing.py"], "--config=nothing.py names no file in .*such as configs/dpfp"),
        (["--config", "nothing.py:small"], "--config=nothing.py:small names no file"),
        (["--config=configs/dpfp_delta"], "; there is configs/dpfp_delta.py: expected"),
        (["--config"], "Missing value for flag --config"),
        (["--mode=valid", "--config=configs"], "--config=configs names no file"),
    ],
)
def test_a_config_file_that_is_not_there(arguments, said):
    status, out, err = call(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(said, err)


CHANGED = """
from ml_collections import ConfigDict
from fwm.config import build

def get_config():
    c = build().to_dict()
    {}
    return ConfigDict(c)
"""
OWN_FILES = {
    "def get_config(:": "fails in line 1 with SyntaxError",
    "\n\nimport nothing_there": "fails in line 3 with ModuleNotFoundError .*No module named",
    "x = 1": "defines no get_config: expected a ConfigDict, best made with fwm.config.build",
    "def get_config():\n    return 1 / 0": r"fails in line 2 with ZeroDivisionError \(division by",
    "def get_config():\n    open('/nothing')": "fails in line 2 with FileNotFoundError",
    "def get_config(): pass": "get_config of .*own.py returns NoneType: expected a ConfigDict",
    "get_config = dict": "returns dict: expected a ConfigDict",
    "get_config = 3": "fails with TypeError",
    "def get_config(a): pass": "fails with TypeError",
    "from fwm.config import build\ndef get_config():\n    c = build()\n    c.train.lr = '3e-4'":
        "fails in line 4 with TypeError",
    CHANGED.format("c = {'lr': 0.1}"): "a config lacks data.cache_dir, .*begin with fwm.config.bui",
    CHANGED.format("del c['train']['lr']"): "a config lacks train.lr: ",
    CHANGED.format("c['train']['lrr'] = 1"): "a config has unknown keys: train.lrr: ",
    CHANGED.format("c['train'] = 3"): "a config lacks train.batch_chunk, ",
    CHANGED.format("c['train']['lr'] = '3e-4'"): "config.train.lr must be a number above 0, got '3",
    CHANGED.format("c['train']['max_step'] = 1e3"): "config.train.max_step must be .* got 1000.0",
    CHANGED.format("c['model']['no_pos'] = 'yes'"): "config.model.no_pos must be True or False",
    CHANGED.format("c['model']['n_layer'] = 1.5"): "config.model.n_layer must be a whole number",
    CHANGED.format("c['report']['job_name'] = None"): "config.report.job_name must be text",
}  # fmt: skip


@pytest.mark.parametrize("content", OWN_FILES)
@pytest.mark.parametrize("flags", [[], ["--config.train.nan_policy=stop"]])
def test_a_config_file_that_is_wrong(content, flags, tmp_path):
    (tmp_path / "own.py").write_text(content)
    lacking = OWN_FILES[content] if not flags else "own.py|config"
    refused(call(f"--config={tmp_path / 'own.py'}", *flags), lacking)


def test_flags_in_a_file_and_a_config_file_of_another_folder(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(
        main.train, "run", lambda config, workdir, *_, **__: runs.append((config, workdir)) or 0
    )
    own = tmp_path / "own.py"
    own.write_text("from fwm.config import build\ndef get_config(options='tiny'):\n"
                   "    return build(options)")  # fmt: skip
    file = tmp_path / "flags.txt"
    file.write_text(
        f"# mine\n--config={own}:small\n--config.train.lr=0.5\n--workdir={tmp_path}/a\n"
    )
    monkeypatch.chdir(tmp_path)
    for flag in (f"--flagfile={file}", "--flagfile=flags.txt"):
        assert call(flag, "--config.seed=7")[0] == 0
        config, workdir = runs.pop()
        assert (config.train.lr, config.seed, config.model.n_layer) == (0.5, 7, 16)
        assert workdir == tmp_path / "a"
    assert call("--config=own.py")[0] == 0
    refused(call("--flagfile=nothing.txt"), "nothing.txt")
    # Beside main.py, and not here.
    monkeypatch.setattr(main.sys, "argv", [main.__file__])
    with pytest.raises(UserError, match=f"in {tmp_path}; there is .*/{DPFP}: expected the path"):
        config_file.load(f"{DPFP}:small")


def test_a_platform_that_is_not_there(monkeypatch):
    def devices():
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(main.jax, "devices", devices)
    status, _, err = call(f"--config={DPFP}")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: JAX_PLATFORMS=cuda names no device that jax can use here")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": None}, "lacks the train split"),
        ({"train": ""}, r"train\.txt is empty"),
        ({"valid": "\n \n"}, r"valid\.txt is empty"),
        ({"train": b"the \xff\xfe cat\n" * 40}, r"train\.txt is not UTF-8"),
        ({"train": "the cat sat\n".encode("utf-16-le") * 40}, r"train\.txt is not UTF-8 .* UTF-16"),
        (
            {"train": "too short\n"},
            "has 3 tokens, but batch_size 4 rows of tgt_len 8 need at least",
        ),
    ],
)
def test_a_wrong_text_makes_no_workdir(train, tmp_path, splits, message):
    text = write_text(tmp_path / "text", **splits)
    refused(train(tmp_path / "run", data__dir=text), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["report.job_name=../a", "report.job_name=..", "data.name=/a"])
def test_a_job_name_cannot_lead_out_of_the_runs(monkeypatch, tmp_path, field):
    monkeypatch.chdir(tmp_path)
    config = Path(main.__file__).parent / DPFP
    refused(call(f"--config={config}", f"--config.{field}"), "is a path: expected")
    assert not list(tmp_path.iterdir())


def test_a_split_of_one_character_is_refused_before_training(train, tmp_path):
    text = write_text(tmp_path / "text", train="1 2 3 " * 99, valid="1", test="1 2")
    refused(
        train(tmp_path / "run", data__dir=text, data__name="enwik8"), "valid split of enwik8 is a"
    )
    assert not (tmp_path / "run").exists()


def test_home_in_paths(monkeypatch, tmp_path):
    runs = []
    run = lambda config, workdir, *_, **__: runs.append(workdir) or 0
    monkeypatch.setattr(main.train, "run", run)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call(f"--config={DPFP}", "--workdir=~/my run")[0] == 0
    assert runs == [tmp_path / "my run"]
    for flag in ("--workdir", "--config.data.dir", "--config.data.cache_dir"):
        result = call(f"--config={DPFP}", f"--workdir={tmp_path / 'a'}", f"{flag}=~nobody_/a")
        refused(
            result, "~nobody_/a begins with a home folder that cannot be found: write the whole"
        )


def test_what_the_first_command_is_said_to_end_with_was_measured():
    """README's range; .ci/run trains its beginning."""
    root = Path(main.__file__).parent
    said = re.search(r"perplexity between (\d+) and (\d+)", (root / "README.md").read_text())
    low, high = map(int, said.groups())
    measured = json.loads((root / "benchmarks/results/first_command.json").read_text())
    found = [run["validation_perplexity"] for run in measured["runs"]]
    assert low < min(found) <= max(found) < high < 1.4 * low
    assert measured["command"] in (root / "README.md").read_text()
    assert default.get_config().train.max_step == measured["step"]


def test_training_needs_a_config(tmp_path):
    result = call(f"--workdir={tmp_path / 'run'}")
    refused(result, r"needs --config=configs/<variant>\.py, .*dpfp_delta, .*transformer_xl\.")
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_is_a_file(train, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(train(workdir), "another --workdir")
        refused(evaluate("valid", workdir), "holds no run")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("mode", ["valid", "eval", "generate", "compare"])
def test_evaluation_where_there_is_no_run(tmp_path, mode):
    refused(call(f"--mode={mode}"), "needs the --workdir of a trained run")
    refused(evaluate(mode, tmp_path / "run"), "holds no run")
    refused(evaluate(mode, tmp_path), "holds no run")
    assert not list(tmp_path.iterdir())


def test_a_run_that_an_earlier_version_has_named_goes_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = default.build("tiny")
    config.data.dir = str(tmp_path / "mine")
    now, earlier = (Path("runs", f"{name}-dpfp-delta") for name in ("mine", "embedded"))
    assert str(main.default_workdir(config)).startswith(str(now))
    old = Path("runs", main.job_name(default.build("tiny")))
    assert str(old).startswith(str(earlier))
    old.mkdir(parents=True)
    (old / "config.json").write_text(config.to_json())
    assert main.default_workdir(config) == old
    # One on another folder, or on the embedded corpus itself, is not this one.
    other = config.copy_and_resolve_references()
    other.data.dir = str(tmp_path / "other")
    for theirs in (other, default.build("tiny")):
        (old / "config.json").write_text(theirs.to_json())
        assert str(main.default_workdir(config)).startswith(str(now))


def test_a_config_in_two_words_is_noted_as_one_in_one_word(tmp_path):
    for given in (("--config", DPFP), (f"--config={DPFP}",)):
        status, _, err = call("--mode=valid", f"--workdir={tmp_path}", *given)
        assert status == 2
        assert "--config is not used" in err
