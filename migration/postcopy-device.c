/*
 * Postcopy switchover: the phase in which the destination loads the device
 * state and the source can still take the guest back
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "system/dma.h"
#include "io/channel-buffer.h"
#include "migration/misc.h"
#include "migration.h"
#include "migration-stats.h"
#include "options.h"
#include "postcopy-device.h"
#include "qemu-file.h"
#include "ram.h"
#include "savevm.h"
#include "trace.h"

/*** Source ***/

#define POSTCOPY_DEVICE_NUDGE_MS    100
/* So long the source tries to get its disks back from a destination that ends */
#define POSTCOPY_DEVICE_RECLAIM_MS  (10 * 1000)
/* And so long if it was cancelled: 'cont' tries again */
#define POSTCOPY_DEVICE_CANCEL_MS   1000
/* A link that takes longer to drain is worth a warning */
#define POSTCOPY_DEVICE_DRAIN_US    (1000 * 1000)

void postcopy_device_init(MigrationState *s)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;

    pd->owner = POSTCOPY_DEVICE_OWNER_SOURCE;
    pd->hold_answered = false;
    pd->held = false;
    pd->start_answered = false;
    pd->in_doubt = false;
    pd->taken_back = false;
    pd->loaded = false;
    pd->start_time = 0;
}

static bool postcopy_device_enabled(MigrationState *s)
{
    return migrate_postcopy_ram() && s->rp_state.rp_thread_created;
}

bool postcopy_device_in_progress(void)
{
    return qatomic_read(&migrate_get_current()->state) ==
           MIGRATION_STATUS_POSTCOPY_DEVICE;
}

void postcopy_device_pong(MigrationState *s, uint32_t value)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;

    switch (value) {
    case QEMU_VM_PONG_POSTCOPY_HELD:
        trace_postcopy_device_held();
        qatomic_set(&pd->held, true);
        /* fall through */
    case QEMU_VM_PING_POSTCOPY_HOLD:
        qatomic_store_release(&pd->hold_answered, true);
        break;
    case QEMU_VM_PING_PACKAGED_LOADED:
        trace_postcopy_device_loaded();
        qatomic_set(&pd->loaded, true);
        break;
    case QEMU_VM_PING_POSTCOPY_START:
        qatomic_set(&pd->start_answered, true);
        break;
    }
}

static bool postcopy_device_set_owner(MigrationState *s,
                                      PostcopyDeviceOwner owner)
{
    return qatomic_cmpxchg(&s->postcopy_device.owner,
                           POSTCOPY_DEVICE_OWNER_SOURCE, owner) ==
           POSTCOPY_DEVICE_OWNER_SOURCE;
}

bool postcopy_device_committed(MigrationState *s)
{
    return qatomic_read(&s->postcopy_device.owner) ==
           POSTCOPY_DEVICE_OWNER_DESTINATION;
}

bool postcopy_device_downtime_over(MigrationState *s)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;

    return postcopy_device_committed(s) &&
           (!qatomic_read(&pd->held) || qatomic_read(&pd->start_answered));
}

