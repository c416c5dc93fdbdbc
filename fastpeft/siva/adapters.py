"""The adapters of a linear layer: their factors, which of them act on the stored weight, and merging them into it."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.ops.dtypes import HALVES, keeping_dtypes
from fastpeft.ops.quantise import Format
from fastpeft.siva.change import Change, Start, changed, scales
from fastpeft.siva.config import Residual, SivaConfig, check_name, check_residual
from fastpeft.siva.decompose import Factors, add, check_decomposable, check_ranks, decompose, lossy_rank, subtract
from fastpeft.siva.frozen import BaseWeightLayer, check_base, original_fingerprint
from fastpeft.siva.quantise import decompose_quantised


class AdaptedLinear(BaseWeightLayer):
    """A linear layer with any number of SiVA adapters on its frozen weight.

    An adapter is added by `update_layer`. One that is made with `init_weights="saved"` waits: its changes are empty
    until a saved adapter, or a copy of another, fills them.
    """

    cast_input_dtype_enabled = True  # PEFT's helper sets it; inputs are not cast
    adapter_layer_names = ("siva_du", "siva_dv")
    other_param_names = (
        "siva_s",
        "siva_u0",
        "siva_v0",
        "siva_residual",
        "r",
        "d",
        "residual",
        "residual_dtype",
        "step",
    )

    def __init__(self, base_layer: nn.Module, name: str, pack_weights: bool) -> None:
        super().__init__(base_layer, name, pack_weights)
        self.siva_du, self.siva_dv = nn.ModuleDict(), nn.ModuleDict()
        self.siva_s, self.siva_u0, self.siva_v0 = (BufferDict(persistent=True) for _ in range(3))
        self.siva_residual = BufferDict(persistent=True)  # W_r where the file must hold it: d below the full rank
        self.r: dict[str, int] = {}
        self.d: dict[str, int | None] = {}
        self.residual: dict[str, Residual] = {}
        self.residual_dtype: dict[str, Format | None] = {}
        self.step: dict[str, float | None] = {}
        self._waiting: set[str] = set()
        self._disable_adapters = False

    # -- adding and deleting ---------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, r: int, config: SivaConfig, step: float | None = None) -> None:
        """Add an adapter of rank r, whatever `config.r` is; one of the same name is replaced."""
        sibling = self.check_addable(adapter_name, r, config)
        active = list(self.active_adapters)  # type: ignore[arg-type]
        if adapter_name in self.siva_du:
            self.delete_adapter(adapter_name)  # its weight must not be decomposed a second time
        weight = self._weight
        d = lossy_rank(weight.shape, config.d)
        if self.base_fingerprint is None:
            self.base_fingerprint = original_fingerprint(self.base_layer)
        waits = config.init_weights == "saved" or config.pissa is not None
        if sibling is not None:
            initial = self._initial(sibling)
        elif waits:
            initial = self._blank(r)
        elif config.residual_dtype is not None:
            initial, quantised = decompose_quantised(
                weight, r, config.residual_dtype, config.quant_iterations, self.name, config.svd_niter
            )
            self._hold(quantised)
        else:
            initial, rest = decompose(weight, r, d, self.name, config.svd_niter)
            if config.residual == "frozen":
                self._weight = rest
        if waits:
            self._waiting.add(adapter_name)
        self.r[adapter_name], self.d[adapter_name], self.residual[adapter_name] = r, d, config.residual
        self.residual_dtype[adapter_name], self.step[adapter_name] = config.residual_dtype, step
        self.siva_s[adapter_name] = initial.s.clone()
        for tensors, part in (self.siva_u0, initial.u), (self.siva_v0, initial.v):
            tensors[adapter_name] = part.to(self._initial_dtype(adapter_name, part), copy=True)
        start: Start = "empty" if waits else "zero" if config.init_weights else "random"
        of_u, of_v = self._scales(adapter_name, initial.s)
        self.siva_du[adapter_name] = Change(initial.u, start, of_u)
        self.siva_dv[adapter_name] = Change(initial.v, start, of_v)
        if d is not None:
            self.siva_residual[adapter_name] = self.base_layer.weight.data
        self.set_adapter(active)  # type: ignore[operator]

    def check_addable(self, adapter_name: str, r: int, config: SivaConfig) -> str | None:
        """Raise `FastpeftError` unless an adapter can be added.

        Returns:
            The adapter of the same decomposition whose initial factors it can start from, None if there is none yet.
        """
        check_name(adapter_name)
        check_residual(config.residual, config.d, config.residual_dtype)
        check_base(self.base_layer, config.residual, self.name)
        if self.in_4_bits is None:
            check_decomposable(self._weight, r, config.d, self.name)
        else:
            check_ranks(self.in_4_bits.shape, r, config.d, self.name)
        if self.merged:
            raise FastpeftError(
                f"{self.name}: adapter {adapter_name!r} cannot be added while {self.merged_adapters} are merged. Call "
                "unmerge_adapter() first."
            )
        if self.is_last(adapter_name):
            self.check_restorable()
        d = lossy_rank((self.out_features, self.in_features), config.d)
        found = None
        given = {"r": r, "d": d, "residual": config.residual, "residual_dtype": config.residual_dtype}
        for other in self.siva_du:
            if other == adapter_name:
                continue
            held = {name: getattr(self, name)[other] for name in given}
            if given != held:
                if config.residual == self.residual[other] == "implicit":
                    continue
                mine, its = (", ".join(f"{key}={value!r}" for key, value in each.items()) for each in (given, held))
                raise FastpeftError(
                    f"{self.name}: adapter {adapter_name!r} ({mine}) cannot share the layer with {other!r} ({its}): a "
                    "frozen residual serves only adapters of one decomposition. Use residual='implicit' for all."
                )
            if other not in self._waiting:
                found = other
        return found

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; with the last one, restore the pretrained weight."""
        if self.is_last(adapter_name):
            self.restore()
        elif adapter_name in self.merged_adapters:
            self.unmerge()  # while its factors are there
        self._waiting.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def is_last(self, adapter_name: str) -> bool:
        """Whether W_r goes with this adapter: the others, if there are any, wait and will make theirs of W0."""
        filled = self.siva_du.keys() - self._waiting
        return list(self.siva_du) == [adapter_name] or (filled == {adapter_name} and not self.siva_residual)

    # -- factors ---------------------------------------------------------------------------------------------------

    def _blank(self, r: int) -> Factors:
        device = self.base_layer.weight.device
        return Factors(
            torch.zeros(self.out_features, r, device=device),
            torch.zeros(r, device=device),
            torch.zeros(r, self.in_features, device=device),
        )

    def _initial_dtype(self, adapter: str, part: Tensor) -> torch.dtype:
        """In what U0 and V0 are kept: bfloat16 beside a residual in 4 bits, unless it would round them."""
        if self.residual_dtype[adapter] in (None, "int8"):
            return torch.float32
        return torch.bfloat16 if part.is_meta or part.equal(part.bfloat16().to(part)) else torch.float32

    def _initial(self, adapter: str) -> Factors:
        return Factors(self.siva_u0[adapter].float(), self.siva_s[adapter], self.siva_v0[adapter].float())

    def _trained(self, adapter: str) -> Factors:
        # `self.siva_du[adapter]` and the like: nn.Module's __getattr__ would take longer than a small layer's products
        parts: Any = self._modules
        u0, v0 = parts["siva_u0"]._buffers[adapter], parts["siva_v0"]._buffers[adapter]
        du, dv = parts["siva_du"]._modules[adapter], parts["siva_dv"]._modules[adapter]
        return Factors(changed(u0, du), parts["siva_s"]._buffers[adapter], changed(v0, dv))

    def _changes(self, adapter: str) -> tuple[Change, Change]:
        return cast(tuple[Change, Change], (self.siva_du[adapter], self.siva_dv[adapter]))

    @property
    def _frozen(self) -> bool:
        """Whether the stored weight is W_r."""
        return any(residual == "frozen" and name not in self._waiting for name, residual in self.residual.items())

    @property
    def _lossy(self) -> bool:
        return self.quantised is not None or any(d is not None for d in self.d.values())

    def _scales(self, adapter: str, s: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The scales of an adapter's changes, where its singular values are `s`."""
        step = self.step[adapter]
        return (None, None) if step is None else scales(s, self._pretrained(torch.float32), step)

    def _pretrained(self, dtype: torch.dtype | None = None) -> Tensor:
        """W0 `(N, K)`, to rounding: what is stored, plus the initial triplets where that is W_r.

        Args:
            dtype: of the result; None: that of the stored weight.
        """
        weight = self._weight if dtype is None else self._weight.to(dtype)
        initial = self._low_rank([])
        return weight if initial is None else add(weight, initial)

    def _low_rank(self, active: list[str]) -> Factors | None:
        """What must be added to the stored weight when the adapters `active` apply; None if nothing.

        With a frozen residual `sum_i U_i s V_i - (n - 1) U0 s V0` for n adapters, which is `U s V` for one and
        `U0 s V0` for none; with an implicit one `sum_i (U_i s_i V_i - U0_i s_i V0_i)`.
        """
        terms = [self._trained(name) for name in active]
        if self._frozen:
            count = 1 - len(active)
            shared = next(name for name in self.siva_s if name not in self._waiting)
            initial = [self._initial(shared)] if count else []
            terms += [term._replace(s=count * term.s) for term in initial]
        else:
            terms += [term._replace(s=-term.s) for term in map(self._initial, active)]
        if len(terms) <= 1:
            return terms[0] if terms else None
        u, s, v = zip(*terms, strict=True)
        return Factors(torch.cat(u, 1), torch.cat(s), torch.cat(v, 0))

    def _share_residual(self, source: str | None = None) -> None:
        """Make the stored weight and every saved W_r one tensor again, that of adapter `source` if given."""
        if source is not None:
            self.base_layer.weight.data = self.siva_residual[source]
        if not self.merged:
            for adapter in self.siva_residual:
                self.siva_residual[adapter] = self.base_layer.weight.data

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLinear:
        initial = [each for tensors in (self.siva_s, self.siva_u0, self.siva_v0) for each in tensors.values()]
        self.packs.drop()
        super()._apply(keeping_dtypes(fn, initial), recurse)  # W_r was made with every bit of them
        self._share_residual()  # a move to another device or dtype would part them
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the factors; PEFT would also cast them to the dtype of the base layer."""
        if adapter_name not in self.siva_du:
            return  # PEFT asks every layer, also those that only other adapters have
        device = device or self.base_layer.weight.device
        for change in self._changes(adapter_name):
            if change.weight.device.type != "meta":
                change.to(device)
        for tensors in (self.siva_s, self.siva_u0, self.siva_v0):
            if tensors[adapter_name].device.type != "meta":
                tensors[adapter_name] = tensors[adapter_name].to(device)

    # -- merging ---------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's change of the weight, `U s V - U0 s V0`, float32, in the layout of the base layer's weight."""
        delta = self._trained(adapter).product() - self._initial(adapter).product()
        return delta.t() if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the layer is its pretrained weight plus `get_delta_weight`, as PEFT's `convert_to_lora` needs."""
        return not self._lossy

    @torch.inference_mode(False)  # or a weight of later steps could not be saved for backward
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the stored weight, which then acts alone.

        Args:
            safe_merge: Refuse a merged weight with NaN or infinite values before it is stored.
            adapter_names: The adapters; None: the active ones.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.siva_du]
        if not names:
            return
        self.check_mergeable()
        factors = self._low_rank(self.merged_adapters + names)
        weight = self._unmerged_weight()
        merged = weight if factors is None else add(weight, factors)
        if safe_merge and not torch.isfinite(merged).all():
            raise FastpeftError(
                f"{self.name}: NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: "
                "its training diverged. Nothing was changed. Use an earlier checkpoint."
            )
        self._weight = merged
        self.merged_adapters.extend(names)

    def check_mergeable(self) -> None:
        """Raise `FastpeftError` if the stored weight cannot take an adapter in."""
        if self.in_4_bits is not None:
            raise FastpeftError(
                f"{self.name}: its weight is in 4 bits, to which a merged one would have to be rounded again. Save the "
                "adapter, load it onto the base model as it is before quantising (PeftModel.from_pretrained), and "
                "merge it there."
            )
        self.check_storable()

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the stored weight again."""
        if self.quantised is None:
            self._weight = self._unmerged_weight()
        else:
            self._hold(self.quantised)
        self.merged_adapters.clear()

    def _unmerged_weight(self) -> Tensor:
        """The stored weight with nothing merged; to rounding, unless W_r is kept beside it."""
        if not self.merged:
            return self._weight
        if self.quantised is not None:
            return self.quantised.dequantise(self.base_layer.weight.dtype)
        if self._lossy:
            rest = next(iter(self.siva_residual.values()))
            return rest.t() if self.fan_in_fan_out else rest
        factors = self._low_rank(self.merged_adapters)
        return self._weight if factors is None else subtract(self._weight, factors)

    def check_restorable(self) -> None:
        """Raise `FastpeftError` if the pretrained weight cannot be given back."""
        if self._lossy:
            reason = (
                f"residual_dtype={self.quantised.kind!r}"
                if self.quantised is not None
                else f"d={next(d for d in self.d.values() if d is not None)} below the full rank"
            )
            raise FastpeftError(
                f"{self.name}: with {reason} the pretrained weight is no longer there and cannot be given back. Merge "
                "instead, or load the base model again."
            )
        if self._frozen or self.merged:
            self.check_storable()

    @torch.no_grad()
    def pretrained_weight(self) -> Tensor | None:
        """The pretrained weight, to rounding, in the layout of the base layer's, where W_r is stored; else None.

        Raises:
            FastpeftError: It is no longer there.
        """
        if not self._frozen or self.merged:
            return None
        self.check_restorable()
        weight = self._pretrained()
        return weight.t() if self.fan_in_fan_out else weight

    @property
    def comes_back_rounded(self) -> bool:
        """Whether the pretrained weight is not stored, and is restored in half precision, so that its bits differ."""
        return self._frozen and self.base_layer.weight.dtype in HALVES

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self) -> None:
        """Make the stored weight the pretrained one again, to rounding."""
        self.check_restorable()
        if self.merged:
            self.unmerge()
        if self._frozen:
            self._give_back(self._pretrained())

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base layer alone, with the adapters merged or with its pretrained weight; PEFT calls this."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not (merge and self.merged):
            self.restore()
        return self.base_layer
