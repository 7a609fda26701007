"""The tasks of an evaluation: the built-in cloze, those of lm-eval, and the sets of them that papers report.

lm-eval is the extra `eval`, and takes seconds to import: it is imported when a task asks for it.
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
    """Tasks, found and with their data read.

    Attributes:
        items: of the built-in cloze task; empty where it was not asked for.
        loaded: tasks of lm-eval.
    """

    items: Sequence[Item] = ()
    loaded: harness.Loaded | None = None

    def __bool__(self) -> bool:
        return bool(self.items) or self.loaded is not None

    def facts(self) -> dict[str, Any]:
        """What tells one set of tasks from another."""
        return {
            "cloze": self.items and items_hash(self.items),
            **({"tasks": self.loaded.hashes} if self.loaded else {}),
        }

    def versions(self) -> dict[str, str]:
        """That of lm-eval, where it is used."""
        return {"lm_eval": _harness("").version()} if self.loaded else {}

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        answers: Answers,
        dense: tuple[PreTrainedModel, Answers] | None = None,
    ) -> dict[str, Any]:
        """The results of each task; against a dense model also `flipped`, the share of items on which the choice is another one."""
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
        names: `cloze`, a preset, or what lm-eval knows: tasks, groups, tags.
        include_path: a folder of task files for lm-eval.
        limit: use the first so many items of each.

    Raises:
        UsageError: an unknown task (the nearest names are offered), a folder without task files.
        SecateurError: lm-eval is not installed, or the data of a task cannot be read.
    """
    if include_path is not None and not names:
        raise UsageError(f"--include-path {include_path} says where task files are: name tasks too, --tasks a,b,...")
    wanted = list(dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,))))
    others = [task for task in wanted if task != CLOZE]
    loaded = None
    if others:
        include = None if include_path is None else Path(include_path).expanduser()
        loaded = _harness(others[0]).load_tasks(others, include, limit, builtin=[CLOZE, *PRESETS])
    return Tasks(cloze_items()[:limit] if CLOZE in wanted else (), loaded)


def task_text(spec: str, include_path: str | Path | None = None) -> Text:
    """The text of tasks to calibrate with: questions with their right answers, of the training part where a task has one.

    Args:
        spec: `task:NAME+NAME`.
        include_path: as for `find_tasks`.

    Raises:
        UsageError, SecateurError: as `find_tasks`; or the tasks tell no answers.
    """
    found = find_tasks(task_names(spec), include_path)
    own = cloze_items(len(found.items), seed=1, part="train") if found.items else []
    rows, same = [(item.context, item.choices[item.answer]) for item in own], []
    if found.loaded is not None:
        others, same = _harness("").task_rows(found.loaded)
        rows += others
    if not rows:
        raise SecateurError(f"{spec}: tells no answers, so there is no text to calibrate with")
    if same:
        say(f"warning: {', '.join(same)} have no training part: calibrated on the items that they are measured on")
    return Text(spec, [question + answer for question, answer in rows], questions=[question for question, _ in rows])


def _harness(task: str) -> Any:
    try:
        from secateur.evaluate import harness
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("secateur"):
            raise
        raise SecateurError(
            f"task '{task}' is run by lm-eval, which is not installed (no module {error.name}): pip install 'secateur[eval]'; built in: {CLOZE}"
        ) from error
    return harness


def _flipped(ours: Sequence[int], theirs: Sequence[int]) -> float:
    return sum(a != b for a, b in zip(ours, theirs, strict=True)) / len(ours)
