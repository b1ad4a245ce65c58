"""Pretraining: `python train.py --norm=gpas_pre` trains 12 layers on this machine's own Python sources in minutes.

    python train.py --norm=lns --n_layer=24 --dataset=NAME     another placement, depth, data (see prepare_data.py)
    python train.py config/gpas_130m.py --compile              settings from a file, then from the command line
    python train.py config/gpas_7b.py --gpus=8 --dry_run       its size, tokens, FLOPs and memory, without training
    torchrun --nproc_per_node=8 train.py config/gpas_1b.py     several processes, one for each GPU
    python train.py --norm=lns --init_from=resume              continue the run in out-lns
    python train.py --init_from=out-lns --dataset=NAME         fine-tune its weights
    python train.py --norm=lns --eval_only                     its loss on the held-out set
    python train.py --norm=lns --sample="def "                 what it writes
    python train.py --help                                     every setting

A run is a folder: ckpt.pt (weights, optimizer, architecture, tokenizer), ckpt_previous.pt (the one before) and
log.jsonl (one object a line). SIGTERM and Ctrl-C save and end it; --init_from=resume goes on to the bit.
"""

import ctypes
import gc
import json
import math
import os
import platform
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

import prepare_data
from configurator import COUNT, NATURAL, NOT_NEGATIVE, UserError, build_settings, read_log, read_settings, run, save_whole
from model import GPT, GPTConfig, find_device, find_scheme, load_checkpoint
from prepare_data import TokenData

# ---------------------------------------------------------------------------------------------------------------------
# Settings


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
    seed: NATURAL = 1337  # of the weights and of the order of the data
    # data
    dataset: str = "stdlib"  # a folder in data_dir, or a path
    data_dir: str = "data"  # where prepare_data.py puts data sets
    batch_size: COUNT = 8  # sequences per process and micro-step
    gradient_accumulation_steps: COUNT = 2  # micro-steps per step, of the whole job: the processes share them
    # optimization: AdamW, linear warm-up, cosine decay
    max_iters: NATURAL = 280  # steps
    learning_rate: NOT_NEGATIVE = 4e-3  # at its highest
    min_lr: NOT_NEGATIVE | None = None  # at the end of the decay; none: a tenth of learning_rate
    warmup_iters: NATURAL = 30  # steps of linear warm-up
    lr_decay_iters: NATURAL | None = None  # step at which min_lr is reached; none: max_iters
    weight_decay: NOT_NEGATIVE = 0.1  # on matrices
    decay_vectors: bool = False  # weight decay on gains and gates too (as in Sparsity's code)
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: NOT_NEGATIVE = 1.0  # largest norm of the gradient of all but the gates; 0: no clipping
    gate_clip: NOT_NEGATIVE = 0.0  # of all gates, jointly (GPAS clips at 0.01 where gates fluctuate); 0: no clipping
    gates: str | None = None  # fixed gates: a number, n_layer of them with commas between, or a run's folder (its)
    freeze_gates: bool | None = None  # gates stay what they are at the start; none: in fine-tuning (GPAS section 4.1)
    lisa_layers: int = 0  # LISA: train only the embedding, the head and so many layers, drawn anew; 0: all layers
    lisa_interval: COUNT = 20  # LISA: steps between draws
    nan_patience: COUNT = 3  # steps in a row with a loss or gradient that is not finite, each skipped, that end the run
    # evaluation and log
    eval_interval: COUNT = 50  # steps between evaluations, each followed by a checkpoint
    eval_iters: COUNT = 13  # batches of the held-out set, the same each time and for every seed
    log_interval: COUNT = 10  # steps between lines
    sample_tokens: COUNT = 200  # length of a sample
    temperature: NOT_NEGATIVE = 0.8  # of a sample; 0: the likeliest token each time
    top_k: COUNT | None = 50  # a sample draws among the k likeliest tokens; none: among all
    # machine
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1, mps ...
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # bfloat16: autocast; auto: where it is fast
    compile: bool | None = None  # torch.compile the model; none: on cuda
    shard: bool = False  # spread weights, gradients and optimizer over the processes (FSDP2): beyond one GPU's memory
    recompute: bool = False  # keep only each block's input for the backward pass and compute the block again
    wandb: bool = False  # log to Weights & Biases too
    tensorboard: bool = False  # write TensorBoard files to out_dir too
    peak_tflops: NOT_NEGATIVE = 0.0  # the device's dense peak, for the share that is reached (MFU); 0: from PEAK_TFLOPS

    def __post_init__(self):
        super().__post_init__()
        is_tuning, has_gates = self.init_from not in ("scratch", "resume"), find_scheme(self.norm)[1]
        self.out_dir = self.out_dir or f"out-{self.norm}" + "-finetuned" * is_tuning
        if self.freeze_gates is None:
            self.freeze_gates = is_tuning and has_gates and self.gates is None
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} must be at least 0 and under 1")
        if self.gates is not None and self.freeze_gates:
            raise ValueError("gates are fixed values: freeze_gates adds nothing")
        for name in ("gates", "freeze_gates", "gate_clip"):
            if getattr(self, name) and not has_gates:
                raise ValueError(f"{name}={getattr(self, name)} has no effect: norm {self.norm} has no gates")
        if not 0 <= self.lisa_layers <= self.n_layer:
            raise ValueError(f"lisa_layers is {self.lisa_layers}; the model has {self.n_layer} layers")
        for name in ("compile", "shard"):
            if self.lisa_layers and getattr(self, name):
                raise ValueError(f"lisa_layers changes what is trained as it runs: it does not go with {name}")


# What belongs to one call and not to the run.
PER_CALL = "out_dir init_from overwrite eval_only sample dry_run gpus device dtype compile shard recompute".split()


