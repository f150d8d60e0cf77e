"""Models of the official toolkit as runs, and back: `--mode=import`, `--mode=export`.

Three files in one folder say what a model is there:

    model.pt          its state_dict, written by torch.save; or model.npz, by numpy.savez
    arguments.json    those of its constructor, MemTransformerLM, by their names, and tgt_len
    vocab.txt         its words in the order of their numbers, one a line

torch is needed for a model.pt alone. It reads arrays, and nothing that a file contains is executed:
what the toolkit's train.py saves, a whole module, is a program and is refused.
"""

import shlex
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fwm import workdir as workdirs
from fwm.checkpoint import Checkpoints
from fwm.config import defaults, model_keys
from fwm.data import Vocabulary
from fwm.errors import UserError
from fwm.files import lock_workdir, read_json, replacing, write_json
from fwm.interop import arguments_to_lmtool, from_lmtool, to_lmtool
from fwm.terminal import say

ARGUMENTS, WORDS = "arguments.json", "vocab.txt"
# Where the official toolkit is.
SAVING = (
    'torch.save(torch.load("best_model.pt", map_location="cpu", weights_only=False).state_dict(), '
    '"model.pt")'
)
HELP = (  # of the flag --official
    "The official toolkit's state_dict, which --mode=import reads and --mode=export writes: "
    f"model.pt (needs torch), or model.npz. Beside it lie {ARGUMENTS}, the arguments of its "
    f"constructor MemTransformerLM by name and tgt_len, and {WORDS}, its words in the order of "
    "their numbers, one a line. The toolkit's train.py saves a whole module, which only its own "
    f"code can read: {SAVING}"
)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The state_dict in a file of torch or numpy, as float32 arrays.

    Raises:
        UserError: there is no such file, torch is missing, or the file has anything else in it.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: expected a state_dict, model.pt or model.npz.")
    if path.suffix == ".npz":
        try:
            with path.open("rb") as file:
                arrays = dict(np.load(file, allow_pickle=False))
            return {name: x.astype(np.float32) for name, x in arrays.items()}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is no file of arrays that numpy can read: {error}.") from error
    torch = _torch(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: x.detach().to(torch.float32).numpy() for name, x in tensors.items()}
    except Exception as error:  # torch's own, of many kinds, some of which advise to execute it.
        raise UserError(
            f"{path} is no state_dict that torch can read without executing what it contains: "
            f"where the official toolkit is, write one with {SAVING}."
        ) from error


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} needs torch, which is not installed: pip install torch, or use a file of "
            "numpy.savez that ends with .npz."
        ) from error
    return torch


def import_run(path: Path, workdir: Path, overrides: Mapping[str, Any]) -> int:
    """Make the official model in `path` a run in `workdir`, and say how it is evaluated.

    Args:
        path: the weights; beside them the arguments and the vocabulary.
        workdir: a new folder.
        overrides: settings of `data`, dotted: the text that it is to be evaluated on.

    Raises:
        UserError: the files are missing, damaged or of different models, another setting is given,
            or there is a run in workdir.
    """
    for name in overrides:
        if not name.startswith("data."):
            raise UserError(
                f"--config.{name} has no meaning for --mode=import, which takes the model from "
                f"{path.parent / ARGUMENTS}: give settings of data alone."
            )
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds a run already: give --mode=import another --workdir.")
    arguments = read_json(path.parent / ARGUMENTS)
    if not isinstance(arguments, dict) or type(arguments.get("tgt_len")) is not int:
        raise UserError(
            f"{path.parent / ARGUMENTS} must have the arguments of MemTransformerLM by name, and "
            "among them tgt_len, the context that it was trained with."
        )
    vocab = Vocabulary.load(path.parent / WORDS)
    if arguments.setdefault("n_token", len(vocab)) != len(vocab):
        raise UserError(
            f"{path.parent / WORDS} has {len(vocab)} words and the model {arguments['n_token']}: "
            "give the vocabulary that it was trained with."
        )
    model_config, variables = from_lmtool(arguments, read_tensors(path))
    config = defaults()
    config.data.name = "wikitext103"
    config.model.update({name: getattr(model_config, name) for name in model_keys()})
    config.train.tgt_len = arguments["tgt_len"]
    config.train.carry_over_fast_weight = bool(arguments.get("carry_over_fast_weight", False))
    model_config.carries(config.train.carry_over_fast_weight)  # refuses what has no meaning
    config.update_from_flattened_dict(overrides)
    state = {"params": variables.pop("params"), "favor": variables or None}
    with lock_workdir(workdir), Checkpoints(workdir / "checkpoints") as checkpoints:
        origin = {"official": str(path.absolute())}
        workdirs.claim_workdir(workdir, config, vocab, resume=False, begun_from=origin)
        checkpoints.save(0, state, valid_loss=None)
    size = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    drawn = (
        " Its FAVOR+ projections, which no state_dict has, were drawn anew." if variables else ""
    )
    text = "" if config.data.dir or config.data.file else " --config.data.dir=FOLDER"
    say(
        f"{path}: {size:,} parameters, {len(vocab):,} words, now a run in {workdir}.{drawn}\n"
        f"Exact perplexity: python main.py --mode=valid --workdir={shlex.quote(str(workdir))}{text}"
    )
    return 0


def export_run(config: Any, workdir: Path, path: Path) -> int:
    """Write the run in `workdir` as the official toolkit's three files, the weights to `path`.

    Of the checkpoint `config.eval.checkpoint`.

    Raises:
        UserError: the toolkit has no such model, one of the files is there already, no such
            checkpoint, or torch is missing.
    """
    run = workdirs.open(workdir, config.eval.checkpoint)
    t = run.config.train
    arguments = arguments_to_lmtool(run.model.config) | {
        "tgt_len": t.tgt_len, "carry_over_fast_weight": t.carry_over_fast_weight,
    }  # fmt: skip
    tensors: dict[str, Any] = to_lmtool(run.model.config, run.variables)
    others = path.parent / ARGUMENTS, path.parent / WORDS
    for file in (path, *others):
        if file.exists():
            raise UserError(f"{file} is there already: give --official in a folder of its own.")
    if path.suffix not in (".pt", ".npz"):
        raise UserError(f"--official={path}: expected a name that ends with .pt or .npz.")
    torch = None if path.suffix == ".npz" else _torch(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(others[0], arguments)
    run.vocab.save(others[1])
    with replacing(path) as partial, partial.open("wb") as out:
        if torch is None:
            np.savez(out, **tensors)
        else:
            torch.save({name: torch.tensor(x) for name, x in tensors.items()}, out)
    names = ", ".join(str(file) for file in (path, *others))
    say(f"{workdir}, step {run.step}, as the official toolkit has it: {names}")
    return 0
