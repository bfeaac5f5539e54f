/*
 * Postcopy switchover: the phase in which the destination loads the device
 * state and the source can still take the guest back
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "qemu/sockets.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "exec/cpu-common.h"
#include "exec/memory.h"
#include "block/block-global-state.h"
#include "io/channel-buffer.h"
#include "io/channel-socket.h"
#include "io/channel-tls.h"
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

/*
 * Background pages may delay the guest's start by this part of its pause, but
 * by no more than so many us
 */
#define POSTCOPY_DEVICE_PACE_PART   16
#define POSTCOPY_DEVICE_PACE_US     1000
/* A lot of them has at least so many bytes, and at most so many at first */
#define POSTCOPY_DEVICE_PACE_MIN    (4 * KiB)
#define POSTCOPY_DEVICE_PACE_FIRST  (1 * MiB)
/*
 * The link holds so many of them in a round trip.  The PONG of a lot comes when
 * all of it has arrived; meanwhile the link is busy with one more.
 */
#define POSTCOPY_DEVICE_PACE_HOLDS  (POSTCOPY_DEVICE_PACE_LOTS - 1)
/* A lot that the link is busy with for longer (us) is sent in slices */
#define POSTCOPY_DEVICE_PACE_SLICE_US   2000
/* What the destination needs for a zero page, which is nothing on the link */
#define POSTCOPY_DEVICE_PACE_ZERO_US    4
/* No page may be larger, as the link is busy with one until it is sent */
#define POSTCOPY_DEVICE_PACE_PAGE   (64 * KiB)

void postcopy_device_init(MigrationState *s)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;

    pd->owner = POSTCOPY_DEVICE_OWNER_SOURCE;
    pd->held = false;
    pd->in_doubt = false;
    pd->loaded = false;
    pd->rp_closed = false;
    pd->round_trip = 0;
    pd->pace_arrived = 0;
    pd->pace_sent = 0;
    pd->pace_seen = 0;
    pd->pace_arrived_end = 0;
    pd->pace_size = 0;
    pd->pace_slices = 0;
    pd->pace_slice = 0;
    pd->pace_due = 0;
    pd->pace_end = 0;
    pd->pace_zero_end = 0;
    pd->start_time = 0;
}

bool postcopy_device_available(MigrationState *s)
{
    return s->rp_state.rp_thread_created;
}

bool postcopy_device_in_progress(void)
{
    return qatomic_read(&migrate_get_current()->state) ==
           MIGRATION_STATUS_POSTCOPY_DEVICE;
}

void postcopy_device_wake(MigrationState *s)
{
    qemu_sem_post(&s->postcopy_device.wake);
}

void postcopy_device_pong(MigrationState *s, uint32_t value)
{
    switch (value) {
    case QEMU_VM_PONG_POSTCOPY_HELD:
        trace_postcopy_device_held();
        qatomic_set(&s->postcopy_device.held, true);
        break;
    case QEMU_VM_PING_PACKAGED_LOADED:
        trace_postcopy_device_loaded();
        qatomic_set(&s->postcopy_device.loaded, true);
        postcopy_device_wake(s);
        break;
    case QEMU_VM_PING_POSTCOPY_PACE:
        qatomic_inc(&s->postcopy_device.pace_arrived);
        postcopy_device_wake(s);
        break;
    }
}

/* What TCP says: how long a round trip takes (us), how much may be under way */
typedef struct PostcopyDeviceLink {
    uint64_t round_trip;
    uint64_t window;
} PostcopyDeviceLink;

