"""What do grafting and corrected eigenvalues repair in Shampoo, and when is a basis worth renewing?

Every member of the family rotates the gradient, divides it entrywise and rotates it back, so that
eigenvalues alone decide the length of the step, and bases its direction (Eschenhagen et al., 2025,
arXiv 2506.03595). Three measurements:

- ``magnitude``: gradients are white noise, of which every optimizer gets the same. The root mean
  square of an update of a fresh gradient, after factors of so many that they are well determined,
  is 1 for full-matrix Adam, (mn)^-1/4 for Shampoo, and (mn)^-1/2 for its square without the trace.
- ``drift``: EShampoo trains a network on ten digits. Others get its gradients and never move
  it: Shampoo and EShampoo with refreshes 100 steps apart, and both renewed in every step. Until
  the next refresh the error |P - H| / |H| is split exactly into that of the basis and that of the
  eigenvalues, and the updates are compared with those of EShampoo that is renewed in every step.
  H is H_Ada, the average of g g^T with the optimizers' beta2. A grafted update s P^-1/2 M is that
  of P / s^2, which is scored as such.
- ``refresh``: EShampoo trains the network with bases that are renewed at fixed intervals, or when
  their off-diagonal mass exceeds a tolerance, which is tested every ten steps for each factor. The
  loss is that of all training data after the last step, at the best of a few learning rates, the
  same for each rule; the seconds are those of the optimizer's steps in CPU time of one thread.

The table (purifying.csv) has one number a row: a ``part``, what was ``measured``, the ``variant``,
and whatever else the part varies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.progress import track
from torch import Tensor

import kronecker_probe as kp
from kronecker_probe import optim
from kronecker_probe.panels import GREY, Panels, Style, log_axis, name_axes
from kronecker_probe.scripts import Script
from kronecker_probe.workloads import Workload, load_workload

NAME, WORKLOAD = "purifying", "digits-mlp"
BETAS, WINDOW = (0.9, 0.99), 500
TESTED = 10  # steps from one test of the tolerance to the next

Row = dict[str, Any]
Build = Callable[..., optim.KroneckerOptimizer]


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        seeds: Seeds 0, 1, ... of model, batches and noise.
        shapes: Of the white noise.
        samples: Gradients for the factors, times the larger of m / n and n / m.
        interval: Steps from one refresh of the held bases to the next.
        cycles: Refreshes after which the drift is measured.
        ages: Steps since the refresh.
        steps: Training with fixed intervals and tolerances.
        rates: Learning rates of that.
        intervals: Steps from one refresh to the next.
        tolerances: Of the off-diagonal mass.
    """

    seeds: int
    shapes: tuple[tuple[int, int], ...]
    samples: int
    interval: int
    cycles: int
    ages: tuple[int, ...]
    steps: int
    rates: tuple[float, ...]
    intervals: tuple[int, ...] = (1, 10, 100)
    tolerances: tuple[float, ...] = (0.01, 0.1, 0.5)


SHAPES = ((8, 8), (16, 16), (64, 16), (16, 64), (64, 64), (256, 64), (256, 16), (128, 128),
          (16, 256), (256, 256))  # fmt: skip
PRESETS = {
    "quick": Preset(1, SHAPES[:7], 50, 100, 1, (0, 5, 20, 99), 150, (3e-3, 1e-2)),
    "default": Preset(
        3, SHAPES, 100, 100, 3, (0, 1, 2, 5, 10, 20, 50, 99), 300, (1e-3, 3e-3, 1e-2)
    ),
}

