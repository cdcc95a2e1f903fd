"""Makes the folders of failing inputs beside this file, one or more for every error message.

A case is a folder `<slug>` or `<slug>--<variant>`: the input files, `command` (arguments after `prolora-tools`, run
inside a copy of the folder), `exit` (the exit code) and `stderr` (what is printed). Inputs, command and exit code
come from the functions below, which write safetensors byte by byte, so that broken ones can be made too.

    python -m tests.failing.build             # write the inputs again, and tell what changed in the messages
    python -m tests.failing.build --accept    # take the new messages over: read the diff before committing it

In `stderr`, `...` stands for text of another library, whose words change between its releases.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Files = dict[str, bytes]

HERE = Path(__file__).parent
BESIDE = {"command", "exit", "stderr"}

Q = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """One failing input.

    Attributes:
        name: `<slug>` or `<slug>--<variant>`.
        command: arguments of prolora-tools.
        files: path inside the folder -> content.
        exit: the exit code.
        foreign: text after which another library speaks to the end of the line.
    """

    name: str
    command: str
    files: Files
    exit: int = 1
    foreign: str | None = None

    @property
    def slug(self) -> str:
        return self.name.partition("--")[0]

    def all_files(self) -> Files:
        """The folder's files but `stderr`."""
        return {**self.files, "command": f"{self.command}\n".encode(), "exit": f"{self.exit}\n".encode()}


# --- what the inputs are made of


@dataclass(frozen=True)
class Tensor:
    """A tensor as its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


_PACK = {"F64": "d", "F32": "f", "F16": "e"}


def numbers(*shape: int, dtype: str = "F32", at: Mapping[int, float] | None = None) -> Tensor:
    """Small numbers that half precision holds exactly, with those of `at` in their flat places."""
    count = 1
    for dim in shape:
        count *= dim
    values = [((i * 5) % 7 - 3) / 4 for i in range(count)]
    for place, value in (at or {}).items():
        values[place] = value
    if dtype == "BF16":
        return Tensor(dtype, shape, b"".join(struct.pack("<f", v)[2:] for v in values))
    return Tensor(dtype, shape, struct.pack(f"<{count}{_PACK[dtype]}", *values))


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header of a file that holds `tensors` one after the other."""
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + len(tensor.data)]}
        at += len(tensor.data)
    return header


