"""Models out of this project and into it: gates folded away, Hugging Face folders in both directions.

    python interchange.py --export=hf --out_dir=out-gpas_pre --to=FOLDER      a run's model for transformers, vLLM ...
    python interchange.py --import_from=FOLDER --out_dir=out-llama            open weights as a run's checkpoint
    python interchange.py --help                                              every setting

From a notebook: `fold(model)`, `export_hf(model, folder)`, `import_hf(folder)`.

A gate is a known factor at inference, and a norm undoes factors: a trained gpas_ model equals one without gates that
has other weights, exactly (`fold`). What is folded is a model that other programs know by another name, if they know
one: FAMILIES is one table from their names to ours, read in both directions.
"""

import base64
import copy
import json
import math
import re
import shutil
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn as nn

import prepare_data
from analyze import load_run
from configurator import UserError, configure, fits, kind_name, run
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
    # A training step's router losses hang on its graph, which deepcopy refuses.
    moes = [m for m in model.modules() if isinstance(m, MoE) and hasattr(m, "z_loss")]
    plain = copy.deepcopy(model, {id(loss): loss.detach() for m in moes for loss in (m.balance_loss, m.z_loss)})
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
            at = dict.fromkeys(("before", "norm", "branch", "stream"), 1.0)  # the factors at the places of Residual.at
            at[residual.gate_place] *= g
            if residual.s_place:
                at[residual.s_place] *= residual.s
            residual.s_place = None

            S *= at["before"]
            if isinstance(residual.pre_norm, Norm):
                feed_scaled(residual.pre_norm, S)
                scale_norm(residual.pre_norm, at["norm"])
            else:
                scale_inputs(f, S * at["norm"])
            if residual.post_norm is None:
                scale_branch(residual, f, at["branch"] / S)
                S *= at["stream"]
                continue
            D = S * at["stream"]
            scale_branch(residual, f, at["branch"] / D)
            feed_scaled(residual.post_norm, D)
            S = 1.0
            if block.b2t and f is block.attn:
                # The MLP's norm is given the layer's input as it is, so the MLP has to come to D = layer_S.
                S = layer_S / (gates[-1] if residual.gate_place in ("before", "stream") else 1)
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
        raise ValueError(f"layer {l}: the gate {block.gate.tolist()} scales by 1 - act(a) = 0, which cannot be undone")
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


# ---------------------------------------------------------------------------------------------------------------------
# The table of architectures that transformers knows

