"""Tasks through lm-eval, compared with its own Hugging Face backend: resuming, refusals, the built-in task, classes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer
from typer.testing import CliRunner

import secateur.evaluate
from secateur import api
from secateur.cli import app
from secateur.core import records
from secateur.core.errors import SecateurError
from secateur.evaluate import continuations, evaluate
from secateur.evaluate.answers import Answers
from secateur.evaluate.classification import classification_scores
from secateur.evaluate.cloze import cloze_items
from secateur.evaluate.continuations import score_continuations
from secateur.evaluate.tasks import PRESETS, find_tasks
from secateur.models.load import bundled_folder, load_model, open_checkpoint
from secateur.predict.read import read_points
from tests.tiny import LENGTH, MODEL_TYPES, some_ids, tiny_config, tiny_model

CHOICES = [
    {"query": "import", "choices": ["os", "a long line of other words"], "gold": 0},
    {
        "query": "def function(self):\n    " + "return self.value + 1\n    " * 20,
        "choices": ["pass", "return", "class"],
        "gold": 2,
    },  # longer than the model
    {"query": "for i in", "choices": ["range(10):", "os", "x"], "gold": 0},
]
CLASSES = [
    {"query": query, "label": i % 3 == 0}
    for i, query in enumerate(["x is y", "none is true", "self is a list", "os is path", "a is b"])
]
PAIRS = [
    {"contexts": ["a list", "an integer, or"], "continuation": "of the same length", "gold": 1},
    {"contexts": ["it", "she"], "continuation": "is", "gold": 0},
]
TEXTS = [{"text": "import os\nprint(os)\n" * 12}, {"text": "x"}]

FILES = {
    "tiny_choices": (
        CHOICES,
        "multiple_choice",
        {"doc_to_text": "{{query}}", "doc_to_target": "gold", "doc_to_choice": "choices"},
        ["acc", "acc_norm"],
    ),
    "tiny_classes": (
        CLASSES,
        "multiple_choice",
        {"doc_to_text": "{{query}}?", "doc_to_target": "{{label|int}}", "doc_to_choice": ["no", "yes"]},
        ["acc"],
    ),
    "tiny_pairs": (
        PAIRS,
        "multiple_choice",
        {"doc_to_text": "gold", "doc_to_target": "continuation", "doc_to_choice": "contexts"},
        ["acc"],
    ),
    "tiny_last": (
        PAIRS,
        "loglikelihood",
        {"doc_to_text": "{{contexts[0]}}", "doc_to_target": " {{continuation}}"},
        ["acc"],
    ),
    "tiny_text": (TEXTS, "loglikelihood_rolling", {"doc_to_text": "", "doc_to_target": "{{text}}"}, ["bits_per_byte"]),
    "tiny_written": (
        CHOICES[::2],
        "generate_until",
        {"doc_to_text": "{{query}}", "doc_to_target": "{{choices[gold]}}"},
        ["exact_match"],
    ),
}


@pytest.fixture
def task_files(tmp_path: Path) -> Path:
    """A folder of local tasks, one of each kind of request."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, (rows, kind, fields, metrics) in FILES.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        functions = (
            "def rows(file, **_):\n    from datasets import Dataset\n    return {'test': Dataset.from_json(file)}\n"
        )
        (folder / "own.py").write_text(functions)
        listed = [
            {"metric": m, "aggregation": m if m == "bits_per_byte" else "mean", "higher_is_better": True}
            for m in metrics
        ]
        more: dict[str, Any] = (
            {"generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]}} if kind == "generate_until" else {}
        )
        content = {
            "task": name,
            "output_type": kind,
            "test_split": "test",
            "dataset_kwargs": {"file": str(folder / f"{name}.jsonl")},
            **fields,
            **more,
        }
        text = json.dumps({**content, "metric_list": listed, "metadata": {"version": 2.0}})  # JSON is YAML
        (folder / f"{name}.yaml").write_text(text[:-1] + ', "custom_dataset": !function own.rows}')
    return folder


@pytest.fixture
def dense(saved: Callable[..., Path]) -> Path:
    """A tiny model with the tokenizer of the bundled one."""
    folder = saved("llama", vocab_size=2048)
    AutoTokenizer.from_pretrained(bundled_folder()).save_pretrained(folder)
    return folder


@pytest.fixture
def sliced(dense: Path, ids_file: str, tmp_path: Path) -> Path:
    """The same model with a narrower residual stream: a class of secateur's own."""
    api.prune(api.Request(str(dense), "slicegpt", sparsity=0.25, calibration=ids_file, samples=6), tmp_path / "sliced")
    return tmp_path / "sliced"


@pytest.mark.parametrize("kind", ["dense", "sliced"])
def test_equals_the_backend_of_lm_eval(kind: str, task_files: Path, request: pytest.FixtureRequest) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    folder = request.getfixturevalue(kind)
    tasks = find_tasks(list(FILES), task_files)
    checkpoint = open_checkpoint(str(folder))
    model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    answers = Answers()
    ours = tasks.run(model, checkpoint.tokenizer(), answers)
    assert tasks.loaded is not None
    backend = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)
    theirs = evaluate(lm=backend, task_dict=tasks.loaded.found, bootstrap_iters=1000)["results"]
    for name, (rows, _, _, metrics) in FILES.items():
        assert ours[name]["n"] == len(rows)
        if "acc" in metrics:
            assert (ours[name]["acc"], ours[name]["stderr"]) == (
                theirs[name]["acc,none"],
                theirs[name]["acc_stderr,none"],
            )
    assert (ours["tiny_choices"]["acc_norm"], ours["tiny_choices"]["stderr_norm"]) == tuple(
        theirs["tiny_choices"][f"acc_norm{s},none"] for s in ("", "_stderr")
    )
    assert ours["tiny_text"]["metrics"]["bits_per_byte"] == pytest.approx(
        theirs["tiny_text"]["bits_per_byte,none"], rel=1e-6
    )
    assert ours["tiny_written"]["metrics"]["exact_match"] == theirs["tiny_written"]["exact_match,none"]
    expected = [[r[0] for r in i.resps] for i in tasks.loaded.found["tasks"]["tiny_choices"].instances]
    tasks.run(model, checkpoint.tokenizer(), answers)
    found = [[r[0] for r in i.resps] for i in tasks.loaded.found["tasks"]["tiny_choices"].instances]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-4)
    written = [i.resps for i in tasks.loaded.found["tasks"]["tiny_written"].instances]
    evaluate(lm=backend, task_dict=tasks.loaded.found, bootstrap_iters=0)
    assert written == [i.resps for i in tasks.loaded.found["tasks"]["tiny_written"].instances]


