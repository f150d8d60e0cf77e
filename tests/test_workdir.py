"""A run's folder as the installed package opens it; settings of earlier versions and others."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from program import DPFP, SIZES, call

from configs import default
from fwm import workdir
from fwm.data import Vocabulary
from fwm.errors import UserError


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