# Their name of a tensor -> ours. Several of ours are stacked along the output dimension; {e} is a row of our experts.
MODEL = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
# Within model.layers.{i} and blocks.{i}
ATTENTION = {f"self_attn.{n}_proj.{kind}": f"attn.{n}_proj.{kind}" for n in "qkvo" for kind in ("weight", "bias")}
QK_NORM = {f"self_attn.{n}_norm.weight": f"attn.{n}_norm.weight" for n in "qk"}
PRE_NORMS = {
    "input_layernorm.weight": "attn_residual.pre_norm.weight",
    "post_attention_layernorm.weight": "mlp_residual.pre_norm.weight",
}
OUT_NORMS = {
    "post_attention_layernorm.weight": "attn_residual.out_norm.weight",
    "post_feedforward_layernorm.weight": "mlp_residual.out_norm.weight",
}
PRE_AND_OUT_NORMS = {
    **PRE_NORMS,
    "post_self_attn_layernorm.weight": "attn_residual.out_norm.weight",
    "post_mlp_layernorm.weight": "mlp_residual.out_norm.weight",
}
DENSE = {f"mlp.{n}_proj.weight": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
DENSE_STACKED = {
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
EXPERTS = {
    "mlp.gate.weight": "mlp.router.weight",
    **{f"mlp.experts.{{e}}.{n}_proj.weight": f"mlp.experts.{n}_proj" for n in ("gate", "up", "down")},
}
EXPERTS_MIXTRAL = {
    "block_sparse_moe.gate.weight": "mlp.router.weight",
    "block_sparse_moe.experts.{e}.w1.weight": "mlp.experts.gate_proj",
    "block_sparse_moe.experts.{e}.w2.weight": "mlp.experts.down_proj",
    "block_sparse_moe.experts.{e}.w3.weight": "mlp.experts.up_proj",
}
EXPERTS_GRANITE = {
    "block_sparse_moe.router.layer.weight": "mlp.router.weight",
    "block_sparse_moe.input_linear.weight": ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    "block_sparse_moe.output_linear.weight": "mlp.experts.down_proj",
    "shared_mlp.input_linear.weight": ("mlp.shared.gate_proj.weight", "mlp.shared.up_proj.weight"),
    "shared_mlp.output_linear.weight": "mlp.shared.down_proj.weight",
}

# Their name of a setting -> the field of GPTConfig.
SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_hidden",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "max_position_embeddings": "block_size",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
HEAD_DIM = {"head_dim": "head_dim"}
MANY = {"num_experts": "n_expert", "num_experts_per_tok": "n_expert_active", "norm_topk_prob": "normalize_gates"}
LOCAL = {"num_local_experts": "n_expert", "num_experts_per_tok": "n_expert_active"}
OPTIONAL = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, "norm_topk_prob": False}


@dataclass(frozen=True)
class Family:
    """One row: an architecture, which of our models it is, and its names."""

    architecture: str  # the class in transformers
    tensors: dict  # their name -> ours, within a layer
    settings: dict = field(default_factory=dict)  # their name -> ours, besides SETTINGS
    constants: dict = field(default_factory=dict)  # their settings that have to be so, and are where a file is silent
    rope_theta: float = 10000.0  # where a file is silent
    rotated: float = 1.0  # the share of a head that is, where a file is silent
    head_dim: int | None = None  # where a file is silent; none: n_embd / n_head
    is_interleaved: bool = False  # rotates the pairs (2i, 2i + 1) where we rotate (i, i + head_dim / 2)
    write: Callable[[GPTConfig], dict] = lambda c: {}  # their settings that are not ours under another name
    read: Callable[[dict], dict] = lambda theirs: {}  # the reverse; takes its keys out of `theirs`; UserError
    # which of our models it is: see `misfits`
    places: str = "A"
    qk_norm: str = "none"
    qkv_bias: bool = False
    experts: str = "none"
    any_layer: bool = False  # experts may be in some layers only
    any_head_dim: bool = True  # head_dim may differ from n_embd / n_head


def qwen3_moe_settings(c):
    dense = [l - 1 for l in range(1, c.n_layer + 1) if l < c.moe_from or (l - c.moe_from) % c.moe_every]
    return {"moe_intermediate_size": c.n_hidden, "mlp_only_layers": dense, "decoder_sparse_step": 1}


def qwen3_moe_fields(theirs):
    """moe_from, moe_every and n_hidden from Qwen3-MoE's list of layers and two widths."""
    L, dense = theirs["num_hidden_layers"], theirs.pop("mlp_only_layers", None) or []
    step, width = theirs.pop("decoder_sparse_step", 1), theirs.pop("moe_intermediate_size", None)
    layers = [l for l in range(1, L + 1) if l - 1 not in dense and l % step == 0]
    every = layers[1] - layers[0] if len(layers) > 1 else L
    if not layers or layers != list(range(layers[0], L + 1, every)):
        raise UserError(f"experts in layers {layers} of {L}: ours are in every so-many-th layer (moe_from, moe_every)")
    if len(layers) < L and width != theirs["intermediate_size"]:
        dense = theirs["intermediate_size"]
        raise UserError(f"experts of width {width} beside dense layers of width {dense}: ours are of one width")
    return {"moe_from": layers[0], "moe_every": every, "n_hidden": width}


def granite_settings(c):
    return {"shared_intermediate_size": c.n_expert_shared * c.n_hidden, "attention_multiplier": c.head_dim**-0.5}


def granite_fields(theirs):
    """The shared experts' number from their common width; its attention scale has to be the usual one."""
    scale = theirs.pop("attention_multiplier", 1.0)
    usual = (theirs["hidden_size"] // theirs["num_attention_heads"]) ** -0.5
    if not math.isclose(scale, usual, rel_tol=1e-6):
        raise UserError(f"attention_multiplier is {scale}; only 1 / sqrt(head_dim) = {usual} is known here")
    number, rest = divmod(theirs.pop("shared_intermediate_size", 0), theirs["intermediate_size"])
    if rest:
        raise UserError(f"shared_intermediate_size is no multiple of the experts' width {theirs['intermediate_size']}")
    return {"n_expert_shared": number}


SILU = {"hidden_act": "silu"}
NO_BIAS = {**SILU, "attention_bias": False}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", {**ATTENTION, **PRE_NORMS, **DENSE}, HEAD_DIM, {**NO_BIAS, "mlp_bias": False}
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", {**ATTENTION, **PRE_NORMS, **DENSE}, {}, SILU, qkv_bias=True, any_head_dim=False
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**ATTENTION, **QK_NORM, **PRE_NORMS, **DENSE},
        HEAD_DIM,
        NO_BIAS,
        head_dim=128,
        qk_norm="head",
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        {**ATTENTION, **PRE_AND_OUT_NORMS, **DENSE_STACKED},
        HEAD_DIM,
        NO_BIAS,
        rotated=0.5,
        head_dim=128,
        write=lambda c: {"partial_rotary_factor": 1.0},
        places="AB",
        is_interleaved=True,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {**ATTENTION, **QK_NORM, **OUT_NORMS, **DENSE},
        {},
        NO_BIAS,
        places="B",
        qk_norm="full",
        any_head_dim=False,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {**ATTENTION, **PRE_NORMS, **EXPERTS_MIXTRAL},
        {**LOCAL, **HEAD_DIM},
        SILU,
        rope_theta=1e6,
        experts="gates sum to 1",
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {**ATTENTION, **QK_NORM, **PRE_NORMS, **EXPERTS},
        MANY,
        NO_BIAS,
        qk_norm="full",
        experts="any gates",
        any_head_dim=False,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {**ATTENTION, **QK_NORM, **PRE_NORMS, **DENSE, **EXPERTS},
        {**MANY, **HEAD_DIM},
        NO_BIAS,
        write=qwen3_moe_settings,
        read=qwen3_moe_fields,
        qk_norm="head",
        experts="any gates",
        any_layer=True,
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedForCausalLM",
        {**ATTENTION, **PRE_NORMS, **EXPERTS_GRANITE},
        LOCAL,
        {**NO_BIAS, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0},
        write=granite_settings,
        read=granite_fields,
        experts="gates sum to 1, and shared",
        any_head_dim=False,
    ),
}
SCHEME_OF_PLACES = {"A": "pre", "AB": "sandwich", "B": "out"}  # what an imported model is in SCHEMES

