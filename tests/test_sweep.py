"""train.py with lists of values: every combination is trained in a process of its own, whatever happens to some."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT
from test_train import call

import prepare_data
import train

TINY = """
n_layer, n_embd, n_head, block_size = 1, 16, 2, 16
batch_size, gradient_accumulation_steps = 2, 1
max_iters, eval_interval, eval_iters, log_interval, warmup_iters = 4, 2, 2, 1, 1
learning_rate, sample_tokens = 1e-3, 2
dataset, device = "d", "cpu"
"""
NAMES = [f"norm={norm},learning_rate={rate}" for norm in ("pre", "gpas_pre") for rate in ("0.001", "1e+38")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data set d and the config file tiny.py."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text.txt").write_text("north south\neast west norm\n" * 2000)
    text = [str(folder / "text.txt")]
    prepare_data.prepare(prepare_data.Settings(dataset="d", input=text, data_dir=str(folder / "data")))
    (folder / "tiny.py").write_text(TINY)
    (folder / "norms.py").write_text('norm = ["pre", "gpas_pre"]\nlearning_rate = 5.0\n')
    return folder


@pytest.fixture(scope="module")
def swept(folder):
    """The folder after a sweep of two norms, as a Python list, and two learning rates, of which one is far too high."""
    done = call("tiny.py", "norms.py", "--learning_rate=1e-3,1e38", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def steps(sweep_folder):
    """{name: step of the checkpoint} of the runs in a sweep's folder."""
    runs = [path.parent for path in sweep_folder.glob("*/ckpt.pt")]
    return {run.name: train.open_checkpoint(run)["step"] for run in runs}


