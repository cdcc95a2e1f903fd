"""Statistics of a real model's layers, and fits in their norm."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import prolora_tools
from prolora_tools.cli import main, tables
from prolora_tools.core.allocation import candidates
from prolora_tools.core.fitting import LENGTHEN, fit_many
from prolora_tools.errors import InputError, MismatchError, RequestError
from prolora_tools.files.adapter import Adapter
from prolora_tools.files.tensors import StoredTensor
from prolora_tools.operations import calibrate as operation
from prolora_tools.operations import shapes
from prolora_tools.operations.calibrate import Statistics, calibrate
from tests.operations import second_device
from tests.support import ROOT, model

if TYPE_CHECKING:
    from prolora_tools.core.fitting import Pair

BASE, ADAPTER = model("gpt2-tiny-en"), model("gpt2-tiny-py-r8")
TEXT = Path(json.__file__)  # Python source, as the adapter was trained on
SMALL: dict[str, Any] = {"base": BASE, "text": TEXT, "tokens": 512, "length": 64, "batch": 4}


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return calibrate(ADAPTER, outputs=True, **SMALL)


def test_inputs_are_those_of_the_merged_model(statistics: Statistics, tmp_path: Path) -> None:
    """Oracle: merge writes the model, and a plain hook sees its inputs, all windows kept."""
    prolora_tools.merge(ADAPTER, tmp_path / "m", base=BASE)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids = AutoTokenizer.from_pretrained(BASE)(TEXT.read_text(), add_special_tokens=False)["input_ids"]
    count = len(ids) // 64
    wanted = min(count, 8)
    windows = [ids[i * count // wanted * 64 :][:64] for i in range(wanted)]
    assert statistics.tokens == wanted * 64
    adapter = Adapter.open(ADAPTER)
    for path in list(adapter.modules)[:3]:
        seen: list[torch.Tensor] = []
        handle = network.get_submodule(path).register_forward_hook(lambda _m, i, _o, seen=seen: seen.append(i[0]))
        with torch.no_grad():
            network(torch.tensor(windows))
        handle.remove()
        x = seen[0].reshape(-1, seen[0].shape[-1]).double().numpy()
        dim = adapter.modules[path].in_features
        found = statistics.moments(path, "input", dim)
        assert found is not None
        expected = x.T @ x / len(x)
        expected += 1e-3 * np.trace(expected) / dim * np.eye(dim)
        np.testing.assert_allclose(found.apply(np.eye(dim)), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_every_module_has_inputs_and_outputs(statistics: Statistics) -> None:
    for path, module in Adapter.open(ADAPTER).modules.items():
        assert statistics.moments(path, "input", module.in_features) is not None
        outputs = statistics.moments(path, "output", module.out_features)
        assert outputs is not None
        assert np.linalg.eigvalsh(outputs.apply(np.eye(module.out_features))).min() > 0
    with pytest.raises(MismatchError, match=r"for .* features"):
        statistics.moments(path, "input", module.in_features + 1)


def test_the_same_seed_gives_the_same_file_and_a_file_gives_the_same_fit(
    statistics: Statistics, tmp_path: Path
) -> None:
    statistics.save(tmp_path / "one")
    calibrate(ADAPTER, outputs=True, **SMALL).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    calibrate(ADAPTER, outputs=True, **{**SMALL, "seed": 1}).save(tmp_path / "other")
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()
    shape: dict[str, Any] = {"unshared": 1, "chunks": 3}
    first = prolora_tools.compress(ADAPTER, tmp_path / "a", statistics=statistics, **shape)
    second = prolora_tools.compress(ADAPTER, tmp_path / "b", statistics=tmp_path / "one", **shape)
    assert first.calibrated_error == second.calibrated_error
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_moments_are_held_for_few_modules_at_a_time(
    statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many at a time, the same bytes."""
    held: list[int] = []

    def counted(pairs: Any, *args: Any, **options: Any) -> Any:
        held.append(len(pairs))
        return fit_many(pairs, *args, **options)

    monkeypatch.setattr("prolora_tools.operations.compress.fit_many", counted)
    shape: dict[str, Any] = {"unshared": 1, "chunks": 7, "strides": "official", "statistics": statistics}
    prolora_tools.compress(ADAPTER, tmp_path / "many", **shape)
    assert max(held) > 1
    held.clear()
    monkeypatch.setattr(shapes, "_MOMENTS", 1)
    prolora_tools.compress(ADAPTER, tmp_path / "one", **shape)
    assert set(held) == {1}
    name = "adapter_model.safetensors"
    assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_calibrated_fit_is_better_where_it_matters(statistics: Statistics, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"unshared": 1, "chunks": 3, "strides": "official"}
    reports = {
        method: prolora_tools.compress(ADAPTER, tmp_path / method, method=method, statistics=statistics, **shape)
        for method in ("align", "fit")
    }
    fitted, aligned = reports["fit"].calibrated_error, reports["align"].calibrated_error
    assert fitted is not None
    assert aligned is not None
    assert fitted < 0.8 * aligned
    assert reports["fit"].svd_calibrated_error == pytest.approx(reports["align"].svd_calibrated_error)


