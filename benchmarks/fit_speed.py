"""Time and memory of `compress` where adapters are large. Prints JSON, a line a measurement.

    python benchmarks/fit_speed.py [--layers 32] [--rank 64] [--unshared 0] [--chunks 2] [--method fit]
    python benchmarks/fit_speed.py --calibrated [--layers 30] [--tokens 16384] [--outputs] [--text TEXT]
    python benchmarks/fit_speed.py --widths 704 4096 11008

The first is a rank-64, all-linear adapter of LLaMA2-7B's shapes, fitted without statistics; --calibrated is the whole
command, the statistics included, on a rank-16 adapter and a base with random weights, both of SmolLM-135M's shapes;
--widths is one module's fit in a calibrated norm, with the moments that calibration would keep: dense up to 2,048
features, a sketch above. All are random, adapters with a decaying spectrum, as trained ones have.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prolora_tools.core.fitting import fit
from prolora_tools.core.geometry import Geometry
from prolora_tools.core.moments import Moments
from prolora_tools.files import dtypes
from prolora_tools.files.writer import write_safetensors

if TYPE_CHECKING:
    from collections.abc import Mapping

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 11008),
    "mlp.up_proj": (4096, 11008),
    "mlp.down_proj": (11008, 4096),
}
SMALL = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}
DEMO = Path(__file__).parents[1] / "demo"


def make(folder: Path, layers: int, rank: int, modules: Mapping[str, tuple[int, int]] = SHAPES) -> None:
    """Write the adapter, bfloat16, one tensor in memory at a time."""
    specs: list[tuple[str, str, tuple[int, int]]] = []
    numbers: dict[str, tuple[int, tuple[int, int], str]] = {}
    for layer in range(layers):
        for name, (inputs, outputs) in modules.items():
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


def make_base(folder: Path, layers: int) -> None:
    """A model of SmolLM-135M's shape with random weights, and the bundled tokenizer, whose ids are fewer."""
    import torch  # noqa: PLC0415 - for this benchmark only
    import transformers  # noqa: PLC0415

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in (DEMO / "models/llama-tiny-en").glob("tokenizer*"):
        shutil.copy(file, folder)


def calibrated(scratch: Path, options: argparse.Namespace) -> None:
    """The command with --calibrate, and once more with the statistics that it saved."""
    make(scratch / "lora", options.layers, options.rank, SMALL)
    make_base(scratch / "base", options.layers)
    shape = ["--unshared", str(options.unshared), "--chunks", str(options.chunks), "--strides", options.strides]
    collect = ["--calibrate", str(options.text), "--base", str(scratch / "base")]
    collect += ["--calibrate-tokens", str(options.tokens), *(["--calibrate-outputs"] if options.outputs else [])]
    for name, more in (("calibrate and fit", collect), ("fit", [])):
        command = [sys.executable, "-m", "prolora_tools", "compress", str(scratch / "lora"), "-o", str(scratch / name)]
        command += [*shape, *more, "--statistics", str(scratch / "statistics"), "--json", "--quiet"]
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        printed = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0, "the command failed"
        report = json.loads(printed)
        result = {
            "command": name,
            "seconds": round(time.perf_counter() - begun, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_mb": round(usage.ru_maxrss / 1024),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "tokens": options.tokens,
            "outputs": options.outputs,
            "rank": options.rank,
            "unshared": options.unshared,
            "chunks": options.chunks,
            "strides": options.strides,
            "modules": len(report["modules"]),
            "calibrated_error": report["calibrated_error"],
            "svd_calibrated_error": report["svd_calibrated_error"],
        }
        print(json.dumps(result), flush=True)


def moments(dim: int, seed: int) -> Moments:
    """Of inputs whose variance decays over the directions, as calibration would keep them."""
    from prolora_tools.operations.calibrate import DENSE, ROWS  # noqa: PLC0415 - beside its only use

    rng = np.random.default_rng(seed)
    count = 4 * min(dim, DENSE)
    x = rng.standard_normal((count, dim), dtype=np.float32)
    x *= np.exp(-np.arange(dim, dtype=np.float32) * 6 / dim)
    if dim <= DENSE:
        return Moments.of_matrix(x.T.astype(np.float64) @ x / count)
    rows = np.zeros((ROWS, dim))
    np.add.at(rows, rng.integers(ROWS, size=count), x * rng.choice([-1.0, 1.0], (count, 1)))
    return Moments.of_sketch(rows / np.sqrt(count), np.mean(np.square(x, dtype=np.float64), axis=0))


def width(dim: int, options: argparse.Namespace) -> None:
    """One module's fit, inputs calibrated, and inputs and outputs."""
    rng = np.random.default_rng(0)
    decay = np.exp(-np.arange(options.rank) * 4 / options.rank)[:, None]
    a, bt = (rng.standard_normal((options.rank, dim)) * decay * 0.02 for _ in range(2))
    geometry = Geometry(options.rank, options.unshared, options.chunks, options.chunks)
    norms, rank = (moments(dim, 1), moments(dim, 2)), geometry.parameters(dim, dim) // (2 * dim)
    for name, pair in (("inputs", (norms[0], None)), ("inputs and outputs", norms)):
        took = []
        for _ in range(options.repeat):
            begun = time.perf_counter()
            quality = fit(a, bt, geometry, method="fit", moments=pair)[1]
            took.append(time.perf_counter() - begun)
        result = {
            "width": dim,
            "norm": name,
            "seconds": round(min(took), 2),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "load": os.getloadavg()[0],
            "rank": options.rank,
            "unshared": options.unshared,
            "chunks": options.chunks,
            "error": quality.calibrated_error / quality.calibrated_norm,
            "svd_error": quality.svd_calibrated_error(rank) / quality.calibrated_norm,
        }
        print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--unshared", type=int)
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--method", default="fit")
    parser.add_argument("--calibrated", action="store_true", help="the whole command on a model of 135M parameters")
    parser.add_argument("--tokens", type=int, default=16_384, help="with --calibrated: of the text")
    parser.add_argument("--outputs", action="store_true", help="with --calibrated: output gradients too")
    parser.add_argument("--strides", default="free", help="with --calibrated: as the command's")
    parser.add_argument("--text", type=Path, default=DEMO / "text/python_calibration.txt", help="with --calibrated")
    parser.add_argument("--widths", type=int, nargs="+", help="one module of each width, calibrated")
    parser.add_argument("--repeat", type=int, default=1, help="with --widths: the fastest of so many")
    parser.add_argument("--child", nargs=2, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    layers, rank, unshared, chunks = (30, 16, 4, 3) if options.calibrated or options.widths else (32, 64, 0, 2)
    defaults = {"layers": layers, "rank": rank, "unshared": unshared, "chunks": chunks}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.child:
        child(options.child[0], options.child[1], options.unshared, options.chunks, options.method)
        return
    if options.widths:
        for dim in options.widths:
            width(dim, options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.calibrated:
            calibrated(Path(scratch), options)
            return
        make(Path(scratch) / "lora", options.layers, options.rank)
        numbers = [f"--{k}={getattr(options, k)}" for k in ("unshared", "chunks", "method")]
        places = [f"{scratch}/lora", f"{scratch}/out"]
        subprocess.run([sys.executable, __file__, *numbers, "--child", *places], check=True)


if __name__ == "__main__":
    main()
