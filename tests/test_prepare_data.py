"""prepare_data.py: text in, shards out, windows back."""

import base64
import bz2
import collections
import gzip
import http.server
import json
import lzma
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import ROOT

import prepare_data
from configurator import UserError
from prepare_data import Place, Settings, ShardWriter, TokenData, build_encoding, byte_encoding, cut, decode, encode, open_shard


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


def test_what_is_held_out_by_default():
    assert Settings().val_fraction == 0.05 and Settings(val_fraction=0.01).val_fraction == 0.01
    assert Settings(dataset="c4").val_fraction == Settings(dataset="stdlib", input=["a.txt"]).val_fraction == 0.01


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
    assert prepare_data.read_meta(folder)["problems"]["empty"][0] == 1 and "empty" not in capsys.readouterr().err


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
    lines = '{"text": "x"}\n{"text": 3}\n{broken\n{"other": "x"}\n'
    (tmp_path / "lines.jsonl").write_text(lines, encoding="utf-8-sig")  # with a byte-order mark, as Windows writes
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="4 documents are broken where 3 are kept"):
        prepare(tmp_path, tmp_path / "*.txt", tmp_path / "lines.jsonl")
    assert not (tmp_path / "data" / "d").exists() and not list((tmp_path / "data").iterdir())
    folder = prepare(tmp_path, tmp_path / "*.txt", tmp_path / "lines.jsonl", max_broken=10.0)
    err = capsys.readouterr().err
    assert f"undecodable: 1 documents, the first at {tmp_path}/bad.txt" in err
    assert f"no JSON object with a text 'text': 3 documents, the first at {tmp_path}/lines.jsonl:2" in err
    assert prepare_data.read_meta(folder)["problems"]["empty"] == [1, [f"{tmp_path}/empty.txt:1"]] and "empty" not in err
    assert sorted(documents(folder, "train") + documents(folder, "val")) == ["caf\ufffd\n", "fine\n", "x"]
    assert b"".join(tokens(folder, s).astype(np.uint16)[1:].tobytes() for s in ("train", "val")).count(b"\xe9\0\n") == 1  # as it was


@pytest.mark.parametrize("vocab_size, magic, version, code", [(257, 20240520, 1, "H"), (65536, 20240520, 1, "H"), (65537, 20240801, 7, "I")])
def test_shard_format_by_hand(tmp_path, vocab_size, magic, version, code):
    writer = ShardWriter(tmp_path, "train", vocab_size, shard_size=5)
    writer.write(np.arange(3)), writer.write(np.arange(vocab_size - 9, vocab_size)), writer.sync()
    expected = [0, 1, 2, *range(vocab_size - 9, vocab_size)]
    for i, part in enumerate((expected[:5], expected[5:10], expected[10:])):
        data = (tmp_path / f"train_{i:06d}.bin").read_bytes()
        assert struct.unpack("<256i", data[:1024]) == (magic, version, len(part)) + (0,) * 253
        assert struct.unpack(f"<{len(part)}{code}", data[1024:]) == tuple(part)
    assert [s["tokens"] for s in writer.shards] == [5, 5, 2]


def test_a_writer_goes_on_with_a_shard_or_says_that_it_cannot(tmp_path):
    path = tmp_path / "train_000000.bin"
    first = ShardWriter(tmp_path, "train", 257, 100)
    mask = np.arange(60, dtype=np.uint8) % 2
    first.write(np.arange(50), mask[:50]), first.sync()
    for file in (path, path.with_suffix(".mask")):
        file.write_bytes(file.read_bytes() + b"what is not in the state")
    second = ShardWriter(tmp_path, "train", 257, 100, first.shards)
    second.write(np.arange(50, 60), mask[50:]), second.sync()
    assert open_shard(path).tolist() == list(range(60)) and path.with_suffix(".mask").read_bytes() == mask.tobytes()
    for lose in (lambda: path.write_bytes(path.read_bytes()[:-1]), path.unlink):
        lose()
        with pytest.raises(UserError, match="train_000000.bin lost a part: remove .* to begin anew"):
            ShardWriter(tmp_path, "train", 257, 100, second.shards)


