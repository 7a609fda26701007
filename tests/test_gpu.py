"""On an accelerator: the same plans as on the CPU, and streaming that holds one block. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from secateur import api
from secateur.evaluate import throughput
from tests.tiny import FAMILY_TYPES, able, some_ids, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "rows"])
@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_plans_equal_those_of_the_cpu(
    model_type: str, pattern: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    dense = saved(model_type, dtype=torch.float64)
    sparsity = None if ":" in pattern else 0.5
    for device in ("cpu", "cuda"):
        api.prune(
            api.Request(str(dense), "wanda", sparsity=sparsity, pattern=pattern, calibration=ids_file, device=device),
            tmp_path / device,
        )
    assert api.read_plan(tmp_path / "cpu").blocks == api.read_plan(tmp_path / "cuda").blocks


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_perplexity_agrees_with_the_cpu(model_type: str, saved: Callable[..., Path], ids_file: str) -> None:
    dense = saved(model_type)
    cpu, gpu = (
        api.evaluate(api.EvalRequest(str(dense), text=ids_file, device=d, dtype="float32"))["ppl"]
        for d in ("cpu", "cuda")
    )
    assert gpu == pytest.approx(cpu, rel=1e-4)


@pytest.mark.parametrize("model_type", able("slicegpt", FAMILY_TYPES))
def test_slicing_and_its_prediction_agree_with_the_cpu(
    model_type: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    dense = str(saved(model_type, dtype=torch.float64))
    ppl, answers = [], []
    for device in ("cpu", "cuda"):
        request = api.Request(dense, "slicegpt", sparsity=0.25, calibration=ids_file, device=device)
        api.prune(request, tmp_path / device)
        ppl.append(api.evaluate(api.EvalRequest(str(tmp_path / device), text=ids_file, device="cpu"))["ppl"])
        answers.append(api.predict_from_spectrum(request, at=[0.25])["predictions"][0]["ppl_ratio"])
    assert ppl[1] == pytest.approx(ppl[0], rel=1e-4)
    assert answers[1] == pytest.approx(answers[0], rel=1e-4)


def test_semi_structured_products_are_those_of_the_matrices() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no 2:4 products")
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, dtype=torch.bfloat16).cuda()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data.view(-1, 4)[:, ::2] = 0
    with torch.inference_mode():
        before = model(some_ids().cuda()).logits
        assert throughput.compress(model)
        torch.testing.assert_close(model(some_ids().cuda()).logits, before, rtol=0.05, atol=0.05)
