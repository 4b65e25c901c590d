//! What may carry the data: the choice of the user, and what this host lacks for it.

use crate::error::{Error, Result};
use crate::host::descriptors;
use pageferry_transport::rdma::RdmaOptions;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What may carry the data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// RDMA where both hosts have a path to each other by it, TCP otherwise.
    #[default]
    Auto,
    /// RDMA or nothing.
    Rdma,
    /// TCP on io_uring; RDMA is not touched.
    Tcp,
}

/// What may carry the data, and how RDMA is used if it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkChoice {
    /// What carries the data.
    pub transport: Transport,
    /// RDMA device that must be used, such as mlx5_0. [default: the one that has the address]
    pub rdma_device: Option<String>,
    /// Port of the device, from 1. [default: the one that has the address]
    pub rdma_port: Option<u8>,
    /// Index of the local GID; on RoCE it names an address and the version. [default: the system's]
    pub rdma_gid_index: Option<u8>,
    /// Traffic class of all packets, such as 104 for the DSCP 26. [default: the system's]
    pub rdma_traffic_class: Option<u8>,
}

impl LinkChoice {
    pub(crate) fn options(&self) -> RdmaOptions {
        RdmaOptions {
            device: self.rdma_device.clone(),
            port: self.rdma_port,
            gid_index: self.rdma_gid_index,
            traffic_class: self.rdma_traffic_class,
            ..RdmaOptions::default()
        }
    }
}

/// Before lanes are opened, at either end: fails, with the fix, if this process cannot have so
/// many.
pub fn check_lanes(lanes: u8) -> Result<()> {
    descriptors::ensure(descriptors::PER_LANE * u64::from(lanes), &format!("{lanes} lanes"))
}

/// What this host lacks for lanes, found before anything is touched.
pub(crate) fn as_refusal(error: Error) -> Error {
    match error {
        Error::LocalTransport(_) => Error::Refused(error.chain()),
        other => other,
    }
}

/// Why there is no way by RDMA, for people.
pub(crate) fn why_not(error: pageferry_transport::Error) -> String {
    match error {
        pageferry_transport::Error::NoPath { what } => what,
        other => Error::from(other).chain(),
    }
}

/// For all lanes to be connected by RDMA: milliseconds on a live path, but the connection manager
/// repeats a lost request only after 4.2 s (`cma_response_timeout`), and a link that has just come
/// up loses some.
pub(crate) const CONNECT_MAX: Duration = Duration::from_secs(15);