def test_damaged_shards_are_named(tmp_path):
    writer = ShardWriter(tmp_path, "train", 257, 100)
    writer.write(np.arange(50)), writer.sync()
    path = tmp_path / "train_000000.bin"
    data = path.read_bytes()
    for damaged, message in (
        (data[:-1], "has 1123 bytes, not 1124"),
        (data + b"x", "has 1125 bytes"),
        (data[:500], "has 500 bytes, not 1124"),
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
    ranks = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (tmp_path / "byte.tiktoken").write_text(ranks + "YWI= 256\n")
    with pytest.raises(UserError, match="byte.tiktoken would be named byte, as the tokenizer of bytes is: rename it"):
        prepare_data.get_tokenizer(str(tmp_path / "byte.tiktoken"))
    for content in ("not base64\n", "aGk= 0\n", "onlyone\n"):
        (tmp_path / "x.tiktoken").write_text(content)
        with pytest.raises(UserError, match="not a .tiktoken file"):
            prepare_data.get_tokenizer(str(tmp_path / "x.tiktoken"))

    def refuse(name):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()  # does not hide tiktoken's
    with pytest.raises(UserError, match="cannot be downloaded") as error:
        prepare_data.get_tokenizer("gpt2")
    assert "\n" not in str(error.value) and "--tokenizer=byte" in str(error.value)


# -- the reader ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Tokens 0 ... 999 in shards of 300: 300, 300, 300 and 100."""
    writer = ShardWriter(tmp_path, "train", 1000, shard_size=300)
    writer.write(np.arange(1000)), writer.sync()
    return tmp_path


def test_an_epoch_visits_each_window_once(shards):
    data = TokenData(shards, "train", block_size=8, vocab_size=1000, seed=1)
    assert len(data) == 3 * (299 // 8) + 99 // 8
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


def with_meta(folder, split, writer):
    """Makes the shards of a writer a data set of the byte tokenizer, whose end of text is 256."""
    writer.sync()
    counts = {"documents": 1, "bytes": 1, "shards": writer.shards, "tokens": sum(s["tokens"] for s in writer.shards)}
    other = {**counts, "shards": [], "tokens": 1}
    splits = {name: counts if name == split else other for name in prepare_data.SPLITS}
    prepare_data.write_meta(folder, {"name": "byte"}, byte_encoding(), splits, {})
    return folder


@pytest.mark.parametrize("shard_size", [1000, 30, 7])  # of 7, most documents lie in several shards
@pytest.mark.parametrize("piece, vocab_size", [(1 << 20, 257), (5, 70_000)])
@pytest.mark.parametrize("has_prompts", [True, False])
def test_rows_of_documents_by_hand(tmp_path, monkeypatch, shard_size, piece, vocab_size, has_prompts):
    """Each document of a list: end of text, its tokens, end of text, cut after T + 1, padded without loss."""
    monkeypatch.setattr(prepare_data, "JOB", piece)
    rng, T, eot = np.random.default_rng(0), 8, 256
    lengths = [3, 0, 1, 5, 6, 7, 8, 9, 20, 0, 0, 2, 31, 4, 7]
    texts = [rng.integers(1, 256, n).tolist() for n in lengths]
    n_prompts = [n // 2 for n in lengths]
    stream, mask, expected = [9, 9], [1, 1], []  # two tokens that are of no document
    for text, n_prompt in zip(texts, n_prompts):
        loss = [0] * n_prompt + [1] * (len(text) - n_prompt) if has_prompts else [1] * len(text)
        stream, mask = stream + [eot] + text, mask + [1] + loss
        if text:
            row, losses = ([eot] + text + [eot])[: T + 1], ([1] + loss + [1])[: T + 1]
            x, y = row[:-1], [t if has_loss else -100 for t, has_loss in zip(row[1:], losses[1:])]
            expected.append((x + [0] * (T - len(x)), y + [-100] * (T - len(y))))
    writer = ShardWriter(tmp_path, "train", vocab_size, shard_size)
    writer.write(np.array(stream), np.array(mask, np.uint8) if has_prompts else None)
    with_meta(tmp_path, "train", writer)
    assert open_shard(writer.folder / "train_000000.bin").dtype == (np.uint16 if vocab_size == 257 else np.uint32)
    make = lambda seed: TokenData(tmp_path, "train", T, vocab_size, seed, rows="documents")
    data = make(seed=1)
    assert len(data) == len(expected) == 12
    epochs = []
    for epoch in range(3):
        x, y = data.rows(epoch * 12, 12)
        assert x.dtype == y.dtype == np.int64
        epochs.append(list(zip(x.tolist(), y.tolist())))
        assert sorted(epochs[-1]) == sorted(expected)  # each once
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != expected
    for i in (17, 0, 35):  # each row alone, from any other reader, is what it was among others
        x, y = make(seed=1).rows(i, 1)
        assert (x[0].tolist(), y[0].tolist()) == sum(epochs, [])[i]
    assert (make(seed=2).rows(0, 36)[0] != make(seed=1).rows(0, 36)[0]).any()


def test_documents_that_cannot_be_told_apart(shards, tmp_path):
    with pytest.raises(UserError, match="rows=documents needs the end-of-text token, .* has no meta.json that names it"):
        TokenData(shards, "train", 8, 1000, rows="documents")
    writer = ShardWriter(tmp_path, "val", 257, 100)
    writer.write(np.array([1, 2, 3, 256, 256]))
    with_meta(tmp_path, "val", writer)
    with pytest.raises(UserError, match="the val data in .* have no document: no text follows an end-of-text token"):
        TokenData(tmp_path, "val", 8, 257, rows="documents")
    assert TokenData(tmp_path, "val", 2, 257).rows(0, 1)[0].tolist() in ([[1, 2]], [[3, 256]])


def test_documents_of_text_files(tmp_path, corpus):
    """Through prepare: every file's beginning is a row, whatever the shuffle and the shards."""
    folder, rows = prepare(tmp_path, corpus, shard_size=1000), []
    for split in ("train", "val"):
        data = TokenData(folder, split, 40, 257, rows="documents")
        x, y = data.rows(0, len(data))
        rows += [bytes(t for t in target if 0 <= t < 256) for target in y.tolist()]
        assert (x[:, 0] == 256).all()
    assert sorted(rows) == sorted(path.read_bytes()[:40] for path in corpus.iterdir())


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
    good = (folder / "meta.json").read_text()
    listed = good.replace('"train_000000.bin"', "[]")
    texts = "{", "[]", "{}", "[" * 100_000, good.replace("257", "-3"), listed
    for text in (*texts, '{"tokenizer": {"name": "byte"}}', '{"tokenizer": {"name": "x"}, "vocab_size": 1}'):
        (folder / "meta.json").write_text(text)
        with pytest.raises(UserError, match="meta.json is damaged"):
            prepare_data.read_meta(folder)


# -- inputs -------------------------------------------------------------------------------------------------------------


def all_documents(folder):
    return sorted(documents(folder, "train") + documents(folder, "val"))


def compress(path, suffix):
    """`path` as a compressed file beside it, in two members as appending writes them; skips without the library."""
    data = path.read_bytes()
    if suffix == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        pack = lambda data: pyarrow.compress(data, codec="zstd", asbytes=True)
    else:
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    target = path.with_name(path.name + suffix)
    target.write_bytes(pack(data[: len(data) // 2]) + pack(data[len(data) // 2 :]))
    path.unlink()
    return target


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_their_content(tmp_path, suffix):
    lines = [f"line {i} größe " + "x" * (i % 970) + "\n" for i in range(3000)]  # more than a job of text
    (tmp_path / "a?.txt").write_text("".join(lines))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:500]))
    plain = prepare(tmp_path, tmp_path / "a?.txt", tmp_path / "b.jsonl", dataset="plain")
    packed = [compress(tmp_path / name, suffix) for name in ("a?.txt", "b.jsonl")]
    folder = prepare(tmp_path, tmp_path, dataset="packed")
    assert "".join(sorted(all_documents(plain))) and all_documents(folder) == all_documents(plain)
    kinds = {"a.txt": "text", "a.txt" + suffix: "text", "a.txt" + 2 * suffix: None, "a.parquet" + suffix: None}
    assert {name: prepare_data.kind_of(name) for name in kinds} == kinds
    assert (folder / "train_000000.bin").read_bytes() == (plain / "train_000000.bin").read_bytes()
    for damaged in (packed[0].read_bytes()[:-20], packed[0].read_bytes()[:50], b"not compressed at all"):
        packed[0].write_bytes(damaged)
        with pytest.raises(UserError, match=f"input .*a..txt{suffix} cannot be read: .+"):
            prepare(tmp_path, packed[0], dataset="damaged")
        assert not list((tmp_path / "data").glob("*damaged*"))


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"größe {i}" for i in range(1000)] + [None]
    table = pyarrow.table({"body": texts, "other": list(range(1001))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    folder = prepare(tmp_path, tmp_path / "a.parquet", text_field="body")
    assert all_documents(folder) == sorted(texts[:-1])
    problems = json.loads((folder / "meta.json").read_text())["problems"]
    assert problems == {"no text 'body'": [1, [f"{tmp_path}/a.parquet:1001"]]}
    with pytest.raises(UserError, match="no field 'text'; it has body, other"):
        prepare(tmp_path, tmp_path / "a.parquet", dataset="e")
    source = prepare_data.find_files([str(tmp_path / "a.parquet")])[0]
    pieces = list(prepare_data.read_parquet(source, Place(), ["body"]))
    assert [row for rows, _ in pieces for row, in rows] == texts
    for i, (_, after) in enumerate(pieces):  # a continued run reads the rest as it would have been read
        assert list(prepare_data.read_parquet(source, after, ["body"])) == pieces[i + 1 :]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match="a.parquet cannot be read: Arrow"):
        prepare(tmp_path, tmp_path / "a.parquet", dataset="e")


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    for name in ("pyarrow.parquet", "pyarrow", "datasets", "tokenizers", "rustbpe"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("a.parquet", "a.txt.zst", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"text " * 99)
    (tmp_path / "a.txt").write_text("text")
    for package, given, tokenizer in (
        ("pyarrow", tmp_path / "a.parquet", "byte"),
        ("pyarrow", tmp_path / "a.txt.zst", "byte"),
        ("datasets", "hub:someone/something", "byte"),
        ("tokenizers", tmp_path / "a.txt", str(tmp_path / "tokenizer.json")),
        ("rustbpe", tmp_path / "a.txt", "bpe:300"),
    ):
        with pytest.raises(UserError, match=f"pip install {package}$"):
            prepare(tmp_path, given, tokenizer=tokenizer)
        assert not list((tmp_path / "data").glob("*"))


@pytest.mark.parametrize("form", ["text", "jsonl"])
def test_standard_input(tmp_path, form):
    lines = [f"größe {i}\n" for i in range(9000)]
    text = "".join(lines) if form == "text" else "".join(json.dumps({"text": line}) + "\n" for line in lines)
    args = [sys.executable, ROOT / "prepare_data.py", "--input=-", f"--stdin_format={form}", "--dataset=d", "--num_workers=2"]
    done = subprocess.run(args, cwd=tmp_path, input=text.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr
    texts = all_documents(tmp_path / "data" / "d")
    assert texts == sorted(lines) if form == "jsonl" else sorted("".join(texts).splitlines(True)) == sorted(lines)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves /good.txt, /good.txt.gz and /short.txt, which ends before its Content-Length."""

    text = "".join(f"line {i}\n" for i in range(50_000)).encode()

    def do_GET(self):
        data = gzip.compress(self.text) if self.path.startswith("/good.txt.gz") else self.text
        self.send_response(404 if self.path == "/none.txt" else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: 300_000 if self.path == "/short.txt" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_files_by_address(tmp_path, server, monkeypatch):
    monkeypatch.setitem(prepare_data.CORPORA, "tinyshakespeare", (f"{server}/good.txt", "text"))
    expected = sorted(Handler.text.decode().splitlines())
    for folder in (
        prepare(tmp_path, dataset="tinyshakespeare"),
        prepare(tmp_path, f"{server}/good.txt.gz?download=true"),
    ):
        assert sorted("".join(documents(folder, "train") + documents(folder, "val")).splitlines()) == expected
    with pytest.raises(UserError, match="short.txt cannot be read: EOFError: the connection ended 238,890 bytes before the end"):
        prepare(tmp_path, f"{server}/short.txt", dataset="e")
    with pytest.raises(UserError, match="none.txt cannot be read: .*404|none.txt cannot be read: .*Not Found"):
        prepare(tmp_path, f"{server}/none.txt", dataset="e")
    assert not (tmp_path / "data" / "e").exists()


class FakeHub:
    """Stands for the datasets library: rows of one corpus, and a network that fails after some of them."""

    rows, fail_after, asked = [{"text": f"größe {i} " + "x" * 2000, "id": i} for i in range(1500)], None, []

    def load_dataset(self, *args, **kwargs):
        self.asked.append((args, kwargs))
        return FakeRows(self.rows, self.fail_after)


class FakeRows:
    def __init__(self, rows, fail_after):
        self.rows, self.fail_after = rows, fail_after

    def skip(self, n):
        return FakeRows(self.rows[n:], self.fail_after)

    def __iter__(self):
        for i, row in enumerate(self.rows):
            if i == self.fail_after:
                raise ConnectionError("reset by peer")
            yield row


def test_hub_corpora_are_streamed_and_continued(tmp_path, monkeypatch, capsys):
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    whole = prepare(tmp_path, dataset="fineweb_edu", shuffle_buffer=100)
    assert hub.asked == [(("HuggingFaceFW/fineweb-edu", "sample-10BT"), {"split": "train", "streaming": True})]
    assert all_documents(whole) == sorted(row["text"] for row in hub.rows)
    hub.fail_after = 900
    args = dict(shuffle_buffer=100, save_interval=0.0, dataset="d")
    with pytest.raises(UserError, match="hub:a/b::test cannot be read: ConnectionError: reset by peer.*goes on"):
        prepare(tmp_path, "hub:a/b::test", **args)
    hub.fail_after = None
    folder = prepare(tmp_path, "hub:a/b::test", **args)
    assert hub.asked[-1] == (("a/b", None), {"split": "test", "streaming": True})
    assert "going on after" in capsys.readouterr().err
    assert (folder / "train_000000.bin").read_bytes() == (whole / "train_000000.bin").read_bytes()
    with pytest.raises(UserError, match="has no field 'body'; it has text, id"):
        prepare(tmp_path, "hub:a/b", dataset="e", text_field="body")


def test_the_datasets_library_with_a_local_folder(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(600)))
    folder = prepare(tmp_path, f"hub:{tmp_path}/hub")
    assert all_documents(folder) == sorted(f"text {i}" for i in range(600))
    source = prepare_data.Input(f"hub:{tmp_path}/hub", "hub")
    assert [row for rows, _ in prepare_data.read_hub(source, Place(offset=256), ["text"]) for row, in rows] == [f"text {i}" for i in range(256, 600)]


def test_problems_have_file_and_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xe9e\n" + b"long line\n" * 120_000 + b"\xff\n")
    lines = ["{}" if i in (3000, 29_000) else json.dumps({"text": "x" * 30}) for i in range(30_000)]
    lines[26_000] = '{"text": "\\ud800 alone"}'
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    folder = prepare(tmp_path, tmp_path)
    assert json.loads((folder / "meta.json").read_text())["problems"] == {
        "undecodable": [3, [f"{tmp_path}/a.txt:3", f"{tmp_path}/a.txt:120004", f"{tmp_path}/b.jsonl:26001"]],
        "no JSON object with a text 'text'": [2, [f"{tmp_path}/b.jsonl:3001", f"{tmp_path}/b.jsonl:29001"]],
    }
    assert f"undecodable: 3 documents, the first at {tmp_path}/a.txt:3" in capsys.readouterr().err
    assert "\ufffd alone" in all_documents(folder)


def test_a_hopeless_corpus_ends_early(tmp_path):
    lines = ['{"text": "good"}\n'] * 20_000 + ['{"body": 1}\n'] * 2_000_000
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="more than max_broken 0.01: no JSON object .* at .*a.jsonl:20001") as error:
        prepare(tmp_path, tmp_path / "a.jsonl")
    assert int(str(error.value).split()[0]) < 1_000_000  # before all of it was read
    assert not list((tmp_path / "data").iterdir())


def test_max_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 500_000)
    folder = prepare(tmp_path, tmp_path / "a.txt", max_tokens=1_500_000, shuffle_buffer=10)
    assert 1_500_000 <= len(tokens(folder, "train")) < 2_700_000


# -- workers, interruptions, damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Some 9 MB of text and lines, a small vocabulary for them, and the data set made by one process."""
    folder, rng = tmp_path_factory.mktemp("big"), random.Random(1)
    words = ["".join(rng.choices("abcdefgh ", k=rng.randrange(1, 9))) for _ in range(500)]
    text = lambda n: " ".join(rng.choices(words, k=n)) + "\n"
    for i in range(3):
        (folder / f"{i}.txt").write_text("".join(text(40) for _ in range(6000)))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text(rng.randrange(400))}) + "\n" for _ in range(5000)))
    ranks = [bytes([i]) for i in range(256)] + sorted({w[:2].encode() for w in words if len(w) > 1})
    (folder / "small.tiktoken").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(ranks)))
    prepare_data.prepare(Settings(input=[str(folder)], dataset="one", data_dir=str(folder), **big_settings(folder), num_workers=1))
    return folder


