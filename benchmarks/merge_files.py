"""`fedlora merge` of 100 adapters of 11 MB beside reading their files once: time and memory.

    python benchmarks/merge_files.py [--adapters 10 100] [--rank 16] [--rule fra]

Random adapters of 48 layers (16 x 2048 x 2048, twice, and 16 x 512 x 2048) are made in a temporary
folder; each merge runs in a process of its own, so that its peak memory is its own. The files are
read once before, so that both times are from the page cache.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fedlora.adapter import Adapter, Factors
from fedlora.adapter_folder import TENSOR_FILE, open_folder, write_folder

SHAPES = {"q_proj": (2048, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048)}
BLOCKS = 16
SETTINGS = {"peft_type": "LORA", "target_modules": list(SHAPES), "r": 16, "lora_alpha": 32}
CHILD = """
import sys, time
from pathlib import Path
start = time.perf_counter()
from fedlora.cli import main
sys.argv[1:1] = ["merge"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print("measured", time.perf_counter() - start, peak)
"""


def make(folder: Path, count: int, rank: int) -> list[Path]:
    """Adapters with a part in common and a part of their own, the spectrum falling."""
    names = [f"model.layers.{b}.self_attn.{part}" for b in range(BLOCKS) for part in SHAPES]
    falling = 0.8 ** torch.arange(rank)
    folders = []
    for index in range(count):
        layers = {}
        for place, name in enumerate(names):
            m, n = SHAPES[name.rpartition(".")[2]]
            both = [torch.Generator().manual_seed(seed) for seed in (place, 1000 * index + place)]
            A = sum(torch.randn(rank, n, generator=g) for g in both)
            B = sum(torch.randn(m, rank, generator=g) for g in both) * falling
            layers[name] = Factors(A, B * 1e-3, 2.0)
        folders.append(folder / f"{index}")
        write_folder(folders[-1], Adapter(layers), SETTINGS)
    return folders


def read_once(folders: list[Path]) -> float:
    start = time.perf_counter()
    for folder in folders:
        (folder / TENSOR_FILE).read_bytes()
    return time.perf_counter() - start


def read_layers(folders: list[Path]) -> float:
    """All layers of all adapters as the merge reads them: one at a time, with its checks."""
    start = time.perf_counter()
    opened = [open_folder(folder) for folder in folders]
    for layer in opened[0].layers:
        for adapter in opened:
            adapter.factors(layer)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--rank", default="16")
    parser.add_argument("--rule", default="fra")
    args = parser.parse_args()
    print("| adapters | MB in | files read, s | layers read, s | merge, s | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folders = make(Path(temporary) / "in", max(args.adapters), 16)
        for count in args.adapters:
            chosen = folders[:count]
            size = sum((folder / TENSOR_FILE).stat().st_size for folder in chosen) / 1e6
            read_once(chosen)
            reading, layers = read_once(chosen), read_layers(chosen)
            out = Path(temporary) / f"out{count}"
            words = [*map(str, chosen), "--rule", args.rule, "--rank", args.rank, "-o", str(out)]
            command = [sys.executable, "-c", CHILD, *words]
            done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            wall, peak = map(float, done.splitlines()[-1].split()[1:])
            print(
                f"| {count} | {size:.0f} | {reading:.2f} | {layers:.2f} | {wall:.1f} | "
                f"{peak * 1024 / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
