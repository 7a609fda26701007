"""Every bad input of the design, through the command line: the status, the message, and that nothing is written."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.models.load import bundled_folder
from tests.tiny import LENGTH, VOCABULARY

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the command line; whatever fails must leave no output and no half-written folder."""

    def call(*args: str, writes: bool = False) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(a) for a in args])
        assert "Traceback" not in result.output
        if not writes:
            assert not (tmp_path / "out").exists()
            assert not (tmp_path / "out.partial").exists()
            assert not (tmp_path / "records.jsonl").exists()
        return result.exit_code, result.stderr.strip().splitlines()[-1] if result.stderr.strip() else ""

    return call


@pytest.fixture
def dense(saved: Callable[..., Path]) -> Path:
    return saved("llama")


def prune(model: Any, tmp_path: Path, ids: str, *more: str) -> list[str]:
    return ["prune", str(model), "--method", "wanda", "--calibration", ids, "--out", str(tmp_path / "out"), *more]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sparsity", "1.0"], "sparsity 1 is outside [0, 1)"),
        (["--sparsity", "-0.1"], "sparsity -0.1 is outside [0, 1)"),
        (["--sparsity", "50"], "sparsity 50 is outside [0, 1)"),
        ([], "give --sparsity S"),
        (["--sparsity", "0.5", "--method", "wando"], "unknown method 'wando'; did you mean wanda?"),
        (["--sparsity", "0.5", "--set", "scpe=row"], "unknown option of wanda 'scpe'; did you mean scope?"),
        (["--sparsity", "0.5", "--set", "scope"], "write OPTION=VALUE"),
        (["--sparsity", "0.5", "--set", "scope=column"], "unknown scope 'column' (allowed: row, matrix)"),
        (
            ["--sparsity", "0.5", "--modules", "atention"],
            "module 'atention' matches nothing in family llama (known: q, k, v, o, gate, up, down, attention, mlp",
        ),
        (["--modules", "*.fc1=0.5"], "module '*.fc1' matches nothing in family llama"),
        (["--modules", "mlp=1.5"], "sparsity 1.5 is outside [0, 1]"),
        (["--modules", "mlp=half"], "'half' is no number"),
        (["--pattern", "2:4", "--sparsity", "0.3"], "pattern 2:4 implies sparsity 0.5, but --sparsity is 0.3"),
        (["--pattern", "2:4", "--modules", "mlp=0.3"], "pattern 2:4 implies sparsity 0.5"),
        (["--pattern", "3:7"], "matrix q of block 0 has 32 inputs, not a multiple of 7"),
        (["--pattern", "4:2"], "0 < N < M is needed"),
        (["--pattern", "diagonal"], "unknown pattern 'diagonal'"),
        (["--pattern", "rows", "--modules", "mlp=1"], "would leave nothing"),
        (["--pattern", "rows", "--modules", "q=0.5"], "give one value, attention=S"),
        (["--params-removed", "0.3"], "zeroes weights and removes no parameters"),
        (["--params-removed", "0.3", "--sparsity", "0.5"], "not both"),
        (["--params-removed", "0.99", "--pattern", "rows"], "can remove at most"),
        (["--params-removed", "2", "--pattern", "rows"], "outside [0, 1)"),
        (["--sparsity", "0.5", "--seqlen", "100000"], f"--seqlen 100000 is outside [2, {LENGTH}]"),
        (["--sparsity", "0.5", "--samples", "0"], "at least one window"),
        (["--sparsity", "0.5", "--device", "tpu9"], "unknown device 'tpu9'"),
        (["--sparsity", "0.5", "--dtype", "int4"], "unknown dtype 'int4'"),
        (
            ["--sparsity", "0.5", "--calibration", "wikitxt2"],
            "no text 'wikitxt2': give one of builtin, wikitext2, c4, alpaca",
        ),
    ],
)
def test_wrong_usage(run: Run, dense: Path, tmp_path: Path, ids_file: str, more: list[str], words: str) -> None:
    status, line = run(*prune(dense, tmp_path, ids_file, *more))
    assert status == 2
    assert words in line


