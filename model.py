"""A Llama-style decoder in which the place of the normalization is a row of a table.

Every scheme is one residual function around a sub-layer f (attention or MLP), with a norm or nothing at three places,
A before f, B after f and C after the add (Peri-LN Figure 2):

    h = b * B(f(s * A(x)))
    C present:   x <- C(alpha * omega * gpas(x) + h)      the gate scales the shortcut
    C absent:    x <- gpas(x + h)                         the gate scales the stream

The factors s, b, alpha and omega are 1 unless a row or a flag says otherwise. To find a placement read SCHEMES; to
see what it does read Residual; to add one write a row. What is not a matter of place is a flag of GPTConfig that
combines with every row: the kind of norm (NORM_TYPES), a learned scale b of the branch (BRANCH_SCALES), the
initialization (INITS), the gate's activation (GPAS_ACTS) and place. The rest is a plain decoder: RMSNorm, rotary
embeddings, grouped-query attention, SwiGLU or experts, no biases and an untied head unless asked for, a final norm in
every scheme. Docstrings cite the papers by these names:

    GPAS     Gradient-Preserving Activation Scaling, arXiv 2506.22049
    LNS      The Curse of Depth in Large Language Models (LayerNorm Scaling), arXiv 2502.05795
    Peri-LN  Revisiting Normalization Layer in the Transformer Architecture, arXiv 2502.02732
    Sparsity When Does Sparsity Mitigate the Curse of Depth in LLMs, arXiv 2603.15389
"""

import math
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# The placements


@dataclass(frozen=True)
class Scheme:
    """One row: which of A, B and C carry a norm in which sub-layers, the constants that go with them, and the flags of
    GPTConfig that the method brings along (each can be set otherwise).

    l = 1..L is the layer. A setting that could have no effect is a ValueError here, where the table is built.
    """

    norms: str  # the places that carry a norm: any of A, B, C
    mlp_norms: str | None = None  # the same for the MLP, where it differs from the attention
    first_norms: str | None = None  # the same for both in the first layers, where they differ
    n_first: Callable[["GPTConfig"], int] | None = None  # how many layers that are
    alpha: Callable[[int], float] | None = None  # L -> the factor on the shortcut before C
    s: Callable[[int], float] | None = None  # l -> the factor after A
    omega: bool = False  # a learned factor on the shortcut before C, one per dimension (Admin)
    b2t: bool = False  # the layer's input is added before the MLP's C (bottom-to-top connection)
    # flags of GPTConfig
    norm_type: str = "rmsnorm"
    embed_norm: bool = False
    qk_norm: str = "none"
    v_norm: bool = False
    branch_scale: str = "none"
    init: str = "normal"

    def __post_init__(self):
        attention = [self.norms] + ([self.first_norms] if self.first_norms is not None else [])
        mlp = [self.norms if self.mlp_norms is None else self.mlp_norms] + attention[1:]
        if not all(set(places) <= set("ABC") for places in attention + mlp) or not any(attention + mlp):
            raise ValueError(f"a scheme needs norms at A, B or C, got {attention + mlp}")
        if (self.first_norms is None) != (self.n_first is None):
            raise ValueError("first_norms and n_first go together")
        if (self.alpha or self.omega) and not all("C" in places for places in attention + mlp):
            raise ValueError("alpha and omega scale the shortcut into C: without a norm at C they have no place")
        if self.s and not all("A" in places for places in attention + mlp):
            raise ValueError("s follows the norm A: without it s has no place")
        if self.b2t and not all("C" in places for places in mlp):
            raise ValueError("b2t adds the layer's input before the MLP's norm at C: without it b2t has no place")

    def places(self, config, l, is_mlp):
        """The places with a norm in a sub-layer of layer l."""
        if self.n_first and l <= self.n_first(config):
            return self.first_norms
        return self.mlp_norms if is_mlp and self.mlp_norms is not None else self.norms


