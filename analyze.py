"""What a run's layers do: `python analyze.py out-gpas_pre` measures a checkpoint on held-out text.

    python analyze.py out-pre out-gpas_pre out-lns             several runs side by side
    python analyze.py out-pre --metrics=stream,jacobian        some of the measures
    python analyze.py out-pre --choices=questions.jsonl        accuracy, and what each layer's removal costs of it
    python analyze.py --help                                   every setting

prints tables and writes analysis.json and, with matplotlib, figures. Each measure is a function that a notebook can call:

    import analyze
    model, _ = analyze.load_run("out-pre")
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
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import prepare_data
from configurator import UserError, configure, run
from model import GPT, GPTConfig, gate_scale
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
    metrics: str = "all"  # measures, with commas between; all, or from: METRIC_NAMES
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
        if len(set(self.out_dirs)) < len(self.out_dirs):
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
    modules      {"attn": L outputs of the attention, "mlp": L of the MLP}, each (B, T, n_embd)
    branches     the same where they are added to the stream: after the norm B and what else scales the branch
    attention    L of (q, k, mask): queries and keys as their product gets them, after norm and rotation, (B, n_head, T,
                 head_dim) and (B, n_kv_head, T, head_dim); mask is None for the causal one
    mlp_inputs   L inputs of the MLP (B, T, n_embd)
    """

    def __init__(self, model, idx, targets):
        self.model, self.targets = model, targets
        self.modules, self.branches = {"attn": [], "mlp": []}, {"attn": [], "mlp": []}
        self.attention, self.mlp_inputs, hooks = [], [], []
        for block in model.blocks:
            for name, scale in zip(("attn", "mlp"), sublayer_scales(block)):
                hooks += self.watch(name, getattr(block, name), getattr(block, f"{name}_residual"), scale)
            hooks.append(block.mlp.register_forward_pre_hook(lambda _, args: self.mlp_inputs.append(args[0])))
        x = model.embed_norm(model.embed_tokens(idx))
        self.states = [x]
        with RecordAttention(self.attention):
            for block in model.blocks:
                x = block(x)
                self.states.append(x)
        for hook in hooks:
            hook.remove()

    def watch(self, name, module, residual, scale):
        """Hooks that note the output of a sub-layer, and the branch after the norm B."""

        def note_branch(_, __, h):
            self.branches[name].append(residual.gpas_at("module", residual.s_at("branch", h), scale))

        yield module.register_forward_hook(lambda _, __, out: self.modules[name].append(out))
        yield residual.out_norm.register_forward_hook(note_branch)

    @functools.cached_property
    def loss(self):
        """Sum of the unchanged model's loss over the batch's targets."""
        return loss_sum(self.model, self.states[-1], self.targets)

    @functools.cached_property
    def n_targets(self):
        return (self.targets != -100).sum().item()


class RecordAttention(TorchFunctionMode):
    """Notes (q, k, mask) of every call of scaled_dot_product_attention in `calls`."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls.append((*args[:2], kwargs.get("attn_mask")))
        return func(*args, **kwargs)


def sublayer_scales(block):
    """1 - act(a) of a block's attention and MLP; (None, None) without gates."""
    if block.gate is None:
        return None, None
    scale = gate_scale(block.gate, block.gpas_act)
    return scale[:1], scale[-1:]


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
    None, and returns the result. Alone it makes a pass of its own; `one_pass` feeds several from the same traces."""

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
        for generator in started.values():
            next(generator)
        for idx, targets in batches:
            trace = Trace(model, idx, targets)
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
    while trace := (yield):
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
            parts[f"{name}_variance"] += torch.stack([token_variance(h) for h in trace.branches[name]])
            parts[f"{name}_module_variance"] += torch.stack([token_variance(h) for h in trace.modules[name]])
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
    """Sum over tokens of the variance over the dimensions (1/d) of x (B, T, d)."""
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
    while trace := (yield):
        B, T = trace.targets.shape
        P = min(T, map_size)
        maps = maps if maps is not None else zeros(model, L, H, P, P).float()
        for l, (q, k, mask) in enumerate(trace.attention):
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
    layers = [l for l, block in enumerate(model.blocks, 1) if hasattr(block.mlp, "router")]
    if not layers:
        raise UserError("experts: this model has none")
    k, E = model.config.n_expert_active, model.config.n_expert
    chosen, entropy, n = zeros(model, len(layers), E), zeros(model, len(layers)), 0
    while trace := (yield):
        for i, l in enumerate(layers):
            p = model.blocks[l - 1].mlp.router(trace.mlp_inputs[l - 1]).float().softmax(-1).flatten(0, 1)
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

    attn_norm, mlp_norm          (L)     Frobenius norm of all matrices of the attention, of the MLP (GPAS Figure 6 shows
                                         the ratio of two runs' norms)
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
    matrices        (M, d, d)  J = 1/N sum_t sum_t' dy_t' / dx_t over the N tokens, t and t' of one sequence: the mean over
                               input tokens, cross-token terms included (Sparsity's published code). With own_token only
                               t' = t: the mean of dy_t / dx_t
    deviation       (M)        |J - I|_F (Sparsity Figure 2b), and deviation_per_d, divided by d
    off_diagonal    (M)        Frobenius norm without the diagonal, and off_diagonal_rms, divided by sqrt(d^2 - d)
    diagonal_mean, diagonal_std (M)   over the d diagonal elements, std with 1/d
    spectral_norm   (M)        largest singular value

    By reverse mode, `rows` rows of J at a time: J is what backpropagation sees. GPAS stops a gradient, so that J then is
    not the derivative of the forward function: on the stream its gate does not scale J.
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
    loss_drop         (L)     loss(without l) - loss: positive when the layer matters (LNS section 3, "performance drop")
    perplexity_drop   (L)     the same of exp(loss)
    causal            (L, L)  C(s, l) at [s - 1, l - 1] for l > s, nan elsewhere (Sparsity Eq. 5):
                              |(x_{l+1} - x_l) - (x'_{l+1} - x'_l)| / |x_{l+1} - x_l|, x' the states when s is skipped, as
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
    useful      (L)    bool: ratio > 1.1, effective and not wasted
    effective, wasted  how many layers are and are not
    score       float  effective / L

    Two passes over `batches` (a list): one fits, one measures. Sparsity's published script installs the fitted matrix
    transposed in nn.Linear, which makes every layer look useful. Warns with fewer than 4 d tokens, UserError under d + 1.
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
    acc_norm of EleutherAI's harness, with its tokenization (of prompt and choice as one text) and its cut of the left
    end where they exceed the block size. An empty prompt is the start of a document.
    """
    rows, block_size = [], model.config.block_size
    for q in questions:
        for choice in q["choices"]:
            before = prepare_data.encode(encoding, q["prompt"]).tolist()
            after = prepare_data.encode(encoding, q["prompt"] + " " + choice).tolist()[len(before) :]
            if len(after) > block_size:
                raise UserError(f"choice {choice[:40]!r} has {len(after)} tokens, more than the block size {block_size}")
            ids = torch.tensor(((before or [encoding.eot_token]) + after)[-(block_size + 1) :])
            targets = ids[1:].clone()
            targets[: -len(after)] = -100
            rows.append((ids[:-1], targets))
    L, device = len(model.blocks), model.lm_head.weight.device
    likelihood = []  # of each row: with all layers, then without layer 1, 2 ...
    with evaluation(model):
        for first in range(0, len(rows), batch_size):
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