def big_settings(folder):
    return dict(tokenizer=str(folder / "small.tiktoken"), shard_size=700_000, shuffle_buffer=200, val_fraction=0.05)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_any_number_of_workers_writes_the_same(big, tmp_path):
    for n in (2, 3):
        folder = prepare(tmp_path, big, num_workers=n, dataset=f"with{n}", **big_settings(big))
        assert contents(folder) == contents(big / "one")
    assert len(list(folder.glob("train*.bin"))) > 3


def start(big, data_dir, *args, **kwargs):
    settings = [f"--{name}={value}" for name, value in big_settings(big).items()]
    command = [sys.executable, ROOT / "prepare_data.py", f"--input={big}", "--dataset=d", f"--data_dir={data_dir}", *settings, *args]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_kill_at_random_moments(big, tmp_path):
    rng, progress, continued, orphans = random.Random(5), tmp_path / ".d.partial" / "progress.json", 0, set()
    for i in range(12):
        before = read_or_empty(progress)
        process = start(big, tmp_path, "--save_interval=0", "--num_workers=2")
        if i % 2 == 0:  # after something more was saved, so that the runs come forward; else anywhere from the start on
            while process.poll() is None and read_or_empty(progress) in (b"", before):
                time.sleep(0.002)
        time.sleep(rng.uniform(0, 1.5 if i % 2 else 0.1))
        orphans |= children(process.pid)
        process.kill()
        continued += "going on after" in process.communicate(timeout=30)[1]  # workers that stay would keep it open
        if (tmp_path / "d").exists():  # it was done, perhaps killed on its way out
            break
    else:
        process = start(big, tmp_path, "--num_workers=2")
        continued += "going on after" in process.communicate()[1]
        assert process.returncode == 0
    assert continued
    assert contents(tmp_path / "d") == contents(big / "one")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    time.sleep(0.5)
    assert not [pid for pid in orphans if b"multiprocessing" in read_or_empty(f"/proc/{pid}/cmdline")]


