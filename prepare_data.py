"""Text -> token shards: `python prepare_data.py` writes data/stdlib, `--input=PATH --dataset=NAME` any other text.

This file owns the shard format (writer and memory-mapped reader) and the tokenizers. A data set is a folder:

    data/NAME/train_000000.bin ...   256 int32 of header (magic, version, number of tokens), then the tokens
    data/NAME/train_000000.mask ...  only with --prompt_field: a byte a token, 0 where it is a prompt's, without loss
    data/NAME/val_000000.bin ...     the same for the held-out documents
    data/NAME/meta.json              tokenizer, vocabulary size, source, counts, checksums
    data/NAME/tokenizer.tiktoken     the tokenizer's ranks, or tokenizer.json; neither for the byte-level one

The header is that of llm.c and modded-nanogpt (uint16 tokens), so their shards train here and ours there; a
vocabulary over 65,536 takes uint32 tokens and another magic number.

The way of a text: inputs are read in jobs of about 1 MB (`read_jobs`), worker processes make tokens of them
(`tokenize`), this process takes them in their order, shuffles and writes (`write_shards`). Nothing grows with the
corpus, and the shards are the same for any number of workers. Everything is written to data/.NAME.partial, which
becomes data/NAME when it is whole; an interrupted run goes on from there.
"""

import base64
import bz2
import glob
import gzip
import hashlib
import http.client
import io
import itertools
import json
import lzma
import os
import pickle
import queue
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from configurator import UserError, configure, run, save_whole

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs from the same data set
    fcntl = None


@dataclass
class Settings:
    # what
    dataset: str | None = None  # name of the data set or of a hub corpus; none: the first input's, or stdlib
    input: list[str] = field(default_factory=list)  # files, folders, globs, https:, hub:OWNER/NAME[:CONFIG[:SPLIT]], -
    stdin_format: str = "text"  # of standard input, --input=-: text or jsonl
    text_field: str = "text"  # jsonl, parquet and hub: the field that holds the text
    prompt_field: str = ""  # the field of a prompt before the text; the prompt's tokens carry no loss
    tokenizer: str = "byte"  # byte, tiktoken's gpt2 ..., bpe:N (trained here), PATH.tiktoken, PATH.json, or a data set
    eot_token: str = ""  # tokenizer.json: its token between documents; none: the usual ones are tried
    bpe_sample: int = 64_000_000  # bytes of text on which bpe:N is trained
    max_tokens: int = 0  # stop at the first batch of documents that reaches so many; 0: all
    # how
    data_dir: str = "data"  # the data set is written to data_dir/dataset
    val_fraction: float = 0.01  # share of the documents that is held out, by a hash of their text
    shard_size: int = 100_000_000  # tokens per shard
    shuffle_buffer: int = 1000  # documents that are shuffled among each other, at most 16 MB of text; 1: none
    max_broken: float = 0.01  # share of the documents that may be broken or undecodable before it is an error
    seed: int = 1337  # of the shuffle
    num_workers: int = 0  # processes that make the tokens; 0: one per core, and none besides this one for bytes
    save_interval: float = 10.0  # seconds of work that an interruption may cost
    overwrite: bool = False  # replace a data set of that name
    # instead
    verify: bool = False  # check the data set's files against its manifest
    adopt: bool = False  # write the manifest of shards made elsewhere in data_dir/dataset, which --tokenizer made

    def __post_init__(self):
        if self.dataset is None:
            first = self.input[0] if self.input else "stdlib"
            self.dataset = Path(first).stem or Path(first).resolve().name
        if not re.fullmatch(r"\w[\w.-]*", self.dataset):
            raise ValueError(f"dataset {self.dataset!r} is not a plain name; give one with --dataset=NAME")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; it must lie between 0 and 1")
        for name in ("shard_size", "shuffle_buffer", "bpe_sample"):
            if not 1 <= getattr(self, name) < 2**31:  # the header counts a shard's tokens in an int32
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1 and under 2^31")
        for name in ("max_broken", "num_workers", "max_tokens", "save_interval"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and under 2^32")
        if self.stdin_format not in ("text", "jsonl"):
            raise ValueError(f"stdin_format is {self.stdin_format!r}; known: text, jsonl")
        if self.tokenizer.startswith("bpe:") and not re.fullmatch(r"bpe:\d{1,7}", self.tokenizer):
            raise ValueError(f"tokenizer is {self.tokenizer!r}; bpe:N takes the size of a vocabulary, as in bpe:4096")
        if self.tokenizer.startswith("bpe:") and int(self.tokenizer[4:]) < 257:
            raise ValueError(f"tokenizer is {self.tokenizer!r}; the bytes and the end of text make bpe:257")


def optional(module, package=None):
    """The optional library `module`; UserError that names its `pip install` where it is missing."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        package = package or module
        raise UserError(f"this needs the optional library {package}: pip install {package}") from None


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
    """A tokenizer.json of the `tokenizers` library, with what this file uses of tiktoken.Encoding.

    Some of them change a text (T5 normalizes it); `prepare` counts the documents that do not come back as they were.
    """

    def __init__(self, name, text, eot_token=""):
        """From the file's text; ValueError if it is none or has no end-of-text token."""
        self.name, self.json = name, text
        try:
            self.tokenizer = optional("tokenizers").Tokenizer.from_str(text)
        except UserError:
            raise
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

    def encode(self, text):
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids):
        """Text; a run of ids that the tokenizer does not know shows as U+FFFD."""
        runs = itertools.groupby(map(int, ids), key=lambda i: self.tokenizer.id_to_token(i) is not None)
        text = lambda run: self.tokenizer.decode(list(run), skip_special_tokens=False)
        return "".join(text(run) if known else "\ufffd" for known, run in runs)


def get_tokenizer(name, eot_token=""):
    """The tokenizer `name`: byte, one that tiktoken knows, PATH.tiktoken, PATH.json or a data set; or UserError.

    A .tiktoken file (base64 token and rank a line) holds no pattern: text is cut into words as GPT-2 does.
    """
    if name == "byte":
        return byte_encoding()
    if os.path.isdir(name):
        meta = read_meta(name)
        if not meta:
            raise UserError(f"tokenizer {name}: the folder is no data set, it has no meta.json")
        return build_encoding(meta["tokenizer"])
    if name.endswith((".tiktoken", ".json")):
        try:
            text = Path(name).read_text(encoding="utf-8")
            if name.endswith(".json"):
                return JsonTokenizer(Path(name).parent.resolve().name, text, eot_token)
            from tiktoken_ext.openai_public import r50k_pat_str

            return build_encoding({"name": Path(name).stem, "pattern": r50k_pat_str, "ranks": text})
        except OSError as error:
            raise UserError(f"tokenizer {name}: {error.strerror}") from None
        except (ValueError, OverflowError) as error:
            lines = "a .tiktoken file (base64 token, space, rank a line)"
            kind = "a tokenizer.json" if name.endswith(".json") else lines
            raise UserError(f"tokenizer {name} is not {kind}: {error}") from None
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"unknown tokenizer {name!r}; known: byte, {known}, bpe:N, PATH.tiktoken or PATH.json")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the network raises: tiktoken passes on requests' and urllib3's errors
        raise UserError(
            f"tokenizer {name}: its vocabulary is not cached and cannot be downloaded ({type(error).__name__}); "
            "offline, use --tokenizer=byte, bpe:4096 or a PATH.tiktoken"
        ) from None


