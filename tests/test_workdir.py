"""A run's folder as the installed package opens it; settings of earlier versions and others."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import DPFP, SIZES, call, evaluate, refused, write_text
from real_runs import log

from configs import default
from fwm import __version__, parallel, workdir
from fwm import train as training
from fwm.data import Vocabulary
from fwm.errors import UserError
from fwm.optimizer import learning_rate
from fwm.step import to_host

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def trained(place):
    """A finished run of this module's own."""
    settings = SIZES | {"data.dir": place / "text", "data.cache_dir": place / "cache"}
    settings |= {"train.max_step": 2}
    fields = [f"--config.{name}={value}" for name, value in settings.items()]
    assert call(f"--config={DPFP}", f"--workdir={place / 'run'}", *fields)[0] == 0
    return place / "run"


def test_what_was_trained_is_opened(trained):
    run = workdir.open(trained)
    assert (run.step, len(run.vocab), run.config.train.max_step) == (2, 6, 2)
    tokens = run.vocab.encode("the cat sat")[None]
    nll, _ = run.model.apply(run.variables, jnp.asarray(tokens), jnp.asarray(tokens))
    assert np.isfinite(np.asarray(nll)).all()
    with pytest.raises(UserError, match="has no checkpoint 1"):
        workdir.open(str(trained), 1)
    with pytest.raises(UserError, match="holds no run"):
        workdir.open(trained / "checkpoints")


