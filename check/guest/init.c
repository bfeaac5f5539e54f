/*
 * The guest's only program.  It keeps memory, disk and network busy, checks
 * what it reads there, and says on the serial port how far it has got.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <net/if.h>
#include <netinet/ip_icmp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE = 4096, MEMORY_PAGES = 48 * 256, DISK_PAGES = 16 * 256,
       CLUSTER = 16 };      /* of qcow2, in pages */

typedef uint64_t Page[PAGE / 8];

static Page memory[MEMORY_PAGES];
static uint64_t on_disk[DISK_PAGES];    /* the generation of each page */
static volatile unsigned memory_count, disk_count, net_count;
static char iommu[32] = "none\n";

static long must(const char *what, long result)
{
    if (result < 0) {
        printf("BAD: %s: %s\n", what, strerror(errno));
    }
    return result;
}

/* Generation 0 is all zeroes. */
static void fill(Page page, uint64_t generation, int number)
{
    for (int i = 0; i < PAGE / 8; i++) {
        page[i] = generation * 0x9e3779b97f4a7c15 * (number * 512L + i + 1);
    }
}

static void check(const char *what, Page page, uint64_t generation, int number)
{
    Page good;

    fill(good, generation, number);
    if (memcmp(page, good, PAGE)) {
        printf("BAD: %s: page %d is not of generation %lu\n", what, number,
               generation);
    }
}

static void write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY);

    must(path, write(fd, text, strlen(text)));
    close(fd);
}

/*
 * Entry 247 of a used ring is the first one that is in two pages.  Behind an
 * IOMMU, QEMU 10.0.13 writes half of it to a wrong page, with or without
 * migration.  There, a device gets new rings after fewer requests than that.
 */
static void new_rings(const char *driver, const char *device)
{
    char path[64];

    if (strcmp(iommu, "none\n") == 0) {
        return;
    }
    sprintf(path, "/sys/bus/virtio/drivers/%s/unbind", driver);
    write_file(path, device);
    sprintf(path, "/sys/bus/virtio/drivers/%s/bind", driver);
    write_file(path, device);
}

static _Noreturn void *use_memory(void *unused)
{
    for (uint64_t generation = 0;; generation++) {
        for (int i = 0; i < MEMORY_PAGES; i++) {
            check("memory", memory[i], generation, i);
            fill(memory[i], generation + 1, i);
        }
        memory_count++;
    }
}

/* Have these pages read as zeroes, and the image change its tables. */
static void discard(int fd, int first, int pages)
{
    uint64_t range[] = { first * PAGE, pages * PAGE };

    must("discard", ioctl(fd, BLKDISCARD, range));
    memset(&on_disk[first], 0, pages * sizeof(on_disk[0]));
}

static _Noreturn void *use_disk(void *unused)
{
    static _Alignas(PAGE) Page page;
    int fd = -1;

    for (uint64_t generation = 1;; generation++) {
        int i = random() % DISK_PAGES;

        if (generation % 80 == 1) {
            close(fd);
            new_rings("virtio_blk", "virtio0");
            fd = must("disk", open("/dev/vda", O_RDWR | O_DIRECT));
        }
        fill(page, generation, i);
        must("write", pwrite(fd, page, PAGE, i * PAGE));
        on_disk[i] = generation;
        i = random() % DISK_PAGES;
        must("read", pread(fd, page, PAGE, i * PAGE));
        check("disk", page, on_disk[i], i);
        if (generation % 8 == 0) {
            i = random() % DISK_PAGES;
            discard(fd, i - i % CLUSTER, CLUSTER);
        }
        disk_count++;
        usleep(5000);
    }
}

static void start_net(void)
{
    struct ifreq ifr = { .ifr_name = "eth0" };
    struct sockaddr_in *addr = (struct sockaddr_in *)&ifr.ifr_addr;
    int fd = socket(AF_INET, SOCK_DGRAM, 0);

    addr->sin_family = AF_INET;
    addr->sin_addr.s_addr = inet_addr("10.0.2.15");
    must("address", ioctl(fd, SIOCSIFADDR, &ifr));
    ifr.ifr_flags = IFF_UP;
    must("link", ioctl(fd, SIOCSIFFLAGS, &ifr));
    close(fd);
}

/* A ping takes three packets.  It may get lost, but not all of them may. */
static _Noreturn void *use_net(void *unused)
{
    struct {
        struct icmphdr head;
        Page data;
    } ping;
    struct sockaddr_in host = {
        .sin_family = AF_INET, .sin_addr.s_addr = inet_addr("10.0.2.2"),
    };
    struct timeval limit = { .tv_usec = 100000 };
    int fd = must("net", socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP));

    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    for (uint16_t number = 0;; number++) {
        if (number % 64 == 0) {
            new_rings("virtio_net", "virtio1");
            start_net();
        }
        ping.head.type = ICMP_ECHO;
        ping.head.un.echo.sequence = number;
        fill(ping.data, number, 0);
        must("ping", sendto(fd, &ping, sizeof(ping), 0,
                            (struct sockaddr *)&host, sizeof(host)));
        if (recv(fd, &ping, sizeof(ping), 0) == sizeof(ping)) {
            check("net", ping.data, ping.head.un.echo.sequence, 0);
            net_count++;
        }
        usleep(20000);
    }
}

int main(void)
{
    void *(*uses[])(void *) = { use_memory, use_disk, use_net };
    char path[32];
    pthread_t thread;
    int fd;

    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    must("/dev", mount("dev", "/dev", "devtmpfs", 0, NULL));
    must("/proc", mount("proc", "/proc", "proc", 0, NULL));
    must("/sys", mount("sys", "/sys", "sysfs", 0, NULL));
    write_file("/proc/sys/net/ipv4/ping_group_range", "0 0");
    for (int i = 0; sprintf(path, "/%d.ko", i), !access(path, R_OK); i++) {
        must(path, syscall(SYS_finit_module, open(path, O_RDONLY), "", 0));
    }
    fd = open("/sys/block/vda/device/../iommu_group/type", O_RDONLY);
    if (fd >= 0) {
        must("iommu", read(fd, iommu, sizeof(iommu) - 1));
    }
    printf("iommu %s", iommu);
    for (int i = 0; i < 3; i++) {
        pthread_create(&thread, NULL, uses[i], NULL);
    }
    for (;;) {
        usleep(100000);
        printf("count %u %u %u\n", memory_count, disk_count, net_count);
    }
}
