"""What changes when adaptive methods drop the square root?

A root-free method divides by the estimate of the curvature H itself, not by its root (Lin et al.,
2024, arXiv 2402.03496). Three measurements:

- ``training``: a small network with two convolutions learns ten digits by methods with the root and
  without it. Each gets the same learning rates, one drawn at random in each equal part of the
  range 1e-4 to 1 (in the logarithm) and tried on a seed of its own; the one with the least final
  loss then trains on the other seeds. Everything else is the same: a momentum of .9, statistics
  that decay by .99, no weight decay.
- ``batch``: at fixed weights, the mean of the second moment s that the optimizer holds, for batches
  of B data drawn with replacement. s averages B g^2, with g the mean gradient of the batch. At
  labels sampled from the model its expectation is diag(H_GN) for every B; without the factor B it
  is that over B. At true labels the mean gradient mu enters: B E[g^2] = E[g_1^2] + (B - 1) mu^2.
- ``invariance``: weights w = D v are trained as v, from the same start and on the same batches. The
  number is the distance of D v from the run that trains w itself, relative to how far that got.
  D is a random diagonal matrix for diagonal methods, and a Kronecker product of two for factored
  ones. What a method holds at the start is mapped as well, so that nothing but its rule matters.

The table (root_free.csv) has one number a row: a ``part``, the ``method``, what was ``measured``
(distances as their log10), and whatever else the part varies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.progress import track
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

import kronecker_probe as kp
from kronecker_probe import optim
from kronecker_probe.errors import InvalidInputError
from kronecker_probe.panels import GREY, Panels, Style, log_axis, name_axes
from kronecker_probe.scripts import Script
from kronecker_probe.workloads import Workload, load_workload

NAME, WORKLOAD = "root_free", "digits-cnn"
DECAY, MOMENTUM = 0.99, 0.9
SEARCH_SEED = 1000  # none of those that are reported
RATES = (1e-4, 1.0)  # the range of the search
SPREAD = 1.0  # standard deviation of log D
WARMUP = 20  # steps before the second moments are measured
CHANCE, WORST = math.log(10), 10.0  # losses: of guessing, and what the figure shows of larger ones
KEYS = ["method", "batch_size"]
SCALINGS = ("B g²", "g²")
SCALING_LOOKS = {"B g²": Style("#cc79a7", "P", "-"), "g²": Style("#000000", "X", (0, (1, 1)))}

Row = dict[str, Any]
Params = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        seeds: Seeds 0, 1, ... of model, batches and draws.
        trials: Learning rates that are tried for each method.
        steps: Of a training.
        sizes: Batch sizes of the second moments.
        draws: Batches of each size.
        data: Data that these are drawn from.
        compared: Steps of the reparameterized runs.
    """

    seeds: int
    trials: int
    steps: int
    sizes: tuple[int, ...]
    draws: int
    data: int
    compared: int = 30


PRESETS = {
    "quick": Preset(1, 6, 40, (1, 16, 256), 200, 256, 30),
    "default": Preset(3, 12, 200, (1, 4, 16, 64, 256), 400, 512, 30),
}


def _rmsprop(params: Params, lr: float, batch: int) -> Optimizer:
    values = [param for _, param in params]
    return torch.optim.RMSprop(values, lr=lr, alpha=DECAY, eps=1e-8, momentum=MOMENTUM)


def _rmsprop_free(params: Params, lr: float, batch: int) -> Optimizer:
    return optim.RMSpropRootFree(params, lr=lr, beta2=DECAY, batch_size=batch)


def _shampoo(params: Params, lr: float, batch: int) -> Optimizer:
    return optim.Shampoo(params, lr=lr, betas=(0.0, DECAY), momentum=MOMENTUM)


def _shampoo_free(params: Params, lr: float, batch: int) -> Optimizer:
    return optim.RootFreeShampoo(params, lr=lr, betas=(0.0, DECAY), batch_size=batch)


def _inverse_free(params: Params, lr: float, batch: int) -> Optimizer:
    rule = {"lr": 1 - DECAY}  # the weight of the newest gradient, as in the others
    return optim.InverseFreeShampoo(params, lr=lr, batch_size=batch, inverse=rule)


@dataclass(frozen=True)
class Method:
    """A method, and whether it takes the root."""

    build: Callable[[Params, float, int], Optimizer]
    root: bool
    look: Style


