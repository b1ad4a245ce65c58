"""prepare_data.py: text in, shards out, windows back."""

import base64
import collections
import json
import random
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
from conftest import ROOT

import prepare_data
from configurator import UserError
from prepare_data import Settings, ShardWriter, TokenData, build_encoding, byte_encoding, cut, decode, encode, open_shard


def prepare(tmp_path, *inputs, **kwargs):
    settings = Settings(**{**dict(dataset="d", input=[str(i) for i in inputs], data_dir=str(tmp_path / "data")), **kwargs})
    return prepare_data.prepare(settings)


def tokens(folder, split):
    return np.concatenate([open_shard(p) for p in sorted(folder.glob(f"{split}_*.bin"))])


def documents(folder, split, encoding=None):
    """The texts of a split, in order."""
    encoding = encoding or byte_encoding()
    ids = tokens(folder, split)
    starts = np.flatnonzero(ids == encoding.eot_token)
    assert starts[0] == 0
    return [decode(encoding, part[1:]) for part in np.split(ids, starts[1:])]


@pytest.fixture
def corpus(tmp_path):
    """300 text files of several lines, some of them not ASCII."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i}.txt").write_text(f"file {i}\n" + f"größe {i * i} 数 \r\n" * (i % 7 + 1), newline="")
    return folder


# -- documents and shards -----------------------------------------------------------------------------------------------


def test_every_document_arrives_once(tmp_path, corpus):
    folder = prepare(tmp_path, corpus)
    texts = documents(folder, "train") + documents(folder, "val")
    assert sorted(texts) == sorted(p.read_bytes().decode() for p in corpus.iterdir())
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["tokenizer"] == {"name": "byte"} and meta["vocab_size"] == 257
    for split in ("train", "val"):
        counts = meta["splits"][split]
        assert counts["documents"] == len(documents(folder, split))
        assert counts["tokens"] == len(tokens(folder, split)) == counts["bytes"] + counts["documents"]
    assert not list(folder.parent.glob(".*.partial"))


def test_split_is_stable_when_files_are_added(tmp_path, corpus):
    before = prepare(tmp_path, corpus, val_fraction=0.1)
    for i in range(300, 400):
        (corpus / f"{i}.txt").write_text(f"another {i}\n")
    after = prepare(tmp_path, corpus, val_fraction=0.1, dataset="e")
    assert set(documents(before, "val")) <= set(documents(after, "val"))
    assert set(documents(before, "train")) <= set(documents(after, "train"))
    assert 15 < len(documents(before, "val")) < 50


def test_same_settings_same_shards_and_seed_shuffles(tmp_path, corpus):
    one, two = prepare(tmp_path, corpus), prepare(tmp_path, corpus, dataset="e")
    other = prepare(tmp_path, corpus, dataset="f", seed=2)
    assert (one / "train_000000.bin").read_bytes() == (two / "train_000000.bin").read_bytes()
    assert documents(one, "train") != documents(other, "train")
    assert sorted(documents(one, "train")) == sorted(documents(other, "train"))
    order = [int(text.split()[1]) for text in documents(one, "train")]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.2


@pytest.mark.parametrize("size", [2, 100, 70_000, 500_000])
def test_one_file_has_both_splits(tmp_path, size):
    path = tmp_path / "one.txt"
    path.write_text(("x" * 70 + "\n") * (size // 71) + "y" * (size % 71))
    folder = prepare(tmp_path, path)
    parts = documents(folder, "train"), documents(folder, "val")
    assert all(parts) and sorted("".join(sum(parts, []))) == sorted(path.read_text())
    assert all(len(text.encode()) <= 65536 for text in sum(parts, []))


def test_cut_keeps_every_character():
    for text in ("", "a" * 200_000, "数" * 50_000, "line\n" * 40_000, "数\n" * 3 + "é" * 100_000):
        pieces = cut(text.encode())
        assert "".join(piece.decode() for piece in pieces) == text  # none ends within a character
        assert all(len(piece) <= 65536 for piece in pieces)
    assert all(piece.endswith(b"\n") for piece in cut(b"line\n" * 40_000))
    noise = random.Random(0).randbytes(300_000).replace(b"\n", b"\xff")
    assert b"".join(cut(noise)) == noise


def test_jsonl_and_globs_and_folders(tmp_path):
    lines = [{"text": "one", "body": "eins"}, {"text": "two\nlines", "body": "zwei"}, {"text": "three", "body": "drei"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.md").write_text("# four")
    (tmp_path / "c.bin").write_bytes(b"\0")
    folder = prepare(tmp_path, tmp_path / "*.jsonl", tmp_path / "b.md")
    assert sorted(documents(folder, "train") + documents(folder, "val")) == ["# four", "one", "three", "two\nlines"]
    folder = prepare(tmp_path, tmp_path / "a.jsonl", dataset="e", text_field="body")
    assert sorted(documents(folder, "train") + documents(folder, "val")) == ["drei", "eins", "zwei"]
    assert [i.path for i in prepare_data.find_files([str(tmp_path)])] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.md")]


def test_a_file_counts_once_and_blank_lines_are_empty(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="not among the inputs already"):
        prepare_data.find_files([str(tmp_path / "a.jsonl"), str(tmp_path / "link" / "a.jsonl")])
    folder = prepare(tmp_path, tmp_path / "a.jsonl")
    assert sorted(documents(folder, "train") + documents(folder, "val")) == ["one", "two"]
    assert "empty: 1 documents" in capsys.readouterr().err


def test_overwrite_replaces_data_sets_only(tmp_path, corpus):
    (tmp_path / "data" / "d").mkdir(parents=True)
    (tmp_path / "data" / "d" / "thesis.doc").write_text("keep")
    with pytest.raises(UserError, match="not a data set: it holds thesis.doc"):
        prepare(tmp_path, corpus, overwrite=True)
    assert (tmp_path / "data" / "d" / "thesis.doc").read_text() == "keep"


def test_broken_text_is_counted_and_named(tmp_path, capsys):
    good = tmp_path / "good.txt"
    good.write_text("fine\n")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "lines.jsonl").write_text('{"text": "x"}\n{"text": 3}\n{broken\n{"other": "x"}\n')
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="4 of 3 documents are broken"):
        prepare(tmp_path, tmp_path / "*.txt", tmp_path / "lines.jsonl")
    assert not (tmp_path / "data" / "d").exists() and not list((tmp_path / "data").iterdir())
    folder = prepare(tmp_path, tmp_path / "*.txt", tmp_path / "lines.jsonl", max_broken=10.0)
    err = capsys.readouterr().err
    assert f"undecodable: 1 documents, the first at {tmp_path}/bad.txt" in err
    assert f"no JSON object with a text 'text': 3 documents, the first at {tmp_path}/lines.jsonl:2" in err
    assert f"empty: 1 documents, the first at {tmp_path}/empty.txt" in err
    assert sorted(documents(folder, "train") + documents(folder, "val")) == ["caf\ufffd\n", "fine\n", "x"]
    assert b"".join(tokens(folder, s).astype(np.uint16)[1:].tobytes() for s in ("train", "val")).count(b"\xe9\0\n") == 1  # as it was


@pytest.mark.parametrize("vocab_size, magic, version, code", [(257, 20240520, 1, "H"), (65536, 20240520, 1, "H"), (65537, 20240801, 7, "I")])
def test_shard_format_by_hand(tmp_path, vocab_size, magic, version, code):
    writer = ShardWriter(tmp_path, "train", vocab_size, shard_size=5)
    writer.write(np.arange(3)), writer.write(np.arange(vocab_size - 9, vocab_size)), writer.close()
    expected = [0, 1, 2, *range(vocab_size - 9, vocab_size)]
    for i, part in enumerate((expected[:5], expected[5:10], expected[10:])):
        data = (tmp_path / f"train_{i:06d}.bin").read_bytes()
        assert struct.unpack("<256i", data[:1024]) == (magic, version, len(part)) + (0,) * 253
        assert struct.unpack(f"<{len(part)}{code}", data[1024:]) == tuple(part)
    assert [s["tokens"] for s in writer.shards] == [5, 5, 2]


def test_damaged_shards_are_named(tmp_path):
    writer = ShardWriter(tmp_path, "train", 257, 100)
    writer.write(np.arange(50)), writer.close()
    path = tmp_path / "train_000000.bin"
    data = path.read_bytes()
    for damaged, message in (
        (data[:-1], "has 1123 bytes where its header says 1124"),
        (data + b"x", "has 1125 bytes"),
        (data[:500], "has 500 bytes where its header says 1124"),
        (data[:3], "not a token shard"),
        (b"", "not a token shard"),
        (b"\x80" + data[1:], "not a token shard"),
        (data[:4] + b"\x09" + data[5:], "not a token shard"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message) as error:
            open_shard(path)
        assert str(path) in str(error.value)


def test_the_old_data_survive_a_failing_overwrite(tmp_path, corpus):
    folder = prepare(tmp_path, corpus)
    before = (folder / "train_000000.bin").read_bytes()
    with pytest.raises(UserError, match="exists; --overwrite replaces it"):
        prepare(tmp_path, corpus)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="broken"):
        prepare(tmp_path, bad, overwrite=True)
    assert (folder / "train_000000.bin").read_bytes() == before
    prepare(tmp_path, corpus, overwrite=True, seed=3)
    assert (folder / "train_000000.bin").read_bytes() != before


# -- tokenizers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bpe(tmp_path):
    """A .tiktoken file: the 256 bytes and a few merges."""
    ranks = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w", b"or"]
    path = tmp_path / "tiny.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)))
    return path


TEXTS = ["", "hello world", "größe 数学 \r\n\t\0", "<|endoftext|> is text", "".join(map(chr, range(0x250))), "\U0001f600" * 9]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_equal_the_encoding(text):
    encoding = byte_encoding()
    assert encode(encoding, text).tolist() == encoding.encode_ordinary(text)
    assert decode(encoding, encode(encoding, text)) == text
    assert encoding.n_vocab == 257 and encoding.eot_token == 256


def test_decode_shows_what_it_cannot_decode():
    assert decode(byte_encoding(), [104, 105, 300, 0xC3]) == "hi\ufffd\ufffd"


@pytest.mark.parametrize("text", TEXTS)
def test_a_tiktoken_file_and_its_state(bpe, text):
    encoding = prepare_data.get_tokenizer(str(bpe))
    again = build_encoding(json.loads(json.dumps(prepare_data.tokenizer_state(encoding))))
    for e in (encoding, again):
        assert e.n_vocab == 263 and e.eot_token == 262
        assert decode(e, encode(e, text)) == text
        assert encode(e, text).tolist() == encoding.encode_ordinary(text)
    assert encode(encoding, "hello world").tolist() == [259, 260, 261] + list(b"ld")


def test_data_with_a_tiktoken_file(tmp_path, bpe, corpus):
    folder = prepare(tmp_path, corpus, tokenizer=str(bpe))
    meta = prepare_data.read_meta(folder)
    encoding = build_encoding(meta["tokenizer"])
    texts = documents(folder, "train", encoding) + documents(folder, "val", encoding)
    assert sorted(texts) == sorted(p.read_bytes().decode() for p in corpus.iterdir())


def test_unknown_and_unreachable_tokenizers(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown tokenizer 'gtp2'; known: byte,.*gpt2"):
        prepare_data.get_tokenizer("gtp2")
    with pytest.raises(UserError, match="No such file"):
        prepare_data.get_tokenizer(str(tmp_path / "x.tiktoken"))
    for content in ("not base64\n", "aGk= 0\n", "onlyone\n"):
        (tmp_path / "x.tiktoken").write_text(content)
        with pytest.raises(UserError, match="not a .tiktoken file"):
            prepare_data.get_tokenizer(str(tmp_path / "x.tiktoken"))

    def refuse(name):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="cannot be downloaded") as error:
        prepare_data.get_tokenizer("gpt2")
    assert "\n" not in str(error.value) and "--tokenizer=byte" in str(error.value)


# -- the reader ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Tokens 0 ... 999 in shards of 300: 300, 300, 300 and 100."""
    writer = ShardWriter(tmp_path, "train", 1000, shard_size=300)
    writer.write(np.arange(1000)), writer.close()
    return tmp_path


