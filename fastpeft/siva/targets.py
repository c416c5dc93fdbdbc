"""Which layers of a model SiVA adapts, and what is told of names that match nothing and of matrices left out."""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from fastpeft.errors import FastpeftError, did_you_mean
from fastpeft.siva.base import check_kind, matrix, original_fingerprint, shape_of
from fastpeft.siva.config import SivaConfig
from fastpeft.siva.decompose import check_decomposable
from fastpeft.siva.heads import ADDED_BY_PEFT
from fastpeft.siva.layer import SivaLinear
from fastpeft.support.fingerprints import fingerprints_agree

logger = logging.getLogger(__name__)

# Of min(N, K)^2 (N + K), as the Gram matrix of the shorter side and its eigenvectors take: 20 seconds to five minutes
# on two cores, by the processor and by how the singular values lie.
_LONG = 1e12


def rank_of(peft_config: SivaConfig, key: str) -> int:
    """The rank of the layer `key`."""
    pattern = get_pattern_key(list(peft_config.rank_pattern), key)
    return peft_config.rank_pattern.get(pattern, peft_config.r)


def endings(names: Iterable[str]) -> list[str]:
    """The last parts of names."""
    return sorted({name.rpartition(".")[2] for name in names})


def warn_of_unmatched(
    peft_config: SivaConfig,
    wanted: Iterable[str],
    linear: list[str],
    targets: Collection[str],
    model: nn.Module,
    is_head: Callable[[str], bool],
) -> None:
    """Warn of names and numbers that were given and match nothing, so that less trains than they say.

    No error, since PEFT takes them, and one list may serve several models.

    Args:
        peft_config: the configuration.
        wanted: the names of its targets; none where they are a regular expression.
        linear: the names of the linear layers that it may adapt.
        targets: the names of those that it adapts.
        model: the model.
        is_head: whether a name is of a part of the head, which is no target.
    """
    # without what PEFT wraps a module in that another adapter saves whole
    names = [name.replace(".original_module", "") for name, _ in model.named_modules(remove_duplicate=False)]
    added = ADDED_BY_PEFT.get(peft_config.task_type, ())
    saved = [name for name in peft_config.modules_to_save or () if name not in added]
    chosen = peft_config.layers_to_transform
    layers = [chosen] if isinstance(chosen, int) else chosen or []
    blocks = _blocks(peft_config, names) if layers else []
    unmatched: dict[str, tuple[list[Any], list[str]]] = {  # what matches nothing, and what there is
        "target_modules": (
            [name for name in wanted if all(is_head(each) for each in names if f".{each}".endswith(f".{name}"))],
            endings(linear),
        ),
        "rank_pattern": (
            [key for key in peft_config.rank_pattern if all(get_pattern_key([key], name) != key for name in targets)],
            endings(targets),
        ),
        "modules_to_save": (
            [name for name in saved if not any(each.endswith(name) for each in names)],
            [name for name, _ in model.named_children()],
        ),
        "layers_to_transform": ([index for index in layers if index not in blocks], [str(block) for block in blocks]),
    }
    for field, (strange, there) in unmatched.items():
        if strange:
            shown, meant = ", ".join(sorted(map(repr, strange))), did_you_mean(str(strange[0]), there)
            logger.warning("%s: nothing matches %s.%s Here are %s", field, shown, meant, ", ".join(there))


