"""Order, encoding and decoding of symbols."""

import numpy as np
import pytest

from fwm.data import Vocabulary
from fwm.errors import UserError


def test_order_is_eos_then_falling_count_then_first_occurrence():
    vocab = Vocabulary.from_counts({"b": 2, "a": 5, "<eos>": 9, "d": 2, "c": 2})
    assert vocab.symbols == ("<eos>", "a", "b", "d", "c")
    assert (len(vocab), vocab.index["d"], vocab.eos_id, vocab.unk_id) == (5, 3, 0, None)
    characters = Vocabulary.from_counts({"32": 1, "97": 4}, eos=False)
    assert characters.symbols == ("97", "32")
    assert characters.eos_id is None


def test_words_round_trip_and_lines_end():
    vocab = Vocabulary(("<eos>", "a", "b", "<unk>"))
    assert vocab.encode("a  b\n\n b").tolist() == [1, 2, 0, 0, 2, 0]
    assert vocab.encode("a b\n").tolist() == [1, 2, 0]
    assert vocab.encode("").tolist() == [0]
    prompt = vocab.encode("a\nb zzz", add_eos=False)
    assert prompt.dtype == np.int32
    assert prompt.tolist() == [1, 0, 2, 3]
    ids = [1, 2, 0, 0, 2]
    assert vocab.decode(ids) == "a b\n\nb"
    assert vocab.encode(vocab.decode(ids), add_eos=False).tolist() == ids


def test_characters_round_trip():
    codes = Vocabulary(tuple(str(code) for code in "aé b".encode()))
    assert codes.decode(codes.encode("b é a")) == "b é a"
    letters = Vocabulary(("a", "_", "b"))
    assert letters.encode("b A").tolist() == [2, 1, 0]
    assert letters.decode([2, 1, 0]) == "b a"


def test_a_text_that_is_not_utf_8_keeps_its_bytes():
    text = b"\xe9t\xff".decode(errors="surrogateescape")  # as a command line gives it
    assert Vocabulary(tuple(map(str, range(256)))).encode(text).tolist() == [0xE9, ord("t"), 0xFF]


def test_unknown_symbol_without_unk_is_named():
    with pytest.raises(UserError, match="'zzz' is not in the vocabulary"):
        Vocabulary(("<eos>", "a")).encode("a zzz")


def test_save_and_load_keep_every_symbol(tmp_path):
    # Line separators of other conventions are white space for split(), these are not.
    vocab = Vocabulary(("<eos>", "é\u2013", "\ufeffx", "\u200b", "a\x00b", '"'))
    vocab.save(tmp_path / "vocab.txt")
    assert Vocabulary.load(tmp_path / "vocab.txt") == vocab
    assert [p.name for p in tmp_path.iterdir()] == ["vocab.txt"]


@pytest.mark.parametrize("content", [b"", b"a\n\nb\n", b"a\nb\na\n", b"a b\n", b"a", b"a\n\xff\n"])
def test_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"vocab\.txt.*restore it"):
        Vocabulary.load(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="There is no vocabulary file"):
        Vocabulary.load(tmp_path / "vocab.txt")
