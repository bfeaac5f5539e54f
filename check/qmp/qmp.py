#!/usr/bin/python3
#
# What the README says to a user of QMP, done with QEMUs: see whether there
# is support, cancel in postcopy-device, recover after postcopy-paused.  By
# out-of-band commands, and by a client that has none.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import argparse
import contextlib
import os
import socket
import sys
import threading

sys.dont_write_bytecode = True          # the sources stay as they are
sys.path.insert(0, os.path.join(os.path.dirname(__file__), '../lib'))
from twoqemu import (                                   # noqa: E402
    Fault, MIB, Relay, Side, Withhold, await_guest, build_guest, check_memory,
    check_running, deadline, guest_args, holds, loaded, parse_args, run_test,
    start_migration)

OPTS = parse_args(argparse.ArgumentParser(
    description='Migrate and recover as the README says.'))

from qemu.qmp import QMPError                           # noqa: E402
from qemu.qmp.legacy import QEMUMonitorProtocol         # noqa: E402

SENT_BEFORE_POSTCOPY = 8 * MIB


def oob(side, command, **args):
    """Out of band"""
    # pylint: disable=protected-access
    reply = side.vm._qmp.cmd_obj({'exec-oob': command, 'id': command,
                                  'arguments': args})
    if 'error' in reply:
        raise Fault(f'{command}: {reply["error"]["desc"]}')


def in_band(side, command, **args):
    """By a client that has not asked for out-of-band execution"""
    monitor = QEMUMonitorProtocol(os.path.join(side.tmp, 'qmp'))
    monitor.connect(negotiate=False)
    monitor.cmd('qmp_capabilities')
    reply = monitor.cmd_obj({'exec-oob': command, 'id': command,
                             'arguments': args})
    if 'error' not in reply:
        raise Fault(f'{command} is executed out of band, unasked')
    monitor.cmd(command, **args)
    monitor.close()


YANK = {'instances': [{'type': 'migration'}]}


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


class Vanish(Relay):
    """A network whose end only the source notices"""

    def __init__(self, path, destination):
        self.closed = threading.Event()
        super().__init__(path, destination)

    def close(self):
        self.closed.set()
        super().close()

    def vanish(self):
        for link in self.links:
            link.source_end.shutdown(socket.SHUT_RDWR)

    def forward(self, link):
        super().forward(link)
        self.closed.wait()

    def back(self, link):
        with contextlib.suppress(OSError):
            super().back(link)
        self.closed.wait()


def migrate(source, destination, relay):
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


def yank(source, destination, relay, say):
    """The same, and the user gives up on the link."""
    migrate(source, destination, relay)
    phase = source.await_event('postcopy-device')
    relay.reached.wait()
    say(source, 'yank', **YANK)
    source.await_event('failed', since=phase)
    source.await_event('RESUME', since=phase)
    destination.kill()


def recover(source, destination, relay, say):
    """The link breaks after the destination has got the guest."""
    migrate(source, destination, relay)
    source.await_event('postcopy-active')
    relay.vanish()
    source.await_event('postcopy-paused')
    destination.await_event('postcopy-active')
    say(destination, 'migrate-pause')
    destination.await_event('postcopy-paused')
    try:
        source.vm.cmd('migrate_cancel')
    except QMPError as err:
        print(f'   migrate_cancel, too late: {err}')
    else:
        raise Fault('migrate_cancel was granted after postcopy-active')

    uri = 'unix:' + os.path.join(destination.tmp, 'recover')
    say(destination, 'migrate-recover', uri=uri)
    source.vm.cmd('migrate-set-parameters', max_postcopy_bandwidth=0)
    source.vm.cmd('migrate', uri=uri, resume=True)
    source.await_event('completed')
    destination.await_event('completed')
    destination.await_event('RESUME')
    source.vm.shutdown()


def run_all(tmp):
    """Returns the exit status."""
    image, expected = build_guest(tmp)
    with contextlib.ExitStack() as stack, deadline('all of it', 120):
        def launch(name, *more):
            path = os.path.join(tmp, name)
            os.mkdir(path)
            side = Side(name, path, OPTS.qemu, guest_args(image) + [
                '-qmp', f'unix:{path}/qmp,server=on,wait=off', *more])
            stack.callback(side.vm.shutdown, hard=True)
            side.launch()
            side.enable()
            return side

        def destination(name):
            side = launch(name, '-incoming', 'defer')
            return side, (os.path.join(side.tmp, 'relay'),
                          os.path.join(side.tmp, 'incoming'))

        for say in oob, in_band:
            print(f'{say.__doc__}:')
            name = say.__name__
            source = launch(name)
            print('query-qmp-schema, trace-event-get-state', flush=True)
            check_supported(source)
            await_guest(source)
            source.vm.cmd('stop')
            at_least = check_memory(source, expected)
            source.vm.cmd('cont')

            print('migrate_cancel in postcopy-device', flush=True)
            other, paths = destination(name + '-cancel')
            cancel(source, other, Withhold(*paths, loaded))
            print('  ', check_running(source, expected, at_least))

            print('yank in postcopy-device', flush=True)
            other, paths = destination(name + '-yank')
            yank(source, other, Withhold(*paths, loaded), say)
            print('  ', check_running(source, expected, at_least))

            print('migrate-pause, migrate-recover', flush=True)
            other, paths = destination(name + '-recover')
            relay = Vanish(*paths)
            stack.callback(relay.close)
            recover(source, other, relay, say)
            print('  ', check_running(other, expected, at_least))
            other.vm.shutdown()
    return 0


sys.exit(run_test('qmp', run_all))
