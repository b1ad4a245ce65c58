"""A Llama-style decoder in which the place of the normalization is a row of a table.

Every scheme is one residual function around a sub-layer f (attention or MLP), with a norm or nothing at three places,
A before f, B after f and C after the add (Peri-LN Figure 2):

    h = B(f(s * A(x)))
    C present:   x <- C(alpha * gpas(x) + h)      the gate scales the shortcut
    C absent:    x <- gpas(x + h)                 the gate scales the stream

To find a placement read SCHEMES; to see what it does read Residual; to add one write a row. The rest is a plain
decoder: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU, no biases, untied head, a final norm in every
scheme. Docstrings cite the papers by these names:

    GPAS     Gradient-Preserving Activation Scaling, arXiv 2506.22049
    LNS      The Curse of Depth in Large Language Models (LayerNorm Scaling), arXiv 2502.05795
    Peri-LN  Revisiting Normalization Layer in the Transformer Architecture, arXiv 2502.02732
    Sparsity When Does Sparsity Mitigate the Curse of Depth in LLMs, arXiv 2603.15389
"""

import math
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# The placements


@dataclass(frozen=True)
class Scheme:
    """One placement: which of A, B and C carry a norm, and the constants that go with them.

    l = 1..L is the layer. A setting that could have no effect is a ValueError here, where the table is built.
    """

    norms: str  # the places that carry a norm: any of A, B, C
    first_norms: str | None = None  # the same for the first mix_ratio * L layers, where they differ
    alpha: Callable[[int], float] | None = None  # L -> the factor on the shortcut before C
    s: Callable[[int], float] | None = None  # l -> the factor after A
    embed_norm: bool = False  # normalize the embedding's output too
    init: str = "normal"  # row of INITS

    def __post_init__(self):
        for places in (self.norms, self.first_norms or self.norms):
            if not places or not set(places) <= set("ABC"):
                raise ValueError(f"a scheme needs norms at A, B or C, got {places!r}")
            if self.alpha and "C" not in places:
                raise ValueError("alpha scales the shortcut into C: without a norm at C it has no place")
            if self.s and "A" not in places:
                raise ValueError("s follows the norm A: without it s has no place")
        if self.init not in INITS:
            raise ValueError(f"unknown init {self.init!r}; known: {', '.join(INITS)}")


def normal_std(name, shape, config):
    """The same standard deviation, init_std, for every matrix; embed_std for the embedding."""
    return config.embed_std if name == "embed_tokens.weight" else config.init_std


def deepnorm_std(name, shape, config):
    """DeepNorm's Xavier-normal: gain (8L)^-1/4 for v, o and the MLP, 1 for q and k (digest of GPAS's baselines)."""
    if not name.startswith("blocks."):
        return normal_std(name, shape, config)
    gain = 1.0 if "q_proj" in name or "k_proj" in name else (8 * config.n_layer) ** -0.25
    fan_out, fan_in = shape[-2:]
    return gain * math.sqrt(2 / (fan_in + fan_out))


INITS = {"normal": normal_std, "deepnorm": deepnorm_std}

# A before f, B after f, C after the add. Each row is also a scheme with gates: gpas_<row>.
SCHEMES = {
    "post": Scheme("C"),  # x <- N(x + f(x)), the original Transformer
    "pre": Scheme("A"),  # x <- x + f(N(x))
    "sandwich": Scheme("AB"),  # x <- x + N(f(N(x)))
    "peri": Scheme("AB", embed_norm=True),  # Peri-LN section 3
    "out": Scheme("B"),  # x <- x + N(f(x)), OLMo 2's reordered norm
    "pre_post": Scheme("AC"),  # x <- N(x + f(N(x))), "A + C" in Peri-LN Table 5
    "deepnorm": Scheme("C", alpha=lambda L: (2 * L) ** 0.25, init="deepnorm"),  # x <- N(alpha x + f(x))
    "mix": Scheme("A", first_norms="C"),  # Mix-LN: the first layers post, the rest pre
    "lns": Scheme("A", s=lambda l: l**-0.5),  # x <- x + f(N(x) / sqrt(l)), LNS Eq. 12
}


