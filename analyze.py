"""What the layers of a trained model do: `python analyze.py out-gpas_pre` measures a run's checkpoint on held-out text.

    python analyze.py out-pre out-gpas_pre out-lns             several runs side by side
    python analyze.py out-pre/ckpt_[0-9]*.pt                   stages of one run (train.py --keep_every)
    python analyze.py out-pre --metrics=stream,jacobian        some of the measures
    python analyze.py out-pre --choices=questions.jsonl        accuracy, and what each layer's removal costs of it
    python analyze.py out-sweep --baseline=pre                 the runs of a sweep: means over seeds, differences
    python analyze.py --help                                   every measure and every setting

prints tables and writes analysis.json (of a sweep: sweep.md and sweep.json) and, with matplotlib, figures. Each measure
is a function for a notebook too:

    import analyze
    model, _ = analyze.load_run("out-pre")
    batches = analyze.load_batches("data/stdlib", model.config, tokens=2048, batch_size=8)
    analyze.removal(model, batches)["causal"]          batches: a list of (idx, targets), int64 tensors (B, T)

A measure is a row of the table MEASURES, which says what computes it and what of the result is shown. Most are classes:
they share one pass over the text, in which `update` gets the Trace of each batch; at the end comes `result`. A measure
that makes passes of its own is a function of the model and the batches. To add one, write for example this below the
other measures

    class RelativeUpdate:
        '''(L) mean over tokens of |x_{l+1} - x_l| / |x_l|: by how much layer l changes the stream.'''

        def __init__(self, model):
            self.total, self.n = zeros(model, len(model.blocks)), 0

        def update(self, trace):
            x = torch.stack(trace.states).double()
            self.total += ((x[1:] - x[:-1]).norm(dim=-1) / x[:-1].norm(dim=-1)).sum((1, 2))
            self.n += trace.n_tokens

        def result(self):
            return self.total / self.n

and this row into the table. `--metrics=update` then puts it into the tables, analysis.json and importance.png:

    "update": Measure("size of each layer's update", RelativeUpdate, "importance", lambda r: {"update": r}),

Layers are l = 1..L; x_l (B, T, n_embd) is the residual state that layer l gets, x_1 the embedding's output (normalized,
where the model does so), x_{L+1} the last layer's output, before the final norm. Tensors with a layer dimension hold
layer l at index l - 1; those over residual states (L + 1) hold x_1 first. "Tokens" are all positions of all batches.
Losses are cross-entropies in nats in evaluation mode, without router terms. Papers are cited as in model.py.
"""

import functools
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention  # torch's own, also while another stands in for it
from torch.nn.utils.rnn import pad_sequence

import prepare_data
from configurator import COUNT, UserError, configure, progress, read_log, run, save_whole
from model import GPT, Block, GPTConfig, find_device, gate_scale, load_checkpoint
from prepare_data import TokenData


@dataclass
class Settings:
    out_dirs: list[str] = field(default_factory=list)  # folders of runs, or their .pt files; also without --out_dirs
    metrics: str = "all"  # all (of a sweep: none), or some of the measures above: stream,jacobian
    analysis_dir: str | None = None  # where analysis.json and figures go; none: the run's folder, analysis for several
    figures: bool | None = None  # draw them; none: where matplotlib is installed
    # what is measured
    tokens: COUNT = 16384  # held-out tokens
    jacobian_tokens: COUNT = 1024  # of them, for the Jacobians and end_to_end; at most `tokens`
    layers: str = "all"  # whose Jacobians: numbers from 1, with commas between, or all
    own_token: bool = False  # Jacobian of each token's output by the same token's input, without cross-token terms
    choices: str | None = None  # a jsonl of multiple-choice questions: prompt, choices, answer
    baseline: str | None = None  # a sweep: value of its first setting to compare with; none: pre, or the first
    # data
    dataset: str | None = None  # a folder in data_dir, or a path; none: the run's
    data_dir: str | None = None  # where data sets are; none: the run's
    block_size: COUNT | None = None  # tokens of a sequence; none: the model's
    # machine
    batch_size: COUNT = 8  # sequences at once
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1 ...

    def __post_init__(self):
        if not self.out_dirs:
            raise ValueError("which run? python analyze.py OUT_DIR [OUT_DIR ...]")
        if len({Path(out_dir).resolve() for out_dir in self.out_dirs}) < len(self.out_dirs):
            raise ValueError("the same run is given twice")
        unknown = [name for name in self.names() if name not in MEASURES]
        if unknown:
            raise ValueError(f"unknown metrics {unknown[0]!r}; known: {', '.join(MEASURES)}, or all by itself")
        if "choices" in self.names() and not self.choices:
            raise ValueError("metrics=choices needs a file of questions: --choices=FILE.jsonl")
        if self.choices and "choices" not in self.names():
            raise ValueError(f"choices={self.choices} has no effect with metrics={self.metrics}")
        if self.layers != "all" and not all(part.isdecimal() and int(part) for part in self.layers.split(",")):
            raise ValueError(f"layers is {self.layers!r}; it must be all, or numbers from 1 with commas between")

    def names(self):
        """The names of the measures that are asked for; all leaves choices out where there is no file of questions."""
        if self.metrics == "all":
            return [name for name in MEASURES if name != "choices" or self.choices]
        return list(dict.fromkeys(self.metrics.split(",")))


# ---------------------------------------------------------------------------------------------------------------------
# One pass over the text for all measures


class Trace:
    """What one batch idx, targets (B, T) does in the unchanged model: `states`, the L + 1 residual states x_1..x_{L+1},
    each (B, T, n_embd); `n_tokens` positions, of which `n_targets` have a target; and `inside` and `loss`, which are
    computed when they are first asked for."""

    def __init__(self, model, idx, targets):
        self.model, self.idx, self.targets = model, idx, targets
        self.n_tokens, self.n_targets = idx.numel(), (targets != -100).sum().item()
        self.states = [model.embed_norm(model.embed_tokens(idx))]
        for block in model.blocks:
            self.states.append(block(self.states[-1]))

    @functools.cached_property
    def inside(self):
        """For each layer what happens inside it: a list of L dicts of look_inside."""
        return [look_inside(block, x) for block, x in zip(self.model.blocks, self.states)]

    @functools.cached_property
    def loss(self):
        """Sum of the model's loss over the batch's targets."""
        return loss_sum(self.model, self.states[-1], self.targets)


@contextmanager
def evaluation(model):
    """Evaluation mode, and no gradients of parameters. Afterwards both are as they were before."""
    was_training, required = model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for p, r in zip(model.parameters(), required):
            p.requires_grad_(r)


@torch.no_grad()
def one_pass(model, batches, measures):
    """{name: result} of `measures`, {name: an object with update(trace) and result()}: each batch passes through the
    model once for all of them."""
    with evaluation(model):
        for idx, targets in batches:
            trace = Trace(model, idx, targets)
            for measure in measures.values():
                measure.update(trace)
    return {name: measure.result() for name, measure in measures.items()}


def as_function(measure):
    """A function (model, batches, **options) for notebooks: a pass over the batches for this measure alone."""

    def function(model, batches, **options):
        return one_pass(model, batches, {"alone": measure(model, **options)})["alone"]

    function.__doc__ = measure.__doc__
    return function


def look_inside(block, x):
    """What happens in block(x), x (B, T, n_embd), a dict. A block that was replaced by another function lacks entries.

    attn, mlp                what each sub-layer adds to the stream, (B, T, n_embd): after the norm B and the scales
    attn_module, mlp_module  the modules' own outputs, before B
    mlp_module_input         what the MLP gets
    attention                (q, k): queries and keys as their product gets them, after norm and rotation, (B, n_head,
                             T, head_dim) and (B, n_kv_head, T, head_dim)
    """
    seen, modules = {}, {}
    if isinstance(block, Block):
        modules = {"attn_module": block.attn, "attn": block.attn_residual.branch_out}
        modules |= {"mlp_module": block.mlp, "mlp": block.mlp_residual.branch_out}

    def note(name, _, inputs, output):
        seen[name], seen[f"{name}_input"] = output, inputs[0]

    def noted_attention(q, k, v, **options):
        seen["attention"] = q, k
        return scaled_dot_product_attention(q, k, v, **options)

    with ExitStack() as stack:  # takes the hooks away again
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", noted_attention))
        for name, module in modules.items():
            stack.enter_context(module.register_forward_hook(functools.partial(note, name)))
        block(x)
    return seen


def apply(blocks, x):
    """The residual state x (B, T, n_embd) after some blocks in turn."""
    for block in blocks:
        x = block(x)
    return x


def loss_sum(model, x, targets):
    """Sum over the targets of the cross-entropy in nats that the last residual state x leads to, a float64 scalar."""
    logits = model.lm_head(model.norm(x))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum").double()


def zeros(model, *shape):
    """A float64 tensor of zeros on the model's device, where sums over tokens are kept."""
    return torch.zeros(shape, dtype=torch.float64, device=model.lm_head.weight.device)


# ---------------------------------------------------------------------------------------------------------------------
# Stream and representation

FLOAT16_MAX = 65504.0
TOP = 100


