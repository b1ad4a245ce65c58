"""analyze.py: every measure against a brute-force reference and on models whose answer is known, and the program."""

import dataclasses
import importlib.util
import itertools
import json
import math
import shutil
import sys
import textwrap

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_model import randomized, small
from test_train import prepare_in_another_tokenizer

import analyze
import configurator
import prepare_data
from configurator import UserError
from model import GPT, GPTConfig, gate_scale

SCHEMES = ["pre", "post", "gpas_mix", "gpas_peri", "lns", "deepnorm", "hybrid"]
MOE = [dict(norm="gpas_pre", n_expert=4, n_expert_active=2)]
CONFIGS = [dict(norm=norm) for norm in SCHEMES] + [dict(norm="gpas_pre", gpas_position="module", gate_per="sublayer")] + MOE


def build(norm="pre", **kwargs):
    return randomized(small(norm, **{"n_embd": 16, "n_head": 4, "n_kv_head": 2, "block_size": 12, **kwargs}), torch.float64)


def text(model, n=3, B=2, T=12):
    """n batches of random tokens with the targets that the model finds likeliest; some do not count."""
    batches = []
    for _ in range(n):
        idx = torch.randint(0, model.config.vocab_size, (B, T))
        batches.append((idx, model(idx)[0].argmax(-1)))
    batches[0][1][0, :3] = -100
    return batches


@pytest.fixture(params=CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
def model(request):
    return build(**request.param)


def run_blocks(model, idx, blocks):
    """Residual states through `blocks`, one tensor (L + 1, B, T, d)."""
    x = model.embed_norm(model.embed_tokens(idx))
    states = [x]
    for block in blocks:
        states.append(block(states[-1]))
    return torch.stack(states).detach()


def all_states(model, batches, blocks=None):
    """(L + 1, tokens, d)."""
    return torch.cat([run_blocks(model, idx, blocks or model.blocks).flatten(1, 2) for idx, _ in batches], dim=1)


@torch.no_grad()
def full_loss(model, batches, blocks):
    """Mean over all targets of the loss of a model with these blocks, by whole forward passes."""
    total = n = 0
    for idx, targets in batches:
        logits = model.lm_head(model.norm(run_blocks(model, idx, blocks)[-1]))
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        n += (targets != -100).sum().item()
    return total / n


def close(a, b, **kwargs):
    a, b = (torch.as_tensor(torch.stack(list(v)) if isinstance(v, list) and torch.is_tensor(v[0]) else v).detach().double() for v in (a, b))
    torch.testing.assert_close(a, b, **{"rtol": 1e-6, "atol": 1e-9, "equal_nan": True, **kwargs})


# -- against brute force


def test_stream(model):
    batches = text(model)
    result, x = analyze.stream(model, batches), all_states(model, batches)
    N, d = x.shape[1:]
    close(result["variance"], [sum(((v - v.sum() / d) ** 2).sum() / d for v in s) / N for s in x])
    close(result["magnitude"], x.abs().mean((1, 2)))
    close(result["largest"], x.abs().amax((1, 2)))
    z = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    close(result["kurtosis_per_dim"], (z**4).mean(1))
    close(result["kurtosis"], (z**4).mean((1, 2)))
    value, place = x.abs().flatten().sort(descending=True)
    close(result["top"], value[:100])
    assert result["top_state"].tolist() == (place[:100] // (N * d)).tolist()


def test_branches(model):
    """What a sub-layer's branch adds, from the residual's own equation: the output of a layer with it minus without it."""
    batches = text(model, n=1)
    result = analyze.stream(model, batches)
    x = run_blocks(model, batches[0][0], model.blocks)
    for l, block in enumerate(model.blocks):
        for name, place in (("attn", 0), ("mlp", -1)):
            residual, f, inside = getattr(block, f"{name}_residual"), getattr(block, name), []
            scale = None if block.gate is None else gate_scale(block.gate)[place:][:1]
            at = x[l] if name == "attn" else block.attn_residual(x[l], block.attn, None if scale is None else gate_scale(block.gate)[:1])

            def watched(h):
                inside.append(f(h))
                return inside[-1]

            h = at
            residual(at, watched, scale)  # tells what the module gives
            close(result[f"{name}_module_variance"][l], inside[0].var(-1, correction=0).mean())
            h = residual.out_norm(inside[0])
            if residual.gate_place == "branch" and scale is not None:
                h = h * scale
            close(result[f"{name}_variance"][l], h.var(-1, correction=0).mean())


def test_each_token_counts_once_in_batches_of_two_sizes():
    model = build()
    batches = text(model, n=1) + text(model, n=1, B=1, T=6)
    result, x = analyze.stream(model, batches), all_states(model, batches)
    close(result["variance"], ((x - x.mean(-1, keepdim=True)) ** 2).mean((1, 2)))
    parts = [run_blocks(model, idx, model.blocks) for idx, _ in batches]
    for l, block in enumerate(model.blocks):  # Pre-LN: the branch is f(A(x))
        h = torch.cat([block.attn(block.attn_residual.pre_norm(states[l])).flatten(0, 1) for states in parts])
        close(result["attn_variance"][l], ((h - h.mean(-1, keepdim=True)) ** 2).mean())
    angle = torch.cosine_similarity(x[0], x[1], dim=-1).arccos() / math.pi
    close(analyze.angular_distance(model, batches)[0, 0], angle.mean())


def test_values_beyond_float16_are_counted():
    model = build()
    with torch.no_grad():
        model.embed_tokens.weight.fill_(1.0)[:, 3] = -70000.0
    result = analyze.stream(model, text(model))
    assert result["over_float16"][0] == 3 * 24 and result["largest"][0] == 70000 and (result["top"] > 65504).all()
    assert result["kurtosis_per_dim"][0].isnan().all()  # no dimension varies


def test_angular_distance(model):
    batches = text(model)
    result, x = analyze.angular_distance(model, batches), all_states(model, batches)
    for l, n in itertools.product(range(1, 5), range(1, 5)):
        if l + n > 5:
            assert result[l - 1, n - 1].isnan()
        else:
            cos = torch.cosine_similarity(x[l - 1], x[l + n - 1], dim=-1).clamp(-1, 1)
            close(result[l - 1, n - 1], (cos.arccos() / math.pi).mean())


def test_gradients(model):
    batches = text(model)
    model.zero_grad()
    n = sum((targets != -100).sum() for _, targets in batches)
    model.eval()
    sum(model(idx, t)[1] * (t != -100).sum() / n for idx, t in batches).backward()
    result = analyze.gradients(model, batches)
    for l, block in enumerate(model.blocks):
        g = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in block.parameters()])
        close(result["norm"][l], g.norm())
        close(result["variance"][l], ((g - g.mean()) ** 2).mean())