# Their settings without effect on a trained model's logits. Any other that is set is an error.
NO_EFFECT = set(
    "architectures model_type torch_dtype dtype transformers_version bos_token_id eos_token_id pad_token_id use_cache "
    "initializer_range pretraining_tp attention_dropout output_router_logits router_aux_loss_coef router_jitter_noise "
    "max_window_layers".split()
)


def misfits(family, model):
    """What of a folded model the family does not have, one phrase each; none where it is one of the family."""
    c = model.config
    residuals = [r for block in model.blocks for r in (block.attn_residual, block.mlp_residual)]
    places = {places_of(r) or "none" for r in residuals}
    experts, routed = {isinstance(block.mlp, MoE) for block in model.blocks}, family.experts.partition(",")[0]
    if c.norm_type != "rmsnorm":
        yield f"its norm is not {c.norm_type}"
    if places != {family.places}:
        yield f"it has norms at {family.places}, not {' and '.join(sorted(places))}"
    if c.qk_norm != family.qk_norm:
        yield f"its qk_norm is {family.qk_norm}, not {c.qk_norm}"
    if c.v_norm:
        yield "it has no norm on values"
    if c.qkv_bias != family.qkv_bias:
        yield "it needs qkv_bias" if family.qkv_bias else "it has no qkv_bias"
    if c.head_dim * c.n_head != c.n_embd and not family.any_head_dim:
        yield "its head_dim is n_embd / n_head"
    if True in experts and routed == "none":
        yield "it has no experts"
    if False in experts and not (family.any_layer and True in experts or routed == "none"):
        yield "it has experts in every layer" if not family.any_layer else "it has experts"
    if True in experts and bool(c.n_expert_shared) != family.experts.endswith("shared"):
        yield "it has no shared experts" if c.n_expert_shared else "it has shared experts"
    if True in experts and routed == "gates sum to 1" and not c.normalize_gates:
        yield "the gates of its experts sum to 1 (normalize_gates)"


def places_of(residual):
    """The places of the norms of a Residual, such as AB."""
    norms = {"A": residual.pre_norm, "B": residual.out_norm, "C": residual.post_norm}
    return "".join(place for place, norm in norms.items() if isinstance(norm, Norm))


