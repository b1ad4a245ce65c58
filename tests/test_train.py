"""train.py as a program: a small run, what it leaves behind, and what a mistake is answered with."""

import base64
import contextlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import types
import warnings
import weakref
from unittest import mock
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from conftest import ROOT

import configurator
import prepare_data
import train
from model import GPT, SCHEMES, GPTConfig, load_checkpoint

SMALL = "--n_layer=2 --n_embd=32 --n_head=2 --block_size=32 --batch_size=4 --gradient_accumulation_steps=2 --dataset=d".split()
SHORT = "--max_iters=8 --eval_interval=4 --eval_iters=4 --log_interval=2 --warmup_iters=2 --sample_tokens=20 --device=cpu".split()


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*args, cwd):
    """What `python train.py *args` does in the folder cwd, in this process: to start one takes longer than to run."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    argv, code = ["train.py", *map(str, args)], 0
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", argv):
            try:
                configurator.run(train.main)
            except SystemExit as stop:
                code = stop.code
    texts = [stream.seek(0) or stream.read() for stream in (out, err)]
    return subprocess.CompletedProcess(argv, code, *texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data set d and a short run out-gpas_pre."""
    folder = tmp_path_factory.mktemp("run")
    words = ["north", "south", "east", "west", "norm"]
    text = "".join(f"{words[i * i % 5]} {words[i % 3]}\n" for i in range(20_000))
    (folder / "text.txt").write_text(text)
    prepare_data.prepare(prepare_data.Settings(dataset="d", input=[str(folder / "text.txt")], data_dir=str(folder / "data")))
    done = call(*SMALL, *SHORT, "--norm=gpas_pre", "--dtype=bfloat16", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
    """(step, loss, validation loss, gradient norm) of a run's log."""
    names = "step", "loss", "val_loss", "grad_norm"
    return [tuple(r.get(n) for n in names) for r in read_log(run / "log.jsonl") if "changed" not in r]


def equal(a, b):
    """Whether two nested dicts and lists hold the same to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[n], b[n]) for n in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@contextlib.contextmanager
def at_step(k, act):
    """Calls `act` when a run begins step k."""
    rate = train.learning_rate

    def learning_rate(step, settings):
        if step == k:
            act()
        return rate(step, settings)

    with mock.patch.object(train, "learning_rate", learning_rate):
        yield


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def unigram_loss(folder, dataset):
    """Cross-entropy in nats of the held-out tokens under the training tokens' frequencies, one added to each count."""

    def count(split):
        return sum(np.bincount(prepare_data.open_shard(p), minlength=257) for p in (folder / "data" / dataset).glob(f"{split}_*.bin"))

    p = (count("train") + 1) / (count("train") + 1).sum()
    return -(count("val") * np.log(p)).sum() / count("val").sum()


def test_log(folder):
    log = read_log(folder / "out-gpas_pre" / "log.jsonl")
    steps = [r["step"] for r in log if "loss" in r]
    assert steps == [2, 4, 6, 8]
    evaluations = [r for r in log if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 4, 8]
    for r in evaluations:
        assert len(r["variance"]) == len(r["gates"]) == len(r["grad_norms"]) == 2
        assert r["perplexity"] == pytest.approx(math.exp(r["val_loss"]))
        meta = prepare_data.read_meta(folder / "data" / "d")["splits"]["val"]
        assert r["bits_per_byte"] == pytest.approx(r["val_loss"] * meta["tokens"] / meta["bytes"] / math.log(2))
    assert evaluations[0]["gates"] == [0, 0] and all(evaluations[-1]["gates"])
    assert evaluations[0]["val_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert all({"lr", "grad_norm", "tokens_per_s", "gate_grad_norm"} <= r.keys() for r in log if "loss" in r)
    out = (folder / "stdout").read_text()
    assert "gradient norm" in out and "left" in out and "a sample:" in out and "bits per byte" in out


def test_checkpoint(folder):
    checkpoint = torch.load(folder / "out-gpas_pre" / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    assert checkpoint["step"] == 8 and checkpoint["tokenizer"] == {"name": "byte"}
    assert checkpoint["optimizer"]["state"] and checkpoint["settings"]["max_iters"] == 8
    assert not list((folder / "out-gpas_pre").glob("*.partial"))


def test_evaluation_and_sample_of_a_checkpoint(folder):
    log = read_log(folder / "out-gpas_pre" / "log.jsonl")
    done = call("--norm=gpas_pre", "--eval_only", "--dtype=bfloat16", "--device=cpu", cwd=folder)  # settings are the run's
    assert done.returncode == 0, done.stderr
    assert f"step 8: validation loss {log[-1]['val_loss']:.4f}" in done.stdout
    assert read_log(folder / "out-gpas_pre" / "log.jsonl") == log
    done = call("--out_dir=out-gpas_pre", "--sample=north ", "--sample_tokens=30", "--temperature=0", "--device=cpu", cwd=folder)
    assert done.returncode == 0 and done.stdout.startswith("north ") and len(done.stdout) > 30
    again = call("--out_dir=out-gpas_pre", "--sample=north ", "--sample_tokens=30", "--temperature=0", "--device=cpu", cwd=folder)
    assert again.stdout == done.stdout


def test_a_run_is_not_replaced_by_accident(folder):
    before = (folder / "out-gpas_pre" / "ckpt.pt").read_bytes()
    done = call(*SMALL, *SHORT, "--norm=gpas_pre", cwd=folder)
    assert done.returncode == 2 and "holds a run" in done.stderr
    assert (folder / "out-gpas_pre" / "ckpt.pt").read_bytes() == before


def test_resume_continues(folder):
    """Four steps and four more after a resume are the eight of an uninterrupted run, and so is the log."""
    args = [*SMALL, *SHORT, "--norm=gpas_mix", "--mix_ratio=0.5", "--dtype=float32"]
    assert call(*args, "--out_dir=whole", cwd=folder).returncode == 0
    assert call(*args, "--out_dir=parts", "--max_iters=4", "--lr_decay_iters=8", cwd=folder).returncode == 0
    with open(folder / "parts" / "log.jsonl", "a") as log:
        log.write('{"step": 4, "los')  # a line that a killed process left
    done = call("--out_dir=parts", "--init_from=resume", "--max_iters=8", "--dtype=float32", "--device=cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "max_iters: 4 before, 8 now" in done.stdout
    whole, parts = (torch.load(folder / d / "ckpt.pt", weights_only=True)["model"] for d in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert losses(folder / "whole") == losses(folder / "parts")
    assert {"step": 4, "changed": {"max_iters": [4, 8]}} in read_log(folder / "parts" / "log.jsonl")


def test_training_beats_a_unigram_model(folder):
    args = [*SMALL, *SHORT, "--norm=lns", "--max_iters=80", "--eval_interval=80", "--learning_rate=5e-3"]
    assert call(*args, cwd=folder).returncode == 0
    assert read_log(folder / "out-lns" / "log.jsonl")[-1]["val_loss"] < 0.7 * unigram_loss(folder, "d")


def test_frozen_gates_stay(folder):
    assert call(*SMALL, *SHORT, "--norm=gpas_post", "--freeze_gates", cwd=folder).returncode == 0
    assert read_log(folder / "out-gpas_post" / "log.jsonl")[-1]["gates"] == [0, 0]


def test_gates_of_another_run(folder):
    """Predefined gates (GPAS Table 5): the final ones of the first run, fixed."""
    args = [*SMALL, *SHORT, "--norm=gpas_sandwich", "--gates=out-gpas_pre"]
    assert call(*args, cwd=folder).returncode == 0
    final = read_log(folder / "out-gpas_pre" / "log.jsonl")[-1]["gates"]
    gates = [r["gates"] for r in read_log(folder / "out-gpas_sandwich" / "log.jsonl") if "variance" in r]
    assert len(gates) == 3 and all(values == pytest.approx(final) for values in gates)


# -- resume and faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i, norm", list(enumerate(SCHEMES)))
def test_exact_resume(folder, i, norm):
    """Stopped by SIGTERM after step k and resumed: every logged loss, the weights and the moments to the bit."""
    norm = ("gpas_" if i % 2 else "") + norm
    args = [*SMALL, *SHORT, f"--norm={norm}", "--dtype=float32"]
    args += ["--max_iters=6", "--eval_interval=3", "--log_interval=1"]
    args += ["--n_layer=4"] * (norm == "gpas_mix")  # a quarter of two layers is none
    assert call(*args, f"--out_dir=whole-{norm}", cwd=folder).returncode == 0
    parts = f"parts-{norm}"
    with at_step(i % 6, terminate):
        done = call(*args, f"--out_dir={parts}", cwd=folder)
    if i % 6 < 5:
        assert done.returncode == 143 and f"SIGTERM: stopped at step {i % 6 + 1}" in done.stdout
        assert f"continue with the same command and --init_from=resume --out_dir={parts}" in done.stdout
    done = call(f"--out_dir={parts}", "--init_from=resume", "--dtype=float32", "--device=cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    whole, resumed = (train.open_checkpoint(folder / d) for d in (f"whole-{norm}", parts))
    assert equal(whole["model"], resumed["model"]) and equal(whole["optimizer"], resumed["optimizer"])
    assert losses(folder / f"whole-{norm}") == losses(folder / parts)


def test_a_signal_to_a_process(folder):
    """SIGINT to the program itself: one line, 130, and a checkpoint of the step that it names; then it goes on."""
    args = [*SMALL, *SHORT, "--max_iters=100000", "--out_dir=signalled", "--log_interval=1", "--eval_interval=100000"]
    command = [sys.executable, "-u", ROOT / "train.py", *args]
    process = subprocess.Popen(command, cwd=folder, stdout=-1, stderr=-1, text=True, env=ONE_THREAD)
    while "step     3: loss" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and "SIGINT: ends after this step" in err and len(err.splitlines()) == 1
    step = train.open_checkpoint(folder / "signalled")["step"]
    assert step >= 3 and f"SIGINT: stopped at step {step}, signalled/ckpt.pt is of step {step}" in out
    done = call("--out_dir=signalled", "--init_from=resume", f"--max_iters={step + 2}", "--device=cpu", cwd=folder)
    assert done.returncode == 0 and train.open_checkpoint(folder / "signalled")["step"] == step + 2


def in_a_child(act):
    """Exit status of a forked child that does `act`."""
    child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_second_signal_ends_at_once():
    def act():
        with train.StopRequest(is_main=False).listen():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    assert os.waitstatus_to_exitcode(in_a_child(act)) == 130


def test_sigterm_twice_within_seconds_is_one_request():
    """A scheduler sends it to a process, and torchrun, which has it too, hands it on."""

    def act():
        stop = train.StopRequest(is_main=False)
        with stop.listen():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            if stop.is_asked():
                os._exit(7)

    assert os.waitstatus_to_exitcode(in_a_child(act)) == 7

    def ask_again():
        stop = train.StopRequest(is_main=False)
        with stop.listen():
            os.kill(os.getpid(), signal.SIGTERM)
            stop.since -= 6
            os.kill(os.getpid(), signal.SIGTERM)

    assert os.waitstatus_to_exitcode(in_a_child(ask_again)) == 143


@pytest.mark.parametrize("call_name, nth", [("fsync", 1), ("link", 1), ("unlink", 1), ("replace", 1)])
def test_kill_while_saving(tmp_path, call_name, nth):
    """kill -9 before any of the calls that put a checkpoint in its place: the last one, or the new one, is there."""
    for step in (1, 2):
        train.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of_step(step))
    calls, original, third = [], getattr(os, call_name), checkpoint_of_step(3)

    def kill(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    def act():
        setattr(os, call_name, kill)
        train.save_checkpoint(tmp_path / "ckpt.pt", third)

    assert os.waitstatus_to_exitcode(in_a_child(act)) == -signal.SIGKILL
    assert train.open_checkpoint(tmp_path)["step"] == 2
    train.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of_step(4))
    assert train.open_checkpoint(tmp_path)["step"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt", "ckpt_previous.pt"]


def checkpoint_of_step(step):
    config = dict(n_layer=1, n_embd=32, n_head=1, vocab_size=200, block_size=8)
    weights = {name: torch.full_like(w, float(step)) for name, w in GPT(GPTConfig(**config)).state_dict().items()}
    return {"model": weights, "optimizer": {}, "config": config, "settings": {}, "step": step, "tokenizer": None}


def test_a_disk_that_is_full(folder, tmp_path):
    """The checkpoint does not fit: the one before stays, and the message says so."""
    args = [*SMALL, *SHORT, "--max_iters=2", f"--out_dir={tmp_path}"]
    assert call(*args, cwd=folder).returncode == 0
    before, size = (tmp_path / "ckpt.pt").read_bytes(), (tmp_path / "ckpt.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        done = call(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=4", "--device=cpu", cwd=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 2 and "ckpt.pt: File too large; what was saved before is untouched" in done.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == before and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_previous_offered(folder, tmp_path, damage):
    args = [*SMALL, *SHORT, "--max_iters=6", "--eval_interval=3", "--dtype=float32", "--log_interval=1"]
    args += [f"--out_dir={tmp_path}"]
    assert call(*args, cwd=folder).returncode == 0
    before, path = losses(tmp_path), tmp_path / "ckpt.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    if damage == "remove":
        path.unlink()
    resume = [f"--out_dir={tmp_path}", "--init_from=resume", "--dtype=float32", "--device=cpu"]
    done = call(*resume, cwd=folder)
    with pytest.raises(ValueError, match="no checkpoint .*/ckpt_000009.pt; train one first, or name its folder$"):
        load_checkpoint(tmp_path / "ckpt_000009.pt")  # the one before ckpt.pt does not stand in for it
    offer = f"mv {tmp_path}/ckpt_previous.pt {path}"
    assert done.returncode == 2 and str(path) in done.stderr
    assert f"the one before it is whole, of step 3: {offer}" in done.stderr
    subprocess.run(offer.split(), check=True)
    assert call(*resume, cwd=folder).returncode == 0
    assert losses(tmp_path) == before
    with ZipFile(path) as stored, ZipFile(tmp_path / "packed.pt", "w", ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(ValueError, match="packed.pt cannot be read: ValueError it is compressed"):
        load_checkpoint(tmp_path / "packed.pt")
    (tmp_path / "ckpt_previous.pt").write_bytes(b"")
    path.write_bytes(b"")
    assert "ckpt_previous.pt cannot be read either" in call(*resume, cwd=folder).stderr


@contextlib.contextmanager
def broken_model(hook):
    """Every model that is built runs through hook(model) first."""
    build = train.build_model

    def build_model(*args, **options):
        model = build(*args, **options)
        hook(model)
        return model

    with mock.patch.object(train, "build_model", build_model):
        yield


def test_a_non_finite_value_is_traced_to_its_layer(folder, tmp_path):
    args = [*SMALL, *SHORT, "--dtype=float32", "--eval_interval=100", f"--out_dir={tmp_path}"]
    assert call(*args, "--max_iters=4", cwd=folder).returncode == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    resume = ["--init_from=resume", "--max_iters=20", f"--out_dir={tmp_path}", "--dtype=float32", "--device=cpu"]

    def forward(model):
        model.blocks[1].mlp.up_proj.register_forward_hook(lambda m, x, y: y * math.inf if m.training else y)

    def backward(model):
        def hook(module, x, y):
            if y.requires_grad:
                y.register_hook(lambda g: g * math.nan)

        model.blocks[0].attn.v_proj.register_forward_hook(hook)

    for hook, place in ((forward, "the output of blocks.1.mlp.up_proj"), (backward, "of blocks.0.attn")):
        with broken_model(hook):
            done = call(*resume, "--nan_patience=2", cwd=folder)
        assert done.returncode == 2 and "at step 6, lr" in done.stderr and "2 such steps in a row" in done.stderr
        assert place in done.stderr and "ckpt.pt is from step 4" in done.stderr and len(done.stderr.splitlines()) == 1
        assert (tmp_path / "ckpt.pt").read_bytes() == before
        skip, end = read_log(tmp_path / "log.jsonl")[-2:]
        assert skip["skipped"] == 1 and end["step"] == 6 and place in end["diverged"]

    with broken_model(backward):  # the row of skipped steps goes on where the run does
        assert call(*resume, "--max_iters=5", "--nan_patience=2", cwd=folder).returncode == 0
        done = call(*resume, "--nan_patience=2", cwd=folder)
    assert done.returncode == 2 and "at step 6, lr" in done.stderr and "2 such steps in a row" in done.stderr


def test_a_passing_non_finite_value_is_skipped(folder, tmp_path):
    """Steps 3, 4 and 6 lose their gradient: they change nothing, the others go on and end the row of skipped ones."""
    passes = []

    def hook(model):
        def forget(module, x, y):
            if module.training and y.requires_grad:
                passes.append(0)
                return y * math.nan if 4 < len(passes) <= 8 or 10 < len(passes) <= 12 else y

        model.lm_head.register_forward_hook(forget)

    args = [*SMALL, *SHORT, "--log_interval=1", "--eval_interval=100", f"--out_dir={tmp_path}"]
    with broken_model(hook), mock.patch.object(train, "stream_report", lambda *_: {}):
        done = call(*args, cwd=folder)
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "log.jsonl")
    assert [(r["step"], r["skipped"]) for r in log if "skipped" in r] == [(3, 1), (4, 2), (6, 1)]
    assert all(math.isfinite(r["loss"]) for r in log if "loss" in r) and math.isfinite(log[-1]["val_loss"])


def test_new_shards_change_the_order_of_a_run(folder, tmp_path):
    for path in (folder / "data" / "d").glob("*.bin"):  # bare shards, without a manifest
        shutil.copy(path, tmp_path)
    args = [*SMALL, *SHORT, "--max_iters=2", f"--dataset={tmp_path}", f"--out_dir={tmp_path}/run"]
    assert call(*args, "--vocab_size=257", cwd=folder).returncode == 0
    shutil.copy(tmp_path / "train_000000.bin", tmp_path / "train_000001.bin")
    with pytest.warns(match="has new shards, train_000001.bin the first: the data now come in another order"):
        assert call(*args, "--max_iters=3", "--init_from=resume", cwd=folder).returncode == 0
    with pytest.warns(match="a step now has 16 rows, and had 8: the run skips some of the data, or sees some twice"):
        call(*args, "--max_iters=3", "--init_from=resume", "--gradient_accumulation_steps=4", cwd=folder)
    with warnings.catch_warnings(action="error"):  # an evaluation takes no step
        resume = "--eval_only", "--init_from=resume", "--gradient_accumulation_steps=4"
        assert call(*args, "--max_iters=3", *resume, cwd=folder).returncode == 0


def test_weights_that_overflow_keep_the_last_good_checkpoint(folder):
    args = [*SMALL, *SHORT, "--norm=post", "--max_iters=4", "--dtype=float32"]
    assert call(*args, cwd=folder).returncode == 0
    before = (folder / "out-post" / "ckpt.pt").read_bytes()
    resume = ["--norm=post", "--init_from=resume", "--max_iters=20"]
    done = call(*resume, "--learning_rate=1e38", "--log_interval=100", cwd=folder)
    assert done.returncode == 2 and " is nan" in done.stderr and "the first value that is not finite is" in done.stderr
    assert (folder / "out-post" / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("harm, message", [(os.unlink, "has gone"), (lambda p: os.truncate(p, 2000), "has 2000 bytes")])
def test_a_shard_that_changes_is_named(folder, tmp_path, harm, message):
    data = tmp_path / "d"
    data.mkdir()
    for path in (folder / "data" / "d").iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    args = [*SMALL, *SHORT, f"--dataset={data}", f"--out_dir={tmp_path}/run"]
    with at_step(2, lambda: harm(data / "train_000000.bin")):
        done = call(*args, cwd=folder)
    assert done.returncode == 2 and f"shard {data}/train_000000.bin {message}" in done.stderr
    assert train.open_checkpoint(tmp_path / "run")["step"] == 0


# -- compilation, loggers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["gpas_mix", "lns"])
def test_one_graph_to_train_and_one_to_evaluate(folder, tmp_path, norm):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    original, after_first = torch.compile, []
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    args = [*SMALL, *SHORT, f"--norm={norm}", "--compile", f"--out_dir={tmp_path}", "--n_layer=4"]
    with mock.patch.object(torch, "compile", lambda model: original(model, backend="eager")):
        with at_step(5, lambda: after_first.append(graphs())):  # after the evaluations at 0 and 4
            done = call(*args, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert after_first == [2] and graphs() == 2
    assert "the first step took" in done.stdout and "compilation" in done.stdout


def test_experts_log_their_routers_losses(folder):
    args = [*SMALL, *SHORT, "--norm=gpas_pre", "--n_expert=4", "--out_dir=experts"]
    assert call(*args, cwd=folder).returncode == 0
    lines = [r for r in read_log(folder / "experts" / "log.jsonl") if "loss" in r]
    assert lines and all(0.9 < r["balance_loss"] < 4 and r["z_loss"] > 0 for r in lines)


def test_compiled_run_equals_the_eager_one(folder, tmp_path):
    """Through the compiler's front end; its C++ back end, a minute's work, is tests/benchmark.py's to run."""
    args = [*SMALL, *SHORT, "--norm=gpas_peri", "--dtype=float32", "--max_iters=4", "--log_interval=1", "--n_layer=1"]
    assert call(*args, f"--out_dir={tmp_path}/eager", cwd=folder).returncode == 0
    original = torch.compile
    with mock.patch.object(torch, "compile", lambda model: original(model, backend="aot_eager")):
        done = call(*args, f"--out_dir={tmp_path}/compiled", "--compile", cwd=folder)
    assert done.returncode == 0, done.stderr
    eager, compiled = (read_log(tmp_path / d / "log.jsonl")[-1] for d in ("eager", "compiled"))
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], rel=1e-5)
    names = [train.open_checkpoint(tmp_path / run)["model"].keys() for run in ("compiled", "eager")]
    assert names[0] == names[1]


def test_recomputed_blocks_change_nothing(folder, tmp_path):
    args = [*SMALL, *SHORT, "--norm=gpas_sandwich", "--dtype=float32", "--log_interval=1"]
    for name, flags in (("kept", []), ("again", ["--recompute"])):
        assert call(*args, *flags, f"--out_dir={tmp_path / name}", cwd=folder).returncode == 0
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")


def test_wandb_and_tensorboard(folder, tmp_path, monkeypatch):
    args = [*SMALL, *SHORT, "--norm=gpas_pre", "--max_iters=4"]
    logged, scalars = [], []
    board = types.SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: board))
    writer = types.SimpleNamespace(add_scalar=lambda *args: scalars.append(args))
    module = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert call(*args, "--wandb", "--tensorboard", f"--out_dir={tmp_path}/a", cwd=folder).returncode == 0
    assert [step for step, _ in logged] == [0, 2, 4, 4]
    assert {"variance/1", "variance/2", "val_loss"} <= logged[0][1].keys()
    assert ("loss", logged[1][1]["loss"], 2) in scalars
    for name, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        done = call(*args, f"--{name}", f"--out_dir={tmp_path}/{name}", cwd=folder)
        assert done.returncode == 2 and f"pip install {name}" in done.stderr and len(done.stderr.splitlines()) == 1


# -- fine-tuning, targets without loss --------------------------------------------------------------------------------


class Masked(prepare_data.TokenData):
    """TokenData without a loss on most targets, and none at all in every third row."""

    def rows(self, first, n):
        x, y = super().rows(first, n)
        y = y.copy()
        y[(x * 7 + np.arange(first, first + n)[:, None]) % 3 > 0] = -100
        y[np.arange(first, first + n) % 3 == 0] = -100
        return x, y


def test_every_token_with_a_target_weighs_the_same(folder, tmp_path):
    """The logged loss and gradient norm of a step are those of its whole batch, whatever its micro-batches are; one of
    them without a single target does no harm."""
    step = "--batch_size=1 --gradient_accumulation_steps=6 --max_iters=2 --log_interval=1".split()
    step += ["--grad_clip=0", "--dtype=float64"]
    with mock.patch.object(train, "TokenData", Masked):
        done = call(*SMALL, *SHORT, *step, f"--out_dir={tmp_path}", cwd=folder)
        assert done.returncode == 0, done.stderr
        config = GPTConfig(**train.open_checkpoint(tmp_path)["config"])
        data, val = (Masked(folder / "data" / "d", split, 32, 257, seed) for split, seed in (("train", 1337), ("val", 0)))
    model = train.build_model(config, None, train.Setup(train.Settings(), train.Processes(), torch.device("cpu"), "float64"))
    x, y = map(torch.from_numpy, data.rows(0, 6))
    loss = model(x, y)[1]
    loss.backward()
    first, record = read_log(tmp_path / "log.jsonl")[:2]
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-12)
    norm = sum((p.grad**2).sum() for p in model.parameters()).sqrt().item()
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-9)
    x, y = map(torch.from_numpy, val.rows(0, 4))  # eval_iters batches of one row
    model.zero_grad()
    assert first["val_loss"] == pytest.approx(model(x, y)[1].item(), rel=1e-12)


def test_a_step_without_targets_is_an_error(folder, tmp_path):
    class Prompts(prepare_data.TokenData):
        def rows(self, first, n):
            x, y = super().rows(first, n)
            return x, np.full_like(y, -100) if "train" in self.paths[0].name else y

    with mock.patch.object(train, "TokenData", Prompts):
        done = call(*SMALL, *SHORT, f"--out_dir={tmp_path}", cwd=folder)
    assert done.returncode == 2 and "step 0 has no token to predict" in done.stderr


@pytest.fixture(scope="module")
def examples(folder):
    """The folder with a data set sft of 60 prompts and answers of 3 to 60 bytes together, for rows of 32."""
    rows = [{"instruction": f"say {i}" + "?" * (i % 7), "input": "", "output": f"{i}" * (i % 11 + 1)} for i in range(60)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dict(dataset="sft", input=[str(folder / "sft.jsonl")], data_dir=str(folder / "data"), shape="instruction")
    prepare_data.prepare(prepare_data.Settings(**settings, val_fraction=0.1))
    return folder


EXAMPLES = [a for a in SMALL if a != "--dataset=d"] + ["--dataset=sft", "--rows=documents", "--device=cpu", "--log_interval=1"]
EIGHT_STEPS = [*EXAMPLES, "--max_iters=8", "--eval_interval=3", "--eval_iters=2", "--dtype=float64", "--sample_tokens=2"]


@pytest.mark.parametrize("norm", ["pre", "gpas_deepnorm", "peri"])
def test_a_padded_batch_is_its_examples_one_by_one(examples, norm):
    """Loss and gradients of a batch of padded rows, and of the same examples each alone and without padding."""
    data = prepare_data.TokenData(examples / "data" / "sft", "train", 32, 257, rows="documents")
    tokens = np.concatenate([prepare_data.open_shard(path) for path in data.paths]).tolist()
    mask = sum((list(path.with_suffix(".mask").read_bytes()) for path in data.paths), [])
    starts = [i for i, t in enumerate(tokens) if t == 256] + [len(tokens)]
    model = GPT(GPTConfig(n_layer=2, n_embd=32, n_head=2, block_size=32, vocab_size=257, norm=norm)).double()
    for gate in model.gates():
        torch.nn.init.normal_(gate)
    total, n_targets = 0, 0
    for a, b in zip(starts[:-1], starts[1:]):
        ids = torch.tensor(tokens[a:b] + [256])[:33]
        has_loss = torch.tensor(mask[a:b] + [1])[1:33] == 1
        losses = torch.nn.functional.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")
        total, n_targets = total + losses[has_loss].sum(), n_targets + has_loss.sum()
    (total / n_targets).backward()
    alone = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    x, y, n = train.get_batch(data, 0, len(data), torch.device("cpu"))
    assert (y == -100).sum() > y.numel() // 3 and n == n_targets and len(starts) - 1 == len(data) > 40
    loss = model(x, y)[1]
    loss.backward()
    assert loss.item() == pytest.approx((total / n_targets).item(), rel=1e-12)
    for p, grad in zip(model.parameters(), alone):
        assert torch.allclose(p.grad, grad, rtol=1e-9, atol=1e-12)


def test_tokens_of_a_run_are_its_targets(examples, tmp_path):
    """Neither padding nor prompts; to the token after a stop and a resume (and in two processes: test_ddp.py)."""
    args = EIGHT_STEPS
    assert call(*args, f"--out_dir={tmp_path}/whole", cwd=examples).returncode == 0
    with at_step(4, terminate):
        assert call(*args, f"--out_dir={tmp_path}/parts", cwd=examples).returncode == 143
    done = call("--init_from=resume", f"--out_dir={tmp_path}/parts", "--device=cpu", "--dtype=float64", cwd=examples)
    assert done.returncode == 0 and "documents of up to 32 tokens" in done.stdout
    data = prepare_data.TokenData(examples / "data" / "sft", "train", 32, 257, 1337, rows="documents")
    counts = [int((data.rows(0, 8 * step)[1] >= 0).sum()) for step in range(9)]
    for name in ("whole", "parts"):
        log = read_log(tmp_path / name / "log.jsonl")
        assert {(r["step"], r["tokens"]) for r in log} == set(enumerate(counts))
        assert train.open_checkpoint(tmp_path / name)["tokens"] == counts[-1]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    # the validation loss is over documents too
    val = prepare_data.TokenData(examples / "data" / "sft", "val", 32, 257, rows="documents")
    checkpoint = train.open_checkpoint(tmp_path / "whole")
    model = GPT(GPTConfig(**checkpoint["config"])).double()
    model.load_state_dict(checkpoint["model"])
    x, y = map(torch.from_numpy, val.rows(0, 4 * min(2, max(1, len(val) // 4))))
    assert log[-1]["val_loss"] == pytest.approx(model.eval()(x, y)[1].item(), rel=1e-9)


def test_tokens_of_windows_are_all(folder):
    log = read_log(folder / "out-gpas_pre" / "log.jsonl")
    assert all(r["tokens"] == r["step"] * 4 * 2 * 32 for r in log)


def test_a_length_in_epochs(examples, tmp_path):
    """max_iters, else epochs, else max_tokens; counted from the rows, also where a run goes on and in a dry run."""
    n = len(prepare_data.TokenData(examples / "data" / "sft", "train", 32, 257, rows="documents"))
    rows = lambda epochs: math.ceil(epochs * n / 8)  # steps of 4 x 2 rows
    args = [*EXAMPLES, "--eval_interval=100", "--eval_iters=1", "--sample_tokens=2"]
    length = lambda: train.open_checkpoint(tmp_path)["step"]
    assert call(*args, "--epochs=1", "--max_tokens=99999", f"--out_dir={tmp_path}", cwd=examples).returncode == 0
    assert length() == rows(1) == train.open_checkpoint(tmp_path)["settings"]["max_iters"]
    resume = ["--init_from=resume", f"--out_dir={tmp_path}", "--device=cpu"]
    for given, steps in (
        (["--epochs=1.5"], rows(1.5)),
        ([f"--max_tokens={(rows(1.5) + 1) * 8 * 32}"], rows(1.5) + 1),
        (["--epochs=2"], rows(2)),
        (["--epochs=9", f"--max_iters={rows(2) + 2}"], rows(2) + 2),
        (["--epochs=none"], rows(2) + 2),
    ):
        assert call(*resume, *given, cwd=examples).returncode == 0 and length() == steps
    assert "train_000000.mask" in train.open_checkpoint(tmp_path)["shards"]  # watched too: a mask is mapped as well
    done = call(*args, "--epochs=3", "--dry_run", cwd=examples)
    assert done.returncode == 0 and f"  {rows(3)} steps of 256 tokens" in done.stdout
    done = call(*args, "--epochs=3", "--dry_run", "--rows=windows", "--dataset=d", cwd=examples)
    windows = len(prepare_data.TokenData(examples / "data" / "d", "train", 32, 257))
    assert f"  {math.ceil(3 * windows / 8):,} steps of 256 tokens" in done.stdout
    shape = train.Settings(epochs=0.1, batch_size=1, gradient_accumulation_steps=1)
    assert train.count_steps(shape, 30) == 3 and train.count_steps(shape, 31) == 4 and train.count_steps(shape, 3) == 1
    shape.epochs = 1.1  # of which 10 rows are 11.000000000000002
    assert train.count_steps(shape, 10) == 11
    assert train.Settings(epochs=2.0, max_iters=5).max_iters == 5


def test_a_length_in_tokens():
    shape = dict(batch_size=4, gradient_accumulation_steps=3, block_size=10)  # 120 tokens a step
    assert train.Settings().max_iters == 280
    assert train.Settings(**shape, max_tokens=1190).max_iters == 10 and train.Settings(**shape, max_tokens=1).max_iters == 1
    assert train.Settings(**shape, max_tokens=1190, max_iters=7).max_iters == 7


def test_resuming_with_a_length_in_tokens(folder, tmp_path):
    args = [*SMALL, *SHORT, f"--out_dir={tmp_path}"]
    assert call(*args, "--max_iters=2", cwd=folder).returncode == 0
    done = call("--init_from=resume", f"--out_dir={tmp_path}", f"--max_tokens={4 * 4 * 2 * 32}", "--device=cpu", cwd=folder)
    assert done.returncode == 0 and train.open_checkpoint(tmp_path)["step"] == 4


def test_a_run_of_earlier_code(folder, tmp_path):
    """tests/old_run was trained by the code before it was rearranged: it loads, gives the same logits, and goes on."""
    for file in ("ckpt.pt", "log.jsonl"):
        shutil.copy(ROOT / "tests" / "old_run" / file, tmp_path)
    expected = json.loads((ROOT / "tests" / "old_run" / "expected.json").read_text())
    checkpoint = train.open_checkpoint(tmp_path)
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    logits = model.eval()(torch.tensor(expected["idx"]))[0][0, -1]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-5)
    step = checkpoint["step"]
    shutil.copytree(folder / "data" / "d", tmp_path / "other")  # its own data set is gone
    again = [f"--out_dir={tmp_path}", f"--dataset={tmp_path}/other", "--device=cpu"]
    done = call(*again, "--init_from=resume", f"--max_iters={step + 2}", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert train.open_checkpoint(tmp_path)["step"] == step + 2
    assert read_log(tmp_path / "log.jsonl")[0] == read_log(ROOT / "tests" / "old_run" / "log.jsonl")[0]
    assert f"step {step + 2}: validation loss" in call(*again, "--eval_only", cwd=folder).stdout


def test_checkpoints_that_stay(folder, tmp_path):
    done = call(*SMALL, *SHORT, "--keep_every=3", f"--out_dir={tmp_path}", cwd=folder)
    assert done.returncode == 0
    kept = sorted(p.name for p in tmp_path.glob("ckpt_0*.pt"))
    assert kept == ["ckpt_000000.pt", "ckpt_000003.pt", "ckpt_000006.pt"]
    assert [train.open_checkpoint(tmp_path / name)["step"] for name in kept] == [0, 3, 6]


def test_the_last_evaluation_may_take_the_whole_held_out_set(folder, tmp_path):
    with mock.patch.object(train, "evaluate", wraps=train.evaluate) as evaluate:
        args = [*SMALL, *SHORT, "--last_eval_iters=0", "--dtype=float64", f"--out_dir={tmp_path}"]
        assert call(*args, cwd=folder).returncode == 0
    assert [c.args[-1] for c in evaluate.call_args_list] == [4, 4, 0]
    data = prepare_data.TokenData(folder / "data" / "d", "val", 32, 257)
    checkpoint = train.open_checkpoint(tmp_path)
    model = GPT(GPTConfig(**checkpoint["config"])).double()
    model.load_state_dict(checkpoint["model"])
    x, y = map(torch.from_numpy, data.rows(0, len(data) // 4 * 4))
    assert checkpoint["val_loss"] == pytest.approx(model.eval()(x, y)[1].item(), rel=1e-9)
    done = call("--eval_only", f"--out_dir={tmp_path}", "--device=cpu", "--dtype=float64", cwd=folder)
    assert f"step 8: validation loss {checkpoint['val_loss']:.4f}" in done.stdout
    with mock.patch.object(train, "evaluate", wraps=train.evaluate) as evaluate:
        call("--eval_only", f"--out_dir={tmp_path}", "--device=cpu", "--eval_iters=3", cwd=folder)
    assert [c.args[-1] for c in evaluate.call_args_list] == [3]
    # a batch that is larger than the held-out set holds each of its rows once
    few = prepare_data.TokenData(folder / "data" / "d", "val", 32 * (len(data) // 3), 257)
    setup = train.Setup(train.Settings(batch_size=2 * len(few) + 1), train.Processes(), torch.device("cpu"), "float32")
    mean = mock.Mock(side_effect=lambda x, y: (None, y.double().mean()))  # in place of a model
    expected = few.rows(0, len(few))[1].mean()
    assert len(few) > 1 and train.evaluate(mean, few, setup, 5) == pytest.approx(expected, rel=1e-12)


def test_gradient_norms_of_layers_at_each_line(folder, tmp_path):
    args = "--max_iters=1 --log_interval=1 --gradient_accumulation_steps=1 --dtype=float64 --norm=gpas_pre".split()
    assert call(*SMALL, *SHORT, *args, f"--out_dir={tmp_path}", cwd=folder).returncode == 0
    record = next(r for r in read_log(tmp_path / "log.jsonl") if "loss" in r)
    config = GPTConfig(**train.open_checkpoint(tmp_path)["config"])
    model = train.build_model(config, None, train.Setup(train.Settings(), train.Processes(), torch.device("cpu"), "float64"))
    data = prepare_data.TokenData(folder / "data" / "d", "train", 32, 257, 1337)
    model(*map(torch.from_numpy, data.rows(0, 4)))[1].backward()
    norms = [sum((p.grad**2).sum() for p in block.parameters()).sqrt().item() for block in model.blocks]
    assert record["step_grad_norms"] == pytest.approx(norms, rel=1e-9)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers(folder, tmp_path, name):
    """Two steps equal torch's own optimizer on the same gradients, and a resumed run the undisturbed one."""
    args = f"--optimizer={name} --max_iters=2 --warmup_iters=0 --lr_decay_iters=0 --min_lr=0.01 --learning_rate=0.01".split()
    args += f"--gradient_accumulation_steps=1 --grad_clip=0 --dtype=float64 --weight_decay={name == 'adamw':d}".split()
    assert call(*SMALL, *SHORT, *args, f"--out_dir={tmp_path}/whole", cwd=folder).returncode == 0
    trained = train.open_checkpoint(tmp_path / "whole")
    setup = train.Setup(train.Settings(), train.Processes(), torch.device("cpu"), "float64")
    model = train.build_model(GPTConfig(**trained["config"]), None, setup)
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == decay], "weight_decay": decay} for decay in (0, 1)]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), 0.01),
        "adam": lambda: torch.optim.Adam(model.parameters(), 0.01, betas=(0.9, 0.95)),
        "adamw": lambda: torch.optim.AdamW(groups, 0.01, betas=(0.9, 0.95)),
    }[name]()
    data = prepare_data.TokenData(folder / "data" / "d", "train", 32, 257, 1337)
    for step in range(2):
        model(*map(torch.from_numpy, data.rows(4 * step, 4)))[1].backward()
        optimizer.step(), optimizer.zero_grad()
    for n, p in model.named_parameters():
        torch.testing.assert_close(trained["model"][n], p.detach(), rtol=1e-6, atol=1e-9)
    assert call(*SMALL, *SHORT, *args, "--max_iters=1", f"--out_dir={tmp_path}/parts", cwd=folder).returncode == 0
    resume = ["--init_from=resume", f"--out_dir={tmp_path}/parts", "--device=cpu", "--dtype=float64"]
    assert call(*resume, "--max_iters=2", cwd=folder).returncode == 0
    assert equal(train.open_checkpoint(tmp_path / "parts")["model"], trained["model"])
    done = call(*resume, f"--optimizer={'sgd' if name == 'adamw' else 'adamw'}", cwd=folder)
    assert done.returncode == 2 and "optimizer is set where a run begins" in done.stderr


def test_two_steps_by_hand(folder, tmp_path):
    """The rate warms up; the gates are clipped apart from the rest."""
    args = "--norm=gpas_pre --optimizer=sgd --max_iters=2 --warmup_iters=4 --learning_rate=0.4 --log_interval=1".split()
    args += "--grad_clip=0.01 --gate_clip=1e-6 --weight_decay=0 --gradient_accumulation_steps=1 --dtype=float64".split()
    assert call(*SMALL, *SHORT, *args, f"--out_dir={tmp_path}", cwd=folder).returncode == 0
    trained = train.open_checkpoint(tmp_path)
    records = [r for r in read_log(tmp_path / "log.jsonl") if "loss" in r]
    setup = train.Setup(train.Settings(), train.Processes(), torch.device("cpu"), "float64")
    model = train.build_model(GPTConfig(**trained["config"]), None, setup)
    data = prepare_data.TokenData(folder / "data" / "d", "train", 32, 257, 1337)
    for step, rate in enumerate((0.1, 0.2)):
        model(*map(torch.from_numpy, data.rows(4 * step, 4)))[1].backward()
        for are_gates, largest, key in ((True, 1e-6, "gate_grad_norm"), (False, 0.01, "grad_norm")):
            ps = [p for n, p in model.named_parameters() if n.endswith(".gate") == are_gates]
            norm = math.sqrt(sum((p.grad**2).sum().item() for p in ps))
            assert norm > largest and records[step][key] == pytest.approx(norm, rel=1e-9)
            for p in ps:
                p.data -= rate * p.grad * largest / (norm + 1e-6)  # the 1e-6 is clip_grad_norm_'s
        model.zero_grad()
    for n, p in model.named_parameters():
        torch.testing.assert_close(trained["model"][n], p.detach(), rtol=1e-9, atol=1e-12)


def test_the_seed_draws_the_weights_and_orders_the_data(folder, tmp_path):
    args = "--seed=5 --max_iters=1 --log_interval=1 --gradient_accumulation_steps=1 --dtype=float64".split()
    assert call(*SMALL, *SHORT, *args, f"--out_dir={tmp_path}", cwd=folder).returncode == 0
    config = GPTConfig(**train.open_checkpoint(tmp_path)["config"])
    torch.manual_seed(5)
    model = GPT(config).double()
    x, y = map(torch.from_numpy, prepare_data.TokenData(folder / "data" / "d", "train", 32, 257, 5).rows(0, 4))
    record = next(r for r in read_log(tmp_path / "log.jsonl") if "loss" in r)
    assert record["loss"] == pytest.approx(model(x, y)[1].item(), rel=1e-9)


def test_the_held_out_loss_is_the_cross_entropy_alone():
    ids = np.random.default_rng(0).integers(0, 11, (4, 9))
    rows = mock.MagicMock(rows=lambda first, n: (ids[first : first + n, :-1], ids[first : first + n, 1:]))
    rows.__len__.return_value = 4
    sizes = dict(block_size=8, vocab_size=11, n_layer=2, n_embd=16, n_head=2, n_expert=4)
    model = GPT(GPTConfig(balance_weight=1.0, head_z_weight=1.0, **sizes)).double()
    setup = train.Setup(train.Settings(batch_size=2), train.Processes(), torch.device("cpu"), "float32")
    logits = model(torch.from_numpy(ids[:, :-1]))[0].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[:, 1:]).flatten()).item()
    assert train.evaluate(model, rows, setup, 0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gates", [False, True])
def test_pure_bfloat16(folder, tmp_path, gates):
    """All weights are bfloat16 but, with float32_gates, the gates; steps of 1e-4 leave a bfloat16 gate of 1 where it is
    (GPAS section 5.1: its spacing there is 2^-8)."""
    args = "--norm=gpas_peri --dtype=bfloat16_pure --gate_init=1 --learning_rate=1e-4 --warmup_iters=0".split()
    done = call(*SMALL, *SHORT, *args, f"--float32_gates={gates}", f"--out_dir={tmp_path}", cwd=folder)
    assert done.returncode == 0, done.stderr
    weights = train.open_checkpoint(tmp_path)["model"]
    is_gate = lambda name: name.endswith(".gate")
    assert all(w.dtype == (torch.float32 if gates and is_gate(n) else torch.bfloat16) for n, w in weights.items())
    assert all((w != 1).all() if gates else (w == 1).all() for n, w in weights.items() if is_gate(n))
    assert weights["blocks.0.mlp.up_proj.weight"].isfinite().all()
    resume = ["--init_from=resume", f"--out_dir={tmp_path}", "--device=cpu", "--dtype=bfloat16_pure", "--max_iters=10"]
    assert call(*resume, cwd=folder).returncode == 0


def test_picture_of_the_layers():
    text = train.picture({"variance": [1.0, 4.0], "gates": [0.5, [-0.25, 0.125]]}, width=8)
    assert text.splitlines()[1:] == ["    1  ##                1  +0.500", "    2  ########          4  -0.250  +0.125"]


def test_fine_tuning(folder):
    """From a checkpoint's weights, with a schedule of its own and the gates frozen; then resumed as any run."""
    base = train.open_checkpoint(folder / "out-gpas_pre")
    args = "--dataset=d --max_iters=4 --batch_size=4 --eval_iters=4 --log_interval=1".split()
    args += ["--dtype=bfloat16", "--device=cpu"]
    done = call("--init_from=out-gpas_pre", *args, "--learning_rate=1e-3", cwd=folder)
    assert done.returncode == 0, done.stderr
    run = folder / "out-gpas_pre-finetuned"
    tuned, log = train.open_checkpoint(run), read_log(run / "log.jsonl")
    assert log[0]["val_loss"] == read_log(folder / "out-gpas_pre" / "log.jsonl")[-1]["val_loss"]
    assert tuned["step"] == 4
    assert tuned["config"] == base["config"] and tuned["settings"]["warmup_iters"] == 30  # not the base's 2
    for name, w in tuned["model"].items():
        assert torch.equal(w, base["model"][name]) == name.endswith("gate"), name
    resume = ["--init_from=resume", f"--out_dir={run.name}", "--max_iters=6", "--dtype=bfloat16", "--device=cpu"]
    assert call(*resume, cwd=folder).returncode == 0
    assert read_log(run / "log.jsonl")[-1]["gates"] == log[0]["gates"]
    args += ["--block_size=16"]
    thawed = call("--init_from=out-gpas_pre/ckpt.pt", *args, "--freeze_gates=false", "--out_dir=thawed", cwd=folder)
    assert thawed.returncode == 0, thawed.stderr
    assert read_log(folder / "thawed" / "log.jsonl")[-1]["gates"] != log[0]["gates"]
    done = call("--init_from=out-gpas_pre", *args, "--n_layer=3", "--out_dir=other", cwd=folder)
    assert done.returncode == 2 and "out-gpas_pre is a model of n_layer 2 (given 3)" in done.stderr


def test_lisa_drops_what_exchanged_gradients_before_it_draws_anew(folder, tmp_path, monkeypatch):
    """A DDP holds buffers as large as the gradients, and is part of a reference cycle."""
    nets = []

    class Exchange(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.cycle = model, [self]
            assert all(net() is None for net in nets)
            nets.append(weakref.ref(self))

        def forward(self, *batch):
            return self.model(*batch)

    monkeypatch.setattr(train, "exchange_gradients", lambda model, setup: Exchange(model))
    args = [*SMALL, *SHORT, "--norm=gpas_pre", "--lisa_layers=1", "--lisa_interval=2", f"--out_dir={tmp_path}"]
    assert call(*args, cwd=folder).returncode == 0
    assert len(nets) == 5


def test_lisa(folder):
    """Two of six layers, the embedding and the head move in four steps of one draw; a resume draws the same."""
    args = [*SMALL, *SHORT, "--norm=gpas_pre", "--n_layer=6", "--dtype=float32", "--log_interval=1"]
    args += ["--lisa_layers=2", "--lisa_interval=4"]
    assert call(*args, "--max_iters=0", "--out_dir=lisa0", cwd=folder).returncode == 0
    assert call(*args, "--out_dir=lisa8", cwd=folder).returncode == 0
    with at_step(5, terminate):
        assert call(*args, "--out_dir=lisa", cwd=folder).returncode == 143
    with at_step(3, terminate):
        assert call(*args, "--out_dir=lisa4", cwd=folder).returncode == 143
    start, after = (train.open_checkpoint(folder / d)["model"] for d in ("lisa0", "lisa4"))
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    moved = {name.split(".")[1] if name.startswith("blocks") else name for name in moved}
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight"} < moved and len(moved) == 5
    assert call("--out_dir=lisa", "--init_from=resume", "--dtype=float32", "--device=cpu", cwd=folder).returncode == 0
    assert losses(folder / "lisa") == losses(folder / "lisa8")
    last = train.open_checkpoint(folder / "lisa8")
    assert equal(last["model"], train.open_checkpoint(folder / "lisa")["model"])
    n_moments = len(last["optimizer"]["state"])
    assert n_moments == 3 + 2 * len([n for n in start if n.startswith("blocks.0.")])  # none of what is frozen


def test_lisa_draws_anew_and_thaws_nothing_that_is_frozen():
    sizes = dict(norm="gpas_pre", n_layer=6, n_embd=8, n_head=2)
    model, counts = GPT(GPTConfig(**sizes)), [0] * 6
    for gate in model.gates():
        gate.requires_grad_(False)
    trained = {p for p in model.parameters() if p.requires_grad}
    settings = train.Settings(lisa_layers=2, lisa_interval=4, **sizes)
    for step in range(0, 400, 4):
        train.draw_layers(model, torch.optim.SGD(model.parameters(), 1.0), step, settings, trained)
        drawn = [i for i, block in enumerate(model.blocks) if block.mlp.up_proj.weight.requires_grad]
        assert len(drawn) == 2 and not any(gate.requires_grad for gate in model.gates())
        for i in drawn:
            counts[i] += 1
    assert min(counts) > 15  # of 100 draws; 33 is expected, with a deviation of 5


# -- data that others made, mistakes ----------------------------------------------------------------------------------


def test_bare_shards_train(folder):
    """Shards without meta.json, as llm.c and modded-nanogpt write them, need only the vocabulary's size."""
    bare = folder / "elsewhere"
    bare.mkdir()
    for split in ("train", "val"):
        (bare / f"fineweb_{split}_000000.bin").write_bytes((folder / "data" / "d" / f"{split}_000000.bin").read_bytes())
    args = [*SMALL, *SHORT, "--max_iters=2", f"--dataset={bare}"]
    done = call(*args, cwd=folder)
    assert done.returncode == 2 and "--vocab_size=N" in done.stderr
    done = call(*args, "--vocab_size=300", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "bits_per_byte" not in read_log(folder / "out-pre" / "log.jsonl")[0]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--norm=rms"], "unknown norm 'rms'; known: post, pre, sandwich"),
        (["--n_embed=64"], "unknown setting --n_embed; did you mean n_embd"),
        (["--max_iters=many"], "--max_iters expects int or none, got 'many'"),
        (["--n_embd=30", "--n_head=4"], "n_embd 30 is not divisible by n_head 4"),
        (["--n_head=2", "--n_kv_head=3"], "n_head 2 is not divisible by n_kv_head 3"),
        (["--dataset=nowhere"], "no data set 'nowhere'"),
        (["--block_size=100000"], "block_size 100000 is longer than the"),
        (["--vocab_size=100"], "vocab_size 100 is smaller than the 257"),
        (["--dtype=float8"], "unknown dtype 'float8'"),
        (["--device=cuda:77"], "device 'cuda:77' cannot be used"),
        (["--init_from=gpt2"], "no checkpoint gpt2/ckpt.pt"),
        (["--init_from=resume", "--out_dir=nothing"], "no checkpoint nothing/ckpt.pt"),
        (["--eval_only", "--out_dir=damaged"], "checkpoint damaged/ckpt.pt cannot be read"),
        (["--sample=x", "--out_dir=code"], "checkpoint code/ckpt.pt cannot be read: UnpicklingError"),
        (["--init_from=resume", "--out_dir=code"], "checkpoint code/ckpt.pt cannot be read: UnpicklingError"),
        (["--init_from=code"], "checkpoint code/ckpt.pt cannot be read: UnpicklingError"),
        (["--shard"], "torchrun --nproc_per_node=N"),
        (["--lisa_layers=3"], "lisa_layers is 3; the model has 2 layers"),
        (["--lisa_layers=1", "--compile"], "does not go with compile"),
        (["--nan_patience=0"], "nan_patience is 0"),
        (["--dry_run", "--gpus=3"], "gradient_accumulation_steps 2 cannot be shared by 3 GPUs"),
        (["--eval_only", "--init_from=out-gpas_pre"], "init_from begins a run: leave it out"),
        (["--norm=gpas_pre", "--dtype=bfloat16_pure", "--float32_gates", "--shard"], "does not go with shard"),
        (["--gpus=8"], "gpus has no effect without dry_run: torchrun --nproc_per_node=8"),
        (["--dataset=truncated", "--vocab_size=257"], "truncated or damaged"),
        (["--dataset=other", "--vocab_size=257"], "is not a token shard"),
        (["--dataset=large", "--vocab_size=257"], "does not fit the vocabulary of 257"),
        (["--batch_size=0"], "batch_size is 0"),
        (["--max_iters=none", "--dataset=nowhere", "--epochs=1", "--dry_run"], "no data set 'nowhere'"),
        (["--epochs=0"], "epochs is 0.0; it must be at least 1e-06"),
        (["--epochs=nan"], "--epochs expects float or none, got 'nan'"),
        (["--rows=pages"], "unknown rows 'pages'; known: windows, documents"),
        (["--dataset=large", "--vocab_size=257", "--rows=documents"], "rows=documents needs the end-of-text token"),
        (["--out_dir=text.txt"], "out_dir text.txt is a file; it must be a folder"),
        (["--init_from=resume", "--out_dir=out-gpas_pre/ckpt.pt"], "ckpt.pt is a file; it must be a folder"),
        (["--init_from=resume", "--out_dir=out-gpas_pre", "--max_iters=3"], "is at step 8, beyond max_iters 3"),
        (["--eval_only", "--sample=x", "--out_dir=out-gpas_pre"], "eval_only and sample are two things"),
        (["--init_from=resume", "--out_dir=out-gpas_pre", "--n_layer=3"], "out-gpas_pre is a model of n_layer 2 (given 3)"),
        (["--eval_only", "--out_dir=out-gpas_pre", "--overwrite"], "does not go with"),
        (["--freeze_gates"], "freeze_gates=True has no effect: norm pre has no gates"),
        (["--norm=gpas_pre", "--gates=0.1,0.2,0.3"], "3 gate values for the 2 gates"),
        (["--norm=gpas_pre", "--gates=nowhere"], "gates is 'nowhere'; it must be a number, 2 numbers"),
        (["--norm=gpas_pre", "--gates="], "gates is ''; it must be a number, 2 numbers"),
        (["--norm=gpas_pre", "--gates=nan"], "gates must be finite"),
        (["--norm=gpas_pre", "--gate_init=inf"], "gate_init is inf; it must be at least"),
        (["--n_layer=99999999999999999999"], "n_layer is 99999999999999999999; it must be at least 1 and at most 2147483647"),
        (["--learning_rate=1e-4", "--min_lr=1e-3"], "min_lr 0.001 is above learning_rate 0.0001"),
        (["--init_std=1e30"], "is nan at step 0"),
        (["--min_lr=-1"], "min_lr is -1.0"),
        (["--optimizer=lion"], "unknown optimizer 'lion'; known: adamw, adam, sgd"),
        (["--norm=gpas_pre", "--float32_gates"], "it needs dtype=bfloat16_pure"),
        (["--n_embd=200000000"], "cannot be built"),
    ],
    ids=str,
)
def test_mistakes_end_in_one_line_and_2(folder, monkeypatch, capsys, args, message):
    class Code:
        def __reduce__(self):
            return (print, ("code in a checkpoint ran",))

    for name in ("damaged", "code", "data/truncated", "data/other", "data/large"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "damaged" / "ckpt.pt").write_bytes((folder / "out-gpas_pre" / "ckpt.pt").read_bytes()[:5000])
    torch.save({"model": Code()}, folder / "code" / "ckpt.pt")
    shard = (folder / "data" / "d" / "train_000000.bin").read_bytes()
    for split in ("train", "val"):
        (folder / "data" / "truncated" / f"{split}_000000.bin").write_bytes(shard[:-100])
        (folder / "data" / "other" / f"{split}_000000.bin").write_bytes(b"PAR1" + shard[4:])
        (folder / "data" / "large" / f"{split}_000000.bin").write_bytes(shard[:1024] + b"\xff\x7f" * ((len(shard) - 1024) // 2))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *SHORT, "--out_dir=fresh", *args])
    with pytest.raises(SystemExit) as stop:
        configurator.run(train.main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert "code in a checkpoint ran" not in out


def prepare_in_another_tokenizer(folder, text):
    """A data set by a tokenizer of as many tokens as the byte one has, which numbers them from the other end."""
    path = folder.with_name("reversed.tiktoken")
    path.write_text("".join(f"{base64.b64encode(bytes([255 - i])).decode()} {i}\n" for i in range(256)))
    settings = dict(dataset=folder.name, data_dir=str(folder.parent), input=[str(text)], tokenizer=str(path))
    prepare_data.prepare(prepare_data.Settings(**settings))


def test_a_failing_start_leaves_the_run_that_was_there(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "out-gpas_pre", run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    args = [*SMALL, *SHORT, "--norm=gpas_pre", f"--out_dir={run}", "--overwrite"]
    done = call(*args, "--rope_theta=1e-300", cwd=folder)
    assert done.returncode == 2 and "nothing was saved yet, the run that was there is untouched" in done.stderr
    with mock.patch.dict(sys.modules, {"wandb": None}):
        assert call(*args, "--wandb", cwd=folder).returncode == 2
    (run / "ckpt.pt.partial").symlink_to("/dev/full")
    done = call(*args, cwd=folder)
    assert done.returncode == 2 and "No space left on device" in done.stderr
    (run / "ckpt.pt.partial").unlink(missing_ok=True)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert call(*args, cwd=folder).returncode == 0
    assert (run / "log_previous.jsonl").read_bytes() == before["log.jsonl"]
    assert read_log(run / "log.jsonl")[-1]["step"] == 8


def test_what_has_no_effect_is_told(folder):
    with pytest.warns(UserWarning, match="jobs has no effect: no setting is a list of values"):
        assert call(*SMALL, "--jobs=2", "--dry_run", cwd=folder).returncode == 0
    with pytest.warns(UserWarning, match="max_tokens has no effect, max_iters 3 counts: or give --max_iters=none"):
        done = call(*SMALL, "--max_iters=3", "--max_tokens=9999", "--dry_run", cwd=folder)
    assert done.returncode == 0 and "3 steps" in done.stdout
    with warnings.catch_warnings(action="error"):
        assert call(*SMALL, "--max_iters=none", "--max_tokens=9999", "--dry_run", cwd=folder).returncode == 0


def test_a_run_goes_on_by_the_same_command_or_without_its_settings(folder, tmp_path):
    """Its precision is the run's; a vocabulary of 0, which leaves it to the data, does not contradict the run."""
    run = f"--out_dir={tmp_path}"
    command = [*SMALL, *SHORT, "--max_iters=2", "--dtype=bfloat16_pure", "--vocab_size=0", "--n_kv_head=none", run]
    assert call(*command, cwd=folder).returncode == 0
    done = call(*command, "--max_iters=4", "--init_from=resume", cwd=folder)
    assert done.returncode == 0 and "max_iters: 2 before, 4 now" in done.stdout and "vocab_size" not in done.stdout
    assert call("--max_iters=6", "--device=cpu", "--init_from=resume", run, cwd=folder).returncode == 0
    saved = load_checkpoint(tmp_path)
    assert saved["step"] == 6 and saved["model"]["lm_head.weight"].dtype == torch.bfloat16


def test_what_a_fine_tuned_run_has_decided_stays(folder, tmp_path):
    """freeze_gates=none froze the gates of a fine-tuned run: they stay frozen when it goes on."""
    (tmp_path / "tuning.py").write_text("freeze_gates = None\n")
    command = [tmp_path / "tuning.py", *SMALL, *SHORT, "--init_from=out-gpas_pre", f"--out_dir={tmp_path / 'run'}"]
    assert call(*command, "--max_iters=2", cwd=folder).returncode == 0
    done = call(*command, "--max_iters=4", "--init_from=resume", cwd=folder)
    assert done.returncode == 0 and "freeze_gates" not in done.stdout
    assert load_checkpoint(tmp_path / "run")["settings"]["freeze_gates"] is True


def test_a_new_length_replaces_that_of_the_run(folder, tmp_path):
    run = f"--out_dir={tmp_path}"
    assert call(*SMALL, *SHORT, "--max_iters=none", "--epochs=0.002", run, cwd=folder).returncode == 0
    assert load_checkpoint(tmp_path)["step"] == 2
    longer = ["--init_from=resume", run, "--device=cpu", "--max_iters=none", "--max_tokens=1024"]  # 4 steps of 256
    assert call(*longer, cwd=folder).returncode == 0
    assert load_checkpoint(tmp_path)["step"] == 4


def test_no_scaling_is_not_the_scaling_of_the_run(folder, tmp_path):
    (tmp_path / "scaled.py").write_text('rope_scaling = {"rope_type": "linear", "factor": 2.0}\n')
    run = f"--out_dir={tmp_path / 'run'}"
    assert call(tmp_path / "scaled.py", *SMALL, *SHORT, "--max_iters=1", run, cwd=folder).returncode == 0
    done = call("--eval_only", "--rope_scaling=none", run, cwd=folder)
    assert done.returncode == 2 and "is a model of rope_scaling" in done.stderr


def test_a_new_run_takes_the_stages_of_the_earlier_one_away(folder, tmp_path):
    args = [*SMALL, *SHORT, f"--out_dir={tmp_path}", "--max_iters=2", "--device=cpu"]
    assert call(*args, "--keep_every=1", cwd=folder).returncode == 0
    assert call(*args, "--keep_every=2", "--overwrite", cwd=folder).returncode == 0
    assert sorted(path.name for path in tmp_path.glob("ckpt_0*.pt")) == ["ckpt_000000.pt", "ckpt_000002.pt"]
    shutil.copy(tmp_path / "ckpt_000002.pt", tmp_path / "ckpt_best.pt")
    stage = f"--init_from={tmp_path}/ckpt_000002.pt"
    done = call(*args, stage, "--overwrite", cwd=folder)
    assert done.returncode == 2 and "ckpt_000002.pt: name another folder" in done.stderr
    done = call(*args, f"--init_from={tmp_path}", "--overwrite", cwd=folder)
    assert done.returncode == 2 and f"overwrite would remove {tmp_path}: name another folder" in done.stderr
    here = [*args, "--overwrite", "--out_dir=.", f"--data_dir={folder / 'data'}"]
    assert call(*here, cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.glob("ckpt_*.pt")) == ["ckpt_best.pt", "ckpt_previous.pt"]


def test_a_disk_that_fails_at_the_end_leaves_both_checkpoints(tmp_path):
    for step in (1, 2):
        train.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of_step(step))
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(configurator.UserError, match="No space left on device; what was saved before is untouched"):
            train.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of_step(3))
    assert [load_checkpoint(tmp_path / name)["step"] for name in ("ckpt.pt", "ckpt_previous.pt")] == [2, 1]


def test_a_device_of_cuda_has_an_index(monkeypatch):
    """torch.cuda.set_device refuses torch.device("cuda"), which "auto" is on a machine with one."""
    used = []
    set_device = lambda device: used.append(torch.cuda._utils._get_device_index(device))
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(ValueError):
        set_device(torch.device("cuda"))
    # torch looks at the device that was set: here the second one alone is fast at bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: used[-1] == 1)
    for name, dtype in (("cuda", "float32"), ("cuda:1", "bfloat16")):
        monkeypatch.setattr(train, "find_device", lambda _: torch.device(name))
        assert train.set_up(train.Settings(), train.Processes()).dtype == dtype
    assert used == [0, 1]


def test_a_file_system_without_links(tmp_path):
    """The second name is a copy then, whole or not at all."""
    for step in (1, 2):
        train.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of_step(step))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with mock.patch("os.link", side_effect=OSError):
        with mock.patch("shutil.copyfileobj", side_effect=OSError("disk full")):
            with pytest.raises(configurator.UserError, match="cannot save .*/ckpt_previous.pt: disk full"):
                train.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of_step(3))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
        train.save_checkpoint(tmp_path / "ckpt.pt", checkpoint_of_step(3))
    assert (tmp_path / "ckpt_previous.pt").read_bytes() == files["ckpt.pt"]
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3


def test_two_names_of_one_file(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    for _ in range(2):
        train.give_second_name(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_report_takes_no_more_sequences_than_a_batch(folder, tmp_path):
    sizes = []
    with mock.patch.object(train, "stream_report", lambda model, x, y, setup: sizes.append(len(x)) or {"variance": [1.0, 1.0]}):
        assert call(*SMALL, *SHORT, "--batch_size=3", "--max_iters=1", f"--out_dir={tmp_path}", cwd=folder).returncode == 0
    assert sizes == [3, 3]


def test_what_decays():
    """decay_vectors is about gains and gates: it does not undo decay_embedding=false."""
    for flags, decays in (({}, "embedding matrices"), ({"decay_vectors": True}, "embedding matrices vectors gates")):
        for decay_embedding in (True, False):
            settings = train.Settings(norm="gpas_pre", weight_decay=0.5, decay_embedding=decay_embedding, **flags)
            setup = train.Setup(settings, train.Processes(), torch.device("cpu"), "float32")
            model = GPT(GPTConfig(norm="gpas_pre", n_layer=1, n_embd=8, n_head=2, vocab_size=17))
            groups = train.build_optimizer(model, None, setup).param_groups
            decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
            kinds = {"embedding": model.embed_tokens.weight, "matrices": model.lm_head.weight, "vectors": model.norm.weight}
            for kind, p in (kinds | {"gates": model.blocks[0].gate}).items():
                is_decayed = kind in decays.split() and (kind != "embedding" or decay_embedding)
                assert decay[id(p)] == (0.5 if is_decayed else 0.0), (kind, flags, decay_embedding)


def test_gates_are_set_where_a_run_begins(folder):
    for args in (["--init_from=resume"], ["--eval_only"], ["--sample=a"]):
        done = call(*args, "--norm=gpas_pre", "--gates=0.7", cwd=folder)
        assert done.returncode == 2 and "gates is set where a run begins" in done.stderr


def test_optimizer_state_of_another_shape(folder, tmp_path):
    checkpoint = torch.load(folder / "out-gpas_pre" / "ckpt.pt", weights_only=True)
    for moments in checkpoint["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(3)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    done = call("--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=9", "--device=cpu", cwd=folder)
    assert done.returncode == 2 and "exp_avg of parameter 0 has shape (3,), not" in done.stderr


def test_weights_that_are_not_finite(folder, tmp_path):
    checkpoint = torch.load(folder / "out-gpas_pre" / "ckpt.pt", weights_only=True)
    checkpoint["model"]["lm_head.weight"][0] = math.nan
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    for arg, message in (("--sample=a", "logits are not finite"), ("--eval_only", f"loss of {tmp_path}/ckpt.pt is nan")):
        done = call(arg, f"--out_dir={tmp_path}", "--device=cpu", cwd=folder)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_data_of_another_tokenizer(folder, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(folder / "out-gpas_pre", run)
    prepare_in_another_tokenizer(other, folder / "text.txt")
    args = ["--eval_only", f"--out_dir={run}", f"--dataset={other}", "--device=cpu"]
    done = call(*args, cwd=folder)
    assert (done.returncode, done.stderr) == (2, f"error: {other} was made with tokenizer reversed, {run} with byte\n")

    torch.save(torch.load(run / "ckpt.pt", weights_only=True) | {"tokenizer": None}, run / "ckpt.pt")
    with pytest.warns(UserWarning, match=f"names no tokenizer: whether {other} is of the same"):
        assert call(*args, cwd=folder).returncode == 0


# -- its parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, peak", [("H200", 989), ("H200 NVL", 835), ("A100-SXM4-80GB", 312), ("RTX A1000", None)])
def test_the_peak_of_a_gpu_is_that_of_its_name(monkeypatch, name, peak):
    """Of two GPUs, in a step of two seconds."""
    model, settings = GPT(GPTConfig(n_layer=1, n_embd=8, n_head=2, block_size=8)), train.Settings()
    model.losses = {}
    setup, times = train.Setup(settings, train.Processes(size=2), torch.device("cuda"), "bfloat16"), train.Times(settings)
    times.steps.append(2.0)
    record = {"step": 1, "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {name}")
    text, more = train.describe_step(record, model, times, setup)
    if peak is None:
        assert "mfu" not in more and "TFLOP/s" in text
    else:
        assert more["mfu"] == pytest.approx(model.flops_per_token() * settings.tokens_per_step / 2 / (2 * peak * 1e12))



def test_compiled_blocks_run_as_written_where_hooks_look_on():
    """Hooks that are compiled with a block would stay in every step after it."""
    model, compiled = GPT(GPTConfig(n_layer=2, n_embd=16, n_head=2, block_size=8)), []
    for block in model.blocks:
        block.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    x = torch.zeros(1, 8, dtype=torch.long)
    setup = train.Setup(train.Settings(), train.Processes(), torch.device("cpu"), "float32", use_compile=True)
    train.stream_report(model, x, x, setup)
    assert not compiled
    model(x)
    assert compiled


def test_autocast_keeps_no_copies_of_the_weights():
    setup = train.Setup(train.Settings(), train.Processes(), torch.device("cpu"), "bfloat16")
    with setup.autocast():
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()


def test_held_out_batches_without_targets_are_an_error():
    class AllPrompts:
        __len__ = lambda self: 4
        rows = lambda self, first, n: (np.zeros((n, 8), dtype=np.int64), np.full((n, 8), -100))

    setup = train.Setup(train.Settings(batch_size=2), train.Processes(), torch.device("cpu"), "float32")
    with pytest.raises(configurator.UserError, match="the held-out batches have no token to predict"):
        train.evaluate(GPT(GPTConfig(n_layer=1, n_embd=16, n_head=2, block_size=8)), AllPrompts(), setup, 2)


def test_fixed_gates_need_no_clipping():
    for fixed in (dict(freeze_gates=True), dict(gates="0.1")):
        with pytest.warns(match="gate_clip has no effect: the gates are fixed"):
            train.Settings(norm="gpas_pre", gate_clip=0.01, **fixed)


def test_processes_that_do_not_train_need_not_share_steps():
    two = train.Processes(size=2)
    with pytest.raises(configurator.UserError, match="gradient_accumulation_steps 1 cannot be shared by 2"):
        train.set_up(train.Settings(gradient_accumulation_steps=1, device="cpu"), two)
    train.set_up(train.Settings(gradient_accumulation_steps=1, device="cpu", eval_only=True), two)


def test_learning_rate_by_hand():
    s = train.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=12, max_iters=20)
    assert [train.learning_rate(i, s) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert train.learning_rate(4, s) == 1.0
    assert train.learning_rate(8, s) == pytest.approx(0.55)
    assert train.learning_rate(12, s) == train.learning_rate(19, s) == pytest.approx(0.1)
    assert train.learning_rate(8, train.Settings(learning_rate=1.0, warmup_iters=4, max_iters=12)) == pytest.approx(0.55)


def test_stream_report_by_hand():
    sizes = dict(block_size=8, vocab_size=11, n_layer=3, n_embd=16, n_head=2, n_expert=4, n_hidden=8)
    model = GPT(GPTConfig(norm="gpas_sandwich", branch_scale="skipinit", balance_weight=100.0, **sizes)).double()
    torch.nn.init.constant_(model.blocks[1].gate, 0.3)
    torch.nn.init.uniform_(model.blocks[2].attn_residual.out_norm.weight, 0.5, 2.0)
    x = torch.randint(0, 11, (2, 8))
    setup = train.Setup(train.Settings(), train.Processes(), torch.device("cpu"), "float32")
    report = train.stream_report(model, x, x, setup)
    variance = lambda h: ((h - h.mean(-1, keepdim=True)) ** 2).mean().item()
    names = "variance", "magnitude", "largest", "kurtosis", "attn_variance", "mlp_variance"
    h, expected, values = model.embed_tokens(x), {n: [] for n in names}, []
    assert report["embed_variance"] == pytest.approx(variance(h), rel=1e-5)
    for block in model.blocks:
        scale = 1 - torch.nn.functional.silu(block.gate)
        for name, f in (("attn", block.attn), ("mlp", block.mlp)):
            residual = getattr(block, f"{name}_residual")
            branch = residual.branch_scale * residual.out_norm(f(residual.pre_norm(h)))
            expected[f"{name}_variance"].append(variance(branch))
            h = scale * (h + branch)
        expected["variance"].append(variance(h))
        expected["magnitude"].append(h.abs().mean().item())
        expected["largest"].append(h.abs().max().item())
        z = (h.flatten(0, 1) - h.flatten(0, 1).mean(0)) / h.flatten(0, 1).std(0, correction=0)
        expected["kurtosis"].append((z**4).mean().item())
        values += h.abs().flatten().tolist()
    for name, per_layer in expected.items():
        assert report[name] == pytest.approx(per_layer, rel=1e-5), name
    assert report["top"] == pytest.approx(sorted(values, reverse=True)[:100], rel=1e-5)
    gains = [block.attn_residual.out_norm.weight.mean().item() for block in model.blocks]
    assert report["attn_out_gain"] == pytest.approx(gains) and len(report["mlp_out_gain"]) == 3
    assert report["gates"] == pytest.approx([0, 0.3, 0])
    assert all(p.grad is None for p in model.parameters()) and model.training
    model.eval()  # without the router's losses
    model(x, x)[1].backward()
    g = torch.cat([p.grad.flatten() for p in model.blocks[2].parameters()])
    assert report["grad_norms"][2] == pytest.approx(g.norm().item(), rel=1e-5)
    assert report["grad_variance"][2] == pytest.approx(g.var(correction=0).item(), rel=1e-9)  # the mean is small


def test_flat_names_layers_and_sublayers():
    record = {"step": 3, "loss": 1.0, "variance": [2.0, 3.0], "gates": [[0.1, 0.2]], "changed": {"seed": [1, 2]}}
    flat = {"loss": 1.0, "variance/1": 2.0, "variance/2": 3.0, "gates/1/1": 0.1, "gates/1/2": 0.2}
    assert train.flat(record) == flat


def test_help_explains_every_setting():
    """The comment beside each field is its help: none is lost where a declaration takes more than one line."""
    entries = re.split(r"\n  --", configurator.help_text(train.Settings, ""))[1:]
    assert len(entries) == len(train.Settings.__dataclass_fields__)
    for entry in entries:
        assert re.match(r"\w+ \(.*?\)\s+\w", entry, re.DOTALL), entry


def test_clock():
    assert [train.clock(s) for s in (5, 119, 754, 7200)] == ["5s", "119s", "12m34s", "2h00m"]


@pytest.mark.parametrize("setting, message", [("--dataset=nope", "no data set 'nope'"), ("--n_layer=0", "n_layer is 0")])
def test_a_wrong_setting_comes_before_the_state_of_the_folder(folder, setting, message):
    done = call(*SMALL, *SHORT, "--norm=gpas_pre", setting, cwd=folder)
    assert done.returncode == 2 and message in done.stderr and "holds a run" not in done.stderr


def test_the_first_screen(folder):
    """What is trained on what, the first evaluation, how long it will take, and then the steps."""
    lines = (folder / "stdout").read_text().splitlines()
    assert lines[0].startswith("gpas_pre: 2 layers x 32") and "step     0" in lines[1]
    assert re.fullmatch(r"the first step took \d+s, about \d+s in all", lines[2]) and "step     2" in lines[3]
