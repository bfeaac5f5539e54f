/*
 * A proxy between the two sides of a migration that breaks it on demand
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <glib-unix.h>
#include <poll.h>
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/event_notifier.h"
#include "qemu/sockets.h"
#include "qemu/units.h"
#include "migration/fault-proxy.h"

/* The stream towards the destination, see migration/savevm.[ch] */
#define VM_SECTION_FULL         0x04
#define VM_COMMAND              0x08
#define CMD_PING                2
#define CMD_PACKAGED            7
#define PING_LEN                9
#define PACKAGE_HEADER_LEN      9

/* The return path, see migration/migration.c */
#define RP_MSG_SHUT             1
#define RP_MSG_PONG             2
#define RP_MSG_REQ_PAGES_ID     3
#define RP_MSG_REQ_PAGES        4
#define RP_MSG_RECV_BITMAP      5
#define RP_HEADER_LEN           4

/* How much one sender may be ahead of its receiver in forward mode */
#define READ_AHEAD              (1 * MiB)

#define WAIT_SECONDS            45

/* What is under way; without data it is the end of the stream */
typedef struct Chunk {
    gint64 due;
    size_t size;
    uint8_t data[];
} Chunk;

/* One direction of one connection */
typedef struct Stream {
    /* Owned by Channel */
    int in;
    int out;
    /* Chunks that have been read and have not arrived, and their size */
    GQueue under_way;
    size_t size_under_way;
    bool eof_read;
    bool eof;
    bool eof_passed;
    /* What has arrived; the first @done bytes are passed on (or dropped) */
    GByteArray *buf;
    size_t done;
    /* How much of @buf has been looked at, and may be passed on */
    size_t parsed;
    /* Where in @buf the trap is; valid if @trapped */
    size_t trap_at;
    bool trapped;
} Stream;

typedef enum Direction {
    TO_DST,
    TO_SRC,
    DIRECTION_MAX
} Direction;

typedef struct Channel {
    Stream stream[DIRECTION_MAX];
    bool main;
} Channel;

struct FaultProxy {
    char *uri;
    int listen_fd;
    /* Interrupts the thread's poll() */
    EventNotifier wake;
    GThread *thread;

    GMutex lock;
    /* Signalled when the trap has worked, or a connection is withheld */
    GCond cond;
    /* The rest is protected by @lock */
    bool quit;
    SocketAddress *dst_addr;
    gint64 delay_us;
    GPtrArray *channels;
    FaultProxyMode mode[DIRECTION_MAX];
    bool trap_set;
    FaultProxyPoint trap_point;
    uint32_t trap_value;
    FaultProxyMode trap_mode[DIRECTION_MAX];
    bool trap_worked;
    char *spoil_idstr;
    bool change_ping;
    bool change_pong;
    uint32_t swallow_pong;
    bool repeat_requests;
    bool withhold;
    /* The other end of the connection that is withheld, or -1 */
    int withheld;
    unsigned requests;
    uint64_t bytes_to_dst;
    GByteArray *insert;
    uint32_t ping_from;
    uint32_t ping_to;
    bool opaque;
};

static void channel_free(gpointer opaque)
{
    Channel *c = opaque;

    close(c->stream[TO_DST].in);
    close(c->stream[TO_SRC].in);
    for (Direction d = 0; d < DIRECTION_MAX; d++) {
        g_byte_array_unref(c->stream[d].buf);
        g_queue_clear_full(&c->stream[d].under_way, g_free);
    }
    g_free(c);
}

