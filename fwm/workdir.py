"""A run's folder: claim it for a training, open what was trained in it.

Needs nothing but the installed package: no config file, and none is ever executed because a run
names it.
"""

import itertools
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fwm import registry
from fwm.checkpoint import Checkpoints
from fwm.config import build_config, check, defaults
from fwm.data import Vocabulary
from fwm.errors import UserError
from fwm.files import flatten, read_json, write_json
from fwm.model import LanguageModel
from fwm.terminal import say
from fwm.version import written_by

# What may differ when a run is resumed: where things are, what is reported, and what another
# machine may need; none of it changes what the run is about.
FREE_FIELDS = (
    "data.dir", "data.file", "data.cache_dir", "data.download", "report.", "eval.", "generate.",
    "model.dtype", "model.matmul_precision", "train.batch_chunk", "train.eval_batch_size",
    "train.nan_policy", "train.profile_steps", "train.eval_interval", "train.log_interval",
    "train.save_minutes", "registered_in",
)  # fmt: skip
# Of a run's beginning: a resumed one keeps them where they are not given again.
BEGINNING = ("init_from", "init_checkpoint")
# What stands in config.json beside the settings: the fwm that wrote it, and the run whose weights
# this one began with.
WRITTEN_BY, BEGUN_FROM = "written_by", "begun_from"
# What an evaluation may change; everything else is the run's own.
EVALUATION_FIELDS = (
    "data.", "eval.", "generate.", "report.", "model.dtype", "model.matmul_precision",
)  # fmt: skip
TEXTS = "text.json"
# Keys that earlier versions had, with the value that they must have had.
GONE: Mapping[str, Any] = {}


def check_holds_run(workdir: Path) -> None:
    """Raise `UserError` unless a run was trained in `workdir`."""
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir} holds no run (no config.json): give the --workdir of a trained one."
        )


def saved_config(workdir: Path) -> dict[str, Any]:
    """The settings of the run in `workdir`, with dotted keys.

    A key that its version did not have yet has its default, which means "as before".

    Raises:
        UserError: there are none, the file is damaged, or it has keys that are not known here.
    """
    path = workdir / "config.json"
    saved = read_json(path)
    if not isinstance(saved, dict):
        raise UserError(f"{path} is damaged: expected groups of settings.")
    notes = (WRITTEN_BY, BEGUN_FROM)
    saved = flatten({key: value for key, value in saved.items() if key not in notes})
    known = flatten(defaults().to_dict())
    gone = {key for key, value in GONE.items() if saved.get(key) == value}
    unknown = ", ".join(sorted(saved.keys() - known - gone))
    if unknown and saved.get("registered_in"):
        raise UserError(
            f"{path} has settings that are not known here ({unknown}): give "
            f"--config={shlex.quote(saved['registered_in'])}, the file that the run was trained "
            "with."
        )
    if unknown:
        raise UserError(
            f"{path} is of another version of fwm: its settings {unknown} are not known "
            "here; evaluate it with the version that trained it."
        )
    return known | {key: value for key, value in saved.items() if key in known}


def claim_workdir(
    workdir: Path,
    config: Any,
    vocab: Vocabulary,
    resume: bool,
    texts: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    *,
    begun_from: Mapping[str, Any] | None = None,
    extend: bool = False,
) -> None:
    """Write what a run is of into its workdir; if a run is resumed, refuse a different one.

    That is config.json, vocab.txt and text.json. The last has `texts`, the task's own; a run of an
    earlier version has none, and is taken to be of the text that it is first resumed with.

    Args:
        workdir: its folder.
        config: all settings.
        vocab: of the task.
        resume: whether it has a checkpoint.
        texts: by split.
        begun_from: the run whose weights it begins with, to be remembered.
        extend: `train.max_step` may be raised.

    Raises:
        UserError: the workdir holds a run with other settings (each is listed) or another text, or
            none that could be extended.
    """
    path = workdir / "config.json"
    new = config.copy_and_resolve_references().to_dict()
    if extend and not resume:
        raise UserError(
            f"{workdir} holds no run with a checkpoint that --extend could make longer: give the "
            "--workdir of one, or leave --extend out."
        )
    if resume:
        then = saved_config(workdir)
        begun_from = read_json(path).get(BEGUN_FROM)
        if not new["init_from"]:
            new |= {key: then[key] for key in BEGINNING}
        now = flatten(new)
        longer = now["train.max_step"] > then["train.max_step"]
        free = (*FREE_FIELDS, *["train.max_step"] * (extend and longer))
        differing = [
            f"{key} was {then.get(key)!r} and is now {now.get(key)!r}"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key) and not key.startswith(free)
        ]
        if differing:
            raise UserError(
                f"{workdir} holds a run with other settings: {'; '.join(differing)}; "
                "use the same settings to resume it, "
                f"{'--extend to train it longer, ' * (longer and not extend)}or another --workdir."
            )
        old = Vocabulary.load(workdir / "vocab.txt")
        if old.symbols != vocab.symbols:
            raise UserError(
                f"{workdir} holds a run on another text: {_first_difference(old, vocab)}; give the "
                "same text or another --workdir."
            )
        for split, was in texts_of_run(workdir).items():
            is_now = texts.get(split, was)
            if is_now["digest"] != was["digest"]:
                raise UserError(
                    f"{workdir} holds a run on another text: its {split} split has "
                    f"{was['tokens']} tokens with the digest {was['digest']}, this one "
                    f"{is_now['tokens']} with {is_now['digest']}; give the same text or another "
                    "--workdir."
                )
        texts = {**texts_of_run(workdir), **texts}
    write_json(workdir / TEXTS, {split: dict(text) for split, text in texts.items()})
    vocab.save(workdir / "vocab.txt")
    origin = {BEGUN_FROM: dict(begun_from)} if begun_from else {}
    write_json(path, new | origin | {WRITTEN_BY: written_by()})
    # Made now: what stands in its way is to be told before hours of work, not at the first save.
    (workdir / "checkpoints").mkdir(exist_ok=True)


