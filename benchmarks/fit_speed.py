"""Time and memory of `compress` on a rank-64, all-linear adapter of LLaMA2-7B's shapes. Prints JSON.

    python benchmarks/fit_speed.py [--layers 32] [--unshared 0] [--chunks 2] [--method fit]

The adapter is random with a decaying spectrum, as a trained one has; it is made in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from prolora_tools.files import dtypes
from prolora_tools.files.writer import write_safetensors

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 11008),
    "mlp.up_proj": (4096, 11008),
    "mlp.down_proj": (11008, 4096),
}


def make(folder: Path, layers: int, rank: int) -> None:
    """Write the adapter, bfloat16, one tensor in memory at a time."""
    specs: list[tuple[str, str, tuple[int, int]]] = []
    numbers: dict[str, tuple[int, tuple[int, int], str]] = {}
    for layer in range(layers):
        for name, (inputs, outputs) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                specs.append((f"{key}.lora_{side}.weight", "BF16", shape))
                numbers[specs[-1][0]] = len(numbers), shape, side

    def data(name: str) -> bytes:
        seed, shape, side = numbers[name]
        values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * 0.02
        decay = np.exp(-np.arange(rank, dtype=np.float32) * 4 / rank)
        return dtypes.encode(values * (decay[:, None] if side == "A" else decay), "BF16").tobytes()

    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", specs, data)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "bias": "none", "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def child(source: str, out: str, unshared: int, chunks: int, method: str) -> None:
    from prolora_tools.operations.compress import compress  # noqa: PLC0415 - timed without torch in this process

    begun = time.perf_counter()
    report = compress(source, out, unshared=unshared, chunks=chunks, method=method)  # type: ignore[arg-type] # checked there
    result = {
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "unshared": unshared,
        "chunks": chunks,
        "method": method,
        "modules": len(report.modules),
        "parameters": report.parameters,
        "relative_error": report.relative_error,
        "svd_relative_error": report.svd_relative_error,
        "strides": sorted({(m.stride_a, m.stride_b) for m in report.modules}),
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--unshared", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--method", default="fit")
    parser.add_argument("--child", nargs=2, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.child[1], options.unshared, options.chunks, options.method)
        return
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch) / "lora", options.layers, options.rank)
        numbers = [f"--{k}={getattr(options, k)}" for k in ("unshared", "chunks", "method")]
        places = [f"{scratch}/lora", f"{scratch}/out"]
        subprocess.run([sys.executable, __file__, *numbers, "--child", *places], check=True)


if __name__ == "__main__":
    main()
