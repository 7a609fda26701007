"""The memory that `secateur import` takes for a model of half a billion parameters with a vocabulary of 152,000.

    python benchmarks/import_memory.py

The file is random, with the shapes of Qwen2-0.5B. The floor is the file's largest piece that has to be in memory: here
some rows of the embedding. What Python and its libraries take before the work is subtracted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_WORK = """
import sys
from pathlib import Path
from secateur import api
from secateur.core.records import peak_rss_bytes
import secateur.models.gguf.importer
before = peak_rss_bytes()
record = api.import_gguf(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
print(before, peak_rss_bytes(), record["params"], record["seconds"])
"""
_LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two blocks and 2,000 words")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_random(place / "random.gguf", blocks=2 if args.small else 24, words=2_000 if args.small else 151_936)
        size = (place / "random.gguf").stat().st_size
        for dtype in ("bfloat16", "float32"):
            command = [sys.executable, "-c", _WORK, place / "random.gguf", place / dtype, dtype]
            done = subprocess.run(
                [str(part) for part in command],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            before, peak, params, seconds = map(float, done.stdout.split())
            share = (peak - before) / (4 * params)
            print(
                f"{params / 1e6:.0f} M parameters, {size / 1e6:.0f} MB, to {dtype}: {seconds:.1f} s, {(peak - before) / 1e6:.0f} MB "
                f"above the {before / 1e6:.0f} MB of the libraries, {share:.1%} of the float32 size"
            )


def write_random(file: Path, *, blocks: int, words: int, width: int = 896, heads: int = 14, ffn: int = 4864) -> None:
    """Write a Qwen2 of Q8_0 matrices whose bytes are random."""
    import gguf

    writer, rng = gguf.GGUFWriter(file, "qwen2"), np.random.default_rng(0)
    kv = width // heads * 2
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens, merges = vocabulary(words)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * words)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        numbers = rng.standard_normal((min(rows, 4096), columns), np.float32) / 30
        stored = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
        whole = np.tile(stored, (-(-rows // len(stored)), 1))[:rows]
        writer.add_tensor(name, whole, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def vector(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    matrix("token_embd.weight", words, width)
    vector("output_norm.weight", width)
    for block in range(blocks):
        for name, rows in (("q", width), ("k", kv), ("v", kv)):
            matrix(f"blk.{block}.attn_{name}.weight", rows, width)
            vector(f"blk.{block}.attn_{name}.bias", rows)
        matrix(f"blk.{block}.attn_output.weight", width, width)
        matrix(f"blk.{block}.ffn_gate.weight", ffn, width)
        matrix(f"blk.{block}.ffn_up.weight", ffn, width)
        matrix(f"blk.{block}.ffn_down.weight", width, ffn)
        vector(f"blk.{block}.attn_norm.weight", width)
        vector(f"blk.{block}.ffn_norm.weight", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(words: int) -> tuple[list[str], list[str]]:
    """Letters, and words that merge two earlier ones."""
    tokens, merges = list(_LETTERS), []
    known = set(tokens)
    for left in tokens:
        for right in _LETTERS:
            if len(tokens) == words:
                return tokens, merges
            if left + right not in known:
                known.add(left + right)
                tokens.append(left + right)  # the list grows while it is read
                merges.append(f"{left} {right}")
    return tokens, merges


if __name__ == "__main__":
    main()
