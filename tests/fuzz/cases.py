"""The cases: damage to one input, a command that reads it, and what must hold of the outcome.

Right is the answer that stock transformers gives of the same input, or one line that names what is wrong; never
"unexpected", and nothing half-written.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from secateur.cli import app
from tests.folders import contents
from tests.fuzz import world
from tests.fuzz.mutate import damaged, mutated
from tests.tiny import MODEL_TYPES, some_ids

KNOWN = (
    *(
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
        "head_dim",
        "layer_types",
        "sliding_window",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
    ),
    *(
        "torch_dtype",
        "dtype",
        "quantization_config",
        "auto_map",
        "architectures",
        "partial_rotary_factor",
        "per_layer_config",
        "pruned_widths",
    ),
    *(
        "tie_word_embeddings",
        "max_position_embeddings",
        "rms_norm_eps",
        "num_key_value_heads",
        "use_sliding_window",
        "max_window_layers",
        "is_encoder_decoder",
    ),
)


class WrongOutcome(AssertionError):
    """An outcome that a user must not see."""


@dataclass(frozen=True)
class Outcome:
    """The result of a command: its status, its last line on stderr, and its record."""

    status: int
    line: str
    stdout: str
    out: Path


def invoke(args: list[str], out: Path) -> Outcome:
    """Run a command; raise WrongOutcome if it fails in a way that a user must not see."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, args)
    lines = result.stderr.strip().splitlines()
    line = lines[-1] if lines else ""
    if result.exit_code not in (0, 1, 2):
        raise WrongOutcome(f"status {result.exit_code}: {result.exception!r} {line}")
    refused = result.exit_code == 2 and "Usage:" in result.stderr  # the words of the parser
    if result.exit_code and not refused and ("unexpected" in line or not line.startswith("error: ")):
        raise WrongOutcome(f"status {result.exit_code}: {line}")
    if "Traceback" in result.output + result.stderr:
        raise WrongOutcome(f"a traceback: {result.stderr[-500:]}")
    if result.exit_code and out.exists():
        raise WrongOutcome(f"half an output: {sorted(file.name for file in out.iterdir())}")
    return Outcome(result.exit_code, line, result.stdout, out)


def prune(model: Path, out: Path, calibration: Path, *more: str) -> list[str]:
    sizes = ["--samples", "3", "--seqlen", "8"]
    return [
        "prune",
        str(model),
        "--method",
        "wanda",
        "--sparsity",
        "0.5",
        "--calibration",
        str(calibration),
        *sizes,
        "--out",
        str(out),
        *more,
    ]


def stock(folder: Path) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(some_ids() % model.config.vocab_size, use_cache=False).logits
    return found


def as_stock(folder: Path, draw: Random, place: Path) -> str:
    """Prune or evaluate a model; if that works, the answer is that of transformers."""
    if draw.random() < 0.5:
        records = place / "records" / "r.jsonl"
        outcome = invoke(
            ["eval", str(folder), "--text", str(world.ids()), "--records", str(records), "--json"], place / "out"
        )
        if outcome.status:
            return outcome.line
        ids = torch.from_numpy(np.load(world.ids()))
        with torch.no_grad():
            wanted = float(stock(folder)(input_ids=ids, labels=ids, use_cache=False).loss)
        found = json.loads(outcome.stdout.splitlines()[-1])["loss"]
        if not math.isclose(found, wanted, rel_tol=1e-3, abs_tol=1e-4):
            raise WrongOutcome(f"a loss of {found}, transformers has {wanted}")
        return f"the loss of transformers, {found:.4f}"
    outcome = invoke(prune(folder, place / "out", world.ids()), place / "out")
    if outcome.status:
        if (place / "out.partial").exists():
            raise WrongOutcome(f"a part was left: {outcome.line}")
        return outcome.line
    original = stock(folder)
    original.load_state_dict(load_file(outcome.out / "model.safetensors"), strict=False)
    difference = float((logits(stock(outcome.out)) - logits(original)).abs().max())
    if not difference < 1e-3:
        raise WrongOutcome(f"logits are {difference} away from those of transformers")
    return "the model of transformers"


def configuration(draw: Random, place: Path) -> tuple[str, Callable[[], str]]:
    model_type = draw.choice(MODEL_TYPES)
    folder = shutil.copytree(world.checkpoint(model_type, tied=draw.random() < 0.3), place / "model")
    content, what = mutated(json.loads((folder / "config.json").read_text()), draw, KNOWN)
    (folder / "config.json").write_text(json.dumps(content))
    return f"{model_type}: config.json: {what}", lambda: as_stock(folder, draw, place)


