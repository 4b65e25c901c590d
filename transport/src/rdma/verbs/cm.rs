//! rdma_cm as objects that clean up after themselves: an event channel, identifiers, and events
//! that are copied out and acknowledged at once, so that nothing ever waits for an acknowledgement.
//!
//! Order of destruction: queue pair, then its identifier, then the channel, which each identifier
//! holds.

use crate::error::{Error, Result};
use crate::rdma::health::wait_readable;
use crate::rdma::verbs::address::{RawAddress, read_address};
use rdma_sys::{
    Libraries, ibv_context, ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, rdma_cm_event,
    rdma_cm_id, rdma_conn_param, rdma_event_channel,
};
use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Attempts before a request that is not acknowledged breaks the queue pair; the most there is.
const RETRIES: u8 = 7;

/// For a receive queue that is empty: without end. Ours never is, see the target's receive depth.
const RETRIES_NOT_READY: u8 = 7;

/// Unacknowledged requests are repeated after 4.096 us * 2^17, half a second: with [`RETRIES`] a
/// peer that is gone is noticed after four seconds (devices may attach to four times as long), and
/// a hiccup of the network is not.
const ACK_TIMEOUT: u8 = 17;

/// We use no remote reads; some devices want one for their own handshake.
const READS: u8 = 1;

/// Longest private data of a refusal (InfiniBand's REJ message).
const REFUSAL_BYTES_MAX: usize = 148;

/// Where events of identifiers arrive.
pub(crate) struct Channel {
    libraries: &'static Libraries,
    raw: *mut rdma_event_channel,
}

// SAFETY: librdmacm guards its objects with locks of its own, and reading events is a system call
// on the channel's descriptor.
unsafe impl Send for Channel {}

// SAFETY: as above.
unsafe impl Sync for Channel {}

/// What happened to an identifier.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) kind: u32,
    /// A negative error number, or a reason of the connection protocol.
    pub(crate) status: i32,
    /// Which identifier, to compare with [`Id::name`].
    pub(crate) id: usize,
    /// The identifier that a connection request made.
    pub(crate) new: Option<Id>,
    /// What the peer sent with it, zero-padded.
    pub(crate) private: Vec<u8>,
}

impl Channel {
    pub(crate) fn new(libraries: &'static Libraries) -> Result<Arc<Self>> {
        // SAFETY: no conditions.
        let raw = unsafe { libraries.cm.rdma_create_event_channel() };
        if raw.is_null() {
            let e = io::Error::last_os_error();
            let what = match e.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV) => {
                    "this kernel has no RDMA connection manager (load the module rdma_ucm)".into()
                }
                _ => format!("the RDMA connection manager cannot be opened: {e}"),
            };
            return Err(Error::NoPath { what });
        }
        let this = Self { libraries, raw };
        // A wait must end at its deadline, so nothing may block inside the library.
        rustix::io::ioctl_fionbio(this.fd(), true)
            .map_err(|e| Error::os("setting up an event channel", e))?;
        Ok(Arc::new(this))
    }

    /// Readable when there is an event.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel and its descriptor live as long as `self`.
        unsafe { BorrowedFd::borrow_raw((*self.raw).fd) }
    }

    /// The next event, if there is one.
    pub(crate) fn next(self: &Arc<Self>) -> Result<Option<Event>> {
        let mut raw: *mut rdma_cm_event = std::ptr::null_mut();
        // SAFETY: the channel lives as long as `self`.
        if unsafe { self.libraries.cm.rdma_get_cm_event(self.raw, &raw mut raw) } != 0 {
            let e = io::Error::last_os_error();
            return match e.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(None),
                _ => Err(Error::os("reading an event of the RDMA connection manager", e)),
            };
        }
        // SAFETY: the library made the event, and it is ours until it is acknowledged.
        let event = unsafe { &*raw };
        let is_request = event.event == rdma_sys::RDMA_CM_EVENT_CONNECT_REQUEST;
        let new = is_request.then(|| Id { raw: event.id, channel: Arc::clone(self) });
        let mut private = Vec::new();
        if is_request || event.event == rdma_sys::RDMA_CM_EVENT_REJECTED {
            // SAFETY: these events are about a connection, so `conn` is what is valid.
            let conn = unsafe { event.param.conn };
            if !conn.private_data.is_null() {
                private.resize(usize::from(conn.private_data_len), 0);
                // SAFETY: the library says that so many bytes are there until the acknowledgement.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        conn.private_data.cast(),
                        private.as_mut_ptr(),
                        private.len(),
                    );
                }
            }
        }
        let copied =
            Event { kind: event.event, status: event.status, id: event.id.addr(), new, private };
        // SAFETY: gotten above, and nothing of it is used after this.
        unsafe { self.libraries.cm.rdma_ack_cm_event(raw) };
        Ok(Some(copied))
    }

    /// Waits for the next event.
    pub(crate) fn wait(self: &Arc<Self>, what: &'static str, deadline: Instant) -> Result<Event> {
        loop {
            if let Some(event) = self.next()? {
                return Ok(event);
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout { what });
            }
            wait_readable(&[self.fd()], Some(deadline))?;
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: every identifier holds the channel, so none is left.
        unsafe { self.libraries.cm.rdma_destroy_event_channel(self.raw) };
    }
}

