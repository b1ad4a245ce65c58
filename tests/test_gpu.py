"""tests/gpu.py at its tiny size on the CPU: every part runs, and what goes wrong is reported."""

import json
import sys

import configurator
import gpu
import pytest
import test_train
import torch

START = gpu.subprocess.run


def run(command, **options):
    """subprocess.run, but train.py in this process where that will do: a start of it takes some seconds."""
    if str(gpu.ROOT / "train.py") == command[1]:
        return test_train.call(*command[2:], cwd=options["cwd"])
    return START(command, **options)


def call(monkeypatch, folder, *args):
    """(exit code, the JSON's object) of `python tests/gpu.py --device=cpu *args`, in this process."""
    out, code = folder / "gpu.json", 0
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device=cpu", f"--out={out}", *args])
    try:
        gpu.main()
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(out.read_text())


def test_every_part_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.subprocess, "run", run)
    code, report = call(monkeypatch, tmp_path, "--minutes=60")  # however busy the machine is
    assert report["parts"].keys() == gpu.PARTS.keys()
    assert report["repeats"] == 2 and report["torch"] == torch.__version__
    for name, part in report["parts"].items():
        assert part["error"] is None and part["rows"], (name, part["error"])
        measured = {value for row in part["rows"] for value in row["values"]}
        if measured:  # none where transformers is not installed
            assert measured >= gpu.BOUNDS.get(name, {}).keys()
        assert all(row["broken"] == [] for row in part["rows"]), name
    assert code == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + sum(len(part["rows"]) for part in report["parts"].values())
    assert {line.count("|") for line in table} == {6}


def test_broken_bounds_and_failures_are_reported_and_stop_nothing(monkeypatch, tmp_path, capsys):
    def fails(c):
        yield "a row before it", {"loss": float("nan"), "speed": 1.0}
        raise RuntimeError("no such | kernel\nmore")

    monkeypatch.setitem(gpu.PARTS, "llama", fails)
    monkeypatch.setitem(gpu.BOUNDS, "llama", {"loss": 1.0})
    monkeypatch.setitem(gpu.BOUNDS, "processes", {"loss": -1.0, "gradient": 1e-4})
    code, report = call(monkeypatch, tmp_path, "--only=llama,processes")
    assert code == 1
    llama, processes = report["parts"]["llama"], report["parts"]["processes"]
    assert llama["error"] == "RuntimeError: no such | kernel" and [row["broken"] for row in llama["rows"]] == [["loss"]]
    assert processes["error"] is None and [row["broken"] for row in processes["rows"]] == [["loss"], ["loss"]]
    out = capsys.readouterr().out
    assert "| llama | failed | RuntimeError: no such / kernel | | **failed** |" in out
    assert out.count("**broken**") == 3 and "3 bounds broken, 1 parts failed: llama" in out

    # each alone is enough for the exit code
    assert call(monkeypatch, tmp_path, "--only=processes")[0] == 1
    monkeypatch.setitem(gpu.BOUNDS, "llama", {})
    assert call(monkeypatch, tmp_path, "--only=llama")[0] == 1


def test_stops_when_its_time_is_over(monkeypatch, tmp_path):
    code, report = call(monkeypatch, tmp_path, "--only=analysis", "--minutes=0")
    assert code == 1 and "stopped after 0 minutes" in report["parts"]["analysis"]["error"]
    assert len(report["parts"]["analysis"]["rows"]) == 1


def test_without_cuda_it_says_so_and_ends(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    assert len(capsys.readouterr().out.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_an_unknown_part_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only=speed"])
    with pytest.raises(configurator.UserError, match="only has 'speed'; known: all, experts"):
        gpu.main()


def test_distance_sees_what_differs():
    a, nan = torch.tensor([3.0, 4.0]), float("nan")
    assert gpu.distance(a, a) == 0 and gpu.distance(a + torch.tensor([0.0, 0.5]), a) == pytest.approx(0.1)
    assert gpu.distance([nan, 2.0], [nan, 2.0]) == 0
    assert not gpu.distance([nan, 2.0], [1.0, 2.0]) <= 1e9
