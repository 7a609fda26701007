"""Importing GGUF files: the function of the model, its tokenizer, and what is refused."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

gguf = pytest.importorskip("gguf")
from gguf import GGMLQuantizationType as Kind  # noqa: E402

from secateur import api  # noqa: E402
from secateur.cli import app  # noqa: E402
from secateur.core.errors import SecateurError, UsageError  # noqa: E402
from secateur.models import save  # noqa: E402
from secateur.models.gguf.file import open_gguf  # noqa: E402
from secateur.models.gguf.importer import import_gguf  # noqa: E402
from tests.models.gguf_files import ARCHITECTURES, alphabet, write_gguf  # noqa: E402
from tests.tiny import LENGTH, some_ids, tiny_model  # noqa: E402


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(some_ids(length=40)).logits
    return out


def imported(file: Path, **how: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    out = file.with_suffix("")
    facts = import_gguf(file, out, **how)
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval(), facts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - {"gemma3_text"}))
def test_the_imported_model_computes_what_the_original_does(tmp_path: Path, model_type: str, tied: bool) -> None:
    model = tiny_model(model_type, tied=tied)
    again, facts = imported(write_gguf(model, tmp_path / "m.gguf"))
    assert torch.equal(logits(again), logits(model))
    assert facts["stored"].keys() == {"F32"}
    assert not facts["dequantised"]
    assert again.config.tie_word_embeddings == tied


def test_gemma3_with_its_windows_and_two_rotary_bases(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    kinds = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
    own = {"num_hidden_layers": 7, "layer_types": kinds, "sliding_window": 8, "rope_parameters": rope}
    model = tiny_model("gemma3_text", tied=True, **own, head_dim=16, query_pre_attn_scalar=16)
    keys = {"final_logit_softcapping": model.config.final_logit_softcapping}
    again, _ = imported(write_gguf(model, tmp_path / "m.gguf", keys=keys))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)  # the gains went through + 1 - 1
    assert again.config.layer_types == kinds


@pytest.mark.parametrize("biased", ["attention_bias", "mlp_bias"])
def test_biases_of_llama(tmp_path: Path, biased: str) -> None:
    model = tiny_model("llama", **{biased: True})
    again, _ = imported(write_gguf(model, tmp_path / "m.gguf"))
    assert torch.equal(logits(again), logits(model))


STRETCHED = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", STRETCHED)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_stretched_rotary_positions(tmp_path: Path, model_type: str, kind: str) -> None:
    rope = STRETCHED[kind]
    model = tiny_model(model_type, rope_parameters=dict(rope))
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    again, _ = imported(write_gguf(model, tmp_path / "m.gguf", keys=keys))
    assert torch.equal(logits(again), logits(model))
    unstretched = tiny_model(model_type)
    assert not torch.allclose(logits(again), logits(unstretched), atol=1e-3)


def llama3_divisors(width: int, theta: float, factor: float, length: int) -> np.ndarray[Any, Any]:
    """As in llama.cpp's converter: frequency by frequency."""
    found = []
    for i in range(0, width, 2):
        wave = 2 * np.pi * theta ** (i / width)
        if wave < length / 4:
            found.append(1.0)
        elif wave > length:
            found.append(factor)
        else:
            smooth = (length / wave - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("length", [8192, 4096])
def test_the_stretching_of_llama_3_is_found_in_its_tensor(tmp_path: Path, length: int) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": length,
    }  # fmt: skip
    model = tiny_model("llama", rope_parameters=dict(rope), head_dim=64)
    extra = {"rope_freqs.weight": llama3_divisors(64, 500000.0, 32.0, length)}
    again, _ = imported(write_gguf(model, tmp_path / "m.gguf", extra=extra))
    assert {key: again.config.rope_parameters[key] for key in rope} == rope
    torch.testing.assert_close(logits(again), logits(model))


