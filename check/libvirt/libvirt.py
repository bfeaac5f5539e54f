#!/usr/bin/python3
#
# Migrates a guest with postcopy between two libvirt daemons, each on a machine
# of its own that is made of namespaces, and breaks things in postcopy-device.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import argparse
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid

sys.dont_write_bytecode = True          # the sources stay as they are
sys.path.insert(0, os.path.join(os.path.dirname(__file__), '../lib'))
from twoqemu import (                                   # noqa: E402
    Fault, GUEST, INTERRUPTS, MIB, Relay, build_guest, check_memory, run_test)

LIMIT = 120             # seconds for anything that is awaited

# What a machine is: a root of its own, on top of the one with libvirt.  Its
# process 1 does nothing but to make the kernel reap what others leave.
MACHINE = '''
read pid _ </proc/self/stat
mount -t tmpfs machine "$mnt"
mkdir "$mnt/work" "$mnt/upper" "$mnt/root"
mount -t overlay overlay "$mnt/root" \
    -o "lowerdir=$libvirt,upperdir=$mnt/upper,workdir=$mnt/work"
cd "$mnt/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mkdir -p dev/shm dev/pts etc/libvirt etc/pki/CA etc/pki/libvirt/private \
    etc/pki/qemu
mount --bind run var/run
for dev in null zero full random urandom; do
    touch dev/$dev
    mount --bind /dev/$dev dev/$dev
done
for dir in "$qemu" "$shared"; do
    mkdir -p "./$dir"
    mount --bind "$dir" "./$dir"
done
for id in root:x:0:0 libvirt-qemu:x:64055:64055; do
    echo "$id::/:/bin/false" >>etc/passwd
    echo "${id%:*}:" >>etc/group
done
hostname "$name"
ip link set lo up
exec chroot . sh -c 'echo "ready $0"
    exec env --ignore-signal=CHLD sleep infinity' "$pid"
'''

# The second one carries a migration if it is told to.
NETWORKS = {'eth0': '192.0.2', 'eth1': '198.51.100'}

HOSTS = '''
127.0.0.1 localhost
192.0.2.1 source
192.0.2.2 destination
'''

LIBVIRTD = '''
host_uuid = "{uuid}"
listen_tcp = 1
listen_tls = 1
auth_tcp = "none"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:file:{log}"
'''

QEMU = '''
user = "root"
group = "root"
dynamic_ownership = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
default_tls_x509_cert_dir = "/etc/pki/qemu"
'''

DOMAIN = '''
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>guest</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>256</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>{qemu}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{image}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='/run/second.img'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <serial type='unix'><source mode='connect' path='/run/serial'/></serial>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:/run/qmp'/>
  </qemu:commandline>
</domain>
'''

CA = '''
cn = CA
ca
cert_signing_key
'''

CERTIFICATE = '''
cn = {name}
dns_name = {name}
tls_www_server
tls_www_client
signing_key
encryption_key
'''

# Something has happened: await_() looks again.
NEWS = threading.Condition()


def tell():
    with NEWS:
        NEWS.notify_all()


def await_(what, holds, limit=LIMIT):
    '''Until HOLDS() is true.  Returns it.'''
    with NEWS:
        if not NEWS.wait_for(holds, limit):
            raise Fault(f'no {what} within {limit} s')
    return holds()


