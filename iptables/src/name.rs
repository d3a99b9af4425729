//! Names within kernel limits, and stable names made from keys.

use std::fmt;

use sha2::{Digest, Sha256};

/// Why a text cannot be a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The kernel would refuse or cut it.
    #[error("name {name:?} has {length} bytes, the kernel allows {limit}")]
    TooLong {
        /// The refused text.
        name: String,
        /// Its length in bytes.
        length: usize,
        /// The kernel's limit in bytes.
        limit: usize,
    },
    /// Nothing to call it by.
    #[error("a name cannot be empty")]
    Empty,
    /// Only visible ASCII survives the command line tools unchanged.
    #[error(
        "name {name:?} holds {found:?}; use visible ASCII without quotes, backslash, comma or leading dash"
    )]
    Unprintable {
        /// The refused text.
        name: String,
        /// The first character that is not allowed.
        found: char,
    },
}

/// At most `N` bytes of visible ASCII, kept in place so that a name is `Copy`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Short<const N: usize> {
    // Zero padded: names hold no zero byte, so this compares as the text does.
    bytes: [u8; N],
    length: u8,
}

impl<const N: usize> Short<N> {
    fn new(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > N {
            return Err(NameError::TooLong { name: text.to_owned(), length: text.len(), limit: N });
        }
        let refused = |(at, c): &(usize, char)| {
            !c.is_ascii_graphic()
                || matches!(c, '"' | '\'' | '\\' | ',')
                || (*at == 0 && matches!(c, '-' | '!'))
        };
        if let Some((_, found)) = text.char_indices().find(refused) {
            return Err(NameError::Unprintable { name: text.to_owned(), found });
        }
        let mut bytes = [0; N];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self { bytes, length: text.len() as u8 })
    }

    fn as_str(&self) -> &str {
        // Never empty in practice: only ASCII gets in.
        self.bytes.get(..usize::from(self.length)).and_then(|b| std::str::from_utf8(b).ok()).unwrap_or("")
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $limit:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Short<$limit>);

        impl $type {
            /// Longest name in bytes.
            pub const LIMIT: usize = $limit;

            /// Checks length and characters.
            ///
            /// # Errors
            /// A text the kernel or its tools would refuse or change.
            pub fn new(text: &str) -> Result<Self, NameError> {
                Short::new(text).map(Self)
            }

            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                self.0.as_str()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.as_str())
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }

        impl std::str::FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }
    };
}

name! {
    /// Name of an ipset: `IPSET_MAXNAMELEN` (linux/netfilter/ipset/ip_set.h) less its zero byte.
    SetName, 31
}
name! {
    /// Name of a chain: `XT_EXTENSION_MAXNAMELEN` (linux/netfilter/x_tables.h) less its zero byte.
    ChainName, 28
}

/// `prefix` and 16 base32 characters (80 bits) of the SHA-256 of `parts`.
///
/// Each part is hashed behind its length, so `("a", "bc")` and `("ab", "c")` differ.
#[must_use]
pub fn hashed(prefix: &str, parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    let mut name = String::with_capacity(prefix.len() + 16);
    name.push_str(prefix);
    base32(&hash.finalize()[..10], &mut name);
    name
}

/// RFC 4648 section 6 alphabet, no padding; whole groups of five bytes only.
fn base32(bytes: &[u8], out: &mut String) {
    const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    for group in bytes.chunks_exact(5) {
        let bits = group.iter().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
        for place in (0..8).rev() {
            out.push(char::from(ALPHABET[(bits >> (5 * place) & 31) as usize]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_the_kernels() {
        assert_eq!(SetName::new(&"x".repeat(31)).unwrap().as_str(), "x".repeat(31));
        assert!(matches!(
            SetName::new(&"x".repeat(32)),
            Err(NameError::TooLong { length: 32, limit: 31, .. })
        ));
        assert!(ChainName::new(&"x".repeat(28)).is_ok());
        assert!(ChainName::new(&"x".repeat(29)).is_err());
        assert_eq!(SetName::new(""), Err(NameError::Empty));
        for text in ["a b", "a\"b", "-a", "!a", "a\u{e9}", "a,b", "a\n"] {
            assert!(matches!(SetName::new(text), Err(NameError::Unprintable { .. })), "{text:?}");
        }
        assert!(SetName::new("inet6:kube-router-svip-prt").is_ok());
    }

    #[test]
    fn order_is_the_texts() {
        let mut names = ["b", "ab", "a", "aa"].map(|n| SetName::new(n).unwrap());
        names.sort();
        assert_eq!(names.map(|n| n.to_string()), ["a", "aa", "ab", "b"]);
    }

    #[test]
    fn hashed_names_are_stable_and_parts_do_not_run_together() {
        assert_ne!(hashed("P-", &["a", "bc"]), hashed("P-", &["ab", "c"]));
        let name = hashed("KUBE-SRC-", &["default", "policy"]);
        assert_eq!(name.len(), 25);
        assert_eq!(name, hashed("KUBE-SRC-", &["default", "policy"]));
        assert!(name[9..].bytes().all(|b| b.is_ascii_uppercase() || (b'2'..=b'7').contains(&b)));
    }

    #[test]
    fn base32_agrees_with_rfc_4648() {
        let mut out = String::new();
        base32(b"fooba", &mut out);
        assert_eq!(out, "MZXW6YTB");
    }
}
