"""The optimizers by their definitions: dense mn x mn matrices, numpy, float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Rule:
    """An optimizer in the terms of the papers; whole matrices, every refresh by eigh.

    Attributes:
        estimate: "kronecker", "corrected", "diagonal" or "polar".
        power: The direction is P^-power M.
        exponents: Of L and R in P: 1/2 for Shampoo, 1 for its square.
        trace: P = L kron R / Tr L.
        whitened: None, or q of the trace-power family.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float | None = 0.999
    correct: bool = True
    decay: float = 0.0
    mu: float = 0.0
    every: int = 1
    batch: int = 1
    initial: float = 0.0
    estimate: str = "kronecker"
    power: float = 0.5
    exponents: float = 0.5
    trace: bool = False
    whitened: float | None = None
    epsilon: float = 1e-8
    relative: bool = False
    frequency: int = 10
    start: int = 10
    graft: str = "none"
    graft_epsilon: float = 1e-8
    carry: str = "keep"
    nesterov: bool = False
    by_shape: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def eigen(A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(A)
    return np.maximum(values[::-1], 0), vectors[:, ::-1]


def power_of(A: np.ndarray, exponent: float, add: float = 0.0) -> np.ndarray:
    values, vectors = eigen(A)
    return (vectors * (values + add) ** exponent) @ vectors.T


class Dense:
    """One m x n parameter under a :class:`Rule`."""

    def __init__(self, rule: Rule, W: np.ndarray) -> None:
        self.rule, self.W = rule, W.copy()
        m, n = W.shape
        # partial traces of initial I
        self.L, self.R = rule.initial * n * np.eye(m), rule.initial * m * np.eye(n)
        self.M, self.v, self.buffer = np.zeros((m, n)), np.zeros((m, n)), np.zeros((m, n))
        self.D = np.full((m, n), rule.initial)
        self.QL, self.QR = np.eye(m), np.eye(n)
        self.whiten_L, self.whiten_R = np.eye(m), np.eye(n)
        self.trace_L, self.trace_R = float(m), float(n)
        self.started = False
        self.operator: np.ndarray | None = None  # P^-power
        self.t = self.updates = 0

    def step(self, G: np.ndarray) -> None:
        r = self.rule
        self.t += 1
        self._statistics(G)
        self.M = r.beta1 * self.M + (1 - r.beta1) * G
        b1 = 1 - r.beta1**self.t if r.correct else 1.0
        keep = (r.beta2 or 0.0) if r.beta2 is not None else 1.0
        weight = 1 - keep if r.beta2 is not None else 1.0
        self.v = keep * self.v + weight * G * G
        if self.t >= r.start and (self.t - r.start) % r.frequency == 0:
            self._refresh()
        U = self._graft(self._direction(G, keep, weight) / b1, self.M / b1)
        if r.by_shape:
            U = U * max(1.0, G.shape[0] / G.shape[1]) ** 0.5
        if r.mu:
            self.buffer = r.mu * self.buffer + U + r.decay * self.W
            self.W = self.W - r.lr * self.buffer
        else:
            self.W = (1 - r.lr * r.decay) * self.W - r.lr * U

    def _statistics(self, G: np.ndarray) -> None:
        r = self.rule
        if (self.t - 1) % r.every:
            return
        self.updates += 1
        keep = 1.0 if r.beta2 is None else r.beta2**r.every
        weight = (1.0 if r.beta2 is None else 1 - keep) * r.batch
        left, right = G @ G.T, G.T @ G
        if r.whitened is not None and not self.started:
            # multiples of the identity whose product has the mean square of G
            self.started, size = True, float(np.sqrt((G * G).mean()))
            self.whiten_L *= size ** (r.whitened - 1)
            self.whiten_R *= size ** (r.whitened - 1)
            self.trace_L *= size**r.whitened
            self.trace_R *= size**r.whitened
        if r.whitened is not None:
            left = G @ self.whiten_R @ G.T / self.trace_R
            right = G.T @ self.whiten_L @ G / self.trace_L
        self.L = keep * self.L + weight * left
        self.R = keep * self.R + weight * right

    def _b2(self, updates: int) -> float:
        r = self.rule
        return 1.0 if r.beta2 is None or not r.correct else 1 - r.beta2 ** (r.every * updates)

    def _refresh(self) -> None:
        r = self.rule
        L, R = self.L / self._b2(self.updates), self.R / self._b2(self.updates)
        adds = [r.epsilon * (np.linalg.eigvalsh(A)[-1] if r.relative else 1.0) for A in (L, R)]
        if r.whitened is not None:
            q = r.whitened
            corrected = r.estimate == "corrected"
            floor = [r.epsilon] * 2 if corrected else adds
            self.whiten_L = power_of(L, q - 1, floor[0])
            self.whiten_R = power_of(R, q - 1, floor[1])
            self.trace_L = float(np.trace(power_of(L, q, floor[0])))
            self.trace_R = float(np.trace(power_of(R, q, floor[1])))
        if r.estimate == "kronecker":
            P = np.kron(power_of(L, r.exponents, adds[0]), power_of(R, r.exponents, adds[1]))
            self.operator = power_of(P / np.trace(L) if r.trace else P, -r.power)
        elif r.estimate == "corrected":
            QL, QR = eigen(L)[1], eigen(R)[1]
            if r.carry == "transport":
                self.D = (QL.T @ self.QL) ** 2 @ self.D @ ((QR.T @ self.QR) ** 2).T
            else:
                self.D = kept(self.QL, QL) @ self.D @ kept(self.QR, QR).T
            self.QL, self.QR = QL, QR

    def _direction(self, G: np.ndarray, keep: float, weight: float) -> np.ndarray:
        r = self.rule
        if r.estimate == "polar":
            M = self.M if not r.nesterov else r.beta1 * self.M + (1 - r.beta1) * G
            u, _, vt = np.linalg.svd(M, full_matrices=False)
            return u @ vt
        if r.estimate == "diagonal":
            self.D = keep * self.D + weight * r.batch * G * G
            return self.M / ((self.D / self._b2(self.t)) ** r.power + r.epsilon)
        if r.estimate == "corrected":
            self.D = keep * self.D + weight * r.batch * (self.QL.T @ G @ self.QR) ** 2
            b2 = 1.0 if r.beta2 is None or not r.correct else 1 - r.beta2**self.t
            rotated = self.QL.T @ self.M @ self.QR
            return self.QL @ (rotated / ((self.D / b2) ** r.power + r.epsilon)) @ self.QR.T
        if self.operator is None:
            return self.M
        return (self.operator @ self.M.reshape(-1)).reshape(self.M.shape)

    def _graft(self, U: np.ndarray, M: np.ndarray) -> np.ndarray:
        r = self.rule
        if r.graft == "none":
            return U
        theirs = M
        if r.graft != "sgd":
            b2 = 1 - r.beta2**self.t if r.graft == "adam" and r.correct and r.beta2 else 1.0
            theirs = M / (np.sqrt(self.v / b2) + r.graft_epsilon)
        if r.estimate == "kronecker" and self.operator is None:
            return theirs
        return U * np.linalg.norm(theirs) / np.linalg.norm(U)


def kept(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Weights [new, old]: a column keeps the number of the one it continues, else the average."""
    rows = []
    for column in new.T:
        squares = (column @ old) ** 2
        rows.append(squares == squares.max() if squares.max() > 0.5 else squares)
    return np.array(rows, dtype=float)
