"""Instructions: rows as messages, and messages as text, in a chat template and in the plain form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secateur import api
from secateur.core.errors import SecateurError, UsageError
from secateur.heal.data import answers_alone, example
from secateur.text.instructions import alpaca_prompt, chat_text, instruction_of, plain_text
from secateur.text.specs import prompt_form, read_text
from secateur.text.windows import IGNORE
from tests.tiny import VOCABULARY

CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|s|>system\nBe brief.<|e|>\n{% endif %}"
    "{% for m in messages %}<|s|>{{ m['role'] }}\n{{ m['content'] | trim }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}<|e|>{% endif %}{% endfor %}"
)
STRICT = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
LETTERS = [*ascii_lowercase, *"ABCIR .:?12#\n"]
assert len(LETTERS) + 3 <= VOCABULARY

ROWS = {
    "instruction": {"instruction": "Add", "input": "1 1", "output": "two"},
    "prompt": {"prompt": "Add\n\n1 1", "completion": "two"},
    "messages": {"messages": [{"role": "user", "content": "Add\n\n1 1"}, {"role": "assistant", "content": "two"}]},
}
TALK = {
    "messages": [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": " two "},
        {"role": "user", "content": "on"},
        {"role": "assistant", "content": "three"},
    ]
}


def tokenizer_of_letters(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A token a letter, with marks of turns, a start token that it adds by itself, and a chat template."""
    found = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(LETTERS)}, unk_token="?"))
    found.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    found.decoder = decoders.Fuse()
    found.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|s|>", "<|e|>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        unk_token="?",
        eos_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def said(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode([i for i in ids if i != IGNORE]))


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_is_what_the_template_makes_of_its_messages_and_only_the_answer_counts(kind: str) -> None:
    tokenizer, row = tokenizer_of_letters(), instruction_of(ROWS[kind], "here")
    ids, labels = example(row, tokenizer, "chat")
    messages = ROWS["messages"]["messages"]
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert chat_text(row, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert said(tokenizer, labels) == "two<|e|>"
    assert all(label in (IGNORE, id) for id, label in zip(ids, labels, strict=True))
    assert labels[-1] == IGNORE, "the line end behind the turn is the template's"


@pytest.mark.parametrize("fast", [True, False])
def test_every_answer_of_a_talk_counts_and_the_same_words_in_a_question_do_not(fast: bool) -> None:
    tokenizer = tokenizer_of_letters()
    if not fast:
        tokenizer = _Slow(tokenizer)  # type: ignore[assignment]
    ids, labels = example(instruction_of(TALK, "here"), tokenizer, "chat")
    assert said(tokenizer, labels) == "two<|e|>three<|e|>"
    text = said(tokenizer, ids)
    assert text.startswith("<|s|>system\nCount.<|e|>\n<|s|>user\none two<|e|>\n<|s|>assistant\ntwo<|e|>\n")
    assert labels.index(next(label for label in labels if label != IGNORE)) > len("<|s|>" * 3)


def test_a_template_without_a_mark_ends_an_answer_with_its_words() -> None:
    tokenizer = tokenizer_of_letters(NO_END)
    ids, labels = example(instruction_of(ROWS["prompt"], "here"), tokenizer, "chat")
    assert (said(tokenizer, ids), said(tokenizer, labels)) == ("user: Add\n\n1 1\nassistant: two\n", "two")


def test_the_plain_form_of_a_row_is_that_of_alpaca() -> None:
    row = ROWS["instruction"]
    assert plain_text(instruction_of(row, "here")) == alpaca_prompt(row)
    assert alpaca_prompt(row) == "### Instruction:\nAdd\n\n### Input:\n1 1\n\n### Response:\ntwo"
    asked = "### Instruction:\nAdd\n\n1 1\n\n### Response:\ntwo"
    assert [plain_text(instruction_of(ROWS[kind], "here")) for kind in ("prompt", "messages")] == [asked, asked]
    tokenizer = tokenizer_of_letters()
    ids, labels = example(instruction_of(TALK, "here"), tokenizer, "plain")
    assert said(tokenizer, labels) == " two three</s>"
    assert said(tokenizer, ids).startswith("Count.\n\n### Instruction:\none two\n\n")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a"}, r"line 2: the field 'output' is missing \(it has instruction\)"),
        ({"completion": "a"}, r"line 2: the field 'prompt' is missing \(it has completion\)"),
        ({"instruction": "a", "output": None}, r"line 2: the field 'output' holds null, not text"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, r"line 2: the field 'input' holds a list, not text"),
        ({"messages": []}, r"line 2: 'messages' is empty, not a list"),
        ({"messages": "hello"}, r"line 2: 'messages' is a str, not a list"),
        ({"messages": ["hello"]}, r"line 2: messages, number 1: is a str, not an object"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            r"line 2: messages, number 1: the field 'role' is missing \(it has from, value\)",
        ),
        (
            {"messages": [*TALK["messages"], {"role": "human", "content": "a"}]},
            r"line 2: messages, number 6: 'role' is 'human' \(allowed: system, user, assistant\)",
        ),
        ({"question": "a"}, r"line 2: .*(it has question)"),
        (["a"], r"line 2: .*(a list)"),
    ],
)
@pytest.mark.parametrize("template", [CHAT, None])
def test_a_bad_row_is_named_by_file_line_and_field(row: Any, words: str, template: str | None, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS["instruction"]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(SecateurError, match=r"rows.jsonl, " + words):
        answers_alone(str(file), tokenizer_of_letters(template), samples=1, seqlen=99, seed=0)
    with pytest.raises(SecateurError, match=r"rows.jsonl, " + words):
        read_text(str(file), "calibration")


def test_what_a_template_cannot_say_is_refused_with_the_place_and_a_way_out() -> None:
    row = instruction_of(TALK, "rows.jsonl, line 7")
    with pytest.raises(SecateurError, match=r"rows.jsonl, line 7: message 3, of the assistant, is not in .* plain$"):
        example(row, tokenizer_of_letters(FORGETFUL), "chat")
    with pytest.raises(SecateurError, match=r"rows.jsonl, line 7: .* refuses this row \(no system here\); mend it, or"):
        example(row, tokenizer_of_letters(STRICT), "chat")


@pytest.mark.parametrize(
    ("spec", "asked", "template", "form"),
    [
        ("rows", "auto", CHAT, "chat"),
        ("rows", "auto", None, "plain"),
        ("rows", "plain", CHAT, "plain"),
        ("rows", "chat", CHAT, "chat"),
        ("alpaca", "auto", CHAT, "plain"),
        ("alpaca", "chat", CHAT, "chat"),
        ("text", "auto", CHAT, None),
        ("builtin", "auto", CHAT, None),
    ],
)
def test_the_form_is_chosen_by_text_and_tokenizer(
    spec: str, asked: str, template: str | None, form: str | None, tmp_path: Path
) -> None:
    (tmp_path / "rows").with_suffix(".json").write_text(json.dumps([ROWS["messages"]]))
    (tmp_path / "text").with_suffix(".json").write_text(json.dumps([{"text": "a", "messages": []}]))
    named = spec if spec in ("alpaca", "builtin") else str(tmp_path / f"{spec}.json")
    assert prompt_form(named, asked, lambda: tokenizer_of_letters(template)) == form


@pytest.mark.parametrize(
    ("spec", "asked", "words"),
    [
        ("alpaca", "yes", r"unknown --prompt-form 'yes' \(known: auto, chat, plain\)"),
        ("alpaca", "chat", "--prompt-form chat: the tokenizer of the model has no chat template"),
        ("wikitext2", "chat", "--prompt-form chat: 'wikitext2' is not read as instructions"),
        ("wikitext2", "plain", "--prompt-form plain: 'wikitext2' is not read as instructions"),
    ],
)
def test_a_form_that_there_is_not_is_refused(spec: str, asked: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        prompt_form(spec, asked, lambda: tokenizer_of_letters(None))


@pytest.fixture
def dense(saved: Callable[..., Path]) -> Path:
    folder = saved("llama")
    tokenizer_of_letters().save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS.values(), TALK] * 9))
    return str(file)


