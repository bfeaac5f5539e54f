/*
 * Postcopy switchover: the phase in which the destination loads the device
 * state and the source can still take the guest back
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_POSTCOPY_DEVICE_H
#define QEMU_POSTCOPY_DEVICE_H

#include "qemu/coroutine.h"
#include "qemu/thread.h"
#include "io/channel-buffer.h"
#include "net/announce.h"
#include "qapi/qapi-types-migration.h"

/*
 * Value of the MIG_CMD_PING that the source puts into the package behind the
 * state of the last device.  A destination of any version answers with a
 * MIG_RP_MSG_PONG of the same value as soon as it gets there, that is when it
 * has loaded everything in front of it.  Value and name are those of QEMU 10.2.
 */
#define QEMU_VM_PING_PACKAGED_LOADED    0x42

/*
 * The switchover is committed in two phases.  PINGs alone do it, since any
 * destination echoes any PING and any source ignores a PONG that it does not
 * know.  The values are this implementation's own; docs/devel/migration/
 * postcopy-device.rst has the protocol.
 *
 * HOLD: do not start the guest on MIG_CMD_POSTCOPY_RUN.  Sent before the guest
 * is stopped, and again and again when the package is sent and the destination
 * cannot hold.  One that can answers HELD, any other echoes HOLD.
 */
#define QEMU_VM_PING_POSTCOPY_HOLD      0x484f4c44 /* "HOLD" */
#define QEMU_VM_PONG_POSTCOPY_HELD      0x48454c44 /* "HELD" */
/* START: the source has let go, start the guest.  Sent again on recovery. */
#define QEMU_VM_PING_POSTCOPY_START     0x53545254 /* "STRT" */

/* Who has the guest, as far as the source has decided */
typedef enum PostcopyDeviceOwner {
    /* The source: the destination has not been told to start it */
    POSTCOPY_DEVICE_OWNER_SOURCE = 0,
    /* The destination.  There is no way back from here. */
    POSTCOPY_DEVICE_OWNER_DESTINATION,
    /* The source, for ever: the user has cancelled the migration */
    POSTCOPY_DEVICE_OWNER_CANCELLED,
} PostcopyDeviceOwner;

/* Source side; lives in MigrationState and is set up for every migration */
typedef struct PostcopyDeviceSource {
    /*
     * The migration thread (commit) and the main thread (cancel) both want to
     * decide it: atomic, the first one wins.
     */
    PostcopyDeviceOwner owner;
    /*
     * The answer to HOLD has arrived; it was HELD: the destination will not
     * start the guest before START.  Set by the return path thread, read by the
     * migration thread, @held by the main thread, too.
     */
    bool hold_answered;
    bool held;
    /* It has got START.  Set by the return path thread, read by any. */
    bool start_answered;
    /*
     * The migration will fail, as the source has the guest; the disks are not
     * to be had, it will be paused.  Set by the migration thread, read by the
     * main thread, under the BQL.
     */
    bool taken_back;
    bool in_doubt;
    /* The devices are being saved for the package.  Under the BQL. */
    bool saving;
    /*
     * The destination has loaded the package.  Set by the return path thread,
     * consumed by the migration thread.
     */
    bool loaded;
    /*
     * When the package was complete (ms), or 0 if it has not come to that.
     * Migration thread only, like the next.
     */
    int64_t start_time;
    AnnounceTimer announce_timer;
} PostcopyDeviceSource;

/*
 * How far the destination has come.  It is decided once where LOADING ends, but
 * for a load that fails after it was LOADED.
 */
typedef enum PostcopyDeviceOutcome {
    /* No package has been announced yet */
    POSTCOPY_DEVICE_NONE = 0,
    /* From MIG_CMD_POSTCOPY_LISTEN: the main thread loads the devices */
    POSTCOPY_DEVICE_LOADING,
    /* All of them are loaded; from here on a lost link means recovery */
    POSTCOPY_DEVICE_LOADED,
    /* Loading failed or the link broke: the guest must not start here */
    POSTCOPY_DEVICE_FAILED,
} PostcopyDeviceOutcome;

