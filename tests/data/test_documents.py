"""Files of documents in every form give one text; what is wrong with one is said in a sentence."""

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fwm import data
from fwm.data import documents
from fwm.errors import UserError

# More than the twenty that are split by their number; some are empty or have several lines.
DOCUMENTS = [f"= {i} =\nword{i} wörd\r\n\r\n" * (i % 3) + "x" * (i % 2) for i in range(43)]


def load(where, cache, **settings):
    place = {"dir": str(where)} if where.is_dir() else {"file": str(where)}
    return data.load("embedded", cache_dir=str(cache), **place, **settings)


def ended(documents):
    """What a text of these documents is: each ends with a newline, every line with no other."""
    texts = [d if d.endswith("\n") or not d else d + "\n" for d in documents]
    return [d.replace("\r\n", "\n") for d in texts]


def records(documents):
    return [{"id": i, "text": text, "more": None} for i, text in enumerate(documents)]


def write_jsonl(path, documents):
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records(documents))
    content = ("\ufeff" + lines + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_parquet(path, documents):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records(documents)), path)


SCHEMA = pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.string())])


def write_arrow(folder, documents):
    """What `datasets.Dataset.save_to_disk` leaves, in two parts."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (documents[:5], documents[5:]), strict=True):
        table = pyarrow.Table.from_pylist(records(part), SCHEMA)
        with pyarrow.ipc.new_stream(folder / name, table.schema) as out:
            out.write_table(table, 7)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def write_texts(folder, documents, packed=False):
    folder.mkdir(parents=True)
    for i, text in enumerate(documents):
        content = text.encode()
        name = f"{i:04d}.TXT" + ".gz" * packed
        (folder / name).write_bytes(gzip.compress(content) if packed else content)


def written(form, where, documents):
    if form == "saved":
        write_arrow(where, documents)
    elif form in ("txt", "txt.gz"):
        write_texts(where, documents, form == "txt.gz")
    else:
        where.mkdir(parents=True)
        write = write_parquet if form == "parquet" else write_jsonl
        write(where / f"part-00000.{form}", documents[:9])
        write(where / f"part-00001.{form}", documents[9:])


FORMS = ("txt", "txt.gz", "jsonl", "jsonl.gz", "parquet", "saved")


@pytest.mark.parametrize("form", FORMS)
def test_documents_are_split_by_their_number_and_none_is_torn(tmp_path, form):
    # A file without anything is no document; a record without text is an empty line.
    many = [d or "y" for d in DOCUMENTS] if form.startswith("txt") else DOCUMENTS
    written(form, tmp_path / "text", many)
    found = load(tmp_path / "text", tmp_path / "cache", tokenizer="characters")
    text = {split: found.vocab.decode(stream) for split, stream in found.streams.items()}
    expected = [d or "\n" * (not form.startswith("txt")) for d in ended(many)]
    parts = dict(train=expected[:39], valid=expected[39:41], test=expected[41:])
    assert text == {split: "".join(part) for split, part in parts.items()}
    words = load(tmp_path / "text", tmp_path / "cache")
    assert words.texts["valid"]["tokens"] == found.texts["valid"]["words"]


@pytest.mark.parametrize("form", FORMS)
def test_names_say_the_split(tmp_path, form):
    names = ("training", "validation", "testing") if form.startswith("j") else documents.NAMES
    texts = [DOCUMENTS[1:30:3], ["row wörd\n"], ["d\n", "Q\n"]]
    folder = tmp_path / "text"
    if form == "saved":
        folder.mkdir()
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": [*names, "unsupervised"]}))
        write_arrow(folder / "unsupervised", ["never read"])
    for name, part in zip(names, texts, strict=True):
        if form == "saved" or form.startswith("txt"):
            written(form, folder / name, part)
        else:
            folder.mkdir(exist_ok=True)
            write = write_parquet if form == "parquet" else write_jsonl
            write(folder / f"news.{name}-00000-of-00001.{form}", part)
    found = load(folder, tmp_path / "cache", tokenizer="characters")
    for (split, stream), part in zip(found.streams.items(), texts, strict=True):
        assert (split, found.vocab.decode(stream)) == (
            split,
            "".join(ended(part)).replace("Q", "\ufffd"),
        )
    assert (
        f"The test split of {folder}: 1 occurrences of 1 different characters" in found.warnings[-1]
    )


def test_only_train_is_the_whole_text(tmp_path):
    write_texts(tmp_path / "text" / "train", DOCUMENTS[1::3])
    write_texts(tmp_path / "same", DOCUMENTS[1::3])
    one, other = (load(tmp_path / name, tmp_path / "cache").texts for name in ("text", "same"))
    assert {s: text["digest"] for s, text in one.items()} == {
        s: text["digest"] for s, text in other.items()
    }
    # Fewer than twenty documents: their text is cut by its length, at the end of a line.
    sizes = [text["tokens"] for text in one.values()]
    assert 0.8 < sizes[0] / sum(sizes) < 0.95


def test_the_same_text_has_one_cache_whatever_its_form(tmp_path):
    for form in ("jsonl", "parquet", "saved"):
        written(form, tmp_path / form, DOCUMENTS)
        load(tmp_path / form, tmp_path / "cache")
    kinds = [path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()]
    assert (kinds.count("tokens"), kinds.count("documents")) == (1, 3)
    write_jsonl(tmp_path / "jsonl" / "part-00001.jsonl", ["another"] * 30)
    load(tmp_path / "jsonl", tmp_path / "cache")
    # Another field is another text.
    with pytest.raises(UserError, match=r"line 1, field 'id' is 0; expected text"):
        load(tmp_path / "jsonl", tmp_path / "cache", field="id")


def mixed(folder):
    write_texts(folder, ["a"])
    write_jsonl(folder / "more.jsonl", ["b"])


def half_named(folder):
    write_texts(folder, ["a"])
    (folder / "valid.txt.txt").write_text("b")


def missing_part(folder):
    write_arrow(folder, DOCUMENTS)
    (folder / "data-00001-of-00002.arrow").unlink()


def no_list(folder):
    write_arrow(folder, DOCUMENTS)
    (folder / "state.json").write_text("{}")


def broken_table(folder):
    folder.mkdir()
    (folder / "a.parquet").write_bytes(b"PAR1 no table")


def broken_arrow(folder):
    write_arrow(folder, DOCUMENTS)
    path = folder / "data-00001-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:300])


def file(name, content):
    def make(folder):
        folder.mkdir()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


GOOD = '{"text": "a b"}\n'
PACKED = gzip.compress(np.random.default_rng(0).bytes(10_000).hex().encode())
WRONG = {
    "two kinds": (mixed, r"files of 2 kinds, such as 0000\.TXT and more\.jsonl"),
    "half named": (half_named, r"valid\.txt\.txt says its split and that of 0000\.TXT does not"),
    "two splits": (file("a.train.test.txt", "a"), r"a\.train\.test\.txt names two splits"),
    "no test": (file("a.valid.jsonl", GOOD), "lacks the train split"),
    "nothing": (file("a.pdf", "a"), r"expected train\.txt.*\.parquet, but it has none of them"),
    "empty": (file("a.txt", ""), "text is empty; expected text"),
    "empty lines": (file("a.jsonl", "\n\n"), "text is empty; expected text"),
    "too small": (file("a.txt", "a b c\n"), "has 6 bytes of text: too few to hold out 5%"),
    "latin-1": (file("a.txt", b"caf\xe9 \n"), r"a\.txt is not UTF-8 text: byte 3 "),
    "utf-16": (file("a.txt", "a b".encode("utf-16")), r"a\.txt is not UTF-8 text: byte 0 "),
    "cut off": (file("a.txt.gz", PACKED[:5000]), r"a\.txt\.gz ends too early \(.*pack it again"),
    "changed": (file("a.txt.gz", PACKED[:3000] + b"xx" + PACKED[3002:]), "no sound gzip file"),
    "not packed": (file("a.jsonl.gz", GOOD), r"a\.jsonl\.gz is no sound gzip file"),
    "bad line": (file("a.jsonl", GOOD * 2 + '{"text": "a'), r"a\.jsonl, line 3, is not JSON"),
    "deep": (file("a.jsonl", "[" * 100_000), r"a\.jsonl, line 1, is not JSON"),
    "list": (file("a.jsonl", GOOD + "[1]"), "line 2, is a JSON list; expected an object with a"),
    "no text": (
        file("a.jsonl", '{"a": 1, "b": 2}'),
        r"line 1, has no field 'text' but a, b;.*field",
    ),
    "null": (file("a.jsonl", '{"text": null}'), "line 1, field 'text' is None; expected text"),
    "half": (file("a.jsonl", '{"text": "a\\ud800"}'), "line 1, field 'text' has half a character"),
    "bytes": (file("a.jsonl", b'{"text": "\xe9"}'), "line 1, is not UTF-8 at its byte 10"),
    "part": (missing_part, r"data-00001-of-00002\.arrow is missing"),
    "no list": (no_list, r"state\.json is damaged: expected its list '_data_files'"),
    "parquet": (broken_table, r"a\.parquet cannot be read as parquet"),
    "arrow": (broken_arrow, r"data-00001-of-00002\.arrow cannot be read as arrow"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_sentence(tmp_path, make, message):
    make(tmp_path / "text")
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "text", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    left = {path.name for path in (tmp_path / "cache").glob("*-*") if "tmp" in path.name}
    assert not left


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    written("parquet", tmp_path / "text", DOCUMENTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs the package pyarrow: `pip install pyarrow`"):
        load(tmp_path / "text", tmp_path / "cache")


def test_hidden_files_are_not_read(tmp_path):
    write_texts(tmp_path / "text", DOCUMENTS)
    for name in (".git", "__MACOSX"):
        write_texts(tmp_path / "text" / name, ["\xff"])
    (tmp_path / "text" / "README.md").write_text("no document")
    assert len(documents.find(tmp_path / "text")[""]) == len(DOCUMENTS)


def test_a_folder_without_permission_is_not_an_empty_one(tmp_path, monkeypatch):
    """For root, as in many a container, there is none: what a user would be told stands in."""
    write_texts(tmp_path / "text" / "closed", DOCUMENTS)
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="closed"):
        documents.find(tmp_path / "text")


def test_a_saved_data_set_of_the_library_itself(tmp_path):
    datasets = pytest.importorskip("datasets", reason="large; its format is written by hand above")
    whole = datasets.Dataset.from_list(records(DOCUMENTS)).shuffle(seed=0)
    whole.save_to_disk(tmp_path / "text")
    found = load(tmp_path / "text", tmp_path / "cache", tokenizer="characters")
    text = "".join(found.vocab.decode(stream) for stream in found.streams.values())
    assert text == "".join(d or "\n" for d in ended(whole["text"]))
