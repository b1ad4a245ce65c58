"""Text -> token shards: `python prepare_data.py` writes data/stdlib, `--input=PATH --dataset=NAME` any local text.

This file owns the shard format (writer and memory-mapped reader) and the tokenizers. A data set is a folder:

    data/NAME/train_000000.bin ...   256 int32 of header (magic, version, number of tokens), then the tokens
    data/NAME/val_000000.bin ...     the same for the held-out documents
    data/NAME/meta.json              tokenizer, vocabulary size, source, counts
    data/NAME/tokenizer.tiktoken     the tokenizer's ranks, unless it is the byte-level one

The header is that of llm.c and modded-nanogpt (uint16 tokens), so their shards train here and ours there; a
vocabulary over 65,536 takes uint32 tokens and another magic number.
"""

import base64
import glob
import hashlib
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken

from configurator import UserError, configure, run


@dataclass
class Settings:
    # what
    dataset: str | None = None  # name of the data set; none: the first input's name, or stdlib without input
    input: list[str] = field(default_factory=list)  # files, folders or globs of .txt, .md, .py or .jsonl
    text_field: str = "text"  # jsonl: the field that holds the text
    tokenizer: str = "byte"  # byte, one of tiktoken's (gpt2, cl100k_base, o200k_base ...) or PATH.tiktoken
    # how
    data_dir: str = "data"  # the data set is written to data_dir/dataset
    val_fraction: float = 0.01  # share of the documents that is held out, by a hash of their text
    shard_size: int = 100_000_000  # tokens per shard
    shuffle_buffer: int = 1000  # documents among which the next one is drawn
    max_broken: float = 0.01  # share of the documents that may be broken or undecodable before it is an error
    seed: int = 1337  # of the shuffle
    overwrite: bool = False  # replace a data set of that name

    def __post_init__(self):
        if self.dataset is None:
            first = self.input[0] if self.input else "stdlib"
            self.dataset = Path(first).stem or Path(first).resolve().name
        if not re.fullmatch(r"\w[\w.-]*", self.dataset):
            raise ValueError(f"dataset {self.dataset!r} is not a plain name; give one with --dataset=NAME")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; it must lie between 0 and 1")
        for name in ("shard_size", "shuffle_buffer"):
            if not 1 <= getattr(self, name) < 2**31:  # the header counts a shard's tokens in an int32
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1 and under 2^31")
        if not self.max_broken >= 0:
            raise ValueError(f"max_broken is {self.max_broken}; it must be at least 0")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: all are tiktoken.Encoding objects

END_OF_TEXT = "<|endoftext|>"


def byte_encoding():
    """256 bytes and the end-of-text token: a vocabulary of 257 that needs no download."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("byte", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})


def get_tokenizer(name):
    """The tiktoken.Encoding for `name`: byte, a name that tiktoken knows, or a PATH.tiktoken. UserError otherwise.

    A .tiktoken file (base64 token and rank a line) holds no pattern: text is cut into words as GPT-2 does.
    """
    if name == "byte":
        return byte_encoding()
    if name.endswith(".tiktoken"):
        from tiktoken_ext.openai_public import r50k_pat_str

        try:
            return build_encoding({"name": Path(name).stem, "pattern": r50k_pat_str, "ranks": Path(name).read_text()})
        except OSError as error:
            raise UserError(f"tokenizer {name}: {error.strerror}") from None
        except (ValueError, OverflowError) as error:
            raise UserError(f"tokenizer {name} is not a .tiktoken file (base64 token, space, rank a line): {error}") from None
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"unknown tokenizer {name!r}; known: byte, {known}, or a PATH.tiktoken")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # whatever the network raises: tiktoken passes on requests' and urllib3's errors
        raise UserError(
            f"tokenizer {name}: its vocabulary is not cached and cannot be downloaded ({type(error).__name__}); "
            "offline, use --tokenizer=byte or a PATH.tiktoken"
        ) from None


def tokenizer_state(encoding):
    """All that build_encoding needs, as plain strings and numbers: it goes into checkpoints."""
    if encoding.name == "byte":
        return {"name": "byte"}
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)
    return {
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "ranks": lines,
    }


def build_encoding(state):
    """The Encoding of a tokenizer_state; without special tokens, end-of-text follows the last rank. ValueError."""
    if state["name"] == "byte":
        return byte_encoding()
    ranks = {}
    for line in state["ranks"].splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    if not all(bytes([i]) in ranks for i in range(256)) or len(set(ranks.values())) < len(ranks):
        raise ValueError("it needs all 256 single bytes and a rank of its own for each token")
    special = state.get("special_tokens") or {END_OF_TEXT: max(ranks.values()) + 1}
    return tiktoken.Encoding(state["name"], pat_str=state["pattern"], mergeable_ranks=ranks, special_tokens=special)


def encode(encoding, text):
    """Token ids of `text`, an integer array; the text of special tokens is ordinary text."""
    if encoding.name == "byte":
        return np.frombuffer(text.encode(), dtype=np.uint8)  # what the Encoding gives, without its regular expression
    return np.array(encoding.encode_ordinary(text), dtype=np.uint32)


def decode(encoding, ids):
    """Text of token ids; ids that the tokenizer does not know (a padded vocabulary) and partial characters show as U+FFFD."""

    def token_bytes(i):
        try:
            return encoding.decode_single_token_bytes(int(i))
        except KeyError:
            return b"\xff"

    return b"".join(map(token_bytes, ids)).decode(errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# Documents

MAX_DOCUMENT = 1 << 16  # bytes: longer texts are cut, so that a single file still has a held-out part
SUFFIXES = (".txt", ".md", ".py", ".jsonl")


def find_files(inputs):
    """Files behind `inputs` (files, folders, globs), each once, sorted per input. UserError for one that holds none."""
    found = {}  # by where a path leads, so that two names of a file are one
    for given in inputs:
        paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        if not paths:
            raise UserError(f"input {given}: no such file, folder or glob")
        count = len(found)
        for path in map(Path, paths):
            if path.is_dir():
                for p in sorted(path.rglob("*")):
                    if p.suffix in SUFFIXES and p.is_file():
                        found.setdefault(p.resolve(), p)
            elif path.suffix in SUFFIXES:
                found.setdefault(path.resolve(), path)
            elif path == Path(given):
                raise UserError(f"input {given}: unknown kind {path.suffix!r}; known: {', '.join(SUFFIXES)}")
        if len(found) == count:
            raise UserError(f"input {given}: no files of kind {', '.join(SUFFIXES)} that are not among the inputs already")
    return list(found.values())


def stdlib_files():
    """Source files of the running interpreter's standard library, without its tests: some 11 MB of text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    leave = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [p for p in sorted(root.rglob("*.py")) if not leave & set(p.relative_to(root).parts)]
    if not files:
        raise UserError(f"the standard library's source is not at {root}; give text with --input=PATH")
    return files


