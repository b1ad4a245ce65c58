"""Text -> token shards: `python prepare_data.py` writes data/stdlib, `--input=PATH --dataset=NAME` any other text.

This file owns the shard format (its writer and its memory-mapped reader) and the tokenizers. A data set is a folder:

    data/NAME/train_000000.bin ...   256 int32 of header (magic, version, number of tokens), then the tokens
    data/NAME/train_000000.mask ...  only with prompts: one byte per token, 0 for those of a prompt, which have no loss
    data/NAME/val_000000.bin ...     the same for the held-out documents
    data/NAME/meta.json              the manifest: tokenizer, vocabulary size, source, counts, checksums
    data/NAME/tokenizer.tiktoken     the tokenizer's ranks, or tokenizer.json; neither for the byte-level one

The header is that of llm.c and modded-nanogpt (uint16 tokens), so their shards train here and ours there; a
vocabulary over 65,536 takes uint32 tokens and another magic number.

The file is read from top to bottom: the settings; the shards, with TokenData, which gives a training its rows; then
the way of a text into shards (`prepare`): inputs are read in jobs of about 1 MB (`read_jobs`), worker processes make
tokens of them (`tokenize`), and one process takes the tokens in the order of the text, shuffles and writes them
(`write_shards`). Memory does not grow with the corpus, and any number of workers writes the same shards. Last come
the tokenizers, the manifest, and the program.
"""

import base64
import bz2
import codecs
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import urllib.request
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tiktoken

from configurator import COUNT, NATURAL, NOT_NEGATIVE, SHARE, UserError, configure, run, save_whole


@dataclass
class Settings:
    # what
    dataset: str | None = None  # name of the data set or of a hub corpus; none: the first input's, or stdlib
    input: list[str] = field(default_factory=list)  # files, folders, globs, https:, hub:OWNER/NAME[:CONFIG[:SPLIT]], -
    stdin_format: Literal["text", "jsonl"] = "text"  # of standard input, --input=-
    shape: Literal["text", "instruction", "turns"] | None = None  # of a row (SHAPES); none: that of the corpus, or text
    text_field: str = ""  # the field that holds the text; none: text, output or conversations, by shape
    prompt_field: str = ""  # shape=text: the field of a prompt before the text; the prompt's tokens carry no loss
    tokenizer: str = "byte"  # byte, tiktoken's gpt2 ..., bpe:N (trained here), PATH.tiktoken, PATH.json, or a data set
    eot_token: str = ""  # tokenizer.json: its token between documents; none: the usual ones are tried
    bpe_sample: COUNT = 64_000_000  # bytes of text on which bpe:N is trained
    max_tokens: NATURAL = 0  # stop at the first batch that reaches so many for training; 0: all
    # how
    data_dir: str = "data"  # the data set is written to data_dir/dataset
    val_fraction: SHARE | None = None  # share of the documents that is held out; none: 0.01, of stdlib 0.05
    shard_size: COUNT = 100_000_000  # tokens per shard
    shuffle_buffer: COUNT = 1000  # documents that are shuffled among each other, at most 16 MB of text; 1: none
    max_broken: NOT_NEGATIVE = 0.01  # broken or undecodable documents per document kept, above which it is an error
    seed: Annotated[int, (0, 2**32 - 1)] = 1337  # of the shuffle, and of the sample for bpe:N
    num_workers: NATURAL = 0  # processes that make tokens; 0: one per core, or one for bytes and small inputs
    save_interval: NOT_NEGATIVE = 10.0  # seconds of work that an interruption may cost
    overwrite: bool = False  # replace a data set of that name
    # instead
    verify: bool = False  # check the data set's files against its manifest
    adopt: bool = False  # write the manifest for shards in data_dir/dataset that another program made with --tokenizer

    def __post_init__(self):
        if self.dataset is None:
            first = self.input[0] if self.input else "stdlib"
            self.dataset = Path(first).stem or Path(first).resolve().name
        if not re.fullmatch(r"\w[\w.-]*", self.dataset):
            raise ValueError(f"dataset {self.dataset!r} is not a plain name; give one with --dataset=NAME")
        if self.shape is None:
            is_corpus = self.dataset in CORPORA and not self.input
            self.shape = CORPORA[self.dataset][1] if is_corpus else "text"
        if self.prompt_field and self.shape != "text":
            raise ValueError(f"prompt_field goes with shape=text; shape={self.shape} has prompts of its own")
        if self.val_fraction is None:  # the standard library has few files, and comparing runs needs half a megabyte
            self.val_fraction = 0.05 if self.dataset == "stdlib" and not self.input else 0.01
        size = re.fullmatch(r"bpe:(\d{1,7})", self.tokenizer)
        if self.tokenizer.startswith("bpe:") and not (size and int(size[1]) >= 257):
            needed = "at least 257 (the bytes and the end of text), as in bpe:4096"
            raise ValueError(f"tokenizer is {self.tokenizer!r}; bpe:N takes the size of a vocabulary, {needed}")
        if size and self.adopt:
            raise ValueError(f"adopt needs the tokenizer that made the shards; {self.tokenizer} would be a new one")

    @property
    def fields(self):
        """Names of the fields of a jsonl, parquet or hub row of which its document is made; the text's is the last."""
        *others, text_field = SHAPES[self.shape][0]
        if self.prompt_field:
            others = [self.prompt_field]
        return [*others, self.text_field or text_field]


# ---------------------------------------------------------------------------------------------------------------------
# Shards: the format and its reader

SPLITS = ("train", "val")
HEADER = 256  # int32 values
FORMATS = {np.uint16: (20240520, 1), np.uint32: (20240801, 7)}  # type of the tokens: magic number and version
CHECKED = 1 << 26  # bytes of a split up to which the reader compares its checksums: a fraction of a second