def find_scheme(name):
    """The row of SCHEMES for `name`, and whether it is gated (`gpas_` before it). ValueError lists the known ones."""
    row = name.removeprefix("gpas_")
    if row not in SCHEMES:
        raise ValueError(f"unknown norm {name!r}; known: {', '.join(SCHEMES)}, each also as gpas_<name>")
    return SCHEMES[row], row != name


class Residual(nn.Module):
    """x -> the scheme's residual around a sub-layer f; (B, T, n_embd) in and out.

        h = B(f(s * A(x)))
        x <- C(alpha * gpas(x) + h)   if there is a C,   else   x <- gpas(x + h)

    The constants s and alpha, and the places, belong to layer l = 1..L and stay with the module when its block is moved.
    """

    def __init__(self, config, l):
        super().__init__()
        scheme, _ = find_scheme(config.norm)
        is_first = scheme.first_norms and l <= math.floor(config.mix_ratio * config.n_layer)
        places = scheme.first_norms if is_first else scheme.norms
        self.pre_norm = make_norm(config, config.n_embd) if "A" in places else nn.Identity()
        self.out_norm = make_norm(config, config.n_embd) if "B" in places else nn.Identity()
        self.post_norm = make_norm(config, config.n_embd) if "C" in places else None
        self.s = scheme.s(l) if scheme.s else 1.0
        self.alpha = scheme.alpha(config.n_layer) if scheme.alpha else 1.0

    def forward(self, x, f, scale=None):
        """`scale` is the layer's gate_scale, None for a scheme without gates."""
        h = self.pre_norm(x)
        if self.s != 1:
            h = self.s * h
        h = self.out_norm(f(h))
        if self.post_norm is not None:
            return self.post_norm(torch.add(h, gpas(x, scale, keep="input"), alpha=self.alpha))
        return gpas(x + h, scale, keep="output")


def gate_scale(gate):
    """1 - SiLU(a) of a gate a, shape (1,): what GPAS scales by. Never within 1e-7 of 0, so that one can divide by it."""
    scale = 1 - F.silu(gate)
    away_from_zero = torch.copysign(scale.abs().clamp(min=1e-7), scale)
    return scale + (away_from_zero - scale).detach()


def gpas(x, scale, keep=None):
    """Gradient-preserving activation scaling (GPAS Eq. 2), sg the stop-gradient, 1 - SiLU(a) = scale of shape (1,):

        gpas(x) = x - SiLU(a) * sg(x)     forward a scaling by 1 - SiLU(a), backward the identity

    The last line is this definition. It keeps a copy of x (..., n_embd) for the gate's gradient; with keep="input" or
    "output" that gradient is had from x, or from the result, which the neighbouring operation keeps in any case.
    A scale of None gives x.
    """
    if scale is None:
        return x
    if keep:
        return KeepGradient.apply(x, scale, keep == "output")
    return x - (1 - scale) * x.detach()