static void postcopy_device_cancel_waiting(MigrationState *s, Error **errp)
{
    Error *err = NULL;

    if (s->postcopy_device.taken_back ||
        qatomic_read(&s->postcopy_device.owner) ==
        POSTCOPY_DEVICE_OWNER_CANCELLED) {
        /* It has failed, or is cancelled, but does not say so yet */
        return;
    }

    /* Neither: the migration thread needs the BQL to close the file */
    if (s->postcopy_device.in_doubt) {
        error_setg(errp, "Cannot cancel yet: the migration is about to pause, "
                   "as the disks are in use elsewhere");
        error_append_hint(errp, "Try again in postcopy-paused.\n");
        return;
    }

    if (!qio_channel_has_feature(qemu_file_get_ioc(s->to_dst_file),
                                 QIO_CHANNEL_FEATURE_SHUTDOWN)) {
        error_setg(errp, "Cannot cancel: this channel cannot be shut down; end "
                   "the process that carries it, and the guest goes on here");
        return;
    }

    if (!qatomic_read(&s->postcopy_device.held)) {
        error_setg(errp, "Cannot cancel: this destination cannot be held back "
                   "and may run the guest already; if it does not, stop it, and "
                   "the guest goes on here");
        error_append_hint(errp, "If it is gone, but the connection has not "
                          "noticed that, use 'yank'.\n");
        return;
    }

    if (!postcopy_device_set_owner(s, POSTCOPY_DEVICE_OWNER_CANCELLED)) {
        error_setg(errp, "Cannot cancel: the guest has just been handed over "
                   "to the destination");
        return;
    }

    trace_postcopy_device_cancel();
    /* Before the channels report what that looks like */
    error_setg(&err, "Migration was cancelled before the destination had "
               "loaded the device state");
    migrate_set_error(s, err);
    error_free(err);
    migration_shutdown_channels(s);
    migration_wake(s);
}

static void postcopy_device_cancel_paused(MigrationState *s, Error **errp)
{
    if (!qatomic_read(&s->postcopy_device.held)) {
        error_setg(errp, "Cannot cancel: the destination may have run the "
                   "guest, as its disks were in use; recover the migration, "
                   "or, if the destination is gone, quit and boot the guest "
                   "from its disks");
        return;
    }

    if (!migration_block_try_activate(errp)) {
        error_prepend(errp, "Cannot cancel yet, the disks are in use elsewhere "
                      "(stop the destination if it is alive): ");
        return;
    }

    /* Only a recovery would decide it, which would begin in this thread */
    postcopy_device_set_owner(s, POSTCOPY_DEVICE_OWNER_CANCELLED);
    trace_postcopy_device_cancel();
    migrate_set_state(&s->state, MIGRATION_STATUS_POSTCOPY_PAUSED,
                      MIGRATION_STATUS_CANCELLING);
    qemu_sem_post(&s->postcopy_pause_sem);
}

void postcopy_device_cancel(MigrationState *s, Error **errp)
{
    ERRP_GUARD();

    switch (s->state) {
    case MIGRATION_STATUS_POSTCOPY_DEVICE:
        postcopy_device_cancel_waiting(s, errp);
        return;
    case MIGRATION_STATUS_POSTCOPY_PAUSED:
        if (qatomic_read(&s->postcopy_device.owner) ==
            POSTCOPY_DEVICE_OWNER_SOURCE) {
            postcopy_device_cancel_paused(s, errp);
            return;
        }
        break;
    default:
        break;
    }
    if (!postcopy_device_committed(s)) {
        error_setg(errp, "Cannot cancel during a recovery");
        error_append_hint(errp, "Use 'migrate-pause' first.\n");
        return;
    }
    error_setg(errp, "Postcopy migration in progress, cannot cancel: the "
               "destination has the guest");
    error_append_hint(errp, "If the link is broken, use 'migrate-recover' "
                      "there and 'migrate' with 'resume' here.\n");
}

void postcopy_device_rp_error(MigrationState *s, Error **errp)
{
    ERRP_GUARD();
    PostcopyDeviceSource *pd = &s->postcopy_device;
    MigrationStatus state = qatomic_read(&s->state);
    const char *what;

    if (state == MIGRATION_STATUS_POSTCOPY_DEVICE &&
        !qatomic_read(&pd->loaded)) {
        what = "Destination failed before it had loaded the device state: ";
    } else if (state == MIGRATION_STATUS_ACTIVE && qatomic_read(&s->waiting)) {
        what = "Lost the destination before the switchover to postcopy: ";
    } else {
        return;
    }

    if (!*errp) {
        error_setg(errp, "it closed the return path, see its log");
    }
    error_prepend(errp, "%s", what);
}

