"""From folders to streams: the official order, errors in one sentence, a cache that is safe."""

import gzip
import hashlib
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from fwm import data
from fwm.data import Vocabulary, corpus, tokens
from fwm.errors import UserError

ROOT = Path(__file__).parents[2]


def folder(path, train="a b a\nc\n", valid="a c\n", test="b\n", names="{}.txt"):
    path.mkdir(exist_ok=True)
    for split, text in (("train", train), ("valid", valid), ("test", test)):
        if text is not None:
            content = text.encode() if isinstance(text, str) else text
            (path / names.format(split)).write_bytes(content)
    return str(path)


def load(tmp_path, name="mytext", dir=None, **kwargs):
    return data.load(
        name, dir=dir or str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"), **kwargs
    )


def official(text):
    """The official tokeniser, line by line: what the fast one must equal."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    return [word for line in lines for word in [*line.strip().split(), "<eos>"]]


@pytest.mark.parametrize("names", ["{}.txt", "wiki.{}.tokens", "ptb.{}.txt"])
def test_folder_in_every_naming(tmp_path, names):
    dir = folder(tmp_path / "text", " b a \n\n a  c", "c\n", "b\n\n", names)
    found = load(tmp_path, dir=dir)
    assert found.vocab.symbols == ("<eos>", "a", "b", "c")
    assert {split: stream.tolist() for split, stream in found.streams.items()} == {
        "train": [2, 1, 0, 0, 1, 3, 0],
        "valid": [3, 0],
        "test": [2, 0, 0],
    }
    assert (found.unit, found.warnings, found.sentences) == ("word", (), False)
    assert all(isinstance(stream, np.memmap) for stream in found.streams.values())
    assert all(stream.dtype == np.int32 for stream in found.streams.values())
    assert set(load(tmp_path, dir=dir, splits=("valid",)).streams) == {"valid"}


# All white space of str.split(), some of it no line break; letters beside them in Unicode.
STRANGE = (
    "x\u00a0y\u2003z\u3000\u1680w\x1cq\x1dr\x1es\x1ft\x85u\u2028v\u2029\u202f\u205fé\u200b\u2013\ufeff"
    "\x0b\x0c\tend\r\nwin\r\rmac \n\n  \n<eos> literal \U0001f600 last"
)


@pytest.mark.parametrize("ending", ["", "\n", " ", "\r", "\r\n", "\n\n", "\u2003"])
@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 21])
def test_tokens_equal_the_official_ones_at_every_block_size(
    tmp_path, monkeypatch, ending, block_bytes
):
    monkeypatch.setattr(tokens, "BLOCK_BYTES", block_bytes)
    text = STRANGE * 3 + ending
    found = load(tmp_path, dir=folder(tmp_path / "text", text, "x\n", "x"))
    words = [found.vocab.symbols[i] for i in found.streams["train"]]
    assert words == official(text)


@pytest.mark.parametrize("bits", [1, 4, 20])
def test_tokens_equal_the_official_ones_when_words_collide_in_the_table(
    tmp_path, monkeypatch, bits
):
    monkeypatch.setattr(tokens, "BLOCK_BYTES", 500)
    monkeypatch.setattr(tokens, "SLOTS", 1 << bits)
    monkeypatch.setattr(tokens, "SHIFT", np.uint64(64 - bits))
    rng = np.random.default_rng(bits)
    words = ["".join(rng.choice(list("abé"), size=n)) for n in rng.integers(1, 20, size=4000)]
    words += ["a" * n for n in range(1, 20)] + ["b", "b\0", "b\0\0", "b"]
    ends = rng.choice([" ", "  ", "\t", "\n", " \n\n"], size=len(words))
    text = "".join(word + end for word, end in zip(words, ends, strict=True))
    found = load(tmp_path, dir=folder(tmp_path / "text", text, "a\n", "a\n"))
    assert [found.vocab.symbols[i] for i in found.streams["train"]] == official(text)


@pytest.mark.parametrize("ending", ["", "\n", " "])
def test_parallel_equals_serial(tmp_path, monkeypatch, ending):
    rng = np.random.default_rng(0)
    lines = [" ".join(f"w{int(i)}é" for i in rng.zipf(1.3, n) % 5000) for n in range(200)]
    text = "\n".join(lines) + ending
    dir = folder(tmp_path / "text", text, "w1é\n", "w1é nothere\n")
    serial = load(tmp_path, dir=dir)
    monkeypatch.setattr(tokens, "PARALLEL_BYTES", 1000)
    monkeypatch.setattr(tokens, "cores", lambda: 3)
    parallel = data.load("mytext", dir=dir, cache_dir=str(tmp_path / "other"))
    assert parallel.vocab == serial.vocab
    assert parallel.warnings == serial.warnings
    for split in ("train", "valid", "test"):
        np.testing.assert_array_equal(parallel.streams[split], serial.streams[split])
    assert [serial.vocab.symbols[i] for i in serial.streams["train"]] == official(text)
    # Nothing of the work is left beside the streams.
    (entry,) = (tmp_path / "other").glob("tokens-*")
    assert {p.name for p in entry.iterdir()} == {
        "meta.json", "vocab.txt", "train.int32", "valid.int32", "test.int32"
    }  # fmt: skip


def test_error_of_a_worker_names_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PARALLEL_BYTES", 1000)
    monkeypatch.setattr(tokens, "cores", lambda: 2)
    text = b"word \n" * 1000 + b"\xff\n"
    with pytest.raises(UserError, match=r"^[^\n]*train\.txt is not UTF-8 text: byte 6000 [^\n]*$"):
        load(tmp_path, dir=folder(tmp_path / "text", text))


def test_full_disk_of_a_worker_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PARALLEL_BYTES", 1000)
    monkeypatch.setattr(tokens, "cores", lambda: 2)
    folder(tmp_path / "text", "word " * 50_000)
    # The workers inherit the limit on the size of a file.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
            load(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["locks"]


def test_official_enwik8_order(tmp_path):
    """Counts all three splits, lower-cases, no <eos>; newlines vanish."""
    dir = folder(tmp_path / "text", "32 97\n97\n", "98 98 98 98\n", "32 97 99")
    found = load(tmp_path, "enwik8", dir)
    assert found.vocab.symbols == ("98", "97", "32", "99")
    assert found.streams["train"].tolist() == [2, 1, 1]
    assert (found.unit, found.vocab.eos_id) == ("character", None)
    assert found.vocab.decode(found.streams["test"]) == " ac"


def test_raw_enwik8_and_text8_are_split_90_5_5(tmp_path):
    content = bytes(range(256)) * 10
    (tmp_path / "enwik8").write_bytes(content)
    found = load(tmp_path, "enwik8", str(tmp_path))
    read = [int(found.vocab.symbols[i]) for s in found.streams.values() for i in s]
    assert bytes(read) == content
    assert [len(s) for s in found.streams.values()] == [2304, 128, 128]

    (tmp_path / "text8").write_text("the cat sat on a mat " * 20)
    found = load(tmp_path, "text8", str(tmp_path))
    assert found.vocab.symbols[:2] == ("_", "t") or found.vocab.symbols[:2] == ("_", "a")
    assert found.vocab.decode(found.streams["train"])[:12] == "the cat sat "
    test = load(tmp_path, "text8", str(tmp_path), vocab=found.vocab, splits=("test",))
    assert found.vocab.decode(test.streams["test"]) == ("the cat sat on a mat " * 20)[-21:]

    (tmp_path / "text8").write_text("Upper case " * 20)
    with pytest.raises(UserError, match="is not text8"):
        load(tmp_path, "text8", str(tmp_path))


def test_running_text_is_no_character_set(tmp_path):
    with pytest.raises(UserError, match=r"'words'.*decimal codes"):
        load(tmp_path, "enwik8", folder(tmp_path / "text", "words of text\n"))


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path):
    dir = folder(tmp_path / "text", "\ufeffa b\n", "\ufeffb\n", "\ufeff a\r\n")
    found = load(tmp_path, dir=dir)
    assert found.vocab.symbols == ("<eos>", "a", "b")
    assert [stream.tolist() for stream in found.streams.values()] == [[1, 2, 0], [2, 0], [1, 0]]
    assert found.warnings == ()
    (tmp_path / "vocab.txt").write_text("\ufeff<eos>\na\n", "utf-8")
    assert Vocabulary.load(tmp_path / "vocab.txt").symbols == ("<eos>", "a")
    with pytest.raises(UserError, match="is empty"):
        load(tmp_path, dir=folder(tmp_path / "text", valid="\ufeff"))
    with pytest.raises(UserError, match="not UTF-8 text: byte 0"):
        load(tmp_path, dir=folder(tmp_path / "text", "a b\n".encode("utf-16")))


@pytest.mark.parametrize("tokenizer", ["words", "characters"])
def test_utf_16_without_a_mark_is_refused_and_a_stray_nul_is_read(tmp_path, tokenizer):
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le"):
        dir = folder(tmp_path / encoding, ("the cat sat\n" * 9).encode(encoding))
        with pytest.raises(UserError, match=r"train\.txt is not UTF-8 text: it has NUL every few"):
            load(tmp_path, dir=dir, tokenizer=tokenizer)
    if tokenizer == "words":
        found = load(tmp_path, dir=folder(tmp_path / "stray", "the c\0t sat on it\n"))
        assert "c\0t" in found.vocab.symbols


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("春天来了花都开了\n我们去公园散步吧\n", True),
        ("今日は学校に行きました。\n", True),
        ("ภาษาไทยไม่มีการเว้นวรรคระหว่างคำในประโยค\n", True),
        ("春天 来 了 花 都 开 了\n", False),
        ("Donaudampfschifffahrt is long but not so long\n", False),
    ],
)
def test_words_that_are_whole_lines_are_told(tmp_path, text, warned):
    found = load(tmp_path, dir=folder(tmp_path / "text", text, text, text)).warnings
    assert len(found) == warned
    assert all(
        "train.txt: its words" in w and "data.tokenizer=characters or bpe" in w for w in found
    )


def test_a_warning_names_the_file_that_is_read(tmp_path):
    for name in ("one", "other"):
        found = load(tmp_path, dir=folder(tmp_path / name, valid="d\n"))
        assert found.warnings[0].startswith(str(tmp_path / name / "valid.txt"))
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 1


def test_what_a_text_is(tmp_path):
    texts = load(tmp_path, dir=folder(tmp_path / "one"), splits=("valid",)).texts
    assert {split: text["tokens"] for split, text in texts.items()} == dict(
        train=6, valid=3, test=2
    )
    dir = folder(tmp_path / "other", train="b b a\nc\n")
    changed = load(tmp_path, name="embedded", dir=dir).texts
    assert changed["train"] | {"digest": ""} == dict(name="other", dir=dir, digest="", tokens=6)
    assert changed["train"]["digest"] != texts["train"]["digest"]
    # It is of the tokens: lines that end otherwise make the same text.
    same = load(tmp_path, dir=folder(tmp_path / "third", train="a b  a\r\nc")).texts
    assert same["train"]["digest"] == texts["train"]["digest"]


def test_home_and_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder(tmp_path / "text")
    data.load("mytext", dir="~/text", cache_dir="~/cache")
    assert (tmp_path / "cache" / "digests").exists() or list((tmp_path / "cache").glob("tokens-*"))
    with pytest.raises(UserError, match="cache_dir is empty"):
        data.load("mytext", dir="~/text", cache_dir="")
    with pytest.raises(UserError, match="home folder that cannot be found"):
        data.load("mytext", dir="~nobody-of-this-name/text", cache_dir="~/cache")


def test_unknown_words_with_unk_in_training(tmp_path):
    found = load(tmp_path, dir=folder(tmp_path / "text", "a <unk> a\n", "a x y x\n", "a\n"))
    assert found.vocab.symbols == ("<eos>", "a", "<unk>")
    assert found.streams["valid"].tolist() == [1, 2, 2, 2, 0]
    (warning,) = found.warnings
    assert "valid.txt: 3 occurrences of 2 different words" in warning
    assert "'x'" in warning
    # Opened again, and for the training alone.
    assert load(tmp_path).warnings == (warning,)
    assert load(tmp_path, splits=("train",)).warnings == ()


def test_unknown_words_without_unk_add_it_at_the_end(tmp_path):
    found = load(tmp_path, dir=folder(tmp_path / "text", "b a\n", "a\n", "a x\n"))
    assert found.vocab.symbols == ("<eos>", "b", "a", "<unk>")
    assert found.streams["test"].tolist() == [2, 3, 0]
    assert "1 occurrences of 1 different words" in found.warnings[0]
    # The vocabulary does not depend on the splits that are asked for.
    assert load(tmp_path, splits=("train", "valid")).vocab == found.vocab


def test_given_vocabulary(tmp_path):
    dir = folder(tmp_path / "text", None, None, "a b zzz\n")
    vocab = Vocabulary(("<eos>", "b", "<unk>", "a"))
    found = load(tmp_path, dir=dir, vocab=vocab, splits=("test",))
    assert found.vocab == vocab
    assert found.streams["test"].tolist() == [3, 1, 2, 0]
    with pytest.raises(UserError, match=r"1 symbols .* vocabulary lacks.*'zzz'"):
        load(tmp_path, dir=dir, vocab=Vocabulary(("<eos>", "a", "b")), splits=("test",))
    with pytest.raises(UserError, match="lacks the train split"):
        load(tmp_path, dir=dir, splits=("test",))


def test_given_vocabulary_equal_to_the_own_one_reuses_the_streams(tmp_path, monkeypatch):
    own = load(tmp_path, dir=folder(tmp_path / "text"))
    monkeypatch.setattr(corpus, "_prepare", lambda *_, **__: pytest.fail("prepared again"))
    again = load(tmp_path, vocab=own.vocab, splits=("train", "valid"))
    np.testing.assert_array_equal(again.streams["train"], own.streams["train"])


@pytest.mark.parametrize("test", ["g h\n", None])
@pytest.mark.parametrize("packed", [False, True])
def test_a_split_that_is_not_there_is_held_out_of_training(tmp_path, test, packed):
    """Of a text of one's own, whatever its files are: 5% for each that is missing."""
    lines = [f"a b{i % 10:02} c\n" for i in range(40)]
    splits = {"train": "".join(lines), **({"test": test} if test else {})}
    (tmp_path / "text").mkdir()
    for split, text in splits.items():
        (tmp_path / "text" / f"{split}.txt").write_text(text)
        if packed:
            plain = tmp_path / "text" / f"{split}.txt"
            plain.with_name(f"{split}.txt.gz").write_bytes(gzip.compress(plain.read_bytes()))
            plain.unlink()
    found = load(tmp_path, "embedded", str(tmp_path / "text"), splits=("train", "valid", "test"))
    said = {split: found.vocab.decode(found.streams[split]) for split in found.streams}
    # The line that 95% of the bytes end with is trained on; and the one that 90% do.
    held_out = 1 if test else 3
    assert said["train"] == "".join(lines[:-held_out])
    assert said["valid"] + (said["test"] if not test else "") == "".join(lines[-held_out:])
    made = "no valid split: the last 5%" if test else "no valid and no test split: the last 10%"
    # Of documents that are all for training nothing promises splits, as of a single file.
    assert (f"{tmp_path / 'text'} has {made} of its training text" in str(found.warnings)) == (
        not packed or test is not None
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: str(p / "nowhere"), "There is no folder .*nowhere"),
        (lambda p: folder(p / "t", valid=None), r"lacks the valid split.*wiki\.valid\.tokens"),
        (lambda p: folder(p / "t", None, None, None), "lacks the train split.*none of them"),
        (lambda p: folder(p / "t", train=""), r"train\.txt is empty"),
        (lambda p: folder(p / "t", valid=" \n\n"), r"valid\.txt is empty"),
        (lambda p: folder(p / "t", test=b"ok\n\xe9t\xe9\n"), r"test\.txt is not UTF-8.*byte 3 "),
    ],
)
def test_bad_folder_is_one_sentence(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, "wikitext103", make(tmp_path))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_two_sets_of_splits_are_not_chosen_between(tmp_path):
    dir = folder(tmp_path / "text")
    folder(tmp_path / "text", names="wiki.{}.tokens", train=None, valid=None)
    with pytest.raises(UserError, match=r"two sets of splits, .*train\.txt and of wiki\.test"):
        load(tmp_path, dir=dir)


