"""What a later start reads says its format: ours and the one before are read, any other is refused in a line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_npr.data.samples import SftSample, read_samples, write_samples
from megatron_npr.demo.run import run_folder
from megatron_npr.report import rebuild, write_report
from megatron_npr.rollout.rollout_file import read_rollouts, write_rollouts
from megatron_npr.run_folder.manifest import Manifest, read_manifest, write_manifest
from megatron_npr.runtime.format_version import CURRENT, FORMAT_VERSION, Kind
from npr_ext.errors import UserError
from tests.support.report_sample import result, rollout
from tests.unit.rollout.test_rollout_file import vocabulary

Records = list[dict[str, Any]]
SAMPLE = SftSample("one", [1, 2], [3], "three")


def checkpoint(folder: Path, version: object) -> object:
    manifest = Manifest(3, {}, {}, {}, {}, {})
    if version != "as written":
        object.__setattr__(manifest, FORMAT_VERSION, version)
    write_manifest(folder, manifest)
    if version is None:  # as the program wrote it before there were versions
        write_manifest_without_version(folder, manifest)
    return read_manifest(folder).step


def write_manifest_without_version(folder: Path, manifest: Manifest) -> None:
    from megatron_npr.run_folder import manifest as module

    content = {name: value for name, value in vars(manifest).items() if name != FORMAT_VERSION}
    (folder / module.MANIFEST).write_bytes(module._render(content))


def edited(path: Path, version: object) -> None:
    """Give the JSON lines of a file another version, or none."""
    if version == "as written":
        return
    records: Records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record[FORMAT_VERSION]
        if version is not None:
            record[FORMAT_VERSION] = version
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def samples(folder: Path, version: object) -> object:
    write_samples(folder / "samples.jsonl", [SAMPLE, SAMPLE])
    edited(folder / "samples.jsonl", version)
    assert read_samples(folder / "samples.jsonl", vocabulary()) == [SAMPLE, SAMPLE]
    return 3


def rollouts(folder: Path, version: object) -> object:
    write_rollouts(folder / "rollouts.jsonl", [rollout()[0]], vocabulary())
    edited(folder / "rollouts.jsonl", version)
    return len(read_rollouts(folder / "rollouts.jsonl")) + 2


def demo(folder: Path, version: object) -> object:
    made = run_folder(folder, 3, resume=False)
    edited(made / "demo.json", version)
    assert run_folder(folder, None, resume=True) == made
    return json.loads((made / "demo.json").read_text())["seed"]


def report(folder: Path, version: object) -> object:
    write_report(folder, result(folder))
    edited(folder / "result.json", version)
    assert rebuild(folder).is_file()
    return 3


CASES: dict[Kind, Callable[[Path, object], object]] = {
    "checkpoint": checkpoint,
    "samples file": samples,
    "rollouts file": rollouts,
    "demo folder": demo,
    "report record": report,
}
EVERY_KIND = pytest.mark.parametrize("kind", CASES)


def test_every_kind_is_in_the_table() -> None:
    assert {*CASES, "run folder"} == set(CURRENT), "run folders: test_claim.py"


@EVERY_KIND
@pytest.mark.parametrize("version", ["as written", None, 0, 1])
def test_what_this_version_and_the_one_before_wrote_is_read(
    kind: Kind, version: object, tmp_path: Path
) -> None:
    assert CASES[kind](tmp_path, version) == 3


@EVERY_KIND
@pytest.mark.parametrize("version", [2, 10**30, -1, "1", True, 1.0, [1], {}])
def test_another_format_is_refused_in_a_line_that_names_it(
    kind: Kind, version: object, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        CASES[kind](tmp_path, version)
    line = str(caught.value)
    assert f"is a {kind} of format version {version!r}, this program reads versions up to 1" in line
    assert str(tmp_path) in line and "\n" not in line
