#!/usr/bin/python3
#
# Measures postcopy migrations of several QEMUs, which take turns at the same
# work: how long the guest pauses, what a migration costs, how fast the guest
# is back after a failure, how much memory the source uses.  If two of them are
# called "patched" and "stock", the first one has to stay under bars.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import argparse
import contextlib
import csv
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import typing

sys.dont_write_bytecode = True          # the sources stay as they are
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = HERE, os.path.join(HERE, '../check/lib')
import plot                                             # noqa: E402
from link import FAR, Link                              # noqa: E402
from twoqemu import (                                   # noqa: E402
    BITMAP_NODE, ENDS, Fault, MIB, Side, Withhold, assemble_guest, await_guest,
    deadline, guest_args, loaded, parse_args, precopy_with_nothing_left,
    run_test, start_migration)

PARSER = argparse.ArgumentParser(
    description='Measure postcopy migrations of several QEMUs.')
PARSER.add_argument('--runs', type=int, default=30,
                    help='of each case (default: %(default)s)')
PARSER.add_argument('--only', action='append',
                    help='the cases with this text in their names; more of '
                         'these options for more cases')
PARSER.add_argument('--bar', action='append', default=[],
                    metavar='TEXT=MS',
                    help='for the shortest pause of each QEMU in each case '
                         'with this text in its name')
PARSER.add_argument('--out', required=True,
                    help='directory for the results; those that are there '
                         'already are reported, too')
OPTS = parse_args(PARSER, action='append', metavar='LABEL=PATH',
                  help='a QEMU; give this option for each.  With the first '
                       'one, the guest has to come back after a failure')

from qemu.qmp import QMPError                           # noqa: E402

CARD = 1000 * 1500      # bytes, like the thousand packets of a network card

# Name: bit/s, round trip in seconds, bytes that it queues
LINKS = {
    'loopback': None,
    '1 Gbit/s, 1 ms': (1e9, 0.001, CARD),
    '1 Gbit/s, 20 ms': (1e9, 0.020, CARD),
    '100 Mbit/s, 1 ms': (1e8, 0.001, CARD),
    '100 Mbit/s, 20 ms': (1e8, 0.020, CARD),
}

# Those that precopy saturates, with 50 and 20 ms in the queue of a switch
SATURATED = {
    '100 Mbit/s': (1e8, 0.001, 625000),
    '1 Gbit/s': (1e9, 0.001, 2500000),
}

# By the number of disks.  One of them and one CPU are there always.
DEVICES = {
    1: [],
    17: ['-smp', '8'] + [
        arg for i in range(16) for arg in (
            '-blockdev',
            f'null-co,node-name=null{i},size={MIB},read-zeroes=on',
            '-device', f'virtio-blk-pci,drive=null{i}')],
}

# All runs, and what is in the columns
HEADER = 'case', 'QEMU', 'figure', 'value', 'load'

# What is printed above them
BARS = """\
Bars, of medians.  Pause: that of stock + one round trip + 1 ms; with precopy
at full speed also 0.3 of stock's (1 disk) or 0.5 (17 disks); with 17 disks and
an idle guest also 0.4.  Total: that of stock + one phase, which is drain,
package, load and one round trip; it is taken as the pause + two round trips +
the time that the link's queue needs."""

# Seconds after which a guest that is not back will not come back
HANGS = 10


class Setup(typing.NamedTuple):
    """What a pause is measured with"""
    link: tuple             # of LINKS
    disks: int
    fill: int               # MiB that the guest uses
    bandwidth: int          # bytes/s of precopy, 0: what the link carries
    idle: bool = False      # or it dirties all that it uses, all the time
    mib: int = 256
    wide: bool = False      # it has and uses memory from 4 GiB on
    scattered: bool = False     # it uses every second page


class Watch(Withhold):
    """
    Notes when the destination is seen to be gone.  With HOLD, keeps back its
    word that the devices are loaded, and all that it says after that.
    """
    def __init__(self, tmp, hold):
        self.hold = hold
        self.gone = threading.Event()
        self.when = None
        super().__init__(os.path.join(tmp, 'relay'),
                         os.path.join(tmp, 'incoming'),
                         lambda *message: hold and loaded(*message))

    def back(self, link):
        with contextlib.suppress(OSError):
            super().back(link)
        self.when = self.when or time.time()
        self.gone.set()

    def cut(self):
        self.when = time.time()
        self.close()


