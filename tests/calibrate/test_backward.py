"""The backward pass block by block against autograd on the whole stock model, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur import api
from secateur.calibrate import ending as ending_module
from secateur.calibrate import stream as stream_module
from secateur.calibrate.backward import Backward, mask_gradient, weight_gradient
from secateur.text.windows import IGNORE
from tests.tiny import MODEL_TYPES, tiny_model

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-9, "atol": 1e-12}
ROUNDED = {"rtol": 1e-3, "atol": 2e-7}  # RMSNorm of transformers is in float32, whatever the model's dtype


def _loss(model: Any, windows: Tensor, labels: Tensor) -> Tensor:
    """The mean over all labels in float64: transformers' own is in float32."""
    return torch.nn.functional.cross_entropy(
        model(input_ids=windows).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
    )


def _gradients(model: Any, windows: Tensor, **how: Any) -> tuple[Backward, dict[str, Tensor]]:
    """The gradients of all matrices and their biases, by canonical names, and of what enters the first block."""
    view = api.view_model(model)
    backward = Backward(view, windows, device=CPU, dtype=model.dtype, **how)
    found: dict[str, Tensor] = {}

    def listener(name: str, bias: str) -> Any:
        def listen(x_BTI: Tensor, g_BTO: Tensor) -> None:
            found[name] = found.get(name, 0) + weight_gradient(x_BTI.flatten(0, 1), g_BTO.flatten(0, 1))
            found[bias] = found.get(bias, 0) + g_BTO.sum((0, 1))

        return listen

    for block in backward.blocks():
        backward.retreat(
            block, {name: listener(f"{block.index}.{name}", f"{block.index}.{name}.bias") for name in block.names}
        )
    return backward, found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_are_those_of_the_whole_model(
    model_type: str, tied: bool, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "TOKENS_A_BATCH", 80)  # 4 windows and a remainder of 2
    monkeypatch.setattr(ending_module, "_LOGITS", 64 * 7)  # 7 tokens at a time
    model = tiny_model(model_type, tied=tied, dtype=torch.float64)
    labels = windows.clone()
    labels[1, 12:] = IGNORE
    backward, found = _gradients(model, windows, labels=labels)

    loss = _loss(model, windows, labels)
    loss.backward()
    assert backward.loss == pytest.approx(loss.item(), rel=1e-12)
    assert backward.targets == 6 * 19 - 8
    # the same model with gradients in place of weights: its views split what is fused
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    view = api.view_model(model)
    close = EXACT if view.family.norm.centred else ROUNDED
    for block in view.iterate():
        prefix = view.block_prefix(block.index)
        whole = replace(block, tensors={name: gradients[prefix + name] for name in block.tensors})
        for name in block.names:
            torch.testing.assert_close(found[f"{block.index}.{name}"] / backward.targets, whole.matrix(name), **close)
            if (bias_O := whole.bias(name)) is not None:
                torch.testing.assert_close(found[f"{block.index}.{name}.bias"] / backward.targets, bias_O, **close)


def test_a_model_with_unequal_widths(windows: Tensor) -> None:
    dense = tiny_model("opt", dtype=torch.float64)
    model = api.cut(dense, api.plan(dense, "magnitude", sparsity=0.5, pattern="rows", scope="model"))
    assert len({model.model.decoder.layers[n].fc1.out_features for n in range(3)}) > 1
    backward, found = _gradients(model, windows)
    _loss(model, windows, windows).backward()
    for n, block in enumerate(model.model.decoder.layers):
        for name, part in {
            "q": block.self_attn.q_proj,
            "o": block.self_attn.out_proj,
            "up": block.fc1,
            "down": block.fc2,
        }.items():
            torch.testing.assert_close(found[f"{n}.{name}"] / backward.targets, part.weight.grad, **EXACT)


def test_the_gradient_that_leaves_the_first_block_is_that_of_the_embeddings(windows: Tensor) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    backward, _ = _gradients(model, windows)
    _loss(model, windows, windows).backward()
    table_VD = torch.zeros(64, 32, dtype=torch.float64).index_add_(
        0, windows.flatten(), backward.gradient_STD.flatten(0, 1)
    )
    table_VD[0] = 0  # the padding token has no gradient
    torch.testing.assert_close(table_VD / backward.targets, model.model.embed_tokens.weight.grad, **ROUNDED)


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi3"])
def test_mask_gradients_are_those_of_a_scaled_input_and_of_each_window(model_type: str, windows: Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    view = api.view_model(model)
    masks = {
        name: torch.ones(len(windows), view.block(1).dims.shape(name)[1], dtype=torch.float64, requires_grad=True)
        for name in ("o", "down")
    }

    def scale(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return ((inputs[0].reshape(*windows.shape, -1) * masks[name][:, None]).reshape(inputs[0].shape),)

        return hook

    for name in masks:
        model.get_submodule(view.block_prefix(1) + view.family.matrices[name]).register_forward_pre_hook(scale(name))
    (_loss(model, windows, windows) * windows[:, 1:].numel()).backward()
    found = {}
    backward = Backward(view, windows, device=CPU, dtype=torch.float64, first=1)
    for block in backward.blocks():
        weights = {name: block.matrix(name) for name in masks}
        backward.retreat(
            block, {n: lambda x, g, n=n, w=weights: found.__setitem__(n, mask_gradient(x, g, w[n])) for n in masks}
        )
    assert block.index == 1
    for name, mask_SI in masks.items():
        torch.testing.assert_close(found[name], mask_SI.grad, **ROUNDED)


def test_padding_on_the_right_changes_nothing(windows: Tensor, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    short, expected = _gradients(model, windows[:, :13])
    padded, labels = windows.clone(), windows.clone()
    padded[:, 13:], labels[:, 13:] = 0, IGNORE
    long, found = _gradients(model, padded, labels=labels, spill=tmp_path / "inputs")
    assert (long.targets, long.loss) == (short.targets, pytest.approx(short.loss))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **ROUNDED)


def test_bad_input(windows: Tensor) -> None:
    model = tiny_model("llama")
    with pytest.raises(api.UsageError, match="no label is to be predicted"):
        Backward(
            api.view_model(model), windows, device=CPU, dtype=torch.float32, labels=torch.full_like(windows, IGNORE)
        )
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(api.SecateurError, match="the loss is nan"):
        Backward(api.view_model(model), windows, device=CPU, dtype=torch.float32)
    model = tiny_model("llama", dtype=torch.float64)
    model.model.norm.weight.data[:] = 1e300
    with pytest.raises(api.SecateurError, match=r"block 2: the gradient of the loss is not finite"):
        _gradients(model, windows)
