/*
 * A proxy between the two sides of a migration that breaks it on demand
 *
 * The source connects to the proxy, and the proxy connects to the destination;
 * a thread relays what they send to each other, over as many connections as
 * the source opens (the first is the main channel).  The thread knows just
 * enough of the stream to stop at an exact byte: it finds the package of device
 * state (MIG_CMD_PACKAGED) and the messages of the return path.
 *
 * A test that wants a fault does this:
 *
 *     fault_proxy_trap(p, FAULT_PROXY_IN_PACKAGE, 100,
 *                      FAULT_PROXY_HOLD, FAULT_PROXY_HOLD);
 *     ... have the source start postcopy ...
 *     fault_proxy_wait(p);
 *     ... the destination has 100 bytes of the package, and nothing moves ...
 *     fault_proxy_cut(p);
 *
 * All functions are for the thread that runs the test; they take the proxy's
 * lock themselves.  Errors of the proxy's own making abort the test.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TEST_FAULT_PROXY_H
#define TEST_FAULT_PROXY_H

typedef struct FaultProxy FaultProxy;

/* Where a trap can be; each takes a value. */
typedef enum FaultProxyPoint {
    /*
     * The main channel towards the destination.  IN_PACKAGE: @value bytes of
     * the package's contents have been passed on; if it has fewer, all but
     * the last.  PING: @value is the value of the ping, which is searched for
     * like the package.  The others ignore @value.
     */
    FAULT_PROXY_BEFORE_PACKAGE,
    FAULT_PROXY_IN_PACKAGE,
    FAULT_PROXY_BEHIND_PACKAGE,
    FAULT_PROXY_BEFORE_PING,
    /*
     * The main channel towards the source, in front of or right behind the
     * next return path message of one type.  PONG: @value is the value of the
     * pong.  REQ_PAGES is a request for pages of either form.  These ignore
     * @value, as SHUT does.
     */
    FAULT_PROXY_BEFORE_PONG,
    FAULT_PROXY_BEHIND_PONG,
    FAULT_PROXY_BEFORE_SHUT,
    FAULT_PROXY_BEHIND_REQ_PAGES,
} FaultProxyPoint;

/* What happens to the bytes of one direction, on all connections. */
typedef enum FaultProxyMode {
    /* Pass them on; this is how the proxy starts */
    FAULT_PROXY_FORWARD,
    /* Keep them until the mode changes; the sender can go on sending */
    FAULT_PROXY_HOLD,
    /* Do not even read them: the sender will block */
    FAULT_PROXY_STALL,
    /* Throw them away; the end of the stream is still passed on */
    FAULT_PROXY_DROP,
} FaultProxyMode;

/**
 * fault_proxy_new: start a proxy
 *
 * @uri: where it listens, a unix socket or a TCP port (0: any free one)
 *
 * Returns: the proxy, to be freed with fault_proxy_free()
 */
FaultProxy *fault_proxy_new(const char *uri);

/**
 * fault_proxy_free: cut all connections and stop the proxy
 *
 * @p: the proxy
 */
void fault_proxy_free(FaultProxy *p);

/**
 * fault_proxy_uri: where the source has to connect to
 *
 * @p: the proxy
 *
 * Returns: a migration URI, owned by the proxy
 */
const char *fault_proxy_uri(FaultProxy *p);

/**
 * fault_proxy_set_destination: say where the destination listens
 *
 * @p: the proxy
 * @uri: a unix socket or a TCP port
 *
 * To be called before the source connects.
 */
void fault_proxy_set_destination(FaultProxy *p, const char *uri);

/**
 * fault_proxy_set_delay: have all that is sent arrive later
 *
 * @p: the proxy
 * @ms: for how long it is under way, in milliseconds
 *
 * To be called before the source connects.
 */
void fault_proxy_set_delay(FaultProxy *p, unsigned ms);

/**
 * fault_proxy_trap: choose the point at which the proxy interferes
 *
 * @p: the proxy
 * @point: the point
 * @value: see FaultProxyPoint
 * @to_dst: the new mode towards the destination
 * @to_src: the new mode towards the source
 *
 * Both modes come into force together, when everything in front of the point
 * has been passed on and nothing behind it.  There is one trap at a time, and
 * it works once; a new one replaces it.
 *
 * The package is only looked for while a trap is waiting for it: between here
 * and there, guest memory must not contain anything that looks like its header
 * (see find_package() in fault-proxy.c).  So set it right before postcopy is
 * started.
 */
