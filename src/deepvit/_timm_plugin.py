"""`timm.create_model("deepvit32")` after a bare `import deepvit`, without paying for timm (3 s) before it is wanted."""

import importlib.abc
import importlib.util
import sys


def register_when_timm_is_imported() -> None:
    if "timm" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterOnceImported())


def _register() -> None:
    if "deepvit.models" in sys.modules:
        return  # it is being imported, imports timm itself, and registers at its end
    from deepvit.models.registry import register_with_timm
    register_with_timm()


class _RegisterOnceImported(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets Python load timm as ever and adds our models right after."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)  # before asking Python, or it would ask us again
        spec = importlib.util.find_spec("timm")
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_then_register(module):
            load(module)
            _register()

        spec.loader.exec_module = load_then_register
        return spec