def test_scope_model_is_not_stock_and_has_no_ratio(run: Run, dense: Path, tmp_path: Path) -> None:
    base = [
        "prune",
        str(dense),
        "--method",
        "magnitude",
        "--pattern",
        "rows",
        "--set",
        "scope=model",
        "--out",
        str(tmp_path / "out"),
    ]
    status, line = run(*base, "--sparsity", "0.5", "--stock-only")
    assert (status, "--stock-only: the widths differ from block to block; no result was written" in line) == (1, True)
    status, line = run(*base, "--params-removed", "0.3")
    assert (status, "scope=block" in line) == (2, True)
    status, line = run(
        "prune",
        str(dense),
        "--method",
        "magnitude",
        "--modules",
        "*.0.mlp.*=0.5",
        "--pattern",
        "rows",
        "--stock-only",
        "--out",
        str(tmp_path / "out"),
    )
    assert (status, "the widths differ from block to block; nothing was written" in line) == (2, True)


def test_missing_folders_and_files_that_are_no_folder(run: Run, tmp_path: Path, ids_file: str) -> None:
    status, line = run(*prune(tmp_path / "absent", tmp_path, ids_file, "--sparsity", "0.5"))
    assert (status, "no folder" in line) == (2, True)
    status, line = run(*prune(ids_file, tmp_path, ids_file, "--sparsity", "0.5"))
    assert (status, "is a file: give the folder" in line) == (2, True)


def test_a_hub_name_without_a_network(run: Run, tmp_path: Path, ids_file: str) -> None:
    status, line = run(*prune("some-org/some-model", tmp_path, ids_file, "--sparsity", "0.5"))
    assert status == 1
    assert "the hub did not give it (it does not answer, and the model is not in the cache)" in line
    assert "check the name and the network" in line


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised (gptq)"),
        ({"quantization_config": "gptq"}, "its weights are quantised"),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "sparsity_config": {"format": "sparse-24-bitmask"},
                }
            },
            "its weights are sparse, in the format sparse-24-bitmask of compressed-tensors, which leaves zeros out "
            "(they are not quantised)",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}},
            "in its format dense the weights are stored whole and not quantised: take quantization_config out",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}},
            "in its format dense the weights are stored whole and not quantised",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "config_groups": {"group_0": {}},
                    "sparsity_config": {"format": "dense"},
                }
            },
            "its weights are quantised (compressed-tensors)",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "format": "gptq"}}, "are quantised (gptq)"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral' is a mixture of experts"),
        ({"model_type": "llava", "vision_config": {}}, "'llava' is multimodal"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' is an encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is an encoder or a classifier"),
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "no family describes model type 'gpt2' (known: gemma3_text, llama, mistral, opt",
        ),
        ({"model_type": "no-such-type"}, "transformers cannot read its config.json"),
        ({"hidden_size": 64}, "config.json and weights do not belong together"),
        ({"num_hidden_layers": 4}, "the files lack 9 tensors"),
    ],
)
def test_models_of_another_kind(
    run: Run, dense: Path, tmp_path: Path, ids_file: str, fields: dict[str, Any], words: str
) -> None:
    edit_config(dense, **fields)
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"))
    assert status == 1
    assert words in line


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"do_layer_norm_before": False}, "OPT-350m"), ({"word_embed_proj_dim": 16}, "projected embeddings")],
)
def test_opt_350m_is_refused_by_name(
    run: Run, saved: Callable[..., Path], tmp_path: Path, ids_file: str, fields: dict[str, Any], words: str
) -> None:
    folder = saved("opt")
    edit_config(folder, **fields)
    status, line = run(*prune(folder, tmp_path, ids_file, "--sparsity", "0.5"))
    assert (status, words in line) == (1, True)