static void accept_channel(FaultProxy *p)
{
    Channel *c = g_new0(Channel, 1);
    int src = qemu_accept(p->listen_fd, NULL, NULL);
    int dst, idle[2];

    g_assert_cmpint(src, >=, 0);
    if (p->withhold && p->channels->len) {
        g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, idle), ==, 0);
        dst = idle[0];
        p->withheld = idle[1];
        g_cond_broadcast(&p->cond);
    } else {
        dst = socket_connect(p->dst_addr, &error_abort);
    }
    g_assert(g_unix_set_fd_nonblocking(src, true, NULL));
    g_assert(g_unix_set_fd_nonblocking(dst, true, NULL));

    c->main = !p->channels->len;
    c->stream[TO_DST].in = c->stream[TO_SRC].out = src;
    c->stream[TO_SRC].in = c->stream[TO_DST].out = dst;
    for (Direction d = 0; d < DIRECTION_MAX; d++) {
        c->stream[d].buf = g_byte_array_new();
        g_queue_init(&c->stream[d].under_way);
    }
    g_ptr_array_add(p->channels, c);
}

static void set_trap_at(Stream *s, size_t offset)
{
    s->trapped = true;
    s->trap_at = offset;
}

/*
 * Find @size bytes that are @pattern where @mask is set.
 *
 * Returns: true with their offset, or false with the offset up to which @buf
 * cannot be a part of them.
 */
static bool find_bytes(const GByteArray *buf, size_t start,
                       const uint8_t *pattern, const uint8_t *mask, size_t size,
                       size_t *offset)
{
    for (size_t i = start; i < buf->len; i++) {
        size_t len = MIN(size, buf->len - i);
        size_t n = 0;

        while (n < len && (buf->data[i + n] & mask[n]) == pattern[n]) {
            n++;
        }
        if (n == len) {
            *offset = i;
            return n == size;
        }
    }

    *offset = buf->len;
    return false;
}

/*
 * Find the header of the package:
 *
 *   VM_COMMAND  CMD_PACKAGED (be16)  4 (be16)  size of contents (be32)
 *
 * To parse everything in front of it would mean to know the format of every
 * iterable device, so this is a search: for the header with a possible size and
 * the command that its contents begin with, 11 bytes of which 8 are fixed.  The
 * guest in these tests has a tiny boot sector and one counter per page, and it
 * would be a strange firmware that contains them.
 */
static bool find_package(const GByteArray *buf, size_t start, size_t *offset)
{
    static const uint8_t pattern[] = {
        VM_COMMAND, 0, CMD_PACKAGED, 0, 4, 0, 0, 0, 0, VM_COMMAND, 0
    };
    static const uint8_t mask[] = {
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0xff, 0xff
    };

    return find_bytes(buf, start, pattern, mask, sizeof(pattern), offset);
}

/* VM_COMMAND  CMD_PING (be16)  4 (be16)  value (be32) */
static bool find_ping(const GByteArray *buf, size_t start, uint32_t value,
                      size_t *offset)
{
    uint8_t pattern[PING_LEN] = { VM_COMMAND, 0, CMD_PING, 0, 4 };
    uint8_t mask[PING_LEN];

    stl_be_p(&pattern[PING_LEN - 4], value);
    memset(mask, 0xff, sizeof(mask));
    return find_bytes(buf, start, pattern, mask, sizeof(pattern), offset);
}

static void spoil_section(FaultProxy *p, uint8_t *package, size_t size)
{
    size_t idlen = strlen(p->spoil_idstr);
    /* Type, section id, length of the name, name, instance, version */
    size_t len = 1 + 4 + 1 + idlen + 4 + 4;

    for (size_t i = 0; i + len <= size; i++) {
        if (package[i] == VM_SECTION_FULL && package[i + 5] == idlen &&
            !memcmp(&package[i + 6], p->spoil_idstr, idlen)) {
            stl_be_p(&package[i + len - 4], INT32_MAX);
            return;
        }
    }

    g_error("fault proxy: the package has no section '%s'", p->spoil_idstr);
}

