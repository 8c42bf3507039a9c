#!/usr/bin/env bash
# The earlier name of demo/run_speech.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../demo/run_speech.sh" "$@"
