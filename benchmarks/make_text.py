"""Write a text with the shape of WikiText-103 into a folder: its size, words and lines.

    python -m benchmarks.make_text FOLDER

103,227,021 tokens with one <eos> per line; 267,735 symbols, each at least three times in the
training split; word frequencies by a Zipf law; paragraphs, headings and blank lines.
"""

import argparse
import os
from pathlib import Path

import numpy as np

TOKENS = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
WORDS = 267_734  # and <eos>
BLOCK_LINES = 20_000
COMMON = """the , . of and in to a = " was The @-@ <unk> on 's that as by for with ( ) is from at"""


def words(rng: np.random.Generator) -> np.ndarray:
    """Make WORDS different words, frequent ones short; some have letters outside ASCII."""
    made = dict.fromkeys(COMMON.split())
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    weights = 1 / np.arange(3, 29)
    while len(made) < WORDS:
        drawn = rng.choice(letters, size=(50_000, 12), p=weights / weights.sum())
        usual = 2.4 + 1.3 * np.log10(len(made))
        lengths = np.clip(rng.normal(usual, 1.5, size=50_000), 1, 12).astype(int)
        for row, length in zip(drawn, lengths, strict=True):
            word = "".join(row[:length])
            made.setdefault(f"{word[:-1]}é" if row[11] == "z" else word)
    return np.array(list(made)[:WORDS], dtype=object)


def line_lengths(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Words per line, 0 for a blank one, that add up to `tokens` with one <eos> per line."""
    paragraphs = tokens // 50
    lengths = np.clip(rng.lognormal(4.5, 0.7, size=paragraphs), 3, 1500).astype(np.int64)
    heading = rng.random(paragraphs) < 0.25
    lengths[heading] = rng.integers(3, 8, size=int(heading.sum()))
    # A heading stands between blank lines.
    lines = np.insert(
        lengths, np.repeat(np.flatnonzero(heading), 2) + np.tile([0, 1], heading.sum()), 0
    )
    ends = np.cumsum(lines + 1)
    count = int(np.searchsorted(ends, tokens, side="left"))
    return np.append(lines[:count], tokens - (ends[count - 1] if count else 0) - 1)


def write(path: Path, rng: np.random.Generator, vocabulary: np.ndarray, tokens: int) -> None:
    """Write one split; a training split long enough has every word at least three times."""
    lines = line_lengths(rng, tokens)
    total = int(lines.sum())
    zipf = np.cumsum((np.arange(1, len(vocabulary) + 1) + 2.7) ** -1.2)
    zipf /= zipf[-1]
    owners = np.repeat(np.arange(len(vocabulary)), 3 if total > 100 * WORDS else 0)
    places = rng.choice(total, size=len(owners), replace=False)
    order = np.argsort(places)
    places, owners = places[order], owners[order]
    position = 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        for start in range(0, len(lines), BLOCK_LINES):
            block = lines[start : start + BLOCK_LINES]
            size = int(block.sum())
            drawn = np.minimum(np.searchsorted(zipf, rng.random(size)), len(vocabulary) - 1)
            here = slice(*np.searchsorted(places, [position, position + size]))
            drawn[places[here] - position] = owners[here]
            position += size
            text = vocabulary[drawn].tolist()
            at = np.concatenate([[0], np.cumsum(block)])
            file.writelines(
                f" {' '.join(text[at[i] : at[i + 1]])} \n" if block[i] else " \n"
                for i in range(len(block))
            )


def main() -> None:
    """Write the three splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(0)
    vocabulary = words(rng)
    for split, tokens in TOKENS.items():
        write(folder / f"{split}.txt", rng, vocabulary, tokens)
        size = os.path.getsize(folder / f"{split}.txt")
        print(f"{folder / split}.txt: {tokens:,} tokens, {size:,} bytes")


if __name__ == "__main__":
    main()
