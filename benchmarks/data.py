"""Preparing a text of WikiText-103's size, opening it again, and the cost of a batch.

    python -m benchmarks.make_text FOLDER
    /usr/bin/time -v python -m benchmarks.data FOLDER

The cache is made in a temporary folder beside the text. Peak memory is the largest process's (what
`time -v` calls maximum resident set size). Prints a table and writes benchmarks/results/data.json.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import common
from fwm import data


def measure(folder: Path, batch_size: int, tgt_len: int, batches: int) -> dict:
    """Seconds, megabytes, and sizes to recognise the text by."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            corpus = data.load("wikitext103", dir=str(folder), cache_dir=cache)
            seconds.append(time.perf_counter() - started)
        # Steps far apart, in a random order: no help from pages that are already there.
        steps = np.random.default_rng(0).permutation(500_000)[:batches]
        started = time.perf_counter()
        for step in steps:
            tokens, targets, *_ = corpus.train_batch(int(step), batch_size, tgt_len, 0)
            np.asarray(tokens).sum(), np.asarray(targets).sum()
        batch = (time.perf_counter() - started) / batches
        usage = max(
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        return {
            "train_tokens": len(corpus.streams["train"]),
            "symbols": len(corpus.vocab),
            "seconds_to_prepare": round(seconds[0], 2),
            "seconds_to_open_again": round(seconds[1], 4),
            f"milliseconds_per_batch_{batch_size}x{tgt_len}": round(1e3 * batch, 3),
            "peak_megabytes": round(usage / 1024),
        }


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what benchmarks.make_text wrote")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--tgt-len", type=int, default=256)
    parser.add_argument("--batches", type=int, default=1000)
    a = parser.parse_args()
    result = measure(a.folder, a.batch_size, a.tgt_len, a.batches)
    for name, value in result.items():
        print(f"| {name.replace('_', ' ')} | {value:,} |")
    result = {"command": " ".join(["python -m benchmarks.data", *sys.argv[1:]])} | result
    path = Path(__file__).parent / "results" / "data.json"
    path.write_text(json.dumps(result | common.environment(), indent=1) + "\n")


if __name__ == "__main__":
    main()