/// An identifier: what a socket is to TCP. Holds the device open.
///
/// Its end is told to the peer by the kernel. On a port that is down that cannot be, and must not
/// be tried: soft-RoCE's own queue pair for such messages (QP1) goes into the error state for good
/// when one cannot be sent (Linux 6.12), and no connection comes about by that device any more. So
/// the end of an identifier waits, in a thread of its own, until the port is up again.
pub(crate) struct Id {
    raw: *mut rdma_cm_id,
    channel: Arc<Channel>,
}

/// How long the end of an identifier waits for its port. A process that holds on to a dead port for
/// longer keeps its device from being taken away.
const PORT_PATIENCE: Duration = Duration::from_secs(60);

/// And then for the routes, which come back after the port.
const ROUTES_PATIENCE: Duration = Duration::from_secs(1);

/// How often it looks.
const PORT_LOOK_EVERY: Duration = Duration::from_millis(100);

// SAFETY: as for the channel. What is read of the structure itself is set before the identifier is
// shared.
unsafe impl Send for Id {}

// SAFETY: as above.
unsafe impl Sync for Id {}

impl Id {
    pub(crate) fn new(channel: &Arc<Channel>) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        let ps = rdma_sys::RDMA_PS_TCP;
        // SAFETY: the channel lives, and `raw` is where the identifier goes.
        let code = unsafe {
            channel.libraries.cm.rdma_create_id(channel.raw, &raw mut raw, std::ptr::null_mut(), ps)
        };
        check(code).map_err(|e| Error::os("creating an identifier for an RDMA connection", e))?;
        Ok(Self { raw, channel: Arc::clone(channel) })
    }

    pub(crate) fn libraries(&self) -> &'static Libraries {
        self.channel.libraries
    }

    /// Tells identifiers apart.
    pub(crate) fn name(&self) -> usize {
        self.raw.addr()
    }

    /// The device's context; null until an address is resolved or bound.
    pub(crate) fn context(&self) -> *mut ibv_context {
        // SAFETY: the identifier lives as long as `self`.
        unsafe { (*self.raw).verbs }
    }

    /// The device's name, empty before there is one.
    pub(crate) fn device(&self) -> String {
        let context = self.context();
        if context.is_null() {
            return String::new();
        }
        // SAFETY: an open context has a device, whose name is a string that lives as long.
        unsafe {
            let name = self.libraries().verbs.ibv_get_device_name((*context).device);
            CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    }

    /// The device's port.
    pub(crate) fn port(&self) -> u8 {
        // SAFETY: the identifier lives as long as `self`.
        unsafe { (*self.raw).port_num }
    }

    /// The addresses of this side and of the other.
    pub(crate) fn addresses(&self) -> (Option<SocketAddr>, Option<SocketAddr>) {
        // SAFETY: the identifier lives as long as `self`, and both have room for any address.
        unsafe {
            (
                read_address(rdma_sys::rdma_get_local_addr(self.raw)),
                read_address(rdma_sys::rdma_get_peer_addr(self.raw)),
            )
        }
    }

    /// Sets the traffic class and the time after which requests are repeated. Neither is needed to
    /// go on where a device or an old library refuses the second.
    pub(crate) fn set_options(&self, traffic_class: Option<u8>) -> Result<()> {
        if let Some(mut class) = traffic_class {
            self.set_option(rdma_sys::RDMA_OPTION_ID_TOS as c_int, &mut class)
                .map_err(|e| Error::os(format!("setting the traffic class {class}"), e))?;
        }
        if let Err(e) =
            self.set_option(rdma_sys::RDMA_OPTION_ID_ACK_TIMEOUT as c_int, &mut { ACK_TIMEOUT })
        {
            tracing::debug!("the device keeps its own acknowledgement timeout: {e}");
        }
        Ok(())
    }

    fn set_option(&self, option: c_int, value: &mut u8) -> io::Result<()> {
        let level = rdma_sys::RDMA_OPTION_ID as c_int;
        let value: *mut c_void = std::ptr::from_mut(value).cast();
        // SAFETY: both options are one byte, which the call copies.
        check(unsafe { self.libraries().cm.rdma_set_option(self.raw, level, option, value, 1) })
    }

    pub(crate) fn bind(&self, address: SocketAddr) -> io::Result<()> {
        let mut address = RawAddress::from(address);
        // SAFETY: an address of its family's size, which the call copies.
        check(unsafe { self.libraries().cm.rdma_bind_addr(self.raw, address.as_ptr()) })
    }

    pub(crate) fn listen(&self, backlog: c_int) -> io::Result<()> {
        // SAFETY: the identifier lives as long as `self`.
        check(unsafe { self.libraries().cm.rdma_listen(self.raw, backlog) })
    }

    /// The port that it listens on.
    pub(crate) fn local_port(&self) -> u16 {
        // SAFETY: the identifier lives as long as `self`.
        u16::from_be(unsafe { self.libraries().cm.rdma_get_src_port(self.raw) })
    }

    /// Begins to find out which device leads there.
    pub(crate) fn resolve_address(
        &self,
        from: Option<SocketAddr>,
        to: SocketAddr,
        within_ms: c_int,
    ) -> io::Result<()> {
        let mut from = from.map(RawAddress::from);
        let from = from.as_mut().map_or(std::ptr::null_mut(), RawAddress::as_ptr);
        let mut to = RawAddress::from(to);
        // SAFETY: addresses of their families' sizes, or none, which the call copies.
        check(unsafe {
            self.libraries().cm.rdma_resolve_addr(self.raw, from, to.as_ptr(), within_ms)
        })
    }

    /// Begins to find the way there.
    pub(crate) fn resolve_route(&self, within_ms: c_int) -> io::Result<()> {
        // SAFETY: the identifier lives as long as `self`.
        check(unsafe { self.libraries().cm.rdma_resolve_route(self.raw, within_ms) })
    }

    /// Makes the identifier's queue pair.
    ///
    /// # Safety
    /// The protection domain and the completion queues in `attributes` belong to this identifier's
    /// device and outlive the queue pair.
    pub(crate) unsafe fn create_queue_pair(
        &self,
        pd: *mut ibv_pd,
        attributes: &mut ibv_qp_init_attr,
    ) -> io::Result<*mut ibv_qp> {
        // SAFETY: as the caller says.
        check(unsafe { self.libraries().cm.rdma_create_qp(self.raw, pd, attributes) })?;
        // SAFETY: the identifier lives as long as `self`.
        Ok(unsafe { (*self.raw).qp })
    }

    /// Destroys the identifier's queue pair: nothing is read or written through it any more.
    ///
    /// # Safety
    /// It was made, and nobody uses it after this.
    pub(crate) unsafe fn destroy_queue_pair(&self) {
        // SAFETY: as the caller says.
        unsafe { self.libraries().cm.rdma_destroy_qp(self.raw) };
    }

    /// Begins to connect.
    pub(crate) fn connect(&self, private: &[u8]) -> io::Result<()> {
        let mut parameters = parameters(private);
        // SAFETY: the private data is copied by the call.
        check(unsafe { self.libraries().cm.rdma_connect(self.raw, &raw mut parameters) })
    }

    /// Takes a connection request.
    pub(crate) fn accept(&self) -> io::Result<()> {
        let mut parameters = parameters(&[]);
        // SAFETY: no private data.
        check(unsafe { self.libraries().cm.rdma_accept(self.raw, &raw mut parameters) })
    }

    /// Refuses a connection request.
    pub(crate) fn reject(&self, why: &str) {
        let why = &why.as_bytes()[..why.len().min(REFUSAL_BYTES_MAX)];
        // SAFETY: the bytes are copied by the call.
        let code = unsafe {
            self.libraries().cm.rdma_reject(self.raw, why.as_ptr().cast(), why.len() as u8)
        };
        if let Err(e) = check(code) {
            tracing::debug!("a connection request went away while it was refused: {e}");
        }
    }

    /// Whether its device has a port that carries nothing now.
    fn port_is_down(&self) -> bool {
        let device = self.device();
        !device.is_empty() && port_is_down(&device, self.port())
    }

    /// Moves the queue pair to the error state and tells the peer, if that can be: of a `healthy`
    /// link it is known that the port is up.
    pub(crate) fn disconnect(&self, healthy: bool) {
        if !healthy && self.port_is_down() {
            return;
        }
        // SAFETY: the identifier lives as long as `self`.
        if let Err(e) = check(unsafe { self.libraries().cm.rdma_disconnect(self.raw) }) {
            // The peer was faster, or the device is gone.
            tracing::debug!("disconnecting a lane: {e}");
        }
    }

    /// What the device says of the identifier's queue pair: path MTU, index of the source GID.
    ///
    /// # Safety
    /// `qp` is this identifier's queue pair.
    pub(crate) unsafe fn query_queue_pair(&self, qp: *mut ibv_qp) -> io::Result<ibv_qp_attr> {
        let mut attributes = ibv_qp_attr::default();
        let mut made = ibv_qp_init_attr::default();
        let mask = (rdma_sys::IBV_QP_AV | rdma_sys::IBV_QP_PATH_MTU) as c_int;
        // SAFETY: as the caller says; both structures may be written.
        let code = unsafe {
            self.libraries().verbs.ibv_query_qp(qp, &raw mut attributes, mask, &raw mut made)
        };
        code_to_io(code)?;
        Ok(attributes)
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        let end = End { raw: self.raw, channel: Arc::clone(&self.channel) };
        if !self.port_is_down() {
            return drop(end);
        }
        let (device, port) = (self.device(), self.port());
        let waiting = std::thread::Builder::new().name("ferry-rdma-end".into()).spawn(move || {
            let deadline = Instant::now() + PORT_PATIENCE;
            while port_is_down(&device, port) && Instant::now() < deadline {
                std::thread::sleep(PORT_LOOK_EVERY);
            }
            std::thread::sleep(ROUTES_PATIENCE);
            drop(end);
        });
        // Without a thread the closure was dropped, and with it the identifier.
        if let Err(e) = waiting {
            tracing::debug!("an identifier of a connection ended on a dead port: {e}");
        }
    }
}

