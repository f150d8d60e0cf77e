"""Files of documents, as people have them, into plain text: once, in the cache.

A document is a file of text (.txt, .txt.gz), a line of a .jsonl file, a row of a .parquet file or
one of a Hugging Face data set that lies on disk.
"""

import gzip
import hashlib
import io
import json
import re
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fwm.data.cache import build_once, file_digest
from fwm.data.tokens import Span, texts
from fwm.errors import UserError
from fwm.files import files_below, read_json

# Part of the cache key: raise it when the files come out otherwise.
FORMAT = 2
PLAIN = (".txt", ".txt.gz")
LINES = (".jsonl", ".jsonl.gz")
KINDS = (*PLAIN, *LINES, ".parquet")
ARROW = ".arrow"  # of a data set that was saved; only its own list says which belong to it
NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing"),
}
# With fewer documents, one in twenty is none: their text is cut by its length.
ENOUGH = 20
WHOLE = "whole"

Files = Mapping[str, Sequence[Path]]  # by split; "": all splits are to be made of them


def kind(path: Path) -> str:
    """The ending that says what a file is, one of `KINDS` or `.arrow`; else empty."""
    return next((k for k in (*KINDS, ARROW) if path.name.lower().endswith(k)), "")


def find(folder: Path) -> Files:
    """The files of documents in a folder, by the split that their names or subfolders say.

    A folder that `save_to_disk` of a Hugging Face data set wrote has its own list of them.

    Raises:
      UserError: files of two kinds, only some of them named as of a split, or a damaged list.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _saved(folder / "dataset_dict.json", "splits")
        by_split = {_split(name): _arrow_files(folder / name) for name in names}
        by_split.pop("", None)  # of no use to us, such as `unsupervised`
        return _whole_if_only_train(by_split)
    if (folder / "state.json").is_file():
        return {"": _arrow_files(folder)}
    found = [
        path
        for path in files_below(folder)
        if kind(path) in KINDS
        and path.is_file()
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    ]
    kinds = {kind(path): path.relative_to(folder) for path in reversed(found)}
    if len(kinds) > 1:
        one, other = sorted(map(str, kinds.values()))[:2]
        raise UserError(
            f"{folder} has files of {len(kinds)} kinds, such as {one} and {other}; expected one:"
            " move the others to a folder of their own."
        )
    files: dict[str, list[Path]] = {}
    for path in found:
        files.setdefault(_split(path.relative_to(folder)), []).append(path)
    if "" in files and len(files) > 1:
        named = next(paths[0] for split, paths in files.items() if split).relative_to(folder)
        raise UserError(
            f"{folder}: the name of {named} says its split and that of"
            f" {files[''][0].relative_to(folder)} does not; name train, valid or test in all of"
            " them, or in none."
        )
    return _whole_if_only_train(files)


def _whole_if_only_train(files: Files) -> Files:
    return {"": files["train"]} if set(files) == {"train"} else files


def _split(path: str | Path) -> str:
    """The split that the outermost folder or the file's name says, empty if none does."""
    for part in Path(path).parts:
        words = re.split(r"[^a-z]+", part.lower())
        found = [split for split, names in NAMES.items() if any(name in words for name in names)]
        if len(found) > 1:
            raise UserError(f"{path} names two splits, {' and '.join(found)}; rename it.")
        if found:
            return found[0]
    return ""


def _saved(path: Path, key: str) -> list[Any]:
    """A list in a file of a saved data set."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(f"{path} is damaged: expected its list {key!r}; save the data set again.")
    return content[key]


def _arrow_files(folder: Path) -> list[Path]:
    files = [folder / part["filename"] for part in _saved(folder / "state.json", "_data_files")]
    for path in files:
        if not path.is_file():
            raise UserError(
                f"{path} is missing, a part of the data set in {folder}; save it again."
            )
    return files


def gather(files: Files, field: str, cache_dir: Path) -> tuple[Path, dict[str, tuple[int, int]]]:
    """Write documents one below the other, each ended by a newline: once, in the cache.

    Returns:
      The folder with a text `<split>.txt` for every split, `whole.txt` for the split "", and beside
      each `.begins`, the places in it where a document begins; and if
      there are enough documents in this one, where each split of it begins and ends: the last 5% of
      them are for testing, the 5% before for validation.

    Raises:
      UserError: a file cannot be read or a document has no text, or the cache cannot be written.
    """
    content = [
        [split, [[kind(path), file_digest(str(path), cache_dir)] for path in paths]]
        for split, paths in files.items()
    ]
    key = json.dumps([FORMAT, field, content])
    folder = cache_dir / f"documents-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    build_once(folder, lambda temporary: _write(files, field, temporary))
    borders = json.loads((folder / "borders.json").read_text())
    return folder, {split: (start, stop) for split, start, stop in borders}


def list_of(span: Span) -> Path:
    """The file, int64, with the places in a span's text at which its documents begin."""
    return Path(span.path).with_suffix(".begins")


