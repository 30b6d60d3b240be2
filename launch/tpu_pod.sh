#!/usr/bin/env bash
# A run on a Cloud TPU slice, by gcloud: launch/tpu_pod.sh COMMAND (--help says which).
set -euo pipefail

# What is used, each changed by a variable of the same name.
NAME="${NAME:-instar}"
ZONE="${ZONE:-europe-west4-b}"
TYPE="${TYPE:-v5p-64}"
VERSION="${VERSION:-v2-alpha-tpuv5}" # the image of the hosts: https://cloud.google.com/tpu/docs/runtimes
RESTARTS="${RESTARTS:-20}"
export INSTAR_EXTRAS="${INSTAR_EXTRAS:-tpu,cloud}"

usage() {
  cat <<TEXT
usage: launch/tpu_pod.sh COMMAND

  create          asks for the slice (more words go to gcloud: --spot)
  setup           copies this repository to all hosts and makes the environment there
  run WORD ...    runs \`instar WORD ...\` on all hosts, in the background, and shows the log
                  (run pretrain --config CONFIG --workdir gs://BUCKET/DIR)
  log             shows the log of the first host
  stop            asks all processes to save and stop
  delete          gives the slice back

NAME=$NAME ZONE=$ZONE TYPE=$TYPE VERSION=$VERSION RESTARTS=$RESTARTS INSTAR_EXTRAS=$INSTAR_EXTRAS
(each is changed by a variable of that name)
TEXT
}

tpu() {
  gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

# Runs a line of shell on all hosts, or on host $2.
on_hosts() {
  tpu ssh --worker="${2:-all}" --command="$1"
}

setup() {
  local archive
  archive="$(mktemp -d)/instar.tar.gz"
  git archive --format=tar.gz --output="$archive" HEAD
  tpu scp --worker=all "$archive" "$NAME:instar.tar.gz"
  on_hosts "mkdir -p instar && tar -xzf instar.tar.gz -C instar && \
cd instar && INSTAR_EXTRAS=$INSTAR_EXTRAS ./launch/local.sh setup"
}

# Each host starts its process again by itself where another is gone: in the end all wait for one
# another. jax finds them by the slice's own metadata.
run() {
  local words
  words="$(printf '%q ' "$@")"
  on_hosts "cd instar && nohup ./launch/local.sh --restarts $RESTARTS instar $words \
>run.log 2>&1 </dev/null & sleep 1"
  log
}

log() {
  on_hosts "tail -n 100 -F instar/run.log" 0
}

case "${1:-}" in
create) tpu create --accelerator-type="$TYPE" --version="$VERSION" "${@:2}" ;;
setup) setup ;;
run) run "${@:2}" ;;
log) log ;;
# The launcher hands the signal on.
stop) on_hosts "pkill -TERM -f launch/processes.py" ;;
delete) tpu delete --quiet ;;
-h | --help | help) usage ;;
*)
  usage >&2
  exit 2
  ;;
esac
