#
# A network link between this program and another network namespace, with the
# rate, delay and queue of a real one: two tun devices and a process that
# carries packets between them.  It does what "tc netem" does, also with kernels
# that lack that.  All of it vanishes with this program, however that ends.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import collections
import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import select
import signal
import struct
import subprocess
import time

from twoqemu import INTERRUPTS

NEAR, FAR = '10.0.0.1', '10.0.0.2'

CLONE_NEWNET, PR_SET_PDEATHSIG = 0x40000000, 1
TUNSETIFF, TUNSETOFFLOAD = 0x400454ca, 0x400454d0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 1, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 1, 2
VNET_HDR_SIZE = 10


def _tun(name):
    fd = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack(
        '16sH22x', name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    # TCP hands over many packets as one, as it does to a network card.
    fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    return fd


def _ip(netns, *commands):
    for command in commands:
        subprocess.run(netns + ['ip'] + command.split(), check=True)


class Link:
    """The far end is for those that run behind the prefix WRAPPER."""

    def __init__(self):
        """Raises OSError where this may not be done."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            err = ctypes.get_errno()
            raise OSError(err, 'no network namespace: ' + os.strerror(err))
        self.fds = _tun('near'), _tun('far')
        # pylint: disable=consider-using-with
        self.holder = subprocess.Popen(
            ['setpriv', '--pdeathsig', 'KILL', 'unshare', '--net',
             'sh', '-c', 'echo; exec sleep infinity'], stdout=subprocess.PIPE)
        self.holder.stdout.read(1)
        self.wrapper = ['nsenter', f'--net=/proc/{self.holder.pid}/ns/net']
        _ip([], f'link set far netns {self.holder.pid}',
            *self._commands('near', NEAR, FAR))
        _ip(self.wrapper, *self._commands('far', FAR, NEAR))
        # Or a connection starts with what TCP has learned from an earlier one.
        with open('/proc/sys/net/ipv4/tcp_no_metrics_save', 'w',
                  encoding='ascii') as no_metrics_save:
            no_metrics_save.write('1')
        self.shape = multiprocessing.Array('d', (1e9, 0, 1e6))
        self.process = multiprocessing.Process(target=self._run, daemon=True)
        self.process.start()

    @staticmethod
    def _commands(dev, address, peer):
        # The same congestion control everywhere: what Linux has by default
        return (f'addr add {address}/32 dev {dev}', f'link set {dev} up',
                f'route add {peer}/32 dev {dev} congctl cubic')

    def set(self, rate, round_trip, queue):
        """RATE in bit/s, QUEUE in bytes; the link is idle now"""
        self.shape[:] = rate / 8, round_trip / 2, queue

    def close(self):
        self.process.kill()
        self.holder.kill()
        self.holder.wait()

    def _run(self):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for signum in INTERRUPTS:
            signal.signal(signum, signal.SIG_IGN)
        with contextlib.suppress(OSError):      # the far end has vanished
            self._carry()

    def _carry(self):
        queues = collections.deque(), collections.deque()
        free = [0, 0]           # when the link is, in each direction
        while True:
            now = time.monotonic()
            for queue, fd in zip(queues, reversed(self.fds)):
                while queue and queue[0][0] <= now:
                    os.write(fd, queue.popleft()[1])
            due = [queue[0][0] - now for queue in queues if queue]
            ready = select.select(self.fds, [], [],
                                  max(0, min(due)) if due else None)[0]
            for i, fd in enumerate(self.fds):
                if fd not in ready:
                    continue
                packet = os.read(fd, 1 << 17)
                rate, delay, limit = self.shape
                now = time.monotonic()
                free[i] = max(free[i], now)
                if free[i] - now < limit / rate:
                    free[i] += (len(packet) - VNET_HDR_SIZE) / rate
                    queues[i].append((free[i] + delay, packet))
