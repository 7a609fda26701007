"""Register the pruned model classes with transformers when `secateur` is imported, without importing transformers.

If the Auto classes are already loaded, the pruned classes are registered at once; otherwise when the Auto classes are
loaded. So `import secateur` and `secateur --help` stay quick, and `AutoModelForCausalLM.from_pretrained` needs no
remote code.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO = "transformers.models.auto.modeling_auto"
_OWN = {"secateur.models.load", "secateur.models.runtime"}


def register_when_loaded() -> None:
    """Register the classes now, or when the Auto classes are loaded. Repeated calls do no harm."""
    if _AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    if not _OWN.isdisjoint(sys.modules):
        return  # secateur itself is importing the Auto classes; `models.load` registers at its end
    import secateur.models.load  # noqa: F401


class _Finder(MetaPathFinder):
    """An import hook for the Auto classes: removes itself, finds the real module, and wraps its loader."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The real loader, followed by the registration."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        _register()
