"""interchange.py's benchmarks: scores and generations against straight-line computations; lm-evaluation-harness with our
model against analyze.py, and against its own `hf` model of the exported run."""

import functools
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from test_interchange import BYTE, TEXT, byte_pairs, trained
from test_model import small

import analyze
import interchange
import prepare_data
from configurator import UserError
from interchange import generate_text, score_continuations
from model import GPT

NORMS = ["post", "gpas_deepnorm", "mix", "hybrid", "pre"]


def run_folder(norm, folder, tokenizer=BYTE, steps=8):
    """A run, trained for a few steps, as a folder; the model."""
    vocab_size = prepare_data.build_encoding(tokenizer).n_vocab if tokenizer else 257
    model = trained(small(norm, vocab_size=vocab_size, block_size=48), steps).eval()
    folder.mkdir()
    interchange.save_run(model, folder, tokenizer)
    return model


def straight_line(model, context, continuation):
    """(log-likelihood, greedy) of one continuation: one sequence, no batch, one token after the other."""
    ids = (context + continuation)[-(model.config.block_size + 1) :]
    log_p = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0][0], dim=-1)
    first = len(ids) - len(continuation)
    steps = [log_p[first - 1 + t, token].item() for t, token in enumerate(continuation)]
    greedy = [log_p[first - 1 + t].argmax().item() == token for t, token in enumerate(continuation)]
    return sum(steps), all(greedy)


# -- without lm_eval ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_scores_equal_a_straight_line_computation(norm):
    model = trained(small(norm, vocab_size=257, block_size=24)).eval()
    chance = random.Random(1)
    pairs = []
    for n_context, n in [(5, 3), (1, 1), (24, 1), (23, 2), (30, 24), (3, 22), (7, 4), (60, 5), (2, 0)]:
        ids = [chance.randrange(256) for _ in range(n_context + n)]
        pairs.append((ids[:n_context], ids[n_context:]))
    context = list(TEXT.encode()[:10])
    pairs.append((context, model.generate(torch.tensor([context]), 4, temperature=0)[0, 10:].tolist()))
    for batch_size in (1, 4, 100):
        scores = score_continuations(model, pairs, batch_size)
        for (log_p, is_greedy), pair in zip(scores, pairs, strict=True):
            expected, expected_greedy = straight_line(model, *pair)
            assert log_p == pytest.approx(expected, abs=2e-5) and is_greedy is expected_greedy
        assert scores[-1][1] and not scores[0][1]
    assert score_continuations(model, []) == []
    with pytest.raises(UserError, match="a continuation has 25 tokens, more than the block size 24"):
        score_continuations(model, [([1], [2] * 25)])


class Scripted(GPT):
    """A model that says the tokens of `script` after the first `start`, whatever it is given; it notes its inputs."""

    def generate(self, idx, n, temperature=1.0, top_k=None):
        self.calls.append((idx.shape[1], n, temperature, top_k))
        said = self.calls[0][0]
        more = self.script[idx.shape[1] - said :][:n]
        assert len(more) == n
        return torch.cat([idx, torch.tensor([more])], dim=1)


@pytest.mark.parametrize(
    ("script", "max_tokens", "stops", "expected", "pieces"),
    [
        ("one two three four five six", 20, [], "one two three four f", [16, 4]),
        ("one two three four five six", 20, ["five", " two"], "one", [16]),
        ("one two three.\nfour five six", 24, ["\n\n", "", "ee.\nfo"], "one two thr", [16, 8]),  # across two pieces
        ("one two\0three four five six", 24, ["three"], "one two", [16]),  # the end of the document
        ("\0ne", 3, [], "", [3]),
    ],
)
def test_generation_ends_where_it_should(script, max_tokens, stops, expected, pieces):
    model, encoding = Scripted(small("post", vocab_size=257, block_size=48)), prepare_data.byte_encoding()
    model.script, model.calls = [c or 256 for c in script.encode()], []
    assert generate_text(model, encoding, "say: ", max_tokens, stops, 0.5, 7) == expected
    assert [call[1:] for call in model.calls] == [(n, 0.5, 7) for n in pieces]
    assert model.calls[0][0] == 5


