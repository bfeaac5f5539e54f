# SPDX-License-Identifier: GPL-2.0-or-later
#
# Names, paths and small functions that the scripts share; sourced, not run.
# shellcheck shell=sh disable=SC2034,SC2154

release=${RELEASE:-10.0}        # of QEMU
top=$(cd "$(dirname "$0")" && pwd)
while [ ! -e "$top/scripts/lib.sh" ]; do top=${top%/*}; done
patches=$top/patches/$release
out=$top/build/$release
src=$out/src
obj=$out/obj
logs=$out/logs
cache=${XDG_CACHE_HOME:-${HOME:-$top/build}/.cache}/postcopy-device
jobs=${JOBS:-$(nproc)}
view_release=10.0               # the view by file is of this one
programs="qemu-system-x86_64 qemu-img qemu-io qemu-nbd
    storage-daemon/qemu-storage-daemon tests/qtest/migration-test"

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
die() {
    name=${0%/run}
    echo "${name##*/}: $1" >&2
    shift
    for l; do echo "  $l" >&2; done
    exit 1
}

# at_exit COMMANDS: also when a signal comes, for which dash runs no EXIT trap
at_exit() {
    # shellcheck disable=SC2064
    trap "$1" EXIT
    trap 'exit 1' HUP INT TERM
}

# A check that cannot be made says why.
skip() { echo "$*"; exit 77; }

[ -e "$patches/BASE" ] || die "there is no series for QEMU $release." \
    "RELEASE is one of: $(cd "$top/patches" && echo *)"

# base_key KEY: a value from BASE
base_key() { sed -n "s/^$1: *//p" "$patches/BASE"; }

# The parts of the series, in order
parts() { (cd "$patches" && for d in [0-9]*/; do echo "${d%/}"; done); }

# The series, one patch a line, with the name of its part in front
series() { sed 's/[[:space:]]*#.*//; /^$/d' "$patches/series"; }

# The subjects that the cover letter of PART has below the line that begins so;
# export-series writes them there.
made_below="What follows is written by 'make export'"
listed() { sed "1,/^$made_below/d; s/^  //" "$patches/$1/cover-letter.txt"; }

# commits: "PART COMMIT SUBJECT" for each commit of the branch.  Its part is the
# one that lists its subject, else the one of the commit in front of it.
commits() {
    now=
    qgit log --reverse --format='%H %s' base..series | while read -r commit subject; do
        before=$now
        for part in $(parts); do
            : "${now:=$part}"
            ! listed "$part" | grep -Fxq -e "$subject" || now=$part
        done
        # Names of parts begin with their numbers.
        [ -z "$before" ] || [ "${now%%-*}" -ge "${before%%-*}" ] ||
            die "'$subject' is listed in part $now, but is behind a commit of $before." \
                "Move the commit, or its line in patches/$release/*/cover-letter.txt."
        echo "$now $commit $subject"
    done
}

# view_names: the names that a view of the patches has, none twice
view_names() {
    (cd "$patches" && series | xargs -r awk '
        /^diff --git a\// { name = substr($0, index($0, " b/") + 3); all[name] }
        /^new file mode / { added[name] }
        END { for (f in all) print f (f in added ? "" : ".diff") }') | sort
}

# What the patches are, as one word
patches_id() {
    { cat "$patches/series" && (cd "$patches" && series | xargs -r cat); } |
        sha256sum | cut -d ' ' -f 1
}

# qgit ARG...: git in the QEMU tree
qgit() { git -C "$src" "$@"; }

# unsaved: whether the QEMU tree has work that patches/ has not
unsaved() {
    [ "$(qgit symbolic-ref -q HEAD || :)" != refs/heads/series ] ||
        [ -n "$(qgit status --porcelain)" ] ||
        [ "$(qgit rev-parse -q --verify refs/series/applied || :)" != "$(qgit rev-parse series)" ]
}

# need_space DIR MIB: stop early rather than with a disk full
need_space() {
    free=$(($(df -Pk "$1" | awk 'NR == 2 { print $4 }') / 1024))
    [ "$free" -ge "$2" ] || die "$1 has $free MiB free, $2 MiB are needed." \
        "Make room there, then run the same command again."
}

# keep FROM DIR: keep the files of FROM in DIR, with their checksums
keep() {
    sums=$(cd "$1" && sha256sum -- *) || return
    printf '%s\n' "$sums" >"$1/SHA256SUMS"
    mkdir -p "${2%/*}"
    rm -rf "$2"
    mv "$1" "$2"
}

# kept DIR: whether they are there, and whole
kept() { (cd "$1" && sha256sum --status -c SHA256SUMS) 2>/dev/null; }

# commit_base DIR: commit QEMU there as the base.  One identity and date: equal
# input gives equal commits on every machine.
commit_base() {
    git -C "$1" add -A -f
    GIT_AUTHOR_NAME=series GIT_AUTHOR_EMAIL=series@localhost \
        GIT_COMMITTER_NAME=series GIT_COMMITTER_EMAIL=series@localhost \
        GIT_AUTHOR_DATE='2025-04-22T00:00:00Z' GIT_COMMITTER_DATE='2025-04-22T00:00:00Z' \
        git -C "$1" commit -q --no-verify -m "QEMU $(cat "$1/VERSION")"
}

# What the base is made of: the commit or release in QEMU_SRC, or Debian's
base_origin() {
    [ -n "${QEMU_SRC:-}" ] || { echo "newest release"; return; }
    [ -e "$QEMU_SRC/VERSION" ] && [ -e "$QEMU_SRC/migration/migration.c" ] ||
        die "QEMU_SRC=$QEMU_SRC is no QEMU source tree." \
            "Name the top directory of a QEMU checkout or unpacked release."
    if [ -e "$QEMU_SRC/.git" ]; then
        echo "commit $(git -c safe.directory='*' -C "$QEMU_SRC" rev-parse HEAD)"
    else
        echo "release $(cat "$QEMU_SRC/VERSION") in $(cd "$QEMU_SRC" && pwd)"
    fi
}
