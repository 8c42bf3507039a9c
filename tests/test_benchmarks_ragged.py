"""The benchmarks of ragged rows, at a size of seconds: one ends with status 1 where padded and
packed micro-batches have other losses, the other where ways to attend have other values.
"""

import os
import re
import subprocess
import sys

import pytest

from benchmarks import attention
from benchmarks.report import REPOSITORY


@pytest.mark.extended
def test_padded_and_packed_steps_have_the_same_loss(tmp_path):
    sizes = "--layers 1 --hidden 32 --inter 16 --experts 4 --experts_per_token 2 --vocab 300"
    command = [sys.executable, "-m", "benchmarks.ragged", "--lengths", "alpaca", "--rows", "12"]
    command += ["--rounds", "1", "--budget", "900", "--device", "cpu", *sizes.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "page.md")],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| alpaca")]
    assert [row[1] for row in rows] == ["padded", "padding-free", "with a budget"]
    padding = [int(re.match(r"\d+", row[3]).group()) for row in rows]
    assert padding[0] > 25 and padding[1:] == [0, 0]


def test_ways_to_attend_agree(tmp_path, capsys):
    """A row of the page for each way that the device has."""
    sizes = "--dtype float32 --heads 4 --groups 2 --head_dim 16 --rounds 1 --calls 2"
    cases = "--lengths 8x3 --lengths 7,20"
    page = tmp_path / "page.md"
    attention.main(f"--device cpu {sizes} {cases} --output {page}".split())
    _, *lines = (line for line in page.read_text().splitlines() if line.startswith("| "))
    rows = [line.split(" | ") for line in lines]
    ways = [("8x3", "row by row"), ("8x3", "one batch"), ("7,20", "row by row")]
    assert [(row[0][2:], row[1]) for row in rows] == ways
    assert all(float(number.strip(" |")) >= 0 for row in rows for number in row[2:])
    assert "8x3" in capsys.readouterr().out
