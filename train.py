"""Pretraining: `python train.py --norm=gpas_pre` trains 12 layers on this machine's own Python sources in minutes.

    python train.py --norm=lns --n_layer=24 --dataset=NAME     another placement, depth, data (see prepare_data.py)
    python train.py config/small.py --compile                  settings from a file, then from the command line
    python train.py --norm=lns --init_from=resume              continue the run in out-lns
    python train.py --norm=lns --eval_only                     its loss on the held-out set
    python train.py --norm=lns --sample="def "                 what it writes
    python train.py --help                                     every setting

A run is a folder: ckpt.pt (weights, optimizer, architecture, tokenizer) and log.jsonl (one object a line).
"""

import ctypes
import json
import math
import os
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F

import prepare_data
from configurator import UserError, configure, run
from model import GPT, GPTConfig
from prepare_data import TokenData

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Settings(GPTConfig):
    vocab_size: int = 0  # rows of the embedding and of the head; 0: the tokenizer's vocabulary
    # run
    out_dir: str | None = None  # folder of the run; none: out-<norm>
    init_from: str = "scratch"  # scratch, or resume: continue the run in out_dir
    overwrite: bool = False  # allow a new run to replace the one in out_dir
    eval_only: bool = False  # evaluate the checkpoint in out_dir and exit
    sample: str | None = None  # a prompt: continue it with the checkpoint in out_dir and exit
    seed: int = 1337  # of the weights and of the order of the data
    # data
    dataset: str = "stdlib"  # a folder in data_dir, or a path
    data_dir: str = "data"  # where prepare_data.py puts data sets
    batch_size: int = 2  # sequences per process and micro-step
    gradient_accumulation_steps: int = 8  # micro-steps per step, of the whole job
    # optimization: AdamW, linear warm-up, cosine decay
    max_iters: int = 300  # steps
    learning_rate: float = 2e-3  # at its highest
    min_lr: float = 2e-4  # at the end of the decay
    warmup_iters: int = 30  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which min_lr is reached; none: max_iters
    weight_decay: float = 0.1  # on matrices
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient of all but the gates; 0: no clipping
    gate_clip: float = 0.0  # the same for the gates, jointly (GPAS clips at 0.01 where gates fluctuate); 0: no clipping
    freeze_gates: bool = False  # keep the gates as they are
    # evaluation and log
    eval_interval: int = 50  # steps between evaluations, each followed by a checkpoint
    eval_iters: int = 100  # batches of the held-out set, the same each time
    log_interval: int = 10  # steps between lines
    sample_tokens: int = 200  # length of a sample
    temperature: float = 0.8  # of a sample; 0: the likeliest token each time
    top_k: int | None = 50  # a sample draws among the k likeliest tokens; none: among all
    # machine
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1, mps ...
    dtype: str = "auto"  # float32, bfloat16 (autocast), float64; auto: bfloat16 where the processor has it
    compile: bool | None = None  # torch.compile the model; none: on cuda
    peak_tflops: float = 0.0  # the device's dense peak, for the share that is reached (MFU); 0: as PEAK_TFLOPS knows it

    def __post_init__(self):
        super().__post_init__()
        self.out_dir = self.out_dir or f"out-{self.norm}"
        self.lr_decay_iters = self.lr_decay_iters or self.max_iters
        if self.init_from not in ("scratch", "resume"):
            raise ValueError(f"init_from is {self.init_from!r}; known: scratch, resume")
        if self.dtype not in ("auto", "float32", "bfloat16", "float64"):
            raise ValueError(f"unknown dtype {self.dtype!r}; known: auto, float32, bfloat16, float64")
        positive = "batch_size gradient_accumulation_steps eval_interval eval_iters log_interval sample_tokens"
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in "vocab_size max_iters warmup_iters learning_rate weight_decay grad_clip gate_clip temperature".split():
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} must lie between 0 and 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or none")