def find_family(model, name=None):
    """The name of a folded model's family, which has to be `name` if that is given; UserError says what is amiss."""
    if name is not None and name not in FAMILIES:
        raise UserError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    lacks = {n: list(misfits(family, model)) for n, family in FAMILIES.items() if name in (None, n)}
    fewest = min(map(len, lacks.values()))
    nearest = {n: phrases for n, phrases in lacks.items() if len(phrases) == fewest}
    if fewest:
        what = "has no counterpart in transformers; the nearest are" if name is None else "is not"
        reasons = "; ".join(f"{n}, but {' and '.join(phrases)}" for n, phrases in nearest.items())
        raise UserError(f"a model of norm {model.config.norm} {what} {reasons}")
    return next(iter(nearest))


# ---------------------------------------------------------------------------------------------------------------------
# Their tensors and ours


def names(family, config, ours):
    """(their name, our names, expert or None) for each tensor of a model whose parameters are called `ours`."""
    rows = [(*row, None) for row in MODEL.items()]
    for i in range(config.n_layer):
        for theirs, our in family.tensors.items():
            our = tuple(f"blocks.{i}.{name}" for name in ([our] if isinstance(our, str) else our))
            for e in range(config.n_expert) if "{e}" in theirs else [None]:
                rows.append((f"model.layers.{i}.{theirs.format(e=e)}", our, e))
    rows = [(theirs, (our,) if isinstance(our, str) else our, e) for theirs, our, e in rows]
    return [row for row in rows if row[1][0] in ours]


def swap_rotation(theirs, tensor, head_dim, is_back):
    """The rows of a query or key matrix (heads * head_dim, ...) with each head's pairs (i, i + head_dim / 2) brought
    next to each other, or back; other tensors as they are."""
    if not theirs.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        return tensor
    pairs = (head_dim // 2, 2) if is_back else (2, head_dim // 2)
    return tensor.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)


def to_theirs(model, family):
    """{their name: tensor} of a folded model."""
    ours, tensors = dict(model.named_parameters()), {}
    for theirs, our, e in names(family, model.config, ours):
        parts = [ours[name] if e is None else ours[name][e] for name in our]
        tensor = torch.cat(parts, -2) if len(parts) > 1 else parts[0]
        if family.is_interleaved:
            tensor = swap_rotation(theirs, tensor, model.config.head_dim, is_back=False)
        tensors[theirs] = tensor.detach().contiguous()
    return tensors


def from_theirs(get, available, family, config, dtype=torch.float32):
    """A GPT(config) of the tensors get(their name), of which `available` are there. UserError for one that is
    missing, left over, or of another shape."""
    with torch.device("meta"):
        model = GPT(config)
    ours = {name: p.shape for name, p in model.named_parameters()}
    rows = names(family, config, ours)
    # Old files hold the rotary table as well, and some of tied models the table as the head.
    left = {n for n in available if not n.endswith("rotary_emb.inv_freq")} - {row[0] for row in rows}
    left -= {"lm_head.weight"} if config.tie_embeddings else set()
    missing = [row[0] for row in rows if row[0] not in available]
    if missing or left:
        what, which = ("no tensor", missing[0]) if missing else ("a tensor that has no place here,", min(left))
        raise UserError(f"the weights have {what} {which}")
    state = {name: torch.empty(shape, dtype=dtype) for name, shape in ours.items()}
    for theirs, our, e in rows:
        tensor, targets = get(theirs), [state[name] if e is None else state[name][e] for name in our]
        expected = torch.Size([len(targets) * targets[0].shape[0], *targets[0].shape[1:]])
        if targets[0].dim() == 3:
            expected = torch.Size([targets[0].shape[0], len(targets) * targets[0].shape[1], targets[0].shape[2]])
        if tensor.shape != expected:
            raise UserError(f"{theirs} has shape {tuple(tensor.shape)} where the config gives {tuple(expected)}")
        if family.is_interleaved:
            tensor = swap_rotation(theirs, tensor, config.head_dim, is_back=True)
        for target, part in zip(targets, tensor.chunk(len(targets), -2) if len(targets) > 1 else [tensor]):
            target.copy_(part)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Export