def peer_pid(sock):
    return struct.unpack('iii', sock.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


class Qemu:
    """
    A QEMU that libvirt has started, by a second QMP monitor, which does not
    depend on libvirt
    """
    def __init__(self, name, tmp, sock):
        self.name, self.tmp, self.sock = name, tmp, sock
        self.pid = peer_pid(sock)
        self.events, self.replies = [], []
        self.gone = False
        self.serial = 0         # bytes that the guest has written
        threading.Thread(target=self._read, daemon=True).start()
        self.sock.sendall(b'{"execute": "qmp_capabilities"}')

    def _read(self):
        with contextlib.suppress(OSError):
            for line in self.sock.makefile():
                message = json.loads(line)
                if 'event' in message:
                    data = message.get('data', {})
                    self.events.append(data.get('status', message['event']))
                elif 'id' in message:
                    self.replies.append(message)
                tell()
        self.gone = True
        tell()

    def cmd(self, name, **args):
        self.replies.clear()
        self.sock.sendall(json.dumps(
            {'execute': name, 'arguments': args, 'id': name}).encode())
        await_(f'answer to {name} from the {self.name}',
               lambda: self.replies or self.gone)
        if not self.replies:
            raise Fault(f'QEMU on the {self.name} has died')
        reply = self.replies[0]
        if 'error' in reply:
            raise Fault(f'{name}: {reply["error"]["desc"]}')
        return reply['return']

    def await_event(self, *wanted):
        """Until there is one of WANTED.  Returns the first one."""
        def found():
            return [event for event in self.events if event in wanted]

        await_(f'{" or ".join(wanted)} on the {self.name}',
               lambda: found() or self.gone)
        if not found():
            raise Fault(f'QEMU on the {self.name} has died')
        return found()[0]

    def signal(self, signum):
        os.kill(self.pid, signum)

    def memory(self, region):
        path = os.path.join(self.tmp, 'memory')
        self.cmd('pmemsave', val=GUEST[region], filename=path,
                 size=GUEST[region + '_SIZE'])
        with open(path, 'rb') as dump:
            data = dump.read()
        os.unlink(path)
        return data


class Virsh:
    """One command of virsh"""

    def __init__(self, machine, *args):
        self.args = ' '.join(args)
        self.said = self.code = None
        # pylint: disable=consider-using-with
        self.process = subprocess.Popen(
            machine.inside('virsh', '-q', '-c', 'qemu:///system', *args),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        self.said = ' '.join(self.process.communicate()[0].split())
        self.code = self.process.returncode
        tell()

    def wait(self):
        await_(f'end of "virsh {self.args}"', lambda: self.code is not None)
        return self

    def fails(self):
        if self.wait().code == 0:
            raise Fault(f'virsh {self.args} has not failed')
        return self.said

    def succeeds(self):
        if self.wait().code != 0:
            raise Fault(f'virsh {self.args}: {self.said}')
        return self.said

    def kill(self):
        pid = self.process.pid      # nsenter, which has started virsh
        with open(f'/proc/{pid}/task/{pid}/children', encoding='ascii') as it:
            os.kill(int(it.read()), signal.SIGKILL)


class Machine:
    """One of the two machines.  QEMUS are those that have run on it."""

    def __init__(self, name, tmp, libvirt, stack):
        self.name, self.tmp = name, tmp
        self.qemus = []
        self.log = os.path.join(tmp, name + '.log')
        mnt = os.path.join(tmp, name)
        os.mkdir(mnt)
        # However this program ends, the machine ends with it, and all that it
        # runs and has mounted.  Ctrl-C is for this program alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        try:
            # pylint: disable=consider-using-with
            process = subprocess.Popen(
                ['setpriv', '--pdeathsig', 'KILL', 'unshare', '--mount',
                 '--uts', '--net', '--ipc', '--pid', '--fork',
                 '--kill-child=KILL', 'sh', '-ec', MACHINE],
                env=dict(os.environ, mnt=mnt, name=name, shared=tmp,
                         libvirt=libvirt, qemu=os.path.dirname(OPTS.qemu)),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        said = process.stdout.readline()
        if not said.startswith('ready '):
            print('no machines can be made of namespaces here:',
                  (said + process.stdout.read()).strip())
            sys.exit(77)
        self.pid = int(said.split()[1])
        stack.callback(self._stop, os.pidfd_open(self.pid))
        self.root = f'/proc/{self.pid}/root'
        # It would be this machine's configuration that is written below.
        assert not os.path.samefile(self.root, '/')
        self.write('etc/hosts', HOSTS)
        self.write('etc/libvirt/libvirtd.conf',
                   LIBVIRTD.format(uuid=uuid.uuid4(), log=self.log))
        self.write('etc/libvirt/qemu.conf', QEMU)
        # As if there were one for both, with locks that are the machine's
        self.write('run/second.img', '.' * MIB)
        for path, accept in (('/run/qmp', self._monitor),
                             ('/run/serial', self._serial)):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.root + path)
            listener.listen()
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            threading.Thread(target=self._accept, daemon=True,
                             args=(listener, accept)).start()

    def _stop(self, pidfd):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [])      # all of its processes have ended
        os.close(pidfd)

    def _accept(self, listener, accept):
        with contextlib.suppress(OSError):
            while True:
                sock = listener.accept()[0]
                threading.Thread(target=accept, daemon=True,
                                 args=(sock,)).start()

    def _monitor(self, sock):
        self.qemus.append(Qemu(self.name, self.tmp, sock))
        tell()

    def _serial(self, sock):
        pid = peer_pid(sock)
        with contextlib.suppress(OSError):
            while data := sock.recv(4096):
                for qemu in self.qemus:
                    if qemu.pid == pid:
                        qemu.serial += len(data)
                tell()

    def write(self, path, text):
        with open(os.path.join(self.root, path), 'w', encoding='ascii') as out:
            out.write(text)

    def inside(self, *command):
        return ['nsenter', '-t', str(self.pid), '--mount', '--uts', '--net',
                '--ipc', '--pid', '--root', '--wd=/', 'env', '-i',
                'HOME=/root', 'PATH=/usr/sbin:/usr/bin:/sbin:/bin', 'LC_ALL=C',
                *command]

    def run(self, *command):
        done = subprocess.run(self.inside(*command), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, check=False)
        if done.returncode:
            raise Fault(f'{" ".join(command)} on the {self.name}: '
                        f'{done.stdout.strip()}')

    def start_libvirtd(self):
        self.run('libvirtd', '--daemon', '--listen')

    def kill_libvirtd(self):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.root + '/run/libvirt/libvirt-sock')
            pidfd = os.pidfd_open(peer_pid(sock))
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [])
        os.close(pidfd)

    def virsh(self, *args):
        """Returns what it says."""
        return Virsh(self, *args).succeeds()

    @property
    def qemu(self):
        return self.qemus[-1]

    def has_guest(self):
        return self.virsh('list', '--all', '--name') != ''

    def state(self):
        return self.virsh('domstate', 'guest', '--reason')

    def await_state(self, wanted):
        """Until libvirt says that the guest is in a state like WANTED"""
        # An event could come while there is no libvirtd to tell it.
        end = time.monotonic() + LIMIT
        while not (state := self.state()).startswith(wanted):
            if time.monotonic() > end:
                raise Fault(f'the guest on the {self.name} is {state}, not '
                            + wanted)

    def await_no_guest(self):
        end = time.monotonic() + LIMIT
        while self.has_guest():
            if time.monotonic() > end:
                raise Fault(f'the {self.name} still has a guest')

    def show(self):
        """What there is to see of a case that has failed"""
        for qemu in self.qemus:
            print(f'    QEMU on the {self.name}:', ' > '.join(qemu.events))
        with open(self.log, encoding='utf-8') as log:
            for line in log.read().splitlines()[-12:]:
                print(f'    libvirtd on the {self.name}: {line}')

    def await_life(self):
        """Until the guest has written twice"""
        seen = self.qemu.serial
        await_(f'sign of life of the guest on the {self.name}',
               lambda: self.qemu.serial >= seen + 2)


