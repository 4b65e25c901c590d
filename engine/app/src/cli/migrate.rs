//! What `pageferry migrate` takes.

use crate::cli::{choices, units};
use choices::{LinkArgs, VouchedArgs};
use clap::Args;
use pageferry_engine::error::Result;
use pageferry_engine::source::{MigrateOptions, default_lanes};
use std::time::Duration;

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// The guest's name on this host.
    pub(crate) name: String,
    /// Where a `pageferry receive` waits: HOST:PORT, [fe80::1%eth0]:PORT or unix:PATH.
    #[arg(long, value_name = "ADDR:PORT")]
    to: String,
    #[command(flatten)]
    link: LinkArgs,
    /// Queue pairs or TCP connections to spread the data over; the latter take a thread each at
    /// both ends. [default: half of the cores, 2 to 4; 1 on one core]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    lanes: Option<u8>,
    /// Longest time in which the guest may be paused, such as 10ms or 1s.
    #[arg(long, default_value = "10ms", value_parser = units::downtime_max, value_name = "TIME")]
    downtime_max: Duration,
    /// Bound on the rate while the guest runs, such as 10Gbit or 500MB (a second). The last
    /// pages, with the guest stopped, go as fast as they can.
    #[arg(long, value_parser = units::rate, value_name = "RATE")]
    bandwidth_max: Option<u64>,
    /// What to do if the guest writes faster than the link carries: leave it here, or switch over
    /// with a longer downtime than asked for.
    #[arg(long, value_enum, default_value_t)]
    when_stuck: choices::WhenStuck,
    /// Most rounds over memory before that is decided.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rounds_max: u32,
    /// Digest all memory on both sides before the guest runs; the guest is paused meanwhile.
    #[arg(long)]
    verify: bool,
    /// What to do if the hardware of this host lost pages of the guest: leave the guest here, or
    /// move it with zeros in their place. Either way what they held is lost, unless it was sent
    /// before.
    #[arg(long, value_enum, default_value_t)]
    poisoned: choices::Poisoned,
    /// Print the report as JSON on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// Connect off loopback although the connection is neither encrypted nor authenticated yet.
    #[arg(long)]
    insecure: bool,
    #[command(flatten)]
    vouched: VouchedArgs,
}

pub(crate) fn migrate_options(args: &MigrateArgs) -> Result<MigrateOptions> {
    Ok(MigrateOptions {
        link: args.link.choice(),
        to: args.to.clone(),
        lanes: args.lanes.unwrap_or_else(default_lanes),
        downtime_us_max: u64::try_from(args.downtime_max.as_micros()).unwrap_or(u64::MAX),
        bytes_per_second_max: args.bandwidth_max,
        when_stuck: args.when_stuck.into(),
        rounds_max: args.rounds_max,
        verify: args.verify,
        poisoned: args.poisoned.into(),
        insecure: args.insecure,
        vouched: args.vouched.vouched(),
    })
}