def test_pruning_and_healing_take_the_chat_template_and_say_so(dense: Path, rows: str, tmp_path: Path) -> None:
    asked = api.Request(str(dense), "wanda", sparsity=0.5, calibration=rows, samples=4, seqlen=16)
    heard: list[str] = []
    with api.progress_to(heard.append):
        record = api.prune(asked, tmp_path / "out")
    assert "rows.jsonl: each row goes through the model's chat template; --prompt-form plain leaves it out" in heard
    assert record["calibration"]["form"] == "chat"
    prepared = api.prepare(asked)
    windows = api.read_windows(prepared)
    assert windows is not None
    tokenizer = prepared.checkpoint.tokenizer()
    shown = "".join(said(tokenizer, window) for window in windows.tolist())  # type: ignore[arg-type]
    assert "<|s|>" in shown
    assert "#" not in shown
    with pytest.raises(UsageError, match="had calibration"):
        api.prune(api.Request(**{**vars(asked), "prompt_form": "plain"}), tmp_path / "out", resume=True)
    plain = api.prune(api.Request(**{**vars(asked), "prompt_form": "plain"}), tmp_path / "plain")
    assert plain["calibration"]["form"] == "plain"
    assert plain["calibration"]["sha256"] != record["calibration"]["sha256"]
    how = {"steps": 1, "batch": 1, "samples": 3, "seqlen": 60, "evaluate": False, "rank": 2}
    healed = api.heal(api.HealRequest(str(tmp_path / "plain"), **how), tmp_path / "again")
    assert healed["heal"]["calibration"]["form"] == "plain", "the text of the pruning, in the form it had there"
    alone = {**how, "calibration": rows, "completion_only": True}
    healed = api.heal(api.HealRequest(str(tmp_path / "out"), **alone), tmp_path / "healed")
    assert healed["heal"]["calibration"]["form"] == "chat"
    with pytest.raises(UsageError, match="had calibration"):
        api.heal(api.HealRequest(str(tmp_path / "out"), **alone, prompt_form="plain"), tmp_path / "healed", resume=True)


class _Slow:
    """The same tokens without their places, as a tokenizer in Python gives them."""

    is_fast = False

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self._fast = fast

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    def __call__(self, text: str, **how: Any) -> Any:
        assert "return_offsets_mapping" not in how
        return self._fast(text, **how)