void fault_proxy_trap(FaultProxy *p, FaultProxyPoint point, uint32_t value,
                      FaultProxyMode to_dst, FaultProxyMode to_src);

/**
 * fault_proxy_spoil_section: make the destination fail to load a device
 *
 * @p: the proxy
 * @idstr: the name of a section in the package
 *
 * To be called before the trap, which must be one of the package.  The version
 * number of that section is changed, on its way, to one that no destination
 * knows.  A package that has no such section aborts the test.
 */
void fault_proxy_spoil_section(FaultProxy *p, const char *idstr);

/**
 * fault_proxy_set_opaque: do not try to read the streams
 *
 * @p: the proxy
 *
 * For a link that is encrypted.  No trap will work, but all modes do.  To be
 * called before the source connects.
 */
void fault_proxy_set_opaque(FaultProxy *p);

/**
 * fault_proxy_change_ping: have the destination get another ping
 *
 * @p: the proxy
 * @from: the value of a ping on the main channel
 * @to: what it becomes
 *
 * Concerns the next such ping, which the proxy searches for as it does for the
 * package.  No trap of the package works before it has come.  The source gets
 * the answer that it expects.
 */
void fault_proxy_change_ping(FaultProxy *p, uint32_t from, uint32_t to);

/**
 * fault_proxy_swallow_pong: have the source not hear a pong
 *
 * @p: the proxy
 * @value: the value of the pong
 *
 * The next one is left out, and everything else goes on.  It counts as a trap:
 * fault_proxy_wait() waits for it.
 */
void fault_proxy_swallow_pong(FaultProxy *p, uint32_t value);

/**
 * fault_proxy_repeat_requests: have the source hear each request for pages twice
 *
 * @p: the proxy
 */
void fault_proxy_repeat_requests(FaultProxy *p);

/**
 * fault_proxy_withhold: accept connections that the destination does not get
 *
 * @p: the proxy
 * @withhold: whether this happens to the connections behind the main channel
 */
void fault_proxy_withhold(FaultProxy *p, bool withhold);

/**
 * fault_proxy_wait_withheld: wait until a connection is withheld
 *
 * @p: the proxy
 *
 * Aborts the test if that takes more than 45 seconds.
 */
void fault_proxy_wait_withheld(FaultProxy *p);

/**
 * fault_proxy_end_withheld: end the connection that is withheld
 *
 * @p: the proxy, after fault_proxy_wait_withheld()
 */
void fault_proxy_end_withheld(FaultProxy *p);

/**
 * fault_proxy_insert: have the source hear what the destination has not said
 *
 * @p: the proxy
 * @data: messages of the return path
 * @size: their size in bytes
 */
void fault_proxy_insert(FaultProxy *p, const void *data, size_t size);

/**
 * fault_proxy_requests: how many times has the destination asked for pages?
 *
 * @p: the proxy
 *
 * Returns: the number of such messages that were passed on
 */
unsigned fault_proxy_requests(FaultProxy *p);

/**
 * fault_proxy_bytes: how much has the destination got?
 *
 * @p: the proxy
 *
 * Returns: the number of bytes, on all connections
 */
uint64_t fault_proxy_bytes(FaultProxy *p);

/**
 * fault_proxy_wait: wait until the trap has worked
 *
 * @p: the proxy
 *
 * Aborts the test if that takes more than 45 seconds.
 */
void fault_proxy_wait(FaultProxy *p);

/**
 * fault_proxy_set_mode: change the mode of both directions at once
 *
 * @p: the proxy
 * @to_dst: the new mode towards the destination
 * @to_src: the new mode towards the source
 *
 * What was held so far is passed on or thrown away, as the new mode says.
 */
void fault_proxy_set_mode(FaultProxy *p, FaultProxyMode to_dst,
                          FaultProxyMode to_src);

/**
 * fault_proxy_cut_source: close all connections, but only the source notices
 *
 * @p: the proxy
 *
 * The destination goes on waiting, as when a network has vanished.
 */
void fault_proxy_cut_source(FaultProxy *p);

/**
 * fault_proxy_cut: close all connections
 *
 * @p: the proxy
 *
 * Bytes that have not been passed on yet are lost.  They are closed when it
 * returns.  New connections are accepted, in forward mode.
 */
void fault_proxy_cut(FaultProxy *p);

#endif /* TEST_FAULT_PROXY_H */
