"""model.py against the papers' equations, in value and in gradient."""

import dataclasses
import math
import shutil

import pytest
import reference
import torch
import torch.nn.functional as F

from model import GPAS_ACTS, GPT, SCHEMES, GPTConfig, Residual, Scheme, find_scheme, gate_scale, gpas, rotary_table

ALL = [prefix + name for name in SCHEMES for prefix in ("", "gpas_")]
NINE = "post", "pre", "sandwich", "peri", "out", "pre_post", "deepnorm", "mix", "lns"  # of the GPAS and Peri-LN papers


def small(norm, **kwargs):
    given = dict(block_size=16, vocab_size=29, n_layer=4, n_head=4, n_kv_head=2, n_embd=32, norm=norm) | kwargs
    row = find_scheme(norm)[0]
    if "groupnorm" in (given.get("norm_type", row.norm_type), given.get("qk_norm_type")):
        given.setdefault("norm_groups", 4)
    if given.get("branch_scale", row.branch_scale) == "layerscale":
        given.setdefault("layerscale_init", 0.1)
    return GPTConfig(**given)


def randomized(config, dtype=torch.float32):
    """A model with nothing at its initial value: gains around 1, gates of both signs and one that flips the stream."""
    model = GPT(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".gate"):
                l = int(name.split(".")[1])
                p.copy_(torch.tensor([0.4, -0.7, 2.0, 0.1, -0.3])[[(l + i) % 5 for i in range(len(p))]])
            elif p.dim() == 1:
                p.copy_((0 if name.endswith("bias") else 1) + 0.3 * torch.randn_like(p))
            elif "embed" not in name:
                p.copy_(torch.randn_like(p) * 0.8 / math.sqrt(p.shape[1]))
    return model


def batch(config, B=2, T=None):
    idx = torch.randint(0, config.vocab_size, (B, T or config.block_size))
    targets = torch.randint(0, config.vocab_size, idx.shape)
    targets[0, :3] = -100
    return idx, targets


def distance(a, b):
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def gradients(model, idx, targets):
    model.zero_grad()
    logits, loss = model(idx, targets)
    loss.backward()
    return logits.detach(), loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def reference_gradients(model, idx, targets, **kwargs):
    P = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits = reference.forward(P, model.config, idx, **kwargs)
    loss = reference.loss(logits, targets)
    return logits.detach(), loss.detach(), dict(zip(P, torch.autograd.grad(loss, P.values())))


def worst_gradient(grads, expected):
    assert grads.keys() == expected.keys()
    return max(distance(grads[n], expected[n]) for n in expected)


# -- every scheme -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ALL)
def test_equals_the_papers_equation(norm):
    model = randomized(small(norm), torch.float64)
    idx, targets = batch(model.config)
    logits, loss, grads = gradients(model, idx, targets)
    expected_logits, expected_loss, expected = reference_gradients(model, idx, targets)
    assert distance(logits, expected_logits) < 1e-10
    assert abs(loss - expected_loss) < 1e-10
    assert worst_gradient(grads, expected) < 1e-10

    model = model.float()  # where it fails here alone, the rounding of float32 is larger than is allowed
    logits, loss, grads = gradients(model, idx, targets)
    assert distance(logits.double(), expected_logits) < 1e-5
    for name, grad in grads.items():  # a scalar's gradient is a long sum that may cancel
        tolerance = 1e-5 if grad.numel() > 1 else 1e-4 if norm.removeprefix("gpas_") in list(SCHEMES)[:9] else 1e-3
        assert distance(grad.double(), expected[name]) < tolerance, name


@pytest.mark.parametrize("options", [dict(n_kv_head=1), dict(n_kv_head=4), dict(qk_norm="head"), dict(qk_norm="full")], ids=str)
def test_attention_variants_equal_the_reference(options):
    model = randomized(small("gpas_pre", **options), torch.float64)
    idx, targets = batch(model.config)
    logits, _, grads = gradients(model, idx, targets)
    expected_logits, _, expected = reference_gradients(model, idx, targets)
    assert distance(logits, expected_logits) < 1e-10
    assert worst_gradient(grads, expected) < 1e-10


@pytest.mark.parametrize("norm", ["gpas_post", "gpas_peri", "lns"])
def test_layernorm_equals_the_reference(norm):
    model = randomized(small(norm, norm_type="layernorm"), torch.float64)
    idx, targets = batch(model.config)
    logits, _, grads = gradients(model, idx, targets)
    expected_logits, _, expected = reference_gradients(model, idx, targets)
    assert distance(logits, expected_logits) < 1e-10
    assert worst_gradient(grads, expected) < 1e-10


@pytest.mark.parametrize(
    "norm, wrong",
    [
        ("gpas_pre", dict(gpas=lambda x, a: x - reference.silu(a) * x)),  # no stop-gradient
        ("gpas_pre", dict(gpas=lambda x, a: x - a * x.detach())),  # no activation
        ("gpas_deepnorm", dict(gpas=lambda x, a: x)),  # a gate that is not connected
        ("peri", dict(norm=lambda x, P, name, c: reference.layernorm(x, P[name + ".weight"]))),
    ],
)
def test_the_comparison_sees_a_wrong_version(norm, wrong):
    model = randomized(small(norm), torch.float64)
    idx, targets = batch(model.config)
    grads = gradients(model, idx, targets)[2]
    P = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    loss = reference.loss(reference.forward(P, model.config, idx, **wrong), targets)
    expected = torch.autograd.grad(loss, P.values(), allow_unused=True, materialize_grads=True)
    assert worst_gradient(grads, dict(zip(P, expected))) > 1e-3