class Stream:
    """Size and shape of the residual states, a dict:

    variance             (L + 1)  1/d sum_j (x_j - mean_j x)^2 of a token, mean over tokens (Sparsity Eq. 4); 1/d, where
                                  torch.var has 1/(d - 1)
    magnitude            (L + 1)  mean |x| over tokens and dimensions (Peri-LN Figure 6)
    attn_variance        (L)      the variance of what the attention adds to the stream: after the norm B and the scales
    mlp_variance         (L)      the same of the MLP
    attn_module_variance (L)      the variance of the attention's own output, before B and the scales
    mlp_module_variance  (L)      the same of the MLP
    kurtosis             (L + 1)  mean over dimensions of kurtosis_per_dim (Sparsity Eq. 20)
    kurtosis_per_dim     (L + 1, d)  m4 / m2^2 with the central moments over tokens (Sparsity Eq. 19), without -3: a
                                  Gaussian has 3; nan for a dimension that does not vary, which the mean leaves out
    largest              (L + 1)  largest |x|
    over_float16         (L + 1)  how many |x| exceed float16's 65504
    top, top_state       (100)    the largest |x| of all tokens and states, descending (massive activations, Peri-LN
                                  Figure 11), and their state i, x_{i+1}
    """

    def __init__(self, model):
        L, d = len(model.blocks), model.config.n_embd
        self.variance, self.magnitude, self.largest, self.over_float16 = (zeros(model, L + 1) for _ in range(4))
        self.branches = {name: zeros(model, L) for name in ("attn", "mlp", "attn_module", "mlp_module")}
        self.powers, self.shift, self.n = zeros(model, 4, L + 1, d), None, 0  # powers: sums of (x - shift)^1..4
        self.top, self.top_state = zeros(model, 0), zeros(model, 0).long()

    def update(self, trace):
        if self.shift is None:  # a guess of the mean, so that the sums of powers do not cancel
            self.shift = [x.double().mean((0, 1)) for x in trace.states]
        for i, x in enumerate(trace.states):
            self.variance[i] += x.var(-1, correction=0).double().sum()
            size = x.abs()
            self.magnitude[i] += size.mean(-1).double().sum()
            self.over_float16[i] += (size > FLOAT16_MAX).sum()
            highest = size.flatten().topk(min(TOP, size.numel())).values.double()
            self.largest[i] = torch.maximum(self.largest[i], highest[0])
            self.top = torch.cat((self.top, highest))
            self.top_state = torch.cat((self.top_state, torch.full_like(highest, i).long()))
            y = x.double().flatten(0, 1) - self.shift[i]
            square = y * y
            for power, value in zip(self.powers, (y, square, square * y, square * square)):
                power[i] += value.sum(0)
        for name, total in self.branches.items():
            for i, layer in enumerate(trace.inside):
                total[i] += layer[name].var(-1, correction=0).double().sum() if name in layer else math.nan
        self.top, order = self.top.topk(min(TOP, len(self.top)))
        self.top_state = self.top_state[order]
        self.n += trace.n_tokens

    def result(self):
        # From the means of y^1..4, y = x - shift, to the central moments, the means of (y - m1)^2 and ^4.
        m1, p2, p3, p4 = self.powers / self.n
        m2 = p2 - m1**2
        m4 = p4 - 4 * m1 * p3 + 6 * m1**2 * p2 - 3 * m1**4
        kurtosis = torch.where(m2 > 1e-30, m4 / m2**2, math.nan)
        return {
            "variance": self.variance / self.n,
            "magnitude": self.magnitude / self.n,
            **{f"{name}_variance": total / self.n for name, total in self.branches.items()},
            "kurtosis": kurtosis.nanmean(-1),
            "kurtosis_per_dim": kurtosis,
            "largest": self.largest,
            "over_float16": self.over_float16.long(),
            "top": self.top,
            "top_state": self.top_state,
        }


class AngularDistance:
    """(L, L) with d(l, n) = arccos(cos(x_l, x_{l+n})) / pi at [l - 1, n - 1], mean over all tokens (LNS Eq. 1).

    0 for the same direction, 1/2 for orthogonal ones; nan where l + n > L + 1. x_{L+1} is the residual state before the
    final norm. LNS's published code takes each window's last token only and min-max scales its heat maps.
    """

    def __init__(self, model):
        L = len(model.blocks)
        self.total, self.n = zeros(model, L + 1, L + 1), 0

    def update(self, trace):
        u = F.normalize(torch.stack(trace.states, dim=2).double(), dim=-1).flatten(0, 1)  # (tokens, L + 1, d)
        self.total += (u @ u.mT).clamp(-1, 1).arccos().sum(0) / math.pi
        self.n += len(u)

    def result(self):
        L = len(self.total) - 1
        distance = torch.full_like(self.total[1:, 1:], math.nan)
        for l in range(L):
            distance[l, : L - l] = self.total[l, l + 1 :] / self.n
        return distance


# ---------------------------------------------------------------------------------------------------------------------
# Attention and experts

ATTENTION_THRESHOLDS = 1e-3, 1e-4, 1e-6


class Attention:
    """Sparsity and entropy of the attention weights A (T, T) of each head, a dict:

    causal_sparsity  (3, L, n_head)  share of A_ij < 1e-3, 1e-4, 1e-6 over the entries that are attended to (j <= i)
    sparsity         (3, L, n_head)  the same over all T^2 entries, the masked ones counting as 0 (Sparsity Eq. 15);
                                     its mean over layers and heads is Eq. 16
    entropy          (L, n_head)     -sum_j A_ij log A_ij in nats, 0 log 0 = 0, mean over queries i and sequences
    maps             (L, n_head, P, P)  A averaged over sequences, its first P = min(T, map_size) positions, T of the
                                     shortest (Sparsity Figure 6, which shows A^0.2); map_size is 256 unless given
    """

    def __init__(self, model, map_size=256):
        L, H = len(model.blocks), model.config.n_head
        self.below, self.entropy = zeros(model, 3, L, H), zeros(model, L, H)
        self.maps = zeros(model, L, H, map_size, map_size)
        self.lengths = []  # T of each sequence

    def update(self, trace):
        B, T = trace.targets.shape
        self.lengths += [T] * B
        self.maps = self.maps[..., :T, :T]  # the positions that all batches so far have
        P = self.maps.shape[-1]
        for l, layer in enumerate(trace.inside):
            if "attention" not in layer:
                self.below[:, l], self.entropy[l], self.maps[l] = math.nan, math.nan, math.nan
                continue
            q, k = layer["attention"]
            for b in range(B):
                A = attention_weights(q[b], k[b])  # (n_head, T, T)
                below = torch.stack([(A < e).sum((1, 2)) for e in ATTENTION_THRESHOLDS])
                self.below[:, l] += below - T * (T - 1) // 2  # without the masked ones, which are 0
                self.entropy[l] += torch.special.entr(A).sum((1, 2))
                self.maps[l] += A[:, :P, :P]

    def result(self):
        n_causal, n_all = sum(T * (T + 1) // 2 for T in self.lengths), sum(T**2 for T in self.lengths)
        return {
            "causal_sparsity": self.below / n_causal,
            "sparsity": (self.below + n_all - n_causal) / n_all,
            "entropy": self.entropy / sum(self.lengths),
            "maps": self.maps / len(self.lengths),
        }


def attention_weights(q, k):
    """softmax(q k^T / sqrt(head_dim)) over the keys up to each query, (..., n_head, T, T).

    q (..., n_head, T, head_dim); k has n_kv_head heads: query head h reads floor(h / (n_head / n_kv_head)).
    """
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    scores = hide_later_keys(q @ k.mT / math.sqrt(q.shape[-1]))
    return scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1)


def hide_later_keys(scores):
    """Attention scores (..., T, T) with -inf where the key comes after the query."""
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)