static void parse_to_dst(FaultProxy *p, Stream *s)
{
    size_t offset, contents, size;

    if (p->change_ping) {
        if (!find_ping(s->buf, s->parsed, p->ping_from, &offset)) {
            s->parsed = offset;
            return;
        }
        stl_be_p(&s->buf->data[offset + PING_LEN - 4], p->ping_to);
        s->parsed = offset + PING_LEN;
        p->change_ping = false;
        p->change_pong = true;
    }

    if (!p->trap_set || p->trap_point > FAULT_PROXY_BEFORE_PING) {
        s->parsed = s->buf->len;
        return;
    }

    if (p->trap_point == FAULT_PROXY_BEFORE_PING) {
        if (find_ping(s->buf, s->parsed, p->trap_value, &offset)) {
            set_trap_at(s, offset);
            p->trap_set = false;
        }
        s->parsed = offset;
        return;
    }

    if (!find_package(s->buf, s->parsed, &offset)) {
        s->parsed = offset;
        return;
    }

    /* The package is small; have it all before anything is done about it */
    s->parsed = offset;
    size = ldl_be_p(&s->buf->data[offset + PACKAGE_HEADER_LEN - 4]);
    contents = offset + PACKAGE_HEADER_LEN;
    if (s->buf->len < contents + size) {
        return;
    }

    if (p->spoil_idstr) {
        spoil_section(p, &s->buf->data[contents], size);
    }

    switch (p->trap_point) {
    case FAULT_PROXY_BEFORE_PACKAGE:
        set_trap_at(s, offset);
        break;
    case FAULT_PROXY_IN_PACKAGE:
        set_trap_at(s, contents + MIN(p->trap_value, size - 1));
        break;
    case FAULT_PROXY_BEHIND_PACKAGE:
        set_trap_at(s, contents + size);
        break;
    default:
        g_assert_not_reached();
    }
    p->trap_set = false;
}

/*
 * How long is the return path message at @start of @buf?  Returns 0 if it is
 * too early to tell.
 */
static size_t rp_message_len(const GByteArray *buf, size_t start)
{
    size_t len = RP_HEADER_LEN;

    if (buf->len < start + len) {
        return 0;
    }
    len += lduw_be_p(&buf->data[start + 2]);

    if (lduw_be_p(&buf->data[start]) == RP_MSG_RECV_BITMAP) {
        /* A size, that many bytes, and an end mark come behind it */
        if (buf->len < start + len + 8) {
            return 0;
        }
        len += 8 + ldq_be_p(&buf->data[start + len]) + 8;
    }

    return len;
}

/* In between two messages */
static void insert_to_src(FaultProxy *p, Stream *s)
{
    size_t tail = s->buf->len - s->parsed;

    if (!p->insert->len) {
        return;
    }
    g_byte_array_append(s->buf, p->insert->data, p->insert->len);
    memmove(&s->buf->data[s->parsed + p->insert->len],
            &s->buf->data[s->parsed], tail);
    memcpy(&s->buf->data[s->parsed], p->insert->data, p->insert->len);
    s->parsed += p->insert->len;
    g_byte_array_set_size(p->insert, 0);
}

static void parse_to_src(FaultProxy *p, Stream *s)
{
    insert_to_src(p, s);

    while (!s->trapped) {
        size_t start = s->parsed;
        size_t len = rp_message_len(s->buf, start);
        uint16_t type;
        uint32_t value = 0;
        bool before = true;
        bool hit = false;

        if (!len || s->buf->len < start + len) {
            return;
        }
        type = lduw_be_p(&s->buf->data[start]);
        if (len >= RP_HEADER_LEN + 4) {
            value = ldl_be_p(&s->buf->data[start + RP_HEADER_LEN]);
        }
        if (type == RP_MSG_PONG && p->change_pong && value == p->ping_to) {
            value = p->ping_from;
            stl_be_p(&s->buf->data[start + RP_HEADER_LEN], value);
        }
        if (type == RP_MSG_REQ_PAGES_ID || type == RP_MSG_REQ_PAGES) {
            p->requests++;
            if (p->repeat_requests) {
                g_byte_array_append(p->insert, &s->buf->data[start], len);
            }
        }
        if (type == RP_MSG_PONG && p->swallow_pong &&
            value == p->swallow_pong) {
            g_byte_array_remove_range(s->buf, start, len);
            p->swallow_pong = 0;
            p->trap_worked = true;
            g_cond_broadcast(&p->cond);
            continue;
        }
        s->parsed += len;
        insert_to_src(p, s);

        if (!p->trap_set) {
            continue;
        }
        switch (p->trap_point) {
        case FAULT_PROXY_BEHIND_PONG:
            before = false;
            /* fall through */
        case FAULT_PROXY_BEFORE_PONG:
            hit = type == RP_MSG_PONG && value == p->trap_value;
            break;
        case FAULT_PROXY_BEFORE_SHUT:
            hit = type == RP_MSG_SHUT;
            break;
        case FAULT_PROXY_BEHIND_REQ_PAGES:
            before = false;
            hit = type == RP_MSG_REQ_PAGES_ID || type == RP_MSG_REQ_PAGES;
            break;
        default:
            break;
        }
        if (hit) {
            set_trap_at(s, before ? start : s->parsed);
            p->trap_set = false;
        }
    }
}

