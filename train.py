"""Pretraining: `python train.py --norm=gpas_pre` trains 12 layers on this machine's own Python sources in minutes.

    python train.py --norm=lns --n_layer=24 --dataset=NAME     another placement, depth, data (see prepare_data.py)
    python train.py config/gpas_130m.py --compile              settings from a file, then from the command line
    python train.py config/gpas_7b.py --gpus=8 --dry_run       its size, tokens, FLOPs and memory, without training
    python train.py --norm=pre,lns --seed=1,2,3                a sweep: every combination, each in a folder of its own
    torchrun --nproc_per_node=8 train.py config/gpas_1b.py     several processes, one for each GPU
    python train.py --norm=lns --init_from=resume              continue the run in out-lns
    python train.py --init_from=out-lns --dataset=NAME         fine-tune its weights
    python train.py --norm=lns --eval_only                     its loss on the held-out set
    python train.py --norm=lns --sample="def "                 what it writes
    python train.py --help                                     every setting

A run is a folder: ckpt.pt (weights, optimizer, settings, tokenizer), ckpt_previous.pt (the one before) and
log.jsonl (one object a line). SIGTERM and Ctrl-C save and end it; --init_from=resume continues it, bit for bit.

The file begins with the settings and the training, `train`, whose loop is its last part. The pieces that it calls
follow: what a run continues, the machine, data, the model and the optimizer, what a person sees, the run's folder,
faults, processes, planning, sweeps.
"""

import ctypes
import gc
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

import prepare_data
from configurator import COUNT, NATURAL, NOT_NEGATIVE
from configurator import UserError, build_settings, read_config_file, read_log, read_settings, run, save_whole
from model import GPT, GPTConfig, find_device, find_scheme, load_checkpoint
from prepare_data import TokenData

# --dtype: the type of the weights. bfloat16 is autocast, which leaves them in float32; auto becomes it, or float32.
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.float32}
DTYPES |= {"bfloat16_pure": torch.bfloat16, "float64": torch.float64}

# Each takes the parameter groups and the settings.
OPTIMIZERS = {
    "adamw": lambda groups, s: torch.optim.AdamW(groups, s.learning_rate, betas=(s.beta1, s.beta2), fused=True),
    "adam": lambda groups, s: torch.optim.Adam(groups, s.learning_rate, betas=(s.beta1, s.beta2), fused=True),
    "sgd": lambda groups, s: torch.optim.SGD(groups, s.learning_rate),  # Peri-LN appendix I
}


