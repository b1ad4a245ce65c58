"""Models out of this project and into it: gates folded away, Hugging Face folders in both directions, benchmarks.

    python interchange.py --export=hf --out_dir=out-gpas_pre --to=FOLDER      a run's model for transformers, vLLM ...
    python interchange.py --import_from=FOLDER --out_dir=out-llama            open weights as a run's checkpoint
    python interchange.py --harness=arc_easy,piqa --out_dir=out-post          lm-evaluation-harness on a run
    python interchange.py --questions_from=piqa --to=piqa.jsonl               its questions, for analyze.py --choices
    python interchange.py --help                                              every setting

From a notebook: `fold(model)`, `export_hf(model, folder)`, `import_hf(folder)`, `harness_model(out_dir)`.

A gate is a known factor at inference, and a norm undoes factors: a trained gpas_ model equals, up to rounding, one
without gates that has other weights (`fold`). Other programs may know the folded model by another name: FAMILIES is
one table from their names to ours, read in both directions. transformers writes and reads the files: its class of the
family is built, and the weights are copied into it or out of it. Tried with transformers 5.24, whose experts are
stacked as ours are; an earlier one ends in an error where it differs. Benchmarks need no export:
lm-evaluation-harness (tried with lm_eval 0.4.13) is handed the run's own GPT.
"""

import copy
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn as nn

import prepare_data
from analyze import load_run
from configurator import COUNT, NATURAL, POSITIVE, UserError, build_settings, configure, progress, run, save_whole
from model import GPT, SCHEMES, GPTConfig, MoE, Norm, find_device, find_scheme, gate_scale

# ---------------------------------------------------------------------------------------------------------------------
# Folding: the gates become plain weights


@torch.no_grad()
def fold(model):
    """The GPT without gates that computes what `model` computes: the same logits up to rounding. `model` is untouched.

    The stream x of the gated model is S u, u the stream of the plain one and S a number, 1 after the embedding. With
    g = 1 - act(a), a sub-layer x <- g (x + h(x)) is

        u <- u + h(S u) / S                            and S <- g S

    and one with a norm at C, x <- C(alpha g x + h(x)), is with D = g S and any new S, which C's gain takes up,

        u <- C'(alpha u + h(S u) / D) / S

    Within h(x) = b B(f(s A(x))) the factor 1 / S or 1 / D goes to B's gain, or without B to f's last matrices; a norm
    of S u is A(S u) = sign(S) A'(u) with A's eps / S^2 as the eps of A' (dyt: its slope times S); without A the factor
    S goes to f's first matrices. Gates at other places (gpas_position) and LNS's s are factors of the same kind.

    The result's config has norm without gpas_, a gain in every norm, and no factor s: that is in the weights
    (s_position=gain). Its norms have eps of their own, which a checkpoint does not hold: fold after loading, not before
    saving. ValueError, naming the layer, for gates whose product S float32 or the weights' dtype cannot hold (norms
    square u).
    """
    plain, c = copy.deepcopy(model), model.config
    no_gates = dict(norm=c.norm.removeprefix("gpas_"), gpas_act="silu", gpas_position="sublayer", gate_init=None)
    no_gates |= dict(gpas_stop_gradient=True, gate_per="layer")
    s_position = "gain" if find_scheme(c.norm)[0].s else "norm"
    plain.config = replace(c, norm_affine=True, s_position=s_position, **no_gates)
    like = plain.lm_head.weight
    for norm in plain.modules():
        if isinstance(norm, Norm) and norm.weight is None:  # it gets a gain of ones, dyt also a bias of zeros
            norm.weight = nn.Parameter(like.new_ones(norm.dim))
            norm.bias = nn.Parameter(like.new_zeros(norm.dim)) if norm.alpha is not None else None

    S = 1.0
    for l, block in enumerate(plain.blocks, 1):
        gates = [1.0]
        if block.gate is not None:  # in the weights' type, as in the block
            gates = gate_scale(block.gate, block.gpas_act).to(block.attn.o_proj.weight.dtype).tolist()
        block.gate = None
        attn_factors = take_factors(block.attn_residual, gates[0])
        mlp_factors = take_factors(block.mlp_residual, gates[-1])
        layer_S = S
        for f, residual, factors in (
            (block.attn, block.attn_residual, attn_factors),
            (block.mlp, block.mlp_residual, mlp_factors),
        ):
            S *= factors["before"]
            if "A" in residual.places:
                scale_norm_input(residual.pre_norm, S)
                scale_norm_output(residual.pre_norm, factors["norm"])
            else:
                scale_matrices(f, FIRST, S * factors["norm"])
            if residual.post_norm is None:
                scale_branch(residual, f, factors["branch"] / S)
                S *= factors["stream"]
                continue
            D = S * factors["stream"]
            scale_branch(residual, f, factors["branch"] / D)
            scale_norm_input(residual.post_norm, D)
            S = 1.0
            if block.b2t and f is block.attn:
                # The MLP's norm is given the layer's input as it is, so the MLP has to come to D = layer_S.
                S = layer_S / (mlp_factors["before"] * mlp_factors["stream"])
                scale_norm_output(residual.post_norm, 1 / S)
        if not all(p.isfinite().all() for p in block.parameters()) or not 1e-17 < abs(S) < 1e17:
            raise ValueError(f"layer {l}: the gates up to here scale by {S:.1e}, more than the weights can take up")
    scale_norm_input(plain.norm, S)
    return plain


