/*
 * A guest of two kilobytes for tests with many QEMUs: it boots at once (multiboot), writes memory,
 * checks every word that it wrote, and says so on its serial port as the Linux guest of
 * docs/guest.md does:
 *
 *   WORKLOAD READY
 *   WORKLOAD t=0 writes=N errors=M      ten times a second; writes are pages
 *   WORKLOAD VERDICT intact errors=M    after a typed line, when all pages were checked once more
 *   WORKLOAD SVM on=0|1                 after a typed 0 or 1: virtualization was switched off or on
 *   WORKLOAD NESTED ran=0|1             after a typed 2: it ran a guest of its own; virtualization must be on
 *   WORKLOAD NESTED for good            after a typed 3: its own guest runs, and it does not come back
 *
 * All words of a page are one number, made of the page and its generation. The ledger has the
 * generation of each page. Between two rounds it sleeps until the timer's next interrupt, so that
 * interrupts, too, must go on after a move.
 *
 *   gcc -m32 -O1 -ffreestanding -fno-pic -fno-toplevel-reorder -nostdlib -static
 */
typedef unsigned int u32;
typedef unsigned char u8;

__asm__(".text\n"
        ".align 4\n"
        ".long 0x1badb002, 0, -0x1badb002\n" /* multiboot: magic, no flags, checksum */
        ".globl _start\n"
        "_start: mov $0x90000, %esp\n"
        "call work\n"
        "tick: push %eax\n"
        "mov $0x20, %al\n"
        "out %al, $0x20\n" /* end of interrupt */
        "pop %eax\n"
        "iret\n");
extern const u8 tick[];

enum {
	PAGES = 1024,
	WORDS = 1024,
	FIRST = 4 << 20, /* address of the first page */
	SERIAL = 0x3f8,
	TICKS_A_SECOND = 100,
};
static u32 ledger[PAGES];
static u32 descriptors[6] = { 0, 0, 0x0000ffff, 0x00cf9b00, 0x0000ffff, 0x00cf9300 };
static u32 gates[2 * 33];

static void out(u32 port, u8 value) { __asm__ volatile("outb %0, %w1" ::"a"(value), "Nd"(port)); }

static u8 in(u32 port)
{
	u8 value;
	__asm__ volatile("inb %w1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static void say(const char *text)
{
	for (; *text; text++) {
		while (!(in(SERIAL + 5) & 0x20))
			;
		out(SERIAL, (u8)*text);
	}
}

static void say_number(u32 value)
{
	char digits[11], *at = digits + 10;
	*at = 0;
	do
		*--at = (char)('0' + value % 10);
	while (value /= 10);
	say(at);
}

static void say_result(const char *text, u32 value)
{
	say(text);
	say_number(value);
	say("\r\n");
}

#include "nested.h"

static u32 word_of(u32 page, u32 generation)
{
	return (page * 2654435761u) ^ (generation * 2246822519u);
}

static volatile u32 *page_at(u32 page) { return (volatile u32 *)(FIRST + page * WORDS * 4); }

/* Words of this page that are not what they must be. */
static u32 wrong(u32 page)
{
	u32 i, errors = 0, expected = word_of(page, ledger[page]);
	for (i = 0; i < WORDS; i++)
		errors += page_at(page)[i] != expected;
	return errors;
}

static void write_page(u32 page)
{
	u32 i, word = word_of(page, ++ledger[page]);
	for (i = 0; i < WORDS; i++)
		page_at(page)[i] = word;
}

/* The timer's interrupt, and nothing else. */
static void start_timer(void)
{
	static const struct { u8 port, value; } set_up[] = {
		{ 0x20, 0x11 }, { 0x21, 0x20 }, { 0x21, 4 }, { 0x21, 1 }, { 0x21, 0xfe }, /* first PIC */
		{ 0xa1, 0xff },                                                         /* second PIC */
		{ 0x43, 0x34 },                                                         /* timer */
	};
	struct __attribute__((packed)) { unsigned short limit; u32 base; } table;
	u32 i, interval = 1193182 / TICKS_A_SECOND;
	table.limit = sizeof descriptors - 1;
	table.base = (u32)descriptors;
	__asm__ volatile("lgdt %0; ljmp $8, $1f; 1: mov %1, %%ds; mov %1, %%es; mov %1, %%ss" ::"m"(table),
			 "r"(16));
	gates[2 * 32] = 8 << 16 | ((u32)tick & 0xffff);
	gates[2 * 32 + 1] = ((u32)tick & 0xffff0000) | 0x8e00;
	table.limit = sizeof gates - 1;
	table.base = (u32)gates;
	__asm__ volatile("lidt %0" ::"m"(table));
	for (i = 0; i < sizeof set_up / sizeof *set_up; i++)
		out(set_up[i].port, set_up[i].value);
	out(0x40, (u8)interval);
	out(0x40, (u8)(interval >> 8));
	__asm__ volatile("sti");
}

void work(void)
{
	u32 page, round, typed, writes = 0, errors = 0;
	for (page = 0; page < PAGES; page++)
		write_page(page);
	start_timer();
	say("WORKLOAD READY\r\n");
	for (round = 0;; round++) {
		/* A quarter of them a round. */
		for (page = round % 4; page < PAGES; page += 4) {
			errors += wrong(page);
			write_page(page);
			writes++;
		}
		if (round % 10 == 0) {
			say("WORKLOAD t=0 writes=");
			say_number(writes);
			say_result(" errors=", errors);
		}
		typed = in(SERIAL + 5) & 1 ? in(SERIAL) : 0;
		switch (typed) {
		case '\n':
			for (page = 0; page < PAGES; page++)
				errors += wrong(page);
			say_result(errors ? "WORKLOAD VERDICT CORRUPT errors=" : "WORKLOAD VERDICT intact errors=", errors);
			break;
		case '0':
		case '1':
			switch_virtualization(typed == '1');
			say_result("WORKLOAD SVM on=", typed == '1');
			break;
		case '2':
			say_result("WORKLOAD NESTED ran=", run_nested(nested_guest));
			break;
		case '3':
			say("WORKLOAD NESTED for good\r\n");
			run_nested(nested_for_good);
		}
		__asm__ volatile("hlt");
	}
}
