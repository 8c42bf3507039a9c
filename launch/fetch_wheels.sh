#!/usr/bin/env bash
# Download, where there is a network, what a Linux machine without one lacks: wheels in a folder.
#
#   bash launch/fetch_wheels.sh [--python 3.12] [--torch present|cpu|default] [--present FILE] [--extras test] [--wheels DIR]
#   WHEELS=wheels bash launch/setup_env.sh        there: installs from that folder, and asks no network
#
# --python   the Python of that machine (this one's by default)
# --torch    present: it has torch with what torch requires, and numpy; cpu, default: torch's CPU build, or PyPI's (several
#            GB with the CUDA libraries) is fetched too
# --present  what else it has: `python3 -m pip list --format=freeze >FILE`, made there
# --extras   of setup.py; --wheels: the folder, `wheels` by default. Files that are there already are used
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for name in ${PYTHON:-python3} python; do
    python=$(command -v "$name") && "$python" -m pip --version >/dev/null 2>&1 && break
    python=""
done
[ -n "$python" ] || { echo "fetch_wheels: error: no Python with pip among: ${PYTHON:-python3} python" >&2; exit 1; }
"$python" launch/requirements.py fetch --wheels wheels --extras test "$@"
