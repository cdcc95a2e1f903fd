"""Training: against PEFT's LoRA, with transformers' Trainer, and through every operation on folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from prolora_tools.core.budget import LinearShape, prolora_parameters
from prolora_tools.core.geometry import Geometry
from prolora_tools.files.adapter import Adapter
from prolora_tools.operations.compress import compress
from prolora_tools.operations.diff import diff
from prolora_tools.operations.expand import expand
from prolora_tools.operations.merge import merge
from prolora_tools.operations.stats import stats
from prolora_tools.operations.verify import verify
from prolora_tools.peft import ProLoraConfig, ProLoraLinear
from tests.peft import models
from tests.peft.models import backward

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def train(model: Any, steps: int = 6) -> list[float]:
    """Language modelling, or the like, on fixed random batches, with clipping and dropout from a fixed seed."""
    model.train()
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, models.VOCAB, (4, 9))
        loss = model(input_ids=tokens).logits.float().log_softmax(-1)[..., 1].mean()
        backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("use_rslora", [False, True])
def test_u_equal_r_trains_as_peft_lora_to_the_bit(make_base: Callable[[], Any], *, use_rslora: bool) -> None:
    """From the same initial values: PEFT draws its own through nn.Linear, in another order, so they are copied."""
    options: dict[str, Any] = {
        "target_modules": "all-linear",
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.2,
        "use_rslora": use_rslora,
    }
    theirs = get_peft_model(make_base(), LoraConfig(**options, fan_in_fan_out=make_base is models.gpt2))
    ours = get_peft_model(make_base(), ProLoraConfig(**options, unshared_r=4, chunks_A=3, chunks_B=3))
    pairs = []
    for path, layer in ours.named_modules():
        if isinstance(layer, ProLoraLinear):
            lora = theirs.get_submodule(path)
            layer.prolora_A_unshared["default"].data.copy_(lora.lora_A["default"].weight)
            pairs.append((layer.prolora_A_unshared["default"], lora.lora_A["default"].weight))
            pairs.append((layer.prolora_B_unshared["default"], lora.lora_B["default"].weight))
    losses = train(theirs), train(ours)
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][-1]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(b.any() for _, b in pairs)


@pytest.mark.parametrize("options", [{"rotate": True}, {"rotate": False}, {"init_prolora_weights": "unrectified"}])
def test_the_ablations_start_at_the_base_and_learn(tokens: torch.Tensor, options: dict[str, Any]) -> None:
    base = models.llama()
    expected = base(tokens).logits
    shape: dict[str, Any] = {"r": 8, "unshared_r": 1, "chunks_A": 7, "chunks_B": 7, "target_modules": "all-linear"}
    model = get_peft_model(base, ProLoraConfig(**shape, **options))
    assert torch.equal(model(tokens).logits, expected)
    losses = train(model, 12)
    assert losses[-1] < losses[0]


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One sentence, so that a few steps can learn it."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(8) * 3 + index % 2) % models.VOCAB
        return {"input_ids": tokens, "labels": tokens}


def trainer(folder: Path, steps: int, **options: Any) -> Trainer:
    shape: dict[str, Any] = {"r": 8, "unshared_r": 1, "chunks_A": 7, "chunks_B": 7, "target_modules": "all-linear"}
    model = get_peft_model(models.llama(), ProLoraConfig(task_type="CAUSAL_LM", **shape))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=2e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False, seed=3, **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Texts())


def test_the_trainer_saves_and_resumes_our_folders(tmp_path: Path, tokens: torch.Tensor) -> None:
    run = trainer(tmp_path, 8, save_steps=4, logging_steps=4)
    run.train()
    history = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert history[-1] < history[0]
    expected = run.model.eval()(tokens).logits
    checkpoint = tmp_path / "checkpoint-8"
    assert Adapter.open(checkpoint).config.prolora
    loaded = PeftModel.from_pretrained(models.llama(), checkpoint)
    assert torch.equal(loaded(tokens).logits, expected)
    resumed = trainer(tmp_path, 8, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(resumed.model.eval()(tokens).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("maker", ["llama", "gpt2"])
@pytest.mark.parametrize(("unshared", "rslora"), [(1, False), (0, True)])
def test_a_trained_folder_goes_through_every_operation(
    tmp_path: Path, tokens: torch.Tensor, maker: str, unshared: int, *, rslora: bool
) -> None:
    make = models.MAKERS[maker]
    make().save_pretrained(tmp_path / "base")
    shape: dict[str, Any] = {
        "r": 8,
        "unshared_r": unshared,
        "chunks_A": 7,
        "chunks_B": 5,
        "lora_alpha": 16,
        "use_rslora": rslora,
    }
    model = get_peft_model(make(), ProLoraConfig(**shape, target_modules="all-linear"))
    train(model)
    expected = model(tokens).logits.detach()
    ours, lora, back = tmp_path / "ours", tmp_path / "lora", tmp_path / "back"
    model.save_pretrained(ours)

    modules = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, ProLoraLinear)}
    shapes = [LinearShape(n, m.in_features, m.out_features) for n, m in modules.items()]
    count = prolora_parameters(shapes, Geometry(8, unshared, 7, 5))
    assert stats(ours).parameters == count == sum(p.numel() for p in model.parameters() if p.requires_grad)

    expand(ours, lora)  # exact: the same products in the same order
    expanded = PeftModel.from_pretrained(make(), lora)
    assert expanded.peft_type == "LORA"
    assert torch.equal(expanded(tokens).logits, expected)
    assert diff(ours, lora).relative_error == 0

    compress(lora, back, unshared=unshared, chunks=(7, 5))  # lossless: the structure is in the numbers
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (ours, back))
    assert set(first) == set(second)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(PeftModel.from_pretrained(make(), back)(tokens).logits, expected)
    again = PeftModel.from_pretrained(make(), back, is_trainable=True)  # and training goes on
    assert train(again)[0] != train(again)[-1]

    merge(ours, tmp_path / "merged", base=tmp_path / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert verify(tmp_path / "merged", base=tmp_path / "base", adapter=ours).ok


def test_our_compression_of_any_lora_loads(tmp_path: Path, tokens: torch.Tensor) -> None:
    """With the ranks and alphas of patterns, and modules whose rank is below u."""
    patterns: dict[str, Any] = {"rank_pattern": {"down_proj": 2, "q_proj": 5}, "alpha_pattern": {"q_proj": 3}}
    config = LoraConfig(r=6, target_modules="all-linear", init_lora_weights=False, **patterns)
    get_peft_model(models.llama(), config).save_pretrained(tmp_path / "lora")
    compress(tmp_path / "lora", tmp_path / "small", unshared=3, chunks=4)
    loaded = PeftModel.from_pretrained(models.llama(), tmp_path / "small")
    expand(tmp_path / "small", tmp_path / "large")
    reference = PeftModel.from_pretrained(models.llama(), tmp_path / "large")
    assert torch.equal(loaded(tokens).logits, reference(tokens).logits)
    adapter = Adapter.open(tmp_path / "small")
    assert {m.geometry.unshared for m in adapter.modules.values()} == {2, 3}
