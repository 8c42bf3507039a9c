# Sourced by the scripts that run something here, from the repository's root: `python` becomes an interpreter that has what
# setup.py asks for, with the extras in `extras`. The first that is complete is used as it is:
#
#   1. $PYTHON    2. .venv    3. python3 of PATH: an active environment, a container
#
# Where none is, launch/setup_env.sh makes or completes .venv (of $PYTHON, if that is set). The package is imported from
# this folder.

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=""
for name in ${PYTHON:-} .venv/bin/python python3; do
    if "$name" launch/requirements.py missing --extras "${extras:-}" ${ANY_VERSION:+--any_version} >/dev/null 2>&1; then
        python=$(command -v "$name")
        break
    fi
done
if [ -z "$python" ]; then
    [ -z "${PYTHON:-}" ] || echo "environment: $PYTHON lacks something: $PYTHON launch/requirements.py missing" >&2
    EXTRAS=${EXTRAS-${extras-test,lint}} bash launch/setup_env.sh || return 1
    python=.venv/bin/python
fi
case $python in /*) ;; *) python=$PWD/$python ;; esac
echo "environment: $python ($("$python" --version))"
