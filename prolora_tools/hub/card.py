"""Model cards: a view of a report. What an author wrote stays; only missing metadata is added.

Metadata are the Hub's: `base_model_relation` is `adapter` for an adapter and `merge` for a merged model.
A local path is never given as a base model: it tells nobody anything, and the Hub refuses it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from prolora_tools.hub.names import SCHEME, RepoName

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PLACEHOLDER = "OWNER/NAME"
"""Stands for the repository in cards that are written before it is known; `push` fills it in."""

_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_LOADERS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def hub_id(name: object) -> str | None:
    """`name` as the name of a Hub repository, None if it is a path or cannot be told from one."""
    repo = RepoName.match(name) if isinstance(name, str) else None
    sure = repo is not None and (repo.revision is not None or str(name).startswith(SCHEME))
    return repo.id if repo and (sure or not Path(repo.id).exists()) else None


def render(
    report: Mapping[str, Any], config: Mapping[str, Any], *, license_id: str | None = None, repo: str = PLACEHOLDER
) -> str:
    """A whole card.

    Args:
        report: a BudgetReport, CompressionReport, ExpansionReport or MergeReport as JSON; its source and base may be
            `owner/name@commit`. A path is left out of the card.
        config: adapter_config.json of an adapter, config.json of a merged model.
        license_id: the license, as the Hub spells it.
        repo: where the card will stand.
    """
    base = hub_id(report.get("base") or config.get("base_model_name_or_path"))
    data = metadata(config, base=base, license_id=license_id)
    kinds = {"PROLORA": "PRoLoRA adapter", "LORA": "LoRA adapter"}
    name = kinds.get(str(config.get("peft_type")), "Merged model") if repo == PLACEHOLDER else repo.rpartition("/")[2]
    parts = [f"# {name}", _intro(config, base), _table(report), _made(report), _use(config, base, repo)]
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n\n{body}\n"


def metadata(config: Mapping[str, Any], *, base: str | None, license_id: str | None) -> dict[str, Any]:
    """The card's metadata; `base` must be a Hub name or None."""
    adapter = "peft_type" in config
    relation = "adapter" if adapter else "merge"
    data: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if base:
        data |= {"base_model": base, "base_model_relation": relation}
    if license_id:
        data["license"] = license_id
    tags = ["prolora"] if config.get("peft_type") == "PROLORA" else []
    tags += ["lora"] if adapter else ["merge"]
    return data | {"tags": tags + ([f"base_model:{relation}:{base}"] if base else [])}


def completed(text: str, wanted: Mapping[str, Any], *, license_id: str | None = None) -> str:
    """An existing card with what is missing of `wanted` added to its metadata; byte for byte the same if nothing is.

    Base models and tags that are local paths go, since the Hub refuses a card with them. An explicit `license_id`
    replaces another one.

    Raises:
        ValueError: the card's metadata is no YAML object.
    """
    front = _FRONT.match(text)
    try:
        had = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error
    had = {} if had is None else had
    if not isinstance(had, dict):
        raise ValueError("the metadata is no object")  # noqa: TRY004 - wrong content, not a wrong argument
    data = _without_paths(had)
    tags = [*data.get("tags", []), *(t for t in wanted["tags"] if t not in data.get("tags", []))]
    missing = {k: v for k, v in wanted.items() if data.get(k) in (None, "", [])}
    data |= {**missing, "tags": tags} | ({"license": license_id} if license_id else {})
    if data == had:
        return text
    dumped = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{dumped}---\n" + (text[front.end() :] if front else f"\n{text}")


