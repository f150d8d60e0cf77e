"""Where the documents of a text begin: its records, or its headings, or else after blank lines."""

import hashlib
import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from fwm.data import documents
from fwm.data.cache import build_once, file_digest
from fwm.data.sources import Source
from fwm.data.tokens import Span
from fwm.data.vocabulary import EOS, Vocabulary
from fwm.errors import UserError

# Part of the cache key: raise it when documents come to begin elsewhere.
FORMAT = 1
# A title; with more signs it is that of a section.
HEADING = re.compile(r"= [^=](.*[^=])? =")


def _lines(span: Span) -> Iterator[tuple[int, int, str]]:
    """Of each line: its place in the file, how many ends of lines are before it, its text."""
    place, ended = span.start, 0
    with open(span.path, "rb") as file:
        file.seek(place)
        for line in file:
            if place >= span.stop:
                return
            text = line[: span.stop - place].removeprefix(BOM_UTF8).decode("utf-8", "replace")
            yield place, ended, text
            place += len(line)
            ended += text.replace("\r\n", "\n").replace("\r", "\n").count("\n")
            if span.form == "lines" and EOS in text:  # written out it is the same symbol
                ended += text.split().count(EOS)


def first_lines(
    spans: Mapping[str, Span], listed: Mapping[str, set[int]]
) -> tuple[str, dict[str, list[int]]]:
    """What the documents begin with, and by split how many ends of lines are before each.

    Args:
        spans: of every split, so that all are read alike.
        listed: by split the places in the file of documents that came as such. Where no split has
            several, they begin with a line ` = Title = ` after a blank line (as in WikiText); where
            there is none, with the first line and every one after a blank line.
    """
    if any(len(places) > 1 for places in listed.values()):
        records = {
            split: [ended for place, ended, _ in _lines(span) if place in listed[split]]
            for split, span in spans.items()
        }
        return "files or records", records
    titles: dict[str, list[int]] = {split: [] for split in spans}
    others: dict[str, list[int]] = {split: [] for split in spans}
    for split, span in spans.items():
        blank = True
        for _, ended, line in _lines(span):
            text = line.strip()
            if blank and text:
                others[split].append(ended)
                if HEADING.fullmatch(text):
                    titles[split].append(ended)
            blank = not text
    return ("headings", titles) if any(titles.values()) else ("blank lines", others)


def places(
    stream: Int32[np.ndarray, "S"], vocab: Vocabulary, lines: list[int]
) -> Int64[np.ndarray, " documents"]:
    """The tokens that documents begin with, which have so many ends of lines before them.

    A subword that goes across the border is of the document before it.
    """
    newlines = np.array([vocab.decode([i]).count("\n") for i in range(len(vocab))])
    ends = np.flatnonzero((newlines > 0)[stream])
    begins = np.append(0, ends + 1)
    ended = np.append(0, np.cumsum(newlines[stream[ends]]))
    found = np.searchsorted(ended, np.array(lines, np.int64))
    found = np.unique(begins[found[found < len(begins)]])
    return found[found < len(stream)].astype(np.int64)


def prepare(entry: Path, vocab: Vocabulary, source: Source, cache: Path) -> Path:
    """Return the folder with the documents of the streams in a cache entry, written if needed.

    `<split>.int32` holds, for every place of the stream and its end, how many documents have begun
    before it; `meta.json` what they begin with, their number and the digest of where they begin.

    Raises:
      UserError: the training text has but one document.
    """
    spans = source.spans
    lists = {s: documents.list_of(span) for s, span in spans.items()} if source.gathered else {}
    content = [
        [split, span.start, span.stop, span.form, file_digest(span.path, cache)]
        + ([file_digest(str(lists[split]), cache)] if lists else [])
        for split, span in spans.items()
    ]
    key = hashlib.sha256(json.dumps([FORMAT, entry.name, content]).encode()).hexdigest()[:32]
    final = cache / f"borders-{key}"

    def build(folder: Path) -> None:
        listed = {
            split: {i for i in np.fromfile(path, np.int64).tolist() if i >= spans[split].start}
            for split, path in lists.items()
        }
        at, lines = first_lines(spans, listed)
        meta = {}
        for path in sorted(entry.glob("*.int32")):
            stream = np.memmap(path, np.int32, "r")
            begins = places(stream, vocab, lines[path.stem])
            if path.stem == "train" and len(begins) < 2:
                raise UserError(
                    "config.data.documents needs a text of records (.jsonl, .parquet), with"
                    " headings ` = Title = ` or with blank lines, at which its documents begin, and"
                    " the training text is one: leave it at False."
                )
            lengths = np.diff(np.concatenate([[-1], begins, [len(stream)]]))
            np.repeat(np.arange(len(lengths), dtype=np.int32), lengths).tofile(folder / path.name)
            digest = hashlib.blake2b(begins.tobytes(), digest_size=16).hexdigest()
            meta[path.stem] = {"documents": len(begins), "begin_at": at, "digest": digest}
        (folder / "meta.json").write_text(json.dumps(meta))

    build_once(final, build)
    return final
