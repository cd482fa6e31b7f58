"""What `npr bench engine` says follows from what it did: turns, ratios, the scripted response, the other process."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

import megatron_npr
from megatron_npr import cli
from megatron_npr.bench.contenders.greedy import (
    Decoded,
    Ours,
    alternate,
    random_prompts,
    same_responses,
    times_faster,
    tokens_per_second,
)
from megatron_npr.bench.contenders.vllm_process import Vllm, VllmSettings, environment
from megatron_npr.bench.cpu import branch_response, engine, kv_pressure
from megatron_npr.bench.cpu.bench_model import Opened, made_folder, open_model
from megatron_npr.bench.cpu.engine import EngineBench
from megatron_npr.bench.cpu.script import response_script
from npr_engine.engine import Engine, EngineConfig
from npr_engine.model.transformer import InferenceModel
from npr_ext.errors import UserError

DEMO_BASE = Path(megatron_npr.__file__).parent / "assets" / "demo_base"


@pytest.fixture(scope="module")
def opened() -> Opened:
    return open_model(DEMO_BASE, torch.float32)


def new_engine(opened: Opened, **sizes: int) -> Engine:
    return Engine(opened.model, opened.grammar, EngineConfig(**sizes))


@dataclass
class Notebook:
    """A contender that writes down whose turn it was."""

    name: str
    turns: list[tuple[str, int]] = field(default_factory=list)

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        self.turns.append((self.name, prompts[0][0]))
        return Decoded(1.0, [[7] * num_tokens for _ in prompts])


def test_contenders_take_turns_and_another_one_begins_each_batch() -> None:
    turns: list[tuple[str, int]] = []
    contenders = {name: Notebook(name, turns) for name in "abc"}
    decoded = alternate(contenders, [[[0]], [[1]], [[2]], [[3]]], num_tokens=2)
    assert turns == [
        (name, turn) for turn, order in enumerate(("abc", "bca", "cab", "abc")) for name in order
    ]
    assert {name: len(runs) for name, runs in decoded.items()} == {"a": 4, "b": 4, "c": 4}


def test_ratios_are_medians_over_pairs_of_runs() -> None:
    ours = [Decoded(seconds, [[1] * 6, [2] * 6]) for seconds in (1.0, 10.0, 2.0)]
    theirs = [Decoded(seconds, [[1] * 6, [3] * 6]) for seconds in (2.0, 15.0, 6.0)]
    assert tokens_per_second(ours) == 6.0  # 12, 1.2, 6
    assert times_faster(ours, theirs) == 2.0  # 2, 1.5, 3
    assert same_responses(ours, theirs) == 0.5


def test_prompts_are_text_and_change_with_the_seed(opened: Opened) -> None:
    vocabulary = opened.grammar.vocabulary
    prompts = random_prompts(vocabulary, 3, 20, seed=(1, 0))
    assert prompts == random_prompts(vocabulary, 3, 20, seed=(1, 0))
    assert prompts != random_prompts(vocabulary, 3, 20, seed=(1, 1))
    assert [len(prompt) for prompt in prompts] == [20] * 3
    structural = {vocabulary.eos_id, *vocabulary.tag_ids}
    assert not structural & {token for prompt in prompts for token in prompt}


def scripted_text(branches: int, branch_tokens: int) -> str:
    """The response as a person would write it."""
    plans = "\n".join(f"<plan>{n}:{':' * 6}</plan>" for n in range(1, branches + 1))
    steps = "".join(f"\n<step>\n{n}:{':' * (branch_tokens - 1)}</step>" for n in range(1, branches + 1))
    return f"<guideline>\n{plans}\n</guideline>{steps}\n<takeaway>\n{':' * 12}</takeaway>{':' * 12}"


@pytest.mark.parametrize("branches, branch_tokens, prompt_length", [(5, 20, 32), (2, 1, 1), (1, 7, 3)])
def test_the_engine_writes_the_scripted_response(
    opened: Opened, branches: int, branch_tokens: int, prompt_length: int
) -> None:
    vocabulary = opened.grammar.vocabulary
    script = response_script(vocabulary, prompt_length, branches=branches, branch_tokens=branch_tokens)
    prompt = random_prompts(vocabulary, 1, prompt_length, seed=(0,))[0]
    opened.model.script = script.next_token
    try:
        rollout = new_engine(opened).generate([prompt], script.params)[0]
    finally:
        opened.model.script = None
    assert rollout.finish_reason == "eos"
    assert vocabulary.text(rollout.token_ids[:-1].tolist()) == scripted_text(branches, branch_tokens)
    assert int((~rollout.forced).sum()) == script.sampled_tokens
    assert int(rollout.forced.sum()) == script.forced_tokens
    inside = (rollout.branch_ids > 0) & ~rollout.forced
    assert int(inside.sum()) == branches * branch_tokens
    assert len(set(rollout.decode_steps[inside].tolist())) == branch_tokens


def test_without_a_script_the_model_says_what_it_would(opened: Opened) -> None:
    plain = InferenceModel(opened.model.config, opened.model._weights)
    engines = (new_engine(opened), Engine(plain, opened.grammar, EngineConfig()))
    prompts = random_prompts(opened.grammar.vocabulary, 3, 9, seed=(2,))
    ours, same = (Ours(each).decode(prompts, 12).token_ids for each in engines)
    assert ours == same
    assert [len(tokens) for tokens in ours] == [12] * 3


def test_branch_figures_count_tokens_and_steps(opened: Opened) -> None:
    vocabulary = opened.grammar.vocabulary
    script = response_script(vocabulary, 32, branches=4, branch_tokens=30)
    prompt = random_prompts(vocabulary, 1, 32, seed=(0,))[0]
    figures = branch_response.measure(new_engine(opened), opened.model, script, prompt, repeats=1)
    assert figures.sampled_tokens == script.sampled_tokens
    assert figures.parallel_efficiency == 1.0
    assert figures.phase_ideal_speedup == 4.0
    longest_path = script.sampled_tokens - 3 * 30
    assert figures.response_ideal_speedup == script.sampled_tokens / longest_path
    assert figures.phase_wall_speedup == pytest.approx(
        figures.phase_sequential_seconds / figures.phase_seconds
    )
    assert opened.model.script is None


def test_pressure_ends_at_the_first_preemption_and_leaves_an_empty_engine(opened: Opened) -> None:
    vocabulary = opened.grammar.vocabulary
    script = response_script(vocabulary, 8, branches=3, branch_tokens=20)
    small = new_engine(opened, num_kv_slots=512, block_size=1)
    prompts = random_prompts(vocabulary, 12, 8, seed=(0,))
    figures = kv_pressure.measure(small, opened.model, script, prompts)
    assert small.stats().preemptions >= 1
    assert 0.9 < figures.kv_utilisation <= 1.0
    assert small.num_unfinished == 0
    small.check_integrity()


def test_the_bench_names_what_the_issue_asks_for(opened: Opened) -> None:
    bench = EngineBench(
        DEMO_BASE,
        repeats=2,
        dtypes=("fp32",),
        batches=(1, 3),
        main_batch=3,
        new_tokens=6,
        branch_tokens=8,
        pressure_slots=512,
        pressure_responses=8,
    )
    figures = json.loads(json.dumps(engine.measure(bench)))
    assert figures["model"] == "demo_base"
    assert (figures["batch"], figures["steps"], figures["ideal_speedup"]) == (3, 6, 5.0)
    assert figures["parallel_efficiency"] == 1.0
    assert figures["tokens_per_second"] > 0
    assert figures["wall_speedup"] > 0
    assert figures["vs_transformers"] > 0
    assert 0 < figures["kv_utilisation"] <= 1
    assert 0 < figures["overhead_share"] < 1
    assert [entry["batch"] for entry in figures["decoding"]] == [1, 3]
    for entry in figures["decoding"]:
        assert entry["overhead_us_per_step"] == pytest.approx(entry["overhead_share"] * entry["us_per_step"])
        assert 0 < entry["sampler_us_per_step"] < entry["overhead_us_per_step"]
    assert figures["decoding"][1]["against"]["transformers"]["same_responses"] == 1.0
    assert [entry["block_size"] for entry in figures["pressure"]] == [4, 16]


@pytest.mark.parametrize(
    "words, said",
    [
        ("engine --against vllm", "needs --vllm-python"),
        ("engine --vllm-python /bin/true", "add --against vllm"),
        ("engine --against sglang", "invalid choice: 'sglang'"),
        ("engine --against vllm --vllm-python /no/such/python", "/no/such/python is no program"),
        ("engine --repeats 0", "--repeats is 0"),
        ("engine --threads -1", "--threads is -1"),
        ("engine --model /dev/null", "/dev/null"),
        ("layout --model x", "unrecognized arguments: --model x"),
        ("", "required: NAME"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        assert cli.main(["bench", *words.split()]) == 2
    finally:
        torch.set_num_threads(threads)
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_more_threads_than_cores_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    try:
        assert cli.main(["bench", "engine", "--threads", str(cores + 1)]) == 2
    finally:
        torch.set_num_threads(threads)
    assert f"may use {cores} cores" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_that_does_not_exist_becomes_smollm2(smollm2: Path, tmp_path: Path) -> None:
    made = made_folder(tmp_path / "new")
    assert (made / "config.json").read_text() == (smollm2 / "config.json").read_text()
    written = (made / "model.safetensors").stat().st_mtime_ns
    assert made_folder(made) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == written


STAND_IN = """
    import os, threading
    from types import SimpleNamespace

    __version__ = "stand-in"


    def poll() -> None:  # as vLLM's idle workers do
        while True:
            pass


    class SamplingParams(SimpleNamespace):
        pass


    class LLM:
        def __init__(self, **settings):
            print("a line for people", settings["dtype"], flush=True)
            self.threads = len(os.environ["VLLM_CPU_OMP_THREADS_BIND"].split(","))
            threading.Thread(target=poll, daemon=True).start()

        def generate(self, prompts, params, use_tqdm):
            if params.max_tokens == 13:
                os._exit(3)
            first = [prompt["prompt_token_ids"][0] for prompt in prompts]
            return [
                SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token + self.threads] * params.max_tokens)])
                for token in first
            ]
