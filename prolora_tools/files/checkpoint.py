"""A folder of model weights: one file, or shards with an index, of safetensors or, for a base, of pickled state dicts.

Headers are read, tensors are not.
"""

from __future__ import annotations

import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prolora_tools.errors import InputError, UnsupportedError
from prolora_tools.files.pickled import read_places
from prolora_tools.files.tensors import StoredTensor, read_header, read_json, reading

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A base model's or a merged model's weights.

    Attributes:
        folder: where it lies.
        config: config.json.
        shards: file name -> its tensors by name, in the order of their data. Pickled shards stand under the names
            that transformers would give them as safetensors files.
        tensors: all tensors by name.
        index_metadata: the index's `metadata`, {} without an index.
        files: the files that hold the tensors.
        as_stored: whether each shard is the safetensors file of its name, with these tensors and no others.
        notes: what to tell about the choice of files.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, dict[str, StoredTensor]]
    tensors: dict[str, StoredTensor]
    index_metadata: dict[str, Any]
    files: tuple[Path, ...]
    as_stored: bool = True
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(t.items for t in self.tensors.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.n_bytes for t in self.tensors.values())

    @classmethod
    def open(cls, folder: Path, *, pickled: bool = False) -> Checkpoint:
        """Read config.json, the index and every shard's header.

        Args:
            folder: the folder.
            pickled: take pytorch_model.bin or its shards where there is no safetensors file.

        Raises:
            InputError: something is missing, broken, or index and shards disagree.
            UnsupportedError: the weights are in `.bin` files only, which are not asked for or not of a kind that
                can be mapped.
        """
        config = read_model_config(folder)
        other = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
        notes = tuple(f"{name} is there too and was not read; safetensors files were" for name in other[:1])
        if (folder / INDEX).is_file():
            return cls._open_index(folder, config, INDEX, notes=notes)
        if (folder / SINGLE).is_file():
            tensors, _ = read_header(folder / SINGLE)
            return cls(folder, config, {SINGLE: tensors}, tensors, {}, (folder / SINGLE,), notes=notes)
        if pickled and (folder / BIN_INDEX).is_file():
            return cls._open_index(folder, config, BIN_INDEX)
        if pickled and (folder / BIN).is_file():
            tensors = read_places(folder / BIN)
            return cls(folder, config, {SINGLE: tensors}, tensors, {}, (folder / BIN,), as_stored=False)
        if other:
            raise UnsupportedError(
                "base-bin",
                f"{folder}: neither {SINGLE} nor {INDEX} is there, and {other[0]} is not read here",
                hint=f"a base may have {BIN}, or {BIN_INDEX} and what it names; else load the model with "
                "transformers and save_pretrained() it",
            )
        raise InputError(
            "base-no-weights",
            f"{folder}: neither {SINGLE} nor {INDEX} is there",
            hint="give the folder of a transformers model with its weights",
        )

    @classmethod
    def _open_index(
        cls, folder: Path, config: dict[str, Any], index_name: str, *, notes: tuple[str, ...] = ()
    ) -> Checkpoint:
        safe = index_name == INDEX
        kind, suffix = ("safetensors", ".safetensors") if safe else ("pickled", ".bin")
        index = read_json(folder / index_name)
        weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
            or not isinstance(metadata, dict)
        ):
            raise InputError(
                "index-invalid",
                f"{folder / index_name}: expected the objects weight_map, of file names, and metadata",
                hint="download the index again",
            )
        shards: dict[str, dict[str, StoredTensor]] = {}
        for file_name in sorted(set(weight_map.values())):
            plain = file_name.isprintable() and Path(file_name).name == file_name
            if not plain or not file_name.endswith(suffix):
                raise InputError(
                    "index-file-name",
                    f"{folder / index_name}: {file_name!r} is not the name of a {kind} file in this folder",
                    hint="download the index again",
                )
            path = folder / file_name
            shards[file_name] = read_header(path)[0] if safe else read_places(path)
        for name, file_name in weight_map.items():
            if name not in shards[file_name]:
                raise InputError(
                    "index-tensor-missing",
                    f"{folder / index_name} places {name!r} in {file_name}, which does not hold it",
                    hint="download the index and its shards again, from one revision",
                )
        for file_name, tensors in shards.items():
            for name in tensors:
                if weight_map.get(name) != file_name:
                    raise InputError(
                        "index-tensor-extra",
                        f"{folder / file_name} holds {name!r}, which {index_name} does not place there",
                        hint="download the index and its shards again, from one revision",
                    )
        tensors = {n: shards[f][n] for n, f in weight_map.items()}
        files = tuple(folder / name for name in shards)
        if not safe:
            names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
            shards = dict(zip(names, shards.values(), strict=True))
        return cls(folder, config, shards, tensors, metadata, files, as_stored=safe, notes=notes)


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
