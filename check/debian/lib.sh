# SPDX-License-Identifier: GPL-2.0-or-later
#
# What check-debian and check-debian-build share; sourced, not run.
# shellcheck shell=sh disable=SC2034,SC2154

need dpkg-dev patch quilt

dir=$out/debian
mkdir -p "$dir"
need_space "$dir" 1500
tmp=$(mktemp -d "$dir/.check.XXXXXX")
at_exit 'rm -rf "$tmp"'

# fetch VERSION: the source package, into $tmp/VERSION.  apt checks all of it.
fetch() {
    mkdir "$tmp/$1"
    upstream=${1#*:}
    # What is there already is not downloaded.
    cp "$cache/sources/${upstream%%[+-]*}"/*.orig.tar.* "$tmp/$1" 2>/dev/null || :
    (cd "$tmp/$1" && apt-get -c "$tmp/apt/apt.conf" -q source --download-only \
        "qemu=$1") >"$tmp/fetch.log" 2>&1 || { cat "$tmp/fetch.log" >&2; return 1; }
}

by_patch=$(readme 'for p in' | grep -v ninja)
by_quilt=$(readme 'cp -R PATH')

# What the series changes or adds
files=$(cd "$patches" && series | xargs sed -n 's,^diff --git a/.* b/,,p' | sort -u)

# same NAME TOOL: whether TOOL has left in $tree what patch leaves in $tree.patch
same() {
    for f in $files; do
        cmp "$tree/$f" "$tree.patch/$f" || die "$2 and patch differ on $1"
    done
}

# take VERSION: put the series on it
take() {
    name="Debian's qemu $1"
    tree=$tmp/$1/qemu
    dpkg-source -x "$tmp/$1"/*.dsc "$tree" >"$tmp/unpack.log" 2>&1 ||
        die "$name cannot be unpacked:" "$(cat "$tmp/unpack.log")"
    their_last=$(tail -n 1 "$tree/.pc/applied-patches")
    theirs=$(wc -l <"$tree/.pc/applied-patches")

    mkdir "$tree.patch"
    for f in $files; do
        [ ! -e "$tree/$f" ] || (cd "$tree" && cp --parents "$f" "$tree.patch")
    done
    (cd "$tree.patch" && eval "$by_patch") >"$tmp/patch.log" ||
        die "patch fails on $name:" "$(tail -n 20 "$tmp/patch.log")"

    (cd "$tree" && eval "$by_quilt")
    quilt_in_tree push -a --fuzz=0
    ours=$(($(wc -l <"$tree/.pc/applied-patches") - theirs))
    [ "$ours" = "$(series | wc -l)" ] ||
        die "of the series, $ours patches are on $name, not $(series | wc -l)."
    offsets=$(grep -c 'succeeded at .*offset' "$tmp/quilt.log") || :
    same "$name" quilt

    # dpkg has its own way to apply what debian/patches/series names.
    quilt_in_tree pop "$their_last"
    (cd "$tree" && dpkg-source --before-build .) >"$tmp/dpkg.log" 2>&1 ||
        die "dpkg-source does not apply the series to $name:" "$(tail -n 20 "$tmp/dpkg.log")"
    same "$name" dpkg-source
    echo "$name: $ours patches behind its $theirs, $offsets hunks with an offset"
}

quilt_in_tree() {
    (cd "$tree" && QUILT_PATCHES=debian/patches quilt --quiltrc - "$@") \
        >"$tmp/quilt.log" 2>&1 ||
        die "quilt $1 fails on $name:" "$(tail -n 20 "$tmp/quilt.log")"
}

# shellcheck disable=SC2046
"$top/scripts/apt-private" "$tmp/apt" deb-src $(base_key suites) ||
    skip "no Debian archive to get the packages from"
# The newest version that is offered, but for backports
versions=$(apt-cache -c "$tmp/apt/apt.conf" showsrc --only-source qemu 2>/dev/null |
    sed -n "s/^Version: \(.*:$release\..*\)/\1/p" | sort -Vu)
stable=$(echo "$versions" | grep -v '~bpo' | tail -n 1)
[ -n "$stable" ] || skip "Debian offers no package of QEMU $release"
fetch "$stable" || skip "Debian's qemu $stable cannot be had"
