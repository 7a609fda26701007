"""SliceGPT against a naive float64 reference: the stock model, run whole, with the residual stream projected at every
place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from secateur import api
from secateur.calibrate.statistics import SecondMoment
from secateur.calibrate.stream import Stream
from secateur.core.errors import UsageError
from secateur.core.timing import Stopwatch
from secateur.methods import find_method
from secateur.methods.slicegpt import plan_place, sizes_left, width_after
from secateur.models.canonical import canonical_view
from secateur.models.load import build_skeleton
from secateur.models.parameters import count_parameters
from secateur.plan.plan import Place, Plan
from secateur.prune.driver import pruned_blocks
from secateur.prune.job import Job
from secateur.prune.prepare import parameters_expected
from tests.layouts import layout_of
from tests.tiny import BLOCKS, FAMILY_TYPES, HIDDEN, able, some_ids, tiny_config, tiny_model

METHOD = find_method("slicegpt")
SLICED, SLICED_FAMILIES = able("slicegpt"), able("slicegpt", FAMILY_TYPES)
SEQUENTIAL = [t for t in SLICED if layout_of(t).skips == 2]
WITH_AND_WITHOUT_BIASES: list[dict[str, Any]] = [{}, {"tied": True}]
CASES = [(t, how) for t in SLICED for how in WITH_AND_WITHOUT_BIASES] + [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("opt", {"enable_bias": False}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("llama", {"rms_norm_eps": 1e-2}),
]


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock RMSNorms compute in float32 whatever they are given; here they keep float64."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    for model_type in SLICED:
        for module in tiny_model(model_type).modules():
            if type(module).__name__.endswith("RMSNorm"):
                monkeypatch.setattr(type(module), "forward", forward)


def rotated_at_full_width(model: PreTrainedModel, windows: Tensor, **options: Any) -> PreTrainedModel:
    """The model with every place rotated and nothing sliced, which the command line leaves out (sparsity 0 is the
    identity there).
    """
    view = canonical_view(api.view_model(model), model.dtype)
    settings = METHOD.options({"orientation": "random", **options})
    job = Job(view, METHOD, settings, ({},) * view.blocks, sparsity=0.0, seed=4)
    stream = Stream(view, windows, device=torch.device("cpu"), dtype=model.dtype)
    plan = Plan({}, tuple(block_plan for _, block_plan in pruned_blocks(job, stream, Stopwatch())))
    sliced = api.cut(model, plan)
    basis_DW = plan.blocks[1].places["enter"].basis_DW
    assert basis_DW is not None
    assert (basis_DW.abs() > 1e-3).double().mean() > 0.9, "a rotation that mixes everything"
    return sliced


@pytest.mark.parametrize("adapters", ["aligned", "dense"])
@pytest.mark.parametrize(("model_type", "how"), CASES)
def test_rotating_alone_changes_nothing(
    model_type: str, how: dict[str, Any], adapters: str, windows: Tensor, exact_norms: None
) -> None:
    model = tiny_model(model_type, dtype=torch.float64, **how)
    rotated = rotated_at_full_width(model, windows, adapters=adapters)
    torch.testing.assert_close(rotated(some_ids()).logits, model(some_ids()).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", SLICED)
def test_rotating_alone_equals_the_stock_model(model_type: str, tied: bool, windows: Tensor) -> None:
    """The stock norms as they are: float32 inside, which is what the difference is."""
    model = tiny_model(model_type, tied=tied, dtype=torch.float64)
    torch.testing.assert_close(
        rotated_at_full_width(model, windows)(some_ids()).logits, model(some_ids()).logits, rtol=0, atol=1e-5
    )
    model = tiny_model(model_type, tied=tied)
    logits, rotated = model(some_ids()).logits, rotated_at_full_width(model, windows)(some_ids()).logits
    assert (rotated - logits).norm() / logits.norm() < 1e-4


class Reference:
    """The procedure on the stock model, in float64: every half of a block is run whole, and projected on its principal
    directions.

    Projecting is what slicing amounts to: with orthonormal Q, (x Q) (W Q)^T = (x Q Q^T) W^T, the norm of x Q is that of
    x Q Q^T, and an adapter Q1^T Q2 takes x Q1 to (x Q1 Q1^T) Q2. No weight is rotated here, and no adapter made.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, width: int, *, slice_head: bool = False, normed: bool = False
    ) -> None:
        self.model, self.family = model, api.view_model(model).family
        self.blocks: nn.ModuleList = model.get_submodule(self.family.blocks)  # type: ignore[assignment]
        self.slice_head, self.normed = slice_head, normed
        self.bases: list[Tensor] = []
        self._run(windows, width)

    def logits(self, ids: Tensor) -> Tensor:
        return self._run(ids, None)

    def _run(self, ids: Tensor, width: int | None) -> Tensor:
        hidden, arguments = self._enter(ids)
        used = iter(list(self.bases))

        def project(x: Tensor) -> Tensor:
            basis = next(used, None) if width is None else self._principal(x, width)
            assert basis is not None
            return x @ basis @ basis.T

        hidden = project(hidden)
        for number, block in enumerate(self.blocks):
            last = number == len(self.blocks) - 1 and not self.slice_head
            norms = [block.get_submodule(path) for path in self.family.norms]
            attended = self._written(block.self_attn(hidden_states=norms[0](hidden), **arguments)[0])
            if self.family.parallel:
                hidden = hidden + attended + self._written(self._mlp(block, norms[0](hidden)))
            else:
                hidden = project(hidden + attended)
                hidden = hidden + self._written(self._mlp(block, norms[1](hidden)))
            hidden = hidden if last else project(hidden)
        return self.model.get_submodule(self.family.head)(self.model.get_submodule(self.family.final_norm)(hidden))

    def _enter(self, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        seen: dict[str, Any] = {}
        handle = self.blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(hidden=args[0], **kwargs), with_kwargs=True
        )
        self.model(ids, use_cache=False)
        handle.remove()
        return self._written(seen.pop("hidden")), seen

    def _mlp(self, block: nn.Module, x: Tensor) -> Tensor:
        for name in self.family.mlp:
            x = block.get_submodule(name)(x)
        return x

    def _written(self, x: Tensor) -> Tensor:
        """What is written to the residual; a LayerNorm takes its mean off when it is read, so it may go at once."""
        return x - x.mean(-1, keepdim=True) if self.family.norm.centred else x

    def _principal(self, x: Tensor, width: int) -> Tensor:
        rows = x.flatten(0, -2)
        if self.normed:
            rows = rows / rows.square().mean(1, keepdim=True).sqrt()
        _, _, directions = np.linalg.svd(
            rows.numpy(), full_matrices=True
        )  # principal directions without ever forming a second moment
        basis = torch.from_numpy(directions[:width].T.copy())
        self.bases.append(basis)
        return basis


