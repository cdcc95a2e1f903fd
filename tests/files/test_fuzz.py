"""Random damage to adapters and bases: a command ends well or with a typed error, and leaves no OUT half done."""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import prolora_tools
from prolora_tools.errors import ProloraError
from tests.failing import build
from tests.support import tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ROUNDS = 60
"""Damaged folders a test tries; each is a few milliseconds."""

PROLORA_FOLDER = build.prolora({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}})
DORA = build.adapter({"use_dora": True}, {**build.factors(), f"{build.Q}.lora_magnitude_vector": build.numbers(4)})
BASE = build.indexed(
    {"metadata": {"total_size": 128}, "weight_map": {f"{build.Q}.weight": "a.safetensors", "norm": "b.safetensors"}},
    {
        "a.safetensors": build.safetensors({f"{build.Q}.weight": build.numbers(4, 4)}),
        "b.safetensors": build.safetensors({"norm": build.numbers(4, dtype="BF16")}),
    },
)
ODD: list[Any] = [None, True, -1, 0, 3, 2**64, 10**30, 1.5, 1e308, float("nan"), "", "x", "\ud800", "\0", [], [[]], {}]
BYTES = b'\x00\xff"{}[],:0123456789aANn.-eE\\u'


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A test that takes a minute hangs."""

    def stop(number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a handler
        raise TimeoutError("a damaged input made a command hang")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def damaged_bytes(raw: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled or put in."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] = rng.choice(BYTES)
            case 1 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at : at + rng.randint(1, 16)]
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 16)]
            case _:
                data[at:at] = bytes(rng.choice(BYTES) for _ in range(rng.randint(1, 3)))
    return bytes(data)


def damaged_json(value: Any, rng: random.Random) -> Any:
    """A JSON value with one place in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        changed = dict(value)
        match rng.randrange(5):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(["", "x", "\0", f"{key}.", rng.choice(list(value))])] = value[key]
            case _:
                changed[key] = damaged_json(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], damaged_json(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 2, 8])
    return rng.choice(ODD)


def damaged_file(name: str, raw: bytes, rng: random.Random) -> bytes:
    """A file of a model or adapter folder, damaged as bytes or in its JSON."""
    if rng.random() < 0.4:
        return damaged_bytes(raw, rng)
    if name.endswith(".json"):
        return json.dumps(damaged_json(json.loads(raw), rng)).encode()
    if name.endswith(".safetensors"):
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        return build.pack(damaged_json(header, rng), raw[8 + length :])
    return damaged_bytes(raw, rng)


def try_damaged(files: dict[str, bytes], damage: str, seed: int, use: Callable[[], object], folder: Path) -> int:
    """Damage the files under `damage` in many ways and use them. Returns how often that was refused."""
    refused = 0
    for round_ in range(ROUNDS):
        rng = random.Random(f"{seed} {round_}")
        names = [name for name in files if name.startswith(damage)]
        changed = dict(files)
        for name in rng.sample(names, rng.randint(1, min(2, len(names)))):
            changed[name] = damaged_file(name, files[name], rng)
        shutil.rmtree(folder)
        build.write(folder, changed)
        before = build.files_in(folder)
        error = refusal(use, f"round {round_} of seed {seed}")
        if error is not None:
            refused += 1
            assert error.hint
            assert error.exit_code == 1, f"{error.code}: a broken file is not wrong usage"
            assert build.files_in(folder) == before
    return refused


def refusal(use: Callable[[], object], label: str) -> ProloraError | None:
    """The typed error of a call, if any; any other error fails the test."""
    try:
        use()
    except ProloraError as error:
        return error
    except Exception as error:
        raise AssertionError(f"{label}: {error!r}") from error
    return None


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["lora", "dora", "prolora"])
def test_damaged_adapters(kind: str, seed: int, folder: Path) -> None:
    files = {"lora": build.adapter(), "dora": DORA, "prolora": PROLORA_FOLDER}[kind]

    def use() -> None:
        prolora_tools.stats(folder / "adapter")
        prolora_tools.diff(folder / "adapter", folder / "adapter") if kind != "dora" else None
        prolora_tools.expand(folder / "adapter", folder / "OUT")
        if kind == "lora":
            prolora_tools.expand(folder / "adapter", folder / "UNIFORM", uniform=True)

    refused = try_damaged(files, "adapter", seed, use, folder)
    assert refused > ROUNDS / 2


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_adapters_compressed(seed: int, folder: Path) -> None:
    def use() -> None:
        prolora_tools.compress(folder / "adapter", folder / "OUT", unshared=0, chunks=2)

    assert try_damaged(build.adapter(), "adapter", seed, use, folder) > ROUNDS / 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("damage", ["adapter", "base"])
