"""Defaults of a side network that depend on the model beside which it stands."""

from __future__ import annotations

from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.config import STATE, LadderConfig, Residual
from fastpeft.ladder.probes import decide_causal


def decide_defaults(config: LadderConfig, backbone: Backbone) -> set[str]:
    """Fill in the fields whose default depends on the backbone or its head.

    Returns:
        The names of those that depend on the head and were filled in. None of their values adds a weight.
    """
    config.causal = decide_causal(backbone, config.causal)
    config.layers_per_block = config.step(len(backbone.layers))
    attends = config.fusion == "cross_attention"
    residual: Residual | None = config.residual
    if residual is None:
        # with the state tags are far better, and words a little worse
        residual = attends and (STATE if backbone.tags else backbone.answers_tokens)
    defaults = {
        "output_mix": "add" if backbone.decoder is not None else False,
        "residual": residual,
        "normalise_features": bool(residual) or bool(config.causal),
    }
    decided = {field: value for field, value in defaults.items() if getattr(config, field) is None}
    for field, value in decided.items():
        setattr(config, field, value)
    return set(decided)