class KeepGradient(torch.autograd.Function):
    """y = scale * x with dy/dx = I and dy/dscale = x, where x is kept itself or had as y / scale."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, from_output):
        return x * scale.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, ctx.from_output = inputs
        ctx.save_for_backward(output if ctx.from_output else x, scale)

    @staticmethod
    def backward(ctx, g):
        if not ctx.needs_input_grad[1]:
            return g, None, None
        kept, scale = ctx.saved_tensors
        total = (g * kept.detach()).sum().to(scale.dtype).expand_as(scale)
        return g, total / scale.detach() if ctx.from_output else total, None


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
    n_hidden: int | None = None  # MLP width; none: 8/3 n_embd, rounded up to a multiple of 8
    # normalization
    norm: str = "pre"  # placement, a row of SCHEMES in model.py, or gpas_<row>
    norm_type: str = "rmsnorm"  # rmsnorm or layernorm (with a gain and no bias)
    norm_eps: float = 1e-6  # added to the variance in every norm
    mix_ratio: float = 0.25  # mix: share of the layers, from the first, that are Post-LN
    embed_norm: bool | None = None  # normalize the embedding's output; none: as the scheme's row says
    qk_norm: str = "none"  # queries and keys before the rotation: none, head (per head) or full (whole width)
    # initialization
    init_std: float = 0.02  # of every matrix
    embed_std: float = math.sqrt(2 / 5)  # of the embedding (Scaled Embed, as in GPAS's code; LNS's code has 0.02)
    rope_theta: float = 10000.0  # base of the rotary embedding

    def __post_init__(self):
        scheme, _ = find_scheme(self.norm)
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_hidden is None:
            self.n_hidden = 8 * math.ceil(self.n_embd / 3)
        if self.embed_norm is None:
            self.embed_norm = scheme.embed_norm
        for name in ("block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "n_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"head width n_embd / n_head = {self.n_embd // self.n_head} is odd; the rotation needs pairs")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.norm_type not in NORM_TYPES:
            raise ValueError(f"unknown norm_type {self.norm_type!r}; known: {', '.join(NORM_TYPES)}")
        if self.qk_norm not in ("none", "head", "full"):
            raise ValueError(f"unknown qk_norm {self.qk_norm!r}; known: none, head, full")
        if not 0 <= self.mix_ratio <= 1:
            raise ValueError(f"mix_ratio is {self.mix_ratio}; it must lie between 0 and 1")
        for name in ("norm_eps", "init_std", "embed_std", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head


class Norm(nn.Module):
    """A norm over the last dimension with a gain and no bias; one eps and one gain of its own each.

    Statistics in at least float32: bfloat16 input is computed in the gain's dtype, float32 under autocast.
    """

    def __init__(self, dim, norm_type, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.norm_type, self.eps = norm_type, eps

    def forward(self, x):
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return NORM_TYPES[self.norm_type](x, self.weight, self.eps)


NORM_TYPES = {
    "rmsnorm": lambda x, w, eps: F.rms_norm(x, w.shape, w, eps),  # x / sqrt(mean(x^2) + eps) * w
    "layernorm": lambda x, w, eps: F.layer_norm(x, w.shape, w, None, eps),  # the same of x - mean(x)
}


def make_norm(config, dim):
    """A norm over the last dimension, `dim` wide."""
    return Norm(dim, config.norm_type, config.norm_eps)


def to_matmul_dtype(x):
    """x as autocast will cast it for the next nn.Linear, so that several of them share one copy."""
    kind = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def rotary_table(start, T, head_dim, theta, like):
    """Cosine and sine of the angles m * theta^(-2i / head_dim) of positions m = start ... start + T - 1, each
    (T, head_dim / 2), in at least float32, on the device of `like`. Computed at each use: as cheap as it is to keep, and
    a model on the meta device or in float64 needs no care."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype) / head_dim
    position = torch.arange(start, start + T, device=like.device, dtype=dtype)
    angle = torch.outer(position, theta**-exponent)
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
    """Causal attention; query head h reads key/value head floor(h / (n_head / n_kv_head)) (GQA, Sparsity section 2)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.rope_theta, self.qk_norm = config.rope_theta, config.qk_norm
        q_width, kv_width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(config.n_embd, q_width, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.n_embd, bias=False)
        widths = {"none": None, "head": (self.head_dim, self.head_dim), "full": (q_width, kv_width)}[config.qk_norm]
        self.q_norm = make_norm(config, widths[0]) if widths else nn.Identity()
        self.k_norm = make_norm(config, widths[1]) if widths else nn.Identity()

    def forward(self, x, cache=None):
        """x (B, T, n_embd) -> the same shape; with a KVCache, x holds the T tokens after those in the cache."""
        B, T, _ = x.shape
        x = to_matmul_dtype(x)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(B, T, self.n_head, self.head_dim)
        k = k.view(B, T, self.n_kv_head, self.head_dim)
        v = v.view(B, T, self.n_kv_head, self.head_dim)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)

        start = cache.length if cache else 0
        cos, sin = rotary_table(start, T, self.head_dim, self.rope_theta, like=x)
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

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        x = to_matmul_dtype(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer, l = 1..L: a function of the residual state, (B, T, n_embd) in and out."""

    def __init__(self, config, l):
        super().__init__()
        _, gated = find_scheme(config.norm)
        # One gate for both sub-layers, initial 0, at which gpas is the identity (GPAS section 4.1).
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None
        self.attn, self.attn_residual = Attention(config), Residual(config, l)
        self.mlp, self.mlp_residual = MLP(config), Residual(config, l)

    def forward(self, x, cache=None):
        scale = None if self.gate is None else gate_scale(self.gate)
        x = self.attn_residual(x, lambda h: self.attn(h, cache), scale)
        return self.mlp_residual(x, self.mlp, scale)


