/*
 * Preloaded into a program, says to whoever connects to the unix socket in $HEAP
 * how many bytes of the heap are in use.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int listener;

static void *answer(void *opaque)
{
    int fd;

    while ((fd = accept(listener, NULL, NULL)) >= 0) {
        struct mallinfo2 heap = mallinfo2();

        dprintf(fd, "%zu", heap.uordblks + heap.hblkhd);
        close(fd);
    }
    return opaque;
}

static void __attribute__((constructor)) begin(void)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    sigset_t all, old;
    pthread_t thread;

    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(addr.sun_path, getenv("HEAP"), sizeof(addr.sun_path) - 1);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    if (bind(listener, (struct sockaddr *)&addr, sizeof(addr)) < 0 ||
        listen(listener, 1) < 0 ||
        pthread_create(&thread, NULL, answer, NULL)) {
        perror("heap.c");
        abort();
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    /* Not in what this program may start */
    unsetenv("LD_PRELOAD");
}
