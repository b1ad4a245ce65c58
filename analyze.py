"""What a run's layers do: `python analyze.py out-gpas_pre` measures a checkpoint on held-out text.

    python analyze.py out-pre out-gpas_pre out-lns             several runs side by side
    python analyze.py out-pre --metrics=stream,jacobian        some of the measures
    python analyze.py out-pre --choices=questions.jsonl        accuracy, and what each layer's removal costs of it
    python analyze.py --help                                   every setting

prints tables and writes analysis.json and, with matplotlib, figures. Each measure is a function for a notebook too:

    import analyze
    model, _ = analyze.load_run("out-pre")
    batches = analyze.load_batches("data/stdlib", model.config, tokens=2048, batch_size=8)
    analyze.removal(model, batches)["causal"]          batches: a list of (idx, targets), int64 tensors (B, T)

Layers are l = 1..L; x_l (B, T, n_embd) is the residual state that layer l gets, x_1 the embedding's output (normalized,
where the model does so), x_{L+1} the last layer's output, before the final norm. Tensors with a layer dimension hold
layer l at index l - 1; those over residual states (L + 1) hold x_1 first. "Tokens" are all positions of all batches.
Losses are cross-entropies in nats in evaluation mode, without router terms. Papers are cited as in model.py.
"""

import functools
import inspect
import json
import math
import sys
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import prepare_data
from configurator import UserError, configure, progress, read_log, run, save_whole
from model import GPT, Block, GPTConfig, find_device, gate_scale, load_checkpoint
from prepare_data import TokenData

METRICS = {
    "stream": "variance, magnitude, kurtosis and largest values of the residual states",
    "angular": "angular distance between residual states",
    "gradients": "gradient norm and variance of each layer",
    "weights": "weight norms and sparsity, gates, output-norm gains",
    "attention": "sparsity and entropy of the attention, head maps",
    "experts": "load, dead experts, router entropy",
    "removal": "loss without each layer, causal scores",
    "permutation": "loss with each pair of layers swapped",
    "usefulness": "loss with each layer replaced by an affine map",
    "jacobian": "each layer's Jacobian",
    "choices": "multiple-choice accuracy, and without each layer",
}