void postcopy_device_rp_closed(MigrationState *s)
{
    if (postcopy_device_in_progress() &&
        !qatomic_read(&s->postcopy_device.loaded)) {
        migration_shutdown_channels(s);
    }
}

/* Everything that was sent has arrived when the answer is here */
static bool postcopy_device_wait_drained(MigrationState *s, Error **errp)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;
    int64_t us;

    if (!migrate_postcopy_ram()) {
        return true;
    }

    ram_postcopy_discard_early(s);

    us = qemu_clock_get_us(QEMU_CLOCK_REALTIME);
    qemu_savevm_send_ping(s->to_dst_file, QEMU_VM_PING_POSTCOPY_HOLD);
    if (!migration_wait(s, MIGRATION_STATUS_ACTIVE, &pd->hold_answered, errp)) {
        return false;
    }

    us = qemu_clock_get_us(QEMU_CLOCK_REALTIME) - us;
    trace_postcopy_device_drained(us);
    if (us > POSTCOPY_DEVICE_DRAIN_US) {
        warn_report("It took %" PRId64 " ms until the destination had received "
                    "all that precopy had sent", us / 1000);
    }
    return true;
}

bool postcopy_device_drain(MigrationState *s, Error **errp)
{
    bool ok = true;

    if (migrate_postcopy_preempt()) {
        /* The main channel must be the first that the destination gets */
        ok = migration_wait(s, MIGRATION_STATUS_ACTIVE, &s->rp_state.ponged,
                            errp);
        if (ok) {
            postcopy_preempt_connect(s);
        }
    }
    ok = ok && postcopy_device_wait_drained(s, errp) &&
         postcopy_preempt_wait(s, MIGRATION_STATUS_ACTIVE, errp);

    /* migrate_cancel may have come until now */
    bql_lock();
    return ok && !migration_wait_is_over(s, MIGRATION_STATUS_ACTIVE, errp);
}

int postcopy_device_save(MigrationState *s, QEMUFile *f)
{
    int ret;

    s->postcopy_device.saving = migrate_postcopy_ram();
    ret = qemu_savevm_state_complete_precopy_non_iterable(f, true);
    s->postcopy_device.saving = false;

    if (migrate_postcopy_ram()) {
        /* Devices may have written to guest memory */
        ram_postcopy_sync_bitmap();
        /* Just to line up traces */
        qemu_savevm_send_ping(f, 3);
    }
    if (postcopy_device_enabled(s)) {
        /* The last but RUN: behind it the return path may be lost */
        qemu_savevm_send_ping(f, QEMU_VM_PING_PACKAGED_LOADED);
    }
    return ret;
}

void migration_send_ahead(AddressSpace *as, hwaddr addr, hwaddr len)
{
    if (!migrate_get_current()->postcopy_device.saving) {
        return;
    }

    RCU_READ_LOCK_GUARD();
    while (len) {
        hwaddr xlat, n = len;
        MemoryRegion *mr = address_space_translate(as, addr, &xlat, &n, false,
                                                   MEMTXATTRS_UNSPECIFIED);

        if (mr->ram_block) {
            ram_postcopy_send_ahead(mr->ram_block, xlat, n);
        }
        addr += n;
        len -= n;
    }
}

static void postcopy_device_shut_channels(MigrationState *s)
{
    if (s->postcopy_qemufile_src) {
        qemu_file_shutdown(s->postcopy_qemufile_src);
    }
    WITH_QEMU_LOCK_GUARD(&s->qemu_file_lock) {
        qemu_file_shutdown(s->to_dst_file);
    }
}