def test_scores_against_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of several lengths, equal inputs with other ends, one input longer than the model."""
    monkeypatch.setattr(continuations, "_TOKENS_A_BATCH", {"cpu": 40})
    model = tiny_model("opt")
    ids = some_ids(1, LENGTH + 6)[0].tolist()
    best = int(model(torch.tensor([ids[:5]])).logits[0, -1].argmax())
    rows = [
        (ids[:9], ids[9:12]),
        (ids[:5], [7]),
        (ids[:5], [best]),
        (ids[:3], ids[3:5]),
        (ids[:-4], ids[-4:]),
        (ids[:1], ids[1:2]),
    ]
    scores = score_continuations(model, rows, "test")
    for (context, rest), score in zip(rows, scores, strict=True):
        inputs = [*context, *rest][-(LENGTH + 1) :]
        logits = log_softmax(model(torch.tensor([inputs[:-1]])).logits[0, -len(rest) :].detach().double(), -1)
        assert score.logp == pytest.approx(sum(float(logits[i, t]) for i, t in enumerate(rest)), abs=1e-4)
        assert score.greedy == (logits.argmax(-1).tolist() == rest)
    assert scores[2].greedy
    assert not scores[1].greedy


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_choices_continue_from_one_cache_of_their_context(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores equal those of inputs alone, also where attention looks back at fewer tokens than the context has."""
    model = tiny_model(
        model_type, **({"sliding_window": 6} if hasattr(tiny_config(model_type), "sliding_window") else {})
    )
    contexts = some_ids(3, 23).tolist()
    rests = some_ids(6, 7, seed=2).tolist()
    rows = [
        (context[:size], rest[: 2 + r])
        for context, size in zip(contexts, (23, 22, 14), strict=True)
        for r, rest in enumerate(rests)
    ]
    seen, real = [], continuations._hidden

    def watched(model: Any, groups: Any) -> torch.Tensor:
        seen.extend((len(group.inputs), group.shared) for group in groups)
        return real(model, groups)

    monkeypatch.setattr(continuations, "_hidden", watched)
    scores = score_continuations(model, rows, "test")
    assert seen == [(6, 20), (6, 20), (6, 12)]
    assert [score_continuations(model, [row], "test")[0].logp for row in rows] == pytest.approx(
        [score.logp for score in scores], abs=1e-4
    )


