//! Capabilities by name: what one release can and another cannot.
//!
//! ```text
//!   source                                        destination
//!   Hello { features: what the source can }   ->
//!                                             <-  Welcome { features: what the destination can }
//!   agree(both)                                   agree(both)
//! ```
//!
//! Both ends find with the same function what both can, and that is fixed from Welcome on. A name
//! that one end does not know is ignored there. A name that a migration needs, and that the
//! destination does not have, refuses it: [`Agreed::require`].
//!
//! postcard does not describe itself, so a field more in a message would break every older peer.
//! Instead the messages end in a list of names with bytes, in which what a reader does not know can
//! be passed over. Messages after Welcome have that list, too: a feature that both ends agreed on
//! puts there what it has to say.

use super::bounded;
use crate::error::{Error, Result};
use crate::text;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// All memory is digested at both ends before the guest runs there.
pub const VERIFY: &str = "verify";

/// All that this release can.
const KNOWN: &[&str] = &[VERIFY];

/// Features of one message at most.
pub const FEATURES_MAX: usize = 64;

/// A feature's name at most, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// What one feature says in one message at most, in bytes. All of them share the bound of the
/// message ([`super::control::BODY_BYTES_MAX`]) with what else is in it.
pub const PAYLOAD_BYTES_MAX: usize = 4 << 10;

/// One feature, and what it says in this message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Feature {
    /// Its name; for people it is escaped ([`Features::names`]).
    #[serde(deserialize_with = "bounded::text::<_, NAME_BYTES_MAX>")]
    pub name: String,
    /// In a form that only the feature itself knows.
    #[serde(deserialize_with = "bounded::list::<_, _, PAYLOAD_BYTES_MAX>")]
    pub payload: Vec<u8>,
}

/// The features of one message, each at most once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    #[serde(deserialize_with = "each_once")]
    list: Vec<Feature>,
}

impl Features {
    /// What this release can, for Hello and Welcome.
    #[must_use]
    pub fn ours() -> Self {
        KNOWN.iter().fold(Self::default(), |ours, name| ours.with(name, Vec::new()))
    }

    /// The same with one more.
    ///
    /// # Panics
    /// If it is there already: a feature has one place in a message.
    #[must_use]
    pub fn with(mut self, name: &str, payload: Vec<u8>) -> Self {
        assert!(self.payload(name).is_none(), "{name} stands in this message already");
        self.list.push(Feature { name: name.into(), payload });
        self
    }

    /// What this feature says here, if it is named.
    #[must_use]
    pub fn payload(&self, name: &str) -> Option<&[u8]> {
        self.list.iter().find(|feature| feature.name == name).map(|f| f.payload.as_slice())
    }

    /// The names, for people: cut and escaped.
    #[must_use]
    pub fn names(&self) -> String {
        let names: Vec<_> = self.list.iter().map(|feature| text::name(&feature.name)).collect();
        names.join(", ")
    }
}

/// A list of features, refused where a name is empty or stands there twice: two readers might take
/// different ones.
fn each_once<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Feature>, D::Error> {
    let list: Vec<Feature> = bounded::list::<_, _, FEATURES_MAX>(deserializer)?;
    let mut names = BTreeSet::new();
    if list.iter().any(|feature| feature.name.is_empty() || !names.insert(&feature.name)) {
        return Err(D::Error::custom("a feature without a name, or one that is named twice"));
    }
    Ok(list)
}

/// What both ends of a session can.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Agreed(BTreeSet<String>);

/// What both can. Each end offers only what it knows, so each finds only names that it knows.
#[must_use]
pub fn agree(source: &Features, destination: &Features) -> Agreed {
    let both = source.list.iter().filter(|feature| destination.payload(&feature.name).is_some());
    Agreed(both.map(|feature| feature.name.clone()).collect())
}

/// A feature that a migration cannot do without, and what the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Name of the feature.
    pub feature: &'static str,
    /// The option that needs it.
    pub option: &'static str,
}

impl Agreed {
    /// Whether both ends can this.
    #[must_use]
    pub fn has(&self, feature: &str) -> bool {
        self.0.contains(feature)
    }