def test_no_two_schemes_are_the_same():
    """From the same matrices each scheme computes something else; sandwich and peri differ by the embedding norm."""
    outputs = {}
    only_init = [n for n, row in SCHEMES.items() if n != "pre" and dataclasses.replace(row, init="normal") == SCHEMES["pre"]]
    for norm in (name for name in ALL if name.removeprefix("gpas_") not in only_init):
        torch.manual_seed(1)
        model = randomized(small(norm))
        for n, p in model.named_parameters():  # gains of the same value everywhere, so that only the placement differs
            if p.dim() == 1 and not n.endswith(".gate"):
                torch.nn.init.constant_(p, 0.8 if p.numel() > 1 else 0.5)
            elif p.dim() == 2:
                torch.manual_seed(len(n))
                torch.nn.init.normal_(p, std=0.2)
        outputs[norm] = model(torch.arange(16)[None])[0].detach()
    names = list(outputs)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert distance(outputs[a], outputs[b]) > 1e-3, (a, b)


@pytest.mark.parametrize("norm", ALL)
def test_every_layer_acts_and_every_parameter_learns(norm):
    model = GPT(small(norm))
    inputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: inputs.append((args[0].detach(), out.detach())))
    _, _, grads = gradients(model, *batch(model.config))
    assert len(inputs) == 4
    assert all(distance(out, x) > 1e-4 for x, out in inputs)
    assert all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", SCHEMES)
def test_gates_at_zero_give_the_base_scheme_to_the_bit(norm, autocast):
    results = []
    for name in (norm, "gpas_" + norm):
        torch.manual_seed(0)
        model = GPT(small(name))
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(gradients(model, *batch(model.config)))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][2].items():
        assert torch.equal(grad, results[1][2][name]), name


@pytest.mark.parametrize("norm", ALL)
def test_a_block_is_a_function_of_the_residual_state(norm):
    """And the head reads the last state through the final norm. Analysis computes a model in these steps."""
    model = randomized(small(norm))
    idx, _ = batch(model.config)
    x = model.embed_norm(model.embed_tokens(idx))
    for block in model.blocks:
        x = block(x)
    assert torch.equal(model.lm_head(model.norm(x)), model(idx)[0])


def test_a_moved_block_keeps_its_kind():
    model = GPT(small("gpas_mix", n_layer=8))  # the first two of eight are Post-LN, wherever they stand
    kinds = [block.attn_residual.post_norm is not None for block in model.blocks]
    assert kinds == [True, True] + [False] * 6
    lns = GPT(small("lns"))
    lns.blocks = torch.nn.ModuleList(reversed(lns.blocks))
    assert [round(1 / block.mlp_residual.s**2) for block in lns.blocks] == [4, 3, 2, 1]


# -- GPAS ---------------------------------------------------------------------------------------------------------------

GATES = [-3.0, -0.2, 0.0, 0.5, 1.2784645, 4.0]  # SiLU(1.2784645) = 1 up to rounding: a scale of nearly 0; 4: negative


