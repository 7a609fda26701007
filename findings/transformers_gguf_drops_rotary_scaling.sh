#!/usr/bin/env bash
# A GGUF file with stretched rotary positions loads in transformers as if they were not stretched.
#
# Versions: transformers 5.23.0, gguf 0.19.0, torch 2.13.0 (from PyPI).
# Input: a LLaMA of two blocks with rope_parameters {"rope_type": "linear", "factor": 4.0}, written with gguf's own GGUFWriter and
#   the keys that llama.cpp's converter writes: llama.rope.scaling.type = "linear", llama.rope.scaling.factor = 4.0. Weights are
#   float32, so nothing is lost by quantisation.
# Guess beforehand: from_pretrained(FOLDER, gguf_file=FILE) gives a configuration with the factor, or refuses the file.
# Seen: it gives {"rope_type": "default", "rope_theta": 10000.0} without a warning, and logits differ from those of the model
#   that was written by up to 0.23, where the largest is 1.28 (48 random tokens). With factor 1.0 in both, they are equal.
# So: a model of a long context (linear, yarn; the factors of Llama 3 and Phi-3 are tensors that are skipped too) must not be
#   evaluated, tuned or converted through gguf_file= without putting rope_parameters right first.
# Exits with 1 if what is seen changes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 gguf==0.19.0 accelerate

cat > "$work/try.py" <<'PYTHON'
import sys
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

WIDTH, HEADS, FFN, BLOCKS, WORDS = 32, 4, 64, 2, 64
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def stored(name):
    stem = name.removesuffix(".weight")
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if stem in outer:
        return f"{outer[stem]}.weight"
    _, _, block, inner = stem.split(".", 3)
    return f"blk.{block}.{NAMES[inner]}.weight"


def difference(factor, folder):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": factor}
    config = LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, intermediate_size=FFN,
        num_hidden_layers=BLOCKS, vocab_size=WORDS, max_position_embeddings=128, rope_parameters=rope,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(WORDS)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(factor)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp's order: the two halves of a head interleaved
            weight = weight.reshape(HEADS, 2, -1, WIDTH).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(stored(name), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32).eval()
    ids = torch.randint(0, WORDS, (1, 48))
    with torch.no_grad():
        wanted, got = model(ids).logits, loaded(ids).logits
    print(f"factor {factor}: rope_parameters {loaded.config.rope_parameters}")
    print(f"largest difference {(wanted - got).abs().max():.6f}, largest logit {wanted.abs().max():.3f}")
    return loaded.config.rope_parameters, ((wanted - got).abs().max() / wanted.abs().max()).item()


folder = Path(sys.argv[1])
_, same = difference(1.0, folder / "one")
rope, other = difference(4.0, folder / "four")
assert same < 1e-5, same
assert rope.get("rope_type") == "default" and "factor" not in rope, rope
assert 0.1 < other < 0.3, other
PYTHON

HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/try.py" "$work" && echo "as written above"
