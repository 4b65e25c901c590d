/*
 * A guest within the guest, by AMD's SVM (AMD APM, volume 2, chapter 15 and appendix B): four instructions that count and
 * go back to the outer guest; or one that never goes back. Of what it does, what ends it is intercepted and no more.
 */
enum {
	EFER = 0xc0000080,
	EFER_SVME = 1 << 12,
	VM_HSAVE_PA = 0xc0010117,
	EXIT_VMMCALL = 0x81,
};
static u32 control_block[WORDS] __attribute__((aligned(4096)));
static u32 host_save[WORDS] __attribute__((aligned(4096)));
static u32 page_directory[WORDS] __attribute__((aligned(4096)));
static u32 nested_stack[64];
/* Written by the nested guest alone. */
volatile u32 nested_count;

extern const u8 nested_guest[], nested_for_good[];
__asm__(".text\n"
	"nested_guest: incl nested_count\n"
	"vmmcall\n"
	"jmp nested_guest\n"
	"nested_for_good: jmp nested_for_good\n"
	".previous\n");

static void write_msr(u32 msr, u32 value) { __asm__ volatile("wrmsr" ::"c"(msr), "a"(value), "d"(0)); }

/* KVM runs nested guests for a guest with paging only. Each address is itself, in pages of 4 MiB. */
static void switch_paging_on(void)
{
	u32 i;
	for (i = 0; i < WORDS; i++)
		page_directory[i] = i << 22 | 0x83;
	__asm__ volatile("mov %0, %%cr4; mov %1, %%cr3; mov %2, %%cr0" ::"r"(0x10), "r"(page_directory),
			 "r"(0x80000011)
			 : "memory");
}

/* As a hypervisor does when it is loaded: no nested guest runs for it. */
static void switch_virtualization(u32 on)
{
	if (on) {
		switch_paging_on();
		write_msr(VM_HSAVE_PA, (u32)host_save);
	}
	write_msr(EFER, on ? EFER_SVME : 0);
}

static void segment(u32 offset, u32 selector, u32 attributes)
{
	control_block[offset / 4] = selector | attributes << 16;
	control_block[offset / 4 + 1] = 0xffffffff;
}

/* Whether the nested guest ran, and ended as it should. */
static u32 run_nested(const u8 *code)
{
	u32 before = nested_count;
	control_block[0x00c / 4] = 1u << 31; /* intercepted: the end of it all, */
	control_block[0x010 / 4] = 3;	     /* VMRUN, VMMCALL */
	control_block[0x058 / 4] = 1; /* address space */
	segment(0x400, 16, 0xc93);    /* es */
	segment(0x410, 8, 0xc9b);     /* cs */
	segment(0x420, 16, 0xc93);    /* ss */
	segment(0x430, 16, 0xc93);    /* ds */
	control_block[0x4d0 / 4] = EFER_SVME;
	control_block[0x558 / 4] = 0x11; /* cr0: protected mode */
	control_block[0x560 / 4] = 0x400;      /* dr7 */
	control_block[0x568 / 4] = 0xffff0ff0; /* dr6 */
	control_block[0x570 / 4] = 2;	       /* flags: no interrupts */
	control_block[0x578 / 4] = (u32)code;
	control_block[0x5d8 / 4] = (u32)(nested_stack + 64);
	__asm__ volatile("vmrun; stgi" ::"a"(control_block) : "memory", "cc");
	return control_block[0x070 / 4] == EXIT_VMMCALL && nested_count == before + 1;
}
