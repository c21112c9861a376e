"""An eval callback of ggml's scheduler as a Python object.

The scheduler asks for every node of the graph whether it is wanted, computes up to and including a node that
is, and calls again with its numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from mc_gguf.capture.graph import Node


class Listener(ABC):
    """What an object needs to be given to Context.

    An exception must not pass through C: what is raised is kept, the computation is cut short, and check()
    raises it. `is_finished` cuts it short as well: what comes later in the graph is not computed.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.is_finished = False

    @abstractmethod
    def wants(self, node: Node) -> bool:
        """Whether computed() is to be called when the node has been computed."""

    @abstractmethod
    def computed(self, node: Node) -> None:
        """The node and all before it have been computed."""

    def check(self) -> None:
        """Raises what happened in a callback."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def __call__(self, address: int, ask: bool, _user_data: object) -> bool:
        if self.error is not None or self.is_finished:
            return False
        try:
            node = Node(address)
            if ask:
                return self.wants(node)
            self.computed(node)
        except BaseException as error:  # noqa: BLE001  # an interrupt, too
            self.error = error
            return False
        return not self.is_finished