class Experts:
    """How the M layers with experts use them, a dict; UserError for a model without.

    layers   (M)     their numbers l
    load     (M, E)  share of the choices (n_expert_active a token) that go to each expert: 1/E if balanced
    dead     (M)     share of the experts that no token chose
    entropy  (M)     of the router's probabilities, softmax over all experts, in nats, mean over tokens: at most log E
    """

    def __init__(self, model):
        self.top_k = model.config.n_expert_active
        self.layers = [l for l, b in enumerate(model.blocks, 1) if hasattr(getattr(b, "mlp", None), "router")]
        if not self.layers:
            raise UserError("experts: this model has none")
        M, E = len(self.layers), model.config.n_expert
        self.chosen, self.entropy, self.n = zeros(model, M, E), zeros(model, M), 0

    def update(self, trace):
        for i, l in enumerate(self.layers):
            tokens = trace.inside[l - 1]["mlp_module_input"].flatten(0, 1)
            p = trace.model.blocks[l - 1].mlp.route(tokens).softmax(-1)
            self.chosen[i] += p.topk(self.top_k).indices.flatten().bincount(minlength=p.shape[1])
            self.entropy[i] += torch.special.entr(p).sum()
        self.n += trace.n_tokens

    def result(self):
        return {
            "layers": torch.tensor(self.layers),
            "load": self.chosen / (self.n * self.top_k),
            "dead": (self.chosen == 0).double().mean(-1),
            "entropy": self.entropy / self.n,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Gradients and weights


def gradients(model, batches):
    """The gradient g_l of the mean loss over the targets by the parameters of layer l (Peri-LN Figure 7), a dict:

    norm      (L)  |g_l|_2
    variance  (L)  of the elements of g_l, 1/n

    Peri-LN does not say how it pools a layer: here all of its parameters, gains and gate included, are one vector.
    """
    parameters = [p for block in model.blocks for p in block.parameters()]
    total, n = 0.0, 0
    with evaluation(model):
        model.blocks.requires_grad_(True)
        for idx, targets in batches:
            trace = Trace(model, idx, targets)
            # zeros for an expert that no token of the batch chose
            parts = torch.autograd.grad(trace.loss, parameters, materialize_grads=True)
            total = total + torch.cat([part.flatten() for part in parts])
            n += trace.n_targets
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    g = (total.double() / n).split(sizes)
    return {"norm": torch.stack([v.norm() for v in g]), "variance": torch.stack([v.var(correction=0) for v in g])}


WEIGHT_THRESHOLDS = 1e-1, 1e-2, 1e-4


@torch.no_grad()
def weights(model, batches=None):
    """What the parameters say by themselves, a dict (no text is needed):

    attn_norm, mlp_norm          (L)     Frobenius norm of all matrices of the attention, of the MLP; where several runs
                                         are compared, analyze_runs adds attn_norm_ratio and mlp_norm_ratio to each
                                         later one of as many layers: its norms over the first run's (GPAS Figure 6)
    gates, gate_scale            (L, 1)  gates a_l and 1 - act(a_l) (GPAS Figure 3); (L, 2) with one a sub-layer; absent
                                         without gates
    attn_out_gain, mlp_out_gain  (L)     mean gain of the norm B (Peri-LN Figure 9b); nan in layers without
    sparsity_matrices            (3)     share of |w| < 1e-1, 1e-2, 1e-4 over all matrices, embedding and head included
    sparsity_all                 (3)     the same over all parameters (Sparsity Eq. 14)
    """
    result, blocks = {}, model.blocks
    for name in ("attn", "mlp"):
        modules = [getattr(block, name) for block in blocks]
        norms = [torch.stack([p.double().norm() for p in m.parameters() if p.dim() >= 2]).norm() for m in modules]
        gains = [getattr(getattr(block, f"{name}_residual").out_norm, "weight", None) for block in blocks]
        result[f"{name}_norm"] = torch.stack(norms)
        result[f"{name}_out_gain"] = torch.tensor([math.nan if g is None else g.double().mean().item() for g in gains])
    if model.gates():
        result["gates"] = torch.stack(model.gates())
        result["gate_scale"] = gate_scale(result["gates"], model.config.gpas_act)
    for kind, least in (("matrices", 2), ("all", 0)):
        chosen = [p for p in model.parameters() if p.dim() >= least]
        count = [sum((p.abs() < e).sum().item() for p in chosen) for e in WEIGHT_THRESHOLDS]
        result[f"sparsity_{kind}"] = torch.tensor(count, dtype=torch.float64) / sum(p.numel() for p in chosen)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Layer importance
#
# The layers before a changed one give what they gave: everything here starts from the states of the unchanged model.
# Blocks are moved and left out whole, with their own constants (the s of LNS, the kind of Mix-LN's layer).


class Removal:
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

    def __init__(self, model):
        L = len(model.blocks)
        self.loss, self.removed, self.n = zeros(model), zeros(model, L), 0
        self.size, self.change = zeros(model, L), zeros(model, L, L)

    def update(self, trace):
        x, blocks = trace.states, trace.model.blocks
        L = len(blocks)
        added = [x[l + 1] - x[l] for l in range(L)]  # by each layer to the stream
        self.size += torch.stack([a.norm(dim=-1).double().sum() for a in added])
        for s in range(L):
            h = x[s]
            for l in range(s + 1, L):
                after = blocks[l](h)
                self.change[s, l] += (added[l] - (after - h)).norm(dim=-1).double().sum()
                h = after
            self.removed[s] += loss_sum(trace.model, h, trace.targets)
        self.loss += trace.loss
        self.n += trace.n_targets

    def result(self):
        L, loss, removed = len(self.removed), self.loss / self.n, self.removed / self.n
        C = torch.where(self.change == 0, 0.0, self.change / self.size)
        C.masked_fill_(torch.ones_like(C).tril().bool(), math.nan)
        score = sum(C[s, s + 1 :].mean().item() for s in range(L - 1)) / L
        return {
            "loss": loss.item(),
            "perplexity": loss.exp().item(),
            "loss_drop": removed - loss,
            "perplexity_drop": removed.exp() - loss.exp(),
            "causal": C,
            "causal_score": score,
            "causal_score_normalized": score / math.sqrt(L),
        }


class Permutation:
    """|loss(i and j swapped) - loss| / |loss| for every pair of layers (Sparsity Eq. 7), a dict:

    matrix  (L, L)  symmetric, the diagonal 0
    score   float   mean over the pairs i < j (Sparsity Eq. 8); 0 for a single layer
    """

    def __init__(self, model):
        L = len(model.blocks)
        self.loss, self.swapped = zeros(model), zeros(model, L, L)

    def update(self, trace):
        blocks = trace.model.blocks
        for i in range(len(blocks)):
            for j in range(i + 1, len(blocks)):
                order = [blocks[j], *blocks[i + 1 : j], blocks[i], *blocks[j + 1 :]]
                self.swapped[i, j] += loss_sum(trace.model, apply(order, trace.states[i]), trace.targets)
        self.loss += trace.loss

    def result(self):
        L = len(self.swapped)
        P = ((self.swapped - self.loss).abs() / self.loss.abs()).triu(1)
        return {"matrix": P + P.mT, "score": (P.sum() / max(1, L * (L - 1) / 2)).item()}


class Usefulness:
    """What the nonlinearity of each layer is worth: the loss with the block replaced by its least-squares affine map
    from its own inputs to its own outputs, the `maps` of affine_maps (Sparsity Eq. 9, 10), a dict:

    ratio       (L)    loss(l replaced) / loss
    loss_drop   (L)    loss(l replaced) - loss
    useful      (L)    bool: ratio > 1.1, 1 + alpha of Sparsity Eq. 10: effective and not wasted
    effective, wasted  how many layers are and are not
    score       float  effective / L

    The maps are fitted on the text that the loss is measured on, so that with few tokens the ratio comes out low.
    Sparsity's published script installs the fitted matrix transposed in nn.Linear, which makes its scores too high.
    """

    def __init__(self, model, maps):
        self.maps = maps
        self.loss, self.replaced, self.n = zeros(model), zeros(model, len(maps)), 0

    def update(self, trace):
        for l, (W, b) in enumerate(self.maps):
            h = apply(trace.model.blocks[l + 1 :], F.linear(trace.states[l], W, b))
            self.replaced[l] += loss_sum(trace.model, h, trace.targets)
        self.loss += trace.loss
        self.n += trace.n_targets

    def result(self):
        ratio = self.replaced / self.loss
        useful = ratio > 1.1
        effective = int(useful.sum())
        return {
            "ratio": ratio,
            "loss_drop": (self.replaced - self.loss) / self.n,
            "useful": useful,
            "effective": effective,
            "wasted": len(useful) - effective,
            "score": effective / len(useful),
        }


@torch.no_grad()
def affine_maps(model, batches):
    """L pairs (W (d, d), b (d)) with the least |x W^T + b - y|^2 over all tokens, y = block(x): as F.linear takes them.

    Normal equations in float64, summed batch by batch, so that memory does not grow with the tokens; where the inputs
    do not span all dimensions, a solution of least norm (of the dimensions scaled to equal size). Warns under 4 d
    tokens, UserError under d + 1.
    """
    L, d = len(model.blocks), model.config.n_embd
    xx, xy, n = zeros(model, L, d + 1, d + 1), zeros(model, L, d + 1, d), 0
    with evaluation(model):
        for idx, targets in batches:
            states = [x.double().flatten(0, 1) for x in Trace(model, idx, targets).states]
            for l in range(L):
                x = F.pad(states[l], (0, 1), value=1.0)  # (tokens, d + 1): the last dimension is the bias's
                xx[l] += x.mT @ x
                xy[l] += x.mT @ states[l + 1]
            n += idx.numel()
    if n < d + 1:
        raise UserError(f"usefulness: {n} tokens cannot fit a map of {d} dimensions and a bias; {d + 1} or more can")
    if n < 4 * d:
        warnings.warn(f"usefulness: {n} tokens are few to fit maps of {d} dimensions; {4 * d} or more are better")
    # D (D xx D)^+ D xy with D = diag(xx)^(-1/2), so that dimensions of any size weigh alike
    scale = xx.diagonal(dim1=1, dim2=2).clamp(min=1e-30).rsqrt().unsqueeze(2)
    inverse = torch.linalg.pinv(scale * xx * scale.mT, hermitian=True)
    maps = (scale * (inverse @ (scale * xy))).to(model.lm_head.weight.dtype)
    return [(m[:-1].mT.contiguous(), m[-1]) for m in maps]


def usefulness(model, batches):
    """The result of Usefulness, in two passes over `batches` (a list): one fits the affine maps, one replaces."""
    return as_function(Usefulness)(model, batches, maps=affine_maps(model, batches))


stream, angular_distance, attention = as_function(Stream), as_function(AngularDistance), as_function(Attention)
experts, removal, permutation = as_function(Experts), as_function(Removal), as_function(Permutation)


# ---------------------------------------------------------------------------------------------------------------------
# Jacobian


def jacobian(model, batches, layers=None, own_token=False, rows=16):
    """Jacobians of whole blocks y = block(x), a dict, with M = len(layers) (a list of numbers l, all by default):

    tokens          int        N, of all batches
    layers          (M)        their numbers l
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
    d, layers = model.config.n_embd, list(dict.fromkeys(layers or range(1, len(model.blocks) + 1)))
    if not set(layers) <= set(range(1, len(model.blocks) + 1)):
        raise UserError(f"layers are {','.join(map(str, layers))}; the model has layers 1 to {len(model.blocks)}")
    J, n = zeros(model, len(layers), d, d), 0
    function = own_token_attention if own_token else scaled_dot_product_attention
    # the fused kernels have no batched backward pass
    with evaluation(model), sdpa_kernel(SDPBackend.MATH), patch.object(F, "scaled_dot_product_attention", function):
        for idx, targets in batches:
            states = Trace(model, idx, targets).states
            for i, l in enumerate(layers):
                x = states[l - 1].requires_grad_()
                y = model.blocks[l - 1](x)
                for some in torch.arange(d, device=x.device).split(rows):
                    e = F.one_hot(some, d).to(y.dtype)[:, None, None].expand(-1, *y.shape)  # row j: e_j at each t'
                    grad = torch.autograd.grad(y, x, e, is_grads_batched=True, retain_graph=True)[0]
                    J[i, some] += grad.sum((1, 2)).double()
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
        "tokens": n,
    }


def own_token_attention(q, k, v, **_):
    """Attention with the same value, but backward a token's output reaches its own q, k and v only: the keys and values
    of other tokens are constants. Stands in for scaled_dot_product_attention, whose options it ignores."""
    k, v = (z.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for z in (k, v))
    own_score = (q.detach() * (k - k.detach())).sum(-1)  # 0, with the gradient of q_t k_t by k_t
    scores = (q @ k.detach().mT + torch.diag_embed(own_score)) / math.sqrt(q.shape[-1])
    A = hide_later_keys(scores).softmax(-1)
    own_weight = A.detach().diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return A @ v.detach() + own_weight * (v - v.detach())


def end_to_end(model, batches, n_iter=20):
    """|dx_{L+1} / dx_1|_2, the largest singular value of the Jacobian J of the last residual state by the first, over
    all positions of a sequence; a float, the mean over sequences. LNS Theorems 3.3 and 4.2, GPAS Theorem 1 and Sparsity
    Lemma 1 bound it. As in `jacobian`, J is what backpropagation sees.

    By power iteration with J^T J: J^T u is one backward pass, and J v the derivative of J^T u by u in the direction v.
    """
    norms = []
    with evaluation(model), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        for sequence in (row for idx, _ in batches for row in idx.split(1)):
            x = model.embed_norm(model.embed_tokens(sequence)).detach().requires_grad_()
            y = apply(model.blocks, x)
            u = torch.zeros_like(y).requires_grad_()
            JT_u = torch.autograd.grad(y, x, u, create_graph=True)[0]
            v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
            for _ in range(n_iter):
                J_v = torch.autograd.grad(JT_u, u, v / v.norm(), retain_graph=True)[0]
                v = torch.autograd.grad(y, x, J_v, retain_graph=True)[0]
            norms.append(J_v.norm().item())
    return sum(norms) / len(norms)


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice


@torch.no_grad()
def multiple_choice(model, questions, encoding):
    """Accuracy on multiple-choice questions, and what the removal of each layer costs (LNS section 2.1), a dict:

    accuracy     float  share of the questions whose best choice is the answer: acc_norm of EleutherAI's harness
    acc          float  the same, with log-likelihoods that are not divided by the length: the harness's acc
    score_drop   (L)    accuracy - accuracy(without l): positive when the layer matters
    n_questions  int

    `questions`: dicts with `prompt`, `choices` (strings) and `answer` (index of a choice; with one prompt also its
    text); `prompt` may be a list, one for each choice (Winogrande: two contexts, one continuation). The best choice has
    the greatest log-likelihood of ' ' + choice after its prompt, divided by the choice's length in characters, with the
    harness's tokenization (of prompt and choice as one text, the white space between them with the choice) and its cut
    of the left end where they exceed the block size. An empty prompt is the start of a document.
    """
    L, device = len(model.blocks), model.lm_head.weight.device
    correct, correct_undivided, n = zeros(model, L + 1), 0, 0  # correct: with all layers, then without layer 1, 2 ...
    with evaluation(model):
        for prompts, choices, answer in map(unpack, questions):
            rows = [encode_choice(encoding, model.config, *pair) for pair in zip(prompts, choices)]
            idx, targets = zip(*rows)
            idx = pad_sequence(idx, batch_first=True).to(device)  # at the right end: not seen before
            targets = pad_sequence(targets, batch_first=True, padding_value=-100).to(device)
            states = Trace(model, idx, targets).states
            ends = [states[-1], *(apply(model.blocks[l + 1 :], states[l]) for l in range(L))]
            logits = (model.lm_head(model.norm(h)).float().transpose(1, 2) for h in ends)
            losses = torch.stack([F.cross_entropy(z, targets, reduction="none") for z in logits])
            scores = -losses.sum(2)  # (1 + L, choices): log-likelihoods
            lengths = torch.tensor([max(1, len(choice)) for choice in choices], device=device)
            correct += (scores / lengths).argmax(1) == answer
            correct_undivided += scores[0].argmax().item() == answer
            n += 1
    accuracy, acc = correct / n, correct_undivided / n
    return {"accuracy": accuracy[0].item(), "acc": acc, "score_drop": accuracy[0] - accuracy[1:], "n_questions": n}


def encode_choice(encoding, config, prompt, choice):
    """(idx, targets) of a choice after its prompt, (T): the targets are the choice's tokens, -100 before them.
    UserError for what a model of this GPTConfig cannot read."""
    before = prepare_data.encode(encoding, prompt.rstrip()).tolist()
    after = prepare_data.encode(encoding, prompt + " " + choice).tolist()[len(before) :]
    if len(after) > config.block_size:
        raise UserError(f"choice {choice[:40]!r} has {len(after)} tokens, more than the block size {config.block_size}")
    ids = torch.tensor(((before or [encoding.eot_token]) + after)[-(config.block_size + 1) :])
    if ids.max() >= config.vocab_size:
        raise UserError(f"a question holds token {ids.max()}; the model knows the tokens below {config.vocab_size}")
    targets = ids[1:].clone()
    targets[: len(targets) - len(after)] = -100
    return ids[:-1], targets


# ---------------------------------------------------------------------------------------------------------------------
# The table of the measures: how each is had, and what tables and figures show of it


@dataclass
class Measure:
    """One row of the table. `columns` and `totals` are functions of the result that give {title: values}; None is not
    shown. A column is a tensor of L values, L + 1 with the embedding's output first, or one for each of the result's
    "layers"; where it has further dimensions (heads, two gates), their mean is shown. It is a column of a table and a
    panel of a figure. A total is a number or a text of the run as a whole; of a tensor the mean is shown."""

    what: str  # for --help
    compute: Callable  # a class, for the shared pass; or a function (model, batches) that makes passes of its own
    group: str  # columns of one group share a table and the figure <group>.png
    columns: Callable
    totals: Callable = lambda result: {}
    matrix: tuple | None = None  # (title, ylabel, xlabel, function of the result): a heat map per run, <name>_map.png


def by_threshold(title, thresholds, values):
    """{the title with a threshold in it: the values for this threshold}, as columns or totals of a row."""
    return {title.format(e): v for e, v in zip(thresholds, values)}


# fmt: off
MEASURES = {
    "removal": Measure(
        "loss without each layer, causal scores", Removal, "importance",
        lambda r: {"loss drop, nats": r["loss_drop"], "perplexity drop": r["perplexity_drop"],
                   "causal effect": r["causal"].nanmean(1)},
        lambda r: {"loss": r["loss"], "perplexity": r["perplexity"], "causal score": r["causal_score"],
                   "causal / sqrt(L)": r["causal_score_normalized"]},
        ("causal effect C(s, l)", "skipped layer s", "later layer l", lambda r: r["causal"])),

    "permutation": Measure(
        "loss with each pair of layers swapped", Permutation, "importance",
        lambda r: {"mean swap": r["matrix"].sum(1) / max(1, len(r["matrix"]) - 1)},
        lambda r: {"permutation score": r["score"]},
        ("|change of the loss by a swap| / loss", "layer", "layer", lambda r: r["matrix"])),

    "usefulness": Measure(
        "loss with each layer replaced by an affine map", Usefulness, "importance",
        lambda r: {"affine loss ratio": r["ratio"]},
        lambda r: {"usefulness score": r["score"], "effective/wasted": f"{r['effective']}/{r['wasted']}"}),

    "angular": Measure(
        "angular distance between residual states", AngularDistance, "importance",
        lambda r: {"angle to next": r[:, 0]},
        lambda r: {"mean angle to next": r[:, 0]},
        ("angular distance d(l, n), in units of pi", "n layers on", "layer l", lambda r: r.mT)),

    "choices": Measure(
        "multiple-choice accuracy, and without each layer", multiple_choice, "importance",
        lambda r: {"accuracy drop": r["score_drop"]},
        lambda r: {"accuracy": r["accuracy"], "accuracy, undivided": r["acc"]}),

    "stream": Measure(
        "variance, magnitude, kurtosis and largest values of the residual states", Stream, "stream",
        lambda r: {"variance": r["variance"], "mean |x|": r["magnitude"], "largest |x|": r["largest"],
                   "kurtosis": r["kurtosis"], "attention variance": r["attn_variance"],
                   "MLP variance": r["mlp_variance"]},
        lambda r: {"last variance": r["variance"][-1], "largest |x|": r["top"][0],
                   "|x| > 65504": int(r["over_float16"].sum())}),

    "gradients": Measure(
        "gradient norm and variance of each layer", gradients, "parameters",
        lambda r: {"gradient norm": r["norm"], "gradient variance": r["variance"]},
        lambda r: {"last layer's gradient": r["norm"][-1]}),

    "weights": Measure(
        "weight norms and sparsity, gates, output-norm gains", weights, "parameters",
        lambda r: {"attention matrices": r["attn_norm"], "MLP matrices": r["mlp_norm"],
                   "gate a": r.get("gates"), "1 - act(a)": r.get("gate_scale"),
                   "attention out gain": r["attn_out_gain"], "MLP out gain": r["mlp_out_gain"],
                   "attention matrices / first run's": r.get("attn_norm_ratio"),
                   "MLP matrices / first run's": r.get("mlp_norm_ratio")},
        lambda r: {**by_threshold("matrices |w| < {:g}", WEIGHT_THRESHOLDS, r["sparsity_matrices"]),
                   **by_threshold("parameters |w| < {:g}", WEIGHT_THRESHOLDS, r["sparsity_all"]),
                   "attention matrices / first run's": r.get("attn_norm_ratio"),
                   "MLP matrices / first run's": r.get("mlp_norm_ratio")}),

    "jacobian": Measure(
        "each layer's Jacobian", jacobian, "jacobian",
        lambda r: {"|J - I|": r["deviation"], "|J - I| / d": r["deviation_per_d"], "off-diagonal": r["off_diagonal"],
                   "off-diagonal rms": r["off_diagonal_rms"], "diagonal mean": r["diagonal_mean"],
                   "diagonal std": r["diagonal_std"], "spectral norm": r["spectral_norm"]},
        lambda r: {"mean |J - I|": r["deviation"]}),

    "end_to_end": Measure(
        "size of the last state's derivative by the first", end_to_end, "jacobian",
        lambda r: {},
        lambda r: {"|dx_{L+1} / dx_1|": r}),

    "attention": Measure(
        "sparsity and entropy of the attention, head maps", Attention, "attention",
        lambda r: {**by_threshold("share < {:g}", ATTENTION_THRESHOLDS, r["causal_sparsity"]),
                   **by_threshold("< {:g} of T^2", ATTENTION_THRESHOLDS, r["sparsity"]), "entropy, nats": r["entropy"]},
        lambda r: {**by_threshold("attention < {:g}", ATTENTION_THRESHOLDS, r["causal_sparsity"]),
                   **by_threshold("attention < {:g}, of T^2", ATTENTION_THRESHOLDS, r["sparsity"]),
                   "attention entropy": r["entropy"]}),

    "experts": Measure(
        "load, dead experts, router entropy", Experts, "experts",
        lambda r: {"share of dead experts": r["dead"], "router entropy, nats": r["entropy"]},
        lambda r: {"share of dead experts": r["dead"], "router entropy": r["entropy"]},
        ("share of the router's choices", "k-th layer with experts", "expert", lambda r: r["load"])),
}
# fmt: on


def shown_columns(result):
    """{group: {title: (L + 1) float64}} of a run: the embedding's output first, nan where there is none. Gates and
    heads of a layer are averaged."""
    L, groups = result["run"]["n_layer"], {}
    for name, measure in MEASURES.items():
        columns = measure.columns(result[name]) if name in result else {}
        for title, values in columns.items():
            if values is None or values.isnan().all():
                continue
            layers = torch.arange(L + 1 - len(values), L + 1)
            if isinstance(result[name], dict):
                layers = result[name].get("layers", layers)
            by_layer = torch.full((L + 1,), math.nan, dtype=torch.float64)
            by_layer[layers] = values.double().cpu().reshape(len(values), -1).mean(1)
            groups.setdefault(measure.group, {})[title] = by_layer
    return groups


def shown_totals(result):
    """{title: number or text} of a run as a whole."""
    totals = {}
    for name, measure in MEASURES.items():
        totals |= measure.totals(result[name]) if name in result else {}
    totals = {title: value for title, value in totals.items() if value is not None}
    return {k: v.double().mean().item() if torch.is_tensor(v) else v for k, v in totals.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Runs, their text, results and tables


def load_run(out_dir, device="cpu"):
    """(model, checkpoint dict) of a run's folder, or of a .pt file; UserError if it is missing or damaged. No code in
    it is ever run."""
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
        if type(checkpoint["settings"].get("max_iters", 0)) is not int:
            raise ValueError("its max_iters is not a whole number")
        if type(checkpoint.get("val_loss", 0.0)) not in (float, type(None)):
            raise ValueError("its val_loss is not a number")
    except Exception as error:  # an edited file can hold anything
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise UserError(f"the checkpoint of {out_dir} cannot be read: {reason}") from None
    return model.to(device).eval(), checkpoint


def run_folder(path):
    """The folder of a run, of which `path` may name a checkpoint, such as out-pre/ckpt_000100.pt (--keep_every)."""
    return Path(path).parent if Path(path).suffix == ".pt" else Path(path)


def data_of_run(settings, checkpoint):
    """Folder of the data set that the settings or the run name; UserError if it is missing or of another tokenizer."""
    dataset = settings.dataset or checkpoint["settings"]["dataset"]
    folder = prepare_data.find_data(dataset, settings.data_dir or checkpoint["settings"]["data_dir"], "val")
    of_data, of_run = prepare_data.read_meta(folder).get("tokenizer"), checkpoint["tokenizer"]
    if of_data and not of_run:
        warnings.warn(f"the run names no tokenizer: whether {folder} is of the same cannot be told")
    elif of_data and of_data != of_run:
        raise UserError(f"{folder} was made with tokenizer {of_data['name']}, the run with {of_run['name']}")
    return folder


def load_batches(folder, config, tokens, batch_size, block_size=None, device="cpu"):
    """Held-out text of a data set's folder, a list of (idx, targets), int64 tensors (up to batch_size, block_size).

    The windows that hold `tokens` tokens, or all there are; the same ones for every run with this block size.
    """
    T = block_size or config.block_size
    data = TokenData(folder, "val", T, config.vocab_size)
    n = min(math.ceil(tokens / T), len(data))
    idx, targets = (torch.from_numpy(rows).to(device).split(batch_size) for rows in data.rows(0, n))
    return list(zip(idx, targets))


def unpack(question):
    """(prompts, choices, answer) of a question: a prompt for each choice, and the answer's index. KeyError, TypeError,
    ValueError or AttributeError if it is not one."""
    prompts, choices, answer = question["prompt"], question["choices"], question["answer"]
    if isinstance(prompts, str):
        prompts = [prompts] * len(choices)
        answer = choices.index(answer) if isinstance(answer, str) else answer
    is_index = type(answer) is int and 0 <= answer < len(choices)
    if type(choices) is not list or type(prompts) is not list or len(prompts) != len(choices) or not is_index:
        raise ValueError("prompt or choices is no list, one is longer than the other, or answer is none of them")
    "".join([*prompts, *choices]).encode()  # all are texts; half of a surrogate pair has no bytes
    return prompts, choices, answer


def read_questions(path):
    """The questions of a jsonl for `multiple_choice`; UserError names the line that is not one."""
    questions = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would cut inside a JSON text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"choices {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                questions.append(json.loads(line))
                unpack(questions[-1])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{path}:{number} is not a question: an object with prompt (or a list, one for each choice), "
                "choices (strings) and answer (an index from 0; with one prompt also one of the choices)"
            ) from None
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def plan_run(out_dir, settings, config, checkpoint):
    """For a run: (names of its measures, {name: its options}, {name: what it reads in place of the held-out text}); a
    measure that has none is not in these dicts. UserError for what cannot be measured on this run."""
    names = settings.names()
    if "experts" in names and not config.n_expert:
        names.remove("experts")  # check_runs has said so where they were asked for by name
    layers = None if settings.layers == "all" else [int(part) for part in settings.layers.split(",")]
    if layers and max(layers) > config.n_layer:
        raise UserError(f"--layers={settings.layers}: {out_dir} has layers 1 to {config.n_layer}")
    options, data = {"jacobian": {"layers": layers, "own_token": settings.own_token}}, {}
    if "choices" in names:
        if not checkpoint["tokenizer"]:
            raise UserError(f"the data of {out_dir} named no tokenizer: its tokens have no text")
        options["choices"] = {"encoding": prepare_data.build_encoding(checkpoint["tokenizer"])}
        data["choices"] = read_questions(settings.choices)
    return names, options, data


def check_runs(out_dirs, settings):
    """Before anything is measured: UserError for what would end the analysis of one of the runs."""
    dense = []
    for out_dir in out_dirs:
        model, checkpoint = load_run(out_dir)
        config, folder = model.config, data_of_run(settings, checkpoint)
        names, options, data = plan_run(out_dir, settings, config, checkpoint)
        text = load_batches(folder, config, settings.tokens, settings.batch_size, settings.block_size)
        n_tokens = sum(idx.numel() for idx, _ in text)
        if "usefulness" in names and n_tokens <= config.n_embd:
            raise UserError(f"usefulness: {n_tokens} tokens cannot fit a map of {config.n_embd} dimensions and a bias")
        for prompts, choices, _ in map(unpack, data.get("choices", ())):
            for prompt, choice in zip(prompts, choices):
                encode_choice(options["choices"]["encoding"], config, prompt, choice)
        read_log(run_folder(out_dir) / "log.jsonl")
        if not config.n_expert:
            dense.append(out_dir)
    if "experts" in settings.metrics.split(","):
        if len(dense) == len(out_dirs):
            raise UserError(f"metrics=experts: {dense[0]} has no experts")
        for out_dir in dense:
            warnings.warn(f"{out_dir} has no experts")


def analyze_run(out_dir, settings, device):
    """All measures that the settings ask for: {"run": what was measured, name: its result}."""
    model, checkpoint = load_run(out_dir, device)
    config, folder = model.config, data_of_run(settings, checkpoint)
    names, options, data = plan_run(out_dir, settings, config, checkpoint)
    text = load_batches(folder, config, settings.tokens, settings.batch_size, settings.block_size, device)
    size = min(settings.tokens, settings.jacobian_tokens)
    data["jacobian"] = data["end_to_end"] = load_batches(folder, config, size, 1, settings.block_size, device)
    n_tokens = sum(idx.numel() for idx, _ in text)
    print(f"{out_dir}: {config.norm}, {config.n_layer} layers x {config.n_embd}, step {checkpoint['step']}; ", end="")
    print(f"{n_tokens:,} held-out tokens of {folder}" + ", all there are" * (n_tokens < settings.tokens), flush=True)
    result = {"run": {"out_dir": str(out_dir), "norm": config.norm, "n_layer": config.n_layer, "n_embd": config.n_embd}}
    result["run"].update(step=checkpoint["step"], data=str(folder), tokens=n_tokens)

    run_name = Path(os.path.abspath(out_dir)).name
    if "usefulness" in names:
        options["usefulness"] = {"maps": affine_maps(model, progress(text, f"{run_name}: affine maps"))}
    shared = {}  # the classes share one pass, the functions make their own
    for name in names:
        compute, given = MEASURES[name].compute, options.get(name, {})
        if isinstance(compute, type):
            shared[name] = compute(model, **given)
        else:
            result[name] = compute(model, progress(data.get(name, text), f"{run_name}: {name}"), **given)
    if shared:
        result.update(one_pass(model, progress(text, f"{run_name}: {', '.join(shared)}"), shared))
    return result


def plain(value):
    """`value` for JSON: tensors as lists, what is not a number (or not finite) as null. What has the key `maps` or
    `matrices`, attention maps and Jacobians, is too large for text: some of it is in the figures."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not (k in ("maps", "matrices") and torch.is_tensor(v))}
    if torch.is_tensor(value):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_json(path, value):
    save_whole(path, lambda file: file.write(json.dumps(plain(value)).encode() + b"\n"))
    print(f"wrote {path}")


def print_table(head, rows):
    """Rows of texts and numbers (four digits, a dash for nan) under a head, the first column to the left, the others to
    the right."""
    table = [head]
    for row in rows:
        table.append([f"{cell:.4g}".replace("nan", "-") if isinstance(cell, float) else str(cell) for cell in row])
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))
    print()


