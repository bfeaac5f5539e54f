#!/usr/bin/python3
#
# What the README says to a user of QMP, done with QEMUs: see whether there
# is support, cancel in postcopy-device, recover after postcopy-paused.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import argparse
import contextlib
import os
import sys

sys.dont_write_bytecode = True          # the sources stay as they are
sys.path.insert(0, os.path.join(os.path.dirname(__file__), '../lib'))
from twoqemu import (                                   # noqa: E402
    Fault, MIB, Relay, Side, Withhold, await_guest, build_guest, check_memory,
    check_running, deadline, guest_args, holds, loaded, parse_args, run_test,
    start_migration)

OPTS = parse_args(argparse.ArgumentParser(
    description='Migrate and recover as the README says.'))

from qemu.qmp import QMPError                           # noqa: E402

SENT_BEFORE_POSTCOPY = 8 * MIB


def check_supported(side):
    enums = [entry for entry in side.vm.cmd('query-qmp-schema')
             if entry['meta-type'] == 'enum']
    if not any('postcopy-device' in enum['values'] for enum in enums):
        raise Fault('query-qmp-schema does not know postcopy-device')
    try:
        side.vm.cmd('trace-event-get-state', name='postcopy_device_commit')
        found = True
    except QMPError:
        found = False
    if found != holds(side.tmp, OPTS.qemu):
        raise Fault('trace-event-get-state says '
                    + ('yes' if found else 'no') + ', and is wrong')
    if not found:
        raise Fault('this QEMU was built without the series')


def migrate(source, destination, relay):
    destination.launch()
    destination.enable()
    # Slow in postcopy, so that there is time for what is shown here
    source.vm.cmd('migrate-set-parameters', max_bandwidth=32 * MIB,
                  max_postcopy_bandwidth=MIB)
    source.report.clear()
    start_migration(source, destination, 'unix:' + relay.path,
                    SENT_BEFORE_POSTCOPY)


def cancel(source, destination, relay):
    """The destination has loaded everything, but its word gets lost."""
    migrate(source, destination, relay)
    phase = source.await_event('postcopy-device')
    relay.reached.wait()
    source.vm.cmd('migrate_cancel')
    source.await_event('cancelled', since=phase)
    source.await_event('RESUME', since=phase)
    destination.kill()


def recover(source, destination, relay):
    """The link breaks after the destination has got the guest."""
    migrate(source, destination, relay)
    source.await_event('postcopy-active')
    relay.close()
    source.await_event('postcopy-paused')
    destination.await_event('postcopy-paused')
    try:
        source.vm.cmd('migrate_cancel')
    except QMPError as err:
        print(f'   migrate_cancel, too late: {err}')
    else:
        raise Fault('migrate_cancel was granted after postcopy-active')

    uri = 'unix:' + os.path.join(destination.tmp, 'recover')
    destination.vm.cmd('migrate-recover', uri=uri)
    source.vm.cmd('migrate-set-parameters', max_postcopy_bandwidth=0)
    source.vm.cmd('migrate', uri=uri, resume=True)
    source.await_event('completed')
    destination.await_event('completed')
    destination.await_event('RESUME')
    source.vm.shutdown()


def run_all(tmp):
    """Returns the exit status."""
    image, expected = build_guest(tmp)
    args = guest_args(image)
    source = Side('source', tmp, OPTS.qemu, args)
    with contextlib.ExitStack() as stack, deadline('all of it', 120):
        def destination(name):
            os.mkdir(os.path.join(tmp, name))
            side = Side(name, os.path.join(tmp, name), OPTS.qemu,
                        args + ['-incoming', 'defer'])
            stack.callback(side.vm.shutdown, hard=True)
            return side, (os.path.join(tmp, name, 'relay'),
                          os.path.join(tmp, name, 'incoming'))

        stack.callback(source.vm.shutdown, hard=True)
        source.launch()
        print('query-qmp-schema, trace-event-get-state', flush=True)
        check_supported(source)
        source.enable()
        await_guest(source)
        source.vm.cmd('stop')
        at_least = check_memory(source, expected)
        source.vm.cmd('cont')

        print('migrate_cancel in postcopy-device', flush=True)
        first, paths = destination('first')
        cancel(source, first, Withhold(*paths, loaded))
        print('  ', check_running(source, expected, at_least))

        print('migrate-recover after postcopy-paused', flush=True)
        second, paths = destination('second')
        recover(source, second, Relay(*paths))
        print('  ', check_running(second, expected, at_least))
    return 0


sys.exit(run_test('qmp', run_all))
