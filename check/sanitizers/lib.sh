# SPDX-License-Identifier: GPL-2.0-or-later
#
# What check-sanitizers and check-asan share; sourced, not run.
# shellcheck shell=sh disable=SC2034,SC2154

group=/x86_64/migration/postcopy-device

# build NAME COMPILER ARG...: QEMU in $out/NAME.  What no test here needs is
# left out; stacks need line numbers, not all that a debugger needs.
build() {
    name=$1 cc=$2
    shift 2
    need_space "$out" 1500
    "$top/scripts/configure" "$src" "$out/$name" --cc="$cc" "$@" \
        --without-default-features --disable-debug-info -Doptimization=1 \
        --disable-werror
    note "building for $name"
    ninja -C "$out/$name" -j "$jobs" qemu-system-x86_64 qemu-img \
        tests/qtest/migration-test || die "QEMU does not build for $name"
}

# fixed COMMAND...: run it at fixed addresses, if possible.  A sanitizer wants
# some for itself, and a random layout may have given them away.
fixed() {
    if setarch -R true 2>/dev/null; then setarch -R "$@"; else "$@"; fi
}

# listen DIR: what the sanitizers say from here on goes to DIR, as the tests
# hide what QEMU prints.  A leak or a race does not change what QEMU exits with:
# the tests go on, and judge finds it.
listen() {
    rm -rf "$1"
    mkdir -p "$1"
    export ASAN_OPTIONS="log_path=$1/report:handle_sigill=1:fast_unwind_on_malloc=0"
    export LSAN_OPTIONS=exitcode=0
    # The tests fork with RCU's thread running, to start QEMU.
    export TSAN_OPTIONS="log_path=$1/report:log_exe_name=1:exitcode=0:die_after_fork=0"
}

judge() {
    "$top/check/sanitizers/reports" "$1" "$src" "$top/check/sanitizers/known"
}

# canary NAME COMPILER FLAG WHAT...: whatever is wrong there must be found
canary() {
    name=$1 cc=$2 flag=$3
    shift 3
    # shellcheck disable=SC2086
    "$cc" -g1 $flag -pthread -o "$out/$name/canary" "$top/check/sanitizers/canary.c"
    for what; do
        listen "$logs/$name.canary"
        fixed "$out/$name/canary" "$what" || :
        ! said=$(judge "$logs/$name.canary") ||
            die "$name does not find '$what' in check/sanitizers/canary.c" "$said"
    done
}

# run NAME GROUP...: run the tests below each GROUP, and judge
run() {
    name=$1
    shift
    listen "$logs/$name"
    result=0
    for tests; do
        fixed "$top/check/lib/run-migration-tests" "$out/$name" --full "$tests/" || result=1
    done
    judge "$logs/$name" || result=1
    return $result
}

# with_asan GROUP...: build with AddressSanitizer and UBSan, and run tests
with_asan() {
    # What UBSan finds is trapped, and AddressSanitizer reports that: gcc's UBSan
    # writes no log of its own beside it.
    trapped=-fsanitize-undefined-trap-on-error
    mkdir -p "$logs"
    build asan gcc --enable-asan --enable-ubsan \
        --extra-cflags="-g1 -fno-omit-frame-pointer $trapped"
    canary asan gcc "-fsanitize=address,undefined $trapped" leak shift free
    run asan "$@"
}
