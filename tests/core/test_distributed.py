"""Several processes that work together, and the parts that only one of them does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from secateur import api
from secateur.core import distributed
from secateur.core.errors import SecateurError
from tests.folders import contents


def test_one_process_is_a_group_of_one() -> None:
    assert (distributed.rank(), distributed.size()) == (0, 1)
    assert distributed.on_first(lambda: 5) == 5
    assert torch.equal(distributed.gather(torch.ones(2))[0], torch.ones(2))
    distributed.check_same([torch.ones(2)], "it")


def test_tensors_that_differ_by_one_bit_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes: list[torch.Tensor] = []

    def gather(own: torch.Tensor) -> list[torch.Tensor]:
        """As if each call were that of the next process."""
        hashes.append(own)
        return hashes

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", gather)
    for value in (1.0, 1.0):
        distributed.check_same([torch.ones(2), torch.tensor(value)], "it")
    with pytest.raises(SecateurError, match="it differs between processes 0 and 2"):
        distributed.check_same([torch.ones(2), torch.tensor(1.0 + 2**-23)], "it")


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    """Blocks sharded, a part of each step's windows each, the first alone writes."""
    dense, options = (
        saved("llama", tied=True),
        {"unmet": "cut", "steps": 4, "batch": 4, "accumulate": 2, "save_every": 3, "checkpointing": True},
    )
    record = api.prune(
        api.Request(str(dense), "disp_llm", sparsity=0.4, calibration=ids_file, options=options), tmp_path / "one"
    )
    settings = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "secateur.cli",
    ]
    asked = [
        "prune",
        dense,
        "--method",
        "disp_llm",
        "--sparsity",
        0.4,
        "--calibration",
        ids_file,
        *settings,
        "--out",
        tmp_path / "two",
        "--json",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([*launcher, *map(str, asked)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["params_after"] == record["params_after"]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_torchrun_is_refused_in_one_line_without_a_traceback_of_ours(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    dense = saved("llama")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "secateur.cli",
    ]
    asked = [
        "prune",
        dense,
        "--method",
        "llm_surgeon",
        "--set",
        "shots=2",
        "--sparsity",
        0.1,
        "--calibration",
        ids_file,
    ]
    done = subprocess.run(
        [*launcher, *map(str, asked), "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    ours, _, of_the_launcher = done.stderr.partition("torch/distributed/")
    assert ours.count("error: torchrun: llm_surgeon works in one process") == 1
    assert "Traceback" not in ours
    assert "secateur/" not in of_the_launcher  # it reports that processes ended, and shows no frame of this package
    assert not list(tmp_path.glob("*out*"))
