//! Units as people write them on the command line.

use std::time::Duration;

/// `10ms`, `1.5s`, `2min`.
pub fn duration(text: &str) -> Result<Duration, String> {
    if let Some(ms) = text.strip_suffix("ms").and_then(|number| number.parse::<f64>().ok())
        && let Ok(duration) = Duration::try_from_secs_f64(ms / 1e3)
    {
        return Ok(duration);
    }
    humantime::parse_duration(text)
        .map_err(|e| format!("{e}; write a time such as 10ms, 1s or 2min"))
}

/// A limit on the downtime: none at all cannot be kept.
pub fn downtime_max(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err(
            "a guest that is moved is paused for some milliseconds: allow it some, such as 10ms"
                .into(),
        ),
        limit => Ok(limit),
    }
}

/// A rate in bytes a second: `10Gbit`, `800Mbit`, `1.5GB`, `500MiB`; bits and bytes a second.
pub fn rate(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 8] = [
        ("Kbit", 1e3 / 8.0),
        ("Mbit", 1e6 / 8.0),
        ("Gbit", 1e9 / 8.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
    ];
    let number = text.trim_end_matches("/s").trim_end_matches("ps");
    UNITS
        .iter()
        .find_map(|(unit, bytes)| {
            Some(number.strip_suffix(unit)?.trim().parse::<f64>().ok()? * bytes)
        })
        .filter(|rate| *rate >= 1.0 && *rate < u64::MAX as f64)
        .map(|rate| rate as u64)
        .ok_or_else(|| "write a rate such as 10Gbit, 800Mbit, 500MB or 1GiB (a second)".into())
}

/// A size in bytes: `512M`, `4G`, `1.5GiB`; a unit is 1024 of the one before.
pub fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(char, f64); 4] =
        [('K', 1024.0), ('M', 1_048_576.0), ('G', 1_073_741_824.0), ('T', 1_099_511_627_776.0)];
    let number = text.strip_suffix("iB").or_else(|| text.strip_suffix('B')).unwrap_or(text);
    UNITS
        .iter()
        .find_map(|(unit, bytes)| {
            Some(number.strip_suffix(*unit)?.trim().parse::<f64>().ok()? * bytes)
        })
        .or_else(|| text.parse::<u64>().ok().map(|bytes| bytes as f64))
        .filter(|size| *size >= 0.0 && *size < u64::MAX as f64)
        .map(|size| size as u64)
        .ok_or_else(|| "write a size such as 512M or 4G".into())
}

/// Bytes for people: `1.5 GiB`.
#[must_use]
pub fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_people_write_them() {
        assert_eq!(rate("10Gbit"), Ok(1_250_000_000));
        assert_eq!(rate("10Gbit/s"), Ok(1_250_000_000));
        assert_eq!(rate("800Mbitps"), Ok(100_000_000));
        assert_eq!(rate("1.5GB"), Ok(1_500_000_000));
        assert_eq!(rate("1MiB"), Ok(1_048_576));
        for wrong in ["", "10", "Gbit", "-1GB", "0GB", "nanGB", "10 apples"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("1.5GiB"), Ok(3 << 29));
        assert_eq!(size("4 GB"), Ok(4 << 30));
        assert_eq!((size("4096"), size("0")), (Ok(4096), Ok(0)));
        for wrong in ["", "M", "-1M", "infM", "nanG", "5 apples", "1.5"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        assert_eq!(duration("10ms"), Ok(Duration::from_millis(10)));
        assert_eq!(duration("0.5ms"), Ok(Duration::from_micros(500)));
        assert_eq!(duration("2s"), Ok(Duration::from_secs(2)));
        for wrong in ["", "ten", "-1ms", "10"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
    #[test]
    fn a_downtime_of_nothing_is_no_limit() {
        assert_eq!(downtime_max("1ms"), Ok(Duration::from_millis(1)));
        for wrong in ["0", "0ms", "0s", "-1ms"] {
            assert!(downtime_max(wrong).is_err(), "{wrong}");
        }
    }
}