# A setting is one line: its comment is its --help, and a comment line above it begins a heading there. What concerns
# one call alone stands in OF_ONE_CALL too, what cannot be a list in NEVER_LISTS, what may change within a sweep in
# MAY_DIFFER.
@dataclass
class Settings(GPTConfig):
    vocab_size: NATURAL = 0  # rows of the embedding and of the head; 0: the tokenizer's vocabulary
    # run
    out_dir: str | None = None  # folder of the run; none: out-<norm>, or out-<norm>-finetuned for fine-tuning
    init_from: str = "scratch"  # scratch; resume: continue the run in out_dir; or a run's folder: fine-tune its weights
    overwrite: bool = False  # allow a new run to replace the one in out_dir
    eval_only: bool = False  # evaluate the checkpoint in out_dir and exit
    sample: str | None = None  # a prompt: continue it with the checkpoint in out_dir and exit
    dry_run: bool = False  # print size, tokens, FLOPs and memory and exit
    gpus: COUNT = 1  # dry_run: how many share the work
    jobs: COUNT | None = None  # sweep: runs at a time, on a CPU of one thread each; none: one for each GPU, or core
    seed: NATURAL = 1337  # of the weights and of the order of the data
    # data
    dataset: str = "stdlib"  # a folder in data_dir, or a path
    data_dir: str = "data"  # where prepare_data.py puts data sets
    rows: Literal["windows", "documents"] = "windows"  # documents: one a row, cut, or padded (no loss but the routers')
    batch_size: COUNT = 8  # sequences per process and micro-step
    gradient_accumulation_steps: COUNT = 2  # micro-steps per step, of the whole job: the processes share them
    # optimization: linear warm-up, cosine decay
    max_iters: NATURAL | None = None  # steps; none: as many as epochs hold, else max_tokens, else 280
    epochs: Annotated[float, (1e-6, 1e6)] | None = None  # passes over the training data, where max_iters is not given
    max_tokens: NATURAL | None = None  # tokens (padding too), where neither max_iters nor epochs is given
    optimizer: Annotated[str, OPTIMIZERS] = "adamw"  # a row of OPTIMIZERS in train.py
    learning_rate: NOT_NEGATIVE = 4e-3  # at its highest
    min_lr: NOT_NEGATIVE | None = None  # at the end of the decay; none: a tenth of learning_rate
    warmup_iters: NATURAL = 30  # steps of linear warm-up
    lr_decay_iters: NATURAL | None = None  # step at which min_lr is reached; none: max_iters
    weight_decay: NOT_NEGATIVE = 0.1  # on matrices
    decay_embedding: bool = True  # on the embedding too; false: as in Sparsity's training script
    decay_vectors: bool = False  # on gains and gates too
    beta1: float = 0.9  # of Adam and AdamW
    beta2: float = 0.95  # of Adam and AdamW
    grad_clip: NOT_NEGATIVE = 1.0  # largest norm of the gradient of all but the gates; 0: no clipping
    gate_clip: NOT_NEGATIVE = 0.0  # of all gates, jointly (0.01 in GPAS's appendix, at 7B); 0: no clipping
    gates: str | None = None  # fixed gates: a number, n_layer of them with commas between, or a run's folder (its)
    freeze_gates: bool | None = None  # gates stay what they are at the start; none: in fine-tuning (GPAS section 4.1)
    lisa_layers: NATURAL = 0  # LISA: train only so many blocks, drawn anew, and what is outside of them; 0: all
    lisa_interval: COUNT = 20  # LISA: steps between draws
    nan_patience: COUNT = 3  # steps in a row with a loss or gradient that is not finite, each skipped, that end the run
    # evaluation and log
    eval_interval: COUNT = 50  # steps between evaluations, each followed by a checkpoint
    eval_iters: COUNT = 13  # batches of the held-out set, the same each time and for every seed
    last_eval_iters: NATURAL | None = None  # batches of the last evaluation and of eval_only; none: eval_iters; 0: all
    log_interval: COUNT = 10  # steps between lines
    keep_every: NATURAL = 0  # steps between checkpoints that stay, as ckpt_<step>.pt; 0: the last two stay
    sample_tokens: COUNT = 200  # length of a sample
    temperature: NOT_NEGATIVE = 0.8  # of a sample; 0: the likeliest token each time
    top_k: COUNT | None = 50  # a sample draws among the k likeliest tokens; none: among all
    # machine
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1, mps ...
    dtype: Annotated[str, DTYPES] = "auto"  # bfloat16: autocast; bfloat16_pure: weights too; auto: bfloat16 where fast
    float32_gates: bool = False  # bfloat16_pure: the gates' weights stay float32, so that small steps move them
    compile: bool | None = None  # torch.compile the model; none: on cuda, but for LISA
    shard: bool = False  # spread weights, gradients and optimizer over the processes (FSDP2): beyond one GPU's memory
    recompute: bool = False  # keep only each block's input for the backward pass and compute the block again
    wandb: bool = False  # log to Weights & Biases too
    tensorboard: bool = False  # write TensorBoard files to out_dir too
    peak_tflops: NOT_NEGATIVE = 0.0  # the device's dense peak, for the share that is reached (MFU); 0: from PEAK_TFLOPS

    def __post_init__(self):
        super().__post_init__()
        is_tuning, has_gates = self.init_from not in ("scratch", "resume"), find_scheme(self.norm)[1]
        self.out_dir = self.out_dir or f"out-{self.norm}" + "-finetuned" * is_tuning
        if self.max_iters is None and self.epochs is None:  # the steps of epochs are known once the data are open
            self.max_iters = 280 if self.max_tokens is None else max(1, round(self.max_tokens / self.tokens_per_step))
        if self.freeze_gates is None:
            self.freeze_gates = is_tuning and has_gates and self.gates is None
        if self.gpus > 1 and not self.dry_run:
            raise ValueError(f"gpus has no effect without dry_run: torchrun --nproc_per_node={self.gpus} uses so many")
        if self.gradient_accumulation_steps % self.gpus:
            n = self.gradient_accumulation_steps
            raise ValueError(f"gradient_accumulation_steps {n} cannot be shared by {self.gpus} GPUs")
        if self.eval_only and self.sample is not None:
            raise ValueError("eval_only and sample are two things to do with a run: give one of them")
        if self.overwrite and (self.eval_only or self.sample is not None or self.init_from == "resume"):
            raise ValueError("overwrite replaces a run with a new one: it does not go with resume, eval_only or sample")
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} must be at least 0 and under 1")
        if self.gates is not None and self.freeze_gates:
            raise ValueError("gates are fixed values: freeze_gates adds nothing")
        for name in ("gates", "freeze_gates", "gate_clip", "float32_gates"):
            if getattr(self, name) and not has_gates:
                raise ValueError(f"{name}={getattr(self, name)} has no effect: norm {self.norm} has no gates")
        if self.gate_clip and (self.freeze_gates or self.gates is not None):
            warnings.warn("gate_clip has no effect: the gates are fixed")
        if self.float32_gates and self.dtype != "bfloat16_pure":
            raise ValueError(f"float32_gates has no effect with dtype={self.dtype}: it needs dtype=bfloat16_pure")
        if self.float32_gates and self.shard:
            raise ValueError("float32_gates does not go with shard, which needs one dtype in all of a block")
        if self.lisa_layers > self.n_layer:
            raise ValueError(f"lisa_layers is {self.lisa_layers}; the model has {self.n_layer} layers")
        for name in ("compile", "shard"):
            if self.lisa_layers and getattr(self, name):
                raise ValueError(f"lisa_layers changes what is trained as it runs: it does not go with {name}")

    @property
    def rows_per_step(self):
        """Of all processes."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self):
        """Of all processes, padding too."""
        return self.rows_per_step * self.block_size

    def eval_batches(self, is_last):
        """How many batches an evaluation takes; 0: all."""
        return self.last_eval_iters if is_last and self.last_eval_iters is not None else self.eval_iters

    def architecture(self, vocab_size):
        """The GPTConfig of a model with so many tokens."""
        return GPTConfig(**{f.name: getattr(self, f.name) for f in fields(GPTConfig)} | {"vocab_size": vocab_size})


# ---------------------------------------------------------------------------------------------------------------------
# Training


def main():
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    with connected_processes() as processes:
        stop = StopRequest(is_main=processes.rank == 0)
        may_be_lists = Settings.__dataclass_fields__.keys() - NEVER_LISTS
        given = read_settings(Settings, "Pretrains a GPT with any placement of its norms.", may_be_lists=may_be_lists)
        lengths = [name for name in ("max_iters", "epochs", "max_tokens") if given.get(name) is not None]
        for name in lengths[1:]:
            first = lengths[0]
            warnings.warn(f"{name} has no effect, {first} {given[first]} counts: or give --{first}=none")
        if is_sweep(given):
            sweep(given, processes, stop)
            return
        if given.get("jobs"):
            warnings.warn("jobs has no effect: no setting is a list of values")
        values, checkpoint = settings_of_run(given)
        settings = build_settings(Settings, values)
        if settings.dry_run:
            print(plan(settings))
            return
        setup = set_up(settings, processes)
        if settings.sample is not None:
            sample_run(checkpoint, setup)
            return
        data = open_data(checkpoint, setup)
        if settings.eval_only:
            evaluate_run(checkpoint, data, setup)
            return
        check_out_dir(settings)
        lock = nullcontext()
        if processes.rank == 0:
            Path(settings.out_dir).mkdir(parents=True, exist_ok=True)
            lock = prepare_data.locked(settings.out_dir, f"training in {settings.out_dir}")
        with lock, stop.listen():
            train(checkpoint, data, setup, stop)


def train(checkpoint, data, setup, stop):
    """Trains a new model, or goes on from a checkpoint: its run if settings.init_from is "resume", else its weights."""
    settings, processes = setup.settings, setup.processes
    resumed = checkpoint if settings.init_from == "resume" else None  # the checkpoint of the run that goes on
    model = build_model(data.config, checkpoint and checkpoint["model"], setup, is_new=resumed is None)
    trained = {p for p in model.parameters() if p.requires_grad}  # LISA thaws no other
    print(describe_model(model, data, setup))
    optimizer = build_optimizer(model, resumed, setup)
    gates = [g for g in model.gates() if g.requires_grad]
    others = [p for group in optimizer.param_groups if group["name"] != "gates" for p in group["params"]]
    # The same weights three times: `model` has the names, `compiled` is what evaluations call, `net` what steps call.
    compiled = torch.compile(model) if setup.use_compile and not setup.compiles_blocks else model
    net = exchange_gradients(compiled, setup)

    begin = resumed or NEW_RUN
    step, skipped, tokens, val_loss = begin["step"], begin["skipped"], begin["tokens"], begin["val_loss"]
    if step > settings.max_iters:
        raise UserError(f"the run in {settings.out_dir} is at step {step}, beyond max_iters {settings.max_iters}")
    folder = RunFolder(resumed, setup)
    times, report = Times(settings), {}
    report_batch = get_batch(data.val, 0, min(8, settings.batch_size, len(data.val)), setup.device)

    def measure():
        """Logs and returns the held-out loss and stream_report's dict."""
        check_shards(data.sizes)
        loss = evaluate(compiled, data.val, setup, settings.eval_batches(is_last=step >= settings.max_iters))
        if not math.isfinite(loss):
            folder.end_where_not_finite(step, f"validation loss is {loss} at step {step}", model, [report_batch])
        text, record = describe_loss(loss, data)
        print(f"step {step:5d}: {text}")
        streams = stream_report(model, *report_batch[:2], setup)
        folder.log({"step": step, "tokens": tokens, **record, **streams})
        return loss, streams

    def save():
        folder.save(model, optimizer, data, step=step, val_loss=val_loss, skipped=skipped, tokens=tokens)

    # -- the loop; `step` is the number of steps that are done
    model.train()
    is_stopping, batches = False, read_step(data, step, setup)
    if val_loss is None:  # a new run, or an imported one
        with timed(times.evaluations):
            val_loss, report = measure()
            save()
    while step < settings.max_iters and not is_stopping:
        lr = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if settings.lisa_layers and (step == begin["step"] or step % settings.lisa_interval == 0):
            draw_layers(model, optimizer, step, settings, trained)
            net = None  # an earlier DDP's buffers go before the next one has its own
            gc.collect()
            net = exchange_gradients(compiled, setup)

        with timed(times.steps):
            # The mean over all tokens of the step that have a target, wherever they are: each micro-batch counts by its
            # share of them, n / n_targets. DDP and FSDP divide the sum of gradients by the number of processes: the
            # factor processes.size undoes this.
            n_targets = processes.sum(sum(n for *_, n in batches))[0]
            if not n_targets:
                raise UserError(f"step {step} has no token to predict: all are prompts, or cut off before the answer")
            loss = 0
            for i, (x, y, n) in enumerate(batches):
                net.require_backward_grad_sync = i == len(batches) - 1  # DDP exchanges gradients once a step
                with setup.autocast():
                    part = net(x, y)[1] * (n * processes.size / n_targets)
                part.backward()
                loss = loss + part.detach() / processes.size
            # The next batches load while CUDA computes; the last ones are kept for the report of a nan.
            last_batches, batches = batches, read_step(data, step + 1, setup)
            layer_norms = gradient_norms(model) if (step + 1) % settings.log_interval == 0 else None
            grad_norm, gate_norm = clip(others, settings.grad_clip), clip(gates, settings.gate_clip)
            loss, n_stops = processes.sum(loss.item(), stop.is_asked())
            is_finite = math.isfinite(loss + grad_norm + gate_norm)
            if is_finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + int(n_targets)
        skipped = 0 if is_finite else skipped + 1
        is_stopping = n_stops > 0

        if not is_finite:
            norms = f"gradient norm {grad_norm}" + f", of the gates {gate_norm}" * bool(gates)
            what = f"loss is {loss}, {norms} at step {step}, lr {lr:.2e}"
            if skipped >= settings.nan_patience:
                what = f"{what}, {skipped} such steps in a row"
                folder.end_where_not_finite(step, what, model, last_batches)
            print(f"step {step:5d}: {what}: skipped")
            folder.log({"step": step, "skipped": skipped, "lr": lr})
        elif step % settings.log_interval == 0:
            record = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "step_grad_norms": layer_norms}
            record |= {"gate_grad_norm": gate_norm} if gates else {}
            text, more = describe_step(record, model, times, setup)
            print(text)
            folder.log(record | {"tokens": tokens} | more)
        if step == begin["step"] + 1:
            total = clock(times.passed() + times.left(step))
            more = "with compilation" if setup.use_compile else f"about {total} in all"
            print(f"the first step took {clock(times.steps[0])}, {more}")
        if step % settings.eval_interval == 0 or step >= settings.max_iters:
            with timed(times.evaluations):
                val_loss, report = measure()
                save()
        elif skipped == 0 and (is_stopping or is_kept(step, settings)):  # else the weights may be what is broken
            save()

    processes.wait()  # until rank 0 has written the checkpoint
    if is_stopping and step < settings.max_iters:
        where = f"stopped at step {step}, {settings.out_dir}/ckpt.pt is of step {folder.saved_step}"
        more = f"--init_from=resume --out_dir={settings.out_dir}" + " --overwrite=false" * settings.overwrite
        stop.end(f"{where}; continue with the same command and {more}")
    print(f"done in {clock(times.passed())}: {settings.out_dir}/ckpt.pt, {settings.out_dir}/log.jsonl")
    if report:
        print(picture(report))
    if data.tokenizer:
        print("a sample:\n" + write_sample(model, data.tokenizer, "", setup))


