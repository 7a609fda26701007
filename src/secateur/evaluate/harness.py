"""Zero-shot tasks through lm-eval (the extra `eval`): any of its tasks by name, and task files of one's own.

lm-eval builds the requests, and turns answers into metrics. The answers come from `continuations.py`: the same numbers as those of
lm-eval's own Hugging Face backend, without the logits of whole sequences, and remembered one by one. Generation is that backend's.

lm-eval takes seconds to import: only `tasks.py` imports this module, when a task asks for it.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import numpy as np
import torch
import tqdm
from lm_eval.evaluator import evaluate as run_lm_eval
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.core.errors import SecateurError
from secateur.core.hub import hub
from secateur.core.records import to_json
from secateur.evaluate.answers import Answers, remembered_scores, request_key
from secateur.evaluate.classification import classification_scores
from secateur.evaluate.continuations import Score, known_ids
from secateur.evaluate.task_files import Manager, find_names, hub_source, names_in, runs_code

_FEWSHOT_SEED = 1234  # lm-eval's own
_BOOTSTRAPS = 1000  # for the standard errors of metrics that are no mean
_GENERATE_TOGETHER = {"cuda": 32}  # prompts to begin with, 4 elsewhere; halved as often as memory runs out

logging.getLogger("lm_eval").setLevel(logging.ERROR)
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork a process a core for a second's work


@dataclass(frozen=True)
class Loaded:
    """Tasks of lm-eval with their data and requests, ready to be asked.

    Attributes:
        found: what lm-eval's manager gave: tasks, groups.
        limit: items of each task; None is all.
        hashes: task -> SHA-256 of its requests and targets.
        local: the tasks defined in the user's own files.
    """

    found: dict[str, Any]
    limit: int | None
    hashes: dict[str, str]
    local: frozenset[str]


@dataclass(frozen=True)
class Outcome:
    """The results by the names of tasks and groups, and the choice made on each item of a task with choices."""

    results: dict[str, dict[str, Any]]
    choices: dict[str, list[int]]


def version() -> str:
    """The version of lm-eval."""
    return str(lm_eval.__version__)


def load_tasks(
    names: Sequence[str], include: Path | None = None, limit: int | None = None, *, builtin: Sequence[str] = ()
) -> Loaded:
    """Find the tasks, read their data and build their requests.

    Args:
        names: of tasks, groups and tags.
        include: a folder of task files; they come before lm-eval's own of the same name.
        limit: use the first so many items of each task.
        builtin: names that need no lm-eval, to offer where a name is unknown.

    Raises:
        UsageError: a name that is none (the nearest are offered), or a folder without task files.
        SecateurError: data that cannot be read, for want of a network perhaps.
    """
    manager = find_names(names, include, builtin)
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        one = _load(manager, name)
        for part in found:
            found[part] |= one.get(part, {})
    for name, task in found["tasks"].items():
        _prepare(name, task)
    with _quiet():
        hashes = {name: _hash(name, task, limit) for name, task in found["tasks"].items()}
    return Loaded(found, limit, hashes, frozenset(found["tasks"]) & (names_in(include) if include else set()))


def task_rows(loaded: Loaded) -> tuple[list[tuple[str, str]], list[str]]:
    """Questions and answers, and the tasks without a training part."""
    rows, same = [], []
    for name, task in loaded.found["tasks"].items():
        if not task.has_training_docs():
            same.append(name)
        with _quiet():
            rows += [
                row
                for doc in (task.training_docs() if task.has_training_docs() else task.eval_docs)
                if any(row := _solved(task, doc))
            ]
    return rows, same


def _solved(task: Any, doc: Any) -> tuple[str, str]:
    """A question, and its right answer with what is between them; nothing where the answer is not told."""
    asked, target = task.doc_to_text(doc), task.doc_to_target(doc)
    choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else []
    if getattr(task, "multiple_input", 0):  # the choices are contexts, and what follows is the same
        asked, target = (choices[asked] if asked in range(len(choices)) else None), target
    elif isinstance(target, int):
        target = choices[target] if target in range(len(choices)) else None
    if isinstance(target, list):
        target = target[0] if target else None
    if asked is None or target is None:
        return "", ""
    return (asked, f"{task.config.target_delimiter}{target}") if asked else ("", str(target))


def _load(manager: Manager, name: str) -> dict[str, Any]:
    if runs_code(manager, name):
        raise _writes_code(name)
    source = hub_source(manager, name)
    with hub() if source else nullcontext(True) as answers:
        try:
            with _quiet():
                loaded: dict[str, Any] = manager.load([name])
        except Exception as error:
            own = "give --include-path DIR with a task file of that name that reads files on this machine (data_files; docs/tasks.md shows one)"
            if not answers:
                raise SecateurError(
                    f"task '{name}' needs {source} from the hub, which does not answer; check the network, or {own}"
                ) from error
            lost = (
                f"; check the network, or {own}" if source and isinstance(error, ConnectionError | TimeoutError) else ""
            )
            raise SecateurError(f"task '{name}' cannot be loaded ({_reason(error)}){lost}") from error
    return loaded


def _reason(error: BaseException) -> str:
    """In a line: what is at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration):
        return "its data is empty"
    first = (str(error).strip().splitlines() or [""])[0]
    return first if " " in first else f"{type(error).__name__}: {first}".removesuffix(": ")


