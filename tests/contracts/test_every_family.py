"""Properties of every family, for any method."""

from __future__ import annotations

import pytest
import torch

from secateur import api
from secateur.models.family import find_family
from tests.tiny import MODEL_TYPES, tiny_config, tiny_model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_description_covers_every_parameter_exactly_once(model_type: str, tied: bool) -> None:
    model = tiny_model(model_type, tied=tied)
    family = find_family(model.config, model_type)
    described: list[str] = []
    for path in (*family.embeddings, family.final_norm, *([] if tied else [family.head])):
        described += [f"{path}.{kind}" for kind in ("weight", "bias")]
    if tied:
        described.append(f"{family.head}.bias")  # Phi's head has a bias of its own even when its weight is tied
    norms = (*family.norms, *family.post_norms, *family.head_norms, *family.joint_head_norms)
    inside = [*norms, *dict.fromkeys(family.matrices.values())]
    for index in range(model.config.num_hidden_layers):
        described += [f"{family.blocks}.{index}.{path}.{kind}" for path in inside for kind in ("weight", "bias")]
    parameters = {name for name, _ in model.named_parameters()}
    assert len(described) == len(set(described))
    assert parameters <= set(described), parameters - set(described)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_part_that_is_described_exists(model_type: str) -> None:
    model = tiny_model(model_type)
    family = find_family(model.config, model_type)
    for path in (*family.embeddings, family.final_norm, family.head):
        model.get_submodule(path)
    for path in (*family.norms, *family.post_norms, *family.matrices.values()):
        model.get_submodule(f"{family.blocks}.0.{path}")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_matrices_have_the_shapes_of_the_dims_and_share_memory_with_the_model(model_type: str) -> None:
    model = tiny_model(model_type)
    view = api.view_model(model)
    block = view.block(1)
    total = 0
    for name in block.names:
        assert tuple(block.matrix(name).shape) == block.dims.shape(name)
        total += block.matrix(name).numel()
    paths = dict.fromkeys(view.family.matrices.values())
    assert total == sum(model.get_submodule(f"{view.family.blocks}.1.{path}").weight.numel() for path in paths)
    block.matrix("v").fill_(7.0)
    owner = model.get_submodule(f"{view.family.blocks}.1.{view.family.matrices['v']}").weight
    assert int((owner == 7.0).sum()) == block.matrix("v").numel()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_inputs_that_are_said_to_be_shared_are_the_same_tensor(model_type: str) -> None:
    """One statistic serves all matrices whose `input_of` is equal; the model itself must agree."""
    model = tiny_model(model_type)
    family = find_family(model.config, model_type)
    seen: dict[str, torch.Tensor] = {}
    for name, path in family.matrices.items():
        module = model.get_submodule(f"{family.blocks}.0.{path}")
        module.register_forward_pre_hook(
            lambda _, inputs, n=name: seen.__setitem__(n, inputs[0].reshape(-1, inputs[0].shape[-1]))
        )
    model(torch.arange(10)[None] + 3)
    for name in family.matrices:
        assert torch.equal(seen[name], seen[family.input_of(name)])
    distinct = {family.input_of(name) for name in family.matrices}
    assert len(distinct) == (3 if family.one_norm else 4)


def test_an_unknown_model_type_is_refused_with_the_known_ones() -> None:
    config = tiny_config("llama")
    config.model_type = "mamba"
    with pytest.raises(api.SecateurError, match=r"no family describes model type 'mamba' \(known: .*llama"):
        find_family(config, "x")