static void parse(FaultProxy *p, Channel *c, Direction d)
{
    Stream *s = &c->stream[d];

    if (!c->main || p->opaque) {
        s->parsed = s->buf->len;
    } else if (s->trapped) {
        /* Nothing but what is in front of the trap matters now */
    } else if (d == TO_DST) {
        parse_to_dst(p, s);
    } else {
        parse_to_src(p, s);
    }

    /* There will not be any more of it */
    if (s->eof && !s->trapped) {
        s->parsed = s->buf->len;
    }
}

static size_t passable(Stream *s)
{
    return (s->trapped ? s->trap_at : s->parsed) - s->done;
}

static void consume(Stream *s, size_t len)
{
    s->done += len;

    /* Not every time: held data can be large */
    if (s->done * 2 >= s->buf->len) {
        g_byte_array_remove_range(s->buf, 0, s->done);
        s->parsed -= s->done;
        s->trap_at -= s->trapped ? s->done : 0;
        s->done = 0;
    }
}

static void spring_trap(FaultProxy *p, Stream *s)
{
    s->trapped = false;
    memcpy(p->mode, p->trap_mode, sizeof(p->mode));
    p->trap_worked = true;
    g_cond_broadcast(&p->cond);
}

/* Move what can be moved; returns whether to wait for @s->out to take more. */
static bool pump(FaultProxy *p, Channel *c, Direction d)
{
    Stream *s = &c->stream[d];

    while (true) {
        size_t len;
        ssize_t ret;

        if (p->mode[d] == FAULT_PROXY_HOLD || p->mode[d] == FAULT_PROXY_STALL) {
            /* Not looked at either: a trap may still be set for it */
            return false;
        }

        parse(p, c, d);
        len = passable(s);
        if (!len) {
            if (!s->trapped) {
                break;
            }
            spring_trap(p, s);
        } else if (p->mode[d] == FAULT_PROXY_DROP) {
            consume(s, len);
        } else {
            ret = send(s->out, s->buf->data + s->done, len, MSG_NOSIGNAL);
            if (ret > 0) {
                p->bytes_to_dst += d == TO_DST ? ret : 0;
                consume(s, ret);
            } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
                return true;
            } else {
                /* The receiver is gone: let the sender notice */
                shutdown(s->in, SHUT_RD);
                consume(s, len);
            }
        }
    }

    if (s->eof && !s->eof_passed && s->done == s->buf->len) {
        s->eof_passed = true;
        shutdown(s->out, SHUT_WR);
    }
    return false;
}

static void pump_all(FaultProxy *p, bool *full)
{
    FaultProxyMode mode[DIRECTION_MAX];

    /* A trap that works in one stream concerns all others, too */
    do {
        memcpy(mode, p->mode, sizeof(mode));
        for (int i = 0; i < p->channels->len; i++) {
            for (Direction d = 0; d < DIRECTION_MAX; d++) {
                full[i * DIRECTION_MAX + d] =
                    pump(p, g_ptr_array_index(p->channels, i), d);
            }
        }
    } while (memcmp(mode, p->mode, sizeof(mode)));
}