/* All is 0 if it is not TCP, or if the host cannot tell. */
static PostcopyDeviceLink postcopy_device_query_link(MigrationState *s)
{
#ifdef CONFIG_LINUX
    QIOChannel *ioc = qemu_file_get_ioc(s->to_dst_file);
    struct tcp_info info = { };
    socklen_t len = sizeof(info);

    if (object_dynamic_cast(OBJECT(ioc), TYPE_QIO_CHANNEL_TLS)) {
        ioc = QIO_CHANNEL_TLS(ioc)->master;
    }
    if (object_dynamic_cast(OBJECT(ioc), TYPE_QIO_CHANNEL_SOCKET) &&
        !getsockopt(QIO_CHANNEL_SOCKET(ioc)->fd, IPPROTO_TCP, TCP_INFO, &info,
                    &len)) {
        return (PostcopyDeviceLink) {
            .round_trip = info.tcpi_rtt,
            .window = (uint64_t)info.tcpi_snd_cwnd * info.tcpi_snd_mss,
        };
    }
#endif
    return (PostcopyDeviceLink) { };
}

void postcopy_device_send_hold(MigrationState *s)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;

    if (migrate_postcopy_ram()) {
        if (!pd->round_trip) {
            pd->round_trip = postcopy_device_query_link(s).round_trip;
        }
        qemu_savevm_send_ping(s->to_dst_file, QEMU_VM_PING_POSTCOPY_HOLD);
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

static void postcopy_device_cancel_waiting(MigrationState *s, Error **errp)
{
    Error *err = NULL;

    if (!qatomic_read(&s->postcopy_device.held)) {
        error_setg(errp, "Cannot cancel: this destination cannot be held back "
                   "and may run the guest already. Make sure that it does not "
                   "by stopping it; the guest will then go on here. If it is "
                   "gone but the connection has not noticed, use 'yank'");
        return;
    }

    if (s->postcopy_device.in_doubt) {
        error_setg(errp, "Cannot cancel yet: the migration is about to pause, "
                   "because the disks are in use elsewhere. Try again when it "
                   "is in postcopy-paused");
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
    WITH_QEMU_LOCK_GUARD(&s->qemu_file_lock) {
        if (s->to_dst_file) {
            qemu_file_shutdown(s->to_dst_file);
        }
        /* The migration thread may wait for who writes to this one */
        if (s->postcopy_qemufile_src) {
            qemu_file_shutdown(s->postcopy_qemufile_src);
        }
    }
    postcopy_device_wake(s);
}

static void postcopy_device_cancel_paused(MigrationState *s, Error **errp)
{
    if (!migration_block_activate(errp)) {
        /* Some may be active now, but the destination may need them */
        migration_block_inactivate();
        error_prepend(errp, "Cannot cancel yet, the disks are in use elsewhere "
                      "(stop the destination if it is alive): ");
        return;
    }

    if (!postcopy_device_set_owner(s, POSTCOPY_DEVICE_OWNER_CANCELLED)) {
        /* Can't be: only a recovery changes that, and it changes the state */
        error_setg(errp, "Cannot cancel: the destination has the guest");
        return;
    }

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
    error_setg(errp, "Postcopy migration in progress, cannot cancel: the "
               "destination has the guest. Use 'migrate-recover' there and "
               "'migrate' with 'resume' here if the link is broken");
}

void postcopy_device_rp_error(MigrationState *s, Error **errp)
{
    if (!postcopy_device_in_progress() ||
        qatomic_read(&s->postcopy_device.loaded)) {
        return;
    }

    if (!*errp) {
        error_setg(errp, "it closed the return path");
    }
    error_prepend(errp, "Destination failed before it had loaded the device "
                  "state: ");
}

void postcopy_device_rp_closed(MigrationState *s)
{
    qatomic_set(&s->postcopy_device.rp_closed, true);

    if (postcopy_device_in_progress() &&
        !qatomic_read(&s->postcopy_device.loaded)) {
        QEMU_LOCK_GUARD(&s->qemu_file_lock);
        if (s->to_dst_file) {
            qemu_file_shutdown(s->to_dst_file);
        }
    }

    postcopy_device_wake(s);
}

/* Has anything happened that the PONG will not come after? */
static bool postcopy_device_lost(MigrationState *s, Error **errp)
{
    if (qatomic_read(&s->state) != MIGRATION_STATUS_POSTCOPY_DEVICE ||
        qatomic_read(&s->postcopy_device.owner) !=
        POSTCOPY_DEVICE_OWNER_SOURCE) {
        error_setg(errp, "Migration was cancelled before the destination had "
                   "loaded the device state");
        return true;
    }

    /* The return path thread knows best, it has stored its error before */
    if (qatomic_read(&s->postcopy_device.rp_closed)) {
        QEMU_LOCK_GUARD(&s->error_mutex);
        if (s->error) {
            error_propagate(errp, error_copy(s->error));
        } else {
            error_setg(errp, "Destination closed the return path before it "
                       "had loaded the device state");
        }
        return true;
    }

    if (qemu_file_get_error_obj_any(s->to_dst_file, s->postcopy_qemufile_src,
                                    errp)) {
        if (!*errp) {
            error_setg(errp, "channel error");
        }
        error_prepend(errp, "Lost the destination before it had loaded the "
                      "device state: ");
        return true;
    }

    return false;
}

/* Nothing that this side waits for can block any longer when it returns. */
static void postcopy_device_close_channels(MigrationState *s)
{
    if (s->postcopy_qemufile_src) {
        qemu_file_shutdown(s->postcopy_qemufile_src);
    }
    WITH_QEMU_LOCK_GUARD(&s->qemu_file_lock) {
        qemu_file_shutdown(s->to_dst_file);
    }
    close_return_path_on_source(s);
}

bool postcopy_device_may_send(MigrationState *s)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;

    return !postcopy_device_in_progress() ||
           (qemu_file_transferred(s->to_dst_file) < pd->pace_end &&
            stat64_get(&mig_stats.zero_pages) < pd->pace_zero_end &&
            !qatomic_read(&pd->loaded));
}

static bool postcopy_device_may_pace(void)
{
    return migrate_postcopy_ram() && !migrate_max_postcopy_bandwidth() &&
           qemu_ram_pagesize_largest() <= POSTCOPY_DEVICE_PACE_PAGE;
}

/*
 * How much of what the link holds goes into each of the first lots: whatever
 * has to wait for them is sent a round trip later, when they are out of its
 * way.  TCP's window has room for the queue in the network, too, which shows as
 * a longer round trip.
 */
static uint64_t postcopy_device_pace_first(MigrationState *s)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;
    PostcopyDeviceLink link = postcopy_device_query_link(s);
    uint64_t size;

    /* When the migration began, TCP had seen a single one, maybe a slow one. */
    pd->round_trip = MIN(pd->round_trip, link.round_trip);
    size = link.window * pd->round_trip / MAX(link.round_trip, 1) /
           POSTCOPY_DEVICE_PACE_HOLDS;

    return MIN(MAX(size, POSTCOPY_DEVICE_PACE_MIN), POSTCOPY_DEVICE_PACE_FIRST);
}

