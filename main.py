"""fwm's command line: flags, and dispatch on --mode.

python main.py --config=configs/dpfp_delta.py          train, resume
    --workdir=runs/a --extend --config.train.max_step=2000     the run there, longer
    --workdir=runs/b --config.init_from=runs/a         a run that begins with its weights
python main.py --mode=valid --workdir=runs/a           exact perplexity, validation split
python main.py --mode=eval  --workdir=runs/a           the same, test split; or valid,eval
python main.py --mode=generate --workdir=runs/a --prompt="The history of"      what it writes
python main.py --mode=compare --workdir=runs/a,runs/b  curves in one figure, results in a table
python main.py --mode=report --workdir=runs/a,runs/b   one page about runs, finished or not
python main.py --mode=import --official=lm/model.pt --workdir=runs/official    a model of lmtool-fwp
python main.py --mode=export --official=lm/model.pt --workdir=runs/a           and the way back
python main.py --mode=retrieval --config=configs/retrieval.py:capacity    synthetic experiments
python main.py --config=examples/own_task.py           with what a file of one's own registers

Every setting is a key of the config; fwm/config.py has them all, with units and defaults:
--config=configs/dpfp_delta.py:small takes the paper's small model, and
--config.model.n_layer=4 --config.train.lr=3e-4 --config.data.dir=/data/wikitext sets single keys.

One of several processes: --coordinator_address=host:port --num_processes=4 --process_id=0,
or --coordinator_address=auto, which takes all three from Slurm's or Open MPI's environment.
"""

import os
import signal
import sys

if __name__ == "__main__":
    # Before all else. Importing takes seconds, in which Ctrl-C shall end the process and nothing
    # more be said; a file shall not get the number of an output that the shell has closed.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # As it is in the background of a script.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import default, linear_delta
from fwm import (
    config_file,
    evaluate,
    generate,
    look,
    official,
    parallel,
    registry,
    reporting,
    retrieval,
    train,
)
from fwm.config import build_config, check, limits
from fwm.data.cache import cache_folder
from fwm.data.sources import label
from fwm.errors import Terminated, UserError, sentence
from fwm.files import expanded, flatten
from fwm.terminal import open_streams, say
from fwm.workdir import check_holds_run, config_of_run, saved_config, texts_of_run