"""


def settings(python: Path) -> VllmSettings:
    return VllmSettings(python, DEMO_BASE, torch.bfloat16, 64, (0, 1))


@pytest.fixture
def stand_in(tmp_path: Path) -> VllmSettings:
    """An interpreter whose vllm answers by rule, and polls while it is idle."""
    (tmp_path / "vllm.py").write_text(textwrap.dedent(STAND_IN))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec /usr/bin/env python3 "$@"\n')
    python.chmod(0o755)
    return settings(python)


def test_the_other_process_answers_and_stands_still_between_its_turns(stand_in: VllmSettings) -> None:
    with Vllm(stand_in) as vllm:
        process = psutil.Process(vllm.pid)
        assert vllm.version == "stand-in"
        for turn in range(2):
            decoded = vllm.decode([[10 + turn, 1], [20, 2]], num_tokens=3)
            assert decoded.token_ids == [[12 + turn] * 3, [22] * 3]
            assert decoded.seconds > 0
            assert process.status() == psutil.STATUS_STOPPED
        assert vllm.stillness().stopped_cpu_seconds < 0.1
    assert not process.is_running()


OWNER = """
import sys, torch
from pathlib import Path
from megatron_npr.bench.contenders.vllm_process import Vllm, VllmSettings

vllm = Vllm(VllmSettings(Path(sys.argv[1]), Path("."), torch.bfloat16, 64, (0, 1)))
print(vllm.pid, flush=True)
sys.stdin.read()
"""


def test_no_stopped_process_outlives_a_bench_that_is_killed(stand_in: VllmSettings) -> None:
    command = [sys.executable, "-c", OWNER, str(stand_in.python)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        other = psutil.Process(int(owner.stdout.readline()))
        assert other.status() == psutil.STATUS_STOPPED
        owner.kill()
    deadline = time.monotonic() + 60
    while is_alive(other) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(other)


def is_alive(process: psutil.Process) -> bool:
    """An orphan that ended stays a zombie where nobody collects it."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_the_other_process_may_die_and_the_error_says_so(stand_in: VllmSettings) -> None:
    with Vllm(stand_in) as vllm, pytest.raises(UserError, match=r"ended: a line for people bfloat16"):
        vllm.decode([[1]], num_tokens=13)


def test_an_interpreter_without_vllm_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nexec /usr/bin/env python3 -I "$@"\n')
    python.chmod(0o755)
    with pytest.raises(UserError, match=rf"{python} ended: .*No module named 'vllm'"):
        Vllm(settings(python))


def test_the_other_process_inherits_nothing_that_steers_our_threads() -> None:
    ours = {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "9",
        "PYTHONPATH": "x",
        "KMP_BLOCKTIME": "1",
    }
    theirs = environment(ours, (3, 5))
    assert theirs["PATH"] == "/bin"
    assert theirs["VLLM_CPU_OMP_THREADS_BIND"] == "3,5"
    assert theirs["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert not set(theirs) & {"OMP_NUM_THREADS", "GOMP_SPINCOUNT", "PYTHONPATH", "KMP_BLOCKTIME"}
