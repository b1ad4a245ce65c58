"""Speed and memory of the placements: `python tests/benchmark.py` (most of an hour on two cores; --only selects parts,
--help lists the sizes). What analyze.py and prepare_data.py take is measured by benchmark_analyze.py and
benchmark_data.py, which are parts of it and run alone too.

Two things are compared in one run, in turn (A B A B ...), by the ratio of each pair; medians and the range of the
middle half are printed. Not a test: nothing here passes or fails.
"""

import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import benchmark_analyze
import benchmark_data
from configurator import configure, run
from model import GPT, MLP, SCHEMES, GPTConfig, MoE
from test_model import saved_bytes
from train import keep_freed_memory

PARTS = "schemes", "gpas", "compiled", "memory", "moe", "peak", "llama", "generate", "analyze", "data"


@dataclass
class Settings:
    only: str = ",".join(PARTS)  # parts to run, with commas between
    pairs: int = 30  # pairs of steps behind each median
    n_layer: int = 4  # of the models whose steps are compared
    n_embd: int = 256  # of all models
    n_head: int = 4  # of all models
    block_size: int = 256  # of all models
    batch_size: int = 8  # of the models whose steps are compared
    dtype: str = "bfloat16"  # float32 or bfloat16 (autocast)

    def __post_init__(self):
        if not set(self.only.split(",")) <= set(PARTS):
            raise ValueError(f"only is {self.only!r}; known parts: {', '.join(PARTS)}")


def stepper(model, settings, dtype, batch_size, net=None):
    """A function that does one training step (forward, backward, AdamW) of the model."""
    idx = torch.randint(0, 257, (batch_size, settings.block_size))
    groups = model.optimizer_groups(0.1) if isinstance(model, GPT) else model.parameters()
    optimizer = torch.optim.AdamW(groups, 1e-5, fused=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = (model if net is None else net)(idx, idx)[1] if isinstance(model, GPT) else model(idx, labels=idx).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def ratios(a, b, pairs):
    """Text: median of time(a) / time(b) over interleaved pairs, and its middle half."""
    for f in (a, b, a, b):
        f()
    found = []
    for i in range(pairs):  # the order alternates, so that neither is always the one after the other
        first, second = (a, b) if i % 2 else (b, a)
        t = {first: seconds(first)}
        t[second] = seconds(second)
        found.append(t[a] / t[b])
    low, _, high = statistics.quantiles(found, n=4)
    return f"{statistics.median(found):.3f}  ({low:.3f} to {high:.3f})"


def build(norm, settings, n_layer=None):
    torch.manual_seed(0)
    c = settings
    return GPT(GPTConfig(block_size=c.block_size, n_layer=n_layer or c.n_layer, n_head=c.n_head, n_embd=c.n_embd, norm=norm))


def matmul_peak(config, tokens, dtype):
    """FLOP/s of the model's own matrix products alone: each Linear's three (output, and both gradients) at its shapes."""
    d, kv, h = config.n_embd, config.n_kv_head * config.head_dim, config.n_hidden
    flops = total = 0
    for n_in, n_out, count in ((d, d, 2), (d, kv, 2), (d, h, 2), (h, d, 1)):
        x, w, g = (torch.randn(s, dtype=dtype) for s in ((tokens, n_in), (n_out, n_in), (tokens, n_out)))
        for product in (lambda: x @ w.t(), lambda: g @ w, lambda: g.t() @ x):
            product()
            flops += count * 2 * tokens * n_in * n_out
            total += count * statistics.median(seconds(product) for _ in range(20))
    return flops / total


def peak_share(settings, dtype, rounds=8):
    """Text: achieved FLOP/s of 12 layers over the peak of the same minute, in turn."""
    model = build("pre", settings, n_layer=12)
    step, kind = stepper(model, settings, dtype, 16), getattr(torch, dtype)
    tokens = 16 * settings.block_size
    step()
    shares, rates = [], []
    for _ in range(rounds):
        peak = matmul_peak(model.config, tokens, kind)
        rates.append(model.flops_per_token() * tokens / seconds(step))
        shares.append(rates[-1] / peak)
    return f"{statistics.median(shares):.2f} of the peak ({min(shares):.2f} to {max(shares):.2f}), {statistics.median(rates) / 1e9:.0f} GFLOP/s"


def layer_step(n_expert, top_k, dtype):
    """A function that does a forward and backward pass of experts of width 1536, or of a dense MLP of width 1536 top_k
    (no experts), at n_embd 768 and 2048 tokens."""
    experts = {"n_expert": n_expert, "n_expert_active": top_k} if n_expert else {}
    config = GPTConfig(n_embd=768, n_head=12, n_hidden=1536, **experts)
    layer, x = MoE(config) if n_expert else MLP(config, 1536 * top_k), torch.randn(1, 2048, 768, requires_grad=True)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.02)

    def step():
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            y = layer(x)
        y.float().square().mean().backward()

    return step


