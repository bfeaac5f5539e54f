#
# What the tests with two QEMUs share: a guest whose memory can be checked, a
# QEMU on either side, a relay between them.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import array
import asyncio
import contextlib
import hashlib
import logging
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

MIB = 1 << 20

# Of the guest; guest.S says what they are
GUEST = {
    'PATTERN': 16 * MIB, 'PATTERN_SIZE': 32 * MIB,
    'COUNTERS': 64 * MIB, 'COUNTERS_SIZE': 64 * MIB,
    'STRIDE': 4096, 'MUL': 1664525, 'ADD': 1013904223, 'IDLE': 0,
}

ENDS = ('completed', 'failed', 'cancelled', 'postcopy-paused')

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Fault(Exception):
    """What makes a test a failed one"""


@contextlib.contextmanager
def interrupts_later():
    """
    A launch cannot be interrupted well: QEMUMachine takes that for its failure.
    The QEMUs inherit the mask: Ctrl-C is for this program alone, which then
    ends them.  The mask is the main thread's; another one can still get the
    signal, which Python then handles in the main thread.
    """
    came = []
    handlers = {signum: signal.signal(signum, lambda num, _: came.append(num))
                for signum in INTERRUPTS}
    signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for signum in came[:1]:
            signal.raise_signal(signum)


def parse_args(parser, **qemu):
    """Adds the options that every such test has."""
    parser.add_argument('--qemu', required=True,
                        **{'help': 'the QEMU to test', **qemu})
    parser.add_argument('--src', required=True,
                        help='its sources, for the Python packages in them')
    opts = parser.parse_args()
    sys.path.insert(0, os.path.join(opts.src, 'python'))
    return opts


@contextlib.contextmanager
def deadline(what, limit):
    """After LIMIT seconds, end what the block waits for."""
    def late(_signum, _frame):
        raise Fault(f'"{what}" was not done after {limit} s')

    signal.signal(signal.SIGALRM, late)
    # Repeated, because asyncio may keep an exception to itself.
    signal.setitimer(signal.ITIMER_REAL, limit, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Link:
    """One connection of the migration through a relay"""

    def __init__(self, number, source_end, destination_end):
        self.number = number        # 0 is the main channel
        self.source_end = source_end
        self.destination_end = destination_end


class Relay:
    """
    Carries the migration stream.  As in a network, the end of one direction is
    not the end of the other one.
    """
    def __init__(self, path, destination):
        self.path = path
        self.destination = destination
        self.links = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self):
        ends = [self.listener]
        for link in self.links:
            ends += [link.source_end, link.destination_end]
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                source_end = self.listener.accept()[0]
                destination_end = self.connect(len(self.links))
                link = Link(len(self.links), source_end, destination_end)
                self.links.append(link)
                for carry, end, other in (
                        (self.forward, source_end, destination_end),
                        (self.back, destination_end, source_end)):
                    threading.Thread(target=self._carry, daemon=True,
                                     args=(carry, link, end, other)).start()

    def connect(self, _number):
        """Returns the other end of this link."""
        end = socket.socket(socket.AF_UNIX)
        end.connect(self.destination)
        return end

    def _carry(self, carry, link, end, other):
        with contextlib.suppress(OSError):
            carry(link)
        for sock, how in (end, socket.SHUT_RD), (other, socket.SHUT_WR):
            with contextlib.suppress(OSError):
                sock.shutdown(how)

    def forward(self, link):
        """Carry what the source sends until it sends no more."""
        while data := link.source_end.recv(65536):
            link.destination_end.sendall(data)

    def back(self, link):
        """Carry what the destination sends until it sends no more."""
        while data := link.destination_end.recv(65536):
            link.source_end.sendall(data)


# The migration stream: values of migration.c, savevm.c and postcopy-device.h
OPEN_RETURN_PATH, CMD_PING, CMD_LISTEN, CMD_PACKAGED = 1, 2, 4, 7
RP_SHUT, RP_PONG = 1, 2
BEFORE_PACKAGE, LOADED, HOLD, HELD, START = (
    2, 0x42, 0x484f4c44, 0x48454c44, 0x53545254)


def command(number, length):
    """Of the source (QEMU_VM_COMMAND); so many bytes follow."""
    return struct.pack('>BHH', 8, number, length)


def ping(value):
    return command(CMD_PING, 4) + struct.pack('>I', value)


def message(kind, value):
    """A message of the destination"""
    return struct.pack('>HHI', kind, 4, value)


