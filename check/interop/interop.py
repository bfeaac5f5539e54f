#!/usr/bin/python3
#
# Migrates a guest by postcopy between the QEMU to test and others, both ways,
# and lets the switchover fail.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import argparse
import contextlib
import glob
import os
import subprocess
import sys
import time

sys.dont_write_bytecode = True          # the sources stay as they are
sys.path.insert(0, os.path.join(os.path.dirname(__file__), '../lib'))
from twoqemu import (                                   # noqa: E402
    BITMAP_NODE, ENDS, Fault, Halt, MIB, Relay, Side, await_guest,
    build_guest, check_memory, check_running, deadline, guest_args,
    holds, parse_args, precopy_with_nothing_left, run_test,
    start_migration, timeline)


def name_and_value(text):
    name, _, value = text.partition('=')
    return name, value


PARSER = argparse.ArgumentParser(
    description='Migrate between the QEMU to test and others.')
PARSER.add_argument('--peer', action='append', default=[], metavar='NAME=PATH',
                    type=name_and_value,
                    help='another QEMU, or a root with one and its libraries')
PARSER.add_argument('--skip', action='append', default=[],
                    metavar='NAME=REASON', type=name_and_value,
                    help='a peer that is not there, and why')
OPTS = parse_args(PARSER)

from qemu.qmp import QMPError                           # noqa: E402

MACHINE = 'pc-i440fx-7.2'               # all of them have it
SENT_BEFORE_POSTCOPY = 8 * MIB

CASES = {
    'success': 'all goes well',
    'cut': 'the link breaks in the middle of the package',
    'kill': 'the destination is killed as it receives the package',
    'load': 'the destination lacks a device',
    'sent': 'the same, when all of a paused guest has been sent',
}

class Peer:
    """A QEMU, and how it is run"""

    def __init__(self, path):
        self.qemu, self.wrapper, self.args = path, (), []
        if os.path.isdir(path):
            self._use_root(path)
        version = subprocess.run([*self.wrapper, self.qemu, '--version'],
                                 stdout=subprocess.PIPE, text=True, check=True)
        self.version = version.stdout.split()[3]

    def _use_root(self, root):
        libs = [os.path.join(root, lib, 'x86_64-linux-gnu')
                for lib in ('lib', 'usr/lib')]
        loader = [path for lib in libs
                  for path in glob.glob(lib + '/ld-linux-x86-64.so.2')][0]
        self.qemu = os.path.join(root, 'usr/bin/qemu-system-x86_64')
        self.wrapper = ('env', f'QEMU_MODULE_DIR={libs[1]}/qemu', loader,
                        '--library-path', ':'.join(libs))
        for data in 'seabios', 'qemu':
            self.args += ['-L', os.path.join(root, 'usr/share', data)]

    def side(self, name, tmp, args):
        return Side(name, tmp, self.qemu, args + self.args, self.wrapper)

    def holds(self, tmp):
        return holds(tmp, self.qemu, self.args, self.wrapper)


def await_end(source, destination, case, relay):
    """Until the guest's place is decided"""
    if isinstance(relay, Halt):
        relay.reached.wait()
        if case == 'kill':
            destination.kill()
        relay.close()
    if case == 'success':
        for side in source, destination:
            side.await_event(*ENDS)
        destination.await_event('RESUME')
        return
    source.await_event(*ENDS)
    destination.exited.wait(10)
    # An old source may say "failed" and leave the guest stopped.
    late = time.monotonic() + 10
    while (source.states()[-1] == 'failed' and time.monotonic() < late
           and case != 'sent' and ('RESUME', 'RESUME') not in source.seen()):
        source.next_event(0.5)


def judge(source, destination, case, expected, at_least, patched_source):
    """Returns what has become of the guest, if that is as good as can be."""
    if case == 'success':
        if source.states()[-1] != 'completed':
            raise Fault(f'the source says {source.states()[-1]}')
        if source.run_state() == 'running':
            raise Fault('SPLIT: the guest runs on both sides')
        at_least = source.counter()
        check_running(destination, expected, at_least)
        if source.counter() != at_least:
            raise Fault('SPLIT: guest memory goes on changing on the source')
        return 'runs at the destination'
    if ('RESUME', 'RESUME') in destination.seen():
        raise Fault('SPLIT: the guest has run on the destination as well')
    # 1 is what QEMU exits with when it has reported an error.  Old ones may
    # crash or hang then; what counts is the guest.
    code = destination.vm.exitcode()
    if case != 'kill' and code != 1 and not patched_source:
        raise Fault(f'the destination has not ended with 1 but {code}')
    state, status = source.run_state(), source.states()[-1]
    if case == 'sent' and (state, status) == ('paused', 'failed'):
        source.vm.cmd('cont')
        state = source.run_state()
    if state == 'running':
        check_running(source, expected, at_least)
        return f'back at the source ({status})'
    if state != 'gone':
        check_memory(source, expected)
    if patched_source:
        raise Fault(f'LOST: the source is {state}, the migration {status}')
    return f'lost (source {state}, {status})'


