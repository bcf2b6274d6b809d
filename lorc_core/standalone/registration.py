"""Make transformers know exported variants, without importing transformers: that takes seconds.

`import lorc_core` calls `register_with_transformers`. Where transformers' list of configs is not loaded yet, a finder
waits for it, adds ours once, and is gone.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_CONFIGS = "transformers.models.auto.configuration_auto"
OURS = "lorc_core.standalone.classes"


class AfterImport(MetaPathFinder):
    """Registers our configs when transformers' list of configs has been imported."""

    def find_spec(self, name: str, path: Iterable[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None but for the one module, whose own loader then also registers."""
        if name != AUTO_CONFIGS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(OURS).register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """At once where transformers' list of configs is loaded, else when it will be."""
    if AUTO_CONFIGS in sys.modules:
        importlib.import_module(OURS).register()
    else:
        sys.meta_path.insert(0, AfterImport())