# A before f, B after f, C after the add. Each row is also a scheme with gates: gpas_<row>.
SCHEMES = {
    "post": Scheme("C"),  # x <- N(x + f(x)), the original Transformer
    "pre": Scheme("A"),  # x <- x + f(N(x))
    "sandwich": Scheme("AB"),  # x <- x + N(f(N(x)))
    "peri": Scheme("AB", embed_norm=True),  # Peri-LN section 3
    "out": Scheme("B"),  # x <- x + N(f(x)), OLMo 2's reordered norm
    "pre_post": Scheme("AC"),  # x <- N(x + f(N(x))), "A + C" in Peri-LN Table 5
    "deepnorm": Scheme("C", alpha=lambda L: (2 * L) ** 0.25, init="deepnorm"),  # x <- N(alpha x + f(x))
    "mix": Scheme("A", first_norms="C", n_first=lambda c: math.floor(c.mix_ratio * c.n_layer + 1e-9)),  # Mix-LN
    "lns": Scheme("A", s=lambda l: l**-0.5),  # x <- x + f(N(x) / sqrt(l)), LNS Eq. 12
    # others that the papers compare with
    "admin": Scheme("C", omega=True),  # x <- N(omega x + f(x)), Liu et al. 2020
    "b2t": Scheme("C", b2t=True),  # the MLP's: x <- N(x + f(x) + layer's input), Takase et al. 2023
    # HybridNorm*, Zhuo et al. 2025: y = x + f(x) with normalized q, k, v; x <- N(y) + MLP(N(y)), so that the norm is
    # the attention's C and the MLP has none; the first layer is Pre-LN with normalized q, k, v.
    "hybrid": Scheme("C", mlp_norms="", first_norms="A", n_first=lambda c: 1, qk_norm="head", v_norm=True),
    "olmo2": Scheme("B", qk_norm="full"),  # Peri-LN appendix H
    # names under which the papers list pre with one flag
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


# What a gate a becomes: GPAS scales by 1 - act(a) (GPAS Table 4).
GPAS_ACTS = {
    "silu": F.silu,
    "identity": lambda a: a,
    "relu": F.relu,  # its gradient at 0 is 0: a gate that starts there never moves
    "leaky_relu": lambda a: F.leaky_relu(a, 0.01),
    "tanh": torch.tanh,
    "scale_silu": lambda a: a * torch.sigmoid(8 * a),
}

# Where it scales (GPAS Table 4), x the stream, h the branch: after the sub-layer (on the shortcut where there is a C),
# before it, after the norm A, after the branch h.
GPAS_POSITIONS = "sublayer", "before", "norm", "module"

# A learned factor b on the branch: its shape and initial value.
BRANCH_SCALES = {
    "none": None,
    "skipinit": lambda c: ((1,), c.n_layer**-0.5),  # De and Smith 2020, as in LNS section 6
    "layerscale": lambda c: ((c.n_embd,), c.layerscale_init),  # Touvron et al. 2021, a diagonal matrix
}


def base_std(config):
    """init_std, or the square root of the variance c / n_embd (Peri-LN section 6.2)."""
    return config.init_std if config.init_variance is None else math.sqrt(config.init_variance / config.n_embd)


def xavier_std(config, name, l, shape):
    """Xavier-normal (Peri-LN section 6.2)."""
    return math.sqrt(2 / (shape[-1] + shape[-2]))


def deepnorm_std(config, name, l, shape):
    """DeepNorm: Xavier-normal, with gain (8L)^-1/4 for v, o and the MLP and 1 for q and k."""
    gain = 1.0 if name in ("q_proj", "k_proj") else (8 * config.n_layer) ** -0.25
    return gain * xavier_std(config, name, l, shape)


OUTPUTS = "o_proj", "down_proj"

# Standard deviation of the matrix `name` (q_proj ... down_proj) of layer l; head and routers have base_std, the
# embedding embed_std. The sources of scaled, depth and olmo are LNS section 6 and 5.3.1.
INITS = {
    "normal": lambda c, name, l, shape: base_std(c),
    "scaled": lambda c, name, l, shape: base_std(c) / math.sqrt(2 * c.n_layer if name in OUTPUTS else 1),
    "depth": lambda c, name, l, shape: base_std(c) / math.sqrt(2 * l),  # Zhang et al. 2019
    "olmo": lambda c, name, l, shape: 1 / math.sqrt(c.n_embd * (2 * l if name in OUTPUTS else 1)),
    "xavier": xavier_std,
    "deepnorm": deepnorm_std,
}


class Residual(nn.Module):
    """x -> the scheme's residual around a sub-layer f; (B, T, n_embd) in and out.

        h = b * B(f(s * A(x)))
        x <- C(alpha * omega * gpas(x) + h)   if there is a C,   else   x <- gpas(x + h)

    b is a learned scale of the branch, omega one of the shortcut (Admin); both are 1 unless asked for.
    The constants s and alpha, and the places, belong to layer l = 1..L and stay with the module wherever its block is.
    """

    def __init__(self, config, l, is_mlp):
        super().__init__()
        scheme, _ = find_scheme(config.norm)
        places = scheme.places(config, l, is_mlp)
        self.pre_norm = Norm(config, config.n_embd) if "A" in places else nn.Identity()
        self.out_norm = Norm(config, config.n_embd) if "B" in places else nn.Identity()
        self.post_norm = Norm(config, config.n_embd) if "C" in places else None
        if config.freeze_out_gain and "B" in places:
            self.out_norm.weight.requires_grad_(False)
        self.alpha = scheme.alpha(config.n_layer) if scheme.alpha else 1.0
        self.omega = nn.Parameter(torch.ones(config.n_embd)) if scheme.omega else None
        self.s, self.s_position = scheme.s(l) if scheme.s else 1.0, config.s_position
        b = BRANCH_SCALES[config.branch_scale]
        self.branch_scale = nn.Parameter(torch.full(*b(config))) if b else None
        self.branch_out = nn.Identity()  # h passes here as it is added: hooks on it see the branch
        self.gpas_position, self.stop_gradient = config.gpas_position, config.gpas_stop_gradient

    def forward(self, x, f, scale=None, bottom=None):
        """x (B, T, n_embd); `scale` is the gate_scale for this sub-layer, shape (1,), None without gates; `bottom`, of
        x's shape, is what b2t adds before C, None without."""
        x = self.gpas_at("before", x, scale)
        h = self.branch(x, f, scale)
        if self.post_norm is not None:
            shortcut = times(self.omega, self.gpas_at("sublayer", x, scale, keep="input"))
            h = h if bottom is None else h + bottom
            return self.post_norm(torch.add(h, shortcut, alpha=self.alpha))  # h + alpha * shortcut
        return self.gpas_at("sublayer", self.s_at("residual", x + h), scale)

    def branch(self, x, f, scale=None):
        """h, what is added to the shortcut."""
        h = self.s_at("norm", self.pre_norm(x))
        return self.after_out_norm(self.out_norm(f(self.gpas_at("norm", h, scale))), scale)

    def after_out_norm(self, h, scale=None):
        """What scales the branch after B: b, and s or the gate in the ablations that have them here."""
        return self.branch_out(self.gpas_at("module", self.s_at("branch", times(self.branch_scale, h)), scale))

    def s_at(self, place, x):
        """s * x if this is the place of s, "norm" but in the ablations of LNS Table 8."""
        return self.s * x if self.s != 1 and place == self.s_position else x

    def gpas_at(self, place, x, scale, keep="output"):
        """gpas(x) if this is its place, "sublayer" but in the ablations of GPAS Table 4; without the stop-gradient it
        is naive scaling (GPAS Eq. 12)."""
        if scale is None or place != self.gpas_position:
            return x
        return gpas(x, scale, keep) if self.stop_gradient else scale * x


def times(factor, x):
    """factor * x, or x without a factor."""
    return x if factor is None else factor * x


def gate_scale(gate, act="silu"):
    """1 - act(a) of a gate a, shape (1,): what GPAS scales by. Never within 1e-7 of 0, so that one can divide by it."""
    scale = 1 - GPAS_ACTS[act](gate)
    away_from_zero = torch.copysign(scale.abs().clamp(min=1e-7), scale)
    return scale + (away_from_zero - scale).detach()


def gpas(x, scale, keep=None):
    """Gradient-preserving activation scaling (GPAS Eq. 2, 11), sg the stop-gradient, scale = 1 - act(a) of shape (1,):

        gpas(x) = x - act(a) * sg(x)     forward a scaling by 1 - act(a), backward the identity

    The last line is this definition. It keeps x (..., n_embd) for the gate's gradient; with keep="input" or "output"
    that gradient is had from x, or from the result, whichever the neighbouring operation keeps in any case.
    """
    if keep:
        return KeepGradient.apply(x, scale, keep == "output")
    return x - (1 - scale) * x.detach()


class KeepGradient(torch.autograd.Function):
    """y = scale * x with dy/dx = I and dy/dscale = x, where x is kept itself or had as y / scale."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, from_output):
        return x * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, ctx.from_output = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(output if ctx.from_output else x, scale)

    @staticmethod
    def backward(ctx, g):
        if not ctx.needs_input_grad[1]:
            return g.to(ctx.dtype), None, None
        kept, scale = ctx.saved_tensors
        total = torch.dot(g.flatten(), kept.detach().to(g.dtype).flatten()).to(scale.dtype).expand_as(scale)  # no copy
        return g.to(ctx.dtype), total / scale.detach() if ctx.from_output else total, None


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


@dataclass
class GPTConfig:
    """The architecture. None means what the comment says and is replaced by it. ValueError for what cannot be built."""

    # model
    block_size: int = 256  # longest sequence, in tokens
    vocab_size: int = 257  # rows of the embedding and of the head
    n_layer: int = 12  # blocks, each attention and MLP
    n_head: int = 4  # query heads
    n_embd: int = 128  # width of the residual stream
    n_kv_head: int | None = None  # key/value heads, a divisor of n_head (1: MQA); none: n_head
    head_dim: int | None = None  # width of a head, even; none: n_embd / n_head
    n_hidden: int | None = None  # MLP width, of each expert too; none: 8/3 n_embd, rounded up to a multiple of 8
    tie_embeddings: bool = False  # the head is the embedding table, and starts with its embed_std
    qkv_bias: bool = False  # queries, keys and values have a bias, as in Qwen2
    rope_theta: float = 10000.0  # base of the rotary embedding
    rope_scaling: dict | None = None  # longer contexts, {"rope_type": a row of ROPE_SCALINGS in model.py, its numbers}
    # mixture of experts
    n_expert: int = 0  # experts in place of the MLP; 0: a dense MLP
    n_expert_active: int = 2  # top-k: experts that a token reaches
    n_expert_shared: int = 0  # experts that every token reaches besides
    normalize_gates: bool = True  # the chosen experts' weights sum to 1; false: as in OLMoE and Sparsity's code
    average_shared: bool = False  # shared experts are averaged in, as in Sparsity's code; false: added
    moe_from: int = 1  # first layer with experts, from 1
    moe_every: int = 1  # experts in every so-many-th layer from there
    balance_weight: float = 0.01  # of the load-balancing loss
    z_weight: float = 0.001  # of the router z-loss
    # normalization; none: as the scheme's row says
    norm: str = "pre"  # placement, a row of SCHEMES in model.py, or gpas_<row>
    norm_type: str | None = None  # rmsnorm, layernorm, groupnorm or dyt
    norm_eps: float = 1e-6  # added to the variance in every norm
    norm_affine: bool = True  # norms have a learned gain
    norm_groups: int = 8  # groupnorm: groups of channels
    dyt_alpha: float = 0.5  # dyt: initial slope
    embed_norm: bool | None = None  # normalize the embedding's output
    qk_norm: str | None = None  # queries and keys before the rotation: none, head (per head) or full (whole width)
    v_norm: bool | None = None  # values too, in the same way
    mix_ratio: float = 0.25  # mix: share of the layers, from the first, that are Post-LN
    s_position: str = "norm"  # lns: s after the norm, on the branch, on the residual; gain: learned, from s
    freeze_out_gain: bool = False  # the gains of the norms at B stay at 1 (Peri-LN section 5.3)
    branch_scale: str | None = None  # learned factor on the branch: none, skipinit (a scalar) or layerscale (diagonal)
    layerscale_init: float = 1e-4  # layerscale: initial value
    # gpas
    gpas_act: str = "silu"  # silu, identity, relu, leaky_relu, tanh, scale_silu
    gpas_position: str = "sublayer"  # scales after the sublayer, before it, after the norm A, on the module's h
    gpas_stop_gradient: bool = True  # false: naive scaling
    gate_init: float | None = None  # initial value of the gates; none: 0, for relu 0.01
    gate_per: str = "layer"  # layer (one gate for both sub-layers) or sublayer (one each)
    # initialization
    init: str | None = None  # standard deviations, a row of INITS in model.py; none: as the scheme's row says
    init_std: float = 0.02  # of every matrix but the embedding
    init_variance: float | None = None  # c: they have variance c / n_embd instead (Peri-LN section 6.2)
    embed_std: float = math.sqrt(2 / 5)  # of the embedding (Scaled Embed, as in GPAS's code; LNS's code has 0.02)

    def __post_init__(self):
        scheme, gated = find_scheme(self.norm)
        for name in ("norm_type", "embed_norm", "qk_norm", "v_norm", "branch_scale", "init"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(scheme, name))
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_hidden is None:
            self.n_hidden = 8 * math.ceil(self.n_embd / 3)
        if self.gate_init is None:
            self.gate_init = 0.01 if self.gpas_act == "relu" else 0.0
        for name in ("block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "n_hidden", "norm_groups", "head_dim"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1 and under 2^31")
        if self.n_expert < 0 or self.n_expert_shared < 0:
            raise ValueError(f"n_expert {self.n_expert} and n_expert_shared {self.n_expert_shared} must be at least 0")
        if self.n_expert and not 1 <= self.n_expert_active <= self.n_expert:
            raise ValueError(f"n_expert_active {self.n_expert_active} must lie between 1 and n_expert {self.n_expert}")
        if self.moe_every < 1 or not 1 <= self.moe_from <= self.n_layer:
            raise ValueError(f"moe_from {self.moe_from} must be a layer and moe_every {self.moe_every} at least 1")
        for name in ("balance_weight", "z_weight", "gate_init", "dyt_alpha", "layerscale_init"):
            value, least = getattr(self, name), 0 if name.endswith("_weight") else -math.inf
            if not (least <= value and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be {'at least 0 and ' * (least == 0)}finite")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; or give a head_dim")
            self.head_dim = self.n_embd // self.n_head
        if self.head_dim % 2:
            raise ValueError(f"head_dim (n_embd / n_head unless given) {self.head_dim} is odd; rotation needs pairs")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        for name, known in {
            "norm_type": NORM_TYPES,
            "qk_norm": ("none", "head", "full"),
            "branch_scale": BRANCH_SCALES,
            "init": INITS,
            "s_position": ("norm", "branch", "residual", "gain"),
            "gpas_act": GPAS_ACTS,
            "gpas_position": GPAS_POSITIONS,
            "gate_per": ("layer", "sublayer"),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if not 0 <= self.mix_ratio <= 1:
            raise ValueError(f"mix_ratio is {self.mix_ratio}; it must lie between 0 and 1")
        for name in ("norm_eps", "init_std", "init_variance", "embed_std", "rope_theta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type")
            if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
                raise ValueError(f"rope_scaling has rope_type {kind!r}; known: {', '.join(ROPE_SCALINGS)}")
            names, given = ROPE_SCALINGS[kind][0], {n: v for n, v in self.rope_scaling.items() if n != "rope_type"}
            are_numbers = all(type(v) in (int, float) and 0 < v < 1e30 for v in given.values())
            if set(given) != set(names) or not are_numbers:
                raise ValueError(f"rope_scaling of type {kind} needs positive numbers {', '.join(names)}; got {given}")
        places = [scheme.places(self, l, m) for l in range(1, self.n_layer + 1) for m in (False, True)]
        has_b, all_have_a = any("B" in p for p in places), all("A" in p for p in places)
        without_effect = {
            "s_position": (self.s_position != "norm" and not scheme.s, "a scheme with s, such as lns"),
            "freeze_out_gain": (self.freeze_out_gain and not (has_b and self.norm_affine), "gains of norms at B"),
            "v_norm": (self.v_norm and self.qk_norm == "none", "qk_norm=head or full"),
            "init_variance": (self.init_variance and self.init in ("deepnorm", "olmo", "xavier"), "another init"),
            "norm_affine": (not self.norm_affine and self.s_position == "gain", "an s_position other than gain"),
        }
        defaults = {"gpas_act": "silu", "gpas_position": "sublayer", "gpas_stop_gradient": True, "gate_per": "layer"}
        for name, default in {**defaults, "gate_init": 0.0}.items():
            without_effect[name] = not gated and getattr(self, name) != default, "a gpas_ scheme"
        for name, default in {"n_expert_shared": 0, "moe_from": 1, "moe_every": 1}.items():
            without_effect[name] = not self.n_expert and getattr(self, name) != default, "n_expert above 0"
        without_effect["average_shared"] = self.average_shared and not self.n_expert_shared, "n_expert_shared above 0"
        if gated and self.gpas_position == "norm":
            without_effect["gpas_position"] = not all_have_a, "a norm at A in every layer"
        for name, (is_wrong, needed) in without_effect.items():
            if is_wrong:
                raise ValueError(f"{name}={getattr(self, name)} has no effect (norm is {self.norm}): it needs {needed}")
        if self.norm_type == "groupnorm":
            full = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
            widths = {"none": (), "head": (self.head_dim,), "full": full}
            for width in (self.n_embd, *widths[self.qk_norm]):
                if width % self.norm_groups:
                    raise ValueError(f"norm_groups {self.norm_groups} does not divide the width {width} of a norm")


class Norm(nn.Module):
    """A row of NORM_TYPES over the last dimension, with an eps and parameters of its own.

    Statistics in at least float32. The result has the wider of x's dtype and the gain's, so float32 under autocast, and
    x's without a gain.
    """

    def __init__(self, config, dim):
        super().__init__()
        self.norm_type, self.eps, self.groups = config.norm_type, config.norm_eps, config.norm_groups
        is_dyt = config.norm_type == "dyt"
        self.weight = nn.Parameter(torch.ones(dim)) if config.norm_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if config.norm_affine and is_dyt else None
        self.alpha = nn.Parameter(torch.full((1,), config.dyt_alpha)) if is_dyt else None

    def forward(self, x):
        """x (..., dim) -> the same shape."""
        dtype = torch.float32 if self.weight is None else self.weight.dtype
        y = NORM_TYPES[self.norm_type](self, x.to(torch.promote_types(x.dtype, dtype)))
        return y.to(x.dtype) if self.weight is None else y


def group_norm(norm, x):
    """LayerNorm of each of `groups` runs of channels of a token (Wu and He 2018), no statistics across tokens."""
    return F.group_norm(x.reshape(-1, x.shape[-1]), norm.groups, norm.weight, None, norm.eps).view(x.shape)


def dynamic_tanh(norm, x):
    """tanh(alpha x) * weight + bias, element by element: no statistics at all (Zhu et al. 2025)."""
    y = torch.tanh(norm.alpha * x)
    return y if norm.weight is None else y * norm.weight + norm.bias


NORM_TYPES = {
    "rmsnorm": lambda n, x: F.rms_norm(x, x.shape[-1:], n.weight, n.eps),  # x / sqrt(mean(x^2) + eps) * weight
    "layernorm": lambda n, x: F.layer_norm(x, x.shape[-1:], n.weight, None, n.eps),  # the same of x - mean(x)
    "groupnorm": group_norm,
    "dyt": dynamic_tanh,
}


def to_matmul_dtype(x):
    """x as autocast will cast it for the next nn.Linear, so that several of them share one copy."""
    kind = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def llama3_scaling(frequency, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3.1's: frequencies that turn fewer than low_freq_factor times within the original context are divided by
    the factor, those that turn more than high_freq_factor times stay, and those between are mixed."""
    turns = original_max_position_embeddings * frequency / (2 * math.pi)
    share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequency * (share + (1 - share) / factor)


# What becomes of the rotary frequencies (head_dim / 2,): the names of the numbers of a rope_scaling, and the function.
ROPE_SCALINGS = {
    "linear": (("factor",), lambda frequency, factor: frequency / factor),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        llama3_scaling,
    ),
}


