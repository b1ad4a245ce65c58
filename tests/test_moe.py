"""The mixture of experts and grouped-query attention against plain loops, other libraries and hand-computed numbers."""

import argparse
import copy
import math

import pytest
import reference
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from test_model import batch, distance, gradients, randomized, small
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, SCHEMES, GPTConfig, MoE


def moe_config(norm="pre", **kwargs):
    return small(norm, **{**dict(n_expert=8, n_expert_active=2, n_hidden=24), **kwargs})


def naive_moe(x, P, c):
    """x (B, T, n_embd), token by token and expert by expert; P the parameters by name."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            token = x[b, t]
            p = torch.softmax(P["router.weight"] @ token, 0)
            best = sorted(range(c.n_expert), key=lambda i: -p[i].item())[: c.n_expert_active]
            total = sum(p[i] for i in best) if c.normalize_gates else 1
            y = 0
            for i in best:
                g, u, d = (P[f"experts.{n}_proj"][i] for n in ("gate", "up", "down"))
                h = g @ token
                y = y + p[i] / total * (d @ (h * torch.sigmoid(h) * (u @ token)))
            if c.n_expert_shared:
                shared = reference.mlp(token, {k.removeprefix("shared."): v for k, v in P.items()}, c)
                k = c.n_expert_active
                y = (shared + k * y) / (k + 1) if c.average_shared else y + shared
            out[b, t] = y
    return out


def random_moe(c, dtype=torch.float32):
    moe = MoE(c).to(dtype)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return moe


def forward_backward(f, moe, x):
    """Output, gradient of x and of each parameter, of sum(output * fixed numbers)."""
    x = x.clone().requires_grad_()
    y = f(x)
    weight = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    names, parameters = zip(*moe.named_parameters())
    gx, *grads = torch.autograd.grad((y * weight).sum(), (x, *parameters), allow_unused=True, materialize_grads=True)
    return y.detach(), gx, dict(zip(names, grads))


def assert_same(ours, theirs, tolerance):
    assert distance(ours[0], theirs[0]) < tolerance and distance(ours[1], theirs[1]) < tolerance
    for name in ours[2]:
        scale = max(g.norm() for g in theirs[2].values())
        assert (ours[2][name] - theirs[2][name]).norm() < tolerance * scale, name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(normalize_gates=False),
        dict(n_expert_active=1),
        dict(n_expert_shared=1),
        dict(n_expert_shared=2, average_shared=True),
        dict(n_expert=1, n_expert_active=1),
        dict(n_expert=6, n_expert_active=6),
        dict(n_hidden=7),
    ],
    ids=str,
)
def test_equals_the_loop_over_tokens_and_experts(options, dtype, tolerance):
    c = moe_config(**options)
    moe, x = random_moe(c, dtype), torch.randn(2, 9, 32, dtype=dtype)
    expected = forward_backward(lambda x: naive_moe(x, dict(moe.named_parameters()), c), moe, x)
    assert_same(forward_backward(moe, moe, x), expected, tolerance)
    assert moe.load.sum() == 18 * c.n_expert_active


@pytest.mark.parametrize("tokens", [1, 5])
def test_imbalance_and_single_tokens(tokens):
    """All tokens on one expert, hence experts without any; dropless whatever the imbalance."""
    c = moe_config(n_expert_active=1)
    moe, x = random_moe(c), torch.randn(1, tokens, 32).abs()
    with torch.no_grad():
        moe.router.weight[3] = 10.0
    expected = forward_backward(lambda x: naive_moe(x, dict(moe.named_parameters()), c), moe, x)
    assert_same(forward_backward(moe, moe, x), expected, 1e-5)
    assert moe.load.tolist() == [0, 0, 0, tokens, 0, 0, 0, 0]


def test_all_experts_are_the_dense_weighted_sum():
    c = moe_config(n_expert=4, n_expert_active=4)
    moe, x = random_moe(c), torch.randn(2, 5, 32)
    p = torch.softmax(moe.router(x), -1)
    e = moe.experts
    dense = [(F.silu(x @ e.gate_proj[i].T) * (x @ e.up_proj[i].T)) @ e.down_proj[i].T for i in range(4)]
    assert distance(moe(x), sum(p[..., i : i + 1] * dense[i] for i in range(4))) < 1e-5


def copy_to_transformers(moe, block):
    """Our weights into a transformers expert block: gate and up stacked in one (expert, 2 width, n_embd) matrix."""
    with torch.no_grad():
        block.gate.weight.copy_(moe.router.weight)
        block.experts.gate_up_proj.copy_(torch.cat((moe.experts.gate_proj, moe.experts.up_proj), 1))
        block.experts.down_proj.copy_(moe.experts.down_proj)


@pytest.mark.parametrize("kind, normalize", [("Mixtral", True), ("Olmoe", False)])
def test_equals_transformers(kind, normalize):
    transformers = pytest.importorskip("transformers", reason="compares with transformers' experts where it is installed")
    modeling = __import__(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}", fromlist=["x"])
    sizes = dict(hidden_size=32, intermediate_size=24, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2)
    count = {"Mixtral": "num_local_experts", "Olmoe": "num_experts"}[kind]
    config = getattr(transformers, kind + "Config")(**sizes, **{count: 8})
    config._experts_implementation = "eager"
    block = getattr(modeling, kind + "SparseMoeBlock")(config)
    moe, x = random_moe(moe_config(normalize_gates=normalize)), torch.randn(2, 9, 32)
    copy_to_transformers(moe, block)
    ours = forward_backward(moe, moe, x)
    result = lambda x: block(x)[0] if isinstance(block(x), tuple) else block(x)
    y, gx, grads = forward_backward(result, block, x)
    assert distance(ours[0], y) < 1e-5 and distance(ours[1], gx) < 1e-5
    gate, up = grads["experts.gate_up_proj"].chunk(2, 1)
    theirs = {"experts.gate_proj": gate, "experts.up_proj": up, "experts.down_proj": grads["experts.down_proj"]}
    for name, grad in theirs.items():
        assert distance(ours[2][name], grad) < 1e-5, name
    assert distance(ours[2]["router.weight"], grads["gate.weight"]) < 1e-5


# -- the routers' losses ------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    """Perfect balance: E/k * E * (k/E * 1/E) = 1. Collapse: all on one expert with probability 1: E/k * 1 = E for k = 1."""
    moe, x = random_moe(moe_config(n_expert=4, n_expert_active=1)).train(), torch.eye(4).repeat(2, 8)[None]
    with torch.no_grad():
        moe.router.weight.copy_(50 * torch.eye(4).repeat(1, 8) / 8)  # token j has logit 50 at expert j mod 4, else 0
    moe(x)
    assert moe.load.tolist() == [2, 2, 2, 2]
    assert moe.balance_loss.item() == pytest.approx(1, abs=1e-5)
    assert moe.z_loss.item() == pytest.approx(2500, rel=1e-5)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2] = 50
    moe(x)
    assert moe.load.tolist() == [0, 0, 8, 0]
    assert moe.balance_loss.item() == pytest.approx(4, abs=1e-4)
    with torch.no_grad():
        moe.router.weight.zero_()
    moe(x)  # uniform probabilities of 1/4: every choice of experts gives E/k * sum f_i / 4 = 1; logsumexp is ln 4
    assert moe.balance_loss.item() == pytest.approx(1, abs=1e-6)
    assert moe.z_loss.item() == pytest.approx(math.log(4) ** 2, rel=1e-6)
    moe.top_k = 2
    moe(x)
    assert moe.balance_loss.item() == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        moe.router.weight[:2] = 50  # every token to the experts 0 and 1, with probability 1/2: E/k * (1/2 + 1/2) = 2
    moe(x)
    assert moe.load.tolist() == [8, 8, 0, 0]
    assert moe.balance_loss.item() == pytest.approx(2, abs=1e-4)


def test_losses_are_added_in_training_only():
    model = GPT(moe_config("gpas_pre", balance_weight=0.3, z_weight=0.2, moe_from=2, moe_every=2))
    assert [type(block.mlp).__name__ for block in model.blocks] == ["MLP", "MoE", "MLP", "MoE"]
    others = GPT(moe_config(moe_from=1, moe_every=2)).blocks
    assert [type(block.mlp).__name__ for block in others] == ["MoE", "MLP", "MoE", "MLP"]
    idx, targets = batch(model.config)
    loss = model(idx, targets)[1]
    moes = [model.blocks[1].mlp, model.blocks[3].mlp]
    balance, z = (sum(getattr(m, name) for m in moes) / 2 for name in ("balance_loss", "z_loss"))
    parts = model.losses
    assert parts["balance"] == balance and parts["z"] == z
    assert loss.item() == pytest.approx((parts["cross_entropy"] + 0.3 * balance + 0.2 * z).item())
    model.eval()
    assert model(idx, targets)[1] == model.losses["cross_entropy"] == parts["cross_entropy"]
    assert set(model.losses) == {"cross_entropy"}


def test_balance_is_that_of_the_micro_batch():
    """As the docstring says: the loss of a batch is not the mean of its halves' losses, while that of z is."""
    moe, x = random_moe(moe_config()).train(), torch.randn(4, 9, 32)
    losses = []
    for part in (x, x[:2], x[2:]):
        moe(part)
        losses.append((moe.balance_loss.item(), moe.z_loss.item()))
    assert losses[0][1] == pytest.approx((losses[1][1] + losses[2][1]) / 2, rel=1e-5)
    assert abs(losses[0][0] - (losses[1][0] + losses[2][0]) / 2) > 1e-4


