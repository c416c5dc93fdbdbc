"""A method of each kind, as somebody would add it: an entry of the registry, and nothing else."""

from __future__ import annotations

from typing import Any

from fastpeft.methods.adapter import AdapterMethod
from fastpeft.methods.method import Method
from fastpeft.methods.recipes import Recipe
from fastpeft.methods.side_network import SideNetworkMethod
from fastpeft.methods.whole_model import WholeModelMethod


def norms(model: Any, _: Any) -> None:
    """The layer norms and the classification head train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("LayerNorm" in name or name.startswith("classifier"))


NEW: tuple[Method, ...] = (
    WholeModelMethod(name="norms", title="norms", description="norms train", recipe=Recipe(1e-2), trains=norms),
    AdapterMethod(
        name="loha", title="LoHa", description="products of two", recipe=Recipe(1e-2), config="LoHaConfig", rank=2
    ),
    SideNetworkMethod(
        name="3-lst", title="3-LST", description="three features", recipe=Recipe(1e-2), fields={"window_size": 3}
    ),
)
