"""Imports the user's code that ``--plugin`` names, which registers what it adds; no torch."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from kronecker_probe.errors import InvalidInputError


def load_plugins(given: Sequence[str] | None) -> None:
    """Import modules by name ("package.module") or by file ("folder/mine.py"), each once.

    Names are found as by Python itself, and in the working directory.

    Raises:
        InvalidInputError: There is no such module or file, or importing it raises.
    """
    for plugin in given or ():
        try:
            if plugin.endswith(".py"):
                _import_file(Path(plugin))
            else:
                _import_name(plugin)
        except InvalidInputError as error:
            raise InvalidInputError(f"--plugin {plugin}: {error}") from error
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise InvalidInputError(
                f"--plugin {plugin} raised {type(error).__name__}: {error} "
                f"({where.filename}, line {where.lineno})."
            ) from error


def _import_file(file: Path) -> None:
    name, path = file.stem, file.resolve()
    if not path.is_file():
        raise InvalidInputError("there is no such file; give a Python file or a module's name.")
    known = sys.modules.get(name)
    if known is not None:
        if _file_of(known) == path:
            return
        raise InvalidInputError(f"a module {name!r} was imported from elsewhere; rename the file.")
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).resolve()


def _import_name(name: str) -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the user's module exists and misses an import of its own
        raise InvalidInputError(
            f"no module {name!r} among the installed packages and in {here}; give a module's name "
            "or a file that ends in .py."
        ) from error
