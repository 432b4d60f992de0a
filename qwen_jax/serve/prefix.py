# SPDX-License-Identifier: Apache-2.0
"""Prompts that begin alike share pages: a tree of whole pages, by their token ids.

Source: RadixAttention (arXiv 2312.07104), with pages for edges. A node is a page that
is whole and will not change: the ids in it, and through its parents all ids before it,
are its key, compared id by id (no hash can collide). Each salt has a tree of its own,
so that nobody learns from the time of an answer what others asked.

A node that rows use (`users` > 0) stays; others are kept until pages are wanted, and
then go from the leaves, longest unused first. Where layers are recurrent, a node may
have their `state` behind its last id as well, in pages of its own: without one nothing
can go on from there. States are copied when a row begins, and may be dropped any time.

Invariants: a page is a node's or its row's, never both; a node's parents are used by at
least as many rows as it is.
Raises: nothing.
"""

import collections
from collections.abc import Iterable, Sequence


class Node:
    """A whole page and what follows it."""

    __slots__ = ("children", "ids", "page", "parent", "salt", "state", "users")

    def __init__(self, parent: "Node | None", ids: tuple[int, ...], page: int, salt=""):
        self.parent, self.ids, self.page, self.salt = parent, ids, page, salt
        self.children: dict[tuple[int, ...], Node] = {}
        self.users = 0
        self.state: int | None = None


class Prefix:
    """The trees of all salts. `page_tokens`: ids of a page."""

    def __init__(self, page_tokens: int):
        self.page_tokens = page_tokens
        self._roots: dict[str, Node] = {}
        # Leaves that nobody uses, the longest unused first.
        self._idle: collections.OrderedDict[Node, None] = collections.OrderedDict()
        # Nodes with a state, the longest unused first.
        self._states: collections.OrderedDict[Node, None] = collections.OrderedDict()
        self.unused = 0  # nodes that nobody uses: pages that could be free
        self.nodes = 0

    def match(
        self, salt: str, ids: Sequence[int], *, states: bool = False
    ) -> tuple[list[Node], int]:
        """The longest path of whole pages that `ids` begin with, one id of them always
        left out (its scores are to be computed), each used once more; with `states`,
        as far as one is there. And how many pages there were at all."""
        node, found, c = self._roots.get(salt), [], self.page_tokens
        for k in range((len(ids) - 1) // c if node else 0):
            node = node.children.get(tuple(ids[k * c : (k + 1) * c]))
            if node is None:
                break
            found.append(node)
        there = len(found)
        while states and found and found[-1].state is None:
            found.pop()
        if states and found:
            self._states.move_to_end(found[-1])
        for node in found:
            self._use(node)
        return found, there

    def insert(
        self, salt: str, parent: Node | None, ids: tuple[int, ...], page: int
    ) -> tuple[Node, bool]:
        """The node of a page that follows `parent` (None: the first), used once more;
        and whether it took `page`, or was there already with another."""
        if parent is None:
            root = self._roots.get(salt)
            if root is None:
                root = self._roots[salt] = Node(None, (), 0, salt)
            parent = root
        node = parent.children.get(ids)
        new = node is None
        if new:
            node = parent.children[ids] = Node(parent, ids, page, salt)
            self.nodes += 1
            self.unused += 1
            self._idle.pop(parent, None)
        self._use(node)
        return node, new

    def _use(self, node: Node) -> None:
        if node.users == 0:
            self.unused -= 1
            self._idle.pop(node, None)
        node.users += 1

    def release(self, nodes: Iterable[Node]) -> None:
        """One user less of each node of a path."""
        for node in reversed(list(nodes)):
            node.users -= 1
            if node.users == 0:
                self.unused += 1
                if not node.children:
                    self._idle[node] = None

    def keep(self, node: Node, state: int) -> None:
        """The node has its state in pages from `state` on."""
        node.state = state
        self._states[node] = None

    def drop_state(self) -> int | None:
        """The pages of the state that was longest unused, which is gone then."""
        if not self._states:
            return None
        node, _ = self._states.popitem(last=False)
        state, node.state = node.state, None
        return state

    def evict(self) -> list[int]:
        """Pages of the leaf that was longest unused, which is gone then; none where
        all are in use."""
        if not self._idle:
            return []
        node, _ = self._idle.popitem(last=False)
        pages = [node.page]
        if node.state is not None:
            del self._states[node]
            pages.append(node.state)
        self._drop(node)
        return pages

    def _drop(self, node: Node) -> None:
        parent = node.parent
        del parent.children[node.ids]
        self.nodes -= 1
        self.unused -= 1
        if parent.children:
            return
        if parent.parent is None:
            del self._roots[parent.salt]
        elif parent.users == 0:
            # Its child was used at the end more lately than all that wait longer.
            self._idle[parent] = None