@torch.no_grad()
def absorb(plain):
    """Puts into the matrices of a folded model, in place, what is a constant factor of a branch (b; the average with
    shared experts) or a function of the token alone (the embedding's norm)."""
    c = plain.config
    for block in plain.blocks:
        for residual, f in ((block.attn_residual, block.attn), (block.mlp_residual, block.mlp)):
            if residual.branch_scale is not None:
                if isinstance(residual.out_norm, Norm):
                    residual.out_norm.weight.mul_(residual.branch_scale)
                else:
                    scale_outputs(f, residual.branch_scale[:, None])
                residual.branch_scale = None
        if isinstance(block.mlp, MoE) and c.average_shared and c.n_expert_shared:
            scale_outputs(block.mlp.experts, c.n_expert_active / (c.n_expert_active + 1))
            scale_outputs(block.mlp.shared, 1 / (c.n_expert_active + 1))
            block.mlp.average_shared = False
    if c.embed_norm and c.tie_embeddings:
        raise UserError("the embedding's norm cannot go into a table that is the head too (tie_embeddings)")
    plain.embed_tokens.weight.copy_(plain.embed_norm(plain.embed_tokens.weight))
    plain.embed_norm = nn.Identity()
    # A model whose layers were pruned has fewer than its config says.
    absorbed = dict(branch_scale="none", layerscale_init=1e-4, average_shared=False, embed_norm=False)
    plain.config = replace(c, n_layer=len(plain.blocks), **absorbed)
    return plain


EXPORTED = "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"


