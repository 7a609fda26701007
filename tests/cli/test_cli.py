"""The command line from end to end on tiny models: outputs, exit statuses, records, and resuming after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.core import records
from tests.folders import contents

CONTRACT = {
    "command", "version", "model", "method", "options", "seed", "sparsity", "modules", "pattern",
    "pruning_ratio", "pruning_ratio_blocks", "params_before", "params_after", "nonzero_after", "calibration",
    "seconds", "peak_rss_bytes", "device", "dtype", "out", "sparsity_measured", "model_revision", "versions",
}  # fmt: skip


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def dense(saved: Callable[..., Path]) -> Path:
    return saved("llama")


def test_prune_and_eval_give_one_json_line_and_append_it(dense: Path, ids_file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, stdout, _ = run(
        "prune", dense, "--method", "wanda", "--sparsity", 0.5, "--calibration", ids_file, "--out", out, "--json"
    )
    assert status == 0
    record = json.loads(stdout)
    assert record.keys() >= CONTRACT
    calibration = record["calibration"]
    assert calibration == {
        "spec": ids_file,
        "samples": 6,
        "seqlen": 20,
        "sha256": calibration["sha256"],
        "file_sha256": calibration["file_sha256"],
    }
    assert calibration["file_sha256"] == hashlib.sha256(Path(ids_file).read_bytes()).hexdigest()
    status, stdout, _ = run("eval", out, "--text", ids_file, "--against", dense, "--json")
    assert status == 0
    measured = json.loads(stdout)
    assert measured.keys() >= CONTRACT | {"ppl", "ppl_protocol", "tasks", "shift"}
    assert measured["ppl_protocol"].keys() >= {"spec", "seqlen", "windows", "tokens", "bos", "tail", "sha256"}
    assert 0 < measured["shift"]["top1_agreement"] < 1
    assert [r["command"] for r in records.read([tmp_path])] == ["prune", "eval"]


def test_dry_run_writes_nothing_and_tells_the_truth(dense: Path, ids_file: str, tmp_path: Path) -> None:
    args = ["prune", dense, "--method", "magnitude", "--sparsity", 0.5, "--pattern", "rows", "--out", tmp_path / "out"]
    status, stdout, _ = run(*args, "--dry-run", "--json")
    assert status == 0
    said = json.loads(stdout)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "records.jsonl").exists()
    assert {"memory_bytes", "disk_bytes", "seconds_estimated"} <= said.keys()
    _, stdout, _ = run(*args, "--json")
    done = json.loads(stdout)
    assert said["params_after"] == done["params_after"] < done["params_before"]
    _, stdout, _ = run(
        "prune", dense, "--method", "wanda", "--sparsity", 0.5, "--calibration", ids_file, "--dry-run", "--json"
    )
    masks = json.loads(stdout)
    assert masks["nonzero_after"] < masks["params_after"] == masks["params_before"]
    _, stdout, _ = run(
        "prune",
        dense,
        "--method",
        "disp_llm",
        "--sparsity",
        0.1,
        "--calibration",
        ids_file,
        "--samples",
        3,
        "--seqlen",
        8,
        "--dry-run",
        "--json",
    )
    learned = json.loads(stdout)
    assert learned["calibration_tokens"] == 120, "token ids are used as given"
    assert learned["memory_bytes"] > 0, "measured, since no shapes tell it"
    assert learned["seconds_estimated"] > 0


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_a_dry_run_counts_zeros_as_the_method_does(method: str, dense: Path, ids_file: str, tmp_path: Path) -> None:
    """Wanda rounds down in each row, the others in each matrix; at 0.37 the two differ."""
    args = ["prune", dense, "--method", method, "--sparsity", 0.37, "--calibration", ids_file, "--json"]
    said = json.loads(run(*args, "--dry-run")[1])
    done = json.loads(run(*args, "--out", tmp_path / "out")[1])
    assert said["nonzero_after"] == done["nonzero_after"] < done["params_after"]


@pytest.mark.parametrize(
    ("args", "warning"),
    [
        (["--method", "shortgpt", "--params-removed", 0.05], r"the nearest step removes \d+\.\d%"),
        (
            ["--method", "shortgpt", "--params-removed", 0.05, "--at-least"],
            r"the first step that reaches it removes \d+\.\d%",
        ),
        (
            ["--method", "slicegpt", "--sparsity", 0.1, "--set", "round=1", "--set", "head=own"],
            r"slicegpt at sparsity 0\.1: [\d,]+ parameters",
        ),
    ],
)
def test_a_dry_run_warns_of_the_size_as_a_run_does(
    args: list[Any], warning: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    prune = ["prune", saved("llama", tied=True), *args, "--calibration", ids_file, "--samples", 3, "--seqlen", 16]
    for end in (["--dry-run"], ["--out", tmp_path / "out"]):
        status, _, stderr = run(*prune, *end)
        assert status == 0, stderr
        assert re.search(rf"warning: .*{warning}", stderr), stderr


def test_params_removed_reaches_the_ratio(dense: Path, tmp_path: Path) -> None:
    _, stdout, _ = run(
        "prune",
        dense,
        "--method",
        "magnitude",
        "--pattern",
        "columns",
        "--params-removed",
        0.2,
        "--out",
        tmp_path / "out",
        "--json",
    )
    record = json.loads(stdout)
    assert record["pruning_ratio"] == pytest.approx(0.2, abs=0.01)


def test_sweep_measures_the_dense_model_and_resumes(dense: Path, ids_file: str, tmp_path: Path) -> None:
    args = [
        "sweep",
        dense,
        "--method",
        "wanda",
        "--sparsity",
        "0.3,0.6",
        "--calibration",
        ids_file,
        "--text",
        ids_file,
        "--out",
        tmp_path / "s",
        "--json",
    ]
    status, stdout, _ = run(*args)
    assert status == 0
    found = json.loads(stdout)["records"]
    assert [r["sparsity"] for r in found] == [0, 0.3, 0.6]
    lines = (tmp_path / "s" / "records.jsonl").read_text()
    status, stdout, stderr = run(*args, "--resume")
    assert status == 0
    assert [r["ppl"] for r in json.loads(stdout)["records"]] == [r["ppl"] for r in found]
    assert (tmp_path / "s" / "records.jsonl").read_text() == lines, "nothing is measured twice"
    assert "already there" in stderr
    status, _, stderr = run(*args)
    assert (status, "exists and is not empty" in stderr) == (2, True)
    for more, words in (
        (["--seed", 5], "had seed = 0, this one has 5"),
        (["--set", "scope=matrix"], None),
        (["--dtype", "bfloat16"], "had dtype"),
    ):
        status, _, stderr = run(*args, "--resume", *more)
        assert (status, words is None or words in stderr) == (0 if words is None else 2, True), stderr
    other = tmp_path / "other.npy"
    np.save(other, np.ones((2, 8), dtype=np.int64))
    again = [other if a == ids_file else a for a in args]
    status, _, stderr = run(*again, "--resume")
    assert (status, "had calibration." in stderr) == (2, True)


def test_eval_resumes_only_what_is_the_same(dense: Path, ids_file: str, tmp_path: Path) -> None:
    args = ["eval", dense, "--text", ids_file, "--json", "--resume"]
    first = json.loads(run(*args)[1])
    assert first.keys() >= CONTRACT
    assert json.loads(run(*args)[1])["key"] == first["key"]
    assert (first["model"], first["method"], first["sparsity"]) == (str(dense), None, 0)
    for more in (["--dtype", "bfloat16"], ["--limit", 3], ["--against", dense]):
        other = json.loads(run(*args, *more)[1])
        assert other["key"] != first["key"]
    assert len(records.read([tmp_path])) == 4


def test_inspect_counts_zeros_and_widths(dense: Path, tmp_path: Path) -> None:
    run("prune", dense, "--method", "magnitude", "--modules", "q=0.25,mlp=0.5", "--out", tmp_path / "out")
    status, stdout, _ = run("inspect", tmp_path / "out", "--json")
    assert status == 0
    record = json.loads(stdout)
    block = record["blocks"][2]
    assert block["matrices"]["q"] == {"shape": [32, 32], "zeros": 256, "sparsity": 0.25, "zero_rows": 0}
    assert block["matrices"]["k"]["zeros"] == 0
    assert record["pruned"]["method"] == "magnitude"
    assert record["parameters_blocks"] == 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    status, stdout, _ = run("inspect", tmp_path / "out")
    assert status == 0
    assert "25%" in stdout


def test_report_from_a_folder(dense: Path, ids_file: str, tmp_path: Path) -> None:
    run(
        "sweep",
        dense,
        "--method",
        "wanda",
        "--sparsity",
        "0.5",
        "--calibration",
        ids_file,
        "--text",
        ids_file,
        "--out",
        tmp_path / "s",
    )
    status, _, _ = run("report", tmp_path / "s", "--out", tmp_path / "r.html")
    assert status == 0
    page = (tmp_path / "r.html").read_text()
    assert "wanda" in page
    assert "data:image/png;base64," in page


def test_help_and_methods_need_no_torch() -> None:
    program = """
