//! Parameters: words `pf.NAME=VALUE`, from the kernel's command line or the program's own.

use std::fmt;

/// In which order pages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other, round and round.
    Sequential,
    /// Any page, evenly.
    Random,
    /// Nine writes of ten go to the first PERCENT of the pages, the rest anywhere.
    Hot(u8),
}

/// What the workload does. `Default` is what is not said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// `pf.mib`: memory that is written again and again, in MiB.
    pub mib: u32,
    /// `pf.touch`: memory that is filled once and then only checked, in MiB.
    pub touch_mib: u32,
    /// `pf.rate`: writing rate of all threads together in MB/s (10^6 bytes); 0 is as fast as
    /// possible.
    pub rate_mb: u32,
    /// `pf.sweep`: rate of the background check in MB/s; 0 is none.
    pub sweep_mb: u32,
    /// `pf.pattern`: `sequential`, `random` or `hot:PERCENT`.
    pub pattern: Pattern,
    /// `pf.threads`: threads that write.
    pub threads: u32,
    /// `pf.disk`: threads that read and write the first disk; 0 leaves it alone.
    pub disk: u32,
    /// `pf.tick_us`: period of the pulse in microseconds.
    pub tick_us: u32,
    /// `pf.ports`: 0 keeps the pulse away from I/O ports, which nested virtualization in emulation
    /// lets nobody but the kernel use. Gaps are then known without the time in which the guest was
    /// stopped.
    pub ports: u32,
    /// `pf.beat_us`: period of heartbeats on the console in microseconds; 0 is none. They go
    /// through the kernel, so that they work where ports are the kernel's alone, and where there is
    /// no COM2.
    pub beat_us: u32,
    /// `pf.status_s`: seconds between two status lines; 0 is none but those that are asked for. A
    /// line on the console costs the guest some ten accesses to ports for each character, and
    /// heartbeats on it wait until it is out.
    pub status_s: u32,
    /// `pf.echo`: UDP port on which datagrams are answered; 0 is none.
    pub echo: u16,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            mib: 64,
            touch_mib: 0,
            rate_mb: 80,
            sweep_mb: 8,
            pattern: Pattern::Random,
            threads: 1,
            disk: 0,
            tick_us: 500,
            ports: 1,
            beat_us: 0,
            status_s: 1,
            echo: 0,
        }
    }
}

impl fmt::Display for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            mib,
            touch_mib,
            rate_mb,
            sweep_mb,
            pattern,
            threads,
            disk,
            tick_us,
            ports,
            beat_us,
            status_s,
            echo,
        } = self;
        write!(
            f,
            "pf.mib={mib} pf.touch={touch_mib} pf.rate={rate_mb} pf.sweep={sweep_mb} pf.pattern="
        )?;
        match pattern {
            Pattern::Sequential => f.write_str("sequential")?,
            Pattern::Random => f.write_str("random")?,
            Pattern::Hot(percent) => write!(f, "hot:{percent}")?,
        }
        write!(
            f,
            " pf.threads={threads} pf.disk={disk} pf.tick_us={tick_us} pf.ports={ports} pf.beat_us={beat_us} pf.status_s={status_s} pf.echo={echo}"
        )
    }
}

/// Pages are numbered with 32 bits; this keeps them far below the end (512 GiB).
const MIB_MAX: u32 = 512 * 1024;

impl Params {
    /// Reads the words that begin with `pf.`; all others are somebody else's.
    pub fn parse(line: &str) -> Result<Self, String> {
        let mut params = Self::default();
        for word in line.split_whitespace().filter(|word| word.starts_with("pf.")) {
            let (name, value) = word.split_once('=').ok_or_else(|| format!("{word}: no value"))?;
            let number = |low: u32, high: u32| match value.parse::<u32>() {
                Ok(n) if (low..=high).contains(&n) => Ok(n),
                _ => Err(format!("{word}: not a number from {low} to {high}")),
            };
            match name {
                "pf.mib" => params.mib = number(1, MIB_MAX)?,
                "pf.touch" => params.touch_mib = number(0, MIB_MAX)?,
                "pf.rate" => params.rate_mb = number(0, 1_000_000)?,
                "pf.sweep" => params.sweep_mb = number(0, 1_000_000)?,
                "pf.threads" => params.threads = number(1, 64)?,
                "pf.disk" => params.disk = number(0, 64)?,
                "pf.tick_us" => params.tick_us = number(100, 100_000)?,
                "pf.ports" => params.ports = number(0, 1)?,
                "pf.beat_us" => params.beat_us = number(0, 1_000_000)?,
                "pf.status_s" => params.status_s = number(0, 3600)?,
                "pf.echo" => params.echo = number(0, 65_535)? as u16,
                "pf.pattern" => {
                    params.pattern = pattern(value).ok_or_else(|| {
                        format!("{word}: not one of sequential, random, hot:PERCENT (1 to 99)")
                    })?
                }
                _ => return Err(format!("{word}: no such parameter")),
            }
        }
        Ok(params)
    }
}

fn pattern(value: &str) -> Option<Pattern> {
    match value.split_once(':') {
        None if value == "sequential" => Some(Pattern::Sequential),
        None if value == "random" => Some(Pattern::Random),
        Some(("hot", percent)) => {
            percent.parse().ok().filter(|p| (1..=99).contains(p)).map(Pattern::Hot)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_command_line_is_read() {
        let line = "console=ttyS0 quiet pf.mib=128 pf.rate=0 pf.pattern=hot:10 pf.threads=2 pf.touch=300 pf.beat_us=2000 pf.status_s=0\n";
        let want = Params {
            mib: 128,
            rate_mb: 0,
            pattern: Pattern::Hot(10),
            threads: 2,
            touch_mib: 300,
            beat_us: 2000,
            status_s: 0,
            ..Params::default()
        };
        assert_eq!(Params::parse(&want.to_string()), Ok(want.clone()));
        assert_eq!(Params::parse(line), Ok(want));
        assert_eq!(Params::parse("quiet"), Ok(Params::default()));
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for word in [
            "pf.mib=0",
            "pf.mib=x",
            "pf.mib",
            "pf.nothing=1",
            "pf.pattern=hot:100",
            "pf.threads=65",
        ] {
            assert!(Params::parse(word).unwrap_err().starts_with(word), "{word}");
        }
    }
}