/*
 * Adapts the size of a lot: all that is under way should arrive within
 * @may_take (us).
 */
static void postcopy_device_pace(PostcopyDeviceSource *pd, int64_t waited,
                                 int64_t may_take)
{
    while (pd->pace_seen != pd->pace_sent &&
           pd->pace_seen != qatomic_read(&pd->pace_arrived)) {
        PostcopyDeviceLot *lot = &pd->pace_lots[pd->pace_seen++ %
                                                POSTCOPY_DEVICE_PACE_LOTS];
        int64_t took = MAX(1, waited - lot->time);
        uint64_t size = lot->under_way * may_take / took /
                        POSTCOPY_DEVICE_PACE_LOTS;
        uint64_t step;

        trace_postcopy_device_pace(lot->under_way, took, may_take);
        pd->pace_arrived_end = lot->end;
        if (pd->pace_seen <= POSTCOPY_DEVICE_PACE_LOTS) {
            /* It has also waited for the package. */
            continue;
        }
        if (took <= may_take) {
            size = MAX(size, pd->pace_size);
        }
        step = pd->pace_size / POSTCOPY_DEVICE_PACE_LOTS;
        size = MIN(MAX(size, pd->pace_size - step), pd->pace_size + step);
        pd->pace_size = MAX(size, POSTCOPY_DEVICE_PACE_MIN);
    }
}

