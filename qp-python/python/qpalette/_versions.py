"""What this package needs of others, checked where they are imported."""

from __future__ import annotations

import re
from importlib import metadata


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def native(package: str, library: str) -> None:
    """The Python files and the native library of one installation have one version."""
    if package != library:
        raise ImportError(
            f"qpalette {package} found the native library of {library}: the installation is mixed; "
            "remove it and install it again (pip install --force-reinstall qpalette)"
        )


def need(module: str, name: str, least: str, extra: str) -> None:
    """Refuses a package that is missing or older than `least`. `module` is the one that needs it."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{module} needs {name} {least} or later: pip install 'qpalette[{extra}]'") from None
    if _numbers(found) < _numbers(least):
        raise ImportError(f"{module} needs {name} {least} or later, found {found}: pip install -U '{name}>={least}'")
