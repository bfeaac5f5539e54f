#!/usr/bin/python3
#
# Migrates from one source to many destinations, each of which fails in
# postcopy-device.  Neither files nor threads may be left behind by a failure,
# on the destination as little as on the source, and the source's heap must not
# grow with their number.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from statistics import median

sys.dont_write_bytecode = True          # the sources stay as they are
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '../lib'))
from twoqemu import (                                   # noqa: E402
    ENDS, Fault, Halt, MIB, Relay, Side, await_guest, build_guest, check_running,
    deadline, guest_args, parse_args, run_test, start_migration)

PARSER = argparse.ArgumentParser(
    description='Fail to migrate again and again from one source.')
PARSER.add_argument('--failures', type=int, default=100,
                    help='how often (default: %(default)s)')
OPTS = parse_args(PARSER)

# Postcopy starts when this much is sent.  The rings of the disk, at the end of
# the guest's memory, are not on the destination then.
SENT_BEFORE_POSTCOPY = 2 * MIB

# These come and go as the main loop needs them.
POOL = 'worker'

# This one is always there.  QEMU makes it before it has read that threads are to
# have names: unless it first runs later than that, it has the first thread's.
RCU = 'call_rcu'

# The first failures leave behind what the next ones use again, such as caches.
WARM_UP = 24
# From then on the heap is looked at after so many failures each, the last of them
# always one of the same kind.  Once in a while something large comes or goes that
# the failures have no part in, so the median of the differences counts.
STEP = 12
# What one failure may add: less than an error and its text would be
BYTES_PER_FAILURE = 64

WAYS = ('kill', 'cut', 'load')


def open_files(side):
    """What it has open: a list, sorted"""
    path = f'/proc/{side.vm.get_pid()}/fd'
    found = []
    for fd in os.listdir(path):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f'{path}/{fd}').split(':[')[0])
    return sorted(found)


def threads(side):
    """The names of its threads, sorted"""
    path = f'/proc/{side.vm.get_pid()}/task'
    found = []
    for thread in os.listdir(path):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            with open(f'{path}/{thread}/comm', encoding='utf-8') as comm:
                found.append(comm.read().strip())
    return sorted(found[0] if name == RCU else name
                  for name in found if name != POOL)


def build_heap(tmp):
    """Returns a wrapper for a QEMU that tells what of its heap is in use."""
    lib = os.path.join(tmp, 'heap.so')
    subprocess.run(['gcc', '-shared', '-fPIC', '-Wall', '-Werror', '-o', lib,
                    os.path.join(HERE, 'heap.c')], check=True)
    # What a thread keeps for itself would count as in use.
    return ('env', f'LD_PRELOAD={lib}', f'HEAP={tmp}/heap',
            'GLIBC_TUNABLES=glibc.malloc.tcache_count=0')


def heap(side, tmp):
    """Bytes of the heap that are in use, when RCU has freed what it was given"""
    least, since = None, 0
    while least is None or time.monotonic() - since < 0.5:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(os.path.join(tmp, 'heap'))
            now = int(sock.makefile().read())
        if least is None or now < least:
            least, since = now, time.monotonic()
        side.next_event(0.05)
    return least


def leftovers(before, now):
    """What NOW has in addition, and lacks, as text"""
    more, less = list(now), []
    for name in before:
        if name in more:
            more.remove(name)
        else:
            less.append(name)
    return ', '.join(['+' + name for name in more] +
                     ['-' + name for name in less])


def check_left(what, look, side, before):
    """LOOK must find again what it found BEFORE, soon."""
    end = time.monotonic() + 20
    while (found := look(side)) != before:
        if time.monotonic() > end:
            raise Fault(f'GROWTH: {what} of the {side.name}: '
                        f'{leftovers(before, found)}')
        side.next_event(0.05)


def check_heap(used):
    """USED has the bytes after each STEP."""
    if len(used) < 4:
        print('too few failures to tell about the heap')
        return
    growth = median(b - a for a, b in zip(used, used[1:])) / STEP
    print(f'the heap grows by {growth:.0f} bytes with each failure')
    if growth > BYTES_PER_FAILURE:
        raise Fault('GROWTH: that is too much')


def fail(number, source, args, tmp):
    """One failure.  Returns how the destination failed."""
    way = WAYS[number % len(WAYS)]
    preempt = number // len(WAYS) % 2 == 1
    destination = Side('destination', tmp, OPTS.qemu, args +
                       ['-incoming', 'defer'] +
                       (['-device', 'virtio-rng-pci'] if way != 'load' else []))
    incoming = os.path.join(tmp, 'incoming')
    with contextlib.ExitStack() as stack:
        stack.callback(destination.vm.shutdown, hard=True)
        destination.launch()
        for side in (source, destination):
            side.enable()
            side.vm.cmd('migrate-set-capabilities', capabilities=[
                {'capability': 'postcopy-preempt', 'state': preempt}])
        before = open_files(destination), threads(destination)
        relay = (Relay if way == 'load' else Halt)(
            os.path.join(tmp, 'relay'), incoming)
        stack.callback(os.unlink, relay.path)
        stack.callback(relay.close)
        source.report.clear()
        start_migration(source, destination, 'unix:' + relay.path,
                        SENT_BEFORE_POSTCOPY, exit_on_error=False)
        if way != 'load':
            while not relay.reached.wait(0.05):
                source.next_event(0.01)
        if way == 'kill':
            destination.kill()
        if way != 'load':
            relay.close()
        end = source.await_event(*ENDS)
        if source.states()[-2:] != ['postcopy-device', 'failed']:
            raise Fault(f'with "{way}" the source went ' +
                        ' > '.join(source.states()) + ': ' +
                        source.vm.cmd('query-migrate').get('error-desc', ''))
        source.await_event('RESUME', since=end)
        if way != 'kill':
            destination.await_event('failed')
            check_left('files', open_files, destination, before[0])
            check_left('threads', threads, destination, before[1])
    return way + (' with preempt' if preempt else '')


def run(tmp):
    """Returns the exit status."""
    image, expected = build_guest(tmp)
    # Only then do the threads have names.
    args = guest_args(image) + ['-name', 'debug-threads=on']
    source = Side('source', tmp, OPTS.qemu, args +
                  ['-device', 'virtio-rng-pci'], build_heap(tmp))
    used = []
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(source.vm.shutdown, hard=True)
            with deadline('start', 60):
                source.launch()
                source.enable()
                await_guest(source)
            before = open_files(source), threads(source)
            source.vm.cmd('migrate-set-parameters', max_bandwidth=64 * MIB,
                          max_postcopy_bandwidth=MIB)
            for number in range(OPTS.failures):
                with deadline(f'failure {number + 1}', 60):
                    way = fail(number, source, args, tmp)
                    check_left('files', open_files, source, before[0])
                    check_left('threads', threads, source, before[1])
                    look = number >= WARM_UP and number % STEP == 0
                    if look:
                        used.append(heap(source, tmp))
                print(f'{number + 1:4}  {way:18}  {len(before[0])} files, '
                      f'{len(before[1])} threads'
                      + (f', heap {used[-1]} bytes' if look else ''), flush=True)
            with deadline('check of the guest', 60):
                print(check_running(source, expected, 0))
            check_heap(used)
        except Fault as err:
            print(f'BAD: {err}')
            return 1
    return 0


sys.exit(run_test('growth', run))
