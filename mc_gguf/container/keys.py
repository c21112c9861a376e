"""The metadata keys of the mixed-expert GGUF, and which tensor names belong to it. Nothing outside container
reads them.
"""

from __future__ import annotations

import re

FORMAT_VERSION = 1

KEY_VERSION = "mc_gguf.version"
KEY_EXPERT_BPW = "mc_gguf.expert_bpw"
KEY_PLAN = "mc_gguf.plan"
KEY_CALIBRATION = "mc_gguf.calibration"

ROUTING_VERSION = 1
ROUTING_PREFIX = "mc_gguf.routing."

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
STOCK_NAME = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
PART_NAME = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down)_exps\.weight)\.(.+)")
