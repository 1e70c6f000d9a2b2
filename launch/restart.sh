#!/usr/bin/env bash
# Runs a command again until it is done; gpu.sh, slurm.sbatch and tpu_pod.sh put it around the trainer.
#   bash launch/restart.sh COMMAND [ARGUMENT ...]
# By the exit codes of `eso-jax train`: 0 (finished), 2 (a mistake, or a stop on purpose) and 130 (Ctrl-C) are the end;
# FINAL="0 2 130" names them. 75 means "run the same command again". Any other is a crash: after CRASHES (5) restarts
# from crashes it gives up, counting anew when a run lasted an hour. PAUSE (30) is the seconds between two runs.
# SIGTERM and Ctrl-C go on to the command; it ends as it likes, and its exit code is the script's.
set -euo pipefail
signals=0 child='' pending=''
trap '' PIPE  # the log may be lost (its pipe, its disk); the run goes on

await() {  # PID; its exit code is then in $code, however many signals came in between
  local before
  while true; do
    before=$signals code=0
    wait "$1" || code=$?
    [ "$signals" != "$before" ] || return 0
  done
}

pass_on() {
  signals=$((signals + 1))
  kill -s "$1" "$child" 2>/dev/null || pending=$1
}

finish() {  # COMMAND ...; passes signals on to it, and leaves its exit code in $code
  "$@" </dev/null &
  child=$!
  [ -z "$pending" ] || kill -s "$pending" "$child" || true  # it came while there was no child
  await "$child"
  child=
}

restart() {
  local started ended crashes=0
  set -m  # a process group for the command: without one it would be deaf to the SIGINT passed on
  trap 'pass_on TERM' TERM
  trap 'pass_on INT' INT
  while true; do
    started=$SECONDS
    finish "$@"
    ended=$code
    case " ${FINAL:-0 2 130} " in *" $ended "*) break ;; esac
    [ "$signals" = 0 ] || break
    if [ "$ended" != 75 ]; then
      if [ $((SECONDS - started)) -ge 3600 ]; then crashes=0; fi
      crashes=$((crashes + 1))
      if [ "$crashes" -gt "${CRASHES:-5}" ]; then
        echo "restart.sh: error: exit code $ended, crash $crashes of at most ${CRASHES:-5}; giving up" >&2 || true
        break
      fi
    fi
    echo "restart.sh: exit code $ended; starting again in ${PAUSE:-30} s" >&2 || true
    finish sleep "${PAUSE:-30}"
    [ "$signals" = 0 ] || break
  done
  trap - TERM INT
  set +m
  return "$ended"
}

[ "${BASH_SOURCE[0]}" = "$0" ] || return 0  # sourced
case ${1:-} in
  --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit ;;
  -* | "") echo "restart.sh: error: COMMAND = '${1:-}'; give a command, or --help" >&2; exit 2 ;;
esac
restart "$@"
