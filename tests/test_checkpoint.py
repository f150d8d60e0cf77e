"""Checkpoints: round trips, what is kept, every kind of damage, kills, full disks, locks."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fwm.checkpoint import Checkpoints
from fwm.errors import UserError
from fwm.files import lock_workdir, read_json, write_json


def make_state(step, memory=None):
    value = float(step)
    params = {
        "layer_0": {"kernel": jnp.full((5, 3), value), "bias": jnp.zeros(3, jnp.bfloat16)},
        "layers": [jnp.arange(4), (jnp.ones(()), None)],
    }
    return {
        "params": params,
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params),
        "step": np.int32(step),
        "rng": jax.random.key_data(jax.random.key(step)),
        "favor": {},
        "memory": memory,
        "nonzero": np.bool_(True),
    }


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, np.ndarray)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == np.asarray(b).tobytes()


def save_steps(directory, losses):
    with Checkpoints(directory) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), valid_loss=loss)


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def contents(directory):
    return {path: path.read_bytes() for path in files_of(directory)}


def test_round_trip_keeps_structure_dtypes_and_bits(tmp_path):
    state = make_state(7, memory=(np.random.default_rng(0).normal(size=(2, 3)), None))
    save_steps(tmp_path / "c", {})
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None
        checkpoints.save(7, state, valid_loss=1.0)
        step, got = checkpoints.restore(state)
    assert step == 7
    assert_same(got, state)
    assert isinstance(got["optimizer"][1][0], optax.ScaleByAdamState)
    with Checkpoints(tmp_path / "c") as checkpoints:
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        assert_same(checkpoints.restore(template)[1], state)


def test_replicated_arrays_are_saved_once(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    array = jax.device_put(np.arange(6.0, dtype=np.float32), NamedSharding(mesh, PartitionSpec()))
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"x": array}, valid_loss=None)
        np.testing.assert_array_equal(checkpoints.restore({"x": array})[1]["x"], np.arange(6.0))


def test_save_takes_a_copy(tmp_path):
    array = np.zeros(100_000, np.float32)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"x": array}, valid_loss=None)
        array += 1
        assert not checkpoints.restore({"x": array})[1]["x"].any()
        donated = jnp.zeros(100_000)
        checkpoints.save(2, {"x": donated}, valid_loss=None)
        jax.jit(lambda x: x + 1, donate_argnums=0)(donated).block_until_ready()
        assert not checkpoints.restore({"x": array})[1]["x"].any()


def test_latest_two_and_best_are_kept(tmp_path):
    directory = tmp_path / "c"
    save_steps(directory, {1: 3.0, 2: None, 3: 2.0, 4: float("nan")})
    save_steps(directory, {5: 2.5, 6: None, 7: 4.0})
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.steps() == [3, 6, 7]
        assert checkpoints.best_step() == 3
        assert checkpoints.latest_step() == 7
        assert checkpoints.restore(make_state(0), "best")[0] == 3
        assert checkpoints.restore(make_state(0), 6)[0] == 6
    save_steps(directory, {8: 1.0, 9: 5.0, 10: 5.0})
    assert sorted(path.name for path in directory.iterdir()) == ["10", "8", "9"]


def test_without_any_loss_the_latest_is_the_best(tmp_path):
    save_steps(tmp_path / "c", dict.fromkeys([1, 2, 3]))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.best_step() == 3


def test_subtree_without_a_template(tmp_path):
    directory = tmp_path / "c"
    save_steps(directory, {3: 1.0, 4: 2.0})
    with Checkpoints(directory) as checkpoints:
        step, got = checkpoints.restore_subtree(("params", "favor", "memory"), "best")
        assert step == 3
        assert sorted(got) == ["favor", "memory", "params"]
        assert got["favor"] == {}
        assert got["memory"] is None
        np.testing.assert_array_equal(got["params"]["layer_0"]["kernel"], np.full((5, 3), 3.0))
        assert checkpoints.restore_subtree(("step",), "latest")[1]["step"] == 4
        with pytest.raises(UserError, match=r"no checkpoint 5: .*\[3, 4\]"):
            checkpoints.restore_subtree(("params",), 5)
        with pytest.raises(UserError, match="has no weights: it holds favor, memory"):
            checkpoints.restore_subtree(("params", "weights"), "latest")
    for name in ("c2", "c3"):
        (tmp_path / "c3").mkdir(exist_ok=True)
        with (
            Checkpoints(tmp_path / name) as checkpoints,
            pytest.raises(UserError, match="no checkpoint"),
        ):
            checkpoints.restore_subtree(("params",), "latest")


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    save_steps(tmp_path / "c", {3: 1.0})
    good = make_state(0)
    kernel = np.zeros((5, 4), np.float32)
    wrong_shape = good | {"params": good["params"] | {"layer_0": {"kernel": kernel, "bias": None}}}
    with Checkpoints(tmp_path / "c") as checkpoints:
        for template, message in [
            (
                wrong_shape,
                r"in 2 arrays .*kernel is float32\[5, 3\] there and float32\[5, 4\] here",
            ),
            (good | {"new": np.zeros(2)}, r"new is absent there and float64\[2\] here"),
            ({k: v for k, v in good.items() if k != "rng"}, r"rng is uint32\[2\] there and absent"),
            (good | {"step": np.int64(0)}, r"step is int32\[\] there and int64\[\] here"),
        ]:
            with pytest.raises(UserError, match=message):
                checkpoints.restore(template)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_damage_to_any_file_is_named_and_the_previous_checkpoint_used(tmp_path, harm):
    directory = tmp_path / "c"
    save_steps(directory, {1: 2.0, 2: 1.0})
    names = [path.relative_to(directory / "2") for path in files_of(directory / "2")]
    assert len(names) > 5
    for name in names:
        kept = (directory / "2" / name).read_bytes()
        harm(directory / "2" / name)
        before = contents(directory)
        for which in ("latest", "best"):
            warnings: list[str] = []
            with Checkpoints(directory, warnings.append) as checkpoints:
                step, state = checkpoints.restore(make_state(0), which)
            assert step == 1
            assert_same(state, make_state(1))
            # A harmed loss may make another checkpoint the best one; it is sound then.
            if which == "latest" or str(name) != "metrics/metrics":
                assert len(warnings) == 1
                assert "checkpoint 2" in warnings[0]
                assert str(name) in warnings[0]
        assert contents(directory) == before
        (directory / "2" / name).write_bytes(kept)


def test_no_sound_checkpoint_refuses_to_start_over(tmp_path):
    directory = tmp_path / "c"
    save_steps(directory, {1: 2.0, 2: 1.0})
    flip(files_of(directory / "1" / "state")[0])
    (directory / "2" / "checksums.json").unlink()
    before = contents(directory)
    with Checkpoints(directory, lambda _: None) as checkpoints:
        assert checkpoints.latest_step() == 2
        with pytest.raises(UserError, match="No sound checkpoint"):
            checkpoints.restore(make_state(0))
        with pytest.raises(UserError, match="No sound checkpoint"):
            checkpoints.restore_subtree(("params",), 2)
    assert contents(directory) == before


def test_going_on_after_damage_sets_it_aside(tmp_path):
    directory = tmp_path / "c"
    save_steps(directory, {1: 2.0, 2: 3.0, 3: 4.0})
    flip(files_of(directory / "3" / "state")[-1])
    with Checkpoints(directory, lambda _: None) as checkpoints:
        assert checkpoints.restore(make_state(0))[0] == 2
        checkpoints.save(3, make_state(33), valid_loss=None)
        assert_same(checkpoints.restore(make_state(0))[1], make_state(33))
        # Damage that is found while saving goes on.
        flip(files_of(directory / "3" / "state")[-1])
        assert checkpoints.restore(make_state(0))[0] == 2
        checkpoints.save(4, make_state(4), valid_loss=None)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 4]
    assert [path.name for path in (tmp_path / "damaged_checkpoints").iterdir()] == ["3"]


def test_saving_a_saved_step_again_changes_nothing(tmp_path):
    save_steps(tmp_path / "c", {1: 2.0})
    before = contents(tmp_path / "c")
    save_steps(tmp_path / "c", {1: 1.0})
    assert contents(tmp_path / "c") == before


def test_killed_between_commit_and_checksums(tmp_path):
    directory = tmp_path / "c"
    save_steps(directory, {1: 2.0, 2: 1.0})
    (directory / "2" / "checksums.json").unlink()
    write_json(directory / "saving.json", 2)
    (directory / "3.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(directory, pytest.fail) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.best_step() == 1
        assert checkpoints.restore(make_state(0))[0] == 1
        checkpoints.save(2, make_state(2), valid_loss=1.0)
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]
    # The same at the very first save is a run without checkpoints: it may start over.
    shutil.rmtree(directory / "1")
    (directory / "2" / "checksums.json").unlink()
    write_json(directory / "saving.json", 2)
    with Checkpoints(directory, pytest.fail) as checkpoints:
        assert checkpoints.latest_step() is None


KILLED = """
import sys
import numpy as np
from pathlib import Path
from fwm.checkpoint import Checkpoints