static bool postcopy_device_wait_loaded(MigrationState *s, Error **errp)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;
    bool ok;

    qatomic_set_mb(&s->waiting, true);
    while (!(ok = qatomic_read(&pd->loaded))) {
        if (migration_wait_is_over(s, MIGRATION_STATUS_POSTCOPY_DEVICE, errp)) {
            break;
        }
        if (ram_postcopy_has_request()) {
            ram_postcopy_send_requested(s->to_dst_file);
            continue;
        }

        if (qatomic_read(&pd->held)) {
            qemu_sem_wait(&s->wake_sem);
        } else if (qemu_sem_timedwait(&s->wake_sem, POSTCOPY_DEVICE_NUDGE_MS)) {
            /*
             * A destination without this code that has failed to load may wait
             * for its listen thread, which waits for something to read.
             */
            qemu_savevm_send_ping(s->to_dst_file, QEMU_VM_PING_POSTCOPY_HOLD);
        }
    }
    qatomic_set(&s->waiting, false);
    return ok;
}

static void postcopy_device_send_start(MigrationState *s)
{
    if (postcopy_device_enabled(s)) {
        qemu_savevm_send_ping(s->to_dst_file, QEMU_VM_PING_POSTCOPY_START);
    }
}

void postcopy_device_recovered(MigrationState *s)
{
    /*
     * If the source was in doubt, the devices are loaded nevertheless, or the
     * destination could not have been recovered.
     */
    postcopy_device_set_owner(s, POSTCOPY_DEVICE_OWNER_DESTINATION);
    postcopy_device_send_start(s);
    if (!postcopy_device_downtime_over(s)) {
        /* Too long if it had got an earlier one, and the answer was lost */
        s->downtime = 0;
        migration_downtime_end(s);
    }
}

/* From here on the guest is the destination's, whatever happens. */
static bool postcopy_device_commit(MigrationState *s, MigrationStatus from,
                                   Error **errp)
{
    /* The state changes if QEMU is about to quit */
    if (qatomic_read(&s->state) != from ||
        !postcopy_device_set_owner(s, POSTCOPY_DEVICE_OWNER_DESTINATION)) {
        error_setg(errp, "Migration was cancelled during switchover");
        return false;
    }

    trace_postcopy_device_commit(qemu_clock_get_ms(QEMU_CLOCK_REALTIME) -
                                 s->postcopy_device.start_time);

    /* The guest waits for this one */
    postcopy_device_send_start(s);
    migration_downtime_end(s);
    migrate_set_state(&s->state, from, MIGRATION_STATUS_POSTCOPY_ACTIVE);

    return true;
}

void postcopy_device_handed_over(MigrationState *s)
{
    bql_lock();
    migration_rate_set(migrate_max_postcopy_bandwidth());
    /* In particular spice sends its client after the guest now */
    migration_call_notifiers(s, MIG_EVENT_PRECOPY_DONE, NULL);
    bql_unlock();

    if (migrate_postcopy_ram()) {
        /* Just to line up traces */
        qemu_savevm_send_ping(s->to_dst_file, 4);
    }

    if (migrate_release_ram()) {
        ram_postcopy_migrated_memory_release(s);
    }
}

/*
 * The source wants the guest back, but it may have got as far at the
 * destination that the disks are activated there.  A destination that can hold
 * lets go of them when it finds the link broken, or ends, which may take some
 * time.  Any other that has the locks may have run the guest.
 */
static bool postcopy_device_reclaim_disks(MigrationState *s, Error **errp)
{
    ERRP_GUARD();
    PostcopyDeviceSource *pd = &s->postcopy_device;
    int64_t start = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
    int delay_ms = 1;

    while (true) {
        int64_t limit_ms =
            qatomic_read(&pd->owner) == POSTCOPY_DEVICE_OWNER_CANCELLED ?
            POSTCOPY_DEVICE_CANCEL_MS : POSTCOPY_DEVICE_RECLAIM_MS;
        bool ok;

        error_free(*errp);
        *errp = NULL;
        bql_lock();
        ok = migration_block_try_activate(errp);
        bql_unlock();

        if (ok) {
            return true;
        }
        if (!qatomic_read(&pd->held) ||
            qemu_clock_get_ms(QEMU_CLOCK_REALTIME) - start > limit_ms) {
            error_report_err(error_copy(*errp));
            return false;
        }
        g_usleep(delay_ms * 1000);
        delay_ms = MIN(2 * delay_ms, 100);
    }
}