@pytest.mark.parametrize("weight, spreads", [(0.05, True), (0.0, False)])
def test_a_collapsed_router_spreads_with_the_balancing_loss_only(weight, spreads):
    config = moe_config("pre", n_layer=2, n_expert_active=1, balance_weight=weight, z_weight=0.0, block_size=32, vocab_size=257)
    model = GPT(config)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.weight.normal_(std=0.02)
            block.mlp.router.weight[0] += 0.2 * torch.sign(block.mlp.router.weight[0])
    text = torch.tensor(list(open(argparse.__file__, "rb").read()))  # a file of the default corpus
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.0), lr=3e-3)
    shares = []
    for step in range(100):
        idx = torch.stack([text[i : i + 33] for i in torch.randint(len(text) - 33, (8,))])
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step(), optimizer.zero_grad()
        shares.append(max((block.mlp.load.max() / block.mlp.load.sum()).item() for block in model.blocks))
    assert shares[0] > 0.65 and (sum(shares[-10:]) / 10 < 0.5) == spreads


# -- with everything else -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["gpas_" + name for name in SCHEMES])
def test_combines_with_every_scheme(norm):
    model = GPT(moe_config(norm, n_expert_shared=1))
    for gate in model.gates():
        torch.nn.init.constant_(gate, 0.2)
    _, loss, grads = gradients(model, *batch(model.config))
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())
    assert all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_compiles_to_one_graph_whatever_the_load(autocast):
    model = GPT(moe_config("gpas_peri", n_expert_shared=1, n_layer=1))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        idx, targets = batch(model.config)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = gradients(model, idx, targets)
            model.zero_grad()
            loss = compiled(idx, targets)[1]
        loss.backward()
        assert distance(loss.detach(), expected[1]) < (1e-2 if autocast else 1e-6)
        if not autocast:
            for name, p in model.named_parameters():
                assert distance(p.grad, expected[2][name]) < 1e-4, name
    assert counter.frame_count == 1