/* Destination side; lives in MigrationIncomingState */
typedef struct PostcopyDeviceIncoming {
    /*
     * The main thread and the listen thread both want to decide it: atomic,
     * the first one wins.
     */
    PostcopyDeviceOutcome outcome;
    /*
     * Set by the main thread when the guest has been started, or will never
     * be; the listen thread waits for it.
     */
    QemuEvent settled;
    /* What starts the guest.  Set by the main thread before it sets RUN. */
    QEMUBHFunc *start_bh;
    /*
     * What has arrived of RUN (main thread) and START (listen thread): atomic.
     * With both of them the guest starts.
     */
    unsigned got;
    /* HOLD has come.  Set before there is a listen thread. */
    bool held;
    /* The rest is used by the main thread only, with the BQL held */
    bool disks_activated;
    bool started;
    bool listen_ended;
    /* The load, while it waits for the disks */
    Coroutine *preparing;
} PostcopyDeviceIncoming;

/*** Source ***/

/**
 * postcopy_device_init: prepare for a new outgoing migration
 *
 * @s: the migration
 *
 * Forgets everything that an earlier migration has left behind.  Main thread,
 * with the BQL held, before any thread of the migration exists.
 */
void postcopy_device_init(MigrationState *s);

/**
 * postcopy_device_drain: let the link run dry before the guest is stopped
 *
 * @s: the migration, in state active
 * @errp: why there will be no switchover
 *
 * Everything that precopy has queued on the link would delay the package, and
 * with it the guest.  So this asks the destination to hold the guest, and waits
 * for the answer, which comes behind all of that.  With postcopy-preempt it
 * also connects the second channel.  Without postcopy-ram it does nothing.
 *
 * Returns: true if the guest may be stopped now; false if the migration was
 *          cancelled, or the destination or a channel was lost.
 *
 * Migration thread, without the BQL; in any case it is held on return, so that
 * migrate_cancel does not get in between.
 */
bool postcopy_device_drain(MigrationState *s, Error **errp);

/**
 * postcopy_device_save: save the state of the devices for the package
 *
 * @s: the migration, in state device
 * @f: the package
 *
 * Meanwhile migration_send_ahead() is heard.  Afterwards it is certain what is
 * dirty.  A PING QEMU_VM_PING_PACKAGED_LOADED follows behind the devices.
 *
 * Returns: 0, or negative errno
 *
 * Migration thread, with the BQL held.
 */
int postcopy_device_save(MigrationState *s, QEMUFile *f);

/**
 * postcopy_device_cancel: migrate_cancel after the switchover to postcopy
 *
 * @s: the migration
 * @errp: why it is not possible, and what is
 *
 * In postcopy-device it is granted if the destination holds the guest.  In
 * postcopy-paused it is granted if the source still owns the guest, but could
 * not get its disks, and they can be activated now.
 *
 * Main thread, with the BQL held.
 */
void postcopy_device_cancel(MigrationState *s, Error **errp);

/**
 * postcopy_device_recovered: the link is there again
 *
 * @s: the migration, in state postcopy-active
 *
 * Sends START again, which may have been lost.  Migration thread.
 */
void postcopy_device_recovered(MigrationState *s);

/**
 * postcopy_device_switchover: hand the package over and wait until it is loaded
 *
 * @s: the migration, in state device
 * @package: the package, complete
 * @errp: where to say what went wrong
 *
 * Serves page requests meanwhile, and sends no other page: the link is kept
 * free for what the destination waits for.  Waits as long as the destination
 * needs, but no longer than both channels work.
 *
 * Returns: true once the destination has the guest: the state is
 *          postcopy-active, and there is no way back.  The caller goes on with
 *          postcopy_device_handed_over().
 *          false if the source still owns the guest; the channels are shut
 *          down.  The caller closes the return path, and goes on with
 *          postcopy_device_take_back().
 *
 * Migration thread, with the BQL held, which is dropped.  As migrate_cancel
 * comes with the BQL, it finds the migration either before the phase or in it.
 */
