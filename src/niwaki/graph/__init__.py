"""The channel graph: labels pushed through one forward, resolved into groups of units."""

from niwaki.graph.trace import ChannelGraph, trace

__all__ = ["ChannelGraph", "trace"]
