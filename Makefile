# Thin: each target is a line; what a line can't hold is in scripts/. Run `make help`.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
# A short fuzzing run; make fuzz SECONDS_EACH=600 for a real one.
SECONDS_EACH ?= 60
# Longest time for everything that make lab runs: an hour on two idle cores. Tests have limits of their own.
LAB_SECONDS ?= 7200
# More arguments for pytest, e.g. make test-unit ARGS='-k frame'
ARGS ?=

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install and build everything (first time: minutes; again: a moment)
	@$(PYTHON) scripts/setup.py

.PHONY: demo
demo: setup ## Run a container in a virtual machine, with a real containerd, and show each stage
	@$(BIN)/python scripts/demo.py $(ARGS)

.PHONY: test
test: setup ## Run all tests: Python, Rust, integration on both containerds, some in the lab (needs root)
	$(BIN)/python -m pytest -m 'not integration and not vm and not lab and not conformance'
	cargo test --workspace --locked --quiet
	cargo test --workspace --locked --quiet --bench '*'
	KATA_HYBRID_REQUIRE=integration,vm $(BIN)/python -m pytest -m '(integration or vm) and not lab'
	@PYTHONPATH=tests $(BIN)/python -m lab_guest.image
	KATA_HYBRID_LAB_QUICK=1 $(BIN)/python scripts/lab.py --timeout 1000 --tries 2 -- scripts/lab_suite.sh

.PHONY: test-unit
test-unit: setup-dev ## Run the Python tests that need nothing but Python
	$(BIN)/python -m pytest -m 'not integration and not vm and not lab and not conformance' $(ARGS)

.PHONY: test-integration
test-integration: setup ## Run the integration tests (ARGS='--containerd 2 -k exec' for some)
	$(BIN)/python -m pytest -m integration $(ARGS)

.PHONY: test-harness
test-harness: setup ## Run the integration tests against runc: a check of the tests themselves
	$(BIN)/python -m pytest -m integration --runtime io.containerd.runc.v2 $(ARGS)

.PHONY: conformance
conformance: setup ## Run Kubernetes' own tests of the CRI, critest, on both containerds (needs root)
	@$(BIN)/python scripts/go_build.py
	KATA_HYBRID_REQUIRE=conformance $(BIN)/python -m pytest -m conformance tests/integration -s $(ARGS)

.PHONY: lab
lab: setup ## Boot the lab, a machine whose KVM runs guests, and run its tests in it (ARGS='-k boot')
	@PYTHONPATH=tests $(BIN)/python -m lab_guest.image
	$(BIN)/python scripts/lab.py --timeout $(LAB_SECONDS) -- scripts/lab_suite.sh $(ARGS)

.PHONY: lab-shell
lab-shell: setup ## Boot the lab and get a shell in it
	@$(BIN)/python scripts/lab.py --shell

.PHONY: check
check: setup-dev ## Format, lint, types, layering, generated code
	@scripts/check.sh

.PHONY: format
format: setup-tools ## Rewrite Python and Rust in the project's format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix-only
	cargo fmt --all

.PHONY: bench
bench: setup ## Run the benchmarks, print one table, write build/bench.json
	$(BIN)/python benchmarks/run.py $(ARGS)

.PHONY: wheel
wheel: ## Build the wheel (dist/)
	@$(PYTHON) scripts/setup.py --for wheel
	@ls dist/*.whl

.PHONY: dev
dev: setup-tools ## Quick loop: a debug build of the extension into the source tree
	$(BIN)/maturin develop

.PHONY: protos
protos: setup-tools ## Generate the Python messages from proto/
	$(BIN)/python scripts/generate_protos.py

.PHONY: fuzz
fuzz: ## Fuzz each parser of hostile input for SECONDS_EACH (needs nightly Rust and cargo-fuzz)
	scripts/fuzz.sh $(SECONDS_EACH)

.PHONY: clean
clean: ## Remove everything that set-up and builds made in the checkout
	rm -rf build target dist .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf python/kata_hybrid/guest/bin python/kata_hybrid/_native.abi3.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: setup-dev setup-tools
setup-dev:
	@$(PYTHON) scripts/setup.py --for dev
setup-tools:
	@$(PYTHON) scripts/setup.py --for tools