def pack(header: Mapping[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of any header, its length told as `length` if given."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """A sound safetensors file."""
    return pack(header_of(tensors), b"".join(t.data for t in tensors.values()))


def factors(path: str = Q, rank: int = 2, dims: tuple[int, int] = (4, 4)) -> dict[str, Tensor]:
    """A pair of LoRA factors."""
    return {f"{path}.lora_A.weight": numbers(rank, dims[0]), f"{path}.lora_B.weight": numbers(dims[1], rank)}


def shared(path: str = Q) -> dict[str, Tensor]:
    """The factors of a PRoLoRA module of 4 -> 4 with r = 2, u = 1, m = n = 2."""
    return {
        f"{path}.prolora_A": numbers(1, 2),
        f"{path}.prolora_B": numbers(2, 1),
        f"{path}.prolora_A_unshared": numbers(1, 4),
        f"{path}.prolora_B_unshared": numbers(4, 1),
    }


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
PROLORA = {
    **LORA, "peft_type": "PROLORA", "format_version": 1, "unshared_r": 1, "chunks_A": 2, "chunks_B": 2
}  # fmt: skip


def text(value: object) -> bytes:
    """JSON; `NaN` and `Infinity` are written as Python's json writes them."""
    return (json.dumps(value) + "\n").encode()


def prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def adapter(
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    folder: str = "adapter",
    whole: Mapping[str, Any] = LORA,
    weights: bytes | None = None,
) -> Files:
    """A LoRA folder: `config` over the usual fields, `tensors` without their prefix, or the weights file's bytes."""
    raw = weights if weights is not None else safetensors(prefixed(factors() if tensors is None else tensors))
    return {
        f"{folder}/adapter_config.json": text({**whole, **(config or {})}),
        f"{folder}/adapter_model.safetensors": raw,
    }


def prolora(config: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None) -> Files:
    """A PRoLoRA folder."""
    return adapter(config, shared() if tensors is None else tensors, whole=PROLORA)


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 4,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 6,
}  # fmt: skip
"""A config that transformers builds a model from."""


def base(
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    whole: Mapping[str, Any] | None = None,
    weights: bytes | None = None,
) -> Files:
    """A base in one file. Without `whole`, its config is enough where adapter paths are keys."""
    raw = safetensors({f"{Q}.weight": numbers(4, 4)} if tensors is None else tensors) if weights is None else weights
    return {
        "base/config.json": text({**({"model_type": "llama"} if whole is None else whole), **(config or {})}),
        "base/model.safetensors": raw,
    }


def indexed(index: object, shards: Mapping[str, bytes] | None = None) -> Files:
    """A base with an index."""
    one = {"model-1.safetensors": safetensors({f"{Q}.weight": numbers(4, 4)})}
    return {
        "base/config.json": text({"model_type": "llama"}),
        "base/model.safetensors.index.json": text(index),
        **{f"base/{name}": raw for name, raw in (one if shards is None else shards).items()},
    }


EXPAND = "expand adapter -o OUT"
COMPRESS = "compress adapter -o OUT --unshared 1 --chunks 2"
MERGE = "merge adapter --base base -o OUT"
PLAN = "plan base --rank 2"


class Evil:
    """Unpickled, it would make a file named `pwned` in the working directory."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


def pickled(state: object) -> bytes:
    """A state dict without tensors, in the layout that torch.save had before it wrote zip files."""
    magic, protocol = 0x1950A86A20F9469CFC6C, 1001
    info = {"protocol_version": protocol, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    return b"".join(pickle.dumps(part, protocol=2) for part in (magic, protocol, info, state, []))


def evil_bin() -> bytes:
    """A `.bin` adapter with code in it."""
    return pickled({f"base_model.model.{Q}.lora_A.weight": Evil()})


class Stored:
    """A float32 tensor in a state dict: which record holds its storage, how it lies there."""

    def __init__(self, record: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.record, self.shape, self.strides = record, shape, strides

    def __reduce__(self) -> tuple[Any, ...]:
        from torch._utils import _rebuild_tensor_v2

        return _rebuild_tensor_v2, (_Storage(self.record), 0, self.shape, self.strides, False, OrderedDict())


@dataclass(frozen=True)
class _Storage:
    record: str


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        if not isinstance(value, _Storage):
            return None
        import torch

        return "storage", torch.FloatStorage, value.record, "cpu", 16


def zipped(state: object, *, method: int = zipfile.ZIP_STORED) -> bytes:
    """A state dict in the layout of torch.save, its storages 16 numbers each, in records packed by `method`."""
    tree, archive = io.BytesIO(), io.BytesIO()
    _Pickler(tree, protocol=2).dump(state)
    with zipfile.ZipFile(archive, "w") as z:
        for name, raw in (("data.pkl", tree.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            z.writestr(zipfile.ZipInfo(f"archive/{name}"), raw)
        z.writestr(zipfile.ZipInfo("archive/data/0"), numbers(4, 4).data, method)
    return archive.getvalue()


def with_bin(raw: bytes) -> Files:
    return {"adapter/adapter_config.json": text(LORA), "adapter/adapter_model.bin": raw}


# --- the cases, by the module that raises the error


def geometry() -> Iterator[Case]:
    yield Case("geometry-rank", "plan base --rank 0", {"base/config.json": text(LLAMA)}, 2)
    yield Case("geometry-unshared", "compress adapter -o OUT --unshared 3 --chunks 2", adapter(), 2)
    yield Case("geometry-unshared--negative", "compress adapter -o OUT --unshared -1 --chunks 2", adapter(), 2)
    yield Case("geometry-chunks", "compress adapter -o OUT --unshared 1 --chunks 2,0", adapter(), 2)
    yield Case("geometry-chunks--of-a", "compress adapter -o OUT --unshared 1 --chunks 0 --dry-run", adapter(), 2)


def config_json() -> Iterator[Case]:
    def broken(raw: bytes) -> Files:
        return {**adapter(), "adapter/adapter_config.json": raw}

    yield Case("json-invalid", EXPAND, broken(b'{"peft_type": "LORA", "r": '), foreign="no JSON object:")
    yield Case("json-invalid--list", EXPAND, broken(b"[1, 2]\n"))
    yield Case("json-invalid--not-utf8", EXPAND, broken(b'{"peft_type": "LOR\xc1"}'), foreign="no JSON object:")
    yield Case("json-invalid--surrogate", EXPAND, broken(b'{"task_type": "\\uD800"}'), foreign="no JSON object:")
    yield Case("json-invalid--deep", EXPAND, broken(b'{"r":' + b"[" * 5000), foreign="no JSON object:")
    yield Case(
        "json-invalid--base", MERGE, {**adapter(), **base(), "base/config.json": b"{"}, foreign="no JSON object:"
    )
    yield Case("json-duplicate-key", EXPAND, broken(b'{"peft_type": "LORA", "r": 2, "r": 4}'))

    yield Case("config-peft-type", EXPAND, adapter({"peft_type": "ADALORA"}))
    for other in ("IA3", "LOHA", "VERA", "BOFT", None, ["LORA"]):
        name = other.lower() if isinstance(other, str) else "missing" if other is None else "list"
        yield Case(f"config-peft-type--{name}", MERGE, {**adapter({"peft_type": other}), **base()})
    yield Case("config-format-version", EXPAND, prolora({"format_version": 2}))

    for init in ("pissa_niter_4", "olora", "corda", "loftq", "lora_ga"):
        variant = "" if init == "olora" else f"--{init.partition('_niter')[0]}"
        yield Case(f"config-base-changing-init{variant}", COMPRESS, adapter({"init_lora_weights": init}))
    refused: dict[str, object] = {
        "alora_invocation_tokens": [5, 6],
        "arrow_config": {"top_k": 3},
        "kasa_config": {"beta": 0.1},
        "use_qalora": True,
        "use_bdlora": {"nblocks": 2},
        "monteclora_config": {"num_samples": 4},
        "layer_replication": [[0, 1], [0, 1]],
        "megatron_config": {"tensor_model_parallel_size": 2},
    }
    for field, value in refused.items():
        variant = "" if field == "arrow_config" else f"--{field}"
        yield Case(f"config-variant{variant}", MERGE, {**adapter({field: value}), **base()})

    wrong: dict[str, tuple[str, object]] = {
        "": ("r", 0),
        "--r-text": ("r", "2"),
        "--r-bool": ("r", True),
        "--alpha-nan": ("lora_alpha", NAN),
        "--alpha-huge": ("lora_alpha", 10**400),
        "--use_rslora": ("use_rslora", "yes"),
        "--bias": ("bias", ["all"]),
        "--target_modules": ("target_modules", 5),
        "--target_modules-regex": ("target_modules", "(q_proj"),
        "--exclude_modules": ("exclude_modules", {"q_proj": 1}),
        "--target_parameters": ("target_parameters", "experts"),
        "--rank_pattern": ("rank_pattern", ["q_proj"]),
        "--rank_pattern-float": ("rank_pattern", {"q_proj": 2.5}),
        "--alpha_pattern-infinite": ("alpha_pattern", {"q_proj": INF}),
        "--alpha_pattern-regex": ("alpha_pattern", {"(?i)q_proj": 4}),
    }
    for variant, (field, value) in wrong.items():
        foreign = "regular expressions (" if "regex" in variant else None
        yield Case(f"config-field{variant}", EXPAND, adapter({field: value}), foreign=foreign)
    yield Case("config-field--chunks", EXPAND, prolora({"chunks_A": 0}))
    yield Case("config-field--stride", EXPAND, prolora({"stride_B": -1}))
    yield Case("config-field--rotate", EXPAND, prolora({"rotate": 1}))
    yield Case("config-geometry", EXPAND, prolora({"unshared_r": 3}))
    yield Case("config-geometry--rank_pattern", EXPAND, adapter({"rank_pattern": {"q_proj": 0}}))
    yield Case("config-geometry--chunks_pattern", EXPAND, prolora({"chunks_B_pattern": {"q_proj": 0}}))
    yield Case("config-geometry--stride_pattern", EXPAND, prolora({"stride_A_pattern": {"q_proj": -1}}))


def safetensors_file() -> Iterator[Case]:
    names = [f"base_model.model.{name}" for name in factors()]
    sound = prefixed(factors())
    data = b"".join(t.data for t in sound.values())

    def changed(**entry: object) -> Files:
        """The second tensor's entry with other fields."""
        header = header_of(sound)
        header[names[1]] |= entry
        return adapter(weights=pack(header, data))

    def raw(weights: bytes) -> Files:
        return adapter(weights=weights)

    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 312\n"
    yield Case("safetensors-header-size", EXPAND, raw(pointer))
    yield Case("safetensors-header-size--base", MERGE, {**adapter(), **base(weights=pack(b"{}", b"", 2**63))})
    yield Case("safetensors-truncated", EXPAND, raw(pack(header_of(sound), data)[:100]))
    yield Case("safetensors-truncated--empty", EXPAND, raw(b""))
    yield Case("safetensors-truncated--seven-bytes", EXPAND, raw(b"\x02\0\0\0\0\0\0"))
    yield Case("safetensors-truncated--header-longer", MERGE, {**adapter(), **base(weights=pack(b"{}", b"", 3))})
    said = "no JSON object:"
    yield Case("safetensors-header-json", EXPAND, raw(pack(b'{"a": ', b"")), foreign=said)
    yield Case("safetensors-header-json--list", EXPAND, raw(pack(b"[]", b"")))
    yield Case("safetensors-header-json--not-utf8", EXPAND, raw(pack(b'{"\xff": 1}', b"")), foreign=said)
    yield Case("safetensors-header-json--surrogate", EXPAND, raw(pack(b'{"\\udc00": 1}', b"")), foreign=said)
    twice = json.dumps(header_of(sound))[:-1] + "," + json.dumps({names[0]: header_of(sound)[names[0]]})[1:]
    yield Case("json-duplicate-key--tensor", EXPAND, raw(pack(twice.encode(), data)))
    yield Case("safetensors-metadata", EXPAND, raw(pack({"__metadata__": {"format": 1}, **header_of(sound)}, data)))
    yield Case("safetensors-metadata--list", EXPAND, raw(pack({"__metadata__": [], **header_of(sound)}, data)))
    yield Case("safetensors-entry", EXPAND, raw(pack({names[0]: {"dtype": "F32", "shape": [2]}}, data)))
    yield Case("safetensors-entry--array", EXPAND, raw(pack({names[0]: ["F32", [2], [0, 8]]}, data)))
    yield Case("safetensors-dtype", EXPAND, changed(dtype="F31"))
    yield Case("safetensors-dtype--number", EXPAND, changed(dtype=32))
    yield Case("safetensors-shape", EXPAND, changed(shape=[-4, -2]))
    yield Case("safetensors-shape--float", EXPAND, changed(shape=[4, 2.0]))
    yield Case("safetensors-shape--too-large", EXPAND, changed(shape=[2**40, 2**40, 0]))
    yield Case("safetensors-offsets", EXPAND, changed(data_offsets=[32]))
    yield Case("safetensors-offsets--negative", EXPAND, changed(data_offsets=[-32, 0]))
    yield Case("safetensors-size", EXPAND, changed(data_offsets=[32, 60]))
    yield Case("safetensors-size--backwards", EXPAND, changed(data_offsets=[64, 32]))
    yield Case("safetensors-size--half-a-byte", EXPAND, changed(dtype="F4", shape=[63]))
    yield Case("safetensors-layout", EXPAND, changed(data_offsets=[16, 48]))
    yield Case("safetensors-layout--gap", EXPAND, changed(data_offsets=[40, 72]))
    yield Case("safetensors-data-size", EXPAND, raw(pack(header_of(sound), data[:-1])))
    yield Case("safetensors-data-size--longer", EXPAND, raw(pack(header_of(sound), data + b"\0")))
    yield Case(
        "safetensors-data-size--base", MERGE, {**adapter(), **base(weights=base()["base/model.safetensors"][:-9])}
    )


def tensors() -> Iterator[Case]:
    a, b = factors()
    eight_bits = {**factors(), a: Tensor("I8", (2, 4), bytes(8))}
    yield Case("tensor-not-float", EXPAND, adapter(tensors=eight_bits))
    fp8 = {f"{Q}.weight": Tensor("F8_E4M3", (4, 4), bytes(16))}
    yield Case("tensor-not-float--base", MERGE, {**adapter(), **base(tensors=fp8)})
    for variant, key, tensor in (
        ("", a, numbers(2, 4, at={5: NAN})),
        ("--b-infinite", b, numbers(4, 2, at={7: -INF})),
        ("--bfloat16", b, numbers(4, 2, dtype="BF16", at={0: INF, 1: NAN})),
    ):
        yield Case(f"tensor-not-finite{variant}", COMPRESS, adapter(tensors={**factors(), key: tensor}))
    bad = adapter(tensors={**factors(), a: numbers(2, 4, at={5: NAN})})
    yield Case("tensor-not-finite--merge", MERGE, {**bad, **base()})
    yield Case("tensor-not-finite--expand-uniform", "expand adapter -o OUT --uniform", bad)
    chunk = {**shared(), f"{Q}.prolora_A": numbers(1, 2, at={1: NAN})}
    yield Case("tensor-not-finite--prolora", EXPAND, prolora(tensors=chunk))


def adapter_folder() -> Iterator[Case]:
    a, b = factors()
    yield Case("folder-missing", EXPAND, {})
    yield Case("folder-missing--file", "expand adapter/adapter_config.json -o OUT", adapter())
    yield Case("folder-missing--base", MERGE, adapter())
    yield Case("adapter-no-config", EXPAND, {"adapter/adapter_model.safetensors": safetensors({})})
    yield Case("adapter-no-weights", EXPAND, {"adapter/adapter_config.json": text(LORA)})
    yield Case("adapter-key-prefix", EXPAND, adapter(weights=safetensors(factors())))
    yield Case("adapter-empty", EXPAND, adapter(tensors={}))
    yield Case("adapter-empty--wrong-type", EXPAND, prolora({"modules_to_save": ["q_proj"]}, factors()))

    def extra(name: str, tensor: Tensor, **config: object) -> Files:
        return adapter(config, {**factors(), name: tensor})

    yield Case("adapter-unused-tensor", EXPAND, extra(f"{Q}.lora_C.weight", numbers(2, 2)))
    yield Case("adapter-unused-tensor--bias", EXPAND, extra("model.norm.bias", numbers(4)))
    yield Case("adapter-unused-tensor--not-saved", EXPAND, extra("score.weight", numbers(2, 4), modules_to_save=["x"]))
    yield Case("adapter-unused-tensor--prolora-in-lora", EXPAND, adapter(tensors={**factors(), **shared(Q1)}))

    yield Case("adapter-missing-tensor", EXPAND, adapter(tensors={a: numbers(2, 4)}))
    yield Case("adapter-missing-tensor--a", MERGE, {**adapter(tensors={b: numbers(4, 2)}), **base()})
    three = {k: t for k, t in shared().items() if not k.endswith("A_unshared")}
    yield Case("adapter-missing-tensor--prolora", EXPAND, prolora(tensors=three))
    halves = {**factors(), f"{Q1}.lora_B.bias": numbers(4)}
    yield Case("adapter-missing-tensor--only-bias", EXPAND, adapter({"lora_bias": True}, halves))

    yield Case("adapter-shape", EXPAND, adapter({"r": 3}))
    yield Case("adapter-shape--rank_pattern", COMPRESS, adapter({"rank_pattern": {"q_proj": 1}}))
    yield Case("adapter-shape--pair", EXPAND, adapter(tensors={**factors(), b: numbers(4, 3)}))
    yield Case("adapter-shape--vector", EXPAND, adapter(tensors={**factors(), a: numbers(2)}))
    yield Case("adapter-shape--no-columns", EXPAND, adapter(tensors={**factors(), a: numbers(2, 0)}))
    yield Case("adapter-shape--no-rows", EXPAND, adapter(tensors={**factors(), b: numbers(0, 2)}))
    yield Case("adapter-shape--kernel", EXPAND, adapter(tensors={**factors(), a: numbers(2, 4, 3, 3)}))
    biased = {**factors(), f"{Q}.lora_B.bias": numbers(3)}
    yield Case("adapter-shape--lora_bias", EXPAND, adapter({"lora_bias": True}, biased))
    magnitude = {**factors(), f"{Q}.lora_magnitude_vector": numbers(3)}
    yield Case("adapter-shape--magnitude", EXPAND, adapter({"use_dora": True}, magnitude))
    yield Case("adapter-shape--chunks", EXPAND, prolora({"chunks_A": 4}))
    yield Case("adapter-shape--unshared", MERGE, {**prolora({"unshared_r": 0}), **base()})

    yield Case("adapter-dora", EXPAND, adapter({"use_dora": True}))
    dora = {**factors(), f"{Q}.lora_magnitude_vector": numbers(4)}
    yield Case("adapter-dora--not-said", MERGE, {**adapter(tensors=dora), **base()})
    yield Case("adapter-target-modules", EXPAND, adapter({"target_modules": ["v_proj"]}))
    yield Case("adapter-target-modules--regex", EXPAND, adapter({"target_modules": r".*\.1\..*"}))
    yield Case("adapter-target-modules--whole-names", EXPAND, adapter({"target_modules": ["proj", "q_proj.0"]}))

    tokens = {**factors(), "model.embed_tokens.token_adapter.trainable_tokens_delta": numbers(2, 4)}
    known = {f"{Q}.weight": numbers(4, 4), "model.embed_tokens.weight": numbers(6, 4)}
    for variant, indices in (("", [1, 2, 3]), ("--not-said", None), ("--negative", {"embed_tokens": [-1, 2]})):
        files = {**adapter({"trainable_token_indices": indices}, tokens), **base(tensors=known, whole=LLAMA)}
        yield Case(f"adapter-token-indices{variant}", MERGE, files)


def pickles() -> Iterator[Case]:
    refuses = "refuses it:"
    yield Case("bin-unreadable", EXPAND, with_bin(b"PK\x03\x04 no zip"), foreign=refuses)
    yield Case("bin-unreadable--code", EXPAND, with_bin(evil_bin()), foreign=refuses)
    yield Case("bin-unreadable--code-merge", MERGE, {**with_bin(evil_bin()), **base()}, foreign=refuses)
    yield Case("bin-unreadable--empty", EXPAND, with_bin(b""), foreign=refuses)
    yield Case("bin-unreadable--truncated", EXPAND, with_bin(pickled({"a": 1.0})[:-8]), foreign=refuses)
    yield Case("bin-content", EXPAND, with_bin(pickled({f"base_model.model.{Q}.lora_A.weight": 3})))
    yield Case("bin-content--list", EXPAND, with_bin(pickled([1.0, 2.0])))


def base_bin(raw: bytes, name: str = "pytorch_model.bin") -> Files:
    """A base whose weights are a pickle."""
    return {**adapter(), "base/config.json": text({"model_type": "llama"}), f"base/{name}": raw}


def pickled_bases() -> Iterator[Case]:
    sound = {f"{Q}.weight": Stored("0", (4, 4), (4, 1))}
    old = pickled({f"{Q}.weight": 1.0})
    yield Case("bin-old", MERGE, base_bin(old))
    yield Case("bin-old--pointer", MERGE, base_bin(b"version https://git-lfs.github.com/spec/v1\n"))
    turned = {f"{Q}.weight": Stored("0", (4, 4), (1, 4))}
    yield Case("bin-not-contiguous", MERGE, base_bin(zipped(turned)))
    yield Case("bin-places", MERGE, base_bin(zipped(sound, method=zipfile.ZIP_DEFLATED)))
    refuses = "refuses it:"
    yield Case("bin-unreadable--base", MERGE, base_bin(b"PK\x03\x04 no zip"), foreign=refuses)
    yield Case("bin-unreadable--base-code", MERGE, base_bin(zipped({**sound, "x": Evil()})), foreign=refuses)
    yield Case("bin-content--base", MERGE, base_bin(zipped({**sound, "step": 3})))
    index = {"weight_map": {f"{Q}.weight": "pytorch_model-1.bin", f"{Q1}.weight": "pytorch_model-1.bin"}}
    shard = {"base/pytorch_model-1.bin": zipped(sound)}
    yield Case("index-tensor-missing--bin", MERGE, {**base_bin(text(index), "pytorch_model.bin.index.json"), **shard})
    outside = {"weight_map": {f"{Q}.weight": "../pytorch_model.bin"}}
    yield Case("index-file-name--pickled", MERGE, base_bin(text(outside), "pytorch_model.bin.index.json"))
    safe = {"weight_map": {f"{Q}.weight": "model.safetensors-1"}}
    yield Case("index-file-name--other", MERGE, base_bin(text(safe), "pytorch_model.bin.index.json"))


def quantised() -> Iterator[Case]:
    four, eight, fp8 = ({"quantization_config": {"quant_method": m}} for m in ("bitsandbytes", "bitsandbytes", "fp8"))
    name = f"{Q}.weight"
    packed = {name: Tensor("U8", (8, 1), bytes(8))}
    told = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 4]}

    def state(value: object) -> dict[str, Tensor]:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        return {f"{name}.quant_state.bitsandbytes__nf4": Tensor("U8", (len(raw),), raw)}

    def case(variant: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Case:
        return Case(f"base-quantised-tensor{variant}", MERGE, {**adapter(), **base(config, tensors)})

    scales, codes = {f"{name}.absmax": numbers(1)}, {f"{name}.quant_map": numbers(16)}
    yield case("", four, {**packed, **state(told), **codes})
    yield case("--no-state", four, {**packed, **scales, **codes})
    yield case("--hub-header", four, {**packed, **state(bytes(40)), **scales, **codes})
    yield case("--size", four, {**packed, **state({**told, "shape": [4, 5]}), **scales, **codes})
    yield case("--absmax", four, {**packed, **state(told), **codes, f"{name}.absmax": numbers(2)})
    whole = {name: Tensor("I8", (4, 4), bytes(16))}
    yield case("--int8", eight, {**whole, f"{Q}.SCB": numbers(3)})
    yield case("--int8-alone", eight, whole)
    layout = {f"{Q}.weight_format": Tensor("U8", (), b"\2")}
    yield case("--int8-layout", eight, {**whole, f"{Q}.SCB": numbers(4), **layout})
    yield case("--int8-dtype", eight, {name: numbers(4, 4), f"{Q}.SCB": numbers(4)})
    small_gpt2 = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 4, "n_layer": 1, "n_head": 1,
        "vocab_size": 6, "n_positions": 8,
    }  # fmt: skip
    turned = "transformer.h.0.attn.c_attn"
    conv = {
        f"{turned}.weight": Tensor("I8", (12, 4), bytes(48)),
        f"{turned}.SCB": numbers(12),
        f"{turned}.bias": numbers(12),
    }
    gpt2 = adapter({"target_modules": ["c_attn"]}, factors(turned, dims=(4, 12)))
    yield Case("base-quantised-conv1d", MERGE, {**gpt2, **base({**small_gpt2, **eight}, conv)})
    small = {name: Tensor("F8_E4M3", (4, 4), bytes(16))}
    yield case("--fp8", fp8, {**small, f"{name}_scale_inv": numbers(3)})
    yield case("--fp8-other", fp8, {**whole, f"{name}_scale_inv": numbers(1)})


