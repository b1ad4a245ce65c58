"""Speed and memory of prepare_data.py and of the reader: `python tests/benchmark_data.py` (some minutes; --help for the
sizes).

    bytes     MB/s of one process with the byte tokenizer, the whole program: reading, hashing, shuffling, writing
    bpe       the whole program on all cores over tiktoken's encode_ordinary_batch in one thread, the same text and a
              vocabulary trained on it (needs rustbpe)
    memory    peak resident memory of the program and its workers, added up, at two sizes of the corpus
    reader    tokens/s of TokenData at the default block size and batch
"""

import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare_data
from configurator import configure, run

PARTS = "bytes", "bpe", "memory", "reader"


@dataclass
class Settings:
    only: str = ",".join(PARTS)  # parts to run, with commas between
    megabytes: int = 40  # of text, and ten times as much for the second peak of memory
    repeats: int = 3  # runs behind each median
    vocabulary: str = "bpe:4096"  # bpe: the tokenizer

    def __post_init__(self):
        if not set(self.only.split(",")) <= set(PARTS):
            raise ValueError(f"only is {self.only!r}; known parts: {', '.join(PARTS)}")


def write_corpus(folder, megabytes):
    """Files of a megabyte, the standard library's sources again and again; returns their number of bytes."""
    folder.mkdir()
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in paths)
    for i in range(megabytes):
        start = i * 1_000_000 % (len(text) - 1_000_000)
        # cut between characters, and no two files alike
        (folder / f"{i}.txt").write_text(f"{i}\n" + text[start : start + 1_000_000].decode(errors="ignore"))
    return sum(path.stat().st_size for path in folder.iterdir())


def prepare(folder, corpus, *args):
    """(seconds, seconds of CPU) of `python prepare_data.py` on the corpus, in a process of its own."""
    command = [sys.executable, ROOT / "prepare_data.py", f"--input={corpus}", "--dataset=d", f"--data_dir={folder}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*map(str, command), "--overwrite", *args], check=True, capture_output=True)
    took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peak_memory(folder, corpus, *args):
    """The largest sum of the resident memory of the program and its children, sampled every 20 ms, in bytes."""
    command = [sys.executable, ROOT / "prepare_data.py", f"--input={corpus}", "--dataset=d", f"--data_dir={folder}"]
    process = subprocess.Popen([*map(str, command), "--overwrite", *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        total, open_pids = 0, [process.pid]
        while open_pids:
            pid = open_pids.pop()
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
                open_pids += Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:  # it has just ended
                continue
        peak = max(peak, total)
        time.sleep(0.02)
    return peak


def report(settings):
    parts = settings.only.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_corpus(folder / "corpus", settings.megabytes)
        startup, startup_cpu = prepare(folder, folder / "corpus" / "0.txt")
        if "bytes" in parts:
            runs = [prepare(folder, folder / "corpus") for _ in range(settings.repeats)]
            rates = [size / 1e6 / (took - startup) for took, _ in runs]
            of_cpu = [size / 1e6 / (cpu - startup_cpu) for _, cpu in runs]
            print(
                f"bytes: {statistics.median(rates):.0f} MB/s, {statistics.median(of_cpu):.0f} MB per second of CPU "
                f"({min(of_cpu):.0f} to {max(of_cpu):.0f}), start-up of {startup:.1f} s apart",
                flush=True,
            )
        if "bpe" in parts:
            prepare(folder, folder / "corpus" / "0.txt", f"--tokenizer={settings.vocabulary}", "--bpe_sample=5000000")
            (folder / "d").rename(folder / "vocabulary")
            meta = prepare_data.read_meta(folder / "vocabulary")
            encoding, ratios = prepare_data.build_encoding(meta["tokenizer"]), []
            of_it = f"--tokenizer={folder / 'vocabulary'}"
            texts = [path.read_text() for path in sorted((folder / "corpus").iterdir())]
            startup = prepare(folder, folder / "corpus" / "0.txt", of_it)[0]
            for _ in range(settings.repeats):
                start = time.perf_counter()
                encoding.encode_ordinary_batch(texts, num_threads=1)
                alone = time.perf_counter() - start
                ratios.append(alone / (prepare(folder, folder / "corpus", of_it)[0] - startup))
            print(
                f"bpe: all cores over tiktoken in one thread {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}); one thread {size / 1e6 / alone:.1f} MB/s",
                flush=True,
            )
        if "memory" in parts:
            write_corpus(folder / "large", 10 * settings.megabytes)
            for corpus in ("corpus", "large"):
                peaks = [peak_memory(folder, folder / corpus, f"--num_workers={n}") / 1e6 for n in (1, 2)]
                print(f"memory: {corpus}: {peaks[0]:.0f} MB alone, {peaks[1]:.0f} MB with 2 workers", flush=True)
        if "reader" in parts:
            prepare(folder, folder / "corpus")
            data = prepare_data.TokenData(folder / "d", "train", 256, 257)
            rates = []
            for _ in range(settings.repeats):
                start = time.perf_counter()
                for i in range(0, 20_000, 2):
                    data.rows(i, 2)
                rates.append(20_000 * 256 / (time.perf_counter() - start))
            print(f"reader: {statistics.median(rates) / 1e6:.1f} million tokens/s, 2 windows of 256 at a time", flush=True)


if __name__ == "__main__":
    run(lambda: report(configure(Settings, "Times prepare_data.py.")))