def train_bpe(n_vocab, inputs, settings):
    """Byte-level BPE of n_vocab tokens with the end of text, trained on a sample of the inputs: a tiktoken.Encoding.

    The sample takes the beginning of each input, in a random order and in equal parts but for small ones, and leaves
    out the documents that are held out.
    """
    rustbpe = optional("rustbpe")
    share = max(1_000_000, settings.bpe_sample // len(inputs))

    def sample():
        total, fields = 0, fields_of(settings)
        for i in random.Random(settings.seed).sample(range(len(inputs)), len(inputs)):
            taken = 0
            for job, _, _ in read_jobs(inputs[i : i + 1], (0, 0, 1), fields):
                for values, _ in read_documents(job, fields, lambda kind, place: None):
                    if not is_held_out(np.uint64(document_hash(values)), settings.val_fraction):
                        yield b"\n".join(values).decode(errors="replace")
                        taken += sum(map(len, values))
                if taken >= share or total + taken >= settings.bpe_sample:
                    break
            total += taken
            if total >= settings.bpe_sample:
                return

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(sample(), n_vocab - 1)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    special = {END_OF_TEXT: len(ranks)}  # a small text may have fewer merges than asked for
    pattern = trainer.get_pattern()
    return tiktoken.Encoding(f"bpe:{n_vocab}", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def tokenizer_state(encoding):
    """All that build_encoding needs, as plain strings and numbers: it goes into checkpoints."""
    if encoding.name == "byte":
        return {"name": "byte"}
    if isinstance(encoding, JsonTokenizer):
        return {"name": encoding.name, "eot_token": encoding.end, "json": encoding.json}
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)
    return {
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "ranks": lines,
    }


def build_encoding(state):
    """The tokenizer of a tokenizer_state; without special tokens, end-of-text follows the last rank. ValueError."""
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
        return encoding.encode(data.decode(errors="replace"))
    try:
        return encoding.encode_to_numpy(data.decode(), disallowed_special=())
    except UnicodeDecodeError:
        ids = []
        for i, part in enumerate(re.split("([\udc80-\udcff]+)", data.decode(errors="surrogateescape"))):
            if i % 2:
                ids += [encoding.encode_single_token(bytes([ord(c) - 0xDC00])) for c in part]
            else:
                ids += encoding.encode_ordinary(part)
        return np.array(ids, dtype=np.uint32)


def decode_bytes(encoding, ids):
    """The bytes of token ids: exactly those that were encoded. Ids that the tokenizer does not know are byte 255."""
    if isinstance(encoding, JsonTokenizer):
        return encoding.decode(ids).encode()

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
# Inputs

SUFFIXES = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
CORPORA = {  # --dataset=NAME without input
    "fineweb_edu": "hub:HuggingFaceFW/fineweb-edu:sample-10BT",
    "fineweb": "hub:HuggingFaceFW/fineweb:sample-10BT",
    "c4": "hub:allenai/c4:en",
    "dclm": "hub:mlfoundations/dclm-baseline-1.0",
    "wikitext": "hub:Salesforce/wikitext:wikitext-103-raw-v1",
    "tinystories": "hub:roneneldan/TinyStories",
    "tinyshakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
}
JOB = 1 << 20  # bytes of text that a worker gets at once
ROWS = 256  # of a parquet file or a hub corpus that are read at once
MAX_LINE = 1 << 28  # bytes of a line of jsonl


@dataclass
class Input:
    path: str  # of a file, a URL, hub:..., or - for standard input
    kind: str  # text, jsonl, parquet, hub
    size: int = 0  # bytes as stored; 0 where it is unknown
    stamp: int = 0  # time of the last change, by which a continued run knows the same file


def kind_of(path):
    """text, jsonl or parquet by the suffix, before which one of a compression may stand; None for any other."""
    name = str(path)
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    kind = SUFFIXES.get(Path(name).suffix)
    return None if kind == "parquet" and name != str(path) else kind


def find_files(inputs, stdin_format="text"):
    """The Inputs behind `inputs` (files, folders, globs ...), each once, sorted per input; or UserError."""
    found = {}  # by where a path leads, so that two names of a file are one
    known = f"{', '.join(SUFFIXES)}, compressed as {', '.join(COMPRESSIONS)}"

    def add(path, kind):
        stat = os.stat(path)
        found.setdefault(Path(path).resolve(), Input(str(path), kind, stat.st_size, stat.st_mtime_ns))

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
            paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
            if not paths:
                raise UserError(f"input {given}: no such file, folder or glob")
            for path in map(Path, paths):
                if path.is_dir():
                    for p in sorted(path.rglob("*")):
                        if kind_of(p) and p.is_file():
                            add(p, kind_of(p))
                elif kind_of(path):
                    add(path, kind_of(path))
                elif path == Path(given):
                    raise UserError(f"input {given}: unknown kind {path.suffix!r}; known: {known}")
        if len(found) == count:
            raise UserError(f"input {given}: no files of kind {known} that are not among the inputs already")
    return list(found.values())


def stdlib_files():
    """Source files of the running interpreter's standard library, without its tests: some 11 MB of text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    leave = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [p for p in sorted(root.rglob("*.py")) if not leave & set(p.relative_to(root).parts)]
    if not files:
        raise UserError(f"the standard library's source is not at {root}; give text with --input=PATH")
    return [Input(str(p), "text", p.stat().st_size, p.stat().st_mtime_ns) for p in files]


class Counted(io.RawIOBase):
    """A binary stream that knows how many of its bytes were read and, where it has a length, that it came whole."""

    def __init__(self, raw, length=None):
        self.raw, self.length, self.count = raw, length, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        n = self.raw.readinto(buffer)
        self.count += n
        if not n and len(buffer) and self.length is not None and self.count < self.length:
            raise EOFError(f"the connection ended after {self.count:,} of {self.length:,} bytes")
        return n


class Zstandard(io.RawIOBase):
    """The content of a .zst stream of any number of frames; EOFError where the last one is cut off."""

    def __init__(self, stored):
        self.stored, self.decompressor = stored, optional("zstandard").ZstdDecompressor()
        self.frame, self.rest, self.content = None, b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.content:
            data = self.rest or self.stored.read(1 << 16)
            if not data:
                if self.frame:
                    raise EOFError("the compressed file ends in the middle")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.content, self.rest = memoryview(self.frame.decompress(data)), b""
            if self.frame.eof:
                self.rest, self.frame = self.frame.unused_data, None
        n = min(len(buffer), len(self.content))
        buffer[:n], self.content = self.content[:n], self.content[n:]
        return n


@contextmanager
def open_stream(path, skip):
    """(a stream of a file's decompressed bytes from byte `skip` on, the Counted stream of the stored ones)."""
    if path == "-":
        raw, length = sys.stdin.buffer, None
    elif path.startswith(("https://", "http://")):
        raw = urllib.request.urlopen(path, timeout=60)
        length = int(raw.headers["Content-Length"]) if raw.headers["Content-Length"] else None
    else:
        raw, length = open(path, "rb"), None
    suffix = Path(path.split("?")[0]).suffix
    with raw:
        counted = Counted(raw, length)
        stored = io.BufferedReader(counted, 1 << 18)
        openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": Zstandard}
        stream = io.BufferedReader(openers[suffix](stored), 1 << 18) if suffix in openers else stored
        if stream is stored and length is None and path != "-":
            counted.count = raw.seek(skip)
        else:
            while skip:
                skip -= len(stream.read(min(skip, JOB))) or skip
        yield stream, counted


def read_lines(source, offset):
    """(whole lines of about JOB bytes, their end's place in the decompressed file, stored bytes read) from `offset` on.

    A line of text that is longer is cut between characters. Each piece depends on where it starts alone, so that a
    continued run reads the same ones.
    """
    rest, start = b"", offset
    with open_stream(source.path, offset) as (stream, counted):
        while True:
            data = rest + stream.read(max(0, JOB - len(rest)))
            while source.kind == "jsonl" and b"\n" not in data and (more := stream.read(JOB)):
                data += more
                if len(data) > MAX_LINE:
                    raise UserError(f"{source.path} has a line of more than {MAX_LINE:,} bytes at byte {start:,}")
            if len(data) < JOB:  # the end of the file
                if data or not start:
                    yield data, start + len(data), counted.count
                return
            end = data.rfind(b"\n") + 1 or whole_characters(data)
            yield data[:end], start + end, counted.count
            start, rest = start + end, data[end:]


def read_parquet(source, offset, fields):
    """(tuples of the fields' values, number of the row after them, stored bytes read), from row `offset` on."""
    parquet = optional("pyarrow.parquet", "pyarrow")
    import pyarrow

    try:
        with parquet.ParquetFile(source.path) as file:
            missing = [name for name in fields if name not in file.schema_arrow.names]
            if missing:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{source.path} has no column {missing[0]!r}; it has {names}; --text_field= names one")
            row = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if row + count <= offset:
                    row += count
                    continue
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=fields, use_threads=False):
                    row += batch.num_rows
                    if row > offset:
                        done = source.size * row // file.metadata.num_rows
                        yield list(zip(*(batch.column(name).to_pylist() for name in fields))), row, done
    except pyarrow.ArrowException as error:
        raise UserError(f"{source.path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


def read_hub(source, offset, fields):
    """As read_parquet, from hub:OWNER/NAME[:CONFIG[:SPLIT]], streamed; OWNER/NAME may be a local folder."""
    datasets = optional("datasets")
    name, config, split = (source.path.removeprefix("hub:").split(":") + ["", ""])[:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        rows = iter(rows.skip(offset) if offset else rows)
        while batch := list(itertools.islice(rows, ROWS)):
            missing = [f for f in fields if f not in batch[0]]
            if missing:
                names = ", ".join(batch[0])
                raise UserError(f"{source.path} has no field {missing[0]!r}; it has {names}; --text_field= names one")
            offset += len(batch)
            yield [tuple(row[f] for f in fields) for row in batch], offset, 0
    except UserError:
        raise
    except Exception as error:  # whatever the network and the libraries beneath raise
        raise UserError(
            f"{source.path} cannot be read ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}); "
            "once it can, the same command goes on from where it was"
        ) from None


def count_lines(data):
    """Line ends in bytes; NumPy counts several times faster than bytes.count."""
    return int(np.count_nonzero(np.frombuffer(data, dtype=np.uint8) == 10))


def read_jobs(inputs, position, fields):
    """(job, position after it, stored bytes read so far): a job is a list of (kind, path, number, data) of some 1 MB.

    `data` is bytes of whole lines (text, jsonl) or a list of tuples (parquet, hub), `number` that of its first line or
    row. A position is (index of the input, byte or row in it, number of that line or row).
    """
    first, offset, number = position
    done = sum(source.size for source in inputs[:first])
    job, size, consumed = [], 0, done
    for index, source in enumerate(inputs[first:], first):
        if source.kind == "parquet":
            pieces = read_parquet(source, offset, fields)
        elif source.kind == "hub":
            pieces = read_hub(source, offset, fields)
        else:
            pieces = read_lines(source, offset)
        try:
            for data, offset, consumed in pieces:
                job.append((source.kind, source.path, number, data))
                if isinstance(data, bytes):
                    number, size = number + count_lines(data), size + len(data)
                else:
                    number = offset + 1
                    size += sum(len(value) for row in data for value in row if isinstance(value, str))
                if size >= JOB // 2:
                    yield job, (index, offset, number), done + consumed
                    job, size = [], 0
        except (EOFError, zlib.error, lzma.LZMAError, http.client.HTTPException, ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"input {source.path} cannot be read: {reason}") from None
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            raise UserError(f"input {source.path} cannot be read: {error}") from None
        done, offset, number = done + source.size, 0, 1
    if job:
        yield job, (len(inputs), 0, 1), done


# ---------------------------------------------------------------------------------------------------------------------
# Documents

NEWLINE = b"\n"
MAX_DOCUMENT = 1 << 16  # bytes: longer texts are cut, so that a single file still has a held-out part


def fields_of(settings):
    """Names of a document's parts in jsonl, parquet and hub rows."""
    return [settings.prompt_field, settings.text_field] if settings.prompt_field else [settings.text_field]


def whole_characters(data):
    """Length of the bytes without a UTF-8 character that their end cuts in two."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            return len(data) - back if back < 2 + (byte >= 0xE0) + (byte >= 0xF0) else len(data)
        if byte < 0x80:
            break
    return len(data)


def cut(data):
    """Pieces of at most MAX_DOCUMENT bytes, cut after a line's end where there is one, else between characters."""
    pieces, start = [], 0
    while len(data) - start > MAX_DOCUMENT:
        end = data.rfind(b"\n", start, start + MAX_DOCUMENT) + 1
        end = end or start + whole_characters(data[start : start + MAX_DOCUMENT])
        pieces.append(data[start:end])
        start = end
    return pieces + [data[start:]]


def document_hash(values):
    """64 bits of a hash of a document's text, which decide whether it is held out."""
    return int.from_bytes(hashlib.blake2b(b"\0".join(values), digest_size=8).digest(), "big")


def is_held_out(hashes, val_fraction):
    """Whether documents of these hashes (uint64) are held out: the same choice whatever else the corpus holds."""
    return hashes < np.uint64(min(int(val_fraction * 2**64), 2**64 - 1))


def read_documents(job, fields, report):
    """(values, place) of a job's documents: bytes of the text, or of prompt and text; place is path:line or path:row.

    What is wrong goes to report(kind, place). Bytes that are not UTF-8 stay as they are.
    """
    for kind, path, number, data in job:
        if kind == "text":
            start = 0
            for text in cut(data):
                bad = undecodable(text)
                if bad is not None:
                    report("undecodable", f"{path}:{number + data.count(NEWLINE, 0, start + bad)}")
                if text and not text.isspace():
                    yield (text,), path
                else:
                    report("empty", f"{path}:{number + data.count(NEWLINE, 0, start)}")
                start += len(text)
            continue
        if kind == "jsonl":
            data = data.split(b"\n")
            if not data[-1]:
                data.pop()
        for i, row in enumerate(data, number):
            place = f"{path}:{i}"
            values = read_row(row, fields) if kind == "jsonl" else row
            if values is None or not all(isinstance(value, str) for value in values):
                what = "no JSON object with a text" if kind == "jsonl" else "no text"
                report(f"{what} {' and '.join(map(repr, fields))}", place)
            elif not values[-1].strip():
                report("empty", place)
            else:
                values = [to_bytes(value) for value in values]
                if not all(exact for _, exact in values):
                    report("undecodable", place)
                values = [value for value, _ in values]
                for part in cut(values[0]) if len(values) == 1 else [None]:
                    yield tuple(values) if part is None else (part,), place


def undecodable(data):
    """Where the bytes stop being UTF-8, or None."""
    if data.isascii():
        return None
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start


def read_row(line, fields):
    """The fields of a line of jsonl; [""] for a blank one, None if it is not an object that has them."""
    if not line.strip():
        return [""]
    try:
        row = json.loads(line.decode(errors="surrogateescape"))
        return [row[name] for name in fields]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def to_bytes(text):
    """(UTF-8 of the text, whether it says all): escaped bytes are back, other lone surrogates are U+FFFD."""
    try:
        return text.encode(), True
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text).encode(errors="surrogateescape"), False


ALTERED = "altered by the tokenizer"
HARMLESS = ("empty", ALTERED)  # reported, but not counted as broken


@dataclass
class Tokens:
    """The documents of a job."""

    tokens: np.ndarray  # of all, each after an end-of-text token
    mask: np.ndarray | None  # uint8 beside them: 0 for a prompt's
    lengths: np.ndarray  # int64 (documents,): tokens
    n_bytes: np.ndarray  # int64 (documents,): of their text
    hashes: np.ndarray  # uint64 (documents,)
    problems: dict  # kind: [count, the first places]


def add_problem(problems, kind, count, places):
    found = problems.setdefault(kind, [0, []])
    found[0] += count
    found[1] = (found[1] + places)[:3]


class Document(NamedTuple):
    tokens: np.ndarray
    mask: np.ndarray | None
    n_bytes: int
    hash: int


def split_documents(tokens):
    """The Documents of Tokens: views of its arrays."""
    starts = (np.cumsum(tokens.lengths) - tokens.lengths).tolist()
    for start, length, *rest in zip(starts, tokens.lengths.tolist(), tokens.n_bytes.tolist(), tokens.hashes.tolist()):
        mask = None if tokens.mask is None else tokens.mask[start : start + length]
        yield Document(tokens.tokens[start : start + length], mask, *rest)


def tokenize(encoding, fields, job):
    """The Tokens of a job; a pure function, so that any process may do it."""
    parts, prompts, lengths, n_bytes, hashes, problems = [], [], [], [], [], {}
    dtype = token_dtype(encoding.n_vocab)
    eot = np.array([encoding.eot_token], dtype=dtype)
    for values, place in read_documents(job, fields, lambda kind, place: add_problem(problems, kind, 1, [place])):
        ids = [encode(encoding, value) for value in values]
        if isinstance(encoding, JsonTokenizer) and any(decode_bytes(encoding, i) != v for i, v in zip(ids, values)):
            add_problem(problems, ALTERED, 1, [place])
        parts += [eot, *ids]
        prompts.append(len(ids[0]) if len(ids) > 1 else 0)
        lengths.append(1 + sum(map(len, ids)))
        n_bytes.append(sum(map(len, values)))
        hashes.append(document_hash(values))
    tokens = np.concatenate(parts, dtype=dtype, casting="unsafe") if parts else np.empty(0, dtype)
    lengths, mask = np.array(lengths, dtype=np.int64), None
    if len(fields) > 1:
        mask = np.ones(len(tokens), dtype=np.uint8)
        for start, n in zip(np.cumsum(lengths) - lengths + 1, prompts):
            mask[start : start + n] = 0
    return Tokens(tokens, mask, lengths, np.array(n_bytes, dtype=np.int64), np.array(hashes, dtype=np.uint64), problems)


# ---------------------------------------------------------------------------------------------------------------------
# Workers


def work():
    """A worker process: jobs from standard input, Tokens to standard output, until the first one ends."""
    read, write = sys.stdin.buffer, sys.stdout.buffer
    state, fields = pickle.load(read)
    encoding = build_encoding(state)
    try:
        while True:
            tokens = tokenize(encoding, fields, pickle.load(read))
            pickle.dump(vars(tokens), write, protocol=5)  # its class would bear another module's name here
            write.flush()
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):  # the parent is done, or is no more
        os._exit(0)  # without another write to its pipe


def tokenize_all(jobs, encoding, fields, num_workers):
    """(Tokens, ...) for each (job, ...) in their order, from num_workers processes; one is this process itself.

    A thread per process waits for it, and no more than two jobs per process are under way.
    """
    if num_workers == 1:
        for job, *rest in jobs:
            yield tokenize(encoding, fields, job), *rest
        return
    command = [sys.executable, os.path.abspath(__file__), "worker"]
    # a session of their own: Ctrl-C is for this process, at whose end theirs comes
    start = lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    processes = [start() for _ in range(num_workers)]
    idle = queue.SimpleQueue()

    def call(job):
        process = idle.get()
        pickle.dump(job, process.stdin, protocol=5)
        process.stdin.flush()
        tokens = Tokens(**pickle.load(process.stdout))
        idle.put(process)
        return tokens

    threads, pending = ThreadPoolExecutor(num_workers), deque()
    try:
        for process in processes:
            pickle.dump((tokenizer_state(encoding), fields), process.stdin)
            idle.put(process)
        for job, *rest in jobs:
            pending.append((threads.submit(call, job), rest))
            if len(pending) > 2 * num_workers:
                future, rest = pending.popleft()
                yield future.result(), *rest
        for future, rest in pending:
            yield future.result(), *rest
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        reason = "a worker process ended unexpectedly (out of memory?)"
        raise UserError(f"{reason}; the same command goes on from where it was") from None
    finally:
        for process in processes:
            process.kill()
        for _ in processes:  # for threads that wait for a worker that failed
            idle.put(processes[0])
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.wait()
            process.stdout.close()
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass


# ---------------------------------------------------------------------------------------------------------------------
# Shards

HEADER = 256  # int32 values
KINDS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}  # magic: (version, dtype of the tokens)
CHECKED = 1 << 26  # bytes of a split up to which the reader compares its checksums: a fraction of a second


