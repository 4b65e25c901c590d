//! How a guest begins: firmware tables, the kernel, the first vCPU.

pub mod acpi;
pub mod layout;
pub mod linux;
pub mod long_mode;
