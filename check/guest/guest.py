#!/usr/bin/python3
#
# Migrates one Linux guest by postcopy from one QEMU to the next, on and on,
# while it uses memory, disk and network: each time with a fault that is drawn
# from the round's seed, or with none.  After it the guest has to run on one
# side, whole, and is migrated from there.  A process outside pings it.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import argparse
import asyncio
import collections
import contextlib
import fcntl
import itertools
import lzma
import multiprocessing
import os
import pathlib
import random
import re
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time

sys.dont_write_bytecode = True          # the sources stay as they are
sys.path.insert(0, os.path.join(os.path.dirname(__file__), '../lib'))
from twoqemu import (                                   # noqa: E402
    Fault, INTERRUPTS, MIB, Side, deadline, parse_args, run_test)

PARSER = argparse.ArgumentParser(
    description='Migrate a Linux guest on and on.  A round depends on its seed '
    'alone, but for the timing of the machine and what the guest has been '
    'through: to see round N again, use --seed N --rounds 1.')
PARSER.add_argument('--kernel', required=True, metavar='DIR',
                    help="Debian's package of a kernel, unpacked")
PARSER.add_argument('--qemu-img', required=True, metavar='PROGRAM',
                    help='to make and check the disk')
PARSER.add_argument('--rounds', type=int, default=50,
                    help='how many migrations (default: %(default)s)')
PARSER.add_argument('--seed', type=int, default=random.randrange(10 ** 6),
                    help='of the first round, the others count up from it '
                    '(default: random)')
PARSER.add_argument('--faults', action=argparse.BooleanOptionalAction,
                    default=True, help='with faults or without')
PARSER.add_argument('--iommu', action=argparse.BooleanOptionalAction,
                    default=False, help='with a virtual IOMMU or without')
OPTS = parse_args(PARSER)

from qemu.machine.machine import QEMUMachineError       # noqa: E402
from qemu.qmp import QMPError                           # noqa: E402
from faults import Plan, Run                            # noqa: E402

HOST, GUEST, MAC = '10.0.2.2', '10.0.2.15', '52:54:00:12:34:56'

COUNTS = re.compile(r'count (\d+) (\d+) (\d+)$')
TROUBLE = re.compile(r'BAD|DMAR|I/O error|BUG|Oops|Call Trace|Kernel panic')

# A destination without it cannot load it.
RNG = ('-device', 'virtio-rng-pci')

ERRORS = (Fault, OSError, QMPError, QEMUMachineError, asyncio.TimeoutError)


class GuestPlan(Plan):
    """A fault that the guest survives, or none"""

    def __init__(self, seed):
        super().__init__(seed)
        rng = random.Random(f'guest {seed}')
        self.release_ram = self.paused = False
        self.exec = 'none'
        self.load = OPTS.faults and rng.random() < 0.08
        if self.load or not OPTS.faults or rng.random() < 0.12:
            self.mark, self.offset, self.fault = 'none', 0, 'none'
            self.command, self.channels, self.withhold = 'none', 'all', False
        if self.fault == 'kill':
            self.victim = 'destination'
        if 'kill' in (self.fault, self.command.split()[0]):
            # Not when it has the guest, or the source is about to believe so
            self.end_with_cut = True
            if self.mark not in ('HOLD', 'HELD', 'package'):
                self.mark, self.offset = 'package', rng.random()

    def kind(self):
        if self.fault == 'none':
            return 'a device does not load' if self.load else 'no fault'
        return super().kind()

    def __str__(self):
        return super().__str__().replace(' at none+0', '')

    def row(self, outcome):
        """Of the table"""
        fate = ('moved' if outcome.startswith('destination') else
                'back at the source')
        if 'recover' in outcome or 'paused' in outcome:
            fate += ', after postcopy-paused'
        if 'not reached' in outcome:
            return f'{fate}: no fault'
        what = re.sub(r' (forward|return|forward\+return)(?=,|$| of)', '',
                      self.kind())
        if self.fault == 'stall' and self.mark in ('LOADED', 'SHUT'):
            what = f'{self.mark} held back{what[len("stall"):]}'
        return f'{fate}: {what}'


class Ping:
    """A process that asks the guest all the time whether it is there"""

    INTERVAL = 0.01

    def __init__(self):
        self.last = 0.0
        self.answers, answer = os.pipe()
        fcntl.fcntl(answer, fcntl.F_SETPIPE_SZ, MIB)    # of a long round
        multiprocessing.Process(target=self._run, args=(answer,),
                                daemon=True).start()

    def _run(self, answer):
        for signum in INTERRUPTS:
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM,
                             socket.IPPROTO_ICMP)
        sock.connect((GUEST, 0))
        for number in itertools.count():
            with contextlib.suppress(OSError):
                sock.send(struct.pack('>BBHHH', 8, 0, 0, 0, number & 0xffff))
            end = time.monotonic() + self.INTERVAL
            while (left := end - time.monotonic()) > 0:
                if select.select([sock], [], [], left)[0]:
                    with contextlib.suppress(OSError):
                        sock.recv(64)
                        os.write(answer, struct.pack('d', time.monotonic()))

    def silence(self):
        """Returns how long there was no answer, at most, since it was asked."""
        now, longest = time.monotonic(), 0
        while self.last < now:
            when, = struct.unpack('d', os.read(self.answers, 8))
            longest = max(longest, when - self.last)
            self.last = when
        return longest


