//! Lets a test hold a migration in a chosen stage, so that it can kill, cut or freeze something
//! just there. The binary that is tested is the binary that is shipped: this costs one look at a
//! variable.
//!
//! `PAGEFERRY_HOLD=rounds:2000,loaded:9000:/tmp/held` sleeps so many milliseconds when the named
//! point is reached, or only until the file that is named behind them is gone, and says so on
//! stderr. Points: `setup`, `rounds`, `armed`, `pausing`, `switchover`, `sealed`, `committed`,
//! `resumed`, `moved` (source); `room`, `filling`, `loaded`, `owner` (destination).

use crate::notice::say;
use crate::report::stage::Stage;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How often a hold looks whether its file is still there.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Where to hold, for how long, and the file that ends it.
#[derive(Debug, PartialEq, Eq)]
struct Hold {
    point: String,
    time: Duration,
    file: Option<PathBuf>,
}

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
    static HOLDS: OnceLock<Vec<Hold>> = OnceLock::new();
    let holds = HOLDS.get_or_init(|| {
        std::env::var("PAGEFERRY_HOLD").map(|text| parse(&text)).unwrap_or_default()
    });
    let Some(hold) = holds.iter().find(|hold| hold.point == name) else { return };
    if hold.file.as_ref().is_some_and(|file| !file.exists()) {
        return;
    }
    say(&format!("held at {name} for {} ms", hold.time.as_millis()));
    let until = Instant::now() + hold.time;
    while Instant::now() < until && hold.file.as_ref().is_none_or(|file| file.exists()) {
        std::thread::sleep(LOOK_EVERY.min(hold.time));
    }
}

/// The limit of this name, for tests that must outlast one: `PAGEFERRY_LIMIT=ask-again:2000` is two
/// seconds.
pub fn limit(name: &str, otherwise: Duration) -> Duration {
    static LIMITS: OnceLock<Vec<Hold>> = OnceLock::new();
    let limits = LIMITS.get_or_init(|| {
        std::env::var("PAGEFERRY_LIMIT").map(|text| parse(&text)).unwrap_or_default()
    });
    limits.iter().find(|limit| limit.point == name).map_or(otherwise, |limit| limit.time)
}

fn parse(text: &str) -> Vec<Hold> {
    text.split(',')
        .filter_map(|part| {
            let mut words = part.splitn(3, ':');
            let (point, ms, file) = (words.next()?, words.next()?, words.next());
            Some(Hold {
                point: point.to_owned(),
                time: Duration::from_millis(ms.parse().ok()?),
                file: file.map(PathBuf::from),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_are_read_from_the_variable() {
        let hold = |point: &str, ms, file: Option<&str>| Hold {
            point: point.into(),
            time: Duration::from_millis(ms),
            file: file.map(PathBuf::from),
        };
        assert_eq!(
            parse("rounds:20,loaded:9000:/tmp/held,odd,also:odd"),
            [hold("rounds", 20, None), hold("loaded", 9000, Some("/tmp/held"))]
        );
    }
}