@pytest.mark.parametrize(("length", "max_tokens", "kept"), [(0, 5, 1), (100, 8, 40), (100, 30, 24), (100, 500, 24)])
def test_a_prompt_is_cut_at_its_left_end(length, max_tokens, kept):
    model, encoding = Scripted(small("post", vocab_size=257, block_size=48)), prepare_data.byte_encoding()
    model.script, model.calls = [256] * 16, []
    assert generate_text(model, encoding, "x" * length, max_tokens) == ""
    assert model.calls[0][0] == kept


def test_generation_is_the_models_own():
    model = trained(small("gpas_deepnorm", vocab_size=257, block_size=24)).eval()
    for n in (7, 40):  # within the block, and past it
        idx = torch.tensor([list(TEXT.encode()[:9])])
        kept = max(24 - n, 12)
        said = model.generate(idx[:, -kept:], n, temperature=0)[0, min(9, kept) :]
        expected = prepare_data.decode(prepare_data.byte_encoding(), said)
        assert generate_text(model, prepare_data.byte_encoding(), TEXT[:9], n) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--harness=arc_easy", "--harness needs --out_dir=PATH too"),
        ("--harness=arc_easy --out_dir=nowhere", "no checkpoint nowhere/ckpt.pt"),
        ("--harness=arc_easy --out_dir=silent", "the data of silent named no tokenizer"),
        ("--harness=arc_easy --out_dir=run --device=moon", "device 'moon' cannot be used"),
        ("--harness=arc_easy --out_dir=run --to=there", "there is there already; --overwrite replaces it"),
        ("--harness=arc_easy --out_dir=run --family=llama", "family has no effect with --harness"),
        ("--harness=arc_easy --out_dir=run --limit=0", "limit is 0; it must be at least 1"),
        ("--harness=arc_easy --export=hf --out_dir=run --to=x", "give one of --export=hf"),
        ("--questions_from=arc_easy", "--questions_from needs --to=PATH too"),
        ("--questions_from=arc_easy --to=there", "there is there already; --overwrite replaces it"),
        ("--questions_from=arc_easy --to=x --limit=3", "limit has no effect with --questions_from"),
        ("--harness=arc_easy --out_dir=run", "this needs the optional library lm_eval: pip install lm_eval"),
        ("--questions_from=arc_easy --to=x", "this needs the optional library lm_eval: pip install lm_eval"),
    ],
)
def test_mistakes_end_in_one_line(args, message, tmp_path, monkeypatch, capsys):
    """Those that are told without lm_eval, before it is missed."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    run_folder("post", tmp_path / "run", steps=0)
    run_folder("post", tmp_path / "silent", tokenizer=None, steps=0)
    Path("there").touch()
    assert one_line(monkeypatch, capsys, args).startswith(f"error: {message}")


def one_line(monkeypatch, capsys, args):
    """What the program says on standard error of a mistake, as its last line."""
    monkeypatch.setattr(sys, "argv", ["interchange.py", *args.split()])
    with pytest.raises(SystemExit) as error:
        interchange.run(interchange.main)
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# -- with lm_eval, on local tasks --------------------------------------------------------------------------------------


@pytest.fixture
def lm_eval(monkeypatch, tmp_path):
    """The library, with the tasks of ARC alone (reading thousands of yamls takes it half a minute)."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: nothing to compare with")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tasks = prepare_data.optional("lm_eval.tasks")
    arc = Path(tasks.__file__).parent / "arc"
    few = functools.partial(tasks.TaskManager, include_defaults=False, include_path=str(arc))
    monkeypatch.setattr(tasks, "TaskManager", few)
    evaluator = prepare_data.optional("lm_eval.evaluator")
    monkeypatch.setattr(evaluator, "TaskManager", few)
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    return lm_eval


def make_task(folder, name, rows, settings):
    """A yaml of lm_eval's with its data beside it; the path of the yaml."""
    data, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {"multiple_choice": ["acc", "acc_norm"], "generate_until": ["exact_match"]}
    content = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    content |= {"test_split": "test", "num_fewshot": 0}
    if settings["output_type"] in metrics:
        content["metric_list"] = [{"metric": metric} for metric in metrics[settings["output_type"]]]
    path.write_text(json.dumps(content | settings))  # JSON is YAML
    return str(path)


