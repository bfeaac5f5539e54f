#!/usr/bin/python3
#
# Migrates a guest between two QEMUs with postcopy, three times: all goes well;
# the destination cannot load the device state; it dies while it loads.  Shows
# who runs the guest when, and judges whether the guest has survived.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import argparse
import contextlib
import os
import signal
import sys
import threading
import time

sys.dont_write_bytecode = True          # the sources stay as they are
sys.path.insert(0, os.path.join(os.path.dirname(__file__), '../check/lib'))
from twoqemu import (                                   # noqa: E402
    ENDS, Fault, Halt, MIB, Side, await_guest, build_guest, check_memory,
    check_running, deadline, guest_args, parse_args, run_test,
    start_migration, timeline)

OPTS = parse_args(argparse.ArgumentParser(
    description='Show three postcopy migrations between two QEMUs.'))

from qemu.qmp import QMPError                           # noqa: E402

# Postcopy starts when this much is sent: a part of the pattern.  The rest, and
# the rings of the disk at the end of memory, are not on the destination then.
SENT_BEFORE_POSTCOPY = 8 * MIB

SWITCHING = ['setup', 'active', 'device', 'postcopy-device']
SWITCHED = SWITCHING + ['postcopy-active', 'completed']
TAKEN_BACK = SWITCHING + ['failed']

CASES = {
    'success': 'all goes well',
    'load': 'the destination fails to load the device state '
            '(it lacks a device that the source has)',
    'kill': 'the destination is killed as it receives the device state',
}


@contextlib.contextmanager
def step(what, limit=60):
    """Show progress; after LIMIT seconds, end what the block waits for."""
    done = threading.Event()

    def dots():
        while not done.wait(1):
            print('.', end='', flush=True)

    print(f'   {what} ...', end='', flush=True)
    start = time.monotonic()
    thread = threading.Thread(target=dots)
    thread.start()
    try:
        with deadline(what, limit):
            yield
    finally:
        done.set()
        thread.join()
        print(f' {time.monotonic() - start:.1f} s', flush=True)


def switch_over(source, destination, relay):
    """Migrate.  With a relay, kill the destination while it loads."""
    incoming = os.path.join(destination.tmp, 'incoming')
    with step('migrate the first pages'):
        start_migration(source, destination,
                        'unix:' + (relay.path if relay else incoming),
                        SENT_BEFORE_POSTCOPY)
    if relay:
        with step('switch over, kill the destination half-way'):
            relay.reached.wait()
            destination.kill()
            relay.close()
    with step('wait for the end on the source'):
        source.await_event(*ENDS)


def settle(source, destination, case):
    """What is still due when the migration has ended on the source"""
    with step('wait for both sides to settle', 20):
        if source.states()[-1] == 'completed':
            destination.await_event(*ENDS)
        if source.states()[-1] == 'failed':
            source.await_event('RESUME', since=source.await_event(*ENDS))
        if case == 'load':
            destination.exited.wait()


def judge(source, destination, case, expected, at_least):
    """Returns the verdict if the guest is where it should be, and well."""
    owner, must = source, TAKEN_BACK
    if case == 'success':
        owner, must = destination, SWITCHED
    found = {side: side.run_state() for side in (source, destination)}
    running = [side for side in found if found[side] == 'running']
    where = (f'source {found[source]}, destination {found[destination]}, '
             f'migration {source.states()[-1]}')
    if len(running) == 2:
        raise Fault(f'SPLIT: the guest runs on both sides ({where})')
    if not running:
        if found[source] != 'gone':
            check_memory(source, expected)
            where += f'; its memory on the source is whole: {expected[:16]}'
        raise Fault(f'LOST: the guest runs nowhere ({where})')
    if running != [owner]:
        raise Fault(f'the guest runs on the WRONG SIDE ({where})')
    if owner is destination:
        at_least = source.counter()
    seen = check_running(owner, expected, at_least)
    well = f'the guest runs on the {owner.name}, {seen} ({where})'
    if owner is destination and source.counter() != at_least:
        raise Fault('SPLIT: guest memory goes on changing on the source')
    if owner is source and ('RESUME', 'RESUME') in destination.seen():
        raise Fault('SPLIT: the guest has run on the destination as well')
    if 'postcopy-device' not in source.states():
        raise Fault('NO POSTCOPY-DEVICE: this QEMU does not have that state, '
                    f'it was built without the series; {well}')
    if source.states() != must:
        raise Fault(f'STATES: the source went {" > ".join(source.states())}, '
                    f'not {" > ".join(must)}; {well}')
    if owner is destination and (
            [state for state in destination.states() if state in must]
            != [state for state in must if state != 'device']):
        raise Fault('STATES: the destination went '
                    f'{" > ".join(destination.states())}; {well}')
    # 1 is what QEMU exits with when it has reported an error.
    code = {'success': None, 'load': 1, 'kill': -signal.SIGKILL}[case]
    if destination.vm.exitcode() != code:
        raise Fault('EXIT: the destination has the exit code '
                    f'{destination.vm.exitcode()}, not {code}; {well}')
    return well


def run_case(case, tmp, image, expected):
    """Returns the verdict of a good case."""
    args = guest_args(image)
    rng = ['-device', 'virtio-rng-pci']
    source = Side('source', tmp, OPTS.qemu, args + rng)
    destination = Side('destination', tmp, OPTS.qemu,
                       args + ['-incoming', 'defer']
                       + (rng if case != 'load' else []))
    relay = None
    with contextlib.ExitStack() as stack:
        with step('start two QEMUs, wait for the guest'):
            for side in (source, destination):
                stack.callback(side.vm.shutdown, hard=True)
                side.launch()
                side.enable()
            await_guest(source)
        with step('check the guest'):
            source.vm.cmd('stop')
            at_least = check_memory(source, expected)
            source.vm.cmd('cont')
            source.vm.cmd('migrate-set-parameters', max_bandwidth=32 * MIB)
        if case == 'kill':
            relay = Halt(os.path.join(tmp, 'relay'),
                         os.path.join(tmp, 'incoming'))
            stack.callback(relay.close)
        source.note_events()
        source.report.clear()
        start = time.time()
        try:
            switch_over(source, destination, relay)
            with contextlib.suppress(Fault):
                settle(source, destination, case)
        finally:
            source.note_events()
            destination.note_events()
            print('\n' + '\n'.join(timeline(start, source, destination))
                  + '\n')
        with step('check the guest'):
            return judge(source, destination, case, expected, at_least)


def run_all(tmp):
    """Returns the exit status."""
    verdicts = []
    with step('build the guest'):
        image, expected = build_guest(tmp)
    for number, (case, title) in enumerate(CASES.items(), 1):
        print(f'\n{number}. {title}', flush=True)
        case_tmp = os.path.join(tmp, case)
        os.mkdir(case_tmp)
        try:
            verdict = 'GOOD: ' + run_case(case, case_tmp, image, expected)
        except Fault as err:
            verdict = f'BAD:  {err}'
        except (QMPError, OSError) as err:
            verdict = f'BAD:  {type(err).__name__}: {err}'
        verdicts.append(f'{number}. {title}\n   {verdict}')
        print(f'   {verdict}', flush=True)
    print('\nVerdicts\n' + '\n'.join(verdicts))
    return any('BAD: ' in verdict for verdict in verdicts)


sys.exit(run_test('demo', run_all))