def magic_of(vocab_size):
    return 20240520 if vocab_size <= 1 << 16 else 20240801


def token_dtype(vocab_size):
    return KINDS[magic_of(vocab_size)][1]


class ShardWriter:
    """Writes tokens to folder/split_000000.bin and on, shard_size tokens each; `close` completes the last.

    `shards` is what the manifest says of them: file, tokens, crc32 of the tokens' bytes, and mask_crc32 where a mask
    goes beside them. `state` after a `sync` is what `ShardWriter(..., state=)` needs to go on from there.
    """

    def __init__(self, folder, split, vocab_size, shard_size, state=None):
        self.folder, self.split, self.shard_size = Path(folder), split, shard_size
        self.magic = magic_of(vocab_size)
        self.version, self.dtype = KINDS[self.magic]
        self.file, self.mask_file, self.shards = None, None, []
        if state:
            self.shards = state["shards"]
            if state["is_open"]:
                self.file = self.reopen(".bin", 4 * HEADER + self.shards[-1]["tokens"] * np.dtype(self.dtype).itemsize)
                if "mask_crc32" in self.shards[-1]:
                    self.mask_file = self.reopen(".mask", self.shards[-1]["tokens"])

    def reopen(self, suffix, size):
        """The last shard's file without what came after `size` bytes; ValueError if it does not even have them."""
        file = open((self.folder / self.shards[-1]["file"]).with_suffix(suffix), "r+b")
        if file.seek(0, os.SEEK_END) < size:
            raise ValueError(f"{file.name} lost a part")
        file.truncate(size), file.seek(size)
        return file

    def write(self, tokens, mask=None):
        """Appends an integer array, and its mask (uint8) in a data set that has any."""
        while len(tokens):
            if self.file is None:
                name = f"{self.split}_{len(self.shards):06d}.bin"
                self.shards.append({"file": name, "tokens": 0, "crc32": 0})
                if mask is not None:
                    self.shards[-1]["mask_crc32"] = 0
                self.file = open(self.folder / name, "wb")
                self.file.write(bytes(4 * HEADER))
                self.mask_file = None if mask is None else open((self.folder / name).with_suffix(".mask"), "wb")
            shard = self.shards[-1]
            n = self.shard_size - shard["tokens"]
            part, tokens = np.ascontiguousarray(tokens[:n], dtype=self.dtype), tokens[n:]
            self.file.write(part)
            shard["crc32"] = zlib.crc32(part, shard["crc32"])
            if mask is not None:
                self.mask_file.write(mask[:n])
                shard["mask_crc32"], mask = zlib.crc32(mask[:n], shard["mask_crc32"]), mask[n:]
            shard["tokens"] += len(part)
            if shard["tokens"] == self.shard_size:
                self.close()

    def sync(self):
        """Brings everything to the disk."""
        for file in filter(None, (self.file, self.mask_file)):
            file.flush()
            os.fsync(file.fileno())

    def state(self):
        return {"shards": self.shards, "is_open": self.file is not None}

    def close(self):
        """Writes the header, which makes the shard whole."""
        if self.file:
            header = np.zeros(HEADER, dtype="<i4")
            header[:3] = self.magic, self.version, self.shards[-1]["tokens"]
            self.file.seek(0)
            self.file.write(header)
            self.sync()
            self.abandon()

    def abandon(self):
        """Closes the files as they are."""
        for file in filter(None, (self.file, self.mask_file)):
            file.close()
        self.file = self.mask_file = None