class Hold(Relay):
    """Its main channel carries nothing that way from hold() to release()."""

    def __init__(self, path, destination):
        self.locks = {'forward': threading.Lock(), 'back': threading.Lock()}
        self.withheld = {}
        super().__init__(path, destination)

    def forward(self, link):
        self._pass('forward', link.number, link.source_end,
                   link.destination_end)

    def back(self, link):
        self._pass('back', link.number, link.destination_end, link.source_end)

    def _pass(self, way, number, end, other):
        while data := end.recv(65536):
            with self.locks[way]:
                if number == 0 and way in self.withheld:
                    self.withheld[way].append((other, data))
                    tell()
                else:
                    other.sendall(data)

    def hold(self, way):
        with self.locks[way]:
            self.withheld[way] = []

    def release(self, way):
        with self.locks[way]:
            for sock, data in self.withheld.pop(way):
                sock.sendall(data)


def check_states(*states):
    if 'postcopy-device' not in states:
        raise Fault('NO POSTCOPY-DEVICE: this QEMU does not have that state, '
                    'it was built without the series')


class Skip(Exception):
    """Why a case cannot be made"""


class Pair:
    """Two machines with libvirt, a network between them, and a guest"""

    def __init__(self, tmp, libvirt, stack):
        self.tmp = tmp
        self.image, self.expected = build_guest(tmp)
        self.uuid = uuid.uuid4()
        self.machines = [Machine(name, tmp, libvirt, stack)
                         for name in ('source', 'destination')]
        self.source, self.destination = self.machines
        for dev in NETWORKS:
            subprocess.run(['nsenter', '-t', str(self.source.pid), '--net',
                            'ip', 'link', 'add', dev, 'type', 'veth',
                            'peer', 'name', dev,
                            'netns', str(self.destination.pid)], check=True)
        self._make_certificate('ca', CA, '--generate-self-signed')
        for number, machine in enumerate(self.machines, 1):
            for dev, net in NETWORKS.items():
                machine.run('ip', 'addr', 'add', f'{net}.{number}/24',
                            'dev', dev)
                machine.run('ip', 'link', 'set', dev, 'up')
            self._certify(machine)
            machine.start_libvirtd()
        # It does not know postcopy-device.
        self.old = self.source.virsh('--version').startswith('11.')

    def _make_certificate(self, name, template, *how):
        path = os.path.join(self.tmp, name)
        with open(path + '.cfg', 'w', encoding='ascii') as out:
            out.write(template)
        self.source.run('certtool', '--generate-privkey', '--key-type=rsa',
                        '--bits=2048', f'--outfile={path}-key.pem')
        self.source.run('certtool', *how, f'--template={path}.cfg',
                        f'--load-privkey={path}-key.pem',
                        f'--outfile={path}-cert.pem')

    def _certify(self, machine):
        """Make it known to libvirt and QEMU on the other one."""
        ca = os.path.join(self.tmp, 'ca')
        own = os.path.join(self.tmp, machine.name)
        self._make_certificate(machine.name,
                               CERTIFICATE.format(name=machine.name),
                               '--generate-certificate',
                               f'--load-ca-certificate={ca}-cert.pem',
                               f'--load-ca-privkey={ca}-key.pem')
        for file, where in (
                (f'{ca}-cert.pem', 'CA/cacert.pem'),
                (f'{own}-cert.pem', 'libvirt/clientcert.pem'),
                (f'{own}-cert.pem', 'libvirt/servercert.pem'),
                (f'{own}-key.pem', 'libvirt/private/clientkey.pem'),
                (f'{own}-key.pem', 'libvirt/private/serverkey.pem'),
                (f'{ca}-cert.pem', 'qemu/ca-cert.pem'),
                (f'{own}-cert.pem', 'qemu/client-cert.pem'),
                (f'{own}-cert.pem', 'qemu/server-cert.pem'),
                (f'{own}-key.pem', 'qemu/client-key.pem'),
                (f'{own}-key.pem', 'qemu/server-key.pem')):
            machine.run('cp', file, '/etc/pki/' + where)

    def start_guest(self):
        xml = os.path.join(self.tmp, 'guest.xml')
        with open(xml, 'w', encoding='ascii') as out:
            out.write(DOMAIN.format(uuid=self.uuid, qemu=OPTS.qemu,
                                    image=self.image))
        self.source.virsh('create', xml)
        self.source.await_life()

    def migrate(self, *options):
        """Start it.  At this bandwidth, it takes postcopy to complete it."""
        self.source.qemu.events.clear()
        uri = 'tls' if '--tls' in options else 'tcp'
        return Virsh(self.source, 'migrate', '--live', '--postcopy',
                     '--unsafe', '--bandwidth', '32', *options, 'guest',
                     f'qemu+{uri}://destination/system')

    @contextlib.contextmanager
    def relay(self, kind):
        """Yields a relay, and what has virsh migrate through it."""
        path = '/run/migration'
        relay = kind(self.source.root + path, self.destination.root + path)
        try:
            yield relay, ('--migrateuri', 'unix://' + path)
        finally:
            relay.close()
            for machine in self.machines:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(machine.root + path)

    @contextlib.contextmanager
    def phase(self, *options):
        """Migrate, and stay in postcopy-device.  Yields virsh and relay."""
        with self.relay(Hold) as (relay, through):
            virsh = self.migrate(*through, *options)
            await_('second pass of the migration',
                   lambda: virsh.code is not None or
                   self.source.qemu.events.count('MIGRATION_PASS') > 1)
            if virsh.code is not None:
                raise Fault(f'virsh migrate ends too early: {virsh.said}')
            relay.hold('back')
            self.source.virsh('migrate-postcopy', 'guest')
            # The source waits for it, and sends nothing.
            await_('answer to HOLD', lambda: relay.withheld['back'])
            relay.hold('forward')
            relay.release('back')
            check_states(self.source.qemu.await_event('postcopy-device',
                                                      'postcopy-active'))
            # The destination has nothing to answer yet.
            relay.hold('back')
            relay.release('forward')
            check_states(self.destination.qemu.await_event('postcopy-device',
                                                           'postcopy-active'))
            yield virsh, relay

    def half(self, *options):
        """Migrate until the guest runs there.  Returns virsh."""
        virsh = self.migrate('--postcopy-bandwidth', '1', *options)
        self.source.qemu.await_event('active')
        # That early, most of the pattern is still to be sent, at 1 MiB/s.
        self.source.virsh('migrate-postcopy', 'guest')
        self.destination.qemu.await_event('RESUME')
        self.destination.await_life()
        return virsh

    def runs_on(self, machine):
        """The guest runs there, nowhere else, and is well."""
        for other in self.machines:
            if other is not machine:
                other.await_no_guest()
        machine.await_state('running')
        counters = []
        for _ in range(2):
            machine.virsh('suspend', 'guest')
            counters.append(check_memory(machine.qemu, self.expected))
            machine.virsh('resume', 'guest')
            machine.await_life()
        if counters[0] >= counters[1]:
            raise Fault(f'the guest does not go on: it counts {counters}')

    def migrates(self, *options):
        """A migration where nothing goes wrong"""
        self.migrate('--postcopy-after-precopy', *options).succeeds()
        check_states(*self.source.qemu.events)
        self.runs_on(self.destination)

    def is_back(self):
        """The guest is back, and can be migrated."""
        if 'RESUME' in self.destination.qemu.events:
            raise Fault('SPLIT: the guest has run on the destination')
        self.runs_on(self.source)
        self.migrates()


    def is_lost(self):
        """The guest, which had been handed over, does not run again here."""
        self.source.await_state('paused (post-copy failed)')
        seen = self.source.qemu.serial
        with contextlib.suppress(Fault):
            self.source.qemu.cmd('cont')
        if (self.source.qemu.cmd('query-status')['status'] == 'running'
                or self.source.qemu.serial != seen):
            raise Fault('SPLIT: the guest runs on the source again')

    def is_dropped(self):
        """libvirt has ended the destination, which had not run it yet."""
        self.destination.await_no_guest()
        if 'RESUME' in self.destination.qemu.events:
            raise Fault('the guest has run on the destination')
        self.is_lost()

    def resumes(self, *options):
        """The migration has lost its link, and is completed."""
        self.source.await_state('paused (post-copy failed)')
        self.destination.await_state('running (post-copy failed)')
        if self.old:
            raise Skip('at --postcopy-resume: its libvirtd crashes then')
        self.migrate('--postcopy-resume', '--postcopy-bandwidth', '32',
                     *options).succeeds()
        self.runs_on(self.destination)


