"""`secateur bench`: tokens per second, latency and memory of a checkpoint, beside a dense model and beside a floor.

Prefill is one forward of the whole prompt, with only the last logits, as in `generate`. Decode is every later token,
one by one, with the key-value cache. Several models take turns in one process, and the best time of each counts: other
work on the machine can only make times longer. On a CPU the best time is that of the best single token, on an
accelerator that of the best turn.

The floor is the least time that the machine allows. For decode it is the time to read every weight of a product once,
at the bandwidth measured here. For prefill, and for decode at a large batch, it is the time of the products, at the
rate measured on large products. Attention over the cache, norms and everything else are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.core import records
from secateur.core.device import resolve_device, resolve_dtype
from secateur.core.errors import UsageError
from secateur.core.machine import Machine, synchronize
from secateur.core.memory import PeakMemory
from secateur.core.paths import to_path
from secateur.core.progress import say, track
from secateur.evaluate.maps import linear_maps
from secateur.models.load import Checkpoint, load_model, open_checkpoint
from secateur.models.runtime import is_index_map
from secateur.models.view import ModelView
from secateur.plan.plan import read_plan_json
from secateur.requests import BenchRequest

_SPARSE_ROWS, _SPARSE_COLUMNS = 32, 64  # torch's 16-bit form needs multiples of these
_FROM_PLAN = ("method", "options", "sparsity", "sparsity_measured", "pruning_ratio", "pruning_ratio_blocks")


@dataclass(frozen=True)
class Work:
    """The work of a model for one token.

    Attributes:
        block: multiplications by weights inside the blocks, one per weight.
        head: multiplications of the head; a prefill needs them once per sequence.
        itemsize: bytes of a weight.
    """

    block: int
    head: int
    itemsize: int

    @staticmethod
    def of(view: ModelView, itemsize: int) -> Work:
        """Count the work from the shapes of a model. `itemsize` is in bytes."""
        maps = linear_maps(view)
        head = sum(linear_map.flops() for linear_map in maps if linear_map.name == "head") // 2
        return Work(sum(linear_map.flops() for linear_map in maps) // 2 - head, head, itemsize)

    def prefill_floor(self, batch: int, prompt: int, machine: Machine) -> float:
        """Return the least time of a prefill, in seconds."""
        return 2 * batch * (prompt * self.block + self.head) / machine.flops_per_second

    def decode_floor(self, batch: int, machine: Machine) -> float:
        """Return the least time of one decoded token for every sequence, in seconds."""
        weights = self.block + self.head
        return max(weights * self.itemsize / machine.bytes_per_second, 2 * batch * weights / machine.flops_per_second)


@dataclass
class Speed:
    """The best times so far, in seconds: one prefill, and one decoded token for every sequence."""

    prefill: float = float("inf")
    decode: float = float("inf")


def measure_speed(
    models: Mapping[str, PreTrainedModel], ids_BT: Tensor, new: int, repeats: Iterable[Any], machine: Machine
) -> dict[str, Speed]:
    """Time models in turns.

    Args:
        models: the models by name, on one device.
        ids_BT: prompts, token ids.
        new: tokens to decode after each prompt.
        repeats: every model takes one turn for each item; one extra turn warms up.
        machine: its clock gives the times, and its speed is measured again before each turn.

    Returns:
        The best times of each model.
    """
    for model in models.values():
        _turn(model, ids_BT, 2, machine.clock)
    best = {name: Speed() for name in models}
    for _ in repeats:
        for name, model in models.items():
            machine.look()
            speed = _turn(model, ids_BT, new, machine.clock)
            best[name] = Speed(min(best[name].prefill, speed.prefill), min(best[name].decode, speed.decode))
    return best


@torch.inference_mode()
def _turn(model: PreTrainedModel, ids_BT: Tensor, new: int, clock: Callable[[], float]) -> Speed:
    device = ids_BT.device
    synchronize(device)
    started = clock()
    out = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1)
    token_B1 = out.logits[:, -1:].argmax(-1)
    synchronize(device)
    first = clock()
    stretch = 1 if device.type == "cpu" else new  # waiting for an accelerator after each token would slow it down
    best, since = float("inf"), first
    for step in range(1, new + 1):
        out = model(input_ids=token_B1, past_key_values=out.past_key_values, use_cache=True)
        token_B1 = out.logits[:, -1:].argmax(-1)
        if step % stretch == 0:
            synchronize(device)
            now = clock()
            best, since = min(best, (now - since) / stretch), now
    return Speed(first - started, best)


def bench(request: BenchRequest, *, records_file: str | Path | None = None) -> records.Record:
    """Measure the speed of a model; returns the record, which is also appended to `records_file`.

    Args:
        request: what to measure.
        records_file: where the record goes; None is `records.jsonl` in the parent of the model's folder, or in the
            current folder.

    Raises:
        UsageError: a count is below 1, or a model has too few positions for the tokens.
        SecateurError: a checkpoint cannot be loaded.
    """
    started = time.perf_counter()
    device = resolve_device(request.device)
    checkpoints = _open(request)
    first = next(iter(checkpoints.values()))
    dtype = resolve_dtype(request.dtype, first.dtype, device)
    if request.semi_structured:
        _check_semi_structured(device, dtype)
    vocabulary = min(checkpoint.config.vocab_size for checkpoint in checkpoints.values())
    draw = torch.Generator().manual_seed(request.seed)
    prompts = [
        torch.randint(vocabulary, (batch, request.prompt), generator=draw).to(device) for batch in request.batches
    ]
    models, results, compressed = {}, [], 0
    for role, checkpoint in checkpoints.items():
        memory = PeakMemory(device)
        models[role] = load_model(checkpoint, device=device, dtype=dtype)
        if request.semi_structured and role == "model":
            compressed = compress(models[role])
            say(f"{checkpoint.name}: {compressed} matrices in semi-structured form")
        _turn(models[role], max(prompts, key=len), 2, time.perf_counter)
        results.append({"role": role, **_facts(checkpoint, models[role]), "peak_bytes": memory.peak()})
    machine = Machine(device, dtype)
    turns = [track(range(request.repeats), f"bench: turns at batch {batch}") for batch in request.batches]
    speeds = [
        measure_speed(models, ids_BT, request.new, turn, machine) for ids_BT, turn in zip(prompts, turns, strict=True)
    ]
    for result in results:
        work = Work.of(checkpoints[result["role"]].view(), dtype.itemsize)
        result["batches"] = [
            _row(ids_BT, speed[result["role"]], work, machine) for ids_BT, speed in zip(prompts, speeds, strict=True)
        ]
    record: records.Record = {
        "command": "bench",
        "version": records.version(),
        "model": request.model,
        "model_revision": first.revision,
        "dense": request.dense,
        **{key: (read_plan_json(first.folder) or {}).get(key) for key in _FROM_PLAN},
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "prompt": request.prompt,
        "new": request.new,
        "repeats": request.repeats,
        "seed": request.seed,
        "semi_structured": compressed,
        "flops_per_second": machine.flops_per_second,
        "bytes_per_second": machine.bytes_per_second,
        "results": results,
        "speedup": _speedup(results),
        "seconds": round(time.perf_counter() - started, 3),
        "peak_rss_bytes": records.peak_rss_bytes(),
        "versions": records.versions(),
        "out": str(Path(request.model).absolute()) if Path(request.model).is_dir() else request.model,
    }
    records.append(to_path(records_file) or _beside(request.model), record)
    return record


def _open(request: BenchRequest) -> dict[str, Checkpoint]:
    """Return the checkpoints by role, `model` first. The request is checked before any weight is read."""
    if not request.batches:
        raise UsageError("--batch is empty; give whole numbers separated by commas, as in 1,16")
    counts = {
        "--prompt": request.prompt,
        "--new": request.new,
        "--repeats": request.repeats,
        "--batch": min(request.batches),
    }
    for option, value in counts.items():
        if value < 1:
            raise UsageError(f"{option} {value}: it is a count, at least 1")
    sources: dict[str, tuple[str, str | None]] = {"model": (request.model, request.revision)}
    if request.dense is not None:
        sources["dense"] = (request.dense, None)
    checkpoints = {role: open_checkpoint(name, revision) for role, (name, revision) in sources.items()}
    for checkpoint in checkpoints.values():
        if (needed := request.prompt + request.new) > checkpoint.max_length():
            raise UsageError(
                f"--prompt {request.prompt} and --new {request.new} are {needed} tokens together, and "
                f"{checkpoint.name} has positions for {checkpoint.max_length()}; make --prompt or --new smaller"
            )
    return checkpoints


def compress(model: PreTrainedModel) -> int:
    """Put the 2:4 matrices of a model into torch's semi-structured form, in place; returns their number.

    A 2:4 matrix has at most two nonzero weights in every four consecutive weights of a row.

    Raises:
        UsageError: the model has no such matrix.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and _two_of_four(module.weight):
            module.weight = nn.Parameter(
                torch.sparse.to_sparse_semi_structured(module.weight.detach()), requires_grad=False
            )
            count += 1
    if not count:
        raise UsageError(
            "--semi-structured: no matrix of the model has two zeros in every four weights of a row; "
            "prune it with --pattern 2:4"
        )
    return count


