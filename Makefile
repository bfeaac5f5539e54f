# SPDX-License-Identifier: GPL-2.0-or-later
#
# The front door: each target runs scripts that do one job each.  Lines that
# begin with ## are what 'make help' says.

export RELEASE QEMU_SRC JOBS

## make               get packages and QEMU, apply the series, build
all:
	@scripts/install-deps
	@scripts/apply-series
	@scripts/build

## make demo          ... and show three postcopy migrations between two QEMUs
demo: all
	@demo/run

## make bench         ... and measure this QEMU, the unpatched one and 10.2
bench: all
	@bench/run

## make check         all checks and tests but those that run only when named
## make check NAMES='A B'
##                    these checks, and what they need
check:
	@check/run $(NAMES)

## make check-NAME    one check, and what it needs; shows all that it says
check-%:
	@check/run $*

## make export        write the branch in build/RELEASE/src back to patches/
export:
	@scripts/export-series

## make clean         remove build/RELEASE, but no work that patches/ has not
clean:
	@scripts/clean

## make help          this
help:
	@sed -n 's/^## \?//p' Makefile
	@check/run --list

##
## RELEASE=10.0       of QEMU: which of patches/ (default: 10.0)
## QEMU_SRC=DIR       use this QEMU checkout or unpacked release
## JOBS=N             build with N processes (default: one per CPU)
##
## The checks, what each takes on two cores, and what it is:
##

.PHONY: all demo bench check export clean help
