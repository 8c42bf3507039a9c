#!/usr/bin/env bash
# What CI runs: set-up, format, lint, types, the distributed smoke tests on the other supported megatron-core, and the
# tests. The first part that fails ends the script, which names it.
#   bash tests/run.sh [pytest arguments for the last part, such as -k lora]
#   bash tests/run.sh -m ''    also the tests marked `extended`: more layouts of what the others test
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

part=""
begin() {
    part=$1
    echo "=== $part"
}
trap 'status=$?; [ "$status" -eq 0 ] || echo "tests/run.sh: failed: $part" >&2' EXIT

begin "set-up (launch/environment.sh)"
extras=test,lint,wandb,swanlab
source launch/environment.sh
export OMP_NUM_THREADS=1
# A test has up to 8 ranks: some run while others wait. A file's tests share fixtures and stay in one process.
pytest=("$python" -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder)

begin "format (ruff format --check .)"
"$python" -m ruff format --check .

begin "lint (ruff check .)"
"$python" -m ruff check .

begin "types (mypy)"
"$python" -m mypy

installed=$("$python" -c 'from importlib.metadata import version; print(version("megatron-core"))')
for version in 0.16.1 0.19.2; do
    [ "$version" = "$installed" ] && continue
    begin "smoke tests on megatron-core $version"
    folder=$PWD/.mcore/$version
    if [ ! -d "$folder" ]; then
        echo "megatron-core $version -> $folder"
        rm -rf "$folder.part"
        # Its metadata asks for a newer Python than it needs.
        if [ -n "${WHEELS:-}" ] && ! ls "$WHEELS/megatron_core-$version"-*.whl >/dev/null 2>&1; then
            echo "left out: $WHEELS has no wheel of it"
            continue
        fi
        "$python" -m pip --disable-pip-version-check install -q --no-deps --ignore-requires-python \
            ${WHEELS:+--no-index --find-links "$WHEELS"} --target "$folder.part" "megatron-core==$version"
        mv "$folder.part" "$folder"
    fi
    PYTHONPATH=$PWD:$folder "${pytest[@]}" -m smoke
done

begin "tests on megatron-core $installed"
"${pytest[@]}" -m "not extended" "$@"
