#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a clone to a transcript: set up, prepare a corpus, train, score the dev split, transcribe three files.
#
#   bash run.sh                                   the demo corpus, one process for each NUMA node
#   RANKS=2 bash run.sh --epochs 20               two ranks on this machine; words go to train.py and win
#   HOSTS=my-hosts bash run.sh                    on the machines listed there, with mpirun (see hosts)
#   CORPUS=mini-librispeech bash run.sh           or librispeech-100, librispeech-960, downloaded to $DATA
#   DRY_RUN=1 bash run.sh                         prints what it would launch and why, writes nothing
#   bash run.sh test [--slow] [words for pytest]  the tests; --slow adds the long ones
#
# Writes .venv, the corpus in $DATA and the run in $OUT; relative paths start at this folder.
# A second call continues the run in $OUT. The first step that fails gives the exit status.
# Other hosts need this folder, with its .venv, $DATA and $OUT at the same paths; run it on the first of them.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- knobs of the machine; everything about the model and its training is a word for train.py ----
RANKS=${RANKS:-}                 # processes on each host; default: as hosts says, or one for each NUMA node
HOSTS=${HOSTS:-hosts}            # file of the machines to train on
LAUNCHER=${LAUNCHER:-auto}       # auto, mpirun (Intel MPI, Open MPI, MPICH), torchrun, ipex
BACKEND=${BACKEND:-auto}         # of torch.distributed: auto, ccl, gloo, mpi
SSH=${SSH:-ssh}                  # how mpirun reaches other hosts; a wrapper may add port and key
VENV=${VENV:-.venv}              # Python environment,
REQUIREMENTS=${REQUIREMENTS:-requirements.txt}  # made from this file
CORPUS=${CORPUS:-demo}           # demo is synthesised, the others are downloaded unless $DATA has them
DATA=${DATA:-data/$CORPUS}       # large corpora often belong on another disk
OUT=${OUT:-out/$CORPUS}          # checkpoints and logs of this run
CGROUPS=${CGROUPS:-/sys/fs/cgroup}  # where control groups are mounted
DRY_RUN=${DRY_RUN:-0}            # 1: decide and print only
PYTHON=$VENV/bin/python

# ---- functions ----
die() {
  printf 'run.sh: %s\n' "$1" >&2
  exit 2
}