class GPT(nn.Module):
    """The decoder: embedding, blocks, final norm, head.

    The weights are drawn from torch's global seed, each parameter from a generator of its own that is seeded by its
    name: two schemes started from one seed have the same matrices, whatever else they contain.
    """

    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size is {config.vocab_size}; it must be at least 1")
        scheme, _ = find_scheme(config.norm)
        if scheme.first_norms and math.floor(config.mix_ratio * config.n_layer) in (0, config.n_layer):
            warnings.warn(f"mix_ratio {config.mix_ratio} of {config.n_layer} layers leaves one kind of layer: not a mix")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_norm = make_norm(config, config.n_embd) if config.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, l) for l in range(1, config.n_layer + 1))
        self.norm = make_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights(int(torch.randint(2**62, (), device="cpu")))

    @torch.no_grad()
    def init_weights(self, seed):
        """Draws every matrix from its own generator, on the CPU; norm gains are 1 and gates 0."""
        scheme, _ = find_scheme(self.config.norm)
        for name, p in self.named_parameters():
            if p.is_meta:
                continue
            if name.endswith(".gate"):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1)
            else:
                generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
                std = INITS[scheme.init](name, p.shape, self.config)
                p.copy_(torch.empty(p.shape).normal_(0, std, generator=generator))

    def forward(self, idx, targets=None, caches=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size) and, with targets (B, T), the mean cross-entropy in nats.

        Targets of -100 are not counted. `caches`, one KVCache a block, says that idx continues what they hold.
        """
        x = self.embed_norm(self.embed_tokens(idx))
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i]) if caches else block(x)
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits, None
        logits32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, F.cross_entropy(logits32.flatten(0, 1), targets.flatten(), ignore_index=-100)

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
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat((idx, new), dim=1)
        return idx

    # -- what a training loop asks --------------------------------------------------------------------------------------

    def gates(self):
        """The GPAS gates, one parameter of shape (1,) a layer; empty for a scheme without them."""
        return [block.gate for block in self.blocks if block.gate is not None]

    def optimizer_groups(self, weight_decay):
        """Parameter groups for AdamW: matrices decay, norm gains do not, and the gates are a group of their own."""
        gates = {id(p) for p in self.gates()}
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = {
            "matrices": ([p for p in trained if p.dim() >= 2], weight_decay),
            "norms": ([p for p in trained if p.dim() < 2 and id(p) not in gates], 0.0),
            "gates": ([p for p in trained if id(p) in gates], 0.0),
        }
        return [{"name": n, "params": ps, "weight_decay": decay} for n, (ps, decay) in groups.items() if ps]

    def count_params(self):
        """Parameters: `total`, `active` (those that one token meets) and `non_embedding` (without table and head)."""
        total = sum(p.numel() for p in self.parameters())
        vocab = self.embed_tokens.weight.numel() + self.lm_head.weight.numel()
        return {"total": total, "active": total, "non_embedding": total - vocab}

    def flops_per_token(self, T=None):
        """Floating-point operations of one token's forward and backward pass in sequences of T tokens (block_size).

        6 for each active matrix entry but the embedding table's (a look-up), and causal attention as it is needed:
        a query meets (T + 1) / 2 keys on average, with 2 products of head_dim, 2 operations each, 3 passes.
        """
        config, T = self.config, T or self.config.block_size
        matrices = sum(p.numel() for p in self.parameters() if p.dim() >= 2) - self.embed_tokens.weight.numel()
        attention = 12 * config.n_layer * config.n_head * config.head_dim * (T + 1) / 2
        return 6 * matrices + attention

    def mfu(self, tokens_per_s, peak_flops, T=None):
        """Model FLOPs utilization: the share of the hardware's peak (in FLOP/s) that the model's own work reaches."""
        return self.flops_per_token(T) * tokens_per_s / peak_flops