bool postcopy_device_switchover(MigrationState *s, QIOChannelBuffer *package,
                                Error **errp);

/**
 * postcopy_device_handed_over: give up what was kept for the guest to come back
 *
 * @s: the migration, in state postcopy-active
 *
 * Migration thread, without the BQL.
 */
void postcopy_device_handed_over(MigrationState *s);

/**
 * postcopy_device_take_back: the switchover has failed, get the disks back
 *
 * @s: the migration, with all channels closed
 *
 * Returns: true if the source has the guest.  If the user has cancelled the
 *          migration, the state is cancelling.
 *          false if the disks are not to be had, as the destination may hold
 *          their locks: the source must not run the guest, and the caller
 *          pauses the migration until it is recovered or cancelled.
 *
 * Migration thread, without the BQL.  Takes 10 seconds at most.
 */
bool postcopy_device_take_back(MigrationState *s);

/**
 * postcopy_device_committed: has the guest been handed over?
 *
 * @s: the migration
 *
 * Returns: true if the source must never run the guest again
 *
 * Any thread.
 */
bool postcopy_device_committed(MigrationState *s);

/**
 * postcopy_device_guest_back: the guest runs at the source again
 *
 * @s: the migration, which has failed
 *
 * The destination may have announced the guest on the network: announce it here.
 * Migration thread, with the BQL held.
 */
void postcopy_device_guest_back(MigrationState *s);

/**
 * postcopy_device_pong: note that a PONG has arrived
 *
 * @s: the migration
 * @value: its value
 *
 * Return path thread.
 */
void postcopy_device_pong(MigrationState *s, uint32_t value);

/**
 * postcopy_device_rp_error: explain an error of the return path
 *
 * @s: the migration
 * @errp: the error if there was one; within the phase a return path that ends
 *        without an error and without the PONG is one, too
 *
 * Return path thread, before it makes the error public.
 */
void postcopy_device_rp_error(MigrationState *s, Error **errp);

/**
 * postcopy_device_rp_closed: note that the return path is closed
 *
 * @s: the migration
 *
 * If the migration thread is stuck in a write that will not go through any
 * more, it is freed from there.  Return path thread, before it ends.
 */
void postcopy_device_rp_closed(MigrationState *s);

/**
 * postcopy_device_downtime_over: may the guest run at the destination?
 *
 * @s: the migration, in postcopy
 *
 * Returns: true if the destination has got START, or does not wait for it
 *
 * Any thread.
 */
bool postcopy_device_downtime_over(MigrationState *s);

/**
 * postcopy_device_in_progress: is there an outgoing migration in the phase?
 *
 * Returns: true in postcopy-device.  Nothing that the guest would need on this
 *          side may be given up then.
 *
 * Any thread.
 */
bool postcopy_device_in_progress(void);

/*** Destination ***/

/**
 * postcopy_device_incoming_init: called once, with the incoming state's
 */
