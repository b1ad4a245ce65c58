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
from interchange import FAMILIES, export_hf, fold, import_hf, import_tokenizer, tokenizer_files
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


def test_fold_refuses_what_it_cannot_divide_by():
    model = GPT(small("gpas_pre", gpas_act="identity"))
    model.set_gates([0.5, 0.5, 1.0, 0.5])
    with pytest.raises(ValueError, match=r"layer 3: the gate \[1.0\] scales by 1 - act\(a\) = 0"):
        fold(model)
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
    assert type(theirs).__name__ == FAMILIES[family].architecture
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


def test_a_pruned_model_is_exported(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = trained(small("gpas_lns", vocab_size=257)).eval()
    del model.blocks[1]
    export_hf(model, tmp_path / "there")
    idx, _ = batch(model.config)
    assert (import_hf(tmp_path / "there")(idx)[0] - model(idx)[0]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(norm="post"), "norm post has no counterpart in transformers; .* llama, but it has norms at A, not C"),
        (dict(norm="gpas_mix"), "it has norms at A, not A and C"),
        (dict(norm="hybrid"), "norms at A, not A and C and none"),
        (dict(norm="out"), "its qk_norm is full, not none"),
        (dict(norm="pre", norm_type="layernorm"), "its norm is not layernorm"),
        (dict(norm="pre", qk_norm="head", v_norm=True), "it has no norm on values"),
        (dict(norm="pre", qk_norm="full"), "qk_norm"),
        (dict(norm="pre", normalize_gates=False, **EXPERTS), r"gates of its experts sum to 1 \(normalize_gates\)"),
        (dict(norm="peri", **EXPERTS), "experts"),
        (dict(norm="peri", tie_embeddings=True), "the embedding's norm cannot go into a table that is the head"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(map(str, x.values())),
)
def test_a_model_without_counterpart(kwargs, message, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    with pytest.raises(UserError, match=message):
        export_hf(GPT(small(**kwargs)), tmp_path / "there")
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_difference(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
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


def test_export_replaces_an_export_only(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = GPT(small("pre"))
    export_hf(model, tmp_path / "there")
    with pytest.raises(UserError, match="there exists; --overwrite replaces it"):
        export_hf(model, tmp_path / "there")
    export_hf(model, tmp_path / "there", overwrite=True)
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="is not an export, it holds there"):
        export_hf(model, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years" and (tmp_path / "there" / "config.json").exists()


def test_damaged_config(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    export_hf(GPT(small("pre")), tmp_path / "there")
    path = tmp_path / "there" / "config.json"
    good = json.loads(path.read_text())
    for change in (dict(model_type=[1]), dict(rope_scaling="x"), dict(rope_theta="x"), dict(sliding_window="x")):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match="config.json is damaged"):
            import_hf(tmp_path / "there")
    path.write_text(json.dumps(good))
    with pytest.raises(UserError, match="block_size 17 is longer than the 16 of"):
        import_hf(tmp_path / "there", block_size=17)


def distance_of(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


LLAMA = dict(model_type="llama", rms_norm_eps=1e-6, **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="gpt2"), "unknown model_type 'gpt2'; known: llama, qwen2"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'; only 'silu'"),
        (dict(attention_bias=True), "attention_bias True; only False"),
        (dict(mlp_bias=True), "mlp_bias True; only False"),
        (dict(sliding_window=32), "sliding_window 32, and attention here has no window"),
        (dict(layer_types=["sliding_attention"]), "layer_types"),
        (dict(rope_scaling=dict(type="yarn", factor=4.0)), "rope_scaling has rope_type 'yarn'; known: linear, llama3"),
        (dict(rope_scaling=dict(rope_type="linear")), "rope_scaling of type linear needs positive numbers factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5; heads here are rotated whole"),
        (dict(quantization_config={"bits": 4}), "quantization_config .* which nothing here represents"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping 30.0, which nothing here represents"),
        (dict(hidden_size=30), "n_embd 30 is not divisible by n_head 4"),
        (dict(hidden_size=None), "config.json gives n_embd as None; it must be int"),
        (dict(vocab_size="abc"), "config.json gives vocab_size as 'abc'; it must be int"),
        (dict(max_position_embeddings=2.5), "config.json gives block_size as 2.5; it must be int"),
        (dict(rms_norm_eps=True), "config.json gives norm_eps as True; it must be float"),
        (dict(model_type="qwen3_moe", **MOE, mlp_only_layers=[0, 1, 2]), "experts in layers"),
        (dict(model_type="granitemoeshared", attention_multiplier=1.0, **MOE), "attention_multiplier is 1.0"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(map(str, x)),
)
def test_a_setting_that_cannot_be_represented(change, message):
    with pytest.raises(UserError, match=message):
        interchange.fields_of({**LLAMA, **change})


def test_settings_that_have_no_effect_here():
    ignored = dict(sliding_window=32, use_sliding_window=False, use_cache=True, torch_dtype="bfloat16")
    _, config = interchange.fields_of({**LLAMA, **ignored, "_name_or_path": "x", "rope_theta": 5000.0})
    assert config.rope_theta == 5000 and config.n_kv_head == 2 and config.norm == "pre" and config.block_size == 64
    with pytest.raises(UserError, match="config.json has no rms_norm_eps"):
        interchange.fields_of({name: value for name, value in LLAMA.items() if name != "rms_norm_eps"})


def test_damaged_weights(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    export_hf(GPT(small("pre")), tmp_path / "there")
    path = tmp_path / "there" / "model.safetensors"
    whole = safetensors.load_file(path)
    lost = "model.layers.2.mlp.up_proj.weight"
    for change, message in [
        (lambda t: t.pop(lost), f"no tensor {lost}"),
        (lambda t: t.update(more=torch.ones(2)), "a tensor that has no place here, more"),
        (lambda t: t.update({lost: torch.ones(2, 3)}), rf"{lost} has shape \(2, 3\) where the config gives \(88, 32\)"),
    ]:
        tensors = dict(whole)
        change(tensors)
        safetensors.save_file(tensors, path)
        with pytest.raises(UserError, match=message):
            import_hf(tmp_path / "there")
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        import_hf(tmp_path / "there")
    path.unlink()
    with pytest.raises(UserError, match="has no model.safetensors"):
        import_hf(tmp_path / "there")
    with pytest.raises(UserError, match="No such file"):
        import_hf(tmp_path / "nowhere")


# -- tokenizers and the program ----------------------------------------------------------------------------------------

TEXT = "def f(x):\n\treturn  x  # größer, 数, 🙂 <|endoftext|>\r\n   the theatre's 12345 ends\n\n"


def byte_pairs():
    """A tokenizer state of 256 bytes and 200 merges of this file's most frequent pairs, by tiktoken's own trainer."""
    from tiktoken._educational import bpe_train

    ranks = bpe_train(Path(__file__).read_text()[:4000], 456, interchange.GPT2_PATTERN, visualise=None)
    special = {"<|endoftext|>": len(ranks)}
    encoding = tiktoken.Encoding("own", pat_str=interchange.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return prepare_data.tokenizer_state(encoding)


@pytest.mark.parametrize("make", [lambda: BYTE, byte_pairs], ids=["byte", "byte pairs"])
def test_tokenizers_agree(make, transformers, tmp_path):
    state = make()
    encoding = prepare_data.build_encoding(state)
    text = TEXT + Path(__file__).read_text()
    for name, content in tokenizer_files(state, GPTConfig()).items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": encoding.eot_token}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = list(map(int, prepare_data.encode(encoding, text.replace("<|endoftext|>", ""))))
    assert theirs(text.replace("<|endoftext|>", ""))["input_ids"] == expected
    assert theirs.decode(expected) == text.replace("<|endoftext|>", "")
    assert theirs.eos_token_id == encoding.eot_token

    back, why = import_tokenizer(tmp_path)
    assert why is None
    again = prepare_data.build_encoding(back)
    assert again.encode_ordinary(text) == list(map(int, prepare_data.encode(encoding, text)))
    assert again.eot_token == encoding.eot_token

    content = json.loads((tmp_path / "tokenizer.json").read_text())
    cases = (dict(normalizer={"type": "NFC"}), "normalizer NFC"), (dict(pre_tokenizer=None), "pre-tokenizer")
    for change, message in cases:
        (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **change}))
        back, why = import_tokenizer(tmp_path)
        assert back is None and message in why


def test_program_there_and_back(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    monkeypatch.chdir(tmp_path)
    model = trained(small("gpas_lns", vocab_size=257, block_size=32)).eval()
    Path("run").mkdir()
    interchange.save_run(model, Path("run"), BYTE)

    def program(module, *args):
        monkeypatch.setattr(sys, "argv", ["program", *args])
        module.main()
        return capsys.readouterr().out

    assert "LlamaForCausalLM, logits within" in program(interchange, "--export=hf", "--out_dir=run", "--to=there")
    Path("text").mkdir()
    for i in range(8):
        Path(f"text/{i}.txt").write_text(TEXT * 5 + str(i))
    out = program(interchange, "--import_from=there", "--out_dir=back", "--text=text")
    assert "wrote back/ckpt.pt" in out and "without" not in out
    again = "--import_from=there", "--out_dir=back", "--text=text", "--overwrite"
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
    assert "held out" in program(interchange, again[0], "--out_dir=one", "--text=text/0.txt")  # a single document
    Path("back/data/notes.md").write_text("mine")
    with pytest.raises(UserError, match="holds notes.md: it is not the data of an import"):
        program(interchange, *again)
    Path("back/data/notes.md").unlink()
    idx, _ = batch(model.config)
    back = interchange.load_run("back")[0]
    assert (back(idx)[0] - model(idx)[0]).abs().max() < 1e-4
    assert "step 0: validation loss" in program(train, "--eval_only", "--out_dir=back", "--dtype=float32")
    assert "def" in program(train, "--sample=def", "--out_dir=back", "--sample_tokens=5", "--dtype=float32")
    more = "--init_from=resume", "--out_dir=back", "--max_iters=1", "--gradient_accumulation_steps=1"
    assert "done" in program(train, *more, "--dtype=float32", "--sample_tokens=5")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "give either --export=hf or --import_from=FOLDER"),
        ("--export=onnx --out_dir=x --to=y", "export is 'onnx'; known: hf"),
        ("--export=hf --out_dir=x", "give a folder with --to=FOLDER"),
        ("--import_from=x --out_dir=y --to=z", "to has no effect here"),
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


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match="pip install nothing"):
        prepare_data.optional("no_such_module", "nothing")
