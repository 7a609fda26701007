"""An imported model beside llama.cpp on the file it came from: token ids, logits, perplexity.

    python benchmarks/import_against_llama_cpp.py FILE.gguf --text wiki.test.raw --llama-python OTHER_ENV/bin/python

llama.cpp comes as `pip install llama-cpp-python==0.3.36` (it is built on the spot), in this environment or another one.
It multiplies quantised weights with activations that it rounds to 8 bits, so small differences are its own; with
`--float32` both sides get a float32 copy of the weights, and the differences are those of the import.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_LLAMA = """
import json, sys
import numpy as np
from llama_cpp import Llama
file, ids_file, text_file, out = sys.argv[1:]
ids = np.load(ids_file)
model = Llama(model_path=file, n_ctx=ids.shape[1], n_batch=ids.shape[1], logits_all=True, n_threads=2, verbose=False)
found = []
for row in ids:
    model.reset()
    model.eval(row.tolist())
    found.append(np.array(model.scores[: len(row)], np.float32))
np.save(out, np.stack(found))
text = open(text_file, encoding="utf-8").read()
print(json.dumps(model.tokenize(text.encode(), add_bos=False, special=True)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--dtype", default="float32", help="the dtype that the weights are imported in")
    parser.add_argument("--float32", action="store_true", help="give llama.cpp a float32 copy of the weights")
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from secateur import api

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        record = api.import_gguf(args.file, place / "model", dtype=args.dtype)
        tokenizer = AutoTokenizer.from_pretrained(place / "model")
        model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
        text = args.text.read_text("utf-8")[: 12 * args.windows * args.length]
        ids = tokenizer(text, add_special_tokens=False).input_ids
        count = args.windows * args.length
        if len(ids) < count:
            sys.exit(f"{args.text} has {len(ids)} tokens, and {count} are needed")
        first = [] if tokenizer.bos_token_id is None or not adds_bos(tokenizer) else [tokenizer.bos_token_id]
        step = args.length - len(first)
        rows = np.array([first + ids[i * step : (i + 1) * step] for i in range(args.windows)])
        np.save(place / "ids.npy", rows)
        (place / "text.txt").write_text(text, "utf-8")
        file = as_float32(args.file, place / "float32.gguf") if args.float32 else args.file
        command = [args.llama_python, "-c", _LLAMA, file, place / "ids.npy", place / "text.txt", place / "logits.npy"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        theirs_ids = json.loads(done.stdout.splitlines()[-1])
        theirs = torch.from_numpy(np.load(place / "logits.npy"))
        with torch.no_grad():
            ours = torch.cat([model(torch.from_numpy(row)[None]).logits for row in rows])
    labels = torch.from_numpy(rows)
    both = {"secateur import": ours, "llama.cpp": theirs}
    ppl = {name: perplexity(logits, labels) for name, logits in both.items()}
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = (log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean().item()
    agree = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    same = next((i for i, pair in enumerate(zip(ids, theirs_ids, strict=False)) if pair[0] != pair[1]), len(ids))
    print(f"file: {args.file.name} ({', '.join(record['stored'])}), imported as {record['dtype']}")
    print(f"token ids: {len(ids):,} here, {len(theirs_ids):,} of llama.cpp, the first {same:,} equal")
    for name, value in ppl.items():
        print(f"perplexity of {name}: {value:.4f} ({args.windows} windows of {args.length} tokens)")
    print(f"relative difference: {ppl['secateur import'] / ppl['llama.cpp'] - 1:+.3%}")
    print(
        f"logits: largest difference {(ours - theirs).abs().max().item():.4f} of {theirs.abs().max().item():.1f}; "
        f"KL divergence {kl:.2e} nats a token; same most likely token at {agree:.2%}"
    )


def adds_bos(tokenizer) -> bool:
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def perplexity(logits, ids) -> float:
    import torch

    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return loss.exp().item()


def as_float32(source: Path, target: Path) -> Path:
    """Write the same file with float32 numbers."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


if __name__ == "__main__":
    main()