def read_documents(files, text_field, problems):
    """Texts of at most MAX_DOCUMENT bytes from `files`, streamed; what is wrong with them is counted in `problems`.

    `problems` maps a kind of trouble to [count, first place]. Undecodable bytes are replaced by U+FFFD.
    """

    def report(kind, place):
        problems.setdefault(kind, [0, place])[0] += 1

    def clean(text, place):
        text, bad = re.subn("[\ud800-\udfff]+", "\ufffd", text)
        if bad:
            report("undecodable", place)
        return text

    def not_empty(texts, place):
        for text in texts:
            if text.strip():
                yield text
            else:
                report("empty", place)

    for path in files:
        try:
            # surrogateescape marks undecodable bytes; newline="" keeps line ends as they are
            with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
                if path.suffix == ".jsonl":
                    for number, line in enumerate(file, 1):
                        place = f"{path}:{number}"
                        try:
                            text = json.loads(line)[text_field] if line.strip() else ""
                        except (ValueError, KeyError, TypeError, RecursionError):
                            text = None
                        if isinstance(text, str):
                            yield from not_empty(cut(clean(text, place)), place)
                        else:
                            report(f"no JSON object with a text {text_field!r}", place)
                else:
                    rest = ""
                    while piece := file.read(1 << 20):  # text of any length in bounded memory
                        *whole, rest = cut(rest + clean(piece, path))
                        yield from not_empty(whole, path)
                    yield from not_empty([rest], path)
        except OSError as error:
            raise UserError(f"input {path}: {error.strerror}") from None


def cut(text):
    """Pieces of `text` of at most MAX_DOCUMENT bytes in UTF-8, cut after a line's end where there is one."""
    pieces, start = [], 0
    while start < len(text):
        head = text[start : start + MAX_DOCUMENT].encode()[:MAX_DOCUMENT]
        end = start + len(head.decode(errors="ignore"))  # without a character that the limit cuts in two
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        pieces.append(text[start:end])
        start = end
    return pieces or [""]


def split_documents(documents, val_fraction):
    """(is_val, text) for each text: held out where its hash falls under val_fraction, so that the choice is stable.

    Neither split stays empty: while nothing is held out, the text of the smallest hash waits to be, and a text that
    is alone is cut.
    """
    threshold, waiting, has_val, has_train = val_fraction * 2**64, None, False, False
    for text in documents:
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        if value < threshold:
            has_val = True
            yield True, text
        elif not has_val and (waiting is None or value < waiting[0]):
            if waiting:
                has_train = True
                yield False, waiting[1]
            waiting = value, text
        else:
            has_train = True
            yield False, text
    if waiting and has_val:
        yield False, waiting[1]
    elif waiting and has_train:
        yield True, waiting[1]
    elif waiting:
        text = waiting[1]
        middle = len(text) * 9 // 10
        middle = text.rfind("\n", 0, middle) + 1 or middle
        yield False, text[:middle]
        yield True, text[middle:]


