"""Evaluation protocols: how rows are joined and cut into windows, and how long the windows are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.core.errors import SecateurError, UsageError
from secateur.text.protocols import PROTOCOLS, evaluation_windows, find_protocol, wikitext_rows, window_length
from tests.text.letters import Letters


def test_protocols_join_cut_and_limit(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in ("aaaa", "bbbb", "cccc")))

    def windows(**how: Any) -> list[list[int]]:
        protocol = replace(PROTOCOLS["text"], spec=str(file), **how)
        return [w.tolist() for w in evaluation_windows(protocol, 5, Letters())]  # type: ignore[arg-type]

    a, b, c, n = 97, 98, 99, 10
    assert windows() == [[1, a, a, a, a], [n, n, b, b, b], [b, n, n, c, c]]
    assert windows(tail="keep")[-1] == [c, c]
    assert windows(join=" ", tail="keep")[1] == [32, b, b, b, b]
    assert windows(bos="each") == [[1, a, a, a, a], [1, b, b, b, b], [1, c, c, c, c]]
    assert windows(rows=2, bos="each") == [[1, a, a, a, a], [1, b, b, b, b]]
    assert windows(windows=1) == [[1, a, a, a, a]]
    assert windows(tokens=11) == [[1, a, a, a, a], [n, n, b, b, b]]


def test_a_raw_wikitext_file_gives_the_rows_of_the_hub(tmp_path: Path) -> None:
    raw = " \n = Title = \n \n Words .\n"
    assert wikitext_rows(raw) == ["", " = Title = \n", "", " Words .\n"]
    (tmp_path / "wiki.raw").write_text(raw)
    protocol = find_protocol("slicegpt", str(tmp_path / "wiki.raw"), bundled=False)
    ids = torch.cat(evaluation_windows(replace(protocol, tail="keep"), 7, Letters())).tolist()  # type: ignore[arg-type]
    assert bytes(ids[1:]).decode() == "\n\n = Title = \n\n\n\n\n Words .\n"


def test_the_wikitext2_test_split_when_it_is_there() -> None:
    file = Path(__file__).parents[3] / "shared" / "data" / "wikitext2" / "wiki.test.raw"
    if not file.is_file():
        pytest.skip("the development data is not on this machine")
    rows = wikitext_rows(file.read_text("utf-8"))
    assert len(rows) == 4358
    assert rows[0] == ""
    assert rows[1] == " = Robert Boulter = \n"


def test_named_protocols_say_how_long_windows_are() -> None:
    assert window_length(PROTOCOLS["slicegpt"], None, 4096) == 2048
    assert window_length(PROTOCOLS["wanda"], None, 4096) == 4096
    assert window_length(PROTOCOLS["wikitext2"], None, 131072) == 2048
    assert window_length(PROTOCOLS["wikitext2"], None, 512) == 512
    assert window_length(PROTOCOLS["llm-pruner"], None, 4096) == 128
    assert window_length(PROTOCOLS["slicegpt"], 256, 512) == 256
    with pytest.raises(UsageError, match=r"windows of 4096 tokens \(protocol disp-llm\) are outside"):
        window_length(PROTOCOLS["disp-llm"], None, 2048)
    assert find_protocol(None, None, bundled=True).name == "builtin"
    assert find_protocol(None, None, bundled=False).name == "wikitext2"
    assert find_protocol(None, "c4", bundled=False).rows == 1100
    with pytest.raises(UsageError, match="needs a text"):
        find_protocol("text", None, bundled=False)


def test_too_short_a_text() -> None:
    with pytest.raises(SecateurError, match="fewer than one window of 100000000"):
        evaluation_windows(PROTOCOLS["builtin"], 100_000_000, Letters())  # type: ignore[arg-type]
