"""Saving and loading the adapters of a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.ops.dtypes import HALVES
from fastpeft.ops.quantise import QuantisedWeight
from fastpeft.siva.adapters import AdaptedLinear
from fastpeft.siva.change import weight_of
from fastpeft.siva.decompose import Factors, add, belongs

_MERGED = "merged_adapters."


class LoadableLinear(AdaptedLinear):
    """An adapted layer that keeps its stored weight and its factors in agreement when a state dict is loaded.

    A file of an adapter holds its factors alone; W_r is made of them and of the pretrained weight. The state dict of a
    whole model holds the stored weight too, and says which adapters are merged into it.
    """

    def __init__(self, base_layer: nn.Module, name: str, pack_weights: bool) -> None:
        super().__init__(base_layer, name, pack_weights)
        self._arriving: set[str] = set()  # adapters in the state dict that is being loaded
        self._whole: str | None = None  # the adapter whose W_r must be made of a pretrained weight that is being loaded
        self.register_state_dict_post_hook(_save_in_float32)
        self.register_load_state_dict_post_hook(_take_in_loaded)

    def _low_rank(self, active: list[str]) -> Factors | None:
        for name in active:
            if name in self._waiting:
                self._take_in(name)
        return super()._low_rank(active)

    def load_factors(self, adapter_name: str, trained: Factors, initial: Factors) -> None:
        """Fill an adapter that waits.

        Raises:
            FastpeftError: `initial` are no singular triplets of the layer's weight.
        """
        tensors = {"s": initial.s, "u0": initial.u, "v0": initial.v}
        state = {f"siva_{part}.{adapter_name}": each for part, each in tensors.items()}
        changes = zip("uv", (trained.u, trained.v), (initial.u, initial.v), self._scales(adapter_name, initial.s))
        for part, whole, start, scale in changes:
            state[f"siva_d{part}.{adapter_name}.weight"] = weight_of(whole, start, scale)
            if scale is not None:
                state[f"siva_d{part}.{adapter_name}.scale"] = scale
        self.load_state_dict(state, strict=False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Refuse factors that do not fit the layer's weight, before they are loaded."""
        stored, codes = f"{prefix}base_layer.weight", state_dict.get(f"{prefix}quantised.codes")
        if codes is not None and stored not in state_dict:  # accelerate saves one of all tensors without memory
            state_dict[stored] = codes.new_empty(0, dtype=self._dtype)
        loaded = {}
        for name in self.siva_du:
            keys = [f"{prefix}siva_{part}.{name}" for part in ("u0", "s", "v0")]
            if all(key in state_dict for key in keys):
                loaded[name] = Factors(*(state_dict[key] for key in keys))
            elif name in self._waiting and f"{prefix}siva_du.{name}.weight" in state_dict:
                lacks = next(key for key in keys if key not in state_dict)
                raise FastpeftError(
                    f"{self.name}: what is being loaded for adapter {name!r} lacks {lacks.removeprefix(prefix)}, with "
                    "which its change acts. Load all tensors that save_pretrained wrote."
                )
        merged = [key.removeprefix(prefix + _MERGED) for key in state_dict if key.startswith(prefix + _MERGED)]
        for name in merged:
            del state_dict[f"{prefix}{_MERGED}{name}"]  # no parameter has this name
        if merged and sorted(merged) != sorted(self.merged_adapters):
            raise FastpeftError(
                f"{self.name}: adapter {', '.join(map(repr, merged))} is merged into the weight that is being loaded. "
                "Call unmerge_adapter() on the model that it is of and save it again."
            )
        if loaded and self.merged and not merged:
            self.unmerge()  # what is merged is about to change
        for name in loaded:
            self._check_scaling(name, state_dict, prefix)
            self._expect_dtypes(name, state_dict, prefix)
        self._whole = None
        if stored in state_dict:
            self._waiting -= loaded.keys()  # the stored weight comes along, already W_r where it has to be
            self._expect_quantised(f"{prefix}quantised.codes" in state_dict)
            self._whole = self._arrives_whole(state_dict[stored], loaded)
        else:
            for name, initial in loaded.items():
                if not self._starts_from(name, initial):
                    self._prepare_for(name, initial)
        self._arriving = set(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _arrives_whole(self, weight: Tensor, loaded: dict[str, Factors]) -> str | None:
        """The adapter whose triplets must be subtracted from a weight that is being loaded; None: it is W_r already.

        A checkpoint holds W_r, but PEFT's `set_base_model_state_dict` loads the pretrained weight.
        """
        weight = weight.t() if self.fan_in_fan_out else weight
        shape = (self.out_features, self.in_features)  # that of `_weight`, which may have to be dequantised
        if not self._frozen or self.merged or weight.shape != shape or weight.device.type == "meta":
            return None
        if self._lossy and not loaded:
            self.check_restorable()
        if self._lossy or type(weight) not in (Tensor, nn.Parameter):  # a shard
            return None
        shared = next(name for name in self.siva_du if name not in self._waiting)
        initial = loaded.get(shared) or self._initial(shared)
        if belongs(weight, initial):
            return shared
        if not loaded and not belongs(add(weight, initial), initial):
            raise FastpeftError(
                f"{self.name}: the weight that is being loaded is not the one that the adapter was made from. Load "
                "base weights before the adapter is put onto the model."
            )
        return None

    def _check_scaling(self, name: str, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Raise `FastpeftError` where changes arrive that another `scaling` multiplies."""
        changes = f"{prefix}siva_du."
        # PEFT puts an adapter's name only into keys that the model has
        scaled = f"{changes}{name}.scale" in state_dict or f"{changes}scale" in state_dict
        if f"{changes}{name}.weight" in state_dict and scaled != (self.step[name] is not None):
            raise FastpeftError(
                f"{self.name}: adapter {name!r} was trained with another scaling than it has here, so its changes "
                "would act in another size. Give its SivaConfig the scaling with which it was trained."
            )

    def _expect_dtypes(self, name: str, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Let U0 and V0 that arrive, and those that they fill or replace, have the dtype that they are kept in."""
        for part, own in ("u0", self.siva_u0), ("v0", self.siva_v0):
            key = f"{prefix}siva_{part}.{name}"
            dtype = self._initial_dtype(name, state_dict[key])
            state_dict[key], own[name] = state_dict[key].to(dtype), own[name].to(dtype)

    def _expect_quantised(self, arriving: bool) -> None:
        """Make room for a quantised W_r, if one is `arriving` in a whole state dict."""
        kind = next((kind for kind in self.residual_dtype.values() if kind is not None), None)
        if arriving and kind is not None and self.quantised is None:
            self._hold(QuantisedWeight(self._weight, kind))

    def _starts_from(self, name: str, initial: Factors) -> bool:
        """Whether these are, bit by bit, the initial factors of the adapters with which `name` must agree."""
        peers = [name] if self.residual[name] == "implicit" else list(self.siva_du)
        return all(
            torch.equal(part.to(own), own)  # both in float32
            for peer in peers
            if peer not in self._waiting
            for part, own in zip(initial, self._initial(peer))
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take_in(self, name: str) -> None:
        """Split the weight for an adapter whose tensors were set one by one, as by transformers' loader."""
        initial = self._initial(name)
        if not initial.u.any():  # s is 0 of a weight of zeros too
            raise FastpeftError(
                f"{self.name}: adapter {name!r} was made with init_weights='saved' and holds nothing yet: nothing "
                "was loaded, or a file that names this layer otherwise. Load a saved adapter into it "
                "(PeftModel.from_pretrained takes other names by key_mapping), or create it with init_weights=True."
            )
        if not self._starts_from(name, initial):
            self._prepare_for(name, initial)
        self._arriving = {name}
        _take_in_loaded(self, None)

    def _prepare_for(self, name: str, initial: Factors) -> None:
        """Restore W0 where W_r is stored, before `name` gets other initial factors, as from another machine's SVD."""
        frozen, lossy = self.residual[name] == "frozen", self.d[name] is not None
        if self.quantised is not None:
            raise FastpeftError(
                f"{self.name}: adapter {name!r} starts from another decomposition than the present quantised residual, "
                "and the pretrained weight is no longer there. Load it into a fresh base model."
            )
        others = [other for other in self.siva_du if other != name and other not in self._waiting]
        if frozen and others:
            raise FastpeftError(
                f"{self.name}: adapter {name!r} starts from another decomposition than {others}, whose frozen "
                "residual it would share. Load it with residual='implicit', or into a fresh base model."
            )
        original = self._pretrained()
        if not lossy and not belongs(original, initial):
            raise FastpeftError(
                f"{self.name}: adapter {name!r} was trained on another weight than this model has. Load the base "
                "model it was made from, unchanged."
            )
        if frozen:
            self._waiting.add(name)
        if frozen and not lossy:  # with d below the full rank its W_r comes along
            self._weight = original


def _take_in_loaded(layer: LoadableLinear, _incompatible_keys: Any) -> None:
    """After a state dict was loaded, split the weight for the adapters that waited for their factors."""
    if layer._whole is not None:
        layer._take_out(layer._initial(layer._whole), None)
        layer._whole = None
    for name in sorted(layer._waiting & layer._arriving):
        if any(change.is_empty() for change in layer._changes(name)):
            raise FastpeftError(
                f"{layer.name}: adapter {name!r} was made with init_weights='saved' and lacks siva_du or siva_dv: "
                "nothing was loaded for it, or a file without them or where they do not fit or are not finite. Load a "
                "saved adapter into it, or create it with init_weights=True."
            )
        if layer.d[name] is not None:
            layer._share_residual(name)
        elif layer.residual[name] == "frozen" and not layer._frozen:
            layer._take_out(layer._initial(name), layer.residual_dtype[name])
        layer._waiting.discard(name)
    layer._arriving.clear()


def _save_in_float32(layer: LoadableLinear, state_dict: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Save factors in float32, even if `autocast_adapter_dtype=False` keeps them in half precision, and what is merged.

    An entry for each merged adapter says that the stored weight holds it. Files of adapters leave it out.
    """
    for name in layer.merged_adapters:
        state_dict[f"{prefix}{_MERGED}{name}"] = torch.ones(1, dtype=torch.bool)
    for key, tensor in state_dict.items():
        factor = key.startswith(f"{prefix}siva_") and not key.startswith(f"{prefix}siva_residual")
        if factor and tensor.dtype in HALVES:
            state_dict[key] = tensor.float()
