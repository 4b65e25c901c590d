//! What a device must be able to do, and the path that is taken over it.

use super::path::{Path, Port, RdmaOptions, mtu_bytes};
use crate::error::{Error, Result};
use crate::preamble::LANES_MAX;
use crate::rdma::lane::{RESERVED, WRITES_MAX, WRITES_MIN};
use crate::rdma::verbs::cm::{Id, code_to_io};
use crate::rdma::verbs::queue_pair::{Depths, VerbsQueue};
use rdma_sys::{Libraries, ibv_device_attr, ibv_port_attr};
use std::net::SocketAddr;

/// What soft-iWARP (siw) calls its vendor. In Linux 6.12 it takes every registration by the
/// process's own address, whatever name is asked for, and does not say so.
const SOFT_IWARP_VENDOR: u32 = 0x62_6d74;

/// What a device can do, as far as we care.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Writes that one send queue may hold.
    pub(crate) writes: usize,
    /// Longest write.
    pub(crate) write_bytes: u32,
    /// Whether it knows registered memory by the address that it is given, and not by the process's
    /// own.
    pub(crate) names_memory: bool,
    /// Deepest queue.
    depth: usize,
}

impl Limits {
    pub(crate) fn of(id: &Id) -> Result<Self> {
        let mut device = ibv_device_attr::default();
        let mut port = ibv_port_attr::default();
        let verbs = &id.libraries().verbs;
        let asking =
            |what| move |e| Error::os(format!("asking {} what {what} can do", id.device()), e);
        // SAFETY: the context is open as long as the identifier, and the structure may be written.
        let code = unsafe { verbs.ibv_query_device(id.context(), &raw mut device) };
        code_to_io(code).map_err(asking("it"))?;
        // SAFETY: as above.
        let code =
            unsafe { rdma_sys::ibv_query_port(verbs, id.context(), id.port(), &raw mut port) };
        code_to_io(code).map_err(asking("its port"))?;
        let at_least = |limit: i32| usize::try_from(limit).unwrap_or(0);
        let depth = at_least(device.max_qp_wr).min(at_least(device.max_cqe) / 2);
        let writes = depth.saturating_sub(RESERVED).min(WRITES_MAX);
        if writes < WRITES_MIN || port.max_msg_sz < 4096 {
            let what = format!(
                "{} is too small: queues of {depth} work requests of {} bytes",
                id.device(),
                port.max_msg_sz
            );
            return Err(Error::NoPath { what });
        }
        let names_memory = device.vendor_id != SOFT_IWARP_VENDOR;
        Ok(Self { writes, write_bytes: port.max_msg_sz, names_memory, depth })
    }

    /// Depths that the device can do.
    pub(crate) fn clip(&self, depths: Depths) -> Depths {
        Depths { receives: depths.receives.min(self.depth), ..depths }
    }
}

/// Opens the libraries, or says in one line why there is no RDMA here.
pub(crate) fn libraries() -> Result<&'static Libraries> {
    Libraries::open().map_err(|e| Error::NoPath { what: e.to_string() })
}

/// Fails unless the identifier's device and port are those that were asked for.
pub(crate) fn check_device(id: &Id, options: &RdmaOptions) -> Result<()> {
    let (device, port) = (id.device(), id.port());
    let (wanted, wanted_port) =
        (options.device.as_deref().unwrap_or(&device), options.port.unwrap_or(port));
    if wanted == device && wanted_port == port {
        return Ok(());
    }
    let here = id.addresses().0.map_or_else(String::new, |address| format!(" ({})", address.ip()));
    let fix = Port::new(wanted, wanted_port).addresses();
    Err(Error::NoPath {
        what: format!(
            "the way leads by {device} port {port}{here}, not by {wanted} port {wanted_port} as asked: {fix}"
        ),
    })
}

pub(crate) fn check_lanes(lanes: u8) -> Result<()> {
    if lanes == 0 || usize::from(lanes) > LANES_MAX {
        return Err(Error::Bounds {
            what: format!("a link of {lanes} lanes (1 to {LANES_MAX} are possible)"),
        });
    }
    Ok(())
}

/// What a connected lane's device says of its path. The wanted GID, if any, must be the one in use.
pub(crate) fn path_of(queue: &VerbsQueue, options: &RdmaOptions) -> Result<Path> {
    let id = queue.id();
    let (device, port) = (id.device(), id.port());
    let attributes =
        queue.attributes().map_err(|e| Error::os("asking a queue pair for its path", e))?;
    let index = attributes.ah_attr.grh.sgid_index;
    let ports = Port::new(&device, port);
    if options.gid_index.is_some_and(|wanted| wanted != index) {
        let wanted = options.gid_index.unwrap_or(index);
        return Err(Error::NoPath {
            what: format!(
                "the connection manager took GID index {index} ({}) of {device} port {port}, not {wanted} ({}) as asked; \
                 on RoCE its version is set for the whole device (cma_roce_mode)",
                ports.link(index),
                ports.link(wanted)
            ),
        });
    }
    let (from, to) = id.addresses();
    let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
    Ok(Path {
        gid: ports.gid(index).unwrap_or_default(),
        link: ports.link(index).into(),
        device,
        port,
        active_mtu: mtu_bytes(attributes.path_mtu),
        from: from.unwrap_or(nowhere),
        to: to.unwrap_or(nowhere),
    })
}
