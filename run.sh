#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Leads from a clone to a transcript: set up, prepare a corpus, train, score the dev split, print transcripts.
#
#   bash run.sh                                   the demo corpus, one process for each NUMA node (two on two cores)
#   RANKS=2 bash run.sh --epochs 20               two ranks on this machine; flags go to train.py and win
#   HOSTS=my-hosts bash run.sh                    on the machines listed there, with mpirun (see hosts)
#   CORPUS=mini-librispeech bash run.sh           or librispeech-100, librispeech-960, downloaded to $DATA
#   DRY_RUN=1 bash run.sh                         prints what it would launch and why, writes nothing
#   srun bash run.sh                              in a Slurm job, whose tasks become the ranks (see docs/cluster.md)
#   bash run.sh test [--slow] [flags of pytest]   the tests; --slow adds the long ones
#
# Writes .venv, the corpus in $DATA and the run in $OUT; relative paths start at this folder.
# A second call continues the run in $OUT. The first step that fails gives the exit status.
# Other hosts need this folder with its .venv at the same path, and $DATA and $OUT on a disk that all
# share; run it on the first of them.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- knobs of the machine; everything about the model and its training is a flag of train.py ----
RANKS=${RANKS:-}                 # processes on each host; default: as hosts says, else one for each NUMA node; two on two cores
HOSTS=${HOSTS:-hosts}            # file of the machines to train on
LAUNCHER=${LAUNCHER:-auto}       # auto, mpirun (Intel MPI, Open MPI, MPICH), torchrun, ipex
BACKEND=${BACKEND:-auto}         # of torch.distributed: auto, ccl, gloo, mpi
SSH=${SSH:-ssh}                  # how mpirun reaches other hosts; a wrapper may add port and key
VENV=${VENV:-.venv}              # Python environment,
REQUIREMENTS=${REQUIREMENTS:-requirements.txt}  # made from this file
CORPUS=${CORPUS:-demo}           # demo is synthesised, the others are downloaded unless $DATA has them
DATA=${DATA:-data/$CORPUS}       # large corpora often belong on another disk
OUT=${OUT:-out/$CORPUS}          # checkpoints and logs of this run
DRY_RUN=${DRY_RUN:-0}            # 1: decide and print only
PYTHON=$VENV/bin/python

# ---- functions ----
# Ends run.sh if there is neither an environment nor a python3 of the system that could make one.
check_python() {
  if [[ -x $PYTHON ]]; then return; fi
  command -v python3 >/dev/null || { printf 'run.sh: there is no python3; install 3.10 or later\n' >&2; exit 2; }
  VENV=$VENV python3 -c 'import os, sys
if sys.version_info < (3, 10): sys.exit("run.sh: python3 is older than 3.10; make the environment with a newer one, for "
                                        "example python3.12 -m venv " + os.environ["VENV"])' || exit 2
}

# launch TASK ...: replaces this shell by tools/launch.py, which makes every decision. Before the set-up, the python3 of
# the system runs it.
launch() {
  local python=$PYTHON
  check_python
  if [[ ! -x $python ]]; then python=python3; fi
  export RANKS HOSTS LAUNCHER BACKEND SSH VENV CORPUS DATA OUT DRY_RUN
  exec "$python" -B -m tools.launch "$@"
}

# The stamp is written last, so an installation that broke off is done again.
is_set_up() {
  [[ -x $PYTHON && -f $VENV/requirements.txt && $(<"$REQUIREMENTS") == "$(<"$VENV/requirements.txt")" ]]
}

set_up() {
  if is_set_up; then return; fi
  check_python
  # Several tasks of a batch job may come here: the first one installs, holding a lock by file descriptor 9.
  mkdir -p "$VENV"
  exec 9>>"$VENV/lock"
  python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  if ! is_set_up; then
    printf 'set-up  %s from %s, takes some minutes\n' "$VENV" "$REQUIREMENTS"
    "$PYTHON" -m pip --version >/dev/null 2>&1 || python3 -m venv "$VENV"
    run_step "$PYTHON" -m pip install --quiet --requirement "$REQUIREMENTS"
    cp "$REQUIREMENTS" "$VENV/requirements.txt"
  fi
  exec 9>&-
}