def _writes_code(name: str) -> SecateurError:
    return SecateurError(
        f"task '{name}' runs code that the model wrote, which is not done here; use lm-eval itself, in a container"
    )


def _prepare(name: str, task: Any) -> None:
    """What lm-eval does to tasks before it asks them: none of their own means zero shots."""
    if getattr(task, "UNSAFE_CODE", False):
        raise _writes_code(name)
    if getattr(task, "MULTIMODAL", False):
        raise SecateurError(f"task '{name}' shows pictures or sounds, which a text model cannot take")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _hash(name: str, task: Any, limit: int | None) -> str:
    """Of every request with its target: what a number stands for, wherever the data came from."""
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    if not task.instances:
        raise SecateurError(f"task '{name}' has no items")
    digest = hashlib.sha256()
    for instance in task.instances:
        digest.update(
            to_json(
                {"args": instance.args, "target": task.doc_to_target(instance.doc), "item": instance.doc_id}
            ).encode()
        )
    return digest.hexdigest()


def run_tasks(loaded: Loaded, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Answers) -> Outcome:
    """Ask a model, and let lm-eval score what it answers.

    Args:
        loaded: the tasks.
        model: on its device, in evaluation mode.
        tokenizer: of the model.
        answers: those that are known are not asked for again, the others are added.

    Returns:
        For each task (and group): `acc`, `acc_norm` (None where the task has none), `stderr` and `stderr_norm`, `n`, what else it
        measures under `metrics`, `chance` where there are choices, `precision`, `recall`, `f1` where its choices are classes, and what makes it comparable.
    """
    with _quiet():
        said = run_lm_eval(
            lm=_Backend(model, tokenizer, answers),
            task_dict=loaded.found,
            limit=loaded.limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=True,
        )
    results, choices = {}, {}
    for name, metrics in said["results"].items():
        results[name] = _result(metrics)
        if name in loaded.hashes:
            task = loaded.found["tasks"][name]
            results[name] |= _facts(loaded, name, task)
            if task.OUTPUT_TYPE == "multiple_choice":
                items = _first_filter(said["samples"][name])
                choices[name] = [_chosen(task, item) for item in items]
                results[name] |= {"chance": _chance(task, items), **_classes(task, items, choices[name])}
    return Outcome(results, choices)


def _result(metrics: dict[str, Any]) -> dict[str, Any]:
    """lm-eval writes `metric,filter` and `metric_stderr,filter`; the first filter of `acc` is the one that counts."""

    def first(metric: str) -> float | None:
        values = (
            value
            for key, value in metrics.items()
            if key.partition(",")[0] == metric and isinstance(value, int | float)
        )
        return next((float(value) for value in values), None)

    known = {
        "acc": first("acc"),
        "acc_norm": first("acc_norm"),
        "stderr": first("acc_stderr"),
        "stderr_norm": first("acc_norm_stderr"),
    }
    others = {
        key.removesuffix(",none"): value
        for key, value in metrics.items()
        if "," in key
        and key.partition(",")[0].removesuffix("_stderr") not in ("acc", "acc_norm")
        and isinstance(value, int | float)
    }
    return {**known, "n": metrics.get("sample_len"), **({"metrics": others} if others else {})}


