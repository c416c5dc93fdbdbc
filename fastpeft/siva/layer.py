"""The linear layer of SiVA: a PEFT layer that can also be used on its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.functional import siva_linear, siva_linear_mixed
from fastpeft.ops.dtypes import compute_dtype
from fastpeft.ops.quantise import Format, QuantisedWeight
from fastpeft.siva import grouping
from fastpeft.siva.change import Change, Start, scales, weight_of
from fastpeft.siva.config import InitWeights, Residual, check_name, check_residual
from fastpeft.siva.decompose import Factors, add, belongs, check_decomposable, decompose, is_lossy, subtract
from fastpeft.siva.frozen import FrozenLinear, original_fingerprint
from fastpeft.siva.lazy_weight import LazyWeight
from fastpeft.siva.quantise import ITERATIONS, decompose_quantised, quantised_siva_linear
from fastpeft.siva.rows import Rows

T = TypeVar("T")


class SivaLinear(FrozenLinear):
    r"""A linear layer whose top-r singular triplets train while the rest of its weight is frozen.

    `h = x W_r^T + ((x V^T) * s) U^T + b` with `U = U0 + dU` and `V = V0 + dV`

    Per adapter it holds the change `siva_du (N, r)` and `siva_dv (r, K)`, which trains and is 0 at the start, and the
    initial factors `siva_s (r,)`, `siva_u0`, `siva_v0`, which do not train. All are float32. So weight decay pulls
    towards the pretrained weight, and an optimizer's steps are those that it would take on U and V.

    With `residual="frozen"` the wrapped layer's weight is `W_r`; adapters share it, so their initial factors must
    agree. With `"implicit"` it stays the pretrained `W0` and `((x V0^T) * s) U0^T` is subtracted at run time.

    Args:
        base_layer: `nn.Linear` or transformers' `Conv1D`. It is taken over: its weight changes in place.
        adapter_name: Name of the first adapter.
        r, d, residual, residual_dtype, quant_iterations: As in `SivaConfig`.
        step: How far each triplet's part of the weight moves when an optimizer moves what trains by 1 an entry, in the
            spectral norm and as a share of the weight's, see `fastpeft.siva.change.scales`. None: in proportion to the
            triplet's singular value.
        init_weights: `"saved"` leaves the factors for `load_state_dict` to fill in; else as in `SivaConfig`.
        name: What error messages call the layer.

    Raises:
        FastpeftError: The weight cannot be decomposed so.

    Notes:
        Several active adapters add their changes: `W0 + sum_i (U_i diag(s_i) V_i - U0_i diag(s_i) V0_i)`.
        No adapter has dropout: the low-rank path carries the largest part of the pretrained weight.

    Example:
        >>> layer = SivaLinear.from_linear(nn.Linear(16, 8), r=2)
        >>> layer(torch.randn(3, 16)).shape
        torch.Size([3, 8])
    """

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
    rows: Rows | None = None  # while the model runs with an adapter for each row of the batch

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str = "default",
        r: int = 4,
        d: int | None = None,
        residual: Residual = "frozen",
        init_weights: InitWeights = True,
        name: str = "the layer",
        residual_dtype: Format | None = None,
        quant_iterations: int = ITERATIONS,
        step: float | None = None,
    ) -> None:
        super().__init__(base_layer, name)
        self.siva_du, self.siva_dv = nn.ModuleDict(), nn.ModuleDict()
        self.siva_s, self.siva_u0, self.siva_v0 = (BufferDict(persistent=True) for _ in range(3))
        self.siva_residual = BufferDict(persistent=True)  # W_r where the file must hold it: d below the full rank
        self.r: dict[str, int] = {}
        self.d: dict[str, int | None] = {}
        self.residual: dict[str, Residual] = {}
        self.residual_dtype: dict[str, Format | None] = {}
        self.step: dict[str, float | None] = {}
        self._waiting: set[str] = set()  # adapters that have not been filled in yet
        self._arriving: set[str] = set()  # adapters in the state dict that is being loaded
        self._whole: str | None = None  # the adapter whose W_r must be made of a pretrained weight that is being loaded
        self._disable_adapters = False
        self.register_state_dict_post_hook(_save_in_float32)
        self.register_load_state_dict_post_hook(_take_in_loaded)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, d, residual, init_weights, residual_dtype, quant_iterations, step)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, r: int = 4, d: int | None = None, residual: Residual = "frozen", **arguments: Any
    ) -> SivaLinear:
        """Take over `linear` (which is changed in place) and make its top-r singular triplets trainable."""
        return cls(linear, r=r, d=d, residual=residual, **arguments)

    # -- adapters ------------------------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        d: int | None,
        residual: Residual,
        init_weights: InitWeights = True,
        residual_dtype: Format | None = None,
        quant_iterations: int = ITERATIONS,
        step: float | None = None,
    ) -> None:
        """Add an adapter, in place of one that has its name."""
        sibling = self.check_addable(adapter_name, r, d, residual, residual_dtype)
        active = list(self.active_adapters)  # type: ignore[arg-type]
        if adapter_name in self.siva_du:
            self.delete_adapter(adapter_name)  # its weight must not be decomposed a second time
        weight = self._weight
        d = d if is_lossy(weight, d) else None
        if self.base_fingerprint is None:
            self.base_fingerprint = original_fingerprint(self.base_layer)
        waits = init_weights == "saved"
        if sibling is not None:
            initial = self._initial(sibling)
        elif waits:
            initial = self._blank(r)
        elif residual_dtype is not None:
            initial, quantised = decompose_quantised(weight, r, residual_dtype, quant_iterations, self.name)
            self._hold(quantised)
        else:
            initial, rest = decompose(weight, r, d, self.name)
            if residual == "frozen":
                self._weight = rest
        self.r[adapter_name], self.d[adapter_name], self.residual[adapter_name] = r, d, residual
        self.residual_dtype[adapter_name] = residual_dtype
        start: Start = "empty" if waits and sibling is None else "zero" if init_weights else "random"
        self.step[adapter_name] = step
        of_u, of_v = self._scales(adapter_name, initial)
        self.siva_du[adapter_name] = Change(initial.u, start, of_u)
        self.siva_dv[adapter_name] = Change(initial.v, start, of_v)
        self.siva_s[adapter_name] = initial.s.clone()
        self.siva_u0[adapter_name], self.siva_v0[adapter_name] = initial.u.clone(), initial.v.clone()
        if d is not None:
            self.siva_residual[adapter_name] = self.base_layer.weight.data
        if waits:
            self._waiting.add(adapter_name)
        self.set_adapter(active)  # type: ignore[operator]

    def check_addable(
        self, adapter_name: str, r: int, d: int | None, residual: Residual, residual_dtype: Format | None = None
    ) -> str | None:
        """Raise `FastpeftError` unless an adapter can be added.

        Returns:
            The adapter of the same decomposition whose initial factors it can start from, None if there is none yet.
        """
        check_name(adapter_name)
        check_residual(residual, d, residual_dtype)
        check_decomposable(self._weight, r, d, self.name)
        if self.merged:
            raise FastpeftError(
                f"{self.name}: adapter {adapter_name!r} cannot be added while {self.merged_adapters} are merged. Call "
                "unmerge_adapter() first."
            )
        if list(self.siva_du) == [adapter_name]:
            self.check_restorable()
        d = d if is_lossy(self._weight, d) else None
        found = None
        given = {"r": r, "d": d, "residual": residual, "residual_dtype": residual_dtype}
        for other in self.siva_du:
            if other == adapter_name:
                continue
            held = {name: getattr(self, name)[other] for name in given}
            if given != held:
                if residual == self.residual[other] == "implicit":
                    continue
                mine, its = (", ".join(f"{key}={value!r}" for key, value in each.items()) for each in (given, held))
                raise FastpeftError(
                    f"{self.name}: adapter {adapter_name!r} ({mine}) cannot share the layer with {other!r} ({its}): a "
                    "frozen residual serves only adapters of one decomposition. Use residual='implicit' for all."
                )
            if other not in self._waiting:
                found = other
        return found

    def _blank(self, r: int) -> Factors:
        device = self.base_layer.weight.device
        return Factors(
            torch.zeros(self.out_features, r, device=device),
            torch.zeros(r, device=device),
            torch.zeros(r, self.in_features, device=device),
        )

    def _initial(self, adapter: str) -> Factors:
        return Factors(self.siva_u0[adapter], self.siva_s[adapter], self.siva_v0[adapter])

    def _trained(self, adapter: str) -> Factors:
        u0, s, v0 = self._initial(adapter)
        return Factors(self.siva_du[adapter](u0), s, self.siva_dv[adapter](v0))

    def _scales(self, adapter: str, initial: Factors) -> tuple[Tensor | None, Tensor | None]:
        step = self.step[adapter]
        if step is None:
            return None, None
        weight = add(self._weight.float(), initial) if self._frozen else self._weight
        return scales(initial.s, weight, step)

    def _changes(self, adapter: str) -> tuple[Change, Change]:
        return cast(tuple[Change, Change], (self.siva_du[adapter], self.siva_dv[adapter]))

    @property
    def _frozen(self) -> bool:
        """Whether the stored weight is W_r."""
        return any(residual == "frozen" and name not in self._waiting for name, residual in self.residual.items())

    @property
    def _lossy(self) -> bool:
        return self.quantised is not None or any(d is not None for d in self.d.values())

    def _share_residual(self, source: str | None = None) -> None:
        """Let the stored weight and every saved W_r be one tensor again, that of adapter `source` if given."""
        if source is not None:
            self.base_layer.weight.data = self.siva_residual[source]
        if not self.merged:
            for adapter in self.siva_residual:
                self.siva_residual[adapter] = self.base_layer.weight.data

    def _apply(self, fn: Any, recurse: bool = True) -> SivaLinear:
        initial = [
            (tensors, name, tensor)
            for tensors in (self.siva_s, self.siva_u0, self.siva_v0)
            for name, tensor in tensors.items()
        ]
        super()._apply(fn, recurse)
        for tensors, name, tensor in initial:
            if tensors[name].dtype != tensor.dtype:  # W_r was made with every bit of them
                tensors[name] = tensor.to(tensors[name].device)
        self._share_residual()  # a move to another device or dtype would part them
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move without PEFT's cast to the dtype of the base layer: the factors are float32."""
        device = device or self.base_layer.weight.device
        for change in self._changes(adapter_name):
            if change.weight.device.type != "meta":
                change.to(device)
        for tensors in (self.siva_s, self.siva_u0, self.siva_v0):
            if adapter_name in tensors and tensors[adapter_name].device.type != "meta":
                tensors[adapter_name] = tensors[adapter_name].to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; with the last one the pretrained weight comes back."""
        if adapter_name in self.siva_du and len(self.siva_du) == 1:
            self.restore()
        elif adapter_name in self.merged_adapters:
            self.unmerge()  # while its factors are there
        self._waiting.discard(adapter_name)
        super().delete_adapter(adapter_name)

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.rows is not None and not self.disable_adapters:
            return self._mixed(x, self.rows.of(x, self.name))
        taken = grouping.take(self, x)
        if taken is not None:
            return taken
        factors = self._acting()  # first: an adapter taken in only now may bring a quantised residual
        if factors is None:
            return self.base_layer(x, *args, **kwargs)
        bias = self.base_layer.bias
        if self.quantised is not None:
            dtype = compute_dtype(x, self.base_layer.weight)
            return quantised_siva_linear(x, self.quantised, *factors, bias=bias, dtype=dtype)
        return siva_linear(x, self.stored, *factors, bias)

    def _mixed(self, x: Tensor, rows: Rows) -> Tensor:
        """Each row of x by the adapter it names, by the pretrained weight where that is none of this layer's."""
        factors = [self._low_rank([name] if name in self.siva_du else []) or self._blank(0) for name in rows.sizes]
        if self.quantised is not None:  # one adapter after the other: the weight is there for one product at a time
            shared = {
                "rest": self.quantised,
                "bias": self.base_layer.bias,
                "dtype": compute_dtype(x, self.base_layer.weight),
            }
            return rows.each(x, [partial(quantised_siva_linear, **shared, **each._asdict()) for each in factors])
        us, ss, vs = zip(*factors, strict=True)
        order = None if rows.order is None else rows.order.to(x.device)
        return siva_linear_mixed(x, self.stored, us, ss, vs, list(rows.sizes.values()), order, self.base_layer.bias)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None] | None:
        """What `siva_linear` takes beside x, as the layer acts now; None where it takes nothing.

        The base layer acts alone then, or a quantised residual, which is dequantised for one layer at a time.
        """
        factors = self._acting()
        if factors is None or self.quantised is not None:
            return None
        return (self.stored, *factors, self.base_layer.bias)

    @property
    def weight(self) -> Tensor:
        """The weight by which the layer acts, differentiable in the factors, in the layout of the base layer's.

        Modules such as `nn.MultiheadAttention` read it instead of calling the layer. It is computed at its first use:
        see `LazyWeight`.

        Raises:
            FastpeftError: At its use, if each row of the batch has an adapter of its own.
        """
        if torch.compiler.is_compiling():  # the compiler leaves out what nothing uses
            return self._compute_weight()
        shape = (self.in_features, self.out_features) if self.fan_in_fan_out else (self.out_features, self.in_features)
        return LazyWeight(self._compute_weight, self.base_layer.weight, shape)

    def _compute_weight(self) -> Tensor:
        if self.rows is not None and not self.disable_adapters:
            raise FastpeftError(
                f"{self.name}: adapter_names needs layers that are called, but a module reads this one's weight. Run "
                "the model once for each adapter."
            )
        factors = self._acting()
        if factors is None:
            merged: Tensor = self.base_layer.weight
            return merged
        weight = (self._weight + factors.product()).to(self.base_layer.weight.dtype)
        return weight.t() if self.fan_in_fan_out else weight

    def _acting(self) -> Factors | None:
        """What must be added to the stored weight now; None if nothing."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._low_rank([])
        if self.merged:
            return None
        return self._low_rank([name for name in self.active_adapters if name in self.siva_du])  # type: ignore[union-attr]

    def _low_rank(self, active: list[str]) -> Factors | None:
        """What must be added to the stored weight when the adapters `active` apply; None if nothing.

        With a frozen residual `sum_i U_i s V_i - (n - 1) U0 s V0` for n adapters, which is `U s V` for one and
        `U0 s V0` for none; with an implicit one `sum_i (U_i s_i V_i - U0_i s_i V0_i)`.
        """
        for name in active:
            if name in self._waiting:
                self._take_in(name)
        terms = [self._trained(name) for name in active]
        if self._frozen:
            count = 1 - len(active)
            shared = next(name for name in self.siva_du if name not in self._waiting)
            initial = [self._initial(shared)] if count else []
            terms += [term._replace(s=count * term.s) for term in initial]
        else:
            terms += [term._replace(s=-term.s) for term in map(self._initial, active)]
        if len(terms) <= 1:
            return terms[0] if terms else None
        u, s, v = zip(*terms, strict=True)
        return Factors(torch.cat(u, 1), torch.cat(s), torch.cat(v, 0))

    # -- merging -------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter has changed, `U s V - U0 s V0`, float32, in the layout of the base layer's weight."""
        delta = self._trained(adapter).product() - self._initial(adapter).product()
        return delta.t() if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the pretrained weight and `get_delta_weight` are all there is, for PEFT's `convert_to_lora`."""
        return not self._lossy

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters (None: the active ones) into the stored weight, which then serves alone.

        Args:
            safe_merge: Refuse a merged weight with NaN or infinite values before it is stored.
            adapter_names: The adapters.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.siva_du]
        if not names:
            return
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

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the stored weight again."""
        if self.quantised is None:
            self._weight = self._unmerged_weight()
        else:
            self._hold(self.quantised)
        self.merged_adapters.clear()

    def _unmerged_weight(self) -> Tensor:
        """The stored weight as it is with nothing merged (to rounding; exact where W_r is kept beside it)."""
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

    @torch.no_grad()
    def pretrained_weight(self) -> Tensor | None:
        """The pretrained weight, to rounding, in the layout of the base layer's, where W_r is stored; else None.

        Raises:
            FastpeftError: It is no longer there.
        """
        if not self._frozen or self.merged:
            return None
        self.check_restorable()
        factors = self._low_rank([])
        weight = self._weight if factors is None else add(self._weight, factors)
        return weight.t() if self.fan_in_fan_out else weight

    @torch.no_grad()
    def restore(self) -> None:
        """Make the stored weight the pretrained one again, to rounding."""
        self.check_restorable()
        if self.merged:
            self.unmerge()
        factors = self._low_rank([])
        if factors is not None:
            self._give_back(factors)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base layer by itself, with the adapters merged or with its pretrained weight (called by PEFT)."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not (merge and self.merged):
            self.restore()
        return self.base_layer

    # -- saving and loading --------------------------------------------------------------------------------------

    def load_factors(self, adapter_name: str, trained: Factors, initial: Factors) -> None:
        """Fill an adapter that waits.

        Raises:
            FastpeftError: `initial` are no singular triplets of the layer's weight.
        """
        tensors = {"u": trained.u, "v": trained.v, "s": initial.s, "u0": initial.u, "v0": initial.v}
        self.load_state_dict({f"siva_{part}.{adapter_name}": each for part, each in tensors.items()}, strict=False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Before the factors of this layer change: refuse what does not fit its weight."""
        loaded = {}
        for name in self.siva_du:
            keys = [f"{prefix}siva_{part}.{name}" for part in ("u0", "s", "v0")]
            if all(key in state_dict for key in keys):
                loaded[name] = Factors(*(state_dict[key] for key in keys))
        if loaded and self.merged:
            self.unmerge()  # what is merged is about to change
        self._convert_whole_factors(state_dict, prefix)
        key, self._whole = f"{prefix}base_layer.weight", None
        if key in state_dict:
            self._waiting -= loaded.keys()  # the stored weight comes along, already W_r where it has to be
            self._expect_quantised(f"{prefix}quantised.codes" in state_dict)
            self._whole = self._arrives_whole(state_dict[key], loaded)
        else:
            for name, initial in loaded.items():
                if not self._starts_from(name, initial):
                    self._prepare_for(name, initial)
        self._arriving = set(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _arrives_whole(self, weight: Tensor, loaded: dict[str, Factors]) -> str | None:
        """The adapter whose initial factors must be taken out of a stored weight that is being loaded; None: it is W_r.

        A checkpoint has W_r, but PEFT's `set_base_model_state_dict` brings the pretrained weight.
        """
        weight = weight.t() if self.fan_in_fan_out else weight
        if not self._frozen or self.merged or weight.shape != self._weight.shape or weight.device.type == "meta":
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

    def _convert_whole_factors(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Put changes in the place of whole factors, U and V, which earlier versions saved."""
        for name in self.siva_du:
            keys = {part: f"{prefix}siva_{part}.{name}" for part in ("u", "v", "s", "u0", "v0")}
            if not all(key in state_dict for key in keys.values()):
                continue
            of_u, of_v = self._scales(name, Factors(*(state_dict[keys[part]] for part in ("u0", "s", "v0"))))
            for part, scale in ("u", of_u), ("v", of_v):
                whole, initial = state_dict.pop(keys[part]), state_dict[keys[f"{part}0"]]
                change = f"{prefix}siva_d{part}.{name}"
                state_dict[f"{change}.weight"] = weight_of(whole, initial, scale)
                if scale is not None:
                    state_dict[f"{change}.scale"] = scale

    def _expect_quantised(self, arriving: bool) -> None:
        """Before a whole state dict is loaded: make room for a quantised W_r if one is `arriving`."""
        kind = next((kind for kind in self.residual_dtype.values() if kind is not None), None)
        if arriving and kind is not None and self.quantised is None:
            self._hold(QuantisedWeight(self._weight, kind))

    def _starts_from(self, name: str, initial: Factors) -> bool:
        """Whether these are, bit by bit, the initial factors of the adapters that `name` must agree with."""
        peers = [name] if self.residual[name] == "implicit" else list(self.siva_du)
        return all(
            torch.equal(part.to(own), own)
            for peer in peers
            if peer not in self._waiting
            for part, own in zip(initial, self._initial(peer))
        )

    @torch.no_grad()
    def _take_in(self, name: str) -> None:
        """Split the weight for an adapter whose tensors were set one by one, as transformers' loader does."""
        initial = self._initial(name)
        if not initial.s.any():
            raise FastpeftError(
                f"{self.name}: adapter {name!r} was made with init_weights='saved' and holds nothing yet. Load a "
                "saved adapter into it, or create it with init_weights=True."
            )
        if not self._starts_from(name, initial):
            self._prepare_for(name, initial)
        self._arriving = {name}
        _take_in_loaded(self, None)

    def _prepare_for(self, name: str, initial: Factors) -> None:
        """Before `name` takes other initial factors, of another machine's SVD say: give W0 back where W_r is stored."""
        frozen, lossy = self.residual[name] == "frozen", self.d[name] is not None
        if self.quantised is not None:
            raise FastpeftError(
                f"{self.name}: adapter {name!r} starts from another decomposition than the quantised residual that is "
                "in place, for which the pretrained weight is no longer there. Load it into a fresh base model."
            )
        others = [other for other in self.siva_du if other != name and other not in self._waiting]
        if frozen and others:
            raise FastpeftError(
                f"{self.name}: adapter {name!r} starts from another decomposition than {others}, whose frozen "
                "residual it would share. Load it with residual='implicit', or into a fresh base model."
            )
        factors = self._low_rank([])
        original = self._weight if factors is None else add(self._weight, factors)
        if not lossy and not belongs(original, initial):
            raise FastpeftError(
                f"{self.name}: adapter {name!r} was trained on another weight than this model has. Load the base "
                "model it was made from, unchanged."
            )
        if frozen:
            self._waiting.add(name)
        if frozen and not lossy:  # with d below the full rank its W_r comes along
            self._weight = original


def _take_in_loaded(layer: SivaLinear, _incompatible_keys: Any) -> None:
    """After a state dict was loaded: split the weight for the adapters that were waiting for their factors."""
    if layer._whole is not None:
        layer._take_out(layer._initial(layer._whole), None)
        layer._whole = None
    for name in sorted(layer._waiting & layer._arriving):
        if any(change.is_empty() for change in layer._changes(name)):
            raise FastpeftError(
                f"{layer.name}: what was loaded for adapter {name!r} lacks siva_du or siva_dv, or they do not fit or "
                "are not finite. A file with siva_u and siva_v is of an earlier form: load it by "
                "PeftModel.from_pretrained and save it again."
            )
        if layer.d[name] is not None:
            layer._share_residual(name)
        elif layer.residual[name] == "frozen" and not layer._frozen:
            layer._take_out(layer._initial(name), layer.residual_dtype[name])
        layer._waiting.discard(name)
    layer._arriving.clear()


def _save_in_float32(layer: SivaLinear, state_dict: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Factors are saved in float32 even where `autocast_adapter_dtype=False` keeps them in half precision."""
    for key, tensor in state_dict.items():
        factor = key.startswith(f"{prefix}siva_") and not key.startswith(f"{prefix}siva_residual")
        if factor and tensor.dtype in (torch.float16, torch.bfloat16):
            state_dict[key] = tensor.float()


def current_keys(keys: Mapping[str, T]) -> dict[str, T]:
    """What an adapter's file holds, by the names of this version where an earlier one saved it."""
    current: dict[str, T] = {}
    for key, value in keys.items():
        layer, whole, part = key.rpartition(".siva_")
        if whole and part in ("u", "v"):
            current |= {f"{layer}.siva_d{part}.{each}": value for each in ("weight", "scale")}
        else:
            current[key] = value
    return current
