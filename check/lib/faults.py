#
# A migration between two QEMUs with a fault at a moment that is drawn from a
# seed, and who has to have the guest after it.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import threading
import time
import types

from qemu.qmp import QMPError
from twoqemu import (
    BEFORE_PACKAGE, CMD_PACKAGED, ENDS, Fault, HELD, HOLD, LOADED, MIB, RP_PONG,
    RP_SHUT, Relay, START, command, deadline, message, ping, start_migration,
    timeline)

# The monitor answers within this time, and no state lasts longer than that.
ANSWER_LIMIT, SETTLE_LIMIT = 1, 30

# What the relay looks for in the stream
PING = ping(BEFORE_PACKAGE)
PACKAGE = PING + command(CMD_PACKAGED, 4)       # its length follows
MARKS = {
    'forward': {
        'HOLD': ping(HOLD),
        'discard': b'\0\6pc.ram\0',
        'package': PACKAGE,
        'START': ping(START),
    },
    'return': {
        'HELD': message(RP_PONG, HELD),
        'LOADED': message(RP_PONG, LOADED),
        'SHUT': message(RP_SHUT, 0),
    },
}

# For "exec:"
CARRY = ' '.join((sys.executable, os.path.join(
    os.path.dirname(os.path.abspath(__file__)), 'carry.py')))

BOTH = ('forward', 'return')
PROCESSES = ('source', 'destination')


