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
#include "standard-headers/linux/virtio_ids.h"
#include "standard-headers/linux/virtio_pci.h"
#include "migration/bootfile.h"
#include "migration/fault-proxy.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "qapi/error.h"
#include "qemu/sockets.h"

/* The ping that ends the device state, see migration/postcopy-device.h */
#define PING_LOADED     0x42
/* The destination can be told when to start the guest, see there */
#define PING_HOLD       0x484f4c44
#define PONG_HELD       0x48454c44
#define PING_START      0x53545254
/* No one knows this value */
#define PING_UNKNOWN    0x3f3f3f3f

/* A section that every machine has in its device state */
#define SPOILED_SECTION "timer"

/* What all names of tests begin with */
#define TEST_PREFIX     "migration/postcopy-device/"

/* Where a test interferes.  PACKAGE_END is in front of the last byte. */
#define BEFORE_PACKAGE  { FAULT_PROXY_BEFORE_PACKAGE }
#define IN_PACKAGE      { FAULT_PROXY_IN_PACKAGE, 100 }
#define PACKAGE_END     { FAULT_PROXY_IN_PACKAGE, UINT32_MAX }
#define BEHIND_PACKAGE  { FAULT_PROXY_BEHIND_PACKAGE }
#define BEFORE_PONG     { FAULT_PROXY_BEFORE_PONG, PING_LOADED }
#define BEHIND_PONG     { FAULT_PROXY_BEHIND_PONG, PING_LOADED }
#define BEFORE_SHUT     { FAULT_PROXY_BEFORE_SHUT }
#define REQ_PAGES       { FAULT_PROXY_BEHIND_REQ_PAGES }

/*
 * The guest dirties its memory over and over: in so much of it there are pages
 * that have to be sent again.
 */
#define STUCK_SIZE      (8 * MiB)

/* Messages of the return path, see migration/migration.c */
#define RP_PONG         "\0\2\0\4"

/* Descriptors, available ring and used ring of a queue have a page each. */
#define RING_PAGES      3
#define RINGS_START     X86_TEST_MEM_END

#define HUGETLBFS_OPTS \
    " -object memory-backend-memfd,id=huge,size=150M,hugetlb=on,hugetlbsize=2M" \
    " -machine memory-backend=huge"
#define SHARED_OPTS \
    " -object memory-backend-file,id=file,size=150M,mem-path=/dev/shm" \
    ",share=on -machine memory-backend=file"
#define OLD_MACHINE_OPTS \
    " -global migration.multifd-flush-after-each-section=on" \
    " -global migration.x-preempt-pre-7-2=on"
/* Some machines have no other node that is active or not */
#define NODE_OPTS "-blockdev null-co,node-name=node0,size=1099511627776"
#define XHCI_OPTS "-device qemu-xhci -device usb-kbd"
#define VMGENID_OPTS "-device vmgenid"
#define NIC_OPTS "-nic hubport,hubid=0"
#define IOMMU_OPTS \
    "-device intel-iommu,intremap=off " VIRTIO_OPTS \
    ",iommu_platform=on,disable-legacy=on"
#define VIRTIO_OPTS \
    "-blockdev null-co,node-name=node0,size=1073741824,read-zeroes=on " \
    "-device virtio-blk-pci,drive=node0"

/*
 * A step that takes longer than this hangs.  No step needs more than a few
 * seconds on an idle host.
 */
#define STEP_SECONDS    60

/* One way over the link with a delay */
#define DELAY_MS        10

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

typedef struct StreamPoint {
    FaultProxyPoint point;
    uint32_t value;
} StreamPoint;