void postcopy_device_incoming_init(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_listen: the package has begun
 *
 * @mis: the incoming migration
 *
 * Called before any other thread of postcopy exists.  Main thread, in the load
 * coroutine.
 */
void postcopy_device_incoming_listen(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_ping: act on a PING before it is answered
 *
 * @mis: the incoming migration
 * @value: its value; what to answer is put here
 *
 * For QEMU_VM_PING_PACKAGED_LOADED this side prepares to run the guest: the
 * disks are activated, unless late-block-activate defers that.  From there on
 * a lost link is the listen thread's to recover from.
 *
 * Returns: false if the load must fail: the disks are not to be had (the error
 *          has been reported), or the listen thread has lost the link already.
 *
 * Main thread in the load coroutine, or the listen thread.
 */
bool postcopy_device_incoming_ping(MigrationIncomingState *mis,
                                   uint32_t *value);

/**
 * postcopy_device_incoming_run: MIG_CMD_POSTCOPY_RUN has arrived
 *
 * @mis: the incoming migration
 * @start_bh: what starts the guest; opaque is @mis
 *
 * Schedules @start_bh, now or when START arrives, if this side is to hold the
 * guest.
 *
 * Returns: false if the listen thread has lost the link already: the guest
 *          must not start, the load must fail.
 *
 * Main thread, in the load coroutine.
 */
bool postcopy_device_incoming_run(MigrationIncomingState *mis,
                                  QEMUBHFunc *start_bh);

/**
 * postcopy_device_incoming_started: the guest has been handed over
 *
 * @mis: the incoming migration
 *
 * The state becomes postcopy-active.  Main thread, with the BQL held.
 */
void postcopy_device_incoming_started(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_give_up: the load, or the link during it, has failed
 *
 * @mis: the incoming migration
 *
 * Decides that the guest will not start here, if it is not too late for that.
 *
 * Returns: true if that is decided: the source keeps the guest.
 *          false if all devices had been loaded before: the guest may run
 *          here, and the migration must be paused until it is recovered.
 *
 * Listen or preempt thread.
 */
bool postcopy_device_incoming_give_up(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_failed: is it decided that the guest won't start?
 *
 * Any thread.
 */
bool postcopy_device_incoming_failed(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_is_held: has the source asked to hold the guest?
 *
 * Returns: true if so: it has this code, too, and never runs the guest again
 *          once it has given it away, whatever breaks at the end
 *
 * Any thread of postcopy.
 */
bool postcopy_device_incoming_is_held(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_is_prepared: could the source have let go of the guest?
 *
 * Returns: true in postcopy-device once all devices are loaded: only a recovery
 *          helps if the link is lost.
 *
 * Any thread.
 */
bool postcopy_device_incoming_is_prepared(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_link_lost: the listen thread pauses for recovery
 *
 * @mis: the incoming migration
 *
 * If the guest has not been started, this side is in doubt: the source may
 * have taken the guest back.  Lets go of the disks until START arrives.
 *
 * Listen thread.
 */
void postcopy_device_incoming_link_lost(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_resume_state: where to go on after a recovery
 *
 * Returns: the status of a recovered migration: postcopy-device if the guest
 *          still waits for START, else postcopy-active
 *
 * Listen thread.
 */
MigrationStatus
postcopy_device_incoming_resume_state(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_wait_settled: wait until it is certain what becomes
 * of the guest
 *
 * @mis: the incoming migration
 *
 * Returns when the guest has been handed over, or never will be.
 *
 * Listen thread, when it has received everything, or has failed.
 */
void postcopy_device_incoming_wait_settled(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_preempt_lost: the preempt channel has failed
 *
 * @mis: the incoming migration
 *
 * If devices are still being loaded, one of them may wait for a page that was
 * to come this way, and the other side may not even know that it is lost.
 * Breaks the main channel, too, so that the listen thread gives up.
 * Preempt thread.
 */
void postcopy_device_incoming_preempt_lost(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_listen_lost: report why the listen thread gives up
 *
 * @mis: the incoming migration
 * @ret: negative errno of the read that failed
 *
 * Silent if it was the failed load that made it give up.  Shuts down the
 * channels so that every other thread lets go, and the source learns of it.
 * Listen thread.
 */
void postcopy_device_incoming_listen_lost(MigrationIncomingState *mis, int ret);

/**
 * postcopy_device_incoming_listen_end: the listen thread's last call
 *
 * @mis: the incoming migration
 *
 * Has the main thread join it, and end the migration unless the load coroutine
 * still has to do that.  Listen thread.
 */
void postcopy_device_incoming_listen_end(MigrationIncomingState *mis);

/**
 * postcopy_device_incoming_abort: give up after the load has failed
 *
 * @mis: the incoming migration
 *
 * Ends the listen thread, if there is one, with those that it looks after; the
 * migration ends when that has.
 *
 * Returns: false if there is no listen thread: the caller has to end the
 *          migration.  Does not return, but exits, if the listen thread cannot
 *          be ended, and exit-on-error says so.
 *
 * Main thread, in the load coroutine, which is about to end.
 */
bool postcopy_device_incoming_abort(MigrationIncomingState *mis);

#endif