# last_value FLAG DEFAULT WORD...: what argparse takes for FLAG, so that later steps agree with train.py.
last_value() {
  local flag=$1 value=$2
  shift 2
  while (($#)); do
    case $1 in
      "$flag") value=${2-} ;;
      "$flag"=*) value=${1#*=} ;;
    esac
    shift
  done
  printf '%s\n' "$value"
}

# physical_cores CPUS: one line "node cpu" for each core behind a list such as 0-3,8, NUMA node by NUMA node.
# The hyper-threads of a core share its matrix unit: the first stands for all.
physical_cores() {
  lscpu -p=CPU,CORE,SOCKET,NODE | awk -F, -v cpus="$1" '
    BEGIN {
      count = split(cpus, ranges, ",")
      for (i = 1; i <= count; i++) {
        last = split(ranges[i], ends, "-")
        for (cpu = ends[1] + 0; cpu <= ends[last] + 0; cpu++) allowed[cpu]
      }
    }
    !/^#/ && ($1 in allowed) && !seen[$2, $3]++ { print $4 + 0, $1 }' | sort -n -k1,1 -k2,2
}

# mask CPU...: the set of CPUs as a hexadecimal number, by digits since it outgrows 64 bits.
mask() {
  printf '%s\n' "$@" | awk '
    { digit[place = int($1 / 4)] += 2 ^ ($1 % 4); if (place > top) top = place }
    END { printf "0x"; for (place = top + 0; place >= 0; place--) printf "%x", digit[place] }'
}

# cpu_quota: how many CPUs' time the control group and those around it (version 2) grant, rounded up; nothing without
# a limit.
cpu_quota() {
  local group
  group=$(sed -n 's/^0:://p' /proc/self/cgroup)
  while true; do
    awk '$1 != "max" { print int(($1 + $2 - 1) / $2) }' "$CGROUPS$group/cpu.max" 2>/dev/null || true
    [[ $group == */* ]] || break
    group=${group%/*}
  done | sort -n | awk 'NR == 1'
}

# read_hosts: $HOSTS into the array hosts; slots, if given, into RANKS.
read_hosts() {
  local line name slots rest number=0 file_slots=unread
  [[ -r $HOSTS ]] || die "HOSTS=$HOSTS cannot be read"
  while IFS= read -r line || [[ $line ]]; do
    number=$((number + 1))
    read -r name slots rest <<<"${line%%#*}"
    if [[ -z $name ]]; then continue; fi
    [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die "$HOSTS:$number: '$name' is no host name"
    [[ "$slots $rest" =~ ^(slots=[1-9][0-9]*)?" "$ ]] || die "$HOSTS:$number: '$slots${rest:+ $rest}', expected slots=N"
    [[ " ${hosts[*]} " != *" $name "* ]] || die "$HOSTS:$number: $name stands twice"
    [[ $file_slots == unread || $file_slots == "$slots" ]] ||
      die "$HOSTS:$number: '$slots' after '$file_slots'; every host runs the same number of ranks"
    hosts+=("$name")
    file_slots=$slots
  done <"$HOSTS"
  ((${#hosts[@]})) || die "$HOSTS names no host"
  if [[ $file_slots == slots=* ]]; then
    RANKS=${RANKS:-${file_slots#slots=}}
    [[ $RANKS == "${file_slots#slots=}" ]] || die "RANKS=$RANKS, but $HOSTS says $file_slots"
  fi
}

# check_hosts: names the hosts that cannot be used, all within 30 s; mpirun alone may take minutes.
check_hosts() {
  local host python look what failed=""
  local -A check
  python=$(realpath -ms "$PYTHON")
  what=$python
  look="test -x $(printf %q "$python")"
  if [[ -d $DATA ]]; then # what is prepared now is on a disk that all share, or they will say so
    what+=" and $DATA"
    look+=" && test -d $(printf %q "$(realpath -ms "$DATA")")"
  fi
  for host in "${hosts[@]}"; do
    timeout 25 "$SSH" -o BatchMode=yes -o ConnectTimeout=20 "$host" "$look" </dev/null &
    check[$host]=$!
  done
  for host in "${hosts[@]}"; do
    wait "${check[$host]}" || failed+=" $host (status $?)"
    if [[ $signal ]]; then
      kill "${check[@]}" 2>/dev/null || true
      exit $((128 + signal))
    fi
  done
  [[ -z $failed ]] || die "$HOSTS: no $what reached by $SSH on$failed; 1: not there, 124: no answer, 255: no login"
}

# mpi_kind: which mpirun the path leads to; they differ in almost every flag.
mpi_kind() {
  case $(mpirun --version 2>&1) in
    *"Intel(R) MPI"*) printf 'Intel MPI' ;;
    *"Open MPI"* | *OpenRTE*) printf 'Open MPI' ;;
    *HYDRA*) printf 'MPICH' ;;
    *) die "mpirun is neither Intel MPI nor Open MPI nor MPICH: $(command -v mpirun)" ;;
  esac
}

# find_library NAME: its path, from the environment, the active conda, oneAPI, or the system.
find_library() {
  local path
  for path in "$VENV/lib/$1" "${CONDA_PREFIX:-/none}/lib/$1" "${CMPLR_ROOT:-/none}/lib/$1"; do
    # The loader takes spaces and colons for the end of a name.
    if [[ -e $path && $(realpath "$path") != *[[:space:]:]* ]]; then
      realpath "$path"
      return
    fi
  done
  { PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null || true; } |
    awk -v name="$1" '$1 == name && !path { path = $NF } END { if (path) print path }'
}

# free_port: from the process id, so that two runs started together do not try the same one.
free_port() {
  local port=$((20000 + $$ % 10000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  printf '%s\n' "$port"
}

# decide NAME VALUE WHY: one variable for the ranks; what the user has set wins. Without either it stays unset.
decide() {
  local value=$2 why=$3
  if [[ ${!1-} ]]; then value=${!1} why="as you set it"; fi
  if [[ -z $value ]]; then return; fi
  settings+=("$1=$value")
  printf 'set     %s=%s  (%s)\n' "$1" "$value" "$why"
}

log_state() {
  cksum "$OUT/log.jsonl" 2>/dev/null || true
}

# train WORD...: runs the launcher and returns the status of train.py, which torchrun makes 1 and ipexrun 0. What became
# of the run is in the last line of its log, unless the log is as it was.
train() {
  local before status=0 last=""
  if [[ $LAUNCHER == python ]]; then
    run_step "$@"
    return
  fi
  before=$(log_state)
  run_step "$@" || status=$?
  if [[ $(log_state) != "$before" ]]; then last=$(tail -n 1 "$OUT/log.jsonl"); fi
  case $last in
    *'"event": "end", "reason": "time limit"'*) status=75 ;;
    *'"event": "end", "reason": "SIGINT"'*) status=130 ;;
    *'"event": "end", "reason": "SIGUSR1"'*) status=138 ;;
    *'"event": "end", "reason": "SIGTERM"'*) status=143 ;;
    *'"event": "end", "reason": "error'*) ((status)) || status=1 ;;
    *'"event": "end"'*) ;;
    *) if [[ $LAUNCHER == ipex ]]; then die "ipexrun has ended, but $OUT/log.jsonl has no new end"; fi ;;
  esac
  return "$status"
}

show_command() {
  printf 'launch '
  printf ' %q' "$@"
  printf '\n'
}

# needs_corpus WORD...: fails if the words name folders of your own and all of them are there. Of every other corpus
# prepare.py says whether it is whole.
needs_corpus() {
  local word split is_split="" is_own="" splits=("${train_splits[@]}")
  for word in "$@"; do
    case $word in
      --train-splits) is_split=yes is_own=yes splits=() ;;
      --train-splits=*) is_own=yes splits=("${word#*=}") ;;
      --data | --data=* | --dev-split | --dev-split=*) is_split="" is_own=yes ;;
      -*) is_split="" ;;
      *) if [[ $is_split ]]; then splits+=("$word"); fi ;;
    esac
  done
  for split in "${splits[@]}" "$dev_split"; do
    if [[ ! -d $DATA/$split ]]; then return 0; fi
  done
  [[ -z $is_own || -e $DATA/recipe.txt ]] # of the demo
}

# The stamp is written last: an installation that broke off is done again.
set_up() {
  local stamp=$VENV/requirements.txt
  if [[ -x $PYTHON ]] && cmp -s "$REQUIREMENTS" "$stamp"; then return; fi
  printf 'set-up  %s from %s, takes some minutes\n' "$VENV" "$REQUIREMENTS"
  "$PYTHON" -m pip --version >/dev/null 2>&1 || python3 -m venv "$VENV"
  run_step "$PYTHON" -m pip install --quiet --requirement "$REQUIREMENTS"
  cp "$REQUIREMENTS" "$stamp"
}

# run_step WORD...: runs a program and returns its status. A signal to run.sh ends all that it started, by SIGTERM, on
# which train.py saves a checkpoint, or by SIGKILL in the end; when the last of them has ended, so does run.sh.
run_step() {
  local group tenths status=0
  set -m # a process group of its own, to be signalled as a whole
  "$@" </dev/null &
  set +m
  group=$!
  wait "$group" || status=$?
  if [[ -z $signal ]]; then return "$status"; fi
  # Two minutes are for a step and its checkpoint. In a container whose first process does not collect orphans, those
  # that ended seem alive: hence the limit.
  for ((tenths = 0; tenths < 1200; tenths++)); do
    kill -0 -- "-$group" 2>/dev/null || exit $((128 + signal))
    sleep 0.1
  done
  kill -KILL -- "-$group"
  exit $((128 + signal))
}

signal=""
stop() {
  signal=$1
  kill -TERM -- "-${!-}" 2>/dev/null || exit $((128 + $1))
}
trap 'stop 1' HUP
trap 'stop 2' INT
trap 'stop 10' USR1
trap 'stop 15' TERM

# Three files as a reader would try them, each with what was said.
transcribe() {
  local files transcripts path text utterance status=0
  mapfile -t files < <(find -L "$DATA/$dev_split" -mindepth 3 -maxdepth 3 -name '[!.]*' \
    \( -iname '*.flac' -o -iname '*.wav' -o -iname '*.ogg' \) | sort)
  transcripts=$(mktemp)
  run_step "$PYTHON" decode.py --checkpoint "$OUT/best.pt" "${files[@]:0:3}" >"$transcripts" || status=$?
  while IFS=$'\t' read -r path text; do
    utterance=${path##*/}
    utterance=${utterance%.*}
    printf '%s\n  hypothesis  %s\n  reference   %s\n' "$path" "$text" \
      "$(sed -n "s/^$utterance //p" "${path%/*}/${utterance%-*}.trans.txt")"
  done <"$transcripts"
  rm "$transcripts"
  return "$status"
}

# ---- help and tests ----
if [[ ${1-} != test && " $* " == *" --help "* ]]; then set -- --help; fi
case ${1-} in
  -h | --help)
    sed -n '3,/^$/s/^# \{0,1\}//p' run.sh
    printf 'Words for train.py: %s train.py --help\n' "$PYTHON"
    exit
    ;;
  test)
    shift
    marks=(-m "not slow")
    words=()
    for word in "$@"; do
      if [[ $word == --slow ]]; then marks=(); else words+=("$word"); fi
    done
    launch=("$PYTHON" -m pytest "${marks[@]}" "${words[@]}")
    show_command "${launch[@]}"
    if [[ $DRY_RUN == 1 ]]; then exit; fi
    set_up
    exec "${launch[@]}"
    ;;