def open_shard(path):
    """Tokens of a shard, a read-only memory map; UserError if it is not one, or is truncated.

    nanoGPT's train.bin and val.bin are uint16 tokens without a header.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        magic, version, count = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4").tolist()
    types = {format: dtype for dtype, format in FORMATS.items()}
    if (magic, version) in types:
        offset, dtype = 4 * HEADER, np.dtype(types[magic, version])
    elif Path(path).stem in SPLITS:
        offset, count, dtype = 0, size // 2, np.dtype(np.uint16)
    else:
        raise UserError(f"{path} is not a token shard: its header has no known magic number and version")
    expected = offset + count * dtype.itemsize
    if size != expected:
        raise UserError(f"shard {path} has {size} bytes, not {expected}: truncated or damaged")
    if not count:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset))  # a plain array is faster


def open_mask(path, tokens):
    """The mask beside a shard, a read-only memory map of uint8; all ones where there is none. UserError if it is
    truncated."""
    path = Path(path).with_suffix(".mask")
    if not path.exists():
        return np.broadcast_to(np.uint8(1), len(tokens))
    size = path.stat().st_size
    if size != len(tokens):
        raise UserError(f"{path} has {size} bytes for a shard of {len(tokens)} tokens: truncated or damaged")
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) if size else np.empty(0, np.uint8)


def shard_paths(folder, split):
    """The shards of a split in order: train_000000.bin, fineweb_train_000001.bin as llm.c names them, or train.bin."""
    return sorted(p for p in Path(folder).glob("*.bin") if re.search(rf"^{split}$|(^|_){split}_[^_]*$", p.stem))


def data_dir_setting(data_dir):
    """What a command line needs besides --dataset to find the data set."""
    return "" if data_dir == Settings.data_dir else f" --data_dir={data_dir}"


def find_data(dataset, data_dir, split):
    """The folder of a data set that has shards of `split` ("train", "val"): data_dir/dataset, or the path `dataset`.
    UserError if there is none."""
    for folder in (Path(data_dir) / dataset, Path(dataset)):
        if shard_paths(folder, split):
            return folder
        if folder.is_dir() and split == "train":
            raise UserError(f"{folder} holds no train shards (train_*.bin or train.bin)")
    if Path(dataset).name != dataset:
        raise UserError(f"no data set: {dataset} is no folder with {split} shards, in {data_dir}/ or by itself")
    source = "" if dataset in (*CORPORA, "stdlib") else "--input=PATH "
    command = f"python prepare_data.py {source}--dataset={dataset}{data_dir_setting(data_dir)}"
    raise UserError(f"no data set {dataset!r} with {split} shards in {data_dir}/; make it with: {command}")


class TokenData:
    """Rows of block_size + 1 tokens of one split of a data set folder: windows or documents.

    Windows follow each other, wherever documents begin and end; the last token of one is the first of the next.
    Documents (of prompts and texts: examples) have a row each. It begins with end-of-text, and ends with it where the
    document is short enough; longer ones are cut, shorter ones padded at the right, without loss. Attention is causal,
    so that no token sees the padding or another document.

    Row i of training is a pure function of (seed, i). Its epoch is i // len(self); in each, a permutation of its own
    visits every window or document once. Nothing is held but the memory maps, and 8 bytes for each document where they
    are the rows (one pass over the shards finds them, when they are opened); any row can be had at once.
    """

    def __init__(self, folder, split, block_size, vocab_size, seed=0, rows="windows"):
        """UserError for a folder without such shards, with others than its manifest lists, without a whole window, or
        without documents that can be told apart.

        Checksums are compared here up to CHECKED bytes of a split; `prepare_data.py --verify` does it for any size.
        """
        self.paths = shard_paths(folder, split)
        if not self.paths:
            raise UserError(f"no {split} shards ({split}_*.bin or {split}.bin) in {folder}")
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.shards = [open_shard(path) for path in self.paths]
        self.masks = [open_mask(path, tokens) for path, tokens in zip(self.paths, self.shards)]
        self.offsets = np.cumsum([0, *map(len, self.shards)])  # of each shard in the split, and the split's end
        meta = read_meta(folder)
        if meta:
            is_small = sum(tokens.nbytes for tokens in self.shards) <= CHECKED
            for fault in shard_faults(folder, split, meta, with_checksums=is_small):
                raise UserError(f"{fault}; the data cannot be trusted, prepare them again")
        n_masks = sum(path.with_suffix(".mask").exists() for path in self.paths)
        if n_masks not in (0, len(self.paths)):
            raise UserError(f"{n_masks} of the {len(self.paths)} {split} shards in {folder} have a .mask")
        self.starts = None  # of the documents, where they are the rows
        if rows == "documents":
            if not meta:
                lack = f"{folder} has no meta.json that names it; --adopt --tokenizer=NAME writes one"
                raise UserError(f"rows=documents needs the end-of-text token, and {lack}")
            self.eot = build_encoding(meta["tokenizer"]).eot_token
            self.starts = document_starts(self.shards, self.offsets, self.eot)
            if not len(self.starts):
                raise UserError(f"the {split} data in {folder} have no document: no text follows an end-of-text token")
            return
        # number of windows in the shards before each, and in all; none crosses from one shard into the next
        self.windows = np.cumsum([0, *(max(0, (len(tokens) - 1) // block_size) for tokens in self.shards)])
        if not self.windows[-1]:
            sizes = f"{max(map(len, self.shards))} tokens in its longest shard, {block_size + 1} needed"
            raise UserError(f"block_size {block_size} is longer than the {split} data in {folder}: {sizes}")

    def __len__(self):
        return int(self.windows[-1]) if self.starts is None else len(self.starts)

    def rows(self, first, n):
        """Rows first ... first + n - 1: inputs and targets, int64 (n, block_size); a target without loss is -100."""
        x = np.zeros((n, self.block_size), dtype=np.int64)  # the padding is token 0: none sees it
        y = np.full((n, self.block_size), -100, dtype=np.int64)
        for i in range(n):
            tokens, mask = self.read(self.find_row(first + i))
            length = len(tokens) - 1
            if self.starts is not None:  # up to the next end of text, the last target: so a model learns to stop
                tokens, mask = np.append(tokens, self.eot), np.append(mask, 1)  # the split's last document gets one too
                length = min(self.block_size, int(np.argmax(tokens[1:] == self.eot)) + 1)
            x[i, :length] = tokens[:length]
            y[i, :length] = np.where(mask[1 : length + 1], tokens[1 : length + 1], -100)
        return x, y

    def find_row(self, i):
        """Position in the split (its shards one after the other) of the first token of row i."""
        epoch, i = divmod(i, len(self))
        row = permute(i, len(self), key=f"{self.seed} {epoch}".encode())
        if self.starts is not None:
            return int(self.starts[row])
        shard = np.searchsorted(self.windows, row, side="right") - 1
        return int(self.offsets[shard] + (row - self.windows[shard]) * self.block_size)

    def read(self, start):
        """The block_size + 1 tokens of the split from `start` on (fewer at its end), and their mask."""
        end = min(start + self.block_size + 1, int(self.offsets[-1]))
        parts, masks = [], []
        while start < end:
            shard = int(np.searchsorted(self.offsets, start, side="right")) - 1
            here = slice(start - int(self.offsets[shard]), end - int(self.offsets[shard]))
            tokens = self.shards[shard][here].astype(np.int64)
            if tokens.max() >= self.vocab_size:
                misfit = f"token {tokens.max()}: it does not fit the vocabulary of {self.vocab_size}"
                raise UserError(f"shard {self.paths[shard]} holds {misfit}")
            parts.append(tokens)
            masks.append(self.masks[shard][here])
            start += len(tokens)
        return np.concatenate(parts), np.concatenate(masks)


def document_starts(shards, offsets, eot):
    """Positions in a split (its shards one after the other) of the end-of-text tokens before a text: an int64 array.
    `offsets` are the positions of the shards, and of the split's end."""
    ends = []  # positions of the end-of-text tokens, and the end of the split
    for tokens, offset in zip(shards, offsets):
        for start in range(0, len(tokens), JOB):
            ends.append(offset + start + np.flatnonzero(tokens[start : start + JOB] == eot))
    ends = np.concatenate([*ends, offsets[-1:]])
    return ends[:-1][np.diff(ends) > 1]  # a text lies between this one and the next