def make_questions(n, seed=0):
    """Questions of this text's words, whose choices differ in length; some prompts exceed a block of 48 bytes."""
    chance, words = random.Random(seed), PLAIN.split()
    some = lambda most: " ".join(chance.choices(words, k=chance.randint(1, most)))
    rows = []
    for i in range(n):
        choices = [f"{some(3)} {letter}" for letter in "pqrs"]
        rows.append({"prompt": some(12) if i else "", "choices": choices, "answer": chance.randrange(4)})
    return rows


# The text of special tokens is ordinary text to us, and to transformers a token.
PLAIN = TEXT.replace("<|endoftext|>", "").replace("<|middle|>", "")


def in_order(samples):
    return sorted(samples, key=lambda sample: sample["doc_id"])


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}


@pytest.mark.parametrize(("norm", "tokenizer"), [*((norm, "byte") for norm in NORMS), ("mix", "pairs")])
def test_harness_agrees_with_analyze(norm, tokenizer, lm_eval, tmp_path):
    state = {"byte": lambda: BYTE, "pairs": byte_pairs}[tokenizer]()
    model = run_folder(norm, tmp_path / "run", state)
    questions = make_questions(60)
    task = make_task(tmp_path, "local", questions, CHOICE)
    found = lm_eval.simple_evaluate(
        interchange.harness_model(tmp_path / "run", "cpu", batch_size=7), tasks=[task], log_samples=True
    )
    encoding = prepare_data.build_encoding(state)
    ours = analyze.multiple_choice(model, questions, encoding)
    acc, acc_norm = (found["results"]["local"][f"{name},none"] for name in ("acc", "acc_norm"))
    assert acc_norm == pytest.approx(ours["accuracy"], abs=1e-9) and acc != acc_norm

    # Each log-likelihood, and plain accuracy from them.
    right = 0
    for q, sample in zip(questions, in_order(found["samples"]["local"]), strict=True):
        log_ps = []
        for choice, (log_p, is_greedy) in zip(q["choices"], sample["filtered_resps"], strict=True):
            before = prepare_data.encode(encoding, q["prompt"]).tolist()
            after = prepare_data.encode(encoding, q["prompt"] + " " + choice).tolist()[len(before) :]
            expected, expected_greedy = straight_line(model, before or [encoding.eot_token], after)
            assert log_p == pytest.approx(expected, abs=1e-4) and is_greedy is expected_greedy
            log_ps.append(expected)
        right += log_ps.index(max(log_ps)) == q["answer"]
    assert acc == pytest.approx(right / len(questions))


def assert_same(name, sample, other):
    if name == "say":
        assert sample["filtered_resps"] == other["filtered_resps"]
    else:
        numbers = [torch.tensor(s["filtered_resps"], dtype=torch.float64) for s in (sample, other)]
        torch.testing.assert_close(*numbers, atol=1e-3, rtol=1e-5)