def children(pid):
    """Process numbers of its children, where /proc tells."""
    stats = {p.name: read_or_empty(p / "stat").rpartition(b")")[2].split() for p in Path("/proc").glob("[0-9]*")}
    return {name for name, stat in stats.items() if len(stat) > 1 and int(stat[1]) == pid}


def read_or_empty(path):
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("limit", [0, 1 << 20, 1_390_000])
def test_a_full_disk_costs_nothing(big, tmp_path, limit):
    """A limit on the size of files stands for the full disk: the write fails in the same place with another number."""
    resource = pytest.importorskip("resource")
    full = start(big, tmp_path, "--save_interval=0", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, err = full.communicate()
    assert full.returncode == 2 and not (tmp_path / "d").exists()
    message = "error: cannot write .*/d: File too large; nothing of it is kept"  # the first shard was not on the disk yet
    assert re.fullmatch(message, err.splitlines()[-1]) and not (tmp_path / ".d.partial").exists()
    assert "Traceback" not in err
    again = start(big, tmp_path)
    assert again.communicate() and again.returncode == 0
    assert contents(tmp_path / "d") == contents(big / "one")


def test_other_settings_begin_anew(big, tmp_path, monkeypatch, capsys):
    calls = []

    def fail_later(path, value):
        calls.append(path)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        save(path, value)

    save = prepare_data.save_json
    monkeypatch.setattr(prepare_data, "save_json", fail_later)
    with pytest.raises(UserError, match="No space left on device; what is done is kept"):
        prepare(tmp_path, big, num_workers=1, save_interval=0.0, **big_settings(big))
    monkeypatch.setattr(prepare_data, "save_json", save)
    folder = prepare(tmp_path, big, num_workers=1, **big_settings(big) | {"seed": 3})
    assert "of other settings or inputs: beginning anew" in capsys.readouterr().err
    assert contents(folder).keys() == contents(big / "one").keys() and contents(folder) != contents(big / "one")


def test_a_changed_input_is_another_input():
    same = [prepare_data.Input("a.txt", "text", 5, 1)]
    mark = prepare_data.fingerprint(Settings(), same)
    assert mark == prepare_data.fingerprint(Settings(num_workers=2), same)
    others = [("b.txt", 5, 1), ("a.txt", 6, 1), ("a.txt", 5, 2)]
    assert all(prepare_data.fingerprint(Settings(), [prepare_data.Input(p, "text", n, t)]) != mark for p, n, t in others)


def test_bpe_sees_no_text_that_is_held_out(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(200)))
    settings = Settings(input=[str(tmp_path / "a.jsonl")], val_fraction=0.5, data_dir=str(tmp_path / "data"))
    seen = set(prepare_data.sample_texts(prepare_data.find_inputs(settings)[0], settings))
    folder = prepare(tmp_path, tmp_path / "a.jsonl", val_fraction=0.5)
    assert seen == set(documents(folder, "train")) and 50 < len(seen) < 150


def test_two_runs_do_not_mix(tmp_path, corpus):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "data" / ".d.partial").mkdir(parents=True)
    handle = os.open(tmp_path / "data" / ".d.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is preparing .*/d"):
        prepare(tmp_path, corpus)
    os.close(handle)
    prepare(tmp_path, corpus)


def test_an_overwrite_after_one_that_was_killed_in_removing_the_old_data(tmp_path, corpus):
    folder = prepare(tmp_path, corpus, dataset="d")
    (tmp_path / "data" / ".d.old").mkdir()
    (tmp_path / "data" / ".d.old" / "train_000000.bin").write_text("what was not removed yet")
    assert prepare(tmp_path, corpus, dataset="d", overwrite=True, seed=3) == folder
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["d"] and not (folder / "progress.json").exists()


def test_an_overwrite_that_was_killed_between_its_renames(tmp_path, corpus):
    folder = prepare(tmp_path, corpus)
    before = contents(folder)
    folder.rename(tmp_path / "data" / ".d.old")
    with pytest.raises(UserError, match="exists"):
        prepare(tmp_path, corpus)
    assert contents(folder) == before


@pytest.mark.parametrize("seconds", [0.0, 0.3, 2.0])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="workers are found where Linux shows them")
def test_ctrl_c_ends_in_one_line(big, tmp_path, seconds):
    """Sent to the whole group, as a terminal does: workers that have just started say nothing, nor do they stay."""
    process = start(big, tmp_path, "--num_workers=2", "--save_interval=1000", start_new_session=True)
    while process.poll() is None and not any(map(is_worker, children(process.pid))):
        time.sleep(0.002)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    if (tmp_path / "d").exists():  # it was done; a process that is about to end may end by the signal
        assert seconds and process.returncode in (0, 130, -signal.SIGINT)
        return
    assert process.returncode == 130
    if seconds:
        assert err == "error: interrupted; what was saved before is untouched\n"
    else:  # on a busy machine a worker that is not yet up may say that its parent has gone
        assert "error: interrupted; what was saved before is untouched\n" in err


def is_worker(pid):
    return b"spawn_main" in read_or_empty(f"/proc/{pid}/cmdline")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="workers are found where Linux shows them")
def test_a_worker_that_dies(big, tmp_path):
    process = start(big, tmp_path, "--save_interval=0", "--num_workers=2")
    workers = []
    while process.poll() is None and not workers:
        time.sleep(0.002)
        workers = list(filter(is_worker, children(process.pid)))
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 2 and "a worker process ended unexpectedly" in err.splitlines()[-1], err
    assert not (tmp_path / "d").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="processes start in another way there")
