#!/usr/bin/env bash
# Holds launch/ to the published schemas of JobSet and SkyPilot, in an environment of its own: these
# packages hold others back that Instar is tested with.
#
#   tests/launch_schemas.sh PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"$1" -m venv "$folder"
"$folder/bin/python" -m pip install --disable-pip-version-check -qq \
  "kubeflow-trainer-api>=2.3" "pytest>=8.3" "skypilot>=0.14"
"$folder/bin/python" -m pytest --noconftest -p no:cacheprovider tests/test_launch_schemas.py
