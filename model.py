"""A Llama-style decoder in which the place of the normalization is a row of a table.

A layer has two sub-layers f, attention and MLP. Each is added to the residual stream x, and there are three places for
a norm: A before f, B after f, C after the addition (Peri-LN Figure 2).

               +------- shortcut ---------+
               |                          |
        x -----+---> A ---> f ---> B ---(add)---> C ---> x
                                      h

    h = b * B(f(s * A(x)))
    with a norm at C:      x <- C(alpha * omega * gpas(x) + h)      the gate scales the shortcut
    without one at C:      x <- gpas(x + h)                         the gate scales the stream

A place without a norm leaves its input as it is. gpas(x) multiplies x by 1 - act(a) in the forward pass and leaves its
gradient alone; a, the gate, is one learned number per layer. It does nothing in schemes without gates, and s, b, alpha
and omega are 1, unless the table or a setting says otherwise. One row, b2t, also adds the layer's input to the MLP's h.

The table is SCHEMES: a row says where the norms are and gives s, alpha and omega, and a new placement is a new row. The
equation is the class Residual. What combines with every row (the kind of norm, b, the initialization, the gate's act)
is a setting of GPTConfig. The rest is a plain Llama.

The file tells this story up to GPT.forward. What follows can be skipped at first. Docstrings cite the papers so:

    GPAS     Gradient-Preserving Activation Scaling, arXiv 2506.22049
    LNS      The Curse of Depth in Large Language Models (LayerNorm Scaling), arXiv 2502.05795
    Peri-LN  Revisiting Normalization Layer in the Transformer Architecture, arXiv 2502.02732
    Sparsity When Does Sparsity Mitigate the Curse of Depth in LLMs, arXiv 2603.15389
"""

from __future__ import annotations

import copy
import inspect
import math
import typing
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

# Types of settings with their least and greatest value. Annotated[str, NAMES] is one of the names in a tuple, or of the
# rows of a table, which may stand further below.
COUNT = Annotated[int, (1, 2**31 - 1)]
NATURAL = Annotated[int, (0, 2**31 - 1)]
POSITIVE = Annotated[float, (1e-300, 1e300)]
NOT_NEGATIVE = Annotated[float, (0, 1e300)]
FINITE = Annotated[float, (-1e300, 1e300)]
SHARE = Annotated[float, (0, 1)]


@dataclass
class GPTConfig:
    """The architecture. None means what the comment says; nearly every None is replaced by it, for good: for another
    norm or width call GPTConfig again, since dataclasses.replace would keep what was decided. ValueError for what
    cannot be built."""

    # model
    block_size: COUNT = 256  # longest sequence in training and generation, in tokens
    vocab_size: NATURAL = 257  # rows of the embedding and of the head
    n_layer: COUNT = 12  # blocks, each attention and MLP
    n_head: COUNT = 4  # query heads
    n_embd: COUNT = 128  # width of the residual stream
    n_kv_head: COUNT | None = None  # key/value heads, a divisor of n_head (1: MQA); none: n_head
    head_dim: COUNT | None = None  # width of a head, even; none: n_embd / n_head
    n_hidden: COUNT | None = None  # MLP width, of each expert too; none: 8/3 n_embd, rounded up to a multiple of 8
    tie_embeddings: bool = False  # the head is the embedding table, and starts with its embed_std
    qkv_bias: bool = False  # queries, keys and values have a bias, as in Qwen2
    rope_theta: POSITIVE = 10000.0  # base of the rotary embedding
    rope_scaling: dict | None = None  # longer contexts, {"rope_type": a row of ROPE_SCALINGS in model.py, its numbers}
    head_z_weight: NOT_NEGATIVE = 0.0  # of the head's z-loss, the mean of logsumexp(logits)^2 (DCLM has 1e-4)
    # mixture of experts
    n_expert: NATURAL = 0  # experts in place of the MLP; 0: a dense MLP
    n_expert_active: COUNT = 2  # top_k: experts that a token reaches
    n_expert_shared: NATURAL = 0  # experts that every token reaches besides
    normalize_gates: bool = True  # the router's weights of the chosen sum to 1; false: as in OLMoE, Sparsity's code
    average_shared: bool = False  # shared experts are averaged in, as in Sparsity's code; false: added
    moe_from: COUNT = 1  # first layer with experts, from 1
    moe_every: COUNT = 1  # experts in every so-many-th layer from there
    balance_weight: NOT_NEGATIVE = 0.01  # of the load-balancing loss
    z_weight: NOT_NEGATIVE = 0.001  # of the router z-loss
    # normalization; none: as the scheme's row says
    norm: str = "pre"  # placement, a row of SCHEMES in model.py, or gpas_<row>
    norm_type: Annotated[str | None, NORM_TYPES] = None  # kind of norm
    norm_eps: POSITIVE = 1e-6  # added to the variance in every norm
    norm_affine: bool = True  # norms have a learned gain
    norm_groups: COUNT = 8  # groupnorm: groups of channels
    dyt_alpha: FINITE = 0.5  # dyt: initial slope
    embed_norm: bool | None = None  # normalize the embedding's output
    qk_norm: Annotated[str | None, ("none", "head", "full")] = None  # norm of queries and keys: per head, or full width
    qk_norm_type: Annotated[str | None, NORM_TYPES] = None  # kind of that norm; none: norm_type (Peri-LN: layernorm)
    v_norm: bool | None = None  # values too, in the same way
    mix_ratio: SHARE = 0.25  # mix: share of the layers, from the first, that are Post-LN
    s_position: Annotated[str, S_POSITIONS] = "norm"  # lns: s acts on norm: A(x), branch: h, residual: x + h; gain: in A
    freeze_out_gain: bool = False  # the gains of the norms at B stay at 1 (Peri-LN section 5.3)
    branch_scale: Annotated[str | None, BRANCH_SCALES] = None  # learned factor on the branch: a scalar, or a diagonal
    layerscale_init: FINITE = 1e-4  # layerscale: initial value
    # gpas
    gpas_act: Annotated[str, GPAS_ACTS] = "silu"  # the gate a scales by 1 - act(a)
    gpas_position: Annotated[str, GPAS_POSITIONS] = "sublayer"  # sublayer: the stream; before: x; norm: A(x); module: h
    gpas_stop_gradient: bool = True  # false: naive scaling
    gate_init: FINITE | None = None  # initial value of the gates; none: 0, for relu 0.01
    gate_per: Annotated[str, ("layer", "sublayer")] = "layer"  # one gate for both sub-layers, or one each
    # initialization
    init: Annotated[str | None, INITS] = None  # standard deviations of the matrices; none: as the scheme's row says
    init_std: POSITIVE = 0.02  # of every matrix but the embedding; with olmo, xavier and deepnorm, of head and router
    init_variance: POSITIVE | None = None  # c: they have variance c / n_embd instead (Peri-LN Table 9)
    embed_std: POSITIVE = math.sqrt(2 / 5)  # of the embedding (Scaled Embed, as in GPAS's code; LNS's code has 0.02)

    def __post_init__(self):
        scheme, _ = find_scheme(self.norm)
        for name in ("norm_type", "embed_norm", "qk_norm", "v_norm", "branch_scale", "init"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(scheme, name))
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_hidden is None:
            self.n_hidden = 8 * math.ceil(self.n_embd / 3)
        if self.head_dim is None and self.n_head > 0 and self.n_embd % self.n_head == 0:
            self.head_dim = self.n_embd // self.n_head
        if self.gate_init is None:
            self.gate_init = 0.01 if self.gpas_act == "relu" else 0.0
        if mistake := next(mistakes(self), None):
            raise ValueError(mistake)


