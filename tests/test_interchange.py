"""interchange.py: folded models against the gated ones, exported ones against transformers, and back."""

import copy
import json
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from test_model import ALL, batch, randomized, small

import interchange
import prepare_data
import train
from configurator import UserError
from interchange import FAMILIES, export_hf, fold, import_hf, import_tokenizer
from model import GPAS_ACTS, GPAS_POSITIONS, GPT, SCHEMES, GPTConfig, Norm

GATED = ["gpas_" + name for name in SCHEMES]


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")


# -- fold --------------------------------------------------------------------------------------------------------------


def assert_folds(config):
    """The folded model has no gates, other weights and the same float64 logits; the model itself is as it was."""
    model = randomized(config, torch.float64)
    idx, _ = batch(config)
    before, weights = model(idx)[0], copy.deepcopy(model.state_dict())
    plain = fold(model)
    assert not plain.gates() and not plain.config.norm.startswith("gpas_")
    after = plain(idx)[0]
    assert (after - before).abs().max() < 1e-10, (after - before).abs().max()
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())

    # All but the norms' eps is in its config and state: a new model of them computes the same.
    again = GPT(plain.config).double()
    again.load_state_dict(plain.state_dict())
    eps = {name: m.eps for name, m in plain.named_modules() if isinstance(m, Norm)}
    for name, m in again.named_modules():
        if isinstance(m, Norm):
            m.eps = eps[name]
    assert torch.equal(again(idx)[0], after)


# A large eps: whoever forgets it is seen.
@pytest.mark.parametrize("norm", ALL)
def test_fold_keeps_the_logits(norm):
    assert_folds(small(norm, norm_eps=1e-2))


@pytest.mark.parametrize("norm", GATED)
def test_fold_with_experts_and_gates_per_sublayer(norm):
    experts = dict(n_expert=4, n_expert_shared=1, n_hidden=16, moe_from=2)
    assert_folds(small(norm, norm_eps=1e-2, gate_per="sublayer", **experts))


@pytest.mark.parametrize("norm", ["gpas_pre", "gpas_mix", "gpas_out", "gpas_b2t", "gpas_admin", "gpas_hybrid"])
@pytest.mark.parametrize("position", GPAS_POSITIONS)
def test_fold_at_every_position(norm, position):
    if position == "norm" and norm != "gpas_pre":
        norm = "gpas_pre_post"  # it needs a norm at A in every layer
    assert_folds(small(norm, norm_eps=1e-2, gpas_position=position, gate_per="sublayer"))


def test_float32_gates_of_a_bfloat16_model_are_folded_as_its_blocks_round_them():
    """1 - 0.1 is 0.8984375 in bfloat16, so that the gate 0.1015625, which needs no rounding, gives the same model."""
    models = [GPT(small("gpas_pre", gpas_act="identity")).bfloat16() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, gate in zip(models, (0.1, 0.1015625)):
        for block in model.blocks:
            block.gate = torch.nn.Parameter(torch.tensor([gate]))
    folded = [fold(model).state_dict() for model in models]
    assert all(torch.equal(folded[0][name], folded[1][name]) for name in folded[0])


@pytest.mark.parametrize("act", GPAS_ACTS)
def test_fold_with_every_activation(act):
    assert_folds(small("gpas_mix", norm_eps=1e-2, gpas_act=act))


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(norm="gpas_lns", s_position="branch"),
        dict(norm="gpas_lns", s_position="residual"),
        dict(norm="gpas_lns", s_position="gain"),
        dict(norm="gpas_lns", norm_affine=False, qk_norm="head"),
        dict(norm="gpas_mix", norm_affine=False, qk_norm="full", v_norm=True),
        dict(norm="gpas_hybrid", norm_type="dyt"),
        dict(norm="gpas_peri", norm_type="dyt", norm_affine=False),
        dict(norm="gpas_out", norm_type="layernorm", branch_scale="layerscale"),
        dict(norm="gpas_peri", norm_type="groupnorm", gpas_stop_gradient=False),
        dict(norm="gpas_out", qkv_bias=True, tie_embeddings=True, head_dim=12, rope_theta=500.0),
    ],
    ids=lambda kwargs: " ".join(map(str, kwargs.values())),
)
def test_fold_with_other_settings(kwargs):
    assert_folds(small(**{"norm_eps": 1e-2, **kwargs}))


