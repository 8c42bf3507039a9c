#!/usr/bin/env bash
# Create or update .venv in this checkout: Python 3.10 to 3.12, torch, and this package with its test extra.
#
#   bash launch/setup_env.sh && source .venv/bin/activate
#
# Takes minutes the first time and a second when nothing is missing. PYTHON=... chooses an interpreter, EXTRAS=test,gpu
# adds extras. Without a GPU the CPU build of torch is installed. With one, a CUDA build that a Python of this machine
# already has is used as it is; where there is none, the default build is installed. The extras `gpu` and `flash` are
# compiled, which takes minutes and needs nvcc; for them .venv gets its own torch, since they link its libraries.
#
# WHEELS=DIR installs from a folder that launch/fetch_wheels.sh has filled, and asks no network. A torch that a Python of
# this machine has is used, with all else that is beside it; the folder's torch, if there is none. With ANY_VERSION=yes a
# package that is there in a version that setup.py does not ask for is used, and named, where the folder has no other.
set -euo pipefail

extras=${EXTRAS-test,lint}
extras=${extras// /}
candidates=${PYTHON:-python3.12 python3.11 python3.10 python3 python}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
requirements=$repository/launch/requirements.py
venv=$repository/.venv
torch_version=$(sed -n 's/^TORCH = "\([^"]*\)".*/\1/p' "$repository/setup.py")
wheels=${WHEELS:-}
if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || { echo "setup_env: error: WHEELS=$wheels is no folder; launch/fetch_wheels.sh makes one" >&2; exit 1; }
    wheels=$(cd "$wheels" && pwd)
    pip_wheel=$(find "$wheels" -name 'pip-*.whl' | sort -V | tail -n 1)
fi

if [ -x "$venv/bin/python" ] &&
    "$venv/bin/python" -I "$requirements" missing --extras "$extras" ${ANY_VERSION:+--any_version} \
        --installed_here "$repository" >/dev/null 2>&1; then
    echo "setup_env: $venv is up to date"
    exit 0
fi

has_gpu=$(nvidia-smi -L >/dev/null 2>&1 && echo yes || echo no)
case ",$extras," in *,gpu,* | *,flash,*) compiles=${wheels:+no} ;; *) compiles=no ;; esac
compiles=${compiles:-yes}
if [ "$compiles" = yes ] && [ "$has_gpu" = no ]; then
    echo "setup_env: error: EXTRAS=$extras is for a GPU, and nvidia-smi sees none here" >&2
    exit 1
fi
torch_build=$("$venv/bin/python" -c 'import torch; print("cuda" if torch.version.cuda else "cpu")' 2>/dev/null || true)
if [ "$has_gpu" = yes ] && [ "$torch_build" = cpu ]; then
    echo "setup_env: error: $venv holds a CPU build of torch and there is a GPU; remove that folder, run again" >&2
    exit 1
fi

if [ "$compiles" = yes ] && ls "$venv"/lib/python3*/site-packages/lent_torch.pth >/dev/null 2>&1; then
    echo "setup_env: error: $venv borrows its torch, and EXTRAS=$extras needs its own; remove that folder, run again" >&2
    exit 1
fi

if [ -n "$torch_build" ]; then
    echo "[1/3] $venv exists: $("$venv/bin/python" --version)"
else
    # Interpreters that can create a virtual environment. They are run to find out: a pyenv shim may exist and not run.
    pythons=()
    for name in $candidates; do
        check='import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
        [ -z "${pip_wheel:-}" ] || check=${check/ensurepip, /} # that wheel is pip
        if "$name" -c "$check" 2>/dev/null; then pythons+=("$(command -v "$name")"); fi
    done
    if [ "${#pythons[@]}" = 0 ]; then
        echo "setup_env: error: no Python 3.10, 3.11 or 3.12 with venv and ensurepip among: $candidates" >&2
        echo "setup_env: install one (Debian, Ubuntu: apt install python3-venv), or name it: PYTHON=/path/to/python" >&2
        exit 1
    fi
    python=${pythons[0]}
    packages=""
    if [ "$compiles" = no ] && { [ "$has_gpu" = yes ] || [ -n "$wheels" ]; }; then
        lend() { # the first Python with a torch that fits, for CUDA if there is a GPU, lends it to the environment
            local name build
            for name in "${pythons[@]}"; do
                read -r packages build < <("$name" "$requirements" torch "$@" 2>/dev/null || true) || true
                if [ -n "$packages" ] && { [ "$has_gpu" = no ] || [ "$build" != cpu ]; }; then
                    python=$name
                    torch_is_for=$build
                    return
                fi
                packages=""
            done
        }
        lend
        if [ -z "$packages" ] && [ -n "$wheels" ] && [ -n "${ANY_VERSION:-}" ]; then
            lend --any_version --wheels "$wheels"
        fi
    fi
    echo "[1/3] $venv: $("$python" --version) ($python)"
    "$python" -m venv --clear ${pip_wheel:+--without-pip} "$venv"
