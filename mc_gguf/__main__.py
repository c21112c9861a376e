"""`python -m mc_gguf` and the console script `mc-gguf`."""

from __future__ import annotations

from mc_gguf.cli import main

if __name__ == "__main__":
    main()