def rotary_table(start, T, head_dim, theta, like, scaling=None):
    """Cosine and sine of the angles m * theta^(-2i / head_dim) of positions m = start ... start + T - 1, each
    (T, head_dim / 2), in at least float32, on the device of `like`; `scaling` is GPTConfig's rope_scaling. Computed at
    each use: it costs no more than keeping it, and a model on the meta device or in float64 needs no care."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype) / head_dim
    position = torch.arange(start, start + T, device=like.device, dtype=dtype)
    frequency = theta**-exponent
    if scaling:
        numbers = {name: value for name, value in scaling.items() if name != "rope_type"}
        frequency = ROPE_SCALINGS[scaling["rope_type"]][1](frequency, **numbers)
    angle = torch.outer(position, frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary position embedding in the rotate-half convention (Llama's) of x (B, heads, T, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of one attention layer for the tokens so far, each (B, n_kv_head, up to max_len, head_dim)."""

    def __init__(self, max_len):
        self.max_len, self.length, self.k, self.v = max_len, 0, None, None

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


class Attention(nn.Module):
    """Causal attention; query head h reads key/value head floor(h / (n_head / n_kv_head)) (GQA, Sparsity Eq. 17)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.rope_theta, self.rope_scaling, self.qk_norm = config.rope_theta, config.rope_scaling, config.qk_norm
        q_width, kv_width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(config.n_embd, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.n_embd, bias=False)
        widths = {"none": None, "head": (self.head_dim, self.head_dim), "full": (q_width, kv_width)}[config.qk_norm]
        self.q_norm = Norm(config, widths[0]) if widths else nn.Identity()
        self.k_norm = Norm(config, widths[1]) if widths else nn.Identity()
        self.v_norm = Norm(config, widths[1]) if config.v_norm else nn.Identity()

    def forward(self, x, cache=None):
        """x (B, T, n_embd) -> the same shape; with a KVCache, x holds the T tokens after those in the cache."""
        B, T, _ = x.shape
        x = to_matmul_dtype(x)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
        q = q.view(B, T, self.n_head, self.head_dim)
        k = k.view(B, T, self.n_kv_head, self.head_dim)
        v = v.view(B, T, self.n_kv_head, self.head_dim)
        if self.qk_norm == "head":
            q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)

        start = cache.length if cache else 0
        cos, sin = rotary_table(start, T, self.head_dim, self.rope_theta, x, self.rope_scaling)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache:
            k, v = cache.append(k, v)
        mask = None
        if start > 0:  # new token i sees the cached ones and the new ones up to itself
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
        gqa = self.n_kv_head < self.n_head
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


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


class MoE(nn.Module):
    """Dropless mixture of experts in place of the MLP (Sparsity Eq. 18), g the weights of the k chosen experts:

        p = softmax(W x);   y = sum over the k largest p_i of g_i * expert_i(x);   g = p / sum of the k, or p itself

    and the shared experts' output added, or averaged in as one expert of k + 1. After a forward pass `load` (n_expert,)
    counts the tokens of each expert, and in training `balance_loss` and `z_loss` are set; their statistics are those of
    this process's micro-batch, as in published code, not of the global batch.
    """

    def __init__(self, config):
        super().__init__()
        self.top_k, self.normalize_gates = config.n_expert_active, config.normalize_gates
        self.average_shared = config.average_shared
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = Experts(config)
        self.shared = MLP(config, config.n_expert_shared * config.n_hidden) if config.n_expert_shared else None

    def route(self, tokens):
        """The router's logits (N, n_expert) of tokens (N, n_embd), in at least float32."""
        dtype = torch.promote_types(torch.promote_types(tokens.dtype, self.router.weight.dtype), torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.to(dtype), self.router.weight.to(dtype))

    def forward(self, x):
        """x (..., n_embd) -> the same shape, in x's dtype."""
        k, tokens = self.top_k, x.flatten(0, -2)  # (N, n_embd)
        logits = self.route(tokens)
        p = logits.softmax(-1)
        gates, chosen = p.topk(k)  # (N, k)
        if self.normalize_gates:
            gates = gates / gates.sum(-1, keepdim=True)

        chosen = chosen.flatten()
        order = chosen.argsort(stable=True)  # row r of the sorted tokens is token order[r] // k
        self.load = torch.zeros_like(p[0], dtype=torch.int64).scatter_add_(0, chosen, torch.ones_like(chosen))
        rows = to_matmul_dtype(tokens).index_select(0, order // k)
        out = self.experts(rows, self.load.cumsum(0).to(torch.int32))
        out = out.index_select(0, order.argsort()).view(-1, k, out.shape[-1])  # (N, k, n_embd), as the tokens came
        y = (out * gates[..., None]).sum(1).to(x.dtype).view(x.shape)

        if self.training:
            # Switch form: n_expert / k * sum of f_i * P_i, f_i the share of tokens sent to i, P_i its mean probability
            f = self.load.to(p.dtype) / len(tokens)
            self.balance_loss = len(f) / k * (f * p.mean(0)).sum()
            self.z_loss = logits.logsumexp(-1).square().mean()
        if self.shared is None:
            return y
        return (k * y + self.shared(x)) / (k + 1) if self.average_shared else y + self.shared(x)


def rows_of_experts(ends):
    """(expert, slice of its rows) for every expert."""
    ends = ends.tolist()
    return enumerate(map(slice, [0, *ends], ends))


def has_grouped_mm(*tensors):
    """Whether torch's grouped product, which needs no synchronization, takes these: on CUDA, rows of k * 16 bytes."""
    return all(t.is_cuda and t.dtype != torch.float64 and t.shape[-1] * t.element_size() % 16 == 0 for t in tensors)


# One opaque operator, so that torch.compile keeps one graph whatever the load of the experts. On the CPU a product per
# expert is as fast as torch's grouped one, takes every dtype, and casts the weights expert by expert.
@torch.library.custom_op("nanonorm::grouped_product", mutates_args=())
def grouped_product(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x (rows, n_in), sorted by expert, times w[e] (n_out, n_in) for expert e's rows: (rows, n_out) of x's dtype."""
    if has_grouped_mm(x, w.transpose(1, 2)):
        return F.grouped_mm(x, w.to(x.dtype).transpose(1, 2), offs=ends)
    out = x.new_empty(len(x), w.shape[1])
    for e, rows in rows_of_experts(ends):
        torch.mm(x[rows], w[e].to(x.dtype).t(), out=out[rows])
    return out


@torch.library.custom_op("nanonorm::grouped_outer", mutates_args=())
def grouped_outer(g: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient of w: the sum of g (rows, n_out) times x (rows, n_in) over each expert's rows, as `like`."""
    if has_grouped_mm(g, x):
        return F.grouped_mm(g.t(), x, offs=ends).to(like.dtype)
    out = torch.empty_like(like)
    for e, rows in rows_of_experts(ends):
        out[e] = g[rows].t() @ x[rows]
    return out


grouped_product.register_fake(lambda x, w, ends: x.new_empty(x.shape[0], w.shape[1]))
grouped_outer.register_fake(lambda g, x, ends, like: torch.empty_like(like))


class GroupedLinear(torch.autograd.Function):
    """grouped_product with its gradients; not in the operator, since torch.func does not reach into those."""

    generate_vmap_rule = True

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
        return grouped_product(g, w.transpose(1, 2), ends), grouped_outer(g, x, ends, w), None


def make_mlp(config, l):
    """The MLP of layer l: experts from layer moe_from on, in every moe_every-th layer, where there are any."""
    is_moe = config.n_expert and l >= config.moe_from and (l - config.moe_from) % config.moe_every == 0
    return MoE(config) if is_moe else MLP(config, config.n_hidden)


class Block(nn.Module):
    """One layer, l = 1..L: a function of the residual state, (B, T, n_embd) in and out."""

    def __init__(self, config, l):
        super().__init__()
        scheme, gated = find_scheme(config.norm)
        # One gate for both sub-layers (GPAS section 4.1), or one each.
        n_gates = {"layer": 1, "sublayer": 2}[config.gate_per]
        self.gate = nn.Parameter(torch.full((n_gates,), config.gate_init)) if gated else None
        self.gpas_act, self.b2t = config.gpas_act, scheme.b2t
        self.attn, self.attn_residual = Attention(config), Residual(config, l, is_mlp=False)
        self.mlp, self.mlp_residual = make_mlp(config, l), Residual(config, l, is_mlp=True)

    def gate_scales(self):
        """1 - act(a) for the attention's residual and for the MLP's, each (1,); None, None without gates."""
        if self.gate is None:
            return None, None
        scale = gate_scale(self.gate, self.gpas_act)
        return scale[:1], scale[-1:]

    def forward(self, x, cache=None):
        """x (B, T, n_embd) -> the same shape; with a KVCache, x holds the T tokens after those in the cache."""
        attn_scale, mlp_scale = self.gate_scales()
        bottom = x if self.b2t else None
        x = self.attn_residual(x, lambda h: self.attn(h, cache), attn_scale)
        return self.mlp_residual(x, self.mlp, mlp_scale, bottom)


def doubts(config):
    """What the papers advise against in a configuration that can be built, one sentence each."""
    scheme, gated = find_scheme(config.norm)
    if scheme.n_first and scheme.n_first(config) in (0, config.n_layer):
        yield f"norm {config.norm}: {scheme.n_first(config)} of {config.n_layer} layers are its first kind: not a mix"
    if scheme.s and config.init in ("scaled", "depth", "olmo"):
        yield f"norm {config.norm} with init {config.init}: LNS did worse with init scaled than alone (LNS section 6)"
    if scheme.s and config.s_position == "residual":
        yield "s_position residual diverged in the paper (LNS Table 8: perplexity 1358)"
    if gated and config.gpas_act == "relu" and config.gate_init <= 0:
        yield f"a ReLU gate that starts at {config.gate_init} has no gradient and never moves: give a gate_init above 0"


class GPT(nn.Module):
    """The decoder: embedding, blocks, final norm, head.

    The weights are drawn from torch's global seed, each parameter from a generator of its own that is seeded by its
    name: models started from one seed have the same draws for the matrices that they share.
    """

    def __init__(self, config):
        super().__init__()
        # Drawn first: torch's own initialization of the modules below draws too, but not on the meta device.
        seed = int(torch.randint(2**62, (), device="cpu"))
        if config.vocab_size < 1:
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
        for message in doubts(config):
            warnings.warn(message)

    @torch.no_grad()
    def init_weights(self, seed):
        """Draws every matrix from its own generator, on the CPU; vectors get their constant initial values, and omega
        those of a profiling pass."""
        c = self.config
        for name, p in self.named_parameters():
            if p.is_meta:
                continue
            if p.dim() == 1:
                p.fill_(self.initial_value(name))
                continue
            matrix = name.removesuffix(".weight").rpartition(".")[2]
            if matrix == "embed_tokens":
                std = c.embed_std
            elif matrix in ("lm_head", "router"):
                std = base_std(c)
            else:
                std = INITS[c.init](c, matrix, int(name.split(".")[1]) + 1, p.shape)
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            p.copy_(torch.empty(p.shape, device="cpu").normal_(0, std, generator=generator))
        if find_scheme(c.norm)[0].omega and not self.lm_head.weight.is_meta:
            generator = torch.Generator().manual_seed(seed)
            idx = torch.randint(c.vocab_size, (4, min(c.block_size, 256)), generator=generator, device="cpu")
            self.profile_omega(idx.to(self.lm_head.weight.device))

    def initial_value(self, name):
        """What every element of the vector parameter `name` starts from."""
        c, (owner, _, kind) = self.config, name.rpartition(".")
        if kind == "gate":
            return c.gate_init
        if kind == "branch_scale":
            return BRANCH_SCALES[c.branch_scale](c)[1]
        if owner.endswith(".pre_norm") and kind == "weight" and c.s_position == "gain":
            return self.get_submodule(owner.removesuffix(".pre_norm")).s
        return {"weight": 1.0, "omega": 1.0, "bias": 0.0, "alpha": c.dyt_alpha}[kind]

    @torch.no_grad()
    def profile_omega(self, idx):
        """Admin's initialization from one batch idx (B, T): omega is 1 in the first sub-layer, and then

            omega_{i+1}^2 = Var[omega_i * x_i] + Var[f_i(x_i)]     accumulated over the branches so far

        with the variances over all elements (Liu et al. 2020, in the form of its code's profiling pass).
        """
        x, omega = self.embed_norm(self.embed_tokens(idx)), 1.0
        for block in self.blocks:
            for residual, f in ((block.attn_residual, block.attn), (block.mlp_residual, block.mlp)):
                residual.omega.fill_(omega)
                omega = math.sqrt((omega * x).var(correction=0) + residual.branch(x, f).var(correction=0))
                x = residual(x, f)

    def forward(self, idx, targets=None, caches=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size) and, with targets (B, T), the loss in nats.

        It is the mean cross-entropy over the targets that are not -100; in training mode the routers' losses, averaged
        over layers and weighted, are added, and `self.losses` holds the parts. `caches`, one KVCache a block, says that
        idx continues what they hold.
        """
        x = self.embed_norm(self.embed_tokens(idx))
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i]) if caches else block(x)
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits, None
        logits32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits32.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        loss = total / (targets != -100).sum().clamp(min=1)  # 0 where every target is masked
        self.losses = {"cross_entropy": loss.detach()}
        moes = [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]
        if self.training and moes:
            balance = torch.stack([moe.balance_loss for moe in moes]).mean()
            z = torch.stack([moe.z_loss for moe in moes]).mean()
            self.losses |= {"balance": balance.detach(), "z": z.detach()}
            loss = loss + self.config.balance_weight * balance + self.config.z_weight * z
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=None):
        """Continues idx (B, T) by n sampled tokens: (B, T + n). Temperature 0 takes the likeliest token each time.

        Past block_size the window of the last block_size tokens is computed anew for each token, as without a cache.
        """
        if idx.shape[1] < 1:
            raise ValueError("generate needs at least one token to continue")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature {temperature} must be at least 0 and top_k {top_k} at least 1")
        size, caches, new = self.config.block_size, None, idx
        for _ in range(n):
            if idx.shape[1] > size:
                caches, new = None, idx[:, -size:]
            elif caches is None:
                caches = [KVCache(size) for _ in self.blocks]
            logits = self(new, caches=caches)[0][:, -1].float()
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                logits = logits - logits.amax(-1, keepdim=True)  # at most 0: no overflow at a low temperature
                logits = logits / max(temperature, 1e-30)
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial(F.softmax(logits, dim=-1), 1)
            idx = torch.cat((idx, new), dim=1)
        return idx

    # -- what a training loop asks -------------------------------------------------------------------------------------

    def gates(self):
        """The GPAS gates, one parameter of shape (1,) a layer ((2,) with one a sub-layer); empty without gates."""
        return [block.gate for block in self.blocks if block.gate is not None]

    @torch.no_grad()
    def set_gates(self, values):
        """Gives layer l's gate the l-th of n_layer values (a number, or one per sub-layer); else ValueError."""
        if len(values) != len(self.gates()):
            raise ValueError(f"{len(values)} gate values for the {len(self.gates())} gates of norm {self.config.norm}")
        for gate, value in zip(self.gates(), values):
            gate.copy_(torch.as_tensor(value))

    def optimizer_groups(self, weight_decay):
        """Parameter groups for AdamW: matrices decay, vectors do not, and the gates are a group of their own.

        Frozen parameters are in their groups too (they get no gradient, hence no step), so that they may thaw."""
        gates, parameters = {id(p) for p in self.gates()}, list(self.parameters())
        groups = {
            "matrices": ([p for p in parameters if p.dim() >= 2], weight_decay),
            "vectors": ([p for p in parameters if p.dim() < 2 and id(p) not in gates], 0.0),
            "gates": (self.gates(), 0.0),
        }
        return [{"name": n, "params": ps, "weight_decay": decay} for n, (ps, decay) in groups.items() if ps]

    def count_params(self):
        """Parameters: `total`, `active` (those that one token meets) and `non_embedding` (without table and head)."""
        total = sum(p.numel() for p in self.parameters())
        vocab = sum(p.numel() for p in {self.embed_tokens.weight, self.lm_head.weight})  # one if they are tied
        return {"total": total, "active": total - self.count_idle(), "non_embedding": total - vocab}

    def count_idle(self):
        """Parameters of the experts that a token does not reach."""
        E, k = self.config.n_expert, self.config.n_expert_active
        return sum(p.numel() // E * (E - k) for m in self.modules() if isinstance(m, Experts) for p in m.parameters())

    def flops_per_token(self, T=None):
        """Floating-point operations of one token's forward and backward pass in sequences of T tokens (block_size).

        6 for each active matrix entry but the embedding table's (a look-up, unless it is the head too), and causal
        attention as it is needed: a query meets (T + 1) / 2 keys on average, with 2 products of head_dim, 2 operations
        each, 3 passes.
        """
        config, T = self.config, T or self.config.block_size
        matrices = sum(p.numel() for p in self.parameters() if p.dim() >= 2)
        matrices -= 0 if config.tie_embeddings else self.embed_tokens.weight.numel()
        attention = 12 * config.n_layer * config.n_head * config.head_dim * (T + 1) / 2
        return 6 * (matrices - self.count_idle()) + attention

    def mfu(self, tokens_per_s, peak_flops, T=None):
        """Model FLOPs utilization: the share of the hardware's peak (in FLOP/s) that the model's own work reaches."""
        return self.flops_per_token(T) * tokens_per_s / peak_flops


# ---------------------------------------------------------------------------------------------------------------------
# Saved models and devices


def load_checkpoint(place):
    """The dict that train.py saved in the folder of a run, or in a .pt file: "model", "config", "settings", "step",
    "tokenizer", "optimizer" ..., its tensors memory-mapped on the CPU. No code in it is ever run.

    ValueError if it is missing, damaged or absurd, with the checkpoint before it if that one is whole.
    """
    path = Path(place)
    path = path if path.suffix == ".pt" else path / "ckpt.pt"
    previous, advice = path.with_name("ckpt_previous.pt"), ""
    if path != previous and previous.exists():
        try:
            advice = f"; the one before it is whole, of step {read_checkpoint(previous)['step']}: mv {previous} {path}"
        except Exception:
            advice = f"; {previous} cannot be read either"
    if not path.exists():
        raise ValueError(f"no checkpoint {path}{advice or '; train one first, or name its folder'}")
    try:
        return read_checkpoint(path)
    except Exception as error:  # torch.load raises whatever its unpickler met in a damaged file
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(f"checkpoint {path} cannot be read: {type(error).__name__} {reason}{advice}") from None


def read_checkpoint(path):
    """load_checkpoint's dict; any exception for a damaged file, and for one whose tensors do not fit its config."""
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():  # torch.load does not look at the checksums
            raise ValueError(f"its part {damaged} is not what was written")
    with warnings.catch_warnings(action="ignore"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    kinds = {"model": dict, "optimizer": dict, "config": dict, "settings": dict, "step": int, "tokenizer": dict | None}
    for name, kind in kinds.items():
        if not isinstance(checkpoint[name], kind):
            raise ValueError(f"its {name} is a {type(checkpoint[name]).__name__}")
    if not 0 <= checkpoint["step"] < 2**63:
        raise ValueError(f"its step is {checkpoint['step']}")
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        expected = GPT(GPTConfig(**checkpoint["config"])).state_dict()
    weights = checkpoint["model"]
    if weights.keys() != expected.keys():
        different = sorted(map(str, weights.keys() ^ expected.keys()))
        raise ValueError(f"its weights do not fit its config: {', '.join(different[:3])}")
    for name, like in expected.items():
        value = weights[name]
        if not torch.is_tensor(value) or not value.is_floating_point() or value.shape != like.shape:
            what = f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
            raise ValueError(f"its weight {name} is {what}, its config needs {tuple(like.shape)}")
    return checkpoint


def find_device(name):
    """The torch.device of a name; "auto" is cuda where there is one, else cpu. ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0][:200]}") from None
    return device
