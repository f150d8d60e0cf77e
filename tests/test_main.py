"""The command line: the whole path of a run, and one clear sentence for everything wrong."""

import contextlib
import gzip
import importlib
import itertools
import json
import os
import pickle
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from program import DPFP, SIZES, call, contents, evaluate, refused, write_text

import main
from fwm import evaluate as evaluation
from fwm import generate, reporting
from fwm.checkpoint import Checkpoints
from fwm.data import Vocabulary
from fwm.files import flatten
from fwm.model import LanguageModel
from fwm.score import CarryOver, SlidingWindow


@pytest.fixture(scope="module")
def trained(place):
    """A finished run and what it said; not to be changed."""
    fields = SIZES | {"data.dir": place / "text", "data.cache_dir": place / "cache"}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    workdir = place / "my run"  # What is printed to be typed has to be quoted.
    return workdir, call(f"--config={DPFP}", f"--workdir={workdir}", *overrides)


# --- the whole path -------------------------------------------------------------------------------


def test_training_ends_with_what_to_do_next(trained):
    workdir, (status, out, err) = trained
    assert (status, err) == (0, "")
    assert "Total: " in out  # of the parameters
    assert "Data: text, 140 training tokens, 24 validation tokens, 6 words." in out
    assert "Devices: 2 x cpu, float32, 2 rows of 8 tokens each." in out
    assert "Training: 4 steps of 32 tokens, 0.9 times the text." in out
    assert re.search(r"Estimated duration: \d+:\d\d:\d\d for the [12] steps left", out)
    assert "\r" not in out
    assert "\x1b" not in out
    assert "step 4/4  loss " in out
    assert ">>> validation at step 2: loss " in out
    assert re.search(r"Best validation perplexity \d+\.\d\d \(approximate, step [24]\)", out)
    assert out.endswith(f"Exact perplexity: python main.py --mode=valid --workdir='{workdir}'\n")
    names = {path.name.split(".")[0] for path in workdir.iterdir()}
    assert {"config", "vocab", "checkpoints", "train_log", "learning_curve", "events"} <= names
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["feature_map"] == "dpfp"
    assert config["train"]["max_step"] == 4


def test_a_finished_run_is_not_trained_again(trained, train, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "my run")
    before = contents(workdir / "checkpoints")
    status, out, err = train(workdir)
    assert (status, err) == (0, "")
    assert f"Resuming {workdir} at step 4." in out
    assert out.splitlines()[-2:] == [
        line.replace(str(trained[0]), str(workdir)) for line in trained[1][1].splitlines()[-2:]
    ]
    assert contents(workdir / "checkpoints") == before


@pytest.mark.parametrize(
    ("mode", "split", "tokens"), [("valid", "valid", 24), ("eval", "test", 20)]
)
def test_exact_perplexity(trained, tmp_path, mode, split, tokens):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    before = contents(workdir)
    status, out, err = evaluate(mode, workdir)
    assert (status, err) == (0, "")
    path = workdir / f"{split}_results.json"
    results = json.loads(path.read_text())
    assert contents(workdir).keys() - before.keys() == {path}
    expected = {
        "split": split, "protocol": "sliding_window", "window": 8, "stride": 1,
        "tokens": tokens - 1, "unit": "word", "mem_len": 0, "clamp_len": -1,
    }  # fmt: skip
    assert {name: results[name] for name in expected} == expected
    fields = ("batch_size", "checkpoint_step", "seconds", "versions", "split_stream")
    fields += ("text", "dtype", "eval")
    text = results["text"]
    assert (text["tokens"], text["of_run"], len(text["digest"])) == (tokens, True, 32)
    assert results.keys() == {
        *expected,
        *fields,
        "mean_nll",
        "perplexity",
        "bits_per_token",
        "perplexity_per_word",
    }
    assert results["perplexity"] == pytest.approx(2.0 ** results["bits_per_token"])
    assert results["perplexity"] == pytest.approx(2.718281828459045 ** results["mean_nll"])
    assert results["checkpoint_step"] in (2, 4)
    assert f"{split}: perplexity {results['perplexity']:.3f}" in out