static bool wants_data(FaultProxy *p, Stream *s, Direction d)
{
    if (s->eof_read || p->mode[d] == FAULT_PROXY_STALL) {
        return false;
    }
    return p->mode[d] != FAULT_PROXY_FORWARD ||
           s->size_under_way + passable(s) < READ_AHEAD;
}

static void read_stream(FaultProxy *p, Stream *s)
{
    uint8_t data[64 * KiB];
    ssize_t ret = recv(s->in, data, sizeof(data), 0);
    Chunk *chunk;

    if (ret < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
        return;
    }
    s->eof_read = ret <= 0;
    chunk = g_malloc(sizeof(*chunk) + MAX(ret, 0));
    chunk->due = g_get_monotonic_time() + p->delay_us;
    chunk->size = MAX(ret, 0);
    memcpy(chunk->data, data, chunk->size);
    g_queue_push_tail(&s->under_way, chunk);
    s->size_under_way += chunk->size;
}

/* Returns when the next chunk arrives, but no later than @next */
static gint64 receive_chunks(Stream *s, gint64 next)
{
    gint64 now = g_get_monotonic_time();
    Chunk *chunk;

    while ((chunk = g_queue_peek_head(&s->under_way))) {
        if (chunk->due > now) {
            return MIN(chunk->due, next);
        }
        g_byte_array_append(s->buf, chunk->data, chunk->size);
        s->size_under_way -= chunk->size;
        s->eof = !chunk->size;
        g_free(g_queue_pop_head(&s->under_way));
    }
    return next;
}

/* The argument of poll() */
static int ms_until(gint64 time)
{
    gint64 us = time - g_get_monotonic_time();

    return time == INT64_MAX ? -1 : MAX(us + 999, 0) / 1000;
}

static void *proxy_thread(void *opaque)
{
    FaultProxy *p = opaque;

    g_mutex_lock(&p->lock);
    while (!p->quit) {
        int streams = p->channels->len * DIRECTION_MAX;
        g_autofree bool *full = g_new0(bool, streams);
        g_autofree struct pollfd *fds = g_new0(struct pollfd, 2 + 2 * streams);
        gint64 next = INT64_MAX;
        int ret;

        for (int i = 0; i < streams; i++) {
            Channel *c = g_ptr_array_index(p->channels, i / DIRECTION_MAX);

            next = receive_chunks(&c->stream[i % DIRECTION_MAX], next);
        }
        pump_all(p, full);

        /* Per stream one entry to read, one to write; -1 is ignored */
        fds[0] = (struct pollfd) {
            .fd = event_notifier_get_fd(&p->wake), .events = POLLIN
        };
        fds[1] = (struct pollfd) { .fd = p->listen_fd, .events = POLLIN };
        for (int i = 0; i < streams; i++) {
            Channel *c = g_ptr_array_index(p->channels, i / DIRECTION_MAX);
            Direction d = i % DIRECTION_MAX;
            Stream *s = &c->stream[d];

            fds[2 + 2 * i] = (struct pollfd) {
                .fd = wants_data(p, s, d) ? s->in : -1, .events = POLLIN
            };
            fds[3 + 2 * i] = (struct pollfd) {
                .fd = full[i] ? s->out : -1, .events = POLLOUT
            };
        }

        g_mutex_unlock(&p->lock);
        ret = RETRY_ON_EINTR(poll(fds, 2 + 2 * streams, ms_until(next)));
        g_assert_cmpint(ret, >=, 0);
        g_mutex_lock(&p->lock);

        if (event_notifier_test_and_clear(&p->wake)) {
            /* The channels or their modes may be others now */
            continue;
        }
        for (int i = 0; i < streams; i++) {
            Channel *c = g_ptr_array_index(p->channels, i / DIRECTION_MAX);

            if (fds[2 + 2 * i].revents) {
                read_stream(p, &c->stream[i % DIRECTION_MAX]);
            }
        }
        for (int i = p->channels->len - 1; i >= 0; i--) {
            Channel *c = g_ptr_array_index(p->channels, i);

            if (c->stream[TO_DST].eof_passed && c->stream[TO_SRC].eof_passed) {
                g_ptr_array_remove_index(p->channels, i);
            }
        }
        if (fds[1].revents) {
            accept_channel(p);
        }
    }
    g_mutex_unlock(&p->lock);

    return NULL;
}

