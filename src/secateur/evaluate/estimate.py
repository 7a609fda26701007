"""`--dry-run` of `eval`: what would be measured, and its memory and time, from a few windows on a model of two blocks.

What is measured is at most a quarter of the windows and of the items of a task. Work that has fewer than four of them
is measured once and cold, which tells little (`seconds_rough`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.core.device import resolve_device
from secateur.core.errors import SecateurError, reason
from secateur.core.memory import resident_bytes
from secateur.core.progress import observed, say
from secateur.core.records import Record
from secateur.core.timing import Clock, Phases, work_seconds
from secateur.evaluate.answers import Answers
from secateur.evaluate.continuations import cached_tokens
from secateur.evaluate.evaluate import Questions, dense_is_kept, prepare_questions
from secateur.evaluate.passes import BLOCKS, Small, small_model, weights_memory
from secateur.evaluate.perplexity import equal_batches, window_losses
from secateur.evaluate.shift import SHIFT_WINDOWS, compare, continuations, prompts_of
from secateur.evaluate.tasks import Tasks, find_tasks
from secateur.models.load import BUNDLED, Checkpoint, open_checkpoint
from secateur.models.loss import hidden_states, positions_a_chunk, token_losses
from secateur.plan.plan import read_plan_json
from secateur.requests import EvalRequest

_ITEMS = 8  # of each task
_WARM_TOKENS = 32
_WARMED = 4  # windows, or items of a task: fewer are measured cold
_HEAD_POSITIONS = 64  # the fewest that the head is measured on


def estimate_evaluate(request: EvalRequest, clock: Clock = work_seconds) -> Record:
    """Return what `evaluate` would measure, and its memory and time. Reads text and tasks, writes nothing.

    Args:
        request: what would be measured.
        clock: returns seconds.

    Returns:
        A record with `dry_run`; `tasks` holds the number of requests of each. `seconds_estimated` is None where
        nothing tells the time, and `seconds_unknown` says why.

    Raises:
        UsageError, SecateurError: the evaluation cannot be done, as `evaluate` would say.
    """
    started = clock()
    resident = resident_bytes(resolve_device(request.device))
    checkpoint = open_checkpoint(request.model, request.revision)
    plan = read_plan_json(checkpoint.folder)
    bundled = request.model == BUNDLED or (plan or {}).get("model") == BUNDLED
    questions = prepare_questions(request, checkpoint, bundled=bundled)
    against = None if request.against is None else open_checkpoint(request.against, request.against_revision)
    reading = clock() - started
    models = 1 + (against is not None)
    blocks, rough = checkpoint.view().blocks, _is_small(request, questions)
    say(f"measuring {min(BLOCKS, blocks)} blocks of {blocks} to estimate the time")
    seconds, why = None, None
    try:
        with torch.random.fork_rng(), observed(Phases()):
            seconds = _seconds(request, checkpoint, against, questions, clock)
    except Exception as error:  # whatever it is, a dry run only says that it has no estimate
        why = reason(error)
    memory = sum(weights_memory(each, questions.dtype) for each in (checkpoint, against) if each is not None)
    if request.tasks:
        memory += _cache_memory(checkpoint, questions)
    return {
        "command": "eval",
        "dry_run": True,
        "model": request.model,
        "against": request.against,
        "shift": request.against is not None and request.shift,
        **questions.facts,
        "requests": questions.tasks.requests(),
        "evaluation_tokens": models * sum(map(len, questions.windows)),
        "memory_bytes": memory + models * perplexity_memory(checkpoint, questions.windows, questions.dtype),
        "resident_bytes": resident,
        "disk_bytes": 0,
        "seconds_estimated": None if seconds is None else round(reading + seconds, 2),
        **({"seconds_rough": True} if rough and seconds is not None else {}),
        **({} if why is None else {"seconds_unknown": why}),
    }


def _quarter(number: int) -> int:
    return max(1, number // 4)


def _is_small(request: EvalRequest, questions: Questions) -> bool:
    """Whether all there is to measure is so little that nothing of it is measured twice."""
    few = request.items_a_task is not None and request.items_a_task < _WARMED
    return len(questions.windows) < _WARMED and (few or not request.tasks)


def perplexity_memory(checkpoint: Checkpoint, windows: Sequence[Tensor], dtype: torch.dtype) -> int:
    """Return the bytes of what one batch has in memory at a time: logits, and the middle of an MLP."""
    tokens = max(batch.numel() for batch in equal_batches(windows))
    vocabulary = int(checkpoint.config.vocab_size)
    logits = 4 * min(tokens, positions_a_chunk(vocabulary)) * vocabulary
    return 2 * logits + 4 * tokens * checkpoint.view().widest_ffn * dtype.itemsize


def _cache_memory(checkpoint: Checkpoint, questions: Questions) -> int:
    """Return the bytes of the keys and values of contexts, from which the choices of a task continue."""
    view = checkpoint.view()
    features = sum(2 * dims.groups * dims.head_width for dims in map(view.dims, range(view.blocks)))
    return cached_tokens(questions.device) * features * questions.dtype.itemsize


def _seconds(
    request: EvalRequest, checkpoint: Checkpoint, against: Checkpoint | None, questions: Questions, clock: Clock
) -> float:
    small = small_model(checkpoint, questions.device, questions.dtype, clock=clock)
    once = perplexity_seconds(small, questions.windows)
    tasks = _tasks_seconds(request, small, questions)
    seconds = small.load_seconds + once + tasks
    if against is not None and not dense_is_kept(against, questions):
        seconds += once + (0 if request.shift else small.load_seconds)
    if against is not None and request.shift:
        seconds += small.load_seconds + tasks
        some = list(questions.windows[:SHIFT_WINDOWS])
        first = [*next(equal_batches(some))][: _quarter(len(some))]
        share = sum(map(len, some)) / sum(map(len, first))
        seconds += share * small.seconds(lambda: compare(small.model, small.model, first))
        seconds += 2 * small.seconds(lambda: continuations(small.model, prompts_of(some)))
    return seconds


def perplexity_seconds(small: Small, windows: Sequence[Tensor]) -> float:
    """Return the seconds of the perplexity of the whole model over these windows, from the first of them."""
    first_BT = next(equal_batches(windows))[: _quarter(len(windows))].to(small.model.device)
    if len(windows) >= _WARMED:
        window_losses(small.model, first_BT[:1, :_WARM_TOKENS])
    hidden: list[Tensor] = []
    with torch.inference_mode():
        blocks = small.seconds(lambda: hidden.append(hidden_states(small.model, first_BT)))
        head = _head_seconds(small, hidden[0][:, :-1].flatten(0, 1), first_BT[:, 1:].flatten())
    return (blocks + head) * sum(map(len, windows)) / first_BT.numel()


def _head_seconds(small: Small, hidden_ND: Tensor, targets_N: Tensor) -> float:
    """Return the seconds of the head and the loss, from some of the positions: of a small model they are much work."""
    some = min(len(targets_N), max(_HEAD_POSITIONS, _quarter(len(targets_N))))
    started = small.clock()
    token_losses(small.model, hidden_ND[:some], targets_N[:some])
    return (small.clock() - started) * len(targets_N) / some


def _tasks_seconds(request: EvalRequest, small: Small, questions: Questions) -> float:
    """Return the seconds of all tasks, each from a few of its items.

    Raises:
        SecateurError: a task lets the model write, and how much it writes is not known before.
    """
    if not questions.tasks:
        return 0.0
    tokenizer: PreTrainedTokenizerBase | None = questions.tokenizer
    assert tokenizer is not None
    if writing := questions.tasks.writing():
        raise SecateurError(f"how long a text the model writes for {', '.join(writing)} is not known before")
    wanted = questions.tasks.requests()

    def run(tasks: Tasks) -> Any:
        return tasks.run(small.model, tokenizer, Answers())

    total = 0.0
    for name in request.tasks:
        items = request.items_a_task
        limit = _ITEMS if items is None else min(_ITEMS, _quarter(items))
        few = find_tasks([name], request.include_path, limit)
        if items is None or items >= _WARMED:
            run(find_tasks([name], request.include_path, 1))  # the first one is slower
        counts = few.requests()
        seconds = small.seconds(partial(run, few))
        total += seconds * sum(wanted[task] for task in counts) / sum(counts.values())
    return total