def take_factors(residual, gate):
    """{point: factor}: what s and the gate multiply by at the points of Residual.at. s is taken out of the Residual."""
    factors = dict.fromkeys(("before", "norm", "branch", "stream"), 1.0)
    factors[residual.gate_place] *= gate
    if residual.s_place is not None:
        factors[residual.s_place] *= residual.s
        residual.s_place = None
    return factors


def scale_norm_input(norm, factor):
    """Makes norm(x) into norm(factor * x)."""
    if norm.alpha is not None:  # dyt
        norm.alpha.mul_(factor)
    else:
        norm.eps /= factor**2
        scale_norm_output(norm, math.copysign(1, factor))


def scale_norm_output(norm, factor):
    """Makes norm(x) into factor * norm(x)."""
    for p in (norm.weight, norm.bias):
        if p is not None:
            p.mul_(factor)


# The matrices of a sub-layer that read its input, and those that write its output.
FIRST = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "router"}
LAST = {"o_proj", "down_proj"}


def scale_matrices(f, names, factor):
    """Multiplies the matrices of f of these names by a number, or by one per output dimension (n_embd, 1)."""
    for name, p in f.named_parameters():
        if p.dim() >= 2 and names & set(name.split(".")):  # biases stay
            p.mul_(factor)


def scale_branch(residual, f, factor):
    """Makes the branch b B(f) into factor times itself."""
    if "B" in residual.places:
        scale_norm_output(residual.out_norm, factor)
    else:
        scale_matrices(f, LAST, factor)


# ---------------------------------------------------------------------------------------------------------------------
# The table of architectures that transformers knows

# The names of their tensors become ours by these replacements, in this order, and by those for the family's norms.
# A tensor gate_up is then our gate and our up, stacked along the output dimension.
NAMES = {
    "model.layers.": "blocks.",
    "model.": "",
    "self_attn.": "attn.",
    "mlp.gate.": "mlp.router.",
    "block_sparse_moe.": "mlp.",
    "shared_mlp.input_linear.": "mlp.shared.gate_up_proj.",
    "shared_mlp.output_linear.": "mlp.shared.down_proj.",
}
NORMS_A = {
    "input_layernorm": "attn_residual.pre_norm",
    "post_attention_layernorm": "mlp_residual.pre_norm",
}
NORMS_B = {
    "post_attention_layernorm": "attn_residual.out_norm",
    "post_feedforward_layernorm": "mlp_residual.out_norm",
}
NORMS_AB = NORMS_A | {
    "post_self_attn_layernorm": "attn_residual.out_norm",
    "post_mlp_layernorm": "mlp_residual.out_norm",
}

# Their name of a setting -> the field of GPTConfig: in every family, and those that some have. A family without
# norm_topk_prob normalizes the router weights, one without head_dim has n_embd / n_head.
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
N_LOCAL = {"num_local_experts": "n_expert", "num_experts_per_tok": "n_expert_active"}
N_EXPERTS = {"num_experts": "n_expert", "num_experts_per_tok": "n_expert_active", "norm_topk_prob": "normalize_gates"}

# Their settings without effect on a trained model's logits.
NO_EFFECT = set(
    "architectures model_type torch_dtype dtype transformers_version bos_token_id eos_token_id pad_token_id use_cache "
    "initializer_range pretraining_tp attention_dropout output_router_logits router_aux_loss_coef router_jitter_noise "
    "max_window_layers".split()
)


@dataclass(frozen=True)
class Family:
    """One row: which of our models an architecture is, and its names. The row's own name is their model_type."""

    norm: str  # the row of SCHEMES
    norm_names: dict  # their name of a norm -> ours
    settings: dict = field(default_factory=dict)  # their name of a setting -> ours, besides SETTINGS
    qk_norm: str = "none"
    qkv_bias: bool = False
    mlps: tuple = ("dense",)  # dense, experts or shared experts: the first must occur, the others may
    is_interleaved: bool = False  # rotates the pairs (2i, 2i + 1) where we rotate (i, i + head_dim / 2)
    write: Callable = lambda config: {}  # GPTConfig -> their settings that are not ours under another name
    read: Callable = lambda theirs: {}  # their config -> our fields from those


def qwen3_moe_write(c):
    dense = [l - 1 for l in range(1, c.n_layer + 1) if l < c.moe_from or (l - c.moe_from) % c.moe_every]
    return {"moe_intermediate_size": c.n_hidden, "mlp_only_layers": dense, "decoder_sparse_step": 1}


