//! Lists and strings of a message, refused while they are decoded if they are longer than any
//! honest peer makes them. A length that a stranger names reserves nothing: memory grows with the
//! bytes that have come.

use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde::{Deserialize, de};
use std::fmt;
use std::marker::PhantomData;

/// Elements to reserve for ahead of their bytes.
const RESERVED_MAX: usize = 64;

/// A list of at most `MAX` elements, for `deserialize_with`.
pub(crate) fn list<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct List<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for List<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {MAX} elements")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Vec<T>, A::Error> {
            let announced = elements.size_hint().unwrap_or(0);
            if announced > MAX {
                return Err(A::Error::invalid_length(announced, &self));
            }
            let mut list = Vec::with_capacity(announced.min(RESERVED_MAX));
            while let Some(element) = elements.next_element()? {
                if list.len() == MAX {
                    return Err(A::Error::invalid_length(MAX + 1, &self));
                }
                list.push(element);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(List::<T, MAX>(PhantomData))
}

/// A string of at most `BYTES_MAX` bytes, for `deserialize_with`.
pub(crate) fn text<'de, D, const BYTES_MAX: usize>(deserializer: D) -> Result<String, D::Error>
where
    D: Deserializer<'de>,
{
    struct Text<const BYTES_MAX: usize>;

    impl<const BYTES_MAX: usize> Visitor<'_> for Text<BYTES_MAX> {
        type Value = String;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a string of at most {BYTES_MAX} bytes")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
            if text.len() > BYTES_MAX {
                return Err(E::invalid_length(text.len(), &self));
            }
            Ok(text.into())
        }
    }

    deserializer.deserialize_str(Text::<BYTES_MAX>)
}

/// The beginning of `text` that fits into `bytes_max`, whole characters only.
pub(crate) fn cut(text: &str, bytes_max: usize) -> &str {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Serialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Sample {
        #[serde(deserialize_with = "list::<_, _, 3>")]
        list: Vec<u16>,
        #[serde(deserialize_with = "text::<_, 4>")]
        text: String,
    }

    fn survives(list: &[u16], text: &str) -> bool {
        let sample = Sample { list: list.into(), text: text.into() };
        let bytes = postcard::to_stdvec(&sample).unwrap();
        postcard::from_bytes::<Sample>(&bytes).is_ok_and(|decoded| decoded == sample)
    }

    #[test]
    fn what_is_longer_than_its_bound_is_refused() {
        assert!(survives(&[1, 2, 3], "four"));
        assert!(!survives(&[1, 2, 3, 4], "four"));
        assert!(!survives(&[1, 2, 3], "fives"));
    }

    #[test]
    fn a_cut_leaves_whole_characters() {
        assert_eq!(
            [cut("äöü", 3), cut("äöü", 4), cut("äöü", 99), cut("ä", 0)],
            ["ä", "äö", "äöü", ""]
        );
    }
}