def test_sketches_of_wide_layers_stand_for_the_whole(statistics: Statistics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "DENSE", 16)
    monkeypatch.setattr(operation, "ROWS", 256)
    sketched = calibrate(ADAPTER, **SMALL)
    assert all(".sketch:" in name or ".diagonal:" in name for name in sketched.arrays)
    path, module = next(iter(Adapter.open(ADAPTER).modules.items()))
    eye = np.eye(module.in_features)
    whole, sketch = (s.moments(path, "input", module.in_features) for s in (statistics, sketched))
    assert whole is not None
    assert sketch is not None
    full = whole.apply(eye)
    np.testing.assert_allclose(np.diag(sketch.apply(eye)), np.diag(full), rtol=0.05)
    assert np.linalg.norm(sketch.apply(eye) - full) < 0.3 * np.linalg.norm(full)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth of the shapes that are tried, for time."""
    monkeypatch.setattr(shapes, "candidates", lambda *dims: candidates(*dims)[::4])


def relative(folder: Path, statistics: Statistics) -> float:
    """The total error of a compressed adapter in the norm, dense: oracle of the report's."""
    error = norm = 0.0
    for path, module in Adapter.open(ADAPTER).modules.items():
        deltas = []
        for found in (module, Adapter.open(folder).modules[path]):
            a, b = found.factors()
            deltas.append(found.scaling * b.astype(np.float64) @ a.astype(np.float64))
        moments = [
            statistics.moments(path, "input", module.in_features),
            statistics.moments(path, "output", module.out_features),
        ]
        c, g = (m.apply(np.eye(m.dim)) for m in moments if m is not None)
        square = [float(np.sum((g @ d @ c) * d)) for d in (deltas[0] - deltas[1], deltas[0])]
        error, norm = error + square[0], norm + square[1]
    return float(np.sqrt(error / norm))


@pytest.mark.usefixtures("few")
def test_a_calibrated_budget_is_small_in_the_norm(statistics: Statistics, tmp_path: Path) -> None:
    """Smaller in the norm than one shape for all, and than shapes chosen without the statistics."""
    chosen = prolora_tools.compress(ADAPTER, tmp_path / "chosen", ratio=2, statistics=statistics)
    assert chosen.budget is not None
    assert 0.9 * chosen.budget < chosen.parameters <= chosen.budget
    assert relative(tmp_path / "chosen", statistics) == pytest.approx(chosen.calibrated_error, rel=1e-4)
    uniform = prolora_tools.compress(ADAPTER, tmp_path / "u", unshared=2, chunks=3, statistics=statistics)
    assert uniform.parameters == pytest.approx(chosen.parameters, rel=0.02)
    prolora_tools.compress(ADAPTER, tmp_path / "plain", ratio=2)
    assert chosen.calibrated_error is not None
    assert uniform.calibrated_error is not None
    assert chosen.calibrated_error < 0.9 * uniform.calibrated_error
    assert chosen.calibrated_error < 0.9 * relative(tmp_path / "plain", statistics)
    assert any(m.chunks_a != m.chunks_b for m in chosen.modules if m.rank > m.unshared)
    assert chosen.svd_parameters <= chosen.parameters
    assert len({m.svd_rank for m in chosen.modules}) > 1  # of the rival, too, ranks were chosen


@pytest.mark.usefixtures("few")
def test_a_calibrated_error_is_met_with_few_parameters(statistics: Statistics, tmp_path: Path) -> None:
    report = prolora_tools.compress(ADAPTER, tmp_path / "c", max_error=0.1, statistics=statistics)
    assert report.ok
    assert relative(tmp_path / "c", statistics) < 0.1
    assert report.parameters < report.source_parameters
    plain = prolora_tools.compress(ADAPTER, tmp_path / "plain", max_error=0.1)
    assert report.parameters < plain.parameters  # inputs live in few dims, so less has to be kept


