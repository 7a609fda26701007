"""The pages of the documentation in a checkout: every link leads somewhere, and the generated pages are up to date."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
PAGES += sorted((ROOT / "docs" / "generated").glob("*.md"))
DEEPEST = 3  # headings below this level have no anchor in the site (myst_heading_anchors of docs/conf.py)

_FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1`* *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?:(?!`).|(?!\1)`)*?\1", re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^ *\[[^\]]+\]: *<?(\S+?)>?(?: +\"[^\"]*\")? *$", re.MULTILINE)
_HTML = re.compile(r"(?:href|src)=\"([^\"]+)\"")
_INCLUDE = re.compile(r"^`{3}\{(?:literal)?include\} +(\S+)", re.MULTILINE)
_TOCTREE = re.compile(r"^`{3}\{toctree\}\n(.*?)^`{3}", re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """The targets of the links and images of a page, and what it includes; not those inside code."""
    prose = _CODE.sub(lambda code: "`code`", _FENCE.sub("", text))
    trees = [line for tree in _TOCTREE.findall(text) for line in tree.split() if not line.startswith(":")]
    found = [target for pattern in (_LINK, _REFERENCE, _HTML) for target in pattern.findall(prose)]
    return [*found, *_INCLUDE.findall(text), *(_page(line) for line in trees)]


def _page(name: str) -> str:
    """The file of an entry of a table of contents: a page or a notebook."""
    return f"{name}.ipynb" if (ROOT / "docs" / f"{name}.ipynb").is_file() else f"{name}.md"


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a page, as GitHub and the site make them."""
    found: set[str] = set()
    for marks, heading in re.findall(r"^(#+) +(.+?) *#* *$", _FENCE.sub("", text), re.MULTILINE):
        if len(marks) > DEEPEST:
            continue
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        again = (f"{slug}-{number}" for number in range(1, 100))
        found.add(slug if slug not in found else next(name for name in again if name not in found))
    return found | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@cache
def checkout() -> frozenset[Path]:
    """The files of the repository, also those not committed yet; not what a build leaves."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return frozenset(ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file())


def broken(page: Path, text: str) -> Iterator[str]:
    """The links of a page that lead nowhere, each with the reason."""
    for target in links(text):
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue  # the web, which tests do not reach
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        folder = file.is_dir() and any(file in other.parents for other in checkout())
        if path and file not in checkout() and not folder:
            yield f"{target}: no such file in the repository"
        elif anchor and anchor not in anchors(text if file == page else file.read_text()):
            yield f"{target}: {file.name} has no such heading of level {DEEPEST} or above"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_of_the_repository_and_to_a_heading(page: Path) -> None:
    assert list(broken(page, page.read_text())) == []


BROKEN = [
    "[a](nosuch.md)",
    "![a picture](images/nosuch.png)",
    "[a](tour.md#nosuch)",
    "[a](#nosuch)",
    "[two\nlines](nosuch.md)",
    "[`code` in it](nosuch.md)",
    '[a](nosuch.md "with a title")',
    "[![image](images/law.png)](nosuch.md)",
    "[a]: nosuch.md",
    '<img src="nosuch.png">',
    "```{include} generated/nosuch.md\n```",
    "```{toctree}\n:hidden:\n\nnosuch\n```",
    "[a](../site/index.html)",
]
FINE = [
    "[a](tour.md)",
    "[a](tour.md#the-rooms)",
    "# Own heading\n[a](#own-heading)",
    "[a](../README.md#read-on)",
    "[a](https://example.org/nosuch.md)",
    "`[a](nosuch.md)`",
    "```md\n[a](nosuch.md)\n```",
    "[a](../src/secateur/methods)",
    "## Twice\n## Twice\n[a](#twice-1)",
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_link_that_leads_nowhere_is_found(text: str) -> None:
    assert len(list(broken(ROOT / "docs" / "some.md", text))) == 1


@pytest.mark.parametrize("text", FINE)
def test_a_good_link_is_left_alone(text: str) -> None:
    assert list(broken(ROOT / "docs" / "some.md", text)) == []


def _generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_pages_are_what_the_code_says() -> None:
    folder = ROOT / "docs" / "generated"
    written = {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".png"}
    expected = _generate().pages()
    old = [name for name in written.keys() | expected.keys() if written.get(name) != expected.get(name)]
    assert not old, f"run python docs/generate.py and commit docs/generated: {', '.join(sorted(old))}"
    assert (folder / "flow.png").is_file()


def test_every_page_is_in_the_index() -> None:
    listed = links((ROOT / "docs" / "index.md").read_text())
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(listed)
    assert all(listed.count(name) == 2 for name in pages), "a line that says what it is for, and the table of contents"