def test_divisors_that_no_stretching_gives_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", head_dim=64)
    file = write_gguf(model, tmp_path / "m.gguf", extra={"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)})
    with pytest.raises(SecateurError, match="divisors in rope_freqs"):
        import_gguf(file, tmp_path / "out")


def test_long_and_short_factors_of_phi3(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **factors}
    model = tiny_model("phi3", rope_parameters=dict(rope), original_max_position_embeddings=32)
    extra = {
        f"rope_factors_{name}.weight": np.array(factors[f"{name}_factor"], np.float32) for name in ("short", "long")
    }
    keys = {"rope.scaling.original_context_length": 32}
    again, _ = imported(write_gguf(model, tmp_path / "m.gguf", keys=keys, extra=extra))
    torch.testing.assert_close(logits(again), logits(model))  # 40 tokens: the long factors count


def test_short_factors_part_of_a_head_and_a_window_of_phi3(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "attention_factor": 1.25,
        "original_max_position_embeddings": 48, "short_factor": [1.0, 3.0], "long_factor": [2.0, 9.0],
    }  # fmt: skip
    own = {"original_max_position_embeddings": 48, "sliding_window": 8}
    model = tiny_model("phi3", rope_parameters=dict(rope), **own)
    extra = {f"rope_factors_{n}.weight": np.array(rope[f"{n}_factor"], np.float32) for n in ("short", "long")}
    keys = {
        "rope.scaling.original_context_length": 48,
        "rope.scaling.attn_factor": 1.25,
        "attention.sliding_window": 8,
    }
    again, _ = imported(write_gguf(model, tmp_path / "m.gguf", keys=keys, extra=extra))
    torch.testing.assert_close(logits(again), logits(model))  # 40 tokens of 48: the short factors count


@pytest.mark.parametrize("pattern", [3, [True, False, True]], ids=["number", "list"])
def test_windows_and_bases_of_gemma3_that_the_file_states(tmp_path: Path, pattern: Any) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    if isinstance(pattern, list):
        kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    }
    own = {"layer_types": kinds, "sliding_window": 8, "rope_parameters": rope, "final_logit_softcapping": None}
    model = tiny_model("gemma3_text", tied=True, head_dim=16, query_pre_attn_scalar=16, **own)
    keys = {"attention.sliding_window_pattern": pattern, "rope.freq_base_swa": 5000.0, "rope.scaling.factor": 8.0}
    again, _ = imported(write_gguf(model, tmp_path / "m.gguf", keys=keys))  # a factor without a type is linear
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert again.config.layer_types == kinds


@pytest.mark.parametrize("window", [None, 0])
def test_gemma3_without_a_window_attends_to_all(tmp_path: Path, window: int | None) -> None:
    rope = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
    own = {"layer_types": ["full_attention"] * 3, "rope_parameters": rope, "final_logit_softcapping": None}
    model = tiny_model("gemma3_text", tied=True, head_dim=16, query_pre_attn_scalar=16, **own)
    again, _ = imported(write_gguf(model, tmp_path / "m.gguf", keys={"attention.sliding_window": window}))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_other_names_and_neutral_keys_of_real_files(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0}
    model = tiny_model("qwen3", rope_parameters={**rope, "original_max_position_embeddings": 16})
    keys = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
        "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.yarn_attn_factor": 1.0,
        "pooling_type": 3, "attention.causal": True, "expert_count": 0,
    }  # fmt: skip
    again, _ = imported(write_gguf(model, tmp_path / "m.gguf", keys=keys))
    assert torch.equal(logits(again), logits(model))
    gemma = tiny_model("gemma3_text", tied=True, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=None)
    named = {"rope.freq_base": None, "rope.global.freq_base": 70000.0, "rope.local.freq_base": 7000.0}
    other, _ = imported(write_gguf(gemma, tmp_path / "g.gguf", keys=named))
    assert other.config.rope_parameters["full_attention"]["rope_theta"] == 70000.0
    assert other.config.rope_parameters["sliding_attention"]["rope_theta"] == 7000.0
    layout = {"tensor_data_layout": "Meta AI original pth"}
    import_gguf(write_gguf(tiny_model("llama"), tmp_path / "l.gguf", keys=layout), tmp_path / "l")


