/*
 * QTest testcases for the switchover to postcopy: the time in which the
 * destination loads the device state, and the source can take the guest back
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/un.h>
#include "qemu/units.h"
#include "libqtest.h"
#include "libqos/pci-pc.h"
#include "hw/pci/pci.h"
#include "standard-headers/linux/virtio_pci.h"
#include "migration/bootfile.h"
#include "migration/fault-proxy.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"

/* The ping that ends the device state, see migration/postcopy-device.h */
#define PING_LOADED     0x42
/* The destination can be told when to start the guest, see there */
#define PING_HOLD       0x484f4c44
#define PONG_HELD       0x48454c44
#define PING_START      0x53545254
/* Behind background pages, see there */
#define PING_PACE       0x50414345
/* No one knows this value */
#define PING_UNKNOWN    0x3f3f3f3f

/* A section that every machine has in its device state */
#define SPOILED_SECTION "timer"

/*
 * The guest dirties its memory over and over: in so much of it there are pages
 * that have to be sent again.
 */
#define STUCK_SIZE      (8 * MiB)

/* Descriptors, available ring and used ring of a queue have a page each. */
#define RING_PAGES      3
#define RINGS_START     X86_TEST_MEM_END

#define XHCI_OPTS "-device qemu-xhci -device usb-kbd"
#define VMGENID_OPTS "-device vmgenid"
#define VIRTIO_OPTS \
    "-blockdev null-co,node-name=node0,size=1073741824,read-zeroes=on " \
    "-device virtio-blk-pci,drive=node0"

/*
 * A step that takes longer than this hangs.  No step needs more than a few
 * seconds on an idle host.
 */
#define STEP_SECONDS    60

typedef struct Side {
    const char *name;
    QTestState *qts;
    /* From MIGRATION events, in order, the oldest first */
    GQueue statuses;
    /* Set by the event, cleared by whoever has seen it */
    bool stopped;
    bool resumed;
    bool woken;
} Side;

typedef struct DeviceTest {
    Side src;
    Side dst;
    FaultProxy *proxy;
    /* So many queues of the virtio-blk device are in use */
    unsigned queues_started;

    /*** What to test, set before device_test_start() ***/

    /* Use postcopy-preempt */
    bool preempt;
    /* The guest is paused before it is migrated */
    bool paused;
    /* The guest suspends itself before it is migrated (x86 only) */
    bool suspended;
    /*
     * All of the RAM has been sent before the switchover.  Needs @paused; a
     * dirty bitmap keeps the migration from being completed in precopy.
     */
    bool no_ram_left;
    /* Postcopy of a dirty bitmap only; there is no return path */
    bool bitmap_only;
    /* The source may drop what it has sent, when it needs it no more */
    bool release_ram;
    /* exit-on-error=false for the destination */
    bool no_exit;
    /*
     * A virtio-blk device that the firmware has left running: to load it, the
     * destination reads guest memory that has not been sent (x86 only)
     */
    bool virtio;
    /* So many queues, and all of them are in use; 0: one */
    unsigned queues;
    /* The same with a USB keyboard at an xHCI controller (x86 only) */
    bool xhci;
    /* The same with a VM generation ID (x86 only) */
    bool vmgenid;
    /* The main loop of the destination is stuck in a page fault as well */
    bool stuck;
    /* The virtio-blk device has another number of queues on the destination */
    bool virtio_mismatch;
    /* The destination does not know that it is to wait for START */
    bool no_hold;
    /* -S for the destination: the guest waits for 'cont' */
    bool wait_for_cont;
    /* The destination activates its disks as late as possible */
    bool late_activate;
    /* Both sides take out-of-band commands, as migrate-recover needs */
    bool oob;
    /* The link is encrypted, so the proxy cannot read it: no trap works */
    bool tls;
    void *tls_data;
    /*
     * What the source has to do in this order, checked when it has ended: its
     * statuses, "notify" and the type of a notification, "running" when the
     * guest starts.  NULL at the end.
     */
    const char *const *log;
} DeviceTest;

/*** No test may hang: each step has its name and its time ***/

static char current_step[128];

static void step_timeout(int signo)
{
    static const char msg[] = "postcopy-device test hangs: ";

    if (write(STDERR_FILENO, msg, strlen(msg)) < 0 ||
        write(STDERR_FILENO, current_step, strlen(current_step)) < 0 ||
        write(STDERR_FILENO, "\n", 1) < 0) {
        /* Then it is left to the abort to tell */
    }
    abort();
}

static G_GNUC_PRINTF(1, 2) void step(const char *fmt, ...)
{
    va_list ap;

    alarm(0);
    va_start(ap, fmt);
    g_vsnprintf(current_step, sizeof(current_step), fmt, ap);
    va_end(ap);
    alarm(STEP_SECONDS);
}

/*** Events ***/

static bool side_event(QTestState *qts, const char *name, QDict *event,
                       void *opaque)
{
    Side *side = opaque;

    if (g_str_equal(name, "MIGRATION")) {
        QDict *data = qdict_get_qdict(event, "data");

        g_queue_push_tail(&side->statuses,
                          g_strdup(qdict_get_str(data, "status")));
    } else if (g_str_equal(name, "STOP")) {
        side->stopped = true;
    } else if (g_str_equal(name, "RESUME")) {
        side->resumed = true;
    } else if (g_str_equal(name, "WAKEUP")) {
        side->woken = true;
    }
    return true;
}

static void side_init(Side *side, const char *name, QTestState *qts)
{
    *side = (Side) { .name = name, .qts = qts };
    g_queue_init(&side->statuses);
    qtest_qmp_set_event_callback(qts, side_event, side);
}

static void side_wait_event(Side *side)
{
    QDict *event = qtest_qmp_receive_dict(side->qts);

    g_assert(qdict_haskey(event, "event"));
    side_event(side->qts, qdict_get_str(event, "event"), event, side);
    qobject_unref(event);
}

/* The next statuses must be these, in this order, with none in between. */
static G_GNUC_NULL_TERMINATED void expect_statuses(Side *side, ...)
{
    const char *status;
    va_list ap;

    va_start(ap, side);
    while ((status = va_arg(ap, const char *))) {
        g_autofree char *seen = NULL;

        step("waiting for status '%s' of the %s", status, side->name);
        while (g_queue_is_empty(&side->statuses)) {
            side_wait_event(side);
        }
        seen = g_queue_pop_head(&side->statuses);
        if (!g_str_equal(seen, status)) {
            g_error("the %s went to '%s' instead of '%s'", side->name, seen,
                    status);
        }
    }
    va_end(ap);
}

static void expect_resume(Side *side)
{
    step("waiting for the guest to run on the %s", side->name);
    while (!side->resumed) {
        side_wait_event(side);
    }
    side->resumed = false;
}

/*** Queries ***/

static void check_runstate(Side *side, bool running, const char *status)
{
    QDict *rsp;

    step("query-status on the %s", side->name);
    rsp = qtest_qmp_assert_success_ref(side->qts,
                                       "{ 'execute': 'query-status' }");
    g_assert_cmpint(qdict_get_bool(rsp, "running"), ==, running);
    if (status) {
        g_assert_cmpstr(qdict_get_str(rsp, "status"), ==, status);
    }
    qobject_unref(rsp);
}

static void check_migration_status(Side *side, const char *status)
{
    g_autofree char *seen = NULL;

    step("query-migrate on the %s", side->name);
    seen = migrate_query_status(side->qts);
    g_assert_cmpstr(seen, ==, status);
}

/* Are the disks active, and thus locked? */
static bool disks_active(Side *side)
{
    QDict *rsp, *node;
    bool active;

    rsp = qtest_qmp(side->qts, "{ 'execute': 'query-named-block-nodes' }");
    node = qobject_to(QDict, qlist_peek(qdict_get_qlist(rsp, "return")));
    active = qdict_get_bool(node, "active");
    qobject_unref(rsp);
    return active;
}

/* There must be an error, and it must contain @word if that is not NULL. */
static void check_error_desc(Side *side, const char *word)
{
    const char *desc;
    QDict *rsp;

    step("query-migrate on the %s", side->name);
    rsp = migrate_query(side->qts);
    desc = qdict_get_try_str(rsp, "error-desc");
    g_assert(desc && *desc);
    g_test_message("%s: %s", side->name, desc);
    if (word && !strstr(desc, word)) {
        g_error("error-desc of the %s does not mention '%s': %s", side->name,
                word, desc);
    }
    qobject_unref(rsp);
}

static bool shows_downtime(Side *side)
{
    bool ret;
    QDict *rsp;

    step("query-migrate on the %s", side->name);
    rsp = migrate_query(side->qts);
    ret = qdict_haskey(rsp, "downtime");
    qobject_unref(rsp);
    return ret;
}

static void check_qmp_answers(Side *side)
{
    static const char *const commands[] = { "query-status", "query-migrate" };

    for (int i = 0; i < ARRAY_SIZE(commands); i++) {
        gint64 start = g_get_monotonic_time();
        int ms;

        step("%s on the %s", commands[i], side->name);
        qtest_qmp_assert_success(side->qts, "{ 'execute': %s }", commands[i]);
        ms = (g_get_monotonic_time() - start) / 1000;
        g_test_message("the %s answered %s after %d ms", side->name,
                       commands[i], ms);
        g_assert_cmpint(ms, <, 1000);
    }
}

