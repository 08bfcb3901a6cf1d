"""One of diffusers' models without all the others, and without torch's compiler.

`import diffusers.models.unets.unet_2d` first runs unets/__init__.py, which imports every U-Net there is, and through them every
transformer: a quarter of what a start of `explain` takes. `defer_siblings` makes those packages known without running their
__init__, which runs when somebody asks one of them for a name that is not there yet. What is imported is diffusers' own in either
case.

diffusers.utils imports torch._dynamo, a fifth of the rest, to mark attention as a leaf of graphs that the compiler traces. It has
a fallback for a torch without the compiler, and is imported with that.
"""

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from threading import RLock, get_ident
from types import ModuleType
from typing import Any

PACKAGES = tuple(f"diffusers.models.{name}" for name in ("autoencoders", "transformers", "unets"))


def defer_siblings() -> None:
    """Before an import of one of diffusers' models. Packages that are imported already stay as they are."""
    if "torch._dynamo" not in sys.modules:
        with _unknown("torch._dynamo"):
            import_module("diffusers.utils.torch_utils")
    for name in PACKAGES:
        if name in sys.modules:
            continue
        spec = find_spec(name)
        if spec is None or spec.loader is None:  # another version of diffusers has it elsewhere: its imports say so
            continue
        package = module_from_spec(spec)
        package.__dict__["__getattr__"] = _Deferred(package, spec.loader)
        sys.modules[name] = package
        parent, _, last = name.rpartition(".")
        setattr(sys.modules[parent], last, package)


@contextmanager
def _unknown(name: str) -> Generator[None]:
    """A module that is not imported yet cannot be, by this thread, for the time being."""
    finder = _Unknown(name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Unknown(MetaPathFinder):
    """Says to its own thread that there is no such module."""

    def __init__(self, name: str) -> None:
        self._name, self._thread = name, get_ident()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == self._name and get_ident() == self._thread:
            raise ModuleNotFoundError(f"{fullname} is left for later", name=fullname)
        return None


class _Deferred:
    """The `__getattr__` of a package whose __init__ has not run; only the first call runs it, and others wait for that."""

    def __init__(self, package: ModuleType, loader: Loader) -> None:
        self._package, self._loader = package, loader
        self._lock, self._has_run = RLock(), False

    def __call__(self, name: str) -> Any:
        names = self._package.__dict__
        # Whoever looks through all modules for a __file__ or a __wrapped__ does not want the models.
        if not name.startswith("__") or name == "__all__":
            with self._lock:
                if not self._has_run:
                    self._has_run = True
                    self._loader.exec_module(self._package)
            if name in names:
                return names[name]
        raise AttributeError(f"module {self._package.__name__!r} has no attribute {name!r}")