def shuffle(items, size, seed):
    """The items in a random order in which each is drawn from the next `size` ones; memory for `size` items."""
    rng, buffer = random.Random(seed), []
    for item in items:
        buffer.append(item)
        if len(buffer) > size:
            i = rng.randrange(len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


# ---------------------------------------------------------------------------------------------------------------------
# Shards

HEADER = 256  # int32 values
KINDS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}  # magic: (version, dtype of the tokens)


class ShardWriter:
    """Writes tokens to folder/split_000000.bin and on, shard_size tokens each; `close` completes the last."""

    def __init__(self, folder, split, vocab_size, shard_size):
        self.folder, self.split, self.shard_size = Path(folder), split, shard_size
        self.magic = 20240520 if vocab_size <= 1 << 16 else 20240801
        self.version, self.dtype = KINDS[self.magic]
        self.file, self.shards = None, []  # shards: {"file", "tokens"}

    def write(self, tokens):
        """Appends an integer array."""
        while len(tokens):
            if self.file is None:
                name = f"{self.split}_{len(self.shards):06d}.bin"
                self.shards.append({"file": name, "tokens": 0})
                self.file = open(self.folder / name, "wb")
                self.file.write(bytes(4 * HEADER))
            shard = self.shards[-1]
            part, tokens = np.split(tokens, [self.shard_size - shard["tokens"]])
            self.file.write(part.astype(self.dtype).tobytes())
            shard["tokens"] += len(part)
            if shard["tokens"] == self.shard_size:
                self.close()

    def close(self):
        """Writes the header, which makes the shard whole."""
        if self.file:
            header = np.zeros(HEADER, dtype="<i4")
            header[:3] = self.magic, self.version, self.shards[-1]["tokens"]
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


def open_shard(path):
    """Tokens of a shard, a read-only memory map; UserError if it is not one, or is truncated."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(4 * HEADER).ljust(4 * HEADER, b"\0"), dtype="<i4")
        if header[0] not in KINDS or header[1] != KINDS[header[0]][0]:
            raise UserError(f"{path} is not a token shard: its header has no known magic number and version")
        count, dtype = int(header[2]), np.dtype(KINDS[header[0]][1])
        expected = 4 * HEADER + count * dtype.itemsize
        if size != expected:
            raise UserError(f"shard {path} has {size} bytes where its header says {expected}: truncated or damaged")
        return np.memmap(path, dtype=dtype, mode="r", offset=4 * HEADER, shape=(count,)) if count else np.empty(0, dtype)
    except OSError as error:
        raise UserError(f"shard {path}: {error.strerror}") from None


def shard_paths(folder, split):
    """The shards of a split in order: train_000000.bin, or fineweb_train_000001.bin as llm.c names them."""
    return sorted(p for p in Path(folder).glob("*.bin") if re.search(rf"(^|_){split}_[^_]*$", p.stem))


class TokenData:
    """Windows of block_size + 1 tokens of one split of a data set folder.

    Row i of training is a pure function of (seed, i): epoch i // len(self), in which a permutation of its own visits
    each window once. Nothing is held but the memory maps, and any row can be had at once.
    """

    def __init__(self, folder, split, block_size, vocab_size, seed=0):
        """UserError for a folder without such shards, or with fewer than block_size + 1 tokens in each."""
        self.paths = shard_paths(folder, split)
        if not self.paths:
            raise UserError(f"no {split} shards ({split}_*.bin) in {folder}")
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.shards = [open_shard(path) for path in self.paths]
        counts = [max(0, (len(tokens) - 1) // block_size) for tokens in self.shards]
        self.ends = np.cumsum(counts)
        self.n_tokens = sum(len(tokens) for tokens in self.shards)
        meta = read_meta(folder)
        if meta and meta["splits"][split]["tokens"] != self.n_tokens:
            expected = meta["splits"][split]["tokens"]
            raise UserError(f"{folder}/meta.json counts {expected} {split} tokens, its shards hold {self.n_tokens}")
        if not self.ends[-1]:
            raise UserError(
                f"block_size {block_size} is longer than the {split} data in {folder}: "
                f"{max(map(len, self.shards))} tokens in its longest shard, {block_size + 1} needed"
            )

    def __len__(self):
        return int(self.ends[-1])

    def rows(self, first, n):
        """Rows first ... first + n - 1: inputs and targets, int64 arrays (n, block_size)."""
        out = np.empty((n, self.block_size + 1), dtype=np.int64)
        for row, i in zip(out, range(first, first + n)):
            epoch, place = divmod(i, len(self))
            window = permute(place, len(self), key=f"{self.seed} {epoch}".encode())
            shard = int(np.searchsorted(self.ends, window, side="right"))
            start = (window - (int(self.ends[shard - 1]) if shard else 0)) * self.block_size
            row[:] = self.shards[shard][start : start + self.block_size + 1]
            if row.max() >= self.vocab_size:
                raise UserError(
                    f"shard {self.paths[shard]} holds token {row.max()}: it does not fit the vocabulary of {self.vocab_size}"
                )
        return out[:, :-1], out[:, 1:]


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


def read_meta(folder):
    """The data set's meta.json, or {} for a folder of bare shards; UserError if it cannot be read."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text())
        if meta["tokenizer"]["name"] != "byte":
            meta["tokenizer"]["ranks"] = (path.parent / "tokenizer.tiktoken").read_text()
        build_encoding(meta["tokenizer"])
        counts = [meta["vocab_size"], *(meta["splits"][s][n] for s in ("train", "val") for n in ("tokens", "bytes"))]
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError("its counts are not positive integers")
        return meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the data again") from None