@dataclass
class Settings:
    out_dirs: list[str] = field(default_factory=list)  # folders of runs, also without --out_dirs
    metrics: str = "all"  # all, or some with commas between, by their names in METRICS: stream, jacobian ...
    analysis_dir: str | None = None  # where analysis.json and figures go; none: the run's folder, analysis for several
    figures: bool | None = None  # draw them; none: where matplotlib is installed
    # what is measured
    tokens: int = 16384  # held-out tokens
    jacobian_tokens: int = 1024  # of them, for the Jacobians
    layers: str = "all"  # whose Jacobians: numbers from 1, with commas between, or all
    own_token: bool = False  # Jacobian of each token's output by the same token's input, without cross-token terms
    choices: str | None = None  # a jsonl of multiple-choice questions: prompt, choices, answer
    # data
    dataset: str | None = None  # a folder in data_dir, or a path; none: the run's
    data_dir: str | None = None  # where data sets are; none: the run's
    block_size: int | None = None  # tokens of a sequence; none: the model's
    # machine
    batch_size: int = 8  # sequences at once
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1 ...

    def __post_init__(self):
        if not self.out_dirs:
            raise ValueError("which run? python analyze.py OUT_DIR [OUT_DIR ...]")
        if len({Path(out_dir).resolve() for out_dir in self.out_dirs}) < len(self.out_dirs):
            raise ValueError("the same run is given twice")
        for name in ("tokens", "jacobian_tokens", "batch_size", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        unknown = [m for m in self.metrics.split(",") if m not in METRICS and self.metrics != "all"]
        if unknown:
            raise ValueError(f"unknown metrics {unknown[0]!r}; known: all, {', '.join(METRICS)}")
        if "choices" in self.metrics.split(",") and not self.choices:
            raise ValueError("metrics=choices needs a file of questions: --choices=FILE.jsonl")
        if self.choices and not self.wants("choices"):
            raise ValueError(f"choices={self.choices} has no effect with metrics={self.metrics}")
        if self.layers != "all" and not all(part.isdecimal() and int(part) for part in self.layers.split(",")):
            raise ValueError(f"layers is {self.layers!r}; it must be all, or numbers from 1 with commas between")

    def wants(self, name):
        return self.metrics == "all" or name in self.metrics.split(",")


# ---------------------------------------------------------------------------------------------------------------------
# One pass over the text for all measures


class Trace:
    """What one batch idx, targets (B, T) does in the model:

    states       L + 1 residual states (B, T, n_embd)

    and, if asked for its inside, for each layer (None where it has no such part: a block replaced by another function):

    modules      {"attn": the attention's output, "mlp": the MLP's}, each (B, T, n_embd)
    branches     the same where they are added to the stream: after the norm B and what else scales the branch
    attention    (q, k, mask): queries and keys as their product gets them, after norm and rotation, (B, n_head, T,
                 head_dim) and (B, n_kv_head, T, head_dim); mask is None for the causal one
    mlp_inputs   the MLP's input (B, T, n_embd)
    """

    def __init__(self, model, idx, targets, inside):
        self.model, self.targets, L = model, targets, len(model.blocks)
        self.modules = {"attn": [None] * L, "mlp": [None] * L}
        self.branches = {"attn": [None] * L, "mlp": [None] * L}
        self.attention, self.mlp_inputs = [None] * L, [None] * L
        self.states = [model.embed_norm(model.embed_tokens(idx))]
        for l, block in enumerate(model.blocks):
            hooks = list(self.watch(l, block)) if inside and isinstance(block, Block) else []
            with RecordAttention(self.attention, l) if inside else nullcontext():
                self.states.append(block(self.states[l]))
            for hook in hooks:
                hook.remove()

    def watch(self, l, block):
        """Hooks that note what happens in the sub-layers of a block."""
        for name in ("attn", "mlp"):
            module, residual = getattr(block, name), getattr(block, f"{name}_residual")

            def note_module(_, __, out, name=name):
                self.modules[name][l] = out

            def note_branch(_, __, h, name=name):
                self.branches[name][l] = h

            yield module.register_forward_hook(note_module)
            yield residual.branch_out.register_forward_hook(note_branch)
        yield block.mlp.register_forward_pre_hook(lambda _, args: self.mlp_inputs.__setitem__(l, args[0]))

    @functools.cached_property
    def loss(self):
        """Sum of the unchanged model's loss over the batch's targets."""
        return loss_sum(self.model, self.states[-1], self.targets)

    @functools.cached_property
    def n_targets(self):
        return (self.targets != -100).sum().item()


class RecordAttention(TorchFunctionMode):
    """Notes (q, k, mask) of a call of scaled_dot_product_attention in calls[l]."""

    def __init__(self, calls, l):
        super().__init__()
        self.calls, self.l = calls, l

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls[self.l] = *args[:2], kwargs.get("attn_mask")
        return func(*args, **kwargs)


def loss_sum(model, x, targets):
    """Sum over the targets of the cross-entropy in nats that the last residual state x leads to, a float64 scalar."""
    logits = model.lm_head(model.norm(x))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum").double()


@contextmanager
def evaluation(model, frozen=True):
    """Evaluation mode and, if frozen, no gradients of parameters; both as they were afterwards."""
    was_training, required = model.training, [p.requires_grad for p in model.parameters()]
    model.eval()
    try:
        for p in model.parameters():
            p.requires_grad_(not frozen)
        yield
    finally:
        model.train(was_training)
        for p, r in zip(model.parameters(), required):
            p.requires_grad_(r)


def measure(start):
    """A function (model, batches) from a generator `start(model)` that gets the Trace of each batch from `yield`, then
    None, and returns the result:

        total = 0
        while trace := (yield):
            total += ... trace.states ...
        return total

    `yield "inside"` asks for the inside of the layers too. Alone it makes a pass of its own; `one_pass` feeds several
    from the same traces."""

    def alone(model, batches, **options):
        return one_pass(model, batches, {"": start(model, **options)})[""]

    functools.update_wrapper(alone, start)
    parameters = list(inspect.signature(start).parameters.values())
    batches = inspect.Parameter("batches", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    alone.__signature__ = inspect.Signature([parameters[0], batches, *parameters[1:]])
    alone.start = start
    return alone


@torch.no_grad()
def one_pass(model, batches, started):
    """{name: result} of the measures {name: measure.start(model)} over `batches`, with one forward pass for all."""
    results = {}
    with evaluation(model):
        # what no measure looks at is not kept: it would push the weights of the rerun layers out of the caches
        inside = "inside" in [next(generator) for generator in started.values()]
        for idx, targets in batches:
            trace = Trace(model, idx, targets, inside)
            for generator in started.values():
                generator.send(trace)
        for name, generator in started.items():
            try:
                generator.send(None)
            except StopIteration as end:
                results[name] = end.value
    return results


def zeros(model, *shape):
    """A float64 tensor of zeros, where sums over tokens are kept."""
    return torch.zeros(shape, dtype=torch.float64, device=model.lm_head.weight.device)


# ---------------------------------------------------------------------------------------------------------------------
# Stream and representation

FLOAT16_MAX = 65504.0
TOP = 100


@measure
def stream(model):
    """Size and shape of the residual states, a dict:

    variance             (L + 1)  1/d sum_j (x_j - mean_j x)^2 of a token, mean over tokens (Sparsity Eq. 4); 1/d, where
                                  torch.var has 1/(d - 1)
    magnitude            (L + 1)  mean |x| over tokens and dimensions (Peri-LN Figure 6)
    attn_variance        (L)      the variance of what the attention adds to the stream: after the norm B and the scales
    mlp_variance         (L)      the same of the MLP
    attn_module_variance (L)      the variance of the attention's own output, before B; equal to the above without B
    mlp_module_variance  (L)      the same of the MLP
    kurtosis             (L + 1)  mean over dimensions of kurtosis_per_dim (Sparsity Eq. 20)
    kurtosis_per_dim     (L + 1, d)  m4 / m2^2 with the central moments over tokens (Sparsity Eq. 19), without -3: a
                                  Gaussian has 3; nan for a dimension that does not vary, which the mean leaves out
    largest              (L + 1)  largest |x|; massive activations (Peri-LN Figure 11)
    over_float16         (L + 1)  how many |x| exceed float16's 65504
    top, top_state       (100)    the largest |x| of all tokens and states, descending, and their index in 0..L
    """
    L, d = len(model.blocks), model.config.n_embd
    variance, magnitude, largest, over = (zeros(model, L + 1) for _ in range(4))
    parts = {f"{name}{kind}_variance": zeros(model, L) for name in ("attn", "mlp") for kind in ("", "_module")}
    powers, shift, n = zeros(model, 4, L + 1, d), None, 0  # powers: sums of (x - shift)^1..4
    top, top_state = zeros(model, 0), zeros(model, 0).long()
    while trace := (yield "inside"):
        if shift is None:  # a guess of the mean, so that the sums of powers do not cancel
            shift = [x.double().mean((0, 1)) for x in trace.states]
        for i, x in enumerate(trace.states):
            variance[i] += token_variance(x)
            size = x.abs()
            magnitude[i] += size.mean(-1).double().sum()
            over[i] += (size > FLOAT16_MAX).sum()
            highest = size.flatten().topk(min(TOP, size.numel())).values.double()
            largest[i] = torch.maximum(largest[i], highest[0])
            top, top_state = torch.cat((top, highest)), torch.cat((top_state, torch.full_like(highest, i).long()))
            y = x.double().flatten(0, 1) - shift[i]
            square = y * y
            for power, value in zip(powers, (y, square, square * y, square * square)):
                power[i] += value.sum(0)
        for name in ("attn", "mlp"):
            for l in range(L):
                parts[f"{name}_variance"][l] += token_variance(trace.branches[name][l])
                parts[f"{name}_module_variance"][l] += token_variance(trace.modules[name][l])
        top, order = top.topk(min(TOP, len(top)))
        top_state, n = top_state[order], n + x[..., 0].numel()
    m1, p2, p3, p4 = powers / n
    m2 = p2 - m1**2
    m4 = p4 - 4 * m1 * p3 + 6 * m1**2 * p2 - 3 * m1**4
    kurtosis = torch.where(m2 > 1e-30, m4 / m2**2, math.nan)
    return {
        "variance": variance / n,
        "magnitude": magnitude / n,
        **{name: total / n for name, total in parts.items()},
        "kurtosis": kurtosis.nanmean(-1),
        "kurtosis_per_dim": kurtosis,
        "largest": largest,
        "over_float16": over.long(),
        "top": top,
        "top_state": top_state,
    }


def token_variance(x):
    """Sum over tokens of the variance over the dimensions (1/d) of x (B, T, d); nan for None."""
    if x is None:
        return torch.tensor(math.nan)
    return x.var(-1, correction=0).double().sum()


@measure
def angular_distance(model):
    """(L, L) with d(l, n) = arccos(cos(x_l, x_{l+n})) / pi at [l - 1, n - 1], mean over all tokens (LNS Eq. 1).

    0 for the same direction, 1/2 for orthogonal ones; nan where l + n > L + 1. x_{L+1} is the residual state before the
    final norm. LNS's published code takes each window's last token only and min-max scales its heat maps.
    """
    L = len(model.blocks)
    total, n = zeros(model, L + 1, L + 1), 0
    while trace := (yield):
        u = F.normalize(torch.stack(trace.states, dim=2).double(), dim=-1).flatten(0, 1)  # (tokens, L + 1, d)
        total += (u @ u.mT).clamp(-1, 1).arccos().sum(0) / math.pi
        n += len(u)
    result = torch.full_like(total[1:, 1:], math.nan)
    for l in range(L):
        result[l, : L - l] = total[l, l + 1 :] / n
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Attention and experts

ATTENTION_THRESHOLDS = 1e-3, 1e-4, 1e-6


@measure
def attention(model, map_size=256):
    """Sparsity and entropy of the attention weights A (T, T) of each head, a dict:

    causal_sparsity  (3, L, n_head)  share of A_ij < 1e-3, 1e-4, 1e-6 over the entries that are attended to (j <= i)
    sparsity         (3, L, n_head)  the same over all T^2 entries, the masked ones counting as 0 (Sparsity Eq. 15);
                                     its mean over layers and heads is Eq. 16
    entropy          (L, n_head)     -sum_j A_ij log A_ij in nats, 0 log 0 = 0, mean over queries i and sequences
    maps             (L, n_head, P, P)  A averaged over sequences, its first P = min(T, map_size) positions (Sparsity
                                     Figure 6, which shows A^0.2)
    """
    L, H = len(model.blocks), model.config.n_head
    below, entropy, maps = zeros(model, 3, L, H), zeros(model, L, H), None
    n_sequences = n_queries = n_causal = n_all = 0
    while trace := (yield "inside"):
        B, T = trace.targets.shape
        P = min(T, map_size)
        if maps is None:
            maps = zeros(model, L, H, P, P)
        for l, call in enumerate(trace.attention):
            if call is None:
                below[:, l], entropy[l] = math.nan, math.nan
                continue
            q, k, mask = call
            for b in range(B):
                A, visible = attention_weights(q[b], k[b], mask)  # (n_head, T, T)
                # masked weights are below every threshold: they are taken off again
                below[:, l] += torch.stack([(A < e).sum((1, 2)) for e in ATTENTION_THRESHOLDS]) - (~visible).sum()
                entropy[l] += torch.special.entr(A).sum((1, 2))
                maps[l] += A[:, :P, :P]
        n_sequences, n_queries = n_sequences + B, n_queries + B * T
        n_causal, n_all = n_causal + B * visible.sum(), n_all + B * T * T
    return {
        "causal_sparsity": below / n_causal,
        "sparsity": (below + n_all - n_causal) / n_all,
        "entropy": entropy / n_queries,
        "maps": maps / n_sequences,
    }


def attention_weights(q, k, mask=None):
    """softmax(q k^T / sqrt(head_dim)) over the visible keys, (..., n_head, T, T), and which are visible, (T, T) bool.

    q (..., n_head, T, head_dim); k has n_kv_head heads: query head h reads floor(h / (n_head / n_kv_head)).
    """
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril() if mask is None else mask
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
    return scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1), visible


@measure
def experts(model):
    """How the M layers with experts use them, a dict; UserError for a model without.

    layers   (M)     their numbers l
    load     (M, E)  share of the choices (n_expert_active a token) that go to each expert: 1/E if balanced
    dead     (M)     share of the experts that no token chose
    entropy  (M)     of the router's probabilities, softmax over all experts, in nats, mean over tokens: at most log E
    """
    layers = [l for l, block in enumerate(model.blocks, 1) if hasattr(getattr(block, "mlp", None), "router")]
    if not layers:
        raise UserError("experts: this model has none")
    k, E = model.config.n_expert_active, model.config.n_expert
    chosen, entropy, n = zeros(model, len(layers), E), zeros(model, len(layers)), 0
    while trace := (yield "inside"):
        for i, l in enumerate(layers):
            p = model.blocks[l - 1].mlp.route(trace.mlp_inputs[l - 1].flatten(0, 1)).softmax(-1)
            chosen[i] += p.topk(k).indices.flatten().bincount(minlength=E)
            entropy[i] += torch.special.entr(p).sum()
        n += len(p)
    return {
        "layers": torch.tensor(layers),
        "load": chosen / (n * k),
        "dead": (chosen == 0).double().mean(-1),
        "entropy": entropy / n,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Gradients and weights


def gradients(model, batches):
    """The gradient g_l of the mean loss over all tokens by the parameters of layer l (Peri-LN Figure 7), a dict:

    norm      (L)  |g_l|_2
    variance  (L)  of the elements of g_l, 1/n

    Peri-LN does not say how it pools a layer: here all of its parameters, gains and gate included, are one vector.
    """
    layers = [list(block.parameters()) for block in model.blocks]
    parameters = [p for layer in layers for p in layer]
    total, n = [torch.zeros_like(p) for p in parameters], 0
    with evaluation(model, frozen=False):
        for idx, targets in batches:
            x = model.embed_norm(model.embed_tokens(idx)).detach()
            for block in model.blocks:
                x = block(x)
            parts = torch.autograd.grad(loss_sum(model, x, targets), parameters, allow_unused=True)
            for sum_so_far, part in zip(total, parts):
                if part is not None:  # an expert that no token of the batch chose
                    sum_so_far += part
            n += (targets != -100).sum().item()
    pieces = iter(total)
    g = [torch.cat([next(pieces).flatten() for _ in layer]).double() / n for layer in layers]
    return {"norm": torch.stack([v.norm() for v in g]), "variance": torch.stack([v.var(correction=0) for v in g])}


WEIGHT_THRESHOLDS = 1e-1, 1e-2, 1e-4


@torch.no_grad()
def weights(model, batches=None):
    """What the parameters say by themselves, a dict (no text is needed):

    attn_norm, mlp_norm          (L)     Frobenius norm of all matrices of the attention, of the MLP (GPAS Figure 6
                                         shows the ratio of two runs' norms)
    gates, gate_scale            (L, 1)  gates a_l and 1 - act(a_l) (GPAS Figure 3); (L, 2) with one a sub-layer; absent
                                         without gates
    attn_out_gain, mlp_out_gain  (L)     mean gain of the norm B (Peri-LN Figure 9b); nan in layers without
    sparsity_matrices            (3)     share of |w| < 1e-1, 1e-2, 1e-4 over all matrices, embedding and head included
    sparsity_all                 (3)     the same over all parameters (Sparsity Eq. 14)
    """
    result = {}
    for name in ("attn", "mlp"):
        modules = [getattr(block, name) for block in model.blocks]
        norms = [torch.stack([p.double().norm() for p in m.parameters() if p.dim() >= 2]).norm() for m in modules]
        result[f"{name}_norm"] = torch.stack(norms)
    if model.gates():
        scales = [gate_scale(block.gate, block.gpas_act) for block in model.blocks]
        result.update(gates=torch.stack(model.gates()).detach().clone(), gate_scale=torch.stack(scales))
    for name in ("attn", "mlp"):
        gains = [getattr(getattr(block, f"{name}_residual").out_norm, "weight", None) for block in model.blocks]
        result[f"{name}_out_gain"] = torch.tensor([math.nan if g is None else g.double().mean().item() for g in gains])
    for kind, least in (("matrices", 2), ("all", 0)):
        chosen = [p for p in model.parameters() if p.dim() >= least]
        count = [sum((p.abs() < e).sum().item() for p in chosen) for e in WEIGHT_THRESHOLDS]
        result[f"sparsity_{kind}"] = torch.tensor(count, dtype=torch.float64) / sum(p.numel() for p in chosen)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Jacobian


def jacobian(model, batches, layers=None, own_token=False, rows=16):
    """Jacobians of whole blocks y = block(x), a dict, with M = len(layers) (a list of numbers l, all by default):

    layers          (M)
    matrices        (M, d, d)  J = 1/N sum_t sum_t' dy_t' / dx_t over the N tokens, t and t' of one sequence: the mean
                               over input tokens, cross-token terms included (Sparsity's published code). With own_token
                               only t' = t: the mean of dy_t / dx_t
    deviation       (M)        |J - I|_F (Sparsity Figure 2b), and deviation_per_d, divided by d
    off_diagonal    (M)        Frobenius norm without the diagonal, and off_diagonal_rms, divided by sqrt(d^2 - d)
    diagonal_mean, diagonal_std (M)   over the d diagonal elements, std with 1/d
    spectral_norm   (M)        largest singular value

    By reverse mode, `rows` rows of J at a time: J is what backpropagation sees. GPAS stops a gradient, so that J then
    is not the derivative of the forward function: on the stream its gate does not scale J.
    """
    d, layers = model.config.n_embd, list(layers or range(1, len(model.blocks) + 1))
    if not set(layers) <= set(range(1, len(model.blocks) + 1)):
        raise UserError(f"layers are {','.join(map(str, layers))}; the model has layers 1 to {len(model.blocks)}")
    J, n = zeros(model, len(layers), d, d), 0
    # the fused kernels have no batched backward pass
    with evaluation(model), sdpa_kernel(SDPBackend.MATH), OwnToken() if own_token else nullcontext():
        for idx, _ in batches:
            x = model.embed_norm(model.embed_tokens(idx))
            for l, block in enumerate(model.blocks[: max(layers)], 1):
                x = x.detach().requires_grad_(l in layers)
                y = block(x)
                for first in range(0, d, rows) if l in layers else ():
                    some = torch.arange(first, min(first + rows, d), device=x.device)
                    e = F.one_hot(some, d).to(y.dtype)[:, None, None].expand(-1, *y.shape)  # row i: e_i at each t'
                    grad = torch.autograd.grad(y, x, e, is_grads_batched=True, retain_graph=some[-1] < d - 1)[0]
                    J[layers.index(l), some] += grad.sum((1, 2)).double()
                x = y
            n += idx.numel()
    J = J / n
    diagonal = J.diagonal(dim1=1, dim2=2)
    deviation = torch.linalg.matrix_norm(J - torch.eye(d, device=J.device))
    off_diagonal = torch.linalg.matrix_norm(J - torch.diag_embed(diagonal))
    return {
        "layers": torch.tensor(layers),
        "matrices": J,
        "deviation": deviation,
        "deviation_per_d": deviation / d,
        "off_diagonal": off_diagonal,
        "off_diagonal_rms": off_diagonal / math.sqrt(d * d - d),
        "diagonal_mean": diagonal.mean(1),
        "diagonal_std": diagonal.std(1, correction=0),
        "spectral_norm": torch.linalg.matrix_norm(J, 2),
    }


class OwnToken(TorchFunctionMode):
    """Attention of the same value whose gradient reaches a token's output from that token only: the keys and values of
    the others are constants."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        k, v = (z.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for z in (k, v))
        visible = attention_weights(q.detach(), k.detach(), kwargs.get("attn_mask"))[1]
        own_score = (q.detach() * (k - k.detach())).sum(-1)  # 0, with the gradient of q_t k_t by k_t
        scores = (q @ k.detach().mT + torch.diag_embed(own_score)) / math.sqrt(q.shape[-1])
        A = scores.masked_fill(~visible, -math.inf).softmax(-1)
        own_weight = A.detach().diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        return A @ v.detach() + own_weight * (v - v.detach())


# ---------------------------------------------------------------------------------------------------------------------
# Layer importance
#
# What comes before a changed layer stays as it was: everything here starts from the kept states of the unchanged pass.
# Blocks are moved and left out whole, with their own constants (the s of LNS, the kind of Mix-LN's layer).


def apply(blocks, x):
    for block in blocks:
        x = block(x)
    return x


@measure
def removal(model):
    """Loss without each layer, and what skipping layer s changes in the later ones, a dict:

    loss, perplexity  floats  of the unchanged model
    loss_drop         (L)     loss(without l) - loss: positive when the layer matters (LNS, performance drop)
    perplexity_drop   (L)     the same of exp(loss)
    causal            (L, L)  C(s, l) at [s - 1, l - 1] for l > s, nan elsewhere (Sparsity Eq. 5):
                              |(x_{l+1} - x_l) - (x'_{l+1} - x'_l)| / |x_{l+1} - x_l|, x' the states when s is skipped,
                              a ratio of token means of per-token norms; 0 where the upper one is 0
    causal_score      float   1/L sum_s mean_{l>s} C(s, l), the last s counting 0
    causal_score_normalized   the same times 1/sqrt(L) (Sparsity Eq. 6; its published values look un-normalized)
    """
    L = len(model.blocks)
    loss, removed, n = 0.0, zeros(model, L), 0
    size, change = zeros(model, L), zeros(model, L, L)
    while trace := (yield):
        x = trace.states
        update = [x[l + 1] - x[l] for l in range(L)]
        size += torch.stack([u.norm(dim=-1).double().sum() for u in update])
        for s in range(L):
            h = x[s]
            for l in range(s + 1, L):
                after = model.blocks[l](h)
                change[s, l] += (update[l] - (after - h)).norm(dim=-1).double().sum()
                h = after
            removed[s] += loss_sum(model, h, trace.targets)
        loss, n = loss + trace.loss.item(), n + trace.n_targets
    loss, removed = loss / n, removed / n
    later = torch.ones(L, L, device=change.device).triu(1).bool()
    C = torch.where(change == 0, 0.0, change / size).masked_fill(~later, math.nan)
    score = C.nanmean(1).nan_to_num(0.0).mean().item()
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "loss_drop": removed - loss,
        "perplexity_drop": removed.exp() - math.exp(loss),
        "causal": C,
        "causal_score": score,
        "causal_score_normalized": score / math.sqrt(L),
    }


@measure
def permutation(model):
    """|loss(i and j swapped) - loss| / |loss| for every pair of layers (Sparsity Eq. 7), a dict:

    matrix  (L, L)  symmetric, the diagonal 0
    score   float   mean over the pairs i < j (Sparsity Eq. 8); 0 for a single layer
    """
    L, blocks = len(model.blocks), model.blocks
    loss, swapped = zeros(model), zeros(model, L, L)
    while trace := (yield):
        for i in range(L):
            for j in range(i + 1, L):
                order = [blocks[j], *blocks[i + 1 : j], blocks[i], *blocks[j + 1 :]]
                swapped[i, j] += loss_sum(model, apply(order, trace.states[i]), trace.targets)
        loss += trace.loss
    P = ((swapped - loss).abs() / loss.abs()).triu(1)
    return {"matrix": P + P.mT, "score": (P.sum() / max(1, L * (L - 1) / 2)).item()}


def usefulness(model, batches, threshold=1.1):
    """What the nonlinearity of each layer is worth: the loss with the block replaced by its least-squares affine map
    from its own inputs to its own outputs (Sparsity Eq. 9, 10), a dict:

    ratio       (L)    loss(l replaced) / loss
    loss_drop   (L)    loss(l replaced) - loss
    useful      (L)    bool: ratio > threshold, effective and not wasted
    effective, wasted  how many layers are and are not
    score       float  effective / L

    Two passes over `batches` (a list): one fits, one measures. Sparsity's published script installs the fitted matrix
    transposed in nn.Linear, which makes its scores too high. Warns under 4 d tokens, UserError under d + 1.
    """
    maps = affine_maps(model, batches)
    return replacement(model, batches, maps=maps, threshold=threshold)


@measure
def affine_maps(model):
    """L pairs (W (d, d), b (d)) with the least |x W^T + b - y|^2 over all tokens, y = block(x): as F.linear takes them.

    Normal equations in float64, summed batch by batch, so that memory does not grow with the tokens; where the inputs
    do not span all dimensions, a solution of least norm (of the dimensions scaled to equal size).
    """
    L, d = len(model.blocks), model.config.n_embd
    xx, xy, n = zeros(model, L, d + 1, d + 1), zeros(model, L, d + 1, d), 0
    while trace := (yield):
        one = torch.ones_like(trace.states[0][..., :1]).double().flatten(0, 1)
        x = torch.cat((trace.states[0].double().flatten(0, 1), one), dim=1)
        for l in range(L):
            y = trace.states[l + 1].double().flatten(0, 1)
            xx[l] += x.mT @ x
            xy[l] += x.mT @ y
            x = torch.cat((y, one), dim=1)
        n += len(one)
    if n < d + 1:
        raise UserError(f"usefulness: {n} tokens cannot fit a map of {d} dimensions and a bias; {d + 1} or more can")
    if n < 4 * d:
        warnings.warn(f"usefulness: {n} tokens are few to fit maps of {d} dimensions; {4 * d} or more are better")
    scale = xx.diagonal(dim1=1, dim2=2).clamp(min=1e-30).rsqrt().unsqueeze(2)  # dimensions of any size weigh alike
    inverse = torch.linalg.pinv(scale * xx * scale.mT, hermitian=True)
    maps = (scale * (inverse @ (scale * xy))).to(model.lm_head.weight.dtype)
    return [(m[:-1].mT.contiguous(), m[-1]) for m in maps]


@measure
def replacement(model, maps, threshold=1.1):
    """`usefulness` with given affine maps, L pairs (W (d, d), b (d))."""
    L = len(model.blocks)
    loss, replaced, n = zeros(model), zeros(model, L), 0
    while trace := (yield):
        for l in range(L):
            h = apply(model.blocks[l + 1 :], F.linear(trace.states[l], *maps[l]))
            replaced[l] += loss_sum(model, h, trace.targets)
        loss, n = loss + trace.loss, n + trace.n_targets
    useful = replaced / loss > threshold
    effective = int(useful.sum())
    return {
        "ratio": replaced / loss,
        "loss_drop": (replaced - loss) / n,
        "useful": useful,
        "effective": effective,
        "wasted": L - effective,
        "score": effective / L,
    }


@torch.no_grad()
def multiple_choice(model, questions, encoding, batch_size=16):
    """Accuracy on multiple-choice questions, and what the removal of each layer costs (LNS section 3), a dict:

    accuracy     float  share of the questions whose best choice is the answer
    score_drop   (L)    accuracy - accuracy(without l): positive when the layer matters
    n_questions  int

    `questions`: dicts with `prompt`, `choices` (strings) and `answer` (index of a choice, or its text). The best choice
    has the greatest log-likelihood of ' ' + choice after the prompt, divided by the choice's length in characters: the
    acc_norm of EleutherAI's harness, with its tokenization (of prompt and choice as one text, the white space between
    them with the choice) and its cut of the left end where they exceed the block size. An empty prompt is the start of
    a document.
    """
    rows, block_size = [], model.config.block_size
    for q in questions:
        for choice in q["choices"]:
            before = prepare_data.encode(encoding, q["prompt"].rstrip()).tolist()
            after = prepare_data.encode(encoding, q["prompt"] + " " + choice).tolist()[len(before) :]
            if len(after) > block_size:
                text = f"choice {choice[:40]!r} has {len(after)} tokens"
                raise UserError(f"{text}, more than the block size {block_size}")
            ids = torch.tensor(((before or [encoding.eot_token]) + after)[-(block_size + 1) :])
            targets = ids[1:].clone()
            targets[: len(targets) - len(after)] = -100
            rows.append((ids[:-1], targets))
    L, device = len(model.blocks), model.lm_head.weight.device
    likelihood = []  # of each row: with all layers, then without layer 1, 2 ...
    with evaluation(model):
        for first in progress(range(0, len(rows), batch_size), "choices"):
            idx, targets = zip(*rows[first : first + batch_size])
            idx = torch.nn.utils.rnn.pad_sequence(idx, batch_first=True).to(device)  # at the right end: not seen before
            targets = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100).to(device)
            states = [model.embed_norm(model.embed_tokens(idx))]
            for block in model.blocks:
                states.append(block(states[-1]))
            ends = [states[-1], *(apply(model.blocks[l + 1 :], states[l]) for l in range(L))]
            logits = (model.lm_head(model.norm(h)).float().transpose(1, 2) for h in ends)
            likelihood += torch.stack([-F.cross_entropy(z, targets, reduction="none").sum(1) for z in logits], dim=1)
    correct, likelihood = zeros(model, L + 1), iter(likelihood)
    for q in questions:
        per_character = torch.stack([next(likelihood) / max(1, len(choice)) for choice in q["choices"]])
        answer = q["answer"] if isinstance(q["answer"], int) else q["choices"].index(q["answer"])
        correct += per_character.argmax(0) == answer
    accuracy = correct / len(questions)
    return {"accuracy": accuracy[0].item(), "score_drop": accuracy[0] - accuracy[1:], "n_questions": len(questions)}


# ---------------------------------------------------------------------------------------------------------------------
# Runs and text


def load_run(out_dir, device="cpu"):
    """(model, checkpoint dict) of out_dir/ckpt.pt; UserError if it is missing or damaged. No code in it is ever run."""
    try:
        checkpoint = load_checkpoint(out_dir)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        with warnings.catch_warnings(action="ignore"):
            model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        if checkpoint["tokenizer"] is not None:
            prepare_data.build_encoding(checkpoint["tokenizer"])
        if not all(type(checkpoint["settings"].get(name)) is str for name in ("dataset", "data_dir")):
            raise ValueError("its settings name no data set")
        return model.to(device).eval(), checkpoint
    except Exception as error:  # an edited file can hold anything
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"checkpoint {out_dir}/ckpt.pt cannot be read: {type(error).__name__} {reason}") from None


def find_data(settings, checkpoint, speaks=False):
    """Folder of the data set that the settings or the run name; UserError if it is missing or of another tokenizer."""
    of_run = checkpoint["settings"]
    dataset, data_dir = settings.dataset or of_run["dataset"], settings.data_dir or of_run["data_dir"]
    folder = prepare_data.find_data(dataset, data_dir, "val")
    tokenizer = prepare_data.read_meta(folder).get("tokenizer")
    if tokenizer and checkpoint["tokenizer"] and tokenizer != checkpoint["tokenizer"]:
        raise UserError(
            f"{folder} was made with tokenizer {tokenizer['name']}, the run with {checkpoint['tokenizer']['name']}"
        )
    if tokenizer and not checkpoint["tokenizer"] and speaks:
        text = f"the run names no tokenizer: whether {folder} is of the same cannot be told"
        print(f"warning: {text}", file=sys.stderr)
    return folder


def load_batches(folder, config, tokens, batch_size, block_size=None, device="cpu"):
    """Held-out text of a data set's folder, a list of (idx, targets), int64 tensors (up to batch_size, block_size).

    The windows that hold `tokens` tokens, or all there are; the same ones for every run with this block size.
    """
    T = block_size or config.block_size
    data = TokenData(folder, "val", T, config.vocab_size)
    n = min(math.ceil(tokens / T), len(data))
    rows = [torch.from_numpy(r).to(device) for r in data.rows(0, n)]
    batch_size = min(batch_size, n)
    return list(zip(rows[0].split(batch_size), rows[1].split(batch_size)))


def read_questions(path):
    """The questions of a jsonl for `multiple_choice`; UserError names the line that is not one."""
    questions = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"choices {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            q = json.loads(line)
            prompt, choices, answer = q["prompt"], q["choices"], q["answer"]
            is_index = type(answer) is int and 0 <= answer < len(choices)
            good = type(choices) is list and all(type(text) is str for text in [prompt, *choices])
            good = good and len(choices) > 0 and (is_index or answer in choices)
            "".join([prompt, *choices]).encode()  # half of a surrogate pair has no bytes
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise UserError(
                f"{path}:{number} is not a question: an object with prompt, choices (strings) and answer "
                "(an index from 0, or one of the choices)"
            )
        questions.append(q)
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


# ---------------------------------------------------------------------------------------------------------------------
# Results of a run, its tables


def analyze_run(out_dir, settings, device):
    """All measures that the settings ask for: {"run": what was measured, metric: its result}."""
    model, checkpoint = load_run(out_dir, device)
    config, wants, name = model.config, settings.wants, Path(out_dir).name
    layers = None if settings.layers == "all" else list(dict.fromkeys(map(int, settings.layers.split(","))))
    if layers and max(layers) > config.n_layer:
        raise UserError(f"--layers={settings.layers}: {out_dir} has layers 1 to {config.n_layer}")
    has_experts = any(hasattr(block.mlp, "router") for block in model.blocks)
    if not has_experts and settings.metrics != "all" and wants("experts"):
        raise UserError(f"metrics=experts: {out_dir} has no experts")
    folder = find_data(settings, checkpoint)

    def batches(tokens, batch_size):
        return load_batches(folder, config, tokens, batch_size, settings.block_size, device)

    text = batches(settings.tokens, settings.batch_size)
    n_tokens = sum(idx.numel() for idx, _ in text)
    print(f"{out_dir}: {config.norm}, {config.n_layer} layers x {config.n_embd}, step {checkpoint['step']}; ", end="")
    print(f"{n_tokens:,} held-out tokens of {folder}" + ", all there are" * (n_tokens < settings.tokens), flush=True)
    result = {"run": {"out_dir": str(out_dir), "norm": config.norm, "n_layer": config.n_layer, "n_embd": config.n_embd}}
    result["run"].update(step=checkpoint["step"], data=str(folder), tokens=n_tokens)

    # first what the unchanged model shows, then what changed ones do: the affine maps are fitted to all text before
    first = {"stream": stream, "angular": angular_distance, "attention": attention}
    started = {metric: f.start(model) for metric, f in first.items() if wants(metric)}
    if wants("experts") and has_experts:
        started["experts"] = experts.start(model)
    if wants("usefulness"):
        started["maps"] = affine_maps.start(model)
    if started:
        result.update(one_pass(model, progress(text, f"{name}: {', '.join(started)}"), started))
    second = {"removal": removal, "permutation": permutation}
    started = {metric: f.start(model) for metric, f in second.items() if wants(metric)}
    if wants("usefulness"):
        started["usefulness"] = replacement.start(model, maps=result.pop("maps"))
    if started:
        result.update(one_pass(model, progress(text, f"{name}: {', '.join(started)}"), started))
    if wants("gradients"):
        result["gradients"] = gradients(model, progress(text, f"{name}: gradients"))
    if wants("weights"):
        result["weights"] = weights(model)
    if wants("jacobian"):
        some = batches(settings.jacobian_tokens, 1)
        result["jacobian"] = jacobian(model, progress(some, f"{name}: jacobian"), layers, settings.own_token)
        result["jacobian"]["tokens"] = sum(idx.numel() for idx, _ in some)
    if settings.choices:
        if not checkpoint["tokenizer"]:
            raise UserError(f"the data of {out_dir} named no tokenizer: its tokens have no text")
        encoding = prepare_data.build_encoding(checkpoint["tokenizer"])
        result["choices"] = multiple_choice(model, read_questions(settings.choices), encoding)
    return result


def columns(result):
    """(group, title, values, log) of everything that a run has one number a layer of: values (L + 1), the embedding's
    output first (nan where it has none), log whether it spans orders of magnitude. Tables and figures show these."""
    L, nan = result["run"]["n_layer"], torch.tensor([math.nan], dtype=torch.float64)

    def by_layer(values):
        return torch.cat((nan, torch.as_tensor(values).double().cpu()))

    if r := result.get("stream"):
        for title, key in (("variance", "variance"), ("mean |x|", "magnitude"), ("largest |x|", "largest")):
            yield "stream", title, r[key].cpu(), True
        yield "stream", "kurtosis", r["kurtosis"].cpu(), True
        for title, key in (("attention", "attn"), ("MLP", "mlp")):
            yield "stream", f"{title} variance", by_layer(r[f"{key}_variance"]), True
    if r := result.get("gradients"):
        yield "parameters", "gradient norm", by_layer(r["norm"]), True
        yield "parameters", "gradient variance", by_layer(r["variance"]), True
    if r := result.get("weights"):
        yield "parameters", "attention weights", by_layer(r["attn_norm"]), False
        yield "parameters", "MLP weights", by_layer(r["mlp_norm"]), False
        if "gates" in r:
            yield "parameters", "gate a", by_layer(r["gates"].mean(1)), False
            yield "parameters", "1 - act(a)", by_layer(r["gate_scale"].mean(1)), False
        for title, key in (("attention out gain", "attn_out_gain"), ("MLP out gain", "mlp_out_gain")):
            if not r[key].isnan().all():
                yield "parameters", title, by_layer(r[key]), False
    if r := result.get("removal"):
        yield "importance", "loss drop", by_layer(r["loss_drop"]), False
        yield "importance", "perplexity drop", by_layer(r["perplexity_drop"]), False
        yield "importance", "causal effect", by_layer(r["causal"].nanmean(1)), False
    if r := result.get("permutation"):
        yield "importance", "mean swap", by_layer(r["matrix"].sum(1) / max(1, L - 1)), False
    if r := result.get("usefulness"):
        yield "importance", "affine loss ratio", by_layer(r["ratio"]), False
    if "angular" in result:
        yield "importance", "angle to next", by_layer(result["angular"][:, 0]), False
    if r := result.get("choices"):
        yield "importance", "accuracy drop", by_layer(r["score_drop"]), False
    if r := result.get("jacobian"):
        titles = {"deviation": "|J - I|", "deviation_per_d": "|J - I| / d", "off_diagonal": "off-diagonal"}
        titles["off_diagonal_rms"] = "off-diagonal rms"
        titles.update(diagonal_mean="diagonal mean", diagonal_std="diagonal std", spectral_norm="spectral norm")
        for key, title in titles.items():
            values = torch.full((L + 1,), math.nan, dtype=torch.float64)
            values[r["layers"]] = r[key].cpu()
            yield "jacobian", title, values, False
    if r := result.get("attention"):
        for e, values in zip(ATTENTION_THRESHOLDS, r["causal_sparsity"].mean(2)):
            yield "attention", f"share < {e:g}", by_layer(values), False
        for e, values in zip(ATTENTION_THRESHOLDS, r["sparsity"].mean(2)):
            yield "attention", f"< {e:g} of T^2", by_layer(values), False
        yield "attention", "entropy", by_layer(r["entropy"].mean(1)), False
    if r := result.get("experts"):
        for title, key in (("dead experts", "dead"), ("router entropy", "entropy")):
            values = torch.full((L + 1,), math.nan, dtype=torch.float64)
            values[r["layers"]] = r[key].cpu()
            yield "experts", title, values, False


def summary(result):
    """{name: number or text} of a run as a whole, one line of the comparison."""
    line = {}
    if r := result.get("removal"):
        line.update({"loss": r["loss"], "perplexity": r["perplexity"]})
    if r := result.get("stream"):
        line["last variance"], line["largest |x|"] = r["variance"][-1].item(), r["top"][0].item()
        line["|x| > 65504"] = int(r["over_float16"].sum())
    if "angular" in result:
        line["mean angle to next"] = result["angular"][:, 0].mean().item()
    if r := result.get("gradients"):
        line["last layer's gradient"] = r["norm"][-1].item()
    if r := result.get("weights"):
        for e, share in zip(WEIGHT_THRESHOLDS, r["sparsity_matrices"].tolist()):
            line[f"matrices |w| < {e:g}"] = share
        for e, share in zip(WEIGHT_THRESHOLDS, r["sparsity_all"].tolist()):
            line[f"parameters |w| < {e:g}"] = share
    if r := result.get("removal"):
        line["causal score"], line["causal / sqrt(L)"] = r["causal_score"], r["causal_score_normalized"]
    if r := result.get("permutation"):
        line["permutation score"] = r["score"]
    if r := result.get("usefulness"):
        line["usefulness score"], line["effective/wasted"] = r["score"], f"{r['effective']}/{r['wasted']}"
    if r := result.get("jacobian"):
        line["mean |J - I|"] = r["deviation"].mean().item()
    if r := result.get("attention"):
        for e, share in zip(ATTENTION_THRESHOLDS, r["causal_sparsity"].mean((1, 2)).tolist()):
            line[f"attention < {e:g}"] = share
        for e, share in zip(ATTENTION_THRESHOLDS, r["sparsity"].mean((1, 2)).tolist()):
            line[f"attention < {e:g}, of T^2"] = share
        line["attention entropy"] = r["entropy"].mean().item()
    if r := result.get("experts"):
        line["dead experts"], line["router entropy"] = r["dead"].mean().item(), r["entropy"].mean().item()
    if r := result.get("choices"):
        line["accuracy"] = r["accuracy"]
    return line


def show(value):
    """A cell of a table: four digits, a dash for what there is not."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def print_table(head, rows):
    """Rows of cells (strings) under a head, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
    print()


def print_run(result):
    """A table a group of measures, one row a layer."""
    groups = {}
    for group, title, values, _ in columns(result):
        groups.setdefault(group, []).append((title, values.tolist()))
    for group, found in groups.items():
        layers = range(0 if group == "stream" else 1, result["run"]["n_layer"] + 1)
        rows = [[str(l or "embedding"), *(show(values[l]) for _, values in found)] for l in layers]
        print(f"\n{group}")
        print_table(["layer", *(title for title, _ in found)], rows)


def print_summary(results):
    """The runs' whole-model numbers, a column a run."""
    lines = {name: summary(result) for name, result in results.items()}
    for name, ratios in weight_ratios(results).items():
        for part, title in (("attn", "attention"), ("mlp", "MLP")):
            lines[name][f"{title} weights / first run's"] = ratios[part].mean().item()
    names = list(dict.fromkeys(key for line in lines.values() for key in line))
    if names:
        print_table(["", *lines], [[key, *(show(line.get(key, math.nan)) for line in lines.values())] for key in names])


def weight_ratios(results):
    """{run: {"attn", "mlp"}: (L) ratio of its weight norms to the first run's} (GPAS Figure 6), where depths agree."""
    (first, base), *others = results.items()
    ratios = {}
    for name, result in others:
        if "weights" in result and result["run"]["n_layer"] == base["run"]["n_layer"]:
            keys = {"attn": "attn_norm", "mlp": "mlp_norm"}
            ratios[name] = {part: (result["weights"][k] / base["weights"][k]).cpu() for part, k in keys.items()}
    return ratios


IMAGES = "maps", "matrices"  # too large for text: they are in the figures


def plain(value):
    """`value` for JSON: tensors as lists, what is not a number (or not finite) as null, IMAGES left out."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in IMAGES}
    if torch.is_tensor(value):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def load_pyplot(asked):
    """matplotlib's pyplot, drawing to files; without matplotlib None, or UserError if figures were asked for."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        return plt
    except ImportError:
        if asked:
            raise UserError("figures need matplotlib: pip install matplotlib") from None


class Figures:
    """Writes figures of results {run name: result} to a folder with `plt` (load_pyplot); `names` lists the files."""

    def __init__(self, results, folder, plt):
        self.results, self.folder, self.plt, self.names = results, folder, plt, []
        few = plt.get_cmap("tab10").colors
        many = plt.get_cmap("viridis")
        self.colors = {n: few[i] if len(results) <= 10 else many(i / len(results)) for i, n in enumerate(results)}

    def grid(self, n, n_columns=3, width=3.6, height=2.6):
        """A figure of n axes in rows of n_columns."""
        n_rows, n_columns = math.ceil(n / n_columns), min(n, n_columns)
        size = width * n_columns, height * n_rows + 0.5
        fig, axes = self.plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
        for axis in axes.flat[n:]:
            axis.remove()
        return fig, axes.flat[:n]

    def save(self, fig, name, title):
        fig.suptitle(title, fontsize=10)
        fig.savefig(self.folder / name, dpi=110)
        self.plt.close(fig)
        self.names.append(name)

    def label(self, axis, xlabel, ylabel):
        axis.set_xlabel(xlabel, fontsize=8)
        axis.set_ylabel(ylabel, fontsize=8)
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)

    def legend(self, fig, axes):
        """One legend for all axes, below them, where there are several lines."""
        handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels())}
        if len(handles) > 1:
            ncols = min(4, len(handles))
            fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, fontsize=8)

    def by_layer(self):
        """For each group of measures a figure of one number a layer, the runs over each other."""
        groups = {}  # {group: {title: [(run, values, log)]}}
        for name, result in self.results.items():
            for group, title, values, log in columns(result):
                groups.setdefault(group, {}).setdefault(title, []).append((name, values, log))
        ratios = weight_ratios(self.results)
        base = next(iter(self.results))
        for name, parts in ratios.items():
            for part, title in (("attn", "attention"), ("mlp", "MLP")):
                values = torch.cat((torch.tensor([math.nan]), parts[part]))
                groups["parameters"].setdefault(f"{title} weights / {base}'s", []).append((name, values, False))
        for group, panels in groups.items():
            fig, axes = self.grid(len(panels))
            for axis, (title, lines) in zip(axes, panels.items()):
                for name, values, _ in lines:
                    where = values.isfinite().nonzero().flatten()
                    axis.plot(where, values[where], ".-", ms=4, lw=1.2, color=self.colors[name], label=name)
                if title == "largest |x|":
                    axis.axhline(FLOAT16_MAX, color="black", lw=0.8, ls="--", label="float16's largest, 65504")
                low, high = axis.dataLim.intervaly
                if lines[0][2] and low > 0 and high > 10 * low:
                    axis.set_yscale("log")
                if title == "affine loss ratio":
                    axis.axhline(1.1, color="black", lw=0.8, ls="--", label="useful above 1.1")
                self.label(axis, "layer (0: embedding)" if group == "stream" else "layer", UNITS.get(title, title))
                axis.xaxis.get_major_locator().set_params(integer=True)
            self.legend(fig, axes)
            self.save(fig, f"{group}.png", FIGURE_TITLES[group])

    def image(self, axis, matrix, title, xlabel, ylabel, **options):
        """A heat map of (rows, columns), both numbered from 1."""
        n, m = matrix.shape
        extent = (0.5, m + 0.5, n + 0.5, 0.5)
        drawn = axis.imshow(matrix.cpu(), extent=extent, aspect="auto", interpolation="nearest", **options)
        axis.set_title(title, fontsize=8)
        self.label(axis, xlabel, ylabel)
        axis.grid(False)
        for side in (axis.xaxis, axis.yaxis):
            side.get_major_locator().set_params(integer=True)
        return drawn

    def matrices(self):
        """The layer by layer matrices, a map a run on one scale."""
        kinds = [
            ("angular", "angular distance d(l, n), in units of pi", ("layer l", "n layers on"), lambda r: r.mT),
            ("removal", "causal effect C(s, l)", ("later layer l", "skipped layer s"), lambda r: r["causal"]),
            ("permutation", "|change of the loss by a swap| / loss", ("layer", "layer"), lambda r: r["matrix"]),
            ("experts", "share of the router's choices", ("expert", "layer with experts"), lambda r: r["load"]),
        ]
        for key, title, labels, get in kinds:
            found = {name: get(result[key]) for name, result in self.results.items() if key in result}
            if not found:
                continue
            highest = max(m[m.isfinite()].max().item() if m.isfinite().any() else 1.0 for m in found.values())
            fig, axes = self.grid(len(found), height=3.1)
            for axis, (name, matrix) in zip(axes, found.items()):
                drawn = self.image(axis, matrix, name, *labels, vmin=0, vmax=highest)
            fig.colorbar(drawn, ax=list(axes), fraction=0.05)
            self.save(fig, f"{key}_map.png", title)

    def jacobians(self):
        """|J|^0.3 of up to four layers a run (Sparsity Figure 12)."""
        found = {name: result["jacobian"] for name, result in self.results.items() if "jacobian" in result}
        if not found:
            return
        shown = {name: spread(len(r["layers"]), 4) for name, r in found.items()}
        n_columns = max(map(len, shown.values()))
        size = 2.9 * n_columns, 2.8 * len(found) + 0.5
        fig, axes = self.plt.subplots(len(found), n_columns, figsize=size, squeeze=False, layout="constrained")
        for row, (name, r) in zip(axes, found.items()):
            for axis in row[len(shown[name]) :]:
                axis.remove()
            for axis, i in zip(row, shown[name]):
                title = f"{name}, layer {int(r['layers'][i])}"
                J, labels = r["matrices"][i].abs() ** 0.3, ("input dimension", "output dimension")
                drawn = self.image(axis, J, title, *labels, vmin=0, vmax=1)
        fig.colorbar(drawn, ax=axes.ravel().tolist(), fraction=0.03, extend="max")
        self.save(fig, "jacobian_maps.png", "Jacobian, |J|^0.3")

    def attention_maps(self):
        """A^0.2 of up to four layers by up to four heads, a file a run (Sparsity Figure 6)."""
        for name, result in self.results.items():
            if "attention" not in result:
                continue
            maps = result["attention"]["maps"]
            layers, heads = spread(maps.shape[0], 4), spread(maps.shape[1], 4)
            fig, axes = self.grid(len(layers) * len(heads), len(heads), 2.4, 2.3)
            for axis, (l, h) in zip(axes, ((l, h) for l in layers for h in heads)):
                title = f"layer {l + 1}, head {h + 1}"
                A, labels = maps[l, h] ** 0.2, ("key position", "query position")
                drawn = self.image(axis, A, title, *labels, vmin=0, vmax=1)
            fig.colorbar(drawn, ax=list(axes), fraction=0.03)
            file = "attention_maps.png" if len(self.results) == 1 else f"attention_maps_{name.replace('/', '_')}.png"
            self.save(fig, file, f"{name}: attention weights A, (mean over sequences)^0.2")

    def dynamics(self):
        """Loss, variances, gates and gradients over training, from the logs: a line a run, and for a single run a line
        a layer."""
        logs = {name: read_log(Path(result["run"]["out_dir"]) / "log.jsonl") for name, result in self.results.items()}
        single = len(logs) == 1
        panels = [("loss", "training loss, nats"), ("val_loss", "held-out loss, nats"), ("grad_norm", "gradient norm")]
        layered = [("variance", "variance"), ("attn_variance", "attention variance"), ("mlp_variance", "MLP variance")]
        layered += [("largest", "largest |x|"), ("grad_norms", "gradient norm"), ("grad_variance", "gradient variance")]
        layered += [("gates", "gate a")]
        for key, title in layered:
            panels.append((key, f"{title}, {'each layer' if single else 'mean' if key == 'gates' else 'last layer'}"))
        panels = [(k, t) for k, t in panels if any(k in r for log in logs.values() for r in log)]
        if not panels:
            return
        fig, axes = self.grid(len(panels))
        for axis, (key, title) in zip(axes, panels):
            for name, log in logs.items():
                steps = [r["step"] for r in log if key in r]
                values = torch.tensor([r[key] for r in log if key in r], dtype=torch.float64)
                if not steps:
                    continue
                if values.dim() == 3:  # a gate for each sub-layer
                    values = values.mean(2)
                if values.dim() == 2 and single:
                    depth = self.plt.get_cmap("viridis")
                    for l, line in enumerate(values.T):
                        axis.plot(steps, line, color=depth(l / max(1, values.shape[1] - 1)), lw=1)
                else:
                    line = values if values.dim() == 1 else values.mean(1) if key == "gates" else values[:, -1]
                    axis.plot(steps, line, color=self.colors[name], lw=1.2, label=name)
                if key == "grad_norm" or (key in dict(layered) and key != "gates"):
                    axis.set_yscale("log")
            self.label(axis, "step", title)
        if single:
            L = next(iter(self.results.values()))["run"]["n_layer"]
            scale = self.plt.cm.ScalarMappable(self.plt.Normalize(1, L), "viridis")
            bar = fig.colorbar(scale, ax=list(axes), fraction=0.03)
            bar.set_label("layer", fontsize=8)
            bar.ax.yaxis.get_major_locator().set_params(integer=True)
        else:
            self.legend(fig, axes)
        self.save(fig, "dynamics.png", "training")