def export_hf(model, folder, tokenizer=None, family=None, max_difference=1e-3, overwrite=False):
    """Writes `model`, folded, to `folder` for transformers: config.json, model.safetensors in the weights' dtype, and
    the files of `tokenizer` (a checkpoint's tokenizer state). Returns the family's name and the largest difference of
    its logits to the model's on random tokens, most of which is rounding and that all norms there have one eps.

    UserError where no family is the model's, and, with nothing written, for a difference above `max_difference`. What
    `overwrite` replaces is an earlier export and nothing else.
    """
    folder = Path(folder).resolve()
    if folder.exists():
        others = sorted({p.name for p in folder.iterdir()} - set(EXPORTED)) if folder.is_dir() else ["a file"]
        if others:
            raise UserError(f"{folder} is not an export, it holds {others[0]}: name another folder")
        if not overwrite:
            raise UserError(f"{folder} exists; --overwrite replaces it")
    plain = absorb(fold(model))
    name = find_family(plain, family)
    tensors, c = to_theirs(plain, FAMILIES[name]), plain.config
    dtype = plain.lm_head.weight.dtype
    settings = config_of(name, c, dtype)
    save_file = prepare_data.optional("safetensors.torch", "safetensors").save_file
    if tokenizer is not None:
        settings["bos_token_id"] = settings["eos_token_id"] = prepare_data.build_encoding(tokenizer).eot_token

    # The model that someone gets who reads this, with its one eps, against the one that was given.
    back = from_theirs(tensors.__getitem__, tensors, *fields_of(settings), dtype).to(plain.lm_head.weight.device)
    idx = torch.randint(c.vocab_size, (2, min(c.block_size, 256)), generator=torch.Generator().manual_seed(0))
    idx = idx.to(plain.lm_head.weight.device)
    with torch.no_grad():
        difference = (back(idx)[0] - model(idx)[0]).abs().max().item()
    if not difference <= max_difference:
        raise UserError(f"as {name} its logits differ by {difference:.1e}, more than max_difference {max_difference}")

    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            save_file({n: t.cpu() for n, t in tensors.items()}, partial / "model.safetensors", metadata={"format": "pt"})
        except Exception as error:  # safetensors has an error class of its own, for a full disk too
            raise UserError(f"cannot write {folder}: {error}") from None
        files = {"config.json": settings, **tokenizer_files(tokenizer, c)}
        for file, content in files.items():
            (partial / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return name, difference


def config_of(name, c, dtype):
    """The config.json of a GPTConfig as the family `name`; rotary settings by the names that every version reads."""
    family = FAMILIES[name]
    return {
        "architectures": [family.architecture],
        "model_type": name,
        "dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(c, our) for theirs, our in {**SETTINGS, **family.settings}.items()},
        **family.constants,
        **family.write(c),
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Import


def import_hf(folder, block_size=None):
    """The GPT in a Hugging Face folder, float32: config.json and model.safetensors, or its shards and their index.

    UserError for a family that is not in FAMILIES, for a setting that has an effect and no place in GPTConfig, and for
    tensors that are missing, too many or of another shape. `block_size` shortens the context.
    """
    folder = Path(folder)
    try:
        family, config = fields_of(read_json(folder / "config.json"))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder}/config.json is damaged ({type(error).__name__}: {error})") from None
    if block_size and block_size > config.block_size:
        raise UserError(f"block_size {block_size} is longer than the {config.block_size} of {folder}")
    config.block_size = block_size or config.block_size
    where = {}  # tensor -> open file
    try:
        if (folder / "model.safetensors.index.json").exists():
            index = read_json(folder / "model.safetensors.index.json")
            if not isinstance(index.get("weight_map"), dict):
                raise UserError(f"{folder}/model.safetensors.index.json has no weight_map of tensors to files")
            files = sorted(set(index["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        for file in files:
            if not (folder / file).exists():
                raise UserError(f"{folder} has no {file}; weights of other kinds are not read")
        safe_open = prepare_data.optional("safetensors").safe_open
        for file in files:
            shard = safe_open(folder / file, framework="pt")
            where.update(dict.fromkeys(shard.keys(), shard))
    except UserError:
        raise
    except Exception as error:  # safetensors has an error class of its own for damaged files
        raise UserError(f"weights in {folder} cannot be read: {str(error).splitlines()[0]}") from None
    return from_theirs(lambda name: where[name].get_tensor(name), where, family, config)


def fields_of(theirs):
    """(Family, GPTConfig) of a config.json, a dict. UserError for what they cannot say."""
    theirs = dict(theirs)
    if theirs.get("model_type") not in FAMILIES:
        raise UserError(f"unknown model_type {theirs.get('model_type')!r}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[theirs["model_type"]]
    settings = {**SETTINGS, **family.settings}
    for one, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if one in settings and other in theirs:  # versions of transformers differ in which they write
            theirs.setdefault(one, theirs.pop(other))
    missing = [name for name in settings if name not in theirs and name not in OPTIONAL]
    if missing:
        raise UserError(f"config.json has no {missing[0]}")
    special = family.read(theirs)
    silent = {**OPTIONAL, "head_dim": family.head_dim}
    fields = {our: theirs.pop(name, silent.get(name)) for name, our in settings.items()}
    fields |= {**special, **rope_fields(theirs, family)}
    for name, value in family.constants.items():
        if (given := theirs.pop(name, value)) != value:
            raise UserError(f"config.json has {name} {given!r}; only {value!r} can be represented here")
    window, is_used = theirs.pop("sliding_window", None), theirs.pop("use_sliding_window", True)
    if window is not None and is_used and window < fields["block_size"]:
        raise UserError(f"config.json has sliding_window {window}, and attention here has no window")
    if set(theirs.pop("layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise UserError("config.json has layer_types other than full_attention, and attention here has no window")
    for name, value in theirs.items():
        if name not in NO_EFFECT and not name.startswith("_") and value not in (None, False):
            raise UserError(f"config.json has {name} {value!r}, which nothing here represents")
    hints = typing.get_type_hints(GPTConfig)
    for name, value in fields.items():
        if not fits(value, hints[name]):
            raise UserError(f"config.json gives {name} as {value!r}; it must be {kind_name(hints[name])}")
    try:
        norm = SCHEME_OF_PLACES[family.places]
        return family, GPTConfig(norm=norm, qk_norm=family.qk_norm, qkv_bias=family.qkv_bias, **fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"config.json: {error}") from None


def rope_fields(theirs, family):
    """rope_theta and rope_scaling from a config.json's settings of either generation, which are taken out of it."""
    rope = {**(theirs.pop("rope_scaling", None) or {}), **(theirs.pop("rope_parameters", None) or {})}
    theta = rope.pop("rope_theta", theirs.pop("rope_theta", family.rope_theta))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rotated = rope.pop("partial_rotary_factor", theirs.pop("partial_rotary_factor", family.rotated))
    if rotated != 1:
        raise UserError(f"config.json has partial_rotary_factor {rotated}; heads here are rotated whole")
    return {"rope_theta": float(theta), "rope_scaling": None if kind == "default" else {"rope_type": kind, **rope}}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: ours are tiktoken's, theirs a tokenizer.json, in which a byte is written as a printable character

PRINTABLE = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace() and b != 0xAD]
CHARACTERS = {b: chr(b) for b in PRINTABLE}
CHARACTERS |= {b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
BYTES = {character: b for b, character in CHARACTERS.items()}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tokenizer_files(state, config):
    """{file: content} of a tokenizer state (prepare_data.tokenizer_state) for transformers; {} for None.

    Byte pairs are merged in the order of their ranks in both, and a word that is a token is taken whole.
    """
    if state is None:
        return {}
    encoding = prepare_data.build_encoding(state)
    ranks = dict(sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]))
    text = {token: "".join(CHARACTERS[b] for b in token) for token in ranks}
    merges = []
    for token in ranks:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        halves = [(a, b) for a, b in halves if a in ranks and b in ranks]
        merges += sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated", "invert": False}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": word, **flags} for word, i in encoding._special_tokens.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]},
            "post_processor": None,
            "decoder": BYTE_LEVEL,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {text[token]: rank for token, rank in ranks.items()},
                "merges": [[text[a], text[b]] for a, b in merges],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": prepare_data.END_OF_TEXT,
            "eos_token": prepare_data.END_OF_TEXT,
            "model_max_length": config.block_size,
            "clean_up_tokenization_spaces": False,
        },
    }


