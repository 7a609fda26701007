"""Text of a pruned model beside the dense model's: against a search written here, with and without a chat template."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.cli.terminal import record_table
from secateur.cli.texts import generated_parts, sample_parts
from secateur.models.load import bundled_folder

NEW, PROMPT = 12, "def main():"
TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}# bot:{% endif %}"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The bundled model in a folder that a test may change."""
    shutil.copytree(bundled_folder(), tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@torch.inference_mode()
def likeliest(folder: Path, text: str, new: int = NEW) -> list[int]:
    """The likeliest tokens, one after the other, each from a forward pass over everything before."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer(text, add_special_tokens="# bot" not in text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(new):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, start:].tolist()  # type: ignore[no-any-return]


def decoded(folder: Path, ids: list[int]) -> str:
    return str(AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True))


def test_greedy_text_of_both_models(tmp_path: Path) -> None:
    api.prune(api.Request("bundled", "magnitude", sparsity=0.6), tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    record = api.generate(api.GenerateRequest(str(tmp_path / "out"), "bundled", (PROMPT, "import os"), new=NEW))
    for entry, prompt in zip(record["texts"], (PROMPT, "import os"), strict=True):
        assert entry["prompt"] == prompt
        assert entry["text"] == decoded(bundled_folder(), likeliest(tmp_path / "out", prompt))
        assert entry["text_dense"] == decoded(bundled_folder(), likeliest(bundled_folder(), prompt))
        assert entry["text"] != entry["text_dense"]
        assert entry["tokens"] == entry["tokens_dense"] == NEW
    assert (record["chat"], record["chat_dense"]) == (False, False)
    assert sorted(tmp_path.iterdir()) == before, "nothing is written: nothing was measured"


def test_settings_of_the_checkpoint_do_not_change_the_text(copied: Path) -> None:
    edit(copied / "generation_config.json", do_sample=True, temperature=5.0, repetition_penalty=3.0, max_new_tokens=2)
    (entry,) = api.generate(api.GenerateRequest(str(copied), prompt=PROMPT, new=NEW))["texts"]
    assert entry["text"] == decoded(copied, likeliest(bundled_folder(), PROMPT))


def test_the_text_ends_where_the_checkpoint_says(copied: Path) -> None:
    ids = likeliest(copied, PROMPT)
    edit(copied / "generation_config.json", eos_token_id=[1, ids[4]])
    (entry,) = api.generate(api.GenerateRequest(str(copied), prompt=PROMPT, new=NEW))["texts"]
    assert entry["tokens"] == ids.index(ids[4]) + 1 < NEW
    assert entry["text"] == decoded(copied, ids[: entry["tokens"]])


def test_the_chat_template_of_each_model_or_none(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    asked = api.GenerateRequest(str(copied), "bundled", PROMPT, new=NEW)
    record = api.generate(asked)
    assert (record["chat"], record["chat_dense"]) == (True, False)
    (entry,) = record["texts"]
    assert entry["text"] == decoded(copied, likeliest(bundled_folder(), f"# user: {PROMPT}\n# bot:"))
    assert entry["text_dense"] == decoded(copied, likeliest(bundled_folder(), PROMPT)) != entry["text"]
    plain = api.generate(api.GenerateRequest(str(copied), prompt=PROMPT, new=NEW, chat=False))
    assert not plain["chat"]
    assert plain["texts"][0]["text"] == entry["text_dense"]


def test_draws_repeat_with_their_seed_and_leave_other_draws_alone(tmp_path: Path) -> None:
    def texts(seed: int, prompts: tuple[str, ...] = (PROMPT, "import os"), **more: Any) -> list[str]:
        request = api.GenerateRequest("bundled", "bundled", prompts, new=NEW, temperature=1.0, seed=seed, **more)
        entries = api.generate(request)["texts"]
        assert all(entry["text"] == entry["text_dense"] for entry in entries), "one model, one seed, one text"
        return [entry["text"] for entry in entries]

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = texts(0)
    assert torch.equal(torch.rand(1), expected)
    assert texts(0) == first != texts(1)
    assert texts(0, ("import os",)) == first[1:], "a prompt gives the same text, whatever stands before it"
    greedy = api.generate(api.GenerateRequest("bundled", prompt=(PROMPT, "import os"), new=NEW))["texts"]
    assert texts(0, top_p=1e-6) == [entry["text"] for entry in greedy], "the first token has that share alone"


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["generate", *map(str, args)])
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr.strip()


def test_prompts_of_the_command_line_and_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffimport os\r\n\r\n  x = 1\r\n".encode())
    status, stdout, _ = run("bundled", "--prompt", PROMPT, "--prompt", "a", "--prompts", file, "--new", 2, "--json")
    assert status == 0
    assert [entry["prompt"] for entry in json.loads(stdout)["texts"]] == [PROMPT, "a", "import os", "  x = 1"]


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ([], 2, "there is no prompt: give --prompt"),
        (["def main():"], 2, "'def main():' is in the place of the dense model"),
        (["--prompt", "  "], 2, "--prompt is empty"),
        (["--prompt", "caf\udce9"], 2, "--prompt 'caf\\udce9': not UTF-8 text"),
        (["--prompts", "nowhere.txt"], 2, "--prompts nowhere.txt: does not exist"),
        (["--prompts", "."], 2, "is a folder"),
        (["--prompts", "{latin}"], 2, "not UTF-8 text (byte 1)"),
        (["--prompts", "{blank}"], 2, "has no line with text"),
        (["--prompt", "a", "--new", "0"], 2, "--new 0: at least 1"),
        (["--prompt", "a", "--new", "511"], 2, "has 2 tokens, and with --new 511 that is more than the 512 positions"),
        (["--prompt", "a " * 600], 2, "; shorten the prompt"),
        (["--prompt", "a", "--temperature", "-1"], 2, "--temperature -1: allowed are 0"),
        (["--prompt", "a", "--temperature", "nan"], 2, "--temperature nan: allowed are 0"),
        (["--prompt", "a", "--temperature", "1e-30"], 2, "--temperature 1e-30: allowed are 0"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "0"], 2, "--top-p 0 is outside (0, 1]"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "nan"], 2, "--top-p nan is outside (0, 1]"),
        (["--prompt", "a", "--top-p", "0.9"], 2, "add --temperature"),
        (["--prompt", "a", "--seed", "-1"], 2, "--seed -1 is outside"),
        (["./nowhere", "--prompt", "a"], 2, "no folder './nowhere'"),
        (["--prompt", "a", "--dtype", "int8"], 2, "unknown dtype 'int8'"),
    ],
)
def test_what_is_refused_on_the_command_line(args: list[str], status: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"a\xe9")
    (tmp_path / "blank.txt").write_bytes(b"\n \n")
    written = [arg.format(latin=tmp_path / "latin.txt", blank=tmp_path / "blank.txt") for arg in args]
    done, stdout, stderr = run("bundled", *written)
    assert (done, stdout) == (status, "")
    assert stderr.startswith("error: ")
    assert words in stderr
    assert "\n" not in stderr


def test_a_template_that_fails_is_named(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text("{{ raise_exception('a system message is needed') }}")
    status, _, stderr = run(copied, "--prompt", "a")
    assert status == 1
    assert "a system message is needed" in stderr
    assert "--no-chat" in stderr
    assert run(copied, "--prompt", "a", "--no-chat", "--new", 2)[0] == 0


def test_a_model_without_a_tokenizer_and_one_that_is_broken(copied: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copied)
    model.lm_head.weight.data[5] = torch.nan
    model.save_pretrained(copied)
    for more in ([], ["--temperature", 1]):
        status, _, stderr = run(copied, "--prompt", "a", *more)
        assert (status, "its logits are not finite after 2 tokens" in stderr) == (1, True), stderr
    for file in copied.glob("tokenizer*"):
        file.unlink()
    status, _, stderr = run(copied, "--prompt", "a")
    assert status == 1
    assert "copy the tokenizer files of the original" in stderr


def printed(parts: list[Any], width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for part in parts:
        console.print(part)
    console.file.close()
    return [line.rstrip() for line in console.export_text().splitlines()]


ODD = "x = [/b]  # [int] :smile:\n\n    return\x1b[31m\r" + " word" * 30


def test_text_is_printed_as_it_is_in_80_columns() -> None:
    entry = {"prompt": PROMPT, "text": ODD, "tokens": 9, "text_dense": " \n", "tokens_dense": 1}
    record = {"model": "runs/out", "dense": "org/out", "chat": True, "chat_dense": False, "texts": [entry]}
    lines = printed(generated_parts(record))
    assert max(map(len, lines)) <= 80
    assert lines[:6] == ["prompt", f"  {PROMPT}", "", "out, 9 tokens, chat", "  x = [/b]  # [int] :smile:", ""]
    assert lines[6].startswith("      return\\x1b[31m\\r word word")
    assert lines[-3:] == ["org/out (dense), 1 token", "  (no text)", ""]


def test_the_sample_of_an_evaluation_is_printed_below_its_table() -> None:
    shift = {"against": "runs/dense", "kl": 0.5, "top1_agreement": 0.75, "repetition": 0.1, "repetition_dense": 0.2}
    record = {"model": "m", "out": "/runs/out", "shift": {**shift, "prompt": "a", "sample": ODD, "sample_dense": "[/]"}}
    table = "\n".join(printed([record_table(record)]))
    assert re.search(r"KL, nats a token +│ 0\.5 ", table)
    assert "smile" not in table
    assert "{" not in table
    lines = printed(sample_parts(record))
    assert [lines.index(name) for name in ("out", "dense (dense)")] == [3, lines.index("  [/]") - 1]
    assert "  x = [/b]  # [int] :smile:" in lines
    assert sample_parts({"model": "m", "out": "/runs/out", "shift": shift}) == []
    assert sample_parts({"model": "m", "out": "/runs/out"}) == []
