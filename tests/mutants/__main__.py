"""Makes each mistake of mutants.toml in a copy of the tree, and says which test finds it.

``python -m tests.mutants [--only NAME ...] [--tree DIR] [--whole] [--out FILE]``. The files that a
mutant names run first, and with ``--whole`` all default tests where those do not find it. The exit
status is 1 where a mutant survives or its snippet is not found exactly once.
"""

from __future__ import annotations

import argparse
import compileall
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = "kronecker_probe"
FOLDERS = (PACKAGE, "tests", "analyses", "benchmarks", "docs", "figures")
COPIED = (*FOLDERS, "pyproject.toml", "README.md", "CONTRIBUTING.md")
COLUMNS = ("mutant", "room", "mistake", "outcome", "test")
# A test that a mutant keeps from ending is as good as one that fails.
TIMEOUT = 900


@dataclass(frozen=True)
class Mutant:
    """A mistake: one snippet of the package in place of another.

    Attributes:
        name: Its name.
        room: The folder it is made in.
        mistake: What it is, in words.
        find: Spellings of the snippet, of which exactly one occurs, once.
        replace: What takes its place.
        tests: Names of test files, without "test_" and ".py", that run first.
    """

    name: str
    room: str
    mistake: str
    find: tuple[str, ...]
    replace: str
    tests: tuple[str, ...]

    def place(self, tree: Path) -> tuple[Path, str] | str:
        """The file and the spelling found in it; what is wrong where there is no such one place."""
        places = [
            (path, spelling)
            for path in sorted((tree / PACKAGE).rglob("*.py"))
            for spelling in self.find
            for _ in range(path.read_text().count(spelling))
        ]
        return places[0] if len(places) == 1 else f"its snippet occurs {len(places)} times"


def mutants() -> list[Mutant]:
    """All of mutants.toml."""
    found = []
    for entry in tomllib.loads((HERE / "mutants.toml").read_text())["mutant"]:
        find = entry.pop("find")
        spellings = (find,) if isinstance(find, str) else tuple(find)
        found.append(Mutant(find=spellings, tests=tuple(entry.pop("tests")), **entry))
    return found


def copied(tree: Path, into: Path) -> Path:
    """A copy of what the tests need, compiled."""
    for name in COPIED:
        if (tree / name).is_dir():
            shutil.copytree(tree / name, into / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (tree / name).exists():
            shutil.copy(tree / name, into / name)
    compileall.compile_dir(str(into), quiet=2)
    return into


def run_tests(tree: Path, arguments: list[str]) -> str | None:
    """The first test that fails, "timeout", or None where all pass."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE"]
    command += ["-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode in (0, 5):  # 5: no test was selected
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return found[1] if found else f"pytest exited with {done.returncode}: {done.stdout[-300:]}"


def tried(mutant: Mutant, tree: Path, whole: list[str] | None) -> tuple[str, str]:
    """("killed", test), ("survived", ""), or ("not found", why); the copy is as it was again."""
    place = mutant.place(tree)
    if isinstance(place, str):
        return "not found", place
    path, spelling = place
    text, stat = path.read_text(), path.stat()
    named = [f"tests/test_{name}.py" for name in mutant.tests]
    first = [name for name in named if (tree / name).exists()]
    path.write_text(text.replace(spelling, mutant.replace))
    try:
        test = run_tests(tree, ["-n", "0", *first]) if first else None
        if test is None and whole is not None:
            test = run_tests(tree, whole)
    finally:
        path.write_text(text)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return ("survived", "") if test is None else ("killed", test)


def main() -> int:
    """Run, print a line for each mutant, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--tree", type=Path, default=HERE.parents[1], help="whose code and tests")
    parser.add_argument("--only", nargs="*", default=[], help="names of mutants or rooms")
    parser.add_argument("--whole", action="store_true", help="all default tests for survivors")
    parser.add_argument("--skip", nargs="*", default=[], help="test files that --whole leaves out")
    parser.add_argument("--workers", default="2", help="of --whole")
    parser.add_argument("--find", action="store_true", help="only look for the snippets")
    parser.add_argument("--out", type=Path, help="a CSV file for the results")
    given = parser.parse_args()
    chosen = [m for m in mutants() if not given.only or {m.name, m.room} & set(given.only)]
    if given.find:
        missing = {m.name: place for m in chosen if isinstance(place := m.place(given.tree), str)}
        for name, why in missing.items():
            print(f"{name}: {why}")
        return int(bool(missing))
    ignored = [f"--ignore=tests/test_{name}.py" for name in given.skip]
    whole = ["-n", given.workers, *ignored] if given.whole else None
    rows = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copied(given.tree.resolve(), Path(folder))
        for mutant in chosen:
            outcome, test = tried(mutant, tree, whole)
            rows.append((mutant.name, mutant.room, mutant.mistake, outcome, test))
            print(f"{mutant.room:15} {mutant.name:32} {outcome:10} {test}", flush=True)
            if given.out is not None:
                with given.out.open("w", newline="") as file:
                    csv.writer(file).writerows([COLUMNS, *rows])
        killers = sorted({row[4] for row in rows if "::" in row[4]})
        wrong = run_tests(tree, ["-n", "0", *killers]) if killers else None
    killed = sum(row[3] == "killed" for row in rows)
    print(f"{killed} of {len(rows)} killed")
    if wrong is not None:
        print(f"without any mutant this fails, too, and its kills count for nothing: {wrong}")
    return int(killed < len(rows) or wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
