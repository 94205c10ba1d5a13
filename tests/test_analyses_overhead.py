"""What optimizers cost: the split adds up and changes nothing, and sentences follow the table."""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from analyses import overhead
from analyses.overhead import steps as steps
from analyses.overhead import tables as tables
from kronecker_probe import optim
from kronecker_probe.cli.app import app

pytestmark = pytest.mark.figures

CPU = torch.device("cpu")
# sums of a few float64 numbers
SUM = 1e-9
# numbers in the kept table have six decimals
KEPT = 1e-4
MODEL, OTHER = steps.PROBLEMS
# made-up milliseconds: what a plain step takes in each part, and a refresh
PLAIN = {"statistics": 2.0, "refresh": 0.0, "application": 3.0, "other": 1.0}
REFRESH, PASS, UPDATE = 40.0, 98.0, 2.0


def gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 8), (8, 8), (8,))
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def made_up(sizes: dict[str, tuple[int, ...]]) -> pd.DataFrame:
    """Passes grow with the batch, AdamW's step is 100 ms at its reference; blocks halve parts."""
    rows = []
    for model, batches in sizes.items():
        for size, method in itertools.product(batches, (steps.ADAMW, "Shampoo", "Muon")):
            scale = size / steps.PROBLEMS[model].reference
            knobs = (0, 64) if method == "Shampoo" and scale == 1 else (0,)
            shared = {"seed": 0, "model": model, "batch_size": size, "optimizer": method}
            for block, kind in itertools.product(knobs, ("plain", "refresh")):
                parts = {"update": UPDATE} if method == steps.ADAMW else dict(PLAIN)
                if kind == "refresh" and method == "Shampoo":
                    parts["refresh"] = REFRESH
                parts = {name: value / (2 if block else 1) for name, value in parts.items()}
                rows += [
                    shared | {"block_size": block, "step": kind, "measured": name, "value": value}
                    for name, value in ({"forward_backward": PASS * scale} | parts).items()
                ]
            if scale == 1:
                own = {steps.ADAMW: 2.0, "Shampoo": 10.0, "Muon": 6.0}[method]
                rows.append(
                    shared | {"block_size": 0, "step": "direct", "measured": "step",
                              "interval": tables.USUAL, "value": PASS + own}
                )  # fmt: skip
    measured = pd.DataFrame(rows)
    table = pd.concat([measured.assign(unit="ms"), tables.drawn(measured, (1, 10, 100))])
    return table.assign(machine="an abacus")


@pytest.fixture(scope="module")
def synthetic() -> pd.DataFrame:
    return made_up({MODEL: (256, 1024, 4096), OTHER: (4, 16)})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller models and batches."""
    for name, build, width in (
        (MODEL, lambda: nn.Linear(96, 10), 96), (OTHER, lambda: steps.GPT(32), 0),
    ):  # fmt: skip
        usual = steps.PROBLEMS[name]
        data = (lambda B: (torch.randn(B, 96), torch.randint(10, (B,)))) if width else usual.data
        less = steps.Problem(build, data, (2, 4), 4, usual.unit)
        monkeypatch.setitem(steps.PROBLEMS, name, less)


@pytest.fixture
def short(small: None, request: pytest.FixtureRequest) -> pd.DataFrame:
    """Measured once."""
    kept = request.module.__dict__
    if "_short" not in kept:
        preset = overhead.Preset(1, slice(None), (64,), (1, 10, 100), 2)
        kept["_short"] = overhead.collect(preset)
    return kept["_short"]


@pytest.mark.parametrize("name", steps.METHODS)
def test_timers_leave_the_weights_as_they_are(name: str) -> None:
    runs = []
    for timed in (True, False):
        params = parameters()
        optimizer = steps.build((name, 4), params, 3)
        for step in range(7):
            gradients(params, step)
            given = [param.grad.clone() for param in params if param.grad is not None]
            if timed:
                steps.timed_step(optimizer, CPU)
            else:
                optimizer.step()
            # which all optimizers share
            assert all(torch.equal(p.grad, g) for p, g in zip(params, given, strict=True))
        runs.append([param.detach() for param in params])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(runs[0], parameters(), strict=True))


@pytest.mark.parametrize("preset", optim.PRESETS.values(), ids=list(optim.PRESETS))
def test_parts_make_up_the_whole_step(preset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks once a reading, time is the number of readings: it is exact."""
    ticks = itertools.count()
    monkeypatch.setattr(steps.time, "perf_counter", lambda: 1e-3 * next(ticks))
    params = parameters()
    optimizer = preset(params)
    for step in range(2):
        gradients(params, step)
        before = next(ticks)
        spent = steps.timed_step(optimizer, CPU)
        whole = next(ticks) - before - 2  # between the first reading and the last
        assert set(spent) == set(steps.PARTS)
        assert sum(spent.values()) == pytest.approx(whole, abs=SUM)
        # a call takes one tick, and as many pass between calls; nested ones do not count again
        assert all(value > 0 for part, value in spent.items() if part != "refresh")
        calls = sum(value for part, value in spent.items() if part != "other")
        assert spent["other"] == pytest.approx(calls + 1, abs=SUM)