# The package with its length, and what it begins with
PACKAGE = re.compile(re.escape(command(CMD_PACKAGED, 4)) + b'(....)'
                     + re.escape(command(CMD_LISTEN, 0)), re.DOTALL)
PACKAGE_SIZE = 14


class Halt(Relay):
    """When half of the package has passed, nothing does until it is closed."""

    def __init__(self, path, destination):
        self.reached, self.closed = threading.Event(), threading.Event()
        super().__init__(path, destination)

    def close(self):
        self.closed.set()
        super().close()

    def forward(self, link):
        tail, left = b'', None
        while data := link.source_end.recv(65536):
            found = left is None and PACKAGE.search(tail + data)
            if found:
                left = (found.end() - len(tail)
                        + int.from_bytes(found[1], 'big') // 2)
            if left is not None:
                data = data[:left]
                left -= len(data)
            link.destination_end.sendall(data)
            if left == 0:
                self.reached.set()
                self.closed.wait()
            tail = (tail + data)[1 - PACKAGE_SIZE:]


def loaded(kind, body):
    """It reports that it has loaded the devices."""
    return (kind, body) == (RP_PONG, struct.pack('>I', LOADED))


class Withhold(Relay):
    """
    Withholds the destination's first message for which WANTED(kind, body) is
    true, and all that the destination sends after that.
    """
    def __init__(self, path, destination, wanted):
        self.wanted = wanted
        self.reached = threading.Event()
        super().__init__(path, destination)

    def back(self, link):
        stream = link.destination_end.makefile('rb')
        while len(header := stream.read(4)) == 4:
            kind, length = struct.unpack('>HH', header)
            body = stream.read(length)
            if self.wanted(kind, body):
                self.reached.set()
            if not self.reached.is_set():
                link.source_end.sendall(header + body)


class Side:
    """One QEMU, and what was seen of it: REPORT has (time, kind, what)."""

    def __init__(self, name, tmp, qemu, args, wrapper=()):
        # pylint: disable=import-outside-toplevel
        from qemu.machine import QEMUMachine
        self.name, self.tmp = name, tmp
        self.report = []
        self.exited = threading.Event()
        # setpriv: even if this program is killed, no QEMU is left behind.
        self.vm = QEMUMachine(qemu, args, name=name, base_temp_dir=tmp,
                              wrapper=('setpriv', '--pdeathsig', 'KILL',
                                       *wrapper))
        self.vm.set_console()
        self.log = os.path.join(self.vm.log_dir, name + '.log')

    def launch(self):
        # pylint: disable=import-outside-toplevel
        from qemu.machine.machine import QEMUMachineError
        try:
            with interrupts_later():
                self.vm.launch()
        except QEMUMachineError as err:
            raise Fault(f'the {self.name} does not start: {err}') from err
        threading.Thread(target=self._await_exit, daemon=True,
                         args=(os.pidfd_open(self.vm.get_pid()),)).start()

    def _await_exit(self, pidfd):
        select.select([pidfd], [], [])
        self.report.append((time.time(), 'process', 'ends'))
        self.exited.set()
        os.close(pidfd)

    def signal(self, signum):
        os.kill(self.vm.get_pid(), signum)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.exited.wait()

    def output(self):
        if not os.path.exists(self.log):        # it was never started
            return []
        with open(self.log, encoding='utf-8', errors='replace') as log:
            return [line.strip() for line in log if line.strip()]

    def seen(self):
        return [(kind, what) for _, kind, what in self.report]

    def states(self):
        return [what for kind, what in self.seen() if kind == 'MIGRATION']

    def next_event(self, timeout):
        """Note the next event.  Returns its text, None if there was none."""
        try:
            event = self.vm.events_wait([('MIGRATION', None), ('STOP', None),
                                         ('RESUME', None)], timeout)
        except asyncio.TimeoutError:
            return None
        if not event:
            return None
        kind, stamp = event['event'], event['timestamp']
        what = event.get('data', {}).get('status', kind)
        self.report.append(
            (stamp['seconds'] + stamp['microseconds'] / 1e6, kind, what))
        return what

    def await_event(self, *wanted, since=0):
        """
        Until one of WANTED is in the report, SINCE that place in it.  Returns
        the place behind it.
        """
        while True:
            for place, (_, _, what) in enumerate(self.report[since:], since):
                if what in wanted:
                    return place + 1
            if not self.next_event(0.5) and self.exited.is_set():
                raise Fault(f'the {self.name} has died')

    def note_events(self):
        while self.next_event(0.1):
            pass

    def run_state(self):
        if self.exited.is_set():
            return 'gone'
        return self.vm.cmd('query-status')['status']

    def enable(self, *names):
        """Enable capabilities.  The first one needs a right to userfaultfd."""
        reply = self.vm.qmp('migrate-set-capabilities', capabilities=[
            {'capability': name, 'state': True}
            for name in ('postcopy-ram', 'events') + names])
        if 'error' in reply:
            raise Fault(f'no postcopy here: {reply["error"]["desc"]}; run it '
                        'as root, or set sysctl vm.unprivileged_userfaultfd=1')

    def memory(self, region, size=None):
        path = os.path.join(self.tmp, 'memory')
        self.vm.cmd('pmemsave', val=GUEST[region], filename=path,
                    size=size or GUEST[region + '_SIZE'])
        with open(path, 'rb') as dump:
            data = dump.read()
        os.unlink(path)
        return data

    def counter(self):
        return struct.unpack('<I', self.memory('COUNTERS', 4))[0]

    def await_serial(self, text, times=1):
        while times:
            byte = self.vm.console_socket.recv(1)
            if not byte:
                raise Fault(f'the {self.name} has died')
            times -= byte == text

    def drop_serial(self):
        while select.select([self.vm.console_socket], [], [], 0)[0]:
            if not self.vm.console_socket.recv(65536):
                break


def holds(tmp, qemu, args=(), wrapper=()):
    """
    Does this QEMU hold the guest at the destination when it is asked to?  That is
    what the series adds; any other echoes the question.
    """
    with contextlib.ExitStack() as stack:
        tmp = stack.enter_context(tempfile.TemporaryDirectory(dir=tmp))
        path = os.path.join(tmp, 'incoming')
        side = Side('asked', tmp, qemu,
                    [*args, '-machine', 'none', '-nodefaults',
                     '-incoming', 'unix:' + path], wrapper)
        stack.callback(side.vm.shutdown, hard=True)
        side.launch()
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.connect(path)
        # The file's header, the machine's name
        sock.sendall(struct.pack('>4sIBI4s', b'QEVM', 3, 7, 4, b'none') +
                     command(OPEN_RETURN_PATH, 0) + ping(HOLD))
        answer = sock.makefile('rb').read(8)
    if answer not in (message(RP_PONG, HOLD), message(RP_PONG, HELD)):
        raise Fault(f'{qemu} answers HOLD with {answer.hex(" ") or "nothing"}')
    return answer == message(RP_PONG, HELD)


def guest_args(image, mib=256):
    """The options of a QEMU with the guest"""
    return ['-nodefaults', '-accel', 'tcg', '-m', str(mib),
            '-drive', f'if=none,id=disk,format=raw,file={image}',
            '-device', 'virtio-blk-pci,drive=disk']


def await_guest(side):
    """Until the guest has its pattern in memory and counts"""
    side.await_serial(b'A')
    side.await_serial(b'B')


# What precopy_with_nothing_left() needs on both sides
BITMAP_NODE = ['-blockdev', f'null-co,node-name=big,size={1 << 40}']


def precopy_with_nothing_left(source):
    """Have precopy go on when all of RAM is sent, given an idle guest.

    Both sides need BITMAP_NODE and dirty-bitmaps.
    """
    # The 16 Mbit count as bytes: too many for the downtime.
    source.vm.cmd('block-dirty-bitmap-add', node='big', name='bitmap',
                  granularity=65536)
    source.vm.cmd('migrate-set-parameters', max_bandwidth=0, downtime_limit=1)


def start_migration(source, destination, target, sent=None, **incoming):
    """Migrate to TARGET until SENT bytes are on their way, or all of RAM if that
    is None, then ask for postcopy.

    The destination listens at unix:TMP/incoming if INCOMING has no uri.
    """
    incoming.setdefault('uri', 'unix:' +
                        os.path.join(destination.tmp, 'incoming'))
    destination.vm.cmd('migrate-incoming', **incoming)
    source.vm.cmd('migrate', uri=target)
    while True:
        ram = source.vm.cmd('query-migrate').get('ram', {'transferred': 0})
        if (ram['transferred'] and not ram['remaining'] if sent is None
                else ram['transferred'] >= sent):
            break
        if source.next_event(0.05) in ENDS:
            raise Fault(f'migration {source.states()[-1]} before postcopy')
    source.vm.cmd('migrate-start-postcopy')


def check_memory(side, expected):
    """The guest, stopped now, has whole memory.  Returns its first counter."""
    found = hashlib.sha256(side.memory('PATTERN')).hexdigest()
    if found != expected:
        raise Fault(f'CORRUPT: guest memory on the {side.name} has the hash '
                    f'{found[:16]}, it must be {expected[:16]}')
    counters = memoryview(side.memory('COUNTERS')).cast('I')[::1024].tolist()
    # The guest was stopped somewhere in its round, so one step down is good.
    steps = [a - b for a, b in zip(counters, counters[1:]) if a != b]
    if steps not in ([], [1]):
        raise Fault(f'CORRUPT: the counters in guest memory on the '
                    f'{side.name} contradict each other ({len(steps)} steps)')
    return counters[0]


def check_running(side, expected, at_least):
    """The guest runs, has whole memory, not an old one, and goes on so."""
    if side.run_state() != 'running':
        raise Fault(f'the guest on the {side.name} is {side.run_state()}')
    side.drop_serial()
    side.await_serial(b'B', times=3)
    side.vm.cmd('stop')
    before = check_memory(side, expected)
    if before < at_least:
        raise Fault(f'CORRUPT: the guest on the {side.name} counts {before}, '
                    f'but had already counted {at_least}')
    side.vm.cmd('cont')
    side.drop_serial()
    side.await_serial(b'B', times=3)
    side.vm.cmd('stop')
    after = side.counter()
    side.vm.cmd('cont')
    if after <= before:
        raise Fault(f'the guest does not go on: it still counts {before}')
    return f'memory hash {expected[:16]}, counter {before} -> {after}'


def timeline(start, source, destination, notes=(), paused=False):
    """Returns lines.  NOTES are (time, text), PAUSED is how it began."""
    texts = {'STOP': '(guest stops)', 'RESUME': '(guest starts)',
             'ends': '(process ends)'}
    runs = {'source': not paused, 'destination': False}
    rows = sorted((when, side.name, kind, what)
                  for side in (source, destination)
                  for when, kind, what in side.report if when >= start)
    rows = sorted(rows + [(when, '', 'note', text) for when, text in notes])
    lines = [f'   {"ms":>6}   {"source":<18}{"destination":<18}guest runs on']
    for when, name, kind, what in rows:
        lines.append(f'   {(when - start) * 1000:6.0f}   ')
        if kind == 'note':
            lines[-1] += '--- ' + what
            continue
        if kind != 'MIGRATION':
            runs[name] = kind == 'RESUME'
        cells = [texts.get(what, what) if name == n else '' for n in runs]
        lines[-1] += (f'{cells[0]:<18}{cells[1]:<18}'
                      + (' AND '.join(n for n in runs if runs[n]) or '-'))
    return lines + [f'   {side.name} said: {line}'
                    for side in (source, destination)
                    for line in side.output()]


def assemble_guest(image, **changes):
    """Make the disk IMAGE with the guest; CHANGES are to GUEST."""
    guest = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'guest.S')
    obj = image + '.o'
    try:
        subprocess.run(['as', '--32', '-o', obj, guest] +
                       [f'--defsym={name}={value}'
                        for name, value in {**GUEST, **changes}.items()],
                       check=True)
        subprocess.run(['ld', '-m', 'elf_i386', '-Ttext=0x7c00', '-e', 'start',
                        '--oformat=binary', '-o', image, obj], check=True)
        os.truncate(image, MIB)     # SeaBIOS reads no disk of one sector
    except (OSError, subprocess.CalledProcessError) as err:
        sys.exit(f'\nThe guest cannot be built: {err}. '
                 'Install binutils that know x86.')


def build_guest(tmp):
    """Returns the disk with the guest, and the hash of the guest's pattern."""
    image = os.path.join(tmp, 'guest.img')
    assemble_guest(image)
    value = 0
    words = array.array('I', bytes(GUEST['PATTERN_SIZE']))
    for i in range(len(words)):
        value = (value * GUEST['MUL'] + GUEST['ADD']) & 0xffffffff
        words[i] = value
    return image, hashlib.sha256(words).hexdigest()


def _interrupt(_signum, _frame):
    # The second Ctrl-C must not disturb what the first one started.
    for signum in INTERRUPTS:
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_test(name, test):
    """Returns the exit status; TEST gets a directory for its files."""
    for signum in INTERRUPTS:
        signal.signal(signum, _interrupt)
    logging.disable()       # of a QMP connection that ends with its QEMU
    tmp = tempfile.mkdtemp(prefix=f'postcopy-{name}-')
    try:
        return test(tmp)
    except KeyboardInterrupt:
        print(f'\n{name}: interrupted; nothing is left behind',
              file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(tmp)
