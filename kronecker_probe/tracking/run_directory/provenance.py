"""What a run was made with: versions, machine and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import kronecker_probe

_DISTRIBUTIONS = ("torch", "numpy", "scipy", "pandas", "pyarrow", "matplotlib")
_GIT_TIMEOUT = 5.0  # seconds; a slow file system must not hold up a run


def versions() -> dict[str, str]:
    """Versions of Python, this package and its numerical dependencies, imported or not."""
    found = {"python": platform.python_version(), "kronecker_probe": kronecker_probe.__version__}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # for example torch on a machine that only draws reports
            continue
    return found


def machine() -> dict[str, str]:
    """Operating system, processor and number of cores."""
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count() or "unknown"),
    }


def commit() -> str | None:
    """Full commit hash of the checkout around the working directory, "-dirty" if it has changes.

    None outside of a git checkout, or where git is missing or does not answer.
    """
    # without optional locks, so that looking never writes to the user's repository
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(
            [*command, "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
