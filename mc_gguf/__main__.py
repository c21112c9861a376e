"""`python -m mc_gguf` and the console script `mc-gguf`."""

from __future__ import annotations

from mc_gguf import cli
from mc_gguf.cli import terminal
from mc_gguf.cli.command import refuse


def main() -> None:
    terminal.prepare()
    try:
        cli.main(prog_name="mc-gguf")
    except OSError as error:  # of --help and --version; what a command raises is refused there
        refuse(error)


if __name__ == "__main__":
    main()
