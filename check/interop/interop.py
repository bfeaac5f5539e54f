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
import tempfile
import time

sys.dont_write_bytecode = True          # the sources stay as they are
sys.path.insert(0, os.path.join(os.path.dirname(__file__), '../lib'))
from twoqemu import (                                   # noqa: E402
    BITMAP_NODE, ENDS, Fault, Halt, MIB, RP_SHUT, Relay, Side, Withhold,
    await_guest, build_guest, check_memory, check_running, deadline,
    guest_args, holds, loaded, parse_args, precopy_with_nothing_left, run_test,
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
    'release-ram': 'the same, with release-ram',
    'kill': 'the destination is killed as it receives the package',
    'kill-sent': 'the same, when all of a paused guest has been sent',
    'load': 'the destination lacks a device',
    'load-sent': 'the same, when all of a paused guest has been sent',
    'pong': 'the link breaks as the destination reports that it is ready',
    'shut': 'the link breaks at the end, before the source knows of it',
}
MOVES = 'success', 'shut'               # and the guest stays there


class Crash(Fault):
    """A QEMU with the series has ended in another way than it should"""


class Peer:
    """A QEMU, and how it is run"""

    def __init__(self, name, path, tmp):
        self.qemu, self.wrapper, self.args = path, (), []
        if os.path.isdir(path):
            self._use_root(path)
        version = subprocess.run([*self.wrapper, self.qemu, '--version'],
                                 stdout=subprocess.PIPE, text=True, check=True)
        self.name = f'{version.stdout.split()[3]} ({name})'
        self.patched = holds(tmp, self.qemu, self.args, self.wrapper)

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


def make_relay(case, *paths):
    if case in ('cut', 'release-ram', 'kill', 'kill-sent'):
        return Halt(*paths)
    if case == 'pong':
        return Withhold(*paths, loaded)
    if case == 'shut':
        return Withhold(*paths, lambda kind, body: kind == RP_SHUT)
    return Relay(*paths)


def await_end(source, destination, case, relay):
    """Until the guest's place is decided"""
    if case not in ('success', 'load', 'load-sent'):
        # An old source does not ask whether the destination is ready
        while not relay.reached.wait(0.05):
            if source.next_event(0.05) in ENDS:
                return
        if case.startswith('kill'):
            destination.kill()
        relay.close()
    source.await_event(*ENDS)
    if case == 'success':
        destination.await_event(*ENDS)
    if case in MOVES:
        destination.await_event('RESUME')
        return
    if case != 'pong' and not destination.exited.wait(10):
        destination.kill()          # an old one that hangs
    # An old source may say "failed" and leave the guest stopped.
    late = time.monotonic() + 10
    while (source.states()[-1] == 'failed' and time.monotonic() < late
           and not case.endswith('-sent')
           and ('RESUME', 'RESUME') not in source.seen()):
        source.next_event(0.5)


def recover(source, destination):
    uri = 'unix:' + os.path.join(destination.tmp, 'recover')
    # pylint: disable=protected-access
    reply = destination.vm._qmp.cmd_obj({
        'exec-oob': 'migrate-recover', 'id': 'recover',
        'arguments': {'uri': uri}})
    if 'error' in reply:
        raise Fault(f'migrate-recover: {reply["error"]["desc"]}')
    before = len(source.report)
    source.vm.cmd('migrate', uri=uri, resume=True)
    source.await_event(*ENDS, since=before)
    if source.states()[-1] != 'completed':
        raise Fault(f'the recovery is {source.states()[-1]}')


def judge(source, destination, case, expected, at_least, peers):
    """Returns what has become of the guest, if that is as good as can be."""
    # It reports an error, and ends.  An old one may crash then.
    if (peers[1].patched and destination.exited.is_set()
            and not case.startswith('kill')
            and destination.vm.exitcode() != 1):
        raise Crash('the destination has ended with '
                    f'{destination.vm.exitcode()}')
    status = source.states()[-1]
    if case.endswith('-sent') and (source.run_state(), status) == ('paused',
                                                                   'failed'):
        source.vm.cmd('cont')
    runs = [side for side in (source, destination)
            if side.run_state() == 'running']
    if len(runs) == 2:
        verdict = f'runs on both sides ({status})'
        if peers[0].patched:
            raise Fault(verdict)
        return verdict
    if runs == [source]:
        if ('RESUME', 'RESUME') in destination.seen():
            raise Fault('it has run on the destination as well')
        if case in MOVES:
            raise Fault(f'it runs at the source ({status})')
        check_running(source, expected, at_least)
        return f'back at the source ({status})'
    if runs == [destination]:
        if case not in (*MOVES, 'pong'):
            raise Fault('it runs at the destination')
        if destination.states()[-1] == 'postcopy-paused':
            # It waits for pages
            recover(source, destination)
            status += ', recovered'
        if source.run_state() != 'gone':
            at_least = source.counter()
        check_running(destination, expected, at_least)
        if source.run_state() != 'gone' and source.counter() != at_least:
            raise Fault('guest memory goes on changing on the source')
        return f'runs at the destination ({status})'
    verdict = f'lost (source {source.run_state()}, {status})'
    if peers[0].patched:
        raise Fault(verdict)
    return verdict