def _without_paths(data: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(data)
    bases = kept.get("base_model", [])
    honest = [b for b in ([bases] if isinstance(bases, str) else bases or []) if not _is_path(str(b))]
    kept["base_model"] = bases if honest and isinstance(bases, str) else honest
    tags = kept.get("tags") or []
    kept["tags"] = [tags] if isinstance(tags, str) else tags
    kept["tags"] = [
        t for t in kept["tags"] if not (str(t).startswith("base_model:") and _is_path(str(t).split(":")[-1]))
    ]
    return {k: v for k, v in kept.items() if v not in (None, [])}


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _intro(config: Mapping[str, Any], base: str | None) -> str:
    kinds = {"PROLORA": "A [PRoLoRA](https://arxiv.org/abs/2402.16902) adapter", "LORA": "A LoRA adapter"}
    kind = kinds.get(str(config.get("peft_type")), "A model with its adapter merged in")
    return f"{kind} for {base}." if base else f"{kind}."


def _range(values: Iterable[int]) -> str:
    low, *rest = sorted(set(values))
    return f"{low} to {rest[-1]}" if rest else f"{low}"


def _table(report: Mapping[str, Any]) -> str:
    modules = report.get("modules")
    rows: list[tuple[str, str]] = []
    if isinstance(modules, list) and modules:
        rows += [("adapted modules", f"{len(modules)}"), ("rank r", _range(m["rank"] for m in modules))]
        if any(m["rank"] > m["unshared"] for m in modules):
            rows += [
                ("unshared rank u", _range(m["unshared"] for m in modules)),
                ("chunks m of A", _range(m["chunks_a"] for m in modules)),
                ("chunks n of B", _range(m["chunks_b"] for m in modules)),
                ("strides of A, B", ", ".join(_range(m[f"stride_{f}"] for m in modules) for f in "ab")),
            ]
    elif "rank" in report:
        rows += [("adapted modules", f"{modules}"), ("rank r", f"{report['rank']}"), ("alpha", f"{report['alpha']:g}")]
    rows += [("parameters", f"{report['parameters']:,}"), ("bytes", f"{report['bytes']:,}")]
    if comparison := report.get("comparison"):
        rows.append(("parameters of a LoRA of that rank", f"{comparison['lora_same_rank']:,}"))
        rows.append(("LoRA rank of the same budget", f"{comparison['equal_budget_lora_rank']:.4g}"))
    return "\n".join(["## Size", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _made(report: Mapping[str, Any]) -> str:
    kind = report.get("report")
    given = report.get("source") or report.get("adapter")
    source, (_, _, commit) = hub_id(given), str(given).partition("@")
    origin = f"{source} at commit {commit}" if source and commit else source or "a trained adapter"
    if kind == "CompressionReport":
        size, method = f"{report['source_parameters']:,} parameters", report["method"]
        text = f"Compressed by prolora-tools from {origin} ({size}), method `{method}`."
        if report.get("relative_error") is not None:
            rival = f"{report['svd_parameters']:,} parameters) has {report['svd_relative_error']:.4f}"
            text += f"\n\nThe relative error of dW is {report['relative_error']:.4f}. "
            text += f"A truncated SVD of the same budget ({rival}."
    elif kind == "ExpansionReport":
        text = f"Expanded by prolora-tools from {origin}, which gives the same dW."
        text += " The scaling was multiplied into B." if report["scaling_in_b"] else ""
    elif kind == "MergeReport":
        text = (
            f"Merged by prolora-tools from {origin}. {report['merged_tensors']:,} tensors took a change, computed in "
        )
        text += f"float32 and rounded once; {report['copied_tensors']:,} are those of the base, bit for bit."
    else:
        return ""
    return f"## How it was made\n\n{text}"


def _use(config: Mapping[str, Any], base: str | None, repo: str) -> str:
    loader = _LOADERS.get(str(config.get("task_type")), "AutoModelForCausalLM")
    shown_base = base or "BASE"
    if "peft_type" not in config:
        code = f'from transformers import {loader}\n\nmodel = {loader}.from_pretrained("{repo}")'
        return f"## How to use it\n\n```python\n{code}\n```"
    prolora = config["peft_type"] == "PROLORA"
    needs = "import prolora_tools.peft  # adds PRoLoRA to PEFT\n" if prolora else ""
    code = (
        f"{needs}from peft import PeftModel\nfrom transformers import {loader}\n\n"
        f'base = {loader}.from_pretrained("{shown_base}")\nmodel = PeftModel.from_pretrained(base, "{repo}")'
    )
    shell = [f"prolora-tools merge {repo} --base {shown_base} -o merged"]
    shell = [f"prolora-tools expand {repo} -o lora  # a plain LoRA, the same dW", *shell] if prolora else shell
    commands = "\n".join(shell)
    return f"## How to use it\n\n```python\n{code}\n```\n\n```bash\n{commands}\n```"