# ---------------------------------------------------------------------------------------------------------------------
# The program


def prepare(settings):
    """Writes the data set that `settings` describe and returns its folder; nothing is left behind on failure."""
    folder = Path(settings.data_dir) / settings.dataset
    if folder.exists():
        if not settings.overwrite:
            raise UserError(f"{folder} exists; --overwrite replaces it, --dataset=NAME writes another")
        strange = [p.name for p in folder.iterdir() if p.suffix != ".bin" and p.name not in ("meta.json", "tokenizer.tiktoken")]
        if strange:
            raise UserError(f"{folder} is not a data set: it holds {strange[0]}; --dataset=NAME writes another")
    if settings.input:
        files, source = find_files(settings.input), settings.input
    elif settings.dataset == "stdlib":
        files, source = stdlib_files(), [f"the standard library of Python {sys.version.split()[0]}"]
    else:
        raise UserError(f"unknown dataset {settings.dataset!r}; known: stdlib, or give local text with --input=PATH")
    encoding = get_tokenizer(settings.tokenizer)
    partial = folder.with_name(f".{folder.name}.partial")  # no data set's name begins with a dot
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_shards(settings, files, source, encoding, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; nothing was left behind") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_shards(settings, files, source, encoding, folder):
    """Documents -> split, shuffle, tokens -> shards and meta.json in `folder`."""
    start, problems = time.monotonic(), {}
    writers = [ShardWriter(folder, s, encoding.n_vocab, settings.shard_size) for s in ("train", "val")]
    n_documents, n_bytes = Counter(), Counter()
    documents = read_documents(files, settings.text_field, problems)
    splits = split_documents(documents, settings.val_fraction)
    for is_val, text in shuffle(splits, settings.shuffle_buffer, settings.seed):
        writers[is_val].write(np.array([encoding.eot_token]))
        writers[is_val].write(encode(encoding, text))
        n_documents[is_val] += 1
        n_bytes[is_val] += len(text.encode())
    for writer in writers:
        writer.close()

    total = n_documents.total()
    broken = {kind: found for kind, found in problems.items() if kind != "empty"}
    n_broken = sum(count for count, _ in broken.values())
    if n_broken > settings.max_broken * max(total, 1):
        first = ", ".join(f"{kind} at {place}" for kind, (_, place) in broken.items())
        raise UserError(f"{n_broken} of {total} documents are broken, more than max_broken {settings.max_broken}: {first}")
    if not total:
        raise UserError(f"no text in {', '.join(source)}")
    for kind, (count, place) in problems.items():
        print(f"warning: {kind}: {count} documents, the first at {place}", file=sys.stderr)

    state = tokenizer_state(encoding)
    if "ranks" in state:
        (folder / "tokenizer.tiktoken").write_text(state.pop("ranks"))
    meta = {
        "tokenizer": state,
        "vocab_size": encoding.n_vocab,
        "source": source,
        "seed": settings.seed,
        "splits": {
            writer.split: {
                "documents": n_documents[is_val],
                "bytes": n_bytes[is_val],
                "tokens": sum(shard["tokens"] for shard in writer.shards),
                "shards": writer.shards,
            }
            for is_val, writer in enumerate(writers)
        },
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    for split, counts in meta["splits"].items():
        print(f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens")
    print(f"{len(files)} files with tokenizer {encoding.name} in {time.monotonic() - start:.1f} s")


def main():
    settings = configure(Settings, "Text to token shards, ready for train.py --dataset=NAME.")
    folder = prepare(settings)
    print(f"wrote {folder}; train on it with: python train.py --dataset={settings.dataset}")


if __name__ == "__main__":
    run(main)
