"""The report on this machine: PyPI's apex is told from NVIDIA's, and what is printed is what is
there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gkd import doctor

REPOSITORY = Path(__file__).parents[1]


def make_package(folder, name, version, parts=()):
    """A package `name` on disk that fails when it is imported."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise ImportError('the doctor only looks')")
    for part in parts:
        (folder / name / part).mkdir()
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    "parts, usable, words",
    [(["multi_tensor_apply"], True, "0.1"), ([], False, "0.1: PyPI's apex, another project")],
)
def test_the_two_projects_named_apex(tmp_path, monkeypatch, parts, usable, words):
    make_package(tmp_path, "apex", "0.1", parts)
    monkeypatch.syspath_prepend(tmp_path)
    found, text = doctor.find_package("apex")
    assert found == usable and text.startswith(words)


def test_missing_package():
    assert doctor.find_package("no_such_package_here") == (False, "not installed")


def test_report(tmp_path):
    make_package(tmp_path, "flash_attn", "2.8.3")
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "megatron_gkd.doctor"]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (
        "are not installed" not in result.stderr
    )  # megatron-core's notes; a CUDA torch may say something
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert "[x] flash_attn 2.8.3" in lines
    assert f"python {sys.version.split()[0]}" in lines
    assert "device: cpu, collectives over gloo" in lines and "attention: SdpaAttention" in lines
