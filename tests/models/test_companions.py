"""Files of a checkpoint that hold no weights are copied to the result, also by `pack`, and from the hub."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from secateur import api
from secateur.models.companions import PATTERNS, companions, is_companion
from secateur.models.load import bundled_folder
from tests.folders import contents


def test_every_file_that_a_tokenizer_of_transformers_reads_is_one() -> None:
    classes = {
        name
        for names in TOKENIZER_MAPPING_NAMES.values()
        for name in ([names] if isinstance(names, str) else names or ())
        if name
    }
    names: set[str] = set()
    for name in sorted(classes):
        with suppress(ImportError):  # a class that needs a library which is not here
            names |= set(getattr(getattr(transformers, name, None), "vocab_files_names", {}).values())
    assert len(names) > 10
    assert [name for name in sorted(names) if not is_companion(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        *(
            "tekken.json",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
            "tokenizer.model.v3",
            "qwen.tiktoken",
            "generation_config.json",
        ),
        *("LICENSE", "LICENSE.txt", "LICENCE.md", "NOTICE", "Notice.txt", "USE_POLICY.md", "special_tokens_map.json"),
    ],
)
def test_companions_are_copied(name: str) -> None:
    assert is_companion(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "config.json",
            "README.md",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "modeling_own.py",
            "adapter_config.json",
        ),
        *(
            "tokenizer.safetensors",
            "quantize_config.json",
            "params.json",
            "onnx/tokenizer.json",
            "trainer_state.json",
            "tokenizer.py",
        ),
    ],
)
def test_other_files_are_not_copied(name: str) -> None:
    assert not is_companion(name)


@pytest.fixture
def templated(tmp_path: Path) -> Path:
    """The bundled model with named chat templates, a token of its own and mistral-common's vocabulary beside them."""
    folder = tmp_path / "templated"
    shutil.copytree(bundled_folder(), folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(
        "TOOL {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    (folder / "tekken.json").write_text("{}")
    (folder / "NOTICE").write_text("made by others")
    return folder


def agree(one: Path, other: Path) -> None:
    """Two tokenizers have the same templates and give the same ids."""
    first, second = (AutoTokenizer.from_pretrained(path) for path in (one, other))
    assert isinstance(first.chat_template, dict)
    assert set(first.chat_template) == {"default", "tool_use"}
    assert second.chat_template == first.chat_template
    chat = [{"role": "user", "content": "def f(x):"}]
    for name in first.chat_template:
        assert second.apply_chat_template(chat, chat_template=name, tokenize=False) == first.apply_chat_template(
            chat, chat_template=name, tokenize=False
        )
    text = "import os\n\n\ndef main() -> None: ...  # \N{GREEK SMALL LETTER PI}"
    assert second(text)["input_ids"] == first(text)["input_ids"]
    assert set(companions(one)) <= set(companions(other))


def test_templates_and_vocabularies_arrive_also_packed(templated: Path, tmp_path: Path) -> None:
    api.prune(api.Request(str(templated), "magnitude", sparsity=0.5), tmp_path / "out")
    agree(templated, tmp_path / "out")
    api.pack(str(tmp_path / "out"), tmp_path / "packed")
    agree(templated, tmp_path / "packed")
    api.unpack(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "out")


def test_templates_arrive_from_the_hub(templated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / "0123abc"

    def download(
        name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None = None
    ) -> str:
        """As the hub does it: patterns of fnmatch over whole paths, in which `*` stops at nothing."""
        for file in templated.rglob("*"):
            path = file.relative_to(templated).as_posix()
            wanted = any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns)
            if (
                file.is_file()
                and wanted
                and not any(fnmatch.fnmatch(path, pattern) for pattern in ignore_patterns or ())
            ):
                (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, snapshot / path)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (templated / "onnx").mkdir()
    (templated / "onnx" / "config.json").write_text("{}")
    api.prune(api.Request("org/model", "magnitude", sparsity=0.5), tmp_path / "out")
    agree(templated, tmp_path / "out")
    assert not (snapshot / "onnx").exists()


def test_a_model_pruned_before_comes_from_the_hub_with_its_plan(templated: Path, tmp_path: Path) -> None:
    from secateur.models.load import _HUB_FOLDERS

    assert any(fnmatch.fnmatch("secateur/plan.json", pattern) for pattern in _HUB_FOLDERS)
    api.prune(api.Request(str(templated), "magnitude", sparsity=0.5), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "secateur" / "plan.json").read_text())["method"] == "magnitude"


def test_the_patterns_take_no_weights_along(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("llama")
    for name in ("tokenizer.bin", "vocab.pt", "tokenizer.gguf"):
        (folder / name).write_bytes(b"weights of another format")
    assert any(fnmatch.fnmatch("tokenizer.bin", pattern) for pattern in PATTERNS)
    api.prune(api.Request(str(folder), "magnitude", sparsity=0.5), tmp_path / "out")
    assert not {"tokenizer.bin", "vocab.pt", "tokenizer.gguf"} & {file.name for file in (tmp_path / "out").iterdir()}
