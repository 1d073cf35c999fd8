"""The program: `fpo`, or python -m fpocli, which torchrun can launch."""

from fpocli.system.signals import end_on_signals


def main() -> None:
    """The program `fpo`."""
    # Before anything slow is imported.
    end_on_signals()
    from fpocli.cli import commands

    commands.main()


if __name__ == "__main__":
    main()