@pytest.mark.usefixtures("few")
def test_what_matters_to_the_loss_gets_the_parameters(statistics: Statistics) -> None:
    """One module's outputs are made a hundred times as important; in the Frobenius norm nothing has changed."""
    source = Adapter.open(ADAPTER)
    path, other = [p for p in source.modules if p.endswith("attn.c_attn")][:2]
    sizes = []
    for name in (path, other):
        arrays = {k: v * np.float32(1e4) if k == f"output:{name}" else v for k, v in statistics.arrays.items()}  # type: ignore[operator] # in memory
        weighed = Statistics(arrays)

        def moments(p: str, weighed: Statistics = weighed) -> Pair:
            module = source.modules[p]
            return (weighed.moments(p, "input", module.in_features), weighed.moments(p, "output", module.out_features))

        chosen = shapes.chosen(source, moments, budget=20_000, error=None)
        sizes.append(
            {
                p: g.parameters(source.modules[p].in_features, source.modules[p].out_features)
                for p, g in chosen.modules.items()
            }
        )
    assert sizes[0][path] > sizes[1][path]
    assert sizes[1][other] > sizes[0][other]


def test_lengths_by_directions_are_told_and_not_judged(statistics: Statistics, tmp_path: Path) -> None:
    """Their error is larger, so it says nothing about a plain LoRA beside it."""
    asked: dict[str, Any] = {"unshared": 0, "chunks": 4, "strides": "official", "statistics": statistics}
    reports = [prolora_tools.compress(ADAPTER, tmp_path / x, method="fit", lengthen=x, **asked) for x in LENGTHEN]
    assert [r.lengthen for r in reports] == list(LENGTHEN)
    shown = []
    for report in reports:
        tables.compression(replace(report, svd_calibrated_error=0.0), Console(file=(file := io.StringIO()), width=120))
        shown.append("keeps more of this adapter" in file.getvalue())
    assert shown == [True, False]
    assert ["--lengthen whole" in " ".join(r.notes) for r in reports] == [False, True]
    errors = [r.calibrated_error or 0.0 for r in reports]
    assert 0 < errors[0] < errors[1]


def test_statistics_are_collected_only_for_a_request_in_order(tmp_path: Path) -> None:
    def never() -> Statistics:
        raise AssertionError

    requests: list[dict[str, Any]] = [{"unshared": 1}, {"unshared": 9, "chunks": 2}, {"ratio": 2, "method": "best"}]
    for wrong in requests:
        with pytest.raises(RequestError):
            prolora_tools.compress(ADAPTER, tmp_path / "c", statistics=never, **wrong)
    with pytest.raises(AssertionError):
        prolora_tools.compress(ADAPTER, tmp_path / "c", unshared=1, chunks=2, statistics=never)
    assert not (tmp_path / "c").exists()


def test_texts(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(json.dumps(x) for x in ("def f():\n" * 200, {"text": "import os\n" * 200})))
    assert calibrate(ADAPTER, **{**SMALL, "text": lines}).tokens > 0
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"texts": 1}\n')
    short = tmp_path / "short.txt"
    short.write_text("def")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xff")
    for file, message in ((broken, "line 1"), (short, "at least one window"), (binary, "not UTF-8")):
        with pytest.raises(InputError, match=message):
            calibrate(ADAPTER, **{**SMALL, "text": file})
    with pytest.raises(RequestError, match="tokens is 0"):
        calibrate(ADAPTER, **{**SMALL, "tokens": 0})
    with pytest.raises(InputError, match="holds no statistics"):
        Statistics.open(ADAPTER / "adapter_model.safetensors")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, shape = str(tmp_path / "s"), ["--unshared", "1", "--chunks", "2", "--json", "-q"]
    options = ["--calibrate", str(TEXT), "--base", str(BASE), "--calibrate-tokens", "256", "--calibrate-length", "64"]
    outputs = []
    for number, more in enumerate(([*options, "--statistics", saved], ["--statistics", saved])):
        with pytest.raises(SystemExit) as end:
            main(["compress", str(ADAPTER), "-o", str(tmp_path / str(number)), *shape, *more])
        assert end.value.code == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0]["calibrated_error"] == outputs[1]["calibrated_error"] > 0


def test_a_second_device_gives_the_statistics_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the two devices meets but by a copy, dense sums and sketches, inputs and gradients."""
    base, adapter = model("llama-tiny-en"), model("llama-tiny-py-r8")
    arguments = [sys.executable, "-m", second_device.__name__, *map(str, (adapter, base, TEXT, tmp_path / "elsewhere"))]
    made = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    monkeypatch.setattr(operation, "DENSE", second_device.DENSE)
    monkeypatch.setattr(operation, "ROWS", second_device.ROWS)
    expected = calibrate(adapter, base=base, text=TEXT, **second_device.SETTINGS).arrays
    found = Statistics.open(tmp_path / "elsewhere").arrays
    assert found.keys() == expected.keys()
    assert {name.partition(":")[0] for name in found} == {
        side + part for side in ("input", "output") for part in ("", ".sketch", ".diagonal")
    }
    for name, stored in found.items():
        assert isinstance(stored, StoredTensor)
        numbers = expected[name]
        assert isinstance(numbers, np.ndarray)
        np.testing.assert_allclose(stored.read(), numbers, atol=1e-4 * np.abs(numbers).max())
