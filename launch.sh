#!/usr/bin/env bash
# Sets up .venv once and runs hqqtrain on all GPUs of this machine, or on its CPU.
#   ./launch.sh                             the default recipe, tiny_2bit
#   ./launch.sh recipe=NAME key=value ...   any recipe, on all GPUs; --help lists recipes and keys
#   ./launch.sh test [pytest arguments]     the test suite
# Variables: NPROC (processes on this machine; default: its GPUs), NNODES, NODE_RANK, MASTER_ADDR,
# MASTER_PORT, OMP_NUM_THREADS, HQQTRAIN_PYTHON (the Python that makes .venv; 3.11 or newer).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$here/.venv" python="$here/.venv/bin/python"

# A run outlives its console: no closed stream and no broken pipe ends this script.
{ : <&0; } 2>/dev/null || exec 0</dev/null
{ : >&1; } 2>/dev/null || exec 1>/dev/null
{ : >&2; } 2>/dev/null || exec 2>/dev/null
trap '' PIPE

say() { echo "launch.sh: $1" >&2 || true; }

die() { say "error: $1"; exit 1; }

find_python() { # print the first suitable Python
  local candidates=(python3 python3.13 python3.12 python3.11) candidate
  [[ -z ${HQQTRAIN_PYTHON:-} ]] || candidates=("$HQQTRAIN_PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then echo "$candidate"; return; fi
  done
  die "needs Python 3.11 or newer with venv and pip; none of these is suitable: ${candidates[*]}.
Install one, or choose one: HQQTRAIN_PYTHON=/path/to/python3 ./launch.sh"
}

install() { "$python" -m pip install -qq --disable-pip-version-check -c "$here/constraints.txt" "$@"; }

install_all() { # install_all EXTRA: torch first, because deepspeed needs it to be built
  local base
  if [[ ! -x $python ]]; then base="$(find_python)"; "$base" -m venv "$venv"; fi
  install "torch>=2.11,<2.15"
  install -e "$here$1"
  DS_BUILD_OPS=0 install --no-build-isolation deepspeed >"$venv/deepspeed.log" 2>&1 ||
    say "deepspeed cannot be built here, see .venv/deepspeed.log; continuing."
}

is_ready() { # is_ready STAMP...: whether one of the stamp files contains $wanted
  local stamp
  for stamp in "$@"; do [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]] || return 0; done
  return 1
}

set_up() { # set_up run|test: install what is missing; the lock excludes nodes that share the disk
  wanted="$here $(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum)"
  local stamps=("$venv/.ready-test") extra="[test]"
  [[ $1 == test ]] || { stamps+=("$venv/.ready-run"); extra=""; }
  if is_ready "${stamps[@]}"; then return; fi
  mkdir -p "$venv"
  exec 9>"$venv/.lock"
  if command -v flock >/dev/null; then flock 9; fi
  if ! is_ready "${stamps[@]}"; then
    say "setting up $venv once; this takes a few minutes."
    install_all "$extra"
    echo "$wanted" >"$venv/.ready-$1"
  fi
  exec 9>&-
}

run_tests() {
  cd "$here"
  export PATH="$venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  ruff check .
  ruff format --check .
  mypy
  lint-imports
  shellcheck launch.sh .ci/run
  # loadfile: tests of a file share runs. tests/conftest.py orders the files. 3: tests often wait.
  exec "$python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
}

count_gpus() { # each GPU is a line that begins with an index, GPU or MIG
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then tr -s ', ' '\n' <<<"$CUDA_VISIBLE_DEVICES"
  else nvidia-smi -L 2>/dev/null || true; fi | grep -c '^[0-9GM]' || true
}

has_flag() { local word; for word; do [[ $word != -* ]] || return 0; done; return 1; }

launch() { # run several processes; exit with the run's own code, because accelerate's is 0 or 1
  local checked cores pid code=0 int=TERM target
  checked="$("$python" -m hqqtrain --check "$@")" || exit "$?"
  [[ $checked != "sweep of "* && $checked != "slurm job:"* ]] || exec "$python" -m hqqtrain "$@"
  ((nnodes == 1)) || [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] ||
    die "NNODES=$nnodes: set NODE_RANK (0 to $((nnodes - 1))) and MASTER_ADDR on every node."
  cores="$(getconf _NPROCESSORS_ONLN)" HQQTRAIN_EXIT_CODE="$(mktemp)"
  export HQQTRAIN_EXIT_CODE OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}"
  # --multi_gpu selects accelerate's launcher for several processes, also on a CPU. With job control
  # (set -m) it has a process group of its own, so that Ctrl-C reaches it once, from the trap below.
  set -m
  # The module before it lets the ranks meet on the address of the first node only.
  "$python" -m hqqtrain.distributed.rendezvous -m accelerate.commands.launch --multi_gpu --num_machines "$nnodes" \
    --num_processes "$((nproc * nnodes))" --machine_rank "${NODE_RANK:-0}" \
    --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --mixed_precision no --dynamo_backend no \
    --main_process_port "${MASTER_PORT:-$((nnodes > 1 ? 29500 : 0))}" -m hqqtrain "$@" &
  pid=$! target=$!
  set +m
  trap 'kill -TERM "$pid" 2>/dev/null || true' TERM USR1 HUP
  trap 'kill -"$int" -- "$target" 2>/dev/null || true; int=KILL target="-$pid"' INT
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" && code=0 || code=$?; done
  ((code == 0)) || code="$(cat "$HQQTRAIN_EXIT_CODE")"
  rm -f "$HQQTRAIN_EXIT_CODE"
  exit "${code:-1}"
}

if [[ ${1:-} == test ]]; then shift; set_up test; run_tests "$@"; fi
set_up run
[[ " $* " =~ " task="(generate|plan)" " ]] && is_alone=1 || is_alone="" # one process, maybe no recipe
[[ " $* " == *" recipe="* || -n $is_alone && " $* " == *" model.name_or_path="* ]] ||
  set -- recipe=tiny_2bit "$@"
export HQQTRAIN_LAUNCHER="$here/launch.sh"
nnodes="${NNODES:-1}" nproc="${NPROC:-$(count_gpus)}"
((nproc > 0)) || nproc=1
if ((nproc * nnodes == 1)) || [[ -n $is_alone ]] || has_flag "$@"; then exec "$python" -m hqqtrain "$@"; fi
launch "$@"