with Checkpoints(Path(sys.argv[1])) as checkpoints:
    step, x = 0, np.zeros((64, 4096), np.float32)
    if checkpoints.latest_step() is not None:
        step, state = checkpoints.restore({"x": x})
        x = state["x"]
    print("from", step, flush=True)
    while True:
        step += 1
        x += 1
        checkpoints.save(step, {"x": x}, valid_loss=1.0 / step)
        print(step, flush=True)
"""


def test_sigkill_in_the_middle_of_saves(tmp_path):
    directory = tmp_path / "c"
    template = {"x": np.zeros((64, 4096), np.float32)}
    last = 0
    for delay in (0.003, 0.017, 0.026):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(directory)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == f"from {last}\n"
        for line in process.stdout:
            if int(line) >= last + 3:
                break
        time.sleep(delay)
        process.kill()
        _, rest = process.communicate()
        said = int(rest.split()[-1]) if rest else last + 3
        with Checkpoints(directory, pytest.fail) as checkpoints:
            last, state = checkpoints.restore(template)
        # The write that was killed is lost, the one before it is not.
        assert last >= said - 1
        assert (state["x"] == last).all()


def test_failed_writes_are_survived_twice_in_a_row(tmp_path, monkeypatch):
    directory = tmp_path / "c"
    warnings: list[str] = []
    save = ocp.CheckpointManager.save
    errors = {
        "orbax": OSError(28, "No space left on device", "/somewhere"),
        "tensorstore": ValueError("RESOURCE_EXHAUSTED: Error\nwriting"),
    }
    failing = {2: "orbax", 3: "tensorstore", 5: "orbax", 6: "tensorstore", 7: "orbax"}

    def flaky(self, step, **kwargs):
        if step in failing:
            (directory / f"{step}.orbax-checkpoint-tmp").mkdir()
            raise errors[failing[step]]
        return save(self, step, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", flaky)
    checkpoints = Checkpoints(directory, warnings.append)
    for step in range(1, 8):
        checkpoints.save(step, make_state(step), valid_loss=None)
    assert len(warnings) == 4
    assert "step 2 could not be written (No space left on device)" in warnings[0]
    assert "step 3 could not be written (Error writing)" in warnings[1]
    assert "last saved step is 1" in warnings[1]
    with pytest.raises(UserError, match=r"step 7 .* 3 failures in a row.* goes on from step 4"):
        checkpoints.close()
    assert sorted(path.name for path in directory.iterdir()) == ["1", "4"]


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def broken(self, step, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr(ocp.CheckpointManager, "save", broken)
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, make_state(1), valid_loss=None)
    with pytest.raises(TypeError, match="a bug"):
        checkpoints.close()
    with pytest.raises(ValueError, match="without elements"):
        Checkpoints(tmp_path / "d").save(1, {"x": np.zeros((0, 2))}, valid_loss=None)


FULL_DISK = """
import os, sys
import numpy as np
from pathlib import Path
from fwm.checkpoint import Checkpoints
from fwm.errors import UserError