def test_phi_with_qk_layernorm_is_refused(run: Run, saved: Callable[..., Path], tmp_path: Path, ids_file: str) -> None:
    folder = saved("phi")
    edit_config(folder, qk_layernorm=True)
    status, line = run(*prune(folder, tmp_path, ids_file, "--sparsity", "0.5"))
    assert (status, "qk_layernorm" in line) == (1, True)


def commands(model: Path, ids: str, out: Path) -> dict[str, list[str]]:
    """Every command that opens a model."""
    text, made = ["--text", ids], ["--calibration", ids, "--out", str(out)]
    return {
        "prune": ["prune", str(model), "--method", "wanda", "--sparsity", "0.5", *made],
        "eval": ["eval", str(model), *text],
        "sweep": ["sweep", str(model), "--method", "wanda", "--sparsity", "0.5", *text, *made],
        "compare": ["compare", str(model), "--methods", "wanda,magnitude", "--sparsity", "0.5", *text, *made],
        "study modules": ["study", "modules", str(model), "--sparsity", "0.5", *text, *made],
        "study disp-llm": ["study", "disp-llm", str(model), *text, *made],
        "heal": ["heal", str(model), *text, *made],
        "bench": ["bench", str(model)],
        "inspect": ["inspect", str(model)],
        "pack": ["pack", str(model), "--out", str(out)],
    }


@pytest.mark.parametrize("command", commands(Path(), "", Path()))
def test_an_adapter_beside_a_model_is_refused_by_every_command(
    command: str, run: Run, dense: Path, tmp_path: Path, ids_file: str
) -> None:
    """transformers would load it, without a word, where a whole model is loaded, and not where a block is read."""
    (dense / "adapter_config.json").write_text("{}")
    status, line = run(*commands(dense, ids_file, tmp_path / "out")[command])
    assert (status, "an adapter (adapter_config.json) lies beside the model" in line, "merge it first" in line) == (
        1,
        True,
        True,
    )


def test_an_adapter_beside_the_dense_model_is_refused(run: Run, dense: Path, tmp_path: Path, ids_file: str) -> None:
    other = shutil.copytree(dense, tmp_path / "other")
    (other / "adapter_config.json").write_text("{}")
    status, line = run("eval", str(dense), "--text", ids_file, "--against", str(other))
    assert (status, "an adapter" in line) == (1, True)


