"""The learning loop of DISP-LLM: its budget, parts of a step, saved states, and what stops it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from secateur import api
from secateur.core.errors import NotFiniteError, SecateurError
from secateur.methods.disp_llm import UNMET, DispLLM, learning
from secateur.methods.disp_llm.choose import choose
from secateur.methods.disp_llm.hypernetwork import Hypernetwork
from secateur.methods.disp_llm.learning import Learning, budget_term, learn
from secateur.methods.disp_llm.masked import MaskedModel
from secateur.models import save
from tests.methods.disp_llm.test_masked import masked_of
from tests.tiny import HIDDEN, tiny_model

HOW = Learning(
    steps=150, batch=2, lr=1e-2, weight_decay=0.05, strength=6.0, gate="reinmax", bias=3.0, temperature=1.0, seed=0
)


@pytest.mark.slow
def test_the_budget_term_brings_the_parameters_to_the_target(windows: Tensor) -> None:
    masked = masked_of(tiny_model("llama"), dtype=torch.float32)
    network = Hypernetwork(masked.structures.widths)
    structures = masked.structures
    target = 0.6 * structures.total
    seen = learn(network, masked, windows, target, HOW)
    assert seen[0]["budget"] > 3 * seen[-1]["budget"]
    expected = float(
        structures.parameters([part.sum() for part in structures.split(torch.sigmoid(network() + HOW.bias).detach())])
    )
    assert expected == pytest.approx(target, rel=0.02)
    assert seen[-1]["step"] == HOW.steps
    half = choose(network() + HOW.bias, structures, target=target, multiple=1, half=True)
    assert float(structures.parameters([float(len(k)) for k in half])) == pytest.approx(target, rel=0.01), (
        "what is open half of the time is the budget"
    )


def tiny_with_embeddings(share: float) -> PreTrainedModel:
    """A tiny model whose untied embedding and head hold about this share of all parameters."""
    blocks = sum(p.numel() for name, p in tiny_model("llama").named_parameters() if ".layers." in name)
    return tiny_model("llama", vocab_size=round(share / (1 - share) * blocks / (2 * HIDDEN)))


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_lambda_pulls_alike_whatever_the_share_of_the_embeddings(share: float) -> None:
    """A real model with 40% of its parameters in the embeddings was at 0.09 of 0.30 after 1000 steps when the term
    counted all of them.
    """
    slopes, values = [], []
    for model in (tiny_with_embeddings(share), tiny_with_embeddings(0.25)):
        structures = masked_of(model, dtype=torch.float64).structures
        target = structures.fixed + 0.5 * (structures.total - structures.fixed)
        gate_N = torch.full((sum(structures.widths),), 0.9, dtype=torch.float64, requires_grad=True)
        term = budget_term(structures.counter(torch.device("cpu"))(gate_N), target, structures.fixed)
        slopes.append(torch.autograd.grad(term, gate_N)[0])
        values.append(float(term.detach()))
    assert structures.fixed / structures.total != pytest.approx(share)
    torch.testing.assert_close(slopes[0], slopes[1])
    assert values[0] == pytest.approx(values[1])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_the_defaults_meet_the_budget_within_a_fifth_of_1000_steps(share: float, windows: Tensor) -> None:
    """Half of what blocks hold is to go. A term that counts all parameters is 0.12 away at a share of 0.8."""
    model = tiny_with_embeddings(share)
    masked = masked_of(model, dtype=torch.float32)
    structures = masked.structures
    tables = sum(p.numel() for p in (model.model.embed_tokens.weight, model.lm_head.weight))
    assert tables / structures.total == pytest.approx(share, abs=0.02)
    target = structures.total - 0.5 * sum(p.numel() for p in model.model.layers.parameters())
    network, default = Hypernetwork(structures.widths), DispLLM()
    how = Learning(
        steps=200,
        batch=default.batch,
        lr=default.lr,
        weight_decay=default.weight_decay,
        strength=default.strength,
        gate=default.gate,
        bias=default.bias,
        temperature=default.tau,
        seed=0,
    )
    learn(network, masked, windows % model.config.vocab_size, target, how)
    drawn = float(structures.counter(torch.device("cpu"))(torch.sigmoid(network() + how.bias)).detach())
    assert abs(drawn - target) / (structures.total - structures.fixed) < UNMET


def test_a_budget_that_was_missed_is_no_result_and_more_steps_go_on_from_there(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    request = api.Request(
        str(saved("llama")),
        "disp_llm",
        sparsity=0.3,
        calibration=ids_file,
        options={"steps": 2, "lr": 3e-3, "save_every": 1},
    )
    with pytest.raises(
        SecateurError,
        match=r"has not met its budget: the learned gates remove 0\.0\d+ .+ not 0\.3000; continue with --resume and the option steps=4",
    ):
        api.prune(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    longer = replace(request, options={**request.options, "steps": 80})
    api.prune(longer, tmp_path / "whole")
    record = api.prune(longer, tmp_path / "out", resume=True)
    assert record["options"]["steps"] == 80
    for name in ("model.safetensors", "secateur/plan.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_budget_that_was_missed_may_be_cut_to_all_the_same(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    request = api.Request(str(saved("llama")), "disp_llm", sparsity=0.3, calibration=ids_file, options={"steps": 4})
    with pytest.raises(SecateurError, match="has not met its budget"):
        api.prune(request, tmp_path / "out")
    with pytest.raises(api.UsageError, match=r"had options\.lr = 0\.001"):
        api.prune(replace(request, options={"steps": 4, "lr": 0.1}), tmp_path / "out", resume=True)
    with pytest.raises(SecateurError, match="has done 4 steps, more than steps=3"):
        api.prune(replace(request, options={"steps": 3}), tmp_path / "out", resume=True)
    record = api.prune(replace(request, options={"steps": 4, "unmet": "cut"}), tmp_path / "out", resume=True)
    assert record["pruning_ratio"] == pytest.approx(0.3, abs=0.01)


def test_options_may_not_change_once_a_block_is_written(
    saved: Callable[..., Path],
    ids_file: str,
    tmp_path: Path,
    interrupted_at: Callable[..., AbstractContextManager[None]],
) -> None:
    options = {"steps": 4, "unmet": "cut"}
    request = api.Request(str(saved("llama")), "disp_llm", sparsity=0.3, calibration=ids_file, options=options)
    with interrupted_at("block-00001"):
        api.prune(request, tmp_path / "out")
    with pytest.raises(api.UsageError, match=r"had options\.steps = 4, this one has 8"):
        api.prune(replace(request, options={**options, "steps": 8}), tmp_path / "out", resume=True)
    api.prune(request, tmp_path / "out", resume=True)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "LOOK_EVERY", 2)
    how = replace(HOW, steps=10, save_every=3)
    masked = masked_of(tiny_model("llama"), dtype=torch.float32)
    target = 0.6 * masked.structures.total
    whole, resumed = (Hypernetwork(masked.structures.widths) for _ in range(2))
    seen = learn(whole, masked, windows, target, how)
    calls, loss = [], MaskedModel.loss

    def interrupted(self: MaskedModel, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedModel, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn(resumed, masked, windows, target, how, tmp_path / "state.safetensors")
        again = Hypernetwork(masked.structures.widths, seed=5)
        assert learn(again, masked, windows, target, how, tmp_path / "state.safetensors") == seen
    assert len(calls) == 6 + 7, "steps 4 to 10 alone are run again, from a state between two looks"
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert (
        learn(Hypernetwork(masked.structures.widths), masked, windows, target, how, tmp_path / "state.safetensors")
        == seen
    )
    assert len(calls) == 13, "a run that was complete is not run again"


def test_parts_of_a_step_give_the_same_as_the_whole(windows: Tensor) -> None:
    masked = masked_of(tiny_model("llama"), dtype=torch.float64)
    networks = [Hypernetwork(masked.structures.widths).double() for _ in range(2)]
    seen = [
        learn(network, masked, windows, 0.6 * masked.structures.total, replace(HOW, steps=4, batch=6, accumulate=parts))
        for network, parts in zip(networks, (1, 3), strict=True)
    ]
    assert seen[0][-1]["loss"] == pytest.approx(seen[1][-1]["loss"])
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_a_gradient_is_clipped_to_the_norm_asked_for(windows: Tensor) -> None:
    masked = masked_of(tiny_model("llama"), dtype=torch.float32)
    norms = []
    for clip in (0.0, 1e-3):
        network = Hypernetwork(masked.structures.widths)
        learn(network, masked, windows, 0.6 * masked.structures.total, replace(HOW, steps=1, clip=clip))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])))
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def spoiled(call: int, *, slope: bool) -> Callable[..., Tensor]:
    """The loss of a masked model, from one call on NaN, or with a finite value and a gradient of NaN."""
    calls, loss = [], MaskedModel.loss

    def spoil(self: MaskedModel, ids_BT: Tensor, gate_N: Tensor) -> Tensor:
        calls.append(1)
        found = loss(self, ids_BT, gate_N)
        if len(calls) < call:
            return found
        return found + (0 * gate_N.sum()).sqrt() * 0 if slope else found * float("nan")

    return spoil


@pytest.mark.parametrize(
    ("slope", "words"),
    [
        (False, "the loss is not finite .* at step 6;"),
        (True, r"(a gradient by step 6|the loss) is not finite .*; the last saved state is kept"),
    ],
)
def test_what_is_not_finite_stops_and_is_never_saved_over_a_good_state(
    slope: bool, words: str, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run, without the fault, ends as one that never had it."""
    masked = masked_of(tiny_model("llama"), dtype=torch.float32)
    how, target, file = (
        replace(HOW, steps=9, save_every=2),
        0.6 * masked.structures.total,
        tmp_path / "state.safetensors",
    )
    whole, resumed = (Hypernetwork(masked.structures.widths) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(MaskedModel, "loss", spoiled(6, slope=slope))
        with pytest.raises(SecateurError, match=words) as caught:
            learn(Hypernetwork(masked.structures.widths), masked, windows, target, how, file)
    assert not isinstance(caught.value, NotFiniteError), "which would discard the state"
    assert learn(resumed, masked, windows, target, how, file) == learn(whole, masked, windows, target, how)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_a_run_that_stops_before_its_first_state_leaves_nothing(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = api.Request(
        str(saved("llama")),
        "disp_llm",
        sparsity=0.3,
        calibration=ids_file,
        options={"unmet": "cut", "steps": 4, "save_every": 3},
    )
    with monkeypatch.context() as patch:
        patch.setattr(MaskedModel, "loss", spoiled(2, slope=False))
        with pytest.raises(NotFiniteError, match=r"the loss is not finite .* at step 2; .*try a smaller --set lr"):
            api.prune(request, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    with monkeypatch.context() as patch:
        patch.setattr(MaskedModel, "loss", spoiled(4, slope=False))
        with pytest.raises(SecateurError, match=r"at step 4; .* kept: --resume continues from it"):
            api.prune(request, tmp_path / "out")
    with pytest.raises(api.UsageError, match=r"had options.lr = 0.001, this one has 0.01; give the same settings"):
        api.prune(replace(request, options={**request.options, "lr": 0.01}), tmp_path / "out", resume=True)
    api.prune(request, tmp_path / "out", resume=True)
    api.prune(request, tmp_path / "other")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "other" / "model.safetensors"
    ).read_bytes()


def test_a_disk_that_fills_while_learning_is_reported_in_one_line(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(save, "save_file", full)
    request = api.Request(
        str(saved("llama")), "disp_llm", sparsity=0.3, calibration=ids_file, options={"unmet": "cut", "steps": 1}
    )
    with pytest.raises(SecateurError, match=r"no space left on the disk of .*; free some and go on with --resume"):
        api.prune(request, tmp_path / "out")