fi
pip() { PYTHONPATH=${pip_wheel:-} "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ -n "$torch_build" ]; then
    echo "[2/3] torch is there: $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
elif [ -n "$packages" ]; then
    echo "[2/3] torch: the one in $packages ($torch_is_for)"
    site_packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    echo "import site; site.addsitedir('$packages')" >"$site_packages/lent_torch.pth"
elif [ -n "$wheels" ]; then
    echo "[2/3] torch: the one in $wheels, with the rest"
elif [ "$has_gpu" = no ] && [ "$(uname -s)" = Linux ]; then
    echo "[2/3] torch $torch_version, CPU build"
    # PyPI has no CPU build. A configured index may have one, PyTorch's own does; if neither can be reached, any build will do.
    pip install -q "torch==$torch_version+cpu" 2>/dev/null ||
        pip install "torch==$torch_version+cpu" --extra-index-url https://download.pytorch.org/whl/cpu ||
        { echo "[2/3] no CPU build found: the default one (several GB)" && pip install "torch==$torch_version"; }
else
    echo "[2/3] torch $torch_version, default build"
    pip install "torch==$torch_version"
fi

echo "[3/3] megatron_gkd[$extras] and what it needs"
isolation=()
if [ "$compiles" = yes ]; then
    # Compiled against the torch in .venv: pip's isolated build would fetch another one, and the result would not load.
    built_for=$("$venv/bin/python" -c 'import torch; print((torch.version.cuda or "no").split(".")[0])')
    nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
    [ -x "$nvcc" ] || nvcc=$(command -v nvcc || echo "$nvcc")
    found=$("$nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\..*/\1/p' || true)
    if [ "$found" != "$built_for" ]; then
        echo "setup_env: error: EXTRAS=$extras is compiled for CUDA $built_for, as torch in .venv is; $nvcc is of CUDA ${found:-?}" >&2
        echo "setup_env: install that toolkit and set CUDA_HOME, or leave gpu and flash out: torch's own kernels serve" >&2
        exit 1
    fi
    site_packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    for library in cudnn nccl "cu$built_for"; do # headers that a toolkit may lack
        CPATH=$site_packages/nvidia/$library/include${CPATH:+:$CPATH}
    done
    CUDA_HOME=$(dirname "$(dirname "$nvcc")")
    export CPATH CUDA_HOME
    pip install -q "setuptools>=77" wheel packaging ninja
    isolation=(--no-build-isolation)
fi
if [ -n "$wheels" ]; then
    read_wheels=(env PYTHONPATH="${pip_wheel:-}" "$venv/bin/python" "$requirements")
    options=(--wheels "$wheels" --extras "$extras" ${ANY_VERSION:+--any_version})
    if ! lacks=$("${read_wheels[@]}" missing "${options[@]}"); then
        echo "setup_env: error: neither here nor in $wheels, for $("$venv/bin/python" --version):" >&2
        echo "$lacks" | sed 's/^/  /' >&2
        echo "setup_env: launch/fetch_wheels.sh fetches them where there is a network" >&2
        exit 1
    fi
    "${read_wheels[@]}" wheels "${options[@]}" >"$venv/wheels.txt"
    pip install -q --no-index --no-deps --no-compile ${pip_wheel:+"$pip_wheel"} -r "$venv/wheels.txt"
    site_packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    echo "$repository" >"$site_packages/megatron_gkd.pth" # nothing is built
else
    pip install ${isolation[@]+"${isolation[@]}"} -e "$repository${extras:+[$extras]}"
fi
"$venv/bin/python" -W ignore -c 'import megatron.core, megatron_gkd, torch, transformers'
echo "setup_env: done; source $venv/bin/activate"