def settings_of_run(given, found):
    """Defaults {name: value} of what is not `given`: where a run is continued, evaluated or sampled, its own settings;
    where it is fine-tuned, its architecture; {} for a new run.

    Puts into the dict `found` the run's "checkpoint" and, as "changed", {name: (before, now)} of the training settings
    that are given otherwise. UserError if what is given contradicts its architecture.
    """
    init_from = given.get("init_from", "scratch")
    is_call = given.get("eval_only") or given.get("sample") is not None
    if init_from == "scratch" and not is_call:
        return {}
    if given.get("overwrite") and (is_call or init_from == "resume"):
        raise UserError("overwrite replaces a run with a new one: it does not go with resume, eval_only or sample")
    is_tuning = init_from not in ("scratch", "resume") and not is_call
    place = init_from if is_tuning else given.get("out_dir") or f"out-{given.get('norm', 'pre')}"
    checkpoint = found["checkpoint"] = open_checkpoint(place)
    if not is_tuning and given.get("gates", (was := checkpoint["settings"].get("gates"))) != was:
        raise UserError("gates are set where a run begins: they do not go with resume, eval_only or sample")
    before = dict(checkpoint["config"])
    if not is_tuning:
        known = Settings.__dataclass_fields__.keys() - PER_CALL
        of_run = {n: v for n, v in checkpoint["settings"].items() if n in known}
        before = {**of_run, **before, "out_dir": place}
    other = {n: v for n, v in given.items() if n in before and v != before[n]}
    # no weight depends on the length
    fixed = [n for n in checkpoint["config"] if n in other and not (is_tuning and n == "block_size")]
    if fixed:
        wrong = ", ".join(f"{n} {before[n]} (given {given[n]})" for n in fixed)
        raise UserError(f"{place} is a model of {wrong}")
    found["changed"] = {n: (before[n], v) for n, v in other.items()}
    return before


# Dense bfloat16 peaks in TFLOP/s, from NVIDIA's data sheets, by a part of the name that CUDA gives.
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "RTX 4090": 165}


# ---------------------------------------------------------------------------------------------------------------------
# Setup


@dataclass
class Processes:
    """The processes of the job: this one alone, or those that torchrun started."""

    rank: int = 0  # the one of rank 0 speaks and writes
    local_rank: int = 0  # among those of this machine: the number of its GPU
    size: int = 1
    store: dist.Store | None = None  # what they share before they are connected
    device: torch.device = torch.device("cpu")

    def connect(self, device):
        """From here on they exchange tensors: by nccl between GPUs, by gloo between CPUs."""
        self.device, is_cuda = device, device.type == "cuda"
        if self.size > 1:
            place = {"store": self.store, "rank": self.rank, "world_size": self.size}
            dist.init_process_group("nccl" if is_cuda else "gloo", device_id=device if is_cuda else None, **place)

    def sum(self, *values):
        """The sum over the processes of each of some numbers, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
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


def find_processes():
    """Processes, as the environment that torchrun sets describes them. Only rank 0 prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Processes()
    store, rank, size = next(iter(dist.rendezvous("env://")))
    if rank:
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    return Processes(rank, int(os.environ["LOCAL_RANK"]), size, store)


@contextmanager
def one_voice(processes):
    """Under torchrun the process that fails first says why; the others, which fail for want of it, follow silently."""
    try:
        yield
    except BaseException as error:
        # What DDP made must be gone before the connection is: in the other order the last reference to the connection
        # goes with it, and waits for a thread that waits for Python.
        traceback.clear_frames(error.__traceback__)
        if processes.size > 1 and isinstance(error, Exception):
            if processes.store.add("has spoken", 1) > 1:
                sys.exit(2)
            if isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError)):
                raise UserError(
                    "a process of this job has ended without a word (killed, or out of memory?); "
                    "what was saved is untouched, --init_from=resume goes on from there"
                ) from None
        raise
    finally:
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


class StopRequest:
    """SIGTERM or SIGINT asks the run to finish its step, save and end (`number` is the signal's); a second one ends the
    process at once. So it is from `listen` to the end of the context."""

    def __init__(self, speaks):
        self.speaks, self.number, self.before = speaks, 0, {}

    def listen(self, out_dir):
        self.out_dir = out_dir
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        # os.write, since a signal may arrive in the middle of a print
        if self.number:
            os.write(2, f"stopped at once; {self.out_dir}/ckpt.pt is the last that was saved\n".encode())
            os._exit(128 + number)
        self.number = number
        if self.speaks:
            os.write(2, f"{signal.Signals(number).name}: ends after this step; once more ends at once\n".encode())


