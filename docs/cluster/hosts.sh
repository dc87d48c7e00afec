#!/usr/bin/env bash
# The same training on every machine of a list, by ssh: docs/cluster/hosts.sh HOSTFILE STAGE [--cell CELL]
# HOSTFILE has one machine a line: its name and its number of processes. The first one leads.
# All machines must see this clone under the same path (see docs/cluster.md).
set -uo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 HOSTFILE STAGE [--cell CELL]" >&2
    exit 64
fi
mapfile -t lines < <(grep -Ev '^[[:space:]]*(#|$)' "$1")
shift
read -r first _ <<< "${lines[0]}"

agents=()
trap 'kill "${agents[@]}" 2> /dev/null' INT TERM
for rank in "${!lines[@]}"; do
    read -r host processes <<< "${lines[$rank]}"
    torchrun="--nnodes ${#lines[@]} --node-rank $rank --nproc-per-node $processes"
    torchrun+=" --master-addr $first --master-port ${PORT:-29500}"
    command=$(printf '%q ' env TRUNKLINE_TORCHRUN="$torchrun" "${PYTHON:-$PWD/.venv/bin/python}" -m flows.launch "$@")
    ${SSH:-ssh -tt} "$host" "cd $(printf %q "$PWD") && exec $command" < /dev/null &
    agents+=($!)
done

code=0
for agent in "${agents[@]}"; do
    wait "$agent"
    status=$?
    # one that was interrupted is rather a consequence of another's mistake
    if [ $status -ne 0 ] && { [ $code -eq 0 ] || [ $code -eq 75 ]; }; then code=$status; fi
done
exit $code
