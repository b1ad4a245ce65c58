"""Damaged and edited files of a run and of its data: each ends in one line and exit code 2, or works, and what was saved
stays as it was. pytest tries some; `python tests/test_damage.py 400` tries so many."""

import copy
import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT  # noqa: F401, puts the programs on the path
from test_train import SHORT, SMALL, call

import prepare_data

ABSURD = [-1, 0, 2**31, 10**30, -1e30, math.inf, math.nan, "x", "", None, [], {}, [1], True, "../..", 0.5]
MODES = ["--init_from=resume"], ["--eval_only"], ["--sample=a"], ["--init_from=run", "--out_dir=tuned"]
PER_STEP = ["--batch_size=4", "--gradient_accumulation_steps=2"]


def make_run(folder):
    """A data set d and a run in `folder`/run."""
    (folder / "text.txt").write_text("".join(f"north {i * i % 7} south {i % 3}\n" for i in range(4000)))
    prepare_data.prepare(
        prepare_data.Settings(dataset="d", input=[str(folder / "text.txt")], data_dir=str(folder / "data"))
    )
    done = call(*SMALL, *SHORT, "--max_iters=2", "--norm=gpas_pre", "--out_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr


def edit(tree, rng):
    """Changes, removes or adds one entry of nested dicts and lists, in place; says which."""
    path, here = [], tree
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        path.append(str(key))
        if isinstance(here[key], (dict, list)) and here[key] and rng.random() < 0.85:
            here = here[key]
            continue
        kind = rng.random()
        if kind < 0.15:
            del here[key]
            return f"{'.'.join(path)} removed"
        old = here[key]
        if torch.is_tensor(old) and kind < 0.6:
            changes = old.flatten()[:-1], old.to(torch.int64), old[None], old.double(), old.to_sparse(), torch.zeros(0)
            here[key] = rng.choice(changes)
        else:
            here[key] = copy.deepcopy(rng.choice(ABSURD))
        return f"{'.'.join(path)} = {str(here[key])[:40]}"


def damage_bytes(path, rng):
    """Cuts a file, or changes some of its bytes."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        path.write_bytes(content[: rng.randrange(len(content))])
        return f"{path.name} cut"
    for _ in range(rng.choice((1, 20))):
        content[rng.randrange(len(content) if rng.random() < 0.5 else min(len(content), 1024))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{path.name} with changed bytes"


def damage(folder, rng):
    """Damages one file of the run or of its data; says what it did."""
    kind, run, data = rng.random(), folder / "run", folder / "data" / "d"
    if kind < 0.5:
        checkpoint = torch.load(run / "ckpt.pt", weights_only=True)
        part = rng.choice(("config", "model", "optimizer", "settings", "tokenizer", "shards", None))
        what = f"checkpoint {part or ''} {edit(checkpoint[part] if part else checkpoint, rng)}"
        torch.save(checkpoint, run / "ckpt.pt")
        return what
    if kind < 0.7:
        meta = json.loads((data / "meta.json").read_text())
        what = f"meta.json {edit(meta, rng)}"
        (data / "meta.json").write_text(json.dumps(meta))
        return what
    if kind < 0.8:
        lines = (run / "log.jsonl").read_text().splitlines()
        line = rng.randrange(len(lines))
        lines[line] = rng.choice(['{"step": "x"}', "[]", "{", "\0", '{"loss": 1}', '{"step": 1e400}', "[" * 3000, "nul"])
        (run / "log.jsonl").write_text("\n".join(lines) + "\n")
        return f"log.jsonl line {line} = {lines[line][:20]}"
    return damage_bytes(rng.choice([run / "ckpt.pt", run / "log.jsonl", *sorted(data.iterdir())]), rng)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def attempt(base, seed):
    """What one damage leads to: None if it is as it should be, else what was wrong."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(base / "run", folder / "run"), shutil.copytree(base / "data", folder / "data")
        what, mode = damage(folder, rng), rng.choice(MODES)
        before = contents(folder)
        args = [*mode, *([] if "--out_dir=tuned" in mode else ["--out_dir=run"]), "--norm=gpas_pre"]
        args += [*SHORT, *PER_STEP, "--max_iters=3", "--data_dir=data", "--dataset=d", "--dtype=float32"]
        told = f"seed {seed}: {what}, {mode[0]}: "
        try:
            done = call(*args, cwd=folder)
        except Exception as error:
            return f"{told}{type(error).__name__}: {error}"
        errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
        if done.returncode == 0:
            return None
        if done.returncode != 2 or len(errors) != 1 or not errors[0].startswith("error: "):
            return f"{told}exit code {done.returncode}, {done.stderr[-300:]}"
        after = contents(folder)
        changed = [str(path) for path, content in before.items() if after.get(path) != content]
        return f"{told}{changed} changed" if changed else None


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    make_run(folder)
    return folder


@pytest.mark.parametrize("seed", range(24))
def test_damage_ends_in_one_line(base, seed):
    assert attempt(base, seed) is None


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        make_run(Path(place))
        wrong = [found for seed in range(int(sys.argv[1])) if (found := attempt(Path(place), seed))]
    print("\n".join(wrong))
    print(f"{sys.argv[1]} damages, {len(wrong)} that did not end as they should")