static int count_migration_threads(Side *side)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/task",
                                            (int)qtest_pid(side->qts));
    GDir *dir = g_dir_open(path, 0, NULL);
    const char *tid;
    int n = 0;

    g_assert(dir);
    while ((tid = g_dir_read_name(dir))) {
        g_autofree char *comm = g_strdup_printf("%s/%s/comm", path, tid);
        g_autofree char *name = NULL;

        /* It may have ended just now */
        if (g_file_get_contents(comm, &name, NULL, NULL) &&
            g_str_has_prefix(name, "mig/")) {
            n++;
        }
    }
    g_dir_close(dir);
    return n;
}

/* There is no event for it: the status changes before the last of them ends. */
static void wait_no_migration_threads(Side *side)
{
    step("waiting for the %s to end its migration threads", side->name);
    while (count_migration_threads(side)) {
        g_usleep(1000);
    }
}

/*** The log of the source ***/

/* Values of MigrationEventType, see include/migration/misc.h */
#define NOTIFY_SETUP    "notify 0"
#define NOTIFY_DONE     "notify 1"
#define NOTIFY_FAILED   "notify 2"

static char *log_path(void)
{
    return g_strdup_printf("%s/src_log", migration_get_env()->tmpfs);
}

static char *log_opts(void)
{
    g_autofree char *path = log_path();

    return g_strdup_printf("-D %s -trace migrate_set_state "
                           "-trace migration_call_notifiers "
                           "-trace runstate_set", path);
}

static char *log_parse_line(const char *line)
{
    char word[32];
    const char *what;

    what = strstr(line, "migrate_set_state ");
    if (what && sscanf(what, "%*s new state %31s", word) == 1) {
        return g_strdup(word);
    }
    what = strstr(line, "migration_call_notifiers ");
    if (what && sscanf(what, "%*s type %31s", word) == 1) {
        return g_strdup_printf("notify %s", word);
    }
    if (strstr(line, "runstate_set ") && g_str_has_suffix(line, "(running)")) {
        return g_strdup("running");
    }
    return NULL;
}

static void check_log(const char *const *log)
{
    g_autofree char *path = log_path();
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;

    step("reading the log of the source");
    g_assert(g_file_get_contents(path, &text, NULL, NULL));
    lines = g_strsplit(text, "\n", -1);
    for (int i = 0; lines[i]; i++) {
        g_autofree char *seen = log_parse_line(lines[i]);

        if (!seen) {
            continue;
        }
        g_test_message("the source: %s", seen);
        g_assert_cmpstr(seen, ==, *log);
        log++;
    }
    g_assert_cmpstr(*log, ==, NULL);
    unlink(path);
}

/*** The parts of a test ***/

static void start_queues_of(QPCIDevice *dev, int devfn, void *opaque)
{
    DeviceTest *t = opaque;
    QTestState *src = t->src.qts;
    uint32_t page = RINGS_START >> VIRTIO_PCI_QUEUE_ADDR_SHIFT;
    uint32_t regs = qpci_config_readl(dev, PCI_BASE_ADDRESS_0) &
                    PCI_BASE_ADDRESS_IO_MASK;

    for (t->queues_started = 1; t->queues_started < t->queues;
         t->queues_started++) {
        qtest_outw(src, regs + VIRTIO_PCI_QUEUE_SEL, t->queues_started);
        qtest_outl(src, regs + VIRTIO_PCI_QUEUE_PFN, page);
        g_assert_cmphex(qtest_inl(src, regs + VIRTIO_PCI_QUEUE_PFN), ==, page);
        page += RING_PAGES;
    }
    g_free(dev);
}

/*
 * The firmware uses the first queue of the virtio-blk device.  Use the others
 * as well, with their rings where the guest does not check its memory.
 */
static void start_queues(DeviceTest *t)
{
    QPCIBus *bus = qpci_new_pc(t->src.qts, NULL);

    qpci_device_foreach(bus, PCI_VENDOR_ID_REDHAT_QUMRANET,
                        PCI_DEVICE_ID_VIRTIO_BLOCK, start_queues_of, t);
    g_assert_cmpint(t->queues_started, ==, t->queues);
    qpci_free_pc(bus);
}

/* All of the rings have to be sent again. */
static void dirty_queues(DeviceTest *t)
{
    qtest_memset(t->src.qts, RINGS_START, 0,
                 t->queues * RING_PAGES * VIRTIO_PCI_VRING_ALIGN);
}

static bool has_bitmap(DeviceTest *t)
{
    return t->no_ram_left || t->bitmap_only;
}

static void set_capabilities(DeviceTest *t, QTestState *qts)
{
    migrate_set_capability(qts, "postcopy-ram", !t->bitmap_only);
    migrate_set_capability(qts, "postcopy-preempt", t->preempt);
    migrate_set_capability(qts, "dirty-bitmaps", has_bitmap(t));
    migrate_set_capability(qts, "late-block-activate", t->late_activate);
}

/*
 * Have the migration go on in precopy until it is told otherwise: what is left
 * to be sent must not get below avail-switchover-bandwidth * downtime-limit,
 * and a bitmap counts as many bytes as it has bits.
 */
static void set_parameters(DeviceTest *t, QTestState *qts)
{
    int64_t bandwidth, granularity;

    if (!has_bitmap(t)) {
        migrate_ensure_non_converge(qts);
        /* If the RAM is sent, then not before the test is over */
        migrate_set_parameter_int(qts, "max-postcopy-bandwidth", 4096);
        return;
    }

    if (t->no_ram_left) {
        /* Less than a page; the bitmap has 16 million bits */
        bandwidth = 10 * 1000;
        granularity = 64 * 1024;
    } else {
        /* 150 MB are more than the guest dirties, and less than 256 Mbits */
        bandwidth = 1500 * 1000 * 1000;
        granularity = 4 * 1024;
    }
    migrate_set_parameter_int(qts, "max-bandwidth", 0);
    migrate_set_parameter_int(qts, "avail-switchover-bandwidth", bandwidth);
    migrate_set_parameter_int(qts, "downtime-limit", 100);
    qtest_qmp_assert_success(qts,
                             "{ 'execute': 'block-dirty-bitmap-add',"
                             "  'arguments': { 'node': 'node0',"
                             "                 'name': 'bitmap0',"
                             "                 'granularity': %" PRId64 " } }",
                             granularity);
}

/* The bitmap must be there, and usable. */
static void check_bitmap(Side *side)
{
    const QListEntry *entry;
    QDict *rsp, *bitmap;
    QList *bitmaps = NULL;

    step("query-named-block-nodes on the %s", side->name);
    rsp = qtest_qmp(side->qts, "{ 'execute': 'query-named-block-nodes' }");
    QLIST_FOREACH_ENTRY(qdict_get_qlist(rsp, "return"), entry) {
        QDict *node = qobject_to(QDict, qlist_entry_obj(entry));

        if (g_str_equal(qdict_get_str(node, "node-name"), "node0")) {
            bitmaps = qdict_get_qlist(node, "dirty-bitmaps");
        }
    }
    g_assert(bitmaps);
    bitmap = qobject_to(QDict, qlist_peek(bitmaps));
    g_assert_cmpstr(qdict_get_str(bitmap, "name"), ==, "bitmap0");
    g_assert_false(qdict_get_bool(bitmap, "busy"));
    g_assert_false(qdict_get_try_bool(bitmap, "inconsistent", false));
    qobject_unref(rsp);
}