FIGURE_TITLES = {
    "stream": "residual stream and branches, held-out text",
    "parameters": "gradients and weights",
    "importance": "what each layer is worth",
    "jacobian": "each layer's Jacobian J, token average",
    "attention": "attention weights, mean over heads",
    "experts": "experts",
}
# Labels of axes that say more than a column's head has room for.
UNITS = {
    "kurtosis": "kurtosis (3: Gaussian)",
    "loss drop": "loss without the layer - loss, nats",
    "perplexity drop": "perplexity without the layer - perplexity",
    "causal effect": "mean causal effect on later layers",
    "mean swap": "mean |loss change| / loss of its swaps",
    "affine loss ratio": "loss with an affine map instead / loss",
    "angle to next": "angular distance to the next state / pi",
    "accuracy drop": "accuracy - accuracy without the layer",
    **{f"share < {e:g}": f"share < {e:g} of the causal entries" for e in ATTENTION_THRESHOLDS},
    **{f"< {e:g} of T^2": f"share < {e:g} of all T^2 entries" for e in ATTENTION_THRESHOLDS},
    "entropy": "entropy, nats",
    "router entropy": "router entropy, nats",
}


def spread(n, most):
    """At most `most` indices of range(n), evenly spaced, the first and the last included."""
    return list(range(n)) if n <= most else [round(i * (n - 1) / (most - 1)) for i in range(most)]