def print_run(result):
    """One table for each group of measures, with one row for each layer."""
    for group, columns in shown_columns(result).items():
        values = torch.stack(list(columns.values()), dim=1)  # (L + 1, columns)
        rows = [[l or "embedding", *row] for l, row in enumerate(values.tolist())]
        print(f"\n{group}")
        print_table(["layer", *columns], rows[1:] if values[0].isnan().all() else rows)


def print_totals(results):
    """The numbers of whole models, one column for each run."""
    totals = {name: shown_totals(result) for name, result in results.items()}
    titles = dict.fromkeys(title for of_run in totals.values() for title in of_run)
    rows = [[title, *(of_run.get(title, math.nan) for of_run in totals.values())] for title in titles]
    if rows:
        print_table(["", *totals], rows)


def analyze_runs(settings, device):
    """Measures the runs one after the other: tables, analysis.json and figures."""
    check_runs(settings.out_dirs, settings)
    is_single = len(settings.out_dirs) == 1
    folder = Path(settings.analysis_dir or (run_folder(settings.out_dirs[0]) if is_single else "analysis"))
    folder.mkdir(parents=True, exist_ok=True)
    names = [Path(os.path.abspath(out_dir)).name for out_dir in settings.out_dirs]  # "." alone has no name
    names = settings.out_dirs if len(set(names)) < len(names) else names
    results = {}
    for name, out_dir in zip(names, settings.out_dirs):
        result = results[name] = analyze_run(out_dir, settings, device)
        first = results[names[0]]
        if "weights" in result and result is not first and result["run"]["n_layer"] == first["run"]["n_layer"]:
            for part in ("attn_norm", "mlp_norm"):  # (L): over those of the first run (GPAS Figure 6)
                result["weights"][f"{part}_ratio"] = result["weights"][part] / first["weights"][part]
        print_run(result)
    print_totals(results)
    save_json(folder / "analysis.json", results[names[0]] if is_single else {"runs": results})
    if settings.figures:
        for draw in (draw_columns, draw_matrices, draw_jacobians, draw_attention, draw_kurtosis, draw_training):
            draw(results, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Figures. `results` is {run: result}; each function draws into `folder`

# Okabe and Ito's colours, which colour-blind readers tell apart, each with a dash and a marker for readers of grey.
COLORS = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000"
DASHES = "-", "--", "-.", ":"
MARKERS = "o", "s", "^", "D", "v", "P", "X", "*", "<"


def line_styles(names):
    """{name: how its lines are drawn}, each different up to 252 names, the same in every figure."""
    looks = zip(names, cycle(COLORS), cycle(DASHES), cycle(MARKERS))
    return {n: {"color": c, "linestyle": d, "marker": m, "ms": 4, "lw": 1.2} for n, c, d, m in looks}


def grid(n, n_columns, width, height):
    """A figure of n axes, width x height inches each, in rows of n_columns, and the axes."""
    from matplotlib.figure import Figure

    n_rows, n_columns = math.ceil(n / n_columns), min(n, n_columns)
    fig = Figure(figsize=(width * n_columns, height * n_rows + 0.5), layout="constrained")
    return fig, [fig.add_subplot(n_rows, n_columns, i + 1) for i in range(n)]


def label(axis, xlabel, ylabel):
    axis.set_xlabel(xlabel, fontsize=8)
    axis.set_ylabel(ylabel, fontsize=8, parse_math=False)  # it may hold a folder's name, and that a $
    axis.tick_params(which="both", labelsize=7)
    axis.grid(alpha=0.3)


def legend(fig, axes):
    """One legend for all axes, below them, where there are several lines; the figure grows by its height."""
    handles = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    if len(handles) > 1:
        width = 0.6 + 0.07 * max(map(len, handles))  # inches of a column, about
        columns = min(len(handles), max(1, int(fig.get_figwidth() / width)))
        fig.set_figheight(fig.get_figheight() + 0.17 * math.ceil(len(handles) / columns))
        box = fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
        for text in box.get_texts():
            text.set_parse_math(False)


def save(fig, path, title):
    """Writes the figure and says so."""
    fig.suptitle(title, fontsize=10, parse_math=False)
    fig.savefig(path, dpi=110)
    print(f"wrote {path}")


def draw_lines(path, title, xlabel, panels, names=(), n_columns=3, xticks=None):
    """Writes a figure of lines with one legend, a panel for each of {ylabel: {name: (x, y)}}; none if it is empty.

    A third element after x and y is a deviation, drawn as a band around y. A panel is logarithmic where its values are
    positive and span more than a factor of ten. A name has one style in all panels, and in all figures whose `names`
    begin alike. `xticks`: the values of x where they are not layers or steps.
    """
    if not panels:
        return
    fig, axes = grid(len(panels), n_columns, 11 / n_columns, 8 / n_columns)
    styles = line_styles(dict.fromkeys([*names, *(name for lines in panels.values() for name in lines)]))
    for axis, (ylabel, lines) in zip(axes, panels.items()):
        for name, (x, y, *_) in lines.items():
            axis.plot(x, y, label=name, markevery=max(1, len(x) // 12), **styles[name])
        low, high = axis.dataLim.intervaly  # of the lines: their bands, which may go below 0, come after
        if low > 0 and high > 10 * low:
            axis.set_yscale("log")
        for name, (x, y, *deviation) in lines.items():
            for d in deviation:
                axis.fill_between(x, y - d, y + d, color=styles[name]["color"], alpha=0.2, lw=0)
        label(axis, xlabel, ylabel)
        axis.locator_params(axis="x", integer=True)
        if xticks:
            axis.set_xscale("log" if 0 < 4 * xticks[0] <= xticks[-1] else "linear")
            axis.set_xticks(xticks, map(str, xticks))
            axis.minorticks_off()
    legend(fig, axes)
    save(fig, path, title)


def draw_maps(path, title, maps, xlabel, ylabel, n_columns=3):
    """Writes a figure of heat maps {title: matrix} on one scale, their rows and columns numbered from 1; none without
    maps."""
    if not maps:
        return
    values = torch.cat([matrix.flatten() for matrix in maps.values()])
    highest = max(values[values.isfinite()].tolist(), default=1.0)
    fig, axes = grid(len(maps), n_columns, min(3.6, 11 / n_columns), min(3.1, 10 / n_columns))
    for axis, (name, matrix) in zip(axes, maps.items()):
        n, m = matrix.shape
        options = {"extent": (0.5, m + 0.5, n + 0.5, 0.5), "aspect": "auto", "interpolation": "nearest"}
        drawn = axis.imshow(matrix.cpu().numpy(), vmin=0, vmax=highest, **options)
        axis.set_title(name, fontsize=8, parse_math=False)
        label(axis, xlabel, ylabel)
        axis.grid(False)
        axis.locator_params(integer=True)
    fig.colorbar(drawn, ax=axes, fraction=0.03)
    save(fig, path, title)


def spread(n, most):
    """At most `most` indices of range(n), evenly spaced, the first and the last included."""
    return torch.linspace(0, n - 1, min(n, most)).round().int().tolist()


def of_measure(results, name):
    """{run: result of the measure}, of the runs that have it."""
    return {run_name: result[name] for run_name, result in results.items() if name in result}


def draw_columns(results, folder):
    """For each group of measures a figure of its columns, the runs over each other."""
    groups = {}  # {group: {title: {run: (layers, values)}}}
    for run_name, result in results.items():
        for group, columns in shown_columns(result).items():
            for title, values in columns.items():
                layers = values.isfinite().nonzero().flatten()
                groups.setdefault(group, {}).setdefault(title, {})[run_name] = layers, values[layers]
    for group, panels in groups.items():
        draw_lines(folder / f"{group}.png", group, "layer (0: embedding)", panels, results)


def draw_matrices(results, folder):
    """The measures' matrices: one figure for each measure, in it one map for each run, all on one scale."""
    for name, measure in MEASURES.items():
        if measure.matrix:
            title, ylabel, xlabel, get = measure.matrix
            maps = {run_name: get(result) for run_name, result in of_measure(results, name).items()}
            draw_maps(folder / f"{name}_map.png", title, maps, xlabel, ylabel)


def draw_jacobians(results, folder):
    """|J|^0.3 of up to four layers of each run (Sparsity Figure 12)."""
    maps = {}
    for run_name, r in of_measure(results, "jacobian").items():
        for i in spread(len(r["layers"]), 4):
            maps[f"{run_name}, layer {r['layers'][i]}"] = (r["matrices"][i].abs() ** 0.3).clamp(max=1)
    path, title = folder / "jacobian_maps.png", "Jacobian, |J|^0.3, cut at 1"
    draw_maps(path, title, maps, "input dimension", "output dimension", 4)


def draw_attention(results, folder):
    """A^0.2 of up to four layers by up to four heads, and of head 1 of every layer, two files a run (Sparsity
    Figure 6)."""
    for run_name, r in of_measure(results, "attention").items():
        ending = ".png" if len(results) == 1 else f"_{run_name.replace('/', '_')}.png"
        maps = r["maps"] ** 0.2  # (L, n_head, P, P)
        layers, heads = spread(maps.shape[0], 4), spread(maps.shape[1], 4)
        some = {f"layer {l + 1}, head {h + 1}": maps[l, h] for l in layers for h in heads}
        title = f"{run_name}: attention weights A, (mean over sequences)^0.2"
        draw_maps(folder / f"attention_maps{ending}", title, some, "key position", "query position", len(heads))
        first = {f"layer {l}": A for l, A in enumerate(maps[:, 0], 1)}
        title = f"{run_name}: head 1 of every layer, (mean over sequences)^0.2"
        draw_maps(folder / f"first_heads{ending}", title, first, "key", "query", 6)


def draw_kurtosis(results, folder):
    """The kurtosis of each dimension of up to five states, sorted; one panel for each run (Sparsity Eq. 19)."""
    panels = {}
    for run_name, r in of_measure(results, "stream").items():
        kurtosis = r["kurtosis_per_dim"].cpu().sort(descending=True).values
        lines = panels[f"{run_name}: kurtosis (3: Gaussian)"] = {}
        for l in spread(len(kurtosis), 5):
            lines[f"after layer {l}" if l else "embedding"] = range(kurtosis.shape[1]), kurtosis[l]
    title = "kurtosis over tokens of each dimension of the stream"
    draw_lines(folder / "kurtosis.png", title, "dimension, sorted", panels)


# What draw_training shows of a run's log, and how its axis names it.
LOGGED = {
    "loss": "training loss, nats",
    "val_loss": "held-out loss, nats",
    "grad_norm": "gradient norm, all but the gates",
    "variance": "variance",
    "attn_variance": "attention variance",
    "mlp_variance": "MLP variance",
    "magnitude": "mean |x|",
    "largest": "largest |x|",
    "kurtosis": "kurtosis (3: Gaussian)",
    "embed_variance": "variance of the embedding's output",
    "attn_out_gain": "gain of the attention's output norm",
    "mlp_out_gain": "gain of the MLP's output norm",
    "grad_norms": "layer's gradient norm, held-out batch",
    "step_grad_norms": "layer's gradient norm, of a step",
    "grad_variance": "gradient variance",
    "gates": "gate a",
}


def logged(log, key, run_name):
    """(steps, values) of what a run's log holds under a key: one value for each step, float64, of any shape."""
    records = [record for record in log if key in record]
    try:
        values = torch.tensor([record[key] for record in records], dtype=torch.float64)
    except (ValueError, TypeError, OverflowError):  # OverflowError: an int too large for float64
        raise UserError(f"{run_name}: {key} in its log is not all numbers, or not as many in each line") from None
    return [record["step"] for record in records], values


def draw_training(results, folder):
    """What changes over training, from the logs. Of what has a number for each layer, a single run shows all layers,
    several runs show their last one, or the mean of the gates."""
    runs, panels = {}, {}
    for run_name, result in results.items():
        runs.setdefault(run_folder(result["run"]["out_dir"]), []).append(run_name)
    # stages of a run have one log, with the run's name
    logs = {names[0] if len(names) == 1 else str(run): read_log(run / "log.jsonl") for run, names in runs.items()}
    for key, ylabel in LOGGED.items():
        lines = {}
        for run_name, log in logs.items():
            steps, values = logged(log, key, run_name)
            if not steps:
                continue
            if values.dim() == 3:  # a gate for each sub-layer
                values = values.mean(2)
            if values.dim() == 1:
                lines[run_name] = steps, values
            elif len(logs) == 1:
                lines |= {f"layer {l}": (steps, column) for l, column in enumerate(values.T, 1)}
            else:
                lines[run_name] = steps, values.mean(1) if key == "gates" else values[:, -1]
        if lines:
            panels[ylabel] = lines
    title = "training" + "; the last layer, the mean of the gates" * (len(logs) > 1)
    draw_lines(folder / "dynamics.png", title, "step", panels, results)


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps: runs that differ in some settings, averaged over seeds

# Settings that others decide where they are not given, and these others. Where runs that agree in the others agree in
# such a setting too, it is no difference of its own.
DERIVED = {
    "n_kv_head": "n_head",
    "head_dim": "n_embd n_head",
    "n_hidden": "n_embd",
    "max_iters": "epochs max_tokens batch_size gradient_accumulation_steps block_size dataset rows",
    "gate_init": "gpas_act",
    "freeze_gates": "norm gates",
    **dict.fromkeys("norm_type embed_norm qk_norm v_norm branch_scale init".split(), "norm"),
}
# Settings that are no difference between runs: how a run is computed and watched.
IGNORED = "out_dir data_dir overwrite init_from device compile shard recompute jobs vocab_size".split()
IGNORED += "eval_iters last_eval_iters eval_interval log_interval keep_every".split()
IGNORED += "sample_tokens temperature top_k wandb tensorboard peak_tflops".split()


def is_sweep(folder):
    """Whether a folder holds runs (train.py gives each a train.log) instead of being one."""
    holds_runs = any(path.name in ("ckpt.pt", "train.log") for path in Path(folder).glob("*/*"))
    return holds_runs and not (Path(folder) / "ckpt.pt").exists()


def read_sweep(folder):
    """The runs in the sub-folders of a sweep, a list of dicts:

    name      that of the run's folder
    settings  {name: value} of the settings that differ between the runs, the seed last
    state     finished, unfinished or diverged; `step` is that of the checkpoint
    loss      the last held-out loss, nats
    columns   {title: (L) float64}, totals {title: number}: from the log; measure_sweep adds those of --metrics
    curves    {title: [(step, value)]} over training
    """
    runs = []
    for run_dir in sorted(path.parent for path in folder.glob("*/ckpt.pt")):
        model, checkpoint = load_run(run_dir)
        given = vars(model.config) | checkpoint["settings"]  # model.config has what older runs did not save
        log = read_log(run_dir / "log.jsonl")
        columns, totals, curves = {}, {}, {}
        state = "finished" if checkpoint["step"] >= given.get("max_iters", 0) else "unfinished"
        if any("diverged" in record for record in log):
            state = "diverged"
        steps, variance = logged(log, "variance", run_dir)  # (steps, L)
        if steps:
            columns["variance"], totals["last variance"] = variance[-1], variance[-1, -1].item()
            curves["last layer's variance"] = list(zip(steps, variance[:, -1].tolist()))
        steps, gates = logged(log, "gates", run_dir)  # (steps, L), or (steps, L, 2) with one a sub-layer
        if steps:
            scales = gate_scale(gates[-1], model.config.gpas_act).reshape(gates.shape[1], -1).mean(1)
            columns["1 - act(a)"], totals["mean gate scale"] = scales, scales.mean().item()
        steps, losses = logged(log, "loss", run_dir)
        curves["training loss, nats"] = list(zip(steps, losses.tolist()))
        entry = {"name": run_dir.name, "state": state, "step": checkpoint["step"], "loss": checkpoint.get("val_loss")}
        entry |= {"columns": columns, "totals": totals, "curves": curves}
        entry["settings"] = {k: str(v) if isinstance(v, (list, dict)) else v for k, v in given.items()}
        runs.append(entry)
    if not runs:
        raise UserError(f"no run in {folder} has saved a checkpoint yet")
    names = differing([entry["settings"] for entry in runs])
    if set(names) <= {"seed"}:
        names = ["norm", *names]  # one scheme, over seeds
    for entry in runs:
        entry["settings"] = {name: entry["settings"].get(name) for name in names}
    for first, *twins in by_group(runs, without=()).values():
        for twin in twins:
            both = f"{first['name']} and {twin['name']}"
            warnings.warn(f"{both} do not differ in any setting that is compared: both are counted")
    return runs


def measure_sweep(runs, folder, settings, device):
    """Adds the columns and totals of --metrics to those of the finished runs. UserError before the first measurement if
    one of the runs cannot be measured."""
    check_runs([folder / entry["name"] for entry in runs], settings)
    for entry in finished(runs):
        result = analyze_run(folder / entry["name"], settings, device)
        entry["totals"] |= {k: v for k, v in shown_totals(result).items() if isinstance(v, (int, float))}
        for columns in shown_columns(result).values():
            entry["columns"] |= {title: values[1:] for title, values in columns.items()}


def differing(given):
    """The names of the settings in which runs differ: norm first, then learning_rate, the others by name, the seed
    last. `given` is a list of the runs' settings, dicts."""
    names = set().union(*given).difference(IGNORED)  # a run of an earlier version, or an imported one, may lack some
    differ = {name for name in names if len({of_run[name] for of_run in given if name in of_run}) > 1}

    def is_decided(name):
        """Whether runs that agree in what `name` follows from agree in `name` too."""
        pairs = {(tuple(map(of_run.get, DERIVED[name].split())), of_run.get(name)) for of_run in given}
        return len(pairs) == len({sources for sources, _ in pairs})

    differ -= {name for name in differ.intersection(DERIVED) if is_decided(name)}
    return sorted(differ, key=lambda name: (name != "norm", name == "seed", name != "learning_rate", name))


def by_group(runs, without=("seed",)):
    """{group: its runs}, sorted. The runs of a group agree in all settings but those in `without`; the group is the
    tuple of those in which they agree: (("norm", "pre"), ("learning_rate", 0.001))."""
    groups = {}
    for entry in runs:
        key = tuple((name, value) for name, value in entry["settings"].items() if name not in without)
        groups.setdefault(key, []).append(entry)

    def place(value):  # numbers first, then none, true and false, texts
        return ("" if type(value) in (int, float) else str(type(value))), value

    return dict(sorted(groups.items(), key=lambda item: [place(value) for _, value in item[0]]))


def finished(runs):
    return [entry for entry in runs if entry["state"] == "finished"]


def finished_losses(runs):
    return [entry["loss"] for entry in finished(runs) if entry["loss"] is not None]


def best_groups(runs):
    """by_group's groups at their best learning rate: of groups that differ only in it, the one with the fewest
    diverged runs and, among those, the smallest mean loss. Groups without a finished run are left out."""

    def rank(group):
        return sum(entry["state"] == "diverged" for entry in group), statistics.fmean(finished_losses(group))

    best = {}
    for at_all_rates in by_group(runs, without=("seed", "learning_rate")).values():
        groups = {key: group for key, group in by_group(at_all_rates).items() if finished_losses(group)}
        if groups:
            key = min(groups, key=lambda key: rank(groups[key]))
            best[key] = groups[key]
    return best


def paired_differences(group, runs, name, baseline, ignored=()):
    """For each finished run of the group, its loss minus that of its partner: the run with `name` = `baseline` and
    every other setting equal, the seed too, except those `ignored`."""

    def key(settings):
        return tuple(value for setting, value in settings.items() if setting not in ignored)

    losses = {key(entry["settings"]): entry["loss"] for entry in finished(runs)}
    pairs = [(entry["loss"], losses.get(key(entry["settings"] | {name: baseline}))) for entry in finished(group)]
    return [loss - partner for loss, partner in pairs if None not in (loss, partner)]


def plus_minus(values, digits=4, standard_error=False):
    """The mean of numbers, ± their standard deviation (n - 1) or the standard error of the mean, and their number."""
    if not values:
        return "-"
    n, text = len(values), f"{statistics.fmean(values):.{digits}g}"
    if n > 1:
        text += f" ± {statistics.stdev(values) / (math.sqrt(n) if standard_error else 1):.2g}"
    return f"{text} ({n})"


def sweep_tables(runs, baseline):
    """Markdown: a table of the groups of runs that differ only in the seed, each compared with the baseline at the same
    learning rate; and, where rates differ, one of each at its best, compared with the baseline at its own best."""
    names = [name for name in runs[0]["settings"] if name != "seed"]
    titles = list(dict.fromkeys(title for entry in runs for title in entry["totals"]))
    head = [*names, "held-out loss, nats", f"minus {names[0]}={baseline}", "diverged", "unfinished"]
    head += [title.replace("|", "\\|") for title in titles]
    text = ["Mean ± standard deviation (number of runs); differences: mean ± standard error (number of pairs)."]
    tables = {"All runs": (by_group(runs), ())}
    if "learning_rate" in names:  # pairs then differ in it too, unless it is what is compared
        tables["Each at its best learning rate"] = best_groups(runs), {"learning_rate"}.difference(names[:1])
    for title, (groups, ignored) in tables.items():
        compared = [entry for group in groups.values() for entry in group]
        text += ["", f"**{title}**", "", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        for key, group in groups.items():
            states = [entry["state"] for entry in group]
            row = [str(value) for _, value in key]
            row.append(plus_minus(finished_losses(group), digits=5))
            differences = paired_differences(group, compared, names[0], baseline, ignored)
            row.append(plus_minus(differences, 3, standard_error=True))
            row += [str(states.count("diverged")), str(states.count("unfinished"))]
            for total in titles:
                values = [entry["totals"].get(total) for entry in finished(group)]
                row.append(plus_minus([value for value in values if value is not None and math.isfinite(value)]))
            text.append("| " + " | ".join(row) + " |")
    return "\n".join(text) + "\n"


def mean_line(points):
    """(x, mean, deviation) for draw_lines of {x: a list of numbers, one for each seed}; the deviation of one is 0."""
    points = dict(sorted(points.items()))  # a step that one seed has not logged comes late
    columns = [torch.tensor(values, dtype=torch.float64) for values in points.values()]
    deviation = [column.std() if len(column) > 1 else 0.0 for column in columns]
    return list(points), torch.tensor([column.mean() for column in columns]), torch.tensor(deviation)


def line_name(key):
    """A group of by_group in a legend: a scheme by its name, other settings as name=value."""
    return ", ".join(str(value) if name == "norm" else f"{name}={value}" for name, value in key) or "all"


def draw_losses(runs, name, folder):
    """Held-out loss against a setting with numbers, a line for each combination of the others: mean, and the standard
    deviation over seeds. The legend says where runs diverged."""
    values, lines = sorted({entry["settings"][name] for entry in runs}), {}
    for key, line_runs in by_group(runs, without=("seed", name)).items():
        line, points = line_name(key), {}
        for value in values:
            group = [entry for entry in line_runs if entry["settings"][name] == value]
            if finished_losses(group):
                points[value] = finished_losses(group)
            if any(entry["state"] == "diverged" for entry in group):
                line += f", diverged at {value}"
        lines[line] = mean_line(points)
    path, title = folder / f"loss_by_{name}.svg", f"Held-out loss against {name}, mean and deviation over seeds"
    draw_lines(path, title, name, {"held-out loss, nats": lines}, n_columns=2, xticks=values)


def draw_groups(runs, folder):
    """For each group at its best learning rate: its layers (variance, gates, what was measured) and its curves over
    training, mean over seeds with one standard deviation around it. Only finished runs count, where there are some."""
    groups, best = {}, best_groups(runs)
    for key, group in (best or by_group(runs)).items():
        groups[line_name(key)] = finished(group) or group
    for part, xlabel, file in (("columns", "layer", "layers"), ("curves", "step", "training")):
        panels = {}
        for ylabel in dict.fromkeys(title for entry in runs for title in entry[part]):
            for line, group in groups.items():
                points = {}  # {x: a value for each seed}
                for values in [entry[part][ylabel] for entry in group if ylabel in entry[part]]:
                    curve = enumerate(values.tolist(), 1) if part == "columns" else values
                    for x, y in curve:
                        points.setdefault(x, []).append(y)
                if points:
                    panels.setdefault(ylabel, {})[line] = mean_line(points)
        title = f"{file.capitalize()}: mean and deviation over seeds"
        title += ", each at its best learning rate" * ("learning_rate" in runs[0]["settings"] and bool(best))
        draw_lines(folder / f"{file}.svg", title, xlabel, panels, groups, n_columns=2)


def is_value(text, value):
    """Whether a text of the command line, such as 1e-3 or none, is a setting's value."""
    if value is None:
        return text.lower() == "none"
    try:
        return text == str(value) or json.loads(text) == value
    except ValueError:
        return False


def analyze_sweep(settings, device):
    """Tables (sweep.md), raw numbers (sweep.json) and figures of the runs in a folder, written into it."""
    folder = Path(settings.out_dirs[0])
    runs = read_sweep(folder)
    n_young = sum(not log.with_name("ckpt.pt").exists() for log in folder.glob("*/train.log"))
    if n_young:
        print(f"runs that have saved no checkpoint yet, left out here: {n_young}")
    names = [name for name in runs[0]["settings"] if name != "seed"]
    values = list(dict.fromkeys(dict(group)[names[0]] for group in by_group(runs)))
    wanted = settings.baseline or ("pre" if "pre" in values else str(values[0]))
    baseline = [value for value in values if is_value(wanted, value)]
    if not baseline:
        raise UserError(f"baseline is {wanted!r}; {names[0]} is one of {', '.join(map(str, values))}")
    if settings.metrics != "all":
        measure_sweep(runs, folder, settings, device)
    text = sweep_tables(runs, baseline[0])
    print(text)
    save_whole(folder / "sweep.md", lambda file: file.write(text.encode()))
    print(f"wrote {folder}/sweep.md")
    save_json(folder / "sweep.json", runs)
    if settings.figures:
        for name in names:
            if all(type(entry["settings"][name]) in (int, float) for entry in runs):
                draw_losses(runs, name, folder)
        draw_groups(runs, folder)


# ---------------------------------------------------------------------------------------------------------------------
# The program


def main():
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    measures = "\n".join(f"  {name:<12} {measure.what}" for name, measure in MEASURES.items())
    description = f"Measures what the layers of trained models do:\n\n{measures}"
    settings = configure(Settings, description, positional="out_dirs")
    # what can go wrong goes wrong before the long part
    try:
        device = find_device(settings.device)
        torch.empty(1, device=device, dtype=torch.float64)
    except (ValueError, RuntimeError, TypeError) as error:  # TypeError: Apple's GPUs have no float64
        raise UserError(f"{str(error).splitlines()[0]} (--device={settings.device})") from None
    has_matplotlib = find_spec("matplotlib") is not None
    if settings.figures and not has_matplotlib:
        raise UserError("figures need matplotlib: pip install matplotlib")
    if settings.figures is None and not has_matplotlib:
        print("no figures: they need matplotlib (pip install matplotlib)")
    settings.figures = has_matplotlib and settings.figures is not False
    sweeps = [out_dir for out_dir in settings.out_dirs if is_sweep(out_dir)]
    if not sweeps and settings.baseline is not None:
        raise UserError(f"baseline={settings.baseline} has no effect: {settings.out_dirs[0]} is not a sweep of runs")
    if sweeps and len(settings.out_dirs) > 1:
        raise UserError(f"{sweeps[0]} is a sweep: name it alone")
    if sweeps and settings.analysis_dir:
        raise UserError(f"analysis_dir={settings.analysis_dir} has no effect: the tables of a sweep go into its folder")
    if sweeps and settings.choices and settings.metrics == "all":
        raise UserError(f"choices={settings.choices} has no effect on a sweep without --metrics=choices")
    (analyze_sweep if sweeps else analyze_runs)(settings, device)


if __name__ == "__main__":
    run(main)
