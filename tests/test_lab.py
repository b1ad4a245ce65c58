"""analyze.py on a folder of runs: means over seeds, differences to a baseline, figures. The runs are made up, not trained."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT  # noqa: F401

import analyze
import configurator
from model import GPT, GPTConfig


def make_run(folder, loss, step=4, diverged=False, variance=(1.0, 2.0), gates=None, max_iters=4, **given):
    """A run's folder with a checkpoint and a log, as train.py writes them."""
    config = GPTConfig(n_layer=2, n_embd=8, n_head=2, vocab_size=17, block_size=8, norm=given["norm"])
    name = ",".join(f"{key}={value}" for key, value in given.items())
    (folder / name).mkdir(parents=True)
    settings = {**asdict(config), "dataset": "d", "data_dir": "data", "out_dir": name, "max_iters": max_iters, **given}
    state = {"model": GPT(config).state_dict(), "optimizer": {}, "config": asdict(config), "settings": settings}
    torch.save({**state, "step": step, "val_loss": loss, "tokenizer": None}, folder / name / "ckpt.pt")
    log = [{"step": s, "val_loss": loss, "variance": [v * (s + 1) for v in variance]} for s in (0, step)]
    log += [{"step": s, "loss": loss + 1 / s} for s in (2, 4)]
    if gates:
        log[0]["gates"], log[1]["gates"] = [0.0, 0.0], list(gates)
    if diverged:
        log.append({"step": 3, "diverged": "loss is nan"})
    (folder / name / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two schemes, two learning rates, up to three seeds; lns is better at 0.01, pre at 0.001."""
    folder = tmp_path_factory.mktemp("sweep")
    losses = {("pre", 0.001): (2.0, 2.2, 2.4), ("pre", 0.01): (3.0, 3.1, 3.2), ("gpas_lns", 0.001): (2.5, 2.6), ("gpas_lns", 0.01): (1.9, 2.0, 2.3)}
    for (norm, rate), values in losses.items():
        for seed, loss in enumerate(values, 1):
            gates = (0.5, -0.5) if norm.startswith("gpas") else None
            make_run(folder, loss, norm=norm, learning_rate=rate, seed=seed, gates=gates, variance=(1.0, float(seed)))
    make_run(folder, 9.0, norm="gpas_lns", learning_rate=0.001, seed=3, diverged=True)
    make_run(folder, 9.0, norm="pre", learning_rate=0.1, seed=1, step=2)
    return folder


@pytest.fixture(scope="module")
def runs(sweep):
    return analyze.read_sweep(sweep)


def program(monkeypatch, capsys, *args):
    """(exit code, standard output, standard error) of analyze.py."""
    monkeypatch.setattr("sys.argv", ["analyze.py", *map(str, args)])
    try:
        configurator.run(analyze.main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_settings_that_differ(runs):
    """The scheme, the rate and the seed, in this order; not what the scheme's row or the folder decides."""
    assert [list(run["settings"]) for run in runs] == [["norm", "learning_rate", "seed"]] * len(runs)
    assert analyze.differing([{"n_embd": 8, "n_hidden": 24, "seed": 1}, {"n_embd": 16, "n_hidden": 48, "seed": 1}]) == ["n_embd"]
    assert analyze.differing([{"norm": "a", "rows": "x"}, {"norm": "b"}]) == ["norm"]  # an earlier run had no such setting
    assert analyze.differing([{"norm": "pre", "freeze_gates": f, "seed": 1} for f in (True, False)]) == ["freeze_gates"]
    tuned = [{"norm": "pre", "freeze_gates": False}, {"norm": "gpas_pre", "freeze_gates": True}]
    assert analyze.differing(tuned) == ["norm"]
    for ignored in ("top_k", "compile", "shard", "recompute"):  # how a run is watched and computed
        assert analyze.differing([{"norm": "pre", ignored: value, "seed": 1} for value in (0, 1)]) == []
    assert analyze.differing([{"n_kv_head": 1, "seed": 1}, {"n_kv_head": 2, "seed": 2}]) == ["n_kv_head", "seed"]


def test_what_decides_a_setting_and_what_only_differs_with_it():
    """Two settings may decide a third together; one that another only happens to differ with is a difference."""
    widths = [{"n_embd": d, "n_head": h, "head_dim": d // h} for d in (16, 32) for h in (2, 4)]
    assert analyze.differing(widths) == ["n_embd", "n_head"]
    steps = [{"block_size": b, "max_tokens": n, "max_iters": n // b} for b in (64, 128) for n in (1280, 2560)]
    assert analyze.differing(steps) == ["block_size", "max_tokens"]
    assert analyze.differing([{"norm": "pre", "max_iters": 60}, {"norm": "lns", "max_iters": 8}]) == ["norm", "max_iters"]


def test_a_run_that_lacks_settings_hides_no_difference():
    """An imported run has no learning rate and no seed; those of the others still tell them apart."""
    trained = [{"norm": "pre", "learning_rate": r, "seed": s} for r in (1, 2) for s in (1, 2)]
    assert analyze.differing([*trained, {"norm": "lns"}]) == ["norm", "learning_rate", "seed"]


def test_a_run_that_was_saved_before_a_setting_existed(tmp_path):
    """It had what is now the setting's default, which tells it apart from the others."""
    make_run(tmp_path, 2.0, norm="lns", seed=1)
    make_run(tmp_path, 2.1, norm="lns", seed=2, s_position="branch")
    path = tmp_path / "norm=lns,seed=1" / "ckpt.pt"
    state = torch.load(path, weights_only=True)
    for of_run in (state["config"], state["settings"]):
        del of_run["s_position"]
    torch.save(state, path)
    runs = analyze.read_sweep(tmp_path)
    assert [entry["settings"]["s_position"] for entry in runs] == ["norm", "branch"]


def test_two_runs_of_the_same_settings_are_told(tmp_path):
    make_run(tmp_path / "a", 2.0, norm="pre", seed=1)
    make_run(tmp_path / "a", 2.1, norm="lns", seed=1)
    make_run(tmp_path / "b", 2.0, seed=1, norm="pre")
    (tmp_path / "b" / "seed=1,norm=pre").rename(tmp_path / "a" / "seed=1,norm=pre")
    with pytest.warns(match="norm=pre,seed=1 and seed=1,norm=pre do not differ in any setting that is compared: both are counted"):
        analyze.read_sweep(tmp_path / "a")


def test_a_rate_at_which_runs_diverge_is_not_the_best():
    def entry(rate, seed, loss, state="finished"):
        return {"settings": {"norm": "pre", "learning_rate": rate, "seed": seed}, "state": state, "loss": loss}

    stable, wild = [entry(1e-3, 1, 3.2), entry(1e-3, 2, 3.3)], [entry(1e-2, 1, 3.1), entry(1e-2, 2, 9.0, "diverged")]
    assert list(analyze.best_groups(stable + wild).values()) == [stable]
    assert list(analyze.best_groups(stable + wild[:1]).values()) == [wild[:1]]


def test_the_order_of_values_and_of_steps():
    """Whole numbers and fractions in one order, none last; a curve's steps in order, also one that a seed lacks."""
    runs = [{"settings": {"weight_decay": value, "seed": 1}} for value in (None, 0.1, 1, 0, 0.01)]
    assert [dict(key)["weight_decay"] for key in analyze.by_group(runs)] == [0, 0.01, 0.1, 1, None]
    assert analyze.is_value("none", None) and not analyze.is_value("None", 0.1)
    x, mean, deviation = analyze.mean_line({10: [1.0, 2.0], 30: [3.0], 20: [2.0]})
    assert x == [10, 20, 30] and mean.tolist() == [1.5, 2.0, 3.0]
    assert deviation.tolist() == pytest.approx([0.5**0.5, 0, 0])  # of a sample of two: the root of (0.25 + 0.25) / 1


def test_means_and_states(runs):
    states = [run["state"] for run in runs]
    assert (states.count("finished"), states.count("diverged"), states.count("unfinished")) == (11, 1, 1)
    groups = analyze.by_group(runs)
    pre = groups[("norm", "pre"), ("learning_rate", 0.001)]
    assert analyze.plus_minus(analyze.finished_losses(pre)) == "2.2 ± 0.2 (3)"
    lns = groups[("norm", "gpas_lns"), ("learning_rate", 0.001)]
    assert analyze.finished_losses(lns) == [2.5, 2.6]  # the diverged one is not averaged
    assert pre[0]["totals"] == {"last variance": 5.0}
    assert lns[0]["columns"]["1 - act(a)"].tolist() == pytest.approx([1 - 0.5 / (1 + math.exp(-0.5)), 1 + 0.5 / (1 + math.exp(0.5))])


def test_each_at_its_best_learning_rate(runs):
    best = analyze.best_groups(runs)
    assert set(best) == {(("norm", "pre"), ("learning_rate", 0.001)), (("norm", "gpas_lns"), ("learning_rate", 0.01))}


def test_paired_differences(runs):
    """Seeds 1 and 2 have both schemes at 0.001, seed 3 diverged: 0.5 and 0.4, a mean of 0.45, an error of 0.05."""
    group = analyze.by_group(runs)[("norm", "gpas_lns"), ("learning_rate", 0.001)]
    differences = analyze.paired_differences(group, runs, "norm", "pre")
    assert differences == pytest.approx([0.5, 0.4])
    assert analyze.plus_minus(differences, standard_error=True) == "0.45 ± 0.05 (2)"
    assert analyze.paired_differences([{**group[0], "loss": None}], runs, "norm", "pre") == []  # of an early version


def test_program(sweep, runs, monkeypatch, capsys):
    code, out, err = program(monkeypatch, capsys, sweep, "--baseline=pre", "--figures=false")
    assert code == 0 and err == ""
    assert "| pre | 0.001 | 2.2 ± 0.2 (3) | 0 ± 0 (3) | 0 | 0 | 10 ± 5 (3) |" in out
    assert "| gpas_lns | 0.001 | 2.55 ± 0.071 (2) | 0.45 ± 0.05 (2) | 1 | 0 |" in out
    at_best = out.partition("best learning rate")[2]  # 1.9, 2.0, 2.3 at 0.01 minus 2.0, 2.2, 2.4 at 0.001
    assert "| gpas_lns | 0.01 | 2.0667 ± 0.21 (3) | -0.133 ± 0.033 (3) |" in at_best
    assert "| gpas_lns | 0.01 | 2.0667 ± 0.21 (3) | -1.03 ± 0.067 (3) |" in out.partition("best learning rate")[0]
    assert "| pre | 0.1 | - | - | 0 | 1 |" in out
    assert (sweep / "sweep.md").read_text() in out
    written = json.loads((sweep / "sweep.json").read_text())
    assert [run["settings"] for run in written] == [run["settings"] for run in runs]
    first = next(run for run in written if run["settings"] == {"norm": "pre", "learning_rate": 0.001, "seed": 2})
    assert first["loss"] == 2.2 and first["columns"]["variance"] == [5.0, 10.0]
    assert first["curves"]["training loss, nats"] == [[2, 2.7], [4, 2.45]]


def test_figures(sweep, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    code, out, _ = program(monkeypatch, capsys, sweep)
    assert code == 0
    for name in ("loss_by_learning_rate", "layers", "training"):
        assert f"wrote {sweep}/{name}.svg" in out
        text = (sweep / f"{name}.svg").read_text()
        assert text.lstrip().startswith("<?xml") and len(text) < 150_000


@pytest.mark.parametrize("n, name", [(3, "pre"), (40, "gpas_scaled_init"), (6, "norm, weight_decay=0.1, batch_size=8")])
@pytest.mark.parametrize("n_columns", [1, 2, 3])
def test_a_legend_lies_within_its_figure(tmp_path, monkeypatch, n, name, n_columns):
    pytest.importorskip("matplotlib")
    figures, lines = [], {f"{name} {i}": (range(3), range(3)) for i in range(n)}
    monkeypatch.setattr(analyze, "save", lambda fig, *_: figures.append(fig))
    analyze.draw_lines(tmp_path / "lines.svg", "title", "layer", {"variance": lines, "gates": lines}, (), n_columns)
    analyze.draw_lines(tmp_path / "lines.svg", "title", "layer", {"variance": lines}, (), n_columns)
    for fig in figures:
        fig.draw_without_rendering()
        box = fig.legends[0].get_window_extent()
        assert 0 <= box.x0 and box.x1 <= fig.bbox.x1 and box.y0 >= 0
        assert fig.axes[0].get_window_extent().height > fig.dpi  # an inch


def test_only_names_hold_no_formulas(tmp_path, monkeypatch):
    """A folder's name may hold $; the numbers of a logarithmic axis are formulas."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda fig, *_, **__: figures.append(fig))
    x = torch.arange(1, 5)
    lines = {"a$b": (x, 10.0**x), "_c$^d": (x, 10.0**x)}
    analyze.draw_lines(tmp_path / "lines.svg", "x$^y$", "layer", {"a$^b$: variance": lines})
    analyze.draw_maps(tmp_path / "maps.svg", "x$^y", {"c$^d": torch.eye(3)}, "layer", "layer")
    for fig in figures:
        fig.draw_without_rendering()
        names = [fig._suptitle, *(text for box in fig.legends for text in box.get_texts())]
        names += [text for axis in fig.axes for text in (axis.title, axis.yaxis.label)]
        assert not any(text.get_parse_math() for text in names if "$" in text.get_text())
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(lines)
    ticks = figures[0].axes[0].get_yticklabels()
    assert any("$" in tick.get_text() for tick in ticks) and all(tick.get_parse_math() for tick in ticks)


def test_a_number_in_a_log_that_no_float_holds():
    with pytest.raises(configurator.UserError, match="out-a: loss in its log is not all numbers"):
        analyze.logged([{"step": 1, "loss": 10**400}], "loss", "out-a")


def test_what_is_not_finite_is_null_in_json():
    assert analyze.plain({"curve": [(0, math.inf), (1, torch.tensor([math.nan, 1.0]))]}) == {"curve": [[0, None], [1, [None, 1.0]]]}


def test_a_baseline_is_a_number_however_it_is_written():
    assert analyze.is_value("1e-3", 0.001) and analyze.is_value("4", 4) and analyze.is_value("pre", "pre")
    assert not analyze.is_value("pre", 0.001) and not analyze.is_value("1e-3", "pre")


def test_a_run_that_logged_no_training_loss(tmp_path, monkeypatch, capsys, recwarn):
    """Shorter than log_interval: it has no curve of the loss, and the others are drawn without a warning."""
    pytest.importorskip("matplotlib")
    for norm in ("pre", "lns"):
        for seed in (1, 2):
            make_run(tmp_path, 2.0 + seed, norm=norm, seed=seed)
            log = tmp_path / f"norm={norm},seed={seed}" / "log.jsonl"
            lines = [line for line in log.read_text().splitlines() if '"loss"' not in line]
            log.write_text("\n".join(lines) + "\n")
    code, out, err = program(monkeypatch, capsys, tmp_path)
    assert code == 0 and err == "" and "training.svg" in out
    assert not [w for w in recwarn if "degrees of freedom" in str(w.message)]


def test_seeds_of_one_scheme(tmp_path, monkeypatch, capsys):
    for seed, loss in ((1, 2.0), (2, 2.1)):
        make_run(tmp_path / "seeds", loss, norm="lns", seed=seed)
    code, out, _ = program(monkeypatch, capsys, tmp_path / "seeds")
    assert code == 0 and "| lns | 2.05 ± 0.071 (2) | 0 ± 0 (2) |" in out


def test_layers_are_averaged_over_finished_runs(monkeypatch, tmp_path):
    make_run(tmp_path / "s", 2.0, norm="pre", learning_rate=0.1, seed=1, variance=(1.0, 3.0))
    make_run(tmp_path / "s", 9.0, norm="pre", learning_rate=0.1, seed=2, variance=(100.0, 300.0), diverged=True)
    runs, drawn = analyze.read_sweep(tmp_path / "s"), {}
    monkeypatch.setattr(analyze, "draw_lines", lambda path, title, x, panels, *_, **__: drawn.update({path.name: panels}))
    analyze.draw_groups(runs, tmp_path)
    _, mean, deviation = drawn["layers.svg"]["variance"]["pre"]
    assert mean.tolist() == [5.0, 15.0] and deviation.tolist() == [0.0, 0.0]  # 1 and 3, times 4 + 1 at step 4
    assert analyze.line_name((("norm", "pre"), ("n_layer", 6))) == "pre, n_layer=6" and analyze.line_name(()) == "all"


def test_tables_of_what_is_measured(runs):
    """A title with | in it is one cell, and what is not finite is in no mean."""
    runs = [run | {"totals": {"|J - I|": math.inf if run["settings"]["seed"] == 1 else 2.0}} for run in runs]
    rows = [line for line in analyze.sweep_tables(runs, "pre").splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}
    assert "| pre | 0.001 | 2.2 ± 0.2 (3) | 0 ± 0 (3) | 0 | 0 | 2 ± 0 (2) |" in rows


def test_imported_runs(tmp_path, monkeypatch, capsys):
    """Their checkpoints hold two settings only."""
    for name in ("one", "two"):
        make_run(tmp_path / "s", 2.0, norm="pre", seed=name)
        path = tmp_path / "s" / f"norm=pre,seed={name}" / "ckpt.pt"
        state = torch.load(path, weights_only=True)
        torch.save({**state, "settings": {"dataset": "data", "data_dir": "there"}}, path)
    code, out, err = program(monkeypatch, capsys, tmp_path / "s", "--figures=false")
    assert code == 0 and "| pre | 2 ± 0 (2) |" in out, err


def test_mistakes(sweep, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for args, message in (
        ([sweep, "--baseline=post"], "baseline is 'post'; norm is one of gpas_lns, pre"),
        ([sweep, "--baseline=post", "--metrics=stream"], "baseline is 'post'"),  # before the long part
        ([sweep / "norm=pre,learning_rate=0.1,seed=1", sweep], "is a sweep: name it alone"),
        ([sweep, sweep / "norm=pre,learning_rate=0.1,seed=1"], "is a sweep: name it alone"),
        ([tmp_path / "empty"], "no checkpoint"),
        ([sweep, "--analysis_dir=x"], "analysis_dir=x has no effect: the tables of a sweep go into its folder"),
        ([sweep, "--choices=x"], "choices=x has no effect on a sweep without --metrics=choices"),
    ):
        code, _, err = program(monkeypatch, capsys, *args)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err
    (tmp_path / "young" / "norm=pre").mkdir(parents=True)
    (tmp_path / "young" / "norm=pre" / "train.log").touch()
    code, _, err = program(monkeypatch, capsys, tmp_path / "young")
    assert code == 2 and err == f"error: no run in {tmp_path}/young has saved a checkpoint yet\n"
