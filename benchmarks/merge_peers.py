"""One layer's increments averaged to rank r by what people use today: time, memory, error.

    python benchmarks/merge_peers.py [--shape 1024x2816] [--clients 10] [--repeats 3]

Each contestant merges the same float32 clients in a process of its own, one thread, interleaved.
"Error" is ||W - result|| / ||W|| against the dense float64 mean W; "excess" the same over the best
error of that rank, less one.

* PEFT svd, linear: `add_weighted_adapter` of a model with one linear layer, as published
* dense SVD: the mean multiplied out in float32, `torch.linalg.svd`, cut (as in FlexLoRA)
* QR + small SVD: of the stacked factors in float32 (as in NVFlare's example)
* fedlora: the rule `fra`
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from merge_speed import memory, sizes
from torch import Tensor, nn

from fedlora.adapter import Factors
from fedlora.rules import get_rule

CASES = {  # name: ranks (in turn), alpha as a function of the rank, rsLoRA
    "equal, r = 16": ((16,), lambda rank: 32, False),
    "mixed ranks, alphas": ((4, 8, 16, 32), lambda rank: 16, False),
    "equal, rsLoRA": ((16,), lambda rank: 16, True),
    "mixed, rsLoRA": ((4, 8, 16, 32), lambda rank: 16, True),
}
RANK = 16
Clients = list[tuple[Tensor, Tensor, int, float]]  # A, B, alpha, weight
Merge = Callable[[Clients, bool], Callable[[], tuple[Tensor, Tensor, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="1024x2816")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="one contestant in this process: NAME:CASE; prints JSON")
    args = parser.parse_args()
    if args.only:
        peer, case = args.only.split(":")
        print(json.dumps(measured(peer, case, args.shape, args.clients)))
        return
    print(f"{args.shape}, {args.clients} clients, to rank {RANK}; one thread")
    print("| clients | merged by | ms | fedlora is faster by | extra MB | error | excess |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        rows: dict[str, list[dict]] = {name: [] for name in PEERS}
        for _ in range(args.repeats):
            for name in PEERS:
                rows[name].append(child(name, case, args.shape, args.clients))
        for name, runs in rows.items():
            if "refused" in runs[0]:
                print(f"| {case} | {name} | refused: {runs[0]['refused']} | | | | |")
                continue
            ratio = statistics.median(
                run["seconds"] / ours["seconds"]
                for run, ours in zip(runs, rows["fedlora"], strict=True)
            )
            print(
                f"| {case} | {name} | {1000 * min(run['seconds'] for run in runs):,.0f} "
                f"| {ratio:,.1f}x | {max(run['extra'] for run in runs) / 1e6:,.0f} "
                f"| {runs[0]['error']:.3f} | {runs[0]['excess']:.1e} |",
                flush=True,
            )


def child(name: str, case: str, shape: str, clients: int) -> dict:
    command = [sys.executable, __file__, "--only", f"{name}:{case}", "--shape", shape,
               "--clients", str(clients)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def measured(peer: str, case: str, shape: str, count: int) -> dict:
    """Time, extra memory and excess of one merge; the libraries are loaded by a small one before.

    Preparing (a PEFT model with its adapters) is neither timed nor counted.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    m, n = sizes(shape)
    _, _, rs = CASES[case]
    small = drawn(case, 48, 40, count)
    clients = drawn(case, m, n, count)
    try:
        PEERS[peer](small, rs)()
        run = PEERS[peer](clients, rs)
    except ValueError as error:
        return {"refused": str(error).split(" when")[0]}
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = perf_counter()
    A, B, scaling = run()
    seconds = perf_counter() - began
    extra = memory("VmHWM") - before
    if seconds < 1:
        seconds = min(seconds, *(again(PEERS[peer](clients, rs)) for _ in range(5)))
    W = torch.zeros(m, n, dtype=torch.float64)
    for lora_A, lora_B, alpha, weight in clients:
        W += weight * scaling_of(alpha, len(lora_A), rs) * (lora_B.double() @ lora_A.double())
    gram = W @ W.mT if m <= n else W.mT @ W
    best = math.sqrt(float(torch.linalg.eigvalsh(gram)[:-RANK].sum()))
    missed = float((W - scaling * (B.double() @ A.double())).norm())
    error = missed / float(W.norm())
    return {"seconds": seconds, "extra": extra, "error": error, "excess": missed / best - 1}


def again(run: Callable[[], object]) -> float:
    began = perf_counter()
    run()
    return perf_counter() - began


def scaling_of(alpha: int, rank: int, rs: bool) -> float:
    return alpha / math.sqrt(rank) if rs else alpha / rank


