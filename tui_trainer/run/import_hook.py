"""Runs callbacks around the first import of torch or another module, by any importer.

A script may set environment variables before its own `import torch` (OMP_NUM_THREADS,
PYTORCH_CUDA_ALLOC_CONF, …), so torch must not be imported before the script imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Finder:
    """A meta path finder that wraps the loader of one module, once."""

    def __init__(self, name: str, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._name = name
        self._before = before
        self._after = after

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        self._before()
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        original = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # uncovers the method of the class
            original(module)
            self._after()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def around_torch_import(
    before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    """Call `before()` when torch is about to be imported and `after()` once it is; call both
    immediately if torch is already imported. Neither may raise. Returns a function that removes
    the hook."""
    return _around_import("torch", before, after)


def after_import(name: str, call: Callable[[], None]) -> Callable[[], None]:
    """Call `call()`, which must not raise, once the module `name` is imported; immediately if it
    already is. Returns a function that removes the hook."""
    return _around_import(name, _nothing, call)


def _around_import(
    name: str, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    if name in sys.modules:
        before()
        after()
        return _nothing
    finder = _Finder(name, before, after)
    sys.meta_path.insert(0, finder)

    def remove() -> None:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)

    return remove


def _nothing() -> None:
    pass