@torch.no_grad()
def evaluate(model, data, setup, n):
    """Mean loss in nats over the tokens with a target of n batches of `data`, the same at each call; of all its whole
    batches if n is 0, or more than there are. The processes share them."""
    model.eval()
    processes, batch_size = setup.processes, min(setup.settings.batch_size, len(data))
    available = len(data) // batch_size
    n, total, count = min(n or available, available), 0, 0
    rounds = math.ceil(n / processes.size)  # in each, every process takes one batch: sharded models need them all
    for i in range(processes.rank, rounds * processes.size, processes.size):
        x, y, n_targets = get_batch(data, min(i, n - 1) * batch_size, batch_size, setup.device)
        n_targets *= i < n  # beyond the last batch it counts for nothing
        with setup.autocast():
            total += model(x, y)[1].item() * n_targets
        count += n_targets
    model.train()
    total, count = processes.sum(total, count)
    if not count:
        raise UserError("the held-out batches have no token to predict: all are prompts, or cut off before the answer")
    return total / count


def learning_rate(step, settings):
    """Linear warm-up to learning_rate, cosine decay to min_lr at lr_decay_iters, min_lr from there on."""
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / settings.warmup_iters
    end = settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    share = (step - settings.warmup_iters) / max(1, end - settings.warmup_iters)
    low = settings.learning_rate / 10 if settings.min_lr is None else settings.min_lr
    return low + (settings.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def clip(parameters, largest):
    """The norm of their joint gradient, which is scaled down to `largest` where it is above; 0: not at all."""
    return whole(torch.nn.utils.clip_grad_norm_(parameters, largest or math.inf)).item() if parameters else 0.0


def gradient_norms(model):
    """Norm of the gradient of each layer's parameters, a list; what is frozen counts as 0."""
    grads = [[p.grad for p in block.parameters() if p.grad is not None] for block in model.blocks]
    return [whole(torch.nn.utils.get_total_norm(of_layer)).item() for of_layer in grads]


# ---------------------------------------------------------------------------------------------------------------------
# The run that is continued, evaluated, sampled or fine-tuned

# Settings of one call: another call, such as one that resumes the run, does not take them over.
OF_ONE_CALL = "out_dir init_from overwrite eval_only sample dry_run gpus jobs device compile shard recompute".split()


def settings_of_run(given):
    """The settings of the run, {name: value}: what is given, and for the rest what an earlier run hands on, its
    settings or, for fine-tuning, its architecture alone. Also that run's checkpoint, None for a new run. UserError if
    what is given contradicts it."""
    init_from = given.get("init_from", "scratch")
    is_call = given.get("eval_only") or given.get("sample") is not None
    if init_from == "scratch" and not is_call:
        return given, None
    is_tuning = init_from not in ("scratch", "resume")
    if is_call and is_tuning:
        raise UserError("init_from begins a run: leave it out, --out_dir names the run to evaluate or to sample")
    folder = init_from if is_tuning else given.get("out_dir") or f"out-{given.get('norm', 'pre')}"
    checkpoint = open_checkpoint(folder)
    config = checkpoint["config"]
    of_run = dict(config)
    if not is_tuning:
        handed_on = Settings.__dataclass_fields__.keys() - OF_ONE_CALL
        of_run = {n: v for n, v in checkpoint["settings"].items() if n in handed_on} | of_run | {"out_dir": folder}
        for name in ("gates", "optimizer"):
            if name in given and given[name] != of_run.get(name, getattr(Settings, name)):
                raise UserError(f"{name} is set where a run begins: it does not go with resume, eval_only or sample")
        if given.get("eval_only") and "eval_iters" in given:
            of_run["last_eval_iters"] = None
        new_length = given.get("epochs") is not None or given.get("max_tokens") is not None
        if given.get("max_iters") is None and new_length:
            for name in ("max_iters", "epochs"):
                of_run.pop(name, None)
    # None, or a vocab_size of 0, leaves these to the run; of rope_scaling None is a value: no scaling.
    may_be_open = {*config, "freeze_gates"} - {"rope_scaling"}
    given = {n: v for n, v in given.items() if not (n in may_be_open and v is None or n == "vocab_size" and v == 0)}
    fixed = [n for n in config if not (is_tuning and n == "block_size")]  # no weight depends on that
    wrong = [f"{n} {config[n]} (given {given[n]})" for n in fixed if n in given and given[n] != config[n]]
    if wrong:
        raise UserError(f"{folder} is a model of {', '.join(wrong)}")
    return {**of_run, **given}, checkpoint


# What a checkpoint says of a run that has not begun; checkpoints of earlier versions lack some of it.
NEW_RUN = {"step": 0, "skipped": 0, "tokens": 0, "val_loss": None, "shards": {}}


def open_checkpoint(path):
    """model.load_checkpoint's dict, with all of NEW_RUN; UserError if it cannot be read or is not as it was written."""
    try:
        checkpoint = NEW_RUN | load_checkpoint(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    for name, kind in {"skipped": int, "tokens": int, "val_loss": float | None, "shards": dict}.items():
        if not isinstance(checkpoint[name], kind):
            raise UserError(f"checkpoint {path} cannot be read: its {name} is a {type(checkpoint[name]).__name__}")
    try:
        if checkpoint["tokenizer"] is not None:
            prepare_data.build_encoding(checkpoint["tokenizer"])
    except Exception as error:  # an edited file can hold anything
        raise UserError(f"checkpoint {path} cannot be read: its tokenizer, {type(error).__name__} {error}") from None
    return checkpoint


def evaluate_run(checkpoint, data, setup):
    """--eval_only: the last evaluation of the run."""
    settings = setup.settings
    model = build_model(data.config, checkpoint["model"], setup)
    loss = evaluate(model, data.val, setup, settings.eval_batches(is_last=True))
    if not math.isfinite(loss):
        raise UserError(f"the validation loss of {settings.out_dir}/ckpt.pt is {loss}")
    print(f"step {checkpoint['step']}: {describe_loss(loss, data)[0]}")


def sample_run(checkpoint, setup):
    """--sample"""
    if not checkpoint["tokenizer"]:
        raise UserError(f"the data of {setup.settings.out_dir} named no tokenizer: its tokens have no text")
    model = build_model(GPTConfig(**checkpoint["config"]), checkpoint["model"], setup)
    print(write_sample(model, checkpoint["tokenizer"], setup.settings.sample, setup))


# ---------------------------------------------------------------------------------------------------------------------
# The machine


@dataclass
class Setup:
    """What every piece of a run needs: the settings, and what became of their "auto" and "none" on this machine."""

    settings: Settings
    processes: "Processes"
    device: torch.device
    dtype: str
    use_compile: bool = False

    @property
    def compiles_blocks(self):
        """Whether each block is compiled by itself, within what shards and recomputes it, not the model as a whole: the
        compiler cannot look into the gathering of weights, nor recompute experts, which note their load."""
        return self.use_compile and (self.settings.shard or self.settings.recompute)

    def autocast(self):
        """The context in which a model computes. A training pass uses each weight once, so a cache would save no work:
        it would only keep the bfloat16 copies of all weights until the end of the pass."""
        if self.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def without_compile(self):
        """A context in which compiled blocks run as they are written. Hooks would be compiled with a block, and stay in
        every later step; a sample grows with each token, and might be compiled for each length."""
        return torch.compiler.set_stance("force_eager") if self.use_compile else nullcontext()


def set_up(settings, processes):
    """The Setup that the settings ask for and the machine has. The machine is prepared too: this process's GPU, TF32,
    and on a CPU keep_freed_memory."""
    is_training = not settings.eval_only and settings.sample is None
    if is_training and settings.gradient_accumulation_steps % processes.size:
        n = settings.gradient_accumulation_steps
        raise UserError(f"gradient_accumulation_steps {n} cannot be shared by {processes.size} processes")
    if settings.shard and processes.size == 1:
        raise UserError("shard spreads a model over processes, this is one: torchrun --nproc_per_node=N train.py ...")
    name = settings.device
    if processes.size > 1:
        if ":" in name:
            raise UserError(f"device is {name} for all {processes.size} processes; say cuda, and each takes its own")
        if takes_any_gpu(settings):
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    device, dtype = usable_device(name), settings.dtype
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # a device without an index is refused
    elif device.type == "cpu":
        keep_freed_memory()
    if dtype == "auto":
        is_fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        if device.type == "cuda":
            is_fast = torch.cuda.is_bf16_supported(including_emulation=False)  # of the device that was set
        dtype = "bfloat16" if is_fast else "float32"
    use_compile = settings.compile
    if use_compile is None:
        use_compile = device.type == "cuda" and not settings.lisa_layers
    torch.backends.cuda.matmul.allow_tf32 = True  # on CUDA, float32 matrices are multiplied with 10 bits of mantissa
    return Setup(settings, processes, device, dtype, use_compile)


def usable_device(name):
    """model.find_device, with a UserError in place of its ValueError."""
    try:
        return find_device(name)
    except ValueError as error:
        raise UserError(str(error)) from None


def takes_any_gpu(settings):
    """Whether the run takes whichever GPU it is given, and there is one. (To ask find_device would take its memory.)"""
    return settings.device in ("auto", "cuda") and torch.cuda.is_available()


def keep_freed_memory():
    """Under glibc, keeps freed activations with the process (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD): on the CPU,
    fetching fresh pages from the system for each of them costs about a sixth of a step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25), libc.mallopt(-1, (1 << 31) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass
class Data:
    """A data set as a run uses it."""

    folder: Path
    train: TokenData
    val: TokenData  # in one order for every seed
    config: GPTConfig  # the model's, with this data set's vocabulary
    tokenizer: dict | None  # prepare_data.tokenizer_state; None if it is not known
    bits_per_nat: float | None  # bits per byte of the text for each nat of loss; None if the bytes are not known
    sizes: dict  # {path: bytes} of the shards and their masks


def open_data(checkpoint, setup):
    """The Data of a run; sets settings.max_iters where epochs waited for the data. UserError for what does not fit its
    settings or its checkpoint."""
    settings, folder = setup.settings, data_folder(setup.settings, setup.processes)
    meta = prepare_data.read_meta(folder)
    vocab_size = settings.vocab_size or meta.get("vocab_size", 0)
    if not vocab_size:
        raise UserError(f"{folder} has no meta.json: say its vocabulary with --vocab_size=N (50257 for GPT-2's)")
    if vocab_size < meta.get("vocab_size", 0):
        raise UserError(f"vocab_size {vocab_size} is smaller than the {meta['vocab_size']} of {folder}")
    tokenizer = checkpoint["tokenizer"] if checkpoint else meta.get("tokenizer")
    if meta and tokenizer and meta["tokenizer"] != tokenizer:
        run_folder = settings.out_dir if settings.eval_only or settings.init_from == "resume" else settings.init_from
        names = meta["tokenizer"]["name"], tokenizer["name"]
        raise UserError(f"{folder} was made with tokenizer {names[0]}, {run_folder} with {names[1]}")
    if meta and checkpoint and not tokenizer:
        warnings.warn(f"the run names no tokenizer: whether {folder} is of the same cannot be told")

    train_data = TokenData(folder, "train", settings.block_size, vocab_size, settings.seed, settings.rows)
    val_data = TokenData(folder, "val", settings.block_size, vocab_size, rows=settings.rows)
    if settings.max_iters is None:  # of the settings this one alone waits for the data
        settings.max_iters = count_steps(settings, len(train_data))
    shards = [*train_data.paths, *val_data.paths]
    masks = [path.with_suffix(".mask") for path in shards if path.with_suffix(".mask").exists()]
    sizes = {path: os.path.getsize(path) for path in shards + masks}
    if settings.init_from == "resume" and settings.dataset == checkpoint["settings"].get("dataset"):
        check_shards({folder / str(name): size for name, size in checkpoint["shards"].items()})
        new = sorted({path.name for path in shards} - checkpoint["shards"].keys())
        if checkpoint["shards"] and new:  # an imported run names no shards
            warnings.warn(f"{folder} has new shards, {new[0]} the first: the data now come in another order")
        names = "batch_size", "gradient_accumulation_steps"
        before, now = math.prod(checkpoint["settings"].get(name, 1) for name in names), settings.rows_per_step
        if checkpoint["step"] and before != now and not settings.eval_only:
            what = f"a step now has {now} rows, and had {before}"
            warnings.warn(f"{what}: the run skips some of the data, or sees some twice")
    bits_per_nat = None
    if meta:
        bits_per_nat = meta["splits"]["val"]["tokens"] / meta["splits"]["val"]["bytes"] / math.log(2)
    return Data(folder, train_data, val_data, settings.architecture(vocab_size), tokenizer, bits_per_nat, sizes)


def data_folder(settings, processes):
    """Folder of the data set. The default one is prepared by one process if it is missing; UserError if another is."""
    if processes.rank == 0 and settings.dataset == "stdlib" and not (Path(settings.data_dir) / "stdlib").is_dir():
        print("preparing the default data set, this machine's Python standard library")
        prepare_data.prepare(prepare_data.Settings(data_dir=settings.data_dir))
    processes.wait()
    return prepare_data.find_data(settings.dataset, settings.data_dir, "train")


def count_steps(settings, n_rows):
    """The steps of settings.epochs passes over n_rows rows; the last step may begin another pass."""
    return max(1, math.ceil(round(settings.epochs * n_rows / settings.rows_per_step, 6)))


def check_shards(sizes):
    """UserError for a shard that has disappeared or changed size: reading its memory map past its end would kill."""
    for path, size in sizes.items():
        now = os.path.getsize(path) if os.path.exists(path) else None
        if now != size:
            what = "has gone" if now is None else f"has {now} bytes, {size} before"
            advice = "put it back, and --init_from=resume goes on from the last checkpoint"
            raise UserError(f"shard {path} {what}: {advice}")


def read_step(data, step, setup):
    """This process's micro-batches of a step, as get_batch gives them; none past the last step."""
    settings, processes = setup.settings, setup.processes
    if step >= settings.max_iters:
        return []
    check_shards(data.sizes)
    n, first = settings.batch_size, step * settings.gradient_accumulation_steps
    mine = range(processes.rank, settings.gradient_accumulation_steps, processes.size)
    return [get_batch(data.train, (first + i) * n, n, setup.device) for i in mine]


def get_batch(data, first, n, device):
    """n rows of `data`: inputs and targets, tensors (n, block_size) on the device; how many targets are not -100."""
    x, y = data.rows(first, n)
    count = int(np.count_nonzero(y != -100))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True), count
    return x.to(device), y.to(device), count


# ---------------------------------------------------------------------------------------------------------------------
# The model and the optimizer


def build_model(config, weights, setup, is_new=False):
    """A GPT on the device, with the weights of a checkpoint or None for new ones; UserError if it cannot be had.

    `is_new`: it begins a run, so its gates get the values of settings.gates, if these are given. With settings.shard
    each process builds it on the CPU and keeps its part of every parameter on the device.
    """
    settings = setup.settings
    try:
        torch.manual_seed(settings.seed)
        model = GPT(config).to(DTYPES[setup.dtype])
        if settings.float32_gates:
            for gate in model.gates():
                gate.data = gate.data.float()
        if weights is not None:
            model.load_state_dict(weights)
        if is_new and settings.gates is not None:
            try:
                model.set_gates(read_gates(settings.gates, config))
            except ValueError as error:
                raise UserError(f"--gates={settings.gates}: {error}") from None
        for gate in model.gates():
            gate.requires_grad_(not settings.freeze_gates and settings.gates is None)
        if setup.compiles_blocks:  # they share their code, and each may have an s of its own
            torch._dynamo.config.recompile_limit = 8 + 4 * config.n_layer
        for block in model.blocks:
            if setup.compiles_blocks:
                block.forward = torch.compile(block.forward)
            if settings.recompute:
                block.forward = partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
        if settings.shard:
            shard_model(model, setup)
        return model.to(setup.device)
    except (RuntimeError, MemoryError, OverflowError) as error:
        reason = str(error).splitlines()[-1].strip() if str(error) else type(error).__name__
        raise UserError(f"this model cannot be built: {reason}") from None


def shard_model(model, setup):
    """Spreads a model over the processes (FSDP2). A block's weights are gathered just before it computes, in their own
    dtype (float32 under autocast), and dropped after."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(setup.device.type, (setup.processes.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tree, keep=True):
    """A tensor, or nested dicts of them, with every sharded one in one piece on the CPU. All processes take part;
    without `keep` this one gets None for a sharded tensor."""
    if isinstance(tree, dict):
        return {key: whole(value, keep) for key, value in tree.items()}
    if not hasattr(tree, "full_tensor"):  # no DTensor (isinstance would import them, which takes a second)
        return tree
    tensor = tree.full_tensor()
    return tensor.cpu() if keep else None


def exchange_gradients(model, setup):
    """The model as the steps call it. Where several processes each hold the whole model, it is in DDP, which exchanges
    the gradients of what requires one when DDP is made (so LISA makes it anew at each draw). FSDP exchanges gradients
    in each micro-step: to add them up first would take as much memory as the whole model."""
    if setup.processes.size == 1 or setup.settings.shard:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def build_optimizer(model, resumed, setup):
    """The optimizer of the settings, with the moments of the checkpoint `resumed` if there is one; UserError."""
    settings = setup.settings
    groups = model.optimizer_groups(settings.weight_decay, settings.decay_embedding)
    for group in groups:
        if settings.decay_vectors and group["name"] in ("vectors", "gates"):
            group["weight_decay"] = settings.weight_decay
    optimizer = OPTIMIZERS[settings.optimizer](groups, settings)
    if resumed:
        try:
            load_moments(optimizer, resumed["optimizer"])
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            path = f"{settings.out_dir}/ckpt.pt"
            raise UserError(f"the optimizer state in {path} does not fit the model: {error}") from None
    return optimizer


def load_moments(optimizer, saved):
    """Gives the optimizer the moments of the `saved` state; the hyperparameters stay its own. ValueError or LookupError
    if they do not fit."""
    now = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in now]:
        raise ValueError("its groups hold other parameters")
    params, state = [p for group in optimizer.param_groups for p in group["params"]], {}
    for i, moments in saved["state"].items():
        state[i], p = {}, params[i]
        for name, value in moments.items():
            if value.dim() and value.shape != p.shape:
                raise ValueError(f"{name} of parameter {i} has shape {tuple(value.shape)}, not {tuple(p.shape)}")
            if value.dim() and hasattr(p, "device_mesh"):  # sharded: this process's part
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
            state[i][name] = value.clone()  # the optimizer will write into it, and the file is mapped
    optimizer.load_state_dict({"state": state, "param_groups": now})


def read_gates(text, config):
    """Gate values of each layer, as GPT.set_gates takes them, from a number, a list or the folder of a run (GPAS Table
    5: its final ones); UserError."""
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        if not text or not Path(text).exists():
            what = f"a number, {config.n_layer} numbers with commas between, or a run's folder"
            raise UserError(f"gates is {text!r}; it must be {what}") from None
        weights = open_checkpoint(text)["model"]
        values = [weight.tolist() for name, weight in weights.items() if name.endswith(".gate")]
        if not values:
            raise UserError(f"{text} has no gates: it was trained without gpas_") from None
        return values
    if not all(map(math.isfinite, values)):
        raise UserError(f"gates is {text!r}; gates must be finite")
    return values * config.n_layer if len(values) == 1 else values


def draw_layers(model, optimizer, step, settings, trained):
    """LISA (Pan et al. 2024, as GPAS section 4.1 uses it): of the blocks only lisa_layers, drawn from the seed and the
    step, are trained. `trained` is the set of parameters that may be trained. Moments of what is frozen are dropped."""
    rng = random.Random(f"{settings.seed} {step // settings.lisa_interval}")
    drawn = rng.sample(range(len(model.blocks)), settings.lisa_layers)
    for i, block in enumerate(model.blocks):
        for p in block.parameters():
            p.requires_grad_(i in drawn and p in trained)
            if not p.requires_grad:
                optimizer.state.pop(p, None)


# ---------------------------------------------------------------------------------------------------------------------
# What a person sees


def describe_model(model, data, setup):
    count, config = model.count_params(), model.config
    n = setup.processes.size
    rows = {"windows": "windows of", "documents": "documents of up to"}[setup.settings.rows]
    device = f"{n} x {setup.device.type}" if n > 1 else setup.device
    return (
        f"{config.norm}: {config.n_layer} layers x {config.n_embd}, {count['total']:,} parameters "
        f"({count['active']:,} active, {count['non_embedding']:,} without embedding and head), "
        f"{setup.dtype} on {device}, {len(data.train):,} {rows} {config.block_size} tokens in {data.folder}"
    )


def describe_loss(loss, data):
    """A held-out loss in nats as a part of a line, and as fields of the log."""
    record = {"val_loss": loss, "perplexity": math.exp(min(loss, 700))}
    text = f"validation loss {loss:.4f}, perplexity {record['perplexity']:.2f}"
    if data.bits_per_nat:
        record["bits_per_byte"] = loss * data.bits_per_nat
        text += f", {record['bits_per_byte']:.4f} bits per byte"
    return text, record


class Times:
    """Seconds of the last log_interval steps, and of all evaluations, with the checkpoint after each."""

    def __init__(self, settings):
        self.settings, self.started = settings, time.monotonic()
        self.steps, self.evaluations = deque(maxlen=settings.log_interval), []

    def passed(self):
        return time.monotonic() - self.started

    def left(self, step):
        """Seconds from a step to the end, with evaluations."""
        evaluation = sum(self.evaluations) / max(1, len(self.evaluations))
        return (self.settings.max_iters - step) * (fmean(self.steps) + evaluation / self.settings.eval_interval)


@contextmanager
def timed(seconds):
    """Adds the seconds that its body takes to a list."""
    begin = time.monotonic()
    yield
    seconds.append(time.monotonic() - begin)


# Dense bfloat16 peaks in TFLOP/s, from NVIDIA's data sheets, by a part of the name that CUDA gives; the first counts.
PEAK_TFLOPS = {"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989}
PEAK_TFLOPS |= {"B200": 2250, "L40S": 362, "RTX 4090": 165}


def describe_step(record, model, times, setup):
    """A step's record for the log as a line, and what the log has besides: the speed of the last log_interval steps, in
    tokens (padding too), the MFU where the peak is known, and the losses that training adds to the cross-entropy, in
    this process's last micro-batch."""
    settings, step = setup.settings, record["step"]
    rate = settings.tokens_per_step / max(fmean(times.steps), 1e-9)
    more, reached = {"tokens_per_s": round(rate, 1)}, f"{model.flops_per_token() * rate / 1e12:.3f} TFLOP/s"
    gpu = torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else ""
    peaks = (peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"{part}\b", gpu))  # an "RTX A1000" is no A100
    if peak := settings.peak_tflops or next(peaks, None):
        more["mfu"] = model.mfu(rate, 1e12 * peak * setup.processes.size)
        reached = f"MFU {more['mfu']:.1%}"
    text = (
        f"step {step:5d}: loss {record['loss']:.4f}, lr {record['lr']:.2e}, gradient norm {record['grad_norm']:.3f}, "
        f"{rate:,.0f} tokens/s, {reached}, {clock(times.left(step))} left"
    )
    return text, more | {f"{name}_loss": loss.item() for name, loss in model.losses.items() if name != "cross_entropy"}


