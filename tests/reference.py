"""The placements as the papers write them, one straight line each, for the tests to compare model.py with.

Everything is a function of a dict of parameters by name; nothing is taken from model.py. Rotary embeddings are complex
products, attention is an explicit softmax, and each scheme spells out its own two sub-layers.
"""

import math

import torch


def rms(x, w, eps=1e-6):
    return w * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def layernorm(x, w, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    return rms(x, w, eps)


def rotary(x, theta=10000.0):
    """x (B, T, heads, D): the pair (x_i, x_{i + D/2}) as a complex number, turned by m theta^(-2i/D) at position m."""
    T, D = x.shape[1], x.shape[-1]
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    angle = torch.arange(T, dtype=x.dtype)[:, None] * theta ** (-2 * torch.arange(D // 2, dtype=x.dtype) / D)
    z = z * torch.polar(torch.ones_like(angle), angle)[:, None, :]
    return torch.cat((z.real, z.imag), -1)


def attention(x, P, n_head, n_kv_head, qk_norm="none"):
    B, T, _ = x.shape
    q, k, v = x @ P["q_proj.weight"].T, x @ P["k_proj.weight"].T, x @ P["v_proj.weight"].T
    D = q.shape[-1] // n_head
    if qk_norm == "full":
        q, k = rms(q, P["q_norm.weight"]), rms(k, P["k_norm.weight"])
    q, k, v = q.view(B, T, n_head, D), k.view(B, T, n_kv_head, D), v.view(B, T, n_kv_head, D)
    if qk_norm == "head":
        q, k = rms(q, P["q_norm.weight"]), rms(k, P["k_norm.weight"])
    q, k = rotary(q), rotary(k)
    out = torch.zeros_like(q)
    for h in range(n_head):
        g = h // (n_head // n_kv_head)
        score = q[:, :, h] @ k[:, :, g].transpose(1, 2) / math.sqrt(D)
        score = score + torch.full((T, T), -math.inf, dtype=x.dtype).triu(1)
        out[:, :, h] = torch.softmax(score, -1) @ v[:, :, g]
    return out.reshape(B, T, -1) @ P["o_proj.weight"].T


def mlp(x, P):
    gate = x @ P["gate_proj.weight"].T
    return (gate * torch.sigmoid(gate) * (x @ P["up_proj.weight"].T)) @ P["down_proj.weight"].T


def silu(a):
    return a / (1 + torch.exp(-a))


def forward(P, c, idx, norm=rms, gpas=None):
    """Logits of the model with parameters P (by name) and configuration c; `gpas(x, a)` may be replaced to be wrong."""
    gpas = gpas or (lambda x, a: x - silu(a) * x.detach())
    L, name = c.n_layer, c.norm.removeprefix("gpas_")
    gated = c.norm.startswith("gpas_")
    x = P["embed_tokens.weight"][idx]
    if name == "peri":
        x = norm(x, P["embed_norm.weight"])
    for i in range(L):
        l, B = i + 1, {k.removeprefix(f"blocks.{i}."): p for k, p in P.items() if k.startswith(f"blocks.{i}.")}
        g = (lambda x: gpas(x, B["gate"])) if gated else (lambda x: x)
        for part in ("attn", "mlp"):
            sub = {k.removeprefix(part + "."): p for k, p in B.items()}
            f = (lambda x: attention(x, sub, c.n_head, c.n_kv_head, c.qk_norm)) if part == "attn" else (lambda x: mlp(x, sub))
            N = {k: (lambda x, w=B.get(f"{part}_residual.{k}_norm.weight"): norm(x, w)) for k in ("pre", "out", "post")}
            if name == "post" or (name == "mix" and l <= L // 4):
                x = N["post"](g(x) + f(x))
            elif name == "deepnorm":
                x = N["post"]((2 * L) ** 0.25 * g(x) + f(x))
            elif name in ("pre", "mix"):
                x = g(x + f(N["pre"](x)))
            elif name in ("sandwich", "peri"):
                x = g(x + N["out"](f(N["pre"](x))))
            elif name == "out":
                x = g(x + N["out"](f(x)))
            elif name == "pre_post":
                x = N["post"](g(x) + f(N["pre"](x)))
            elif name == "lns":
                x = g(x + f(N["pre"](x) / math.sqrt(l)))
            else:
                raise AssertionError(c.norm)
    return norm(x, P["norm.weight"]) @ P["lm_head.weight"].T


def loss(logits, targets):
    """Mean cross-entropy over the targets that are not -100."""
    logp = logits - torch.logsumexp(logits, -1, keepdim=True)
    keep = targets != -100
    picked = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(picked * keep).sum() / keep.sum()