class Guest:
    """What the guest says on its serial port, wherever it runs"""

    def __init__(self):
        self.lines, self.rest = [], b''
        self.heard = collections.Counter()      # bytes, by side
        self.counts = [0, 0, 0]                 # memory, disk, network

    def hear(self, side):
        data = os.read(side.serial, 65536)
        if not data:
            raise Fault(f'the {side.name} has died')
        self.heard[side] += len(data)
        *lines, self.rest = (self.rest + data).split(b'\n')
        for line in lines:
            self.lines.append(line.decode(errors='replace').strip())
            if TROUBLE.search(self.lines[-1]):
                raise Fault(f'the guest says: {self.lines[-1]}')
            if match := COUNTS.search(self.lines[-1]):
                self.counts = [int(count) for count in match.groups()]

    def hear_all(self, side):
        while select.select([side.serial], [], [], 0)[0]:
            self.hear(side)

    def await_progress(self, side):
        """Until all of memory was checked, and disk and network were used"""
        before = self.counts
        while not all(a > b + more for a, b, more in
                      zip(self.counts, before, (1, 0, 0))):
            self.hear(side)


class GuestRun(Run):
    """A round: SOURCE has the guest, DESTINATION is to be launched."""

    def __init__(self, plan, tmp, source, destination, guest):
        self.guest = guest
        self.said = 0           # lines of the source, before
        super().__init__(plan, tmp, source, destination)

    def answers(self, side):
        # The main loop of the destination uses the guest's memory, too, and may
        # have to wait for a page.
        return (side is self.source or
                not self.state(side).startswith('postcopy-'))

    def count(self, side):
        self.guest.hear_all(side)
        return self.guest.heard[side]

    def check_running(self, side, at_least):
        self.guest.await_progress(side)

    def prepare(self):
        with deadline('start of the destination', 60):
            self.destination.launch()
            super().prepare()
            # The guest will have to ask for pages.
            self.source.vm.cmd('migrate-set-parameters',
                               max_postcopy_bandwidth=64 * MIB)
            self.said = len(self.source.output())

    def check_moved_quietly(self):
        """Without a fault"""
        states = self.source.run_state(), self.destination.run_state()
        if states != ('postmigrate', 'running'):
            raise Fault(f'the source is {states[0]}, the destination is '
                        f'{states[1]}')
        for said in (self.source.output()[self.said:],
                     self.destination.output()):
            if said:
                raise Fault(f'QEMU says: {said[0]}')
        if not self.source.vm.cmd('query-migrate')['ram']['postcopy-requests']:
            raise Fault('no memory was left to send')

    def check_outcome(self, outcome):
        if outcome.startswith('lost'):
            raise Fault(f'LOST: {outcome}')
        if self.plan.fault == 'none':
            must = 'source (failed)' if self.plan.load else 'destination'
            if not outcome.startswith(must):
                raise Fault(f'{self.plan.kind()}, but the outcome is {outcome}')
            if not self.plan.load:
                self.check_moved_quietly()


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


def build_network():
    """In the network namespace of this program: a bridge, and a tap for each of
    two QEMUs.  Without ARP from here: its retries would be taken for silence.
    """
    for command in (
            'link add br0 address 52:54:00:00:00:01 type bridge',
            f'address add {HOST}/24 dev br0',
            'link set br0 up',
            'tuntap add tap0 mode tap', 'link set tap0 master br0 up',
            'tuntap add tap1 mode tap', 'link set tap1 master br0 up',
            f'neighbour add {GUEST} lladdr {MAC} dev br0 nud permanent'):
        subprocess.run(['ip', *command.split()], check=True)
    with open('/proc/sys/net/ipv4/ping_group_range', 'w',
              encoding='ascii') as groups:
        groups.write('0 0')


def qemu_args(initramfs):
    kernel, = pathlib.Path(OPTS.kernel).glob('boot/vmlinuz-*')
    iommu, virtio = [], 'disable-legacy=on'
    if OPTS.iommu:
        iommu = ['-device', 'intel-iommu,intremap=off']
        virtio += ',iommu_platform=on'
    return ['-nodefaults', '-name', 'debug-threads=on', '-accel', 'tcg',
            '-machine', 'pc-q35-10.0,hpet=off', '-smp', '2', '-m', '256',
            '-kernel', str(kernel), '-initrd', initramfs,
            '-append', 'console=ttyS1 quiet mitigations=off intel_iommu=on',
            *iommu,
            '-device', f'virtio-blk-pci,drive=disk,{virtio}',
            # rings of both kinds: these are packed, the disk's are split
            '-device', f'virtio-net-pci,netdev=net,mac={MAC},romfile=,'
            f'packed=on,{virtio}']


