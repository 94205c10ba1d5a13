"""An optimizer's step beside AdamW's, beside the floor of its own products, and beside peers.

Everything is measured in one run, in turn: steps without a refresh, steps with one, and their
mean over a cycle of F steps. The floor of a method is what no implementation of it can leave out:
the matrix products of a step at the cost of plain ones, and one AdamW step; symmetric products
count half. That of a cycle has the decompositions of a refresh too: eigh of every factor and, for
roots, the product that forms them; or for QR the product with the basis, the diagonal by which
columns are sorted, the decomposition, and the turn of both averages. Peers are measured where they
can be imported (``distributed_shampoo``, ``soap`` and ``pytorch_optimizer``), with equal roots,
intervals, grafting and no blocking.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import clock, device, environment
from kronecker_probe import optim

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
BATCH = 128
BATCHES = 11  # different ones, which no interval divides
LEAN = {"factors": "bfloat16", "roots": "packed"}


def mlp() -> nn.Module:
    layers = [nn.Linear(n, m) for n, m in itertools.pairwise((784, 512, 512, 10))]
    return nn.Sequential(*layers)


class GPT(nn.Module):
    """The parameters of a small GPT: 2 blocks of width 128, a byte vocabulary, 64 positions."""

    def __init__(self, width: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)


MODELS: dict[str, Callable[[], nn.Module]] = {"MLP 784-512-512-10": mlp, "GPT, 2 x 128": GPT}


def parameters(model: Callable[[], nn.Module], on: torch.device) -> list[nn.Parameter]:
    """Parameters with gradients."""
    torch.manual_seed(0)
    params = list(model().to(on).parameters())
    for param, gradient in zip(params, gradients(params, 1)[0], strict=True):
        param.grad = gradient
    return params


def gradients(params: list[nn.Parameter], count: int) -> list[list[Tensor]]:
    """As batches of BATCH vectors give them, in ``count`` steps of one training.

    Their second moments have full rank and a spread spectrum, so that eigenbases are their own.
    """
    torch.manual_seed(1)
    sides = {
        size: torch.linalg.qr(torch.randn(size, size, device=param.device)).Q
        * torch.logspace(0, -2, size, device=param.device)
        for param in params
        for size in param.shape
    }

    def draw(param: nn.Parameter) -> Tensor:
        if param.ndim != 2:
            return 1e-2 * torch.randn_like(param)
        (m, n), on = param.shape, param.device
        left, right = torch.randn(m, BATCH, device=on), torch.randn(BATCH, n, device=on)
        return 1e-2 * (sides[m] @ left) @ (right @ sides[n].T)

    return [[draw(param) for param in params] for _ in range(count)]


def feed(optimizer: torch.optim.Optimizer, batch: list[Tensor]) -> None:
    """Give the parameters the gradients of a batch."""
    for param, gradient in zip(optimizer.param_groups[0]["params"], batch, strict=True):
        assert param.grad is not None
        param.grad.copy_(gradient)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-6, foreach=True)


def ours(frequency: int) -> dict[str, Build]:
    """Presets at equal settings: Adam grafting for Shampoo, whole matrices."""
    every = {"frequency": frequency}
    return {
        "Shampoo": lambda p: optim.Shampoo(p, lr=1e-6, basis=every, shapes={"vectors": "diagonal"}),
        "Shampoo, lean": lambda p: optim.Shampoo(
            p, lr=1e-6, basis=every, shapes={"vectors": "diagonal"}, storage=LEAN
        ),
        "EShampoo": lambda p: optim.EShampoo(
            p, lr=1e-6, basis=every, shapes={"vectors": "diagonal"}
        ),
        "SOAP": lambda p: optim.SOAP(p, lr=1e-6, basis=every),
        "SOAP, lean": lambda p: optim.SOAP(
            p, lr=1e-6, basis=every, storage={"factors": "bfloat16"}
        ),
    }


def matrices(params: list[nn.Parameter]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each matrix its gradient and two orthogonal matrices of its sides."""
    found = []
    for param in params:
        if param.ndim == 2:
            assert param.grad is not None
            sides = (torch.randn(r, r, device=param.device) for r in param.shape)
            left, right = (torch.linalg.qr(side).Q for side in sides)
            found.append((param.grad, left, right))
    return found


def floor_products(params: list[nn.Parameter], pairs: int) -> Callable[[], None]:
    """Statistics (symmetric: half) and ``pairs`` of products of each matrix's shape."""
    work = matrices(params)

    def products() -> None:
        for G, left, right in work:
            h, k = (G.shape[0] + 1) // 2, (G.shape[1] + 1) // 2
            torch.mm(G[:h], G.T), torch.mm(G.T[:k], G)
            for _ in range(pairs):
                (left @ G) @ right

    return products


def floor_refresh(params: list[nn.Parameter], kind: str) -> Callable[[], None]:
    """The decompositions of a refresh: "root", "basis" by eigh, or "qr"."""
    work = matrices(params)

    def refresh() -> None:
        for G, left, right in work:
            for X, Q in ((G @ G.T, left), (G.T @ G, right)):
                if kind == "qr":
                    torch.linalg.qr(X @ Q)
                    Q.T @ X
                else:
                    vectors = torch.linalg.eigh(X).eigenvectors
                    if kind == "root":
                        vectors @ vectors.T
            if kind != "root":
                for _ in range(2):
                    (left @ G) @ right

    return refresh


