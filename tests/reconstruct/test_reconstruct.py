"""Reconstruction: each block against a naive reference in float64, and what must hold for every family and result."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur import api
from secateur.core import records
from secateur.core.errors import UsageError
from secateur.models.load import open_checkpoint
from secateur.models.view import ModelView
from secateur.reconstruct import fit as fitting
from secateur.reconstruct.fit import How
from secateur.reconstruct.prune import reconstruction_of
from secateur.reconstruct.targets import DenseStream, ends
from tests.tiny import FAMILY_TYPES, able, some_ids

QUICK: dict[str, Any] = {"steps": 12, "batch": 80, "held_out": 0.34}
RESULTS: dict[str, dict[str, Any]] = {
    "zeros": {"method": "wanda", "sparsity": 0.5},
    "2:4": {"method": "wanda", "pattern": "2:4"},
    "narrower": {"method": "magnitude", "pattern": "rows", "sparsity": 0.3},
    "sliced": {"method": "slicegpt", "sparsity": 0.25},
    "selected": {"method": "disp_llm", "params_removed": 0.3, "options": {"steps": 2, "unmet": "cut"}},
    "narrower everywhere": {"method": "llm_pruner", "params_removed": 0.3},
    "without parts": {"method": "depth", "sparsity": 0.16},
    "fewer blocks": {"method": "shortgpt", "params_removed": 0.3},
}


@pytest.fixture
def pruned(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> Callable[..., Path]:
    """Prune a tiny model: `pruned("llama", "zeros")`."""

    def make(model_type: str, result: str, **how: Any) -> Path:
        asked = RESULTS[result]
        options = {name: value for name, value in asked.items() if name in ("pattern", "options")}
        if model_type not in able(
            asked["method"], [model_type], **({"pattern": options["pattern"]} if "pattern" in options else {})
        ):
            pytest.skip(f"{model_type} refuses {asked['method']}")
        calibration = None if asked["method"] == "magnitude" else ids_file
        request = api.Request(str(saved(model_type, **how)), calibration=calibration, **asked)
        api.prune(request, tmp_path / "pruned")
        return tmp_path / "pruned"

    return make


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_errors_fall_and_zeros_and_shapes_stay(
    model_type: str, result: str, pruned: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    folder = pruned(model_type, result)
    record = api.reconstruct(api.ReconstructRequest(str(folder), calibration=ids_file, **QUICK), tmp_path / "out")
    blocks = record["reconstruct"]["blocks"]
    assert all(block["after"] <= block["before"] for block in blocks)
    if result in ("sliced", "fewer blocks"):  # what a random residual stream or block lacks cannot be made up for
        return
    assert any(block["after"] < block["before"] for block in blocks)
    before, after = weights(folder), weights(tmp_path / "out")
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {
        name: (t.shape, t.dtype) for name, t in after.items()
    }
    for name, tensor in before.items():
        if tensor.dim() == 2:
            assert not after[name][tensor == 0].any(), name
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = some_ids(2, 12)
    first = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("result", ["zeros", "sliced", "fewer blocks"])
def test_the_output_comes_nearer_to_the_dense_model(result: str, pruned: Callable[..., Path], tmp_path: Path) -> None:
    folder, many = pruned("llama", result), tmp_path / "many.npy"
    np.save(many, some_ids(256, 20).numpy())
    api.reconstruct(api.ReconstructRequest(str(folder), calibration=str(many), steps=80, batch=800), tmp_path / "out")
    unseen = some_ids(32, 20, seed=5)
    dense, before, after = (
        AutoModelForCausalLM.from_pretrained(place).eval()(unseen).logits
        for place in (tmp_path / "dense-llama", folder, tmp_path / "out")
    )
    assert (after - dense).square().mean() < 0.9 * (before - dense).square().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_does_not_get_better_stays_as_it_was(
    dtype: torch.dtype, pruned: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    folder = pruned("llama", "zeros", dtype=dtype)
    record = api.reconstruct(
        api.ReconstructRequest(str(folder), calibration=ids_file, lr=1e4, **QUICK), tmp_path / "out"
    )
    assert [block["step"] for block in record["reconstruct"]["blocks"]] == [0, 0, 0]
    before, after = weights(folder), weights(tmp_path / "out")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("result", "dtype"), [("zeros", torch.bfloat16), ("sliced", torch.float32), ("fewer blocks", torch.float32)]
)
def test_a_run_stopped_between_blocks_goes_on_to_the_same_bytes(
    result: str,
    dtype: torch.dtype,
    pruned: Callable[..., Path],
    ids_file: str,
    tmp_path: Path,
    interrupted_at: Callable[..., AbstractContextManager[None]],
) -> None:
    folder = pruned("llama", result, dtype=dtype)
    request = api.ReconstructRequest(str(folder), calibration=ids_file, spill=True, **QUICK)
    whole = api.reconstruct(request, tmp_path / "whole")
    with interrupted_at("block-00001"):
        api.reconstruct(request, tmp_path / "resumed")
    resumed = api.reconstruct(request, tmp_path / "resumed", resume=True)
    assert resumed["reconstruct"] == whole["reconstruct"]
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == sorted(
        p.name for p in (tmp_path / "resumed").iterdir()
    )
    assert not list((tmp_path / "whole").glob("*.bin"))
    again = api.reconstruct(request, tmp_path / "whole", resume=True)
    assert again == whole


def test_the_steps_are_those_of_a_naive_reference(windows: Tensor) -> None:
    """Adam on the mean over tokens of |y - t|^2 / |t|^2, in float64, with zeros set to zero after each step."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5)).double()
    with torch.no_grad():
        module[0].weight[0, :3] = 0
    inputs, targets = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    how = How(steps=9, batch=3, together=2, lr=0.05, looks=1, held_out=2, seed=4)
    naive = {name: p.detach().clone() for name, p in module.named_parameters()}
    zero = naive["0.weight"] == 0
    rates = {name: how.lr * max(float(p[p != 0].square().mean().sqrt()), 1e-3) for name, p in naive.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in naive.items()} for _ in range(2))
    from secateur.train.steps import rows_of_step

    for step in range(how.steps):
        leaves = {name: p.clone().requires_grad_() for name, p in naive.items()}
        rows = rows_of_step(step, 4, how.batch, how.seed)
        out = torch.func.functional_call(module, leaves, (inputs[rows],))
        loss = ((out - targets[rows]).square().sum(-1) / targets[rows].square().sum(-1)).mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        rise = min(1.0, (step + 1) / max(1.0, 0.05 * how.steps))
        share = rise * 0.5 * (1 + math.cos(math.pi * step / how.steps))
        for name, gradient in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            mean, spread = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            naive[name] = naive[name] - rates[name] * share * mean / (spread.sqrt() + 1e-8)
        naive["0.weight"] = naive["0.weight"].masked_fill(zero, 0)
    found = fitting.fit(
        module,
        dict.fromkeys(naive, torch.float64),
        lambda block, rows: block(inputs[rows]),
        lambda rows: targets[rows],
        len(inputs),
        how,
    )
    assert found.step == how.steps
    for name, tensor in naive.items():
        torch.testing.assert_close(dict(module.named_parameters())[name].detach(), tensor, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model_type", able("slicegpt", FAMILY_TYPES))
def test_targets_are_in_the_coordinates_of_a_sliced_model(
    model_type: str, pruned: Callable[..., Path], tmp_path: Path, ids_file: str
) -> None:
    """The basis that follows from the weights is the one that the method chose."""
    import numpy as np

    windows = torch.from_numpy(np.load(ids_file))
    folder = pruned(model_type, "sliced")
    chosen = api.plan(
        AutoModelForCausalLM.from_pretrained(tmp_path / f"dense-{model_type}"), "slicegpt", windows, sparsity=0.25
    )
    views: list[ModelView] = [
        open_checkpoint(str(place)).view() for place in (tmp_path / f"dense-{model_type}", folder)
    ]
    stream = DenseStream(*views, windows, device=torch.device("cpu"), dtype=torch.float32)
    for index in range(3):
        stream.advance(index + 1, index)
        assert stream._basis is not None
        basis = chosen.blocks[index].places["leave"].basis_DW
        assert basis is not None
        whole = stream._stream.hidden_STD.double()
        torch.testing.assert_close(stream.target(torch.arange(2)).double(), whole[:2] @ basis, rtol=1e-3, atol=1e-3)


def test_dropped_blocks_fall_to_their_neighbours() -> None:
    assert ends([0, 1, 2], 3) == [1, 2, 3]
    assert ends([0, 3], 5) == [3, 5]
    assert ends([2, 3], 4) == [3, 4]


def test_wrong_requests(pruned: Callable[..., Path], saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    folder = str(pruned("llama", "zeros"))
    other = str(saved("opt"))
    for how, message in (
        ({"model": str(tmp_path / "dense-llama")}, "has no plan of secateur's: reconstruct mends what"),
        ({"steps": 0}, "--steps 0: a count of at least 1"),
        ({"samples": 1}, "--samples 1: at least 2 windows"),
        ({"lr": 0.0}, "--lr 0: it must be above 0"),
        ({"held_out": 0.9}, "--held-out 0.9: a share of the windows above 0 and at most 0.5"),
        ({"dense": other}, "--dense .*: its family is opt, that of .* llama"),
        ({"seqlen": 1000}, r"--seqlen 1000 is outside \[2, 64\]"),
    ):
        asked: dict[str, Any] = {"model": folder, "calibration": ids_file, **how}
        with pytest.raises(UsageError, match=message):
            api.reconstruct(api.ReconstructRequest(**asked), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [(), ("plan-00001",), ("block-00001",)])
def test_prune_with_reconstruction_is_both_in_turn(
    stop: tuple[str, ...],
    saved: Callable[..., Path],
    ids_file: str,
    tmp_path: Path,
    interrupted_at: Callable[..., AbstractContextManager[None]],
) -> None:
    plain = api.Request(str(saved("llama")), "wanda", sparsity=0.5, calibration=ids_file)
    request = replace(plain, reconstruct=True)
    api.prune(plain, tmp_path / "apart" / "pruned")
    second = replace(reconstruction_of(request), model=str(tmp_path / "apart" / "pruned"))
    apart = api.reconstruct(second, tmp_path / "apart" / "out")
    if stop:
        with interrupted_at(*stop):
            api.prune(request, tmp_path / "out")
        with pytest.raises(UsageError, match="go on with --resume"):
            api.prune(request, tmp_path / "out")
    record = api.prune(request, tmp_path / "out", resume=bool(stop))
    assert (record["command"], record["reconstruct"]) == ("reconstruct", apart["reconstruct"])
    assert record["seconds_before"] > 0
    one, other = (place / "out" / "model.safetensors" for place in (tmp_path, tmp_path / "apart"))
    assert one.read_bytes() == other.read_bytes()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", "records.jsonl", "apart", "dense-llama", Path(ids_file).name}
    assert [r["command"] for r in records.read([tmp_path / "records.jsonl"])] == ["reconstruct"]
    assert api.prune(request, tmp_path / "out", resume=True) == record
    with pytest.raises(UsageError, match="had sparsity"):
        api.prune(replace(request, sparsity=0.6), tmp_path / "out", resume=True)


def test_the_recipe_of_a_result_has_both_steps_and_gives_the_same_bytes(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(ids_file).parent)
    folder = saved("llama")
    request = api.Request(str(folder), "wanda", sparsity=0.5, calibration=ids_file, reconstruct=True)
    api.prune(request, tmp_path / "out")
    recipe = api.read_recipe(tmp_path / "out", model=str(folder))
    assert [step.kind for step in recipe.steps] == ["prune", "reconstruct"]
    *_, last = api.run_recipe(recipe, tmp_path / "again")
    assert last["same"] is True


def test_a_comparison_has_results_before_and_after(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    base = api.Request(str(saved("llama")), "", calibration=ids_file, samples=6, reconstruct=True)
    asked = api.CompareRequest(base, ["wanda"], sparsities=[0.5])
    found = api.compare(asked, tmp_path / "out", api.EvalRequest("", text=ids_file))
    assert [record.get("method") for record in found.records] == [None, "wanda", "wanda"]
    assert [bool(record.get("reconstruct")) for record in found.records] == [False, False, True]
    assert not found.cells.notes()
    assert found.table is not None
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "wanda + reconstruction" in page
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} >= {
        "wanda-unstructured-0.5",
        "wanda-unstructured-0.5-reconstructed",
    }


def test_a_sweep_of_reconstructed_results_is_a_series_of_its_own(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    request = api.Request(str(saved("llama")), "wanda", calibration=ids_file, reconstruct=True)
    measured = list(api.sweep(request, [0.3, 0.5], tmp_path, api.EvalRequest("", text=ids_file)))
    assert [Path(record["out"]).name for record in measured[1:]] == [
        "wanda-0.3-reconstructed",
        "wanda-0.5-reconstructed",
    ]
    assert all(record["reconstruct"] for record in measured[1:])


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    pruned: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    folder = pruned("llama", "narrower")
    before = sorted(tmp_path.rglob("*"))
    request = api.ReconstructRequest(str(folder), calibration=ids_file, **QUICK)
    record = api.estimate_reconstruct(request)
    assert (record["blocks"], record["batch"], record["calibration_tokens"]) == (3, 80, 120)
    assert 0 < record["seconds_estimated"] < 60
    assert record["memory_bytes"] > 2 * 120 * 32 * 4
    asked = api.Request(str(tmp_path / "dense-llama"), "wanda", sparsity=0.5, calibration=ids_file)
    alone, both = (api.estimate(api.prepare(replace(asked, reconstruct=more))) for more in (False, True))
    assert both["seconds_estimated"] > alone["seconds_estimated"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_text_is_refused_before_the_pruning(saved: Callable[..., Path], tmp_path: Path) -> None:
    request = api.Request(str(saved("llama")), "magnitude", sparsity=0.5, reconstruct=True)
    for do in (lambda: api.estimate(api.prepare(request)), lambda: api.prune(request, tmp_path / "out")):
        with pytest.raises(UsageError, match="--reconstruct learns from a text"):
            do()
    assert {path.name for path in tmp_path.iterdir()} == {"dense-llama"}