def change(trained, tmp_path, **changes):
    """A copy of the run's settings, with some (of the top level) set, or left out where None."""
    saved = json.loads((trained / "config.json").read_text()) | changes
    saved = {name: value for name, value in saved.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    return tmp_path


def test_a_key_that_a_run_lacks_has_its_default(trained, tmp_path):
    before = change(trained, tmp_path, task=None, registered_in=None)
    config = workdir.config_of_run(before, {})
    assert config.to_dict() == workdir.config_of_run(trained, {}).to_dict()


def test_resuming_a_run_that_lacks_a_key(train, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    change(trained, tmp_path, task=None, registered_in=None)
    status, out, err = train(tmp_path, train__max_step=2)
    assert (status, err) == (0, "")
    assert "Resuming" in out
    assert json.loads((tmp_path / "config.json").read_text())["task"] == "text"


def test_a_key_that_is_gone_is_refused_only_where_it_was_not_at_its_default(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(workdir, "GONE", {"older": 1, "group.older": ()})
    before = change(trained, tmp_path, older=1, group={"older": []})
    assert "older" not in workdir.config_of_run(before, {})
    for changes in ({"older": 2}, {"group": {"older": [3]}}, {"group": {"newer": 1}}):
        with pytest.raises(UserError, match=r"another version .* (group\.)?(old|new)er are not"):
            workdir.config_of_run(change(trained, tmp_path, **changes), {})


def test_keys_and_names_of_ones_own_name_the_file_they_come_from(trained, tmp_path):
    own = {"registered_in": "/mine/own.py"}
    with pytest.raises(UserError, match=r"not known here \(older\): give --config=/mine/own\.py,"):
        workdir.config_of_run(change(trained, tmp_path, older=1, **own), {})
    named = change(trained, tmp_path, task="mine", **own)
    with pytest.raises(UserError, match=r"own\.py, which registers task=mine: give --config=/mine"):
        workdir.config_of_run(named, {})


def test_another_text_is_refused(tmp_path):
    config, vocab = default.get_config(), Vocabulary(("<eos>", "a", "b"))
    texts = {"train": {"digest": "aa", "tokens": 9}}
    workdir.claim_workdir(tmp_path, config, vocab, False, texts)
    later = texts | {"test": {"digest": "cc", "tokens": 2}}
    workdir.claim_workdir(tmp_path, config, vocab, True, later)
    assert workdir.texts_of_run(tmp_path) == later
    config.train.eval_interval, config.train.log_interval = 7, 3
    workdir.claim_workdir(tmp_path, config, vocab, True, {})
    assert workdir.texts_of_run(tmp_path) == later
    other = {"train": {"digest": "bb", "tokens": 8}}
    with pytest.raises(UserError, match=r"train split has 9 tokens .* aa, this one 8 with bb"):
        workdir.claim_workdir(tmp_path, config, vocab, True, other)
    for symbols, message in (
        (("<eos>", "a", "c"), "entry 2 of its vocabulary of 3 is 'b' and of this one of 3 'c'"),
        (("<eos>", "a"), "entry 2 of its vocabulary of 3 is 'b' and of this one of 2 nothing"),
    ):
        with pytest.raises(UserError, match=message):
            workdir.claim_workdir(tmp_path, config, Vocabulary(symbols), True, texts)
    assert workdir.texts_of_run(tmp_path) == later
    # A run of an earlier version is of the text that it is resumed with.
    (tmp_path / "text.json").unlink()
    workdir.claim_workdir(tmp_path, config, vocab, True, other)
    assert workdir.texts_of_run(tmp_path) == other


def test_what_may_differ_are_settings():
    known = workdir.flatten(default.defaults().to_dict())
    for field in (*workdir.FREE_FIELDS, *workdir.EVALUATION_FIELDS):
        assert any(re.match(re.escape(field), key) for key in known), field


def test_the_table_of_what_may_change_is_what_the_code_does(tmp_path):
    """Each key is changed in turn; the row of the table that names it says what follows."""
    table = README.read_text().split("| when a run goes on |")[1].split("\n\n")[0]
    rows = {}
    for line in table.splitlines()[2:]:
        names, follows = line.strip("|").split("|")
        rows |= dict.fromkeys(re.findall("`([^`]+)`", names), follows.strip().split(":")[0])
    config, vocab = default.get_config(), Vocabulary(("<eos>", "a"))
    config.init_from = "runs/a"
    workdir.claim_workdir(tmp_path, config, vocab, False)
    before = workdir.saved_config(tmp_path)
    used = set()
    for key, value in before.items():
        name = max((n for n in rows if key.startswith(n.rstrip("*"))), key=len)
        used.add(name)
        other = {bool: not value, int: 10**7, float: 0.75, str: "another", tuple: (1,)}[type(value)]
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({key: other})
        claim = lambda changed=changed, **how: workdir.claim_workdir(
            tmp_path, changed, vocab, True, **how
        )
        if rows[name] == "may change":
            claim()
            continue
        with pytest.raises(UserError, match=f"{re.escape(key)} was .* and is now"):
            claim()
        if rows[name] == "may rise, with `--extend`":
            claim(extend=True)
            (tmp_path / "config.json").write_text(config.to_json())
        elif rows[name] == "may be left out":
            changed.init_from, changed.init_checkpoint = "", "best"
            claim()
            assert workdir.saved_config(tmp_path)["init_from"] == "runs/a"
        else:
            assert rows[name] == "must stay"
    assert used == rows.keys()


def test_a_moved_run_is_evaluated_and_trained_longer(train, trained, tmp_path):
    first = shutil.copytree(trained, tmp_path / "a")
    moved = first.rename(tmp_path / "b")
    assert evaluate("valid", moved)[0] == 0
    refused(
        train(moved, train__max_step=5),
        "max_step was 2 and is now 5; use the same settings to resume it, --extend to train it lo",
    )
    refused(train(moved, "--extend", train__max_step=1), "was 2 and is now 1; .* it, or another")
    refused(train(first, "--extend"), "a holds no run with a checkpoint that --extend could make")
    refused(evaluate("valid", moved, "--extend"), "--extend belongs to training, but the mode is")
    status, out, err = train(moved, "--extend", train__max_step=4)
    assert (status, err) == (0, "")
    assert f"Resuming {moved} at step 2." in out
    rates = [float(learning_rate("cosine", 0.003, 1, 4)(jnp.float32(t))) for t in (3, 4)]
    assert (
        "Longer: 4 steps in place of 2. The schedule cosine now goes to the new end: the learning "
        f"rate of step 3 is {rates[0]:.3g}, it would have been 0.\n"
    ) in out
    rows = [row for row in log(moved) if row["split"] == "train"]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    found = [float(row["learning_rate"]) for row in rows[2:]]
    np.testing.assert_allclose(found, rates, rtol=1e-5, atol=1e-9)
    assert workdir.open(moved, "latest").config.train.max_step == 4
    # Nothing that is read there says where it was.
    for path in (*moved.glob("*.json"), *moved.glob("*.csv")):
        assert not any(str(place) in path.read_text() for place in (trained, first)), path


def test_a_run_begins_with_the_weights_of_another(trained, place, tmp_path, capsys):
    other = shutil.copytree(trained, tmp_path / "a")
    learnt = jax.device_get(workdir.open(other, 2).variables["params"])
    text = write_text(
        tmp_path / "text", train="the cat sat on the rug\n" * 20, valid="the rug\n" * 9
    )
    config, new = default.defaults(), tmp_path / "new"
    config.model.update({"feature_map": "dpfp", "update_rule": "delta"})
    fields = {"data.dir": str(text), "data.cache_dir": str(place / "cache")}
    config.update_from_flattened_dict(SIZES | fields | {"init_from": str(other)})
    config.init_checkpoint = "7"
    with pytest.raises(UserError, match=r"has no checkpoint 7"), training.prepare(config, new):
        pass
    assert not new.exists()
    config.init_from = ""
    with pytest.raises(UserError, match="init_from, which is not given"):
        training.prepare(config, new).__enter__()
    config.init_from, config.init_checkpoint = str(other), "best"
    with training.prepare(config, new) as this:
        params = jax.device_get(parallel.first(this.state.params))
        this.checkpoints.save(0, to_host(this.state), valid_loss=None)
    line = (
        f"Weights of {other}, step 2: 5 of 6 words are matched, 1 are new; of the model dropout is "
        "0.1 there and 0.0 here."
    )
    assert line in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, params["layers"], learnt["layers"])
    then, now = workdir.open(other).vocab, this.task.vocab
    rows, were = params["embedding"]["table_0"], learnt["embedding"]["table_0"]
    for word in ("<eos>", "the", "cat", "sat", "on"):
        np.testing.assert_array_equal(rows[now.index[word]], were[then.index[word]])
    # The run knows where it came from, and goes on without it.
    saved = json.loads((new / "config.json").read_text())
    assert saved["begun_from"] == {"run": str(other), "step": 2}
    assert saved["written_by"]["version"] == __version__
    shutil.rmtree(other)
    config.init_from = ""
    with training.prepare(config, new) as this:
        jax.tree.map(
            np.testing.assert_array_equal, jax.device_get(parallel.first(this.state.params)), params
        )
    again = json.loads((new / "config.json").read_text())
    assert (again["begun_from"], again["init_from"]) == (saved["begun_from"], str(other))
    config.init_from = "runs/c"
    refusal = pytest.raises(UserError, match=r"init_from was '.*a' and is now 'runs/c'")
    with refusal, training.prepare(config, new):
        pass


def test_a_run_that_begins_with_anothers_weights_reads_its_subwords(place, tmp_path):
    pytest.importorskip("tokenizers", reason="subwords are found by the package tokenizers")
    config, first, second = default.defaults(), tmp_path / "a", tmp_path / "b"
    fields = {"data.dir": str(place / "text"), "data.cache_dir": str(place / "cache")}
    fields |= {"data.tokenizer": "bpe", "data.vocab_size": 260, "model.mixer": "softmax"}
    config.update_from_flattened_dict(SIZES | fields)

    def begin(workdir):
        with training.prepare(config, workdir) as this:
            this.checkpoints.save(0, to_host(this.state), valid_loss=None)
        return this.task.vocab

    vocab = begin(first)
    config.data.dir = str(write_text(tmp_path / "text", train="a rug is a rug is a rug\n" * 30))
    own = begin(tmp_path / "c")
    config.init_from = str(first)
    assert begin(second) == vocab != own
    config.init_from = ""  # Going on, too.
    assert begin(second) == vocab
