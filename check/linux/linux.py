#!/usr/bin/python3
#
# Migrates a Linux guest by postcopy from one QEMU to the next, again and
# again, while it uses memory, disk and network.  Its devices are behind a
# virtual IOMMU: to load them, the destination needs page tables in its memory.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import argparse
import contextlib
import lzma
import os
import pathlib
import re
import select
import subprocess
import sys
import time

sys.dont_write_bytecode = True          # the sources stay as they are
sys.path.insert(0, os.path.join(os.path.dirname(__file__), '../lib'))
from twoqemu import (                                   # noqa: E402
    ENDS, Fault, MIB, Side, deadline, parse_args, run_test, start_migration)

PARSER = argparse.ArgumentParser(
    description='Migrate a Linux guest again and again.')
PARSER.add_argument('--kernel', required=True, metavar='DIR',
                    help="Debian's package of a kernel, unpacked")
PARSER.add_argument('--runs', type=int, default=50,
                    help='how many migrations (default: %(default)s)')
PARSER.add_argument('--iommu', action=argparse.BooleanOptionalAction,
                    default=True, help='with a virtual IOMMU or without')
PARSER.add_argument('--preempt', choices=('no', 'yes', 'both'), default='both',
                    help='with postcopy-preempt; "both" takes turns')
OPTS = parse_args(PARSER)

from qemu.machine.machine import QEMUMachineError       # noqa: E402
from qemu.qmp import QMPError                           # noqa: E402

# The guest dirties memory faster, and will have to ask for pages.
BANDWIDTH = 64 * MIB
SENT_BEFORE_POSTCOPY = 32 * MIB

COUNTS = re.compile(r'count (\d+) (\d+) (\d+)$')
TROUBLE = re.compile(r'BAD|DMAR|I/O error|BUG|Oops|Call Trace|Kernel panic')


class Guest:
    """What the guest says on its serial port, wherever it runs"""

    def __init__(self):
        self.lines, self.rest = [], b''
        self.counts = [0, 0, 0]         # memory, disk, network

    def hear(self, side):
        data = side.vm.console_socket.recv(65536)
        if not data:
            raise Fault(f'the {side.name} has died')
        *lines, self.rest = (self.rest + data).split(b'\n')
        for line in lines:
            self.lines.append(line.decode(errors='replace').strip())
            if TROUBLE.search(self.lines[-1]):
                raise Fault(f'the guest says: {self.lines[-1]}')
            if match := COUNTS.search(self.lines[-1]):
                self.counts = [int(count) for count in match.groups()]

    def hear_all(self, side):
        while select.select([side.vm.console_socket], [], [], 0)[0]:
            self.hear(side)

    def await_progress(self, side):
        before = self.counts
        while not all(a > b for a, b in zip(self.counts, before)):
            self.hear(side)


def modules():
    """Returns the modules that the guest needs, in the order to load them."""
    paths = {path.name.split('.')[0].replace('-', '_'): path
             for path in pathlib.Path(OPTS.kernel).rglob('*.ko*')}
    found = {}

    def add(name):
        if name in found or name not in paths:      # the latter are built in
            return
        data = paths[name].read_bytes()
        if paths[name].suffix == '.xz':
            data = lzma.decompress(data)
        needs = re.search(rb'\0depends=([^\0]*)', data)[1].decode()
        for needed in needs.split(','):
            add(needed.replace('-', '_'))
        found[name] = data

    for name in 'virtio_pci', 'virtio_blk', 'virtio_net':
        add(name)
    return list(found.values())


def build_initramfs(tmp):
    """Returns its path: a cpio archive with init and the modules"""
    init, path = os.path.join(tmp, 'init'), os.path.join(tmp, 'initramfs')
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'init.c')
    subprocess.run(['gcc', '-static', '-pthread', '-O2', '-o', init, source],
                   check=True)
    files = {'init': pathlib.Path(init).read_bytes()}
    for i, data in enumerate(modules()):
        files[f'{i}.ko'] = data
    with open(path, 'wb') as out:
        for i, (name, data) in enumerate({**files, 'TRAILER!!!': b''}.items()):
            fields = (i, 0o100755, 0, 0, 1, 0, len(data),
                      0, 0, 0, 0, len(name) + 1, 0)
            head = ''.join(f'{field:08x}' for field in fields) + name + '\0'
            for part in b'070701' + head.encode(), data:
                out.write(part + bytes(-len(part) % 4))
    return path


