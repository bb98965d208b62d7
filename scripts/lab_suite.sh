#!/bin/sh
# What `make lab` runs inside the lab: the tests that need a real KVM, then the integration suite with the
# monitor that such a host gets. Arguments go to both. A skip of a lab test fails here.
# KATA_HYBRID_LAB_QUICK=1 (`make test`, CI): of each part some, one of a kind, in minutes instead of an hour.
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
if [ -n "${KATA_HYBRID_LAB_QUICK:-}" ]; then
    suite lab -m lab tests/lab -k 'lab.py or serial or flush or ends or (programs_find and auto and locks)' "$@"
    # Streams, status, a mount, an exec, a network, one process, its cgroup; the end of the machine, and of the shim.
    suite containerd-2 -m integration tests/integration --containerd 2 -k 'test_run.py and (reaches_the_client or kernel or exit_status_is or stdin_is_piped or bind_mount) or execs_own or one_process or counts_in or test_shim_killed or kernel_panics or guest_has_the_pods' "$@"
    suite containerd-1 -m integration tests/integration --containerd 1 -k 'test_run.py and (kernel or reaches_the_client)' "$@"
else
    suite lab -m lab tests/lab "$@"
    suite integration -m 'integration and not lab' tests/integration "$@"
fi
if [ $ran -eq 0 ]; then
    echo "lab: no test selected" >&2
    exit 5
fi
exit $failed
