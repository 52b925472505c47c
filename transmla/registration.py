"""Registers the student classes with transformers' Auto classes, without importing transformers before anybody uses it.

transformers and torch take seconds to import, the command line has to answer in half a second. So where transformers is
not imported yet, the import of its AutoConfig is awaited, and the first call of AutoConfig registers the classes.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"
ENTRANCES = ("from_pretrained", "for_model")  # of AutoConfig: every other Auto class comes through them


def register() -> None:
    """Register the students of all families, and the sources that transformers does not know; again changes nothing."""
    importlib.import_module("transmla.families")


def register_when_asked() -> None:
    """Have the first call of AutoConfig, of whatever Auto class, call `register`."""
    if AUTO in sys.modules:
        _guard(sys.modules[AUTO])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _guard(module: ModuleType) -> None:
    """Replace the entrances of AutoConfig until the first of them is called."""
    auto: Any = module.AutoConfig
    if any(name in vars(auto) and isinstance(vars(auto)[name], _Guarded) for name in ENTRANCES):
        return
    originals = {name: vars(auto)[name] for name in ENTRANCES}

    def restore() -> None:
        for name, original in originals.items():
            setattr(auto, name, original)

    for name in ENTRANCES:
        setattr(auto, name, _Guarded(auto, name, restore))


class _Guarded:
    """An entrance of AutoConfig that registers, steps aside and goes on."""

    def __init__(self, auto: Any, name: str, restore: Callable[[], None]) -> None:
        self.auto, self.name, self.restore = auto, name, restore

    def __get__(self, instance: object, owner: object = None) -> Callable[..., Any]:
        @functools.wraps(self.auto)
        def entrance(*args: Any, **kwargs: Any) -> Any:
            self.restore()
            register()
            return getattr(self.auto, self.name)(*args, **kwargs)

        return entrance


class _Finder:
    """Waits for the import of AutoConfig's module, and leaves the import itself to the others."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = _Loader(spec.loader)  # the import system asks for its two methods alone, not for the class
            spec.loader = loader
        return spec


class _Loader:
    """Another loader, and `_guard` after it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _guard(module)