class Plan:
    """What a run does, all drawn from its seed"""

    def __init__(self, seed, other=False, multifd=False):
        """OTHER: the QEMUs are two; MULTIFD: they can do postcopy with it."""
        rng = random.Random(seed)
        chance = rng.random

        self.preempt = chance() < 0.5
        self.release_ram = chance() < 0.2
        self.paused = chance() < 0.15
        self.exit_on_error = chance() < 0.5
        self.late_block_activate = chance() < 0.15
        self.sent = rng.choice((MIB, 8 * MIB))
        self.prefer_cancel = chance() < 0.5

        # Where: so many bytes, or such a part of the package, behind a mark
        self.mark = rng.choices(
            ('HOLD', 'HELD', 'discard', 'return', 'package', 'LOADED', 'START',
             'SHUT'), (6, 6, 18, 10, 18, 24, 10, 8))[0]
        self.offset = {
            'HOLD': lambda: rng.randint(0, 24),
            'HELD': lambda: rng.randint(0, 12),
            'discard': lambda: int(2 ** rng.uniform(0, 27)),
            'return': lambda: int(2 ** rng.uniform(0, 17)),
            'package': rng.random,
            'LOADED': lambda: rng.randint(0, 12),
            'START': lambda: rng.randint(0, 24),
            'SHUT': lambda: rng.randint(0, 8),
        }[self.mark]()

        # What
        self.fault = rng.choices(
            ('cut', 'stall', 'freeze', 'kill', 'vanish'),
            (27, 36, 13, 13, 11))[0]
        self.directions = rng.choice((
            BOTH, BOTH[1:] if self.mark in MARKS['return'] else BOTH[:1],
            BOTH[1:]))
        self.channels = 'all'
        if self.preempt and self.fault == 'cut':
            self.channels = rng.choice(('all', 'all', 'main', 'preempt'))
        self.victim = rng.choices(PROCESSES, (20, 80))[0]

        # Then, if things can go on from there
        commands = {
            'stall': ('none', 'migrate_cancel', 'yank source',
                      'yank destination', 'kill destination',
                      'freeze destination'),
            'freeze': (('none', 'migrate_cancel', 'yank source', 'cut')
                       if self.victim == 'destination' else
                       ('none', 'yank destination', 'cut')),
        }
        self.command = rng.choice(commands.get(self.fault, ('none',)))
        self.wait = rng.choices((0.02, 0.3, 2), (50, 35, 15), k=2)
        self.end_with_cut = chance() < 0.5

        # A cut so many bytes into the first recovery, and migrate_cancel then
        self.again = int(2 ** rng.uniform(0, 20)) if chance() < 0.4 else None
        self.cancel_again = chance() < 0.5

        # Before it, one whose preempt channel never arrives
        self.withhold_again = self.preempt and chance() < 0.3

        # A preempt channel that is accepted, but never arrives: only the end
        # of the link tells the destination
        self.withhold = self.preempt and chance() < 0.2
        if self.withhold:
            self.channels, self.end_with_cut = 'all', True
            if self.fault == 'freeze' or self.command.startswith('freeze'):
                self.fault, self.command = 'stall', 'migrate_cancel'
            # Nothing comes behind the package then
            if (self.mark not in ('HOLD', 'HELD', 'discard', 'package')
                    or self.mark == 'discard' and self.offset > 1000):
                self.mark, self.offset = 'package', 1

        # Which side's stream a process carries, by "exec:"
        self.exec = 'none'
        if not self.preempt and chance() < 0.3:
            self.exec = rng.choice(PROCESSES)
        if self.exec == 'source' and chance() < 0.3:
            # It is refused in the phase, and says what to do
            self.fault, self.command = 'stall', 'migrate_cancel'

        if (self.exec == 'destination' and self.fault == 'stall'
                and 'return' in self.directions):
            # QEMU waits for a process that does not get rid of what it carries
            self.exec = 'none'

        self.from_other = other and chance() < 0.5
        # Its channels, too, would be connected to nothing or to a process
        self.multifd = (multifd and not self.withhold and self.exec == 'none'
                        and chance() < 0.5)
        if (self.fault in ('stall', 'vanish', 'freeze')
                and self.mark in ('HOLD', 'discard')):
            # The destination waits for these channels, its monitor with it
            self.multifd = False
        if self.multifd and self.channels == 'preempt':
            self.channels = 'other'

    def kind(self):
        """The fault in short"""
        what = {'cut': f'cut {"+".join(self.directions)}',
                'stall': f'stall {"+".join(self.directions)}',
                'freeze': f'freeze {self.victim}',
                'kill': f'kill {self.victim}',
                'vanish': 'network vanishes'}[self.fault]
        if self.channels != 'all':
            what += f' of the {self.channels} channel'
        if self.command != 'none':
            what += f', {self.command}'
        if self.fault == 'stall' and self.command != 'freeze destination':
            what += ', ' + ('cut' if self.end_with_cut else 'go on')
        return what

    def __str__(self):
        where = (f'{self.offset:.3f} of the package' if self.mark == 'package'
                 else f'{self.mark}+{self.offset}')
        with_ = [name for name in ('preempt', 'release_ram', 'paused',
                                   'exit_on_error', 'late_block_activate',
                                   'withhold', 'multifd', 'from_other')
                 if getattr(self, name)]
        if self.exec != 'none':
            with_.append(f'exec at {self.exec}')
        return f'{self.kind()} at {where} ({" ".join(with_) or "plain"})'


