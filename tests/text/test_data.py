"""Text SPECs and windows."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import save_file

from secateur.core.errors import SecateurError, UsageError
from secateur.text.files import file_hash
from secateur.text.specs import HUB_TEXTS, Text, read_instructions, read_text, same_text, task_names
from secateur.text.tokens import check_ids
from secateur.text.windows import IGNORE, ids_hash, labelled_windows


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_text(str(tmp_path / "a.jsonl"), "calibration").rows == ("one", "two")
    (tmp_path / "b.jsonl").write_text('{"body": "one"}\n')
    assert read_text(str(tmp_path / "b.jsonl"), "calibration", text_field="body").rows == ("one",)
    (tmp_path / "c.json").write_text(
        json.dumps([{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Hi", "output": "Ho"}])
    )
    first, second = read_text(str(tmp_path / "c.json"), "calibration").rows
    assert first == "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3"
    assert "Input" not in second
    parquet.write_table(pa.table({"text": ["x", "y"]}), tmp_path / "d.parquet")
    assert read_text(str(tmp_path / "d.parquet"), "calibration").rows == ("x", "y")
    (tmp_path / "e.raw").write_text("as it\n is \n")
    assert read_text(str(tmp_path / "e.raw"), "calibration").rows == ("as it\n is \n",)
    ids = torch.arange(12).view(3, 4)
    np.save(tmp_path / "f.npy", ids.numpy().astype(np.uint16))
    save_file({"ids": ids.to(torch.int32)}, tmp_path / "g.safetensors")
    for name in ("f.npy", "g.safetensors"):
        given = read_text(str(tmp_path / name), "calibration")
        assert torch.equal(labelled_windows(given, letters, samples=99, seqlen=99, seed=7)[0], ids), (
            "used as given, in order"
        )


@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz"])
def test_text_may_be_packed_and_c4s_own_shards_are_lines_of_json(packing: str, tmp_path: Path) -> None:
    """`c4-train.00000-of-01024.json.gz` ends in .json and holds an object a line."""
    write = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[packing]
    lines = '{"text": "one\\u2028two", "url": "u"}\n\n{"text": "three"}\n'
    for name, content, rows in (
        ("c4-train.00000-of-01024.json", lines, ("one\u2028two", "three")),
        ("one.json", '{"text": "alone"}', ("alone",)),
        ("list.json", '[\n  {"text": "a"},\n  {"text": "b"}\n]', ("a", "b")),
        (
            "mixed.jsonl",
            '{"text": "t"}\n{"instruction": "Hi", "output": "Ho"}\n',
            ("t", "### Instruction:\nHi\n\n### Response:\nHo"),
        ),
        ("plain.txt", "as it\n is \n", ("as it\n is \n",)),
        ("windows.txt", "as it\r\n is \r\n", ("as it\n is \n",)),
        ("old-mac.txt", "as it\r is \r", ("as it\n is \n",)),
        ("marked.txt", "\ufeffas it\n is \n", ("as it\n is \n",)),
        ("marked.jsonl", '\ufeff{"text": "t"}\r\n{"text": "u"}\r\n', ("t", "u")),
    ):
        file = tmp_path / (name + packing)
        with write(file, "wb") as handle:
            handle.write(content.encode())
        assert read_text(str(file), "calibration").rows == rows, name


def test_instructions_may_be_packed_too(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.json.gz", "wt") as handle:
        handle.write('{"instruction": "Hi", "output": "Ho"}\n{"instruction": "Add", "output": "3"}')
    assert [row.messages[-1]["content"] for row in read_instructions(str(tmp_path / "a.json.gz"))] == ["Ho", "3"]


def test_a_packed_file_that_is_cut_short_is_no_text(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.txt.gz", "wb") as handle:
        handle.write(b"words " * 1000)
    (tmp_path / "a.txt.gz").write_bytes((tmp_path / "a.txt.gz").read_bytes()[:-10])
    with pytest.raises(SecateurError, match=r"a\.txt\.gz: cannot be unpacked .+ download it again"):
        read_text(str(tmp_path / "a.txt.gz"), "calibration")


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz"])
def test_a_file_that_is_not_packed_as_its_suffix_says(packing: str, tmp_path: Path) -> None:
    (tmp_path / f"a.txt{packing}").write_text("plain words\n" * 9)
    with pytest.raises(SecateurError, match=r"a\.txt\.\w+: cannot be unpacked .+ not what its suffix says"):
        read_text(str(tmp_path / f"a.txt{packing}"), "calibration")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.xz", "a.npy.gz", "a.safetensors.bz2", "a.parquet.gz", "a.txt.zst"])
def test_packed_files_that_are_not_text_are_refused(name: str, tmp_path: Path) -> None:
    with gzip.open(tmp_path / name, "wb") as handle:
        handle.write(b"words " * 100)
    with pytest.raises(SecateurError, match=rf"{name}: .+ (is|are) not read; unpack it first"):
        read_text(str(tmp_path / name), "calibration")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pretty.json", '{\n  "text": "one"\n}\n', r"pretty\.json, line 1: not JSON .+ one object per line"),
        ("late.jsonl", '{"text": "one"}\n\n{"text": }\n', r"late\.jsonl, line 3: not JSON"),
        ("list.json", '[{"text": "one"},\n', r"list\.json: not JSON .+ one list of objects"),
    ],
)
def test_json_that_is_neither_lines_nor_a_list(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SecateurError, match=said):
        read_text(str(tmp_path / name), "calibration")


def test_the_place_of_a_byte_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n" * 5000 + b"\xff")
    with pytest.raises(SecateurError, match=r"a\.txt: not UTF-8 text \(byte 25000\)"):
        read_text(str(tmp_path / "a.txt"), "calibration")


def test_ids_outside_the_vocabulary_say_whose_fault_it_is() -> None:
    windows = torch.tensor([[1, 2, 9]])
    check_ids(windows, 10, 3, "here")
    with pytest.raises(
        SecateurError,
        match=r"here: token id 9 is outside the vocabulary of the model \(0 to 8\); tokenise with its own tokenizer",
    ):
        check_ids(windows, 9, 3, "here")
    both = (
        r"the tokenizer gives id 9, and the embedding of the model has 9 rows .+ "
        r"the tokenizer has 10 tokens\): .+resize_token_embeddings\(10\)"
    )
    with pytest.raises(SecateurError, match=both):
        check_ids(windows, 9, 3, "here", tokens=10)


def test_one_text_is_known_by_its_file_wherever_that_lies(tmp_path: Path) -> None:
    for folder, content in (("a", "text"), ("b", "text"), ("c", "other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text(content)
    known = file_hash(str(tmp_path / "a" / "t.txt"))
    assert same_text("t.txt", str(tmp_path / "b" / "t.txt"), known)
    assert not same_text("t.txt", str(tmp_path / "c" / "t.txt"), known)
    assert not same_text("u.txt", str(tmp_path / "b" / "t.txt"), known)


def test_hub_texts_are_asked_for_by_role_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(
        path: str, config: str | None, *, data_files: Any, split: str, revision: str | None
    ) -> list[dict[str, str]]:
        asked.append((path, config, data_files, split, revision))
        return [{"text": "row", "instruction": "Say", "output": "row"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_text("wikitext2@abc", "evaluation").rows) == ["row"]
    assert list(read_text("c4", "calibration").rows) == ["row"]
    assert "### Response:\nrow" in read_text("alpaca", "calibration").rows[0]
    assert asked[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "abc")
    assert asked[1][:4] == ("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz"}, "train")
    assert all(len(call[4]) == 40 for call in asked[1:]), "named texts have named revisions"
    assert asked[2][3] == "train"


@pytest.mark.parametrize("name", sorted(HUB_TEXTS))
def test_a_hub_text_without_a_network_says_so(name: str) -> None:
    with pytest.raises(
        SecateurError,
        match=f"text '{name}', to calibrate on: the hub did not give .+ give a local file: --calibration FILE",
    ):
        read_text(name, "calibration")


def test_windows_do_not_overlap_and_follow_the_seed() -> None:
    text = Text("t", ("".join(chr(i) for i in range(1000)),))
    windows = labelled_windows(text, letters, samples=10, seqlen=20, seed=0)[0]
    assert windows.shape == (10, 20)
    assert len(windows.unique()) == 200
    assert torch.equal(windows, labelled_windows(text, letters, samples=10, seqlen=20, seed=0)[0])
    assert not torch.equal(windows, labelled_windows(text, letters, samples=10, seqlen=20, seed=1)[0])
    everything = labelled_windows(text, letters, samples=50, seqlen=20, seed=3)[0]
    assert torch.equal(everything.flatten(), torch.arange(1000))


def test_only_the_answers_of_questions_are_labels() -> None:
    """Also where tokens join the end of a question to its answer, and where there is no question."""
    questions = [f"is {n} even? " for n in range(20)] + [""]
    text = Text("task:t", [question + "YES" for question in questions], questions=questions)
    assert labelled_windows(Text("t", text.rows), letters, samples=9, seqlen=30, seed=0)[1] is None
    windows, labels = labelled_windows(text, letters, samples=9, seqlen=30, seed=0)
    assert torch.equal(windows, labelled_windows(Text("t", text.rows), letters, samples=9, seqlen=30, seed=0)[0])
    assert labels is not None
    assert torch.equal(labels, windows.where(windows < ord("Z"), IGNORE).where(windows >= ord("A"), IGNORE))

    def joining(row: str) -> list[int]:
        return letters(row.replace("? YES", "#ES"))

    windows, labels = labelled_windows(text, joining, samples=10, seqlen=20, seed=0)
    assert labels is not None
    assert torch.equal(labels != IGNORE, torch.isin(windows, torch.tensor(letters("#YES"))))


def test_tasks_are_text_to_calibrate_with_alone() -> None:
    assert task_names("task:a+b") == ["a", "b"]
    assert not task_names("wikitext2")
    with pytest.raises(UsageError, match="to measure on tasks, use --tasks"):
        read_text("task:cloze", "evaluation")


def test_rows_are_shuffled_and_no_more_are_read_than_needed() -> None:
    text = Text("t", tuple(chr(i) * 10 for i in range(100)))
    read: list[str] = []

    def tokenize(row: str) -> list[int]:
        read.append(row)
        return letters(row)

    labelled_windows(text, tokenize, samples=2, seqlen=10, seed=0)
    assert len(read) == 8
    assert read != sorted(read)


def test_too_short_a_text_says_how_long_it_is() -> None:
    with pytest.raises(
        SecateurError, match="has 30 tokens, 3 windows of 10, but 4 are asked for; lower --samples or --seqlen"
    ):
        labelled_windows(Text("t", ("x" * 30,)), letters, samples=4, seqlen=10, seed=0)


def test_the_hash_is_of_the_ids_alone() -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    assert ids_hash(ids) == ids_hash(ids.to(torch.int32)) == ids_hash(ids.flatten())
    assert ids_hash(ids) != ids_hash(ids.flip(0))


def test_builtin_parts_share_no_document() -> None:
    train, test = (set(read_text("builtin", role).rows) for role in ("calibration", "evaluation"))
    assert len(train) > 100
    assert len(test) > 10
    assert not train & test


def test_line_separators_inside_json_do_not_cut_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028still one"}\n{"text": null}\n', "utf-8")
    assert read_text(str(tmp_path / "a.jsonl"), "calibration").rows == ("one\u2028still one", "")


def test_the_same_text_in_both_roles_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert same_text("a.txt", str(tmp_path / "a.txt"))
    assert same_text("alpaca", "alpaca")
    assert not same_text("wikitext2", "wikitext2")
    assert not same_text("builtin", "builtin")
