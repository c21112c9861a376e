"""Dynamic expert routing: what a user asks for, thresholds, what a GGUF carries, statistics.

Pure: nothing here opens a file or a model, or calls the runtime (run/ does).

- request.py     Routing: a policy with its options   - options.py   the table of options
- policy.py      the table of policies                - params.py    what the runtime is told
- resolve.py     from the one to the other            - stats.py     what was dropped while running
- metadata.py    what a GGUF carries                  - report.py    that, as text and JSON
- thresholds.py  thresholds from a profile            - profile.py   what a calibration knows
"""

from __future__ import annotations

from mc_gguf.routing.metadata import RoutingMetadata, default_metadata
from mc_gguf.routing.policy import describe_policies
from mc_gguf.routing.request import Routing
from mc_gguf.routing.resolve import resolve
from mc_gguf.routing.stats import RoutingStats

__all__ = ["Routing", "RoutingMetadata", "RoutingStats", "default_metadata", "describe_policies", "resolve"]
