"""What `SivaLinear` does before it loads a state dict, so that its stored weight and its factors agree.

A file of an adapter holds its factors alone; W_r is made of them and of the pretrained weight. The state dict of a
whole model holds the stored weight too, and the state of each adapter, which says what that weight is. One without
states holds the pretrained weight, as PEFT's `set_base_model_state_dict` loads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastpeft.errors import FastpeftError
from fastpeft.ops.dtypes import HALVES
from fastpeft.ops.quantise import QuantisedWeight
from fastpeft.siva.change import weight_of
from fastpeft.siva.decompose import Factors, add, belongs, subtract
from fastpeft.siva.state import State

_INITIAL = ("siva_u0.{}", "siva_s.{}", "siva_v0.{}")
_ALL = (*_INITIAL, "siva_du.{}.weight", "siva_dv.{}.weight")


def entries(
    adapter_name: str, trained: Factors, initial: Factors, scales: tuple[Tensor | None, Tensor | None]
) -> dict[str, Tensor]:
    """The factors of an adapter as a layer's state dict names them."""
    state = {key.format(adapter_name): each for key, each in zip(_INITIAL, initial)}
    for part, whole, start, scale in zip("uv", (trained.u, trained.v), (initial.u, initial.v), scales):
        state[f"siva_d{part}.{adapter_name}.weight"] = weight_of(whole, start, scale)
        if scale is not None:
            state[f"siva_d{part}.{adapter_name}.scale"] = scale
    return state