def test_what_is_not_covered_is_little_of_a_step_that_has_work_to_do() -> None:
    params = [nn.Parameter(torch.randn(384, 384))]
    params[0].grad = torch.randn(384, 384)
    optimizer = steps.build(("Shampoo", 0), params, 1)
    shares = []
    for _ in range(3):
        spent = steps.timed_step(optimizer, CPU)
        shares.append(spent["other"] / sum(spent.values()))
    assert 0 <= min(shares) < 0.1


def test_the_functions_are_put_back_even_after_an_error() -> None:
    before = [vars(owner)[name] for owner, name, _ in steps.covered()]
    with steps.split(CPU):
        inside = [vars(owner)[name] for owner, name, _ in steps.covered()]
    assert not set(inside) & set(before)
    with pytest.raises(RuntimeError, match="stop"), steps.split(CPU):
        raise RuntimeError("stop")
    assert [vars(owner)[name] for owner, name, _ in steps.covered()] == before


def test_a_refresh_is_a_part_of_refresh_steps_alone() -> None:
    params = [nn.Parameter(torch.randn(256, 256))]
    params[0].grad = torch.randn(256, 256)
    optimizer = steps.build(("SOAP", 0), params, 3)
    spent = [steps.timed_step(optimizer, CPU)["refresh"] for _ in range(7)]
    others = [value for step, value in enumerate(spent) if step % 3]
    assert statistics.median(spent[0::3]) > 3 * statistics.median(others)


def test_block_sizes_change_the_blocks() -> None:
    blocks = {}
    for size in (0, 64, 128):
        model, run = steps.posed(MODEL, 2, 0, CPU)
        run()
        optimizer: Any = steps.build(("Shampoo", size), list(model.parameters()), 1)
        optimizer.step()
        weight = next(model.parameters())
        held = optimizer.state[weight].items()
        blocks[size] = sum(len(roots) for key, roots in held if key.endswith("root_0"))
    # 512 x 784: whole; 8 x 12 blocks of 64 and 8 x 1 of what remains; 4 x 6 of 128 and 4
    assert blocks == {0: 1, 64: 8 * 13, 128: 4 * 7}


@pytest.mark.parametrize("name", steps.PROBLEMS)
def test_models_see_their_batch(name: str) -> None:
    model, run = steps.posed(name, 3, 0, CPU)
    run()
    first = [param.grad.clone() for param in model.parameters() if param.grad is not None]
    assert len(first) == len(list(model.parameters()))
    run()  # anew, not on top
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), first, strict=True))


def test_the_gpt_is_causal() -> None:
    torch.manual_seed(0)
    model = steps.GPT()
    tokens = torch.randint(256, (1, steps.LENGTH))
    changed = tokens.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 256
    one, other = model(tokens), model(changed)
    torch.testing.assert_close(one[:, :40], other[:, :40])
    assert not torch.allclose(one[:, 40:], other[:, 40:])


@pytest.mark.parametrize("interval", [1, 2, 10, 1000])
def test_a_mean_step_is_that_of_a_whole_interval(synthetic: pd.DataFrame, interval: int) -> None:
    mean = tables.amortized(synthetic[synthetic["unit"] == "ms"], interval)
    steps = [PLAIN] * (interval - 1) + [PLAIN | {"refresh": REFRESH}]
    expected = {part: sum(step[part] for step in steps) / interval for part in PLAIN}
    found = mean.loc[(0, MODEL, 1024, "Shampoo", 0)]
    for part, value in expected.items():
        assert found[part] == pytest.approx(value, abs=SUM)
    assert found["forward_backward"] == pytest.approx(PASS)
    # no interval changes what never refreshes
    assert mean.loc[(0, MODEL, 1024, "Muon", 0), "refresh"] == 0


def test_overheads_are_over_the_whole_step_of_adamw(synthetic: pd.DataFrame) -> None:
    found = tables.percents(synthetic)
    # (98 + 6 + 40 / F) ms against 98 + 2
    for F, expected in ((1, 44.0), (10, 8.0), (100, 4.4)):
        assert found[MODEL, "Shampoo", 0, F, "overhead", 1024] == pytest.approx(expected)
    assert found[MODEL, "Shampoo", 64, 10, "overhead", 1024] == pytest.approx(3.0)
    # a quarter of the batch has a quarter of the pass: (24.5 + 10) / 26.5
    assert found[MODEL, "Shampoo", 0, 10, "overhead", 256] == pytest.approx(100 * 8 / 26.5)
    assert found[MODEL, steps.ADAMW, 0, 10, "overhead", 256] == pytest.approx(0, abs=SUM)
    direct = tables.percents(synthetic, "direct")
    assert direct[MODEL, "Muon", 0, 10, "overhead", 1024] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("curve", "start"),
    [
        ({1: 50.0, 2: 10.0, 4: 3.0}, 2),
        ({4: 3.0, 1: 50.0, 2: 10.1}, 4),
        ({1: 9.0, 2: 12.0, 4: 9.0}, 4),  # once is not from there on
        ({1: 9.0, 2: 8.0}, 1),
        ({1: 9.0, 2: 10.5}, None),
    ],
)
def test_ten_percent_holds_from_a_batch_on(curve: dict[int, float], start: int | None) -> None:
    assert tables.holds_from(pd.Series(curve)) == start


