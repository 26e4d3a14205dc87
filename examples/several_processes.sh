#!/usr/bin/env bash
# One job by several processes, here all on this machine:
#
#     examples/several_processes.sh 2 jobs.jsonl out --model sd15
#
# On a cluster every machine runs the same command on files that all of them see, once:
#
#     srun --ntasks-per-node=1 sdjax batch jobs.jsonl -o out --model sd15 --distributed
#     sdjax batch jobs.jsonl -o out --model sd15 --coordinator HOST:PORT --num-processes N --process-id I
#
# Each process uses the GPUs or TPUs of its own machine. Whatever is killed, the same command again makes what is missing.
set -euo pipefail
processes=$1 jobs=$2 out=$3
shift 3
port=$(python -c 'import socket; free = socket.socket(); free.bind(("127.0.0.1", 0)); print(free.getsockname()[1])')

started=()
trap 'kill "${started[@]}" 2> /dev/null || true' EXIT
for ((i = 0; i < processes; i++)); do
    sdjax batch "$jobs" -o "$out" "$@" \
        --coordinator "127.0.0.1:$port" --num-processes "$processes" --process-id "$i" &
    started+=($!)
done
status=0
for process in "${started[@]}"; do
    wait "$process" || status=$?
done
exit "$status"