def run_case(case, tmp, guest, peers):
    """Returns what has become of the guest."""
    image, expected = guest
    all_sent = case.endswith('-sent')
    # Its state does not depend on the guest, and is loaded by all versions.
    watchdog = ['-device', 'i6300esb']
    args = ['-machine', MACHINE] + guest_args(image) + BITMAP_NODE
    source = peers[0].side('source', tmp, args + watchdog)
    destination = peers[1].side('destination', tmp, args + (
        [] if case.startswith('load') else watchdog) + ['-incoming', 'defer'])
    paths = os.path.join(tmp, 'relay'), os.path.join(tmp, 'incoming')
    with contextlib.ExitStack() as stack:
        for side in source, destination:
            stack.callback(side.vm.shutdown, hard=True)
            side.launch()
            side.enable(*(['dirty-bitmaps'] if all_sent else []))
        if case == 'release-ram':
            source.enable(case)
        with deadline('the start of the guest', 60):
            await_guest(source)
        source.vm.cmd('stop')
        at_least = check_memory(source, expected)
        if not all_sent:
            source.vm.cmd('cont')
        source.vm.cmd('migrate-set-parameters', max_bandwidth=32 * MIB)
        if all_sent:
            precopy_with_nothing_left(source)
        relay = make_relay(case, *paths)
        stack.callback(relay.close)
        source.note_events()
        source.report.clear()
        start = time.time()
        try:
            with deadline('the migration', 60):
                start_migration(source, destination, 'unix:' + relay.path,
                                None if all_sent else SENT_BEFORE_POSTCOPY)
                await_end(source, destination, case, relay)
                for side in source, destination:
                    side.note_events()
            with deadline('a look at the guest', 60):
                return judge(source, destination, case, expected, at_least,
                             peers)
        except Fault:
            for side in source, destination:
                with contextlib.suppress(Fault, QMPError, OSError):
                    side.note_events()
            print('\n'.join(timeline(start, source, destination)))
            raise


def run_pair(pair, tmp, guest):
    """Returns {case: what has become of the guest}."""
    verdicts = {}
    for case in CASES:
        if case.endswith('-sent') and not pair[0].patched:
            continue            # it loses the guest, or hangs
        with tempfile.TemporaryDirectory(dir=tmp) as case_tmp:
            try:
                verdict = run_case(case, case_tmp, guest, pair)
            except (Fault, QMPError, OSError) as err:
                # What is lost because of an old source is lost as ever
                failed = (pair[0].patched or case == 'success'
                          or isinstance(err, Crash))
                verdict = f'{"FAILED: " if failed else ""}{err}'
        print(f'{pair[0].name} -> {pair[1].name}, {case}: {verdict}',
              flush=True)
        verdicts[case] = verdict
    return verdicts


def run_all(tmp):
    """Returns the exit status."""
    guest = build_guest(tmp)
    this = Peer('the series', OPTS.qemu, tmp)
    if not this.patched:
        raise Fault(f'{OPTS.qemu} was built without the series')
    for case, title in CASES.items():
        print(f'   {case:<12} {title}')
    skipped, pairs = OPTS.skip, []
    for name, path in OPTS.peer:
        try:
            peer = Peer(name, path, tmp)
        except (OSError, IndexError, subprocess.CalledProcessError) as err:
            skipped.append((name, f'it does not run: {err}'))
            continue
        pairs += (this, peer), (peer, this)
    table = {pair: run_pair(pair, tmp, guest) for pair in pairs}

    print('\nWhat becomes of the guest')
    for pair, verdicts in table.items():
        print(f'{pair[0].name} -> {pair[1].name}')
        for case, verdict in verdicts.items():
            print(f'    {case:<12} {verdict}')
    for name, reason in skipped:
        print(f'{name:<30} skipped: {reason}')
    verdicts = [verdict for row in table.values() for verdict in row.values()]
    failed = sum(verdict.startswith('FAILED') for verdict in verdicts)
    print(f'{len(verdicts) - failed} passed, {failed} failed, '
          f'{len(skipped)} skipped')
    return 1 if failed else 0 if verdicts else 77


sys.exit(run_test('interop', run_all))
