# The few commands a newcomer needs; `make` alone lists them.

target := $(or $(CARGO_TARGET_DIR),target)

# Each integration test is a process of its own, in namespaces of its own. nextest starts a process a
# test, and the runner puts it into its namespaces.
runner := $(CURDIR)/integration/in-namespace
integration: export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER := $(runner)
integration: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER := $(runner)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build demo check setup lint unit integration bench docs

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

build: ## the weft command, optimised
	cargo build --release

demo: ## build it, and watch a whole mesh work on this machine
	@integration/setup demo
	@$(MAKE) --no-print-directory build
	$(target)/release/weft demo

check: setup lint unit integration ## everything a change must pass; CI runs this

setup: ## install what the checks need and this machine lacks
	@integration/setup

lint: ## formatting and clippy
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

unit: ## tests of every crate, and the examples in the documentation
	cargo nextest run --workspace --exclude weft-integration
	cargo test --workspace --doc

integration: setup ## whole meshes, each in its own network namespaces; and the house rules
	cargo build
	cargo nextest run -p weft-integration

docs: export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER := $(runner)
docs: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER := $(runner)
docs: ## write the generated pages of docs/
	cargo build
	WEFT_UPDATE_DOCS=1 cargo nextest run -p weft-integration --test metrics_pages --test reference_pages

# The benchmark makes network namespaces and sets priorities, so it needs root.
ROUNDS ?= 3
SECONDS ?= 2
TESTS ?= all
PEERS ?= all
bench: ## compare weft with its peers on this machine (root; ROUNDS, SECONDS, TESTS, PEERS)
	@integration/setup bench
	@$(MAKE) --no-print-directory build
	WEFT=$(abspath $(target))/release/weft BENCH_BUILD=$(abspath $(target))/bench-load \
		$(target)/venv/bin/python integration/bench/bench.py --nice -15 --rounds $(ROUNDS) --seconds $(SECONDS) \
		--tests '$(TESTS)' --peers '$(PEERS)' --work $(target)/bench-work --out $(target)/bench-results.json
	$(target)/venv/bin/python integration/bench/report.py $(target)/bench-results.json
