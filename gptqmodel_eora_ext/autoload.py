"""Makes `import gptqmodel` or `import auto_round` alone enough: what `gptqmodel_eora_ext.pth` calls.

Python's `site` runs that line at the start of every process of the environment, whatever it is for. So nothing is
imported here that Python has not imported by then, nothing raises, and all that is done is to ask for a call once a
host has finished importing. A process may also call it later, with a host imported or in the middle of its import.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any
else:
    # The same class, without the import of `importlib.machinery`.
    ModuleSpec = type(sys.__spec__)

OFF_SWITCH = "GPTQMODEL_EORA_EXT_DISABLE"
# Host → the module whose `install_or_log` makes the plugin known to it.
HOSTS = {"gptqmodel": ".hosts.gptqmodel.seams", "auto_round": ".hosts.autoround.seams"}


class _NotifyingSpec(ModuleSpec):
    """A module spec that tells when its module has finished importing.

    The import system sets ``spec._initializing = False`` as its last step; an import that is already under way can
    be followed by no other means.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and value is False and self.name in sys.modules:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            _install(self.name)


class _HostFinder:
    """Meta-path finder that lets the other finders find a host, then marks its spec."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in HOSTS:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is _HostFinder or find is None:
                continue
            spec: ModuleSpec | None = find(name, path, target)
            if spec is not None:
                spec.__class__ = _NotifyingSpec
                return spec
        return None


def autoload() -> None:
    """Arrange for the plugin to be installed into its hosts. Never raises."""
    _never_raise(_arrange)


def _arrange() -> None:
    if os.environ.get(OFF_SWITCH, "").lower() not in ("", "0", "false"):
        return
    for name in HOSTS:
        host = sys.modules.get(name)
        if host is None:
            if _HostFinder not in sys.meta_path:
                sys.meta_path.insert(0, _HostFinder)  # type: ignore[arg-type]
        elif getattr(host.__spec__, "_initializing", False):
            host.__spec__.__class__ = _NotifyingSpec  # type: ignore[union-attr]
        else:
            _install(name)


def _install(host: str) -> None:
    def install() -> None:
        import importlib

        importlib.import_module(HOSTS[host], __package__).install_or_log()

    _never_raise(install)


def _never_raise(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as error:  # an exception here would break every import of a host for everybody
        import warnings

        warnings.warn(f"gptqmodel-eora-ext is not active: {error!r}. {OFF_SWITCH}=1 silences this.", stacklevel=2)
