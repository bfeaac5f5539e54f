/*
 * Guest of the tests: a boot sector.  Fills one region of memory with a
 * pseudo-random pattern, says 'A' on the serial port, then for ever adds one
 * to a counter in each page of another region, and says 'B' now and then.
 * With IDLE, does nothing after the first 'B'.
 *
 * twoqemu.py defines PATTERN, PATTERN_SIZE, COUNTERS, COUNTERS_SIZE (physical
 * addresses and bytes), STRIDE (bytes from one counter to the next), MUL and
 * ADD of the pattern's generator, and IDLE.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
        .set COM1, 0x3f8
        .set PASSES_PER_B, 16

        .code16
        .globl start
start:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        lgdtl   gdt_pointer
        movl    %cr0, %eax
        orl     $1, %eax
        movl    %eax, %cr0
        ljmpl   $8, $start32

        .code32
start32:
        movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    $COM1, %dx

        cld
        xorl    %eax, %eax
        movl    $PATTERN, %edi
        movl    $PATTERN_SIZE / 4, %ecx
fill:
        imull   $MUL, %eax, %eax
        addl    $ADD, %eax
        stosl
        loop    fill

        movb    $'A', %al
        outb    %al, %dx

        movb    $'B', %al
again:
        movl    $PASSES_PER_B, %ecx
pass:
        movl    $COUNTERS, %edi
page:
        incl    (%edi)
        addl    $STRIDE, %edi
        cmpl    $COUNTERS + COUNTERS_SIZE, %edi
        jb      page
        loop    pass
        outb    %al, %dx
        .if     IDLE
        hlt
        .endif
        jmp     again

        .balign 8
gdt:
        .quad   0
        .quad   0x00cf9a000000ffff      /* flat code */
        .quad   0x00cf92000000ffff      /* flat data */
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .org    510
        .word   0xaa55