def angles(first_DW: Tensor, second_DW: Tensor) -> Tensor:
    """Sines of the principal angles between two subspaces."""
    return torch.linalg.svdvals(second_DW - first_DW @ (first_DW.T @ second_DW))


def places_of(plan: Plan) -> list[Tensor]:
    found = [plan.blocks[0].places["enter"]]
    for block in plan.blocks:
        found += [place for name, place in block.places.items() if name != "enter"]
    return [place.basis_DW for place in found if place.basis_DW is not None]


@pytest.mark.parametrize(
    "options",
    [{}, {"slice_head": True}, {"signal": "normed"}, {"adapters": "dense"}, {"orientation": "random"}],
    ids=str,
)
@pytest.mark.parametrize("model_type", SLICED)
@torch.no_grad()
def test_subspaces_and_logits_are_those_of_the_reference(
    model_type: str, options: dict[str, Any], windows: Tensor, exact_norms: None
) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    plan = api.plan(model, "slicegpt", windows, sparsity=0.25, **options)
    reference = Reference(
        model, windows, 24, slice_head=options.get("slice_head", False), normed=options.get("signal") == "normed"
    )
    found = places_of(plan)
    assert len(found) == 1 + BLOCKS * layout_of(model_type).skips
    for basis_DW, expected_DW in zip(found, reference.bases, strict=False):
        assert basis_DW.shape == (HIDDEN, 24)
        assert angles(expected_DW, basis_DW).max() < 1e-7
    sliced = api.cut(model, plan)
    torch.testing.assert_close(sliced(some_ids()).logits, reference.logits(some_ids()), rtol=0, atol=1e-7)
    assert (sliced(some_ids()).logits - model(some_ids()).logits).norm() > 0.01 * model(some_ids()).logits.norm()