def _two_of_four(weight_OI: Tensor) -> bool:
    outputs, inputs = weight_OI.shape
    fits = outputs % _SPARSE_ROWS == 0 and inputs % _SPARSE_COLUMNS == 0
    return fits and bool(((weight_OI.view(outputs, -1, 4) != 0).sum(-1) <= 2).all())


def _check_semi_structured(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise UsageError(
            f"--semi-structured needs an NVIDIA accelerator with 2:4 products (Ampere or later); --device is {device}"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise UsageError(
            f"--semi-structured computes in 16 bits: use --dtype bfloat16 (it is {str(dtype).removeprefix('torch.')})"
        )


def _stored(parameter: Tensor) -> int:
    """Return the bytes of a parameter; for a compressed matrix, the bytes of its parts."""
    names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
    return sum(getattr(parameter, name).nbytes for name in names) if names else parameter.nbytes


def _facts(checkpoint: Checkpoint, model: PreTrainedModel) -> records.Record:
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": checkpoint.name,
        "model_type": checkpoint.config.model_type,
        "parameters": parameters,
        "parameter_bytes": sum(_stored(p) for p in model.parameters()),
        "index_map_bytes": sum(b.nbytes for name, b in model.named_buffers() if is_index_map(name)),
    }


def _row(ids_BT: Tensor, speed: Speed, work: Work, machine: Machine) -> records.Record:
    batch, prompt = ids_BT.shape
    floors = (work.prefill_floor(batch, prompt, machine), work.decode_floor(batch, machine))
    return {
        "batch": batch,
        "prefill_seconds": speed.prefill,
        "prefill_tokens_per_second": batch * prompt / speed.prefill,
        "prefill_over_floor": speed.prefill / floors[0],
        "decode_seconds": speed.decode,
        "decode_tokens_per_second": batch / speed.decode,
        "decode_over_floor": speed.decode / floors[1],
    }


def _speedup(results: Sequence[records.Record]) -> list[records.Record] | None:
    """Return the speed as a multiple of the dense model's, for each batch."""
    if len(results) < 2:
        return None
    pairs = zip(*(result["batches"] for result in results), strict=True)
    return [
        {"batch": ours["batch"]}
        | {part: dense[f"{part}_seconds"] / ours[f"{part}_seconds"] for part in ("prefill", "decode")}
        for ours, dense in pairs
    ]


def _beside(model: str) -> Path:
    return (Path(model).absolute().parent if Path(model).is_dir() else Path.cwd()) / "records.jsonl"