def end(side, hard=False):
    with deadline(f'end of the {side.name}', 20):
        side.vm.shutdown(hard=hard)
    os.close(side.serial)
    if not hard and side.vm.exitcode():
        raise Fault(f'the {side.name} ended with exit code '
                    f'{side.vm.exitcode()}')


class Life:
    """Of the guest: its disk, what it says, the QEMUs; the first one has it"""

    def __init__(self, tmp):
        self.tmp, self.args = tmp, qemu_args(build_initramfs(tmp))
        self.guest, self.sides, self.number = Guest(), [], 0
        self.disk = os.path.join(tmp, 'disk')
        subprocess.run([OPTS.qemu_img, 'create', '-q', '-f', 'qcow2', self.disk,
                        '16M'], check=True)

    def add(self, name, *more):
        """Returns a QEMU; its tap is the one that the source has not."""
        self.number += 1
        tmp = os.path.join(self.tmp, f'qemu{self.number}')
        os.mkdir(tmp)
        # A pipe has room for what the guest says when nobody listens; the
        # socket of Side has not, and leaves characters in the UART.
        serial = os.path.join(tmp, 'serial')
        os.mkfifo(serial)
        tap = 1 - self.sides[0].tap if self.sides else 0
        side = Side(name, tmp, OPTS.qemu, [
            *self.args,
            '-drive', 'if=none,id=disk,format=qcow2,discard=unmap,'
            f'file.locking=on,file.filename={self.disk}',
            '-netdev', f'tap,id=net,ifname=tap{tap},script=no,downscript=no',
            '-serial', f'file:{serial}', *more])
        side.tap = tap
        side.serial = os.open(serial, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(side.serial, True)
        self.sides.append(side)
        return side

    def begin(self):
        with deadline('start of the guest', 120):
            source = self.add('source', *RNG)
            source.launch()
            self.guest.await_progress(source)
        if OPTS.iommu == ('iommu none' in self.guest.lines):
            raise Fault('the guest does not do as --iommu says')

    def go_on(self, plan, ping):
        """A round.  Returns its outcome, and how long the ping was silent."""
        source = self.sides[0]
        destination = self.add('destination', *(() if plan.load else RNG),
                               '-incoming', 'defer')
        run = GuestRun(plan, destination.tmp, source, destination, self.guest)
        try:
            with deadline('answer to a ping', 20):
                ping.silence()
            outcome = run.execute()
            with deadline('answer to a ping', 20):
                silent = ping.silence()
            run.check_outcome(outcome)
        except ERRORS:
            print('', *run.story(), sep='\n')
            raise
        run.end()
        if not outcome.startswith('destination'):
            end(destination, hard=True)
            self.sides.remove(destination)
        else:
            end(source, hard=run.state(source) != 'completed')
            self.sides.remove(source)
            destination.name = 'source'
        return outcome, silent

    def end(self):
        """The disk has to be whole."""
        end(self.sides[0])
        self.sides.clear()
        check = subprocess.run([OPTS.qemu_img, 'check', self.disk], text=True,
                               capture_output=True, check=False)
        if check.returncode:
            raise Fault(f'the disk is bad: {check.stdout}{check.stderr}')

    def explain(self):
        """Say what all do, if there is gdb, and what the guest has said."""
        for side in self.sides:
            print(f'\nThe threads of the {side.name}:', flush=True)
            subprocess.run(['timeout', '60', 'gdb', '-p',
                            str(side.vm.get_pid()), '-batch',
                            '-ex', 'thread apply all bt'], check=False)
        print('\n'.join(['The guest says:', *self.guest.lines[-20:]]))


def print_table(silences):
    """Of the pings, by what has happened"""
    print('\nHow long the ping was silent, ms, with what a fault lasts:\n'
          'rounds  median     max  outcome: fault')
    for row in sorted(silences):
        of_row = [1000 * silent for silent in silences[row]]
        print(f'{len(of_row):6}{statistics.median(of_row):8.0f}'
              f'{max(of_row):8.0f}  {row}')


def run_all(tmp):
    """Returns the exit status."""
    build_network()
    ping, life = Ping(), Life(tmp)
    silences, done, failed = collections.defaultdict(list), 0, 0
    try:
        life.begin()
        for seed in range(OPTS.seed, OPTS.seed + OPTS.rounds):
            plan, begin = GuestPlan(seed), time.monotonic()
            print(f'{done + 1}/{OPTS.rounds} seed {seed}: {plan} -> ', end='',
                  flush=True)
            outcome, silent = life.go_on(plan, ping)
            print(f'{outcome} [{time.monotonic() - begin:.1f} s, ping silent '
                  f'for {1000 * silent:.0f} ms, counts {life.guest.counts}]')
            silences[plan.row(outcome)].append(silent)
            done += 1
        life.end()
    except ERRORS as err:
        failed = 1
        print(f'BAD: {type(err).__name__}: {err}')
        life.explain()
    finally:
        for side in life.sides:
            side.vm.shutdown(hard=True)
    print_table(silences)
    print(f'{done} passed, {failed} failed, 0 skipped')
    return failed


sys.exit(run_test('guest', run_all))