def test_router_is_float32_under_autocast_and_output_near():
    c = moe_config(n_expert_shared=1)
    moe, x = random_moe(c), torch.randn(2, 9, 32)
    expected, z_loss = moe(x), moe.z_loss
    load = moe.load.clone()
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert torch.equal(moe.load, load) and moe.z_loss == z_loss  # routing did not pass through bfloat16
    assert y.dtype == torch.float32 and distance(y, expected) < 0.02
    moe.bfloat16()(x.bfloat16())
    logits = x.bfloat16().float().flatten(0, 1) @ moe.router.weight.float().t()
    assert moe.z_loss.item() == pytest.approx(logits.logsumexp(-1).square().mean().item(), rel=1e-5)


def test_a_vmapped_vector_jacobian_product():
    """torch.func reaches through the experts, as the analysis of Jacobians needs."""
    moe, x = random_moe(moe_config()), torch.randn(1, 3, 32)
    _, vjp = torch.func.vjp(moe, x)
    rows = torch.eye(96).view(96, 1, 3, 32)
    one_by_one = torch.stack([vjp(row)[0] for row in rows[:6]])
    assert distance(torch.func.vmap(lambda row: vjp(row)[0])(rows[:6]), one_by_one) < 1e-6


def test_no_tensor_is_tokens_by_experts_by_width():
    c = moe_config(n_expert=32, n_expert_active=2, n_hidden=48)
    moe, x = random_moe(c), torch.randn(4, 64, 32, requires_grad=True)
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                largest[0] = max(largest[0], t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    with Watch():
        moe(x).sum().backward()
    weights, rows = 32 * 48 * 32, 256 * 2 * 48
    assert largest[0] == max(weights, rows) < 256 * 32 * 48 / 4


def test_gradient_of_the_z_loss():
    """A router of zeros: logsumexp is ln E and p is 1/E, so each row gets 2 ln(E) / E times the mean token."""
    moe, x = random_moe(moe_config(n_expert=4)).train(), torch.randn(2, 9, 32)
    torch.nn.init.zeros_(moe.router.weight)
    moe(x)
    (grad,) = torch.autograd.grad(moe.z_loss, moe.router.weight)
    torch.testing.assert_close(grad, (2 * math.log(4) / 4 * x.mean((0, 1))).expand(4, -1))


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(init="deepnorm"), {"experts.gate_proj": 0.036084, "experts.down_proj": 0.036084, "router.weight": 0.02}),
        (dict(init="scaled"), {"experts.up_proj": 0.02, "experts.down_proj": 0.01}),
        (dict(init_variance=10.0), {"lm_head.weight": 0.197642, "router.weight": 0.197642}),
    ],
)
def test_initial_deviation_of_head_router_and_experts(options, expected):
    """By hand, for two layers and experts of 256 -> 128: sqrt(2 / 384) / 16^(1/4); 0.02 / sqrt(4); sqrt(10 / 256)."""
    sizes = dict(vocab_size=512, n_layer=2, n_embd=256, n_head=4, n_expert=8, n_hidden=128)
    deviations = {name: p.std().item() for name, p in GPT(GPTConfig(**sizes, **options)).named_parameters()}
    for ending, deviation in expected.items():
        found = [value for name, value in deviations.items() if name.endswith(ending)]
        assert found and found == pytest.approx([deviation] * len(found), rel=0.08), ending


