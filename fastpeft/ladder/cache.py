"""Features of a frozen backbone, stored on disk row by row, so that the backbone runs only once on each row.

A backbone and a row decide the features. The backbone names a folder: a hash of its weights, buffers, active adapters
and configuration, of which layers are read, and of the version of transformers. The row is the key of a record in that
folder: a hash of its token ids, token types and positions without the padding around them, and of the dtype of
autocast. So batches of any composition and padding share rows, and so do runs, seeds and processes.

Features are rounded to bfloat16 when they are computed, so a row has the same features whether they were
read, were computed or did not fit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import POOLER, Backbone
from fastpeft.ladder.passes import features_of
from fastpeft.ops.dtypes import autocast_dtype
from fastpeft.ops.frozen_linear import Packed
from fastpeft.ops.packing import version_of
from fastpeft.support.files import path_of
from fastpeft.support.record_store import KEY_BYTES, Record, RecordStore, bytes_below

logger = logging.getLogger(__name__)

_FORMAT = 3  # raise it when the same backbone and row give another record
_GIB = 2**30

# the fields of a model's configuration that do not change its features: one body under any head shares them
_NOT_OF_FEATURES = (
    "_name_or_path",
    "architectures",
    "classifier_dropout",
    "dtype",  # the weights have one
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "torch_dtype",
    "transformers_version",
)


class FeatureCache:
    """The features `B_0 .. B_L` of a backbone, read from a folder, or else computed and stored there.

    A record holds a row's features one token after another, `(n, (L + 1) d)` in bfloat16.

    Args:
        backbone: the model.
        folder: made if need be; any number of backbones, runs and processes may share it. It can be deleted at any
            time.
        max_bytes: the most that the folder may take. None is half of the sum of what it takes and the disk has free.

    Attributes:
        hits: rows read.
        misses: rows computed.

    Raises:
        FastpeftError: an argument cannot be used, or the backbone does not read tokens.
    """

    def __init__(self, backbone: Backbone, folder: str | os.PathLike[str], max_bytes: int | None) -> None:
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
            raise FastpeftError(f"max_bytes is {max_bytes!r}; give a whole number from 1, or None for the default.")
        if backbone.input_name != "input_ids":
            raise FastpeftError(
                f"a {backbone.class_name} reads {backbone.input_name}; only the features of a model that "
                "reads input_ids can be cached. Leave `cache_features` out."
            )
        if isinstance(backbone.model, PeftModel) and backbone.model.active_peft_config.is_prompt_learning:
            raise FastpeftError(
                "the base has trained tokens or prefixes of PEFT beside a row's tokens, so its features cannot be "
                "cached. Leave `cache_features` out, or use another base."
            )
        self._arguments = (backbone, folder, max_bytes)
        self.hits = self.misses = 0
        self._backbone = backbone
        self._root = path_of(folder).absolute()
        self._stamp: list[Any] = []
        self._refused: dict[bytes, int] | None = {}  # rows that did not fit: their bytes; None after the warning
        self._broken = False
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._max_bytes = max_bytes or (bytes_below(self._root) + shutil.disk_usage(self._root).free) // 2
            self._find_store()
        except OSError as error:
            raise FastpeftError(
                f"cannot keep features in {str(folder)!r} ({error.strerror}). Give a folder that can be written."
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy opens the files again, as another process does."""
        return FeatureCache, self._arguments

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Any]) -> list[Tensor] | None:
        """The features `B_0 .. B_L`, each `(B, T, d)` in the backbone's dtype, with zeros at padding.

        Args:
            inputs: `input_ids` `(B, T)` and perhaps `attention_mask`, `token_type_ids` and `position_ids`; other
                entries are ignored.

        Returns:
            The features; None if there are no tokens to know the rows by, as in embeddings and fake tensors.
        """
        if "input_ids" not in inputs or isinstance(inputs["input_ids"], FakeTensor):
            return None
        self._find_store()
        rows = _CacheRows(self._backbone.inputs(inputs), self._backbone.device)
        records = self._store.get(rows.keys)
        if len(records) < len(set(rows.keys)):
            self._store.refresh()  # another process may have stored some
            records = self._store.get(rows.keys)
        absent = {key: row for row, key in enumerate(rows.keys) if key not in records}
        made = self._compute(rows, absent)
        self._keep(made)
        self.hits += len(rows.keys) - len(made)
        self.misses += len(made)
        return self._unpack(rows, records | made)

    def _compute(self, rows: _CacheRows, chosen: Mapping[bytes, int]) -> dict[bytes, Record]:
        """Run the backbone on the chosen rows, cut at the last token of any."""
        if not chosen:
            return {}
        spans = [rows.spans[row] for row in chosen.values()]
        part = rows.select(list(chosen.values()), max(end for _, end in spans))
        features = features_of(self._backbone, part)
        device = features[-1].device
        values = _bytes(torch.cat([feature.to(device, torch.bfloat16) for feature in features], dim=-1))
        return {
            key: values[index, start:end].reshape(-1) for index, (key, (start, end)) in enumerate(zip(chosen, spans))
        }

    def _unpack(self, rows: _CacheRows, records: Mapping[bytes, Record]) -> list[Tensor]:
        """The features of a batch from its rows' records."""
        device = self._backbone.device
        width = self._backbone.hidden_size
        shape = (*rows.ids.shape, width * (len(self._backbone.layers) + 1))
        values = torch.zeros(shape, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
        places = _bytes(values)
        for row, (key, (start, end)) in enumerate(zip(rows.keys, rows.spans)):
            places[row, start:end].reshape(-1)[:] = records[key]  # a view
        values = values.to(device, non_blocking=True).to(self._backbone.core.dtype)
        return list(values.split(width, dim=-1))

    def _find_store(self) -> None:
        """Read and write the store for the backbone as it is now: its weights or active adapters may have changed."""
        stamp = stamp_of(self._backbone)
        if stamp != self._stamp:
            # together: a Ctrl-C while the weights are hashed must not leave the new stamp beside the old store
            self._store, self._stamp = RecordStore(self._root, _identity(self._backbone), self._max_bytes), stamp

    def _keep(self, records: Mapping[bytes, Record]) -> None:
        """Store the records that fit. If the folder cannot be written, warn once and go on without it."""
        if self._broken or not records:
            return
        try:
            refused = self._store.append(records)
        except OSError as error:
            logger.warning("cannot keep features in %s (%s); they are computed each time", self._root, error.strerror)
            self._broken = True
            return
        if self._refused is None:
            return
        if self._refused.keys().isdisjoint(refused):
            self._refused |= {key: len(records[key]) for key in refused}
            return
        # a row that did not fit came again, so all rows were seen and the size of all is known
        logger.warning(
            "the features of %d rows do not fit into the %.3g GiB that %s may take, and are computed each time; all "
            "rows seen so far need %.3g GiB. Give a larger max_bytes, or a folder on a larger disk",
            len(self._refused),
            self._max_bytes / _GIB,
            self._root,
            (bytes_below(self._root) + sum(self._refused.values())) / _GIB,
        )
        self._refused = None


class _CacheRows:
    """A batch as the cache sees it.

    Args:
        inputs: as the backbone takes them.
        device: of the backbone. The ids may wait on another one.

    Attributes:
        ids: `input_ids` `(B, T)`.
        spans: for each row its first token that is not padding, and the end of the last.
        keys: for each row the key of its record.
    """

    def __init__(self, inputs: Mapping[str, Any], device: torch.device) -> None:
        self._inputs = inputs
        self.ids: Tensor = inputs["input_ids"]
        types, positions, mask = (inputs.get(name) for name in ("token_type_ids", "position_ids", "attention_mask"))
        columns = [
            self.ids,
            torch.zeros_like(self.ids) if types is None else types.expand_as(self.ids),
            (torch.arange(self.ids.shape[1]) if positions is None else positions).to(self.ids).expand_as(self.ids),
            torch.ones_like(self.ids) if mask is None else mask,
        ]
        table = torch.stack([column.long() for column in columns], dim=-1).cpu().numpy()  # (B, T, 4)
        visible = table[..., 3] != 0
        tokens = visible.shape[1]
        starts, ends = visible.argmax(1), tokens - visible[:, ::-1].argmax(1)
        self.spans = list(zip(starts.tolist(), ends.tolist()))
        context = f"{autocast_dtype(device)} {positions is not None}{'' if types is None else ' types'}".encode()
        self.keys = [
            hashlib.blake2b(context + row[start:end].tobytes(), digest_size=KEY_BYTES).digest()
            for row, (start, end) in zip(table, self.spans)
        ]

    def select(self, rows: Sequence[int], end: int) -> dict[str, Any]:
        """The backbone's inputs for some rows, cut at `end` tokens."""
        return {
            name: value.expand_as(self.ids)[rows, :end] if isinstance(value, Tensor) else value
            for name, value in self._inputs.items()
        }


def _identity(backbone: Backbone) -> str:
    """A hash of all that decides the features of a row, 32 hex digits; one bit of one weight changes it."""
    modules = list(backbone.body.named_modules())
    names = {module: name for name, module in modules}
    if not names.keys() >= set(backbone.layers):
        raise FastpeftError(
            "feature_modules names layers outside the model's body. Name others, or leave `cache_features` out."
        )
    config = backbone.core.config.to_dict()
    about = {
        "format": _FORMAT,
        "transformers": transformers.__version__,  # whose code the backbone is
        "class": type(backbone.body).__name__,
        "layers": [names[layer] for layer in backbone.layers],
        **({} if backbone.context is None else {"context": backbone.context.tokens}),
        "config": {name: value for name, value in config.items() if name not in _NOT_OF_FEATURES},
        "adapters": [switch for name, module in modules for switch in _switches(name, module)],
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    # some buffers are not in the state dict, and some parts of a quantised weight are only there
    for name, tensor in sorted({**dict(backbone.body.named_buffers()), **backbone.body.state_dict()}.items()):
        if not _is_trained(name):
            for part in _plain(tensor.detach()):
                digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
                digest.update(_bytes(part.flatten()).data)
    return digest.hexdigest()[:32]


def stamp_of(backbone: Backbone) -> list[Any]:
    """A cheap value that changes when `_identity` may have changed; a write to a tensor's `.data` is not noticed."""
    stamp: list[Any] = []
    for name, module in backbone.body.named_modules():
        if _is_trained(name):
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if isinstance(module, Packed) and tensor is module._parameters.get("weight"):
                stamp.append(module.stamp())
            elif tensor is not None:
                address = 0 if is_traceable_wrapper_subclass(tensor) else tensor.data_ptr()
                stamp.append((id(tensor), address, version_of(tensor)))
        stamp += _switches(name, module)
    return stamp


def _is_trained(name: str) -> bool:
    """Whether the module or tensor of this name in the body comes after the layers, and so trains."""
    return POOLER in name.split(".")


def _switches(name: str, module: nn.Module) -> list[Any]:
    """What decides, beside its weights, the output of a layer of PEFT's or of one that `pack_frozen` has packed.

    PEFT merges by way of `weight.data`, which leaves no other trace.
    """
    if isinstance(module, Packed):
        return [(name, module.computation)] if module.computation else []
    if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return []
    scaling, merged = dict(getattr(module, "scaling", {})), tuple(getattr(module, "merged_adapters", ()))
    return [(name, tuple(module.active_adapters), module.disable_adapters, scaling, merged)]


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor is made of, such as the codes and scales of a weight quantised by torchao."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def _bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes, uint8 in its shape except the last dimension; on a CPU a view of the tensor's memory."""
    viewed: np.ndarray = tensor.contiguous().view(torch.uint8).cpu().numpy()
    return viewed