def checkpoint() -> Iterator[Case]:
    config = {"base/config.json": text({"model_type": "llama"})}
    yield Case("base-no-config", MERGE, {**adapter(), "base/model.safetensors": safetensors({})})
    yield Case("base-no-config--plan", PLAN, {"base/README.md": b"nothing here\n"}, 1)
    yield Case("base-no-weights", MERGE, {**adapter(), **config})
    yield Case("base-bin", MERGE, {**adapter(), **config, "base/pytorch_model-00001-of-00002.bin": b"\x80"})
    merged = {"merged/config.json": text({}), "merged/pytorch_model.bin": zipped({})}
    yield Case("base-bin--merged", "verify merged --base base --adapter adapter", {**adapter(), **base(), **merged})
    yield from pickled_bases()
    yield Case("base-config-field", MERGE, {**adapter(), **base({"model_type": ["llama"]})})

    def case(name: str, index: object, shards: Mapping[str, bytes] | None = None) -> Case:
        return Case(name, MERGE, {**adapter(), **indexed(index, shards)})

    one, two = f"{Q}.weight", f"{Q1}.weight"
    yield case("index-invalid", {"metadata": {}})
    yield case("index-invalid--empty", {"weight_map": {}})
    yield case("index-invalid--number", {"weight_map": {one: 1}})
    yield case("index-invalid--metadata", {"metadata": [1], "weight_map": {one: "model-1.safetensors"}})
    yield case("index-file-name", {"weight_map": {one: "../adapter/adapter_model.safetensors"}})
    yield case("index-file-name--bin", {"weight_map": {one: "pytorch_model-1.bin"}})
    yield case("index-file-name--unprintable", {"weight_map": {one: "\0.safetensors"}})
    here = "model-1.safetensors"
    yield case("index-tensor-missing", {"weight_map": {one: here, two: here}})
    both = {here: safetensors({one: numbers(4, 4), two: numbers(4, 4)})}
    yield case("index-tensor-extra", {"weight_map": {one: here}}, both)
    apart = {here: safetensors({one: numbers(4, 4)}), "model-2.safetensors": safetensors({one: numbers(4, 4)})}
    yield case("index-tensor-extra--twice", {"weight_map": {one: here, two: "model-2.safetensors"}}, {
        **apart, "model-2.safetensors": safetensors({one: numbers(4, 4), two: numbers(4, 4)})
    })  # fmt: skip
    yield case("file-missing", {"weight_map": {one: "model-2.safetensors"}})
    yield case("file-unreadable", {"weight_map": {one: "d.safetensors"}}, {"d.safetensors/README.md": b"a folder\n"})


