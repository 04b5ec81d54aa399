"""The command line: one subcommand a module."""

import argparse
import importlib
from collections.abc import Sequence

COMMANDS = ("bench", "compare", "replay", "layers", "counters", "accuracy", "scaling")
COMMANDS += ("costs", "deferred", "prefill", "model", "model_peer", "picture", "ptx")
COMMANDS += ("tables",)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name in COMMANDS:
        module = importlib.import_module(f"benchmarks.{name}")
        text = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_options(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    main()