def cpu_time(side):
    """In ms, of the whole process"""
    return time.clock_gettime((~side.vm.get_pid() << 3) | 2) * 1000


def rss(side):
    """In MiB"""
    with open(f'/proc/{side.vm.get_pid()}/statm', encoding='ascii') as statm:
        return int(statm.read().split()[1]) * os.sysconf('SC_PAGESIZE') / MIB


def when(side, event):
    """When the last such event was"""
    return [stamp for stamp, _, what in side.report if what == event][-1]


def assemble_wide(image, size):
    """Make the disk IMAGE with a guest that dirties SIZE bytes"""
    obj = image + '.o'
    subprocess.run(['as', '--32', f'--defsym=SIZE={size}', '-o', obj,
                    os.path.join(HERE, 'guest64.S')], check=True)
    subprocess.run(['ld', '-m', 'elf_i386', '-Ttext=0x7c00', '-e', 'start',
                    '--oformat=binary', '-o', image, obj], check=True)
    os.truncate(image, MIB)


class Pair:
    """Two QEMUs, with the guest at the source"""

    # pylint: disable=too-many-arguments
    def __init__(self, tmp, qemu, stack, mib=256, fill=32, idle=True, args=(),
                 source_args=(), capabilities=(), wrapper=(), bandwidth=0,
                 wide=False, scattered=False):
        self.tmp = tmp
        image = os.path.join(tmp, 'guest.img')
        # Memory that the host has to find first would be most of the time.
        # The wide guest has used all that counts before it is migrated.
        if wide:
            assemble_wide(image, fill * MIB)
            start = ['-cpu', 'max', '-machine',
                     f'pc,max-ram-below-4g={mib - fill}M']
        else:
            step = 1 + scattered
            assemble_guest(image, PATTERN_SIZE=4096, STRIDE=4096 * step,
                           COUNTERS_SIZE=fill * step * MIB, IDLE=int(idle))
            start = ['-mem-prealloc']
        args = guest_args(image, mib) + start + list(args)
        self.source = Side('source', tmp, qemu, args + list(source_args))
        self.destination = Side('destination', tmp, qemu,
                                args + ['-incoming', 'defer'], wrapper)
        for side in self.source, self.destination:
            stack.callback(side.vm.shutdown, hard=True)
            side.launch()
            side.enable(*capabilities)
        await_guest(self.source)
        self.source.vm.cmd('migrate-set-parameters', max_bandwidth=bandwidth)

    def migrate(self, sent, target=None, **incoming):
        target = target or 'unix:' + os.path.join(self.tmp, 'incoming')
        start_migration(self.source, self.destination, target, sent,
                        **incoming)

    def complete(self):
        """Returns what every migration has."""
        for side in self.source, self.destination:
            side.await_event(*ENDS)
            if side.states()[-1] != 'completed':
                raise Fault(f'the {side.name} ends as {side.states()[-1]}')
        if 'postcopy-active' not in self.source.states():
            raise Fault('precopy has sent all of it')
        self.destination.await_event('RESUME')
        stop = when(self.source, 'STOP')
        info = self.source.vm.cmd('query-migrate')
        return {
            'pause ms': (when(self.destination, 'RESUME') - stop) * 1000,
            'STOP to end ms': (when(self.source, 'completed') - stop) * 1000,
            'total ms': info['total-time'],
            'sent MiB': info['ram']['transferred'] / MIB,
        }


def measure_pause(tmp, qemu, stack, link, setup):
    pair = Pair(tmp, qemu, stack, mib=setup.mib, fill=setup.fill,
                idle=setup.idle, args=DEVICES[setup.disks], wide=setup.wide,
                scattered=setup.scattered,
                wrapper=link.wrapper if setup.link else (),
                bandwidth=setup.bandwidth)
    uri = {}
    if setup.link:
        link.set(*setup.link)
        uri = {'uri': f'tcp:{FAR}:4444'}
    # The idle guest is switched over at once: the devices have to wait for
    # pages.  Of the other one all memory has been sent, and is dirty again.
    sent = 2 * MIB if setup.idle else setup.fill * MIB * 5 // 4
    pair.migrate(sent, uri.get('uri'), **uri)
    return pair.complete()


