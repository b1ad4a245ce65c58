"""python tests/chaos.py: kill -9 at twenty random moments, and the weights of a run that nobody disturbed.

A small training is killed while it starts, computes, evaluates and saves; each time --init_from=resume goes on. At the
end its weights, its optimizer and its log must be those of an uninterrupted run, to the bit. Prints where it was hit,
how many steps were done again, and what a checkpoint costs. Takes some minutes; exits with 1 if anything differs.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import prepare_data
import train
from train import load_checkpoint, save_checkpoint

KILLS, SEED, TIMEOUT = 20, 0, 300  # TIMEOUT: seconds without a kill, or without an end
RUN = "--norm=gpas_pre --n_layer=4 --n_embd=128 --block_size=64 --gradient_accumulation_steps=2 --max_iters=600".split()
RUN += "--eval_interval=5 --eval_iters=2 --log_interval=1 --sample_tokens=1".split()
RUN += "--dataset=d --dtype=float32 --device=cpu".split()


def start(folder, *args):
    command = [sys.executable, "-u", str(Path(train.__file__)), *args]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [tuple(r.get(n) for n in ("step", "loss", "val_loss", "grad_norm")) for r in records]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[n], b[n]) for n in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def kill_at_random(folder, rng, hits):
    """Trains on in folder/killed until a random moment. Whether it came to its end before."""
    run = folder / "killed"
    resume = ["--init_from=resume", "--out_dir=killed", "--dtype=float32", "--device=cpu"]
    process = start(folder, *(resume if (run / "ckpt.pt").exists() else [*RUN, "--out_dir=killed", "--overwrite"]))
    if rng.random() < 0.2:  # while it starts
        time.sleep(rng.uniform(0, 2))
        process.kill()
        process.communicate()
        hits.append(("starting", 0))
        return False
    first = last = None
    until = time.monotonic() + TIMEOUT
    for line in process.stdout:
        if line.startswith("step"):
            last = int(line[4:].split(":")[0])
            if first is None:
                first, until = last, time.monotonic() + rng.uniform(0, 3)
        if line.startswith("error"):
            sys.exit(f"the run did not resume: {line}")
        if time.monotonic() > until:
            time.sleep(rng.uniform(0, 0.05))  # into the next step, evaluation or save
            break
    process.kill()
    out, _ = process.communicate()
    if "done in" in (line or "") + out:
        return True
    saving = (run / "ckpt.pt.partial").exists()
    hits.append(("saving" if saving else "training", max(0, (last or 0) - load_checkpoint(run)["step"])))
    return False


def checkpoint_seconds(folder):
    """Of one save of the default model, 2.4 million parameters and their moments (29 MB)."""
    parameters = [torch.zeros(2_440_576) for _ in range(3)]
    times = []
    for _ in range(5):
        begin = time.monotonic()
        save_checkpoint(folder / "ckpt.pt", {"model": parameters[0], "optimizer": parameters[1:]})
        times.append(time.monotonic() - begin)
    return sorted(times)[2]


def main():
    rng, hits, begin = random.Random(SEED), [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("".join(f"{i * i} norms at {i % 17}\n" for i in range(30_000)))
        settings = prepare_data.Settings(dataset="d", input=[str(folder / "text.txt")], data_dir=str(folder / "data"))
        prepare_data.prepare(settings)
        whole = start(folder, *RUN, "--out_dir=whole")
        out, _ = whole.communicate(timeout=TIMEOUT)
        if whole.returncode:
            sys.exit(out)
        print(next(line for line in out.splitlines() if line.startswith("done")))
        while len(hits) < KILLS:
            if kill_at_random(folder, rng, hits):
                sys.exit(f"the run ended after {len(hits)} kills of {KILLS}: give it more steps")
            print(f"kill {len(hits)}: {hits[-1][0]}, {hits[-1][1]} steps to do again", flush=True)
        last = start(folder, "--init_from=resume", "--out_dir=killed", "--dtype=float32", "--device=cpu")
        out, _ = last.communicate(timeout=TIMEOUT)
        if last.returncode:
            sys.exit(out)
        a, b = (load_checkpoint(folder / run) for run in ("whole", "killed"))
        same = {
            "weights": equal(a["model"], b["model"]),
            "optimizer": equal(a["optimizer"], b["optimizer"]),
            "log": losses(folder / "whole") == losses(folder / "killed"),
        }
        seconds = checkpoint_seconds(folder)
    places = {place: sum(p == place for p, _ in hits) for place, _ in hits}
    again, seconds_in_all = sum(n for _, n in hits), time.monotonic() - begin
    print(f"{len(hits)} kills {places}, {again} steps done again, in {seconds_in_all:.0f} s")
    print(f"equal to the uninterrupted run: {same}")
    print(f"a checkpoint of the default size: {seconds:.3f} s")
    sys.exit(0 if all(same.values()) else 1)


if __name__ == "__main__":
    main()
