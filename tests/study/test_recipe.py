"""`secateur run`: the steps of a recipe give the same bytes wherever and however often they are run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.core.errors import UsageError
from secateur.heal import tune
from secateur.models.save import RECIPE_PATH
from secateur.recipe.notation import load

STEPS = """
  - prune: {method: magnitude, sparsity: 0.25}
  - prune: {method: wanda, sparsity: 0.5, calibration: ids.npy}
  - eval: {text: ids.npy, limit: 2}
  - heal: {calibration: ids.npy, steps: 4, batch: 2, rank: 2, save_every: 1, lr: 1e-3, text: ids.npy, limit: 2}
  - eval: {text: ids.npy, limit: 2}
  - report
"""


@pytest.fixture
def recipe(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> Path:
    """A recipe beside its model and its text."""
    pytest.importorskip("peft")
    assert Path(ids_file).parent == tmp_path
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {saved('llama').name}\nsteps:{STEPS}")
    return file


def run(*args: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["run", *(str(arg) for arg in args)])
    return result.exit_code, result.stdout, result.stderr


def hashes(folder: Path) -> Mapping[str, str]:
    """Path -> SHA-256 of every file of the results in a folder."""
    files = [file for result in folder.glob("[0-9]-*") for file in result.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_recipe_gives_the_same_bytes_in_every_folder(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, stdout, stderr = run(recipe, "--out", tmp_path / "a")
    assert status == 0, stderr
    assert "step 6 of 6, report" in stderr
    assert "Next: " not in stdout
    assert (tmp_path / "a" / "report.html").is_file()
    monkeypatch.chdir(tmp_path / "a")
    status, _, stderr = run("../recipe.yaml", "--out", tmp_path / "elsewhere" / "b")
    assert status == 0, stderr
    first = hashes(tmp_path / "a")
    assert {name.partition("/")[0] for name in first} == {"1-prune", "2-prune", "3-heal"}
    assert first == hashes(tmp_path / "elsewhere" / "b")
    assert str(tmp_path) not in (tmp_path / "a" / "3-heal" / RECIPE_PATH).read_text()


def test_the_recipe_of_a_result_makes_it_again(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(recipe, "--out", tmp_path / "a")[0] == 0
    copied = tmp_path / "shared" / "copied.yaml"
    copied.parent.mkdir()
    copied.write_bytes((tmp_path / "a" / "3-heal" / RECIPE_PATH).read_bytes())
    content = load(copied)
    assert [next(iter(step)) for step in content["steps"]] == ["prune", "prune", "heal"]
    assert content["texts"] == {"ids.npy": sha256((tmp_path / "ids.npy").read_bytes()).hexdigest()}
    status, _, stderr = run(copied, "--out", tmp_path / "b")
    assert (status, "no 'ids.npy' beside the recipe or in the working folder" in stderr) == (2, True), stderr
    monkeypatch.chdir(tmp_path)  # the model and the text are found here
    status, stdout, stderr = run(copied, "--out", "b", "--json")
    assert status == 0, stderr
    assert "the same bytes as the recipe says (model.safetensors)" in stderr
    last = json.loads(stdout.splitlines()[-1])["records"][-1]
    assert (last["command"], last["same"], last["differs"]) == ("run", True, [])
    whole, again = hashes(tmp_path / "a"), hashes(tmp_path / "b")
    different = {name for name in whole.keys() | again.keys() if whole.get(name) != again.get(name)}
    assert different == {"2-prune/README.md", "3-heal/README.md"}, (
        "the evaluations, which made no weights, wrote into these cards"
    )
    _, _, stderr = run(tmp_path / "b" / "3-heal", "--out", "c")  # the folder stands for its recipe
    assert "the same bytes" in stderr


def test_what_the_commands_write_holds_its_recipe(recipe: Path, ids_file: str, tmp_path: Path) -> None:
    dense = str(tmp_path / "dense-llama")
    api.prune(api.Request(dense, "wanda", params_removed=0.1, pattern="rows", calibration=ids_file), tmp_path / "x")
    few = {"steps": 2, "batch": 2, "rank": 2, "text": ids_file, "limit": 1}
    api.heal(api.HealRequest(str(tmp_path / "x"), **few), tmp_path / "h")
    api.heal(api.HealRequest(str(tmp_path / "x"), keep_adapter=True, **few), tmp_path / "adapter")
    for name, weights in {
        "x": "model.safetensors",
        "h": "model.safetensors",
        "adapter": "adapter_model.safetensors",
    }.items():
        (shared := tmp_path / f"{name}.yaml").write_bytes((tmp_path / name / RECIPE_PATH).read_bytes())
        status, stdout, stderr = run(shared, "--out", tmp_path / f"again-{name}", "--json")
        assert status == 0, stderr
        last = json.loads(stdout)["records"][-1]
        assert last["same"] is True, stderr
        for file in (weights, "secateur/plan.json", RECIPE_PATH):
            assert (tmp_path / name / file).read_bytes() == (Path(last["result"]) / file).read_bytes(), file


def test_a_run_goes_on_between_and_inside_steps(
    recipe: Path,
    tmp_path: Path,
    interrupted_at: Callable[..., AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(recipe, "--out", tmp_path / "whole")[0] == 0
    out, read = tmp_path / "out", api.read_recipe(recipe)
    with interrupted_at("block-00001"):  # inside the first step
        list(api.run_recipe(read, out))
    assert run(recipe, "--out", out)[0] == 2  # without --resume
    done = api.run_recipe(read, out, resume=True)
    assert [next(done)["command"] for _ in range(3)] == ["prune", "prune", "eval"]
    done.close()  # between two steps
    with monkeypatch.context() as patch:  # inside the healing
        loss, calls = tune.next_token_loss, iter(range(100))
        patch.setattr(tune, "next_token_loss", lambda *args: loss(*args) if next(calls) < 3 else _interrupt())
        with pytest.raises(KeyboardInterrupt):
            list(api.run_recipe(read, out, resume=True))
    assert (out / "3-heal.partial").is_dir()
    status, _, stderr = run(recipe, "--out", out, "--resume")
    assert status == 0, stderr
    assert stderr.count("already there") == 2
    assert hashes(out) == hashes(tmp_path / "whole")
    before = (out / "records.jsonl").read_text()
    status, _, stderr = run(recipe, "--out", out, "--resume")  # all is done
    assert (status, stderr.count("already there")) == (0, 3), stderr
    assert (out / "records.jsonl").read_text() == before


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_changed_recipe_does_not_go_on(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().partition("  - eval")[0])
    assert run(recipe, "--out", tmp_path / "a")[0] == 0
    recipe.write_text(recipe.read_text().replace("0.25", "0.3"))
    status, _, stderr = run(recipe, "--out", tmp_path / "a", "--resume")
    assert (status, "step 1 (prune): --resume" in stderr) == (2, True), stderr
    status, _, stderr = run(recipe, "--out", tmp_path / "a", "--overwrite")
    assert status == 0, stderr


LATE = [
    ("  - prune: {method: wnda, sparsity: 0.5}", r"step 2 \(prune\): unknown method 'wnda'; did you mean wanda"),
    ("  - prune: {method: wanda, sparsity: 2}", r"step 2 \(prune\): sparsity 2 is outside"),
    (
        "  - prune: {method: wanda, sparsity: 0.5, set: {scop: row}}",
        "unknown option of wanda 'scop'; did you mean scope",
    ),
    ("  - prune: {method: slicegpt, sparsity: 0.5, set: {round: many}}", "round must be of type int, not 'many'"),
    ("  - prune: {pattern: rows, params_removed: 0.3}", r"step 2 \(prune\): the method is missing"),
    ("  - heal: {steps: 0}", r"step 2 \(heal\): --steps 0"),
    ("  - heal: {targets: attn}", "'attn' matches no linear module"),
    ("  - heal: {steps: 5}", r"step 2 \(heal\): calibration is missing"),
    ("  - eval: {limit: 0}", "--limit 0"),
    ("  - eval: {protocol: wiki}", "unknown protocol 'wiki'"),
    ("  - heal: {calibration: ids.npy, protocol: wiki}", "unknown protocol 'wiki'"),
    ("  - heal: {calibration: ids.npy, device: gpu}", "unknown device 'gpu'"),
]


@pytest.mark.parametrize(("step", "message"), LATE)
def test_every_step_is_checked_before_the_first_one_runs(step: str, message: str, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(f"{recipe.read_text().partition('  - prune: {method: wanda')[0]}{step}\n")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=message):
        next(api.run_recipe(api.read_recipe(recipe), out))
    assert not out.exists()
    with pytest.raises(UsageError, match=message):
        next(api.estimate_recipe(api.read_recipe(recipe)))


def test_a_step_without_a_method_takes_the_best_one(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(
        "model: dense-llama\nsteps:\n  - prune: {params_removed: 0.3, calibration: ids.npy, samples: 6}\n"
    )
    status, stdout, stderr = run(recipe, "--out", tmp_path / "out", "--json")
    assert status == 0, stderr
    record = json.loads(stdout)["records"][0]
    assert (record["command"], record["method"]) == ("reconstruct", "search")
    assert "method: search" in (tmp_path / "out" / "1-prune" / RECIPE_PATH).read_text()


def test_heal_needs_a_pruned_model(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text("model: dense-llama\nsteps:\n  - heal: {calibration: ids.npy}\n")
    with pytest.raises(UsageError, match="put a prune step before it"):
        next(api.run_recipe(api.read_recipe(recipe), tmp_path / "out"))


def test_the_model_can_be_another(recipe: Path, saved: Callable[..., Path], tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().partition("  - heal")[0])
    other = saved("opt")
    status, stdout, stderr = run(recipe, "--model", other, "--out", tmp_path / "a", "--json")
    assert status == 0, stderr
    records = json.loads(stdout)["records"]
    assert [record["model"] for record in records[:1]] == [str(other)]
    assert records[2]["shift"]["against"] == str(other), "the dense model is that of the run"
    shared = tmp_path / "a" / "2-prune" / RECIPE_PATH
    status, stdout, stderr = run(shared, "--model", tmp_path / "dense-llama", "--out", tmp_path / "b", "--json")
    assert status == 2  # the text is elsewhere
    (shared.parent / "ids.npy").write_bytes((tmp_path / "ids.npy").read_bytes())
    status, stdout, stderr = run(shared, "--out", tmp_path / "b")
    assert (status, "name it with --model" in stderr) == (2, True), stderr
    status, stdout, stderr = run(shared, "--model", tmp_path / "dense-llama", "--out", tmp_path / "b", "--json")
    assert (status, json.loads(stdout)["records"][-1]["same"]) == (0, None), stderr
    assert "not the one that the recipe was made with" in stderr


@pytest.mark.parametrize("model", ["tiny-llama", "org/tiny-llama", "./tiny-llama"])
def test_a_model_that_is_not_found_can_be_named(model: str, tmp_path: Path, saved: Callable[..., Path]) -> None:
    written = tmp_path / "by-hand.yaml"
    written.write_text(f"model: {model}\nsteps:\n- prune: {{method: magnitude, sparsity: 0.5}}\n")
    status, _, stderr = run(written, "--out", tmp_path / "a")
    assert status != 0
    assert stderr.startswith(f"error: {written}: ")
    assert stderr.rstrip().endswith("or give its folder with --model FOLDER")
    assert len(stderr.replace(str(written), "")) < 260, "a line to read, not the message of a library"
    status, _, stderr = run(written, "--out", tmp_path / "a", "--model", "nowhere")
    assert (status != 0, "with --model" in stderr) == (True, False), "which was done"
    status, _, stderr = run(written, "--out", tmp_path / "a", "--model", saved("llama"))
    assert status == 0, stderr


def test_other_bytes_and_other_versions_are_named(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text("model: dense-llama\nsteps:\n  - prune: {method: magnitude, sparsity: 0.5}\n")
    assert run(recipe, "--out", tmp_path / "a")[0] == 0
    text = (tmp_path / "a" / "1-prune" / RECIPE_PATH).read_text()
    recipe.write_text(text.replace("sparsity: 0.5", "sparsity: 0.4"))
    status, _, stderr = run(recipe, "--out", tmp_path / "b")
    assert status == 0
    assert "warning: other bytes than the recipe says, in model.safetensors: was a step changed" in stderr
    recipe.write_text(recipe.read_text().replace("  numpy: ", "  numpy: 0"))
    assert "it was made with numpy 0" in run(recipe, "--out", tmp_path / "c")[2]
    recipe.write_text(text.partition("made:")[0])
    assert "than the recipe says" not in run(recipe, "--out", tmp_path / "d")[2]


def test_dry_run_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    status, stdout, stderr = run(recipe, "--dry-run")
    assert status == 0, stderr
    assert "step 1 (prune)" in stdout
    assert "Nothing was written" in stdout
    assert "step 2 (prune): no estimate before its model is there" in stdout
    _, healing = stdout.split("step 4 (heal), on the model of the recipe, so at most:\n")
    assert "Would train " in healing
    assert "Expected, about: " in healing.split("step 5")[0]
    assert sorted(tmp_path.rglob("*")) == before
    assert run(recipe)[0] == 2, "--out is missing"


def test_a_healing_whose_text_is_out_of_reach_has_the_reason(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise api.SecateurError("text 'c4' is out of reach")

    monkeypatch.setattr("secateur.study.recipe.estimate_heal", unreachable)
    status, stdout, stderr = run(recipe, "--dry-run")
    assert status == 0, stderr
    assert "step 4 (heal): no estimate: text 'c4' is out of reach" in stdout.splitlines()


def test_against_can_be_left_out(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(
        "model: dense-llama\nsteps:\n  - eval: {text: ids.npy, limit: 1}\n"
        "  - prune: {method: magnitude, sparsity: 0.5}\n  - eval: {text: ids.npy, limit: 1, against: }\n"
    )
    records = list(api.run_recipe(api.read_recipe(recipe), tmp_path / "a"))
    assert [record.get("shift") for record in records if record["command"] == "eval"] == [None, None]
    assert records[2]["out"].endswith("1-prune")


def test_the_model_in_the_package_keeps_its_text(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: bundled\nsteps:\n  - prune: {method: magnitude, sparsity: 0.25}\n"
        "  - prune: {method: wanda, sparsity: 0.3, samples: 2, seqlen: 32}\n"
        "  - heal: {steps: 1, batch: 1, samples: 2, seqlen: 32, limit: 1}\n  - eval: {limit: 1, against: }\n"
    )
    _, second, healed, measured, _ = api.run_recipe(api.read_recipe(file), tmp_path / "a")
    assert second["calibration"]["spec"] == healed["heal"]["calibration"]["spec"] == "builtin"
    assert healed["ppl_protocol"]["spec"] == measured["ppl_protocol"]["spec"] == "builtin"
    *_, last = api.run_recipe(api.read_recipe(tmp_path / "a" / "3-heal"), tmp_path / "b")
    assert last["same"] is True
    assert (tmp_path / "a" / "3-heal" / RECIPE_PATH).read_bytes() == (
        tmp_path / "b" / "3-heal" / RECIPE_PATH
    ).read_bytes()
