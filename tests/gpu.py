"""What has to be seen on a GPU: `python tests/gpu.py` takes at most eight minutes on one; without CUDA it says so and
ends. `--device=cpu` runs all of it at a tiny size, as the tests do. --only selects parts, --help lists the sizes.

It prints one Markdown table, a row as soon as it is measured, and writes the same numbers to a JSON file. A part that
fails is a row with its error, and the others go on. The exit code is 1 if a part failed or a bound of BOUNDS is broken.

The time of A over B is the median of the ratios of pairs of steps, in turn (A B B A ...); low and high are quartiles.
Not seen here: more than one GPU, hence the exchange between processes.
"""

import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from configurator import build_settings, read_settings, run
from model import GPT, SCHEMES, GPTConfig, Norm, grouped_outer, grouped_product, has_grouped_mm
from test_model import saved_bytes

# The largest values that are accepted, by part and name. A value that is not named here is reported and not judged.
# "loss", "gradient" ... are |a - b| / |b|, bfloat16 has 8 bits: 2^-8 = 0.004.
BOUNDS = {
    "experts": {"bfloat16": 0.01, "float32": 1e-5},
    "processes": {"loss": 1e-5, "gradient": 1e-4, "gates": 1e-3},
    "analysis": {"difference": 1e-3},
    "llama": {"logits": 1e-4},
    "resume": {"weights": 0.0, "moments": 0.0, "step": 0.0},
    "gpas": {"memory": 1.02, "memory_no_A": 1.15},
    "compile": {"loss": 1e-3, "gradient": 0.05, "gates": 0.1},
}


@dataclass
class Settings:
    only: str = "all"  # parts to run, with commas between
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: everything at a tiny size, where no other is given
    out: str = "gpu.json"  # the file of the numbers
    minutes: float = 8.0  # a part that takes the whole beyond this is stopped at its next row
    schemes: str = ",".join(SCHEMES)  # rows of the table that are compared, with commas between
    backend: str = "inductor"  # of torch.compile
    pairs: int = 10  # pairs of steps behind each median
    n_layer: int = 24  # of the models whose steps are timed
    n_layer_small: int = 2  # of the models whose values are compared
    n_embd: int = 1024  # this and the following: of all models
    n_head: int = 16
    vocab_size: int = 32000
    block_size: int = 256
    batch_size: int = 16
    peak_width: int = 8192  # rows and columns of the matrices whose product measures the peak
    train_args: str = ""  # further arguments of train.py for the presets, with spaces between

    def __post_init__(self):
        for kind, names, known in (("only", self.only, ["all", *PARTS]), ("schemes", self.schemes, SCHEMES)):
            if unknown := set(names.split(",")) - set(known):
                raise ValueError(f"{kind} has {sorted(unknown)[0]!r}; known: {', '.join(known)}")


# The sizes with --device=cpu.
TINY = {"schemes": "pre,post", "backend": "eager", "pairs": 2, "n_layer": 1, "n_layer_small": 1, "n_embd": 32}
TINY |= {"n_head": 2, "vocab_size": 257, "block_size": 32, "batch_size": 2, "peak_width": 128}
TINY["train_args"] = (
    "--n_layer=1 --n_embd=32 --n_hidden=64 --n_head=2 --vocab_size=257 --block_size=32 --batch_size=2 "
    "--gradient_accumulation_steps=1 --compile=false"
)


# ---------------------------------------------------------------------------------------------------------------------
# Models, comparisons, time and memory


def build(c, norm, n_layer, **more):
    """A model with nothing at its initial value, gates of 0.3 to 1 among the rest. It is drawn on the device: GPT draws
    on the CPU, which would take most of the eight minutes."""
    if norm.removeprefix("gpas_") == "mix":
        more["mix_ratio"] = 0.5  # so that two layers hold both kinds
    sizes = {name: getattr(c, name) for name in ("n_embd", "n_head", "vocab_size", "block_size")}
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, norm=norm, **sizes, **more))
    model.to_empty(device=c.device)
    torch.manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        else:
            torch.nn.init.uniform_(p, 0.3, 1.0)
    return model


