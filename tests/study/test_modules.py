"""`study modules`: cells against prune and eval, resuming, other processes, what is refused, and what is said of the
result.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import math
import pickle
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.core import records
from secateur.models.load import open_checkpoint
from secateur.plan.pattern import parse_pattern
from secateur.report import module_plots
from secateur.report.html import write_report
from secateur.report.plots import png
from secateur.requests import ModulesRequest
from secateur.study import modules
from secateur.text.windows import ids_hash
from tests.tiny import FAMILY_TYPES

FIRST = {"opt": "model.decoder.layers.0.*"}
ASKED = ModulesRequest(("v", "mlp"), (0.5, 1.0))


def _study(
    model: Path, ids_file: str, out: Path, asked: ModulesRequest = ASKED, method: str = "wanda", **how: Any
) -> list[records.Record]:
    given = {name: how.pop(name) for name in ("pattern", "calibration") if name in how}
    request = api.Request(str(model), method, **{"calibration": ids_file, **given})
    return list(modules.run(request, asked, out, api.EvalRequest(str(model), text=ids_file), **how))


def _lasting(record: records.Record) -> records.Record:
    return {name: value for name, value in record.items() if name not in ("seconds", "peak_rss_bytes")}


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_cells_are_what_prune_and_eval_give(
    model_type: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    dense = saved(model_type)
    first = FIRST.get(model_type, "model.layers.0.*")  # the first block has the same inputs in both modes
    asked = ModulesRequest((first, "down"), (0.5,))
    cells = {
        mode: _study(dense, ids_file, tmp_path / mode, ModulesRequest(asked.kinds, asked.sparsities, mode=mode))[1:]
        for mode in modules.MODES
    }
    for mode, kind in (("shared", 0), ("sequential", 0), ("sequential", 1)):
        cell = cells[mode][kind]
        out = tmp_path / f"{mode}{kind}"
        pruned = api.prune(api.Request(str(dense), "wanda", modules=cell["modules"], calibration=ids_file), out)
        measured = api.evaluate(api.EvalRequest(str(out), text=ids_file))
        assert cell["ppl"] == pytest.approx(measured["ppl"], rel=1e-6)
        for name in ("nonzero_after", "sparsity_measured", "params_after", "calibration", "options", "modules"):
            assert cell[name] == pruned[name], name
        assert cell["ppl_protocol"] == measured["ppl_protocol"]
        assert cell["weights_removed"] == pruned["params_after"] - pruned["nonzero_after"]
    assert cells["shared"][1]["nonzero_after"] == cells["sequential"][1]["nonzero_after"]


def test_an_interrupted_study_goes_on_to_the_same_records(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = saved("llama")
    whole = _study(dense, ids_file, tmp_path / "out")
    assert [r["modules"] for r in whole] == [None, "v=0.5", "v=1", "mlp=0.5", "mlp=1"]
    assert whole[2]["sparsity_measured"] == 1
    lines = (tmp_path / "out" / "records.jsonl").read_text()
    with pytest.raises(api.UsageError, match="--overwrite"):
        _study(dense, ids_file, tmp_path / "out")
    made = modules._Work.record
    with monkeypatch.context() as patch:
        patch.setattr(
            modules._Work,
            "record",
            lambda self, cell: (
                made(self, cell) if cell.kind in ("dense", "v") else (_ for _ in ()).throw(KeyboardInterrupt)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            _study(dense, ids_file, tmp_path / "out", overwrite=True)
    assert len(records.read([tmp_path / "out"])) == 3
    again = _study(dense, ids_file, tmp_path / "out", resume=True)
    assert [_lasting(r) for r in again] == [_lasting(r) for r in whole]
    assert len(records.read([tmp_path / "out"])) == len(lines.splitlines())
    with monkeypatch.context() as patch:
        patch.setattr(modules._Work, "record", lambda *_: pytest.fail("made again"))
        assert [r["ppl"] for r in _study(dense, ids_file, tmp_path / "out", resume=True)] == [r["ppl"] for r in whole]


def test_another_process_makes_the_same_cell(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    dense = str(saved("llama"))
    work = modules._Work(
        api.Request(dense, "magnitude"), "shared", api.EvalRequest(dense, text=ids_file), str(tmp_path)
    )
    cell = modules.Cell("q", 0.5, "q=0.5")
    assert work.record(cell)["ppl"] != work.record(modules.Cell("q", 1.0, "q=1"))["ppl"]
    assert _lasting(pickle.loads(pickle.dumps(work)).record(cell)) == _lasting(work.record(cell))


def test_cells_follow_from_kinds_sparsities_weights_and_grid(saved: Callable[..., Path]) -> None:
    view = open_checkpoint(str(saved("llama"))).view()
    default = modules.cells(view, parse_pattern("unstructured"), ModulesRequest())
    assert len(default) == 10 * len(modules.SPARSITIES)
    assert [c.modules for c in modules.cells(view, parse_pattern("2:4"), ModulesRequest(("q", "all")))] == [
        "q=0.5",
        "all=0.5",
    ]
    counted = modules.cells(
        view, parse_pattern("unstructured"), ModulesRequest(("k", "q"), (1.0,), weights=(1536, 2000))
    )
    assert [c.modules for c in counted] == ["k=1", "q=1", "q=0.5", "q=0.651042"], "k has 3 x 512 weights"
    grid = modules.cells(view, parse_pattern("unstructured"), ModulesRequest(("mlp",), (0.5,), grid=(0, 0.5)))
    assert [c.modules for c in grid] == ["mlp=0.5", "attention=0.5", "all=0.5"]
    mixed = modules.cells(view, parse_pattern("unstructured"), ModulesRequest(("mlp",), (0.5,), grid=(0.2, 0.5)))
    assert "attention=0.2,mlp=0.5" in {c.modules for c in mixed}


@pytest.mark.parametrize(
    ("asked", "how", "words"),
    [
        (ModulesRequest(("typo",), (0.5,)), {}, "module 'typo' matches nothing in family llama"),
        (ModulesRequest(("model.layers.9.*",), (0.5,)), {}, "matches nothing"),
        (ModulesRequest(("q",), (1.5,)), {}, r"outside \[0, 1\]"),
        (ModulesRequest(), {"pattern": "3:7"}, "matrix q of block 0 has 32 inputs, not a multiple of 7"),
        (ModulesRequest(grid=(0.5,)), {"pattern": "2:4"}, "leave --weights and --grid out"),
        (ModulesRequest(), {"pattern": "rows"}, "units that several matrices share"),
        (ModulesRequest(mode="quick"), {}, "--mode quick: unknown"),
        (ModulesRequest(), {"method": "slicegpt"}, "has no mask for each matrix"),
        (ModulesRequest(), {"calibration": "task:"}, "names no task"),
        (ModulesRequest(jobs=0), {}, "--jobs 0"),
        (ModulesRequest(engine="slurm"), {}, r"unknown engine 'slurm' \(known: processes, ray\)"),
        (ModulesRequest(("q",), (0.0,)), {}, "nothing would be pruned at a sparsity of 0"),
        (ModulesRequest(("q", "k"), (0.5,), weights=(10**6,)), {}, "--weights 1000000: no kind has so many"),
    ],
)
def test_refusals(
    asked: ModulesRequest, how: dict[str, Any], words: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    with pytest.raises(api.UsageError, match=words):
        _study(saved("llama"), ids_file, tmp_path / "out", asked, **how)
    assert not (tmp_path / "out").exists()


def test_a_cell_that_is_done_does_not_wait_for_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()

    def make(cell: Any) -> records.Record:
        assert cell or let_go.wait(60)
        return {"cell": cell}

    monkeypatch.setattr(modules, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(modules, "_make", make)
    made = modules._in_processes(None, [0, 1, 2], 2)  # type: ignore[arg-type,list-item]
    assert sorted(next(made)["cell"] for _ in range(2)) == [1, 2]
    let_go.set()
    assert list(made) == [{"cell": 0}]


def test_a_cluster_shares_the_cells_where_ray_is_installed(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("ray") is None:
        with pytest.raises(api.UsageError, match=r"Ray is not installed: pip install 'secateur\[ray\]'"):
            _study(saved("llama"), ids_file, tmp_path / "none", replace(ASKED, engine="ray"))

    class Pool:
        """That of Ray, in this process."""

        def __init__(self, processes: int, initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
            started.append(processes)
            initializer(*pickle.loads(pickle.dumps(initargs)))  # our own bytes

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        def imap_unordered(self, work: Callable[[Any], Any], cells: Any) -> Any:
            return map(work, reversed(cells))

    started: list[int] = []
    for name, content in (("ray", {}), ("ray.util", {}), ("ray.util.multiprocessing", {"Pool": Pool})):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    shared = _study(saved("llama"), ids_file, tmp_path / "ray", replace(ASKED, engine="ray", jobs=2))
    assert started == [2]
    for one, other in zip(shared, _study(saved("llama"), ids_file, tmp_path / "here"), strict=True):
        assert {name for name in one if one[name] != other[name]} <= {"out", "key", "seconds", "peak_rss_bytes"}


def test_the_command_and_its_report(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["study", "modules", saved("llama"), "--out", tmp_path / "s", "--calibration", ids_file, "--text", ids_file]
    more = ["--kinds", "q,v,attention,mlp,all", "--sparsity", "0.5,1", "--grid", "0,0.4,0.5"]
    done = CliRunner().invoke(app, [str(a) for a in [*args, *more, "--json"]])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["records"]) == 1 + 10 + 3 + 2
    assert result["verdict"]
    done = CliRunner().invoke(app, [str(a) for a in [*args, *more, "--resume"]])
    assert (done.exit_code, "attention" in done.stdout) == (0, True)
    figures: list[Figure] = []
    monkeypatch.setattr(module_plots, "png", lambda figure: figures.append(figure) or png(figure))  # type: ignore[func-returns-value]
    written = write_report(records.read([tmp_path / "s"]), tmp_path / "r.html")
    assert {"modules-sparsity.png", "modules-weights.png", "modules-groups.png", "modules-grid.png"} <= {
        p.name for p in written
    }
    labels = [[axes.get_ylabel() for axes in figure.axes] for figure in figures]
    added = "loss added, ln(perplexity / dense), log scale"
    assert [one[-1] for one in labels[:2]] == [added] * 2
    assert labels[2][2:] == [added] * 2, "small damage can be told apart"
    assert labels[3][1].startswith("times the dense perplexity"), "colours have a scale"
    dense = next(r["ppl"] for r in result["records"] if r["kind"] == "dense")
    for kind, line in zip(("q", "v"), figures[0].axes[1].lines, strict=False):
        found = [math.log(r["ppl"] / dense) for r in result["records"] if r["kind"] == kind]
        assert list(line.get_ydata()) == pytest.approx([y for y in found if y > 1e-3])
    page = (tmp_path / "r.html").read_text()
    assert "Which module matters" in page
    wrong = CliRunner().invoke(app, [str(a) for a in [*args, "--kinds", "qq", "--resume"]])
    assert (wrong.exit_code, "module 'qq' matches nothing" in wrong.stderr) == (2, True)


def test_calibration_on_the_text_of_a_task(tmp_path: Path) -> None:
    request = api.Request("bundled", "wanda", samples=2, seqlen=64, calibration="task:cloze")
    found = list(
        modules.run(request, ModulesRequest(("q",), (0.5,)), tmp_path / "s", api.EvalRequest("bundled", limit=1))
    )
    file = tmp_path / "s" / "task-cloze.jsonl"
    assert found[1]["calibration"]["spec"] == str(file)
    assert len(file.read_text().splitlines()) == 300


def _task(folder: Path, name: str, **fields: Any) -> None:
    given = {
        "dataset_path": "json",
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "doc_to_target": "gold",
    }
    files = {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
    measured = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    content = {
        "task": name,
        **given,
        "doc_to_choice": "choices",
        "dataset_kwargs": {"data_files": files},
        "metric_list": measured,
        **fields,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(content))


def test_calibration_on_the_text_of_local_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Questions with their right answers, of the training part where there is one; those without an answer are left
    out.
    """
    files = tmp_path / "files"
    files.mkdir()
    rows = {
        part: [{"query": f"{part} {i} is", "choices": ["a", "bee"], "gold": i % 2} for i in range(40)]
        for part in ("train", "test")
    }
    rows["train"].append({"query": "unanswered", "choices": ["a", "bee"], "gold": -1})
    for part, items in rows.items():
        (files / f"{part}.jsonl").write_text("\n".join(map(json.dumps, items)))
    _task(files, "learned", training_split="train")
    _task(
        files, "measured", doc_to_text="gold", doc_to_target="{{query}}"
    )  # the choices stand in front of what is scored
    out = tmp_path / "s"
    asked = ModulesRequest(("q",), (0.5,))
    request = api.Request("bundled", "wanda", samples=2, seqlen=64, calibration="task:learned+measured")
    measure = api.EvalRequest("bundled", limit=1, include_path=files)
    with pytest.raises(api.SecateurError, match="lower --samples"):
        list(modules.run(replace(request, samples=10**4), asked, out, measure))
    with pytest.raises(api.UsageError, match="unknown method"):
        list(modules.run(replace(request, method="wand"), asked, out, measure))
    assert not out.exists(), "what is refused is in nobody's way"
    found = list(modules.run(request, asked, out, measure))
    assert "warning: measured have no training part" in capsys.readouterr().err
    texts = [json.loads(line)["text"] for line in (out / "task-learned-measured.jsonl").read_text().splitlines()]
    answered = [f"train {i} is {['a', 'bee'][i % 2]}" for i in range(40)]
    assert texts == answered + [f"{['a', 'bee'][i % 2]} test {i} is" for i in range(40)]
    plain = replace(request, calibration=str(out / "task-learned-measured.jsonl"))
    again = list(modules.run(plain, asked, tmp_path / "again", measure=replace(measure, include_path=None)))
    assert [r["ppl"] for r in again] == [r["ppl"] for r in found]
    windows = api.read_windows(api.prepare(replace(request, sparsity=0.5, include_path=files)))
    assert windows is not None
    assert ids_hash(windows) == found[1]["calibration"]["sha256"], "prune calibrates on the same"
    with pytest.raises(api.UsageError, match="calibrate on a task too"):
        api.prepare(replace(request, calibration="builtin", sparsity=0.5, include_path=files))
    with pytest.raises(api.UsageError, match="names no task"):
        api.prepare(replace(request, calibration="task:+", sparsity=0.5))


