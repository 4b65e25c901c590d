//! What the operator must hear of, as events of `tracing` with a target of their own: the program
//! that embeds the engine shows them whatever level it logs at. The engine itself writes nowhere.

use crate::clock;

/// The target of these events. Shown to the operator as they are, without level and time.
pub const TARGET: &str = "pageferry::operator";

/// Tells the operator. One event, one line.
pub fn say(text: &str) {
    // A simulated process keeps what it says to itself.
    if !clock::tell(text) {
        tracing::info!(target: TARGET, "{text}");
    }
}
