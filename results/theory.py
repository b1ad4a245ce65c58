"""Growth with depth at initialization, for results/README.md: `python results/theory.py` (about five minutes on one core).

For models of L = 4 ... 64 layers x 128 at their initial weights, matrices of variance 1/128, three seeds:

    variance    of the last residual state, over the hidden dimensions, mean over tokens (Sparsity Eq. 4)
    end_to_end  |dx_{L+1} / dx_1|_2, from L = 4 to 32 (LNS Theorems 3.3, 4.2; GPAS Theorem 1; Sparsity Lemma 1)

writes theory.json with every number, theory.svg where matplotlib is installed, and prints each mean.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import analyze
from model import GPT, GPTConfig

NORMS, DEPTHS, SEEDS = ("pre", "lns", "peri", "sandwich", "post", "deepnorm"), (4, 8, 16, 32, 64), (1, 2, 3)


def measure(norm, L, seed):
    """{"variance", "end_to_end"} of a model at its initial weights; end_to_end only up to 32 layers."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(n_layer=L, n_embd=128, n_head=4, block_size=32, norm=norm, init_std=128**-0.5))
    batches = [(idx := torch.randint(0, 257, (4, 32)), idx)]
    numbers = {"variance": analyze.stream(model, batches)["variance"][-1].item()}
    if L <= 32:
        numbers["end_to_end"] = analyze.end_to_end(model, [(idx[:2], None)], n_iter=15)
    return numbers


def draw(means):
    fig, axes = analyze.grid(2, 2, width=4.5, height=3.5)
    styles = analyze.line_styles(NORMS)
    labels = {"variance": "variance of the last state", "end_to_end": "|dx_{L+1} / dx_1|"}
    for axis, (name, label) in zip(axes, labels.items()):
        for norm in NORMS:
            points = [(L, means[norm, L, name]) for L in DEPTHS if (norm, L, name) in means]
            axis.plot(*zip(*points), label=norm, **styles[norm])
        axis.set_xscale("log", base=2), axis.set_yscale("log")
        analyze.label(axis, "layers L", label)
    analyze.legend(fig, axes)
    analyze.save(fig, FOLDER / "theory.svg", "Growth with depth at initialization, mean over three seeds")


def main():
    torch.set_num_threads(1)
    runs, means = [], {}
    for norm in NORMS:
        for L in DEPTHS:
            found = [measure(norm, L, seed) for seed in SEEDS]
            runs += [{"norm": norm, "n_layer": L, "seed": seed, **f} for seed, f in zip(SEEDS, found)]
            for name in found[0]:
                values = [f[name] for f in found]
                means[norm, L, name] = statistics.fmean(values)
                print(f"{norm:9} L={L:2d} {name:10} {means[norm, L, name]:10.4g} ± {statistics.stdev(values):.2g}", flush=True)
    (FOLDER / "theory.json").write_text(json.dumps(runs, indent=0) + "\n")
    try:
        draw(means)
    except ImportError:
        print("no figure: it needs matplotlib (pip install matplotlib)")


if __name__ == "__main__":
    main()
