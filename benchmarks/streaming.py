"""Run a Flash-shaped release within a memory limit, from disk.

    python benchmarks/streaming.py [--experts 256] [--tokens 64] [--limit 4GiB] [--out FILE]

Writes a random release with Flash's real widths and two blocks (CSA and HCA), runs `abyssal logits` on it in a
process of its own under --max-memory, and measures that process's peak memory and time, beside the rate at
which the same files are read plainly in the same run. Then compares the logits with the same release held in
memory. What this does not show: all 43 blocks (time grows with them, memory does not), or a cold disk: the
files were just written, so much of them comes from the page cache in both measurements.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.arch.presets import preset
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.checkpoint.load import load_model
from abyssal.cli.models import parse_bytes

GIB = 2**30


# the kernel's own mark of this address space: a child's ru_maxrss would also count its parent before exec
ABYSSAL = """
import atexit, sys
from abyssal.cli.main import main
def peak():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024, file=sys.stderr)
atexit.register(peak)
main()
"""


def abyssal(*arguments: str | Path) -> tuple[float, int]:
    """Run a verb in a process of its own; its seconds and peak bytes."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", ABYSSAL, *map(str, arguments)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"abyssal {arguments[0]} failed: {done.stderr}")
    return time.perf_counter() - begin, int(done.stderr.splitlines()[-1])


def read_rate(files: list[Path]) -> float:
    """Bytes per second of reading whole files in 16 MiB pieces."""
    begin, total = time.perf_counter(), 0
    buffer = bytearray(1 << 24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - begin)


def main() -> None:
    """Make, run, compare, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--limit", default="4GiB")
    parser.add_argument("--folder", type=Path, help="where the release is written; a temporary folder by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "streaming.json")
    args = parser.parse_args()
    config = replace(
        preset("flash"),
        num_hidden_layers=2,
        compress_ratios=(4, 128),
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        n_routed_experts=args.experts,
    )
    ids = [random.Random(1).randrange(config.vocab_size) for _ in range(args.tokens)]
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary) / "release"
        write_json(Path(temporary) / "config.json", config.to_dict())
        abyssal("make-release", Path(temporary) / "config.json", "--seed", "1", "--layout", "flash", "--out", folder)
        files = sorted(folder.glob("*.safetensors"))
        size = sum(f.stat().st_size for f in files)
        out = Path(temporary) / "logits.npy"
        text = ",".join(map(str, ids))
        seconds, peak = abyssal("logits", folder, "--ids", text, "--max-memory", args.limit, "--out", out)
        rate = read_rate(files)
        model = load_model(folder, keep_stored=True)
        with torch.inference_mode():
            whole = model(torch.tensor([ids]))[0].numpy()
        difference = float(np.abs(np.load(out) - whole).max())
    limit = parse_bytes(args.limit)
    machine = this_machine()
    result: dict[str, Any] = {
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory": machine.memory_total},
        "torch": torch.__version__,
        "release_bytes": size,
        "experts": args.experts,
        "tokens": args.tokens,
        "limit_bytes": limit,
        "peak_bytes": peak,
        "peak_of_limit": peak / limit,
        "seconds": seconds,
        "plain_read_bytes_per_s": rate,
        "seconds_of_plain_read": seconds / (size / rate),
        "largest_difference_to_memory": difference,
        "logits_std": float(whole.std()),
    }
    print(
        f"release {size / GIB:.2f} GiB, limit {limit / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB"
        f" ({100 * peak / limit:.0f}% of the limit)\n"
        f"{args.tokens} tokens in {seconds:.1f} s, {seconds / (size / rate):.1f} times a plain read of all files\n"
        f"largest difference to the release in memory {difference:.1e}, logits' std {whole.std():.2f}"
    )
    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