static void postcopy_device_explain_doubt(MigrationState *s, Error *disk_err)
{
    QEMU_LOCK_GUARD(&s->error_mutex);
    error_prepend(&disk_err, "%s. Guest stays stopped, as its disks are in "
                  "use elsewhere: recover the migration if the destination "
                  "is alive, or %s when it is not: ",
                  s->error ? error_get_pretty(s->error) : "",
                  qatomic_read(&s->postcopy_device.held) ?
                  "use 'migrate_cancel'" :
                  "quit and boot the guest from its disks");
    error_free(s->error);
    s->error = disk_err;
}

bool postcopy_device_take_back(MigrationState *s)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;
    g_autoptr(Error) disk_err = NULL;
    bool have_disks;

    if (s->state != MIGRATION_STATUS_POSTCOPY_DEVICE) {
        return true;
    }

    have_disks = postcopy_device_reclaim_disks(s, &disk_err);

    /* A user may have cancelled meanwhile, but can't behind this */
    bql_lock();
    if (qatomic_read(&pd->owner) == POSTCOPY_DEVICE_OWNER_CANCELLED) {
        /* If the disks are not to be had, 'cont' will try again */
        migrate_set_state(&s->state, MIGRATION_STATUS_POSTCOPY_DEVICE,
                          MIGRATION_STATUS_CANCELLING);
    } else {
        pd->taken_back = have_disks;
        pd->in_doubt = !have_disks;
    }
    bql_unlock();

    if (pd->in_doubt) {
        postcopy_device_explain_doubt(s, g_steal_pointer(&disk_err));
    }
    return !pd->in_doubt;
}

/* Without the BQL if there is a return path: it may block for long */
static bool postcopy_device_send(MigrationState *s, QIOChannelBuffer *package,
                                 Error **errp)
{
    int ret;

    if (migrate_postcopy_ram()) {
        /* Before the discards: the destination takes them as in precopy */
        ram_postcopy_send_requested(s->to_dst_file);

        /* Have the destination throw away what it has and what is dirty */
        ram_postcopy_send_discard_bitmap(s);

        /* Ping just for debugging, helps line traces up */
        qemu_savevm_send_ping(s->to_dst_file, 2);
    }

    if (qemu_savevm_send_packaged(s->to_dst_file, package->data,
                                  package->usage)) {
        error_setg(errp, "Failed to send the device state");
        return false;
    }

    /* The destination waits for the last byte of it, the source for its PONG */
    ret = qemu_fflush(s->to_dst_file);
    if (ret) {
        error_setg_errno(errp, -ret, "Failed to send the device state");
        return false;
    }
    return true;
}

bool postcopy_device_switchover(MigrationState *s, QIOChannelBuffer *package,
                                Error **errp)
{
    ERRP_GUARD();
    bool ok;

    trace_postcopy_device_enter(package->usage);
    s->postcopy_device.start_time = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);

    if (postcopy_device_enabled(s)) {
        migrate_set_state(&s->state, MIGRATION_STATUS_DEVICE,
                          MIGRATION_STATUS_POSTCOPY_DEVICE);
        bql_unlock();
        /* The return path may have been closed just before */
        ok = !migration_wait_is_over(s, MIGRATION_STATUS_POSTCOPY_DEVICE,
                                     errp) &&
             postcopy_device_send(s, package, errp) &&
             postcopy_device_wait_loaded(s, errp) &&
             postcopy_device_commit(s, MIGRATION_STATUS_POSTCOPY_DEVICE, errp);
    } else {
        /* It could still be cancelled when it is sent if the BQL was dropped */
        ok = postcopy_device_send(s, package, errp) &&
             postcopy_device_commit(s, MIGRATION_STATUS_DEVICE, errp);
        bql_unlock();
    }

    if (!ok) {
        trace_postcopy_device_fail(error_get_pretty(*errp));
        migrate_set_error(s, *errp);
        postcopy_device_shut_channels(s);
    }
    return ok;
}

