"""Dynamic expert routing: thresholds from a calibration, what a GGUF carries of them, policies, statistics.

Numpy only: nothing here opens a model or calls the runtime.
"""

from __future__ import annotations

from mc_gguf.routing.metadata import RoutingMetadata, default_metadata
from mc_gguf.routing.policy import Routing, resolve
from mc_gguf.routing.stats import RoutingStats

__all__ = ["Routing", "RoutingMetadata", "RoutingStats", "default_metadata", "resolve"]
