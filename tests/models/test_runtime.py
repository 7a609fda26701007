"""Pruned models with unequal widths, or a sliced residual stream: cache, generation, padding, round trips, with
secateur and without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secateur import api
from secateur.evaluate.continuations import score_continuations
from secateur.models import runtime
from tests.tiny import FAMILY_TYPES, MODEL_TYPES, able, some_ids, tiny_model


def unequal_modules(model_type: str) -> str:
    """Different key-value groups in block 0, different feed-forward widths in blocks 1 and 2."""
    if model_type == "opt":
        return "*.0.self_attn.*=0.5,*.1.fc?=0.75,*.2.fc?=0.25"
    return "*.0.self_attn.*=0.5,*.1.mlp.*=0.75,*.2.mlp.*=0.25"


@pytest.fixture
def unequal(saved: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny model whose blocks have unequal heads and feed-forward widths."""

    def make(model_type: str, **how: object) -> Path:
        request = api.Request(
            str(saved(model_type, **how)), "magnitude", modules=unequal_modules(model_type), pattern="rows"
        )
        record = api.prune(request, tmp_path / f"pruned-{model_type}")
        assert not record["stock"]
        return tmp_path / f"pruned-{model_type}"

    return make


METHODS = {"unequal": "magnitude", "sliced": "slicegpt", "sliced by spectrum": "slicegpt"}
METHODS |= dict.fromkeys(("selected", "selected apart, then normed"), "disp_llm")