def output() -> Iterator[Case]:
    for variant, out in (("", "adapter"), ("--inside", "adapter/OUT"), ("--around", "."), ("--dots", "OUT/../adapter")):
        command = f"expand adapter -o {out}"
        yield Case(f"output-overlaps-input{variant}", command, adapter())
    yield Case("output-overlaps-input--overwrite", f"{COMPRESS.replace('OUT', 'adapter')} --overwrite", adapter())
    yield Case("output-overlaps-input--dry-run", "expand adapter -o adapter/OUT --dry-run", adapter())
    yield Case("output-overlaps-input--base", "merge adapter --base base -o base/OUT", {**adapter(), **base()})
    yield Case("output-not-folder", f"{EXPAND} --overwrite", {**adapter(), "OUT": b"a file\n"})
    full = {**adapter(), **adapter(folder="OUT")}
    yield Case("output-exists", EXPAND, full)
    yield Case("output-exists--dry-run", f"{COMPRESS} --dry-run", full)
    yield Case("output-exists--merge", MERGE, {**full, **base()})
    yield Case("output-not-model", f"{EXPAND} --overwrite", {**adapter(), "OUT/thesis.txt": b"not to be lost\n"})


def operations() -> Iterator[Case]:
    dora = adapter({"use_dora": True}, {**factors(), f"{Q}.lora_magnitude_vector": numbers(4)})
    yield Case("compress-dora", COMPRESS, dora)
    yield Case("compress-prolora", COMPRESS, prolora())
    other = adapter(tensors=factors(dims=(4, 6)), folder="other")
    yield Case("diff-dims", "diff adapter other", {**adapter(), **other})
    yield Case("diff-dora", "diff adapter adapter", dora)
    head = {**factors(), "lm_head.weight": numbers(6, 4)}
    saved = adapter({"modules_to_save": ["lm_head"]}, head)
    yield Case("expand-uniform-extras", "expand adapter -o OUT --uniform", saved)
    yield Case("expand-uniform-extras--dora", "expand adapter -o OUT --uniform", dora)

    wide = adapter(tensors={**factors(), f"{Q}.lora_B.weight": numbers(4, 2, at={2: 65520})})
    yield Case("factor-overflow", "expand adapter -o OUT --dtype float16", wide)
    yield Case("factor-overflow--compress", f"{COMPRESS} --method average --dtype float16", wide)
    huge = {name: numbers(*t.shape, dtype="F64", at={1: 1e150}) for name, t in factors().items()}
    yield Case("compress-range", COMPRESS, adapter(tensors=huge))
    half = {name: numbers(*t.shape, dtype="F16", at={1: 60000}) for name, t in factors().items()}
    scaled = adapter({"use_rslora": True}, half)
    yield Case("factor-overflow--uniform", "expand adapter -o OUT --uniform", scaled)

    listed = {"OUT/merge_manifest.json": text({"files": {"../adapter": {"bytes": 1, "sha256": "00"}}})}
    yield Case("manifest-invalid", "verify OUT --manifest", listed)
    yield Case("manifest-invalid--no-files", "verify OUT --manifest", {"OUT/merge_manifest.json": text({})})

    yield Case("plan-one-of", "plan base", {"base/config.json": text(LLAMA)}, 2)
    yield Case("plan-one-of--two", "plan base --rank 2 --budget 5k", {"base/config.json": text(LLAMA)}, 2)
    yield Case("plan-number", "plan base --budget 0", {"base/config.json": text(LLAMA)}, 2)
    yield Case("plan-number--huge", f"plan base --limit {10**30} --rank 2", {"base/config.json": text(LLAMA)}, 2)
    yield Case("plan-number--rank", "plan base --like-lora-rank -1", {"base/config.json": text(LLAMA)}, 2)
    yield Case("plan-no-targets", f"{PLAN} --targets query,value", {"base/config.json": text(LLAMA)})
    yield Case("plan-no-targets--none-named", f"{PLAN} --targets ,", {"base/config.json": text(LLAMA)})