def test_a_worker_that_dies_while_another_starts(big, tmp_path, monkeypatch):
    """The pool then closes a pipe that the new process is to inherit, and Python may refuse to start it."""
    start_process, started = multiprocessing.util.spawnv_passfds, []

    def spawnv_passfds(path, command, files):
        is_worker = b"spawn_main" in b"".join(map(os.fsencode, command))
        if is_worker and started:
            os.kill(started[0], signal.SIGKILL)
            time.sleep(0.2)
            files = [*files, files[0]]
        pid = start_process(path, command, files)
        started.extend([pid] if is_worker else [])
        return pid

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawnv_passfds)
    with pytest.raises(UserError, match="a worker process ended unexpectedly"):
        prepare(tmp_path, big, num_workers=2, **big_settings(big))
    assert len(started) == 1 and not multiprocessing.active_children()


def test_a_script_without_a_main_guard(big, tmp_path):
    """Worker processes import the script that started them; here they would begin the same preparation, and stop."""
    ranks = [bytes([i]) for i in range(256)] + [i.to_bytes(3, "big") for i in range(10_000)]  # more than a pipe holds
    (tmp_path / "a.tiktoken").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(ranks)))
    settings = dict(input=[str(big)], dataset="d", data_dir=str(tmp_path), num_workers=2, tokenizer=str(tmp_path / "a.tiktoken"))
    call = f"prepare_data.prepare(prepare_data.Settings(**{settings!r}))"
    (tmp_path / "script.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport prepare_data\n{call}\n")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and 'a script without `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]


def test_every_damage_is_found(tmp_path, corpus, monkeypatch, capsys):
    folder = prepare(tmp_path, corpus, shard_size=3000, tokenizer="byte")
    prepare_data.verify(folder)
    assert "are as meta.json says" in capsys.readouterr().out
    rng, shards = random.Random(2), sorted(folder.glob("*.bin"))
    assert len(shards) > 4
    for path in shards:
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[rng.randrange(1024, len(data))] ^= 1 << rng.randrange(8)
        for damaged, message in ((flipped, "does not have its checksum"), (data[:-2], "truncated"), (None, "is missing")):
            path.write_bytes(damaged) if damaged else path.unlink()
            with pytest.raises(UserError, match=message) as error:
                prepare_data.verify(folder)
            assert str(path) in str(error.value) and str(error.value).count(path.name) == 1
            with pytest.raises(UserError):
                TokenData(folder, path.stem.split("_")[0], 8, 257)
            path.write_bytes(data)
    data = shards[0].read_bytes()
    shards[0].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setattr(prepare_data, "CHECKED", 0)  # as if the split were large
    TokenData(folder, "train", 8, 257).rows(0, 1)
    (folder / "train_000009.bin").write_bytes(data)
    with pytest.raises(UserError, match="train_000009.bin is not in .*meta.json"):
        TokenData(folder, "train", 8, 257)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read where Linux shows it")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    program = f"import re, runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:]\n"
    program += "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    program += "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    peaks = []
    for n in (20, 100):
        (tmp_path / f"{n}.txt").write_bytes(b"all work and no play makes jack a dull boy\n" * (n * 1_000_000 // 43))
        args = [sys.executable, "-c", program, ROOT / "prepare_data.py", f"--input={n}.txt", "--dataset", f"d{n}"]
        done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.15 * peaks[0], peaks


def test_progress(tmp_path, monkeypatch, capsys):
    """Lines of documents, tokens, speed and the share of the input that is read, which come to all of it."""
    monkeypatch.setattr(prepare_data, "SHOW_INTERVAL", 0)
    (tmp_path / "a.txt").write_text("some text\n" * 400_000)
    (tmp_path / "b.txt").write_text("")
    prepare(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", shuffle_buffer=10)
    lines = [line for line in capsys.readouterr().err.splitlines() if "read" in line]
    for line, share in zip(lines, (26.2, 52.4, 78.6, 100.0), strict=True):  # a job is a MiB of the 4 MB
        match = re.fullmatch(r"([\d,]+) documents, ([\d,]+) tokens, [\d.]+ MB/s, ([\d.]+)% read", line)
        n_documents, n_tokens = (int(match[i].replace(",", "")) for i in (1, 2))
        assert float(match[3]) == share and n_tokens == pytest.approx(share * 40_000, rel=0.1) and n_documents > 5
    empty = {"splits": {"train": {"documents": 3, "tokens": 9}}, "place": (0, 0, 0)}
    prepare_data.show_progress(empty, 1.0, [prepare_data.Input("pipe.txt", "text", 0)])  # a named pipe has no size
    assert capsys.readouterr().err == "3 documents, 9 tokens, 0.0 MB/s\n"


# -- other vocabularies -------------------------------------------------------------------------------------------------


def random_bytes(rng):
    """Valid text, noise, and both in turn."""
    parts = []
    for _ in range(rng.randrange(4)):
        text = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x800), rng.randrange(0x10000, 0x110000)))) for _ in range(rng.randrange(20)))
        parts += [text.encode(), rng.randbytes(rng.randrange(6)), text.encode()[1:], b"<|endoftext|>", b" \r\n\t\xc2\xa0"]
    rng.shuffle(parts)
    return b"".join(parts)