def peers(frequency: int) -> dict[str, Build]:
    """Those that can be imported."""
    found: dict[str, Build] = {}
    if importlib.util.find_spec("distributed_shampoo"):
        found |= _distributed_shampoo(frequency)
    if importlib.util.find_spec("soap"):
        from soap import SOAP  # type: ignore[import-not-found]

        found["SOAP (authors')"] = lambda p: SOAP(p, lr=1e-6, precondition_frequency=frequency)
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer  # type: ignore[import-not-found]

        found["SOAP (pytorch_optimizer)"] = lambda p: pytorch_optimizer.SOAP(
            p, lr=1e-6, precondition_frequency=frequency
        )
    return found


def _distributed_shampoo(frequency: int) -> dict[str, Build]:
    import distributed_shampoo as ds  # type: ignore[import-not-found]

    graft = ds.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8)
    common = {"lr": 1e-6, "betas": (0.9, 0.999), "epsilon": 1e-8, "max_preconditioner_dim": 1024,
              "precondition_frequency": frequency}  # fmt: skip
    return {
        "Distributed Shampoo": lambda p: ds.DistributedShampoo(
            p, grafting_config=graft, **common
        ),
        "Distributed Shampoo, unpacked": lambda p: ds.DistributedShampoo(
            p,
            grafting_config=graft,
            preconditioner_config=ds.RootInvShampooPreconditionerConfig(
                use_symmetric_packing=False
            ),
            **common,
        ),
        "Distributed Shampoo, corrected": lambda p: ds.DistributedShampoo(
            p,
            preconditioner_config=ds.DefaultEigenvalueCorrectedShampooConfig,
            start_preconditioning_step=frequency,
            **common,
        ),
    }  # fmt: skip


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors of more than one number, each storage once."""
    seen: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            if value.numel() > 1:
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for one in value.values():
                visit(one)
        elif isinstance(value, list | tuple):
            for one in value:
                visit(one)
        elif hasattr(value, "__dict__") and type(value).__module__.startswith("distributed"):
            visit(vars(value))

    for state in optimizer.state.values():
        visit(state)
    return sum(seen.values())


def measure(name: str, frequency: int, cycles: int, on: torch.device) -> None:
    """Print the table of one model at one interval."""
    model = MODELS[name]
    built: dict[str, torch.optim.Optimizer] = {"AdamW": adamw(parameters(model, on))}
    built |= {k: f(parameters(model, on)) for k, f in ours(frequency).items()}
    built |= {k: f(parameters(model, on)) for k, f in peers(frequency).items()}
    calls: dict[str, Callable[[], object]] = {k: o.step for k, o in built.items()}
    calls |= {f"products {k}": floor_products(parameters(model, on), k) for k in (1, 2)}
    alone = {k: floor_refresh(parameters(model, on), k) for k in ("root", "basis", "qr")}
    batches = itertools.cycle(gradients(parameters(model, on), BATCHES))
    for _ in range(2 * frequency):
        batch = next(batches)
        for optimizer in built.values():
            feed(optimizer, batch)
            optimizer.step()
    times: dict[str, list[list[float]]] = {k: [] for k in calls}
    for _ in range(cycles):
        for rows in times.values():
            rows.append([])
        for _ in range(frequency):
            batch = next(batches)
            for k, call in calls.items():
                if k in built:
                    feed(built[k], batch)
                times[k][-1].append(1e3 * clock(call))
    floors = {k: [1e3 * clock(call) for _ in range(cycles)] for k, call in alone.items()}
    report(name, frequency, built, times, {k: statistics.median(v) for k, v in floors.items()})


def report(
    name: str,
    frequency: int,
    built: dict[str, torch.optim.Optimizer],
    times: dict[str, list[list[float]]],
    refreshes: dict[str, float],
) -> None:
    """Print the table: times over AdamW's, and over their floors."""
    median = statistics.median
    adam = built["AdamW"]
    count = sum(p.numel() for p in adam.param_groups[0]["params"])
    unit = median(itertools.chain(*times["AdamW"]))
    print(f"\n{name}, F = {frequency}: AdamW {unit:.3f} ms")
    titles = ("plain", "refresh", "amortized", "plain/floor", "amort./floor", "B/param")
    print(f"  {'':34s}" + "".join(f"{title:>13s}" for title in titles))
    for k, optimizer in built.items():
        plain = median(x for row in times[k] for x in sorted(row)[: max(1, frequency - 1)])
        peak = median(max(row) for row in times[k])
        mean = median(statistics.mean(row) for row in times[k])
        numbers = [plain / unit, peak / unit, mean / unit]
        if k != "AdamW":
            pairs, kind = floor_of(k)
            step = median(itertools.chain(*times[f"products {pairs}"])) + unit
            numbers += [plain / step, mean / (step + refreshes[kind] / frequency)]
        else:
            numbers += [float("nan")] * 2
        numbers.append(state_bytes(optimizer) / count)
        print(f"  {k:34s}" + "".join(f"{number:13.2f}" for number in numbers))


def floor_of(name: str) -> tuple[int, str]:
    """Pairs of products in a step of a method, and its kind of refresh."""
    if "SOAP" in name:
        return 2, "qr"
    return (2, "basis") if name == "EShampoo" or "corrected" in name else (1, "root")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=8)
    parser.add_argument("--frequencies", type=int, nargs="+", default=[10])
    options = parser.parse_args(sys.argv[1:])
    print(f"Optimizer steps; {environment()}")
    for name in MODELS:
        for frequency in options.frequencies:
            measure(name, frequency, options.cycles, device())


if __name__ == "__main__":
    main()
