"""`python -m mc_gguf` and the console script `mc-gguf`."""

from __future__ import annotations

from mc_gguf import cli
from mc_gguf.cli import terminal


def main() -> None:
    terminal.prepare()
    cli.main(prog_name="mc-gguf")


if __name__ == "__main__":
    main()
