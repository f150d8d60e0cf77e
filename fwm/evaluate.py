"""A run's splits: read the trained model, score it by its task's protocol, write the results.

How a model is scored is said in `fwm.score`, whose public names are importable from here too.
"""

import dataclasses
import itertools
import json
import math
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwm import data
from fwm.config import ModelConfig, check, evaluated
from fwm.errors import UserError
from fwm.files import replacing, write_json
from fwm.model import LanguageModel
from fwm.perplexity import perplexity
from fwm.score import (
    Partial,
    Score,
    ScoringProtocol,
    automatic_batch_size,
    carry_over,
    finish,
    sliding_window,
)
from fwm.tasks import TASKS
from fwm.terminal import say
from fwm.workdir import restore, texts_of_run

__all__ = ["Score", "automatic_batch_size", "carry_over", "reading", "run", "sliding_window"]

SAID_EVERY, SAVED_EVERY = 10.0, 60.0  # seconds
# What numpy makes of a damaged file.
DAMAGED = (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error)


def reading(config: Any, n_token: int) -> tuple[ModelConfig, bool, int]:
    """How a run's model reads after training.

    Returns:
        Its config, whether it carries a memory, and the tokens of a segment, or else of a window.

    Raises:
        UserError: a setting out of range, or without meaning for the model.
    """
    check(config.to_dict())
    c, t = config, config.train
    model = evaluated(c.model.to_dict(), c.eval.to_dict(), n_token)
    return model, model.carries(t.carry_over_fast_weight), c.eval.tgt_len or t.tgt_len


def run(
    config: Any, workdir: Path, splits: Sequence[str], report: Callable[[str], None] = say
) -> list[dict]:
    """Score `splits` with the checkpoints `config.eval.checkpoint` of `workdir`.

    Writes `<split>_results.json` there; of several checkpoints `<split>_results_<step>.json`; on
    another text than the run's own `<split>_results_<text>-<digest>.json`, and so on.
    Totals are saved every minute and at a KeyboardInterrupt: an evaluation that was killed or
    interrupted goes on from there, to exactly the same total.

    Raises:
        UserError: no run in workdir, no such checkpoint, no text for the split.
    """
    check(config.to_dict())
    chosen = itertools.product(splits, config.eval.checkpoint.split(","))
    return [_score_one(config, workdir, split, which, report) for split, which in chosen]


def _score_one(
    config: Any, workdir: Path, split: str, which: str, report: Callable[[str], None]
) -> dict:
    """Score one checkpoint on one split and write its results."""
    tell: Callable[[str], None] = lambda line: report(f"{split}: {line}")
    vocab = data.Vocabulary.load(workdir / "vocab.txt")
    task = TASKS[config.task](config, (split,), vocab)
    for warning in task.warnings:
        report(f"warning: {warning}")
    model_config, _, _ = reading(config, len(vocab))
    model = LanguageModel(model_config)
    step, variables = restore(workdir, model, which, report)
    protocol = task.protocol(config, model, variables, split)
    if protocol.settings()["stride"] is None and config.eval.stride != 1:
        tell(
            f"note: eval.stride={config.eval.stride} is not used: no window slides over the text, "
            "every token is scored once."
        )
    started = time.monotonic()
    # What decides a total to the last digit; a partial one goes on only with the same.
    key = {
        "step": step,
        "data": config.data.name,
        "devices": jax.local_device_count(),
        "dtype": config.model.dtype,
        **protocol.key(),
        **config.eval.to_dict(),
    }
    text = task.texts.get(split)
    own = texts_of_run(workdir).get(split)
    # Known only where both are: runs of earlier versions have no digest.
    of_run = text["digest"] == own["digest"] if text and own else None
    other = f"_{_file_name(text)}" if text and of_run is False else ""
    kept = PartialFile(workdir / f"{split}_partial{other}.npz", key)
    done = kept.load(protocol.empty())
    if done is not None:
        tell(f"going on after {done.score.count} of {done.expected} tokens.")
    last = _watched(protocol, done, kept, tell)
    score = finish([last])
    sums = {"nll": score.total_nll, "count": score.count, **last.sums}
    # The loss is the mean nll, which all results have.
    metrics = {name: x for name, x in task.metrics(sums).items() if name != "loss"}
    seconds = round(time.monotonic() - started, 3)
    results = {
        "split": split,
        "protocol": protocol.name,
        **protocol.settings(),
        "mem_len": model_config.mem_len,
        "clamp_len": model_config.clamp_len,
        "batch_size": config.eval.batch_size,
        "split_stream": config.eval.split_stream,
        "tokens": score.count,
        "mean_nll": score.mean_nll,
        "perplexity": score.perplexity,
        "bits_per_token": score.bits_per_token,
        "unit": task.unit,
        "checkpoint_step": step,
        "seconds": seconds,
        "text": None if text is None else {**text, "of_run": of_run},
        "dtype": config.model.dtype,
        "eval": config.eval.to_dict(),
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        **metrics,
    }
    compared = _compared(score, task.unit, text)
    results |= compared
    several = "," in config.eval.checkpoint
    path = workdir / f"{split}_results{other}{f'_{step}' if several else ''}.json"
    unit = "character" if task.unit == "character" else "token"
    tell(
        f"perplexity {score.perplexity:.3f}, {score.bits_per_token:.4f} bits per {unit}"
        + _told(compared, task.unit)
        + "".join(f", {name} {value:.4f}" for name, value in metrics.items())
        + f" over {score.count} tokens, checkpoint of step {step}, {seconds:.1f} s; {path}"
    )
    # Said before it is written, and the partial score goes last: nothing that was found is lost.
    try:
        write_json(path, {name: _strict(value) for name, value in results.items()})
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}), and the result stands only in the line "
            "above: make it writable and run the same command again."
        ) from error
    kept.path.unlink(missing_ok=True)
    return results


