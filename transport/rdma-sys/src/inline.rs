//! What rdma-core's headers define as `static inline` or as a macro, and so no library exports.
//!
//! Each is what the C function of the same name does: a call through the table of functions that the device's
//! provider has put into its context, or an access to a field.

use crate::{
    LibIbverbs, ibv_context, ibv_cq, ibv_device_attr_ex, ibv_port_attr, ibv_qp,
    ibv_query_device_ex_input, ibv_recv_wr, ibv_send_wr, ibv_wc, rdma_cm_id,
};
use libc::sockaddr;
use std::ffi::{c_int, c_void};
use std::mem::{offset_of, size_of};

/// What stands around an extended context: C's `struct verbs_context`, which providers allocate. "Grows up": a
/// newer library puts new fields in front, so everything is found by its distance from `context`, and `sz` says
/// how much is there. Functions that are not used here have no types.
#[allow(non_camel_case_types)]
#[repr(C)]
pub struct verbs_context {
    /// See [`ibv_query_port`].
    pub query_port: Option<
        unsafe extern "C" fn(
            *mut ibv_context,
            port_num: u8,
            *mut ibv_port_attr,
            size: usize,
        ) -> c_int,
    >,
    unused_newer: [*const c_void; 25],
    private: *const c_void,
    /// See [`ibv_query_device_ex`].
    pub query_device_ex: Option<
        unsafe extern "C" fn(
            *mut ibv_context,
            *const ibv_query_device_ex_input,
            *mut ibv_device_attr_ex,
            size: usize,
        ) -> c_int,
    >,
    unused_older: [*const c_void; 10],
    placeholder: u64,
    /// Bytes that the provider's structure has, this field's successor included.
    pub sz: usize,
    /// What everybody else has a pointer to.
    pub context: ibv_context,
}

/// The structure around a context, if it is extended and reaches up to the field at `offset`.
///
/// # Safety
/// `context` came from libibverbs and is open.
#[inline]
unsafe fn verbs_get_ctx(context: *mut ibv_context, offset: usize) -> Option<*mut verbs_context> {
    // `__VERBS_ABI_IS_EXTENDED` is all ones: the context is then the last field of a `verbs_context`.
    // SAFETY: open, says the caller.
    if unsafe { (*context).abi_compat }.addr() != usize::MAX {
        return None;
    }
    // SAFETY: extended, so the structure begins that many bytes before, as far as `sz` reaches; `sz` itself is
    // in every one of them.
    let extended: *mut verbs_context =
        unsafe { context.byte_sub(offset_of!(verbs_context, context)) }.cast();
    // SAFETY: see above.
    let size = unsafe { (*extended).sz };
    (size >= size_of::<verbs_context>() - offset).then_some(extended)
}

/// Attributes of a port; those that the host's library is too old to know are zero.
///
/// # Safety
/// `context` came from this library and is open; `attr` may be written.
pub unsafe fn ibv_query_port(
    verbs: &LibIbverbs,
    context: *mut ibv_context,
    port_num: u8,
    attr: *mut ibv_port_attr,
) -> c_int {
    // SAFETY: as the caller says; a context that is extended as far as the field has it. The exported function of
    // the same name writes no more than the beginning of the structure.
    unsafe {
        if let Some(extended) = verbs_get_ctx(context, offset_of!(verbs_context, query_port))
            && let Some(query_port) = (*extended).query_port
        {
            return query_port(context, port_num, attr, size_of::<ibv_port_attr>());
        }
        attr.write_bytes(0, 1);
        verbs.ibv_query_port(context, port_num, attr.cast())
    }
}

/// Attributes of a device with those of extensions; what the device or its library does not know is zero.
///
/// # Safety
/// `context` came from this library and is open; `attr` may be written.
pub unsafe fn ibv_query_device_ex(
    verbs: &LibIbverbs,
    context: *mut ibv_context,
    attr: *mut ibv_device_attr_ex,
) -> c_int {
    // SAFETY: as in `ibv_query_port`.
    unsafe {
        if let Some(extended) = verbs_get_ctx(context, offset_of!(verbs_context, query_device_ex))
            && let Some(query_device_ex) = (*extended).query_device_ex
        {
            let code =
                query_device_ex(context, std::ptr::null(), attr, size_of::<ibv_device_attr_ex>());
            if code != libc::EOPNOTSUPP && code != libc::ENOSYS {
                return code;
            }
        }
        attr.write_bytes(0, 1);
        verbs.ibv_query_device(context, &raw mut (*attr).orig_attr)
    }
}

/// Posts a chain of work requests to the send queue: zero, or an error number, and then `bad_wr` is the first that
/// was not taken.
///
/// # Safety
/// The queue pair exists; the chain and what it points to are valid for the call, the memory that it names for as
/// long as the device works on it.
#[inline]
pub unsafe fn ibv_post_send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
    bad_wr: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: as the caller says.
    match unsafe { (*(*qp).context).ops.post_send } {
        // SAFETY: as the caller says.
        Some(post_send) => unsafe { post_send(qp, wr, bad_wr) },
        None => libc::EOPNOTSUPP,
    }
}

/// Posts a chain of work requests to the receive queue: zero, or an error number, and then `bad_wr` is the first
/// that was not taken.
///
/// # Safety
/// As for [`ibv_post_send`].
#[inline]
pub unsafe fn ibv_post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: as the caller says.
    match unsafe { (*(*qp).context).ops.post_recv } {
        // SAFETY: as the caller says.
        Some(post_recv) => unsafe { post_recv(qp, wr, bad_wr) },
        None => libc::EOPNOTSUPP,
    }
}

/// Takes completions from a queue: how many were written to `wc`, or less than zero.
///
/// # Safety
/// The queue exists; `wc` has room for `num_entries`.
#[inline]
pub unsafe fn ibv_poll_cq(cq: *mut ibv_cq, num_entries: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: as the caller says.
    match unsafe { (*(*cq).context).ops.poll_cq } {
        // SAFETY: as the caller says.
        Some(poll_cq) => unsafe { poll_cq(cq, num_entries, wc) },
        None => -libc::EOPNOTSUPP,
    }
}

/// Asks for one event on the queue's completion channel when the next completion comes: zero, or an error number.
///
/// # Safety
/// The queue exists.
#[inline]
pub unsafe fn ibv_req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: as the caller says.
    match unsafe { (*(*cq).context).ops.req_notify_cq } {
        // SAFETY: as the caller says.
        Some(req_notify_cq) => unsafe { req_notify_cq(cq, solicited_only) },
        None => libc::EOPNOTSUPP,
    }
}

/// The address that an identifier is bound to; it has room for a `sockaddr_storage`.
///
/// # Safety
/// The identifier exists, for as long as the pointer is used.
#[inline]
pub unsafe fn rdma_get_local_addr(id: *mut rdma_cm_id) -> *mut sockaddr {
    // SAFETY: as the caller says.
    unsafe { &raw mut (*id).route.addr.__bindgen_anon_1 }.cast()
}

/// The address of the other end; it has room for a `sockaddr_storage`.
///
/// # Safety
/// The identifier exists, for as long as the pointer is used.
#[inline]
pub unsafe fn rdma_get_peer_addr(id: *mut rdma_cm_id) -> *mut sockaddr {
    // SAFETY: as the caller says.
    unsafe { &raw mut (*id).route.addr.__bindgen_anon_2 }.cast()
}
