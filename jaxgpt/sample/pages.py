"""Which pages of a paged cache are whose: free ones, those of running rows, and beginnings that rows share.

What prompts begin with is kept in a tree whose edges are chunks of tokens, one tree for each adapter, since
keys and values depend on it (RadixAttention; Zheng et al. 2024, section 3). A chunk is always computed by the
same program on the same tokens, so that it is the same, bit for bit, whoever computed it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Node:
    """A chunk of a prompt behind the chunks of its parents.

    Attributes:
      parent: None for a root.
      tokens: of the chunk.
      pages: that hold its keys and values.
      users: rows that run on it.
      children: by their tokens.
    """

    parent: Node | None = None
    tokens: tuple[int, ...] = ()
    pages: tuple[int, ...] = ()
    users: int = 0
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


class Pages:
    """The pages 1 to `count - 1` of a cache; page 0 is nobody's (`layers.paged`).

    A page is free, belongs to a row, or to a node of a tree. A node that no row uses stays until its pages
    are needed; the one that was used longest ago goes first.

    Args:
      count: pages of the cache.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, 0, -1))
        self._roots: dict[int, Node] = {}
        self._idle: OrderedDict[Node, None] = OrderedDict()  # a child always stands before its parent
        self._idle_pages = 0

    @property
    def available(self) -> int:
        """Pages that a row can have now."""
        return len(self._free) + self._idle_pages

    @property
    def used(self) -> int:
        """Pages that running rows hold, each counted once."""
        return self.count - 1 - self.available

    def root(self, adapter: int) -> Node:
        """Where prompts under an adapter begin."""
        return self._roots.setdefault(adapter, Node())

    def follow(self, node: Node, tokens: Sequence[int]) -> Node | None:
        """The node behind another one with these tokens, taken for a row; None where there is none."""
        if (child := node.children.get(tuple(tokens))) is not None:
            self._use(child)
        return child

    def keep(self, node: Node, tokens: Sequence[int], pages: Sequence[int]) -> Node:
        """Make a node of a row's own pages, behind another one; the row goes on using it."""
        child = Node(node, tuple(tokens), tuple(pages))
        assert child.tokens not in node.children
        node.children[child.tokens] = child
        child.users = 1
        return child

    def take(self, count: int) -> list[int] | None:
        """That many pages for a row; None if there are not enough."""
        if count > self.available:
            return None
        while len(self._free) < count:
            self._forget()
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        """Free pages that a row had for itself."""
        self._free.extend(pages)

    def leave(self, path: Sequence[Node]) -> None:
        """A row uses these nodes no more; they come in order from the root."""
        for node in reversed(path):
            node.users -= 1
            if not node.users:
                self._idle[node] = None
                self._idle_pages += len(node.pages)

    def _use(self, node: Node) -> None:
        if not node.users:
            del self._idle[node]
            self._idle_pages -= len(node.pages)
        node.users += 1

    def _forget(self) -> None:
        node, _ = self._idle.popitem(last=False)
        assert node.parent is not None
        assert not node.children
        del node.parent.children[node.tokens]
        self._idle_pages -= len(node.pages)
        self._free.extend(node.pages)