SQUARE = {"trace_scale": False, "exponent": -0.5}
UNGRAFTED = {"magnitude": {"grafting": "none"}}
# On white noise: the preset, its options, and the power of mn that theory gives its update.
MAGNITUDES: dict[str, tuple[Build, dict[str, Any], float]] = {
    "EShampoo": (optim.EShampoo, {}, 0.0),
    "Shampoo, Adam grafting": (optim.Shampoo, {}, 0.0),
    "Shampoo², trace scaled": (optim.ShampooSquared, {}, 0.0),
    "Shampoo": (optim.Shampoo, UNGRAFTED, -0.25),
    "Shampoo², no trace": (optim.ShampooSquared, {"spectrum": SQUARE}, -0.5),
}
GRAFTED, REFERENCE = "Shampoo, Adam grafting", "EShampoo, renewed every step"
ALWAYS = {"frequency": 1}
# What gets the gradients of the training: the preset, and what is changed in its basis and else.
FOLLOWERS: dict[str, tuple[Build, dict[str, Any], dict[str, Any]]] = {
    "Shampoo": (optim.Shampoo, {}, UNGRAFTED),
    GRAFTED: (optim.Shampoo, {}, {}),
    "EShampoo": (optim.EShampoo, {}, {}),
    "EShampoo, marginals matched": (optim.EShampoo, {"marginals": True}, {}),
    "Shampoo, renewed every step": (optim.Shampoo, ALWAYS, UNGRAFTED),
    # with second moments that follow the bases, as these turn in every step
    REFERENCE: (optim.EShampoo, ALWAYS | {"carry": "transport"}, {}),
}
# Okabe and Ito's colours, with markers and lines that differ, too
LOOKS = {
    "EShampoo": Style("#0072b2", "o", "-"),
    "Shampoo, Adam grafting": Style("#009e73", "s", (0, (5, 2))),
    "Shampoo², trace scaled": Style("#cc79a7", "D", "-"),
    "Shampoo": Style("#d55e00", "^", "-"),
    "Shampoo², no trace": Style("#e69f00", "v", "-"),
    "EShampoo, marginals matched": Style("#56b4e9", "X", (0, (3, 1))),
    "Shampoo, renewed every step": Style("#000000", "_", (0, (1, 1))),
    REFERENCE: Style(GREY, "|", (0, (3, 1, 1, 1))),
    "interval": Style("#d55e00", "^", "-"),
    "tolerance": Style("#0072b2", "o", "-"),
}


DRIFTS = {
    "basis_ratio": ("basis error: only a refresh repairs it", "beside that of renewed bases"),
    "eigenvalue_error": ("eigenvalue error: correction repairs it", "|diag(QᵀHQ) − D| / |H|"),
    "length": ("length of steps: grafting repairs it", "beside EShampoo renewed"),
    "cosine": ("direction: grafting leaves it", "cosine to EShampoo renewed"),
}
# grafting has the bases and directions of Shampoo, whose bases are those of EShampoo
SHOWN = {
    "basis_ratio": ("EShampoo", REFERENCE),
    "cosine": ("Shampoo", "EShampoo", "EShampoo, marginals matched"),
}
RULES = {
    "loss": ("loss after training", "training loss"),
    "seconds": ("CPU time of the optimizer", "seconds"),
}
# text, offset in points and rotation
LABELS: dict[str, tuple[str, tuple[int, int], int]] = {
    "interval": ("F = {:g}", (4, -8), 0),
    "tolerance": ("τ = {:g}", (-3, 6), 60),
}


def collect(preset: Preset) -> pd.DataFrame:
    """The table: all three parts, one number a row."""
    rows: list[Row] = []
    for seed in track(range(preset.seeds), description="seeds"):
        for name, part in (("magnitude", magnitude), ("drift", drift), ("refresh", refresh)):
            rows += ({"part": name, "seed": seed} | row for row in part(seed, preset))
    return pd.DataFrame(rows)


