"""Prints constraints that pin each direct dependency to the lowest version that pyproject allows.

torch keeps the version of constraints.txt, because older builds may bring gigabytes of CUDA.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
direct = project["dependencies"] + project["optional-dependencies"]["test"]
for requirement in direct:
    name, version = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement).groups()
    if name != "torch":
        print(f"{name}=={version}")
print(re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0])
