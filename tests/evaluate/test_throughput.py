"""`secateur bench`: its answer, its lower bounds of time, and what it refuses. No times are tested."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.core.machine import Machine, matrix_rate
from secateur.core.memory import PeakMemory
from secateur.evaluate import throughput
from secateur.evaluate.throughput import Work, measure_speed
from tests.tiny import FAMILY_TYPES, able, some_ids, tiny_model

CPU = torch.device("cpu")


class Known(Machine):
    """A machine of known speed, so that floors are known and looking takes no time."""

    def __init__(self, *_: Any) -> None:
        self.flops_per_second, self.bytes_per_second, self.clock = 1e9, 1e8, time.perf_counter

    def look(self, seconds: float = 0.1) -> None:
        pass


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "Machine", Known)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.mark.parametrize("model_type", able("disp_llm", FAMILY_TYPES))
def test_a_pruned_model_beside_its_dense_one(
    model_type: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    dense = saved(model_type)
    api.prune(
        api.Request(str(dense), "disp_llm", sparsity=0.3, calibration=ids_file, options={"unmet": "cut", "steps": 1}),
        tmp_path / "out",
    )
    done = run(tmp_path / "out", dense, "--batch", "1,3", "--prompt", 8, "--new", 2, "--repeats", 1, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "records.jsonl").read_text().splitlines()[-1]) == record
    assert (record["command"], record["method"], record["dense"]) == ("bench", "disp_llm", str(dense))
    ours, theirs = record["results"]
    for result, folder in ((ours, tmp_path / "out"), (theirs, dense)):
        assert result["parameters"] == api.inspect(str(folder))["parameters"]
        assert result["parameter_bytes"] == 4 * result["parameters"]
        for row, batch in zip(result["batches"], (1, 3), strict=True):
            assert row["batch"] == batch
            assert row["decode_tokens_per_second"] == pytest.approx(batch / row["decode_seconds"])
            assert row["prefill_tokens_per_second"] == pytest.approx(8 * batch / row["prefill_seconds"])
    assert ours["index_map_bytes"] > 0 == theirs["index_map_bytes"]
    assert ours["parameter_bytes"] < theirs["parameter_bytes"]
    for found, mine, other in zip(record["speedup"], ours["batches"], theirs["batches"], strict=True):
        assert found["decode"] == pytest.approx(other["decode_seconds"] / mine["decode_seconds"])
    said = run(tmp_path / "out", "--batch", "1", "--prompt", 4, "--new", 1, "--repeats", 1)
    assert "tokens/s" in said.stdout
    assert "times as fast" not in said.stdout


def test_floors_follow_from_the_weights_of_products() -> None:
    """Those of the linear modules, the head among them also where it is tied; the embedding is looked up, not read."""
    model = tiny_model("llama", tied=True)
    work = Work.of(api.view_model(model), 4)
    linears = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert work.head == linears.pop("lm_head")
    assert work.block == sum(linears.values())
    weights = work.block + work.head
    assert work.prefill_floor(2, 10, Known()) == pytest.approx(2 * 2 * (10 * work.block + work.head) / 1e9)
    assert work.decode_floor(1, Known()) == pytest.approx(4 * weights / 1e8), "reading the weights takes longer"
    assert work.decode_floor(64, Known()) == pytest.approx(2 * 64 * weights / 1e9), "the products take longer"


def test_models_take_turns_on_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    turn = throughput._turn

    def noted(model: Any, ids: torch.Tensor, new: int, clock: Any) -> Any:
        seen.append((model, ids.tolist(), new))
        return turn(model, ids, new, clock)

    monkeypatch.setattr(throughput, "_turn", noted)
    one, two, ids = tiny_model("llama"), tiny_model("opt"), some_ids(2, 5)
    best = measure_speed({"one": one, "two": two}, ids, 3, range(2), Known())
    assert (
        seen == [(one, ids.tolist(), 2), (two, ids.tolist(), 2)] + [(one, ids.tolist(), 3), (two, ids.tolist(), 3)] * 2
    )
    assert all(0 < speed.prefill < math.inf and 0 < speed.decode < math.inf for speed in best.values())


def test_the_machine_is_measured_and_memory_too() -> None:
    assert matrix_rate(CPU, torch.float32, size=64, seconds=0.01) > 1e6
    machine = Machine(CPU, torch.float32, bytes_read=1 << 20, size=64)
    for _ in range(2):
        before = machine.flops_per_second, machine.bytes_per_second
        machine.look(0.005)
        assert machine.flops_per_second >= max(before[0], 1e6)
        assert machine.bytes_per_second >= max(before[1], 1e6)
    memory = PeakMemory(CPU)
    held = torch.ones(1 << 24)
    del held
    peak = memory.peak()
    assert peak is None or peak > 0.9 * 4 * (1 << 24), "what was let go counts too"


@pytest.mark.parametrize(
    ("asked", "status", "words"),
    [
        (["--batch", "0"], 2, "--batch 0: it is a count, at least 1"),
        (["--batch", "1;2"], 2, "--batch 1;2: whole numbers separated by commas are expected, as in 1,16"),
        (["--batch", ","], 2, "--batch is empty"),
        (["--repeats", "0"], 2, "--repeats 0: it is a count, at least 1"),
        (["--prompt", "60", "--new", "10"], 2, "--prompt 60 and --new 10 are 70 tokens together, and"),
        (
            ["--semi-structured", "--device", "cpu", "--prompt", "8", "--new", "2"],
            2,
            "--semi-structured needs an NVIDIA accelerator with 2:4 products (Ampere or later)",
        ),
        (["--device", "abacus"], 2, "unknown device 'abacus'"),
        (["--dtype", "int3", "--prompt", "8"], 2, "unknown dtype 'int3'"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    asked: list[str], status: int, words: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    done = run(saved("llama"), *asked)
    assert (done.exit_code, words in done.stderr, done.stderr.count("\n")) == (status, True, 1), done.stderr
    assert not (tmp_path / "records.jsonl").exists()


def test_matrices_with_two_zeros_in_four_are_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=64)
    wanted = [model.model.layers[0].mlp.down_proj, model.model.layers[1].mlp.gate_proj]
    for module in wanted:
        module.weight.data.view(-1, 4)[:, 1:3] = 0
    model.model.layers[0].mlp.up_proj.weight.data.view(-1, 4)[1:, :2] = 0  # but for one group
    seen: list[Tensor] = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: seen.append(weight) or weight)
    assert throughput.compress(model) == 2
    assert all(torch.equal(a, module.weight) for a, module in zip(seen, wanted, strict=True))
    with pytest.raises(api.UsageError, match="no matrix of the model has two zeros in every four"):
        throughput.compress(tiny_model("llama"))


def test_a_folder_that_is_no_model_is_named(saved: Callable[..., Path], tmp_path: Path) -> None:
    done = run(saved("llama"), tmp_path / "nothing")
    assert (done.exit_code, "no folder" in done.stderr) == (2, True), done.stderr
