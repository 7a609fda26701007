"""Another package adds a method and a family by entry points. It is the package that the documentation shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from secateur import api
from secateur.methods import method_names
from tests.tiny import BLOCKS, FFN, GROUPS, HEADS, HIDDEN

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = """
import json, sys
from typer.testing import CliRunner
from secateur.cli import app

for args in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == 0, (args, result.output)
    print(result.stdout.splitlines()[-1])
"""


def code(page: str, language: str) -> list[str]:
    """The examples of a page of the documentation."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with the package in it as an installer leaves it: modules, and their metadata."""
    folder = tmp_path / "site"
    package, metadata = folder / "my_package", folder / "my_package-1.0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").touch()
    (package / "chance.py").write_text(code("add-a-method.md", "python")[0])
    (package / "fern.py").write_text(code("add-a-family.md", "python")[-1])
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = []
    for page in ("add-a-method.md", "add-a-family.md"):
        for group, entries in tomllib.loads(code(page, "toml")[-1])["project"]["entry-points"].items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return folder


def secateur(site: Path, *commands: tuple[object, ...]) -> list[Any]:
    """The --json output of commands, in one process that finds the package."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    texts = json.dumps([[str(arg) for arg in command] for command in commands])
    program = [sys.executable, "-c", COMMANDS, texts]
    done = subprocess.run(program, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_its_method_is_listed_and_prunes_a_family_of_ours(
    saved: Callable[..., Path],
    site: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    prune = ("prune", saved("opt"), "--method", "chance", "--sparsity", 0.5, "--set", "seed=3", "--out", out)
    listed, shown, record = secateur(site, ("methods",), ("methods", "chance"), prune)
    assert [option["name"] for option in shown["options"]] == ["pattern", "seed"]
    assert shown["options"][1] == {"name": "seed", "default": 0, "meaning": "of the scores."}
    assert listed["methods"].keys() == {*method_names(), "chance"}
    assert "chance" not in method_names(), "where the package is not installed"
    assert listed["methods"]["chance"].startswith("Random pruning")
    assert (record["method"], record["options"]["seed"]) == ("chance", 3)
    masks = api.read_plan(out).blocks[1].masks
    weights = load_file(out / "model.safetensors")
    for name, path in {"q": "self_attn.q_proj", "down": "fc2"}.items():
        zero = weights[f"model.decoder.layers.1.{path}.weight"] == 0
        assert int(zero.sum()) == zero.numel() // 2
        assert zero.equal(~masks[name].unpack())


def test_help_shows_the_options_of_its_method(site: Path) -> None:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "secateur.cli", "prune", "--method", "chance", "--help"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Show this message and exit" in done.stdout
    assert "of the scores." in done.stdout.partition("options of chance")[2]


def test_its_family_is_pruned_by_a_method_of_ours_and_by_its_own(
    saved: Callable[..., Path],
    site: Path,
    ids_file: str,
    tmp_path: Path,
) -> None:
    fern = saved("llama").rename(tmp_path / "fern")
    config = json.loads((fern / "config.json").read_text())
    fern_says = {"model_type": "fern", "architectures": ["FernForCausalLM"]}
    (fern / "config.json").write_text(json.dumps(config | fern_says))
    with pytest.raises(api.SecateurError, match="fern"):
        api.prune(api.Request(str(fern), "magnitude", sparsity=0.5), tmp_path / "unknown")

    half, rows = ("--sparsity", 0.5, "--calibration", ids_file), ("--pattern", "rows", "--sparsity", 0.5)
    zeroed, narrow = secateur(
        site,
        ("prune", fern, "--method", "wanda", *half, "--out", tmp_path / "zeroed"),
        ("prune", fern, "--method", "chance", *rows, "--out", tmp_path / "narrow"),
    )
    assert zeroed["stock"]
    api.prune(api.Request(str(saved("llama")), "wanda", sparsity=0.5, calibration=ids_file), tmp_path / "llama")
    of_fern, of_llama = (tmp_path / name / "model.safetensors" for name in ("zeroed", "llama"))
    assert of_fern.read_bytes() == of_llama.read_bytes()

    head = (HEADS // GROUPS + 1) * 2 * (HIDDEN // HEADS) * HIDDEN  # of q, k, v and o that go with a key-value head
    gone = BLOCKS * (GROUPS // 2 * head + FFN // 2 * 3 * HIDDEN)
    assert narrow["params_before"] - narrow["params_after"] == gone
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["model_type"] == "fern"