@pytest.mark.parametrize("keep", [None, "input", "output"])
def test_jacobian_of_gpas_is_the_identity(keep):
    x, gate = torch.randn(6, dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    for vectorize in (False, True):
        J = torch.autograd.functional.jacobian(lambda x: gpas(x, gate_scale(gate), keep), x, vectorize=vectorize)
        assert torch.equal(J, torch.eye(6, dtype=torch.float64))
    assert torch.equal(torch.func.jacrev(lambda x: gpas(x, gate_scale(gate), keep))(x), torch.eye(6, dtype=torch.float64))
    naive = torch.func.jacrev(lambda x: x - F.silu(gate) * x)(x)
    assert torch.allclose(naive, (1 - F.silu(gate)) * torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("keep", ["input", "output"])
@pytest.mark.parametrize("a", GATES)
def test_kept_and_defined_gpas_agree(a, keep):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        x = torch.randn(4, 8, 16, dtype=dtype, requires_grad=True)
        gate = torch.tensor([a], dtype=dtype, requires_grad=True)
        g = torch.randn_like(x) + 0.1 * x.detach()
        value, defined = gpas(x, gate_scale(gate), keep), x - F.silu(gate) * x.detach()
        assert (value - defined).abs().max() <= 5e-7 * x.abs().max()
        gx, ga = torch.autograd.grad(value, (x, gate), g)
        assert torch.equal(gx, g)
        expected = torch.autograd.grad(defined, (x, gate), g)[1]
        assert distance(ga, expected) < tolerance, dtype


@pytest.mark.parametrize("keep", ["input", "output"])
def test_gpas_under_vmap_compile_and_autocast(keep):
    x, gate = torch.randn(5, 4, 8), torch.tensor([0.6])

    def total(x, gate, keep):
        return gpas(x.sin(), gate_scale(gate), keep).pow(2).sum()

    for f in (torch.func.grad(total, argnums=(0, 1)), torch.func.vmap(torch.func.grad(total, argnums=(0, 1)), (0, None, None))):
        for a, b in zip(f(x, gate, keep), f(x, gate, None)):
            assert distance(a, b) < 1e-5
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        results = []
        for f, kept in ((compiled, keep), (total, None)):
            xs, gates = x.clone().requires_grad_(), gate.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                f(xs, gates, kept).backward()
            results.append((xs.grad, gates.grad))
        for a, b in zip(*results):
            assert distance(a, b) < 1e-5


def saved_bytes(model, idx, autocast):
    """Bytes of the distinct storages that autograd keeps for the backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), t)  # t stays alive, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(idx, idx)
    return sum(nbytes for nbytes, _ in kept.values())


@pytest.mark.parametrize("norm", SCHEMES)
def test_gpas_keeps_no_activations(norm):
    idx = torch.randint(0, 29, (2, 64))
    models = [randomized(small(prefix + norm, n_embd=128, block_size=64)) for prefix in ("", "gpas_")]
    base, gated = (saved_bytes(model, idx, autocast=False) for model in models)
    if norm != "admin":  # omega's gradient needs the scaled shortcut itself
        assert gated <= 1.005 * base
    if norm in ("pre", "sandwich", "peri", "lns", "pre_post"):
        base, gated = (saved_bytes(model, idx, autocast=True) for model in models)
        assert gated <= 1.005 * base


def test_the_definition_keeps_activations(monkeypatch):
    """The measure above sees a copy that is kept."""
    idx = torch.randint(0, 29, (2, 64))
    model = randomized(small("gpas_pre", n_embd=128, block_size=64))
    cheap = saved_bytes(model, idx, autocast=False)
    monkeypatch.setattr("model.gpas", lambda x, scale, keep: x - (1 - scale) * x.detach())
    assert saved_bytes(model, idx, autocast=False) > 1.04 * cheap


# -- flags and ablations ------------------------------------------------------------------------------------------------

VARIANTS = [
    *(dict(norm="gpas_pre", gpas_act=act) for act in GPAS_ACTS if act != "silu"),
    *(dict(norm=norm, gpas_position=p) for norm in ("gpas_sandwich", "gpas_lns") for p in ("before", "norm", "module")),
    *(dict(norm="gpas_deepnorm", gpas_position=p) for p in ("before", "module")),
    dict(norm="gpas_pre", gpas_stop_gradient=False),
    dict(norm="gpas_post", gpas_stop_gradient=False),
    dict(norm="gpas_peri", gate_per="sublayer"),
    *(dict(norm="gpas_lns", s_position=p) for p in ("branch", "residual", "gain")),
    dict(norm="gpas_peri", norm_affine=False),
    dict(norm="gpas_peri", freeze_out_gain=True),
    dict(norm="gpas_hybrid", qk_norm="full"),
    dict(norm="gpas_deepnorm", branch_scale="layerscale", norm_type="dyt"),
    dict(norm="gpas_admin", branch_scale="skipinit", norm_type="layernorm", qk_norm="head"),
    dict(norm="gpas_mix", norm_type="groupnorm", branch_scale="layerscale", embed_norm=True),
    dict(norm="gpas_lns", norm_type="dyt", branch_scale="skipinit"),
    dict(norm="gpas_sandwich", branch_scale="layerscale"),
    dict(norm="gpas_olmo2", qk_norm_type="layernorm"),
    dict(norm="gpas_peri", qk_norm="head", v_norm=True, qk_norm_type="groupnorm"),
    dict(norm="dyt", norm_affine=False),
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.filterwarnings("ignore:s_position residual")
def test_variants_equal_the_reference(options):
    model = randomized(small(**options), torch.float64)
    idx, targets = batch(model.config)
    for p in model.parameters():
        p.requires_grad_(True)  # a frozen gain would have a gradient too
    logits, _, grads = gradients(model, idx, targets)
    expected_logits, _, expected = reference_gradients(model, idx, targets)
    assert distance(logits, expected_logits) < 1e-10
    assert worst_gradient(grads, expected) < 1e-10


@pytest.mark.parametrize("options", VARIANTS[:-1], ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.filterwarnings("ignore:s_position residual")
def test_each_variant_changes_something(options):
    """It has other parameters than the scheme without the flag, or from the same ones another output or gradient."""
    model, base = randomized(small(**options), torch.float64), GPT(small(options["norm"])).double()
    ours, theirs = ({n: (p.shape, p.requires_grad) for n, p in m.named_parameters()} for m in (model, base))
    if ours == theirs:
        base.load_state_dict(model.state_dict())
        data = batch(model.config)
        (a, _, ga), (b, _, gb) = gradients(model, *data), gradients(base, *data)
        assert distance(a, b) > 1e-3 or worst_gradient(ga, gb) > 1e-3


def test_head_z_loss_by_hand():
    """The mean of logsumexp^2 over the targets that count, added with its weight in training only."""
    model = randomized(small("pre", head_z_weight=0.1), torch.float64)
    idx, targets = batch(model.config)
    logits, loss = model(idx, targets)
    z = sum(logits[b, t].exp().sum().log() ** 2 for b, t in (targets != -100).nonzero()) / (targets != -100).sum()
    plain = model.eval()(idx, targets)[1]
    assert abs(loss - (plain + 0.1 * z)) < 1e-10 and abs(model.train()(idx, targets)[1] - loss) < 1e-12
    assert abs(model.losses["head_z"] - z) < 1e-10 and z > 1
    loss.backward()
    assert (model.lm_head.weight.grad - torch.autograd.grad(model.eval()(idx, targets)[1], model.lm_head.weight)[0]).norm() > 1e-3


def test_learned_lns_gains_start_as_the_fixed_factor():
    """The two published forms: one function at the start, gradients of the gains that differ by 1 / sqrt(l)."""
    models = []
    for place in ("norm", "gain"):
        torch.manual_seed(0)
        models.append(GPT(small("lns", s_position=place)).double())
    data = batch(models[0].config)
    (a, _, ga), (b, _, gb) = (gradients(model, *data) for model in models)
    assert distance(a, b) < 1e-7  # the gain is a float32 number
    for l in range(1, 5):
        name = f"blocks.{l - 1}.mlp_residual.pre_norm.weight"
        assert distance(ga[name] * math.sqrt(l), gb[name]) < 1e-6
        assert torch.allclose(models[1].get_parameter(name), torch.tensor(l**-0.5, dtype=torch.float64))


def test_frozen_output_gains():
    model = GPT(small("peri", freeze_out_gain=True))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"blocks.{i}.{part}_residual.out_norm.weight" for i in range(4) for part in ("attn", "mlp")]


def test_branch_scales_start_where_the_papers_say():
    model = GPT(small("skipinit"))
    assert all(p.shape == (1,) and p.item() == 0.5 for n, p in model.named_parameters() if "branch_scale" in n)
    model = GPT(small("sandwich", branch_scale="layerscale", layerscale_init=1e-3))
    assert all(torch.equal(p, torch.full((32,), 1e-3)) for n, p in model.named_parameters() if "branch_scale" in n)


def test_relu_gates():
    assert GPT(small("gpas_pre", gpas_act="relu")).gates()[0].item() == pytest.approx(0.01)
    with pytest.warns(UserWarning, match="never moves"):
        model = GPT(small("gpas_pre", gpas_act="relu", gate_init=0.0))
    assert gradients(model, *batch(model.config))[2]["blocks.0.gate"].item() == 0
    model = GPT(small("gpas_pre", gate_init=0.2))
    assert all(gate.item() == pytest.approx(0.2) for gate in model.gates())


def test_set_gates():
    model = GPT(small("gpas_pre"))
    model.set_gates([0.1, 0.2, 0.3, 0.4])
    assert [round(gate.item(), 6) for gate in model.gates()] == [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(ValueError, match="3 gate values for the 4 gates"):
        model.set_gates([1, 2, 3])
    with pytest.raises(ValueError, match="2 values for a layer with 1 gate"):
        model.set_gates([[0.1, 0.2]] * 4)
    with pytest.raises(ValueError, match="0 gates of norm pre"):
        GPT(small("pre")).set_gates([1])
    model = GPT(small("gpas_pre", gate_per="sublayer"))
    model.set_gates([[0.1, 0.2]] * 4)
    assert model.blocks[3].gate.tolist() == pytest.approx([0.1, 0.2])


def test_admin_profiling_by_hand():
    """omega^2 is the variance accumulated so far, computed here from the reference's own sub-layers."""
    torch.manual_seed(3)
    model = GPT(small("admin", init_std=0.3, embed_std=0.7)).double()
    seen = {}
    for i, block in enumerate(model.blocks):
        for part in ("attn", "mlp"):
            hook = lambda _, args, out, key=(i, part): seen.__setitem__(key, (args[0], out))
            getattr(block, part).register_forward_hook(hook)
    idx, _ = batch(model.config)
    model.profile_omega(idx)
    model(idx)
    omega = torch.ones((), dtype=torch.float64)
    for (i, part), (x, f) in seen.items():
        assert torch.allclose(getattr(model.blocks[i], part + "_residual").omega, omega.expand(32))
        omega = (omega**2 * x.var(correction=0) + f.var(correction=0)).sqrt()
    assert omega > 1.5
    torch.manual_seed(3)
    again = GPT(small("admin", init_std=0.3, embed_std=0.7))
    torch.manual_seed(3)
    assert torch.equal(GPT(again.config).blocks[3].mlp_residual.omega, again.blocks[3].mlp_residual.omega)
    assert again.blocks[3].mlp_residual.omega[0] > again.blocks[0].mlp_residual.omega[0]


def test_hybrid_is_ffn_of_norm_plus_norm():
    """HybridNorm*: in words of its paper, X = FFN(Norm(Y)) + Norm(Y) with Y = MHA_QKV(X) + X; the first layer is Pre-LN."""
    model = randomized(small("hybrid"))
    first, second = model.blocks[0], model.blocks[1]
    x = torch.randn(2, 8, 32)
    y = x + second.attn(x)
    n = second.attn_residual.post_norm(y)
    assert distance(second(x), second.mlp(n) + n) < 1e-6
    y = x + first.attn(first.attn_residual.pre_norm(x))
    assert distance(first(x), y + first.mlp(first.mlp_residual.pre_norm(y))) < 1e-6
    assert {"q_norm", "k_norm", "v_norm"} <= {n for n, m in first.attn.named_children() if type(m).__name__ == "Norm"}


def test_lns_with_scaled_initialization_warns():
    with pytest.warns(UserWarning, match="did worse with init scaled than alone"):
        GPT(small("lns", init="scaled"))
    with pytest.warns(UserWarning, match="diverged"):
        GPT(small("lns", s_position="residual"))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(norm="pre", gpas_act="tanh"), "gpas_act=tanh has no effect .norm is pre.: it needs a gpas_ scheme"),
        (dict(norm="pre", gate_per="sublayer"), "it needs a gpas_ scheme"),
        (dict(norm="pre", gate_init=0.1), "it needs a gpas_ scheme"),
        (dict(norm="gpas_pre", gpas_act="gelu"), "unknown gpas_act 'gelu'; known: silu, identity"),
        (dict(norm="gpas_mix", gpas_position="norm"), "it needs a norm at A in every layer"),
        (dict(norm="pre", s_position="branch"), "it needs a scheme with s and no C, as lns"),
        (dict(norm="pre", freeze_out_gain=True), "it needs gains of norms at B"),
        (dict(norm="pre", v_norm=True), "it needs qk_norm"),
        (dict(norm="pre", qk_norm_type="layernorm"), "it needs qk_norm"),
        (dict(norm="pre", qk_norm="head", qk_norm_type="groupnorm", norm_groups=5), "norm_groups 5 does not divide the width 8"),
        (dict(norm="olmo_init", init_variance=2.0), "it needs another init"),
        (dict(norm="lns", s_position="gain", norm_affine=False), "it needs an s_position other than gain"),
        (dict(norm="group", norm_groups=5), "norm_groups 5 does not divide the width 32"),
        (dict(norm="group", norm_groups=32), "norm_groups 32 does not divide the width 32 of a norm into equal groups of"),
        (dict(norm="pre", branch_scale="rezero"), "unknown branch_scale 'rezero'; known: none, skipinit, layerscale"),
        (dict(norm="pre", init="he"), "unknown init 'he'; known: normal, scaled"),
        (dict(norm="pre", init_variance=-1.0), "init_variance is -1.0"),
    ],
    ids=str,
)
def test_flags_without_effect_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# -- initialization -----------------------------------------------------------------------------------------------------


