"""The files in config/: each can be had from any folder, and each model has the size that its paper names."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import configurator
import train
from model import GPT, GPTConfig

SHARED = "__init__", "gpas", "peri", "sparsity"
PRESETS = sorted(p.stem for p in (ROOT / "config").glob("*.py") if p.stem not in SHARED)

# What each paper counts: GPAS and LNS the embedding and the head, Peri-LN neither, Sparsity one matrix for both. The
# number is the paper's, the tolerance what its rounding asks for: names are round, GPAS's 1B has 1.34B.
SIZES = {
    "gpas_71m": ("both", 71e6, 0.01),
    "gpas_130m": ("both", 130e6, 0.04),
    "gpas_250m": ("both", 250e6, 0.02),
    "gpas_350m": ("both", 350e6, 0.06),
    "gpas_1b": ("both", 1e9, 0.35),
    "gpas_7b": ("both", 7e9, 0.04),
    "lns_130m": ("both", 130e6, 0.04),
    "lns_250m": ("both", 250e6, 0.02),
    "lns_350m": ("both", 350e6, 0.06),
    "lns_1b": ("both", 1e9, 0.35),
    "lns_qwen_500m": ("both", 494e6, 0.001),  # as released; the head is the embedding
    "peri_400m": ("none", 400e6, 0.01),
    "peri_1500m": ("none", 1.5e9, 0.08),
    "peri_3200m": ("none", 3.2e9, 0.05),
    "sparsity_depth_12": ("one", 900e6, 0.01),
    "sparsity_depth_16": ("one", 1.2e9, 0.02),
    "sparsity_depth_24": ("one", 1.7e9, 0.01),
    "sparsity_depth_32": ("one", 2.3e9, 0.025),
    "sparsity_weight_decay": ("one", 1.176e9, 0.001),
    **{f"sparsity_length_{T}": ("one", 1.176e9, 0.001) for T in (256, 512, 1024, 2048, 4096, 8192)},
    "sparsity_gqa_16": ("one", 1.176e9, 0.001),
    "sparsity_gqa_4": ("one", 1.076e9, 0.001),
    "sparsity_gqa_1": ("one", 1.051e9, 0.001),
    "sparsity_dense_400m": ("one", 400e6, 0.14),
    "sparsity_dense_1b": ("one", 1.176e9, 0.001),
    "sparsity_moe_2b": ("one", 2e9, 0.03),
    "sparsity_moe_7b": ("one", 6.8e9, 0.01),
    "sparsity_recipe_16": ("one", 1.2e9, 0.02),
    "sparsity_recipe_32": ("one", 1.2e9, 0.02),
    "sparsity_recipe_moe": ("active", 1.2e9, 0.06),  # of one vocabulary matrix
}
ACTIVE = {"sparsity_moe_2b": (400e6, 0.11), "sparsity_moe_7b": (1.18e9, 0.01)}

# Tokens in all, as the papers give them, and sequences per step. GPAS's are rounded in its table (1B for 1.3B).
TOKENS = {
    "gpas_71m": (1.31e9, 512),
    "gpas_1b": (13.1e9, 512),
    "gpas_7b": (78.6e9, 2048),
    "peri_400m": (30.2e9, 256),
    "peri_3200m": (30.2e9, 256),
    "sparsity_depth_12": (10e9, 256),
    "sparsity_weight_decay": (5e9, 128),
    **{f"sparsity_length_{T}": (5e9, 256) for T in (256, 512, 1024, 2048, 4096, 8192)},
    "sparsity_gqa_16": (5e9, 256),
    "sparsity_gqa_4": (5.35e9, 256),
    "sparsity_gqa_1": (5.6e9, 256),
    "sparsity_dense_400m": (5e9, 256),
    "sparsity_moe_7b": (5e9, 256),
    "sparsity_recipe_32": (10e9, 256),
    "sparsity_recipe_moe": (10e9, 256),
}


def settings_of(name):
    path = ROOT / "config" / f"{name}.py"
    if "n_expert" in path.read_text() and "n_expert" not in GPTConfig.__dataclass_fields__:
        pytest.skip("the model has no experts")
    return configurator.configure(train.Settings, "", [str(path)])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_where_it_is_from(name):
    text = (ROOT / "config" / f"{name}.py").read_text()
    head = text.split('"""')[1]
    assert any(paper in head for paper in ("GPAS", "LNS", "Peri-LN", "Sparsity"))
    assert any(word in head for word in ("Table", "section", "appendix", "Figure")) and "offline" in head
    assert "tokenizer" in head or "cl100k_base" in head
    settings = settings_of(name)
    assert settings.warmup_iters < settings.max_iters and settings.gradient_accumulation_steps % 8 == 0
    assert name.endswith("_sft") or name in SIZES


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    settings = settings_of(name)
    with torch.device("meta"):
        model = GPT(GPTConfig(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(GPTConfig)}))
    count, head = model.count_params(), model.lm_head.weight.numel()
    counts, number, tolerance = SIZES[name]
    ours = {"both": count["total"], "one": count["total"] - head, "none": count["non_embedding"]}
    ours["active"] = count["active"] - head
    assert ours[counts] == pytest.approx(number, rel=tolerance)
    if name in ACTIVE:
        number, tolerance = ACTIVE[name]
        assert count["active"] - head == pytest.approx(number, rel=tolerance)


@pytest.mark.parametrize("name", TOKENS)
def test_tokens(name):
    settings = settings_of(name)
    tokens, sequences = TOKENS[name]
    assert settings.batch_size * settings.gradient_accumulation_steps == sequences
    assert settings.max_iters * sequences * settings.block_size == pytest.approx(tokens, rel=0.002)


def test_a_dry_run_from_any_folder(tmp_path):
    """GPAS 7B over 8 GPUs. By hand: 6,738,415,648 parameters of 16 bytes, an eighth each; 6 FLOPs for each matrix entry
    but the table's, and 12 * 4096 * 257 / 2 for the attention of each of 32 layers."""
    args = [sys.executable, ROOT / "train.py", ROOT / "config" / "gpas_7b.py", "--dry_run", "--gpus=8"]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    matrices = 6_738_415_648 - 32 - 65 * 4096 - 32000 * 4096
    flops = 6 * matrices + 32 * 12 * 4096 * 257 / 2
    for text in (
        "6,738,415,648 parameters",
        "150,000 steps of 524,288 tokens: 78.6G tokens",
        f"{flops / 1e9:.3g} GFLOP a token, {flops * 524_288 * 150_000:.3g} FLOP in all",
        f"{6_738_415_648 * 2 / 1e9:.3g} GB of weights, gradients and moments (sharded)",
        "(16 sequences, blocks recomputed)",
    ):
        assert text in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())


def test_activations_are_those_that_autograd_keeps():
    """Tensors without memory count as those of a real pass do."""
    shape = {"n_layer": 3, "n_embd": 64, "n_head": 2, "block_size": 64, "vocab_size": 300}
    settings = train.Settings(**shape, batch_size=4, norm="gpas_peri")
    config = GPTConfig(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(GPTConfig)})
    model, kept = GPT(config), {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    idx = torch.zeros(4, 64, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(idx, idx)
    with torch.device("meta"):
        meta = GPT(config)
    assert train.activation_bytes(meta, settings) == pytest.approx(sum(kept.values()) + 4 * logits.numel(), rel=0.02)
    settings.recompute = True
    with torch.device("meta"):
        meta = GPT(config)
    assert train.activation_bytes(meta, settings) < 0.6 * sum(kept.values())