def says(said, wanted):
    if wanted not in said:
        raise Fault(f'virsh says "{said}", not "{wanted}"')


def success(pair, *options):
    pair.migrates(*options)


def killed(pair, *options):
    with pair.phase(*options) as (virsh, _):
        pair.destination.qemu.signal(signal.SIGKILL)
        says(virsh.fails(), 'Destination failed before it had loaded the '
             'device state')
    pair.is_back()


def cut(pair, *options):
    with pair.phase(*options) as (virsh, relay):
        relay.close()
        says(virsh.fails(), 'Destination failed before it had loaded the '
             'device state')
    pair.is_back()


def killed_later(pair, *options):
    virsh = pair.half(*options)
    pair.destination.qemu.signal(signal.SIGKILL)
    virsh.fails()
    pair.is_lost()


def cut_later(pair, *options):
    with pair.relay(Relay) as (relay, through):
        virsh = pair.half(*through, *options)
        relay.close()
        virsh.fails()
    pair.resumes(*options)


def silent_later(pair, *options):
    virsh = pair.half('--migrateuri', f'tcp://{NETWORKS["eth1"]}.2', *options)
    pair.destination.run('ip', 'link', 'set', 'eth1', 'down')
    pair.source.virsh('domjobabort', '--postcopy', 'guest')
    pair.source.qemu.await_event('postcopy-paused')
    if 'postcopy-paused' in pair.destination.qemu.events:
        raise Fault('the destination has noticed it')
    pair.destination.run('ip', 'link', 'set', 'eth1', 'up')
    virsh.fails()
    pair.resumes(*options)