@pytest.fixture(params=METHODS)
def pruned(
    request: pytest.FixtureRequest,
    saved: Callable[..., Path],
    unequal: Callable[..., Path],
    ids_file: str,
    tmp_path: Path,
) -> Callable[..., Path]:
    """Writes a tiny model that no stock class can load."""

    def sliced(model_type: str, **how: object) -> Path:
        asked: dict[str, Any] = (
            {"sparsity": 0.25}
            if request.param == "sliced"
            else {"options": {"energy": 0.9, "round": 1, "slice_head": True}}
        )
        record = api.prune(
            api.Request(str(saved(model_type, **how)), "slicegpt", calibration=ids_file, **asked),
            tmp_path / f"pruned-{model_type}",
        )
        assert not record["stock"]
        return tmp_path / f"pruned-{model_type}"

    def selected(model_type: str, **how: object) -> Path:
        apart = request.param != "selected"
        options = {"unmet": "cut", "steps": 2, "norm": "selected" if apart else "full", "separate": apart}
        asked = api.Request(
            str(saved(model_type, **how)), "disp_llm", sparsity=0.4, calibration=ids_file, options=options
        )
        assert not api.prune(asked, tmp_path / f"pruned-{model_type}")["stock"]
        return tmp_path / f"pruned-{model_type}"

    make: Callable[..., Path] = {"magnitude": unequal, "slicegpt": sliced, "disp_llm": selected}[METHODS[request.param]]

    def made(model_type: str, **how: object) -> Path:
        if model_type not in able(METHODS[request.param]):
            pytest.skip("the family cannot do this: tests/contracts/test_refusals.py")
        return make(model_type, **how)

    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_widths_differ_and_the_model_equals_the_in_memory_one(
    unequal: Callable[..., Path], model_type: str, tied: bool, dtype: torch.dtype
) -> None:
    folder = unequal(model_type, tied=tied, dtype=dtype)
    config = json.loads((folder / "config.json").read_text())
    widths = config["pruned_widths"]
    assert config["model_type"] == f"secateur_{model_type}"
    assert len({w["groups"] for w in widths}) == 2
    assert len({w["ffn"] for w in widths}) == 3
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    dense = tiny_model(model_type, tied=tied, dtype=dtype)
    in_memory = api.cut(dense, api.read_plan(folder))
    assert torch.equal(model(some_ids()).logits, in_memory(some_ids()).logits)
    assert not torch.equal(model(some_ids()).logits, dense(some_ids()).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_key_value_cache_gives_what_recomputation_gives(pruned: Callable[..., Path], model_type: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned(model_type)).eval()
    ids = some_ids(2, 12)
    whole = model(ids).logits
    first = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(ids)
    with_cache, without = (
        model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=c) for c in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_choices_of_tasks_continue_from_one_cache(pruned: Callable[..., Path], model_type: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned(model_type)).eval()
    rows = [(c[:9], r[: 2 + i]) for c in some_ids(2, 9).tolist() for i, r in enumerate(some_ids(3, 5, seed=2).tolist())]
    alone = [score_continuations(model, [row], "tasks")[0].logp for row in rows]
    assert [score.logp for score in score_continuations(model, rows, "tasks")] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_padding_on_the_left_changes_nothing(pruned: Callable[..., Path], model_type: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned(model_type)).eval()
    ids = some_ids(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    shifted = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(plain[:, 9:], shifted[:, 13:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_attention_implementations_agree(pruned: Callable[..., Path], model_type: str, implementation: str) -> None:
    folder = pruned(model_type)
    other = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(other(some_ids()).logits, model(some_ids()).logits, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation(implementation)
    assert torch.equal(other(some_ids()).logits, model(some_ids()).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_save_pretrained_of_a_reloaded_model_round_trips(
    pruned: Callable[..., Path], model_type: str, tmp_path: Path
) -> None:
    folder = pruned(model_type)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_secateur.py").read_bytes() == (folder / "modeling_secateur.py").read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert again.config.auto_map == json.loads((folder / "config.json").read_text())["auto_map"]


REMOTE = """
import os, sys, torch
from pathlib import Path
for folder in sys.argv[1:]:
    os.chdir(folder)
    code = Path("README.md").read_text().partition("```python\\n")[2].partition("```")[0]
    assert ("trust_remote_code=True" in code) == {trust}
    made = dict()
    exec(code, made)
    model = made["model"]
    ids = torch.tensor([[5, 9, 11, 4]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    model.save_pretrained(folder + "-again")
    print(type(model).__name__, out.tolist())
assert "secateur" not in sys.modules
"""


def run_without_secateur(folders: list[Path], cache: Path, *, trust: bool) -> list[str]:
    """The code of the cards in a process without secateur, one for all folders, since starting it is what takes time.

    A line for each.
    """
    blocked = cache / "blocked"
    blocked.mkdir(parents=True, exist_ok=True)
    (blocked / "secateur.py").write_text("raise ImportError('secateur is hidden from this process')")
    environment = {
        **os.environ,
        "HF_HOME": str(cache / "hf"),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "PYTHONPATH": str(blocked),
    }
    done = subprocess.run(
        [sys.executable, "-c", REMOTE.format(trust=trust), *map(str, folders)],
        input="",
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


@pytest.mark.slow
def test_remote_code_loads_generates_and_saves_without_secateur(
    pruned: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    method = METHODS[request.node.callspec.params["pruned"]]
    folders = [pruned(model_type) for model_type in able(method, FAMILY_TYPES)]
    api.prune(api.Request("bundled", "magnitude", modules="*.0.mlp.*=0.5", pattern="columns"), tmp_path / "tokenized")
    folders.append(tmp_path / "tokenized")
    assert "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)" in (folders[-1] / "README.md").read_text()
    for folder, said in zip(folders, run_without_secateur(folders, tmp_path / "cache", trust=True), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.tensor([[5, 9, 11, 4]])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert said == f"{type(model).__name__} {expected.tolist()}"
        again = Path(f"{folder}-again")
        assert (again / "modeling_secateur.py").read_bytes() == (folder / "modeling_secateur.py").read_bytes()
        assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(some_ids()).logits, model(some_ids()).logits)


@pytest.mark.slow
def test_stock_results_load_without_secateur_and_without_trust(saved: Callable[..., Path], tmp_path: Path) -> None:
    folders = [tmp_path / model_type for model_type in FAMILY_TYPES]
    for model_type, folder in zip(FAMILY_TYPES, folders, strict=True):
        request = api.Request(
            str(saved(model_type)), "magnitude", modules="mlp=0.5", pattern="columns", stock_only=True
        )
        assert api.prune(request, folder)["stock"]
    for model_type, said in zip(
        FAMILY_TYPES, run_without_secateur(folders, tmp_path / "cache", trust=False), strict=True
    ):
        assert said.split()[0] == type(tiny_model(model_type)).__name__


def test_a_stock_class_does_not_half_load_a_pruned_checkpoint(unequal: Callable[..., Path]) -> None:
    assert AutoConfig.from_pretrained(unequal("llama")).model_type == "secateur_llama"


def test_fewer_opt_heads_would_be_silently_wrong_without_their_number(unequal: Callable[..., Path]) -> None:
    """OPT reshapes by `num_heads`: with the old number, heads fold into time and nothing raises under SDPA.

    Ours is set.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(unequal("opt")).eval()
    attention = model.model.decoder.layers[0].self_attn
    assert attention.num_heads == attention.q_proj.out_features // attention.head_dim == 2
    right = model(some_ids()).logits
    attention.num_heads = 4
    wrong = model(some_ids()).logits
    assert wrong.shape == right.shape, "SDPA does not notice, which is the danger"
    assert not torch.allclose(right, wrong, atol=1e-3)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_pruned_model_can_be_pruned_again(
    pruned: Callable[..., Path], model_type: str, tmp_path: Path, ids_file: str
) -> None:
    first = pruned(model_type)
    record = api.prune(api.Request(str(first), "wanda", sparsity=0.5, calibration=ids_file), tmp_path / "twice")
    assert record["pruning_ratio"] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert model.config.pruned_widths == json.loads((first / "config.json").read_text())["pruned_widths"]
    assert torch.isfinite(model(some_ids()).logits).all()


def test_configurations_without_widths_are_refused() -> None:
    model_class = runtime.pruned_class("llama")
    with pytest.raises(ValueError, match="lacks 'pruned_widths'"):
        model_class(
            model_class.config_class(
                hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=8, intermediate_size=8
            )
        )
    with pytest.raises(AttributeError, match="SecateurNothing"):
        _ = runtime.SecateurNothing