# Okabe and Ito's colours; dashed lines and open markers for methods with the root
METHODS = {
    "RMSprop": Method(_rmsprop, True, Style("#d55e00", "^", (0, (4, 2)))),
    "RMSpropRootFree": Method(_rmsprop_free, False, Style("#d55e00", "v", "-")),
    "Shampoo": Method(_shampoo, True, Style("#0072b2", "s", (0, (4, 2)))),
    "RootFreeShampoo": Method(_shampoo_free, False, Style("#0072b2", "D", "-")),
    "InverseFreeShampoo": Method(_inverse_free, False, Style("#009e73", "o", "-")),
}


def collect(preset: Preset) -> pd.DataFrame:
    """The table: all three parts, one number a row."""
    rows: list[Row] = []
    for name in track(METHODS, description="training"):
        rows += ({"part": "training", "method": name} | row for row in training(name, preset))
    for seed in track(range(preset.seeds), description="seeds"):
        for part, measure in (("batch", batches), ("invariance", invariance)):
            rows += ({"part": part, "seed": seed} | row for row in measure(seed, preset))
    return pd.DataFrame(rows)


def rates(trials: int) -> list[float]:
    """The learning rates of the search, the same for every method."""
    low, high = (math.log(rate) for rate in RATES)
    drawn = torch.rand(trials, generator=torch.Generator().manual_seed(SEARCH_SEED))
    places = [(k + float(u)) / trials for k, u in enumerate(drawn)]
    return [math.exp(low + (high - low) * place) for place in places]


