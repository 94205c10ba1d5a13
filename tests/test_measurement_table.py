"""The measurement table as a contract: codes, columns, old parts, and notes that no code reads."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError
from kronecker_probe.findings.diagnose import diagnose
from kronecker_probe.plots.run import plot_ladder, plot_trajectory
from kronecker_probe.report.run_page import write_report
from kronecker_probe.table import schema
from kronecker_probe.table.codes import Interval, ReasonCode
from kronecker_probe.table.columns import COLUMNS

mpl.use("Agg")
OLD_RUN = Path(__file__).parent / "stored_runs" / "version-1"
DOCUMENT = Path(__file__).parents[1] / "docs" / "measurement-table.md"
ADDED = ["interval", "copies", "rule", "block_size", "epsilon", "reason"]


def trained(steps: int = 4) -> kp.Tracker:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3))
    optimizer = kp.optim.Shampoo(model.parameters(), lr=1e-2, basis={"frequency": 2})
    loss = nn.CrossEntropyLoss()
    inputs, labels = torch.randint(0, 9, (64, 2)), torch.randint(0, 3, (64,))
    inputs[1], labels[1] = inputs[0], labels[0]
    tracker = kp.Tracker(model, loss, optimizer=optimizer, every=1, probe=(inputs, labels),
                         layers="*weight")  # fmt: skip
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(inputs[:16]), labels[:16]).backward()
        tracker.log(train_loss=1.0)
        tracker.step()
        optimizer.step()
    return tracker


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return trained().table


# ---------------------------------------------------------------- codes


def test_what_is_undefined_has_a_reason_and_what_is_defined_has_none(table: pd.DataFrame) -> None:
    scored = table[table["approximation"].notna()]
    assert scored["value"].isna().any()
    assert (scored["value"].isna() == scored["reason"].notna()).all()


def test_reasons_are_those_that_the_code_names(table: pd.DataFrame) -> None:
    kfac = table[(table["approximation"] == "kfac") & (table["parameter"] == "0.weight")]
    assert set(kfac["reason"]) == {ReasonCode.NO_FACTORS}
    first = table[(table["approximation"] == "in-use") & (table["step"] == 0)]
    assert set(first["reason"]) == {ReasonCode.NO_PRECONDITIONER}
    skipped = table[table["metric"] == "skipped"].set_index("parameter")["reason"]
    assert set(skipped) == {ReasonCode.NOT_SELECTED}


def test_few_examples_and_zero_gradients_have_their_codes() -> None:
    few = kp.compare(kp.GradientSamples.from_matrices(torch.randn(9, 3, 4)), "optimal").table
    population = few[(few["kind"] == "population") & few["approximation"].notna()]
    assert set(population["reason"]) == {ReasonCode.FEW_EXAMPLES}
    nothing = kp.compare(kp.GradientSamples.from_matrices(torch.zeros(40, 3, 4)), "optimal").table
    assert set(nothing.loc[nothing["approximation"].notna(), "reason"]) == {ReasonCode.ZERO}


def test_copies_rule_and_intervals_have_columns(table: pd.DataFrame) -> None:
    norms = table[(table["metric"] == "norm") & (table["kind"] == "population")]
    assert (norms["copies"] >= 2).all()
    rules = table[table["metric"] == "in_use_rule"]
    assert set(rules["rule"]) == {"shampoo"}
    assert (rules["epsilon"] > 0).all()
    ends = table["low"].notna()
    assert (table["interval"].notna() == ends).all()
    confident = table["interval"] == Interval.CONFIDENCE
    assert (table.loc[ends, "stderr"].notna() == confident[ends]).all()


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("kind", "plug-in", "kind has 'plug-in', not one of held-out, plugin, population"),
        ("reason", "because", "reason has 'because'"),
        ("stderr", -0.1, "stderr has -0.1, below 0"),
        ("n_eff", -1.0, "n_eff has -1.0, below 0"),
        ("low", 2.0, "low is above high"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(
    table: pd.DataFrame, column: str, value: object, named: str
) -> None:
    rows = table[table["high"].notna()].head(1).assign(**{column: value})
    with pytest.raises(InvalidInputError, match=named):
        schema.to_parquet(rows, 0)


# ---------------------------------------------------------------- notes


def test_no_judgement_and_no_figure_reads_a_note(table: pd.DataFrame, tmp_path: Path) -> None:
    reworded = table.assign(note=table["note"].where(table["note"].isna(), "other words"))
    pages = []
    for number, one in enumerate((table, reworded)):
        found = diagnose(one)
        axes = [*plot_trajectory(one), *plot_ladder(one)]
        lines = [(ax.get_title(), [line.get_xydata().tolist() for line in ax.lines]) for ax in axes]
        store = kp.RunStore.create(tmp_path / str(number), {})
        for step, part in one.groupby("step"):
            store.write_part(int(step), part)
        page = write_report(store.path).report.read_text(encoding="utf-8")
        tags = [page.count(f"<{tag}") for tag in ("table", "tr", "h2", "svg", "h3")]
        judged = [(f.code, f.level, f.parameter, dict(f.evidence), f.remedy) for f in found]
        pages.append((repr(judged), repr(lines), tags))
    assert pages[0] == pages[1]
    assert len(pages[0][0]) > 200


# ---------------------------------------------------------------- parts of before


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD_RUN, tmp_path / "old"))


def test_a_run_of_version_1_reads_in_todays_columns(tmp_path: Path) -> None:
    table = kp.RunStore.open(copied(tmp_path)).read()
    assert list(table) == [column.name for column in COLUMNS]
    assert set(table["target"].dropna()) == {"ggn"}
    assert set(table["n_examples"].dropna()) == {32}
    in_use = table[(table["approximation"] == "in-use") & (table["metric"] == "cosine")]
    assert in_use.groupby("step")["value"].count().to_dict() == {0: 0, 5: 0, 20: 5}
    absent = in_use.loc[in_use["value"].isna() & (in_use["step"] < 20), "reason"]
    assert set(absent) == {ReasonCode.NO_PRECONDITIONER}
    assert "in_use_staleness" in set(table["metric"])
    assert not table["metric"].str.startswith("live").any()
    assert set(table.loc[table["metric"] == "in_use_rule", "rule"]) == {"shampoo"}
    scored = table[table["approximation"].notna()]
    assert (scored["value"].isna() == scored["reason"].notna()).all()
    assert ReasonCode.FEW_EXAMPLES in set(table["reason"])


def test_the_numbers_of_a_run_of_version_1_are_as_they_were_stored(tmp_path: Path) -> None:
    run = copied(tmp_path)
    stored = pd.concat(
        [pd.read_parquet(part) for part in sorted((run / "measurements").iterdir())]
    ).sort_values("step", kind="stable", ignore_index=True)
    table = kp.RunStore.open(run).read()
    for column in ("step", "parameter", "m", "n", "index", "value", "stderr", "low", "high"):
        pd.testing.assert_series_equal(
            table[column].astype("object").fillna(math.nan),
            stored[column].astype("object").fillna(math.nan),
        )


def test_a_part_of_version_0_reads_with_nulls(tmp_path: Path) -> None:
    run = copied(tmp_path)
    for part in (run / "measurements").iterdir():
        old = pq.read_table(part).drop_columns(["stderr", "low", "high", "n_eff"])
        pq.write_table(old, part)
    table = kp.RunStore.open(run).read()
    assert table[["stderr", "low", "high", "n_eff", "interval"]].isna().all(axis=None)
    assert table["value"].notna().any()


def test_a_run_of_version_1_is_reported_and_gains_parts_of_today(tmp_path: Path) -> None:
    run = copied(tmp_path)
    store = kp.RunStore.open(run)
    more = store.read().query("step == 20").assign(step=30)
    store.write_part(30, more)
    assert store.steps() == [0, 5, 20, 30]
    page = write_report(run).report.read_text(encoding="utf-8")
    assert "0.weight" in page


def test_a_part_of_a_later_version_is_named_with_the_remedy(table: pd.DataFrame) -> None:
    data = schema.to_parquet(table[table["step"] == 0], 0)
    part = pq.read_table(pa.BufferReader(data))
    metadata = part.schema.metadata | {b"kronecker_probe.schema": b"3"}
    sink = pa.BufferOutputStream()
    pq.write_table(part.replace_schema_metadata(metadata), sink)
    with pytest.raises(ValueError, match=r"version 3 .* reads up to 2: install a newer"):
        schema.from_parquet(sink.getvalue().to_pybytes(), 0)


# ---------------------------------------------------------------- documentation


def documented() -> str:
    lines = [
        "# The measurement table", "",
        "`kp.compare(...).table`, `Tracker.table` and the parts of a run directory have these "
        "columns; a table of", "`kp.compare` has no `step`. Renew this page by "
        "`REGENERATE_GOLDEN=1 pytest tests/test_measurement_table.py`.", "",
        "| column | type | what it is | codes |", "|---|---|---|---|",
    ]  # fmt: skip
    for column in COLUMNS:
        codes = ", ".join(f"`{code}`" for code in sorted(column.codes or ()))
        codes = "below" if column.name == "reason" else codes
        lines.append(f"| `{column.name}` | {column.dtype} | {column.about} | {codes} |")
    lines += ["", "## Reasons", "", "| `reason` | meaning |", "|---|---|"]
    lines += [f"| `{code}` | {code.about} |" for code in ReasonCode]
    lines += ["", "## Intervals", "", "| `interval` | `low` and `high` are |", "|---|---|"]
    lines += [f"| `{code}` | {code.about} |" for code in Interval]
    return "\n".join(lines) + "\n"


def test_the_documentation_lists_every_column_and_code() -> None:
    if os.environ.get("REGENERATE_GOLDEN"):
        DOCUMENT.write_text(documented(), encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == documented()