MODES = [
    "train", "valid", "eval", "valid,eval", "generate", "compare", "report", "import", "export",
    "retrieval",
]  # fmt: skip
MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")
WORKDIR = flags.DEFINE_string(
    "workdir",
    "",
    "Directory of the run, by default runs/<job name>; several for compare and report: a,b.",
)
PROMPT = flags.DEFINE_string("prompt", "", "What --mode=generate goes on from.")
OFFICIAL = flags.DEFINE_string("official", "", official.HELP)
EXTEND = flags.DEFINE_bool(
    "extend", False, "Train a run of --workdir on to a config.train.max_step above its own."
)
COORDINATOR = flags.DEFINE_string("coordinator_address", "", "host:port of process 0, or auto.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
CONFIG = config_flags.DEFINE_config_file("config", None, "A variant: configs/<variant>.py:options.")


class ConfigFile(flags.ArgumentParser):
    """In place of the flag's own parser, which tells of a file's faults in tracebacks, or later."""

    def parse(self, argument: str) -> ConfigDict:
        """See `config_file.load`."""
        return config_file.load(argument)


flags.FLAGS["config"].parser = ConfigFile()


def job_name(config: ConfigDict) -> str:
    """`report.job_name`, or the hyper-parameters that matter, as in the official toolkit.

    Raises:
        UserError: it is a path, which might lead anywhere.
    """
    name = config.report.job_name or _describe(config)
    if Path(name).name != name or name == "..":
        raise UserError(
            f"the job name {name!r} is a path: expected the name of one folder; choose another "
            "config.report.job_name, or say with --workdir where the run shall lie."
        )
    return name


def default_workdir(config: ConfigDict) -> Path:
    """runs/<job name>, or where a run of these settings lies that an earlier version has begun.

    Those had `embedded` in the names of runs on a folder of one's own, too.
    """
    workdir = Path("runs", job_name(config))
    if config.report.job_name or not config.data.dir or workdir.exists():
        return workdir
    earlier = Path("runs", _describe(config, config.data.name))
    same = (earlier / "config.json").is_file() and (
        saved_config(earlier)["data.dir"] == str(expanded(config.data.dir).absolute())
    )
    return earlier if same else workdir


def _describe(config: ConfigDict, text: str = "") -> str:
    m, t = config.model, config.train
    d = config.data
    text = (text or label(d.name, d.dir, d.file)).replace(":", "-")
    text += f"-{d.tokenizer}{d.vocab_size or ''}" if d.tokenizer else ""
    learned = text if config.task == "text" else config.task
    model = build_config(m.to_dict(), n_token=2**31 - 1)  # of any vocabulary
    parts = [learned, *["documents"] * config.data.documents, *model.name_parts()]
    parts += [m.norm] * (m.norm != "post") + ["nopos"] * m.no_pos
    parts += ["carry"] * t.carry_over_fast_weight + [f"mem{m.mem_len}"] * bool(m.mem_len)
    parts += [f"L{m.n_layer}", f"d{m.d_model}", f"h{m.n_head}x{m.d_head}", f"ff{m.d_inner}"]
    parts += [f"len{t.tgt_len}", f"bs{t.batch_size}", f"lr{t.lr:g}", f"steps{t.max_step}"]
    parts += [t.scheduler] * (t.scheduler == "wsd") + [f"wd{t.weight_decay:g}"] * bool(
        t.weight_decay
    )
    parts += [f"drop{m.dropout:g}", f"seed{config.seed}"]
    parts += [f"from-{Path(config.init_from).name}"] * bool(config.init_from)
    return "-".join(parts)


def parse(argv: list[str]) -> ConfigDict:
    """Flags into `FLAGS` and the config; what the user got wrong becomes a `UserError`.

    The config file may lie anywhere and register rules, feature maps, mixers and tasks; a run
    that is trained with it keeps in `registered_in` which file that was.
    """
    given = config_values(argv)
    if not given:
        # Fields can be overridden only where there is a config to override them in.
        argv = [argv[0], f"--config={Path(default.__file__)}", *argv[1:]]
    sys.argv = argv  # config_flags looks for the overrides there
    try:
        with registry.recording() as registered:
            _, *unknown = flags.FLAGS(argv)
    except (flags.Error, OSError, LookupError, AttributeError, SyntaxError, TypeError) as error:
        raise UserError(_sentence(error)) from error
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}: expected --flag=value only.")
    for name, value in config_flags.get_override_values(flags.FLAGS["config"]).items():
        if isinstance(value, ConfigDict | dict):
            raise UserError(
                f"--config.{name} is a group of settings: set them one by one, as in "
                f"--config.{name}.{min(default.defaults()[name])}=..."
            )
    if MODE.value == "train" and not given:
        variants = sorted(p.stem for p in Path(default.__file__).parent.glob("*.py"))
        raise UserError(
            "--mode=train needs --config=configs/<variant>.py, the variant one of "
            f"{', '.join(v for v in variants if v not in ('default', 'retrieval'))}."
        )
    if MODE.value == "train" and "setting" not in CONFIG.value:
        check(CONFIG.value.to_dict())
    if (MODE.value == "retrieval") != ("setting" in CONFIG.value):
        raise UserError(
            "--mode=retrieval and --config=configs/retrieval.py:capacity or :update_rule belong "
            f"together, but the mode is {MODE.value}: give both or neither."
        )
    if registered and "registered_in" in CONFIG.value:
        file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
        CONFIG.value.registered_in = str(Path(file).absolute())
    return CONFIG.value


def config_values(argv: list[str]) -> list[str]:
    """What --config=FILE or --config FILE names, every time that it is given."""
    values = []
    for i, arg in enumerate(argv):
        name, equals, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name == "config":
            values.append(value if equals else "".join(argv[i + 1 : i + 2]))
    return values


