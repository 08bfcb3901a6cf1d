"""What a traced graph says in more operators than it takes, and engines run as it is said.

    expansion to the size that a tensor has           the tensor: beside a symbolic batch no engine sees that, and copies
    a view of a view, a transposition of one          one, or none
    an alias, which a detached tensor is              the tensor
    B' A' of a product A B that is only read turned   as the gradient of k in q k' is: engines turn what goes into a product for
                                                      nothing, what comes out of it by a copy

Values stay the same sums of the same numbers. Knows ATen; knows no network.
"""

from typing import cast

import torch
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.graph_module import GraphModule
from torch.fx.node import Node

aten = torch.ops.aten
_SWAPPED = [0, 2, 1]


def simplify(traced: GraphModule) -> None:
    """All of the above, in place. Nodes keep their example values (meta["val"]).

    Where an operator writes to its input, which only a user's own function has one do, products stay as they are: when one is
    computed, and which memory is whose, then matters.
    """
    pure = not any(_writes(node) for node in traced.graph.nodes)
    for node in list(traced.graph.nodes):
        if node.target is aten.alias.default:
            _replace(node, _source(node))
        elif node.target is aten.expand.default:
            _replace_if_same_size(node)
        elif node.target is aten.view.default:
            _join_views(node)
        elif node.target is aten.permute.default:
            _join_transpositions(node)
            if pure:
                _turn_product(node)
    if pure:
        # A turned product lies otherwise in memory, and what is computed from it.
        for node in traced.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _writes(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable  # pyright: ignore[reportPrivateUsage]


def _source(node: Node) -> Node:
    return cast(Node, node.args[0])


def _replace(node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)
    _erase_unread(node)


def _erase_unread(node: Node) -> None:
    """At once: a product counts who reads it."""
    if node.op == "call_function" and not node.users:
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            _erase_unread(source)


def _read_instead(node: Node, source: Node) -> None:
    former = _source(node)
    node.replace_input_with(former, source)
    _erase_unread(former)


def _replace_if_same_size(node: Node) -> None:
    if statically_known_true(sym_eq(_source(node).meta["val"].shape, node.meta["val"].shape)):
        _replace(node, _source(node))


def _join_views(node: Node) -> None:
    while _source(node).target is aten.view.default:
        _read_instead(node, _source(_source(node)))
    _replace_if_same_size(node)


def _order(node: Node) -> list[int]:
    order = cast(list[int], node.args[1])
    return [at % len(order) for at in order]


def _join_transpositions(node: Node) -> None:
    source = _source(node)
    if source.target is aten.permute.default:
        node.args = (source, [_order(source)[at] for at in _order(node)])
        _read_instead(node, _source(source))
    if _order(node) == sorted(_order(node)):
        _replace(node, _source(node))


def _turn_product(node: Node) -> None:
    if not node.users or _order(node) != _SWAPPED:
        return
    product = _source(node)
    if product.target is aten.bmm.default and len(product.users) == 1:
        left, right = cast(tuple[Node, Node], product.args)
        with node.graph.inserting_before(node):
            turned = node.graph.call_function(aten.bmm.default, (_swapped(right), _swapped(left)))
        turned.meta["val"] = node.meta["val"]
        _replace(node, turned)


def _swapped(node: Node) -> Node:
    """The tensor with its last two dimensions exchanged: where it is itself such a one, what that was made from."""
    if node.target is aten.permute.default and _order(node) == _SWAPPED:
        return _source(node)
    turned = node.graph.call_function(aten.permute.default, (node, _SWAPPED))
    turned.meta["val"] = node.meta["val"].permute(_SWAPPED)
    return turned
