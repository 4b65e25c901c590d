//! Makes a vCPU leave the guest: a signal, and a flag that KVM looks at.

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use pageferry_engine::error::{Error, Result};
use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::Once;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// The `kvm_run` of this thread's vCPU, for the signal handler. Made at compile time and never
    /// dropped, so that a handler may read it at any moment.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = KVM_RUN.with(Cell::get);
    if !run.is_null() {
        // SAFETY: the mapping lives as long as the thread has it here ([`Registered`]), and a byte
        // that the kernel reads is written by this thread alone.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}

/// Has this thread's `kvm_run` known to the signal handler for as long as it lives.
pub(crate) struct Registered;

impl Registered {
    pub(crate) fn new(vcpu: &mut VcpuFd) -> Self {
        KVM_RUN.with(|run| run.set(vcpu.get_kvm_run()));
        Self
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        KVM_RUN.with(|run| run.set(null_mut()));
    }
}

pub(crate) fn install_handler() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        result = register_signal_handler(SIGRTMIN(), on_kick)
            .map_err(|e| Error::os("installing the signal that calls vCPUs out of the guest", e));
    });
    result
}
