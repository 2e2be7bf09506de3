"""The noise that private training leaves in delta W, rule by rule: formula beside measurement.

    python benchmarks/privacy_noise.py [--clients 3] [--size 384] [--rank 8] [--sigma 0.01]

Every client starts from the same factors and sends them with Gaussian noise of deviation sigma on
the numbers that its rule trains: what optimisers make of the noised gradients is left out, so that
rules can be compared. Norms are Frobenius, relative to the increment; the mean of 10 draws.
"""

from __future__ import annotations

import argparse
import math

import torch

from fedlora.adapter import Factors, increment
from fedlora.rules import get_rule

TRAINED = {  # rule: (what is noised, options)
    "fra": ("AB", {}),
    "fra, orthonormal": ("AB", {"gauge": "orthonormal"}),
    "fedavg": ("AB", {}),
    "ffa": ("B", {}),
    "rolora": ("B", {}),
    "fedsvd": ("B", {}),
}


def start(size: int, rank: int, seed: int) -> Factors:
    """Factors of an increment of norm one, in the balanced gauge."""
    stream = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(size, rank, generator=stream, dtype=torch.float64)).Q
        for _ in range(2)
    )
    root = rank**-0.25
    return Factors(root * V.mT, root * U, 1.0)


def orthonormal(factors: Factors) -> Factors:
    """The same increment with orthonormal A."""
    Q, R = torch.linalg.qr(factors.A.mT)
    return Factors(Q.mT, factors.B @ R.mT, factors.scaling)


def noised(factors: Factors, parts: str, sigma: float, stream: torch.Generator) -> Factors:
    def draw(like: torch.Tensor) -> torch.Tensor:
        return sigma * torch.randn(like.shape, generator=stream, dtype=like.dtype)

    A = factors.A + draw(factors.A) if "A" in parts else factors.A
    B = factors.B + draw(factors.B) if "B" in parts else factors.B
    return Factors(A, B, factors.scaling)


def formula(name: str, factors: Factors, parts: str, sigma: float, clients: int) -> float:
    """The root of the expected squared norm of the noise before anything is cut.

    sigma^2 (m ||A||^2 + n ||B||^2) / K, and sigma^4 m n r over K where increments are averaged,
    over K^2 where factors are.
    """
    m, n = factors.shape
    linear = m * float(factors.A.square().sum()) * ("B" in parts)
    linear += n * float(factors.B.square().sum()) * ("A" in parts)
    both = m * n * factors.rank * sigma**2 * ("A" in parts and "B" in parts)
    both /= clients if name == "fedavg" else 1
    return factors.scaling * sigma * math.sqrt((linear + both) / clients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.002, 0.02])
    given = parser.parse_args()
    print("| rule | noise on | sigma | formula, uncut | measured, uncut | in the merged adapter |")
    print("|---|---|---|---|---|---|")
    for sigma in given.sigma:
        for name, (parts, options) in TRAINED.items():
            uncut, merged = [], []
            for seed in range(10):
                prev = start(given.size, given.rank, seed)
                prev = orthonormal(prev) if options else prev
                stream = torch.Generator().manual_seed(1000 + seed)
                sent = [noised(prev, parts, sigma, stream) for _ in range(given.clients)]
                weights = [1 / given.clients] * given.clients
                truth = increment(prev)
                if name == "fedavg":
                    A, B = (torch.stack([getattr(f, part) for f in sent]).mean(0) for part in "AB")
                    mean = B @ A
                else:
                    mean = torch.stack([increment(f) for f in sent]).mean(0)
                answer = get_rule(name.partition(",")[0], **options)(prev, sent, weights)
                factors = getattr(answer, "factors", answer)
                uncut.append(float((mean - truth).norm()))
                merged.append(float((increment(factors) - truth).norm()))
            want = formula(name, prev, parts, sigma, given.clients)
            row = [name, " and ".join(parts), f"{sigma:g}", f"{want:.3f}"]
            row += [f"{sum(found) / len(found):.3f}" for found in (uncut, merged)]
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