def _first_difference(old: Vocabulary, new: Vocabulary) -> str:
    pairs = itertools.zip_longest(old.symbols, new.symbols)
    number, (then, now) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    word = lambda symbol: "nothing" if symbol is None else repr(symbol)
    return (
        f"entry {number} of its vocabulary of {len(old)} is {word(then)} and of this one of "
        f"{len(new)} {word(now)}"
    )


def texts_of_run(workdir: Path) -> dict[str, dict[str, Any]]:
    """By split, the text that a run is of: at least `digest` and `tokens`; {} of an older version.

    Raises:
        UserError: the file is damaged.
    """
    path = workdir / TEXTS
    if not path.exists():
        return {}
    texts = read_json(path)
    if not isinstance(texts, dict) or not all(
        isinstance(text, dict) and {"digest", "tokens"} <= text.keys() for text in texts.values()
    ):
        raise UserError(f"{path} is damaged: restore it, or remove it to have no text checked.")
    return texts


def config_of_run(workdir: Path, overrides: Mapping[str, Any]) -> ConfigDict:
    """The config that a run was trained with, and what the command line changes of it.

    Raises:
        UserError: no run there, a config of another version, names that only the config file it
            was trained with registers, or a change that evaluation cannot make.
    """
    check_holds_run(workdir)
    for name in overrides:
        if not name.startswith(EVALUATION_FIELDS):
            raise UserError(
                f"--config.{name} belongs to the training of {workdir} and cannot be changed for "
                f"an evaluation, which may change {', '.join(EVALUATION_FIELDS)}."
            )
    config = _read_config(workdir)
    if overrides.keys() & {"data.dir", "data.file"}:  # Another text instead of the run's own.
        config.data.dir = config.data.file = ""
    config.update_from_flattened_dict(overrides)
    return config.lock()


def _read_config(workdir: Path, needed: str = "") -> ConfigDict:
    """A run's config; refused where a name is not registered that a key under `needed` has."""
    saved, config = saved_config(workdir), defaults()
    missing = registry.missing({k: v for k, v in saved.items() if k.startswith(needed)})
    if missing and saved["registered_in"]:
        raise UserError(
            f"{workdir} was trained with {saved['registered_in']}, which registers "
            f"{', '.join(missing)}: give "
            f"--config={shlex.quote(saved['registered_in'])} too."
        )
    check(saved, f"in {workdir / 'config.json'}, ")
    config.update_from_flattened_dict(saved)
    return config


def restore(
    workdir: Path, model: LanguageModel, which: str, report: Callable[[str], None] = say
) -> tuple[int, dict[str, Any]]:
    """A checkpoint's step and the model's variables; `which`: best, latest, or a step's number.

    Raises:
        UserError: no such checkpoint, none that is sound, or parameters of another model.
    """
    wanted: Any = int(which) if which.isdecimal() else which
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    draws = dict(jax.eval_shape(model.init, jax.random.key(0), token, token))
    like = {"params": draws.pop("params"), "favor": draws}
    with Checkpoints(workdir / "checkpoints", report=report) as checkpoints:
        step, saved = checkpoints.restore_subtree(("params", "favor"), wanted, like)
    return step, {"params": saved["params"], **(saved["favor"] or {})}


class OpenedRun(NamedTuple):
    """What a trained run consists of."""

    config: ConfigDict
    vocab: Vocabulary
    model: LanguageModel
    variables: Any  # on the device
    step: int  # of the checkpoint they are from


def open(path: str | Path, which: str | int = "best") -> OpenedRun:
    """Open what was trained in a workdir; the task that it was trained on need not be known.

        run = fwm.workdir.open("runs/a")
        nll, memory = run.model.apply(run.variables, tokens, targets)

    Args:
        path: the workdir.
        which: checkpoint: best, latest, or a step.

    Raises:
        UserError: as `config_of_run` and `restore`.
    """
    workdir = Path(path)
    check_holds_run(workdir)
    config = _read_config(workdir, needed="model.").lock()
    vocab = Vocabulary.load(workdir / "vocab.txt")
    model = LanguageModel(build_config(config.model.to_dict(), len(vocab)))
    step, variables = restore(workdir, model, str(which))
    return OpenedRun(config, vocab, model, jax.device_put(variables), step)