def clock(seconds):
    """Seconds as 75s, 12m30s or 5h12m."""
    m, s = divmod(int(seconds), 60)
    return f"{60 * m + s}s" if m < 2 else f"{m}m{s:02d}s" if m < 120 else f"{m // 60}h{m % 60:02d}m"


def picture(report, width=40):
    """A stream_report as text: a bar of each layer's variance, and its gate's value."""
    highest = max(report["variance"])
    lines = ["variance of each layer's output" + ", gate a" * ("gates" in report)]
    for l, variance in enumerate(report["variance"], 1):
        bar = "#" * max(1, round(width * variance / highest)) if math.isfinite(variance) and highest > 0 else ""
        gate = np.atleast_1d(report["gates"][l - 1]).tolist() if "gates" in report else []
        lines.append(f"{l:5d}  {bar:{width}}  {variance:9.3g}" + "".join(f"  {a:+.3f}" for a in gate))
    return "\n".join(lines)


def stream_report(model, x, y, setup):
    """What training does to the stream, on one batch x, y (B, T). Of each layer, a list:

    variance        of the residual state after it, over the hidden dimensions, mean over tokens (Sparsity Eq. 4)
    magnitude       mean |x| of that state over tokens and dimensions (Peri-LN Figure 6), and `largest`, its largest |x|
    kurtosis        of that state's dimensions over tokens, mean over dimensions (Sparsity Eq. 19-20)
    attn_variance   the variance of what the attention adds to the stream, `mlp_variance` of what the MLP adds
    grad_norms      norm of the gradient of the layer's parameters, and `grad_variance`, the variance of its elements
                    (Peri-LN Figure 7), of the plain cross-entropy; what is frozen has no gradient
    gates           the GPAS gates a, two for a layer with one per sub-layer (the scale is 1 - act(a)); absent without
    attn_out_gain, mlp_out_gain   mean gain of the norm B (Peri-LN Figure 9b); absent where not every layer has one

    and of the model: embed_variance, the variance of the first layer's input, and top, the 100 largest |x| of all
    layers' states (Peri-LN Figure 11).
    """
    names = "variance", "magnitude", "largest", "kurtosis", "attn_variance", "mlp_variance"
    report, top, hooks = {name: [] for name in names}, [], []

    def variance(x):
        return x.detach().float().var(-1, correction=0).mean().item()

    def see_state(block, inputs, x):
        if block is model.blocks[0]:
            report["embed_variance"] = variance(inputs[0])
        x = x.detach().float().flatten(0, 1)
        centered, size = x - x.mean(0), x.abs()
        m2, m4 = centered.square().mean(0), centered.pow(4).mean(0)
        report["variance"].append(variance(x))
        report["magnitude"].append(size.mean().item())
        report["largest"].append(size.max().item())
        report["kurtosis"].append((m4 / m2.square().clamp(min=1e-30)).mean().item())
        top.extend(size.flatten().topk(min(100, size.numel())).values.tolist())

    def see_branch(name, module, inputs, h):
        report[f"{name}_variance"].append(variance(h))

    for block in model.blocks:
        hooks.append(block.register_forward_hook(see_state))
        for name in ("attn", "mlp"):
            residual = getattr(block, f"{name}_residual")
            hooks.append(residual.branch_out.register_forward_hook(partial(see_branch, name)))
    model.eval()
    with setup.without_compile(), setup.autocast():
        loss = model(x, y)[1]
    for hook in hooks:
        hook.remove()  # before the backward pass, in which recomputed blocks run again
    loss.backward()
    model.train()
    report["top"] = sorted(top, reverse=True)[:100]
    report["grad_norms"], report["grad_variance"] = gradient_norms(model), []
    for block, norm in zip(model.blocks, report["grad_norms"]):
        grads = [p.grad for p in block.parameters() if p.grad is not None]
        n = max(1, sum(g.numel() for g in grads))
        report["grad_variance"].append(norm**2 / n - (sum(whole(g.sum()).item() for g in grads) / n) ** 2)
    model.zero_grad(set_to_none=True)
    if model.gates():
        gates = [whole(gate.detach()).tolist() for gate in model.gates()]
        report["gates"] = [values[0] if len(values) == 1 else values for values in gates]
    for name in ("attn", "mlp"):
        norms = [getattr(block, f"{name}_residual").out_norm for block in model.blocks]
        if all(getattr(norm, "weight", None) is not None for norm in norms):
            report[f"{name}_out_gain"] = [whole(norm.weight.detach()).float().mean().item() for norm in norms]
    return report