@pytest.mark.parametrize("name", ["byte", "bpe", "trained"])
def test_round_trip_of_any_bytes(name, request):
    encoding = prepare_data.get_tokenizer("byte" if name == "byte" else str(request.getfixturevalue(name)))
    rng = random.Random(3)
    for _ in range(400):
        data = random_bytes(rng)
        ids = encode(encoding, data)
        assert prepare_data.decode_bytes(encoding, ids) == data
        assert encoding.eot_token not in ids and (len(ids) == 0 or max(ids) < encoding.n_vocab)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set with a vocabulary of 600 trained on it."""
    pytest.importorskip("rustbpe")
    tmp_path = tmp_path_factory.mktemp("trained")
    rng = random.Random(4)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randrange(2, 9))) for _ in range(200)]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=50))}) + "\n" for _ in range(2000)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    return prepare(tmp_path, tmp_path / "a.jsonl", tokenizer="bpe:600")


def test_a_trained_vocabulary(trained, tmp_path):
    meta = prepare_data.read_meta(trained)
    encoding = build_encoding(meta["tokenizer"])
    assert meta["vocab_size"] == encoding.n_vocab == 600 and encoding.eot_token == 599
    texts = [json.loads(line)["text"] for line in (trained.parent.parent / "a.jsonl").read_text().splitlines()]
    assert sorted(documents(trained, "train", encoding) + documents(trained, "val", encoding)) == sorted(texts)
    counts = meta["splits"]["train"]
    assert counts["tokens"] < counts["bytes"] / 2
    # the same vocabulary for another text, and again from the same sample
    other = prepare(tmp_path, trained.parent.parent / "a.jsonl", tokenizer=str(trained), val_fraction=0.3)
    assert prepare_data.read_meta(other)["tokenizer"] == meta["tokenizer"]
    again = prepare(tmp_path, trained.parent.parent / "a.jsonl", tokenizer="bpe:600", dataset="e")
    assert contents(again) == contents(trained)


def test_a_small_text_has_fewer_merges(tmp_path):
    pytest.importorskip("rustbpe")
    (tmp_path / "a.txt").write_text("ab ab ab abc\n" * 20)
    folder = prepare(tmp_path, tmp_path / "a.txt", tokenizer="bpe:5000")
    meta = prepare_data.read_meta(folder)
    assert 257 < meta["vocab_size"] == build_encoding(meta["tokenizer"]).n_vocab < 300


@pytest.fixture
def hub_tokenizer(tmp_path):
    """tokenizer.json of a byte-level BPE as GPT-NeoX has, and of one that lowercases as BERT's and T5's change text."""
    tokenizers = pytest.importorskip("tokenizers")
    paths = []
    for name in ("exact", "lower"):
        t = tokenizers.Tokenizer(tokenizers.models.BPE())
        t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.decoder = tokenizers.decoders.ByteLevel()
        if name == "lower":
            t.normalizer = tokenizers.normalizers.Lowercase()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["</s>", "<pad>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        t.train_from_iterator(["file größe hello world the cat " * 20], trainer)
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "tokenizer.json")
        t.save(str(paths[-1]))
    return paths


def test_tokenizer_json(tmp_path, hub_tokenizer, corpus, capsys):
    from tokenizers import Tokenizer

    exact, lower = hub_tokenizer
    reference = Tokenizer.from_file(str(exact))
    folder = prepare(tmp_path, corpus, tokenizer=str(exact))
    meta = prepare_data.read_meta(folder)
    assert json.loads(json.dumps(meta["tokenizer"])) == meta["tokenizer"] and meta["tokenizer"]["name"] == "exact"
    encoding = build_encoding(meta["tokenizer"])
    assert (encoding.eot_token, encoding.n_vocab) == (reference.token_to_id("</s>"), reference.get_vocab_size())
    for text in TEXTS:
        assert encode(encoding, text).tolist() == reference.encode(text, add_special_tokens=False).ids
        assert decode(encoding, encode(encoding, text)) == text
    assert encoding.eot_token not in encode(encoding, "a </s> b") and decode(encoding, [5000]) == ""
    texts = [p.read_bytes().decode() for p in corpus.iterdir()]
    assert sorted(documents(folder, "train", encoding) + documents(folder, "val", encoding)) == sorted(texts)
    assert "altered" not in capsys.readouterr().err
    (tmp_path / "upper.txt").write_text("Hello")
    folder = prepare(tmp_path, corpus, tmp_path / "upper.txt", tokenizer=str(lower), dataset="e", num_workers=2)
    assert json.loads((folder / "meta.json").read_text())["problems"] == {"altered by the tokenizer": [1, [str(tmp_path / "upper.txt")]]}
    with pytest.raises(UserError, match="has no token <none>; name its end of text with --eot_token="):
        prepare(tmp_path, corpus, tokenizer=str(exact), dataset="f", eot_token="<none>")
    exact.write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer.json"):
        prepare_data.get_tokenizer(str(exact))


def test_a_damaged_tokenizer_is_found(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "d")
    path = tmp_path / "d" / "tokenizer.tiktoken"
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines[:400]) + lines[401].split()[0] + " 400\n" + lines[400].split()[0] + " 401\n" + "".join(lines[402:]))
    with pytest.raises(UserError, match="tokenizer.tiktoken does not have its checksum"):
        prepare_data.read_meta(tmp_path / "d")


# -- prompts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_prompts_carry_no_loss(tmp_path, num_workers):
    pairs = [(f"question {i}? " * (i % 5), f"answer {i}é") for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    fields = dict(prompt_field="prompt", text_field="completion")
    folder = prepare(tmp_path, tmp_path / "a.jsonl", shard_size=3000, num_workers=num_workers, val_fraction=0.1, **fields)
    n_loss, seen = 0, []
    for path in sorted(folder.glob("*.bin")):
        ids, mask = open_shard(path).tolist(), path.with_suffix(".mask").read_bytes()
        assert len(ids) == len(mask)
        seen += [(path.name.split("_")[0], i, m) for i, m in zip(ids, mask)]
        n_loss += sum(mask)
    # by hand: every document is <end of text> prompt answer, and only the prompt is masked
    for split in ("train", "val"):
        stream = [(i, m) for s, i, m in seen if s == split]
        starts = [k for k, (i, _) in enumerate(stream) if i == 256] + [len(stream)]
        for a, b in zip(starts, starts[1:]):
            text, masked = bytes(i for i, _ in stream[a + 1 : b]), [m for _, m in stream[a:b]]
            pair = next((p, c) for p, c in pairs if (p + c).encode() == text)
            assert masked == [1] + [0] * len(pair[0].encode()) + [1] * len(pair[1].encode())
            pairs.remove(pair)
    assert not pairs
    meta = json.loads((folder / "meta.json").read_text())["splits"]
    assert meta["train"]["loss_tokens"] + meta["val"]["loss_tokens"] == n_loss
    data = TokenData(folder, "train", 16, 257)
    x, y = data.rows(0, len(data))
    by_window = {tuple(row): target for row, target in zip(x.tolist(), y.tolist())}
    for path in sorted(folder.glob("train*.bin")):
        ids, mask = open_shard(path).astype(int), np.frombuffer(path.with_suffix(".mask").read_bytes(), np.uint8)
        for s in range(0, len(ids) - 16, 16):
            assert by_window[tuple(ids[s : s + 16])] == [i if m else -100 for i, m in zip(ids[s + 1 : s + 17], mask[s + 1 : s + 17])]
    (tmp_path / "empty.mask").touch()
    assert not len(prepare_data.open_mask(tmp_path / "empty.bin", np.empty(0, np.uint16)))
    mask = next(folder.glob("train*.mask"))
    flipped = bytearray(mask.read_bytes())
    flipped[7] ^= 1
    mask.write_bytes(flipped)
    with pytest.raises(UserError, match=r"train_000000.mask does not have its checksum"):
        prepare_data.verify(folder)
    mask.write_bytes(flipped[:-1])
    with pytest.raises(UserError, match=r"train_000000.mask has \d+ bytes for a shard of \d+ tokens"):
        TokenData(folder, "train", 16, 257)
    mask.unlink()
    with pytest.raises(UserError, match=r"train_000000.mask is missing"):
        TokenData(folder, "train", 16, 257)
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match=r"4 of the 5 train shards in .* have a .mask"):
        TokenData(folder, "train", 16, 257)


CONVERSATION = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
CONVERSATION += [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]


@pytest.mark.parametrize(
    "turns, parts",
    [
        (["hi", "hello"], ["hi\n\n", "hello"]),
        (["hi", "hello", "why?", "so\n"], ["hi\n\n", "hello\n\n", "why?\n\n", "so\n"]),
        (["hi", "hello", "no answer"], ["hi\n\n", "hello"]),
        ([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "é"}], ["hi\n\n", "é"]),
        (CONVERSATION, ["be brief\n\nhi\n\n", "hello"]),
        (CONVERSATION[2:3] * 2 + CONVERSATION[3:], ["", "hello\n\nhello"]),
    ],
)
def test_turns_by_hand(tmp_path, turns, parts):
    assert prepare_data.join_turns(turns) == parts
    encoding = byte_encoding()
    ids = [encode(encoding, part) for part in parts]
    document = prepare_data.make_document(encoding, ids, [part.encode() for part in parts])
    masks = [[1]] + [[i % 2] * len(part.encode()) for i, part in enumerate(parts)]
    assert document.tokens.tolist() == [256, *"".join(parts).encode()] and document.mask.tolist() == sum(masks, [])


def by_loss(folder):
    """(text without loss, text with loss) of each document of a data set."""
    found = []
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"{split}_*.bin"))
        ids = np.concatenate([open_shard(p) for p in paths])
        mask = np.concatenate([np.frombuffer(p.with_suffix(".mask").read_bytes(), np.uint8) for p in paths])
        starts = [*np.flatnonzero(ids == 256), len(ids)]
        for a, b in zip(starts[:-1], starts[1:]):
            part, has_loss = ids[a + 1 : b], mask[a + 1 : b] == 1
            found.append((bytes(part[~has_loss].tolist()).decode(), bytes(part[has_loss].tolist()).decode()))
    return sorted(found)


LIMA = [{"conversations": [f"question {i}?", f"answer {i}"] + ["more?", "no"] * (i % 9 == 0), "source": "s"} for i in range(200)]
LIMA_PARTS = sorted((f"question {i}?\n\n" + "more?\n\n" * (i % 9 == 0), f"answer {i}" + "\n\nno" * (i % 9 == 0)) for i in range(200))
ALPACA = [{"instruction": f"add {i}", "input": f"{i}" * (i % 2), "output": f"= {i}", "answer": "x"} for i in range(200)]
ALPACA_PARTS = sorted((f"add {i}\n\n" + f"{i}\n\n" * (i % 2), f"= {i}") for i in range(200))
SHAPED = {"lima": ("turns", LIMA, LIMA_PARTS), "commonsense170k": ("instruction", ALPACA, ALPACA_PARTS)}


@pytest.mark.parametrize("corpus_name", SHAPED)
def test_shapes_of_rows_in_every_kind_of_input(tmp_path, monkeypatch, corpus_name):
    """A hub corpus knows its shape; local jsonl and parquet of the same rows, in any number of processes, are the same."""
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    shape, rows, parts = SHAPED[corpus_name]
    args = dict(tokenizer="byte", val_fraction=0.1)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for i, (name, num_workers) in enumerate([("a.jsonl", 1), ("a.jsonl", 2), ("a.parquet", 1)]):
        folder = prepare(tmp_path, tmp_path / name, dataset=f"d{i}", shape=shape, num_workers=num_workers, **args)
        assert by_loss(folder) == parts
    hub = FakeHub()
    monkeypatch.setattr(hub, "rows", rows)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert by_loss(prepare(tmp_path, dataset=corpus_name, **args)) == parts
    assert hub.asked[-1][0] == ({"lima": "GAIR/lima", "commonsense170k": "zwhe99/commonsense_170k"}[corpus_name], None)


def test_messages_and_outputs_by_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": CONVERSATION, "id": i}) + "\n" for i in range(3)) + "\n")
    folder = prepare(tmp_path, tmp_path / "a.jsonl", shape="turns", text_field="messages", val_fraction=0.0)
    assert by_loss(folder) == [("be brief\n\nhi\n\n", "hello")] * 3
    rows = [{"instruction": f"say {i}", "input": None, "response": "yes"} for i in range(3)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = dict(dataset="e", shape="instruction", text_field="response", val_fraction=0.0)
    assert by_loss(prepare(tmp_path, tmp_path / "b.jsonl", **args)) == [(f"say {i}\n\n", "yes") for i in range(3)]


def test_rows_that_are_not_of_the_shape(tmp_path, capsys):
    good = {"conversations": ["a", "b"]}
    broken = [{"conversations": "text"}, {"conversations": ["only a question"]}, {"conversations": [["a"], "b"]}, {"text": "x"}]
    broken += [{"conversations": [{"role": "user"}, "b"]}, {"conversations": [{"say": "x"}]}, {"conversations": []}, 7]
    broken += [{"conversations": [{"from": "human", "value": None}]}, {"conversations": None}, {"conversations": {"a": "b"}}]
    lines = [json.dumps(row) for row in [good, *broken, {"conversations": ["a", " "]}, *[good] * 20]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"11 documents are broken where 21 are kept.*no row of shape turns: 'conversations' at .*a.jsonl:2"):
        prepare(tmp_path, tmp_path / "a.jsonl", shape="turns")
    folder = prepare(tmp_path, tmp_path / "a.jsonl", shape="turns", max_broken=1.0)
    problems = json.loads((folder / "meta.json").read_text())["problems"]
    kinds = {"no row of shape turns: 'conversations'": [11, [f"{tmp_path}/a.jsonl:{i}" for i in (2, 3, 4)]]}
    assert problems == {**kinds, "empty": [1, [f"{tmp_path}/a.jsonl:13"]]}
    lines = ['{"instruction": "a", "output": "b"}', '{"instruction": 5, "input": "", "output": "b"}']
    lines += ['{"instruction": "a", "input": 7, "output": "b"}', '{"instruction": "a", "input": "", "output": ["b"]}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines + ['{"instruction": "a", "input": "", "output": "b"}'] * 5))
    with pytest.raises(UserError, match="4 documents .* no row of shape instruction: 'instruction' and 'input' and 'output' at .*b.jsonl:1"):
        prepare(tmp_path, tmp_path / "b.jsonl", dataset="e", shape="instruction")


def test_lists_of_turns_count_as_text_of_a_job(tmp_path):
    """What a worker gets at once does not grow with the corpus where the rows are lists."""
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"conversations": ["x" * 1000, "y" * 1000]} for _ in range(2000)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    inputs = prepare_data.find_files([str(tmp_path / "a.parquet")])
    jobs = list(prepare_data.read_jobs(inputs, Place(), ["conversations"]))
    assert len(jobs) == 4 and sum(len(data) for job, _ in jobs for *_, data in job) == 2000


def test_a_library_that_lacks_another_names_it(monkeypatch):
    def fail(module):
        raise ImportError(name="pieces")

    monkeypatch.setattr(prepare_data.importlib, "import_module", fail)
    with pytest.raises(UserError, match="this needs the optional library whole, which lacks pieces: pip install whole"):
        prepare_data.optional("whole.part")


@pytest.mark.parametrize(
    "dataset, data_dir, command",
    [
        ("mine", "data", "prepare_data.py --input=PATH --dataset=mine$"),
        ("stdlib", "data", "prepare_data.py --dataset=stdlib$"),
        ("c4", "far", "prepare_data.py --dataset=c4 --data_dir=far$"),
        ("/far/mine", "data", "/far/mine is no folder with train shards, in data/ or by itself$"),  # not a name to give
    ],
)
def test_missing_data_name_the_command_that_makes_them(tmp_path, monkeypatch, dataset, data_dir, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=command):
        prepare_data.find_data(dataset, data_dir, "train")


def test_the_only_document_is_cut_near_nine_tenths(tmp_path):
    (tmp_path / "a.txt").write_text("Title\n" + "x" * 50_000)
    folder = prepare(tmp_path, tmp_path / "a.txt")
    assert [len(documents(folder, split)[0]) for split in ("train", "val")] == [45_005, 5001]


def test_progress_is_saved_although_a_document_waits_to_be_held_out(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "x" * 200}) + "\n") * 20_000)
    saved, save = [], prepare_data.save_json
    monkeypatch.setattr(prepare_data, "save_json", lambda path, value: saved.append(path.name) or save(path, value))
    folder = prepare(tmp_path, tmp_path / "a.jsonl", val_fraction=0.0, save_interval=0.0, num_workers=1)
    assert saved.count("progress.json") >= 2 and len(documents(folder, "val")) == 1


def test_prompts_need_rows(tmp_path, corpus):
    with pytest.raises(UserError, match="shape turns needs jsonl, parquet or hub rows; .*txt is plain text"):
        prepare(tmp_path, corpus, shape="turns")
    with pytest.raises(UserError, match="prompt_field needs jsonl, parquet or hub rows; .*txt is plain text"):
        prepare(tmp_path, corpus, prompt_field="prompt")
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "text": "y"}\n')
    with pytest.raises(UserError, match="holds one document only"):
        prepare(tmp_path, tmp_path / "a.jsonl", prompt_field="prompt")


# -- shards of other programs -------------------------------------------------------------------------------------------


def test_shards_of_llm_c_and_modded_nanogpt(tmp_path):
    """Written as their scripts do, and ours read as their loaders do: a header of 256 int32, then uint16 or uint32."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "fineweb10B"
    folder.mkdir(parents=True)
    for name, n in (("fineweb_train_000001", 5000), ("fineweb_train_000002", 3000), ("fineweb_val_000000", 1000)):
        header = np.zeros(256, dtype=np.int32)
        header[0], header[1], header[2] = 20240520, 1, n
        with open(folder / f"{name}.bin", "wb") as file:
            file.write(header.tobytes())
            file.write(rng.integers(0, 257, n).astype(np.uint16).tobytes())
    data = TokenData(folder, "train", 16, 50257)
    assert sum(map(len, data.shards)) == 8000 and len(TokenData(folder, "val", 16, 50257)) == 62
    assert prepare_data.adopt(Settings(adopt=True, data_dir=str(tmp_path / "data"), dataset="fineweb10B")) == folder
    meta = prepare_data.read_meta(folder)
    ids = np.concatenate([np.fromfile(p, np.uint16)[512:] for p in sorted(folder.glob("*train*"))])
    counts = meta["splits"]["train"]
    assert (counts["tokens"], counts["documents"], counts["bytes"]) == (8000, (ids == 256).sum(), (ids < 256).sum())
    prepare_data.verify(folder)
    TokenData(folder, "train", 16, 257)

    (tmp_path / "a.txt").write_text("some text\n" * 300)
    for path in prepare(tmp_path, tmp_path / "a.txt").glob("*.bin"):
        raw = path.read_bytes()
        header = struct.unpack("<256i", raw[:1024])
        assert header[0] == 20240520 and header[1] == 1 and len(raw) == 1024 + 2 * header[2]
        assert struct.unpack(f"<{header[2]}H", raw[1024:]) == tuple(open_shard(path))


