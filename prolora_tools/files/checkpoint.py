"""A folder of model weights: one safetensors file, or shards with an index. Headers are read, tensors are not."""

from __future__ import annotations

import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prolora_tools.errors import InputError, UnsupportedError
from prolora_tools.files.tensors import StoredTensor, read_header, read_json, reading

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A base model's or a merged model's weights.

    Attributes:
        folder: where it lies.
        config: config.json.
        shards: file name -> its tensors by name, in the order of their data.
        tensors: all tensors by name.
        index_metadata: the index's `metadata`, {} without an index.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, dict[str, StoredTensor]]
    tensors: dict[str, StoredTensor]
    index_metadata: dict[str, Any]

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(t.items for t in self.tensors.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.n_bytes for t in self.tensors.values())

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config.json, the index and every shard's header.

        Raises:
            InputError: something is missing, broken, or index and shards disagree.
            UnsupportedError: the weights are in `.bin` files only.
        """
        config = read_model_config(folder)
        if (folder / INDEX).is_file():
            return cls._open_index(folder, config)
        if (folder / SINGLE).is_file():
            tensors, _ = read_header(folder / SINGLE)
            return cls(folder, config, {SINGLE: tensors}, tensors, {})
        if any(folder.glob("pytorch_model*.bin")):
            raise UnsupportedError(
                "base-bin",
                f"{folder}: the weights are in pytorch_model*.bin files, which merge does not read",
                hint="load the model with transformers and save_pretrained() it as safetensors first",
            )
        raise InputError(
            "base-no-weights",
            f"{folder}: neither {SINGLE} nor {INDEX} is there",
            hint="give the folder of a transformers model with its weights",
        )

    @classmethod
    def _open_index(cls, folder: Path, config: dict[str, Any]) -> Checkpoint:
        index = read_json(folder / INDEX)
        weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
            or not isinstance(metadata, dict)
        ):
            raise InputError(
                "index-invalid",
                f"{folder / INDEX}: expected the objects weight_map, of file names, and metadata",
                hint="download the index again",
            )
        shards: dict[str, dict[str, StoredTensor]] = {}
        for file_name in sorted(set(weight_map.values())):
            plain = file_name.isprintable() and Path(file_name).name == file_name
            if not plain or not file_name.endswith(".safetensors"):
                raise InputError(
                    "index-file-name",
                    f"{folder / INDEX}: {file_name!r} is not the name of a safetensors file in this folder",
                    hint="download the index again",
                )
            shards[file_name] = read_header(folder / file_name)[0]
        for name, file_name in weight_map.items():
            if name not in shards[file_name]:
                raise InputError(
                    "index-tensor-missing",
                    f"{folder / INDEX} places {name!r} in {file_name}, which does not hold it",
                    hint="download the index and its shards again, from one revision",
                )
        for file_name, tensors in shards.items():
            for name in tensors:
                if weight_map.get(name) != file_name:
                    raise InputError(
                        "index-tensor-extra",
                        f"{folder / file_name} holds {name!r}, which {INDEX} does not place there",
                        hint="download the index and its shards again, from one revision",
                    )
        return cls(folder, config, shards, {n: shards[f][n] for n, f in weight_map.items()}, metadata)


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        InputError: the folder or the file is missing, or is no JSON object.
    """
    require_folder(folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            "base-no-config",
            f"{folder} has no config.json, so it is not a transformers model",
            hint="give the folder that holds the model's config.json",
        )
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type", ""), str):
        raise InputError(
            "base-config-field",
            f"{folder / 'config.json'}: model_type is {reprlib.repr(config['model_type'])}, expected a name",
            hint="repair the field, or download the file again",
        )
    return config


def require_folder(folder: Path) -> None:
    """Raises InputError unless `folder` is a directory whose files can be listed and reached."""
    with reading(folder):
        if not folder.is_dir():
            what = "is a file, expected a folder" if folder.exists() else "does not exist"
            raise InputError("folder-missing", f"{folder} {what}", hint="check the path")
        os.scandir(folder).close()
        os.stat(os.path.join(folder, "."))  # noqa: PTH116, PTH118 - a Path would drop the dot