esac

# ---- decisions ----
[[ $RANKS =~ ^([1-9][0-9]*)?$ ]] || die "RANKS=$RANKS, expected a positive number"
[[ " auto mpirun torchrun ipex " == *" $LAUNCHER "* ]] || die "LAUNCHER=$LAUNCHER, expected auto, mpirun, torchrun or ipex"
[[ $DRY_RUN == [01] ]] || die "DRY_RUN=$DRY_RUN, expected 0 or 1"
[[ " auto ccl gloo mpi " == *" $BACKEND "* ]] || die "BACKEND=$BACKEND, expected auto, ccl, gloo or mpi"
hosts=()
read_hosts

case $CORPUS in
  demo) train_splits=(train-demo) dev_split=dev-demo preset=demo ;;
  mini-librispeech) train_splits=(train-clean-5) dev_split=dev-clean-2 preset=mini ;;
  librispeech-100) train_splits=(train-clean-100) dev_split=dev-clean preset=democratized ;;
  librispeech-960)
    train_splits=(train-clean-100 train-clean-360 train-other-500) dev_split=dev-clean
    preset=democratized
    ;;
  *) die "CORPUS=$CORPUS, expected demo, mini-librispeech, librispeech-100 or librispeech-960" ;;
esac
DATA=$(last_value --data "$DATA" "$@")
OUT=$(last_value --out "$OUT" "$@")
dev_split=$(last_value --dev-split "$dev_split" "$@")