def write_sample(model, tokenizer, prompt, setup):
    """Text: the prompt and its continuation by sample_tokens tokens; an empty prompt is the start of a document."""
    settings, encoding = setup.settings, prepare_data.build_encoding(tokenizer)
    prompt = prompt.encode(errors="surrogateescape").decode(errors="replace")  # a terminal may hand over any bytes
    ids = [encoding.eot_token, *map(int, prepare_data.encode(encoding, prompt))]
    if max(ids) >= model.config.vocab_size:
        raise UserError(f"the prompt holds token {max(ids)}, the model knows {model.config.vocab_size}")
    with setup.without_compile(), setup.autocast():
        idx = torch.tensor([ids], device=setup.device)
        if not model(idx[:, -1:])[0].isfinite().all():
            raise UserError("the model's logits are not finite: it cannot be sampled")
        out = model.generate(idx, settings.sample_tokens, settings.temperature, settings.top_k)
    return prepare_data.decode(encoding, out[0, 1:])


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder: log and checkpoints


class RunFolder:
    """settings.out_dir, in which the process of rank 0 writes. The run that was there stays until a new one has saved
    its first checkpoint; its log is log_previous.jsonl then."""

    def __init__(self, resumed, setup):
        """`resumed` is the checkpoint of a run that goes on, or None. Lines of its log for later steps are removed, and
        a line with the settings that have changed is added."""
        self.setup, self.path, self.lines = setup, Path(setup.settings.out_dir), []
        self.is_main, self.log_path = setup.processes.rank == 0, self.path / "log.jsonl"
        self.saved_step = resumed["step"] if resumed else None
        step = self.saved_step or 0
        if setup.processes.sum(step)[0] != step * setup.processes.size:
            raise UserError(f"the processes see different checkpoints: {self.path} must be one folder for all of them")
        self.loggers = open_loggers(setup.settings) if self.is_main else []
        if not resumed:
            return
        if self.is_main:
            kept = [record for record in read_log(self.log_path) if record["step"] <= self.saved_step]
            text = "".join(json.dumps(record) + "\n" for record in kept)
            save_whole(self.log_path, lambda file: file.write(text.encode()))
        before, now = resumed["settings"] | resumed["config"], asdict(setup.settings)
        names = [name for name in now if name in before and name not in OF_ONE_CALL]
        changed = {n: (before[n], now[n]) for n in names if before[n] != now[n]}
        for name, (old, new) in changed.items():
            print(f"{name}: {old} before, {new} now")
        if changed:
            self.log({"step": self.saved_step, "changed": changed})

    def log(self, record):
        """Adds a line, a dict with `step`, which waits for the first checkpoint."""
        self.lines.append(json.dumps(record) + "\n")
        for logger in self.loggers:
            logger(record["step"], flat(record))
        if self.saved_step is not None:
            self.write_lines()

    def write_lines(self):
        if self.is_main:
            with open(self.log_path, "a") as file:
                file.writelines(self.lines)
        self.lines.clear()

    def save(self, model, optimizer, data, step, **more):
        """Writes ckpt.pt, with `more` fields; all processes take part."""
        settings = self.setup.settings
        state = {
            "model": whole(model.state_dict(), keep=self.is_main),
            "optimizer": whole(optimizer.state_dict(), keep=self.is_main),
            "config": asdict(model.config),
            "step": step,
            "settings": asdict(settings),
            "tokenizer": data.tokenizer,
            "shards": {path.name: size for path, size in data.sizes.items()},
            **more,
        }
        if self.is_main:
            is_first = self.saved_step is None
            if is_first and self.log_path.exists():  # an earlier run's
                give_second_name(self.log_path, self.path / "log_previous.jsonl")
            save_checkpoint(self.path / "ckpt.pt", state)
            if is_first:
                self.log_path.unlink(missing_ok=True)
                for earlier in self.path.glob("ckpt_*.pt"):
                    if re.fullmatch(r"ckpt_\d{6,}", earlier.stem):  # of keep_every
                        earlier.unlink()
        self.saved_step = step
        self.write_lines()
        if self.is_main and is_kept(step, settings):
            give_second_name(self.path / "ckpt.pt", self.path / f"ckpt_{step:06d}.pt")

    def end_where_not_finite(self, step, what, model, batches):
        """UserError and, once there is a checkpoint, a line in the log, that say where the first value that is not
        finite arises in a pass over the batches."""
        where = self.setup.processes.first(first_non_finite(model, batches, self.setup))
        where = f"the first value that is not finite is {where}" if where else "a second pass was finite"
        if self.saved_step is None:
            has_run = (self.path / "ckpt.pt").exists()
            safe = "nothing was saved yet" + ", the run that was there is untouched" * has_run
        else:
            safe = f"{self.path}/ckpt.pt is from step {self.saved_step}"
            self.log({"step": step, "diverged": f"{what}; {where}"})
        raise UserError(f"{what}; {where}; {safe}, a lower learning_rate may help")


