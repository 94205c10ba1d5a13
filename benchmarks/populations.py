"""Populations of gradients whose second moment is known, to measure estimates against.

Each one draws independent data, any number of them, and states its limit: weighted draws whose
second moment, and whose means of d d^T and a a^T, are the population's own.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import final

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.gradients.samples.base import FactoredSamples

DIGITS_STEPS = 400


class Population(abc.ABC):
    """Independent draws of a layer's gradient.

    Attributes:
        name: Its name in the table.
        about: What it is, in a line.
        kronecker: Whether H is exactly a Kronecker product, of independent d and a.
        shared: Whether the layer is used at several positions.
    """

    name: str
    about: str
    kronecker: bool = False
    shared: bool = False

    @abc.abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> kp.GradientSamples:
        """``count`` independent data."""

    @abc.abstractmethod
    def limit(self, refinement: int = 1) -> kp.GradientSamples:
        """Weighted draws with the population's second moment; finer quadrature where it is one."""


@final
@dataclass(frozen=True)
class Inputs:
    """x = c_k + A y in n dimensions: y standard normal, or Student-t of ``df`` degrees of freedom.

    Attributes:
        scatter: A, [n, n].
        centres: c_k, [K, n].
        shares: Probability of each centre, [K].
        df: Degrees of freedom; infinite for the normal distribution.
    """

    scatter: Tensor
    centres: Tensor
    shares: Tensor
    df: float = math.inf

    @staticmethod
    def make(
        dims: int,
        df: float = math.inf,
        shares: tuple[float, ...] = (1.0,),
        spread: float = 0.0,
        width: float = 1.0,
    ) -> Inputs:
        """Standard deviations fall from ``width`` to ``width`` / 5 along random axes.

        Args:
            dims: n.
            df: Degrees of freedom.
            shares: Probability of each centre.
            spread: Distance of the centres from 0, about; the rarer the farther.
            width: Largest standard deviation about a centre.
        """
        generator = torch.Generator().manual_seed(dims)
        axes, _ = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64))
        deviations = width * torch.logspace(0, -math.log10(5), dims, dtype=torch.float64)
        centres = torch.randn(len(shares), dims, generator=generator, dtype=torch.float64)
        probabilities = torch.tensor(shares, dtype=torch.float64)
        reach = spread * (probabilities[0] / probabilities) ** 0.25 / math.sqrt(dims)
        return Inputs(axes * deviations, centres * reach[:, None], probabilities, df)

    @property
    def dims(self) -> int:
        """n."""
        return self.scatter.shape[0]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Inputs, [N, n]."""
        y = torch.randn(count, self.dims, generator=generator, dtype=torch.float64)
        if math.isfinite(self.df):
            normals = torch.randn(count, int(self.df), generator=generator, dtype=torch.float64)
            y = y / (normals.square().mean(1, keepdim=True)).sqrt()
        which = torch.multinomial(self.shares, count, True, generator=generator)
        return self.centres[which] + y @ self.scatter.T

    def second_moment(self) -> Tensor:
        """E[x x^T] in closed form."""
        variance = self.df / (self.df - 2) if math.isfinite(self.df) else 1.0
        between = (self.centres.T * self.shares) @ self.centres
        return variance * self.scatter @ self.scatter.T + between

    def plane(self) -> Tensor:
        """[2, n]: takes x - c_k to the first two coordinates of y."""
        inverse: Tensor = torch.linalg.inv(self.scatter)
        return inverse[:2]

    def quadrature(self, radial: int, angular: int) -> tuple[Tensor, Tensor]:
        """Points and weights that integrate f(first two of y) x x^T, [K, n] and [K].

        The two coordinates are integrated in polar form: radii r = 2 t / (1 - t) with t at
        Gauss-Legendre points of (0, 1), which suits tails of either kind, and equidistant
        angles. The other n - 2 have, given those two, mean 0 and covariance v I, v = 1 or
        (df + r^2) / df; and so have the n - 1 corners of a regular simplex.
        """
        nodes, gauss = np.polynomial.legendre.leggauss(radial)
        t = torch.from_numpy((nodes + 1) / 2)
        r = 2 * t / (1 - t)
        heavy = math.isfinite(self.df)
        tail = (1 + r**2 / self.df) ** (-self.df / 2 - 1) if heavy else torch.exp(-(r**2) / 2)
        deviation = ((self.df + r**2) / self.df).sqrt() if heavy else torch.ones_like(r)
        radial_weights = torch.from_numpy(gauss) / (1 - t) ** 2 * r * tail
        angles = torch.arange(angular, dtype=torch.float64) * (2 * math.pi / angular)
        circle = torch.stack([angles.cos(), angles.sin()], dim=1)
        corners = simplex(self.dims - 2)
        shape = (radial, angular, len(corners))
        seen = (r[:, None, None] * circle)[:, :, None].expand(*shape, 2)
        unseen = (deviation[:, None, None] * corners)[:, None].expand(*shape, self.dims - 2)
        y = torch.cat([seen, unseen], dim=-1).reshape(-1, self.dims)
        of_y = radial_weights[:, None, None].expand(shape).reshape(-1) / (angular * len(corners))
        x = self.centres[:, None] + y @ self.scatter.T
        return x.reshape(-1, self.dims), (self.shares[:, None] * of_y).reshape(-1)


def simplex(dims: int) -> Tensor:
    """Corners [dims + 1, dims] of a regular simplex, of mean 0 and covariance I."""
    centred = torch.eye(dims + 1, dtype=torch.float64) - 1 / (dims + 1)
    _, vectors = torch.linalg.eigh(centred)  # the eigenvalue 0 comes first
    corners: Tensor = vectors[:, 1:] * math.sqrt(dims + 1)
    return corners


@final
@dataclass(frozen=True)
class Teacher(Population):
    """A fixed softmax layer, z = U V x, whose logits see two directions V of its inputs.

    So H is a two-dimensional integral, whatever the number of inputs.

    Attributes:
        inputs: Their distribution.
        classes: m.
        target: "fisher" (a label sampled from the model) or "ggn" (the m exact columns).
        slope: Size of the logits.
        points: Radii and angles of the quadrature.
    """

    name: str
    about: str
    inputs: Inputs
    classes: int = 10
    target: str = "fisher"
    slope: float = 1.5
    points: tuple[int, int] = (32, 48)

    def probabilities(self, x: Tensor) -> Tensor:
        """[N, m]."""
        generator = torch.Generator().manual_seed(self.classes)
        mixing = torch.randn(self.classes, 2, generator=generator, dtype=torch.float64)
        return torch.softmax(self.slope * x @ self.inputs.plane().T @ mixing.T, dim=1)

    def sample(self, count: int, generator: torch.Generator) -> kp.GradientSamples:
        x = self.inputs.sample(count, generator)
        p = self.probabilities(x)
        if self.target == "ggn":
            return kp.GradientSamples.from_factors(softmax_columns(p), x[:, None])
        labels = torch.multinomial(p, 1, generator=generator)[:, 0]
        return kp.GradientSamples.from_factors(
            p - torch.eye(self.classes, dtype=p.dtype)[labels], x
        )

    def limit(self, refinement: int = 1) -> kp.GradientSamples:
        x, weights = self.inputs.quadrature(*(refinement * count for count in self.points))
        columns = softmax_columns(self.probabilities(x))
        return kp.GradientSamples.from_factors(columns, x[:, None], weights)


def softmax_columns(p: Tensor) -> Tensor:
    """d [N, C, 1, m] with sum_c d_c d_c^T = diag(p) - p p^T: the exact expectation over labels."""
    columns = torch.eye(p.shape[1], dtype=p.dtype) - p[:, None]
    return (columns * p.sqrt()[:, :, None])[:, :, None]


@final
@dataclass(frozen=True)
class Exact(Population):
    """Independent normal d and inputs a: H = E[d d^T] kron E[a a^T], true error 0.

    Attributes:
        inputs: Their distribution.
        outputs: m.
    """

    name: str
    about: str
    inputs: Inputs
    outputs: int = 10
    kronecker: bool = True

    def output_factor(self) -> Tensor:
        """B with d = B z, [m, m]."""
        return Inputs.make(self.outputs).scatter

    def sample(self, count: int, generator: torch.Generator) -> kp.GradientSamples:
        z = torch.randn(count, self.outputs, generator=generator, dtype=torch.float64)
        a = self.inputs.sample(count, generator)
        return kp.GradientSamples.from_factors(z @ self.output_factor().T, a)

    def limit(self, refinement: int = 1) -> kp.GradientSamples:
        b = self.output_factor()
        d, a = columns_of(b @ b.T), columns_of(self.inputs.second_moment())
        m, n = len(d), len(a)
        pairs = d.repeat_interleave(n, dim=0), a.repeat(m, 1)
        return kp.GradientSamples.from_factors(*pairs, torch.ones(m * n, dtype=torch.float64))


def columns_of(moment: Tensor) -> Tensor:
    """Rows x_k with sum_k x_k x_k^T = moment, PSD."""
    values, vectors = torch.linalg.eigh(moment)
    rows: Tensor = (vectors * values.clamp_min(0).sqrt()).T
    return rows


@final
@dataclass(frozen=True)
class Pool(Population):
    """Data drawn with replacement from a layer of a trained network: the pool is the population.

    Attributes:
        make: Captures the pool.
    """

    name: str
    about: str
    make: Callable[[], FactoredSamples] = field(repr=False)
    shared: bool = False

    def sample(self, count: int, generator: torch.Generator) -> kp.GradientSamples:
        pool = self.make()
        which = torch.randint(len(pool), (count,), generator=generator)
        return kp.GradientSamples.from_factors(pool.output_grads[which], pool.inputs[which])

    def limit(self, refinement: int = 1) -> kp.GradientSamples:
        return self.make()


class Patches(nn.Module):
    """One linear layer on the four quadrants of an image, and a readout of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(16, 10)
        self.readout = nn.Linear(40, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of [N, 64] images."""
        patches = images.view(-1, 2, 4, 2, 4).transpose(2, 3).reshape(-1, 4, 16)
        logits: Tensor = self.readout(torch.tanh(self.shared(patches)).flatten(1))
        return logits


def _hidden() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 10)
    )


@cache
def digits_pool(architecture: str, parameter: str, draws: str) -> FactoredSamples:
    """All 1,797 digits at the trained weights of "hidden" or "patches", as float64 factors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {"hidden": _hidden, "patches": Patches}[architecture]()
        images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
        images = (images / 16).float()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(DIGITS_STEPS):
            batch = torch.randint(len(images), (128,))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    captured = kp.capture(
        model.double(), nn.CrossEntropyLoss(), (images.double(), labels), draws, parameter
    )
    samples = captured[parameter]
    assert isinstance(samples, FactoredSamples)
    return samples


CLUSTERS = (0.45, 0.25, 0.15, 0.1, 0.05)
GAUSSIAN, CLUSTERED = Inputs.make(12), Inputs.make(12, shares=CLUSTERS, spread=3.0, width=0.3)
# d is bounded, so standard errors need E|a|^4, which df = 5 has; their own variance, of E|a|^8,
# does not exist
HEAVY = Inputs.make(12, df=5)
# E|a|^8 exists: the variance of a standard error is finite, though large
LESS_HEAVY = Inputs.make(12, df=9)

POPULATIONS: dict[str, Population] = {
    one.name: one
    for one in (
        Teacher("teacher", "softmax teacher, normal inputs, fisher draws", GAUSSIAN),
        Teacher("teacher-ggn", "the same, ggn: 10 columns a datum", GAUSSIAN, target="ggn"),
        Teacher("teacher-heavy", "softmax teacher, Student-t inputs, df = 5, fisher", HEAVY),
        Teacher(
            "teacher-clustered",
            "softmax teacher, inputs about 5 centres, fisher",
            CLUSTERED,
            points=(32, 16),
        ),
        Exact("kronecker", "exactly Kronecker, normal d and a", GAUSSIAN),
        Exact("kronecker-heavy", "exactly Kronecker, Student-t a, df = 9", LESS_HEAVY),
        Exact("kronecker-clustered", "exactly Kronecker, a about 5 centres", CLUSTERED),
        Pool(
            "mlp-hidden",
            "hidden layer of an MLP trained on digits, ggn: 10 columns a datum",
            lambda: digits_pool("hidden", "2.weight", "ggn"),
        ),
        Pool(
            "mlp-hidden-fisher",
            "the same layer, fisher draws",
            lambda: digits_pool("hidden", "2.weight", "fisher"),
        ),
        Pool(
            "shared-patches",
            "trained layer shared by 4 positions, fisher draws",
            lambda: digits_pool("patches", "shared.weight", "fisher"),
            shared=True,
        ),
    )
}
