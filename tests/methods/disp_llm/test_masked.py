"""The masked model of DISP-LLM against a naive float64 forward.

Also its frozen weights, its loss, its count of parameters, and the choice of indices.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import api
from secateur.methods.disp_llm.choose import choose, smallest
from secateur.methods.disp_llm.hypernetwork import HYPERNETWORKS, Hypernetwork
from secateur.methods.disp_llm.learning import budget_term
from secateur.methods.disp_llm.masked import MaskedModel, keep_gates, masked_norm
from secateur.models import loss
from secateur.models.runtime import SELECT_FORMS
from secateur.plan.structures import SELECTIONS, find_structures
from tests.tiny import BLOCKS, FAMILY_TYPES, FFN, HIDDEN, able, some_ids, tiny_model

CPU = torch.device("cpu")


def masked_of(
    model: Any, form: str = SELECT_FORMS[0], *, dtype: torch.dtype = torch.float64, **how: bool
) -> MaskedModel:
    view = api.view_model(model)
    return MaskedModel(
        view, find_structures(view, constrained=False, form=form, whole=True), form, device=CPU, dtype=dtype, **how
    )


def random_gates(count: int, seed: int = 0) -> Tensor:
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < 0.7).double()


def naive_norm(x: Tensor, kept: Tensor, norm: Any, *, centred: bool, epsilon: float) -> Tensor:
    """Token by token, over the kept features alone; zeros elsewhere."""
    out = torch.zeros_like(x)
    where = kept.bool()
    part = x[:, where]
    if centred:
        part = part - part.mean(1, keepdim=True)
    part = part / (part.square().mean(1, keepdim=True) + epsilon).sqrt() * norm.weight[where]
    out[:, where] = part + norm.bias[where] if getattr(norm, "bias", None) is not None else part
    return out


class NaiveBlock(nn.Module):
    """A block with masks written out on the stock modules; what attends is the stock attention."""

    def __init__(self, block: Any, view: Any, gates: dict[str, Tensor], form: str) -> None:
        super().__init__()
        self.block, self.view, self.gates, self.form = block, view, gates, form

    def read(self, number: int, x: Tensor, selection: str) -> Tensor:
        family = self.view.family
        norm, gate = self.block.get_submodule(family.norms[min(number, len(family.norms) - 1)]), self.gates[selection]
        if self.form == SELECT_FORMS[0]:
            return norm(x) * gate
        how = {"centred": family.norm.centred, "epsilon": family.norm.epsilon_of(self.view.config)}
        return torch.stack([naive_norm(row, gate, norm, **how) for row in x])

    def mlp(self, x: Tensor) -> Tensor:
        view = self.view
        path, get = view.family.matrices, self.block.get_submodule
        if "gate" not in path:
            act = get("activation_fn") if hasattr(self.block, "activation_fn") else get("mlp.activation_fn")
            middle = act(get(path["up"])(x))
        elif path["gate"] == path["up"]:
            gate, up = get(path["gate"])(x).chunk(2, -1)
            middle = up * get("mlp").activation_fn(gate)
        else:
            middle = get("mlp").act_fn(get(path["gate"])(x)) * get(path["up"])(x)
        return get(path["down"])(middle * self.gates["ffn"]) * self.gates["mlp_out"]

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        attended = (
            self.block.self_attn(hidden_states=self.read(0, hidden_states, "attention_in"), **arguments)[0]
            * self.gates["attention_out"]
        )
        if self.view.family.parallel:
            return hidden_states + attended + self.mlp(self.read(1, hidden_states, "mlp_in"))
        hidden = hidden_states + attended
        return hidden + self.mlp(self.read(1, hidden, "mlp_in"))


@pytest.mark.parametrize("form", SELECT_FORMS)
@pytest.mark.parametrize("model_type", able("disp_llm"))
def test_the_masked_model_equals_a_naive_reference(model_type: str, form: str) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    masked = masked_of(model, form)
    gates = random_gates(sum(masked.structures.widths))
    found = masked.logits(some_ids(), gates)
    dense = model(some_ids()).logits
    view, parts = api.view_model(model), masked.structures.split(gates)
    blocks: Any = model.get_submodule(view.family.blocks)
    for index in range(BLOCKS):
        blocks[index] = NaiveBlock(
            blocks[index], view, {s: parts[n] for s, n in masked.structures.uses[index].items()}, form
        )
    # norms of the stock classes compute in float32 whatever they are given
    torch.testing.assert_close(found, model(some_ids()).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, dense, atol=1e-2)


@pytest.mark.parametrize("model_type", able("disp_llm"))
def test_gates_that_are_all_open_are_the_dense_model(model_type: str) -> None:
    model = tiny_model(model_type)
    masked = masked_of(model, dtype=torch.float32)
    assert torch.equal(masked.logits(some_ids(), torch.ones(sum(masked.structures.widths))), model(some_ids()).logits)


def test_a_norm_over_open_gates_divides_by_their_number() -> None:
    x, gate = torch.randn(1, 3, 8, dtype=torch.float64), torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    normed = masked_norm(x, gate, None, None, 0.0, centred=False)
    torch.testing.assert_close(normed.square().sum(-1), torch.full((1, 3), 3.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda g: masked_norm(x, g, None, None, 1e-6, centred=True),
        torch.rand(8, dtype=torch.float64).add(0.1).requires_grad_(),
    )


@pytest.mark.parametrize("form", SELECT_FORMS)
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("model_type", able("disp_llm"))
def test_the_count_of_parameters_is_that_of_the_cut_model(
    model_type: str, constrained: bool, form: str, windows: Tensor
) -> None:
    model = tiny_model(model_type)
    norm = "full" if form == SELECT_FORMS[0] else "selected"
    plan = api.plan(model, "disp_llm", windows, sparsity=0.4, unmet="cut", steps=1, constrained=constrained, norm=norm)
    structures = find_structures(api.view_model(model), constrained=constrained, form=form, whole=True)
    kept = [0.0] * len(structures.widths)
    for block, uses in zip(plan.blocks, structures.uses, strict=True):
        for selection, number in uses.items():
            kept[number] = float(len(block.keep[selection]))
    assert structures.parameters(kept) == sum(p.numel() for p in api.cut(model, plan).parameters())
    keep = [torch.arange(int(count)) for count in kept]
    assert structures.counter(CPU)(keep_gates(structures, keep)) == structures.parameters(kept)
    assert structures.total == sum(p.numel() for p in model.parameters())
    if constrained:
        assert all(
            torch.equal(b.keep[s], plan.blocks[0].keep["attention_in"])
            for b in plan.blocks
            for s in SELECTIONS
            if s != "ffn"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model_type", able("disp_llm", FAMILY_TYPES))
def test_the_loss_in_chunks_and_its_gradient_are_those_of_whole_logits(
    model_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_LOGITS_BYTES", 4 * 64 * 7)  # seven positions at a time
    masked = masked_of(tiny_model(model_type, dtype=dtype), dtype=dtype)
    gates, ids = random_gates(sum(masked.structures.widths)), some_ids(3, 11)
    slopes = []
    for compute in (
        masked.loss,
        lambda ids, gate: nn.functional.cross_entropy(
            masked.logits(ids, gate)[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()
        ),
    ):
        gate = gates.clone().requires_grad_()
        found = compute(ids, gate)
        found.backward()
        slopes.append((found.detach().double(), gate.grad))
    exact = dtype == torch.float64
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9 if exact else 0.1, atol=1e-12 if exact else 0.05)


def loss_and_slope(masked: MaskedModel) -> tuple[Tensor, Tensor, int]:
    """With the bytes that are kept for the way back, weights aside."""
    weights, kept = {p.data_ptr() for p in masked.model.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    gate = random_gates(sum(masked.structures.widths)).float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = masked.loss(some_ids(3, 11), gate)
    (slope,) = torch.autograd.grad(found, gate)
    return found.detach(), slope, sum(kept.values())


@pytest.mark.parametrize("form", SELECT_FORMS)
@pytest.mark.parametrize("model_type", able("disp_llm", FAMILY_TYPES))
def test_running_blocks_again_gives_the_same_bytes_and_keeps_less(model_type: str, form: str) -> None:
    model = tiny_model(model_type)
    (loss, slope, kept), (loss_again, slope_again, kept_again) = (
        loss_and_slope(masked_of(model, form, dtype=torch.float32, checkpointing=again)) for again in (False, True)
    )
    assert torch.equal(loss, loss_again)
    assert torch.equal(slope, slope_again)
    assert kept_again < kept / 4


def test_products_in_bfloat16_give_nearly_the_same_gradient() -> None:
    model = tiny_model("llama")
    (loss, slope, _), (loss_narrow, slope_narrow, _) = (
        loss_and_slope(masked_of(model, dtype=torch.float32, autocast=narrow)) for narrow in (False, True)
    )
    assert 0 < abs(loss - loss_narrow) < 0.01 * loss
    assert slope_narrow.dtype == torch.float32
    assert 0.999 < torch.cosine_similarity(slope, slope_narrow, dim=0) < 1


@pytest.mark.parametrize("kind", HYPERNETWORKS)
def test_weights_stay_frozen_and_every_part_of_the_network_learns(kind: str) -> None:
    masked = masked_of(tiny_model("llama"), dtype=torch.float32)
    network = Hypernetwork(masked.structures.widths, kind)
    loss = masked.loss(some_ids(), torch.sigmoid(network())) + budget_term(torch.sigmoid(network()).sum(), 100.0)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in masked.model.parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())
    assert "input_SI" not in dict(network.named_parameters()), "the fixed input is no parameter"
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            network.state_dict().values(),
            Hypernetwork(masked.structures.widths, kind).state_dict().values(),
            strict=True,
        )
    )


@pytest.mark.parametrize("multiple", [1, 8, 20])
@pytest.mark.parametrize("model_type", able("disp_llm", FAMILY_TYPES))
def test_what_is_chosen_is_within_the_budget_rounded_and_never_empty(model_type: str, multiple: int) -> None:
    structures = find_structures(
        api.view_model(tiny_model(model_type)), constrained=False, form=SELECT_FORMS[0], whole=True
    )
    logit_N = torch.randn(sum(structures.widths), generator=torch.Generator().manual_seed(2))
    logit_N[:HIDDEN] = -1e6  # a structure that nobody wants
    target = 0.7 * structures.total
    keep = choose(logit_N, structures, target=target, multiple=multiple, half=False)
    left = float(structures.parameters([float(len(indices)) for indices in keep]))
    assert left <= target
    assert left > (0.99 if multiple == 1 else 0.85) * target
    for width, indices in zip(structures.widths, keep, strict=True):
        assert 0 < len(indices) <= width
        assert len(indices) % multiple == 0 or len(indices) == width
        assert (indices.diff() > 0).all()
    assert len(keep[0]) == multiple
    best = structures.split(logit_N)[1].topk(len(keep[1])).indices.sort().values
    assert torch.equal(keep[1].long(), best)
    assert smallest(structures, multiple) < left
    none = choose(torch.full_like(logit_N, -1.0), structures, target=target, multiple=multiple, half=True)
    assert [len(indices) for indices in none] == [multiple] * len(none)
    assert {*structures.widths} == {HIDDEN, FFN}