def check_platform() -> None:
    """Raise `UserError` where JAX_PLATFORMS names a device that is not there."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if not wanted:
        return
    try:
        jax.devices()
    # jax's own ways to say that no backend of these names could be started.
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"JAX_PLATFORMS={wanted} names no device that jax can use here: install what it needs "
            'for it, such as "jax[cuda13]", or leave it unset.'
        ) from error


def _sentence(error: BaseException) -> str:
    """What an error of the flag parser says, in one line: the innermost UserError if there is."""
    # The parser repeats a UserError with a traceback as its text; the plain one is the innermost.
    plain: BaseException | None = None
    link = error.__cause__ or error.__context__
    while link is not None:
        plain = link if isinstance(link, UserError) else plain
        link = link.__cause__ or link.__context__
    text = str(plain or error)
    override = re.match(r"flag --config\.([\w.]+)=(.*?): ", text, re.DOTALL)
    kinds = limits() | retrieval.LIMITS
    if override and override[1] in kinds:
        text = f"config.{override[1]} must be {kinds[override[1]].expected}, got {override[2]!r}."
    if isinstance(error, LookupError | AttributeError) and not plain:
        text = f"unknown config field {text}"
    return " ".join(text.replace("\\n", " ").split())


def published() -> dict[str, dict[str, Any]]:
    """By what the paper reports (section 6.3, valid / test), the settings it reports it of."""
    return {"34.1 / 35.2": flatten(linear_delta.get_config("small").to_dict())}


def compare(workdirs: list[Path]) -> int:
    """Print the exact results of several runs in a table; draw their curves into one figure."""
    for workdir in workdirs:
        check_holds_run(workdir)
    figure = workdirs[0] / "compare.png"
    settings = {workdir: saved_config(workdir) for workdir in workdirs}
    paper = {path: reporting.paper_result(settings[path], published()) for path in workdirs}
    texts = {workdir: texts_of_run(workdir) for workdir in workdirs}
    say(reporting.compare(workdirs, figure, paper, settings, texts))
    return 0


def report(workdirs: list[Path]) -> int:
    """Write one page about several runs, whatever there is of each."""
    runs = []
    for workdir in workdirs:
        check_holds_run(workdir)
        settings = saved_config(workdir)
        paper = reporting.paper_result(settings, published())
        run = reporting.Run(workdir, settings, paper, texts_of_run(workdir))
        try:
            sample, words, memories = look.inside(config_of_run(workdir, {}), workdir)
            run = run._replace(sample=sample, words=words, memories=memories)
        except UserError as error:  # No checkpoint yet, or none that this command line can read.
            run = run._replace(note=str(error))
        runs.append(run)
    page = workdirs[0] / "report.html"
    reporting.write_report(runs, page)
    say(f"Report: {page}")
    return 0


def dispatch(argv: list[str]) -> int:
    """Run one mode; returns the exit status."""
    try:
        argv = [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)]
    except flags.Error as error:
        raise UserError(_sentence(error)) from error
    config = parse(argv)
    if COORDINATOR.value or PROCESSES.value is not None or PROCESS.value is not None:
        if MODE.value != "train":
            raise UserError(
                f"--mode={MODE.value} runs in one process: leave the others' flags out."
            )
        parallel.start(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if MODE.value not in ("compare", "retrieval"):  # Processes of its own have retrieval's devices.
        check_platform()
    if PROMPT.value and MODE.value != "generate":
        raise UserError(f"--prompt belongs to --mode=generate, but the mode is {MODE.value}.")
    if bool(OFFICIAL.value) != (MODE.value in ("import", "export")):
        raise UserError(
            f"--official=model.pt belongs to --mode=import and --mode=export, and the mode is "
            f"{MODE.value}: give both or neither."
        )
    if EXTEND.value and MODE.value != "train":
        raise UserError(f"--extend belongs to training, but the mode is {MODE.value}.")
    if MODE.value == "retrieval":
        return retrieval.run(config, expanded(WORKDIR.value or f"runs/retrieval-{config.setting}"))
    workdir = expanded(WORKDIR.value) if WORKDIR.value else default_workdir(config)
    if MODE.value != "train":
        if not WORKDIR.value:
            raise UserError(f"--mode={MODE.value} needs the --workdir of a trained run.")
        if config_values(argv) and not config.registered_in:
            note = f"--config is not used: the settings are those of the run in {workdir}."
            say(note, sys.stderr)
        overrides = config_flags.get_override_values(flags.FLAGS["config"])
        if MODE.value in ("compare", "report"):
            if overrides:
                raise UserError(f"--mode={MODE.value} has no settings: leave --config.... out.")
            several = {"compare": compare, "report": report}[MODE.value]
            return several([expanded(name) for name in WORKDIR.value.split(",")])
        if MODE.value == "import":
            for key in overrides.keys() & {"data.dir", "data.file"}:
                overrides[key] = str(expanded(overrides[key]).absolute())
            return official.import_run(expanded(OFFICIAL.value), workdir, overrides)
        config = config_of_run(workdir, overrides)
        if MODE.value == "export":
            return official.export_run(config, workdir, expanded(OFFICIAL.value))
    # Absolute, so that an evaluation finds the text from anywhere.
    for key in ("dir", "file"):
        if config.data[key]:
            config.data[key] = str(expanded(config.data[key]).absolute())
    cache = cache_folder(config.data.cache_dir)
    # One below ~ is everybody's own, also where somebody else's run is evaluated.
    if not config.data.cache_dir.startswith("~"):
        config.data.cache_dir = str(cache.absolute())
    # Compiled programs are kept, so that a second start takes a fraction of the first.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    if MODE.value == "train":
        return train.run(config, workdir, _describe(config), extend=EXTEND.value)
    if MODE.value == "generate":
        return generate.run(config, workdir, PROMPT.value)
    splits = ["test" if mode == "eval" else mode for mode in MODE.value.split(",")]
    evaluate.run(config, workdir, splits)
    return 0


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is done inside as Ctrl-C does; training has its own way."""

    def end(number: int, frame: Any) -> None:
        raise Terminated

    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    numbers = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # nohup
    by_default = {signal.SIGINT: signal.default_int_handler}
    old = {number: signal.signal(number, by_default.get(number, end)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def main(argv: list[str]) -> int:
    """Run; what a user or the machine is to blame for becomes one sentence and status 2."""
    open_streams()
    if {"--help", "-help", "-h", "--helpfull"} & set(argv):
        say(f"{__doc__}\nFlags:\n{flags.FLAGS.main_module_help()}")
        return 0
    try:
        with ended_by_signals():
            return dispatch(argv)
    except KeyboardInterrupt as error:  # Where training ends by it, before it began or at once.
        say("Interrupted: what was saved before is kept.", sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    except Exception as error:
        if not sentence(error):
            raise
        say(f"error: {sentence(error)}", sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