def measure_cost(tmp, qemu, stack, mib):
    pair = Pair(tmp, qemu, stack, mib=mib, fill=mib // 4,
                bandwidth=256 * MIB)
    before = {side: cpu_time(side) for side in (pair.source, pair.destination)}
    pair.migrate(mib // 16 * MIB)
    found = pair.complete()
    return {**found, **{f'{side.name} CPU ms': cpu_time(side) - before[side]
                        for side in before}}


def measure_memory(tmp, qemu, stack, release):
    pair = Pair(tmp, qemu, stack, mib=512, fill=256, bandwidth=128 * MIB,
                capabilities=['release-ram'] if release else [])
    pair.source.vm.cmd('migrate-set-parameters',
                       max_postcopy_bandwidth=256 * MIB)
    start = rss(pair.source)
    pair.migrate(64 * MIB)
    pair.complete()
    return {'source RSS at start MiB': start,
            'source RSS at end MiB': rss(pair.source)}


def measure_back(tmp, qemu, stack, fault, all_sent):
    relay = Watch(tmp, fault != 'load fails')
    stack.callback(relay.close)
    pair = Pair(tmp, qemu, stack, args=BITMAP_NODE, bandwidth=32 * MIB,
                capabilities=['dirty-bitmaps'] if all_sent else [],
                source_args=([] if relay.hold else
                             ['-device', 'virtio-rng-pci']))
    source, destination = pair.source, pair.destination
    if all_sent:
        precopy_with_nothing_left(source)
    pair.migrate(None if all_sent else 2 * MIB, 'unix:' + relay.path)
    source.await_event('postcopy-device', 'postcopy-active', *ENDS)
    if 'postcopy-device' not in source.states():
        return {}               # it will not come back
    done = {}
    if relay.hold:
        relay.reached.wait()
        left = source.vm.cmd('query-migrate')['ram']['remaining']
        if all_sent != (left == 0):
            raise Fault(f'{left} bytes are left')
        if fault == 'killed':
            start = time.time()
            destination.signal(signal.SIGKILL)
            done['from SIGKILL ms'] = lambda: when(source, 'RESUME') - start
        else:
            relay.cut()
    with contextlib.suppress(Fault), deadline('guest back', HANGS):
        relay.gone.wait()
        source.await_event('RESUME')
    if ('RESUME', 'RESUME') not in source.seen():
        return {}
    done['back ms'] = lambda: when(source, 'RESUME') - relay.when
    return {name: value() * 1000 for name, value in done.items()}


def pauses(link):
    """Yields (name, setup)"""
    for name, shape in LINKS.items():
        if shape and not link:
            continue
        # Below the link's rate, and no more in a burst, which QEMU sends every
        # 100 ms, than the link can queue: nothing is lost, and nothing is in
        # front of the device state.
        rate = 64 * MIB
        if shape:
            rate = int(min(shape[0] / 8 / 2, shape[2] / 0.1))
        for disks in DEVICES:
            for idle in True, False:
                yield (f'pause: {name}, {"small" if disks == 1 else "large"} '
                       f'state, {"idle" if idle else "dirtying"} guest',
                       Setup(shape, disks, 12 if rate < 10 * MIB else 32, rate,
                             idle))
    for name, shape in SATURATED.items() if link else ():
        for disks in DEVICES:
            yield (f'full speed: {name}, {disks} disk{"s" * (disks > 1)}',
                   Setup(shape, disks, 48, 0))
    if link:
        yield ('full speed: 1 Gbit/s, 1 disk, 300 MiB dirty',
               Setup(SATURATED['1 Gbit/s'], 1, 300, 0, mib=512))
        yield ('full speed: 1 Gbit/s, 1 disk, 300 MiB dirty, scattered',
               Setup(SATURATED['1 Gbit/s'], 1, 300, 0, mib=768,
                     scattered=True))


def cases(link):
    """Yields (name, function, arguments)"""
    for name, setup in pauses(link):
        yield name, measure_pause, (link, setup)
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGESIZE') // MIB

    def fits(mib):
        if mib <= memory // 2:
            return True
        print(f'skipped: {mib} MiB guest, this machine has {memory} MiB')
        return False

    for mib in filter(fits, (1024, 4096, 8192)):
        yield (f'guest: {mib} MiB, all dirty', measure_pause,
               (link, Setup(None, 1, mib - 64, 0, mib=mib, wide=True)))
    for mib in filter(fits, (256, 1024, 8192)):
        yield f'cost: {mib} MiB', measure_cost, (mib,)
    for release in True, False:
        yield (f'memory: release-ram {"on" if release else "off"}',
               measure_memory, (release,))
    for fault in 'killed', 'cut', 'load fails':
        for all_sent in False, True:
            yield (f'back: {fault}, {"no" if all_sent else "some"} pages left',
                   measure_back, (fault, all_sent))


def table(results, labels):
    """Lines: median and quartiles by case and figure, a column per QEMU"""
    lines = [f'{"median (quartiles)":<42}'
             + ''.join(f'{label:>28}' for label in labels)]
    last = None
    for case, what in dict.fromkeys((case, what) for case, _, what in results):
        if case != last:
            lines.append(case)
            last = case
        line = f'   {what:<39}'
        for label in labels:
            values = results.get((case, label, what))
            if values:
                low, median, high = plot.quartiles(values)
                cell = f'{median:.4g} ({low:.4g}..{high:.4g})'
            else:
                cell = '-'
            line += f'{cell:>28}'
        lines.append(line)
    return lines


def bars(results, setups):
    """Returns lines, and how many of the figures are over their bars."""
    lines = [BARS, f'{"median in ms":<64}{"patched":>9}{"stock":>9}'
             f'{"ratio":>7}{"bar":>9}']
    over = 0
    for case, setup in setups.items():
        rate, trip, queue = setup.link or (math.inf, 0, 0)
        trip *= 1000
        found = {(label, what): statistics.median(results[case, label, what])
                 for label in ('patched', 'stock')
                 for what in ('pause ms', 'total ms')
                 if (case, label, what) in results}
        if len(found) < 4:
            continue
        pause = found['stock', 'pause ms']
        limits = [pause + trip + 1]
        if setup.link and not setup.bandwidth:
            limits.append(pause * (0.3 if setup.disks == 1 else 0.5))
        if setup.disks > 1 and setup.idle:
            limits.append(pause * 0.4)
        phase = found['patched', 'pause ms'] + 2 * trip + queue * 8000 / rate
        bars = {'pause ms': min(limits)}
        if not setup.wide:
            # Of these the total is the host's, which has to find the memory:
            # it is 1.5 s longer in the first of two runs, whichever that is.
            bars['total ms'] = found['stock', 'total ms'] + phase
        for what, bar in bars.items():
            patched, stock = found['patched', what], found['stock', what]
            over += patched > bar
            lines.append(f'{case + ", " + what.removesuffix(" ms"):<64}'
                         f'{patched:9.1f}{stock:9.1f}{patched / stock:7.2f}'
                         f'{bar:9.1f} {"OVER" if patched > bar else "ok"}')
    return lines, over


class Bench:
    """All the runs, and what they found"""

    def __init__(self, tmp, link):
        self.tmp = tmp
        self.qemus = [spec.split('=', 1) for spec in OPTS.qemu]
        everything = list(cases(link))
        self.setups = {name: args[1] for name, function, args in everything
                       if function == measure_pause}
        self.cases = [case for case in everything
                      if any(text in case[0] for text in OPTS.only or [''])]
        self.bad = 0
        os.makedirs(OPTS.out, exist_ok=True)

    def measure(self, number, case, label, path):
        """Returns figures by name, and notes them."""
        name, function, args = case
        tmp = os.path.join(self.tmp, f'{number}')
        os.mkdir(tmp)
        with contextlib.ExitStack() as stack:
            with deadline(name, 120):
                found = function(tmp, path, stack, *args)
        if not found and label == self.qemus[0][0]:
            raise Fault('the guest is not back')
        with open(os.path.join(OPTS.out, 'bench.csv'), 'a',
                  encoding='utf-8') as out:
            writer = csv.writer(out, lineterminator='\n')
            if not out.tell():
                writer.writerow(HEADER)
            writer.writerows([name, label, what, f'{value:.3f}',
                              os.getloadavg()[0]]
                             for what, value in found.items())
        return ', '.join(f'{what} {value:.2f}'
                         for what, value in found.items()) or 'never'

    def run(self):
        number, never = 0, set()
        total = OPTS.runs * len(self.cases) * len(self.qemus)
        for i in range(OPTS.runs):
            for case in self.cases:
                turn = i % len(self.qemus)
                for label, path in self.qemus[turn:] + self.qemus[:turn]:
                    number += 1
                    if (case[0], label) in never:
                        continue
                    try:
                        line = self.measure(number, case, label, path)
                    except (Fault, QMPError, OSError) as err:
                        line = f'BAD: {type(err).__name__}: {err}'
                        self.bad += 1
                    if line == 'never':
                        never.add((case[0], label))
                    print(f'{number}/{total} {case[0]}, {label}: {line}',
                          flush=True)


def read():
    """All that this and earlier runs have found, by case, QEMU and figure"""
    results = {}
    with contextlib.suppress(FileNotFoundError):
        with open(os.path.join(OPTS.out, 'bench.csv'),
                  encoding='utf-8') as rows:
            for *key, value, _ in list(csv.reader(rows))[1:]:
                results.setdefault(tuple(key), []).append(float(value))
    return results


def summarize(results):
    """Writes the summary, makes the plots.  Returns the table."""
    labels = list(dict.fromkeys(label for _, label, _ in results))
    with open(os.path.join(OPTS.out, 'summary.csv'), 'w',
              encoding='utf-8') as out:
        writer = csv.writer(out, lineterminator='\n')
        writer.writerow(['case', 'QEMU', 'figure', 'runs', 'lower quartile',
                         'median', 'upper quartile'])
        writer.writerows([*key, len(values),
                          *(f'{x:.3f}' for x in plot.quartiles(values))]
                         for key, values in results.items())

    def points(name, title, kind, *figures, **options):
        names = dict.fromkeys(case for case, _, _ in results
                              if case.startswith(kind))
        plot.points(OPTS.out, name, title, results, labels, [
            (case.removeprefix(kind) + (
                f', {figure.removesuffix(" ms")}' if figures[1:] else ''),
             case, figure) for case in names for figure in figures], **options)

    points('saturated', 'Pause of the guest, precopy at full speed',
           'full speed: ', 'pause ms', bars=True)
    points('pause', 'Pause of the guest', 'pause: ', 'pause ms')
    points('total', 'The whole migration', 'pause: ', 'total ms')
    points('back', 'From the failure until the guest runs', 'back: ',
           'back ms')
    points('cost', 'Cost of a migration', 'cost: ', 'total ms',
           'source CPU ms', 'destination CPU ms')
    return '\n'.join(table(results, labels))


def report(setups):
    """Returns how many figures are over their bars."""
    results = read()
    print(f'\n{summarize(results)}\n')
    over = 0
    for text, bar in (bar.rsplit('=', 1) for bar in OPTS.bar):
        for (case, label, what), values in results.items():
            if text in case and what == 'pause ms':
                bad = min(values) > float(bar)
                over += bad
                print(f'{case}, {label}: pause at least {min(values):.1f} ms, '
                      f'bar {bar} {"OVER" if bad else "ok"}')
    if not {'patched', 'stock'} <= {label for _, label, _ in results}:
        return over
    lines, slow = bars(results, setups)
    print('\n'.join([*lines, f'{slow} OVER\n']))
    return over + slow


def run_all(tmp):
    """Returns the exit status."""
    link = None
    try:
        link = Link()
    except OSError as err:
        print(f'skipped: the links with a rate and a delay ({err}; they need '
              'root and /dev/net/tun)')
    bench = Bench(tmp, link)
    if not bench.cases:
        if not link:
            return 77
        link.close()
        PARSER.error(f'no case has one of {OPTS.only} in its name')
    try:
        bench.run()
    finally:
        if link:
            link.close()
        over = report(bench.setups)
        print(f'{bench.bad} bad; load {os.getloadavg()[0]:.1f} on '
              f'{os.cpu_count()} CPUs; figures and plots:  {OPTS.out}')
    return bool(bench.bad or over)


sys.exit(run_test('bench', run_all))