def test_generation_and_counts():
    c = moe_config("gpas_pre", n_expert_shared=1, moe_from=2)
    model = GPT(c).eval()
    idx = torch.randint(0, 29, (2, 4))
    out = model.generate(idx, 8, temperature=0)
    expected = idx
    for _ in range(8):
        expected = torch.cat((expected, model(expected)[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(out, expected)
    dense = GPT(small("gpas_pre", n_hidden=24)).count_params()["total"]
    expert, router = 3 * 24 * 32, 8 * 32
    assert model.count_params()["total"] == dense + 3 * (8 * expert + router)  # 8 + 1 shared in place of the dense one
    assert model.count_params()["active"] == dense + 3 * (2 * expert + router)
    assert {g["name"]: len(g["params"]) for g in model.optimizer_groups(0.1)}["matrices"] == 2 + 4 * 4 + 3 + 3 * 7


@pytest.mark.parametrize(
    "sizes, total, active",
    [
        (dict(n_embd=2048, n_head=16, n_hidden=8192), 1.176, 1.176),  # dense, GQA 4 and 1 (Sparsity, GQA table)
        (dict(n_embd=2048, n_head=16, n_hidden=8192, n_kv_head=4), 1.076, 1.076),
        (dict(n_embd=2048, n_head=16, n_hidden=8192, n_kv_head=1), 1.051, 1.051),
        (dict(n_embd=2048, n_head=16, n_hidden=1024, n_expert=64, n_expert_active=8), 6.8, 1.18),  # 7B-A1B
        (dict(n_embd=768, n_head=12, n_hidden=1536, n_expert=32, n_expert_active=4, n_expert_shared=1), 1.95, 0.36),
    ],
    ids=str,
)
def test_the_papers_models(sizes, total, active):
    """Sizes of the Sparsity paper, which counts one vocabulary matrix; 2B-A400M is 1.98B-A399M with both counted."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=16, vocab_size=50304, block_size=4096, **sizes))
    count, one = model.count_params(), 50304 * sizes["n_embd"]
    assert (count["total"] - one) / 1e9 == pytest.approx(total, abs=0.03 if total > 6 else 0.006)
    assert (count["active"] - one) / 1e9 == pytest.approx(active, abs=0.006)
    matrices = count["active"] - one - sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert model.flops_per_token(4096) == 6 * matrices + 16 * 12 * sizes["n_embd"] * 4097 / 2


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_expert=4, n_expert_active=5), "n_expert_active 5 must lie between 1 and n_expert 4"),
        (dict(n_expert=4, n_expert_active=0), "n_expert_active is 0"),
        (dict(n_expert=-1), "n_expert is -1"),
        (dict(n_expert=4, moe_from=9), "moe_from 9"),
        (dict(n_expert=4, balance_weight=-1.0), "balance_weight is -1.0"),
        (dict(n_expert_shared=1), "n_expert_shared=1 has no effect"),
        (dict(n_expert=4, average_shared=True), "it needs n_expert_shared above 0"),
    ],
    ids=str,
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        small("pre", **options)


def test_a_copy_after_a_step():
    """The losses of the last step hang on its graph; and a compiled module calls itself, its copy must not call it too."""
    moe, x = randomized(moe_config()).blocks[0].mlp, torch.randn(1, 8, 32)
    (moe(x).sum() + moe.balance_loss).backward()
    moe.compile(backend="eager")
    twin = copy.deepcopy(moe)
    assert torch.equal(twin(x), moe(x)) and twin.balance_loss.item() == moe.balance_loss.item()
    torch.nn.init.zeros_(twin.experts.down_proj)
    assert not twin(x).any() and moe(x).all()


# -- grouped-query attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_gqa_is_attention_with_repeated_keys_and_values(n_kv_head):
    model = randomized(small("gpas_pre", n_kv_head=n_kv_head), torch.float64)
    full = randomized(small("gpas_pre", n_kv_head=4), torch.float64)
    weights = model.state_dict()
    for name, w in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = w.view(n_kv_head, 8, 32).repeat_interleave(4 // n_kv_head, 0).reshape(32, 32)
    full.load_state_dict(weights)
    idx, targets = batch(model.config)
    (a, _, ga), (b, _, gb) = gradients(model, idx, targets), gradients(full, idx, targets)
    assert distance(a, b) < 1e-12
    for name in ga:
        grad = gb[name]
        if "k_proj" in name or "v_proj" in name:
            grad = grad.view(n_kv_head, 4 // n_kv_head, 8, 32).sum(1).reshape(8 * n_kv_head, 32)
        assert distance(ga[name], grad) < 1e-11, name


def test_gqa_repeats_no_keys_in_memory():
    """What attention keeps for the backward pass is as small as the keys and values themselves."""
    kept = []
    model = GPT(GPTConfig(block_size=64, vocab_size=29, n_layer=1, n_head=8, n_kv_head=1, n_embd=128))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randint(0, 29, (2, 64)))
    heads = [t.shape[1] for t in kept if t.dim() == 4 and t.shape[2:] == (64, 16)]
    assert heads.count(1) == 2 and heads.count(8) == 2  # k and v; q and the output
