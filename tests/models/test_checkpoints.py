"""Reading and writing checkpoints: lazily, under old names, whole or not at all, as a stock model where possible."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from secateur import api
from secateur.models import load, save
from secateur.models.load import open_checkpoint
from tests.folders import contents
from tests.tiny import FAMILY_TYPES, MODEL_TYPES, able, some_ids, tiny_model


def test_names_without_the_prefix_of_the_base_model_are_found(saved: Callable[..., Path], tmp_path: Path) -> None:
    """The OPT checkpoints of the hub were saved from the base model."""
    folder = saved("opt", tied=True)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("model."): t for name, t in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    api.prune(api.Request(str(folder), "magnitude", sparsity=0.5), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def test_a_tied_head_that_was_stored_anyway_is_left_out(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("llama", tied=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record = api.prune(api.Request(str(folder), "magnitude", sparsity=0.5), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert record["params_after"] == sum(p.numel() for p in tiny_model("llama", tied=True).parameters())


@pytest.mark.parametrize("model_type", able("disp_llm", FAMILY_TYPES))
def test_the_dtype_is_that_of_the_matrices_wherever_they_are(
    model_type: str,
    saved: Callable[..., Path],
    tmp_path: Path,
    ids_file: str,
) -> None:
    """q, k and v of such a result lie deeper than in a stock model."""
    folder = saved(model_type, dtype=torch.bfloat16)
    options = {"steps": 2, "unmet": "cut", "separate": True}
    request = api.Request(str(folder), "disp_llm", sparsity=0.3, calibration=ids_file, options=options)
    api.prune(request, tmp_path / "out")
    assert open_checkpoint(str(folder)).dtype == open_checkpoint(str(tmp_path / "out")).dtype == torch.bfloat16


@pytest.mark.parametrize("one_file", [True, False])
def test_one_file_or_shards_hold_the_same(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_file: bool
) -> None:
    if not one_file:
        monkeypatch.setattr(save, "ONE_FILE_UP_TO", 1000)
    folder = saved("phi", dtype=torch.bfloat16)
    api.prune(api.Request(str(folder), "magnitude", modules="q=0.5"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists() is one_file
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() is not one_file
    model, dense = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (tmp_path / "out", folder))
    for (name, a), b in zip(model.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(a, b) is not name.endswith("q_proj.weight"), name
    again = api.prune(api.Request(str(tmp_path / "out"), "magnitude", modules="v=0.5"), tmp_path / "again")
    assert again["params_after"] == again["params_before"]


def test_shards_of_the_same_run_have_the_same_bytes(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors draws the order of metadata at random, so what a part notes for a resumed run may not be carried into
    a shard.
    """
    monkeypatch.setattr(save, "ONE_FILE_UP_TO", 1000)
    for name in ("one", "two", "three"):
        api.prune(api.Request(str(saved("llama")), "magnitude", sparsity=0.5), tmp_path / name)
    shards = sorted(path.name for path in (tmp_path / "one").glob("model-*.safetensors"))
    assert len(shards) > 3
    for name in ("two", "three"):
        assert [(tmp_path / name / shard).read_bytes() for shard in shards] == [
            (tmp_path / "one" / shard).read_bytes() for shard in shards
        ]