def _compared(score: Score, unit: str, text: Mapping[str, Any] | None) -> dict[str, float]:
    """What models of one text can be compared by whatever their tokens are, where it is known.

    A word is what a word model has as a token, ends of lines included. Tokens are not one to one
    with words, so the nll of all is spread over these: log p per word = log p per token * tokens /
    words. Bits per character and byte only where tokens can write every text, unlike words.
    """
    if text is None:
        return {}
    sizes = {"words": text["tokens"]} if unit == "word" else text
    names = [name for name in ("words", "characters", "bytes") if sizes.get(name)]
    per = {name: text["tokens"] / sizes[name] for name in names}
    found = {}
    if "words" in per:
        found["perplexity_per_word"] = perplexity(score.mean_nll * per["words"])
    for name, many in (("bits_per_character", "characters"), ("bits_per_byte", "bytes")):
        if many in per:
            found[name] = score.bits_per_token * per[many]
    return found


def _told(compared: Mapping[str, float], unit: str) -> str:
    if unit == "word" or "perplexity_per_word" not in compared:
        return ""
    bits = f", {compared['bits_per_character']:.4f} bits per character" * (unit != "character")
    return f"{bits}, perplexity per word {compared['perplexity_per_word']:.2f}"


def _file_name(text: Mapping[str, Any]) -> str:
    """Another text in the name of a file: what it is called, and the beginning of its digest."""
    called = Path(text["dir"]).name or text["name"]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', called)[:40]}-{text['digest'][:8]}"


def _strict(value: Any) -> Any:
    """JSON has no number that is not finite: null stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclasses.dataclass(frozen=True)
class PartialFile:
    """Where an evaluation keeps its partial score, and the `key` of what it scores how."""

    path: Path
    key: dict[str, Any]

    def save(self, partial: Partial) -> None:
        """Arrays without pickle; replaced at once: a kill leaves the old file or the new one."""
        leaves = jax.tree.leaves(partial.memory)
        arrays: dict[str, Any] = {
            "key": json.dumps(self.key),
            "total_nll": np.float64(partial.score.total_nll),
            "count": partial.score.count,
            "expected": partial.expected,
            "position": partial.position,
            # bfloat16 is no dtype of the file format; float32 holds it exactly.
            **{f"memory_{i}": np.asarray(leaf, np.float32) for i, leaf in enumerate(leaves)},
            **{f"sum_{name}": np.float64(value) for name, value in partial.sums.items()},
        }
        with replacing(self.path) as new, new.open("wb") as file:
            np.savez(file, **arrays)

    def load(self, memory: Any) -> Partial | None:
        """What an interrupted evaluation of the same key left, its memory shaped as `memory`.

        Raises:
            UserError: the file is damaged.
        """
        if not self.path.exists():
            return None
        leaves, structure = jax.tree.flatten(memory)
        try:
            # Opened here: of a file cut short, np.load leaves its own one open.
            with self.path.open("rb") as file:
                saved = dict(np.load(file, allow_pickle=False))
            if json.loads(str(saved["key"])) != self.key:
                return None
            leaves = [jnp.asarray(saved[f"memory_{i}"], x.dtype) for i, x in enumerate(leaves)]
            score = Score(float(saved["total_nll"]), int(saved["count"]))
            expected, position = int(saved["expected"]), int(saved["position"])
            sums = {
                k.removeprefix("sum_"): float(x) for k, x in saved.items() if k.startswith("sum_")
            }
        except DAMAGED as error:
            raise UserError(
                f"{self.path} is damaged ({error}): remove it to score from the start."
            ) from error
        return Partial(score, expected, position, jax.tree.unflatten(structure, leaves), sums)


def _watched(
    protocol: ScoringProtocol, done: Partial | None, kept: PartialFile, tell: Callable[[str], None]
) -> Partial:
    """The last partial score; every now and then, and at Ctrl-C, it is reported and saved."""
    started = said = saved = time.monotonic()
    partial: Any = done
    try:
        for partial in protocol.partials(done):
            now = time.monotonic()
            if now - saved >= SAVED_EVERY:
                saved = now
                try:
                    kept.save(partial)
                except OSError as error:
                    tell(f"warning: {kept.path} cannot be written ({error.strerror}); going on.")
            if now - said >= SAID_EVERY and partial.score.count:
                said = now
                position = partial.position - (done.position if done else 0)
                speed, score = position / (now - started), partial.score
                left = partial.position * (partial.expected / score.count - 1) / speed
                tell(
                    f"{score.count} of {partial.expected} tokens, {speed:.1f} {protocol.unit}/s, "
                    f"perplexity so far {score.perplexity:.2f}, {left:.0f} s left"
                )
    except KeyboardInterrupt:
        if partial is not None and partial.score.count:
            found = (
                f"interrupted; PARTIAL perplexity {partial.score.perplexity:.3f} over the first "
                f"{partial.score.count} of {partial.expected} tokens; "
            )
            try:
                kept.save(partial)
            except OSError as error:
                tell(f"{found}lost, as {kept.path} cannot be written ({error.strerror}).")
            else:
                tell(f"{found}the same command goes on from here.")
        raise
    return partial