# ---------------------------------------------------------------------------------------------------------------------
# The placements


@dataclass(frozen=True)
class Scheme:
    """One row: which of A, B and C carry a norm in which sub-layers, the factors that go with them as functions (alpha
    of L, s of l = 1..L, the layer), and the settings of GPTConfig that the method brings along (each can be set
    otherwise). ValueError for a row that cannot be built."""

    norms: str | Callable  # the places that carry a norm: any of A, B, C; or (config, l, is_mlp) -> these places
    alpha: Callable[[int], float] | None = None  # L -> the factor on the shortcut before C
    s: Callable[[int], float] | None = None  # l -> the factor after A
    omega: bool = False  # a learned factor on the shortcut before C, one per dimension (Admin)
    b2t: bool = False  # the layer's input is added before the MLP's C (bottom-to-top connection)
    # settings of GPTConfig
    norm_type: str = "rmsnorm"
    embed_norm: bool = False
    qk_norm: str = "none"
    v_norm: bool = False
    branch_scale: str = "none"
    init: str = "normal"

    def __post_init__(self):
        for name, of in (("norms", "config, l, is_mlp"), ("alpha", "L"), ("s", "l")):
            value = getattr(self, name)
            if value is None or name == "norms" and isinstance(value, str):
                continue
            try:
                inspect.signature(value).bind(*of.split(", "))
            except TypeError:  # no function, or of other arguments
                raise ValueError(f"{name} is {value!r}; it must be a function of ({of})") from None
        if isinstance(self.norms, str):
            self.places(config=None, l=1, is_mlp=False)

    def places(self, config, l, is_mlp):
        """The places with a norm in a sub-layer of layer l. ValueError for a constant that has no effect there."""
        places = self.norms if isinstance(self.norms, str) else self.norms(config, l, is_mlp)
        if not isinstance(places, str) or not set(places) <= set("ABC") or self.norms == "":
            raise ValueError(f"a scheme needs norms at A, B or C, got {places!r}")
        for constant, place in (("alpha", "C"), ("omega", "C"), ("b2t", "C"), ("s", "A")):
            if getattr(self, constant) and place not in places:
                raise ValueError(f"{constant} acts beside the norm {place}; a sub-layer has norms at {places!r} only")
        return places


def mix_norms(c, l, is_mlp):
    """Mix-LN: the first layers are Post-LN, the others Pre-LN."""
    return "C" if l <= math.floor(c.mix_ratio * c.n_layer + 1e-9) else "A"  # 0.29 * 100 is 28.999999999999996


def hybrid_norms(c, l, is_mlp):
    """HybridNorm* (Zhuo et al. 2025), with normalized q, k, v: y = C(x + attention(x)), then y + MLP(y), so that the
    MLP has no norm of its own. The first layer is Pre-LN."""
    if l == 1:
        return "A"
    return "" if is_mlp else "C"


# A before f, B after f, C after the addition. Each row is also a scheme with gates: gpas_<row>.
SCHEMES = {
    "post": Scheme("C"),  # x <- N(x + f(x)), the original Transformer
    "pre": Scheme("A"),  # x <- x + f(N(x))
    "sandwich": Scheme("AB"),  # x <- x + N(f(N(x)))
    "peri": Scheme("AB", embed_norm=True),  # Peri-LN section 3
    "out": Scheme("B"),  # x <- x + N(f(x)), OLMo 2's reordered norm
    "pre_post": Scheme("AC"),  # x <- N(x + f(N(x))), "A + C" in Peri-LN Table 5
    "deepnorm": Scheme("C", alpha=lambda L: (2 * L) ** 0.25, init="deepnorm"),  # x <- N(alpha x + f(x))
    "mix": Scheme(mix_norms),  # the first quarter of the layers (mix_ratio) post, the rest pre
    "lns": Scheme("A", s=lambda l: l**-0.5),  # x <- x + f(N(x) / sqrt(l)), LNS Eq. 12
    # others that the papers compare with
    "admin": Scheme("C", omega=True),  # x <- N(omega x + f(x)), Liu et al. 2020
    "b2t": Scheme("C", b2t=True),  # the MLP's: x <- N(x + f(x) + layer's input), Takase et al. 2023
    "hybrid": Scheme(hybrid_norms, qk_norm="head", v_norm=True),
    "olmo2": Scheme("B", qk_norm="full"),  # Peri-LN appendix H
    # names under which the papers list pre with one setting
    "group": Scheme("A", norm_type="groupnorm"),
    "dyt": Scheme("A", norm_type="dyt"),
    "layerscale": Scheme("A", branch_scale="layerscale"),
    "skipinit": Scheme("A", branch_scale="skipinit"),
    "scaled_init": Scheme("A", init="scaled"),
    "depth_init": Scheme("A", init="depth"),
    "olmo_init": Scheme("A", init="olmo"),
}


def find_scheme(name):
    """The row of SCHEMES for `name`, and whether it is gated (`gpas_` before it). ValueError lists the known ones."""
    row = name.removeprefix("gpas_")
    if row not in SCHEMES:
        raise ValueError(f"unknown norm {name!r}; known: {', '.join(SCHEMES)}, each also as gpas_<name>")
    return SCHEMES[row], row != name


def gpas(x, scale, keep=None):
    """Gradient-preserving activation scaling (GPAS Eq. 2, 11), sg the stop-gradient, scale = 1 - act(a) of shape (1,):

        gpas(x) = x - act(a) * sg(x)     forward a multiplication by 1 - act(a), backward the identity

    The last lines are this equation. Of a gradient g of the result, x gets g through the first term, and scale gets the
    sum of g * x through the second, which gate_scale hands on to the gate, times -act'(a). `keep` ("input" or "output")
    gives the same up to rounding, in less memory: see ScaleForwardOnly, which needs a single number as scale.
    """
    if keep and scale.numel() == 1:
        return ScaleForwardOnly.apply(x, scale, keep == "output")
    act = 1 - scale
    return x - act * x.detach()


