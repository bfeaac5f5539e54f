# Front door: each target runs scripts that do one job each.
#   QEMU_SRC=DIR  take this QEMU checkout or unpacked release as the base
#   JOBS=N        build with N processes

export QEMU_SRC JOBS

all:
	@scripts/install-deps
	@scripts/apply-series
	@scripts/build

demo: all
	@scripts/demo

check:
	-@scripts/install-deps
	@scripts/check

check-series:
	@scripts/check-series

export:
	@scripts/export-series

help:
	@scripts/help

.PHONY: all demo check check-series export help
