"""Fetching through TFDS, from a server of our own: order, splits, checksums, announcements."""

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from functools import partial

import pytest

from fwm import data
from fwm.errors import UserError

pytest.importorskip("tensorflow_datasets")

from fwm.data import tfds_builder

TEXT = {
    "train": "".join(f" line {i} é of the text \n" for i in range(3000)) + " the end",
    "valid": " line of the text \n",
    "test": " line \n \n",
}


@pytest.fixture
def serve(tmp_path):
    """Serve tmp_path/site; returns a function that stores a file and gives its URL."""
    site = tmp_path / "site"
    site.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def store(name, content):
        (site / name).write_bytes(content)
        return f"http://127.0.0.1:{server.server_port}/{name}"

    yield store
    server.shutdown()
    thread.join()
    server.server_close()


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def offer(monkeypatch, name, url, content, members, **kwargs):
    archive = tfds_builder.Archive(
        {url: (len(content), hashlib.sha256(content).hexdigest())}, members, **kwargs
    )
    monkeypatch.setitem(tfds_builder.ARCHIVES, name, archive)


def fetch(tmp_path, name, **kwargs):
    return data.load(name, cache_dir=str(tmp_path / "cache"), download=True, **kwargs)


def same(tmp_path, fetched, name, texts):
    """The fetched corpus equals the one of a folder with the same text."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for split, text in texts.items():
        (folder / f"{split}.txt").write_text(text)
    local = data.load(name, dir=str(folder), cache_dir=str(tmp_path / "other"))
    assert fetched.vocab == local.vocab
    for split in texts:
        assert fetched.streams[split].tolist() == local.streams[split].tolist()


def test_zip_of_wikitext(tmp_path, monkeypatch, serve, capsys):
    monkeypatch.setattr(tfds_builder, "PIECE_BYTES", 1000)
    members = {split: f"wikitext-2/wiki.{split}.tokens" for split in TEXT}
    content = zipped({members[split]: text for split, text in TEXT.items()})
    url = serve("wikitext-2.zip", content)
    offer(monkeypatch, "wikitext2", url, content, members)
    fetched = fetch(tmp_path, "wikitext2")
    said = capsys.readouterr().out
    assert said.startswith("Downloading wikitext2, ")
    assert url in said.split("\n")[0]
    same(tmp_path, fetched, "wikitext2", TEXT)
    # The second time neither a network, nor TFDS, nor the permission is needed.
    monkeypatch.setattr(tfds_builder, "prepare", None)
    assert data.load("wikitext2", cache_dir=str(tmp_path / "cache")).vocab == fetched.vocab


def test_zip_of_bytes_is_cut_90_5_5(tmp_path, monkeypatch, serve):
    monkeypatch.setattr(tfds_builder, "PIECE_BYTES", 100)
    raw = ("Größe \n" * 300).encode()
    content = zipped({"enwik8": raw})
    offer(
        monkeypatch, "enwik8", serve("e.zip", content), content,
        dict.fromkeys(TEXT, "enwik8"), cut=True,
    )  # fmt: skip
    fetched = fetch(tmp_path, "enwik8")
    read = [int(fetched.vocab.symbols[i]) for s in fetched.streams.values() for i in s]
    assert bytes(read) == raw
    assert len(fetched.streams["test"]) == len(raw) // 20


def test_tar_of_sentences_maps_rare_words(tmp_path, monkeypatch, serve):
    buffer = io.BytesIO()
    files = {"a/train-1": "x y x\n", "a/train-2": "x z q\n", "a/held-1": "x y\n", "a/held-0": "q\n"}
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    content = buffer.getvalue()
    offer(
        monkeypatch, "lm1b", serve("l.tar.gz", content), content,
        {"train": "a/train-", "valid": "a/held-1", "test": "a/held-0"},
    )  # fmt: skip
    fetched = fetch(tmp_path, "lm1b")
    assert fetched.sentences
    # x three times; y, z and q rarer.
    assert set(fetched.vocab.symbols) == {"<eos>", "x", "<unk>"}
    assert fetched.vocab.decode(fetched.streams["train"]) == "x <unk> x\nx <unk> <unk>\n"
    assert fetched.vocab.decode(fetched.streams["test"]) == "<unk>\n"
    assert fetched.warnings == ()


def test_plain_files_with_md5(tmp_path, monkeypatch, serve):
    urls = {serve(f"ptb.{split}.txt", text.encode()): (0, "") for split, text in TEXT.items()}
    md5 = {split: hashlib.md5(text.encode()).hexdigest() for split, text in TEXT.items()}
    archive = tfds_builder.Archive(urls, dict.fromkeys(TEXT, ""), md5=md5)
    monkeypatch.setitem(tfds_builder.ARCHIVES, "ptb", archive)
    same(tmp_path, fetch(tmp_path, "ptb"), "ptb", TEXT)


def test_wrong_checksum_is_refused(tmp_path, monkeypatch, serve):
    members = {split: f"{split}.txt" for split in TEXT}
    content = zipped({f"{split}.txt": text for split, text in TEXT.items()})
    offer(monkeypatch, "wikitext2", serve("w.zip", content + b"x"), content, members)
    with pytest.raises(UserError, match=r"wikitext2 cannot be fetched.*make a folder with"):
        fetch(tmp_path, "wikitext2")
    assert not (tmp_path / "cache" / "text-wikitext2").exists()


def test_without_a_network_the_folder_is_named_at_once(tmp_path, monkeypatch):
    offer(monkeypatch, "wikitext2", "http://127.0.0.1:9/w.zip", b"", {})
    with pytest.raises(UserError, match=r"cannot be reached.*wiki\.train\.tokens"):
        fetch(tmp_path, "wikitext2")


def test_names_that_tfds_does_not_know_or_that_are_no_text(tmp_path):
    with pytest.raises(UserError, match="TFDS has no data set 'no_such_set'"):
        fetch(tmp_path, "tfds:no_such_set")
    with pytest.raises(UserError, match="has no feature `text` but image, label"):
        fetch(tmp_path, "tfds:mnist")