# Dense bfloat16 peaks in TFLOP/s, from NVIDIA's data sheets, by a part of the name that CUDA gives.
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "RTX 4090": 165}


# ---------------------------------------------------------------------------------------------------------------------
# Setup


def setup_device(settings):
    """(device, dtype name, autocast context factory) as the settings ask for and the machine has."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    dtype = settings.dtype
    if dtype == "auto":
        has_bfloat16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if has_bfloat16 and device.type in ("cuda", "cpu") else "float32"
    torch.backends.cuda.matmul.allow_tf32 = True
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # Freed activations stay with the process (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD): fetching fresh pages from the
        # system for each of them costs a fifth of a step.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25), libc.mallopt(-1, (1 << 31) - 1)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()

    return device, dtype, autocast


def find_data(settings):
    """Folder of the data set; the default one is prepared if it is missing. UserError for any other."""
    for folder in (Path(settings.data_dir) / settings.dataset, Path(settings.dataset)):
        if list(folder.glob("*train*.bin")):
            return folder
    if settings.dataset != "stdlib":
        raise UserError(
            f"no data set {settings.dataset!r} in {settings.data_dir}/; "
            f"make it with: python prepare_data.py --input=PATH --dataset={settings.dataset}"
        )
    print("preparing the default data set, this machine's Python standard library")
    return prepare_data.prepare(prepare_data.Settings(data_dir=settings.data_dir))


def save_checkpoint(path, state):
    """Writes the dict `state` to `path`, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot save {path}: {str(error).splitlines()[0]}; what was saved before is untouched") from None


