"""The tokenizer of a runtime result, in fresh processes without secateur and without a network.

AutoTokenizer reads config.json first. Its `model_type` is not one of transformers, so the code in the folder is asked
for, unless a configuration is given, or the code is trusted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedConfig

from secateur import api
from secateur.models.load import bundled_folder
from tests.tiny import MODEL_TYPES

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEXT = "def main():\n    return 1"
LOAD = """
import json, sys, warnings
warnings.simplefilter("always")
from transformers import AutoTokenizer, PreTrainedConfig
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]{how})
chat = tokenizer.apply_chat_template([dict(role="user", content="a")], tokenize=False)
print(json.dumps([tokenizer(sys.argv[2])["input_ids"], chat]))
assert "secateur" not in sys.modules
"""


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A runtime result of a model with a chat template."""
    shutil.copytree(bundled_folder(), tmp_path / "dense")
    (tmp_path / "dense" / "chat_template.jinja").write_text(TEMPLATE)
    request = api.Request(str(tmp_path / "dense"), "magnitude", modules="*.0.mlp.*=0.5", pattern="columns")
    assert not api.prune(request, tmp_path / "out")["stock"]
    return tmp_path / "out"


def load_in_a_fresh_process(folder: Path, how: str) -> tuple[list[str], str, bool]:
    """The lines of stdout, all of stderr, and whether code of the folder was copied to run it."""
    home = folder.parent / "home"
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(how=how), str(folder), TEXT],
        input="",
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines(), done.stderr, any(home.rglob("modeling_secateur.py"))


def expected(folder: Path) -> str:
    return json.dumps([AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"], "<user>a"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "runs_code"), [(", config=PreTrainedConfig()", False), (", trust_remote_code=True", True)]
)
def test_it_loads_with_its_template_without_a_question_or_a_warning(result: Path, how: str, runs_code: bool) -> None:
    stdout, stderr, ran = load_in_a_fresh_process(result, how)
    assert stdout == [expected(bundled_folder())]
    assert stderr == ""
    assert ran is runs_code


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="transformers asks for the code of every model_type that it does not know")
def test_it_loads_with_nothing_but_the_folder(result: Path) -> None:
    stdout, stderr, ran = load_in_a_fresh_process(result, "")
    assert (stdout, stderr, ran) == ([expected(bundled_folder())], "", False)


@pytest.mark.parametrize("named", [None, "PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_runtime_result_has_the_tokens_of_its_original(
    model_type: str, named: str | None, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """Transformers takes another class for some model types than for ours, if the folder does not name it."""
    dense = saved(model_type)
    for file in bundled_folder().glob("tokenizer*"):
        shutil.copyfile(file, dense / file.name)
    config = json.loads((dense / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (dense / "tokenizer_config.json").write_text(json.dumps(config | ({"tokenizer_class": named} if named else {})))
    try:
        ids = AutoTokenizer.from_pretrained(dense)(TEXT)["input_ids"]
    except Exception:
        pytest.skip("transformers cannot load this tokenizer for this type")
    request = api.Request(str(dense), "magnitude", sparsity=0.4, pattern="rows", options={"scope": "model"})
    assert not api.prune(request, tmp_path / "out")["stock"]
    alone = AutoTokenizer.from_pretrained(tmp_path / "out", config=PreTrainedConfig())
    assert alone(TEXT)["input_ids"] == ids, "in a process without secateur"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == ids