MODEL = {f"{Q}.weight": numbers(4, 4), "model.embed_tokens.weight": numbers(6, 4), "lm_head.weight": numbers(6, 4)}
"""The weights of LLAMA that cases need."""


def not_finite() -> Iterator[Case]:
    overflow = {f"{Q}.weight": numbers(4, 4, dtype="F16", at={3: 65504})}
    large = {**factors(), f"{Q}.lora_A.weight": numbers(2, 4, at={3: 1e6, 7: 1e6})}
    for variant, weight in (
        ("", {f"{Q}.weight": numbers(4, 4, at={9: NAN})}),
        ("--bfloat16", {f"{Q}.weight": numbers(4, 4, dtype="BF16", at={2: INF})}),
    ):
        yield Case(f"merge-not-finite{variant}", MERGE, {**adapter(), **base(tensors=weight)})
    dora = adapter({"use_dora": True}, {**factors(), f"{Q}.lora_magnitude_vector": numbers(4)})
    zero = {f"{Q}.weight": Tensor("F32", (4, 4), bytes(64))}
    flat = adapter(
        {"use_dora": True},
        {**factors(), f"{Q}.lora_B.weight": Tensor("F32", (4, 2), bytes(32)), f"{Q}.lora_magnitude_vector": numbers(4)},
    )
    yield Case("merge-not-finite--dora", MERGE, {**dora, **base(tensors={f"{Q}.weight": numbers(4, 4, at={1: NAN})})})
    yield Case("merge-not-finite--dora-zero-row", MERGE, {**flat, **base(tensors=zero)})
    largest = {f"{Q}.lora_A.weight": numbers(2, 4, at={0: 1e30}), f"{Q}.lora_B.weight": numbers(4, 2, at={0: 1e30})}
    yield Case("merge-not-finite--product", MERGE, {**adapter(tensors=largest), **base()})
    yield Case("merge-not-finite--overflow", MERGE, {**adapter(tensors=large), **base(tensors=overflow)})
    head = adapter({"modules_to_save": ["lm_head"]}, {**factors(), "lm_head.weight": numbers(6, 4, at={23: NAN})})
    yield Case("merge-not-finite--modules_to_save", MERGE, {**head, **base(tensors=MODEL, whole=LLAMA)})


