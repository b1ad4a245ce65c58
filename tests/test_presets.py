"""The files in config/: every command in config/__init__.py runs from any folder, and gives the model, the length, the
batch and the learning rate that its paper names."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import config
import configurator
import train
from model import GPT, GPTConfig

SHARED = "__init__", "gpas", "lns", "peri", "sparsity"  # what presets of a paper share
COMMANDS = re.findall(r"^    (config/.*?)(?:  |$)", config.__doc__, re.MULTILINE)

# What each paper counts: GPAS and LNS the embedding and the head, Peri-LN neither, Sparsity one matrix for both. The
# number is the paper's, the tolerance what its rounding asks for: names are round, GPAS's 1B has 1.34B.
SIZES = {
    "gpas_71m": ("both", 71e6, 0.01),
    "gpas_130m": ("both", 130e6, 0.04),
    "gpas_250m": ("both", 250e6, 0.02),
    "gpas_350m": ("both", 350e6, 0.06),
    "gpas_1b": ("both", 1e9, 0.35),
    "gpas_7b": ("both", 7e9, 0.04),
    "gpas_130m lns": ("both", 130e6, 0.04),
    "gpas_7b lns": ("both", 7e9, 0.04),
    "lns_qwen_500m": ("both", 494e6, 0.001),  # as released; the head is the embedding
    "peri_400m": ("none", 400e6, 0.01),
    "peri_1500m": ("none", 1.5e9, 0.08),
    "peri_3200m": ("none", 3.2e9, 0.05),
    "sparsity_depth --n_layer=12": ("one", 900e6, 0.01),
    "sparsity_depth --n_layer=16": ("one", 1.2e9, 0.02),
    "sparsity_depth --n_layer=24": ("one", 1.7e9, 0.01),
    "sparsity_depth --n_layer=32": ("one", 2.3e9, 0.025),
    "sparsity_weight_decay": ("one", 1.176e9, 0.001),
    "sparsity_length": ("one", 1.176e9, 0.001),
    "sparsity_gqa": ("one", 1.176e9, 0.001),
    "sparsity_gqa --n_kv_head=4": ("one", 1.076e9, 0.001),
    "sparsity_gqa --n_kv_head=1": ("one", 1.051e9, 0.001),
    "sparsity_dense_400m": ("one", 400e6, 0.14),
    "sparsity_dense_400m --n_hidden=2304": ("one", 400e6, 0.01),
    "sparsity_moe_2b": ("one", 2e9, 0.03),
    "sparsity_moe_7b": ("one", 6.8e9, 0.01),
    "sparsity_moe_7b --n_hidden=2048": ("one", 13.3e9, 0.01),
    "sparsity_recipe": ("one", 1.2e9, 0.02),
    "sparsity_recipe_moe": ("active", 1.2e9, 0.06),  # of one vocabulary matrix
    "sparsity_blocks": ("one", 568.0e6, 0.0005),  # by hand: 50304 * 1536 + 16 * (4 * 1536**2 + 3 * 1536 * 4608)
}
ACTIVE = {"sparsity_moe_2b": (400e6, 0.11), "sparsity_moe_7b": (1.18e9, 0.01)}

# Tokens in all, sequences in a step and the learning rate, as the papers give them. GPAS counts no padding: its code's
# rows are documents, and 76.3 % of its positions are text, in every row of Table 1 and in appendix A alike.
TEXT = 1e9 / (10_000 * 512 * 256)
SCHEDULES = {
    "gpas_71m": (1e9 / TEXT, 512, 1e-3),
    "gpas_130m": (2e9 / TEXT, 512, 1e-3),
    "gpas_250m": (4e9 / TEXT, 512, 1e-3),
    "gpas_350m": (6e9 / TEXT, 512, 5e-4),
    "gpas_1b": (10e9 / TEXT, 512, 5e-4),
    "gpas_7b": (60e9 / TEXT, 2048, 3e-4),
    "gpas_130m lns": (2e9 / TEXT, 512, 1e-3),
    "gpas_350m lns --learning_rate=1e-3": (6e9 / TEXT, 512, 1e-3),
    "gpas_1b lns --warmup_iters=1000": (10e9 / TEXT, 512, 5e-4),
    "gpas_1b lns --max_iters=762940": (100e9, 512, 5e-4),
    "gpas_7b lns --max_iters=190735": (100e9, 2048, 3e-4),
    "lns_qwen_500m": (6e9, 512, 5e-4),
    "peri_400m": (30.2e9, 256, 2e-3),
    "peri_1500m": (30.2e9, 256, 2e-3),
    "peri_3200m": (30.2e9, 256, 2e-3),
    "sparsity_depth --n_layer=12": (10e9, 256, 1e-3),
    "sparsity_depth --n_layer=32 --learning_rate=8e-4": (10e9, 256, 8e-4),
    "sparsity_weight_decay": (5e9, 128, 1e-3),
    "sparsity_length --block_size=256": (5e9, 256, 1e-3),
    "sparsity_length --block_size=8192": (5e9, 256, 1e-3),
    "sparsity_gqa": (5e9, 256, 1e-3),
    "sparsity_gqa --n_kv_head=4 --max_tokens=5.35e9": (5.35e9, 256, 1e-3),
    "sparsity_gqa --n_kv_head=1 --max_tokens=5.6e9": (5.6e9, 256, 1e-3),
    "sparsity_dense_400m": (5e9, 256, 1e-3),
    "sparsity_moe_2b": (5e9, 256, 1e-3),
    "sparsity_moe_7b": (5e9, 256, 4e-4),
    "sparsity_recipe": (10e9, 256, 1e-3),
    "sparsity_recipe_moe": (10e9, 256, 4e-4),
    "sparsity_blocks": (1500 * 256 * 4096, 256, 1e-3),
}


def read(command, n_rows=1000):
    """The settings of a command, and its steps, of n_rows rows of data where it counts epochs. "gpas_130m lns --seed=1"
    stands for the files of these names."""
    args = [a if a.startswith("--") else str(ROOT / "config" / f"{a}.py") for a in command.split()]
    settings = configurator.configure(train.Settings, "", args)
    return settings, settings.max_iters or train.count_steps(settings, n_rows)


def test_every_preset_has_a_command_and_says_where_it_is_from():
    named = set(re.findall(r"\w+", config.__doc__))
    for path in {*(ROOT / "config").glob("*.py")} - {ROOT / "config" / "lab.py"}:  # the lab's model is of no paper
        head = path.read_text().split('"""')[1]
        assert any(paper in head for paper in ("GPAS", "LNS", "Peri-LN", "Sparsity"))
        assert any(word in head for word in ("Table", "section", "appendix", "Figure")), path
        assert path.stem == "__init__" or path.stem in named, path
        assert path.stem in SHARED or "_sft" in path.stem or any(c.split()[0] == path.stem for c in SCHEDULES), path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_run(command):
    settings, steps = read(command.replace("config/", "").replace(".py", ""))
    assert settings.warmup_iters < steps and settings.gradient_accumulation_steps % 8 == 0


