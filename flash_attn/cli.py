"""The command line, `python -m flash_attn` or `flash-attn`.

    info      what is installed, what of it works here, who can use it; which kernel serves a call
    verify    compares one call with attention in fp64: output, softmax_lse and all gradients
    bench     times one call beside PyTorch's scaled_dot_product_attention
    memory    peak memory of forward and backward over sequence lengths, beside other attention

Every command prints a table, or with --json one JSON object. Exit status: 0 if all is well, 1 if
something is not, 2 if nothing could be said.
"""

from __future__ import annotations

import argparse
import sys

from flash_attn import __version__, verify
from flash_attn.commands import bench, info, memory

COMMANDS = {
    "info": (info, "what is installed and works, who can use it, which kernel serves a call"),
    "verify": (verify, "compare one call with attention in fp64"),
    "bench": (bench, "time one call beside PyTorch's attention"),
    "memory": (memory, "peak memory over sequence lengths, beside other attention"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (command, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(subparser)
        subparser.set_defaults(run=command.run, error=subparser.error)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that `arguments` name, `info` where they name none."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments == ["--json"]:
        arguments = ["info", *arguments]
    options = make_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (RuntimeError, ValueError) as error:
        print(f"flash_attn {options.command}: {error}", file=sys.stderr)
        return 2