def import_tokenizer(folder):
    """(tokenizer state or None, why it is None) of the tokenizer.json in a folder, a byte-level BPE without normalizer.

    The text's separator, our end-of-text, is the token that begins their texts, or else the one that ends them.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").exists():
        return None, "there is no tokenizer.json"
    theirs = read_json(folder / "tokenizer.json")
    try:
        model, cut = theirs["model"], theirs["pre_tokenizer"] or {}
        steps = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
        kinds = [step.get("type") for step in steps]
        known = ["ByteLevel"], ["Split", "ByteLevel"]
        if model["type"] != "BPE" or theirs["normalizer"] is not None or kinds not in known:
            normalizer = (theirs["normalizer"] or {}).get("type")
            return None, f"it is a {model['type']} with normalizer {normalizer} and pre-tokenizer {kinds}"
        pattern = steps[0]["pattern"]["Regex"] if len(steps) == 2 else GPT2_PATTERN
        if steps[-1]["add_prefix_space"] or steps[-1]["use_regex"] == (len(steps) == 2):
            return None, "it adds spaces, or cuts words twice"
        special = {token["content"]: token["id"] for token in theirs["added_tokens"]}
        ranks = {bytes(BYTES[ch] for ch in text): i for text, i in model["vocab"].items() if text not in special}
        # Ours merges by rank: its order is theirs if their merges come in the order of what they make.
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        made = [model["vocab"][a + b] for a, b in pairs]
        if made != sorted(made):
            return None, "its merges are not in the order of its tokens"
    except (KeyError, TypeError, ValueError) as error:
        return None, f"its tokenizer.json is of an unknown form ({type(error).__name__}: {error})"
    config = read_json(folder / "config.json")
    ends = [i for i in (config.get("bos_token_id"), config.get("eos_token_id")) if i is not None]
    if prepare_data.END_OF_TEXT not in special and ends:
        special[prepare_data.END_OF_TEXT] = ends[0][0] if isinstance(ends[0], list) else ends[0]
    if prepare_data.END_OF_TEXT not in special:
        return None, "no token begins or ends its texts"
    order = sorted(ranks.items(), key=lambda item: item[1])
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in order)
    state = {"name": folder.resolve().name, "pattern": pattern, "special_tokens": special, "ranks": lines}
    try:
        prepare_data.build_encoding(state)
    except Exception as error:  # tiktoken's own errors are of several kinds
        return None, f"tiktoken does not take it: {error}"
    return state, None


def check_data(folder, overwrite):
    """UserError if a folder that is there may not be replaced: it has to be the shards of an earlier import."""
    if not folder.exists():
        return
    others = [path.name for path in folder.iterdir() if not re.fullmatch(r"(train|val)_\d{6}\.bin", path.name)]
    if others:
        raise UserError(f"{folder} holds {others[0]}: it is not the data of an import, give another --out_dir")
    if not overwrite:
        raise UserError(f"{folder} exists; --overwrite replaces it")


def tokenize(folder, inputs, to):
    """Writes the texts of `inputs` (as prepare_data takes them) to shards in the folder `to`, half of the documents
    held out (where they are too few for it, one, or a tenth of the only one), by the tokenizer.json in `folder` whatever
    its kind; returns the tokens of both splits.

    They stay without a manifest: it would name this tokenizer, the checkpoint names its tiktoken form or none.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.exists():
        raise UserError(f"--text needs the model's tokenizer, and there is no {file}")
    data = dict(dataset=to.name, data_dir=str(to.parent), input=inputs, tokenizer=str(file))
    try:
        prepare_data.prepare(prepare_data.Settings(**data, val_fraction=0.5))
    except prepare_data.BadText:
        prepare_data.prepare(prepare_data.Settings(**data, val_fraction=1e-9))
    counts = [prepare_data.read_meta(to)["splits"][split]["tokens"] for split in ("train", "val")]
    for manifest in ("meta.json", "tokenizer.json"):
        (to / manifest).unlink()
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# The program


