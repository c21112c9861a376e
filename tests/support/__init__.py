"""What several tests share: small models and files, second implementations, and places."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny-mixtral"  # the bundled model, a Hugging Face directory
WIKITEXT = ROOT / "tests" / "data" / "wikitext-2.test.txt"
