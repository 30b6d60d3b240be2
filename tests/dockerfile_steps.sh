#!/usr/bin/env bash
# The steps of launch/Dockerfile without Docker: what it copies is copied into an empty folder, what
# it runs there is run there, with the extras that are given (none), and then what a container would
# start. What makes the container's user is left out.
#
#   tests/dockerfile_steps.sh [EXTRAS]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
unset INSTAR_VENV INSTAR_PYTHON INSTAR_EXTRAS
export EXTRAS="${1-}"

words_of() { # a JSON list of words, one a line
  printf '%s\n' "$1" | tr -d '[]" ' | tr ',' '\n'
}

command=()
while read -r instruction rest; do
  case "$instruction" in
  COPY)
    read -ra words <<<"${rest#--chown=* }"
    target="$folder/${words[-1]}"
    for source in "${words[@]:0:${#words[@]}-1}"; do
      if [[ -d "$root/$source" ]]; then
        cp -R "$root/$source/." "$(mkdir -p "$target" && printf '%s' "$target")"
      else
        cp "$root/$source" "$target"
      fi
    done
    ;;
  RUN)
    case "$rest" in
    useradd*) ;;
    *) (cd "$folder" && bash -euc "$rest") ;;
    esac
    ;;
  ENTRYPOINT | CMD) mapfile -t -O "${#command[@]}" command < <(words_of "$rest") ;;
  esac
done < <(sed -e ':join' -e '/\\$/N; s/\\\n//; t join' "$root/launch/Dockerfile")

printf '%s\n' "${command[*]}"
(cd "$folder" && "${command[@]}")
