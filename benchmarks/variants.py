"""Every variant trained for a few steps: what it has learned, and how fast it goes.

    python -m benchmarks.variants             # 200 steps each at tiny; writes results/variants.md

Each is trained by a process of its own, `main.py`, as a user would; tokens per second are the
median of the log's rows after the first, the loss is that of the quick validation at the end.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import common

ROOT = Path(__file__).parents[1]


def train(variant: str, steps: int, folder: Path) -> dict[str, float]:
    """The last validation's loss and perplexity, and the tokens per second."""
    command = [
        sys.executable, "main.py", f"--config=configs/{variant}.py", f"--workdir={folder}",
        f"--config.train.max_step={steps}", f"--config.train.eval_interval={steps}",
        f"--config.train.warmup_step={steps // 2}", "--config.train.log_interval=20",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with (folder / "train_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["tokens_per_second"]) for row in rows if row["tokens_per_second"]]
    valid = [row for row in rows if row["split"] == "valid"][-1]
    return {
        "loss": float(valid["loss"]),
        "perplexity": float(valid["perplexity"]),
        "rate": statistics.median(rates[1:]),
    }


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--steps", type=int, default=200)
    names = {path.stem for path in (ROOT / "configs").glob("*.py")}
    every = sorted(names - {"default", "retrieval", "__init__"})
    parser.add_argument("--variants", nargs="+", default=every)
    arguments = parser.parse_args()
    about = common.environment()
    lines = [
        "# Every variant, trained for a few steps",
        "",
        f"`{' '.join(['python -m benchmarks.variants', *sys.argv[1:]])}`; {about['processor']}; "
        + ", ".join(f"{name} {about[name]}" for name in ("python", "jax", "jaxlib", "numpy"))
        + f"; preset tiny, embedded corpus, {arguments.steps} steps of 16 x 64 tokens, seed 1111.",
        "",
        "| variant | validation loss | perplexity | tokens/s |",
        "|---|--:|--:|--:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for variant in arguments.variants:
            found = train(variant, arguments.steps, Path(folder) / variant)
            row = f"{found['loss']:.3f} | {found['perplexity']:.1f} | {found['rate']:.0f}"
            lines.append(f"| `{variant}` | {row} |")
            print(lines[-1], flush=True)
    (arguments.out / "variants.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