void postcopy_device_guest_back(MigrationState *s)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;

    if (pd->start_time) {
        trace_postcopy_device_guest_back(
            qemu_clock_get_ms(QEMU_CLOCK_REALTIME) - s->downtime_start);
        qemu_announce_self(&pd->announce_timer, migrate_announce_params());
    }
}

/*** Destination ***/

/* Bits of PostcopyDeviceIncoming.got */
#define POSTCOPY_DEVICE_GOT_RUN     1u
#define POSTCOPY_DEVICE_GOT_START   2u
#define POSTCOPY_DEVICE_GOT_BOTH    (POSTCOPY_DEVICE_GOT_RUN | \
                                     POSTCOPY_DEVICE_GOT_START)

void postcopy_device_incoming_init(MigrationIncomingState *mis)
{
    /* A source that does not ask to hold the guest will not send START */
    mis->postcopy_device.got = POSTCOPY_DEVICE_GOT_START;
    qemu_event_init(&mis->postcopy_device.settled, false);
}

void postcopy_device_incoming_listen(MigrationIncomingState *mis)
{
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;

    pd->started = false;
    pd->listen_ended = false;
    qemu_event_reset(&pd->settled);
    qatomic_set(&pd->outcome, POSTCOPY_DEVICE_LOADING);

    /* There is no such state with dirty bitmaps only */
    migrate_set_state(&mis->state, MIGRATION_STATUS_ACTIVE,
                      migrate_postcopy_ram() ?
                      MIGRATION_STATUS_POSTCOPY_DEVICE :
                      MIGRATION_STATUS_POSTCOPY_ACTIVE);
}

static PostcopyDeviceOutcome
postcopy_device_incoming_decide(MigrationIncomingState *mis,
                                PostcopyDeviceOutcome outcome)
{
    PostcopyDeviceOutcome old =
        qatomic_cmpxchg(&mis->postcopy_device.outcome,
                        POSTCOPY_DEVICE_LOADING, outcome);

    if (old != POSTCOPY_DEVICE_LOADING) {
        return old;
    }
    trace_postcopy_device_incoming_decide(outcome == POSTCOPY_DEVICE_LOADED);
    return outcome;
}

static void postcopy_device_activate_disks_bh(void *opaque)
{
    MigrationIncomingState *mis = opaque;
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;
    Error *err = NULL;

    pd->disks_activated = migration_block_try_activate(&err);
    if (pd->disks_activated && postcopy_device_incoming_failed(mis)) {
        /* The main loop has run meanwhile, and the listen thread given up */
        pd->disks_activated = !migration_block_inactivate();
    }
    if (err) {
        error_prepend(&err, "load of migration failed: cannot activate the "
                      "disks: ");
        migrate_set_error(migrate_get_current(), err);
        error_free(err);
    }
    aio_co_wake(g_steal_pointer(&pd->preparing));
}

/*
 * Be as sure as possible that the guest can be started here.  The block layer
 * wants the main loop, not a coroutine.
 */
static bool coroutine_fn
postcopy_device_incoming_prepare(MigrationIncomingState *mis)
{
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;

    if (!migrate_late_block_activate()) {
        pd->preparing = qemu_coroutine_self();
        migration_bh_schedule(postcopy_device_activate_disks_bh, mis);
        /* RDMA enters it as well when the link is lost */
        while (pd->preparing) {
            qemu_coroutine_yield();
        }
        if (!pd->disks_activated) {
            return false;
        }
    }

    return postcopy_device_incoming_decide(mis, POSTCOPY_DEVICE_LOADED) !=
           POSTCOPY_DEVICE_FAILED;
}

