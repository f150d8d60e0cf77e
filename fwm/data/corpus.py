"""A corpus: text as memory-mapped int32 streams with their vocabulary, prepared once."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from fwm.data import segments, tokens
from fwm.data.cache import build_once, cache_folder, file_digest
from fwm.data.segments import ALL_ROWS, ShuffledSentences
from fwm.data.sources import SPLITS, Source, label, layout, locate
from fwm.data.vocabulary import UNK, Vocabulary
from fwm.errors import UserError
from fwm.files import expanded

# Part of every cache key: raise it when the meaning of the files changes.
FORMAT = 2


@dataclass(frozen=True)
class Corpus:
    """Streams of int32 indices by split, memory-mapped, and what they mean.

    unit: `word`, or `character` (then bits per token are bits per character). sentences: the order
    of the lines has no meaning and training shuffles them. warnings: sentences to show the user.
    """

    name: str
    vocab: Vocabulary
    streams: Mapping[str, np.ndarray]
    unit: str
    warnings: tuple[str, ...] = ()
    sentences: bool = False
    # Of every split that was prepared: name, dir, digest of the tokens, tokens.
    texts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def _shuffled(self) -> ShuffledSentences:
        return ShuffledSentences(self.streams["train"], self.vocab.index["<eos>"])

    def train_batch(
        self, step: int, batch_size: int, tgt_len: int, seed: int, rows: slice = ALL_ROWS
    ) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"], bool]:
        """Return `fwm.data.train_batch` of the training stream, sentences shuffled if they may be.

        Raises:
          UserError: the stream is shorter than one segment.
        """
        if self.sentences:
            return self._shuffled.train_batch(step, batch_size, tgt_len, seed, rows)
        return segments.train_batch(self.streams["train"], step, batch_size, tgt_len, rows)


def load(
    name: str,
    *,
    dir: str = "",
    cache_dir: str,
    vocab: Vocabulary | None = None,
    splits: Sequence[str] = SPLITS,
    download: bool = False,
) -> Corpus:
    """Open a corpus, preparing it first if that has not been done.

    Args:
      name: a known corpus, or with `dir` any name for a folder of words.
      dir: a folder with the text; empty: the embedded corpus, or a download.
      cache_dir: where prepared streams are kept, under a key of content and settings.
      vocab: encode with this vocabulary (a trained model's) instead of the training text's own.
      splits: the splits that are needed; the vocabulary does not depend on them.
      download: fetch the text if there is no `dir`.

    Raises:
      UserError: the text is not there, lacks a split, is empty, not UTF-8 or not of this kind, has
        words that the given vocabulary cannot express, or the cache cannot be written.
    """
    cache, dir = cache_folder(cache_dir), str(expanded(dir)) if dir else ""
    source = locate(name, dir, cache, download)
    needed = splits if vocab is not None else (*splits, "train")
    for split in needed:
        if split not in source.spans:
            raise UserError(
                f"{dir or name} lacks the {split} split; expected {layout(name)}, but it has"
                f" {', '.join(Path(s.path).name for s in source.spans.values()) or 'none of them'}."
            )
    for span in source.spans.values():
        if span.start == span.stop:
            raise UserError(f"{span.path} is empty; expected {source.unit}s to read.")

    # The streams of the text's own vocabulary serve a given one too if it is the same: a resumed or
    # evaluated run finds what its training prepared.
    entry = cache / _key(source, SPLITS, None, cache)
    made = entry / "vocab.txt"
    if vocab is None or (made.exists() and made.read_text("utf-8") == vocab.text()):
        build_once(entry, lambda folder: _prepare(source, SPLITS, None, folder))
    else:
        entry = cache / _key(source, splits, vocab, cache)
        build_once(entry, lambda folder: _prepare(source, splits, vocab, folder))
    if vocab is None:
        # Our own file, written whole: the checks of Vocabulary.load would double the time.
        vocab = Vocabulary(tuple(made.read_text("utf-8").split()))
    meta = json.loads((entry / "meta.json").read_text())
    # The same text may lie in several folders, so that the paths are not part of what is kept.
    warnings = {split: f"{source.spans[split].path}: {w}" for split, w in meta["warnings"].items()}
    shown = label(name, dir)
    return Corpus(
        name=shown,
        vocab=vocab,
        streams={split: np.memmap(entry / f"{split}.int32", np.int32, "r") for split in splits},
        unit=source.unit,
        warnings=tuple(warnings[split] for split in splits if split in warnings),
        sentences=name.removeprefix("tfds:") == "lm1b",
        texts={
            split: {"name": shown, "dir": dir, "digest": digest, "tokens": meta["tokens"][split]}
            for split, digest in meta["digests"].items()
        },
    )


def _key(source: Source, splits: Sequence[str], vocab: Vocabulary | None, cache: Path) -> str:
    content = [
        [split, span.form, span.start, span.stop, file_digest(span.path, cache)]
        for split, span in source.spans.items()
        if split in splits
    ]
    symbols = (
        None if vocab is None else hashlib.sha256("\n".join(vocab.symbols).encode()).hexdigest()
    )
    key = json.dumps([FORMAT, source.unit, source.min_count, content, symbols])
    return "tokens-" + hashlib.sha256(key.encode()).hexdigest()[:32]


def _prepare(source: Source, splits: Sequence[str], vocab: Vocabulary | None, folder: Path) -> None:
    spans = {split: span for split, span in source.spans.items() if split in splits}
    parts = {split: tokens.encode_span(span, folder, split) for split, span in spans.items()}
    counts = {split: tokens.count(parts[split]) for split in spans}
    for split, span in spans.items():
        if not counts[split]:
            raise UserError(f"{span.path} is empty; expected {source.unit}s to read.")

    given = vocab is not None
    if vocab is None and source.unit == "character":
        _check_characters(source, counts)
        # As the official code does; a character model has no <unk>.
        vocab = Vocabulary.from_counts(
            tokens.count([part for split in SPLITS for part in parts.get(split, [])]), eos=False
        )
    elif vocab is None:
        kept = {w: n for w, n in counts["train"].items() if n >= source.min_count or w == UNK}
        if len(kept) < len(counts["train"]):
            rare = sum(counts["train"].values()) - sum(kept.values())
            kept[UNK] = kept.get(UNK, 0) + rare
        vocab = Vocabulary.from_counts(kept)
    missing = {
        split: [word for word in counts[split] if word not in vocab.index] for split in spans
    }
    if vocab.unk_id is None and any(missing.values()):
        if given:
            split, words = next((s, words) for s, words in missing.items() if words)
            raise UserError(
                f"{spans[split].path} has {len(words)} symbols that the model's vocabulary lacks,"
                f" which has no <unk>; the first is {words[0]!r}; use text like the training's."
            )
        vocab = Vocabulary((*vocab.symbols, UNK))
        added = ", a symbol that training never sees"
    else:
        added = ""
    warnings = {
        split: f"{sum(counts[split][word] for word in words)} occurrences of"
        f" {len(words)} different words that the training text lacks (the first is {words[0]!r})"
        f" are read as <unk>{added}."
        for split, words in missing.items()
        if words and source.min_count == 1
    }
    if source.unit == "word" and "train" in counts and (text := _spaceless(counts["train"])):
        warnings["train"] = " ".join([text, *filter(None, [warnings.get("train")])])
    written = {
        split: tokens.write_stream(
            parts[split],
            vocab.index,
            -1 if vocab.unk_id is None else vocab.unk_id,
            folder / f"{split}.int32",
        )
        for split in spans
    }
    for leftover in folder.glob("*.*.*"):
        leftover.unlink()
    vocab.save(folder / "vocab.txt")
    meta = {
        "tokens": {split: size for split, (size, _) in written.items()},
        "digests": {split: digest for split, (_, digest) in written.items()},
        "warnings": warnings,
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _spaceless(counts: Mapping[str, int]) -> str:
    """A warning if the words are whole lines, as of a script that puts no spaces; else nothing."""
    n_word = sum(counts.values())
    n_character = sum(len(word) * n for word, n in counts.items())
    # Kana and Chinese characters, whose words are one to three of them.
    eastern = sum(n for word, n in counts.items() for c in word if "\u3040" <= c <= "\u9fff")
    limit = 4 if eastern > n_character / 2 else 20
    if n_character <= limit * n_word:
        return ""
    return (
        f"its words, which are what lies between white space, have {n_character / n_word:.0f}"
        " characters on average, as if there were no spaces: use characters as the unit, with"
        " spaces between them, or the text as one file `enwik8` and --config.data.name=enwik8,"
        " which reads bytes."
    )


def _check_characters(source: Source, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse running text where single characters were prepared: it would make a model of words."""
    for split, span in source.spans.items():
        for symbol in counts[split]:
            if len(symbol) > 1 and not (
                symbol.isascii() and symbol.isdigit() and int(symbol) < 256
            ):
                raise UserError(
                    f"{span.path} has {symbol!r}; expected single characters or decimal codes of"
                    " bytes between spaces; prepare the file so or give the original file instead."
                )