# run_step COMMAND ...: runs a program and returns its status. After a signal to run.sh, it ends the program and all
# that the program started: by SIGTERM, on which train.py saves a checkpoint, and two minutes later by SIGKILL. Then it
# exits.
run_step() {
  local group tenths status=0
  set -m # a process group of its own, to be signalled as a whole
  "$@" </dev/null &
  set +m
  group=$!
  wait "$group" || status=$?
  if [[ -z $signal ]]; then return "$status"; fi
  # In a container whose first process does not collect orphans, ended processes seem alive: hence the limit.
  for ((tenths = 0; tenths < 1200; tenths++)); do
    kill -0 -- "-$group" 2>/dev/null || exit $((128 + signal))
    sleep 0.1
  done
  kill -KILL -- "-$group" 2>/dev/null || true
  exit $((128 + signal))
}

signal=""
stop() {
  if [[ $signal == 2 && $1 == 2 ]]; then kill -KILL -- "-${!-}" 2>/dev/null || true; exit 130; fi
  signal=$1
  if [[ $1 == 2 ]]; then printf 'run.sh: stops after this step; Ctrl-C again ends at once\n' >&2; fi
  kill -TERM -- "-${!-}" 2>/dev/null || exit $((128 + $1))
}
trap 'stop 1' HUP
trap 'stop 2' INT
trap 'stop 10' USR1
trap 'stop 15' TERM

# ---- help and tests ----
if [[ ${1-} != test && " $* " == *" --help "* ]]; then set -- --help; fi
case ${1-} in
  -h | --help)
    sed -n '3,/^$/s/^# \{0,1\}//p' run.sh
    printf 'Flags of train.py: %s train.py --help\n' "$PYTHON"
    exit
    ;;
  test)
    shift
    is_slow=""
    for word; do # rotates the words and takes --slow out
      shift
      if [[ $word == --slow ]]; then is_slow=yes; else set -- "$@" "$word"; fi
    done
    if [[ -z $is_slow ]]; then set -- -m "not slow" "$@"; fi
    set -- "$PYTHON" -m pytest "$@"
    printf 'launch %s\n' "$(printf ' %q' "$@")"
    if [[ $DRY_RUN == 1 ]]; then exit; fi
    set_up
    exec "$@"
    ;;
esac

# ---- the five steps ----
# Libraries, mpirun and ipexrun of the environment come before those of the system.
if [[ $VENV == /* ]]; then PATH=$VENV/bin:$PATH; else PATH=$PWD/$VENV/bin:$PATH; fi
if [[ $DRY_RUN == 1 ]]; then launch decide /dev/null "$@"; fi
(launch check) # a wrong knob is named before the set-up, which takes minutes
set_up

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
run_step launch decide "$work/plan" "$@"
plan=()
while IFS= read -r -d '' field; do plan+=("$field"); done <"$work/plan"
data=${plan[0]} out=${plan[1]} dev_split=${plan[2]} cores=${plan[3]}

if [[ ${plan[4]} == prepare ]]; then run_step "$PYTHON" -m tools.prepare "$CORPUS" "$data"; fi
run_step "${plan[@]:6}"
if [[ ${plan[5]} != score ]]; then exit; fi # the first task of srun scores
# One process scores, so it takes the cores of all ranks.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}
hypotheses=$out/$(basename -- "$dev_split").tsv
run_step "$PYTHON" decode.py --checkpoint "$out/best.pt" --data "$data" --split "$dev_split" --hypotheses "$hypotheses"
awk -F '\t' 'NR > 1 && NR < 5 {printf "%s\n  hypothesis  %s\n  reference   %s\n", $1, $2, $3}' "$hypotheses"
printf 'transcribe a file of your own instead of my.wav, or five seconds from the microphone:\n'
printf '  %s%q decode.py --checkpoint %q %s\n' '' "$PYTHON" "$out/best.pt" my.wav \
  'arecord -q -f S16_LE -r 16000 -c 1 -d 5 | ' "$PYTHON" "$out/best.pt" -
