"""`python -m packing pack ...` where there is a network, `python -m packing unpack ...` where there is none."""

from __future__ import annotations

import argparse
import sys

from packing import unpack


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m packing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    words = sys.argv[1:] if arguments is None else arguments
    packer = commands.add_parser("pack", help="download and pack what a machine lacks")
    unpack.add_arguments(commands.add_parser("unpack", help="make the environments out of the parts"))
    if words[:1] != ["unpack"]:  # packing needs the app's packages, unpacking must not
        from packing import pack

        pack.add_arguments(packer)
        chosen = parser.parse_args(words)
        return pack.run(chosen)
    return unpack.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