@pytest.mark.parametrize("command", SIZES)
def test_parameter_counts(command):
    settings, _ = read(command)
    with torch.device("meta"):
        model = GPT(GPTConfig(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(GPTConfig)}))
    count, head = model.count_params(), model.lm_head.weight.numel()
    counts, number, tolerance = SIZES[command]
    ours = {"both": count["total"], "one": count["total"] - head, "none": count["non_embedding"]}
    ours["active"] = count["active"] - head
    assert ours[counts] == pytest.approx(number, rel=tolerance)
    if command in ACTIVE:
        number, tolerance = ACTIVE[command]
        assert count["active"] - head == pytest.approx(number, rel=tolerance)


@pytest.mark.parametrize("command", SCHEDULES)
def test_schedules(command):
    settings, steps = read(command)
    tokens, sequences, learning_rate = SCHEDULES[command]
    assert settings.batch_size * settings.gradient_accumulation_steps == sequences
    assert steps * sequences * settings.block_size == pytest.approx(tokens, rel=0.002)
    assert settings.learning_rate == learning_rate


def test_fine_tuning_takes_the_stated_epochs():
    """LIMA's 1,000 conversations 15 times, 128 in a step; windows of Commonsense170K 4 times, 16 in a step."""
    settings, steps = read("peri_sft", 1000)
    assert steps == 118 and settings.learning_rate == 1e-5  # 117.2
    assert (settings.rows, settings.block_size) == ("documents", 8192)
    settings, steps = read("gpas_sft", 170_420 // 4)  # about four examples to a window
    assert steps == 10652 and settings.rows == "windows" and settings.learning_rate == 3e-4
    assert (settings.lisa_layers, settings.lisa_interval) == (4, 3)


def test_numbers_of_published_code():
    """DCLM's 411m_1x for Peri-LN; Sparsity's script decays neither norms nor embeddings, and where its YAML files name
    no eps it is 1e-5; GPAS's rows are documents, its weights bfloat16."""
    s, _ = read("peri_400m")
    assert (s.beta2, s.grad_clip, s.min_lr / s.learning_rate, s.head_z_weight) == (0.95, 1.0, 0.01, 1e-4)
    s, _ = read("sparsity_depth")
    assert not s.decay_vectors and not s.decay_embedding
    assert read("sparsity_depth")[0].norm_eps == 1e-6
    for command in ("sparsity_dense_400m", "sparsity_moe_2b", "sparsity_moe_7b", "sparsity_recipe_moe"):
        assert read(command)[0].norm_eps == 1e-5
    s, _ = read("gpas_130m")
    assert (s.beta2, s.weight_decay, s.grad_clip, s.min_lr) == (0.999, 0.0, 0.0, None)
    for command in ("gpas_130m", "gpas_130m lns", "gpas_7b"):
        assert (read(command)[0].rows, read(command)[0].dtype) == ("documents", "bfloat16_pure")
    assert s.eval_iters * 16 * 256 * 0.763 == pytest.approx(10e6, rel=0.01)  # its evaluation counts no padding either
    assert read("lns_qwen_500m")[0].rows == read("peri_400m")[0].rows == "windows"


def test_a_dry_run_from_any_folder(tmp_path):
    """GPAS 7B over 8 GPUs. By hand: 6,738,415,648 parameters of 8 bytes, an eighth each; 6 FLOPs for each matrix entry
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
        f"{6_738_415_648 / 1e9:.3g} GB of weights, gradients and moments (sharded)",
        "(16 sequences, blocks recomputed)",
    ):
        assert text in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_has_the_vocabulary_of_the_data(monkeypatch):
    meta = {"vocab_size": 50_257}
    monkeypatch.setattr(train.prepare_data, "read_meta", lambda place: meta if str(place) in ("data/a", "x/b") else {})
    sizes = [re.search(r"([\d,]+) tokens in the voc", train.plan(train.Settings(dataset=d)))[1] for d in ("a", "x/b", "c")]
    assert sizes == ["50,257", "50,257", "257"]


def test_memory_of_weights_gradients_and_moments():
    """4 copies of a parameter with Adam and 2 with SGD, of 2, 4 or 8 bytes; DDP has one more of the gradient."""
    two = {"dry_run": True, "gpus": 2}
    cases = [({}, 16), ({"optimizer": "sgd"}, 8), ({"dtype": "bfloat16_pure"}, 8), ({"dtype": "float64"}, 32)]
    for flags, n_bytes in (*cases, (two, 20), (two | {"shard": True}, 8)):
        settings = train.Settings(n_layer=1, n_embd=1024, n_head=8, vocab_size=1, **flags)
        n = train.GPT(settings.architecture(1)).count_params()["total"]
        assert f"{n_bytes * n / 1e9:.3g} GB of weights" in train.plan(settings), flags


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


def test_recomputed_memory_is_that_of_the_largest_block():
    """The last layer is dense in a model of 4 layers, and has the experts in one of 3."""
    sizes = dict(n_embd=64, n_expert=8, n_expert_active=4, moe_every=2, batch_size=4, recompute=True)
    settings = [train.Settings(n_layer=n, **sizes) for n in (3, 4)]
    with torch.device("meta"):
        bytes_of = [train.activation_bytes(GPT(s.architecture(257)), s) for s in settings]
    one_input = 4 * 4 * 256 * 64
    assert bytes_of[1] == bytes_of[0] + one_input
