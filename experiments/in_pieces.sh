#!/usr/bin/env bash
# Train for at most nine minutes (or PIECE seconds): for machines with ten-minute slots.
# Running the same command again resumes the training.
#
#   experiments/in_pieces.sh RUN cifar10-nin --data-dir cifar10
#
# RUN is the run's folder. The exit status is 0 when training is complete, 75 when it is
# not, and otherwise that of `xnor-jax train`.
set -uo pipefail
run=$1
shift
[ -e "$run/recipe.json" ] && set -- "$@" --resume
timeout --signal=INT --kill-after=30 "${PIECE:-540}" xnor-jax train "$@" --output "$run"
status=$?
[ "$status" = 124 ] && exit 75
exit "$status"
