#!/usr/bin/python3
#
# Migrates a guest between two QEMUs with postcopy, again and again, each time
# with a fault at a moment that is drawn from the run's seed: a relay cuts or
# stalls the stream, a QEMU is killed or frozen, the migration is cancelled or
# yanked.  After that exactly one side has to run the guest, or none does and a
# recovery (or migrate_cancel) brings it back, with its memory intact.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import argparse
import asyncio
import collections
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback

sys.dont_write_bytecode = True          # the sources stay as they are
sys.path.insert(0, os.path.join(os.path.dirname(__file__), '../lib'))
from twoqemu import (                                   # noqa: E402
    Fault, INTERRUPTS, Side, await_guest, build_guest, check_memory,
    check_running, deadline, guest_args, holds, parse_args, run_test)

PARSER = argparse.ArgumentParser(
    description='Migrate with faults at random moments.  A run depends on its '
    'seed alone (but for the timing of the machine): to see run N again, use '
    '--seed N --runs 1.')
PARSER.add_argument('--runs', type=int, default=100,
                    help='how many (default: %(default)s)')
PARSER.add_argument('--seed', type=int, default=random.randrange(10 ** 6),
                    help='of the first run, the others count up from it '
                    '(default: random)')
PARSER.add_argument('--other', metavar='QEMU',
                    help='another QEMU with the series: one of each migrates '
                    'to the other, either way')
PARSER.add_argument('--seconds', type=int, default=10 ** 6,
                    help='begin no more runs after so many seconds')
OPTS = parse_args(PARSER)

from qemu.qmp import QMPError                           # noqa: E402
from faults import Plan, Run                            # noqa: E402

MACHINE = 'pc-i440fx-10.0'              # all have it
MULTIFD = False                         # run_all() looks


class GuestRun(Run):
    """With the guest whose memory can be checked"""

    def __init__(self, seed, tmp, image, expected):
        plan = Plan(seed, bool(OPTS.other), MULTIFD)
        self.expected = expected
        disk = os.path.join(tmp, 'disk')
        shutil.copyfile(image, disk)
        # Only then do the threads have names.
        args = guest_args(disk) + ['-name', 'debug-threads=on',
                                   '-machine', MACHINE]
        qemus = [OPTS.qemu, OPTS.other or OPTS.qemu]
        if plan.from_other:
            qemus.reverse()
        super().__init__(plan, tmp, Side('source', tmp, qemus[0], args),
                         Side('destination', tmp, qemus[1],
                              args + ['-incoming', 'defer']))

    def count(self, side):
        return side.counter()

    def check_running(self, side, at_least):
        check_running(side, self.expected, at_least)

    def prepare(self):
        with deadline('start two QEMUs, wait for the guest', 60):
            for side in self.sides.values():
                side.launch()
            await_guest(self.source)
            self.source.vm.cmd('stop')
            self.at_least = check_memory(self.source, self.expected)
            if not self.plan.paused:
                self.source.vm.cmd('cont')
            super().prepare()

    def end(self):
        for side in self.sides.values():
            side.vm.shutdown(hard=True)
        super().end()


def run_seed(job):
    """Returns (kind of fault, outcome, line, details), or None: no time left.

    The outcome is None if it is a bad one.
    """
    seed, tmp, image, expected, end = job
    begin = time.monotonic()
    if begin >= end:
        return None
    tmp = os.path.join(tmp, str(seed))
    os.mkdir(tmp)
    run = GuestRun(seed, tmp, image, expected)
    outcome, details = None, []
    try:
        outcome = run.execute()
        verdict = outcome
    except Fault as err:
        verdict = f'BAD: {err}'
    except (QMPError, OSError, asyncio.TimeoutError) as err:
        verdict = f'BAD: {type(err).__name__}: {err}'
        details = traceback.format_exc().splitlines()
    finally:
        if outcome is None:
            with contextlib.suppress(Exception):
                run.drain()
            details = run.story() + details
        run.end()
        shutil.rmtree(tmp)
    line = (f'seed {seed}: {run.plan} -> {verdict} '
            f'[{time.monotonic() - begin:.1f} s, slowest answer '
            f'{run.slowest * 1000:.0f} ms]')
    return run.plan.kind(), outcome, line, details


def worker_init():
    # The main process is interrupted, and ends its workers.
    for signum in INTERRUPTS:
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def print_table(table):
    """Of outcomes by faults"""
    print()
    for outcome in sorted(table):
        print(f'{sum(table[outcome].values()):6d}  {outcome}')
        for kind, count in sorted(table[outcome].items()):
            print(f'{"":14}{count:6d}  {kind}')


def can_multifd(tmp, qemu):
    """Has it postcopy with multifd?  QEMU has that since 10.1."""
    side = Side('asked', tmp, qemu, ['-machine', 'none', '-nodefaults'])
    try:
        side.launch()
        return 'error' not in side.vm.qmp('migrate-set-capabilities', capabilities=[
            {'capability': name, 'state': True}
            for name in ('postcopy-ram', 'multifd')])
    finally:
        side.vm.shutdown(hard=True)


def run_all(tmp):
    """Returns the exit status."""
    global MULTIFD          # pylint: disable=global-statement
    print('building the guest ...', flush=True)
    qemus = [qemu for qemu in (OPTS.qemu, OPTS.other) if qemu]
    for qemu in qemus:
        if not holds(tmp, qemu):
            sys.exit(f'{qemu} was built without the series')
    MULTIFD = all(can_multifd(tmp, qemu) for qemu in qemus)
    image, expected = build_guest(tmp)
    table = collections.defaultdict(collections.Counter)
    bad = []
    done = 0
    end = time.monotonic() + OPTS.seconds
    with multiprocessing.Pool(os.cpu_count(), worker_init) as pool:
        for result in pool.imap_unordered(run_seed, (
                (seed, tmp, image, expected, end)
                for seed in range(OPTS.seed, OPTS.seed + OPTS.runs))):
            if not result:
                continue
            kind, outcome, line, details = result
            done += 1
            table[outcome or 'BAD'][kind] += 1
            print(f'{done}/{OPTS.runs} {line}', flush=True)
            if outcome is None:
                bad.append(line)
                print('\n'.join(details), flush=True)
    print_table(table)
    if bad:
        print('\n' + '\n'.join(bad))
    print(f'{done - len(bad)} passed, {len(bad)} failed, 0 skipped')
    return bool(bad)


sys.exit(run_test('fuzz', run_all))
