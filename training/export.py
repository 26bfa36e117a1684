"""Write a trained run as the package's bundled release.

    python training/export.py --run RUN --out FOLDER      (FOLDER already holds tokenizer.json)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from train import shape

from abyssal.checkpoint.save import save_model


def main() -> None:
    """FP4 experts, FP8 for the other matrices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    name = "final.pt" if (args.run / "final.pt").exists() else "state.pt"
    state = torch.load(args.run / name)
    save_model(state["model"], shape(), "flash", args.out, files_from=args.out)
    print(f"{name}, step {state['step']}: {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