def test_a_result_on_another_text_has_a_file_of_its_own(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    text = write_text(tmp_path / "my text")
    (text / "test.txt").write_text("the cat sat\n" * 5)
    status, out, _ = evaluate("eval", workdir, f"--config.data.dir={text}")
    assert status == 0
    (path,) = workdir.glob("test_results*")
    results = json.loads(path.read_text())
    assert path.name == f"test_results_my-text-{results['text']['digest'][:8]}.json"
    assert (results["text"]["of_run"], results["text"]["dir"]) == (False, str(text))
    # What has been found is told also where it cannot be written.
    path.unlink()
    path.mkdir()
    status, out, err = evaluate("eval", workdir, f"--config.data.dir={text}")
    assert f"perplexity {results['perplexity']:.3f}" in out
    refused((status, out, err), "cannot be written .* and the result stands only in the line above")


def test_a_chosen_checkpoint_and_protocol(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    options = {"checkpoint": 2, "stride": 4, "tgt_len": 6, "batch_size": 4, "clamp_len": 3}
    status, _, err = evaluate(
        "valid", workdir, *(f"--config.eval.{k}={v}" for k, v in options.items())
    )
    assert (status, err) == (0, "")
    results = json.loads((workdir / "valid_results.json").read_text())
    assert results["checkpoint_step"] == 2
    assert (results["stride"], results["window"], results["batch_size"]) == (4, 6, 4)
    assert (results["tokens"], results["clamp_len"]) == (23, 3)
    config = json.loads((workdir / "config.json").read_text())
    assert config["eval"]["tgt_len"] == 0  # the run's own config stays as it was


# --- use --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["the dog on", ""])
def test_a_trained_model_writes(trained, prompt):
    workdir = trained[0]
    before = contents(workdir)
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 4, "top_p": 0.95, "seed": 5}
    arguments = ("generate", workdir, f"--prompt={prompt}")
    arguments += tuple(f"--config.generate.{name}={value}" for name, value in options.items())
    if prompt:
        refused(evaluate(*arguments), "'dog' is not in the vocabulary, which has no <unk>")
        arguments = (*arguments[:2], "--prompt=the cat on", *arguments[3:])
    status, out, err = evaluate(*arguments)
    assert status == 0
    assert re.fullmatch(r"note: 12 new tokens, [\d.]+ ms each; checkpoint of step [24]\.\n", err)
    assert out.startswith("the cat on" * bool(prompt))
    words = out.removesuffix("\n").replace("\n", " <eos> ").split()
    assert len(words) == 12 + 3 * bool(prompt)
    assert set(words) <= {*["the", "cat", "sat", "on", "mat"], "<eos>"}
    # Standard output is the text alone, whatever there is to be said.
    status, again, err = evaluate(*arguments[:2], f"--config={DPFP}", *arguments[2:])
    assert (status, again) == (0, out)
    assert err.startswith(f"--config is not used: the settings are those of the run in {workdir}.")
    assert contents(workdir) == before


def test_writing_goes_by_the_evaluators_probabilities(trained, place, tmp_path):
    """Also those of a Transformer-XL without memory, and of other segments than in training."""
    saved = json.loads((trained[0] / "config.json").read_text())
    saved["model"]["mixer"] = "transformer_xl"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    shutil.copy(trained[0] / "vocab.txt", tmp_path)
    config = main.config_of_run(tmp_path, {"eval.tgt_len": 6})
    vocab = Vocabulary.load(tmp_path / "vocab.txt")
    model = LanguageModel(evaluation.reading(config, len(vocab))[0])
    tokens = np.zeros((1, 1), np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, tokens)["params"]
    params = jax.tree.map(lambda x: 10 * x, params)  # Else words hardly depend on each other.
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": params, "favor": None}, valid_loss=1.0)
    assert evaluate("valid", tmp_path, "--config.eval.tgt_len=6")[0] == 0
    results = json.loads((tmp_path / "valid_results.json").read_text())
    decoder, _, _ = generate.load(config, tmp_path)
    ids = vocab.encode((place / "text" / "valid.txt").read_text())
    found = generate.log_probs(decoder, ids[:1], ids[1:])
    assert len(found) == results["tokens"]
    assert -found.mean(dtype=np.float64) == pytest.approx(results["mean_nll"], rel=1e-5)


def test_the_pace_of_a_long_text(trained, monkeypatch):
    monkeypatch.setattr(generate, "PACED", 4)
    status, _, err = evaluate("generate", trained[0], "--config.generate.max_new_tokens=9")
    assert status == 0
    ms = r"[\d.]+ ms"
    pace = rf"{ms} each \(the first 4: {ms}, the last 4: {ms}\)"
    assert re.fullmatch(rf"note: 9 new tokens, {pace}; checkpoint of step [24]\.\n", err)


def test_words_outside_the_vocabulary_are_noted(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    text = (workdir / "vocab.txt").read_text()
    (workdir / "vocab.txt").write_text(text.replace("mat\n", "<unk>\n"))
    status, out, err = evaluate("generate", workdir, "--prompt=the dog on the mat")
    assert status == 0
    assert err.startswith("note: not in the vocabulary, and read as <unk>: dog, mat\n")
    assert out.startswith("the <unk> on the <unk>")


def test_writing_that_is_interrupted(trained, monkeypatch):
    def interrupted(*given, **options):
        yield 1, -1.0
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate", interrupted)
    status, out, err = evaluate("generate", trained[0])
    assert status == 130
    assert len(out.split()) == 1
    assert err.startswith("note: 1 new tokens; checkpoint")


def test_writing_that_nobody_reads(trained, capfd):
    config = main.config_of_run(trained[0], {})
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, contextlib.redirect_stdout(pipe):
        assert generate.run(config, trained[0], "the cat") == 141
    assert "note: 0 new tokens; checkpoint" in capfd.readouterr().err


def test_runs_are_compared(trained, tmp_path):
    runs = [shutil.copytree(trained[0], tmp_path / name) for name in ("a", "b")]
    (runs[0] / "valid_results.json").write_text('{"perplexity": 34.1234, "window": 8}')
    (runs[1] / "valid_results.json").write_text('{"perplexity": 34.1234, "window": 8}')
    # What the paper reports, beside the model that it reports it of.
    saved = default_of("linear_delta:small")
    saved["train"]["max_step"] = 1000
    (runs[1] / "config.json").write_text(json.dumps(saved))
    status, out, err = call("--mode=compare", f"--workdir={runs[0]},{runs[1]}")
    assert (status, err) == (0, "")
    _, _, first, second, last = out.splitlines()
    assert first.split() == [str(runs[0]), "4", "34.123", "-", "-"]
    # Trained with another window.
    assert " ".join(second.split()) == f"{runs[1]} 4 34.123 (window 8) - 34.1 / 35.2"
    assert last == f"Learning curves: {runs[0] / 'compare.png'}"
    assert (runs[0] / "compare.png").stat().st_size > 1000
    refused(call("--mode=compare"), "needs the --workdir")
    refused(call("--mode=compare", f"--workdir={runs[0]},{tmp_path}"), "holds no run")
    refused(call("--mode=compare", f"--workdir={runs[0]}", "--config.seed=1"), "has no settings")


def default_of(variant):
    name, _, options = variant.partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(options)
    return json.loads(config.to_json())


def test_only_what_the_paper_reports_is_said_of_a_run(tmp_path):
    for variant, expected in [
        ("linear_delta:small", "34.1 / 35.2"),
        ("linear_delta:small,no_pos", "-"),
        ("linear_delta:medium", "-"),
        ("linear_sum:small", "-"),
        ("dpfp_delta:small", "-"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(default_of(variant)))
        settings = flatten(main.config_of_run(tmp_path, {}).to_dict())
        assert reporting.paper_result(settings, main.published()) == expected


def test_some_steps_are_traced(trained, train, tmp_path):
    workdir = tmp_path / "run"
    status, out, err = train(workdir, train__profile_steps=(2, 3))
    assert (status, err) == (0, "")
    assert f"Trace of step 2 to step 3: {workdir / 'profile'}" in out
    (trace,) = (workdir / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert steps == ["2", "3"]
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert not (trained[0] / "profile").exists()
    # Other steps to trace are no other run; these have been made.
    status, out, err = train(workdir, train__profile_steps=(3, 4))
    assert (status, err) == (0, "")
    assert "No trace: this run made none of the steps 3 to 4." in out


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("carry", [False, True])
def test_an_interrupted_evaluation_goes_on_to_the_same_total(trained, tmp_path, monkeypatch, carry):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    (workdir / "valid_results.json").unlink(missing_ok=True)
    if carry:
        saved = json.loads((workdir / "config.json").read_text())
        saved["train"]["carry_over_fast_weight"] = True
        (workdir / "config.json").write_text(json.dumps(saved))
    arguments = ("valid", workdir, "--config.eval.batch_size=4", "--config.eval.tgt_len=4")
    arguments += (f"--config.eval.stride={4 if carry else 1}",)
    whole = evaluate(*arguments)
    assert whole[0] == 0
    assert ("note: eval.stride=4 is not used: no window slides" in whole[1]) == carry
    expected = json.loads((workdir / "valid_results.json").read_text())
    (workdir / "valid_results.json").unlink()

    protocol = CarryOver if carry else SlidingWindow
    parts = protocol.partials

    def interrupted(*given):
        yield from itertools.islice(parts(*given), 3)
        if not carry:
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGTERM)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "partials", interrupted)
        status, out, _ = evaluate(*arguments)
    assert status == (143 if carry else 130)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert "PARTIAL perplexity" in out
    assert not (workdir / "valid_results.json").exists()

    status, out, _ = evaluate(*arguments)
    assert status == 0
    assert "going on after" in out
    results = json.loads((workdir / "valid_results.json").read_text())
    assert results["mean_nll"] == expected["mean_nll"]
    assert results["tokens"] == expected["tokens"]
    assert not list(workdir.glob("*partial*"))
    # Other settings start from the beginning.
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "partials", interrupted)
        evaluate(*arguments)
    assert "going on" not in evaluate(*arguments[:-1], "--config.eval.tgt_len=5")[1]


def damage_latest_checkpoint(workdir):
    files = (workdir / "checkpoints" / "4" / "state").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_evaluation_falls_back_to_a_sound_checkpoint(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    damage_latest_checkpoint(workdir)
    before = contents(workdir)
    status, out, err = evaluate("valid", workdir, "--config.eval.checkpoint=latest")
    assert (status, err) == (0, "")
    assert "checkpoint 4 is damaged" in out
    results = json.loads((workdir / "valid_results.json").read_text())
    assert results["checkpoint_step"] == 2
    assert {k: v for k, v in contents(workdir).items() if k in before} == before


def test_both_splits_and_several_checkpoints_in_one_call(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    status, out, err = evaluate("valid,eval", workdir, "--config.eval.checkpoint=latest,2")
    assert (status, err) == (0, "")
    for split in ("valid", "test"):
        for step in (2, 4):
            results = json.loads((workdir / f"{split}_results_{step}.json").read_text())
            assert (results["split"], results["checkpoint_step"]) == (split, step)
            assert f"{split}: perplexity {results['perplexity']:.3f}" in out
    alone = evaluate("valid", workdir, "--config.eval.checkpoint=2")
    assert alone[0] == 0
    one, several = (
        json.loads((workdir / name).read_text())
        for name in ("valid_results.json", "valid_results_2.json")
    )
    assert one["mean_nll"] == several["mean_nll"]


def test_training_falls_back_to_a_sound_checkpoint(trained, train, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    damage_latest_checkpoint(workdir)
    status, out, err = train(workdir)
    assert (status, err) == (0, "")
    assert "checkpoint 4 is damaged" in out
    assert f"Resuming {workdir} at step 2." in out
    assert "Done." in out
    with Checkpoints(workdir / "checkpoints") as a, Checkpoints(trained[0] / "checkpoints") as b:
        (step, ours), (_, first) = (c.restore_subtree(("params",), "latest") for c in (a, b))
    assert step == 4
    same = jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), ours, first)
    assert all(jax.tree.leaves(same))


def test_unknown_words_become_unk_with_a_count(train, tmp_path):
    # With <unk> the vocabulary is as large as that of the other tests: nothing compiles anew.
    texts = {"train": "the cat sat on the\n" * 20, "valid": "the dog saw the dog bark\n"}
    text = write_text(tmp_path / "text", **texts, test="a cow\n")
    workdir = tmp_path / "run"
    status, out, err = train(workdir, data__dir=text)
    assert (status, err) == (0, "")
    assert re.search(r"Warning: .*valid\.txt: 4 occurrences of 3 different words .*<unk>", out)
    assert (workdir / "vocab.txt").read_text().splitlines()[-1] == "<unk>"
    status, out, err = evaluate("eval", workdir)
    assert (status, err) == (0, "")
    assert re.search(r"warning: .*test\.txt: 2 occurrences of 2 different words", out)


# --- what is refused ------------------------------------------------------------------------------


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_nothing_in_a_workdir_is_unpickled(trained, train, tmp_path):
    workdir, mark = shutil.copytree(trained[0], tmp_path / "run"), tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb).close()
    mark.unlink()  # It works.
    np.savez(workdir / "valid_partial.npz", key=np.array([Bomb(mark)], object))
    refused(evaluate("valid", workdir), "valid_partial.npz is damaged")
    files = [p for p in workdir.rglob("*") if p.is_file() and p.name not in ("lock", "config.json")]
    for path in files:
        path.write_bytes(bomb)
    for result in (evaluate("valid", workdir), train(workdir)):
        refused(result, "")
    (workdir / "config.json").write_bytes(bomb)
    for result in (evaluate("valid", workdir), train(workdir)):
        refused(result, "not valid JSON")
    assert not mark.exists()


def test_resuming_with_other_settings_lists_each_with_both_values(trained, train):
    before = contents(trained[0])
    result = train(trained[0], train__lr=0.5, seed=3, config="configs/linear_delta.py")
    refused(result, r"holds a run with other settings: ")
    for difference in (
        "model.feature_map was 'dpfp' and is now 'elu'",
        "train.lr was 0.003 and is now 0.5",
        "seed was 1111 and is now 3",
    ):
        assert difference in result[2]
    assert result[2].count(" and is now ") == 3
    assert contents(trained[0]) == before


def test_resuming_on_another_text_is_refused(trained, train, tmp_path):
    text = write_text(tmp_path / "text", train="the cat and the hat\n" * 20)
    before = contents(trained[0])
    refused(
        train(trained[0], data__dir=text),
        "another text: entry 3 of its vocabulary of 6 is 'sat' and of",
    )
    assert contents(trained[0]) == before


def test_evaluation_of_a_broken_workdir(trained, tmp_path):
    def broken(name, change):
        workdir = shutil.copytree(trained[0], tmp_path / name)
        change(workdir)
        before = contents(workdir)
        result = evaluate("valid", workdir)
        assert contents(workdir) == before
        return result

    config = json.loads((trained[0] / "config.json").read_text())
    write = lambda value: lambda w: (w / "config.json").write_text(json.dumps(value))
    wrong_type = config | {"train": config["train"] | {"tgt_len": "long"}}
    steps = lambda w: [p for p in (w / "checkpoints").iterdir() if p.name.isdecimal()]
    harm = lambda w: [(step / "checksums.json").unlink() for step in steps(w)]
    for name, change, message in [
        ("no checkpoint", lambda w: shutil.rmtree(w / "checkpoints"), "holds no checkpoint"),
        ("no sound checkpoint", harm, "No sound checkpoint"),
        ("no vocabulary", lambda w: (w / "vocab.txt").unlink(), r"no vocabulary file .*vocab\.txt"),
        ("config cut", lambda w: (w / "config.json").write_text("{"), "not valid JSON"),
        ("config a list", write([1]), r"config\.json"),
        ("config of old", write(config | {"older": 1}), "another version .*older"),
        ("config wrong type", write(wrong_type), r"config\.json.*tgt_len"),
    ]:
        refused(broken(name, change), message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=1.0", r"--config\.train\.lr belongs to the training of"),
        ("model.d_model=8", r"--config\.model\.d_model belongs to the training of"),
        ("eval.checkpoint=3", r"has no checkpoint 3: choose latest, best or one of \[2, 4\]"),
        ("eval.checkpoint=first", "checkpoint must be best, latest or the number .* got 'first'"),
        ("eval.stride=0", "config.eval.stride must be a whole number of at least 1, got 0"),
        ("eval.stride=9", "stride must lie between 1 and the window of 8, got 9"),
        ("eval.tgt_len=-1", "config.eval.tgt_len must be a whole number of at least 0, got -1"),
        ("eval.batch_size=-1", "config.eval.batch_size must be a whole number of at least 0, got"),
        ("eval.split_stream=True", "split_stream needs config.eval.batch_size"),
        ("eval.batch_size=100 --config.eval.split_stream=True", "too few to score 100 rows"),
        ("data.dir=/nowhere", "There is no folder /nowhere"),
        ("eval.no_such=1", "no_such"),
    ],
)
def test_evaluation_with_wrong_settings(trained, override, message):
    before = contents(trained[0])
    overrides = f"--config.{override}".split(" ")
    refused(evaluate("valid", trained[0], *overrides), message)
    assert contents(trained[0]) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generate.top_p=0", r"top_p must be a number above 0 and at most 1 \(all words\), got 0"),
        ("generate.temperature=-1", "temperature must be a number of at least 0, got -1"),
        ("generate.checkpoint=3", r"has no checkpoint 3: choose latest, best or one of \[2, 4\]"),
        (
            "generate.checkpoint=best,latest",
            "generate.checkpoint must be best, latest or the",
        ),
        (
            f"generate.seed={10**21}",
            r"seed must be .* at most 4294967295, got 10+\.",
        ),
        ("eval.tgt_len=-1", "config.eval.tgt_len must be a whole number of at least 0, got -1"),
        ("eval.mem_len=-1", "config.eval.mem_len must be a whole number of at least 0, got -1"),
    ],
)
def test_generation_with_wrong_settings(trained, override, message):
    before = contents(trained[0])
    refused(evaluate("generate", trained[0], f"--config.{override}"), message)
    assert contents(trained[0]) == before