def open_shard(path):
    """Tokens of a shard, a read-only memory map; UserError if it is not one, or is truncated.

    nanoGPT's train.bin and val.bin are uint16 tokens without a header.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(4 * HEADER).ljust(4 * HEADER, b"\0"), dtype="<i4")
        offset, known = 4 * HEADER, header[0] in KINDS and header[1] == KINDS[header[0]][0]
        if known:
            count, dtype = int(header[2]), np.dtype(KINDS[header[0]][1])
        elif Path(path).stem in ("train", "val"):
            offset, count, dtype = 0, size // 2, np.dtype(np.uint16)
        else:
            raise UserError(f"{path} is not a token shard: its header has no known magic number and version")
        expected = offset + count * dtype.itemsize
        if size != expected:
            raise UserError(f"shard {path} has {size} bytes where its header says {expected}: truncated or damaged")
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)) if count else np.empty(0, dtype)
    except OSError as error:
        raise UserError(f"shard {path}: {error.strerror}") from None


def open_mask(path, tokens):
    """The mask beside a shard, a read-only memory map of uint8, or None without one; UserError if it is truncated."""
    path = Path(path).with_suffix(".mask")
    if not path.exists():
        return None
    if path.stat().st_size != len(tokens):
        size = path.stat().st_size
        raise UserError(f"{path} has {size} bytes for a shard of {len(tokens)} tokens: truncated or damaged")
    return np.memmap(path, dtype=np.uint8, mode="r")


def shard_paths(folder, split):
    """The shards of a split in order: train_000000.bin, fineweb_train_000001.bin as llm.c names them, or train.bin."""
    return sorted(p for p in Path(folder).glob("*.bin") if re.search(rf"^{split}$|(^|_){split}_[^_]*$", p.stem))


def find_data(dataset, data_dir, split):
    """The folder of a data set that has shards of `split` ("train", "val"): data_dir/dataset, or the path `dataset`.
    UserError if there is none."""
    for folder in (Path(data_dir) / dataset, Path(dataset)):
        if shard_paths(folder, split):
            return folder
        if folder.is_dir() and split == "train":
            raise UserError(f"{folder} holds no train shards (train_*.bin)")
    source = "" if dataset in CORPORA else "--input=PATH "
    raise UserError(
        f"no data set {dataset!r} with {split} shards in {data_dir}/; "
        f"make it with: python prepare_data.py {source}--dataset={dataset}"
    )


def checksum(array):
    """crc32 of an array's bytes, read in pieces."""
    crc = 0
    for start in range(0, len(array), JOB):
        crc = zlib.crc32(np.ascontiguousarray(array[start : start + JOB]), crc)
    return crc


