"""interchange.py: folded models against the gated ones, exported ones against transformers, and back."""

import copy

import pytest
import torch
from test_model import ALL, batch, randomized, small

from interchange import fold
from model import GPAS_ACTS, GPAS_POSITIONS, GPT, SCHEMES, GPTConfig, Norm

GATED = ["gpas_" + name for name in SCHEMES]

# -- fold ---------------------------------------------------------------------------------------------------------------


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
    assert_folds(small(norm, norm_eps=1e-2, gate_per="sublayer", n_expert=4, n_expert_shared=1, n_hidden=16, moe_from=2))


@pytest.mark.parametrize("norm", ["gpas_pre", "gpas_mix", "gpas_out", "gpas_b2t", "gpas_admin", "gpas_hybrid", "gpas_sandwich"])
@pytest.mark.parametrize("position", GPAS_POSITIONS)
def test_fold_at_every_position(norm, position):
    if position == "norm" and "A" not in SCHEMES[norm.removeprefix("gpas_")].norms:
        norm = "gpas_pre_post"
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
        dict(norm="gpas_out", qkv_bias=True, tie_embeddings=True, head_dim=12, rope_scaling={"rope_type": "linear", "factor": 2.0}),
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