/* RUN and START may come in either order */
static void postcopy_device_incoming_got(MigrationIncomingState *mis,
                                         unsigned what)
{
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;
    unsigned old = qatomic_fetch_or(&pd->got, what);

    trace_postcopy_device_incoming_got(old, what);

    if (old != POSTCOPY_DEVICE_GOT_BOTH &&
        (old | what) == POSTCOPY_DEVICE_GOT_BOTH) {
        migration_bh_schedule(pd->start_bh, mis);
    }
}

bool postcopy_device_incoming_ping(MigrationIncomingState *mis,
                                   uint32_t *value)
{
    switch (*value) {
    case QEMU_VM_PING_POSTCOPY_HOLD:
        /* When the package is here it is too late to begin with that */
        if (qatomic_read(&mis->postcopy_device.outcome) ==
            POSTCOPY_DEVICE_NONE) {
            mis->postcopy_device.held = true;
            qatomic_and(&mis->postcopy_device.got, ~POSTCOPY_DEVICE_GOT_START);
        }
        if (!(qatomic_read(&mis->postcopy_device.got) &
              POSTCOPY_DEVICE_GOT_START)) {
            *value = QEMU_VM_PONG_POSTCOPY_HELD;
        }
        break;
    case QEMU_VM_PING_PACKAGED_LOADED:
        return !qemu_in_coroutine() || postcopy_device_incoming_prepare(mis);
    case QEMU_VM_PING_POSTCOPY_START:
        postcopy_device_incoming_got(mis, POSTCOPY_DEVICE_GOT_START);
        break;
    }
    return true;
}

bool postcopy_device_incoming_run(MigrationIncomingState *mis,
                                  QEMUBHFunc *start_bh)
{
    /* Not every source sends a PING that says so */
    if (postcopy_device_incoming_decide(mis, POSTCOPY_DEVICE_LOADED) ==
        POSTCOPY_DEVICE_FAILED) {
        return false;
    }

    mis->postcopy_device.start_bh = start_bh;
    postcopy_device_incoming_got(mis, POSTCOPY_DEVICE_GOT_RUN);
    return true;
}

static void postcopy_device_release_disks_bh(void *opaque)
{
    PostcopyDeviceIncoming *pd = opaque;

    if (pd->disks_activated && !pd->started) {
        pd->disks_activated = !migration_block_inactivate();
    }
}

void postcopy_device_incoming_link_lost(MigrationIncomingState *mis)
{
    if (qatomic_read(&mis->postcopy_device.got) != POSTCOPY_DEVICE_GOT_BOTH) {
        trace_postcopy_device_incoming_in_doubt();
        migration_bh_schedule(postcopy_device_release_disks_bh,
                              &mis->postcopy_device);
    }
}

MigrationStatus
postcopy_device_incoming_resume_state(MigrationIncomingState *mis)
{
    return qatomic_read(&mis->postcopy_device.got) == POSTCOPY_DEVICE_GOT_BOTH ?
           MIGRATION_STATUS_POSTCOPY_ACTIVE : MIGRATION_STATUS_POSTCOPY_DEVICE;
}

void postcopy_device_incoming_started(MigrationIncomingState *mis)
{
    mis->postcopy_device.started = true;
    migrate_set_state(&mis->state, MIGRATION_STATUS_POSTCOPY_DEVICE,
                      MIGRATION_STATUS_POSTCOPY_ACTIVE);
    qemu_event_set(&mis->postcopy_device.settled);
}

bool postcopy_device_incoming_give_up(MigrationIncomingState *mis)
{
    return postcopy_device_incoming_decide(mis, POSTCOPY_DEVICE_FAILED) !=
           POSTCOPY_DEVICE_LOADED;
}