# act: what a gate a becomes (GPAS Table 4).
GPAS_ACTS = {
    "silu": F.silu,
    "identity": lambda a: a,
    "relu": F.relu,  # its gradient at 0 is 0: a gate that starts there never moves
    "leaky_relu": lambda a: F.leaky_relu(a, 0.01),
    "tanh": torch.tanh,
    "scale_silu": lambda a: a * torch.sigmoid(8 * a),
}


def gate_scale(gate, act="silu"):
    """1 - act(a) of gates a, of any shape: what GPAS scales by."""
    scale = 1 - GPAS_ACTS[act](gate)
    # ScaleForwardOnly, the form that saves memory, divides by this number: 0 becomes 1e-7. What is returned has this
    # value and the gradient of scale.
    away_from_zero = torch.copysign(scale.abs().clamp(min=1e-7), scale)
    return scale + (away_from_zero - scale).detach()


# Where s and the gate act: left the setting's value, in the papers' words; right the point in Residual.at. "before" is
# x, "norm" A(x), "branch" h, and "stream" the shortcut where there is a C, x + h without. With s_position=gain there is
# no factor: the gain of A starts at s.
S_POSITIONS = {"norm": "norm", "branch": "branch", "residual": "stream", "gain": None}  # LNS Table 8, GPAS section 3.2
GPAS_POSITIONS = {"sublayer": "stream", "before": "before", "norm": "norm", "module": "branch"}  # GPAS Table 4


# Initial value of the learned factor b on the branch.
BRANCH_SCALES = {
    "none": lambda c: None,
    "skipinit": lambda c: torch.full((1,), c.n_layer**-0.5),  # De and Smith 2020, as in LNS section 6
    "layerscale": lambda c: torch.full((c.n_embd,), c.layerscale_init),  # Touvron et al. 2021, a diagonal matrix
}


class Residual(nn.Module):
    """x -> the scheme's residual around a sub-layer f, x (batch, T, n_embd) in and out:

        h = b * B(f(s * A(x)))
        x <- C(alpha * omega * gpas(x) + h)   if there is a C,   else   x <- gpas(x + h)

    pre_norm is A, out_norm B and post_norm C. s and the gate can act at other points (s_position, gpas_position). The
    module keeps the norms and constants of its layer l = 1..L when blocks are reordered or removed, as analysis does.
    """

    def __init__(self, config, l, is_mlp):
        super().__init__()
        scheme, _ = find_scheme(config.norm)
        self.places = places = scheme.places(config, l, is_mlp)  # such as "AB"
        self.pre_norm = Norm(config, config.n_embd) if "A" in places else nn.Identity()
        self.out_norm = Norm(config, config.n_embd) if "B" in places else nn.Identity()
        self.post_norm = Norm(config, config.n_embd) if "C" in places else None  # without it the gate acts elsewhere
        self.s = scheme.s(l) if scheme.s else 1.0
        self.alpha = scheme.alpha(config.n_layer) if scheme.alpha else 1.0
        self.omega = nn.Parameter(torch.ones(config.n_embd)) if scheme.omega else None
        b = BRANCH_SCALES[config.branch_scale](config)
        self.branch_scale = None if b is None else nn.Parameter(b)
        self.branch_out = nn.Identity()  # a hook on it sees h, before omega, alpha, C or a gate on the stream act
        self.s_place, self.gate_place = S_POSITIONS[config.s_position], GPAS_POSITIONS[config.gpas_position]
        self.stop_gradient = config.gpas_stop_gradient
        # Saves memory (ScaleForwardOnly). Without a C the norm that reads the stream next keeps the gate's output. With
        # one it goes into a sum, which keeps nothing, while A or f keeps the shortcut's input.
        self.keep = "input" if "C" in places and self.gate_place == "stream" else "output"
        if config.freeze_out_gain and "B" in places:
            self.out_norm.weight.requires_grad_(False)

    def forward(self, x, f, scale=None, layer_input=None):
        """x (B, T, n_embd). `scale` is 1 - act(a), shape (1,), None without gates; `layer_input`, of x's shape, is what
        b2t adds to h before C, None without."""
        x = self.at("before", x, scale)
        h = self.branch(x, f, scale)
        if self.post_norm is None:
            return self.at("stream", x + h, scale)
        shortcut = self.at("stream", x, scale)
        if self.omega is not None:
            shortcut = self.omega * shortcut
        if layer_input is not None:
            h = h + layer_input
        return self.post_norm(torch.add(h, shortcut, alpha=self.alpha))  # h + self.alpha * shortcut

    def branch(self, x, f, scale=None):
        """h = b * B(f(s * A(x))), what is added to the shortcut."""
        h = self.out_norm(f(self.at("norm", self.pre_norm(x), scale)))
        if self.branch_scale is not None:
            h = self.branch_scale * h
        return self.branch_out(self.at("branch", h, scale))

    def at(self, point, x, scale):
        """x, multiplied by s and by the gate's scale if they act at this point: "before" the sub-layer, on the "norm"
        A(x), on the "branch" h, or on the "stream", which is the shortcut where there is a C and x + h without."""
        if point == self.s_place and self.s != 1:
            x = self.s * x
        if point == self.gate_place and scale is not None:
            x = gpas(x, scale, self.keep) if self.stop_gradient else scale * x  # without it: naive scaling, GPAS Eq. 12
        return x


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


class Norm(nn.Module):
    """A row of NORM_TYPES over the last dimension, `norm_type` or the configuration's, with parameters of its own.

    Statistics in at least float32. The result has the wider of x's dtype and the gain's, so float32 under autocast, and
    x's without a gain.
    """

    def __init__(self, config, dim, norm_type=None):
        super().__init__()
        self.norm_type, self.dim = norm_type or config.norm_type, dim
        self.eps, self.groups = config.norm_eps, config.norm_groups
        is_dyt = self.norm_type == "dyt"
        self.weight = nn.Parameter(torch.ones(dim)) if config.norm_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if config.norm_affine and is_dyt else None
        self.alpha = nn.Parameter(torch.full((1,), config.dyt_alpha)) if is_dyt else None

    def forward(self, x):
        """x (..., dim) -> the same shape."""
        dtype = torch.float32 if self.weight is None else self.weight.dtype
        y = NORM_TYPES[self.norm_type](self, x.to(torch.promote_types(x.dtype, dtype)))
        return y.to(x.dtype) if self.weight is None else y


def dynamic_tanh(norm, x):
    """tanh(alpha x) * weight + bias, element by element: no statistics at all (Zhu et al. 2025)."""
    y = torch.tanh(norm.alpha * x)
    return y if norm.weight is None else y * norm.weight + norm.bias


