"""The metadata keys of the mixed-expert GGUF and the names of its tensors. No other package knows them."""

from __future__ import annotations

import re
from collections.abc import Iterable

FORMAT_VERSION = 1
PREFIX = "mc_gguf."

KEY_VERSION = f"{PREFIX}version"
KEY_EXPERT_BPW = f"{PREFIX}expert_bpw"
KEY_PLAN = f"{PREFIX}plan"
KEY_CALIBRATION = f"{PREFIX}calibration"

ROUTING_VERSION = 1
ROUTING_PREFIX = f"{PREFIX}routing."

KEY_ROUTING_VERSION = f"{ROUTING_PREFIX}version"
KEY_THRESHOLDS = f"{ROUTING_PREFIX}thresholds"
KEY_ACTIVE = f"{ROUTING_PREFIX}active"
KEY_PROTECT = f"{ROUTING_PREFIX}protect"
KEY_LAYERS = f"{ROUTING_PREFIX}layers"
KEY_RATIO_QUANTILES = f"{ROUTING_PREFIX}ratio_quantiles"
KEY_SENSITIVITY = f"{ROUTING_PREFIX}sensitivity"
KEY_CURVE = f"{ROUTING_PREFIX}curve"
KEY_ROUTING_CALIBRATION = f"{ROUTING_PREFIX}calibration"
KEY_ROUTING_MODEL = f"{ROUTING_PREFIX}model"

FINGERPRINT = re.compile(r"[0-9a-f]{64}")
# A stack of experts as llama.cpp names it, and a part of one: its map, or one of its groups.
STOCK_NAME = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.weight")
PART_NAME = re.compile(r"(blk\.\d+\.ffn_(?:gate_up|gate|up|down)_exps\.weight)\.(.+)")


def has_own_keys(keys: Iterable[str]) -> bool:
    """Whether mc_gguf has written to the file whose metadata has these `keys`."""
    return any(key.startswith(PREFIX) for key in keys)