def magnitude(seed: int, preset: Preset) -> Iterator[Row]:
    """Root mean squares of updates of white noise."""
    generator = torch.Generator().manual_seed(seed)
    for m, n in preset.shapes:
        count = preset.samples * max(m, n) // min(m, n)
        options = {"betas": (0.0, 1 - 1e-6), "basis": {"frequency": count, "start": count}}
        params = {name: torch.zeros(m, n, requires_grad=True) for name in MAGNITUDES}
        optimizers = {
            name: build([params[name]], lr=0.0, **(options | more))
            for name, (build, more, _) in MAGNITUDES.items()
        }
        for number in range(count + 1):
            noise = torch.randn(m, n, generator=generator)
            for name, optimizer in optimizers.items():
                params[name].grad = noise
                # the last one is none of those that the factors are of
                optimizer.param_groups[0]["lr"] = float(number == count)
                optimizer.step()
        for name, param in params.items():
            size = float(param.detach().square().mean().sqrt())
            yield {"measured": "rms", "variant": name, "m": m, "n": n, "value": size}


class Follower:
    """An optimizer that gets the gradients of another run, and whose updates are read."""

    def __init__(self, name: str, model: torch.nn.Module, interval: int) -> None:
        self.params = {
            name: torch.zeros_like(p, requires_grad=True)
            for name, p in model.named_parameters()
            if p.ndim > 1
        }
        build, basis, more = FOLLOWERS[name]
        basis = {"frequency": interval, "start": 1} | basis
        self.optimizer = build(self.params.items(), lr=1.0, betas=BETAS, basis=basis, **more)

    def updates(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """What it would subtract from each weight now, at a learning rate of 1."""
        for name, param in self.params.items():
            param.grad = model.get_parameter(name).grad
            param.data.zero_()
        self.optimizer.step()
        return {name: -param.detach() for name, param in self.params.items()}

    def estimate(self, name: str) -> Any:
        """P of one layer."""
        return self.optimizer.operator(self.params[name])


def drift(seed: int, preset: Preset) -> Iterator[Row]:
    """Train once; errors and updates of the followers at the ages of their bases."""
    workload = _workload(seed)
    model = workload.model
    driver = optim.EShampoo(model.named_parameters(), lr=workload.lr, betas=BETAS)
    window = kp.GradientWindow(model, WINDOW, decay=BETAS[1], layers=workload.layers)
    window.attach(driver)
    layers = [name for name, p in model.named_parameters() if p.ndim > 1]
    followers = {name: Follower(name, model, preset.interval) for name in FOLLOWERS}
    for step in range(1, preset.interval * preset.cycles + max(preset.ages) + 2):
        train(workload, driver, step - 1, seed)  # leaves its gradients
        updates = {name: one.updates(model) for name, one in followers.items()}
        cycle, age = divmod(step - 1, preset.interval)
        if cycle and age in preset.ages:
            samples = window.samples()
            for layer in layers:
                H = kp.SecondMoment(samples[layer])
                shared = {"step": step, "age": age, "parameter": layer}
                found = {name: one[layer] for name, one in updates.items()}
                estimates = {name: one.estimate(layer) for name, one in followers.items()}
                for row in errors(H, estimates, found, 1 - BETAS[1] ** step):
                    yield shared | row


def errors(
    H: Any, estimates: dict[str, Any], updates: dict[str, Tensor], weight: float
) -> Iterator[Row]:
    """Both parts of each |P - H| / |H|, and the updates beside the reference's.

    Args:
        H: H_Ada, of total ``weight``.
        estimates: P of each follower.
        updates: Their updates.
        weight: 1 - beta2^t, by which the optimizers' estimates are corrected.
    """
    stretch = float(updates[GRAFTED].norm() / updates["Shampoo"].norm())
    splits = {}
    for name, P in estimates.items():
        scale = weight / stretch**2 if name == GRAFTED else weight
        splits[name] = kp.split_error(H, scaled(P, scale))
    best, U = splits[REFERENCE].basis, updates[REFERENCE].flatten()
    for name, split in splits.items():
        own = updates[name].flatten()
        numbers = {
            "basis_error": split.basis,
            "basis_ratio": split.basis / best,
            "eigenvalue_error": split.eigenvalues,
            "length": float(own.norm() / U.norm()),
            "cosine": float(torch.cosine_similarity(own, U, dim=0)),
        }
        for measured, value in numbers.items():
            yield {"measured": measured, "variant": name, "value": value}


def scaled(P: Any, scale: float) -> kp.KroneckerOperator | kp.EigenOperator:
    """``scale`` times a live operator."""
    if isinstance(P, kp.EigenOperator):
        return kp.EigenOperator(P.left_basis, P.right_basis, scale * P.eigenvalues)
    return kp.KroneckerOperator(P.left, P.right, scale * P.scale)


def refresh(seed: int, preset: Preset) -> Iterator[Row]:
    """Train with every rule of renewal: loss, seconds, and refreshes of each factor."""
    rules: list[tuple[str, float, dict[str, Any]]] = [
        ("interval", each, {"frequency": each}) for each in preset.intervals
    ]
    rules += [
        ("tolerance", tau, {"frequency": TESTED, "tolerance": tau}) for tau in preset.tolerances
    ]
    for rule, setting, basis in rules:
        for lr in preset.rates:
            shared = {"variant": rule, "setting": setting, "lr": lr, "step": preset.steps}
            for row in renewed(seed, preset.steps, lr, basis | {"start": 1}):
                yield shared | row


def renewed(seed: int, steps: int, lr: float, basis: dict[str, Any]) -> Iterator[Row]:
    """One training."""
    workload = _workload(seed)
    model = workload.model
    optimizer = optim.EShampoo(model.named_parameters(), lr=lr, basis=basis)
    seconds = sum(train(workload, optimizer, step, seed) for step in range(steps))
    with torch.no_grad():
        loss = float(workload.loss_fn(model(workload.train[0]), workload.train[1]))
    yield {"measured": "loss", "value": loss}
    yield {"measured": "seconds", "value": seconds}
    for name, param in model.named_parameters():
        for side, count in enumerate(optimizer.state[param]["refreshes"].flatten().tolist()):
            yield {"measured": "refreshes", "parameter": name, "side": side, "value": count}


def train(workload: Workload, optimizer: optim.KroneckerOptimizer, step: int, seed: int) -> float:
    """One step on its batch; the CPU seconds of the optimizer's part."""
    inputs, targets = workload.batch(step, workload.batch_size, seed)
    optimizer.zero_grad()
    workload.loss_fn(workload.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    before = time.process_time()
    optimizer.step()
    return time.process_time() - before


def _workload(seed: int) -> Workload:
    workload = load_workload(WORKLOAD, seed)
    torch.set_num_threads(workload.threads or torch.get_num_threads())
    return workload


def expected_rms(variant: str, mn: float) -> float:
    """Of an update of white noise, by theory."""
    return float(mn ** MAGNITUDES[variant][2])


def magnitude_errors(table: pd.DataFrame) -> pd.Series:
    """|measured / theory - 1| on white noise, the median of the seeds by variant and shape."""
    rows = table[table["part"] == "magnitude"]
    sizes = rows["m"] * rows["n"]
    theory = [expected_rms(v, mn) for v, mn in zip(rows["variant"], sizes, strict=True)]
    off = (rows["value"] / theory - 1).abs()
    return off.groupby([rows["variant"], rows["m"], rows["n"]]).median()


def drifted(table: pd.DataFrame, measured: str) -> pd.DataFrame:
    """One quantity by variant and age: median, least and largest of layers, cycles and seeds."""
    rows = table[(table["part"] == "drift") & (table["measured"] == measured)]
    return rows.groupby(["variant", "age"])["value"].agg(["median", "min", "max"])


def renewals(table: pd.DataFrame) -> pd.DataFrame:
    """Mean refreshes of a factor, seconds and loss: a row a rule, setting and seed.

    Each rule and setting has the learning rate that gives it the least median loss.
    """
    rows = table[table["part"] == "refresh"]
    keys = ["variant", "setting", "lr"]
    means = rows.groupby([*keys, "seed", "measured"])["value"].mean().unstack("measured")
    medians = means["loss"].groupby(keys).median()
    best = medians.groupby(["variant", "setting"]).idxmin()
    chosen = [means.xs(key, level=keys, drop_level=False) for key in best]
    return pd.concat(chosen).reset_index("lr")


def sentences(table: pd.DataFrame) -> tuple[str, ...]:
    """What to conclude: of drift (the title), white noise, and rules of renewal."""
    return _of_drift(table), _of_noise(table), _of_rules(table)


def _of_drift(table: pd.DataFrame) -> str:
    length: Any = drifted(table, "length")
    values: Any = drifted(table, "eigenvalue_error")["median"]
    basis: Any = drifted(table, "basis_ratio")["median"]
    first, *_, last = values.index.unique("age")
    plain, grafted = (
        length.loc[name, "max"].max() / length.loc[name, "min"].min()
        for name in ("Shampoo", GRAFTED)
    )
    return (
        f"Grafting repairs the length of Shampoo's steps: it varies {plain:.0f}-fold over "
        f"layers and ages without, {grafted:.1f}-fold with it. Correction repairs eigenvalues: "
        f"their error is {values['EShampoo', first]:.2f} at a refresh and "
        f"{values['EShampoo', last]:.2f} after {last:.0f} steps, with grafting "
        f"{values[GRAFTED, first]:.2f} and {values[GRAFTED, last]:.2f}. Neither repairs the basis, "
        f"whose error grows by {basis['EShampoo', last] - 1:.1%}"
    )


def _of_noise(table: pd.DataFrame) -> str:
    rows = table[table["part"] == "magnitude"]
    sizes = rows["m"] * rows["n"]
    small = rows.loc[(sizes == sizes.max()) & (rows["variant"] == "Shampoo"), "value"].median()
    return (
        f"On white noise every update is within {magnitude_errors(table).max():.0%} of theory: "
        f"Shampoo's is (mn)^-1/4, {small:.3f} of full-matrix Adam's at mn = {sizes.max():.0f}; "
        "grafting, the trace scale and corrected eigenvalues each bring it to 1"
    )


def _of_rules(table: pd.DataFrame) -> str:
    over = renewals(table).groupby(["variant", "setting"])
    medians, low, high = (getattr(over, how)() for how in ("median", "min", "max"))
    parts = [
        f"{key[0]} {key[1]:g}: loss {one['loss']:.4f} ({low.loc[key, 'loss']:.4f} to "
        f"{high.loc[key, 'loss']:.4f}) at lr {one['lr']:g}, {one['refreshes']:.0f} refreshes of a "
        f"factor, {one['seconds']:.2f} s"
        for key, one in medians.iterrows()
    ]
    return "; ".join(parts).capitalize()


def draw(table: pd.DataFrame) -> Figure:
    """White noise, four panels of drift, three of rules."""
    figure = Figure()
    panels = Panels.make(8, None, figure, width=3.3, height=2.9)
    axes = panels.axes
    _draw_noise(axes[0], table[table["part"] == "magnitude"])
    for ax, measured in zip(axes[1:5], DRIFTS, strict=True):
        _draw_drift(ax, drifted(table, measured), measured)
    rules = renewals(table)
    for ax, measured in zip(axes[5:7], RULES, strict=True):
        _draw_rules(ax, rules, measured)
    _draw_factors(axes[7], table, rules)
    texts = [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes]
    panels.finish(sentences(table)[0], "", "", legend=True)
    for ax, (x, y) in zip(axes, texts, strict=True):
        name_axes(ax, ax.get_title(loc="left"), x, y)
    return figure


def _draw_noise(ax: Axes, rows: pd.DataFrame) -> None:
    sizes = sorted((rows["m"] * rows["n"]).unique())
    lines = {"EShampoo": "1", "Shampoo": "$(mn)^{-1/4}$", "Shampoo², no trace": "$(mn)^{-1/2}$"}
    for variant, text in lines.items():
        theory = [expected_rms(variant, mn) for mn in sizes]
        ax.plot(sizes, theory, color=GREY, linewidth=1)
        ax.annotate(text, (sizes[-1], theory[-1]), (3, 9), textcoords="offset points",
                    ha="right", fontsize=8, color=GREY)  # fmt: skip
    for place, variant in enumerate(MAGNITUDES):
        found = rows[rows["variant"] == variant].groupby(["m", "n"])["value"].median()
        shift = 1.2 ** (place - 1 if place < 3 else 0)  # three of them lie on one line
        mn = [m * n * shift for m, n in found.index]
        _line(ax, mn, found, LOOKS[variant], variant, linestyle="")
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    ax.set_ylim(top=3)
    what = "white noise: theory (lines), measured"
    name_axes(ax, what, "mn, of m × n layers", "RMS of the update")


def _line(ax: Axes, x: Any, y: Any, look: Style, text: str, **more: Any) -> None:
    options = {"linestyle": look.line} | more
    ax.plot(x, y, color=look.color, marker=look.marker, markersize=5, label=text, **options)


def _draw_drift(ax: Axes, over: pd.DataFrame, measured: str) -> None:
    for variant in SHOWN.get(measured, tuple(FOLLOWERS)):
        look, one = LOOKS[variant], over.loc[variant]
        if variant in ("Shampoo", GRAFTED, "EShampoo"):
            ax.fill_between(one.index, one["min"], one["max"], color=look.color, alpha=0.12,
                            linewidth=0)  # fmt: skip
        _line(ax, one.index, one["median"], look, variant)
    ax.set_xscale("symlog", linthresh=1)
    ages = list(over.index.unique("age"))
    ax.set_xticks(ages, [f"{age:g}" for age in ages])
    ax.xaxis.set_minor_locator(NullLocator())
    if measured in ("eigenvalue_error", "length"):
        log_axis(ax.yaxis)
    title, label = DRIFTS[measured]
    name_axes(ax, title, "steps since the refresh", label)


def _draw_rules(ax: Axes, rules: Any, measured: str) -> None:
    for rule, (words, offset, turn) in LABELS.items():
        look = LOOKS[rule]
        over = rules.loc[rule].groupby("setting")[["refreshes", measured]]
        middle, low, high = over.median(), over.min(), over.max()
        ends = [middle[measured] - low[measured], high[measured] - middle[measured]]
        ax.errorbar(middle["refreshes"], middle[measured], ends, color=look.color, capsize=2,
                    marker=look.marker, markersize=5, linestyle="")  # fmt: skip
        align = ("left", "bottom") if turn else ("center", "top")
        for setting, one in middle.iterrows():
            ax.annotate(words.format(setting), (one["refreshes"], one[measured]), offset,
                        textcoords="offset points", fontsize=8, color=look.color, rotation=turn,
                        ha=align[0], va=align[1])  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.margins(0.25, 0.35)
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    title, label = RULES[measured]
    name_axes(ax, title, "refreshes, mean of the factors", label)


def _draw_factors(ax: Axes, table: pd.DataFrame, rules: Any) -> None:
    rows = table[(table["measured"] == "refreshes") & (table["variant"] == "tolerance")]
    keys = ["parameter", "side"]
    names = [f"{name} {'LR'[int(side)]}" for name, side in rows[keys].drop_duplicates().to_numpy()]
    colors = ("#0072b2", "#e69f00", "#cc79a7")
    for place, (setting, one) in enumerate(rules.loc["tolerance"].groupby("setting")):
        chosen = rows[(rows["setting"] == setting) & (rows["lr"] == one["lr"].iloc[0])]
        counts: Any = chosen.groupby(keys, sort=False)["value"].median()
        look = Style(colors[place % 3], "osD"[place % 3], "")
        _line(ax, counts, range(len(names)), look, f"τ = {setting:g}")
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(left=0)
    ax.margins(x=0.15, y=0.12)
    name_axes(ax, "each factor has its own frequency", "refreshes at tolerance τ", "")


SCRIPT = Script(NAME, __doc__.splitlines()[0], PRESETS, collect, draw, sentences)

if __name__ == "__main__":
    SCRIPT.main()
