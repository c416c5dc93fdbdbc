"""A side network that starts with the backbone's weights of the largest magnitude, pruned to its own width.

After LST (arXiv 2206.06522): a matrix keeps its rows of the largest L1 norm, the next matrix the matching columns, and
the residual stream the same channels everywhere. Dimension letters as in `side.py`; N rows of the backbone's query, key
and value, M neurons of its feed-forward part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.side import SideBlock, SideNetwork, WindowFusion


class _Layer(NamedTuple):
    """The linear layers of one block of the backbone. All but the first three are told apart by their order."""

    query: nn.Linear  # (N, d), as key and value
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear  # (d, N)
    feed_forward_in: nn.Linear  # (M, d)
    feed_forward_out: nn.Linear  # (d, M)


@torch.no_grad()
def prune(side: SideNetwork, backbone: Backbone) -> None:
    """Set the weights of `side` to the pruned weights of `backbone`.

    Every projection and `down` select the D channels that are kept, and `up` puts them back in place, unless it starts
    at zero (`output_mix="add"`). A block gets the weights of the layer where it stands. Its cross-attention gets the
    queries and keys of that layer, and the product of its output matrix and its values. Norms, positions and gates are
    not changed.

    Raises:
        FastpeftError: a layer is not made of the six matrices of a plain encoder block, their names do not tell query,
            key and value apart, or they are quantised.
    """
    layers = [_take_apart(backbone.layers[place - 1], side) for place in side.places]
    channels = _largest(torch.stack([_stream_importance(layer) for layer in layers]).sum(0), side.width)
    selection = torch.eye(side.feature_sizes[0], device=channels.device)[channels]  # (D, d)
    shared = [] if side.shared_projection is None else [side.shared_projection]
    projections: list[Any] = [side.down, *shared, *side.projections.values()]
    for projection in projections:
        projection.weight.copy_(selection.repeat(len(projection.weight) // side.width, 1))
        if projection.bias is not None:
            projection.bias.zero_()
    if side.config.output_mix != "add":  # then it starts at zero
        side.up.weight.copy_(selection.mT)
        side.up.bias.zero_()
    block: Any
    for block, layer in zip(side.blocks, layers):
        _prune_block(block, layer, channels)


def _prune_block(block: SideBlock, layer: _Layer, channels: Tensor) -> None:
    """Set the matrices of a side block to those of `layer`, between the kept channels."""
    query, key, value, inner = (_weight(part)[:, channels] for part in (*layer[:3], layer.feed_forward_in))
    output, outer = (_weight(part)[channels] for part in (layer.output, layer.feed_forward_out))
    width, neurons = len(channels), min(block.feed_forward_in.out_features, len(inner))
    # a row of the query counts with that of the key, a row of the value with the column of the output that reads it
    scored = _largest(query.abs().sum(1) + key.abs().sum(1), width)
    carried = _largest(value.abs().sum(1) + output.abs().sum(0), width)
    firing = _largest(inner.abs().sum(1) + outer.abs().sum(0), neurons)
    query, key, value, output = query[scored], key[scored], value[carried], output[:, carried]  # each (D, D)

    block.qkv.weight.copy_(torch.cat([query, key, value]))
    biases = ((layer.query, scored), (layer.key, scored), (layer.value, carried))
    block.qkv.bias.copy_(torch.cat([_bias(part)[rows] for part, rows in biases]))
    block.attention_output.weight.copy_(output)
    block.attention_output.bias.copy_(_bias(layer.output)[channels])
    block.feed_forward_in.weight[:neurons] = inner[firing]
    block.feed_forward_in.bias[:neurons] = _bias(layer.feed_forward_in)[firing]
    block.feed_forward_out.weight[:, :neurons] = outer[:, firing]
    block.feed_forward_out.bias.copy_(_bias(layer.feed_forward_out)[channels])

    fusion = block.fusion
    if isinstance(fusion, WindowFusion):
        fusion.query.weight.copy_(query)
        fusion.key.weight.copy_(key)
        if fusion.output is None:
            fusion.value.weight.copy_(output @ value)
        else:
            fusion.value.weight.copy_(value)
            fusion.output.weight.copy_(output)
            fusion.output.bias.copy_(_bias(layer.output)[channels])


def _take_apart(layer: nn.Module, side: SideNetwork) -> _Layer:
    modules = list(layer.modules())
    if any(isinstance(module, BaseTunerLayer) for module in modules):
        raise FastpeftError(
            "init='pruned' reads the layers' weights, but PEFT has an adapter in them, which holds a part of these. "
            "Merge it first, or give init='random'."
        )
    named = [(name.rpartition(".")[2], each) for name, each in layer.named_modules() if isinstance(each, nn.Linear)]
    names, linears = [name for name, _ in named], [linear for _, linear in named]
    shapes = [tuple(linear.weight.shape) for linear in linears]
    if len(linears) == len(_Layer._fields):
        (rows, width), (neurons, _) = shapes[0], shapes[4]
        expected = [*3 * [(rows, width)], (width, rows), (neurons, width), (width, neurons)]
        fits = shapes == expected and rows >= side.width and set(side.feature_sizes) == {width}
        # architectures differ in the order of the three, and in their names but for one letter
        letters = ["".join({*"qkv"} & {*name}) for name in names[:3]]
        fits = fits and {*letters} == {*"qkv"}
        if fits and all(linear.weight.is_floating_point() for linear in linears):
            return _Layer(*(linears[letters.index(letter)] for letter in "qkv"), *linears[3:])
    found = ", ".join(
        f"{name} {str(linear.weight.dtype).removeprefix('torch.')} {shape}".strip()
        for name, linear, shape in zip(names, linears, shapes)
    )
    raise FastpeftError(
        "init='pruned' takes over layers of six linear ones, query, key, value, output and the two of the feed-forward "
        "part, with q, k or v in the names of the first three, of one width and not quantised; a "
        f"{type(layer).__name__} has {found or 'none'}. Give init='random'."
    )


def _stream_importance(layer: _Layer) -> Tensor:
    """For each channel of the residual stream, the L1 norm of the weights that read and write it, `(d,)`."""
    readers, writers = (*layer[:3], layer.feed_forward_in), (layer.output, layer.feed_forward_out)
    norms = [_weight(part).abs().sum(0) for part in readers] + [_weight(part).abs().sum(1) for part in writers]
    return torch.stack(norms).sum(0)


def _largest(importance: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest values, sorted."""
    return importance.topk(count).indices.sort().values


def _weight(linear: nn.Linear) -> Tensor:
    return linear.weight.float()


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