/// Destroys an identifier when it is dropped.
struct End {
    raw: *mut rdma_cm_id,
    channel: Arc<Channel>,
}

// SAFETY: as for the identifier.
unsafe impl Send for End {}

impl Drop for End {
    fn drop(&mut self) {
        // SAFETY: its queue pair is gone (whoever made it destroys it), every event was
        // acknowledged when it was read, and of an identifier one end is made.
        if let Err(e) = check(unsafe { self.channel.libraries.cm.rdma_destroy_id(self.raw) }) {
            tracing::debug!("destroying an identifier of a connection: {e}");
        }
    }
}

/// Whether the kernel says so. A device that is gone is not down.
fn port_is_down(device: &str, port: u8) -> bool {
    std::fs::read_to_string(format!("/sys/class/infiniband/{device}/ports/{port}/state"))
        .is_ok_and(|state| !state.contains("ACTIVE"))
}

impl std::fmt::Debug for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Id").field(&self.raw).finish()
    }
}

fn parameters(private: &[u8]) -> rdma_conn_param {
    rdma_conn_param {
        private_data: if private.is_empty() { std::ptr::null() } else { private.as_ptr().cast() },
        private_data_len: u8::try_from(private.len()).expect("a preamble"),
        responder_resources: READS,
        initiator_depth: READS,
        flow_control: 1,
        retry_count: RETRIES,
        rnr_retry_count: RETRIES_NOT_READY,
        ..rdma_conn_param::default()
    }
}

/// librdmacm's way to fail: minus one and errno.
fn check(code: c_int) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// libibverbs' way to fail: the error number itself, or minus one and errno.
pub(crate) fn code_to_io(code: c_int) -> io::Result<()> {
    match code {
        0 => Ok(()),
        1.. => Err(io::Error::from_raw_os_error(code)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_through_c() {
        for text in ["10.77.0.1:18515", "[fe80::1%3]:1", "[2001:db8::7]:65535"] {
            let address: SocketAddr = text.parse().unwrap();
            let mut raw = RawAddress::from(address);
            // SAFETY: made from an address of its family.
            assert_eq!(unsafe { read_address(raw.as_ptr()) }, Some(address));
        }
    }
}