FaultProxy *fault_proxy_new(const char *uri)
{
    g_autoptr(SocketAddress) addr = socket_parse(uri, &error_abort);
    g_autoptr(SocketAddress) local = NULL;
    FaultProxy *p = g_new0(FaultProxy, 1);

    p->channels = g_ptr_array_new_with_free_func(channel_free);
    p->insert = g_byte_array_new();
    p->withheld = -1;
    g_mutex_init(&p->lock);
    g_cond_init(&p->cond);
    g_assert_cmpint(event_notifier_init(&p->wake, false), ==, 0);

    p->listen_fd = socket_listen(addr, 8, &error_abort);
    local = socket_local_address(p->listen_fd, &error_abort);
    p->uri = socket_uri(local);

    p->thread = g_thread_new("faultproxy", proxy_thread, p);
    return p;
}

void fault_proxy_free(FaultProxy *p)
{
    g_mutex_lock(&p->lock);
    p->quit = true;
    event_notifier_set(&p->wake);
    g_mutex_unlock(&p->lock);
    g_thread_join(p->thread);

    g_ptr_array_unref(p->channels);
    g_byte_array_unref(p->insert);
    socket_listen_cleanup(p->listen_fd, &error_abort);
    close(p->listen_fd);
    if (p->withheld >= 0) {
        close(p->withheld);
    }
    event_notifier_cleanup(&p->wake);
    g_mutex_clear(&p->lock);
    g_cond_clear(&p->cond);
    g_free(p->uri);
    qapi_free_SocketAddress(p->dst_addr);
    g_free(p->spoil_idstr);
    g_free(p);
}

const char *fault_proxy_uri(FaultProxy *p)
{
    return p->uri;
}

void fault_proxy_set_destination(FaultProxy *p, const char *uri)
{
    g_mutex_lock(&p->lock);
    qapi_free_SocketAddress(p->dst_addr);
    p->dst_addr = socket_parse(uri, &error_abort);
    g_mutex_unlock(&p->lock);
}

void fault_proxy_set_delay(FaultProxy *p, unsigned ms)
{
    g_mutex_lock(&p->lock);
    p->delay_us = ms * 1000;
    g_mutex_unlock(&p->lock);
}

void fault_proxy_trap(FaultProxy *p, FaultProxyPoint point, uint32_t value,
                      FaultProxyMode to_dst, FaultProxyMode to_src)
{
    g_mutex_lock(&p->lock);
    p->trap_set = true;
    p->trap_worked = false;
    p->trap_point = point;
    p->trap_value = value;
    p->trap_mode[TO_DST] = to_dst;
    p->trap_mode[TO_SRC] = to_src;
    g_mutex_unlock(&p->lock);
}

void fault_proxy_spoil_section(FaultProxy *p, const char *idstr)
{
    g_mutex_lock(&p->lock);
    g_free(p->spoil_idstr);
    p->spoil_idstr = g_strdup(idstr);
    g_mutex_unlock(&p->lock);
}

void fault_proxy_set_opaque(FaultProxy *p)
{
    g_mutex_lock(&p->lock);
    p->opaque = true;
    g_mutex_unlock(&p->lock);
}

void fault_proxy_change_ping(FaultProxy *p, uint32_t from, uint32_t to)
{
    g_mutex_lock(&p->lock);
    p->change_ping = true;
    p->ping_from = from;
    p->ping_to = to;
    g_mutex_unlock(&p->lock);
}

void fault_proxy_swallow_pong(FaultProxy *p, uint32_t value)
{
    g_mutex_lock(&p->lock);
    p->swallow_pong = value;
    p->trap_worked = false;
    g_mutex_unlock(&p->lock);
}

void fault_proxy_repeat_requests(FaultProxy *p)
{
    g_mutex_lock(&p->lock);
    p->repeat_requests = true;
    g_mutex_unlock(&p->lock);
}

