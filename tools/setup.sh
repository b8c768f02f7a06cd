#!/bin/sh
# Makes .venv, this project's own environment, or finds it ready. Called by make, which clears foreign variables first.
#
# .venv/setup-state holds "installing" while pip runs, and afterwards what the environment was made for: this
# directory and this pyproject.toml. So an interrupted set-up, a moved directory and a changed dependency are noticed.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."

venv_python=.venv/bin/python
state_file=.venv/setup-state
wanted="$(pwd -P) $(cksum <pyproject.toml)"
state=$(cat "$state_file" 2>/dev/null || true)

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

is_the_asked_version() {
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv_python")" ]
}

can_be_kept() {
    case $state in
        '' | "$(pwd -P) "*) ;;  # made by hand, or by this script for this directory
        *) return 1 ;;
    esac
    is_recent "$venv_python" && is_the_asked_version || return 1
    "$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip >/dev/null 2>&1
}

why_not() {  # prints why Python $1 cannot make the environment; nothing if it can
    command -v "$1" >/dev/null || { echo "not found"; return; }
    version=$(version_of "$1") || { echo "does not run"; return; }
    is_recent "$1" || { echo "is Python $version"; return; }
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        echo "has no venv (on Debian or Ubuntu: apt install python$version-venv)"
}

make_venv() {
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.11 python3.12 python3.13 python3.14; fi
    reasons=
    for python in "$@"; do
        reason=$(why_not "$python")
        if [ -z "$reason" ]; then
            [ ! -d .venv ] || echo installing >"$state_file"
            reason=$("$python" -m venv --clear .venv 2>&1) && return
        fi
        reasons="$reasons
  $python: $reason"
    done
    echo "Making .venv needs Python 3.11 or newer with its venv module; name one with PYTHON=... Tried:$reasons" >&2
    exit 1
}

install() {  # by uv, which takes a quarter of pip's time; by pip where uv is not to be had or fails: pip says why
    set -- install --quiet --quiet --disable-pip-version-check
    "$venv_python" -m pip "$@" 'uv>=0.9' 2>/dev/null &&
        "$venv_python" -m uv pip install --quiet --python "$venv_python" --editable '.[dev]' 2>/dev/null ||
        "$venv_python" -m pip "$@" --editable '.[dev]'
}

if [ "$state" = "$wanted" ] && is_recent "$venv_python" && is_the_asked_version; then
    exit 0
fi

trap 'exit 130' HUP INT TERM  # leaves "installing" behind: the next call starts afresh
if ! can_be_kept; then
    make_venv
    state=installing
fi
echo "Setting up .venv with $("$venv_python" -V) (once, a few minutes) ..."
echo installing >"$state_file"
if ! install; then
    echo "$state" >"$state_file"  # pip stopped by itself, as without a network: what was complete still is
    echo "Setting up .venv failed: pip says why above." >&2
    exit 1
fi
echo "$wanted" >"$state_file"