def of_experts() -> Iterator[Case]:
    """A mixture of experts, one tensor each, and an adapter for the fused parameter."""
    experts = "model.layers.0.mlp.experts"
    mixture = {
        **LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 1,
        "num_experts_per_tok": 1,
    }  # fmt: skip
    stored = {
        f"{Q}.weight": numbers(4, 4),
        **{f"model.layers.0.block_sparse_moe.experts.0.{w}.weight": numbers(4, 4) for w in ("w1", "w2", "w3")},
    }
    saved = adapter({"modules_to_save": ["experts"]}, {**factors(), f"{experts}.down_proj": numbers(1, 4, 4)})
    yield Case("merge-part", MERGE, {**saved, **base(tensors=stored, whole=mixture)})
    wrapped = {**factors(), **factors(experts)}
    targets = {"target_parameters": ["experts.down_proj"]}
    two = {**mixture, "num_local_experts": 2}
    pairs = {**factors(), **factors(experts, rank=4)}
    yield Case("merge-fused", MERGE, {**adapter(targets, pairs), **base(tensors=stored, whole=two)})
    wide = {**wrapped, **factors(experts, rank=3)}
    yield Case("merge-parameter-rank", MERGE, {**adapter(targets, wide), **base(tensors=stored, whole=mixture)})
    tall = {**wrapped, **factors(experts, dims=(6, 4))}
    yield Case("merge-shape--experts", MERGE, {**adapter(targets, tall), **base(tensors=stored, whole=mixture)})
    both = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    yield Case(
        "merge-module-missing--parameter", MERGE, {**adapter(both, wrapped), **base(tensors=stored, whole=mixture)}
    )
    yield Case("adapter-target-parameters", COMPRESS, adapter(targets, wrapped))
    inner = {**factors(), **factors(f"{experts}.base_layer")}
    yield Case("adapter-missing-tensor--wrapper", COMPRESS, adapter(both, inner))
    half = {**factors(), f"{experts}.lora_A.weight": numbers(2, 4)}
    yield Case("adapter-missing-tensor--half", COMPRESS, adapter(targets, half))
    vector = {**wrapped, f"{experts}.lora_magnitude_vector": numbers(4)}
    yield Case("adapter-shape--parameter-magnitude", COMPRESS, adapter(targets, vector))
    uneven = {**wrapped, f"{experts}.lora_B.weight": numbers(4, 3)}
    yield Case("adapter-shape--parameter", COMPRESS, adapter(targets, uneven))