def load_checkpoint(out_dir):
    """The dict in out_dir/ckpt.pt, on the CPU; UserError if it is missing or damaged. No code in it is ever run."""
    path = Path(out_dir) / "ckpt.pt"
    if not path.exists():
        raise UserError(f"no checkpoint {path}; train one first, or name its folder with --out_dir=")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model"], checkpoint["optimizer"], checkpoint["step"], GPTConfig(**checkpoint["config"])
        return checkpoint
    except Exception as error:  # torch.load raises whatever its unpickler met in a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read: {reason}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def evaluate(model, data, settings, device, autocast):
    """Mean loss in nats over eval_iters batches of `data` (all of it if it has fewer), the same at each call."""
    model.eval()
    total = batches = 0
    for i in range(max(1, min(settings.eval_iters, len(data) // settings.batch_size))):
        x, y = get_batch(data, i * settings.batch_size, settings.batch_size, device)
        with autocast():
            total += model(x, y)[1].double()
        batches += 1
    model.train()
    return total.item() / batches


def stream_report(model, x, y, autocast):
    """What training does to the stream, per layer, on one batch x, y (B, T):

    variance     of the residual state after the layer, over the hidden dimensions, mean over tokens (Sparsity Eq. 4)
    grad_norms   norm of the gradient of the layer's parameters
    gates        the GPAS gates a (a scale of 1 - SiLU(a)); absent without them
    """
    variance = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: variance.append(out.float().var(-1, correction=0).mean().item()))
        for block in model.blocks
    ]
    with autocast():
        model(x, y)[1].backward()
    for hook in hooks:
        hook.remove()
    grads = [[p.grad for p in block.parameters() if p.grad is not None] for block in model.blocks]
    report = {"variance": variance, "grad_norms": [torch.nn.utils.get_total_norm(g).item() for g in grads]}
    model.zero_grad(set_to_none=True)
    if model.gates():
        report["gates"] = [gate.item() for gate in model.gates()]
    return report


def learning_rate(step, settings):
    """Linear warm-up to learning_rate, cosine decay to min_lr at lr_decay_iters, min_lr from there on."""
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / settings.warmup_iters
    share = (step - settings.warmup_iters) / max(1, settings.lr_decay_iters - settings.warmup_iters)
    low = settings.min_lr
    return low + (settings.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def get_batch(data, first, n, device):
    """Rows first ... first + n - 1 of `data` as tensors (n, block_size) on the device."""
    x, y = (torch.from_numpy(rows) for rows in data.rows(first, n))
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


def write_sample(model, tokenizer, prompt, settings, device, autocast):
    """Text: the prompt and its continuation by sample_tokens tokens; an empty prompt is the start of a document."""
    encoding = prepare_data.build_encoding(tokenizer)
    ids = [encoding.eot_token, *map(int, prepare_data.encode(encoding, prompt))]
    if max(ids) >= model.config.vocab_size:
        raise UserError(f"the prompt holds token {max(ids)}, the model knows {model.config.vocab_size}")
    with autocast():
        idx = torch.tensor([ids], device=device)
        out = model.generate(idx, settings.sample_tokens, settings.temperature, settings.top_k)
    return prepare_data.decode(encoding, out[0, 1:])


def clock(seconds):
    """Seconds as 75s, 12m30s or 5h12m."""
    m, s = divmod(int(seconds), 60)
    return f"{60 * m + s}s" if m < 2 else f"{m}m{s:02d}s" if m < 120 else f"{m // 60}h{m % 60:02d}m"


# ---------------------------------------------------------------------------------------------------------------------
# The program


def main():
    settings = configure(Settings, "Pretrains a GPT with any placement of its norms.")
    device, dtype, autocast = setup_device(settings)
    out_dir = Path(settings.out_dir)
    use_checkpoint = settings.eval_only or settings.sample is not None or settings.init_from == "resume"
    checkpoint = load_checkpoint(out_dir) if use_checkpoint else None
    torch.manual_seed(settings.seed)

    # -- model: its architecture is the checkpoint's where there is one
    if checkpoint:
        config, tokenizer = GPTConfig(**checkpoint["config"]), checkpoint["tokenizer"]
    if settings.sample is not None:
        model = GPT(config).to(device)
        model.load_state_dict(checkpoint["model"])
        if not tokenizer:
            raise UserError(f"the data of {out_dir} named no tokenizer: its tokens have no text")
        print(write_sample(model, tokenizer, settings.sample, settings, device, autocast))
        return
    folder = find_data(settings)
    meta = prepare_data.read_meta(folder)
    if not checkpoint:
        tokenizer = meta.get("tokenizer")
        known = {f.name: getattr(settings, f.name) for f in fields(GPTConfig)}
        known["vocab_size"] = settings.vocab_size or meta.get("vocab_size", 0)
        if not known["vocab_size"]:
            raise UserError(f"{folder} has no meta.json: say its vocabulary with --vocab_size=N (50257 for GPT-2's)")
        config = GPTConfig(**known)
    if config.vocab_size < meta.get("vocab_size", 0):
        raise UserError(f"vocab_size {config.vocab_size} is smaller than the {meta['vocab_size']} of {folder}")
    if checkpoint and meta and tokenizer and meta["tokenizer"] != tokenizer:
        raise UserError(f"{folder} was made with tokenizer {meta['tokenizer']['name']}, {out_dir} with {tokenizer['name']}")

    train_data, val_data = (
        TokenData(folder, split, config.block_size, config.vocab_size, settings.seed) for split in ("train", "val")
    )
    val_meta = meta["splits"]["val"] if meta else None
    bits_per_nat = val_meta["tokens"] / val_meta["bytes"] / math.log(2) if val_meta else None  # per byte of the text

    if not checkpoint and not settings.overwrite and any((out_dir / n).exists() for n in ("ckpt.pt", "log.jsonl")):
        raise UserError(f"{out_dir} holds a run: --init_from=resume continues it, --overwrite replaces it")
    model = GPT(config).to(device)
    if dtype == "float64":
        model.double()
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    for gate in model.gates():
        gate.requires_grad_(not settings.freeze_gates)
    count, tokens_per_step = model.count_params(), settings.batch_size * settings.gradient_accumulation_steps * config.block_size
    print(
        f"{config.norm}: {config.n_layer} layers x {config.n_embd}, {count['total']:,} parameters "
        f"({count['active']:,} active, {count['non_embedding']:,} without embedding and head), "
        f"{dtype} on {device}, {len(train_data):,} windows of {config.block_size} tokens in {folder}"
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
        print(f"step {checkpoint['step']}: {describe(evaluate(model, val_data, settings, device, autocast))[0]}")
        return

    # -- optimizer
    groups = model.optimizer_groups(settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, (settings.beta1, settings.beta2), fused=True)
    step = 0
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, new in zip(optimizer.param_groups, groups):
            group.update(weight_decay=new["weight_decay"], betas=(settings.beta1, settings.beta2))
        step = checkpoint["step"]
    gates = [g for g in model.gates() if g.requires_grad]
    others = [p for group in optimizer.param_groups if group["name"] != "gates" for p in group["params"]]

    # -- log: kept up to the step that is continued
    out_dir.mkdir(parents=True, exist_ok=True)
    log_path = out_dir / "log.jsonl"
    kept = []
    if checkpoint and log_path.exists():
        kept = [line for line in log_path.read_text().splitlines(True) if json.loads(line)["step"] <= step]
    log_path.write_text("".join(kept))
    log_file = open(log_path, "a", buffering=1)

    def log(record):
        log_file.write(json.dumps(record) + "\n")

    # -- loop
    use_compile = device.type == "cuda" if settings.compile is None else settings.compile
    net = torch.compile(model) if use_compile else model
    known_peaks = [peak for name, peak in PEAK_TFLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name(device)]
    peak_flops = 1e12 * (settings.peak_tflops or (known_peaks[0] if known_peaks else 0))
    report_batch = get_batch(val_data, 0, min(8, len(val_data)), device)
    started, start_step, last_time, last_step, train_seconds = time.monotonic(), step, time.monotonic(), step, 0.0
    net.train()
    while True:
        is_last = step >= settings.max_iters
        is_resumed_here = checkpoint and step == start_step  # evaluated and logged before the interruption
        if (step % settings.eval_interval == 0 or is_last) and not is_resumed_here:
            train_seconds += time.monotonic() - last_time
            text, record = describe(evaluate(net, val_data, settings, device, autocast))
            print(f"step {step:5d}: {text}")
            log({"step": step, **record, **stream_report(model, *report_batch, autocast)})
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "config": asdict(config),
                "step": step,
                "settings": asdict(settings),
                "tokenizer": tokenizer,
                "val_loss": record["val_loss"],
            }
            save_checkpoint(out_dir / "ckpt.pt", state)
            last_time = time.monotonic()
        if is_last:
            break

        lr = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for micro in range(settings.gradient_accumulation_steps):
            first = (step * settings.gradient_accumulation_steps + micro) * settings.batch_size
            x, y = get_batch(train_data, first, settings.batch_size, device)
            with autocast():
                part = net(x, y)[1] / settings.gradient_accumulation_steps
            part.backward()
            loss += part.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(others, settings.grad_clip or math.inf)
        if gates:
            gate_norm = torch.nn.utils.clip_grad_norm_(gates, settings.gate_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        if step % settings.log_interval == 0:
            record = {"step": step, "loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item()}
            now = time.monotonic()
            train_seconds += now - last_time
            rate = (step - last_step) * tokens_per_step / max(train_seconds, 1e-9)
            last_time, last_step, train_seconds = now, step, 0.0
            record["tokens_per_s"] = round(rate, 1)
            if gates:
                record["gate_grad_norm"] = gate_norm.item()
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
            if not math.isfinite(record["loss"]):
                raise UserError(f"loss is {record['loss']} at step {step}, lr {lr:.2e}; the last checkpoint is untouched")

    print(f"done in {clock(time.monotonic() - started)}: {out_dir}/ckpt.pt, {out_dir}/log.jsonl")
    if tokenizer:
        print("a sample:\n" + write_sample(model, tokenizer, "", settings, device, autocast))


if __name__ == "__main__":
    run(main)
