"""The description of a family and its uses: gains of 1 + w, norms, soft-caps, and what a family cannot do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from secateur import api
from secateur.calibrate.stream import make_computed_tables
from secateur.core.errors import SecateurError
from secateur.methods.disp_llm.masked import MaskedModel, keep_gates
from secateur.models import family as families
from secateur.models import runtime
from secateur.models.canonical import canonical_view
from secateur.models.family import HEADS, ROTATE, SELECT, Family, Norm, find_family
from secateur.models.load import build_skeleton, open_checkpoint
from secateur.models.loss import head_of, hidden_states
from secateur.models.runtime import SELECT_FORMS
from secateur.plan.structures import find_structures
from tests.tiny import FAMILY_TYPES, MODEL_TYPES, some_ids, tiny_config, tiny_model

LLAMA = families.all_families()["llama"]
GEMMA = replace(LLAMA, name="gemma", model_types=("gemma",), head_norms=(), norm=Norm(gain_offset=1.0))
"""The first Gemma: gains of 1 + w, and no norm in the way of a rotation."""
OLMO2 = replace(
    LLAMA,
    name="olmo2",
    model_types=("olmo2",),
    norms=(),
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    head_norms=(),
    joint_head_norms=("self_attn.q_norm", "self_attn.k_norm"),
)
"""Norms after attention and MLP alone, and over all heads."""


@pytest.fixture
def more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    known = families.all_families() | {family.name: family for family in (GEMMA, OLMO2)}
    monkeypatch.setattr(families, "all_families", lambda: known)
    runtime.register(["gemma", "olmo2"])


@pytest.fixture
def exact_gemma_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock norms compute in float32 whatever they are given; here they keep float64."""
    kind = type(tiny_model("gemma").model.norm)
    monkeypatch.setattr(kind, "forward", lambda norm, x: norm._norm(x) * (1 + norm.weight))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_head_gives_the_logits_of_the_model(model_type: str) -> None:
    """A soft-cap behind it included: perplexity and tasks are computed from what this gives."""
    model = tiny_model(model_type)
    with torch.no_grad():
        assert torch.equal(head_of(model)(hidden_states(model, some_ids())), model(some_ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_no_file_holds_is_computed_again(model_type: str, dtype: torch.dtype, saved: Callable[..., Path]) -> None:
    """As transformers does when it loads a model in this dtype, whatever the dtype of the files."""
    model = AutoModelForCausalLM.from_pretrained(saved(model_type, dtype=torch.bfloat16), dtype=dtype)
    config = AutoConfig.from_pretrained(model.name_or_path)
    skeleton = build_skeleton(config, dtype)
    assert config.dtype == torch.bfloat16
    skeleton.load_state_dict(model.state_dict(), assign=True)
    make_computed_tables(skeleton, torch.device("cpu"))
    computed = dict(model.named_buffers())
    assert computed.keys() == dict(skeleton.named_buffers()).keys()
    for name, buffer in skeleton.named_buffers():
        assert torch.equal(buffer, computed[name]), name
    assert torch.equal(skeleton(some_ids()).logits, model(some_ids()).logits), "weights that are there stay as they are"


def test_a_buffer_that_transformers_does_not_compute_is_named() -> None:
    skeleton = build_skeleton(tiny_config("llama"))
    skeleton.model.norm.register_buffer("mine", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(SecateurError, match="does not compute the buffer mine of LlamaRMSNorm"):
        make_computed_tables(skeleton, torch.device("cpu"))


@pytest.mark.usefixtures("more_families", "exact_gemma_norms")
def test_a_gain_with_an_offset_is_folded_as_it_multiplies() -> None:
    model = tiny_model("gemma", dtype=torch.float64)
    view = canonical_view(api.view_model(model), model.dtype)
    plain = AutoModelForCausalLM.from_config(view.config).double().eval()
    plain.load_state_dict({name: view.source.read(name) for name in view.source.names()}, strict=False)
    torch.testing.assert_close(plain(some_ids()).logits, model(some_ids()).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("more_families", "exact_gemma_norms")
@pytest.mark.parametrize("form", SELECT_FORMS)
@pytest.mark.parametrize("separate", [False, True])
def test_selections_read_gains_with_an_offset(form: str, separate: bool, windows: Tensor, tmp_path: Path) -> None:
    model = tiny_model("gemma", dtype=torch.float64)
    options: dict[str, Any] = {"norm": "selected" if form == SELECT_FORMS[1] else "full", "separate": separate}
    plan = api.plan(model, "disp_llm", windows, sparsity=0.3, unmet="cut", steps=2, **options)
    view = api.view_model(model)
    structures = find_structures(view, constrained=False, form=form, whole=True, separate=separate)
    keep = [torch.empty(0)] * len(structures.widths)
    for block, uses in zip(plan.blocks, structures.uses, strict=True):
        for selection, number in uses.items():
            keep[number] = block.keep[selection]
    masked = MaskedModel(view, structures, form, device=torch.device("cpu"), dtype=torch.float64)
    narrow = api.cut(model, plan)
    expected = masked.logits(some_ids(), keep_gates(structures, keep))
    close = {"rtol": 1e-4, "atol": 1e-6}  # the scale of the embedding is in the dtype that a model was built in
    torch.testing.assert_close(narrow(some_ids()).logits, expected, **close)
    narrow.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    torch.testing.assert_close(again(some_ids()).logits, narrow(some_ids()).logits, **close)


@pytest.mark.usefixtures("more_families")
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_block_without_a_norm_before_is_pruned_and_its_heads_stay(
    method: str,
    windows: Tensor,
    ids_file: str,
    tmp_path: Path,
) -> None:
    model, dense = tiny_model("olmo2"), tmp_path / "dense"
    model.save_pretrained(dense)
    api.prune(api.Request(str(dense), method, sparsity=0.5, calibration=ids_file), tmp_path / "out")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    in_memory = api.cut(model, api.plan(model, method, windows, sparsity=0.5))
    assert torch.equal(pruned(some_ids()).logits, in_memory(some_ids()).logits)
    reason = r"a norm \(self_attn.q_norm\) divides by the mean square of all heads, which changes when one goes; use a"
    for name, how in (("wanda", {"pattern": "rows"}), ("heads", {}), ("llm_pruner", {})):
        with pytest.raises(SecateurError, match=reason):
            api.prepare(api.Request(str(dense), name, sparsity=0.5, **how))
    units = api.prune(api.Request(str(dense), "magnitude", modules="mlp=0.5", pattern="rows"), tmp_path / "units")
    assert units["stock"]
    assert units["pruning_ratio"] > 0


def test_reasons_why_a_family_cannot_do_something() -> None:
    assert [LLAMA.why_not(what) for what in (ROTATE, SELECT, HEADS)] == [None] * 3
    after = "a norm (post_attention_layernorm) stands between what attention and MLP write and the residual stream"
    assert [OLMO2.why_not(what) for what in (ROTATE, SELECT)] == [after] * 2
    two = replace(LLAMA, parallel=True)
    assert "side by side through two norms" in (two.why_not(ROTATE) or "")
    assert len({two.input_of(name) for name in two.matrices}) == 4, "what they read differs by the gains of two norms"
    assert replace(LLAMA, cannot={ROTATE: "it is glued"}).why_not(ROTATE) == "it is glued"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norms": ("one",)}, "norms has 1 entries, and parallel is False"),
        ({"norms": (), "parallel": True}, "norms has 0 entries, and parallel is True"),
        ({"post_norms": ("one",)}, r"post_norms has 1 entries; it has two, or none"),
        ({"cannot": {"fly": "no wings"}}, "cannot names 'fly'; it knows rotate, select, heads"),
    ],
)
def test_a_description_that_contradicts_itself_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"family llama: {message}"):
        replace(LLAMA, **fields)


def test_a_kind_of_block_that_is_not_described_is_refused() -> None:
    config = tiny_config("qwen3")
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(SecateurError, match="x: block 1 is of kind 'linear_attention', and family llama describes"):
        find_family(config, "x")


def test_a_gemma_that_looks_ahead_is_no_causal_model() -> None:
    config = tiny_config("gemma3_text")
    find_family(config, "x")
    config.use_bidirectional_attention = True
    with pytest.raises(SecateurError, match=r"x: .*use_bidirectional_attention it is an encoder"):
        find_family(config, "x")


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_epsilon_is_that_of_the_norms(model_type: str) -> None:
    model = tiny_model(model_type)
    family: Family = find_family(model.config, model_type)
    norm: Any = model.get_submodule(family.final_norm)
    assert family.norm.epsilon_of(model.config) == (vars(norm).get("variance_epsilon") or norm.eps)


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "add-a-family.md").read_text("utf-8")
    assert [field.name for field in (*fields(Family), *fields(Norm)) if not re.search(rf"\b{field.name}\b", page)] == []


def test_dropped_blocks_take_their_kind_along(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    request = api.Request(str(saved("gemma3_text")), "shortgpt", sparsity=1 / 3, calibration=ids_file)
    record = api.prune(request, tmp_path / "out")
    assert record["stock"]
    kept = [block.index for block in api.read_plan(tmp_path / "out").blocks if not block.dropped]
    kinds = tiny_config("gemma3_text").layer_types
    assert open_checkpoint(str(tmp_path / "out")).config.layer_types == [kinds[index] for index in kept]