def permute(i, n, key):
    """Where i goes in a pseudo-random permutation of range(n) that `key` (bytes) selects.

    A Feistel network of four rounds permutes the numbers of 2 * half bits, whatever its round function is. A result
    that is not below n is put in again until it is: this permutes range(n).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> half, i & ((1 << half) - 1)
        for r in range(4):
            digest = hashlib.blake2b(b"%d %d" % (r, right), digest_size=8, key=key).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & ((1 << half) - 1))
        i = left << half | right
        if i < n:
            return i


# ---------------------------------------------------------------------------------------------------------------------
# Shards: the writer


def token_type(vocab_size):
    """The type of the tokens in shards of a vocabulary."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class ShardWriter:
    """Appends tokens to folder/split_000000.bin and on, shard_size tokens each; `sync` completes the last shard.

    `shards` is what the manifest says of them: file, tokens, crc32 of the tokens' bytes, and mask_crc32 where a mask
    goes beside them. Given those of an earlier writer, it goes on after them.
    """

    def __init__(self, folder, split, vocab_size, shard_size, shards=None):
        """UserError if the last of the `shards` to go on with lost a part."""
        self.folder, self.split, self.shard_size = Path(folder), split, shard_size
        self.dtype = np.dtype(token_type(vocab_size))
        self.shards = [] if shards is None else shards  # the caller's own list: it grows as shards are written
        for _, path, size in self.last_files():
            if not (path.exists() and path.stat().st_size >= size):
                raise UserError(f"{path} lost a part: remove {self.folder} to begin anew")
            os.truncate(path, size)  # an interrupted run may have written more

    def last_files(self):
        """(name of its checksum, path, bytes) of the last shard's files: the tokens, and the mask if it has one."""
        for last in self.shards[-1:]:
            path = self.folder / last["file"]
            yield "crc32", path, 4 * HEADER + last["tokens"] * self.dtype.itemsize
            if "mask_crc32" in last:
                yield "mask_crc32", path.with_suffix(".mask"), last["tokens"]

    def write(self, tokens, mask=None):
        """Appends an integer array, and its mask (uint8) in a data set that has any."""
        arrays = {"crc32": tokens.astype(self.dtype, copy=False)}  # each under the name of its checksum
        if mask is not None:
            arrays["mask_crc32"] = mask
        start = 0
        while start < len(tokens):
            if not self.shards or self.shards[-1]["tokens"] == self.shard_size:
                name = f"{self.split}_{len(self.shards):06d}.bin"
                self.shards.append({"file": name, "tokens": 0, **dict.fromkeys(arrays, 0)})
                for _, path, size in self.last_files():
                    path.write_bytes(bytes(size))  # room for the header
            last = self.shards[-1]
            end = min(len(tokens), start + self.shard_size - last["tokens"])
            for checksum, path, _ in self.last_files():
                part = arrays[checksum][start:end]
                with open(path, "ab") as file:
                    file.write(part)
                last[checksum] = zlib.crc32(part, last[checksum])
            last["tokens"] += end - start
            start = end
            if last["tokens"] == self.shard_size:
                self.sync()

    def sync(self):
        """Brings the last shard to the disk, with a header that says how long it is."""
        for _, path, _ in self.last_files():
            with open(path, "r+b") as file:
                if path.suffix == ".bin":
                    header = np.zeros(HEADER, dtype="<i4")
                    header[:3] = *FORMATS[self.dtype.type], self.shards[-1]["tokens"]
                    file.write(header)
                    file.flush()
                os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# From text to shards

BATCH_BYTES = 1 << 24  # of text that is shuffled at once
SMALL = 1 << 22  # bytes of input under which worker processes are not worth their start
SHOW_INTERVAL = 10  # seconds between lines that say how far it is
ALTERED = "altered by the tokenizer"
# settings that do not change the shards
WITHOUT_EFFECT = ("dataset", "data_dir", "num_workers", "overwrite", "save_interval", "max_broken", "verify", "adopt")


def prepare(settings):
    """Writes the data set that `settings` describe and returns its folder, which appears when it is whole.

    All is written to data_dir/.NAME.partial. What an interrupted run left there is continued if it was of the same
    settings and inputs. A script that calls this with several workers needs `if __name__ == "__main__":`.
    """
    folder = Path(settings.data_dir) / settings.dataset
    partial = folder.with_name(f".{folder.name}.partial")  # no data set's name begins with a dot
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # a run ended between the two renames below
        old.rename(folder)
    inputs, source = find_inputs(settings)
    if folder.exists():
        if not settings.overwrite:
            raise UserError(f"{folder} exists; --overwrite replaces it, --dataset=NAME writes another")
        known = ("meta.json", *TOKENIZER_FILES.values())
        strange = [p.name for p in folder.iterdir() if p.suffix not in (".bin", ".mask") and p.name not in known]
        if strange:
            raise UserError(f"{folder} is not a data set: it holds {strange[0]}; --dataset=NAME writes another")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial, f"preparing {folder}"):
            try:
                write_shards(settings, inputs, source, partial)
            except (OSError, UserError):
                if not (partial / "progress.json").exists():  # there is nothing to go on from
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)  # of a run that ended while it removed it
                folder.rename(old)
            for path in partial.glob("progress.json*"):  # and what an interrupted save of it left
                path.unlink()
            partial.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        kept = "nothing of it is kept"
        if partial.exists():
            kept = f"what is done is kept in {partial}, the same command goes on from there"
        raise UserError(f"cannot write {folder}: {error.strerror or error}; {kept}") from None
    return folder