def test_harness_agrees_with_hf_of_the_export(lm_eval, tmp_path):
    """All kinds of requests of our model and of lm_eval's own `hf` on the folder that export wrote."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = run_folder("pre", tmp_path / "run")
    interchange.export_hf(model, tmp_path / "hf", BYTE)
    texts = [{"text": text} for text in (PLAIN, PLAIN[:30], PLAIN[:49], "a")]
    generate = {"output_type": "generate_until", "doc_to_text": "prompt", "doc_to_target": "{{answer}}"}
    generate["generation_kwargs"] = {"until": ["e"], "max_gen_toks": 20, "do_sample": False}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    rolling["metric_list"] = [{"metric": "bits_per_byte"}]
    questions = make_questions(30)
    tasks = [
        make_task(tmp_path, "choose", questions, CHOICE),
        make_task(tmp_path, "say", questions[1:13], generate),
        make_task(tmp_path, "roll", texts, rolling),
    ]
    huggingface = prepare_data.optional("lm_eval.models.huggingface")
    hf = huggingface.HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", device="cpu", batch_size=1)
    models = interchange.harness_model(tmp_path / "run", "cpu", batch_size=4), hf
    ours, theirs = (lm_eval.simple_evaluate(lm, tasks=tasks, bootstrap_iters=0)["samples"] for lm in models)
    for name in ("choose", "say", "roll"):
        for mine, his in zip(in_order(ours[name]), in_order(theirs[name]), strict=True):
            assert_same(name, mine, his)
    assert any(sample["filtered_resps"] != [""] for sample in ours["say"])

    # The same by the tokenizer.json of the export.
    Path(tmp_path / "json").mkdir()
    interchange.save_run(model, tmp_path / "json", interchange.import_tokenizer(tmp_path / "hf"))
    lm = interchange.harness_model(tmp_path / "json", "cpu")
    again = lm_eval.simple_evaluate(lm, tasks=tasks, bootstrap_iters=0)["samples"]
    for name in ("choose", "say", "roll"):
        for mine, other in zip(in_order(ours[name]), in_order(again[name]), strict=True):
            assert_same(name, mine, other)


def test_rolling_likelihood_is_that_of_the_whole_text(lm_eval, tmp_path):
    model = run_folder("hybrid", tmp_path / "run")
    request = lambda text: lm_eval.api.instance.Instance("loglikelihood_rolling", {}, (text,), 0)
    texts = [TEXT[:20], "", TEXT[:120], TEXT[:48], TEXT[:49]]
    found = interchange.harness_model(tmp_path / "run", "cpu").loglikelihood_rolling([request(t) for t in texts])
    for text, log_p in zip(texts, found, strict=True):
        ids, expected = [256, *text.encode()], 0.0
        for start in range(0, len(ids) - 1, 48):  # each block once, the last with as much before it as there is room
            n = min(48, len(ids) - 1 - start)
            expected += straight_line(model, ids[: start + 1], ids[start + 1 : start + 1 + n])[0]
        assert log_p == pytest.approx(expected, abs=1e-3)


def test_sampling_settings(lm_eval, tmp_path):
    run_folder("post", tmp_path / "run")
    lm = interchange.harness_model(tmp_path / "run", "cpu")
    request = lambda **kwargs: [lm_eval.api.instance.Instance("generate_until", {}, ("norms", kwargs), 0)]
    torch.manual_seed(1)
    hot = [lm.generate_until(request(do_sample=True, temperature=5.0, max_gen_toks=12))[0] for _ in range(3)]
    assert len(set(hot)) == 3
    likeliest = request(do_sample=True, temperature=5.0, top_k=1, max_gen_toks=12)
    assert lm.generate_until(likeliest) == lm.generate_until(
        request(until="@", temperature=0.0, max_new_tokens=12, top_p=0.9)
    )
    with pytest.raises(UserError, match="sampling here knows temperature and top_k, not top_p"):
        lm.generate_until(request(do_sample=True, temperature=1.0, top_p=0.9))


def test_program_and_questions(lm_eval, tmp_path, monkeypatch, capsys):
    """--questions_from gives the questions back, with a description and examples before them; --harness runs them."""
    monkeypatch.chdir(tmp_path)
    model = run_folder("hybrid", Path("run"))

    def program(*args):
        monkeypatch.setattr(sys, "argv", ["interchange.py", *args])
        interchange.main()
        return capsys.readouterr().out

    questions = make_questions(20)
    make_task(tmp_path, "first", questions, CHOICE)
    as_text = [q | {"answer": q["choices"][q["answer"]]} for q in questions[:5]]
    make_task(tmp_path, "second", as_text, CHOICE | {"description": "Choose. "})
    assert "wrote q.jsonl: 25 questions" in program("--questions_from=first.yaml,second.yaml", "--to=q.jsonl")
    written = [json.loads(line) for line in Path("q.jsonl").read_text().splitlines()]
    described = [q | {"prompt": "Choose. " + q["prompt"]} for q in questions[:5]]
    assert written == questions + described
    assert analyze.read_questions("q.jsonl") == written

    out = program("--harness=first.yaml", "--out_dir=run", "--device=cpu", "--to=results.json", "--limit=15")
    found = json.loads(Path("results.json").read_text())["first"]
    expected = analyze.multiple_choice(model, questions[:15], prepare_data.byte_encoding())["accuracy"]
    assert found["acc_norm,none"] == pytest.approx(expected) and f"{expected:.4f}" in out

    # With solved examples: what the harness scores is what analyze.py reads.
    few = CHOICE | {"num_fewshot": 2, "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    make_task(tmp_path, "few", questions, few)
    program("--questions_from=few.yaml", "--to=q.jsonl", "--overwrite")
    written = [json.loads(line) for line in Path("q.jsonl").read_text().splitlines()]
    solved = "".join(q["prompt"] + " " + q["choices"][q["answer"]] + "\n\n" for q in questions[:2])
    assert written[5]["prompt"] == solved + questions[5]["prompt"]


def test_contexts_with_one_continuation(lm_eval, tmp_path):
    """As in Winogrande: `prompt` is a list. The harness's acc is the share of answers whose context is the best."""
    model = run_folder("gpas_deepnorm", tmp_path / "run")
    rows = [
        {
            "contexts": [q["prompt"] + q["choices"][0], q["prompt"] + q["choices"][1]],
            "end": q["choices"][2],
            "best": i % 2,
        }
        for i, q in enumerate(make_questions(30))
    ]
    settings = {"output_type": "multiple_choice", "doc_to_text": "{{best}}", "doc_to_choice": "contexts"}
    task = make_task(tmp_path, "ends", rows, settings | {"doc_to_target": "end"})
    lm = interchange.harness_model(tmp_path / "run", "cpu")
    acc = lm_eval.simple_evaluate(lm, tasks=[task])["results"]["ends"]["acc,none"]

    manager = prepare_data.optional("lm_eval.tasks").TaskManager()
    questions = interchange.convert_questions(manager.load([task])["tasks"]["ends"])
    expected = [{"prompt": r["contexts"], "choices": [r["end"]] * 2, "answer": r["best"]} for r in rows]
    assert questions == expected
    right = 0
    for q in questions:
        pairs = [(list(p.encode()), list((" " + c).encode())) for p, c in zip(q["prompt"], q["choices"])]
        log_ps = [straight_line(model, *pair)[0] for pair in pairs]
        right += log_ps.index(max(log_ps)) == q["answer"]
    assert acc == pytest.approx(right / len(questions)) and 0 < acc < 1


