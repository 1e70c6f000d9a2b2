# shellcheck shell=bash
# Sourced by gpu.sh, local.sh, slurm.sbatch and tpu_pod.sh, in the repository's root: takes the options from the front of
# the script's arguments, and has what these scripts share. $script is the script's name in launch/; `option OPTION`, where
# it is defined, takes an option of the script's own or returns 1.
script=${script:?} dry_run=
say() { echo "$script: $*" >&2 || true; }
fail() { say "error: $*"; exit 2; }
run() { if [ -z "$dry_run" ]; then "$@"; else printf '%q' "$1"; printf ' %q' "${@:2}"; echo; fi; }

check_overrides() {  # WHAT OVERRIDE ...: options come before WHAT
  local override
  for override in "${@:2}"; do
    [[ $override == [!-]*=* ]] || fail "'$override': not section.field=value; options come before $1"
  done
}

experiment_file() {  # EXPERIMENT, as eso-jax train takes it; prints its file, which must be there
  local file=$1 hint=
  if [ "$1" = quickstart ]; then
    file=eso_jax/$1.py  # the package ships it
  elif [ ! -f "$1" ] && [[ $1 == *.py:* ]]; then
    file=${1%.py:*}.py
  fi
  if [[ $file =~ ^(.*/)?(lm1b|owt)/([^/]*)\.py$ ]]; then
    hint="; the paper's runs are in one file now: ${BASH_REMATCH[1]}paper.py:${BASH_REMATCH[2]}/${BASH_REMATCH[3]}"
  fi
  [ -f "$file" ] || fail "EXPERIMENT = '$1': no such file$hint"
  echo "$file"
}

declare -F option >/dev/null || option() { return 1; }
while [[ ${1:-} == -* ]]; do
  case $1 in
    --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "launch/$script"; exit ;;
    --dry-run) dry_run=1 ;;
    *) option "$1" || fail "no option $1; see --help" ;;
  esac
  shift
done