def keep_freed_memory():
    """Under glibc, keeps freed activations with the process (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD): on the CPU,
    fetching fresh pages from the system for each of them costs about a sixth of a step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25), libc.mallopt(-1, (1 << 31) - 1)


def setup_device(settings, processes):
    """(device, dtype name, autocast context factory) as the settings ask for and the machine has."""
    name = settings.device
    if processes.size > 1:
        if ":" in name:
            raise UserError(f"device is {name} for all {processes.size} processes; say cuda, and each takes its own")
        if name in ("auto", "cuda") and torch.cuda.is_available():
            name = f"cuda:{processes.local_rank}"
    try:
        device = find_device(name)
    except ValueError as error:
        raise UserError(str(error)) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = settings.dtype
    if dtype == "auto":
        asks = {"cuda": torch.cuda.is_bf16_supported, "cpu": torch.cpu._is_avx512_bf16_supported}.get(device.type)
        dtype = "bfloat16" if asks and asks() else "float32"
    torch.backends.cuda.matmul.allow_tf32 = True
    if device.type == "cpu":
        keep_freed_memory()

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()

    return device, dtype, autocast


def find_data(settings):
    """Folder of the data set; the default one is prepared if it is missing. UserError for any other."""
    try:
        return prepare_data.find_data(settings.dataset, settings.data_dir, "train")
    except UserError:
        if settings.dataset != "stdlib" or (Path(settings.data_dir) / "stdlib").is_dir():
            raise
    print("preparing the default data set, this machine's Python standard library")
    return prepare_data.prepare(prepare_data.Settings(data_dir=settings.data_dir))


def shard_sizes(*data):
    """{path: bytes} of the shards behind some TokenData."""
    return {path: os.path.getsize(path) for part in data for path in part.paths}


def check_shards(sizes):
    """UserError for a shard that has disappeared or changed size: reading its memory map past its end would kill."""
    for path, size in sizes.items():
        try:
            now = os.path.getsize(path)
        except OSError as error:
            raise UserError(f"shard {path} has gone ({error.strerror}): {GO_ON}") from None
        if now != size:
            raise UserError(f"shard {path} has {now} bytes, {size} before: {GO_ON}")


GO_ON = "put it back, and --init_from=resume goes on from the last checkpoint"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

PREVIOUS = "ckpt_previous.pt"


def save_checkpoint(path, state):
    """Writes the dict `state` to `path`, whole or not at all; what was there stays beside it as PREVIOUS."""

    def write(file):
        torch.save(state, file)
        if path.exists():
            keep_as(path, path.with_name(PREVIOUS))

    save_whole(path, write)


def keep_as(path, previous):
    """Gives the file `path` the second name `previous`, so that it is at no moment without its own."""
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without links: a copy
        shutil.copyfile(path, previous)


def open_checkpoint(place):
    """model.load_checkpoint's dict, and what else train.py reads of it is as it was written; UserError."""
    try:
        checkpoint = load_checkpoint(place)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        sizes = checkpoint.get("shards", {})
        if not all(isinstance(name, str) and type(size) is int for name, size in sizes.items()):
            raise ValueError("its shards are not sizes by name")
        if type(checkpoint.get("skipped", 0)) is not int or type(checkpoint.get("val_loss")) not in (float, type(None)):
            raise ValueError("its skipped or its val_loss is not a number")
        if checkpoint["tokenizer"] is not None:
            prepare_data.build_encoding(checkpoint["tokenizer"])
    except Exception as error:  # an edited file can hold anything
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"checkpoint {place} cannot be read: {type(error).__name__} {reason}") from None
    return checkpoint


def portable(tree, rank):
    """Nested dicts and lists with every sharded tensor whole and on the CPU: one form, however many processes trained.

    All processes take part; only that of rank 0 keeps the tensors."""
    if isinstance(tree, dict):
        return {key: portable(value, rank) for key, value in tree.items()}
    if isinstance(tree, list):
        return [portable(value, rank) for value in tree]
    if is_sharded(tree):
        tensor = tree.full_tensor()
        return tensor.cpu() if rank == 0 else None
    return tree


def is_sharded(tensor):
    """Whether it is a DTensor (their import takes a second: it is for those who shard)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """A sharded tensor in one piece; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def placed_as(like, value):
    """The whole tensor `value` as `like` lies: where that is sharded, this process's part of it."""
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value


def load_optimizer(optimizer, saved):
    """Gives the optimizer the moments of the `saved` state, in portable form; the hyperparameters stay its own.
    ValueError or another error of look-up if they do not fit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, moments in saved["state"].items():
        for name, value in moments.items():
            if value.dim() and value.shape != params[i].shape:
                raise ValueError(f"{name} of parameter {i} has shape {tuple(value.shape)}, not {tuple(params[i].shape)}")
        # `clone`, since AdamW will write into them and the file is mapped
        state[i] = {name: placed_as(params[i], v).clone() if v.dim() else v.clone() for name, v in moments.items()}
    now = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in now]:
        raise ValueError("its groups hold other parameters")
    optimizer.load_state_dict({"state": state, "param_groups": now})


# ---------------------------------------------------------------------------------------------------------------------
# The model


def build_model(config, weights, settings, device, dtype, use_compile=False):
    """A GPT on the device, with the weights of a checkpoint or None for new ones; UserError if it cannot be had.

    With settings.shard each process holds its part of every parameter, and never the whole of more than one: the same
    weights as without, since each parameter is drawn whole from a generator of its own and then cut.
    """
    if settings.shard and weights is None and find_scheme(config.norm)[0].omega:
        raise UserError(
            f"norm {config.norm} is initialized by a pass through the whole model: begin without --shard "
            "(--max_iters=0) and go on with --init_from=resume --shard"
        )
    try:
        torch.manual_seed(settings.seed)
        with torch.device("meta") if settings.shard else nullcontext():
            model = GPT(config)
        model = model.double() if dtype == "float64" else model
        if settings.recompute:
            for block in model.blocks:
                block.forward = partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
        if settings.shard:
            torch.manual_seed(settings.seed)
            shard_model(model, device, use_compile, None if weights else int(torch.randint(2**62, (), device="cpu")))
        model.to(device)
        if weights is not None:
            params = dict(model.named_parameters())
            model.load_state_dict({n: placed_as(params[n], w) if n in params else w for n, w in weights.items()})
        return model
    except (RuntimeError, MemoryError, OverflowError, AttributeError) as error:
        what = "the checkpoint's weights do not fit its config" if weights else "this model cannot be built"
        reason = str(error).splitlines()[-1].strip() if str(error) else type(error).__name__
        raise UserError(f"{what}: {reason}") from None


def shard_model(model, device, use_compile, init_seed):
    """Spreads a model on the meta device over the processes (FSDP2) and gives it memory, and the weights of init_seed
    unless it is None.

    A block's weights are gathered just before it computes and dropped after. They are gathered in float32, as autocast
    expects them. What is compiled is the block, between its gathering and its dropping."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.experimental import implicit_replication

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        if use_compile:
            block.compile()
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    if init_seed is not None:
        with implicit_replication():  # each process draws the whole tensor, and copies its part of it
            model.init_weights(init_seed)


