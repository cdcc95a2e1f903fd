"""Merging into pickled and quantised bases: made by transformers, adapted with PEFT, merged by us."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import prolora_tools
from prolora_tools.errors import ProloraError, UnsupportedError
from prolora_tools.files.quantised import open_base
from prolora_tools.files.writer import STAGE
from prolora_tools.operations import merge as merging
from prolora_tools.operations.manifest import Journal, check_manifest
from prolora_tools.operations.merge_blocks import Blocks
from tests.operations.test_fused import VARIANTS
from tests.operations.test_variants import trained
from tests.support import model, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ADAPTER, BASE = model("llama-tiny-py-r8"), model("llama-tiny-en")
NOISE = [
    "ignore:.*kernels.*:UserWarning",  # bitsandbytes looks for kernels that are not installed
    "ignore:.*float8.*:UserWarning",
]
pytestmark = [pytest.mark.filterwarnings(n) for n in NOISE]


def pickled(folder: Path, source: Path = BASE, shards: int = 0) -> Path:
    """A safetensors model as transformers stored models before: in one pickle, or in shards with an index."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(source)
    if not shards:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save({name: tensors[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[k]) and t.dtype == b[k].dtype for k, t in a.items())


def is_right(merged: Path, base: Path, adapter: Path) -> bool:
    report = prolora_tools.verify(merged, base=base, adapter=adapter)
    assert not report.problems, report.problems
    return report.merged_tensors == report.exact_tensors > 0


# --- pickles


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_pickled_base_gives_what_its_safetensors_twin_gives(shards: int, dtype: str | None, tmp_path: Path) -> None:
    base = pickled(tmp_path / "base", shards=shards)
    prolora_tools.merge(ADAPTER, tmp_path / "twin", base=BASE, dtype=dtype)
    report = prolora_tools.merge(ADAPTER, tmp_path / "out", base=base, dtype=dtype)
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "twin"))
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] or ["model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "out").glob("*model*")) == sorted(
        [*names, *(["model.safetensors.index.json"] if shards else [])]
    )
    assert [s.name for s in report.shards] == names
    assert is_right(tmp_path / "out", base, ADAPTER)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[k], t) for k, t in tensors_of(tmp_path / "twin").items())


def test_stats_and_dry_runs_take_it(tmp_path: Path) -> None:
    base = pickled(tmp_path / "base", shards=2)
    assert prolora_tools.stats(ADAPTER, base=base) == prolora_tools.stats(ADAPTER, base=BASE)
    report = prolora_tools.merge(ADAPTER, tmp_path / "out", base=base, dry_run=True)
    assert report.parameters == prolora_tools.stats(ADAPTER, base=BASE).base_parameters
    assert not (tmp_path / "out").exists()


def test_safetensors_win_and_the_report_says_so(tmp_path: Path) -> None:
    base = shutil.copytree(BASE, tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"not read")
    report = prolora_tools.merge(ADAPTER, tmp_path / "out", base=base)
    assert "pytorch_model.bin is there too and was not read; safetensors files were" in report.notes


def tied_llama(folder: Path) -> tuple[Any, Path]:
    """A tied model whose pickle holds head and embedding, in one storage, as transformers used to store it."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    made.config.save_pretrained(folder)
    (config := json.loads((folder / "config.json").read_text())).setdefault("architectures", ["LlamaForCausalLM"])
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(made.state_dict(), folder / "pytorch_model.bin")
    return made, folder


def adapted(base: Any, folder: Path, targets: list[str], dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """The base with a random adapter, saved too."""
    torch.manual_seed(1)
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **more))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.float()).to(dtype) * 0.05
    tuned.save_pretrained(folder)
    return tuned.eval()


IDS = torch.arange(40).reshape(2, 20)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], ["lm_head"]])
def test_a_tied_head_stored_in_one_storage(targets: list[str], tmp_path: Path) -> None:
    """The head that the adapter changes parts from the embedding; one that it does not change stays as it is."""
    made, base = tied_llama(tmp_path / "base")
    tuned = adapted(made, tmp_path / "adapter", targets)
    report = prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=base)
    assert report.untied is ("lm_head" in targets)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(IDS).logits, tuned(IDS).logits, rtol=1e-4, atol=1e-5)
    assert is_right(tmp_path / "out", base, tmp_path / "adapter")


def test_the_tied_head_of_a_safetensors_base_that_stores_it_twice(tmp_path: Path) -> None:
    """The same through the other reader: no short cut past transformers' knowledge of ties."""
    made, base = tied_llama(tmp_path / "base")
    save_file({k: t.clone() for k, t in torch.load(base / "pytorch_model.bin").items()}, base / "model.safetensors")
    tuned = adapted(made, tmp_path / "adapter", ["lm_head"])
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=base)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(IDS).logits, tuned(IDS).logits, rtol=1e-4, atol=1e-5)