import sys
from typer.testing import CliRunner
from secateur.cli import app
print(CliRunner().invoke(app, ['--help']).output)
sys.exit('torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prune" in done.stdout
    status, stdout, _ = run("methods")
    assert status == 0
    assert {"magnitude", "wanda"} <= {line.split()[0] for line in stdout.splitlines()}


def test_importing_secateur_registers_the_pruned_classes_before_or_after_transformers() -> None:
    orders = (
        ("import secateur", "import transformers"),
        ("import transformers; transformers.AutoModelForCausalLM", "import secateur"),
    )
    last = (
        "from transformers import AutoConfig, "
        "AutoModelForCausalLM\nprint(AutoConfig.for_model('secateur_llama').model_type)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", "\n".join((*order, last))], stdout=subprocess.PIPE, text=True)
        for order in orders
    ]
    assert [process.communicate()[0].strip() for process in started] == ["secateur_llama"] * 2


def test_interruption_says_how_to_go_on(
    dense: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "evaluate", stop)
    status, _, stderr = run("eval", dense, "--text", ids_file)
    assert (status, "--resume" in stderr) == (130, True)


def test_a_usage_error_is_a_value_error() -> None:
    import secateur

    assert issubclass(secateur.UsageError, ValueError)


KILLED = [
    "--method",
    "wanda",
    "--sparsity",
    "0.5",
    "--calibration",
    "builtin",
    "--samples",
    "48",
    "--seqlen",
    "256",
    "--seed",
    "1",
]


@pytest.mark.slow
def test_kill_minus_nine_in_the_middle_then_resume_gives_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from secateur.cli import main; main()", "prune", "bundled", *KILLED]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert run("prune", "bundled", *KILLED, "--out", tmp_path / "whole")[0] == 0
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    partial = tmp_path / "killed.partial"
    while not (partial / "part-block-00001.safetensors").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)  # polling another process, not timing
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    assert not (partial / "config.json").exists(), "nothing half-written looks like a result"
    finished = {p.name for p in partial.glob("part-block-*.safetensors")}
    assert 2 <= len(finished) < 6
    status, _, stderr = run("prune", "bundled", *KILLED, "--out", tmp_path / "killed")
    assert (status, "--resume" in stderr) == (2, True)
    subprocess.run(
        [*command, "--out", str(tmp_path / "killed"), "--resume"], check=True, capture_output=True, env=environment
    )
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
