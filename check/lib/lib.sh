# SPDX-License-Identifier: GPL-2.0-or-later
#
# What checks share, beside scripts/lib.sh; sourced, not run.
# shellcheck shell=sh

# need PACKAGE...: what this check needs beside what building needs
need() { "$top/scripts/install-deps" "$@" || skip "cannot get the packages $*"; }

# readme BEGIN: the commands in the README that begin so, up to an empty line
readme() {
    sed -n "/^    $1/,/^\$/p" "$top/README.md" |
        sed "s,PATH/patches/[0-9.]*,$patches,g" | grep . ||
        die "README.md has no commands that begin with '$1'."
}

# without_kvm COMMAND...: run it where /dev/kvm cannot be opened, if possible.
# Nested KVM is far slower in these tests than TCG.
without_kvm() {
    # In a chroot "/" may be no mount, and unshare would want to make it private.
    # shellcheck disable=SC2016
    hide='{ mount --make-rprivate / || mount --make-private /dev; } 2>/dev/null &&
        mount --bind /dev/null /dev/kvm && exec "$@"'
    if [ -e /dev/kvm ] &&
       unshare -m --propagation unchanged sh -c "$hide" - true 2>/dev/null; then
        unshare -m --propagation unchanged sh -c "$hide" - "$@"
    else
        "$@"
    fi
}

# migration_test OBJ ARG...: run QEMU's migration tests as built in OBJ
migration_test() (
    cd "$1" || exit
    shift
    export QTEST_QEMU_BINARY=./qemu-system-x86_64 QTEST_QEMU_IMG=./qemu-img
    without_kvm tests/qtest/migration-test --tap "$@"
)
