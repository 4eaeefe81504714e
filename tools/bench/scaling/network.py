"""Time of a collective: messages times latency, plus bytes divided by bandwidth, within a node and between nodes.

Legend: W ranks, n ranks of a node, m nodes, V bytes.
"""

import math
from dataclasses import dataclass

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL = "all_reduce", "all_gather", "reduce_scatter", "all_to_all"
KINDS = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL)


@dataclass(frozen=True)
class Link:
    """Connection of a rank to the ranks of its node, or to those of other nodes.

    Attributes:
        latency_s: seconds of a message of a ring.
        bandwidth: bytes per second of a rank in one direction.
        tree_latency_s: seconds of a message of a tree; negative if there are no trees.
    """

    latency_s: float
    bandwidth: float
    tree_latency_s: float = -1.0


@dataclass(frozen=True)
class Network:
    """Network of nodes with equal numbers of ranks.

    Attributes:
        ranks_per_node: n.
        within: link between ranks of a node.
        between: link between nodes; each rank has its own.
        start_s: seconds until a collective begins.
        post_s: seconds to post a message to one of the ranks of other nodes in an all-to-all exchange.
        part_s: seconds to copy the part of one rank out of the result of an all-gather with a tensor for each rank.
    """

    ranks_per_node: int
    within: Link
    between: Link
    start_s: float = 0.0
    post_s: float = 0.0
    part_s: float = 0.0

    def num_nodes(self, world_size: int) -> int:
        """Return the number of nodes m of W ranks."""
        return math.ceil(world_size / self.ranks_per_node)

    def seconds(self, kind: str, num_bytes: float, world_size: int, *, in_parts: bool = False) -> float:
        """Return the seconds of a collective; 0 with one rank.

        Args:
            kind: one of `KINDS`. An all-reduce takes the faster of ring and tree.
            num_bytes: V, the size of the tensor that is reduced, of the result of an all-gather, of the input of a
                reduce-scatter, or of the rows that a rank sends to all ranks, itself included.
            world_size: W.
            in_parts: whether an all-gather has one tensor for each rank.

        Raises:
            ValueError: if the kind is unknown.
        """
        if kind not in KINDS:
            raise ValueError(f"collective '{kind}': allowed: {', '.join(KINDS)}")
        if world_size == 1:
            return 0.0
        if kind == ALL_TO_ALL:
            return self.start_s + self._all_to_all(num_bytes, world_size)
        seconds = self._ring(kind, num_bytes, world_size)
        if kind == ALL_REDUCE and self.within.tree_latency_s >= 0:
            seconds = min(seconds, self._tree(num_bytes, world_size))
        return self.start_s + seconds + (self.part_s * world_size if in_parts else 0.0)

    def _ring(self, kind: str, num_bytes: float, world_size: int) -> float:
        hops, between_nodes = ring_messages(kind, world_size), ring_messages(kind, self.num_nodes(world_size))
        latency = (hops - between_nodes) * self.within.latency_s + between_nodes * self.between.latency_s
        return latency + wire_bytes(kind, num_bytes, world_size) / self._ring_bandwidth(world_size)

    def _tree(self, num_bytes: float, world_size: int) -> float:
        """Chains inside the nodes and a binary tree over the nodes, up and down."""
        nodes = self.num_nodes(world_size)
        up = (min(world_size, self.ranks_per_node) - 1) * self.within.tree_latency_s
        up += math.ceil(math.log2(nodes)) * self.between.tree_latency_s
        return 2 * up + 2 * num_bytes / self._ring_bandwidth(world_size)

    def _ring_bandwidth(self, world_size: int) -> float:
        """Rings pass all ranks of a node, and leave it through the links of all of its ranks."""
        if world_size <= self.ranks_per_node:
            return self.within.bandwidth
        outward = self.ranks_per_node * self.between.bandwidth
        return min(self.within.bandwidth, outward) if self.ranks_per_node > 1 else outward

    def _all_to_all(self, num_bytes: float, world_size: int) -> float:
        """One message for each other rank; those inside the node and between nodes are sent at the same time."""
        part = num_bytes / world_size
        neighbors = min(world_size, self.ranks_per_node) - 1
        seconds = neighbors * (self.within.latency_s + part / self.within.bandwidth)
        if others := world_size - 1 - neighbors:
            outward = self.between.latency_s + others * (self.post_s + part / self.between.bandwidth)
            seconds = max(seconds, outward)
        return seconds


def ring_messages(kind: str, world_size: int) -> int:
    """Return the number of messages that follow one another in a ring of W ranks, or in pairwise exchanges."""
    return (2 if kind == ALL_REDUCE else 1) * (world_size - 1)


def wire_bytes(kind: str, num_bytes: float, world_size: int) -> float:
    """Return the bytes that a rank sends in a ring of W ranks or in pairwise exchanges; V as in `Network.seconds`."""
    return ring_messages(kind, world_size) * num_bytes / world_size
