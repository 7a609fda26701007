"""The tasks of an evaluation: the built-in cloze task, the tasks of lm-eval, and the sets of tasks that papers report.

lm-eval is the extra `eval`. It takes seconds to import, so it is imported only when a task needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import say
from secateur.evaluate.answers import Answers
from secateur.evaluate.cloze import CLOZE, Item, cloze_items, evaluate_cloze, items_hash
from secateur.text.specs import Text, task_names

if TYPE_CHECKING:
    from secateur.evaluate import harness

PRESETS = {
    "disp-llm": ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"),  # DISP-LLM's tables 2 and 3
    "modules": ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),  # Wanda's tasks
}


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, ready to run.

    Attributes:
        items: the items of the built-in cloze task; empty where the task is not requested.
        loaded: the tasks of lm-eval; None where none is requested.
    """

    items: Sequence[Item] = ()
    loaded: harness.Loaded | None = None

    def __bool__(self) -> bool:
        return bool(self.items) or self.loaded is not None

    def facts(self) -> dict[str, Any]:
        """Return the hashes of the tasks, which tell one set of tasks from another."""
        return {
            "cloze": self.items and items_hash(self.items),
            **({"tasks": self.loaded.hashes} if self.loaded else {}),
        }

    def requests(self) -> dict[str, int]:
        """Return the number of requests of each task."""
        own = {CLOZE: sum(len(item.choices) for item in self.items)} if self.items else {}
        others = self.loaded.found["tasks"].items() if self.loaded else ()
        return own | {name: len(task.instances) for name, task in others}

    def writing(self) -> list[str]:
        """Return the tasks for which the model writes text."""
        others = self.loaded.found["tasks"].items() if self.loaded else ()
        return [name for name, task in others if task.OUTPUT_TYPE == "generate_until"]

    def versions(self) -> dict[str, str]:
        """Return the version of lm-eval, where it is used."""
        return {"lm_eval": _harness("").version()} if self.loaded else {}

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        answers: Answers,
        dense: tuple[PreTrainedModel, Answers] | None = None,
    ) -> dict[str, Any]:
        """Return the results of each task.

        With a dense model, `flipped` is the share of items where the two choices differ.
        """
        results = {}
        if self.items:
            results[CLOZE], chosen = evaluate_cloze(model, tokenizer, self.items, answers)
            if dense is not None:
                results[CLOZE]["flipped"] = _flipped(
                    chosen, evaluate_cloze(dense[0], tokenizer, self.items, dense[1])[1]
                )
        if self.loaded is not None:
            run = _harness("").run_tasks
            ours = run(self.loaded, model, tokenizer, answers)
            results |= ours.results
            theirs = run(self.loaded, dense[0], tokenizer, dense[1]).choices if dense is not None else {}
            for name in theirs:
                results[name]["flipped"] = _flipped(ours.choices[name], theirs[name])
        return results


def find_tasks(names: Sequence[str], include_path: str | Path | None = None, limit: int | None = None) -> Tasks:
    """Find tasks by name and read their data.

    Args:
        names: `cloze`, presets, and tasks, groups and tags of lm-eval.
        include_path: a folder of task files for lm-eval.
        limit: use only the first `limit` items of each task; None uses all.

    Raises:
        UsageError: a task is unknown (the message offers the nearest names), or the folder holds no task files.
        SecateurError: lm-eval is not installed, or the data of a task cannot be read.
    """
    if include_path is not None and not names:
        raise UsageError(
            f"--include-path {include_path} is the folder of task files; name the tasks too, as in --tasks a,b"
        )
    requested = list(dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,))))
    others = [task for task in requested if task != CLOZE]
    loaded = None
    if others:
        include = None if include_path is None else Path(include_path).expanduser()
        loaded = _harness(others[0]).load_tasks(others, include, limit, builtin=[CLOZE, *PRESETS])
    return Tasks(cloze_items()[:limit] if CLOZE in requested else (), loaded)


def task_text(spec: str, include_path: str | Path | None = None) -> Text:
    """Return the text of tasks, for calibration: questions with their right answers.

    A task with a training part gives that part.

    Args:
        spec: `task:NAME+NAME`.
        include_path: a folder of task files, as for `find_tasks`.

    Raises:
        UsageError, SecateurError: as `find_tasks`; or no item has a right answer to read.
    """
    tasks = find_tasks(task_names(spec), include_path)
    own = cloze_items(len(tasks.items), seed=1, part="train") if tasks.items else []
    rows, untrained = [(item.context, item.choices[item.answer]) for item in own], []
    if tasks.loaded is not None:
        others, untrained = _harness("").task_rows(tasks.loaded)
        rows += others
    if not rows:
        raise SecateurError(
            f"{spec}: no item has a right answer in the data, so there is no text to calibrate on; choose other tasks"
        )
    if untrained:
        say(
            f"warning: {', '.join(untrained)} have no training part: "
            "calibration uses the items that an evaluation measures"
        )
    return Text(spec, [question + answer for question, answer in rows], questions=[question for question, _ in rows])


def _harness(task: str) -> Any:
    try:
        from secateur.evaluate import harness
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("secateur"):
            raise
        raise SecateurError(
            f"task '{task}' needs lm-eval, which is not installed (no module {error.name}): "
            f"pip install 'secateur[eval]'; the built-in task '{CLOZE}' needs nothing"
        ) from error
    return harness


def _flipped(ours: Sequence[int], theirs: Sequence[int]) -> float:
    return sum(a != b for a, b in zip(ours, theirs, strict=True)) / len(ours)
