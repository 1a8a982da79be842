"""Modules that have moved into a room are still found under the names that users import them by."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
else:
    # The same class, without the import of `importlib.machinery`, at the start of every process.
    ModuleSpec = type(sys.__spec__)


class _Moved:
    """Meta-path finder and loader of a package's former module names.

    It stands last, so it is asked only for what nothing else finds.

    Args:
        places: former full name → full name now.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in self._places else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        import importlib
        import warnings

        place = self._places[spec.name]
        warnings.warn(f"{spec.name} is {place} now.", DeprecationWarning, stacklevel=2)
        return importlib.import_module(place)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: the module is imported already."""


def find_under_former_names(package: str, places: Mapping[str, str]) -> None:
    """Have ``import package.former`` give ``package.now``.

    Args:
        package: its full name.
        places: former name → name now, both relative to the package.
    """
    sys.meta_path.append(_Moved({f"{package}.{old}": f"{package}.{new}" for old, new in places.items()}))  # type: ignore[arg-type]