workdir = Path(sys.argv[1])
state = {"x": np.random.default_rng(0).normal(size=100_000)}
with Checkpoints(workdir / "c", lambda line: print("WARNED", line)) as checkpoints:
    checkpoints.save(1, state, valid_loss=None)
    checkpoints.wait()
    (workdir / "ballast").write_bytes(bytes(2_000_000))
    for step in (2, 3):
        checkpoints.save(step, state, valid_loss=None)
        checkpoints.wait()
    (workdir / "ballast").unlink()
    checkpoints.save(4, state, valid_loss=None)
    checkpoints.wait()
    (workdir / "ballast").write_bytes(bytes(1_200_000))
    try:
        for step in (5, 6, 7, 8):
            checkpoints.save(step, state, valid_loss=None)
    except UserError as error:
        print("STOPPED", error)
    step, got = checkpoints.restore(state)
    print("RESTORED", step, checkpoints.steps(), (got["x"] == state["x"]).all())
    print("LEFT", sorted(os.listdir(workdir / "c")))
"""


def test_a_disk_that_is_really_full(tmp_path):
    mount = f"mount -t tmpfs -o size=3m tmpfs {tmp_path}"
    unshare = ["unshare", "-rm", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount]).returncode:
        pytest.skip("needs user namespaces to mount a small tmpfs")
    command = [*unshare, f'{mount} && exec "$0" "$@"', sys.executable, "-c", FULL_DISK, tmp_path]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "Traceback" not in done.stderr
    assert [line.split()[0] for line in lines] == ["WARNED"] * 4 + ["STOPPED", "RESTORED", "LEFT"]
    assert "No space left on device" in lines[0]
    assert "step 7" in lines[4]
    assert lines[5:] == ["RESTORED 4 [1, 4] True", "LEFT ['1', '4']"]


def full_disk(*args):
    raise OSError(28, "No space left on device")


def test_json_files(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json(path, {"lr": 0.1, "name": "é"})
    assert read_json(path) == {"lr": 0.1, "name": "é"}
    assert os.listdir(tmp_path) == ["config.json"]
    with pytest.raises(TypeError):
        write_json(path, {"lr": {1, 2}})
    assert read_json(path)["lr"] == 0.1
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"lr": 0.2})
    assert read_json(path)["lr"] == 0.1
    assert os.listdir(tmp_path) == ["config.json"]
    for text in (b"", b"{", b"\xff\xfe", b"[" * 200_000):
        path.write_bytes(text)
        with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
            read_json(path)
    with pytest.raises(UserError, match=r"nothing\.json cannot be read"):
        read_json(tmp_path / "nothing.json")


LOCKED = """
import sys, time
from pathlib import Path
from fwm.files import lock_workdir

with lock_workdir(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_lock_names_its_owner_and_is_taken_over_from_the_dead(tmp_path):
    workdir = tmp_path / "run"
    with lock_workdir(workdir):
        owner = json.loads((workdir / "lock").read_text())
        assert owner == {"host": socket.gethostname(), "pid": os.getpid()}
        with pytest.raises(UserError, match=str(os.getpid())), lock_workdir(workdir):
            pass
        assert json.loads((workdir / "lock").read_text()) == owner
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(UserError, match="cannot be written"), lock_workdir(tmp_path / "file"):
        pass
    process = subprocess.Popen(
        [sys.executable, "-c", LOCKED, str(workdir)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with (
        pytest.raises(UserError, match=f"{socket.gethostname()}.*{process.pid}"),
        lock_workdir(workdir),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with lock_workdir(workdir):
        assert json.loads((workdir / "lock").read_text()) == owner