def merging() -> Iterator[Case]:
    yield from not_finite()
    yield Case("shard-size", f"{MERGE} --max-shard-size 0GB", {**adapter(), **base()}, 2)

    yield from quantised()
    ints = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    for variant, told in (("", {"quant_method": "gptq"}), ("--awq", {"quant_method": "awq"}), ("--ints", ints)):
        config = {"quantization_config": told}
        yield Case(f"base-quantised{variant}", MERGE, {**adapter(), **base(config)})
    yield Case("base-quantised--odd", MERGE, {**adapter(), **base({"quantization_config": "int8"})})
    yield Case("merge-shape", MERGE, {**adapter(), **base(tensors={f"{Q}.weight": numbers(4, 6)})})
    yield Case("merge-shape--vector", MERGE, {**adapter(), **base(tensors={f"{Q}.weight": numbers(4)})})
    biased = adapter({"lora_bias": True}, {**factors(), f"{Q}.lora_B.bias": numbers(4)})
    weights = {f"{Q}.weight": numbers(4, 4), f"{Q}.bias": numbers(6)}
    yield Case("merge-shape--lora_bias", MERGE, {**biased, **base(tensors=weights)})
    named = adapter({"base_model_name_or_path": "owner/right-base"}, factors(dims=(6, 4)))
    yield Case("merge-shape--names-base", MERGE, {**named, **base()})
    tokens = {**factors(), "model.embed_tokens.token_adapter.trainable_tokens_delta": numbers(2, 4)}
    beyond = adapter({"trainable_token_indices": [1, 6]}, tokens)
    yield Case("merge-token-row", MERGE, {**beyond, **base(tensors=MODEL, whole=LLAMA)})
    layers = {f"{Q}.weight": numbers(4, 4), f"{Q1}.weight": numbers(4, 4)}
    yield Case("merge-module-missing", MERGE, {**adapter(), **base(tensors=layers)})
    resized = {**factors(), "model.embed_tokens.weight": numbers(7, 4), "lm_head.weight": numbers(8, 4)}
    yield Case("merge-vocabulary", MERGE, {**adapter(tensors=resized), **base(tensors=MODEL, whole=LLAMA)})

    conv = "resnet.embedder.embedder.convolution"
    grouped = {f"{conv}.lora_A.weight": numbers(2, 4, 1, 1), f"{conv}.lora_B.weight": numbers(4, 2, 1, 1)}
    vision = {
        "architectures": ["ResNetModel"], "model_type": "resnet", "num_channels": 4, "embedding_size": 4,
        "hidden_sizes": [4], "depths": [1], "layer_type": "basic",
    }  # fmt: skip
    path = conv.removeprefix("resnet.")
    files = {
        **adapter({"target_modules": ["convolution"]}, {k.removeprefix("resnet."): t for k, t in grouped.items()}),
        **base(tensors={f"{path}.weight": numbers(4, 2, 1, 1)}, whole=vision),
    }
    yield Case("merge-conv-groups", MERGE, files)

    without = {"model.embed_tokens.weight": numbers(6, 4)}
    yield Case("merge-no-such-tensor", MERGE, {**adapter(), **base(tensors=without, whole=LLAMA)})
    elsewhere = adapter(tensors=factors(Q1))
    yield Case("merge-no-such-module", MERGE, {**elsewhere, **base(whole=LLAMA)})
    yield Case("merge-no-such-module--wrong-base", MERGE, {
        **adapter({"target_modules": ["c_attn"], "base_model_name_or_path": "gpt2"}, factors("h.0.c_attn")),
        **base(whole=LLAMA),
    })  # fmt: skip
    yield from of_experts()
    code = {"model_type": "my_llama", "auto_map": {"AutoModelForCausalLM": "modeling.MyLlama"}}
    yield Case(
        "base-custom-code", MERGE, {**adapter(), **base(code, whole=LLAMA), "base/modeling.py": b"raise SystemExit\n"}
    )
    yield Case("base-custom-code--plan", PLAN, {"base/config.json": text({**LLAMA, **code})})
    cannot = "config.json:"
    yield Case("base-config-unknown", PLAN, {"base/config.json": text({"model_type": "llamma"})}, foreign=cannot)
    for variant, change in (
        ("--no-heads", {"num_attention_heads": 0}),
        ("--text", {"hidden_size": "four"}),
        ("--negative", {"hidden_size": -4}),
        ("--no-type", {"model_type": ""}),
    ):
        yield Case(
            f"base-config-unknown{variant}", PLAN, {"base/config.json": text({**LLAMA, **change})}, foreign=cannot
        )


def official() -> Iterator[Case]:
    """Raw checkpoints of the official code; the sound one has r = 2, u = 1, m = n = 2 and 4 -> 4."""
    chunks = {f"{Q}.lora_A.weight": numbers(1, 2), f"{Q}.lora_B.weight": numbers(2, 1)}
    raw = {**chunks, f"{Q}.lora_A_vec": numbers(1, 4), f"{Q}.lora_B_vec": numbers(1, 4)}
    convert = "convert-official adapter -o OUT"

    def case(
        variant: str, change: Mapping[str, Tensor | None], command: str = convert, code: int = 1, **config: object
    ) -> Case:
        """A case whose checkpoint has other tensors, those of None taken away."""
        named = {k: t for k, t in {**raw, **change}.items() if t is not None}
        return Case(f"official-{variant}", command, adapter(config, named), code)

    vectors: dict[str, Tensor | None] = {f"{Q}.lora_A_vec": None, f"{Q}.lora_B_vec": None}
    yield Case("adapter-official-raw", EXPAND, adapter(tensors=raw))
    yield Case("official-no-weights", convert, {"adapter/adapter_config.json": text(LORA)})
    yield case("needs-base", vectors, code=2, r=1)
    yield case("missing-tensor", {f"{Q}.lora_B_vec": None})
    yield case("missing-tensor--b", {**vectors, f"{Q}.lora_B.weight": None})
    yield case("unknown-tensor", {f"{Q}.lora_C": numbers(1, 1)})
    yield case("shape", {f"{Q}.lora_B.weight": numbers(2, 2)})
    yield case("shape--vector", {f"{Q}.lora_A.weight": numbers(2)})
    yield case("shape--empty", {f"{Q}.lora_A.weight": numbers(1, 0)})
    yield case("rank", {}, r=3)
    second = {k.replace(Q, Q1): t for k, t in raw.items()}
    second |= {f"{Q1}.lora_A_vec": numbers(2, 4), f"{Q1}.lora_B_vec": numbers(2, 4)}
    yield case("ranks", second, rank_pattern={"layers.1.self_attn.q_proj": 3})
    yield case("chunks", {}, f"{convert} --chunks 4,2")
    yield case("no-chunks", {f"{Q}.lora_A.weight": numbers(1, 3)})
    many = {f"{Q}.lora_A.weight": numbers(8, 1), f"{Q}.lora_B.weight": numbers(1, 8)}
    yield case("ambiguous", many, code=2, r=9)
    elsewhere = base(tensors={f"{Q1}.weight": numbers(4, 4)})
    yield Case("official-base", f"{convert} --base base", {**adapter(tensors=raw), **elsewhere})
    flat = base(tensors={f"{Q}.weight": numbers(4)})
    yield Case("official-base--vector", f"{convert} --base base", {**adapter(tensors=raw), **flat})
    yield Case("geometry-chunks--official", f"{convert} --chunks 0", adapter(tensors=raw), 2)
    chunk = struct.unpack("<32f", numbers(32, 1).data)
    half = [struct.pack("<16f", *chunk[16 * k : 16 * k + 16]) for k in (0, 1)]
    copies = Tensor("F32", (2, 32), half[0] + half[1] + half[1] + half[0])  # rolled by one rank
    out = struct.pack("<64f", *(v for k in range(32) for v in (chunk[k], chunk[(k + 16) % 32])))
    final = {f"{Q}.lora_A.weight": copies, f"{Q}.lora_B.weight": Tensor("F32", (32, 2), out)}
    yield Case("official-dry-run", f"{convert} --dry-run", adapter(tensors=final), 2)
    bad = {**raw, f"{Q}.lora_B_vec": numbers(1, 4, at={2: NAN})}
    yield Case("tensor-not-finite--official", convert, adapter(tensors=bad))