def start_lost(pair, *options):
    with pair.phase(*options) as (virsh, relay):
        relay.hold('forward')
        relay.release('back')
        pair.source.qemu.await_event('postcopy-active')
        relay.close()
        virsh.fails()
    pair.is_dropped()


def disk_locked(pair, *options):
    with open(pair.destination.root + '/run/second.img', 'r+b') as image:
        fcntl.lockf(image, fcntl.LOCK_EX)
        virsh = pair.migrate('--postcopy-after-precopy', *options)
        says(virsh.fails(), 'Failed to lock byte')
    pair.is_dropped()


def asked(pair, *options):
    """What libvirt asks of QEMU: the cases depend on it."""
    with pair.phase('--postcopy-bandwidth', '16', *options) as (virsh, relay):
        sides = [machine.qemu.cmd('query-migrate-parameters') |
                 {item['capability']: item['state'] for item in
                  machine.qemu.cmd('query-migrate-capabilities')}
                 for machine in pair.machines]
        for side, name, wanted in (
                (0, 'max-bandwidth', 32 * MIB),
                (0, 'max-postcopy-bandwidth', 16 * MIB),
                (0, 'postcopy-preempt', True),
                # So START comes before the locks of the disks.
                (1, 'late-block-activate', True)):
            if sides[side][name] != wanted:
                raise Fault(f'libvirt has set {name} to {sides[side][name]}')
        relay.release('back')
        virsh.succeeds()
    pair.runs_on(pair.destination)