def qemu_args(tmp):
    kernel, = pathlib.Path(OPTS.kernel).glob('boot/vmlinuz-*')
    disk = os.path.join(tmp, 'disk')
    pathlib.Path(disk).touch()
    os.truncate(disk, 16 * MIB)
    iommu, virtio = [], 'disable-legacy=on'
    if OPTS.iommu:
        iommu = ['-device', 'intel-iommu,intremap=off']
        virtio += ',iommu_platform=on'
    return ['-nodefaults', '-name', 'debug-threads=on', '-accel', 'tcg',
            '-machine', 'pc-q35-10.0,hpet=off', '-smp', '2', '-m', '256',
            '-kernel', str(kernel), '-initrd', build_initramfs(tmp),
            '-append', 'console=ttyS0 quiet mitigations=off intel_iommu=on',
            *iommu,
            '-drive', 'if=none,id=disk,format=raw,file.locking=on,'
            f'file.filename={disk}',
            '-device', f'virtio-blk-pci,drive=disk,{virtio}',
            '-netdev', 'user,id=net,restrict=on',
            # rings of both kinds: these are packed, the disk's are split
            '-device',
            f'virtio-net-pci,netdev=net,romfile=,packed=on,{virtio}']


def migrate(source, destination, preempt):
    """Returns for how many pages the destination has asked."""
    for side in source, destination:
        side.enable()
        side.vm.cmd('migrate-set-capabilities', capabilities=[
            {'capability': 'postcopy-preempt', 'state': preempt}])
    source.vm.cmd('migrate-set-parameters', max_bandwidth=BANDWIDTH,
                  max_postcopy_bandwidth=BANDWIDTH)
    source.report.clear()
    start_migration(source, destination,
                    'unix:' + os.path.join(destination.tmp, 'incoming'),
                    SENT_BEFORE_POSTCOPY)
    for side in source, destination:
        side.await_event(*ENDS)
        if side.states()[-1] != 'completed':
            raise Fault(f'the {side.name} ends as {side.states()[-1]}')
    destination.await_event('RESUME')
    while source.run_state() == 'finish-migrate':
        source.next_event(0.05)
    states = source.run_state(), destination.run_state()
    if states != ('postmigrate', 'running'):
        raise Fault(f'{source.name} is {states[0]}, {destination.name} is '
                    f'{states[1]}')
    asked = source.vm.cmd('query-migrate')['ram']['postcopy-requests']
    if not asked:
        raise Fault('no memory was left to send')
    return asked


def print_threads(side):
    """Say what they are doing, if there is gdb."""
    print(f'\nThe threads of {side.name}:', flush=True)
    subprocess.run(['timeout', '60', 'gdb', '-p', str(side.vm.get_pid()),
                    '-batch', '-ex', 'thread apply all bt'], check=False)


def run(tmp):
    """Returns the exit status."""
    args, guest, sides = qemu_args(tmp), Guest(), []
    with contextlib.ExitStack() as stack:
        def launch(name, *more):
            os.mkdir(os.path.join(tmp, name))
            side = Side(name, os.path.join(tmp, name), OPTS.qemu,
                        [*args, *more])
            stack.callback(side.vm.shutdown, hard=True)
            side.launch()
            sides[:] = sides[-1:] + [side]
            return side

        try:
            with deadline('start of the guest', 120):
                source = launch('qemu0')
                guest.await_progress(source)
            if OPTS.iommu == ('iommu none' in guest.lines):
                raise Fault('the guest does not do as --iommu says')
            for i in range(1, OPTS.runs + 1):
                preempt = {'no': False, 'yes': True,
                           'both': i % 2 == 1}[OPTS.preempt]
                start = time.monotonic()
                with deadline(f'migration {i}', 60):
                    destination = launch(f'qemu{i}', '-incoming', 'defer')
                    asked = migrate(source, destination, preempt)
                guest.hear_all(source)
                with deadline(f'life of the guest after migration {i}', 20):
                    guest.await_progress(destination)
                for side in sides:
                    if said := side.output():
                        raise Fault(f'{side.name} says: {said[0]}')
                with deadline(f'end of {source.name}', 20):
                    source.vm.shutdown()
                print(f'{i:4} {"preempt" if preempt else "plain":7} '
                      f'{time.monotonic() - start:5.1f} s, {asked:5} pages '
                      f'asked for, counts {guest.counts}', flush=True)
                source = destination
        except (Fault, OSError, QMPError, QEMUMachineError) as err:
            for side in sides:
                print_threads(side)
                print('\n'.join([f'{side.name} says:', *side.output()]))
            print('\n'.join(['The guest says:', *guest.lines[-20:]]))
            print(f'BAD: {type(err).__name__}: {err}')
            return 1
    return 0


sys.exit(run_test('linux', run))