def check_out_dir(settings):
    """UserError where a run may not go into out_dir."""
    out_dir = Path(settings.out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"out_dir {out_dir} is a file; it must be a folder")
    if settings.init_from == "resume":
        return
    if any(out_dir.glob("ckpt*.pt")) and not settings.overwrite:
        raise UserError(f"{out_dir} holds a run: --init_from=resume continues it, --overwrite replaces it")
    base = Path(settings.init_from)
    folder = base.parent if base.suffix == ".pt" else base
    if settings.overwrite and settings.init_from != "scratch" and folder.resolve() == out_dir.resolve():
        raise UserError(f"overwrite would remove {base}: name another folder with --out_dir")
    if any(out_dir.glob("*/ckpt.pt")):
        raise UserError(f"{out_dir} holds the runs of a sweep: name another folder with --out_dir")


def is_kept(step, settings):
    """Whether the checkpoint of a step stays under a name of its own (keep_every)."""
    return settings.keep_every > 0 and step % settings.keep_every == 0


def save_checkpoint(path, state):
    """Writes the dict `state` to `path`, whole or not at all; what was there stays beside it as ckpt_previous.pt."""

    def write(file):
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before the checkpoint that was the previous one goes
        if path.exists():
            give_second_name(path, path.with_name("ckpt_previous.pt"))

    save_whole(path, write)


def give_second_name(path, name):
    """Gives the file `path` the second name `name`, so that it is at no moment without its own."""
    link = name.with_name(name.name + ".link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links: a copy
        with open(path, "rb") as source:
            save_whole(name, lambda file: shutil.copyfileobj(source, file))
        return
    os.replace(link, name)
    link.unlink(missing_ok=True)  # it stays where the two are one file already


def open_loggers(settings):
    """Functions of (step, {name: number}) for the services that the settings ask for."""
    loggers = []
    if settings.wandb:
        name, config = Path(settings.out_dir).name, asdict(settings)
        board = prepare_data.optional("wandb").init(project="nanoNorm", name=name, config=config)
        loggers.append(lambda step, numbers: board.log(numbers, step=step))
    if settings.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # a part of torch, which does not name the package that it lacks
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        writer = SummaryWriter(settings.out_dir)
        loggers.append(lambda step, numbers: [writer.add_scalar(name, n, step) for name, n in numbers.items()])
    return loggers


def flat(record):
    """The numbers of a record of the log by name, those of a list by name/1 ... (the layer), of a list in it by
    name/1/1 ... (the sub-layer)."""
    numbers = {}
    for name, value in record.items():
        if isinstance(value, list):
            numbers |= flat({f"{name}/{i}": v for i, v in enumerate(value, 1)})
        elif isinstance(value, (int, float)) and name != "step":
            numbers[name] = value
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def first_non_finite(model, batches, setup):
    """In words, the first value that is not finite: of the parameters, else of a forward and backward pass over
    `batches`; None if there is none.

    Hooks see each module's output as it is computed, the innermost first, and then the gradients in their order. No
    early return: the processes of a sharded model pass through it together.
    """
    places = []

    def check(where, tensor):
        if not whole(tensor.detach()).isfinite().all():
            places.append(where)

    def see(name, module, args, out):
        if isinstance(out, torch.Tensor):
            check(f"the output of {name}", out)
            if out.requires_grad:
                out.register_hook(partial(check, f"the gradient of the output of {name}"))

    for name, p in model.named_parameters():
        check(f"the parameter {name}", p)
    hooks = [module.register_forward_hook(partial(see, name)) for name, module in model.named_modules() if name]
    for x, y, _ in batches:
        with setup.without_compile(), setup.autocast():
            loss = model(x, y)[1]
        check("the loss", loss)
        loss.backward()
        for name, p in reversed(list(model.named_parameters())):
            if p.grad is not None:
                check(f"the gradient of {name}", p.grad)
        model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return places[0] if places else None


# The environment variable that tells a run the process id of its sweep.
SWEEP = "NANONORM_SWEEP"


class StopRequest:
    """While it listens, SIGTERM or SIGINT asks the run to finish its step, save and end (`number` is the signal's); a
    second one ends the process at once. SIGTERM counts once in five seconds: a scheduler sends it to all processes of a
    job, and torchrun hands it on. A run of a sweep also stops when the sweep has ended without it."""

    def __init__(self, is_main):
        self.is_main, self.number, self.since = is_main, 0, 0.0  # since: when the signal came (time.monotonic())
        self.sweep = int(os.environ.get(SWEEP, 0))  # 0: this is no run of a sweep

    def is_asked(self):
        return self.number > 0 or self.sweep not in (0, os.getppid())  # another process is the parent of an orphan

    @contextmanager
    def listen(self):
        before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number, frame):
        now = time.monotonic()
        if self.number == number == signal.SIGTERM and now - self.since < 5:
            return
        # os.write, since a signal may arrive in the middle of a print
        if self.number:
            os.write(2, b"stopped at once; what was saved before is untouched\n")
            os._exit(128 + number)
        self.number, self.since = number, now
        if self.is_main:
            os.write(2, f"{signal.Signals(number).name}: ends after this step; once more ends at once\n".encode())

    def end(self, what):
        """Says what was stopped, and ends the process as by the signal."""
        number = self.number or signal.SIGTERM  # it may have come to another process
        print(f"{signal.Signals(number).name}: {what}")
        sys.exit(128 + number)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass
