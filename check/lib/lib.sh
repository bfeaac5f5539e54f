# SPDX-License-Identifier: GPL-2.0-or-later
#
# What checks share, beside scripts/lib.sh; sourced, not run.
# shellcheck shell=sh disable=SC2034,SC2154

# need PACKAGE...: what this check needs beside what building needs
need() { "$top/scripts/install-deps" "$@" || skip "cannot get the packages $*"; }

# tools NAME...: what this check needs of the machine
tools() { for t; do command -v "$t" >/dev/null || skip "there is no $t here"; done; }

# debian_root SUITE DEBS ROOT PACKAGE...: have these packages of SUITE, and all that
# they need, unpacked in ROOT, for amd64.  They are kept in DEBS in the user's cache;
# who removes that gets newer ones.  If it cannot be done, it prints why.
debian_root() (
    suite=$1 debs=$cache/$2 root=$3 new=$3.new
    shift 3
    at_exit 'rm -rf "$new"'
    rm -rf "$new"
    mkdir -p "$new/root"
    if ! kept "$debs" || [ "$(cat "$debs/packages" 2>/dev/null)" != "$*" ]; then
        need_space "$out" 2000 2>&1
        note "downloading $* of Debian's $suite"
        {
            "$top/scripts/apt-private" "$new/apt" deb "${suite%-backports}" "$suite" &&
            mkdir -p "$new/apt/cache/archives/partial" &&
            # With nothing installed, nothing is left out.
            : >"$new/apt/status" &&
            apt-get -c "$new/apt/apt.conf" -oDir::State::status="$new/apt/status" \
                -q -y --no-install-recommends -t "$suite" --download-only \
                install "$@" >"$new/log" 2>&1 &&
            rm -rf "$new/apt/cache/archives/partial" "$new/apt/cache/archives/lock" &&
            echo "$*" >"$new/apt/cache/archives/packages" &&
            keep "$new/apt/cache/archives" "$debs"
        } || { echo "Debian's archive does not give it"; exit 1; }
    fi
    ! cmp -s "$debs/SHA256SUMS" "$root.debs" || exit 0
    note "unpacking $* of Debian's $suite"
    for deb in "$debs"/*.deb; do
        dpkg-deb -x "$deb" "$new/root" ||
            { echo "it cannot be unpacked from $debs"; exit 1; }
    done
    rm -rf "$root" "$root.debs"
    mv "$new/root" "$root" && cp "$debs/SHA256SUMS" "$root.debs"
)

# readme BEGIN: the commands in the README that begin so, up to an empty line
readme() {
    sed -n "/^    $1/,/^\$/p" "$top/README.md" |
        sed "s,PATH/patches/[0-9.]*,$patches,g" | grep . ||
        die "README.md has no commands that begin with '$1'."
}

# second_tree DIR: $work is DIR, with a second tree of QEMU in src, until the end
second_tree() {
    work=$1
    need_space "$out" 1500
    at_exit 'rm -rf "$work"; qgit worktree prune'
    rm -rf "$work"
    qgit worktree prune
    mkdir -p "$work"
    qgit worktree add -q --detach "$work/src" base
}

# build_at COMMIT: build that in $work/obj
build_at() {
    what=$(qgit show -s --format=%s "$1")
    note "$what"
    git -C "$work/src" checkout -q --detach "$1"
    "$top/scripts/configure" "$work/src" "$work/obj"
    # shellcheck disable=SC2086
    ninja -C "$work/obj" -j "$jobs" $programs || die "does not build after: $what"
}

# smoke: run the smoke tests there
smoke() {
    "$top/check/lib/run-migration-tests" "$work/obj" /x86_64/migration/ ||
        die "the smoke tests fail after: $what"
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

# migration_test OBJ ARG...: run QEMU's migration tests as built in OBJ, with KVM
# if $with_kvm is set
migration_test() (
    cd "$1" || exit
    shift
    export QTEST_QEMU_BINARY=./qemu-system-x86_64 QTEST_QEMU_IMG=./qemu-img PYTHON=/usr/bin/python3
    hide=without_kvm
    [ -z "${with_kvm-}" ] || hide=
    $hide tests/qtest/migration-test --tap "$@"
)

# huge_pages N: have N free ones of 2 MiB until the end, if that can be
huge_pages() {
    pages=/sys/kernel/mm/hugepages/hugepages-2048kB
    had=$(cat $pages/nr_hugepages) && [ -w $pages/nr_hugepages ] || return 0
    need=$(($1 - $(cat $pages/free_hugepages)))
    if [ $need -gt 0 ]; then
        at_exit "echo $had >$pages/nr_hugepages"
        echo $((had + need)) >$pages/nr_hugepages
        # If there are some only, the tests would get into each other's way.
        [ "$(cat $pages/free_hugepages)" -ge "$1" ] || echo "$had" >$pages/nr_hugepages
    fi
}
