"""The linear layer of SiVA: a PEFT layer that can also be used on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import FastpeftError
from fastpeft.ops.dtypes import HALVES, autocast_dtype, compute_dtype, keeping_dtypes
from fastpeft.ops.frozen_weight import Dense, FrozenWeight
from fastpeft.ops.packing import Packs
from fastpeft.ops.quantise import Format, QuantisedWeight
from fastpeft.ops.siva_linear import siva_products
from fastpeft.siva import base, grouping, loading
from fastpeft.siva.change import Change, Start, changed, scales
from fastpeft.siva.config import Residual, SivaConfig, check_name, check_residual
from fastpeft.siva.decompose import Factors, add, check_decomposable, check_ranks, decompose, lossy_rank, subtract
from fastpeft.siva.lazy_weight import LazyWeight
from fastpeft.siva.quantise import decompose_quantised
from fastpeft.siva.rows import AdapterRows
from fastpeft.siva.state import Adapter, State
from fastpeft.support.fingerprints import fingerprint
from fastpeft.support.resident import give_back

# the fields of SivaConfig that concern a layer by itself, beside r
_OF_ONE_LAYER = ("d", "residual", "residual_dtype", "quant_iterations", "svd_niter", "init_weights", "pack_weights")


class SivaLinear(base.AdaptedLayer):
    r"""A linear layer whose top-r singular triplets train while the rest of its weight is frozen.

    `h = x W_r^T + ((x V^T) * s) U^T + b` with `U = U0 + dU` and `V = V0 + dV`

    An adapter has the changes `siva_du (N, r)` and `siva_dv (r, K)`, which train and start at 0, and the initial
    factors `siva_s (r,)`, `siva_u0` and `siva_v0`, which do not train. All are float32, but the last two in bfloat16
    beside a residual in 4 bits, which is made with their rounded values. So weight decay pulls towards the pretrained
    weight, and an optimizer makes the steps that it would make on U and V.

    With `residual="frozen"` the wrapped layer's weight is `W_r`. Adapters share it, so their initial factors must
    agree. With `"implicit"` it stays the pretrained `W0`, and `((x V0^T) * s) U0^T` is subtracted at run time.

    Args:
        base_layer: `nn.Linear` or transformers' `Conv1D`. It is taken over: its weight changes in place.
        adapter_name: Name of the first adapter.
        r: Number of singular triplets that train. None: that of `config`.
        config: What of `SivaConfig` concerns one layer: r, d, residual, residual_dtype, quant_iterations, svd_niter,
            init_weights (`"saved"` leaves the factors to `load_state_dict`) and pack_weights. None: the defaults of
            `SivaConfig`.
        step: How far each triplet's part of the weight moves, in the spectral norm and as a share of the weight's, when
            an optimizer moves every trained entry by 1, see `fastpeft.siva.change.scales`. None: in proportion to the
            triplet's singular value.
        name: What error messages call the layer.
        settings: Those fields of `SivaConfig`, in place of `config`.

    Attributes:
        adapters: How each adapter was made, and its `State`.
        packs: The stored weight as a product on a CPU reads it fastest.
        quantised: W_r, quantised; the stored weight is then empty, unless adapters are merged into it.
        in_4_bits: Whether bitsandbytes keeps the stored weight in 4 bits; it is W0 then, and never changes.
        fan_in_fan_out: Whether the base layer stores its weight as `(in_features, out_features)`.
        base_fingerprint: Of the pretrained weight; None on the meta device.

    Raises:
        FastpeftError: The weight cannot be decomposed so, `config` and `settings` are both given, or `settings` has
            other fields.

    Notes:
        Several active adapters add their changes: `W0 + sum_i (U_i diag(s_i) V_i - U0_i diag(s_i) V0_i)`.
        No adapter has dropout: the low-rank path carries the largest part of the pretrained weight.

    Example:
        >>> layer = SivaLinear.from_linear(nn.Linear(16, 8), r=2)
        >>> layer(torch.randn(3, 16)).shape
        torch.Size([3, 8])
    """

    cast_input_dtype_enabled = True  # PEFT's helper sets it; inputs are not cast
    adapter_layer_names = ("siva_du", "siva_dv")
    other_param_names = ("siva_s", "siva_u0", "siva_v0", "siva_residual", "states", "adapters")
    rows: AdapterRows | None = None

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str = "default",
        r: int | None = None,
        config: SivaConfig | None = None,
        *,
        step: float | None = None,
        name: str = "the layer",
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise FastpeftError(
                f"{name} got a config and {', '.join(settings)} beside it. Write these into the config."
            )
        if strange := settings.keys() - set(_OF_ONE_LAYER):
            raise FastpeftError(
                f"{name} got {', '.join(sorted(strange))}, which would do nothing for one layer; allowed are "
                f"{', '.join(_OF_ONE_LAYER)}. Others take effect in a SivaConfig for get_peft_model."
            )
        super().__init__()
        config = SivaConfig(**settings) if config is None else config
        base.check_kind(base_layer, name)
        self.in_4_bits = base.is_in_4_bits(base_layer)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.out_features, self.in_features = base.shape_of(base_layer)
        if self.in_4_bits:
            base.check_4_bits(base_layer, name)
        self.base_layer: Any = base_layer.requires_grad_(False)  # nn.Linear or Conv1D, which has no types
        self.quantised: QuantisedWeight | None
        self.register_module("quantised", None)
        self.name = name
        self.packs = Packs(config.pack_weights)
        self.base_fingerprint: str | None = None
        self.adapters: dict[str, Adapter] = {}
        self.siva_du, self.siva_dv = nn.ModuleDict(), nn.ModuleDict()
        self.siva_s, self.siva_u0, self.siva_v0 = (BufferDict(persistent=True) for _ in range(3))
        self.siva_residual = BufferDict(persistent=True)  # W_r where the file must hold it: d below the full rank
        self.states = BufferDict(persistent=True)  # those of `adapters`, for state dicts
        self._disable_adapters, self._active_adapter = False, adapter_name
        self.register_state_dict_post_hook(loading.save_in_float32)
        self.update_layer(adapter_name, config.r if r is None else r, config, step)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, r: int = 8, d: int | None = None, residual: Residual = "frozen", **arguments: Any
    ) -> SivaLinear:
        """Take over `linear` (which is changed in place) and make its top-r singular triplets trainable.

        The arguments are those of the class, but for `config`, whose fields are given by their names.
        """
        return cls(linear, r=r, d=d, residual=residual, **arguments)

    # -- computing -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.rows is not None and not self._disable_adapters:
            return self._mixed(x, self.rows.of(x, self.name))
        output = grouping.take(self, x)  # of a layer that reads the same x
        if output is not None:
            return output
        factors = self.acting()  # first: an adapter that is filled only now may bring a quantised residual
        if factors is None:
            return cast(Tensor, self._modules["base_layer"](x, *args, **kwargs))  # type: ignore[misc]
        u, s, v = factors
        return self._product(x, [u], [s], [v])

    def _product(
        self,
        x: Tensor,
        us: Sequence[Tensor],
        ss: Sequence[Tensor],
        vs: Sequence[Tensor],
        sizes: Sequence[int] = (),
        order: Tensor | None = None,
    ) -> Tensor:
        """`x W^T + ((x v^T) * s) u^T + b` with the frozen weight W as it is stored."""
        bias: Any = self._modules["base_layer"].bias  # type: ignore[union-attr]
        (h,) = siva_products(x, self.compute_dtype(x), [self.frozen], us, ss, vs, [bias], sizes, order)
        return h.to(x.dtype) if self.in_4_bits and not autocast_dtype(x.device) else h

    def _mixed(self, x: Tensor, rows: AdapterRows) -> Tensor:
        """Compute each row of x by its adapter, or by the pretrained weight if this layer has no such adapter."""
        factors = [self._low_rank([name] if name in self.adapters else []) or self._blank(0) for name in rows.sizes]
        us, ss, vs = zip(*factors, strict=True)
        order = None if rows.order is None else rows.order.to(x.device)
        return self._product(x, us, ss, vs, list(rows.sizes.values()), order)

    @property
    def frozen(self) -> FrozenWeight:
        """The weight that does not train, as products take it."""
        if self.in_4_bits:
            return base.weight_in_4_bits(self.base_layer)
        quantised: Any = self._modules["quantised"]  # nn.Module's __getattr__ would take longer
        if quantised is not None and not self.merged:
            return cast(FrozenWeight, quantised.frozen)
        return Dense(self.stored, self.packs)

    @property
    def stored(self) -> Tensor:
        """The stored weight `(out_features, in_features)`; empty where `quantised` takes its place."""
        weight: Tensor = self._modules["base_layer"].weight  # type: ignore[union-attr, assignment]
        if weight.requires_grad and not weight.is_leaf:  # FSDP1: a view of a flat parameter of which other parts train
            weight = weight.detach()
        return weight.t() if self.fan_in_fan_out else weight

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """In what a product with x computes: autocast's dtype, else the weight's, or bitsandbytes' choice."""
        if self.in_4_bits:
            return autocast_dtype(x.device) or self.base_layer.compute_dtype or x.dtype
        return compute_dtype(x, self._modules["base_layer"].weight)  # type: ignore[union-attr, arg-type]

    def acting(self) -> Factors | None:
        """What must be added to the stored weight now; None if nothing."""
        adapters = self.adapters
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self._low_rank([])
        names = [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter
        if len(adapters) == len(names) == 1 and names[0] in adapters and adapters[names[0]].state is State.FROZEN:
            return self._trained(names[0])  # as `_low_rank` would, of which it is the most common case
        return None if self.merged else self._low_rank([name for name in names if name in adapters])

    @property
    def weight(self) -> Tensor:
        """The weight with which the layer computes, differentiable in the factors, in the base layer's layout.

        Modules such as `nn.MultiheadAttention` read it instead of calling the layer. It is computed when its values are
        used, see `LazyWeight`.

        Raises:
            FastpeftError: At its use, if each row of the batch has an adapter of its own.
        """
        if torch.compiler.is_compiling():  # the compiler leaves out what nothing uses
            return self._compute_weight()
        shape = (self.in_features, self.out_features) if self.fan_in_fan_out else (self.out_features, self.in_features)
        like = self.base_layer.weight
        if self.in_4_bits:
            like = like.new_empty(0, dtype=self.dtype)
        return LazyWeight(self._compute_weight, like, shape)

    def _compute_weight(self) -> Tensor:
        if self.rows is not None and not self.disable_adapters:
            raise FastpeftError(
                f"{self.name}: adapter_names needs layers that are called, but a module reads this layer's weight. Run "
                "the model once for each adapter."
            )
        factors = self.acting()
        if factors is None:
            merged: Tensor = self.matrix.to(self.dtype) if self.in_4_bits else self.base_layer.weight
            return merged
        weight = (self.matrix + factors.product()).to(self.dtype)
        return weight.t() if self.fan_in_fan_out else weight

    # -- the stored weight -----------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base layer's weight, or which it had before it was in 4 bits."""
        weight = self.base_layer.weight
        dtype: torch.dtype = weight.quant_state.dtype if self.in_4_bits else weight.dtype
        return dtype

    @property
    def matrix(self) -> Tensor:
        """The weight that does not train as numbers `(N, K)`, outside of autograd: W0, W_r, or what is merged."""
        frozen = self.frozen
        if isinstance(frozen, Dense):
            return frozen.stored.data
        with torch.no_grad():
            return frozen.dense(torch.float32 if self.in_4_bits else self.dtype)

    def store(self, weight: Tensor | QuantisedWeight) -> None:
        """Let another weight take the place of the stored one, which keeps dtype and device."""
        base.check_storable(self.base_layer, self.name)
        self.packs.drop()  # it would notice, but hold the old weight until the next call
        give_back(self.base_layer.weight.data)
        if isinstance(weight, QuantisedWeight):
            self.quantised = weight
            self.base_layer.weight.data = self.base_layer.weight.data.new_empty(0)
        else:
            self.base_layer.weight.data = weight.t().contiguous() if self.fan_in_fan_out else weight

    def take_out(self, initial: Factors, kind: Format | None) -> None:
        """Store W_r, in the format `kind`, in the place of the pretrained weight."""
        exact = self.matrix if kind is None else self.matrix.float()
        rest = subtract(exact, initial)
        self.store(rest if kind is None else QuantisedWeight(rest, kind))

    def pretrained(self, dtype: torch.dtype | None = None) -> Tensor:
        """W0 `(N, K)`, to rounding: what is stored, plus the initial triplets where that is W_r.

        Args:
            dtype: of the result; None: that of the stored weight.
        """
        weight = self.matrix if dtype is None else self.matrix.to(dtype)
        initial = self._low_rank([])
        return weight if initial is None else add(weight, initial)

    @property
    def source(self) -> str | None:
        """An adapter whose initial triplets are not in the stored weight, but for merged ones; None: it is W0."""
        found = (name for name, each in self.adapters.items() if each.residual == "frozen" and each.state)
        return next(found, None)

    @property
    def lossy(self) -> bool:
        """Whether the pretrained weight is lost to more than rounding."""
        return self.quantised is not None or any(each.d is not None for each in self.adapters.values())

    def share_residual(self, adapter: str | None = None) -> None:
        """Make the stored weight and every saved W_r one tensor again, that of `adapter` if given."""
        if adapter is not None:
            self.base_layer.weight.data = self.siva_residual[adapter]
        if not self.merged:
            for name in self.siva_residual:
                self.siva_residual[name] = self.base_layer.weight.data

    def _apply(self, fn: Any, recurse: bool = True) -> SivaLinear:
        initial = [each for tensors in (self.siva_s, self.siva_u0, self.siva_v0) for each in tensors.values()]
        self.packs.drop()
        super()._apply(keeping_dtypes(fn, initial), recurse)  # W_r was made with every bit of them
        self.share_residual()  # a move to another device or dtype would part them
        return self

    # -- adapters --------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, r: int, config: SivaConfig, step: float | None = None) -> None:
        """Add an adapter of rank r, whatever `config.r` is; one of the same name is replaced."""
        sibling = self.check_addable(adapter_name, r, config)
        active = list(self.active_adapters)  # type: ignore[arg-type]
        if adapter_name in self.adapters:
            self.delete_adapter(adapter_name)  # its weight must not be decomposed a second time
        if self.base_fingerprint is None:
            self.base_fingerprint = base.original_fingerprint(self.base_layer)
        adapter = Adapter(r, self._lossy_rank(config.d), config.residual, config.residual_dtype, step)
        waits = config.init_weights == "saved" or config.pissa is not None
        if sibling is not None:
            initial = self.initial(sibling)
        elif waits:
            initial = self._blank(r)
        elif adapter.residual_dtype is not None:
            iterations, niter = config.quant_iterations, config.svd_niter
            initial, rest = decompose_quantised(self.matrix, r, adapter.residual_dtype, iterations, self.name, niter)
            self.store(rest)
        else:
            initial, dense = decompose(self.matrix, r, adapter.d, self.name, config.svd_niter)
            if adapter.residual == "frozen":
                self.store(dense)
        self.adapters[adapter_name] = adapter
        self.siva_s[adapter_name] = initial.s.clone()
        for tensors, part in (self.siva_u0, initial.u), (self.siva_v0, initial.v):
            tensors[adapter_name] = part.to(self.initial_dtype(adapter_name, part), copy=True)
        self.enter(adapter_name, State.EMPTY if waits else adapter.loaded)
        start: Start = "empty" if waits else "zero" if config.init_weights else "random"
        of_u, of_v = self.scales(adapter_name, initial.s)
        self.siva_du[adapter_name] = Change(initial.u, start, of_u)
        self.siva_dv[adapter_name] = Change(initial.v, start, of_v)
        if adapter.d is not None:
            self.siva_residual[adapter_name] = self.base_layer.weight.data
        self.set_adapter(active)  # type: ignore[operator]

    def check_addable(self, adapter_name: str, r: int, config: SivaConfig) -> str | None:
        """Raise `FastpeftError` unless an adapter can be added.

        Returns:
            The adapter of the same decomposition whose initial factors it can start from, None if there is none yet.
        """
        check_name(adapter_name)
        check_residual(config.residual, config.d, config.residual_dtype)
        base.check_base(self.base_layer, config.residual, self.name)
        if self.in_4_bits:
            check_ranks(torch.Size((self.out_features, self.in_features)), r, config.d, self.name)
        else:
            check_decomposable(self.matrix, r, config.d, self.name)
        if self.merged:
            raise FastpeftError(
                f"{self.name}: adapter {adapter_name!r} cannot be added while {self.merged_adapters} are merged. Call "
                "unmerge_adapter() first."
            )
        if self.is_last(adapter_name):
            self.check_restorable()
        found = None
        given = Adapter(r, self._lossy_rank(config.d), config.residual, config.residual_dtype, None).decomposition
        for name, other in self.adapters.items():
            if name == adapter_name:
                continue
            held = other.decomposition
            if given != held:
                if config.residual == other.residual == "implicit":
                    continue
                mine, its = (", ".join(f"{key}={value!r}" for key, value in each.items()) for each in (given, held))
                raise FastpeftError(
                    f"{self.name}: adapter {adapter_name!r} ({mine}) cannot share the layer with {name!r} ({its}): a "
                    "frozen residual serves only adapters of one decomposition. Use residual='implicit' for all."
                )
            if other.state:
                found = name
        return found

    def can_adopt(self, other: SivaLinear, theirs: str) -> bool:
        """Whether the adapter `theirs` of a layer that stores the same weight could act in this one."""
        adapter, source = other.adapters[theirs], self.source
        if source is None:
            return adapter.residual == "implicit"
        same = adapter.decomposition == self.adapters[source].decomposition
        return same and all(map(torch.equal, other.initial(theirs), self.initial(source)))

    def adopt(self, adapter_name: str, other: SivaLinear, theirs: str) -> None:
        """Take over an adapter that this layer `can_adopt`. Its changes are shared; so are, where W_r is stored, the
        initial factors of all adapters."""
        adapter, source = other.adapters[theirs], self.source
        self.adapters[adapter_name] = replace(adapter)
        holder, name = (other, theirs) if source is None else (self, source)
        for mine, held in (
            (self.siva_s, holder.siva_s),
            (self.siva_u0, holder.siva_u0),
            (self.siva_v0, holder.siva_v0),
        ):
            mine[adapter_name] = held[name]
        self.siva_du[adapter_name], self.siva_dv[adapter_name] = other.changes(theirs)
        if theirs in other.siva_residual:
            self.siva_residual[adapter_name] = self.base_layer.weight.data
        self.enter(adapter_name, adapter.state)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; with the last one, restore the pretrained weight."""
        if self.is_last(adapter_name):
            self.restore()
        elif adapter_name in self.merged_adapters:
            self.unmerge()  # while its factors are there
        super().delete_adapter(adapter_name)

    def is_last(self, adapter_name: str) -> bool:
        """Whether W_r goes with this adapter: the others, if there are any, are empty and will make theirs of W0."""
        filled = {name for name, each in self.adapters.items() if each.state}
        return list(self.adapters) == [adapter_name] or (filled == {adapter_name} and not self.siva_residual)

    def enter(self, adapter_name: str, state: State) -> None:
        """Let an adapter have a state from now on."""
        self.adapters[adapter_name].state = state
        device = self.base_layer.weight.device
        self.states[adapter_name] = torch.full((), int(state), dtype=torch.uint8, device=device)

    def load_factors(self, adapter_name: str, trained: Factors, initial: Factors) -> None:
        """Fill an adapter that is empty.

        Raises:
            FastpeftError: `initial` are no singular triplets of the layer's weight.
        """
        state = loading.entries(adapter_name, trained, initial, self.scales(adapter_name, initial.s))
        self.load_state_dict(state, strict=False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        loading.prepare(self, state_dict, prefix)  # what it replaces in the state dict, the layer's modules load
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _blank(self, r: int) -> Factors:
        shapes = (self.out_features, r), (r,), (r, self.in_features)
        return Factors(*(torch.zeros(shape, device=self.base_layer.weight.device) for shape in shapes))

    def _lossy_rank(self, d: int | None) -> int | None:
        return lossy_rank((self.out_features, self.in_features), d)

    def initial_dtype(self, adapter: str, part: Tensor) -> torch.dtype:
        """In what U0 and V0 are kept: bfloat16 beside a residual in 4 bits, unless it would round them."""
        if self.adapters[adapter].residual_dtype in (None, "int8"):
            return torch.float32
        return torch.bfloat16 if part.is_meta or part.equal(part.bfloat16().to(part)) else torch.float32

    def initial(self, adapter: str) -> Factors:
        return Factors(self.siva_u0[adapter].float(), self.siva_s[adapter], self.siva_v0[adapter].float())

    def _trained(self, adapter: str) -> Factors:
        # `self.siva_du[adapter]` and the like: nn.Module's __getattr__ would take longer than a small layer's products
        parts: Any = self._modules
        u0, v0 = parts["siva_u0"]._buffers[adapter], parts["siva_v0"]._buffers[adapter]
        du, dv = parts["siva_du"]._modules[adapter], parts["siva_dv"]._modules[adapter]
        return Factors(changed(u0, du), parts["siva_s"]._buffers[adapter], changed(v0, dv))

    def changes(self, adapter: str) -> tuple[Change, Change]:
        return cast(tuple[Change, Change], (self.siva_du[adapter], self.siva_dv[adapter]))

    def scales(self, adapter: str, s: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The scales of an adapter's changes, where its singular values are `s`."""
        step = self.adapters[adapter].step
        return (None, None) if step is None else scales(s, self.pretrained(torch.float32), step)

    def _low_rank(self, active: list[str]) -> Factors | None:
        """What must be added to the stored weight when the adapters `active` apply; None if nothing.

        Where W_r is stored `sum_i U_i s V_i - (n - 1) U0 s V0` for n adapters, which is `U s V` for one and
        `U0 s V0` for none; where W0 is, `sum_i (U_i s_i V_i - U0_i s_i V0_i)`.
        """
        for name in active:
            if self.adapters[name].state is State.EMPTY:
                loading.fill(self, name)
        terms = [self._trained(name) for name in active]
        source = self.source
        if source is not None:
            count = 1 - len(active)
            initial = [self.initial(source)] if count else []
            terms += [term._replace(s=count * term.s) for term in initial]
        else:
            terms += [term._replace(s=-term.s) for term in map(self.initial, active)]
        if len(terms) <= 1:
            return terms[0] if terms else None
        u, s, v = zip(*terms, strict=True)
        return Factors(torch.cat(u, 1), torch.cat(s), torch.cat(v, 0))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the factors; PEFT would also cast them to the dtype of the base layer."""
        if adapter_name not in self.adapters:
            return  # PEFT asks every layer, also those that only other adapters have
        device = device or self.base_layer.weight.device
        for change in self.changes(adapter_name):
            if change.weight.device.type != "meta":
                change.to(device)
        for tensors in (self.siva_s, self.siva_u0, self.siva_v0, self.states):
            if tensors[adapter_name].device.type != "meta":
                tensors[adapter_name] = tensors[adapter_name].to(device)

    # -- merging ---------------------------------------------------------------------------------------------------

    @property
    def merged_adapters(self) -> list[str]:
        return [name for name, each in self.adapters.items() if each.state is State.MERGED]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's change of the weight, `U s V - U0 s V0`, float32, in the layout of the base layer's weight."""
        delta = self._trained(adapter).product() - self.initial(adapter).product()
        return delta.t() if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the layer is its pretrained weight plus `get_delta_weight`, as PEFT's `convert_to_lora` needs."""
        return not self.lossy

    @torch.inference_mode(False)  # or a weight of later steps could not be saved for backward
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the stored weight, which then acts alone.

        Args:
            safe_merge: Refuse a merged weight with NaN or infinite values before it is stored.
            adapter_names: The adapters; None: the active ones.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters]
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
        self.store(merged)
        for name in names:
            self.enter(name, State.MERGED)

    def check_mergeable(self) -> None:
        """Raise `FastpeftError` if the stored weight cannot take an adapter in."""
        if self.in_4_bits:
            raise FastpeftError(
                f"{self.name}: its weight is in 4 bits, to which a merged one would have to be rounded again. Save the "
                "adapter, load it onto the base model as it is before quantising (PeftModel.from_pretrained), and "
                "merge it there."
            )
        base.check_storable(self.base_layer, self.name)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the stored weight again."""
        self.store(self._unmerged_weight() if self.quantised is None else self.quantised)
        for name in self.merged_adapters:
            self.enter(name, self.adapters[name].loaded)

    def _unmerged_weight(self) -> Tensor:
        """The stored weight with nothing merged; to rounding, unless W_r is kept beside it."""
        if self.merged and self.quantised is not None:
            return self.quantised.dequantise(self.dtype)
        if self.merged and self.lossy:
            rest = next(iter(self.siva_residual.values()))
            return rest.t() if self.fan_in_fan_out else rest
        factors = self._low_rank(self.merged_adapters) if self.merged else None
        return self.matrix if factors is None else subtract(self.matrix, factors)

    def check_restorable(self) -> None:
        """Raise `FastpeftError` if the pretrained weight cannot be given back."""
        if self.lossy:
            reason = (
                f"residual_dtype={self.quantised.kind!r}"
                if self.quantised is not None
                else f"d={next(each.d for each in self.adapters.values() if each.d is not None)} below the full rank"
            )
            raise FastpeftError(
                f"{self.name}: with {reason} the pretrained weight is no longer there and cannot be given back. Merge "
                "instead, or load the base model again."
            )
        if self.source is not None or self.merged:
            base.check_storable(self.base_layer, self.name)

    @torch.no_grad()
    def pretrained_weight(self) -> Tensor | None:
        """The pretrained weight, to rounding, in the layout of the base layer's, where W_r is stored; else None.

        Raises:
            FastpeftError: It is no longer there.
        """
        if self.source is None or self.merged:
            return None
        self.check_restorable()
        weight = self.pretrained()
        return weight.t() if self.fan_in_fan_out else weight

    @property
    def comes_back_rounded(self) -> bool:
        """Whether the pretrained weight is not stored, and is restored in half precision, so that its bits differ."""
        return self.source is not None and self.base_layer.weight.dtype in HALVES

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self) -> None:
        """Make the stored weight the pretrained one again, to rounding."""
        self.check_restorable()
        if self.merged:
            self.unmerge()
        if self.source is not None:
            self.store(self.pretrained())
            # note down what it stands for, so that adapters made on it still know it
            self.base_layer.siva_restored = {fingerprint(self.matrix): self.base_fingerprint}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base layer alone, with the adapters merged or with its pretrained weight; PEFT calls this."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not (merge and self.merged):
            self.restore()
        base_layer: nn.Module = self.base_layer
        return base_layer