@pytest.mark.parametrize("model_type", SLICED_FAMILIES)
@torch.no_grad()
def test_the_norm_divides_by_the_original_width(model_type: str, windows: Tensor) -> None:
    """Dividing by the width that is left would be a silent error: outputs scaled by sqrt(W / D)."""
    model = tiny_model(model_type, dtype=torch.float64)
    sliced = api.cut(model, api.plan(model, "slicegpt", windows, sparsity=0.5))
    norm: Any = sliced.get_submodule(f"{api.view_model(model).family.blocks}.0.{api.view_model(model).family.norms[0]}")
    x_BW = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(
        norm(x_BW), x_BW / (x_BW.square().sum(-1, keepdim=True) / HIDDEN + norm.epsilon * 16 / HIDDEN).sqrt()
    )


@pytest.mark.parametrize("options", [{}, {"slice_head": True}, {"energy": 0.97, "round": 1}], ids=str)
@pytest.mark.parametrize("model_type", SLICED)
@torch.no_grad()
def test_aligned_adapters_are_the_same_function_with_fewer_parameters(
    model_type: str, options: dict[str, Any], windows: Tensor
) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    asked = {} if "energy" in options else {"sparsity": 0.25}
    aligned, dense = (
        api.plan(model, "slicegpt", windows, adapters=form, **asked, **options) for form in ("aligned", "dense")
    )
    first, second = api.cut(model, aligned), api.cut(model, dense)
    torch.testing.assert_close(first(some_ids()).logits, second(some_ids()).logits, rtol=0, atol=1e-9)
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in second.parameters())
    for mine, theirs in zip(places_of(aligned), places_of(dense), strict=True):
        assert angles(mine, theirs).max() < 1e-7


@torch.no_grad()
def test_an_aligned_adapter_is_the_identity_less_a_symmetric_product(windows: Tensor) -> None:
    plan = api.plan(tiny_model("llama", dtype=torch.float64), "slicegpt", windows, sparsity=0.25)
    place, before = plan.blocks[1].places["between"], plan.blocks[1].places["enter"]
    assert place.basis_DW is not None
    assert before.basis_DW is not None
    adapter = before.basis_DW.T @ place.basis_DW
    left = place.skip["left"]
    assert place.form == left.shape[1] == HIDDEN - 24
    torch.testing.assert_close(adapter, torch.eye(24, dtype=torch.float64) - left @ left.T, rtol=0, atol=1e-12)
    # no other rotation of the second basis brings it closer: the polar factor maximises the trace
    for seed in range(5):
        turned = (
            adapter
            @ torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
        )
        assert turned.trace() < adapter.trace()


def test_energy_keeps_its_share_at_every_place_with_the_smallest_width(windows: Tensor) -> None:
    plan = api.plan(tiny_model("llama", dtype=torch.float64), "slicegpt", windows, energy=0.9, round=1)
    widths = set()
    for block in plan.blocks:
        for place in block.places.values():
            if place.spectrum_D is not None:
                share = place.spectrum_D.cumsum(0) / place.spectrum_D.sum()
                assert place.width == int((share < 0.9).sum()) + 1
                assert place.kept_energy >= 0.9
                widths.add(place.width)
    assert len(widths) > 1, "the case is one where places differ"