def test_names_without_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"Unknown config\.data\.name 'wikitext'.*wikitext103"):
        data.load("wikitext", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"make a folder with .*wiki\.train\.tokens"):
        data.load("wikitext103", cache_dir=str(tmp_path))


def test_changed_text_is_noticed(tmp_path):
    path = Path(folder(tmp_path / "text")) / "train.txt"
    old = load(tmp_path)
    status = path.stat()
    path.write_text("a b b\nc\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load(tmp_path).vocab != old.vocab


def test_cache_that_cannot_be_made_is_named(tmp_path):
    dir = folder(tmp_path / "text")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        data.load("mytext", dir=dir, cache_dir=str(tmp_path / "file"))


def test_lm1b_shuffles_sentences(tmp_path):
    text = "".join(f"s{i} is it\n" for i in range(40))
    found = load(tmp_path, "lm1b", folder(tmp_path / "text", text, "is it\n", "it\n"))
    assert found.sentences
    batches = [found.train_batch(step, 2, 79, 0)[0] for step in (0, 1, 0)]
    assert sorted(batches[0][:, 0]) != sorted(batches[1][:, 0])
    np.testing.assert_array_equal(batches[0], batches[2])
    words = load(tmp_path, "mytext")
    np.testing.assert_array_equal(
        words.train_batch(5, 2, 3, 0)[0], words.train_batch(5, 2, 3, 1)[0]
    )


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# The real splits are not part of the project: the two tests of golden/vocabulary.json need them in
# a folder beside the checkout.
WIKITEXT103 = Path(__file__).parents[3] / "shared" / "text" / "wikitext-103"


@pytest.fixture
def wikitext103():
    if not WIKITEXT103.is_dir():
        pytest.skip(f"needs WikiText-103's valid.txt and test.txt in {WIKITEXT103}")
    return {split: (WIKITEXT103 / f"{split}.txt").read_bytes() for split in ("valid", "test")}


GOLDEN = json.loads((ROOT / "tests/golden/vocabulary.json").read_text())


def test_golden_words(tmp_path, wikitext103):
    golden = GOLDEN["wikitext103_valid"]
    text = folder(tmp_path / "text", wikitext103["valid"], **wikitext103)
    found = load(tmp_path, "wikitext103", text)
    assert len(found.vocab) == golden["size"]
    assert list(found.vocab.symbols[:40]) == golden["first_40"]
    assert list(found.vocab.symbols[-10:]) == golden["last_10"]
    assert sha256("\n".join(found.vocab.symbols).encode()) == golden["sha256_newline_joined"]
    assert (found.vocab.eos_id, found.vocab.unk_id) == (0, golden["unk"]["index"])
    for split in ("train", "valid"):
        assert len(found.streams[split]) == golden["valid"]["n_tokens"]
        assert sha256(found.streams[split].tobytes()) == golden["valid"]["sha256_int32_le"]
    assert len(found.streams["test"]) == golden["test_n_tokens_with_eos"]
    missing = golden["test_missing"]
    (warning,) = found.warnings
    assert f" {missing['occurrences']} occurrences of {missing['distinct']} different" in warning
    assert repr(missing["first"]["symbol"]) in warning


def test_golden_character_codes(tmp_path, wikitext103):
    golden = GOLDEN["enwik8_prepared_codes"]
    parts = {
        "train": wikitext103["valid"][:300_000],
        "valid": wikitext103["test"][:60_000],
        "test": wikitext103["test"][60_000:120_000],
    }
    prepared = {
        split: " ".join("\n" if byte == 10 else str(byte) for byte in part)
        for split, part in parts.items()
    }
    found = load(tmp_path, "enwik8", folder(tmp_path / "text", **prepared))
    assert sha256("\n".join(found.vocab.symbols).encode()) == golden["sha256_newline_joined"]
    for split, stream in found.streams.items():
        assert len(stream) == golden[split]["n_tokens"]
        assert sha256(stream.tobytes()) == golden[split]["sha256_int32_le"]


def test_embedded_corpus(tmp_path):
    found = data.load("embedded", cache_dir=str(tmp_path))
    sizes = {split: len(stream) for split, stream in found.streams.items()}
    assert sizes["train"] > 150_000
    assert min(sizes["valid"], sizes["test"]) > 10_000
    assert 2_000 < len(found.vocab) < 20_000
    assert (found.unit, found.warnings) == ("word", ())
    counts = np.bincount(found.streams["train"], minlength=len(found.vocab))
    # Ordered by count (<eos> aside), every word at least three times.
    assert (np.diff(counts[1:]) <= 0).all()
    assert counts.min() >= 3
    assert 0 < counts[found.vocab.unk_id] < 0.08 * sizes["train"]
    text = found.vocab.decode(found.streams["train"])
    assert " the " in text
    assert "built @-@ in" in text
    # No paragraph of the held-out text, long enough to be one, is in the training text.
    train = {line for line in text.split("\n") if len(line.split()) > 12 and "<unk>" not in line}
    held_out = found.vocab.decode(found.streams["test"]).split("\n")
    assert not train.intersection(held_out)
    assert data.load("embedded", cache_dir=str(tmp_path)).vocab == found.vocab