def test_nanogpt_bins(tmp_path, bpe):
    folder = tmp_path / "data" / "openwebtext"
    folder.mkdir(parents=True)
    encoding = prepare_data.get_tokenizer(str(bpe))
    for split, n in (("train", 50), ("val", 5)):
        ids = sum((encoding.encode_ordinary(f"hello world {i}") + [encoding.eot_token] for i in range(n)), [])
        np.array(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
        assert open_shard(folder / f"{split}.bin").tolist() == ids
    x, y = TokenData(folder, "train", 8, 263).rows(0, 4)
    assert (x[:, 1:] == y[:, :-1]).all()
    settings = dict(adopt=True, data_dir=str(tmp_path / "data"), dataset="openwebtext")
    with pytest.raises(UserError, match=r"holds token 2\d\d: tokenizer byte of 257 did not make it"):
        prepare_data.adopt(Settings(**settings))
    prepare_data.adopt(Settings(**settings, tokenizer=str(bpe)))
    counts = prepare_data.read_meta(folder)["splits"]["train"]
    assert (counts["documents"], counts["bytes"]) == (50, sum(len(f"hello world {i}") for i in range(50)))
    with pytest.raises(UserError, match="has a meta.json already"):
        prepare_data.adopt(Settings(**settings))
    with pytest.raises(ValueError, match="adopt needs the tokenizer that made the shards; bpe:300 would be a new one"):
        Settings(**settings, tokenizer="bpe:300")
    prepare_data.verify(folder)
    (folder / "meta.json").unlink()
    writer = prepare_data.ShardWriter(folder, "train", 263, 100)
    writer.write(np.arange(9), np.ones(9, np.uint8))
    writer.sync()
    with pytest.raises(UserError, match="1 of the 2 train shards in .* have a .mask"):
        prepare_data.adopt(Settings(**settings, tokenizer=str(bpe)))
    for ending in ("bin", "mask"):
        (folder / f"train_000000.{ending}").unlink()
    for split in ("train", "val"):
        (folder / f"{split}.mask").write_bytes(bytes([1] * len(open_shard(folder / f"{split}.bin"))))
    prepare_data.adopt(Settings(**settings, tokenizer=str(bpe)))
    prepare_data.verify(folder)
    assert (TokenData(folder, "train", 8, 263).rows(0, 4)[0] == x).all()
    (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-3])
    with pytest.raises(UserError, match="val.bin has .* bytes, not .*: truncated or damaged"):
        prepare_data.verify(folder)
    with pytest.raises(UserError, match="does not exist"):
        prepare_data.verify(tmp_path / "nothing")


