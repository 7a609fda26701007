"""Pages that are written by the code: one a method from its docstring, the command line from the parser, the tables of
protocols and of laws, the example of the activation flow.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
from pathlib import Path

from rich.console import Console
from typer.main import get_command

from secateur.cli import app
from secateur.cli.terminal import flow_tables
from secateur.evaluate.flow import inspect_flow
from secateur.methods import Method, find_method, method_names
from secateur.predict.laws import LAWS
from secateur.predict.published import SOURCE, TABLE_3
from secateur.report.flow_plot import flow_picture
from secateur.text.protocols import PROTOCOLS


def method_page(method: Method) -> str:
    """A method's docstring, its options with their defaults, and where the code is."""
    title, _, body = inspect.cleandoc(method.module.__doc__ or "").partition("\n")
    fields = dataclasses.fields(method.options_class)
    descriptions = dict(
        re.findall(
            r"^\s+(\w+): (.+?)(?=^\s+\w+: |\Z)",
            inspect.cleandoc(method.options_class.__doc__ or ""),
            re.MULTILINE | re.DOTALL,
        )
    )
    rows = "\n".join(
        f"| `{f.name}` | `{f.default!r}` | {' '.join(descriptions.get(f.name, '').split())} |" for f in fields
    )
    return (
        f"# {method.name}\n\n**{_text(title)}**\n{_text(body)}\n\n## Options\n\nWith `--set option=value` (`pattern` "
        "also as `--pattern`).\n\n"
        f"| option | default | |\n|---|---|---|\n{rows}\n\n## Use\n\n```sh\nsecateur prune MODEL --method "
        f"{method.name} --sparsity 0.5 --out DIR\n```\n\n"
        f"The code is `{_code(method)}`.\n"
    )


def _code(method: Method) -> str:
    """The path of a method: its file, or its folder."""
    own = f"src/secateur/methods/{method.name}"
    return f"{own}/" if hasattr(method.module, "__path__") else f"{own}.py"


def _text(text: str) -> str:
    """Escape the characters of formulas that Markdown would take for markup."""
    return "`".join(part if n % 2 else re.sub(r"([*_|])", r"\\\1", part) for n, part in enumerate(text.split("`")))


def methods_index(names: list[str]) -> str:
    """The table of methods."""
    rows = "\n".join(f"| [{name}]({name}.md) | {_text(find_method(name).summary)} |" for name in names)
    toc = "```{toctree}\n:hidden:\n" + "\n".join(names) + "\n```\n"
    return f"# Methods\n\n| method | |\n|---|---|\n{rows}\n\n{toc}"


def cli_page() -> str:
    """Every command with its arguments and options."""
    parts = [
        "# Command line\n\nExit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Results go to stdout, "
        "everything else to stderr.\n"
    ]
    top = get_command(app).commands  # type: ignore[attr-defined]  # the app is a group of commands
    groups = {name: command.commands for name, command in top.items() if hasattr(command, "commands")}
    flat = {name: c for name, c in top.items() if name not in groups} | {
        f"{name} {sub}": c for name, inner in groups.items() for sub, c in inner.items()
    }
    for name, command in sorted(flat.items()):
        rows = []
        for parameter in command.params:
            flags = (
                ", ".join(f"`{flag}`" for flag in parameter.opts if flag.startswith("-"))
                or f"`{parameter.metavar or parameter.name}`"
            )
            shown = parameter.default not in (None, False, "", ()) and not parameter.required
            rows.append(
                f"| {flags} | "
                f"{(getattr(parameter, 'help', '') or '').strip()}{f' Default: `{parameter.default}`.' if shown else ''} "
                "|"
            )
        parts.append(
            f"## secateur {name}\n\n{inspect.cleandoc(command.help or '')}\n\n| | |\n|---|---|\n"
            + "\n".join(rows)
            + "\n"
        )
    return "\n".join(parts)


def protocols_table() -> str:
    """The table of named protocols."""
    rows = []
    for p in PROTOCOLS.values():
        length = "min(2048, maximum)" if p.seqlen is None else p.seqlen or "the model's maximum"
        limits = ", ".join(
            f"{value:,} {name}"
            for name, value in (("rows", p.rows), ("windows", p.windows), ("tokens", p.tokens))
            if value
        )
        rows.append(
            f"| `{p.name}` | {p.source} | {p.spec or 'a file'} | {length} | `{p.join!r}` | {p.bos} | {p.tail} | "
            f"{limits or 'none'} |"
        )
    heading = "| name | who | text | window | join | BOS | tail | limit |\n|---|---|---|---|---|---|---|---|\n"
    return heading + "\n".join(rows) + "\n"


def flow_example() -> tuple[str, bytes]:
    """The output and the picture of `secateur inspect bundled --flow --plot flow.png`."""
    flow, text = inspect_flow("bundled"), io.StringIO()
    console = Console(file=text, width=110)
    for part in flow_tables(flow.record()):
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n", flow_picture(flow).png


def laws_table() -> str:
    """The table of laws, with their sources."""
    kinds = {"ppl": "perplexity", "acc": "accuracy"}
    rows = [
        f"| `{w.name}` | {kinds[w.kind]} | `{w.formula}` | {', '.join(w.free) or 'none'} | {w.domain} | {w.source} |"
        for w in LAWS
    ]
    return "| law | of | formula | fitted | domain | source |\n|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def published_table() -> str:
    """The table of the paper's own fits."""
    rows = [
        f"| {r.model} | {r.dataset}, {'perplexity' if r.kind == 'ppl' else 'accuracy'} | {r.a:.2f} | {r.b:.2f} | "
        f"{r.rmse:.2f} |"
        for r in TABLE_3
    ]
    return f"| {SOURCE}, SliceGPT | data | a | b | RMSE in y |\n|---|---|---:|---:|---:|\n" + "\n".join(rows) + "\n"


def write_pages(folder: Path) -> None:
    """Write all pages into a folder that is not in the repository."""
    (folder / "methods").mkdir(parents=True, exist_ok=True)
    names = method_names()
    table, picture = flow_example()
    pages = {
        "methods/index.md": methods_index(names),
        "cli.md": cli_page(),
        "protocols.md": protocols_table(),
        "laws.md": laws_table(),
        "published.md": published_table(),
        "flow.txt": table,
    }
    pages |= {f"methods/{name}.md": method_page(find_method(name)) for name in names}
    for path, text in pages.items():
        file = folder / path
        if not file.is_file() or file.read_text("utf-8") != text:
            file.write_text(text, "utf-8")
    (folder / "flow.png").write_bytes(picture)
