"""Statistics of a real model's layers, and fits in their norm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prolora_tools
from prolora_tools.cli import main
from prolora_tools.errors import InputError, MismatchError, RequestError
from prolora_tools.files.adapter import Adapter
from prolora_tools.operations import calibrate as operation
from prolora_tools.operations.calibrate import Statistics, calibrate
from tests.support import model

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
