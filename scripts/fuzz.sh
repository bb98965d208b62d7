#!/bin/sh
# `make fuzz`: every target of native/fuzz for a number of seconds each. Stops at the first finding,
# whose input is left in native/fuzz/artifacts/.
set -eu
cd "$(dirname "$0")/../native/fuzz"
seconds=${1:-60}

# On stable Rust the sanitiser's coverage flags need RUSTC_BOOTSTRAP; cargo-fuzz sets the rest.
if ! cargo fuzz --version >/dev/null 2>&1; then
    echo 'no cargo-fuzz: cargo install cargo-fuzz --locked' >&2
    exit 1
fi
export RUSTC_BOOTSTRAP=1
for target in $(cargo fuzz list); do
    echo "== $target, $seconds s"
    cargo fuzz run --sanitizer none "$target" -- -max_total_time="$seconds" -print_final_stats=1
done