def test_an_epoch_visits_each_window_once(shards):
    data = TokenData(shards, "train", block_size=8, vocab_size=1000, seed=1)
    assert len(data) == 3 * (299 // 8) + 99 // 8 and data.n_tokens == 1000
    epochs = []
    for epoch in range(3):
        x, y = data.rows(epoch * len(data), len(data))
        assert x.dtype == y.dtype == np.int64
        assert (x[:, 1:] == y[:, :-1]).all() and (y == x + 1).all()
        epochs.append(x[:, 0].tolist())
    windows = [s + 8 * i for s, n in ((0, 37), (300, 37), (600, 37), (900, 12)) for i in range(n)]
    assert all(sorted(e) == windows for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != windows


def test_rows_are_a_function_of_their_number_and_the_seed(shards):
    data = TokenData(shards, "train", 8, 1000, seed=1)
    x = data.rows(0, 300)[0]
    again = TokenData(shards, "train", 8, 1000, seed=1)
    assert all((again.rows(i, 1)[0] == x[i]).all() for i in (299, 0, 150))
    assert (TokenData(shards, "train", 8, 1000, seed=2).rows(0, 300)[0] != x).any()


def test_permutation_is_one_and_looks_random():
    for n in (1, 2, 3, 7, 64, 1000):
        images = [prepare_data.permute(i, n, b"k") for i in range(n)]
        assert sorted(images) == list(range(n))
    assert abs(np.corrcoef(images, range(1000))[0, 1]) < 0.1
    firsts = collections.Counter(prepare_data.permute(0, 10, b"%d" % k) for k in range(3000))
    assert min(firsts.values()) > 220 and len(firsts) == 10


def test_splits_are_told_apart_by_their_place_in_the_name(tmp_path):
    for name in ("medieval_train_000000.bin", "medieval_val_000000.bin", "val_train_1.bin"):
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in prepare_data.shard_paths(tmp_path, "val")] == ["medieval_val_000000.bin"]
    assert [p.name for p in prepare_data.shard_paths(tmp_path, "train")] == ["medieval_train_000000.bin", "val_train_1.bin"]


def test_reader_mistakes(shards, tmp_path):
    with pytest.raises(UserError, match="block_size 300 is longer than the train data"):
        TokenData(shards, "train", 300, 1000)
    with pytest.raises(UserError, match="no val shards"):
        TokenData(shards, "val", 8, 1000)
    with pytest.raises(UserError, match=r"train_00000\d.bin holds token \d+: it does not fit the vocabulary of 257"):
        TokenData(shards, "train", 8, 257).rows(0, 130)


def test_damaged_meta(tmp_path, corpus):
    folder = prepare(tmp_path, corpus)
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["val"]["tokens"] += 1
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"counts \d+ val tokens, its shards hold"):
        TokenData(folder, "val", 8, 257)
    meta["splits"]["val"]["tokens"] -= 1
    (folder / "meta.json").write_text(json.dumps(meta))
    for text in ("{", "[]", "{}", (folder / "meta.json").read_text().replace("257", "-3"), '{"tokenizer": {"name": "byte"}}', '{"tokenizer": {"name": "x"}, "vocab_size": 1}'):
        (folder / "meta.json").write_text(text)
        with pytest.raises(UserError, match="meta.json is damaged"):
            prepare_data.read_meta(folder)


