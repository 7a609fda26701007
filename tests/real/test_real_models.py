"""A model that other people trained, and tasks that other people wrote, from the cache that `make real` fills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from secateur import api
from secateur.evaluate.tasks import PRESETS, find_tasks
from tools.real_models import TASKS, VARIABLE, cache_folder, missing

pytestmark = [pytest.mark.real, pytest.mark.slow]

SMOLLM2 = cache_folder() / "models" / "SmolLM2-135M-Instruct"


def needs(*folders: str) -> pytest.MarkDecorator:
    why = missing(*folders)
    return pytest.mark.skipif(why is not None, reason=why or "")


needs_model = needs("models/SmolLM2-135M-Instruct", "text")
needs_tasks = needs("tasks", "data")


def perplexity(model: Path) -> float:
    measure = api.EvalRequest(str(model), text=str(cache_folder() / "text" / "test.txt"), seqlen=256, limit=4)
    return float(api.evaluate(measure)["ppl"])


@needs_model
def test_the_imported_model_writes_english_and_knows_its_template() -> None:
    for chat, asked, answer in (
        (True, "What is the capital of France?", "The capital of France is Paris."),
        (False, "The capital of France is", " Paris."),
    ):
        written = api.generate(api.GenerateRequest(str(SMOLLM2), prompt=asked, chat=chat, new=12))
        assert written["texts"][0]["text"].startswith(answer)
        assert written["chat"] == chat
    assert 5 < perplexity(SMOLLM2) < 30


@needs_model
def test_methods_keep_their_order_on_a_real_model(tmp_path: Path) -> None:
    """At 50% zeros, Wanda is near the dense model and magnitude far from it: with its massive activations it is no model
    on which both are alike, as on the small one in the package.
    """
    how: dict[str, Any] = {"calibration": str(cache_folder() / "text" / "train.txt"), "samples": 8, "seqlen": 256}
    api.prune(api.Request(str(SMOLLM2), "wanda", sparsity=0.5, **how), tmp_path / "wanda")
    api.prune(api.Request(str(SMOLLM2), "magnitude", sparsity=0.5), tmp_path / "magnitude")
    dense, wanda, magnitude = (perplexity(path) for path in (SMOLLM2, tmp_path / "wanda", tmp_path / "magnitude"))
    assert dense < wanda < 4 * dense
    assert magnitude > 4 * wanda


@needs_model
def test_a_narrower_real_model_loads_without_secateur(tmp_path: Path) -> None:
    record = api.prune(
        api.Request(str(SMOLLM2), "magnitude", pattern="rows", params_removed=0.2), tmp_path / "narrower"
    )
    assert abs(record["params_after"] / record["params_before"] - 0.8) < 0.005
    script = (
        "import sys; sys.modules['secateur'] = None\n"
        "from transformers import AutoModelForCausalLM as A\n"
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(sum(p.numel() for p in m.parameters()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "narrower")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == record["params_after"]


@needs_tasks
@pytest.mark.parametrize("name", sorted(TASKS))
def test_requests_are_those_of_lm_eval_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own task, given the same items where it would ask the hub for them, has the same hash."""
    ours = find_tasks([name], cache_folder() / "tasks", limit=50).loaded
    assert ours is not None
    folder = cache_folder() / "data" / TASKS[name][1]

    def from_cache(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        items = datasets.load_from_disk(str(folder))
        if "passage" in items.column_names:  # SuperGLUE has a label for the answer
            items = items.map(lambda row: {"label": int(row["answer"])})
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), items))

    monkeypatch.setattr(datasets, "load_dataset", from_cache)
    theirs = find_tasks([name], limit=50).loaded
    assert theirs is not None
    assert theirs.hashes == ours.hashes
    assert ours.local == {name}
    assert not theirs.local


@needs_tasks
def test_the_presets_of_the_papers_are_there() -> None:
    assert {name for preset in PRESETS.values() for name in preset} == set(TASKS)
    loaded = find_tasks(["disp-llm", "modules"], cache_folder() / "tasks", limit=2).loaded
    assert loaded is not None
    first = {name: task.instances[0].args for name, task in loaded.found["tasks"].items()}
    assert first["boolq"][0].startswith("All biomass")
    assert first["boolq"][0].endswith("\nQuestion: does ethanol take more energy make that produces?\nAnswer:")
    assert first["boolq"][1] == " no"
    assert first["piqa"][0] == "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:"
    assert first["winogrande"] == (
        "Sarah was a much better surgeon than Maria so Sarah",
        " always got the easier cases.",
    )


def test_an_empty_cache_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    why = missing("tasks", "text")
    assert why is not None
    assert "has no tasks, text: `python tools/real_models.py fetch`" in why