def test_an_accelerator_without_memory_gets_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    rows = [(row.tolist()[:10], row.tolist()[10:]) for row in some_ids(12, 12)]
    expected, sizes, real = score_continuations(model, rows, "test"), [], continuations.hidden_states

    def small(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
        if len(ids_BT) > 3:
            raise torch.OutOfMemoryError("no")
        sizes.append(len(ids_BT))
        return real(model, ids_BT)

    monkeypatch.setattr(continuations, "hidden_states", small)
    assert [s.logp for s in score_continuations(model, rows, "test")] == pytest.approx(
        [s.logp for s in expected], abs=1e-5
    )
    assert sizes == [3, 3, 3, 3]

    rows = [(row.tolist()[:10], row.tolist()[10 : 12 + r]) for row in some_ids(4, 15) for r in range(3)]
    expected, together, once = score_continuations(model, rows, "test"), [], continuations._hidden

    def smaller(model: Any, groups: Any) -> torch.Tensor:
        if len(groups) > 2:
            raise torch.OutOfMemoryError("no")
        together.append(len(groups))
        return once(model, groups)

    monkeypatch.setattr(continuations, "_hidden", smaller)
    assert [s.logp for s in score_continuations(model, rows, "test")] == pytest.approx(
        [s.logp for s in expected], abs=1e-5
    )
    assert together == [2, 2]


def test_generation_without_memory_gets_smaller_batches(
    dense: Path, task_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    checkpoint, real, sizes = open_checkpoint(str(dense)), HFLM._model_generate, []

    def small(self: Any, context: torch.Tensor, *given: Any, **more: Any) -> Any:
        sizes.append(len(context))
        if len(context) > 1:
            raise torch.OutOfMemoryError("no")
        return real(self, context, *given, **more)

    monkeypatch.setattr(HFLM, "_model_generate", small)
    tasks = find_tasks(["tiny_written"], task_files)
    tasks.run(
        load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32), checkpoint.tokenizer(), Answers()
    )
    assert sizes[0] > 1
    assert sizes[-1] == 1


def test_logits_that_are_not_finite_are_no_result() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(SecateurError, match="tasks: the model's logits hold NaN"):
        score_continuations(model, [([4], [5])], "tasks")
    with pytest.raises(SecateurError, match="a continuation of 0 tokens"):
        score_continuations(model, [([4], [])], "tasks")


def test_record_and_resumption_within_a_task(
    dense: Path, task_files: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ("tiny_choices", "tiny_classes", "tiny_written")
    asked = api.EvalRequest(str(dense), ids_file, limit=3, tasks=tasks, include_path=task_files)
    whole = api.evaluate(asked, records_file=tmp_path / "whole" / "records.jsonl")
    assert whole["tasks"]["tiny_classes"].keys() >= {
        "acc",
        "acc_norm",
        "stderr",
        "n",
        "sha256",
        "precision",
        "recall",
        "f1",
        "classes",
        "chance",
        "local",
    }
    assert whole["tasks"]["tiny_choices"]["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 3) / 3)
    assert "precision" not in whole["tasks"]["tiny_choices"]
    assert "lm_eval" in whole["versions"]

    for budget in ("_TOKENS_A_BATCH", "CACHED_TOKENS"):  # a group of sequences a batch
        monkeypatch.setattr(continuations, budget, {"cpu": 1})
    real, calls, stops = continuations._hidden, [], [4]

    def stop(model: Any, groups: Any) -> torch.Tensor:
        calls.append(groups)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return real(model, groups)

    monkeypatch.setattr(continuations, "_hidden", stop)
    file = tmp_path / "again" / "records.jsonl"
    with pytest.raises(KeyboardInterrupt):
        api.evaluate(asked, records_file=file)
    (kept,) = file.parent.glob(".answers-*.jsonl")
    with kept.open("a") as broken:
        broken.write('{"torn": [')
    before, stops[:] = len(calls), []
    again = api.evaluate(asked, records_file=file, resume=True)
    # two questions are run with all their choices, one is too short for that; each has one input for both classes
    assert len(calls) - before == 2 + 3 + 3 - 3
    for name, result in whole["tasks"].items():
        assert again["tasks"][name] == result
    assert again["key"] == whole["key"]
    calls.clear()

    def again_measured(*_: Any, **__: Any) -> None:
        raise AssertionError("the perplexity was measured before")

    monkeypatch.setattr(evaluate, "perplexity", again_measured)
    wider = api.evaluate(replace(asked, tasks=("tiny_choices", "tiny_pairs")), records_file=file, resume=True)
    assert (wider["ppl"], wider["loss"]) == (whole["ppl"], whole["loss"])
    assert len(calls) == 4, "what was answered before is not asked again"
    assert wider["tasks"]["tiny_pairs"]["n"] == 2
    fewer = api.evaluate(replace(asked, tasks=("tiny_pairs",), items=1), records_file=file, resume=True)
    assert (fewer["tasks"]["tiny_pairs"]["n"], fewer["ppl_protocol"]["windows"]) == (1, 3)
    assert wider["tasks"]["tiny_choices"] == whole["tasks"]["tiny_choices"]


def test_share_of_flipped_answers(dense: Path, sliced: Path, task_files: Path, ids_file: str, tmp_path: Path) -> None:
    asked = api.EvalRequest(
        str(sliced), ids_file, tasks=("tiny_choices", "tiny_text"), against=str(dense), include_path=task_files
    )
    record = api.evaluate(asked, records_file=tmp_path / "records.jsonl")
    assert record["tasks"]["tiny_choices"]["flipped"] in (0, 1 / 3, 2 / 3, 1)
    assert "flipped" not in record["tasks"]["tiny_text"]


def test_the_built_in_task_for_lm_eval() -> None:
    loaded = find_tasks(["secateur_cloze"], limit=3).loaded
    assert loaded is not None
    instances = loaded.found["tasks"]["secateur_cloze"].instances
    expected = [(item.context, choice) for item in cloze_items(3) for choice in item.choices]
    assert [i.args for i in instances] == expected
    assert not loaded.local


def test_precision_recall_and_f1_by_hand() -> None:
    scores = classification_scores([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1], ["a", "b", "c"])
    assert scores["classes"]["a"] == {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "n": 3}
    assert scores["classes"]["b"] == {"precision": 1 / 3, "recall": 1 / 2, "f1": pytest.approx(2 / 5), "n": 2}
    assert scores["classes"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 1}
    assert scores["recall"] == pytest.approx((2 / 3 + 1 / 2) / 3)


def test_predict_reads_the_records(tmp_path: Path) -> None:
    def record(s: float, acc: float) -> dict[str, Any]:
        task = {
            "acc": acc,
            "acc_norm": acc + 0.1,
            "stderr": 0.01,
            "stderr_norm": 0.02,
            "n": 90,
            "sha256": "ab",
            "chance": 0.25,
        }
        method = None if s == 0 else "wanda"
        return {
            "command": "eval",
            "model": "m",
            "out": f"at{s}",
            "method": method,
            "sparsity": s,
            "sparsity_measured": s,
            "tasks": {"arc_easy": task},
        }

    for s, acc in ((0.0, 0.6), (0.2, 0.5), (0.4, 0.252)):
        records.append(tmp_path / "records.jsonl", record(s, acc))
    points = read_points([tmp_path], "arc_easy")
    assert (points.chance, points.dense, points.values.tolist()) == (0.25, 0.6, [0.5])
    assert "within its standard error 0.01" in points.warnings[0]
    assert read_points([tmp_path], "arc_easy:acc_norm").values.tolist() == pytest.approx([0.6, 0.352])


def refuse(dense: Path, *args: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["eval", str(dense), "--text", str(dense / "ids.npy"), *map(str, args)])
    return result.exit_code, result.stderr.strip().splitlines()[-1]


@pytest.fixture
def small_index(task_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the thirteen thousand files of lm-eval: two, one of which reads from the hub."""
    from secateur.evaluate import task_files as files

    folder = task_files.parent / "known"
    folder.mkdir()
    (folder / "piqa.yaml").write_text(
        "task: piqa\ndataset_path: baber/piqa\noutput_type: multiple_choice\nvalidation_split: validation\n"
    )
    (folder / "code.yaml").write_text(
        (task_files / "tiny_written.yaml").read_text()[:-1] + ', "task": "code", "unsafe_code": true}'
    )
    (folder / "own.py").write_text((task_files / "own.py").read_text())
    monkeypatch.setattr(files, "SHIPPED", folder)


@pytest.mark.parametrize("task", ["tiny_choices", "tiny_text", "tiny_written", "cloze"])
def test_a_tokenizer_larger_than_the_embedding_is_said_in_one_line(
    task: str, dense: Path, task_files: Path, ids_file: str
) -> None:
    """A token was added and the model never resized: torch says 'index out of range in self'."""
    content = json.loads((dense / "tokenizer.json").read_text())
    size = json.loads((dense / "config.json").read_text())["vocab_size"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": size, "content": "mpor", "special": True, **flags})
    (dense / "tokenizer.json").write_text(json.dumps(content))
    wrong = rf"the tokenizer gives id {size}, and the embedding of the model has {size} rows .+ has {size + 1} tokens\)"
    with pytest.raises(SecateurError, match=wrong):
        api.evaluate(
            api.EvalRequest(
                str(dense), text=ids_file, tasks=[task], include_path=None if task == "cloze" else task_files
            )
        )


@pytest.mark.usefixtures("small_index")
def test_refusals(dense: Path, task_files: Path, tmp_path: Path) -> None:
    status, line = refuse(dense, "--tasks", "close")
    assert (status, "unknown task 'close'; did you mean cloze" in line) == (2, True), line
    status, line = refuse(dense, "--tasks", "tiny_choice,piqa", "--include-path", task_files)
    assert (
        status,
        "did you mean tiny_choices" in line,
        "task files of your own: tiny_choices, tiny_classes" in line,
    ) == (2, True, True), line
    status, line = refuse(dense, "--tasks", "piqa")
    assert (
        status,
        "task 'piqa' needs baber/piqa from the hub, which does not answer" in line,
        "--include-path DIR" in line,
    ) == (1, True, True), line
    status, line = refuse(dense, "--tasks", "code")
    assert (status, "task 'code' runs code that the model wrote" in line) == (1, True), line
    status, line = refuse(dense, "--tasks", "piqa", "--include-path", tmp_path / "absent")
    assert (status, "absent: no such folder" in line) == (2, True), line
    (tmp_path / "empty").mkdir()
    status, line = refuse(dense, "--tasks", "piqa", "--include-path", tmp_path / "empty")
    assert (status, "no task files of lm-eval (it has no .yaml files)" in line) == (2, True), line
    (tmp_path / "empty" / "other.yaml").write_text("colour: green\n")
    status, line = refuse(dense, "--tasks", "piqa", "--include-path", tmp_path / "empty")
    assert (status, "none of its 1 .yaml files is one" in line) == (2, True), line
    (tmp_path / "empty" / "broken.yaml").write_text("task: x\ndataset_kwargs: [1, 2\noutput_type: y\n")
    status, line = refuse(dense, "--tasks", "piqa", "--include-path", tmp_path / "empty")
    assert (status, "broken.yaml, line 3, column 12: not YAML" in line, "expected ',' or ']'" in line) == (
        2,
        True,
        True,
    ), line
    status, line = refuse(dense, "--include-path", task_files)
    assert (status, "name the tasks too" in line) == (2, True), line
    (task_files / "tiny_choices.jsonl").write_text("")
    status, line = refuse(dense, "--tasks", "tiny_choices", "--include-path", task_files)
    assert (status, "task 'tiny_choices' cannot be loaded" in line) == (1, True), line
    (task_files / "tiny_choices.jsonl").unlink()
    status, line = refuse(dense, "--tasks", "tiny_choices", "--include-path", task_files)
    assert (status, "task 'tiny_choices' cannot be loaded" in line) == (1, True), line


@pytest.mark.usefixtures("small_index")
def test_lm_evals_own_files_are_read_when_they_are_needed(task_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task is found by the text of its file; what a group of the user's names is found too; a tag needs all files."""
    from secateur.evaluate import task_files as files

    shipped = files.SHIPPED / "deeper"
    shipped.mkdir()
    for name in ("tiny_choices", "tiny_classes"):
        settings = json.loads((task_files / f"{name}.yaml").read_text().replace("!function own.rows", '""')) | {
            "task": f"known_{name}",
            "tag": "labelled",
        }
        lines = [
            f"{key}: {json.dumps(value)}" if value else f"{key}: !function own.rows" for key, value in settings.items()
        ]
        (shipped / f"{name}.yaml").write_text("\n".join(lines))
    (shipped / "own.py").write_text((task_files / "own.py").read_text())
    (task_files / "group.yaml").write_text(
        '{"group": "both", "task": ["tiny_pairs", {"task": "known_tiny_choices", "num_fewshot": 0}]}'
    )
    real, read = files.manager, []

    def reading(folders: tuple[Path, ...]) -> Any:
        read.extend(folders)
        return real(folders)

    monkeypatch.setattr(files, "manager", reading)
    loaded = find_tasks(["both"], task_files, limit=1).loaded
    assert loaded is not None
    assert (set(loaded.found["tasks"]), set(loaded.local)) == ({"tiny_pairs", "known_tiny_choices"}, {"tiny_pairs"})
    assert files.SHIPPED not in read
    loaded = find_tasks(["labelled"], limit=1).loaded
    assert loaded is not None
    assert set(loaded.found["tasks"]) == {"known_tiny_choices", "known_tiny_classes"}
    assert files.hub_source(real((files.SHIPPED,)), "piqa") == "baber/piqa"


def test_the_libraries_of_the_hub_are_offline_while_it_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    from secateur.core.hub import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with hub() as answers:
        assert (answers, constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE) == (False, True, True)
    assert (constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE) == (False, False)


def test_without_the_extra(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "secateur.evaluate.harness", raising=False)
    monkeypatch.delattr(secateur.evaluate, "harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, line = refuse(dense, "--tasks", "arc_easy")
    assert (status, "pip install 'secateur[eval]'" in line) == (1, True), line
    assert find_tasks(["cloze"], limit=2)


def test_presets_are_tasks_that_lm_eval_defines() -> None:
    from lm_eval import tasks

    elsewhere = {"boolq": "super_glue/boolq/default", "rte": "glue/rte/default", "winogrande": "winogrande/default"}
    files = {**elsewhere, "arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge"}
    for name in {name for preset in PRESETS.values() for name in preset}:
        text = (Path(tasks.__file__).parent / f"{files.get(name, f'{name}/{name}')}.yaml").read_text()
        assert f"task: {name}\n" in text
