"""Values of the converter's lazy tensors (gguf-py's LazyBase), computed without storing anything in their
tree.

A stack of experts is either torch.stack() of one tensor per expert, or it comes out of a tensor that holds
all experts, by operations on its other dimensions. Of such a tensor only the wanted expert is read: the
operations are applied to a part of it.
"""

from __future__ import annotations

from typing import Any

from mc_gguf.common.errors import SourceError

_ERRORS = (RuntimeError, IndexError, ValueError, TypeError)  # of operations that do not take a part


def evaluate(node: Any) -> Any:
    """The value of a lazy tensor."""
    if not hasattr(node, "_func"):
        return node
    if node._data is not None:
        return node._data
    return node._func(*type(node)._recurse_apply(node._args, evaluate), **node._kwargs)


def evaluate_expert(stack: Any, expert: int) -> Any:
    """One expert of the lazy tensor `stack` [experts, rows, columns]."""
    import torch

    if getattr(stack, "_func", None) is torch.stack and stack._kwargs.get("dim", 0) == 0:
        return evaluate(stack._args[0][expert])
    try:
        part = _evaluate_part(stack, slice(expert, expert + 1))
    except _ERRORS:
        part = None
    if part is not None and tuple(part.shape) == (1, *stack.shape[1:]):
        return part[0]
    whole = evaluate(stack)
    if len(whole.shape) < 2:
        raise SourceError(f"a stack of experts has the shape {list(whole.shape)}")
    return whole[expert]


def _evaluate_part(node: Any, part: slice) -> Any:
    """The value of a lazy tensor computed from a part of the first dimension of what it is made from."""
    if not hasattr(node, "_func"):
        return node
    if node._data is not None:
        return node._data[part]
    found: list[Any] = []

    def inner(child: Any) -> Any:
        found.append(child)
        return _evaluate_part(child, part)

    arguments = type(node)._recurse_apply(node._args, inner)
    value = node._func(*arguments, **node._kwargs)
    return value if found else value[part]  # without a lazy argument it is what is stored