def test_initial_standard_deviations():
    model = GPT(GPTConfig(vocab_size=512, n_layer=2, n_embd=256, n_head=4))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(math.sqrt(0.4) if "embed" in name else 0.02, rel=0.03), name
            assert abs(p.mean().item()) < 0.05 * p.std().item()
        else:
            assert torch.equal(p, torch.ones_like(p))
    model = GPT(GPTConfig(vocab_size=512, n_layer=1, n_embd=256, n_head=4, init_std=0.1, embed_std=0.3))
    assert model.lm_head.weight.std().item() == pytest.approx(0.1, rel=0.03)
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize("norm", ["deepnorm", "gpas_deepnorm"])
def test_deepnorm_initialization(norm):
    L = 6
    model = GPT(GPTConfig(vocab_size=64, n_layer=L, n_embd=256, n_head=4, n_kv_head=2, norm=norm))
    for name, p in model.named_parameters():
        if name.startswith("blocks") and p.dim() == 2:
            gain = 1 if "q_proj" in name or "k_proj" in name else (8 * L) ** -0.25
            xavier = torch.nn.init.xavier_normal_(torch.empty_like(p), gain)
            assert p.std().item() == pytest.approx(xavier.std().item(), rel=0.03), name
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].attn_residual.alpha == pytest.approx((2 * L) ** 0.25)


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(norm="scaled_init"), lambda l, out, n_in, n_out: 0.02 / math.sqrt(2 * 3) if out else 0.02),
        (dict(norm="depth_init"), lambda l, out, n_in, n_out: 0.02 / math.sqrt(2 * l)),
        (dict(norm="olmo_init"), lambda l, out, n_in, n_out: 1 / math.sqrt(256 * (2 * l if out else 1))),
        (dict(norm="gpas_peri", init="xavier"), lambda l, out, n_in, n_out: math.sqrt(2 / (n_in + n_out))),
        (dict(norm="peri", init_variance=10.0), lambda l, out, n_in, n_out: math.sqrt(10 / 256)),
        (dict(norm="deepnorm", init="scaled", init_variance=0.1), lambda l, out, n_in, n_out: math.sqrt(0.1 / 256) / (math.sqrt(6) if out else 1)),
    ],
    ids=str,
)
def test_initializations(options, expected):
    model = GPT(GPTConfig(vocab_size=300, n_layer=3, n_embd=256, n_head=4, **options))
    for name, p in model.named_parameters():
        if name.startswith("blocks") and p.dim() == 2:
            std = expected(int(name.split(".")[1]) + 1, "o_proj" in name or "down_proj" in name, p.shape[1], p.shape[0])
            assert p.std().item() == pytest.approx(std, rel=0.02), name


