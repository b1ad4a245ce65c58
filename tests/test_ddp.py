"""train.py under torchrun, on gloo: the same curves for one and two processes, faults in one of them, sharding.

What only GPUs can show, and nothing here does: nccl, the overlap of computation and exchange, and the memory that
sharding and recomputing save.
"""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_train import EIGHT_STEPS, SHORT, SMALL, Masked, call, equal, examples, folder, losses, read_log  # noqa: F401
from torch._dynamo.backends.debugging import aot_eager

import train
from model import GPTConfig

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
RUN = [*SMALL, *SHORT, "--gradient_accumulation_steps=4", "--log_interval=1", "--dtype=float64", "--eval_iters=3"]

# Several runs in one start of torchrun, which takes as long as all of them: each a list of arguments, and with names of
# its own in the store, as it would have after a start of its own.
WORKER = """
import faulthandler, gc, json, os, signal, sys
from unittest import mock
import numpy as np, torch
sys.path[:0] = [{root!r}, {tests!r}]
import configurator, train
from test_train import Masked

faulthandler.enable()
ddp, exchanges = train.DistributedDataParallel, []

def counted(*args, **kwargs):
    net = ddp(*args, **kwargs)
    def hook(state, bucket):
        exchanges.append(1)
        torch.distributed.all_reduce(bucket.buffer().div_(2))
        done = torch.futures.Future()  # complete already: no thread of gloo's runs Python
        done.set_result(bucket.buffer())
        return done
    net.register_comm_hook(None, hook)
    return net

rate = train.learning_rate
gc.freeze()  # each run ends with a pass of the garbage collector, which need not look at the libraries
store, *place = next(train.dist.rendezvous("env://"))
for i, args in enumerate(json.loads(sys.argv[1])):
    train.dist.rendezvous = lambda url: iter([(torch.distributed.PrefixStore(str(i), store), *place)])
    sys.stdout, sys.argv = sys.__stdout__, ["train.py"] + [a for a in args if not a.startswith(":")]
    exchanges.clear()
    def learning_rate(step, settings):
        # the signal reaches one process only
        if ":stop" in args and step == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        if ":die" in args and step == 4 and os.environ["RANK"] == "1":
            raise configurator.UserError("one process fails")
        return rate(step, settings)
    data = Masked if ":mask" in args else train.TokenData
    with mock.patch.object(train, "TokenData", data), mock.patch.object(train, "learning_rate", learning_rate):
        with mock.patch.object(train, "DistributedDataParallel", counted if ":count" in args else ddp):
            code = 0
            try:
                configurator.run(train.main)
            except SystemExit as stop:
                code = stop.code
    sys.stdout.flush()
    os.write(1, f"<rank {{os.environ['RANK']}} run {{i}} exit {{code}} exchanges {{len(exchanges)}}>\\n".encode())
"""


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def runs(folder, examples, tmp_path_factory):  # noqa: F811
    """{name: {"exit": codes, "exchanges": counts}} of some runs in two processes, and what they said."""
    script = tmp_path_factory.mktemp("worker") / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    small_rate = ["--learning_rate=3e-4", "--min_lr=3e-5", "--max_iters=20", "--eval_interval=10"]
    lisa = ["--norm=gpas_lns", "--dtype=float32", "--lisa_layers=1", "--lisa_interval=3"]
    twenty = ["--max_iters=20", "--eval_interval=10"]
    all_runs = {
        "float64": [*RUN, *small_rate, "--norm=gpas_pre", "--out_dir=two-float64", ":count"],
        "float32": [*RUN, *small_rate, "--norm=gpas_deepnorm", "--out_dir=two-float32", "--dtype=float32"],
        "masked": [*RUN, "--batch_size=1", "--out_dir=two-masked", ":mask"],
        "documents": [*EIGHT_STEPS, "--out_dir=two-documents"],
        "whole": [*RUN, *lisa, "--out_dir=two-whole"],
        "stopped": [*RUN, *lisa, "--out_dir=two-parts", ":stop"],
        "resumed": ["--out_dir=two-parts", "--init_from=resume", "--dtype=float32", "--device=cpu"],
        "shard": [*RUN, *small_rate, "--norm=gpas_pre", "--out_dir=two-shard", "--shard", "--recompute", ":stop"],
        "reshard": [*RUN, "--out_dir=one-float64-4", "--init_from=resume", "--shard", *twenty],
        "uneven": [*RUN, "--gradient_accumulation_steps=3", "--out_dir=two-uneven"],
        "unknown": [*RUN, "--norm=rms"],
        "absent": [*RUN, "--dataset=nowhere", "--out_dir=two-absent"],
        "admin": [*RUN, "--norm=admin", "--shard", "--out_dir=two-admin"],
        "die": [*RUN, "--out_dir=two-die", ":die"],
    }
    one = [*RUN, *small_rate, "--norm=gpas_pre"]
    assert call(*one, "--out_dir=one-float64", cwd=folder).returncode == 0
    assert call(*one, "--out_dir=one-float64-4", "--max_iters=4", "--lr_decay_iters=20", cwd=folder).returncode == 0
    command = [*TORCHRUN, "--nproc_per_node=2", f"--master_port={port()}"]
    command += [str(script), json.dumps(list(all_runs.values()))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(), timeout=150)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-5000:]
    results = {name: {"exit": {}, "exchanges": {}} for name in all_runs}
    for rank, i, code, n in re.findall(r"<rank (\d+) run (\d+) exit (\d+) exchanges (\d+)>", done.stdout):
        result = results[list(all_runs)[int(i)]]
        result["exit"][int(rank)], result["exchanges"][int(rank)] = int(code), int(n)
    return results, done.stdout, [line for line in done.stderr.splitlines() if "error:" in line]