def test_damaged_merges(damage: str, seed: int, folder: Path) -> None:
    def use() -> None:
        prolora_tools.merge(folder / "adapter", folder / "OUT", base=folder / "base")
        prolora_tools.verify(folder / "OUT", base=folder / "base", adapter=folder / "adapter")

    refused = try_damaged({**PROLORA_FOLDER, **BASE}, damage, seed, use, folder)
    assert refused > ROUNDS / 3


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_merged_models(seed: int, folder: Path) -> None:
    """What verify calls sound holds the right numbers, by the safetensors library's reading."""
    build.write(folder, {**PROLORA_FOLDER, **BASE})
    prolora_tools.merge(folder / "adapter", folder / "merged", base=folder / "base")
    files, expected = build.files_in(folder), tensors_of(folder / "merged")
    verdicts = []

    def use() -> None:
        report = prolora_tools.verify(folder / "merged", base=folder / "base", adapter=folder / "adapter")
        verdicts.append(report.ok)
        if not report.ok:
            return
        found = tensors_of(folder / "merged")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].double(), tensor.double(), rtol=1e-5, atol=1e-6)

    assert try_damaged(files, "merged", seed, use, folder) > ROUNDS / 4
    weights = [name for name in files if name.startswith("merged") and name.endswith(".safetensors")]
    for name in weights:  # one number, always
        build.write(folder, {**files, name: files[name][:-1] + bytes([files[name][-1] ^ 1])})
        use()
    assert verdicts[-len(weights) :] == [False] * len(weights)


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_pickles(seed: int, folder: Path) -> None:
    state = {f"base_model.model.{name}": torch.ones(tensor.shape) for name, tensor in build.factors().items()}
    for zipped in (False, True):
        torch.save(state, folder / "x.bin", _use_new_zipfile_serialization=zipped)
        raw = (folder / "x.bin").read_bytes()
        files = build.with_bin(raw)
        assert try_damaged(
            files, "adapter/adapter_model", seed, lambda: prolora_tools.stats(folder / "adapter"), folder
        )
        (folder / "x.bin").unlink(missing_ok=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_pickled_bases(seed: int, folder: Path) -> None:
    torch.save({f"{build.Q}.weight": torch.ones(4, 4), "norm": torch.ones(4)}, folder / "x.bin")
    base = {name: raw for name, raw in BASE.items() if name == "base/config.json"}
    files = {**PROLORA_FOLDER, **base, "base/pytorch_model.bin": (folder / "x.bin").read_bytes()}

    def use() -> None:
        prolora_tools.merge(folder / "adapter", folder / "OUT", base=folder / "base")
        prolora_tools.verify(folder / "OUT", base=folder / "base", adapter=folder / "adapter")

    assert try_damaged(files, "base/pytorch_model", seed, use, folder) > ROUNDS / 4


def four_bit() -> dict[str, torch.Tensor]:
    """A doubly quantised nf4 weight of 4 x 4 in blocks of 2, and its state, as bitsandbytes stores them."""
    state = {"quant_type": "nf4", "blocksize": 2, "dtype": "bfloat16", "shape": [4, 4]}
    raw = json.dumps(state | {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.5}).encode()
    return {
        "": torch.arange(8, dtype=torch.uint8).reshape(8, 1),
        ".absmax": torch.arange(8, dtype=torch.uint8),
        ".quant_map": torch.linspace(-1, 1, 16),
        ".nested_absmax": torch.ones(2),
        ".nested_quant_map": torch.linspace(-1, 1, 256),
        ".quant_state.bitsandbytes__nf4": torch.tensor(list(raw), dtype=torch.uint8),
    }


QUANTISED = {
    "bitsandbytes": four_bit(),
    "fp8": {"": torch.ones(4, 4).to(torch.float8_e4m3fn), "_scale_inv": torch.ones(2, 2)},
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", sorted(QUANTISED))
def test_damaged_quantised_bases(method: str, seed: int, folder: Path) -> None:
    save_file({f"{build.Q}.weight{end}": tensor for end, tensor in QUANTISED[method].items()}, folder / "x.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": method, "weight_block_size": [2, 2]}}
    files = {
        **PROLORA_FOLDER,
        "base/config.json": json.dumps(config).encode(),
        "base/model.safetensors": (folder / "x.safetensors").read_bytes(),
    }

    def use() -> None:
        prolora_tools.merge(folder / "adapter", folder / "OUT", base=folder / "base", allow_nonfinite=True)
        prolora_tools.verify(folder / "OUT", base=folder / "base", adapter=folder / "adapter")

    assert try_damaged(files, "base", seed, use, folder) > ROUNDS / 4