def test_resuming_depends_on_the_pickles_and_on_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before its last shard, another run keeps the finished ones, but none after the base has changed."""
    base, kept = pickled(tmp_path / "base", shards=3), []

    class Watched(Journal):
        def __init__(self, stage: Path, request: str) -> None:
            super().__init__(stage, request)
            kept.append(sorted(self.finished))

    monkeypatch.setattr(merging, "Journal", Watched)

    def interrupted() -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prolora_tools.merge(ADAPTER, tmp_path / "out", base=base, resume=True, threads=1, finish=stop)
        assert list(tmp_path.glob(f"*{STAGE}*"))

    def touched(path: Path) -> None:
        path.write_bytes(path.read_bytes() + b" ")

    interrupted()
    interrupted()
    assert kept == [[], [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]]
    touched(base / "config.json")
    interrupted()
    torch.save(torch.load(base / "pytorch_model-00002-of-00003.bin"), base / "pytorch_model-00002-of-00003.bin")
    prolora_tools.merge(ADAPTER, tmp_path / "out", base=base, resume=True)
    assert kept[2:] == [[], []]
    assert not check_manifest(tmp_path / "out").problems


def test_the_merged_folder_must_be_safetensors(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        prolora_tools.verify(pickled(tmp_path / "base"), base=BASE, adapter=ADAPTER)
    assert caught.value.code == "base-bin"


def test_memory_does_not_grow_with_a_pickle(tmp_path: Path) -> None:
    """The anonymous memory at its peak is the same, less than a tensor apart, for a base of 8 and one of 64 MB."""
    peaks = []
    for layers in (1, 8):
        base = tmp_path / f"base-{layers}"
        base.mkdir()
        (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
        names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(layers)]
        torch.save({name: torch.ones(1024, 2048) for name in names}, base / "pytorch_model.bin")
        peaks.append(peak_anonymous(tmp_path, base, layers))
    assert peaks[1] - peaks[0] < 8 << 10, peaks


def peak_anonymous(folder: Path, base: Path, layers: int) -> int:
    """KiB of anonymous memory at the peak of a merge, torch included."""
    factors: dict[str, torch.Tensor] = {}
    for i in range(layers):
        path = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        factors |= {f"{path}.lora_A.weight": torch.ones(2, 2048), f"{path}.lora_B.weight": torch.ones(1024, 2)}
    adapter = folder / f"adapter-{layers}"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, adapter / "adapter_model.safetensors")
    code = (
        "import sys, prolora_tools, threading, re\n"
        "def now(): return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "peak, done = 0, threading.Event()\n"
        "def watch():\n"
        "    global peak\n"
        "    while not done.wait(0.002): peak = max(peak, now())\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "prolora_tools.merge(sys.argv[1], sys.argv[2], base=sys.argv[3], threads=1)\n"
        "done.set(); thread.join(); print(max(peak, now()))\n"
    )
    arguments = [str(adapter), str(folder / f"out-{layers}"), str(base)]
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return int(found.stdout)


# --- quantised bases


def big_llama(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Sides that are multiples of 64 and 128, so that bitsandbytes' own kernels are right (see test_quantised)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=70, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


BITS: dict[str, dict[str, Any]] = {
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def quantised(folder: Path, kind: str, *, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB") -> Any:
    """A model that transformers quantised with bitsandbytes, and saved."""
    plain = big_llama(folder.parent / "plain", dtype)
    bits = BITS[kind]
    if "load_in_4bit" in bits:
        bits = {**bits, "bnb_4bit_compute_dtype": torch.float32}
    how = BitsAndBytesConfig(**bits)
    loaded = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, device_map="cpu", dtype=dtype)
    loaded.save_pretrained(folder, max_shard_size=shard)
    return loaded


def unrounded(layer: Any) -> torch.Tensor:
    """A quantised layer's weight by bitsandbytes, float32."""
    from peft.utils.integrations import dequantize_bnb_weight

    weight = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))
    assert isinstance(weight, torch.Tensor)
    return weight.float()