def _facts(loaded: Loaded, name: str, task: Any) -> dict[str, Any]:
    return {
        "sha256": loaded.hashes[name],
        "shots": task.get_config("num_fewshot"),
        "task_version": task.VERSION,
        **({"local": True} if name in loaded.local else {}),
    }


def _first_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def _chosen(task: Any, sample: dict[str, Any]) -> int:
    scores = [answer[0] for answer in sample["filtered_resps"]][: len(task.doc_to_choice(sample["doc"]))]
    return int(np.argmax(scores))


def _chance(task: Any, items: list[dict[str, Any]]) -> float:
    """What guessing scores."""
    return sum(1 / len(task.doc_to_choice(item["doc"])) for item in items) / len(items)


def _classes(task: Any, items: list[dict[str, Any]], chosen: list[int]) -> dict[str, Any]:
    """Precision, recall and F1, where every item has the same choices, and they are more than letters."""
    labels = task.doc_to_choice(items[0]["doc"])
    if (
        getattr(task, "multiple_input", 0)
        or len(items) < 2
        or any(task.doc_to_choice(item["doc"]) != labels for item in items)
    ):
        return {}
    truth = [labels.index(t) if isinstance(t, str) and t in labels else t for t in (item["target"] for item in items)]
    letters = all(len(label.strip(" .()")) == 1 and label.strip(" .()").isalpha() for label in labels)
    if letters or not all(isinstance(t, int) and 0 <= t < len(labels) for t in truth):
        return {}
    return classification_scores(truth, chosen, [label.strip() for label in labels])


class _Backend(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's Hugging Face backend with our scores in place of its own, and answers that are known taken from where they are."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Answers) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it may be given a padding token
            backend="causal",
            batch_size=_GENERATE_TOGETHER.get(model.device.type, 4),
            max_length=int(model.config.max_position_embeddings),
        )
        self._answers = answers
        self.cache_hook = _Hook(answers)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        return self._known(super().tok_encode(string, *args, **kwargs))

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        self._known([i for string in strings for i in self.tokenizer(string)["input_ids"]])
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _known(self, ids: list[int]) -> list[int]:
        return known_ids(ids, self.model, self.tokenizer, "tasks")

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Score]:
        return remembered_scores(self.model, [(context, rest) for _, context, rest in requests], "tasks", self._answers)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        while True:
            try:
                return self._generate(requests)
            except torch.OutOfMemoryError:
                if self.batch_size_per_gpu == 1:
                    raise
                self.batch_size_per_gpu //= 2

    def _generate(self, requests: Any) -> list[str]:
        if any(request.args[1].get("do_sample") for request in requests):
            return list(
                super().generate_until(requests, disable_tqdm=True)
            )  # what is drawn anew each time has no answer to remember
        keys = [_generation_key(*request.args) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._answers}
        if missing:
            super().generate_until(list(missing.values()), disable_tqdm=True)  # the hook takes each answer as it comes
        return [self._answers[key] for key in keys]


class _Hook:
    """Where lm-eval's backend puts each generated text."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def add_partial(self, kind: str, args: tuple[Any, ...], answer: Any) -> None:
        if kind == "generate_until":
            self._answers.add({_generation_key(*args): answer})


def _generation_key(context: str, settings: dict[str, Any]) -> str:
    return request_key("text", version(), context, sorted(settings.items()))


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets print and draw bars of their own; stdout is for results."""
    bars = [(module, module.tqdm) for module in (lm_eval.api.task, tqdm)]
    for module, _ in bars:
        module.tqdm = lambda items, **_: items
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for module, bar in bars:
            module.tqdm = bar
        if shown:
            datasets.enable_progress_bars()