def test_a_large_models_parameters_at_a_small_sparsity() -> None:
    """LLaMA-2-7B at s = 0.1 by shapes: larger than dense with the authors' adapters, 0.915 of it with aligned ones."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )

    class Shapes:
        tensors = build_skeleton(config).state_dict()

        def names(self) -> list[str]:
            return list(self.tensors)

        def shape(self, name: str) -> tuple[int, ...]:
            return tuple(self.tensors[name].shape)

        def read(self, name: str) -> Tensor:
            raise AssertionError("shapes are enough")

    view = api.view_model(build_skeleton(tiny_config("llama")))
    view = type(view)("7b", config, config.to_dict(), view.family, Shapes())
    canonical = canonical_view(view, torch.bfloat16)
    share = {}
    for form in ("dense", "aligned"):
        after = sizes_left(view, METHOD.options({"adapters": form}), 0.1)
        assert after is not None
        share[form] = count_parameters(canonical, after) / view.parameters()
    assert share == pytest.approx({"dense": 1.029, "aligned": 0.915}, abs=2e-3)


@pytest.mark.parametrize("model_type", SLICED)
@pytest.mark.parametrize("options", [{}, {"adapters": "dense"}, {"slice_head": True}], ids=str)
def test_counting_by_shapes_is_counting(model_type: str, options: dict[str, Any], windows: Tensor) -> None:
    model = tiny_model(model_type)
    sliced = api.cut(model, api.plan(model, "slicegpt", windows, sparsity=0.25, **options))
    view = api.view_model(model)
    after = sizes_left(view, METHOD.options(options), 0.25)
    assert after is not None
    assert count_parameters(canonical_view(view, model.dtype), after) == sum(p.numel() for p in sliced.parameters())


@pytest.mark.parametrize("model_type", SLICED_FAMILIES)
@pytest.mark.parametrize("wanted", [0.05, 0.2, 0.4])
def test_params_removed_counts_what_is_added(
    saved: Callable[..., Path], model_type: str, wanted: float, ids_file: str, tmp_path: Path
) -> None:
    request = api.Request(
        str(saved(model_type)), "slicegpt", params_removed=wanted, calibration=ids_file, options={"round": 1}
    )
    record = api.prune(request, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert record["params_after"] == sum(p.numel() for p in model.parameters())
    kept = round(HIDDEN * (1 - record["sparsity_measured"]))

    def ratio(width: int) -> float:
        asked = api.Request(request.model, "slicegpt", sparsity=1 - width / HIDDEN, options={"round": 1})
        prepared = api.prepare(asked)
        after = parameters_expected(prepared)
        assert after is not None
        return 1 - after / prepared.checkpoint.view().parameters()

    away = abs(record["pruning_ratio"] - wanted)
    others = [found for found in map(ratio, range(2, HIDDEN)) if found > 0]
    assert away <= min(abs(other - wanted) for other in others), "no width is nearer"
    enough = api.prepare(replace(request, at_least=True))
    assert api.estimate(enough)["pruning_ratio"] >= wanted
    assert HIDDEN * (1 - enough.sparsity) in (kept, kept - 1)
    assert api.estimate(api.prepare(request))["params_after"] == record["params_after"]


def test_the_record_has_the_true_sparsity_and_the_plan_the_spectra(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = api.prune(
        api.Request(str(saved("llama")), "slicegpt", sparsity=0.3, calibration=ids_file), tmp_path / "out"
    )
    assert record["sparsity"] == 0.3
    assert record["sparsity_measured"] == 0.5  # 22 of 32, rounded down to 16
    assert "--sparsity 0.3 becomes 0.5: 16 of 32 directions" in capsys.readouterr().err
    plan = api.read_plan(tmp_path / "out")
    place = plan.blocks[1].places["between"]
    assert place.spectrum_D is not None
    assert place.basis_DW is None
    assert (place.spectrum_D.diff() <= 0).all()
    assert json.loads((tmp_path / "out" / "secateur" / "plan.json").read_text())["blocks"][1]["places"]["between"][
        "sha256"
    ]
    with pytest.raises(api.SecateurError, match="keeps its rotations in its weights alone"):
        api.cut(tiny_model("llama"), plan)


@pytest.mark.parametrize("model_type", SLICED_FAMILIES)
def test_a_sliced_model_can_be_pruned_by_weights(
    saved: Callable[..., Path], model_type: str, ids_file: str, tmp_path: Path
) -> None:
    api.prune(api.Request(str(saved(model_type)), "slicegpt", sparsity=0.25, calibration=ids_file), tmp_path / "sliced")
    for number, request in enumerate(
        (
            api.Request(str(tmp_path / "sliced"), "wanda", sparsity=0.5, calibration=ids_file),
            api.Request(str(tmp_path / "sliced"), "magnitude", sparsity=0.5, pattern="rows"),
        )
    ):
        record = api.prune(request, tmp_path / f"twice{number}")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"twice{number}")
        assert torch.isfinite(model(some_ids()).logits).all()
        assert record["params_after"] == sum(p.numel() for p in model.parameters())
        assert record["nonzero_after"] < 0.8 * record["params_before"]


@pytest.mark.parametrize("adapters", ["aligned", "dense"])
def test_the_ratio_of_the_blocks_counts_adapters(
    saved: Callable[..., Path], adapters: str, ids_file: str, tmp_path: Path
) -> None:
    request = api.Request(
        str(saved("llama")), "slicegpt", sparsity=0.25, calibration=ids_file, options={"adapters": adapters}
    )
    record = api.prune(request, tmp_path / "out")
    kept = sum(t.numel() for name, t in load_file(tmp_path / "out" / "model.safetensors").items() if ".layers." in name)
    dense = sum(
        t.numel()
        for name, t in load_file(tmp_path / "dense-llama" / "model.safetensors").items()
        if ".layers." in name and t.dim() == 2
    )
    assert record["pruning_ratio_blocks"] == pytest.approx(1 - kept / dense)


def test_a_dry_run_does_not_guess_widths_that_the_text_decides(saved: Callable[..., Path]) -> None:
    record = api.estimate(api.prepare(api.Request(str(saved("llama")), "slicegpt", options={"energy": 0.9})))
    assert record["params_after"] is None
    assert record["pruning_ratio"] is None


@pytest.mark.parametrize(("hidden", "multiple"), [(32, 8), (96, 8), (768, 8), (2560, 8), (3072, 8), (192, 500)])
def test_the_sparsity_that_a_message_offers_works(hidden: int, multiple: int) -> None:
    options = METHOD.options({"round": multiple})
    with pytest.raises(api.UsageError, match="smaller --set round=N") as caught:
        width_after(hidden, 0.9999, options)
    offered = re.search(r"at most --sparsity ([0-9.]+),", str(caught.value))
    assert (offered is None) == (multiple > hidden)
    assert offered is None or width_after(hidden, float(offered[1]), options) > 0


@pytest.mark.parametrize(("inputs", "outputs"), [(40, 56), (56, 60), (60, 50), (48, 48)])
def test_an_adapter_between_unequal_places_has_the_rank_that_is_left_out_behind_it(inputs: int, outputs: int) -> None:
    def place(width: int, before: Place | None, seed: int) -> Place:
        draw = torch.Generator().manual_seed(seed)
        moment = SecondMoment(64, torch.device("cpu"))
        weights = torch.cat([torch.full((width,), 10.0), torch.full((64 - width,), 0.01)]).double()
        moment.update(
            torch.randn(500, 64, dtype=torch.float64, generator=draw)
            * weights
            @ torch.linalg.qr(torch.randn(64, 64, generator=draw)).Q.double()
        )
        return plan_place(moment, before, 1 - width / 64, METHOD.options({"round": 1}), 0)

    before = place(inputs, None, 1)
    after = place(outputs, before, 2)
    assert before.basis_DW is not None
    assert after.basis_DW is not None
    adapter_IO = before.basis_DW.T @ after.basis_DW
    identity_IO = torch.eye(inputs, outputs, dtype=torch.float64)
    assert torch.linalg.matrix_rank(identity_IO - adapter_IO, atol=1e-8) <= 64 - outputs
    if isinstance(after.form, int):
        assert after.form == 64 - outputs
        rebuilt_IO = identity_IO - after.skip["left"] @ after.skip.get("right", after.skip["left"]).T
        torch.testing.assert_close(rebuilt_IO, adapter_IO, rtol=0, atol=1e-9)
    else:
        assert after.form == "dense"
        assert (64 - outputs) * (inputs + outputs) >= inputs * outputs
        torch.testing.assert_close(after.skip["weight"].T, adapter_IO, rtol=0, atol=1e-12)


def test_opt_keeps_its_dropout_in_training(windows: Tensor) -> None:
    model = tiny_model("opt", dropout=0.5)
    sliced = api.cut(model, api.plan(model, "slicegpt", windows, sparsity=0.25)).train()
    block = sliced.get_submodule("model.decoder.layers.0")
    hidden = torch.randn(1, 8, 24)
    assert not torch.equal(block.mlp_half(hidden), block.mlp_half(hidden))
    block.eval()
    assert torch.equal(block.mlp_half(hidden), block.mlp_half(hidden))


def test_slicing_a_sliced_model_is_refused(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    api.prune(api.Request(str(saved("llama")), "slicegpt", sparsity=0.25, calibration=ids_file), tmp_path / "sliced")
    with pytest.raises(api.SecateurError, match="already rotated and sliced; slice the original"):
        api.prepare(api.Request(str(tmp_path / "sliced"), "slicegpt", sparsity=0.5, calibration=ids_file))


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_model_with_unequal_heads_and_units_can_be_sliced(
    saved: Callable[..., Path], model_type: str, ids_file: str, tmp_path: Path
) -> None:
    modules = "*.0.self_attn.*=0.5,*.1.fc?=0.75" if model_type == "opt" else "*.0.self_attn.*=0.5,*.1.mlp.*=0.75"
    api.prune(api.Request(str(saved(model_type)), "magnitude", modules=modules, pattern="rows"), tmp_path / "narrow")
    api.prune(api.Request(str(tmp_path / "narrow"), "slicegpt", sparsity=0.25, calibration=ids_file), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float64)
    windows = torch.from_numpy(np.load(ids_file))
    expected = api.cut(narrow, api.plan(narrow, "slicegpt", windows, sparsity=0.25))
    torch.testing.assert_close(model(some_ids()).logits, expected(some_ids()).logits, rtol=1e-3, atol=1e-3)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 0.9}, "leaves 3.2, rounded down to a multiple of 8: 0; use at most --sparsity 0.75"),
    ({"sparsity": 0.5, "modules": "mlp=0.5"}, "--modules does not go with slicegpt"),
    ({"sparsity": 0.5, "pattern": "2:4"}, "unknown option of slicegpt 'pattern'"),
    ({"sparsity": 0.5, "options": {"energy": 0.9}}, "--sparsity does not go with --set energy=0.9"),
    (
        {"params_removed": 0.5, "options": {"energy": 0.9}},
        r"--params-removed 0\.5 does not go with these options of slicegpt \(energy=0\.9\): the text decides the widths",
    ),
    ({"params_removed": 0.0, "options": {"energy": 0.9}}, r"--params-removed 0 does not go with .*energy=0\.9"),
    ({"params_removed": 0.95}, "narrowing the residual stream can remove at most"),
    ({}, "needs --sparsity S, --params-removed R, or --set energy=E"),
    ({"sparsity": 1.0}, "sparsity 1 is outside"),
    ({"sparsity": 0.5, "options": {"signal": "loud"}}, "unknown signal 'loud' .allowed: residual, normed"),
    ({"sparsity": 0.5, "options": {"round": 0}}, "round is 0"),
    ({"sparsity": 0.5, "options": {"energy": 1.5}}, "energy 1.5 is outside"),
    ({"sparsity": 0.5, "stock_only": True}, "--stock-only: its residual stream is rotated"),
]


@pytest.mark.parametrize(("asked", "said"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests_are_refused_before_the_work(
    saved: Callable[..., Path], asked: dict[str, Any], said: str, ids_file: str, tmp_path: Path
) -> None:
    with pytest.raises(api.UsageError, match=said):
        api.prune(api.Request(str(saved("llama")), "slicegpt", calibration=ids_file, **asked), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_too_few_tokens_say_what_rank_there_is(saved: Callable[..., Path], tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", some_ids(1, 20).numpy())
    with pytest.raises(api.SecateurError, match="20 calibration tokens span at most 20 of the 24 directions"):
        api.prune(
            api.Request(str(saved("llama")), "slicegpt", sparsity=0.25, calibration=str(tmp_path / "few.npy")),
            tmp_path / "out",
        )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(("tokens", "warns"), [(10 * HIDDEN - 1, True), (10 * HIDDEN, False)])
def test_few_tokens_for_the_width_are_warned_of(
    tokens: int,
    warns: bool,
    dry_run: bool,
    saved: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    length = 29 if warns else 32
    ids = torch.randint(0, 64, (tokens // length, length), generator=torch.Generator().manual_seed(2))
    assert ids.numel() == tokens
    np.save(tmp_path / "few.npy", ids.numpy())
    request = api.Request(str(saved("llama")), "slicegpt", sparsity=0.25, calibration=str(tmp_path / "few.npy"))
    if dry_run:
        api.estimate(api.prepare(request))
    else:
        record = api.prune(request, tmp_path / "out")
        assert len(record["warnings"]) == warns, "the record keeps it"
        (tmp_path / "records.jsonl").unlink()
        assert api.prune(request, tmp_path / "out", resume=True)["warnings"] == record["warnings"]
    said = [line for line in capsys.readouterr().err.splitlines() if "calibration tokens" in line]
    assert len(said) == warns, said
    for word in ("warning: slicegpt: 319 calibration tokens", "32 directions", "give 320 tokens or more"):
        assert all(word in line for line in said), said


def test_a_residual_that_is_not_finite_is_named(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    folder = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:] = 3e38
    model.save_pretrained(folder)
    with pytest.raises(api.SecateurError, match="block 1, after attention: the residual stream is not finite"):
        api.prune(api.Request(str(folder), "slicegpt", sparsity=0.25, calibration=ids_file), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


TIED = [t for t in able("slicegpt", FAMILY_TYPES) if t not in ("opt", "phi")]  # these centre the residual stream


@pytest.mark.parametrize("model_type", TIED)
def test_a_head_that_stays_tied_is_the_best_map_to_the_embedding(
    model_type: str, windows: torch.Tensor, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    folder = saved(model_type, tied=True)
    request = api.Request(
        str(folder), "slicegpt", sparsity=0.25, calibration=ids_file, options={"round": 1, "head": "tied"}
    )
    record = api.prune(request, tmp_path / "out")
    assert record["params_after"] == api.estimate(api.prepare(request))["params_after"]
    assert (
        record["params_after"]
        < api.estimate(api.prepare(replace(request, options={"round": 1, "head": "own"})))["params_after"]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "out" / "model.safetensors"))
    dense = tiny_model(model_type, tied=True)
    plan = api.plan(dense, "slicegpt", windows, sparsity=0.25, round=1, head="tied")
    in_memory = api.cut(dense, plan)
    torch.testing.assert_close(model(some_ids()).logits, in_memory(some_ids()).logits, rtol=1e-4, atol=1e-4)
    first, last = (plan.blocks[0].places["enter"].basis_DW, plan.blocks[-1].places["leave"].basis_DW)
    assert first is not None
    assert last is not None
    table, gain = dense.get_input_embeddings().weight.double(), dense.get_decoder().norm.weight.double()
    naive = torch.linalg.lstsq(table @ first.double(), (table * gain) @ last.double()).solution
    torch.testing.assert_close(in_memory.get_decoder().norm.map.weight.double(), naive, rtol=1e-4, atol=1e-5)
    ids = some_ids(2, 12)
    start = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=start.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", TIED)
def test_at_full_width_a_tied_head_changes_nothing(model_type: str, windows: torch.Tensor) -> None:
    dense = tiny_model(model_type, tied=True)
    rotated = api.cut(dense, api.plan(dense, "slicegpt", windows, energy=0.999999999, head="tied", round=32))
    torch.testing.assert_close(rotated(some_ids()).logits, dense(some_ids()).logits, rtol=1e-3, atol=1e-3)


def test_a_head_that_cannot_stay_tied_is_refused(windows: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"head=tied: .*: its head is not tied to the embedding"):
        api.plan(tiny_model("llama"), "slicegpt", windows, sparsity=0.25, head="tied")
    with pytest.raises(UsageError, match=r"head=tied: .*: the mean is taken from its embedding"):
        api.plan(tiny_model("opt", tied=True), "slicegpt", windows, sparsity=0.25, head="tied")
