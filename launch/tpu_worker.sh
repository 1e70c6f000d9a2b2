#!/usr/bin/env bash
# What one worker of a TPU pod does; tpu_pod.sh calls it on all of them, in the copy of the code there.
#   bash launch/tpu_worker.sh install [BUCKET]     installs into .venv, and mounts gs://BUCKET as /gcs/BUCKET
#   bash launch/tpu_worker.sh run ARGUMENT ...     eso-jax ARGUMENT ...; stops one that a lost connection left behind
#   bash launch/tpu_worker.sh stop                 SIGTERM to what runs: it saves and ends
set -euo pipefail
cd "$(dirname "$0")/.."

install() {
  if [ ! -x .venv/bin/python ]; then  # the Python of the TPU images is older than 3.11
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 .venv
  fi
  bash launch/install.sh tpu
  [ -z "${1:-}" ] || mountpoint --quiet "/gcs/$1" || mount_bucket "$1"
}

mount_bucket() {
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
    curl --fail --silent --show-error "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release --codename --short) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -o DPkg::Lock::Timeout=600 update --quiet
    sudo apt-get -o DPkg::Lock::Timeout=600 install --yes --quiet gcsfuse
  fi
  sudo mkdir -p "/gcs/$1"
  sudo chown "$(id -un)" "/gcs/$1"
  # No cache of what is there: a host must see at once what another one has written.
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$1" "/gcs/$1"
}

# trainer.pid holds the process id of the trainer, and is locked as long as that lives.
run() {
  exec 9>>trainer.pid
  if ! flock --nonblock 9; then
    kill -s TERM "$(cat trainer.pid)" || true
    flock --timeout 600 --conflict-exit-code 75 9
  fi
  echo $$ >trainer.pid
  exec .venv/bin/eso-jax "$@" > >(exec 9>&- sed --unbuffered "s/^/${HOSTNAME:-}: /") 2>&1
}

stop() { flock --nonblock trainer.pid true || kill -s TERM "$(cat trainer.pid)"; }

case ${1:-} in
  --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' launch/tpu_worker.sh ;;
  install | run | stop) "$@" ;;
  *) echo "tpu_worker.sh: error: '${1:-}'; give install, run, stop or --help" >&2; exit 2 ;;
esac