/*
 * Sends the slice of a lot that is due.  The slices of all lots are spread
 * evenly: a page that was requested, or START, has to wait for one of them at
 * most, and there is no burst that the network has no room for.
 */
static void postcopy_device_send_slice(MigrationState *s, int64_t waited,
                                       int64_t may_take)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;
    int64_t lot_us = pd->round_trip / POSTCOPY_DEVICE_PACE_HOLDS;

    if (!pd->pace_slice) {
        pd->pace_slices = MIN(MAX(lot_us / POSTCOPY_DEVICE_PACE_SLICE_US, 1),
                              pd->pace_size / POSTCOPY_DEVICE_PACE_MIN);
    }
    if (lot_us >= POSTCOPY_DEVICE_PACE_SLICE_US) {
        int64_t slice_us = lot_us / pd->pace_slices;

        /* Make up for one that was late */
        pd->pace_due = MAX(pd->pace_due + slice_us, waited);
    }

    pd->pace_end = qemu_file_transferred(s->to_dst_file) +
                   pd->pace_size / pd->pace_slices;
    pd->pace_zero_end = stat64_get(&mig_stats.zero_pages) + 1 +
                        may_take / POSTCOPY_DEVICE_PACE_ZERO_US /
                        POSTCOPY_DEVICE_PACE_LOTS / pd->pace_slices;
    qemu_savevm_state_iterate(s->to_dst_file, true);
    pd->pace_end = 0;

    if (++pd->pace_slice == pd->pace_slices) {
        PostcopyDeviceLot *lot = &pd->pace_lots[pd->pace_sent++ %
                                                POSTCOPY_DEVICE_PACE_LOTS];

        lot->time = waited;
        lot->end = qemu_file_transferred(s->to_dst_file);
        lot->under_way = lot->end - pd->pace_arrived_end;
        qemu_savevm_send_ping(s->to_dst_file, QEMU_VM_PING_POSTCOPY_PACE);
        pd->pace_slice = 0;
    }
}

/*
 * Sends some background pages unless there are enough under way.  Returns in
 * how many ms it wants to be called again, or -1 if there will be nothing to
 * send before a PONG comes.
 */
static int postcopy_device_send_background(MigrationState *s)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;
    int64_t waited = qemu_clock_get_us(QEMU_CLOCK_REALTIME) -
                     pd->start_time * 1000;
    /* What comes behind them is delayed by what this is above a round trip. */
    int64_t may_take = pd->round_trip +
                       MIN(waited / POSTCOPY_DEVICE_PACE_PART,
                           POSTCOPY_DEVICE_PACE_US);

    if (!postcopy_device_may_pace()) {
        return -1;
    }

    if (pd->pace_size) {
        postcopy_device_pace(pd, waited, may_take);
    } else {
        pd->pace_size = postcopy_device_pace_first(s);
        pd->pace_arrived_end = qemu_file_transferred(s->to_dst_file);
    }
    if (pd->pace_sent - pd->pace_seen == POSTCOPY_DEVICE_PACE_LOTS ||
        !ram_postcopy_bytes_remaining()) {
        return -1;
    }
    if (waited < pd->pace_due) {
        return DIV_ROUND_UP(pd->pace_due - waited, 1000);
    }

    postcopy_device_send_slice(s, waited, may_take);
    return 0;
}