def reading_hidden_states(model: nn.Module, names: Collection[str]) -> set[str]:
    """The linear layers among `names` that read no more values than a hidden state of the model, or its heads, have.

    All, where that cannot be told. Not the pooler of a model without a head: embeddings do not read it, and checkpoints
    without it get another one at each load.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):  # of a model of several parts, as one that sees
        with suppress(ValueError):  # where several parts are of text
            config = config.get_text_config()
    width = getattr(config, "hidden_size", None)
    if type(width) is not int:
        return {*names}
    with suppress(AttributeError, TypeError, ValueError):  # not every kind has heads of one width
        width = max(width, config.num_attention_heads * config.head_dim)  # wider than a hidden state in Qwen3
    read = {name for name in names if not name.startswith("pooler.")}
    return {name for name in read if shape_of(model.get_submodule(name))[1] <= width} or {*names}


def in_chosen_blocks(peft_config: SivaConfig, names: Iterable[str]) -> set[str]:
    """The layers among `names`, whole names of targets, that are in a block that the configuration chooses.

    PEFT looks at the block of a layer only where a target is the end of its name.
    """
    probe = copy.copy(peft_config)
    probe.target_modules = set(endings(names))
    return {name for name in names if check_target_module_exists(probe, name)}


def _blocks(peft_config: SivaConfig, names: list[str]) -> list[int]:
    """The numbers of the blocks that `layers_to_transform` can choose, by PEFT's own rule for a layer's name."""
    probe = copy.copy(peft_config)
    probe.exclude_modules = probe.modules_to_save = None
    probe.target_modules = set(endings(names))
    blocks = []
    for index in sorted({int(part) for name in names for part in name.split(".") if part.isdecimal()}):
        probe.layers_to_transform = index
        if any(f".{index}." in name and check_target_module_exists(probe, name) for name in names):
            blocks.append(index)
    return blocks


def no_target(peft_config: SivaConfig, linear: Collection[str], model: nn.Module) -> FastpeftError:
    """Why no layer of the model is a target, given the names of those that SiVA may adapt."""
    if not linear:
        return FastpeftError(
            f"{type(model).__name__} has no linear layer beside its head, and SiVA adapts no others. Use a k-LST "
            "side network, or train the head alone."
        )
    wanted = peft_config.target_modules
    shown = (sorted(wanted) or None) if isinstance(wanted, set) else repr(wanted)
    where = ""
    if peft_config.layers_to_transform is not None:
        blocks = ", ".join(map(str, _blocks(peft_config, [name for name, _ in model.named_modules()])))
        where = f" in the blocks layers_to_transform={peft_config.layers_to_transform!r} (here are {blocks or 'none'})"
    return FastpeftError(
        f"target_modules={shown} matches no linear layer{where} that SiVA may adapt (heads, excluded and separately "
        f"saved modules are not targets, a string is a regular expression for the whole name). Linear layers "
        f'here end in {", ".join(endings(linear))}; name some of them in a list, or pass "all-linear".'
    )


def leave_heads_out(peft_config: SivaConfig, targets: Iterable[str]) -> None:
    """Keep of the names for "all-linear" only those of `targets`: with a lm_head PEFT would save the embeddings too."""
    ends = [f".{name}" for name in targets]
    peft_config.target_modules = {
        each for each in peft_config.target_modules or () if any(end.endswith(f".{each}") for end in ends)
    }


def limit_ranks(peft_config: SivaConfig, targets: Mapping[str, Any]) -> None:
    """Give layers that were not named and that are smaller than r their full rank."""
    limited = {}
    for name, module in targets.items():
        full = min(shape_of(module))
        if get_pattern_key(list(peft_config.rank_pattern), name) == name and full < peft_config.r:
            limited[name] = full
    if limited:
        shown = ", ".join(f"{name} ({rank})" for name, rank in limited.items())
        logger.warning("r=%d: layers that are smaller get their full rank: %s", peft_config.r, shown)
        patterns = {f"^{re.escape(name)}": rank for name, rank in limited.items()}
        peft_config.rank_pattern = {**peft_config.rank_pattern, **patterns}


def warn_of_stacks(model: nn.Module, is_head: Callable[[str], bool], names: Iterable[str] | None) -> None:
    """Warn of matrices that are left out since they are in no layer of their own, as the experts of a mixture.

    Args:
        model: the model.
        is_head: whether a name is of a part of the head, which is no target.
        names: how the names of the targets end. The stacks whose names end so too are told, as `gate_up_proj` beside
            the `up_proj` of a shared expert; None: all.
    """
    ends = ("",) if names is None else tuple(f"_{name}" for name in names)
    stacks: Counter[str] = Counter()
    joined: Counter[str] = Counter()
    for name, module in model.named_modules():
        # kernels of convolutions have three dimensions too, also where they are computed from others
        if isinstance(module, (_ConvNd, ParametrizationList)) or is_head(name):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if not f"_{own}".endswith(ends) or "embed" in own:  # of positions and segments
                continue
            shown = re.sub(r"\.\d+(?=\.)", ".*", f"{name}.{own}")
            if isinstance(module, nn.MultiheadAttention) and own.endswith("proj_weight"):
                joined[shown] += parameter.numel()
            elif parameter.dim() == 3 and min(parameter.shape) > 1:
                stacks[shown] += parameter.numel()
    if stacks:
        logger.warning(
            "SiVA adapts linear layers. %s weights of the model are in stacked matrices, which stay frozen: %s. "
            "LoRA adapts those by its target_parameters",
            f"{stacks.total():,}",
            ", ".join(stacks),
        )
    if joined:
        logger.warning(
            "SiVA adapts linear layers. %s weights of queries, keys and values are parameters of nn.MultiheadAttention "
            "itself, which stay frozen: %s. LoRA adapts them where target_modules names the attention",
            f"{joined.total():,}",
            ", ".join(joined),
        )


def warn_of_a_long_start(peft_config: SivaConfig, targets: Mapping[str, Any]) -> None:
    """Warn where decomposing the targets exactly may keep a CPU for minutes."""
    near = peft_config.svd_niter is not None or (peft_config.residual_dtype and peft_config.quant_iterations)
    if near or peft_config.d is not None:  # with d the advice would not help
        return
    made = [module for module in targets.values() if not isinstance(module, SivaLinear)]
    shapes = [shape_of(module) for module in made if module.weight.device.type == "cpu"]
    if sum(min(shape) ** 2 * sum(shape) for shape in shapes) > _LONG:
        logger.warning(
            "decomposing %d weights exactly may take minutes on a CPU. svd_niter=4 decomposes nearly, in a small "
            "part of the time, and the model starts the same",
            len(shapes),
        )


def tied_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters and modules that several modules hold, and of the parameters of such modules.

    A block that runs several times, as a Universal Transformer's, shares nothing: its layers are the same each time.
    """
    seen: Counter[int] = Counter()
    for module in model.modules():
        held = (*module._parameters.values(), *module._modules.values())
        seen.update(id(each) for each in held if each is not None)
    shared = {identity for identity, count in seen.items() if count > 1}
    own = (module.parameters(recurse=False) for module in model.modules() if id(module) in shared)
    return shared | {id(parameter) for parameters in own for parameter in parameters}


