"""One file without splits, and what it is read into: words, characters, subwords."""

import json

import numpy as np
import pytest

from fwm import data
from fwm.data import Vocabulary, subwords, tokens
from fwm.data.sources import label
from fwm.errors import UserError

LINES = "".join(f"Line {i}: the  wörd\tis 你好 it's\r\n" + "\r\n" * (i % 7 == 3) for i in range(90))
PLAIN = LINES.replace("\r\n", "\n")


def load(tmp_path, text=LINES, name="embedded", **settings):
    path = tmp_path / "input.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return data.load(name, file=str(path), cache_dir=str(tmp_path / "cache"), **settings)


def read(corpus):
    return {split: corpus.vocab.decode(stream) for split, stream in corpus.streams.items()}


@pytest.fixture(scope="module")
def by_tokenizer(tmp_path_factory):
    """The same file read in every way, a byte order mark before it."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("text")
    return {
        name: load(folder, "\ufeff" + LINES, tokenizer=name, vocab_size=300 * (name == "bpe"))
        for name in ("words", "characters", "bpe")
    }


def test_a_file_is_split_90_5_5_at_the_ends_of_lines(by_tokenizer):
    parts = read(by_tokenizer["characters"])
    assert "".join(parts.values()) == PLAIN
    assert all(part.endswith("\n") for part in parts.values())
    shares = [len(part.encode()) / len(PLAIN.encode()) for part in parts.values()]
    # To a line of 37 bytes and its neighbour without any, of 3,600.
    np.testing.assert_allclose(shares, [0.9, 0.05, 0.05], rtol=0, atol=0.011)
    assert read(by_tokenizer["bpe"]) == parts
    words = by_tokenizer["words"]
    for split, stream in words.streams.items():
        symbols = parts[split].replace("\n", " <eos> ").split()
        assert stream.tolist() == [words.vocab.index.get(s, words.vocab.unk_id) for s in symbols]


def test_sizes_by_which_tokenizers_are_compared(by_tokenizer):
    words, *others = (corpus.texts for corpus in by_tokenizer.values())
    parts = read(by_tokenizer["characters"])
    for texts in others:
        for split, text in texts.items():
            assert text["words"] == words[split]["tokens"]
            assert text["characters"] == len(parts[split])
            assert text["bytes"] == len(parts[split].encode())
    assert others[0]["test"]["tokens"] == others[0]["test"]["characters"]
    assert "words" not in words["test"]
    assert {corpus.name for corpus in by_tokenizer.values()} == {"input"}
    assert [corpus.unit for corpus in by_tokenizer.values()] == ["word", "character", "subword"]


def test_the_last_line_counts_where_it_is_open(tmp_path):
    one, other = (load(tmp_path, PLAIN * 2 + "end", tokenizer=t) for t in ("words", "characters"))
    assert one.texts["test"]["tokens"] == other.texts["test"]["words"]


def test_the_vocabularies_are_kept_and_read_back(by_tokenizer, tmp_path):
    for name, corpus in by_tokenizer.items():
        corpus.vocab.save(tmp_path / "vocab.txt")
        assert (tmp_path / "tokenizer.json").exists() == (name == "bpe")
        kept = Vocabulary.load(tmp_path / "vocab.txt")
        assert (kept, kept.tokenizer) == (corpus.vocab, name)
        assert kept.decode([kept.newline_id]) == "\n"
        prompt = "the wörd\n is"
        assert kept.decode(kept.encode(prompt, add_eos=False)) == prompt.replace(
            " is", "is" if name == "words" else " is"
        )
        # A trained model's own vocabulary finds what its training prepared, and reads other texts.
        settings = dict(vocab=kept, splits=("test",), vocab_size=300 * (name == "bpe"))
        test = load(tmp_path, LINES, **settings).streams["test"]
        np.testing.assert_array_equal(test, corpus.streams["test"])
        other = load(tmp_path, LINES[::-1], **settings)
        assert len(other.streams["test"]) > 20
    with pytest.raises(UserError, match=r"reads words, but config\.data\.tokenizer=bpe reads"):
        load(tmp_path, vocab=by_tokenizer["words"].vocab, tokenizer="bpe")
    with pytest.raises(UserError, match=r"reads characters, but config\.data\.tokenizer=words"):
        load(tmp_path, vocab=by_tokenizer["characters"].vocab, tokenizer="words")


ANY = "\0 \x1c\x85\u2028é\r\n\r \U0001f600\ufeff<eos> <unk> \t\t end \u200b\n\n  "


@pytest.mark.parametrize("size", [1, 3, 64, 1 << 16])
def test_every_text_is_read_exactly_however_it_is_cut(by_tokenizer, tmp_path, monkeypatch, size):
    monkeypatch.setattr(tokens, "TEXT_BYTES", size)
    vocab = by_tokenizer["bpe"].vocab
    text = (ANY + LINES) * 3
    found = load(tmp_path, text, vocab=vocab)
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(read(found).values()) == plain
    # The same subwords as of each part at once.
    for split, part in read(found).items():
        np.testing.assert_array_equal(found.streams[split], vocab.encode(part))
    characters = load(tmp_path, text, tokenizer="characters")
    assert "".join(read(characters).values()) == plain
    assert found.texts["test"]["words"] == characters.texts["test"]["words"]
    (tmp_path / "cache").rename(tmp_path / f"cache-{size}")


def test_subwords_are_of_the_training_split_alone_and_always_the_same(tmp_path):
    pytest.importorskip("tokenizers")
    one = load(tmp_path, tokenizer="bpe", vocab_size=300)
    again = subwords.train(iter(read(one)["train"].splitlines(keepends=True)), 300)
    assert subwords.symbols(again) == one.vocab.symbols
    assert len(one.vocab) == 300
    text = read(one)["train"] + "".join("zqzqzq\n" for _ in read(one)["valid"].splitlines() * 9)
    assert not any("zq" in symbol for symbol in load(tmp_path, text, tokenizer="bpe").vocab.symbols)
    # Another size is another entry of the cache.
    larger = load(tmp_path, tokenizer="bpe", vocab_size=301)
    assert len(larger.vocab) == 301
    for size in (1, 256, -5):
        with pytest.raises(UserError, match=f"vocab_size must be above 256, .* got {size}"):
            load(tmp_path, tokenizer="bpe", vocab_size=size)


def test_a_word_is_never_cut(tmp_path):
    one_line = " ".join(f"word{i * i % 23}" for i in range(400))
    found = load(tmp_path, one_line)
    assert " ".join(read(found).values()).split() == one_line.split()
    # Without any white space: at a character, in words nowhere.
    chinese = "春天来了花都开了" * 40
    assert "".join(read(load(tmp_path, chinese, tokenizer="characters")).values()) == chinese
    with pytest.raises(UserError, match=r"no white space where .*tokenizer=characters or bpe"):
        load(tmp_path, chinese)


def test_enwik8_itself_is_split_by_bytes(tmp_path):
    content = bytes(range(256)) * 10
    found = load(tmp_path, content, "enwik8")
    assert [len(stream) for stream in found.streams.values()] == [2304, 128, 128]
    assert (found.name, found.unit) == ("enwik8", "character")
    with pytest.raises(UserError, match=r"enwik8 is read by its characters, .* is 'bpe'"):
        load(tmp_path, content, "enwik8", tokenizer="bpe")


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("", {}, r"input\.txt is empty"),
        ("\ufeff \n\n", {}, "too few to hold out 5%"),
        ("a b c d e f\n", {}, "has 12 bytes of text: too few to hold out 5%"),
        ("a" * 500 + "\n", {}, "has no white space where it would be cut"),
        (b"a b\n" * 50 + b"\xe9\n", {}, "not UTF-8 text: byte 200 "),
        (b"a b\n" * 50 + b"\xe9\n", {"tokenizer": "characters"}, "not UTF-8 text: byte 200 "),
        (b"a b\n" * 50 + b"\xe2\x82", {"tokenizer": "characters"}, "not UTF-8 text: byte 200 "),
        (LINES.encode("utf-16"), {"tokenizer": "characters"}, "not UTF-8 text: byte 0 "),
        (LINES, {"tokenizer": "word"}, "unknown config.data.tokenizer 'word': expected one of"),
        (LINES, {"vocab_size": 300}, "vocab_size=300 is for config.data.tokenizer=bpe"),
        (LINES, {"dir": "somewhere"}, "are two texts: give one of them"),
    ],
)
def test_a_file_that_cannot_be_read_so_is_one_sentence(tmp_path, text, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, text, **settings)
    assert "\n" not in str(caught.value)


def test_a_file_where_a_folder_belongs_and_the_other_way(tmp_path):
    load(tmp_path)
    cache = str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"is a file: give it as --config\.data\.file"):
        data.load("text", dir=str(tmp_path / "input.txt"), cache_dir=cache)
    with pytest.raises(UserError, match=r"is a folder: give it as --config\.data\.dir"):
        data.load("text", file=str(tmp_path), cache_dir=cache)
    with pytest.raises(UserError, match=r"There is no file .*nowhere"):
        data.load("text", file=str(tmp_path / "nowhere"), cache_dir=cache)


def test_unknown_characters_are_told_and_shown(tmp_path):
    found = load(tmp_path, PLAIN + "Ω" * 30 + "\n" + "\n" * 9, tokenizer="characters")
    assert (
        "30 occurrences of 1 different characters that the training text lacks (the first is 'Ω'"
        in (found.warnings[-1])
    )
    assert found.vocab.symbols[-1] == "<unk>"
    assert "\ufffd" in read(found)["test"]
    assert found.vocab.encode("ΩL").tolist() == [len(found.vocab) - 1, found.vocab.index["U+004C"]]


def test_subwords_without_the_package_or_their_file(by_tokenizer, tmp_path, monkeypatch):
    vocab = by_tokenizer["bpe"].vocab
    vocab.save(tmp_path / "vocab.txt")
    file = tmp_path / "tokenizer.json"
    for damaged in (None, "{", vocab.bpe[:-50], json.dumps({"model": {"vocab": {"a": 0}}})):
        file.unlink() if damaged is None else file.write_text(damaged)
        with pytest.raises(UserError, match=r"tokenizer\.json is missing, damaged or not that of"):
            Vocabulary.load(tmp_path / "vocab.txt")
    unread = vocab.bpe.replace('"type":"BPE"', '"type":"ABC"')
    with pytest.raises(UserError, match=r"cannot read the run's tokenizer\.json"):
        Vocabulary(vocab.symbols, unread).encode("a")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    subwords.load.cache_clear()
    assert vocab.decode(by_tokenizer["bpe"].streams["test"]) == read(by_tokenizer["bpe"])["test"]
    with pytest.raises(UserError, match="tokenizers: `pip install tokenizers`, or choose another"):
        vocab.encode("a")


def test_every_name_of_the_validation_split(tmp_path):
    for split, text in (("train", "a\n"), ("val", "a a\n"), ("testing", "a a a\n")):
        (tmp_path / f"{split}.txt").write_text(text)
    found = data.load("text", dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert [len(stream) for stream in found.streams.values()] == [2, 3, 4]


def test_what_a_text_is_called():
    names = ["input.txt", "some.corpus.v2.jsonl.gz", "notes", "War and Peace.md", ".txt"]
    labels = [label("embedded", "", f"/a/{name}") for name in names]
    assert labels == ["input", "some.corpus.v2", "notes", "War and Peace", ".txt"]
    assert label("wikitext103", "", "/a/input.txt") == "input"
    assert label("enwik8", "", "/a/input.txt") == "enwik8"