@pytest.mark.parametrize(
    "kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0, Kind.F16, Kind.BF16], ids=lambda kind: kind.name
)
def test_quantised_matrices_become_the_numbers_that_the_file_holds(tmp_path: Path, kind: Kind) -> None:
    model = tiny_model("qwen2", intermediate_size=64)
    again, facts = imported(write_gguf(model, tmp_path / "m.gguf", kind=kind), dtype="float32")
    for name, tensor in model.state_dict().items():
        numbers = tensor.numpy()
        if tensor.dim() > 1:
            numbers = gguf.quants.dequantize(gguf.quants.quantize(numbers, kind), kind)
        assert np.array_equal(again.state_dict()[name].numpy(), numbers), name
    assert facts["dequantised"] == (kind not in (Kind.F16, Kind.BF16))
    assert facts["stored"][kind.name] > 0


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Kind.F32, "float32"), (Kind.F16, "float16"), (Kind.BF16, "bfloat16"), (Kind.Q8_0, "bfloat16")]
)
def test_the_dtype_is_that_of_the_matrices(tmp_path: Path, kind: Kind, dtype: str) -> None:
    again, facts = imported(write_gguf(tiny_model("qwen2", intermediate_size=64), tmp_path / "m.gguf", kind=kind))
    assert facts["dtype"] == dtype
    assert str(again.dtype) == f"torch.{dtype}"


def test_matrices_of_several_plain_types_become_float32(tmp_path: Path) -> None:
    kinds = {"token_embd.weight": Kind.F32}
    again, facts = imported(write_gguf(tiny_model("qwen2"), tmp_path / "m.gguf", kind=Kind.F16, kinds=kinds))
    assert facts["dtype"] == "float32"
    assert not facts["dequantised"]
    assert again.dtype == torch.float32


def test_heads_are_read_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", attention_bias=True)
    for numbers in (100, 500):  # less than a head, and two heads
        monkeypatch.setattr("secateur.models.gguf.tensors._PIECE_NUMBERS", numbers)
        again, _ = imported(write_gguf(model, tmp_path / f"m{numbers}.gguf"))
        assert torch.equal(logits(again), logits(model))


