"""What the four papers prove or approximate, held against this model: growth of the variance with depth, the size of
gradients, and what experts, length, grouped queries, masks and weight decay do to a variance.

Each test says which statement it is about. Where a statement does not hold for a real layer, the test says what does.
"""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_model import small

from model import GPT, MLP, Attention, GPTConfig, MoE
from train import OPTIMIZERS, Settings

# -- variance of the stream at initialization ---------------------------------------------------------------------------


def variances(norm, L=16):
    """Mean variance of the residual state after 0, 1, ... L layers of a wide random model, (L + 1)."""
    config = GPTConfig(block_size=32, vocab_size=64, n_layer=L, n_head=4, n_embd=256, norm=norm, init_std=1 / 16)
    model, states = GPT(config), []
    with torch.no_grad():
        x = model.embed_norm(model.embed_tokens(torch.randint(0, 64, (4, 32))))
        states.append(x.var(-1, correction=0).mean())
        for block in model.blocks:
            x = block(x)
            states.append(x.var(-1, correction=0).mean())
    return torch.stack(states)


@pytest.mark.parametrize("norm", ["pre", "peri"])
def test_variance_grows_on_a_line(norm):
    """Peri-LN Eq. 4, Var(x_{l+1}) = Var(x_l) + beta_0, which is the lower bound of LNS Lemma 3.2, Theta(L)."""
    v = variances(norm)
    step = v.diff()
    assert v[-1] > 3 * v[0]
    assert 0.6 < step[8:].mean() / step[:8].mean() < 1.6


def test_peri_ln_adds_two_to_the_variance_with_each_layer():
    """Peri-LN Eq. 4 with beta_0 known: each of a layer's two branches leaves its norm with variance 1, so Var(x_{L+1}) is
    1 + 2 L after a normalized embedding."""
    assert variances("peri")[-1].item() == pytest.approx(1 + 2 * 16, rel=0.1)
    assert variances("sandwich")[-1].item() == pytest.approx(0.4 + 2 * 16, rel=0.1)


@pytest.mark.parametrize("norm", ["post", "deepnorm"])
def test_a_norm_after_the_addition_keeps_the_variance_at_one(norm):
    assert (variances(norm)[1:] - 1).abs().max() < 0.1


def test_lns_grows_like_the_logarithm_of_the_depth():
    """A branch of layer l is a function of N(x) / sqrt(l), so that its variance falls about as 1 / l and the sum grows as
    log L. LNS Lemma 4.1 bounds it between Theta(L) and Theta(L^{2 - eps}): at initialization its lower bound is not met."""
    v = {L: variances("lns", L)[-1].item() for L in (4, 16, 64)}
    pre = {L: variances("pre", L)[-1].item() for L in (4, 16, 64)}
    first, second = v[16] - v[4], v[64] - v[16]  # equal for a logarithm, 4 times as large for a line
    assert 0.4 < second / first < 1.8
    assert 3 < (pre[64] - pre[16]) / (pre[16] - pre[4]) < 5
    assert v[64] < 0.1 * pre[64]


def test_naive_scaling_shrinks_the_first_gradient_and_gpas_does_not(monkeypatch):
    """GPAS appendix B: the stream's gradient is multiplied by the product of 1 - act(a) only without the stop-gradient."""

    def first_gradient():
        model = GPT(small("gpas_pre", n_layer=8)).requires_grad_(False)
        for gate in model.gates():
            nn.init.constant_(gate, 0.5)
        x = torch.randn(1, 8, 32, requires_grad=True)
        y = x
        for block in model.blocks:
            block.attn.o_proj.weight.zero_(), block.mlp.down_proj.weight.zero_()  # branches off: the shortcut alone
            y = block(y)
        return torch.autograd.grad(y.sum(), x)[0]

    assert torch.equal(first_gradient(), torch.ones(1, 8, 32))
    monkeypatch.setattr("model.gpas", lambda x, scale, keep: scale * x)
    expected = (1 - F.silu(torch.tensor(0.5))) ** 16
    assert torch.allclose(first_gradient(), expected.expand(1, 8, 32), rtol=1e-4)


