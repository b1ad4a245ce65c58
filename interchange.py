"""Models out of this project and into it: gates folded away, Hugging Face folders in both directions.

    python interchange.py --export=hf --out_dir=out-gpas_pre --to=FOLDER      a run's model for transformers, vLLM ...
    python interchange.py --import_from=FOLDER --out_dir=out-llama            open weights as a run's checkpoint
    python interchange.py --help                                              every setting

From a notebook: `fold(model)`, `export_hf(model, folder)`, `import_hf(folder)`.

A gate is a known factor at inference, and a norm undoes factors: a trained gpas_ model equals one without gates that
has other weights, exactly (`fold`). What is folded is a model that other programs know by another name, if they know
one: FAMILIES is one table from their names to ours, read in both directions.
"""

import copy
import math
from dataclasses import replace

import torch
import torch.nn as nn

from model import GPAS_ACTS, GPT, GPTConfig, MoE, Norm, find_scheme

# ---------------------------------------------------------------------------------------------------------------------
# Folding: the gates become plain weights

GPAS_FLAGS = "gpas_act", "gpas_position", "gpas_stop_gradient", "gate_init", "gate_per"


@torch.no_grad()
def fold(model):
    """The GPT without gates that computes what `model` computes: the same logits up to rounding. `model` is untouched.

    The stream x of the gated model is S u, u the stream of the plain one and S a number, 1 after the embedding. With
    g = 1 - act(a), a sub-layer x <- g (x + h(x)) is

        u <- u + h(S u) / S                            and S <- g S

    and one with a norm at C, x <- C(alpha g x + h(x)), is with D = g S and any new S, which C's gain takes up,

        u <- C'(alpha u + h(S u) / D) / S

    Within h(x) = B(b f(s A(x))) the factor 1 / S or 1 / D goes to B's gain, or without B to f's last matrices; a norm
    of S u is A(S u) = sign(S) A'(u) with A's eps / S^2 as the eps of A' (dyt: its slope times S); without A the factor
    S goes to f's first matrices. Gates at other places (gpas_position) and LNS's s are factors of the same kind.

    The result's config has norm without gpas_, a gain in every norm, and s in the gains (s_position=gain). Its norms
    have eps of their own, which a checkpoint does not hold: fold after loading, not before saving. ValueError, naming
    the layer, for a gate that scales by 0, for gates whose product the weights' dtype cannot hold, and for b2t around
    an attention without a norm at C, where the layer's input would need a factor of its own.
    """
    config = model.config
    losses = (getattr(m, name, None) for m in model.modules() if isinstance(m, MoE) for name in ("balance_loss", "z_loss"))
    # A training step's router losses hang on its graph, which deepcopy refuses.
    plain = copy.deepcopy(model, {id(loss): loss.detach() for loss in losses if loss is not None})
    plain.config = replace(
        config,
        norm=config.norm.removeprefix("gpas_"),
        norm_affine=True,
        s_position="gain" if find_scheme(config.norm)[0].s else "norm",
        **{name: GPTConfig.__dataclass_fields__[name].default for name in GPAS_FLAGS},
    )
    for name, norm in plain.named_modules():
        if isinstance(norm, Norm) and norm.weight is None:
            give_gain(norm, name.rpartition(".")[2], plain)

    S = 1.0
    for l, block in enumerate(plain.blocks, 1):
        layer_S, gates = S, gate_scales(block, l)
        block.gate = None
        for residual, f, g in ((block.attn_residual, block.attn, gates[0]), (block.mlp_residual, block.mlp, gates[-1])):
            gate_at = {residual.gpas_position: g}
            s_at, residual.s_position = {residual.s_position: residual.s}, "gain"
            after_norm = s_at.get("norm", 1) * gate_at.get("norm", 1)
            after_branch = s_at.get("branch", 1) * gate_at.get("module", 1)

            S *= gate_at.get("before", 1)
            if isinstance(residual.pre_norm, Norm):
                feed_scaled(residual.pre_norm, S)
                scale_norm(residual.pre_norm, after_norm)
            else:
                scale_inputs(f, S * after_norm)
            if residual.post_norm is None:
                scale_branch(residual, f, after_branch / S)
                S *= gate_at.get("sublayer", 1) * s_at.get("residual", 1)
                continue
            D = S * gate_at.get("sublayer", 1)
            scale_branch(residual, f, after_branch / D)
            feed_scaled(residual.post_norm, D)
            S = 1.0
            if block.b2t and f is block.attn:
                # The MLP's norm is given the layer's input as it is, so the MLP has to come to D = layer_S.
                S = layer_S / math.prod(gates[-1] for place in ("before", "sublayer") if place == residual.gpas_position)
                scale_norm(residual.post_norm, 1 / S)
            elif block.b2t and not math.isclose(D, layer_S):
                raise ValueError(f"layer {l}: b2t adds the layer's input past a gate, which no weight can take up")
        if not all(p.isfinite().all() for p in block.parameters()) or not 1e-30 < abs(S) < 1e30:
            raise ValueError(f"layer {l}: the gates up to here scale by {S:.1e}, more than the weights can take up")
    feed_scaled(plain.norm, S)
    return plain


def gate_scales(block, l):
    """1 - act(a) of the block's gates, one or two numbers; ValueError where one is 0 (to 1e-7, as model.gate_scale)."""
    if block.gate is None:
        return [1.0]
    scales = (1 - GPAS_ACTS[block.gpas_act](block.gate)).tolist()
    if min(map(abs, scales)) <= 1e-7:
        raise ValueError(f"layer {l}: the gate {block.gate.tolist()} scales by 1 - act(a) = 0, and one cannot divide by it")
    return scales


def give_gain(norm, name, model):
    """A gain of ones (dyt: a bias of zeros too) for the norm `name` of a model that has none."""
    c, like = model.config, model.lm_head.weight
    heads = {"q_norm": c.n_head, "k_norm": c.n_kv_head, "v_norm": c.n_kv_head}
    dim = c.head_dim * (heads[name] if c.qk_norm == "full" else 1) if name in heads else c.n_embd
    norm.weight = nn.Parameter(like.new_ones(dim))
    norm.bias = nn.Parameter(like.new_zeros(dim)) if norm.alpha is not None else None


def scale_norm(norm, factor):
    """Makes norm(x) into factor * norm(x)."""
    for p in (norm.weight, norm.bias):
        if p is not None:
            p.mul_(factor)


def feed_scaled(norm, S):
    """Makes norm(x) into norm(S x)."""
    if norm.alpha is not None:  # dyt
        norm.alpha.mul_(S)
    else:
        norm.eps /= S**2
        scale_norm(norm, math.copysign(1, S))


def scale_inputs(f, factor):
    """Makes f(x) into f(factor * x), in the matrices that read x; biases stay."""
    first = "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "router"
    for name, p in f.named_parameters():
        if p.dim() >= 2 and name.removesuffix(".weight").rpartition(".")[2] in first:
            p.mul_(factor)


def scale_branch(residual, f, factor):
    """Makes the branch B(b f) into factor times itself."""
    if isinstance(residual.out_norm, Norm):
        scale_norm(residual.out_norm, factor)
    else:
        scale_outputs(f, factor)


def scale_outputs(f, factor):
    """Makes f into factor * f, in its last matrices; a number, or one per output dimension (n_embd, 1)."""
    for name, p in f.named_parameters():
        if name.removesuffix(".weight").rpartition(".")[2] in ("o_proj", "down_proj"):
            p.mul_(factor)