def training(method: str, preset: Preset) -> Iterator[Row]:
    """The search, and the loss curves of its best rate."""
    found = []
    for lr in rates(preset.trials):
        final = list(curve(method, lr, SEARCH_SEED, preset.steps, (preset.steps,)))
        found.append((final[0][1], lr))
        yield {"seed": SEARCH_SEED, "measured": "trial", "lr": lr, "value": final[0][1]}
    best = min(found)[1]
    at = tuple(range(0, preset.steps + 1, max(1, preset.steps // 20)))
    for seed in range(preset.seeds):
        for step, loss in curve(method, best, seed, preset.steps, at):
            yield {"seed": seed, "measured": "loss", "lr": best, "step": step, "value": loss}


def curve(
    method: str, lr: float, seed: int, steps: int, at: tuple[int, ...]
) -> Iterator[tuple[int, float]]:
    """Loss of all training data at some steps; infinite from a gradient that is not finite on."""
    workload = _workload(seed)
    model, loss_fn = workload.model, workload.loss_fn
    named = list(model.named_parameters())
    optimizer = METHODS[method].build(named, lr, workload.batch_size)
    broken = False
    for step in range(steps + 1):
        if step in at:
            with torch.no_grad():
                loss = float(loss_fn(model(workload.train[0]), workload.train[1]))
            yield step, loss if math.isfinite(loss) and not broken else math.inf
        if step < steps and not broken:
            inputs, targets = workload.batch(step, workload.batch_size, seed)
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            try:
                optimizer.step()
            except InvalidInputError:  # a rate that is too high
                broken = True


def batches(seed: int, preset: Preset) -> Iterator[Row]:
    """Mean second moments at fixed weights over E[g_1^2], and what theory says of them."""
    workload = _workload(seed)
    model, loss_fn = workload.model, workload.loss_fn
    warm = torch.optim.Adam(model.parameters(), lr=workload.lr)
    for step in range(WARMUP):
        inputs, targets = workload.batch(step, workload.batch_size, seed)
        warm.zero_grad()
        loss_fn(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        warm.step()
    inputs, targets = workload.probe(preset.data, seed)
    for labels, draws in (("sampled", "ggn"), ("true", "empirical-fisher")):
        single, mean = moments(workload, draws, (inputs, targets))
        for size in preset.sizes:
            shared = {"labels": labels, "batch_size": size}
            expected = 1 if labels == "sampled" else 1 + (size - 1) * mean / single
            theory = (expected, expected / size)
            pair = held(workload, (inputs, targets), labels, size, preset.draws, seed)
            for name, value, found in zip(SCALINGS, theory, pair, strict=True):
                row = shared | {"method": name}
                yield row | {"measured": "theory", "value": value}
                yield row | {"measured": "held", "value": found / single}


def moments(workload: Workload, draws: str, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Means over the weights of E[g_1^2] and mu^2, from all of the data."""
    captured = kp.capture(workload.model, workload.loss_fn, data, draws, workload.layers)
    weights = [workload.model.get_parameter(name) for name in captured]
    count = sum(weight.numel() for weight in weights)
    single = sum(kp.SecondMoment(captured[name]).trace() for name in captured)
    loss = workload.loss_fn(workload.model(data[0]), data[1])
    mean = sum(float(g.square().sum()) for g in torch.autograd.grad(loss, weights))
    return single / count, mean / count


def held(
    workload: Workload, data: tuple[Tensor, Tensor], labels: str, size: int, draws: int, seed: int
) -> tuple[float, float]:
    """Mean of s over the weights, with the factor B and without it."""
    model, (inputs, targets) = workload.model, data
    generator = torch.Generator().manual_seed(seed)
    named = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    pair = [
        # the sum of B g^2 alone; a rate of 0 leaves the weights
        optim.AdaGradRootFree(named, lr=0.0, batch_size=scale, statistics={"initial": 0.0})
        for scale in (size, 1)
    ]
    for _ in range(draws):
        chosen = torch.randint(len(targets), (size,), generator=generator)
        outputs = model(inputs[chosen])
        answers = targets[chosen]
        if labels == "sampled":
            shares = outputs.detach().softmax(1)
            answers = torch.multinomial(shares, 1, generator=generator)[:, 0]
        model.zero_grad()
        workload.loss_fn(outputs, answers).backward()  # type: ignore[no-untyped-call]
        for optimizer in pair:
            optimizer.step()
    count = sum(param.numel() for _, param in named)
    one, other = (
        sum(float(o.state[p]["second_moment"].sum()) for _, p in named) / (draws * count)
        for o in pair
    )
    return one, other


@dataclass(frozen=True)
class Coordinates:
    """w = D v of one parameter, seen as an m x n matrix.

    Attributes:
        left: Of the Kronecker product, [m].
        right: [n].
        full: Entries of D, [m, n]: their product, or drawn one by one.
    """

    left: Tensor
    right: Tensor
    full: Tensor

    @classmethod
    def drawn(
        cls, param: Tensor, generator: torch.Generator, spread: float, *, kronecker: bool
    ) -> Coordinates:
        """Log-normal entries; 1 without spread."""
        m, n = len(param), param.numel() // len(param)

        def draw(*shape: int) -> Tensor:
            normal = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return (spread * normal).exp()

        # a vector has one factor
        left, right = draw(m), draw(n) if param.ndim > 1 else torch.ones(1, dtype=torch.float64)
        full = torch.outer(left, right) if kronecker else draw(m, n)
        return cls(left, right, full)


def _start_moment(state: dict[str, Any], at: Coordinates) -> None:
    """s = 1 of w is s = D^2 of v."""
    state["second_moment"].copy_(at.full.square().view_as(state["second_moment"]))


def _start_inverses(state: dict[str, Any], at: Coordinates) -> None:
    """Inverse factors I of w are D^-1 of v."""
    for side, one in enumerate((at.left, at.right)):
        if f"inverse_{side}" in state:
            state[f"inverse_{side}"].copy_(one.reciprocal().diag()[None])
            state[f"velocity_{side}"].zero_()


@dataclass(frozen=True)
class Compared:
    """How a method is compared in two coordinates.

    Attributes:
        build: The method, undamped where a damping is not invariant.
        kronecker: Whether D is a Kronecker product.
        start: Maps what it holds at the start; None where that is 0.
    """

    build: Callable[[Params], Optimizer]
    kronecker: bool
    start: Callable[[dict[str, Any], Coordinates], None] | None = None


COMPARED = {
    "RMSprop": Compared(lambda named: _rmsprop(named, 1e-3, 1), False),
    "RMSpropRootFree": Compared(
        lambda named: optim.RMSpropRootFree(
            named, lr=0.03, beta2=DECAY, batch_size=64, epsilon=0.0
        ), False, _start_moment,
    ),
    "Shampoo": Compared(lambda named: _shampoo(named, 1e-3, 1), True),
    "InverseFreeShampoo": Compared(
        lambda named: optim.InverseFreeShampoo(
            named, lr=0.03, batch_size=64, inverse={"damping": 0.0}
        ), True, _start_inverses,
    ),
}  # fmt: skip


def invariance(seed: int, preset: Preset) -> Iterator[Row]:
    """Distances of reparameterized runs, step by step."""
    for name, how in COMPARED.items():
        plain, mapped = (trajectory(how, seed, preset.compared, on) for on in (False, True))
        for step in range(1, preset.compared + 1):
            distance = (mapped[step] - plain[step]).norm() / (plain[step] - plain[0]).norm()
            value = math.log10(max(float(distance), 1e-17))
            yield {"method": name, "measured": "log10_distance", "step": step, "value": value}


def trajectory(how: Compared, seed: int, steps: int, mapped: bool) -> list[Tensor]:
    """All weights w after each step, trained as v = w / D or (not ``mapped``) themselves."""
    workload = _workload(seed)
    model = workload.model.double()
    generator = torch.Generator().manual_seed(seed)
    spread = SPREAD if mapped else 0.0
    places = {
        name: Coordinates.drawn(param, generator, spread, kronecker=how.kronecker)
        for name, param in model.named_parameters()
    }
    D = {name: places[name].full.view_as(param) for name, param in model.named_parameters()}
    named = [
        (name, nn.Parameter(param.detach() / D[name])) for name, param in model.named_parameters()
    ]
    optimizer = how.build(named)
    if how.start is not None:
        for _, param in named:
            param.grad = torch.zeros_like(param)
        optimizer.step()  # makes the state
        for name, param in named:
            how.start(optimizer.state[param], places[name])
    found = []
    for step in range(steps + 1):
        weights = {name: D[name] * param for name, param in named}
        found.append(torch.cat([weight.detach().flatten() for weight in weights.values()]))
        inputs, targets = workload.batch(step, workload.batch_size, seed)
        outputs = functional_call(model, weights, (inputs.double(),))
        optimizer.zero_grad()
        workload.loss_fn(outputs, targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return found


def _workload(seed: int) -> Workload:
    workload = load_workload(WORKLOAD, seed)
    torch.set_num_threads(workload.threads or torch.get_num_threads())
    return workload


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """Losses by method and step: median, least and largest of the seeds."""
    rows = table[(table["part"] == "training") & (table["measured"] == "loss")]
    return rows.groupby(["method", "step"])["value"].agg(["median", "min", "max"])


def second_moments(table: pd.DataFrame) -> pd.DataFrame:
    """Theory and what was held, over E[g_1^2]: a row for labels, scaling, batch size and seed."""
    rows = table[table["part"] == "batch"]
    keys = ["labels", "method", "batch_size", "seed", "measured"]
    return rows.set_index(keys)["value"].unstack("measured")


def distances(table: pd.DataFrame) -> pd.DataFrame:
    """Of reparameterized runs, by method and step: median, least and largest of the seeds."""
    rows = table[table["part"] == "invariance"]
    powers = rows.groupby(["method", "step"])["value"].agg(["median", "min", "max"])
    return 10.0**powers


def sentences(table: pd.DataFrame) -> tuple[str, ...]:
    """What to conclude: everything in one (the title), the losses, and the batch sizes."""
    last = table.loc[table["part"] == "invariance", "step"].max()
    far: Any = distances(table)["median"].xs(last, level="step")
    exact = far[["RMSpropRootFree", "InverseFreeShampoo"]].max()
    rooted = far[["RMSprop", "Shampoo"]].min()
    held: Any = second_moments(table).xs("sampled", level="labels").groupby(KEYS).median()
    one, other = (held.loc[name, "held"] for name in SCALINGS)
    size = held.index.unique("batch_size").max()
    steps = table.loc[table["part"] == "training", "step"].max()
    losses: Any = curves(table).xs(steps, level="step")
    least = {
        root: min(losses.loc[name, "median"] for name, m in METHODS.items() if m.root == root)
        for root in (True, False)
    }
    title = (
        f"After {steps:.0f} steps root-free methods are at loss {least[False]:.4f} at best, those "
        f"with the root at {least[True]:.4f}. Rescaled weights change their runs by {exact:.0e}, "
        f"those with the root by {rooted:.1f}. With B the second moment is {one.min():.2f} to "
        f"{one.max():.2f} of that of single gradients up to B = {size:.0f}, without it down to "
        f"{other.min():.4f}"
    )
    told = "; ".join(
        f"{name} {losses.loc[name, 'median']:.4f} ({losses.loc[name, 'min']:.4f} to "
        f"{losses.loc[name, 'max']:.4f}) at lr {_best(table, name):.2g}"
        for name in METHODS
    )
    largest: Any = second_moments(table).xs("true", level="labels").groupby(KEYS).median()
    return (
        title,
        f"Final training losses, median and range: {told}",
        f"At true labels the mean gradient enters: with the factor B the second moment is "
        f"{largest.loc[(SCALINGS[0], size), 'held']:.1f} times that of single gradients at "
        f"B = {size:.0f}, {largest.loc[(SCALINGS[0], size), 'theory']:.1f} by theory",
    )


def _best(table: pd.DataFrame, method: str) -> float:
    rows = table[(table["method"] == method) & (table["measured"] == "loss")]
    return float(rows["lr"].iloc[0])


def draw(table: pd.DataFrame) -> Figure:
    """Training above; batch sizes and invariance below."""
    figure = Figure()
    panels = Panels.make(6, None, figure, width=3.9, height=2.9)
    axes = panels.axes
    _draw_search(axes[0], table)
    _draw_curves(axes[1], curves(table))
    _draw_final(axes[2], table)
    moments_: Any = second_moments(table)
    for ax, labels in zip(axes[3:5], ("sampled", "true"), strict=True):
        _draw_moments(ax, moments_.loc[labels], labels)
    _draw_distances(axes[5], distances(table))
    texts = [(ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()) for ax in axes]
    panels.finish(sentences(table)[0], "", "", legend=True)
    for ax, text in zip(axes, texts, strict=True):
        name_axes(ax, *text)
    return figure


def _line(ax: Axes, x: Any, y: Any, method: str, **more: Any) -> None:
    look = METHODS[method].look
    face = "white" if METHODS[method].root else look.color
    options = {"linestyle": look.line, "markersize": 5, "label": method} | more
    ax.plot(x, y, color=look.color, marker=look.marker, markerfacecolor=face, **options)


def _draw_search(ax: Axes, table: pd.DataFrame) -> None:
    rows = table[table["measured"] == "trial"]
    for method in METHODS:
        one = rows[rows["method"] == method].sort_values("lr")
        _line(ax, one["lr"], one["value"].clip(upper=WORST), method)
    ax.axhline(CHANCE, color=GREY, linewidth=1, linestyle=(0, (1, 2)))
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    name_axes(ax, "the search: one seed, the same rates", "learning rate", "final training loss")


def _draw_curves(ax: Axes, over: pd.DataFrame) -> None:
    for method, how in METHODS.items():
        one = over.loc[method].clip(upper=WORST)
        ax.fill_between(one.index, one["min"], one["max"], color=how.look.color, alpha=0.12,
                        linewidth=0)  # fmt: skip
        _line(ax, one.index, one["median"], method, markevery=4)
    log_axis(ax.yaxis)
    name_axes(ax, "median and range of the seeds", "step", "training loss")


def _draw_final(ax: Axes, table: pd.DataFrame) -> None:
    rows = table[table["measured"] == "loss"]
    rows = rows[rows["step"] == rows["step"].max()]
    names = list(METHODS)[::-1]
    for place, method in enumerate(names):
        values = rows.loc[rows["method"] == method, "value"].clip(upper=WORST)
        _line(ax, values, [place] * len(values), method, linestyle="", label=None)
        text = f"lr {_best(table, method):.2g}"
        ax.annotate(text, (values.median(), place), (0, 7), textcoords="offset points",
                    ha="center", fontsize=8, color=GREY)  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.margins(x=0.15, y=0.15)
    log_axis(ax.xaxis)
    name_axes(ax, "at the last step, seed by seed", "training loss", "")


def _draw_moments(ax: Axes, over: pd.DataFrame, labels: str) -> None:
    middle, ends = over.groupby(KEYS), SCALING_LOOKS
    for name in SCALINGS:
        one, look = middle.median().loc[name], ends[name]
        low, high = (getattr(middle["held"], end)().loc[name] for end in ("min", "max"))
        ax.plot(one.index, one["theory"], color=look.color, linestyle=look.line,
                label=f"s of {name}, theory")  # fmt: skip
        ax.errorbar(one.index, one["held"], [one["held"] - low, high - one["held"]], capsize=2,
                    color=look.color, marker=look.marker, markersize=5, linestyle="",
                    label=f"s of {name}, held")  # fmt: skip
    ax.set_xscale("log", base=4)
    log_axis(ax.yaxis)
    ax.xaxis.set_minor_locator(NullLocator())
    sizes = list(over.index.unique("batch_size"))
    ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
    title = f"{labels} labels: " + (
        "B undoes the batch" if labels == "sampled" else "the mean enters"
    )
    name_axes(ax, title, "batch size B", "mean of s over that at B = 1")


def _draw_distances(ax: Axes, over: pd.DataFrame) -> None:
    for method in COMPARED:
        one, look = over.loc[method], METHODS[method].look
        ax.fill_between(one.index, one["min"], one["max"], color=look.color, alpha=0.12,
                        linewidth=0)  # fmt: skip
        _line(ax, one.index, one["median"], method, markevery=4)
    log_axis(ax.yaxis)
    name_axes(ax, "weights rescaled at random", "step", "relative distance of the runs")


SCRIPT = Script(NAME, __doc__.splitlines()[0], PRESETS, collect, draw, sentences)

if __name__ == "__main__":
    SCRIPT.main()
