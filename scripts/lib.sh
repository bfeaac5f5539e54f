# Names, paths and small functions that the scripts share; sourced, not run.
# shellcheck shell=sh disable=SC2034

release=10.0
top=$(cd "$(dirname "$0")/.." && pwd)
patches=$top/patches/$release
out=$top/build/$release
src=$out/src
obj=$out/obj
logs=$out/logs
cache=${XDG_CACHE_HOME:-${HOME:-$top/build}/.cache}/postcopy-device
jobs=${JOBS:-$(nproc)}

# Patches, views and commits must not depend on the user's settings.
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null GIT_PAGER=cat
export LC_ALL=C.UTF-8
umask 022

if [ -d /usr/lib/ccache ]; then
    # The tree of check-bisect shares what the main one has compiled, and so do
    # other clones: no path of this one gets into the cache.
    PATH=/usr/lib/ccache:$PATH
    export PATH CCACHE_NOHASHDIR=1 CCACHE_BASEDIR="$out"
fi

note() { echo "== $*" >&2; }
die() { echo "${0##*/}: $1" >&2; shift; for l; do echo "  $l" >&2; done; exit 1; }

# A check that cannot be made says why.
skip() { echo "$*"; exit 77; }

# base_key KEY: a value from patches/10.0/BASE
base_key() { sed -n "s/^$1: *//p" "$patches/BASE"; }

# The series, one patch name a line
series() { sed 's/[[:space:]]*#.*//; /^$/d' "$patches/series"; }

# What the patches are, as one word
patches_id() {
    { cat "$patches/series" && (cd "$patches" && series | xargs cat); } |
        sha256sum | cut -d ' ' -f 1
}

# qgit ARG...: git in the QEMU tree
qgit() { git -C "$src" "$@"; }

# need_space DIR MIB: stop early rather than with a disk full
need_space() {
    free=$(($(df -Pk "$1" | awk 'NR == 2 { print $4 }') / 1024))
    [ "$free" -ge "$2" ] || die "$1 has $free MiB free, $2 MiB are needed." \
        "Make room there, then run the same command again."
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