def test_a_step_is_the_same_for_any_world_size(shards):
    """Global batches of 12 rows: one process, 2 of 6, 3 of 4 micro-steps of 2 on 2 processes, from any step on."""
    make = lambda: TokenData(shards, "train", block_size=8, vocab_size=1000, seed=3)
    whole = [make().rows(12 * step, 12)[0].tolist() for step in range(15)]  # beyond the first epoch
    for world in (2, 3, 4, 6):
        readers, n = [make() for _ in range(world)], 12 // world
        for step in (0, 7, 14):
            parts = [reader.rows(12 * step + rank * n, n)[0].tolist() for rank, reader in enumerate(readers)]
            assert sum(parts, []) == whole[step]


# -- the program --------------------------------------------------------------------------------------------------------


def call(*args, cwd):
    return subprocess.run([sys.executable, ROOT / "prepare_data.py", *map(str, args)], cwd=cwd, capture_output=True, text=True)


def test_default_is_the_standard_library(tmp_path):
    done = call(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "stdlib"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["splits"]["train"]["tokens"] > 5_000_000
    assert 500_000 < meta["splits"]["val"]["bytes"] < meta["splits"]["train"]["bytes"] / 5
    assert meta["splits"]["val"]["documents"] >= 30
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
        (["--val_fraction=1.5"], "val_fraction is 1.5; it must be at least 0 and at most 1"),
        (["--shard_size=0"], "shard_size is 0; it must be at least 1"),
        (["--seed=4294967296"], "seed is 4294967296; it must be at least 0 and at most 4294967295"),
        (["--stdin_format=csv"], "unknown stdin_format 'csv'; known: text, jsonl"),
        (["--shape=chat"], "unknown shape 'chat'; known: text, instruction, turns"),
        (["--shape=turns", "--prompt_field=p"], "prompt_field goes with shape=text; shape=turns has prompts of its own"),
        (["--tokenizer=bpe:99"], "bpe:N takes the size of a vocabulary, at least 257"),
        (["--tokenizer=bpe:many"], "bpe:N takes the size of a vocabulary, at least 257"),
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