@dataclass
class Settings:
    # what
    export: str | None = None  # hf: write the model of the run in out_dir to the folder --to
    import_from: str | None = None  # a folder with config.json and safetensors: write it as the run out_dir
    out_dir: str | None = None  # the run's folder
    to: str | None = None  # export: the folder that is written
    # how
    family: str | None = None  # export: an architecture; none: the one that the model belongs to
    max_difference: float = 1e-3  # export: the largest difference of a logit that is accepted
    block_size: int | None = None  # import: longest sequence, in tokens; none: as the folder says
    text: list[str] = field(default_factory=list)  # import: files or folders of text, for out_dir/data by its tokenizer
    overwrite: bool = False  # replace what is there

    def __post_init__(self):
        if (self.export is None) == (self.import_from is None):
            raise ValueError("give either --export=hf or --import_from=FOLDER")
        if self.export not in (None, "hf"):
            raise ValueError(f"export is {self.export!r}; known: hf")
        needed = ("out_dir", "to") if self.export else ("out_dir",)
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"give a folder with --{name}=FOLDER")
        if self.family is not None and self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; known: {', '.join(FAMILIES)}")
        other = ("block_size", "text") if self.export else ("to", "family")
        for name in other:
            if getattr(self, name):
                raise ValueError(f"{name} has no effect here")
        if not self.max_difference > 0:
            raise ValueError(f"max_difference is {self.max_difference}; it must be positive")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}; it must be at least 1")


def read_json(path):
    """The object in a JSON file; UserError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def save_run(model, out_dir, tokenizer):
    """Writes an imported model as a run at step 0, which train.py continues, evaluates and samples. Its data set is
    out_dir/data, so that no text of another tokenizer is taken for its own."""
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.1))
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": asdict(model.config),
        "step": 0,
        "val_loss": None,
        "settings": {"dataset": "data", "data_dir": str(out_dir)},
        "tokenizer": tokenizer,
    }
    partial = out_dir / "ckpt.pt.partial"
    try:
        torch.save(state, partial)
        partial.replace(out_dir / "ckpt.pt")
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot save {out_dir}/ckpt.pt: {str(error).splitlines()[0]}") from None


def main():
    settings = configure(Settings, "Folds and exports a run's model, or imports one, in Hugging Face form.")
    out_dir = Path(settings.out_dir)
    if settings.export:
        model, checkpoint = load_run(out_dir)
        tokenizer, options = checkpoint["tokenizer"], (settings.family, settings.max_difference, settings.overwrite)
        try:
            family, difference = export_hf(model, settings.to, tokenizer, *options)
        except ValueError as error:
            raise UserError(f"{out_dir} cannot be folded: {error}") from None
        print(f"wrote {settings.to}: {FAMILIES[family].architecture}, logits within {difference:.1e} of the run's")
        if tokenizer is None:
            print("without a tokenizer: the run's data named none")
        return

    fields_of(read_json(Path(settings.import_from) / "config.json"))  # what is wrong ends it before the folder matters
    if (out_dir / "ckpt.pt").exists() and not settings.overwrite:
        raise UserError(f"{out_dir} holds a run; --overwrite replaces it")
    prepare_data.find_files(settings.text)  # what is wrong ends it before anything is written
    if settings.text:
        check_data(out_dir / "data", settings.overwrite)
    model = import_hf(settings.import_from, settings.block_size)
    tokenizer, why = import_tokenizer(settings.import_from)
    out_dir.mkdir(parents=True, exist_ok=True)
    if settings.text:  # beside what is there, which stays until all has succeeded
        counts = tokenize(settings.import_from, settings.text, out_dir / "data.new")
    save_run(model, out_dir, tokenizer)
    count = model.count_params()["total"]
    print(f"wrote {out_dir}/ckpt.pt: {model.config.norm}, {model.config.n_layer} layers, {count:,} parameters")
    if tokenizer is None:
        print(f"without a tokenizer, so that it cannot be sampled: {why}; --text=PATH makes held-out data with its own")
    if settings.text:
        shutil.rmtree(out_dir / "data", ignore_errors=True)
        (out_dir / "data.new").rename(out_dir / "data")
        print(f"wrote {out_dir}/data: {counts[0]:,} tokens for training, {counts[1]:,} held out")


if __name__ == "__main__":
    run(main)