def test_rows_are_read_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3_text", tied=True)
    whole, _ = imported(write_gguf(model, tmp_path / "whole.gguf"))
    monkeypatch.setattr("secateur.models.gguf.tensors._PIECE_NUMBERS", 100)
    monkeypatch.setattr(save, "ONE_FILE_UP_TO", 20_000)
    again, _ = imported(write_gguf(model, tmp_path / "parts.gguf"))
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_tokenizer_template_and_ids_survive(tmp_path: Path) -> None:
    _, _ = imported(write_gguf(tiny_model("llama"), tmp_path / "m.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = {token: index for index, token in enumerate(alphabet())}
    assert tokenizer("ab<think>c</s>").input_ids == [ids["ab"], ids["<think>"], ids["c"], ids["</s>"]]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    assert tokenizer.model_max_length == LENGTH
    assert "<think>" not in tokenizer.all_special_tokens
    about = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert (about["bos_token_id"], about["eos_token_id"], about["pad_token_id"]) == (1, 2, 0)


def test_a_tokenizer_beside_the_file_is_not_taken(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    file = write_gguf(tiny_model("llama"), tmp_path / "m.gguf")
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    imported(file)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "m")) == len(alphabet())


def test_llama_3_takes_known_words_whole_and_begins_with_bos(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for name, keys, begins in (("absent", {}, [1]), ("said", {"add_bos_token": False}, [])):
        imported(write_gguf(model, tmp_path / f"{name}.gguf", pre="llama-bpe", tokenizer=keys))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer("ab").input_ids == [*begins, alphabet().index("ab")]
        content = json.loads((tmp_path / name / "tokenizer.json").read_text())
        assert content["model"]["ignore_merges"]
    imported(write_gguf(model, tmp_path / "other.gguf", pre="qwen2"))
    assert not json.loads((tmp_path / "other" / "tokenizer.json").read_text())["model"]["ignore_merges"]


def test_all_tokens_that_end_a_turn_are_kept(tmp_path: Path) -> None:
    ends = {"eot_token_id": 5, "eom_token_id": 2}
    imported(write_gguf(tiny_model("llama"), tmp_path / "m.gguf", tokenizer=ends))
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == [2, 5]


def test_config_has_short_numbers(tmp_path: Path) -> None:
    imported(write_gguf(tiny_model("llama", rms_norm_eps=1e-5), tmp_path / "m.gguf"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-05
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"


def test_card_and_facts_say_that_weights_were_dequantised(tmp_path: Path) -> None:
    imported(write_gguf(tiny_model("qwen2", intermediate_size=64), tmp_path / "m.gguf", kind=Kind.Q8_0))
    card = (tmp_path / "m" / "README.md").read_text()
    assert "dequantised" in card
    assert "Q8_0 (" in card
    assert json.loads((tmp_path / "m" / "secateur" / "import.json").read_text())["dequantised"]


# What is refused, and how.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tiny_model("llama"), tmp_path / "m.gguf")


def refusal(file: Path, **how: Any) -> str:
    with pytest.raises(SecateurError) as caught:
        import_gguf(file, file.with_name("out"), **how)
    assert not file.with_name("out").exists()
    assert not file.with_name("out.partial").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_truncated_files(file: Path) -> None:
    whole = file.read_bytes()
    for share in (0.2, 0.7, 0.999):
        file.write_bytes(whole[: int(len(whole) * share)])
        assert "truncated" in refusal(file)


def test_other_files(file: Path) -> None:
    file.write_bytes(b"PK\x03\x04 and more of a zip file")
    assert "no GGUF file: it begins with b'PK" in refusal(file)
    file.write_bytes(b"")
    assert "no GGUF file" in refusal(file)
    file.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(40))
    assert "little-endian" in refusal(file)


def test_missing_files_and_folders(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")
    with pytest.raises(UsageError, match=r"is a folder: give one GGUF file; it holds m\.gguf"):
        import_gguf(tmp_path, tmp_path.with_name("out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        import_gguf(file, tmp_path / "out")
    with pytest.raises(UsageError, match="the file"):
        import_gguf(file, tmp_path, overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_wrong_dtype(file: Path) -> None:
    assert "--dtype int8: not one of auto, bfloat16, float16, float32" in refusal(file, dtype="int8")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"block_count": None}, "lacks llama.block_count"),
        ({"attention.head_count": [4, 4, 2]}, "unequal sizes"),
        ({"expert_count": 8}, "mixture of 8 experts"),
        ({"logit_scale": 0.5}, "llama.logit_scale = 0.5"),
        ({"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0}, "known: none, linear, yarn"),
        ({"rope.scaling.type": "longrope"}, "known: none, linear, yarn"),
        ({"rope.scaling.yarn_attn_factor": 2.0}, "llama.rope.scaling.yarn_attn_factor = 2.0"),
        ({"attention.causal": False}, "llama.attention.causal = False"),
        ({"attention.sliding_window": 8}, "llama.attention.sliding_window = 8"),
        ({"attention.layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms_epsilon"),
        ({"attention.key_length": 8, "rope.dimension_count": 4}, "turn 4 of the 8 numbers of a head"),
        ({"attention.head_count": 0}, "a size is a whole number above 0"),
        ({"attention.key_length": [8, 4, 8]}, "unequal sizes"),
        ({"block_count": 2}, "does not have, first blk.2"),
        ({"block_count": 4}, "has no blk.3"),
        ({"feed_forward_length": 32}, "its metadata asks for"),
    ],
)
def test_metadata_that_transformers_cannot_hold(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    assert says in refusal(write_gguf(tiny_model("llama"), tmp_path / "m.gguf", keys=keys))


def test_tensors_that_are_missing_or_unknown(tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert "has no blk.1.ffn_up.weight" in refusal(
        write_gguf(model, tmp_path / "m.gguf", without=("blk.1.ffn_up.weight",))
    )
    extra = {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}
    assert "first blk.0.attn_q_norm.weight" in refusal(write_gguf(model, tmp_path / "n.gguf", extra=extra))


@pytest.mark.parametrize(
    ("model_type", "tensors", "keys", "says"),
    [
        ("llama", ["rope_factors_short", "rope_factors_long"], {}, "first rope_factors_short"),
        ("qwen3", ["rope_factors_short", "rope_factors_long"], {}, "first rope_factors_short"),
        ("phi3", ["rope_factors_short"], {}, "not the other of the two factors"),
        ("phi3", [], {"rope.scaling.attn_factor": 1.5}, "attn_factor without rope_factors_short"),
        ("phi3", ["rope_freqs"], {}, "first rope_freqs"),
        ("llama", ["rope_freqs"], {"rope.scaling.factor": 4.0}, "stretches rotary positions twice"),
        ("qwen2", [], {"rope.dimension_count": 4}, "turn 4 of the 8 numbers of a head"),
    ],
)
def test_stretchings_that_do_not_belong(
    tmp_path: Path, model_type: str, tensors: list[str], keys: dict[str, Any], says: str
) -> None:
    extra = {f"{name}.weight": np.ones(4, np.float32) for name in tensors}
    assert says in refusal(write_gguf(tiny_model(model_type), tmp_path / "m.gguf", keys=keys, extra=extra))


def test_biases_of_q_k_and_v_alone(tmp_path: Path) -> None:
    model = tiny_model("llama", attention_bias=True)
    without = tuple(f"blk.{block}.attn_output.bias" for block in range(3))
    assert "o has none" in refusal(write_gguf(model, tmp_path / "m.gguf", without=without))


def test_a_split_of_text_that_transformers_does_not_know(tmp_path: Path) -> None:
    assert "splits text as 'deepseek-coder' does" in refusal(
        write_gguf(tiny_model("llama"), tmp_path / "m.gguf", pre="deepseek-coder")
    )


def test_what_an_interrupted_import_left_is_no_obstacle(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = file.with_name("out.partial")
    with monkeypatch.context() as patch:
        patch.setattr(save.CheckpointWriter, "discard", lambda self: None)
        patch.setattr(save.CheckpointWriter, "publish", lambda self, files: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_gguf(file, file.with_name("out"))
    assert (left / "model.safetensors").is_file()
    import_gguf(file, file.with_name("out"))
    assert not left.exists()


def bare(file: Path, architecture: str, **more: Any) -> Path:
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in more.items():
        add = writer.add_uint16 if isinstance(value, int) else writer.add_string
        add(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_other_architectures_and_parts(tmp_path: Path) -> None:
    assert "'mamba' cannot be imported (known: gemma3, llama" in refusal(bare(tmp_path / "m.gguf", "mamba"))
    parts = bare(tmp_path / "n.gguf", "llama", split__no=0, split__count=3)
    assert "part 1 of 3 of a split model" in refusal(parts)
    assert "holds 'adapter'" in refusal(bare(tmp_path / "o.gguf", "llama", general__type="adapter"))


def test_types_that_the_package_does_not_know(file: Path) -> None:
    content = bytearray(file.read_bytes())
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    content[place : place + 4] = struct.pack("<I", 9999)
    file.write_bytes(bytes(content))
    assert "token_embd.weight is stored as type 9999" in refusal(file)


def test_metadata_is_that_of_the_package_reader(file: Path) -> None:
    reader = gguf.GGUFReader(file)
    mine = open_gguf(file)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or (key.startswith("tokenizer.ggml.") and isinstance(field.contents(), list)):
            continue
        value = field.contents()
        assert (
            np.float32(mine.metadata[key]) == np.float32(value)
            if isinstance(value, float)
            else mine.metadata[key] == value
        )
    assert [(t.name, t.n_bytes, t.data_offset) for t in reader.tensors] == [
        (t.name, t.end - t.offset, t.offset) for t in mine.tensors.values()
    ]


# The command, and what becomes of the model.


def test_the_command_answers_in_three_lines(tmp_path: Path) -> None:
    write_gguf(tiny_model("qwen2", intermediate_size=64), tmp_path / "m.gguf", kind=Kind.Q8_0)
    done = CliRunner().invoke(app, ["import", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    first, second, third = done.stdout.splitlines()
    assert first.startswith("qwen2 model of ")
    assert "Q8_0, F32 -> bfloat16" in first
    assert "dequantised" in second
    assert third.startswith("Next: secateur inspect ")
    record = json.loads((tmp_path / "records.jsonl").read_text())
    assert record["command"] == "import"
    assert record["stored"] == {"Q8_0": 23, "F32": 16}  # 7 matrices in 3 blocks, embedding and head


def test_a_pruned_result_says_where_its_weights_came_from(tmp_path: Path) -> None:
    imported(write_gguf(tiny_model("qwen2", intermediate_size=64), tmp_path / "m.gguf", kind=Kind.Q8_0))
    api.prune(api.Request(str(tmp_path / "m"), "magnitude", sparsity=0.5), tmp_path / "pruned")
    api.prune(api.Request(str(tmp_path / "pruned"), "magnitude", sparsity=0.6), tmp_path / "again")
    for folder in ("pruned", "again"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "| base weights | dequantised from m.gguf (Q8_0, F32) |" in card, folder


def test_without_the_package_one_line_names_the_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "python -m pip install 'secateur[gguf]'" in refusal(file)
