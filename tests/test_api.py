"""The Python functions: every command has one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur import api, requests
from secateur.core.paths import to_path, to_paths
from secateur.heal.estimate import estimate_heal
from secateur.heal.heal import heal
from secateur.models.load import bundled_folder
from tests.cli.commands import COMMANDS
from tests.tiny import tiny_model

NAMES = {
    "eval": "evaluate",
    "import": "import_gguf",
    "report": "write_report",
    "run": "run_recipe",
}  # `eval` and `import` are Python's own, `report` a package


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_function_and_calls_it(command: str) -> None:
    name = NAMES.get(command, command.replace(" ", "_").replace("-", "_"))
    assert name in api.__all__
    assert (inspect.getdoc(getattr(api, name)) or "").endswith((".", "`"))
    assert f"api.{name}(" in inspect.getsource(COMMANDS[command].callback)


def test_all_is_the_whole_interface() -> None:
    own = {
        name
        for name, value in vars(api).items()
        if getattr(value, "__module__", "") == api.__name__ and not name.startswith("_")
    }
    asked = {name for name, value in vars(requests).items() if inspect.isclass(value) and name.endswith("Request")}
    assert own | asked <= set(api.__all__), "what this file and requests.py define for users"
    assert sorted(set(api.__all__)) == sorted(api.__all__), "no name twice"
    values = [getattr(api, name) for name in api.__all__]
    assert all(inspect.isclass(value) or inspect.isfunction(value) for value in values), "no constant, no module"
    assert all(value.__module__.startswith("secateur.") and inspect.getdoc(value) for value in values)


def test_nothing_else_leaks() -> None:
    names: dict[str, Any] = {}
    exec("from secateur.api import *", names)
    assert names.keys() - {"__builtins__"} == set(api.__all__) == set(dir(api))


def test_windows_for_a_model_in_memory_are_those_of_a_prune(tmp_path: Path) -> None:
    request = api.Request("bundled", "wanda", sparsity=0.5, samples=4, seqlen=32, seed=5)
    api.prune(request, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    drawn = api.draw_windows(model, tokenizer, "builtin", samples=4, seqlen=32, seed=5)
    expected = api.read_windows(api.prepare(request))
    assert expected is not None
    assert drawn.equal(expected)
    assert api.draw_windows(model, tokenizer, "builtin", samples=2).shape == (2, 512), "the model's maximum"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": "wikitext"}, "no text 'wikitext': give one of builtin"),
        ({"samples": 0}, "samples 0: at least one window"),
        ({"seqlen": 65}, r"seqlen 65 is outside \[2, 64\]"),
        ({}, "the text 'builtin' needs a tokenizer: give AutoTokenizer"),
    ],
)
def test_wrong_windows_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(api.UsageError, match=words):
        api.draw_windows(tiny_model("llama"), None, **{"text": "builtin", **given})


def test_token_ids_need_no_tokenizer(ids_file: str, windows: torch.Tensor) -> None:
    assert api.draw_windows(tiny_model("llama"), None, ids_file).equal(windows)


def test_methods_have_summaries() -> None:
    assert api.methods()["wanda"] == api.find_method("wanda").summary


def _paths() -> list[tuple[Any, inspect.Parameter]]:
    """Every parameter of the interface that takes a path."""
    functions = [value for name in api.__all__ if inspect.isfunction(value := getattr(api, name))]
    functions += [api.Plan.save]
    return [(f, p) for f in functions for p in inspect.signature(f).parameters.values() if "Path" in str(p.annotation)]


@pytest.mark.parametrize(("function", "parameter"), _paths(), ids=lambda value: getattr(value, "__name__", None))
def test_a_path_may_be_text(function: Any, parameter: inspect.Parameter) -> None:
    assert "str | Path" in str(parameter.annotation)
    assert re.search(rf"\b(to_paths?|str)\({parameter.name}\)", inspect.getsource(function)), "turned into one kind"


def test_the_scan_of_paths_finds_them() -> None:
    found = {(function.__name__, parameter.name) for function, parameter in _paths()}
    assert {("prune", "out"), ("read_plan", "folder"), ("find_records", "paths"), ("save", "folder")} <= found


def test_text_becomes_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert to_path("~/runs") == tmp_path / "runs" == to_path(tmp_path / "runs")
    assert to_path(None) is None
    assert to_paths("runs") == to_paths(["runs"]) == to_paths([Path("runs")]) == [Path("runs")]


def test_work_with_text_for_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    request = api.Request("tiny", "magnitude", sparsity=0.5)
    api.prune(request, "out", records_file="here/records.jsonl")
    plan = api.read_plan("out")
    Path("saved").mkdir()
    plan.save("saved")
    assert len(api.find_records("here/records.jsonl")) == 1 == len(api.find_records(["here"]))
    assert [step.kind for step in api.read_recipe("out").steps] == ["prune"]
    api.pack("out", "packed")
    api.unpack("packed", "restored")
    assert Path("restored/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    api.plot_flow(api.inspect_flow("tiny"), "flow.png")
    Path("points.csv").write_text("sparsity,ppl\n0,10\n0.2,11\n0.4,14\n0.6,25\n")
    assert api.predict("points.csv", plot="law.png")["plot"] == "law.png"


def test_a_request_takes_a_path_for_a_model(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    request = api.Request(tmp_path / "tiny", "magnitude", sparsity=0.5)  # type: ignore[arg-type]
    assert request.model == str(tmp_path / "tiny")
    assert api.prepare(request).sparsity == 0.5
    assert api.EvalRequest("tiny", include_path=tmp_path).include_path == tmp_path, "which may be a path"


def test_healing_is_the_work_itself() -> None:
    assert (api.heal, api.estimate_heal) == (heal, estimate_heal)


ASKED: list[dict[str, Any]] = [
    {"method": "magnitude", "pattern": "rows", "params_removed": 0.2},
    {"method": "magnitude", "pattern": "columns", "params_removed": 0.1, "at_least": True},
    {"method": "magnitude", "pattern": "2:4"},
    {"method": "magnitude", "sparsity": 0.4},
    {"method": "wanda", "pattern": " 2:4"},
    {"method": "wanda", "pattern": "rows", "params_removed": 0.2, "modules": "mlp=0.5"},
    {"method": "wanda", "sparsity": 0.5, "modules": "auto"},
    {"method": "slicegpt", "params_removed": 0.1, "options": {"round": 1}},
    {"method": "slicegpt", "params_removed": 0.0},
    {"method": "shortgpt", "params_removed": 0.2},
    {"method": "shortgpt", "params_removed": 0.01, "at_least": True},
    {"method": "heads", "params_removed": 0.02},
    {"method": "llm_pruner", "params_removed": 0.2},
    {"method": "llm_surgeon", "params_removed": 0.1, "options": {"shots": 1}},
    {"method": "llm_surgeon", "pattern": "2:4", "options": {"shots": 1}},
    {"method": "disp_llm", "params_removed": 0.1, "options": {"steps": 1, "unmet": "cut"}},
    {"method": "magnitude", "params_removed": 0.2},
    {"method": "magnitude", "pattern": "rows", "params_removed": 0.2, "sparsity": 0.2},
    {"method": "magnitude", "pattern": "rows", "params_removed": 1.5},
    {"method": "magnitude", "pattern": "rows", "sparsity": 0.2, "at_least": True},
    {"method": "magnitude", "pattern": "row", "sparsity": 0.2},
    {"method": "slicegpt", "pattern": "rows", "sparsity": 0.2},
    {"method": "heads"},
]  # fmt: skip


def _refusal(work: Callable[[], Any]) -> str | None:
    try:
        work()
    except api.SecateurError as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [(asked, torch.float32) for asked in ASKED]
    + [(asked, torch.bfloat16) for asked in ASKED if asked["method"] in ("wanda", "slicegpt", "llm_pruner")],
    ids=str,
)
def test_a_plan_in_memory_is_that_of_a_prune(
    asked: dict[str, Any], dtype: torch.dtype, tmp_path: Path, windows: torch.Tensor, ids_file: str
) -> None:
    tiny_model("llama").to(dtype).save_pretrained(tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    assert model.dtype is dtype
    options = asked.get("options", {})
    direct = {name: value for name, value in asked.items() if name not in ("method", "options")}
    calibrates = api.find_method(asked["method"]).says.CALIBRATION is not None
    text = {"calibration": ids_file} if calibrates else {}

    def in_memory() -> api.Plan:
        return api.plan(model, asked["method"], windows if calibrates else None, **direct, **options)

    def in_a_folder() -> None:
        api.prune(api.Request(str(tmp_path / "tiny"), **{**asked, **text}), tmp_path / "out")

    said = [_refusal(work) for work in (in_a_folder, in_memory)]
    assert said[0] == said[1]
    if said[0] is not None:
        return
    expected, plan = api.read_plan(tmp_path / "out"), in_memory()
    for name in ("sparsity", "params_removed", "pattern", "options", "seed", "dtype", "modules"):
        assert plan.settings[name] == expected.settings[name], name
    for ours, theirs in zip(plan.blocks, expected.blocks, strict=True):
        assert ours.tensors().keys() == theirs.tensors().keys()
        assert all(tensor.equal(theirs.tensors()[name]) for name, tensor in ours.tensors().items())
    cut = api.cut(model, plan).state_dict()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert cut.keys() == written.keys()
    assert all(tensor.equal(written[name]) for name, tensor in cut.items()), "the same bytes"


def test_a_16_bit_model_is_planned_in_float32_on_a_cpu(windows: torch.Tensor) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    how = {"sparsity": 0.5, "modules": "auto"}
    default, exact = (api.plan(model, "wanda", windows, **how, **more) for more in ({}, {"dtype": torch.float32}))
    assert default.settings == exact.settings == api.plan(model, "wanda", windows, **how, dtype="float32").settings
    assert api.plan(model, "wanda", windows, sparsity=0.5, dtype=torch.bfloat16).settings["dtype"] == "bfloat16"
    assert all(parameter.dtype is torch.bfloat16 for parameter in model.parameters()), "it does not change"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["ids", "builtin"])
def test_perplexity_in_memory_is_that_of_the_folder(
    text: str, dtype: torch.dtype, tmp_path: Path, ids_file: str
) -> None:
    bundled = AutoModelForCausalLM.from_pretrained(bundled_folder())
    tokenizer = AutoTokenizer.from_pretrained(bundled.name_or_path)
    model = api.cut(bundled.to(dtype), api.plan(bundled.to(dtype), "magnitude", sparsity=0.5))
    model.train()
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    how: dict[str, Any] = {"text": ids_file if text == "ids" else text, "seqlen": 64, "limit": 2}
    if text == "ids":
        how |= {"seqlen": None}
    expected = api.evaluate(api.EvalRequest(str(tmp_path / "saved"), **how))
    measured = api.perplexity(model, None if text == "ids" else tokenizer, **how)
    assert measured == {name: expected[name] for name in ("ppl", "loss", "ppl_protocol", "device", "dtype")}
    assert measured["dtype"] == "float32"
    assert model.dtype is dtype
    assert model.training, "as it was"


def test_perplexity_of_the_bundled_model_takes_the_built_in_text() -> None:
    request = api.EvalRequest("bundled", limit=1)
    folder = bundled_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert api.perplexity(model, tokenizer, limit=1)["ppl_protocol"]["name"] == "builtin"
    assert api.estimate_evaluate(request)["ppl_protocol"] == api.perplexity(model, tokenizer, limit=1)["ppl_protocol"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "the text 'builtin' needs a tokenizer: give AutoTokenizer"),
        ({"limit": 0}, "limit 0: at least 1 is needed"),
        ({"seqlen": 65}, r"windows of 65 tokens .* are outside \[2, 64\]"),
        ({"protocol": "wikitext"}, "unknown protocol 'wikitext'"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
        ({"dtype": "fp32"}, "unknown dtype 'fp32'"),
    ],
)
def test_a_wrong_perplexity_is_refused(given: dict[str, Any], words: str, ids_file: str) -> None:
    how = {"text": ids_file if "dtype" in given else "builtin", **given}
    with pytest.raises(api.UsageError, match=words):
        api.perplexity(tiny_model("llama"), None, **how)
