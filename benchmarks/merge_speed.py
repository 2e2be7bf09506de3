"""FRA's merge of one layer beside one dense SVD of it: time, route, error, peak memory, limits.

    python benchmarks/merge_speed.py [--clients 3 10 100 1000] [--ranks 8 16 64]
        [--shapes 4096x4096 4096x11008] [--dense-seconds 4096x4096=60 ...] [--skip-dense]

One process per case, one thread. Clients are float32, each a common increment with a falling
spectrum plus half as much of its own. "Excess" is the error beyond the best one, in float64: from
QR of both stacks and the SVD of R x R (R <= 2000), else from the eigenvalues of the m x m matrix
W W^T (none where m n R > 1.5e11). The dense SVD (float32, as FlexLoRA's) runs once a shape.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

MODULES = {"4096x4096": 4, "4096x11008": 3}  # of one layer of a 7B model; 32 layers
LAYERS = 32
LIMIT = 6e9  # bytes of inputs beyond which a case is left out
SMALL = 2000  # up to this R the reference is the R x R problem


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[3, 10, 100, 1000])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--shapes", nargs="+", default=list(MODULES))
    parser.add_argument("--dense-seconds", nargs="*", default=[], help="measured before: MxN=S")
    parser.add_argument("--skip-dense", action="store_true", help="no column of ratios")
    parser.add_argument("--no-reference", action="store_true", help="no column of excess")
    parser.add_argument("--case", help="one case in this process; prints JSON")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(CASES[args.case.split(":")[0]](*args.case.split(":")[1:])))
        return
    limits = child("limits")
    print(
        f"the machine, one thread: reads {limits['read']:.1f} GB/s; matrix products "
        f"{limits['float32']:.0f} GFlop/s in float32, {limits['float64']:.0f} in float64"
    )
    dense = {name: float(s) for name, s in (text.split("=") for text in args.dense_seconds)}
    for shape in args.shapes:
        if shape not in dense and not args.skip_dense:
            dense[shape] = child("dense", shape)["seconds"]
            print(f"one dense float32 SVD of {shape}: {dense[shape]:.1f} s", flush=True)
    print("| layer | clients | r | route | ms | dense SVD slower by | excess | extra MB "
          "| of reads | of products |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    seconds: dict[tuple[int, int], dict[str, float]] = {}
    for shape in args.shapes:
        m, n = sizes(shape)
        for rank in args.ranks:
            for clients in args.clients:
                bytes_in = 4 * clients * rank * (m + n)
                if bytes_in > LIMIT:
                    print(f"| {shape} | {clients} | {rank} | left out: {bytes_in / 1e9:.0f} GB |")
                    continue
                row = child("merge", shape, clients, rank, int(not args.no_reference))
                seconds.setdefault((clients, rank), {})[shape] = row["seconds"]
                print(line(shape, clients, rank, row, dense.get(shape), limits), flush=True)
    for (clients, rank), times in seconds.items():
        if set(times) == set(MODULES) and set(dense) >= set(MODULES):
            ours = LAYERS * sum(MODULES[shape] * times[shape] for shape in MODULES)
            full = LAYERS * sum(MODULES[shape] * dense[shape] for shape in MODULES)
            print(f"{LAYERS} layers x 7, {clients} clients, r = {rank}: {ours:.1f} s, "
                  f"dense {full / 3600:.1f} h, {full / ours:,.0f}x")  # fmt: skip


def line(
    shape: str,
    clients: int,
    rank: int,
    row: dict[str, float],
    dense: float | None,
    limits: dict[str, float],
) -> str:
    """One row of the table; the last two columns are the shares of what the machine can do."""
    m, n = sizes(shape)
    read = 4 * clients * rank * (m + n) / 1e9 / limits["read"] / row["seconds"]
    rate = limits["float32" if row["route"] == "krylov" else "float64"]
    work = row["flops"] / 1e9 / rate / row["seconds"]
    slower = f"{dense / row['seconds']:,.0f}x" if dense else "-"
    excess = f"{row['excess']:.0e}" if "excess" in row else "-"
    return (
        f"| {shape} | {clients} | {rank} | {row['route']} | {1000 * row['seconds']:,.0f} "
        f"| {slower} | {excess} | {row['extra'] / 1e6:,.0f} | {read:.0%} | {work:.0%} |"
    )


def sizes(shape: str) -> tuple[int, int]:
    m, n = shape.split("x")
    return int(m), int(n)


def child(*words: object) -> dict:
    """One case in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--case", ":".join(map(str, words))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def timed(function: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        began = perf_counter()
        function()
        times.append(perf_counter() - began)
    return times


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(text.split(f"{field}:")[1].split()[0])