def write_shards(settings, inputs, source, partial):
    """Documents -> tokens -> split, shuffle -> shards and meta.json in the folder `partial`.

    Documents are taken in batches. When no document is kept back after a batch, `state` is all there is to know; it is
    saved every save_interval seconds, when what it speaks of is on the disk.
    """
    started = saved = shown = time.monotonic()
    state, encoding = begin(settings, inputs, partial)
    train, bytes_before = state["splits"]["train"], total(state, "bytes")
    writers = {}
    for split, counts in state["splits"].items():
        writers[split] = ShardWriter(partial, split, encoding.n_vocab, settings.shard_size, counts["shards"])
    can_continue = not any(i.path == "-" for i in inputs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sizes = [i.size for i in inputs]
    is_small = None not in sizes and sum(sizes) < SMALL
    num_workers = settings.num_workers or (1 if encoding.name == "byte" or is_small else cores)
    jobs = read_jobs(inputs, Place(*state["place"]), settings.fields)
    tokenized = tokenize_all(jobs, encoding, settings, num_workers, (partial, state["tokenizer"]))
    batch, waiting = [], []
    for documents, problems, place in tokenized:
        batch += documents
        for kind, where in problems:
            count, places = state["problems"].get(kind, (0, []))
            state["problems"][kind] = count + 1, (places + [where])[:3]
        if len(batch) < settings.shuffle_buffer and sum(document.n_bytes for document in batch) < BATCH_BYTES:
            continue
        waiting, batch = write_batch(waiting + batch, settings, writers, state), []
        state["place"] = place
        if time.monotonic() - shown >= SHOW_INTERVAL:
            shown = time.monotonic()
            show_progress(state, (total(state, "bytes") - bytes_before) / (shown - started), inputs)
        if train["documents"] > 10_000:  # fewer are too few to judge a corpus by
            check_problems(settings, state, source)
        if settings.max_tokens and train["tokens"] >= settings.max_tokens:
            break
        if can_continue and not waiting and time.monotonic() - saved >= settings.save_interval:
            for writer in writers.values():
                writer.sync()
            save_json(partial / "progress.json", state)
            saved = time.monotonic()
    waiting = write_batch(waiting + batch, settings, writers, state)
    check_problems(settings, state, source, len(waiting))
    if waiting and not train["documents"]:  # it is the only document
        first, rest = halves(waiting[0], encoding, source)
        write_documents("train", [first], writers, state)
        waiting = [rest]
    write_documents("val", waiting, writers, state)
    for writer in writers.values():
        writer.sync()

    for kind, (count, places) in state["problems"].items():
        if kind != "empty":  # an empty file is no news: meta.json counts it
            print(f"warning: {kind}: {count} documents, the first at {', '.join(places)}", file=sys.stderr)
    more = {"source": source, "seed": settings.seed, "problems": state["problems"]}
    write_meta(partial, state["tokenizer"], encoding, state["splits"], more)
    seconds, n_bytes = time.monotonic() - started, total(state, "bytes") - bytes_before
    print(f"{len(inputs)} inputs with tokenizer {encoding.name} in {seconds:.1f} s, {n_bytes / 1e6 / seconds:.1f} MB/s")


def write_batch(documents, settings, writers, state):
    """Writes a batch, each document to its split, in the order of the shuffle. While the held-out part is empty, the
    document of smallest hash is kept back and returned, to be compared with those of the next batch: at the end it is
    held out, so that this part never stays empty. After 10,000 documents it is held out at once, since no progress is
    saved while a document waits.
    """
    waiting = []
    if documents and not state["splits"]["val"]["documents"]:
        smallest = min(range(len(documents)), key=lambda i: documents[i].hash)
        if documents[smallest].hash >= settings.val_fraction:  # else the batch itself has one to hold out
            waiting.append(documents.pop(smallest))
    state["batches"] += 1
    rng = np.random.RandomState([settings.seed, state["batches"]])  # a generator whose streams never change
    shuffled, size = [], settings.shuffle_buffer
    for i in range(0, len(documents), size):
        some = documents[i : i + size]
        shuffled += [some[j] for j in rng.permutation(len(some))]
    write_documents("train", [d for d in shuffled if d.hash >= settings.val_fraction], writers, state)
    write_documents("val", [d for d in shuffled if d.hash < settings.val_fraction], writers, state)
    if state["splits"]["train"]["documents"] > 10_000:
        write_documents("val", waiting, writers, state)
        waiting = []
    return waiting


def write_documents(split, documents, writers, state):
    """Writes documents to the shards of a split and adds them to its counts."""
    if not documents:
        return
    counts, mask = state["splits"][split], None
    tokens = np.concatenate([document.tokens for document in documents])
    if documents[0].mask is not None:
        mask = np.concatenate([document.mask for document in documents])
    writers[split].write(tokens, mask)
    counts["documents"] += len(documents)
    counts["bytes"] += sum(document.n_bytes for document in documents)
    counts["tokens"] += len(tokens)
    counts["loss_tokens"] += len(tokens) if mask is None else int(mask.sum())


def total(state, name):
    """Documents, bytes or tokens of both splits."""
    return sum(counts[name] for counts in state["splits"].values())


def check_problems(settings, state, source, n_waiting=0):
    """UserError if there is no text, if too much of it is broken, or if all of it is held out."""
    n_train, n_kept = state["splits"]["train"]["documents"], total(state, "documents") + n_waiting
    # those of the other two kinds are counted, but are no reason to stop
    broken = {kind: found for kind, found in state["problems"].items() if kind not in ("empty", ALTERED)}
    n_broken = sum(count for count, _ in broken.values())
    if n_broken > settings.max_broken * max(n_kept, 1):
        first = ", ".join(f"{kind} at {places[0]}" for kind, (_, places) in broken.items())
        share = f"more than max_broken {settings.max_broken}"
        hint = "; --text_field= names the field of the text" if any("JSON" in kind for kind in broken) else ""
        raise UserError(f"{n_broken} documents are broken where {n_kept} are kept, {share}: {first}{hint}")
    if not n_kept:
        raise UserError(f"no text in {', '.join(source)}")
    if not n_train and not n_waiting:
        raise UserError(f"all {n_kept} documents fell to the held-out part: give more text or a smaller val_fraction")


def halves(document, encoding, source):
    """The only document in two: its first nine tenths, or less (at least half of that) to end where a line ends, and
    the rest. UserError if it has a prompt or is too short."""
    text = decode_bytes(encoding, document.tokens[1:])
    middle = len(text) * 9 // 10
    middle = text.rfind(b"\n", middle // 2, middle) + 1 or whole_characters(text[:middle])
    if document.mask is not None or not 0 < middle < len(text):
        raise UserError(f"{', '.join(source)} holds one document only, which is too little for a held-out part")
    return [make_document(encoding, [encode(encoding, part)], [part]) for part in (text[:middle], text[middle:])]


def begin(settings, inputs, partial):
    """(state, encoding) of an interrupted run with equal settings and inputs, or of a new one."""
    path, mark = partial / "progress.json", fingerprint(settings, inputs)
    if path.exists():
        try:
            state = json.loads(path.read_text())
            if state["fingerprint"] != mark:
                raise ValueError("it is of other settings or inputs")
            encoding = build_encoding(load_tokenizer(partial, state["tokenizer"]))
            print(f"going on after {total(state, 'documents'):,} documents of an interrupted run", file=sys.stderr)
            return state, encoding
        except (ValueError, KeyError, TypeError, OSError) as error:
            print(f"{partial} cannot be continued, {error}: beginning anew", file=sys.stderr)
    if settings.tokenizer.startswith("bpe:"):
        encoding = train_bpe(inputs, settings)
    else:
        encoding = get_tokenizer(settings.tokenizer, settings.eot_token)
    for file in partial.iterdir():
        file.unlink()
    state = {
        "fingerprint": mark,
        "tokenizer": save_tokenizer(partial, tokenizer_state(encoding)),  # as in meta.json
        "place": Place(),  # up to which the inputs are read
        "batches": 0,
        "problems": {},  # kind: (count, first places)
        "splits": {},  # as in meta.json
    }
    for split in SPLITS:
        state["splits"][split] = {"documents": 0, "bytes": 0, "loss_tokens": 0, "shards": [], "tokens": 0}
    return state, encoding


def fingerprint(settings, inputs):
    """A text that is equal for runs that write the same shards."""
    mine = {name: value for name, value in asdict(settings).items() if name not in WITHOUT_EFFECT}
    tokenizer = os.stat(settings.tokenizer).st_mtime_ns if os.path.exists(settings.tokenizer) else None
    what = json.dumps([mine, tokenizer, [asdict(source) for source in inputs]])
    return hashlib.sha256(what.encode()).hexdigest()


@contextmanager
def locked(folder, work):
    """Keeps other processes of this machine from the same work in a folder, where its file system has locks; a process
    that is killed lets go of it. `work` names, in the error, what the other process is doing."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        fcntl = None
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is {work}; wait for it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def show_progress(state, rate, inputs):
    """Says on standard error how far the work is; `rate` is in bytes of text a second."""
    text = f"{total(state, 'documents'):,} documents, {total(state, 'tokens'):,} tokens, {rate / 1e6:.1f} MB/s"
    sizes = [source.size for source in inputs]
    if None not in sizes and sum(sizes):  # of a compressed file and of parquet nothing counts until it is done
        index, offset, _ = state["place"]
        is_plain = index < len(inputs) and SUFFIXES.get(Path(inputs[index].path).suffix) in ("text", "jsonl")
        text += f", {(sum(sizes[:index]) + is_plain * offset) / sum(sizes):.1%} read"
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs: which there are

SUFFIXES = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = {  # suffix: what makes a stream of the content of a compressed one
    ".gz": gzip.open,
    ".zst": lambda stored: optional("pyarrow").CompressedInputStream(stored, "zstd"),
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
KNOWN = f"{', '.join(SUFFIXES)}, compressed as {', '.join(COMPRESSIONS)}"
TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CORPORA = {  # --dataset=NAME without input: the input, and the shape of its rows
    "fineweb_edu": ("hub:HuggingFaceFW/fineweb-edu:sample-10BT", "text"),
    "fineweb": ("hub:HuggingFaceFW/fineweb:sample-10BT", "text"),
    "c4": ("hub:allenai/c4:en", "text"),
    "dclm": ("hub:mlfoundations/dclm-baseline-1.0", "text"),
    "wikitext": ("hub:Salesforce/wikitext:wikitext-103-raw-v1", "text"),
    "tinystories": ("hub:roneneldan/TinyStories", "text"),
    "tinyshakespeare": (TINY_SHAKESPEARE, "text"),
    # For these two only files of the same form were tried here. lima asks for a login to the hub.
    "commonsense170k": ("hub:zwhe99/commonsense_170k", "instruction"),
    "lima": ("hub:GAIR/lima", "turns"),
}


@dataclass
class Input:
    path: str  # of a file, an address, hub:..., or - for standard input
    kind: str  # text, jsonl, parquet, hub
    size: int | None = None  # bytes as stored, where they are known
    stamp: int = 0  # time of the last change, by which a continued run knows the same file


def find_inputs(settings):
    """(Inputs, what meta.json says of their source); UserError for an unknown data set."""
    if not settings.input and settings.dataset == "stdlib":
        return find_files(stdlib_files()), [f"the standard library of Python {sys.version.split()[0]}"]
    source = settings.input
    if not source:
        if settings.dataset not in CORPORA:
            known = f"known: stdlib, {', '.join(CORPORA)}, or give local text with --input=PATH"
            raise UserError(f"unknown dataset {settings.dataset!r}; {known}")
        source = [CORPORA[settings.dataset][0]]
    inputs = find_files(source, settings.stdin_format)
    texts = [i.path for i in inputs if i.kind == "text"]
    if texts and (settings.prompt_field or settings.shape != "text"):
        what = "prompt_field" if settings.prompt_field else f"shape {settings.shape}"
        raise UserError(f"{what} needs jsonl, parquet or hub rows; {texts[0]} is plain text")
    return inputs, source


def find_files(inputs, stdin_format="text"):
    """The Inputs behind `inputs` (files, folders, globs ...), each once, sorted per input; or UserError."""
    found = {}  # by where a path leads, so that two names of a file are one
    for given in inputs:
        count = len(found)
        if given == "-":
            found["-"] = Input("-", stdin_format)
        elif given.startswith("hub:"):
            found[given] = Input(given, "hub")
        elif given.startswith(("https://", "http://")):
            kind = kind_of(given.split("?")[0])
            if kind in (None, "parquet"):
                raise UserError(f"input {given}: only text and jsonl stream from an address; download it first")
            found[given] = Input(given, kind)
        else:
            for path in local_files(given):
                stat = path.stat()
                found.setdefault(path.resolve(), Input(str(path), kind_of(path), stat.st_size, stat.st_mtime_ns))
        if len(found) == count:
            raise UserError(f"input {given}: no files of kind {KNOWN} that are not among the inputs already")
    return list(found.values())


def local_files(given):
    """The files of a known kind that a path of a file or folder, or a glob, leads to; or UserError."""
    paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    if not paths:
        raise UserError(f"input {given}: no such file, folder or glob")
    for path in map(Path, paths):
        if path.is_dir():
            yield from (p for p in sorted(path.rglob("*")) if kind_of(p) and p.is_file())
        elif kind_of(path):
            yield path
        elif path == Path(given):
            raise UserError(f"input {given}: unknown kind {path.suffix!r}; known: {KNOWN}")


def stdlib_files():
    """Source files of the running interpreter's standard library, without its tests: some 11 MB of text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    leave = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [p for p in sorted(root.rglob("*.py")) if not leave & set(p.relative_to(root).parts)]
    if not files:
        raise UserError(f"the standard library's source is not at {root}; give text with --input=PATH")
    return list(map(str, files))


def kind_of(path):
    """text, jsonl or parquet by the suffix, after which one of a compression may stand (not for parquet); else None."""
    path = Path(path)
    if path.suffix not in COMPRESSIONS:
        return SUFFIXES.get(path.suffix)
    kind = SUFFIXES.get(Path(path.stem).suffix)
    return None if kind == "parquet" else kind


def optional(module):
    """A module of an optional library; UserError that names its `pip install` where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        lacks = f", which lacks {error.name}" if error.name and not error.name.startswith(package) else ""
        raise UserError(f"this needs the optional library {package}{lacks}: pip install {package}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Inputs: a reader for each kind. It yields pieces of the input from a Place on: (data, Place after it). The data are
# lines as bytes (text, jsonl; a line of text longer than JOB is cut), or a list of rows, each a tuple of the fields'
# values. A piece depends only on where it starts, so that a continued run reads the same ones.

JOB = 1 << 20  # bytes of text that are read at once, about what a worker gets; tokens that are looked through at once
ROWS = 256  # of a parquet file or a hub corpus that are read at once
MAX_LINE = 1 << 28  # bytes of a line of jsonl


class Place(NamedTuple):
    """Where a piece of the inputs begins: at the start of a line or row, or inside a line of text longer than JOB."""

    index: int = 0  # of the input
    offset: int = 0  # bytes before it, decompressed, or rows
    line: int = 1  # number of the line or row at this place


def read_lines(source, place, fields):
    """Text and jsonl: about JOB bytes at once. A line of text that is longer is cut between characters."""
    index, offset, line = place
    rest, is_end = b"", False
    with open_stream(source.path) as stream:
        for start in range(0, offset, JOB):  # a continued run reads up to its place again
            stream.read(min(JOB, offset - start))
        while not is_end:
            data = rest + stream.read(JOB - len(rest))
            while source.kind == "jsonl" and b"\n" not in data and (more := stream.read(JOB)):
                data += more
                if len(data) > MAX_LINE:
                    raise ValueError(f"it has a line of more than {MAX_LINE:,} bytes at byte {offset:,}")
            is_end = len(data) < JOB
            if not is_end:
                end = data.rfind(b"\n") + 1 or whole_characters(data)
                data, rest = data[:end], data[end:]
            if data or not offset:  # an empty input is a piece too, to be counted as empty
                line += data.count(b"\n")
                offset += len(data)
                yield data, Place(index, offset, line)


@contextmanager
def open_stream(path):
    """A stream of the decompressed bytes of a file, address or standard input. EOFError if, when it has been read, a
    download is not complete."""
    if path == "-":
        stored = sys.stdin.buffer
    elif path.startswith(("https://", "http://")):
        stored, path = urllib.request.urlopen(path, timeout=60), path.split("?")[0]
    else:
        stored = open(path, "rb")
    with stored:
        decompress = COMPRESSIONS.get(Path(path).suffix)
        yield decompress(stored) if decompress else stored
        if getattr(stored, "length", None):  # what http.client still expects
            raise EOFError(f"the connection ended {stored.length:,} bytes before the end")


def whole_characters(data):
    """Length of the bytes without a UTF-8 character that their end cuts in two."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data[-3:])
    begun, _ = decoder.getstate()  # the bytes of a character that is not whole yet
    return len(data) - len(begun)


def read_parquet(source, place, fields):
    """Parquet: ROWS rows at once, and a new piece for each row group."""
    with optional("pyarrow.parquet").ParquetFile(source.path) as file:
        check_fields(source, fields, file.schema_arrow.names)
        row = 0
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=fields, use_threads=False):
                row += batch.num_rows
                if row > place.offset:
                    rows = list(zip(*(batch.column(name).to_pylist() for name in fields)))
                    yield rows, Place(place.index, row, row + 1)


def read_hub(source, place, fields):
    """hub:OWNER/NAME[:CONFIG[:SPLIT]], streamed: ROWS rows at once; OWNER/NAME may be a local folder."""
    name, config, split = (source.path.removeprefix("hub:").split(":") + ["", ""])[:3]
    rows = optional("datasets").load_dataset(name, config or None, split=split or "train", streaming=True)
    row, rows = place.offset, iter(rows.skip(place.offset))
    while batch := list(itertools.islice(rows, ROWS)):
        check_fields(source, fields, list(batch[0]))
        row += len(batch)
        yield [tuple(values[f] for f in fields) for values in batch], Place(place.index, row, row + 1)


def check_fields(source, fields, names):
    """UserError if a row with the fields `names` has not all of `fields`."""
    for name in fields:
        if name not in names:
            has = f"it has {', '.join(names)}; --text_field= names one"
            raise UserError(f"{source.path} has no field {name!r}; {has}")


READERS = {"text": read_lines, "jsonl": read_lines, "parquet": read_parquet, "hub": read_hub}


def read_jobs(inputs, place, fields):
    """(job, Place after it) from `place` on; UserError for an input that cannot be read.

    A job is a list of pieces of some 1 MB together, each (kind and path of its input, number of its first line or row,
    data).
    """
    job, size = [], 0
    for index, source in enumerate(inputs[place.index :], place.index):
        try:
            for data, after in READERS[source.kind](source, place, fields):
                job.append((source.kind, source.path, place.line, data))
                place = after
                if isinstance(data, list):
                    size += sum(len(str(value)) for row in data for value in row)
                else:
                    size += len(data)
                if size >= JOB // 2:
                    yield job, place
                    job, size = [], 0
        except UserError:
            raise
        except Exception as error:  # whatever a disk, a network, a damaged file and the libraries for it raise
            reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {reason}; once it can, the same command goes on from where it was"
            raise UserError(f"input {source.path} cannot be read: {reason}") from None
        place = Place(index + 1)
    if job:
        yield job, place


# ---------------------------------------------------------------------------------------------------------------------
# From pieces to documents: their text as bytes, (text,), (prompt, text), or more turns as (prompt, text, prompt, text).
# Bytes that are not UTF-8 stay as they are. The functions yield (document, where); `where` is path:line, path:row or
# the path alone. They append to the list `problems` what is wrong: (kind, where).

MAX_DOCUMENT = 1 << 16  # bytes: longer texts are cut, so that a single file still has a held-out part
BLANK_LINE = "\n\n"
ASSISTANT = ("assistant", "gpt", "model")  # names of its role


def join_instruction(instruction, input, output):
    """(prompt, text) of a row of Alpaca's form: the instruction and the input, if there is one, each with a blank line
    after it; then the output."""
    prompt = instruction + BLANK_LINE
    if input:
        prompt += input + BLANK_LINE
    return prompt, output


def join_turns(turns):
    """(prompt, text, prompt, text ...) of a conversation: one document, in which the assistant's turns carry the loss,
    each after all turns before it. A blank line ends each turn but the last.

    A turn is {"role", "content"}, {"from", "value"}, or a text; texts are the user's and the assistant's by turns. What
    others say (the system, a tool) is prompt, and what nobody answers is left out. ValueError, KeyError or TypeError
    for anything else.
    """
    if not isinstance(turns, list):
        raise TypeError("no list")
    parts = [""]
    for i, turn in enumerate(turns):
        role, text = ("user", "assistant")[i % 2], turn
        if isinstance(turn, dict):
            role, text = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
        is_prompt, was_prompt = role not in ASSISTANT, len(parts) % 2 == 1
        if is_prompt != was_prompt:
            parts.append("")
        parts[-1] += text + BLANK_LINE
    if len(parts) % 2 == 1:  # the last was not answered
        parts.pop()
    if not parts:
        raise ValueError("no turn of the assistant")
    parts[-1] = parts[-1].removesuffix(BLANK_LINE)
    return parts


# --shape: the fields of a row, that of the text last, and what makes the parts of a document of their values.
SHAPES = {
    "text": (["text"], lambda *values: values),
    "instruction": (["instruction", "input", "output"], join_instruction),
    "turns": (["conversations"], join_turns),
}


def read_documents(job, settings, problems):
    """The documents of a job's pieces, from whichever kind of input they are."""
    for kind, path, line, data in job:
        if kind == "text":
            yield from text_documents(path, line, data, problems)
        else:
            yield from row_documents(path, line, data, settings, problems)


def text_documents(path, line, data, problems):
    """The documents of lines of plain text, which are a whole file where it is short enough."""
    for text in cut(data):
        where = path
        try:
            text.decode()
        except UnicodeDecodeError as error:
            n_lines = text.count(b"\n", 0, error.start)
            where = f"{path}:{line + n_lines}"
            problems.append(("undecodable", where))
        if text.strip():
            yield (text,), where
        else:
            problems.append(("empty", f"{path}:{line}"))
        line += text.count(b"\n")


def row_documents(path, line, data, settings, problems):
    """The documents of rows: of the lines of jsonl, bytes, or of a list of rows, the values of settings.fields each."""
    is_jsonl = isinstance(data, bytes)
    what = "no JSON object with a text" if is_jsonl else "no text"
    if settings.shape != "text":
        what = f"no row of shape {settings.shape}:"
    for i, row in enumerate(io.BytesIO(data) if is_jsonl else data, line):
        where = f"{path}:{i}"
        try:
            parts = row_parts(row, settings)
        except (ValueError, KeyError, TypeError, RecursionError):
            problems.append((f"{what} {' and '.join(map(repr, settings.fields))}", where))
            continue
        if not parts[-1].strip():
            problems.append(("empty", where))
            continue
        try:
            parts = tuple(part.encode() for part in parts)
        except UnicodeEncodeError:  # bytes that surrogateescape stands for come back, other lone surrogates are U+FFFD
            parts = [re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", part) for part in parts]
            parts = tuple(part.encode(errors="surrogateescape") for part in parts)
            problems.append(("undecodable", where))
        if len(parts) > 1:  # a prompt and its text stay together
            yield parts, where
        else:
            for piece in cut(parts[0]):
                yield (piece,), where


def row_parts(row, settings):
    """The texts that make the document of a row; [""] for a blank line. ValueError, KeyError, TypeError or
    RecursionError where it has none."""
    if isinstance(row, bytes):
        if not row.strip():
            return [""]
        record = json.loads(row.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape"))
        row = [record[name] for name in settings.fields]
    _, make_parts = SHAPES[settings.shape]
    parts = make_parts(*row)
    if not all(isinstance(part, str) for part in parts):
        raise TypeError("a part is no text")
    return parts


def cut(data):
    """Pieces of at most MAX_DOCUMENT bytes, cut after a line's end where there is one, else between characters."""
    pieces, start = [], 0
    while len(data) - start > MAX_DOCUMENT:
        end = data.rfind(b"\n", start, start + MAX_DOCUMENT) + 1
        end = end or start + whole_characters(data[start : start + MAX_DOCUMENT])
        pieces.append(data[start:end])
        start = end
    return pieces + [data[start:]]


def document_hash(parts):
    """A number from 0 to 1 that is a hash of a document's text. The document is held out where it is below
    val_fraction: the same choice whatever else the corpus holds."""
    digest = hashlib.blake2b(b"\0".join(parts), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


# ---------------------------------------------------------------------------------------------------------------------
# From documents to tokens, in this process or in others


class Document(NamedTuple):
    tokens: np.ndarray  # the end-of-text token, then those of the prompt and of the text
    mask: np.ndarray | None  # uint8 beside them, in a data set of prompts: 0 for a prompt's
    n_bytes: int  # of prompts and texts
    hash: float


def tokenize(encoding, settings, job):
    """(the Documents of a job, its problems); any process may do it."""
    documents, problems = [], []
    for parts, where in read_documents(job, settings, problems):
        ids = [encode(encoding, part) for part in parts]
        if isinstance(encoding, JsonTokenizer) and any(decode_bytes(encoding, i) != p for i, p in zip(ids, parts)):
            problems.append((ALTERED, where))
        documents.append(make_document(encoding, ids, parts))
    return documents, problems


def make_document(encoding, ids, parts):
    """The Document of a text, or of prompts and texts by turns: their token ids and their bytes."""
    dtype, mask = token_type(encoding.n_vocab), None
    tokens = np.concatenate([[encoding.eot_token], *ids], dtype=dtype, casting="unsafe")
    if len(ids) > 1:
        mask = np.concatenate([[1], *(np.full(len(some), i % 2) for i, some in enumerate(ids))]).astype(np.uint8)
    return Document(tokens, mask, sum(map(len, parts)), document_hash(parts))


def tokenize_all(jobs, encoding, settings, num_workers, saved_tokenizer):
    """(Documents, problems, Place) for each (job, Place) in their order, from num_workers processes; one is this one.

    No more than two jobs per process are under way, so that memory does not grow with the corpus. `saved_tokenizer`,
    (folder, saved), is what load_tokenizer takes: each worker loads the tokenizer from its files. Sent through a pipe,
    a large one would block this process forever if the worker ended before it had read it.
    """
    if num_workers == 1:
        for job, place in jobs:
            yield *tokenize(encoding, settings, job), place
        return
    # spawn: a process that begins afresh has neither the threads of this one nor its lock on the folder
    spawn, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    pool = ProcessPoolExecutor(num_workers, spawn, begin_worker, (saved_tokenizer, settings))
    pending = deque()
    try:
        for job, place in jobs:
            pending.append((submit(pool, job), place))
            if len(pending) >= 2 * num_workers:
                future, place = pending.popleft()
                yield *future.result(), place
        for future, place in pending:
            yield *future.result(), place
    except BrokenProcessPool:
        for process in set(multiprocessing.active_children()) - set(others):
            process.kill()  # a broken pool overlooks one that has just started, and would wait for it forever
        reason = 'out of memory, or a script without `if __name__ == "__main__":`?'
        hint = "the same command goes on from where it was"
        raise UserError(f"a worker process ended unexpectedly ({reason}); {hint}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def submit(pool, job):
    """Gives a job to the pool, which starts its worker processes as jobs come. Ctrl-C is for this process alone:
    workers start with it blocked. BrokenProcessPool if one does not start."""
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows
    if can_block:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a process inherits what is blocked
    try:
        return pool.submit(work, job)
    except Exception as error:  # of several kinds: a worker that dies meanwhile takes the pipes that this one is given
        raise BrokenProcessPool from error
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def begin_worker(saved_tokenizer, settings):
    """Loads the tokenizer that the worker process uses for all its jobs."""
    global of_worker
    threading.Thread(target=end_with_parent, daemon=True).start()
    of_worker = build_encoding(load_tokenizer(*saved_tokenizer)), settings


def end_with_parent():
    """Ends this process when its parent is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(job):
    return tokenize(*of_worker, job)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: tiktoken.Encoding objects, or a JsonTokenizer

END_OF_TEXT = "<|endoftext|>"
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
TOKENIZER_FILES = {"ranks": "tokenizer.tiktoken", "json": "tokenizer.json"}  # of a state's long parts


def byte_encoding():
    """256 bytes and the end-of-text token: a vocabulary of 257 that needs no download."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("byte", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library, with the name, n_vocab and eot_token of a tiktoken.Encoding.

    Some of them change a text (T5 normalizes it); `prepare` counts the documents that do not come back as they were.
    """

    def __init__(self, name, text, eot_token=""):
        """From the file's text; ValueError if it is none or has no end-of-text token."""
        self.name, self.json, tokenizers = name, text, optional("tokenizers")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(str(error).splitlines()[0]) from None
        self.tokenizer.no_truncation(), self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # their text is ordinary text
        self.n_vocab = max(self.tokenizer.get_vocab().values()) + 1
        ends = [eot_token] if eot_token else USUAL_ENDS
        self.end = next((end for end in ends if self.tokenizer.token_to_id(end) is not None), None)
        if self.end is None:
            raise ValueError(f"it has no token {' or '.join(ends)}; name its end of text with --eot_token=")
        self.eot_token = self.tokenizer.token_to_id(self.end)


def get_tokenizer(name, eot_token=""):
    """The tokenizer `name`: byte, one that tiktoken knows, PATH.tiktoken, PATH.json or a data set; or UserError.

    A .tiktoken file (base64 token and rank a line) holds no pattern: text is cut into words as GPT-2 does. A file's
    tokenizer has the name of the file, a tokenizer.json that of its folder.
    """
    if name == "byte":
        return byte_encoding()
    if os.path.isdir(name) and name not in tiktoken.list_encoding_names():  # ./gpt2 is the folder of that name
        meta = read_meta(name)
        if not meta:
            raise UserError(f"tokenizer {name}: the folder is no data set, it has no meta.json")
        return build_encoding(meta["tokenizer"])
    if name.endswith((".tiktoken", ".json")):
        is_json = name.endswith(".json")
        own_name = Path(name).parent.resolve().name if is_json else Path(name).stem
        if own_name == "byte":
            what = "its folder" if is_json else "it"
            raise UserError(f"tokenizer {name} would be named byte, as the tokenizer of bytes is: rename {what}")
        try:
            text = Path(name).read_text(encoding="utf-8")
            if is_json:
                return JsonTokenizer(own_name, text, eot_token)
            from tiktoken_ext.openai_public import r50k_pat_str

            return build_encoding({"name": own_name, "pattern": r50k_pat_str, "ranks": text})
        except (OSError, ValueError, OverflowError) as error:
            form = "a tokenizer.json" if is_json else "a .tiktoken file (base64 token, space, rank a line)"
            raise UserError(f"tokenizer {name} is not {form}: {getattr(error, 'strerror', None) or error}") from None
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        files = "bpe:N, PATH.tiktoken, PATH.json or a data set's folder"
        raise UserError(f"unknown tokenizer {name!r}; known: byte, {known}, {files}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the network raises: tiktoken passes on requests' and urllib3's errors
        reason = f"its vocabulary is not cached and cannot be downloaded ({type(error).__name__})"
        hint = "offline, use --tokenizer=byte, bpe:4096 or a PATH.tiktoken"
        raise UserError(f"tokenizer {name}: {reason}; {hint}") from None


def train_bpe(inputs, settings):
    """The tokenizer bpe:N: a byte-level BPE of N tokens with the end of text, trained on a sample of the inputs."""
    if any(source.path == "-" for source in inputs):
        raise UserError("tokenizer bpe:N reads its sample first: standard input can be read once only, give a file")
    print(f"training {settings.tokenizer} on a sample", file=sys.stderr)
    trainer = optional("rustbpe").Tokenizer()
    trainer.train_from_iterator(sample_texts(inputs, settings), int(settings.tokenizer.removeprefix("bpe:")) - 1)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    special = {END_OF_TEXT: len(ranks)}  # a small text may have fewer merges than asked for
    pattern = trainer.get_pattern()
    return tiktoken.Encoding(settings.tokenizer, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def sample_texts(inputs, settings):
    """Texts of documents that are not held out, some bpe_sample bytes in all. The inputs are read in a random order
    until that is enough; of each the beginning, an equal part of bpe_sample but at least a megabyte."""
    n_bytes, share = 0, max(1_000_000, settings.bpe_sample // len(inputs))
    for source in random.Random(settings.seed).sample(inputs, len(inputs)):
        enough = min(n_bytes + share, settings.bpe_sample)
        for job, _ in read_jobs([source], Place(), settings.fields):
            for parts, _ in read_documents(job, settings, []):
                if document_hash(parts) >= settings.val_fraction:
                    yield b"\n".join(parts).decode(errors="replace")
                    n_bytes += sum(map(len, parts))
            if n_bytes >= enough:
                break
        if n_bytes >= settings.bpe_sample:
            return


def tokenizer_state(encoding):
    """All that build_encoding needs, as plain strings and numbers: it goes into checkpoints."""
    if encoding.name == "byte":
        return {"name": "byte"}
    if isinstance(encoding, JsonTokenizer):
        return {"name": encoding.name, "eot_token": encoding.end, "json": encoding.json}
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)
    special = encoding._special_tokens
    return {"name": encoding.name, "pattern": encoding._pat_str, "special_tokens": special, "ranks": lines}


def build_encoding(state):
    """The tokenizer of a tokenizer_state. A .tiktoken file has no special tokens: end-of-text follows its last rank.
    ValueError for ranks that make no tokenizer."""
    if state["name"] == "byte":
        return byte_encoding()
    if "json" in state:
        return JsonTokenizer(state["name"], state["json"], state["eot_token"])
    ranks = {}
    for line in state["ranks"].splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    if not all(bytes([i]) in ranks for i in range(256)) or len(set(ranks.values())) < len(ranks):
        raise ValueError("it needs all 256 single bytes and a rank of its own for each token")
    special = state.get("special_tokens") or {END_OF_TEXT: max(ranks.values()) + 1}
    return tiktoken.Encoding(state["name"], pat_str=state["pattern"], mergeable_ranks=ranks, special_tokens=special)


def encode(encoding, text):
    """Token ids of `text` (str, or any bytes), an integer array; the text of special tokens is ordinary text.

    Bytes that are not UTF-8 become tokens of their own, so that decode_bytes gives back the same bytes; a
    tokenizer.json takes text only and sees U+FFFD in their place.
    """
    data = text.encode() if isinstance(text, str) else text
    if encoding.name == "byte":
        return np.frombuffer(data, dtype=np.uint8)  # what the Encoding gives, without its regular expression
    if isinstance(encoding, JsonTokenizer):
        text = data.decode(errors="replace")
        return np.array(encoding.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
    try:
        return encoding.encode_to_numpy(data.decode(), disallowed_special=())
    except UnicodeDecodeError:
        ids = []
        for i, part in enumerate(re.split("([\udc80-\udcff]+)", data.decode(errors="surrogateescape"))):
            if i % 2:
                ids += [encoding.encode_single_token(bytes([byte])) for byte in part.encode(errors="surrogateescape")]
            else:
                ids += encoding.encode_ordinary(part)
        return np.array(ids, dtype=np.uint32)


def decode_bytes(encoding, ids):
    """The bytes of token ids: those that were encoded, unless a tokenizer.json altered them. An id that the tokenizer
    does not know is byte 255, or nothing with a tokenizer.json."""
    if isinstance(encoding, JsonTokenizer):
        return encoding.tokenizer.decode(list(map(int, ids)), skip_special_tokens=False).encode()

    def token_bytes(i):
        try:
            return encoding.decode_single_token_bytes(int(i))
        except KeyError:
            return b"\xff"

    return b"".join(map(token_bytes, ids))


def decode(encoding, ids):
    """Text of token ids; unknown ids (of a padded vocabulary) and partial characters show as U+FFFD."""
    return decode_bytes(encoding, ids).decode(errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# The manifest, meta.json


def save_tokenizer(folder, state):
    """A tokenizer_state as meta.json holds it: long parts in files of their own, here their checksum."""
    state = dict(state)
    for part, name in TOKENIZER_FILES.items():
        if part in state:
            (folder / name).write_bytes(state[part].encode())
            state[part + "_crc32"] = zlib.crc32(state.pop(part).encode())
    return state


def load_tokenizer(folder, saved):
    """The tokenizer_state that save_tokenizer saved; ValueError or OSError if its file is damaged."""
    state = dict(saved)
    for part, name in TOKENIZER_FILES.items():
        if part + "_crc32" in saved:
            data = (Path(folder) / name).read_bytes()
            if state.pop(part + "_crc32") != zlib.crc32(data):
                raise ValueError(f"{name} does not have its checksum")
            state[part] = data.decode()
    return state


def read_meta(folder):
    """The data set's meta.json, or {} for a folder of bare shards; UserError if it cannot be read."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text())
        meta["tokenizer"] = load_tokenizer(folder, meta["tokenizer"])
        build_encoding(meta["tokenizer"])
        counts = [meta["vocab_size"], *(meta["splits"][s][n] for s in SPLITS for n in ("tokens", "bytes"))]
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError("its counts are not positive integers")
        # KeyError or TypeError if a shard's entry lacks one, or holds what cannot name a file
        {(shard["file"], shard["tokens"], shard["crc32"]) for s in SPLITS for shard in meta["splits"][s]["shards"]}
        return meta
    except (OSError, ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the data again") from None


def shard_faults(folder, split, meta, with_checksums):
    """What in a split contradicts the manifest `meta`, or cannot be opened, a line each."""
    counts, paths, n_tokens = meta["splits"][split], shard_paths(folder, split), 0
    listed = {shard["file"]: shard for shard in counts["shards"]}
    missing = sorted(listed.keys() - {path.name for path in paths})
    yield from (f"{folder}/{name} is missing" for name in missing)
    for path in paths:
        try:
            tokens = open_shard(path)
            mask = open_mask(path, tokens)
        except UserError as error:
            yield str(error)
            continue
        n_tokens += len(tokens)
        shard, mask_path = listed.get(path.name), path.with_suffix(".mask")
        if shard is None:
            yield f"{path} is not in {folder}/meta.json"
        elif shard["tokens"] != len(tokens):
            yield f"{path} holds {len(tokens)} tokens where meta.json counts {shard['tokens']}"
        elif ("mask_crc32" in shard) != mask_path.exists():
            yield f"{mask_path} {'is not in meta.json' if mask_path.exists() else 'is missing'}"
        elif with_checksums:
            for file, array, checksum in ((path, tokens, shard["crc32"]), (mask_path, mask, shard.get("mask_crc32"))):
                if checksum is not None and zlib.crc32(array) != checksum:
                    yield f"{file} does not have its checksum: its content was changed or damaged"
    if counts["tokens"] != n_tokens:
        yield f"{folder}/meta.json counts {counts['tokens']} {split} tokens, its shards hold {n_tokens}"


def verify(folder):
    """Compares every file of a data set with its manifest; UserError that names each one that differs."""
    meta = read_meta(folder)
    if not meta:
        what = "has no meta.json; --adopt --tokenizer=NAME writes one" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}")
    faults = [fault for split in SPLITS for fault in shard_faults(folder, split, meta, with_checksums=True)]
    if faults:
        raise UserError("; ".join(faults))
    print(f"{folder}: the shards are as meta.json says")


def adopt(settings):
    """Writes meta.json beside shards of another program, which makes them a data set; returns the folder.

    Bytes of text are counted token by token, which is approximate for a tokenizer.json.
    """
    folder = Path(settings.data_dir) / settings.dataset
    if (folder / "meta.json").exists():
        raise UserError(f"{folder} has a meta.json already")
    encoding, splits = get_tokenizer(settings.tokenizer, settings.eot_token), {}
    lengths = np.array([len(decode_bytes(encoding, [i])) for i in range(encoding.n_vocab)])
    lengths[encoding.eot_token] = 0
    for split in SPLITS:
        data = TokenData(folder, split, 1, encoding.n_vocab)
        shards, counts = [], np.zeros(encoding.n_vocab, np.int64)  # counts: of each token in the split
        for path, tokens, mask in zip(data.paths, data.shards, data.masks):
            for start in range(0, len(tokens), JOB):
                some = tokens[start : start + JOB]
                if some.max() >= encoding.n_vocab:
                    maker = f"tokenizer {encoding.name} of {encoding.n_vocab}"
                    raise UserError(f"{path} holds token {some.max()}: {maker} did not make it")
                counts += np.bincount(some, minlength=encoding.n_vocab)
            shards.append({"file": path.name, "tokens": len(tokens), "crc32": zlib.crc32(tokens)})
            if path.with_suffix(".mask").exists():
                shards[-1]["mask_crc32"] = zlib.crc32(mask)
        n_tokens, n_documents, n_bytes = map(int, (counts.sum(), counts[encoding.eot_token], counts @ lengths))
        splits[split] = {"documents": n_documents, "bytes": n_bytes, "shards": shards, "tokens": n_tokens}
    saved = save_tokenizer(folder, tokenizer_state(encoding))
    write_meta(folder, saved, encoding, splits, {"source": ["shards made elsewhere"]})
    return folder


def write_meta(folder, tokenizer, encoding, splits, more):
    """Writes the manifest, whole or not at all, and prints the counts; `splits` maps train and val to their counts and
    shards."""
    meta = {"tokenizer": tokenizer, "vocab_size": encoding.n_vocab, **more, "splits": splits}
    save_json(folder / "meta.json", meta)
    for split, counts in splits.items():
        print(f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens")


def save_json(path, value):
    """Writes a file whole or not at all."""
    save_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))


def main():
    settings = configure(Settings, "Text to token shards, ready for train.py --dataset=NAME.")
    folder = Path(settings.data_dir) / settings.dataset
    if settings.verify:
        verify(folder)
        return
    folder = adopt(settings) if settings.adopt else prepare(settings)
    more = data_dir_setting(settings.data_dir)
    print(f"wrote {folder}; train on it with: python train.py --dataset={settings.dataset}{more}")


if __name__ == "__main__":
    run(main)