def test_schemes_start_from_the_same_matrices():
    models = []
    for norm in ("pre", "gpas_peri"):
        torch.manual_seed(5)
        models.append(dict(GPT(small(norm)).named_parameters()))
    for name, p in models[0].items():
        assert torch.equal(p, models[1][name]), name
    torch.manual_seed(6)
    assert not torch.equal(GPT(small("pre")).lm_head.weight, models[0]["lm_head.weight"])
    q = [models[0][f"blocks.{i}.attn.q_proj.weight"] for i in range(2)]
    assert not torch.equal(*q)


def test_meta_device_and_double():
    with torch.device("meta"):
        model = GPT(small("gpas_deepnorm"))
        experts = GPT(small("pre", n_expert=4))
    assert all(p.is_meta for p in model.parameters())
    for m in (model, experts):
        assert m(torch.zeros(2, 8, dtype=torch.long, device="meta"))[0].shape == (2, 8, 29)
    assert model.count_params() == GPT(small("gpas_deepnorm")).count_params()


# -- precision and compilation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["pre", "gpas_peri", "gpas_out", "post", "pre_post"])
def test_bfloat16_autocast(norm):
    """The stream and every norm stay in float32, and the result is near the float32 one."""
    model = randomized(small(norm))
    idx, targets = batch(model.config)
    _, loss32, grads32 = gradients(model, idx, targets)
    dtypes = []
    for module in model.modules():
        if type(module).__name__ == "Norm":
            module.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        _, loss, grads = gradients(model, idx, targets)
    assert dtypes and set(dtypes) == {torch.float32}
    assert loss.dtype == torch.float32 and abs(loss - loss32) < 0.02 * loss32
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        if grad.dim() == 2:
            assert distance(grad, grads32[name]) < 0.15, name


def test_a_bfloat16_model_without_gains():
    model = GPT(small("gpas_peri", norm_affine=False, qk_norm="head")).bfloat16()
    idx, targets = batch(model.config)
    logits, loss = model(idx, targets)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss == F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)