class TokenData:
    """Windows of block_size + 1 tokens of one split of a data set folder.

    Row i of training is a pure function of (seed, i): epoch i // len(self), in which a permutation of its own visits
    each window once. Nothing is held but the memory maps, and any row can be had at once.
    """

    def __init__(self, folder, split, block_size, vocab_size, seed=0):
        """UserError for a folder without such shards, with others than its manifest lists, or without a whole window.

        Checksums are compared here up to CHECKED bytes of a split; `prepare_data.py --verify` does it for any size.
        """
        self.paths = shard_paths(folder, split)
        if not self.paths:
            raise UserError(f"no {split} shards ({split}_*.bin) in {folder}")
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.shards = [open_shard(path) for path in self.paths]
        self.masks = [open_mask(path, tokens) for path, tokens in zip(self.paths, self.shards)]
        counts = [max(0, (len(tokens) - 1) // block_size) for tokens in self.shards]
        self.ends = np.cumsum(counts)
        meta = read_meta(folder)
        if meta:
            is_small = sum(tokens.nbytes for tokens in self.shards) <= CHECKED
            faults = shard_faults(folder, split, meta, self.paths, self.shards, self.masks, is_small)
            if faults:
                raise UserError(f"{faults[0]}; the data cannot be trusted, prepare them again")
        if not self.ends[-1]:
            raise UserError(
                f"block_size {block_size} is longer than the {split} data in {folder}: "
                f"{max(map(len, self.shards))} tokens in its longest shard, {block_size + 1} needed"
            )

    def __len__(self):
        return int(self.ends[-1])

    def rows(self, first, n):
        """Rows first ... first + n - 1: inputs and targets, int64 (n, block_size); a target without loss is -100."""
        out = np.empty((n, self.block_size + 1), dtype=np.int64)
        masked = np.zeros((n, self.block_size), dtype=bool)
        for row, hidden, i in zip(out, masked, range(first, first + n)):
            epoch, place = divmod(i, len(self))
            window = permute(place, len(self), key=f"{self.seed} {epoch}".encode())
            shard = int(np.searchsorted(self.ends, window, side="right"))
            start = (window - (int(self.ends[shard - 1]) if shard else 0)) * self.block_size
            row[:] = self.shards[shard][start : start + self.block_size + 1]
            if self.masks[shard] is not None:
                hidden[:] = self.masks[shard][start + 1 : start + self.block_size + 1] == 0
            if row.max() >= self.vocab_size:
                raise UserError(
                    f"shard {self.paths[shard]} holds token {row.max()}: "
                    f"it does not fit the vocabulary of {self.vocab_size}"
                )
        return out[:, :-1], np.where(masked, -100, out[:, 1:])


def permute(i, n, key):
    """Where i goes in a pseudo-random permutation of range(n) that `key` (bytes) selects.

    A four-round Feistel network on the next even number of bits is a permutation of them whatever its round function;
    walking on until the value falls under n makes one of range(n).
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
        # data sets of the first version have no checksum
        if part + "_crc32" in saved or (part == "ranks" and state["name"] != "byte" and "json_crc32" not in saved):
            data = (Path(folder) / name).read_bytes()
            if state.pop(part + "_crc32", zlib.crc32(data)) != zlib.crc32(data):
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
        counts = [meta["vocab_size"], *(meta["splits"][s][n] for s in ("train", "val") for n in ("tokens", "bytes"))]
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError("its counts are not positive integers")
        [(shard["file"], shard["tokens"]) for split in meta["splits"].values() for shard in split["shards"]]
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the data again") from None


def shard_faults(folder, split, meta, paths, shards, masks, with_checksums):
    """What in a split contradicts the manifest `meta`, a line each."""
    listed = {shard["file"]: shard for shard in meta["splits"][split]["shards"]}
    faults = [f"{folder}/{name} is missing" for name in sorted(listed.keys() - {path.name for path in paths})]
    for path, tokens, mask in zip(paths, shards, masks):
        shard = listed.get(path.name)
        if shard is None:
            faults.append(f"{path} is not in {folder}/meta.json")
        elif shard["tokens"] != len(tokens):
            faults.append(f"{path} holds {len(tokens)} tokens where meta.json counts {shard['tokens']}")
        elif ("mask_crc32" in shard) != (mask is not None):
            faults.append(f"{path.with_suffix('.mask')} {'is missing' if mask is None else 'is not in meta.json'}")
        elif with_checksums:
            for array, key, name in ((tokens, "crc32", path), (mask, "mask_crc32", path.with_suffix(".mask"))):
                if key in shard and checksum(array) != shard[key]:
                    faults.append(f"{name} does not have its checksum: its content was changed or damaged")
    total = sum(len(tokens) for tokens in shards)
    if not faults and meta["splits"][split]["tokens"] != total:
        counted = meta["splits"][split]["tokens"]
        faults.append(f"{folder}/meta.json counts {counted} {split} tokens, its shards hold {total}")
    return faults


def verify(folder):
    """Compares every file of a data set with its manifest; UserError that names each one that differs."""
    meta = read_meta(folder)
    if not meta:
        what = "has no meta.json; --adopt --tokenizer=NAME writes one" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}")
    faults, n_tokens, n_shards, bare = [], 0, 0, 0
    for split in ("train", "val"):
        paths, shards, masks = [], [], []
        for path in shard_paths(folder, split):
            try:
                tokens = open_shard(path)
                masks.append(open_mask(path, tokens)), paths.append(path), shards.append(tokens)
            except UserError as error:
                faults.append(str(error))
        found = shard_faults(folder, split, meta, paths, shards, masks, True)
        faults += [fault for fault in found if not any(fault.split()[0] in known for known in faults)]
        n_tokens, n_shards = n_tokens + sum(map(len, shards)), n_shards + len(shards)
        bare += sum("crc32" not in shard for shard in meta["splits"][split]["shards"])
    if faults:
        raise UserError("; ".join(faults))
    print(f"{folder}: {n_shards} shards with {n_tokens:,} tokens are as meta.json says")
    if bare:
        print(f"warning: {bare} of them have no checksum (of an earlier version): sizes were compared", file=sys.stderr)


def adopt(settings):
    """Writes meta.json beside shards of another program, which makes them a data set; returns the folder.

    Bytes of text are counted token by token, which is approximate for a tokenizer.json.
    """
    folder = Path(settings.data_dir) / settings.dataset
    if (folder / "meta.json").exists():
        raise UserError(f"{folder} has a meta.json already")
    encoding, splits = get_tokenizer(settings.tokenizer, settings.eot_token), {}
    lengths = np.array([len(decode_bytes(encoding, [i])) for i in range(encoding.n_vocab)])
    for split in ("train", "val"):
        shards, n_documents, n_bytes = [], 0, 0
        for path in shard_paths(folder, split):
            tokens = open_shard(path)
            for start in range(0, len(tokens), JOB):
                counts = np.bincount(tokens[start : start + JOB], minlength=encoding.n_vocab)
                if len(counts) > encoding.n_vocab:
                    raise UserError(
                        f"{path} holds token {len(counts) - 1}: "
                        f"tokenizer {encoding.name} of {encoding.n_vocab} did not make it"
                    )
                n_documents += int(counts[encoding.eot_token])
                counts[encoding.eot_token] = 0
                n_bytes += int(counts @ lengths)
            shards.append({"file": path.name, "tokens": len(tokens), "crc32": checksum(tokens)})
        if not sum(shard["tokens"] for shard in shards):
            raise UserError(f"no {split} shards ({split}_*.bin or {split}.bin) in {folder}")
        splits[split] = {"documents": n_documents, "bytes": n_bytes, "shards": shards}
    saved = save_tokenizer(folder, tokenizer_state(encoding))
    write_meta(folder, saved, encoding, splits, {"source": ["shards made elsewhere"]})
    return folder


def write_meta(folder, tokenizer, encoding, splits, more):
    """The manifest, whole or not at all; `splits` maps train and val to documents, bytes, shards and others."""
    for counts in splits.values():
        counts["tokens"] = sum(shard["tokens"] for shard in counts["shards"])
    meta = {"tokenizer": tokenizer, "vocab_size": encoding.n_vocab, **more, "splits": splits}
    save_json(folder / "meta.json", meta)
    for split, counts in splits.items():
        print(f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens")


def save_json(path, value):
    """Writes a file whole or not at all."""
    save_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))


# ---------------------------------------------------------------------------------------------------------------------
# The program

SPLITS = ("train", "val")
BATCH_BYTES = 1 << 24  # of text that is shuffled at once
SMALL = 1 << 22  # bytes of input under which worker processes are not worth their start
# settings that do not matter to the shards
NO_MATTER = ("dataset", "data_dir", "num_workers", "overwrite", "save_interval", "max_broken", "verify", "adopt")


class Progress:
    """Documents, tokens, MB/s and time left on standard error: in place on a terminal, else a line now and then."""

    def __init__(self, total, consumed):
        """`total` and `consumed` are stored bytes of the inputs; total 0: unknown."""
        self.total, self.first, self.start = total, consumed, time.monotonic()
        self.in_place = sys.stderr.isatty()
        self.period, self.next = (0.2, 0.2) if self.in_place else (30, 30)
        self.n_bytes = 0

    def show(self, n_bytes, documents, tokens, consumed):
        """After n_bytes more of text; documents and tokens are those of the whole data set."""
        self.n_bytes += n_bytes
        seconds = time.monotonic() - self.start
        if seconds < self.next:
            return
        self.next = seconds + self.period
        text = f"{documents:,} documents, {tokens:,} tokens, {self.n_bytes / seconds / 1e6:.1f} MB/s"
        if self.total and consumed > self.first:
            left = int(seconds * (self.total - consumed) / (consumed - self.first))
            text += f", {100 * consumed / self.total:.1f}% read"
            text += f", {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        width = shutil.get_terminal_size().columns - 1
        text = f"\r\x1b[K{text[:width]}" if self.in_place else text + "\n"
        print(text, end="", file=sys.stderr, flush=True)

    def end(self):
        if self.in_place:
            print("\r\x1b[K", end="", file=sys.stderr)


def find_inputs(settings):
    """(Inputs, what meta.json says of their source); UserError for an unknown data set."""
    if settings.input:
        found = find_files(settings.input, settings.stdin_format)
    elif settings.dataset in CORPORA:
        found = find_files([CORPORA[settings.dataset]])
    elif settings.dataset == "stdlib":
        return stdlib_files(), [f"the standard library of Python {sys.version.split()[0]}"]
    else:
        known = ", ".join(["stdlib", *CORPORA])
        raise UserError(f"unknown dataset {settings.dataset!r}; known: {known}, or give local text with --input=PATH")
    if settings.prompt_field and any(source.kind == "text" for source in found):
        text = next(source.path for source in found if source.kind == "text")
        raise UserError(f"prompt_field needs jsonl, parquet or hub rows; {text} is plain text")
    return found, settings.input or [CORPORA[settings.dataset]]


def prepare(settings):
    """Writes the data set that `settings` describe and returns its folder, which appears when it is whole.

    What an interrupted run left in data_dir/.NAME.partial is continued if it was of the same settings and inputs.
    """
    folder = Path(settings.data_dir) / settings.dataset
    # no data set's name begins with a dot
    partial, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    if old.exists() and not folder.exists():  # a run ended between the two renames below
        old.rename(folder)
    inputs, source = find_inputs(settings)
    is_bpe = settings.tokenizer.startswith("bpe:")
    if is_bpe and any(i.path == "-" for i in inputs):
        raise UserError("tokenizer bpe:N reads its sample first: standard input can be read once only, give a file")
    if folder.exists():
        if not settings.overwrite:
            raise UserError(f"{folder} exists; --overwrite replaces it, --dataset=NAME writes another")
        known = ("meta.json", *TOKENIZER_FILES.values())
        strange = [p.name for p in folder.iterdir() if p.suffix not in (".bin", ".mask") and p.name not in known]
        if strange:
            raise UserError(f"{folder} is not a data set: it holds {strange[0]}; --dataset=NAME writes another")
    encoding = None if is_bpe else get_tokenizer(settings.tokenizer, settings.eot_token)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial, f"preparing {folder}"):
            try:
                write_shards(settings, inputs, source, encoding, partial)
            except UserError:
                if not (partial / "progress.json").exists():  # nothing that could be continued
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        kept = "nothing was left behind"
        if partial.exists():
            kept = f"what is done is kept in {partial}, the same command goes on from there"
        raise UserError(f"cannot write {folder}: {error.strerror or error}; {kept}") from None
    return folder


@contextmanager
def locked(folder, work):
    """Keeps other processes from the same work in a folder, where its file system has locks; a process that is killed
    lets go of it. `work` says in an error what the other one does."""
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
        os.fsync(handle)  # of the folder: the names in it
    finally:
        os.close(handle)


def fingerprint(settings, inputs):
    """A text that is equal for runs that write the same shards."""
    mine = {name: value for name, value in asdict(settings).items() if name not in NO_MATTER}
    tokenizer = os.stat(settings.tokenizer).st_mtime_ns if os.path.exists(settings.tokenizer) else None
    what = json.dumps([mine, tokenizer, [asdict(source) for source in inputs]])
    return hashlib.sha256(what.encode()).hexdigest()


def open_writers(settings, encoding, partial, states):
    return [ShardWriter(partial, s, encoding.n_vocab, settings.shard_size, state) for s, state in zip(SPLITS, states)]


def begin(settings, inputs, encoding, partial):
    """(progress, encoding, writers) of an interrupted run of the same settings and inputs, or of a new one."""
    path, mark = partial / "progress.json", fingerprint(settings, inputs)
    if path.exists():
        try:
            progress = json.loads(path.read_text())
            if progress["fingerprint"] == mark:
                encoding = build_encoding(load_tokenizer(partial, progress["tokenizer"]))
                writers = open_writers(settings, encoding, partial, progress["writers"])
                print(f"going on after {sum(progress['documents']):,} documents of an interrupted run", file=sys.stderr)
                return progress, encoding, writers
            print(f"{partial} is of other settings or inputs: beginning anew", file=sys.stderr)
        except (ValueError, KeyError, TypeError, OSError) as error:
            print(f"{partial} cannot be continued ({error}): beginning anew", file=sys.stderr)
    for file in partial.iterdir():
        file.unlink()
    is_bpe = encoding is None
    if is_bpe:
        print(f"training {settings.tokenizer} on a sample", file=sys.stderr)
        encoding = train_bpe(int(settings.tokenizer[4:]), inputs, settings)
    progress = {
        "fingerprint": mark,
        "tokenizer": save_tokenizer(partial, tokenizer_state(encoding)),
        "position": (0, 0, 1),  # see read_jobs
        "consumed": 0,  # stored bytes of the inputs
        "batches": 0,
        "problems": {},  # kind: [count, first places]
        "documents": [0, 0],  # of train and val, as the next three
        "bytes": [0, 0],
        "loss_tokens": [0, 0],
        "writers": [None, None],
    }
    if is_bpe:
        save_json(path, progress)
    return progress, encoding, open_writers(settings, encoding, partial, (None, None))


def write_shards(settings, inputs, source, encoding, partial):
    """Documents -> tokens -> split, shuffle -> shards and meta.json in `partial`.

    Documents are taken in batches. After a batch, `progress` is all there is to know; it is saved every save_interval
    seconds, when what it speaks of is on the disk.
    """
    start = saved = time.monotonic()
    progress, encoding, writers = begin(settings, inputs, encoding, partial)
    fields, total = fields_of(settings), sum(i.size for i in inputs) if all(i.size for i in inputs) else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_workers = settings.num_workers or (1 if encoding.name == "byte" or 0 < total < SMALL else cores)
    can_continue = not any(i.path == "-" for i in inputs)
    batch, waiting = [], []  # of Document; `waiting` holds at most one, see flush
    meter = Progress(total, progress["consumed"])

    def put(is_val, documents):
        """Writes documents to their split."""
        tokens = np.concatenate([d.tokens for d in documents])
        mask = np.concatenate([d.mask for d in documents]) if settings.prompt_field else None
        writers[is_val].write(tokens, mask)
        progress["documents"][is_val] += len(documents)
        progress["bytes"][is_val] += sum(d.n_bytes for d in documents)
        progress["loss_tokens"][is_val] += len(tokens) if mask is None else int(mask.sum())

    def flush():
        """Writes the batch: each document to its split, in the order of the shuffle."""
        documents, batch[:], waiting[:] = waiting + batch, [], []
        held_out = is_held_out(np.array([d.hash for d in documents], dtype=np.uint64), settings.val_fraction)
        if documents and not held_out.any() and not progress["documents"][1]:
            # The held-out part must not stay empty: until a document is held out, the one of the smallest hash waits.
            waiting.append(documents.pop(min(range(len(documents)), key=lambda i: documents[i].hash)))
        progress["batches"] += 1
        shuffled = np.random.RandomState([settings.seed, progress["batches"]])  # a generator whose streams never change
        n, size, order = len(documents), settings.shuffle_buffer, range(len(documents))
        if n and size > 1:
            order = np.concatenate([i + shuffled.permutation(min(size, n - i)) for i in range(0, n, size)]).tolist()
        for is_val in (0, 1):
            chosen = [documents[i] for i in order if held_out[i] == is_val]
            for i in range(0, len(chosen), 16):  # small arrays are made in memory that is warm
                put(is_val, chosen[i : i + 16])

    try:
        n_bytes, jobs = 0, read_jobs(inputs, progress["position"], fields)
        for tokens, position, consumed in tokenize_all(jobs, encoding, fields, num_workers):
            batch += split_documents(tokens)
            n_bytes += int(tokens.n_bytes.sum())
            for kind, (count, places) in tokens.problems.items():
                add_problem(progress["problems"], kind, count, places)
            if len(batch) < settings.shuffle_buffer and n_bytes < BATCH_BYTES:
                continue
            flush()
            progress.update(position=position, consumed=consumed)
            n_tokens = [sum(shard["tokens"] for shard in writer.shards) for writer in writers]
            meter.show(n_bytes, sum(progress["documents"]), sum(n_tokens), consumed)
            n_bytes = 0
            if sum(progress["documents"]) > 10_000:  # too few to judge a corpus by, before
                check_problems(settings, progress, source)
            if settings.max_tokens and n_tokens[0] >= settings.max_tokens:
                break
            if can_continue and not waiting and time.monotonic() - saved >= settings.save_interval:
                for writer in writers:
                    writer.sync()
                save_json(partial / "progress.json", progress | {"writers": [writer.state() for writer in writers]})
                saved = time.monotonic()
        flush()
        check_problems(settings, progress, source, len(waiting))
        if waiting and not progress["documents"][0]:
            for is_val, document in enumerate(halves(waiting[0], encoding, source)):
                put(is_val, [document])
        elif waiting:
            put(1, waiting)
        for writer in writers:
            writer.close()
    except BadText:
        (partial / "progress.json").unlink(missing_ok=True)  # to go on would end there again
        raise
    finally:
        meter.end()
        for writer in writers:
            writer.abandon()

    splits = {
        split: {
            "documents": progress["documents"][is_val],
            "bytes": progress["bytes"][is_val],
            "loss_tokens": progress["loss_tokens"][is_val],
            "shards": writer.shards,
        }
        for is_val, (split, writer) in enumerate(zip(SPLITS, writers))
    }
    for kind, (count, places) in progress["problems"].items():
        if kind == "empty":  # an empty file is no news: meta.json counts it
            continue
        print(f"warning: {kind}: {count} documents, the first at {', '.join(places)}", file=sys.stderr)
    more = {"source": source, "seed": settings.seed, "problems": progress["problems"]}
    write_meta(partial, progress["tokenizer"], encoding, splits, more)
    (partial / "progress.json").unlink(missing_ok=True)
    seconds, text = time.monotonic() - start, sum(progress["bytes"])
    print(f"{len(inputs)} inputs with tokenizer {encoding.name} in {seconds:.1f} s, {text / 1e6 / seconds:.1f} MB/s")


class BadText(UserError):
    """The texts themselves do not make a data set."""


def check_problems(settings, progress, source, n_waiting=0):
    """BadText if there is no text, or too much of it is broken."""
    total = sum(progress["documents"]) + n_waiting
    broken = {kind: found for kind, found in progress["problems"].items() if kind not in HARMLESS}
    n_broken = sum(count for count, _ in broken.values())
    if n_broken > settings.max_broken * max(total, 1):
        first = ", ".join(f"{kind} at {places[0]}" for kind, (_, places) in broken.items())
        share = f"more than max_broken {settings.max_broken}"
        hint = "; --text_field= names the field of the text" if any("JSON" in kind for kind in broken) else ""
        raise BadText(f"{n_broken} documents are broken where {total} are kept, {share}: {first}{hint}")
    if not total:
        raise BadText(f"no text in {', '.join(source)}")
    if not progress["documents"][0] and not n_waiting:
        raise BadText(f"all {total} documents fell to the held-out part: give more text or a smaller val_fraction")


def halves(document, encoding, source):
    """Nine tenths of the only document and the rest, cut after a line's end where there is one."""
    text = decode_bytes(encoding, document.tokens[1:])
    middle = len(text) * 9 // 10
    middle = text.rfind(b"\n", 0, middle) + 1 or whole_characters(text[:middle])
    if document.mask is not None or not 0 < middle < len(text):
        raise BadText(f"{', '.join(source)} holds one document only, which is too little for a held-out part")
    for part in (text[:middle], text[middle:]):
        tokens = np.append(document.tokens[:1], encode(encoding, part)).astype(document.tokens.dtype)
        yield Document(tokens, None, len(part), document.hash)


def main():
    settings = configure(Settings, "Text to token shards, ready for train.py --dataset=NAME.")
    folder = Path(settings.data_dir) / settings.dataset
    if settings.verify:
        verify(folder)
        return
    folder = adopt(settings) if settings.adopt else prepare(settings)
    print(f"wrote {folder}; train on it with: python train.py --dataset={settings.dataset}")


if __name__ == "__main__":
    work() if sys.argv[1:] == ["worker"] else run(main)
