#!/usr/bin/env bash
# Set up, run the distributed smoke tests on the supported megatron-core that is not installed, then all tests.
#   bash tests/run.sh [pytest arguments for the second part, such as -k lora]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_env.sh
python=$PWD/.venv/bin/python
export OMP_NUM_THREADS=1

installed=$("$python" -c 'from importlib.metadata import version; print(version("megatron-core"))')
for version in 0.16.1 0.19.2; do
    [ "$version" = "$installed" ] && continue
    folder=$PWD/.mcore/$version
    if [ ! -d "$folder" ]; then
        echo "megatron-core $version -> $folder"
        rm -rf "$folder.part"
        # Its metadata asks for a newer Python than it needs.
        "$python" -m pip --disable-pip-version-check install -q --no-deps --ignore-requires-python \
            --target "$folder.part" "megatron-core==$version"
        mv "$folder.part" "$folder"
    fi
    echo "smoke tests on megatron-core $version"
    PYTHONPATH=$folder "$python" -m pytest -q -m smoke
done

echo "all tests on megatron-core $installed"
"$python" -m pytest -q "$@"
