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

FINGERPRINT = re.compile(r"[0-9a-f]{64}")
STOCK_NAME = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
PART_NAME = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down)_exps\.weight)\.(.+)")
