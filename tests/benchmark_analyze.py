"""Speed of analyze.py: `python tests/benchmark_analyze.py` (some minutes on two cores; --help for the sizes).

    importance   removal, causal scores, permutation and usefulness, over the time of the straightforward way: a full
                 forward pass for each layer removed, each skipped, each swapped pair and each one replaced, and one to
                 collect what the affine maps are fitted to. The floor at 12 layers is 0.58 by the blocks that must run
    total        all measures of one model, the parts in seconds
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import analyze
from configurator import configure, run
from model import GPT, GPTConfig

PARTS = "importance", "total"


@dataclass
class Settings:
    only: str = ",".join(PARTS)  # parts to run, with commas between
    norm: str = "gpas_pre"  # scheme of the model, at the default size
    n_layer: int = 12  # of the model
    tokens: int = 16384  # of all measures but the Jacobians
    jacobian_tokens: int = 1024  # of the Jacobians
    pairs: int = 5  # pairs of runs behind the ratio
    pair_tokens: int = 2048  # of each of these runs
    batch_size: int = 8  # sequences at once

    def __post_init__(self):
        if not set(self.only.split(",")) <= set(PARTS):
            raise ValueError(f"only is {self.only!r}; known parts: {', '.join(PARTS)}")


@torch.no_grad()
def straightforward(model, batches):
    """The same four measures, each by whole forward passes."""
    blocks, L = list(model.blocks), len(model.blocks)

    def loss_and_states(order):
        total, states = 0.0, []
        for idx, targets in batches:
            x = model.embed_norm(model.embed_tokens(idx))
            for block in order:
                y = block(x)
                states.append((x, y))
                x = y
            total += F.cross_entropy(model.lm_head(model.norm(x)).flatten(0, 1), targets.flatten()).item()
        return total / len(batches), states

    def loss(order):
        return loss_and_states(order)[0]

    base, states = loss_and_states(blocks)
    maps = []
    for l in range(L):
        x, y = (torch.cat([s[i].flatten(0, 1) for s in states[l::L]]).double() for i in (0, 1))
        x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
        maps.append(torch.linalg.lstsq(x, y).solution.float())
    removed = [loss(blocks[:l] + blocks[l + 1 :]) for l in range(L)]
    for s in range(L):
        skipped = loss_and_states([(lambda x: x) if l == s else b for l, b in enumerate(blocks)])[1]
        for l in range(s + 1, L):
            for (x, y), (x2, y2) in zip(states[l::L], skipped[l::L]):
                ((y - x) - (y2 - x2)).norm(dim=-1).mean() / (y - x).norm(dim=-1).mean()
    swapped = []
    for i in range(L):
        for j in range(i + 1, L):
            order = list(blocks)
            order[i], order[j] = order[j], order[i]
            swapped.append(abs(loss(order) - base) / base)

    def affine(m):
        return lambda x: F.linear(x, m[:-1].T, m[-1])

    replaced = [loss([affine(maps[l]) if i == l else b for i, b in enumerate(blocks)]) / base for l in range(L)]
    return removed, swapped, replaced


def ours(model, batches):
    maps = analyze.affine_maps(model, batches)
    measures = [analyze.Removal(model), analyze.Permutation(model), analyze.Usefulness(model, maps)]
    return analyze.one_pass(model, batches, dict(enumerate(measures)))


def seconds(f, *args, clock=time.perf_counter):
    start = clock()
    f(*args)
    return clock() - start


def report(settings):
    torch.manual_seed(0)
    model = GPT(GPTConfig(norm=settings.norm, n_layer=settings.n_layer)).eval()

    def batches(tokens, batch_size):
        T = model.config.block_size
        rows = torch.randint(0, model.config.vocab_size, (tokens // T, T + 1))
        return list(zip(rows[:, :-1].split(batch_size), rows[:, 1:].split(batch_size)))

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {settings.norm}, {settings.n_layer} layers")
    if "importance" in settings.only.split(","):
        text, ratios = batches(settings.pair_tokens, settings.batch_size), []
        for i in range(settings.pairs):
            both = (ours, straightforward) if i % 2 else (straightforward, ours)
            took = {f: seconds(f, model, text, clock=time.process_time) for f in both}  # fair on a shared machine
            ratios.append(took[ours] / took[straightforward])
            print(f"  {took[ours]:.1f} CPU s over {took[straightforward]:.1f} s: {ratios[-1]:.3f}", flush=True)
        print(f"removal, causal, permutation, usefulness over the straightforward way: {statistics.median(ratios):.3f}")
    if "total" in settings.only.split(","):
        text = batches(settings.tokens, settings.batch_size)
        measures = [analyze.Stream(model), analyze.AngularDistance(model), analyze.Attention(model)]
        parts = {
            "stream, angular distance, attention": lambda: analyze.one_pass(model, text, dict(enumerate(measures))),
            "removal, causal, permutation, usefulness": lambda: ours(model, text),
            "gradients": lambda: analyze.gradients(model, text),
            "weights": lambda: analyze.weights(model),
            "jacobian": lambda: analyze.jacobian(model, batches(settings.jacobian_tokens, 1)),
        }
        times = {name: seconds(part) for name, part in parts.items()}
        for name, taken in times.items():
            print(f"  {name}: {taken:.1f} s")
        sizes = f"{settings.tokens:,} tokens ({settings.jacobian_tokens:,} for the Jacobians)"
        print(f"all measures over {sizes}: {sum(times.values()):.1f} s")


if __name__ == "__main__":
    run(lambda: report(configure(Settings, "Times analyze.py.")))