class FaultRelay(Relay):
    """Lets the fault of a plan happen at its moment."""

    def __init__(self, path, destination, plan, sides):
        self.plan, self.sides = plan, sides
        self.hit = threading.Event()
        self.frozen = None              # a side
        self.armed = False              # postcopy was asked for
        self.stalled = ()
        self.changed = threading.Condition()
        self.got = dict.fromkeys(BOTH, 0)
        self.tail = dict.fromkeys(BOTH, b'')
        self.target = {}                # the fault's byte, by direction
        self.ends = {}                  # of the marks that were seen
        self.passed = set()             # marks that have left the relay
        self.notes = []
        if plan.mark == 'begin':
            self.target = dict.fromkeys(BOTH, plan.offset)
        super().__init__(path, destination)

    def note(self, text):
        self.notes.append((time.time(), text))

    def connect(self, number):
        if number and self.plan.withhold:
            self.note('a preempt channel is withheld')
            end, self.idle = socket.socketpair()
            return end
        # What listens may be a process that QEMU has begun just now
        end = time.monotonic() + SETTLE_LIMIT
        while True:
            try:
                return super().connect(number)
            except OSError:
                if self.plan.exec != 'destination' or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def forward(self, link):
        self._pump(link, 'forward', link.source_end, link.destination_end)

    def back(self, link):
        self._pump(link, 'return', link.destination_end, link.source_end)

    def _pump(self, link, direction, end, other):
        sent = 0
        while data := end.recv(65536):
            pieces = [data]
            if link.number == 0:
                self._look(direction, data)
                split = self._split(direction, len(data))
                self.got[direction] += len(data)
                if split is not None:
                    pieces = [data[:split], data[split:]]
            for i, piece in enumerate(pieces):
                if i:
                    self._strike()
                self._await_link(direction)
                other.sendall(piece)
                sent += len(piece)
                for mark in list(self.ends):
                    if (link.number == 0 and mark in MARKS[direction]
                            and sent >= self.ends[mark]):
                        self.passed.add(mark)
        self._await_link(direction)     # for the end of the stream, too

    def _await_link(self, direction):
        with self.changed:
            self.changed.wait_for(lambda: direction not in self.stalled)

    def _look(self, direction, data):
        """Notes the marks in DATA, and what the fault's byte is."""
        window = self.tail[direction] + data
        base = self.got[direction] - len(self.tail[direction])
        self.tail[direction] = window[-len(PACKAGE):]
        if not self.armed:
            return
        for mark, text in MARKS[direction].items():
            place = window.find(text)
            if mark in self.ends or place < 0:
                continue
            self.ends[mark] = base + place + len(text)
            self.note(f'{mark} reaches the relay')
            if self.plan.mark == mark:
                offset = self.plan.offset
                if mark == 'package':
                    place += len(PING)
                    length = window[place + 5:place + 9]
                    offset = int(offset * (9 + int.from_bytes(length, 'big')))
                self.target[direction] = base + place + offset
            if (self.plan.mark, mark) == ('return', 'discard'):
                self.target['return'] = self.got['return'] + self.plan.offset

    def _split(self, direction, length):
        """Where in the next LENGTH bytes the fault is"""
        if direction in self.target and not self.hit.is_set():
            place = self.target[direction] - self.got[direction]
            if place <= length:
                return max(place, 0)
        return None

    def _strike(self):
        plan = self.plan
        with contextlib.suppress(ProcessLookupError):
            if plan.fault == 'cut':
                self.cut(plan.directions, plan.channels)
            elif plan.fault == 'stall':
                self.stall(plan.directions)
            elif plan.fault == 'freeze':
                self.freeze(self.sides[plan.victim])
            elif plan.fault == 'vanish':
                self.vanish()
            else:
                self.sides[plan.victim].signal(signal.SIGKILL)
        self.note(plan.kind().split(',')[0])
        self.hit.set()

    def freeze(self, side):
        self.frozen = side
        side.signal(signal.SIGSTOP)

    def thaw(self):
        self.note(f'{self.frozen.name} goes on')
        self.frozen.signal(signal.SIGCONT)
        self.frozen = None

    def stall(self, directions):
        with self.changed:
            self.stalled = directions
            self.changed.notify_all()

    def vanish(self):
        """The source sees the link broken, the destination waits for ever."""
        self.stall(BOTH)
        for link in self.links:
            with contextlib.suppress(OSError):
                link.source_end.shutdown(socket.SHUT_RDWR)

    def cut(self, directions, channels='all'):
        links = {'all': self.links, 'main': self.links[:1]}.get(
            channels, self.links[1:])
        for link in links:
            for direction, end, other in (
                    ('forward', link.source_end, link.destination_end),
                    ('return', link.destination_end, link.source_end)):
                if direction in directions:
                    for sock, how in ((end, socket.SHUT_RD),
                                      (other, socket.SHUT_WR)):
                        with contextlib.suppress(OSError):
                            sock.shutdown(how)


