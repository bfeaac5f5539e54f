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

bench: all
	@scripts/bench

check:
	-@scripts/install-deps
	@scripts/check

check-series:
	@scripts/check-series

check-model:
	@scripts/check-model

check-sanitizers: all
	@scripts/check-sanitizers full

check-libvirt: all
	@scripts/check-libvirt || [ $$? = 77 ]

check-interop: all
	@scripts/check-interop || [ $$? = 77 ]

check-linux: all
	@scripts/check-linux || [ $$? = 77 ]

check-debian:
	-@scripts/install-deps debootstrap
	@scripts/check-debian build || [ $$? = 77 ]

export:
	@scripts/export-series

help:
	@scripts/help

.PHONY: all demo bench check check-series check-model check-sanitizers \
	check-libvirt check-interop check-linux check-debian export help
