#!/usr/bin/env bash
# A SLURM cluster of two nodes on this one machine, without systemd; all it writes is in FOLDER.
#
#     tests/slurm_cluster.sh start FOLDER          # again does no harm
#     export SLURM_CONF=FOLDER/slurm.conf; sinfo   # two nodes, idle
#     tests/slurm_cluster.sh stop FOLDER
#
# Needs root, and Debian's slurm-wlm and munge: where apt is there, they are installed. Exit code 3: they cannot be had here.
set -euo pipefail
command=${1:?start or stop} folder=${2:?a folder}
export SLURM_CONF=$folder/slurm.conf
PATH=$PATH:/usr/sbin

alive() { [ -s "$folder/$1.pid" ] && kill -0 "$(cat "$folder/$1.pid")" 2>/dev/null; }

if [ "$command" = stop ]; then
    scancel --full --user=root 2>/dev/null || true
    for name in slurmctld node1 node2 munged; do
        if alive $name; then kill "$(cat "$folder/$name.pid")"; fi
        for _ in $(seq 100); do alive $name && sleep 0.1 || break; done
        if alive $name; then kill -9 "$(cat "$folder/$name.pid")"; fi
    done
    exit
fi

if [ "$(id -u)" != 0 ]; then echo "slurmd needs root" >&2 && exit 3; fi
if ! hash slurmctld slurmd munged 2>/dev/null; then
    if ! hash apt-get 2>/dev/null; then echo "there is no apt-get to install slurm-wlm and munge with" >&2 && exit 3; fi
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends slurm-wlm munge; } >&2 || exit 3
fi
mkdir -p "$folder"
cd "$folder"
if [ ! -s slurm.conf ]; then
    mapfile -t ports < <(python3 -c 'import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(one.getsockname()[1] for one in held), sep="\n")')
    cat >slurm.conf <<END
ClusterName=two_nodes
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
# A job that is queued again starts after this time.
AuthInfo=socket=$folder/munge.socket,cred_expire=10
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmdSpoolDir=$folder/%n
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
# More than the machine has: a test asks for less.
SlurmdParameters=config_overrides
NodeName=node1 NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=4 RealMemory=8000
NodeName=node2 NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=4 RealMemory=8000
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=60 DefMemPerCPU=1000
END
    (umask 077 && head -c 128 /dev/urandom >munge.key)
    mkdir -p state node1 node2
fi
alive munged || munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
alive slurmctld || slurmctld
for node in node1 node2; do alive $node || slurmd -N $node; done
for _ in $(seq 120); do
    if [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then exit; fi
    sleep 0.5
done
sinfo >&2
tail -n 5 ./*.log >&2
exit 1