def expected_of(tuned: PeftModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Dequantise, add in float32, round once; other tensors as they are."""
    found = {}
    for name, module in tuned.base_model.model.named_modules():
        base = module.base_layer if hasattr(module, "base_layer") else module
        packed = type(base).__name__ in {"Linear4bit", "Linear8bitLt"}
        if ".lora_" in name or name.endswith(".base_layer") or not hasattr(base, "weight"):
            continue
        weight = unrounded(base) if packed else base.weight.data
        if base is not module:
            a, b = module.lora_A["default"].weight.float(), module.lora_B["default"].weight.float()
            weight = weight.float() + (b @ a) * module.scaling["default"]
        found[f"{name}.weight"] = weight.to(dtype if packed or base is not module else weight.dtype).contiguous()
    return found


TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("kind", BITS)
def test_a_bitsandbytes_base(kind: str, tmp_path: Path) -> None:
    loaded = quantised(tmp_path / "base", kind)
    tuned = adapted(loaded, tmp_path / "adapter", TARGETS)
    report = prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    found, expected = tensors_of(tmp_path / "out"), expected_of(tuned, torch.bfloat16)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        if name.split(".")[-2] in TARGETS:  # the product may be summed in another order: an ulp of bfloat16
            torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)
            assert (found[name] == tensor).float().mean() > 0.99
        else:
            assert torch.equal(found[name], tensor), name
    assert (report.merged_tensors, report.converted_tensors, report.copied_tensors) == (6, 8, 7)
    assert report.parameters == sum(t.numel() for t in expected.values())
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert any("bitsandbytes" in note for note in report.notes)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert is_right(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    assert prolora_tools.stats(tmp_path / "adapter", base=tmp_path / "base").base_parameters == report.parameters


@pytest.mark.parametrize("kind", ["nf4-double", "fp4", "int8"])
def test_the_merged_model_computes_what_the_quantised_one_and_its_adapter_do(kind: str, tmp_path: Path) -> None:
    loaded = quantised(tmp_path / "base", kind, dtype=torch.float32)
    tuned = adapted(loaded, tmp_path / "adapter", TARGETS)
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes: inputs are cast to float16
        wanted = tuned(IDS).logits
        with tuned.disable_adapter():
            without = tuned(IDS).logits
        found = merged(IDS).logits
        plain = PeftModel.from_pretrained(loaded_again(tmp_path / "base"), tmp_path / "adapter")(IDS).logits
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    # bitsandbytes' products themselves are of int8 or, on some CPUs, bfloat16 inputs.
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() < 0.03 * scale
    assert (without - wanted).abs().max() > 0.3 * scale


def loaded_again(folder: Path) -> Any:
    """A quantised model, dequantised by transformers into float32 layers."""
    quantised_model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    return quantised_model.dequantize(dtype=torch.float32)


def test_parts_of_a_weight_in_other_shards(tmp_path: Path) -> None:
    """A weight's scales may lie in another file than it; shards of scales alone leave no file behind."""
    quantised(tmp_path / "base", "nf4-double")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), tmp_path / "adapter", TARGETS)
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "whole", base=tmp_path / "base")
    tensors, split = tensors_of(tmp_path / "base"), tmp_path / "split"
    shutil.copytree(tmp_path / "base", split, ignore=shutil.ignore_patterns("*.safetensors"))
    places: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for i, (name, tensor) in enumerate(tensors.items()):
        places[2 if ".weight." in name else i % 2][name] = tensor
    files = [f"model-{i}.safetensors" for i in range(3)]
    for file, part in zip(files, places, strict=True):
        save_file(part, split / file)
    weight_map = {name: file for file, part in zip(files, places, strict=True) for name in part}
    (split / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=split)
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == files[:2]
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "small", base=split, max_shard_size=50_000)
    assert same(tensors_of(tmp_path / "small"), tensors_of(tmp_path / "whole"))
    index = json.loads((tmp_path / "small/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(tmp_path / "whole").keys()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_another_output_dtype(dtype: str, tmp_path: Path) -> None:
    """Every float tensor in it; the dequantised weight is that of its quant_state all the same."""
    loaded = quantised(tmp_path / "base", "nf4")
    wanted = unrounded(loaded.model.layers[0].self_attn.k_proj)
    adapted(loaded, tmp_path / "adapter", TARGETS)
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", dtype=dtype)
    found = tensors_of(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {getattr(torch, dtype)}
    assert torch.equal(found["model.layers.0.self_attn.k_proj.weight"], wanted.to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert is_right(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")


def test_through_transformers_mapping_and_as_a_pickle(tmp_path: Path) -> None:
    """modules_to_save asks transformers for the names, and a pickle may hold a quantised model."""
    loaded = quantised(tmp_path / "base", "nf4-double")
    adapted(loaded, tmp_path / "adapter", TARGETS, modules_to_save=["lm_head"])
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert is_right(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    report = prolora_tools.merge(
        tmp_path / "adapter", tmp_path / "again", base=pickled(tmp_path / "pickled", tmp_path / "base")
    )
    assert same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "out"))
    assert report.merged_tensors == 7


def test_dora_on_a_quantised_base(tmp_path: Path) -> None:
    loaded = quantised(tmp_path / "base", "nf4", dtype=torch.float32).dequantize(dtype=torch.float32)
    tuned = adapted(loaded, tmp_path / "adapter", ["q_proj"], use_dora=True)
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, tuned(IDS).logits, rtol=1e-3, atol=1e-4)


def fp8_llama(folder: Path, **config: Any) -> Path:
    """A model in FP8 blocks of 128 x 128, in the format that transformers and DeepSeek store."""
    plain = big_llama(folder.parent / "plain")
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(plain).items():
        if "proj" not in name:
            tensors[name] = tensor
            continue
        rows, columns = (-(-side // 128) for side in tensor.shape)
        scales = torch.zeros(rows, columns)
        packed = torch.zeros(tensor.shape)
        for i in range(rows):
            for j in range(columns):
                place = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
                scales[i, j] = tensor[place].float().abs().max() / 448
                packed[place] = tensor[place].float() / scales[i, j]
        tensors |= {name: packed.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = json.loads((folder / "config.json").read_text())
    found["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], **config
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(found))
    return folder


def test_an_fp8_base(tmp_path: Path) -> None:
    """Against transformers, which loads it with dequantize=True."""
    base = fp8_llama(tmp_path / "base")
    how = FineGrainedFP8Config(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32)
    wanted = {k: t.clone() for k, t in loaded.state_dict().items()}
    tuned = adapted(loaded, tmp_path / "adapter", TARGETS).float()
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=base)
    found = tensors_of(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.bfloat16
        if name.split(".")[-2] not in TARGETS:
            assert torch.equal(found[name], tensor.bfloat16()), name
    assert is_right(tmp_path / "out", base, tmp_path / "adapter")
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "wide", base=base, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, tuned(IDS).logits, rtol=1e-4, atol=1e-5)


def test_no_side_tensor_is_left_and_verify_sees_the_config(tmp_path: Path) -> None:
    base = fp8_llama(tmp_path / "base")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), tmp_path / "adapter", TARGETS)
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=base)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as f:
        assert sorted(f.keys()) == sorted(load_file(tmp_path / "plain/model.safetensors"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    problems = prolora_tools.verify(tmp_path / "out", base=base, adapter=tmp_path / "adapter").problems
    assert [(p.name, "quantisation" in p.problem) for p in problems] == [("config.json", True)]


def test_rows_made_by_threads_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is shared out between tasks starts at any row."""
    quantised(tmp_path / "base", "nf4-double")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), tmp_path / "adapter", TARGETS)
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "whole", base=tmp_path / "base")
    monkeypatch.setattr(merging, "TASK_BYTES", 1)
    monkeypatch.setattr(merging, "panel_rows", lambda _: 7)
    monkeypatch.setattr(Blocks, "rows_of", lambda *_: 3)
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    for name, tensor in tensors_of(tmp_path / "whole").items():
        torch.testing.assert_close(tensors_of(tmp_path / "out")[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)
        if name.split(".")[-2] not in TARGETS:
            assert torch.equal(tensors_of(tmp_path / "out")[name], tensor)


def test_quantised_conv1d_is_refused(tmp_path: Path) -> None:
    """transformers turns Conv1D weights round when it quantises them; here they are square, which no shape betrays."""
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=64, n_layer=1, n_head=4, n_positions=40))
    plain.save_pretrained(tmp_path / "plain")
    how = BitsAndBytesConfig(load_in_4bit=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how, device_map="cpu")
    loaded.save_pretrained(tmp_path / "base")
    adapted(loaded, tmp_path / "adapter", ["c_proj"])
    with pytest.raises(UnsupportedError) as caught:
        prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert caught.value.code == "base-quantised-conv1d"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: t.__setitem__("model.layers.1.self_attn.q_proj.weight.absmax", torch.full((256,), torch.inf)),
         "merge-not-finite"),
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight.absmax"), "base-quantised-tensor"),
    ],
)  # fmt: skip
def test_spoilt_scales(change: Callable[[dict[str, torch.Tensor]], None], code: str, tmp_path: Path) -> None:
    loaded = quantised(tmp_path / "base", "nf4")
    adapted(loaded, tmp_path / "adapter", TARGETS)
    tensors = tensors_of(tmp_path / "base")
    change(tensors)
    save_file(tensors, tmp_path / "base/model.safetensors")
    with pytest.raises(ProloraError) as caught:
        prolora_tools.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mixtral-experts", "qwen-moe-old-names", "deepseek", "qwen-vl-moe"])
def test_experts_in_fp8_give_what_their_float_twin_gives(name: str, tmp_path: Path) -> None:
    """One by one and stacked, through transformers' mapping: in float32, bit for bit."""
    _, base, adapter = trained(VARIANTS[name], tmp_path)
    small: dict[str, torch.Tensor] = {}
    for key, tensor in tensors_of(base).items():
        if tensor.dim() < 2 or not re.search(r"proj|experts|\.w[123]\.", key):
            small[key] = tensor
            continue
        grid = (*tensor.shape[:-2], *(-(-side // 16) for side in tensor.shape[-2:]))
        scales = torch.rand(grid, generator=torch.Generator().manual_seed(0)) + 0.5
        small |= {key: tensor.to(torch.float8_e4m3fn), f"{key}_scale_inv": scales}
    fp8 = shutil.copytree(base, tmp_path / "fp8", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(small, fp8 / "model.safetensors", {"format": "pt"})
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (fp8 / "config.json").write_text(json.dumps(config))
    twin = shutil.copytree(base, tmp_path / "twin", ignore=shutil.ignore_patterns("*.safetensors*"))
    floats = {key: torch.from_numpy(np.array(tensor.read())) for key, tensor in open_base(fp8).tensors.items()}
    save_file(floats, twin / "model.safetensors", {"format": "pt"})
    report = prolora_tools.merge(adapter, tmp_path / "out", base=fp8, dtype="float32")
    prolora_tools.merge(adapter, tmp_path / "expected", base=twin, dtype="float32")
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))
    assert sum("experts" in key for key in small if key.endswith("_scale_inv")) > 0
    assert report.merged_tensors > 4
    assert is_right(tmp_path / "out", fp8, adapter)
