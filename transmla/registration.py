"""Registers the student classes with transformers' Auto classes, without importing transformers before anybody uses it.

transformers and torch take seconds to import, the command line has to answer in half a second. So where transformers is
not imported yet, the imports of its AutoConfig and of AutoModelForCausalLM are awaited, and the first call of either
registers what it will look for: configurations, or models too.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class _Auto:
    """An Auto class: its module, the class methods that look a class up, and the module that registers with it."""

    module: str
    name: str
    entrances: tuple[str, ...]
    registers: str


# Every other Auto class finds a configuration through AutoConfig.
AUTO = (
    _Auto(
        "transformers.models.auto.configuration_auto",
        "AutoConfig",
        ("from_pretrained", "for_model"),
        "transmla.families",
    ),
    _Auto(
        "transformers.models.auto.modeling_auto",
        "AutoModelForCausalLM",
        ("from_pretrained", "from_config"),
        "transmla.families.students",
    ),
)


def register() -> None:
    """Register the students of all families, and the sources that transformers does not know; again changes nothing."""
    for auto in AUTO:
        importlib.import_module(auto.registers)


def register_when_asked() -> None:
    """Have the first call of an Auto class register what it looks for."""
    for auto in AUTO:
        if auto.module in sys.modules:
            _guard(sys.modules[auto.module], auto)
        elif not any(isinstance(finder, _Finder) and finder.auto == auto for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(auto))


def _guard(module: ModuleType, auto: _Auto) -> None:
    """Replace the entrances of an Auto class until the first of them is called."""
    guarded: Any = getattr(module, auto.name)
    own = {name: vars(guarded)[name] for name in auto.entrances if name in vars(guarded)}  # the others are inherited
    if any(isinstance(entrance, _Guarded) for entrance in own.values()):
        return

    def restore() -> None:
        for name in auto.entrances:
            if name in own:
                setattr(guarded, name, own[name])
            elif name in vars(guarded):
                delattr(guarded, name)

    for name in auto.entrances:
        setattr(guarded, name, _Guarded(auto, name, getattr(guarded, name), restore))


class _Guarded:
    """An entrance of an Auto class that steps aside, registers and goes on."""

    def __init__(self, auto: _Auto, name: str, original: Callable[..., Any], restore: Callable[[], None]) -> None:
        self.auto, self.name, self.original, self.restore = auto, name, original, restore

    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., Any]:
        @functools.wraps(self.original)
        def entrance(*args: Any, **kwargs: Any) -> Any:
            self.restore()
            importlib.import_module(self.auto.registers)
            return getattr(owner, self.name)(*args, **kwargs)

        return entrance


class _Finder:
    """Waits for the import of an Auto class's module, and leaves the import itself to the others."""

    def __init__(self, auto: _Auto) -> None:
        self.auto = auto

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.auto.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = _Loader(spec.loader, self.auto)  # the import system asks for its methods alone, not its class
            spec.loader = loader
        return spec


class _Loader:
    """Another loader, and `_guard` after it."""

    def __init__(self, loader: Any, auto: _Auto) -> None:
        self.loader, self.auto = loader, auto

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _guard(module, self.auto)