def with_masks(folder: Path) -> None:
    """As a tool leaves it that keeps masks beside the dense weights."""
    tensors = load_file(folder / "model.safetensors")
    masks = {
        f"{name}_mask": torch.ones_like(tensor) for name, tensor in tensors.items() if name.endswith("q_proj.weight")
    }
    save_file(tensors | masks, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("command", ["prune", "sweep", "compare", "study modules", "study disp-llm"])
def test_tensors_that_the_model_does_not_have_are_named(
    command: str, run: Run, dense: Path, tmp_path: Path, ids_file: str
) -> None:
    with_masks(dense)
    status, line = run(*commands(dense, ids_file, tmp_path / "out")[command])
    assert status == 1
    assert (
        "the files hold 3 tensors that a llama model does not have, first model.layers.0.self_attn.q_proj.weight_mask"
        in line
    )
    assert "--ignore-unknown" in line


def test_tensors_that_the_model_does_not_have_may_be_left_out(dense: Path, tmp_path: Path, ids_file: str) -> None:
    args = commands(dense, ids_file, tmp_path / "out")
    assert CliRunner().invoke(app, args["prune"]).exit_code == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with_masks(dense)
    again = CliRunner().invoke(app, [*args["prune"], "--ignore-unknown", "--overwrite"])
    assert (again.exit_code, "warning: " in again.stderr, "they are left out" in again.stderr) == (0, True, True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    measured = CliRunner().invoke(app, args["eval"])
    assert (measured.exit_code, "they are left out" in measured.stderr) == (0, True), (
        "eval sees the model that transformers sees, and says so"
    )


def test_tables_that_old_files_hold_are_no_unknown_tensors(dense: Path, tmp_path: Path, ids_file: str) -> None:
    tensors = load_file(dense / "model.safetensors")
    old = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(4) for index in range(3)}
    save_file(tensors | old, dense / "model.safetensors", metadata={"format": "pt"})
    assert CliRunner().invoke(app, commands(dense, ids_file, tmp_path / "out")["prune"]).exit_code == 0


def test_a_head_that_is_missing_has_a_next_step(
    run: Run, saved: Callable[..., Path], tmp_path: Path, ids_file: str
) -> None:
    folder = saved("llama", tied=True)
    edit_config(folder, tie_word_embeddings=False)
    status, line = run(*prune(folder, tmp_path, ids_file, "--sparsity", "0.5"))
    assert (status, "the files hold no lm_head.weight" in line, "set that to true in config.json" in line) == (
        1,
        True,
        True,
    )


def test_healing_on_a_file_without_a_network_says_which_text_is_missing(
    run: Run, tmp_path: Path, saved: Callable[..., Path], ids_file: str
) -> None:
    api.prune(
        api.Request(str(saved("llama")), "magnitude", sparsity=0.5),
        tmp_path / "pruned",
        records_file=tmp_path / "r" / "records.jsonl",
    )
    status, line = run("heal", str(tmp_path / "pruned"), "--calibration", ids_file, "--out", str(tmp_path / "out"))
    assert (status, "no tokenizer" in line) == (1, True)
    shutil.copyfile(bundled_folder() / "tokenizer.json", tmp_path / "pruned" / "tokenizer.json")
    shutil.copyfile(bundled_folder() / "tokenizer_config.json", tmp_path / "pruned" / "tokenizer_config.json")
    status, line = run("heal", str(tmp_path / "pruned"), "--calibration", ids_file, "--out", str(tmp_path / "out"))
    assert (status, "text 'wikitext2', to measure perplexity on" in line, "--text FILE" in line) == (1, True, True)


def test_folders_that_are_no_model(run: Run, dense: Path, tmp_path: Path, ids_file: str) -> None:
    call = prune(dense, tmp_path, ids_file, "--sparsity", "0.5")
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    status, line = run(*call)
    assert (status, "has pickled weights only, which are never read" in line) == (1, True)
    (dense / "pytorch_model.bin").unlink()
    status, line = run(*call)
    assert (status, "the folder has neither model.safetensors nor its index" in line) == (1, True)
    (dense / "config.json").write_text("{broken")
    status, line = run(*call)
    assert (status, "not JSON" in line) == (1, True)
    (dense / "config.json").unlink()
    status, line = run(*call)
    assert (status, "is no model: the folder has no config.json" in line) == (1, True)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_weights(run: Run, dense: Path, tmp_path: Path, ids_file: str, keep: int) -> None:
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"))
    assert status == 1
    assert "truncated or corrupt" in line
    assert str(file) in line


def test_a_shard_that_is_named_but_missing(run: Run, dense: Path, tmp_path: Path, ids_file: str) -> None:
    names = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").unlink()
    (dense / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")})
    )
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"))
    assert (status, "model-00001-of-00002.safetensors is named in" in line) == (1, True)


@pytest.mark.parametrize(("value", "matrix"), [(float("nan"), "matrix v"), (float("inf"), "matrix v")])
def test_weights_that_are_not_finite_name_block_and_matrix(
    run: Run, dense: Path, tmp_path: Path, ids_file: str, value: float, matrix: str
) -> None:
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 4] = value
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"))
    assert status == 1
    assert f"block 1: {matrix} has weights that are not finite" in line
    assert not (tmp_path / "out").exists()


