"""The documentation site.

Pages that the code writes (methods, command line, protocols) are brought up to date when the build starts.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from generate import write_pages
from sphinx.application import Sphinx

project = "secateur"
author = "the secateur authors"
release = metadata.version("secateur")
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"secateur {release}"
html_copy_source = False
exclude_patterns = ["generated/protocols.md", "generated/laws.md", "generated/published.md"]
nitpicky = True


def setup(app: Sphinx) -> None:
    """Called by Sphinx before it looks for pages."""
    write_pages(Path(app.srcdir) / "generated")