typedef struct DeviceTest {
    Side src;
    Side dst;
    FaultProxy *proxy;
    /* Where the destination listens */
    char *uri;
    /* So many queues of the virtio-blk device are in use */
    unsigned queues_started;
    void *tls_data;

    /*** Options, from the table of tests ***/

    StreamPoint at;
    /* Use postcopy-preempt */
    bool preempt;
    /* Use multifd, which can be combined with postcopy since QEMU 10.1 */
    bool multifd;
    /* What machine types up to 7.2 have other defaults for */
    bool old_machine;
    /* The guest is paused before it is migrated */
    bool paused;
    /* The guest suspends itself before it is migrated (x86 only) */
    bool suspended;
    /*
     * All of the RAM has been sent before the switchover.  Implies @paused; a
     * dirty bitmap keeps the migration from being completed in precopy.
     */
    bool no_ram_left;
    /* Postcopy of a dirty bitmap only */
    bool bitmap_only;
    /* There is a return path nevertheless */
    bool return_path;
    /* The source may drop what it has sent, when it needs it no more */
    bool release_ram;
    /* exit-on-error=false for the destination */
    bool no_exit;
    /*
     * A virtio-blk device that the firmware has left running: to load it, the
     * destination reads guest memory that is dirty (x86 only)
     */
    bool virtio;
    /* Guest memory has pages of 2 MiB; skipped if the host has not enough */
    bool hugetlbfs;
    /* It is in a file that others could map as well */
    bool shared;
    /* A disk in a file, which whoever runs the guest locks */
    bool disk;
    /* It is behind an IOMMU, which translates (x86 only) */
    bool iommu;
    /* So many queues, and all of them are in use; 0: one */
    unsigned queues;
    /* The same with a USB keyboard at an xHCI controller (x86 only) */
    bool xhci;
    /* The same with a VM generation ID (x86 only) */
    bool vmgenid;
    /* The same with the vAPIC (x86 only) */
    bool vapic;
    /* The virtio-blk device has another number of queues on the destination */
    bool virtio_mismatch;
    /* The destination does not know that it is to wait for START */
    bool no_hold;
    /* The user stops the guest while it is being handed over */
    bool stop;
    /* -S for the destination: the guest waits for 'cont' */
    bool wait_for_cont;
    /* It comes before the source has let go of the guest */
    bool early_cont;
    /* The link breaks again after it has been restored */
    bool cut_twice;
    /* The destination activates its disks as late as possible */
    bool late_activate;
    /* Both sides take out-of-band commands, as migrate-recover needs */
    bool oob;
    /* No limit to the bandwidth, neither in precopy nor in postcopy */
    bool full_speed;
    /* A TCP link with a delay */
    bool tcp;
    /* The link is encrypted, so the proxy cannot read it: no trap works */
    bool tls;
    /* Processes carry the stream, so shutdown(2) does not work, nor a trap */
    bool exec;
    /* The source throttles its CPUs before the switchover */
    bool throttle;
    /* The source logs what the destination is to throw away */
    bool log_discards;
    /*
     * What the source has to do in this order, checked when it has ended: its
     * statuses, "notify" and the type of a notification, "running" when the
     * guest starts, "announce" when it is announced.  NULL at the end.
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

/*** Files ***/

static char *tmp_path(const char *name)
{
    return g_strdup_printf("%s/%s", migration_get_env()->tmpfs, name);
}

static char *tmp_uri(const char *name)
{
    return g_strdup_printf("unix:%s/%s", migration_get_env()->tmpfs, name);
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

static char *next_status(Side *side)
{
    while (g_queue_is_empty(&side->statuses)) {
        side_wait_event(side);
    }
    return g_queue_pop_head(&side->statuses);
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
        seen = next_status(side);
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

/* Any status but "running" means that the guest does not run; so does NULL. */
static void check_runstate(Side *side, const char *status)
{
    bool running = !g_strcmp0(status, "running");
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

/* The guest must not have run there since the test has last seen it start. */
static void check_not_resumed(Side *side, const char *status)
{
    check_runstate(side, status);
    g_assert_false(side->resumed);
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
    g_assert(node);
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

static bool throttled(Side *side)
{
    bool ret;
    QDict *rsp;

    rsp = migrate_query(side->qts);
    ret = qdict_haskey(rsp, "cpu-throttle-percentage");
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

static char *log_opts(void)
{
    g_autofree char *path = tmp_path("src_log");

    /* With the time comes the thread */
    return g_strdup_printf("-D %s -msg timestamp=on -trace migrate_set_state "
                           "-trace migration_call_notifiers "
                           "-trace postcopy_start "
                           "-trace postcopy_device_drained "
                           "-trace qemu_announce_self_iter "
                           "-trace runstate_set", path);
}

static char *log_discards_opts(void)
{
    g_autofree char *path = tmp_path("src_log");

    return g_strdup_printf("-D %s -trace postcopy_discard_send_range "
                           "-trace postcopy_device_drained", path);
}

/* All of them must be sent before the guest is stopped */
static void check_discards(void)
{
    g_autofree char *path = tmp_path("src_log");
    g_autofree char *text = NULL;
    char *stop;

    step("reading the log of the source");
    g_assert(g_file_get_contents(path, &text, NULL, NULL));
    stop = strstr(text, "postcopy_device_drained ");
    g_assert(stop);
    g_assert(!strstr(stop, "postcopy_discard_send_range "));
    *stop = 0;
    g_assert(strstr(text, "postcopy_discard_send_range "));
    unlink(path);
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
    if (strstr(line, "qemu_announce_self_iter ")) {
        return g_strdup("announce");
    }
    return NULL;
}

/* What /proc says of a thread, which has this name with debug-threads=on */
static char *thread_stat(pid_t pid, const char *name)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/task", (int)pid);
    g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
    g_autofree char *pattern = g_strdup_printf("(%s)", name);
    const char *tid;

    while ((tid = g_dir_read_name(dir))) {
        g_autofree char *stat_path = g_strdup_printf("%s/%s/stat", path, tid);
        g_autofree char *text = NULL;

        if (g_file_get_contents(stat_path, &text, NULL, NULL) &&
            strstr(text, pattern)) {
            return g_steal_pointer(&text);
        }
    }
    g_error("there is no thread %s", name);
}

/* There is no event for either: the migration thread logs this, and waits. */
static void wait_log_and_sleep(Side *side, const char *what)
{
    g_autofree char *path = tmp_path("src_log");
    g_autofree char *text = NULL;

    step("waiting for the source to log '%s'", what);
    do {
        g_usleep(1000);
        g_free(text);
        g_assert(g_file_get_contents(path, &text, NULL, NULL));
    } while (!strstr(text, what));

    step("waiting for the migration thread to wait");
    do {
        g_usleep(1000);
        g_free(text);
        text = thread_stat(qtest_pid(side->qts), "mig/src/main");
    } while (!strstr(text, ") S "));
}

static void check_log(const char *const *log)
{
    g_autofree char *path = tmp_path("src_log");
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    const char *last = "";
    int device_tid = 0;

    step("reading the log of the source");
    g_assert(g_file_get_contents(path, &text, NULL, NULL));
    lines = g_strsplit(text, "\n", -1);
    for (int i = 0; lines[i]; i++) {
        g_autofree char *seen = log_parse_line(lines[i]);
        int tid = atoi(lines[i]);

        if (!seen) {
            continue;
        }
        g_test_message("the source: %s", seen);
        g_assert_cmpstr(seen, ==, *log);
        if (g_str_equal(seen, "device")) {
            device_tid = tid;
        } else if (g_str_equal(seen, "postcopy-device") ||
                   g_str_equal(last, "postcopy-device")) {
            /* No other thread begins or ends the phase */
            g_assert_cmpint(tid, ==, device_tid);
        }
        last = *log++;
    }
    g_assert_cmpstr(*log, ==, NULL);
    unlink(path);
}

/*** A device that the firmware has left running ***/

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

/* The option ROM of the vAPIC, see pc-bios/optionrom/kvmvapic.S */
#define VAPIC_SIGNATURE     "kvm aPiC"
#define OPTION_ROMS_START   0xc0000
#define OPTION_ROMS_END     0xf0000
#define OPTION_ROM_ALIGN    (2 * KiB)

/* See include/hw/pci-host/q35.h */
#define MCH_PAM             0x90
#define MCH_PAM_SIZE        7
#define MCH_PAM_RAM         0x33

static bool dirty_vapic_rom(QTestState *src)
{
    uint8_t rom[OPTION_ROM_ALIGN];

    for (uint64_t addr = OPTION_ROMS_START; addr < OPTION_ROMS_END;
         addr += sizeof(rom)) {
        qtest_memread(src, addr, rom, sizeof(rom));
        if (memmem(rom, sizeof(rom), VAPIC_SIGNATURE,
                   strlen(VAPIC_SIGNATURE))) {
            qtest_writeb(src, addr, rom[0]);
            return true;
        }
    }
    return false;
}

/* The firmware has protected it from writes. */
static void dirty_vapic(DeviceTest *t)
{
    QPCIBus *bus = qpci_new_pc(t->src.qts, NULL);
    QPCIDevice *mch = qpci_device_find(bus, QPCI_DEVFN(0, 0));
    uint8_t pam[MCH_PAM_SIZE];
    bool found;

    for (int i = 0; i < MCH_PAM_SIZE; i++) {
        pam[i] = qpci_config_readb(mch, MCH_PAM + i);
        qpci_config_writeb(mch, MCH_PAM + i, MCH_PAM_RAM);
    }
    found = dirty_vapic_rom(t->src.qts);
    for (int i = 0; i < MCH_PAM_SIZE; i++) {
        qpci_config_writeb(mch, MCH_PAM + i, pam[i]);
    }
    g_assert(found);
    g_free(mch);
    qpci_free_pc(bus);
}

/*** Processes that carry the stream ***/

/* What comes in goes to one FIFO, and the other one's contents go out. */
static char *exec_uri(const char *in, const char *out)
{
    g_autofree char *to = tmp_path(in);
    g_autofree char *from = tmp_path(out);

    if (mkfifo(to, 0600) < 0) {
        g_assert_cmpint(errno, ==, EEXIST);
    }
    if (mkfifo(from, 0600) < 0) {
        g_assert_cmpint(errno, ==, EEXIST);
    }
    return g_strdup_printf("exec:exec 3<&0; cat <%s & a=$!; cat <&3 >%s & b=$!;"
                           " exec 3<&-; trap \"kill -9 $a $b\" EXIT TERM;"
                           " wait $a", from, to);
}

/* Or 0 */
static pid_t first_child(pid_t pid)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/task/%d/children",
                                            (int)pid, (int)pid);
    g_autofree char *text = NULL;

    g_assert(g_file_get_contents(path, &text, NULL, NULL));
    return g_ascii_strtoll(text, NULL, 10);
}

/*** An IOMMU that translates ***/

/* Registers, commands and table entries, see hw/i386/intel_iommu_internal.h */
#define IOMMU_BASE          0xfed90000
#define IOMMU_GCMD          (IOMMU_BASE + 0x18)
#define IOMMU_GCMD_TE       (1u << 31)
#define IOMMU_GCMD_SRTP     (1u << 30)
#define IOMMU_RTADDR        (IOMMU_BASE + 0x20)
#define IOMMU_PRESENT       1
#define IOMMU_AW_39BIT      1
#define IOMMU_GIB_PAGE_RW   0x83

/* A page each: all buses, all functions of bus 0, their first 4 GiB */
#define IOMMU_ROOT          (RINGS_START + 1 * MiB)
#define IOMMU_CONTEXT       (IOMMU_ROOT + 4 * KiB)
#define IOMMU_PAGES         (IOMMU_CONTEXT + 4 * KiB)

static void iommu_add_device(QPCIDevice *dev, int devfn, void *opaque)
{
    QTestState *src = opaque;

    qtest_writeq(src, IOMMU_CONTEXT + 16 * devfn, IOMMU_PAGES | IOMMU_PRESENT);
    qtest_writeq(src, IOMMU_CONTEXT + 16 * devfn + 8, IOMMU_AW_39BIT);
    g_free(dev);
}

/* Put the virtio-blk device behind the IOMMU; every address stays the same. */
static void iommu_start(DeviceTest *t)
{
    QTestState *src = t->src.qts;
    QPCIBus *bus = qpci_new_pc(src, NULL);

    qtest_writeq(src, IOMMU_ROOT, IOMMU_CONTEXT | IOMMU_PRESENT);
    qpci_device_foreach(bus, PCI_VENDOR_ID_REDHAT_QUMRANET,
                        PCI_DEVICE_ID_VIRTIO_10_BASE + VIRTIO_ID_BLOCK,
                        iommu_add_device, src);
    qpci_free_pc(bus);
    for (uint64_t i = 0; i < 4; i++) {
        qtest_writeq(src, IOMMU_PAGES + 8 * i, i * GiB | IOMMU_GIB_PAGE_RW);
    }

    qtest_writeq(src, IOMMU_RTADDR, IOMMU_ROOT);
    qtest_writel(src, IOMMU_GCMD, IOMMU_GCMD_SRTP);
    qtest_writel(src, IOMMU_GCMD, IOMMU_GCMD_TE);
}

/* The destination has to ask for a table. */
static void iommu_dirty_tables(DeviceTest *t)
{
    qtest_writeq(t->src.qts, IOMMU_PAGES + 4 * KiB - 8, 0);
}

/*** A disk ***/

static char *disk_opts(void)
{
    g_autofree char *path = tmp_path("disk");

    g_assert(g_file_set_contents(path, path, -1, NULL));
    return g_strdup_printf(" -blockdev file,node-name=file0,filename=%s "
                           "-device virtio-blk-pci,drive=file0", path);
}

/*** The start of a test ***/

static bool has_bitmap(DeviceTest *t)
{
    return t->no_ram_left || t->bitmap_only;
}

/* Bitmaps alone have it since QEMU 10.2, where there is a return path */
static bool has_phase(const DeviceTest *t)
{
    return !t->bitmap_only || (t->return_path &&
           (QEMU_VERSION_MAJOR > 10 || QEMU_VERSION_MINOR >= 2));
}

static void set_capabilities(DeviceTest *t, QTestState *qts)
{
    migrate_set_capability(qts, "postcopy-ram", !t->bitmap_only);
    migrate_set_capability(qts, "postcopy-preempt", t->preempt);
    migrate_set_capability(qts, "multifd", t->multifd);
    migrate_set_capability(qts, "dirty-bitmaps", has_bitmap(t));
    migrate_set_capability(qts, "late-block-activate", t->late_activate);
    migrate_set_capability(qts, "return-path", t->return_path);
    /* No trap works, so the switchover has to wait in another way */
    migrate_set_capability(qts, "pause-before-switchover", t->tls || t->exec);
}

/*
 * Have the migration go on in precopy until it is told otherwise: what is left
 * to be sent must not get below avail-switchover-bandwidth * downtime-limit,
 * and a bitmap counts as many bytes as it has bits.
 */
static void set_parameters(DeviceTest *t, QTestState *qts)
{
    int64_t bandwidth, granularity;

    if (t->full_speed) {
        migrate_set_parameter_int(qts, "max-bandwidth", 0);
        migrate_set_parameter_int(qts, "downtime-limit", 0);
        return;
    }

    if (!has_bitmap(t)) {
        migrate_ensure_non_converge(qts);
        if (t->throttle) {
            /* All of the memory in a second, and it is dirty again */
            migrate_set_parameter_int(qts, "max-bandwidth", 100 * 1000 * 1000);
        }
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

/* Start a migration to @dst, and come back when postcopy may be started. */
static void device_test_migrate(DeviceTest *t, QTestState *dst)
{
    QTestState *src = t->src.qts;
    g_autofree char *uri = t->exec ? exec_uri("back", "forth") :
                           t->tcp ? g_strdup("tcp:127.0.0.1:0") :
                           tmp_uri("migsocket");
    g_autofree char *src_uri = t->exec ? exec_uri("forth", "back") :
                               g_strdup(fault_proxy_uri(t->proxy));

    step("starting the migration");
    set_capabilities(t, src);
    set_capabilities(t, dst);
    migrate_set_capability(src, "release-ram", t->release_ram);
    migrate_set_capability(src, "auto-converge", t->throttle);
    migrate_incoming_qmp(dst, uri, NULL, "{ 'exit-on-error': %i }",
                         !t->no_exit);
    side_init(&t->dst, "destination", dst);
    if (!t->exec) {
        g_free(t->uri);
        t->uri = migrate_get_connect_uri(dst);
        fault_proxy_set_destination(t->proxy, t->uri);
    }

    migrate_prepare_for_dirty_mem(src);
    if (t->no_hold) {
        fault_proxy_change_ping(t->proxy, PING_HOLD, PING_UNKNOWN);
    }
    migrate_qmp(src, dst, src_uri, NULL, "{}");
    expect_statuses(&t->src, "setup", "active", NULL);
    expect_statuses(&t->dst, "active", NULL);
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
    if (t->iommu) {
        iommu_dirty_tables(t);
    }
}

static bool device_test_start(DeviceTest *t, bool hide_stderr)
{
    const char *opts = t->iommu ? IOMMU_OPTS :
                       t->virtio ? VIRTIO_OPTS :
                       t->xhci ? XHCI_OPTS :
                       t->vmgenid ? VMGENID_OPTS :
                       t->log ? NIC_OPTS " " NODE_OPTS : NODE_OPTS;
    g_autofree char *log = t->log ? log_opts() :
                           t->log_discards ? log_discards_opts() : NULL;
    g_autofree char *disk = t->disk ? disk_opts() : g_strdup("");
    g_autofree char *queues = t->queues ?
            g_strdup_printf(",num-queues=%u", t->queues) : g_strdup("");
    const char *more = t->hugetlbfs ? HUGETLBFS_OPTS :
                       t->shared ? SHARED_OPTS :
                       t->old_machine ? OLD_MACHINE_OPTS : "";
    g_autofree char *src_opts = g_strconcat(opts, queues, disk, more, " ", log,
                                            NULL);
    g_autofree char *dst_opts = g_strconcat(opts, queues, disk,
                                            t->virtio_mismatch ?
                                            ",num-queues=2" : "", more,
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
    g_autofree char *uri = t->tcp ? g_strdup("tcp:127.0.0.1:0") :
                           tmp_uri("faultproxy");
    QTestState *src, *dst;

    t->paused |= t->no_ram_left;

    sigaction(SIGALRM, &timeout, NULL);
    step("starting QEMU");
    if (migrate_start(&src, &dst, "defer", &args)) {
        alarm(0);
        return false;
    }

    t->proxy = fault_proxy_new(uri);
    fault_proxy_set_delay(t->proxy, t->tcp ? DELAY_MS : 0);

    set_parameters(t, src);
    if (t->log) {
        migrate_set_parameter_int(src, "announce-rounds", 1);
    }
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
    if (t->iommu) {
        iommu_start(t);
    }
    if (t->paused) {
        qtest_qmp_assert_success(src, "{ 'execute': 'stop' }");
    }

    device_test_migrate(t, dst);
    return true;
}

/*** The way to a point of the stream ***/

/* Come back at once: the link has to run dry before the guest is stopped */
static void request_postcopy(DeviceTest *t)
{
    step("starting postcopy");
    qtest_qmp_assert_success(t->src.qts,
                             "{ 'execute': 'migrate-start-postcopy' }");
}

static void expect_switchover(DeviceTest *t)
{
    expect_statuses(&t->src, "device", NULL);
    if (has_phase(t)) {
        expect_statuses(&t->src, "postcopy-device", NULL);
    }
}

static void start_postcopy(DeviceTest *t)
{
    request_postcopy(t);
    expect_switchover(t);
}

/* The same in two steps, where the proxy finds no point in the stream */
static void pause_before_switchover(DeviceTest *t)
{
    request_postcopy(t);
    expect_statuses(&t->src, "pre-switchover", NULL);
}

static void continue_switchover(DeviceTest *t)
{
    step("continuing the migration");
    migrate_continue(t->src.qts, "pre-switchover");
    expect_switchover(t);
}

/* Start postcopy, and wait until the proxy is in these modes at @t->at. */
static void postcopy_until(DeviceTest *t, FaultProxyMode to_dst,
                           FaultProxyMode to_src, const char *what)
{
    fault_proxy_trap(t->proxy, t->at.point, t->at.value, to_dst, to_src);
    start_postcopy(t);
    step("waiting for %s", what);
    fault_proxy_wait(t->proxy);
}

/* The destination loads everything, but the source does not hear of it. */
static void postcopy_until_loaded(DeviceTest *t)
{
    t->at = (StreamPoint) BEFORE_PONG;
    postcopy_until(t, FAULT_PROXY_FORWARD, FAULT_PROXY_HOLD,
                   "the destination to load the device state");
}

/*
 * Have the main loop of the destination read memory that has not been sent.
 * The request gets through, the page if @to_dst says so.
 */
static void get_stuck(DeviceTest *t, FaultProxyMode to_dst)
{
    fault_proxy_trap(t->proxy, FAULT_PROXY_BEHIND_REQ_PAGES, 0,
                     to_dst, FAULT_PROXY_FORWARD);
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

/*** What becomes of the guest ***/

static void cont(Side *side)
{
    step("cont on the %s", side->name);
    qtest_qmp_assert_success(side->qts, "{ 'execute': 'cont' }");
}

/* It must say what is left to do. */
static void expect_cancel_refused(DeviceTest *t, const char *what)
{
    const char *desc;
    QDict *error;

    step("cancelling");
    error = qtest_qmp_assert_failure_ref(t->src.qts,
                                         "{ 'execute': 'migrate_cancel' }");
    desc = qdict_get_str(error, "desc");
    g_test_message("source: %s", desc);
    g_assert(strstr(desc, what));
    qobject_unref(error);
}

static void cancel(DeviceTest *t)
{
    step("cancelling");
    migrate_cancel(t->src.qts);
    expect_statuses(&t->src, "cancelling", "cancelled", NULL);
}

/* A guest that wakes up boots again.  There is no event for that. */
static void wake_up(Side *side)
{
    g_autofree char *path = tmp_path("src_serial");
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
    if (t->paused || t->stop) {
        check_not_resumed(src, "paused");
        cont(src);
    }
    expect_resume(src);
    if (t->suspended) {
        check_runstate(src, "suspended");
        wake_up(src);
    }
    check_runstate(src, "running");

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

    if (t->at.point >= FAULT_PROXY_BEHIND_PACKAGE) {
        /* It has the package, so it has begun to load */
        expect_statuses(dst, "postcopy-device", NULL);
    }
    expect_statuses(dst, "failed", NULL);
    if (t->no_exit) {
        check_error_desc(dst, word);
        wait_no_migration_threads(dst);
        check_not_resumed(dst, NULL);
    } else {
        step("waiting for the destination to exit");
        qtest_set_expected_status(dst->qts, EXIT_FAILURE);
        qtest_wait_qemu(dst->qts);
    }
}

static void expect_destination_waits(DeviceTest *t)
{
    check_not_resumed(&t->dst, "inmigrate");
    /* There is no event for it, and the status has changed before */
    step("waiting for the destination to let go of its disks");
    while (disks_active(&t->dst)) {
        g_usleep(1000);
    }
}

/* The destination has everything, and cannot know who has the guest. */
static void expect_destination_in_doubt(DeviceTest *t)
{
    expect_statuses(&t->dst, "postcopy-device", "postcopy-paused", NULL);
    expect_destination_waits(t);
}

/* The source may send all of the RAM from here on. */
static void expect_completed(DeviceTest *t)
{
    migrate_set_parameter_int(t->src.qts, "max-postcopy-bandwidth", 0);
    expect_statuses(&t->dst, "completed", NULL);
    expect_statuses(&t->src, "completed", NULL);
}

/* Let everything through; the migration must succeed. */
static void complete(DeviceTest *t)
{
    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    expect_completed(t);
    expect_resume(&t->dst);
    check_runstate(&t->dst, "running");
}

/*** The end of a test ***/

static void device_test_quit(DeviceTest *t, bool check_dst)
{
    static const char *const tmp_files[] = { "disk", "forth", "back", "silent" };

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
    for (int i = 0; i < ARRAY_SIZE(tmp_files); i++) {
        g_autofree char *path = tmp_path(tmp_files[i]);

        unlink(path);
    }
    g_queue_clear_full(&t->src.statuses, g_free);
    g_queue_clear_full(&t->dst.statuses, g_free);
    g_free(t->uri);
    alarm(0);
}

/* The guest must run on the destination, and only there. */
static void end_on_destination(DeviceTest *t)
{
    wait_no_migration_threads(&t->src);
    check_not_resumed(&t->src, "postmigrate");
    device_test_quit(t, true);
}

/* The guest must run on the source. */
static void end_on_source(DeviceTest *t)
{
    step("checking the guest on the source");
    g_assert(migrate_has_marker(t->src.qts));
    migrate_check_guest(t->src.qts);
    device_test_quit(t, false);
}

/* The same, and it has not noticed anything. */
static void end_never_stopped(DeviceTest *t)
{
    wait_no_migration_threads(&t->src);
    g_assert_false(t->src.stopped);
    check_runstate(&t->src, "running");
    expect_destination_fails(t, NULL);
    end_on_source(t);
}

/*** Success ***/

static void hold_pong(DeviceTest *t)
{
    postcopy_until_loaded(t);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    /* It is not postcopy-active before the destination says so */
    check_migration_status(&t->src, "postcopy-device");
    check_runstate(&t->src, "finish-migrate");
}

static void run_success(DeviceTest *t)
{
    hold_pong(t);
    complete(t);
    g_assert(migrate_has_marker(t->src.qts) != t->release_ram);
    end_on_destination(t);
}

/* A guest that is paused dirties nothing while the link is drained */
static void run_discards(DeviceTest *t)
{
    hold_pong(t);
    complete(t);
    wait_no_migration_threads(&t->src);
    check_discards();
    end_on_destination(t);
}

/*
 * A lost START could not be made good by a recovery: the source does not wait
 * for the destination, as ever.
 */
static void run_bitmap_only(DeviceTest *t)
{
    start_postcopy(t);
    expect_statuses(&t->src, "postcopy-active", "completed", NULL);
    if (has_phase(t)) {
        expect_statuses(&t->dst, "postcopy-device", NULL);
    }
    expect_statuses(&t->dst, "postcopy-active", "completed", NULL);
    expect_resume(&t->dst);
    check_bitmap(&t->dst);
    end_on_destination(t);
}

static void run_late_activate(DeviceTest *t)
{
    hold_pong(t);
    g_assert_false(disks_active(&t->dst));
    complete(t);
    g_assert(disks_active(&t->dst));
    end_on_destination(t);
}

/* Management may say 'cont' at any time. */
static void run_cont(DeviceTest *t)
{
    hold_pong(t);
    if (t->early_cont) {
        cont(&t->dst);
    }
    check_not_resumed(&t->dst, "inmigrate");
    g_assert(disks_active(&t->dst) != t->late_activate);

    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    if (!t->early_cont) {
        check_not_resumed(&t->dst, "paused");
        g_assert(disks_active(&t->dst) != t->late_activate);
        cont(&t->dst);
    }
    expect_resume(&t->dst);
    g_assert(disks_active(&t->dst));

    expect_completed(t);
    end_on_destination(t);
}

/* What is reported as downtime is no less than what the guest has seen. */
static void run_downtime(DeviceTest *t)
{
    hold_pong(t);
    /* The guest has stopped: from here it stands still for so long */
    g_usleep(2 * G_USEC_PER_SEC);
    g_assert_false(shows_downtime(&t->src));
    complete(t);
    g_assert(shows_downtime(&t->src));
    g_assert_cmpint(read_migrate_property_int(t->src.qts, "downtime"), >=,
                    2000);
    end_on_destination(t);
}

/*** The link runs dry before the guest is stopped ***/

/* The destination has everything but the request to hold the guest. */
static void drain_until_hold(DeviceTest *t)
{
    int64_t sent;

    fault_proxy_trap(t->proxy, FAULT_PROXY_BEFORE_PING, PING_HOLD,
                     FAULT_PROXY_HOLD, FAULT_PROXY_FORWARD);
    request_postcopy(t);
    step("waiting for the request to hold the guest");
    fault_proxy_wait(t->proxy);

    check_migration_status(&t->src, "active");
    sent = read_ram_property_int(t->src.qts, "transferred");
    /* The guest goes on */
    migrate_wait_for_dirty_mem(t->src.qts, t->src.qts);
    /* The request itself may not have been counted yet */
    g_assert_cmpint(read_ram_property_int(t->src.qts, "transferred") - sent, <,
                    KiB);
    check_runstate(&t->src, "running");
    g_assert_false(t->src.stopped);
}

static void run_drain(DeviceTest *t)
{
    drain_until_hold(t);
    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_switchover(t);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    complete(t);
    end_on_destination(t);
}

static void run_drain_cut(DeviceTest *t)
{
    drain_until_hold(t);
    fault_proxy_cut(t->proxy);
    expect_statuses(&t->src, "failed", NULL);
    check_error_desc(&t->src, NULL);
    end_never_stopped(t);
}

static void run_drain_cancel(DeviceTest *t)
{
    drain_until_hold(t);
    cancel(t);
    fault_proxy_cut(t->proxy);
    end_never_stopped(t);
}

/* A migration that is through with precopy does not wait. */
static void run_drain_precopy(DeviceTest *t)
{
    fault_proxy_trap(t->proxy, FAULT_PROXY_BEFORE_PING, PING_HOLD,
                     FAULT_PROXY_STALL, FAULT_PROXY_STALL);
    step("waiting for precopy to end");
    migrate_ensure_converge(t->src.qts);
    expect_statuses(&t->src, "device", "completed", NULL);
    expect_statuses(&t->dst, "completed", NULL);
    expect_resume(&t->dst);
    end_on_destination(t);
}

/*** Pages that the load of a device accesses are sent ahead ***/

static void run_ahead(DeviceTest *t)
{
    if (t->queues) {
        dirty_queues(t);
    }
    if (t->vapic) {
        dirty_vapic(t);
    }
    postcopy_until_loaded(t);
    g_test_message("%u requests", fault_proxy_requests(t->proxy));
    if (t->iommu) {
        /* What is in the way are its tables, and it gets them */
        g_assert_cmpuint(fault_proxy_requests(t->proxy), >, 0);
    } else {
        g_assert_cmpuint(fault_proxy_requests(t->proxy), ==, 0);
    }
    expect_statuses(&t->dst, "postcopy-device", NULL);
    if (t->no_hold) {
        expect_statuses(&t->dst, "postcopy-active", NULL);
        fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD,
                             FAULT_PROXY_FORWARD);
        expect_statuses(&t->src, "postcopy-active", NULL);
        expect_completed(t);
    } else {
        complete(t);
    }
    end_on_destination(t);
}

/*
 * In the phase the source sends what is asked for, once.  Each request comes
 * twice here.
 */
static void run_requested_only(DeviceTest *t)
{
    static const char loaded[] = RP_PONG "\0\0\0\x42";
    unsigned requests;
    uint64_t bytes;

    migrate_set_parameter_int(t->src.qts, "max-postcopy-bandwidth", 0);
    fault_proxy_swallow_pong(t->proxy, PING_LOADED);
    start_postcopy(t);
    step("waiting for the destination to load the device state");
    fault_proxy_wait(t->proxy);
    expect_statuses(&t->dst, "postcopy-device", NULL);

    requests = fault_proxy_requests(t->proxy);
    bytes = fault_proxy_bytes(t->proxy);
    fault_proxy_repeat_requests(t->proxy);
    get_stuck(t, FAULT_PROXY_FORWARD);
    get_unstuck(t);
    requests = fault_proxy_requests(t->proxy) - requests;
    bytes = fault_proxy_bytes(t->proxy) - bytes;
    g_test_message("%u requests, %" PRIu64 " bytes", requests, bytes);
    g_assert_cmpuint(requests, >, 10);
    g_assert_cmpuint(bytes, <, requests * (qemu_real_host_page_size() + KiB));

    fault_proxy_insert(t->proxy, loaded, sizeof(loaded) - 1);
    complete(t);
    end_on_destination(t);
}

/*** The link breaks ***/

static void cut_link(DeviceTest *t)
{
    postcopy_until(t, FAULT_PROXY_HOLD, FAULT_PROXY_HOLD, "the package");
    check_migration_status(&t->src, "postcopy-device");
    check_runstate(&t->src, "finish-migrate");
    if (t->stop) {
        qtest_qmp_assert_success(t->src.qts, "{ 'execute': 'stop' }");
    }
    fault_proxy_cut(t->proxy);
    expect_source_resumes(t);
}

static void run_cut(DeviceTest *t)
{
    cut_link(t);
    expect_destination_fails(t, NULL);
    end_on_source(t);
}

/*
 * The source cannot tell whether the destination has loaded everything, so it
 * takes the guest back.  Whether the destination has or not, it does not run
 * the guest.
 */
static void run_cut_behind_package(DeviceTest *t)
{
    Side *dst = &t->dst;

    cut_link(t);
    step("waiting for the destination to notice");
    while (g_queue_get_length(&dst->statuses) < 2) {
        side_wait_event(dst);
    }
    if (g_str_equal(g_queue_peek_nth(&dst->statuses, 1), "failed")) {
        expect_destination_fails(t, NULL);
    } else {
        expect_destination_in_doubt(t);
    }
    end_on_source(t);
}

/*** Nothing moves, nothing breaks ***/

/* Both sides must answer, and go on as if nothing had been. */
static void run_stall(DeviceTest *t)
{
    postcopy_until(t, FAULT_PROXY_STALL, FAULT_PROXY_STALL,
                   "the link to be stalled");
    check_qmp_answers(&t->src);
    check_qmp_answers(&t->dst);

    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    complete(t);
    end_on_destination(t);
}

/* Nothing moves any more while the source sends what is left of the RAM. */
static void run_stall_completion(DeviceTest *t)
{
    int64_t first, before, sent;

    hold_pong(t);
    first = sent = read_ram_property_int(t->src.qts, "transferred");
    /* All that is left counts as little enough to complete the migration */
    migrate_set_parameter_int(t->src.qts, "downtime-limit", 2000 * 1000);
    fault_proxy_set_mode(t->proxy, FAULT_PROXY_STALL, FAULT_PROXY_FORWARD);
    expect_statuses(&t->src, "postcopy-active", NULL);
    do {
        before = sent;
        /* Nothing tells when the source can send no more */
        g_usleep(200 * 1000);
        check_qmp_answers(&t->src);
        sent = read_ram_property_int(t->src.qts, "transferred");
    } while (sent != before || sent < first + MiB / 8);

    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    expect_completed(t);
    expect_resume(&t->dst);
    end_on_destination(t);
}

/* The destination freezes when the package is on its way */
static void freeze(DeviceTest *t)
{
    t->at = (StreamPoint) BEFORE_PACKAGE;
    postcopy_until(t, FAULT_PROXY_HOLD, FAULT_PROXY_FORWARD, "the package");
    step("freezing the destination");
    kill(qtest_pid(t->dst.qts), SIGSTOP);
    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
}

static void run_stall_frozen(DeviceTest *t)
{
    freeze(t);
    check_qmp_answers(&t->src);

    kill(qtest_pid(t->dst.qts), SIGCONT);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    complete(t);
    end_on_destination(t);
}

#define YANK_MIGRATION \
    "'id': 'yank', 'arguments': { 'instances': [ { 'type': 'migration' } ] } }"

static void yank(DeviceTest *t, Side *side)
{
    step("yank on the %s", side->name);
    qtest_qmp_assert_success(side->qts, t->oob ?
                             "{ 'exec-oob': 'yank', " YANK_MIGRATION :
                             "{ 'execute': 'yank', " YANK_MIGRATION);
}

static void run_yank_source(DeviceTest *t)
{
    postcopy_until(t, FAULT_PROXY_STALL, FAULT_PROXY_STALL, "the package");
    check_migration_status(&t->src, "postcopy-device");
    yank(t, &t->src);
    expect_source_resumes(t);
    fault_proxy_cut(t->proxy);
    expect_destination_fails(t, NULL);
    end_on_source(t);
}

static void run_yank_destination(DeviceTest *t)
{
    postcopy_until(t, FAULT_PROXY_HOLD, FAULT_PROXY_FORWARD,
                   "the destination to wait");
    yank(t, &t->dst);
    expect_destination_fails(t, NULL);
    expect_source_resumes(t);
    end_on_source(t);
}

/*** The destination dies ***/

static void run_kill(DeviceTest *t)
{
    postcopy_until(t, FAULT_PROXY_HOLD, FAULT_PROXY_HOLD, "the package");
    step("killing the destination");
    qtest_crash_qemu(t->dst.qts);
    /* Let the source know */
    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_source_resumes(t);
    end_on_source(t);
}

/*** The device state does not load ***/

static void run_load_error_exec(DeviceTest *t)
{
    pause_before_switchover(t);
    continue_switchover(t);
    expect_destination_fails(t, NULL);
    expect_source_resumes(t);
    end_on_source(t);
}

static void run_load_error(DeviceTest *t)
{
    if (!t->virtio_mismatch) {
        fault_proxy_spoil_section(t->proxy, SPOILED_SECTION);
    }
    postcopy_until(t, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD, "the package");
    expect_destination_fails(t, t->virtio_mismatch ? "virtio-blk" :
                                                     SPOILED_SECTION);
    expect_source_resumes(t);
    end_on_source(t);
}

/*** One owner: the destination has the guest when the source says so ***/

static void run_cut_before_pong(DeviceTest *t)
{
    cut_link(t);
    expect_destination_in_doubt(t);
    if (t->wait_for_cont) {
        /* The user has said that the guest may run, but the source has not */
        cont(&t->dst);
        expect_destination_waits(t);
    }
    end_on_source(t);
}

static void start_recovery(DeviceTest *t)
{
    step("recovering");
    migrate_recover(t->dst.qts, t->uri);
    migrate_qmp(t->src.qts, t->dst.qts, fault_proxy_uri(t->proxy), NULL,
                "{ 'resume': true }");
    expect_statuses(&t->src, "postcopy-recover-setup", "postcopy-recover",
                    NULL);
    expect_statuses(&t->dst, "postcopy-recover", NULL);
}

static void recover(DeviceTest *t)
{
    start_recovery(t);
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-device", NULL);
}

/* What the destination is sent before it may start must not be dropped. */
static void run_requested_cut(DeviceTest *t)
{
    fault_proxy_swallow_pong(t->proxy, PING_LOADED);
    start_postcopy(t);
    step("waiting for the destination to load the device state");
    fault_proxy_wait(t->proxy);
    get_stuck(t, FAULT_PROXY_FORWARD);
    get_unstuck(t);

    fault_proxy_cut(t->proxy);
    expect_source_resumes(t);
    expect_destination_in_doubt(t);
    end_on_source(t);
}

/* START is on its way, but does not arrive. */
static void cut_before_start(DeviceTest *t)
{
    fault_proxy_cut(t->proxy);
    expect_statuses(&t->src, "postcopy-paused", NULL);
    expect_statuses(&t->dst, "postcopy-paused", NULL);
    expect_destination_waits(t);
    /* The source has let go of the guest for good */
    expect_cancel_refused(t, "the destination has the guest");
    check_not_resumed(&t->src, NULL);
    g_assert_false(shows_downtime(&t->src));
}

/* The source has let go of the guest, but the destination has not heard it. */
static void run_cut_behind_pong(DeviceTest *t)
{
    postcopy_until(t, FAULT_PROXY_HOLD, FAULT_PROXY_HOLD,
                   "the link to be held");
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    cut_before_start(t);

    if (t->cut_twice) {
        fault_proxy_trap(t->proxy, FAULT_PROXY_BEFORE_PING, PING_START,
                         FAULT_PROXY_HOLD, FAULT_PROXY_HOLD);
        recover(t);
        step("waiting for the link to be held");
        fault_proxy_wait(t->proxy);
        cut_before_start(t);
    }

    recover(t);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    expect_completed(t);
    expect_resume(&t->dst);
    g_assert(shows_downtime(&t->src));
    end_on_destination(t);
}

/* The second connection does not get to the destination. */
static void run_withheld(DeviceTest *t)
{
    fault_proxy_withhold(t->proxy, true);
    postcopy_until(t, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD, "the package");
    check_qmp_answers(&t->src);
    check_qmp_answers(&t->dst);
    fault_proxy_cut(t->proxy);
    expect_source_resumes(t);
    expect_statuses(&t->dst, "failed", NULL);
    check_not_resumed(&t->dst, NULL);
    end_on_source(t);
}

/* The same, in a recovery. */
static void run_withheld_recover(DeviceTest *t)
{
    postcopy_until(t, FAULT_PROXY_HOLD, FAULT_PROXY_HOLD,
                   "the link to be held");
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    cut_before_start(t);

    fault_proxy_withhold(t->proxy, true);
    start_recovery(t);
    step("waiting for the second connection");
    fault_proxy_wait_withheld(t->proxy);
    check_qmp_answers(&t->src);
    check_qmp_answers(&t->dst);
    fault_proxy_withhold(t->proxy, false);
    cut_before_start(t);

    recover(t);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    expect_completed(t);
    expect_resume(&t->dst);
    end_on_destination(t);
}

/*
 * The source has let go of the guest, and notices that the link is lost; the
 * destination does not.  The user has to tell it.
 */
static void run_pause_prepared(DeviceTest *t)
{
    postcopy_until(t, FAULT_PROXY_HOLD, FAULT_PROXY_HOLD,
                   "the link to be held");
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    fault_proxy_cut_source(t->proxy);
    expect_statuses(&t->src, "postcopy-paused", NULL);
    check_migration_status(&t->dst, "postcopy-device");

    step("pausing the destination");
    migrate_pause(t->dst.qts);
    expect_statuses(&t->dst, "postcopy-paused", NULL);
    expect_destination_waits(t);
    fault_proxy_cut(t->proxy);

    recover(t);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    expect_completed(t);
    expect_resume(&t->dst);
    end_on_destination(t);
}

/* A recovery whose link is silent from the beginning: the guest must not mind. */
static void run_pause_recovering(DeviceTest *t)
{
    postcopy_until(t, FAULT_PROXY_HOLD, FAULT_PROXY_HOLD,
                   "the link to be held");
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    cut_before_start(t);

    fault_proxy_set_mode(t->proxy, FAULT_PROXY_STALL, FAULT_PROXY_STALL);
    start_recovery(t);
    check_qmp_answers(&t->dst);

    step("pausing the destination");
    migrate_pause(t->dst.qts);
    expect_statuses(&t->dst, "postcopy-paused", NULL);
    fault_proxy_cut(t->proxy);
    expect_statuses(&t->src, "postcopy-paused", NULL);

    recover(t);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    expect_completed(t);
    expect_resume(&t->dst);
    end_on_destination(t);
}

/* Somebody else comes first, and has only the end of a migration to tell. */
static void run_recover_stray(DeviceTest *t)
{
    g_autoptr(SocketAddress) addr = socket_parse(t->uri, &error_abort);
    int fd;

    postcopy_until(t, FAULT_PROXY_HOLD, FAULT_PROXY_HOLD,
                   "the link to be held");
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    cut_before_start(t);

    step("connecting to the destination");
    migrate_recover(t->dst.qts, t->uri);
    fd = socket_connect(addr, &error_abort);
    g_assert_cmpint(write(fd, "", 1), ==, 1);
    expect_statuses(&t->dst, "postcopy-recover", "postcopy-paused", NULL);
    close(fd);

    recover(t);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    expect_completed(t);
    expect_resume(&t->dst);
    end_on_destination(t);
}

/*
 * A destination that cannot be held has run the guest: the disk is not as the
 * source knows it, even when it is free again.
 */
static void run_in_doubt_no_hold(DeviceTest *t)
{
    postcopy_until_loaded(t);
    expect_statuses(&t->dst, "postcopy-device", "postcopy-active", NULL);
    expect_resume(&t->dst);
    fault_proxy_cut(t->proxy);
    expect_statuses(&t->src, "postcopy-paused", NULL);
    check_error_desc(&t->src, "boot the guest from its disks");
    g_assert_false(shows_downtime(&t->src));

    step("killing the destination");
    qtest_crash_qemu(t->dst.qts);
    expect_cancel_refused(t, "boot the guest from its disks");
    check_migration_status(&t->src, "postcopy-paused");
    check_not_resumed(&t->src, "finish-migrate");
    device_test_quit(t, false);
}

/* Everything has arrived, but the source does not know that. */
static void run_cut_before_shut(DeviceTest *t)
{
    migrate_set_parameter_int(t->src.qts, "max-postcopy-bandwidth", 0);
    postcopy_until(t, FAULT_PROXY_HOLD, FAULT_PROXY_HOLD,
                   "the destination to have received everything");
    fault_proxy_cut(t->proxy);
    expect_statuses(&t->src, "postcopy-active", "postcopy-paused", NULL);
    check_not_resumed(&t->src, NULL);
    expect_statuses(&t->dst, "postcopy-device", "postcopy-active", "completed",
                    NULL);
    expect_resume(&t->dst);
    device_test_quit(t, true);
}

/*** The user cancels the migration ***/

static void run_cancel_active(DeviceTest *t)
{
    if (t->multifd) {
        qobject_unref(qtest_qmp_assert_failure_ref(
            t->src.qts, "{ 'execute': 'migrate-set-parameters',"
                        "  'arguments': { 'multifd-channels': 255 } }"));
    }
    cancel(t);
    end_never_stopped(t);
}

/* All channels are full, and the destination neither reads nor closes them. */
static void run_cancel_stalled(DeviceTest *t)
{
    int64_t sent, now = 0;

    kill(qtest_pid(t->dst.qts), SIGSTOP);
    fault_proxy_set_mode(t->proxy, FAULT_PROXY_STALL, FAULT_PROXY_STALL);
    step("waiting for the channels to be full");
    do {
        sent = now;
        g_usleep(500 * 1000);
        now = read_ram_property_int(t->src.qts, "transferred");
    } while (now != sent);
    cancel(t);
    kill(qtest_pid(t->dst.qts), SIGCONT);
    fault_proxy_cut(t->proxy);
    end_never_stopped(t);
}

/* The destination is frozen; when it thaws it must not run the guest. */
static void run_cancel_frozen(DeviceTest *t)
{
    g_autofree char *status = NULL;

    freeze(t);
    cancel(t);
    expect_guest_back(t);
    kill(qtest_pid(t->dst.qts), SIGCONT);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    step("waiting for the destination to find the link broken");
    /* By then it may have loaded the devices */
    status = next_status(&t->dst);
    if (!g_str_equal(status, "failed")) {
        g_assert_cmpstr(status, ==, "postcopy-paused");
    }
    check_not_resumed(&t->dst, NULL);
    end_on_source(t);
}

static void run_cancel_before_pong(DeviceTest *t)
{
    postcopy_until_loaded(t);
    cancel(t);
    expect_guest_back(t);
    fault_proxy_cut(t->proxy);
    expect_destination_in_doubt(t);
    end_on_source(t);
}

/* Nothing but the end of the processes would break the link. */
static void run_cancel_exec(DeviceTest *t)
{
    pause_before_switchover(t);
    step("freezing the destination");
    kill(qtest_pid(t->dst.qts), SIGSTOP);
    continue_switchover(t);

    expect_cancel_refused(t, "end the process that carries it");
    check_qmp_answers(&t->src);

    step("ending the processes that carry the stream");
    {
        pid_t shell = first_child(qtest_pid(t->src.qts));
        pid_t back = first_child(shell);

        kill(shell, SIGKILL);
        kill(back, SIGKILL);
    }
    expect_source_resumes(t);
    /* What has got through may be all of the package, or not */
    qtest_crash_qemu(t->dst.qts);
    end_on_source(t);
}

/* Before the guest is stopped it is granted: the processes are ended then. */
static void run_cancel_exec_drain(DeviceTest *t)
{
    /* What comes back is carried by the first child of the shell */
    step("freezing what carries the answers");
    kill(first_child(first_child(qtest_pid(t->src.qts))), SIGSTOP);
    request_postcopy(t);
    wait_log_and_sleep(&t->src, "postcopy_start ");
    cancel(t);
    end_never_stopped(t);
}

static void expect_cancel_no_hold_refused(DeviceTest *t)
{
    expect_cancel_refused(t, "stop it");
    check_migration_status(&t->src, "postcopy-device");
    check_runstate(&t->src, "finish-migrate");
}

/* The guest may run there already, so it must not be given back. */
static void run_cancel_no_hold(DeviceTest *t)
{
    hold_pong(t);
    expect_statuses(&t->dst, "postcopy-active", NULL);
    expect_resume(&t->dst);
    expect_cancel_no_hold_refused(t);

    fault_proxy_set_mode(t->proxy, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_completed(t);
    end_on_destination(t);
}

/*
 * The source asks again, so that such a destination has something to read; if
 * it understands that now, it is too late to begin with it.
 */
static void run_ask_again(DeviceTest *t)
{
    static const char loaded[] = RP_PONG "\0\0\0\x42";

    fault_proxy_swallow_pong(t->proxy, PING_LOADED);
    start_postcopy(t);
    step("waiting for the destination to load the device state");
    fault_proxy_wait(t->proxy);
    expect_statuses(&t->dst, "postcopy-device", "postcopy-active", NULL);
    expect_resume(&t->dst);

    fault_proxy_trap(t->proxy, FAULT_PROXY_BEHIND_PONG, PING_HOLD,
                     FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    step("waiting for the source to ask again");
    fault_proxy_wait(t->proxy);
    expect_cancel_no_hold_refused(t);

    fault_proxy_insert(t->proxy, loaded, sizeof(loaded) - 1);
    expect_statuses(&t->src, "postcopy-active", NULL);
    expect_completed(t);
    end_on_destination(t);
}

/*** Notifications: what the source has to do in tests of the other themes ***/

#define LOG_SWITCHOVER \
    "setup", NOTIFY_SETUP, "active", "device", "postcopy-device"

static const char *const log_success[] = {
    "running", LOG_SWITCHOVER, "postcopy-active", NOTIFY_DONE, "completed", NULL
};

static const char *const log_cut[] = {
    "running", LOG_SWITCHOVER, "failed", NOTIFY_FAILED, "running", "announce",
    NULL
};

static const char *const log_cancel[] = {
    "running", LOG_SWITCHOVER, "cancelling", NOTIFY_FAILED, "running",
    "announce", "cancelled", NULL
};

static const char *const log_recover[] = {
    "running", LOG_SWITCHOVER, "postcopy-active", NOTIFY_DONE,
    "postcopy-paused", "postcopy-recover-setup", "postcopy-recover",
    "postcopy-active", "completed", NULL
};

static const char *const log_retry[] = {
    "running", LOG_SWITCHOVER, "failed", NOTIFY_FAILED, "running", "announce",
    LOG_SWITCHOVER, "postcopy-active", NOTIFY_DONE, "completed", NULL
};


/* The guest is never stopped in these two */
static const char *const log_cancel_drain[] = {
    "running", "setup", NOTIFY_SETUP, "active", "cancelling", NOTIFY_FAILED,
    "cancelled", NULL
};

static const char *const log_preempt_lost[] = {
    "running", "setup", NOTIFY_SETUP, "active", "failed", NOTIFY_FAILED, NULL
};

/*** The source quits ***/

/* It is gone before it has told the destination to start the guest. */
static void run_quit(DeviceTest *t)
{
    gint64 start;

    postcopy_until(t, FAULT_PROXY_STALL, FAULT_PROXY_STALL,
                   "the link to be stalled");

    step("quitting the source");
    start = g_get_monotonic_time();
    qtest_qmp_assert_success(t->src.qts, "{ 'execute': 'quit' }");
    qtest_wait_qemu(t->src.qts);
    g_test_message("the source needed %d ms to end",
                   (int)(g_get_monotonic_time() - start) / 1000);
    g_assert_cmpint(g_get_monotonic_time() - start, <, 5 * G_USEC_PER_SEC);

    /* Let the destination know */
    fault_proxy_cut(t->proxy);
    if (t->at.point == FAULT_PROXY_IN_PACKAGE) {
        expect_destination_fails(t, NULL);
    } else {
        expect_destination_in_doubt(t);
    }
    device_test_quit(t, false);
}

/*** TLS: the link has modes, but no points ***/

static void switch_over_tls(DeviceTest *t, FaultProxyMode to_dst,
                            FaultProxyMode to_src)
{
    pause_before_switchover(t);
    fault_proxy_set_mode(t->proxy, to_dst, to_src);
    continue_switchover(t);
}

static void run_tls_success(DeviceTest *t)
{
    switch_over_tls(t, FAULT_PROXY_FORWARD, FAULT_PROXY_FORWARD);
    expect_statuses(&t->dst, "postcopy-device", NULL);
    complete(t);
    end_on_destination(t);
}

/* The destination waits for the package, the source for the PONG. */
static void run_tls_cut_package(DeviceTest *t)
{
    switch_over_tls(t, FAULT_PROXY_HOLD, FAULT_PROXY_FORWARD);
    check_migration_status(&t->src, "postcopy-device");
    fault_proxy_cut(t->proxy);
    expect_source_resumes(t);
    expect_destination_fails(t, NULL);
    end_on_source(t);
}

/* The destination has loaded everything, and cannot say so. */
static void run_tls_cut_pong(DeviceTest *t)
{
    switch_over_tls(t, FAULT_PROXY_FORWARD, FAULT_PROXY_HOLD);
    step("waiting for the destination to load the device state");
    while (!disks_active(&t->dst)) {
        g_usleep(1000);
    }
    check_migration_status(&t->src, "postcopy-device");
    fault_proxy_cut(t->proxy);
    expect_source_resumes(t);
    expect_destination_in_doubt(t);
    end_on_source(t);
}

static void run_tls_yank(DeviceTest *t)
{
    switch_over_tls(t, FAULT_PROXY_HOLD, FAULT_PROXY_HOLD);
    yank(t, &t->src);
    expect_source_resumes(t);
    fault_proxy_cut(t->proxy);
    expect_destination_fails(t, NULL);
    end_on_source(t);
}

/* The second connection breaks in its handshake. */
/* The second connection is accepted, but nobody answers there. */
static void run_tls_preempt_silent(DeviceTest *t)
{
    fault_proxy_withhold(t->proxy, true);
    request_postcopy(t);
    step("waiting for the second connection");
    fault_proxy_wait_withheld(t->proxy);
    check_qmp_answers(&t->src);
    cancel(t);
    end_never_stopped(t);
}

/* Nobody answers from the beginning. */
static void run_tls_silent(DeviceTest *t)
{
    g_autofree char *uri = tmp_uri("silent");
    g_autoptr(SocketAddress) addr = socket_parse(uri, &error_abort);
    int fd = socket_listen(addr, 1, &error_abort);
    int peer;
    char byte;

    cancel(t);
    expect_destination_fails(t, NULL);
    wait_no_migration_threads(&t->src);

    step("migrating again");
    migrate_qmp(t->src.qts, NULL, uri, NULL, "{}");
    expect_statuses(&t->src, "setup", NULL);
    step("waiting for the handshake to begin");
    peer = accept(fd, NULL, NULL);
    g_assert_cmpint(read(peer, &byte, 1), ==, 1);
    check_qmp_answers(&t->src);
    yank(t, &t->src);
    expect_statuses(&t->src, "failed", NULL);
    close(peer);
    close(fd);
    g_assert_false(t->src.stopped);
    end_on_source(t);
}

static void run_tls_preempt_lost(DeviceTest *t)
{
    fault_proxy_withhold(t->proxy, true);
    request_postcopy(t);
    step("waiting for the second connection");
    fault_proxy_wait_withheld(t->proxy);
    wait_log_and_sleep(&t->src, "postcopy_device_drained ");
    fault_proxy_end_withheld(t->proxy);
    expect_statuses(&t->src, "failed", NULL);
    check_error_desc(&t->src, NULL);
    end_never_stopped(t);
}

/*** The next migration ***/

static void run_retry(DeviceTest *t)
{
    MigrateStart args = { .only_target = true };
    QTestState *dst;

    if (t->throttle) {
        step("waiting for the source to throttle its CPUs");
        while (!throttled(&t->src)) {
            g_usleep(1000);
        }
    }
    cut_link(t);
    expect_destination_fails(t, NULL);

    step("starting another destination");
    qtest_quit(t->dst.qts);
    g_queue_clear_full(&t->dst.statuses, g_free);
    migrate_start(&t->src.qts, &dst, "defer", &args);
    /* It is not to do the same again */
    t->throttle = false;
    device_test_migrate(t, dst);
    g_assert_false(throttled(&t->src));
    run_success(t);
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
 * The destination is a socket that just says HELD.  Each time the source hears
 * that it is gone, it is told to migrate again, without any wait in between.
 */
static void run_retry_at_once(DeviceTest *t)
{
    static const char held[] = RP_PONG "HELD";
    g_autofree char *path = tmp_path("migsocket");
    int fd;

    cut_link(t);
    expect_destination_fails(t, NULL);

    fd = listen_at(path);
    for (int i = 0; i < 30; i++) {
        int conn;

        step("migration %d", i);
        migrate_qmp(t->src.qts, NULL, fault_proxy_uri(t->proxy), NULL, "{}");
        fault_proxy_set_mode(t->proxy, FAULT_PROXY_DROP, FAULT_PROXY_FORWARD);
        /* Now the proxy has both ends, and can cut them */
        conn = accept(fd, NULL, NULL);
        g_assert_cmpint(send(conn, held, sizeof(held) - 1, 0), ==,
                        sizeof(held) - 1);
        expect_statuses(&t->src, "setup", "active", NULL);
        start_postcopy(t);
        fault_proxy_cut(t->proxy);
        close(conn);
        expect_statuses(&t->src, "failed", NULL);
        if (i % 2) {
            /* What has to be undone must not be forgotten by this */
            migrate_set_capability(t->src.qts, "auto-converge", i % 4 == 1);
        }
    }
    close(fd);

    expect_guest_back(t);
    end_on_source(t);
}

/*** The tests ***/

/* It is in the set that always runs */
#define SMOKE   (1 << 0)
/* No side reports an error, so what they print is shown */
#define CLEAN   (1 << 1)

typedef struct TestCase {
    /* Below /ARCH/migration/postcopy-device/ */
    const char *path;
    void (*run)(DeviceTest *t);
    unsigned flags;
    DeviceTest options;
} TestCase;

static const TestCase tests[] = {
    /* Success */
    { "plain", run_success, SMOKE | CLEAN },
    { "preempt/plain", run_success, CLEAN, { .preempt = true } },
    { "no-ram-left", run_success, CLEAN, { .no_ram_left = true } },
    { "release-ram/plain", run_success, CLEAN, { .release_ram = true } },
    { "release-ram/no-ram-left", run_success, CLEAN,
      { .release_ram = true, .no_ram_left = true } },
    { "bitmap-only/plain", run_bitmap_only, CLEAN, { .bitmap_only = true } },
    { "bitmap-only/return-path", run_bitmap_only, CLEAN,
      { .bitmap_only = true, .return_path = true } },
    { "bitmap-only/cut", run_cut, 0,
      { .at = IN_PACKAGE, .bitmap_only = true, .return_path = true } },
    { "bitmap-only/load-error", run_load_error, 0,
      { .at = BEHIND_PACKAGE, .bitmap_only = true, .return_path = true } },
    { "bitmap-only/kill", run_kill, 0,
      { .at = PACKAGE_END, .bitmap_only = true, .return_path = true } },
    { "bitmap-only/cancel", run_cancel_no_hold, CLEAN,
      { .bitmap_only = true, .return_path = true } },
    { "late-activate/plain", run_late_activate, CLEAN,
      { .late_activate = true } },
    { "cont/before-start", run_cont, CLEAN,
      { .wait_for_cont = true, .early_cont = true } },
    { "cont/behind-start", run_cont, CLEAN, { .wait_for_cont = true } },
    { "cont/late-activate", run_cont, CLEAN,
      { .wait_for_cont = true, .late_activate = true } },
    { "downtime", run_downtime, CLEAN },

    /* The link runs dry before the guest is stopped */
    { "drain/plain", run_drain, CLEAN },
    { "drain/preempt", run_drain, CLEAN, { .preempt = true } },
    { "drain/precopy", run_drain_precopy, CLEAN },
    { "drain/cut/plain", run_drain_cut },
    { "drain/cut/preempt", run_drain_cut, 0, { .preempt = true } },
    { "drain/cancel/plain", run_drain_cancel },
    { "drain/cancel/preempt", run_drain_cancel, 0, { .preempt = true } },

    /* Pages are sent ahead */
    { "ahead/discards", run_discards, 0,
      { .paused = true, .log_discards = true } },
    { "ahead/virtio", run_ahead, CLEAN, { .virtio = true } },
    { "ahead/queues", run_ahead, CLEAN, { .virtio = true, .queues = 512 } },
    { "ahead/xhci", run_ahead, CLEAN, { .xhci = true } },
    { "ahead/vmgenid", run_ahead, CLEAN, { .vmgenid = true } },
    { "ahead/vapic", run_ahead, CLEAN, { .vapic = true } },
    { "ahead/preempt", run_ahead, CLEAN, { .virtio = true, .preempt = true } },
    { "ahead/no-hold", run_ahead, CLEAN, { .virtio = true, .no_hold = true } },
    { "ahead/hugetlbfs", run_ahead, CLEAN,
      { .virtio = true, .hugetlbfs = true } },
    { "ahead/iommu/plain", run_ahead, CLEAN, { .iommu = true } },
    { "ahead/iommu/preempt", run_ahead, CLEAN,
      { .iommu = true, .preempt = true } },
    { "requested-only", run_requested_only, CLEAN },

    /* The link breaks */
    { "cut/before-package", run_cut, 0, { .at = BEFORE_PACKAGE } },
    { "cut/in-package/plain", run_cut, SMOKE, { .at = IN_PACKAGE } },
    { "cut/in-package/paused", run_cut, 0,
      { .at = IN_PACKAGE, .paused = true } },
    { "cut/in-package/suspended", run_cut, 0,
      { .at = IN_PACKAGE, .suspended = true } },
    { "cut/in-package/no-ram-left", run_cut, 0,
      { .at = IN_PACKAGE, .no_ram_left = true } },
    { "cut/in-package/no-exit", run_cut, 0,
      { .at = IN_PACKAGE, .no_exit = true } },
    { "preempt/cut/in-package", run_cut, 0,
      { .at = IN_PACKAGE, .preempt = true } },
    { "cut/behind-package", run_cut_behind_package, 0,
      { .at = BEHIND_PACKAGE, .no_exit = true } },
    /* The main thread of the destination is in a page fault while it loads */
    { "stuck/cut/plain", run_cut, 0, { .at = REQ_PAGES, .iommu = true } },
    { "stuck/cut/preempt", run_cut, 0,
      { .at = REQ_PAGES, .iommu = true, .preempt = true } },
    { "stuck/cut/no-exit", run_cut, 0,
      { .at = REQ_PAGES, .iommu = true, .no_exit = true } },
    { "stop", run_cut, 0, { .at = IN_PACKAGE, .stop = true } },

    /* Nothing moves, nothing breaks */
    { "stall/in-package", run_stall, CLEAN, { .at = IN_PACKAGE } },
    { "stall/before-pong", run_stall, CLEAN, { .at = BEFORE_PONG } },
    { "stall/completion", run_stall_completion, CLEAN },
    { "stall/frozen", run_stall_frozen, CLEAN },
    { "yank/source", run_yank_source, 0, { .at = IN_PACKAGE } },
    { "yank/read", run_yank_destination, 0,
      { .at = IN_PACKAGE, .no_exit = true } },

    { "stuck/yank/plain", run_yank_destination, 0,
      { .at = REQ_PAGES, .iommu = true, .no_exit = true, .oob = true } },
    { "stuck/yank/preempt", run_yank_destination, 0,
      { .at = REQ_PAGES, .iommu = true, .no_exit = true, .oob = true,
        .preempt = true } },

    /* The destination dies */
    { "stuck/kill", run_kill, 0, { .at = REQ_PAGES, .iommu = true } },
    { "kill/plain", run_kill, SMOKE, { .at = PACKAGE_END } },
    { "kill/no-ram-left", run_kill, 0,
      { .at = PACKAGE_END, .no_ram_left = true } },
    { "preempt/kill", run_kill, 0, { .at = PACKAGE_END, .preempt = true } },

    /* The device state does not load */
    { "load-error/plain", run_load_error, SMOKE, { .at = BEHIND_PACKAGE } },
    { "load-error/no-ram-left", run_load_error, 0,
      { .at = BEHIND_PACKAGE, .no_ram_left = true } },
    { "load-error/no-exit/plain", run_load_error, 0,
      { .at = BEHIND_PACKAGE, .no_exit = true } },
    { "load-error/no-exit/no-ram-left", run_load_error, 0,
      { .at = BEHIND_PACKAGE, .no_exit = true, .no_ram_left = true } },
    { "load-error/mismatch", run_load_error, 0,
      { .at = BEHIND_PACKAGE, .no_exit = true, .virtio = true,
        .virtio_mismatch = true } },
    { "load-error/exec", run_load_error_exec, 0,
      { .at = BEHIND_PACKAGE, .exec = true, .virtio = true,
        .virtio_mismatch = true } },
    { "preempt/load-error/plain", run_load_error, 0,
      { .at = BEHIND_PACKAGE, .preempt = true } },
    { "preempt/load-error/no-exit", run_load_error, 0,
      { .at = BEHIND_PACKAGE, .preempt = true, .no_exit = true } },

    /* One owner */
    { "cut/before-pong", run_cut_before_pong, SMOKE, { .at = BEFORE_PONG } },
    { "preempt/cut/before-pong", run_cut_before_pong, 0,
      { .at = BEFORE_PONG, .preempt = true } },
    { "late-activate/cut", run_cut_before_pong, 0,
      { .at = BEFORE_PONG, .late_activate = true } },
    { "cont/cut", run_cut_before_pong, 0,
      { .at = BEFORE_PONG, .wait_for_cont = true } },
    /* All of the RAM was sent, and none of it may have been dropped */
    { "release-ram/cut", run_cut_before_pong, 0,
      { .at = BEFORE_PONG, .release_ram = true, .no_ram_left = true } },
    { "release-ram/requested", run_requested_cut, 0, { .release_ram = true } },
    { "cut/behind-pong/plain", run_cut_behind_pong, 0,
      { .at = BEHIND_PONG, .oob = true } },
    { "cut/behind-pong/twice", run_cut_behind_pong, 0,
      { .at = BEHIND_PONG, .oob = true, .cut_twice = true } },
    { "preempt/cut/behind-pong/plain", run_cut_behind_pong, 0,
      { .at = BEHIND_PONG, .oob = true, .preempt = true } },
    { "preempt/cut/behind-pong/twice", run_cut_behind_pong, 0,
      { .at = BEHIND_PONG, .oob = true, .cut_twice = true, .preempt = true } },
    { "preempt/withheld/plain", run_withheld, 0,
      { .at = BEHIND_PACKAGE, .preempt = true, .no_exit = true } },
    { "preempt/withheld/recover", run_withheld_recover, 0,
      { .at = BEHIND_PONG, .preempt = true, .oob = true } },
    { "pause/prepared", run_pause_prepared, 0,
      { .at = BEHIND_PONG, .oob = true } },
    { "recover/stray", run_recover_stray, 0,
      { .at = BEHIND_PONG, .oob = true } },
    { "pause/recovering", run_pause_recovering, 0,
      { .at = BEHIND_PONG, .oob = true } },
    { "in-doubt/no-hold", run_in_doubt_no_hold, 0,
      { .no_hold = true, .disk = true } },
    { "cut/before-shut", run_cut_before_shut, 0, { .at = BEFORE_SHUT } },

    /* The user cancels the migration */
    { "cancel/active", run_cancel_active },
    { "cancel/stalled", run_cancel_stalled },
    { "cancel/frozen/plain", run_cancel_frozen, 0, { .no_exit = true } },
    { "cancel/frozen/paused", run_cancel_frozen, 0,
      { .no_exit = true, .paused = true } },
    { "cancel/before-pong", run_cancel_before_pong },
    { "preempt/cancel", run_cancel_before_pong, 0, { .preempt = true } },
    { "cancel/exec/plain", run_cancel_exec, 0, { .exec = true } },
    { "cancel/exec/drain", run_cancel_exec_drain, 0,
      { .exec = true, .log = log_cancel_drain } },
    { "cancel/exec/active", run_cancel_active, 0, { .exec = true } },
    { "cancel/no-hold", run_cancel_no_hold, CLEAN, { .no_hold = true } },
    { "cancel/ask-again", run_ask_again, CLEAN, { .no_hold = true } },

    /* Notifications */
    { "notify/success", run_success, CLEAN, { .log = log_success } },
    { "notify/cut", run_cut, 0, { .at = IN_PACKAGE, .log = log_cut } },
    { "notify/cancel", run_cancel_before_pong, 0, { .log = log_cancel } },
    { "notify/recover", run_cut_behind_pong, 0,
      { .at = BEHIND_PONG, .oob = true, .log = log_recover } },
    { "notify/retry", run_retry, 0, { .at = IN_PACKAGE, .log = log_retry } },

    /* The source quits */
    { "quit/in-package", run_quit, 0, { .at = IN_PACKAGE, .no_exit = true } },
    { "quit/before-pong", run_quit, 0, { .at = BEFORE_PONG, .no_exit = true } },

    /* TLS */
    { "tls/plain", run_tls_success, CLEAN, { .tls = true } },
    { "tls/preempt", run_tls_success, CLEAN, { .tls = true, .preempt = true } },
    { "tls/cut/package", run_tls_cut_package, 0, { .tls = true } },
    { "tls/cut/pong", run_tls_cut_pong, 0, { .tls = true } },
    { "tls/yank", run_tls_yank, 0, { .tls = true } },
    { "tls/silent", run_tls_silent, 0, { .tls = true } },
    { "tls/preempt-silent", run_tls_preempt_silent, 0,
      { .tls = true, .preempt = true } },
    { "tls/preempt-lost", run_tls_preempt_lost, 0,
      { .tls = true, .preempt = true, .log = log_preempt_lost } },

    /* Other memory */
    { "shared/plain", run_success, CLEAN,
      { .shared = true, .release_ram = true, .no_ram_left = true } },
    { "shared/cut", run_cut_before_pong, 0,
      { .at = BEFORE_PONG, .shared = true, .release_ram = true,
        .no_ram_left = true } },
    { "hugetlbfs/plain", run_success, CLEAN, { .hugetlbfs = true } },
    { "hugetlbfs/cut", run_cut, 0, { .at = IN_PACKAGE, .hugetlbfs = true } },

    /* No limit but the link, which here has a delay */
    { "full-speed/plain", run_success, CLEAN, { .full_speed = true } },
    { "full-speed/cut", run_cut, 0, { .at = IN_PACKAGE, .full_speed = true } },
    { "full-speed/tcp/plain", run_success, CLEAN,
      { .full_speed = true, .tcp = true } },
    { "full-speed/tcp/preempt", run_success, CLEAN,
      { .full_speed = true, .tcp = true, .preempt = true } },
    { "full-speed/tcp/cut", run_cut_before_pong, 0,
      { .at = BEFORE_PONG, .full_speed = true, .tcp = true } },
    { "full-speed/tcp/kill", run_kill, 0,
      { .at = PACKAGE_END, .full_speed = true, .tcp = true } },
    { "full-speed/tcp/load-error", run_load_error, 0,
      { .at = BEHIND_PACKAGE, .full_speed = true, .tcp = true } },

    /* Channels for pages of precopy */
    { "multifd/plain", run_success, CLEAN, { .multifd = true } },
    { "multifd/preempt", run_success, CLEAN,
      { .multifd = true, .preempt = true } },
    { "multifd/tls", run_tls_success, CLEAN, { .multifd = true, .tls = true } },
    { "multifd/drain", run_drain, CLEAN, { .multifd = true } },
    { "multifd/ahead/plain", run_ahead, CLEAN,
      { .multifd = true, .virtio = true } },
    { "multifd/ahead/preempt", run_ahead, CLEAN,
      { .multifd = true, .virtio = true, .preempt = true } },
    { "multifd/old-machine/plain", run_ahead, CLEAN,
      { .multifd = true, .virtio = true, .old_machine = true } },
    { "multifd/old-machine/preempt", run_ahead, CLEAN,
      { .multifd = true, .virtio = true, .old_machine = true,
        .preempt = true } },
    { "multifd/release-ram", run_cut_before_pong, 0,
      { .multifd = true, .at = BEFORE_PONG, .release_ram = true,
        .no_ram_left = true } },
    { "multifd/cut/drain", run_drain_cut, 0, { .multifd = true } },
    { "multifd/cut/in-package", run_cut, 0,
      { .multifd = true, .at = IN_PACKAGE } },
    { "multifd/cut/no-exit", run_cut, 0,
      { .multifd = true, .at = IN_PACKAGE, .no_exit = true } },
    { "multifd/cut/before-pong", run_cut_before_pong, 0,
      { .multifd = true, .at = BEFORE_PONG } },
    { "multifd/cut/behind-pong/plain", run_cut_behind_pong, 0,
      { .multifd = true, .at = BEHIND_PONG, .oob = true } },
    { "multifd/cut/behind-pong/preempt", run_cut_behind_pong, 0,
      { .multifd = true, .at = BEHIND_PONG, .oob = true, .preempt = true } },
    { "multifd/kill", run_kill, 0, { .multifd = true, .at = PACKAGE_END } },
    { "multifd/load-error/plain", run_load_error, 0,
      { .multifd = true, .at = BEHIND_PACKAGE } },
    { "multifd/load-error/no-exit", run_load_error, 0,
      { .multifd = true, .at = BEHIND_PACKAGE, .no_exit = true } },
    { "multifd/stall", run_stall, CLEAN, { .multifd = true, .at = IN_PACKAGE } },
    { "multifd/yank/source", run_yank_source, 0,
      { .multifd = true, .at = IN_PACKAGE } },
    { "multifd/yank/destination", run_yank_destination, 0,
      { .multifd = true, .at = IN_PACKAGE, .no_exit = true } },
    { "multifd/cancel/active", run_cancel_active, 0, { .multifd = true } },
    { "multifd/cancel/stalled", run_cancel_stalled, 0, { .multifd = true } },
    { "multifd/cancel/drain", run_drain_cancel, 0, { .multifd = true } },
    { "multifd/cancel/frozen", run_cancel_frozen, 0,
      { .multifd = true, .no_exit = true } },
    { "multifd/cancel/before-pong", run_cancel_before_pong, 0,
      { .multifd = true } },
    { "multifd/retry/plain", run_retry, 0,
      { .multifd = true, .at = IN_PACKAGE } },
    { "multifd/retry/preempt", run_retry, 0,
      { .multifd = true, .at = IN_PACKAGE, .preempt = true } },

    /* The next migration */
    { "retry/plain", run_retry, 0, { .at = IN_PACKAGE } },
    { "preempt/retry", run_retry, 0, { .at = IN_PACKAGE, .preempt = true } },
    { "retry/throttled", run_retry, 0,
      { .at = IN_PACKAGE, .throttle = true } },
    { "retry/at-once", run_retry_at_once, 0, { .at = IN_PACKAGE } },
};

static bool can_run(const MigrationTestEnv *env, const TestCase *test)
{
    const DeviceTest *o = &test->options;
    bool x86_only = o->suspended || o->virtio || o->xhci || o->vmgenid ||
                    o->vapic || o->iommu;

#ifndef CONFIG_GNUTLS
    if (o->tls) {
        return false;
    }
#endif
#ifndef CONFIG_TRACE_LOG
    if (o->log) {
        return false;
    }
#endif
    if (o->multifd && QEMU_VERSION_MAJOR == 10 && QEMU_VERSION_MINOR < 1) {
        return false;
    }
    if (!has_phase(o) && test->run != run_bitmap_only) {
        return false;
    }
    return (env->has_uffd || o->bitmap_only) && (env->is_x86 || !x86_only);
}

/* For the guest's memory, on both sides */
static bool has_huge_pages(void)
{
    g_autofree char *text = NULL;

    return g_file_get_contents("/sys/kernel/mm/hugepages/hugepages-2048kB/"
                               "free_hugepages", &text, NULL, NULL) &&
           g_ascii_strtoull(text, NULL, 10) >= 2 * 75;
}

static void run_test(const void *opaque)
{
    const TestCase *test = opaque;
    DeviceTest t = test->options;

    if (t.hugetlbfs && !has_huge_pages()) {
        g_test_skip("needs 150 free huge pages of 2 MiB");
        return;
    }

    g_test_message("Running /%s/" TEST_PREFIX "%s", qtest_get_arch(),
                   test->path);
    if (device_test_start(&t, !(test->flags & CLEAN))) {
        test->run(&t);
    }
}

void migration_test_add_postcopy_device(MigrationTestEnv *env)
{
    for (int i = 0; i < ARRAY_SIZE(tests); i++) {
        g_autofree char *path = g_strconcat(TEST_PREFIX, tests[i].path, NULL);

        if ((env->full_set || (tests[i].flags & SMOKE)) &&
            can_run(env, &tests[i])) {
            qtest_add_data_func(path, &tests[i], run_test);
        }
    }
}