def test_activations_that_are_not_finite_name_block_and_matrix(
    run: Run, dense: Path, tmp_path: Path, ids_file: str
) -> None:
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38  # finite, and what it computes is not
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"))
    assert status == 1
    assert "block 1: the input of matrix" in line
    assert "not finite" in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.input_layernorm.weight", "block 1: input_layernorm.weight has weights that are not finite"),
        ("model.norm.weight", "model.norm.weight has weights that are not finite"),
        ("lm_head.weight", "lm_head.weight has weights that are not finite"),
    ],
)
def test_other_weights_that_are_not_finite_are_named(
    name: str, words: str, run: Run, dense: Path, tmp_path: Path
) -> None:
    tensors = load_file(dense / "model.safetensors")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    status, line = run(
        "prune", str(dense), "--method", "magnitude", "--sparsity", "0.5", "--out", str(tmp_path / "out")
    )
    assert (status, words in line) == (1, True)


def test_token_ids(run: Run, dense: Path, tmp_path: Path) -> None:
    def attempt(array: np.ndarray) -> str:
        np.save(tmp_path / "bad.npy", array)
        status, line = run(*prune(dense, tmp_path, str(tmp_path / "bad.npy"), "--sparsity", "0.5"))
        assert status == 1
        return line

    assert f"token id {VOCABULARY} is outside the vocabulary of the model (0 to {VOCABULARY - 1})" in attempt(
        np.full((2, 8), VOCABULARY)
    )
    assert "token id -1 is outside" in attempt(np.full((2, 8), -1))
    assert "an int array [samples, seqlen]" in attempt(np.zeros((2, 8)))
    assert "an int array [samples, seqlen]" in attempt(np.zeros((0, 8), dtype=np.int64))
    assert "an int array [samples, seqlen]" in attempt(np.zeros(8, dtype=np.int64))


def test_token_ids_longer_than_the_model_knows(run: Run, dense: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.ones((1, LENGTH + 1), dtype=np.int64))
    status, line = run(*prune(dense, tmp_path, str(tmp_path / "long.npy"), "--sparsity", "0.5"))
    assert (status, f"windows of {LENGTH + 1} tokens" in line) == (1, True)