def check_not_held_aside(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raise `FastpeftError` where a plain list or tuple holds a target too, as in the heads of masks of Mask2Former.

    Their forward calls what is in the list: the layer itself, whose weight is W_r then, and never its adapter.
    """
    names = {id(target): name for name, target in targets.items()}
    for module in model.modules():
        for attribute, held in vars(module).items():
            for each in held if isinstance(held, (list, tuple)) else ():
                if id(each) in names:
                    raise FastpeftError(
                        f"{names[id(each)]}: a {type(module).__name__} holds it in a plain list too ({attribute}), by "
                        "which it would run without its adapter. Leave the layer out with exclude_modules, or make "
                        "the list an nn.ModuleList."
                    )


def check_saved_layers(peft_config: SivaConfig, targets: Mapping[str, Any]) -> None:
    """Raise `FastpeftError` where a saved adapter has none of the layers that it would be put on.

    Layers may have other names than in the model that it was made from, if their weights are those.
    """
    saved = peft_config.base_fingerprints if peft_config.init_weights == "saved" else {}
    if not saved or not targets.keys().isdisjoint(saved):
        return
    for target in targets.values():
        found = _fingerprint_of(target)
        if found is None or any(fingerprints_agree(each, found) for each in saved.values()):
            return
    raise FastpeftError(
        f"{next(iter(targets))}: the adapter was trained on other layers than this model has, as {next(iter(saved))}. "
        f"Load the base model it was made from ({_base_of(peft_config)}), unchanged."
    )


def _fingerprint_of(target: Any) -> str | None:
    return target.base_fingerprint if isinstance(target, SivaLinear) else original_fingerprint(target)


def _base_of(peft_config: SivaConfig) -> str:
    return peft_config.base_model_name_or_path or "see its model card"


def check_target(peft_config: SivaConfig, adapter_name: str, key: str, target: Any, tied: set[int]) -> None:
    """Raise `FastpeftError`, naming the layer, unless an adapter of `peft_config` can be put on it."""
    check_kind(target.base_layer if isinstance(target, SivaLinear) else target, key)
    r = rank_of(peft_config, key)
    if isinstance(target, SivaLinear):
        target.check_addable(adapter_name, r, peft_config)
    else:
        if id(target) in tied:
            raise FastpeftError(
                f"{key}: two places of the model hold this layer, and only this one would get the adapter. Give each a "
                "layer of its own, or leave the layer out with exclude_modules."
            )
        check_decomposable(matrix(target, key), r, peft_config.d, key)
        if peft_config.residual == "frozen" and id(target.weight) in tied:
            raise FastpeftError(
                f"{key}: its weight is shared with another module, which would get W_r. Use residual='implicit', or "
                "leave the layer out with exclude_modules."
            )
    expected = peft_config.base_fingerprints.get(key) if peft_config.init_weights == "saved" else None
    if expected is None:
        return
    found = _fingerprint_of(target)
    if found is not None and not fingerprints_agree(expected, found):
        raise FastpeftError(
            f"{key}: the adapter was trained on another weight than this model has. Load the base model it was made "
            f"from ({_base_of(peft_config)}), unchanged."
        )
