#!/bin/bash
# Fuzz each parser of hostile input: scripts/fuzz.sh SECONDS_EACH
# Needs a nightly Rust and cargo-fuzz. Seeds are in native/fuzz/corpus; what is found on the way
# goes to build/fuzz, a crash to build/fuzz/TARGET/crash-*.
set -euo pipefail
cd "$(dirname "$0")/../native/fuzz"
seconds=${1:?usage: scripts/fuzz.sh SECONDS_EACH}
build=$(cd ../.. && pwd)/build/fuzz

if ! cargo +nightly --version > /dev/null 2>&1; then
    echo 'fuzzing needs a nightly Rust: rustup toolchain install nightly' >&2
    exit 1
fi
if ! cargo +nightly fuzz --version > /dev/null 2>&1; then
    echo 'fuzzing needs cargo-fuzz: cargo install cargo-fuzz' >&2
    exit 1
fi

targets=$(cargo +nightly fuzz list --fuzz-dir .)
for target in $targets; do
    mkdir -p "$build/$target/corpus" "corpus/$target"
    echo "$target: $seconds s"
    cargo +nightly fuzz run --fuzz-dir . --target-dir "$build/target" "$target" \
        "$build/$target/corpus" "corpus/$target" -- \
        -max_total_time="$seconds" -print_final_stats=1 -artifact_prefix="$build/$target/"
done