# ---------------------------------------------------------------------------------------------------------------------
# The program


def main():
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    settings = configure(Settings, "Measures what the layers of trained models do.", positional="out_dirs")
    # what can go wrong goes wrong before the long part, what the user wrote before what is not installed
    try:
        device = find_device(settings.device)
        torch.empty(1, device=device, dtype=torch.float64).item()
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"device {settings.device!r} cannot be used: {str(error).splitlines()[0][:200]}") from None
    if settings.choices:
        read_questions(settings.choices)
    for out_dir in settings.out_dirs:
        find_data(settings, load_run(out_dir)[1], speaks=True)
        read_log(Path(out_dir) / "log.jsonl")
    plt = load_pyplot(settings.figures) if settings.figures is not False else None
    is_single = len(settings.out_dirs) == 1
    folder = Path(settings.analysis_dir or (settings.out_dirs[0] if is_single else "analysis"))
    folder.mkdir(parents=True, exist_ok=True)

    names = [Path(out_dir).name for out_dir in settings.out_dirs]
    names = settings.out_dirs if len(set(names)) < len(names) else names
    results = {}
    for name, out_dir in zip(names, settings.out_dirs):
        results[name] = analyze_run(out_dir, settings, device)
        print_run(results[name])
    print_summary(results)
    content = results[names[0]] if is_single else {"runs": results, "weight_norm_ratio": weight_ratios(results)}
    save_whole(folder / "analysis.json", lambda file: file.write(json.dumps(plain(content)).encode() + b"\n"))
    print(f"wrote {folder}/analysis.json")
    if plt:
        figures = Figures(results, folder, plt)
        for draw in (figures.by_layer, figures.matrices, figures.jacobians, figures.attention_maps, figures.dynamics):
            draw()
        print(f"and {', '.join(figures.names)}")
    elif settings.figures is None:
        print("no figures: they need matplotlib (pip install matplotlib)")


if __name__ == "__main__":
    run(main)
