"""Where the documents of a text begin: at its headings, or else after its blank lines."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from fwm.data.cache import build_once
from fwm.data.vocabulary import Vocabulary
from fwm.errors import UserError

# Part of the cache key: raise it when documents come to begin elsewhere.
FORMAT = 1
# A title; with more signs it is that of a section.
HEADING = re.compile(r"= [^=]([^\n]*[^=\n])? =")


def document_begins(
    stream: Int32[np.ndarray, "S"], vocab: Vocabulary
) -> Int64[np.ndarray, "documents"]:
    """Return the places of the tokens that documents begin with.

    These are the lines ` = Title = ` after a blank line, as in WikiText; where there are none, the
    first line and every one after a blank line.
    """
    texts = [vocab.decode([i]) for i in range(len(vocab))]
    # How many newlines a token ends with (a subword may be several), and whether it is white space.
    newlines = np.array([len(text) - len(text.rstrip("\n")) for text in texts])
    empty = np.array([not text.strip() for text in texts])
    ends = np.flatnonzero((newlines > 0)[stream])
    found, blank = newlines[stream[ends]], empty[stream[ends]]
    # Whether there is text before the first end, and between each and the next one.
    text = (~empty & (newlines == 0))[stream]
    text = np.logical_or.reduceat(text, np.append(0, ends)) if len(ends) else np.array([text.any()])
    if len(ends) and ends[0] == 0:
        text[0] = False
    # Ends without text between them add up; a border is where they are two or at the beginning.
    runs = np.flatnonzero(text[:-1] | ~blank | (np.arange(len(ends)) == 0))
    last = np.append(runs[1:], len(ends))[: len(runs)] - 1
    total = np.add.reduceat(found, runs) if len(runs) else found
    total[:1] += 2 * (blank[:1] & ~text[:1])
    more = text[1:][last] | (last + 1 < len(ends))
    lines = ends[last[(total >= 2) & more]] + 1
    if text[0] or not blank[:1].all():
        lines = np.append(0, lines)
    heading = np.zeros(len(lines), bool)
    may_be = np.array([text.lstrip(" ")[:1] in ("", "=") for text in texts])[stream[lines]]
    for i in np.flatnonzero(may_be):
        end = np.searchsorted(ends, lines[i])
        stop = ends[end] + 1 if end < len(ends) else len(stream)
        heading[i] = HEADING.fullmatch(vocab.decode(stream[lines[i] : stop]).strip()) is not None
    return lines[heading] if heading.any() else lines


def prepare(entry: Path, vocab: Vocabulary) -> Path:
    """Return the folder with the documents of the streams in a cache entry, written if needed.

    `<split>.int32` holds, for every place of the stream and its end, how many documents have begun
    before it; `meta.json` the number of documents and the digest of where they begin.

    Raises:
      UserError: the training text has but one document.
    """
    final = entry.with_name(f"borders-{FORMAT}-{entry.name}")

    def build(folder: Path) -> None:
        meta = {}
        for path in sorted(entry.glob("*.int32")):
            stream = np.memmap(path, np.int32, "r")
            begins = document_begins(stream, vocab)
            if path.stem == "train" and len(begins) < 2:
                raise UserError(
                    "config.data.documents needs a text with headings ` = Title = ` or blank lines,"
                    " at which its documents begin, and the training text is one: leave it at"
                    " False."
                )
            lengths = np.diff(np.concatenate([[-1], begins, [len(stream)]]))
            np.repeat(np.arange(len(lengths), dtype=np.int32), lengths).tofile(folder / path.name)
            digest = hashlib.blake2b(begins.tobytes(), digest_size=16).hexdigest()
            meta[path.stem] = {"documents": len(begins), "digest": digest}
        (folder / "meta.json").write_text(json.dumps(meta))

    build_once(final, build)
    return final