class Processes:
    """The processes of the job: this one alone, or those that torchrun started."""

    rank: int = 0  # the one of rank 0 speaks and writes
    size: int = 1
    store: dist.Store | None = None  # what they share besides tensors

    def sum(self, *values):
        """The sum over the processes of each of some numbers, in float64; of one process the numbers themselves."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def first(self, value):
        """The `value` of the first process in which it is not None."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return next((v for v in values if v is not None), None)

    def wait(self):
        """Returns when all have come here."""
        self.sum(0)


@contextmanager
def connected_processes():
    """The Processes, as the environment that torchrun sets describes them, connected by gloo and, on GPUs, nccl.

    Only rank 0 prints. The process that fails first says why; the others, which fail for want of it, end silently.
    """
    processes, has_failed = Processes(), False
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            store, rank, size = next(dist.rendezvous("env://"))
            processes = Processes(rank, size, store)
            if rank:
                sys.stdout = open(os.devnull, "w")
                warnings.simplefilter("ignore")
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        yield processes
    except BaseException as error:
        # What DDP made must be gone before the connection is: in the other order the last reference to the connection
        # goes with it, and waits for a thread that waits for Python.
        traceback.clear_frames(error.__traceback__)
        has_failed = processes.size > 1 and isinstance(error, Exception)
        if has_failed:
            if processes.store.add("an error is told", 1) > 1:
                sys.exit(2)
            if isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError)):
                reason = str(error).partition("\n")[0]
                raise UserError(
                    "a process of this job has ended without a word (killed, or out of memory?); "
                    f"what was saved is untouched, --init_from=resume goes on from there ({reason})"
                ) from None
        raise
    finally:
        # Closing nccl waits for all processes: after an error, which may be of this one alone, it is left open.
        if dist.is_initialized() and not (has_failed and torch.cuda.is_available()):
            gc.collect()
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Planning


def plan(settings):
    """What a run would be, as text: the model's size, its tokens, steps and FLOPs, and the memory of each GPU, from a
    model on the meta device. Only epochs need the data, to count them; without data the vocabulary is that of bytes."""
    if settings.max_iters is None:
        folder = data_folder(settings, Processes())
        data = TokenData(folder, "train", settings.block_size, 2**31, rows=settings.rows)  # of any vocabulary
        settings.max_iters = count_steps(settings, len(data))
    in_data_dir = Path(settings.data_dir) / settings.dataset
    meta = prepare_data.read_meta(in_data_dir) or prepare_data.read_meta(settings.dataset)
    vocab_size = settings.vocab_size or meta.get("vocab_size") or prepare_data.byte_encoding().n_vocab
    with torch.device("meta"):
        model = GPT(settings.architecture(vocab_size))
    count, G, tokens = model.count_params(), 1e9, settings.tokens_per_step * settings.max_iters
    one_vocab = count["non_embedding"] + model.lm_head.weight.numel()
    n_copies = 2 if settings.optimizer == "sgd" else 4  # the weight, its gradient, and Adam's two moments
    n_copies += settings.gpus > 1 and not settings.shard  # the gradient once more, where DDP exchanges it
    bytes_each = DTYPES[settings.dtype].itemsize
    state = n_copies * bytes_each * count["total"] / (settings.gpus if settings.shard else 1)
    flops, activations = model.flops_per_token(), activation_bytes(model, settings)
    return (
        f"{settings.norm}: {settings.n_layer} layers x {settings.n_embd}, {vocab_size:,} tokens in the vocabulary, "
        f"{count['total']:,} parameters\n"
        f"  {count['active']:,} active, {one_vocab:,} with one vocabulary matrix, {count['non_embedding']:,} with none\n"
        f"  {settings.max_iters:,} steps of {settings.tokens_per_step:,} tokens: {tokens / G:.3g}G tokens\n"
        f"  {flops / G:.3g} GFLOP a token, {flops * tokens:.3g} FLOP in all\n"
        f"  on each of {settings.gpus} GPUs: {settings.tokens_per_step // settings.gpus:,} tokens a step, "
        f"and in memory {state / G:.3g} GB of weights, gradients and moments "
        f"({'sharded' if settings.shard else 'whole'}) + "
        f"{activations / G:.3g} GB of activations in bfloat16 autocast ({settings.batch_size} sequences, "
        f"{'blocks recomputed' if settings.recompute else 'all kept'})"
    )


