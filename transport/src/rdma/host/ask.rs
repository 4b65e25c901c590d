//! What the verbs library says of a device.

use crate::rdma::host::{
    Device, Limits, Port, PortState, Protocol, Unavailable, Unusable, mtu_bytes, open_both_ways,
    sysfs,
};
use crate::region::MemoryRegion;
use rdma_sys::{
    IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_RELAXED_ORDERING, IBV_LINK_LAYER_ETHERNET,
    IBV_LINK_LAYER_INFINIBAND, IBV_NODE_RNIC, IBV_ODP_SUPPORT, IBV_ODP_SUPPORT_WRITE,
    IBV_PORT_ACTIVE, IBV_PORT_ACTIVE_DEFER, IBV_PORT_ARMED, IBV_PORT_DOWN, IBV_PORT_INIT,
    LibIbverbs, ibv_context, ibv_device, ibv_device_attr_ex, ibv_port_attr,
};
use std::ffi::CStr;
use std::io;
use std::path::Path;
use std::ptr::NonNull;

/// The library's list of devices; freed when dropped.
pub(crate) struct DeviceList<'a> {
    verbs: &'a LibIbverbs,
    first: NonNull<*mut ibv_device>,
    count: usize,
}

impl<'a> DeviceList<'a> {
    pub(crate) fn get(verbs: &'a LibIbverbs) -> Result<Self, Unavailable> {
        let mut count = 0;
        // SAFETY: `count` may be written.
        let first = NonNull::new(unsafe { verbs.ibv_get_device_list(&raw mut count) });
        let first = first.ok_or_else(|| match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENOSYS) => Unavailable::Kernel,
            e => Unavailable::List(e),
        })?;
        Ok(Self { verbs, first, count: usize::try_from(count).unwrap_or(0) })
    }

    pub(crate) fn devices(&self) -> impl Iterator<Item = *mut ibv_device> + '_ {
        // SAFETY: the library says that so many are there; they are until the list is freed.
        (0..self.count).map(|index| unsafe { *self.first.as_ptr().add(index) })
    }
}

impl Drop for DeviceList<'_> {
    fn drop(&mut self) {
        // SAFETY: it came from the library and is freed once.
        unsafe { self.verbs.ibv_free_device_list(self.first.as_ptr()) }
    }
}

/// An open device; closed when dropped.
struct Context<'a> {
    verbs: &'a LibIbverbs,
    raw: NonNull<ibv_context>,
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: it came from the library, and nothing was made on it. A failure leaves nothing to
        // be done.
        unsafe { self.verbs.ibv_close_device(self.raw.as_ptr()) };
    }
}

/// Asks a device of a list that is not freed yet.
pub(crate) fn ask(verbs: &LibIbverbs, device: *mut ibv_device) -> Result<Device, Unusable> {
    // SAFETY: the list is there, so the device is; its name ends with a zero.
    let name =
        unsafe { CStr::from_ptr(verbs.ibv_get_device_name(device)) }.to_string_lossy().into_owned();
    // SAFETY: the list is there, so the device is.
    let (node_type, guid) =
        unsafe { ((*device).node_type, u64::from_be(verbs.ibv_get_device_guid(device))) };
    // SAFETY: the list is there, so the device is; the name of its file ends with a zero.
    let file = unsafe { CStr::from_ptr((&raw const (*device).dev_name).cast()) };
    let file = format!("/dev/infiniband/{}", file.to_string_lossy());
    let unusable =
        |what, source| Unusable { device: name.clone(), what, file: file.clone(), source };

    // SAFETY: the list is there, so the device is.
    let raw = NonNull::new(unsafe { verbs.ibv_open_device(device) }).ok_or_else(|| {
        let unsaid = io::Error::last_os_error();
        // Where permission is missing the library says that there is no such file: the file itself
        // knows better.
        unusable("opening", open_both_ways(&file).err().unwrap_or(unsaid))
    })?;
    let context = Context { verbs, raw };
    let mut attr = ibv_device_attr_ex::default();
    // SAFETY: the context is open, `attr` may be written.
    let code = unsafe { rdma_sys::ibv_query_device_ex(verbs, raw.as_ptr(), &raw mut attr) };
    succeeded(code).map_err(|e| unusable("asking for its limits", e))?;
    let ports = (1..=attr.orig_attr.phys_port_cnt)
        .map(|number| context.port(&name, node_type, number))
        .collect::<io::Result<_>>()
        .map_err(|e| unusable("asking for a port", e))?;
    Ok(Device {
        guid,
        limits: limits(&attr),
        on_demand_paging: on_demand_paging(&attr),
        relaxed_ordering: context.takes_relaxed_ordering(),
        ports,
        name,
    })
}

