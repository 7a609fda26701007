"""Packed storage: unpacking gives the same bytes, and the size is that of the layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from secateur import api
from secateur.models.pack import decode, encode
from tests.folders import contents
from tests.tiny import MODEL_TYPES


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (6, 8), (7, 12), (0, 4), (4, 4, 8)])
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_tensors_round_trip(dtype: torch.dtype, shape: tuple[int, ...], kept: float) -> None:
    tensor = (torch.randn(shape) * (torch.rand(shape) < kept)).to(dtype)
    if tensor.numel() > 3:
        tensor.view(-1)[:3] = torch.tensor(
            [-0.0, float("nan"), float("inf")], dtype=dtype
        )  # bits, not numbers, are kept
    assert same_bits(decode(encode(tensor), tensor.shape), tensor)


@pytest.mark.parametrize(("how", "bits"), [("2of4", 2 * 16 + 8 / 3), ("1of4", 16 + 2), ("mask", 1.5 * 16 + 4)])
def test_the_smallest_form_is_chosen(how: str, bits: float) -> None:
    """Bits for four weights of two bytes: values, and one byte for three groups, for four groups, or for two."""
    keep = {"2of4": [1, 0, 0, 1, 0, 1, 1, 0], "1of4": [0, 0, 1, 0, 1, 0, 0, 0], "mask": [1, 1, 1, 0, 0, 0, 0, 0]}[how]
    tensor = (torch.rand(48, 24) + 1).to(torch.bfloat16) * torch.tensor(keep * 3)
    parts = encode(tensor)
    assert set(parts) == {how, "values"}
    assert sum(part.nbytes for part in parts.values()) * 8 / (tensor.numel() / 4) == pytest.approx(bits)
    assert same_bits(decode(parts, tensor.shape), tensor)


def test_what_would_not_get_smaller_stays() -> None:
    for tensor in (torch.ones(8, 8), torch.zeros(8), torch.zeros(8, 8, dtype=torch.uint8)):
        assert set(encode(tensor)) == {""}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_checkpoint_comes_back_byte_for_byte(model_type: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    api.prune(
        api.Request(str(saved(model_type, dtype=torch.bfloat16)), "magnitude", pattern="2:4"), tmp_path / "sparse"
    )
    packed = api.pack(str(tmp_path / "sparse"), tmp_path / "packed")
    assert packed["bytes_after"] < 0.9 * packed["bytes_before"]
    api.unpack(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "sparse")


def test_shards_and_narrow_models_come_back(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.models.save.ONE_FILE_UP_TO", 0)
    api.prune(
        api.Request(str(saved("llama")), "magnitude", sparsity=0.5, modules="mlp", pattern="rows"), tmp_path / "narrow"
    )
    api.prune(api.Request(str(tmp_path / "narrow"), "magnitude", sparsity=0.7), tmp_path / "sparse")
    api.pack(str(tmp_path / "sparse"), tmp_path / "packed")
    assert len(list((tmp_path / "packed" / "secateur").glob("packed-*.safetensors"))) > 3
    api.unpack(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "sparse")


def test_bad_input_is_refused_in_a_line_and_leaves_nothing(saved: Callable[..., Path], tmp_path: Path) -> None:
    api.prune(api.Request(str(saved("llama")), "magnitude", sparsity=0.5), tmp_path / "sparse")
    api.pack(str(tmp_path / "sparse"), tmp_path / "packed")
    with pytest.raises(api.UsageError, match="exists and is not empty"):
        api.pack(str(tmp_path / "sparse"), tmp_path / "packed")
    with pytest.raises(api.UsageError, match="holds the model"):
        api.pack(str(tmp_path / "sparse"), tmp_path / "sparse", overwrite=True)
    with pytest.raises(api.UsageError, match="lies inside the packed checkpoint"):
        api.unpack(tmp_path / "packed", tmp_path / "packed" / "back")
    with pytest.raises(api.SecateurError, match="is packed: write it out first, with 'secateur unpack"):
        api.pack(str(tmp_path / "packed"), tmp_path / "twice")
    with pytest.raises(api.SecateurError, match=r"is not packed: it has no packed\*\.safetensors"):
        api.unpack(tmp_path / "sparse", tmp_path / "back")
    file = tmp_path / "packed" / "secateur" / "packed.safetensors"
    whole = file.read_bytes()
    value = 8 + int.from_bytes(whole[:8], "little")  # the first byte behind the header
    with safe_open(file, framework="pt") as handle:
        about = handle.metadata()
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(".mask"))
    damaged = {
        "truncated or damaged": lambda: file.write_bytes(whole[:-100]),
        "truncated or damaged .the unpacked file is not the file": lambda: file.write_bytes(
            whole[:value] + bytes([whole[value] ^ 1]) + whole[value + 1 :]
        ),
        "truncated or damaged .+ values for": lambda: save_file(
            {**tensors, name: torch.zeros_like(tensors[name])}, file, about
        ),
        "not packed by secateur .format 'pt'.": lambda: save_file(tensors, file, {"format": "pt"}),
        "version 99 of the layout": lambda: save_file(tensors, file, {**about, "version": "99"}),
    }
    for message, damage in damaged.items():
        damage()
        with pytest.raises(api.SecateurError, match=message):
            api.unpack(tmp_path / "packed", tmp_path / "back")
    assert not list(tmp_path.glob("back*"))