def _write(files: Files, field: str, folder: Path) -> None:
    borders: list[tuple[str, int, int]] = []
    for split, paths in files.items():
        ends = array("q", [0])  # there may be many millions
        with open(folder / f"{split or WHOLE}.txt", "wb") as out:
            for path in paths:
                for document in _documents(path, field):
                    out.writelines(piece.encode("utf-8") for piece in document)
                    if out.tell() > ends[-1]:
                        ends.append(out.tell())
        with open(folder / f"{split or WHOLE}.begins", "wb") as out:
            ends[:-1].tofile(out)
        held_out, n = (len(ends) - 1) // ENOUGH, len(ends) - 1
        if not split and held_out:
            marks = [ends[at] for at in (0, n - 2 * held_out, n - held_out, n)]
            borders = list(zip(NAMES, marks[:-1], marks[1:], strict=True))
    (folder / "borders.json").write_text(json.dumps(borders))


def _documents(path: Path, field: str) -> Iterator[Iterator[str]]:
    """Each document in pieces, to be read before the next, a newline at its end.

    An empty file is none, an empty text in a line or row is an empty line.
    """
    if kind(path) in PLAIN:
        with _opened(path) as file:
            yield _ended(_read(path, texts(file, str(path))))
    elif kind(path) in LINES:
        with _opened(path) as file:
            for number, line in enumerate(_read(path, file), 1):
                if line.strip():
                    yield _line(_from_json(f"{path}, line {number},", line, field))
    else:
        for text in _from_table(path, field):
            yield _line(text)


def _line(text: str) -> Iterator[str]:
    yield text if text.endswith("\n") else text + "\n"


def _ended(pieces: Iterator[str]) -> Iterator[str]:
    last = "\n"
    for piece in pieces:
        last = piece
        yield piece
    if not last.endswith("\n"):
        yield "\n"


def _opened(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _read(path: Path, what: Iterator[Any]) -> Iterator[Any]:
    """The same, a packed file that is damaged being a user's error."""
    try:
        yield from what
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = "ends too early" if isinstance(error, EOFError) else "is no sound gzip file"
        raise UserError(f"{path} {reason} ({error}); fetch or pack it again.") from None


def _from_json(where: str, line: bytes, field: str) -> str:
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 at its byte {error.start}; convert the file to UTF-8."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); mend the line or remove it.") from None
    if not isinstance(record, dict):
        raise UserError(
            f"{where} is a JSON {type(record).__name__}; expected an object with a field {field!r}."
        )
    _check_field(where, field, record)
    return _checked_text(f"{where} field {field!r}", record[field])


def _check_field(where: str, field: str, fields: Any) -> None:
    if field not in fields:
        raise UserError(
            f"{where} has no field {field!r} but {', '.join(map(str, fields)) or 'none at all'};"
            " choose the one with the text as --config.data.field."
        )


def _checked_text(where: str, text: Any) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where} is {text!r:.40}; expected text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has half a character at {error.start}, a lone surrogate; mend or remove it."
        ) from None
    return text


def _from_table(path: Path, field: str) -> Iterator[str]:
    """The column `field` of a Parquet file or of a file of a saved data set, row by row."""
    try:
        # Needed for these files only.
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(
            f"Reading {path} needs the package pyarrow: `pip install pyarrow`."
        ) from None
    try:
        if kind(path) == ARROW:
            table: Any = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
            schema, batches = table.schema, iter(table)
        else:
            table = pyarrow.parquet.ParquetFile(path)
            schema = table.schema_arrow
            batches = table.iter_batches(1000, columns=[field] if field in schema.names else [])
        _check_field(str(path), field, schema.names)
        row = 0
        for batch in batches:
            for text in batch.column(field).to_pylist():
                row += 1
                yield _checked_text(f"{path}, row {row}, field {field!r}", text)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as {kind(path)[1:]} ({reason}).") from error
