"""Nobody reads what a program prints any more: the program goes on."""

import os
import subprocess
import sys

import pytest

from tests.train_runs import SMALL, arguments, make_rows, read_lines, write_rows

PROGRAM = """
import os, subprocess, sys
from megatron_gkd.output_stream import outlive_readers
outlive_readers()
print("first", flush=True)
sys.stdin.read()
for _ in range(3):
    print("more", flush=True)
    print("more", file=sys.stderr)
    subprocess.run([sys.executable, "-c", "print('of a child', flush=True)"], check=True)
os._exit(7)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away(stream):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, text=True, **pipes
    )
    assert process.stdout.readline() == "first\n"
    getattr(process, stream).close()
    process.stdin.close()
    other = (process.stderr if stream == "stdout" else process.stdout).read()
    assert process.wait(60) == 7  # and not 1, or 120 of a flush at the end
    assert "more" in other and "Error" not in other
    for each in (process.stdout, process.stderr):
        each.close()


SPEAKER = """
import os, sys
from megatron_gkd.output_stream import outlive_readers
outlive_readers()
sys.stdin.read()
for _ in range(3):
    print("more", flush=True)
os._exit(7)
"""


def test_a_full_disk_and_a_closed_terminal():
    """/dev/full has no room; a terminal whose other end is closed has errors."""
    master, terminal = os.openpty()
    with open("/dev/full", "w") as full:
        for output in (full, terminal):
            process = subprocess.Popen(
                [sys.executable, "-c", SPEAKER],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
            )
            if output == terminal:
                os.close(master)
                os.close(terminal)
            said = process.communicate()[1]
            assert (process.returncode, said) == (7, "")


def test_a_run_into_head(tiny_folder, tmp_path):
    """As with `| head -n 1`: all steps, a checkpoint, exit status 0."""
    argv = arguments(
        model=tiny_folder(**SMALL),
        dataset=write_rows(tmp_path / "rows.jsonl", make_rows(8)),
        max_steps=3,
        output_dir=tmp_path / "out",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_gkd.train", *argv], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(300) == 0
    assert [line["step"] for line in read_lines(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors").is_file()
