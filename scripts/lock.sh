#!/usr/bin/env bash
# Write requirements.lock: the exact versions that a clean installation of every extra resolves to today.
# torch is pinned without a build tag, so that a machine with a GPU gets its CUDA build from the same line.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check"
$pip install --quiet "torch==${TORCH_VERSION:-2.13.0}"
$pip install --quiet hatchling editables -e '.[dev]'
{
  echo "# Made by scripts/lock.sh; change pyproject.toml and run it again."
  $pip freeze --exclude-editable | grep -viE '^(pip|setuptools|wheel)==' | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'
} > requirements.lock
