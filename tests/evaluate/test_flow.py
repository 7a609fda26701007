"""The activation flow against real models.

Parameters are compared with those of the files, FLOPs with torch's own count, and narrower widths with models of
those widths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.core.errors import SecateurError
from secateur.evaluate.flow import SPARSITIES, activation_flow, inspect_flow, ranges
from secateur.evaluate.maps import Map
from secateur.models import load
from secateur.models.runtime import pruned_class
from secateur.report.flow_plot import flow_picture
from tests.layouts import layout_of
from tests.tiny import (
    BLOCKS,
    FFN,
    GROUPS,
    HEADS,
    HIDDEN,
    MODEL_TYPES,
    VOCABULARY,
    able,
    some_ids,
    tiny_config,
    tiny_model,
)

HEAD_WIDTH = HIDDEN // HEADS


def stored_parameters(folder: Path) -> int:
    total = 0
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            total += sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())  # noqa: SIM118
    return total


def counted(model: PreTrainedModel, tokens: int) -> tuple[int, int]:
    """(FLOPs of the linear maps, FLOPs of attention's products) in one pass over `tokens` tokens that all see one
    another.
    """
    model.set_attn_implementation("eager")  # torch's counter does not know every fused kernel
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(some_ids(1, tokens))
    found = counter.get_flop_counts()
    linear = sum(count for op, count in found["Global"].items() if "mm" in str(op) and "bmm" not in str(op))
    inside = [ops for name, ops in found.items() if name.endswith(".self_attn")]
    return linear, sum(count for ops in inside for op, count in ops.items() if "bmm" in str(op))


def narrower(model_type: str, width: int, *, tied: bool) -> Any:
    """A view of a real model with another residual width and the same heads and feed-forward units, weights not
    allocated.
    """
    fields = {"hidden_size": width, "tie_word_embeddings": tied}
    if (
        model_type == "opt"
    ):  # its heads share the hidden size between them, so that only the runtime's blocks can have as many as before
        widths = [{"heads": HEADS, "groups": HEADS, "ffn": FFN}] * BLOCKS
        raw = tiny_config("opt", **fields, word_embed_proj_dim=width, num_attention_heads=width // HEAD_WIDTH).to_dict()
        config = pruned_class("opt").config_class.from_dict({**raw, "pruned_widths": widths})
    else:
        config = tiny_config(model_type, **fields, head_dim=HEAD_WIDTH)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def named(maps: tuple[Map, ...], name: str) -> list[Map]:
    return [found for found in maps if found.name == name]


def test_a_stream_that_cannot_be_narrowed_has_no_table_over_s(saved: Callable[..., Path]) -> None:
    flow = inspect_flow(str(saved("gemma3_text")))
    record = flow.record()
    assert (record["by_sparsity"], record["formula"], record["sliced"]) == ([], None, None)
    assert "a norm (post_attention_layernorm) stands between" in record["why_no_by_sparsity"]
    shown = CliRunner().invoke(app, ["inspect", str(saved("gemma3_text")), "--flow"])
    assert (shown.exit_code, "no residual stream of this family is narrowed" in shown.stdout) == (0, True)
    assert flow_picture(flow).png
    with pytest.raises(SecateurError, match="no residual stream of this family is narrowed"):
        flow.at(0.2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_parameters_are_those_of_the_files(saved: Callable[..., Path], model_type: str, tied: bool) -> None:
    folder = saved(model_type, tied=tied)
    flow = inspect_flow(str(folder))
    assert (
        flow.parameters()
        == stored_parameters(folder)
        == sum(p.numel() for p in tiny_model(model_type, tied=tied).parameters())
    )
    assert not named(flow.maps, "other"), "every tensor has its place"
    record = flow.record()
    assert record["parameters"] == sum(found["parameters"] for found in record["flow"])
    assert record["touched"]["parameters"] == sum(found["parameters_touched"] for found in record["flow"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_flops_are_those_that_torch_counts(model_type: str, tied: bool) -> None:
    model, tokens = tiny_model(model_type, tied=tied), 16
    flow = activation_flow(api.view_model(model), context=tokens)
    assert counted(model, tokens) == (tokens * flow.flops(), tokens * flow.attention_flops())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("model_type", able("slicegpt"))
def test_a_narrower_model_has_what_by_sparsity_says(model_type: str, sparsity: float, tied: bool) -> None:
    flow = activation_flow(api.view_model(tiny_model(model_type, tied=tied)))
    width = round((1 - sparsity) * HIDDEN)
    model = narrower(model_type, width, tied=tied)
    point, built = flow.at(sparsity), activation_flow(api.view_model(model))
    assert (point.width, point.sparsity_measured) == (width, sparsity)
    assert point.parameters == built.parameters() == sum(p.numel() for p in model.parameters())
    assert point.flops == built.flops()
    assert flow.attention_flops() == built.attention_flops(), "d does not touch attention's own products"
    formula = flow.record()["formula"]
    for key, value in (("parameters", point.parameters), ("flops_per_token", point.flops)):
        assert eval(formula[key], {"s": sparsity}) == value
    if sparsity:
        assert eval(formula["adapter_parameters"], {"s": sparsity}) == point.adapter_parameters
        assert eval(formula["adapter_flops_per_token"], {"s": sparsity}) == point.adapter_flops


def test_adapters_are_one_a_residual_addition_and_a_tied_head_is_cut_loose() -> None:
    llama, phi = (activation_flow(api.view_model(tiny_model(t, tied=True))) for t in ("llama", "phi"))
    assert llama.at(0.25).adapter_parameters == 2 * BLOCKS * 24**2
    assert phi.at(0.25).adapter_parameters == BLOCKS * 24**2
    assert llama.at(0.25).adapter_flops == 2 * 2 * BLOCKS * 24**2
    assert llama.at(0.25).untied_parameters == 24 * VOCABULARY
    point = llama.at(0.25).record()
    assert point["sliced_parameters"] == point["parameters"] + 2 * BLOCKS * 24**2 + 24 * VOCABULARY
    nothing = llama.at(0.0)
    assert (nothing.adapter_parameters, nothing.adapter_flops, nothing.untied_parameters) == (0, 0, 0)
    assert activation_flow(api.view_model(tiny_model("llama"))).at(0.25).untied_parameters == 0


def test_llama_2_7b_sliced_by_a_tenth_is_larger_than_before() -> None:
    """By hand: 0.9 x 6.738e9 + 64 x 3686^2 is 1.029 of the dense 6.738e9 parameters."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    }
    with torch.device("meta"):
        flow = activation_flow(
            api.view_model(
                AutoModelForCausalLM.from_config(tiny_config("llama", **sizes, head_dim=128, num_hidden_layers=32))
            )
        )
    assert flow.parameters() == 6_738_415_616
    assert flow.at(0.1).record()["sliced_parameters"] / flow.parameters() == pytest.approx(1.029, abs=5e-4)


def test_widths_are_whole_and_the_measured_sparsity_says_so() -> None:
    point = activation_flow(api.view_model(tiny_model("llama"))).at(0.1)  # 28.8
    assert (point.width, point.sparsity_measured) == (28, 1 - 28 / 32)
    wide = activation_flow(api.view_model(narrower("llama", 80, tied=False)))
    assert [wide.at(s).width for s in SPARSITIES] == [80, 72, 64, 56, 48, 40], (
        "0.7 x 80 is 56, not 55, in floating point too"
    )


def test_a_tied_head_is_counted_once_but_multiplied_twice() -> None:
    flow = activation_flow(api.view_model(tiny_model("llama", tied=True)))
    (embed,), (head,) = named(flow.maps, "embed"), named(flow.maps, "head")
    assert (embed.parameters(), embed.flops()) == (VOCABULARY * HIDDEN, 0)
    assert (head.tied, head.parameters(), head.flops()) == (True, 0, 2 * VOCABULARY * HIDDEN)
    (biased,) = named(activation_flow(api.view_model(tiny_model("phi", tied=True))).maps, "head")
    assert (biased.parameters(), biased.touched_parameters()) == (VOCABULARY, 0)


def test_fused_weights_are_shown_as_their_parts() -> None:
    model = tiny_model("phi3")
    flow = activation_flow(api.view_model(model))
    heads, groups = HEADS * HEAD_WIDTH, GROUPS * HEAD_WIDTH
    parts = {found.name: found for found in flow.maps if found.rows}
    assert {name: (found.module, found.rows) for name, found in parts.items()} == {
        "q": ("self_attn.qkv_proj", (0, heads)),
        "k": ("self_attn.qkv_proj", (heads, heads + groups)),
        "v": ("self_attn.qkv_proj", (heads + groups, heads + 2 * groups)),
        "gate": ("mlp.gate_up_proj", (0, FFN)),
        "up": ("mlp.gate_up_proj", (FFN, 2 * FFN)),
    }
    block = api.view_model(model).block(0)
    owner = model.model.layers[0].self_attn.qkv_proj.weight
    for name in "qkv":
        start, end = parts[name].rows or (0, 0)
        assert torch.equal(owner[start:end], block.matrix(name))


def test_shapes_are_in_the_letters_of_table_2() -> None:
    flow = activation_flow(api.view_model(tiny_model("qwen2", head_dim=12)))
    shapes = {
        found.name: (found.shape.replace("\N{MULTIPLICATION SIGN}", "x"), tuple(axis.size for axis in found.axes))
        for found in flow.maps
    }
    assert shapes == {
        "embed": ("V x d", (VOCABULARY, HIDDEN)),
        "norm_attention": ("d", (HIDDEN,)),
        "q": ("d x h·k + h·k", (HIDDEN, 48)),
        "k": ("d x g·k + g·k", (HIDDEN, 24)),
        "v": ("d x g·k + g·k", (HIDDEN, 24)),
        "o": ("h·k x d", (48, HIDDEN)),
        "norm_mlp": ("d", (HIDDEN,)),
        "gate": ("d x m", (HIDDEN, FFN)),
        "up": ("d x m", (HIDDEN, FFN)),
        "down": ("m x d", (FFN, HIDDEN)),
        "norm_final": ("d", (HIDDEN,)),
        "head": ("d x V", (HIDDEN, VOCABULARY)),
    }
    assert flow.symbols() == {
        "V": VOCABULARY,
        "d": HIDDEN,
        "k": 12,
        "h": [HEADS] * 3,
        "g": [GROUPS] * 3,
        "m": [FFN] * 3,
    }


def test_parameters_without_a_side_of_residual_width() -> None:
    for model_type, untouched in (
        ("llama", 0),
        ("qwen2", BLOCKS * (HEADS + 2 * GROUPS) * HEAD_WIDTH),  # biases of q, k, v
        ("qwen3", BLOCKS * 2 * HEAD_WIDTH),  # norms inside heads
        ("opt", BLOCKS * (3 * HIDDEN + FFN)),  # biases of q, k, v, up
        ("phi", BLOCKS * ((HEADS + 2 * GROUPS) * HEAD_WIDTH + FFN) + VOCABULARY),
    ):
        flow = activation_flow(api.view_model(tiny_model(model_type)))
        assert flow.parameters() - flow.touched_parameters() == untouched, model_type
        assert flow.touched_flops() == flow.flops(), "d is on a side of every product"
        share = flow.record()["touched"]
        assert 0 < share["flops_share_with_attention"] < share["flops_share"] == 1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_pruned_checkpoint_with_unequal_widths(saved: Callable[..., Path], model_type: str, tmp_path: Path) -> None:
    request = api.Request(str(saved(model_type)), "magnitude", sparsity=0.4, pattern="rows", options={"scope": "model"})
    api.prune(request, tmp_path / "out")
    flow = inspect_flow(str(tmp_path / "out"), context=16)
    widths = json.loads((tmp_path / "out" / "config.json").read_text())["pruned_widths"]
    assert len({entry["ffn"] for entry in widths}) > 1
    assert flow.parameters() == stored_parameters(tmp_path / "out")
    assert counted(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), 16) == (
        16 * flow.flops(),
        16 * flow.attention_flops(),
    )
    for index, entry in enumerate(widths):
        (up,) = [found for found in named(flow.maps, "up") if index in found.blocks]
        (q,) = [found for found in named(flow.maps, "q") if index in found.blocks]
        assert (up.axes[1].size, q.axes[1].size) == (entry["ffn"], entry["heads"] * HEAD_WIDTH)
    assert sorted(block for found in named(flow.maps, "down") for block in found.blocks) == list(range(BLOCKS))
    assert flow.symbols()["m"] == [entry["ffn"] for entry in widths]