def test_text_for_a_model_without_a_tokenizer(run: Run, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 100)
    status, line = run(*prune(dense, tmp_path, str(tmp_path / "a.txt"), "--sparsity", "0.5"))
    assert (status, "give token ids (.npy or .safetensors)" in line) == (1, True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", "too short", "lower --samples or --seqlen"),
        ("a.jsonl", '{"text": "x"}\n{broken', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"body": "x"}', ": has no field 'text' (it has body); name it with --text-field"),
        ("a.json", '{"body": "x"}', ": has no field 'text' (it has body); name it with --text-field"),
        ("a.json", '[{"text": "x"}, {"body": "x"}]', ": has no field 'text' (it has body)"),
        ("a.json", '{"text": "x"}\n{broken', "a.json, line 2: not JSON"),
        ("a.json", "[1, 2]", "row 1: has no field 'text' (it has a int)"),
        ("a.json", "[]", "holds no text"),
        ("a.json.gz", '{"text": "x"}', "cannot be unpacked"),
        (
            "a.jsonl.zst",
            '{"text": "x"}',
            ".zst files are not read; unpack it first (text and JSON may stay packed as .gz, .bz2, .xz)",
        ),
        ("a.parquet", "no parquet", "not a parquet file"),
        ("a.npy", "no array", "cannot be read as token ids"),
    ],
)
def test_calibration_text(run: Run, tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    status, line = run(
        "prune",
        "bundled",
        "--method",
        "wanda",
        "--sparsity",
        "0.5",
        "--calibration",
        str(tmp_path / name),
        "--out",
        str(tmp_path / "out"),
    )
    assert status == 1
    assert words in line


def test_bytes_that_are_no_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine \xff\xfe")
    status, line = run(
        "prune",
        "bundled",
        "--method",
        "wanda",
        "--sparsity",
        "0.5",
        "--calibration",
        str(tmp_path / "a.txt"),
        "--out",
        str(tmp_path / "out"),
    )
    assert (status, "not UTF-8 text (byte 5)" in line) == (1, True)


def test_an_output_that_exists_is_not_touched(run: Run, dense: Path, tmp_path: Path, ids_file: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"), writes=True)
    assert (status, "exists and is not empty" in line) == (2, True)
    assert (out / "precious.txt").read_text() == "mine"
    status, _ = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5", "--overwrite"), writes=True)
    assert status == 0
    assert not (out / "precious.txt").exists()
    shutil.rmtree(out)
    out.write_text("a file")
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"), writes=True)
    assert (status, "is a file; give a new folder" in line) == (2, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"weight_map": {"a"', "not an index of weights"),
        ('{"weight_map": {"a": "model.safetensors"}}', 'transformers requires an object "metadata" in it'),
    ],
)
def test_a_damaged_index(content: str, words: str, run: Run, dense: Path, tmp_path: Path, ids_file: str) -> None:
    (dense / "model.safetensors").rename(dense / "part.safetensors")
    (dense / "model.safetensors.index.json").write_text(content)
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"))
    assert (status, words in line) == (1, True), line


def test_a_tied_head_that_differs_is_refused(
    run: Run, saved: Callable[..., Path], tmp_path: Path, ids_file: str
) -> None:
    folder = saved("llama", tied=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, line = run(*prune(folder, tmp_path, ids_file, "--sparsity", "0.5"))
    assert (status, "set tie_word_embeddings to false" in line) == (1, True)


@pytest.mark.parametrize("where", ["dense", "dense/..", "dense/deeper"])
def test_an_output_around_or_inside_the_model_is_refused_even_with_overwrite(
    run: Run, dense: Path, tmp_path: Path, ids_file: str, where: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    dense.rename(home / "dense")
    before = (home / "dense" / "model.safetensors").read_bytes()
    args = [
        "prune",
        str(home / "dense"),
        "--method",
        "wanda",
        "--calibration",
        ids_file,
        "--sparsity",
        "0.5",
        "--overwrite",
    ]
    status, line = run(*args, "--out", str((home / where).resolve()), "--records", str(tmp_path / "r.jsonl"))
    assert (home / "dense" / "model.safetensors").read_bytes() == before
    assert (
        status,
        ("lies inside the model" if where.endswith("deeper") else "which replacing it would remove") in line,
    ) == (2, True)


def test_an_overwrite_that_fails_keeps_the_old_folder(
    run: Run, dense: Path, tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    (tmp_path / "out.replaced").mkdir()
    real = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "out.partial":
            raise OSError(errno.EIO, "the disk went away")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        status, _ = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5", "--overwrite"), writes=True)
    assert status == 1
    assert (out / "precious.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".out.old-*/out"))
    assert (tmp_path / "out.replaced").is_dir(), "a neighbour's folder"


def test_a_full_disk_is_seen_before_the_work(
    run: Run, dense: Path, tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1))
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"))
    assert (status, "no space: the result needs about" in line) == (1, True)


def test_a_disk_that_fills_up_keeps_what_is_done(
    run: Run, dense: Path, tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.models import save

    real, calls = save.save_file, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(save, "save_file", full)
        status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"), writes=True)
    assert (status, "no space left on the disk" in line, "--resume" in line) == (1, True, True)
    assert not (tmp_path / "out").exists()
    status, _ = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5", "--resume"), writes=True)
    assert status == 0


def test_resuming_with_other_settings_names_the_difference(
    run: Run, dense: Path, tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.models.save import CheckpointWriter

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "finish", stop)
        status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"), writes=True)
    assert (status, "--resume continues from here" in line) == (130, True)
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.6", "--resume"), writes=True)
    assert (status, "had sparsity = 0.5, this one has 0.6" in line) == (2, True)
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"), writes=True)
    assert (status, "an interrupted run lies in" in line) == (2, True)


def test_an_accelerator_out_of_memory_says_what_to_lower(
    run: Run, dense: Path, tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.calibrate.stream import Stream

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Stream, "observe", fail)
    status, line = run(*prune(dense, tmp_path, ids_file, "--sparsity", "0.5"), writes=True)
    assert (status, "--spill" in line) == (1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
    ],
    ids=["python", "torch"],
)
@pytest.mark.parametrize("reader", ["transformers.AutoModelForCausalLM.from_pretrained", "numpy.load"])
def test_memory_that_runs_out_while_something_is_read_is_no_damaged_file(
    reader: str, error: Exception, run: Run, dense: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(reader, fail)
    status, line = run("eval", dense, "--text", ids_file)
    assert (status, line) == (
        1,
        "error: out of memory; use shorter windows (--seqlen, --eval-seqlen); when pruning, also fewer --samples or --spill",
    )


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--protocol", "slicgpt"], 2, "unknown protocol 'slicgpt'; did you mean slicegpt"),
        (
            ["--protocol", "slicegpt", "--text", "IDS"],
            2,
            "windows of 2048 tokens (protocol slicegpt) are outside [2, 64]",
        ),
        (["--text", "wikitext2"], 1, "no tokenizer"),
        (["--text", "IDS", "--tasks", "cloze"], 1, "no tokenizer"),
        (["--text", "IDS", "--limit", "0"], 2, "at least 1 is needed; leave it out to use everything"),
        (["--text", "IDS", "--seqlen", "0"], 2, "windows of 0 tokens"),
    ],
)
def test_eval(
    run: Run, dense: Path, ids_file: str, args: list[str], status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, line = run("eval", str(dense), *(ids_file if a == "IDS" else a for a in args))
    assert (got, words in line) == (status, True), line


def test_windows_longer_than_the_model_knows_are_not_evaluated(run: Run, dense: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.ones((1, LENGTH + 1), dtype=np.int64))
    status, line = run("eval", dense, "--text", tmp_path / "long.npy")
    assert (status, f"windows of {LENGTH + 1} tokens" in line) == (1, True)


def test_records_that_cannot_be_written_are_seen_before_the_work(
    run: Run, dense: Path, ids_file: str, tmp_path: Path
) -> None:
    status, line = run("eval", dense, "--text", ids_file, "--records", tmp_path)
    assert (status, "records cannot be written" in line) == (1, True)


@pytest.mark.parametrize("wrong", [["--method", "wando"], ["--pattern", "3:7"], ["--set", "scope=x"]])
def test_a_sweep_checks_everything_before_the_work(
    run: Run, dense: Path, ids_file: str, tmp_path: Path, wrong: list[str]
) -> None:
    args = [
        "sweep",
        dense,
        "--method",
        "wanda",
        "--sparsity",
        "0.5",
        "--calibration",
        ids_file,
        "--text",
        ids_file,
        "--out",
        tmp_path / "s",
    ]
    status, _ = run(*args, *wrong)
    assert status == 2
    assert not (tmp_path / "s").exists()


def test_stock_only_is_refused_before_the_work(
    run: Run, saved: Callable[..., Path], tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.calibrate.stream import Stream

    monkeypatch.setattr(Stream, "observe", lambda *_: pytest.fail("work was done"))
    folder = saved("opt")
    args = ["--pattern", "rows", "--modules", "attention=0.5", "--stock-only"]
    status, line = run(
        "prune", folder, "--method", "wanda", "--calibration", ids_file, "--out", tmp_path / "out", *args
    )
    assert (status, "cannot have fewer heads" in line) == (2, True)


def test_reports_need_records(run: Run, tmp_path: Path) -> None:
    status, line = run("report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "r.html"))
    assert (status, "does not exist; give a records.jsonl, or a folder" in line) == (2, True)
    (tmp_path / "bad.jsonl").write_text('{"command": "eval"}\n{oops\n')
    status, line = run("report", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "r.html"))
    assert (status, "bad.jsonl, line 2: not JSON" in line) == (1, True)
    assert not (tmp_path / "r.html").exists()