    /// Fails if the destination cannot something that the migration needs.
    ///
    /// # Errors
    /// [`Error::Refused`] with the name and what to do.
    pub fn require(&self, needs: &[Need]) -> Result<()> {
        match needs.iter().find(|need| !self.has(need.feature)) {
            None => Ok(()),
            Some(Need { feature, option }) => Err(Error::Refused(format!(
                "the destination does not know {feature}: update pageferry there, or do without {option}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &[&str]) -> Features {
        names.iter().fold(Features::default(), |all, name| all.with(name, name.as_bytes().into()))
    }

    /// Every list of some of these names, in every order.
    fn all_lists(names: &[&'static str]) -> Vec<Vec<&'static str>> {
        let mut lists = vec![Vec::new()];
        for (at, first) in names.iter().enumerate() {
            let mut others = names.to_vec();
            others.remove(at);
            lists.extend(all_lists(&others).into_iter().map(|mut list| {
                list.insert(0, first);
                list
            }));
        }
        lists
    }

    #[test]
    fn both_ends_agree_on_what_both_can_whatever_either_names() {
        const NAMES: [&str; 4] = [VERIFY, "later", "", "\u{1b}[2J"];
        let lists = all_lists(&NAMES);
        assert_eq!(lists.len(), 65, "all of them: 1 + 4 + 12 + 24 + 24");
        for source in &lists {
            for destination in &lists {
                let agreed = agree(&named(source), &named(destination));
                assert_eq!(agreed, agree(&named(destination), &named(source)));
                for name in NAMES {
                    let both = source.contains(&name) && destination.contains(&name);
                    assert_eq!(agreed.has(name), both, "{name}: {source:?}, {destination:?}");
                    let need = Need { feature: name, option: "--it" };
                    assert_eq!(agreed.require(&[need]).is_ok(), both);
                }
                assert!(agreed.require(&[]).is_ok());
            }
        }
    }

    #[test]
    fn a_newer_and_an_older_peer_are_spoken_to() {
        let newer = Features::ours().with("later", vec![1, 2, 3]);
        assert_eq!(agree(&Features::ours(), &newer), agree(&Features::ours(), &Features::ours()));
        assert_eq!(agree(&Features::ours(), &Features::default()), Agreed::default());
    }

    #[test]
    fn what_is_missing_is_named_with_the_remedy() {
        let needs = [Need { feature: VERIFY, option: "--verify" }];
        let refused = Agreed::default().require(&needs).unwrap_err();
        assert!(matches!(refused, Error::Refused(_)));
        assert_eq!(
            refused.to_string(),
            "the destination does not know verify: update pageferry there, or do without --verify"
        );
        assert!(agree(&Features::ours(), &Features::ours()).require(&needs).is_ok());
    }

    #[test]
    fn names_are_shown_as_one_harmless_line() {
        let long = "x".repeat(text::NAME_CHARS_MAX + 1);
        let shown = named(&["verify", "a\nb\u{1b}", &long]).names();
        let cut = format!("{}...", "x".repeat(text::NAME_CHARS_MAX));
        assert_eq!(shown, format!(r"verify, a\nb\u{{1b}}, {cut}"));
    }

    fn decoded(list: &[(String, Vec<u8>)]) -> Option<Features> {
        postcard::from_bytes(&postcard::to_stdvec(list).unwrap()).ok()
    }

    #[test]
    fn a_list_beyond_its_bounds_is_refused_while_it_is_decoded() {
        let many = |count: usize| -> Vec<_> {
            (0..count).map(|i| (format!("{i:064}"), vec![0xff; 1])).collect()
        };
        assert!(decoded(&many(FEATURES_MAX)).is_some());
        assert!(decoded(&many(FEATURES_MAX + 1)).is_none());
        for (name_bytes, payload_bytes, fits) in [
            (NAME_BYTES_MAX, PAYLOAD_BYTES_MAX, true),
            (NAME_BYTES_MAX + 1, 0, false),
            (1, PAYLOAD_BYTES_MAX + 1, false),
            (0, 0, false),
        ] {
            let one = [("n".repeat(name_bytes), vec![7; payload_bytes])];
            assert_eq!(decoded(&one).is_some(), fits, "{name_bytes}, {payload_bytes}");
        }
    }

    #[test]
    fn a_feature_that_is_named_twice_is_refused() {
        let one = ("verify".to_owned(), vec![1]);
        assert!(decoded(std::slice::from_ref(&one)).is_some());
        assert!(decoded(&[one.clone(), one]).is_none());
    }
}
