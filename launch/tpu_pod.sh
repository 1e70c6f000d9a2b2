#!/usr/bin/env bash
# Trains on a Cloud TPU slice or pod: asks for it (a queued resource), copies the code, installs, runs on all workers;
# all of it again after a preemption; and deletes the resource at the end.
#   bash launch/tpu_pod.sh [options] NAME ACCELERATOR EXPERIMENT WORKDIR [section.field=value ...]
#   bash launch/tpu_pod.sh --spot --zone=us-east5-b eso v6e-256 experiments/paper.py:owt/esolm_1 gs://my-bucket/esolm_1
# EXPERIMENT: FILE.py, FILE.py:RUN, a config.json, or quickstart, as `eso-jax train` takes it.
# --spot: preemptible capacity; --keep: do not delete at the end; --dry-run: print the commands, run none;
# --project=P, --zone=Z: else gcloud's own (gcloud config set project P; gcloud config set compute/zone Z).
# Hardware: ACCELERATOR, such as v5litepod-8, v5p-1024, v6e-256; RUNTIME=VERSION for a type unknown here.
# Time: the queue's and the experiment's. Before: gcloud auth login, and ssh-add ~/.ssh/google_compute_engine, without
# which gcloud reaches one worker only.
# WORKDIR: gs://BUCKET/PATH, which the workers see as /gcs/BUCKET/PATH (as they do the rest of the bucket: data.source),
# or a path that all workers share. A bucket with a hierarchical namespace renames a checkpoint's directory at once.
# logs/NAME/: train.log, the output of all workers, appended to; code.tar.gz, git's files as they were at the start.
# Crashes: launch/restart.sh (PAUSE, CRASHES). Ctrl-C, SIGTERM: the trainers save and end, the resource stays, and the
# same command goes on.

# shellcheck disable=SC2329  # restart calls attempt
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/restart.sh
source launch/restart.sh
script=tpu_pod.sh keep='' spot='' where=(--quiet)
option() {
  case $1 in
    --keep) keep=1 ;;
    --spot) spot=--spot ;;
    --project=?* | --zone=?*) where+=("$1") ;;
    *) return 1 ;;
  esac
}
# shellcheck source=launch/options.sh
source launch/options.sh
[ $# -ge 4 ] || fail "$# arguments; give NAME, ACCELERATOR, EXPERIMENT and WORKDIR, or --help"
name=$1 accelerator=$2 experiment=$3 workdir=$4
shift 4
check_overrides NAME "$@"
case $accelerator in
  v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime= ;;
esac
runtime=${RUNTIME:-$runtime}
[ -n "$runtime" ] || fail "ACCELERATOR = '$accelerator': unknown; name one such as v6e-256, or set RUNTIME=VERSION"
file=$(experiment_file "$experiment")
git ls-files --error-unmatch "$file" >/dev/null 2>&1 ||
  fail "EXPERIMENT = '$experiment': not among git's files, which are what is copied; git add it"
bucket=
if [[ $workdir == gs://* ]]; then
  workdir=/gcs/${workdir#gs://}
  bucket=${workdir#/gcs/} bucket=${bucket%%/*}
fi
[[ $workdir == /* ]] ||
  fail "WORKDIR = '$workdir': would be deleted with the machine; give gs://BUCKET/PATH, or an absolute path all workers share"
logs=logs/$name

queued() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
delete() { queued delete --force; }
state() { queued describe --format='value(state.state)' 2>/dev/null || echo NONE; }
on_all() {  # the keep-alive also ends the connection to a worker that is no more
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --ssh-flag=-oServerAliveInterval=60 \
    --command="$(printf '%q' "$1"; printf ' %q' "${@:2}")"
}
worker() { on_all bash eso-jax/launch/tpu_worker.sh "$@"; }
create() {
  queued create --node-id="$name" --accelerator-type="$accelerator" --runtime-version="$runtime" ${spot:+"$spot"}
}
ready() {
  local now
  while now=$(state) && [ "$now" != ACTIVE ]; do
    say "$name: $now"
    case $now in
      NONE) create ;;
      SUSPENDED) say "$name was preempted; asking for another"; delete ;;
      FAILED) fail "$name FAILED: $(queued describe --format='value(state.failedData.error.message)')" ;;
    esac
    sleep "${PAUSE:-30}"
  done
}
copy_and_install() {
  run gcloud compute tpus tpu-vm scp "$logs/code.tar.gz" "$name:eso-jax.tar.gz" "${where[@]}" --worker=all
  on_all tar --extract --gzip --file=eso-jax.tar.gz --one-top-level=eso-jax
  worker install ${bucket:+"$bucket"}
}
train() { worker run train "$experiment" --workdir "$workdir" --multi-host "$@"; }

attempt() {
  set -e
  trap 'exit 75' TERM INT
  ready
  copy_and_install
  trap 'signals=$((signals + 1)); worker stop || true' TERM INT
  say "running; tail -f $logs/train.log"
  train "$@" > >(tee -a "$logs/train.log") 2>&1 &
  await "$!"
  case $code in 0 | 2 | 130) exit "$code" ;; esac
  [ "$(state)" = ACTIVE ] || exit 75
  exit "$code"
}

pack() { git ls-files -z | tar --create --gzip --file="$logs/code.tar.gz" --null --files-from=-; }

if [ -n "$dry_run" ]; then
  echo "git ls-files -z | tar --create --gzip --file=$(printf %q "$logs")/code.tar.gz --null --files-from=-"
  create
  queued describe --format='value(state.state)'
  copy_and_install
  train "$@"
  [ -n "$keep" ] || delete
  exit
fi

command -v gcloud >/dev/null || fail "no gcloud on PATH; install the Google Cloud CLI"
ssh-add -l >/dev/null || fail "no key in an ssh agent; run: ssh-add ~/.ssh/google_compute_engine"
mkdir -p "$logs"
pack
set +e  # not `restart ... || code=$?`: that would switch off the set -e of attempt
restart attempt "$@"
code=$?
set -e
if [ -n "$keep" ] || [ "$signals" != 0 ]; then
  say "$name is still there. To delete it: gcloud compute tpus queued-resources delete $name ${where[*]} --force"
else
  delete
fi
exit "$code"