def test_small_gates_scale_a_bfloat16_branch():
    """Under autocast the branch is bfloat16; the gate's scale is not rounded to it."""
    model = GPT(small("gpas_pre", gpas_position="module", init_std=0.3))
    idx = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16):
        before = model(idx)[0]
        model.set_gates([0.003] * 4)
        assert not torch.equal(model(idx)[0], before)


def test_norm_statistics_of_bfloat16_input_are_float32():
    model = GPT(small("pre", n_embd=512)).bfloat16()
    x = (100 + torch.randn(4, 512)).bfloat16()  # in bfloat16 a mean of 512 squares would be off by percents
    out = model.norm(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, reference.rms(x.float(), torch.ones(512)).bfloat16())


# An initialization is no other graph, and the gated graph holds the plain one.
@pytest.mark.parametrize("norm", ["post", "pre", *(n for n in ALL if "gpas_" in n and not n.endswith("_init"))])
def test_compiles_to_one_graph(norm):
    """As few layers as have all that the row has: two where they differ. Tracing shows what breaks a graph; what comes
    after it, the derivation of the graph, is the same for every row and done for some."""
    scheme = SCHEMES[norm.removeprefix("gpas_")]
    mixed = dict(mix_ratio=0.5) if scheme is SCHEMES["mix"] else {}
    model = randomized(small(norm, n_layer=2 if callable(scheme.norms) or scheme.s else 1, **mixed))
    idx, targets = batch(model.config)
    eager = gradients(model, idx, targets)
    torch._dynamo.reset()
    backend = "aot_eager" if norm in ("pre", "gpas_peri", "gpas_deepnorm") else "eager"
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    compiled = gradients(model, idx, targets)
    assert distance(compiled[0], eager[0]) < 1e-5
    assert worst_gradient(compiled[2], eager[2]) < 1e-4


@pytest.mark.parametrize("norm", ALL)
def test_a_model_from_the_meta_device_starts_from_the_same_weights(norm):
    """As FSDP makes it: its memory holds anything until init_weights, and a tied head is another parameter."""
    more = dict(s_position="gain") if norm.endswith("lns") else dict(tie_embeddings=norm == "pre")
    more |= dict(gate_init=0.3) if "gpas_" in norm else {}
    config = small(norm, qkv_bias=True, **more)
    torch.manual_seed(1)
    expected = GPT(config).state_dict()
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, math.nan)
    torch.manual_seed(1)
    model.init_weights(int(torch.randint(2**62, ())))
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert (model.lm_head.weight is model.embed_tokens.weight) == config.tie_embeddings


@pytest.mark.skipif(not shutil.which("g++"), reason="the default backend needs g++ on the CPU")
@pytest.mark.parametrize("norm, autocast", [("gpas_pre", True), ("gpas_deepnorm", False)])
def test_compiles_with_the_default_backend(norm, autocast):
    model = randomized(small(norm, n_layer=1))
    idx, targets = batch(model.config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = gradients(model, idx, targets)
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, fullgraph=True)
        compiled = gradients(model, idx, targets)
    assert distance(compiled[0].float(), eager[0].float()) < (0.02 if autocast else 1e-5)
    assert worst_gradient(compiled[2], eager[2]) < (0.1 if autocast else 1e-4)


