//! Choices of the engine and its guests, as options of a command line: they know no command line
//! themselves.

use clap::ValueEnum;
use pageferry_engine::guest::Vouched;
use pageferry_engine::memory::lost_page;
use pageferry_engine::net::choice::{LinkChoice, Transport};
use pageferry_engine::policy;
use pageferry_microvm::{machine, payload};

/// An enum with the same variants as one of the engine's, whose documents are the help. Both
/// conversions are exhaustive: a variant more on either side does not compile.
macro_rules! choice {
    ($(#[$about:meta])* $name:ident is $theirs:ty { $($(#[$help:meta])* $variant:ident),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
        pub enum $name {
            $($(#[$help])* $variant),+
        }

        impl From<$name> for $theirs {
            fn from(choice: $name) -> Self {
                match choice { $($name::$variant => Self::$variant),+ }
            }
        }

        impl From<$theirs> for $name {
            fn from(choice: $theirs) -> Self {
                match choice { $(<$theirs>::$variant => Self::$variant),+ }
            }
        }
    };
}

choice! {
    /// What may carry the data.
    TransportArg is Transport {
        /// RDMA where both hosts have a path to each other by it, TCP otherwise.
        #[default]
        Auto,
        /// RDMA or nothing.
        Rdma,
        /// TCP on io_uring; RDMA is not touched.
        Tcp,
    }
}

choice! {
    /// What to do about a guest whose rounds do not shrink.
    WhenStuck is policy::WhenStuck {
        /// Say so and leave the guest at the source.
        #[default]
        Abort,
        /// Switch over all the same: the downtime will be longer than asked for.
        Switchover,
    }
}

choice! {
    /// What becomes of a guest some of whose pages the hardware lost.
    Poisoned is lost_page::Poisoned {
        /// It stays here.
        #[default]
        Refuse,
        /// It is moved, and a page that can no longer be read when it has to be sent arrives as
        /// zeros.
        Zero,
    }
}

choice! {
    /// How writes of the guest are followed.
    Tracking is machine::TrackingChoice {
        /// The ring, where it passes the probe, else the log.
        #[default]
        Auto,
        /// KVM's dirty ring, one a vCPU.
        Ring,
        /// KVM's dirty log, one bit a page.
        Log,
    }
}

choice! {
    /// Where a payload guest writes.
    Pattern is payload::Pattern {
        /// One page after the other, over and over.
        Sequential,
        /// Any page.
        #[default]
        Random,
        /// Any page, but seven times in eight one of a sixteenth of them.
        HotCold,
    }
}

/// What may carry the data, and how RDMA is used if it is.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct LinkArgs {
    /// What carries the data.
    #[arg(long, value_enum, default_value_t)]
    transport: TransportArg,
    /// RDMA device that must be used, such as mlx5_0. [default: the one that has the address]
    #[arg(long, value_name = "DEVICE", help_heading = "RDMA")]
    rdma_device: Option<String>,
    /// Port of the device, from 1. [default: the one that has the address]
    #[arg(long, value_name = "PORT", help_heading = "RDMA", value_parser = clap::value_parser!(u8).range(1..))]
    rdma_port: Option<u8>,
    /// Index of the local GID; on RoCE it names an address and the version. [default: the system's]
    #[arg(long, value_name = "INDEX", help_heading = "RDMA")]
    rdma_gid_index: Option<u8>,
    /// Traffic class of all packets, such as 104 for the DSCP 26. [default: the system's]
    #[arg(long, value_name = "CLASS", help_heading = "RDMA")]
    rdma_traffic_class: Option<u8>,
}

impl LinkArgs {
    /// What the engine takes.
    #[must_use]
    pub fn choice(&self) -> LinkChoice {
        LinkChoice {
            transport: self.transport.into(),
            rdma_device: self.rdma_device.clone(),
            rdma_port: self.rdma_port,
            rdma_gid_index: self.rdma_gid_index,
            rdma_traffic_class: self.rdma_traffic_class,
        }
    }
}

/// What the operator vouches for, where the engine cannot know.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct VouchedArgs {
    /// Move the guest although it has a device, netdev, object or block driver of this type: you
    /// know that it writes no guest memory that the tracking does not see. May be given again.
    #[arg(long = "allow-device", value_name = "TYPE")]
    devices: Vec<String>,
    /// Move the guest although it has virtualization switched on under KVM: you know that it runs
    /// no guest of its own. What the processor writes for one is not seen.
    #[arg(long)]
    no_nested_guest: bool,
}

impl VouchedArgs {
    /// What the engine takes.
    #[must_use]
    pub fn vouched(&self) -> Vouched {
        Vouched { devices: self.devices.clone(), no_nested_guest: self.no_nested_guest }
    }
}