def test_equal_shapes_are_grouped() -> None:
    base = tiny_config("llama", num_hidden_layers=6)
    widths = [{"heads": HEADS, "groups": GROUPS, "ffn": 16 if index == 4 else FFN} for index in range(6)]
    config = pruned_class("llama").config_class.from_dict({**base.to_dict(), "pruned_widths": widths})
    with torch.device("meta"):
        flow = activation_flow(api.view_model(AutoModelForCausalLM.from_config(config)))
    assert [ranges(found.blocks) for found in named(flow.maps, "gate")] == ["0-3, 5", "4"]
    assert [ranges(found.blocks) for found in named(flow.maps, "q")] == ["0-5"]
    names = [found.name for found in flow.maps]
    assert names.index("gate") < names.index("up") < names.index("down"), "those of one name stay together"
    assert ranges([]) == ""
    assert ranges([2]) == "2"


def test_a_sliding_window_bounds_the_keys() -> None:
    flow = activation_flow(api.view_model(tiny_model("mistral", sliding_window=8)), context=64)
    assert [found.keys for found in flow.attention] == [8]
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    mixed = tiny_model("qwen2", sliding_window=8, use_sliding_window=True, layer_types=kinds)
    flow = activation_flow(api.view_model(mixed), context=64)
    assert [(found.keys, found.blocks) for found in flow.attention] == [(64, (0, 2)), (8, (1,))]
    assert flow.attention_flops() == 4 * HIDDEN * (64 + 64 + 8)