def test_pre_ln_is_llama():
    """Logits and gradients of transformers' LlamaForCausalLM with the same weights, GQA included."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers' Llama where it is installed")
    model = randomized(small("pre"))
    c = model.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, rms_norm_eps=c.norm_eps,
            max_position_embeddings=c.block_size, rope_theta=c.rope_theta, tie_word_embeddings=False,
        )
    )  # fmt: skip
    names = {"blocks": "model.layers", "embed_tokens": "model.embed_tokens", "norm": "model.norm"}
    inner = {"attn_residual.pre_norm": "input_layernorm", "mlp_residual.pre_norm": "post_attention_layernorm", "attn.": "self_attn."}
    renamed = {}
    for name, p in model.named_parameters():
        head, _, rest = name.partition(".")
        for ours, theirs in inner.items():
            rest = rest.replace(ours, theirs)
        renamed[f"{names.get(head, head)}.{rest}"] = p
    llama.load_state_dict({name: p.detach() for name, p in renamed.items()})
    idx, targets = batch(c)
    logits, loss, _ = gradients(model, idx, targets)
    theirs = llama(idx).logits
    reference.loss(theirs, targets).backward()
    assert distance(logits, theirs.detach()) < 1e-5
    for name, p in llama.named_parameters():
        assert distance(renamed[name].grad, p.grad) < 1e-4, name


# -- generation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(n_kv_head=1), dict(qk_norm="head")], ids=str)
@pytest.mark.parametrize("norm", ["gpas_pre", "gpas_post", "peri"])
def test_cached_logits_equal_uncached_ones(norm, options):
    from model import KVCache

    model = randomized(small(norm, **options)).eval()
    idx = torch.randint(0, 29, (2, 16))
    caches = [KVCache(16) for _ in model.blocks]
    parts = [model(idx[:, a:b], caches=caches)[0] for a, b in ((0, 5), (5, 6), (6, 10), (10, 16))]
    assert distance(torch.cat(parts, 1), model(idx)[0]) < 1e-5
    assert caches[0].k.shape == (2, model.config.n_kv_head, 16, 8)


def test_generate_equals_the_uncached_loop():
    model = randomized(small("gpas_lns")).eval()
    idx = torch.randint(0, 29, (2, 4))
    out = model.generate(idx, 20, temperature=0)  # runs past block_size 16
    expected = idx
    for _ in range(20):
        expected = torch.cat((expected, model(expected[:, -16:])[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(out, expected)
    assert out.shape == (2, 24)


def test_sampling_follows_temperature_and_top_k():
    model = randomized(small("pre")).eval()
    idx = torch.randint(0, 29, (1, 4))
    logits = model(idx)[0][0, -1]
    draws = model.generate(idx.expand(4000, 4), 1, temperature=0.7, top_k=5)[:, -1]
    assert set(draws.tolist()) <= set(logits.topk(5).indices.tolist())
    best = logits.topk(5)
    share = torch.stack([(draws == i).float().mean() for i in best.indices])
    assert (share - F.softmax(best.values / 0.7, -1)).abs().max() < 0.04
    assert len(set(model.generate(idx.expand(4000, 4), 1, temperature=5.0)[:, -1].tolist())) > 20
    with pytest.raises(ValueError, match="temperature"):
        model.generate(idx, 1, temperature=-1)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(idx[:, :0], 1)


def test_rotary_angles_of_a_bfloat16_model_are_float32():
    """bfloat16 has no odd numbers above 256: positions would be rounded."""
    table = rotary_table(2000, 8, 10000.0, None, torch.zeros(1, dtype=torch.bfloat16))
    expected = [math.cos(1999 * frequency) for frequency in (1, 0.1, 0.01, 0.001)]
    assert table.dtype == torch.float32 and table[0, 1999, :4].tolist() == pytest.approx(expected, abs=1e-3)


# -- counting and groups ------------------------------------------------------------------------------------------------


def test_counts_by_hand():
    config = small("gpas_peri", n_layer=3, n_hidden=24, qk_norm="full")
    model = GPT(config)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32 + (32 + 16)  # q, k and v, o, norms of q and k
    layer = attention + 3 * 32 * 24 + 4 * 32 + 1
    total = 2 * 29 * 32 + 3 * layer + 2 * 32
    assert model.count_params() == {"total": total, "active": total, "non_embedding": total - 2 * 29 * 32}
    matrices = 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 24) + 29 * 32
    # scores and values of 4 heads of 8: 2 products x 2 operations x 3 passes over (T + 1) / 2 keys on average
    assert model.flops_per_token(7) == 6 * matrices + 3 * 4 * 8 * 12 * 4
    assert model.flops_per_token() == 6 * matrices + 3 * 4 * 8 * 12 * 8.5
    tied = GPT(small("gpas_peri", n_layer=3, n_hidden=24, qk_norm="full", tie_embeddings=True))
    assert tied.count_params() == {n: total - (2 if n == "non_embedding" else 1) * 29 * 32 for n in model.count_params()}
    assert tied.flops_per_token(7) == model.flops_per_token(7)
    assert model.mfu(1000, 1e9, T=7) == pytest.approx(model.flops_per_token(7) * 1000 / 1e9)
    wide = GPT(small("pre", n_layer=3, head_dim=10))
    assert wide.flops_per_token(9) - wide.flops_per_token(7) == 3 * 4 * 10 * 12  # heads of 10 where n_embd / n_head is 8


def test_default_sizes_are_the_papers():
    """GPAS 71M, 130M and 350M: n_hidden is 8/3 n_embd, rounded up to a multiple of 8."""
    assert [GPTConfig(n_embd=d).n_hidden for d in (512, 768, 1024)] == [1368, 2048, 2736]
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=12, n_embd=768, n_head=12, vocab_size=32000))
    assert round(model.count_params()["total"] / 1e6) == 134


def test_blocks_that_a_user_has_replaced_or_used_twice():
    """A block of one's own has no gate; one that stands twice has one gate, which is in the optimizer once."""
    model = GPT(small("gpas_pre", n_layer=3))
    model.blocks[0], model.blocks[2] = torch.nn.Linear(32, 32), model.blocks[1]
    model(*batch(model.config))[1].backward()
    gates = {g["name"]: g["params"] for g in model.optimizer_groups(0.1)}["gates"]
    assert len(gates) == 1 and gates[0] is model.blocks[1].gate and gates[0].grad is not None
    pruned = GPT(small("pre", n_layer=3))
    pruned.blocks = pruned.blocks[:1]
    assert pruned.flops_per_token() == GPT(small("pre", n_layer=1)).flops_per_token()


@pytest.mark.parametrize("keep", ["input", "output"])
def test_a_gate_for_each_dimension_gets_its_own_gradient(keep):
    x, a = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64, requires_grad=True)
    (kept,) = torch.autograd.grad(gpas(x, gate_scale(a), keep).sin().sum(), a)
    (defined,) = torch.autograd.grad(gpas(x, gate_scale(a)).sin().sum(), a)
    assert torch.equal(kept, defined) and len(kept.unique()) == 4


def test_optimizer_groups():
    model = GPT(small("gpas_peri"))
    groups = {g["name"]: g for g in model.optimizer_groups(0.1)}
    assert [p.shape for p in groups["gates"]["params"]] == [(1,)] * 4
    assert {g: groups[g]["weight_decay"] for g in groups} == {"matrices": 0.1, "vectors": 0.0, "gates": 0.0}
    assert all(p.dim() == 2 for p in groups["matrices"]["params"])
    ids = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert {g["name"] for g in GPT(small("pre")).optimizer_groups(0.1)} == {"matrices", "vectors"}
    names = {id(p): n for n, p in model.named_parameters()}
    first, *others = model.optimizer_groups(0.1, decay_embedding=False)
    assert [names[id(p)] for p in first["params"]] == ["embed_tokens.weight"] and first["weight_decay"] == 0
    assert sum(len(g["params"]) for g in others) + 1 == len(names) and "embed_tokens.weight" not in {
        names[id(p)] for g in others for p in g["params"]
    }