def test_tensors_of_mixed_types_and_odd_sizes_are_aligned_in_one_file(tmp_path: Path) -> None:
    """The format allows no padding between tensors, so the order has to do it."""
    kinds = (torch.bfloat16, torch.int64, torch.uint8, torch.float32)
    tensors = {f"{part}.{kind}": torch.arange(3 + part).to(kind) for part in range(3) for kind in kinds[part:]}
    parts = []
    for part in range(3):
        parts.append(tmp_path / f"{part}.safetensors")
        save_file({name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}, parts[-1])
    save._gather(parts, tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    header, begin = save._header(tmp_path / "model.safetensors")
    assert begin % 8 == 0
    assert all(entry["data_offsets"][0] % tensors[name].element_size() == 0 for name, entry in header.items())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_uniform_feed_forward_widths_are_a_stock_model(
    saved: Callable[..., Path], model_type: str, tmp_path: Path
) -> None:
    record = api.prune(
        api.Request(str(saved(model_type)), "magnitude", modules="mlp=0.5", pattern="rows", stock_only=True),
        tmp_path / "out",
    )
    assert record["stock"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == model_type
    assert 24 in (config.get("intermediate_size"), config.get("ffn_dim"))
    assert not (tmp_path / "out" / "modeling_secateur.py").exists()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is type(tiny_model(model_type))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fewer_heads_in_every_block_are_stock_where_the_configuration_can_say_so(
    saved: Callable[..., Path], model_type: str, tmp_path: Path
) -> None:
    request = api.Request(str(saved(model_type)), "magnitude", modules="attention=0.5", pattern="rows")
    record = api.prune(request, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert record["stock"] is (type(model) is type(tiny_model(model_type))) is (model_type != "opt")
    in_memory = api.cut(tiny_model(model_type), api.read_plan(tmp_path / "out"))
    assert torch.equal(model(some_ids()).logits, in_memory(some_ids()).logits)
    if model_type == "opt":
        with pytest.raises(
            api.UsageError, match="--stock-only: stock opt models take the width of a head from the hidden size"
        ):
            api.prune(
                api.Request(request.model, "magnitude", modules="attention=0.5", pattern="rows", stock_only=True),
                tmp_path / "no",
            )
        assert not (tmp_path / "no").exists()
        assert not (tmp_path / "no.partial").exists()


def test_weights_are_not_read_when_a_checkpoint_is_opened(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("llama")
    monkeypatch.setattr(load, "_read", lambda *_: pytest.fail("weights were read"))
    view = open_checkpoint(str(folder)).view()
    assert (view.blocks, view.parameters()) == (3, sum(p.numel() for p in tiny_model("llama").parameters()))
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        view.block(0)


def test_a_single_file_wins_over_an_index_as_in_transformers(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor * 0 for name, tensor in tensors.items()},
        folder / "model_backup.safetensors",
        metadata={"format": "pt"},
    )
    index = {"weight_map": dict.fromkeys(tensors, "model_backup.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(open_checkpoint(str(folder)).read("model.norm.weight"), tensors["model.norm.weight"])


def test_a_narrowed_opt_pruned_again_is_not_called_stock(saved: Callable[..., Path], tmp_path: Path) -> None:
    api.prune(api.Request(str(saved("opt")), "magnitude", modules="attention=0.5", pattern="rows"), tmp_path / "once")
    again = api.Request(str(tmp_path / "once"), "magnitude", sparsity=0.5)
    assert not api.prune(again, tmp_path / "twice")["stock"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    with pytest.raises(api.UsageError, match="--stock-only"):
        api.prune(replace(again, stock_only=True), tmp_path / "no")


def test_a_stock_result_has_no_auto_map_of_the_original(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("phi3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}})
    )
    api.prune(api.Request(str(folder), "magnitude", sparsity=0.5), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


def test_two_models_whose_folders_have_one_name_are_not_the_same_run(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        saved("llama", seed=number).rename(tmp_path / str(number) / "final")
    request = api.Request(str(tmp_path / "1" / "final"), "magnitude", sparsity=0.5)
    api.prune(request, tmp_path / "out")
    with pytest.raises(api.UsageError, match="had model_fingerprint"):
        api.prune(replace(request, model=str(tmp_path / "2" / "final")), tmp_path / "out", resume=True)
    moved = tmp_path / "elsewhere"
    (tmp_path / "1" / "final").rename(moved)
    moved = moved.rename(tmp_path / "2" / "final2").rename(tmp_path / "final")
    assert api.prune(replace(request, model=str(moved)), tmp_path / "out", resume=True)["out"] == str(
        tmp_path / "out"
    ), "the same model at another place"


def test_all_zero_rows_are_counted_and_said(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][:3] *= 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record = api.prune(api.Request(str(folder), "magnitude", sparsity=0.5), tmp_path / "out")
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    matrices = [tensor for name, tensor in pruned.items() if name.endswith("proj.weight")]
    assert record["zero_rows"] == sum(int((~tensor.any(1)).sum()) for tensor in matrices) >= 3
    assert (
        "rows of matrices are all zero; float8 weights with one scale per row turn such rows into NaN"
        in capsys.readouterr().err
    )
    found = api.inspect(str(tmp_path / "out"))
    assert found["zero_rows"] == record["zero_rows"]
    assert (
        found["blocks"][1]["matrices"]["down"]["zero_rows"]
        == int((~pruned["model.layers.1.mlp.down_proj.weight"].any(1)).sum())
        >= 3
    )
    assert (
        api.evaluate(api.EvalRequest(str(tmp_path / "out"), text=str(ids(tmp_path))))["zero_rows"]
        == record["zero_rows"]
    )


def ids(folder: Path) -> Path:
    np.save(folder / "some.npy", np.ones((2, 8), dtype=np.int64))
    return folder / "some.npy"


def test_the_hub_is_asked_for_one_revision_and_the_commit_is_recorded(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.parent.mkdir()
    saved("llama").rename(snapshot)
    asked: list[object] = []

    def download(
        name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None = None
    ) -> str:
        asked.append(
            (
                name,
                revision,
                "*.safetensors" in allow_patterns,
                "*.bin" in allow_patterns,
                "consolidated*" in (ignore_patterns or ()),
            )
        )
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    record = api.prune(api.Request("org/model", "magnitude", sparsity=0.5, revision="v1"), tmp_path / "out")
    assert asked == [("org/model", "v1", True, False, True), ("org/model", "0123abc", False, False, False)]
    assert (record["model"], record["model_revision"]) == ("org/model", "0123abc")
    assert "base_model: org/model" in (tmp_path / "out" / "README.md").read_text()


KILL_POINTS = ["copy_companions", "_gather", "_join", "_swap", "clean"]


@pytest.mark.parametrize("point", KILL_POINTS)
@pytest.mark.parametrize("late", [False, True])
def test_a_kill_at_any_point_of_the_finish_loses_nothing(
    point: str, late: bool, saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = api.Request(str(saved("llama")), "wanda", sparsity=0.5, calibration=ids_file, spill=True)
    api.prune(request, tmp_path / "whole")
    real = getattr(save, point)

    def killed(*args: Any) -> None:
        if late:
            real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(save, point, killed)
        with pytest.raises(KeyboardInterrupt):
            api.prune(request, tmp_path / "out")
    (tmp_path / "records.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("secateur.methods.wanda.plan_block", lambda *_: pytest.fail("a finished block was pruned again"))
        record = api.prune(replace(request, spill=False), tmp_path / "out", resume=True)
    assert record["params_after"] == record["params_before"]
    assert (tmp_path / "records.jsonl").read_text().count("\n") == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert api.prune(request, tmp_path / "out", resume=True)["out"] == record["out"]
    with pytest.raises(api.UsageError, match=r"is finished, and its run had sparsity = 0\.5, this one has 0\.25"):
        api.prune(replace(request, sparsity=0.25), tmp_path / "out", resume=True)


def test_a_damaged_journal_is_not_resumed(
    saved: Callable[..., Path],
    tmp_path: Path,
    interrupted_at: Callable[..., AbstractContextManager[None]],
) -> None:
    """The parts beside a damaged journal may be of any run, so none is used and none is left."""
    request = api.Request(str(saved("llama")), "magnitude", sparsity=0.5)
    api.prune(request, tmp_path / "whole")
    with interrupted_at("block-00001"):
        api.prune(replace(request, sparsity=0.25), tmp_path / "out")
    partial = tmp_path / "out.partial"
    assert [part.name for part in partial.glob("*block-*")] == ["part-block-00000.safetensors"]
    journal = (partial / "journal.json").read_text()
    (partial / "journal.json").write_text(journal[: len(journal) // 2])
    api.prune(request, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not partial.exists()
