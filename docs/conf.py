"""The documentation site.

Pages that the code writes (methods, command line, protocols) are brought up to date when the build starts. The notebook
runs if the model that it prunes is there (`make real` fetches it); otherwise the outputs in its file are shown.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from generate import write_pages
from sphinx.application import Sphinx

from tools.real_models import missing

project = "secateur"
author = "the secateur authors"
release = metadata.version("secateur")
extensions = ["myst_nb"]
nb_execution_mode = "off" if missing("models/SmolLM2-135M-Instruct", "text") else "force"
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_show_tb = True
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