def test_frozen_gates_scale_and_leave_other_gradients_alone():
    model = randomized(small("gpas_pre"))
    data = batch(model.config)
    grads = gradients(model, *data)[2]
    for gate in model.gates():
        gate.requires_grad_(False)
    model.zero_grad()
    model(*data)[1].backward()
    assert all(gate.grad is None for gate in model.gates())
    assert torch.equal(model.embed_tokens.weight.grad, grads["embed_tokens.weight"])


# -- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(norm="prenorm"), "unknown norm 'prenorm'; known: post, pre, sandwich"),
        (dict(norm="gpas_gpas_pre"), "unknown norm"),
        (dict(n_embd=30), "n_embd 30 is not divisible by n_head 4"),
        (dict(n_kv_head=3), "n_head 4 is not divisible by n_kv_head 3"),
        (dict(n_embd=36), "odd"),
        (dict(norm_type="batchnorm"), "unknown norm_type 'batchnorm'; known: rmsnorm, layernorm"),
        (dict(qk_norm="half"), "unknown qk_norm"),
        (dict(n_layer=0), "n_layer is 0"),
        (dict(n_kv_head=0), "n_kv_head is 0"),
        (dict(mix_ratio=1.5), "mix_ratio"),
        (dict(norm_eps=-1.0), "norm_eps"),
    ],
    ids=str,
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message) as error:
        small(**{"norm": "pre", **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        dict(norms=""),
        dict(norms="AD"),
        dict(norms="A", alpha=lambda L: 2),
        dict(norms="A", omega=True),
        dict(norms="A", b2t=True),
        dict(norms="C", s=lambda l: 0.5),
        dict(norms="A", s=0.5),
        dict(norms="A", s=lambda l, L: l / L),
        dict(norms="C", alpha=2),
        dict(norms=lambda l: "A"),
        dict(norms=["A", "B"]),
    ],
)
def test_a_row_without_effect_is_an_error(row):
    with pytest.raises(ValueError, match="needs norms at|acts beside the norm|must be a function of"):
        Scheme(**row)


def test_a_parameter_of_its_own_needs_a_start(monkeypatch):
    """No vector that somebody adds starts silently from the value of another."""

    class Mine(Residual):
        def __init__(self, config, l, is_mlp):
            super().__init__(config, l, is_mlp)
            self.alpha = torch.nn.Parameter(torch.ones(()))

    monkeypatch.setattr("model.Residual", Mine)
    with pytest.raises(ValueError, match="what blocks.0.attn_residual.alpha starts from: add it to GPT.initial_value"):
        GPT(small("pre"))
    known = GPT.initial_value
    monkeypatch.setattr(GPT, "initial_value", lambda model, name: 3.0 if name.endswith("residual.alpha") else known(model, name))
    assert all(block.mlp_residual.alpha == 3 for block in GPT(small("pre")).blocks)


def test_a_row_of_its_own_whose_norms_depend_on_the_layer(monkeypatch):
    """Sandwich-LN in even layers, Pre-LN in odd ones; a constant that lacks its norm in one of them is an error."""
    even = lambda c, l, is_mlp: "AB" if l % 2 == 0 else "A"
    monkeypatch.setitem(SCHEMES, "even", Scheme(even))
    blocks = GPT(small("even")).blocks
    assert [isinstance(b.mlp_residual.out_norm, torch.nn.Identity) for b in blocks] == [True, False, True, False]
    monkeypatch.setitem(SCHEMES, "even", Scheme(lambda c, l, is_mlp: "C" if l == 3 else "A", s=lambda l: 0.5))
    with pytest.raises(ValueError, match="s acts beside the norm A"):
        small("even")
    monkeypatch.setitem(SCHEMES, "even", Scheme(lambda c, l, is_mlp: "AB" if l % 2 == 0 else None))
    with pytest.raises(ValueError, match="a scheme needs norms at A, B or C, got None"):
        small("even")


@pytest.mark.parametrize("L, ratio, n", [(7, 0.25, 1), (100, 0.29, 29)])
def test_the_number_of_post_ln_layers_is_rounded_down(L, ratio, n):
    c = GPTConfig(norm="mix", n_layer=L, mix_ratio=ratio)
    assert [SCHEMES["mix"].places(c, l, False) for l in range(1, L + 1)] == ["C"] * n + ["A"] * (L - n)


def test_a_mix_of_one_kind_warns():
    with pytest.warns(UserWarning, match="not a mix"):
        GPT(small("mix", n_layer=2))


def test_config_survives_a_round_trip():
    config = small("gpas_peri")
    assert GPTConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    "setting",
    [
        dict(norm_groups=4), dict(dyt_alpha=0.3), dict(mix_ratio=0.5), dict(layerscale_init=0.1), dict(n_expert_active=4),
        dict(balance_weight=0.1), dict(z_weight=0.1), dict(normalize_gates=False), dict(norm="hybrid", mix_ratio=0.5),
    ],
    ids=str,
)  # fmt: skip
def test_a_number_that_nothing_reads_is_a_mistake(setting):
    name = list(setting)[-1]
    with pytest.raises(ValueError, match=f"{name}={setting[name]} has no effect .* it needs"):
        GPTConfig(**setting)


def test_a_number_that_is_read_is_none():
    GPTConfig(norm="gpas_group", norm_groups=4), GPTConfig(norm="dyt", dyt_alpha=0.3), GPTConfig(norm="mix", mix_ratio=0.5)
    GPTConfig(norm="layerscale", layerscale_init=0.1), GPTConfig(n_expert=8, n_expert_active=4, normalize_gates=False)
