"""The placements as the papers write them, for the tests to compare model.py with. `forward` has them: one branch of
an `if` for each equation, the same for both sub-layers but in b2t and hybrid; rows that differ in a setting alone share
it.

Everything is a function of a dict of parameters by name; nothing is taken from model.py. Rotary embeddings are complex
products, and attention is an explicit softmax.
"""

import math

import torch


def rms(x, w, eps=1e-6):
    return w * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def layernorm(x, w, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    return rms(x, w, eps)


def groupnorm(x, w, groups):
    """LayerNorm of each group of channels."""
    d = x.shape[-1] // groups
    parts = [layernorm(x[..., i * d : (i + 1) * d], w[i * d : (i + 1) * d]) for i in range(groups)]
    return torch.cat(parts, -1)


def normalize(x, P, name, c, kind=None):
    """The norm called `name` of a model with parameters P, of the kind `kind` or that of the configuration."""
    w, kind = P[name + ".weight"] if c.norm_affine else torch.ones(x.shape[-1], dtype=x.dtype), kind or c.norm_type
    if kind == "dyt":
        return torch.tanh(P[name + ".alpha"] * x) * w + (P[name + ".bias"] if c.norm_affine else 0)
    if kind == "groupnorm":
        return groupnorm(x, w, c.norm_groups)
    return {"rmsnorm": rms, "layernorm": layernorm}[kind](x, w)


def rotary(x, theta=10000.0):
    """x (B, T, heads, D): the pair (x_i, x_{i + D/2}) as a complex number, turned by m theta^(-2i/D) at position m."""
    T, D = x.shape[1], x.shape[-1]
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    angle = torch.arange(T, dtype=x.dtype)[:, None] * theta ** (-2 * torch.arange(D // 2, dtype=x.dtype) / D)
    z = z * torch.polar(torch.ones_like(angle), angle)[:, None, :]
    return torch.cat((z.real, z.imag), -1)


def attention(x, P, c):
    B, T, _ = x.shape
    D = c.n_embd // c.n_head
    qkv = {n: x @ P[f"{n}_proj.weight"].T for n in "qkv"}
    with_norm = "qkv" if c.v_norm else "qk"
    for n, heads in zip("qkv", (c.n_head, c.n_kv_head, c.n_kv_head)):
        if c.qk_norm == "full" and n in with_norm:
            qkv[n] = normalize(qkv[n], P, n + "_norm", c, c.qk_norm_type)
        qkv[n] = qkv[n].view(B, T, heads, D)
        if c.qk_norm == "head" and n in with_norm:
            qkv[n] = normalize(qkv[n], P, n + "_norm", c, c.qk_norm_type)
    q, k, v = rotary(qkv["q"]), rotary(qkv["k"]), qkv["v"]
    out = torch.zeros_like(q)
    for h in range(c.n_head):
        g = h // (c.n_head // c.n_kv_head)
        score = q[:, :, h] @ k[:, :, g].transpose(1, 2) / math.sqrt(D)
        score = score + torch.full((T, T), -math.inf, dtype=x.dtype).triu(1)
        out[:, :, h] = torch.softmax(score, -1) @ v[:, :, g]
    return out.reshape(B, T, -1) @ P["o_proj.weight"].T


def mlp(x, P, c):
    gate = x @ P["gate_proj.weight"].T
    return (gate * torch.sigmoid(gate) * (x @ P["up_proj.weight"].T)) @ P["down_proj.weight"].T


def silu(a):
    return a / (1 + torch.exp(-a))


ACTS = {
    "silu": silu,
    "identity": lambda a: a,
    "relu": lambda a: torch.where(a > 0, a, 0.0),
    "leaky_relu": lambda a: torch.where(a > 0, a, 0.01 * a),
    "tanh": lambda a: (torch.exp(a) - torch.exp(-a)) / (torch.exp(a) + torch.exp(-a)),
    "scale_silu": lambda a: a / (1 + torch.exp(-8 * a)),
}


def forward(P, c, idx, gpas=None, norm=None):
    """Logits of the model with parameters P (by name) and configuration c.

    The tests replace `gpas(x, a)` or `norm(x, P, name, c)` by a wrong form, which must be noticed.
    """
    gpas = gpas or (lambda x, a: x - ACTS[c.gpas_act](a) * (x.detach() if c.gpas_stop_gradient else x))
    norm = norm or normalize
    L, name = c.n_layer, c.norm.removeprefix("gpas_")
    gated = c.norm.startswith("gpas_")
    x = P["embed_tokens.weight"][idx]
    if c.embed_norm:
        x = norm(x, P, "embed_norm", c)
    for l in range(1, L + 1):
        layer, layer_input = f"blocks.{l - 1}.", x
        own = {k.removeprefix(layer): p for k, p in P.items() if k.startswith(layer)}
        for part in ("attn", "mlp"):
            sub = {k.removeprefix(part + "."): p for k, p in own.items()}
            f = (lambda x: attention(x, sub, c)) if part == "attn" else (lambda x: mlp(x, sub, c))
            A, B, C = ((lambda x, k=k: norm(x, own, f"{part}_residual.{k}_norm", c)) for k in ("pre", "out", "post"))
            gate = own["gate"][[0 if part == "attn" else -1]] if gated else None
            s = {p: l**-0.5 if name == "lns" and p == c.s_position else 1 for p in ("norm", "branch", "residual")}
            b = own.get(f"{part}_residual.branch_scale", 1)

            # Where the gate and the branch's factor b act. Without them read stream(x) as x, normed(x) as A(x) and
            # branch(h) as h.
            def at(point, x):
                return gpas(x, gate) if gated and c.gpas_position == point else x

            def stream(x):
                return at("sublayer", x)

            def normed(x):
                return at("norm", A(x))

            def branch(h):
                return at("module", b * h)

            x = at("before", x)

            if name == "post" or (name == "mix" and l <= math.floor(L * c.mix_ratio)):
                x = C(stream(x) + branch(f(x)))
            elif name == "deepnorm":
                x = C((2 * L) ** 0.25 * stream(x) + branch(f(x)))
            elif name == "admin":
                x = C(own[f"{part}_residual.omega"] * stream(x) + branch(f(x)))
            elif name == "b2t":
                x = C(stream(x) + branch(f(x)) + (layer_input if part == "mlp" else 0))
            elif name in ("pre", "mix", "group", "dyt", "layerscale", "skipinit", "scaled_init", "depth_init", "olmo_init"):
                x = stream(x + branch(f(normed(x))))
            elif name in ("sandwich", "peri"):
                x = stream(x + branch(B(f(normed(x)))))
            elif name in ("out", "olmo2"):
                x = stream(x + branch(B(f(x))))
            elif name == "pre_post":
                x = C(stream(x) + branch(f(normed(x))))
            elif name == "lns":
                x = stream(s["residual"] * (x + branch(s["branch"] * f(at("norm", A(x) * s["norm"])))))
            elif name == "hybrid" and l == 1:
                x = stream(x + branch(f(normed(x))))
            elif name == "hybrid" and part == "attn":  # the MLP below sees the normalized state twice: in f and beside it
                x = C(stream(x) + branch(f(x)))
            elif name == "hybrid":
                x = stream(x + branch(f(x)))
            else:
                raise NotImplementedError(f"tests/reference.py has no equation of {c.norm}: add it here")
    return norm(x, P, "norm", c) @ P["lm_head.weight"].T


def loss(logits, targets):
    """Mean cross-entropy over the targets that are not -100."""
    logp = logits - torch.logsumexp(logits, -1, keepdim=True)
    keep = targets != -100
    picked = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(picked * keep).sum() / keep.sum()