def answering(side):
    """Its threads that answer a command: the main one, the monitor's"""
    path = f'/proc/{side.vm.get_pid()}/task'
    found = [f'{path}/{side.vm.get_pid()}']
    with contextlib.suppress(OSError):
        for task in os.listdir(path):
            with open(f'{path}/{task}/comm', encoding='ascii') as comm:
                if comm.read().startswith('IO mon'):
                    found.append(f'{path}/{task}')
    return found


class Stopwatch:
    """Seconds, but for those in which who asks or answers waited for a CPU"""

    def __init__(self, side):
        self.tasks = answering(side) + [
            f'/proc/self/task/{threading.get_native_id()}']
        self.begin = time.monotonic()
        self.waited = self._cpu_waits()

    def _cpu_waits(self):
        waits = 0
        for task in self.tasks:
            with contextlib.suppress(OSError):
                with open(f'{task}/schedstat', encoding='ascii') as stat:
                    waits += int(stat.read().split()[1]) / 1e9
        return waits

    def seconds(self):
        return (time.monotonic() - self.begin
                - max(0, self._cpu_waits() - self.waited))


def end_carriers(side):
    """End the processes that carry its stream."""
    path = f'/proc/{side.vm.get_pid()}/task'
    with contextlib.suppress(OSError):
        for task in os.listdir(path):
            with open(f'{path}/{task}/children', encoding='ascii') as pids:
                for pid in pids.read().split():
                    os.kill(int(pid), signal.SIGKILL)