def save_in_float32(layer: Any, state_dict: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Save factors in float32, even if `autocast_adapter_dtype=False` keeps them in half precision."""
    for key, tensor in state_dict.items():
        factor = key.startswith(f"{prefix}siva_") and not key.startswith(f"{prefix}siva_residual")
        if factor and tensor.dtype in HALVES:
            state_dict[key] = tensor.float()


@torch.inference_mode(False)
@torch.no_grad()
def prepare(layer: Any, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Refuse what does not fit the layer before anything changes; then let the stored weight fit what is loaded."""
    stored, codes = f"{prefix}base_layer.weight", state_dict.get(f"{prefix}quantised.codes")
    if codes is not None and stored not in state_dict:  # accelerate saves one of all tensors without memory
        state_dict[stored] = codes.new_empty(0, dtype=layer.dtype)
    states = _states(layer, state_dict, prefix)
    arriving = {
        name: initial
        for name in layer.adapters
        if (initial := _initial(layer, name, state_dict, prefix, states.get(name))) is not None
    }
    merged = [name for name, state in states.items() if state is State.MERGED]
    if merged and sorted(merged) != sorted(layer.merged_adapters):
        raise FastpeftError(
            f"{layer.name}: adapter {', '.join(map(repr, merged))} is merged into the weight that is being loaded. "
            "Call unmerge_adapter() on the model that it is of and save it again."
        )
    if layer.merged and not merged and (arriving or stored in state_dict):
        layer.unmerge()  # what is merged is about to change
    for name in arriving:  # let U0 and V0 have the dtype that they are kept in
        for part, own in ("u0", layer.siva_u0), ("v0", layer.siva_v0):
            key = f"{prefix}siva_{part}.{name}"
            dtype = layer.initial_dtype(name, state_dict[key])
            state_dict[key], own[name] = state_dict[key].to(dtype), own[name].to(dtype)
    if stored in state_dict:
        _take_whole(layer, state_dict, prefix, arriving, states)
        return
    for name, initial in arriving.items():
        key = f"{prefix}siva_residual.{name}"
        if key in state_dict and layer.adapters[name].d is not None:  # W_r comes along, as a file with d has it
            weight = layer.base_layer.weight
            state_dict[key] = layer.siva_residual[name] = state_dict[key].to(weight, copy=True)
        _fit(layer, name, initial)


def fill(layer: Any, name: str) -> None:
    """Let the stored weight fit an empty adapter whose tensors were set one by one, as by transformers' loader."""
    initial = layer.initial(name)
    if not initial.u.any() or any(change.is_empty() for change in layer.changes(name)):  # s is 0 of a weight of zeros
        raise FastpeftError(
            f"{layer.name}: adapter {name!r} was made with init_weights='saved' and holds nothing yet: nothing was "
            "loaded, or a file that names this layer otherwise. Load a saved adapter into it "
            "(PeftModel.from_pretrained takes other names by key_mapping), or create it with init_weights=True."
        )
    with torch.inference_mode(False), torch.no_grad():
        _fit(layer, name, initial)


def _states(layer: Any, state_dict: dict[str, Tensor], prefix: str) -> dict[str, State]:
    """The states of the layer's adapters in a state dict of a whole model; tensors without values keep the layer's."""
    found = {}
    for name, adapter in layer.adapters.items():
        tensor = state_dict.get(f"{prefix}states.{name}")
        if tensor is not None:
            blank = tensor.is_meta or isinstance(tensor, FakeTensor)
            found[name] = adapter.state if blank else State(int(tensor))
    return found


def _initial(layer: Any, name: str, state_dict: dict[str, Tensor], prefix: str, state: State | None) -> Factors | None:
    """The initial factors of an adapter that is being loaded; None if it is not. Refuse what is not all of it."""
    keys = [prefix + key.format(name) for key in _ALL]
    found = [state_dict.get(key) for key in keys]
    lacks = [key.removeprefix(prefix) for key, tensor in zip(keys, found) if tensor is None]
    is_empty, arrives_empty = not layer.adapters[name].state, state is not None and not state
    if is_empty and not arrives_empty:
        own = layer.state_dict(keep_vars=True)
        lacks += [
            key.removeprefix(prefix)
            for key, tensor in zip(keys, found)
            if tensor is not None
            and (tensor.shape != own[key.removeprefix(prefix)].shape or (not tensor.is_meta and tensor.isnan().all()))
        ]
        if len(lacks) > 0 and any(tensor is not None for tensor in found):
            raise FastpeftError(
                f"{layer.name}: what is being loaded for adapter {name!r} lacks {lacks[0]}, or holds it in another "
                "shape or not finite. Load all tensors that save_pretrained wrote."
            )
    u, s, v = found[:3]
    if u is None or s is None or v is None:
        return None
    # PEFT puts an adapter's name only into keys that the model has
    scaled = any(f"{prefix}siva_du.{key}" in state_dict for key in (f"{name}.scale", "scale"))
    if keys[3] in state_dict and scaled != (layer.adapters[name].step is not None):
        raise FastpeftError(
            f"{layer.name}: adapter {name!r} was trained with another scaling than it has here, so its changes "
            "would act in another size. Give its SivaConfig the scaling with which it was trained."
        )
    return Factors(u, s, v)


def _take_whole(
    layer: Any, state_dict: dict[str, Tensor], prefix: str, arriving: dict[str, Factors], states: dict[str, State]
) -> None:
    """Let a stored weight that is being loaded be what the layer's adapters need: W0, or W_r."""
    key = f"{prefix}base_layer.weight"
    weight = state_dict[key]
    for name in arriving:
        state = states.get(name)
        loaded = layer.adapters[name].loaded
        layer.enter(name, loaded if state in (None, State.IMPLICIT, State.FROZEN) else state)
        state_dict[f"{prefix}states.{name}"] = layer.states[name]
    kind = next((each.residual_dtype for each in layer.adapters.values() if each.residual_dtype is not None), None)
    if kind is not None and layer.quantised is None and f"{prefix}quantised.codes" in state_dict:
        layer.store(QuantisedWeight(layer.matrix, kind))  # makes room
    is_rest = any(state is State.FROZEN for state in states.values())
    source = layer.source
    # nothing to do for a shard, and for a weight without values or with its merged adapters
    plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta and not layer.in_4_bits
    if not plain or layer.merged or is_rest == (source is not None):
        return
    if layer.lossy:
        layer.check_restorable()
    name = source or next(name for name, state in states.items() if state is State.FROZEN)
    initial = arriving.get(name) or layer.initial(name)
    matrix = weight.t() if layer.fan_in_fan_out else weight
    matrix = add(matrix, initial) if is_rest else matrix
    if not belongs(matrix, initial):
        raise FastpeftError(
            f"{layer.name}: the weight that is being loaded is not the one that the adapter was made from. Load "
            "base weights before the adapter is put onto the model."
        )
    matrix = matrix if is_rest else subtract(matrix, initial)
    state_dict[key] = matrix.t() if layer.fan_in_fan_out else matrix


def _starts_from(layer: Any, name: str, initial: Factors) -> bool:
    """Whether these are, bit by bit, the initial factors of the adapters with which `name` must agree."""
    peers = [name] if layer.adapters[name].residual == "implicit" else list(layer.adapters)
    return all(
        torch.equal(part.to(own), own)  # both in float32
        for peer in peers
        if layer.adapters[peer].state
        for part, own in zip(initial, layer.initial(peer))
    )


def _fit(layer: Any, name: str, initial: Factors) -> None:
    """Let the stored weight be what an adapter needs whose initial factors are, or are about to be, these."""
    adapter = layer.adapters[name]
    frozen, lossy = adapter.residual == "frozen", adapter.d is not None
    if not _starts_from(layer, name, initial):
        if layer.quantised is not None:
            raise FastpeftError(
                f"{layer.name}: adapter {name!r} starts from another decomposition than the present quantised "
                "residual, and the pretrained weight is no longer there. Load it into a fresh base model."
            )
        others = [other for other, each in layer.adapters.items() if other != name and each.state]
        if frozen and others:
            raise FastpeftError(
                f"{layer.name}: adapter {name!r} starts from another decomposition than {others}, whose frozen "
                "residual it would share. Load it with residual='implicit', or into a fresh base model."
            )
        original = layer.pretrained()
        if not lossy and not belongs(original, initial):
            raise FastpeftError(
                f"{layer.name}: adapter {name!r} was trained on another weight than this model has. Load the base "
                "model it was made from, unchanged."
            )
        if frozen:
            if not lossy:
                layer.store(original)
            layer.enter(name, State.EMPTY)
    if not adapter.state:
        if lossy:
            layer.share_residual(name)
        elif frozen and layer.source is None:
            layer.take_out(Factors(*(part.float() for part in initial)), adapter.residual_dtype)
        layer.enter(name, adapter.loaded)
