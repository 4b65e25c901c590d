//! What is done about the differences: refused, or said and passed over.

use super::{Difference, Platform, Weight, compare};
use pageferry_engine::error::{Error, Result};
use pageferry_engine::notice::say;

/// Differences that a refusal names; one cause often has several.
const NAMED_MAX: usize = 8;
/// What a refusal takes for them, in characters: it travels to the source, and is read by a person.
const NAMED_CHARS_MAX: usize = 700;

/// Fails, naming the differences, if the guest would be another one here.
///
/// # Errors
/// [`Error::Refused`] unless each difference only warns or is allowed by its name.
pub fn admit(theirs: &Platform, ours: &Platform, allowed: &[String]) -> Result<()> {
    let (passed, refused): (Vec<_>, Vec<_>) =
        compare(theirs, ours).into_iter().partition(|difference| {
            difference.weight == Weight::Warn || difference.is_allowed(allowed)
        });
    let Some(first) = refused.first() else {
        for difference in passed {
            say(&format!("the guest will see a difference: {difference}"));
        }
        return Ok(());
    };
    Err(Error::refused(format!(
        "the guest would see another machine here: {}. Start `pageferry receive` with the same QEMU options as the \
         source; if you know that the guest can live with it, with --allow-difference {} and the like",
        named(&refused),
        first.name
    )))
}

fn named(differences: &[Difference]) -> String {
    let mut text = String::new();
    let mut count = 0;
    for difference in differences.iter().take(NAMED_MAX) {
        let one = difference.to_string();
        if count > 0 && text.chars().count() + one.chars().count() > NAMED_CHARS_MAX {
            break;
        }
        if count > 0 {
            text.push_str("; ");
        }
        text.extend(one.chars().take(NAMED_CHARS_MAX));
        count += 1;
    }
    match differences.len() - count {
        0 => text,
        more => format!("{text}; and {more} more"),
    }
}
