#!/usr/bin/python3
#
# Carries what comes in to a unix socket, and back: what "exec:" in a migration's
# URI runs.  With --listen it is the one that is connected to.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import socket
import sys
import threading

sock = socket.socket(socket.AF_UNIX)
if sys.argv[1] == '--listen':
    with sock as listener:
        listener.bind(sys.argv[2])
        listener.listen()
        sock = listener.accept()[0]
else:
    sock.connect(sys.argv[1])


def carry(source, sink, end):
    """As in a network, the end of one direction is not that of the other."""
    try:
        while data := os.read(source, 65536):
            while data:
                data = data[os.write(sink, data):]
        end()
    except OSError:
        os._exit(1)


back = threading.Thread(target=carry,
                        args=(sock.fileno(), 1, lambda: os.close(1)))
back.start()
carry(0, sock.fileno(), lambda: sock.shutdown(socket.SHUT_WR))
# QEMU waits for this process when it has closed its end: as with socat, not for
# what the other side may still say
back.join(0.3)
os._exit(0)