# -- the gradient of the last matrix --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["pre", "peri", "post"])
def test_gradient_of_the_last_matrix(norm):
    """Peri-LN Proposition 3.1, C.1 to C.3, on our Residual with a ReLU MLP: a = h W2 + b2 its output, and logits what the
    residual gives. |dL/dW2_ij| is h_i |p_j - y_j| with a norm before the MLP only: it grows with h without bound. With
    a norm after it, it is at most 4 gamma sqrt(D) |h| / |a|, and with one after the addition 4 gamma sqrt(D) |h| / |x + a|.
    """
    D, H, gamma = 16, 32, 1.5
    x = torch.randn(1, 1, D).double()
    residual = GPT(small(norm, n_embd=D, n_layer=1)).double().blocks[0].mlp_residual
    for last_norm in (residual.out_norm, residual.post_norm):
        if getattr(last_norm, "weight", None) is not None:
            nn.init.constant_(last_norm.weight, gamma)
    W1, norms = torch.randn(D, H).double(), []
    for factor in (1.0, 10.0, 1e3, 1e5):  # a massive hidden activation
        W2 = torch.randn(H, D, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        seen = {}

        def mlp(z):
            seen["h"] = factor * F.relu(z @ W1)
            seen["a"] = seen["h"] @ W2
            return seen["a"]

        logits = residual(x, mlp)[0]
        target = seen["a"][0].argmin(-1)  # a mistake, whose gradient is not 0
        grad = torch.autograd.grad(F.cross_entropy(logits, target), W2)[0]
        h, a = seen["h"][0, 0], seen["a"]
        if norm == "pre":
            expected = torch.outer(h, logits.softmax(-1)[0].detach() - F.one_hot(target, D)[0])
            torch.testing.assert_close(grad, expected)
        else:
            bound = 4 * gamma * math.sqrt(D) * h.norm() / (a if norm == "peri" else x + a).norm()
            assert 0 < grad.norm() <= bound
        norms.append(grad.norm().item())
    if norm == "pre":
        assert norms[-1] > 1e4 * norms[0] > 0
    else:
        assert norms[-1] < 3 * norms[0] + 1e-3


# -- what Sparsity calls regulators of the variance -----------------------------------------------------------------------


def experts_variance(k):
    """Variance of the output of a layer with k of 8 experts per token, and of its Jacobian's elements, over 8 draws."""
    output, jacobian = [], []
    for _ in range(8):
        moe = MoE(GPTConfig(n_embd=32, n_head=2, n_hidden=64, n_expert=8, n_expert_active=k)).double().eval()
        for p in moe.parameters():
            nn.init.normal_(p, std=0.125)
        nn.init.zeros_(moe.router.weight)  # every expert's router weight is 1/8, so 1/k after normalization
        moe.router.weight.requires_grad_(False)
        x = torch.randn(1, 512, 32).double()
        output.append(moe(x).var())
        jacobian += [torch.autograd.functional.jacobian(moe, token[None]).var() for token in x[0, :2]]
    return torch.stack(output).mean().item(), torch.stack(jacobian).mean().item()


def test_the_variance_of_an_average_of_k_experts_is_one_kth():
    """Sparsity Theorem 6, output and Jacobian: independent experts, equal router weights."""
    output, jacobian = experts_variance(1)
    for k in (2, 4, 8):
        output_k, jacobian_k = experts_variance(k)
        assert output_k * k == pytest.approx(output, rel=0.25)
        assert jacobian_k * k == pytest.approx(jacobian, rel=0.3)


def attention_variance(T, **heads):
    """Variance of the last position's attention output, over 64 sequences of T random tokens and 8 draws of a layer's
    weights. Small queries make the attention uniform, as the theorems assume."""
    variance = 0
    for _ in range(8):
        attention = Attention(GPTConfig(block_size=T, n_embd=64, n_head=8, **heads)).double()
        for name, p in attention.named_parameters():
            nn.init.normal_(p, std=1e-3 if name.startswith("q_proj") else 0.125)
        with torch.no_grad():
            variance += attention(torch.randn(64, T, 64).double())[:, -1].var().item() / 8
    return variance


def test_attention_over_T_tokens_averages_their_values():
    """Sparsity Theorem 4: 1 / T."""
    v = {T: attention_variance(T) for T in (16, 64, 256)}
    assert v[16] / v[64] == pytest.approx(4, rel=0.15) and v[64] / v[256] == pytest.approx(4, rel=0.15)


def test_grouped_queries_do_not_lower_the_variance_at_initialization():
    """Sparsity Theorem 5 gives a factor of 1 / G: its proof lets a query attend to n / G keys and averages the heads. In
    a real layer every head attends to all T keys and its output has a matrix of its own: the variance stays."""
    full = attention_variance(32, n_kv_head=8)
    for n_kv_head in (4, 2, 1):
        assert attention_variance(32, n_kv_head=n_kv_head) == pytest.approx(full, rel=0.15)


def test_masked_branches_slow_the_growth_in_a_transformer_block():
    """Sparsity Theorem 2: attention and SwiGLU branches without norms, whose inputs are masked."""

    def growth(share):
        torch.manual_seed(1)
        config, x = GPTConfig(n_embd=256, n_head=4, block_size=16), torch.randn(8, 16, 256)
        before = x.var()
        with torch.no_grad():
            for _ in range(4):
                for f in (Attention(config), MLP(config, config.n_hidden)):
                    for p in f.parameters():
                        nn.init.normal_(p, std=256**-0.5)
                    x = x + f(x * (torch.rand(256) < share))
        return (x.var() / before).item()

    assert 1 < growth(0.25) < 0.8 * growth(0.5) < 0.8 * 0.8 * growth(1.0)


@pytest.mark.parametrize("decay", [0.1, 0.5, 1.0])
def test_weight_decay_contracts_and_leaves_a_floor_of_noise(decay):
    """Sparsity Theorem 3, on our optimizers with a gradient that is noise alone: the initial weights shrink by 1 - lr decay
    a step. For W <- (1 - lr decay) W - lr G, which SGD is, the floor is lr^2 Var(G) / (1 - (1 - lr decay)^2)."""
    lr, steps = 0.1, 200
    make = lambda name, p: OPTIMIZERS[name]([{"params": [p], "weight_decay": decay}], Settings(learning_rate=lr))
    kept = nn.Parameter(torch.ones(1000))
    optimizer = make("adamw", kept)
    for _ in range(20):
        kept.grad = torch.zeros(1000)  # no gradient: what is left is the decay
        optimizer.step()
    torch.testing.assert_close(kept.detach(), torch.full((1000,), (1 - lr * decay) ** 20))

    W = nn.Parameter(torch.zeros(20_000))
    optimizer = make("sgd", W)
    for _ in range(steps):
        W.grad = torch.randn(20_000)
        optimizer.step()
    floor = lr**2 * (1 - (1 - lr * decay) ** (2 * steps)) / (1 - (1 - lr * decay) ** 2)
    assert W.var().item() == pytest.approx(floor, rel=0.06)
