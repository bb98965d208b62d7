#!/bin/sh
# What `make lab` runs inside the lab: the tests that need a real KVM, then the integration suite with the
# monitor that such a host gets. Arguments go to both. A skip of a lab test fails here.
set -u
cd "$(dirname "$0")/.."
export KATA_HYBRID_REQUIRE=lab,integration,vm

# Not loaded: two plugins that these suites don't use and whose start takes the emulator half a minute.
suite() {
    name=$1
    shift
    .venv/bin/python -m pytest -p no:benchmark -p no:hypothesispytest -p no:cacheprovider \
        -o addopts='--strict-markers --import-mode=importlib -p no:asyncio -ra' \
        --junitxml="build/lab/$name.xml" --durations=10 "$@"
    status=$?
    # 5: the arguments selected no test of this suite.
    [ $status -eq 5 ] || [ $status -eq 0 ] || failed=1
    [ $status -eq 5 ] || ran=1
}

failed=0
ran=0
suite lab -m lab tests/lab "$@"
suite integration -m 'integration and not lab' tests/integration "$@"
if [ $ran -eq 0 ]; then
    echo "lab: no test selected" >&2
    exit 5
fi
exit $failed
