"""Every command and snippet of the documentation, and every command of the README.

Page by page, beside a small trained run `runs/a`: snippets as they are; commands as bash takes them
apart, with the sizes and the text of `runs/a`, so that each trains, evaluates, compares or writes.
What needs several processes, hours or an account, and the examples, are parsed here and run by
tests of their own (`ELSEWHERE`). Other programs must be known.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from program import SIZES, call, parsed, write_text

import main
from fwm.config import build_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def indented(text):
    """README's commands; `Your own text` is executed by test_own_text.py."""
    text = re.sub(r"## Your own text.*?(?=^## )", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    return [block for block in found if block.lstrip().startswith(("python main.py", "for "))]


SCRIPTS = {page: blocks(text, "bash") for page, text in PAGES.items()}
SCRIPTS["README.md"] = indented((ROOT / "README.md").read_text())
# What a shell makes of a script: each call of python as one line; workdirs are there for its globs.
SHELL = """
set -eu
srun() { "$@"; }
python3() { false; }
pip() { :; }
tensorboard() { :; }
mkdocs() { :; }
python() {
    for word; do case $word in --workdir=runs/*) mkdir -p "${word#*=}";; esac; done
    printf '%s\\t' "$@"
    printf '\\n'
}
"""


def commands(scripts, folder):
    """The arguments of every call of python in some scripts, in their order, as bash says them."""
    script = SHELL + "\n".join(scripts)
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done
    return [line.rstrip("\t").split("\t") for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a text, and with runs/a trained on it; the settings of such runs."""
    folder = tmp_path_factory.mktemp("docs")
    words = "the cat sat on the mat\n\n" * 20
    write_text(folder / "text", train=words, valid=words, test=words)
    settings = SIZES | {"data.dir": folder / "text", "data.cache_dir": folder / "cache"}
    # What presets and commands would change in a program.
    settings |= {"model.dropout": 0, "train.lr": 1e-3, "train.scheduler": "constant"}
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    run = f"--workdir={folder / 'runs' / 'a'}"
    assert call("--config=configs/dpfp_delta.py", run, *overrides)[0] == 0
    return folder, settings


def test_the_pages_are_found():
    assert {"index.md", "variants.md", "guides/official.md"} <= PAGES.keys()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(PAGES[page], "python")])
def test_snippets_run(page, small, monkeypatch):
    monkeypatch.chdir(small[0])
    names: dict = {}
    for number, block in enumerate(blocks(PAGES[page], "python")):
        exec(compile(block, f"{page}, snippet {number + 1}", "exec"), names)


def test_commands_run(small, tmp_path, monkeypatch):
    """All in one process: what is compiled for one command serves others."""
    later = []
    for number, scripts in enumerate(SCRIPTS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        called = commands(scripts, folder)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        monkeypatch.chdir(folder)
        (folder / "configs").symlink_to(ROOT / "configs")
        shutil.copy(small[0] / "text" / "train.txt", "input.txt")
        for name in ("a", "b"):
            shutil.copytree(small[0] / "runs" / "a", f"runs/{name}")
        status, _, err = call("--mode=export", "--workdir=runs/a", "--official=lm/model.npz")
        assert status == 0, err
        for program, *arguments in called:
            if program == "-m":
                assert (ROOT / (arguments[0].replace(".", "/") + ".py")).is_file()
            elif any(a.startswith(ELSEWHERE) for a in arguments):
                later.append(arguments)
            else:
                assert program == "main.py"
                execute(arguments, *small)
    monkeypatch.chdir(ROOT)
    for arguments in later:  # what an example registers would end what is shared
        config = parsed(*arguments)
        if not any(a.startswith("--mode=") for a in arguments):
            is_a_model(config)


def is_a_model(config):
    """At the size that a command says, with a large vocabulary."""
    build_config(config.model.to_dict(), n_token=300_000)
    main.default_workdir(config)


# What is run by test_distributed.py, test_retrieval.py, reporting/test_sinks.py, test_examples.py.
ELSEWHERE = (
    "--coordinator_address=", "--mode=retrieval", "--config.report.use_wandb=",
    "--config=examples/",
)  # fmt: skip
# In place of what is not there, takes long, or would be a program of its own.
INSTEAD = {
    "lm/model.pt": "lm/model.npz",
    "The history of": "the cat",
    "max_step=2000": "max_step=6",
    "lr=3e-3": "lr=1e-3",
    "lr=1e-2": "lr=1e-3",
}


def execute(arguments, folder, settings):
    """main.py with the small run's settings where a command does not say its own."""
    for theirs, ours in INSTEAD.items():
        arguments = [a.replace(theirs, ours) for a in arguments]
    flags = dict(a.removeprefix("--").partition("=")[::2] for a in arguments)
    mode = flags.get("mode", "train")
    if mode == "train":
        workdir = flags.get("workdir", "runs/new")
        shutil.rmtree(workdir, ignore_errors=True)  # it was there for other commands
        if "extend" in flags:
            shutil.copytree(folder / "runs" / "a", workdir)
        arguments = [f"--workdir={workdir}", *(a for a in arguments if "--workdir=" not in a)]
        own = flags.keys() - {"config.data.dir"}
        names = [name for name in settings if f"config.{name}" not in own]
        if "config.data.file" in own:
            names.remove("data.dir")
        is_a_model(parsed(*arguments))
    else:
        names = ["data.dir", "data.cache_dir"] if mode in TEXTS else []
        if mode == "export":
            shutil.rmtree("lm")
    overrides = [f"--config.{name}={settings[name]}" for name in names]
    status, _, err = call(*arguments, *overrides)
    assert status == 0, (arguments, err)


TEXTS = ("valid", "eval", "generate", "import")  # modes that read one


def test_every_flag_in_a_table_is_known():
    """Those of main.py: in tables and sentences each stands in backticks."""
    for page, text in PAGES.items():
        if page == "guides/official.md":
            text = "\n".join(line.split("|", 2)[-1] for line in text.splitlines())
        quoted = re.findall(r"`(--(?:config|mode|workdir)[.=][^`]*)`", text)
        for flags in quoted:
            arguments = shlex.split(flags)
            if any(a.startswith("--mode=") for a in arguments):
                assert {a[7:] for a in arguments if a.startswith("--mode=")} <= set(main.MODES)
                continue
            variant = (
                []
                if any(a.startswith("--config=") for a in arguments)
                else ["--config=configs/dpfp_delta.py"]
            )
            parsed(*variant, *arguments)
        assert quoted or page not in ("guides/official.md", "guides/texts.md")


def test_every_variant_is_shown_and_every_page_is_reached():
    # The page shows all of `configs`, but for what the filters leave out.
    hidden = re.search(r"filters: (\[.*\])", PAGES["variants.md"]).group(1)
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in files if f'"!^{name}$"' in hidden} == {"default", "retrieval"}
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f": {page}\n" in navigation, page
