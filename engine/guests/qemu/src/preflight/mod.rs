//! What is looked at before the guest is touched, and stands in the way of a move.

pub mod block_jobs;
pub mod devices;
pub mod disks;
pub mod nested;