def frozen(pair, *options):
    with pair.phase(*options) as (virsh, relay):
        pair.destination.qemu.signal(signal.SIGSTOP)
        relay.release('back')
        pair.source.await_state('paused')
        pair.destination.qemu.signal(signal.SIGCONT)
        virsh.succeeds()
    pair.runs_on(pair.destination)


def queries(pair, *options):
    with pair.phase(*options) as (virsh, relay):
        job = Virsh(pair.source, 'domjobinfo', 'guest').wait()
        says(job.said, 'unexpected migration status in postcopy-device'
             if pair.old else 'Operation: Outgoing migration')
        says(pair.source.state(), 'paused (migrating)')
        for command in 'dominfo', 'domstats', 'dumpxml':
            pair.source.virsh(command, 'guest')
        relay.release('back')
        virsh.succeeds()
    pair.runs_on(pair.destination)


def aborted(pair, *options):
    with pair.phase(*options) as (virsh, _):
        pair.source.virsh('domjobabort', 'guest')
        says(virsh.fails(), 'canceled by client')
    pair.is_back()


def frozen_aborted(pair, *options):
    with pair.phase(*options) as (virsh, _):
        pair.destination.qemu.signal(signal.SIGSTOP)
        pair.source.virsh('domjobabort', 'guest')
        pair.source.qemu.await_event('RESUME')
        pair.destination.qemu.signal(signal.SIGCONT)
        says(virsh.fails(), 'canceled by client')
    pair.is_back()


def virsh_killed(pair, *options):
    with pair.phase(*options) as (virsh, _):
        virsh.kill()
        pair.is_back()


def source_restarted(pair, *options):
    with pair.phase(*options) as (virsh, _):
        pair.source.kill_libvirtd()
        pair.source.start_libvirtd()
        virsh.fails()
        pair.is_back()