def activation_bytes(model, settings):
    """What autograd keeps of one micro-step in bfloat16 autocast, its 16-bit copies of the weights included, and the
    gradient of the logits: the peak as far as it can be told without a run. From tensors without memory."""
    kept = {}  # bytes by storage

    def keep(tensor):
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            kept[storage._cdata] = storage.nbytes()
        return tensor

    blocks, inputs = model.blocks, 0
    if settings.recompute:  # every block's input in float32, and what one block keeps
        model.blocks = nn.ModuleList([max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()))])
        inputs = 4 * settings.n_layer * settings.batch_size * settings.block_size * settings.n_embd
    with FakeTensorMode(), warnings.catch_warnings(action="ignore"):
        params = {name: nn.Parameter(torch.empty(p.shape)) for name, p in model.named_parameters()}
        idx = torch.zeros(settings.batch_size, settings.block_size, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                logits, loss = torch.func.functional_call(model, params, (idx, idx))
    model.blocks = blocks
    return sum(kept.values()) + inputs + 4 * logits.numel()


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps: lists of values, trained by one process of this program for each combination

# What cannot be a list: folders, how the program is called, and a text that has commas of its own.
NEVER_LISTS = "out_dir init_from data_dir overwrite jobs eval_only sample dry_run gpus gates".split()

# Where an earlier run may differ from the sweep that it belongs to: its length, where its data are, how it is watched.
MAY_DIFFER = "max_iters max_tokens epochs vocab_size data_dir eval_interval log_interval keep_every".split()
MAY_DIFFER += "sample_tokens temperature top_k wandb tensorboard peak_tflops".split()
MAY_DIFFER += [name for name in OF_ONE_CALL if name != "init_from"]


@dataclass
class Trial:
    """One combination of a sweep: a run in a folder of its own."""

    folder: Path  # its name is what sets it apart: norm=pre,seed=1
    given: dict  # settings, as train.py takes them
    settings: Settings
    step: int = 0
    loss: float | None = None  # the last on the held-out set
    outcome: str = ""  # "finished", "diverged: why" or "failed: why"; empty as long as it is not trained
    started: float = 0.0  # when its process did (time.time())

    def update(self):
        """Notes from the run's log its step, its loss and whether it diverged. A log that is older than its process,
        where it has one, is an earlier run's."""
        log = self.folder / "log.jsonl"
        try:
            records = read_log(log) if os.path.getmtime(log) >= self.started else []
        except (FileNotFoundError, UserError):  # none yet, renamed just now, or damaged: then the run itself says so
            return
        for record in records:
            self.step, self.loss = record["step"], record.get("val_loss", self.loss)
            if "diverged" in record:
                self.outcome = f"diverged: {record['diverged']}"


def is_sweep(given):
    """Whether a setting is a list. UserError for a list of folders."""
    for name in ("out_dir", "init_from", "data_dir"):
        text = given.get(name) or ""
        if "," in text and "=" not in text and not Path(text).exists():  # "=": the folder of a run of a sweep
            raise UserError(f"{name} is one folder and cannot be a list: {text!r}")
    return any(isinstance(value, list) for value in given.values())


def sweep(given, processes, stop):
    """Trains every combination of the settings that are lists, several at a time, each in its own folder in out_dir.

    What is finished there is not repeated, unless with overwrite; what was interrupted goes on. UserError before the
    first one starts for a mistake in any of them, and at the end if a run has failed. A run that diverged has not
    failed, and is not repeated.
    """
    lists = {name: values for name, values in given.items() if isinstance(values, list)}
    names = ", ".join(lists)
    if processes.store:
        raise UserError(
            f"a list of values ({names}) is several runs, and torchrun's processes share one run: "
            "start it with python train.py, which starts a process for each run"
        )
    for name in ("eval_only", "sample", "dry_run"):
        if given.get(name) not in (None, False):
            raise UserError(f"{name} is for one run: it does not go with a list of values ({names})")
    if given.get("init_from") == "resume":
        raise UserError("a sweep goes on where it was interrupted by the same command: leave out init_from=resume")
    folder, trials = Path(given.get("out_dir") or "out-sweep"), []
    if (folder / "ckpt.pt").exists():
        raise UserError(f"{folder} holds a run of its own: name another folder for the sweep with --out_dir")
    for values in itertools.product(*lists.values()):
        combination = dict(zip(lists, values))
        name = ",".join(f"{setting}={value}" for setting, value in combination.items()).replace("/", "_")
        if any(trial.folder.name == name for trial in trials):
            raise UserError(f"the lists give {name} twice")
        try:
            trials.append(build_trial(folder / name, {**given, **combination, "out_dir": str(folder / name)}))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    others = {path.parent.name for path in folder.glob("*/ckpt.pt")}.difference(trial.folder.name for trial in trials)
    if others:
        some = f"other runs than this sweep's, such as {min(others)}"
        warnings.warn(f"{folder} also holds {some}: analyze.py counts them too")
    folder.mkdir(parents=True, exist_ok=True)
    with prepare_data.locked(folder, f"training the runs in {folder}"):
        train_trials(trials, stop)
    print_table(trials)
    again = "the same command goes on from here"
    if trials[0].settings.overwrite:
        again = "the same command begins all of them anew, with --overwrite=false it keeps what the folder holds"
    if stop.number:
        stop.end(f"stopped; {again}")
    print(f"compare them with: python analyze.py {folder}")
    n_failed = sum(trial.outcome.startswith("failed") for trial in trials)
    if n_failed:
        raise UserError(f"{n_failed} of {len(trials)} runs failed; train.log in a run's folder says more, {again}")


def build_trial(folder, given):
    """The Trial of a combination as its folder holds it. UserError for what would end its run at the start, and if the
    run that is there has other settings or is being trained."""
    values, base = settings_of_run(given)  # base: the checkpoint that is fine-tuned, if any
    settings = build_settings(Settings, values)
    if settings.shard:
        raise UserError("shard needs torchrun, which does not go with a list of values")
    if not takes_any_gpu(settings):
        usable_device(settings.device)
    setup = Setup(settings, Processes(), torch.device("meta"), "float32")
    with torch.device("meta"):
        build_model(open_data(base, setup).config, None, setup, is_new=True)
    trial = Trial(folder, given, settings)
    if settings.overwrite:
        check_out_dir(settings)
    if settings.overwrite or not any(folder.glob("ckpt*.pt")):
        return trial

    with prepare_data.locked(folder, f"training in {folder}"):
        trial.update()  # which may say that it diverged
        checkpoint = open_checkpoint(folder)
    of_run = dict(checkpoint["settings"])
    if (folder / "settings.py").exists():  # what the sweep last asked of it; its checkpoint may say "resume"
        of_run["init_from"] = read_config_file(Settings, str(folder / "settings.py")).get("init_from", "scratch")
    for field in fields(Settings):
        before, now = of_run.get(field.name, field.default), getattr(settings, field.name)
        has_effect = field.name != "eval_iters" or settings.last_eval_iters is None
        if before != now and has_effect and field.name not in MAY_DIFFER:
            raise UserError(f"the run there has {field.name} {before}, not {now}; --overwrite starts all runs anew")
    was_finished = checkpoint["step"] >= of_run.get("max_iters", 2**63)
    decays = settings.lr_decay_iters is None and settings.min_lr != settings.learning_rate
    if was_finished and decays and settings.max_iters > checkpoint["step"]:
        where = f"the run there has ended at step {checkpoint['step']}, where its learning rate had decayed"
        more = "continue it alone with --init_from=resume, or give --overwrite to start all runs anew"
        raise UserError(f"{where}: {more}")
    if not trial.outcome:
        trial.step, trial.loss = checkpoint["step"], checkpoint["val_loss"]
        trial.outcome = "finished" if trial.step >= settings.max_iters else ""
    return trial


def train_trials(trials, stop):
    """Trains the runs that have no outcome and notes theirs: settings.jobs at a time or, where that is not given, as
    many as there are GPUs or cores, or one where they share a device. A run that is stopped has none."""
    waiting = [trial for trial in trials if not trial.outcome]
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    places = [{"OMP_NUM_THREADS": "1"}] * n_cores  # environment variables that give a run its core or GPU
    if waiting and all(takes_any_gpu(trial.settings) for trial in waiting):
        numbers = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        places = [{"CUDA_VISIBLE_DEVICES": number} for number in numbers.split(",")]
    elif any(trial.settings.device not in ("auto", "cpu") for trial in waiting):  # a device that they share
        places = places[:1]
    n_jobs = trials[0].settings.jobs or len(places)
    free = [places[i % len(places)] for i in range(n_jobs)]
    if waiting:
        print(f"{len(waiting)} runs, {n_jobs} at a time; see train.log in their folders", file=sys.stderr)
    started, before, shown, is_terminal = time.monotonic(), share_done(trials), None, sys.stderr.isatty()
    with stop.listen(), ThreadPoolExecutor(n_jobs) as pool:
        futures = [pool.submit(train_trial, trial, free, stop) for trial in waiting]
        while wait(futures, timeout=1).not_done:
            share, n_ended = share_done(trials), sum(trial.outcome != "" for trial in trials)
            if share > before + 0.01 and (is_terminal or n_ended != shown):  # the first steps say little of the others
                left = (time.monotonic() - started) * (1 - share) / (share - before)
                text = f"{n_ended} of {len(trials)} runs have ended, {share:.0%} of the steps, about {clock(left)} left"
                print(text.ljust(100), end="\r" if is_terminal else "\n", file=sys.stderr)
                shown = n_ended
    for future in futures:
        future.result()


def share_done(trials):
    """The share of the steps of all runs that are done, as their logs say; a run that has ended counts as whole."""
    done = 0
    for trial in trials:
        if trial.started and not trial.outcome:
            trial.update()
        done += trial.settings.max_iters if trial.outcome else trial.step
    return done / max(1, sum(trial.settings.max_iters for trial in trials))


def train_trial(trial, free, stop):
    """Trains a run in a process of its own, at a free place, and notes its outcome. If the sweep is stopped, the run is
    asked to save and end, and has none. Its session is its own, so that Ctrl-C in the terminal reaches the sweep alone.
    """
    if stop.number:
        return
    place = free.pop(0)
    try:
        is_resumed = (trial.folder / "ckpt.pt").exists() and not trial.settings.overwrite
        trial.folder.mkdir(parents=True, exist_ok=True)
        config, log = trial.folder / "settings.py", trial.folder / "train.log"
        given = {name: value for name, value in trial.given.items() if name not in ("overwrite", "jobs")}
        text = "".join(f"{name} = {value!r}\n" for name, value in given.items())
        save_whole(config, lambda file: file.write(text.encode()))
        command = [sys.executable, __file__, config, "--init_from=resume" if is_resumed else "--overwrite"]
        environment = {**os.environ, **place, SWEEP: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        trial.started = time.time()
        with open(log, "ab") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        while process.poll() is None and not stop.number:
            time.sleep(0.1)
        process.terminate()  # does nothing if it has ended
        code = process.wait()
        trial.update()
        if code == 0:
            trial.outcome = "finished"
        elif not trial.outcome and not (stop.number and code in (-signal.SIGTERM, 128 + signal.SIGTERM)):
            said = log.read_text(errors="replace").strip() or "it said nothing"
            last_line = said.splitlines()[-1].removeprefix("error: ")
            trial.outcome = f"failed: killed by {signal.Signals(-code).name}" if code < 0 else f"failed: {last_line}"
    except UserError as error:
        trial.outcome = f"failed: {error}"
    except OSError as error:
        trial.outcome = f"failed: {error.filename}: {error.strerror}"
    finally:
        free.append(place)
    if trial.outcome:
        print(f"{trial.folder.name} {trial.outcome}".ljust(100), file=sys.stderr)


def print_table(trials):
    width = max(len(trial.folder.name) for trial in trials)
    print(f"{'run':{width}}   step  held-out loss")
    for trial in trials:
        loss = "" if trial.loss is None else f"{trial.loss:.4f}"
        note = "" if trial.outcome == "finished" else trial.outcome or "not finished"
        print(f"{trial.folder.name:{width}}  {trial.step:5d}  {loss:13}  {note}".rstrip())


if __name__ == "__main__":
    run(main)