def compare_with_llama(c):
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: no comparison with its Llama")
        return
    print("step time over transformers' Llama of the same size (SDPA attention), eager")
    config = build("pre", c).config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=c.n_embd, intermediate_size=config.n_hidden,
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_head,
            max_position_embeddings=c.block_size, use_cache=False,
        )
    )  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        ours, theirs = (stepper(m, c, dtype, c.batch_size) for m in (build("pre", c), llama))
        print(f"  {dtype:10} {ratios(ours, theirs, c.pairs)}", flush=True)


def compare_generation(c, n=64):
    """Tokens per second of generate() against transformers' on the exported model, greedy, after 16 tokens."""
    try:
        import transformers

        import interchange
    except ImportError:
        print("transformers is not installed: no comparison with its generate")
        return
    print(f"time of transformers' generate over ours, {n} tokens, float32, {c.n_layer} layers x {c.n_embd}")
    model = build("pre", c).eval()
    with tempfile.TemporaryDirectory() as folder:
        interchange.export_hf(model, folder, overwrite=True)
        exported = transformers.AutoModelForCausalLM.from_pretrained(folder)
    exported.generation_config = transformers.GenerationConfig(pad_token_id=0)
    for batch_size in (1, 8):
        idx = torch.randint(0, 257, (batch_size, 16))
        theirs = {"attention_mask": torch.ones_like(idx), "min_new_tokens": n, "max_new_tokens": n, "do_sample": False}
        pair = lambda: exported.generate(idx, **theirs), lambda: model.generate(idx, n, temperature=0)
        print(f"  batch {batch_size:4} {ratios(*pair, c.pairs)}; the same text: {pair[0]().equal(pair[1]())}", flush=True)


def main():
    settings = configure(Settings, "Compares the placements' speed and memory.")
    parts = settings.only.split(",")
    keep_freed_memory()
    c = settings
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"steps of {c.n_layer} layers x {c.n_embd}, {c.batch_size} x {c.block_size} tokens, {c.dtype}, {c.pairs} pairs\n")

    def step_of(norm, compiled=False):
        model = build(norm, settings)
        torch._dynamo.reset()
        return stepper(model, settings, c.dtype, c.batch_size, torch.compile(model, fullgraph=True) if compiled else None)

    if "schemes" in parts:
        print("step time over pre, eager: median (middle half)")
        for norm in SCHEMES:
            print(f"  {norm:10} {ratios(step_of(norm), step_of('pre'), c.pairs)}", flush=True)
    if "gpas" in parts:
        print("step time of gpas_<scheme> over <scheme>, eager")
        for norm in SCHEMES:
            print(f"  {norm:10} {ratios(step_of('gpas_' + norm), step_of(norm), c.pairs)}", flush=True)
    if "compiled" in parts:
        print("step time of gpas_<scheme> over <scheme>, compiled")
        for norm in SCHEMES:
            models = [build(prefix + norm, settings) for prefix in ("gpas_", "")]
            torch._dynamo.reset()
            steps = [stepper(m, settings, c.dtype, c.batch_size, torch.compile(m, fullgraph=True)) for m in models]
            print(f"  {norm:10} {ratios(*steps, c.pairs)}", flush=True)
    if "memory" in parts:
        print("saved activation bytes of gpas_<scheme> over <scheme>: float32, bfloat16 autocast")
        idx = torch.randint(0, 257, (c.batch_size, c.block_size))
        for norm in SCHEMES:
            pair = [build(prefix + norm, settings) for prefix in ("gpas_", "")]
            shares = [saved_bytes(pair[0], idx, a) / saved_bytes(pair[1], idx, a) for a in (False, True)]
            print(f"  {norm:10} {shares[0]:.4f}  {shares[1]:.4f}", flush=True)
    if "moe" in parts:
        print("forward and backward of experts over a dense MLP of equal active width, 2048 tokens, n_embd 768, width 1536")
        for dtype in ("float32", "bfloat16"):
            for n_expert, top_k in ((8, 4), (16, 4), (32, 1), (32, 2), (32, 4), (32, 8), (64, 4)):
                steps = layer_step(n_expert, top_k, dtype), layer_step(0, top_k, dtype)
                print(f"  {dtype:10} {n_expert} experts, top {top_k}: {ratios(*steps, max(2, c.pairs // 3))}", flush=True)
    if "peak" in parts:
        print("forward, backward and optimizer at 12 layers, 16 sequences, causal attention counted as (T + 1) / 2 keys")
        for dtype in ("float32", "bfloat16"):
            print(f"  {dtype:10} {peak_share(settings, dtype)}", flush=True)
    if "llama" in parts:
        compare_with_llama(c)
    if "generate" in parts:
        compare_generation(c)
    if "analyze" in parts:
        benchmark_analyze.report(benchmark_analyze.Settings())
    if "data" in parts:
        benchmark_data.report(benchmark_data.Settings())


if __name__ == "__main__":
    run(main)
