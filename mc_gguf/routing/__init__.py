"""Dynamic expert routing: thresholds from a calibration, what a GGUF carries of them, policies, statistics.

Numpy only: nothing here opens a model or calls the runtime.
"""

from __future__ import annotations

from mc_gguf.routing.metadata import RoutingMetadata, default_metadata

__all__ = ["RoutingMetadata", "default_metadata"]
