"""Finished runs beside each other: exact results in a table, curves in one figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fwm.errors import UserError
from fwm.files import read_json
from fwm.reporting.figures import draw_learning_curves
from fwm.reporting.sinks import LOG, log_rows

# What decides whether a run is one that the paper reports.
DECIDING = (
    "data.name",
    "data.documents",
    "data.file",
    "data.tokenizer",
    "model.",
    "train.tgt_len",
    "train.carry_over_fast_weight",
)
# Settings that say where things are and what is told, not what a run is.
UNINTERESTING = ("data.dir", "data.cache_dir", "data.download", "eval.", "generate.", "report.",
                 "registered_in", "train.profile_steps")  # fmt: skip


def compare(
    workdirs: Sequence[Path],
    out: Path,
    paper: Mapping[Path, str] = MappingProxyType({}),
    trained: Mapping[Path, Mapping[str, Any]] = MappingProxyType({}),
    texts: Mapping[Path, Mapping[str, Any]] = MappingProxyType({}),
) -> str:
    """Draw the learning curves of several runs into `out`; returns a table of exact results.

    Args:
      workdirs: the runs.
      out: the figure; its suffix gives the format.
      paper: what the paper reports for a run, as text.
      trained: settings of a run, with dotted keys; a result that was found with another window,
        `mem_len` or `clamp_len` than these says so, and so does one of a checkpoint that is not
        of the last step.
      texts: of a run, by split, its text with its `digest`; a result on another is not shown.

    Raises:
      UserError: a workdir has no train_log.csv, or a result file is malformed.
    """
    table = [["run", "steps", "valid perplexity", "test perplexity", "paper (valid / test)"]]
    for workdir in workdirs:
        if not (workdir / LOG).is_file():
            raise UserError(f"{workdir} has no {LOG}: --workdir must list runs that were trained.")
        steps = max((int(row["step"]) for row in log_rows(workdir / LOG)), default=0)
        settings = trained.get(workdir, {})
        now = (steps, settings, texts.get(workdir, {}))
        valid, test = (exact_perplexity(workdir, split, *now) for split in ("valid", "test"))
        table.append([str(workdir), str(steps), valid, test, paper.get(workdir, "-")])
    try:
        names = names_of(workdirs, [trained.get(workdir, {}) for workdir in workdirs])
        logs = {name: path / LOG for name, path in zip(names, workdirs, strict=True)}
        draw_learning_curves(logs, out)
        figure = f"Learning curves: {out}"
    except OSError as error:
        figure = f"Warning: the figure {out} cannot be written ({error.strerror})."
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join([*lines, figure])


def what_differs(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings, with dotted keys, of which these runs have several values."""
    keys = {key for run in settings for key in run if not key.startswith(UNINTERESTING)}
    return sorted(key for key in keys if len({repr(run.get(key)) for run in settings}) > 1)


def names_of(workdirs: Sequence[Path], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """By the settings that differ, where these are few; else, and where equal, by the folder."""
    differing = what_differs(settings)
    named = [
        ", ".join(f"{key.rpartition('.')[2]} {run.get(key)}" for key in differing)
        for run in settings
    ]
    short = all(0 < len(name) <= 80 for name in named) and len(set(named)) == len(named)
    folders = [workdir.resolve().name for workdir in workdirs]
    if len(set(folders)) < len(folders):
        folders = [str(workdir) for workdir in workdirs]
    return named if short else folders


def exact_perplexity(
    workdir: Path,
    split: str,
    steps: int,
    trained: Mapping[str, Any],
    texts: Mapping[str, Mapping[str, Any]],
) -> str:
    """What `split`_results.json says of a run of `steps` steps, with notes as `compare` has; or -.

    Raises:
      UserError: the file is malformed.
    """
    path = workdir / f"{split}_results.json"
    if not path.exists():
        return "-"
    result = read_json(path)
    # Too large for a number of JSON it is null; the mean nll is there all the same.
    overflown = isinstance(result, dict) and result.get("perplexity", 0) is None
    known = "mean_nll" if overflown else "perplexity"
    if not isinstance(result, dict) or not isinstance(result.get(known), int | float):
        mode = "eval" if split == "test" else split
        raise UserError(f"{path} has no number `{known}`: write it again with --mode={mode}.")
    text, step = result.get("text") or {}, result.get("checkpoint_step", steps)
    if not isinstance(text, dict) or not isinstance(step, int):
        raise UserError(f"{path} is damaged: remove it, and evaluate again.")
    if split in texts and text.get("digest", texts[split]["digest"]) != texts[split]["digest"]:
        return "-"
    # What other protocols than the paper's have found is not to be mistaken for it.
    notes = []
    if result.get("stride") not in (None, 1):
        notes.append(f"stride {result['stride']}")
    if result.get("split_stream"):
        notes.append("rows")
    theirs = {"window": "train.tgt_len", "mem_len": "model.mem_len", "clamp_len": "model.clamp_len"}
    for name, setting in theirs.items():
        if name in result and result[name] != trained.get(setting, result[name]):
            notes.append(f"{name} {result[name]}")
    # Perplexities of words and of other tokens are not comparable; those per word are.
    per_word = result.get("perplexity_per_word")
    if isinstance(per_word, int | float) and per_word != result["perplexity"]:
        notes.append(f"per word {per_word:.3f}")
    if step != steps:
        notes.append(f"checkpoint of step {step} of {steps}")
    found = "inf" if overflown else f"{result['perplexity']:.3f}"
    return found + (f" ({', '.join(notes)})" if notes else "")


def paper_result(settings: Mapping[str, Any], published: Mapping[str, Mapping[str, Any]]) -> str:
    """What the paper reports for a run's model, text and context, where that is certain; else `-`.

    Args:
      settings: the run's, with dotted keys.
      published: by what is reported ("34.1 / 35.2"), the settings it is reported of.
    """
    for result, theirs in published.items():
        deciding = {k: v for k, v in theirs.items() if k.startswith(DECIDING)}
        deciding.pop("model.dtype", None)
        if all(name in settings and settings[name] == v for name, v in deciding.items()):
            return result
    return "-"