def run_case(case, tmp, guest, peers, patched):
    """Returns what has become of the guest."""
    image, expected = guest
    all_sent = case == 'sent'
    # Its state does not depend on the guest, and is loaded by all versions.
    watchdog = ['-device', 'i6300esb']
    args = ['-machine', MACHINE] + guest_args(image) + BITMAP_NODE
    source = peers[0].side('source', tmp, args + watchdog)
    destination = peers[1].side('destination', tmp, args + (
        [] if case in ('load', 'sent') else watchdog) + ['-incoming', 'defer'])
    paths = os.path.join(tmp, 'relay'), os.path.join(tmp, 'incoming')
    with contextlib.ExitStack() as stack:
        stack.enter_context(deadline('this case', 90))
        for side in source, destination:
            stack.callback(side.vm.shutdown, hard=True)
            side.launch()
            side.enable(*(['dirty-bitmaps'] if all_sent else []))
        await_guest(source)
        source.vm.cmd('stop')
        at_least = check_memory(source, expected)
        if not all_sent:
            source.vm.cmd('cont')
        source.vm.cmd('migrate-set-parameters', max_bandwidth=32 * MIB)
        if all_sent:
            precopy_with_nothing_left(source)
        relay = {'cut': Halt, 'kill': Halt}.get(case, Relay)(*paths)
        stack.callback(relay.close)
        source.note_events()
        source.report.clear()
        start = time.time()
        try:
            start_migration(source, destination, 'unix:' + relay.path,
                            None if all_sent else SENT_BEFORE_POSTCOPY)
            await_end(source, destination, case, relay)
            for side in source, destination:
                side.note_events()
            if peers[0] is patched and ('postcopy-device'
                                        not in source.states()):
                raise Fault('the source was not in postcopy-device')
            return judge(source, destination, case, expected, at_least,
                         peers[0] is patched)
        except Fault:
            for side in source, destination:
                with contextlib.suppress(Fault, QMPError, OSError):
                    side.note_events()
            print('\n'.join(timeline(start, source, destination)))
            raise


def run_peer(name, peer, patched, tmp, guest):
    """Returns (peer, direction, case, verdict) of each case."""
    rows = []
    for direction, pair in (('to', (patched, peer)),
                            ('from', (peer, patched))):
        for case in CASES:
            if case == 'sent' and direction == 'from':
                continue        # an old source loses the guest, or hangs
            case_tmp = os.path.join(tmp, f'{name}-{direction}-{case}')
            os.mkdir(case_tmp)
            try:
                verdict = run_case(case, case_tmp, guest, pair, patched)
            except (Fault, QMPError, OSError) as err:
                verdict = f'FAILED: {type(err).__name__}: {err}'
            row = f'{peer.version} ({name})', direction, case, verdict
            print(f'{direction:<4} {row[0]}, {case}: {verdict}', flush=True)
            rows.append(row)
    return rows


def run_all(tmp):
    """Returns the exit status."""
    guest = build_guest(tmp)
    patched = Peer(OPTS.qemu)
    print(f'{OPTS.qemu} is QEMU {patched.version}; machine {MACHINE}')
    if not patched.holds(tmp):
        raise Fault('it was built without the series')
    for case, title in CASES.items():
        print(f'   {case:<8} {title}')
    skipped, rows = OPTS.skip, []
    for name, path in OPTS.peer:
        try:
            peer = Peer(path)
        except (OSError, IndexError, subprocess.CalledProcessError) as err:
            skipped.append((name, f'it does not run: {err}'))
            continue
        if peer.holds(tmp):
            raise Fault(f'the peer {name} was built with the series')
        rows += run_peer(name, peer, patched, tmp, guest)

    print('\nWhat becomes of the guest')
    for peer, direction, case, verdict in rows:
        print(f'{peer:<30} {direction:<5} {case:<8} {verdict}')
    for name, reason in skipped:
        print(f'{name:<30} skipped: {reason}')
    failed = sum(verdict.startswith('FAILED') for *_, verdict in rows)
    print(f'{len(rows) - failed} passed, {failed} failed, '
          f'{len(skipped)} skipped')
    return 1 if failed else 0 if rows else 77


sys.exit(run_test('interop', run_all))
