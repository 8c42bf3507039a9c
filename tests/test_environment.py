"""Which interpreter the scripts take, and what a folder of wheels lacks for a machine without a
network; with wheels and interpreters that are stubs.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location(
    "requirements_of_setup", REPOSITORY / "launch/requirements.py"
)
requirements = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = requirements
spec.loader.exec_module(requirements)


def make_wheel(folder, name, version, tag="py3-none-any", requires=()):
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        lines = [f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")


def lacking(roots, folder, present=(), python="3.12", assumed=None, other=False):
    asked = [requirements.Asked(requirements.Requirement(line), "us") for line in roots]
    target = requirements.Target.of(python)
    found = requirements.plan(asked, dict(present), target, folder, assumed)
    absent = requirements.by_name(found.other if other else found.absent)
    return [f"{line} (for {by})" for line, by in absent.items()]


def test_what_a_folder_lacks(tmp_path):
    """Down to what wheels require, with markers of the other Python, extras, tags and versions."""
    make_wheel(tmp_path, "alpha", "1.0", requires=["beta>=2", "gamma; extra == 'more'"])
    make_wheel(tmp_path, "alpha", "2.0", requires=["old"])
    make_wheel(tmp_path, "beta", "2.1", requires=["delta; python_version < '3.11'", "torch"])
    make_wheel(tmp_path, "compiled", "1.0", "cp311-cp311-manylinux_2_17_x86_64")
    make_wheel(tmp_path, "compiled", "1.0", "cp39-abi3-manylinux_2_28_x86_64.manylinux_2_17_x86_64")
    make_wheel(tmp_path, "other", "1.0", "cp311-cp311-manylinux_2_17_x86_64")
    assert lacking(["alpha<2"], tmp_path, assumed=requirements.TORCH_FAMILY) == []
    assert lacking(["alpha<2"], tmp_path) == ["torch (for beta)"]
    assert lacking(["alpha<2"], tmp_path, python="3.10") == ["delta (for beta)", "torch (for beta)"]
    assert lacking(["alpha[more]<2"], tmp_path)[0] == "gamma (for alpha)"
    assert lacking(["alpha"], tmp_path) == ["old (for alpha)"]  # pip takes the newest
    assert lacking(["alpha"], tmp_path, {"alpha": "3.0"}) == []  # what is there is left alone
    assert lacking(["Torch>=2.11"], tmp_path, {"torch": "2.11.0+cu130"}) == []
    old = {"torch": "2.9.1", "beta": "1.0"}
    assert lacking(["torch>=2.11"], tmp_path, old) == []
    assert lacking(["torch>=2.11", "alpha<2"], tmp_path, old, other=True) == [
        "torch>=2.11 (for us)"
    ]  # a wheel replaces the other
    if requirements.platform.machine() == "x86_64":
        assert lacking(["compiled"], tmp_path) == []
        assert lacking(["other"], tmp_path) == ["other (for us)"]
        assert lacking(["other"], tmp_path, python="3.11") == []


def test_what_pip_is_asked_for():
    asked = [("a[x]>=1", "p"), ("b", "p"), ("A[y]<3,!=2", "q"), ("b", "p")]
    absent = [requirements.Asked(requirements.Requirement(line), by) for line, by in asked]
    assert requirements.by_name(absent) == {"a[x,y]!=2,<3,>=1": "p, q", "b": "p"}


def test_setup_py_is_read():
    names = {one.requirement.name for one in requirements.declared(["test"])}
    assert {"torch", "pyarrow", "pytest", "datasets"} <= names and "ruff" not in names
    assert "datasets" not in {one.requirement.name for one in requirements.declared([])}
    with pytest.raises(ValueError, match="no extra 'tests' in setup.py; it has .*test"):
        requirements.declared(["tests"])
    assert requirements.torch_version().startswith("2.")


def test_this_interpreter_is_complete():
    """The one that runs the tests; of a copy of the checkout it says what is missing."""
    command = [sys.executable, "launch/requirements.py", "missing", "--extras", "test"]
    command += ["--any_version"] if os.environ.get("ANY_VERSION") else []  # as it was set up
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    command[1:2] = ["-I", "launch/requirements.py"]
    command += ["--installed_here", "/nowhere"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "megatron_gkd itself, from /nowhere\n"


def stub(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


INCOMPLETE = 'case "$*" in *requirements.py*) exit 1;; esac; echo "Python 3.0"'
COMPLETE = 'case "$*" in *requirements.py*) exit 0;; esac; echo "Python 3.12.0"'


@pytest.mark.parametrize(
    "given, venv, on_path, expected",
    [
        (COMPLETE, COMPLETE, COMPLETE, "given"),
        (INCOMPLETE, COMPLETE, COMPLETE, ".venv"),
        (None, COMPLETE, COMPLETE, ".venv"),
        (None, INCOMPLETE, COMPLETE, "path"),
        (None, None, COMPLETE, "path"),
        (INCOMPLETE, None, INCOMPLETE, "set-up"),
    ],
    ids=["PYTHON", "PYTHON-lacks", ".venv", ".venv-lacks", "PATH", "none"],
)
def test_a_complete_environment_skips_set_up(tmp_path, given, venv, on_path, expected):
    (tmp_path / "launch").mkdir()
    shutil.copy(REPOSITORY / "launch/environment.sh", tmp_path / "launch")
    made = "mkdir -p .venv/bin; printf '#!/bin/sh\\necho made' >.venv/bin/python"
    stub(tmp_path / "launch/setup_env.sh", f"echo set-up of $EXTRAS; {made}; chmod +x .venv/bin/*")
    places = {"given": given, ".venv": venv, "path": on_path}
    files = {
        "given": tmp_path / "given",
        ".venv": tmp_path / ".venv/bin/python",
        "path": tmp_path / "path/python3",
    }
    for name, text in places.items():
        if text is not None:
            stub(files[name], text)
    variables = os.environ | {"PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}"}
    variables |= {"PYTHON": str(files["given"])} if given else {}
    script = "extras=test; source launch/environment.sh; echo $python; echo $PYTHONPATH"
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    *before, said, python, path = done.stdout.splitlines()
    where = files[".venv" if expected == "set-up" else expected]
    assert (python, path.split(":")[0]) == (str(where), str(tmp_path)), done.stderr
    assert before == (["set-up of test"] if expected == "set-up" else [])
    assert said.startswith(f"environment: {where} (")


def test_a_torch_of_another_version_is_lent_on_request(tmp_path):
    """With any version, and only where the folder has no torch of its own."""
    (tmp_path / "lent" / "torch").mkdir(parents=True)
    text = "__version__ = '2.99.0+cu140'\nclass version:\n    cuda = '14.0'\n"
    (tmp_path / "lent" / "torch" / "__init__.py").write_text(text)
    wheels = tmp_path / "wheels"
    wheels.mkdir()

    def torch(*arguments):
        command = [sys.executable, str(REPOSITORY / "launch/requirements.py"), "torch", *arguments]
        variables = os.environ | {"PYTHONPATH": str(tmp_path / "lent")}
        return subprocess.run(command, env=variables, capture_output=True, text=True)

    options = ("--wheels", str(wheels), "--any_version")
    assert torch().returncode == torch(*options[:2]).returncode == 1
    assert torch(*options).stdout.split() == [str(tmp_path / "lent"), "14.0"]
    make_wheel(wheels, "torch", "2.13.0")
    found = torch(*options)
    assert (found.returncode, found.stdout) == (1, "")


@pytest.mark.parametrize("gpu, any_version", [(False, False), (True, False), (True, True)])
def test_set_up_from_wheels_names_what_is_missing(tmp_path, gpu, any_version):
    """For which Python, all at once, and pip is not asked. A torch that is there is lent."""
    asked = " --any_version --wheels" if any_version else ""
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch")
    shutil.copy(REPOSITORY / "setup.py", tmp_path)
    (tmp_path / "wheels").mkdir()
    make_wheel(tmp_path / "wheels", "peft", "0.21.2", requires=["psutil"])
    stub(tmp_path / "bin/nvidia-smi", f"exit {0 if gpu else 9}")
    python = f"""case "$*" in
        *"requirements.py torch{asked}"*) echo {tmp_path}/lent {"13.0" if gpu else "cpu"} ;;
        *"-m venv"*) mkdir -p {tmp_path}/.venv/bin; cp "$0" {tmp_path}/.venv/bin/python ;;
        *purelib*) echo {tmp_path}/.venv ;;
        *"--wheels"*) exec {sys.executable} -S "$@" ;;
        *requirements.py*|*"import torch"*) exit 1 ;;
        *--version*) echo Python 3.12.3 ;;
        *"-m pip"*) echo asked pip ;;
    esac"""
    stub(tmp_path / "bin/python", python)
    # in the place of pip's wheel, what the interpreter of the stubs may import: packaging alone
    only = tmp_path / "wheels" / "pip-26.0-py3-none-any.whl"
    only.mkdir()
    (only / "packaging").symlink_to(Path(importlib.util.find_spec("packaging").origin).parent)
    variables = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "WHEELS": str(tmp_path / "wheels"),
        "PYTHON": str(tmp_path / "bin/python"),
        "EXTRAS": "test",
        "ANY_VERSION": "yes" if any_version else "",
    }
    done = subprocess.run(
        ["bash", "launch/setup_env.sh"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 1 and "asked pip" not in done.stdout
    assert f"torch: the one in {tmp_path}/lent" in done.stdout
    assert f"neither here nor in {tmp_path}/wheels, for Python 3.12.3:" in done.stderr
    lines = [line.split()[0] for line in done.stderr.splitlines() if line.startswith("  ")]
    assert "psutil" in lines and not any(line.startswith("peft") for line in lines)
    assert any(line.startswith("megatron-core") for line in lines)
    assert "launch/fetch_wheels.sh" in done.stderr
