"""launch/gpu_checks.sh with stubs for all that its stages call: which run, what the page says, and
what stays of it when stages fail, are stopped, or run again.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_page import sections, write

REPOSITORY = Path(__file__).parents[1]
STUB = f"""#!/usr/bin/env bash
case "$*" in
    *requirements.py*) exit "${{INCOMPLETE:-0}}" ;;
    *gpu_page*) exec {sys.executable} "$@" ;;
    *megatron_gkd.doctor*)
        printf 'the doctor\\n## no: stage\\n```\\n'
        sleep "${{DOCTOR_SLEEPS:-0}}" ;;
    *"-m pytest"*) echo "a warning"; echo "python $*"; exit "${{TESTS:-0}}" ;;
    *is_available*) exit "${{NO_CUDA:-0}}" ;;
    *) echo "python $*" ;;
esac
"""


@pytest.fixture
def checks(tmp_path):
    """`checks(*arguments, **variables)` -> (exit status, stdout, stderr, sections of the page)."""
    for folder in ("launch", "benchmarks", "bin", "demo"):
        (tmp_path / folder).mkdir()
    for name in ("launch/gpu_checks.sh", "launch/environment.sh", "benchmarks/gpu_page.py"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "demo/run.sh").write_text('echo "the demo in $DTYPE on $DEVICE with $PYTHON"')
    for name, text in {
        "python3": STUB,
        "nvidia-smi": '#!/bin/sh\necho "A card, 80 GiB, 580.1"\n',
        "compute-sanitizer": '#!/bin/sh\necho "sanitizer [$PYTORCH_ALLOC_CONF]"\n',
    }.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*arguments, **variables):
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        environment.pop("DEVICE", None)
        done = subprocess.run(
            ["bash", str(tmp_path / "launch/gpu_checks.sh"), *arguments],
            env=environment | {"COMMIT": "abc1234"} | variables,
            capture_output=True,
            text=True,
        )
        page = tmp_path / "docs/gpu.md"
        found = sections(page.read_text()) if page.exists() else {}
        return done.returncode, done.stdout, done.stderr, found

    return run


def names(listing):
    return [line.split()[0] for line in listing.splitlines()]


def test_every_stage_is_recorded(checks):
    stages = names(checks("--list")[1])
    status, out, err, page = checks(TESTS="3")
    assert list(page) == stages
    tests = ["kernels", "parity", "attention"]
    assert (status, err.splitlines()[-1]) == (1, f"gpu_checks: failed: {' '.join(tests)}")
    for name, text in page.items():
        said = "failed with status 3" if name in tests else "passed"
        assert text.splitlines()[2].startswith(f"**{said}** in "), text
        assert "commit abc1234 · A card, 80 GiB, 580.1" in text
        assert f"launch/gpu_checks.sh --only {name}`" in text
    assert "the doctor" in page["doctor"] and "a warning" not in page["kernels"]
    assert "tests/test_gpu.py" in page["parity"] and "--layers 48" in page["step"]
    assert "the demo in bfloat16 on cuda with " in page["demo"]
    assert "sanitizer []" in page["sanitizer"]  # no expandable segments
    assert [line for line in out.splitlines() if line.startswith("=== kernels: status 3")]


def test_a_stage_that_is_run_again_replaces_its_section(checks):
    assert list(checks("--only", "kernels,peers", TESTS="1")[3]) == ["kernels", "peers"]
    status, _, _, page = checks("--only", "kernels", COMMIT="def5678")
    assert status == 0 and list(page) == ["kernels", "peers"]
    assert "passed" in page["kernels"] and "commit def5678" in page["kernels"]
    assert "commit abc1234" in page["peers"]
    assert list(checks("--from", "rates", TESTS="1")[3]) == ["kernels", "peers", "rates"]


def test_a_time_limit_ends_a_stage_and_not_the_run(checks, tmp_path):
    script = tmp_path / "launch/gpu_checks.sh"
    script.write_text(re.sub(r"\ndoctor +30", "\ndoctor 5", script.read_text()))
    status, _, err, page = checks("--only", "doctor,peers", DOCTOR_SLEEPS="60")
    assert (status, err.splitlines()[-1]) == (1, "gpu_checks: failed: doctor")
    assert re.search(r"\*\*stopped at its time limit\*\* in \d+ s", page["doctor"])
    assert "the doctor" in page["doctor"] and "passed" in page["peers"]
    status, out, _, page = checks("--only", "doctor,peers", SECONDS_LEFT="5")
    assert status == 0 and out.splitlines()[-1].endswith("gpu_checks.sh --from doctor")
    assert "stopped" in page["doctor"] and "passed" in page["peers"]  # as they were
    (tmp_path / "bin/compute-sanitizer").unlink()
    if shutil.which("compute-sanitizer") is None:
        assert "**not run**" in checks("--only", "sanitizer")[3]["sanitizer"]


def test_what_is_refused(checks, tmp_path):
    for arguments in (["--only", "nothing"], ["--from"], ["--odd"]):
        status, _, err, page = checks(*arguments)
        assert status == 2 and err.startswith("gpu_checks: error: ") and not page
    status, _, err, page = checks(NO_CUDA="1")
    assert status == 1 and "python3 sees no GPU" in err and not page
    (tmp_path / "launch/setup_env.sh").write_text("exit 1")
    status, out, _, page = checks(INCOMPLETE="1")
    assert status == 1 and "===" not in out and not page
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    status, _, err, page = checks()
    assert status == 1 and "nvidia-smi sees no GPU" in err and not page
    status, _, _, page = checks("--only", "step,demo", DEVICE="cpu")
    assert status == 0 and "--device cpu --layers 2" in page["step"]
    assert "no GPU" in page["step"] and "on cpu" in page["demo"]


def test_a_page_keeps_what_it_does_not_know(tmp_path):
    page = tmp_path / "gpu.md"
    said = "**passed** in 1 s · today · commit abc · a card"
    for name in ("second", "old", "first"):
        write(page, ["first", "second"], name, f"## {name}: title\n\n{said}\n\n```\nlog\n```")
    assert list(sections(page.read_text())) == ["first", "second", "old"]
    assert page.read_text().count("| first: title | **passed** in 1 s | today | commit abc |") == 1