def test_weights():
    model = build("gpas_mix", n_layer=4)
    result = analyze.weights(model)
    for l, block in enumerate(model.blocks):
        a, m = block.attn, block.mlp
        squares = [sum((p.weight**2).sum() for p in ps) for ps in ((a.q_proj, a.k_proj, a.v_proj, a.o_proj), (m.gate_proj, m.up_proj, m.down_proj))]
        close(result["attn_norm"][l], squares[0].sqrt())
        close(result["mlp_norm"][l], squares[1].sqrt())
        close(result["gates"][l], block.gate)
        close(result["gate_scale"][l], 1 - F.silu(block.gate))
    tanh = build("gpas_pre", gpas_act="tanh")
    close(analyze.weights(tanh)["gate_scale"].flatten(), [1 - math.tanh(block.gate.item()) for block in tanh.blocks])
    assert result["attn_out_gain"].isnan().all() and "gates" not in analyze.weights(build("peri"))
    peri = build("peri")
    close(analyze.weights(peri)["mlp_out_gain"], [b.mlp_residual.out_norm.weight.mean() for b in peri.blocks])
    everything = torch.cat([p.flatten() for p in model.parameters()]).abs()
    matrices = torch.cat([p.flatten() for p in model.parameters() if p.dim() > 1]).abs()
    close(result["sparsity_all"], [(everything < e).double().mean() for e in (1e-1, 1e-2, 1e-4)])
    close(result["sparsity_matrices"], [(matrices < e).double().mean() for e in (1e-1, 1e-2, 1e-4)])
    assert result["sparsity_all"][0] != result["sparsity_matrices"][0] > 0


def brute_jacobian(block, x, own_token):
    """Mean over input tokens of the sum over output tokens (or of the same token) of dy_t' / dx_t; x (B, T, d)."""
    B, T, d = x.shape
    J = torch.autograd.functional.jacobian(block, x)  # (B, T, d, B, T, d)
    if own_token:
        return sum(J[b, t, :, b, t] for b in range(B) for t in range(T)) / (B * T)
    return J.sum((0, 1)).sum((1, 2)) / (B * T)


@pytest.mark.parametrize("own_token", [False, True])
def test_jacobian(model, own_token):
    batches = text(model, n=2, T=3)
    result = analyze.jacobian(model, batches, layers=[4, 2], own_token=own_token, rows=5)
    model.eval()
    I, d = torch.eye(16), 16
    for k, l in enumerate([4, 2]):
        J = sum(brute_jacobian(model.blocks[l - 1], run_blocks(model, idx, model.blocks)[l - 1], own_token) for idx, _ in batches) / 2
        close(result["matrices"][k], J)
        close(result["deviation"][k], ((J - I) ** 2).sum().sqrt())
        close(result["deviation_per_d"][k], ((J - I) ** 2).sum().sqrt() / d)
        off = ((J * (1 - I)) ** 2).sum()
        close(result["off_diagonal"][k], off.sqrt())
        close(result["off_diagonal_rms"][k], (off / (d * d - d)).sqrt())
        close(result["diagonal_mean"][k], J.diag().mean())
        close(result["diagonal_std"][k], ((J.diag() - J.diag().mean()) ** 2).mean().sqrt())
        close(result["spectral_norm"][k], torch.linalg.svdvals(J)[0])
    assert result["layers"].tolist() == [4, 2]


def test_removal_and_causal_scores(model):
    batches, L = text(model), 4
    result, x = analyze.removal(model, batches), all_states(model, batches)
    loss = full_loss(model, batches, model.blocks)
    close(result["loss"], loss)
    close(result["perplexity"], math.exp(loss))
    close(analyze.removal(model, batches[1:2])["loss"], model.eval()(*batches[1])[1])
    effects = []
    for s in range(L):
        removed = full_loss(model, batches, [b for l, b in enumerate(model.blocks) if l != s])
        close(result["loss_drop"][s], removed - loss)
        close(result["perplexity_drop"][s], math.exp(removed) - math.exp(loss))
        skipped = all_states(model, batches, [b if l != s else nn.Identity() for l, b in enumerate(model.blocks)])
        C = []
        for l in range(s + 1, L):
            update, other = x[l + 1] - x[l], skipped[l + 1] - skipped[l]
            C.append((update - other).norm(dim=-1).mean() / update.norm(dim=-1).mean())
            close(result["causal"][s, l], C[-1])
        assert result["causal"][s, : s + 1].isnan().all()
        effects.append(sum(C) / len(C) if C else torch.tensor(0.0))
    close(result["causal_score"], sum(effects) / L)
    close(result["causal_score_normalized"], sum(effects) / L / 2)


