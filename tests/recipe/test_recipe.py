"""Recipes as files: what is read, what is refused, and that what is written is read back as the same request."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.core.errors import SecateurError, UsageError
from secateur.methods import find_method, method_names
from secateur.prune.settings import prepared_settings, resolved
from secateur.recipe.fields import KINDS, PLACES, options_of
from secateur.recipe.notation import dump, load
from secateur.recipe.write import step_of
from secateur.requests import HealRequest, Request
from tests.cli.commands import COMMANDS

PRUNE = "  - prune: {method: wanda, sparsity: 0.5}\n"
HEAD = f"model: bundled\nsteps:\n{PRUNE}"


def read(folder: Path, text: str, **more: Any) -> api.Recipe:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return api.read_recipe(file, **more)


def test_steps_have_the_options_of_the_commands(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        "model: bundled\nsteps:\n"
        "  - prune: {method: sparsegpt, pattern: 2:4, text-field: body, set: {blocksize: 64, damping: 1e-3}}\n"
        "  - heal: {lr: 2e-4, steps: 5, targets: [q, k], completion_only: true, checkpointing: false, eval: false}\n"
        "  - eval: {tasks: 'cloze, piqa', against: , eval-seqlen: 64}\n"
        "  - eval: {seqlen: 64}\n"
        "  - report:\n",
    )
    first, second, third, fourth, last = recipe.steps
    options = {"blocksize": "64", "damping": "0.001"}
    assert first.request == Request("", "sparsegpt", pattern="2:4", text_field="body", options=options)
    assert second.request == HealRequest(
        "", lr=2e-4, steps=5, targets=("q", "k"), completion_only=True, checkpointing=False, evaluate=False
    )
    assert (third.request.tasks, third.given) == (("cloze", "piqa"), {"tasks", "against", "seqlen"})
    assert third.request.seqlen == 64
    assert (fourth.request, fourth.given) == (api.EvalRequest("", seqlen=64), {"seqlen"})
    assert (last.kind, last.request) == ("report", None)


@pytest.mark.parametrize("kind", [kind for kind, request in KINDS.items() if request is not None])
def test_every_option_of_a_step_is_one_of_its_command(kind: str) -> None:
    command = {option.lstrip("-") for parameter in COMMANDS[kind].params for option in parameter.opts}
    assert {name.replace("_", "-") for name in options_of(kind)} <= command | {"checkpointing"}


def test_every_field_with_a_path_is_looked_up_beside_the_recipe() -> None:
    requests = [request for request in KINDS.values() if request is not None]
    named = {field.name for request in requests for field in fields(request)}
    paths = {field.name for request in requests for field in fields(request) if "Path" in str(field.type)}
    assert paths <= set(PLACES) <= named


def test_the_model_may_be_another(tmp_path: Path) -> None:
    own = read(tmp_path, "model: a/b\nrevision: abc\n" + HEAD.partition("\n")[2])
    assert (own.model, own.revision, own.replaced) == ("a/b", "abc", False)
    other = read(tmp_path, "model: a/b\nrevision: abc\n" + HEAD.partition("\n")[2], model="c")
    assert (other.model, other.revision, other.replaced) == ("c", None, True)
    assert read(tmp_path, f"steps:\n{PRUNE}", model="c", revision="main").revision == "main"


def test_files_are_looked_up_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for place in ("shared", "work"):
        (tmp_path / place / "both.txt").write_text(place)
    (tmp_path / "work" / "mine.txt").write_text("mine")
    (tmp_path / "shared" / "dense").mkdir()
    text = (
        "model: dense\nsteps:\n  - prune: {method: wanda, sparsity: 0.5, calibration: both.txt}\n"
        "  - eval: {text: mine.txt}\n  - eval: {text: wikitext2}\n"
    )
    recipe = read(tmp_path / "shared", text)
    assert recipe.model == str(tmp_path / "shared" / "dense")
    assert recipe.steps[0].request.calibration == str(tmp_path / "shared" / "both.txt")
    assert [step.request.text for step in recipe.steps[1:]] == ["mine.txt", "wikitext2"]


def test_another_text_than_that_of_the_recipe_is_refused(tmp_path: Path) -> None:
    text = (
        "model: bundled\nsteps:\n  - prune: {method: wanda, sparsity: 0.5, calibration: a.txt}\ntexts:\n  a.txt: 'abc'"
    )
    (tmp_path / "a.txt").write_text("some words")
    with pytest.raises(UsageError, match=r"step 1 \(prune\): calibration: '.*a\.txt' is another file .* `texts`"):
        read(tmp_path, text)


WRONG = [
    ("", "is empty"),
    ("# nothing\n", "is empty"),
    ("- prune\n", "this is a list"),
    ("wanda\n", "this is 'wanda'"),
    ("model: bundled\n", "steps has no value"),
    ("model: bundled\nsteps: prune\n", "steps is 'prune'; a list is expected"),
    ("model: bundled\nsteps: []\n", "steps is a list|steps"),
    (f"steps:\n{PRUNE}", "model is missing.*--model"),
    (f"model: 7\nsteps:\n{PRUNE}", "model is 7; text is expected"),
    (HEAD + "seed: 1\n", "unknown entry 'seed'"),
    (HEAD + "made: yes\n", "made is 'yes'"),
    (HEAD + "  - prun: {method: wanda}\n", r"step 2: unknown step 'prun'; did you mean prune\?"),
    (HEAD + "  - Heal\n", "unknown step 'Heal'; did you mean heal"),
    (HEAD + "  - 5\n", "step 2: is 5; a step is expected"),
    (HEAD + "  - \n", "step 2: has no value"),
    (HEAD + "  - heal: 5\n", r"step 2 \(heal\): is 5; options are expected"),
    (HEAD + "  - heal:\n    steps: 5\n", "step 2: one step is expected, this has heal, steps: indent"),
    (HEAD + "  - steps: 5\n    heal:\n", "write the step before its options"),
    (HEAD + "  - heal: {step: 5}\n", "unknown option 'step'; did you mean steps"),
    (HEAD + "  - heal: {steps: many}\n", r"step 2 \(heal\): steps is 'many'; a whole number is expected"),
    (HEAD + "  - heal: {steps: true}\n", "steps is true; a whole number"),
    (HEAD + "  - heal: {steps: 5.5}\n", "steps is 5.5; a whole number"),
    (HEAD + "  - heal: {steps: }\n", "steps has no value; a whole number"),
    (HEAD + "  - heal: {lr: [1]}\n", "lr is a list; a number is expected"),
    (HEAD + "  - heal: {completion_only: yes}\n", "completion_only is 'yes'; true or false is expected"),
    (HEAD + "  - heal: {targets: 5}\n", "targets is 5; names are expected"),
    (HEAD + "  - heal: {model: x}\n", "'model' is no option of a step: a step works on the result"),
    (HEAD + "  - heal: {out: x}\n", "'out' is no option of a step.*secateur run"),
    (HEAD + "  - heal: {keep-adapter: true, keep_adapter: true}\n", "given twice"),
    (HEAD + "  - heal: {keep-adapter: true}\n  - eval\n", "writes an adapter and no model"),
    (HEAD + "  - report: {title: x}\n", r"unknown option 'title' \(known: none\)"),
    ("model: bundled\nsteps: [report]\n", "nothing to report on"),
    ("model: bundled\nsteps:\n  - prune: {sparsity: 0.5}\n", "method is missing"),
    ("model: bundled\nsteps:\n  - prune\n", "method is missing"),
    ("model: bundled\nsteps:\n  - prune: {method: wanda, sparsity: 50%}\n", "sparsity is '50%'; a number"),
    ("model: bundled\nsteps:\n  - prune: {method: wanda, revision: x}\n", "at the top of the recipe"),
    ("model: bundled\nsteps:\n  - prune: {method: wanda, pattern: 24}\n", "pattern is 24.*in quotes, as in '24'"),
    ("model: bundled\nsteps:\n  - prune: {method: wanda, set: a=1}\n", "set is 'a=1'; options of the method"),
    ("model: bundled\nsteps:\n  - prune: {method: wanda, set: {a: [1]}}\n", "a is a list; one value"),
    ("model: bundled\nsteps:\n  - prune: {method: wanda, calibration: no.txt}\n", "no 'no.txt' beside the recipe"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as error:
        read(tmp_path, text)
    assert "recipe.yaml" in str(error.value)


NO_YAML = [
    (HEAD + "  - heal: {steps: 5\n", r"line 5: not YAML .*colons"),
    ("model: bundled\nsteps:\n\t- prune\n", "line 3: a tab"),
    (HEAD + "model: other\n", "line 4: 'model' is given twice"),
    ("model: bundled\nsteps: [{prune: {method: wanda, seed: 1, seed: 2}}]\n", "line 2: 'seed' is given twice"),
    ("model: &name bundled\nsteps: [*name]\n", "line 1: anchors"),
    ("model: !!python/object/apply:os.getcwd []\nsteps: [eval]\n", "line 1: a tag"),
    ("model: bundled\n---\nmodel: other\n", "line 2"),
    ("model: \x00\n", "recipe.yaml: not YAML"),
]


@pytest.mark.parametrize(("text", "message"), NO_YAML, ids=range(len(NO_YAML)))
def test_the_line_that_is_no_yaml_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=message):
        read(tmp_path, text)


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe"):
        api.read_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match="no recipe"):
        api.read_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SecateurError, match="not UTF-8"):
        api.read_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(b" " * (1 << 21))
    with pytest.raises(SecateurError, match="at most"):
        api.read_recipe(tmp_path)


def test_values_are_read_as_they_are_written(tmp_path: Path) -> None:
    values = ["2:4", "1e5", "no", "off", "010", "1234567", "0x10", "null", "~", "true", "1.5", "", "2001-01-01", "= a"]
    content = {"texts": values, "numbers": [10, -3, 0.5, 1e-05, 1e20, 1e-300], "others": [True, False, None]}
    (tmp_path / "x.yaml").write_text(dump(content))
    assert load(tmp_path / "x.yaml") == content
    (tmp_path / "y.yaml").write_text("[2:4, 1e-4, 010, no, off, 2001-01-01, -.5, 1_000, True]")
    assert load(tmp_path / "y.yaml") == ["2:4", 1e-4, 10, "no", "off", "2001-01-01", -0.5, "1_000", True]


ASKED = [
    *(
        Request("", method, sparsity=0.5, samples=4, seqlen=32, seed=3, options=dict(find_method(method).says.QUICK))
        for method in method_names()
    ),
    Request("", "wanda", pattern="1:4", samples=4, seqlen=32),
    Request("", "wanda", modules="q=0.5,*.down_proj=0.25", samples=4, seqlen=32, stock_only=True),
    Request("", "wanda", sparsity=0.5, modules="auto", samples=4, seqlen=32, options={"scope": "matrix"}),
    Request("", "magnitude", params_removed=0.2, at_least=True, pattern="rows", dtype="bfloat16"),
    Request("", "magnitude", sparsity=0.0),
    Request("", "slicegpt", samples=4, seqlen=32, options={"energy": "0.01"}),
    Request("", "disp_llm", sparsity=0.5, samples=4, seqlen=32, options={"steps": 3, "lr": 1e-5, "scale": True}),
]


@pytest.mark.parametrize("asked", ASKED, ids=[f"{request.method}-{n}" for n, request in enumerate(ASKED)])
def test_the_recipe_of_every_result_gives_its_settings_again(asked: Request, tmp_path: Path) -> None:
    asked = replace(asked, model="bundled")
    prepared = api.prepare(asked)
    windows = None if prepared.calibration is None else api.read_windows(prepared)
    settings = prepared_settings(prepared, windows)
    step, texts = step_of("prune", asked, resolved(prepared, settings))
    recipe = read(tmp_path, dump({"model": "bundled", "steps": [step], "texts": texts}))
    again = api.prepare(replace(recipe.steps[0].request, model="bundled"))
    assert (again.job.options, again.job.rates) == (prepared.job.options, prepared.job.rates)
    assert prepared_settings(again, windows) == settings
    assert step_of("prune", again.request, resolved(again, settings)) == (step, texts)


def test_two_texts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "words.txt").write_text(part)
    first, second = (str(tmp_path / part / "words.txt") for part in ("train", "test"))
    step, texts = step_of("prune", Request("x", "wanda", calibration=first), {})
    assert (step["prune"]["calibration"], texts.keys()) == ("words.txt", {"words.txt"})
    step, texts = step_of("heal", HealRequest("x", calibration=second), {}, texts)
    assert (step["heal"]["calibration"], texts.keys()) == ("test/words.txt", {"words.txt", "test/words.txt"})
    same, texts = step_of("heal", HealRequest("x", calibration=first), {}, texts)
    assert (same["heal"]["calibration"], len(texts)) == ("words.txt", 2)


def test_the_text_that_healing_is_measured_on_need_not_travel(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("to measure")
    request = HealRequest("x", calibration="builtin", text=str(tmp_path / "words.txt"), limit=2, eval_seqlen=64)
    step, texts = step_of("heal", request, {})
    assert step["heal"]["eval"] is False
    assert (texts, step["heal"].keys() & {"text", "limit", "eval_seqlen", "protocol"}) == ({}, set())


@pytest.mark.slow
def test_the_page_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0])
    said = ""
    for block in re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            name, *words = shlex.split(line, comments=True)
            if name == "cp":
                shutil.copy(*words)
                continue
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, f"{line}: {result.output}"
            said += result.stderr
    (promised,) = re.findall(r"^```text\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    assert promised in said.replace(f"{tmp_path}/", "")