def weights(draw: Random, place: Path) -> tuple[str, Callable[[], str]]:
    model_type = draw.choice(MODEL_TYPES)
    folder = shutil.copytree(world.checkpoint(model_type), place / "model")
    file = folder / "model.safetensors"
    kind = draw.choice(["bytes", "header", "tensors", "tensors", "index"])
    if kind == "bytes":
        content, what = damaged(file.read_bytes(), draw)
        file.write_bytes(content)
    elif kind == "header":
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header, what = mutated(json.loads(raw[8 : 8 + length]), draw)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    elif kind == "tensors":
        what = _other_tensors(file, draw)
    else:
        names = list(load_file(file))
        file.rename(folder / "model-00001-of-00001.safetensors")
        index, what = mutated(
            {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")},
            draw,
        )
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"{model_type}: weights, {kind}: {what}", lambda: as_stock(folder, draw, place)


def _other_tensors(file: Path, draw: Random) -> str:
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    kind = draw.choice(["gone", "dtype", "shape", "nan", "scalar", "renamed", "more", "transposed"])
    if kind == "gone":
        del tensors[name]
    elif kind == "dtype":
        dtype = draw.choice(
            [
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.int8,
                torch.int64,
                torch.bool,
                torch.float8_e4m3fn,
                torch.uint8,
            ]
        )
        tensors[name] = tensor.to(dtype)
        kind = f"{dtype}"
    elif kind == "shape":
        tensors[name] = tensor[: max(1, len(tensor) // 2)].clone()
    elif kind == "nan":
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[0] = draw.choice([math.nan, math.inf, -math.inf])
    elif kind == "scalar":
        tensors[name] = tensor.flatten()[0].clone()
    elif kind == "renamed":
        tensors[name.replace("model.", "module.model.") + "_orig"] = tensors.pop(name)
    elif kind == "more":
        tensors[draw.choice(["extra", name + "_mask", "model.layers.99.mlp.up_proj.weight", "lm_head.bias"])] = (
            torch.ones(2)
        )
    else:
        tensors[name] = tensor.t().contiguous() if tensor.dim() == 2 else tensor
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{name}: {kind}"


def tokenizer(draw: Random, place: Path) -> tuple[str, Callable[[], str]]:
    folder = shutil.copytree(world.checkpoint("llama"), place / "model")
    name = draw.choice(["tokenizer.json", "tokenizer_config.json"])
    if draw.random() < 0.2:
        content, what = damaged((folder / name).read_bytes(), draw)
        (folder / name).write_bytes(content)
    else:
        tree, what = mutated(
            json.loads((folder / name).read_text()),
            draw,
            ("added_tokens", "chat_template", "tokenizer_class", "model_max_length"),
        )
        (folder / name).write_text(json.dumps(tree))

    def run() -> str:
        outcome = invoke(prune(folder, place / "out", world.texts()["t.txt"]), place / "out")
        if outcome.status:
            return outcome.line
        text = "the tree is cut"
        if (
            AutoTokenizer.from_pretrained(outcome.out)(text)["input_ids"]
            != AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        ):
            raise WrongOutcome("the result has another tokenizer")
        return "the tokenizer of transformers"

    return f"{name}: {what}", run


def text(draw: Random, place: Path) -> tuple[str, Callable[[], str]]:
    source = draw.choice(sorted(world.texts().values()))
    file = place / source.name
    content = source.read_bytes()
    if source.suffix == ".npy" and draw.random() < 0.6:
        ids = np.load(source)
        shaped = [
            ids.astype(draw.choice(["int8", "uint64", "float32", "bool", "U3", "complex64"])),
            ids[0],
            ids[None],
            ids[:0],
            ids * -1,
            ids * 10_000,
            ids[:, :1],
        ]
        which = draw.randrange(len(shaped))
        np.save(file, shaped[which])
        what = f"array {shaped[which].dtype} {shaped[which].shape}"
    elif source.suffix in (".json", ".jsonl") and draw.random() < 0.6:
        rows = json.loads(content) if source.suffix == ".json" else [json.loads(line) for line in content.splitlines()]
        rows, what = mutated(rows, draw)
        file.write_text(json.dumps(rows) if source.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    else:
        content, what = damaged(content, draw)
        file.write_bytes(content)
    command = draw.choice(["prune", "eval", "heal"])

    def run() -> str:
        model = world.checkpoint("llama")
        if command == "prune":
            outcome = invoke(prune(model, place / "out", file), place / "out")
        elif command == "eval":
            outcome = invoke(
                ["eval", str(model), "--text", str(file), "--seqlen", "8", "--records", str(place / "r" / "r.jsonl")],
                place / "out",
            )
        else:
            few = ["--steps", "1", "--rank", "2", "--samples", "2", "--seqlen", "8", "--text", str(world.ids())]
            more = ["--completion-only"] if draw.random() < 0.5 else []
            args = [
                "heal",
                str(world.sweep() / "wanda-0.4"),
                "--calibration",
                str(file),
                *few,
                *more,
                "--out",
                str(place / "out"),
            ]
            outcome = invoke([*args, "--records", str(place / "r" / "r.jsonl")], place / "out")
        return outcome.line or "done"

    return f"{command}: {source.name}: {what}", run


def records(draw: Random, place: Path) -> tuple[str, Callable[[], str]]:
    lines = (world.sweep() / "records.jsonl").read_text().splitlines()
    if draw.random() < 0.2:
        content, what = damaged("\n".join(lines).encode(), draw)
        (place / "records.jsonl").write_bytes(content)
    else:
        which = draw.randrange(len(lines))
        record, what = mutated(json.loads(lines[which]), draw)
        lines[which] = json.dumps(record)
        what = f"record {which}: {what}"
        (place / "records.jsonl").write_text("\n".join(lines) + "\n")
    file = str(place / "records.jsonl")
    command = draw.choice(
        [
            ["report", file, "--out", str(place / "report.html")],
            ["predict", file, "--where", "method=wanda"],
            ["predict", file, "--where", "method=wanda", "--at", "0.5", "--law", "best"],
        ]
    )
    return f"{command[0]}: {what}", lambda: invoke(command, place / "report.html").line or "done"


def plan(draw: Random, place: Path) -> tuple[str, Callable[[], str]]:
    folder = shutil.copytree(world.sweep() / draw.choice(["wanda-0.4", "rows", "sliced"]), place / "model")
    name = draw.choice(["secateur/plan.json", "secateur/plan.json", "secateur/plan.safetensors"])
    if name.endswith(".json") and draw.random() < 0.8:
        content, what = mutated(json.loads((folder / name).read_text()), draw)
        (folder / name).write_text(json.dumps(content))
    else:
        raw, what = damaged((folder / name).read_bytes(), draw)
        (folder / name).write_bytes(raw)
    own, text_ = ["--records", str(place / "r" / "r.jsonl")], ["--text", str(world.ids())]
    few = ["--steps", "1", "--rank", "2", "--samples", "2", "--calibration", str(world.ids())]
    command = draw.choice(
        [
            ["eval", str(folder), *text_, *own],
            ["inspect", str(folder)],
            ["heal", str(folder), *few, *text_, *own, "--out", str(place / "out")],
            prune(folder, place / "out", world.ids(), *own),
        ]
    )
    return f"{command[0]}: {name}: {what}", lambda: invoke(command, place / "out").line or "done"


def journal(draw: Random, place: Path) -> tuple[str, Callable[[], str]]:
    partial, whole = world.interrupted()
    shutil.copytree(partial, place / "out.partial")
    file = draw.choice(sorted((place / "out.partial").iterdir()))
    if file.name == "journal.json" and draw.random() < 0.5:
        content, what = mutated(json.loads(file.read_text()), draw)
        file.write_text(json.dumps(content))
    else:
        raw, what = damaged(file.read_bytes(), draw)
        file.write_bytes(raw)

    def run() -> str:
        args = [
            "prune",
            str(world.checkpoint("llama")),
            "--method",
            "wanda",
            "--sparsity",
            "0.5",
            "--calibration",
            str(world.ids()),
        ]
        outcome = invoke([*args, "--out", str(place / "out"), "--resume"], place / "out")
        if outcome.status == 0 and contents(place / "out") != contents(whole):
            raise WrongOutcome("other bytes than a run that was not interrupted")
        return outcome.line or "the same bytes"

    return f"resumed: {file.name}: {what}", run


NUMBERS = ("nan", "inf", "-1", "0", "1e-9", "0.5", "1", "1e9", "", "x", "0.5,0.5", "\N{SNOWMAN}", "1" * 30)
OPTIONS = (
    *(
        "--sparsity",
        "--params-removed",
        "--samples",
        "--seqlen",
        "--seed",
        "--modules",
        "--pattern",
        "--calibration",
        "--device",
        "--dtype",
        "--set",
    ),
    *("--revision", "--text-field", "--method", "--records"),
)
WORDS = (
    "mlp=0.5",
    "attention",
    "2:4",
    "0:0",
    "4:2",
    "rows",
    "*",
    "scope=row",
    "scope=",
    "=",
    "cpu",
    "float16",
    "int8",
    "auto",
    "owl",
    "bundled",
    "wikitext2",
    "task:",
)


def options(draw: Random, place: Path) -> tuple[str, Callable[[], str]]:
    given = [(draw.choice(OPTIONS), draw.choice(NUMBERS + WORDS)) for _ in range(draw.randrange(1, 3))]
    method = draw.choice(["magnitude", "wanda", "slicegpt", "shortgpt"])
    more = [
        part
        for option, value in given
        for part in (option, str(place / value.replace("/", "")) if option == "--records" else value)
    ]
    args = [
        "prune",
        str(world.checkpoint("llama")),
        "--method",
        method,
        "--calibration",
        str(world.ids()),
        "--out",
        str(place / "out"),
        *more,
    ]
    return f"{method} {' '.join(more)}", lambda: invoke(args, place / "out").line or "done"


DOMAINS = {configuration: 90, weights: 60, tokenizer: 35, text: 45, records: 25, plan: 25, journal: 10, options: 10}


def case(number: int, place: Path) -> tuple[str, Callable[[], str]]:
    """Case `number`: what is damaged, and what to run. Domains come in their proportions."""
    draw = Random(number)
    domain = draw.choices(list(DOMAINS), list(DOMAINS.values()))[0]
    what, run = domain(draw, place)
    return f"{domain.__name__}: {what}", run
