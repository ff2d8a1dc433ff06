#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a clone to a transcript: set up, prepare a corpus, train, score the dev split, transcribe three files.
#
#   bash run.sh                                   the demo corpus, one process on every core
#   RANKS=2 bash run.sh --epochs 20               two ranks on this machine; words go to train.py and win
#   CORPUS=mini-librispeech bash run.sh           or librispeech-100, librispeech-960, downloaded to $DATA
#   DRY_RUN=1 bash run.sh                         prints what it would launch and why, writes nothing
#   bash run.sh test [--slow] [words for pytest]  the tests; --slow adds the long ones
#
# Writes .venv, the corpus in $DATA and the run in $OUT; relative paths start at this folder.
# A second call continues the run in $OUT. The first step that fails gives the exit status.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- knobs of the machine; everything about the model and its training is a word for train.py ----
RANKS=${RANKS:-1}                # processes; an LSTM gains less from a second thread than from a second rank
CORPUS=${CORPUS:-demo}           # demo is synthesised, the others are downloaded unless $DATA has them
DATA=${DATA:-data/$CORPUS}       # large corpora often belong on another disk
OUT=${OUT:-out/$CORPUS}          # checkpoints and logs of this run
DRY_RUN=${DRY_RUN:-0}            # 1: decide and print only
PYTHON=.venv/bin/python

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

# physical_cores CPUS: distinct cores behind a list such as 0-3,8. Two hyper-threads share one core's
# matrix unit, so counting CPUs would start twice the threads that can work.
physical_cores() {
  lscpu -p=CPU,CORE,SOCKET,NODE | awk -F, -v cpus="$1" '
    BEGIN {
      count = split(cpus, ranges, ",")
      for (i = 1; i <= count; i++) {
        last = split(ranges[i], ends, "-")
        for (cpu = ends[1] + 0; cpu <= ends[last] + 0; cpu++) allowed[cpu]
      }
    }
    !/^#/ && ($1 in allowed) && !seen[$2, $3]++ { cores++ }
    END { print cores + 0 }'
}

show_command() {
  printf 'launch '
  printf ' %q' "$@"
  printf '\n'
}

# The stamp is written last: an installation that broke off is done again.
set_up() {
  local stamp=.venv/requirements.txt
  if [[ -x $PYTHON ]] && cmp -s requirements.txt "$stamp"; then return; fi
  printf 'set-up  .venv from requirements.txt, takes some minutes\n'
  "$PYTHON" -m pip --version >/dev/null 2>&1 || python3 -m venv .venv
  "$PYTHON" -m pip install --quiet --requirement requirements.txt
  cp requirements.txt "$stamp"
}

# Three files as a reader would try them, each with what was said.
transcribe() {
  local files transcripts path text utterance
  files=("$DATA/$dev_split"/*/*/*.flac)
  # A plain assignment keeps the exit status of decode.py; reading from <(...) would lose it.
  transcripts=$("$PYTHON" decode.py --checkpoint "$OUT/best.pt" "${files[@]:0:3}")
  while IFS=$'\t' read -r path text; do
    utterance=$(basename "$path" .flac)
    printf '%s\n  hypothesis  %s\n  reference   %s\n' "$path" "$text" \
      "$(sed -n "s/^$utterance //p" "${path%/*}/${utterance%-*}.trans.txt")"
  done <<<"$transcripts"
}

# ---- help and tests ----
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
[[ $RANKS =~ ^[1-9][0-9]*$ ]] || die "RANKS=$RANKS, expected a positive number"

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
for file in "$OUT"/checkpoint-*.pt "$OUT/best.pt"; do
  if [[ -e $file ]]; then
    resume=(--resume)
    run="has a checkpoint, so --resume"
  fi
done
for word in "$@"; do
  if [[ $word == --resume || $word == --no-resume ]]; then
    resume=()
    run="$word as you say"
  fi
done

# Containers, batch systems and taskset narrow the allowed CPUs; lscpu alone would show the whole host.
cpus=$(taskset -pc $$)
cpus=${cpus##*: }
cores=$(physical_cores "$cpus")
if [[ ${OMP_NUM_THREADS-} ]]; then
  threads=$OMP_NUM_THREADS
  score_threads=$OMP_NUM_THREADS
  why_threads="OMP_NUM_THREADS as you set it"
else
  threads=$((cores > RANKS ? cores / RANKS : 1))
  score_threads=$((cores > 1 ? cores : 1))
  why_threads="$cores cores / $RANKS, at least 1"
fi

if ((RANKS == 1)); then
  launcher=("$PYTHON")
  why_launcher="plain python, one process needs no launcher"
else
  launcher=(
    "$PYTHON" -m torch.distributed.run
    --standalone
    --nproc-per-node "$RANKS"
  )
  why_launcher="torch.distributed.run, all ranks are on this machine"
fi

launch=(
  "${launcher[@]}"
  train.py
  --data "$DATA"
  --train-splits "${train_splits[@]}"
  --dev-split "$dev_split"
  --out "$OUT"
  --preset "$preset"
  "${resume[@]}"
  "$@"
)

printf 'corpus  %s in %s\n' "$CORPUS" "$DATA"
printf 'output  %s (%s)\n' "$OUT" "$run"
printf 'cores   %s physical behind CPUs %s\n' "$cores" "$cpus"
printf 'ranks   %s (%s)\n' "$RANKS" "$why_launcher"
printf 'threads %s per rank (%s)\n' "$threads" "$why_threads"
show_command env "OMP_NUM_THREADS=$threads" "${launch[@]}"
if [[ $DRY_RUN == 1 ]]; then exit; fi

# ---- run ----
set_up
"$PYTHON" prepare.py "$CORPUS" "$DATA"

# OpenMP: threads per process, decided above.
export OMP_NUM_THREADS=$threads
"${launch[@]}"

# One process scores, so it takes the cores of all ranks.
export OMP_NUM_THREADS=$score_threads
"$PYTHON" decode.py --checkpoint "$OUT/best.pt" --data "$DATA" --split "$dev_split"
transcribe