def destination_restarted(pair, *options):
    with pair.phase(*options) as (virsh, _):
        pair.destination.kill_libvirtd()
        pair.destination.start_libvirtd()
        virsh.fails()
    pair.is_back()


P2P = ('--p2p',)
TLS = ('--tls', '--tls-destination', 'destination')

CASES = (
    ('all goes well', success),
    ('all goes well', success, *P2P),
    ('all goes well', success, *TLS),
    ('all goes well', success, *TLS, *P2P),
    ('destination killed in the phase', killed),
    ('destination killed in the phase', killed, *P2P),
    ('destination killed in the phase', killed, *TLS, *P2P),
    ('link cut in the phase', cut),
    ('destination killed after the guest ran there', killed_later),
    ('destination killed after the guest ran there', killed_later, *P2P),
    ('link cut after the guest ran there', cut_later),
    ('link cut after the guest ran there', cut_later, *P2P),
    ('network silent after the guest ran there', silent_later),
    ('link cut before START has arrived', start_lost),
    ('link cut before START has arrived', start_lost, *P2P),
    ("a disk that the destination cannot lock", disk_locked),
    ("a disk that the destination cannot lock", disk_locked, *P2P),
    ('what libvirt asks of QEMU', asked),
    ('destination frozen in the phase', frozen),
    ('domjobinfo and others in the phase', queries),
    ('domjobabort in the phase', aborted),
    ('domjobabort in the phase', aborted, *P2P),
    ('domjobabort, destination frozen', frozen_aborted),
    ('virsh killed in the phase', virsh_killed),
    ("source's libvirtd restarted", source_restarted),
    ("source's libvirtd restarted", source_restarted, *P2P),
    ("destination's libvirtd restarted", destination_restarted),
    ("destination's libvirtd restarted", destination_restarted, *P2P),
)


def run_case(tmp, libvirt, what, case, *options):
    """Returns its verdict."""
    how = ', '.join(option[2:] for option in ('--p2p', '--tls')
                    if option in options)
    print(f'{what + (f" ({how})" if how else ""):58}', end=' ', flush=True)
    begin = time.monotonic()
    verdict, why = 'pass', ''
    with contextlib.ExitStack() as stack:
        tmp = stack.enter_context(tempfile.TemporaryDirectory(dir=tmp))
        try:
            pair = Pair(tmp, libvirt, stack)
            pair.start_guest()
            case(pair, *options)
        except Skip as err:
            verdict, why = 'skip', f'  {err}'
        except (Fault, OSError) as err:
            verdict, why = 'FAIL', f'\n    {err}'
        print(f'{verdict}  ({time.monotonic() - begin:.0f} s){why}',
              flush=True)
        if verdict == 'FAIL':
            for machine in pair.machines:
                machine.show()
    return verdict


def run_all(tmp):
    """Returns the exit status."""
    cases = [case for case in CASES if OPTS.case in case[0]]
    verdicts = []
    for name, libvirt in OPTS.libvirt:
        print(f"libvirt of Debian's {name}")
        verdicts += [run_case(tmp, libvirt, *case) for case in cases]
    for name, reason in OPTS.skip:
        print(f"libvirt of Debian's {name} is skipped: {reason}")
    if not verdicts:
        return 77
    print(f'{verdicts.count("pass")} passed, {verdicts.count("FAIL")} failed, '
          f'{verdicts.count("skip") + len(OPTS.skip)} skipped')
    return 'FAIL' in verdicts


def name_and_value(text):
    name, _, value = text.partition('=')
    return name, value


def parse_args():
    parser = argparse.ArgumentParser(
        description='Migrate with postcopy between two libvirt daemons.')
    parser.add_argument('--qemu', required=True, type=os.path.realpath,
                        help='the QEMU to test')
    parser.add_argument('--libvirt', action='append', default=[],
                        metavar='NAME=ROOT', type=name_and_value,
                        help='a root with libvirt and what it needs')
    parser.add_argument('--skip', action='append', default=[],
                        metavar='NAME=REASON', type=name_and_value,
                        help='a libvirt that is not there, and why')
    parser.add_argument('--case', default='', metavar='WORD',
                        help='only cases with this in their names')
    return parser.parse_args()


OPTS = parse_args()
sys.exit(run_test('libvirt', run_all))
