"""The model card names the method, the original and its licence, and says nothing of the machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur import api
from secateur.core import records


def test_the_card_says_what_was_done_and_carries_the_licence(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    folder = saved("llama")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\nhello")
    (folder / "LICENSE").write_text("the licence")
    api.prune(api.Request(str(folder), "wanda", sparsity=0.5, calibration=ids_file), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in text.split("---")[1]
    assert "base_model: dense-llama" in text.split("---")[1]
    assert "| weights of the targeted matrices | 50.0% zeroed |" in text
    assert (tmp_path / "out" / "LICENSE").read_text() == "the licence"
    for _ in range(2):
        api.evaluate(api.EvalRequest(str(tmp_path / "out"), text=ids_file))
    assert (tmp_path / "out" / "README.md").read_text().count("perplexity") == 1


OWN = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n"


@pytest.mark.parametrize(
    ("config", "card", "base"),
    [
        ({"_name_or_path": "org/origin"}, "", "org/origin"),
        ({"_name_or_path": "output/checkpoint-500"}, "", "dense-llama"),
        ({"_name_or_path": "models/tuned"}, "", "dense-llama"),
        ({}, "---\nbase_model: org/parent\n---\n", "dense-llama"),
        ({"_name_or_path": "org/parent"}, "---\nbase_model:\n- org/parent\n---\n", "dense-llama"),
        ({"_name_or_path": "org/tuned"}, "---\nbase_model: org/parent\n---\n", "org/tuned"),
        ({}, "---\nbase_model: org/parent\n---\n# org/tuned\n", "org/tuned"),
        ({"_name_or_path": "/home/somebody/models/x"}, "", "dense-llama"),
        ({}, "---\nbase_model: [broken\n---\n", "dense-llama"),
        ({}, "", "dense-llama"),
    ],
)
def test_the_card_names_the_original_by_its_hub_name_where_that_is_known(
    config: dict[str, Any], card: str, base: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved("llama")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**{k: v for k, v in content.items() if k != "_name_or_path"}, **config})
    )
    if card:
        (folder / "README.md").write_text(card)
    api.prune(api.Request(str(folder), "magnitude", sparsity=0.5), tmp_path / "out")
    assert f"\nbase_model: {base}\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_of_a_healed_result_names_the_original_of_the_pruned_one(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    folder = saved("llama")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# org/origin\n")
    api.prune(api.Request(str(folder), "magnitude", sparsity=0.5), tmp_path / "out")
    api.heal(
        api.HealRequest(str(tmp_path / "out"), ids_file, steps=2, rank=2, samples=2, text=ids_file), tmp_path / "healed"
    )
    front = (tmp_path / "healed" / "README.md").read_text().split("---")[1]
    assert "base_model: org/origin" in front.splitlines()
    assert "license: mit" in front.splitlines()


def test_a_folder_of_the_hubs_cache_is_known_by_its_name(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "models--org--origin" / "snapshots" / ("0" * 40)
    folder.parent.mkdir(parents=True)
    saved("llama").rename(folder)
    api.prune(api.Request(str(folder), "magnitude", sparsity=0.5), tmp_path / "out")
    assert "base_model: org/origin\n" in (tmp_path / "out" / "README.md").read_text()


MIT = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated "
    'documentation files (the "Software"), to deal in the Software without restriction, including without limitation '
    "the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and "
    "to permit persons to whom the Software is furnished to do so, subject to the following conditions:\n\nThe above "
    "copyright notice and this permission notice shall be included in all copies or substantial portions of the "
    'Software.\n\nTHE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT '
    "NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO "
    "EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN "
    "ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR "
    "OTHER DEALINGS IN THE SOFTWARE.\n"
)


@pytest.mark.parametrize(
    ("files", "lines"),
    [
        ({"README.md": "---\nlicense: mit\n---\n"}, ["license: mit"]),
        ({"README.md": "---\r\nlicense: mit\r\n---\r\n"}, ["license: mit"]),
        ({"README.md": OWN}, ["license: other", "license_name: own", "license_link: LICENSE"]),
        ({"LICENSE": "  Apache License\n  Version 2.0, January 2004\n"}, ["license: apache-2.0"]),
        ({"LICENSE.txt": f"MIT License\n\nCopyright (c) 2026 X\n\n{MIT}"}, ["license: mit"]),
        (
            {"LICENSE": f"Modified MIT License\n\n{MIT}\nIf the Software has 100 million users, show its name.\n"},
            ["license: other", "license_link: LICENSE"],
        ),
        (
            {"LICENSE": "Own terms, which follow the\nApache License\nVersion 2.0, but no use by firms.\n"},
            ["license: other", "license_link: LICENSE"],
        ),
        ({"LICENSE": "ask me"}, ["license: other", "license_link: LICENSE"]),
        ({}, []),
    ],
)
def test_the_card_has_the_licence_of_the_original(
    files: dict[str, str], lines: list[str], saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved("llama")
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    api.prune(api.Request(str(folder), "magnitude", sparsity=0.5), tmp_path / "out")
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert [line for line in front.splitlines() if line.startswith("license")] == lines


def test_nothing_that_travels_tells_the_folders_of_this_machine(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    dense = str(saved("llama"))
    for number, method in enumerate(("wanda", "magnitude")):
        out = tmp_path / f"out-{number}"
        record = api.prune(api.Request(dense, method, sparsity=0.5, calibration=ids_file), out)
        assert record["model"] == dense, "a record may say where things were"
        api.evaluate(api.EvalRequest(str(out), text=ids_file))
    api.heal(api.HealRequest(str(tmp_path / "out-0"), steps=2, rank=2, samples=2, text=ids_file), tmp_path / "healed")
    api.evaluate(api.EvalRequest(dense, text=ids_file), records_file=tmp_path / "records.jsonl")
    api.write_report(records.read([tmp_path / "records.jsonl"]), tmp_path / "report.html")
    card = (tmp_path / "out-0" / "README.md").read_text()
    digest = hashlib.sha256(Path(ids_file).read_bytes()).hexdigest()
    assert f"ids.npy (SHA-256 of its file {digest[:16]}...)" in card
    assert "perplexity, ids.npy (SHA-256 of its token ids" in card
    folders = [tmp_path / name for name in ("out-0", "out-1", "healed")]
    travelling = [
        tmp_path / "report.html",
        *(file for folder in folders for file in folder.rglob("*") if file.suffix in (".md", ".json")),
    ]
    assert len(travelling) >= 3 * 3 + 1
    for file in travelling:
        assert str(tmp_path) not in file.read_text(), file
        assert tmp_path.parent.name not in file.read_text(), file


def test_the_card_says_what_the_sparsity_is_a_fraction_of(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    words = {
        "slicegpt": ({"sparsity": 0.25}, "| residual width | 25.0% removed |"),
        "shortgpt": ({"sparsity": 0.34}, "| blocks | 33.3% removed |"),
        "llm_pruner": ({"sparsity": 0.3}, "% of all parameters"),
        "heads": ({"sparsity": 0.34}, "| attention heads | "),
        "magnitude": ({"sparsity": 0.5}, "| weights of the targeted matrices | 50.0% zeroed |"),
    }
    for method, (asked, expected) in words.items():
        record = api.prune(api.Request(str(saved("llama")), method, calibration=ids_file, **asked), tmp_path / method)
        assert expected in (tmp_path / method / "README.md").read_text()
        assert record["sparsity_of"] in ("width", "blocks", "parameters", "heads", "weights")


def test_the_card_says_what_is_gone_of_all_parameters_before_the_knob_of_the_method(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    dense = str(saved("llama"))
    sliced = api.prune(api.Request(dense, "slicegpt", params_removed=0.3, calibration=ids_file), tmp_path / "sliced")
    masked = api.prune(api.Request(dense, "wanda", sparsity=0.5, calibration=ids_file), tmp_path / "masked")
    rows = [_rows(tmp_path / name)[1:4] for name in ("sliced", "masked")]
    removed, zeroed = sliced["pruning_ratio"], 1 - masked["nonzero_after"] / masked["params_before"]
    assert f"{removed:.1%}" != "30.0%", "widths are whole numbers"
    assert rows[0] == [
        ("removed", f"{removed:.1%} of all parameters (asked for: 30.0%)"),
        ("zeroed", "nothing"),
        ("residual width", f"{sliced['sparsity_measured']:.1%} removed"),
    ]
    zeros = masked["params_after"] - masked["nonzero_after"]
    assert rows[1] == [
        ("removed", "nothing"),
        ("zeroed", f"{zeroed:.1%} of all parameters, {zeros:,} zeros"),
        ("weights of the targeted matrices", "50.0% zeroed"),
    ]


def _rows(folder: Path) -> list[tuple[str, str]]:
    """The table of a card."""
    lines = (folder / "README.md").read_text().split("|---|---|\n")[1].split("\n\n")[0].splitlines()
    return [(cells[1].strip(), cells[2].strip()) for cells in (line.split("|") for line in lines)]
