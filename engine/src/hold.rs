//! Lets a test hold a migration in a chosen stage, so that it can kill, cut or freeze something just
//! there. The binary that is tested is the binary that is shipped: this costs one look at a variable.
//!
//! `PAGEFERRY_HOLD=rounds:2000,loaded:500` sleeps so many milliseconds when the named point is reached,
//! and says so on stderr. Points: `setup`, `rounds`, `switchover`, `committed` (source); `filling`,
//! `loaded`, `owner` (destination).

use crate::progress::Stage;
use std::sync::OnceLock;
use std::time::Duration;

/// Sleeps if the environment says so for this stage of the source.
pub fn at(stage: Stage) {
    let name = match stage {
        Stage::Setup => "setup",
        Stage::Rounds => "rounds",
        Stage::Switchover => "switchover",
        Stage::Committed => "committed",
        Stage::Idle | Stage::Done => return,
    };
    point(name);
}

/// Sleeps if the environment says so for this point.
pub fn point(name: &str) {
    static POINTS: OnceLock<Vec<(String, Duration)>> = OnceLock::new();
    let points =
        POINTS.get_or_init(|| std::env::var("PAGEFERRY_HOLD").map(|text| parse(&text)).unwrap_or_default());
    if let Some((_, time)) = points.iter().find(|(held, _)| held == name) {
        eprintln!("pageferry: held at {name} for {} ms", time.as_millis());
        std::thread::sleep(*time);
    }
}

fn parse(text: &str) -> Vec<(String, Duration)> {
    text.split(',')
        .filter_map(|part| {
            let (name, ms) = part.split_once(':')?;
            Some((name.to_owned(), Duration::from_millis(ms.parse().ok()?)))
        })
        .collect()
}
