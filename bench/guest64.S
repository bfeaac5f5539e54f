/*
 * Guest of the benchmark with much memory: a boot sector.  Says 'A' on the
 * serial port, then for ever adds one to a counter in each page from 4 GiB on,
 * and says 'B' after each round.
 *
 * SIZE is the number of bytes from there on.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
        .set COM1, 0x3f8
        .set PML4, 0x1000
        .set PDPT, 0x2000               /* of pages of 1 GiB */
        .set FOUR_GIB, 1 << 32

        .code16
        .globl start
start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds

        movl    $PDPT + 3, PML4
        movl    $0, PML4 + 4
        movl    $0x83, %eax
        xorl    %edx, %edx
        movw    $PDPT, %di
map:
        movl    %eax, (%di)
        movl    %edx, 4(%di)
        addl    $1 << 30, %eax
        adcl    $0, %edx
        addw    $8, %di
        cmpw    $PDPT + 4096, %di
        jb      map

        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $0x20, %eax             /* PAE */
        movl    %eax, %cr4
        movl    $0xc0000080, %ecx       /* EFER */
        rdmsr
        orl     $0x100, %eax            /* LME */
        wrmsr
        lgdtl   gdt_pointer
        movl    %cr0, %eax
        orl     $0x80000001, %eax
        movl    %eax, %cr0
        ljmpl   $8, $start64

        .code64
start64:
        movw    $COM1, %dx
        movb    $'A', %al
        outb    %al, %dx

        movb    $'B', %al
        movabs  $FOUR_GIB, %rsi
        movabs  $FOUR_GIB + SIZE, %rcx
again:
        movq    %rsi, %rdi
page:
        incl    (%rdi)
        addq    $4096, %rdi
        cmpq    %rcx, %rdi
        jb      page
        outb    %al, %dx
        jmp     again

        .balign 8
gdt:
        .quad   0
        .quad   0x00af9a000000ffff      /* 64-bit code */
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .org    510
        .word   0xaa55