def qwen3_moe_read(theirs):
    """moe_from and moe_every from Qwen3-MoE's list of the dense layers, and n_hidden. Where there are no dense layers,
    their width in the file has no effect, and is overwritten."""
    L = theirs.num_hidden_layers
    layers = [l for l in range(1, L + 1) if l - 1 not in theirs.mlp_only_layers]
    if len(layers) == L:
        theirs.intermediate_size = theirs.moe_intermediate_size
    first = layers[0] if layers else L + 1
    every = layers[1] - layers[0] if len(layers) > 1 else L
    return {"moe_from": first, "moe_every": every, "n_hidden": theirs.moe_intermediate_size}


def granite_write(c):
    return {"shared_intermediate_size": c.n_expert_shared * c.n_hidden, "attention_multiplier": c.head_dim**-0.5}


def granite_read(theirs):
    return {"n_expert_shared": theirs.shared_intermediate_size // theirs.intermediate_size}


def glm4_write(c):
    return {"attention_bias": False, "partial_rotary_factor": 1.0}


FAMILIES = {
    "llama": Family("pre", NORMS_A, HEAD_DIM),
    "qwen2": Family("pre", NORMS_A, qkv_bias=True),
    "qwen3": Family("pre", NORMS_A, HEAD_DIM, qk_norm="head"),
    "glm4": Family("sandwich", NORMS_AB, HEAD_DIM, is_interleaved=True, write=glm4_write),
    "olmo2": Family("out", NORMS_B, qk_norm="full"),
    "mixtral": Family("pre", NORMS_A, N_LOCAL | HEAD_DIM, mlps=("experts",)),
    "olmoe": Family("pre", NORMS_A, N_EXPERTS, qk_norm="full", mlps=("experts",)),
    "qwen3_moe": Family(
        "pre",
        NORMS_A,
        N_EXPERTS | HEAD_DIM,
        qk_norm="head",
        mlps=("experts", "dense"),
        write=qwen3_moe_write,
        read=qwen3_moe_read,
    ),
    "granitemoeshared": Family(
        "pre", NORMS_A, N_LOCAL, mlps=("shared experts",), write=granite_write, read=granite_read
    ),
}


def find_family(model, name=None):
    """The name of a folded model's family, which has to be `name` if that is given; UserError says what is amiss."""
    if name is not None and name not in FAMILIES:
        raise UserError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    reasons = {n: misfits(family, model) for n, family in FAMILIES.items() if name in (None, n)}
    fewest = min(map(len, reasons.values()))
    nearest = {n: phrases for n, phrases in reasons.items() if len(phrases) == fewest}
    if fewest:
        what = "has no counterpart in transformers; the nearest are" if name is None else "is not"
        text = "; ".join(f"{n}, but {' and '.join(phrases)}" for n, phrases in nearest.items())
        raise UserError(f"a model of norm {model.config.norm} {what} {text}")
    return next(iter(nearest))


def misfits(family, model):
    """Why a folded model is not one of the family, one phrase each."""
    c = model.config
    residuals = [r for block in model.blocks for r in (block.attn_residual, block.mlp_residual)]
    places = sorted({"".join(sorted(r.places)) or "none" for r in residuals})
    facts = [("place of norms", SCHEMES[family.norm].norms, " and ".join(places))]
    fixed = {
        "norm_type": "rmsnorm",
        "qk_norm": family.qk_norm,
        "qk_norm_type": "rmsnorm" if c.qk_norm_type else None,  # None: norm_type
        "v_norm": False,
        "qkv_bias": family.qkv_bias,
        "normalize_gates": True,
        "head_dim": c.n_embd // c.n_head,
    }
    facts += [(name, value, getattr(c, name)) for name, value in fixed.items() if name not in family.settings.values()]
    reasons = [f"its {what} is {theirs}, not {ours}" for what, theirs, ours in facts if theirs != ours]
    experts = "shared experts" if c.n_expert_shared else "experts"
    mlps = {experts if isinstance(block.mlp, MoE) else "dense" for block in model.blocks}
    if family.mlps[0] not in mlps or mlps - set(family.mlps):
        reasons.append(f"its MLPs are {' and '.join(family.mlps)}, not {' and '.join(sorted(mlps))}")
    return reasons


# ---------------------------------------------------------------------------------------------------------------------
# Export


EXPORTED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def export_hf(model, folder, tokenizer=None, family=None, max_difference=1e-3, overwrite=False):
    """Writes `model`, folded, to `folder` for transformers: config.json, model.safetensors in the weights' dtype, and
    the files of `tokenizer` (a checkpoint's tokenizer state). Returns the family's name and the largest difference of
    transformers' logits to the model's on random tokens: rounding, and the eps, of which folded norms have one each and
    theirs one for all.

    UserError, and nothing is written, where no family is the model's and for a difference above `max_difference`.
    `overwrite` replaces an earlier export and nothing else.
    """
    folder = Path(folder).resolve()
    if folder.exists():
        others = sorted({p.name for p in folder.iterdir()} - EXPORTED) if folder.is_dir() else ["a file"]
        if others:
            raise UserError(f"{folder} is not an export, it holds {others[0]}: name another folder")
        if not overwrite:
            raise UserError(f"{folder} exists; --overwrite replaces it")
    plain = absorb(fold(model))
    name = find_family(plain, family)
    transformers, new_tokenizer = prepare_data.optional("transformers"), None
    with explained(f"transformers {transformers.__version__} cannot build this {name} (5.24 was tried)"):
        config = transformers.AutoConfig.for_model(name, **settings_of(name, plain.config))
        if tokenizer is not None:
            new_tokenizer = build_tokenizer(tokenizer, plain.config)
            config.bos_token_id = config.eos_token_id = new_tokenizer.eos_token_id
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=plain.lm_head.weight.dtype)
        for our, tensor in tensor_pairs(plain, theirs):
            tensor.copy_(our)
    difference = check_logits(model, theirs, max_difference)

    with explained(f"cannot write {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            new, old = Path(beside) / "new", Path(beside) / "old"
            theirs.save_pretrained(new, max_shard_size="1000GB")
            (new / "generation_config.json").unlink(missing_ok=True)  # says nothing that config.json does not
            if new_tokenizer is not None:
                new_tokenizer.save_pretrained(new)
            try:
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
            finally:
                if old.exists() and not folder.exists():
                    old.rename(folder)  # what was there comes back
    return name, difference


@torch.no_grad()
def absorb(plain):
    """Puts into the weights of a folded model, in place, what is a constant factor of a branch (b; the average with
    shared experts) or a function of the token alone (the embedding's norm)."""
    c = plain.config
    for block in plain.blocks:
        for residual, f in ((block.attn_residual, block.attn), (block.mlp_residual, block.mlp)):
            b = residual.branch_scale
            if b is not None:
                scale_branch(residual, f, b if "B" in residual.places else b[:, None])
                residual.branch_scale = None
        if isinstance(block.mlp, MoE) and c.average_shared and c.n_expert_shared:
            scale_matrices(block.mlp.experts, LAST, c.n_expert_active / (c.n_expert_active + 1))
            scale_matrices(block.mlp.shared, LAST, 1 / (c.n_expert_active + 1))
            block.mlp.average_shared = False
    if c.embed_norm and c.tie_embeddings:
        raise UserError("the embedding's norm cannot go into a table that is the head too (tie_embeddings)")
    plain.embed_tokens.weight.copy_(plain.embed_norm(plain.embed_tokens.weight))
    plain.embed_norm = nn.Identity()
    # A model whose layers were pruned has fewer than its config says.
    absorbed = dict(branch_scale="none", layerscale_init=1e-4, average_shared=False, embed_norm=False)
    plain.config = replace(c, n_layer=len(plain.blocks), **absorbed)
    return plain


# ---------------------------------------------------------------------------------------------------------------------
# Import

LOCAL_AND_SAFE = {"local_files_only": True, "trust_remote_code": False}


@torch.no_grad()
def import_hf(folder, block_size=None, max_difference=1e-3):
    """The GPT in a Hugging Face folder, float32: config.json and safetensors. `block_size` shortens the context.

    No code in the folder is run and nothing is unpickled. UserError for a family that is not in FAMILIES, for a setting
    that has an effect and no place in GPTConfig, for tensors that are missing, too many or of another shape, and for
    logits that differ from transformers' by more than `max_difference`.
    """
    name = check_folder(folder)["model_type"]
    config = read_config(folder, name)
    if block_size and block_size > config.block_size:
        raise UserError(f"block_size {block_size} is longer than the {config.block_size} of {folder}")
    config.block_size = block_size or config.block_size
    with explained(f"weights in {folder} cannot be read"):
        theirs, loading = prepare_data.optional("transformers").AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
            **LOCAL_AND_SAFE,
        )
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[fault]:
            raise UserError(f"the weights in {folder} have {fault}, {min(loading[fault])}")
    with torch.device("meta"):  # nothing is drawn only to be overwritten
        model = GPT(config).eval()
    model.to_empty(device="cpu")
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    for our, tensor in tensor_pairs(model, theirs):
        our.copy_(tensor)
    check_logits(model, theirs, max_difference)
    return model


