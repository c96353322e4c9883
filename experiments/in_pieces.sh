#!/usr/bin/env bash
# Train for at most nine minutes, then stop where --resume goes on: for a machine that is
# lent for ten minutes at a time. The same command again goes on.
#
#   experiments/in_pieces.sh RUN cifar10-nin --data-dir cifar10
#
# RUN is the run's folder. Exits with 0 when the training is done, with 75 when more of it
# is left, otherwise as `xnor-jax train` does.
set -uo pipefail
run=$1
shift
[ -e "$run/recipe.json" ] && set -- "$@" --resume
timeout --signal=INT --kill-after=30 "${PIECE:-540}" xnor-jax train "$@" --output "$run"
status=$?
[ "$status" = 124 ] && exit 75
exit "$status"
