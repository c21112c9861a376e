"""What several tests share: small models and files, second implementations, places."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
