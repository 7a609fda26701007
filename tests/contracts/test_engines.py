"""The weights that inference engines find in a folder of ours are its weights, and nothing else.

The patterns are those of the engines' own loaders (vLLM 0.32, SGLang 0.5, text-generation-inference 3, llama.cpp's
convert_hf_to_gguf.py, mlx-lm 0.28, CTranslate2 4.8, which asks transformers). An engine takes the first pattern that
matches anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur import api
from secateur.models.load import weight_files
from tests.tiny import BLOCKS

ENGINES = {
    "vLLM": ("*.safetensors", "*.bin", "*.pt"),
    "SGLang": ("*.safetensors", "*.bin", "*.pt"),
    "text-generation-inference": ("*.safetensors",),
    "llama.cpp": ("model*.safetensors", "pytorch_model*.bin"),
    "llama.cpp, Mistral's format": ("consolidated*.safetensors",),
    "MLX": ("model*.safetensors", "weight*.safetensors"),
    "CTranslate2": ("model.safetensors", "model-*.safetensors"),
}
CASES = {
    "stock": {"method": "wanda", "sparsity": 0.5},
    "stock, units": {"method": "magnitude", "sparsity": 0.5, "pattern": "rows"},
    "new weights": {"method": "sparsegpt", "sparsity": 0.5},
    "unequal widths": {"method": "magnitude", "sparsity": 0.4, "pattern": "rows", "options": {"scope": "model"}},
    "sliced": {"method": "slicegpt", "sparsity": 0.25},
    "selected": {"method": "disp_llm", "sparsity": 0.2, "options": {"unmet": "cut", "steps": 2}},
    "blocks dropped": {"method": "shortgpt", "sparsity": 1 / BLOCKS},
}


def taken(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    return next((found for pattern in patterns if (found := {file.name for file in folder.glob(pattern)})), set())


def check(folder: Path) -> None:
    weights = {file.name for file in weight_files(folder, str(folder))}
    assert weights
    for engine, patterns in ENGINES.items():
        assert taken(folder, patterns) == (set() if "Mistral" in engine else weights), engine
    assert json.loads((folder / "secateur" / "plan.json").read_text())["blocks"]
    assert not [file for file in folder.glob("*.json") if file.name.startswith("plan")]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_engines_find_the_weights_alone(
    case: str, sharded: bool, saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sharded:
        monkeypatch.setattr("secateur.models.save.ONE_FILE_UP_TO", 0)
    api.prune(api.Request(str(saved("llama")), **{"calibration": ids_file, **CASES[case]}), tmp_path / "out")  # type: ignore[arg-type]
    check(tmp_path / "out")


def test_engines_find_the_weights_of_a_healed_folder(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    api.prune(api.Request(str(saved("llama")), "wanda", sparsity=0.5, calibration=ids_file), tmp_path / "out")
    api.heal(
        api.HealRequest(str(tmp_path / "out"), ids_file, steps=2, rank=2, samples=2, text=ids_file), tmp_path / "healed"
    )
    check(tmp_path / "healed")


def test_a_packed_folder_holds_no_weights_for_them(saved: Callable[..., Path], tmp_path: Path) -> None:
    api.prune(api.Request(str(saved("llama")), "magnitude", sparsity=0.5), tmp_path / "out")
    api.pack(str(tmp_path / "out"), tmp_path / "packed")
    assert not any(taken(tmp_path / "packed", patterns) for patterns in ENGINES.values())


def test_folders_of_version_0_1_are_still_read(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    """The plan lay at the root, and packed weights too."""
    request = api.Request(str(saved("llama")), "wanda", sparsity=0.5, calibration=ids_file)
    made = api.prune(request, tmp_path / "out")
    new = api.read_plan(tmp_path / "out")
    for file in (tmp_path / "out" / "secateur").iterdir():
        file.rename(tmp_path / "out" / file.name)
    (tmp_path / "out" / "secateur").rmdir()
    content = json.loads((tmp_path / "out" / "plan.json").read_text())
    for added in ("model_fingerprint", "params_removed", "zero_rows", "sparsity_of"):
        del content[added]
    del content["calibration"]["file_sha256"]
    content["model"] = request.model
    content["calibration"]["spec"] = ids_file
    (tmp_path / "out" / "plan.json").write_text(json.dumps(content))
    assert api.read_plan(tmp_path / "out").blocks == new.blocks
    assert api.evaluate(api.EvalRequest(str(tmp_path / "out"), text=ids_file))["method"] == "wanda"
    again = api.prune(request, tmp_path / "out", resume=True)
    assert again == made | {"seconds": again["seconds"]}
    healed = api.heal(
        api.HealRequest(str(tmp_path / "out"), steps=2, rank=2, samples=2, text=ids_file), tmp_path / "healed"
    )
    assert healed["heal"]["calibration"]["spec"] == ids_file
    check(tmp_path / "healed")
    api.pack(str(tmp_path / "out"), tmp_path / "packed")
    (tmp_path / "packed" / "secateur" / "packed.safetensors").rename(tmp_path / "packed" / "packed.safetensors")
    api.unpack(tmp_path / "packed", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