def test_permutation(model):
    # targets that the model finds unlikely: swaps make the loss smaller too
    batches = [(idx, model(idx)[0].argmin(-1)) for idx, _ in text(model)]
    result, loss, pairs = analyze.permutation(model, batches), full_loss(model, batches, model.blocks), []
    for i, j in itertools.combinations(range(4), 2):
        order = list(model.blocks)
        order[i], order[j] = order[j], order[i]
        pairs.append(abs(loss - full_loss(model, batches, order)) / abs(loss))
        close(result["matrix"][i, j], pairs[-1])
        close(result["matrix"][j, i], pairs[-1])
    close(result["score"], sum(pairs) / 6)
    assert result["matrix"].diagonal().eq(0).all()


class Affine(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        return x @ self.weight.mT + self.bias


@pytest.mark.filterwarnings("ignore:usefulness")
def test_usefulness(model):
    batches = text(model)
    result, x = analyze.usefulness(model, batches), all_states(model, batches)
    loss, ratios = full_loss(model, batches, model.blocks), []
    for l in range(4):
        inputs = torch.cat((x[l], torch.ones_like(x[l][:, :1])), dim=1)
        solution = torch.linalg.lstsq(inputs, x[l + 1]).solution
        replaced = [*model.blocks[:l], Affine(solution[:-1].T, solution[-1]), *model.blocks[l + 1 :]]
        ratios.append(full_loss(model, batches, replaced) / loss)
    close(result["ratio"], ratios)
    close(result["loss_drop"], (torch.tensor(ratios) - 1) * loss, atol=1e-6)
    assert result["useful"].tolist() == [r > 1.1 for r in ratios]
    assert result["effective"] == sum(r > 1.1 for r in ratios) == 4 - result["wasted"] and result["score"] == result["effective"] / 4


def test_attention(model):
    """Recomputed from the modules' own projections; the queries are scaled up until some weights are tiny."""
    with torch.no_grad():
        for block in model.blocks:
            (block.attn.q_proj if model.config.qk_norm == "none" else block.attn.q_norm).weight.mul_(12.0)
    batches = text(model, n=2)
    result, config = analyze.attention(model, batches, map_size=5), model.config
    T, D, G = 12, config.head_dim, config.n_head // config.n_kv_head
    tril = torch.ones(T, T).tril().bool()
    for l, block in enumerate(model.blocks):
        a, A = block.attn, []
        for idx, _ in batches:
            inputs = []
            hook = a.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
            model(idx)
            hook.remove()
            q, k = (p(inputs[0]).view(2, T, -1, D) for p in (a.q_proj, a.k_proj))
            if config.qk_norm == "head":
                q, k = a.q_norm(q), a.k_norm(k)
            angle = torch.outer(torch.arange(T).double(), config.rope_theta ** -(torch.arange(0, D, 2).double() / D))
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            q, k = (torch.cat((z[..., : D // 2] * cos - z[..., D // 2 :] * sin, z[..., D // 2 :] * cos + z[..., : D // 2] * sin), -1) for z in (q, k))
            for b, h in itertools.product(range(2), range(config.n_head)):
                scores = q[b, :, h] @ k[b, :, h // G].T / math.sqrt(D)
                A.append(scores.masked_fill(~tril, -math.inf).softmax(-1).detach())
        A = torch.stack(A).view(4, config.n_head, T, T)
        for i, e in enumerate((1e-3, 1e-4, 1e-6)):
            close(result["sparsity"][i, l], (A < e).double().mean((0, 2, 3)))
            close(result["causal_sparsity"][i, l], ((A < e) & tril).double().sum((0, 2, 3)) / (4 * tril.sum()))
        logs = torch.where(A > 0, A.log(), 0.0)
        close(result["entropy"][l], -(A * logs).sum(-1).mean((0, 2)))
        close(result["maps"][l], A.mean(0)[:, :5, :5])
    assert 0 < result["causal_sparsity"][2].mean() < result["causal_sparsity"][0].mean() < result["sparsity"][0].mean()


def test_experts():
    model = build("pre", n_expert=8, n_expert_active=2)
    assert (analyze.experts(model, text(model, n=1, B=1, T=1))["dead"] == 6 / 8).all()  # one token has two experts
    batches = text(model)
    result = analyze.experts(model, batches)
    assert result["layers"].tolist() == [1, 2, 3, 4]
    for l, block in enumerate(model.blocks):
        inputs = []
        hook = block.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
        for idx, _ in batches:
            model(idx)
        hook.remove()
        count, entropy = [0] * 8, []
        for row in torch.cat(inputs):
            p = F.softmax(block.mlp.router(row).float(), -1).tolist()
            entropy.append(-sum(q * math.log(q) for q in p))
            for i in sorted(range(8), key=lambda i: -p[i])[:2]:
                count[i] += 1
        close(result["load"][l], torch.tensor(count) / sum(count))
        close(result["dead"][l], sum(c == 0 for c in count) / 8)
        close(result["entropy"][l], sum(entropy) / len(entropy))


def test_experts_of_a_dense_model():
    with pytest.raises(UserError, match="none"):
        analyze.experts(build(), text(build()))


# -- known answers


def test_identity_block():
    model = build("gpas_pre").float()
    model.blocks[2] = nn.Identity()
    batches = text(model, n=8)
    removal = analyze.removal(model, batches)
    assert removal["loss_drop"][2] == 0 and removal["perplexity_drop"][2] == 0
    assert (removal["causal"][2, 3] == 0) and (removal["causal"][:2, 2] == 0).all() and removal["causal"][0, 1] > 0
    useful = analyze.usefulness(model, batches)
    close(useful["ratio"][2], 1.0, rtol=1e-5)
    assert not useful["useful"][2]
    result = analyze.jacobian(model, batches[:1], layers=[3])
    assert (result["matrices"][0] == torch.eye(16)).all() and result["deviation"] == 0 and result["off_diagonal"] == 0
    assert result["spectral_norm"] == 1 and result["diagonal_std"] == 0
    assert analyze.angular_distance(model, batches)[2, 0] < 1e-7
    assert analyze.attention(model, batches)["entropy"].mean(1).isnan().tolist() == [False, False, True, False]
    assert analyze.stream(model, batches)["mlp_variance"].isnan().tolist() == [False, False, True, False]


def test_affine_block_is_useless():
    model = build().float()

    affine = model.blocks[1] = Affine(torch.randn(16, 16) * 0.7, torch.randn(16) * 3)
    batches = text(model, n=8)
    result = analyze.usefulness(model, batches)
    close(result["ratio"][1], 1.0, rtol=1e-5)
    assert not result["useful"][1] and result["ratio"].max() > 1.01
    (weight, bias) = analyze.affine_maps(model, batches)[1]
    close(weight, affine.weight, rtol=1e-3, atol=1e-4)
    close(bias, affine.bias, rtol=1e-3, atol=1e-4)


def test_affine_map_of_inputs_that_span_few_dimensions():
    model = build().float()
    with torch.no_grad():
        model.embed_tokens.weight[:, 2:] = 0
        model.embed_tokens.weight[:, 0] *= 1e4  # and of very different sizes
    model.blocks[0] = nn.Identity()
    close(analyze.usefulness(model, text(model, n=8))["ratio"][0], 1.0, rtol=1e-4)


def test_too_few_tokens_for_an_affine_map():
    model = build()
    with pytest.raises(UserError, match="16 tokens .* 17 or more"):
        analyze.usefulness(model, text(model, n=1, B=1, T=16))
    with pytest.warns(UserWarning, match="63 tokens are few .* 64"):
        analyze.usefulness(model, text(model, n=1, B=7, T=9))


def test_swap_of_equal_blocks():
    model = build("gpas_pre")
    model.blocks[3].load_state_dict(model.blocks[0].state_dict())
    result = analyze.permutation(model, text(model))["matrix"]
    assert result[0, 3] == 0 and (result + torch.eye(4) > 0).sum() == 14


def test_blocks_keep_their_own_constants():
    """Equal weights at two depths of LNS are two functions: their swap is not free."""
    model = build("lns")
    model.blocks[3].load_state_dict(model.blocks[0].state_dict())
    assert analyze.permutation(model, text(model))["matrix"][0, 3] > 1e-6


def test_attention_pattern_by_hand():
    """Zero queries attend alike to all tokens so far: A_ij = 1 / i."""
    model = build(block_size=16)
    for block in model.blocks:
        nn.init.zeros_(block.attn.q_proj.weight)
    batches, T = text(model, T=16), 16
    result = analyze.attention(model, batches)
    close(result["entropy"], torch.full((4, 4), sum(math.log(i) for i in range(1, T + 1)) / T))
    close(result["causal_sparsity"], torch.zeros(3, 4, 4))
    close(result["sparsity"], torch.full((3, 4, 4), T * (T - 1) / 2 / T**2))
    close(result["maps"][0, 0], torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None], rtol=1e-6)


def test_attention_in_batches_of_two_lengths():
    """Each query counts once, whatever the length of its batch."""
    model = build("pre")
    long, short = text(model, n=1, T=12), text(model, n=1, T=6)
    both, *parts = (analyze.attention(model, batches, map_size=5) for batches in (long + short, long, short))
    close(both["entropy"], (parts[0]["entropy"] * 12 + parts[1]["entropy"] * 6) / 18)
    close(both["causal_sparsity"], (parts[0]["causal_sparsity"] * 78 + parts[1]["causal_sparsity"] * 21) / 99)
    close(both["sparsity"], (parts[0]["sparsity"] * 144 + parts[1]["sparsity"] * 36) / 180)
    whole = [analyze.attention(model, batches)["maps"] for batches in (long + short, short + long, long, short)]
    assert whole[0].shape[-1] == 6  # the positions that all have
    close(whole[0], whole[1])
    close(whole[0], (whole[2][..., :6, :6] + whole[3]) / 2)


def test_states_that_are_no_numbers_have_no_causal_score():
    model = build("pre")
    with torch.no_grad():
        model.embed_tokens.weight.fill_(math.nan)
    assert math.isnan(analyze.removal(model, text(model, n=1))["causal_score"])


def test_a_layer_that_is_named_twice_is_measured_once():
    model = build("pre")
    assert analyze.jacobian(model, text(model, n=1, T=4), layers=[2, 2])["layers"].tolist() == [2]


def test_json_of_runs_named_as_large_results_are():
    runs = {"maps": {"variance": torch.ones(2)}, "plain": {"maps": torch.ones(2, 2)}}
    assert analyze.plain(runs) == {"maps": {"variance": [1.0, 1.0]}, "plain": {}}


def test_a_loss_whose_perplexity_is_too_large():
    removal = analyze.Removal(build("pre"))
    removal.loss, removal.n = removal.loss + 800.0, 1
    assert removal.result()["perplexity"] == math.inf


def test_a_question_with_a_separator_of_lines(tmp_path):
    """U+2028 ends no line of a jsonl."""
    question = {"prompt": "a\u2028b", "choices": ["x", "y"], "answer": 1}
    (tmp_path / "q.jsonl").write_text(json.dumps(question, ensure_ascii=False) + "\n" + json.dumps(question) + "\n")
    assert analyze.read_questions(tmp_path / "q.jsonl") == [question, question]


def test_experts_of_some_runs_only(monkeypatch):
    models = {"dense": build("pre"), "moe": build("pre", n_expert=4)}
    monkeypatch.setattr(analyze, "load_run", lambda name: (models[name], {"tokenizer": None}))
    monkeypatch.setattr(analyze, "data_of_run", lambda *_: None)
    monkeypatch.setattr(analyze, "load_batches", lambda *_: [])
    settings = analyze.Settings(["dense", "moe"], metrics="stream,experts")
    with pytest.warns(match="dense has no experts") as said:
        analyze.check_runs(["dense", "moe"], settings)
    assert len(said) == 1
    assert analyze.plan_run("dense", settings, models["dense"].config, {"tokenizer": None})[0] == ["stream"]
    with pytest.raises(UserError, match="metrics=experts: dense has no experts"):
        analyze.check_runs(["dense"], settings)


def test_attention_weights_by_hand():
    """One head whose second token looks at itself with weight 1 - 1e-5, and whose third looks at the first alone."""
    a = math.log(1e-5 / (1 - 1e-5))
    q = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]).double()[None] * 2  # the product is over sqrt(4)
    k = torch.tensor([[a, 1000.0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).double()[None]
    close(analyze.attention_weights(q, k)[0], [[1, 0, 0], [1e-5, 1 - 1e-5, 0], [1, 0, 0]])


@pytest.mark.parametrize("options", [dict(norm="pre"), dict(norm="gpas_peri"), *MOE])
def test_end_to_end(options):
    """Against the singular values of the whole Jacobian, by one backward pass for each of its rows."""
    model = build(**options, n_layer=2).double()
    for gate in model.gates():
        nn.init.constant_(gate, 0.3)
    batches, expected = [(torch.randint(0, 17, (2, 5)), None)], []
    for row in batches[0][0].split(1):
        x = model.embed_norm(model.embed_tokens(row)).detach().requires_grad_()
        y = x
        for block in model.blocks:
            y = block(y)
        rows = [torch.autograd.grad(e, x, retain_graph=True)[0].flatten() for e in y.flatten()]
        expected.append(torch.linalg.svdvals(torch.stack(rows))[0].item())
    assert analyze.end_to_end(model, batches, n_iter=60) == pytest.approx(sum(expected) / 2, rel=1e-3)


# -- multiple choice


def test_multiple_choice():
    model = build("gpas_pre", vocab_size=257, block_size=24)
    encoding = prepare_data.byte_encoding()
    letters = "abcdefgh "
    generator = torch.Generator().manual_seed(3)

    def word(n):
        return "".join(letters[i] for i in torch.randint(0, 9, (n,), generator=generator))

    questions = [{"prompt": word(p), "choices": [word(3), word(8), word(5)], "answer": i % 3} for i, p in enumerate([4, 9, 0, 12, 15, 40] * 4)]
    questions[0]["answer"] = questions[0]["choices"][0]
    result = analyze.multiple_choice(model, questions, encoding)

    def accuracy(blocks, per_character=True):
        right = 0
        for i, q in enumerate(questions):
            scores = []
            for choice in q["choices"]:
                prompt, rest = list(q["prompt"].encode()) or [256], list((" " + choice).encode())
                ids = torch.tensor([(prompt + rest)[-25:]])
                x = run_blocks(model, ids[:, :-1], blocks)[-1]
                logp = model.lm_head(model.norm(x)).log_softmax(-1)[0, -len(rest) :]
                score = sum(logp[t, c].item() for t, c in enumerate(rest))
                scores.append(score / len(choice) if per_character else score)
            right += scores.index(max(scores)) == i % 3
        return right / len(questions)

    full = accuracy(model.blocks)
    assert result["accuracy"] == pytest.approx(full) and result["n_questions"] == 24
    assert result["acc"] == pytest.approx(accuracy(model.blocks, per_character=False))
    close(result["score_drop"], [full - accuracy([b for l, b in enumerate(model.blocks) if l != s]) for s in range(4)])
    assert result["score_drop"].abs().max() > 0
    # two contexts and one continuation: the first is likelier where its choice is, read as two questions of one choice
    pair = {"prompt": ["abc", "fgh"], "choices": ["de", "de"], "answer": 0}
    scores = []
    for prompt in pair["prompt"]:
        ids = torch.tensor([list((prompt + " de").encode())])
        logp = model.lm_head(model.norm(run_blocks(model, ids[:, :-1], model.blocks)[-1])).log_softmax(-1)[0]
        scores.append(sum(logp[t, ids[0, t + 1]].item() for t in range(2, 5)))
    assert analyze.multiple_choice(model, [pair], encoding)["acc"] == float(scores[0] > scores[1])
    questions[1]["choices"][0] = "x" * 30
    with pytest.raises(UserError, match="31 tokens, more than the block size 24"):
        analyze.multiple_choice(model, questions, encoding)
    with pytest.raises(UserError, match="token 122; the model knows the tokens below 122"):  # the last one, which no model reads
        analyze.encode_choice(encoding, GPTConfig(vocab_size=122), "x", "yz")


# -- one pass


def test_one_pass_gives_what_each_measure_gives_alone():
    model = build("gpas_pre")
    batches = text(model)
    alone = {analyze.Stream: analyze.stream, analyze.AngularDistance: analyze.angular_distance, analyze.Attention: analyze.attention}
    alone |= {analyze.Removal: analyze.removal, analyze.Permutation: analyze.permutation}
    together = analyze.one_pass(model, iter(batches), {measure: measure(model) for measure in alone})
    for measure, function in alone.items():
        a, b = together[measure], function(model, batches)
        for x, y in zip(a.values(), b.values()) if isinstance(a, dict) else [(a, b)]:
            close(x, y, rtol=0, atol=0)
        assert function.__doc__ == measure.__doc__


def test_nothing_is_computed_twice():
    """Calls of blocks: L for the states, then removal and causal scores L(L-1)/2, swaps those after the first of the two,
    replacements L(L-1)/2; the head once for each loss. Of what happens inside the layers, L for all who ask."""
    model, counts = build(), {"block": 0, "head": 0}
    batches = text(model, n=1)
    for block in model.blocks:
        block.register_forward_hook(lambda *_: counts.__setitem__("block", counts["block"] + 1))
    model.lm_head.register_forward_hook(lambda *_: counts.__setitem__("head", counts["head"] + 1))
    maps = [(torch.eye(16).double(), torch.zeros(16).double())] * 4
    measures = [analyze.Removal(model), analyze.Permutation(model), analyze.Usefulness(model, maps)]
    analyze.one_pass(model, batches, dict(enumerate(measures)))
    swaps = sum(4 - i for i in range(4) for _ in range(i + 1, 4))
    assert counts == {"block": 4 + 6 + swaps + 6, "head": 1 + 4 + 6 + 4}
    counts.update(block=0, head=0)
    analyze.one_pass(model, batches, {"stream": analyze.Stream(model), "attention": analyze.Attention(model)})
    assert counts == {"block": 4 + 4, "head": 0}


def test_the_model_is_left_as_it_was():
    model = build("gpas_pre").train()
    model.blocks[0].gate.requires_grad_(False)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    batches = text(model)
    for name in ("stream", "attention", "gradients", "jacobian", "removal"):
        getattr(analyze, name)(model, batches)
    assert model.training and model.blocks[1].training and not model.blocks[0].gate.requires_grad
    assert all(p.requires_grad and p.grad is None for n, p in model.named_parameters() if n != "blocks.0.gate")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert F.scaled_dot_product_attention is analyze.scaled_dot_product_attention
    assert all((before[n] == p).all() for n, p in model.state_dict().items())


# -- the program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data set d, the runs out-pre and out-gpas_pre of 3 layers, and questions.jsonl."""
    folder = tmp_path_factory.mktemp("analyze")
    (folder / "text.txt").write_text("".join(f"{i * i % 7} norms and {i % 3} more\n" for i in range(9000)))
    data_dir = str(folder / "data")
    prepare_data.prepare(prepare_data.Settings(dataset="d", input=[str(folder / "text.txt")], data_dir=data_dir))
    for norm in ("pre", "gpas_pre"):
        torch.manual_seed(1)
        model = GPT(GPTConfig(block_size=32, n_layer=3, n_embd=16, n_head=2, norm=norm))
        out = folder / f"out-{norm}"
        out.mkdir()
        state = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), "tokenizer": {"name": "byte"}}
        torch.save({**state, "optimizer": {}, "step": 7, "settings": {"dataset": "d", "data_dir": data_dir}}, out / "ckpt.pt")
        lines = [{"step": s, "loss": 5.0 - s / 10, "val_loss": 5.1, "grad_norm": 1.0} for s in (0, 5)]
        for line in lines:
            line.update(variance=[1.0, 2.0, 3.0], grad_norms=[0.1, 0.2, 0.1], **({"gates": [0.0, 0.1, 0.2]} if "gpas" in norm else {}))
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    questions = [{"prompt": f"{i} norms and", "choices": ["2 more", "xyz"], "answer": i % 2} for i in range(6)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder


@pytest.fixture
def program(folder, monkeypatch, capsys):
    """A function that runs analyze.py with arguments in the folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(folder)

    def program(*args):
        monkeypatch.setattr(sys, "argv", ["analyze.py", *args])
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        code = 0
        try:
            configurator.run(analyze.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return program


def test_program(program, folder):
    code, out, err = program("out-gpas_pre", "--tokens=500", "--jacobian_tokens=60", "--figures=false", "--choices=questions.jsonl")
    assert code == 0, err
    result = json.loads((folder / "out-gpas_pre" / "analysis.json").read_text())
    known = set(analyze.MEASURES) - {"experts"}
    assert set(result) == known | {"run"} and result["run"]["tokens"] == 512 and result["run"]["step"] == 7
    assert len(result["stream"]["variance"]) == 4 and len(result["stream"]["kurtosis_per_dim"][0]) == 16
    assert result["removal"]["causal"][2] == [None] * 3 and result["jacobian"]["tokens"] == 64
    assert len(result["choices"]["score_drop"]) == 3 and "matrices" not in result["jacobian"] and "maps" not in result["attention"]
    for word in ("variance", "gate a", "loss drop", "causal score", "effective/wasted", "accuracy", "spectral norm", "512 held-out"):
        assert word in out, word
    assert "removal, permutation, usefulness, angular, stream, attention: 1 of 2" in err and "s left" in err
    # the numbers are those of the functions on the same text
    model, _ = analyze.load_run(folder / "out-gpas_pre")
    batches = analyze.load_batches(folder / "data" / "d", model.config, 500, 8)
    assert sum(idx.numel() for idx, _ in batches) == 512 and (batches[0][0][:, 1:] == batches[0][1][:, :-1]).all()
    close(result["removal"]["loss_drop"], analyze.removal(model, batches)["loss_drop"], rtol=1e-5)
    close(result["usefulness"]["ratio"], analyze.usefulness(model, batches)["ratio"], rtol=1e-5)
    close(result["gradients"]["norm"], analyze.gradients(model, batches)["norm"], rtol=1e-5)


def test_what_one_of_several_runs_cannot_be_asked_is_told_before_any_is_measured(program, folder):
    shallow = folder / "shallow"
    shutil.copytree(folder / "out-pre", shallow)
    checkpoint = torch.load(shallow / "ckpt.pt", weights_only=True)
    checkpoint["config"]["n_layer"] = 2
    checkpoint["model"] = {n: w for n, w in checkpoint["model"].items() if not n.startswith("blocks.2.")}
    torch.save(checkpoint, shallow / "ckpt.pt")
    code, out, err = program("out-pre", "shallow", "--layers=3", "--metrics=jacobian", "--tokens=64")
    assert code == 2 and "--layers=3: shallow has layers 1 to 2" in err and "held-out tokens" not in out
    code, out, err = program("out-pre", "--metrics=removal,usefulness", "--tokens=1", "--block_size=8")
    assert code == 2 and "8 tokens cannot fit a map of 16 dimensions" in err and "held-out tokens" not in out
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "a", "choices": ["b", "c" * 999], "answer": 0}) + "\n")
    code, out, err = program("out-pre", "--metrics=removal,choices", "--choices=long.jsonl")
    assert code == 2 and "more than the block size" in err and "held-out tokens" not in out
    code, out, err = program("out-pre", "--layers=3", "--metrics=jacobian", "--tokens=64", "--figures=false")
    assert code == 0 and json.loads((folder / "out-pre" / "analysis.json").read_text())["jacobian"]["tokens"] == 64


def test_columns_stand_at_the_layers_that_they_measure():
    nan, zero = math.nan, torch.zeros(3)
    causal = torch.tensor([[nan, 1, 3], [nan, nan, 5], [nan, nan, nan]])
    angles = torch.tensor([[0.1, 0.3, 0.6], [0.2, 0.5, nan], [0.4, nan, nan]])
    names = "deviation deviation_per_d off_diagonal off_diagonal_rms diagonal_mean diagonal_std spectral_norm".split()
    jacobian = {"layers": torch.tensor([2]), **{name: torch.tensor([7.0]) for name in names}}
    removal = dict(loss_drop=zero, perplexity_drop=zero, causal=causal)
    shown = analyze.shown_columns({"run": {"n_layer": 3}, "removal": removal, "angular": angles, "jacobian": jacobian})
    close(shown["importance"]["causal effect"], [nan, 2, 5, nan])
    close(shown["importance"]["angle to next"], [nan, 0.1, 0.2, 0.4], rtol=1e-6, atol=1e-7)  # they are float32 here
    close(shown["jacobian"]["|J - I|"], [nan, nan, 7, nan])


def test_a_measured_sweep(program, folder):
    for norm in ("pre", "gpas_pre"):
        shutil.copytree(folder / f"out-{norm}", folder / "swept" / f"norm={norm}")
    code, _, err = program("swept", "--metrics=stream", "--tokens=384", "--batch_size=8", "--figures=false")
    assert code == 0, err  # batches of 8 windows and of 4
    for run in json.loads((folder / "swept" / "sweep.json").read_text()):
        model, _ = analyze.load_run(folder / "swept" / run["name"])
        x = all_states(model, analyze.load_batches(folder / "data" / "d", model.config, 384, 8)).double()
        expected = ((x - x.mean(-1, keepdim=True)) ** 2).mean((1, 2))[1:]
        close(run["columns"]["variance"], expected, rtol=1e-5)


def test_several_runs(program, folder):
    code, out, err = program("out-pre", "out-gpas_pre", "--tokens=256", "--metrics=weights,stream,removal", "--figures=false")
    assert code == 0, err
    result = json.loads((folder / "analysis" / "analysis.json").read_text())
    assert list(result["runs"]) == ["out-pre", "out-gpas_pre"] and set(result["runs"]["out-pre"]) == {"run", "weights", "stream", "removal"}
    weights = [result["runs"][name]["weights"] for name in ("out-pre", "out-gpas_pre")]
    assert "attn_norm_ratio" not in weights[0]
    assert weights[1]["attn_norm_ratio"] == weights[1]["mlp_norm_ratio"] == [1.0] * 3
    table = [line.split() for line in out.splitlines()[-26:]]
    assert ["out-pre", "out-gpas_pre"] in table and any(row[:1] == ["loss"] and len(row) == 3 for row in table)
    assert "jacobian" not in out


def test_figures(program, folder):
    pytest.importorskip("matplotlib")
    code, out, err = program("out-pre", "out-gpas_pre", "--tokens=128", "--jacobian_tokens=32", "--analysis_dir=both", "--figures")
    assert code == 0, err
    names = "stream parameters importance jacobian attention angular_map removal_map permutation_map jacobian_maps dynamics"
    expected = {f"{name}.png" for name in ("kurtosis", *names.split())}
    expected |= {f"{name}_{run}.png" for name in ("attention_maps", "first_heads") for run in ("out-pre", "out-gpas_pre")}
    written = {path.name for path in (folder / "both").glob("*.png")}
    assert written == expected and all((folder / "both" / name).stat().st_size > 5000 for name in written)


def test_a_measure_of_ones_own(program, folder, monkeypatch):
    """The example of the module's docstring: ten lines and a row give a setting, a table, JSON and a figure."""
    example = analyze.__doc__[analyze.__doc__.index("    class RelativeUpdate") :]
    code, _, rest = example.partition("\n\nand this row")
    row = next(line for line in rest.splitlines() if line.startswith('    "update":'))
    names = vars(analyze).copy()
    exec(textwrap.dedent(code), names)
    monkeypatch.setattr(analyze, "MEASURES", analyze.MEASURES | eval("{" + row + "}", names))
    drawn = []
    monkeypatch.setattr(analyze, "save", lambda fig, path, title: drawn.append((path.name, [axis.get_ylabel() for axis in fig.axes])) or path.name)
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    code, out, err = program("out-pre", "--tokens=256", "--metrics=update", "--analysis_dir=mine")
    assert code == 0, err
    model, _ = analyze.load_run(folder / "out-pre")
    batches = analyze.load_batches(folder / "data" / "d", model.config, 256, 8)
    x = all_states(model, batches).double()
    expected = ((x[1:] - x[:-1]).norm(dim=-1) / x[:-1].norm(dim=-1)).mean(1)
    result = json.loads((folder / "mine" / "analysis.json").read_text())
    close(result["update"], expected, rtol=1e-5)
    rows = [line.split() for line in out.splitlines()]
    assert ["layer", "update"] in rows and ["3", f"{expected[2]:.4g}"] in rows
    assert not has_matplotlib or ("importance.png", ["update"]) in drawn
    code, out, _ = program("--help")
    assert "size of each layer's update" in out


def test_stages_of_a_run(program, folder):
    """Checkpoints of one run that --keep_every left, side by side: their own weights, the one log."""
    pytest.importorskip("matplotlib")
    stages = [folder / "out-pre" / f"ckpt_{step:06d}.pt" for step in (1, 2)]
    for step, path in enumerate(stages, 1):
        checkpoint = torch.load(folder / "out-pre" / "ckpt.pt", weights_only=True)
        checkpoint["model"]["lm_head.weight"] *= step
        torch.save({**checkpoint, "step": step}, path)
    options = ["--tokens=64", "--metrics=stream,weights", f"--analysis_dir={folder}/stages", "--figures"]
    code, out, err = program(*map(str, stages), *options)
    assert code == 0, err
    runs = json.loads((folder / "stages" / "analysis.json").read_text())["runs"]
    assert [r["run"]["step"] for r in runs.values()] == [1, 2] and list(runs) == ["ckpt_000001.pt", "ckpt_000002.pt"]
    assert (folder / "stages" / "dynamics.png").exists() and (folder / "stages" / "stream.png").exists()
    code, out, err = program(str(stages[0]), "--tokens=64", "--metrics=weights", "--figures=false")
    assert code == 0 and (folder / "out-pre" / "analysis.json").exists()


def test_the_current_folder_has_a_name(program, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder / "out-pre")
    options = "--metrics=removal", "--tokens=64", "--figures=false", f"--analysis_dir={tmp_path}"
    assert program(".", "../out-gpas_pre", *options)[0] == 0
    assert {"out-pre", "out-gpas_pre"} <= json.loads((tmp_path / "analysis.json").read_text())["runs"].keys()


def test_figures_without_matplotlib(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = program("out-pre", "--figures")
    assert (code, err) == (2, "error: figures need matplotlib: pip install matplotlib\n")
    code, out, err = program("out-pre", "--metrics=weights")
    assert code == 0 and "no figures" in out


def test_text_of_another_tokenizer(program, folder):
    other, unnamed = folder / "data" / "other", folder / "out-unnamed"
    prepare_in_another_tokenizer(other, folder / "text.txt")
    code, _, err = program("out-pre", f"--dataset={other}")
    assert code == 2 and err == f"error: {other} was made with tokenizer reversed, the run with byte\n"

    unnamed.mkdir()
    checkpoint = torch.load(folder / "out-pre" / "ckpt.pt", weights_only=True)
    torch.save(checkpoint | {"tokenizer": None}, unnamed / "ckpt.pt")
    with pytest.warns(UserWarning, match=f"names no tokenizer: whether {other} is of the same cannot be told"):
        assert program("out-unnamed", f"--dataset={other}", "--metrics=weights", "--figures=false")[0] == 0


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "which run?"),
        (["out-none"], "no checkpoint out-none/ckpt.pt"),
        (["out-pre", "out-pre"], "given twice"),
        (["out-pre", "--metrics=streem"], "unknown metrics 'streem'; known: removal, permutation"),
        (["out-pre", "--metrics=choices"], "--choices=FILE.jsonl"),
        (["out-pre", "--metrics=experts"], "out-pre has no experts"),
        (["out-pre", "--metrics=stream", "--choices=questions.jsonl"], "no effect"),
        (["out-pre", "--choices=none.jsonl"], "choices none.jsonl: No such file"),
        (["out-pre", "--choices=bad.jsonl"], "bad.jsonl:2 is not a question"),
        (["out-pre", "--choices=odd.jsonl"], "odd.jsonl:1 is not a question"),
        (["out-pre", "--choices=keys.jsonl"], "keys.jsonl:1 is not a question"),
        (["out-pre", "--layers=4"], "layers 1 to 3"),
        (["out-pre", "--layers=0"], "numbers from 1"),
        (["out-pre", "--tokens=0"], "tokens is 0"),
        (["out-pre", "--dataset=e"], "no data set 'e' with val shards"),
        (["out-pre", "--device=gpu"], "device 'gpu' cannot be used"),
        (["out-pre", "--block_size=100000"], "block_size 100000 is longer"),
        (["broken"], "checkpoint broken/ckpt.pt cannot be read"),
    ],
)
def test_mistakes(program, folder, args, message):
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "ckpt.pt").write_bytes((folder / "out-pre" / "ckpt.pt").read_bytes()[:3000])
    good = json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": "c"})
    (folder / "odd.jsonl").write_text(json.dumps({"prompt": "a", "choices": {"b": 1}, "answer": "b"}) + "\n")
    (folder / "keys.jsonl").write_text(json.dumps({"prompt": {"a": 1, "b": 2}, "choices": ["c", "d"], "answer": 0}) + "\n")
    (folder / "bad.jsonl").write_text(good + "\n" + good.replace('"answer": "c"', '"answer": 2') + "\n")
    code, _, err = program(*args)
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