def several() -> Iterator[Case]:
    two = "merge adapter --adapter other --base base -o OUT"
    other = {**adapter(folder="other"), **base()}
    yield Case("merge-weights", f"{two} --weight 1", {**adapter(), **other}, 2)
    yield Case("merge-weights--nan", f"{MERGE} --scale nan", {**adapter(), **base()}, 2)
    dora = adapter({"use_dora": True}, {**factors(), f"{Q}.lora_magnitude_vector": numbers(4)})
    yield Case("merge-conflict", two, {**dora, **other})
    yield Case("merge-weight", f"{MERGE} --scale 0.5", {**dora, **base()})


def shapes_and_statistics() -> Iterator[Case]:
    """What compress is asked for, and what a calibration reads."""
    compress = "compress adapter -o OUT"
    yield Case("compress-request", f"{compress} --unshared 1", adapter(), 2)
    yield Case("compress-request--both", f"{COMPRESS} --budget 9", adapter(), 2)
    yield Case("compress-size", f"{compress} --budget 0", adapter(), 2)
    yield Case("compress-size--ratio", f"{compress} --ratio 0.5", adapter(), 2)
    yield Case("compress-dry-run", f"{compress} --budget 9 --dry-run", adapter(), 2)
    yield Case("compress-budget", f"{compress} --budget 1", adapter(), 2)
    yield Case("compress-no-structure", compress, adapter())
    chosen = f"{compress} --max-error 0.1 --statistics adapter/s --lengthen directions"
    moments = safetensors({f"input:{Q}": numbers(4, 4)})
    yield Case("compress-lengthen-error", chosen, {**adapter(), "adapter/s": moments}, 2)
    yield Case("compress-lengthen", f"{COMPRESS} --lengthen directions", adapter(), 2)

    with_statistics = f"{COMPRESS} --statistics adapter/statistics.safetensors"
    for variant, tensors in (
        ("statistics-content", {"moments": numbers(4, 4)}),
        ("statistics-dims", {f"input:{Q}": numbers(6, 6)}),
    ):
        yield Case(variant, with_statistics, {**adapter(), "adapter/statistics.safetensors": safetensors(tensors)})

    calibrate = f"{COMPRESS} --calibrate adapter/text.jsonl --base base"
    model = {**adapter(), **base(tensors=MODEL, whole=LLAMA)}
    words = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
        "pre_tokenizer": {"type": "Whitespace"},
    }
    tokenizer = {
        "base/tokenizer.json": text({"added_tokens": [], **words}),
        "base/tokenizer_config.json": text({"tokenizer_class": "PreTrainedTokenizerFast"}),
    }
    good = {"adapter/text.jsonl": b'"a b a b"\n'}
    yield Case("calibrate-number", f"{calibrate} --calibrate-tokens 0", {**model, **good}, 2)
    yield Case("calibrate-device", f"{calibrate} --device nowhere", {**model, **good}, 2, foreign="'nowhere':")
    yield Case("calibrate-text-encoding", calibrate, {**model, **tokenizer, "adapter/text.jsonl": b"\xff"})
    yield Case("calibrate-jsonl", calibrate, {**model, **tokenizer, "adapter/text.jsonl": b"{}\n"})
    yield Case("calibrate-tokenizer", calibrate, {**model, **good}, foreign="from base:")
    yield Case("calibrate-text-short", calibrate, {**model, **tokenizer, **good})
    weightless = {k: v for k, v in model.items() if k != "base/model.safetensors"}
    command = f"{calibrate} --calibrate-length 2"
    yield Case("calibrate-model", command, {**weightless, **tokenizer, **good}, foreign="from base:")


def cases() -> dict[str, Case]:
    """Every case by name."""
    groups = (
        geometry, config_json, safetensors_file, tensors, adapter_folder, pickles, checkpoint, output, operations,
        merging, official, several, shapes_and_statistics,
    )  # fmt: skip
    found: dict[str, Case] = {}
    for case in (case for group in groups for case in group()):
        if case.name in found:
            raise ValueError(f"two cases are named {case.name}")
        found[case.name] = case
    return dict(sorted(found.items()))


# --- writing and running them


def files_in(folder: Path) -> Files:
    """Every file of a folder by its path, `<dir>` for empty directories, and where links lead."""
    found: Files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = b"<link> " + os.fsencode(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name] = b"<dir>"
    return found


def write(folder: Path, files: Files) -> None:
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


def shown(case: Case, folder: Path, message: str) -> str:
    """What a command printed, without the folder it ran in and without the words of other libraries."""
    message = message.replace(f"{folder.resolve()}{os.sep}", "").replace(str(folder.resolve()), ".")
    if case.foreign is None:
        return message
    lines = [
        line.partition(case.foreign)[0] + f"{case.foreign} ..." if case.foreign in line else line
        for line in message.splitlines()
    ]
    return "\n".join(lines) + "\n"


def run(case: Case, folder: Path) -> tuple[int, str, str]:
    """Run a case's command in `folder`. Returns exit code, stdout, and stderr as `shown`."""
    from prolora_tools.cli import run as cli

    out, err, here = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli(case.command.split())
    finally:
        os.chdir(here)
    return code, out.getvalue(), shown(case, folder, err.getvalue())


def main() -> int:
    accept, known, failed = "--accept" in sys.argv[1:], cases(), 0
    for folder in HERE.iterdir():
        if (folder / "command").is_file() and folder.name not in known:
            shutil.rmtree(folder)
    for case in known.values():
        folder = HERE / case.name
        recorded = (folder / "stderr").read_text() if (folder / "stderr").is_file() else ""
        if folder.is_dir():
            shutil.rmtree(folder)
        write(folder, case.all_files())
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch), case.files)
            code, _, message = run(case, Path(scratch))
        if code != case.exit or (message != recorded and not accept):
            failed += 1
            sys.stdout.write(f"{case.name}: exit {code}, expected {case.exit}\n{message}\n")
        (folder / "stderr").write_text(message if accept else recorded)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
