"""Several runs of one workload in one directory: its file, its runs and their numbers."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, final

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from kronecker_probe.errors import RunDirectoryError
from kronecker_probe.tracking.run_directory.files import naming, refuse_links, write_atomically
from kronecker_probe.tracking.run_directory.json_file import read_json
from kronecker_probe.tracking.run_directory.store import RunStore

FILE = "comparison.json"
COLUMNS = ("optimizer", "lr", "settings", "step", "parameter", "m", "n", "metric", "value")
# of a row without a parameter
_LOGGED = {"train_loss", "probe_loss", "probe_accuracy", "test_accuracy"}
# of a run's directory: a plain name, no path and no link
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,99}$")]
_Seconds = Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]


@final
@dataclass(frozen=True)
class Timing:
    """How long a run took.

    Attributes:
        seconds: Wall time with probes.
        steps: Number of steps without a probe.
        step_seconds: Wall time of those.
    """

    seconds: float = 0.0
    steps: int = 0
    step_seconds: float = 0.0

    def __add__(self, other: Timing) -> Timing:
        """The time of a run that was interrupted and resumed."""
        return Timing(
            self.seconds + other.seconds,
            self.steps + other.steps,
            self.step_seconds + other.step_seconds,
        )


class _Timing(BaseModel):
    model_config = ConfigDict(extra="forbid")

    seconds: _Seconds = 0.0
    steps: int = Field(default=0, ge=0, le=10**12)
    step_seconds: _Seconds = 0.0


class _Record(BaseModel):
    """What comparison.json holds: the directory of each run, and how long it took."""

    runs: dict[_Name, _Timing] = Field(max_length=1000)


@final
class Comparison:
    """A directory with a run for each of several optimizers, named after them.

    Args:
        path: The directory.
        timings: How long each run took, in the order of the optimizers.
    """

    def __init__(self, path: Path, timings: dict[str, Timing]) -> None:
        self.path = path
        self.timings = timings

    @classmethod
    def open(cls, path: Path) -> Comparison:
        """The comparison in the directory ``path``.

        Raises:
            RunDirectoryError: There is none, its file is damaged, or one of its entries is no plain
                name of a directory in ``path``.
        """
        file = path / FILE
        if not cls.holds(path):
            raise RunDirectoryError(f"No comparison at {path}: it has no {FILE}.")
        record = read_json(file, _Record, f"mend {FILE}, or choose another path for the runs")
        for name in record.runs:
            refuse_links(path / name, path)
        return cls(path, {name: Timing(**dict(one)) for name, one in record.runs.items()})

    @classmethod
    def holds(cls, path: Path) -> bool:
        """Whether ``path`` has the file of a comparison, in whatever state."""
        return os.path.lexists(path / FILE)

    def save(self) -> None:
        """Write comparison.json.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        with naming("create", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        runs = {name: asdict(timing) for name, timing in self.timings.items()}
        write_atomically(
            self.path / FILE, json.dumps({"runs": runs}, indent=1).encode(), inside=self.path
        )

    def stores(self) -> dict[str, RunStore]:
        """The runs that were started."""
        paths = {name: self.path / name for name in self.timings}
        started = {name for name, path in paths.items() if os.path.lexists(path / "run.json")}
        return {name: RunStore.open(path) for name, path in paths.items() if name in started}

    def table(self) -> pd.DataFrame:
        """Losses, accuracies and cosines to H of all runs, one row per number.

        Returns:
            The columns of :data:`COLUMNS`: optimizer, its learning rate and settings as text, step,
            parameter, its shape m and n, metric and value. "in_use_cosine" is that of the
            preconditioner in use, "rule_cosine" that of the rule which the optimizer follows,
            fresh, undamped and not cut into blocks, "optimal_cosine" that of the best Kronecker
            product. Cosines are those of the sample.
        """
        parts = [
            _numbers(store.read(strict=False)).assign(
                optimizer=name, lr=rates_shown(store), settings=settings_shown(store)
            )[[*COLUMNS]]
            for name, store in self.stores().items()
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*COLUMNS])


def rates_shown(store: RunStore) -> str:
    """The learning rates with which a run started; of older runs, the rate that was asked for."""
    asked = store.config.get("lr")
    rates = store.record.get("learning_rates") or ([] if asked is None else [asked])
    return ", ".join(_rate(rate) for rate in rates) or "default"


def _rate(value: object) -> str:
    """A learning rate; what a user's own config holds under "lr" may be anything."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def settings_shown(store: RunStore) -> str:
    """The settings of a run's optimizer, "" without any."""
    given = store.config.get("settings") or ()
    return ", ".join(map(str, given)) if isinstance(given, list | tuple) else str(given)


def _numbers(table: pd.DataFrame) -> pd.DataFrame:
    logged = table[table["parameter"].isna() & table["metric"].isin(_LOGGED)]
    cosines = table[(table["metric"] == "cosine") & (table["kind"] == "plugin")]
    in_use, optimal = (
        cosines[cosines["approximation"] == name].assign(metric=metric)
        for name, metric in (("in-use", "in_use_cosine"), ("optimal", "optimal_cosine"))
    )
    rule = table[table["metric"] == "in_use_fresh"]
    # 1 - cos^2 of a rule whose factors are positive, as its cosine with H is
    fresh = (1.0 - rule["value"]).clip(lower=0.0).pow(0.5)
    rule = rule.assign(metric="rule_cosine", value=fresh)
    rows = pd.concat([logged, in_use, rule, optimal], ignore_index=True)
    return rows[rows["value"].notna()]
