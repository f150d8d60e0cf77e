"""A corpus: text as memory-mapped int32 streams with their vocabulary, prepared once."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from fwm.data import borders, segments, subwords, tokens
from fwm.data.cache import build_once, cache_folder, file_digest
from fwm.data.segments import ALL_ROWS, ShuffledSentences
from fwm.data.sources import CHARACTER_SETS, SPLITS, Source, label, layout, locate
from fwm.data.vocabulary import TOKENIZER_FILE, UNK, Vocabulary
from fwm.errors import UserError
from fwm.files import expanded

# Part of every cache key: raise it when the meaning of the files changes.
FORMAT = 2


@dataclass(frozen=True)
class Corpus:
    """Streams of int32 indices by split, memory-mapped, and what they mean.

    unit: `word`, `subword`, or `character` (then bits per token are bits per character). sentences:
    the order of the lines has no meaning and training shuffles them. warnings: sentences to show
    the user.
    """

    name: str
    vocab: Vocabulary
    streams: Mapping[str, np.ndarray]
    unit: str
    warnings: tuple[str, ...] = ()
    sentences: bool = False
    # Of every split that was prepared: name, dir (or file), digest of the tokens, tokens; words,
    # characters and bytes where tokens are not words; how many documents where they are apart and
    # what they begin_at, their places then being part of the digest.
    texts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # By split, for every place of the stream and its end, how many documents have begun before it;
    # {}: the text is one document.
    documents: Mapping[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def _shuffled(self) -> ShuffledSentences:
        assert self.vocab.newline_id is not None
        return ShuffledSentences(self.streams["train"], self.vocab.newline_id)

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

    def train_segment_ids(
        self, step: int, batch_size: int, tgt_len: int, rows: slice = ALL_ROWS
    ) -> Int32[np.ndarray, "B T"] | None:
        """Return the documents of `train_batch`'s tokens, 0 the one of the token before the row.

        None: the text is one document.
        """
        if not self.documents:
            return None
        begun = self.documents["train"][:-1]
        before, ids, _ = segments.train_batch(begun, step, batch_size, tgt_len, rows)
        return ids - before[:, :1]


def load(
    name: str,
    *,
    dir: str = "",
    file: str = "",
    cache_dir: str,
    vocab: Vocabulary | None = None,
    splits: Sequence[str] = SPLITS,
    download: bool = False,
    tokenizer: str = "",
    vocab_size: int = 0,
    field: str = "text",
    documents: bool = False,
) -> Corpus:
    """Open a corpus, preparing it first if that has not been done.

    Args:
      name: a known corpus, or with `dir` or `file` any name for a text.
      dir: a folder with the text, split by the names in it, or a saved Hugging Face data set;
        empty, as `file`: the embedded corpus, or a download.
      file: one file with the text, which is split 90/5/5 by place.
      cache_dir: where prepared streams are kept, under a key of content and settings.
      vocab: encode with this vocabulary (a trained model's) instead of the training text's own.
      splits: the splits that are needed; the vocabulary does not depend on them.
      download: fetch the text if there is no `dir`.
      tokenizer: `words`, `characters`, or `bpe`, whose subwords are found in the training split;
        empty: `vocab`'s, else words, or as a character set is read.
      vocab_size: how many subwords, the 256 bytes among them; 0: 8192.
      field: which field of .jsonl, .parquet and saved data sets has the text.
      documents: find where its documents begin: those of files that have them one by one, else at
        headings, else after blank lines.

    Raises:
      UserError: the text is not there, lacks a split, is empty, not UTF-8 or not of this kind, has
        words that the given vocabulary cannot express, a setting is without meaning for it, a
        package that it needs is not installed, or the cache cannot be written.
    """
    cache = cache_folder(cache_dir)
    dir, file = (str(expanded(path)) if path else "" for path in (dir, file))
    theirs = "" if vocab is None or vocab.tokenizer == "words" else vocab.tokenizer
    tokenizer = tokenizer or theirs
    source = locate(name, dir, cache, download, file=file, tokenizer=tokenizer, field=field)
    ours = tokenizer if tokenizer != "words" and name not in CHARACTER_SETS else ""
    if vocab is not None and theirs != ours:
        raise UserError(
            f"The model reads {theirs or 'words'}, but config.data.tokenizer={tokenizer} reads"
            f" {label(name, dir, file)} otherwise: leave it out."
        )
    if vocab_size and tokenizer != "bpe":
        raise UserError(
            f"config.data.vocab_size={vocab_size} is for config.data.tokenizer=bpe: leave it at 0."
        )
    sentences, begun = name.removeprefix("tfds:") == "lm1b", {}
    if documents and (sentences or name in CHARACTER_SETS):
        what = "sentences that are shuffled" if sentences else "characters without documents"
        raise UserError(f"config.data.documents has no meaning for {name}, {what}: leave it out.")
    where = dir or file
    needed = splits if vocab is not None else (*splits, "train")
    for split in needed:
        if split not in source.spans:
            raise UserError(
                f"{where or name} lacks the {split} split; expected {layout(name)}, but it has"
                f" {', '.join(Path(s.path).name for s in source.spans.values()) or 'none of them'}."
            )
    for split, span in source.spans.items():
        if span.start == span.stop:
            raise UserError(f"{source.where(split)} is empty; expected {source.unit}s to read.")

    # The streams of the text's own vocabulary serve a given one too if it is the same: a resumed or
    # evaluated run finds what its training prepared.
    entry = cache / _key(source, SPLITS, None, cache, vocab_size)
    prepare = functools.partial(_prepare, source, vocab_size=vocab_size)
    if vocab is None or _made(entry) == (vocab.text(), vocab.bpe):
        build_once(entry, lambda folder: prepare(SPLITS, None, folder))
    else:
        entry = cache / _key(source, splits, vocab, cache)
        build_once(entry, lambda folder: prepare(splits, vocab, folder))
    if vocab is None:
        # Our own file, written whole: the checks of Vocabulary.load would double the time.
        text, bpe = _made(entry)
        vocab = Vocabulary(tuple(text.split()), bpe)
    meta = json.loads((entry / "meta.json").read_text())
    # The same text may lie in several folders, so that the paths are not part of what is kept.
    warnings = {split: f"{source.where(split)}: {w}" for split, w in meta["warnings"].items()}
    shown = label(name, dir, file)
    texts = {
        split: {"name": shown, "dir": where, "digest": digest, "tokens": meta["tokens"][split]}
        | meta.get("sizes", {}).get(split, {})
        for split, digest in meta["digests"].items()
    }
    if documents:
        folder = borders.prepare(entry, vocab, source, cache)
        begun = {split: np.memmap(folder / f"{split}.int32", np.int32, "r") for split in splits}
        for split, found in json.loads((folder / "meta.json").read_text()).items():
            both = texts[split]["digest"] + found["digest"]
            digest = hashlib.blake2b(both.encode(), digest_size=16).hexdigest()
            texts[split] |= {**found, "digest": digest}
    return Corpus(
        name=shown,
        vocab=vocab,
        streams={split: np.memmap(entry / f"{split}.int32", np.int32, "r") for split in splits},
        unit=source.unit,
        warnings=(
            *filter(None, [source.note]),
            *(warnings[split] for split in splits if split in warnings),
        ),
        sentences=sentences,
        texts=texts,
        documents=begun,
    )


def _made(entry: Path) -> tuple[str, str]:
    """The vocabulary in the cache, as text, and the tokenizer of subwords; empty where none is."""
    files = (entry / "vocab.txt", entry / TOKENIZER_FILE)
    text, bpe = (path.read_text("utf-8") if path.exists() else "" for path in files)
    return text, bpe


def _key(
    source: Source,
    splits: Sequence[str],
    vocab: Vocabulary | None,
    cache: Path,
    vocab_size: int = 0,
) -> str:
    content = [
        [split, span.form, span.start, span.stop, file_digest(span.path, cache)]
        for split, span in source.spans.items()
        if split in splits
    ]
    symbols = (
        None if vocab is None else hashlib.sha256("\n".join(vocab.symbols).encode()).hexdigest()
    )
    settings = [FORMAT, source.unit, source.min_count, content, symbols]
    if source.unit == "subword":
        bpe = None if vocab is None else hashlib.sha256(vocab.bpe.encode()).hexdigest()
        settings += [vocab_size or subwords.VOCAB_SIZE, bpe]
    key = json.dumps(settings)
    return "tokens-" + hashlib.sha256(key.encode()).hexdigest()[:32]


def _prepare(
    source: Source,
    splits: Sequence[str],
    vocab: Vocabulary | None,
    folder: Path,
    *,
    vocab_size: int,
) -> None:
    given = vocab is not None
    spans = {split: span for split, span in source.spans.items() if split in splits}
    form = next(span.form for span in spans.values())
    if vocab is None and form == "bpe":
        bpe = subwords.train(tokens.span_texts(spans["train"]), vocab_size)
        vocab = Vocabulary(subwords.symbols(bpe), bpe)
    parts = {split: tokens.encode_span(span, folder, split, vocab) for split, span in spans.items()}
    counts = {split: tokens.count(parts[split]) for split in spans}
    for split in spans:
        if not any(counts[split].values()):
            raise UserError(f"{source.where(split)} is empty; expected {source.unit}s to read.")

    if vocab is None and source.unit == "character" and form != "characters":
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
        vocab = Vocabulary.from_counts(kept, eos=source.unit == "word")
    missing = {
        split: [word for word in counts[split] if word not in vocab.index] for split in spans
    }
    if vocab.unk_id is None and any(missing.values()):
        if given:
            split, words = next((s, words) for s, words in missing.items() if words)
            raise UserError(
                f"{source.where(split)} has {len(words)} symbols that the model's vocabulary lacks,"
                f" which has no <unk>; the first is {words[0]!r}; use text like the training's."
            )
        vocab = Vocabulary((*vocab.symbols, UNK))
        added = ", a symbol that training never sees"
    else:
        added = ""
    warnings = {
        split: f"{sum(counts[split][word] for word in words)} occurrences of"
        f" {len(words)} different {source.unit}s that the training text lacks (the first is"
        f" {vocab.shown(words[0])})"
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
        "sizes": {split: parts[split][0].sizes for split in spans},
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
        " characters on average, as if there were no spaces: read it with"
        " --config.data.tokenizer=characters or bpe."
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