bool postcopy_device_incoming_failed(MigrationIncomingState *mis)
{
    return qatomic_read(&mis->postcopy_device.outcome) ==
           POSTCOPY_DEVICE_FAILED;
}

bool postcopy_device_incoming_is_held(MigrationIncomingState *mis)
{
    return mis->postcopy_device.held;
}

bool postcopy_device_incoming_is_prepared(MigrationIncomingState *mis)
{
    return mis->state == MIGRATION_STATUS_POSTCOPY_DEVICE &&
           qatomic_read(&mis->postcopy_device.outcome) ==
           POSTCOPY_DEVICE_LOADED;
}

void postcopy_device_incoming_wait_settled(MigrationIncomingState *mis)
{
    if (!postcopy_device_incoming_failed(mis)) {
        qemu_event_wait(&mis->postcopy_device.settled);
    }
}

static void postcopy_device_incoming_shutdown(MigrationIncomingState *mis)
{
    qemu_file_shutdown(mis->from_src_file);
    if (mis->postcopy_qemufile_dst) {
        qemu_file_shutdown(mis->postcopy_qemufile_dst);
    }
}

void postcopy_device_incoming_preempt_lost(MigrationIncomingState *mis)
{
    if (postcopy_device_incoming_give_up(mis)) {
        postcopy_device_incoming_shutdown(mis);
    }
}

void postcopy_device_incoming_listen_lost(MigrationIncomingState *mis, int ret)
{
    Error *err = NULL;

    if (!migrate_has_error(migrate_get_current())) {
        error_setg_errno(&err, -ret, "Lost the source before the device state "
                         "was loaded");
        migrate_set_error(migrate_get_current(), err);
        if (mis->exit_on_error) {
            /* The main thread will report it */
            error_free(err);
        } else {
            error_report_err(err);
        }
    }
    postcopy_device_incoming_shutdown(mis);
}

/* The listen thread and the load coroutine have ended */
static void postcopy_device_incoming_finish_bh(void *opaque)
{
    MigrationIncomingState *mis = opaque;
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;
    bool failed = postcopy_device_incoming_failed(mis);

    if (failed) {
        postcopy_device_release_disks_bh(pd);
    }
    mis->have_listen_thread = false;
    postcopy_state_set(POSTCOPY_INCOMING_END);
    qatomic_set(&pd->outcome, POSTCOPY_DEVICE_NONE);

    if (failed) {
        migration_incoming_failed();
    } else {
        migrate_set_state(&mis->state, MIGRATION_STATUS_POSTCOPY_ACTIVE,
                          MIGRATION_STATUS_COMPLETED);
        migration_incoming_state_destroy();
    }
}

static void postcopy_device_incoming_listen_end_bh(void *opaque)
{
    MigrationIncomingState *mis = opaque;

    qemu_thread_join(&mis->listen_thread);
    mis->postcopy_device.listen_ended = true;
    if (!mis->loadvm_co) {
        postcopy_device_incoming_finish_bh(mis);
    }
}

void postcopy_device_incoming_listen_end(MigrationIncomingState *mis)
{
    migration_bh_schedule(postcopy_device_incoming_listen_end_bh, mis);
}

bool postcopy_device_incoming_abort(MigrationIncomingState *mis)
{
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;

    if (!mis->have_listen_thread) {
        return false;
    }

    if (mis->exit_on_error &&
        !qio_channel_has_feature(qemu_file_get_ioc(mis->from_src_file),
                                 QIO_CHANNEL_FEATURE_SHUTDOWN)) {
        migration_incoming_failed();
    }

    trace_postcopy_device_incoming_abort();
    qatomic_set(&pd->outcome, POSTCOPY_DEVICE_FAILED);
    qemu_event_set(&pd->settled);
    postcopy_device_incoming_shutdown(mis);
    if (pd->listen_ended) {
        /* Not in the coroutine */
        migration_bh_schedule(postcopy_device_incoming_finish_bh, mis);
    }
    return true;
}
