#!/usr/bin/env bash
# launch/slurm.sbatch on a real Slurm of this one machine:
#
#   tests/slurm_local.sh PYTHON      (one that has Instar installed)
#
# needs the packages slurmd, slurmctld, slurm-client and munge, and root. It starts Slurm in a
# folder of its own, runs two tasks of a tiny run, of which one is killed at its tenth step, and sees
# that the job is queued again, goes on and ends. Exit code 77: Slurm cannot be started here.
set -euo pipefail

# Absolute, for jobs run in folders of their own; not resolved, or it would leave its environment.
python="$(command -v "${1:?usage: tests/slurm_local.sh PYTHON}")"
case "$python" in /*) ;; *) python="$PWD/$python" ;; esac
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PATH="$PATH:/usr/sbin:/sbin"

skip() {
  printf 'slurm_local.sh: skipped: %s\n' "$1" >&2
  exit 77
}

for program in munged slurmctld slurmd sbatch; do
  command -v "$program" >/dev/null || skip "$program is not installed"
done
((EUID == 0)) || skip "only root can start slurmd"

folder="$(mktemp -d /tmp/instar-slurm.XXXXXX)"
started=()
finish() {
  # What was started here and nothing else, the last first.
  for ((i = ${#started[@]} - 1; i >= 0; i--)); do kill "${started[i]}" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$folder"
}
trap finish EXIT

# ----------------------------------------------------------------------------------------------
# Slurm, of one node with two processors (more than there are, where there is one)
# ----------------------------------------------------------------------------------------------

chmod 755 "$folder"
mkdir -p "$folder"/{munge,state,spool,work/launch}
head -c 128 /dev/urandom >"$folder/munge/key"
chmod 700 "$folder/munge" && chmod 400 "$folder/munge/key"
munged --foreground --key-file="$folder/munge/key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" \
  --force &
started+=("$!")

host="$(hostname -s)"
free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}
cat >"$folder/slurm.conf" <<TEXT
ClusterName=instar
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
TEXT
export SLURM_CONF="$folder/slurm.conf"
slurmctld -D >"$folder/slurmctld.log" 2>&1 &
started+=("$!")
slurmd -D -N "$host" >"$folder/slurmd.log" 2>&1 &
started+=("$!")

for ((second = 0; ; second++)); do
  if [[ "$(sinfo --noheader --format=%t 2>/dev/null)" == idle ]]; then break; fi
  if ((second == 60)); then
    tail -n 20 "$folder"/slurm*.log >&2
    skip "Slurm does not come up"
  fi
  sleep 1
done

# ----------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------

export PYTHONPATH="$root/src:$root/tests/stages:$root/tests" JAX_PLATFORMS=cpu
export XLA_FLAGS=--xla_force_host_platform_device_count=1
cd "$folder/work"
cp "$root/launch/slurm.sbatch" launch/
# In the place of launch/local.sh, whose environment is there already: the second task dies in its
# tenth step, unless the job was started before. Step 4 is surely saved then: saving step 8 waits
# for it.
cat >launch/local.sh <<TEXT
#!/usr/bin/env bash
case "\$1" in
setup) ;;
instar)
  if [[ "\$SLURM_PROCID \${SLURM_RESTART_COUNT:-0}" == "1 0" ]]; then
    exec "$python" "$root/tests/stages/dying.py" in_a_step 10 "\${@:2}"
  fi
  exec "$python" -m "\$@"
  ;;
esac
TEXT
chmod +x launch/local.sh
"$python" -c 'import pathlib, runs
folder = pathlib.Path()
runs.write_run_config(runs.prepare_tiny_data(folder.resolve()))'

job="$(sbatch --parsable --nodes=1 --ntasks-per-node=2 --cpus-per-task=1 --gpus-per-node=0 \
  --output=job.log launch/slurm.sbatch pretrain --config run.py --workdir run \
  --config.mesh.fsdp=2 --config.evaluation.every=100)"
for ((second = 0; second < 1200; second += 2)); do
  state="$(scontrol show job "$job" | sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p')"
  case "$state" in PENDING | CONFIGURING | RUNNING | COMPLETING | REQUEUED) ;; *) break ;; esac
  sleep 2
done
cat job.log
printf 'job %s: %s\n' "$job" "$state"
[[ "$state" == COMPLETED ]]
grep -q '2 processes (Slurm)' job.log
grep -q 'the job is queued again' job.log
grep -q 'resumed from the checkpoint of step [48]$' job.log
[[ "$(grep -c '"loss"' run/metrics.jsonl)" == 12 ]]
printf 'slurm_local.sh: passed\n'
