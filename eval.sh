#!/usr/bin/env bash
# bash eval.sh                               every best checkpoint under runs/
# bash eval.sh CHECKPOINT... [settings]      an argument that is an existing path is a checkpoint, others go to eval.py
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python="$here/.venv/bin/python"
[ -x "$python" ] || python=$(command -v python3 || command -v python) || { echo "There is no python3 here." >&2; exit 2; }

checkpoints="" settings=()
for argument in "$@"; do
    if [ -e "$argument" ] || [[ "$argument" =~ ^[a-z-]+: ]]; then  # a path, or a name such as timm:NAME
        checkpoints="$checkpoints,'${argument//\'/\\\'}'"
    elif [[ "$argument" == *=* || "$argument" == -* ]]; then
        settings+=("$argument")
    else
        echo "There is no checkpoint at $argument (a setting has the form key=value)." >&2
        exit 2
    fi
done
[ -z "$checkpoints" ] || settings=("checkpoint=[${checkpoints:1}]" ${settings[@]+"${settings[@]}"})
exec "$python" "$here/eval.py" ${settings[@]+"${settings[@]}"}