def test_fold_in_float32_after_training_steps():
    model = trained(small("gpas_mix", n_expert=4, n_hidden=16))  # in the midst of training: router losses with a graph
    idx, _ = batch(model.config)
    assert (fold(model)(idx)[0] - model(idx)[0]).abs().max() < 1e-4


def test_fold_of_gates_that_take_nearly_all_away():
    for norm in ("gpas_pre", "gpas_b2t"):
        model = randomized(small(norm, gpas_act="identity"), torch.float64)
        model.set_gates([0.5, 0.5, 1.0, 0.5])  # 1 - act(a) = 0, of which gate_scale makes 1e-7
        idx, _ = batch(model.config)
        logits = model(idx)[0]
        assert (fold(model)(idx)[0] - logits).abs().max() < 1e-10 * logits.abs().max()


def test_fold_refuses_more_than_the_weights_can_take_up():
    model = GPT(small("gpas_pre", gpas_act="identity"))
    model.set_gates([1 - 1e-6] * 4)
    for block in model.blocks:
        block.mlp.down_proj.weight.data.mul_(1e20)
    with pytest.raises(ValueError, match=r"layer \d: the gates up to here scale by"):
        fold(model)


def trained(config, steps=8, seed=0):
    """A model after a few steps of AdamW on this file's text, with gates that have moved far."""
    torch.manual_seed(seed)
    model = GPT(config).train()
    text = torch.tensor(list(open(__file__, "rb").read()[:20000])) % config.vocab_size
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.1), 3e-3)
    with torch.no_grad():
        for i, gate in enumerate(model.gates()):
            gate.fill_([0.4, -0.7, 2.0, 0.1][i % 4])
    for step in range(steps):
        at = torch.randint(len(text) - config.block_size - 1, (8, 1)) + torch.arange(config.block_size + 1)
        model(text[at][:, :-1], text[at][:, 1:])[1].backward()
        optimizer.step()
        if step < steps - 1:
            optimizer.zero_grad()
    return model


# -- export and back ---------------------------------------------------------------------------------------------------

BYTE = {"name": "byte"}
LLAMA3_ROPE = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32, factor=8.0)
LLAMA3_ROPE["rope_type"] = "llama3"
EXPERTS = dict(n_expert=4, n_hidden=24)
EXPORTS = [
    ("llama", dict(norm="pre", tie_embeddings=True, embed_std=0.02)),
    ("llama", dict(norm="gpas_pre", rope_scaling=LLAMA3_ROPE)),
    ("llama", dict(norm="gpas_lns", norm_affine=False)),
    ("llama", dict(norm="gpas_layerscale", embed_norm=True, gate_per="sublayer")),
    ("qwen2", dict(norm="gpas_scaled_init", qkv_bias=True)),
    ("qwen3", dict(norm="gpas_lns", qk_norm="head", head_dim=12)),
    ("glm4", dict(norm="gpas_peri")),
    ("glm4", dict(norm="sandwich", branch_scale="skipinit")),
    ("olmo2", dict(norm="gpas_olmo2")),
    ("mixtral", dict(norm="gpas_pre", **EXPERTS)),
    ("olmoe", dict(norm="gpas_lns", qk_norm="full", normalize_gates=False, **EXPERTS)),
    ("olmoe", dict(norm="pre", qk_norm="full", **EXPERTS)),
    ("qwen3_moe", dict(norm="gpas_pre", qk_norm="head", moe_from=2, moe_every=2, **EXPERTS)),
    ("granitemoeshared", dict(norm="gpas_pre", n_expert_shared=2, **EXPERTS)),
    ("granitemoeshared", dict(norm="lns", n_expert_shared=1, average_shared=True, **EXPERTS)),
]


