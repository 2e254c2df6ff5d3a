"""The command line. Its imports take a second, in which Ctrl-C ends in one sentence, too."""

import sys


def main() -> int:
    """Run the command of ``sys.argv``; see ``memsplit.dse.cli``."""
    try:
        from .dse.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("memsplit: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