static bool postcopy_device_wait_loaded(MigrationState *s, Error **errp)
{
    PostcopyDeviceSource *pd = &s->postcopy_device;
    int delay_ms;

    while (true) {
        if (qatomic_read(&pd->loaded)) {
            return true;
        }
        if (postcopy_device_lost(s, errp)) {
            return false;
        }
        if (ram_postcopy_has_request()) {
            qemu_savevm_state_iterate(s->to_dst_file, true);
            /* The next may well be wanted from below this one */
            ram_postcopy_rewind(pd->pace_size * POSTCOPY_DEVICE_PACE_LOTS);
            continue;
        }
        delay_ms = postcopy_device_send_background(s);
        if (!delay_ms) {
            continue;
        }

        if (delay_ms > 0) {
            qemu_sem_timedwait(&pd->wake, delay_ms);
        } else if (qatomic_read(&pd->held)) {
            qemu_sem_wait(&pd->wake);
        } else if (qemu_sem_timedwait(&pd->wake, POSTCOPY_DEVICE_NUDGE_MS)) {
            /*
             * A destination without this code that has failed to load may wait
             * for its listen thread, which waits for something to read.
             */
            postcopy_device_send_hold(s);
        }
    }
}

static void postcopy_device_send_start(MigrationState *s)
{
    if (migrate_postcopy_ram() && postcopy_device_available(s)) {
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
}

/* From here on the guest is the destination's, whatever happens. */
static bool postcopy_device_commit(MigrationState *s, MigrationStatus from,
                                   Error **errp)
{
    if (!postcopy_device_set_owner(s, POSTCOPY_DEVICE_OWNER_DESTINATION)) {
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

static void postcopy_device_let_go(MigrationState *s)
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
 * lets go of them when it finds the link broken; give it some time for that.
 */
static bool postcopy_device_reclaim_disks(MigrationState *s, Error **errp)
{
    int delay_ms;

    for (delay_ms = 1; delay_ms <= 512; delay_ms *= 2) {
        Error *err = NULL;

        bql_lock();
        bdrv_activate_all(&err);
        bql_unlock();

        if (!err) {
            return true;
        }
        error_free(err);
        if (!qatomic_read(&s->postcopy_device.held)) {
            break;
        }
        g_usleep(delay_ms * 1000);
    }

    bql_lock();
    migration_block_activate(errp);
    bql_unlock();

    return !*errp;
}

/* Returns true if the destination has got the guest after all */
static bool postcopy_device_wait_in_doubt(MigrationState *s, Error *disk_err)
{
    WITH_QEMU_LOCK_GUARD(&s->error_mutex) {
        error_prepend(&disk_err, "%s. Guest stays stopped, as its disks are in "
                      "use elsewhere: recover the migration if the destination "
                      "is alive, or use 'migrate_cancel' when it is not: ",
                      s->error ? error_get_pretty(s->error) : "");
        error_free(s->error);
        s->error = disk_err;
    }

    if (postcopy_pause(s) != MIG_THR_ERR_RECOVERED) {
        return false;
    }
    migration_downtime_end(s);
    return true;
}

/*
 * The channels are closed, the source owns the guest.  Returns true if the
 * destination has got it nevertheless, by a recovery.
 */
static bool postcopy_device_take_back(MigrationState *s)
{
    Error *disk_err = NULL;
    bool have_disks;

    if (s->state != MIGRATION_STATUS_POSTCOPY_DEVICE) {
        return false;
    }

    have_disks = postcopy_device_reclaim_disks(s, &disk_err);

    /* A user may have cancelled meanwhile, but not between this and in_doubt */
    bql_lock();
    if (qatomic_read(&s->postcopy_device.owner) ==
        POSTCOPY_DEVICE_OWNER_CANCELLED) {
        migrate_set_state(&s->state, MIGRATION_STATUS_POSTCOPY_DEVICE,
                          MIGRATION_STATUS_CANCELLING);
    } else if (!have_disks) {
        /* Some may be active now, but the destination may need them */
        migration_block_inactivate();
        s->postcopy_device.in_doubt = true;
    }
    bql_unlock();

    if (s->postcopy_device.in_doubt) {
        return postcopy_device_wait_in_doubt(s, disk_err);
    }
    /* If it was cancelled without the disks, 'cont' will try again */
    error_free(disk_err);
    return false;
}

/* Without the BQL if there is a return path: it may block for long */
static bool postcopy_device_send(MigrationState *s, QIOChannelBuffer *package,
                                 Error **errp)
{
    int ret;

    if (migrate_postcopy_ram()) {
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

    if (postcopy_device_available(s)) {
        migrate_set_state(&s->state, MIGRATION_STATUS_DEVICE,
                          MIGRATION_STATUS_POSTCOPY_DEVICE);
        bql_unlock();
        ok = postcopy_device_send(s, package, errp) &&
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
        postcopy_device_close_channels(s);
        ok = postcopy_device_take_back(s);
        if (ok) {
            error_free(*errp);
            *errp = NULL;
        }
    }
    if (ok) {
        postcopy_device_let_go(s);
    }

    bql_lock();
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

/* Bits of PostcopyDeviceIncoming.go */
#define POSTCOPY_DEVICE_GO_RUN      1u
#define POSTCOPY_DEVICE_GO_START    2u
#define POSTCOPY_DEVICE_GO          (POSTCOPY_DEVICE_GO_RUN | \
                                     POSTCOPY_DEVICE_GO_START)

/*
 * So many requests for pages find room in a socket even if the source does not
 * read.  In a unix socket it is 278 with what Linux has by default.
 */
#define POSTCOPY_DEVICE_REQUESTS    128

void postcopy_device_incoming_init(MigrationIncomingState *mis)
{
    /* A source that does not ask to hold the guest will not send START */
    mis->postcopy_device.go = POSTCOPY_DEVICE_GO_START;
    qemu_event_init(&mis->postcopy_device.decided, false);
}

void postcopy_device_incoming_listen(MigrationIncomingState *mis)
{
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;

    pd->started = false;
    pd->listen_ended = false;
    qemu_event_reset(&pd->decided);
    qatomic_set(&pd->outcome, POSTCOPY_DEVICE_LOADING);

    /* Without a return path the source cannot wait for this side, either */
    migrate_set_state(&mis->state, MIGRATION_STATUS_ACTIVE,
                      mis->to_src_file ? MIGRATION_STATUS_POSTCOPY_DEVICE :
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

static void postcopy_device_incoming_continue(PostcopyDeviceIncoming *pd)
{
    if (pd->waiting) {
        aio_co_wake(pd->waiting);
    }
}

static void postcopy_device_incoming_placed_bh(void *opaque)
{
    MigrationIncomingState *mis = opaque;

    postcopy_device_incoming_continue(&mis->postcopy_device);
}

void postcopy_device_incoming_placed(MigrationIncomingState *mis, void *host)
{
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;

    if (host == pd->awaited) {
        pd->awaited = NULL;
        migration_bh_schedule(postcopy_device_incoming_placed_bh, mis);
    }
}

/*
 * Find a page that the source will send.  With page_request_mutex held.
 *
 * Returns: where it is to be in this process; NULL if it is here, or if it does
 *          not come from the source at all
 */
static void *postcopy_device_incoming_find(AddressSpace *as, hwaddr addr,
                                           RAMBlock **rb, ram_addr_t *offset)
{
    hwaddr xlat, len = 1;
    MemoryRegion *mr;

    RCU_READ_LOCK_GUARD();

    mr = address_space_translate(as, addr, &xlat, &len, false,
                                 MEMTXATTRS_UNSPECIFIED);
    *rb = mr->ram_block;
    if (!*rb || migrate_ram_is_ignored(*rb)) {
        return NULL;
    }

    *offset = QEMU_ALIGN_DOWN(xlat, qemu_ram_pagesize(*rb));
    if (ramblock_recv_bitmap_test_byte_offset(*rb, *offset) ||
        ramblock_page_is_discarded(*rb, *offset)) {
        return NULL;
    }
    return memory_region_get_ram_ptr(mr) + *offset;
}

static int coroutine_fn
postcopy_device_incoming_get(MigrationIncomingState *mis, AddressSpace *as,
                             const hwaddr *addrs, size_t n)
{
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;
    RAMBlock *rb;
    ram_addr_t offset;
    void *host;
    size_t i;
    int ret;

    for (i = 0; i < n; i++) {
        WITH_QEMU_LOCK_GUARD(&mis->page_request_mutex) {
            host = postcopy_device_incoming_find(as, addrs[i], &rb, &offset);
        }
        if (host) {
            ret = migrate_send_rp_req_pages(mis, rb, offset, (uintptr_t)host);
            if (ret < 0) {
                return ret;
            }
        }
    }

    pd->waiting = qemu_coroutine_self();
    for (i = 0; i < n; i++) {
        /* When there is no listen thread any more, no page will come */
        while (!pd->listen_ended) {
            WITH_QEMU_LOCK_GUARD(&mis->page_request_mutex) {
                host = postcopy_device_incoming_find(as, addrs[i], &rb,
                                                     &offset);
                pd->awaited = host;
            }
            if (!host) {
                break;
            }
            trace_postcopy_device_incoming_await(host);
            qemu_coroutine_yield();
        }
    }
    pd->waiting = NULL;

    return pd->listen_ended ? -EIO : 0;
}

int coroutine_mixed_fn migration_incoming_get_pages(AddressSpace *as,
                                                    const hwaddr *addrs,
                                                    size_t n)
{
    MigrationIncomingState *mis = migration_incoming_get_current();
    PostcopyDeviceOutcome outcome = qatomic_read(&mis->postcopy_device.outcome);
    int ret = 0;

    if (!migrate_postcopy_ram() || !qemu_in_coroutine() ||
        outcome == POSTCOPY_DEVICE_NONE || outcome == POSTCOPY_DEVICE_LOADED) {
        return 0;
    }

    while (n && !ret) {
        size_t some = MIN(n, POSTCOPY_DEVICE_REQUESTS);

        ret = postcopy_device_incoming_get(mis, as, addrs, some);
        addrs += some;
        n -= some;
    }
    return ret;
}

static void postcopy_device_activate_disks_bh(void *opaque)
{
    MigrationIncomingState *mis = opaque;
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;
    Error *err = NULL;

    /*
     * If the listen thread has given up, it may have ended, too: nobody would
     * let go of the disks again.
     */
    pd->disks_activated = !postcopy_device_incoming_failed(mis) &&
                          migration_block_activate(&err);
    if (err) {
        error_prepend(&err, "load of migration failed: cannot activate the "
                      "disks: ");
        migrate_set_error(migrate_get_current(), err);
        error_free(err);
    }
    aio_co_wake(pd->preparing);
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
        qemu_coroutine_yield();
        if (!pd->disks_activated) {
            return false;
        }
    }

    return postcopy_device_incoming_decide(mis, POSTCOPY_DEVICE_LOADED) !=
           POSTCOPY_DEVICE_FAILED;
}

/* RUN and START may come in either order */
static void postcopy_device_incoming_go(MigrationIncomingState *mis,
                                        unsigned what)
{
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;
    unsigned old = qatomic_fetch_or(&pd->go, what);

    trace_postcopy_device_incoming_go(old, what);

    if (old != POSTCOPY_DEVICE_GO && (old | what) == POSTCOPY_DEVICE_GO) {
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
            qatomic_and(&mis->postcopy_device.go, ~POSTCOPY_DEVICE_GO_START);
        }
        if (!(qatomic_read(&mis->postcopy_device.go) &
              POSTCOPY_DEVICE_GO_START)) {
            *value = QEMU_VM_PONG_POSTCOPY_HELD;
        }
        break;
    case QEMU_VM_PING_PACKAGED_LOADED:
        return !qemu_in_coroutine() || postcopy_device_incoming_prepare(mis);
    case QEMU_VM_PING_POSTCOPY_START:
        postcopy_device_incoming_go(mis, POSTCOPY_DEVICE_GO_START);
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
    postcopy_device_incoming_go(mis, POSTCOPY_DEVICE_GO_RUN);
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
    if (qatomic_read(&mis->postcopy_device.go) != POSTCOPY_DEVICE_GO) {
        trace_postcopy_device_incoming_in_doubt();
        migration_bh_schedule(postcopy_device_release_disks_bh,
                              &mis->postcopy_device);
    }
}

MigrationStatus
postcopy_device_incoming_resume_state(MigrationIncomingState *mis)
{
    return qatomic_read(&mis->postcopy_device.go) == POSTCOPY_DEVICE_GO ?
           MIGRATION_STATUS_POSTCOPY_ACTIVE : MIGRATION_STATUS_POSTCOPY_DEVICE;
}

void postcopy_device_incoming_started(MigrationIncomingState *mis)
{
    mis->postcopy_device.started = true;
    migrate_set_state(&mis->state, MIGRATION_STATUS_POSTCOPY_DEVICE,
                      MIGRATION_STATUS_POSTCOPY_ACTIVE);
    qemu_event_set(&mis->postcopy_device.decided);
}

bool postcopy_device_incoming_recoverable(MigrationIncomingState *mis)
{
    return postcopy_device_incoming_decide(mis, POSTCOPY_DEVICE_FAILED) ==
           POSTCOPY_DEVICE_LOADED && !qemu_in_coroutine();
}

bool postcopy_device_incoming_failed(MigrationIncomingState *mis)
{
    return qatomic_read(&mis->postcopy_device.outcome) ==
           POSTCOPY_DEVICE_FAILED;
}

bool postcopy_device_incoming_wait_started(MigrationIncomingState *mis)
{
    qemu_event_wait(&mis->postcopy_device.decided);
    return !postcopy_device_incoming_failed(mis);
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
    if (postcopy_device_incoming_decide(mis, POSTCOPY_DEVICE_FAILED) ==
        POSTCOPY_DEVICE_FAILED) {
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

static void postcopy_device_incoming_listen_end_bh(void *opaque)
{
    MigrationIncomingState *mis = opaque;
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;

    qemu_thread_join(&mis->listen_thread);
    if (postcopy_device_incoming_failed(mis)) {
        /* In case that they were activated already */
        postcopy_device_release_disks_bh(pd);
    }
    pd->listen_ended = true;
    postcopy_device_incoming_continue(pd);
}

void postcopy_device_incoming_listen_end(MigrationIncomingState *mis)
{
    migration_bh_schedule(postcopy_device_incoming_listen_end_bh, mis);
}

void coroutine_fn
postcopy_device_incoming_abort(MigrationIncomingState *mis)
{
    PostcopyDeviceIncoming *pd = &mis->postcopy_device;

    if (mis->have_listen_thread) {
        trace_postcopy_device_incoming_abort();
        qatomic_set(&pd->outcome, POSTCOPY_DEVICE_FAILED);
        qemu_event_set(&pd->decided);
        postcopy_device_incoming_shutdown(mis);

        pd->waiting = qemu_coroutine_self();
        while (!pd->listen_ended) {
            qemu_coroutine_yield();
        }
        pd->waiting = NULL;
        mis->have_listen_thread = false;
    }

    migrate_set_state(&mis->state, MIGRATION_STATUS_POSTCOPY_DEVICE,
                      MIGRATION_STATUS_FAILED);
    migrate_set_state(&mis->state, MIGRATION_STATUS_POSTCOPY_ACTIVE,
                      MIGRATION_STATUS_FAILED);
}