impl Context<'_> {
    /// Registers one page with and, if that is refused, without relaxed ordering.
    fn takes_relaxed_ordering(&self) -> Option<bool> {
        /// A page of any host of ours.
        const TRIAL_BYTES: usize = 4096;
        let memory = MemoryRegion::anonymous(TRIAL_BYTES).ok()?;
        // SAFETY: the context is open.
        let domain = NonNull::new(unsafe { self.verbs.ibv_alloc_pd(self.raw.as_ptr()) })?;
        let takes = |flags: u32| {
            let access = (IBV_ACCESS_LOCAL_WRITE | flags) as i32;
            let start = memory.as_ptr().cast();
            // SAFETY: the domain is there, and the memory is mapped until after the registration
            // has ended.
            let made =
                unsafe { self.verbs.ibv_reg_mr(domain.as_ptr(), start, TRIAL_BYTES, access) };
            // SAFETY: made a moment ago and used by nobody. A failure leaves nothing to be done.
            NonNull::new(made)
                .map(|made| unsafe { self.verbs.ibv_dereg_mr(made.as_ptr()) })
                .is_some()
        };
        let taken =
            if takes(IBV_ACCESS_RELAXED_ORDERING) { Some(true) } else { takes(0).then_some(false) };
        // SAFETY: made above, and nothing stands on it any more.
        unsafe { self.verbs.ibv_dealloc_pd(domain.as_ptr()) };
        taken
    }

    fn port(&self, device: &str, node_type: i32, number: u8) -> io::Result<Port> {
        let mut attr = ibv_port_attr::default();
        // SAFETY: the context is open, `attr` may be written.
        let code = unsafe {
            rdma_sys::ibv_query_port(self.verbs, self.raw.as_ptr(), number, &raw mut attr)
        };
        succeeded(code)?;
        let directory = sysfs::port(Path::new("/"), device, number);
        Ok(Port {
            number,
            state: state(attr.state),
            protocol: protocol(node_type, attr.link_layer),
            mtu_bytes: mtu_bytes(attr.active_mtu),
            message_bytes_max: attr.max_msg_sz,
            rate: sysfs::line(&directory.join("rate")),
            lid: attr.lid,
            gids: sysfs::gids(&directory),
        })
    }
}

/// Verbs return an error number, or -1 and leave it in `errno`.
fn succeeded(code: i32) -> io::Result<()> {
    match code {
        0 => Ok(()),
        1.. => Err(io::Error::from_raw_os_error(code)),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(crate) fn limits(attr: &ibv_device_attr_ex) -> Limits {
    // A negative count makes no sense.
    let count = |number: i32| u32::try_from(number).unwrap_or(0);
    let attr = &attr.orig_attr;
    Limits {
        queue_pairs: count(attr.max_qp),
        work_requests: count(attr.max_qp_wr),
        slices: count(attr.max_sge),
        completion_queues: count(attr.max_cq),
        completions: count(attr.max_cqe),
        regions: count(attr.max_mr),
        region_bytes: attr.max_mr_size,
    }
}

pub(crate) fn on_demand_paging(attr: &ibv_device_attr_ex) -> bool {
    attr.odp_caps.general_caps & u64::from(IBV_ODP_SUPPORT) != 0
        && attr.odp_caps.per_transport_caps.rc_odp_caps & IBV_ODP_SUPPORT_WRITE != 0
}

pub(crate) fn state(number: u32) -> PortState {
    match number {
        IBV_PORT_DOWN => PortState::Down,
        IBV_PORT_INIT => PortState::Initializing,
        IBV_PORT_ARMED => PortState::Armed,
        IBV_PORT_ACTIVE => PortState::Active,
        IBV_PORT_ACTIVE_DEFER => PortState::ActiveDefer,
        other => PortState::Other(other),
    }
}

pub(crate) fn protocol(node_type: i32, link_layer: u8) -> Protocol {
    match (node_type, u32::from(link_layer)) {
        (IBV_NODE_RNIC, _) => Protocol::Iwarp,
        (_, IBV_LINK_LAYER_INFINIBAND) => Protocol::InfiniBand,
        (_, IBV_LINK_LAYER_ETHERNET) => Protocol::Roce,
        _ => Protocol::Other,
    }
}