void fault_proxy_withhold(FaultProxy *p, bool withhold)
{
    g_mutex_lock(&p->lock);
    p->withhold = withhold;
    g_mutex_unlock(&p->lock);
}

void fault_proxy_wait_withheld(FaultProxy *p)
{
    gint64 end = g_get_monotonic_time() + WAIT_SECONDS * G_TIME_SPAN_SECOND;

    g_mutex_lock(&p->lock);
    while (p->withheld < 0) {
        if (!g_cond_wait_until(&p->cond, &p->lock, end)) {
            g_error("fault proxy: no second connection in %d s", WAIT_SECONDS);
        }
    }
    g_mutex_unlock(&p->lock);
}

void fault_proxy_end_withheld(FaultProxy *p)
{
    g_mutex_lock(&p->lock);
    close(p->withheld);
    p->withheld = -1;
    g_mutex_unlock(&p->lock);
}

void fault_proxy_insert(FaultProxy *p, const void *data, size_t size)
{
    g_mutex_lock(&p->lock);
    g_byte_array_append(p->insert, data, size);
    event_notifier_set(&p->wake);
    g_mutex_unlock(&p->lock);
}

unsigned fault_proxy_requests(FaultProxy *p)
{
    unsigned requests;

    g_mutex_lock(&p->lock);
    requests = p->requests;
    g_mutex_unlock(&p->lock);
    return requests;
}

uint64_t fault_proxy_bytes(FaultProxy *p)
{
    uint64_t bytes;

    g_mutex_lock(&p->lock);
    bytes = p->bytes_to_dst;
    g_mutex_unlock(&p->lock);
    return bytes;
}

void fault_proxy_wait(FaultProxy *p)
{
    gint64 end = g_get_monotonic_time() + WAIT_SECONDS * G_TIME_SPAN_SECOND;

    g_mutex_lock(&p->lock);
    while (!p->trap_worked) {
        if (!g_cond_wait_until(&p->cond, &p->lock, end)) {
            g_error("fault proxy: point %d, value 0x%x not reached in %d s",
                    p->trap_point, p->trap_value, WAIT_SECONDS);
        }
    }
    g_mutex_unlock(&p->lock);
}

void fault_proxy_set_mode(FaultProxy *p, FaultProxyMode to_dst,
                          FaultProxyMode to_src)
{
    g_mutex_lock(&p->lock);
    p->mode[TO_DST] = to_dst;
    p->mode[TO_SRC] = to_src;
    event_notifier_set(&p->wake);
    g_mutex_unlock(&p->lock);
}

void fault_proxy_cut_source(FaultProxy *p)
{
    g_mutex_lock(&p->lock);
    for (int i = 0; i < p->channels->len; i++) {
        Channel *c = g_ptr_array_index(p->channels, i);
        int fd = c->stream[TO_DST].in;
        int idle[2];

        g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, idle), ==, 0);
        shutdown(fd, SHUT_RDWR);
        /* Its other end stays open until the test ends */
        g_assert_cmpint(dup2(idle[0], fd), ==, fd);
        close(idle[0]);
        g_assert(g_unix_set_fd_nonblocking(fd, true, NULL));
    }
    event_notifier_set(&p->wake);
    g_mutex_unlock(&p->lock);
}

void fault_proxy_cut(FaultProxy *p)
{
    g_mutex_lock(&p->lock);
    /* The thread may be in poll(), so that close() has no effect yet */
    for (int i = 0; i < p->channels->len; i++) {
        Channel *c = g_ptr_array_index(p->channels, i);

        shutdown(c->stream[TO_DST].in, SHUT_RDWR);
        shutdown(c->stream[TO_SRC].in, SHUT_RDWR);
    }
    g_ptr_array_set_size(p->channels, 0);
    p->mode[TO_DST] = FAULT_PROXY_FORWARD;
    p->mode[TO_SRC] = FAULT_PROXY_FORWARD;
    event_notifier_set(&p->wake);
    g_mutex_unlock(&p->lock);
}
