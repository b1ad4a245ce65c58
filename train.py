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
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F

import prepare_data
from configurator import UserError, configure, run
from model import GPT, GPTConfig, find_scheme
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
    learning_rate: float = 4e-3  # at its highest
    min_lr: float = 4e-4  # at the end of the decay
    warmup_iters: int = 30  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which min_lr is reached; none: max_iters
    weight_decay: float = 0.1  # on matrices
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient of all but the gates; 0: no clipping
    gate_clip: float = 0.0  # the same for the gates, jointly (GPAS clips at 0.01 where gates fluctuate); 0: no clipping
    gates: str | None = None  # fixed gates: a number, n_layer numbers with commas between, or a run's folder (its gates)
    freeze_gates: bool = False  # keep the gates at their initial values
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
        if self.init_from not in ("scratch", "resume"):
            raise ValueError(f"init_from is {self.init_from!r}; known: scratch, resume")
        if self.dtype not in ("auto", "float32", "bfloat16", "float64"):
            raise ValueError(f"unknown dtype {self.dtype!r}; known: auto, float32, bfloat16, float64")
        positive = "batch_size gradient_accumulation_steps eval_interval eval_iters log_interval sample_tokens"
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        not_negative = "vocab_size max_iters warmup_iters lr_decay_iters learning_rate min_lr weight_decay grad_clip "
        for name in (not_negative + "gate_clip temperature peak_tflops seed").split():
            value = getattr(self, name)
            if value is not None and not 0 <= value < (2**63 if isinstance(value, int) else math.inf):
                raise ValueError(f"{name} is {value}; it must be at least 0, and finite")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} must lie between 0 and 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or none")
        if self.gates is not None and self.freeze_gates:
            raise ValueError("gates are fixed values: freeze_gates adds nothing")
        for name in ("gates", "freeze_gates", "gate_clip"):
            if getattr(self, name) and not find_scheme(self.norm)[1]:
                raise ValueError(f"{name}={getattr(self, name)} has no effect: norm {self.norm} has no gates")


# What belongs to one call and not to the run.
PER_CALL = "out_dir", "init_from", "overwrite", "eval_only", "sample", "device", "dtype", "compile"


def settings_of_run(given):
    """Where a run is continued, evaluated or sampled its own settings are the defaults of what is not given.

    UserError if the given ones contradict its architecture; changed training settings are printed.
    """
    if not (given.get("init_from") == "resume" or given.get("eval_only") or given.get("sample") is not None):
        return {}
    if given.get("overwrite"):
        raise UserError("overwrite replaces a run with a new one: it does not go with resume, eval_only or sample")
    out_dir = given.get("out_dir") or f"out-{given.get('norm', 'pre')}"
    checkpoint = load_checkpoint(out_dir)
    before = {n: v for n, v in checkpoint["settings"].items() if n not in PER_CALL and n in Settings.__dataclass_fields__}
    before.update(checkpoint["config"], out_dir=out_dir)
    other = {n: v for n, v in given.items() if n in before and v != before[n]}
    wrong = [f"{n} {checkpoint['config'][n]} (given {v})" for n, v in other.items() if n in checkpoint["config"]]
    if wrong:
        raise UserError(f"{out_dir} is a model of {', '.join(wrong)}")
    for name, value in other.items() if given.get("init_from") == "resume" else ():
        print(f"{name}: {before[name]} before, {value} now")
    return before


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
        torch.empty(1, device=device).item()
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
        if prepare_data.shard_paths(folder, "train"):
            return folder
        if folder.is_dir():
            raise UserError(f"{folder} holds no train shards (train_*.bin)")
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
    kinds = {"model": dict, "optimizer": dict, "config": dict, "settings": dict, "step": int, "tokenizer": dict | None}
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        strange = [name for name, kind in kinds.items() if not isinstance(checkpoint[name], kind)]
        if strange:
            raise ValueError(f"its {strange[0]} is a {type(checkpoint[strange[0]]).__name__}")
        GPTConfig(**checkpoint["config"])
        return checkpoint
    except Exception as error:  # torch.load raises whatever its unpickler met in a damaged file
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"checkpoint {path} cannot be read: {type(error).__name__} {reason}") from None


def read_log(path, last_step):
    """The lines of a log.jsonl up to a step; a last line that was cut off by the end of its process is left out."""
    lines = path.read_text(errors="replace").splitlines(True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    try:
        return [line for line in lines if json.loads(line)["step"] <= last_step]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} has a line that is not a JSON object with a step; mend it or move it away") from None


def build_model(config, weights, device, dtype):
    """A GPT on the device, with the weights of a checkpoint or None for new ones; UserError if it cannot be had."""
    try:
        model = GPT(config).to(device)
        if weights is not None:
            model.load_state_dict(weights)
        return model.double() if dtype == "float64" else model
    except (RuntimeError, MemoryError, OverflowError, AttributeError) as error:
        what = "the checkpoint's weights do not fit its config" if weights else "this model cannot be built"
        reason = str(error).splitlines()[-1].strip() if str(error) else type(error).__name__
        raise UserError(f"{what}: {reason}") from None