# n.weight, the gain, is None with norm_affine=false.
NORM_TYPES = {
    "rmsnorm": lambda n, x: F.rms_norm(x, x.shape[-1:], n.weight, n.eps),  # x / sqrt(mean(x^2) + eps) * weight
    "layernorm": lambda n, x: F.layer_norm(x, x.shape[-1:], n.weight, None, n.eps),  # the same of x - mean(x)
    # LayerNorm of each of `groups` runs of channels of a token, no statistics across tokens (Wu and He 2018)
    "groupnorm": lambda n, x: F.group_norm(x.flatten(0, -2), n.groups, n.weight, None, n.eps).view(x.shape),
    "dyt": dynamic_tanh,
}


class Attention(nn.Module):
    """Causal attention; query head h reads key/value head floor(h / (n_head / n_kv_head)) (GQA, Sparsity Eq. 17)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.rotary, self.qk_norm = (config.head_dim, config.rope_theta, config.rope_scaling), config.qk_norm
        q_width, kv_width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(config.n_embd, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.n_embd, bias=False)
        if config.qk_norm == "head":
            q_width = kv_width = self.head_dim
        has_norm, kind = config.qk_norm != "none", config.qk_norm_type
        self.q_norm = Norm(config, q_width, kind) if has_norm else nn.Identity()
        self.k_norm = Norm(config, kv_width, kind) if has_norm else nn.Identity()
        self.v_norm = Norm(config, kv_width, kind) if config.v_norm else nn.Identity()

    def forward(self, x, cache=None):
        """x (B, T, n_embd) -> the same shape; with a KVCache, x holds the T tokens after those in the cache."""
        (B, T, _), start = x.shape, cache.length if cache else 0
        x = to_matmul_dtype(x)
        q = self.heads(self.q_proj(x), self.q_norm)
        k = self.heads(self.k_proj(x), self.k_norm)
        v = self.heads(self.v_proj(x), self.v_norm)

        table = cache.table if start else rotary_table(cache.max_len if cache else T, *self.rotary, x)
        cos, sin = table[:, start : start + T]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache:
            cache.table = table
            k, v = cache.append(k, v)
        mask = None
        if start > 0 and T > 1:  # new token i sees the cached ones and the new ones up to itself
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
        is_causal, gqa = start == 0 and T > 1, self.n_kv_head < self.n_head
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def heads(self, x, norm):
        """x (B, T, heads * head_dim), normalized over its full width or per head, as (B, heads, T, head_dim)."""
        x = norm(x) if self.qk_norm == "full" else x
        x = x.view(*x.shape[:2], -1, self.head_dim)
        x = norm(x) if self.qk_norm == "head" else x
        return x.transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU: down(SiLU(gate(x)) * up(x))."""

    def __init__(self, config, width):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, width, bias=False)
        self.up_proj = nn.Linear(config.n_embd, width, bias=False)
        self.down_proj = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, x):
        """x (..., n_embd) -> the same shape."""
        x = to_matmul_dtype(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer, l = 1..L: a function of the residual state, (B, T, n_embd) in and out."""

    def __init__(self, config, l):
        super().__init__()
        scheme, is_gated = find_scheme(config.norm)
        n_gates = 1 if config.gate_per == "layer" else 2  # one for both sub-layers (GPAS section 4.1), or one each
        self.gate = nn.Parameter(torch.full((n_gates,), config.gate_init)) if is_gated else None
        self.gpas_act, self.b2t = config.gpas_act, scheme.b2t
        self.attn, self.attn_residual = Attention(config), Residual(config, l, is_mlp=False)
        is_moe = config.n_expert and l >= config.moe_from and (l - config.moe_from) % config.moe_every == 0
        self.mlp = MoE(config) if is_moe else MLP(config, config.n_hidden)
        self.mlp_residual = Residual(config, l, is_mlp=True)

    def forward(self, x, cache=None):
        """x (B, T, n_embd) -> the same shape; with a KVCache, x holds the T tokens after those in the cache."""
        attn_scale = mlp_scale = None
        if self.gate is not None:
            scale = gate_scale(self.gate, self.gpas_act)
            scale = scale.to(self.attn.o_proj.weight.dtype)  # the gates may be float32 where the weights are bfloat16
            attn_scale, mlp_scale = scale[:1], scale[-1:]  # the same number where a layer has one gate
        layer_input = x if self.b2t else None
        x = self.attn_residual(x, lambda u: self.attn(u, cache), attn_scale)
        return self.mlp_residual(x, self.mlp, mlp_scale, layer_input)


class GPT(nn.Module):
    """The decoder: embedding, blocks, final norm, head. The weights are drawn from torch's global seed."""

    def __init__(self, config):
        super().__init__()
        # Drawn first: the modules' own initialization uses the same generator too, though not on the meta device.
        seed = int(torch.randint(2**62, (), device="cpu"))
        if config.vocab_size < 1:  # a configuration may wait for its data to say it
            raise ValueError(f"vocab_size is {config.vocab_size}; it must be at least 1")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_norm = Norm(config, config.n_embd) if config.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, l) for l in range(1, config.n_layer + 1))
        self.norm = Norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.init_weights(seed)
        for doubt in doubts(config):
            warnings.warn(doubt)

    def forward(self, idx, targets=None, caches=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size) and, with targets (B, T), the loss in nats.

        It is the mean cross-entropy over the targets that are not -100; in training mode the auxiliary losses are
        added, weighted. `self.losses` holds the parts without their weights. `caches`, one KVCache a block, says that
        idx continues what they hold.
        """
        x = self.embed_norm(self.embed_tokens(idx))
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i]) if caches else block(x)
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits, None
        loss = cross_entropy(logits, targets)
        self.losses = {"cross_entropy": loss.detach()}
        if self.training:
            for name, (weight, value) in auxiliary_losses(self, logits, targets).items():
                self.losses[name] = value.detach()
                loss = loss + weight * value
        return logits, loss

    # -- the story ends here -----------------------------------------------------------------------------------------

    # -- generation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=None):
        """Continues idx (B, T) by n sampled tokens: (B, T + n). Temperature 0 takes the likeliest token each time.

        Past block_size the window of the last block_size tokens is computed anew for each token, as without a cache.
        """
        if idx.shape[1] < 1:
            raise ValueError("generate needs at least one token to continue")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature {temperature} must be at least 0 and top_k {top_k} at least 1")
        size, new = self.config.block_size, idx
        caches = [KVCache(size) for _ in self.blocks]
        for _ in range(n):
            if idx.shape[1] > size:
                caches, new = None, idx[:, -size:]
            with torch.inference_mode():  # less work for each operation than no_grad
                logits = self(new, caches=caches)[0][:, -1].float()
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                # The largest becomes 0, so that a low temperature makes nothing overflow.
                logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial(F.softmax(logits, dim=-1), 1)
            idx = torch.cat((idx, new), dim=1)
        return idx

    # -- what a training loop asks -----------------------------------------------------------------------------------

    def gates(self):
        """The GPAS gates, one parameter of shape (1,) a layer ((2,) with one a sub-layer); empty without gates."""
        gates = [getattr(block, "gate", None) for block in self.blocks]  # none in a block that a user has replaced
        return [gate for gate in gates if gate is not None]

    @torch.no_grad()
    def set_gates(self, values):
        """Gives layer l's gate the l-th of n_layer values (a number, or one per sub-layer); else ValueError."""
        if len(values) != len(self.gates()):
            raise ValueError(f"{len(values)} gate values for the {len(self.gates())} gates of norm {self.config.norm}")
        for gate, value in zip(self.gates(), values):
            value = torch.as_tensor(value)
            if value.numel() not in (1, gate.numel()):
                raise ValueError(f"{value.numel()} values for a layer with {gate.numel()} gate")
            gate.copy_(value.flatten())

    def optimizer_groups(self, weight_decay, decay_embedding=True):
        """Parameter groups for AdamW: matrices decay (the embedding only with decay_embedding), vectors do not, and the
        gates are a group of their own.

        Frozen parameters are in their groups too (they get no gradient, hence no step), so that they may thaw."""
        gates, embedding = set(self.gates()), self.embed_tokens.weight
        matrices = [p for p in self.parameters() if p.dim() >= 2 and (decay_embedding or p is not embedding)]
        groups = {
            "embedding": ([] if decay_embedding else [embedding], 0.0),
            "matrices": (matrices, weight_decay),
            "vectors": ([p for p in self.parameters() if p.dim() < 2 and p not in gates], 0.0),
            "gates": ([p for p in self.parameters() if p in gates], 0.0),
        }
        return [{"name": n, "params": ps, "weight_decay": decay} for n, (ps, decay) in groups.items() if ps]

    def count_params(self):
        """Parameters: `total`, `active` (those that one token meets) and `non_embedding` (without table and head)."""
        E, k = self.config.n_expert, self.config.n_expert_active
        total = sum(p.numel() for p in self.parameters())
        idle = sum(p.numel() // E * (E - k) for name, p in self.named_parameters() if ".experts." in name)
        vocab = sum(p.numel() for p in {self.embed_tokens.weight, self.lm_head.weight})  # one if they are tied
        return {"total": total, "active": total - idle, "non_embedding": total - vocab}

    def flops_per_token(self, T=None):
        """Floating-point operations of one token's forward and backward pass in sequences of T tokens (block_size).

        6 for each active matrix entry but the embedding table's (a look-up, unless it is the head too), and causal
        attention as it is needed: a query meets (T + 1) / 2 keys on average, with 2 products of head_dim, 2 operations
        each, 3 passes.
        """
        config, T = self.config, T or self.config.block_size
        matrices = self.count_params()["active"] - sum(p.numel() for p in self.parameters() if p.dim() < 2)
        matrices -= 0 if config.tie_embeddings else self.embed_tokens.weight.numel()
        return 6 * matrices + 12 * len(self.blocks) * config.n_head * config.head_dim * (T + 1) / 2

    def mfu(self, tokens_per_s, peak_flops, T=None):
        """Model FLOPs utilization: the share of the hardware's peak (in FLOP/s) that the model's own work reaches."""
        return self.flops_per_token(T) * tokens_per_s / peak_flops

    # -- initialization ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, seed):
        """Draws every matrix from its own generator, on the CPU, and omega from a profiling pass. Vectors get the value
        that they start from: what came from the meta device holds anything. Call it before the model is sharded."""
        c = self.config
        if c.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight  # to_empty makes two of them
        if self.lm_head.weight.is_meta:  # a model of shapes alone
            return
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(self.initial_value(name))
                continue
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            p.copy_(torch.empty(p.shape, device="cpu").normal_(0, initial_std(c, name, p.shape), generator=generator))
        if find_scheme(c.norm)[0].omega:
            generator = torch.Generator().manual_seed(seed)
            idx = torch.randint(c.vocab_size, (4, min(c.block_size, 256)), generator=generator, device="cpu")
            self.profile_omega(idx.to(self.lm_head.weight.device))

    def initial_value(self, name):
        """What every element of the vector parameter `name` starts from; ValueError for one that is not named here."""
        c, (owner, _, kind) = self.config, name.rpartition(".")
        if kind == "gate":
            return c.gate_init
        if kind == "branch_scale":
            return BRANCH_SCALES[c.branch_scale](c)[0].item()
        if owner.endswith(".pre_norm") and kind == "weight" and c.s_position == "gain":
            return self.get_submodule(owner.removesuffix(".pre_norm")).s
        if kind == "alpha" and owner.endswith("norm"):
            return c.dyt_alpha
        starts = {"weight": 1.0, "omega": 1.0, "bias": 0.0}
        if kind not in starts:
            raise ValueError(f"nothing says what {name} starts from: add it to GPT.initial_value")
        return starts[kind]

    @torch.no_grad()
    def profile_omega(self, idx):
        """Admin's initialization from one batch idx (B, T): omega is 1 in the first sub-layer, and then

            omega_{i+1}^2 = Var[omega_i * x_i] + Var[h_i]     accumulated over the branches h_i so far

        with the variances over all elements (Liu et al. 2020, in the form of its code's profiling pass).
        """
        x, omega = self.embed_norm(self.embed_tokens(idx)), 1.0
        for block in self.blocks:
            for residual, f in ((block.attn_residual, block.attn), (block.mlp_residual, block.mlp)):
                residual.omega.fill_(omega)
                omega = math.sqrt((omega * x).var(correction=0) + residual.branch(x, f).var(correction=0))
                x = residual(x, f)


# ---------------------------------------------------------------------------------------------------------------------
# Losses and data types


def cross_entropy(logits, targets):
    """Mean over the targets (B, T) that are not -100, in nats and at least float32; 0 where there is none."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


def auxiliary_losses(model, logits, targets):
    """{name: (weight, loss)} of what training adds to the cross-entropy: the routers' losses, averaged over layers, and
    the head's z-loss, the mean of logsumexp(logits)^2 over the targets that are not -100."""
    config, losses = model.config, {}
    moes = [block.mlp for block in model.blocks if isinstance(getattr(block, "mlp", None), MoE)]
    if moes:
        losses["balance"] = config.balance_weight, torch.stack([moe.balance_loss for moe in moes]).mean()
        losses["z"] = config.z_weight, torch.stack([moe.z_loss for moe in moes]).mean()
    if config.head_z_weight:
        dtype, counts = torch.promote_types(logits.dtype, torch.float32), targets != -100
        squares = logits.to(dtype).logsumexp(-1).square() * counts
        losses["head_z"] = config.head_z_weight, squares.sum() / counts.sum().clamp(min=1)
    return losses


def to_matmul_dtype(x):
    """x as autocast will cast it for the next nn.Linear, so that several of them share one copy."""
    kind = x.device.type
    if x.dtype == torch.float32 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Initialization

INITS = "normal", "scaled", "depth", "olmo", "xavier", "deepnorm"


def initial_std(config, name, shape):
    """The standard deviation from which the matrix with this parameter name and shape is drawn."""
    c, matrix = config, name.removesuffix(".weight").rpartition(".")[2]
    base = c.init_std if c.init_variance is None else math.sqrt(c.init_variance / c.n_embd)  # Peri-LN Table 9
    if matrix == "embed_tokens":
        return c.embed_std
    if matrix in ("lm_head", "router"):
        return base
    l, is_output = int(name.split(".")[1]) + 1, matrix in ("o_proj", "down_proj")
    xavier = math.sqrt(2 / (shape[-1] + shape[-2]))
    return {
        "normal": base,
        "scaled": base / math.sqrt(2 * c.n_layer) if is_output else base,  # LNS section 6
        "depth": base / math.sqrt(2 * l),  # Zhang et al. 2019
        "olmo": 1 / math.sqrt(c.n_embd * (2 * l if is_output else 1)),  # LNS section 5.3.1
        "xavier": xavier,  # Peri-LN Table 8; which of Xavier's two distributions it does not say, here the normal
        "deepnorm": xavier if matrix in ("q_proj", "k_proj") else xavier * (8 * c.n_layer) ** -0.25,
    }[c.init]


# ---------------------------------------------------------------------------------------------------------------------
# Mixture of experts


class MoE(nn.Module):
    """Dropless mixture of experts in place of the MLP (Sparsity Eq. 18), g the router weights of the k chosen experts:

        p = softmax(W x);   y = sum over the k largest p_i of g_i * expert_i(x);   g = p / sum of the k, or p itself

    and the shared experts' output added, or averaged in as one expert of k + 1. After a forward pass `load` (n_expert,)
    counts the tokens of each expert, and in training `balance_loss` and `z_loss` are set; their statistics are those of
    this process's micro-batch, as in published code, not of the global batch.
    """

    def __init__(self, config):
        super().__init__()
        self.top_k, self.normalize = config.n_expert_active, config.normalize_gates
        self.average_shared = config.average_shared
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = Experts(config)
        self.shared = MLP(config, config.n_expert_shared * config.n_hidden) if config.n_expert_shared else None

    def route(self, tokens):
        """The router's logits (N, n_expert) of tokens (N, n_embd), in at least float32."""
        dtype = torch.promote_types(torch.promote_types(tokens.dtype, self.router.weight.dtype), torch.float32)
        kind = tokens.device.type
        with torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):
            return F.linear(tokens.to(dtype), self.router.weight.to(dtype))

    def forward(self, x):
        """x (..., n_embd) -> the same shape, in x's dtype."""
        k, tokens = self.top_k, x.flatten(0, -2)  # (N, n_embd)
        logits = self.route(tokens)
        p = logits.softmax(-1)
        weights, chosen = p.topk(k)  # (N, k)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)

        chosen = chosen.flatten()
        order = chosen.argsort(stable=True)  # row r of the sorted tokens is token order[r] // k
        self.load = torch.zeros_like(p[0], dtype=torch.int64).scatter_add_(0, chosen, torch.ones_like(chosen))
        rows = to_matmul_dtype(tokens).index_select(0, order // k)
        out = self.experts(rows, self.load.cumsum(0).to(torch.int32))
        out = out.index_select(0, order.argsort()).view(-1, k, out.shape[-1])  # (N, k, n_embd), as the tokens came
        y = (out * weights[..., None]).sum(1).to(x.dtype).view(x.shape)

        if self.training:
            # Switch form: n_expert / k * sum of f_i * P_i, f_i the share of tokens sent to i, P_i its mean probability
            f = self.load.to(p.dtype) / len(tokens)
            self.balance_loss = len(f) / k * (f * p.mean(0)).sum()
            self.z_loss = logits.logsumexp(-1).square().mean()
        if self.shared is None:
            return y
        return (k * y + self.shared(x)) / (k + 1) if self.average_shared else y + self.shared(x)

    def __getstate__(self):
        """For copy.deepcopy, which refuses the losses of the last step while they hang on its graph."""
        state = super().__getstate__()
        return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


class Experts(nn.Module):
    """n_expert SwiGLUs, their matrices stacked (expert, out, in), each for its own rows of the input."""

    def __init__(self, config):
        super().__init__()
        E, d, h = config.n_expert, config.n_embd, config.n_hidden
        self.gate_proj, self.up_proj = nn.Parameter(torch.empty(E, h, d)), nn.Parameter(torch.empty(E, h, d))
        self.down_proj = nn.Parameter(torch.empty(E, d, h))

    def forward(self, x, ends):
        """x (rows, n_embd) sorted by expert, those of expert e up to row ends[e] -> the same shape."""
        h = F.silu(GroupedLinear.apply(x, self.gate_proj, ends)) * GroupedLinear.apply(x, self.up_proj, ends)
        return GroupedLinear.apply(h, self.down_proj, ends)


def has_grouped_mm(*tensors):
    """Whether torch's grouped product takes these in the first one's dtype: on CUDA, not in float64, with rows of a
    multiple of 16 bytes. In bfloat16 on an H100 or a B200 it needs no synchronization; elsewhere it multiplies expert
    by expert, as the code below does."""
    size = tensors[0].element_size()
    return all(t.is_cuda and t.dtype != torch.float64 and t.shape[-1] * size % 16 == 0 for t in tensors)


# One opaque operator, so that torch.compile keeps one graph whatever the load of the experts. On the CPU a product per
# expert is as fast as torch's grouped one, takes every dtype, and casts the weights expert by expert.
@torch.library.custom_op("nanonorm::grouped_product", mutates_args=())
def grouped_product(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x (rows, n_in), sorted by expert, times w[e] (n_out, n_in) for expert e's rows: (rows, n_out) of x's dtype."""
    if has_grouped_mm(x, w.transpose(1, 2)):
        return F.grouped_mm(x, w.to(x.dtype).transpose(1, 2), offs=ends)
    out, cuts = x.new_empty(len(x), w.shape[1]), ends[:-1].tolist()
    for x_e, w_e, out_e in zip(x.tensor_split(cuts), w, out.tensor_split(cuts)):
        torch.mm(x_e, w_e.to(x.dtype).t(), out=out_e)
    return out


@torch.library.custom_op("nanonorm::grouped_outer", mutates_args=())
def grouped_outer(g: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient of w: the sum of g (rows, n_out) times x (rows, n_in) over each expert's rows, as `like`."""
    if has_grouped_mm(g, x):
        return F.grouped_mm(g.t(), x, offs=ends).to(like.dtype)
    out, cuts = torch.empty_like(like, dtype=x.dtype), ends[:-1].tolist()
    for g_e, x_e, out_e in zip(g.tensor_split(cuts), x.tensor_split(cuts), out):
        torch.mm(g_e.t(), x_e, out=out_e)
    return out.to(like.dtype)


grouped_product.register_fake(lambda x, w, ends: x.new_empty(x.shape[0], w.shape[1]))
grouped_outer.register_fake(lambda g, x, ends, like: torch.empty_like(like))


class GroupedLinear(torch.autograd.Function):
    """grouped_product with its gradients; not in the operator, since torch.func does not reach into those."""

    generate_vmap_rule = True  # for batched backward passes, such as those of a Jacobian

    @staticmethod
    def forward(x, w, ends):
        return grouped_product(x, w, ends)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w, ends = ctx.saved_tensors
        g = g.contiguous()
        # apply, not grouped_product: so it can be derived once more by g (not by x and w)
        return GroupedLinear.apply(g, w.transpose(1, 2), ends), grouped_outer(g, x, ends, w), None


# ---------------------------------------------------------------------------------------------------------------------
# The form of gpas that saves memory


class ScaleForwardOnly(torch.autograd.Function):
    """gpas in less memory: y = scale * x with dy/dx = I and dy/dscale = x. Of a gradient g of y, scale gets the sum of
    g * x. For this x is kept or, with from_output, y: the sum of g * y, divided by scale, is the same up to rounding.
    The one of the two that a neighbouring operation keeps in any case costs no memory. A hook must not change y in
    place: it would change what is kept."""

    generate_vmap_rule = True  # for batched backward passes, such as those of a Jacobian

    @staticmethod
    def forward(x, scale, from_output):
        return x * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, ctx.from_output = inputs
        ctx.save_for_backward(output if ctx.from_output else x, scale)

    @staticmethod
    def backward(ctx, g):
        if not ctx.needs_input_grad[1]:
            return g, None, None
        kept, scale = ctx.saved_tensors
        total = torch.dot(g.flatten(), kept.detach().to(g.dtype).flatten()).to(scale.dtype).expand_as(scale)  # no copy
        return g, total / scale.detach() if ctx.from_output else total, None


# ---------------------------------------------------------------------------------------------------------------------
# What attention needs: the rotary embedding, keys and values of a generation


def rotary_table(n, head_dim, theta, scaling, like):
    """The table for `rotate`, (2, n, head_dim), of the angles m * theta^(-2i / head_dim) at positions m = 0 .. n - 1:
    their cosines, then their sines, negative in the first half. In at least float32, on the device of the tensor
    `like`; `scaling` is GPTConfig's rope_scaling."""
    options = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    frequency = theta ** -(torch.arange(0, head_dim, 2, **options) / head_dim)
    if scaling:
        frequency = ROPE_SCALINGS[scaling["rope_type"]](frequency, **scaling)
    angle = torch.outer(torch.arange(n, **options), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def rotate(x, cos, sin):
    """Rotary position embedding in the rotate-half convention (Llama's) of x (B, heads, T, head_dim), whose halves
    a, b become a cos - b sin, b cos + a sin."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def llama3_scaling(frequency, rope_type, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3.1's: frequencies that turn fewer than low_freq_factor times within the original context are divided by
    the factor, those that turn more than high_freq_factor times stay, and those between are mixed."""
    turns = original_max_position_embeddings * frequency / (2 * math.pi)
    share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequency * (share + (1 - share) / factor)


# What becomes of the rotary frequencies (head_dim / 2,). The other arguments are the entries of a rope_scaling.
ROPE_SCALINGS = {"linear": lambda frequency, rope_type, factor: frequency / factor, "llama3": llama3_scaling}


class KVCache:
    """Keys and values of one attention layer for the tokens so far, each (B, n_kv_head, up to max_len, head_dim), and
    the rotary table of all max_len positions."""

    def __init__(self, max_len):
        self.max_len, self.length, self.k, self.v, self.table = max_len, 0, None, None, None

    def append(self, k, v):
        """Adds the keys and values of new tokens and returns those of all tokens."""
        if self.k is None:
            B, H, _, D = k.shape
            self.k, self.v = k.new_empty(B, H, self.max_len, D), v.new_empty(B, H, self.max_len, D)
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


# ---------------------------------------------------------------------------------------------------------------------
# Checks of a configuration


def mistakes(config):
    """Why a configuration cannot be built, or which of its settings would have no effect: one sentence each. Only the
    first is to be relied on."""
    for name, hint in typing.get_type_hints(GPTConfig, include_extras=True).items():
        value = getattr(config, name)
        for kind in (hint, *typing.get_args(hint)):  # of `X | None`, X
            if value is None or typing.get_origin(kind) is not Annotated:
                continue
            limits = tuple(kind.__metadata__[0])  # least and greatest value, or the known names
            if isinstance(limits[0], str):
                if value not in limits:
                    yield f"unknown {name} {value!r}; known: {', '.join(limits)}"
            elif not limits[0] <= value <= limits[1]:
                yield f"{name} is {value}; it must lie between {limits[0]} and {limits[1]}"

    c = config
    if c.head_dim is None:
        yield f"n_embd {c.n_embd} is not divisible by n_head {c.n_head}; or give a head_dim"
    if c.head_dim % 2:
        yield f"head_dim (n_embd / n_head unless given) {c.head_dim} is odd; rotation needs pairs"
    if c.n_head % c.n_kv_head:
        yield f"n_head {c.n_head} is not divisible by n_kv_head {c.n_kv_head}"
    if c.n_expert and c.n_expert_active > c.n_expert:
        yield f"n_expert_active {c.n_expert_active} must lie between 1 and n_expert {c.n_expert}"
    if c.moe_from > c.n_layer:
        yield f"moe_from {c.moe_from} must be a layer, of {c.n_layer}"
    if c.rope_scaling is not None:
        yield from rope_mistakes(c.rope_scaling)
    full = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    qk_widths = {"none": (), "head": (c.head_dim,), "full": full}[c.qk_norm]
    kinds = c.norm_type, *(c.qk_norm_type or c.norm_type for _ in qk_widths)
    for kind, width in zip(kinds, (c.n_embd, *qk_widths)):
        if kind == "groupnorm" and (width % c.norm_groups or width == c.norm_groups):
            what = f"norm_groups {c.norm_groups} does not divide the width {width} of a norm"
            yield f"{what} into equal groups of at least 2"

    # A setting that nothing reads, but that is not at its default, is a misunderstanding.
    scheme, gated = find_scheme(c.norm)
    places = all_places(c)
    opposite = copy.copy(c)
    opposite.mix_ratio = 0 if c.mix_ratio >= 0.5 else 1
    s_acts = scheme.s and (c.s_position != "residual" or not any("C" in p for p in places))
    needs = [  # settings, whether they have an effect here, what they need
        ("gpas_act gpas_position gpas_stop_gradient gate_per gate_init", gated, "a gpas_ scheme"),
        ("gpas_position", c.gpas_position != "norm" or all("A" in p for p in places), "a norm at A in every layer"),
        ("s_position", s_acts, "a scheme with s and no C, as lns"),
        ("mix_ratio", all_places(opposite) != places, "a scheme whose first layers differ, such as mix"),
        ("norm_groups", "groupnorm" in kinds, "norm_type=groupnorm"),
        ("dyt_alpha", "dyt" in kinds, "norm_type=dyt"),
        ("norm_affine", c.s_position != "gain", "an s_position other than gain"),
        ("freeze_out_gain", c.norm_affine and any("B" in p for p in places), "gains of norms at B"),
        ("v_norm qk_norm_type", c.qk_norm != "none", "qk_norm=head or full"),
        ("layerscale_init", c.branch_scale == "layerscale", "branch_scale=layerscale"),
        ("init_variance", c.init not in ("deepnorm", "olmo", "xavier"), "another init"),
        ("n_expert_active n_expert_shared normalize_gates", c.n_expert, "n_expert above 0"),
        ("moe_from moe_every balance_weight z_weight", c.n_expert, "n_expert above 0"),
        ("average_shared", c.n_expert_shared, "n_expert_shared above 0"),
    ]
    defaults = {f.name: f.default for f in fields(GPTConfig)} | {"gate_init": 0.0, "v_norm": False}
    for names, has_effect, needed in needs:
        for name in names.split():
            if not has_effect and getattr(c, name) != defaults[name]:
                yield f"{name}={getattr(c, name)} has no effect (norm is {c.norm}): it needs {needed}"


def all_places(config):
    """The places with norms of every sub-layer, attention and MLP of layer 1, 2 ... (the first 1,000 layers)."""
    scheme, layers = find_scheme(config.norm)[0], range(1, min(config.n_layer, 1000) + 1)
    return [scheme.places(config, l, is_mlp) for l in layers for is_mlp in (False, True)]


def rope_mistakes(scaling):
    """What is wrong with a rope_scaling, one sentence each."""
    kind = scaling.get("rope_type")
    if kind not in list(ROPE_SCALINGS):
        yield f"rope_scaling has rope_type {kind!r}; known: {', '.join(ROPE_SCALINGS)}"
        return
    _, *names = inspect.signature(ROPE_SCALINGS[kind]).parameters
    numbers = [value for name, value in scaling.items() if name != "rope_type"]
    if set(scaling) != set(names) or not all(type(n) in (int, float) and 0 < n < 1e30 for n in numbers):
        yield f"rope_scaling of type {kind} needs {', '.join(names)}, positive numbers; got {scaling}"
    elif kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        yield f"rope_scaling needs a low_freq_factor below its high_freq_factor; got {scaling}"


def doubts(config):
    """What the papers advise against in a configuration that can be built, one sentence each."""
    scheme, gated = find_scheme(config.norm)
    if not isinstance(scheme.norms, str) and len(set(all_places(config))) == 1:
        yield f"norm {config.norm}: all of {config.n_layer} layers are of one kind, which is not a mix"
    if scheme.s and config.init in ("scaled", "depth", "olmo"):
        yield f"init {config.init}: LNS did worse with init scaled than alone (LNS section 6)"
    if scheme.s and config.s_position == "residual":
        yield "s_position residual diverged in the paper (LNS Table 8: perplexity 1358)"
    if gated and config.gpas_act == "relu" and config.gate_init <= 0:
        yield f"a ReLU gate at {config.gate_init} has no gradient and never moves: give a gate_init above 0"


# ---------------------------------------------------------------------------------------------------------------------
# Saved models and devices


def load_checkpoint(place):
    """The dict that train.py saved in the folder of a run, or in a .pt file: "model", "config", "settings", "step",
    "tokenizer", "optimizer" ..., its tensors memory-mapped on the CPU. No code in it is ever run.

    ValueError if it is missing, damaged or does not fit together, with the checkpoint before it if that one is whole.
    """
    path = Path(place)
    path = path if path.suffix == ".pt" else path / "ckpt.pt"
    try:
        return read_checkpoint(path)
    except FileNotFoundError:
        reason = f"no checkpoint {path}; train one first, or name its folder"
    except Exception as error:  # torch.load raises whatever its unpickler met in a damaged file
        reason = f"checkpoint {path} cannot be read: {type(error).__name__} {' '.join(str(error).split())[:300]}"
    previous = path.with_name("ckpt_previous.pt")
    if path.name == "ckpt.pt":
        try:
            step = read_checkpoint(previous)["step"]
            reason += f"; the one before it is whole, of step {step}: mv {previous} {path}"
        except FileNotFoundError:
            pass
        except Exception:
            reason += f"; {previous} cannot be read either"
    raise ValueError(reason)


def read_checkpoint(path):
    """load_checkpoint's dict; any exception for a damaged file, and for one whose tensors do not fit its config."""
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():  # torch.load does not look at the checksums
            raise ValueError(f"its part {damaged} is not what was written")
        if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
            raise ValueError("it is compressed: another program has packed it anew")  # memory-mapping would read garbage
    with warnings.catch_warnings(action="ignore"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    kinds = {"model": dict, "optimizer": dict, "config": dict, "settings": dict, "step": int, "tokenizer": dict | None}
    for name, kind in kinds.items():
        if not isinstance(checkpoint[name], kind):
            raise ValueError(f"its {name} is a {type(checkpoint[name]).__name__}")
    if not 0 <= checkpoint["step"] < 2**63:
        raise ValueError(f"its step is {checkpoint['step']}")
    config, weights = GPTConfig(**checkpoint["config"]), checkpoint["model"]
    if config.n_layer > len(weights):  # said before that many layers are built
        raise ValueError(f"its config has {config.n_layer} layers, its model {len(weights)} weights")
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        GPT(config).load_state_dict(weights, assign=True)  # an error where names, shapes or types do not fit
    return checkpoint


def find_device(name):
    """The torch.device of a name; "auto" is cuda where there is one, else cpu. ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0][:200]}") from None
    return device