/* Start a migration to @dst, and come back when postcopy may be started. */
static void device_test_migrate(DeviceTest *t, QTestState *dst)
{
    QTestState *src = t->src.qts;
    g_autofree char *uri = g_strdup_printf("unix:%s/migsocket",
                                           migration_get_env()->tmpfs);

    step("starting the migration");
    set_capabilities(t, src);
    set_capabilities(t, dst);
    migrate_set_capability(src, "release-ram", t->release_ram);
    migrate_incoming_qmp(dst, uri, NULL, "{ 'exit-on-error': %i }",
                         !t->no_exit);
    side_init(&t->dst, "destination", dst);

    migrate_prepare_for_dirty_mem(src);
    if (t->no_hold) {
        fault_proxy_change_ping(t->proxy, PING_HOLD, PING_UNKNOWN);
    }
    fault_proxy_trap(t->proxy, FAULT_PROXY_BEHIND_PONG,
                     t->no_hold ? PING_UNKNOWN : PONG_HELD,
                     FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    migrate_qmp(src, dst, fault_proxy_uri(t->proxy), NULL, "{}");
    expect_statuses(&t->src, "setup", "active", NULL);
    expect_statuses(&t->dst, "active", NULL);
    if (!t->bitmap_only && !t->tls) {
        step("waiting for the destination to answer the request to hold");
        fault_proxy_wait(t->proxy);
    }

    if (t->no_ram_left) {
        step("waiting for all of the RAM to be sent");
        while (get_migration_pass(src) < 1 ||
               read_ram_property_int(src, "remaining")) {
            g_usleep(1000);
        }
    } else if (!t->paused) {
        step("waiting for some RAM to be sent and dirty again");
        migrate_wait_for_dirty_mem(src, dst);
    }
}

static bool device_test_start(DeviceTest *t, bool hide_stderr)
{
    const char *opts = has_bitmap(t) ?
            "-blockdev null-co,node-name=node0,size=1099511627776" :
        t->virtio ? VIRTIO_OPTS :
        t->xhci ? XHCI_OPTS :
        t->vmgenid ? VMGENID_OPTS : "";
    g_autofree char *log = t->log ? log_opts() : NULL;
    g_autofree char *queues = t->queues ?
            g_strdup_printf(",num-queues=%u", t->queues) : g_strdup("");
    g_autofree char *src_opts = g_strconcat(opts, queues, " ", log, NULL);
    g_autofree char *dst_opts = g_strconcat(opts, queues, t->virtio_mismatch ?
                                            ",num-queues=2" : "",
                                            t->wait_for_cont ? " -S" : "",
                                            NULL);
    MigrateStart args = {
        .hide_stderr = hide_stderr,
        .suspend_me = t->suspended,
        .oob = t->oob,
        .opts_source = src_opts,
        .opts_target = dst_opts,
    };
    struct sigaction timeout = { .sa_handler = step_timeout };
    g_autofree char *dst_path = NULL;
    QTestState *src, *dst;

    sigaction(SIGALRM, &timeout, NULL);
    step("starting QEMU");
    if (migrate_start(&src, &dst, "defer", &args)) {
        alarm(0);
        return false;
    }

    dst_path = g_strdup_printf("%s/migsocket", migration_get_env()->tmpfs);
    t->proxy = fault_proxy_new(migration_get_env()->tmpfs, dst_path);

    set_parameters(t, src);
#ifdef CONFIG_GNUTLS
    if (t->tls) {
        t->tls_data = migrate_hook_start_tls_psk_match(src, dst);
        fault_proxy_set_opaque(t->proxy);
    }
#endif
    step("waiting for the guest to boot");
    wait_for_serial("src_serial");
    wait_for_suspend(src, get_src());
    side_init(&t->src, "source", src);
    if (t->queues) {
        start_queues(t);
    }
    if (t->paused) {
        qtest_qmp_assert_success(src, "{ 'execute': 'stop' }");
    }

    device_test_migrate(t, dst);
    return true;
}

static void device_test_start_postcopy(DeviceTest *t)
{
    step("starting postcopy");
    qtest_qmp_assert_success(t->src.qts,
                             "{ 'execute': 'migrate-start-postcopy' }");
    expect_statuses(&t->src, "device", NULL);
}

static void cont(Side *side)
{
    step("cont on the %s", side->name);
    qtest_qmp_assert_success(side->qts, "{ 'execute': 'cont' }");
}

/* A guest that wakes up boots again.  There is no event for that. */
static void wake_up(Side *side)
{
    g_autofree char *path = g_strdup_printf("%s/src_serial",
                                            migration_get_env()->tmpfs);
    g_autofree char *serial = NULL;

    step("waking up the guest on the %s", side->name);
    qtest_qmp_assert_success(side->qts, "{ 'execute': 'system_wakeup' }");
    while (!side->woken) {
        side_wait_event(side);
    }
    do {
        g_usleep(1000);
        g_free(serial);
        g_assert(g_file_get_contents(path, &serial, NULL, NULL));
    } while (!strstr(serial, "ABAB"));
}

/* The source must have stopped migrating, and have the guest as it was. */
static void expect_guest_back(DeviceTest *t)
{
    Side *src = &t->src;

    wait_no_migration_threads(src);
    if (t->paused) {
        check_runstate(src, false, "paused");
        g_assert_false(src->resumed);
        cont(src);
    }
    expect_resume(src);
    if (t->suspended) {
        check_runstate(src, false, "suspended");
        wake_up(src);
    }
    check_runstate(src, true, "running");

    if (t->no_ram_left) {
        check_bitmap(src);
    }
}

/* The source must take the guest back after a failure. */
static void expect_source_resumes(DeviceTest *t)
{
    gint64 start = g_get_monotonic_time();

    expect_statuses(&t->src, "failed", NULL);
    check_error_desc(&t->src, NULL);
    expect_guest_back(t);
    g_test_message("the source took the guest back in %d ms",
                   (int)(g_get_monotonic_time() - start) / 1000);
}

/* The destination must give up, and never have run the guest. */
static void expect_destination_fails(DeviceTest *t, const char *word)
{
    Side *dst = &t->dst;

    if (t->no_exit) {
        expect_statuses(dst, "failed", NULL);
        check_error_desc(dst, word);
        wait_no_migration_threads(dst);
        check_runstate(dst, false, NULL);
        g_assert_false(dst->resumed);
    } else {
        step("waiting for the destination to exit");
        qtest_set_expected_status(dst->qts, EXIT_FAILURE);
        qtest_wait_qemu(dst->qts);
    }
}

/* The source may send all of the RAM from here on. */
static void expect_completed(DeviceTest *t)
{
    migrate_set_parameter_int(t->src.qts, "max-postcopy-bandwidth", 0);
    expect_statuses(&t->dst, "completed", NULL);
    expect_statuses(&t->src, "completed", NULL);
}

static void device_test_quit(DeviceTest *t, bool check_dst)
{
    step("ending the test");
    fault_proxy_free(t->proxy);
#ifdef CONFIG_GNUTLS
    if (t->tls) {
        migrate_hook_end_tls_psk(t->src.qts, t->dst.qts, t->tls_data);
    }
#endif
    migrate_end(t->src.qts, t->dst.qts, check_dst);
    if (t->log) {
        check_log(t->log);
    }
    g_queue_clear_full(&t->src.statuses, g_free);
    g_queue_clear_full(&t->dst.statuses, g_free);
    alarm(0);
}

/* Nothing is in the way any longer, and nothing has happened so far. */
static void expect_success(DeviceTest *t)
{
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-device", "postcopy-active", NULL);
    expect_completed(t);
    expect_resume(&t->dst);
}

/* The guest must run on the destination, and only there. */
static void end_on_destination(DeviceTest *t)
{
    wait_no_migration_threads(&t->src);
    check_runstate(&t->src, false, "postmigrate");
    g_assert_false(t->src.resumed);
    device_test_quit(t, true);
}

/* The guest must run on the source. */
static void end_on_source(DeviceTest *t)
{
    step("checking the guest on the source");
    migrate_check_guest(t->src.qts);
    device_test_quit(t, false);
}

/*** Success ***/

/* Have the proxy keep the source waiting, and the destination loaded. */
static void hold_pong(DeviceTest *t)
{
    fault_proxy_trap(t->proxy, FAULT_PROXY_BEFORE_PONG, PING_LOADED,
                     FAULT_PROXY_FORWARD, FAULT_PROXY_HOLD);
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", NULL);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    step("waiting for the destination to load the device state");
    fault_proxy_wait(t->proxy);
    /* It is not postcopy-active before the destination says so */
    check_migration_status(&t->src, "postcopy-device");
    check_runstate(&t->src, false, "finish-migrate");
}

static void release_pong(DeviceTest *t)
{
    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    expect_completed(t);
    expect_resume(&t->dst);
    check_runstate(&t->dst, true, "running");
}

static void complete_migration(DeviceTest *t)
{
    hold_pong(t);
    release_pong(t);
}

static void run_success(DeviceTest *t)
{
    if (!device_test_start(t, false)) {
        return;
    }
    complete_migration(t);
    end_on_destination(t);
}

static void test_success(void)
{
    run_success(&(DeviceTest) { });
}

static void test_success_no_ram_left(void)
{
    run_success(&(DeviceTest) { .paused = true, .no_ram_left = true });
}

static void test_success_release_ram(void)
{
    run_success(&(DeviceTest) { .release_ram = true });
}

static void test_success_preempt(void)
{
    run_success(&(DeviceTest) { .preempt = true });
}

/*
 * While the destination is kept waiting for a page, have its main loop read
 * memory that has not been sent, either.
 */
static void get_stuck(DeviceTest *t)
{
    fault_proxy_trap(t->proxy, FAULT_PROXY_BEHIND_REQ_PAGES, 0,
                     FAULT_PROXY_HOLD, FAULT_PROXY_FORWARD);
    step("waiting for the main loop of the destination to be stuck");
    qtest_qmp_send(t->dst.qts, "{ 'execute': 'pmemsave', 'arguments': {"
                   " 'val': %d, 'size': %d, 'filename': '/dev/null' } }",
                   X86_TEST_MEM_START, (int)STUCK_SIZE);
    fault_proxy_wait(t->proxy);
}

static void get_unstuck(DeviceTest *t)
{
    QDict *rsp;

    step("waiting for the main loop of the destination to go on");
    rsp = qtest_qmp_receive(t->dst.qts);
    g_assert(qdict_haskey(rsp, "return"));
    qobject_unref(rsp);
}

/* The firmware's driver is running: loading needs a page from the source */
static void run_success_page_fault(DeviceTest *t)
{
    if (!device_test_start(t, false)) {
        return;
    }
    if (t->queues) {
        dirty_queues(t);
    }
    /* When it asks for many, it must not wait for somebody to read that */
    fault_proxy_trap(t->proxy, FAULT_PROXY_BEHIND_REQ_PAGES, 0,
                     FAULT_PROXY_HOLD,
                     t->queues ? FAULT_PROXY_STALL : FAULT_PROXY_FORWARD);
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", NULL);
    step("waiting for the destination to ask for a page");
    fault_proxy_wait(t->proxy);
    check_migration_status(&t->src, "postcopy-device");
    check_qmp_answers(&t->src);
    if (t->stuck) {
        get_stuck(t);
    } else {
        check_qmp_answers(&t->dst);
    }

    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    if (t->stuck) {
        get_unstuck(t);
    }
    expect_success(t);
    end_on_destination(t);
}

static void test_success_page_fault(void)
{
    run_success_page_fault(&(DeviceTest) { .virtio = true });
}

static void test_success_page_fault_queues(void)
{
    run_success_page_fault(&(DeviceTest) { .virtio = true, .queues = 512 });
}

static void test_success_page_fault_xhci(void)
{
    run_success_page_fault(&(DeviceTest) { .xhci = true });
}

static void test_success_page_fault_vmgenid(void)
{
    run_success_page_fault(&(DeviceTest) { .vmgenid = true });
}

static void test_success_page_fault_stuck(void)
{
    run_success_page_fault(&(DeviceTest) { .virtio = true, .stuck = true });
}

static void test_success_page_fault_preempt(void)
{
    run_success_page_fault(&(DeviceTest) { .virtio = true, .preempt = true });
}

/* A limit that is set in the phase does not keep back what is asked for. */
static void test_success_page_fault_bandwidth(void)
{
    DeviceTest t = { .virtio = true };

    if (!device_test_start(&t, false)) {
        return;
    }
    fault_proxy_trap(t.proxy, FAULT_PROXY_BEFORE_PACKAGE, 0,
                     FAULT_PROXY_HOLD, FAULT_PROXY_HOLD);
    device_test_start_postcopy(&t);
    expect_statuses(&t.src, "postcopy-device", NULL);
    step("waiting for the package");
    fault_proxy_wait(t.proxy);
    migrate_set_parameter_int(t.src.qts, "max-postcopy-bandwidth", 4096);
    fault_proxy_set_mode(t.proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_success(&t);
    end_on_destination(&t);
}

static void test_late_activate(void)
{
    DeviceTest t = { .late_activate = true };

    if (!device_test_start(&t, false)) {
        return;
    }
    hold_pong(&t);
    g_assert_false(disks_active(&t.dst));
    release_pong(&t);
    g_assert(disks_active(&t.dst));
    end_on_destination(&t);
}

/* Management may say 'cont' at any time. */
static void run_cont(DeviceTest *t, bool early)
{
    t->wait_for_cont = true;
    if (!device_test_start(t, false)) {
        return;
    }
    hold_pong(t);
    if (early) {
        cont(&t->dst);
    }
    check_runstate(&t->dst, false, "inmigrate");
    g_assert_false(t->dst.resumed);
    g_assert(disks_active(&t->dst) != t->late_activate);

    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    if (!early) {
        check_runstate(&t->dst, false, "paused");
        g_assert_false(t->dst.resumed);
        g_assert(disks_active(&t->dst) != t->late_activate);
        cont(&t->dst);
    }
    expect_resume(&t->dst);
    g_assert(disks_active(&t->dst));

    expect_completed(t);
    end_on_destination(t);
}

static void test_cont_before_start(void)
{
    run_cont(&(DeviceTest) { }, true);
}

static void test_cont_behind_start(void)
{
    run_cont(&(DeviceTest) { }, false);
}

static void test_cont_late_activate(void)
{
    run_cont(&(DeviceTest) { .late_activate = true }, false);
}

/* What is reported as downtime is no less than what the guest has seen. */
static void test_downtime(void)
{
    DeviceTest t = { };

    if (!device_test_start(&t, false)) {
        return;
    }
    hold_pong(&t);
    /* The guest has stopped: from here it stands still for so long */
    g_usleep(2 * G_USEC_PER_SEC);
    g_assert_false(shows_downtime(&t.src));
    release_pong(&t);
    g_assert(shows_downtime(&t.src));
    g_assert_cmpint(read_migrate_property_int(t.src.qts, "downtime"), >=, 2000);
    end_on_destination(&t);
}

/*
 * Without a return path the source cannot hear that the destination has loaded
 * the device state, and does not wait for it.
 */
static void test_success_bitmap_only(void)
{
    DeviceTest t = { .bitmap_only = true };

    if (!device_test_start(&t, false)) {
        return;
    }
    device_test_start_postcopy(&t);
    expect_statuses(&t.src, "postcopy-active", "completed", NULL);
    expect_statuses(&t.dst, "postcopy-active", "completed", NULL);
    expect_resume(&t.dst);
    check_bitmap(&t.dst);
    end_on_destination(&t);
}

/*
 * Let the source send pages that nobody has asked for, but hear nothing, so
 * that it stays in the phase.
 */
static void background_start(DeviceTest *t)
{
    migrate_set_parameter_int(t->src.qts, "max-postcopy-bandwidth", 0);
    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_HOLD);
}

static void run_success_background(DeviceTest *t)
{
    if (!device_test_start(t, false)) {
        return;
    }
    background_start(t);
    fault_proxy_trap(t->proxy, FAULT_PROXY_BEFORE_PING, PING_PACE,
                     FAULT_PROXY_HOLD, FAULT_PROXY_HOLD);
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", NULL);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    step("waiting for the end of the first background pages");
    fault_proxy_wait(t->proxy);
    check_migration_status(&t->src, "postcopy-device");
    release_pong(t);
    end_on_destination(t);
}

static void test_success_background(void)
{
    run_success_background(&(DeviceTest) { });
}

static void test_success_background_preempt(void)
{
    run_success_background(&(DeviceTest) { .preempt = true });
}

/*** The link breaks ***/

static void cut_link(DeviceTest *t, FaultProxyPoint point, uint32_t value)
{
    fault_proxy_trap(t->proxy, point, value, FAULT_PROXY_HOLD,
                     FAULT_PROXY_HOLD);
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", NULL);
    step("waiting for the package");
    fault_proxy_wait(t->proxy);
    check_migration_status(&t->src, "postcopy-device");
    check_runstate(&t->src, false, "finish-migrate");
    fault_proxy_cut(t->proxy);
    expect_source_resumes(t);
}

static void run_cut(DeviceTest *t, FaultProxyPoint point, uint32_t value)
{
    if (!device_test_start(t, true)) {
        return;
    }
    cut_link(t, point, value);
    expect_destination_fails(t, NULL);
    end_on_source(t);
}

static void test_cut_before_package(void)
{
    run_cut(&(DeviceTest) { }, FAULT_PROXY_BEFORE_PACKAGE, 0);
}

static void test_cut_in_package(void)
{
    run_cut(&(DeviceTest) { }, FAULT_PROXY_IN_PACKAGE, 100);
}

static void test_cut_in_package_preempt(void)
{
    run_cut(&(DeviceTest) { .preempt = true }, FAULT_PROXY_IN_PACKAGE, 100);
}

static void test_cut_in_package_no_ram_left(void)
{
    run_cut(&(DeviceTest) { .paused = true, .no_ram_left = true },
            FAULT_PROXY_IN_PACKAGE, 100);
}

static void test_cut_in_package_no_exit(void)
{
    run_cut(&(DeviceTest) { .no_exit = true }, FAULT_PROXY_IN_PACKAGE, 100);
}

static void test_cut_in_package_paused(void)
{
    run_cut(&(DeviceTest) { .paused = true }, FAULT_PROXY_IN_PACKAGE, 100);
}

static void test_cut_in_package_suspended(void)
{
    run_cut(&(DeviceTest) { .suspended = true }, FAULT_PROXY_IN_PACKAGE, 100);
}

/*
 * The source cannot tell whether the destination has loaded everything, so it
 * takes the guest back.  What the destination does depends on whether it has;
 * it must answer in any case.
 */
static void test_cut_behind_package(void)
{
    DeviceTest t = { .no_exit = true };

    if (!device_test_start(&t, true)) {
        return;
    }
    cut_link(&t, FAULT_PROXY_BEHIND_PACKAGE, 0);
    step("query-migrate on the destination");
    qobject_unref(migrate_query(t.dst.qts));
    end_on_source(&t);
}

/* The same, with pages under way that nobody has asked for. */
static void run_cut_background(DeviceTest *t)
{
    t->no_exit = true;
    if (!device_test_start(t, true)) {
        return;
    }
    background_start(t);
    cut_link(t, FAULT_PROXY_BEFORE_PING, PING_PACE);
    step("query-migrate on the destination");
    qobject_unref(migrate_query(t->dst.qts));
    end_on_source(t);
}

static void test_cut_background(void)
{
    run_cut_background(&(DeviceTest) { });
}

static void test_cut_background_release_ram(void)
{
    run_cut_background(&(DeviceTest) { .release_ram = true });
}

static void test_cut_background_preempt(void)
{
    run_cut_background(&(DeviceTest) { .preempt = true });
}

/* The destination waits for a page that will not come any more. */
static void test_cut_page_fault(void)
{
    run_cut(&(DeviceTest) { .virtio = true }, FAULT_PROXY_BEHIND_REQ_PAGES, 0);
}

static void test_cut_page_fault_preempt(void)
{
    run_cut(&(DeviceTest) { .virtio = true, .preempt = true },
            FAULT_PROXY_BEHIND_REQ_PAGES, 0);
}

static void test_cut_page_fault_no_exit(void)
{
    DeviceTest t = { .virtio = true, .no_exit = true };

    if (!device_test_start(&t, true)) {
        return;
    }
    cut_link(&t, FAULT_PROXY_BEHIND_REQ_PAGES, 0);
    expect_statuses(&t.dst, "postcopy-device", NULL);
    expect_destination_fails(&t, NULL);
    end_on_source(&t);
}

/*** Nothing moves, nothing breaks ***/

/* Both sides must answer, and go on as if nothing had been. */
static void run_stall(FaultProxyPoint point, uint32_t value)
{
    DeviceTest t = { };

    if (!device_test_start(&t, false)) {
        return;
    }
    fault_proxy_trap(t.proxy, point, value, FAULT_PROXY_STALL,
                     FAULT_PROXY_STALL);
    device_test_start_postcopy(&t);
    expect_statuses(&t.src, "postcopy-device", NULL);
    step("waiting for the link to be stalled");
    fault_proxy_wait(t.proxy);
    check_qmp_answers(&t.src);
    check_qmp_answers(&t.dst);

    fault_proxy_set_mode(t.proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_success(&t);
    end_on_destination(&t);
}

static void test_stall_in_package(void)
{
    run_stall(FAULT_PROXY_IN_PACKAGE, 100);
}

static void test_stall_before_pong(void)
{
    run_stall(FAULT_PROXY_BEFORE_PONG, PING_LOADED);
}

/* Nothing moves any more while the source sends what is left of the RAM. */
static void test_stall_completion(void)
{
    DeviceTest t = { };
    int64_t first, before, sent;

    if (!device_test_start(&t, false)) {
        return;
    }
    hold_pong(&t);
    first = sent = read_ram_property_int(t.src.qts, "transferred");
    /* All that is left counts as little enough to complete the migration */
    migrate_set_parameter_int(t.src.qts, "downtime-limit", 2000 * 1000);
    fault_proxy_set_mode(t.proxy, FAULT_PROXY_STALL, FAULT_PROXY_FORWARD);
    expect_statuses(&t.src, "postcopy-active", NULL);
    do {
        before = sent;
        /* Nothing tells when the source can send no more */
        g_usleep(200 * 1000);
        check_qmp_answers(&t.src);
        sent = read_ram_property_int(t.src.qts, "transferred");
    } while (sent != before || sent < first + MiB / 8);

    fault_proxy_set_mode(t.proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_statuses(&t.dst, "postcopy-active", NULL);
    expect_completed(&t);
    expect_resume(&t.dst);
    end_on_destination(&t);
}

static void test_stall_frozen(void)
{
    DeviceTest t = { };

    if (!device_test_start(&t, false)) {
        return;
    }
    step("freezing the destination");
    kill(qtest_pid(t.dst.qts), SIGSTOP);
    device_test_start_postcopy(&t);
    expect_statuses(&t.src, "postcopy-device", NULL);
    check_qmp_answers(&t.src);

    kill(qtest_pid(t.dst.qts), SIGCONT);
    expect_success(&t);
    end_on_destination(&t);
}

#define YANK_MIGRATION \
    "'id': 'yank', 'arguments': { 'instances': [ { 'type': 'migration' } ] } }"

static void yank(Side *side, bool oob)
{
    step("yank on the %s", side->name);
    qtest_qmp_assert_success(side->qts, oob ?
                             "{ 'exec-oob': 'yank', " YANK_MIGRATION :
                             "{ 'execute': 'yank', " YANK_MIGRATION);
}

static void test_yank_source(void)
{
    DeviceTest t = { };

    if (!device_test_start(&t, true)) {
        return;
    }
    fault_proxy_trap(t.proxy, FAULT_PROXY_IN_PACKAGE, 100,
                     FAULT_PROXY_STALL, FAULT_PROXY_STALL);
    device_test_start_postcopy(&t);
    expect_statuses(&t.src, "postcopy-device", NULL);
    step("waiting for the package");
    fault_proxy_wait(t.proxy);
    check_migration_status(&t.src, "postcopy-device");
    yank(&t.src, false);
    expect_source_resumes(&t);
    fault_proxy_cut(t.proxy);
    expect_destination_fails(&t, NULL);
    end_on_source(&t);
}

static void run_yank_destination(DeviceTest *t, FaultProxyPoint point)
{
    t->no_exit = true;
    t->oob = t->stuck;
    if (!device_test_start(t, true)) {
        return;
    }
    fault_proxy_trap(t->proxy, point, 100, FAULT_PROXY_HOLD,
                     FAULT_PROXY_FORWARD);
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", NULL);
    step("waiting for the destination to wait");
    fault_proxy_wait(t->proxy);
    if (t->virtio) {
        expect_statuses(&t->dst, "postcopy-device", NULL);
    }
    if (t->stuck) {
        get_stuck(t);
    }
    yank(&t->dst, t->stuck);
    if (t->stuck) {
        get_unstuck(t);
    }
    expect_destination_fails(t, NULL);
    expect_source_resumes(t);
    end_on_source(t);
}

/* It is in the middle of a read. */
static void test_yank_read(void)
{
    run_yank_destination(&(DeviceTest) { }, FAULT_PROXY_IN_PACKAGE);
}

static void test_yank_page_fault(void)
{
    run_yank_destination(&(DeviceTest) { .virtio = true },
                         FAULT_PROXY_BEHIND_REQ_PAGES);
}

static void test_yank_page_fault_preempt(void)
{
    run_yank_destination(&(DeviceTest) { .virtio = true, .preempt = true },
                         FAULT_PROXY_BEHIND_REQ_PAGES);
}

/*
 * No page will come any more for the load of the device, nor for the main loop,
 * which would have to notice.
 */
static void run_cut_stuck(DeviceTest *t)
{
    if (!device_test_start(t, true)) {
        return;
    }
    fault_proxy_trap(t->proxy, FAULT_PROXY_BEHIND_REQ_PAGES, 0,
                     FAULT_PROXY_HOLD, FAULT_PROXY_FORWARD);
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", NULL);
    step("waiting for the destination to ask for a page");
    fault_proxy_wait(t->proxy);
    get_stuck(t);
    fault_proxy_cut(t->proxy);
    expect_source_resumes(t);
    expect_destination_fails(t, NULL);
    end_on_source(t);
}

static void test_cut_stuck(void)
{
    run_cut_stuck(&(DeviceTest) { .virtio = true });
}

static void test_cut_stuck_preempt(void)
{
    run_cut_stuck(&(DeviceTest) { .virtio = true, .preempt = true });
}

/* Only out-of-band commands are answered then. */
static void test_yank_stuck(void)
{
    run_yank_destination(&(DeviceTest) { .virtio = true, .stuck = true },
                         FAULT_PROXY_BEHIND_REQ_PAGES);
}

static void test_yank_stuck_preempt(void)
{
    run_yank_destination(&(DeviceTest) { .virtio = true, .stuck = true,
                                         .preempt = true },
                         FAULT_PROXY_BEHIND_REQ_PAGES);
}

/* The user gives up a destination that waits for a page. */
static void test_quit_page_fault(void)
{
    DeviceTest t = { .virtio = true };

    if (!device_test_start(&t, true)) {
        return;
    }
    fault_proxy_trap(t.proxy, FAULT_PROXY_BEHIND_REQ_PAGES, 0,
                     FAULT_PROXY_HOLD, FAULT_PROXY_FORWARD);
    device_test_start_postcopy(&t);
    expect_statuses(&t.src, "postcopy-device", NULL);
    step("waiting for the destination to ask for a page");
    fault_proxy_wait(t.proxy);
    step("quit on the destination");
    qtest_qmp_assert_success(t.dst.qts, "{ 'execute': 'quit' }");
    step("waiting for the destination to exit");
    qtest_wait_qemu(t.dst.qts);
    expect_source_resumes(&t);
    end_on_source(&t);
}

/*** The destination dies ***/

static void run_kill(DeviceTest *t, FaultProxyPoint point, uint32_t value)
{
    if (!device_test_start(t, true)) {
        return;
    }
    fault_proxy_trap(t->proxy, point, value, FAULT_PROXY_HOLD,
                     FAULT_PROXY_HOLD);
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", NULL);
    step("waiting for the package");
    fault_proxy_wait(t->proxy);
    step("killing the destination");
    qtest_crash_qemu(t->dst.qts);
    /* Let the source know */
    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_source_resumes(t);
    end_on_source(t);
}

static void test_kill(void)
{
    run_kill(&(DeviceTest) { }, FAULT_PROXY_IN_PACKAGE, UINT32_MAX);
}

static void test_kill_preempt(void)
{
    run_kill(&(DeviceTest) { .preempt = true },
             FAULT_PROXY_IN_PACKAGE, UINT32_MAX);
}

static void test_kill_no_ram_left(void)
{
    run_kill(&(DeviceTest) { .paused = true, .no_ram_left = true },
             FAULT_PROXY_IN_PACKAGE, UINT32_MAX);
}

/* In the middle of the load of a device for sure */
static void test_kill_page_fault(void)
{
    run_kill(&(DeviceTest) { .virtio = true }, FAULT_PROXY_BEHIND_REQ_PAGES, 0);
}

/*** The device state does not load ***/

static void run_load_error(DeviceTest *t)
{
    if (!device_test_start(t, true)) {
        return;
    }
    if (!t->virtio_mismatch) {
        fault_proxy_spoil_section(t->proxy, SPOILED_SECTION);
    }
    fault_proxy_trap(t->proxy, FAULT_PROXY_BEHIND_PACKAGE, 0,
                     FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", NULL);
    if (t->no_exit) {
        expect_statuses(&t->dst, "postcopy-device", NULL);
    }
    expect_destination_fails(t, t->virtio_mismatch ? "virtio-blk" :
                                                     SPOILED_SECTION);
    expect_source_resumes(t);
    end_on_source(t);
}

static void test_load_error(void)
{
    run_load_error(&(DeviceTest) { });
}

static void test_load_error_preempt(void)
{
    run_load_error(&(DeviceTest) { .preempt = true });
}

static void test_load_error_no_exit(void)
{
    run_load_error(&(DeviceTest) { .no_exit = true });
}

static void test_load_error_no_exit_preempt(void)
{
    run_load_error(&(DeviceTest) { .no_exit = true, .preempt = true });
}

static void test_load_error_no_ram_left(void)
{
    run_load_error(&(DeviceTest) { .paused = true, .no_ram_left = true });
}

static void test_load_error_no_exit_no_ram_left(void)
{
    run_load_error(&(DeviceTest) {
        .paused = true, .no_ram_left = true, .no_exit = true
    });
}

static void test_load_error_mismatch(void)
{
    run_load_error(&(DeviceTest) {
        .virtio = true, .virtio_mismatch = true, .no_exit = true
    });
}

/*** One owner: the destination has the guest when the source says so ***/

static void expect_destination_waits(DeviceTest *t)
{
    check_runstate(&t->dst, false, "inmigrate");
    g_assert_false(t->dst.resumed);
    /* There is no event for it, and the status has changed before */
    step("waiting for the destination to let go of its disks");
    while (disks_active(&t->dst)) {
        g_usleep(1000);
    }
}

static void expect_destination_in_doubt(DeviceTest *t)
{
    expect_statuses(&t->dst, "postcopy-device", "postcopy-paused", NULL);
    expect_destination_waits(t);
}

static void run_cut_before_pong(DeviceTest *t)
{
    if (!device_test_start(t, true)) {
        return;
    }
    cut_link(t, FAULT_PROXY_BEFORE_PONG, PING_LOADED);
    expect_destination_in_doubt(t);
    end_on_source(t);
}

static void test_cut_before_pong(void)
{
    run_cut_before_pong(&(DeviceTest) { });
}

static void test_cut_before_pong_late_activate(void)
{
    run_cut_before_pong(&(DeviceTest) { .late_activate = true });
}

/* The user has said that the guest may run, but the source has not. */
static void test_cut_before_pong_cont(void)
{
    DeviceTest t = { .wait_for_cont = true };

    if (!device_test_start(&t, true)) {
        return;
    }
    cut_link(&t, FAULT_PROXY_BEFORE_PONG, PING_LOADED);
    expect_destination_in_doubt(&t);
    cont(&t.dst);
    expect_destination_waits(&t);
    end_on_source(&t);
}

static void test_cut_before_pong_preempt(void)
{
    run_cut_before_pong(&(DeviceTest) { .preempt = true });
}

/* All of the RAM was sent, and none of it may have been dropped. */
static void test_cut_release_ram(void)
{
    run_cut_before_pong(&(DeviceTest) { .release_ram = true, .paused = true,
                                        .no_ram_left = true });
}

static void recover(DeviceTest *t)
{
    g_autofree char *uri = g_strdup_printf("unix:%s/migsocket",
                                           migration_get_env()->tmpfs);

    step("recovering");
    migrate_recover(t->dst.qts, uri);
    migrate_qmp(t->src.qts, t->dst.qts, fault_proxy_uri(t->proxy), NULL,
                "{ 'resume': true }");
    expect_statuses(&t->src, "postcopy-recover-setup", "postcopy-recover",
                    "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-recover", "postcopy-device", NULL);
}

/* START is on its way, but does not arrive. */
static void cut_before_start(DeviceTest *t)
{
    step("waiting for the link to be held");
    fault_proxy_wait(t->proxy);
    fault_proxy_cut(t->proxy);
    expect_statuses(&t->src, "postcopy-paused", NULL);
    expect_statuses(&t->dst, "postcopy-paused", NULL);
    expect_destination_waits(t);
    check_runstate(&t->src, false, NULL);
    g_assert_false(t->src.resumed);
}

/* The source has let go of the guest, but the destination has not heard it. */
static void run_cut_behind_pong(DeviceTest *t, bool twice)
{
    if (!device_test_start(t, true)) {
        return;
    }
    fault_proxy_trap(t->proxy, FAULT_PROXY_BEHIND_PONG, PING_LOADED,
                     FAULT_PROXY_HOLD, FAULT_PROXY_HOLD);
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    cut_before_start(t);

    if (twice) {
        fault_proxy_trap(t->proxy, FAULT_PROXY_BEFORE_PING, PING_START,
                         FAULT_PROXY_HOLD, FAULT_PROXY_HOLD);
        recover(t);
        cut_before_start(t);
    }

    recover(t);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    expect_completed(t);
    expect_resume(&t->dst);
    end_on_destination(t);
}

static void test_cut_behind_pong(void)
{
    run_cut_behind_pong(&(DeviceTest) { .oob = true }, false);
}

static void test_cut_behind_pong_preempt(void)
{
    run_cut_behind_pong(&(DeviceTest) { .oob = true, .preempt = true }, false);
}

static void test_cut_behind_pong_twice(void)
{
    run_cut_behind_pong(&(DeviceTest) { .oob = true }, true);
}

static void test_cut_behind_pong_twice_preempt(void)
{
    run_cut_behind_pong(&(DeviceTest) { .oob = true, .preempt = true }, true);
}

/* Everything has arrived, but the source does not know that. */
static void test_cut_before_shut(void)
{
    DeviceTest t = { };

    if (!device_test_start(&t, true)) {
        return;
    }
    migrate_set_parameter_int(t.src.qts, "max-postcopy-bandwidth", 0);
    fault_proxy_trap(t.proxy, FAULT_PROXY_BEFORE_SHUT, 0,
                     FAULT_PROXY_HOLD, FAULT_PROXY_HOLD);
    device_test_start_postcopy(&t);
    expect_statuses(&t.src, "postcopy-device", "postcopy-active", NULL);
    step("waiting for the destination to have received everything");
    fault_proxy_wait(t.proxy);
    fault_proxy_cut(t.proxy);
    expect_statuses(&t.src, "postcopy-paused", NULL);
    check_runstate(&t.src, false, NULL);
    g_assert_false(t.src.resumed);
    expect_statuses(&t.dst, "postcopy-device", "postcopy-active", "completed",
                    NULL);
    expect_resume(&t.dst);
    device_test_quit(&t, true);
}

static void expect_cancelled(DeviceTest *t)
{
    step("cancelling");
    migrate_cancel(t->src.qts);
    expect_statuses(&t->src, "cancelling", "cancelled", NULL);
    expect_guest_back(t);
}

/* The destination is frozen; when it thaws it must not run the guest. */
static void run_cancel_frozen(DeviceTest *t)
{
    if (!device_test_start(t, true)) {
        return;
    }
    step("freezing the destination");
    kill(qtest_pid(t->dst.qts), SIGSTOP);
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", NULL);
    expect_cancelled(t);
    kill(qtest_pid(t->dst.qts), SIGCONT);
    expect_destination_fails(t, NULL);
    end_on_source(t);
}

static void test_cancel_frozen(void)
{
    run_cancel_frozen(&(DeviceTest) { });
}

static void test_cancel_frozen_paused(void)
{
    run_cancel_frozen(&(DeviceTest) { .paused = true });
}

static void run_cancel_before_pong(DeviceTest *t)
{
    if (!device_test_start(t, true)) {
        return;
    }
    fault_proxy_trap(t->proxy, FAULT_PROXY_BEFORE_PONG, PING_LOADED,
                     FAULT_PROXY_FORWARD, FAULT_PROXY_HOLD);
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", NULL);
    step("waiting for the destination to load the device state");
    fault_proxy_wait(t->proxy);
    expect_cancelled(t);
    fault_proxy_cut(t->proxy);
    expect_destination_in_doubt(t);
    end_on_source(t);
}

static void test_cancel_before_pong(void)
{
    run_cancel_before_pong(&(DeviceTest) { });
}

static void test_cancel_before_pong_preempt(void)
{
    run_cancel_before_pong(&(DeviceTest) { .preempt = true });
}

/*** Notifications ***/

#ifdef CONFIG_TRACE_LOG
static void test_notify_success(void)
{
    static const char *const log[] = {
        "running", "setup", NOTIFY_SETUP, "active", "device", "postcopy-device",
        "postcopy-active", NOTIFY_DONE, "completed", NULL
    };

    run_success(&(DeviceTest) { .log = log });
}

static void test_notify_cut(void)
{
    static const char *const log[] = {
        "running", "setup", NOTIFY_SETUP, "active", "device", "postcopy-device",
        "failed", NOTIFY_FAILED, "running", NULL
    };

    run_cut(&(DeviceTest) { .log = log }, FAULT_PROXY_IN_PACKAGE, 100);
}

static void test_notify_cancel(void)
{
    static const char *const log[] = {
        "running", "setup", NOTIFY_SETUP, "active", "device", "postcopy-device",
        "cancelling", NOTIFY_FAILED, "running", "cancelled", NULL
    };

    run_cancel_before_pong(&(DeviceTest) { .log = log });
}

static void test_notify_recover(void)
{
    static const char *const log[] = {
        "running", "setup", NOTIFY_SETUP, "active", "device", "postcopy-device",
        "postcopy-active", NOTIFY_DONE, "postcopy-paused",
        "postcopy-recover-setup", "postcopy-recover", "postcopy-active",
        "completed", NULL
    };

    run_cut_behind_pong(&(DeviceTest) { .oob = true, .log = log }, false);
}
#endif

/* The guest may run there already, so it must not be given back. */
static void test_cancel_no_hold(void)
{
    DeviceTest t = { .no_hold = true };
    const char *desc;
    QDict *error;

    if (!device_test_start(&t, false)) {
        return;
    }
    hold_pong(&t);
    expect_statuses(&t.dst, "postcopy-active", NULL);
    expect_resume(&t.dst);

    step("cancelling");
    error = qtest_qmp_assert_failure_ref(t.src.qts,
                                         "{ 'execute': 'migrate_cancel' }");
    desc = qdict_get_str(error, "desc");
    g_test_message("source: %s", desc);
    g_assert(strstr(desc, "stopping it"));
    g_assert(strstr(desc, "yank"));
    qobject_unref(error);
    check_migration_status(&t.src, "postcopy-device");
    check_runstate(&t.src, false, "finish-migrate");

    fault_proxy_set_mode(t.proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_statuses(&t.src, "postcopy-active", NULL);
    expect_completed(&t);
    end_on_destination(&t);
}

/* The source is gone before it has told the destination to start. */
static void run_quit(FaultProxyPoint point, uint32_t value)
{
    DeviceTest t = { .no_exit = true };
    gint64 start;

    if (!device_test_start(&t, true)) {
        return;
    }
    fault_proxy_trap(t.proxy, point, value, FAULT_PROXY_STALL,
                     FAULT_PROXY_STALL);
    device_test_start_postcopy(&t);
    expect_statuses(&t.src, "postcopy-device", NULL);
    step("waiting for the link to be stalled");
    fault_proxy_wait(t.proxy);

    step("quitting the source");
    start = g_get_monotonic_time();
    qtest_qmp_assert_success(t.src.qts, "{ 'execute': 'quit' }");
    qtest_wait_qemu(t.src.qts);
    g_test_message("the source needed %d ms to end",
                   (int)(g_get_monotonic_time() - start) / 1000);
    g_assert_cmpint(g_get_monotonic_time() - start, <, 5 * G_USEC_PER_SEC);

    /* Let the destination know */
    fault_proxy_cut(t.proxy);
    if (point == FAULT_PROXY_IN_PACKAGE) {
        expect_destination_fails(&t, NULL);
    } else {
        expect_destination_in_doubt(&t);
    }
    device_test_quit(&t, false);
}

static void test_quit_in_package(void)
{
    run_quit(FAULT_PROXY_IN_PACKAGE, 100);
}

static void test_quit_before_pong(void)
{
    run_quit(FAULT_PROXY_BEFORE_PONG, PING_LOADED);
}

/*** TLS ***/

#ifdef CONFIG_GNUTLS
static void run_tls_success(DeviceTest *t)
{
    t->tls = true;
    if (!device_test_start(t, false)) {
        return;
    }
    device_test_start_postcopy(t);
    expect_statuses(&t->src, "postcopy-device", NULL);
    expect_success(t);
    end_on_destination(t);
}

static void test_tls_success(void)
{
    run_tls_success(&(DeviceTest) { });
}

static void test_tls_success_preempt(void)
{
    run_tls_success(&(DeviceTest) { .preempt = true });
}

/* The destination waits for the package, the source for the PONG. */
static void test_tls_cut_package(void)
{
    DeviceTest t = { .tls = true };

    if (!device_test_start(&t, true)) {
        return;
    }
    fault_proxy_set_mode(t.proxy, FAULT_PROXY_HOLD, FAULT_PROXY_FORWARD);
    device_test_start_postcopy(&t);
    expect_statuses(&t.src, "postcopy-device", NULL);
    check_migration_status(&t.src, "postcopy-device");
    fault_proxy_cut(t.proxy);
    expect_source_resumes(&t);
    expect_destination_fails(&t, NULL);
    end_on_source(&t);
}


/* The destination has loaded everything, and cannot say so. */
static void test_tls_cut_pong(void)
{
    DeviceTest t = { .tls = true };

    if (!device_test_start(&t, true)) {
        return;
    }
    fault_proxy_set_mode(t.proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_HOLD);
    device_test_start_postcopy(&t);
    expect_statuses(&t.src, "postcopy-device", NULL);
    step("waiting for the destination to load the device state");
    while (!disks_active(&t.dst)) {
        g_usleep(1000);
    }
    check_migration_status(&t.src, "postcopy-device");
    fault_proxy_cut(t.proxy);
    expect_source_resumes(&t);
    expect_destination_in_doubt(&t);
    end_on_source(&t);
}

static void test_tls_yank(void)
{
    DeviceTest t = { .tls = true };

    if (!device_test_start(&t, true)) {
        return;
    }
    fault_proxy_set_mode(t.proxy, FAULT_PROXY_HOLD, FAULT_PROXY_HOLD);
    device_test_start_postcopy(&t);
    expect_statuses(&t.src, "postcopy-device", NULL);
    yank(&t.src, false);
    expect_source_resumes(&t);
    fault_proxy_cut(t.proxy);
    expect_destination_fails(&t, NULL);
    end_on_source(&t);
}
#endif

/*** And then ***/

static void run_retry(DeviceTest *t)
{
    MigrateStart args = { .only_target = true };
    QTestState *dst;

    if (!device_test_start(t, true)) {
        return;
    }
    cut_link(t, FAULT_PROXY_IN_PACKAGE, 100);
    expect_destination_fails(t, NULL);

    step("starting another destination");
    qtest_quit(t->dst.qts);
    g_queue_clear_full(&t->dst.statuses, g_free);
    migrate_start(&t->src.qts, &dst, "defer", &args);
    t->src.stopped = false;
    device_test_migrate(t, dst);
    complete_migration(t);
    end_on_destination(t);
}

static void test_retry(void)
{
    run_retry(&(DeviceTest) { });
}

static void test_retry_preempt(void)
{
    run_retry(&(DeviceTest) { .preempt = true });
}

static int listen_at(const char *path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    g_assert_cmpint(g_strlcpy(addr.sun_path, path, sizeof(addr.sun_path)), <,
                    sizeof(addr.sun_path));
    unlink(path);
    g_assert_cmpint(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), ==, 0);
    g_assert_cmpint(listen(fd, 8), ==, 0);
    return fd;
}

/*
 * The destination is a socket that says nothing.  Each time the source hears
 * that it is gone, it is told to migrate again, without any wait in between.
 */
static void test_retry_at_once(void)
{
    g_autofree char *path = g_strdup_printf("%s/migsocket",
                                            migration_get_env()->tmpfs);
    DeviceTest t = { };
    int fd;

    if (!device_test_start(&t, true)) {
        return;
    }
    cut_link(&t, FAULT_PROXY_IN_PACKAGE, 100);
    expect_destination_fails(&t, NULL);

    fd = listen_at(path);
    for (int i = 0; i < 30; i++) {
        int conn;

        step("migration %d", i);
        migrate_qmp(t.src.qts, NULL, fault_proxy_uri(t.proxy), NULL, "{}");
        fault_proxy_set_mode(t.proxy, FAULT_PROXY_DROP, FAULT_PROXY_FORWARD);
        /* Now the proxy has both ends, and can cut them */
        conn = accept(fd, NULL, NULL);
        expect_statuses(&t.src, "setup", "active", NULL);
        device_test_start_postcopy(&t);
        expect_statuses(&t.src, "postcopy-device", NULL);
        fault_proxy_cut(t.proxy);
        close(conn);
        expect_statuses(&t.src, "failed", NULL);
    }
    close(fd);

    expect_guest_back(&t);
    end_on_source(&t);
}

#ifdef CONFIG_TRACE_LOG
static void test_notify_retry(void)
{
    static const char *const log[] = {
        "running", "setup", NOTIFY_SETUP, "active", "device", "postcopy-device",
        "failed", NOTIFY_FAILED, "running",
        "setup", NOTIFY_SETUP, "active", "device", "postcopy-device",
        "postcopy-active", NOTIFY_DONE, "completed", NULL
    };

    run_retry(&(DeviceTest) { .log = log });
}
#endif

static void test_cancel_before_switchover(void)
{
    DeviceTest t = { };

    if (!device_test_start(&t, true)) {
        return;
    }
    step("cancelling");
    migrate_cancel(t.src.qts);
    expect_statuses(&t.src, "cancelling", "cancelled", NULL);
    wait_no_migration_threads(&t.src);
    g_assert_false(t.src.stopped);
    check_runstate(&t.src, true, "running");
    expect_destination_fails(&t, NULL);
    end_on_source(&t);
}

static void migration_test_add_postcopy_device_smoke(MigrationTestEnv *env)
{
    if (!env->has_uffd) {
        return;
    }

    migration_test_add("/migration/postcopy-device/plain", test_success);
    migration_test_add("/migration/postcopy-device/cut/in-package/plain",
                       test_cut_in_package);
    migration_test_add("/migration/postcopy-device/kill/plain", test_kill);
    migration_test_add("/migration/postcopy-device/load-error/plain",
                       test_load_error);
    migration_test_add("/migration/postcopy-device/cut/before-pong",
                       test_cut_before_pong);
}

void migration_test_add_postcopy_device(MigrationTestEnv *env)
{
    migration_test_add_postcopy_device_smoke(env);

    if (!env->full_set) {
        return;
    }

    migration_test_add("/migration/postcopy-device/bitmap-only",
                       test_success_bitmap_only);

    if (!env->has_uffd) {
        return;
    }

    migration_test_add("/migration/postcopy-device/cancel/active",
                       test_cancel_before_switchover);
    migration_test_add("/migration/postcopy-device/cancel/frozen/plain",
                       test_cancel_frozen);
    migration_test_add("/migration/postcopy-device/cancel/frozen/paused",
                       test_cancel_frozen_paused);
    migration_test_add("/migration/postcopy-device/cancel/no-hold",
                       test_cancel_no_hold);
    migration_test_add("/migration/postcopy-device/cancel/before-pong",
                       test_cancel_before_pong);
    migration_test_add("/migration/postcopy-device/yank/source",
                       test_yank_source);
    migration_test_add("/migration/postcopy-device/yank/read", test_yank_read);
    migration_test_add("/migration/postcopy-device/stall/in-package",
                       test_stall_in_package);
    migration_test_add("/migration/postcopy-device/stall/before-pong",
                       test_stall_before_pong);
    migration_test_add("/migration/postcopy-device/stall/completion",
                       test_stall_completion);
    migration_test_add("/migration/postcopy-device/stall/frozen",
                       test_stall_frozen);
    migration_test_add("/migration/postcopy-device/retry/plain", test_retry);
    migration_test_add("/migration/postcopy-device/retry/at-once",
                       test_retry_at_once);
    migration_test_add("/migration/postcopy-device/downtime", test_downtime);

    migration_test_add("/migration/postcopy-device/quit/in-package",
                       test_quit_in_package);
    migration_test_add("/migration/postcopy-device/quit/before-pong",
                       test_quit_before_pong);

    migration_test_add("/migration/postcopy-device/cont/before-start",
                       test_cont_before_start);
    migration_test_add("/migration/postcopy-device/cont/behind-start",
                       test_cont_behind_start);
    migration_test_add("/migration/postcopy-device/cont/late-activate",
                       test_cont_late_activate);
    migration_test_add("/migration/postcopy-device/cont/cut",
                       test_cut_before_pong_cont);
    migration_test_add("/migration/postcopy-device/late-activate/plain",
                       test_late_activate);
    migration_test_add("/migration/postcopy-device/late-activate/cut",
                       test_cut_before_pong_late_activate);

#ifdef CONFIG_TRACE_LOG
    migration_test_add("/migration/postcopy-device/notify/success",
                       test_notify_success);
    migration_test_add("/migration/postcopy-device/notify/cut",
                       test_notify_cut);
    migration_test_add("/migration/postcopy-device/notify/cancel",
                       test_notify_cancel);
    migration_test_add("/migration/postcopy-device/notify/recover",
                       test_notify_recover);
    migration_test_add("/migration/postcopy-device/notify/retry",
                       test_notify_retry);
#endif

    migration_test_add("/migration/postcopy-device/background/plain",
                       test_success_background);
    migration_test_add("/migration/postcopy-device/background/preempt",
                       test_success_background_preempt);
    migration_test_add("/migration/postcopy-device/background/cut/plain",
                       test_cut_background);
    migration_test_add("/migration/postcopy-device/background/cut/release-ram",
                       test_cut_background_release_ram);
    migration_test_add("/migration/postcopy-device/background/cut/preempt",
                       test_cut_background_preempt);

    migration_test_add("/migration/postcopy-device/cut/before-package",
                       test_cut_before_package);
    migration_test_add("/migration/postcopy-device/cut/behind-package",
                       test_cut_behind_package);
    migration_test_add("/migration/postcopy-device/cut/behind-pong/plain",
                       test_cut_behind_pong);
    migration_test_add("/migration/postcopy-device/cut/behind-pong/twice",
                       test_cut_behind_pong_twice);
    migration_test_add("/migration/postcopy-device/cut/before-shut",
                       test_cut_before_shut);
    migration_test_add("/migration/postcopy-device/cut/in-package/paused",
                       test_cut_in_package_paused);
    migration_test_add("/migration/postcopy-device/cut/in-package/no-ram-left",
                       test_cut_in_package_no_ram_left);
    migration_test_add("/migration/postcopy-device/cut/in-package/no-exit",
                       test_cut_in_package_no_exit);

    migration_test_add("/migration/postcopy-device/kill/no-ram-left",
                       test_kill_no_ram_left);

    migration_test_add("/migration/postcopy-device/no-ram-left",
                       test_success_no_ram_left);
    migration_test_add("/migration/postcopy-device/release-ram/plain",
                       test_success_release_ram);
    migration_test_add("/migration/postcopy-device/release-ram/cut",
                       test_cut_release_ram);

    migration_test_add("/migration/postcopy-device/load-error/no-ram-left",
                       test_load_error_no_ram_left);
    migration_test_add("/migration/postcopy-device/load-error/no-exit/plain",
                       test_load_error_no_exit);
    migration_test_add(
        "/migration/postcopy-device/load-error/no-exit/no-ram-left",
        test_load_error_no_exit_no_ram_left);

    migration_test_add("/migration/postcopy-device/preempt/plain",
                       test_success_preempt);
    migration_test_add("/migration/postcopy-device/preempt/retry",
                       test_retry_preempt);
    migration_test_add("/migration/postcopy-device/preempt/cut/in-package",
                       test_cut_in_package_preempt);
    migration_test_add("/migration/postcopy-device/preempt/cut/before-pong",
                       test_cut_before_pong_preempt);
    migration_test_add(
        "/migration/postcopy-device/preempt/cut/behind-pong/plain",
        test_cut_behind_pong_preempt);
    migration_test_add(
        "/migration/postcopy-device/preempt/cut/behind-pong/twice",
        test_cut_behind_pong_twice_preempt);
    migration_test_add("/migration/postcopy-device/preempt/cancel",
                       test_cancel_before_pong_preempt);
    migration_test_add("/migration/postcopy-device/preempt/kill",
                       test_kill_preempt);
    migration_test_add("/migration/postcopy-device/preempt/load-error/plain",
                       test_load_error_preempt);
    migration_test_add("/migration/postcopy-device/preempt/load-error/no-exit",
                       test_load_error_no_exit_preempt);

#ifdef CONFIG_GNUTLS
    migration_test_add("/migration/postcopy-device/tls/plain",
                       test_tls_success);
    migration_test_add("/migration/postcopy-device/tls/cut/package",
                       test_tls_cut_package);
    migration_test_add("/migration/postcopy-device/tls/cut/pong",
                       test_tls_cut_pong);
    migration_test_add("/migration/postcopy-device/tls/yank", test_tls_yank);
    migration_test_add("/migration/postcopy-device/tls/preempt",
                       test_tls_success_preempt);
#endif

    if (env->is_x86) {
        migration_test_add(
            "/migration/postcopy-device/cut/in-package/suspended",
            test_cut_in_package_suspended);
        migration_test_add("/migration/postcopy-device/load-error/mismatch",
                           test_load_error_mismatch);
        migration_test_add("/migration/postcopy-device/page-fault/plain",
                           test_success_page_fault);
        migration_test_add("/migration/postcopy-device/page-fault/queues",
                           test_success_page_fault_queues);
        migration_test_add("/migration/postcopy-device/page-fault/xhci",
                           test_success_page_fault_xhci);
        migration_test_add("/migration/postcopy-device/page-fault/vmgenid",
                           test_success_page_fault_vmgenid);
        migration_test_add("/migration/postcopy-device/page-fault/preempt",
                           test_success_page_fault_preempt);
        migration_test_add("/migration/postcopy-device/page-fault/bandwidth",
                           test_success_page_fault_bandwidth);
        migration_test_add("/migration/postcopy-device/page-fault/kill",
                           test_kill_page_fault);
        migration_test_add("/migration/postcopy-device/page-fault/yank/plain",
                           test_yank_page_fault);
        migration_test_add("/migration/postcopy-device/page-fault/yank/preempt",
                           test_yank_page_fault_preempt);
        migration_test_add(
            "/migration/postcopy-device/page-fault/stuck/plain",
            test_success_page_fault_stuck);
        migration_test_add(
            "/migration/postcopy-device/page-fault/stuck/cut/plain",
            test_cut_stuck);
        migration_test_add(
            "/migration/postcopy-device/page-fault/stuck/cut/preempt",
            test_cut_stuck_preempt);
        migration_test_add("/migration/postcopy-device/page-fault/quit",
                           test_quit_page_fault);
        migration_test_add(
            "/migration/postcopy-device/page-fault/stuck/yank/plain",
            test_yank_stuck);
        migration_test_add(
            "/migration/postcopy-device/page-fault/stuck/yank/preempt",
            test_yank_stuck_preempt);
        migration_test_add("/migration/postcopy-device/page-fault/cut/plain",
                           test_cut_page_fault);
        migration_test_add("/migration/postcopy-device/page-fault/cut/no-exit",
                           test_cut_page_fault_no_exit);
        migration_test_add("/migration/postcopy-device/page-fault/cut/preempt",
                           test_cut_page_fault_preempt);
    }
}