def log(run):
    """The log of a run without what depends on time."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in r.items() if name != "tokens_per_s"} for r in records]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def wait_for(condition, what):
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


# -- what is trained


def test_every_combination_is_trained(swept):
    assert sorted(p.name for p in (swept / "out-sweep").iterdir()) == sorted(NAMES)
    for name in NAMES:
        settings = train.open_checkpoint(swept / "out-sweep" / name)["settings"]
        assert f"norm={settings['norm']},learning_rate={settings['learning_rate']}" == name
        assert (settings["n_layer"], settings["out_dir"]) == (1, f"out-sweep/{name}")
    table = (swept / "stdout").read_text().splitlines()[1:5]
    assert [line.split()[0] for line in table] == NAMES
    for line in table:
        assert ("diverged: validation loss is nan at step 2" in line) == ("1e+38" in line)
        if "1e+38" not in line:
            val_loss = log(swept / "out-sweep" / line.split()[0])[-1]["val_loss"]
            assert line.split()[1:] == ["4", f"{val_loss:.4f}"]
    assert "python analyze.py out-sweep" in (swept / "stdout").read_text()


def test_a_run_of_a_sweep_equals_the_same_run_alone(swept):
    done = call("tiny.py", "--norm=gpas_pre", "--out_dir=alone", cwd=swept)
    assert done.returncode == 0, done.stderr
    alone, swept_run = swept / "alone", swept / "out-sweep" / NAMES[2]
    assert log(alone) == log(swept_run)
    ours, theirs = (train.open_checkpoint(run)["model"] for run in (alone, swept_run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_finished_or_diverged_is_not_repeated(swept):
    before = files(swept / "out-sweep")
    done = call("tiny.py", "norms.py", "--learning_rate=1e-3,1e38", cwd=swept)
    assert (done.returncode, done.stdout) == (0, (swept / "stdout").read_text())
    assert files(swept / "out-sweep") == before
    other = swept / "out-sweep" / "norm=lns" / "ckpt.pt"
    other.parent.mkdir()
    other.touch()
    with pytest.warns(match="out-sweep also holds other runs than this sweep's, such as norm=lns: analyze.py counts them too"):
        assert call("tiny.py", "norms.py", "--learning_rate=1e-3,1e38", cwd=swept).returncode == 0
    shutil.rmtree(other.parent)


def test_other_settings_than_those_of_the_run_in_the_folder(swept):
    before = files(swept / "out-sweep")
    done = call("tiny.py", "--norm=pre,gpas_pre", "--learning_rate=1e-3,1e38", "--weight_decay=0.5", cwd=swept)
    assert done.returncode == 2
    assert "weight_decay 0.1, not 0.5; --overwrite" in done.stderr and NAMES[0] in done.stderr
    assert files(swept / "out-sweep") == before


def test_a_finished_run_of_a_constant_rate_goes_on(swept, tmp_path):
    """Its schedule does not depend on its length."""
    shutil.copytree(swept / "out-sweep" / NAMES[0], tmp_path / "run")
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    state["settings"]["min_lr"] = state["settings"]["learning_rate"]
    torch.save(state, tmp_path / "run" / "ckpt.pt")
    given = state["settings"] | {"overwrite": False, "out_dir": str(tmp_path / "run"), "data_dir": str(swept / "data")}
    assert train.build_trial(tmp_path / "run", given).outcome == "finished"
    assert train.build_trial(tmp_path / "run", given | {"max_iters": 5}).outcome == ""


def test_a_longer_schedule_than_that_of_a_finished_run(swept):
    """Its learning rate has decayed: the average would be over runs of two schedules."""
    before = files(swept / "out-sweep")
    done = call("tiny.py", "norms.py", "--learning_rate=1e-3,1e38", "--max_iters=8", cwd=swept)
    assert done.returncode == 2 and "has ended at step 4, where its learning rate had decayed" in done.stderr
    assert files(swept / "out-sweep") == before


def test_another_precision_or_other_first_weights(swept):
    """A run that goes on does not hand these on, so its checkpoint does not tell."""
    assert call("tiny.py", "--out_dir=base", cwd=swept).returncode == 0
    before = files(swept / "out-sweep")
    for changed, message in ("--dtype=float64", "dtype auto, not float64"), ("--init_from=base", "from scratch, not base"):
        done = call("tiny.py", "norms.py", "--learning_rate=1e-3,1e38", changed, cwd=swept)
        assert done.returncode == 2 and message in done.stderr
    assert files(swept / "out-sweep") == before


def test_an_overwriting_sweep_that_ended_before_its_first_checkpoint(swept):
    """Its settings.py is the new run's, its checkpoint still the earlier one's."""
    shutil.copytree(swept / "out-sweep", swept / "early")
    for run in (swept / "early").iterdir():
        with open(run / "settings.py", "a") as file:
            file.write("weight_decay = 0.5\n")
    args = "tiny.py", "norms.py", "--learning_rate=1e-3,1e38", "--out_dir=early", "--weight_decay=0.5"
    done = call(*args, cwd=swept)
    assert done.returncode == 2 and "weight_decay 0.1, not 0.5; --overwrite" in done.stderr


def test_a_run_is_not_overwritten_by_its_own_fine_tuning(swept):
    before = files(swept / "out-sweep")
    (swept / "one.py").write_text('norm = ["pre"]\n')
    args = "--learning_rate=1e-3,1e38", f"--init_from=out-sweep/{NAMES[0]}", "--out_dir=out-sweep", "--overwrite"
    done = call("tiny.py", "one.py", *args, cwd=swept)
    assert done.returncode == 2 and f"{NAMES[0]}: overwrite would remove out-sweep/{NAMES[0]}" in done.stderr
    assert files(swept / "out-sweep") == before


def test_a_run_that_lost_its_checkpoint_is_not_overwritten(swept):
    shutil.copytree(swept / "out-sweep", swept / "lost")
    (swept / "lost" / NAMES[0] / "ckpt.pt").unlink()
    before = files(swept / "lost")
    done = call("tiny.py", "norms.py", "--learning_rate=1e-3,1e38", "--out_dir=lost", cwd=swept)
    assert done.returncode == 2 and "no checkpoint" in done.stderr and "the one before it is whole, of step 2" in done.stderr
    assert files(swept / "lost") == before


# -- mistakes


@pytest.mark.parametrize(
    "args, message",
    [
        ("--norm=pre,nope", "norm=nope: unknown norm"),
        ("--seed=1,,2", "--seed is a list with an empty element: '1,,2'"),
        ("--seed=1,2,", "empty element"),
        ("--seed=1,x", "--seed expects int, got 'x'"),
        ("--seed=1,1", "seed=1 twice"),
        ("empty.py", "empty.py: seed is an empty list"),
        ("mixed.py", "mixed.py: seed expects int"),
        ("--out_dir=a,b", "out_dir is one folder and cannot be a list: 'a,b'"),
        ("--init_from=a,b --seed=1,2", "init_from is one folder and cannot be a list: 'a,b'"),
        ("--seed=1,2 --init_from=resume", "leave out init_from=resume"),
        ("--seed=1,2 --eval_only", "eval_only is for one run"),
        ("--seed=1,2 --jobs=0", "jobs is 0"),
        ("--n_head=2,3", "n_head=3: "),
        ("--dataset=d,missing", "dataset=missing: no data set 'missing'"),
        ("--block_size=16,1000000", "block_size 1000000 is longer than"),
        ("--vocab_size=300,5", "vocab_size 5 is smaller than"),
        ("--device=cpu,cuda:99", "device 'cuda:99' cannot be used"),
        ("--norm=gpas_pre --seed=1,2 --gates=0.1,0.2,0.3", "--gates=0.1,0.2,0.3: "),
        ("--seed=1,2 --shard", "shard needs torchrun"),
    ],
)
def test_a_mistake_in_one_combination_is_told_before_any_starts(folder, args, message):
    (folder / "empty.py").write_text("seed = []\n")
    (folder / "mixed.py").write_text("seed = [1, 'x']\n")
    out_dir = [] if "--out_dir" in args else ["--out_dir=never"]
    done = call("tiny.py", *out_dir, *args.split(), cwd=folder)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (folder / "never").exists()


def test_torchrun_is_refused(folder):
    processes = contextlib.nullcontext(train.Processes(store=object()))
    with mock.patch.object(train, "connected_processes", lambda: processes):
        done = call("tiny.py", "--out_dir=never", "--seed=1,2", cwd=folder)
    assert done.returncode == 2 and "torchrun's processes share one run" in done.stderr
    assert not (folder / "never").exists()


def test_two_jobs_cannot_train_in_one_folder(folder):
    (folder / "taken").mkdir()
    with prepare_data.locked(folder / "taken", "here"):
        done = call("tiny.py", "--out_dir=taken", cwd=folder)
    assert done.returncode == 2 and "another process is training in taken; wait for it" in done.stderr


# -- faults


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full_in_one_run(folder):
    """Of runs whose length is given in epochs."""
    run = folder / "full" / "seed=1"
    run.mkdir(parents=True)
    (run / "ckpt.pt.partial").symlink_to("/dev/full")
    early = folder / "full" / "seed=2"  # as a run leaves it that diverges before its first checkpoint
    early.mkdir()
    (early / "log.jsonl").write_text('{"step": 0, "diverged": "with other settings"}\n')
    args = "tiny.py", "--max_iters=none", "--epochs=0.001", "--out_dir=full", "--seed=1,2"
    data = prepare_data.TokenData(folder / "data" / "d", "train", 16, 257)
    last = train.count_steps(train.Settings(epochs=0.001, batch_size=2, gradient_accumulation_steps=1), len(data))
    done = call(*args, "--overwrite", cwd=folder)
    assert done.returncode == 2 and "1 of 2 runs failed" in done.stderr.splitlines()[-1]
    assert "with --overwrite=false it keeps what the folder holds" in done.stderr.splitlines()[-1]
    assert "failed: cannot save full/seed=1/ckpt.pt: No space left on device" in done.stdout.splitlines()[1]
    assert steps(folder / "full") == {"seed=2": last}
    before = files(folder / "full" / "seed=2")
    assert call(*args, cwd=folder).returncode == 0
    assert steps(folder / "full") == {"seed=1": last, "seed=2": last} and files(folder / "full" / "seed=2") == before


def test_killed_runs_and_sweeps_go_on(folder):
    """kill -9 of a run, SIGTERM to the sweep, kill -9 of the sweep, and the end of it all."""
    args = "tiny.py", "--out_dir=killed", "--seed=1,2", "--jobs=2", "--log_interval=5", "--eval_interval=100000000"
    command = [sys.executable, ROOT / "train.py", *args, "--max_iters=100000000"]
    runs = [folder / "killed" / f"seed={seed}" for seed in (1, 2)]

    def start():
        """The sweep, and the process ids of its runs, all at a later step than they were."""
        before = {run: log(run)[-1]["step"] if run.exists() else 0 for run in runs}
        sweep = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        later = lambda run: (run / "log.jsonl").exists() and log(run)[-1]["step"] > before[run] + 5
        wait_for(lambda: all(map(later, runs)), "the runs do not train")
        table = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
        pids = {}
        for pid, parent, args in (line.split(None, 2) for line in table.splitlines()):
            if int(parent) == sweep.pid and "seed=" in args:  # the sweep can have other children
                pids[args.split("seed=")[1][0]] = int(pid)
        return sweep, pids["1"], pids["2"]

    sweep, first, second = start()
    twice = call(*args, cwd=folder)
    assert twice.returncode == 2 and "another process is training in killed" in twice.stderr
    os.kill(first, signal.SIGKILL)
    line = sweep.stderr.readline()
    while "failed" not in line:
        line = sweep.stderr.readline()
    assert line.split() == "seed=1 failed: killed by SIGKILL".split()
    sweep.send_signal(signal.SIGTERM)
    out, _ = sweep.communicate(timeout=180)
    assert sweep.returncode == 128 + signal.SIGTERM
    assert "failed: killed by SIGKILL" in out and "not finished" in out and "the same command goes on" in out
    saved = steps(folder / "killed")
    assert saved["seed=1"] == 0 and saved["seed=2"] >= 5  # the last checkpoints of the two

    sweep, *processes = start()
    begun = [(run / "train.log").read_text().count("step     0: validation loss") for run in runs]
    assert begun == [1, 1]  # they went on
    sweep.kill()
    sweep.wait()
    is_alive = lambda pid: Path(f"/proc/{pid}").exists() if Path("/proc").exists() else False
    wait_for(lambda: not any(map(is_alive, processes)), "the runs go on without their sweep")
    orphaned = steps(folder / "killed")
    assert orphaned["seed=1"] > 5 and orphaned["seed=2"] > saved["seed=2"] + 5

    last = max(orphaned.values()) + 3
    done = call(*args, f"--max_iters={last}", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert steps(folder / "killed") == {"seed=1": last, "seed=2": last}


def test_a_run_and_a_sweep_do_not_share_a_folder(swept):
    """Either would hide the other from analyze.py."""
    assert call("tiny.py", "--norm=pre", "--out_dir=lonely", cwd=swept).returncode == 0
    before = files(swept / "lonely")
    done = call("tiny.py", "--norm=pre,lns", "--out_dir=lonely", cwd=swept)
    assert done.returncode == 2 and "lonely holds a run of its own" in done.stderr and files(swept / "lonely") == before
    done = call("tiny.py", "--norm=pre", "--out_dir=out-sweep", cwd=swept)
    assert done.returncode == 2 and "out-sweep holds the runs of a sweep" in done.stderr


def test_runs_on_one_device_take_turns(tmp_path, monkeypatch, capsys):
    """Without --jobs: a device such as mps or cuda:1 is shared by all runs, the cores of a CPU are not."""
    monkeypatch.setattr(train, "train_trial", lambda trial, free, stop: setattr(trial, "outcome", "finished"))
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda _: range(4), raising=False)
    for device, n_jobs in (("mps", 1), ("cpu", 4)):
        trials = [train.Trial(tmp_path / name, {}, train.Settings(device=device)) for name in "ab"]
        train.train_trials(trials, train.StopRequest(is_main=True))
        assert f"2 runs, {n_jobs} at a time" in capsys.readouterr().err


def test_each_gpu_takes_one_run_at_a_time(tmp_path, monkeypatch):
    """Four runs on two GPUs, of those that CUDA_VISIBLE_DEVICES leaves to the sweep."""
    given, both_train = [], threading.Barrier(2)

    def train_trial(trial, free, stop):
        place = free.pop(0)
        given.append(place["CUDA_VISIBLE_DEVICES"])
        both_train.wait(timeout=60)
        trial.outcome = "finished"
        free.append(place)

    monkeypatch.setattr(train, "train_trial", train_trial)
    monkeypatch.setattr(train, "takes_any_gpu", lambda settings: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    trials = [train.Trial(tmp_path / name, {}, train.Settings()) for name in "abcd"]
    train.train_trials(trials, train.StopRequest(is_main=True))
    assert sorted(given) == ["3", "3", "5", "5"] and sorted(given[:2]) == ["3", "5"]
