#!/usr/bin/env bash
# A real SLURM of one node on this machine's loopback, as root, without systemd, cgroups or the system's own munged:
#   apt-get install -y --no-install-recommends slurm-wlm munge
#   tests/one_node_slurm.sh FOLDER       in an empty FOLDER; says what to export when jobs can be submitted
# It runs until its standard input ends or it is told to stop (Ctrl-D, Ctrl-C, kill), and takes everything down with it. So a
# cluster does not outlive the tests that wanted it, not even where they were killed.
# Partitions: low, the default, whose jobs are requeued for those of high. Two CPUs, and two GPUs of which there is only the name.
set -u
PATH=$PATH:/usr/sbin
: "${1:?an empty folder for its state}"
home=$(mkdir -p "$1" && cd "$1" && pwd) || exit 1
node=$(hostname -s)
export SLURM_CONF=$home/slurm.conf
mkdir -p "$home"/{ctld,d,bin,munge}

pids=() # of the daemons, in the order in which they are stopped
start() { # a name, and a daemon in the foreground
    local name=$1; shift
    "$@" < /dev/null > "$home/$name.log" 2>&1 &
    pids=($! "${pids[@]}")
    local -n started=${name}_pid
    started=$!
}
gone() { # a process; waits for ten seconds
    for _ in {1..100}; do kill -0 "$1" 2> /dev/null || return 0; sleep .1; done
    return 1
}
cancel() { # every job, and wait until the node has let go of it: of one that passes SIGTERM by, after KillWait
    timeout 10 scancel --quiet --user="$(id -un)" || return
    for _ in {1..150}; do [[ -n $(timeout 10 squeue --noheader) ]] || return 0; sleep .1; done
}
stop() {
    trap '' TERM INT HUP
    [[ -n ${ctld_pid-} ]] && kill -0 "$ctld_pid" 2> /dev/null && cancel
    for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null; gone "$pid" || kill -KILL "$pid"; done
}
fail() {
    printf 'the cluster did not start: %s\n' "$1" >&2
    tail -n 20 "$home"/*.log >&2
    exit 1
}
trap stop EXIT
trap 'exit 0' TERM INT HUP

# munge of its own: its key and socket are in the folder, whatever the system's does
( umask 077; head -c 128 /dev/urandom > "$home/munge/key" )
start munged munged --foreground --force --key-file="$home/munge/key" --socket="$home/munge/socket" --pid-file="$home/munge/pid" --seed-file="$home/munge/seed"
for _ in {1..100}; do munge --socket="$home/munge/socket" --no-input > /dev/null 2>&1 && break; kill -0 "$munged_pid" 2> /dev/null || fail munged; sleep .05; done

# Ports that nothing has: those of an older cluster may still be taken
read -r ctld_port d_port < <(python3 -c '
import socket
free = [socket.socket() for _ in range(2)]
for s in free: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in free))')

# What is not obvious:
#   AuthInfo        with cred_expire at its 120 s a requeued job would wait as long
#   preempt_send…   else a preempted job gets only SIGTERM, which submitit passes by, and never checkpoints
#   MinJobAge       without slurmdbd, squeue has to remember the jobs that have ended; see sacct below
#   config_overrides, and GPUs that are no GPUs: the node is the same on every machine
cat > "$SLURM_CONF" << CONF
ClusterName=lab
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$ctld_port
SlurmdPort=$d_port
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
AuthInfo=socket=$home/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
MinJobAge=86400
StateSaveLocation=$home/ctld
SlurmdSpoolDir=$home/d
SlurmctldPidFile=$home/ctld.pid
SlurmdPidFile=$home/d.pid
GresTypes=gpu
NodeName=$node NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 Gres=gpu:2
PartitionName=low Nodes=$node Default=YES PriorityTier=1 GraceTime=10 DefaultTime=60
PartitionName=high Nodes=$node PriorityTier=10 PreemptMode=OFF DefaultTime=60
CONF
printf 'Name=gpu File=%s\n' /dev/null /dev/zero > "$home/gres.conf"
# sacct asks slurmdbd, which is not there; submitit learns from it how its jobs stand
printf '%s\n' '#!/bin/sh' "echo 'JobID|State|NodeList'" "exec squeue -h -r -t all -o '%i|%T|%N'" > "$home/bin/sacct"
chmod +x "$home/bin/sacct"

start ctld slurmctld -i -D
start d slurmd -D
for i in {1..200}; do
    sinfo --noheader --partition=low --format=%t 2> /dev/null | grep -qx idle && break
    for pid in "${pids[@]}"; do kill -0 "$pid" 2> /dev/null || fail "a daemon ended"; done
    (( i < 200 )) || fail "the node is not idle"
    sleep .1
done
printf 'export SLURM_CONF=%q PATH=%q:$PATH\n' "$SLURM_CONF" "$home/bin"
while read -r; do :; done