def drawn(case: str, m: int, n: int, count: int) -> Clients:
    """Clients with a common increment of falling spectrum and half as much of their own."""
    ranks, alpha, _ = CASES[case]
    draw = torch.Generator().manual_seed(0)
    A, B = torch.randn(max(ranks), n, generator=draw), torch.randn(m, max(ranks), generator=draw)
    fall = (0.9 ** torch.arange(max(ranks)))[:, None]
    weights = torch.arange(1, count + 1) / sum(range(1, count + 1))
    clients = []
    for index in range(count):
        own_A = torch.randn(A.shape, generator=draw)
        own_B = torch.randn(B.shape, generator=draw)
        r = ranks[index % len(ranks)]
        lora_A = ((A + own_A / 2) * fall / n**0.5)[:r]
        lora_B = ((B + own_B / 2) / m**0.5)[:, :r]
        clients.append((lora_A.clone(), lora_B.clone(), alpha(r), float(weights[index])))
    return clients


def with_peft(kind: str) -> Merge:
    def prepare(clients: Clients, rs: bool) -> Callable[[], tuple[Tensor, Tensor, float]]:
        from peft import LoraConfig, get_peft_model

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(len(clients[0][0][0]), len(clients[0][1]), bias=False)

        model = None
        for index, (lora_A, lora_B, alpha, _) in enumerate(clients):
            name = f"c{index}"
            config = LoraConfig(
                r=len(lora_A), lora_alpha=alpha, use_rslora=rs, target_modules=["linear"]
            )
            if model is None:
                model = get_peft_model(Net(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            layer = model.base_model.model.linear
            layer.lora_A[name].weight.data.copy_(lora_A)
            layer.lora_B[name].weight.data.copy_(lora_B)
        assert model is not None
        names = [f"c{index}" for index in range(len(clients))]
        weights = [weight for *_, weight in clients]
        if len({len(lora_A) for lora_A, *_ in clients}) > 1 and kind == "linear":
            raise ValueError("all adapters must have the same r")

        def run() -> tuple[Tensor, Tensor, float]:
            options = {"svd_rank": RANK} if kind == "svd" else {}
            model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
            layer = model.base_model.model.linear
            A, B = layer.lora_A["merged"].weight.data, layer.lora_B["merged"].weight.data
            return A, B, layer.scaling["merged"]

        return run

    return prepare


def dense_svd(clients: Clients, rs: bool) -> Callable[[], tuple[Tensor, Tensor, float]]:
    def run() -> tuple[Tensor, Tensor, float]:
        W = torch.zeros(len(clients[0][1]), clients[0][0].shape[1])
        for A, B, alpha, weight in clients:
            W += weight * scaling_of(alpha, len(A), rs) * (B @ A)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return Vh[:RANK], U[:, :RANK] * S[:RANK], 1.0

    return run


def qr_small_svd(clients: Clients, rs: bool) -> Callable[[], tuple[Tensor, Tensor, float]]:
    def run() -> tuple[Tensor, Tensor, float]:
        A = torch.cat([A for A, *_ in clients])
        B = torch.cat([w * scaling_of(a, len(A), rs) * B for A, B, a, w in clients], dim=1)
        Q_b, R_b = torch.linalg.qr(B)
        Q_a, R_a = torch.linalg.qr(A.mT)
        U, S, Vh = torch.linalg.svd(R_b @ R_a.mT, full_matrices=False)
        return Vh[:RANK] @ Q_a.mT, Q_b @ (U[:, :RANK] * S[:RANK]), 1.0

    return run


def fedlora(clients: Clients, rs: bool) -> Callable[[], tuple[Tensor, Tensor, float]]:
    sent = [Factors(A, B, scaling_of(alpha, len(A), rs)) for A, B, alpha, _ in clients]
    weights = torch.tensor([weight for *_, weight in clients], dtype=torch.float64)
    weights /= weights.sum()
    previous = Factors(torch.ones(RANK, sent[0].shape[1]), torch.zeros(sent[0].shape[0], RANK), 2.0)
    rule = get_rule("fra")

    def run() -> tuple[Tensor, Tensor, float]:
        merged = rule(previous, sent, weights)
        return merged.A, merged.B, merged.scaling

    return run


PEERS: dict[str, Merge] = {
    "fedlora": fedlora,
    "QR + small SVD": qr_small_svd,
    "dense SVD": dense_svd,
    "PEFT svd": with_peft("svd"),
    "PEFT linear": with_peft("linear"),
}

if __name__ == "__main__":
    main()