def test_the_title_is_computed(synthetic: pd.DataFrame) -> None:
    title, first, _, check = overhead.sentences(synthetic)
    assert "MLP (batches of vectors): Shampoo and Muon from 1024 on" in title
    assert "GPT (batches of sequences of 64): Shampoo and Muon from 16 on" in title
    assert "block_size 64 (MLP: 8% to 3%)" in title  # F = 100 leaves 4.4%
    assert "Shampoo 8% (statistics 2, refresh 4, application 3, other 1)" in first
    assert "other 1), 3% with block_size 64, 1% with blocks and F = 100; Muon 4%" in first
    assert "1.00 to 1.00" in check
    none = made_up({MODEL: (256, 1024), OTHER: (4, 16)})
    none.loc[none["measured"].eq("overhead") & none["optimizer"].eq("Shampoo"), "value"] += 30
    assert (
        "MLP (batches of vectors): Muon from 1024 on, not up to 1024 (Shampoo 38%)"
        in (overhead.sentences(none)[0])
    )


def test_every_setting_is_measured(short: pd.DataFrame) -> None:
    parts = short[(short["unit"] == "ms") & (short["step"] != "direct")]
    for (model, size), rows in parts.groupby(["model", "batch_size"]):
        keys = set(zip(rows["optimizer"], rows["block_size"], strict=True))
        expected = {(name, 0) for name in (steps.ADAMW, *steps.METHODS)}
        if size == 4:
            expected |= {(n, 64) for n, one in steps.METHODS.items() if one.knobs}
        assert keys == expected, model
        assert rows.loc[rows["measured"] == "forward_backward", "value"].nunique() == 1
    assert (parts["value"] >= 0).all()
    assert short["machine"].nunique() == 1
    assert "(cpu), CPU threads: 1" in short["machine"].iloc[0]


def test_stacks_reach_the_overhead(short: pd.DataFrame) -> None:
    """At one seed the parts that are drawn on top of each other end at 100 + overhead."""
    rows = short[(short["unit"] == "percent") & (short["step"] == "mean")]
    wide = rows.set_index([*tables.SETTING, "interval", "measured"])["value"].unstack()
    stacks = wide.drop(columns="overhead").sum(axis=1)
    assert (stacks - 100 - wide["overhead"]).abs().max() < KEPT


def test_the_measured_interval_is_what_the_parts_add_up_to(short: pd.DataFrame) -> None:
    """Others may run beside this test, so within a factor, and for most."""
    times = short[short["unit"] == "ms"]
    direct = times[times["step"] == "direct"].set_index(tables.SETTING)["value"]
    assert len(direct) == 2 * (1 + len(steps.METHODS))
    parts = tables.amortized(times, tables.USUAL).sum(axis=1).reindex(direct.index)
    assert 0.5 < (direct / parts).median() < 2


@pytest.mark.parametrize("which", ["synthetic", "short"])
def test_the_figure_says_the_conclusion(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    table = request.getfixturevalue(which)
    figure = overhead.draw(table)
    sentences = overhead.sentences(table)
    assert len(figure.axes) == 6
    assert all(ax.get_title(loc="left") for ax in figure.axes)
    assert re.sub(r"\s+", " ", figure.get_suptitle()) == sentences[0]
    assert "nan" not in " ".join(sentences)
    assert table["machine"].iloc[0] in figure.get_supxlabel()
    overhead.SCRIPT.save(figure, tmp_path / "overhead")
    assert (tmp_path / "overhead.png").stat().st_size > 10_000


def test_the_device_and_threads_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def stop(preset: overhead.Preset) -> pd.DataFrame:
        asked.append((preset.device, preset.threads, preset.cycles))
        raise KeyboardInterrupt

    monkeypatch.setattr(overhead, "SCRIPT", dataclasses.replace(overhead.SCRIPT, collect=stop))

    def run(*more: str) -> None:
        arguments = ["overhead.py", "--preset", "quick", "--out", str(tmp_path), *more]
        monkeypatch.setattr("sys.argv", arguments)
        overhead.main()

    for more in ([], ["--device", "meta", "--threads", "2"]):
        with pytest.raises(KeyboardInterrupt):
            run(*more)
    assert asked == [("cpu", 1, 1), ("meta", 2, 1)]
    for more, named in ((["--device", "abacus"], "abacus"), (["--threads", "0"], "--threads 0")):
        with pytest.raises(SystemExit):
            run(*more)
        assert named in capsys.readouterr().err


def test_the_command_line_knows_it() -> None:
    told = CliRunner().invoke(app, ["analyze", "nothing-of-that-name"])
    assert told.exit_code != 0
    assert "overhead" in told.output
