"""docs/python.md: every block runs as it stands, and every function of the interface is on the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from secateur import api
from secateur.study import compare

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
CLASSES = {"Compared", "Flow", "Plan", "ModelSource", "Recipe"}  # functions make these
INSIDE = {"find_method", "point_name", "prune_and_measure", "read_windows", "view_model"}  # parts of the others


def test_the_page_shows_the_whole_interface() -> None:
    shown = set(re.findall(r"\bapi\.(\w+)", PAGE))
    assert shown <= set(api.__all__), "and nothing besides"
    assert set(api.__all__) - CLASSES - INSIDE == shown


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # a page need not run without warnings of other libraries
def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "in_own_process", lambda work, *given: work(*given))  # a process takes ten seconds
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/python.md, block {number + 1}", "exec"), names)
        printed = capsys.readouterr().out
        assert bool(printed) or "print(" not in block, f"block {number + 1} prints something: {block}"
    assert "did you mean wanda?" in printed
    runs = tmp_path / "runs" / "python"
    for made in ("flow.png", "compare/report.html", "report.html", "packed", "restored", "silent", "healed"):
        assert (runs / made).exists(), made
    weights = "model.safetensors"
    assert (runs / "restored" / weights).read_bytes() == (runs / "wanda50" / weights).read_bytes()