def draw_layers(model, optimizer, step, settings, trained):
    """LISA (Pan et al. 2024, as GPAS section 4.1 uses it): of the blocks' parameters only those of lisa_layers layers
    are trained; the embedding and the head, with its norm, always are. A function of the seed and the step.

    `trained` holds the ids of what is trained at all. Moments of what is frozen are dropped, for the memory.
    """
    rng = random.Random(f"{settings.seed} {step // settings.lisa_interval}")
    drawn = rng.sample(range(len(model.blocks)), settings.lisa_layers)
    for i, block in enumerate(model.blocks):
        for p in block.parameters():
            p.requires_grad_(i in drawn and id(p) in trained)
            if not p.requires_grad:
                optimizer.state.pop(p, None)


def read_gates(text, config):
    """Gate values of each layer, as GPT.set_gates takes them, from a number, a list or the folder of a run; UserError.

    Predefined gates are the final ones of another run (GPAS Table 5)."""
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        if not Path(text).exists():
            what = f"a number, {config.n_layer} numbers with commas between, or a run's folder"
            raise UserError(f"gates is {text!r}; it must be {what}") from None
        weights = open_checkpoint(text)["model"]
    else:
        if not all(map(math.isfinite, values)):
            raise UserError(f"gates is {text!r}; gates must be finite")
        return values * config.n_layer if len(values) == 1 else values
    names = [f"blocks.{i}.gate" for i in range(config.n_layer + 1)]
    values = [weights[name].tolist() for name in names if name in weights]
    if not values:
        raise UserError(f"{text} has no gates: it was trained without gpas_")
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def count_batches(data, settings):
    """The batches of an evaluation: eval_iters, or as many whole ones as `data` has."""
    return max(1, min(settings.eval_iters, len(data) // settings.batch_size))


def expected_seconds(settings, step, eval_seconds, n_passes, n_processes):
    """How long the rest of a run will take, from its first evaluation of n_passes forward passes: a micro-step takes
    about three of them, since the backward pass is two products for each of the forward pass."""
    steps = settings.max_iters - step
    micro_steps = steps * settings.gradient_accumulation_steps / n_processes
    return 3 * micro_steps * eval_seconds / n_passes + eval_seconds * math.ceil(steps / settings.eval_interval)


@torch.no_grad()
def evaluate(model, data, settings, device, autocast, processes):
    """Mean loss in nats over the tokens with a target of eval_iters batches of `data`, or as many whole batches as it
    has, the same at each call. The processes share the batches."""
    model.eval()
    n = count_batches(data, settings)
    total = count = 0
    for i in range(processes.rank, n + -n % processes.size, processes.size):
        # Beyond the last batch it counts for nothing: sharded models need all processes in every pass.
        x, y, n_targets = get_batch(data, min(i, n - 1) * settings.batch_size, settings.batch_size, device)
        with autocast():
            total += model(x, y)[1].double() * (n_targets * (i < n))
        count += n_targets * (i < n)
    model.train()
    total, count = processes.sum(total.item(), count)
    return total / max(count, 1)


def stream_report(model, x, y, autocast):
    """What training does to the stream, per layer, on one batch x, y (B, T):

    variance        of the residual state after the layer, over the hidden dimensions, mean over tokens (Sparsity Eq. 4)
    magnitude       its mean |x| over tokens and dimensions (Peri-LN Figure 6), and `largest`, its largest |x|
    attn_variance   the variance of what the attention adds to the stream, `mlp_variance` of what the MLP adds
    grad_norms      norm of the gradient of the layer's parameters, and `grad_variance`, the variance of its elements
                    (Peri-LN Figure 7), of the loss without routers' terms; what is frozen has no gradient
    gates           the GPAS gates a, two for a layer with one per sub-layer (the scale is 1 - act(a)); absent without
    """
    names = "variance", "magnitude", "largest", "attn_variance", "mlp_variance"
    report = {name: [] for name in names}

    def note_variance(name, x):
        report[name].append(x.float().var(-1, correction=0).mean().item())

    def note_state(_, __, x):
        note_variance("variance", x)
        report["magnitude"].append(x.float().abs().mean().item())
        report["largest"].append(x.float().abs().max().item())

    hooks = []
    for block in model.blocks:
        hooks.append(block.register_forward_hook(note_state))
        for name in ("attn", "mlp"):
            branch_out = getattr(block, f"{name}_residual").branch_out
            note_branch = lambda _, __, h, key=f"{name}_variance": note_variance(key, h)
            hooks.append(branch_out.register_forward_hook(note_branch))
    model.eval()
    with torch.no_grad(), autocast():  # apart from the backward pass, in which recomputed blocks run again
        model(x)
    for hook in hooks:
        hook.remove()
    with autocast():
        model(x, y)[1].backward()
    model.train()
    report["grad_norms"], report["grad_variance"] = [], []
    for block in model.blocks:
        grads = [p.grad for p in block.parameters() if p.grad is not None]
        n = max(1, sum(g.numel() for g in grads))
        norm, mean = whole(torch.nn.utils.get_total_norm(grads)).item(), sum(whole(g.sum()).item() for g in grads) / n
        report["grad_norms"].append(norm)
        report["grad_variance"].append(norm**2 / n - mean**2)
    model.zero_grad(set_to_none=True)
    if model.gates():
        gates = [whole(gate.detach()).tolist() for gate in model.gates()]
        report["gates"] = [values[0] if len(values) == 1 else values for values in gates]
    return report


def first_non_finite(model, batches, autocast):
    """In words, where the first non-finite value of a forward and backward pass over `batches` arises; None if nowhere.

    Hooks see each module's output as it is computed, the innermost first, and then the gradients in their order. No
    early return: the processes of a sharded model pass through it together.
    """
    found = []

    def check(tensor, where):
        local = tensor.to_local() if is_sharded(tensor) else tensor
        if not local.isfinite().all():
            found.append(where)

    def watch(name):
        def see(module, args, out):
            if isinstance(out, torch.Tensor):
                check(out.detach(), f"the output of {name}")
                if out.requires_grad:
                    out.register_hook(lambda grad: check(grad, f"the gradient of the output of {name}"))

        return see

    for name, p in model.named_parameters():
        check(p.detach(), f"the parameter {name}")
    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    for x, y, _ in batches:
        with autocast():
            loss = model(x, y)[1]
        check(loss.detach(), "the loss")
        loss.backward()
        for name, p in reversed(list(model.named_parameters())):
            if p.grad is not None:
                check(p.grad, f"the gradient of {name}")
        model.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    return found[0] if found else None


def learning_rate(step, settings):
    """Linear warm-up to learning_rate, cosine decay to min_lr at lr_decay_iters, min_lr from there on."""
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / settings.warmup_iters
    end = settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    share = (step - settings.warmup_iters) / max(1, end - settings.warmup_iters)
    low = settings.learning_rate / 10 if settings.min_lr is None else settings.min_lr
    return low + (settings.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def get_batch(data, first, n, device):
    """Rows first ... first + n - 1 of `data`: inputs and targets, tensors (n, block_size) on the device, and how many
    of the targets count (-100 does not)."""
    x, y = data.rows(first, n)
    count = int(np.count_nonzero(y != -100))
    if not count:
        y = np.zeros_like(y)  # any target will do: the mean over none would be nan, and a weight of 0 leaves it nan
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True), count
    return x.to(device), y.to(device), count


def write_sample(model, tokenizer, prompt, settings, device, autocast):
    """Text: the prompt and its continuation by sample_tokens tokens; an empty prompt is the start of a document."""
    encoding = prepare_data.build_encoding(tokenizer)
    prompt = prompt.encode(errors="surrogateescape").decode(errors="replace")  # a terminal may hand over any bytes
    ids = [encoding.eot_token, *map(int, prepare_data.encode(encoding, prompt))]
    if max(ids) >= model.config.vocab_size:
        raise UserError(f"the prompt holds token {max(ids)}, the model knows {model.config.vocab_size}")
    with autocast():
        idx = torch.tensor([ids], device=device)
        if not model(idx[:, -1:])[0].isfinite().all():
            raise UserError("the model's logits are not finite: it cannot be sampled")
        out = model.generate(idx, settings.sample_tokens, settings.temperature, settings.top_k)
    return prepare_data.decode(encoding, out[0, 1:])


def clock(seconds):
    """Seconds as 75s, 12m30s or 5h12m."""
    m, s = divmod(int(seconds), 60)
    return f"{60 * m + s}s" if m < 2 else f"{m}m{s:02d}s" if m < 120 else f"{m // 60}h{m % 60:02d}m"


def open_loggers(settings, rank):
    """Functions of (step, {name: number}) for the services that the settings ask for, in the process of rank 0."""
    loggers = []
    if settings.wandb and rank == 0:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs the package wandb: pip install wandb") from None
        board = wandb.init(project="nanoNorm", name=Path(settings.out_dir).name, config=asdict(settings))
        loggers.append(lambda step, numbers: board.log(numbers, step=step))
    if settings.tensorboard and rank == 0:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
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
            inner = flat({str(i): v for i, v in enumerate(value, 1)})
            numbers.update({f"{name}/{i}": v for i, v in inner.items()})
        elif isinstance(value, (int, float)) and name != "step":
            numbers[name] = value
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Planning


def plan(settings):
    """What a run would be, as text: the model's size, its tokens, steps and FLOPs, and the memory of each GPU, from a
    model on the meta device."""
    known = {f.name: getattr(settings, f.name) for f in fields(GPTConfig)}
    known["vocab_size"] = settings.vocab_size or prepare_data.byte_encoding().n_vocab
    with torch.device("meta"):
        model = GPT(GPTConfig(**known))
    count, G = model.count_params(), 1e9
    if settings.gradient_accumulation_steps % settings.gpus:
        raise UserError(f"{cannot_share(settings, settings.gpus)} GPUs")
    tokens_per_step = settings.batch_size * settings.gradient_accumulation_steps * settings.block_size
    tokens = tokens_per_step * settings.max_iters
    one_vocab = count["non_embedding"] + model.lm_head.weight.numel()
    # Float32 throughout: the weight, its gradient and AdamW's two moments.
    state = 16 * count["total"] / (settings.gpus if settings.shard else 1)
    activations = activation_bytes(model, settings)
    return "\n".join(
        [
            f"{settings.norm}: {settings.n_layer} layers x {settings.n_embd}, {count['total']:,} parameters",
            f"  {count['active']:,} active, {one_vocab:,} with one vocabulary matrix, "
            f"{count['non_embedding']:,} with none",
            f"  {settings.max_iters:,} steps of {tokens_per_step:,} tokens: {tokens / G:.3g}G tokens",
            f"  {model.flops_per_token() / G:.3g} GFLOP a token, {model.flops_per_token() * tokens:.3g} FLOP in all",
            f"  on each of {settings.gpus} GPUs: {tokens_per_step // settings.gpus:,} tokens a step, and in memory "
            f"{state / G:.3g} GB of weights, gradients and moments ({'sharded' if settings.shard else 'whole'}) + "
            f"{activations / G:.3g} GB of activations ({settings.batch_size} sequences, "
            f"{'blocks recomputed' if settings.recompute else 'all kept'})",
        ]
    )


def cannot_share(settings, size):
    """The beginning of an error: what `size` (of GPUs, of processes) does not divide."""
    return f"gradient_accumulation_steps {settings.gradient_accumulation_steps} cannot be shared by {size}"


def activation_bytes(model, settings):
    """What autograd keeps of one micro-step in bfloat16 autocast, its 16-bit copies of the weights included, and the
    gradient of the logits: the peak as far as it can be told without a run. From tensors without memory."""
    kept, place = {"blocks": {}, "rest": {}}, ["rest"]

    def keep(tensor):
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            kept[place[0]][storage._cdata] = storage.nbytes()
        return tensor

    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: place.insert(0, "blocks"))
        block.register_forward_hook(lambda *_: place.pop(0) and None)
    with FakeTensorMode(), warnings.catch_warnings(action="ignore"):
        params = {name: nn.Parameter(torch.empty(p.shape)) for name, p in model.named_parameters()}
        idx = torch.zeros(settings.batch_size, settings.block_size, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                logits, loss = torch.func.functional_call(model, params, (idx, idx))
        in_blocks, rest = (sum(kept[name].values()) for name in ("blocks", "rest"))
    if settings.recompute:  # every block's input in float32, and one block at a time
        in_blocks = in_blocks / settings.n_layer + 4 * settings.n_layer * idx.numel() * settings.n_embd
    return in_blocks + rest + 4 * logits.numel()


# ---------------------------------------------------------------------------------------------------------------------
# The program


def main():
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    processes = find_processes()
    with one_voice(processes), StopRequest(speaks=processes.rank == 0) as stop:
        train(processes, stop)


def train(processes, stop):
    """Reads the settings and does what they ask for: plans, samples or evaluates a run, or trains one."""
    found, given = {}, read_settings(Settings, "Pretrains a GPT with any placement of its norms.")
    settings = build_settings(Settings, {**settings_of_run(given, found), **given})
    if settings.dry_run:
        print(plan(settings))
        return
    device, dtype, autocast = setup_device(settings, processes)
    if settings.gradient_accumulation_steps % processes.size:
        raise UserError(f"{cannot_share(settings, processes.size)} processes")
    if settings.shard and processes.size == 1:
        raise UserError("shard spreads a model over processes, this is one: torchrun --nproc_per_node=N train.py ...")
    processes.connect(device)
    is_main = processes.rank == 0
    out_dir = Path(settings.out_dir)
    checkpoint = found.get("checkpoint")  # of the run in out_dir, or what is fine-tuned
    resumed = checkpoint if settings.init_from == "resume" else None
    is_new = not (resumed or settings.eval_only or settings.sample is not None)
    torch.manual_seed(settings.seed)

    if settings.sample is not None:
        if not checkpoint["tokenizer"]:
            raise UserError(f"the data of {out_dir} named no tokenizer: its tokens have no text")
        model = build_model(GPTConfig(**checkpoint["config"]), checkpoint["model"], settings, device, dtype)
        print(write_sample(model, checkpoint["tokenizer"], settings.sample, settings, device, autocast))
        return

    # -- data and model
    if is_main:
        find_data(settings)  # one process prepares what is missing
    processes.wait()
    folder = find_data(settings)
    meta = prepare_data.read_meta(folder)
    tokenizer = checkpoint["tokenizer"] if checkpoint else meta.get("tokenizer")
    known = {f.name: getattr(settings, f.name) for f in fields(GPTConfig)}
    known["vocab_size"] = settings.vocab_size or meta.get("vocab_size", 0)
    if not known["vocab_size"]:
        raise UserError(f"{folder} has no meta.json: say its vocabulary with --vocab_size=N (50257 for GPT-2's)")
    config = GPTConfig(**known)
    if config.vocab_size < meta.get("vocab_size", 0):
        raise UserError(f"vocab_size {config.vocab_size} is smaller than the {meta['vocab_size']} of {folder}")
    if meta and tokenizer and meta["tokenizer"] != tokenizer:
        names = meta["tokenizer"]["name"], tokenizer["name"]
        place = settings.init_from if is_new else out_dir
        raise UserError(f"{folder} was made with tokenizer {names[0]}, {place} with {names[1]}")
    if meta and checkpoint and not tokenizer and is_main:
        print(f"warning: the run names no tokenizer: whether {folder} is of the same cannot be told", file=sys.stderr)

    files = [f for f in (out_dir / "ckpt.pt", out_dir / "log.jsonl") if f.exists() and f.stat().st_size]
    if is_new and not settings.overwrite and files:
        raise UserError(f"{out_dir} holds a run: --init_from=resume continues it, --overwrite replaces it")
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"out_dir {out_dir} is not a folder")

    train_data = TokenData(folder, "train", config.block_size, config.vocab_size, settings.seed)
    val_data = TokenData(folder, "val", config.block_size, config.vocab_size)  # in one order for every seed
    sizes = shard_sizes(train_data, val_data)
    if resumed and "dataset" not in found["changed"]:
        check_shards({folder / name: size for name, size in resumed.get("shards", {}).items()})
    val_meta = meta["splits"]["val"] if meta else None
    bits_per_nat = val_meta["tokens"] / val_meta["bytes"] / math.log(2) if val_meta else None  # per byte of the text

    use_compile = device.type == "cuda" and not settings.lisa_layers if settings.compile is None else settings.compile
    model = build_model(config, checkpoint and checkpoint["model"], settings, device, dtype, use_compile)
    if settings.gates is not None and is_new:
        try:
            model.set_gates(read_gates(settings.gates, config))
        except ValueError as error:
            raise UserError(f"--gates={settings.gates}: {error}") from None
    for gate in model.gates():
        gate.requires_grad_(not settings.freeze_gates and settings.gates is None)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    count = model.count_params()
    tokens_per_step = settings.batch_size * settings.gradient_accumulation_steps * config.block_size
    print(
        f"{config.norm}: {config.n_layer} layers x {config.n_embd}, {count['total']:,} parameters "
        f"({count['active']:,} active, {count['non_embedding']:,} without embedding and head), "
        f"{dtype} on {f'{processes.size} x ' * (processes.size > 1)}{device.type if processes.size > 1 else device}, "
        f"{len(train_data):,} windows of {config.block_size} tokens in {folder}"
    )

    def describe(loss):
        """The loss as a line's part and as the log's fields."""
        record = {"val_loss": loss, "perplexity": math.exp(min(loss, 700))}
        text = f"validation loss {loss:.4f}, perplexity {record['perplexity']:.2f}"
        if bits_per_nat:
            record["bits_per_byte"] = loss * bits_per_nat
            text += f", {record['bits_per_byte']:.4f} bits per byte"
        return text, record

    if settings.eval_only:
        loss = evaluate(model, val_data, settings, device, autocast, processes)
        if not math.isfinite(loss):
            raise UserError(f"the validation loss of {out_dir}/ckpt.pt is {loss}")
        print(f"step {checkpoint['step']}: {describe(loss)[0]}")
        return

    # -- optimizer
    groups = model.optimizer_groups(settings.weight_decay)
    for group in groups:
        group["betas"] = settings.beta1, settings.beta2
        if settings.decay_vectors:
            group["weight_decay"] = settings.weight_decay
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, fused=True)
    step = skipped = 0
    val_loss = None
    if resumed:
        try:
            load_optimizer(optimizer, resumed["optimizer"])
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise UserError(f"the optimizer state in {out_dir}/ckpt.pt does not fit the model: {error}") from None
        step, skipped, val_loss = resumed["step"], resumed.get("skipped", 0), resumed.get("val_loss")
        if processes.sum(step)[0] != step * processes.size:
            raise UserError(f"the processes see different checkpoints: {out_dir} must be one folder for all of them")
    gates = [g for g in model.gates() if g.requires_grad]
    others = [p for group in optimizer.param_groups if group["name"] != "gates" for p in group["params"]]
    start_step, saved_step = step, step if resumed else None

    # -- log: kept up to the step that is continued; that of a new run takes its name with the first checkpoint, so that
    # until then the run that was there is whole
    loggers = open_loggers(settings, processes.rank)
    log_path, log_file, is_evaluated = out_dir / "log.jsonl", None, False
    partial_log = log_path.with_suffix(".partial")
    if is_main:
        out_dir.mkdir(parents=True, exist_ok=True)
        kept = [record for record in (read_log(log_path) if resumed else []) if record["step"] <= step]
        is_evaluated = any(record["step"] == step and "val_loss" in record for record in kept)
        partial_log.write_text("".join(json.dumps(record) + "\n" for record in kept))
        log_file = open(partial_log, "a", buffering=1)
        if resumed:
            partial_log.replace(log_path)
    is_evaluated = processes.sum(is_evaluated)[0] > 0

    def log(record):
        if is_main:
            log_file.write(json.dumps(record) + "\n")
        for logger in loggers:
            logger(record["step"], flat(record))

    if resumed and found["changed"]:
        for name, (before, now) in found["changed"].items():
            print(f"{name}: {before} before, {now} now")
        log({"step": step, "changed": found["changed"]})

    def stop_where_not_finite(what, batches):
        where = processes.first(first_non_finite(model, batches, autocast))
        where = f"the first value that is not finite is {where}" if where else "a second pass was finite"
        safe = f"{out_dir}/ckpt.pt is from step {saved_step}"
        if saved_step is None:
            safe = "nothing was saved yet" + ", the run that was there is untouched" * bool(files)
        raise UserError(f"{what}; {where}; {safe}, a lower learning_rate may help")

    # -- loop: the step calls net, the evaluation compiled; both are the plain model where nothing is wrapped around it
    net = compiled = torch.compile(model) if use_compile and not settings.shard else model
    if processes.size > 1 and not settings.shard:
        net = DistributedDataParallel(compiled, gradient_as_bucket_view=True)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known_peaks = [peak for name, peak in PEAK_TFLOPS.items() if name in device_name]
    peak_flops = 1e12 * processes.size * (settings.peak_tflops or (known_peaks[0] if known_peaks else 0))
    report_batch = get_batch(val_data, 0, min(8, len(val_data)), device)
    micro_steps = range(processes.rank, settings.gradient_accumulation_steps, processes.size)

    def read_step(step):
        """This process's micro-batches of a step."""
        check_shards(sizes)
        first = step * settings.gradient_accumulation_steps
        n = settings.batch_size
        return [get_batch(train_data, (first + micro) * n, n, device) for micro in micro_steps]

    spent = Counter()  # seconds

    @contextmanager
    def timed(name):
        start = time.monotonic()
        yield
        spent[name] += time.monotonic() - start

    started, last_time, last_step, train_seconds = time.monotonic(), time.monotonic(), step, 0.0
    batches = read_step(step) if step < settings.max_iters else []
    is_stopping = False
    stop.listen(out_dir)
    model.train()
    while True:
        is_last = step >= settings.max_iters
        is_due = (step % settings.eval_interval == 0 or is_last) and not (is_evaluated and step == start_step)
        train_seconds += time.monotonic() - last_time
        if is_due:
            with timed("evaluation"):
                check_shards(sizes)
                before = time.monotonic()
                val_loss = evaluate(compiled, val_data, settings, device, autocast, processes)
                if not math.isfinite(val_loss):
                    stop_where_not_finite(f"validation loss is {val_loss} at step {step}", [report_batch])
                text, record = describe(val_loss)
                if step == start_step and not is_last and not use_compile:
                    n_passes = len(range(0, count_batches(val_data, settings), processes.size))
                    seconds = time.monotonic() - before
                    print(f"about {clock(expected_seconds(settings, step, seconds, n_passes, processes.size))} in all")
                print(f"step {step:5d}: {text}")
                report = stream_report(model, *report_batch[:2], autocast) if is_main or settings.shard else {}
                log({"step": step, **record, **report})
        # a run that is skipping steps leaves the checkpoint from before them
        if is_due or (is_stopping and step != saved_step and not skipped):
            with timed("checkpoints"):
                state = {
                    "model": portable(model.state_dict(), processes.rank),
                    "optimizer": portable(optimizer.state_dict(), processes.rank),
                    "config": asdict(config),
                    "step": step,
                    "settings": asdict(settings),
                    "tokenizer": tokenizer,
                    "val_loss": val_loss,
                    "skipped": skipped,
                    "shards": {path.name: size for path, size in sizes.items()},
                }
                if is_main:
                    if partial_log.exists():
                        if log_path.exists():
                            log_path.replace(out_dir / "log_previous.jsonl")
                        partial_log.replace(log_path)
                    save_checkpoint(out_dir / "ckpt.pt", state)
                saved_step = step
        last_time = time.monotonic()
        if is_stopping or is_last:
            break

        lr = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if settings.lisa_layers and (step == start_step or step % settings.lisa_interval == 0):
            draw_layers(model, optimizer, step, settings, trained)
            if processes.size > 1:  # which gradients it waits for is settled when it is made
                net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # The mean over all tokens of the step that have a target, wherever they are: each micro-batch's mean counts by
        # its number of them. DDP and FSDP divide the sum of gradients by the number of processes, hence the factor.
        n_targets = processes.sum(sum(n for *_, n in batches))[0]
        if not n_targets:
            raise UserError(f"no token of step {step} has a target: its examples are prompts, or cut before the answer")
        loss = 0
        with timed("compilation" if use_compile and step == start_step else "steps"):
            for i, (x, y, n) in enumerate(batches):
                # Under DDP gradients are exchanged once a step. FSDP exchanges them in each micro-step, since the sum
                # of what is not yet exchanged is as large as the whole model.
                is_quiet = net is not compiled and i < len(batches) - 1
                with net.no_sync() if is_quiet else nullcontext():
                    with autocast():
                        part = net(x, y)[1] * (n * processes.size / n_targets)
                    part.backward()
                loss = loss + part.detach() / processes.size
        these, batches = batches, read_step(step + 1) if step + 1 < settings.max_iters else []  # while CUDA computes
        with timed("steps"):
            grad_norm = whole(torch.nn.utils.clip_grad_norm_(others, settings.grad_clip or math.inf)).item()
            gate_norm = 0.0
            if gates:
                gate_norm = whole(torch.nn.utils.clip_grad_norm_(gates, settings.gate_clip or math.inf)).item()
            loss, n_stops = processes.sum(loss.item(), stop.number > 0)
            is_finite = math.isfinite(loss + grad_norm + gate_norm)
            if is_finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, skipped, is_stopping = step + 1, 0 if is_finite else skipped + 1, n_stops > 0
        if not is_finite:
            what = f"loss is {loss}, gradient norm {grad_norm} at step {step}, lr {lr:.2e}"
            if skipped >= settings.nan_patience:
                stop_where_not_finite(f"{what}, {skipped} such steps in a row", these)
            print(f"step {step:5d}: {what}: skipped")
            log({"step": step, "skipped": skipped, "lr": lr})
        elif step % settings.log_interval == 0:
            record = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
            now = time.monotonic()
            train_seconds += now - last_time
            rate = (step - last_step) * tokens_per_step / max(train_seconds, 1e-9)
            last_time, last_step, train_seconds = now, step, 0.0
            record["tokens_per_s"] = round(rate, 1)
            if gates:
                record["gate_grad_norm"] = gate_norm
            for name in model.losses.keys() - {"cross_entropy"}:  # the routers', of this process's last micro-batch
                record[f"{name}_loss"] = model.losses[name].item()
            reached = f"{model.flops_per_token() * rate / 1e12:.3f} TFLOP/s"
            if peak_flops:
                record["mfu"] = model.mfu(rate, peak_flops)
                reached = f"MFU {record['mfu']:.1%}"
            left = (now - started) / (step - start_step) * (settings.max_iters - step)
            print(
                f"step {step:5d}: loss {record['loss']:.4f}, lr {lr:.2e}, gradient norm {record['grad_norm']:.3f}, "
                f"{rate:,.0f} tokens/s, {reached}, {clock(left)} left"
            )
            log(record)
        if use_compile and step == start_step + 1:
            print(f"the first step took {clock(spent['compilation'])}, with compilation")

    processes.wait()  # for the checkpoint
    if is_stopping and not is_last:
        number = stop.number or signal.SIGTERM
        print(
            f"{signal.Signals(number).name}: stopped at step {step}, {out_dir}/ckpt.pt is of step {saved_step}; "
            f"continue with --init_from=resume --out_dir={out_dir}"
        )
        sys.exit(128 + number)
    total = time.monotonic() - started
    spent["the rest"] = total - spent.total()
    parts = ", ".join(f"{name} {seconds / max(total, 1e-9):.1%}" for name, seconds in spent.items())
    print(f"done in {clock(total)} ({parts}): {out_dir}/ckpt.pt, {out_dir}/log.jsonl")
    if tokenizer and (is_main or settings.shard):
        print("a sample:\n" + write_sample(model, tokenizer, "", settings, device, autocast))


if __name__ == "__main__":
    run(main)
