"""Every command and snippet of the documentation.

Python is executed, page by page, beside a small trained run `runs/a`. Of commands, those that ask
something of `runs/a` are executed; what trains for minutes or days is parsed to its config, from
which the model is built; other programs must be named by a requirement, a module or a shell.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from program import call, parsed

import main
from fwm.config import build_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
OLD = ROOT / "tests" / "old_runs"
PLACEHOLDERS = {"$lr": "1e-3"}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """The command lines of a page, without comments and the shell's own words."""
    lines = (line.strip() for block in blocks(text, "bash") for line in block.splitlines())
    return [line for line in lines if line and line[0] != "#" and line not in ("done", "fi")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, place):
    """A folder with a run at runs/a, as one of the committed ones, and how its text is found."""
    folder = tmp_path_factory.mktemp("docs")
    run = folder / "runs" / "a"
    shutil.copytree(OLD / "dpfp_delta", run)
    (run / "expected_log.csv").rename(run / "train_log.csv")
    text = (f"--config.data.dir={OLD / 'text'}", f"--config.data.cache_dir={place / 'cache'}")
    return folder, text


def test_the_pages_are_found():
    assert {"index.md", "variants.md", "guides/official.md"} <= PAGES.keys()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(PAGES[page], "python")])
def test_snippets_run(page, trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    names: dict = {}
    for number, block in enumerate(blocks(PAGES[page], "python")):
        exec(compile(block, f"{page}, snippet {number + 1}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(PAGES[page])])
def test_commands_are_what_the_program_takes(page, trained):
    folder, text = trained
    for line in commands(PAGES[page]):
        check(line, folder, text)


def check(line, folder, text):
    for name, value in PLACEHOLDERS.items():
        line = line.replace(name, value)
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]) or words[0] in ("srun", "do"):
        words = words[1:]
    if words[:2] == ["python", "main.py"]:
        check_main(words[2:], folder, text)
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), line
    elif words[0] == "for":
        assert words[-1] == "do", line
    else:
        # Environments and packages: CI runs README's command, jax names its own extras.
        assert words[0] in ("python3", "pip", "tensorboard", "mkdocs"), line


def check_main(arguments, folder, text):
    modes = [a.removeprefix("--mode=") for a in arguments if a.startswith("--mode=")]
    if not modes:
        config = parsed(*arguments)
        build_config(config.model.to_dict(), n_token=300_000)
        main.default_workdir(config)
        return
    if "--workdir=runs/a" not in arguments:
        parsed(*arguments)
        return
    arguments = [a.replace("runs/a", str(folder / "runs" / "a")) for a in arguments]
    data = text if modes[0] in ("valid", "eval", "generate") else ()
    # The prompt of the pages is of another text.
    arguments = ["--prompt=w1" if a.startswith("--prompt=") else a for a in arguments]
    status, _, err = call(*arguments, *data)
    assert status == 0, err


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
