//! RDMA: what this host has of it.

pub mod device;
