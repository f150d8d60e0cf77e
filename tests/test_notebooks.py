"""The notebooks run from top to bottom, and what is committed of them is a whole, clean run."""

import base64
import copy
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from real_runs import on_devices

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A path from the root of a file system, in text: of a machine, and none of the reader's concern.
ABSOLUTE = re.compile(r"(?<![\w./:<])/\w[\w.-]*/\w")


def execute(notebook, folder):
    """Run a copy in a kernel of its own, trainings shortened; a cell that fails raises."""
    notebook = copy.deepcopy(notebook)
    client = NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    environment = on_devices(1)
    # Optimised a little: the trainings of notebooks compute more than other tests.
    environment["XLA_FLAGS"] += " --xla_backend_optimization_level=1"
    client.execute(env={**environment, "FWM_NOTEBOOK_STEPS": "10"})
    return notebook


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def problems(notebook):
    """What a clean run has none of: cells out of order, errors, anything said on stderr, paths."""
    found = []
    for number, cell in enumerate(code(notebook), 1):
        if cell.execution_count != number:
            found.append(f"cell {number} was run as {cell.execution_count}")
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {number}: {output.get('text') or output.get('ename')}")
            said = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            if ABSOLUTE.search(said):
                found.append(f"cell {number} names a path: {said}")
    return found


def figures(notebook):
    """The resolution of every figure, in dots per inch."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    pngs = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    images = [Image.open(io.BytesIO(base64.b64decode(png))) for png in pngs]
    return [round(image.info["dpi"][0]) for image in images]


def test_the_notebooks_are_found():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_a_whole_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []
    assert len(figures(notebook)) >= 4
    assert min(figures(notebook)) >= 100
    # Beside the axes, below or above them: never on what is drawn.
    legends = re.findall(r"legend\((.*?)\)\n", "\n".join(c.source for c in code(notebook)) + "\n")
    assert all(re.search(r"BESIDE|outside|bbox_to_anchor", legend) for legend in legends), legends
    assert path.stat().st_size < 700_000
    first, other = (code(nbformat.read(p, as_version=4))[0].source for p in (NOTEBOOKS[0], path))
    assert first == other, "the cell that installs is the same everywhere"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    executed = execute(notebook, path.parent)
    assert problems(executed) == []
    assert figures(executed) == figures(notebook)  # as many, and as fine


def test_a_warning_in_a_notebook_is_a_problem(tmp_path):
    """It is raised in another process, where the filters of these tests do not reach."""
    cell = nbformat.v4.new_code_cell("import warnings\nwarnings.warn('old')\nprint('/a/b')")
    executed = execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    found = problems(executed)
    assert any(problem.startswith("cell 1 names a path: /a/b") for problem in found)
    assert any(re.match(r"cell 1: .*UserWarning: old", problem) for problem in found)