def test_a_dry_run_counts_what_the_run_does(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    dense, out = saved("llama"), tmp_path / "out"
    args = [
        "study",
        "modules",
        dense,
        "--calibration",
        ids_file,
        "--text",
        ids_file,
        "--kinds",
        "v,mlp",
        "--sparsity",
        "0.5,1",
        "--json",
    ]

    def dry(*more: Any) -> dict[str, Any]:
        done = CliRunner().invoke(app, [str(a) for a in [*args, *more, "--dry-run"]])
        assert done.exit_code == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    said = dry("--out", out)
    assert not out.exists()
    assert (said["cells"], said["cells_done"], said["cells_to_calibrate"], said["calibrations"]) == (5, 0, 4, 1)
    assert (said["calibration_tokens"], said["evaluation_tokens"]) == (120, 5 * 120)
    assert said["seconds_estimated"] >= 0
    assert dry("--mode", "sequential")["calibration_tokens"] == 4 * 120
    assert dry("--method", "magnitude")["calibrations"] == 0
    _study(dense, ids_file, out, ModulesRequest(("v",), (0.5,)))
    assert dry("--out", out, "--resume")["cells_done"] == 2
    missing = CliRunner().invoke(app, [str(a) for a in args])
    assert (missing.exit_code, "--out DIR is missing" in missing.stderr) == (2, True)