class Run:
    """One migration with a fault.  The guest is the one of a derived class."""

    def __init__(self, plan, tmp, source, destination):
        self.plan, self.tmp = plan, tmp
        self.source, self.destination = source, destination
        self.sides = {'source': source, 'destination': destination}
        self.relay = FaultRelay(os.path.join(tmp, 'relay'),
                                os.path.join(tmp, 'incoming'),
                                self.plan, self.sides)
        self.relays = [self.relay]
        self.behind = set()         # frozen sides that owe an answer
        self.killed = set()
        self.slowest = 0.0
        self.cancelled = False
        self.at_least = 0
        self.start = time.time()

    def count(self, side):
        """Returns how far the guest is, which is stopped there."""
        raise NotImplementedError

    def check_running(self, side, at_least):
        """The guest runs there, is whole, was that far, and goes on."""
        raise NotImplementedError

    def answers(self, _side):
        """Does its monitor answer more than out-of-band commands?"""
        return True

    def ask(self, side, command, oob=False, **args):
        """A command that has to be answered in time"""
        # pylint: disable=protected-access
        loop, qmp = side.vm._qmp._aloop, side.vm._qmp._qmp
        task = loop.create_task(qmp.execute(
            command, {name.replace('_', '-'): args[name] for name in args},
            oob))
        watch = Stopwatch(side)
        while not task.done():
            loop.run_until_complete(asyncio.wait([task], timeout=0.2))
            late = watch.seconds()
            if late > ANSWER_LIMIT and not task.done():
                task.cancel()
                self.relay.note(f'no answer to {command} from {side.name}')
                raise Fault(f'MONITOR: the {side.name} did not answer '
                            f'{command} within {ANSWER_LIMIT} s')
            self.slowest = max(self.slowest, late)
        return task.result()

    def probe(self):
        """Both monitors answer."""
        for side in self.sides.values():
            if (side.exited.is_set() or side in self.behind
                    or side is self.relay.frozen or not self.answers(side)):
                continue
            try:
                self.ask(side, 'query-status')
                self.ask(side, 'query-migrate')
            except QMPError:
                if not side.exited.wait(5):
                    raise
            except Fault:
                if side.exited.wait(0.1):
                    continue
                self.drain()
                if side is not self.relay.frozen and self.answers(side):
                    raise
                self.behind.add(side)

    def pump(self, done, limit):
        """Note events, with the monitors probed, until DONE() or for LIMIT s.

        Returns whether it was DONE().
        """
        end = time.monotonic() + limit
        probe_at = time.monotonic() + 0.1
        while not done():
            now = time.monotonic()
            if now >= end:
                return False
            if now >= probe_at:
                self.probe()
                probe_at = time.monotonic() + 0.2
            self.source.next_event(min(0.02, end - now))
            while self.destination.next_event(0):
                pass
        return True

    def state(self, side):
        return side.states()[-1] if side.states() else 'none'

    def settled(self):
        if self.relay.frozen:
            return False
        for side in self.sides.values():
            if not side.exited.is_set() and self.state(side) not in ENDS:
                return False
        failed = self.state(self.destination) == 'failed'
        if (failed and self.plan.exit_on_error
                and not self.destination.exited.is_set()):
            return False
        if self.state(self.source) in ('failed', 'cancelled') and not (
                self.plan.paused or self.source.exited.is_set()):
            # It says so before it starts the guest
            last = [what for kind, what in self.source.seen()
                    if kind in ('STOP', 'RESUME')]
            return last[-1:] != ['STOP'] or self.disks_locked()
        return True

    def disks_locked(self):
        """Cancelled, and the destination has the disks: is 'cont' due?"""
        return (self.state(self.source) == 'cancelled' and "use 'cont'" in
                self.ask(self.source, 'query-migrate').get('error-desc', ''))

    def await_settled(self):
        if not self.pump(self.settled, SETTLE_LIMIT):
            self.check_one_owner()
            raise Fault(f'ENDLESS: after {SETTLE_LIMIT} s the source is '
                        f'{self.state(self.source)}, the destination '
                        f'{self.state(self.destination)}')
        # Nothing is due any more: what comes now comes unasked
        self.probe()
        self.drain()

    def drain(self):
        for side in self.sides.values():
            while side.next_event(0):
                pass

    def check_one_owner(self):
        """By the order of the events"""
        runs = {'source': not self.plan.paused, 'destination': False}
        moved = False
        rows = sorted((when, side.name, kind)
                      for side in self.sides.values()
                      for when, kind, _ in side.report if when >= self.start)
        for _, name, kind in rows:
            if kind in ('STOP', 'process'):
                runs[name] = False
            elif kind == 'RESUME':
                runs[name] = True
                moved |= name == 'destination'
                if all(runs.values()):
                    raise Fault('SPLIT: the guest runs on both sides')
                if moved and name == 'source':
                    raise Fault('SPLIT: the guest runs again on the source '
                                'after it has run on the destination')
        return moved

    def yank(self, side):
        # pylint: disable=protected-access
        side.vm._qmp.settimeout(SETTLE_LIMIT)
        watch = Stopwatch(side)
        try:
            reply = side.vm._qmp.cmd_obj({
                'exec-oob': 'yank', 'id': 'yank',
                'arguments': {'instances': [{'type': 'migration'}]}})
        except asyncio.TimeoutError as err:
            raise Fault(f'MONITOR: the {side.name} does not answer yank') \
                from err
        except QMPError:
            # Its migration has failed at once, and it has ended
            if not side.exited.wait(5):
                raise
            reply = {}
        finally:
            side.vm._qmp.settimeout(None)
        if not side.exited.is_set() and watch.seconds() > ANSWER_LIMIT:
            raise Fault(f'MONITOR: the {side.name} did not answer yank '
                        f'within {ANSWER_LIMIT} s')
        self.relay.note(f'yank {side.name}: '
                        + reply.get('error', {}).get('desc', 'done'))

    def cancel(self):
        """Returns None if it was granted, else why not"""
        try:
            self.ask(self.source, 'migrate_cancel')
        except QMPError as err:
            self.relay.note(f'migrate_cancel refused: {err}')
            return str(err)
        self.relay.note('migrate_cancel granted')
        self.drain()            # it has left the state that it was in
        return None

    def command(self):
        command = self.plan.command
        if command == 'migrate_cancel':
            why = self.cancel()
            # After the end it is granted, but does nothing
            self.cancelled = (why is None and
                              self.state(self.source) != 'completed')
            if why and 'end the process that carries it' in why:
                end_carriers(self.source)
                self.relay.note('process at the source ended')
            if why and 'cannot be held back' in why:
                raise Fault(f'CANCEL: refused although both sides can hold '
                            f'the guest: {why}')
        elif command.startswith('yank '):
            side = self.sides[command.split()[1]]
            if not side.exited.is_set():
                self.yank(side)
        elif command == 'kill destination':
            self.destination.kill()
            self.killed.add('destination')
        elif command == 'freeze destination':
            if not self.destination.exited.is_set():
                self.relay.freeze(self.destination)
            self.relay.cut(BOTH)
            self.relay.note('freeze destination, cut')
        elif command == 'cut':
            self.relay.cut(BOTH)

    def tell_destination(self):
        """It does not notice by itself that the network has vanished."""
        if self.destination.exited.is_set():
            return
        if self.plan.exec == 'destination':
            end_carriers(self.destination)
            self.relay.note('process at the destination ended')
            return
        try:
            self.ask(self.destination, 'migrate-pause', oob=True)
            self.relay.note('migrate-pause destination')
        except QMPError:
            self.yank(self.destination)

    def inject(self):
        """Returns if the fault has happened and is over"""
        plan = self.plan
        if not self.pump(lambda: self.relay.hit.is_set() or self.settled(),
                         SETTLE_LIMIT):
            raise Fault('ENDLESS: the fault is not reached, the source is '
                        f'{self.state(self.source)}, the destination '
                        f'{self.state(self.destination)}')
        if not self.relay.hit.is_set():
            return
        if plan.fault == 'kill':
            self.killed.add(plan.victim)
        if plan.fault == 'vanish':
            self.pump(lambda: False, plan.wait[0])
            self.tell_destination()
        if plan.fault not in ('stall', 'freeze'):
            return
        self.pump(lambda: False, plan.wait[0])
        if not self.source.exited.is_set():
            self.command()
        self.pump(lambda: False, plan.wait[1])
        if (self.relay.frozen is self.destination and plan.prefer_cancel and
                self.state(self.source) == 'postcopy-paused'):
            self.cancelled |= self.cancel() is None
        if self.relay.frozen:
            self.behind.discard(self.relay.frozen)
            self.relay.thaw()
        if plan.fault == 'stall':
            if plan.end_with_cut:
                self.relay.cut(BOTH)
            self.relay.stall(())
            self.relay.note('cut' if plan.end_with_cut else 'stall is over')

    def begin_recovery(self, uri):
        """It can be asked for when both sides have found the link broken."""
        incoming = 'unix:' + os.path.join(self.tmp, 'recover')
        end = time.monotonic() + SETTLE_LIMIT
        while True:
            try:
                self.ask(self.destination, 'migrate-recover', oob=True,
                         uri=incoming)
                break
            except QMPError as err:
                if time.monotonic() >= end:
                    raise Fault(f'LOST: no migrate-recover: {err}') from err
            self.pump(lambda: False, 0.1)
        self.ask(self.source, 'migrate', uri=uri, resume=True)

    def all_completed(self):
        return all(side.exited.is_set() or self.state(side) == 'completed'
                   for side in self.sides.values())

    def fail_recovery(self, offset, withhold):
        """One, unless it is through before its cut at that byte"""
        self.relay.note(f'recovery, cut after {offset} bytes'
                        + (', no preempt channel' if withhold else ''))
        relay = FaultRelay(
            os.path.join(self.tmp, f'relay{len(self.relays)}'),
            os.path.join(self.tmp, 'recover'),
            types.SimpleNamespace(
                mark='begin', offset=offset, fault='cut', withhold=withhold,
                exec='none', directions=BOTH, channels='all',
                kind=lambda: 'cut'),
            self.sides)
        self.relays.append(relay)
        before = len(self.source.states())
        self.begin_recovery('unix:' + relay.path)
        if withhold:
            self.pump(lambda: relay.hit.is_set() or self.all_completed()
                      or len(relay.links) > 1, SETTLE_LIMIT)
            self.pump(relay.hit.is_set, self.plan.wait[0])
            relay.cut(BOTH)
            relay.hit.set()
        if not self.pump(lambda: self.all_completed() or (
                relay.hit.is_set() and len(self.source.states()) > before and
                self.state(self.source) in ('postcopy-paused', 'completed')),
                SETTLE_LIMIT):
            raise Fault('ENDLESS: recovery that was cut, the source is '
                        f'{self.state(self.source)}, the destination '
                        f'{self.state(self.destination)}')

    def recover(self):
        """Over a link without faults, to the end.  Returns the outcome."""
        doubt = not self.check_one_owner()
        outcome = 'destination ({}, recovered'.format(
            'in doubt' if doubt else 'paused')
        if self.plan.withhold_again:
            self.fail_recovery(MIB, True)
        if (self.plan.again is not None
                and self.state(self.source) != 'completed'):
            self.fail_recovery(self.plan.again, False)
            outcome += ' twice'
        if self.plan.withhold_again:
            outcome += ', once without preempt channel'
        if self.state(self.source) != 'completed':
            if doubt and self.plan.cancel_again and self.cancel() is None:
                self.await_settled()
                self.judge_taken_back()
                return 'source (recovery failed, cancelled)'
            self.relay.note('recovery')
            self.begin_recovery('unix:' + os.path.join(self.tmp, 'recover'))
        if not self.pump(self.all_completed, SETTLE_LIMIT):
            raise Fault('LOST: recovery does not lead to completion, the '
                        f'source is {self.state(self.source)}, the '
                        f'destination {self.state(self.destination)}')
        self.drain()
        self.judge_moved('recovered')
        return outcome + ')'

    def check_exits(self):
        """QEMU dies if it is killed, or with an error report; nothing else."""
        for side in self.sides.values():
            if side.exited.is_set() and side.name not in self.killed:
                code = side.vm.exitcode()
                if (side is self.source or code != 1
                        or not self.plan.exit_on_error
                        or self.state(side) != 'failed'):
                    raise Fault(f'EXIT: the {side.name} ended with exit code '
                                f'{code}')

    def judge_moved(self, where):
        """The destination has the guest, and all of it."""
        if not self.check_one_owner():
            raise Fault(f'LOST: {where}, but the destination has not started '
                        'the guest')
        found = self.ask(self.destination, 'query-status')['status']
        if found != 'running':
            raise Fault(f'LOST: {where}, but the destination is {found}')
        before = 0
        if not self.source.exited.is_set():
            found = self.ask(self.source, 'query-status')['status']
            if found == 'running':
                raise Fault('SPLIT: both sides are running')
            before = self.count(self.source)
        self.check_running(self.destination, max(self.at_least, before))
        if not self.source.exited.is_set():
            if self.count(self.source) != before:
                raise Fault('SPLIT: guest memory changes on the source')

    def judge_taken_back(self):
        """The source has the guest, and all of it."""
        if self.check_one_owner():
            raise Fault('SPLIT: the destination has run the guest, but the '
                        f'source is {self.state(self.source)}')
        if not self.plan.paused and self.disks_locked():
            self.ask(self.source, 'cont')
            self.relay.note('cont')
        must = 'paused' if self.plan.paused else 'running'
        found = self.ask(self.source, 'query-status')['status']
        if found != must:
            raise Fault(f'LOST: the source is {self.state(self.source)}, but '
                        f'the guest there {found}, not {must}')
        if self.plan.paused:
            self.ask(self.source, 'cont')
        self.check_running(self.source, self.at_least)
        if not self.destination.exited.is_set():
            found = self.ask(self.destination, 'query-status')['status']
            if found == 'running':
                raise Fault('SPLIT: the destination runs the guest as well')
            self.destination.note_events()
            if ('RESUME', 'RESUME') in self.destination.seen():
                raise Fault('SPLIT: the destination has run the guest too')

    def judge_source_gone(self):
        """Its guest may be gone, but must not be if START has arrived"""
        moved = self.check_one_owner()
        if not moved and 'START' in self.relay.passed:
            raise Fault('LOST: START was sent but not obeyed')
        if moved and self.destination.exited.is_set():
            raise Fault('LOST: the destination had the guest and has ended')
        return ('destination runs, source was killed' if moved
                else 'lost with the source')

    def lost(self):
        """The destination was killed when the guest was its own."""
        return 'lost with the destination, START was ' + (
            'sent' if 'START' in self.relay.passed else 'due')

    def judge_paused(self):
        """postcopy-paused at the source"""
        moved = self.check_one_owner()
        alive = not self.destination.exited.is_set()
        state = self.state(self.destination)
        if alive and state == 'completed':
            self.judge_moved('completed at the destination')
            return 'destination (source paused)'
        if moved and not alive:
            if 'destination' not in self.killed:
                raise Fault('LOST: the destination had the guest and has '
                            'ended')
            return self.lost()
        # QEMU refuses to recover with release-ram: pages that were on their
        # way are lost.
        recoverable = (alive and state == 'postcopy-paused'
                       and not self.plan.release_ram)
        if not moved and (self.plan.prefer_cancel or not recoverable):
            why = self.cancel()
            if why is None:
                self.await_settled()
                self.judge_taken_back()
                return 'source (paused, cancelled)'
            # The relay may not have noted yet that it has passed that on
            if 'LOADED' in self.relay.passed or (
                    'LOADED' in self.relay.ends
                    and 'postcopy-active' in self.source.states()):
                if not alive and 'destination' in self.killed:
                    return self.lost()
                if alive and self.plan.release_ram:
                    return 'lost with the link (release-ram)'
            if not recoverable:
                raise Fault('LOST: nobody runs the guest, the source is '
                            'postcopy-paused, the destination '
                            f'{state if alive else "gone"}')
        if not recoverable:
            return 'lost with the link (release-ram)'
        return self.recover()

    def judge(self):
        """Returns the outcome"""
        self.check_exits()
        state = self.state(self.source)
        if self.source.exited.is_set():
            return self.judge_source_gone()
        if self.cancelled and state not in ('cancelled', 'failed'):
            raise Fault(f'CANCEL: granted, but the source is {state}')
        if state == 'postcopy-paused':
            return self.judge_paused()
        if state == 'completed':
            if 'destination' in self.killed:
                return self.lost()
            self.judge_moved('completed')
            return 'destination'
        self.judge_taken_back()
        return f'source ({state}{", then cont" if self.disks_locked() else ""})'

    def prepare(self):
        """Of two sides that run"""
        for side in self.sides.values():
            side.enable()
            side.vm.cmd('migrate-set-capabilities', capabilities=[
                {'capability': name, 'state': on} for name, on in (
                    ('postcopy-preempt', self.plan.preempt),
                    ('release-ram', self.plan.release_ram),
                    ('late-block-activate', self.plan.late_block_activate),
                    ('multifd', self.plan.multifd))])
        self.source.vm.cmd('migrate-set-parameters', max_bandwidth=32 * MIB)
        self.source.note_events()
        self.source.report.clear()
        self.start = time.time()

    def execute(self):
        """Returns the outcome"""
        self.prepare()
        incoming = self.relay.destination
        with deadline('the migration with its fault', 150):
            self.relay.armed = True
            start_migration(
                self.source, self.destination,
                f'exec:exec {CARRY} {self.relay.path}'
                if self.plan.exec == 'source' else 'unix:' + self.relay.path,
                self.plan.sent, exit_on_error=self.plan.exit_on_error,
                uri=f'exec:exec {CARRY} --listen {incoming}'
                if self.plan.exec == 'destination' else 'unix:' + incoming)
            self.inject()
            self.await_settled()
            outcome = self.judge()
        if self.plan.fault != 'none' and not self.relay.hit.is_set():
            outcome += ', fault not reached'
        return outcome

    def story(self):
        """Returns lines."""
        return timeline(self.start, *self.sides.values(),
                        [note for relay in self.relays for note in relay.notes],
                        self.plan.paused)

    def end(self):
        for relay in self.relays:
            relay.close()