def clients_of(shape: str, count: int, rank: int) -> list:
    """Clients of one layer: a common increment with a falling spectrum, and their own on top."""
    import torch

    from fedlora.adapter import Factors

    torch.set_num_threads(1)
    m, n = sizes(shape)
    draw = torch.Generator().manual_seed(0)
    A, B = torch.randn(rank, n, generator=draw), torch.randn(m, rank, generator=draw)
    fall = (0.9 ** torch.arange(rank))[:, None]
    sent = []
    for _ in range(count):
        own_A, own_B = torch.randn(rank, n, generator=draw), torch.randn(m, rank, generator=draw)
        sent.append(Factors((A + own_A / 2) * fall / n**0.5, (B + own_B / 2) / m**0.5, 2.0))
    return sent


def merge_case(shape: str, clients: str, rank: str, reference: str) -> dict:
    """Time, extra memory, operations and excess of FRA on one layer."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fedlora.adapter import Factors, mix
    from fedlora.routes import chosen_route
    from fedlora.rules import get_rule

    count, r = int(clients), int(rank)
    sent = clients_of(shape, count, r)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    rule = get_rule("fra")
    small = [Factors(c.A[:, :64].clone(), c.B[:64].clone(), 2.0) for c in sent[:20]]
    even = torch.full((len(small),), 1 / len(small), dtype=torch.float64)
    rule(small[0], small, even)  # loads the libraries
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    previous = Factors(torch.randn(r, sent[0].A.shape[1]), sent[0].B, 2.0)
    first = timed(lambda: rule(previous, sent, weights), 1)
    extra = memory("VmHWM") - before
    times = first + timed(lambda: rule(previous, sent, weights), 1 if first[0] > 5 else 4)
    m, n = sizes(shape)
    R = count * r
    route = chosen_route(R, r)
    result = {"seconds": min(times), "median": statistics.median(times), "extra": extra,
              "route": route}  # fmt: skip
    merged = rule(previous, sent, weights)
    if route == "gram":  # NumPy's symmetric products are not counted by torch
        result["flops"] = R * R * (m + n) + 4 * R * r * (m + n) + 10 * R**3
    else:
        with FlopCounterMode(display=False) as counter:
            rule(previous, sent, weights)
        result["flops"] = counter.get_total_flops()
    if int(reference) and (R <= SMALL or m * n * R < 1.5e11):
        result["excess"] = excess(mix(sent, weights, 2.0), merged, r)
    return result


def excess(mixed, merged, rank: int) -> float:
    """(||W - result|| - best) / best, with inner products of factors in float64.

    With result = U S V^T of W itself, ||W - result||^2 = ||W||^2 - 2 <W, result> + ||result||^2.
    """
    import torch

    A, B = mixed.A.double(), mixed.B.double()
    if len(A) <= SMALL:
        R_b, R_a = torch.linalg.qr(B, mode="r")[1], torch.linalg.qr(A.mT, mode="r")[1]
        squares = torch.linalg.svdvals(R_b @ R_a.mT).square()
    else:
        W = B @ A
        del A, B
        squares = torch.linalg.eigvalsh(W @ W.mT).flip(0)
        A, B = W, torch.eye(len(W), dtype=W.dtype)
    best = float(squares[rank:].sum())
    left = merged.B.double().mT @ B
    cross = float((left @ A * merged.A.double()).sum())
    own = float(((merged.B.mT @ merged.B) * (merged.A @ merged.A.mT)).sum())
    missed = float(squares.sum()) - 2 * cross + own
    return math.sqrt(max(missed, 0.0) / best) - 1


def dense_case(shape: str) -> dict:
    """One float32 SVD of the multiplied-out mean of ten clients of rank 16."""
    import torch

    torch.set_num_threads(1)
    from fedlora.adapter import increment, mix

    W = increment(mix(clients_of(shape, 10, 16), [0.1] * 10, 2.0))
    return {"seconds": timed(lambda: torch.linalg.svd(W, full_matrices=False), 1)[0]}


def limits_case() -> dict:
    """What one thread reads (GB/s) and multiplies (GFlop/s): the best of several runs."""
    import torch

    torch.set_num_threads(1)
    big = torch.ones(64 * 2**20)
    result = {"read": 4 * big.numel() / min(timed(lambda: big.sum(), 8)) / 1e9}
    for dtype in (torch.float32, torch.float64):
        square = torch.randn(2048, 2048, dtype=dtype)
        best = min(timed(lambda square=square: square @ square, 8))
        result[str(dtype).removeprefix("torch.")] = 2 * 2048**3 / best / 1e9
    return result


CASES = {"merge": merge_case, "dense": dense_case, "limits": limits_case}

if __name__ == "__main__":
    main()
