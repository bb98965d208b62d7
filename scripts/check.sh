#!/bin/sh
# `make check`: every check runs, also after one failed; the exit status tells whether any did.
set -u
cd "$(dirname "$0")/.."
bin=.venv/bin
failed=

check() {
    title=$1
    shift
    if output=$("$@" 2>&1); then
        printf 'ok      %s\n' "$title"
    else
        printf 'FAILED  %s\n%s\n' "$title" "$output"
        failed="$failed\n  $title"
    fi
}

check 'Python format (ruff format)' $bin/ruff format --check
check 'Python lint (ruff)' $bin/ruff check
check 'Python types (mypy, strict)' $bin/mypy
check 'Stubs match the extension (stubtest)' $bin/stubtest kata_hybrid._native \
    --allowlist scripts/stubtest-allowlist.txt
check 'Layering (import-linter)' env PYTHONPATH=python $bin/lint-imports
check 'Generated messages are current' $bin/python scripts/generate_protos.py --check
check 'Rust format (cargo fmt)' cargo fmt --all --check
check 'Rust lint (clippy)' cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
check 'Repository rules' $bin/python -m pytest -q tests/repo

if [ -n "$failed" ]; then
    printf "\nFailed:$failed\n"
    exit 1
fi