def check_folder(folder):
    """The object in the config.json of a Hugging Face folder; UserError unless its model_type is a row of FAMILIES."""
    path = Path(folder) / "config.json"
    with explained(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        name = content.get("model_type")
    if name not in list(FAMILIES):
        raise UserError(f"unknown model_type {name!r}; known: {', '.join(FAMILIES)}")
    return content


def read_config(folder, name):
    """The GPTConfig of the config.json in a folder, of the family `name`. UserError for a setting that it cannot hold.

    What it holds is what an export of it would write: any other setting of theirs has to be without effect.
    """
    transformers, family = prepare_data.optional("transformers"), FAMILIES[name]
    with explained(f"{folder}/config.json is damaged"):
        theirs = transformers.AutoConfig.from_pretrained(folder, **LOCAL_AND_SAFE)
        fields = dict(norm=family.norm, qk_norm=family.qk_norm, qkv_bias=family.qkv_bias)
        fields |= {ours: getattr(theirs, setting, None) for setting, ours in (SETTINGS | family.settings).items()}
        fields |= family.read(theirs)
        rope = dict(theirs.rope_parameters)
        fields["rope_theta"] = rope.pop("rope_theta")
        rotated = rope.pop("partial_rotary_factor", 1)
        rope.pop("type", None)  # an older name of rope_type
        fields["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        config = build_settings(GPTConfig, fields)
    if rotated != 1:
        raise UserError(f"config.json has partial_rotary_factor {rotated}; heads here are rotated whole")

    written = transformers.AutoConfig.for_model(name, **settings_of(name, config))
    for setting, value in theirs.to_diff_dict().items():
        ours = getattr(written, setting, None)
        is_same = value == ours or value is None or not (value or ours)
        if not is_same and setting not in {*NO_EFFECT, "rope_parameters"}:
            raise UserError(f"config.json has {setting} {value!r}; only {ours!r} can be represented here")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# What both directions use


@contextmanager
def explained(what):
    """Turns any error within into a UserError that begins with `what`. For calls of other libraries, which have error
    classes of their own (safetensors even for a full disk)."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{what}: {reason}") from None


def settings_of(name, c):
    """The settings of transformers' config class for a GPTConfig as the family `name`."""
    family = FAMILIES[name]
    settings = {theirs: getattr(c, ours) for theirs, ours in (SETTINGS | family.settings).items()}
    rope = {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {**settings, **family.write(c), **tokens, "rope_parameters": rope}


def tensor_pairs(model, theirs):
    """(ours, theirs) for each weight of a GPT and of a transformers model: views of their memory, of one shape, so that
    one can be copied into the other. UserError for a tensor of either without counterpart."""
    family, parts, ours = FAMILIES[theirs.config.model_type], {}, model.state_dict()
    for name, tensor in theirs.state_dict().items():
        for old, new in (NAMES | family.norm_names).items():
            name = name.replace(old, new)
        if "gate_up" in name:
            gate, up = tensor.chunk(2, dim=-2)
            parts |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        else:
            parts[name] = tensor
    if left := ours.keys() ^ parts.keys():
        version = prepare_data.optional("transformers").__version__
        known = f"the parameters of model.py and transformers 5.24 (here is {version})"
        raise UserError(f"{min(left)} has no counterpart in the table, which knows {known}")
    for name, tensor in parts.items():
        our = ours[name]
        if family.is_interleaved and ("q_proj" in name or "k_proj" in name):
            half = model.config.head_dim // 2  # a head's rows are `half` pairs for them, two halves for us
            our, tensor = our.unflatten(0, (-1, 2, half)), tensor.unflatten(0, (-1, half, 2)).transpose(1, 2)
        yield our, tensor


@torch.no_grad()
def check_logits(model, theirs, max_difference):
    """The largest difference between the logits of a GPT and of a transformers model on random tokens; UserError if it
    is above `max_difference`."""
    c, device = model.config, model.lm_head.weight.device
    idx = torch.randint(c.vocab_size, (2, min(c.block_size, 64)), generator=torch.Generator().manual_seed(0)).to(device)
    difference = (theirs.to(device).eval()(idx).logits - model(idx)[0]).abs().max().item()
    if not difference <= max_difference:
        kind = theirs.config.model_type
        raise UserError(f"as {kind} its logits differ by {difference:.1e}, more than max_difference {max_difference}")
    return difference


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def build_tokenizer(state, config):
    """The transformers tokenizer of a tokenizer state (prepare_data.tokenizer_state)."""
    transformers, encoding = prepare_data.optional("transformers"), prepare_data.build_encoding(state)
    if "json" in state:
        tokenizer, end = prepare_data.optional("tokenizers").Tokenizer.from_str(state["json"]), state["eot_token"]
    else:
        special = encoding._special_tokens
        # The special tokens stand among the others too: so each keeps its number, where there are gaps as well.
        ranks = {**encoding._mergeable_ranks, **{word.encode(): i for word, i in special.items()}}
        convert = prepare_data.optional("transformers.convert_slow_tokenizer").TikTokenConverter
        converter = convert(pattern=encoding._pat_str, extra_special_tokens=special)
        converter.load_tiktoken_bpe = lambda path: ranks  # there is no file
        tokenizer, end = converter.converted(), prepare_data.END_OF_TEXT
        for word, i in special.items():
            if tokenizer.token_to_id(word) != i:
                raise UserError(f"the tokenizer's {word!r} would be {tokenizer.token_to_id(word)}, not {i}")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        model_max_length=config.block_size,
        clean_up_tokenization_spaces=False,
    )


def import_tokenizer(folder):
    """The tokenizer state of the tokenizer.json in a folder; UserError where there is none that can be read.

    The token between documents, our end of text, is the one that begins their texts, or else the first that ends them,
    or else the first of prepare_data.USUAL_ENDS that the file has.
    """
    config, path = check_folder(folder), Path(folder) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"there is no {path}")
    begin, end = config.get("bos_token_id"), config.get("eos_token_id")
    ends = end if isinstance(end, list) else [end]
    tokenizers = prepare_data.optional("tokenizers")
    with explained(f"{path} cannot be read"):
        words = {number: word for word, number in tokenizers.Tokenizer.from_file(str(path)).get_vocab().items()}
        between = next((words[number] for number in (begin, *ends) if number in words), "")
    return prepare_data.tokenizer_state(prepare_data.get_tokenizer(str(path), between))


def write_data(settings, tokenizer):
    """Writes the texts settings.text (as prepare_data takes them) to out_dir/data with the tokenizer of the imported
    folder. Half of the documents are held out; of too few for that, one; of a single one, its last part."""
    given = dict(dataset="data", data_dir=settings.out_dir, input=settings.text, overwrite=settings.overwrite)
    given |= dict(tokenizer=str(Path(settings.import_from) / "tokenizer.json"), eot_token=tokenizer["eot_token"])
    try:
        folder = prepare_data.prepare(prepare_data.Settings(**given, val_fraction=0.5))
    except UserError:  # perhaps there are too few documents for that
        folder = prepare_data.prepare(prepare_data.Settings(**given, val_fraction=1e-9))
    print(f"wrote {folder}")


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks: lm-evaluation-harness over our own GPT


@torch.no_grad()
def score_continuations(model, pairs, batch_size=16):
    """A list of (log-likelihood in nats, whether greedy decoding gives it), one for each continuation after a context.

    `pairs`: (context, continuation), lists of token ids, a context of at least one. What exceeds the block size is cut
    off at the left end; UserError for a continuation that alone is longer. `model` is in evaluation mode.
    """
    size, device = model.config.block_size, model.lm_head.weight.device
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if longest > size:
        raise UserError(f"a continuation has {longest} tokens, more than the block size {size}")
    rows = [torch.tensor((context + continuation)[-(size + 1) :]) for context, continuation in pairs]
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # little padding, and memory runs out early
    scores = [None] * len(pairs)
    for first in progress(range(0, len(pairs), batch_size), "log-likelihoods"):
        batch = longest_first[first : first + batch_size]
        inputs = [rows[i][:-1] for i in batch]
        idx = nn.utils.rnn.pad_sequence(inputs, batch_first=True)  # at the right end: not seen by what is before
        for i, logits in zip(batch, model(idx.to(device))[0]):
            end, n = len(rows[i]), len(pairs[i][1])
            tokens = rows[i][end - n :].to(device)
            log_p = logits[end - n - 1 : end - 1].float().log_softmax(-1)
            is_greedy = bool((log_p.argmax(-1) == tokens).all())
            scores[i] = log_p.gather(1, tokens[:, None]).sum().item(), is_greedy
    return scores


def generate_text(model, encoding, prompt, max_tokens, stops=(), temperature=0.0, top_k=None):
    """The text that continues `prompt`: up to max_tokens tokens, the end of the document, or the first of `stops`.

    The prompt is cut at its left end, so that all fits in the block; but half a block of it is kept in any case.
    """
    size = model.config.block_size
    kept = max(size - max_tokens, size // 2, 1)
    ids = prepare_data.encode(encoding, prompt).tolist() or [encoding.eot_token]
    idx = torch.tensor([ids[-kept:]], device=model.lm_head.weight.device)
    stops = [stop for stop in stops if stop] + [prepare_data.decode(encoding, [encoding.eot_token])]
    start, text, ends = idx.shape[1], "", []
    while not ends and idx.shape[1] - start < max_tokens:
        n = min(16, start + max_tokens - idx.shape[1])  # a few at a time, so that an end is seen soon
        idx = model.generate(idx, n, temperature, top_k)
        text = prepare_data.decode(encoding, idx[0, start:].tolist())
        ends = [text.index(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))]


def harness_model(out_dir, device="auto", batch_size=16):
    """The model of a run, of any scheme, for `lm_eval.simple_evaluate(model=harness_model(out_dir), tasks=[...])`.

    Texts are tokenized as the run's data were, special tokens as ordinary text, and no token is put before them; an
    empty context is the start of a document. UserError for a folder without a run, a run without a tokenizer, and where
    lm_eval is not installed; ValueError for a device that cannot be used.
    """
    model, checkpoint = load_run(out_dir, find_device(device))
    if checkpoint["tokenizer"] is None:
        raise UserError(f"the data of {out_dir} named no tokenizer: its tokens have no text")
    encoding = prepare_data.build_encoding(checkpoint["tokenizer"])
    api, utils, generation = map(prepare_data.optional, ("lm_eval.api.model", "lm_eval.utils", "lm_eval.models.utils"))

    class HarnessModel(api.TemplateLM):
        eot_token_id = encoding.eot_token

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return prepare_data.encode(encoding, string).tolist()

        def _loglikelihood_tokens(self, requests, **kwargs):
            pairs = [(context, continuation) for _, context, continuation in requests]
            return score_continuations(model, pairs, batch_size)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            """The sum over a text's windows of block_size tokens, which follow each other: a token sees what is before
            it in its window. The last window reaches back, so that it is as long as the others."""
            windows = []  # of each text, the pairs (context, continuation)
            for request in requests:
                ids, size = self.tok_encode(request.args[0]), model.config.block_size
                overlapping = utils.get_rolling_token_windows(ids, encoding.eot_token, size, context_len=1)
                windows.append([utils.make_disjoint_window(window) for window in overlapping])
            scores = iter(score_continuations(model, list(itertools.chain(*windows)), batch_size))
            return [sum(log_p for log_p, _ in itertools.islice(scores, len(pairs))) for pairs in windows]

        def generate_until(self, requests, disable_tqdm=False):
            texts = []
            for prompt, given in progress([request.args for request in requests], "generations"):
                kwargs = generation.normalize_gen_kwargs(given)
                temperature = kwargs.get("temperature", 0.0)
                unknown = kwargs.keys() - {"do_sample", "temperature", "top_k", "until", "max_gen_toks"}
                if unknown and temperature:
                    raise UserError(f"sampling here knows temperature and top_k, not {', '.join(sorted(unknown))}")
                options = kwargs["max_gen_toks"], kwargs["until"], temperature, kwargs.get("top_k")
                texts.append(generate_text(model, encoding, prompt, *options))
            return texts

    return HarnessModel()


def convert_questions(task, num_fewshot=None):
    """The questions of a multiple-choice task of lm_eval's as analyze.py reads them, dicts: `prompt`, with the task's
    description and `num_fewshot` solved examples (None: as many as the task says), `choices` and `answer`.

    Where a question's choices are contexts with one continuation (Winogrande), `prompt` is the list of the contexts and
    `choices` has the continuation once for each. UserError for a task that has no such form.
    """
    name = task.config.task
    if task.OUTPUT_TYPE != "multiple_choice":
        raise UserError(f"task {name} is of output_type {task.OUTPUT_TYPE}; only multiple_choice can be converted")
    if task.config.target_delimiter != " ":
        raise UserError(f"task {name} puts {task.config.target_delimiter!r} before a choice; analyze.py puts a space")
    if num_fewshot is None:
        num_fewshot = task.config.num_fewshot or 0
    task.set_fewshot_seed(1234)  # simple_evaluate's own
    questions = []
    for doc in task.eval_docs:
        prompt = task.fewshot_context(doc, num_fewshot=num_fewshot, gen_prefix=task.doc_to_prefix(doc))
        choices, answer = task.doc_to_choice(doc), task.doc_to_target(doc)
        if isinstance(prompt, list):
            choices, answer = [answer] * len(prompt), task.doc_to_text(doc)
        elif answer in choices:
            answer = choices.index(answer)
        if type(answer) is not int or not 0 <= answer < len(choices):
            where = f"task {name}, question {len(questions) + 1}"
            raise UserError(f"{where}: the answer {answer!r} is not one of {len(choices)} choices")
        questions.append({"prompt": prompt, "choices": choices, "answer": answer})
    return questions


# ---------------------------------------------------------------------------------------------------------------------
# The program


@dataclass
class Settings:
    # what
    export: Literal["hf"] | None = None  # hf: write the model of the run in out_dir to the folder --to
    import_from: str | None = None  # a folder with config.json and safetensors: write it as the run out_dir
    harness: str | None = None  # tasks of lm_eval, with commas, or yaml files: run them on the run in out_dir
    questions_from: str | None = None  # such tasks, multiple-choice ones: write their questions to the jsonl --to
    out_dir: str | None = None  # the run's folder
    to: str | None = None  # export: the folder that is written; questions_from: the jsonl; harness: results as JSON
    # how
    family: Annotated[str | None, FAMILIES] = None  # export: an architecture; none: the one that the model belongs to
    max_difference: POSITIVE = 1e-3  # the largest difference to transformers' logits that is accepted
    block_size: COUNT | None = None  # import: longest sequence, in tokens; none: as the folder says
    text: list[str] = field(default_factory=list)  # import: files or folders of text, for out_dir/data by its tokenizer
    num_fewshot: NATURAL | None = None  # tasks: solved examples before each question; none: as each task says
    limit: COUNT | None = None  # harness: only the first questions of each task
    batch_size: COUNT = 16  # harness: texts at once
    device: str = "auto"  # harness: auto, cpu, cuda ...
    overwrite: bool = False  # replace what is there

    def __post_init__(self):
        actions = [name for name in ACTIONS if getattr(self, name) is not None]
        if len(actions) != 1:
            raise ValueError("give one of --export=hf, --import_from=FOLDER, --harness=TASKS, --questions_from=TASKS")
        self.action = actions[0]
        _, needed, others = ACTIONS[self.action]
        for name, value in asdict(self).items():
            if name in needed and value is None:
                raise ValueError(f"--{self.action} needs --{name}=PATH too")
            is_given = value not in (Settings.__dataclass_fields__[name].default, [])
            if is_given and name not in [self.action, *needed, *others]:
                raise ValueError(f"{name} has no effect with --{self.action}")


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
    save_whole(out_dir / "ckpt.pt", lambda file: torch.save(state, file))


def export_run(settings):
    """--export: the model of the run in out_dir, written to the folder --to."""
    model, checkpoint = load_run(settings.out_dir)
    tokenizer = checkpoint["tokenizer"]
    options = {name: getattr(settings, name) for name in ("family", "max_difference", "overwrite")}
    name, difference = export_hf(model, settings.to, tokenizer, **options)
    print(f"wrote {settings.to}: a {name}, logits within {difference:.1e} of the run's")
    if tokenizer is None:
        print("without a tokenizer: the run's data named none")


def import_run(settings):
    """--import_from: the model of that folder, written as the run out_dir, with --text as its data."""
    folder, out_dir = settings.import_from, Path(settings.out_dir)
    check_folder(folder)
    if (out_dir / "log.jsonl").exists():
        raise UserError(f"{out_dir} holds a run that was trained: name another folder with --out_dir")
    if (out_dir / "ckpt.pt").exists() and not settings.overwrite:
        raise UserError(f"{out_dir} holds a run; --overwrite replaces it")
    prepare_data.find_files(settings.text)  # what is wrong ends it before anything is read or written
    tokenizer = None
    try:
        tokenizer = import_tokenizer(folder)
    except UserError as error:
        if settings.text:
            raise UserError(f"--text needs the model's tokenizer: {error}") from None
        print(f"without a tokenizer, so that it cannot be sampled: {error}")
    model = import_hf(folder, settings.block_size, settings.max_difference)
    out_dir.mkdir(parents=True, exist_ok=True)
    if settings.text:
        write_data(settings, tokenizer)
    save_run(model, out_dir, tokenizer)
    count = model.count_params()["total"]
    print(f"wrote {out_dir}/ckpt.pt: {model.config.norm}, {model.config.n_layer} layers, {count:,} parameters")


def run_harness(settings):
    """--harness: lm_eval's table of results for the run in out_dir, and the numbers in the file --to."""
    model = harness_model(settings.out_dir, settings.device, settings.batch_size)
    lm_eval, options = prepare_data.optional("lm_eval"), {"num_fewshot": settings.num_fewshot, "limit": settings.limit}
    with explained(f"lm_eval cannot run {settings.harness!r}"):
        results = lm_eval.simple_evaluate(model, tasks=settings.harness.split(","), log_samples=False, **options)
    for column in ("results", "groups"):
        if results.get(column):
            print(lm_eval.utils.make_table(results, column))
    if settings.to:
        text = json.dumps(results["results"], indent=1, default=float)
        save_whole(settings.to, lambda file: file.write(text.encode()))


def write_questions(settings):
    """--questions_from: the questions of those tasks, one after another, in the jsonl --to."""
    manager = prepare_data.optional("lm_eval.tasks").TaskManager()
    with explained(f"lm_eval cannot load {settings.questions_from!r}"):
        tasks = manager.load(settings.questions_from.split(","))["tasks"].values()
        questions = [q for task in tasks for q in convert_questions(task, settings.num_fewshot)]
        lines = "".join(json.dumps(q) + "\n" for q in questions)
    save_whole(settings.to, lambda file: file.write(lines.encode()))
    print(f"wrote {settings.to}: {len(questions):,} questions")


# What the program can do: the function, the settings that it needs, and those that have an effect too.
ACTIONS = {
    "export": (export_run, ["out_dir", "to"], ["family", "max_difference", "overwrite"]),
    "import_from": (import_run, ["out_dir"], ["block_size", "text", "max_difference", "overwrite"]),
    "harness": (run_harness, ["out_dir"], ["to", "num_fewshot", "limit", "batch_size", "device", "overwrite"]),
    "questions_from": (write_questions, ["to"], ["num_fewshot", "overwrite"]),
}


def main():
    settings = configure(Settings, "Exports a run's model or imports one, in Hugging Face form; runs benchmarks.")
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")  # this program says enough
    if settings.to and settings.export is None:  # a file, which is written at the very end
        with explained(f"cannot write {settings.to}"):
            Path(settings.to).parent.mkdir(parents=True, exist_ok=True)
        if Path(settings.to).is_dir():
            raise UserError(f"{settings.to} is a folder; --to names a file here")
    if settings.to and Path(settings.to).exists() and not settings.overwrite:
        raise UserError(f"{settings.to} is there already; --overwrite replaces it")
    action, _, _ = ACTIONS[settings.action]
    try:
        action(settings)
    except ValueError as error:  # of a model that cannot be folded, or a device that cannot be used
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run(main)
