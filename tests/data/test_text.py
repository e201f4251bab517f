"""Blocks of bytes worked out by hand, splits by position, and tokenizers from a folder."""

import hashlib
import sys

import pytest
import torch

from niwaki.data import Tokens, open_text
from niwaki.errors import FileDamagedError, InputError, MissingExtraError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes(bytes(range(41)))  # ten blocks of four, and one token more
    return path


def test_blocks_are_split_by_position(file):
    splits = open_text(file, length=4)
    assert splits.train.blocks.tolist() == [[4 * i + j for j in range(4)] for i in range(8)]
    assert splits.val.blocks.tolist() == [[32, 33, 34, 35]] and splits.test.blocks.tolist() == [[36, 37, 38, 39]]
    assert (splits.length, splits.vocabulary, splits.mask) == (4, 256, None)


def test_the_record_says_all(file):
    record = open_text(file, length=4, val=0.2, test=0.3, mask=300).record
    assert record == {
        "source": "text:story.txt",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "tokens": 41,
        "tokenizer": "bytes",
        "vocabulary": 301,
        "length": 4,
        "split_by": "position",
        "blocks": {"train": [0, 5], "val": [5, 7], "test": [7, 10]},
        "counts": {"train": 5, "val": 2, "test": 3},
        "left_out": 1,
        "mask": 300,
    }


def test_batches_in_order_shuffled_and_whole():
    tokens = Tokens(torch.arange(10, dtype=torch.uint8).view(5, 2))
    assert [batch.tolist() for batch in tokens.batches(3)] == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9]]]
    assert [len(batch) for batch in tokens.batches(3, whole=True)] == [3]
    assert [len(batch) for batch in tokens.batches(9, whole=True)] == [5]
    orders = [torch.cat(list(tokens.batches(2, shuffle_seed=seed))).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == tokens.blocks.tolist()
    assert next(tokens.batches(1)).dtype == torch.int64
    with pytest.raises(InputError, match="batch size"):
        tokens.batches(0)


def word_tokenizer(folder, **special):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"<unk>": 0, "to": 1, "be": 2, "or": 3, "not": 4, "<mask>": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special).save_pretrained(folder)
    return folder


def test_tokens_of_a_tokenizer(tmp_path):
    folder = word_tokenizer(tmp_path / "tokens", mask_token="<mask>")
    (tmp_path / "a.txt").write_text("to be or not to be " * 3)
    splits = open_text(tmp_path / "a.txt", length=3, tokenizer=folder, mask=True)
    assert splits.train.blocks.tolist() == [[1, 2, 3], [4, 1, 2], [1, 2, 3], [4, 1, 2]]
    assert (splits.vocabulary, splits.mask, splits.record["tokenizer"]) == (6, 5, str(folder))
    with pytest.raises(InputError, match="it has none"):
        open_text(tmp_path / "a.txt", length=3, tokenizer=word_tokenizer(tmp_path / "plain"), mask=True)
    (tmp_path / "b.txt").write_bytes(b"to be \xff\xfe")
    with pytest.raises(FileDamagedError, match="no UTF-8: invalid start byte at byte 6"):
        open_text(tmp_path / "b.txt", length=3, tokenizer=folder)


def test_a_tokenizer_without_its_vocabulary(file, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(FileDamagedError, match=r"no token for any of the text.*with the vocabulary, too"):
        open_text(file, length=4, tokenizer=tmp_path)


def test_refusals(file, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for arguments, error, says in (
        ({"place": tmp_path / "nothing.txt"}, InputError, "no such file"),
        ({"place": tmp_path / "folder"}, InputError, "no such file"),
        ({"place": tmp_path / "empty.txt"}, InputError, "0 tokens, which is too little for three splits"),
        ({"length": 20}, InputError, "41 tokens, which is too little"),
        ({"length": 1}, InputError, "at least 2"),
        ({"val": 0.0}, InputError, "shares above 0"),
        ({"val": 0.5, "test": 0.5}, InputError, "something to train on"),
        ({"mask": True}, InputError, "they have none"),
        ({"mask": -1}, InputError, "from 0"),
        ({"tokenizer": tmp_path / "nowhere"}, InputError, "no such folder"),
        ({"tokenizer": tmp_path / "folder"}, FileDamagedError, "save_pretrained of a tokenizer"),
        ({"tokenizer": tmp_path / "folder"}, FileDamagedError, r"from one of: \(1\) a "),  # and not an empty list
    ):
        with pytest.raises(error, match=says):
            open_text(**{"place": file, "length": 4, **arguments})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"niwaki\[llm\]"):
        open_text(file, length=4, tokenizer=tmp_path / "folder")