def test_tasks_that_cannot_be_used(lm_eval, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_folder("post", Path("run"))
    questions = make_questions(3)
    make_task(tmp_path, "say", questions, CHOICE | {"output_type": "generate_until"})
    make_task(tmp_path, "tight", questions, CHOICE | {"target_delimiter": ""})
    make_task(tmp_path, "wrong", [*questions, questions[0] | {"answer": 4}], CHOICE)
    make_task(tmp_path, "long", [questions[0] | {"choices": ["a", "b" * 60, "c", "d"]}], CHOICE)
    make_task(tmp_path, "lost", questions, CHOICE)
    Path("lost.jsonl").unlink()
    on_run = "--out_dir=run --device=cpu --harness="
    for args, message in [
        (on_run + "arc_eazy", "lm_eval cannot run 'arc_eazy': KeyError: \"Spec 'arc_eazy' is not a registered task"),
        (on_run + "nothing.yaml", "lm_eval cannot run 'nothing.yaml': "),
        (on_run + "lost.yaml", "lm_eval cannot run 'lost.yaml': "),
        (on_run + "long.yaml", "a continuation has 61 tokens, more than the block size 48"),
        ("--to=q.jsonl --questions_from=", "lm_eval cannot load '': "),
        ("--to=q.jsonl --questions_from=say.yaml", "task say is of output_type generate_until; only multiple_choice"),
        ("--to=q.jsonl --questions_from=tight.yaml", "task tight puts '' before a choice; analyze.py puts a space"),
        ("--to=q.jsonl --questions_from=wrong.yaml", "task wrong, question 4: the answer 4 is not one of 4"),
    ]:
        assert one_line(monkeypatch, capsys, args).startswith(f"error: {message}")
    assert not Path("q.jsonl").exists()
