/*
 * Does what the sanitizers must find, one thing a run, as if it were code of
 * the series
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#line 100 "../src/migration/postcopy-device.c"

static int shared;
static char *volatile kept;

static void *race(void *opaque)
{
    shared++;
    return opaque;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    pthread_t thread;

    if (!strcmp(what, "race")) {
        pthread_create(&thread, NULL, race, NULL);
        shared++;
        pthread_join(thread, NULL);
    } else if (!strcmp(what, "leak")) {
        kept = malloc(argc);
        kept = NULL;
    } else if (!strcmp(what, "shift")) {
        shared = 1 << (argc + 31);
    } else if (!strcmp(what, "free")) {
        kept = malloc(argc);
        free(kept);
        shared = kept[0];
    }
    return 0;
}
