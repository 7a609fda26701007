"""SparseGPT against a direct solve of optimal brain surgeon, column by column in float64, that inverts what is left of
the Hessian at every column.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secateur import api
from secateur.calibrate.statistics import SecondMoment
from secateur.methods import find_method
from tests.layouts import layout_of
from tests.methods.test_masks_against_reference import lowest
from tests.tiny import MODEL_TYPES, tiny_model

Found = tuple[torch.Tensor, torch.Tensor]


def damped(x_NI: torch.Tensor, damping: float) -> torch.Tensor:
    hessian = x_NI.t() @ x_NI
    alive = hessian.diag() > 0
    return (
        hessian
        + damping * hessian.diag()[alive].mean() * torch.eye(len(hessian), dtype=hessian.dtype)
        + torch.diag((~alive).double())
    )


def reference(
    weight: torch.Tensor, x_NI: torch.Tensor, pattern: str, rate: float, damping: float, blocksize: int
) -> Found:
    """(keep, new weight): every weight that goes is taken over by the columns behind it, by the inverse of their own
    Hessian.
    """
    weight, keep = weight.clone(), torch.ones(weight.shape, dtype=torch.bool)
    rows, inputs = weight.shape
    hessian, dead = damped(x_NI, damping), x_NI.square().sum(0) == 0
    inverse = [torch.linalg.inv(hessian[j:, j:]) for j in range(inputs)]
    decision = int(pattern.split(":")[1]) if ":" in pattern else blocksize
    for j in range(inputs):
        if j % decision == 0:
            columns = range(j, min(j + decision, inputs))
            cost = torch.stack(
                [0 * weight[:, k] if dead[k] else weight[:, k].square() / inverse[k][0, 0] for k in columns], dim=1
            )
            if ":" in pattern:
                n = int(pattern.split(":")[0])
                for row in range(rows):
                    keep[row, [j + k for k in lowest(cost[row].tolist(), decision - n)]] = False
            else:
                count = math.floor(rows * columns.stop * rate) - math.floor(rows * j * rate)
                for flat in lowest(cost.flatten().tolist(), count):
                    keep[flat // len(columns), j + flat % len(columns)] = False
        gone = torch.where(keep[:, j], 0, weight[:, j])
        weight[:, j:] -= gone[:, None] * inverse[j][0] / inverse[j][0, 0]
    return keep, weight * keep


def reference_blocks(
    model_type: str, windows: torch.Tensor, pattern: str, rate: float, blocksize: int
) -> list[dict[str, Found]]:
    model = tiny_model(model_type, dtype=torch.float64)
    layout = layout_of(model_type)
    layers = model.get_submodule(layout.blocks)
    blocks = []
    for layer in layers:
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            layer.get_submodule(path).register_forward_pre_hook(
                lambda _, inputs, name=name, seen=seen: seen.__setitem__(name, inputs[0].flatten(0, -2))
            )
            for name, (path, _) in layout.matrices.items()
        ]
        with torch.no_grad():
            model(windows)
        for hook in hooks:
            hook.remove()
        found = {}
        for name, (path, rows) in layout.matrices.items():
            weight = layer.get_submodule(path).weight.data
            part = weight[rows]
            found[name] = reference(part, seen[name], pattern, rate, 0.01, blocksize)
            part.copy_(found[name][1])  # later blocks see it
        blocks.append(found)
    return blocks


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    ("pattern", "rate", "blocksize"),
    [("unstructured", 0.5, 128), ("unstructured", 0.63, 20), ("2:4", 0.5, 128), ("3:8", 0.625, 24)],
)
def test_masks_and_weights_equal_the_reference(
    model_type: str, pattern: str, rate: float, blocksize: int, windows: torch.Tensor
) -> None:
    expected = reference_blocks(model_type, windows, pattern, rate, blocksize)
    model = tiny_model(model_type, dtype=torch.float64)
    plan = api.plan(
        model, "sparsegpt", windows, sparsity=None if ":" in pattern else rate, pattern=pattern, blocksize=blocksize
    )
    after = api.view_model(api.cut(model, plan))
    for block, found in zip(plan.blocks, expected, strict=True):
        assert block.masks.keys() == block.updates.keys() == found.keys()
        for name, (keep, weight) in found.items():
            assert torch.equal(block.masks[name].unpack(), keep), f"block {block.index}, {name}"
            torch.testing.assert_close(block.updates[name], weight, rtol=1e-8, atol=1e-8)
            assert torch.equal(after.block(block.index).matrix(name), block.updates[name])


def correlated(tokens: int, inputs: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ torch.randn(
        inputs, inputs, generator=generator, dtype=torch.float64
    )
    return mixed * torch.rand(inputs, generator=generator, dtype=torch.float64)


class Alone:
    """One matrix as a block, with the second moment of given inputs."""

    index = 0

    def __init__(self, weight: torch.Tensor, x_NI: torch.Tensor, rate: float) -> None:
        self.weight, self.rates = weight, {"q": rate}
        self.moment = SecondMoment(x_NI.shape[1], torch.device("cpu"))
        self.moment.update(x_NI)

    def matrix(self, name: str) -> torch.Tensor:
        return self.weight

    def prune(self, **options: object) -> Found:
        method = find_method("sparsegpt")
        plan = method.says.plan_block(self, {"q": self.moment}, method.options(options))
        return plan.masks["q"].unpack(), plan.updates["q"]


def test_inputs_that_are_always_zero_go_first_and_change_nothing() -> None:
    x_NI, weight = correlated(60, 12, 0), torch.randn(5, 12, dtype=torch.float64)
    x_NI[:, [1, 7, 8]] = 0
    for pattern, rate in (("unstructured", 0.4), ("2:4", 0.5)):
        keep, new = Alone(weight, x_NI, rate).prune(pattern=pattern)
        expected_keep, expected = reference(weight, x_NI, pattern, rate, 0.01, 128)
        assert torch.equal(keep, expected_keep)
        assert not keep[:, [1, 7, 8]].any()
        torch.testing.assert_close(new, expected)
    keep, new = Alone(weight, x_NI, 0.1).prune()
    assert int((~keep).sum()) == 6, "of 15 weights that cost nothing, those asked for"
    assert torch.equal(new, weight * keep)


@pytest.mark.parametrize(("pattern", "size"), [("unstructured", 1), ("2:4", 4)])
def test_the_order_of_activation_is_a_permutation_of_the_inputs(pattern: str, size: int) -> None:
    x_NI, weight = correlated(80, 24, 1), torch.randn(6, 24, dtype=torch.float64)
    energy = x_NI.square().sum(0).view(-1, size).sum(1).tolist()
    order = [g * size + k for g in sorted(range(len(energy)), key=lambda g: -energy[g]) for k in range(size)]
    assert order != sorted(order)
    keep, new = Alone(weight, x_NI, 0.5).prune(pattern=pattern, order="activation", blocksize=8)
    expected_keep, expected = reference(weight[:, order], x_NI[:, order], pattern, 0.5, 0.01, 8)
    assert torch.equal(keep[:, order], expected_keep)
    torch.testing.assert_close(new[:, order], expected)


def test_a_singular_hessian_gets_more_damping_and_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    x_NI, weight = correlated(5, 12, 2), torch.randn(4, 12, dtype=torch.float64)  # fewer tokens than inputs
    _, new = Alone(weight, x_NI, 0.5).prune(damping=0.0)
    said = capsys.readouterr().err
    assert "block 0: the Hessian of the input of q is not positive definite with damping 0: trying 0.0001" in said
    torch.testing.assert_close(new, reference(weight, x_NI, "unstructured", 0.5, 1e-4, 128)[1])
    indefinite = Alone(weight, x_NI, 0.5)
    indefinite.moment._sum_II -= 2 * torch.eye(12, dtype=torch.float64)
    _, new = indefinite.prune()
    assert "with damping 0.01: trying 0.1" in capsys.readouterr().err
    assert torch.isfinite(new).all()
    Alone(weight, torch.zeros(5, 12, dtype=torch.float64), 0.5).prune()
    assert "is zero: these inputs are zero on all of the calibration text" in capsys.readouterr().err


def test_the_error_of_reconstruction_is_below_that_of_magnitude_on_average() -> None:
    ratios = []
    for seed in range(20):
        x_NI = correlated(200, 32, seed)
        weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        _, new = Alone(weight, x_NI, 0.5).prune()
        flat = weight.abs().flatten()
        magnitude = weight * (weight.abs() > flat.kthvalue(len(flat) // 2).values)
        ratios.append(
            float((x_NI @ (weight - new).t()).square().sum() / (x_NI @ (weight - magnitude).t()).square().sum())
        )
    assert sum(ratios) / len(ratios) < 0.5


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_each_refinement_lowers_the_error(pattern: str, order: str) -> None:
    x_NI, dead = correlated(200, 32, 3), [2, 5, 6, 9, 20, 21, 22, 31]
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x_NI[:, dead] = 0
    errors, counts, idle = [], [], []
    for fits in (0, 1, 3):
        keep, new = Alone(weight, x_NI, 0.5).prune(pattern=pattern, order=order, refine=fits)
        assert not new[~keep].any()
        errors.append(float((x_NI @ (weight - new).t()).square().sum()))
        counts.append(keep.sum(1))
        idle.append(int(keep[:, dead].sum()))
    assert errors[0] > errors[1] > errors[2]
    assert counts[0].equal(counts[1])
    assert counts[0].equal(counts[2])
    assert idle[2] <= idle[0], "a weight whose input is always zero does not come back"


def test_modules_that_are_not_named_stay_bit_identical(windows: torch.Tensor) -> None:
    model = tiny_model("phi3", dtype=torch.bfloat16)
    plan = api.plan(model, "sparsegpt", windows, modules="k=0.7,up=0,down=1", dtype=torch.float32)
    before, after = api.view_model(model), api.view_model(api.cut(model, plan))
    for index in range(before.blocks):
        old, new = before.block(index), after.block(index)
        changed = {name for name in old.names if not torch.equal(old.matrix(name), new.matrix(name))}
        assert changed == {"k", "down"}
        assert not new.matrix("down").any()
        assert int((new.matrix("k") == 0).sum()) == math.floor(0.7 * new.matrix("k").numel())


def test_what_is_written_is_what_the_plan_names(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    dense = saved("llama", dtype=torch.bfloat16)
    record = api.prune(api.Request(str(dense), "sparsegpt", pattern="2:4", calibration=ids_file), tmp_path / "out")
    assert record["updated"] is True
    assert record["sparsity_measured"] == 0.5
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for block in api.read_plan(tmp_path / "out").blocks:
        stored = weights[f"model.layers.{block.index}.mlp.up_proj.weight"]
        assert block.updated["up"] == hashlib.sha256(stored.view(torch.int16).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "rows"}, "sparsegpt: pattern rows removes whole units"),
        ({"damping": "-1"}, "damping -1 is outside"),
        ({"blocksize": "0"}, "blocksize is 0; it is a number of columns"),
        ({"refine": "-1"}, "refine is -1; it is a number of fits"),
        ({"order": "random"}, "unknown order 'random' .allowed: natural, activation"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(api.UsageError, match=message):
        find_method("sparsegpt").options(options)