# train.py refuses to overwrite a run, so calling again means going on with it.
resume=()
run="new run"
for file in "$OUT"/checkpoint-[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9].pt "$OUT/best.pt"; do
  if [[ -e $file ]]; then
    resume=(--resume)
    run="has a checkpoint, so --resume"
  fi
done
for word in "$@"; do
  if [[ $word == --resume || $word == --no-resume || $word == --restart ]]; then
    resume=()
    run="$word as you say"
  fi
done

# What follows looks for libraries and launchers in the environment.
if [[ $DRY_RUN != 1 ]]; then set_up; fi
PATH=$(realpath -ms "$VENV")/bin:$PATH

# Containers, batch systems and taskset narrow the allowed CPUs; lscpu alone would show the whole host.
cpus=$(LC_ALL=C taskset -pc $$)
cpus=${cpus##*: }
mapfile -t cores < <(physical_cores "$cpus") # "node cpu" each
((${#cores[@]})) || die "lscpu shows no core behind the CPUs $cpus"
mapfile -t nodes < <(printf '%s\n' "${cores[@]% *}" | uniq)
# A quota says how much, not which: ranks bound to the same first cores as other containers would collide.
quota=$(cpu_quota)
usable=$((${quota:-0} > 0 && quota < ${#cores[@]} ? quota : ${#cores[@]}))

# One rank for each node, since memory of another is slow; but all compute for as long as the one with fewest cores, so
# one rank for all if a cpuset has left nodes of different sizes. On one node of two cores one rank of two threads is
# 1.15 times as fast as two ranks of one.
sizes=$(printf '%s\n' "${cores[@]% *}" | uniq -c | awk '{ print $1 }' | sort -u)
RANKS=${RANKS:-$([[ $sizes == *$'\n'* ]] && echo 1 || echo "${#nodes[@]}")}
world=$((RANKS * ${#hosts[@]}))
per_rank=$((usable > RANKS ? usable / RANKS : 1))
host_list=$(IFS=,; printf '%s' "${hosts[*]}")
single=0 # all ranks are on this machine
if [[ " localhost 127.0.0.1 $HOSTNAME " == *" $host_list "* ]]; then single=1; fi
if [[ $single == 0 ]]; then
  for host in "${hosts[@]}"; do
    [[ $host != localhost && $host != 127.* ]] || die "$HOSTS: $host is another machine on every host; give one name for all"
  done
  # Debian's /etc/hosts leads a machine's own name to 127.0.1.1, where rank 0 would wait for the others.
  first=$(timeout 10 getent ahostsv4 "${MASTER_ADDR:-${hosts[0]}}" | awk 'NR == 1 { print $1 }') || true
  [[ $first != 127.* ]] || die "$HOSTS: ${hosts[0]} is $first here, where no other host reaches it; give its address"
fi

ccl=("$VENV"/lib/python3*/site-packages/oneccl_bindings_for_pytorch)
why_backend="as you set it"
if [[ $BACKEND == auto ]]; then
  BACKEND=gloo why_backend="oneccl_bindings_for_pytorch is not in $VENV"
  if [[ -e ${ccl[0]} ]]; then
    # They are tied to one version of torch, and there may be another.
    if "$PYTHON" -c 'import torch, oneccl_bindings_for_pytorch'; then
      BACKEND=ccl why_backend="oneccl_bindings_for_pytorch is in $VENV"
    else
      why_backend="oneccl_bindings_for_pytorch in $VENV cannot be imported"
    fi
  fi
fi

why_launcher="as you set it"
if [[ $LAUNCHER == auto ]]; then
  if ((world == 1)) && [[ $single == 1 ]]; then
    LAUNCHER=python why_launcher="one process needs no launcher"
  elif command -v mpirun >/dev/null; then
    LAUNCHER=mpirun why_launcher=$(command -v mpirun)
  else
    LAUNCHER=torchrun why_launcher="there is no mpirun"
  fi
fi
if [[ $LAUNCHER == mpirun ]]; then
  command -v mpirun >/dev/null || die "LAUNCHER=mpirun, but there is none on the PATH; pip install impi-rt has one"
  LAUNCHER=$(mpi_kind)
fi
[[ $LAUNCHER != ipex || -x $VENV/bin/ipexrun ]] || die "LAUNCHER=ipex, but $VENV/bin/ipexrun is not there"
[[ $single == 1 || " torchrun ipex " != *" $LAUNCHER "* ]] ||
  die "$LAUNCHER starts ranks on this machine alone, and $HOSTS names $host_list: that takes an mpirun"

printf 'corpus  %s in %s\n' "$CORPUS" "$DATA"
printf 'output  %s (%s)\n' "$OUT" "$run"
printf 'cores   %s physical in %s NUMA nodes behind CPUs %s%s\n' "${#cores[@]}" "${#nodes[@]}" "$cpus" \
  "${quota:+, time of $quota granted}"
printf 'ranks   %s on %s, by %s (%s)\n' "$RANKS" "${host_list//,/, }" "$LAUNCHER" "$why_launcher"
if ((world > 1)); then printf 'backend %s (%s)\n' "$BACKEND" "$why_backend"; fi

# Rank i of a host begins at core i * cores / ranks, so with a rank for each of equal nodes none reaches over two.
# Its first cores are for the threads of oneCCL that communicate, the others compute.
workers=0
if ((world > 1)) && [[ $BACKEND == ccl ]]; then
  workers=${CCL_WORKER_COUNT:-1}
  ((workers < per_rank)) || die "CCL_WORKER_COUNT=$workers leaves no core of the $per_rank of a rank"
fi
domains="" worker_cpus=()
for ((rank = 0; rank < RANKS; rank++)); do
  own=("${cores[@]:rank * usable / RANKS:per_rank}")
  own=("${own[@]#* }")
  worker_cpus+=("${own[@]:0:workers}")
  domains+=$(mask "${own[@]:workers}"),
done
bound=""
if ((usable == ${#cores[@]} && RANKS <= usable)); then bound=yes; fi

# ---- the environment of the ranks ----
settings=()
preload=""
for library in libiomp5.so libtcmalloc.so.4 libtcmalloc_minimal.so.4 libjemalloc.so.2; do
  # One allocator is enough.
  if [[ $library != libiomp5.so && $preload == *tcmalloc* ]]; then continue; fi
  path=$(find_library "$library")
  preload+=${path:+${preload:+:}$path}
done
# OpenMP. Threads stay on their cores and, since others wait for them, sleep 1 ms after their work: both are the values
# of Intel's launcher, read by Intel's OpenMP alone.
decide OMP_NUM_THREADS $((per_rank - workers)) "$usable cores / $RANKS, less $workers for oneCCL"
decide KMP_AFFINITY "${bound:+granularity=fine,compact,1,0}" "one thread a core"
decide KMP_BLOCKTIME 1 "ms"
decide LD_PRELOAD "$preload" "found"
address=$([[ $single == 1 ]] && echo 127.0.0.1 || echo "${hosts[0]}")
address=${MASTER_ADDR:-$address}
port=${MASTER_PORT:-$(free_port)}
if ((world > 1)); then
  # Intel MPI binds each rank to its mask; train.py does so with every other launcher.
  decide I_MPI_PIN_DOMAIN "${bound:+[$domains]}" "cores of each rank"
  decide MASTER_ADDR "$address" "host of rank 0"
  decide MASTER_PORT "$port" "free here"
  if ((workers)); then
    decide CCL_WORKER_COUNT "$workers" "threads of oneCCL in each rank"
    decide CCL_WORKER_AFFINITY "$(IFS=,; printf '%s' "${worker_cpus[*]}")" "the first cores of each rank"
  fi
else
  # In a batch job of several tasks the job's own variables would make of one process the first of several.
  settings+=(RANK=0 WORLD_SIZE=1 LOCAL_RANK=0)
fi

# ---- the launch ----
bootstrap=()
if [[ $SSH != ssh ]]; then bootstrap=(-bootstrap ssh -bootstrap-exec "$SSH"); fi
case $LAUNCHER in
  python) launch=("$PYTHON") ;;
  torchrun)
    # Not --standalone, which looks this machine's own name up.
    launch=("$PYTHON" -m torch.distributed.run --nnodes 1 --nproc-per-node "$RANKS")
    launch+=(--master-addr "$address" --master-port "$port")
    decide TORCH_ELASTIC_SHUTDOWN_TIMEOUT 110 "s for a step and its checkpoint; torchrun's own are 30"
    ;;
  ipex)
    launch=(ipexrun)
    if ((world > 1)); then
      launch+=(--nnodes 1 --nprocs-per-node "$RANKS" --ccl-worker-count "$workers")
    fi
    ;;
  "Intel MPI" | MPICH) launch=(mpirun -n "$world" -ppn "$RANKS" -hosts "$host_list" "${bootstrap[@]}" "$PYTHON") ;;
  "Open MPI")
    launch=(
      mpirun
      -n "$world"
      --host "$(printf "%s:$RANKS\n" "${hosts[@]}" | paste -sd,)"
      --map-by "ppr:$RANKS:node"
      --bind-to none
      --mca plm_rsh_agent "$SSH"
    )
    names=("${settings[@]%%=*}")
    # What Hydra passes on by itself.
    while IFS= read -r name; do
      [[ $name =~ ^(GLOO|CCL|FI|KMP|OMP|ONEDNN|DNNL|TORCH)_ && " ${names[*]} " != *" $name "* ]] || continue
      names+=("$name")
    done < <(compgen -e)
    for name in "${names[@]}"; do launch+=(-x "$name"); done
    launch+=("$PYTHON")
    ;;
esac
launch+=(
  train.py
  --data "$DATA"
  --train-splits "${train_splits[@]}"
  --dev-split "$dev_split"
  --out "$OUT"
  --preset "$preset"
  "${resume[@]}"
)
if ((world > 1)); then launch+=(--ranks "$world"); fi
if ((world > 1)) || [[ $why_backend == "as you set it" ]]; then launch+=(--backend "$BACKEND"); fi
launch+=("$@")
# ipexrun hands its words to a shell.
if [[ $LAUNCHER == ipex ]]; then mapfile -t launch < <(printf '%q\n' "${launch[@]}"); fi
show_command "${launch[@]}"
if [[ $DRY_RUN == 1 ]]; then exit; fi

# ---- run ----
# A batch system may start processes on hosts that ssh may not reach.
if [[ $single == 0 && ${I_MPI_HYDRA_BOOTSTRAP:-ssh} == ssh ]]; then check_hosts; fi
if needs_corpus "$@"; then run_step "$PYTHON" -m tools.prepare "$CORPUS" "$DATA"; fi
# A batch job may have told all its processes that they are one and the same rank.
train env -u RANK -u WORLD_SIZE -u LOCAL_RANK "${settings[@]}" "${launch[@]}"

# One process scores, so it takes the cores of all ranks.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$usable}
run_step "$PYTHON" decode.py --checkpoint "$OUT/best.pt" --data "$DATA" --split "$dev_split"
transcribe
