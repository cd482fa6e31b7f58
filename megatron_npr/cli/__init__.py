"""The `npr` command line: one table of commands; each tool's options and work lie in its own package.

npr stage3 FILE.toml --train.steps 4 ──► STAGES ──► load_config ──► megatron_npr.stages.stage3.run(config) ──► exit code
npr bench engine --json ───────────────► TOOLS ──► megatron_npr.bench.command: add_arguments, run(arguments) ──► exit code
"""

from megatron_npr.cli.dispatch import main

__all__ = ["main"]
