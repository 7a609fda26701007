"""Pages that are written by the code: the methods from their docstrings, the command line from the parser, the tables of
protocols and of laws, the example of the activation flow.

They are in the repository, so that the links to them work in a checkout. `python docs/generate.py` writes them, and so
does a build of the site; tests/test_docs.py says where they are old.
"""

from __future__ import annotations

import inspect
import io
import re
from pathlib import Path

from rich.console import Console
from typer.main import get_command

from secateur.cli import app
from secateur.cli.method_tables import option_words, result_words, results
from secateur.cli.terminal import flow_tables
from secateur.evaluate.flow import inspect_flow
from secateur.methods import Method, find_method, method_names
from secateur.predict.laws import LAWS
from secateur.predict.published import SOURCE, TABLE_3
from secateur.report.flow_plot import flow_picture
from secateur.text.protocols import PROTOCOLS


def methods_page() -> str:
    """The table of methods, then each with its docstring, its options with their defaults, and where the code is."""
    methods = [find_method(name) for name in method_names()]
    own = [method for method in methods if method.module.__name__.startswith("secateur.")]  # not of other packages
    table = "\n".join(
        f"| [{m.name}](#{m.name}) | {results(m.describe())} | {m.needs} | {_text(m.summary)} |" for m in own
    )
    head = (
        "# Methods\n\n`secateur methods NAME` prints the facts and options below, and `secateur prune --method NAME --help` "
        "the options. A result is *smaller* (parameters are removed) or has *zeros* (the same size, weights are set to zero); where a "
        "method can do both, `--pattern` decides. [Which method first?](../which-method.md)\n\n"
    )
    return f"{head}| method | result | needs | |\n|---|---|---|---|\n{table}\n\n" + "\n".join(
        _method(method) for method in own
    )


def _method(method: Method) -> str:
    found = method.describe()
    facts = [f"Advice: {found['advice']}"] if found["advice"] else []
    facts += [f"Paper: <{found['paper']}>"] if found["paper"] else []
    facts.append(f"The result is {result_words(found)}")
    facts.append(f"A sparsity is a fraction of {found['sparsity_of']}")
    facts += [
        f"with pattern `{pattern}` of {words}"
        for pattern, words in found["patterns"].items()
        if words != found["sparsity_of"]
    ]
    text = found["calibration"]
    facts.append(
        "It needs no text"
        if text is None
        else f"It calibrates by default with {text['samples']:,} windows of {text['seqlen']:,} tokens of `{text['spec']}`"
    )
    rows = "\n".join(
        f"| `{option['name']}` | `{option_words(option['default'])}` | {option['meaning']} |"
        for option in found["options"]
    )
    return (
        f"## {method.name}\n\n**{_text(method.summary)}**\n\n{_text(method.about)}\n\n"
        + "".join(f"- {fact}.\n" for fact in facts)
        + "\n**Options**, with `--set option=value` (`pattern` also as `--pattern`):\n\n"
        f"| option | default | |\n|---|---|---|\n{rows}\n\n"
        f"```sh\nsecateur prune MODEL --method {method.name} --sparsity 0.5 --out DIR\n```\n\n"
        f"The code is `{_code(method)}`.\n"
    )


def _code(method: Method) -> str:
    """The path of a method: its file, or its folder."""
    own = f"src/secateur/methods/{method.name}"
    return f"{own}/" if hasattr(method.module, "__path__") else f"{own}.py"


def _text(text: str) -> str:
    """Escape the characters of formulas that Markdown would take for markup."""
    return "`".join(part if n % 2 else re.sub(r"([*_|])", r"\\\1", part) for n, part in enumerate(text.split("`")))


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


def flow_table() -> str:
    """The output of `secateur inspect bundled --flow --plot flow.png`."""
    text = io.StringIO()
    console = Console(file=text, width=110)
    for part in flow_tables(inspect_flow("bundled").record()):
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


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


def pages() -> dict[str, str]:
    """Name -> text of every page but the picture."""
    return {
        "methods.md": methods_page(),
        "cli.md": cli_page(),
        "protocols.md": protocols_table(),
        "laws.md": laws_table(),
        "published.md": published_table(),
        "flow.txt": flow_table(),
    }


def write_pages(folder: Path) -> None:
    """Write the pages that changed. The picture is drawn again only where its table changed: its bytes depend on the
    version of matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    changed = [
        name
        for name, text in pages().items()
        if not (folder / name).is_file() or (folder / name).read_text("utf-8") != text
    ]
    for name in changed:
        (folder / name).write_text(pages()[name], "utf-8")
    picture = folder / "flow.png"
    if "flow.txt" in changed or not picture.is_file():
        picture.write_bytes(flow_picture(inspect_flow("bundled")).png)


if __name__ == "__main__":
    write_pages(Path(__file__).parent / "generated")
