"""Find task files: the user's, ours, and the thirteen thousand that lm-eval brings.

lm-eval reads all of its files as YAML before it knows a name, which takes ten seconds. A search through their text
finds the folder of a task in less than one second. All files are read only for groups, tags and unknown names.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml  # type: ignore[import-untyped]  # it has no types
from lm_eval.tasks import TaskManager

from secateur.core.errors import UsageError

OWN_TASKS = Path(__file__).parent / "lm_eval_tasks"
SHIPPED = Path(lm_eval.tasks.__file__).parent
Manager = Any  # lm-eval has no types
_READERS = ("json", "csv", "parquet", "text", "arrow")  # the readers of local files in `datasets`


def find_names(names: Sequence[str], include: Path | None, builtin: Sequence[str]) -> Manager:
    """Return a manager that knows these tasks, groups and tags.

    Args:
        names: names of tasks, groups and tags.
        include: a folder of task files; a task there replaces lm-eval's own task of the same name.
        builtin: names that do not need lm-eval; an error message about an unknown name offers them too.

    Raises:
        UsageError: a name is unknown (the message offers the nearest ones), the folder holds no task files, or a file
            is not YAML.
    """
    given = (OWN_TASKS,) if include is None else (OWN_TASKS, _checked(include))
    task_manager = manager(given)
    if missing := unknown_among(task_manager, names):
        task_manager = manager(
            (*dict.fromkeys(folder for name in sorted(missing) if (folder := _folder_of(name))), *given)
        )
    if unknown_among(task_manager, names):
        task_manager = manager((SHIPPED, *given))
    if missing := unknown_among(task_manager, names):
        raise _unknown(sorted(missing)[0], task_manager.all_tasks, builtin, include)
    return task_manager


@functools.cache
def manager(folders: tuple[Path, ...]) -> Manager:
    """Return lm-eval's manager of the files in these folders. Of two tasks with one name, the later folder's counts."""
    return TaskManager(include_path=list(folders), include_defaults=False)


def unknown_among(found: Manager, names: Iterable[str]) -> set[str]:
    """Return the names, and members of groups, that the manager does not know."""
    return {name for name in leaves(found, names) if name not in found.task_index}


def leaves(found: Manager, names: Iterable[str]) -> list[str]:
    """Return the single tasks behind names: groups and tags are replaced by their members. Unknown names stay."""
    todo, visited, single = list(names), set(), []
    while todo:
        name = todo.pop(0)
        if name in visited:
            continue
        visited.add(name)
        entry = found.task_index.get(name)
        if entry is None:  # an unknown name
            members = []
        elif entry.yaml_path is None:  # a tag
            members = sorted(entry.tags)
        else:  # a task or a group
            members = _members((entry.cfg or {}).get("task"))
        todo += members
        if set(members) <= {name}:
            single.append(name)
    return single


def _members(task: Any) -> list[str]:
    """Return the names under the key `task` of a file: one name, or the members of a group, which may be nested."""
    if isinstance(task, str):
        return [task]
    if isinstance(task, dict):
        return _members(task.get("task"))
    return [name for part in task or () for name in _members(part)]


def hub_source(found: Manager, name: str) -> str | None:
    """Return the first data set of the hub that a task or group reads.

    None means that, by its files, it reads only this machine.
    """
    sources = (_source(found.task_index[leaf].cfg or {}) for leaf in leaves(found, [name]))
    return next(filter(None, sources), None)


def _source(settings: dict[str, Any]) -> str | None:
    path, given = settings.get("dataset_path"), settings.get("dataset_kwargs") or {}
    if "class" in settings:
        return "its data"
    if not isinstance(path, str) or "custom_dataset" in settings or Path(path).exists():
        return None
    return None if path in _READERS and "://" not in str(given) else path


def runs_code(found: Manager, name: str) -> bool:
    """Return True if a task states that it runs code that the model wrote."""
    return any((found.task_index[leaf].cfg or {}).get("unsafe_code") for leaf in leaves(found, [name]))


def names_in(folder: Path) -> set[str]:
    """Return the tasks, groups and tags of a folder of task files."""
    return set(manager((folder.resolve(),)).all_tasks)


def _checked(include: Path) -> Path:
    """Return the absolute folder of task files, after a check of each: lm-eval silently skips files it cannot read."""
    if not include.is_dir():
        raise UsageError(f"--include-path {include}: no such folder; give the folder of lm-eval task files (*.yaml)")
    files = sorted(include.glob("**/*.yaml"))
    for file in files:
        _check_yaml(file)
    if not names_in(include):
        reason = f"none of its {len(files)} .yaml files is one" if files else "it has no .yaml files"
        raise UsageError(
            f"--include-path {include}: no task files of lm-eval ({reason}); "
            "a task file is a .yaml file with the key 'task:' and its data"
        )
    return include.resolve()


def _check_yaml(file: Path) -> None:
    try:
        yaml.compose(file.read_text("utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise UsageError(f"{file}{where}: not YAML ({problem}); correct it, or move it out of --include-path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file}: not YAML ({str(error).splitlines()[0]}); correct it, or move it out of --include-path"
        ) from None


def _folder_of(name: str) -> Path | None:
    """Return the folder of lm-eval that has a task of this name, or None."""
    line = re.compile(rf"^[ \t]*[\"']?task[\"']?:[ \t]*[\"']?{re.escape(name)}[\"']?[ \t]*(#.*)?$", re.MULTILINE)
    return next((file.parent for file, text in _texts(SHIPPED) if line.search(text)), None)


@functools.cache
def _texts(folder: Path) -> list[tuple[Path, str]]:
    return [
        (file, file.read_text("utf-8", errors="replace"))
        for file in sorted(folder.glob("**/*.yaml"), key=Path.as_posix)
    ]


def _unknown(name: str, known: Sequence[str], builtin: Sequence[str], include: Path | None) -> UsageError:
    near = difflib.get_close_matches(name, [*builtin, *known], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    own = ", ".join(sorted(names_in(include))) if include else "none; name their folder with --include-path"
    listed = f"`lm-eval ls tasks` lists the {len(known):,} names that lm-eval {lm_eval.__version__} knows"
    return UsageError(f"unknown task '{name}'{hint} ({listed}; task files of your own: {own})")