@pytest.mark.parametrize("tied", [False, True])
def test_no_weights_are_read(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    folder = saved("llama", tied=tied)
    monkeypatch.setattr(load, "_read", lambda *_: pytest.fail("weights were read"))
    assert inspect_flow(str(folder)).parameters() == stored_parameters(folder)


def test_a_tensor_that_the_family_does_not_know_is_counted_as_other(monkeypatch: pytest.MonkeyPatch) -> None:
    view = api.view_model(tiny_model("llama"))
    source = view.source
    assert isinstance(source, api.ModelSource)
    monkeypatch.setitem(source.tensors, "model.extra.weight", torch.zeros(5, 7))  # type: ignore[arg-type]
    flow = activation_flow(view)
    (other,) = named(flow.maps, "other")
    assert (other.parameters(), other.touched, flow.parameters()) == (35, False, view.parameters())


def test_norms_without_a_gain_have_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    view = api.view_model(tiny_model("llama"))
    assert isinstance(view.source, api.ModelSource)
    for name in [name for name in view.source.names() if "norm" in name]:
        monkeypatch.delitem(view.source.tensors, name)  # type: ignore[arg-type]
    flow = activation_flow(view)
    assert flow.parameters() == view.parameters()
    assert {found.kind for found in flow.maps} == {"lookup", "product"}


SLICED: list[dict[str, Any]] = [{}, {"adapters": "dense"}, {"slice_head": True}, {"energy": 0.9, "round": 1}]


@pytest.fixture
def sliced(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> Callable[..., Path]:
    """Slices a tiny model and gives the folder."""

    def cut(model_type: str, tied: bool = False, **options: Any) -> Path:
        asked = {} if "energy" in options else {"sparsity": 0.25}
        api.prune(
            api.Request(
                str(saved(model_type, tied=tied)), "slicegpt", calibration=ids_file, seqlen=20, options=options, **asked
            ),
            tmp_path / "sliced",
        )
        return tmp_path / "sliced"

    return cut


@pytest.mark.parametrize("options", SLICED, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "opt", "phi", "phi3", "qwen3"])
def test_a_sliced_checkpoint_has_its_own_widths_and_adapters(
    sliced: Callable[..., Path], model_type: str, options: dict[str, Any]
) -> None:
    folder = sliced(model_type, tied=model_type == "llama", **options)
    flow = inspect_flow(str(folder), context=16)
    assert not named(flow.maps, "other"), "every tensor has its place"
    assert flow.parameters() == stored_parameters(folder)
    assert counted(AutoModelForCausalLM.from_pretrained(folder), 16) == (16 * flow.flops(), 16 * flow.attention_flops())
    assert api.inspect(str(folder))["flops_per_token"] == flow.flops()
    names = ("skip",) if layout_of(model_type).skips == 1 else ("skip_attention", "skip_mlp")
    config = json.loads((folder / "config.json").read_text())
    for number, name in enumerate(names):
        for index, entry in enumerate(config["pruned_widths"]):
            mine = [found for found in named(flow.maps, name) if index in found.blocks]
            (inputs, outputs), form = entry[("attention", "mlp")[number]], entry["skips"][number]
            assert all(found.kind == "product" for found in mine)
            rank = 0 if form is None else form
            weights = (
                inputs * outputs
                if form == "dense"
                else rank * inputs
                if inputs == outputs
                else rank * (inputs + outputs)
            )
            products = 1 if form == "dense" else 0 if form is None else 2
            flops = 2 * inputs * outputs if form == "dense" else 2 * rank * (inputs + outputs)
            assert sum(found.parameters() for found in mine) == weights * len(mine[0].blocks if mine else ())
            assert sum(found.flops() for found in mine) == flops * len(mine[0].blocks if mine else ())
            assert len(mine) == products


@pytest.mark.parametrize("model_type", ["llama", "phi"])
def test_a_sliced_checkpoint_speaks_of_its_own_widths(sliced: Callable[..., Path], model_type: str) -> None:
    folder = sliced(model_type)
    flow = inspect_flow(str(folder))
    assert (flow.hidden, flow.width) == (HIDDEN, 24)
    places = BLOCKS * layout_of(model_type).skips
    assert flow.widths == [24] * places + [HIDDEN]
    assert flow.symbols()["d"] == flow.widths
    assert flow.symbols()["r"] == [8] * (places - 1)
    record = flow.record()
    assert (record["by_sparsity"], record["formula"]) == ([], None)
    assert record["sliced"]["widths"] == flow.widths
    with pytest.raises(
        SecateurError, match="already sliced, from 32, and has its own adapters; inspect the original model"
    ):
        flow.at(0.1)
    assert activation_flow(api.view_model(tiny_model(model_type))).widths == [HIDDEN] * (places + 1)


def test_what_inspect_says_of_a_sliced_checkpoint(
    sliced: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    folder = sliced("llama")
    status, stdout, stderr = run("inspect", folder, "--flow", "--plot", tmp_path / "flow.png")
    assert status == 0, stderr
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    assert "of 32 each: 24, 24, 24, 24, 24, 24, 32." in " ".join(stdout.split())
    assert "already sliced" in stdout
    assert "skip_attention" in stdout
    status, stdout, stderr = run("inspect", folder)
    assert status == 0, stderr
    assert "24, 24, 32" in stdout
    blocks = api.inspect(str(folder))["blocks"]
    assert blocks[0]["residual"] == {"attention": (24, 24), "mlp": (24, 24), "skips": (8, 8), "readers": None}
    assert blocks[-1]["residual"] == {"attention": (24, 24), "mlp": (24, 32), "skips": (8, None), "readers": None}


def test_inspect_counts_the_products_of_a_dense_checkpoint(saved: Callable[..., Path]) -> None:
    record = api.inspect(str(saved("llama", tied=True)))
    assert record["flops_per_token"] == 2 * (record["parameters_blocks"] + VOCABULARY * HIDDEN)
    assert record["blocks"][0]["residual"] is None


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_with_json_and_a_plot(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("phi3")
    status, stdout, stderr = run(
        "inspect", folder, "--flow", "--context", 16, "--plot", tmp_path / "new" / "flow.png", "--json"
    )
    assert status == 0, stderr
    record = json.loads(stdout)
    assert stdout.count("\n") == 1
    assert record.keys() >= {
        "command",
        "model",
        "family",
        "symbols",
        "parameters",
        "flops_per_token",
        "flow",
        "attention",
        "by_sparsity",
        "formula",
        "touched",
    }
    assert [point["sparsity"] for point in record["by_sparsity"]] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert [found["name"] for found in record["flow"]][:5] == ["embed", "norm_attention", "q", "k", "v"]
    assert record["attention"]["context"] == 16
    assert record["plot"] == str(tmp_path / "new" / "flow.png")
    picture = (tmp_path / "new" / "flow.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    run("inspect", folder, "--flow", "--context", 16, "--plot", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == picture, "the same model gives the same picture"


@pytest.mark.parametrize("model_type", able("slicegpt"))
def test_the_tables_for_people(saved: Callable[..., Path], model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    status, stdout, stderr = run("inspect", saved(model_type, tied=True), "--flow")
    assert status == 0, stderr
    flow = activation_flow(api.view_model(tiny_model(model_type, tied=True)))
    assert f"{flow.touched_parameters():,} of {flow.parameters():,} parameters" in stdout
    assert "tied" in stdout
    assert f"{flow.at(0.3).adapter_parameters:,}" in stdout


def test_the_bundled_model_needs_no_network() -> None:
    status, stdout, _ = run("inspect", "bundled", "--flow", "--json")
    assert status == 0
    assert json.loads(stdout)["touched"]["parameters_share"] == 1


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (["--flow", "--context", "0"], 2, "--context 0 is outside [1, 64], the lengths this model knows"),
        (["--flow", "--context", "65"], 2, "--context 65 is outside [1, 64]"),
        (["--flow", "--plot", "flow.jpg"], 2, "a PNG file is drawn; give a name that ends in .png"),
        (["--flow", "--plot", "FOLDER"], 2, "and is no folder"),
        (["--flow", "--plot", "FILE/flow.png"], 1, "give a path in a folder that you can write to"),
        (["--plot", "flow.png"], 2, "--plot belongs to --flow: add it"),
        (["--context", "16"], 2, "--context belongs to --flow: add it"),
    ],
)
def test_wrong_usage(
    saved: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    status: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    found, _, stderr = run(
        "inspect", saved("llama"), *(part.replace("FOLDER", "folder.png").replace("FILE", "file") for part in more)
    )
    assert (found, words in stderr, stderr.count("\n")) == (status, True, 1), stderr
    assert not list(tmp_path.glob("flow.*"))


def test_folders_that_hold_no_model(saved: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("inspect", tmp_path / "empty", "--flow")[0] == 1
    assert run("inspect", "./nowhere", "--flow")[0] == 2
    folder = saved("llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    status, _, stderr = run("inspect", folder, "--flow")
    assert (status, "truncated or corrupt" in stderr) == (1, True)
