"""train.py as a program: a small run, what it leaves behind, and what a mistake is answered with."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import configurator
import prepare_data
import train
from model import GPT, GPTConfig

SMALL = "--n_layer=2 --n_embd=32 --n_head=2 --block_size=32 --batch_size=4 --gradient_accumulation_steps=2 --dataset=d".split()
SHORT = "--max_iters=8 --eval_interval=4 --eval_iters=4 --log_interval=2 --warmup_iters=2 --sample_tokens=20 --device=cpu".split()


def call(*args, cwd, program="train.py"):
    return subprocess.run([sys.executable, ROOT / program, *map(str, args)], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data set d and a short run out-gpas_pre."""
    folder = tmp_path_factory.mktemp("run")
    words = ["north", "south", "east", "west", "norm"]
    text = "".join(f"{words[i * i % 5]} {words[i % 3]}\n" for i in range(20_000))
    (folder / "text.txt").write_text(text)
    prepare_data.prepare(prepare_data.Settings(dataset="d", input=[str(folder / "text.txt")], data_dir=str(folder / "data")))
    done = call(*SMALL, *SHORT, "--norm=gpas_pre", "--dtype=bfloat16", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def unigram_loss(folder, dataset):
    """Cross-entropy in nats of the held-out tokens under the training tokens' frequencies, one added to each count."""
    import numpy as np

    def count(split):
        return sum(np.bincount(prepare_data.open_shard(p), minlength=257) for p in (folder / "data" / dataset).glob(f"{split}_*.bin"))

    p = (count("train") + 1) / (count("train") + 1).sum()
    return -(count("val") * np.log(p)).sum() / count("val").sum()


def test_log(folder):
    log = read_log(folder / "out-gpas_pre" / "log.jsonl")
    steps = [r["step"] for r in log if "loss" in r]
    assert steps == [2, 4, 6, 8]
    evaluations = [r for r in log if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 4, 8]
    for r in evaluations:
        assert len(r["variance"]) == len(r["gates"]) == len(r["grad_norms"]) == 2
        assert r["perplexity"] == pytest.approx(math.exp(r["val_loss"]))
        meta = prepare_data.read_meta(folder / "data" / "d")["splits"]["val"]
        assert r["bits_per_byte"] == pytest.approx(r["val_loss"] * meta["tokens"] / meta["bytes"] / math.log(2))
    assert evaluations[0]["gates"] == [0, 0] and all(evaluations[-1]["gates"])
    assert evaluations[0]["val_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert all({"lr", "grad_norm", "tokens_per_s", "gate_grad_norm"} <= r.keys() for r in log if "loss" in r)
    out = (folder / "stdout").read_text()
    assert "gradient norm" in out and "left" in out and "a sample:" in out and "bits per byte" in out


def test_checkpoint(folder):
    checkpoint = torch.load(folder / "out-gpas_pre" / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    assert checkpoint["step"] == 8 and checkpoint["tokenizer"] == {"name": "byte"}
    assert checkpoint["optimizer"]["state"] and checkpoint["settings"]["max_iters"] == 8
    assert not list((folder / "out-gpas_pre").glob("*.partial"))


def test_evaluation_and_sample_of_a_checkpoint(folder):
    log = read_log(folder / "out-gpas_pre" / "log.jsonl")
    done = call("--norm=gpas_pre", "--eval_only", "--dtype=bfloat16", "--device=cpu", cwd=folder)  # settings are the run's
    assert done.returncode == 0, done.stderr
    assert f"step 8: validation loss {log[-1]['val_loss']:.4f}" in done.stdout
    assert read_log(folder / "out-gpas_pre" / "log.jsonl") == log
    done = call("--out_dir=out-gpas_pre", "--sample=north ", "--sample_tokens=30", "--temperature=0", "--device=cpu", cwd=folder)
    assert done.returncode == 0 and done.stdout.startswith("north ") and len(done.stdout) > 30
    again = call("--out_dir=out-gpas_pre", "--sample=north ", "--sample_tokens=30", "--temperature=0", "--device=cpu", cwd=folder)
    assert again.stdout == done.stdout


def test_a_run_is_not_replaced_by_accident(folder):
    before = (folder / "out-gpas_pre" / "ckpt.pt").read_bytes()
    done = call(*SMALL, *SHORT, "--norm=gpas_pre", cwd=folder)
    assert done.returncode == 2 and "holds a run" in done.stderr
    assert (folder / "out-gpas_pre" / "ckpt.pt").read_bytes() == before


def test_resume_continues(folder):
    """Four steps and four more after a resume are the eight of an uninterrupted run, and so is the log."""
    args = [*SMALL, *SHORT, "--norm=gpas_mix", "--mix_ratio=0.5", "--dtype=float32"]
    assert call(*args, "--out_dir=whole", cwd=folder).returncode == 0
    assert call(*args, "--out_dir=parts", "--max_iters=4", "--lr_decay_iters=8", cwd=folder).returncode == 0
    with open(folder / "parts" / "log.jsonl", "a") as log:
        log.write('{"step": 4, "los')  # a line that a killed process left
    done = call("--out_dir=parts", "--init_from=resume", "--max_iters=8", "--dtype=float32", "--device=cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "max_iters: 4 before, 8 now" in done.stdout
    whole, parts = (torch.load(folder / d / "ckpt.pt", weights_only=True)["model"] for d in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = [[(r["step"], r.get("loss"), r.get("val_loss")) for r in read_log(folder / d / "log.jsonl")] for d in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_training_beats_a_unigram_model(folder):
    args = [*SMALL, *SHORT, "--norm=lns", "--max_iters=80", "--eval_interval=80", "--learning_rate=5e-3"]
    assert call(*args, cwd=folder).returncode == 0
    assert read_log(folder / "out-lns" / "log.jsonl")[-1]["val_loss"] < 0.7 * unigram_loss(folder, "d")


def test_frozen_gates_stay(folder):
    assert call(*SMALL, *SHORT, "--norm=gpas_post", "--freeze_gates", cwd=folder).returncode == 0
    assert read_log(folder / "out-gpas_post" / "log.jsonl")[-1]["gates"] == [0, 0]


def test_gates_of_another_run(folder):
    """Predefined gates (GPAS Table 5): the final ones of the first run, fixed."""
    args = [*SMALL, *SHORT, "--norm=gpas_sandwich", "--gates=out-gpas_pre"]
    assert call(*args, cwd=folder).returncode == 0
    final = read_log(folder / "out-gpas_pre" / "log.jsonl")[-1]["gates"]
    for r in read_log(folder / "out-gpas_sandwich" / "log.jsonl"):
        assert r.get("gates", final) == pytest.approx(final)


def test_divergence_keeps_the_last_good_checkpoint(folder):
    args = [*SMALL, *SHORT, "--norm=post", "--max_iters=4", "--dtype=float32"]
    assert call(*args, cwd=folder).returncode == 0
    before, log = ((folder / "out-post" / name).read_bytes() for name in ("ckpt.pt", "log.jsonl"))
    done = call("--norm=post", "--init_from=resume", "--max_iters=20", "--learning_rate=1e38", "--log_interval=100", cwd=folder)
    assert done.returncode == 2 and "validation loss is nan at step 8" in done.stderr
    assert (folder / "out-post" / "ckpt.pt").read_bytes() == before
    assert (folder / "out-post" / "log.jsonl").read_bytes() == log


def test_compiled_run_equals_the_eager_one(folder):
    args = [*SMALL, *SHORT, "--norm=gpas_peri", "--dtype=float32", "--max_iters=4"]
    assert call(*args, "--out_dir=eager", cwd=folder).returncode == 0
    done = call(*args, "--out_dir=compiled", "--compile", cwd=folder)
    assert done.returncode == 0, done.stderr
    eager, compiled = (read_log(folder / d / "log.jsonl")[-1] for d in ("eager", "compiled"))
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], abs=1e-4)
    assert set(torch.load(folder / "compiled" / "ckpt.pt")["model"]) == set(torch.load(folder / "eager" / "ckpt.pt")["model"])


def test_bare_shards_train(folder):
    """Shards without meta.json, as llm.c and modded-nanogpt write them, need only the vocabulary's size."""
    bare = folder / "elsewhere"
    bare.mkdir()
    for split in ("train", "val"):
        (bare / f"fineweb_{split}_000000.bin").write_bytes((folder / "data" / "d" / f"{split}_000000.bin").read_bytes())
    args = [*SMALL, *SHORT, "--max_iters=2", f"--dataset={bare}"]
    done = call(*args, cwd=folder)
    assert done.returncode == 2 and "--vocab_size=N" in done.stderr
    done = call(*args, "--vocab_size=300", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "bits_per_byte" not in read_log(folder / "out-pre" / "log.jsonl")[0]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--norm=rms"], "unknown norm 'rms'; known: post, pre, sandwich"),
        (["--n_embed=64"], "unknown setting --n_embed; did you mean n_embd"),
        (["--max_iters=many"], "--max_iters expects int, got 'many'"),
        (["--n_embd=30", "--n_head=4"], "n_embd 30 is not divisible by n_head 4"),
        (["--n_head=2", "--n_kv_head=3"], "n_head 2 is not divisible by n_kv_head 3"),
        (["--dataset=nowhere"], "no data set 'nowhere'"),
        (["--block_size=100000"], "block_size 100000 is longer than the"),
        (["--vocab_size=100"], "vocab_size 100 is smaller than the 257"),
        (["--dtype=float8"], "unknown dtype 'float8'"),
        (["--device=cuda:77"], "device 'cuda:77' cannot be used"),
        (["--init_from=gpt2"], "init_from is 'gpt2'; known: scratch, resume"),
        (["--init_from=resume", "--out_dir=nothing"], "no checkpoint nothing/ckpt.pt"),
        (["--eval_only", "--out_dir=damaged"], "checkpoint damaged/ckpt.pt cannot be read"),
        (["--sample=x", "--out_dir=code"], "checkpoint code/ckpt.pt cannot be read"),
        (["--dataset=truncated", "--vocab_size=257"], "truncated or damaged"),
        (["--dataset=other", "--vocab_size=257"], "is not a token shard"),
        (["--dataset=large", "--vocab_size=257"], "does not fit the vocabulary of 257"),
        (["--batch_size=0"], "batch_size is 0"),
        (["--out_dir=text.txt"], "text.txt"),
        (["--init_from=resume", "--out_dir=out-gpas_pre", "--n_layer=3"], "out-gpas_pre is a model of n_layer 2 (given 3)"),
        (["--eval_only", "--out_dir=out-gpas_pre", "--overwrite"], "does not go with"),
        (["--freeze_gates"], "freeze_gates=True has no effect: norm pre has no gates"),
        (["--norm=gpas_pre", "--gates=0.1,0.2,0.3"], "3 gate values for the 2 gates"),
        (["--norm=gpas_pre", "--gates=nowhere"], "no checkpoint nowhere/ckpt.pt"),
        (["--init_std=1e30"], "is nan at step 0"),
        (["--min_lr=-1"], "min_lr is -1.0"),
        (["--n_embd=200000000"], "cannot be built"),
    ],
    ids=str,
)
def test_mistakes_end_in_one_line_and_2(folder, monkeypatch, capsys, args, message):
    class Code:
        def __reduce__(self):
            return (print, ("code in a checkpoint ran",))

    for name in ("damaged", "code", "data/truncated", "data/other", "data/large"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "damaged" / "ckpt.pt").write_bytes((folder / "out-gpas_pre" / "ckpt.pt").read_bytes()[:5000])
    torch.save({"model": Code()}, folder / "code" / "ckpt.pt")
    shard = (folder / "data" / "d" / "train_000000.bin").read_bytes()
    for split in ("train", "val"):
        (folder / "data" / "truncated" / f"{split}_000000.bin").write_bytes(shard[:-100])
        (folder / "data" / "other" / f"{split}_000000.bin").write_bytes(b"PAR1" + shard[4:])
        (folder / "data" / "large" / f"{split}_000000.bin").write_bytes(shard[:1024] + b"\xff\x7f" * ((len(shard) - 1024) // 2))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *SHORT, "--out_dir=fresh", *args])
    with pytest.raises(SystemExit) as stop:
        configurator.run(train.main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert "code in a checkpoint ran" not in out


# -- its parts ----------------------------------------------------------------------------------------------------------


def test_learning_rate_by_hand():
    s = train.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=12, max_iters=20)
    assert [train.learning_rate(i, s) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert train.learning_rate(4, s) == 1.0
    assert train.learning_rate(8, s) == pytest.approx(0.55)
    assert train.learning_rate(12, s) == train.learning_rate(19, s) == pytest.approx(0.1)


def test_stream_report_by_hand():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=3, n_embd=16, n_head=2, norm="gpas_pre"))
    torch.nn.init.constant_(model.blocks[1].gate, 0.3)
    x = torch.randint(0, 11, (2, 8))
    report = train.stream_report(model, x, x, train.nullcontext)
    h, expected = model.embed_tokens(x), []
    for block in model.blocks:
        h = block(h)
        expected.append(((h - h.mean(-1, keepdim=True)) ** 2).mean().item())
    assert report["variance"] == pytest.approx(expected, rel=1e-5)
    assert report["gates"] == pytest.approx([0, 0.3, 0])
    assert all(p.grad is None for p in model.parameters())
    model(x, x)[1].backward()
    norm = sum((p.grad**2).sum() for p in model.blocks[2].parameters()).sqrt().item()
    assert report["grad_norms"][2] == pytest.approx(norm, rel=1e-5)


def test_a_failing_save_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    train.save_checkpoint(path, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(train.UserError, match="No space left on device; what was saved before is untouched"):
        train.save_checkpoint(path, {"step": 2})
    assert torch.load(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_clock():
    assert [train.clock(s) for s in (5, 119, 754, 7200)] == ["5s", "119s", "12m34s", "2h00m"]