def assert_close(a, b, tolerance):
    """Two logs of the same steps, their numbers within a relative tolerance."""
    assert [row[0] for row in a] == [row[0] for row in b] and len(a) > 2
    for row, other in zip(a, b):
        assert [v is None for v in row] == [v is None for v in other]
        numbers = [[v for v in r if v is not None] for r in (row, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=tolerance, abs=0), row


def test_two_processes_train_as_one(folder, runs):  # noqa: F811
    assert runs[0]["float64"]["exit"] == runs[0]["float32"]["exit"] == {0: 0, 1: 0}
    assert_close(losses(folder / "one-float64"), losses(folder / "two-float64"), 1e-9)
    args = [*RUN, "--learning_rate=3e-4", "--min_lr=3e-5", "--max_iters=20", "--eval_interval=10", "--dtype=float32"]
    assert call(*args, "--norm=gpas_deepnorm", "--out_dir=one-float32", cwd=folder).returncode == 0
    drop_norm = lambda rows: [row[:3] for row in rows]
    assert_close(drop_norm(losses(folder / "one-float32")), drop_norm(losses(folder / "two-float32")), 1e-5)


def test_gradients_are_exchanged_once_a_step(runs):
    """Two micro-steps per process: one exchange of one bucket for each of 20 steps."""
    assert runs[0]["float64"]["exchanges"] == {0: 20, 1: 20}


def test_masked_targets_weigh_the_same_in_two_processes(folder, runs, monkeypatch):  # noqa: F811
    monkeypatch.setattr(train, "TokenData", Masked)
    assert call(*RUN, "--batch_size=1", "--out_dir=one-masked", cwd=folder).returncode == 0
    assert_close(losses(folder / "one-masked"), losses(folder / "two-masked"), 1e-9)


def test_rows_of_documents_weigh_the_same_in_two_processes(folder, runs):  # noqa: F811
    """Each process has other numbers of targets in its rows; their sum is what a single process counts."""
    assert call(*EIGHT_STEPS, "--out_dir=one-documents", cwd=folder).returncode == 0
    assert_close(losses(folder / "one-documents"), losses(folder / "two-documents"), 1e-9)
    one, two = (read_log(folder / f"{name}-documents" / "log.jsonl") for name in ("one", "two"))
    assert [(r["step"], r["tokens"]) for r in one] == [(r["step"], r["tokens"]) for r in two] and one[-1]["tokens"] > 0


def test_a_signal_to_one_process_stops_both_and_the_run_resumes_to_the_bit(folder, runs):  # noqa: F811
    """With LISA, whose draws DDP must hear of."""
    assert runs[0]["stopped"]["exit"] == {0: 143, 1: 143} and runs[0]["resumed"]["exit"] == {0: 0, 1: 0}
    assert "SIGTERM: stopped at step 5" in runs[1]
    whole, parts = (train.open_checkpoint(folder / d) for d in ("two-whole", "two-parts"))
    assert equal(whole["model"], parts["model"]) and equal(whole["optimizer"], parts["optimizer"])
    assert losses(folder / "two-whole") == losses(folder / "two-parts")


def test_only_rank_0_speaks_and_writes(folder, runs):  # noqa: F811
    assert runs[1].count("done in") == sum(r["exit"] == {0: 0, 1: 0} for r in runs[0].values())
    assert len([r for r in read_log(folder / "two-float64" / "log.jsonl") if "loss" in r]) == 20


def test_a_sharded_run_is_the_plain_one_and_resumes_as_such(folder, runs):  # noqa: F811
    """Sharded and recomputed, with gates of shape (1,): stopped at 5, resumed in one process without sharding; and a
    plain run of 4 steps resumed with it."""
    assert runs[0]["shard"]["exit"] == {0: 143, 1: 143} and runs[0]["reshard"]["exit"] == {0: 0, 1: 0}
    sharded = train.open_checkpoint(folder / "two-shard")
    assert sharded["step"] == 5 and all(type(w) is torch.Tensor for w in sharded["model"].values())
    resume = ["--out_dir=two-shard", "--init_from=resume", "--dtype=float64", "--device=cpu"]
    assert call(*resume, cwd=folder).returncode == 0
    assert_close(losses(folder / "one-float64"), losses(folder / "two-shard"), 1e-9)
    assert call(*RUN, "--norm=admin", "--out_dir=one-admin", cwd=folder).returncode == 0
    assert_close(losses(folder / "one-admin"), losses(folder / "two-admin"), 1e-9)  # omega is of the whole model
    reports = [read_log(folder / run / "log.jsonl")[0] for run in ("one-float64", "two-shard")]
    for name in ("variance", "attn_variance", "grad_norms", "grad_variance", "gates"):
        assert reports[0][name] == pytest.approx(reports[1][name], rel=1e-9)
    after = lambda name: [row for row in losses(folder / name) if row[0] > 4]
    assert_close(after("one-float64"), after("one-float64-4"), 1e-9)


def test_a_mistake_is_one_line_whatever_the_number_of_processes(runs):
    for name in ("uneven", "unknown", "absent", "die"):
        assert runs[0][name]["exit"] == {0: 2, 1: 2}, name
    said = ["3 cannot be shared by 2 processes", "unknown norm 'rms'", "no data set 'nowhere'", "one process fails"]
    assert len(runs[2]) == len(said)
    for expected in said:  # in any order: the process that does not tell one error may be the first to tell the next
        assert sum(expected in line for line in runs[2]) == 1


@pytest.mark.parametrize(
    "flags, norm, n_layer, n_expert",
    [(["shard", "recompute"], "lns", 4, 0), (["recompute"], "pre", 2, 2)],
    ids=["sharded", "experts"],
)
def test_every_block_is_compiled_within_what_shards_and_recomputes_it(monkeypatch, flags, norm, n_layer, n_expert):
    """Each layer has its own s, which makes more kinds of block than the compiler's limit for one function, here 4; and
    experts note their load as they compute."""
    given = dict(n_layer=n_layer, n_embd=16, n_head=2, block_size=8, norm=norm, n_expert=n_expert)
    original, calls, idx = torch.compile, [], torch.arange(16).view(2, 8)

    def backend(graph, inputs):
        compiled = aot_eager(graph, inputs)
        return lambda *args: calls.append(graph) or compiled(*args)

    def gradients(use_compile, **flags):
        settings = train.Settings(**given, **flags)
        setup = train.Setup(settings, train.Processes(), torch.device("cpu"), "float32", use_compile)
        model = train.build_model(GPTConfig(**given, vocab_size=20), None, setup)
        with torch.no_grad():  # as an evaluation does, which has graphs of its own
            model.eval()(idx)
        calls.clear()
        model.train()(idx, idx)[1].backward()
        return [train.whole(p.grad) for p in model.parameters()]

    monkeypatch.setattr(torch, "compile", lambda f: original(f, backend=backend))
    torch._dynamo.reset()
    expected = gradients(use_compile=False)
    assert not calls
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(recompile_limit=4):
            got = gradients(use_compile=True, **dict.fromkeys(flags, True))
    finally:
        dist.destroy_process_group()
    assert len(calls) == 2 * n_layer  # once forward, once more in the backward pass
    assert all(torch.allclose(g, e, rtol=1e-4, atol=1e-7) for g, e in zip(got, expected))


def test_predefined_gates_of_a_sharded_model(monkeypatch):
    """They are set before it is sharded: a part of a tensor takes no values of a whole one."""
    monkeypatch.setattr(train, "read_gates", lambda *_: [[0.1, 0.2], [0.3, 0.4]])
    given = dict(n_layer=2, n_embd=16, n_head=2, norm="gpas_pre", gate_per="sublayer")
    settings = train.Settings(**given, gates="a run's folder", shard=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        setup = train.Setup(settings, train.Processes(), torch.device("cpu"), "float32")
        model = train.build_model(GPTConfig(**given), None, setup, is_new=True)
        gates = [train.whole(gate.detach()) for gate in model.gates()]
        assert torch.equal(torch.stack(gates), torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
        assert not any(gate.requires_grad for gate in model.gates())
    finally:
        dist.destroy_process_group()


def test_two_nodes(folder, runs):  # noqa: F811
    """The two-node form of the README, both nodes on this machine."""
    place = ["--master_addr=127.0.0.1", f"--master_port={port()}", "--local_addr=127.0.0.1"]
    command = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", *place]
    args = [*RUN, "--learning_rate=3e-4", "--min_lr=3e-5", "--max_iters=20", "--eval_interval=10", "--norm=gpas_pre"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node_rank={i}", str(ROOT / "train.py"), *args, "--out_dir=nodes"],
            cwd=folder, stdout=-1, stderr=-1, text=True, env=environment(),
        )
        for i in range(2)
    ]  # fmt: skip
    for node in nodes:
        out, err = node.communicate(timeout=120)
        assert node.returncode == 0, err[-3000:]
    assert losses(folder / "nodes") == losses(folder / "two-float64")