@pytest.mark.parametrize(("family", "kwargs"), EXPORTS, ids=lambda x: x if isinstance(x, str) else x["norm"])
def test_transformers_gives_the_same_logits(family, kwargs, transformers, tmp_path):
    model = trained(small(**{"block_size": 64, "vocab_size": 257, **kwargs})).eval()
    name, difference = export_hf(model, tmp_path / "there", BYTE)
    assert name == family and difference < 1e-4
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "there").eval()
    assert theirs.config.model_type == family
    idx, _ = batch(model.config, T=64)
    with torch.no_grad():
        ours, logits = model(idx)[0], theirs(idx).logits
    assert ours.std() > 0.05
    assert (logits - ours).abs().max() < 1e-4

    # Import is the inverse up to folding, of what is written here as of what transformers writes, in shards.
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    back = [import_hf(tmp_path / "there"), import_hf(tmp_path / "sharded")]
    plain = dict(interchange.absorb(fold(model)).named_parameters())
    for other in back:
        assert dict(other.named_parameters()).keys() == plain.keys()
        assert all(torch.equal(p, plain[n]) for n, p in other.named_parameters())
        assert (other(idx)[0] - ours).abs().max() < 1e-4


def test_a_pruned_model_is_exported(transformers, tmp_path):
    model = trained(small("gpas_lns", vocab_size=257)).eval()
    del model.blocks[1]
    export_hf(model, tmp_path / "there")
    idx, _ = batch(model.config)
    assert (import_hf(tmp_path / "there")(idx)[0] - model(idx)[0]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(norm="post"), "post has no counterpart in transformers; .* llama, but its place of norms is A, not C"),
        (dict(norm="gpas_mix"), "its place of norms is A, not A and C"),
        (dict(norm="hybrid"), "its place of norms is A, not A and C and none"),
        (dict(norm="out"), "olmo2, but its qk_norm is full, not none"),
        (dict(norm="pre", norm_type="layernorm"), "its norm_type is rmsnorm, not layernorm"),
        (dict(norm="pre", qk_norm="head", v_norm=True), "its v_norm is False, not True"),
        (dict(norm="pre", qk_norm="head", qk_norm_type="layernorm"), "its qk_norm_type is rmsnorm, not layernorm"),
        (dict(norm="pre", qk_norm="full"), "its qk_norm is none, not full"),
        (dict(norm="pre", qkv_bias=True, head_dim=12), "qwen2, but its head_dim is 8, not 12"),
        (dict(norm="pre", normalize_gates=False, **EXPERTS), "mixtral, but its normalize_gates is True, not False"),
        (dict(norm="pre", moe_from=2, **EXPERTS), "mixtral, but its MLPs are experts, not dense and experts"),
        (dict(norm="peri", **EXPERTS), "glm4, but its MLPs are dense, not experts"),
        (dict(norm="peri", tie_embeddings=True), "the embedding's norm cannot go into a table that is the head"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(map(str, x.values())),
)
def test_a_model_without_counterpart(kwargs, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export_hf(GPT(small(**kwargs)), tmp_path / "there")
    assert not list(tmp_path.iterdir())


def test_a_family_by_name(tmp_path):
    with pytest.raises(UserError, match="a model of norm pre is not qwen3, but its qk_norm is head, not none"):
        export_hf(GPT(small("pre")), tmp_path / "there", family="qwen3")
    with pytest.raises(UserError, match="unknown family 'gpt2'; known: llama"):
        export_hf(GPT(small("pre")), tmp_path / "there", family="gpt2")


def test_export_refuses_a_difference(transformers, tmp_path):
    model = trained(small("gpas_pre", norm_eps=0.1, vocab_size=257))  # an eps that matters cannot be one for all norms
    with pytest.raises(UserError, match="as llama its logits differ by .*, more than max_difference 0.001"):
        export_hf(model, tmp_path / "there")
    assert not list(tmp_path.iterdir())
    export_hf(model, tmp_path / "there", max_difference=1.0)
    with pytest.raises(UserError, match="exists; --overwrite replaces it"):
        export_hf(model, tmp_path / "there", max_difference=1.0)


# -- import ------------------------------------------------------------------------------------------------------------

SMALL = dict(vocab_size=99, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, bos_token_id=1, eos_token_id=2)
MOE = dict(num_experts_per_tok=2, num_local_experts=4)
OPEN = {
    "Llama 2": ("Llama", dict(rms_norm_eps=1e-5)),
    "Llama 3": ("Llama", dict(tie_word_embeddings=True, rope_parameters=dict(rope_theta=5e5, **LLAMA3_ROPE))),
    "Qwen2.5": ("Qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=True)),
    "Qwen3": ("Qwen3", dict(head_dim=16)),
    "OLMo 2": ("Olmo2", dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "Mixtral": ("Mixtral", MOE),
    "OLMoE": ("Olmoe", dict(num_experts_per_tok=2, num_experts=4)),
    "Qwen3-MoE": (
        "Qwen3Moe",
        dict(num_experts_per_tok=2, num_experts=4, head_dim=12, moe_intermediate_size=40, mlp_only_layers=[1]),
    ),
}


@pytest.mark.parametrize("name", OPEN)
def test_import_gives_the_logits_of_transformers(name, transformers, tmp_path):
    kind, kwargs = OPEN[name]
    config = getattr(transformers, kind + "Config")(**SMALL, **kwargs)
    theirs = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + ("norm" in n))
    theirs.save_pretrained(tmp_path)
    model = import_hf(tmp_path)
    idx, _ = batch(GPTConfig(vocab_size=99), T=64)
    with torch.no_grad():
        ours, logits = model(idx)[0], theirs(idx).logits
    assert distance_of(ours, logits) < 1e-5
    assert (ours.argmax(-1) == logits.argmax(-1)).all()


def test_export_replaces_an_export_only(transformers, monkeypatch, tmp_path):
    model = GPT(small("pre"))
    export_hf(model, tmp_path / "there")
    with pytest.raises(UserError, match="there exists; --overwrite replaces it"):
        export_hf(model, tmp_path / "there")
    export_hf(model, tmp_path / "there", overwrite=True)
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="is not an export, it holds there"):
        export_hf(model, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years" and (tmp_path / "there" / "config.json").exists()

    def fails(self, target):
        if self.name == "new":
            raise OSError(39, "Directory not empty")
        return rename(self, target)

    before, rename = (tmp_path / "there" / "config.json").read_bytes(), Path.rename
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(UserError, match="cannot write .*there: Directory not empty"):
        export_hf(model, tmp_path / "there", overwrite=True)
    assert (tmp_path / "there" / "config.json").read_bytes() == before


def test_damaged_config(transformers, tmp_path):
    export_hf(GPT(small("pre")), tmp_path / "there")
    path = tmp_path / "there" / "config.json"
    good = json.loads(path.read_text())
    for change in (dict(rope_parameters="x"), dict(rope_parameters=[1]), dict(vocab_size=None)):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match="config.json is damaged"):
            import_hf(tmp_path / "there")
    path.write_text(json.dumps(good))
    with pytest.raises(UserError, match="block_size 17 is longer than the 16 of"):
        import_hf(tmp_path / "there", block_size=17)
    assert import_hf(tmp_path / "there", block_size=8).config.block_size == 8


def distance_of(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


LLAMA = dict(model_type="llama", rms_norm_eps=1e-6, **SMALL)
GRANITE = dict(model_type="granitemoeshared", attention_multiplier=8**-0.5, **MOE)


def read_config(config, folder):
    """The GPTConfig of a folder with this config.json and a file of weights that nobody opens."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    return interchange.read_config(folder, interchange.check_folder(folder)["model_type"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="gpt2"), "unknown model_type 'gpt2'; known: llama, qwen2"),
        (dict(model_type=[1]), r"unknown model_type \[1\]; known: llama, qwen2"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'; only 'silu'"),
        (dict(attention_bias=True), "attention_bias True; only False"),
        (dict(mlp_bias=True), "mlp_bias True; only False"),
        (dict(sliding_window=32), "sliding_window 32; only None"),
        (dict(model_type="mixtral", sliding_window=32, **MOE), "sliding_window 32; only None"),
        (dict(model_type="qwen2", use_sliding_window=True, max_window_layers=1), "sliding_window"),
        (dict(layer_types=["sliding_attention"] * 3), "layer_types"),
        (dict(rope_scaling=dict(type="yarn", factor=4.0)), "rope_scaling has rope_type 'yarn'; known: linear, llama3"),
        (dict(rope_scaling=dict(rope_type="linear")), "Missing required keys in .*linear.*factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5; heads here are rotated whole"),
        (dict(model_type="glm4", head_dim=8), "partial_rotary_factor 0.5; heads here are rotated whole"),
        (dict(model_type="glm4", head_dim=8, partial_rotary_factor=1.0), "attention_bias True; only False"),
        (dict(quantization_config={"bits": 4}), "quantization_config .*; only None"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping 30.0; only None"),
        (dict(auto_map={"AutoModelForCausalLM": "modeling.Own"}), "auto_map .*; only None"),
        (dict(hidden_size=30), "hidden size .30. is not a multiple of the number of attention heads .4."),
        (dict(hidden_size=20), "even rotary dimension, but got `head_dim`=5"),
        (dict(hidden_size=None), "hidden_size.* expected int, got NoneType"),
        (dict(vocab_size="abc"), "vocab_size.* expected int, got str"),
        (dict(max_position_embeddings=2.5), "max_position_embeddings.* expected int, got float"),
        (dict(rms_norm_eps=-1.0), "norm_eps"),
        (dict(model_type="qwen3_moe", **MOE, mlp_only_layers=[0, 1, 2]), "moe_from 4 must be a layer, of 3"),
        (dict(model_type="qwen3_moe", **MOE, mlp_only_layers=[0]), "intermediate_size 40; only 768"),
        (dict(model_type="qwen3_moe", **MOE, decoder_sparse_step=2), "decoder_sparse_step 2; only 1"),
        (dict(model_type="olmoe", num_experts=4, num_experts_per_tok=2, clip_qkv=8.0), "clip_qkv 8.0; only None"),
        (dict(model_type="granitemoeshared", attention_multiplier=1.0, **MOE), "attention_multiplier 1.0; only 0.3535"),
        ({**GRANITE, "shared_intermediate_size": 60}, "shared_intermediate_size 60; only 40"),
        ({**GRANITE, "logits_scaling": 2.0}, "logits_scaling 2.0; only 1.0"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(map(str, x)),
)
def test_a_setting_that_cannot_be_represented(change, message, transformers, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        read_config({**LLAMA, **change}, tmp_path)
    assert len(str(error.value)) < 400


def test_settings_that_are_read(transformers, tmp_path):
    ignored = dict(use_cache=True, torch_dtype="bfloat16", attention_dropout=0.1, _name_or_path="x", use_nothing=False)
    config = read_config({**LLAMA, **ignored, "rope_theta": 5000.0}, tmp_path)
    assert config.rope_theta == 5000 and config.n_kv_head == 2 and config.norm == "pre" and config.block_size == 64
    with pytest.raises(ValueError, match="a low_freq_factor below its high_freq_factor"):
        GPTConfig(rope_scaling=LLAMA3_ROPE | dict(low_freq_factor=8.0))
    config = read_config({**LLAMA, "rope_scaling": dict(type="linear", factor=2.0)}, tmp_path)
    assert config.rope_scaling == dict(rope_type="linear", factor=2.0) and config.rope_theta == 10000
    config = read_config({**LLAMA, "model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}, tmp_path)
    assert config.qkv_bias
    config = read_config({**LLAMA, "model_type": "mixtral", **MOE}, tmp_path)
    assert config.rope_theta == 1e6 and config.n_expert == 4  # what transformers takes where a file is silent
    every_second = dict(model_type="qwen3_moe", mlp_only_layers=[0, 2], moe_intermediate_size=40, **MOE)
    config = read_config({**LLAMA, **every_second, "num_hidden_layers": 4}, tmp_path)
    assert config.head_dim == 8
    assert (config.moe_from, config.moe_every, config.n_expert, config.n_hidden) == (2, 2, 4, 40)


def test_damaged_weights(transformers, tmp_path):
    import safetensors.torch

    export_hf(GPT(small("pre")), tmp_path / "there")
    path = tmp_path / "there" / "model.safetensors"
    whole = safetensors.torch.load_file(path)
    lost = "model.layers.2.mlp.up_proj.weight"
    for change, message in [
        (lambda t: t.pop(lost), f"have missing_keys, {lost}"),
        (lambda t: t.update(more=torch.ones(2)), "have unexpected_keys, more"),
        (lambda t: t.update({lost: torch.ones(2, 3)}), rf"have mismatched_keys, .*{lost}.*\[2, 3\].*\[88, 32\]"),
    ]:
        tensors = dict(whole)
        change(tensors)
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            import_hf(tmp_path / "there")
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        import_hf(tmp_path / "there")
    path.unlink()
    with pytest.raises(UserError, match="no file named model.safetensors"):
        import_hf(tmp_path / "there")
    with pytest.raises(UserError, match="No such file"):
        import_hf(tmp_path / "nowhere")


def test_other_weights_than_safetensors_are_not_opened(transformers, tmp_path):
    export_hf(GPT(small("pre")), tmp_path / "there")
    (tmp_path / "there" / "model.safetensors").rename(tmp_path / "there" / "other.safetensors")
    (tmp_path / "there" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(UserError, match="weights in .*there cannot be read: .*no file named model.safetensors"):
        import_hf(tmp_path / "there")
    assert not Path("opened").exists()


def test_a_tensor_that_the_table_does_not_know(transformers, monkeypatch, tmp_path):
    export_hf(GPT(small("pre")), tmp_path / "there")
    row = FAMILIES["llama"]
    fewer = {theirs: ours for theirs, ours in row.norm_names.items() if theirs != "input_layernorm"}
    monkeypatch.setitem(FAMILIES, "llama", interchange.replace(row, norm_names=fewer))
    for use in (lambda: import_hf(tmp_path / "there"), lambda: export_hf(GPT(small("pre")), tmp_path / "again")):
        with pytest.raises(UserError, match="norm.weight has no counterpart in the table, which knows the parameters of model.py and transformers"):
            use()


def test_import_refuses_a_difference(transformers, monkeypatch, tmp_path):
    export_hf(trained(small("pre", vocab_size=257)), tmp_path / "there")
    monkeypatch.setattr(interchange, "NO_EFFECT", interchange.NO_EFFECT | {"hidden_act"})  # a check that was forgotten
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    (tmp_path / "there" / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(UserError, match="as llama its logits differ by .*, more than max_difference 0.001"):
        import_hf(tmp_path / "there")


# -- tokenizers and the program ----------------------------------------------------------------------------------------

TEXT = "def f(x):\n\treturn  x  # größer, 数, 🙂 <|endoftext|>\r\n   the theatre's 12345 ends\n\n"


PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_pairs(gap=0):
    """A tokenizer state of 256 bytes and 200 merges of this file's most frequent pairs, by tiktoken's own trainer; two
    special tokens, after as many unused numbers as `gap`."""
    from tiktoken._educational import bpe_train

    ranks = bpe_train(Path(__file__).read_text()[:4000], 456, PATTERN, visualise=None)
    special = {"<|middle|>": len(ranks) + gap + 1, "<|endoftext|>": len(ranks) + gap}
    encoding = tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return prepare_data.tokenizer_state(encoding)


STATES = {"byte": lambda: BYTE, "byte pairs": byte_pairs, "numbers with a gap": lambda: byte_pairs(5)}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_tokenizers_agree(make, transformers, tmp_path):
    state = make()
    encoding = prepare_data.build_encoding(state)
    export_hf(GPT(small("pre", vocab_size=encoding.n_vocab)), tmp_path / "there", state)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    text = TEXT + Path(__file__).read_text()
    plain = text.replace("<|endoftext|>", "").replace("<|middle|>", "")
    expected = list(map(int, prepare_data.encode(encoding, plain)))
    assert theirs(plain)["input_ids"] == expected
    assert theirs.decode(expected) == plain
    for word, number in encoding._special_tokens.items():
        assert theirs.convert_tokens_to_ids(word) == number and theirs("a" + word)["input_ids"][-1] == number
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert theirs.bos_token_id == theirs.eos_token_id == config["bos_token_id"] == config["eos_token_id"]
    assert theirs.eos_token_id == encoding.eot_token

    back = import_tokenizer(tmp_path / "there")
    again = prepare_data.build_encoding(back)
    ids = list(prepare_data.encode(encoding, text))  # special words are ordinary text
    assert list(prepare_data.encode(again, text)) == ids
    assert again.eot_token == encoding.eot_token and again.n_vocab == encoding.n_vocab

    # What came from a tokenizer.json goes out as that file.
    export_hf(GPT(small("pre", vocab_size=encoding.n_vocab)), tmp_path / "further", back)
    further = transformers.AutoTokenizer.from_pretrained(tmp_path / "further")
    assert further(plain)["input_ids"] == expected and further.eos_token_id == encoding.eot_token


def test_the_token_between_documents(transformers, tmp_path):
    """The one that begins their texts, or else the first that ends them, or else a usual one."""
    export_hf(GPT(small("pre", vocab_size=500)), tmp_path / "there", byte_pairs())
    path = tmp_path / "there" / "config.json"
    config = json.loads(path.read_text())
    middle = import_tokenizer(tmp_path / "there")["json"].index("<|middle|>") and 457
    for begin, end, expected in [
        (middle, 456, "<|middle|>"),
        (None, [middle, 456], "<|middle|>"),
        (9999, None, "<|endoftext|>"),
        (None, None, "<|endoftext|>"),
    ]:
        path.write_text(json.dumps({**config, "bos_token_id": begin, "eos_token_id": end}))
        assert import_tokenizer(tmp_path / "there")["eot_token"] == expected
    (tmp_path / "there" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        import_tokenizer(tmp_path / "there")
    (tmp_path / "there" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="there is no .*tokenizer.json"):
        import_tokenizer(tmp_path / "there")


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs a program's main with arguments and returns what it prints."""

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", ["program", *args])
        module.main()
        return capsys.readouterr().out

    return call


def test_program_there_and_back(tmp_path, monkeypatch, program, transformers):
    monkeypatch.chdir(tmp_path)
    model = trained(small("gpas_lns", vocab_size=257, block_size=32)).eval()
    Path("run").mkdir()
    interchange.save_run(model, Path("run"), BYTE)

    out = program(interchange, "--export=hf", "--out_dir=run", "--to=there")
    assert "wrote there: a llama, logits within" in out
    assert {path.name for path in Path("there").iterdir()} == interchange.EXPORTED
    Path("text").mkdir()
    for i in range(8):
        Path(f"text/{i}.txt").write_text(TEXT * 5 + str(i))
    out = program(interchange, "--import_from=there", "--out_dir=back", "--text=text")
    assert "wrote back/ckpt.pt" in out and "without" not in out
    again = "--import_from=there", "--out_dir=back", "--text=text", "--overwrite"
    with pytest.raises(UserError, match="back holds a run; --overwrite replaces it"):
        program(interchange, *again[:-1])
    assert "wrote back/data" in program(interchange, *again)
    with pytest.raises(UserError, match="nowhere"):
        program(interchange, *again[:2], "--text=nowhere", "--overwrite")
    before = {path: path.read_bytes() for path in Path("back").rglob("*.*")}
    Path("empty.txt").write_text("")
    with pytest.raises(UserError, match="no text in empty.txt"):
        program(interchange, *again[:2], "--text=empty.txt", "--overwrite")
    assert {path: path.read_bytes() for path in Path("back").rglob("*.*")} == before
    with pytest.raises(UserError, match="no text in empty.txt"):
        program(interchange, again[0], "--out_dir=fresh", "--text=empty.txt")
    assert not Path("fresh/ckpt.pt").exists()
    assert "wrote one/data" in program(interchange, again[0], "--out_dir=one", "--text=text/0.txt")  # a single document
    Path("back/data/notes.md").write_text("mine")
    with pytest.raises(UserError, match="back/data is not a data set: it holds notes.md"):
        program(interchange, *again)
    Path("back/data/notes.md").unlink()
    idx, _ = batch(model.config)
    back = interchange.load_run("back")[0]
    assert (back(idx)[0] - model(idx)[0]).abs().max() < 1e-4
    assert "step 0: validation loss" in program(train, "--eval_only", "--out_dir=back", "--dtype=float32")
    assert "def" in program(train, "--sample=def", "--out_dir=back", "--sample_tokens=5", "--dtype=float32")
    more = "--init_from=resume", "--out_dir=back", "--max_iters=1", "--gradient_accumulation_steps=1"
    assert "done" in program(train, *more, "--dtype=float32", "--sample_tokens=5")
    with pytest.raises(UserError, match="back holds a run that was trained: name another folder with --out_dir"):
        program(interchange, *again)


def test_a_run_without_a_tokenizer(tmp_path, monkeypatch, program, transformers):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    interchange.save_run(GPT(small("pre")), Path("run"), None)
    assert "without a tokenizer: the run's data" in program(interchange, "--export=hf", "--out_dir=run", "--to=there")
    out = program(interchange, "--import_from=there", "--out_dir=back")
    assert "without a tokenizer, so that it cannot be sampled: there is no there/tokenizer.json" in out
    Path("some.txt").write_text(TEXT)
    with pytest.raises(UserError, match="--text needs the model's tokenizer: there is no there/tokenizer.json"):
        program(interchange, "--import_from=there", "--out_dir=other", "--text=some.txt")
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "give one of --export=hf, --import_from=FOLDER, --harness=TASKS, --questions_from=TASKS"),
        ("--export=onnx --out_dir=x --to=y", "unknown export 'onnx'; known: hf"),
        ("--export=hf --out_dir=x", "--export needs --to=PATH too"),
        ("--import_from=x --out_dir=y --to=z", "to has no effect with --import_from"),
        ("--export=hf --out_dir=x --to=y --family=gpt2", "unknown family 'gpt2'; known: llama"),
        ("--export=hf --out_dir=x --to=y --max_difference=0", "max_difference is 0.0; it must be at least"),
        ("--import_from=x --out_dir=y --block_size=0", "block_size is 0; it must be at least 1"),
        ("--questions_from=arc_easy --to=.", ". is a folder; --to names a file here"),
        ("--export=hf --out_dir=nowhere --to=y", "no checkpoint nowhere/ckpt.pt"),
        ("--import_from=nowhere --out_dir=y", "nowhere/config.json: No such file or directory"),
    ],
)
def test_mistakes_end_in_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["interchange.py", *args.split()])
    with pytest.raises(SystemExit) as error:
        interchange.run(interchange.main)
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_mistakes_come_before_a_missing_library(tmp_path, monkeypatch, program):
    """transformers is named where it is needed, and not before what is wrong in any case."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name, config in (("run", small("pre")), ("post", small("post"))):
        Path(name).mkdir()
        interchange.save_run(GPT(config), Path(name), None)
    Path("there").mkdir()
    Path("there/config.json").write_text(json.dumps(LLAMA))
    export, into = "--export=hf", "--import_from=there"
    with pytest.raises(UserError, match="a model of norm post has no counterpart"):
        program(interchange, export, "--out_dir=post", "--to=x")
    with pytest.raises(UserError, match="run is not an export, it holds ckpt.pt"):
        program(interchange, export, "--out_dir=run", "--to=run", "--overwrite")
    Path("there/model.safetensors").touch()
    with pytest.raises(UserError, match="run holds a run"):
        program(interchange, into, "--out_dir=run")
    with pytest.raises(UserError, match="nowhere"):
        program(interchange, into, "--out_dir=x", "--text=nowhere")
    for args in (export, "--out_dir=run", "--to=x"), (into, "--out_dir=x"):
        with pytest.raises(UserError, match="this needs the optional library transformers: pip install transformers"):
            program(interchange, *args)
    assert not Path("x").exists()