def random_tokens(c):
    """(batch_size, block_size), the same ones each time."""
    torch.manual_seed(1)
    return torch.randint(c.vocab_size, (c.batch_size, c.block_size)).to(c.device)


def loss_and_gradient(net, idx, autocast=False):
    """The loss of predicting idx from itself, its gradient in one vector, and the gates' part of that (if any)."""
    net.zero_grad()
    with torch.autocast(idx.device.type, torch.bfloat16, enabled=autocast):  # one for each pass: it keeps cast weights
        loss = net(idx, idx)[1]
    loss.backward()
    grads = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in net.named_parameters()}
    gates = [grad for name, grad in grads.items() if name.endswith(".gate")]
    result = {"loss": loss.detach(), "gradient": torch.cat([grad.flatten() for grad in grads.values()])}
    return {**result, "gates": torch.cat(gates)} if gates else result


def distance(a, b):
    """|a - b| / |b| in float64, on the CPU; entries that are nan in both are equal."""
    a, b = (torch.as_tensor(t).detach().double().cpu() for t in (a, b))
    a, b = (t.masked_fill(a.isnan() & b.isnan(), 0) for t in (a, b))
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def distances(a, b):
    return {name: distance(a[name], b[name]) for name in b}


def training_step(c, model, loss_of=lambda model, idx: model(idx, idx)[1]):
    """A function that does one training step (forward and backward in bfloat16 autocast, AdamW)."""
    optimizer, idx = torch.optim.AdamW(model.parameters(), 1e-5, fused=True), random_tokens(c)

    def step():
        with torch.autocast(c.device, torch.bfloat16):
            loss = loss_of(model, idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_memory(c, model, step):
    """Bytes of a training step on top of weights and moments: the peak of what torch allocates on the GPU. On the CPU
    what autograd keeps for the backward pass."""
    if c.device == "cpu":
        return saved_bytes(model, random_tokens(c), autocast=True)
    step()  # from here on the moments are there
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def seconds(c, f):
    device = torch.get_device_module(c.device)
    device.synchronize()
    start = time.perf_counter()
    f()
    device.synchronize()
    return time.perf_counter() - start


def time_ratio(c, name, a, b):
    """time(a) / time(b) over pairs in turn, after two of each that do not count."""
    for f in (a, b, a, b):
        f()
    ratios = []
    for i in range(c.pairs):
        first, second = (a, b) if i % 2 else (b, a)
        t = {first: seconds(c, first)}
        t[second] = seconds(c, second)
        ratios.append(t[a] / t[b])
    return with_quartiles(name, ratios)


def with_quartiles(name, values):
    """The median of some numbers under `name`, and their quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {name: median, f"{name}_low": low, f"{name}_high": high}


# ---------------------------------------------------------------------------------------------------------------------
# The parts: generators of (what is measured, {name: number}), in PARTS the quick ones first


def experts(c):
    """torch's grouped product against a loop over experts that are unequally busy, one of them idle."""
    ends = torch.tensor([1, 1, 3, 8], device=c.device, dtype=torch.int32) * c.block_size
    rows = list(map(slice, [0, *ends.tolist()], ends.tolist()))
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        torch.manual_seed(0)
        x, g = torch.randn(2, rows[-1].stop, c.n_embd, device=c.device, dtype=dtype)
        w = torch.randn(len(rows), c.n_embd, c.n_embd, device=c.device, dtype=dtype)

        def product():
            return torch.cat([x[r] @ w[e].t() for e, r in enumerate(rows)])

        def outer():
            return torch.stack([g[r].t() @ x[r] for r in rows])

        kind = "grouped_mm" if has_grouped_mm(x, w) else "no grouped_mm"
        ours = {"product": lambda: grouped_product(x, w, ends), "outer": lambda: grouped_outer(g, x, ends, w)}
        for what, loop in (("product", product), ("outer", outer)):
            values = {name: distance(ours[what](), loop()), **time_ratio(c, "time", ours[what], loop)}
            yield f"grouped_{what} ({name}, {kind}) over a loop", values


def processes(c):
    """A process group of one, float32: DDP and FSDP2 against the plain model."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def model():
        return build(c, "gpas_peri", c.n_layer_small)

    idx = random_tokens(c)
    plain = loss_and_gradient(model(), idx)
    dist.init_process_group("nccl" if c.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield "DDP", distances(loss_and_gradient(torch.nn.parallel.DistributedDataParallel(model()), idx), plain)
        sharded = model()
        for module in (*sharded.blocks, sharded):
            fully_shard(module, mesh=init_device_mesh(c.device, (1,)))
        yield "FSDP2", distances(loss_and_gradient(sharded, idx), plain)
    finally:
        sharded = None  # gone before the connection is
        dist.destroy_process_group()


def analysis(c):
    """Measures of analyze.py in float32, on the device against the CPU."""
    import analyze

    idx, model = random_tokens(c)[:4], build(c, "gpas_pre", n_layer=4)
    on_cpu = copy.deepcopy(model).cpu()
    for name in ("stream", "removal", "angular_distance"):
        measure = getattr(analyze, name)
        a, b = measure(model, [(idx, idx)]), measure(on_cpu, [(idx.cpu(), idx.cpu())])
        a, b = (result if isinstance(result, dict) else {"": result} for result in (a, b))
        b.pop("top_state", None)  # the states of equal values may change places
        yield name, {"difference": max(distances(a, b).values())}


def llama(c):
    """transformers' Llama with the same weights, both eager with scaled_dot_product_attention."""
    try:
        import transformers
    except ImportError:
        yield "not compared: transformers is not installed", {}
        return
    ours = build(c, "pre", c.n_layer)
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=ours.config.n_hidden,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, max_position_embeddings=c.block_size,
        rms_norm_eps=ours.config.norm_eps, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(c.device):
        theirs = transformers.LlamaForCausalLM(config)
    names = {"blocks.": "model.layers.", "attn_residual.pre_norm": "input_layernorm", "attn.": "self_attn."}
    names |= {"mlp_residual.pre_norm": "post_attention_layernorm", "embed_tokens": "model.embed_tokens"}
    renamed = {}
    for name, p in ours.named_parameters():
        for mine, yours in names.items():
            name = name.replace(mine, yours)
        renamed["model.norm.weight" if name == "norm.weight" else name] = p.detach()
    theirs.load_state_dict(renamed)
    idx = random_tokens(c)
    with torch.no_grad():
        yield "logits, float32", {"logits": distance(ours(idx)[0], theirs(idx).logits)}
    their_step = training_step(c, theirs, lambda model, idx: model(idx, labels=idx).loss)
    yield "tokens/s over transformers' Llama", time_ratio(c, "tokens_per_s", their_step, training_step(c, ours))


# Runs a program with deterministic kernels only: attention's default backward pass on a GPU adds up in any order.
DETERMINISTIC = """
import runpy, sys, torch
torch.use_deterministic_algorithms(True, warn_only=True)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(c, folder, *args, start=()):
    """Runs train.py in `folder`, on random tokens; (the log's objects, the checkpoint) of its run."""
    folder = Path(folder)
    tokens = np.random.default_rng(0).integers(c.vocab_size, size=2**20, dtype=np.uint16)
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)  # the shards of llm.c
    for split in ("train", "val"):
        (folder / f"{split}_0.bin").write_bytes(header.tobytes() + tokens.tobytes())
    command = [sys.executable, *start, str(ROOT / "train.py"), *args, "--dataset=.", "--rows=windows"]
    command += ["--out_dir=run", "--eval_iters=1"]
    command += [f"--device={c.device}", "--dtype=bfloat16", "--norm=gpas_pre"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60 * c.minutes)
    if done.returncode:
        raise RuntimeError(f"train.py ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return log, torch.load(folder / "run" / "ckpt.pt", map_location="cpu", weights_only=True, mmap=True)


def resume(c):
    """train.py: 6 steps, and the last three again from the checkpoint of step 3; deterministic kernels, eager."""
    sizes = "n_embd", "n_head", "block_size", "batch_size", "vocab_size"
    args = [f"--n_layer={c.n_layer_small}", *(f"--{name}={getattr(c, name)}" for name in sizes)]
    args += "--warmup_iters=2 --max_iters=6 --eval_interval=3 --compile=false".split()
    start, found = ["-c", DETERMINISTIC], []
    with tempfile.TemporaryDirectory() as folder:
        _, whole = train(c, folder, *args, start=start)
        (Path(folder) / "run" / "ckpt_previous.pt").replace(Path(folder) / "run" / "ckpt.pt")
        _, parts = train(c, folder, *args, "--init_from=resume", start=start)
    for checkpoint in (whole, parts):
        states = checkpoint["optimizer"]["state"].values()
        moments = torch.cat([state[name].flatten() for state in states for name in ("exp_avg", "exp_avg_sq")])
        weights = torch.cat([weight.flatten() for weight in checkpoint["model"].values()])
        found.append({"weights": weights, "moments": moments, "step": checkpoint["step"]})
    yield "6 steps; 3, and 3 more after a resume", distances(*found)


def presets(c):
    """train.py with gpas_130m and gpas_350m. Its work per second (6 operations for each matrix entry, and causal
    attention) over that of one large matrix product, which is measured here; mfu, over the peak of the data sheet, is
    train.py's own where it knows the device's."""
    x, w = torch.randn(2, c.peak_width, c.peak_width, device=c.device, dtype=torch.bfloat16)
    times = [seconds(c, lambda: x @ w) for _ in range(12)][2:]
    peak = 2 * c.peak_width**3 / statistics.median(times)
    yield f"product of two {c.peak_width} x {c.peak_width} matrices", {"tflops": peak / 1e12}
    for name in ("gpas_130m", "gpas_350m"):
        args = [str(ROOT / "config" / f"{name}.py"), "--max_iters=12", "--log_interval=2", *c.train_args.split()]
        with tempfile.TemporaryDirectory() as folder:
            log, checkpoint = train(c, folder, *args)
        records = [record for record in log if "tokens_per_s" in record][1:]  # the first holds the compilation
        with torch.device("meta"):
            flops = GPT(GPTConfig(**checkpoint["config"])).flops_per_token()
        values = with_quartiles("tokens_per_s", [record["tokens_per_s"] for record in records])
        values["share_of_product"] = flops * values["tokens_per_s"] / peak
        if "mfu" in records[-1]:
            values["mfu"] = statistics.median(record["mfu"] for record in records)
        yield f"config/{name}.py", values


def gpas(c):
    """A step of gpas_<scheme> over one of <scheme>, eager; the first scheme with its blocks compiled too. Without a
    norm A, autocast keeps only a bfloat16 copy of the stream, and the gate needs the stream itself: memory_no_A."""
    names = c.schemes.split(",")
    for norm, is_compiled in [*((norm, False) for norm in names), (names[0], True)]:
        steps, memory = [], []
        torch._dynamo.reset()
        for prefix in ("gpas_", ""):
            model = build(c, prefix + norm, c.n_layer)
            for block in model.blocks if is_compiled else ():
                block.compile(fullgraph=True, backend=c.backend)
            steps.append(training_step(c, model))
            memory.append(step_memory(c, model, steps[-1]))
        has_A = all(isinstance(r.pre_norm, Norm) for b in model.blocks for r in (b.attn_residual, b.mlp_residual))
        name = "memory_compiled" if is_compiled else "memory" if has_A else "memory_no_A"
        values = {**time_ratio(c, "time", *steps), name: memory[0] / memory[1]}
        yield f"gpas_{norm} over {norm}" + ", blocks compiled" * is_compiled, values


def compile_schemes(c):
    """Every scheme, plain and with gates, and experts: compiled as one graph against eager."""
    idx, norms = random_tokens(c), [prefix + norm for norm in c.schemes.split(",") for prefix in ("", "gpas_")]
    for norm, more in [*((norm, {}) for norm in norms), ("gpas_pre", {"n_expert": 4})]:
        model = build(c, norm, c.n_layer_small, **more)
        torch._dynamo.reset()
        eager = loss_and_gradient(model, idx, autocast=True)
        compiled = loss_and_gradient(torch.compile(model, fullgraph=True, backend=c.backend), idx, autocast=True)
        yield norm + " with experts" * bool(more), distances(compiled, eager)


PARTS = {"experts": experts, "processes": processes, "analysis": analysis, "llama": llama}
PARTS |= {"resume": resume, "presets": presets, "gpas": gpas, "compile": compile_schemes}


# ---------------------------------------------------------------------------------------------------------------------
# The program


def measure(c):
    """Runs the parts and prints the table: {part: {"rows", "error", "seconds"}}."""
    results, end = {}, time.monotonic() + 60 * c.minutes
    print("| part | what | measured | bounds | |\n|---|---|---|---|---|")
    for name in PARTS if c.only == "all" else c.only.split(","):
        start, rows, error, bounds = time.monotonic(), [], None, BOUNDS.get(name, {})
        try:
            for what, values in PARTS[name](c):
                broken = [n for n in values.keys() & bounds.keys() if not values[n] <= bounds[n]]  # nan is broken too
                rows.append({"what": what, "values": values, "broken": broken})
                measured = ", ".join(f"{n} {value:.4g}" for n, value in values.items())
                limits = ", ".join(f"{n} <= {bounds[n]:g}" for n in values if n in bounds)
                print(f"| {name} | {what} | {measured} | {limits} | {'**broken**' if broken else ''} |", flush=True)
                if time.monotonic() > end:
                    raise TimeoutError(f"stopped after {c.minutes:g} minutes in all")
        except Exception as problem:
            traceback.print_exc()
            error = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
            print(f"| {name} | failed | {error.replace('|', '/')} | | **failed** |", flush=True)
        results[name] = {"rows": rows, "error": error, "seconds": round(time.monotonic() - start, 1)}
    return results


def main():
    given = read_settings(Settings, "What has to be seen on a GPU: correctness, speed and memory there.")
    c = build_settings(Settings, {**(TINY if given.get("device") == "cpu" else {}), **given})
    if c.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA here: nothing is measured (--device=cpu runs everything at a tiny size)")
        return
    name = torch.cuda.get_device_name() if c.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}; bfloat16 autocast unless a row says float32; "
        f"{c.n_layer} layers x {c.n_embd}, {c.batch_size} x {c.block_size} tokens; {c.pairs} pairs of steps\n"
    )
    warnings.simplefilter("ignore")
    results = measure(c)
    report = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "dtype": "bfloat16 autocast"}
    report |= {"repeats": c.pairs, "settings": asdict(c), "bounds": BOUNDS, "parts": results}
    Path(c.out).write_text(json.dumps(report, indent=1) + "\n")
    n_broken = sum(len(row["broken"]) for part in results.values() for row in part["rows"])
    failed = [part for part, result in results.items() if result["error"]]
    print(f"\n{c.out}: {n_broken} bounds broken, {len(failed)} parts failed{': ' * bool(failed)}{', '.join(failed)}")
    if n_broken or failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