# -- the program --------------------------------------------------------------------------------------------------------


def call(*args, cwd):
    return subprocess.run([sys.executable, ROOT / "prepare_data.py", *map(str, args)], cwd=cwd, capture_output=True, text=True)


def test_default_is_the_standard_library(tmp_path):
    done = call(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "stdlib"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["splits"]["train"]["tokens"] > 5_000_000
    assert 0.001 < meta["splits"]["val"]["tokens"] / meta["splits"]["train"]["tokens"] < 0.05
    text = "".join(documents(folder, "train"))
    assert "class OrderedDict" in text or "class OrderedDict" in "".join(documents(folder, "val"))
    assert not re.search(r"^class \w*Tests?\(unittest.TestCase\)", text, re.M) and "train.py --dataset=stdlib" in done.stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (["--input=nowhere.txt"], "input nowhere.txt: no such file, folder or glob"),
        (["--input=empty.txt"], "no text in empty.txt"),
        (["--input=picture.png"], "unknown kind '.png'; known: .txt, .md, .py, .jsonl"),
        (["--input=folder"], "no files of kind .txt"),
        (["--dataset=wikipedia"], "unknown dataset 'wikipedia'; known: stdlib"),
        (["--dataset=a/b"], "not a plain name"),
        (["--tokenizer=words"], "unknown tokenizer 'words'"),
        (["--shard_sise=3"], "did you mean shard_size"),
        (["--val_fraction=1.5"], "val_fraction is 1.5"),
    ],
)
def test_mistakes_end_in_one_line_and_2(tmp_path, args, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "folder").mkdir()
    done = call(*args, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("data/*"))