def read_gates(text, config):
    """Gate values of each layer, as GPT.set_gates takes them, from a number, a list or the folder of a run; UserError.

    Predefined gates are the final ones of another run (GPAS Table 5)."""
    try:
        values = [float(value) for value in text.split(",")]
        return values * config.n_layer if len(values) == 1 else values
    except ValueError:
        weights = load_checkpoint(text)["model"]
    names = [f"blocks.{i}.gate" for i in range(config.n_layer + 1)]
    values = [weights[name].tolist() for name in names if name in weights]
    if not values:
        raise UserError(f"{text} has no gates: it was trained without gpas_")
    return values


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
    gates        the GPAS gates a, two for a layer with one per sub-layer (the scale is 1 - act(a)); absent without
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
        report["gates"] = [gate.item() if len(gate) == 1 else gate.tolist() for gate in model.gates()]
    return report


def learning_rate(step, settings):
    """Linear warm-up to learning_rate, cosine decay to min_lr at lr_decay_iters, min_lr from there on."""
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / settings.warmup_iters
    end = settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    share = (step - settings.warmup_iters) / max(1, end - settings.warmup_iters)
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
    prompt = prompt.encode(errors="surrogateescape").decode(errors="replace")  # a terminal may hand over any bytes
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
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    settings = configure(Settings, "Pretrains a GPT with any placement of its norms.", defaults=settings_of_run)
    device, dtype, autocast = setup_device(settings)
    out_dir = Path(settings.out_dir)
    use_checkpoint = settings.eval_only or settings.sample is not None or settings.init_from == "resume"
    checkpoint = load_checkpoint(out_dir) if use_checkpoint else None
    torch.manual_seed(settings.seed)

    if settings.sample is not None:
        if not checkpoint["tokenizer"]:
            raise UserError(f"the data of {out_dir} named no tokenizer: its tokens have no text")
        model = build_model(GPTConfig(**checkpoint["config"]), checkpoint["model"], device, dtype)
        print(write_sample(model, checkpoint["tokenizer"], settings.sample, settings, device, autocast))
        return

    # -- data and model
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
        raise UserError(f"{folder} was made with tokenizer {meta['tokenizer']['name']}, {out_dir} with {tokenizer['name']}")

    train_data, val_data = (
        TokenData(folder, split, config.block_size, config.vocab_size, settings.seed) for split in ("train", "val")
    )
    val_meta = meta["splits"]["val"] if meta else None
    bits_per_nat = val_meta["tokens"] / val_meta["bytes"] / math.log(2) if val_meta else None  # per byte of the text

    files = [f for f in (out_dir / "ckpt.pt", out_dir / "log.jsonl") if f.exists() and f.stat().st_size]
    if not checkpoint and not settings.overwrite and files:
        raise UserError(f"{out_dir} holds a run: --init_from=resume continues it, --overwrite replaces it")
    model = build_model(config, checkpoint and checkpoint["model"], device, dtype)
    if settings.gates is not None and not checkpoint:
        try:
            model.set_gates(read_gates(settings.gates, config))
        except ValueError as error:
            raise UserError(f"--gates={settings.gates}: {error}") from None
    for gate in model.gates():
        gate.requires_grad_(not settings.freeze_gates and settings.gates is None)
    count = model.count_params()
    tokens_per_step = settings.batch_size * settings.gradient_accumulation_steps * config.block_size
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
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(f"the optimizer state in {out_dir}/ckpt.pt does not fit the model: {error}") from None
        for group, new in zip(optimizer.param_groups, groups):
            group.update(weight_decay=new["weight_decay"], betas=(settings.beta1, settings.beta2))
        step = checkpoint["step"]
    gates = [g for g in model.gates() if g.requires_grad]
    others = [p for group in optimizer.param_groups if group["name"] != "gates" for p in group["params"]]

    # -- log: kept up to the step that is continued
    out_dir.mkdir(parents=True, exist_ok=True)
    log_path = out_dir / "log.jsonl"
    kept = read_log(log_path, step) if checkpoint else []
    log_path.with_suffix(".partial").write_text("".join(kept))
    log_path.with_suffix(".partial").replace(log_path)
    log_file = open(log_path, "a", buffering=1)

    def log(record):
        log_file.write(json.dumps(record) + "\n")

    def stop_unless_finite(name, value):
        if not math.isfinite(value):
            raise UserError(f"{name} is {value} at step {step}; {out_dir}/ckpt.pt is from before, a lower learning_rate may help")

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
            stop_unless_finite("validation loss", record["val_loss"])
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
            stop_unless_finite("loss", record["loss"])
            stop_unless_finite("gradient norm", record["grad_norm"])
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

    print(f"done in {clock(time.monotonic() - started)}: {out_dir}/ckpt.pt, {out_dir}/log.jsonl")
    if tokenizer:
        print("a sample:\n" + write_sample(model, tokenizer, "", settings, device, autocast))


if __name__ == "__main__":
    run(main)
